"""Endless batches from several data sets: mixed by weight, without duplicates, resumable at any batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from textcond.data.example import Example
from textcond.data.example_file import ExampleFile

logger = logging.getLogger(__name__)

# rows are read, compared and grouped by length this many batches at a time, and no fewer rows than these
WINDOW_BATCHES, WINDOW_ROWS = 16, 4096
# rows that may wait for the next window where batches are counted in tokens; otherwise a batch of them
WAITING_ROWS = 256


class BatchSampler(Iterator[tuple[str, list[int]]]):
    """Draws `(data set name, row numbers)` without end; a data set that runs out is shuffled anew.

    A batch comes from one data set. An epoch of a data set gives every row exactly once. Rows that would repeat a query
    or a positive of their batch wait for a later one; where duplicates leave no other way, batches get smaller, and a
    warning says so once.

    Every process draws the same joint batches and takes its own share of each, so that none can run out of batches
    before the others.

    Args:
        datasets: the data sets by name.
        weights: how often each data set gives a batch, relative to the others; by their rows if not given.
        batch_size: rows of a joint batch, at most.
        batch_tokens: tokens of a joint batch, padded to its longest row, at most; a single row that is longer is a
            batch of its own. Needs `length`.
        length: tokens of an example; rows of similar length then share a batch.
        seed: decides everything.
        no_duplicates: keep rows that share a query or a positive text apart.
        drop_last: give full batches only: what is left of an epoch waits for the next one, and only the rows that
            duplicates keep out of full batches are left out.

    Raises:
        ValueError: for options that contradict each other, weights that do not fit the data sets, or, with
            `drop_last`, a data set that gives no full batch.
    """

    def __init__(
        self,
        datasets: Mapping[str, ExampleFile],
        *,
        weights: Mapping[str, float] | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        length: Callable[[Example], int] | None = None,
        seed: int = 0,
        no_duplicates: bool = True,
        drop_last: bool = False,
    ):
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        if batch_size is None and batch_tokens is None:
            raise ValueError("neither batch_size nor batch_tokens: give one of them")
        if batch_tokens is not None and length is None:
            raise ValueError("batch_tokens without length: say how to count an example's tokens")
        if not datasets:
            raise ValueError("no data set: give at least one")
        self.batch_size, self.batch_tokens, self.length = batch_size, batch_tokens, length
        self.seed, self.no_duplicates, self.drop_last = seed, no_duplicates, drop_last
        self._names = list(datasets)
        self._shares = _shares(datasets, weights)
        self._streams = {
            name: _Stream(name, place, dataset, self) for place, (name, dataset) in enumerate(datasets.items())
        }
        self._drawn = 0

    def __next__(self) -> tuple[str, list[int]]:
        # a generator of its own for each draw: the number of the draw is the whole state
        place = np.random.default_rng([self.seed, 0, self._drawn]).choice(len(self._names), p=self._shares)
        batch = self._streams[self._names[place]].next()
        self._drawn += 1
        return self._names[place], batch

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs, as JSON values: a few numbers and at most a batch of row numbers."""
        return {
            "options": self._options(),
            "drawn": self._drawn,
            "streams": {name: stream.state() for name, stream in self._streams.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the sampler of `state_dict` was; reads one window of rows, not what came before.

        Raises:
            ValueError: if that sampler had other data sets, other rows in them, or other options; names them.
        """
        for name, value in self._options().items():
            if state["options"].get(name) != value:
                raise ValueError(
                    f"the saved sampler had {name} = {state['options'].get(name)!r}, this one has {value!r}: "
                    "resume with what it was started with, or start anew"
                )
        self._drawn = state["drawn"]
        for name, stream in self._streams.items():
            stream.restore(state["streams"][name])

    def _options(self) -> dict[str, Any]:
        return {
            "rows": {name: len(stream.dataset) for name, stream in self._streams.items()},
            "content": {name: stream.dataset.digest for name, stream in self._streams.items()},
            "shares": self._shares.tolist(),
            "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens,
            "grouped by length": self.length is not None,
            "seed": self.seed,
            "no_duplicates": self.no_duplicates,
            "drop_last": self.drop_last,
        }


class _Stream:
    """The batches of one data set, planned a window of rows at a time.

    A window's batches follow from the seed, the epoch, where the window starts and which rows were left over before:
    these, and how many batches were taken, are the state.
    """

    def __init__(self, name: str, place: int, dataset: ExampleFile, sampler: BatchSampler):
        self.name, self.place, self.dataset, self.sampler = name, place, dataset, sampler
        self.epoch, self.start, self.waiting, self.taken = 0, 0, [], 0
        by_rows = sampler.batch_size is not None and sampler.batch_tokens is None
        self.most_waiting = sampler.batch_size if by_rows else WAITING_ROWS
        self.window = max(WINDOW_BATCHES * self.most_waiting, WINDOW_ROWS)
        self._plan: tuple[list[list[int]], list[int], int] | None = None
        self._order: tuple[int, np.ndarray] | None = None
        self._warned = False

    def next(self) -> list[int]:
        empty = 0
        while True:
            if self._plan is None:
                self._plan = self._planned()
            batches, waiting, end = self._plan
            if self.taken < len(batches):
                self.taken += 1
                return batches[self.taken - 1]
            empty = 0 if batches else empty + 1
            if empty * self.window > 2 * len(self.dataset) + self.window:
                raise ValueError(
                    f"data set {self.name!r} of {len(self.dataset)} rows gives no full batch: remove its duplicates, "
                    "lower the batch size or turn drop_last off"
                )
            self._plan, self.taken, self.waiting = None, 0, waiting
            self.epoch, self.start = (self.epoch + 1, 0) if end == len(self.dataset) else (self.epoch, end)

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "start": self.start, "waiting": self.waiting, "taken": self.taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.start, self.taken = state["epoch"], state["start"], state["taken"]
        self.waiting = list(state["waiting"])
        self._plan = None

    def _planned(self) -> tuple[list[list[int]], list[int], int]:
        """Return the window's batches, the rows that wait for the next window, and where that starts."""
        rng_key = [self.sampler.seed, 1, self.place, self.epoch]
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, np.random.default_rng(rng_key).permutation(len(self.dataset))
        order = self._order[1]
        end = min(self.start + self.window - len(self.waiting), len(order))
        rows = self.waiting + order[self.start : end].tolist()
        keys, lengths = zip(*map(self._seen, rows)) if rows else ((), ())
        rng = np.random.default_rng([*rng_key, self.start])
        # from short to long or from long to short: what waits must not be the longest rows every time
        full, short = self._packed(rows, keys, lengths, sign=1 if rng.random() < 0.5 else -1)
        ends = end == len(order)
        waiting: list[int] = []
        if not ends or self.sampler.drop_last:
            # the smallest wait, so that the short batches that cannot wait are as large as they can be
            while short and len(waiting) + len(short[-1]) <= self.most_waiting:
                waiting += short.pop()
        if len(short) > ends + len(full) // 10:  # one is what is left of an epoch
            self._warn(short)
        batches = full if self.sampler.drop_last else full + short
        if self.sampler.length:
            rng.shuffle(batches)
        return batches, waiting, end

    def _seen(self, row: int) -> tuple[list[int], int]:
        """Return hashes of what a batch must not hold twice, and the row's length: a window of texts may be large."""
        keys = [hash(("row", row))]  # one that waited since the last epoch may come twice
        if not self.sampler.no_duplicates and self.sampler.length is None:
            return keys, 0
        example = self.dataset[row]
        if self.sampler.no_duplicates:
            keys.append(hash(("query", example.query.strip())))
            keys += (hash(("positive", text.strip())) for text in example.positives)
        return keys, 0 if self.sampler.length is None else self.sampler.length(example)

    def _packed(
        self, rows: list[int], keys: Sequence[list[int]], lengths: Sequence[int], *, sign: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Cut rows into batches: the full ones, and the others, largest first."""
        most_rows, most_tokens = self.sampler.batch_size, self.sampler.batch_tokens
        batches: list[list[int]] = []
        longest: list[int] = []
        # after[b]: the first batch from b on that may take a row; paths are halved as they are followed
        after: list[int] = [0]
        last: dict[int, int] = {}

        def open_from(batch: int) -> int:
            while after[batch] != batch:
                after[batch] = after[after[batch]]
                batch = after[batch]
            return batch

        for place in sorted(range(len(rows)), key=lambda place: sign * lengths[place]):
            batch = open_from(max((last.get(key, -1) for key in keys[place]), default=-1) + 1)
            # in order of length, a batch that has no room for this row has none for any later one
            while (
                batch < len(batches)
                and most_tokens
                and (len(batches[batch]) + 1) * max(longest[batch], lengths[place]) > most_tokens
            ):
                after[batch] = batch + 1
                batch = open_from(batch)
            if batch == len(batches):
                batches.append([])
                longest.append(0)
                after.append(batch + 1)
            longest[batch] = max(longest[batch], lengths[place])
            batches[batch].append(rows[place])
            if len(batches[batch]) == most_rows:
                after[batch] = batch + 1
            for key in keys[place]:
                last[key] = batch
        full = [rows for batch, rows in enumerate(batches) if after[batch] != batch]
        short = [rows for batch, rows in enumerate(batches) if after[batch] == batch]
        return full, sorted(short, key=len, reverse=True)

    def _warn(self, short: list[list[int]]) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "data set %r: duplicate queries or positives leave %d batches short, the smallest of %d rows",
                self.name,
                len(short),
                len(short[-1]),
            )


def _shares(datasets: Mapping[str, ExampleFile], weights: Mapping[str, float] | None) -> np.ndarray:
    if weights is None:
        weights = {name: len(dataset) for name, dataset in datasets.items()}
    if set(weights) != set(datasets):
        raise ValueError(
            f"weights for {', '.join(map(repr, weights))}, data sets {', '.join(map(repr, datasets))}: "
            "give a weight for each"
        )
    values = np.array([float(weights[name]) for name in datasets])
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise ValueError(f"weights {dict(weights)}: give numbers of at least 0, not all 0")
    return values / values.sum()
