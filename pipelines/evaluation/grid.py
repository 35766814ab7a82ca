"""The picture grid: one prompt, several languages, several encoders, one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from .cases import Case

PROMPTS, LANGUAGES, COLUMNS = 4, 8, 8
CELL, GAP, MARGIN = 112, 4, 150
LONGEST = 200  # characters of a prompt that are shown


def grid_blocks(cases: Sequence[Case]) -> list[list[int]]:
    """Which cases to show together: a prompt in its languages a block, or one block of prompts in one language."""
    by_english: dict[str, dict[str, int]] = {}
    for index, case in enumerate(cases):
        by_english.setdefault(case.english, {}).setdefault(case.language, index)
    several = [list(languages.values())[:LANGUAGES] for languages in by_english.values() if len(languages) > 1]
    if several:
        # Spread over the file, whose first cases may all be of one kind.
        count = min(PROMPTS, len(several))
        return [several[place * len(several) // count] for place in range(count)]
    firsts = [next(iter(languages.values())) for languages in by_english.values()]
    return [firsts[:COLUMNS]]


def picture_grid(cases: Sequence[Case], pictures: Mapping[str, Mapping[int, Image.Image]]) -> Image.Image:
    """Blocks under one another: a row an encoder, a column a case.

    Args:
        pictures: by encoder, by index of the case.
    """
    blocks = [_block(cases, indices, pictures) for indices in grid_blocks(cases)]
    sheet = Image.new("RGB", (max(block.width for block in blocks), sum(block.height for block in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def _block(cases, indices: list[int], pictures) -> Image.Image:
    font, pitch, head = ImageFont.load_default(12), CELL + GAP, 42
    sheet = Image.new("RGB", (MARGIN + len(indices) * pitch, head + len(pictures) * pitch + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    translated = len({cases[index].language for index in indices}) > 1
    if translated:
        title, large = cases[indices[0]].english, ImageFont.load_default(14)
        draw.text((4, 4), shortened(title, sheet.width - 8, large), fill="black", font=large)
    for column, index in enumerate(indices):
        label = cases[index].language if translated else cases[index].english
        draw.text((MARGIN + column * pitch, 24), shortened(label, CELL, font), fill="black", font=font)
    for row, (name, by_case) in enumerate(pictures.items()):
        top = head + row * pitch
        draw.text((4, top + CELL // 2 - 8), shortened(name, MARGIN - 8, font), fill="black", font=font)
        for column, index in enumerate(indices):
            cell = by_case[index].resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(cell, (MARGIN + column * pitch, top))
    return sheet


def shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """A text on one line, with its end left out where it is wider than `width` pixels."""
    text = brief(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def brief(text: str) -> str:
    """A text on one line, with its end left out where it has more than `LONGEST` characters."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
