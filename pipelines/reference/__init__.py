"""The reference model "emoji": a small complete text-to-image system, with its data, training recipe and weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from textcond import PromptIndex, TextEncoder

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

REFERENCE = Path(__file__).parent / "emoji"
MULTILINGUAL = Path(__file__).parent / "emoji_multilingual"  # an encoder that is aligned to it


def load_reference(
    dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> StableDiffusionPipeline:
    """The shipped model as a stock `StableDiffusionPipeline` (128x128 pictures, captions of up to 32 tokens)."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(REFERENCE, dtype=dtype, local_files_only=True)
    return pipe if device is None else pipe.to(device)


def open_reference_index(encoder: TextEncoder | None = None) -> PromptIndex:
    """The shipped index of the reference captions in 15 languages and their pictures, in the space of `MULTILINGUAL`.

    Args:
        encoder: the text encoder of `MULTILINGUAL` if it is already in memory; otherwise it is loaded.

    Raises:
        ValueError: `encoder` is another one than the index was made with.
    """
    return PromptIndex.open(MULTILINGUAL / "index", encoder)
