"""Text encoders for diffusion pipelines and for finding prompts and pictures, with the same weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from .conditioning import ConditioningEncoder, ConditioningEncoderConfig, ConditioningEncoderWithProjection
    from .encoder import TextEncoder, TextEncoderConfig
    from .index import Hit, PromptIndex
    from .original import PackedTokenizer
    from .slot_tokenizer import T5SlotTokenizer

__all__ = [
    "ConditioningEncoder",
    "ConditioningEncoderConfig",
    "ConditioningEncoderWithProjection",
    "Hit",
    "PackedTokenizer",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "PromptIndex",
    "T5SlotTokenizer",
    "TextEncoder",
    "TextEncoderConfig",
]

_HOMES = {
    "ConditioningEncoder": "textcond.conditioning",
    "ConditioningEncoderConfig": "textcond.conditioning",
    "ConditioningEncoderWithProjection": "textcond.conditioning",
    "Hit": "textcond.index",
    "PackedTokenizer": "textcond.original",
    # diffusers looks for these two here when it loads a saved pipeline
    "PreTrainedModel": "transformers",
    "PreTrainedTokenizerFast": "transformers",
    "PromptIndex": "textcond.index",
    "T5SlotTokenizer": "textcond.slot_tokenizer",
    "TextEncoder": "textcond.encoder",
    "TextEncoderConfig": "textcond.encoder",
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: torch takes seconds, and the command line's help needs none of it.
    if name not in _HOMES:
        raise AttributeError(f"module 'textcond' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
