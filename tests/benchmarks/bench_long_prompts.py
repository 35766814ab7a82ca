"""What an encoder hears of a long prompt: a held-out caption, and words around it that ask for nothing to be drawn.

    python tests/benchmarks/bench_long_prompts.py --encoder multilingual=FOLDER --out runs/long --limit 30

The words come after the caption, or before it, until the prompt has so many. Judged by the pictures, beside the
pipeline's own encoder, on the same latents at every length. Interrupted, the same command goes on.
"""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read when torch and tokenizers are loaded

from textcond.pipelines import load_reference, swapped
from textcond.pipelines.evaluation import EmojiJudge, read_cases
from textcond.pipelines.evaluation.cache import ResultCache, cache_key, fingerprint
from textcond.pipelines.evaluation.pictures import draw_pictures, latent_seed
from textcond.pipelines.reference.held_out import CASES

REST = """highly detailed, sharp focus, clean lines, smooth shading, professional work, award winning, carefully
finished, balanced composition, trending this week, masterpiece, best quality, very precise, studio lighting, full of
care, made with patience, as seen in a gallery, admired by many, the result of long practice, crisp and clear,"""
STEPS, GUIDANCE = 20, 4.0


def padded(caption: str, words: int, *, first: bool) -> str:
    """A caption at the beginning or at the end of a prompt of so many words."""
    rest, missing = REST.split(), words - len(caption.split())
    said = " ".join((rest * (1 + max(0, missing) // len(rest)))[: max(0, missing)]).rstrip(",")
    return ", ".join(part for part in ((caption, said) if first else (said, caption)) if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="append", default=[], help="NAME=FOLDER or hub id; may be repeated")
    parser.add_argument("--words", type=int, nargs="+", default=[20, 50, 100, 200, 400])
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True, help="pictures are kept here")
    arguments = parser.parse_args()
    pipe, judge, cache = load_reference(), EmojiJudge(), ResultCache(arguments.out)
    pipe.set_progress_bar_config(disable=True)
    cases = [case for case in read_cases(CASES / "prompts.jsonl") if case.language == "en"][: arguments.limit]
    seeds = [latent_seed(case, 0) for case in cases]
    lengths = [(0, True)] + [(words, first) for words in arguments.words for first in (True, False)]
    table = {length: [] for length in lengths}
    encoders = {"own": None} | dict(given.split("=", 1) for given in arguments.encoder)
    for encoder in encoders.values():
        with nullcontext() if encoder is None else swapped(pipe, encoder):
            made_by = fingerprint(*pipe.components.values())
            for words, first in lengths:
                texts = [padded(case.prompt, words, first=first) for case in cases]
                keys = [cache_key(made_by=made_by, text=text, seed=seed) for text, seed in zip(texts, seeds)]
                pictures = draw_pictures(
                    pipe, texts, seeds, keys, cache=cache, steps=STEPS, guidance=GUIDANCE, batch_size=8
                )
                table[words, first].append(100 * judge(pictures, cases)["concept"].mean())
    print(f"{len(cases)} captions, subject right x 100\n\n| words | caption | {' | '.join(encoders)} |")
    print("|---|---" + "|---" * len(encoders) + "|")
    for (words, first), scores in table.items():
        place = ("first" if first else "last") if words else "alone"
        print(f"| {words or ''} | {place} | {' | '.join(f'{score:.1f}' for score in scores)} |")


if __name__ == "__main__":
    main()
