"""How well a pipeline draws under a text encoder that is being fine-tuned: aligned briefly, anew each time."""

from __future__ import annotations

import os
import tempfile
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from textcond import TextEncoder

from .alignment import AlignmentOptions, AlignmentPrompts, read_prompts
from .alignment.align import Aligner

# By the type of an option: what a value must be, and how it is asked for.
_KINDS = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a string"),
    tuple: ((list, tuple), "two numbers, as [2, 5]"),
    dict: (Mapping, "a table"),
}


def generation_score(
    pipe: DiffusionPipeline,
    /,
    prompts: str | os.PathLike | Iterable[str],
    held_out: str | os.PathLike | Iterable[str] | None = None,
    **options: Any,
) -> Callable[[TextEncoder], dict[str, float]]:
    """A function that scores a text encoder as what conditions a pipeline, for `textcond.training.train`.

    The encoder gets a new bridge from the same seed, is aligned for a few steps, and asked about the held-out prompts.
    The score of a prompt is 1 less the share of the empty prompt's distance to the teacher that is left: 1 is the
    teacher, 0 is as if nothing had been said. What a contrastive loss gains in retrieval can be lost here: it sees the
    pooled vector only, the denoiser reads every token.

    Args:
        prompts: what it is aligned on; see `read_prompts`.
        held_out: what it is scored on; None keeps some of `prompts` out for that.
        options: of AlignmentOptions; by default 150 steps of the token loss alone.

    Raises:
        FileNotFoundError: there is no such file of prompts.
        ValueError: bad prompts, or an option that is unknown or of the wrong kind.
    """
    _check(options)
    chosen = AlignmentOptions(**{"token_steps": 150, "denoiser_steps": 0, "validate_every": 1_000_000, **options})
    training = _read("prompts", prompts)
    if held_out is None:
        training, kept_out = training.split(min(chosen.held_out, len(training.teacher) // 2))
    else:
        kept_out = _read("held_out", held_out)
        training = training.without(kept_out.teacher)

    def score(encoder: TextEncoder) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            aligner = Aligner(pipe, encoder, training, kept_out, Path(folder), chosen)
            aligner.run()
            return {text: 1 - share for text, share in zip(kept_out.teacher, aligner.held_out_shares())}

    return score


def _read(name: str, source: Any) -> AlignmentPrompts:
    if not isinstance(source, (str, os.PathLike)):
        lines = list(source) if isinstance(source, Iterable) and not isinstance(source, Mapping) else [source]
        if wrong := [line for line in lines if not isinstance(line, (str, bytes))]:
            raise ValueError(f"{name}={wrong[0]!r}: give a text file with a prompt a line, or a list of prompts")
        source = lines
    return read_prompts(source)


def _check(options: Mapping[str, Any]) -> None:
    """Refuse what a recipe may say and AlignmentOptions cannot be asked."""
    hints = typing.get_type_hints(AlignmentOptions)
    for name, value in options.items():
        if name not in hints:
            raise ValueError(f"{name}={value!r}: there is no such option, choose from {', '.join(hints)}")
        hint = hints[name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [typing.get_origin(kind) or kind for kind in kinds]
        if not any(_is(value, kind) for kind in kinds):
            wanted = next(words for kind, (_, words) in _KINDS.items() if kind in kinds)
            raise ValueError(f"{name}={value!r}: give {wanted}")


def _is(value: Any, kind: type) -> bool:
    if kind is types.NoneType:
        return value is None
    if kind is tuple and isinstance(value, (list, tuple)):
        return len(value) == 2 and all(_is(one, float) for one in value)
    return isinstance(value, _KINDS[kind][0]) and isinstance(value, bool) == (kind is bool)
