"""Controls: encoders and readings that an aligned encoder must beat, or cannot beat."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn

from textcond import ConditioningEncoder, TextEncoder
from textcond.pipelines.swap import make_encoder

from .cases import Case

ORIGINAL = "original"
# By name: what it shows.
CONTROLS = {
    ORIGINAL: "the pipeline's own encoder reading the English: the teacher",
    "untranslated": "the pipeline's own encoder reading the prompt in its own language",
    "raw": "the new backbone's states as they are, turned or zero-padded to the width",
    "random": "the new backbone under an untrained bridge",
    "closed_form": "the first encoder after step 0 of its alignment, the ridge regression",
    "tokens": "the first encoder after step 1 of its alignment, the losses between token states",
    "shuffled": "the pipeline's own encoder reading the English of another case",
}


def raw_encoder(pipe: DiffusionPipeline, encoder: TextEncoder, slot: str | None = None) -> ConditioningEncoder:
    """A backbone swapped in with nothing learned: its token states, zero-padded to the denoiser's width.

    States that are wider than the denoiser's tokens go through a fixed matrix with orthonormal rows.
    """
    made = make_encoder(pipe, encoder, slot=slot, bridge="linear")
    for bridge in (made.bridge, made.pooled_bridge):
        if bridge is not None:
            bridge.norm = nn.Identity()
            with torch.no_grad():
                bridge.out_proj.weight.copy_(isometry(*bridge.out_proj.weight.shape))
    return made


def random_encoder(
    pipe: DiffusionPipeline, encoder: TextEncoder, like: ConditioningEncoder | None = None, slot: str | None = None
) -> ConditioningEncoder:
    """A backbone under an untrained bridge of the kind that another encoder has; a resampler without one."""
    if like is None or like.config.bridge == "identity":  # a connector in the UNet stands for its bridge
        return make_encoder(pipe, encoder, slot=slot)
    options = {"bridge": like.config.bridge, "bridge_depth": like.config.bridge_depth, "layers": like.config.layers}
    if like.config.tokens:
        options["tokens"] = like.config.tokens
    if like.config.chunk:
        longest = like.tokenizer.model_max_length
        options |= {"chunk": like.config.chunk, "prompt_length": min(longest, encoder.max_length or longest)}
    return make_encoder(pipe, encoder, slot=slot, **options)


def isometry(rows: int, columns: int) -> torch.Tensor:
    """A fixed matrix `(rows, columns)` that keeps lengths: zero padding, or orthonormal rows where it must narrow."""
    if columns <= rows:
        return torch.eye(rows, columns)
    square = torch.randn(columns, rows, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(square).Q.T


def shuffled_texts(cases: Sequence[Case], seed: int = 0) -> list[str]:
    """For each case the English of a case about something else; subjects are passed round in one random cycle.

    Raises:
        ValueError: if all cases are about the same thing.
    """
    texts: dict[str, list[str]] = {}
    for case in cases:
        if case.english not in texts.setdefault(case.subject, []):
            texts[case.subject].append(case.english)
    if len(texts) < 2:
        raise ValueError("shuffled prompts need cases about at least two things: leave out the control shuffled")
    subjects = sorted(texts)
    random.Random(seed).shuffle(subjects)
    following = dict(zip(subjects, subjects[1:] + subjects[:1]))
    given = []
    for case in cases:
        others = texts[following[case.subject]]
        given.append(others[texts[case.subject].index(case.english) % len(others)])
    return given
