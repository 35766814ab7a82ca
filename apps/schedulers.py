"""Samplers by name: a run may use another one than the pipeline came with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
# How web UIs call them in the `parameters` text of a picture.
_WEB_UI = {
    "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "Heun": "HeunDiscreteScheduler",
    "LMS": "LMSDiscreteScheduler",
    "UniPC": "UniPCMultistepScheduler",
}


def known_scheduler(name: str | None) -> str | None:
    """The one of `SCHEDULERS` that a name means, which may be a web UI's, without its noise schedule; None for none."""
    short = (name or "").removesuffix(" Karras")
    return next((one for one in (short, f"{short}Scheduler", _WEB_UI.get(short)) if one in SCHEDULERS), None)


def scheduler_class(pipe: DiffusionPipeline, name: str) -> type:
    """The sampler class of that name, which may be diffusers' (with or without "Scheduler") or a web UI's.

    Raises:
        ValueError: there is none, or the pipeline cannot use it.
    """
    own = type(pipe.scheduler)
    usable = {one.__name__: one for one in [own, *pipe.scheduler.compatibles]}
    short = name.removesuffix(" Karras")
    for candidate in (short, f"{short}Scheduler", _WEB_UI.get(short, "")):
        if candidate in usable:
            return usable[candidate]
    choices = [one for one in (own.__name__, *SCHEDULERS) if one in usable]
    raise ValueError(f"scheduler {name!r} cannot drive this pipeline: pass one of {', '.join(dict.fromkeys(choices))}")


@contextlib.contextmanager
def scheduled(pipe: DiffusionPipeline, name: str | None) -> Iterator[None]:
    """`pipe` with the sampler of that name for the length of a `with` block; None leaves its own."""
    own = pipe.scheduler
    if name is not None and (chosen := scheduler_class(pipe, name)) is not type(own):
        pipe.scheduler = chosen.from_config(own.config)
    try:
        yield
    finally:
        pipe.scheduler = own
