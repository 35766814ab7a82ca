"""Examples to any format, whole or not at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal

from textcond.data.example import Example
from textcond.data.rows import container
from textcond.files import atomic_file
from textcond.folders import atomic_folder

Shape = Literal["pair", "triplet", "n-tuple", "labeled-pair", "labeled-list"]


def write_examples(
    examples: Iterable[Example],
    path: str | Path,
    format: str = "flagembedding",
    *,
    shape: Shape = "triplet",
    negatives: int | None = None,
    scores: bool = True,
    split: str = "train",
) -> int:
    """Write examples as they come, and return how many. What a format has no place for is left out.

    - "flagembedding": canonical JSONL, everything kept.
    - "sentence-transformers": columns of a `shape`, as .jsonl, .csv, .tsv or .parquet by the path's name. Scores are
      in `scores` (`score` of a labeled pair) as its `mine_hard_negatives` writes them, if the first example has them.
    - "csv", "tsv", "parquet": the same, whatever the name.
    - "natural-questions": `query, answer` JSONL or as the name says. "parallel": query TAB positive lines.
    - "dpr": a JSON array.
    - "tevatron": a folder of SPLIT.jsonl and corpus.jsonl. "ids": one of SPLIT.jsonl, queries.jsonl, documents.jsonl.
    - "beir", "msmarco": a folder of corpus, queries and qrels; negatives with their scores are a run, run.SPLIT.tsv.

    Texts without an id get one from their content in the formats that need ids. A name that ends in .gz is packed.

    Args:
        examples: the examples.
        path: the file or folder.
        format: one of the formats above.
        shape: of sentence-transformers' columns; one row for each positive (and each negative of a triplet or pair).
        negatives: of each n-tuple; by default as many as the first example has.
        scores: write teacher scores where they are known.
        split: in the names of a folder's files.

    Raises:
        ValueError: for an unknown format or shape, too few negatives for an n-tuple, a text that the format cannot
            hold, one id for two texts, or no example at all. The file that was there stays as it was.
    """
    path = Path(path).expanduser()
    counted = _Counted(examples, path)
    if format in ("sentence-transformers", "csv", "tsv", "parquet", "natural-questions"):
        kind = format if format in ("csv", "tsv", "parquet") else container(path)
        if kind not in ("jsonl", "csv", "tsv", "parquet"):
            raise ValueError(f"{path}: name it .jsonl, .csv, .tsv or .parquet for the format {format!r}")
        make = _answers if format == "natural-questions" else _shaped(shape, negatives, scores)
        with _written(path) as file:
            TABLES[kind]((row for example in counted for row in make(example, counted.count)), file)
    elif format in FILES:
        with _written(path) as file:
            FILES[format](counted, file)
    elif format in FOLDERS:
        with atomic_folder(path, OWNED[format]) as folder:
            FOLDERS[format](counted, folder, split)
    else:
        known = ("sentence-transformers", "csv", "tsv", "parquet", "natural-questions", *FILES, *FOLDERS)
        raise ValueError(f"format {format!r}: pass one of {', '.join(known)}")
    return counted.count


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, packed if `path` ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as raw:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed:
                yield packed
        else:
            yield raw


class _Counted:
    """Passes examples on and counts them; ValueError at the end if there was none."""

    def __init__(self, examples: Iterable[Example], path: Path):
        self._examples, self._path = examples, path
        self.count = 0

    def __iter__(self) -> Iterator[Example]:
        for example in self._examples:
            self.count += 1
            yield example
        if not self.count:
            raise ValueError(f"no example to write to {self._path}: check what they are read or mined from")


def _json_line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _flagembedding(examples: Iterable[Example], file: IO[bytes]) -> None:
    for example in examples:
        file.write(_json_line(example.to_row()))


def _dpr(examples: Iterable[Example], file: IO[bytes]) -> None:
    before = b"[\n"
    for example in examples:
        row = {
            "question": example.query,
            "answers": [],
            "positive_ctxs": _passages(example.positives, example.positive_scores, example.positive_ids),
            "negative_ctxs": [],
            "hard_negative_ctxs": _passages(example.negatives, example.negative_scores, example.negative_ids),
        }
        file.write(before + _json_line(row).rstrip(b"\n"))
        before = b",\n"
    file.write(b"\n]\n")


def _passages(texts: list[str], scores: list[float] | None, idents: list[str] | None) -> list[dict[str, Any]]:
    return [
        {"title": "", "text": text}
        | ({} if scores is None else _without_nan({"score": scores[place]}))
        | ({} if idents is None else {"passage_id": idents[place]})
        for place, text in enumerate(texts)
    ]


def _parallel(examples: Iterable[Example], file: IO[bytes]) -> None:
    for example in examples:
        for positive in example.positives:
            file.write("\t".join(_plain([example.query, positive])).encode() + b"\n")


def _answers(example: Example, number: int) -> Iterator[dict[str, Any]]:
    for positive in example.positives:
        yield {"query": example.query, "answer": positive}


def _shaped(shape: Shape, negatives: int | None, scores: bool) -> Callable[[Example, int], Iterator[dict[str, Any]]]:
    """Return what makes sentence-transformers' rows of an example and its number."""
    shapes = ("pair", "triplet", "n-tuple", "labeled-pair", "labeled-list")
    if shape not in shapes:
        raise ValueError(f"shape {shape!r}: pass one of {', '.join(shapes)}")
    wanted, scored = negatives, None

    def rows(example: Example, number: int) -> Iterator[dict[str, Any]]:
        nonlocal wanted, scored
        has = example.positive_scores is not None and (not example.negatives or example.negative_scores is not None)
        if scored is None:
            scored = scores and has
        if scored and not has and shape != "pair":
            raise ValueError(f"example {number} ({example.query!r:.60}) lacks scores that others have: score it too")
        right = example.positive_scores or [math.nan] * len(example.positives)
        wrong = example.negative_scores or [math.nan] * len(example.negatives)
        pairs = list(zip(example.positives, right))
        others = list(zip(example.negatives, wrong))
        if shape == "labeled-list" and not scored:
            documents = [text for text, _ in [*pairs, *others]]
            labels = [1] * len(pairs) + [0] * len(others)
            yield {"anchor": example.query, "documents": documents, "labels": labels}
            return
        if shape == "labeled-pair":
            for place, (text, score) in enumerate([*pairs, *others]):
                label = {"score": score} if scored else {"label": int(place < len(pairs))}
                yield {"anchor": example.query, "document": text, **label}
            return
        for positive, score in pairs:
            base = {"anchor": example.query, "positive": positive}
            if shape == "pair":
                yield base
            elif shape == "triplet":
                if not others:
                    raise ValueError(
                        f"example {number} ({example.query!r:.60}) has no negative: mine one, or write pairs"
                    )
                for negative, other in others:
                    yield base | {"negative": negative} | ({"scores": [score, other]} if scored else {})
            elif shape == "labeled-list":
                documents, values = zip((positive, score), *others)
                yield {"anchor": example.query, "documents": list(documents), "scores": list(values)}
            else:
                wanted = len(others) if wanted is None else wanted
                if len(others) < wanted:
                    raise ValueError(
                        f"example {number} ({example.query!r:.60}) has {len(others)} negatives, the n-tuple needs "
                        f"{wanted}: pass negatives={len(others)}, mine more, or write a labeled-list"
                    )
                taken = others[:wanted]
                columns = {f"negative_{place}": text for place, (text, _) in enumerate(taken, 1)}
                yield base | columns | ({"scores": [score, *(other for _, other in taken)]} if scored else {})

    return rows


def _jsonl_table(rows: Iterator[dict[str, Any]], file: IO[bytes]) -> None:
    for row in rows:
        file.write(_json_line(_without_nan(row)))


def _csv_table(rows: Iterator[dict[str, Any]], file: IO[bytes]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    header = False
    for row in rows:
        if not header:
            writer.writerow(row)
            header = True
        writer.writerow([_cell(value) for value in _without_nan(row).values()])
    text.detach()


def _tsv_table(rows: Iterator[dict[str, Any]], file: IO[bytes]) -> None:
    header = False
    for row in rows:
        if not header:
            file.write("\t".join(row).encode() + b"\n")
            header = True
        cells = [_cell(value) for value in _without_nan(row).values()]
        file.write("\t".join(_plain(cells)).encode() + b"\n")


def _parquet_table(rows: Iterator[dict[str, Any]], file: IO[bytes]) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {"scores": pyarrow.list_(pyarrow.float64()), "labels": pyarrow.list_(pyarrow.int64())}
    kinds |= {"documents": pyarrow.list_(pyarrow.string()), "score": pyarrow.float64(), "label": pyarrow.int64()}
    first = next(rows)
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in first])
    rows = chain([first], rows)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while block := list(islice(rows, 1024)):
            writer.write_table(pyarrow.Table.from_pylist(list(map(_without_nan, block)), schema=schema))


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    def known(value: Any) -> Any:
        return None if isinstance(value, float) and math.isnan(value) else value

    return {
        name: [known(item) for item in value] if isinstance(value, list) else known(value)
        for name, value in row.items()
    }


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _plain(cells: list[str]) -> list[str]:
    for cell in cells:
        if any(mark in cell for mark in "\t\n\r"):
            raise ValueError(f"a tab or a line end in {cell!r:.60}, which TSV cannot hold: write another format")
    return cells


class _Table:
    """A file of texts by id, each id once: of a text, two hashes stay in memory."""

    def __init__(self, file: IO[bytes], row: Callable[[str, str], bytes], prefix: str):
        self._file, self._row, self._prefix = file, row, prefix
        self._seen: dict[int, int] = {}
        self._count = 0

    def add(self, ident: str | None, text: str) -> str:
        """Write the text if its id is new, and return the id; a text without one gets its hash."""
        digest = blake2b(text.encode("utf-8"), digest_size=8)
        if ident is None:
            ident = f"{self._prefix}{digest.hexdigest()}"
        key = int.from_bytes(blake2b(ident.encode("utf-8"), digest_size=8).digest(), "little")
        value = int.from_bytes(digest.digest(), "little")
        if self._seen.setdefault(key, value) != value:
            raise ValueError(f"the id {ident!r} has two texts, one is {text!r:.60}: make ids unique")
        if len(self._seen) > self._count:
            self._count = len(self._seen)
            self._file.write(self._row(ident, text))
        return ident

    def add_all(self, idents: Sequence[str] | None, texts: Sequence[str]) -> list[str]:
        """Write the new ones of several texts, and return their ids."""
        return [self.add(ident, text) for ident, text in zip(idents or [None] * len(texts), texts)]


def _tevatron(examples: Iterable[Example], folder: Path, split: str) -> None:
    with (folder / f"{split}.jsonl").open("wb") as rows, (folder / "corpus.jsonl").open("wb") as file:
        corpus = _Table(file, lambda ident, text: _json_line({"docid": ident, "document_text": text}), "d")
        for example in examples:
            row = {
                "query_id": example.query_id or f"q{blake2b(example.query.encode(), digest_size=8).hexdigest()}",
                "query_text": example.query,
                "positive_document_ids": corpus.add_all(example.positive_ids, example.positives),
                "negative_document_ids": corpus.add_all(example.negative_ids, example.negatives),
            }
            for name in ("positive_scores", "negative_scores"):
                if (scores := getattr(example, name)) is not None:
                    row |= _without_nan({name: scores})
            rows.write(_json_line(row))


def _ids(examples: Iterable[Example], folder: Path, split: str) -> None:
    with (
        (folder / f"{split}.jsonl").open("wb") as rows,
        (folder / "queries.jsonl").open("wb") as query_file,
        (folder / "documents.jsonl").open("wb") as document_file,
    ):
        queries = _Table(query_file, lambda ident, text: _json_line({"query_id": ident, "text": text}), "q")
        documents = _Table(document_file, lambda ident, text: _json_line({"document_id": ident, "text": text}), "d")
        for example in examples:
            right = documents.add_all(example.positive_ids, example.positives)
            wrong = documents.add_all(example.negative_ids, example.negatives)
            scores = (example.positive_scores or [math.nan] * len(right)) + (
                example.negative_scores or [math.nan] * len(wrong)
            )
            row = {
                "query_id": queries.add(example.query_id, example.query),
                "document_ids": right + wrong,
                "scores": scores,
                "positive_document_ids": right,
            }
            rows.write(_json_line(_without_nan(row)))


def _beir(examples: Iterable[Example], folder: Path, split: str) -> None:
    (folder / "qrels").mkdir()
    _judged(
        examples,
        folder,
        lambda ident, text: _json_line({"_id": ident, "title": "", "text": text}),
        ("queries.jsonl", "corpus.jsonl", f"qrels/{split}.tsv", f"run.{split}.tsv"),
        "query-id\tcorpus-id\tscore\n",
        "{query}\t{document}\t1\n",
    )


def _msmarco(examples: Iterable[Example], folder: Path, split: str) -> None:
    _judged(
        examples,
        folder,
        lambda ident, text: "\t".join(_plain([ident, text])).encode() + b"\n",
        (f"queries.{split}.tsv", "collection.tsv", f"qrels.{split}.tsv", f"run.{split}.tsv"),
        "",
        "{query}\t0\t{document}\t1\n",
    )


def _judged(
    examples: Iterable[Example],
    folder: Path,
    row: Callable[[str, str], bytes],
    names: tuple[str, str, str, str],
    header: str,
    judgement: str,
) -> None:
    files = [(folder / name).open("wb") for name in names]
    try:
        query_file, corpus_file, qrels, run = files
        queries, corpus = _Table(query_file, row, "q"), _Table(corpus_file, row, "d")
        qrels.write(header.encode())
        ranked: set[str] = set()
        for example in examples:
            query = queries.add(example.query_id, example.query)
            right = corpus.add_all(example.positive_ids, example.positives)
            wrong = corpus.add_all(example.negative_ids, example.negatives)
            for document in right:
                qrels.write(judgement.format(query=query, document=document).encode())
            scores = (example.positive_scores or [math.nan] * len(right)) + (
                example.negative_scores or [math.nan] * len(wrong)
            )
            found = list(zip(right + wrong, scores))
            if query in ranked:
                raise ValueError(f"query {query!r} comes again: join its examples, a run ranks each query once")
            ranked.add(query)
            known = not any(math.isnan(score) for score in scores)
            if known:
                found.sort(key=lambda pair: -pair[1])
            for rank, (document, score) in enumerate(found if known else found[len(right) :], 1):
                line = (
                    f"{query}\tQ0\t{document}\t{rank}\t{score!r}\ttextcond\n"
                    if known
                    else f"{query}\t{document}\t{rank}\n"
                )
                run.write(line.encode())
    finally:
        for file in files:
            file.close()


TABLES = {"jsonl": _jsonl_table, "csv": _csv_table, "tsv": _tsv_table, "parquet": _parquet_table}
FILES = {"flagembedding": _flagembedding, "dpr": _dpr, "parallel": _parallel}
FOLDERS = {"tevatron": _tevatron, "ids": _ids, "beir": _beir, "msmarco": _msmarco}
OWNED = {
    "tevatron": ("*.jsonl",),
    "ids": ("*.jsonl",),
    "beir": ("corpus.jsonl", "queries.jsonl", "qrels", "run.*.tsv"),
    "msmarco": ("collection.tsv", "queries.*.tsv", "qrels.*.tsv", "run.*.tsv"),
}
