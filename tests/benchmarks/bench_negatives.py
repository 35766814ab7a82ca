"""What each kind of negative is worth: one base model, one budget, tasks of `local_tasks.py`.

    python tests/benchmarks/bench_negatives.py --model MINILM --teacher E5 --task DIR --out DIR

Every row is trained on the same pairs with the same batches, steps and learning rate; only the explicit negatives
differ. Scores are of held-out queries, the untouched base model first. What is done is taken from OUT when run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from textcond import TextEncoder
from textcond.evaluation import compare
from textcond.negatives import EncoderTeacher, MiningOptions, build_sources, mine_file
from textcond.training import Data, Recipe, Stage, train

INFONCE = {"name": "infonce", "temperature": 0.05}
DISTILLATION = {"name": "listwise_kl", "temperature": 0.05, "teacher_temperature": 0.02, "weight": 0.5}
ROWS = {  # name: (source, options of the filter, scored by the teacher)
    "in-batch only": None,
    "+ random": ("random", {}, False),
    "+ BM25": ("bm25", {}, False),
    "+ dense, naive": ("dense", {}, False),
    "+ dense, positive-aware": ("dense", {"relative": 0.95}, False),
    "+ dense, scored and distilled by the teacher": ("dense", {"relative": 0.98}, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--task", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--negatives", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, action="append")
    arguments = parser.parse_args()
    for task in arguments.task:
        encoders = {"base": str(arguments.model)}
        for seed in arguments.seed or [0]:
            for name, row in ROWS.items():
                encoders[f"{name}, seed {seed}"] = str(trained(task, name, row, seed, arguments))
        comparison = compare(
            {name: (lambda path=path: TextEncoder.from_pretrained(path)) for name, path in encoders.items()}, [task]
        )
        print(comparison.markdown(), flush=True)


def trained(task: Path, name: str, row: tuple | None, seed: int, arguments: argparse.Namespace) -> Path:
    """The folder of a trained encoder, trained now if it is not there."""
    out = arguments.out / task.name / f"{name.replace(' ', '-').strip('+-').replace(',', '')}-{seed}"
    if (out / "encoder" / "modules.json").is_file():
        return out / "encoder"
    data, loss = task / "train.jsonl", INFONCE
    if row is not None:
        source, rules, by_teacher = row
        data = out / "mined.jsonl"
        if not data.is_file():
            # the training half of the corpus: what is right for a test query is never a negative
            mine_file(
                task / "train.jsonl",
                data,
                task / "corpus-train.jsonl",
                build_sources({source: 1.0}, encoder=base(arguments.model), cache=arguments.out / "vectors"),
                MiningOptions(num_negatives=4, range_max=30, seed=seed, **rules),
                teacher=EncoderTeacher(base(arguments.teacher)) if by_teacher else None,
                teacher_name=arguments.teacher if by_teacher else None,
            )
        if by_teacher:
            loss = [INFONCE, DISTILLATION]
    stage = Stage(
        [Data(str(data))],
        steps=arguments.steps,
        loss=loss,
        batch_size=32,
        negatives=arguments.negatives,
        learning_rate=arguments.learning_rate,
    )
    return train(Recipe(arguments.model, [stage], seed=seed), out / "run").rename(out / "encoder")


def base(name: str) -> TextEncoder:
    return TextEncoder.from_pretrained(name)


if __name__ == "__main__":
    main()
