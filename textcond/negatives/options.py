"""What a negative may be, and how many are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class MiningOptions:
    """How negatives are chosen from what the sources rank; saved as JSON.

    - `num_negatives`: how many a query.
    - `range_min`, `range_max`: the ranks of each source that count, from 0 and up to but without `range_max`. They are
      those of the source's own list, before anything is removed, a positive included.
    - `sampling`: "top" for the best ranks that pass, "random" for an even draw among all that pass.
    - `relative`: keep what scores below this share of the positive's score: 0.95 is TopK-PercPos of NV-Retriever
      (Moreira et al., 2024). Of a negative score s it is s - (1 - relative) |s|, so that it never exceeds s.
    - `margin`: keep what scores below the positive's score minus this (TopK-MarginPos).
    - `max_score`, `min_score`: keep what scores within these, bounds included.
    - `against`: of several positives, compare with the "lowest" score, so that no negative beats any of them, or with
      the "highest". NV-Retriever has one positive a query.
    - `near_duplicate`: drop what shares this much of its character 5-grams (Jaccard) with a positive, the query or a
      negative already chosen; None compares only normalised texts.
    - `on_short`: of a query with fewer negatives than asked for, "keep" what there is, "drop" it, or "error".
    - `seed`: decides everything that is random; a query's draw depends on the seed and its place in the input only.

    Raises:
        ValueError: for a value out of its range.
    """

    num_negatives: int = 7
    range_min: int = 0
    range_max: int = 100
    sampling: str = "top"
    relative: float | None = None
    margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    against: str = "lowest"
    near_duplicate: float | None = 0.9
    on_short: str = "keep"
    seed: int = 0

    def __post_init__(self):
        for name, choices in (
            ("sampling", ("top", "random")),
            ("against", ("lowest", "highest")),
            ("on_short", ("keep", "drop", "error")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(choices)}")
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives={self.num_negatives}: ask for at least 1")
        if not 0 <= self.range_min < self.range_max:
            raise ValueError(
                f"range_min={self.range_min}, range_max={self.range_max}: ranks count from 0, range_max above range_min"
            )
        if self.relative is not None and not 0 < self.relative <= 1:
            raise ValueError(f"relative={self.relative}: give a share of the positive's score, 0.95 for 95%")
        if self.near_duplicate is not None and not 0 < self.near_duplicate <= 1:
            raise ValueError(f"near_duplicate={self.near_duplicate}: give a share of shingles above 0 up to 1, or None")

    @property
    def by_score(self) -> bool:
        """Whether any rule needs scores."""
        return any(value is not None for value in (self.relative, self.margin, self.max_score, self.min_score))

    def passes(self, scores: np.ndarray, positive_scores: Sequence[float]) -> np.ndarray:
        """Return which candidates' scores may be a negative's, bool `(candidates,)`."""
        positive = min(positive_scores) if self.against == "lowest" else max(positive_scores)
        good = np.ones(len(scores), bool)
        if self.relative is not None:
            good &= scores < positive - (1 - self.relative) * abs(positive)
        if self.margin is not None:
            good &= scores < positive - self.margin
        if self.max_score is not None:
            good &= scores <= self.max_score
        if self.min_score is not None:
            good &= scores >= self.min_score
        return good

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)


@dataclass
class MiningReport:
    """Counts of a mining run.

    - `queries`: read; `written`: that came out; `negatives`: of all of them together.
    - `short`: queries with fewer negatives than asked for, whether kept or dropped.
    - `missing_positives`: queries with a positive that the corpus lacks.
    - `candidates`: within the ranks that count; of these `known_positives`: right for the query, or the query itself;
      `filtered`: removed by score; `duplicates`: passed over as equal or nearly equal to something chosen.
    """

    queries: int = 0
    written: int = 0
    negatives: int = 0
    short: int = 0
    missing_positives: int = 0
    candidates: int = 0
    known_positives: int = 0
    filtered: int = 0
    duplicates: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the counts as JSON values."""
        return dataclasses.asdict(self)
