"""`textcond mine`, `synthesize`, `train` and `eval`: from data to a fine-tuned text encoder and its scores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .metadata import REFERENCE
from .quiet import quiet_libraries

if TYPE_CHECKING:
    from textcond import TextEncoder

FormatOption = Annotated[
    str, typer.Option(help="Format of the examples; told from the file if left out. See `textcond.data.read_examples`.")
]


def mine(
    examples: Annotated[Path, typer.Argument(help="Queries with positives, in any format that textcond.data reads.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File (or folder) to write.")],
    corpus: Annotated[Path, typer.Option("--corpus", "-c", help="BEIR folder, corpus.jsonl or collection.tsv.")],
    source: Annotated[
        list[str] | None, typer.Option(help="random, bm25, dense or run, with a weight: bm25=0.5 (repeatable).")
    ] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", "-e", help="Text encoder of the source dense.")] = None,
    run: Annotated[Path | None, typer.Option(help="MS MARCO or TREC run file of the source run.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Text encoder whose scores decide.")] = None,
    cross_encoder: Annotated[
        str | None, typer.Option(help="sentence-transformers CrossEncoder whose scores decide.")
    ] = None,
    num_negatives: Annotated[int, typer.Option("--num-negatives", "-n", help="Negatives a query.")] = 7,
    range_min: Annotated[int, typer.Option(help="First rank that counts, from 0, before any filter.")] = 0,
    range_max: Annotated[int, typer.Option(help="Rank at which the list ends.")] = 100,
    sampling: Annotated[str, typer.Option(help="top or random.")] = "top",
    relative: Annotated[float | None, typer.Option(help="Keep below this share of the positive's score: 0.95.")] = None,
    margin: Annotated[float | None, typer.Option(help="Keep below the positive's score minus this.")] = None,
    max_score: Annotated[float | None, typer.Option(help="Keep at most this score.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Keep at least this score.")] = None,
    on_short: Annotated[str, typer.Option(help="A query with too few negatives: keep, drop or error.")] = "keep",
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    format: FormatOption = "auto",
    output_format: Annotated[str, typer.Option(help="flagembedding, sentence-transformers, tevatron ...")] = (
        "flagembedding"
    ),
    cache: Annotated[Path, typer.Option(help="Folder of vectors, keyed by the encoder's weights.")] = Path(
        "runs/vectors"
    ),
) -> None:
    """Find hard negatives for EXAMPLES in a corpus. Interrupted, the same command goes on."""
    quiet_libraries()
    from textcond import TextEncoder
    from textcond.negatives import CrossEncoderTeacher, EncoderTeacher, MiningOptions, build_sources, mine_file

    if teacher and cross_encoder:
        raise ValueError("--teacher and --cross-encoder both score: pass one of them")
    options = MiningOptions(
        num_negatives=num_negatives,
        range_min=range_min,
        range_max=range_max,
        sampling=sampling,
        relative=relative,
        margin=margin,
        max_score=max_score,
        min_score=min_score,
        on_short=on_short,
        seed=seed,
    )
    weights = dict(_weighted(text) for text in source or (["dense"] if encoder else ["bm25"]))
    scorer = None
    if teacher:
        scorer = EncoderTeacher(TextEncoder.from_pretrained(teacher))
    elif cross_encoder:
        scorer = CrossEncoderTeacher.from_pretrained(cross_encoder)
    report = mine_file(
        examples,
        output,
        corpus,
        build_sources(weights, encoder=TextEncoder.from_pretrained(encoder) if encoder else None, cache=cache, run=run),
        options,
        teacher=scorer,
        teacher_name=teacher or cross_encoder,
        format=format,
        output_format=output_format,
        show_progress_bar=True,
    )
    print(f"{output}: {', '.join(f'{name} {count:,}' for name, count in report.to_dict().items())}")


def synthesize(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Name on the server, or a local folder or hub id.")],
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server, such as http://localhost:8000/v1; local if left out.")
    ] = None,
    tasks: Annotated[int, typer.Option(help="Retrieval tasks to brainstorm.")] = 100,
    triples: Annotated[int, typer.Option(help="Triples to write.")] = 1000,
    language: Annotated[list[str] | None, typer.Option(help="Language by its English name (repeatable).")] = None,
    max_requests: Annotated[int | None, typer.Option(help="Most requests, over all runs.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens, over all runs.")] = None,
    seed: Annotated[int, typer.Option(help="Decides themes, attributes and languages.")] = 0,
    concurrency: Annotated[int, typer.Option(help="Most requests under way at once.")] = 8,
) -> None:
    """Have a language model write (query, positive, hard negative) triples. The key is read from OPENAI_API_KEY."""
    quiet_libraries()
    from textcond.synthesis import ChatEndpoint, LocalModel
    from textcond.synthesis import synthesize as write

    _show_warnings()
    backend = ChatEndpoint(model, base_url) if base_url else LocalModel(model)
    made = write(
        backend,
        output,
        tasks=tasks,
        triples=triples,
        languages=language or ["English"],
        max_requests=max_requests,
        max_tokens=max_tokens,
        seed=seed,
        concurrency=concurrency,
    )
    print(made)


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe TOML, or the name of one that ships.")],
    out: Annotated[Path, typer.Option(help="Working folder; the encoder is OUT/encoder.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe (repeatable).")
    ] = None,
) -> None:
    """Fine-tune a text encoder contrastively. Ctrl-C is safe: the same command goes on, to the same weights."""
    quiet_libraries()
    from textcond.training import load_recipe
    from textcond.training import train as run

    _show_warnings()
    wanted = load_recipe(recipe, overrides or [])
    print(run(wanted, out, _generation(wanted.evaluation.generation)))


evaluation = typer.Typer(help="Score text encoders; the first one named is the base of every comparison.")

EncodersOption = Annotated[
    list[str], typer.Option("--encoder", "-e", help="Folder or hub id (repeatable), the untouched base model first.")
]


@evaluation.command()
def retrieval(
    encoder: EncodersOption,
    task: Annotated[list[Path], typer.Option("--task", "-t", help="BEIR folder (repeatable).")],
    metric: Annotated[str, typer.Option(help="nDCG@10, RR@10, R@10, R@100 or AP@100.")] = "nDCG@10",
    split: Annotated[str, typer.Option(help="Of the qrels.")] = "test",
) -> None:
    """Print a table of encoders on retrieval tasks, with bootstrap intervals of the differences to the first."""
    quiet_libraries()
    from textcond.evaluation import compare

    print(compare(encoder, task, split=split, show_progress_bar=True).markdown(metric), end="")


@evaluation.command()
def mteb(
    encoder: EncodersOption,
    tasks: Annotated[list[str], typer.Option("--tasks", "-t", help="mteb task name or BEIR folder (repeatable).")],
    out: Annotated[Path | None, typer.Option(help="Folder of result files; finished tasks are taken from it.")] = None,
) -> None:
    """Run mteb tasks. BEIR folders need no network; named tasks are downloaded by mteb."""
    quiet_libraries()
    from textcond.evaluation import evaluate_mteb

    for name in encoder:
        for task, scores in evaluate_mteb(name, tasks, out=out, show_progress_bar=True).items():
            print(f"{name}\t{task}\t{scores['main_score']:.4f}", flush=True)


def _generation(table: dict[str, Any] | None) -> Callable[[TextEncoder], dict[str, float]] | None:
    """What a recipe's evaluation.generation describes: `pipeline`, `prompts`, and options of the alignment."""
    if table is None:
        return None
    from textcond.pipelines import generation_score

    from .loading import load_pipeline

    options = dict(table)
    name = options.pop("pipeline", REFERENCE)
    try:
        if not isinstance(name, str):
            raise ValueError(f"pipeline={name!r}: give a folder or a hub id")
        if "prompts" not in options:
            raise ValueError("there are no prompts to align on: give prompts, a text file with a prompt a line")
        return generation_score(load_pipeline(name, dtype="float32"), **options)
    except ValueError as error:
        raise ValueError(f"evaluation.generation: {error}") from error


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    try:
        return name, float(weight or 1)
    except ValueError:
        raise ValueError(f"--source {text!r}: give a name and a weight, as bm25=0.5") from None


def _show_warnings() -> None:
    """Let what the library warns of reach standard error."""
    logging.basicConfig(level=logging.WARNING, format="textcond: %(message)s")
