"""Output files: checked before any work begins."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


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
        tempfile.NamedTemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(f"cannot write in {folder} ({error.strerror}): choose another output file") from error
    return path
