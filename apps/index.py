"""`textcond index` and `textcond search`: indexes of prompts and pictures, made, kept and looked into."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .metadata import MULTILINGUAL
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from PIL import Image
    from rich.table import Table
    from rich.text import Text

    from textcond import Hit, PromptIndex, TextEncoder

index = typer.Typer(help="Make and keep indexes of prompts and pictures, which `textcond search` looks into.")

THUMBNAIL_WIDTH = 24  # character cells; half as many high, of two pixels each
SETTLED = 10_000  # rows from which an index that was just made is optimized
FILTER = re.compile(r"([^=<>!]*[^=<>!\s])\s*(>=|<=|=|>|<)\s*((?![=<>]).*)", re.DOTALL)
BOUNDS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}

IndexArgument = Annotated[
    str, typer.Argument(metavar="INDEX", help="A folder (LanceDB), or a .db file or http://HOST:PORT/NAME (Milvus).")
]
SourcesArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="SOURCE...",
        help="Text, JSONL, CSV, TSV or Parquet files, DiffusionDB metadata, datasets folders, pictures or folders of "
        "pictures, whose prompts are read from their metadata.",
    ),
]
EncoderOption = Annotated[
    str, typer.Option("--encoder", "-e", metavar="FOLDER|ID", help="Text encoder; native is the reference model's own.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; a GPU if there is one.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class Feeding:
    """How SOURCEs are read and written: the options that `build` and `add` share."""

    text_column: Annotated[
        str | None, typer.Option(help="Column of the texts in tables; text, prompt or caption if left out.")
    ] = None
    split: Annotated[str | None, typer.Option(help="Split of a datasets folder; train if left out.")] = None
    distinct: Annotated[bool, typer.Option("--distinct", help="One row a text, whatever its metadata.")] = False
    thumbnails: Annotated[int, typer.Option(min=0, max=2048, help="Pixels of thumbnails; 0 keeps no pictures.")] = 256
    strict: Annotated[
        bool,
        typer.Option("--strict", help="The first row that cannot be used is an error; else such rows are counted."),
    ] = False
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Rows encoded and written at once.")] = 1024


def takes_feeding(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `Feeding` as options; it gets their values as its argument `feeding`."""
    options = inspect.signature(Feeding, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        feeding = Feeding(**{name: given.pop(name) for name in options})
        command(**given, feeding=feeding)

    # typer reads both
    parameters = [*(one for one in own.parameters.values() if one.name != "feeding"), *options.values()]
    run.__signature__ = own.replace(parameters=parameters)
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


@index.command()
@takes_feeding
def build(
    path: IndexArgument,
    sources: SourcesArgument,
    encoder: EncoderOption = MULTILINGUAL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    *,
    feeding: Feeding,
) -> None:
    """Make INDEX from SOURCEs. Ctrl-C is safe: the same command goes on. `accelerate launch` spreads the encoding."""
    quiet_libraries()
    from textcond.index.feed import help_feed, is_first_process

    if not is_first_process():
        return help_feed()
    from textcond.index.sources import find_sources

    find_sources(sources)  # before anything is made
    made = _created(path, encoder, device, dtype)
    _feed(made, path, sources, feeding)
    _settle(made)


@index.command()
@takes_feeding
def add(path: IndexArgument, sources: SourcesArgument, device: DeviceOption = None, *, feeding: Feeding) -> None:
    """Add SOURCEs to INDEX; rows that it has already are left alone. Ctrl-C is safe: the same command goes on."""
    quiet_libraries()
    from textcond.index.feed import help_feed, is_first_process

    if not is_first_process():
        return help_feed()
    opened = _opened(path)
    opened.encoder.to(_place(device))
    _feed(opened, path, sources, feeding)


@index.command()
def rebuild(
    path: IndexArgument,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="The new index; INDEX stays as it is.")],
    encoder: EncoderOption = MULTILINGUAL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Write INDEX again as OUTPUT for another encoder, with new vectors from the texts that it holds."""
    quiet_libraries()
    rebuilt = _opened(path).rebuild(output, _encoder(encoder, device, dtype), show_progress_bar=sys.stderr.isatty())
    print(f"{output}: {len(rebuilt):,} rows")


@index.command()
def stats(path: IndexArgument, as_json: JsonOption = False) -> None:
    """Tell what INDEX holds."""
    quiet_libraries()
    told = _opened(path).stats()
    if as_json:
        print(json.dumps(told, ensure_ascii=False, indent=2, default=str))
        return
    for name, value in told.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        print(f"{name.replace('_', ' ')}: {shown}")


@index.command()
def optimize(path: IndexArgument) -> None:
    """Make INDEX faster to search after many changes, and smaller, but for what readers of late may still be at."""
    quiet_libraries()
    _opened(path).optimize()
    print(path)


@index.command()
def demo(
    path: IndexArgument,
    packages: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Holds the wheel of clip-interrogator; without it, it is to be installed."),
    ] = None,
    encoder: EncoderOption = MULTILINGUAL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Make INDEX of about 100,000 prompts to try: the reference captions with pictures, and prompt modifiers."""
    quiet_libraries()
    import tempfile

    from textcond.index.feed import help_feed, is_first_process
    from textcond.index.modifiers import prompt_modifiers

    if not is_first_process():
        return help_feed()
    modifiers = prompt_modifiers(packages, last_names=True)
    made = _created(path, encoder, device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "demo.jsonl"
        with rows.open("w", encoding="utf-8") as file:
            for row in _demo_rows(modifiers):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        _feed(made, path, [rows], Feeding(distinct=True))
    _settle(made)


def search(
    query: Annotated[str | None, typer.Argument(help="Words to look for. Optional with --image.")] = None,
    path: Annotated[
        str | None,
        typer.Option(
            "--index", "-i", metavar="INDEX", help="Prompt index to look in; that of the reference model if left out."
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Look for what is like this picture (encoders with an image tower)."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=10_000, help="How many prompts to show.")] = 10,
    mode: Annotated[str, typer.Option(help="hybrid, dense (by meaning) or lexical (by words).")] = "hybrid",
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            "-f",
            metavar="KEY=VALUE",
            help="Metadata that rows must have: steps>=20, style=noto (repeatable; of one key, any value).",
        ),
    ] = None,
    diversity: Annotated[float, typer.Option(min=0, max=1, help="0 to 1: how much hits are to differ.")] = 0.0,
    pictures: Annotated[bool, typer.Option(help="Show thumbnails, in a terminal with colours.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Find the prompts nearest to QUERY in meaning and words, by the encoder that conditions the pictures."""
    if (query is None) == (image is None):
        raise typer.BadParameter("pass either a QUERY, or a picture with --image")
    if query is not None and not query.strip():
        raise ValueError("the query is empty: pass the words to look for")
    wanted = parse_filters(filters or [])
    quiet_libraries()
    asked: Any = query
    if image is not None:
        from textcond.index.pictures import read_picture

        asked = read_picture(image)
    hits = _opened(path).search(asked, k=k, mode=mode, filter=wanted or None, diversity=diversity)
    if as_json:
        print(json.dumps([_as_json(hit) for hit in hits], ensure_ascii=False, indent=2))
        return
    if not hits:
        print("textcond: nothing found", file=sys.stderr)
        return
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(hits_table(hits, pictures=pictures and console.color_system in ("256", "truecolor")))
    else:
        for hit in hits:
            print(f"{hit.score:.3f}  {' '.join(hit.text.split()) or hit.metadata.get('path', hit.id)}")


def parse_filters(given: Sequence[str]) -> dict[str, Any]:
    """Return the filter that `KEY=VALUE`, `KEY>=VALUE` and the like ask for; numbers, true and false are read as such.

    Raises:
        ValueError: one of another form.
    """
    wanted: dict[str, Any] = {}
    for text in given:
        found = FILTER.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"filter {text!r} is not KEY=VALUE, nor one with >, <, >= or <= for =")
        key, sign, value = found[1].strip(), found[2], _typed(found[3])
        before = wanted.get(key)
        if sign in BOUNDS and isinstance(before, dict) and BOUNDS[sign] in before:
            raise ValueError(f"filters on {key!r} give {sign} twice: pass one of them")
        if sign in BOUNDS and isinstance(value, bool):
            raise ValueError(f"filter {text!r} compares with a truth value: pass {key}={found[3]}")
        if sign in BOUNDS and (before is None or isinstance(before, dict)):
            wanted[key] = (before or {}) | {BOUNDS[sign]: value}
        elif sign == "=" and not isinstance(before, dict):
            wanted[key] = value if key not in wanted else [*(before if isinstance(before, list) else [before]), value]
        else:
            raise ValueError(f"filters on {key!r} name both a value and a bound: pass one kind")
    return wanted


def _typed(text: str) -> Any:
    """Return a number or truth value where a text is one, and the text in quotes or out of them otherwise."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if finite or isinstance(value, str) else text


def hits_table(hits: Sequence[Hit], *, pictures: bool) -> Table:
    """The hits as a table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [_half_blocks(hit.image, THUMBNAIL_WIDTH) if pictures and hit.image else None for hit in hits]
    table = Table(box=box.SIMPLE_HEAD, show_lines=any(shown), pad_edge=False)
    table.add_column("score", justify="right")
    table.add_column("meaning", justify="right")
    table.add_column("words", justify="right")
    table.add_column("text", ratio=3, overflow="fold")
    table.add_column("metadata", ratio=2, overflow="fold", style="dim")
    if any(shown):
        table.add_column("picture", no_wrap=True, width=THUMBNAIL_WIDTH)
    for hit, picture in zip(hits, shown):
        metadata = ", ".join(f"{name}: {value}" for name, value in hit.metadata.items())
        ranks = ("" if rank is None else str(rank) for rank in (hit.dense_rank, hit.lexical_rank))
        # Text, not markup: what a prompt says in brackets is no style
        cells = [f"{hit.score:.3f}", *ranks, Text(_printable(hit.text)), Text(_printable(metadata))]
        table.add_row(*cells, *([picture or ""] if any(shown) else []))
    return table


def _printable(text: str) -> str:
    """Return a text without what would move the cursor or change the terminal's state."""
    return "".join(character if character.isprintable() else " " for character in text)


def _half_blocks(image: Image.Image, width: int) -> Text:
    """A picture in cells of two pixels, the upper one as the colour of a half block on the lower one."""
    from PIL import Image
    from rich.text import Text

    height = max(2, round(width * image.height / image.width / 2) * 2)
    small = image.convert("RGBA").resize((width, min(height, width)))
    background = Image.new("RGBA", small.size, "white")
    background.alpha_composite(small)
    pixels = background.convert("RGB").load()
    text = Text()
    for row in range(0, small.height - 1, 2):
        for column in range(width):
            upper, lower = ("#{:02x}{:02x}{:02x}".format(*pixels[column, row + half]) for half in (0, 1))
            text.append("▀", f"{upper} on {lower}")
        text.append("\n")
    text.rstrip()
    return text


def _as_json(hit: Hit) -> dict[str, Any]:
    ranks = {"dense_rank": hit.dense_rank, "lexical_rank": hit.lexical_rank}
    return {"id": hit.id, "score": float(hit.score), **ranks, "text": hit.text, "metadata": hit.metadata}


def _encoder(name: str, device: str | None, dtype: str | None) -> TextEncoder:
    from .loading import load_text_encoder

    return load_text_encoder(name, device=str(_place(device)), dtype=dtype)


def _place(device: str | None) -> torch.device:
    """The device of that name; without one, this process's own of those that were launched, or what there is."""
    from textcond.index.feed import launched

    from .loading import torch_device

    state = launched() if device is None else None
    return torch_device(device) if state is None else state.device


def _created(path: str, encoder: str, device: str | None, dtype: str | None) -> PromptIndex:
    """A new index at `path`, or the one there that `build` left unfinished."""
    from textcond import PromptIndex
    from textcond.index.feed import mark_path

    mark, loaded = mark_path(path), _encoder(encoder, device, dtype)
    if mark is not None and mark.is_file():
        return PromptIndex.open(path, loaded)
    try:
        return PromptIndex.create(path, loaded)
    except FileExistsError as error:
        if "there is an index" in str(error) and not len(PromptIndex.open(path)):
            return PromptIndex.open(path, loaded)  # stopped before its first row and its mark
        raise FileExistsError(f"{error}; `textcond index add` adds to an index") from error


def _opened(path: str | None) -> PromptIndex:
    from .finder import open_index

    return open_index(path)


def _feed(made: PromptIndex, path: str, sources: list[Path], feeding: Feeding) -> None:
    from textcond.index.feed import feed, mark_path

    options = asdict(feeding)
    report = feed(
        made,
        sources,
        on_error="raise" if options.pop("strict") else "skip",
        mark=mark_path(path),
        show_progress_bar=sys.stderr.isatty(),
        **options,
    )
    if not report.read and not len(made):
        raise ValueError(f"{path} is still empty, no row of {', '.join(map(str, sources))} could be used: {report}")
    print(f"{path}: {report}")


def _settle(made: PromptIndex) -> None:
    """A large index that was just made is searched much faster once its many pieces are one."""
    if len(made) >= SETTLED:
        print("textcond: making it fast to search", file=sys.stderr)
        made.optimize()


def _demo_rows(modifiers: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Reference captions with their pictures, then the modifiers by list."""
    import base64
    import itertools

    from textcond.pipelines.reference import open_reference_index

    # by batches: one read a picture would take a minute
    batches = open_reference_index().store.scan(None, batch=256, vectors=False, images=True)
    for row in itertools.chain.from_iterable(batches):
        told = {"text": row.text, **row.metadata}
        if row.image is not None:
            told["image"] = f"data:image/*;base64,{base64.b64encode(row.image).decode()}"
        yield told
    for name, texts in modifiers.items():
        for text in texts:
            if text.strip():
                yield {"text": text, "list": name}
