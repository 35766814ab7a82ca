"""Train an encoder so that a frozen denoiser behaves under it as under its own, from prompts alone."""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn

from textcond import ConditioningEncoder, TextEncoder
from textcond.files import read_tensors, write_mark, write_tensors
from textcond.folders import read_json
from textcond.pipelines.contracts import inspect_pipeline, slots_of
from textcond.pipelines.denoisers import TimestepAwareUNet
from textcond.pipelines.families import Conditioning, condition, denoiser_of, family_of
from textcond.pipelines.loop import Validation, fit, share, step_generator
from textcond.pipelines.swap import CONNECTOR, make_encoder, swap_text_encoder
from textcond.pipelines.trajectories import replay
from textcond.precision import bfloat16

from .anchor import DRAWN, Anchor
from .attention import AttentionProbe
from .closed_form import fit_last_layer, gives
from .losses import contrast, regression, statistics
from .options import AlignmentOptions
from .pictures import CaptionedPictures, denoiser_error
from .prompts import AlignmentPrompts, read_prompts
from .rounds import SIZE, Visit, effects, mixed, samples_alone, starts_from_a_picture, visited
from .teacher import TeacherStates, fingerprint, weights_hash

PROBED_PROMPTS = 16  # whose trajectories give the queries of the attention loss
POOL = 16  # batches that are drawn together and sorted by length
ADAM_RATE = 1e-3  # of biases, norms and queries, at the most
MEASURED = 2**28  # values of the teacher's, at the most, of which mean and variance are taken
HASHED = 1024  # values of each tensor of the denoiser
SAMPLED = ("num_inference_steps", "guidance_scale", "generator", "output_type", "image", "strength", "return_dict")
CHUNK = 32  # held-out prompts that are asked at a time


def align(
    pipe: DiffusionPipeline,
    encoder: TextEncoder | ConditioningEncoder,
    prompts: str | os.PathLike | Iterable[str],
    out: str | Path,
    options: AlignmentOptions | None = None,
    *,
    held_out: str | os.PathLike | Iterable[str] | None = None,
    pictures: str | os.PathLike | None = None,
    anchors: str | os.PathLike | Iterable[str] | None = None,
) -> ConditioningEncoder:
    """Align an encoder with a pipeline's own, and save it in `out`, ready for `swap_text_encoder(pipe, out)`.

    Steps, as in the order of their cost: the bridge's last layer by ridge regression (0), a loss between token states
    and between what cross-attention makes of them (1), and a loss between the denoiser's outputs along the teacher's
    own trajectories, as in PEA-Diffusion (2023) and DistillT5 (2025), with the token loss falling to zero (2). No
    pictures are needed.

    Interrupted, the same call goes on from `out/alignment`. Under `torchrun` or `accelerate launch` each batch is
    shared among the processes, with the same result within float tolerance.

    Args:
        pipe: of a family in `textcond.pipelines.families`; it keeps its own encoder.
        encoder: what is to condition it; a ConditioningEncoder goes on with the bridge that it has. Its bridge, and
            with `lora_rank` or `train_backbone` its backbone, are changed in place.
        prompts: see `read_prompts`.
        options: see `AlignmentOptions`.
        held_out: prompts like `prompts` that nothing trains on, so that they are left out of those: the weights that
            are best on them are kept. None keeps some of `prompts` out for that.
        pictures: a folder of pictures with captions, see `CaptionedPictures`, for an extra loss in step 2.
        anchors: texts like `prompts` whose vectors a changing backbone is to keep, with `retrieval_weight`: all that it
            is to find, in all its languages. None for the prompts, which are too alike to keep the rest.

    Returns:
        The aligned encoder, with its best held-out weights.

    Raises:
        ValueError: bad prompts or options, an encoder that does not fit the slot, or an `out` that was begun
            with other ones.
        KeyboardInterrupt: after Ctrl-C, when the state of the last whole step is on disk.
    """
    options = options or AlignmentOptions()
    if anchors is not None and not (options.lora_rank or options.train_backbone):
        raise ValueError(
            "anchors hold a backbone that changes, and this one stays as it is: give train_backbone or lora_rank, or "
            "leave the anchors out"
        )
    if pictures is not None and not options.denoiser_steps:
        raise ValueError(
            "pictures are read in denoiser steps, and there are none: give some, or leave the pictures out"
        )
    training = read_prompts(prompts)
    if held_out is None:
        training, kept_out = training.split(min(options.held_out, len(training.teacher) // 2))
    else:
        kept_out = read_prompts(held_out)
        training = training.without(kept_out.teacher)
    kept = training if anchors is None else read_prompts(anchors)
    return Aligner(pipe, encoder, training, kept_out, Path(out).expanduser(), options, pictures, kept).run()


class Aligner:
    """The state of an alignment; see `align`."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        encoder: TextEncoder | ConditioningEncoder,
        training: AlignmentPrompts,
        held_out: AlignmentPrompts,
        out: Path,
        options: AlignmentOptions,
        pictures: str | os.PathLike | None = None,
        anchors: AlignmentPrompts | None = None,
    ):
        self.options, self.out = options, out
        _check(pipe, encoder, options)
        pipe = _uncompiled(pipe)
        if _is_of(pipe, encoder):
            encoder = copy.deepcopy(encoder)  # the teacher stays as it is
        self.pictures = None if pictures is None else CaptionedPictures(pipe, pictures)
        device = denoiser_of(pipe).device
        # Its autocast would be one for the whole process; the denoiser's precision is chosen below.
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        pipe.set_progress_bar_config(disable=True)
        self.teacher_pipe, self.student_pipe = pipe, copy.copy(pipe)
        self.connector: nn.Module | None = None
        if options.bridge == "timestep":
            encoder = self._connect(encoder)
        elif isinstance(encoder, TextEncoder):
            chosen = {name: getattr(options, name) for name in ("bridge", "tokens") if getattr(options, name)}
            encoder = make_encoder(
                pipe, encoder, slot=options.slot, bridge_depth=options.bridge_depth, layers=options.layers,
                seed=options.seed, dtype=torch.float32, **chosen,
            )  # fmt: skip
        self.encoder = encoder
        _fill_slot(self.student_pipe, encoder, options.slot)
        self.training, self.held_out = training, held_out
        if not held_out.teacher:
            raise ValueError("one prompt alone leaves none to train on: give at least 2, and better 10,000")
        anchored = options.retrieval_weight and (options.lora_rank or options.train_backbone)
        anchors = (anchors or training) if anchored else None
        self.begun = self._begun(anchors)
        self.anchor = anchors and Anchor(self.encoder.text_encoder, [text for _, text in anchors.rows], options.seed)
        if options.lora_rank:
            self._add_adapter()
        self.trained = _Trained(self.encoder, self.connector, options.train_backbone)
        self.cast = partial(bfloat16, device, options.mixed_precision == "bf16")
        self.sampling = {"num_inference_steps": options.num_inference_steps, **options.call}

    def run(self) -> ConditioningEncoder:
        """Run what is left of the steps, and write the encoder."""
        with _quiet(), _frozen(denoiser_of(self.teacher_pipe)):
            return self._run()

    def _run(self) -> ConditioningEncoder:
        options, work = self.options, self.out / "alignment"
        with self.accelerator.main_process_first():
            folder = work / "teacher" / fingerprint(self.teacher_pipe, self.training.teacher)[:16]
            self.states = TeacherStates(self.teacher_pipe, self.training.teacher, folder, options.cache_limit * 1e9)
        rng = np.random.default_rng([options.seed, 1])
        sample = rng.permutation(len(self.training.teacher))[: max(256, options.closed_form_prompts)]
        largest = max(tensor[0].numel() for tensor in self.states.empty.values())
        self.known = statistics(self.states(sample[: max(64, min(2048, MEASURED // largest))]))
        self._prepare_held_out()
        self._prepare_probe(sample[:PROBED_PROMPTS])
        # The teacher has sampled once: what it cannot do has been told, and the folder may be begun otherwise.
        if self.accelerator.is_main_process:
            write_mark(work / "begun.json", self.begun)
        fitted = (work / "closed-form.safetensors").is_file()
        self.accelerator.wait_for_everyone()  # before the first process writes it
        if options.closed_form_prompts and not fitted:
            if self._closed_form(sample) and self.accelerator.is_main_process:
                write_tensors(work / "closed-form.safetensors", self.trained.state_dict())
            self.accelerator.wait_for_everyone()
        elif options.closed_form_prompts:
            self.trained.load_state_dict(read_tensors(work / "closed-form.safetensors"))
        if options.token_steps:
            self._fit("tokens", self._token_step, options.token_steps, options.batch_size)
        if options.denoiser_steps:
            self._fit("denoiser", self._denoiser_step, options.denoiser_steps, options.denoiser_batch_size)
        self._merge_adapter()
        if self.accelerator.is_main_process:
            self.encoder.save_pretrained(self.out)
            if self.connector is not None:
                self.student_pipe.unet.save_connector(self.out / CONNECTOR)
            prompts = [(self.held_out.teacher[index], text) for index, text in self.held_out.rows]
            record = {"held_out_distance": self.held_out_distance(), "held_out_prompts": prompts}
            write_mark(self.out / "alignment.json", options.to_dict() | record)
            shutil.rmtree(work / "teacher")
        self.accelerator.wait_for_everyone()
        return self.encoder

    # -- steps -------------------------------------------------------------------------------------------------------

    def _closed_form(self, sample: np.ndarray) -> bool:
        """Step 0: every last layer that maps to a tensor of the conditioning. Whether there was one."""
        fitted = False
        text = min(self.training.teacher, key=len)
        size = self.options.batch_size if family_of(self.student_pipe).even else 1
        for name, facts in self.known.items():
            bridge = self.connector or self.encoder.bridge
            layer = getattr(bridge if facts.mean.ndim == 2 else self.encoder.pooled_bridge, "out_proj", None)
            if layer is None or not gives(layer, lambda name=name: self._say([text])[name], facts.mean.shape):
                continue

            def run(name: str = name) -> Iterable[Tensor]:
                for start in range(0, len(sample), size):
                    batch = sample[start : start + size]
                    self._say([self.training.teacher[index] for index in batch])
                    yield self.states(batch)[name]

            fit_last_layer(layer, run)
            fitted = True
        return fitted

    def _token_step(self, module: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        """Step 1: the student's token states and pooled vectors against the teacher's."""
        value, figures = self._conditioning_loss(*self._draw(step), step)
        kept, more = self._kept(step)
        return value + kept, figures | more

    def _say(self, texts: list[str]) -> Conditioning:
        """The student's conditioning, as the denoiser's cross-attention will read it."""
        conditioning = self._conditioned(texts)
        if self.connector is not None:
            states = conditioning["encoder_hidden_states"]
            conditioning |= {"encoder_hidden_states": self.connector(states)}
        return conditioning

    def _conditioned(self, texts: list[str]) -> Conditioning:
        """The student's conditioning, as its denoiser takes it; a connector is spared the padding behind all texts."""
        conditioning = condition(self.student_pipe, texts)
        if self.connector is not None:
            states = conditioning["encoder_hidden_states"]
            (read,) = (states != 0).any(-1).any(0).nonzero(as_tuple=True)
            conditioning |= {"encoder_hidden_states": states[:, : int(read.max()) + 1]}
        return conditioning

    def _conditioning_loss(self, indices: list[int], texts: list[str], step: int) -> tuple[Tensor, dict[str, float]]:
        options, teacher = self.options, self.states(indices)
        with self.cast():
            student = self._say([*texts, ""])
            attention = self._attention(student, teacher, step)
        ours = {name: tensor[:-1] for name, tensor in student.items()}
        empty = {name: tensor[-1:] for name, tensor in student.items()}
        distance = regression(ours, teacher, self.known).mean()
        figures = {"tokens": distance.item()}
        value = distance + options.empty_weight * regression(empty, self.states.empty, self.known).mean()
        value = options.token_weight * value
        if attention is not None:
            figures["attention"] = attention[:-1].mean().item()
            value = value + options.attention_weight * (attention[:-1].mean() + options.empty_weight * attention[-1])
        if options.contrast_weight:
            said = torch.tensor(indices, device=distance.device)
            value = value + options.contrast_weight * contrast(ours, teacher, self.known, said, self.accelerator)
        return value, figures

    def _kept(self, step: int) -> tuple[Tensor | float, dict[str, float]]:
        """The loss that holds a changing backbone to its vectors."""
        if self.anchor is None:
            return 0.0, {}
        with self.cast():
            moved = self.anchor(self.encoder.text_encoder, step, share(self.accelerator, DRAWN))
        return self.options.retrieval_weight * moved, {"moved": moved.item()}

    def _attention(self, student: Conditioning, teacher: Conditioning, step: int) -> Tensor | None:
        """The attention loss of each prompt and, last, of the empty one."""
        if self.probe is None or not self.options.attention_weight:
            return None
        name = next(iter(self.known))
        wanted = torch.cat([teacher[name], self.states.empty[name]])
        return self.probe(student[name], wanted, step_generator(self.options.seed + 3, step))

    def _denoiser_step(self, module: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        """Step 2: the denoiser's output under the student's text against that under the teacher's."""
        visits, texts, first = self._round(step)
        # By its place in the joint batch, so that it is the same on any number of processes.
        places = step + first + np.arange(len(texts))
        visit = mixed(visits, places % len(visits))
        effect = self.accelerator.reduce(effects(visits), "mean")[places % len(visits)]
        # The empty prompt is half of every guided step, and one text: it takes the place of one prompt in eight.
        silent = places % 8 == 7
        answer = torch.where(_column(silent, visit.output), visit.unconditional, visit.output)
        said = ["" if quiet else text for text, quiet in zip(texts, silent)]
        with self.cast():
            ours = replay(denoiser_of(self.student_pipe), visit, self._conditioned(said))
        error = (ours.float() - answer.float()).square().flatten(1).mean(1) / effect
        value, figures = error.mean(), {"denoiser": error.mean().item()}
        if self.pictures is not None:
            drawn = self._pictured(visits[0], step).mean()
            value, figures = value + self.options.picture_weight * drawn, figures | {"pictures": drawn.item()}
        tokens, more = self._conditioning_loss(*self._draw(step + self.options.token_steps), step)
        remaining = 1 - step / self.options.denoiser_steps
        kept, moved = self._kept(step + self.options.token_steps)
        return value + remaining * tokens + kept, figures | more | moved

    def _pictured(self, like: Visit, step: int) -> Tensor:
        """The denoiser's own loss on real pictures under the student's captions, `(rows,)`."""
        size = self.options.denoiser_batch_size
        mine = share(self.accelerator, size)
        rows = np.random.default_rng([self.options.seed, 6, step]).integers(len(self.pictures.rows), size=size)[mine]
        # Each process draws noise of its own, as many rows as it has.
        generator = step_generator(self.options.seed + 7 + self.accelerator.process_index, step)
        visit, answer = self.pictures.question(rows, like, generator)
        with self.cast():
            said = self._conditioned(self.pictures.texts(rows))
            return denoiser_error(replay(denoiser_of(self.student_pipe), visit, said), answer)

    def _round(self, step: int) -> tuple[list[Visit], list[str], int]:
        """The trajectories of some prompts; each of their latents is asked about once before the next round."""
        options = self.options
        number = step // options.num_inference_steps
        if getattr(self, "_round_number", None) != number:
            rng = np.random.default_rng([options.seed, 2, number])
            mine = share(self.accelerator, options.denoiser_batch_size)
            rows = rng.integers(len(self.training.rows), size=options.denoiser_batch_size)[mine]
            indices, texts = self.training.texts(rows)
            guidance = float(rng.uniform(*options.guidance_scale))
            seeds = rng.integers(2**31, size=options.denoiser_batch_size)[mine].tolist()
            with self.cast():
                visits = visited(
                    self.teacher_pipe, [self.training.teacher[index] for index in indices], seeds, self.states.empty,
                    guidance_scale=guidance, **self.sampling,
                )  # fmt: skip
            self._round_number, self._round_state = number, (visits, texts, mine.start)
        return self._round_state

    def _draw(self, step: int) -> tuple[list[int], list[str]]:
        """A batch of texts of nearly the same length: each epoch is shuffled, pools of it are sorted."""
        size = self.options.batch_size
        count = len(self.training.rows)
        epoch, place = divmod(step * size, count)
        pool_size = size * POOL
        start = place // pool_size * pool_size
        order = self._order(epoch)
        pool = order[start : start + pool_size]
        pool = sorted(pool.tolist(), key=lambda row: len(self.training.rows[row][1]))
        batches = [pool[at : at + size] for at in range(0, len(pool), size)]
        turn = np.random.default_rng([self.options.seed, 4, epoch, start]).permutation(len(batches))
        rows = batches[turn[min((place - start) // size, len(batches) - 1)]]
        # The last batch of an epoch is filled up from its beginning, so that every step weighs the same.
        rows = (rows + order.tolist() * (size // count + 1))[:size]
        return self.training.texts(rows[share(self.accelerator, size)])

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._epoch_order = np.random.default_rng([self.options.seed, 3, epoch]).permutation(
                len(self.training.rows)
            )
        return self._epoch_order

    def _fit(self, name: str, loss, steps: int, batch: int) -> None:
        rate = self.options.denoiser_learning_rate if name == "denoiser" else self.options.learning_rate
        weights = fit(
            name,
            self.trained,
            loss,
            out=self.out / "alignment" / name,
            steps=steps,
            batch=batch,
            learning_rate=rate,
            adam_rate=min(ADAM_RATE, rate),
            accelerator=self.accelerator,
            decay=0.4,
            ema=0.99,
            save_every=self.options.save_every,
            validation=Validation(lambda step: self.held_out_distance(), self.options.validate_every,
                                  self.options.patience, first=name == "denoiser"),
        )  # fmt: skip
        self.trained.load_state_dict(weights)

    # -- held out ----------------------------------------------------------------------------------------------------

    def _prepare_held_out(self) -> None:
        """The teacher's trajectories of the held-out prompts, with one of the texts that say each."""
        options = self.options
        texts: dict[int, list[str]] = {}
        for index, text in self.held_out.rows:
            texts.setdefault(index, []).append(text)
        rng = np.random.default_rng([options.seed, 5])
        self.held_out_chunks = []
        count = len(self.held_out.teacher)
        guidance = sum(options.guidance_scale) / 2
        for start in range(0, count, CHUNK):
            indices = range(start, min(start + CHUNK, count))
            with self.cast():
                visits = visited(
                    self.teacher_pipe, [self.held_out.teacher[index] for index in indices],
                    [10_000 + index for index in indices], self.states.empty, guidance_scale=guidance, **self.sampling,
                )  # fmt: skip
            said = [texts[index][int(rng.integers(len(texts[index])))] for index in indices]
            self.held_out_chunks.append((visits, said))

    def held_out_distance(self) -> float:
        """The denoiser's distance to the teacher on held-out prompts, as a share of the empty prompt's distance."""
        return float(np.mean(self.held_out_shares()))

    @torch.no_grad()
    def held_out_shares(self) -> list[float]:
        """That share of each held-out prompt, the mean over its timesteps.

        At each timestep the distance of a prompt is divided by the mean distance of the empty prompt over all prompts.
        """
        was = self.encoder.training
        self.encoder.eval()
        shares = []
        for visits, said in self.held_out_chunks:
            conditioning = self._conditioned(said)
            # Every second timestep tells as much as all.
            asked = visits[:: 2 if len(visits) > 4 else 1]
            errors = []
            for visit, effect in zip(asked, effects(asked)):
                with self.cast():
                    ours = replay(denoiser_of(self.student_pipe), visit, conditioning)
                errors.append((ours.float() - visit.output.float()).square().flatten(1).mean(1) / effect)
            shares += torch.stack(errors).mean(0).tolist()
        self.encoder.train(was)
        return shares

    def _prepare_probe(self, sample: np.ndarray) -> None:
        """Queries for the attention loss, where the denoiser has cross-attention on tokens of this width."""
        name = next(iter(self.known))
        self.probe = AttentionProbe(denoiser_of(self.teacher_pipe), self.states.empty[name].shape[-1])
        if not self.probe.layers or self.states.empty[name].ndim != 3:
            self.probe = None
            return
        generator = torch.Generator().manual_seed(self.options.seed)
        with self.probe.listening(generator), self.cast():
            visited(
                self.teacher_pipe, [self.training.teacher[index] for index in sample], range(len(sample)),
                self.states.empty, guidance_scale=sum(self.options.guidance_scale) / 2, **self.sampling,
            )  # fmt: skip
        self.probe.calibrate(self.states(sample)[name])

    # -- parts and state ---------------------------------------------------------------------------------------------

    def _connect(self, encoder: TextEncoder | ConditioningEncoder) -> ConditioningEncoder:
        """Bare backbone states, and a UNet that resamples them at every timestep."""
        if not isinstance(encoder, TextEncoder):
            raise ValueError("bridge='timestep' starts from a text encoder: give one without a bridge")
        unet, width = denoiser_of(self.teacher_pipe), encoder.backbone.config.hidden_size
        if unet.dtype != torch.float32:
            raise ValueError(f"bridge='timestep' trains inside a {unet.dtype} UNet: load the pipeline in float32")
        if not isinstance(unet, UNet2DConditionModel):
            raise ValueError(
                f"bridge='timestep' goes before a UNet2DConditionModel, and a {type(self.teacher_pipe).__name__} has "
                f"a {type(unet).__name__}: choose another bridge"
            )
        with torch.no_grad():
            tokens = condition(self.teacher_pipe, [""])["encoder_hidden_states"].shape[1]
        self.student_pipe.register_modules(
            unet=TimestepAwareUNet.from_unet(
                unet, width, tokens=self.options.tokens or tokens, depth=self.options.bridge_depth,
                seed=self.options.seed,
            )
        )  # fmt: skip
        self.connector = self.student_pipe.unet.connector
        return make_encoder(
            self.student_pipe, encoder, slot=self.options.slot, bridge="identity", tokens=None,
            layers=self.options.layers, seed=self.options.seed,
        )  # fmt: skip

    def _add_adapter(self) -> None:
        from peft import LoraConfig, get_peft_model

        rank = self.options.lora_rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        torch.manual_seed(self.options.seed)
        self.encoder.backbone = get_peft_model(self.encoder.backbone, config)

    def _merge_adapter(self) -> None:
        if self.options.lora_rank:
            self.encoder.backbone = self.encoder.backbone.merge_and_unload()
        self.encoder.eval()

    def _begun(self, anchors: AlignmentPrompts | None) -> dict[str, Any]:
        """What decides the result; a folder that was begun with something else is refused."""
        file = self.out / "alignment" / "begun.json"
        now = self.options.to_dict() | {
            "prompts": self.training.fingerprint(),
            "held_out_prompts": self.held_out.fingerprint(),
            "teacher": fingerprint(self.teacher_pipe, []),
            "denoiser": weights_hash(denoiser_of(self.teacher_pipe), HASHED),
            "scheduler": _settings(self.teacher_pipe.scheduler),
            "encoder": weights_hash(self.encoder),
            "pictures": self.pictures and [text for _, text in self.pictures.rows],
            "anchors": anchors and anchors.fingerprint(),
        }
        now.pop("save_every")
        now = json.loads(json.dumps(now))  # as it is read back
        if file.is_file():
            before = read_json(file)
            if different := [name for name in now if now[name] != before.get(name)]:
                raise ValueError(
                    f"{self.out} was begun with another {', '.join(different)}: "
                    "go on with the same, or choose another folder"
                )
        return now


def _check(pipe: DiffusionPipeline, encoder: TextEncoder | ConditioningEncoder, options: AlignmentOptions) -> None:
    """Refuse at once what would end an alignment later, or be ignored."""
    if isinstance(denoiser_of(pipe), TimestepAwareUNet):
        raise ValueError("this pipeline's UNet reads its encoder through a connector: align to the stock pipeline")
    if not samples_alone(pipe):
        raise ValueError(
            f"a {type(pipe).__name__} follows a picture, which prompts do not give: align the encoder to the "
            "text-to-image pipeline of its family, and swap it in here"
        )
    if denoiser_of(pipe).dtype == torch.float16:
        raise ValueError(
            "gradients through a float16 denoiser vanish: load the pipeline in bfloat16 or float32; what comes out "
            "serves it in float16 too"
        )
    problems = [problem for contract in inspect_pipeline(pipe) for problem in contract.problems]
    if problems:
        raise ValueError(f"this pipeline cannot teach: {'; '.join(problems)}")
    if isinstance(getattr(denoiser_of(pipe), "encoder_hid_proj", None), MultiIPAdapterImageProjection):
        raise ValueError("an IP-Adapter asks for a picture: call pipe.unload_ip_adapter() before")
    if denoiser_of(pipe).dtype != torch.float32 and getattr(pipe, "projection_model", None) is not None:
        raise ValueError(
            f"a {type(pipe).__name__} puts the encoder's states through a {denoiser_of(pipe).dtype} projection, which "
            "reads no float32: load the pipeline in float32"
        )
    accepted = {*inspect.signature(pipe.__call__).parameters, *(SIZE if starts_from_a_picture(pipe) else ())}
    # Prompts, and what decides how they are read: the teacher's states are made without.
    encode = getattr(pipe, "encode_prompt", None) or pipe._encode_prompt
    read = {*inspect.signature(encode).parameters, "audio_start_in_s", "audio_end_in_s"}
    for name in options.call:
        if name not in accepted:
            raise ValueError(f"the call of a {type(pipe).__name__} takes no {name}: leave it out")
        if name in read or name in SAMPLED:
            raise ValueError(f"{name} in the call: align decides how prompts are read and drawn, so leave it out")
    try:
        json.dumps(options.call)
    except TypeError as error:
        raise ValueError(f"the call has a value that cannot be kept ({error}): give numbers and strings") from None
    if isinstance(encoder, ConditioningEncoder) and encoder.config.bridge == "identity":
        raise ValueError(
            "this encoder is read through a connector, with which it does not go on: give the text encoder that it was "
            "made of, and bridge='timestep'"
        )
    for name in ("bridge", "tokens") if isinstance(encoder, ConditioningEncoder) else ():
        given, own = getattr(options, name), getattr(encoder.config, name)
        if given not in (None, own):
            raise ValueError(
                f"{name}={given!r}, and the encoder goes on with the bridge that it has, of {name}={own!r}: leave it "
                "out, or give a text encoder without a bridge"
            )


def _is_of(pipe: DiffusionPipeline, encoder: TextEncoder | ConditioningEncoder) -> bool:
    """Whether an encoder shares weights with what the pipeline holds."""
    held = [getattr(pipe, name) for name in slots_of(pipe) if getattr(pipe, name) is not None]
    theirs = {id(parameter) for one in held for parameter in one.parameters()}
    return any(id(parameter) in theirs for parameter in encoder.backbone.parameters())


def _uncompiled(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A copy of the pipeline whose denoiser runs its own layers, to which hooks can be put."""
    pipe = copy.copy(pipe)
    pipe.register_modules(**{family_of(pipe).denoiser: denoiser_of(pipe)})
    return pipe


def _fill_slot(pipe: DiffusionPipeline, encoder: ConditioningEncoder, slot: str | None) -> None:
    """Swap in an encoder whose weights stay float32, as they train, whatever the denoiser's are."""
    denoiser = denoiser_of(pipe)
    encoder.to(denoiser.device, torch.float32)
    weights = [(parameter, parameter.data) for parameter in encoder.parameters()]
    buffers = [(module, dict(module._buffers)) for module in encoder.modules()]
    try:
        swap_text_encoder(pipe, encoder.to(denoiser.dtype), slot)
    finally:
        for parameter, value in weights:
            parameter.data = value
        for module, values in buffers:
            module._buffers.update(values)


def _settings(scheduler: SchedulerMixin) -> str:
    """What a scheduler samples by."""
    settings = sorted((name, value) for name, value in scheduler.config.items() if not name.startswith("_"))
    return f"{type(scheduler).__name__} {settings}"


class _Trained(nn.Module):
    """The parameters that are trained, as a module of their own: what is saved and averaged."""

    def __init__(self, encoder: ConditioningEncoder, connector: nn.Module | None, train_backbone: bool):
        super().__init__()
        parts = _parts(encoder) + ((encoder.backbone,) if train_backbone else ())
        own = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
        own -= {
            id(parameter)
            for module in encoder.backbone.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(id(parameter) in own or "lora_" in name)
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)
        for name, parameter in connector.named_parameters() if connector is not None else ():
            self.register_parameter(f"connector/{name}".replace(".", "/"), parameter.requires_grad_())


def _parts(encoder: ConditioningEncoder) -> tuple[nn.Module | None, ...]:
    return encoder.bridge, encoder.pooled_bridge, encoder.layer_average


@contextmanager
def _frozen(denoiser: nn.Module) -> Iterator[None]:
    """Without gradients of the denoiser's weights, which are as they were afterwards."""
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the pipelines' warning of each prompt that their tokenizer cuts: thousands are read."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


def _column(flags: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(flags).to(like.device).view(-1, *[1] * (like.ndim - 1))
