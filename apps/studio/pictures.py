"""What is accepted as an uploaded picture: the server looks into the file, whatever its name says."""

from __future__ import annotations

from pathlib import Path

KINDS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000


def check_picture(path: Path) -> str:
    """The kind of a picture file.

    Raises:
        ValueError: it is none, of another kind, or has too many pixels.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=KINDS) as image:
            kind, (width, height) = image.format, image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name} is not a readable picture: drop a PNG, JPEG or WebP") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"{path.name} has {width}×{height} pixels: at most {MAX_PIXELS:,} are read")
    return kind
