"""Held-out names in many languages, asked among all English names: the encoder that ships beside its teacher.

    python tests/benchmarks/bench_multilingual.py --phrases runs/phrases OURS TEACHER

The last encoder is the peer; the ratio is the first one's figure to its.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from textcond import TextEncoder
from textcond.evaluation import RetrievalTask, evaluate_retrieval
from textcond.pipelines.reference.multilingual import name_task
from textcond.pipelines.reference.phrases import ALIGNED, WITHHELD

METRICS = ("nDCG@10", "R@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+", help="folders or hub ids; the last is the peer")
    parser.add_argument("--phrases", type=Path, required=True, help="the folder of build_phrases")
    parser.add_argument("--languages", nargs="+", default=[*ALIGNED, *WITHHELD])
    parser.add_argument("--tasks", type=Path, nargs="*", default=[], help="BEIR folders to ask too")
    arguments = parser.parse_args()
    tasks = [name_task(arguments.phrases, [language]) for language in arguments.languages]
    tasks += [RetrievalTask.load(task) for task in arguments.tasks]
    found = []
    for name in arguments.encoders:
        encoder = TextEncoder.from_pretrained(name)
        found.append([evaluate_retrieval(encoder, task, metrics=METRICS, k=10).means() for task in tasks])
    table = Table("task", "queries", *(f"{name}\nnDCG@10 / R@10" for name in arguments.encoders), "ratio")
    for row, task in enumerate(tasks):
        scores = [column[row] for column in found]
        cells = [f"{score['nDCG@10']:.3f} / {score['R@10']:.3f}" for score in scores]
        ratio = scores[0]["nDCG@10"] / max(scores[-1]["nDCG@10"], 1e-9)
        table.add_row(task.name, str(len(task.queries)), *cells, f"{ratio:.2f}")
    Console(width=max(80, 30 * (2 + len(found)))).print(table)


if __name__ == "__main__":
    main()
