"""Rounds of the denoiser loss: the teacher samples, and the student is asked at the latents that it visited."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from textcond.pipelines.families import Conditioning, condition, denoiser_of, family_of
from textcond.pipelines.trajectories import Visit, follow, replay

SIZE = ("height", "width")


@torch.no_grad()
def visited(
    pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], empty: Conditioning, **options: Any
) -> list[Visit]:
    """The teacher's own trajectories of some prompts, each from its seed, with the answers to the empty prompt."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    accepted = inspect.signature(pipe.__call__).parameters
    if "negative_prompt" in accepted:
        # Left out, SDXL would take zeros instead of the empty prompt's states.
        options.setdefault("negative_prompt", [""] * len(prompts))
    if starts_from_a_picture(pipe):
        options |= {"image": _blank(pipe, len(prompts), options), "strength": 1.0}
        options = {name: value for name, value in options.items() if name in accepted or name not in SIZE}
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
    return not needed or starts_from_a_picture(pipe)


def starts_from_a_picture(pipe: DiffusionPipeline) -> bool:
    """Whether it is an image-to-image pipeline; `SIZE` in its options is that of the picture."""
    accepted = inspect.signature(pipe.__call__).parameters
    return "image" in accepted and "strength" in accepted and not {"mask_image", "control_image"} & accepted.keys()


def _blank(pipe: DiffusionPipeline, count: int, options: Mapping[str, Any]) -> Tensor:
    """Gray pictures `(count, 3, height, width)`, of the size that the denoiser was trained for unless told."""
    side = (denoiser_of(pipe).config.get("sample_size") or pipe.default_sample_size) * pipe.vae_scale_factor
    return torch.full((count, 3, *(options.get(name, side) for name in SIZE)), 0.5)


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
