"""Stage "evaluate": what the judge says of unselected pictures with fixed seeds, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from .data import COLOURS, DEFAULT_COLOUR, STYLES, ReferenceData, caption, is_held_out
from .judge import Judge


@dataclass
class Case:
    """One picture to make and what the judge should see in it."""

    prompt: str
    concept: int
    style: str
    colour: str


def drawn_styles(data: ReferenceData) -> list[list[str]]:
    """For each concept the training styles in which a vendor drew it."""
    styles: list[list[str]] = [[] for _ in data.concepts]
    for row in data.rows():
        concept, style = data.icons[row]
        styles[concept].append(style)
    return styles


def style_cases(data: ReferenceData, count: int, turn: int = 0) -> list[Case]:
    """ "{name}, {style} style" for each of the first `count` concepts, its styles taking turns from `turn` on."""
    cases = []
    for index, styles in enumerate(drawn_styles(data)[:count]):
        style = styles[(index + turn) % len(styles)]
        cases.append(Case(caption(data.concepts[index], style), index, style, DEFAULT_COLOUR))
    return cases


def combination_cases(data: ReferenceData, count: int, *, held_out: bool) -> list[Case]:
    """One subject-style-colour combination a concept, all from training or all kept out of it."""
    cases = []
    for index, styles in enumerate(drawn_styles(data)[:count]):
        concept = data.concepts[index]
        options = [
            (style, colour)
            for style in styles
            for colour in COLOURS
            if colour != DEFAULT_COLOUR and is_held_out(concept.name, style, colour) == held_out
        ]
        style, colour = options[np.random.default_rng(index).integers(len(options))]
        cases.append(Case(caption(concept, style, colour), index, style, colour))
    return cases


def generate(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    batch: int = 10,
) -> list[Image.Image]:
    """One picture a prompt, each from its own seed, so that neither batches nor processes change it."""
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch), desc="generate", unit="batch", mininterval=5):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        pictures += pipe(
            prompts[start : start + batch],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
        ).images
    return pictures


def to_pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures -> float in -1..1, `(n, 3, h, w)`."""
    stack = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(stack).float().permute(0, 3, 1, 2) / 127.5 - 1


@torch.inference_mode()
def judge_pictures(judge: Judge, pictures: list[Image.Image], cases: list[Case], among: int) -> dict[str, np.ndarray]:
    """Hits a picture: `top1` and `top5` among the first `among` concepts, `top1_all`, `style`, `colour`."""
    verdict = judge(to_pixels(pictures))
    concept = torch.tensor([case.concept for case in cases])
    ranked = verdict.concept[:, :among].topk(min(5, among), dim=1).indices
    style = torch.tensor([list(STYLES).index(case.style) for case in cases])
    colour = torch.tensor([list(COLOURS).index(case.colour) for case in cases])
    return {
        "top1": (ranked[:, 0] == concept).numpy(),
        "top5": (ranked == concept[:, None]).any(1).numpy(),
        "top1_all": (verdict.concept.argmax(1) == concept).numpy(),
        "style": (verdict.style.argmax(1) == style).numpy(),
        "colour": (verdict.colour.argmax(1) == colour).numpy(),
    }


def interval(hits: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval over pictures."""
    rng = np.random.default_rng(seed)
    means = hits[rng.integers(len(hits), size=(draws, len(hits)))].mean(1)
    return float(hits.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def evaluate(
    pipe: StableDiffusionPipeline, judge: Judge, data: ReferenceData, count: int, accelerator: Accelerator
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Every score of the first `count` concepts with its interval, by kind of prompt; processes share the pictures."""
    report = {}
    for kind, cases in {
        # Two pictures a concept, in two styles where it has them: the score that the model is built for.
        "style prompts": style_cases(data, count) + style_cases(data, count, turn=1),
        "seen combinations": combination_cases(data, count, held_out=False),
        "held-out combinations": combination_cases(data, count, held_out=True),
    }.items():
        mine = list(range(accelerator.process_index, len(cases), accelerator.num_processes))
        pictures = generate(pipe, [cases[index].prompt for index in mine], mine)
        hits = judge_pictures(judge, pictures, [cases[index] for index in mine], count)
        hits = [dict(zip(hits, row)) for row in zip(*(values.tolist() for values in hits.values()))]
        together = dict(gather_object(list(zip(mine, hits))))
        report[kind] = {
            key: interval(np.array([together[index][key] for index in range(len(cases))])) for key in hits[0]
        }
    return report


def grid(pictures: list[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Pictures in rows on white."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return sheet


def save_samples(pipe: StableDiffusionPipeline, data: ReferenceData, count: int, out: Path) -> list[str]:
    """The model card's 64 unselected samples: evenly spaced style prompts, seeds in order; returns the prompts."""
    cases = style_cases(data, count)
    prompts = [cases[index * count // 64].prompt for index in range(64)]
    grid(generate(pipe, prompts, list(range(1000, 1064))), 8).save(out)
    return prompts
