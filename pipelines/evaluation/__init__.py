"""Encoders compared by the pictures that they condition: cases, judges, controls, distances and a report."""

from .cases import Case, read_cases, write_cases
from .controls import CONTROLS
from .harness import evaluate_conditioning
from .judges import ClipJudge, EmojiJudge
from .report import Report

__all__ = [
    "CONTROLS",
    "Case",
    "ClipJudge",
    "EmojiJudge",
    "Report",
    "evaluate_conditioning",
    "read_cases",
    "write_cases",
]
