"""Triplet loss (Schroff et al., 2015): the positive is nearer than a negative, by a margin."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textcond.features import ContrastiveBatch, Features
from textcond.losses.masks import not_negatives
from textcond.similarity import ScoreKind, check_kind, own_similarity, similarity

Distance = Literal["cosine", "euclidean"]
Negatives = Literal["explicit", "hardest"]


class Triplet(nn.Module):
    """`max(0, distance(q, d+) - distance(q, d-) + margin)`, mean over the triplets of the batch.

    The formula is that of FaceNet (Schroff et al., 2015) with plain distances, as in Sentence-BERT (Reimers and
    Gurevych, 2019); "hardest" negatives are the batch-hard of Hermans et al. (2017). A query without negatives
    makes no triplet; a batch without triplets has loss 0.

    Args:
        margin: in units of the distance; Sentence-BERT has 1 with Euclidean distance. Cosine distances lie in 0..2.
        distance: "cosine" for `1 - cos`, or "euclidean" between the dense vectors as they are.
        negatives: "explicit" for every explicit negative of the query, "hardest" for the nearest negative of the whole
            batch alone. Known right answers are left out in both.
        scores: "dense", or "sparse" or "tokens", whose distance is `1 - score`; with distance "cosine" alone.

    Raises:
        ValueError: an unknown option, a margin below 0, or Euclidean distance of anything but dense vectors.

    Example:
        >>> from textcond.features import Features
        >>> rows, owners = torch.arange(2), torch.tensor([0, 1, 0, 1])
        >>> documents = Features(torch.eye(2)[[0, 1, 1, 0]])  # a positive, then a negative a query
        >>> batch = ContrastiveBatch(
        ...     Features(torch.eye(2)), documents, rows, owners, rows + 1, torch.arange(4) + 11, rows[:, None] + 11
        ... )
        >>> Triplet(margin=1.25)(batch).item()
        0.25
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        distance: Distance = "cosine",
        negatives: Negatives = "explicit",
        scores: ScoreKind = "dense",
    ):
        super().__init__()
        check_kind(scores)
        if distance not in get_args(Distance):
            raise ValueError(f"unknown distance {distance!r}: choose cosine or euclidean")
        if negatives not in get_args(Negatives):
            raise ValueError(f"unknown negatives {negatives!r}: choose explicit or hardest")
        if margin < 0:
            raise ValueError(f"margin is {margin}: a triplet margin is at least 0")
        if distance == "euclidean" and scores != "dense":
            raise ValueError(f"distance 'euclidean' is between dense vectors, not scores {scores!r}: choose cosine")
        self.margin, self.distance, self.negatives, self.scores = margin, distance, negatives, scores

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        """The loss of the joint batch, a scalar.

        Raises:
            ValueError: features without the chosen scores.
        """
        queries, documents = batch.queries, batch.documents
        if self.distance == "cosine":
            queries, documents = _unit(queries), _unit(documents)
        excluded = not_negatives(batch, "query_to_document", in_batch=self.negatives == "hardest")
        rows = torch.arange(len(queries), device=excluded.device)
        excluded = excluded.scatter(1, batch.positives[:, None], True)
        if self.negatives == "explicit":
            anchors, negatives = (~excluded).nonzero(as_tuple=True)
        else:
            with torch.no_grad():
                near = self._distances(queries, documents).masked_fill(excluded, float("inf")).argmin(1)
            anchors = rows[~excluded.all(1)]
            negatives = near[anchors]
        to_positive = self._own_distances(queries, documents, anchors, batch.positives[anchors])
        to_negative = self._own_distances(queries, documents, anchors, negatives)
        losses = F.relu(to_positive - to_negative + self.margin)
        return losses.sum() / max(1, len(losses))

    def _distances(self, queries: Features, documents: Features) -> Tensor:
        if self.distance == "euclidean":
            return torch.cdist(queries.dense, documents.dense)
        return 1 - similarity(queries, documents, self.scores)

    def _own_distances(self, queries: Features, documents: Features, anchors: Tensor, chosen: Tensor) -> Tensor:
        chosen_documents = documents.map(lambda tensor: tensor[chosen])
        if self.distance == "euclidean":
            # the norm's gradient at 0 is 0: a negative that equals its query is no NaN
            return torch.linalg.vector_norm(queries.dense[anchors] - chosen_documents.dense, dim=-1)
        return 1 - own_similarity(queries, chosen_documents, anchors, self.scores)


def _unit(features: Features) -> Features:
    return Features(**{**vars(features), "dense": F.normalize(features.dense, dim=-1)})
