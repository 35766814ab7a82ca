"""Where candidate negatives come from: at random, by BM25, by vectors, from a run file."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textcond.bm25 import BM25Index
from textcond.data.run import Run
from textcond.encoder import TextEncoder

from .corpus import Corpus
from .embeddings import cached_embeddings
from .search import ExactSearch

if TYPE_CHECKING:
    from textcond.data import Example


class Source(ABC):
    """Ranks rows of a corpus for queries; `prepare` is called once before anything else."""

    corpus: Corpus
    ranked = True  # whether the order means anything, so that a window of ranks does

    def prepare(self, corpus: Corpus, *, show_progress_bar: bool = False) -> None:
        """Index the corpus."""
        self.corpus = corpus

    @abstractmethod
    def candidates(
        self, examples: Sequence[Example], count: int, generators: Sequence[np.random.Generator]
    ) -> list[np.ndarray]:
        """Return at most `count` distinct rows for each example, int64, best first.

        A row of -1 holds the rank of a document that the corpus lacks.
        """

    def describe(self) -> dict[str, Any]:
        """Return JSON values that fix what it finds in a given corpus."""
        return {"source": type(self).__name__}


class ScoringSource(Source):
    """A source that can also score any document for a query."""

    @abstractmethod
    def score(self, examples: Sequence[Example], documents: Sequence[Sequence[int | str]]) -> list[np.ndarray]:
        """Return float64 scores of each example's documents: rows of the corpus, or texts that are not in it."""


class Random(Source):
    """Rows drawn evenly from the whole corpus."""

    ranked = False

    def candidates(
        self, examples: Sequence[Example], count: int, generators: Sequence[np.random.Generator]
    ) -> list[np.ndarray]:
        """Return rows in random order."""
        size = len(self.corpus)
        if 2 * count >= size:
            return [generator.permutation(size)[:count] for generator in generators]
        # at most half of the corpus is asked for: drawing twice as many leaves enough distinct ones nearly always,
        # and a row or two fewer where not
        return [_distinct(generator.integers(size, size=2 * count))[:count] for generator in generators]


class BM25(ScoringSource):
    """The rows of largest BM25 score, in any script (`textcond.bm25.BM25Index`)."""

    def prepare(self, corpus: Corpus, *, show_progress_bar: bool = False) -> None:
        """Tokenize and index the corpus."""
        super().prepare(corpus)
        self._index = BM25Index(corpus.texts)

    def candidates(
        self, examples: Sequence[Example], count: int, generators: Sequence[np.random.Generator]
    ) -> list[np.ndarray]:
        """Return rows that share a word with the query."""
        return [self._index.search(example.query, count)[0] for example in examples]

    def score(self, examples: Sequence[Example], documents: Sequence[Sequence[int | str]]) -> list[np.ndarray]:
        """Return BM25 scores."""
        texts = self.corpus.texts
        return [
            np.array(self._index.score(example.query, [d if isinstance(d, str) else texts[d] for d in own]))
            for example, own in zip(examples, documents)
        ]


class Dense(ScoringSource):
    """The rows whose vectors have the largest inner product with the query's.

    Args:
        encoder: encodes queries with its query prompt, or an example's own, and the corpus as documents.
        cache: a folder for the corpus's vectors, which are found there again as long as the encoder's weights are
            equal.
    """

    def __init__(self, encoder: TextEncoder, cache: str | Path):
        self.encoder = encoder
        self.cache = cache
        self._last: tuple[list[tuple[str | None, str]], np.ndarray] | None = None

    def prepare(self, corpus: Corpus, *, show_progress_bar: bool = False) -> None:
        """Encode the corpus, or find it encoded."""
        super().prepare(corpus)
        vectors = cached_embeddings(
            self.encoder, corpus.texts, "document", self.cache, show_progress_bar=show_progress_bar
        )
        self._search = ExactSearch(vectors, device=self.encoder.device)

    def candidates(
        self, examples: Sequence[Example], count: int, generators: Sequence[np.random.Generator]
    ) -> list[np.ndarray]:
        """Return the nearest rows."""
        return list(self._search.search(self._queries(examples), count)[1])

    def score(self, examples: Sequence[Example], documents: Sequence[Sequence[int | str]]) -> list[np.ndarray]:
        """Return inner products; a text that is not in the corpus is encoded."""
        queries = self._queries(examples).astype(np.float64)
        strangers = list(dict.fromkeys(d for own in documents for d in own if isinstance(d, str)))
        encoded = dict(zip(strangers, self.encoder.encode(strangers, kind="document")))
        vectors, width = self._search.vectors, self.encoder.dim
        return [
            np.array([encoded[d] if isinstance(d, str) else vectors[d] for d in own], np.float64).reshape(-1, width)
            @ query
            for query, own in zip(queries, documents)
        ]

    def describe(self) -> dict[str, Any]:
        """Return the weights' hash besides the name."""
        return super().describe() | {"weights_hash": self.encoder.weights_hash()}

    def _queries(self, examples: Sequence[Example]) -> np.ndarray:
        # the same queries are asked for twice: to find candidates, then to score them
        asked = [(example.prompt, example.query) for example in examples]
        if self._last is None or self._last[0] != asked:
            self._last = asked, encode_queries(self.encoder, examples)
        return self._last[1]


class RunFile(Source):
    """The documents of a run (`textcond.data.run.Run`) in the order of its ranks, for queries with a `query_id`.

    The ids are those of the corpus.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a malformed line, by file and line.
    """

    def __init__(self, path: str | Path):
        self._run = Run(path)

    def candidates(
        self, examples: Sequence[Example], count: int, generators: Sequence[np.random.Generator]
    ) -> list[np.ndarray]:
        """Return the run's documents, none for a query that the run lacks.

        Raises:
            ValueError: for a query without an id, or a run none of whose documents the corpus has.
        """
        return [self._ranked(example)[:count] for example in examples]

    def describe(self) -> dict[str, Any]:
        """Return the file's hash besides the name."""
        return super().describe() | {"sha256": self._run.digest}

    def _ranked(self, example: Example) -> np.ndarray:
        if example.query_id is None:
            raise ValueError(f"the query {example.query!r:.80} has no query_id, by which a run file names it")
        found = list(self._run.documents(example.query_id))
        rows = [self.corpus.row_of_id(document) for document in found]
        if rows and all(row is None for row in rows):
            raise ValueError(
                f"{self._run.path}: the corpus has none of the documents of query {example.query_id} "
                f"({found[0]!r}, ...): give the corpus that the run was made on"
            )
        return _distinct(np.array([-1 if row is None else row for row in rows], np.int64))


def build_sources(
    weights: Mapping[str, float],
    *,
    encoder: TextEncoder | None = None,
    cache: str | Path | None = None,
    run: str | Path | None = None,
) -> dict[Source, float]:
    """Return sources by name, with their weights, as `mine` takes them: "random", "bm25", "dense", "run".

    Raises:
        ValueError: for an unknown name, "dense" without an encoder and a cache folder, or "run" without a file.
    """
    sources: dict[Source, float] = {}
    for name, weight in weights.items():
        if name == "random":
            sources[Random()] = weight
        elif name == "bm25":
            sources[BM25()] = weight
        elif name == "dense":
            if encoder is None or cache is None:
                raise ValueError("the source 'dense' needs an encoder and a folder to cache vectors in")
            sources[Dense(encoder, cache)] = weight
        elif name == "run":
            if run is None:
                raise ValueError("the source 'run' needs a run file")
            sources[RunFile(run)] = weight
        else:
            raise ValueError(f"unknown source {name!r}: use random, bm25, dense or run")
    return sources


def encode_queries(encoder: TextEncoder, examples: Sequence[Example]) -> np.ndarray:
    """Return float32 vectors `(examples, dim)` of queries, an example's own prompt in place of the encoder's."""
    vectors = np.empty((len(examples), encoder.dim), np.float32)
    by_prompt: dict[str | None, list[int]] = {}
    for index, example in enumerate(examples):
        by_prompt.setdefault(example.prompt, []).append(index)
    for prompt, indices in by_prompt.items():
        prompted = encoder
        if prompt is not None:
            prompted = copy.copy(encoder)
            prompted.config = dataclasses.replace(encoder.config, prompts={**encoder.config.prompts, "query": prompt})
        vectors[indices] = prompted.encode([examples[index].query for index in indices], kind="query")
    return vectors


def _distinct(rows: np.ndarray) -> np.ndarray:
    """Drop later copies of a row; an unknown one, -1, holds its rank."""
    _, first = np.unique(rows, return_index=True)
    keep = rows < 0
    keep[first] = True
    return rows[keep].astype(np.int64)
