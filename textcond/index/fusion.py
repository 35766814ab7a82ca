"""Ranked lists made into one, and one list made varied."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from textcond.duplicates import jaccard, shingles, without_punctuation

Key = TypeVar("Key", bound=Hashable)


def reciprocal_rank_fusion(rankings: Iterable[Sequence[Key]], constant: int = 60) -> list[tuple[Key, float]]:
    """Return all keys of some rankings, best first, with the sum of 1 / (constant + rank) (Cormack et al., 2009).

    Ranks count from 1. Equal sums come in the order of keys.
    """
    scores: dict[Key, float] = {}
    for ranking in rankings:
        for rank, key in enumerate(ranking, start=1):
            scores[key] = scores.get(key, 0.0) + 1 / (constant + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def maximal_marginal_relevance(scores: np.ndarray, vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    """Return the places of k rows, each the best of those left by relevance and by difference from those before.

    The value of a row is (1 - diversity) * relevance - diversity * its largest cosine to a chosen one (Carbonell and
    Goldstein, 1998); relevance is the score, scaled to 0..1 over the candidates.

    Args:
        scores: of the candidates, `(n,)`.
        vectors: of unit length, `(n, dim)`.
        diversity: 0 is the order of scores, 1 looks at difference alone after the first.
    """
    spread = scores.max() - scores.min() if len(scores) else 0.0
    relevance = (scores - scores.min()) / spread if spread > 0 else np.zeros(len(scores))
    chosen: list[int] = []
    nearest = np.zeros(len(scores))
    left = np.ones(len(scores), bool)
    while len(chosen) < min(k, len(scores)):
        value = (1 - diversity) * relevance - diversity * nearest if chosen else relevance
        best = int(np.argmax(np.where(left, value, -np.inf)))
        chosen.append(best)
        left[best] = False
        cosines = vectors @ vectors[best]
        nearest = cosines if len(chosen) == 1 else np.maximum(nearest, cosines)
    return chosen


class NearTexts:
    """Texts of which none is like another: a Jaccard similarity of character trigrams below `near`.

    Case, punctuation and spacing are set aside. Every pair is compared: it is for the few texts of an answer
    (`textcond.duplicates.DistinctTexts` is for a corpus).
    """

    def __init__(self, near: float = 0.8):
        self._near = near
        self._kept: list[frozenset[str]] = []

    def add(self, text: str) -> bool:
        """Take a text in and return True, or return False if one much like it is there; an empty text is like none."""
        bare = without_punctuation(text)
        if not bare:
            return True
        trigrams = shingles(f" {bare} ", 3)
        if any(jaccard(trigrams, other) >= self._near for other in self._kept):
            return False
        self._kept.append(trigrams)
        return True
