"""Files written whole or not at all: beside their place, then renamed into it."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

# Imported where it is needed: torch takes seconds, and the command line's help needs none of it.
if TYPE_CHECKING:
    import torch

# What a write can meet although the file could be opened; such an error does not know the name of the file.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path to write a file to that takes the place of `path` (links followed) when the block ends well.

    When it does not, the file vanishes and what was at `path` stays.

    Raises:
        OSError: for a full disk, by the name of the file.
    """
    path = Path(os.path.realpath(Path(path).expanduser()))
    partial = path.with_name(f".textcond-{secrets.token_hex(6)}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
            raise OSError(f"cannot write {path} ({error.strerror}): free some space, or choose another file") from error
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to fill that takes the place of `path` when the block ends well, see `atomic_path`."""
    with atomic_path(path) as partial, open(partial, "xb") as file:
        yield file


def remove_partials(folder: Path, older_than: float = 0.0) -> None:
    """Remove what writes into a folder left that were killed half-way, so many seconds ago; none may be under way."""
    for partial in folder.glob(".textcond-*.partial"):
        with suppress(FileNotFoundError):  # one that another process removed, or finished
            if time.time() - partial.stat().st_mtime >= older_than:
                partial.unlink()


def write_mark(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    from .folders import write_json

    with atomic_path(path) as partial:
        write_json(partial, content)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write safetensors whole or not at all."""
    from safetensors.torch import save_file

    with atomic_path(path) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        partial.chmod(0o644)  # safetensors makes private files, and these are shipped


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read safetensors; a ValueError names the file when it is truncated or not safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): remove it and make it again") from error


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating-point tensors in float16, the others as they are: what is shipped."""
    return {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
