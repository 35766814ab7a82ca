"""Everything that touches diffusers: contracts, swapping, alignment, and the reference model."""

from diffusers import ModelMixin

from .alignment import AlignmentOptions, align
from .contracts import Contract, inspect_pipeline
from .denoisers import TimestepAwareUNet
from .generation_score import generation_score
from .reference import load_reference
from .swap import make_encoder, retrieval_encoder, swap_text_encoder, swapped

__all__ = [
    "AlignmentOptions",
    "Contract",
    "ModelMixin",  # diffusers looks for it here when it loads a saved pipeline with a TimestepAwareUNet
    "TimestepAwareUNet",
    "align",
    "generation_score",
    "inspect_pipeline",
    "load_reference",
    "make_encoder",
    "retrieval_encoder",
    "swap_text_encoder",
    "swapped",
]
