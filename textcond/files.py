"""Checkpoint files: safetensors and JSON, renamed into place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .folders import write_json


def write_mark(path: Path, content: Any) -> None:
    """Write JSON to a temporary file beside `path`, then rename."""
    partial = path.with_name(path.name + ".partial")
    write_json(partial, content)
    os.replace(partial, path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write safetensors to a temporary file beside `path`, then rename."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    partial.chmod(0o644)  # safetensors makes private files, and these are shipped
    os.replace(partial, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read safetensors; a ValueError names the file when it is truncated or not safetensors."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): remove it and make it again") from error


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The floating-point tensors in float16, the others as they are: what is shipped."""
    return {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
