"""Earlier states of an aligned encoder, from what `align` keeps beside it: what each step of the alignment brought."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from textcond.files import read_tensors
from textcond.folders import model_folder, read_json
from textcond.pipelines.loop import result_of

STAGES = ("closed_form", "tokens")


def earlier_states(encoder: str | Path) -> dict[str, Path]:
    """Where it is kept what an alignment had trained at the end of its steps, by name in `STAGES`.

    The last step that it had is left out, which is the encoder itself; so are all where an adapter was merged, of which
    the steps trained nothing else.
    """
    folder = model_folder(encoder)
    if not (folder / "alignment.json").is_file() or read_json(folder / "alignment.json").get("lora_rank"):
        return {}
    found = {}
    closed_form = folder / "alignment" / "closed-form.safetensors"
    if closed_form.is_file():
        found["closed_form"] = closed_form
    for stage in ("tokens", "denoiser"):
        kept = folder / "alignment" / stage
        if (kept / "checkpoint").is_dir():
            found[stage] = kept
    return {stage: found[stage] for stage in list(found)[:-1]}


@torch.no_grad()
def set_state(kept: Path, encoder: nn.Module, connector: nn.Module | None = None) -> None:
    """Put one of `earlier_states` into the encoder that it is of and, if it has one, its connector.

    Raises:
        ValueError: naming what the encoder does not have.
    """
    parameters = dict(encoder.named_parameters())
    if connector is not None:
        parameters |= {f"connector.{name}": parameter for name, parameter in connector.named_parameters()}
    state = result_of(kept) if kept.is_dir() else read_tensors(kept)
    for name, tensor in state.items():
        name = name.replace("/", ".")
        if name.startswith("backbone.pooler."):
            continue  # of BERT: nothing reads it, so it is not saved
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            raise ValueError(f"{kept} is not of the encoder beside it, which has no such {name}: leave the control out")
        parameter.copy_(tensor)
