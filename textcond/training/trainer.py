"""Contrastive training of a text encoder, stage by stage: checkpointed, resumed exactly, the best kept."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from textcond.data import BatchSampler, Example, ExampleFile, as_example_file
from textcond.encoder import TextEncoder
from textcond.evaluation import GENERATION, Comparison, RetrievalTask, Scores, evaluate_retrieval
from textcond.files import read_tensors, remove_partials, write_mark, write_tensors
from textcond.folders import read_json
from textcond.losses import build_loss
from textcond.negatives import CrossEncoderTeacher, EncoderTeacher, MiningOptions, build_sources, mine_file

from .card import model_card
from .recipe import Data, Mining, Recipe, Stage, changes
from .step import TextBatch, backward

logger = logging.getLogger(__name__)

PROBED_ROWS = 100  # of each data set, for teacher scores


# How well a pipeline draws under an encoder: a score for each of some prompts, by its text; higher is better.
Generation = Callable[[TextEncoder], dict[str, float]]


def train(recipe: Recipe, out: str | Path, generation: Generation | None = None) -> Path:
    """Train by a recipe in a working folder, and return the encoder's folder, `out/encoder`.

    `out` holds `recipe.json`, `log.jsonl` and `checkpoint/`, with evaluation tasks the best encoder so far in it.
    The same call goes on from the checkpoint, on CPU to the same weights bit for bit; `save_every` and `tensorboard`
    may change. Under `accelerate launch` or `torchrun` every process calls it alike. Outside of the main thread, where
    Python hears no signals, nothing but a lost process interrupts it.

    Args:
        generation: scores the encoder as what conditions a pipeline, where `recipe.evaluation.generation` asks for it:
            `textcond.pipelines.generation_score` makes one.

    Raises:
        ValueError: if `out` was begun with another recipe or other data; it says what changed.
        FloatingPointError: if the loss or its gradient is not finite; it names the batch, the last checkpoint stays.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the state of the last whole step is on disk.
    """
    return Trainer(recipe, Path(out).expanduser(), generation).train()


class Trainer:
    """The state of a training; see `train`."""

    def __init__(self, recipe: Recipe, out: Path, generation: Generation | None = None):
        self.recipe, self.out, self.generation = recipe, out, generation
        if (generation is None) != (recipe.evaluation.generation is None):
            raise ValueError(
                "the recipe's evaluation.generation and the argument generation go together: give both or neither"
            )
        trackers = {"log_with": "tensorboard", "project_dir": out} if recipe.tensorboard else {}
        cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        self._joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.accelerator = Accelerator(cpu=cpu, **trackers)
        self._claim()
        if recipe.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        self.tasks = [RetrievalTask.load(task) for task in recipe.evaluation.tasks]
        torch.manual_seed(recipe.seed)  # new heads and adapters
        self.encoder = _load(recipe).to(self.accelerator.device)
        special = self.encoder.tokenizer.num_special_tokens_to_add()
        for stage in recipe.stages:
            if stage.max_length is not None and stage.max_length <= special:
                raise ValueError(
                    f"stage {stage.name!r}: max_length={stage.max_length} leaves no room for a text beside {special} "
                    "special tokens: raise it"
                )
        self.scores: dict[str, dict[str, Any]] = {}
        self.stage, self.step, self.best, self.stale = 0, 0, -math.inf, 0
        self.kept: str | None = None  # the best encoder so far, in checkpoint/
        self.interrupted = False
        self.short: set[int] = set()

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return self.out / "checkpoint"

    def train(self) -> Path:
        """Run what is left of the stages, and write the encoder with its card."""
        checkpoint = self._read_checkpoint()
        self._cut_log(0 if checkpoint is None else checkpoint[0]["log"])
        if self._evaluates and "base" not in self.scores:
            self._evaluate("base")
        with self._signals():
            while self.stage < len(self.recipe.stages):
                self._run_stage(self.recipe.stages[self.stage], checkpoint)
                checkpoint = None
                self.stage, self.step, self.stale = self.stage + 1, 0, 0
        final = self.out / "encoder"
        if self.accelerator.is_main_process:
            encoder = self._merged() if self.kept is None else TextEncoder.from_pretrained(self.folder / self.kept)
            encoder.save_pretrained(final)
            comparison = self._comparison()
            (final / "README.md").write_text(model_card(self.recipe, comparison), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if self._joined:  # the processes are the caller's, who has more for them to do
            for tracker in self.accelerator.trackers:
                tracker.finish()
        else:
            self.accelerator.end_training()
        return final

    def _run_stage(self, stage: Stage, checkpoint: tuple[dict[str, Any], dict[str, Tensor]] | None) -> None:
        datasets = self._datasets(stage)
        sampler = BatchSampler(
            datasets,
            weights=_weights(stage, datasets),
            batch_size=stage.batch_size,
            batch_tokens=stage.batch_tokens,
            length=partial(self._length, stage) if stage.batch_tokens else None,
            seed=self.recipe.seed + self.stage,
        )
        scored = _scored(datasets.values())
        templates = {name: data.prompt_template for name, data in zip(datasets, stage.data)}
        loss = build_loss(stage.loss).to(self.accelerator.device)
        teacher, guide = (_frozen(name, self.accelerator.device) for name in (stage.teacher, stage.guide))
        trained = self._trained(loss)
        optimizer = torch.optim.AdamW(_groups(trained, stage), lr=stage.learning_rate, fused=True)
        if checkpoint is not None:
            mark, tensors = checkpoint
            sampler.load_state_dict(mark["sampler"])
            _restore(trained, optimizer, tensors)
        saved_at = time.monotonic()
        name = stage.name or f"stage {self.stage}"
        main = self.accelerator.is_main_process
        bar = tqdm(total=stage.steps, initial=self.step, desc=name, unit="step", disable=not main, mininterval=2)
        with bar:
            while self.step < stage.steps and not self._patience_spent():
                self.encoder.train()
                source, rows = next(sampler)
                generator = torch.Generator().manual_seed(self._seed())
                batch = TextBatch.draw([datasets[source][row] for row in rows], stage.negatives, generator)
                batch.scored = scored
                batch.prompts = [
                    None if prompt is None else templates[source].replace("{prompt}", prompt)
                    for prompt in batch.prompts
                ]
                self._count_short(batch, stage.negatives, len(rows))
                torch.manual_seed(self._seed() + 1 + self.accelerator.process_index)  # dropout
                where = f"stage {self.stage} ({name}), step {self.step}, rows {rows} of {source}"
                try:
                    with self._configured(stage):
                        value = backward(
                            self.encoder,
                            loss,
                            batch,
                            self.accelerator,
                            mini_batch=stage.mini_batch,
                            teacher=teacher,
                            guide=guide,
                            bf16=self.recipe.mixed_precision == "bf16",
                        )
                except FloatingPointError as error:
                    raise FloatingPointError(f"{where}: {error}; lower the learning rate or mend the rows") from error
                norm = torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), stage.max_grad_norm)
                if not torch.isfinite(norm):
                    raise FloatingPointError(f"{where}: the gradient is {norm}; lower the learning rate")
                factor = schedule(self.step, stage)
                rate = stage.learning_rate * factor
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                optimizer.step()
                optimizer.zero_grad()
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
                self._log(loss=value, learning_rate=rate, data=source)
                every = self.recipe.evaluation.every
                better = False
                if self._evaluates and ((every and self.step % every == 0) or self.step == stage.steps):
                    better = self._evaluate(f"{name}, step {self.step}")
                interrupted = self._any_interrupted()
                due = time.monotonic() - saved_at > self.recipe.save_every
                last = self.step == stage.steps or self._patience_spent()
                if better or due or last or interrupted:
                    self._save_checkpoint(sampler, trained, optimizer)
                    saved_at = time.monotonic()
                if interrupted:
                    # a launcher ends the other processes when one has ended: not while the main one saves
                    self.accelerator.wait_for_everyone()
                    raise KeyboardInterrupt

    # -- data --------------------------------------------------------------------------------------------------------

    def _datasets(self, stage: Stage) -> dict[str, ExampleFile]:
        datasets = {}
        with self.accelerator.main_process_first():
            for data in stage.data:
                path = Path(data.path).expanduser()
                if str(path) in datasets:
                    raise ValueError(f"stage {stage.name!r} has the data {path} twice: raise its weight instead")
                if stage.mining is None:
                    datasets[str(path)] = as_example_file(
                        path, data.format, self.out / "data", on_error=data.on_error, **data.options
                    )
                else:
                    datasets[str(path)] = self._mined(stage.mining, data)
        return datasets

    def _mined(self, mining: Mining, data: Data) -> ExampleFile:
        """The data with negatives, mined once, when the stage begins."""
        digest = hashlib.sha256(f"{self.stage} {data.path}".encode()).hexdigest()[:12]
        path = self.out / "data" / f"mined-{self.stage}-{digest}.jsonl"
        if not path.is_file():
            score = None
            if mining.teacher:
                score = EncoderTeacher(TextEncoder.from_pretrained(mining.teacher, device=self.accelerator.device))
            elif mining.cross_encoder:
                score = CrossEncoderTeacher.from_pretrained(mining.cross_encoder)
            encoder = self._merged()
            sources = build_sources(mining.sources, encoder=encoder, cache=self.out / "vectors")
            report = mine_file(
                data.path,
                path,
                mining.corpus,
                sources,
                MiningOptions(**mining.options),
                teacher=score,
                teacher_name=mining.teacher or mining.cross_encoder,
                format=data.format,
                reader={"on_error": data.on_error, **data.options},
                show_progress_bar=True,
            )
            logger.info("mined %s: %s", path, report.to_dict())
        return ExampleFile(path)

    def _length(self, stage: Stage, example: Example) -> int:
        """Tokens that a step encodes of an example, whichever of its texts are drawn.

        Which texts are longest is told by their characters: to tokenize every negative would take longer than it saves.
        """
        negatives = sorted(example.negatives, key=len, reverse=True)[: stage.negatives]
        documents = [max(example.positives, key=len), *negatives]
        own = {}
        if example.prompt is not None:
            own["query"] = max(
                (data.prompt_template.replace("{prompt}", example.prompt) for data in stage.data), key=len
            )
        with self._configured(stage, own):
            inputs = [self.encoder.tokenize([example.query], kind="query")]
            inputs.append(self.encoder.tokenize(documents, kind="document"))
        return sum(int(side.get("attention_mask", torch.ones_like(side["input_ids"])).sum()) for side in inputs)

    @contextmanager
    def _configured(self, stage: Stage, prompts: dict[str, str] | None = None) -> Iterator[None]:
        """Let the encoder keep only a stage's `max_length` of texts for a while, and read them after other prompts.

        Only what a step encodes is cut so: what is evaluated and saved keeps the encoder's length.
        """
        own = self.encoder.config
        self.encoder.config = replace(
            own, max_length=stage.max_length or own.max_length, prompts={**own.prompts, **(prompts or {})}
        )
        try:
            yield
        finally:
            self.encoder.config = own

    def _count_short(self, batch: TextBatch, negatives: int, rows: int) -> None:
        if len(batch.documents) < rows * (1 + negatives) and self.stage not in self.short:
            self.short.add(self.stage)
            logger.warning(
                "stage %d: examples with fewer than the %d negatives asked for are trained with those that they have",
                *(self.stage, negatives),
            )

    def _seed(self) -> int:
        """A number of its own for every step: with the sampler's state it is all the randomness that there is."""
        return (self.recipe.seed * 1_009 + self.stage) * 100_000_007 + self.step * 1_009

    # -- parameters --------------------------------------------------------------------------------------------------

    def _trained(self, loss: nn.Module) -> dict[str, nn.Parameter]:
        named = {f"encoder.{name}": parameter for name, parameter in self.encoder.named_parameters()}
        named |= {f"loss.{name}": parameter for name, parameter in loss.named_parameters()}
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def _merged(self) -> TextEncoder:
        """The encoder, its adapter merged into a copy."""
        if not hasattr(self.encoder.backbone, "merge_and_unload"):
            return self.encoder
        merged = copy.copy(self.encoder)
        merged._modules = dict(self.encoder._modules)
        merged.backbone = copy.deepcopy(self.encoder.backbone).float().merge_and_unload()
        return merged

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, name: str) -> bool:
        """Score the encoder and return whether it is the best so far; every process does, so that all decide alike.

        The best is written to a folder of its own: the older one stays until a checkpoint names the new one.
        """
        self.encoder.eval()
        scores = {task.name: evaluate_retrieval(self.encoder, task) for task in self.tasks}
        self.scores[name] = {task: score.per_query for task, score in scores.items()}
        if self.generation is not None:
            # A pad token or a bridge must not find their way into what is trained.
            drawn = self.generation(copy.deepcopy(self._merged()))
            scores[GENERATION] = Scores(GENERATION, {GENERATION: drawn})
            self.scores[name][GENERATION] = scores[GENERATION].per_query
        metric = self.recipe.evaluation.metric
        values = [score.mean(metric) for score in scores.values() if metric in score.per_query]
        if not values:
            raise ValueError(f"evaluation.metric={metric!r}: no task is scored by it")
        value = sum(values) / len(values)
        self._log(**{metric: value})
        if name == "base":
            return False
        if value <= self.best:
            self.stale += 1
            return False
        self.best, self.stale, self.kept = value, 0, f"best-{self.stage}-{self.step}"
        if self.accelerator.is_main_process:
            self._merged().save_pretrained(self.folder / self.kept)
        return True

    @property
    def _evaluates(self) -> bool:
        return bool(self.tasks) or self.generation is not None

    def _patience_spent(self) -> bool:
        patience = self.recipe.evaluation.patience
        return patience is not None and self.stale >= patience

    def _comparison(self) -> Comparison | None:
        if not self.scores:
            return None
        rows = self.scores.items()
        return Comparison({name: {task: Scores(task, values) for task, values in row.items()} for name, row in rows})

    # -- state -------------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Write the recipe into a new folder; refuse a folder that was begun with another."""
        file, now = self.out / "recipe.json", self.recipe.to_dict()
        if file.is_file() and (different := changes(read_json(file), now)):
            raise ValueError(
                f"{self.out} was begun with another recipe ({'; '.join(different)}): "
                "resume with the same, or choose another folder"
            )
        self.accelerator.wait_for_everyone()  # all have read it
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            write_mark(file, now)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(
        self, sampler: BatchSampler, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Write one safetensors file, then the mark that names it: a kill in between leaves the older pair whole."""
        if not self.accelerator.is_main_process:
            return
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"parameter.{name}": parameter for name, parameter in trained.items()}
        for name, parameter in trained.items():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{key}.{name}": torch.as_tensor(value) for key, value in state.items()}
        file = f"state-{self.stage}-{self.step}.safetensors"
        write_tensors(folder / file, tensors)
        mark = {
            "file": file,
            "stage": self.stage,
            "step": self.step,
            "best": None if math.isinf(self.best) else self.best,
            "kept": self.kept,
            "log": (self.out / "log.jsonl").stat().st_size,
            "stale": self.stale,
            "scores": self.scores,
            "sampler": sampler.state_dict(),
        }
        write_mark(folder / "mark.json", mark)
        remove_partials(folder)
        for old in folder.glob("state-*.safetensors"):
            if old.name != file:
                old.unlink()
        for old in folder.glob("best-*"):
            if old.name != self.kept:
                shutil.rmtree(old)

    def _read_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        mark_file = self.folder / "mark.json"
        if not mark_file.is_file():
            return None
        mark = read_json(mark_file)
        tensors = read_tensors(mark_file.parent / mark["file"])
        self.stage, self.step, self.scores, self.stale = mark["stage"], mark["step"], mark["scores"], mark["stale"]
        self.best = -math.inf if mark["best"] is None else mark["best"]
        self.kept = mark["kept"]
        return mark, tensors

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C and a polite kill end the step under way first; a second one stops at once."""

        def handler(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        if threading.current_thread() is not threading.main_thread():  # Python hears signals there alone
            yield
            return
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def _any_interrupted(self) -> bool:
        """Whether a process was asked to stop: all stop after the same step, or the others would wait for it."""
        asked = torch.tensor(float(self.interrupted), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def _cut_log(self, size: int) -> None:
        """Drop the lines of steps that a killed run took after its checkpoint: they come again."""
        file = self.out / "log.jsonl"
        if self.accelerator.is_main_process and file.is_file():
            os.truncate(file, min(size, file.stat().st_size))

    def _log(self, **figures: Any) -> None:
        if not self.accelerator.is_main_process:
            return
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            row = {"time": time.time(), "stage": self.stage, "step": self.step, **figures}
            file.write(json.dumps(row) + "\n")
        if self.recipe.tensorboard:
            numbers = {key: value for key, value in figures.items() if key != "data"}
            done = sum(stage.steps for stage in self.recipe.stages[: self.stage])
            self.accelerator.log(numbers, step=done + self.step)


def schedule(step: int, stage: Stage) -> float:
    """Return the share of the learning rate at a step: a linear rise, then the stage's schedule."""
    warmup = round(stage.steps * stage.warmup)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, stage.steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress)) if stage.schedule == "cosine" else 1 - progress


def _load(recipe: Recipe) -> TextEncoder:
    encoder = TextEncoder.from_pretrained(
        recipe.model,
        pooling=recipe.pooling,
        normalize=recipe.normalize,
        prompts=recipe.prompts,
        max_length=recipe.max_length,
        dtype=getattr(torch, recipe.lora.dtype) if recipe.lora else torch.float32,
    )
    if recipe.lora:
        from peft import LoraConfig, get_peft_model

        encoder.backbone = get_peft_model(
            encoder.backbone,
            LoraConfig(
                r=recipe.lora.r,
                lora_alpha=recipe.lora.alpha,
                lora_dropout=recipe.lora.dropout,
                target_modules=recipe.lora.target_modules,
            ),
        )
    if recipe.heads:
        encoder.add_heads(sparse="sparse" in recipe.heads, tokens="tokens" in recipe.heads)
    for parameter in encoder.parameters():
        if parameter.requires_grad:  # a step of AdamW is mostly smaller than what bfloat16 can tell apart
            parameter.data = parameter.data.float()
    return encoder


def _scored(datasets: Iterable[ExampleFile]) -> bool:
    """Whether a teacher has scored some of the stage's examples; a batch of none of them is one of unknown scores."""
    firsts = (dataset[row] for dataset in datasets for row in range(min(len(dataset), PROBED_ROWS)))
    return any(example.positive_scores or example.negative_scores for example in firsts)


def _frozen(name: str | None, device: torch.device) -> TextEncoder | None:
    return None if name is None else TextEncoder.from_pretrained(name, device=device).eval().requires_grad_(False)


def _weights(stage: Stage, datasets: dict[str, ExampleFile]) -> dict[str, float] | None:
    given = [data.weight for data in stage.data]
    if all(weight is None for weight in given):
        return None
    if any(weight is None for weight in given):
        raise ValueError(f"stage {stage.name!r}: give a weight to every data set or to none")
    return dict(zip(datasets, given))


def _groups(trained: dict[str, nn.Parameter], stage: Stage) -> list[dict[str, Any]]:
    """Weight decay for matrices only, as in BERT; a learned temperature has a rate of its own."""
    encoder = [parameter for name, parameter in trained.items() if name.startswith("encoder.")]
    decayed = [parameter for parameter in encoder if parameter.ndim > 1]
    others = [parameter for parameter in encoder if parameter.ndim < 2]
    loss = [parameter for name, parameter in trained.items() if name.startswith("loss.")]
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay, "peak": stage.learning_rate},
        {"params": others, "weight_decay": 0.0, "peak": stage.learning_rate},
        {"params": loss, "weight_decay": 0.0, "peak": stage.loss_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def _restore(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"parameter.{name}"])
        state = {
            key: tensors[f"optimizer.{key}.{name}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.{key}.{name}" in tensors
        }
        if state:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
