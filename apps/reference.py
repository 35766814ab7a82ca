"""`textcond reference`: build the reference model from nothing, or index its captions with another encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The reference model: build it, or index its captions with another encoder.")

ArtworkOption = Annotated[
    Path | None, typer.Option(help="A node_modules folder with the artwork packages; npm fetches them if left out.")
]


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Working folder; the finished model is OUT/emoji.")],
    stage: Annotated[
        list[str] | None, typer.Option(help="Run this stage alone (repeatable): data, autoencoder, clip, denoiser ...")
    ] = None,
    artwork: ArtworkOption = None,
    concepts: Annotated[int | None, typer.Option(min=1, help="How many concepts the denoiser learns.")] = None,
    denoiser_steps: Annotated[int | None, typer.Option(min=1, help="Training steps of the denoiser.")] = None,
) -> None:
    """Build the model: data, autoencoder, text encoder, denoiser, judge, scores, shipped folder. Ctrl-C is safe."""
    from textcond.pipelines.reference.build import STAGES, Recipe
    from textcond.pipelines.reference.build import build as run

    recipe = Recipe()
    if concepts:
        recipe.denoiser.concepts = concepts
    if denoiser_steps:
        recipe.denoiser.steps = denoiser_steps
    run(out, stage or STAGES, recipe=recipe, artwork=artwork)


@app.command()
def multilingual(
    out: Annotated[Path, typer.Option(help="Working folder; the finished encoder is OUT/encoder.")],
    packages: Annotated[
        Path, typer.Option(help="A node_modules folder with the text packages; see `pipelines/reference/phrases.py`.")
    ],
    reference: Annotated[Path, typer.Option(help="Working folder of `reference build`, for its data.")] = Path(
        "runs/emoji"
    ),
    teacher: Annotated[str, typer.Option(metavar="FOLDER|ID", help="The encoder that is distilled.")] = (
        "intfloat/multilingual-e5-small"
    ),
    start: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Go on from an encoder that an earlier run made.")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Run this stage alone (repeatable): phrases, vocabulary, teacher ...")
    ] = None,
    distil_steps: Annotated[int | None, typer.Option(min=1, help="Training steps of the distillation.")] = None,
    token_steps: Annotated[int | None, typer.Option(min=1, help="Training steps of the alignment.")] = None,
) -> None:
    """Make the multilingual encoder: phrases, vocabulary, distillation, fine-tuning, alignment. Ctrl-C is safe."""
    from textcond.pipelines.reference.multilingual import STAGES, MultilingualRecipe, build_multilingual

    recipe = MultilingualRecipe()
    if distil_steps:
        recipe.distil.steps = distil_steps
    if token_steps:
        recipe.align.options.token_steps = token_steps
    build_multilingual(
        out, stage or STAGES, phrases=out / "phrases", teacher=teacher, packages=packages,
        data=reference / "data", start=start, recipe=recipe,
    )  # fmt: skip
    print(out / "encoder" if "ship" in (stage or STAGES) else out)


@app.command()
def index(
    encoder: Annotated[str, typer.Option("--encoder", "-e", help="Folder, hub id or open_clip:MODEL/PRETRAINED.")],
    out: Annotated[Path, typer.Option(help="The index folder to write.")],
    language: Annotated[
        list[str] | None, typer.Option(help="CLDR language (repeatable), or all; English if left out.")
    ] = None,
    data: Annotated[
        Path, typer.Option(help="Working folder of `reference build`; its data stage runs if needed.")
    ] = Path("runs/emoji"),
    artwork: ArtworkOption = None,
) -> None:
    """Index the reference captions and pictures with another text encoder, in any language that CLDR has."""
    from textcond import TextEncoder
    from textcond.pipelines.reference.build import build as run
    from textcond.pipelines.reference.build import build_index
    from textcond.pipelines.reference.data import ReferenceData

    run(data, ["data"], artwork=artwork)
    made = build_index(
        ReferenceData.load(data / "data"), TextEncoder.from_pretrained(encoder), out, languages=language or ["en"]
    )
    print(f"{out}: {len(made):,} rows")
