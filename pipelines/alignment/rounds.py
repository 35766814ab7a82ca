"""Rounds of the denoiser loss: the teacher samples, and the student is asked at the latents that it visited."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from textcond.pipelines.families import Conditioning, condition, denoiser_of, family_of
from textcond.pipelines.trajectories import Visit, follow, replay


@dataclass
class Question:
    """What the student is asked: calls of the denoiser, with the teacher's answers.

    Attributes:
        visit: the calls, one a row, each at a timestep of its own.
        answer: what the denoiser gives under the teacher's text, `(rows, ...)`.
        effect: mean squared difference of that from the answer to the empty prompt, at each row's timestep, `(rows,)`.
    """

    visit: Visit
    answer: Tensor
    effect: Tensor


@torch.no_grad()
def visited(
    pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], empty: Conditioning, **options: Any
) -> list[Visit]:
    """The teacher's own trajectories of some prompts, each from its seed, with the answers to the empty prompt."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if "negative_prompt" in inspect.signature(pipe.__call__).parameters:
        # Left out, SDXL would take zeros instead of the empty prompt's states.
        options.setdefault("negative_prompt", [""] * len(prompts))
    if _starts_from_a_picture(pipe):
        options = {"image": _blank(pipe, len(prompts)), "strength": 1.0} | options
    visits, even = follow(pipe, prompts, generator=generators, **options), family_of(pipe).even
    said = None if even else condition(pipe, prompts)
    for visit in visits:
        if said is not None:
            visit.output = replay(denoiser_of(pipe), visit, said)
        if visit.unconditional is None or not even:
            visit.unconditional = replay(denoiser_of(pipe), visit, _repeat(empty, len(prompts)))
    return visits


def samples_alone(pipe: DiffusionPipeline) -> bool:
    """Whether prompts are enough to sample with a pipeline, besides a blank picture that noise covers whole."""
    needed = inspect.signature(pipe.__call__).parameters.keys() & {"image", "mask_image", "control_image"}
    return not needed or _starts_from_a_picture(pipe)


def _starts_from_a_picture(pipe: DiffusionPipeline) -> bool:
    accepted = inspect.signature(pipe.__call__).parameters
    return "image" in accepted and "strength" in accepted and not {"mask_image", "control_image"} & accepted.keys()


def _blank(pipe: DiffusionPipeline, count: int) -> Tensor:
    """Gray pictures of the size that the denoiser was trained for, `(count, 3, height, width)`."""
    side = (denoiser_of(pipe).config.get("sample_size") or pipe.default_sample_size) * pipe.vae_scale_factor
    return torch.full((count, 3, side, side), 0.5)


def effects(visits: Sequence[Visit]) -> Tensor:
    """How much the text changes the denoiser's output, mean square at each visit, `(visits,)`."""
    return torch.stack([(visit.output - visit.unconditional).float().square().mean() for visit in visits])


def mixed(visits: Sequence[Visit], choice: np.ndarray) -> Visit:
    """One visit that takes row i from `visits[choice[i]]`: several timesteps in one batch."""
    rows = range(len(choice))

    def mix(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {name: mix([value[name] for value in values]) for name in first}
        if not isinstance(first, Tensor):
            return first
        if first.ndim == 0:
            return torch.stack([values[choice[row]] for row in rows])
        if len(first) == len(choice):
            return torch.stack([values[choice[row]][row] for row in rows])
        if len(first) == 1:
            return torch.cat([values[choice[row]] for row in rows])
        return first

    return Visit(
        {name: mix([visit.inputs[name] for visit in visits]) for name in visits[0].inputs},
        float("nan"),
        mix([visit.output for visit in visits]),
        mix([visit.unconditional for visit in visits]),
    )


def _repeat(conditioning: Conditioning, count: int) -> Conditioning:
    return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in conditioning.items()}
