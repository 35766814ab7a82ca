"""How far the denoiser's output under an encoder is from what it is under the teacher, along the teacher's way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from textcond.pipelines.families import condition, denoiser_of
from textcond.pipelines.family import Conditioning
from textcond.pipelines.trajectories import Visit, follow, replay

EMPTY = "the empty prompt"


@torch.no_grad()
def squared_distances(
    pipe: DiffusionPipeline,
    english: Sequence[str],
    conditionings: Mapping[str, Conditioning],
    *,
    denoisers: Mapping[str, nn.Module] | None = None,
    generators: Sequence[torch.Generator],
    steps: int,
    guidance: float,
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Sample under the pipeline's own encoder, and ask the denoiser each time what it says under others.

    Args:
        pipe: with its own encoder, the teacher, in place.
        english: n prompts that the teacher reads.
        conditionings: by name, what the denoiser reads of n texts under another encoder.
        denoisers: by those names, the denoiser with the encoder's connector; the pipeline's own where there is none.
        generators: one a prompt.

    Returns:
        The timesteps visited, and by name the mean squared differences to the teacher's output, `(n, timesteps)`;
        under `EMPTY` those of the empty prompt under the teacher.
    """
    visits = follow(
        pipe, english, num_inference_steps=steps, guidance_scale=guidance, generator=list(generators)
    )  # fmt: skip
    asked = {**conditionings, EMPTY: condition(pipe, [""] * len(english))}
    own, denoisers = denoiser_of(pipe), denoisers or {}
    found = {
        name: np.stack([_difference(replay(denoisers.get(name, own), visit, given), visit) for visit in visits], axis=1)
        for name, given in asked.items()
    }
    return [visit.timestep for visit in visits], found


def share(distances: np.ndarray, empty: np.ndarray) -> float:
    """Distances as a share of the empty prompt's, both summed first: 0 is the teacher, 1 as if nothing was said."""
    return float(distances.sum() / empty.sum())


def share_interval(
    distances: np.ndarray, empty: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95% bootstrap interval of `share`, for `(n,)` or `(n, timesteps)` each, over the n."""
    above, below = (values.reshape(len(values), -1).sum(axis=1) for values in (distances, empty))
    draws = np.random.default_rng(seed).integers(len(above), size=(resamples, len(above)))
    low, high = np.quantile(above[draws].sum(axis=1) / below[draws].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _difference(output: torch.Tensor, visit: Visit) -> np.ndarray:
    return (output.float() - visit.output.float()).square().flatten(1).mean(1).cpu().numpy()
