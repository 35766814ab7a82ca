"""Losses between the conditioning of the student and the teacher's, without the denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from textcond.losses import info_nce
from textcond.pipelines.families import Conditioning


@dataclass
class Statistics:
    """Mean over prompts and mean variance of one tensor of the teacher's conditioning.

    The unit of every loss here is a share of that variance: 1 is what the same answer to every prompt would score.
    """

    mean: Tensor
    variance: float

    @classmethod
    def of(cls, states: Tensor) -> Statistics:
        """Of states `(prompts, ...)`."""
        states = states.double()
        mean = states.mean(0)
        return cls(mean.float(), float((states - mean).square().mean().clamp_min(1e-12)))


def statistics(conditioning: Conditioning) -> dict[str, Statistics]:
    """Statistics of every tensor that is not a mask."""
    return {name: Statistics.of(states) for name, states in conditioning.items() if states.is_floating_point()}


def regression(student: Conditioning, teacher: Conditioning, known: dict[str, Statistics]) -> Tensor:
    """Squared distance of every token and pooled vector, as a share of the teacher's variance, `(prompts,)`.

    Each tensor counts alike. Where the two have different numbers of tokens, their means over tokens are compared.
    """
    total = 0
    for name, facts in known.items():
        ours, theirs, variance = student[name].float(), teacher[name], facts.variance
        if ours.shape != theirs.shape:
            ours, theirs = ours.mean(1), theirs.mean(1)
            variance = variance / teacher[name].shape[1]
        total = total + (ours - theirs).square().flatten(1).mean(1) / variance
    return total / len(known)


def contrast(
    student: Conditioning,
    teacher: Conditioning,
    known: dict[str, Statistics],
    texts: Tensor,
    accelerator: Accelerator,
    temperature: float = 0.05,
) -> Tensor:
    """InfoNCE between the student's and the teacher's summaries of the joint batch of all processes.

    A summary is the pooled vector where there is one, else the mean over tokens, centred and of unit length. Every
    process gives the loss of the whole batch with a gradient to its own rows, times the number of processes: the mean
    of the gradients over processes is that of the loss.

    Args:
        texts: `(prompts,)` int64, which of the teacher's texts a row says: others that say the same are no negatives.
    """
    name = min(known, key=lambda name: known[name].mean.ndim)
    facts = known[name]
    ours, theirs = _summary(student[name].float(), facts), _summary(teacher[name], facts)
    if accelerator.num_processes > 1:
        everyone = accelerator.gather(ours.detach())
        start = accelerator.process_index * len(ours)
        ours = torch.cat([everyone[:start], ours, everyone[start + len(ours) :]])
        theirs, texts = accelerator.gather(theirs), accelerator.gather(texts)
    rows = torch.arange(len(ours), device=ours.device)
    same = texts[:, None] == texts
    logits = ours @ theirs.T / temperature
    loss = info_nce(logits, rows, excluded=same) + info_nce(logits.T, rows, excluded=same)
    return loss / 2 * accelerator.num_processes


def _summary(states: Tensor, facts: Statistics) -> Tensor:
    states, mean = (states, facts.mean) if states.ndim == 2 else (states.mean(1), facts.mean.mean(0))
    return F.normalize(states - mean.to(states.device), dim=-1)
