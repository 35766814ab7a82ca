"""How well a pipeline draws under a text encoder that is being fine-tuned: aligned briefly, anew each time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from textcond import TextEncoder

from .alignment import AlignmentOptions, read_prompts
from .alignment.align import Aligner


def generation_score(
    pipe: DiffusionPipeline,
    prompts: str | os.PathLike | Iterable[str],
    held_out: str | os.PathLike | Iterable[str] | None = None,
    **options: Any,
) -> Callable[[TextEncoder], dict[str, float]]:
    """A function that scores a text encoder as what conditions a pipeline, for `textcond.training.train`.

    The encoder gets a new bridge from the same seed, is aligned for a few steps, and asked about the held-out prompts.
    The score of a prompt is 1 less the share of the empty prompt's distance to the teacher that is left: 1 is the
    teacher, 0 is as if nothing had been said. What a contrastive loss gains in retrieval can be lost here: it sees the
    pooled vector only, the denoiser reads every token.

    Args:
        prompts: what it is aligned on; see `read_prompts`.
        held_out: what it is scored on; None keeps some of `prompts` out for that.
        options: of AlignmentOptions; by default 150 steps of the token loss alone.
    """
    chosen = AlignmentOptions(**{"token_steps": 150, "denoiser_steps": 0, "validate_every": 1_000_000, **options})
    training = read_prompts(prompts)
    if held_out is None:
        training, kept_out = training.split(min(chosen.held_out, len(training.teacher) // 2))
    else:
        kept_out = read_prompts(held_out)
        training = training.without(kept_out.teacher)

    def score(encoder: TextEncoder) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            aligner = Aligner(pipe, encoder, training, kept_out, Path(folder), chosen)
            aligner.run()
            return {text: 1 - share for text, share in zip(kept_out.teacher, aligner.held_out_shares())}

    return score
