"""Trajectories: what a pipeline asks of its denoiser while it samples, to be asked again under another text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .families import Conditioning, denoiser_of

# Positions of Flux's tokens: the same for every row, whatever their number.
UNBATCHED = ("img_ids", "txt_ids")


@dataclass
class Visit:
    """One call of the denoiser along a trajectory.

    Attributes:
        inputs: arguments of the call by name, `(n, ...)` each, those of the text included.
        timestep: of the call, from the scheduler's last to its first.
        output: what the denoiser gave, `(n, ...)`, in its own parametrisation (noise, velocity or flow).
        unconditional: what it gave for the empty or negative prompt; None where the pipeline does not ask.
    """

    inputs: dict[str, Any]
    timestep: float
    output: Tensor
    unconditional: Tensor | None


@torch.no_grad()
def follow(pipe: DiffusionPipeline, prompts: Sequence[str], **options: Any) -> list[Visit]:
    """Sample with the unmodified pipeline and record every call of its denoiser.

    Args:
        options: of the pipeline's call: `num_inference_steps`, `guidance_scale`, `generator` ...
    """
    denoiser, prompts, visits = denoiser_of(pipe), list(prompts), []
    signature = inspect.signature(type(denoiser).forward)

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = dict(signature.bind(module, *args, **kwargs).arguments)
        given.pop("self")
        made = output[0] if isinstance(output, tuple) else output.sample
        total, count = len(made), len(prompts)
        # Guidance puts the unconditional rows before the conditional ones.
        inputs = {
            name: value if name in UNBATCHED else _rows(value, total, count)
            for name, value in given.items()
            if name != "return_dict"
        }
        timestep = given.get("timestep", given.get("timesteps"))
        visits.append(
            Visit(inputs, float(torch.as_tensor(timestep).flatten()[-1]), made[-count:],
                  made[:count] if total == 2 * count else None)
        )  # fmt: skip

    hook = denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        pipe(prompt=prompts, output_type="latent", **options)
    finally:
        hook.remove()
    return visits


def replay(denoiser: nn.Module, visit: Visit, conditioning: Conditioning, rows: Tensor | None = None) -> Tensor:
    """Ask the denoiser what it was asked at a visit, under another text; gradients flow into the conditioning.

    Args:
        rows: which of the visit's rows to take, `(m,)`; the conditioning has m rows then.
    """
    count = len(visit.output)
    inputs = {
        name: value if rows is None or name in UNBATCHED else _pick(value, rows, count)
        for name, value in visit.inputs.items()
    }
    inputs = {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}
    for name, value in conditioning.items():
        place, _, entry = name.partition(".")
        holder, key = (inputs[place], entry) if entry else (inputs, place)
        # A student's weights are float32, whatever the denoiser's are.
        holder[key] = value.to(holder[key].dtype) if isinstance(holder.get(key), Tensor) else value
    if "txt_ids" in inputs:
        # All tokens of the text stand at one position, and there may be another number of them now.
        inputs["txt_ids"] = inputs["txt_ids"][:1].expand(inputs["encoder_hidden_states"].shape[1], -1)
    return denoiser(**inputs, return_dict=False)[0]


def _rows(value: Any, total: int, count: int) -> Any:
    """The last `count` rows of everything that has `total`."""
    if isinstance(value, dict):
        return {name: _rows(item, total, count) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rows(item, total, count) for item in value]
    if isinstance(value, Tensor) and value.ndim and len(value) == total:
        return value[-count:].clone()
    return value


def _pick(value: Any, rows: Tensor, count: int) -> Any:
    if isinstance(value, dict):
        return {name: _pick(item, rows, count) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pick(item, rows, count) for item in value]
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
