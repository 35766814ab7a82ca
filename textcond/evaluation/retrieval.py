"""How well an encoder finds the documents that answer queries."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from textcond.encoder import TextEncoder
from textcond.negatives.search import ExactSearch

METRICS = ("nDCG@10", "RR@10", "R@10", "R@100", "AP")


@dataclass
class RetrievalTask:
    """Queries, documents, and which documents are right for which query.

    - `name`: what tables call it.
    - `queries`: query id -> text.
    - `corpus`: document id -> text; of a BEIR document, the title, a space and the text.
    - `qrels`: query id -> document id -> grade; above 0 is right. Queries without a right document are not asked.
    """

    name: str
    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @classmethod
    def load(cls, folder: str | Path, split: str = "test") -> RetrievalTask:
        """Read a folder in the layout of BEIR (Thakur et al., 2021): corpus, queries and `qrels/{split}.tsv`.

        Queries that the split does not judge, or for which nothing is right, are left out.

        Raises:
            FileNotFoundError: names the file that is missing.
            ValueError: names file and line of what cannot be read, repeats an id, or judges what is not there.
        """
        folder = Path(folder)
        corpus_file, queries_file, qrels_file = (
            folder / "corpus.jsonl",
            folder / "queries.jsonl",
            folder / "qrels" / f"{split}.tsv",
        )
        for file in (corpus_file, queries_file, qrels_file):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{folder} holds no {file.relative_to(folder)}: a task is a BEIR folder of corpus.jsonl, "
                    "queries.jsonl and qrels/SPLIT.tsv"
                )
        corpus, queries = _read_texts(corpus_file), _read_texts(queries_file)
        qrels = _read_qrels(qrels_file, queries, corpus)
        asked = {query: judged for query, judged in qrels.items() if any(grade > 0 for grade in judged.values())}
        if not asked:
            raise ValueError(f"{qrels_file} names no right document for any query: there is nothing to evaluate")
        return cls(folder.resolve().name, {query: queries[query] for query in asked}, corpus, asked)


@dataclass
class Scores:
    """What an encoder reached on a task.

    - `task`: the task's name.
    - `per_query`: metric -> query id -> value in 0..1.
    """

    task: str
    per_query: dict[str, dict[str, float]]

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the queries, in 0..1."""
        return statistics.fmean(self.per_query[metric].values())

    def means(self) -> dict[str, float]:
        """Return the mean of every metric."""
        return {metric: self.mean(metric) for metric in self.per_query}


def evaluate_retrieval(
    encoder: TextEncoder,
    task: RetrievalTask,
    *,
    k: int = 100,
    metrics: Sequence[str] = METRICS,
    batch_tokens: int = 4096,
    show_progress_bar: bool = False,
) -> Scores:
    """Rank the whole corpus for every query by inner product of unit vectors, and score the first `k` documents.

    Args:
        encoder: encodes queries with its "query" prompt and documents with its "document" prompt.
        task: what is asked.
        k: documents ranked for a query; metrics see no further.
        metrics: names of ir-measures: `nDCG@10`, `RR@10` (MRR), `R@100`, `AP` (MAP) ...
        batch_tokens: tokens in a batch of `encode`.
        show_progress_bar: show progress of encoding.

    Raises:
        ValueError: for a task without queries or documents, an unknown metric or one that looks further than `k`,
            or vectors that are not finite.
    """
    import ir_measures

    measures = _measures(metrics, k)
    asked = [query for query in task.queries if any(grade > 0 for grade in task.qrels.get(query, {}).values())]
    if not asked or not task.corpus:
        raise ValueError(f"task {task.name!r} has no judged query or no document: there is nothing to evaluate")
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "show_progress_bar": show_progress_bar}
    queries = encoder.encode([task.queries[query] for query in asked], kind="query", **options)
    documents = encoder.encode(list(task.corpus.values()), kind="document", **options)
    run = rank(queries, documents, asked, list(task.corpus), k)
    qrels = {query: task.qrels[query] for query in asked}
    # a query whose right documents were all ranked below k still counts, as 0
    per_query = {str(measure): dict.fromkeys(asked, 0.0) for measure in measures}
    for value in ir_measures.iter_calc(measures, qrels, run):
        per_query[str(value.measure)][value.query_id] = float(value.value)
    return Scores(task.name, per_query)


def rank(
    queries: np.ndarray, documents: np.ndarray, query_ids: Sequence[str], document_ids: Sequence[str], k: int
) -> dict[str, dict[str, float]]:
    """Return for every query the `k` documents of the largest cosine: query id -> document id -> score.

    Args:
        queries: `(q, dim)` float32.
        documents: `(n, dim)` float32.
        query_ids: q ids.
        document_ids: n ids.
        k: documents kept for a query.

    Raises:
        ValueError: if a vector is not finite.
    """
    scores, rows = ExactSearch(_unit(documents, "documents")).search(_unit(queries, "queries"), k)
    return {
        query: {document_ids[row]: score for row, score in zip(found.tolist(), values.tolist())}
        for query, values, found in zip(query_ids, scores, rows)
    }


def _unit(vectors: np.ndarray, name: str) -> np.ndarray:
    """Return vectors at unit length; those of encoders that do not normalise are compared by cosine too."""
    if not np.isfinite(vectors).all():
        raise ValueError(f"the encoder gives {name} vectors that are not finite: its weights are damaged")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _measures(metrics: Sequence[str], k: int) -> list[Any]:
    import ir_measures

    measures = []
    for metric in metrics:
        try:
            measure = ir_measures.parse_measure(metric)
        except (NameError, ValueError, SyntaxError) as error:
            raise ValueError(f"unknown metric {metric!r}: use names like {', '.join(METRICS)}") from error
        cutoff = measure.params.get("cutoff")
        if cutoff is not None and cutoff > k:
            raise ValueError(f"{metric} looks at {cutoff} documents, k={k} are ranked: raise k")
        measures.append(measure)
    return measures


def _read_texts(file: Path) -> dict[str, str]:
    """Read id -> text of a BEIR JSONL file; a title goes before the text."""
    texts = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is not JSON ({error}): mend or remove it") from error
            if not isinstance(row, Mapping) or not isinstance(row.get("text"), str) or "_id" not in row:
                raise ValueError(f'{file}, line {number} is not an object with "_id" and a string "text"')
            key = str(row["_id"])
            if key in texts:
                raise ValueError(f"{file}, line {number} repeats the id {key!r}: ids must be unique")
            texts[key] = f"{row.get('title') or ''} {row['text']}".strip()
    return texts


def _read_qrels(file: Path, queries: Mapping[str, str], corpus: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Read query id -> document id -> grade of a BEIR table, with or without its header."""
    qrels: dict[str, dict[str, int]] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip("\r\n").split("\t")
            if not line.strip() or (number == 1 and fields[-1] == "score"):
                continue
            if len(fields) != 3 or not fields[2].strip().lstrip("-").isdigit():
                raise ValueError(
                    f"{file}, line {number} is {line.rstrip()!r}: write query id, document id and whole grade, by tabs"
                )
            query, document, grade = fields[0], fields[1], int(fields[2])
            if query not in queries:
                raise ValueError(f"{file}, line {number} judges query {query!r}, which queries.jsonl lacks")
            if document not in corpus:
                raise ValueError(f"{file}, line {number} judges document {document!r}, which corpus.jsonl lacks")
            if document in qrels.setdefault(query, {}):
                raise ValueError(f"{file}, line {number} judges {document!r} for {query!r} a second time")
            qrels[query][document] = grade
    return qrels
