"""One query with what answers it and what does not: the unit of contrastive training data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TEXT_LISTS = {"positives": "pos", "negatives": "neg"}
SCORE_LISTS = {"positive_scores": "pos_scores", "negative_scores": "neg_scores"}
ID_LISTS = {"positive_ids": "pos_ids", "negative_ids": "neg_ids"}


@dataclass
class Example:
    """A query, at least one positive, any number of negatives; checked when it is made.

    - `positive_scores`, `negative_scores`: a teacher's score of each text for the query, NaN where unknown.
    - `query_id`, `positive_ids`, `negative_ids`: ids in the source's tables.
    - `prompt`: an instruction that stands before the query in place of the encoder's query prompt.
    - `source`: the name of the data set or file that it comes from.

    Raises:
        ValueError: for an empty text, no positive, or a list of scores or ids of another length than its texts.
    """

    query: str
    positives: list[str]
    negatives: list[str] = field(default_factory=list)
    positive_scores: list[float] | None = None
    negative_scores: list[float] | None = None
    query_id: str | None = None
    positive_ids: list[str] | None = None
    negative_ids: list[str] | None = None
    prompt: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        _check_text("the query", self.query)
        if not self.positives:
            raise ValueError("no positive: give at least one")
        for name in TEXT_LISTS:
            for place, text in enumerate(getattr(self, name), 1):
                _check_text(f"{name[:-1]} {place}", text)
        for texts, lists in (
            ("positives", ("positive_scores", "positive_ids")),
            ("negatives", ("negative_scores", "negative_ids")),
        ):
            for name in lists:
                values: Sequence[Any] | None = getattr(self, name)
                if values is not None and len(values) != len(getattr(self, texts)):
                    raise ValueError(
                        f"{len(getattr(self, texts))} {texts} with {len(values)} {name}: give one for each, or none"
                    )

    def to_row(self) -> dict[str, Any]:
        """Return the canonical JSON object: FlagEmbedding's keys, and `query_id, pos_ids, neg_ids, source`.

        What is unknown is left out, a NaN score is None.
        """
        row: dict[str, Any] = {"query": self.query, "pos": self.positives, "neg": self.negatives}
        for name, key in SCORE_LISTS.items():
            if (scores := getattr(self, name)) is not None:
                row[key] = [None if math.isnan(score) else score for score in scores]
        for name, key in {"query_id": "query_id", **ID_LISTS, "prompt": "prompt"}.items():
            if (value := getattr(self, name)) is not None:
                row[key] = value
        if self.source:
            row["source"] = self.source
        return row

    @classmethod
    def from_row(cls, row: Any, source: str = "") -> Example:
        """Return the example of a canonical JSON object; keys that it does not know are ignored, as FlagEmbedding does.

        Raises:
            ValueError: for an object without `query` and `pos`, or values of the wrong kind; names the key.
        """
        if not isinstance(row, dict):
            raise ValueError(f"a JSON {type(row).__name__}, not an object: write one object a line")
        if missing := [key for key in ("query", "pos") if key not in row]:
            raise ValueError(f"no key {missing[0]!r} among {', '.join(map(repr, row))}: name query and pos")
        values: dict[str, Any] = {"query": row["query"], "source": row.get("source") or source}
        for name, key in TEXT_LISTS.items():
            values[name] = as_list(row.get(key), key) or []
        for name, key in SCORE_LISTS.items():
            scores = as_list(row.get(key), key)
            values[name] = None if scores is None else [as_score(score, key) for score in scores]
        for name, key in ID_LISTS.items():
            ids = as_list(row.get(key), key)
            values[name] = None if ids is None else [str(value) for value in ids]
        values["query_id"] = None if row.get("query_id") is None else str(row["query_id"])
        values["prompt"] = row.get("prompt")
        if not isinstance(values["prompt"], (str, type(None))):
            raise ValueError(f"prompt is {values['prompt']!r}: give a text")
        return cls(**values)


def as_list(value: Any, name: str) -> list[Any] | None:
    """Return a list, or None for None; ValueError for anything else, by the name of its column."""
    if value is None or isinstance(value, list):
        return value
    raise ValueError(f"{name} is {value!r:.60}: give a list")


def as_score(value: Any, name: str) -> float:
    """Return a score as a float, NaN for None; ValueError for anything else, by the name of its column."""
    if value is None:
        return math.nan
    if isinstance(value, (int, float)):
        return float(value)
    raise ValueError(f"{name} holds {value!r:.60}: give numbers")


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r:.60}: give a text")
    if not text.strip():
        raise ValueError(f"{name} is empty: give a text or leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half of a surrogate pair: {text!r:.60}: write it again as UTF-8") from None
