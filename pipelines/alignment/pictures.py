"""Pictures with captions: an extra loss for who has them, the denoiser's own on real latents."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from textcond.pipelines.families import denoiser_of
from textcond.pipelines.trajectories import Visit

LATENTS = ("sample", "hidden_states")  # what denoisers call them


class CaptionedPictures:
    """A folder of pictures with `metadata.jsonl`, a `file_name` and a `text` a line, as `datasets` reads them.

    Raises:
        FileNotFoundError: no `metadata.jsonl`, or a picture that it names is not there.
        ValueError: a malformed line, by its number, or a pipeline whose latents are not `(batch, channels, height,
            width)` in one VAE's space.
    """

    def __init__(self, pipe: DiffusionPipeline, folder: str | Path):
        self.pipe, self.folder = pipe, Path(folder).expanduser()
        file = self.folder / "metadata.jsonl"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no metadata.jsonl: write a file_name and a text a line")
        self.rows: list[tuple[Path, str]] = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                self.rows.append(self._row(line, f"{file}, line {number}"))
        if not self.rows:
            raise ValueError(f"{file} names no picture: write a file_name and a text a line")
        asked = inspect.signature(type(denoiser_of(pipe)).forward).parameters
        # Flux packs its latents, and tells their places apart.
        if getattr(pipe, "vae", None) is None or "img_ids" in asked or not any(name in asked for name in LATENTS):
            raise ValueError(f"{type(pipe).__name__} has no plain latents of pictures: leave the pictures out")

    def _row(self, line: str, where: str) -> tuple[Path, str]:
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{where}: give {{"file_name": ..., "text": ...}} ({error!r})') from None
        if not (self.folder / name).is_file():
            raise FileNotFoundError(f"{where}: there is no picture {self.folder / name}")
        return self.folder / name, text

    def texts(self, rows: np.ndarray) -> list[str]:
        """Captions of some rows."""
        return [self.rows[row][1] for row in rows]

    @torch.no_grad()
    def question(self, rows: np.ndarray, like: Visit, generator: torch.Generator) -> tuple[Visit, Tensor]:
        """Noised latents of some rows as a call of the denoiser, and what it should answer.

        Args:
            rows: as many as `like` has.
            like: a call to take everything but latents and timestep from.
            generator: of noise and timesteps, on CPU.
        """
        name = next(name for name in LATENTS if name in like.inputs)
        latents = like.inputs[name]
        clean = torch.cat([self._latents(self.rows[row][0], latents.shape[-2:]) for row in rows]).to(latents)
        noise = torch.randn(clean.shape, generator=generator).to(latents)
        share = torch.rand(len(rows), generator=generator).to(latents.device)
        scheduler = self.pipe.scheduler
        kind = scheduler.config.get("prediction_type")
        if not hasattr(scheduler, "alphas_cumprod"):
            # rectified flow: a straight line from noise to picture
            sigma = share.to(latents)[:, None, None, None]
            noisy, answer, timestep = (1 - sigma) * clean + sigma * noise, noise - clean, share * 1000
        else:
            timestep = (share * len(scheduler.alphas_cumprod)).long()
            alpha = scheduler.alphas_cumprod.to(latents.device)[timestep][:, None, None, None]
            # In bfloat16 the first steps would get no noise.
            kept, added = alpha.sqrt().to(latents), (1 - alpha).sqrt().to(latents)
            noisy = kept * clean + added * noise
            answers = {"epsilon": noise, "v_prediction": kept * noise - added * clean, "sample": clean}
            if kind not in answers:
                raise ValueError(f"the scheduler predicts {kind!r}: leave the pictures out")
            answer = answers[kind]
        inputs = {key: timestep if key in ("timestep", "timesteps") else value for key, value in like.inputs.items()}
        return Visit(inputs | {name: noisy}, float("nan"), answer, None), answer

    def _latents(self, file: Path, size: torch.Size) -> Tensor:
        """A picture in the denoiser's space, `(1, channels, *size)`."""
        vae, processor = self.pipe.vae, self.pipe.image_processor
        scale = self.pipe.vae_scale_factor
        with Image.open(file) as opened:
            pixels = processor.preprocess(opened.convert("RGB"), height=size[0] * scale, width=size[1] * scale)
        encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def denoiser_error(ours: Tensor, answer: Tensor) -> Tensor:
    """Mean squared error of each row, as a share of the answer's own mean square, `(rows,)`."""
    channels = answer.shape[1]  # a denoiser that also predicts variances has twice as many
    return (ours[:, :channels].float() - answer.float()).square().flatten(1).mean(1) / answer.float().square().mean()
