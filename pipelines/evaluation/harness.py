"""The harness: every encoder and control on the same cases and latents, judged and measured."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from textcond import ConditioningEncoder, TextEncoder
from textcond.evaluation.compare import short_names
from textcond.folders import model_folder
from textcond.pipelines.contracts import slots_of
from textcond.pipelines.denoisers import TimestepAwareUNet
from textcond.pipelines.families import condition, denoiser_of, family_of
from textcond.pipelines.family import Conditioning
from textcond.pipelines.swap import load_encoder, swapped

from .cache import ResultCache, cache_key, fingerprint
from .cases import Case
from .controls import CONTROLS, ORIGINAL, random_encoder, raw_encoder, shuffled_texts
from .distance import EMPTY, squared_distances
from .grid import grid_blocks
from .judges import Scores, shares_weights
from .pictures import draw_pictures, latent_seed, pixel_spread
from .report import Measured, Report
from .stages import STAGES, earlier_states, set_state

Judge = Callable[[Sequence[Image.Image], Sequence[Case]], Scores]

_JUDGED_AT_ONCE = 64
_TIMED_ENCODINGS, _TIMED_PICTURES = 7, 3


@dataclass
class _Row:
    """One line of the report: an encoder (None: the pipeline's own) and the texts that it reads, one a case.

    Attributes:
        times: whether its costs are no other row's.
        state: what the encoder's alignment had trained so far; see `earlier_states`.
    """

    name: str
    encoder: PreTrainedModel | str | Path | None
    texts: list[str]
    times: bool = True
    state: Path | None = None


def evaluate_conditioning(
    pipe: DiffusionPipeline,
    encoders: Sequence[str | Path] | Mapping[str, PreTrainedModel | str | Path],
    cases: Sequence[Case],
    *,
    judge: Judge | None = None,
    guidance: Sequence[float] = (4.0,),
    seeds: Sequence[int] = (0,),
    steps: int = 20,
    controls: Sequence[str] | None = None,
    backbone: TextEncoder | str | Path | None = None,
    slot: str | None = None,
    cache: str | Path | None = None,
    batch_size: int = 8,
    show_progress_bar: bool = False,
) -> Report:
    """Draw the cases under every encoder from the same latents, and measure what became of them.

    Distances are measured at the middle guidance and the first seed.

    Args:
        pipe: a text-to-image pipeline with its own encoder, the teacher, in place; it is as before afterwards.
        encoders: folders or hub ids, or encoders in memory or folders by name: what `swap_text_encoder` takes.
        cases: what to draw; see `read_cases`.
        judge: scores pictures; see `pipelines.evaluation.judges`. None leaves the scores out.
        guidance: every classifier-free guidance to draw with.
        seeds: every seed to draw with; two or more show diversity.
        steps: denoising steps.
        controls: names of `CONTROLS`; None takes every one that applies. "original" is always there. Another, a bridge
            of the same size on the original encoder, is aligned first, `align(pipe, retrieval_encoder(pipe), ...)`, and
            given among `encoders`.
        backbone: the text encoder that the controls raw and random use, or its folder or hub id; that of the first
            encoder, if it is a ConditioningEncoder, when left out. The controls closed_form and tokens are the first
            encoder's own.
        slot: which of the pipeline's encoders is replaced; None for all, as in `swap_text_encoder`.
        cache: folder where finished pictures and numbers are kept: the same call goes on where it was interrupted.
        batch_size: prompts at once.
        show_progress_bar: show progress.

    Raises:
        FileNotFoundError: for an encoder that is not there.
        ValueError: for options or cases that cannot be measured, or an encoder that does not fit the pipeline.
    """
    cases = list(cases)
    _check(cases, guidance, seeds, steps, controls)
    if not isinstance(encoders, Mapping):
        encoders = dict(zip(short_names(encoders), encoders)) if encoders else {}
    reserved = sorted(encoders.keys() & CONTROLS.keys())
    if reserved:
        raise ValueError(f"an encoder is named {reserved[0]!r}, as a control is: give it another name")
    for encoder in encoders.values():
        if isinstance(encoder, (str, Path)):
            model_folder(encoder)  # a wrong name is known now, not after hours
    if hasattr(judge, "check"):
        judge.check(cases)
    device = denoiser_of(pipe).device
    store, middle = ResultCache(cache), sorted(guidance)[len(guidance) // 2]
    rows = _rows(pipe, encoders, cases, controls, backbone, slot)
    notes = _relatives(judge, "the pipeline", {n: part for n, part in pipe.components.items() if "encoder" not in n})
    shown = {index for block in grid_blocks(cases) for index in block}
    settings = {"pipeline": _fixed_parts(pipe), "steps": steps, "device": str(device)}
    empty_key = _encoder_key(pipe)

    measured, conditionings, denoisers, keys = {}, {}, {}, {}
    total = len(rows) * len(cases) * len(guidance) * len(seeds)
    with (
        _quiet(pipe),
        torch.no_grad(),
        tqdm(total=total, unit="picture", disable=not show_progress_bar, mininterval=1) as bar,
    ):
        for row in rows:
            bar.set_description(row.name)
            with _installed(pipe, row, slot):
                base = settings | {"encoder": _encoder_key(pipe)}
                if row.times:
                    notes += _relatives(judge, row.name, {"text encoder": nn.ModuleList(e for e, _ in _slots(pipe))})
                pictures = {}
                for scale in guidance:
                    for seed in seeds:
                        drawn = [latent_seed(case, seed) for case in cases]
                        names = [
                            cache_key(**base, text=text, seed=number, guidance=float(scale))
                            for text, number in zip(row.texts, drawn)
                        ]
                        made = draw_pictures(
                            pipe, row.texts, drawn, names, cache=store, steps=steps, guidance=scale,
                            batch_size=batch_size, on_pictures=bar.update,
                        )  # fmt: skip
                        pictures[scale, seed] = made, names
                measured[row.name] = _judged(pictures, cases, guidance, seeds, judge, store)
                chosen = pictures[middle, seeds[0]][0]
                measured[row.name].pictures = {index: chosen[index] for index in shown}
                measured[row.name].parameters = _parameter_bytes(pipe)
                if row.times:
                    _time(pipe, row.texts[0], steps, middle, measured[row.name])
                # Another teacher's distances are others, so its key is in theirs.
                keys[row.name] = [
                    cache_key(**base, teacher=empty_key, english=case.english, text=text, guidance=float(middle),
                              seed=latent_seed(case, seeds[0]), kind="distance")
                    for case, text in zip(cases, row.texts)
                ]  # fmt: skip
                if any(store.numbers(key) is None for key in keys[row.name]):
                    conditionings[row.name] = _conditionings(pipe, row.texts, batch_size)
                    denoisers[row.name] = denoiser_of(pipe)
        bar.close()  # before the next one begins
        timesteps, distances = _distances(
            pipe, cases, conditionings, denoisers, keys, seeds[0], middle, steps, store, batch_size, show_progress_bar
        )
    for name, (above, below) in distances.items():
        measured[name].distances, measured[name].empty_distances = above, below
    return Report(
        settings={
            "pipeline": type(pipe).__name__,
            "steps": steps,
            "guidance": [float(scale) for scale in guidance],
            "seeds": list(seeds),
            "distance guidance": float(middle),
            "judge": type(judge).__name__ if judge is not None else None,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "peak memory of the process, bytes": _peak_memory(),
            "controls": {row.name: CONTROLS[row.name] for row in rows if row.name in CONTROLS},
        },
        cases=cases,
        timesteps=timesteps,
        rows=measured,
        notes=notes,
    )


def _check(cases, guidance, seeds, steps: int, controls) -> None:
    if not cases:
        raise ValueError("there is no case to draw: pass at least one")
    if not guidance or not seeds:
        raise ValueError("pass at least one guidance and one seed")
    for name, values in (("guidance", guidance), ("seed", seeds)):
        if wrong := [value for value in values if not math.isfinite(value)]:
            raise ValueError(f"{name} is {wrong[0]}: give a finite number")
        if len(set(values)) < len(values):
            raise ValueError(f"a {name} is given twice among {', '.join(map(str, values))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}: pass 1 or more")
    unknown = [name for name in controls or () if name not in CONTROLS]
    if unknown:
        raise ValueError(f"there is no control {unknown[0]!r}: choose from {', '.join(CONTROLS)}")


def _rows(pipe, encoders, cases, controls, backbone, slot) -> list[_Row]:
    """Original, encoders, then the other controls; those that do not apply are left out unless they were named."""
    english, prompts = [case.english for case in cases], [case.prompt for case in cases]
    wanted = set(CONTROLS if controls is None else controls)
    rows = [_Row(ORIGINAL, None, english)]
    rows += [_Row(name, encoder, prompts) for name, encoder in encoders.items()]
    if "untranslated" in wanted and (english != prompts or controls):
        rows.append(_Row("untranslated", None, prompts, times=False))
    like, text_encoder = _backbone(pipe, encoders, backbone) if wanted & {"raw", "random"} else (None, None)
    if text_encoder is not None:
        if "raw" in wanted:
            rows.append(_Row("raw", raw_encoder(pipe, text_encoder, slot), prompts))
        if "random" in wanted:
            rows.append(_Row("random", random_encoder(pipe, text_encoder, like, slot), prompts))
    elif controls and wanted & {"raw", "random"}:
        raise ValueError("the controls raw and random need a new backbone: pass an encoder, or backbone=...")
    name, first = next(iter(encoders.items()), ("no encoder", None))
    states = earlier_states(first) if wanted & set(STAGES) and isinstance(first, (str, Path)) else {}
    for stage in STAGES:
        if stage in wanted and stage in states:
            rows.append(_Row(stage, first, prompts, times=False, state=states[stage]))
        elif stage in wanted and controls:
            raise ValueError(
                f"the control {stage} is the first encoder after that step of its alignment, and {name} keeps no such "
                "state: put first a folder of `textcond align` that had a later step too, and no adapter"
            )
    if "shuffled" in wanted and (controls or len({case.subject for case in cases}) > 1):
        rows.append(_Row("shuffled", None, shuffled_texts(cases), times=False))
    return rows


def _backbone(pipe, encoders, backbone) -> tuple[ConditioningEncoder | None, TextEncoder | None]:
    """The first encoder, if it has a bridge to imitate, and the text encoder of the controls."""
    denoiser = denoiser_of(pipe)
    first = next(iter(encoders.values()), None)
    if isinstance(first, (str, Path)):
        first = load_encoder(first, dtype=denoiser.dtype, device=denoiser.device)
    like = first if isinstance(first, ConditioningEncoder) else None
    if isinstance(backbone, (str, Path)):
        backbone = TextEncoder.from_pretrained(backbone, device=denoiser.device, dtype=denoiser.dtype)
    if backbone is None and like is not None:
        backbone = like.text_encoder
    return like, backbone


@contextmanager
def _installed(pipe: DiffusionPipeline, row: _Row, slot: str | None) -> Iterator[None]:
    with nullcontext() if row.encoder is None else swapped(pipe, row.encoder, slot):
        if row.state is not None:
            set_state(row.state, getattr(pipe, slot or family_of(pipe).alone[-1]), *_connectors(pipe))
        yield


def _slots(pipe: DiffusionPipeline) -> list[tuple[nn.Module, Any]]:
    pairs = [(getattr(pipe, slot.name), getattr(pipe, slot.tokenizer)) for slot in slots_of(pipe).values()]
    return [(encoder, tokenizer) for encoder, tokenizer in pairs if encoder is not None]


def _encoder_key(pipe: DiffusionPipeline) -> str:
    return fingerprint(*(part for pair in _slots(pipe) for part in pair), *_connectors(pipe))


def _connectors(pipe: DiffusionPipeline) -> list[nn.Module]:
    denoiser = denoiser_of(pipe)
    return [denoiser.connector] if isinstance(denoiser, TimestepAwareUNet) else []


def _fixed_parts(pipe: DiffusionPipeline) -> str:
    """What else decides a picture: the denoiser, the decoder and the scheduler."""
    replaced = {id(part) for pair in _slots(pipe) for part in pair}
    parts = [part for _, part in sorted(pipe.components.items()) if part is not None and id(part) not in replaced]
    return f"{type(pipe).__name__}-{fingerprint(*parts)}"


def _parameter_bytes(pipe: DiffusionPipeline) -> int:
    encoders = nn.ModuleList([encoder for encoder, _ in _slots(pipe)] + _connectors(pipe))
    # One encoder in two slots is counted once.
    return sum(parameter.numel() * parameter.element_size() for parameter in encoders.parameters())


def _judged(pictures, cases, guidance, seeds, judge, store: ResultCache) -> Measured:
    """Scores and spread of one row's pictures."""
    measured = Measured()
    for scale in guidance:
        by_seed = [pictures[scale, seed] for seed in seeds]
        measured.diversity[scale] = np.array([pixel_spread(group) for group in zip(*(made for made, _ in by_seed))])
        if judge is None:
            continue
        tables = [_scores(judge, made, names, cases, store) for made, names in by_seed]
        measured.scores[scale] = {name: np.stack([table[name] for table in tables], axis=1) for name in tables[0]}
    return measured


def _scores(judge: Judge, pictures, names, cases, store: ResultCache) -> Scores:
    identity = getattr(judge, "fingerprint", None)
    keys = [cache_key(judge=identity, picture=name, case=asdict(case)) for name, case in zip(names, cases)]
    found = [store.numbers(key) if identity else None for key in keys]
    missing = [index for index, numbers in enumerate(found) if numbers is None]
    for start in range(0, len(missing), _JUDGED_AT_ONCE):
        batch = missing[start : start + _JUDGED_AT_ONCE]
        given = judge([pictures[index] for index in batch], [cases[index] for index in batch])
        for place, index in enumerate(batch):
            values = {name: float(column[place]) for name, column in given.items()}
            found[index] = {name: None if np.isnan(value) else value for name, value in values.items()}
            if identity:
                store.keep_numbers(keys[index], found[index])
    columns = {name: [np.nan if row[name] is None else row[name] for row in found] for name in found[0]}
    return {name: np.array(column) for name, column in columns.items()}


def _time(pipe, text: str, steps: int, guidance: float, measured: Measured) -> None:
    """Median seconds of encoding one prompt and of its whole picture."""

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def draw():
        pipe(text, num_inference_steps=steps, guidance_scale=guidance, generator=torch.Generator().manual_seed(0))

    condition(pipe, [text])
    measured.encode_seconds = median(seconds(lambda: condition(pipe, [text])) for _ in range(_TIMED_ENCODINGS))
    measured.picture_seconds = median(seconds(draw) for _ in range(_TIMED_PICTURES))


def _conditionings(pipe, texts: list[str], batch_size: int) -> Conditioning:
    given = [condition(pipe, texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    return {name: _stacked([one[name] for one in given]) for name in given[0]}


def _stacked(parts: list[Tensor]) -> Tensor:
    """Batches after one another; one with fewer tokens repeats them, as a growing encoder does within a batch.

    Its lengths are powers of two of one length, and to cross-attention all tokens twice are the same as once.
    """
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.cat([part] * (longest // part.shape[1]), dim=1) for part in parts])


def _distances(
    pipe, cases, conditionings, denoisers, keys, seed, guidance, steps, store: ResultCache, batch_size, show
):
    """Timesteps, and by row the squared distances `(cases, timesteps)` with those of the empty prompt beside them.

    Rows without a conditioning are finished and taken from the store; of the others, cases that all have are.
    """
    found = {name: [store.numbers(key) for key in names] for name, names in keys.items()}
    wanted = [i for i in range(len(cases)) if any(found[name][i] is None for name in conditionings)]
    for start in tqdm(range(0, len(wanted), batch_size), desc="distances", unit="batch", disable=not show):
        batch = wanted[start : start + batch_size]
        timesteps, squared = squared_distances(
            pipe,
            [cases[index].english for index in batch],
            {
                row: {name: value[batch] for name, value in conditioning.items()}
                for row, conditioning in conditionings.items()
            },
            denoisers=denoisers,
            generators=[torch.Generator().manual_seed(latent_seed(cases[index], seed)) for index in batch],
            steps=steps,
            guidance=guidance,
        )
        for name in conditionings:
            for place, index in enumerate(batch):
                numbers = {"timesteps": timesteps, "distance": squared[name][place].tolist()}
                found[name][index] = numbers | {"empty": squared[EMPTY][place].tolist()}
                store.keep_numbers(keys[name][index], found[name][index])
    timesteps = found[ORIGINAL][0]["timesteps"]
    return timesteps, {
        name: tuple(np.array([numbers[kind] for numbers in rows]) for kind in ("distance", "empty"))
        for name, rows in found.items()
    }


def _relatives(judge, row: str, parts: Mapping[str, Any]) -> list[str]:
    """What a judge scores although it is made of the same weights; each is warned of."""
    model = getattr(judge, "model", None)
    notes = [
        f"the judge shares weights with the {name} of {row}: its scores favour its own relatives, use another judge"
        for name, part in parts.items()
        if model is not None and isinstance(part, nn.Module) and shares_weights(model, part)
    ]
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return notes


def _peak_memory() -> int | None:
    """Bytes of the process at its largest, all encoders together; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
