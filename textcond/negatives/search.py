"""Exact nearest-vector search by inner product: a bfloat16 scan proposes, float32 decides."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

QUERY_BLOCK = 256  # queries whose scores against a corpus block stay in the processor's cache
CORPUS_BLOCK = 8192  # rows, and the unit in which a memory-mapped corpus is read
QUERIES_A_PASS = 8192  # queries that are carried through one reading of the corpus
GROUP = 16  # scores of which only the largest is compared, so that the threshold test costs little
BFLOAT16_STEP = 2.0**-8  # the largest relative distance of two neighbouring bfloat16 numbers


class ExactSearch:
    """The k rows of a corpus with the largest inner product with each query, in float32.

    A scan in bfloat16 keeps `k + spare` candidates a query, which are scored again in float32. The error of bfloat16 is
    bounded by the lengths of the vectors (each factor is rounded by at most 2**-9 of itself, and so is the product);
    a query whose k-th score does not clear what that error could have hidden is scanned again in float32. So what comes
    back is exact up to float32 rounding, whatever the vectors. Equal scores come in the order of rows.

    Memory besides the vectors: some 100 MB, however many rows and queries there are. A `numpy.memmap` is read in order,
    once for 8192 queries.

    Args:
        vectors: `(rows, dim)` of any float type: an array, or a memmap of a corpus larger than memory.
        spare: candidates beyond k that are scored again.
        scan_dtype: `torch.float32` on a processor without bfloat16 instructions.
        device: where the scan runs.

    Raises:
        ValueError: for vectors that are not a matrix, or a spare below 1.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        *,
        spare: int = 64,
        scan_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
    ):
        if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
            raise ValueError(
                f"vectors of shape {vectors.shape} and type {vectors.dtype}: give floats of shape (rows, dim)"
            )
        if spare < 1:
            raise ValueError(f"spare={spare}: give at least 1")
        self.vectors = vectors
        self.spare = spare
        self.scan_dtype = scan_dtype
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: np.ndarray, k: int, *, show_progress_bar: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return scores, float32 `(queries, k)`, best first, and their rows, int64 `(queries, k)`.

        `k` is lowered to the number of rows.

        Args:
            queries: `(queries, dim)`.
            k: how many rows a query.
            show_progress_bar: show how much of the corpus is read.

        Raises:
            ValueError: for k below 1, queries of another width, or anything that is not finite.
        """
        if k < 1:
            raise ValueError(f"k={k}: ask for at least 1 row")
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries of shape {queries.shape} do not fit vectors of shape {self.vectors.shape}")
        if not np.isfinite(queries).all():
            raise ValueError("a query vector is not finite: check the encoder")
        k = min(k, len(self))
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        if k == 0:
            return scores, rows
        passes = range(0, len(queries), QUERIES_A_PASS)
        with tqdm(total=len(self) * len(passes), unit="row", desc="search", disable=not show_progress_bar) as progress:
            for start in passes:
                part = np.array(queries[start : start + QUERIES_A_PASS], np.float32)
                stop = start + len(part)
                scores[start:stop], rows[start:stop], safe = self._search(part, k, self.scan_dtype, progress)
                unsafe = np.flatnonzero(~safe)
                if len(unsafe):
                    again = self._search(part[unsafe], k, torch.float32, None)
                    scores[start + unsafe], rows[start + unsafe] = again[:2]
        return scores, rows

    def _search(
        self, queries: np.ndarray, k: int, dtype: torch.dtype, progress: tqdm | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return scores, rows, and whether the scan's rounding cannot have hidden a better row."""
        candidates, floor, longest = self._scan(queries, min(k + self.spare, len(self)), dtype, progress)
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        # in the order of rows, so that a stable sort leaves equal scores in that order
        candidates.sort(axis=1)
        for query, vector in enumerate(queries):
            near = candidates[query]
            # einsum sums every row alike wherever it stands, so the result does not depend on blocks; BLAS does not
            exact = np.einsum("cd,d->c", np.asarray(self.vectors[near], np.float32), vector)
            best = np.argsort(-exact, kind="stable")[:k]
            scores[query], rows[query] = exact[best], near[best]
        if dtype != torch.bfloat16 or candidates.shape[1] == len(self):
            return scores, rows, np.ones(len(queries), bool)
        error = BFLOAT16_STEP * 1.01 * (np.linalg.norm(queries, axis=1) * longest + np.abs(floor))
        return scores, rows, scores[:, -1] >= floor + error

    def _scan(
        self, queries: np.ndarray, count: int, dtype: torch.dtype, progress: tqdm | None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Return `count` candidate rows a query, the score that no other row exceeds, and the longest row's length."""
        parts = torch.from_numpy(queries).to(self.device, dtype).split(QUERY_BLOCK)
        leaders = [_Leaders(len(part), count, self.device) for part in parts]
        longest = 0.0
        for start in range(0, len(self), CORPUS_BLOCK):
            block = np.array(self.vectors[start : start + CORPUS_BLOCK], np.float32)
            length = float(np.sqrt(np.einsum("rd,rd->r", block, block).max()))
            if not np.isfinite(length):
                raise ValueError(
                    f"a vector among rows {start} to {start + len(block) - 1} is not finite: check the encoder"
                )
            longest = max(longest, length)
            columns = torch.from_numpy(block).to(self.device, dtype)
            for part, leader in zip(parts, leaders):
                leader.add(part @ columns.T, start)
            if progress is not None:
                progress.update(len(block))
        rows, floors = zip(*(leader.finish() for leader in leaders))
        return torch.cat(rows).cpu().numpy(), torch.cat(floors).cpu().numpy(), longest


class _Leaders:
    """The `count` best rows of some queries while blocks of scores pass by."""

    def __init__(self, queries: int, count: int, device: torch.device):
        self.count = count
        self.scores = torch.empty(queries, 0, device=device)
        self.rows = torch.empty(queries, 0, dtype=torch.int64, device=device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self.waiting_hits = 0

    def add(self, scores: Tensor, first_row: int) -> None:
        """Take scores `(queries, block)` of the rows from `first_row` on."""
        if self.scores.shape[1] < self.count:
            best = scores.topk(min(self.count, scores.shape[1]), dim=1)
            return self._merge(best.values.float(), best.indices + first_row)
        threshold = self.scores[:, -1:].to(scores.dtype)
        whole = scores.shape[1] // GROUP * GROUP
        for part, offset in ((scores[:, :whole], 0), (scores[:, whole:], whole)):
            if not part.shape[1]:
                continue
            group = GROUP if offset == 0 else 1
            grouped = part.unflatten(1, (group, -1))  # strided groups: the maximum is then taken over whole vectors
            query, column = (grouped.amax(1) > threshold).nonzero(as_tuple=True)
            hits = grouped[query, :, column]
            chosen, member = (hits > threshold[query]).nonzero(as_tuple=True)
            rows = member * grouped.shape[2] + column[chosen] + offset + first_row
            self.waiting.append((query[chosen], rows, hits[chosen, member].float()))
            self.waiting_hits += len(rows)
        if self.waiting_hits > len(self.scores) * self.count // 2:
            self._settle()
        return None

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the rows `(queries, count)`, and the lowest score kept, `(queries,)`."""
        self._settle()
        return self.rows, self.scores[:, -1]

    def _settle(self) -> None:
        if not self.waiting_hits:
            return
        query, rows, scores = (torch.cat(parts) for parts in zip(*self.waiting))
        self.waiting, self.waiting_hits = [], 0
        query, order = query.sort(stable=True)
        counts = query.bincount(minlength=len(self.scores))
        place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        padded = self.scores.new_full((len(self.scores), int(counts.max())), -torch.inf)
        padded_rows = self.rows.new_zeros(padded.shape)
        padded[query, place], padded_rows[query, place] = scores[order], rows[order]
        self._merge(padded, padded_rows)

    def _merge(self, scores: Tensor, rows: Tensor) -> None:
        scores, rows = torch.cat([self.scores, scores], 1), torch.cat([self.rows, rows], 1)
        best = scores.topk(min(self.count, scores.shape[1]), dim=1)
        self.scores, self.rows = best.values, rows.gather(1, best.indices)
