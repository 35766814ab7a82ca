"""What an encoder gives of texts, and what a contrastive loss sees of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Features:
    """An encoder's view of n texts.

    - `dense`: `(n, dim)` float32, of unit length where the encoder normalises.
    - `token_ids`: `(n, tokens)` int64, and `token_mask`: `(n, tokens)` bool, True for a token that counts; None
      without sparse or multi-vector heads.
    - `sparse`: `(n, tokens)` float32, a weight from 0 for every token, 0 where masked (BGE-M3's lexical weights).
    - `tokens`: `(n, tokens, width)` float32 unit vectors, 0 where masked (ColBERT's multi-vectors).
    """

    dense: Tensor
    token_ids: Tensor | None = None
    token_mask: Tensor | None = None
    sparse: Tensor | None = None
    tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.dense)

    def map(self, function: Callable[[Tensor], Tensor]) -> Features:
        """Apply a function to every tensor that is there."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Features(**{name: None if value is None else function(value) for name, value in values.items()})

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Join along the texts; token axes are padded at the right to the longest."""

        def joined(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is None:
                return None
            if tensors[0].ndim > 1 and name != "dense":
                longest = max(tensor.shape[1] for tensor in tensors)
                tensors = [_pad_tokens(tensor, longest) for tensor in tensors]
            return torch.cat(tensors)

        return Features(**{field.name: joined(field.name) for field in fields(Features)})


def _pad_tokens(tensor: Tensor, length: int) -> Tensor:
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, length - tensor.shape[1]))


@dataclass
class ContrastiveBatch:
    """The joint batch of all processes, as every loss sees it: q queries, n documents.

    - `positives`: `(q,)` int64, the row in `documents` of each query's positive.
    - `owners`: `(n,)` int64, the query for which a document was drawn, as its positive or as an explicit negative.
    - `query_keys` `(q,)`, `document_keys` `(n,)`: int64 hashes of the text or id; equal keys are the same thing.
    - `known_positives`: `(q, m)` int64, keys of everything that is right for the query, 0 where there are fewer.
    - `teacher_scores`: `(n,)` float32, a teacher's score of the document for its owner, NaN where unknown.
    - `teacher_queries` `(q, width)`, `teacher_documents` `(n, width)`: a teacher's vectors, for vector distillation.
    - `guide_queries` `(q, width)`, `guide_documents` `(n, width)`: unit vectors of a frozen guide model.
    """

    queries: Features
    documents: Features
    positives: Tensor
    owners: Tensor
    query_keys: Tensor
    document_keys: Tensor
    known_positives: Tensor
    teacher_scores: Tensor | None = None
    teacher_queries: Tensor | None = None
    teacher_documents: Tensor | None = None
    guide_queries: Tensor | None = None
    guide_documents: Tensor | None = None

    def false_negatives(self) -> Tensor:
        """Bool `(q, n)`: the document is right for the query and is not the positive that the loss pulls."""
        keys, columns = self.document_keys.unique(return_inverse=True)
        texts, groups = self.query_keys.unique(return_inverse=True)
        # the positive of a query that reads the same is right too
        right = torch.zeros(len(texts), len(keys), dtype=torch.bool, device=keys.device)
        right[groups, columns[self.positives]] = True
        right = right[groups]
        for known in self.known_positives.T.contiguous():
            place = torch.searchsorted(keys, known).clamp(max=len(keys) - 1)
            found = (keys[place] == known) & (known != 0)
            right[found.nonzero()[:, 0], place[found]] = True
        right = right[:, columns]
        right[torch.arange(len(right), device=right.device), self.positives] = False
        return right
