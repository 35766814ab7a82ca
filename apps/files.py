"""Output files: checked before any work begins, written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# What a write can meet although the file could be opened; such an error does not know the name of the file.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def check_output(path: str | Path) -> Path:
    """Return the real path that `path` names (links followed) once it is known that a file can be written there.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder is missing.
        IsADirectoryError: `path` is a folder.
        ValueError: `path` is a device, a pipe or the like, which a rename would replace.
        OSError: the folder does not accept a new file (permissions, read-only or full disk).
    """
    path = Path(os.path.realpath(Path(path).expanduser()))
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(f"the folder {folder} does not exist: make it first, or choose another output file")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder: choose another output file")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{path} is a folder: name a file in it")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is not a regular file: choose another output file")
    try:
        partial = _partial(folder)
        partial.touch(exist_ok=False)
        partial.unlink()
    except OSError as error:
        raise type(error)(f"cannot write in {folder} ({error.strerror}): choose another output file") from error
    return path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to fill that takes the place of `path` when the block ends well, and vanishes when it does not."""
    path = Path(os.path.realpath(Path(path).expanduser()))
    partial = _partial(path.parent)
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _WRITE_ERRORS:
            raise OSError(f"cannot write {path} ({error.strerror}): free some space, or choose another file") from error
        raise


def _partial(folder: Path) -> Path:
    return folder / f".textcond-{secrets.token_hex(6)}.partial"
