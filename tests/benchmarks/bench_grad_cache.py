"""Time and peak memory of one training step: a small batch, a large one, and the large one with gradient caching.

python tests/benchmarks/bench_grad_cache.py --model MINILM --pairs runs/tasks/wordnet/train.jsonl
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from accelerate import Accelerator

from textcond import TextEncoder
from textcond.data import ExampleFile
from textcond.losses import InfoNCE
from textcond.training import TextBatch, backward


def step(model: str, pairs: str, batch: int, mini_batch: int | None) -> None:
    """Run one step in this process and print its figures."""
    encoder = TextEncoder.from_pretrained(model).train()
    rows = ExampleFile(pairs)
    drawn = TextBatch.draw([rows[row] for row in range(batch)], 0, torch.Generator().manual_seed(0))
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    backward(encoder, InfoNCE(0.05), drawn, Accelerator(cpu=True), mini_batch=mini_batch)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| {batch} | {mini_batch or '-'} | {wall:.1f} | {cpu:.1f} | {peak // 1024} | {(peak - loaded) // 1024} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--mini-batch", type=int, default=64)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        batch, _, mini_batch = arguments.one.partition(",")
        step(arguments.model, arguments.pairs, int(batch), int(mini_batch) if mini_batch else None)
        return
    print(
        "| pairs | mini_batch | wall s | CPU s | peak MB | above loading, MB |\n|---|---|---|---|---|---|", flush=True
    )
    small = arguments.mini_batch
    for one in (f"{small // 2},", f"{arguments.batch},{small}", f"{arguments.batch},"):
        # a process each: the peak is that of a process's whole life
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", one], check=True)


if __name__ == "__main__":
    main()
