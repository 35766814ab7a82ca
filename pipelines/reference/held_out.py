"""Cases about concepts that alignment never reads of: what shows whether an encoder carries over what is new to it."""

from __future__ import annotations

from pathlib import Path

from textcond.pipelines.evaluation.cases import Case, write_cases

from .data import DEFAULT_COLOUR, ReferenceData, caption, is_held_out_concept
from .evaluate import drawn_styles

CASES = Path(__file__).parent / "cases"
# Alignment reads prompts of the first group, and never one of the second.
SEEN_LANGUAGES = ("en", "ja", "de", "fr", "es", "zh", "pt", "ru", "ar", "hi")
UNSEEN_LANGUAGES = ("ko", "it", "tr", "pl", "vi")


def style_cases(data: ReferenceData, concepts: int) -> list[Case]:
    """English "{name}, {style} style" for the held-out ones of the first `concepts`, styles taking turns."""
    styles = drawn_styles(data)
    cases = []
    for index in _held_out(data, concepts):
        name, style = data.concepts[index].name, styles[index][index % len(styles[index])]
        expected = {"concept": name, "style": style, "colour": DEFAULT_COLOUR}
        cases.append(Case(caption(data.concepts[index], style), expected=expected))
    return cases


def language_cases(data: ReferenceData, concepts: int) -> list[Case]:
    """The bare CLDR name in every language, English first, for the held-out ones of the first `concepts`.

    The teacher reads the bare English name, so that rows of two languages differ in the language alone.
    """
    cases = []
    for index in _held_out(data, concepts):
        concept = data.concepts[index]
        expected = {"concept": concept.name, "colour": DEFAULT_COLOUR}
        for language in (*SEEN_LANGUAGES, *UNSEEN_LANGUAGES):
            name = concept.name if language == "en" else concept.names.get(language)
            if name:
                cases.append(Case(name, concept.name, language, dict(expected)))
    return cases


def write_held_out(data: ReferenceData, concepts: int, folder: str | Path = CASES) -> None:
    """Write `styles.jsonl` and `languages.jsonl` for a denoiser that was taught the first `concepts`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_cases(folder / "styles.jsonl", style_cases(data, concepts))
    write_cases(folder / "languages.jsonl", language_cases(data, concepts))


def _held_out(data: ReferenceData, concepts: int) -> list[int]:
    return [index for index in range(concepts) if is_held_out_concept(data.concepts[index].name)]
