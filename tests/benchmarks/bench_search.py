"""CPU milliseconds a query of `PromptIndex.search`, and of faiss's exact index, or plain numpy where faiss is missing.

    python tests/benchmarks/bench_search.py --rows 10000 100000

It is CPU time, so that other processes on the machine count for little.
"""

import argparse
import os
import time

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when numpy and torch are loaded

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from textcond import PromptIndex, TextEncoder


class RandomVectors(TextEncoder):
    """A TextEncoder whose `encode` draws vectors, as only their number and width matter here."""

    def encode(self, texts, **options):
        """Return random unit vectors."""
        vectors = np.random.default_rng(len(texts)).standard_normal((len(texts), self.dim), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def exact_search(vectors: np.ndarray):
    """Return the peer's name and its search function."""
    try:
        import faiss
    except ImportError:

        def search(query: np.ndarray, k: int) -> np.ndarray:
            scores = vectors @ query
            best = np.argpartition(-scores, k)[:k]
            return best[np.argsort(-scores[best])]

        return "numpy argpartition", search
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return "faiss IndexFlatIP", lambda query, k: index.search(query[None], k)[1][0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--queries", type=int, default=50)
    arguments = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    sizes = {"hidden_size": arguments.width, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = RandomVectors(BertModel(BertConfig(vocab_size=4, **sizes)), tokenizer)
    queries = np.random.default_rng(0).standard_normal((arguments.queries, arguments.width), dtype=np.float32)

    table = Table(title=f"exact top {arguments.k} of {arguments.width}-wide vectors, one query at a time, one thread")
    for column in ("rows", "peer", "peer, ms", "textcond, ms", "ratio", "same rows"):
        table.add_column(column, justify="right")
    for rows in arguments.rows:
        index = PromptIndex(encoder)
        index.add(map(str, range(rows)))
        name, peer = exact_search(index._vectors())
        times = {"peer": [], "ours": []}
        same = 0
        for query in queries:
            start = time.process_time()
            expected = peer(query, arguments.k)
            middle = time.process_time()
            hits = index.search(query, arguments.k)
            times["ours"].append(time.process_time() - middle)
            times["peer"].append(middle - start)
            same += [hit.id for hit in hits] == expected.tolist()
        peer_ms, our_ms = (1000 * float(np.median(times[name])) for name in ("peer", "ours"))
        table.add_row(
            f"{rows:,}", name, f"{peer_ms:.2f}", f"{our_ms:.2f}", f"{our_ms / peer_ms:.2f}", f"{same}/{len(queries)}"
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
