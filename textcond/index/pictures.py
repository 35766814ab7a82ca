"""Pictures from files, bytes or memory, which nobody vouches for: opened, decoded and scaled within one set of limits.

Sizes are checked before anything is decoded, and what is wrong is one clear ValueError.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not all of Pillow's: EPS would start Ghostscript
MAX_BYTES = 256 << 20
MAX_PIXELS = 89_478_485  # above it Pillow warns of a decompression bomb; 256 MB once decoded
MAX_METADATA = 16 << 20  # characters of one text in a picture; the largest workflows are a hundredth of it


@contextmanager
def open_picture(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Open a picture file, or the bytes of one, for reading; its pixels are not decoded yet.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: neither a path nor bytes.
        ValueError: not a picture of `FORMATS`, one cut short or damaged (in the block too), or one that is too large.
    """
    if not isinstance(source, (str, Path, bytes)):
        raise TypeError(f"a picture is a PIL image, a path or bytes, got {type(source).__name__}")
    if isinstance(source, bytes):
        name, size, file = "the picture", len(source), io.BytesIO(source)
    else:
        name, file = str(source), Path(source).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"no image file {source}: check the path")
        size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{name} is a file of {size >> 20:,} MiB: pictures of up to {MAX_BYTES >> 20} MiB are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error here
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels: up to {MAX_PIXELS:,} are decoded, scale it down") from error
    except Exception as error:  # every decoder has errors of its own
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{name} is not a readable PNG, JPEG, WebP, GIF, BMP or TIFF picture") from error
    with image:
        _check_size(image, name)
        try:
            yield image
        except (OSError, SyntaxError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise _damaged(name, error) from error


def read_picture(source: Image.Image | str | Path | bytes) -> Image.Image:
    """Return a picture as RGB, turned as its EXIF data say, transparency laid on white.

    Args:
        source: a PIL image, an image file, or the bytes of one; of an animation the first frame.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `open_picture`.
    """
    if isinstance(source, Image.Image):
        _check_size(source, "the picture")
        return _upright_rgb(source, "the picture")
    with open_picture(source) as opened:
        return _upright_rgb(opened, "the picture" if isinstance(source, bytes) else str(source))


def thumbnail(image: Image.Image, size: int = 256) -> bytes:
    """Return a picture as WebP bytes, upright, at most `size` pixels wide and high, without its metadata."""
    if image.mode not in ("RGB", "RGBA", "L", "LA"):  # palettes and the like do not resize
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((size, size))
    small = ImageOps.exif_transpose(image)
    small = small.convert("RGBA" if small.has_transparency_data else "RGB")
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width:,} x {image.height:,} pixels"
        raise ValueError(f"{name} has {size}: up to {MAX_PIXELS:,} are decoded, scale it down")


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        picture = ImageOps.exif_transpose(image)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except Exception as error:  # every decoder has errors of its own
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} is damaged or cut short ({error}): save it again")
