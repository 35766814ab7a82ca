"""Losses from the tables of a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from textcond.losses.compose import Matryoshka, WeightedSum
from textcond.losses.distillation import ListwiseKL, MarginMSE, VectorMSE
from textcond.losses.infonce import InfoNCE
from textcond.losses.m3 import M3SelfDistillation
from textcond.losses.triplet import Triplet

LOSSES: dict[str, type[nn.Module]] = {
    "infonce": InfoNCE,
    "triplet": Triplet,
    "listwise_kl": ListwiseKL,
    "margin_mse": MarginMSE,
    "vector_mse": VectorMSE,
    "m3": M3SelfDistillation,
    "matryoshka": Matryoshka,
}


def build_loss(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> nn.Module:
    """A loss from its table, or a weighted sum from several.

    Args:
        spec: tables of "name" (a key of `LOSSES`), "weight" (1.0 by default) and the options of that loss. The option
            "loss" of "matryoshka" is a table, or several, of the same kind.

    Raises:
        ValueError: an unknown name or option, a weight that is no number, or whatever the loss refuses.

    Example:
        >>> spec = [{"name": "infonce", "temperature": 0.02}, {"name": "listwise_kl", "weight": 0.2}]
        >>> build_loss(spec).weights
        [1.0, 0.2]
        >>> build_loss({"name": "infonce", "temprature": 0.02})
        Traceback (most recent call last):
        ...
        ValueError: loss 'infonce' has no option 'temprature': choose from temperature, learn_temperature, \
temperature_bounds, directions, partition, in_batch, margin, margin_strategy, hardness_mode, hardness_strength, scores
    """
    tables = [spec] if isinstance(spec, Mapping) else list(spec)
    weighted = [_weighted(table) for table in tables]
    if len(weighted) == 1 and weighted[0][0] == 1:
        return weighted[0][1]
    return WeightedSum(weighted)


def _weighted(table: Mapping[str, Any]) -> tuple[float, nn.Module]:
    options = dict(table)
    name, weight = options.pop("name", None), options.pop("weight", 1.0)
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose from {', '.join(LOSSES)}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise ValueError(f"the weight of loss {name!r} is {weight!r}: give a number")
    parameters = inspect.signature(LOSSES[name]).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(f"loss {name!r} has no option {option!r}: choose from {', '.join(parameters)}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"loss {name!r} needs the option {option!r}: add it")
    if name == "matryoshka":
        options["loss"] = build_loss(options["loss"])
    return float(weight), LOSSES[name](**options)
