"""Encoders side by side: the untouched base model first, and how sure the differences are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from textcond.encoder import TextEncoder

from .retrieval import METRICS, RetrievalTask, Scores, evaluate_retrieval

RESAMPLES = 2000
# How well a pipeline draws under the encoder; the task and the metric of it.
GENERATION = "generation"


@dataclass
class Difference:
    """Mean difference of a metric to the base model, and its bootstrap interval `low` to `high`."""

    mean: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    values: Mapping[str, float],
    base: Mapping[str, float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> Difference:
    """Return the mean of `values - base` over queries with its percentile interval (Efron and Tibshirani, 1993).

    Queries are drawn with replacement, the same for both encoders (Sakai, 2006), so that how hard a query is cancels.

    Raises:
        ValueError: if the two do not hold the same queries, or none.
    """
    if values.keys() != base.keys() or not values:
        raise ValueError("a paired bootstrap needs both encoders' values of the same queries, and at least one query")
    differences = np.array([values[query] - base[query] for query in sorted(values)])
    generator = np.random.default_rng(seed)
    means = []
    # Many draws at once, but never more than some megabytes of them.
    for start in range(0, resamples, chunk := max(1, 1_000_000 // len(differences))):
        size = (min(chunk, resamples - start), len(differences))
        means.extend(differences[generator.integers(len(differences), size=size)].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(differences.mean()), float(low), float(high))


@dataclass
class Comparison:
    """Scores of encoders on tasks: encoder -> task -> `Scores`; the first encoder is the base model."""

    scores: dict[str, dict[str, Scores]]

    @property
    def base(self) -> str:
        """Name of the untouched base model."""
        return next(iter(self.scores))

    def metrics(self) -> list[str]:
        """Names of the metrics by which some task is scored."""
        return list(dict.fromkeys(metric for task in self.scores[self.base].values() for metric in task.per_query))

    def difference(self, encoder: str, task: str, metric: str = METRICS[0], *, seed: int = 0) -> Difference:
        """Return an encoder's difference to the base model on a task."""
        # a seed of the task and metric: intervals of unlike rows do not share their luck
        digest = hashlib.sha256(f"{seed} {task} {metric}".encode()).digest()
        return paired_bootstrap(
            self.scores[encoder][task].per_query[metric],
            self.scores[self.base][task].per_query[metric],
            seed=int.from_bytes(digest[:8], "big"),
        )

    def markdown(self, metric: str = METRICS[0], *, seed: int = 0) -> str:
        """Return a Markdown table of a metric in percent, with 95% intervals of differences to the base model.

        A difference in bold is one whose interval leaves out 0. Tasks without the metric are left out.
        """
        tasks = [task for task, scores in self.scores[self.base].items() if metric in scores.per_query]
        lines = [f"| {metric} x 100 | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
        for encoder, by_task in self.scores.items():
            cells = []
            for task in tasks:
                cell = f"{100 * by_task[task].mean(metric):.1f}"
                if encoder != self.base:
                    difference = self.difference(encoder, task, metric, seed=seed)
                    mean = f"{100 * difference.mean:+.1f}"
                    mean = f"**{mean}**" if difference.certain else mean
                    cell += f" ({mean}: {100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
                cells.append(cell)
            lines.append(f"| {encoder}{' (base)' if encoder == self.base else ''} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def compare(
    encoders: Sequence[str | Path] | Mapping[str, TextEncoder | Callable[[], TextEncoder]],
    tasks: Sequence[str | Path | RetrievalTask],
    *,
    split: str = "test",
    k: int = 100,
    metrics: Sequence[str] = METRICS,
    show_progress_bar: bool = False,
) -> Comparison:
    """Evaluate encoders on retrieval tasks; what `textcond eval retrieval` runs.

    Args:
        encoders: folders or hub ids, or encoders by name, the untouched base model first. Those given by folder or by
            a function are loaded one at a time.
        tasks: BEIR folders, or tasks.
        split: of the folders.
        k: documents ranked for a query.
        metrics: see `evaluate_retrieval`.
        show_progress_bar: show progress of encoding.

    Raises:
        ValueError: without encoders or tasks, or if two share a name.
    """
    if not encoders or not tasks:
        raise ValueError("comparing needs at least one encoder and one task")
    if not isinstance(encoders, Mapping):
        names = short_names(encoders)
        encoders = {name: (lambda path=path: TextEncoder.from_pretrained(path)) for name, path in zip(names, encoders)}
    loaded = [task if isinstance(task, RetrievalTask) else RetrievalTask.load(task, split) for task in tasks]
    if len({task.name for task in loaded}) < len(loaded):
        raise ValueError(f"two tasks share a name among {', '.join(task.name for task in loaded)}: rename a folder")
    scores: dict[str, dict[str, Scores]] = {}
    for name, given in encoders.items():
        encoder = given if isinstance(given, TextEncoder) else given()
        scores[name] = {
            task.name: evaluate_retrieval(encoder, task, k=k, metrics=metrics, show_progress_bar=show_progress_bar)
            for task in loaded
        }
    return Comparison(scores)


def short_names(encoders: Sequence[str | Path]) -> list[str]:
    """Return the last parts of paths, as many as it takes to tell them apart."""
    parts = [Path(encoder).parts for encoder in encoders]
    if len(set(parts)) < len(parts):
        raise ValueError(f"an encoder is given twice among {', '.join(map(str, encoders))}")
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return ["/".join(path[-depth:]) for path in parts]
