"""Writing vectors as they come, in bounded memory: NumPy, safetensors or JSON lines, by the file's suffix."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from textcond.files import atomic_file

from .files import check_output

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".npy", ".safetensors", ".jsonl")


class VectorWriter(Protocol):
    """Takes rows of float32 vectors `(n, dim)` and their texts, any number of times."""

    def add(self, texts: list[str], vectors: np.ndarray) -> None:
        """Append a chunk."""

    def close(self) -> None:
        """Write what could only be known at the end."""


class NumpyWriter:
    """A `.npy` file `(n, dim)`; its header, whose length NumPy keeps for any n, is written again at the end."""

    def __init__(self, file: IO[bytes]):
        self.file, self.rows, self.dim = file, 0, 0

    def _header(self) -> None:
        from numpy.lib import format as npy

        npy.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.dim)})

    def add(self, texts: list[str], vectors: np.ndarray) -> None:
        """Append a chunk."""
        if self.rows == 0:
            self.dim = vectors.shape[1]
            self._header()
        self.file.write(vectors.astype("<f4", copy=False).tobytes())
        self.rows += len(vectors)

    def close(self) -> None:
        """Write the number of rows."""
        self.file.seek(0)
        self._header()


class SafetensorsWriter:
    """A `.safetensors` file of one tensor, `vectors` `(n, dim)`; spaces pad its header, as the format allows."""

    HEADER = 248

    def __init__(self, file: IO[bytes]):
        self.file, self.rows, self.dim = file, 0, 0
        self._header()

    def _header(self) -> None:
        shape, size = [self.rows, self.dim], 4 * self.rows * self.dim
        header = json.dumps({"vectors": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}})
        self.file.write(self.HEADER.to_bytes(8, "little") + header.encode().ljust(self.HEADER))

    def add(self, texts: list[str], vectors: np.ndarray) -> None:
        """Append a chunk."""
        self.dim = vectors.shape[1]
        self.file.write(vectors.astype("<f4", copy=False).tobytes())
        self.rows += len(vectors)

    def close(self) -> None:
        """Write the number of rows."""
        self.file.seek(0)
        self._header()


class JsonLinesWriter:
    """One `{"text": ..., "vector": [...]}` a line."""

    def __init__(self, file: IO[bytes]):
        self.file = file

    def add(self, texts: list[str], vectors: np.ndarray) -> None:
        """Append a chunk."""
        for text, vector in zip(texts, vectors.tolist()):
            self.file.write(json.dumps({"text": text, "vector": vector}, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def close(self) -> None:
        """Nothing is left to write."""


_WRITERS = {".npy": NumpyWriter, ".safetensors": SafetensorsWriter, ".jsonl": JsonLinesWriter}


@contextmanager
def vector_writer(output: str | Path | None) -> Iterator[VectorWriter]:
    """A writer to `output` in the format of its suffix, or of JSON lines to standard output when it is None.

    Raises:
        ValueError: the suffix is none of `SUFFIXES`.
        OSError: the file cannot be written.
    """
    if output is None:
        yield JsonLinesWriter(sys.stdout.buffer)
        return
    path = check_output(output)
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path.name} does not tell the format: end it in {', '.join(SUFFIXES)}")
    with atomic_file(path) as file:
        writer = _WRITERS[path.suffix](file)
        yield writer
        writer.close()
        file.seek(0, os.SEEK_END)


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, or of standard input when `path` is "-", one at a time, empty ones included.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not UTF-8 (its number is named).
    """
    if str(path) != "-" and not Path(path).exists():
        raise FileNotFoundError(f"no file {path}: give a text file with a text a line, or - for standard input")
    file = sys.stdin.buffer if str(path) == "-" else open(path, "rb")  # noqa: SIM115
    with file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} of {path} is not UTF-8: convert the file first") from error


def chunks(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` texts, the last one shorter."""
    iterator = iter(texts)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
