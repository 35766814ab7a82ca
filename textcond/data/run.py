"""Runs: the documents that a search gave each query, with ranks and mostly scores, read where they lie."""

from __future__ import annotations

import math
from hashlib import sha256
from pathlib import Path

from textcond.data.rows import Problems, open_bytes


class Run:
    """The lines of TREC (`qid Q0 docid rank score tag`) or MS MARCO (`qid docid rank`), in any order of queries.

    Only places of lines are held: a few hundred bytes a query.

    Args:
        path: the file, not packed, because it is read by place.
        problems: what becomes of malformed lines; by default the first is an error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a packed file, or a line of neither shape, by file and line.
    """

    def __init__(self, path: str | Path, *, problems: Problems | None = None):
        self.path = Path(path).expanduser()
        if self.path.name.endswith(".gz"):
            raise ValueError(f"{self.path} is packed, a run is read by place: unpack it")
        problems = problems or Problems()
        digest = sha256()
        # where stretches of lines of one query start and end
        self._stretches: dict[str, list[list[int]]] = {}
        start, last = 0, None
        with open_bytes(self.path) as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                row = problems.attempt(self.path, number, _parsed, line) if line.strip() else None
                if row is not None:
                    if row[0] != last:
                        last = row[0]
                        self._stretches.setdefault(last, []).append([start, start])
                    self._stretches[last][-1][1] = start + len(line)
                start += len(line)
        self.digest = digest.hexdigest()

    def documents(self, query_id: str) -> dict[str, float]:
        """Return ids and scores, best rank first, NaN for a run without scores; empty for an unknown query."""
        rows: list[tuple[str, str, int, float]] = []
        with self.path.open("rb") as file:
            for start, end in self._stretches.get(query_id, []):
                file.seek(start)
                for line in file.read(end - start).splitlines():
                    try:
                        rows.append(_parsed(line))
                    except ValueError:
                        continue  # reported when the run was opened
        found: dict[str, float] = {}
        for _, ident, _, score in sorted(rows, key=lambda row: row[2]):
            found.setdefault(ident, score)
        return found


def _parsed(line: bytes) -> tuple[str, str, int, float]:
    """Return query, document, rank and score."""
    text = line.decode("utf-8", "replace").strip()
    fields = text.split("\t") if "\t" in text else text.split()
    try:
        if len(fields) == 3:
            return fields[0], fields[1], int(fields[2]), math.nan
        if len(fields) == 6:
            return fields[0], fields[2], int(fields[3]), float(fields[4])
    except ValueError:
        pass
    raise ValueError(f"{text!r:.60} is no line of a run: write `qid docid rank` or the six TREC columns")
