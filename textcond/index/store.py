"""What an index asks of the store that keeps its rows; `tests/store_conformance.py` is the contract in full."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .filters import Filter, check_unicode


@dataclass
class Row:
    """One row as a store keeps it.

    Args:
        vector: unit length, `(dim,)` float32; empty where it was not asked for.
        image: an encoded picture (a file's bytes); None where there is none or it was not asked for.
        has_image: whether there is a picture, asked for or not; stores fill it in.
    """

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    vector: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32), repr=False, compare=False)
    image: bytes | None = field(default=None, repr=False)
    has_image: bool = False


class Store(Protocol):
    """Rows with vectors, words and pictures, somewhere that outlives the process.

    Every error is an OSError or ValueError in one sentence; several threads may call one store.

    Attributes:
        most: the largest k of a search; None where there is no limit.
    """

    most: int | None

    def info(self) -> dict[str, Any]:
        """What was last given to `set_info`; empty in a new store."""
        ...

    def set_info(self, info: dict[str, Any]) -> None:
        """Keep a small JSON dict beside the rows, whole or not at all. Comes before any row; `dim` is the width."""
        ...

    def upsert(self, rows: Sequence[Row]) -> None:
        """Write rows whose ids all differ in place of those with the same ids: all of them or none.

        When it returns, they survive `kill -9` and every other process sees them.
        """
        ...

    def delete(self, ids: Sequence[str] | None, filter: Filter | None) -> int:
        """Remove the rows that have one of the ids (if given) and pass the filter (if given); return how many."""
        ...

    def count(self, filter: Filter | None) -> int:
        """How many rows pass the filter."""
        ...

    def dense(
        self, vector: np.ndarray, k: int, filter: Filter | None, exact: bool, *, vectors: bool = False
    ) -> list[tuple[Row, float]]:
        """The k rows of largest cosine to a unit vector `(dim,)`, best first; `exact` sets an ANN index aside.

        Equal scores come in the order of ids, also where k cuts them, as far as `first_of_equal` looks.
        Rows come without pictures, and without vectors unless asked for.
        """
        ...

    def lexical(
        self, tokens: Sequence[str], k: int, filter: Filter | None, *, vectors: bool = False
    ) -> list[tuple[Row, float]]:
        """The k rows of largest BM25 among those that share a token, best first; rows as `dense` gives them.

        Tokens are the `textcond.index.lexical.query_terms` of a query, all different; a store keeps the
        `document_terms` of the rows' texts.
        """
        ...

    def get(self, ids: Sequence[str], *, vectors: bool, images: bool) -> list[Row]:
        """The rows that are there, in the order of `ids`."""
        ...

    def scan(self, filter: Filter | None, *, batch: int, vectors: bool, images: bool) -> Iterator[list[Row]]:
        """Every row that passes the filter, once, in lists of at most `batch`; writes meanwhile may show or not."""
        ...

    def optimize(self) -> None:
        """Make searches fast and the files small; what is found may only change as an ANN index changes it."""
        ...

    def stats(self) -> dict[str, Any]:
        """At least `store` (its name), `rows`, `bytes` (on disk, or None), `ann` (the index's kind, or None)."""
        ...

    def close(self) -> None:
        """Let go of files and connections; the store is not used again."""
        ...


def metadata_json(row: Row) -> str:
    """Return a row's metadata as JSON; a ValueError names what of the row is not Unicode."""
    metadata = json.dumps(row.metadata, ensure_ascii=False)
    check_unicode(row.id, "id")
    check_unicode(row.text, f"row {row.id[:60]!r}: its text")
    check_unicode(metadata, f"row {row.id[:60]!r}: its metadata")
    return metadata


def check_ids(ids: Sequence[str]) -> None:
    """Raise a ValueError for an id that is not Unicode."""
    for id in ids:
        check_unicode(id, "id")


def first_of_equal(
    search: Callable[[int], list[tuple[Row, float]]], k: int, most: int | None = None, *, common: bool = False
) -> list[tuple[Row, float]]:
    """Return the k best rows of `search(limit)`, equal scores in the order of ids.

    A database cuts its answer without a look at ids. Where the next row is as good as the k-th, the first ids are
    chosen among 4k rows (at least 100; at most `most`); of more equal rows than that, the database chooses. Where equal
    scores are `common`, as those of words are, so many are asked for at once.
    """

    def found(limit: int) -> list[tuple[Row, float]]:
        rows = search(limit if most is None else min(limit, most))
        return sorted(rows, key=lambda pair: (-pair[1], pair[0].id))

    rows = found(max(4 * k, 100) if common else k + 1)
    if not common and len(rows) > k and rows[k - 1][1] == rows[k][1]:
        rows = found(max(4 * k, 100))
    return rows[:k]
