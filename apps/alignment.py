"""`textcond align`: an encoder trained to condition a pipeline, from prompts alone."""

from __future__ import annotations

import inspect
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from .metadata import NATIVE, REFERENCE
from .quiet import quiet_libraries

REPORTED = 12  # held-out prompts that are drawn for the report


def align(
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder",
            "-e",
            metavar="FOLDER|ID",
            help="Text encoder, or one that was aligned before; native is a copy of the pipeline's own.",
        ),
    ],
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help="A prompt a line, or english<TAB>other language; many thousands help.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the aligned encoder, and of what is needed to go on.")],
    pipeline: Annotated[
        str, typer.Option("--pipeline", "-p", metavar="FOLDER|ID", help="Pipeline that it is to condition.")
    ] = REFERENCE,
    held_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts that nothing trains on; some of PROMPTS if left out."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Pictures with metadata.jsonl (file_name, text), for an extra loss."),
    ] = None,
    anchors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts that a changing encoder is to find as before; PROMPTS if left out."),
    ] = None,
    slot: Annotated[str | None, typer.Option(help="Encoder to replace; all that one can serve if left out.")] = None,
    bridge: Annotated[
        str | None, typer.Option(help="resampler, linear, mlp or timestep; what the pipeline needs if left out.")
    ] = None,
    bridge_depth: Annotated[int, typer.Option(min=1, help="Blocks of a resampler.")] = 2,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the denoiser gets; as many as now if left out.")
    ] = None,
    layers: Annotated[str, typer.Option(help="last, or average: a learned average of the encoder's layers.")] = "last",
    lora_rank: Annotated[int, typer.Option(min=0, help="Also adapt the encoder itself; 0 leaves it as it is.")] = 0,
    train_backbone: Annotated[
        bool, typer.Option("--train-backbone", help="Train the encoder's own layers too, held to ANCHORS.")
    ] = False,
    token_steps: Annotated[int, typer.Option(min=0, help="Steps between token states, without the denoiser.")] = 2000,
    closed_form_prompts: Annotated[
        int, typer.Option(min=0, help="Texts of the ridge regression that comes first; 0 leaves it out.")
    ] = 4096,
    denoiser_steps: Annotated[int, typer.Option(min=0, help="Steps through the frozen denoiser.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of a step between token states.")] = 64,
    denoiser_batch_size: Annotated[int, typer.Option(min=1, help="Texts of a step through the denoiser.")] = 16,
    height: Annotated[
        int | None, typer.Option(min=1, help="Of the teacher's pictures; a small one is quick, and the text the same.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="See --height.")] = None,
    guidance: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Guidance of the teacher's sampling.")] = "2,5",
    learning_rate: Annotated[float, typer.Option(min=0, help="Of the bridge's matrices.")] = 4e-3,
    denoiser_learning_rate: Annotated[
        float, typer.Option(min=0, help="The same, in steps through the denoiser.")
    ] = 1e-4,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Scores in a row without a better one that end a stage.")
    ] = None,
    cache_limit: Annotated[float, typer.Option(min=0, help="Gigabytes of disk for the teacher's states.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...; a GPU if there is one.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the pipeline, float32 or bfloat16; what is trained is float32.")
    ] = "float32",
    mixed_precision: Annotated[str, typer.Option(help="no or bf16, for the denoiser.")] = "no",
    report: Annotated[bool, typer.Option(help="Draw held-out prompts before and after, into OUT/report.")] = True,
) -> None:
    """Train a bridge so that PIPELINE draws under ENCODER what it draws under its own. Interrupted, it goes on."""
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="textcond: %(message)s")
    from textcond.pipelines.alignment import AlignmentOptions
    from textcond.pipelines.alignment import align as run
    from textcond.pipelines.evaluation import Case, evaluate_conditioning

    from .loading import load_pipeline

    try:
        low, high = (float(part) for part in guidance.split(","))
    except ValueError:
        raise ValueError(f"--guidance {guidance!r}: give two numbers joined by a comma, as 2,5") from None
    options = AlignmentOptions(
        slot=slot,
        bridge=bridge,
        bridge_depth=bridge_depth,
        tokens=tokens,
        layers=layers,
        lora_rank=lora_rank,
        train_backbone=train_backbone,
        closed_form_prompts=closed_form_prompts,
        token_steps=token_steps,
        denoiser_steps=denoiser_steps,
        batch_size=batch_size,
        denoiser_batch_size=denoiser_batch_size,
        guidance_scale=(low, high),
        call={name: size for name, size in (("height", height), ("width", width)) if size is not None},
        learning_rate=learning_rate,
        denoiser_learning_rate=denoiser_learning_rate,
        patience=patience,
        cache_limit=cache_limit,
        seed=seed,
        mixed_precision=mixed_precision,
    )
    out = out.expanduser()
    pipe = load_pipeline(pipeline, device=device, dtype=dtype)
    run(pipe, _load(encoder, pipe), prompts, out, options, held_out=held_out, pictures=pictures, anchors=anchors)
    if report and not hasattr(pipe, "image_processor"):
        print(f"no report: {type(pipe).__name__} makes no pictures", file=sys.stderr)
    elif report and "image" in inspect.signature(pipe.__call__).parameters:
        print(f"no report: {type(pipe).__name__} draws after a picture, and there is none", file=sys.stderr)
    elif report:
        from textcond.folders import read_json

        lines = read_json(out / "alignment.json")["held_out_prompts"][:REPORTED]
        evaluate_conditioning(
            pipe,
            {"aligned": out},
            [Case(prompt=text, english=english) for english, text in lines],
            controls=["raw"],
            slot=slot,
            cache=out / "report" / "cache",
            show_progress_bar=True,
        ).save(out / "report")
    print(out)


def _load(name: str, pipe):
    """A ConditioningEncoder to go on with, or a text encoder that gets a bridge."""
    from textcond import TextEncoder
    from textcond.folders import model_folder, read_json
    from textcond.pipelines import retrieval_encoder

    from .loading import find_encoder

    if name == NATIVE:
        try:
            return retrieval_encoder(pipe)
        except ValueError:
            raise ValueError(
                f"--encoder native: a {type(pipe).__name__} has no CLIP text encoder: give a folder or hub id"
            ) from None
    found = model_folder(find_encoder(name))
    config = found / "config.json"
    if config.is_file() and read_json(config).get("model_type") == "textcond_conditioning":
        import torch

        from textcond.pipelines.swap import load_encoder

        return load_encoder(found, dtype=torch.float32, device=torch.device("cpu"))
    return TextEncoder.from_pretrained(found)
