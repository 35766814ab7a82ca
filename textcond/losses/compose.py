"""Losses made of losses: weighted sums, and Matryoshka over any of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textcond.features import ContrastiveBatch


class WeightedSum(nn.Module):
    """`sum_i weight_i * loss_i(batch)`, such as InfoNCE and distillation in one step (E5, Wang et al., 2022).

    Raises:
        ValueError: no losses.

    Example:
        >>> from textcond.features import Features
        >>> from textcond.losses import InfoNCE
        >>> rows = torch.arange(4)
        >>> texts = Features(torch.eye(4))
        >>> batch = ContrastiveBatch(texts, texts, rows, rows, rows + 1, rows + 11, rows[:, None] + 11)
        >>> one, both = InfoNCE(1.0), WeightedSum([(1.0, InfoNCE(1.0)), (0.5, InfoNCE(1.0))])
        >>> round((both(batch) / one(batch)).item(), 4)
        1.5
    """

    def __init__(self, weighted: Sequence[tuple[float, nn.Module]]):
        super().__init__()
        if not weighted:
            raise ValueError("a weighted sum of no losses: give at least one (weight, loss)")
        self.weights = [float(weight) for weight, _ in weighted]
        self.losses = nn.ModuleList(loss for _, loss in weighted)

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        """The loss of the joint batch, a scalar."""
        return torch.stack([weight * loss(batch) for weight, loss in zip(self.weights, self.losses)]).sum()


class Matryoshka(nn.Module):
    """A loss on the first `m` dimensions of the dense vectors, for several m: `sum_m weight_m * loss(batch[:m])`.

    Matryoshka representation learning (Kusupati et al., 2022). Dense vectors, and a teacher's where they are
    wider, are cut and made unit vectors again; sparse weights, multi-vectors, teacher scores and the guide stay.

    Args:
        loss: any loss of this package.
        dims: the widths, the full one included if it is to be trained.
        weights: one a width; 1.0 each as in the paper.

    Raises:
        ValueError: no widths, a width below 1, or another number of weights.

    Example:
        >>> from textcond.features import Features
        >>> from textcond.losses import InfoNCE
        >>> rows = torch.arange(4)
        >>> texts = Features(F.normalize(torch.eye(4) + 0.1, dim=1))
        >>> batch = ContrastiveBatch(texts, texts, rows, rows, rows + 1, rows + 11, rows[:, None] + 11)
        >>> Matryoshka(InfoNCE(), dims=[4, 2])(batch) > InfoNCE()(batch)
        tensor(True)
    """

    def __init__(self, loss: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None):
        super().__init__()
        if not dims or min(dims) < 1:
            raise ValueError(f"Matryoshka dims {list(dims)}: give one or more widths of at least 1")
        if weights is not None and len(weights) != len(dims):
            raise ValueError(f"{len(weights)} weights for {len(dims)} Matryoshka dims: give one each")
        self.loss, self.dims = loss, list(dims)
        self.weights = [1.0] * len(dims) if weights is None else [float(weight) for weight in weights]

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        """The loss of the joint batch, a scalar.

        Raises:
            ValueError: a width beyond that of the dense vectors, and whatever the inner loss raises.
        """
        width = batch.queries.dense.shape[1]
        if max(self.dims) > width:
            raise ValueError(f"Matryoshka dim {max(self.dims)} is wider than the dense vectors, {width}: take it away")
        losses = [weight * self.loss(_cut(batch, dim)) for weight, dim in zip(self.weights, self.dims)]
        return torch.stack(losses).sum()


def _cut(batch: ContrastiveBatch, dim: int) -> ContrastiveBatch:
    def unit(vectors: Tensor | None) -> Tensor | None:
        return None if vectors is None else F.normalize(vectors[:, :dim], dim=-1)

    return replace(
        batch,
        queries=replace(batch.queries, dense=unit(batch.queries.dense)),
        documents=replace(batch.documents, dense=unit(batch.documents.dense)),
        teacher_queries=unit(batch.teacher_queries),
        teacher_documents=unit(batch.teacher_documents),
    )
