"""One training loop: seeded by step, checkpointed by the clock, resumed by the same command."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import nn
from tqdm import tqdm

from textcond.files import read_tensors, write_mark, write_tensors
from textcond.folders import read_json
from textcond.precision import bfloat16

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


@dataclass
class Validation:
    """When a run is scored, by its averaged weights if there are any, and when it ends for want of progress.

    Attributes:
        score: `step -> score`, lower is better, of the module as it is then; every process calls it alike.
        every: steps between scores; the last step is always scored.
        patience: scores in a row without a better one that end the run; None for never.
        first: score the weights that the run starts from, too: what it returns is then never worse than they are.
    """

    score: Callable[[int], float]
    every: int
    patience: int | None = None
    first: bool = False


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
    validation: Validation | None = None,
    bf16: bool = False,
    dropout: bool = True,
) -> dict[str, torch.Tensor]:
    """Train `module` for `steps` steps with Muon and AdamW and return its weights: averaged when `ema`, and the best.

    Args:
        loss: `(module, step) -> (loss of this process's share, figures to show)`; gradients are averaged over
            processes.
        out: folder of the stage; `out/checkpoint` holds weights, optimizer state and step, written every
            `save_every` seconds, at Ctrl-C and at the end. The same call resumes from it.
        bf16: give `loss` the module with a forward in bfloat16; weights and outputs stay float32.
        dropout: False leaves it out, by evaluation mode. A student that hardly reads a text twice needs none: it is
            noise on what is to be met, and with it attention takes its slow path.

    Raises:
        RuntimeError: a figure that is not finite, before it reaches the weights; it names the figure and the step.
    """
    module.to(accelerator.device)
    # Neither accelerate's precision, which is one for the whole process, nor its wrapper for distributed training: the
    # loss may reach the weights without the module's forward.
    prepared = _InBfloat16(module, accelerator.device) if bf16 else module
    optimizer = MuonAdamW(module, learning_rate, adam_rate, weight_decay)
    state = _State(module, optimizer, Ema(module, ema) if ema else None)
    checkpoint = out / "checkpoint"
    state.resume(checkpoint)
    if validation and validation.first and state.step == 0:
        state.validate(validation)
    prepared.train(dropout)
    log = out / "log.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    saved_at, shown, since = time.monotonic(), {}, 0
    bar = tqdm(
        total=steps, initial=state.step, desc=name, unit="step", disable=not accelerator.is_main_process, mininterval=5
    )
    try:
        with _Interruptions() as interruptions:
            while True:
                step = state.step
                if validation and state.validated < step and (step % validation.every == 0 or step == steps):
                    shown["held_out"] = state.validate(validation)
                    prepared.train(dropout)
                if step == steps or (validation and state.stale == validation.patience):
                    break
                optimizer.set_rate(warmup_stable_decay(step, steps, warmup, decay))
                value, figures = loss(prepared, step)
                figures = {"loss": value.item(), **figures}
                for key, figure in figures.items():
                    _finite(name, key, figure, step)
                accelerator.backward(value)
                average_gradients(optimizer.parameters, accelerator)
                norm = accelerator.clip_grad_norm_(optimizer.parameters, 1.0)
                _finite(name, "gradient", norm.item(), step)
                with interruptions.held():
                    optimizer.step()
                    optimizer.zero_grad()
                    state.step = step = step + 1
                    since += 1
                    if state.average:
                        state.average.update(module, step)
                for key, figure in figures.items():
                    shown[key] = shown.get(key, figure) * 0.98 + figure * 0.02
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix({key: f"{figure:.4f}" for key, figure in shown.items()}, refresh=False)
                if step % 100 == 0 and accelerator.is_main_process:
                    row = {"step": step, "samples": step * batch, "time": time.time(), **shown}
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                if time.monotonic() - saved_at > save_every and accelerator.is_main_process:
                    state.save(checkpoint)
                    saved_at = time.monotonic()
    finally:
        bar.close()
        if since and accelerator.is_main_process:
            state.save(checkpoint)
    accelerator.wait_for_everyone()
    return state.result()


def result_of(out: Path) -> dict[str, torch.Tensor]:
    """What `fit` returned that ended in `out`: the best weights or, unscored, the averaged ones or its own."""
    checkpoint = out / "checkpoint"
    tensors = read_tensors(checkpoint / read_json(checkpoint / "step.json")["file"])
    (kind, *_) = [kind for kind in ("best.", "average.", "module.") if any(name.startswith(kind) for name in tensors)]
    return {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}


def _finite(name: str, key: str, figure: float, step: int) -> None:
    if not math.isfinite(figure):
        raise RuntimeError(
            f"{name}: {key} became {figure} at step {step + 1}: begin again, in another folder, with a lower learning "
            "rate"
        )


class _InBfloat16(nn.Module):
    def __init__(self, module: nn.Module, device: torch.device):
        super().__init__()
        self.module, self.device = module, device

    def forward(self, *args, **kwargs):
        with bfloat16(self.device):
            output = self.module(*args, **kwargs)
        return convert_to_fp32(output)


class _Interruptions:
    """Ctrl-C and a polite kill raise KeyboardInterrupt, except while held: then as soon as it ends.

    So a weight update is whole or not there, and the state of the last whole step is what is written.
    """

    def __init__(self):
        self._holding = self._asked = False

    def __enter__(self) -> _Interruptions:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        if not self._holding:
            raise KeyboardInterrupt
        self._asked = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no interruption in before the block ends."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._asked:
            raise KeyboardInterrupt


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Make every process's gradients their mean, in one message; nothing on a single process."""
    if accelerator.num_processes == 1:
        return
    filled = [parameter for parameter in parameters if parameter.grad is not None]
    flat = accelerator.reduce(torch.cat([parameter.grad.flatten() for parameter in filled]), "mean")
    for parameter, part in zip(filled, flat.split([parameter.numel() for parameter in filled])):
        parameter.grad.copy_(part.view_as(parameter))


class _State:
    """What a run consists of between two steps."""

    def __init__(self, module: nn.Module, optimizer: MuonAdamW, average: Ema | None):
        self.module, self.optimizer, self.average = module, optimizer, average
        self.step, self.stale, self.validated, self.best_score = 0, 0, 0, math.inf
        self.best: dict[str, torch.Tensor] | None = None

    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights, or the module's own."""
        return self.average.shadow if self.average else self.module.state_dict()

    def result(self) -> dict[str, torch.Tensor]:
        return {key: value.detach() for key, value in (self.best or self.weights()).items()}

    def validate(self, validation: Validation) -> float:
        """Score the averaged weights and remember the best."""
        own = {key: value.clone() for key, value in self.module.state_dict().items()}
        weights = {key: value.clone() for key, value in self.weights().items()}
        self.module.load_state_dict(weights)
        try:
            score = validation.score(self.step)
        finally:
            self.module.load_state_dict(own)
        if score < self.best_score:
            self.best_score, self.stale, self.best = score, 0, weights
        else:
            self.stale += 1
        self.validated = self.step
        return score

    def save(self, folder: Path) -> None:
        """Write one safetensors file, then the mark that names it: a kill in between leaves the older pair whole."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"module.{key}": value for key, value in self.module.state_dict().items()}
        tensors |= {f"optimizer.{key}": value for key, value in self.optimizer.tensors().items()}
        if self.average:
            tensors |= {f"average.{key}": value for key, value in self.average.shadow.items()}
        if self.best:
            tensors |= {f"best.{key}": value for key, value in self.best.items()}
        file = f"state-{self.step}.safetensors"
        # Averaged and own weights can be the same storage right after loading; safetensors wants them apart.
        write_tensors(folder / file, {key: value.clone() for key, value in tensors.items()})
        best = None if math.isinf(self.best_score) else self.best_score
        mark = {"step": self.step, "file": file, "best": best, "stale": self.stale, "validated": self.validated}
        write_mark(folder / "step.json", mark)
        for old in folder.glob("state-*.safetensors"):
            if old.name != file:
                old.unlink()

    def resume(self, folder: Path) -> None:
        """Read what `save` wrote, if it did."""
        if not (folder / "step.json").is_file():
            return
        mark = read_json(folder / "step.json")
        tensors = read_tensors(folder / mark["file"])

        def part(name: str) -> dict[str, torch.Tensor]:
            return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}

        self.module.load_state_dict(part("module"))
        if self.average:
            self.average.shadow = part("average")
        self.optimizer.load_tensors(part("optimizer"))
        self.step, self.stale, self.validated = mark["step"], mark.get("stale", 0), mark.get("validated", 0)
        if mark.get("best") is not None:
            self.best_score, self.best = mark["best"], part("best")
