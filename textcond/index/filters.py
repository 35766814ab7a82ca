"""Filters over metadata: what a row must say to be found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Scalar = str | int | float | bool | None
Filter = Mapping[str, Any]
BOUNDS = ("gt", "gte", "lt", "lte")
MOST_FIELDS, MOST_VALUES = 100, 1000  # of one filter, and of one field of it: a filter comes with a search
INTEGERS = range(-(2**63), 2**64)  # others would be rounded where metadata are kept


@dataclass(frozen=True)
class Condition:
    """What one metadata field must be: one of `values`, or within `bounds`; the other one is empty."""

    field: str
    values: tuple[Scalar, ...] = ()
    bounds: tuple[tuple[str, str | int | float], ...] = ()

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a row with this metadata fulfils the condition; what stores answer must agree with it."""
        value = metadata.get(self.field)
        if self.values:
            return any(_kind(value) == _kind(wanted) and value == wanted for wanted in self.values)
        return all(_kind(value) == _kind(limit) and _COMPARE[bound](value, limit) for bound, limit in self.bounds)


_COMPARE = {
    "gt": lambda value, limit: value > limit,
    "gte": lambda value, limit: value >= limit,
    "lt": lambda value, limit: value < limit,
    "lte": lambda value, limit: value <= limit,
}


def _kind(value: Any) -> type:
    """A number is a number, whole or not; a truth value is none."""
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def conditions(filter: Filter | None) -> list[Condition]:
    """Return what a filter asks for: all of the conditions must hold.

    `{"style": "twemoji", "language": ["ja", "de"], "steps": {"gte": 20, "lt": 50}}`: a value that the field equals, a
    list of values of which it equals one, or bounds on it (`gt`, `gte`, `lt`, `lte`; numbers against numbers, strings
    against strings in the order of code points, as ISO dates want it). None equals a field that is null or not there.

    Raises:
        TypeError: for a filter that is not a dict of such values.
        ValueError: for a bound that is none of the four, an empty list, more than 100 fields or 1,000 values of one, an
            integer to equal that has more than 64 bits, or half of a surrogate pair.
    """
    if filter is None:
        return []
    if not isinstance(filter, Mapping):
        raise TypeError(f"a filter is a dict over metadata such as {{'style': 'noto'}}, got {type(filter).__name__}")
    if len(filter) > MOST_FIELDS:
        raise ValueError(f"a filter over {len(filter):,} fields: at most {MOST_FIELDS} are asked for, leave some out")
    found = []
    for field, wanted in filter.items():
        if not isinstance(field, str) or not field:
            raise TypeError(f"a filter names metadata fields by strings, got {field!r}")
        check_unicode(field, "filter")
        if isinstance(wanted, Mapping):
            if not wanted or not set(wanted) <= set(BOUNDS):
                raise ValueError(f"filter {field!r} has bounds {sorted(map(str, wanted))}: use {', '.join(BOUNDS)}")
            for bound, limit in wanted.items():
                if isinstance(limit, bool) or not isinstance(limit, str | int | float) or limit != limit:
                    raise TypeError(f"filter {field!r}: bound {bound} is {limit!r}, give a number or a string")
                if isinstance(limit, str):
                    check_unicode(limit, f"filter {field!r}: bound {bound}")
            found.append(Condition(field, bounds=tuple(wanted.items())))
            continue
        values = tuple(wanted) if isinstance(wanted, list | tuple | set | frozenset) else (wanted,)
        if not values:
            raise ValueError(f"filter {field!r} lists no value: leave the field out, or give at least one")
        if len(values) > MOST_VALUES:
            raise ValueError(
                f"filter {field!r} lists {len(values):,} values: at most {MOST_VALUES:,} are asked for, split the list"
            )
        for value in values:
            if (value is not None and not isinstance(value, str | int | float | bool)) or value != value:
                raise TypeError(
                    f"filter {field!r} asks for {value!r:.60}: give a string, a number, a truth value or None"
                )
            if isinstance(value, str):
                check_unicode(value, f"filter {field!r}:")
            elif isinstance(value, int) and value not in INTEGERS:
                raise ValueError(
                    f"filter {field!r} asks for an integer of {value.bit_length():,} bits: metadata hold those from "
                    "-2**63 to 2**64 - 1, give one of them"
                )
        found.append(Condition(field, values=values))
    return found


def check_unicode(text: str, name: str) -> None:
    """Raise a ValueError for half of a surrogate pair, which UTF-8 and so no store can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {text!r:.80} holds half of a surrogate pair: write it again as UTF-8") from None
