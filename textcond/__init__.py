"""Text encoders for diffusion pipelines and for finding prompts and pictures, with the same weights."""

from transformers import PreTrainedModel  # diffusers looks for it here when it loads a saved pipeline

from .conditioning import ConditioningEncoder, ConditioningEncoderConfig, ConditioningEncoderWithProjection
from .encoder import TextEncoder, TextEncoderConfig
from .index import Hit, PromptIndex

__all__ = [
    "ConditioningEncoder",
    "ConditioningEncoderConfig",
    "ConditioningEncoderWithProjection",
    "Hit",
    "PreTrainedModel",
    "PromptIndex",
    "TextEncoder",
    "TextEncoderConfig",
]
