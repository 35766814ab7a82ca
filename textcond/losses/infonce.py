"""InfoNCE (van den Oord et al., 2018): pick the positive among in-batch and explicit negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def info_nce(
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    false_negatives: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of each anchor's own candidate (same row) against all candidates.

    Args:
        anchors: `(batch, dim)`, normalised by the caller where cosine similarity is meant.
        candidates: `(batch + extra, dim)`; row `i < batch` is the positive of anchor `i`, the rest are negatives.
        temperature: divides the similarities; a tensor lets it be learned.
        false_negatives: bool `(batch, batch + extra)`, True where a candidate is also right for the anchor and must
            not be pushed away. The positive itself is never masked.

    Raises:
        ValueError: fewer candidates than anchors, widths that differ, or a mask of another shape.
    """
    batch, total = anchors.shape[0], candidates.shape[0]
    if total < batch or anchors.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"anchors {tuple(anchors.shape)} need as many or more candidates, got {tuple(candidates.shape)}"
        )
    scores = anchors @ candidates.T / temperature
    if false_negatives is not None:
        if false_negatives.shape != scores.shape:
            raise ValueError(f"the mask is {tuple(false_negatives.shape)}, the scores are {tuple(scores.shape)}")
        own = torch.eye(batch, total, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(false_negatives & ~own, float("-inf"))
    return F.cross_entropy(scores, torch.arange(batch, device=scores.device))
