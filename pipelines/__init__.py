"""Everything that touches diffusers: contracts, swapping, and the reference model."""

from .contracts import Contract, inspect_pipeline
from .reference import load_reference
from .swap import retrieval_encoder, swap_text_encoder, swapped

__all__ = ["Contract", "inspect_pipeline", "load_reference", "retrieval_encoder", "swap_text_encoder", "swapped"]
