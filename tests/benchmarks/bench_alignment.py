"""The recipes of the field and ours on one denoiser with one budget of CPU time, judged by the pictures.

    python tests/benchmarks/bench_alignment.py --encoder ENCODER --prompts prompts.tsv --out runs/alignment --minutes 5

Each row trains the same bridge and backbone from the same seed; how many steps its minutes buy is measured first. The
cases are the held-out ones that ship. With `--counts 300,3000`, it is instead the held-out distance by the number of
different prompts, on the same budget. Interrupted, the same command goes on.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when torch and tokenizers are loaded

import numpy as np

from textcond import TextEncoder
from textcond.folders import read_json, write_json
from textcond.pipelines import AlignmentOptions, align, load_reference
from textcond.pipelines.evaluation import EmojiJudge, evaluate_conditioning, read_cases
from textcond.pipelines.reference.held_out import CASES, KINDS

NONE = {"token_weight": 0.0, "attention_weight": 0.0, "contrast_weight": 0.0}
# Shares of the budget for the token stage and for the denoiser stage, and what is changed.
ROWS = {
    "closed form": (0.0, 0.0, {}),
    "token MSE": (1.0, 0.0, {**NONE, "token_weight": 1.0}),
    "pooled InfoNCE": (1.0, 0.0, {**NONE, "contrast_weight": 1.0}),
    "attention": (1.0, 0.0, {**NONE, "attention_weight": 1.0}),
    "denoiser": (0.0, 1.0, NONE),
    "all without the denoiser": (1.0, 0.0, {}),
    "all": (0.7, 0.3, {}),
    "timestep-aware": (0.7, 0.3, {"bridge": "timestep"}),
}
CALIBRATION = 12  # steps
HELD_OUT = 96  # lines, for the distance by the number of prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU minutes a row")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--limit", type=int, help="cases of each language")
    parser.add_argument("--languages", nargs="*", help="of the cases; all if left out")
    parser.add_argument("--counts", type=int, nargs="*", help="of prompts")
    arguments = parser.parse_args()
    pipe = load_reference()
    prompts = arguments.prompts.read_text(encoding="utf-8").splitlines()
    shared = {
        "train_backbone": True,
        "retrieval_weight": 0.0,
        "learning_rate": arguments.learning_rate,
        "layers": "average",
        "mixed_precision": "bf16",
        "validate_every": 1_000_000,
    }
    if arguments.counts:
        prompts = [prompts[place] for place in np.random.default_rng(0).permutation(len(prompts))]
        for row in arguments.rows:
            options = planned(pipe, prompts, row, shared, arguments)
            for count in arguments.counts:
                folder, given = arguments.out / f"{row.replace(' ', '-')}-{count}", prompts[HELD_OUT:][:count]
                aligned(pipe, arguments.encoder, given, folder, options, held_out=prompts[:HELD_OUT])
                distance = read_json(folder / "alignment.json")["held_out_distance"]
                print(f"{row}, {len(given)} prompts: distance {distance:.3f}", flush=True)
        return
    for row in arguments.rows:
        options = planned(pipe, prompts, row, shared, arguments)
        aligned(pipe, arguments.encoder, prompts, arguments.out / row.replace(" ", "-"), options)
    for kind in arguments.kind or KINDS:
        cases = read_cases(CASES / f"{kind}.jsonl", arguments.limit)
        report = evaluate_conditioning(
            pipe,
            {row: arguments.out / row.replace(" ", "-") for row in arguments.rows},
            [case for case in cases if not arguments.languages or case.language in arguments.languages],
            judge=EmojiJudge(),
            backbone=arguments.encoder,
            cache=arguments.out / "cache",
            show_progress_bar=True,
        )
        print(report.save(arguments.out / kind))


def aligned(pipe, encoder: str, prompts: list[str], folder: Path, options: AlignmentOptions, **given) -> None:
    if not (folder / "alignment.json").is_file():
        started = time.process_time()
        align(pipe, TextEncoder.from_pretrained(encoder), prompts, folder, options, **given)
        spent = time.process_time() - started
        print(f"{folder.name}: {options.token_steps} + {options.denoiser_steps} steps, {spent:.0f} CPU s", flush=True)


def planned(pipe, prompts: list[str], row: str, shared: dict, arguments: argparse.Namespace) -> AlignmentOptions:
    """Options whose steps take about the budget, measured once and kept for the run that goes on."""
    tokens, denoiser, changes = ROWS[row]
    note = arguments.out / f"{row.replace(' ', '-')}.json"
    if not note.is_file():
        seconds = {}
        for stage, share in (("token_steps", tokens), ("denoiser_steps", denoiser)):
            none = {"token_steps": 0, "denoiser_steps": 0}
            spent = [
                cpu_seconds(pipe, prompts[:5000], shared | changes | none | {stage: count}, arguments.encoder)
                for count in ((0, CALIBRATION) if share else ())
            ]
            step = (spent[1] - spent[0]) / CALIBRATION if share else 1.0
            seconds[stage] = max(1, round(60 * arguments.minutes * share / step)) if share else 0
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, seconds)
    return AlignmentOptions(**shared | changes | read_json(note))


def cpu_seconds(pipe, prompts: list[str], options: dict, encoder: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        text_encoder = TextEncoder.from_pretrained(encoder)
        align(pipe, text_encoder, prompts, folder, AlignmentOptions(**options), held_out=["a picture"])
        return time.process_time() - started


if __name__ == "__main__":
    main()
