"""Cases that alignment never reads: what shows whether an encoder carries over what is new to it."""

from __future__ import annotations

from pathlib import Path

from textcond.pipelines.evaluation.cases import Case, write_cases

from .data import COLOURS, ReferenceData, caption, is_held_out, is_held_out_concept, is_unseen_concept
from .evaluate import drawn_styles
from .phrases import ALIGNED, UNSEEN, foreign_caption

CASES = Path(__file__).parent / "cases"
# Alignment reads prompts of the first group, and never one of the second.
SEEN_LANGUAGES, UNSEEN_LANGUAGES = ("en", *ALIGNED), UNSEEN
KINDS = {
    "prompts": "concepts that alignment reads of, in combinations with style and colour that it does not",
    "dictionary": "concepts that it knows from dictionaries and WordNet alone",
    "unseen": "concepts of which it reads nothing",
}
CONCEPTS_A_KIND = 60


def held_out_cases(data: ReferenceData, concepts: int) -> dict[str, list[Case]]:
    """For each of `KINDS`, captions of some of the first `concepts` in every language, English first.

    A caption names a style in which the concept was drawn and a colour whose combination neither the denoiser nor an
    alignment was shown. Names in other languages are those of CLDR.
    """
    by_kind: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for index in range(concepts):
        name = data.concepts[index].name
        kind = "unseen" if is_unseen_concept(name) else "dictionary" if is_held_out_concept(name) else "prompts"
        by_kind[kind].append(index)
    styles = drawn_styles(data)
    cases: dict[str, list[Case]] = {}
    for kind, found in by_kind.items():
        every = max(1, len(found) // CONCEPTS_A_KIND)
        cases[kind] = [
            case for index in found[::every][:CONCEPTS_A_KIND] for case in _cases(data, index, styles[index])
        ]
    return cases


def _cases(data: ReferenceData, index: int, styles: list[str]) -> list[Case]:
    concept = data.concepts[index]
    new = [(style, colour) for colour in COLOURS for style in styles if is_held_out(concept.name, style, colour)]
    if not new:
        return []
    style, colour = new[index % len(new)]
    expected = {"concept": concept.name, "style": style, "colour": colour}
    english = caption(concept, style, colour)
    cases = [Case(english, expected=expected)]
    for language in (*SEEN_LANGUAGES[1:], *UNSEEN_LANGUAGES):
        if language in concept.names:
            text = foreign_caption(concept.names[language], language, style, colour)
            cases.append(Case(text, english, language, dict(expected)))
    return cases


def write_held_out(data: ReferenceData, concepts: int, folder: str | Path = CASES) -> None:
    """Write a file for each of `KINDS`, for a denoiser that was taught the first `concepts`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, cases in held_out_cases(data, concepts).items():
        write_cases(folder / f"{kind}.jsonl", cases)
