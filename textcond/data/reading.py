"""Examples from any known format, streamed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from textcond.data.example import Example
from textcond.data.formats import READERS, detect
from textcond.data.rows import Problems


class ExampleReader(Iterator[Example]):
    """The examples of a source, one at a time.

    `format` is what was given or detected; `skipped` counts the malformed rows so far, `first_problem` tells the first.
    """

    def __init__(self, path: Path, format: str, problems: Problems, options: dict[str, Any]):
        self.format = format
        self._problems = problems
        self._examples = READERS[format](path, problems, **options)

    @property
    def skipped(self) -> int:
        """Malformed rows that were skipped so far."""
        return self._problems.skipped

    @property
    def first_problem(self) -> str:
        """File, line and error of the first row that was skipped; empty if there is none."""
        return self._problems.first

    def __next__(self) -> Example:
        try:
            return next(self._examples)
        except StopIteration:
            self._problems.report()
            raise


def read_examples(
    path: str | Path, format: str = "auto", *, on_error: Literal["raise", "skip"] = "raise", **options: Any
) -> ExampleReader:
    """Stream the examples of a file or folder.

    Args:
        path: a file (.gz or not) or folder.
        format: "flagembedding", "sentence-transformers", "msmarco", "natural-questions", "dpr", "beir", "tevatron",
            "ids", "csv", "tsv", "parquet" or "parallel"; "auto" looks at the name, the folder and the first row.
        on_error: "raise" at the first malformed row, or "skip" such rows: they are counted in `skipped` of what is
            returned, and a warning at the end says how many there were.
        options: what the format takes (`textcond.data.formats`): `split`; `run` and `negatives` of msmarco and beir;
            `queries` and `documents` tables of ids and tevatron; `threshold` of labeled pairs and lists.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for an unknown format or option, and, while reading, for a malformed row: "FILE:LINE: what is
            wrong: how to mend it".
    """
    path = Path(path).expanduser()
    if format == "auto":
        format = detect(path)
    if format not in READERS:
        raise ValueError(f"format {format!r}: pass one of auto, {', '.join(READERS)}")
    known = [name for name in inspect.signature(READERS[format]).parameters if name not in ("path", "problems")]
    for name in options:
        if name not in known:
            raise ValueError(f"format {format!r} has no option {name!r}: it takes {', '.join(known) or 'none'}")
    return ExampleReader(path, format, Problems(on_error), options)
