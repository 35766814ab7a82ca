"""Pictures as a store keeps them: the file's content, checked when it comes in, decoded when it is asked for."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from .pictures import open_picture, read_picture

PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")

Picture = Image.Image | Path | str | bytes


def picture_bytes(picture: Picture) -> bytes:
    """Return a picture as a file's content: a file or encoded bytes as they are, one in memory as PNG.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file that is no picture, is damaged or would take too much memory, see `read_picture`.
    """
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        (picture if picture.mode in PNG_MODES else picture.convert("RGB")).save(buffer, "PNG")
        return buffer.getvalue()
    read_picture(picture)
    return picture if isinstance(picture, bytes) else Path(picture).expanduser().read_bytes()


def stored_picture(content: bytes, name: str) -> Image.Image:
    """Return a stored picture, loaded, in the mode that it has.

    Raises:
        ValueError: if the store gives something else than was put into it; names the row.
    """
    try:
        with open_picture(content) as image:
            image.load()
    except Exception as error:  # every decoder has errors of its own
        raise ValueError(f"the picture of row {name} is damaged ({error}): add the row again") from error
    return image
