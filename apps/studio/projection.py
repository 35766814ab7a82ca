"""A plane for vectors: rows that are alike come to lie together, by t-SNE (van der Maaten and Hinton, 2008)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Part of the name of a map on disk: count it up when the same vectors would come to lie elsewhere.
METHOD = 1
SEED = 0
PERPLEXITY = 30
NEIGHBOURS = 3 * PERPLEXITY
# Fewer rows have no neighbourhoods to keep: their two main directions show all that there is.
FEW = 10
# The time grows faster than the number of rows: of more than these, the others are placed among a sample.
SAMPLE = 20_000
AMONG = 8
WEISZFELD = 40
CHUNK = 512
ITERATIONS, REPORTED = 750, 10
COMPARING, ARRANGING, PLACING = "Comparing the prompts", "Arranging them", "Placing the others among them"

# Called with what is done now, how much of it, and of how much; what it raises ends the work.
Report = Callable[[str, int, int], None]


def project(vectors: np.ndarray, on_progress: Report = lambda what, done, total: None) -> np.ndarray:
    """Points in the square from -1 to 1 for unit vectors, the same for the same vectors.

    Args:
        vectors: `(n, dim)`.

    Returns:
        `(n, 2)` float32.

    Raises:
        ImportError: openTSNE is not installed.
        Exception: whatever `on_progress` raised.
    """
    vectors = np.asarray(vectors, np.float32)
    generator = np.random.default_rng(SEED)
    # Rows that are exactly alike have no direction between them.
    vectors = vectors + 1e-5 * generator.standard_normal(vectors.shape, np.float32)
    if len(vectors) < FEW:
        return _framed(_main_directions(vectors))
    if len(vectors) <= SAMPLE:
        return _framed(_arranged(vectors, on_progress))
    chosen = np.sort(generator.choice(len(vectors), SAMPLE, replace=False))
    points = np.empty((len(vectors), 2), np.float32)
    points[chosen] = _arranged(vectors[chosen], on_progress)
    others = np.setdiff1d(np.arange(len(vectors)), chosen)
    cosines, near = _nearest(vectors[others], vectors[chosen], AMONG, lambda *done: on_progress(PLACING, *done))
    points[others] = between(cosines, points[chosen][near])
    return _framed(points)


def between(cosines: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where something lies that has these cosines to neighbours at these points: where most of the nearer ones do.

    It is their geometric median, which a neighbour far off hardly moves, by Weiszfeld's iteration; the weights are
    inverse distances (Shepard, 1968), so that what equals a neighbour lies where that one does.

    Args:
        cosines: `(..., k)`.
        points: `(..., k, 2)`.

    Returns:
        `(..., 2)`.
    """
    weights = np.maximum(2 - 2 * np.asarray(cosines, np.float64), 1e-6) ** -2
    pull = weights
    for _ in range(WEISZFELD):
        place = (pull[..., None] * points).sum(-2) / pull.sum(-1, keepdims=True)
        pull = weights / np.maximum(np.linalg.norm(points - place[..., None, :], axis=-1), 1e-4)
    return place


def _arranged(vectors: np.ndarray, on_progress: Report) -> np.ndarray:
    try:
        from openTSNE import TSNE
        from openTSNE.affinity import PerplexityBasedNN
        from openTSNE.initialization import rescale
        from openTSNE.nearest_neighbors import PrecomputedNeighbors
    except ImportError as error:
        raise ImportError("the map needs the package openTSNE: pip install openTSNE") from error

    count = min(NEIGHBOURS, len(vectors) - 1)
    cosines, near = _nearest(vectors, None, count, lambda *done: on_progress(COMPARING, *done))
    distances = np.sqrt(np.maximum(2 - 2 * cosines.astype(np.float64), 0))
    affinities = PerplexityBasedNN(
        perplexity=min(PERPLEXITY, count / 3), knn_index=PrecomputedNeighbors(near, distances), n_jobs=1
    )
    done = 0

    def count_up(iteration: int, error: float, embedding: np.ndarray) -> bool:
        nonlocal done
        done += REPORTED
        on_progress(ARRANGING, done, ITERATIONS)
        return False

    # One thread: the sums of several come out in no fixed order, and a picture may be drawn meanwhile.
    tsne = TSNE(
        early_exaggeration_iter=ITERATIONS // 3,
        n_iter=ITERATIONS - ITERATIONS // 3,
        random_state=SEED,
        n_jobs=1,
        callbacks=count_up,
        callbacks_every_iters=REPORTED,
    )
    return np.asarray(tsne.fit(affinities=affinities, initialization=rescale(_main_directions(vectors))))


def _main_directions(vectors: np.ndarray) -> np.ndarray:
    """The two principal components, `(n, 2)`."""
    centred = (vectors - vectors.mean(0)).astype(np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)
    return centred @ directions[:, -2:]


def _nearest(
    vectors: np.ndarray, among: np.ndarray | None, k: int, on_progress: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and places in `among` (None: in the vectors without itself) of the k nearest, nearest first: `(n, k)`."""
    others = vectors if among is None else among
    cosines, near = np.empty((len(vectors), k), np.float32), np.empty((len(vectors), k), np.int64)
    for start in range(0, len(vectors), CHUNK):
        on_progress(start, len(vectors))
        part = vectors[start : start + CHUNK] @ others.T
        if among is None:
            itself = np.arange(len(part))
            part[itself, start + itself] = -np.inf
        best = np.argpartition(-part, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(part, best, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        near[start : start + CHUNK] = np.take_along_axis(best, order, 1)
        cosines[start : start + CHUNK] = np.take_along_axis(values, order, 1)
    return cosines, near


def _framed(points: np.ndarray) -> np.ndarray:
    """Moved and scaled into the square from -1 to 1."""
    points = points - (points.max(0) + points.min(0)) / 2
    return (points / (np.abs(points).max() or 1)).astype(np.float32)
