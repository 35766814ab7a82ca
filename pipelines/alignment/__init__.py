"""Alignment: any text encoder into any pipeline, from prompts alone."""

from .align import align
from .options import AlignmentOptions
from .prompts import AlignmentPrompts, read_prompts

__all__ = ["AlignmentOptions", "AlignmentPrompts", "align", "read_prompts"]
