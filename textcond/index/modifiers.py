"""What people add to prompts ("volumetric light, 35 mm film"): the lists of the package clip-interrogator, filtered."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

UNSAFE = re.compile(
    r"\b(nsfw|nude|naked|sexy|sexual|erotic|porn\w*|hentai|breasts?|lingerie|gore|corpse|nazi|hitler)\b"
)
RARE = 25  # lines; a last name that more lines have is a word too: church, wood, west
_LISTS = ("mediums", "movements", "flavors", "artists")


def prompt_modifiers(folder: str | Path | None = None, *, last_names: bool = False) -> dict[str, list[str]]:
    """Return the lists `mediums`, `movements` and `flavors`, the last without artists' names and unsafe lines.

    Args:
        folder: holds the wheel of clip-interrogator; without it, the package is to be installed.
        last_names: leave out flavors with an artist's last name, too, where it is hardly ever another word.

    Raises:
        FileNotFoundError: the package is not there; says how to get it.
    """
    lines = {name: _reader(folder)(name).splitlines() for name in _LISTS}
    artists = {name.casefold() for name in lines.pop("artists")}
    kept = []
    for line in lines["flavors"]:
        words = line.casefold().replace(",", " ").split()
        named = any(" ".join(words[i : i + n]) in artists for n in (1, 2, 3) for i in range(len(words)))
        if line.isascii() and not named and "by" not in words and not UNSAFE.search(line.casefold()):
            kept.append(line)
    if last_names:
        words_of = {line: set(re.findall(r"[a-z]+", line.casefold())) for line in kept}
        counts = Counter(word for words in words_of.values() for word in words)
        names = {artist.split()[-1] for artist in artists if " " in artist}
        names = {name for name in names if len(name) > 4 and counts[name] <= RARE}
        kept = [line for line in kept if not words_of[line] & names]
    return lines | {"flavors": kept}


def _reader(folder: str | Path | None) -> Callable[[str], str]:
    """Return what reads one of the package's lists: from a wheel in `folder`, or where it is installed."""
    if folder is not None:
        wheel = next(iter(sorted(Path(folder).glob("clip_interrogator-*.whl"))), None)
        if wheel is None:
            raise FileNotFoundError(
                f"{folder} holds no clip_interrogator-*.whl: "
                "run pip download --no-deps clip-interrogator==0.6.0 -d there"
            )
        archive = zipfile.ZipFile(wheel)
        return lambda name: archive.read(f"clip_interrogator/data/{name}.txt").decode()
    # found, not imported: importing it would load models' libraries
    spec = find_spec("clip_interrogator")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the prompt modifiers are in the package clip-interrogator, which is not installed: "
            "run pip install --no-deps clip-interrogator==0.6.0"
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    return lambda name: (data / f"{name}.txt").read_text(encoding="utf-8")
