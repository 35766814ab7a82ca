"""Queries a second of `ExactSearch` and of faiss's exact index, their agreement, and the memory of mining.

    python tests/benchmarks/bench_mining.py --rows 100000
    python tests/benchmarks/bench_mining.py --rows 1000000 --queries 2048 --memory-mapped
    python tests/benchmarks/bench_mining.py --vectors embeddings.npy

It is CPU time of one thread, the two in turn, so that other processes on the machine count for little. Without
`--vectors` the vectors are clustered at random; of a file, the last rows are the queries. `--memory-mapped` keeps the
corpus in a file and leaves faiss out, whose index would be in memory.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy and torch are loaded

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from textcond.negatives import ExactSearch


def clustered(path: Path, rows: int, width: int, seed: int) -> np.ndarray:
    """Write unit vectors around 2,000 centres to a file, a block at a time, and map it."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((2000, width), np.float32)
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))
    for start in range(0, rows, 65_536):
        stop = min(start + 65_536, rows)
        block = centres[generator.integers(2000, size=stop - start)]
        block += 0.7 * generator.standard_normal(block.shape, np.float32)
        vectors[start:stop] = block / np.linalg.norm(block, axis=1, keepdims=True)
    vectors.flush()
    return np.load(path, mmap_mode="r")


def timed(function):
    """Return CPU seconds and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the share of the expected rows that were found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), expected.tolist())]))


def megabytes() -> float:
    """Return the peak of the process's memory in MB, file pages that are mapped in included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--memory-mapped", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        if arguments.vectors:
            stored = np.load(arguments.vectors, mmap_mode="r")
            corpus, queries = stored[: -arguments.queries], np.array(stored[-arguments.queries :], np.float32)
        else:
            corpus = clustered(Path(folder) / "corpus.npy", arguments.rows, arguments.width, 1)
            queries = np.array(clustered(Path(folder) / "queries.npy", arguments.queries, arguments.width, 2))
        measure(corpus, queries, arguments)


def measure(corpus: np.ndarray, queries: np.ndarray, arguments: argparse.Namespace) -> None:
    """Time both in turn and print what came out."""
    table = Table(
        title=f"top {arguments.k} of {len(corpus):,} x {corpus.shape[1]}, {len(queries):,} queries, one thread"
    )
    for column in ("search", "queries/s", "ratio", f"recall@{arguments.k}", "peak memory, MB"):
        table.add_column(column, justify="right")
    if arguments.memory_mapped:
        seconds, _ = timed(lambda: ExactSearch(corpus).search(queries, arguments.k))
        table.add_row("textcond, memory-mapped", f"{len(queries) / seconds:,.0f}", "", "", f"{megabytes():,.0f}")
    else:
        import faiss

        faiss.omp_set_num_threads(1)
        search = ExactSearch(np.array(corpus, np.float32))
        peer = faiss.IndexFlatIP(corpus.shape[1])
        peer.add(search.vectors)
        times = {"faiss": [], "textcond": []}
        for _ in range(arguments.repeats):
            seconds, (_, expected) = timed(lambda: peer.search(queries, arguments.k))
            times["faiss"].append(seconds)
            seconds, (_, found) = timed(lambda: search.search(queries, arguments.k))
            times["textcond"].append(seconds)
        theirs, ours = (len(queries) / float(np.median(times[name])) for name in ("faiss", "textcond"))
        table.add_row("faiss IndexFlatIP", f"{theirs:,.0f}", "1.00", "1.0000", "")
        row = f"{ours / theirs:.2f}", f"{recall(found, expected):.4f}", f"{megabytes():,.0f} (both)"
        table.add_row("textcond ExactSearch", f"{ours:,.0f}", *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
