"""What the sides of a grid go through: values as they are typed, and the settings of each picture."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from textcond.apps.metadata import Parameters
from textcond.apps.schedulers import SCHEDULERS

from .shared import MAX_CELLS, MAX_GUIDANCE, MAX_STEPS, SEEDS, Studio

NOTHING, WORDS = "nothing", "prompt words"
# What a side may go through, with the field of the parameters.
FIELDS = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "seed": "seed",
    "text encoder": "encoder",
    "sampler": "scheduler",
}
LIMITS = {"steps": (1, MAX_STEPS), "guidance": (1, MAX_GUIDANCE), "seed": (0, SEEDS - 1)}
_NUMBER = r"(\d+(?:\.\d+)?)"
_RANGE = re.compile(rf"{_NUMBER}\s*-\s*{_NUMBER}\s*(?:\(\s*{_NUMBER}\s*\))?")


@dataclass(frozen=True)
class Axis:
    """One side of a grid.

    Attributes:
        what: `NOTHING`, `WORDS` or one of `FIELDS`.
        values: what it takes, one after the other; of `WORDS`, the first is what the others replace.
    """

    what: str
    values: tuple[Any, ...] = (None,)

    def put(self, parameters: Parameters, value: Any) -> Parameters:
        """The parameters with that value."""
        if self.what == NOTHING:
            return parameters
        if self.what == WORDS:
            texts = (parameters.prompt, parameters.negative_prompt)
            prompt, negative = (text.replace(self.values[0], value) for text in texts)
            return replace(parameters, prompt=prompt, negative_prompt=negative)
        return replace(parameters, **{FIELDS[self.what]: value})

    def labels(self) -> list[str]:
        """What is written beside the pictures."""
        if self.what == NOTHING:
            return [""]
        if self.what in LIMITS:
            return [f"{self.what} {value:.12g}" for value in self.values]
        return [str(value).removesuffix("Scheduler") or "(nothing)" for value in self.values]


def read_axis(what: str, text: str, studio: Studio) -> Axis:
    """A side as it is typed: values parted by commas, numbers also as ranges, 2-8 or with a step 2-8(2).

    Raises:
        ValueError: a value is none, or out of range; it is named.
    """
    if what == NOTHING:
        return Axis(NOTHING)
    parts = [part.strip() for part in next(csv.reader([text.replace("\n", ",")], skipinitialspace=True), [])]
    if what != WORDS:
        parts = list(filter(None, parts))
    if not parts:
        raise ValueError(f"{what} has no values: type some, parted by commas, as {example(what, studio)}")
    if what in LIMITS:
        values = [number for part in parts for number in _numbers(what, part)]
    elif what == WORDS:
        if not parts[0]:
            raise ValueError("the first of the prompt words is what the others replace: it is empty")
        values = parts
    else:
        values = [_named(what, part, studio) for part in parts]
    values = list(dict.fromkeys(values))
    if len(values) > MAX_CELLS:
        raise ValueError(f"{what} has {len(values)} values: a grid has at most {MAX_CELLS} pictures")
    return Axis(what, tuple(values))


def example(what: str, studio: Studio) -> str:
    """Values to begin with; of words there are none that every prompt has."""
    return {
        "steps": "5, 10, 20, 40",
        "guidance": "1-7(2)",
        "seed": "1-4",
        "text encoder": ", ".join(studio.offered[:4]),
        "sampler": ", ".join(one.removesuffix("Scheduler") for one in SCHEDULERS[:3]),
    }.get(what, "")


def cells(first: Parameters, columns: Axis, rows: Axis) -> list[Parameters]:
    """The parameters of all pictures, row by row.

    Raises:
        ValueError: there are too many, both sides go through the same, or a word to replace is not there.
    """
    if columns.what == rows.what != WORDS:
        what = "nothing: choose what one of them" if rows.what == NOTHING else f"the {rows.what}: choose what one"
        raise ValueError(f"both sides go through {what} goes through instead")
    if (count := len(columns.values) * len(rows.values)) > MAX_CELLS:
        raise ValueError(f"that makes {count} pictures: a grid has at most {MAX_CELLS}")
    for axis in (columns, rows):
        if axis.what == WORDS and axis.values[0] not in first.prompt + "\n" + first.negative_prompt:
            raise ValueError(f"“{axis.values[0]}” is not in the prompt: the first value is what the others replace")
    return [columns.put(rows.put(first, row), column) for row in rows.values for column in columns.values]


def _numbers(what: str, text: str) -> Sequence[float]:
    least, most = LIMITS[what]
    if match := _RANGE.fullmatch(text):
        start, end, step = (float(number or 1) for number in match.groups())
        count = int(abs(end - start) / step + 1e-9) + 1 if step else MAX_CELLS + 1
        if count > MAX_CELLS:
            raise ValueError(f"{what} {text} is more than {MAX_CELLS} values: pass a larger step, as 1-9(4)")
        found = [start + number * step * (1 if end >= start else -1) for number in range(count)]
    else:
        try:
            found = [float(text)]
        except ValueError:
            raise ValueError(f"{what} {text!r} is no number: pass numbers, 2-8, or with a step 2-8(2)") from None
    for number in found:
        if not least <= number <= most:
            raise ValueError(f"{what} {number:g} is out of range: pass {least:g} to {most:g}")
    if what == "guidance":
        return found
    if any(number % 1 for number in found):
        raise ValueError(f"{what} {text} is no whole number")
    return [int(number) for number in found]


def _named(what: str, text: str, studio: Studio) -> str:
    if what == "sampler":
        names = {one.removesuffix("Scheduler").casefold(): one for one in SCHEDULERS}
        if (found := names.get(text.removesuffix("Scheduler").casefold())) is None:
            choices = ", ".join(one.removesuffix("Scheduler") for one in SCHEDULERS)
            raise ValueError(f"there is no sampler {text!r}: choose from {choices}")
        return found
    if not studio.takes(text):
        raise ValueError(f"encoder {text!r} is not offered here: choose from {', '.join(studio.offered)}")
    return text
