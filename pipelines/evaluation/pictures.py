"""Pictures of cases: the same latents for every encoder, each finished picture kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .cache import ResultCache
from .cases import Case


def latent_seed(case: Case, seed: int) -> int:
    """The generator's seed for a case: one for all encoders and languages, another for every English text.

    With the same latents for all cases an unlucky draw would be no accident of one case, and intervals too narrow.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {case.english}".encode()).digest()[:4], "big")


def draw_pictures(
    pipe: DiffusionPipeline,
    texts: Sequence[str],
    seeds: Sequence[int],
    keys: Sequence[str],
    *,
    cache: ResultCache,
    steps: int,
    guidance: float,
    batch_size: int,
    on_pictures: Callable[[int], None] = lambda count: None,
) -> list[Image.Image]:
    """A picture of each text from its own seed; those in the cache are taken from it, and equal ones drawn once.

    Args:
        seeds: of the generator of each text.
        keys: names of the pictures in the cache.
        on_pictures: told how many more pictures there are.

    Raises:
        ValueError: for a pipeline that makes no pictures.
    """
    found = {key: cache.picture(key) for key in keys}
    missing = [index for index, key in enumerate(keys) if found[key] is None and keys.index(key) == index]
    on_pictures(len(keys) - len(missing))
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        output = pipe(
            [texts[index] for index in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            # Drawn on the CPU, so that a seed means the same latents on every device.
            generator=[torch.Generator().manual_seed(seeds[index]) for index in batch],
        )
        if not getattr(output, "images", None):
            raise ValueError(f"{type(pipe).__name__} makes no pictures: pass a text-to-image pipeline")
        for index, picture in zip(batch, output.images):
            found[keys[index]] = picture.convert("RGB")
            cache.keep_picture(keys[index], found[keys[index]])
        on_pictures(len(batch))
    return [found[key] for key in keys]


def pixel_spread(pictures: Sequence[Image.Image]) -> float:
    """Mean over pairs of pictures of the root mean square difference of their pixels, from 0 to 1; NaN for one."""
    if len(pictures) < 2:
        return float("nan")
    stack = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures])
    first, second = np.triu_indices(len(stack), k=1)
    return float(np.sqrt(np.square(stack[first] - stack[second]).mean(axis=(1, 2, 3))).mean())
