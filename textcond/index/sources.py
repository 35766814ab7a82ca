"""Rows for an index, streamed from files: texts, tables, DiffusionDB's metadata, datasets folders, folders of pictures.

| source | rows |
|---|---|
| `.txt` | one text a line |
| `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, a `datasets.save_to_disk` folder | a column of texts (`text`, `prompt`, `caption` or as told), one of pictures if there is one (`image`, `file_name` ...); the other columns are metadata |
| `.csv`, `.tsv` | besides, a cell that is a plain number, `true` or `false` is that value, not a text |
| DiffusionDB: `metadata.parquet`, `part-000001.json` | prompts with seed, steps and the rest under our names, and pictures that lie beside |
| a picture, or a folder of them | the prompt that the picture's metadata hold, or that of a `.txt` file of the same name |

Files but pictures may end in `.gz`.
"""  # noqa: E501  (a table)

from __future__ import annotations

import base64
import datetime
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textcond.data.rows import (
    Problems,
    container,
    count_datasets_rows,
    is_datasets_folder,
    open_bytes,
    read_lines,
    read_rows,
)

from .picture_prompts import FIELDS, SUFFIXES, fields, made_with, picture_texts
from .pictures import open_picture, thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT_COLUMNS = ("text", "prompt", "caption", "positive_prompt")
IMAGE_COLUMNS = ("image", "image_path", "file_name", "image_name")
THUMBNAIL = 256
MAX_TEXT = 100_000  # characters; what is longer is no prompt, and tokenizers take seconds for it
MAX_PART = 64 << 20  # bytes of a DiffusionDB part, which is read whole; theirs have less than 1 MiB

# as the metadata of DiffusionDB number them (Wang et al., 2022)
_SAMPLERS = ("ddim", "plms", "k_euler", "k_euler_ancestral", "k_heun", "k_dpm_2", "k_dpm_2_ancestral", "k_lms")
_PART_START = re.compile(rb'\{\s*"([^"]*)"\s*:\s*\{([^}]*)')
_PART = {"p": "prompt", "se": "seed", "c": "cfg", "st": "step", "sa": "sampler"}

_PLAIN = re.compile(r"-?(?:0|[1-9][0-9]{0,18})(?:\.[0-9]+)?|true|false")  # not 007 and 1e5, which may be names


@dataclass(frozen=True)
class Source:
    """A file (or datasets folder) of rows; `kind` is text, table, part or picture."""

    path: Path
    kind: str


@dataclass
class SourceRow:
    """A text with its metadata, where it stands, and its thumbnail, which is made when it is called for.

    Attributes:
        number: the row's line where there are lines, for messages; rows may share one.
        place: how many rows of the source come up to this one, itself among them.
    """

    text: str
    metadata: dict[str, Any]
    source: Source
    number: int
    image: Callable[[], bytes] | None = None
    place: int = 1


def absolute(path: str | Path) -> Path:
    """Return a path from the root on, links in it kept."""
    return Path(os.path.abspath(Path(path).expanduser()))


def find_sources(paths: Iterable[str | Path]) -> list[Source]:
    """Return what there is to read; a folder of pictures gives each of its pictures, in the order of their names.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without pictures.
        ValueError: a file of another kind.
    """
    found: list[Source] = []
    for path in map(absolute, paths):
        if is_datasets_folder(path):
            found.append(Source(path, "table"))
        elif path.is_dir():
            pictures = [Source(file, "picture") for file in _walk(path) if file.suffix.lower() in SUFFIXES]
            if not pictures:
                raise FileNotFoundError(f"{path} holds no pictures ({', '.join(SUFFIXES)}): name the files to read")
            found += pictures
        elif not path.exists():
            raise FileNotFoundError(f"no file or folder {path}: check the path")
        else:
            found.append(Source(path, _kind(path)))
    return found


def read_source(
    source: Source,
    problems: Problems,
    *,
    text_column: str | None = None,
    split: str | None = None,
    thumbnails: int = THUMBNAIL,
    pictures_alone: bool = False,
    after: int = 0,
) -> Iterator[SourceRow]:
    """Stream the rows of a source.

    Args:
        source: of `find_sources`.
        problems: what becomes of a row that cannot be used.
        text_column: the column of texts; None is the first of `TEXT_COLUMNS` that is there.
        split: of a datasets folder.
        thumbnails: pixels of the longer side; 0 leaves pictures out.
        pictures_alone: pictures that carry no prompt are rows with an empty text; without it, they are bad rows.
        after: so many rows were read before and are left out.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: a damaged file, no column of texts, and a bad row where `problems` says so.
    """
    if source.kind == "picture":
        if after < 1:
            row = problems.attempt(source.path, 1, _picture_row, source, thumbnails, pictures_alone)
            if row is not None:
                yield row
        return
    if source.kind == "text":
        rows: Iterable[tuple[int, Any]] = read_lines(source.path, problems)
        make: Callable[[int, Any], SourceRow] = lambda number, text: SourceRow(checked(text), {}, source, number)  # noqa: E731
    else:
        rows = _part_rows(source.path) if source.kind == "part" else read_rows(source.path, problems, split=split)
        rows = iter(rows)
        first = next(rows, None)
        if first is None:
            return
        column = _text_column(source.path, first[1], text_column)
        rows = _chain(first, rows)
        make = lambda number, row: _table_row(source, number, row, column, thumbnails)  # noqa: E731
    for place, (number, row) in enumerate(rows, 1):
        if place > after:
            made = problems.attempt(source.path, number, make, number, row)
            if made is not None:
                made.place = place
                yield made


def count_rows(source: Source, *, text_column: str | None = None, split: str | None = None) -> int | None:
    """Return about how many rows a source has, for a progress bar; None where only reading would tell."""
    if source.kind == "picture":
        return 1
    if source.kind == "part":
        return _count(source.path, b'"p":') or None
    if is_datasets_folder(source.path):
        return count_datasets_rows(source.path, split)
    if container(source.path) == "json":
        try:
            _, row = next(iter(read_rows(source.path, Problems("skip"))))
            column = _text_column(source.path, row, text_column)
        except (ValueError, StopIteration):
            return None  # reading says what is wrong
        # within a text the quotes would be escaped
        return _count(source.path, f"{json.dumps(column, ensure_ascii=False)}:".encode()) or None
    if container(source.path) == "parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(source.path).num_rows
        except (OSError, pyarrow.ArrowException):
            return None  # reading says what is wrong
    return _count(source.path, b"\n")


def _count(path: Path, wanted: bytes) -> int:
    """Return how often some bytes are in a file."""
    found, end = 0, b""
    with open_bytes(path) as file:
        while chunk := file.read(1 << 20):
            chunk = end + chunk
            found += chunk.count(wanted)
            end = chunk[len(chunk) - len(wanted) + 1 :]
    return found


def checked(text: Any) -> str:
    """Return a text that can be a row's, white space around it removed.

    Raises:
        ValueError: no text, an empty one, a huge one, or one that is no Unicode.
    """
    if not isinstance(text, str):
        raise ValueError(f"the text is {text!r:.60}: give a string")
    text = text.replace("\0", "").strip()
    if not text:
        raise ValueError("the text is empty: fill it in, or remove the row")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the text has {len(text):,} characters: a prompt has up to {MAX_TEXT:,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode: write it again as UTF-8") from None
    return text


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(files) if not name.startswith("."))


def _kind(path: Path) -> str:
    if path.suffix.lower() in SUFFIXES:
        return "picture"
    if path.name.removesuffix(".gz").lower().endswith(".txt"):
        return "text"
    if container(path) == "json":
        with open_bytes(path) as file:
            start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        # an object by a picture's name, or with a prompt `p`: the first value of a row a line may be an object, too
        found = _PART_START.match(start)
        named = found is not None and found[1].decode(errors="replace").lower().endswith(SUFFIXES)
        return "part" if named or (found is not None and re.search(rb'"p"\s*:\s*"', found[2])) else "table"
    if container(path) is None:
        known = ", ".join((".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", *SUFFIXES))
        raise ValueError(f"{path} is none of {known}: rename or convert it")
    return "table"


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _part_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a DiffusionDB part: an object of one-letter settings by the pictures' names."""
    with open_bytes(path) as file:
        raw = file.read(MAX_PART + 1)
    if len(raw) > MAX_PART:
        raise ValueError(f"{path} is larger than {MAX_PART >> 20} MiB: write its rows as JSONL")
    try:
        rows = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from None
    for number, (name, values) in enumerate(rows.items(), 1):
        if isinstance(values, dict):
            yield number, {"image_name": name} | {_PART.get(key, key): value for key, value in values.items()}


def _text_column(path: Path, row: Mapping[str, Any], wanted: str | None) -> str:
    names = [wanted] if wanted else TEXT_COLUMNS
    found = next((name for name in names if name in row), None)
    if found is None:
        raise ValueError(
            f"{path} has no column {' or '.join(names)} among {', '.join(map(str, row)):.200}: "
            "pass the name of the column of texts as text_column"
        )
    return found


def _table_row(source: Source, number: int, row: Mapping[str, Any], column: str, thumbnails: int) -> SourceRow:
    if column not in row:
        raise ValueError(f"no {column!r} among {', '.join(map(str, row)):.200}: name the text in every row")
    text = checked(row[column])
    image_column = next((name for name in IMAGE_COLUMNS if name in row and name != column), None)
    image = _cell_picture(source, row[image_column], thumbnails) if image_column else None
    values = {name: value for name, value in row.items() if name not in (column, "image")}
    if container(source.path) in ("csv", "tsv"):
        values = {name: _typed(value) for name, value in values.items()}
    if "image_name" in row and "prompt" in row and "seed" in row:
        values = _diffusion_db(values)
    metadata = {str(name): plain for name, value in values.items() if (plain := _plain(value)) is not None}
    return SourceRow(text, metadata, source, number, image)


def _diffusion_db(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings under our names; the hashed name of the person is left out."""
    sampler = values.get("sampler")
    if isinstance(sampler, int):
        values = values | {"sampler": _SAMPLERS[sampler - 1] if 1 <= sampler <= len(_SAMPLERS) else "others"}
    ours = fields(values)
    theirs = {"seed", "step", "cfg", "sampler", "width", "height", "user_name"}
    return ours | {name: value for name, value in values.items() if name not in theirs}


def _typed(cell: Any) -> Any:
    """Return what a cell of a table without types says: a number of 64 bits, true, false, or else its text."""
    if not isinstance(cell, str) or not _PLAIN.fullmatch(cell):
        return cell
    value = json.loads(cell)
    return value if -(2**63) <= value < 2**63 else cell


def _plain(value: Any) -> Any:
    """Return a cell as JSON keeps it; None for nothing, NaN and bytes, which are no metadata."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return None if isinstance(value, bytes) else str(value)


def _cell_picture(source: Source, cell: Any, thumbnails: int) -> Callable[[], bytes] | None:
    """Return how to make the thumbnail of a cell: bytes, a datasets picture, or a path from the table."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if not cell or not thumbnails:
        return None
    if isinstance(cell, bytes):
        return lambda: _thumbnail(cell, thumbnails)
    if isinstance(cell, str) and cell.startswith("data:image/"):
        try:
            content = base64.b64decode(cell.partition(",")[2], validate=True)
        except ValueError as error:
            raise ValueError(f"the picture is not base64 ({error})") from None
        return lambda: _thumbnail(content, thumbnails)
    if not isinstance(cell, str):
        raise ValueError(f"the picture is a {type(cell).__name__}: give bytes or a path")
    folder = source.path if source.path.is_dir() else source.path.parent
    path = folder / cell
    # tables of pictures are often kept without the pictures
    return (lambda: _thumbnail(path, thumbnails)) if "\0" not in cell and path.is_file() else None


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image]:
    """A picture, one of many: that it is gone or not to be read is no reason to stop."""
    try:
        with open_picture(source) as image:
            yield image
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error


def _thumbnail(source: Path | bytes, size: int) -> bytes:
    with _opened(source) as image:
        return thumbnail(image, size)


def _picture_row(source: Source, thumbnails: int, alone: bool) -> SourceRow:
    with _opened(source.path) as image:
        try:
            metadata = made_with(picture_texts(image))
        except ValueError:
            caption = source.path.with_suffix(".txt")
            if caption.is_file() and caption.stat().st_size <= 4 * MAX_TEXT:
                metadata = {"prompt": caption.read_text(encoding="utf-8", errors="replace"), "tool": "caption file"}
            elif alone and thumbnails:
                metadata = {"prompt": ""}
            else:
                raise
        size = dict(zip(("width", "height"), image.size))
    prompt = metadata.pop("prompt")
    text = checked(prompt) if prompt else ""
    strings = {name: checked(value) for name, value in metadata.items() if isinstance(value, str) and value.strip()}
    numbers = {name: value for name, value in metadata.items() if not isinstance(value, str)}
    metadata = size | numbers | strings
    metadata = {name: metadata[name] for name in (*FIELDS, "tool") if name in metadata} | {"path": str(source.path)}
    make = (lambda: _thumbnail(source.path, thumbnails)) if thumbnails else None
    return SourceRow(text, metadata, source, 1, make)
