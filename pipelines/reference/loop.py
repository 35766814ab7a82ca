"""One training loop for every stage: seeded by step, checkpointed by the clock, resumed by the same command."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from textcond.files import read_tensors, write_mark, write_tensors
from textcond.folders import read_json

from .optimizers import MuonAdamW


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator of one step. Batches depend on (seed, step) alone, so a resumed run needs no sampler state."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def share(accelerator: Accelerator, batch: int) -> slice:
    """This process's slice of a global batch; every process draws the whole batch's randomness and keeps its share.

    Raises:
        ValueError: the batch does not divide among the processes.
    """
    if batch % accelerator.num_processes:
        raise ValueError(f"batch size {batch} does not divide among {accelerator.num_processes} processes")
    size = batch // accelerator.num_processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


def warmup_stable_decay(step: int, steps: int, warmup: int, decay: float) -> float:
    """Learning-rate factor: linear warm-up, plateau, then linear decay to zero over the last `decay` share of steps.

    The schedule of MiniCPM (Hu et al., 2024): a run can be lengthened from any checkpoint of its plateau.
    """
    if step < warmup:
        return (step + 1) / warmup
    remaining = (steps - step) / max(1, steps * decay)
    return min(1.0, remaining)


class Ema:
    """Exponential moving average of a module's weights, with the warm-up of the averaged rate used by k-diffusion."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the weights that `module` has after `step` steps."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        values = module.state_dict()
        floating = [name for name, value in self.shadow.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.shadow[name] for name in floating], [values[name] for name in floating], rate)
        for name in self.shadow.keys() - set(floating):
            self.shadow[name].copy_(values[name])


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[nn.Module, int], tuple[torch.Tensor, dict[str, float]]],
    *,
    out: Path,
    steps: int,
    batch: int,
    learning_rate: float,
    accelerator: Accelerator,
    adam_rate: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: int = 50,
    decay: float = 0.2,
    ema: float | None = None,
    save_every: float = 180.0,
) -> dict[str, torch.Tensor]:
    """Train `module` for `steps` steps with Muon and AdamW and return the final (averaged when `ema`) weights.

    Args:
        loss: `(module as prepared by accelerate, step) -> (loss of this process's share, figures to show)`.
        out: folder of the stage; `out/checkpoint` holds weights, optimizer state and step, written every
            `save_every` seconds, at Ctrl-C and at the end. The same call resumes from it.
    """
    # Preparing may move the weights; the optimizer's views must be of where they end up.
    prepared = accelerator.prepare(module)
    optimizer = MuonAdamW(module, learning_rate, adam_rate, weight_decay)
    average = Ema(module, ema) if ema else None
    checkpoint = out / "checkpoint"
    step = _resume(checkpoint, module, optimizer, average)
    prepared.train()
    log = out / "log.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    saved_at, shown, since = time.monotonic(), {}, 0
    # A polite kill is an interruption like Ctrl-C: the state of the last whole step is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    bar = tqdm(
        total=steps, initial=step, desc=name, unit="step", disable=not accelerator.is_main_process, mininterval=5
    )
    try:
        while step < steps:
            optimizer.set_rate(warmup_stable_decay(step, steps, warmup, decay))
            value, figures = loss(prepared, step)
            accelerator.backward(value)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            since += 1
            if average:
                average.update(accelerator.unwrap_model(prepared), step)
            for key, figure in {"loss": value.item(), **figures}.items():
                if not math.isfinite(figure):
                    raise RuntimeError(f"{name}: {key} became {figure} at step {step}")
                shown[key] = shown.get(key, figure) * 0.98 + figure * 0.02
            bar.update()
            if step % 20 == 0:
                bar.set_postfix({key: f"{figure:.4f}" for key, figure in shown.items()}, refresh=False)
            if step % 100 == 0 and accelerator.is_main_process:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "samples": step * batch, "time": time.time(), **shown}) + "\n")
            if time.monotonic() - saved_at > save_every and accelerator.is_main_process:
                _save(checkpoint, accelerator.unwrap_model(prepared), optimizer, average, step)
                saved_at = time.monotonic()
    finally:
        bar.close()
        if since and accelerator.is_main_process:
            _save(checkpoint, accelerator.unwrap_model(prepared), optimizer, average, step)
    bare = accelerator.unwrap_model(prepared)
    accelerator.wait_for_everyone()
    return average.shadow if average else {key: value.detach() for key, value in bare.state_dict().items()}


def _save(folder: Path, module: nn.Module, optimizer: MuonAdamW, average: Ema | None, step: int) -> None:
    """Write one safetensors file, then the step that names it: a kill between the two leaves the older pair whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"module.{key}": value for key, value in module.state_dict().items()}
    tensors |= {f"optimizer.{key}": value for key, value in optimizer.tensors().items()}
    if average:
        tensors |= {f"average.{key}": value for key, value in average.shadow.items()}
    file = f"state-{step}.safetensors"
    # Averaged and own weights can be the same storage right after loading; safetensors wants them apart.
    write_tensors(folder / file, {key: value.clone() for key, value in tensors.items()})
    write_mark(folder / "step.json", {"step": step, "file": file})
    for old in folder.glob("state-*.safetensors"):
        if old.name != file:
            old.unlink()


def _resume(folder: Path, module: nn.Module, optimizer: MuonAdamW, average: Ema | None) -> int:
    if not (folder / "step.json").is_file():
        return 0
    mark = read_json(folder / "step.json")
    tensors = read_tensors(folder / mark["file"])
    module.load_state_dict({key[7:]: value for key, value in tensors.items() if key.startswith("module.")})
    if average:
        average.shadow = {key[8:]: value for key, value in tensors.items() if key.startswith("average.")}
    optimizer.load_tensors({key[10:]: value for key, value in tensors.items() if key.startswith("optimizer.")})
    return mark["step"]
