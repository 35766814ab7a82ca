"""InfoNCE (van den Oord et al., 2018): pick the positive among in-batch and explicit negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textcond.features import ContrastiveBatch
from textcond.losses.masks import Direction, MarginStrategy, check_margin, not_negatives
from textcond.similarity import ScoreKind, check_kind, own_similarity, similarity

Partition = Literal["joint", "per_direction"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]


def info_nce(logits: Tensor, positives: Tensor, *, excluded: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of each anchor's positive against all of its candidates.

    Args:
        logits: `(anchors, candidates)`, similarities divided by the temperature.
        positives: `(anchors,)` int64, the column of each anchor's positive.
        excluded: bool `(anchors, candidates)`, True where a candidate is no negative of the anchor. The positive itself
            is never left out.

    Raises:
        ValueError: a mask of another shape.
    """
    if excluded is not None:
        if excluded.shape != logits.shape:
            raise ValueError(f"the mask is {tuple(excluded.shape)}, the logits are {tuple(logits.shape)}")
        logits = logits.masked_fill(excluded.scatter(1, positives[:, None], False), float("-inf"))
    return F.cross_entropy(logits, positives)


class InfoNCE(nn.Module):
    """Contrastive loss over in-batch and explicit negatives, in one to four directions.

    `-log(exp(s(q, d+)/t) / Z)`, mean over queries (van den Oord et al., 2018, eq. 4), where Z sums `exp(s/t)` over the
    candidates of the chosen directions:

    - "query_to_document": the query against all documents;
    - "document_to_query": its positive against all queries (symmetric loss of CLIP, Radford et al., 2021);
    - "query_to_query": the query against the other queries;
    - "document_to_document": its positive against the documents of other queries.

    All four in one joint softmax are the improved contrastive loss of GTE (Li et al., 2023). Whatever
    `ContrastiveBatch.false_negatives` knows to be right, and twins of the anchor, are negatives in no direction.

    Args:
        temperature: divides the scores; 0.02 in BGE-M3, 0.01 in E5, 0.05 in SimCSE.
        learn_temperature: hold log(temperature) as a parameter, start from `temperature`.
        temperature_bounds: a learned temperature is kept within these (CLIP keeps it at 0.01 or more).
        directions: see above.
        partition: "joint" for one softmax over the candidates of all directions, "per_direction" for the mean of one
            loss a direction. A direction without the positive (query_to_query, document_to_document) then gets it too.
        in_batch: False for a query's own documents alone; only with the direction "query_to_document".
        margin: leave out negatives that the guide model scores above its score of the positive less the margin
            (GISTEmbed, Solatorio, 2024); None for no guide. Needs guide vectors.
        margin_strategy: "absolute", or "relative" to the size of the positive's score (NV-Retriever's percentage:
            0.05 keeps what scores below 95% of the positive).
        hardness_mode: add `hardness_strength * s` without gradient to the logits of negative documents of
            query_to_document: "in_batch_negatives" (Lan et al., 2025, eq. 5, strength 9), "hard_negatives" for a
            query's own (EmbeddingGemma, Schechter Vera et al., 2025, strength 5) or "all_negatives".
        scores: "dense" (inner product), "sparse" or "tokens".

    Raises:
        ValueError: an option out of range, or options that exclude each other.

    Example:
        >>> from textcond.features import Features
        >>> rows = torch.arange(4)
        >>> texts = Features(torch.eye(4))
        >>> batch = ContrastiveBatch(texts, texts, rows, rows, rows + 1, rows + 11, rows[:, None] + 11)
        >>> round(InfoNCE(temperature=1.0)(batch).item(), 4)  # log(e + 3) - 1
        0.7437
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        learn_temperature: bool = False,
        temperature_bounds: tuple[float, float] = (0.005, 1.0),
        directions: Sequence[Direction] = ("query_to_document",),
        partition: Partition = "joint",
        in_batch: bool = True,
        margin: float | None = None,
        margin_strategy: MarginStrategy = "absolute",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 5.0,
        scores: ScoreKind = "dense",
    ):
        super().__init__()
        low, high = temperature_bounds
        if temperature <= 0 or not 0 < low < high:
            raise ValueError(f"temperature {temperature} and its bounds {low}, {high} must be positive and in order")
        if learn_temperature and not low <= temperature <= high:
            raise ValueError(f"temperature {temperature} is outside its bounds {low} to {high}")
        unknown = set(directions) - set(get_args(Direction))
        if unknown or not directions or len(set(directions)) < len(directions):
            raise ValueError(f"directions {list(directions)}: choose one or more of {', '.join(get_args(Direction))}")
        if partition not in get_args(Partition):
            raise ValueError(f"unknown partition {partition!r}: choose joint or per_direction")
        if not in_batch and set(directions) != {"query_to_document"}:
            raise ValueError("in_batch=False leaves only the direction query_to_document: take the others away")
        if hardness_mode not in (None, *get_args(HardnessMode)):
            raise ValueError(f"unknown hardness_mode {hardness_mode!r}: choose {', '.join(get_args(HardnessMode))}")
        if hardness_mode and (hardness_strength < 0 or "query_to_document" not in directions):
            raise ValueError(
                f"hardness needs the direction query_to_document and a strength of at least 0, got {hardness_strength}"
            )
        check_margin(margin, margin_strategy)
        check_kind(scores)
        # the directions that hold the positive come first
        self.directions = sorted(directions, key=get_args(Direction).index)
        self.partition, self.in_batch, self.scores = partition, in_batch, scores
        self.margin, self.margin_strategy = margin, margin_strategy
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength
        self.log_bounds = (math.log(low), math.log(high))
        self.fixed_temperature = temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None

    @property
    def temperature(self) -> Tensor | float:
        """What divides the scores: a scalar with a gradient where it is learned."""
        if self.log_temperature is None:
            return self.fixed_temperature
        # the parameter itself is moved back, as in CLIP: beyond the bounds it would have no gradient to return by
        with torch.no_grad():
            self.log_temperature.clamp_(*self.log_bounds)
        return self.log_temperature.exp()

    def forward(self, batch: ContrastiveBatch) -> Tensor:
        """The loss of the joint batch, a scalar.

        Raises:
            ValueError: features without the chosen scores, or a margin without guide vectors.
        """
        rows = torch.arange(len(batch.queries), device=batch.positives.device)
        right = batch.documents.map(lambda tensor: tensor[batch.positives])
        blocks: list[tuple[Tensor, Tensor, Tensor]] = []
        scores = None
        for direction in self.directions:
            if direction == "query_to_document":
                scores, column = self._document_scores(batch), batch.positives
            elif direction == "document_to_query":
                known = scores is not None
                crossed = scores[:, batch.positives] if known else similarity(batch.queries, right, self.scores)
                scores, column = crossed.T, rows
            elif direction == "query_to_query":
                scores, column = similarity(batch.queries, batch.queries, self.scores), None
            else:
                scores, column = similarity(right, batch.documents, self.scores), None
            excluded = not_negatives(
                batch, direction, in_batch=self.in_batch, margin=self.margin, margin_strategy=self.margin_strategy
            )
            logits = scores / self.temperature
            if direction == "query_to_document" and self.hardness_mode:
                logits = logits + self._hardness(batch, scores.detach())
            if column is None and (self.partition == "per_direction" or not blocks):
                positive = own_similarity(batch.queries, right, rows, self.scores) / self.temperature
                logits, excluded = torch.cat([positive[:, None], logits], 1), F.pad(excluded, (1, 0))
                column = torch.zeros_like(rows)
            blocks.append((logits, column, excluded))
        if self.partition == "joint":
            logits, excluded = (torch.cat([block[part] for block in blocks], 1) for part in (0, 2))
            return info_nce(logits, blocks[0][1], excluded=excluded)
        return torch.stack([info_nce(logits, column, excluded=excluded) for logits, column, excluded in blocks]).mean()

    def _document_scores(self, batch: ContrastiveBatch) -> Tensor:
        if self.in_batch:
            return similarity(batch.queries, batch.documents, self.scores)
        own = own_similarity(batch.queries, batch.documents, batch.owners, self.scores)
        columns = torch.arange(len(own), device=own.device)
        return own.new_zeros(len(batch.queries), len(own)).index_put((batch.owners, columns), own)

    def _hardness(self, batch: ContrastiveBatch, scores: Tensor) -> Tensor:
        own = torch.arange(len(scores), device=scores.device)[:, None] == batch.owners
        if self.hardness_mode == "in_batch_negatives":
            own = ~own
        elif self.hardness_mode == "all_negatives":
            own = torch.ones_like(own)
        return self.hardness_strength * scores * own.scatter(1, batch.positives[:, None], False)
