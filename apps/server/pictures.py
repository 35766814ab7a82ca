"""Pictures as clients send and get them: files in base64."""

from __future__ import annotations

import base64
import binascii
import io
import re

from PIL import Image

_ADDRESS = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,")


def picture_file(content: str, name: str = "image") -> bytes:
    """Return the bytes of a picture file that was sent in base64, or as a data: address.

    Raises:
        ValueError: if it is not base64.
    """
    head = _ADDRESS.match(content[:100])
    try:
        return base64.b64decode(content[head.end() :] if head else content, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name} is not base64: send the picture file's bytes in base64") from None


def picture_text(picture: Image.Image) -> str:
    """Return a picture as a PNG in base64."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
