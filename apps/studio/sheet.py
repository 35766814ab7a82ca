"""A grid of pictures as one picture, with what each column and row stands for written beside them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import ceil

from PIL import Image, ImageDraw, ImageFont

GAP, SIZE = 6, 15
MAX_SIDE = 4096  # of all cells together: larger pictures are made smaller
MAX_LABEL = 220
# The first that has all letters of a label is taken: Linux, macOS and Windows have some of them.
FONTS = (
    "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "msgothic.ttc",
    "malgun.ttf",
)  # fmt: skip


def sheet(pictures: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Pictures, row by row, under the labels of their columns and behind those of their rows."""
    scale = min(1, MAX_SIDE / max(pictures[0].width * len(columns), pictures[0].height * len(rows)))
    width, height = (round(side * scale) for side in pictures[0].size)
    left = max(min(MAX_LABEL, ceil(max(_font(label).getlength(label) for label in rows))), 0)
    left += 2 * GAP if left else GAP
    top = GAP + (SIZE + 2 * GAP) * any(columns)
    page = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP)), "white")
    pen = ImageDraw.Draw(page)
    for number, label in enumerate(columns):
        at = (left + number * (width + GAP) + width / 2, top / 2)
        pen.text(at, _cut(label, width), "black", _font(label), anchor="mm")
    for number, label in enumerate(rows):
        at = (left - GAP, top + number * (height + GAP) + height / 2)
        pen.text(at, _cut(label, MAX_LABEL), "black", _font(label), anchor="rm")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, len(columns))
        small = picture.convert("RGB").resize((width, height))
        page.paste(small, (left + column * (width + GAP), top + row * (height + GAP)))
    return page


def _cut(text: str, width: int) -> str:
    font = _font(text)
    if font.getlength(text) <= width:
        return text
    return next((cut for end in range(len(text) - 1, 0, -1) if font.getlength(cut := f"{text[:end]}…") <= width), "…")


def _font(text: str) -> ImageFont.FreeTypeFont:
    fonts = _fonts()
    return next((font for font in fonts if all(_has(font, letter) for letter in text)), fonts[0])


@cache
def _fonts() -> list[ImageFont.FreeTypeFont]:
    found = []
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, SIZE))
        except OSError:
            continue
    return [*found, ImageFont.load_default(SIZE)]


@cache
def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    missing, drawn = (font.getmask(one) for one in ("\U0010fffe", letter))
    return letter.isspace() or (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))
