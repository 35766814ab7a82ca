"""An index whose rows have styles and languages, with the vectors of the tiny pipeline."""

from pathlib import Path

from PIL import Image

from textcond import PromptIndex
from textcond.apps.engine import Engine

STYLES = ("noto", "blob", "flat")
TEXTS = [f"{colour} {thing}, {style} style" for colour in ("red", "blue") for thing in "abcd" for style in STYLES]


def styled_index(folder: Path, demo) -> Path:
    """Write it: the texts take turns in three styles and two languages, each with a picture and a seed from 50 on."""
    index = PromptIndex.create(folder, Engine(demo.pipeline, demo.index).finder().encoder)
    metadata = [
        {"style": STYLES[n % 3], "language": "en" if n % 2 else "de", "seed": n + 50} for n in range(len(TEXTS))
    ]
    index.add(TEXTS, metadata, images=[Image.new("RGB", (16, 16), (10 * n, 90, 160)) for n in range(len(TEXTS))])
    return folder
