"""What retrieval-augmented generation does for poor prompts on the reference model, judged by the pictures.

    python tests/benchmarks/bench_retrieval.py --out runs/retrieval --limit 60

Held-out cases are made poor by seeded rules; every mode and strength draws them from the same latents as "off" does,
and differences are paired. Foreign prompts are judged if `--encoder` (aligned: conditions the pictures and searches) or
`--index-encoder` (multilingual: searches, while the pipeline's own conditions) is given. Interrupted, the same command
goes on.
"""

import argparse
import os
import random
from dataclasses import dataclass
from pathlib import Path

# Read when torch and tokenizers are loaded.
os.environ |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
from tqdm import tqdm

from textcond import PromptIndex, TextEncoder
from textcond.files import atomic_file
from textcond.pipelines import load_reference, retrieval_encoder, swap_text_encoder
from textcond.pipelines.evaluation import Case, EmojiJudge, read_cases
from textcond.pipelines.evaluation.cache import ResultCache, cache_key, fingerprint
from textcond.pipelines.evaluation.pictures import latent_seed
from textcond.pipelines.reference import open_reference_index
from textcond.pipelines.reference.evaluate import interval
from textcond.pipelines.reference.held_out import CASES, KINDS
from textcond.pipelines.retrieval import NEIGHBOURS, blend, expand, softmaxed, suggest

MODES = [("expand", 0.5), ("expand", 0.9), ("blend", 0.15), ("blend", 0.3), ("blend", 0.5), ("blend", 0.8)]
FILLERS = ("some {}", "something with {}", "a nice {}", "{}, you know", "one of those {}")
JUDGED_AT_ONCE = 64


@dataclass
class Shared:
    """What all rows draw with."""

    pipe: object
    judge: EmojiJudge
    cache: ResultCache
    made_by: str
    steps: int
    guidance: float
    seeds: list[int]
    batch: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="cases of each kind of prompt; all when left out")
    parser.add_argument("--prompts", nargs="*", choices=[*POOR, "foreign"], default=[*POOR, "foreign"])
    parser.add_argument("--languages", nargs="*", help="of the foreign prompts; all when left out")
    parser.add_argument("--modes", nargs="*", type=mode, default=MODES, help="as expand:0.5 blend:0.3")
    parser.add_argument("--k", type=int, default=NEIGHBOURS)
    parser.add_argument("--encoder", help="an aligned encoder that conditions and searches")
    parser.add_argument("--index-encoder", help="a text encoder that searches only")
    parser.add_argument("--without-subject", action="store_true", help="hide what the index holds of the same concept")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()

    pipe = load_reference()
    pipe.set_progress_bar_config(disable=True)
    rows = list(open_reference_index().rows())
    if arguments.encoder:
        swap_text_encoder(pipe, arguments.encoder)
    if not arguments.encoder and not arguments.index_encoder:
        rows = [row for row in rows if row.metadata["language"] == "en"]
        if "foreign" in arguments.prompts:
            print("foreign prompts are left out: pass --encoder or --index-encoder")
            arguments.prompts.remove("foreign")
    searching = TextEncoder.from_pretrained(arguments.index_encoder) if arguments.index_encoder else None
    index = PromptIndex(searching or retrieval_encoder(pipe))
    index.add([row.text for row in rows], [row.metadata for row in rows], show_progress_bar=True)
    known = {row.text.casefold() for row in index.rows()}
    made_by = fingerprint(*pipe.components.values())
    shared = Shared(
        pipe, EmojiJudge(), ResultCache(arguments.out / "cache"), made_by, arguments.steps, arguments.guidance,
        arguments.seeds, arguments.batch,
    )  # fmt: skip

    all_cases = [case for kind in KINDS if kind != "wordings" for case in read_cases(CASES / f"{kind}.jsonl")]
    lines = [
        f"{len(known)} captions in the index, {arguments.k} neighbours, {arguments.steps} steps, guidance "
        f"{arguments.guidance}, seeds {' '.join(map(str, arguments.seeds))}; conditioned by "
        f"{arguments.encoder or 'the own encoder'}, searched by "
        f"{arguments.index_encoder or arguments.encoder or 'the own encoder'}. "
        + ("Captions of the same concept are hidden from the search." if arguments.without_subject else "The index "
           "holds captions of the same concepts, without their colours."),
        "Right neighbours: how much of their softmaxed weight is of the concept that the judge looks for.",
        "",
        "| prompts | cases | of them in the index | right neighbours | mode | strength | changed | concept | off "
        "| difference | 95% |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for kind in arguments.prompts:
        cases = poor_cases(all_cases, kind, arguments.languages, arguments.limit)
        inside = sum(bool({case.prompt.casefold(), case.english.casefold()} & known) for case in cases)
        hits = [
            neighbours(index, case, arguments.k, hide=arguments.without_subject)
            for case in tqdm(cases, desc=f"{kind}: search", unit="prompt")
        ]
        right = np.mean([
            sum(
                weight
                for hit, weight in zip(near, softmaxed(near))
                if hit.metadata.get("concept") == case.expected["concept"]
            )
            for case, near in zip(cases, hits)
        ])  # fmt: skip
        before = scores(shared, cases, [{"prompt": case.prompt} for case in cases], f"{kind}: off")
        for name, strength in arguments.modes:
            made = [
                {"prompt": expand(pipe, case.prompt, near, strength)}
                if name == "expand"
                else blend(pipe, case.prompt, near, strength)
                for case, near in zip(cases, hits)
            ]
            after = scores(shared, cases, made, f"{kind}: {name} {strength:g}")
            changed = sum(
                call != {"prompt": case.prompt} if "prompt" in call else True for call, case in zip(made, cases)
            )
            mean, low, high = interval(after - before)
            lines.append(
                f"| {kind} | {len(cases)} | {inside} | {right:.0%} | {name} | {strength:g} | {changed} "
                f"| {after.mean():.3f} | {before.mean():.3f} | {mean:+.3f} | {low:+.3f} to {high:+.3f} |"
            )
            print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    with atomic_file(arguments.out / "retrieval.md") as file:
        file.write(table.encode())
    print(table)


def mode(text: str) -> tuple[str, float]:
    """ "blend:0.3" as mode and strength."""
    name, _, strength = text.partition(":")
    if name not in ("expand", "blend"):
        raise argparse.ArgumentTypeError(f"{name!r} changes no picture: choose expand or blend")
    return name, float(strength)


def misspelled(text: str, generator: random.Random) -> str:
    """One letter swapped with the next, left out, doubled or mistaken in each word of four letters or more."""

    def spoiled(word: str) -> str:
        if len(word) < 4 or not word.isalpha():
            return word
        at = generator.randrange(1, len(word) - 1)
        return generator.choice([
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + generator.choice("etaoinsr") + word[at + 1 :],
        ])  # fmt: skip

    return " ".join(map(spoiled, text.split(" ")))


def vague(text: str, generator: random.Random) -> str:
    """One word of a name, among words that say nothing."""
    return generator.choice(FILLERS).format(generator.choice(text.split(" ")))


# Kind of prompt -> what it makes of a case: the text, and what may be expected of it.
POOR = {
    "full": lambda case, generator: (case.prompt, case.expected),
    "short": lambda case, generator: (case.subject, subject(case)),
    "vague": lambda case, generator: (vague(case.subject, generator), subject(case)),
    "misspelled": lambda case, generator: (misspelled(case.subject, generator), subject(case)),
}


def subject(case: Case) -> dict[str, str]:
    return {"concept": case.expected["concept"]}


def poor_cases(cases: list[Case], kind: str, languages: list[str] | None, limit: int | None) -> list[Case]:
    """Cases of a kind of prompt, evenly spaced among all; the same ones whatever else is judged."""
    if kind == "foreign":
        made = [case for case in cases if case.language != "en" and case.language in (languages or [case.language])]
        random.Random(kind).shuffle(made)  # files go round the languages: even spacing would pick one of them
    else:
        made = []
        for case in cases:
            if case.language == "en":
                text, expected = POOR[kind](case, random.Random(f"{kind} {case.english}"))
                made.append(Case(text, case.english, expected=expected))
    every = max(1, len(made) // limit) if limit else 1
    return made[::every][:limit]


def neighbours(index: PromptIndex, case: Case, k: int, *, hide: bool) -> list:
    if not hide:
        return suggest(index, case.prompt, k)
    # A concept has no more captions than styles and languages.
    found = suggest(index, case.prompt, k + 40)
    return [hit for hit in found if hit.metadata.get("concept") != case.expected["concept"]][:k]


def scores(shared: Shared, cases: list[Case], calls: list[dict], name: str) -> np.ndarray:
    """Share of the seeds at which the judge sees the concept, a case."""
    by_seed = []
    for seed in shared.seeds:
        seeds = [latent_seed(case, seed) for case in cases]
        keys = [
            cache_key(made_by=shared.made_by, steps=shared.steps, guidance=shared.guidance, seed=number, **named(call))
            for call, number in zip(calls, seeds)
        ]
        pictures = {key: shared.cache.picture(key) for key in keys}
        missing = [at for at, key in enumerate(keys) if pictures[key] is None and keys.index(key) == at]
        missing.sort(key=lambda at: "prompt" in calls[at])  # a call takes prompts or embeddings
        with tqdm(total=len(keys), initial=len(keys) - len(missing), desc=name, unit="picture") as bar:
            while missing:
                batch = [at for at in missing[: shared.batch] if calls[at].keys() == calls[missing[0]].keys()]
                missing = missing[len(batch) :]
                output = shared.pipe(
                    **together([calls[at] for at in batch]),
                    num_inference_steps=shared.steps,
                    guidance_scale=shared.guidance,
                    generator=[torch.Generator().manual_seed(seeds[at]) for at in batch],
                )
                for at, picture in zip(batch, output.images):
                    pictures[keys[at]] = picture.convert("RGB")
                    shared.cache.keep_picture(keys[at], pictures[keys[at]])
                bar.update(len(batch))
        seen = [
            shared.judge([pictures[key] for key in keys[at : at + JUDGED_AT_ONCE]], cases[at : at + JUDGED_AT_ONCE])
            for at in range(0, len(keys), JUDGED_AT_ONCE)
        ]
        by_seed.append(np.concatenate([batch["concept"] for batch in seen]))
    return np.mean(by_seed, axis=0)


def named(call: dict) -> dict:
    """The arguments of a call as a cache key can hold them."""
    return {
        name: value if isinstance(value, str) else cache_key(values=value.float().numpy().tobytes().hex())
        for name, value in call.items()
    }


def together(calls: list[dict]) -> dict:
    """One call of several, prompts apart from embeddings."""
    first = calls[0]
    if "prompt" in first:
        return {"prompt": [call["prompt"] for call in calls]}
    return {name: torch.cat([call[name] for call in calls]) for name in first}


if __name__ == "__main__":
    main()
