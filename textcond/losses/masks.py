"""Which candidates of a batch are no negatives: right answers, twins, and what a guide model takes for right."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from textcond.features import ContrastiveBatch

Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]
MarginStrategy = Literal["absolute", "relative"]


def check_margin(margin: float | None, strategy: str) -> None:
    """Refuse a guide margin that means nothing."""
    if strategy not in get_args(MarginStrategy):
        raise ValueError(f"unknown margin_strategy {strategy!r}: choose absolute or relative")
    if margin is not None and margin < 0:
        raise ValueError(f"margin is {margin}: a guide margin is at least 0")


def not_negatives(
    batch: ContrastiveBatch,
    direction: Direction,
    *,
    in_batch: bool = True,
    margin: float | None = None,
    margin_strategy: MarginStrategy = "absolute",
) -> Tensor:
    """Bool `(q, candidates)`, True for what must not be pushed away; never for the positive that a direction holds.

    Anchors are the queries, or their positives for `document_to_*`; candidates are all documents, or all queries.

    Args:
        in_batch: without it only a query's own documents are negatives (`query_to_document` alone).
        margin: leave out candidates that the guide scores above `positive - margin` ("absolute") or above
            `positive - margin * |positive|` ("relative"): GISTEmbed (Solatorio, 2024), whose paper has margin 0.

    Raises:
        ValueError: a margin, and a batch without guide vectors.
    """
    known = batch.false_negatives()
    rows = torch.arange(len(batch.queries), device=known.device)
    # answers[i, j]: the positive of query j is right for query i
    answers = known[:, batch.positives] | (rows[:, None] == rows)
    own = rows[:, None] == batch.owners
    if direction == "query_to_document":
        excluded = known if in_batch else known | ~own
    elif direction == "document_to_query":
        excluded = answers.T
    elif direction == "query_to_query":
        excluded = answers | answers.T | (batch.query_keys[:, None] == batch.query_keys)
    else:
        excluded = known | own
    if margin is not None:
        excluded = excluded | _guide_takes_for_right(batch, direction, margin, margin_strategy)
    if direction == "query_to_document":
        excluded = excluded.scatter(1, batch.positives[:, None], False)
    elif direction == "document_to_query":
        excluded = excluded & (rows[:, None] != rows)
    return excluded


def _guide_takes_for_right(
    batch: ContrastiveBatch, direction: Direction, margin: float, strategy: MarginStrategy
) -> Tensor:
    if batch.guide_queries is None or batch.guide_documents is None:
        raise ValueError("a guide margin needs guide_queries and guide_documents, which the batch lacks: set a guide")
    queries, documents = batch.guide_queries, batch.guide_documents
    positives = documents[batch.positives]
    anchors = queries if direction.startswith("query") else positives
    candidates = documents if direction.endswith("document") else queries
    limit = (queries * positives).sum(-1, keepdim=True)
    limit = limit - (margin if strategy == "absolute" else margin * limit.abs())
    return anchors @ candidates.T > limit
