"""Cases that alignment never reads: what shows whether an encoder carries over what is new to it."""

from __future__ import annotations

from pathlib import Path

from textcond.pipelines.evaluation.cases import Case, write_cases

from .data import COLOURS, Concept, ReferenceData, caption, is_held_out, is_held_out_concept, is_unseen_concept
from .evaluate import drawn_styles
from .phrases import CAPTIONS, foreign_caption

CASES = Path(__file__).parent / "cases"
KINDS = {
    "prompts": "concepts that alignment reads of, in combinations with style and colour that it does not",
    "dictionary": "concepts that it knows from dictionaries and WordNet alone",
    "unseen": "concepts of which it reads nothing",
    "wordings": "the cases of the first kind, in sentences like none that it reads",
}
# A sentence, and the colours in the form that it asks for, in the order of `COLOURS`.
SENTENCES = {
    "en": (
        "I want {name} drawn like {style}, behind it everything {colour}",
        " ".join(COLOURS),
    ),
    "ja": ("{style}の絵柄で{name}を描いて、後ろは{colour}色", "白 赤 オレンジ 黄 緑 青 紫 ピンク 茶 灰 黒"),
    "de": (
        "bitte {name}, Hintergrund {colour}, gezeichnet wie bei {style}",
        "weiß rot orange gelb grün blau lila rosa braun grau schwarz",
    ),
    "zh": (
        "请画{name},背景用{colour},像{style}那样",
        "白色 红色 橙色 黄色 绿色 蓝色 紫色 粉色 棕色 灰色 黑色",
    ),
    "ar": (
        "ارسم {name} بطريقة {style} والخلفية {colour}",
        "بيضاء حمراء برتقالية صفراء خضراء زرقاء بنفسجية وردية بنية رمادية سوداء",
    ),
}
CONCEPTS_A_KIND = 60


def held_out_cases(data: ReferenceData, concepts: int) -> dict[str, list[Case]]:
    """For each of `KINDS`, cases of some of the first `concepts`, in every language that the kind has, English first.

    A caption names a style in which the concept was drawn and a colour whose combination neither the denoiser nor an
    alignment was shown. Names in other languages are those of CLDR.
    """
    by_kind: dict[str, list[int]] = {kind: [] for kind in ("prompts", "dictionary", "unseen")}
    for index in range(concepts):
        name = data.concepts[index].name
        kind = "unseen" if is_unseen_concept(name) else "dictionary" if is_held_out_concept(name) else "prompts"
        by_kind[kind].append(index)
    styles = drawn_styles(data)
    cases: dict[str, list[Case]] = {}
    for kind, found in by_kind.items():
        every = max(1, len(found) // CONCEPTS_A_KIND)
        cases[kind] = [
            case for index in found[::every][:CONCEPTS_A_KIND] for case in _captions(data, index, styles[index])
        ]
    named = {concept.name: concept for concept in data.concepts[:concepts]}
    cases["wordings"] = [
        _sentence(case, named[case.expected["concept"]]) for case in cases["prompts"] if case.language in SENTENCES
    ]
    return cases


def _sentence(case: Case, concept: Concept) -> Case:
    template, colours = SENTENCES[case.language]
    colour = colours.split()[list(COLOURS).index(case.expected["colour"])]
    name = concept.name if case.language == "en" else concept.names[case.language]
    text = template.format(name=name, style=case.expected["style"], colour=colour)
    return Case(text, case.english, case.language, dict(case.expected))


def _captions(data: ReferenceData, index: int, styles: list[str]) -> list[Case]:
    concept = data.concepts[index]
    new = [(style, colour) for colour in COLOURS for style in styles if is_held_out(concept.name, style, colour)]
    if not new:
        return []
    style, colour = new[index % len(new)]
    expected = {"concept": concept.name, "style": style, "colour": colour}
    english = caption(concept, style, colour)
    cases = [Case(english, expected=expected)]
    for language in CAPTIONS:
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
