"""Pictures as queries of another text encoder: the reference CLIP's image tower, its last projection fitted anew."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textcond import TextEncoder
from textcond.index.image_text import OpenClipTower

from .clip import IMAGE_SIZE, ImageTower, augment
from .data import COLOURS, DEFAULT_COLOUR, HELD_OUT_STYLE, ReferenceData

BATCH = 64


def fit_image_tower(
    encoder: TextEncoder, tower: ImageTower, data: ReferenceData, *, penalty: float = 1e-2, seed: int = 0
) -> OpenClipTower:
    """The tower with its last projection fitted by ridge regression from pictures to the encoder's vectors of names.

    Each drawing of all vendors but the held-out one counts twice: as it is, and augmented on a colour drawn at random.
    Names without what all share: half of their mean is added again, which serves both directions of the search.

    Args:
        encoder: of unit vectors; it is left as it is.
        tower: as the reference recipe trained it; its projection is replaced.
        penalty: of the squared weights, as a share of the number of drawings.

    Returns:
        A tower that gives vectors of `encoder.dim`.
    """
    rows = [row for row in data.rows() if data.icons[row][1] != HELD_OUT_STYLE]
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    colours = rng.choice(list(COLOURS), len(rows)).tolist()
    pool = tower.visual.attnpool
    width = pool.c_proj.in_features
    pool.c_proj = nn.Linear(width, width)
    nn.init.eye_(pool.c_proj.weight)
    nn.init.zeros_(pool.c_proj.bias)
    plain = _features(tower, data, rows, [DEFAULT_COLOUR] * len(rows))
    seen = torch.cat([plain, _features(tower, data, rows, colours, generator)]).double()
    names = torch.from_numpy(encoder.encode([data.concepts[data.icons[row][0]].name for row in rows])).double()
    mean, shared = seen.mean(0), names.mean(0)
    scale = seen.std(0).mean()
    centred = (seen - mean) / scale
    gram = centred.T @ centred + penalty * len(seen) * torch.eye(width, dtype=torch.float64)
    weights = torch.linalg.solve(gram, centred.T @ (names - shared).repeat(2, 1)) / scale
    pool.c_proj = nn.Linear(width, encoder.dim)
    with torch.no_grad():
        pool.c_proj.weight.copy_(weights.T)
        pool.c_proj.bias.copy_(shared / 2 - mean @ weights)
    tower.config["dim"] = encoder.dim
    return tower.as_open_clip()


@torch.inference_mode()
def _features(
    tower: ImageTower,
    data: ReferenceData,
    rows: list[int],
    colours: list[str],
    generator: torch.Generator | None = None,
) -> Tensor:
    """What the tower gives of drawings on colours `(rows, width)`, augmented with a generator."""
    found = []
    for at in range(0, len(rows), BATCH):
        pixels = data.composite(rows[at : at + BATCH], colours[at : at + BATCH])
        pixels = F.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
        found.append(tower.visual(pixels if generator is None else augment(pixels, generator)))
    return torch.cat(found)


@torch.inference_mode()
def picture_recall(
    encoder: TextEncoder, tower: OpenClipTower, data: ReferenceData, language: str = "en", k: int = 10
) -> tuple[float, float]:
    """Recall@k on the held-out vendor: of its pictures by a concept's name, and of all names by one of its pictures."""
    rows = data.rows(styles=[HELD_OUT_STYLE])
    own = torch.tensor([data.icons[row][0] for row in rows])
    names = [
        concept.name if language == "en" else concept.names.get(language, concept.name) for concept in data.concepts
    ]
    texts = torch.from_numpy(encoder.encode(names))
    pixels = data.composite(rows, [DEFAULT_COLOUR] * len(rows))
    pixels = F.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="area")
    pictures = F.normalize(torch.cat([tower(part) for part in pixels.split(BATCH)]), dim=-1)
    by_name = (texts[own] @ pictures.T).topk(k, dim=1).indices == torch.arange(len(rows))[:, None]
    by_picture = (pictures @ texts.T).topk(k, dim=1).indices == own[:, None]
    return float(by_name.any(1).float().mean()), float(by_picture.any(1).float().mean())
