"""The text of an alignment: prompts alone, with or without their translations."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LONGEST = 20_000  # characters; no encoder reads more of a line


@dataclass
class AlignmentPrompts:
    """What the teacher reads, each text once, and what the student reads for it.

    Attributes:
        teacher: distinct texts, in the language that the pipeline's own encoder knows.
        rows: `(index into teacher, text)` for every text that the student reads: the teacher's own, and translations.
    """

    teacher: list[str]
    rows: list[tuple[int, str]]

    def texts(self, rows: Iterable[int]) -> tuple[list[int], list[str]]:
        """Indices into `teacher` and student texts of some rows."""
        pairs = [self.rows[row] for row in rows]
        return [index for index, _ in pairs], [text for _, text in pairs]

    def split(self, held_out: int) -> tuple[AlignmentPrompts, AlignmentPrompts]:
        """Training and held-out prompts: `held_out` of the teacher's texts with all that is said for them.

        Which ones depends on the texts alone, so a longer file keeps most of them.
        """
        ranked = sorted(range(len(self.teacher)), key=lambda index: _digest(self.teacher[index]))
        chosen = set(ranked[:held_out])
        return self._part(set(range(len(self.teacher))) - chosen), self._part(chosen)

    def without(self, teacher: Iterable[str]) -> AlignmentPrompts:
        """All but some of the teacher's texts and what is said for them.

        Raises:
            ValueError: nothing is left.
        """
        gone = set(teacher)
        kept = {index for index, text in enumerate(self.teacher) if text not in gone}
        if not kept:
            raise ValueError("every prompt is held out too, which leaves none to train on: give others")
        return self if len(kept) == len(self.teacher) else self._part(kept)

    def _part(self, kept: set[int]) -> AlignmentPrompts:
        places = {index: place for place, index in enumerate(sorted(kept))}
        rows = [(places[index], text) for index, text in self.rows if index in places]
        return AlignmentPrompts([self.teacher[index] for index in places], rows)

    def fingerprint(self) -> str:
        """A hash of every text in its order."""
        digest = hashlib.sha256()
        for index, text in self.rows:
            digest.update(f"{self.teacher[index]}\t{text}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def read_prompts(source: str | os.PathLike | Iterable[str]) -> AlignmentPrompts:
    """Read a text file of one prompt a line, or lines from anywhere; `english TAB other` is parallel text.

    Of parallel text the teacher reads the first half, the student both. Blank lines are passed over, repeated ones
    count once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no prompt at all, or a line that is not UTF-8, too long, or of more than two columns, by its number.
    """
    name = "prompts"
    if isinstance(source, (str, os.PathLike)):
        name, path = str(source), Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no file {source}: give a text file with a prompt a line")
        lines: Iterable[str | bytes] = path.open("rb")
    else:
        lines = source
    places: dict[str, int] = {}
    rows: dict[tuple[int, str], None] = {}
    for number, raw in enumerate(lines, 1):
        where = f"{name}, line {number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(raw, bytes) else raw
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 ({error.reason}): convert the file to UTF-8") from None
        line = line.rstrip("\r\n")
        if len(line) > LONGEST:
            raise ValueError(f"{where} has {len(line):,} characters: write a prompt a line, of at most {LONGEST:,}")
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) > 2:
            raise ValueError(f"{where} has {len(columns)} columns: write `prompt`, or `english TAB other`")
        if not columns[0]:
            if any(columns):
                raise ValueError(f"{where} has a translation and no English before the tab: add it")
            continue
        place = places.setdefault(columns[0], len(places))
        for text in columns:
            if text:
                rows[place, text] = None
    if not places:
        raise ValueError(f"{name} holds no prompt: write one a line")
    return AlignmentPrompts(list(places), list(rows))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
