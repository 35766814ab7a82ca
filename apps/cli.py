"""The `textcond` command. Heavy libraries are imported inside the commands, so that help answers at once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import alignment, conditioning, index, reference, training
from .errors import debugging, one_line
from .files import check_output
from .metadata import MAX_SEED, MULTILINGUAL, REFERENCE, Parameters, read_parameters, usual_encoder, write_png
from .quiet import quiet_libraries
from .server.command import serve
from .vectors import SUFFIXES, chunks, read_lines, vector_writer

if TYPE_CHECKING:
    from rich.progress import Progress

app = typer.Typer(
    help="Text encoders for diffusion pipelines and for finding prompts and pictures, with the same weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(reference.app, name="reference")
app.add_typer(index.index, name="index")
app.add_typer(training.evaluation, name="eval")
training.evaluation.command()(conditioning.conditioning)
app.command()(index.search)
app.command()(training.train)
app.command()(alignment.align)
app.command()(training.mine)
app.command()(training.synthesize)
app.command()(serve)

ENCODE_CHUNK = 1024

_PIPELINE_HELP = "Diffusers folder or hub id; the reference model if left out."
_ENCODER_HELP = (
    "Encoder to swap in: a folder, a hub id, or native for the pipeline's own, which is taken if left out; "
    "for the reference model it is multilingual, which reads fifteen languages."
)
_INDEX_HELP = "Prompt index to look in; that of the reference model if left out."

DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; a GPU if there is one.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16; float16 on a GPU and float32 elsewhere if left out.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"textcond {importlib.metadata.version('textcond')}")
        raise typer.Exit


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw; may be empty. Optional with --like.")] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.png",
            help="An existing file is replaced. With --count 3 the names are FILE-0.png, FILE-1.png and FILE-2.png.",
        ),
    ] = Path("textcond.png"),
    encoder: Annotated[str | None, typer.Option("--encoder", "-e", metavar="FOLDER|ID", help=_ENCODER_HELP)] = None,
    pipeline: Annotated[str | None, typer.Option("--pipeline", "-p", metavar="FOLDER|ID", help=_PIPELINE_HELP)] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "--negative", "-n", help="What to keep out of the picture.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", min=0, max=MAX_SEED, help="Random, and told, if left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps; 20 if left out.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Classifier-free guidance; the pipeline's best if left out.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures, with seeds SEED, SEED+1 ...")] = 1,
    width: Annotated[int | None, typer.Option(min=8, max=8192, help="Pixels; the pipeline's own if left out.")] = None,
    height: Annotated[int | None, typer.Option(min=8, max=8192, help="Pixels; the pipeline's own if left out.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Sampler, such as EulerDiscrete or DDIM; the pipeline's own if left out."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Take every parameter from this picture's metadata; the other options change them."
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Draw PROMPT into a PNG whose metadata hold every parameter. Each of several pictures can be made again alone."""
    if prompt is None and like is None:
        raise typer.BadParameter("pass a PROMPT, or a picture with --like")
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output} is no .png name, and the parameters are kept in PNG metadata: end it in .png")
    given: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "width": width,
        "height": height,
        "pipeline": pipeline,
        "encoder": encoder,
        "scheduler": scheduler,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if like:
        first = read_parameters(like)
        if pipeline and first.encoder == usual_encoder(first.pipeline):
            given.setdefault("encoder", usual_encoder(pipeline))
        first = replace(first, **given)
    else:
        usual = {"seed": secrets.randbelow(2**32), "encoder": usual_encoder(pipeline or REFERENCE)}
        first = Parameters(**usual | given)
    jobs = [replace(first, seed=first.seed + number) for number in range(count)]
    names = [output] if count == 1 else [output.with_stem(f"{output.stem}-{number}") for number in range(count)]
    paths = [check_output(name) for name in names]

    with _progress() as progress:
        task = progress.add_task("loading the pipeline", total=None)
        quiet_libraries()
        from .generation import draw, longest_reader, prompt_length
        from .loading import load_pipeline

        pipe = load_pipeline(first.pipeline, encoder=first.encoder, device=device, dtype=dtype)
        for kind in ("prompt", "negative_prompt"):
            with contextlib.suppress(ValueError):  # of a pipeline that is not known this cannot be told
                tokenizer, padded = longest_reader(pipe)
                length = prompt_length(tokenizer, getattr(first, kind), padded)
                if length.truncated:
                    _note(f"{kind.replace('_', ' ')}: {length.notice()}")
        for job, name, path in zip(jobs, names, paths):
            progress.reset(task, total=job.num_inference_steps, description=f"drawing {name.name}")
            image, made = draw(pipe, job, lambda done, total, _: progress.update(task, completed=done, total=total))
            write_png(path, image, made)
            _note(f"seed {made.seed}, {made.num_inference_steps} steps, guidance {made.guidance_scale:g}")
            print(name, flush=True)


@app.command()
def inspect(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help=_PIPELINE_HELP)] = REFERENCE,
    as_json: JsonOption = False,
) -> None:
    """Show what each text-encoder slot of PIPELINE expects, and what is wrong with what it has."""
    with _progress() as progress:
        progress.add_task("loading the pipeline", total=None)
        quiet_libraries()
        from textcond.pipelines import inspect_pipeline

        from .loading import load_pipeline

        pipe = load_pipeline(pipeline, device="cpu")
        contracts = inspect_pipeline(pipe)
    if as_json:
        print(json.dumps([asdict(contract) for contract in contracts], ensure_ascii=False, indent=2))
        return
    print(f"{type(pipe).__name__} ({pipeline})")
    for contract in contracts:
        print(f"\n{contract}")


@app.command()
def encode(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; - reads lines from standard input.")] = None,
    encoder: index.EncoderOption = MULTILINGUAL,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="UTF-8 file, one text a line.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help=f"Ends in {', '.join(SUFFIXES)}, which tells the format; JSON lines on standard output if left out.",
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="query or document: puts the encoder's prompt before each text.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Turn texts into vectors, as many as there are: they are read, encoded and written as a stream."""
    if (texts is None) == (file is None):
        raise typer.BadParameter("pass either TEXTS (or -), or --file FILE")
    if kind not in (None, "query", "document"):
        raise typer.BadParameter(f"{kind!r} is neither query nor document", param_hint="--kind")
    stream = read_lines("-") if texts == ["-"] else iter(texts) if texts else read_lines(file)
    rows, dim = 0, 0
    with vector_writer(output) as writer, _progress("{task.completed:,} texts") as progress:
        task = progress.add_task("loading the encoder", total=None)
        quiet_libraries()
        from .loading import load_text_encoder

        loaded = load_text_encoder(encoder, device=device, dtype=dtype)
        progress.update(task, description="encoding")
        for chunk in chunks(stream, ENCODE_CHUNK):
            vectors = loaded.encode(chunk, kind=kind)
            writer.add(chunk, vectors)
            rows, dim = rows + len(chunk), vectors.shape[1]
            progress.update(task, completed=rows)
        if not rows:
            raise ValueError("there is no text to encode: the input is empty")
    if output is not None:
        _note(f"{rows:,} vectors of {dim} numbers")
        print(output)


@app.command()
def studio(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets the whole network in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 if left out.")
    ] = None,
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", metavar="FOLDER|ID", help=_PIPELINE_HELP)] = REFERENCE,
    index: Annotated[Path | None, typer.Option("--index", "-i", metavar="FILE", help=_INDEX_HELP)] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keeps what is made; the user's cache folder if left out.")
    ] = None,
    auth: Annotated[
        str | None,
        typer.Option(metavar="NAME:PASSWORD", envvar="TEXTCOND_AUTH", help="What visitors must know to see the page."),
    ] = None,
    root_path: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where a proxy serves it, such as /studio.")
    ] = None,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Offer the API as tools over MCP too (pip install 'textcond\\[mcp]').")
    ] = False,
) -> None:
    """Draw and find in the browser, side by side."""
    from .studio import serve

    serve(host, port, pipeline, index, device, dtype, pictures=pictures, auth=auth, root_path=root_path, mcp=mcp)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command: exit code 0, 1 for an error (one line on stderr), 2 for wrong usage, 130 for Ctrl-C."""
    try:
        app(arguments, prog_name="textcond")
    except KeyboardInterrupt:
        _note("interrupted")
        sys.exit(130)
    except Exception as error:
        if debugging():
            raise
        print(f"textcond: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _note(text: str) -> None:
    print(f"textcond: {text}", file=sys.stderr)


@contextlib.contextmanager
def _progress(counter: str = "{task.percentage:>3.0f}%") -> Iterator[Progress]:
    """A progress bar on standard error, when that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn(counter), TimeElapsedColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # else what is piped on would end up on stderr
    ) as progress:
        yield progress


if __name__ == "__main__":
    main()
