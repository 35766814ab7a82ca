"""Texts by id, on disk: a collection larger than memory takes 16 bytes of it a row."""

from __future__ import annotations

import json
import mmap
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np

from textcond.data.rows import Problems, container, open_bytes, parse_json, read_rows

ID_COLUMNS = ("_id", "id", "docid", "doc_id", "document_id", "query_id", "qid", "pid")
TEXT_COLUMNS = ("text", "document_text", "query_text", "contents", "document", "query")


class TextTable:
    """The texts of a corpus or of queries by id: `_id, title, text` JSONL (BEIR), `id TAB text` (MS MARCO), Parquet.

    A title stands before its text, as BEIR joins them. Gzipped files, Parquet and datasets folders are unpacked to a
    temporary file first. Ids are found by their 64-bit hash, then compared.

    Args:
        path: a .jsonl, .tsv (no header) or .parquet file, .gz or not, or a `datasets.save_to_disk` folder.
        problems: what becomes of malformed rows; by default the first is an error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a malformed row, or an id that comes twice, by file and line.
    """

    def __init__(self, path: str | Path, *, problems: Problems | None = None):
        self.path = Path(path)
        problems = problems or Problems()
        plain = container(self.path) in ("jsonl", "tsv") and not self.path.name.endswith(".gz")
        self._tsv = container(self.path) == "tsv"
        hashes, offsets, lines = array("Q"), array("q"), array("q")
        with open_bytes(self.path) if plain else self._unpacked(problems) as file:
            position = 0
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    row = problems.attempt(self.path, line, self._parse, raw)
                    if row is not None:
                        hashes.append(_hash(row[0]))
                        offsets.append(position)
                        lines.append(line)
                position += len(raw)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if position else b""
        keys = np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)
        order = np.argsort(keys, kind="stable")
        self._hashes = keys[order]
        self._offsets = (np.frombuffer(offsets, np.int64) if offsets else np.empty(0, np.int64))[order]
        for place in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            ident = self._row(self._offsets[place])[0]
            if ident == self._row(self._offsets[place + 1])[0]:
                problems.bad(self.path, lines[order[place + 1]], f"the id {ident!r} comes again: make ids unique")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, ident: str) -> str:
        key = np.uint64(_hash(ident))
        place = int(np.searchsorted(self._hashes, key))
        while place < len(self._hashes) and self._hashes[place] == key:
            found, text = self._row(self._offsets[place])
            if found == ident:
                return text
            place += 1
        raise KeyError(f"no id {ident!r} in {self.path}")

    def __contains__(self, ident: str) -> bool:
        try:
            self[ident]
        except KeyError:
            return False
        return True

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield ids and texts in the order of the file."""
        yield from self.rows()

    def rows(self) -> Sequence[tuple[str, str]]:
        """Return ids and texts by row number, in the order of the file; 8 bytes of memory a row."""
        return _Rows(self._row, np.sort(self._offsets))

    def _row(self, offset: int) -> tuple[str, str]:
        end = self._map.find(b"\n", int(offset))
        return self._parse(self._map[int(offset) : len(self._map) if end < 0 else end])

    def _parse(self, raw: bytes) -> tuple[str, str]:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 ({error.reason}): convert the file to UTF-8") from None
        if not self._tsv:
            return row_text(parse_json(text))
        ident, tab, rest = text.rstrip("\r\n").partition("\t")
        if not tab:
            raise ValueError(f"{ident!r:.60} has no tab: write an id, a tab, a text")
        return ident, " ".join(rest.split("\t"))

    def _unpacked(self, problems: Problems) -> IO[bytes]:
        # the caller's `with` closes it; what is mapped stays
        file = tempfile.TemporaryFile()  # noqa: SIM115
        if self._tsv:
            with open_bytes(self.path) as packed:
                while block := packed.read(1 << 20):
                    file.write(block)
        else:
            for _, row in read_rows(self.path, problems):
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.seek(0)
        return file


class _Rows(Sequence[tuple[str, str]]):
    def __init__(self, read: Callable[[int], tuple[str, str]], offsets: np.ndarray):
        self._read, self._offsets = read, offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> tuple[str, str]:
        return self._read(self._offsets[row])


def row_text(row: Any) -> tuple[str, str]:
    """Return the id and the text of a document's or query's row, its title before its text.

    Raises:
        ValueError: for a row without one of the known id and text columns.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object: write one object a line")
    idents = [row[name] for name in ID_COLUMNS if row.get(name) is not None]
    texts = [row[name] for name in TEXT_COLUMNS if isinstance(row.get(name), str)]
    if not idents or not texts:
        missing, known = ("an id", ID_COLUMNS) if not idents else ("a text", TEXT_COLUMNS)
        raise ValueError(f"no column for {missing} among {', '.join(row)}: name it one of {', '.join(known)}")
    return str(idents[0]), titled(row.get("title"), texts[0])


def titled(title: Any, text: str) -> str:
    """Return a text after its title, as BEIR joins them."""
    return f"{title} {text}".strip() if isinstance(title, str) else text


def _hash(ident: str) -> int:
    return int.from_bytes(blake2b(ident.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
