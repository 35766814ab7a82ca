"""Recipes: everything that decides a training, as dataclasses and as TOML."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textcond.losses import build_loss
from textcond.negatives import MiningOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WITHOUT_EFFECT = ("save_every", "tensorboard")  # what a resumed run may do otherwise, to the same weights
SHIPPED = Path(__file__).parent / "recipes"
ERRORS = ("raise", "skip")
DTYPES = ("float32", "bfloat16")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass
class Data:
    """A data set: anything that `textcond.data.read_examples` reads, and how often it gives a batch.

    - `on_error`: "raise" at the first malformed row, or "skip" such rows and say how many there were.
    - `prompt_template`: what an example's own prompt is put into; of bare instructions, as `textcond synthesize` writes
      them, `"Instruct: {prompt}\\nQuery: "`.
    """

    path: str
    format: str = "auto"
    weight: float | None = None
    on_error: str = "raise"
    prompt_template: str = "{prompt}"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.on_error not in ERRORS:
            raise ValueError(f"data {self.path}: on_error is {self.on_error!r}: use {' or '.join(ERRORS)}")
        if "on_error" in self.options:
            raise ValueError(f"data {self.path} has on_error among its options: put it beside path")


@dataclass
class Mining:
    """Negatives found for a stage's data before it begins, by the encoder as the stages before have left it.

    - `corpus`: what `textcond.negatives.Corpus` reads.
    - `sources`: weights by name: random, bm25, dense.
    - `teacher`, `cross_encoder`: whose scores filter and are written beside the texts, for distillation.
    - `options`: of `textcond.negatives.MiningOptions`.
    """

    corpus: str
    sources: dict[str, float] = field(default_factory=lambda: {"bm25": 1.0})
    teacher: str | None = None
    cross_encoder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        known = [option.name for option in dataclasses.fields(MiningOptions)]
        if unknown := [name for name in self.options if name not in known]:
            raise ValueError(f"mining has no option {unknown[0]!r}: the options are {', '.join(known)}")
        MiningOptions(**self.options)


@dataclass
class Lora:
    """A low-rank adapter of the backbone (Hu et al., 2021), made by peft and merged when the encoder is saved.

    - `dtype`: of the frozen backbone, "float32" or "bfloat16", which takes half the memory; the adapter is float32
      and so is what is saved, since the sum rounded to bfloat16 would lose most of a small change.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"lora, dtype is {self.dtype!r}: use {' or '.join(DTYPES)}")


@dataclass
class Evaluation:
    """BEIR folders on which the encoder is scored, and what is kept.

    - `every`: steps between scores; 0 for the end of a stage only.
    - `generation`: also score the encoder as what conditions a pipeline; options of
      `textcond.pipelines.generation_score`.
    - `metric`: its mean over the tasks decides which encoder is kept; "generation" for that score.
    - `patience`: scores in a row without a better one that end a stage; None for never.
    """

    tasks: list[str] = field(default_factory=list)
    generation: dict[str, Any] | None = None
    every: int = 0
    metric: str = "nDCG@10"
    patience: int | None = None


@dataclass
class Stage:
    """One stage of a training.

    - `mining`: find the negatives of every data set first.
    - `loss`: a table, or several that are summed, see `textcond.losses.build_loss`.
    - `batch_size`: queries of a joint batch, over all processes; or `batch_tokens`: tokens that a step encodes
      at most, of examples of like length: query, longest positive and as many of the longest negatives as are drawn.
    - `mini_batch`: texts that are in memory with their graph at a time (GradCache); None for all of a process.
    - `max_length`: tokens that are kept of a text while this stage trains; None for as many as the encoder keeps.
    - `negatives`: explicit negatives an example, drawn anew each time; fewer where an example has fewer.
    - `loss_learning_rate`: of a learned temperature, whose logarithm moves by about this much a step.
    - `warmup`: share of the steps in which the learning rate rises.
    - `teacher`, `guide`: encoders for losses that need them.
    """

    data: list[Data]
    steps: int
    name: str = ""
    mining: Mining | None = None
    loss: Any = field(default_factory=lambda: {"name": "infonce", "temperature": 0.05})
    batch_size: int | None = None
    batch_tokens: int | None = None
    mini_batch: int | None = None
    max_length: int | None = None
    negatives: int = 0
    learning_rate: float = 2e-5
    loss_learning_rate: float = 1e-3
    warmup: float = 0.1
    schedule: str = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    teacher: str | None = None
    guide: str | None = None

    def __post_init__(self):
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise ValueError(f"stage {self.name!r}: give batch_size or batch_tokens, one of them")
        if self.steps < 1 or self.negatives < 0 or not 0 <= self.warmup <= 1:
            raise ValueError(f"stage {self.name!r}: steps from 1, negatives from 0, warmup a share from 0 to 1")
        for option in ("mini_batch", "max_length"):
            if (value := getattr(self, option)) is not None and value < 1:
                raise ValueError(f"stage {self.name!r}: {option}={value}: give at least 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"stage {self.name!r}: schedule {self.schedule!r}: use one of {', '.join(SCHEDULES)}")
        if not self.data:
            raise ValueError(f"stage {self.name!r} has no data: give at least one data set")
        build_loss(self.loss)


@dataclass
class Recipe:
    """A training: a model, what is added to it, and the stages in their order.

    - `heads`: "sparse" and "tokens" add those heads of BGE-M3.
    - `mixed_precision`: "no" or "bf16".
    - `save_every`: seconds between checkpoints.
    - `tensorboard`: also write the figures for TensorBoard, to OUT/tensorboard.
    """

    model: str
    stages: list[Stage]
    pooling: str | None = None
    normalize: bool | None = True
    prompts: dict[str, str] = field(default_factory=dict)
    max_length: int | None = None
    heads: list[str] = field(default_factory=list)
    lora: Lora | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    mixed_precision: str = "no"
    seed: int = 0
    save_every: float = 180.0
    tensorboard: bool = False

    def __post_init__(self):
        if not self.stages:
            raise ValueError("the recipe has no [[stages]]: give at least one")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r}: use no or bf16")
        if unknown := set(self.heads) - {"sparse", "tokens"}:
            raise ValueError(f"heads {sorted(unknown)}: use sparse and tokens")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return dataclasses.asdict(self)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, or one that ships, by name.

    Args:
        name_or_path: a file, or one of the names in `textcond/training/recipes`.
        overrides: "key=value" with a value in TOML, such as `model="runs/base"` or `stages.0.steps=100`; what is not
            TOML is taken as a string.

    Raises:
        FileNotFoundError: for neither a file nor a known name.
        ValueError: what is not TOML, an unknown key, a key that is missing, or a value of the wrong kind.
    """
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        path = SHIPPED / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise FileNotFoundError(f"no recipe {name_or_path}: give a TOML file, or one of {known}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML ({error}): mend it") from error
    for override in overrides:
        _override(values, override)
    return _build(Recipe, values, path.name)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r}: give KEY=VALUE, such as stages.0.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    place: Any = values
    try:
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    except (ValueError, IndexError, AttributeError, TypeError):
        raise ValueError(f"{override!r}: the recipe has no place {key!r}") from None


def _build(kind: type, values: Any, where: str) -> Any:
    """Make a dataclass of a table; tables below it become the dataclasses that its fields say."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}: give a table")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [key for key in values if key not in fields]:
        raise ValueError(f"{where} has no option {unknown[0]!r}: the options are {', '.join(fields)}")
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where} lacks {missing[0]!r}: add it")
    return kind(**{key: _value(hints[key], value, f"{where}, {key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is Any or (origin is type(None) and value is None):
            return value
        if dataclasses.is_dataclass(origin):
            return _build(origin, value, where)
        if origin is list and isinstance(value, list):
            inner = typing.get_args(option)[0]
            return [_value(inner, item, f"{where}.{number}") for number, item in enumerate(value)]
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, origin) and not (isinstance(value, bool) and origin is not bool):
            return value
    raise ValueError(f"{where} is {value!r}: expected {getattr(hint, '__name__', hint)}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "key: was, is" for every value that differs, but for those that do not change what is trained."""
    old, new = ({key: value for key, value in _flat(values) if key not in WITHOUT_EFFECT} for values in (before, now))
    return [
        f"{key}: was {json.dumps(old.get(key))}, is {json.dumps(new.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _flat(item, f"{key}.{number}")
    else:
        yield key, value
