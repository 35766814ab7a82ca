"""The pictures of one visitor: a folder of PNGs whose metadata are the history, so that it survives a restart."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from textcond.apps.metadata import Parameters, read_parameters

KEPT, MOST_FAVOURITES = 24, 100
KEPT_DAYS = 30
PREVIEW, FAVOURITE = "step-", "favourite"
# Seconds after which the browser has fetched a preview, or never will.
SHOWN = 60
_TOKEN, _FOLDER = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Made:
    """A picture of this visitor and what made it."""

    path: Path
    parameters: Parameters
    favourite: bool = False


class History:
    """The pictures made by whoever holds `token`, newest first; the last ones and the favourites are kept.

    Args:
        root: folder of all visitors.
        token: names one of them and is known to that browser alone; a new one where it is empty or malformed. The
            folder, which stands in the addresses of its pictures, tells nobody the token.
        kept: how many, beside the favourites.
    """

    def __init__(self, root: Path, token: str | None = None, kept: int = KEPT):
        self.token = token if token and _TOKEN.fullmatch(token) else secrets.token_hex(16)
        self.folder, self.kept = root / hashlib.sha256(self.token.encode()).hexdigest()[:32], kept

    def new_folder(self) -> Path:
        """An empty folder for the next picture, in the order of time."""
        self._tidy()
        folder = self.folder / f"{time.time_ns():016x}"
        folder.mkdir(parents=True)
        return folder

    def added(self, made: Made) -> None:
        """Forget the pictures beyond the last ones, of which `made` is one; favourites stay."""
        for old in [folder for folder in self._folders() if not _is_favourite(folder)][self.kept :]:
            shutil.rmtree(old, ignore_errors=True)

    def adopt(self, made: Made) -> Made:
        """A copy of a picture of this visitor that is not to go when others come; the one that is here if it is."""
        same = next((one for one in self.pictures() if one.parameters == made.parameters), None)
        if same is None:
            same = Made(Path(shutil.copy(made.path, self.new_folder())), made.parameters)
            self.added(same)
        return same

    def star(self, name: str) -> None:
        """Make the picture in the folder of that name a favourite, or if it is one, none.

        Raises:
            ValueError: there are `MOST_FAVOURITES` already.
        """
        folder = self.folder / name
        if not (_FOLDER.fullmatch(name) and folder.is_dir()):  # forgotten meanwhile
            return
        mark = folder / FAVOURITE
        if mark.exists():
            mark.unlink()
        elif sum(map(_is_favourite, self._folders())) >= MOST_FAVOURITES:
            raise ValueError(f"{MOST_FAVOURITES} pictures are favourites: take the star from another one first")
        else:
            mark.touch()

    def pictures(self) -> list[Made]:
        """All that are kept."""
        made: list[Made] = []
        others = 0
        for folder in self._folders():
            favourite = _is_favourite(folder)
            for path in folder.glob("*.png"):
                if path.name.startswith(PREVIEW) or (others == self.kept and not favourite):
                    continue
                with contextlib.suppress(OSError, ValueError):  # removed meanwhile
                    made.append(Made(path, read_parameters(path), favourite))
                    others += not favourite
        return made

    def _tidy(self) -> None:
        """Remove the previews that no page can be about to show, and the folders of runs that were stopped."""
        for folder in self._folders():
            with contextlib.suppress(OSError):  # another page of the same visitor does so too
                if time.time() - folder.stat().st_mtime < SHOWN:
                    continue
                for preview in folder.glob(f"{PREVIEW}*"):
                    preview.unlink()
                if not any(folder.iterdir()):
                    folder.rmdir()

    def _folders(self) -> list[Path]:
        return sorted(self.folder.iterdir(), reverse=True) if self.folder.is_dir() else []


def forget_old(root: Path) -> None:
    """Remove all but the favourites of visitors that made nothing for `KEPT_DAYS` days."""
    limit = time.time() - KEPT_DAYS * 24 * 3600
    for folder in root.glob("*"):
        if _TOKEN.fullmatch(folder.name) and folder.stat().st_mtime < limit:
            for picture in folder.iterdir():
                if not _is_favourite(picture):
                    shutil.rmtree(picture, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _is_favourite(folder: Path) -> bool:
    return (folder / FAVOURITE).exists()
