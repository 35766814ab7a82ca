"""Contrastive and distillation losses on a `ContrastiveBatch`."""

from textcond.losses.build import build_loss
from textcond.losses.compose import Matryoshka, WeightedSum
from textcond.losses.distillation import ListwiseKL, MarginMSE, VectorMSE
from textcond.losses.infonce import InfoNCE, info_nce
from textcond.losses.m3 import M3SelfDistillation
from textcond.losses.triplet import Triplet

__all__ = [
    "InfoNCE",
    "ListwiseKL",
    "M3SelfDistillation",
    "MarginMSE",
    "Matryoshka",
    "Triplet",
    "VectorMSE",
    "WeightedSum",
    "build_loss",
    "info_nce",
]
