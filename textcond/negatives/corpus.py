"""The documents that negatives are drawn from, by row, by id and by text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from textcond.data.text_table import TextTable
from textcond.duplicates import text_key


class Corpus:
    """Texts with ids, and which rows have a given id or text.

    Memory besides the texts: 16 bytes a row for each of the two look-ups. A corpus in a file stays there, at 24
    bytes a row more.

    Args:
        source: texts, whose ids are then their numbers; texts by id; or the path of a BEIR folder or of anything that
            `textcond.data.text_table.TextTable` reads.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an empty corpus, or a line that is not a document, by file and line.
    """

    def __init__(self, source: Sequence[str] | Mapping[str, str] | str | Path):
        if isinstance(source, (str, Path)):
            path = Path(source).expanduser()
            rows = TextTable(path / "corpus.jsonl" if (path / "corpus.jsonl").exists() else path).rows()
            self.texts: Sequence[str] = _Column(rows, 1)
            self._ids: Sequence[str] | None = _Column(rows, 0)
        elif isinstance(source, Mapping):
            self.texts, self._ids = list(source.values()), list(source)
        else:
            self.texts, self._ids = source, None
        if not len(self.texts):
            raise ValueError("the corpus is empty: there is nothing to draw negatives from")

    @classmethod
    def of(cls, source: Corpus | Sequence[str] | Mapping[str, str] | str | Path) -> Corpus:
        """Return the corpus itself, or one made of anything that the constructor takes."""
        return source if isinstance(source, Corpus) else cls(source)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def has_ids(self) -> bool:
        """Whether rows have ids of their own, and not only their numbers."""
        return self._ids is not None

    def id(self, row: int) -> str:
        """Return a row's id."""
        return str(row) if self._ids is None else self._ids[row]

    def rows_of_text(self, text: str) -> list[int]:
        """Return the rows whose text is the same after normalising, in order."""
        return _look_up(self._tables[1], text_key(text))

    def text_keys(self, rows: np.ndarray) -> np.ndarray:
        """Return the 64-bit `text_key` of rows, without reading their texts."""
        return self._tables[1][0][rows]

    def row_of_id(self, id: str) -> int | None:
        """Return the row of an id, or None."""
        rows = _look_up(self._tables[0], _id_key(id))
        return next((row for row in rows if self.id(row) == id), None)

    def fingerprint(self) -> str:
        """Return a SHA-256 of all ids and texts in their order."""
        return self._tables[2]

    @cached_property
    def _tables(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], str]:
        ids, texts, digest = array("Q"), array("Q"), hashlib.sha256()
        for row, text in enumerate(self.texts):
            if not isinstance(text, str):
                raise ValueError(f"row {row} of the corpus is {type(text).__name__} {text!r:.80}: give texts")
            name = self.id(row)
            ids.append(_id_key(name))
            texts.append(text_key(text))
            digest.update(f"{len(name)} {len(text)} {name}{text}".encode("utf-8", "surrogatepass"))
        return _table(ids), _table(texts), digest.hexdigest()


def _id_key(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _table(keys: array) -> tuple[np.ndarray, np.ndarray]:
    values = np.frombuffer(keys, np.uint64)
    return values, np.argsort(values, kind="stable")


def _look_up(table: tuple[np.ndarray, np.ndarray], key: int) -> list[int]:
    keys, order = table
    first, last = (np.searchsorted(keys, np.uint64(key), side, sorter=order) for side in ("left", "right"))
    return order[first:last].tolist()


class _Column(Sequence[str]):
    """The ids (0) or the texts (1) of the rows of a table."""

    def __init__(self, rows: Sequence[tuple[str, str]], place: int):
        self._rows, self._place = rows, place

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> str:
        return self._rows[row][self._place]
