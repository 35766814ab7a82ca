"""Mining from file to file: in blocks, resumed by the same command."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from textcond.files import write_mark
from textcond.folders import read_json

from .corpus import Corpus
from .known import KnownPositives
from .mining import QUERY_BLOCK, Miner
from .options import MiningOptions, MiningReport
from .sources import Source
from .teachers import Teacher


def mine_file(
    examples: str | Path,
    output: str | Path,
    corpus: Corpus | Sequence[str] | Mapping[str, str] | str | Path,
    sources: Mapping[Source, float],
    options: MiningOptions | None = None,
    *,
    teacher: Teacher | None = None,
    teacher_name: str | None = None,
    format: str = "auto",
    reader: Mapping[str, Any] | None = None,
    output_format: str = "flagembedding",
    writer: Mapping[str, Any] | None = None,
    show_progress_bar: bool = False,
) -> MiningReport:
    """Mine negatives for a file of examples and write them to another, whole or not at all.

    Every 1024 queries what was found is appended to `<output>.mining.jsonl` and noted in `<output>.mining.json`. Cut
    off at any point, the same call goes on after the last such note, to the same result. The input is read twice, the
    first time for what is known to be right for queries that recur.

    Args:
        examples: what `textcond.data.read_examples` reads.
        output: the file, or folder for formats that are folders.
        corpus: texts, texts by id, a BEIR folder, or a Corpus.
        sources: each with its weight, see `mine`.
        options: how many, from which ranks, by which rules.
        teacher: scores pairs, see `mine`.
        teacher_name: what a resumed run knows the teacher by; needed with a teacher, because a callable says nothing of
            its weights.
        format: of the input.
        reader: further options of `read_examples`.
        output_format: of the output, one of those of `textcond.data.write_examples`.
        writer: further options of `write_examples`, such as `{"shape": "n-tuple"}`.
        show_progress_bar: show progress.

    Raises:
        ValueError: if a cut off run had other settings or other data; it names what changed.
    """
    from textcond.data import read_examples, write_examples

    options, corpus, reader = options or MiningOptions(), Corpus.of(corpus), dict(reader or {})
    if (teacher is None) != (teacher_name is None):
        raise ValueError("give a teacher and a teacher_name together: a resumed run knows the teacher by the name")
    examples, output = Path(examples).expanduser(), Path(output).expanduser()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial, note = (output.with_name(f"{output.name}.mining.{suffix}") for suffix in ("jsonl", "json"))
    settings = {
        "examples": _files_hash(examples),
        "corpus": corpus.fingerprint(),
        "sources": [source.describe() | {"weight": weight} for source, weight in sources.items()],
        "teacher": teacher_name,
        "format": format,
        "reader": reader,
        **options.to_dict(),
    }
    done, size, report = _resumed(partial, note, settings)
    known = KnownPositives(read_examples(examples, format=format, **reader))
    miner = Miner.of(corpus, sources, options, teacher, known, report)
    miner.prepare(show_progress_bar)
    stream = islice(read_examples(examples, format=format, **reader), done, None)
    with open(partial, "r+b" if partial.exists() else "w+b") as file:
        file.truncate(size)
        file.seek(size)
        with tqdm(initial=done, desc="mine", unit="query", disable=not show_progress_bar) as progress:
            while block := list(islice(stream, QUERY_BLOCK)):
                for example in miner.mine(block, done):
                    file.write((json.dumps(example.to_row(), ensure_ascii=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
                done += len(block)
                state = {"settings": settings, "done": done, "size": file.tell(), "report": report.to_dict()}
                write_mark(note, state)
                progress.update(len(block))
    write_examples(read_examples(partial, format="flagembedding"), output, format=output_format, **(writer or {}))
    note.unlink(missing_ok=True)
    partial.unlink()
    return report


def _resumed(partial: Path, note: Path, settings: dict[str, Any]) -> tuple[int, int, MiningReport]:
    """Return how many examples are done, the bytes that they gave, and their counts."""
    if not (note.exists() and partial.exists()):
        return 0, 0, MiningReport()
    state = read_json(note)
    earlier = state["settings"]
    # as JSON, as the earlier settings went through it
    settings = json.loads(json.dumps(settings))
    changed = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
    if changed:
        raise ValueError(
            f"{note} is of a run with other {', '.join(changed)}: call it as before to finish that run, or delete "
            f"{note.name} and {partial.name} to start anew"
        )
    return state["done"], state["size"], MiningReport(**state["report"])


def _files_hash(path: Path) -> str:
    """Return a SHA-256 of a file, or of all files of a folder with their names."""
    if not path.exists():
        raise FileNotFoundError(f"no examples {path}: check the path")
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)} {file.stat().st_size} ".encode())
        with open(file, "rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
