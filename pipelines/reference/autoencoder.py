"""Stage "autoencoder": 128x128 pictures to 16x16 latents of 8 channels and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from torch import nn

from textcond.folders import atomic_folder
from textcond.pipelines.loop import fit, share, step_generator

from .data import COLOURS, HELD_OUT_STYLE, RESOLUTION, ReferenceData, composite


@dataclass
class AutoencoderRecipe:
    """Options of the stage. `latent_noise` is the largest noise, in units of the latents, that the decoder learns to
    absorb: it smooths the latent space and forgives the denoiser's small errors. Training sees crops of `crop` pixels,
    so that a step is cheap."""

    channels: int = 32
    latent_channels: int = 8
    steps: int = 1600
    batch: int = 32
    crop: int = 64
    learning_rate: float = 3e-3
    latent_noise: float = 0.15
    seed: int = 0


class Reconstruction(nn.Module):
    """Encode, disturb, decode: the training view of an `AutoencoderTiny` (whose own forward quantises the latents)."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `(b, 3, 128, 128)` in -1..1, noise `(b, c, 16, 16)` -> (reconstruction, latents)."""
        latents = self.vae.encoder(pixels)
        return self.vae.decoder(latents + noise), latents


def new_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderTiny:
    """An untrained autoencoder of the recipe's size (f8)."""
    widths = (recipe.channels,) * 4
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        latent_channels=recipe.latent_channels,
        num_encoder_blocks=(1, 2, 2, 2),
        num_decoder_blocks=(3, 3, 2, 1),
        act_fn="silu",
    )


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error, plus L1 of pixels and of their differences: outlines are what an emoji is made of.

    With L1 alone the colours stay grey for the first thousands of samples.
    """
    loss = F.l1_loss(output, target)
    for dim in (2, 3):
        loss = loss + F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return F.mse_loss(output, target) + 0.3 * loss


def psnr(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB, for values in -1..1: `(b,)`."""
    mse = ((output.clamp(-1, 1) - target) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp_min(1e-10))


def train_autoencoder(data: ReferenceData, out: Path, recipe: AutoencoderRecipe, accelerator: Accelerator) -> Path:
    """Train on every training style's artwork over random backgrounds; save `out/vae` with its measured scale."""
    torch.manual_seed(recipe.seed)
    model = Reconstruction(new_autoencoder(recipe))
    rows = data.rows()
    mine = share(accelerator, recipe.batch)
    named = torch.tensor(list(COLOURS.values())).float()

    def loss(prepared: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = step_generator(recipe.seed, step)
        picks = torch.randint(len(rows), (recipe.batch,), generator=generator)[mine]
        # Half on the named colours, half on any colour: the decoder must not memorise eleven backgrounds.
        colour = named[torch.randint(len(named), (recipe.batch,), generator=generator)]
        any_colour = torch.rand((recipe.batch, 3), generator=generator) * 255
        background = torch.where(torch.rand((recipe.batch, 1), generator=generator) < 0.5, colour, any_colour)[mine]
        level = torch.rand((recipe.batch, 1, 1, 1), generator=generator) * recipe.latent_noise
        size = recipe.crop // 8
        noise = torch.randn((recipe.batch, recipe.latent_channels, size, size), generator=generator) * level
        corner = torch.randint(RESOLUTION - recipe.crop + 1, (recipe.batch, 2), generator=generator)[mine].tolist()
        crops = [
            data.pixels[rows[pick], top : top + recipe.crop, left : left + recipe.crop]
            for pick, (top, left) in zip(picks.tolist(), corner)
        ]
        rgba = torch.from_numpy(np.stack(crops))
        pixels = composite(rgba.permute(0, 3, 1, 2).float(), background[:, :, None, None])
        pixels = pixels.to(memory_format=torch.channels_last)
        output, latents = prepared(pixels, noise[mine])
        value = reconstruction_loss(output.float(), pixels)
        # Keep the latents near unit scale, so that the noise means the same throughout and tanh never clips them.
        value = value + 1e-3 * latents.float().square().mean()
        return value, {"psnr": psnr(output.detach().float(), pixels).mean().item()}

    fit(
        "autoencoder", model, loss, out=out, steps=recipe.steps, batch=recipe.batch, decay=0.4,
        learning_rate=recipe.learning_rate, bf16=True, accelerator=accelerator,
    )  # fmt: skip
    vae = model.vae
    if accelerator.is_main_process:
        vae.register_to_config(scaling_factor=measure_scale(data, vae))
        with atomic_folder(out / "vae", owned=("*",)) as folder:
            vae.save_pretrained(folder)
    accelerator.wait_for_everyone()
    return out / "vae"


@torch.inference_mode()
def measure_scale(data: ReferenceData, vae: AutoencoderTiny, count: int = 512) -> float:
    """One over the standard deviation of the latents, the `scaling_factor` of a latent diffusion model."""
    rows = data.rows()
    rows = rows[:: max(1, len(rows) // count)]
    colours = [list(COLOURS)[index % len(COLOURS)] for index in range(len(rows))]
    latents = torch.cat([vae.encoder(data.composite([row], [colour])) for row, colour in zip(rows, colours)])
    return float(1 / latents.std())


@torch.inference_mode()
def held_out_psnr(data: ReferenceData, vae: AutoencoderTiny, count: int = 256) -> float:
    """Mean PSNR in dB on the vendor that nothing trains on, over the named colours."""
    rows = data.rows(styles=[HELD_OUT_STYLE])
    rows = rows[:: max(1, len(rows) // count)]
    colours = [list(COLOURS)[index % len(COLOURS)] for index in range(len(rows))]
    values = []
    for row, colour in zip(rows, colours):
        pixels = data.composite([row], [colour])
        values.append(psnr(vae.decoder(vae.encoder(pixels)), pixels))
    return float(torch.cat(values).mean())
