"""BGE-M3's loss (Chen et al., 2024): three heads, their ensemble, and each head taught by the ensemble."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from textcond.features import ContrastiveBatch
from textcond.losses.infonce import info_nce
from textcond.losses.masks import MarginStrategy, check_margin, not_negatives
from textcond.similarity import similarity

SPARSE_SCORE_WEIGHT = 0.3
SPARSE_LOSS_WEIGHT = 0.1


class M3SelfDistillation(nn.Module):
    """InfoNCE on dense, sparse, multi-vector and ensemble scores, with self-knowledge distillation.

    With `ensemble = dense + 0.3 sparse + tokens`, the contrastive part is
    `(L(dense) + 0.1 L(sparse) + L(tokens) + L(ensemble)) / 4`, the self-distillation
    `(L'(dense) + 0.1 L'(sparse) + L'(tokens)) / 3` with `L'(s) = -sum softmax(ensemble) log softmax(s)` (no gradient
    into the ensemble), and the loss half their sum (Chen et al., 2024, section 3.3). All scores are divided
    by the temperature first. False negatives are left out of every softmax.

    Args:
        temperature: 0.02 in BGE-M3.
        self_distillation: False for the contrastive part alone.
        in_batch: False for a query's own documents alone.
        margin: leave out negatives that the guide model takes for right; see `InfoNCE`.
        margin_strategy: "absolute" or "relative".

    Raises:
        ValueError: a temperature that is not positive, or a margin below 0.

    Example:
        >>> from textcond.features import Features
        >>> rows, ones = torch.arange(4), torch.ones(4, 1)
        >>> texts = Features(torch.eye(4), rows[:, None], ones.bool(), ones, torch.eye(4)[:, None])
        >>> batch = ContrastiveBatch(texts, texts, rows, rows, rows + 1, rows + 11, rows[:, None] + 11)
        >>> M3SelfDistillation()(batch).item() < 1e-6
        True
    """

    def __init__(
        self,
        temperature: float = 0.02,
        *,
        self_distillation: bool = True,
        in_batch: bool = True,
        margin: float | None = None,
        margin_strategy: MarginStrategy = "absolute",
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature {temperature} must be positive")
        check_margin(margin, margin_strategy)
        self.temperature, self.self_distillation, self.in_batch = temperature, self_distillation, in_batch
        self.margin, self.margin_strategy = margin, margin_strategy

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        """The loss of the joint batch, a scalar.

        Raises:
            ValueError: features without sparse weights or multi-vectors, or a margin without guide vectors.
        """
        excluded = not_negatives(
            batch,
            "query_to_document",
            in_batch=self.in_batch,
            margin=self.margin,
            margin_strategy=self.margin_strategy,
        )
        dense, sparse, tokens = (
            similarity(batch.queries, batch.documents, kind) / self.temperature
            for kind in ("dense", "sparse", "tokens")
        )
        ensemble = dense + SPARSE_SCORE_WEIGHT * sparse + tokens
        heads = [(1.0, dense), (SPARSE_LOSS_WEIGHT, sparse), (1.0, tokens)]
        contrastive = [
            weight * info_nce(logits, batch.positives, excluded=excluded)
            for weight, logits in [*heads, (1.0, ensemble)]
        ]
        loss = torch.stack(contrastive).sum() / 4
        if not self.self_distillation:
            return loss
        target = ensemble.detach().masked_fill(excluded, float("-inf")).softmax(1)
        taught = [weight * _cross_entropy(logits, target, excluded) for weight, logits in heads]
        return (loss + torch.stack(taught).sum() / 3) / 2


def _cross_entropy(logits: Tensor, target: Tensor, excluded: Tensor) -> Tensor:
    # what is left out has probability 0 and log-probability -inf, whose product would be NaN
    log_probabilities = logits.masked_fill(excluded, float("-inf")).log_softmax(1).masked_fill(excluded, 0)
    return -(target * log_probabilities).sum(1).mean()
