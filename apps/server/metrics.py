"""Counters and histograms in the Prometheus text format, version 0.0.4."""

from __future__ import annotations

import threading
from bisect import bisect_left

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
NAMES = {
    "textcond_requests_total": ("counter", "Answered requests by path and status."),
    "textcond_request_seconds": ("histogram", "From the start of a request to the end of its answer, by path."),
    "textcond_requests_in_work": ("gauge", "Requests that wait or are worked on."),
    "textcond_batch_seconds": ("histogram", "Time of the encoder for a batch; its count is the number of batches."),
    "textcond_texts_total": ("counter", "Encoded texts."),
    "textcond_tokens_total": ("counter", "Encoded tokens."),
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Numbers by name and labels; every name is in `NAMES`. Safe to call from many threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._numbers: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], list[float]] = {}  # a count for each bucket and above, and the sum

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Raise a counter, or change a gauge by what may be negative."""
        key = (name, tuple(labels.items()))
        with self._lock:
            self._numbers[key] = self._numbers.get(key, 0) + value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add one duration to a histogram."""
        key = (name, tuple(labels.items()))
        with self._lock:
            histogram = self._histograms.setdefault(key, [0] * (len(SECONDS) + 2))
            histogram[bisect_left(SECONDS, seconds)] += 1
            histogram[-1] += seconds

    def text(self) -> str:
        """Everything there is, for a scrape."""
        with self._lock:
            numbers = sorted(self._numbers.items())
            histograms = sorted((key, list(values)) for key, values in self._histograms.items())
        rows: dict[str, list[str]] = {}
        for (name, labels), value in numbers:
            rows.setdefault(name, []).append(f"{name}{_braces(labels)} {value:.17g}")
        for (name, labels), values in histograms:
            count = 0
            for bound, number in zip((*map(str, SECONDS), "+Inf"), values):
                count += number
                rows.setdefault(name, []).append(f"{name}_bucket{_braces((*labels, ('le', bound)))} {count}")
            rows[name] += [f"{name}_sum{_braces(labels)} {values[-1]:.17g}", f"{name}_count{_braces(labels)} {count}"]
        parts = []
        for name, lines in rows.items():
            kind, explanation = NAMES[name]
            parts += [f"# HELP {name} {explanation}", f"# TYPE {name} {kind}", *lines]
        return "\n".join(parts) + "\n"


def _braces(labels: Labels) -> str:
    escaped = ((name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels)
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}" if labels else ""
