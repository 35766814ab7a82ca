"""Pictures as clients send and get them: files in base64."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textcond import Hit

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


def picture_text(hit: Hit) -> str | None:
    """Return the picture of a row in base64, the very file that is stored; None if it has none."""
    content = hit.image_file()
    return None if content is None else base64.b64encode(content).decode()
