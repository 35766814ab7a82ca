"""Distillation from a teacher's scores (KL over lists, MarginMSE) or from its vectors (MSE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textcond.features import ContrastiveBatch
from textcond.similarity import ScoreKind, check_kind, own_similarity

Side = Literal["queries", "documents"]


class ListwiseKL(nn.Module):
    """KL divergence of the student's distribution over each query's own list from the teacher's.

    `sum_d p(d) (log p(d) - log q(d))` with `p = softmax(teacher / teacher_temperature)` and
    `q = softmax(s / temperature)`, mean over queries (Hinton et al., 2015; over a query's passages as
    in SimLM, Wang et al., 2023). There is no factor of temperature squared: give a weight instead. Lists are ragged.
    Documents without a teacher score (NaN) are left out, and so is a query with fewer than two scores.

    Args:
        temperature: divides the student's scores; as that of the InfoNCE it is summed with.
        teacher_temperature: divides the teacher's scores; SimLM takes its cross-encoder's logits as they are.
        scores: "dense", "sparse" or "tokens".

    Raises:
        ValueError: a temperature that is not positive, or unknown scores.

    Example:
        >>> from textcond.features import Features
        >>> texts, rows = Features(torch.eye(2)), torch.arange(1)
        >>> batch = ContrastiveBatch(
        ...     texts.map(lambda tensor: tensor[:1]), texts, rows, torch.zeros(2, dtype=torch.int64), rows + 1,
        ...     torch.tensor([11, 12]), rows[:, None] + 11, teacher_scores=torch.tensor([2.0, 1.0]),
        ... )
        >>> ListwiseKL(temperature=1.0)(batch).item()  # the student's margin is the teacher's
        0.0
    """

    def __init__(self, temperature: float = 0.05, *, teacher_temperature: float = 1.0, scores: ScoreKind = "dense"):
        super().__init__()
        check_kind(scores)
        if temperature <= 0 or teacher_temperature <= 0:
            raise ValueError(f"temperatures {temperature} and {teacher_temperature} must be positive")
        self.temperature, self.teacher_temperature, self.scores = temperature, teacher_temperature, scores

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        """The loss of the joint batch, a scalar; 0 if no list has two teacher scores.

        Raises:
            ValueError: a batch without teacher scores, or features without the chosen scores.
        """
        teacher = _teacher_scores(batch, "ListwiseKL")
        student = own_similarity(batch.queries, batch.documents, batch.owners, self.scores)
        known = ~teacher.isnan()
        listed = known & (torch.bincount(batch.owners[known], minlength=len(batch.queries))[batch.owners] > 1)
        owners, places = _places(batch.owners[listed])
        if not len(owners):
            return student.sum() * 0
        shape = (int(owners[-1]) + 1, int(places.max()) + 1)
        order = listed.nonzero()[:, 0][batch.owners[listed].argsort(stable=True)]
        empty = torch.ones(shape, dtype=torch.bool, device=teacher.device).index_put(
            (owners, places), torch.zeros((), dtype=torch.bool, device=teacher.device)
        )

        def log_probabilities(scores: Tensor) -> Tensor:
            table = scores.new_full(shape, float("-inf")).index_put((owners, places), scores[order])
            return table.log_softmax(1).masked_fill(empty, 0)

        target = log_probabilities(teacher.to(student.dtype) / self.teacher_temperature)
        divergence = target.exp() * (target - log_probabilities(student / self.temperature))
        return divergence.masked_fill(empty, 0).sum() / shape[0]


def _places(owners: Tensor) -> tuple[Tensor, Tensor]:
    """Rows 0.. of the lists that are there, and the place in its list, of documents sorted by owner."""
    _, rows, counts = owners.sort(stable=True).values.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    return rows, torch.arange(len(rows), device=rows.device) - starts[rows]


class MarginMSE(nn.Module):
    """Mean squared error of the student's margins between positive and negatives to the teacher's.

    `((s(q, d+) - s(q, d-)) - (t(q, d+) - t(q, d-)))^2`, mean over explicit negatives whose own score and positive's
    score the teacher gave (Hofstätter et al., 2020).

    Args:
        temperature: divides the student's scores; 1.0 as in the paper, whose students have unbounded inner products.
            Cosines cannot span the margins of cross-encoder logits: 0.05 or so lets them.
        scores: "dense", "sparse" or "tokens".

    Raises:
        ValueError: a temperature that is not positive, or unknown scores.

    Example:
        >>> from textcond.features import Features
        >>> texts, rows = Features(torch.eye(2)), torch.arange(1)
        >>> batch = ContrastiveBatch(
        ...     texts.map(lambda tensor: tensor[:1]), texts, rows, torch.zeros(2, dtype=torch.int64), rows + 1,
        ...     torch.tensor([11, 12]), rows[:, None] + 11, teacher_scores=torch.tensor([4.0, 1.0]),
        ... )
        >>> MarginMSE()(batch).item()  # ((1 - 0) - (4 - 1))^2
        4.0
    """

    def __init__(self, temperature: float = 1.0, *, scores: ScoreKind = "dense"):
        super().__init__()
        check_kind(scores)
        if temperature <= 0:
            raise ValueError(f"temperature {temperature} must be positive")
        self.temperature, self.scores = temperature, scores

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        """The loss of the joint batch, a scalar; 0 if no negative has a known margin.

        Raises:
            ValueError: a batch without teacher scores, or features without the chosen scores.
        """
        teacher = _teacher_scores(batch, "MarginMSE")
        student = own_similarity(batch.queries, batch.documents, batch.owners, self.scores) / self.temperature
        positives = batch.positives[batch.owners]
        target = teacher[positives] - teacher
        known = ~target.isnan() & (positives != torch.arange(len(teacher), device=teacher.device))
        errors = (student[positives] - student)[known] - target[known]
        return errors.square().sum() / max(1, len(errors))


class VectorMSE(nn.Module):
    """Mean squared error of the student's vectors to a teacher's: multilingual distillation of parallel text.

    With queries in the teacher's language and their translations as positives, both are drawn to the teacher's vector
    of the query: `mse(student(source), teacher(source)) + mse(student(translation), teacher(source))` (Reimers and
    Gurevych, 2020), here the mean of the sides. Each `mse` is the mean over texts and dimensions.

    Args:
        students: the sides that learn.
        documents_to: what documents are drawn to: "queries" for positives to the teacher's vector of their query, or
            "documents" for every document to the teacher's vector of itself (EmbedDistill, Kim et al., 2023).

    Raises:
        ValueError: unknown or no sides.

    Example:
        >>> from textcond.features import Features
        >>> rows = torch.arange(4)
        >>> batch = ContrastiveBatch(
        ...     Features(torch.eye(4)), Features(-torch.eye(4)), rows, rows, rows + 1, rows + 11, rows[:, None] + 11,
        ...     teacher_queries=torch.eye(4),
        ... )
        >>> VectorMSE()(batch).item()  # queries 0, translations 2^2 in one of 4 dimensions
        0.5
    """

    def __init__(self, students: Sequence[Side] = ("queries", "documents"), *, documents_to: Side = "queries"):
        super().__init__()
        sides = get_args(Side)
        if not students or set(students) - set(sides) or len(set(students)) < len(students):
            raise ValueError(f"students {list(students)}: choose queries, documents or both")
        if documents_to not in sides:
            raise ValueError(f"unknown documents_to {documents_to!r}: choose queries or documents")
        self.students, self.documents_to = list(students), documents_to

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        """The loss of the joint batch, a scalar.

        Raises:
            ValueError: a batch without the teacher's vectors, or vectors of another width than the student's.
        """
        pairs = []
        if "queries" in self.students:
            pairs.append((batch.queries.dense, self._target(batch, "queries")))
        if "documents" in self.students:
            documents = batch.documents.dense
            student = documents[batch.positives] if self.documents_to == "queries" else documents
            pairs.append((student, self._target(batch, self.documents_to)))
        return torch.stack([F.mse_loss(student, target.to(student.dtype)) for student, target in pairs]).mean()

    def _target(self, batch: ContrastiveBatch, side: Side) -> Tensor:
        target = getattr(batch, f"teacher_{side}")
        if target is None:
            raise ValueError(f"VectorMSE needs teacher_{side}, which the batch lacks: set a teacher that gives vectors")
        width = batch.queries.dense.shape[1]
        if target.shape[1] != width:
            raise ValueError(
                f"the teacher's vectors are {target.shape[1]} wide, the student's {width}: take a teacher of {width}"
            )
        return target


def _teacher_scores(batch: ContrastiveBatch, loss: str) -> Tensor:
    if batch.teacher_scores is None:
        raise ValueError(
            f"{loss} needs teacher_scores, which the data lack: give the examples positive_scores and negative_scores"
        )
    return batch.teacher_scores
