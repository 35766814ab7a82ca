"""`textcond eval conditioning`: encoders compared by the pictures that they condition."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .metadata import REFERENCE
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from textcond.pipelines.evaluation.harness import Judge

EMOJI, NO_JUDGE = "emoji", "none"


def conditioning(
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help="Cases as .jsonl, or text with a prompt (or english<TAB>other) a line.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of report.md, report.json, pictures, and of what is kept.")],
    encoders: Annotated[
        str, typer.Option("--encoders", "-e", metavar="A,B,C", help="Folders or hub ids, joined by commas.")
    ] = "",
    pipeline: Annotated[
        str, typer.Option("--pipeline", "-p", metavar="FOLDER|ID", help="Text-to-image pipeline.")
    ] = REFERENCE,
    judge: Annotated[
        str | None,
        typer.Option(
            help="emoji (of the reference model, its default for cases that say what to expect), none, or a CLIP-like "
            "model: FOLDER, ID, open_clip:MODEL/TAG."
        ),
    ] = None,
    among: Annotated[
        int | None, typer.Option(help="Concepts that the emoji judge chooses from; those of the model if left out.")
    ] = None,
    guidance: Annotated[str, typer.Option(metavar="X,Y", help="Every guidance to draw with.")] = "4",
    seeds: Annotated[str, typer.Option(metavar="N,M", help="Every seed to draw with; two show diversity.")] = "0",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    controls: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="raw, random, shuffled, untranslated; closed_form and tokens, of the first encoder after those steps "
            "of its alignment; all that apply if left out.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|ID", help="Text encoder of the controls raw and random; the first one's."),
    ] = None,
    slot: Annotated[str | None, typer.Option(help="Encoder to replace; all that one can serve if left out.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many cases of each language.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
) -> None:
    """Draw the same prompts from the same latents under every encoder, and report what was kept and gained.

    Ctrl-C is safe: the same command goes on, from the pictures that are finished.

    What a bridge of the same size makes of the pipeline's own encoder is one more control: align it, `textcond align
    --encoder native`, and name that folder among the encoders.
    """
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="textcond: %(message)s")
    logging.captureWarnings(True)
    from textcond.pipelines.evaluation import evaluate_conditioning, read_cases

    from .loading import find_encoder, load_pipeline

    cases = read_cases(prompts, limit)
    scales, numbers = _numbers(guidance, float, "--guidance"), _numbers(seeds, int, "--seeds")
    names = [find_encoder(name) for name in _listed(encoders)]
    if judge is None:
        judge = EMOJI if pipeline == REFERENCE and any(case.expected for case in cases) else NO_JUDGE
    scorer = _judge(judge, among)
    report = evaluate_conditioning(
        load_pipeline(pipeline, device=device, dtype=dtype),
        names,
        cases,
        judge=scorer,
        guidance=scales,
        seeds=numbers,
        steps=steps,
        controls=None if controls is None else _listed(controls),
        backbone=None if backbone is None else find_encoder(backbone),
        slot=slot,
        cache=out / "cache",
        batch_size=batch_size,
        show_progress_bar=True,
    )
    print(report.save(out))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, kind: type, option: str) -> list:
    try:
        return [kind(part) for part in _listed(text)]
    except ValueError:
        raise ValueError(f"{option} {text!r}: give numbers joined by commas, as 2,4,7") from None


def _judge(name: str, among: int | None) -> Judge | None:
    from textcond.pipelines.evaluation import ClipJudge, EmojiJudge

    if name == EMOJI:
        return EmojiJudge() if among is None else EmojiJudge(among=among)
    if among is not None:
        raise ValueError("--among is of the judge emoji: leave it out")
    return None if name == NO_JUDGE else ClipJudge(name)
