"""The README's grid: one prompt a column, in several languages, under the native and the multilingual encoder.

    python tests/benchmarks/draw_languages.py pipelines/reference/languages.webp

The first cases of `cases/prompts.jsonl` and the first seed: nothing is selected.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from textcond.pipelines import load_reference, swapped
from textcond.pipelines.evaluation import read_cases
from textcond.pipelines.evaluation.pictures import latent_seed
from textcond.pipelines.reference import MULTILINGUAL
from textcond.pipelines.reference.held_out import CASES

LANGUAGES = {"en": "English", "ja": "Japanese", "de": "German", "zh": "Chinese", "ar": "Arabic", "ko": "Korean"}
COLUMNS, SIDE, GAP, LABEL = 7, 128, 4, 130


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", default=str(MULTILINGUAL))
    arguments = parser.parse_args()
    cases = read_cases(CASES / "prompts.jsonl", COLUMNS)
    said = {language: [case for case in cases if case.language == language] for language in LANGUAGES}
    pipe = load_reference()
    rows = [
        (f"native encoder\nreading {LANGUAGES[language]}", drawn(pipe, said[language])) for language in ("en", "ja")
    ]
    with swapped(pipe, arguments.encoder):
        rows += [(f"multilingual\nreading {name}", drawn(pipe, said[language])) for language, name in LANGUAGES.items()]
    sheet = Image.new("RGB", (LABEL + COLUMNS * (SIDE + GAP), len(rows) * (SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (label, pictures) in enumerate(rows):
        top = row * (SIDE + GAP) + GAP // 2
        pen.multiline_text((6, top + SIDE // 2 - 18), label, "black", font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (LABEL + column * (SIDE + GAP), top))
    sheet.save(arguments.out, quality=80)


def drawn(pipe, cases) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(latent_seed(case, 0)) for case in cases]
    prompts = [case.prompt for case in cases]
    return pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators).images


if __name__ == "__main__":
    main()
