"""Hard negatives for examples: candidates from sources, scored, filtered, drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from textcond.duplicates import jaccard, normalised, shingles, text_key

from .corpus import Corpus
from .known import KnownPositives
from .options import MiningOptions, MiningReport
from .sources import BM25, Dense, ScoringSource, Source
from .teachers import Teacher, score_pairs

if TYPE_CHECKING:
    from textcond.data import Example

QUERY_BLOCK = 1024
RANDOM_SPARE = 4  # candidates of an unranked source for each negative asked for, so that filters leave enough


def mine(
    examples: Iterable[Example],
    corpus: Corpus | Sequence[str] | Mapping[str, str] | str | Path,
    sources: Mapping[Source, float],
    options: MiningOptions | None = None,
    *,
    teacher: Teacher | None = None,
    known_positives: KnownPositives | None = None,
    report: MiningReport | None = None,
    show_progress_bar: bool = False,
) -> Iterator[Example]:
    """Yield the examples with negatives from a corpus in place of any that they had, in their order.

    Sources share the negatives of a query by weight: each count is its share, rounded up or down by a seeded draw so
    that over queries the weights hold exactly; where one runs out the others fill in, the heaviest first. A document
    counts as one candidate however many sources name it.

    All scores come from one scorer, so that they compare: the teacher, else the first Dense source, else the first
    BM25 source. Without any, examples come without scores. A positive that the corpus lacks is scored by its text.
    The input is read 1024 examples at a time, and nothing is held of it longer.

        sources = {BM25(): 0.5, Dense(encoder, "cache"): 0.5}
        for example in mine(examples, {"d1": "a text", ...}, sources, MiningOptions(relative=0.95)): ...

    Args:
        examples: queries with positives. A list is read through first for what is known to be right for equal queries.
        corpus: texts, texts by id, a BEIR folder, or a Corpus.
        sources: each with its weight.
        options: how many, from which ranks, by which rules.
        teacher: scores `(query, document)` pairs, called across queries.
        known_positives: what is right for a query beyond its own positives; needed for a stream whose queries recur.
        report: filled with counts as examples are drawn.
        show_progress_bar: show progress.

    Raises:
        ValueError: for no source, a weight that is not above 0, rules by score without a scorer, or a short query with
            `on_short="error"`.
    """
    if known_positives is None and isinstance(examples, Sequence):
        known_positives = KnownPositives(examples)
    report = report if report is not None else MiningReport()
    miner = Miner.of(Corpus.of(corpus), sources, options or MiningOptions(), teacher, known_positives, report)
    return _stream(miner, examples, show_progress_bar)


def _stream(miner: Miner, examples: Iterable[Example], show_progress_bar: bool) -> Iterator[Example]:
    miner.prepare(show_progress_bar)
    stream, done = iter(examples), 0
    total = len(examples) if isinstance(examples, Sequence) else None
    with tqdm(total=total, desc="mine", unit="query", disable=not show_progress_bar) as progress:
        while block := list(islice(stream, QUERY_BLOCK)):
            yield from miner.mine(block, done)
            done += len(block)
            progress.update(len(block))


def _scorer(sources: Mapping[Source, float]) -> ScoringSource | None:
    for kind in (Dense, BM25, ScoringSource):
        for source in sources:
            if isinstance(source, kind):
                return source
    return None


@dataclasses.dataclass
class _Query:
    """An example on its way: its candidates by source, and the rows and scores of all of them."""

    example: Example
    generator: np.random.Generator
    positives: list[int | str]  # rows, or texts that the corpus lacks
    pools: list[list[int]]
    rows: list[int]
    positive_scores: np.ndarray | None = None
    scores: dict[int, float] | None = None


@dataclasses.dataclass
class Miner:
    """Mines block after block; `mine` and `mine_file` say how."""

    corpus: Corpus
    sources: Mapping[Source, float]
    options: MiningOptions
    teacher: Teacher | None
    scorer: ScoringSource | None
    known: KnownPositives | None
    report: MiningReport

    @classmethod
    def of(
        cls,
        corpus: Corpus,
        sources: Mapping[Source, float],
        options: MiningOptions,
        teacher: Teacher | None,
        known: KnownPositives | None,
        report: MiningReport,
    ) -> Miner:
        """Return a miner whose parts fit together; the errors are those of `mine`."""
        if not sources or not all(weight > 0 for weight in sources.values()):
            raise ValueError(f"sources with weights {list(sources.values())}: give at least one, each weight above 0")
        scorer = _scorer(sources)
        if options.by_score and teacher is None and scorer is None:
            names = ", ".join(type(source).__name__ for source in sources)
            raise ValueError(f"rules by score, but {names} give none: pass a teacher, or add a Dense source")
        return cls(corpus, sources, options, teacher, scorer, known, report)

    def prepare(self, show_progress_bar: bool) -> None:
        """Let every source index the corpus."""
        for source in self.sources:
            source.prepare(self.corpus, show_progress_bar=show_progress_bar)

    def mine(self, examples: list[Example], first: int) -> Iterator[Example]:
        """Yield a block of examples with their negatives; `first` is the number of its first in the whole input."""
        queries = self._candidates(examples, first)
        if self.teacher is not None or self.scorer is not None:
            self._score(queries)
        for query in queries:
            self.report.queries += 1
            chosen = self._choose(query)
            if len(chosen) < self.options.num_negatives:
                self.report.short += 1
                if self.options.on_short == "error":
                    raise ValueError(
                        f"{len(chosen)} negatives for {query.example.query!r:.80}, {self.options.num_negatives} asked "
                        'for: widen the ranks or loosen the rules, or pass on_short="keep" or "drop"'
                    )
                if self.options.on_short == "drop":
                    continue
            self.report.written += 1
            self.report.negatives += len(chosen)
            yield self._finished(query, chosen)

    def _candidates(self, examples: list[Example], first: int) -> list[_Query]:
        options = self.options
        generators = [np.random.default_rng([options.seed, first + place]) for place in range(len(examples))]
        ranked = []
        for source in self.sources:
            if source.ranked:
                rows = source.candidates(examples, options.range_max, generators)
                ranked.append([own[options.range_min :] for own in rows])
            else:
                ranked.append(source.candidates(examples, RANDOM_SPARE * options.num_negatives + 8, generators))
        return [
            self._query(example, generator, [pool[place] for pool in ranked])
            for place, (example, generator) in enumerate(zip(examples, generators))
        ]

    def _query(self, example: Example, generator: np.random.Generator, pools: list[np.ndarray]) -> _Query:
        positives = self._positive_rows(example)
        self.report.missing_positives += any(isinstance(positive, str) for positive in positives)
        right = {text_key(text) for text in (example.query, "", *example.positives)}
        right |= self.known.of(example.query) if self.known is not None else set()
        kept = []
        rows: dict[int, None] = {}
        seen: set[int] = set()
        for pool in pools:
            pool = pool[pool >= 0]
            own = []
            for row, key in zip(pool.tolist(), self.corpus.text_keys(pool).tolist()):
                wrong = key not in right and row not in positives
                if row not in seen:
                    seen.add(row)
                    self.report.candidates += 1
                    self.report.known_positives += not wrong
                if wrong:
                    own.append(row)
                    rows[row] = None
            kept.append(own)
        return _Query(example, generator, positives, kept, list(rows))

    def _positive_rows(self, example: Example) -> list[int | str]:
        """Return each positive's row, by its id or else by its text; its text if the corpus lacks it."""
        found: list[int | str] = []
        for place, text in enumerate(example.positives):
            row = self.corpus.row_of_id(example.positive_ids[place]) if example.positive_ids else None
            if row is None:
                row = next(iter(self.corpus.rows_of_text(text)), None)
            found.append(text if row is None else row)
        return found

    def _score(self, queries: list[_Query]) -> None:
        if self.teacher is not None:
            texts = [[*query.example.positives, *(self.corpus.texts[row] for row in query.rows)] for query in queries]
            scores = score_pairs(self.teacher, [query.example.query for query in queries], texts)
        else:
            documents = [[*query.positives, *query.rows] for query in queries]
            scores = self.scorer.score([query.example for query in queries], documents)
        for query, own in zip(queries, scores):
            query.positive_scores = own[: len(query.positives)]
            candidate_scores = own[len(query.positives) :]
            query.scores = dict(zip(query.rows, candidate_scores.tolist()))
            good = self.options.passes(candidate_scores, query.positive_scores)
            self.report.filtered += int((~good).sum())
            passed = {row for row, ok in zip(query.rows, good) if ok}
            query.pools = [[row for row in pool if row in passed] for pool in query.pools]

    def _choose(self, query: _Query) -> list[int]:
        """Return the rows of the negatives: slots are dealt to sources by weight, and filled in a seeded order."""
        options, generator = self.options, query.generator
        weights = np.array(list(self.sources.values()))
        pools = query.pools
        if options.sampling == "random":
            pools = [[pool[place] for place in generator.permutation(len(pool))] for pool in pools]
        # systematic sampling: counts add up to num_negatives, and each is on average its share exactly
        edges = np.floor(np.cumsum(weights / weights.sum()) * options.num_negatives + generator.random() + 1e-9)
        counts = np.diff(np.minimum(edges, options.num_negatives), prepend=0).astype(int)
        counts[-1] += options.num_negatives - counts.sum()
        slots = generator.permutation(np.repeat(np.arange(len(pools)), counts))
        heaviest = sorted(range(len(pools)), key=lambda place: -weights[place])
        chosen = _Chosen(self.corpus, self.options, query.example, self.report)
        remaining = [iter(pool) for pool in pools]
        for slot in slots:
            for place in (slot, *heaviest):
                if chosen.take(remaining[place]):
                    break
        return chosen.rows

    def _finished(self, query: _Query, chosen: list[int]) -> Example:
        changes = {
            "negatives": [self.corpus.texts[row] for row in chosen],
            "negative_ids": [self.corpus.id(row) for row in chosen] if self.corpus.has_ids else None,
            "negative_scores": None,
        }
        if query.scores is not None:
            changes["negative_scores"] = [query.scores[row] for row in chosen]
            changes["positive_scores"] = [float(score) for score in query.positive_scores]
        return dataclasses.replace(query.example, **changes)


class _Chosen:
    """The negatives chosen so far, and what a further one must not be like."""

    def __init__(self, corpus: Corpus, options: MiningOptions, example: Example, report: MiningReport):
        self.corpus, self.report, self.threshold = corpus, report, options.near_duplicate
        self.rows: list[int] = []
        self._tried: set[int] = set()
        self._keys: set[int] = set()
        self._shingles = [] if self.threshold is None else [_shingles(t) for t in (example.query, *example.positives)]

    def take(self, pool: Iterator[int]) -> bool:
        """Choose the next row that is unlike all others; False if there is none."""
        return any(self._take(row) for row in pool)

    def _take(self, row: int) -> bool:
        if row in self._tried:
            return False
        self._tried.add(row)
        key = int(self.corpus.text_keys(np.array([row]))[0])
        if key in self._keys:
            self.report.duplicates += 1
            return False
        if self.threshold is not None:
            own = _shingles(self.corpus.texts[row])
            if any(jaccard(own, other) >= self.threshold for other in self._shingles):
                self.report.duplicates += 1
                return False
            self._shingles.append(own)
        self._keys.add(key)
        self.rows.append(row)
        return True


def _shingles(text: str) -> frozenset[str]:
    return shingles(normalised(text))
