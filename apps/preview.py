"""A look at the unfinished picture, where that costs next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline
    from PIL.Image import Image


class Preview:
    """Follows the latents of one run and decodes what the denoiser believes the finished picture to be."""

    def __init__(self, pipe: DiffusionPipeline):
        from diffusers import AutoencoderTiny, DDIMScheduler

        self.pipe = pipe
        self.cheap = isinstance(pipe.vae, AutoencoderTiny) and isinstance(pipe.scheduler, DDIMScheduler)
        self.before: torch.Tensor | None = None
        self.expected: torch.Tensor | None = None

    def follow(self, step: int, latents: torch.Tensor) -> None:
        """Take in the latents `(1, channels, height, width)` that step number `step` left."""
        if self.cheap and self.before is not None:
            self.expected = expected_latents(self.pipe.scheduler, step, self.before, latents)
        self.before = latents

    def __call__(self) -> Image | None:
        """The picture as it looks now; None after the first step, and for pipelines that are slow to decode."""
        import torch

        if self.expected is None:
            return None
        with torch.inference_mode():
            pixels = self.pipe.vae.decode(self.expected[:1] / self.pipe.vae.config.scaling_factor).sample
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")[0]


def expected_latents(scheduler: DDIMScheduler, step: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The finished latents x0 that a deterministic DDIM step (Song et al., 2021, eq. 12) worked towards.

    Both ends of the step are mixtures of the same x0 and noise, sqrt(a) x0 + sqrt(1 - a) noise with their own a: two
    equations, two unknowns.
    """
    t = scheduler.timesteps[step]
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    a = scheduler.alphas_cumprod[t].item()
    b = (scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod).item()
    noise_before, noise_after = (1 - a) ** 0.5, (1 - b) ** 0.5
    return (after * noise_before - before * noise_after) / (b**0.5 * noise_before - a**0.5 * noise_after)
