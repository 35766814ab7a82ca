"""The prompts of an index, found by whichever encoder conditions the pictures."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textcond import Hit, PromptIndex, TextEncoder


def open_index(path: str | Path | None = None) -> PromptIndex:
    """The prompt index at `path`, or that of the reference model."""
    if path is not None:
        from textcond.index import PromptIndex

        return PromptIndex.open(path)
    from textcond.pipelines.reference import open_reference_index

    return open_reference_index()


class Finder:
    """Searches the rows of `index` with its own encoder, or with another one that encodes the texts again, in memory.

    The rows keep their numbers, and their pictures stay where the index has them.
    """

    def __init__(self, index: PromptIndex, encoder: TextEncoder | None = None):
        from textcond.index import PromptIndex

        self.index = index
        self.rows = index.rows()
        self.encoder = encoder or index.encoder
        self.weights_hash = self.encoder.weights_hash()
        self._searched = index
        if encoder is not None:
            self._searched = PromptIndex(encoder)
            self._searched.add([row.text for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, query: str, k: int) -> list[Hit]:
        """The `k` nearest rows, best first."""
        return [replace(self.rows[hit.id], score=hit.score) for hit in self._searched.search(query, k=k)]

    def sample(self, k: int) -> list[Hit]:
        """`k` rows (or all of fewer), drawn at random."""
        return random.sample(self.rows, min(k, len(self.rows)))
