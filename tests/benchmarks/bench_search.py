"""Milliseconds a query of `PromptIndex.search`: the store's own time and ours, beside faiss or numpy on one thread.

    python tests/benchmarks/bench_search.py --rows 10000 100000
    python tests/benchmarks/bench_search.py --rows 100000 --texts prompts.txt --encoder FOLDER

Without `--texts`, texts are drawn from 5,000 words by Zipf's law and vectors around 2,000 centres, which are easier to
search than real ones: take recall from a run with real texts and a real encoder.
"""

import argparse
import os
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy and torch are loaded

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from textcond import PromptIndex, TextEncoder

BATCH = 2000


class GivenVectors(TextEncoder):
    """A TextEncoder whose `encode` looks vectors up, so that the time of an encoder is not measured."""

    vectors: dict[str, np.ndarray]

    def encode(self, texts, **options):
        """Return the vector of a text that was given one."""
        return self.vectors[texts]


class Timed:
    """A store that sums up the time that is spent in it."""

    def __init__(self, store):
        self.store, self.seconds = store, 0.0

    def __getattr__(self, name):
        method = getattr(self.store, name)

        def timed(*arguments, **options):
            start = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def given_vectors(width: int) -> GivenVectors:
    """Return the encoder of a benchmark without a model."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return GivenVectors(BertModel(BertConfig(vocab_size=4, **sizes)), tokenizer)


def drawn(rows: int, width: int) -> tuple[list[str], np.ndarray]:
    """Return texts of 4 to 20 words and unit vectors around centres."""
    generator = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5000)])
    texts = [
        f"{row} " + " ".join(words[np.minimum(generator.zipf(1.3, generator.integers(4, 20)), 5000) - 1])
        for row in range(rows)
    ]
    centres = generator.standard_normal((2000, width), dtype=np.float32)
    vectors = centres[generator.integers(0, 2000, rows)] + generator.standard_normal((rows, width), dtype=np.float32)
    return texts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def exact_search(vectors: np.ndarray):
    """Return the peer's name and its search function."""
    try:
        import faiss
    except ImportError:

        def search(query: np.ndarray, k: int) -> np.ndarray:
            scores = vectors @ query
            best = np.argpartition(-scores, k)[:k]
            return best[np.argsort(-scores[best])]

        return "numpy v @ q", search
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return "faiss Flat", lambda query, k: index.search(query[None], k)[1][0]


def percentiles(seconds: list[float]) -> list[str]:
    """Return the median and the 95th percentile in milliseconds."""
    return [f"{1000 * float(np.percentile(seconds, share)):.2f}" for share in (50, 95)]


def measure(table: Table, texts: list[str], vectors: np.ndarray, queries: list[tuple[str, np.ndarray]], k: int) -> None:
    """Build an index on disk and add its lines to the table."""
    encoder = given_vectors(vectors.shape[1])
    encoder.vectors = dict(queries)
    name, peer = exact_search(vectors)
    lines = []
    times = {"peer": []}
    expected = []
    for _, query in queries:
        start = time.perf_counter()
        expected.append({str(row) for row in peer(query, k)})
        times["peer"].append(time.perf_counter() - start)
    baseline = float(np.median(times["peer"]))
    lines.append((name, *percentiles(times["peer"]), "-", "-", "1.00", "1.000"))

    with TemporaryDirectory() as folder:
        index = PromptIndex.create(Path(folder) / "index", encoder)
        start = time.perf_counter()
        for at in range(0, len(texts), BATCH):
            ids = [str(row) for row in range(at, min(at + BATCH, len(texts)))]
            index.add(texts[at : at + BATCH], ids=ids, vectors=vectors[at : at + BATCH])
        stored = time.perf_counter() - start
        start = time.perf_counter()
        index.optimize()
        optimized = time.perf_counter() - start
        stats = index.stats()
        index.store = Timed(index.store)
        for mode in ("dense", "lexical", "hybrid"):
            for filter in (None, {"style": "none"}) if mode == "dense" else (None,):
                total, ours, shared = [], [], []
                for number, (text, _) in enumerate([queries[0], *queries]):
                    index.store.seconds, start = 0.0, time.perf_counter()
                    hits = index.search(text, k, mode=mode, filter=filter, collapse=True)
                    took = time.perf_counter() - start
                    if number:  # the first opens files
                        total.append(took)
                        ours.append(took - index.store.seconds)
                        shared.append(len({hit.id for hit in hits} & expected[number - 1]) / k)
                recall = f"{np.mean(shared):.3f}" if mode == "dense" and filter is None else "-"
                label = f"textcond {mode}" + (" filtered" if filter else "")
                ratio = f"{float(np.median(total)) / baseline:.2f}"
                lines.append((label, *percentiles(total), *percentiles(ours), ratio, recall))
        for line in lines:
            table.add_row(f"{len(texts):,}", *line)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{len(texts):,} rows: stored in {stored:.1f} s ({len(texts) / stored:,.0f} a second), optimised in "
            f"{optimized:.1f} s, {stats['bytes'] / 2**20:.0f} MiB on disk, peak memory {peak:.0f} MiB, "
            f"ann {stats['ann']}"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--texts", type=Path, help="a text a line; the last ones are the queries")
    parser.add_argument("--encoder", help="encodes the texts; needed with --texts")
    arguments = parser.parse_args()
    most = max(arguments.rows) + arguments.queries
    if arguments.texts:
        lines = dict.fromkeys(arguments.texts.read_text(encoding="utf-8").splitlines())
        texts = [line for line in lines if line.strip()][:most]
        vectors = TextEncoder.from_pretrained(arguments.encoder).encode(texts, kind="document", show_progress_bar=True)
    else:
        texts, vectors = drawn(most, arguments.width)
    queries = list(zip(texts[-arguments.queries :], vectors[-arguments.queries :]))
    table = Table(title=f"top {arguments.k} of {vectors.shape[1]}-wide vectors, one query at a time, ms")
    columns = ("rows", "search", "p50", "p95", "ours p50", "ours p95", "ratio to peer", f"recall@{arguments.k}")
    for column in columns:
        table.add_column(column, justify="right")
    for rows in arguments.rows:
        rows = min(rows, len(texts) - arguments.queries)
        measure(table, texts[:rows], vectors[:rows], queries, arguments.k)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
