"""Teachers: what scores (query, document) pairs for filters and for distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from textcond.encoder import TextEncoder

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

PAIRS_A_CALL = 8192

Teacher = Callable[[list[tuple[str, str]]], Sequence[float]]


class CrossEncoderTeacher:
    """A sentence-transformers CrossEncoder as a teacher, as in SimLM (Wang et al., 2023).

    Args:
        model: the cross-encoder.
        batch_size: pairs that go through it together.
        activation: what its logits pass through; None for the model's own. Percentages of a positive's score want
            scores above 0: `torch.nn.Sigmoid()`.
    """

    def __init__(self, model: CrossEncoder, batch_size: int = 64, activation: Callable[[Any], Any] | None = None):
        self.model, self.batch_size, self.activation = model, batch_size, activation

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> CrossEncoderTeacher:
        """Load one from a folder or hub id.

        Raises:
            ImportError: without sentence-transformers.
        """
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise ImportError("a cross-encoder needs sentence-transformers: pip install it") from error
        return cls(CrossEncoder(name_or_path, model_kwargs={"use_safetensors": True}))

    def __call__(self, pairs: list[tuple[str, str]]) -> Sequence[float]:
        """Return a score for each pair."""
        return self.model.predict(
            pairs, batch_size=self.batch_size, activation_fn=self.activation, show_progress_bar=False
        )


class EncoderTeacher:
    """A TextEncoder as a teacher: the inner product of query and document vectors."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder

    def __call__(self, pairs: list[tuple[str, str]]) -> Sequence[float]:
        """Return a score for each pair; each distinct text is encoded once a call."""
        sides = []
        for texts, kind in zip(zip(*pairs), ("query", "document")):
            distinct = {text: place for place, text in enumerate(dict.fromkeys(texts))}
            vectors = self.encoder.encode(list(distinct), kind=kind)
            sides.append(vectors[[distinct[text] for text in texts]])
        return np.einsum("nd,nd->n", *sides)


def score_pairs(teacher: Teacher, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """Return float64 scores of each query's documents, from calls of 8192 pairs that run across queries.

    Raises:
        ValueError: if the teacher gives another number of scores than it got pairs, or NaN, by the pair.
    """
    pairs = [(query, document) for query, own in zip(queries, documents) for document in own]
    scores = np.empty(len(pairs), np.float64)
    for start in range(0, len(pairs), PAIRS_A_CALL):
        part = pairs[start : start + PAIRS_A_CALL]
        given = np.asarray(teacher(part), np.float64)
        if given.shape != (len(part),):
            raise ValueError(f"the teacher gave scores of shape {given.shape} for {len(part)} pairs: give one a pair")
        if np.isnan(given).any():
            raise ValueError(f"the teacher's score is not a number for {part[int(np.isnan(given).argmax())]!r:.200}")
        scores[start : start + len(part)] = given
    return np.split(scores, np.cumsum([len(own) for own in documents])[:-1])
