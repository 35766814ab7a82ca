"""Pictures as queries of another text encoder: the reference CLIP's image tower, trained on to its vectors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from textcond import TextEncoder
from textcond.index.image_text import OpenClipTower
from textcond.pipelines.loop import fit, share, step_generator

from .clip import IMAGE_SIZE, augment
from .data import COLOURS, DEFAULT_COLOUR, HELD_OUT_STYLE, ReferenceData

BATCH = 64
PENALTY = 1e-2  # of the squared weights of the ridge regression, as a share of the number of drawings


@dataclass
class TowerRecipe:
    """Options of the training; a step reads the names of all concepts in one language, English with `english`."""

    steps: int = 2000
    batch: int = 64
    english: float = 0.3
    temperature: float = 0.05
    learning_rate: float = 1e-3
    seed: int = 0


def train_image_tower(
    encoder: TextEncoder,
    tower: OpenClipTower,
    data: ReferenceData,
    out: Path,
    languages: Sequence[str],
    recipe: TowerRecipe,
    accelerator: Accelerator,
) -> OpenClipTower:
    """A copy of the tower that gives an encoder's vectors: fitted by ridge regression, then trained by InfoNCE.

    The encoder's vectors of names stay as they are. What all names of a language share is taken away from them in
    training; half of it is added to the tower's vectors at the end, which serves both directions of the search.

    Args:
        encoder: of unit vectors; it is left as it is.
        tower: of the reference CLIP, trained with another text encoder; it is left as it is.
        data: every vendor's drawings are read but the held-out one's.
        out: the state of the training, which goes on from there.
        languages: of the names, CLDR's codes.

    Returns:
        A tower that gives vectors of `encoder.dim`.
    """
    rows = [row for row in data.rows() if data.icons[row][1] != HELD_OUT_STYLE]
    concepts = torch.tensor([data.icons[row][0] for row in rows])
    names = {language: torch.from_numpy(encoder.encode(_names(data, language))) for language in languages}
    shared = names["en"].mean(0)
    names = {language: F.normalize(vectors - vectors.mean(0), dim=-1) for language, vectors in names.items()}
    tower = _fitted(tower, data, rows, names["en"][concepts])
    mine = share(accelerator, recipe.batch)

    def loss(prepared: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([recipe.seed, step])
        picks = rng.integers(len(rows), size=recipe.batch)[mine]
        colours = rng.choice(list(COLOURS), recipe.batch)[mine].tolist()
        language = "en" if rng.random() < recipe.english else str(rng.choice(languages))
        pixels = _pixels(data, [rows[pick] for pick in picks], colours)
        seen = F.normalize(prepared(augment(pixels, step_generator(recipe.seed, step))).float(), dim=-1)
        own = concepts[picks]
        scores = seen @ names[language].to(seen.device).T / recipe.temperature
        alike = (own[:, None] == own) & ~torch.eye(len(own), dtype=torch.bool)
        to_picture = scores[:, own].T.masked_fill(alike.to(scores.device), -torch.inf)
        value = F.cross_entropy(scores, own.to(scores.device))
        value = value + F.cross_entropy(to_picture, torch.arange(len(own), device=scores.device))
        return value, {"accuracy": (scores.argmax(1).cpu() == own).float().mean().item()}

    weights = fit(
        "image tower", tower, loss, out=out, steps=recipe.steps, batch=recipe.batch, decay=0.5, weight_decay=0.05,
        learning_rate=recipe.learning_rate, adam_rate=recipe.learning_rate / 4, bf16=True, accelerator=accelerator,
    )  # fmt: skip
    tower.load_state_dict(weights)
    length = _features(tower.eval(), data, rows, [DEFAULT_COLOUR] * len(rows)).norm(dim=1).mean().cpu()
    with torch.no_grad():
        tower.visual.attnpool.c_proj.bias += (length * shared / 2).to(tower.visual.attnpool.c_proj.bias)
    return tower.cpu()


def _fitted(tower: OpenClipTower, data: ReferenceData, rows: list[int], wanted: Tensor) -> OpenClipTower:
    """A copy of the tower whose last projection gives `wanted`, a vector for each row."""
    tower = copy.deepcopy(tower)
    pool = tower.visual.attnpool
    width = pool.c_proj.in_features
    pool.c_proj = nn.Linear(width, width)
    nn.init.eye_(pool.c_proj.weight)
    nn.init.zeros_(pool.c_proj.bias)
    seen = _features(tower, data, rows, [DEFAULT_COLOUR] * len(rows)).double()
    mean, scale = seen.mean(0), seen.std(0).mean()
    centred = (seen - mean) / scale
    gram = centred.T @ centred + PENALTY * len(seen) * torch.eye(width, dtype=torch.float64)
    weights = torch.linalg.solve(gram, centred.T @ wanted.double()) / scale
    pool.c_proj = nn.Linear(width, wanted.shape[1])
    with torch.no_grad():
        pool.c_proj.weight.copy_(weights.T)
        pool.c_proj.bias.copy_(-mean @ weights)
    tower.config["embed_dim"] = wanted.shape[1]
    return tower


def _names(data: ReferenceData, language: str) -> list[str]:
    """Every concept's name in a language, the English one where CLDR has none."""
    return [concept.names.get(language, concept.name) for concept in data.concepts]


def _pixels(data: ReferenceData, rows: list[int], colours: list[str]) -> Tensor:
    """Drawings on colours as the tower reads them."""
    return F.interpolate(data.composite(rows, colours), size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")


@torch.inference_mode()
def _features(tower: OpenClipTower, data: ReferenceData, rows: list[int], colours: list[str]) -> Tensor:
    """What the tower gives of drawings on colours, `(rows, width)`."""
    batches = range(0, len(rows), BATCH)
    device = next(tower.parameters()).device
    pixels = (_pixels(data, rows[at : at + BATCH], colours[at : at + BATCH]) for at in batches)
    return torch.cat([tower(batch.to(device)) for batch in pixels])


def picture_recall(
    encoder: TextEncoder, tower: OpenClipTower, data: ReferenceData, language: str = "en", k: int = 10
) -> tuple[float, float]:
    """Recall@k on the held-out vendor: of its pictures by a concept's name, and of all names by one of its pictures."""
    rows = data.rows(styles=[HELD_OUT_STYLE])
    own = torch.tensor([data.icons[row][0] for row in rows])
    texts = torch.from_numpy(encoder.encode(_names(data, language)))
    pictures = F.normalize(_features(tower, data, rows, [DEFAULT_COLOUR] * len(rows)), dim=-1)
    by_name = (texts[own] @ pictures.T).topk(k, dim=1).indices == torch.arange(len(rows))[:, None]
    by_picture = (pictures @ texts.T).topk(k, dim=1).indices == own[:, None]
    return float(by_name.any(1).float().mean()), float(by_picture.any(1).float().mean())
