"""The pictures of one visitor: a folder of PNGs whose metadata are the history, so that it survives a restart."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from textcond.apps.metadata import Parameters, read_parameters

KEPT = 24
KEPT_DAYS = 30
PREVIEW = "step-"
# Seconds after which the browser has fetched a preview, or never will.
SHOWN = 60
_TOKEN = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Made:
    """A picture of this visitor and what made it."""

    path: Path
    parameters: Parameters


class History:
    """The pictures made by whoever holds `token`, newest first; only the last ones are kept.

    Args:
        root: folder of all visitors.
        token: names one of them and is known to that browser alone; a new one where it is empty or malformed.
    """

    def __init__(self, root: Path, token: str | None = None):
        self.token = token if token and _TOKEN.fullmatch(token) else secrets.token_hex(16)
        self.folder = root / self.token

    def new_folder(self) -> Path:
        """An empty folder for the next picture, in the order of time."""
        self._tidy()
        folder = self.folder / f"{time.time_ns():016x}"
        folder.mkdir(parents=True)
        return folder

    def added(self, made: Made) -> None:
        """Forget the pictures beyond the last `KEPT`, of which `made` is one."""
        for old in self._folders()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def pictures(self) -> list[Made]:
        """All that are kept."""
        made = []
        for folder in self._folders():
            for path in folder.glob("*.png"):
                if path.name.startswith(PREVIEW):
                    continue
                with contextlib.suppress(OSError, ValueError):  # removed meanwhile
                    made.append(Made(path, read_parameters(path)))
        return made[:KEPT]

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
    """Remove the visitors' folders in which nothing was made for `KEPT_DAYS` days."""
    limit = time.time() - KEPT_DAYS * 24 * 3600
    for folder in root.glob("*"):
        if _TOKEN.fullmatch(folder.name) and folder.stat().st_mtime < limit:
            shutil.rmtree(folder, ignore_errors=True)
