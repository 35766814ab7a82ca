"""Stage "judge": a classifier of concept, style and background, used only to score pictures.

It shares no weights, objective or training run with what it scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from tqdm import tqdm

from textcond.files import half, read_tensors, write_tensors
from textcond.folders import atomic_folder, read_json, write_json
from textcond.pipelines.loop import fit, share, step_generator

from .data import COLOURS, STYLES, ReferenceData, composite

SIZE = 64


@dataclass
class JudgeRecipe:
    """Options of the stage."""

    channels: tuple[int, ...] = (48, 96, 192, 256)
    steps: int = 1300
    batch: int = 96
    learning_rate: float = 3e-3
    seed: int = 3


@dataclass
class Verdict:
    """Logits for a batch of pictures: `concept (b, concepts)`, `style (b, styles)`, `colour (b, colours)`."""

    concept: torch.Tensor
    style: torch.Tensor
    colour: torch.Tensor


class Judge(nn.Module):
    """A small ResNet with three heads on 64x64 pictures. `names` are those of its concepts, in order, where known."""

    def __init__(
        self, concepts: int, channels: tuple[int, ...] = JudgeRecipe.channels, names: Sequence[str] | None = None
    ):
        super().__init__()
        self.names = names
        self.config = {"concepts": concepts, "channels": list(channels)} | ({"names": list(names)} if names else {})
        self.body = ResNet(
            BasicBlock, [1, 1, 1, 1], num_classes=0, channels=tuple(channels), stem_type="deep", stem_width=24
        )
        width = channels[-1]
        self.concept = nn.Linear(width, concepts)
        self.style = nn.Linear(width, len(STYLES))
        self.colour = nn.Linear(width, len(COLOURS))

    def forward(self, pixels: torch.Tensor) -> Verdict:
        """Pixels `(b, 3, h, w)` in -1..1."""
        if pixels.shape[-1] != SIZE:
            pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="area")
        features = self.body(pixels)
        return Verdict(self.concept(features), self.style(features), self.colour(features))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (fp16)."""
        with atomic_folder(folder, owned=("*",)) as partial:
            write_json(partial / "config.json", self.config)
            write_tensors(partial / "model.safetensors", half(self.state_dict()))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Judge:
        """Read what `save_pretrained` wrote, in float32 and evaluation mode."""
        judge = cls(**read_json(Path(folder) / "config.json"))
        judge.load_state_dict(read_tensors(Path(folder) / "model.safetensors"))
        return judge.eval()


def disturb(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random placement, blur and noise, as generated pictures have them. Colours stay: they are judged."""
    count = pixels.shape[0]
    random = torch.rand((count, 4), generator=generator) * 2 - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + random[:, 0] * 0.12
    theta[:, 0, 1] = random[:, 3] * 0.1
    theta[:, 1, 0] = -random[:, 3] * 0.1
    theta[:, :, 2] = random[:, 1:3] * 0.1
    moved = F.grid_sample(pixels, F.affine_grid(theta, list(pixels.shape), align_corners=False),
                          padding_mode="border", align_corners=False)  # fmt: skip
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand((count, 1, 1, 1), generator=generator)
    noise = torch.randn(pixels.shape, generator=generator) * 0.1 * torch.rand((count, 1, 1, 1), generator=generator)
    return (moved * mix + blurred * (1 - mix) + noise).clamp(-1, 1)


@torch.inference_mode()
def reconstructions(data: ReferenceData, vae: AutoencoderTiny, out: Path) -> np.ndarray:
    """Each training drawing on white and on one other colour, through the autoencoder, at 64x64.

    `(rows, 2, 64, 64, 3)` uint8, cached at `out`; the colour of the second is `1 + row % 10`.
    """
    if out.is_file():
        return np.load(out, mmap_mode="r")
    out.parent.mkdir(parents=True, exist_ok=True)
    rows, names = data.rows(), list(COLOURS)
    pictures = np.zeros((len(rows), 2, SIZE, SIZE, 3), dtype=np.uint8)
    for index, row in enumerate(tqdm(rows, desc="reconstruct", unit="drawing", mininterval=5)):
        pixels = data.composite([row, row], [names[0], names[1 + index % (len(names) - 1)]])
        small = F.interpolate(vae.decoder(vae.encoder(pixels)).clamp(-1, 1), size=(SIZE, SIZE), mode="area")
        pictures[index] = ((small + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    partial = out.with_name("partial-" + out.name)
    np.save(partial, pictures)
    partial.rename(out)
    return np.load(out, mmap_mode="r")


def train_judge(
    data: ReferenceData, vae_folder: Path, out: Path, recipe: JudgeRecipe, accelerator: Accelerator
) -> Path:
    """Train on artwork as drawn and as the autoencoder gives it back; save `out/judge`."""
    torch.manual_seed(recipe.seed)
    rows = data.rows()
    seen = reconstructions(data, AutoencoderTiny.from_pretrained(vae_folder).eval(), out / "reconstructions.npy")
    small = np.stack([data.pixels[row].reshape(SIZE, 2, SIZE, 2, 4).mean((1, 3)).astype(np.uint8) for row in rows])
    styles, colours = list(STYLES), torch.tensor(list(COLOURS.values())).float()
    judge = Judge(len(data.concepts), recipe.channels, [concept.name for concept in data.concepts])
    mine = share(accelerator, recipe.batch)

    def loss(prepared: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = step_generator(recipe.seed, step)
        picks = torch.randint(len(rows), (recipe.batch,), generator=generator)[mine]
        colour = torch.randint(len(colours), (recipe.batch,), generator=generator)[mine]
        raw = composite(torch.from_numpy(small[picks]).permute(0, 3, 1, 2).float(), colours[colour][:, :, None, None])
        which = torch.randint(2, (recipe.batch,), generator=generator)[mine]
        decoded = torch.from_numpy(seen[picks.numpy(), which.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        use_decoded = (torch.rand(recipe.batch, generator=generator) < 0.5)[mine]
        pixels = torch.where(use_decoded[:, None, None, None], decoded, raw)
        colour = torch.where(use_decoded, which * (1 + picks % (len(colours) - 1)), colour)
        verdict = prepared(disturb(pixels, generator))
        concept = torch.tensor([data.icons[rows[pick]][0] for pick in picks.tolist()])
        style = torch.tensor([styles.index(data.icons[rows[pick]][1]) for pick in picks.tolist()])
        value = F.cross_entropy(verdict.concept.float(), concept, label_smoothing=0.1)
        value = value + 0.3 * F.cross_entropy(verdict.style.float(), style)
        value = value + 0.3 * F.cross_entropy(verdict.colour.float(), colour)
        return value, {"accuracy": (verdict.concept.argmax(1) == concept).float().mean().item()}

    fit(
        "judge", judge, loss, out=out, steps=recipe.steps, batch=recipe.batch, decay=0.5, weight_decay=0.02,
        learning_rate=recipe.learning_rate, bf16=True, accelerator=accelerator,
    )  # fmt: skip
    if accelerator.is_main_process:
        judge.eval().save_pretrained(out / "judge")
    accelerator.wait_for_everyone()
    return out / "judge"


@torch.inference_mode()
def judge_accuracy(data: ReferenceData, judge: Judge, vae: AutoencoderTiny, count: int = 1000, seed: int = 0) -> dict:
    """The judge's own top-1 on real training artwork, disturbed and passed through the autoencoder, on random colours.

    Its scores of generated pictures mean nothing unless this is high.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rows, names = data.rows(), list(COLOURS)
    hits = {"concept": 0, "style": 0, "colour": 0}
    for row in rng.choice(rows, size=count, replace=len(rows) < count):
        colour = int(rng.integers(len(names)))
        pixels = vae.decoder(vae.encoder(disturb(data.composite([int(row)], [names[colour]]), generator)))
        verdict = judge(pixels.clamp(-1, 1))
        concept, style = data.icons[int(row)]
        hits["concept"] += int(verdict.concept.argmax() == concept)
        hits["style"] += int(verdict.style.argmax() == list(STYLES).index(style))
        hits["colour"] += int(verdict.colour.argmax() == colour)
    return {key: value / count for key, value in hits.items()}
