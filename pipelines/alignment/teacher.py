"""What the teacher, the pipeline's own encoder, gives of each text: computed once, kept on disk, memory-mapped."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from textcond.pipelines.contracts import slots_of
from textcond.pipelines.families import Conditioning, condition

BATCH = 64


class TeacherStates:
    """The conditioning of a list of texts, `states([3, 1])` -> `(2, ...)` float32 a tensor.

    Each text is encoded when it is first asked for, and written in float16; texts beyond `limit` bytes are encoded
    anew each time.

    Args:
        folder: of the cache, for these texts and this teacher alone: see `fingerprint`.
        limit: bytes of disk that it may take.

    Raises:
        ValueError: the disk has less room than the cache will need, or a state does not fit float16.
    """

    def __init__(self, pipe: DiffusionPipeline, texts: Sequence[str], folder: Path, limit: float):
        self.pipe, self.texts = pipe, texts
        with torch.no_grad():
            empty = condition(pipe, [""])
        self.empty = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in empty.items()}
        row = sum(tensor[0].numel() * (2 if tensor.is_floating_point() else 1) for tensor in self.empty.values())
        self.kept = min(len(texts), int(limit // row))
        folder.mkdir(parents=True, exist_ok=True)
        self.arrays = {
            name: _array(folder / f"{name}.npy", (self.kept, *tensor.shape[1:]), _kind(tensor))
            for name, tensor in self.empty.items()
        }
        self.done = _array(folder / "done.npy", (self.kept,), np.bool_)
        missing = row * int(self.kept - np.count_nonzero(self.done))
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise ValueError(
                f"the teacher's states of {self.kept:,} prompts need {missing / 1e9:.1f} GB and {folder} has "
                f"{free / 1e9:.1f} GB free: lower cache_limit, or give fewer prompts"
            )

    def __call__(self, indices: Sequence[int]) -> Conditioning:
        """The conditioning of the texts at `indices`, on the pipeline's device."""
        missing = sorted({index for index in indices if index >= self.kept or not self.done[index]})
        beyond: dict[int, dict[str, Tensor]] = {}
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            with torch.no_grad():
                states = condition(self.pipe, [self.texts[index] for index in batch])
            for place, index in enumerate(batch):
                row = {name: tensor[place].cpu() for name, tensor in states.items()}
                if index < self.kept:
                    self._keep(index, row)
                else:
                    beyond[index] = row
        # A text's first reading is rounded like every later one, so that a resumed run sees the same.
        return {
            name: torch.stack(
                [
                    torch.from_numpy(self.arrays[name][index]) if index < self.kept else beyond[index][name]
                    for index in indices
                ]
            ).to(empty.device, torch.float32 if empty.is_floating_point() else empty.dtype)
            for name, empty in self.empty.items()
        }

    def _keep(self, index: int, states: dict[str, Tensor]) -> None:
        for name, tensor in states.items():
            value = tensor.to(torch.float16) if tensor.is_floating_point() else tensor.to(torch.int8)
            if not torch.isfinite(value.float()).all():
                raise ValueError(
                    f"the teacher's {name} of {self.texts[index]!r:.80} does not fit float16: pass cache_limit=0"
                )
            self.arrays[name][index] = value.numpy()
        # Last, so that a kill leaves no row that is only said to be there.
        self.done[index] = True


def fingerprint(pipe: DiffusionPipeline, texts: Sequence[str]) -> str:
    """A hash of the teacher's weights and of the texts."""
    digest = hashlib.sha256()
    for slot in slots_of(pipe):
        if (encoder := getattr(pipe, slot, None)) is not None:
            digest.update(weights_hash(encoder).encode())
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def weights_hash(module: nn.Module, most: int | None = None) -> str:
    """A hash of every name and value of a module's state, or of about `most` values of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        values = tensor.detach().flatten()
        values = values[:: max(1, len(values) // most)] if most else values
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _kind(tensor: Tensor) -> type:
    return np.float16 if tensor.is_floating_point() else np.int8


def _array(file: Path, shape: tuple[int, ...], kind: type) -> np.ndarray:
    """A memory-mapped array of zeros, or the one of this shape that is there."""
    if not file.is_file() or np.load(file, mmap_mode="r").shape != shape:
        partial = file.with_name(file.name + ".partial")
        if 0 in shape:
            np.save(file, np.zeros(shape, kind))
            return np.zeros(shape, kind)
        np.lib.format.open_memmap(partial, mode="w+", dtype=kind, shape=shape).flush()
        partial.replace(file)
    return np.load(file, mmap_mode="r+") if 0 not in shape else np.zeros(shape, kind)
