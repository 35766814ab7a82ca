"""Rows of any table file, one at a time with their line numbers: JSONL, JSON, CSV, TSV, Parquet, a datasets folder."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from pyarrow import RecordBatch

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONTAINERS = ("jsonl", "json", "csv", "tsv", "parquet")
_NOT_UTF8 = re.compile("[\0\ud800-\udfff]")  # what UTF-16 and others leave where they are read as UTF-8
DATASETS_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")


class Problems:
    """What becomes of malformed rows: the first is an error, or all are counted and skipped.

    Args:
        on_error: "raise" or "skip".

    Raises:
        ValueError: for another `on_error`.
    """

    def __init__(self, on_error: Literal["raise", "skip"] = "raise"):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}: pass 'raise' or 'skip'")
        self.on_error = on_error
        self.skipped = 0
        self.first = ""
        self._reported = False

    def bad(self, path: str | Path, line: int, error: object) -> None:
        """Raise ValueError with file and line, or count the row."""
        message = f"{path}:{line}: {error}"
        if self.on_error == "raise":
            raise ValueError(message) from (error if isinstance(error, Exception) else None)
        self.first = self.first or message
        self.skipped += 1

    def attempt(self, path: str | Path, line: int, make: Callable[..., T], *args: Any) -> T | None:
        """Return what `make(*args)` returns, or None if it raises ValueError and bad rows are skipped."""
        try:
            return make(*args)
        except ValueError as error:
            self.bad(path, line, error)
            return None

    def report(self) -> None:
        """Log once how many rows were skipped, if any."""
        if self.skipped and not self._reported:
            self._reported = True
            logger.warning("%d malformed rows were skipped, the first: %s", self.skipped, self.first)


def container(path: Path) -> str | None:
    """Return what holds the rows of a file, by its name, or None for a name that says nothing."""
    suffix = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    return {"ndjson": "jsonl"}.get(suffix, suffix) if suffix in (*CONTAINERS, "ndjson") else None


def is_datasets_folder(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return path.is_dir() and any((path / name).is_file() for name in DATASETS_FILES)


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked if it ends in .gz.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a damaged gzip file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: check the path")
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
        try:
            yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): download or pack it again") from error


def read_lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield line numbers from 1 and lines without their ends; blank lines are left out."""
    with open_bytes(path) as file:
        for line, raw in enumerate(file, 1):
            text = problems.attempt(path, line, _utf8, raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)
            if text is not None and text.strip():
                yield line, text.rstrip("\r\n")


def read_rows(path: Path, problems: Problems, *, split: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers (in Parquet and datasets: row numbers) from 1, and rows as dicts in column order.

    Raises:
        ValueError: for a file of another kind, a damaged one, a malformed row (unless skipped), or a split that is
            not there.
        FileNotFoundError: if there is no such file.
    """
    if is_datasets_folder(path):
        return _datasets_rows(path, split)
    readers = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows, "tsv": _tsv_rows, "parquet": _parquet_rows}
    kind = container(path)
    if kind is None:
        raise ValueError(f"{path} is none of .{', .'.join(CONTAINERS)} (.gz or not): rename or convert it")
    return readers[kind](path, problems)


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start}): convert the file to UTF-8") from None


def parse_json(text: str) -> Any:
    """Return the value of one line of JSON; ValueError says where it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}): write one object a line") from None
    except RecursionError:
        raise ValueError("nested too deeply: write one object of plain values a line") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object: write one object a row")
    return value


def _jsonl_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in read_lines(path, problems):
        row = problems.attempt(path, line, lambda text: _object(parse_json(text)), text)
        if row is not None:
            yield line, row


def _json_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream the objects of one JSON array; a file of one object a line is read as JSONL."""
    decoder = json.JSONDecoder()
    with open_bytes(path) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig")
        text, line, place, ended = "", 1, 0, False

        def more() -> bool:
            nonlocal text, line, place, ended
            # at least doubles what is left: a long object is not scanned again for every few bytes
            try:
                new = file.read(max(1 << 20, len(text) - place))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 ({error.reason}): convert it") from error
            line += text.count("\n", 0, place)
            text, place, ended = text[place:] + new, 0, not new
            return bool(new)

        def skip_space() -> str:
            nonlocal place
            while True:
                while place < len(text) and text[place] in " \t\r\n":
                    place += 1
                if place < len(text) or not more():
                    return text[place : place + 1]

        first = skip_space()
        if first == "{":
            yield from _jsonl_rows(path, problems)
            return
        if first != "[":
            raise ValueError(f"{path}:{line}: starts with {first!r}, not '[': write an array of objects, or JSONL")
        place += 1
        while (mark := skip_space()) != "]":
            if mark == ",":
                place += 1
                skip_space()
            while True:
                try:
                    value, end = decoder.raw_decode(text, place)
                    break
                except RecursionError:
                    raise ValueError(f"{path}:{line}: nested too deeply: write an array of plain objects") from None
                except json.JSONDecodeError as error:
                    # the buffer may end within a text, or within the few letters of a number or an escape
                    cut = error.pos > len(text) - 16 or error.msg.startswith("Unterminated")
                    if ended or not cut:
                        at = line + text.count("\n", 0, error.pos)
                        raise ValueError(f"{path}:{at}: not JSON ({error.msg}): write the file again") from None
                more()
            at = line + text.count("\n", 0, place)
            place = end
            row = problems.attempt(path, at, _object, value)
            if row is not None:
                yield at, row


def _named(names: list[str], values: list[str]) -> dict[str, Any]:
    if len(values) != len(names):
        raise ValueError(
            f"{len(values)} fields where the header has {len(names)} ({', '.join(names)}): quote or remove the others"
        )
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise ValueError("not UTF-8: convert the file to UTF-8") from None
    return dict(zip(names, values))


def _header(path: Path, names: list[str]) -> list[str]:
    if _NOT_UTF8.search("".join(names)):
        raise ValueError(f"{path} is not UTF-8: convert it to UTF-8")
    if len(set(names)) != len(names) or not all(name.strip() for name in names):
        raise ValueError(f"{path}:1: the header is {names}: name every column, each differently")
    return names


def _csv_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields of more than 128 KiB
    with open_bytes(path) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(file, strict=True)
        names: list[str] | None = None
        while True:
            line = rows.line_num + 1
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                problems.bad(path, line, f"not CSV ({error}): close and double the quotes")
                continue
            if not values:
                continue
            if names is None:
                names = _header(path, values)
                continue
            row = problems.attempt(path, line, _named, names, values)
            if row is not None:
                yield line, row


def _tsv_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    names: list[str] | None = None
    before = problems.skipped
    for line, text in read_lines(path, problems):
        if names is None:
            if problems.skipped > before:  # what comes now is no header
                raise ValueError(f"{path} is not UTF-8: convert it to UTF-8")
            names = _header(path, text.split("\t"))
            continue
        row = problems.attempt(path, line, _named, names, text.split("\t"))
        if row is not None:
            yield line, row


@contextmanager
def _whole(path: Path, kind: str) -> Iterator[None]:
    """Name the file in what pyarrow raises for a damaged one, be it for its frame or for a cell."""
    import pyarrow

    try:
        yield
    except PermissionError:
        raise
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path} is not a whole {kind} ({told}): download or write it again") from error


def _parquet_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: check the path")
    with _whole(path, "Parquet file"), pyarrow.parquet.ParquetFile(path) as table:
        yield from enumerate((row for batch in table.iter_batches(1024) for row in batch.to_pylist()), 1)


def count_datasets_rows(path: Path, split: str | None) -> int:
    """Return how many rows a split of a `datasets.save_to_disk` folder has, from the heads of its Arrow streams.

    Raises:
        ValueError: for a split that is not there, or a damaged file.
        FileNotFoundError: if a file of it is missing.
    """
    return sum(len(batch) for batch in _datasets_batches(path, split))


def _datasets_rows(path: Path, split: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = (
        row
        for batch in _datasets_batches(path, split)
        for start in range(0, len(batch), 1024)
        for row in batch.slice(start, 1024).to_pylist()
    )
    yield from enumerate(rows, 1)


def _datasets_batches(path: Path, split: str | None) -> Iterator[RecordBatch]:
    """Open a `datasets.save_to_disk` folder: Arrow streams, in the order that its state.json lists."""
    import pyarrow.ipc

    from textcond.folders import read_json

    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json")["splits"]
        chosen = split or "train"
        if chosen not in splits:
            raise ValueError(f"{path} has no split {chosen!r}, it has {', '.join(splits)}: pass split=")
        path = path / chosen
    for file in [path / file["filename"] for file in read_json(path / "state.json")["_data_files"]]:
        if not file.is_file():
            raise FileNotFoundError(f"{path} lacks {file.name}, which its state.json lists: save it again")
        with _whole(file, "Arrow file"), pyarrow.memory_map(str(file)) as source:
            yield from pyarrow.ipc.open_stream(source)
