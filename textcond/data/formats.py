"""One reader a format: each turns what the field publishes into examples, a row at a time."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from textcond.data.example import Example, as_list, as_score
from textcond.data.rows import Problems, container, is_datasets_folder, open_bytes, parse_json, read_lines, read_rows
from textcond.data.run import Run
from textcond.data.text_table import TextTable, titled

LABELS = ("label", "labels", "score", "scores")


def flagembedding(path: Path, problems: Problems) -> Iterator[Example]:
    """`query, pos[], neg[], pos_scores[], neg_scores[], prompt` a line; a folder: all of its .jsonl files."""
    for file in _jsonl_files(path):
        for line, row in read_rows(file, problems):
            example = problems.attempt(file, line, Example.from_row, row, file.name)
            if example is not None:
                yield example


def sentence_transformers(
    path: Path, problems: Problems, *, split: str | None = None, threshold: float | None = None
) -> Iterator[Example]:
    """Columns by ORDER: pair, triplet, n-tuple, labeled pair, labeled list; labels in label, labels, score or scores.

    A column of scores of an n-tuple is read as sentence-transformers writes and trains it: a score for the positive
    and each negative, or the margins between them. Pairs with labels are joined while the query stays the same.
    Labels that are all 0 or 1 say what is positive; among other scores those of at least `threshold` are, or the best
    of a query if no threshold is given.
    """
    columns: list[str] | None = None
    group: list[tuple[int, str, Any, float]] = []
    for line, row in read_rows(path, problems, split=split):
        columns = columns or list(row)
        if set(row) != set(columns):
            problems.bad(
                path, line, f"columns {', '.join(row)}, the first row has {', '.join(columns)}: write the same"
            )
            continue
        label = next((name for name in LABELS if name in row), None)
        texts = [row[name] for name in columns if name != label]
        if len(texts) < 2:
            raise ValueError(f"{path}:{line}: one column of texts ({', '.join(columns)}): give a query and a positive")
        value = None if label is None else problems.attempt(path, line, _decoded, row[label], label)
        if label is not None and value is None:
            continue
        if len(texts) == 2 and isinstance(value, float):
            if group and group[0][1] != texts[0]:
                yield from _joined(path, group, threshold, problems)
                group = []
            group.append((line, texts[0], texts[1], value))
            continue
        if len(texts) == 2 and isinstance(value, list):
            example = problems.attempt(path, line, _labeled_list, texts, value, label, threshold, path.name)
        else:
            example = problems.attempt(path, line, _tuple, texts, value, label, path.name)
        if example is not None:
            yield example
    if group:
        yield from _joined(path, group, threshold, problems)


def natural_questions(path: Path, problems: Problems, *, split: str | None = None) -> Iterator[Example]:
    """`query, answer` pairs by name; `question` and a list of `answers` do as well."""
    for line, row in read_rows(path, problems, split=split):
        example = problems.attempt(path, line, _question, row, path.name)
        if example is not None:
            yield example


def dpr(path: Path, problems: Problems) -> Iterator[Example]:
    """DPR's JSON array of `question, positive_ctxs, hard_negative_ctxs, negative_ctxs`; hard negatives come first.

    `score` is kept as it is: in DPR's own downloads it is BM25's, no teacher's.
    """
    for line, row in read_rows(path, problems):
        example = problems.attempt(path, line, _dpr_row, row, path.name)
        if example is not None:
            yield example


def msmarco(
    path: Path, problems: Problems, *, split: str = "train", run: str | Path | None = None, negatives: int = 10
) -> Iterator[Example]:
    """A folder of `collection.tsv, queries.SPLIT.tsv, qrels.SPLIT.tsv`, or a triples file of texts or of ids.

    Triples of ids find their texts in the folder that they lie in. `run` (`qid pid rank`, or six TREC columns) gives
    each query its first `negatives` documents that are not relevant, and scores if it has them.
    """
    folder = path if path.is_dir() else path.parent

    def tables() -> tuple[TextTable, TextTable]:
        queries = _found(folder, f"queries.{split}.tsv", "queries.tsv")
        return TextTable(queries, problems=problems), TextTable(_found(folder, "collection.tsv"), problems=problems)

    if path.is_dir():
        qrels = _found(path, f"qrels.{split}.tsv", "qrels.tsv")
        yield from _judged(*tables(), qrels, run, negatives, problems, path.name)
        return
    texts: tuple[TextTable, TextTable] | None = None
    for line, text in read_lines(path, problems):
        fields = text.split("\t")
        if len(fields) != 3:
            problems.bad(path, line, f"{len(fields)} fields: write query, positive and negative, with tabs between")
            continue
        if line == 1 and all(field.isdecimal() for field in fields):
            texts = tables()
        example = problems.attempt(path, line, _triple, fields, texts, path.name)
        if example is not None:
            yield example


def beir(
    path: Path, problems: Problems, *, split: str = "train", run: str | Path | None = None, negatives: int = 10
) -> Iterator[Example]:
    """A folder of `corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv`; documents judged 0 are negatives, as are `run`'s."""
    queries, corpus = (TextTable(_found(path, f"{name}.jsonl"), problems=problems) for name in ("queries", "corpus"))
    yield from _judged(queries, corpus, _found(path / "qrels", f"{split}.tsv"), run, negatives, problems, path.name)


def tevatron(
    path: Path, problems: Problems, *, split: str = "train", documents: str | Path | None = None
) -> Iterator[Example]:
    """Tevatron: `query_text, positive_document_ids, negative_document_ids` with a corpus of `docid, document_text`.

    A row of the older form holds its passages itself (`query, positive_passages, negative_passages`). `path` is the
    file of rows, with `documents` the corpus or a folder's corpus.jsonl; or a folder of SPLIT.jsonl and corpus.jsonl.
    """
    rows = _found(path, f"{split}.jsonl", f"{split}.parquet") if path.is_dir() else path
    corpus: TextTable | None = None
    for line, row in read_rows(rows, problems):
        if corpus is None and "positive_document_ids" in row:
            beside = documents or _found(rows.parent, "corpus.jsonl", "corpus.parquet")
            corpus = TextTable(beside, problems=problems)
        example = problems.attempt(rows, line, _tevatron_row, row, corpus, path.name)
        if example is not None:
            yield example


def ids(
    path: Path,
    problems: Problems,
    *,
    split: str = "train",
    queries: str | Path | None = None,
    documents: str | Path | None = None,
) -> Iterator[Example]:
    """`query_id, document_ids, scores` with tables of queries and documents, as PyLate distils from.

    The document with the best score is the positive, unless a column `positive_document_ids` says which are. Lists
    may be written as text. The tables are files, or lie beside the rows as queries and documents (.jsonl, .parquet).
    """
    rows = _found(path, f"{split}.jsonl", f"{split}.parquet") if path.is_dir() else path

    def table(given: str | Path | None, name: str) -> TextTable:
        return TextTable(given or _found(rows.parent, f"{name}.jsonl", f"{name}.parquet"), problems=problems)

    tables = table(queries, "queries"), table(documents, "documents")
    for line, row in read_rows(rows, problems):
        example = problems.attempt(rows, line, _ids_row, row, *tables, path.name)
        if example is not None:
            yield example


def parallel(path: Path, problems: Problems) -> Iterator[Example]:
    """Plain parallel text: a file of `text TAB translation` lines, or a folder or name of two files, line by line."""
    if path.is_file():
        for line, text in read_lines(path, problems):
            fields = text.split("\t")
            if len(fields) != 2:
                problems.bad(path, line, f"{len(fields)} fields: write a text, a tab, its translation")
                continue
            example = problems.attempt(path, line, _pair, *fields, path.name)
            if example is not None:
                yield example
        return
    first, second = _two_files(path)
    with open_bytes(first) as left, open_bytes(second) as right:
        line = 0
        while True:
            line += 1
            texts = left.readline(), right.readline()
            if not all(texts):
                if any(texts):
                    shorter = first if texts[1] else second
                    raise ValueError(f"{shorter}:{line}: ends before its translation: the files must have equal lines")
                return
            example = problems.attempt(first, line, _decoded_pair, *texts, path.name)
            if example is not None:
                yield example


READERS = {
    "flagembedding": flagembedding,
    "sentence-transformers": sentence_transformers,
    "msmarco": msmarco,
    "natural-questions": natural_questions,
    "dpr": dpr,
    "beir": beir,
    "tevatron": tevatron,
    "ids": ids,
    "csv": sentence_transformers,
    "tsv": sentence_transformers,
    "parquet": sentence_transformers,
    "parallel": parallel,
}


def detect(path: Path) -> str:
    """Return the format of a file or folder, by its name, what lies in it and its first row.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: for what is none of the formats; says what was seen.
    """
    if is_datasets_folder(path):
        return _by_columns(path)
    if path.is_dir():
        names = {entry.name.removesuffix(".gz") for entry in path.iterdir() if not entry.name.startswith(".")}
        if {"corpus.jsonl", "queries.jsonl"} <= names and (path / "qrels").is_dir():
            return "beir"
        if "collection.tsv" in names:
            return "msmarco"
        for train in ("train.jsonl", "train.jsonl.gz", "train.parquet"):
            if (path / train).is_file() and (found := _by_columns(path / train)) in ("tevatron", "ids"):
                return found
        if any(name.endswith(".jsonl") for name in names):
            return _by_columns(_jsonl_files(path)[0])
        if len(names) == 2 and all((path / name).is_file() for name in names):
            return "parallel"
        raise _unknown(path, f"a folder of {', '.join(sorted(names)[:8]) or 'nothing'}")
    if not path.exists():
        if len(list(path.parent.glob(f"{path.name}.*"))) == 2:
            return "parallel"
        raise FileNotFoundError(f"no file or folder {path}: check the path")
    kind = container(path)
    if kind == "tsv" and path.name.startswith(("triples", "qidpidtriples")):
        return "msmarco"
    if kind is None:
        raise _unknown(path, f"a file named {path.name}")
    return _by_columns(path)


def _by_columns(path: Path) -> str:
    first = next((row for _, row in read_rows(path, Problems())), None)
    if first is None:
        raise ValueError(f"{path} holds no row: check what wrote it")
    has = set(first).issuperset
    if has({"query", "pos"}):
        return "flagembedding"
    if has({"positive_ctxs"}):
        return "dpr"
    if has({"positive_document_ids", "query_text"}) or has({"positive_passages"}):
        return "tevatron"
    if has({"query_id", "document_ids"}):
        return "ids"
    if set(first) in ({"query", "answer"}, {"question", "answer"}, {"question", "answers"}):
        return "natural-questions"
    texts = [value for name, value in first.items() if name not in LABELS]
    if len(texts) > 1 and isinstance(texts[0], str):
        kind = container(path)
        return kind if kind in ("csv", "tsv", "parquet") else "sentence-transformers"
    raise _unknown(path, f"a first row with the columns {', '.join(first) or 'none'}")


def _unknown(path: Path, seen: str) -> ValueError:
    return ValueError(f"{path}: {seen} is none of the formats {', '.join(READERS)}: pass the format, or convert it")


def _jsonl_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.glob("*.jsonl*") if container(file) == "jsonl")
    if not files:
        raise FileNotFoundError(f"{path} is neither a file nor a folder of .jsonl files: check the path")
    return files


def _found(folder: Path, *names: str) -> Path:
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{folder} holds no {' or '.join(names)} (.gz or not): add it, or pass another path")


def _two_files(path: Path) -> tuple[Path, Path]:
    files = sorted(path.iterdir() if path.is_dir() else path.parent.glob(f"{path.name}.*"))
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if len(files) != 2:
        raise ValueError(f"{path}: {len(files)} files, parallel text is two: {path.name}.en and {path.name}.ja, say")
    return files[0], files[1]


def _decoded(value: Any, name: str) -> float | list[Any]:
    """Return a label as a number or a list; texts are what CSV makes of them."""
    if value is None:
        raise ValueError(f"no {name}: give a number or a list of numbers")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise ValueError(f"{name} is {value!r:.60}: give a number or a list of numbers") from None
    return as_score(value, name) if isinstance(value, (int, float)) else as_list(value, name) or []


def _text_list(value: Any, name: str) -> list[Any]:
    """Return a list that may be written as text, in JSON or Python's way."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                raise ValueError(f"{name} is {value!r:.60}: give a list") from None
    return as_list(value, name) or []


def _tuple(texts: list[Any], value: float | list[Any] | None, label: str | None, source: str) -> Example:
    query, positive, *rest = texts
    negatives: list[Any] = []
    for cell in rest:
        negatives += cell if isinstance(cell, list) else [] if cell is None else [cell]
    if value is None:
        return Example(query, [positive], negatives, source=source)
    scores = [as_score(score, str(label)) for score in (value if isinstance(value, list) else [value])]
    if len(scores) == len(negatives):
        scores = [0.0, *(-margin for margin in scores)]
    if len(scores) != 1 + len(negatives):
        raise ValueError(
            f"{len(scores)} {label} for a positive and {len(negatives)} negatives: give a score for each of them, "
            "or a margin for each negative"
        )
    return Example(query, [positive], negatives, scores[:1], scores[1:], source=source)


def _labeled_list(texts: list[Any], values: list[Any], label: str, threshold: float | None, source: str) -> Example:
    documents = _text_list(texts[1], "the list of documents")
    if len(documents) != len(values):
        raise ValueError(f"{len(documents)} documents with {len(values)} {label}: give one for each")
    return _labeled(texts[0], documents, [as_score(value, label) for value in values], threshold, source)


def _labeled(query: Any, documents: list[Any], scores: list[float], threshold: float | None, source: str) -> Example:
    binary = all(score in (0, 1) for score in scores)
    if binary or threshold is not None:
        right = [score >= (1 if binary else threshold) for score in scores]
    else:
        best = max((score for score in scores if not math.isnan(score)), default=math.nan)
        # the first of equals
        right = [place == scores.index(best) if best in scores else False for place in range(len(scores))]
    parts = [[place for place, is_right in enumerate(right) if is_right is wanted] for wanted in (True, False)]
    positives, negatives = ([documents[place] for place in part] for part in parts)
    if not positives:
        raise ValueError(f"no positive among {len(scores)} documents of {query!r:.60}: label one 1, or leave it out")
    known = [None, None] if binary else [[scores[place] for place in part] for part in parts]
    return Example(query, positives, negatives, known[0], known[1], source=source)


def _joined(
    path: Path, group: list[tuple[int, str, Any, float]], threshold: float | None, problems: Problems
) -> Iterator[Example]:
    line, query = group[0][:2]
    documents, scores = [row[2] for row in group], [row[3] for row in group]
    example = problems.attempt(path, line, _labeled, query, documents, scores, threshold, path.name)
    if example is not None:
        yield example


def _question(row: Mapping[str, Any], source: str) -> Example:
    query = next((row[name] for name in ("query", "question") if name in row), None)
    answers = next((row[name] for name in ("answer", "answers") if name in row), None)
    if query is None or answers is None:
        raise ValueError(f"columns {', '.join(row)}: name query (or question) and answer (or answers)")
    several = "answers" in row or isinstance(answers, list)
    return Example(query, _text_list(answers, "answers") if several else [answers], source=source)


def _dpr_row(row: Mapping[str, Any], source: str) -> Example:
    if missing := [key for key in ("question", "positive_ctxs") if key not in row]:
        raise ValueError(f"no key {missing[0]!r} among {', '.join(row)}: name question and positive_ctxs")
    parts = [
        _passages(row["positive_ctxs"], "positive_ctxs"),
        [passage for key in ("hard_negative_ctxs", "negative_ctxs") for passage in _passages(row.get(key) or [], key)],
    ]
    texts = [[titled(passage.get("title"), passage["text"]) for passage in part] for part in parts]
    known = [_values(part, "passage_id", "psg_id", "docid") for part in parts]
    scores = [_values(part, "score") for part in parts]
    return Example(
        row["question"],
        texts[0],
        texts[1],
        *([as_score(score, "score") for score in values] if values else None for values in scores),
        positive_ids=known[0] and [str(ident) for ident in known[0]],
        negative_ids=known[1] and [str(ident) for ident in known[1]],
        source=source,
    )


def _passages(value: Any, name: str) -> list[dict[str, Any]]:
    passages = as_list(value, name) or []
    for passage in passages:
        if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
            raise ValueError(f"{name} holds {passage!r:.60}: give objects with a text")
    return passages


def _values(passages: list[dict[str, Any]], *names: str) -> list[Any] | None:
    """Return what each passage has under the first of the names that all of them have."""
    for name in names:
        if passages and all(name in passage for passage in passages):
            return [passage[name] for passage in passages]
    return None


def _triple(fields: list[str], texts: tuple[TextTable, TextTable] | None, source: str) -> Example:
    query, positive, negative = fields
    if texts is None:
        return Example(query, [positive], [negative], source=source)
    return Example(
        _text(texts[0], query),
        [_text(texts[1], positive)],
        [_text(texts[1], negative)],
        query_id=query,
        positive_ids=[positive],
        negative_ids=[negative],
        source=source,
    )


def _text(table: TextTable, ident: str) -> str:
    try:
        text = table[ident]
    except KeyError:
        raise ValueError(f"the id {ident!r} is not in {table.path}: add it there, or remove the row") from None
    if not text.strip():
        raise ValueError(f"the text of {ident!r} in {table.path} is empty: fill it in, or remove the row")
    return text


def _judged(
    queries: TextTable,
    corpus: TextTable,
    qrels: Path,
    run: str | Path | None,
    negatives: int,
    problems: Problems,
    source: str,
) -> Iterator[Example]:
    ranked = None if run is None else Run(run, problems=problems)
    for query_id, (line, judged) in _read_qrels(qrels, problems).items():
        if not any(grade > 0 for grade in judged.values()):
            continue  # judged without a relevant document: nothing to pull towards
        example = problems.attempt(
            qrels, line, _judged_example, query_id, judged, queries, corpus, ranked, negatives, source
        )
        if example is not None:
            yield example


def _judged_example(
    query_id: str,
    judged: dict[str, int],
    queries: TextTable,
    corpus: TextTable,
    run: Run | None,
    negatives: int,
    source: str,
) -> Example:
    right = [ident for ident, grade in judged.items() if grade > 0]
    wrong = [ident for ident, grade in judged.items() if grade <= 0]
    found = {} if run is None else run.documents(query_id)
    wrong += [ident for ident in found if ident not in judged][:negatives]
    scores = [[found.get(ident, math.nan) for ident in part] for part in (right, wrong)]
    known = [None if all(map(math.isnan, part)) else part for part in scores]
    return Example(
        _text(queries, query_id),
        [_text(corpus, ident) for ident in right],
        [_text(corpus, ident) for ident in wrong],
        known[0],
        known[1],
        query_id,
        right,
        wrong,
        source=source,
    )


def _read_qrels(path: Path, problems: Problems) -> dict[str, tuple[int, dict[str, int]]]:
    """Return of each query its first line and its documents' grades; of TREC's four columns or BEIR's three."""
    judged: dict[str, tuple[int, dict[str, int]]] = {}
    for line, text in read_lines(path, problems):
        fields = text.split("\t") if "\t" in text else text.split()
        if line == 1 and fields[-1].lower() in ("score", "rel", "relevance", "label"):
            continue
        if len(fields) not in (3, 4) or not fields[-1].lstrip("-").isdecimal():
            problems.bad(path, line, f"{text!r:.60} is no judgement: write `qid 0 docid grade` or `qid docid grade`")
            continue
        judged.setdefault(fields[0], (line, {}))[1][fields[-2]] = int(fields[-1])
    return judged


def _tevatron_row(row: Mapping[str, Any], corpus: TextTable | None, source: str) -> Example:
    query = next((row[name] for name in ("query_text", "query") if row.get(name) is not None), None)
    query_id = None if row.get("query_id") is None else str(row["query_id"])
    if corpus is None:
        parts = [_passages(row.get(key), key) for key in ("positive_passages", "negative_passages")]
        texts = [[titled(passage.get("title"), passage["text"]) for passage in part] for part in parts]
        idents = [_values(part, "docid") for part in parts]
        known = [values and [str(ident) for ident in values] for values in idents]
    else:
        keys = ("positive_document_ids", "negative_document_ids")
        known = [[str(ident) for ident in _text_list(row.get(key), key)] for key in keys]
        texts = [[_text(corpus, ident) for ident in part] for part in known]
    scores = [as_list(row.get(key), key) for key in ("positive_scores", "negative_scores")]
    numbers = [None if values is None else [as_score(value, "scores") for value in values] for values in scores]
    return Example(query, texts[0], texts[1], *numbers, query_id, known[0], known[1], source=source)


def _ids_row(row: Mapping[str, Any], queries: TextTable, documents: TextTable, source: str) -> Example:
    if missing := [key for key in ("query_id", "document_ids") if row.get(key) is None]:
        raise ValueError(f"no {missing[0]} among {', '.join(row)}: name query_id, document_ids and scores")
    idents = [str(ident) for ident in _text_list(row["document_ids"], "document_ids")]
    scores = [as_score(score, "scores") for score in _text_list(row.get("scores"), "scores")]
    if len(scores) != len(idents):
        raise ValueError(f"{len(idents)} document_ids with {len(scores)} scores: give a score for each")
    query = _text(queries, str(row["query_id"]))
    right = [str(ident) for ident in _text_list(row.get("positive_document_ids"), "positive_document_ids")]
    if not right:
        ranked = [(score, -place) for place, score in enumerate(scores) if not math.isnan(score)]
        right = [idents[-max(ranked)[1]]] if ranked else []
    parts = [[place for place, ident in enumerate(idents) if (ident in right) is wanted] for wanted in (True, False)]
    known = [[idents[place] for place in part] for part in parts]
    texts = [[_text(documents, ident) for ident in part] for part in known]
    numbers = [[scores[place] for place in part] for part in parts]
    return Example(query, *texts, *numbers, str(row["query_id"]), *known, source=source)


def _pair(first: str, second: str, source: str) -> Example:
    return Example(first, [second], source=source)


def _decoded_pair(first: bytes, second: bytes, source: str) -> Example:
    try:
        texts = [raw.decode("utf-8-sig").rstrip("\r\n") for raw in (first, second)]
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason}): convert the file to UTF-8") from None
    return Example(texts[0], [texts[1]], source=source)
