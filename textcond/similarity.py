"""How well a document answers a query: dense, lexical and late-interaction scores of `Features`, all differentiable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from textcond.features import Features

ScoreKind = Literal["dense", "sparse", "tokens"]

BLOCK_ELEMENTS = 2**24
"""Token-by-token similarities that late interaction holds at a time: 64 MiB in float32."""


def dense_scores(queries: Features, documents: Features) -> Tensor:
    """Inner products of the dense vectors, `(q, n)`: cosine similarity where the encoder normalises."""
    return queries.dense @ documents.dense.T


def sparse_scores(queries: Features, documents: Features) -> Tensor:
    """Lexical matching of BGE-M3 (Chen et al., 2024, section 3.2): the sum of `w_query * w_document` over shared ids.

    An id that occurs several times in a text has the largest of its weights.

    Returns:
        Scores `(q, n)`.

    Raises:
        ValueError: features without sparse weights.
    """
    query_terms, document_terms = _shared_terms(queries, documents)
    return query_terms @ document_terms.T


def late_interaction_scores(queries: Features, documents: Features) -> Tensor:
    """MaxSim of ColBERT (Khattab and Zaharia, 2020): every query token takes its best document token.

    The MEAN over the query's tokens, as in BGE-M3 (Chen et al., 2024, section 3.2), where ColBERT takes the sum: scores
    stay in -1..1 for any length. Texts without a token score 0. Computed in blocks of documents of which autograd keeps
    only the winners, so memory is about `4 * BLOCK_ELEMENTS` bytes whatever the batch.

    Returns:
        Scores `(q, n)`.

    Raises:
        ValueError: features without multi-vectors.
    """
    query_tokens, query_mask = _tokens(queries)
    document_tokens, document_mask = _tokens(documents)
    packed, rows = query_tokens[query_mask], query_mask.nonzero()[:, 0]
    columns = []
    for block in _blocks(len(documents), len(packed) * document_tokens.shape[1]):
        tokens, mask = document_tokens[block], document_mask[block]
        pairs = (packed @ tokens.flatten(0, 1).T).unflatten(1, mask.shape)
        best = _best(pairs, mask)
        columns.append(best.new_zeros(len(queries), len(mask)).index_add(0, rows, best))
    return torch.cat(columns, 1) / query_mask.sum(1).clamp(min=1)[:, None]


def similarity(queries: Features, documents: Features, kind: ScoreKind) -> Tensor:
    """Scores `(q, n)` of one kind: "dense", "sparse" or "tokens".

    Raises:
        ValueError: an unknown kind, or features that lack it.
    """
    check_kind(kind)
    return {"dense": dense_scores, "sparse": sparse_scores, "tokens": late_interaction_scores}[kind](queries, documents)


def own_similarity(queries: Features, documents: Features, owners: Tensor, kind: ScoreKind) -> Tensor:
    """Scores `(n,)` of each document for query `owners[document]` alone: the `similarity` that a list needs, no more.

    Raises:
        ValueError: an unknown kind, or features that lack it.
    """
    check_kind(kind)
    if kind == "dense":
        return (queries.dense[owners] * documents.dense).sum(-1)
    if kind == "sparse":
        query_terms, document_terms = _shared_terms(queries, documents)
        return (query_terms[owners] * document_terms).sum(-1)
    query_tokens, query_mask = _tokens(queries)
    document_tokens, document_mask = _tokens(documents)
    scores = []
    for block in _blocks(len(documents), query_tokens.shape[1] * document_tokens.shape[1]):
        tokens, mask, owner = document_tokens[block], document_mask[block], owners[block]
        asking = query_mask[owner]
        best = _best(query_tokens[owner] @ tokens.mT, mask[:, None]) * asking
        scores.append(best.sum(1) / asking.sum(1).clamp(min=1))
    return torch.cat(scores)


def check_kind(kind: str) -> None:
    """Refuse a kind of score that does not exist."""
    if kind not in ("dense", "sparse", "tokens"):
        raise ValueError(f"unknown scores {kind!r}: choose dense, sparse or tokens")


def _best(pairs: Tensor, mask: Tensor) -> Tensor:
    # max keeps its indices for the backward pass, amax would keep every pair
    best = pairs.masked_fill(~mask, float("-inf")).max(-1).values
    return best.masked_fill(~mask.any(-1), 0)


def _blocks(documents: int, elements: int) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // max(1, elements))
    return (slice(start, start + size) for start in range(0, documents, size))


def _tokens(features: Features) -> tuple[Tensor, Tensor]:
    if features.tokens is None or features.token_mask is None:
        raise ValueError("scores 'tokens' need multi-vectors, which the features lack: add_heads(tokens=True)")
    return features.tokens, features.token_mask


def _shared_terms(queries: Features, documents: Features) -> tuple[Tensor, Tensor]:
    # an id that no query holds adds nothing to any score: the vocabulary shrinks to the queries' ids
    for features in (queries, documents):
        if features.sparse is None or features.token_ids is None or features.token_mask is None:
            raise ValueError("scores 'sparse' need token weights, which the features lack: add_heads(sparse=True)")
    vocabulary = queries.token_ids.unique()
    return _term_weights(queries, vocabulary), _term_weights(documents, vocabulary)


def _term_weights(features: Features, vocabulary: Tensor) -> Tensor:
    columns = torch.searchsorted(vocabulary, features.token_ids).clamp(max=len(vocabulary) - 1)
    known = features.token_mask & (vocabulary[columns] == features.token_ids)
    cells = known.nonzero()[:, 0] * len(vocabulary) + columns[known]
    table = features.sparse.new_zeros(len(features) * len(vocabulary))
    return table.scatter_reduce(0, cells, features.sparse[known], "amax").view(len(features), len(vocabulary))
