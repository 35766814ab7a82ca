"""Examples on disk, by row number: 8 bytes of memory a row, however long the texts."""

from __future__ import annotations

import json
import mmap
from array import array
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from textcond.data.example import Example
from textcond.data.reading import read_examples
from textcond.data.writing import write_examples
from textcond.files import atomic_file


class ExampleFile:
    """Random access to a canonical JSONL file of examples.

    Args:
        path: an uncompressed JSONL file as `write_examples` writes it.
        offsets: `(rows,)` int64, where each row's line starts; found by reading the file once if not given.
        digest: the SHA-256 of the content; found by reading the file when it is first asked for if not given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file without a row.
    """

    def __init__(self, path: str | Path, *, offsets: np.ndarray | None = None, digest: str | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}: write it with write_examples, or check the path")
        self._offsets = line_offsets(self.path) if offsets is None else offsets
        if not len(self._offsets):
            raise ValueError(f"{self.path} holds no example: check what wrote it")
        self._digest = digest
        self._map: mmap.mmap | None = None

    @property
    def digest(self) -> str:
        """A SHA-256 of the content, whenever and from whatever it was written."""
        if self._digest is None:
            self._digest = _digest(self.path)
        return self._digest

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> Example:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {self.path}, which holds {len(self)}")
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self._offsets[row])
        end = self._map.find(b"\n", start)
        line = self._map[start : len(self._map) if end < 0 else end]
        try:
            return Example.from_row(json.loads(line), self.path.name)
        except ValueError as error:
            raise ValueError(f"{self.path}, row {row + 1}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}


def line_offsets(path: Path) -> np.ndarray:
    """Return `(lines,)` int64, where every line that is not blank starts."""
    starts = array("q")
    position = 0
    with path.open("rb") as file:
        for line in file:
            if not line.isspace():
                starts.append(position)
            position += len(line)
    return np.frombuffer(starts, np.int64) if starts else np.empty(0, np.int64)


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def as_example_file(
    path: str | Path,
    format: str = "auto",
    cache: str | Path = "cache",
    *,
    on_error: Literal["raise", "skip"] = "raise",
    **options: Any,
) -> ExampleFile:
    """Convert any format to canonical JSONL once, streaming, and open it.

    A source is known by its files' names, sizes and times of change, and by the options: another file is another
    conversion. Line offsets and digest lie beside the rows, so that opening again reads none of them.

    Args:
        path: a source of `read_examples`.
        format: its format.
        cache: the folder for what is converted.
        on_error: as in `read_examples`; skipped rows are reported when the source is converted.
        options: as in `read_examples`.

    Raises:
        FileNotFoundError: if a source file is missing.
        ValueError: for a malformed row, an unknown option, or a source without an example.
    """
    path = Path(path).expanduser()
    sources = [path, *(Path(value) for value in options.values() if isinstance(value, (str, Path)))]
    identity = [format, on_error, sorted((name, str(value)) for name, value in options.items())]
    identity += [_stamps(source) for source in sources]
    rows = Path(cache) / f"{path.name}-{sha256(json.dumps(identity).encode()).hexdigest()[:16]}.jsonl"
    offsets, digest = rows.with_suffix(".offsets.npy"), rows.with_suffix(".sha256")
    if not (rows.is_file() and offsets.is_file() and digest.is_file()):
        write_examples(read_examples(path, format, on_error=on_error, **options), rows)
        with atomic_file(offsets) as file:
            np.save(file, line_offsets(rows))
        with atomic_file(digest) as file:
            file.write(_digest(rows).encode())
    return ExampleFile(rows, offsets=np.load(offsets, mmap_mode="r"), digest=digest.read_text())


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of change of every file of a source, with the tables that may lie beside it."""
    beside = ("queries.", "collection.", "corpus.", "documents.") if path.is_file() else (f"{path.name}.",)
    found = path.rglob("*") if path.is_dir() else path.parent.glob("*")
    files = [
        file for file in found if file.is_file() and (path.is_dir() or file == path or file.name.startswith(beside))
    ]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
