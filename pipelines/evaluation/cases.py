"""Cases: what is asked of an encoder, what its teacher reads instead, and what a judge should see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from textcond.files import atomic_file
from textcond.pipelines.alignment.prompts import LONGEST


@dataclass
class Case:
    """One prompt to draw under every encoder.

    Attributes:
        prompt: what the encoder reads.
        english: what the pipeline's own encoder reads to show what is meant; the prompt itself where it is None.
        language: of the prompt; scores are told apart by it.
        expected: what a judge should see, by the judge's own words: `{"concept": "fox", "style": "noto"}`.
    """

    prompt: str
    english: str | None = None
    language: str = "en"
    expected: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.english is None:
            self.english = self.prompt
        for name in ("prompt", "english", "language"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} of a case is {getattr(self, name)!r}: write a string")
        for name in ("prompt", "english"):
            if not getattr(self, name).strip():
                raise ValueError(
                    f"{name} of a case is empty: the empty prompt is what distances are measured by, not a case"
                )
        if self.language == "all":
            raise ValueError("language of a case is 'all', which is what reports call them together: name one")
        if not isinstance(self.expected, dict) or not all(isinstance(value, str) for value in self.expected.values()):
            raise ValueError(f'expected of a case is {self.expected!r}: write an object such as {{"concept": "fox"}}')

    @property
    def subject(self) -> str:
        """What the case is about, the same in every language and style: the expected concept, or the English text."""
        return self.expected.get("concept", self.english)


def read_cases(path: str | Path, limit: int | None = None) -> list[Case]:
    """Read a `.jsonl` file of cases, or a text file with a prompt a line (`english <tab> other` for a translation).

    Blank lines are passed over.

    Args:
        limit: keep the first so many of each language.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the line that is no case or too long, or for a file without any.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompts file {path}: check the path")
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    cases, counts = [], {}
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip("\r\n")
                if not line.strip():
                    continue
                try:
                    if len(line) > LONGEST:
                        raise ValueError(f"{len(line):,} characters: write a case a line, of at most {LONGEST:,}")
                    case = parse(line)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                counts[case.language] = counts.get(case.language, 0) + 1
                if limit is None or counts[case.language] <= limit:
                    cases.append(case)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    if not cases:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return cases


def write_cases(path: str | Path, cases: Sequence[Case]) -> None:
    """Write cases as JSON lines, leaving out what is the default."""
    rows = []
    for case in cases:
        row = {"prompt": case.prompt, "english": case.english, "language": case.language, "expected": case.expected}
        if case.english == case.prompt:
            del row["english"]
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    with atomic_file(path) as file:
        file.write("".join(rows).encode())


def _from_json(line: str) -> Case:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error}): write one object a line") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError('no object with a "prompt": write {"prompt": "..."}')
    known = [item.name for item in fields(Case)]
    unknown = sorted(row.keys() - set(known))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}: choose from {', '.join(known)}")
    return Case(**row)


def _from_text(line: str) -> Case:
    columns = [column.strip() for column in line.split("\t")]
    if len(columns) > 2:
        raise ValueError(f"{len(columns)} columns: write `prompt`, or `english TAB other`")
    english, other = columns[0], columns[-1]
    return Case(other, english, "other") if other and len(columns) > 1 else Case(english)
