"""Prompts and their pictures, found by meaning and by words."""

from .prompt_index import Hit, PromptIndex
from .store import Row, Store

__all__ = ["Hit", "PromptIndex", "Row", "Store"]
