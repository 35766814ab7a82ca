"""How well encoders retrieve: scores of a task, tables against the base model, and mteb."""

from .compare import GENERATION, Comparison, Difference, compare, paired_bootstrap
from .mteb_adapter import evaluate_mteb
from .retrieval import METRICS, RetrievalTask, Scores, evaluate_retrieval

__all__ = [
    "GENERATION",
    "METRICS",
    "Comparison",
    "Difference",
    "RetrievalTask",
    "Scores",
    "compare",
    "evaluate_mteb",
    "evaluate_retrieval",
    "paired_bootstrap",
]
