"""Everything that is right for a query, over all examples that ask it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from textcond.duplicates import text_key

if TYPE_CHECKING:
    from textcond.data import Example


class KnownPositives:
    """The positives of all examples by query text, as hashes: 24 bytes a positive.

    Two examples may ask the same with different positives; what answers one is no negative of the other.

    Args:
        examples: read once.
    """

    def __init__(self, examples: Iterable[Example]):
        queries, positives = array("Q"), array("Q")
        for example in examples:
            query = text_key(example.query)
            for positive in example.positives:
                queries.append(query)
                positives.append(text_key(positive))
        self._queries, self._positives = np.frombuffer(queries, np.uint64), np.frombuffer(positives, np.uint64)
        self._order = np.argsort(self._queries, kind="stable")

    def of(self, query: str) -> set[int]:
        """Return the `text_key` of every positive of a query."""
        key = np.uint64(text_key(query))
        first, last = (np.searchsorted(self._queries, key, side, sorter=self._order) for side in ("left", "right"))
        return set(self._positives[self._order[first:last]].tolist())
