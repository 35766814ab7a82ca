"""Pictures from files, bytes or memory, read safely: whole, upright and in RGB, or one clear error."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not all of Pillow's: EPS would start Ghostscript
MOST_PIXELS = 89_478_485  # above it Pillow warns of a decompression bomb; 256 MB once decoded


def read_picture(source: Image.Image | str | Path | bytes) -> Image.Image:
    """Return a picture as RGB, turned as its EXIF data say, transparency laid on white.

    Args:
        source: a PIL image, an image file, or the bytes of one; of an animation the first frame.

    Raises:
        FileNotFoundError: for a file that is not there.
        TypeError: for something else.
        ValueError: for what is no picture, is damaged or cut short, or would decode to more than 89 megapixels.
    """
    if isinstance(source, Image.Image):
        name, opened = "the picture", source
    elif isinstance(source, bytes):
        name, opened = "the picture", _opened(io.BytesIO(source), "the picture")
    elif isinstance(source, str | Path):
        name, path = str(source), Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no image file {source}")
        opened = _opened(path, name)
    else:
        raise TypeError(f"a picture is a PIL image, a path or bytes, got {type(source).__name__}")
    if opened.width * opened.height > MOST_PIXELS:
        raise ValueError(f"{name} has {opened.width} x {opened.height} pixels: scale it below {MOST_PIXELS:,} pixels")
    try:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except Exception as error:  # every decoder has errors of its own
        raise ValueError(f"{name} is damaged or cut short ({error}): save it again") from error


def _opened(file: io.BytesIO | Path, name: str) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} would decode to more than {MOST_PIXELS:,} pixels: scale it down") from error
    except Exception as error:
        raise ValueError(f"{name} is not a picture that can be read: give a PNG, JPEG, WebP or GIF file") from error
