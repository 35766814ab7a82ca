"""Errors as a person reads them: one line that names the value and the mend."""

from __future__ import annotations

import os

MAX_LENGTH = 600


def one_line(error: BaseException) -> str:
    """Say what went wrong in one line; a kind of error that nothing here raises on purpose is called unexpected."""
    from safetensors import SafetensorError

    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        message = " ".join(str(error).split())
    if len(message) > MAX_LENGTH:
        message = message[: MAX_LENGTH - 1] + "…"
    if isinstance(error, MemoryError) or "out of memory" in message.lower():
        return (
            f"out of memory: make smaller pictures, or pass --dtype float16 or --device cpu ({message or 'no detail'})"
        )
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError, SafetensorError)):
        return message or type(error).__name__
    return f"unexpected {type(error).__name__}: {message} (TEXTCOND_DEBUG=1 shows where)"


def debugging() -> bool:
    """Whether `TEXTCOND_DEBUG` asks for tracebacks."""
    return os.environ.get("TEXTCOND_DEBUG", "") not in ("", "0")
