"""Contrastive training: recipes, stages, steps on joint batches."""

from .recipe import Data, Evaluation, Lora, Mining, Recipe, Stage, load_recipe
from .step import TextBatch, backward
from .trainer import train

__all__ = ["Data", "Evaluation", "Lora", "Mining", "Recipe", "Stage", "TextBatch", "backward", "load_recipe", "train"]
