"""Maps two spaces of token vectors into one, and finds the nearest source tokens of each target token.

`procrustes`: the rotation that best maps the pivots (tokens of both vocabularies) onto each other (Schoenemann, 1966).
Similarity is CSLS, which penalizes hubs, tokens that are close to everything (Conneau et al., 2018):

    csls(t, s) = 2 cos(t, s) - r(t) - r(s),  r: mean cosine to the CSLS_NEIGHBORS nearest vectors of the other space

`relative`: TokAlign (Li et al., 2025). A token is represented by its cosines to the pivots; similarity is their dot
product.

Similarities are computed in blocks of at most MAX_BLOCK_CELLS, never as a full target by source matrix.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

MAX_BLOCK_CELLS = 2**22  # 16 MB of cosines, and up to six times as much while the best are selected
CSLS_NEIGHBORS = 10
SOFTMAX_TEMPERATURE = 0.1

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Neighbors(NamedTuple):
    """The nearest source rows [n, k] of n target rows, best first; their weights, softmax(cosine / temperature); and
    the cosine [n] of the target row and the weighted mean of the source rows."""

    ids: Ids
    weights: Floats
    similarity: Floats


def procrustes_rotation(target: Floats, source: Floats) -> Floats:
    """Returns the orthogonal W [d, d] that minimizes |target W - source|, where row i of both is the same token."""
    u, _, vt = np.linalg.svd(target.astype(np.float64).T @ source.astype(np.float64))
    rotation: Floats = (u @ vt).astype(np.float32)
    return rotation


def normalize_rows(vectors: Floats) -> Floats:
    """Scales rows to unit norm; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: Floats = (vectors / np.where(norms == 0, 1, norms)).astype(np.float32)
    return units


def map_to_shared_space(
    method: Literal["procrustes", "relative"],
    target: Floats,
    source: Floats,
    pivots: tuple[Ids, Ids],
    present: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
) -> tuple[Floats, Floats]:
    """Returns the rows of both vocabularies in a shared space.

    `pivots` are target ids and source ids of the same tokens. `present` marks the rows that have a vector; the others
    are zero and stay zero.
    """
    if method == "relative":
        target, source = normalize_rows(target), normalize_rows(source)
        return target @ target[pivots[0]].T, source @ source[pivots[1]].T
    t, s = (_center(normalize_rows(x), rows) for x, rows in zip((target, source), present, strict=True))
    return t @ procrustes_rotation(t[pivots[0]], s[pivots[1]]), s


def _center(vectors: Floats, present: npt.NDArray[np.bool_]) -> Floats:
    mean = vectors[present].mean(axis=0)
    return normalize_rows(np.where(present[:, None], vectors - mean, 0).astype(np.float32))


def nearest_neighbors(
    method: Literal["procrustes", "relative"], target: Floats, source: Floats, rows: Ids, candidates: Ids, k: int
) -> Neighbors:
    """Finds the `k` best of the source's `candidates` for each of the target's `rows`, both in the shared space."""
    s = source[candidates]
    k = min(k, len(candidates))
    if not len(rows):
        return Neighbors(np.empty((0, k), np.int64), np.empty((0, k), np.float32), np.empty(0, np.float32))
    hubness: Floats | float = _mean_top_cosine(s, target[rows]) if method == "procrustes" else 0.0  # per candidate
    directions = normalize_rows(s)
    blocks = []
    for block in row_blocks(rows, len(s)):
        scores = 2 * (target[block] @ s.T) - hubness  # r(t) is constant per row and does not change the order
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        queries, neighbors = normalize_rows(target[block]), directions[best]
        cosines = np.einsum("nd,nkd->nk", queries, neighbors)
        weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / SOFTMAX_TEMPERATURE)
        weights /= weights.sum(axis=1, keepdims=True)
        mean = normalize_rows(np.einsum("nk,nkd->nd", weights, neighbors))
        blocks.append(Neighbors(candidates[best], weights, np.einsum("nd,nd->n", queries, mean)))
    return Neighbors(*map(np.concatenate, zip(*blocks, strict=True)))


def _mean_top_cosine(vectors: Floats, others: Floats) -> Floats:
    """Mean cosine of each row to its CSLS_NEIGHBORS nearest rows of `others`; all rows have unit norm."""
    k = min(CSLS_NEIGHBORS, len(others))
    blocks = row_blocks(np.arange(len(vectors)), len(others))
    means = [-np.partition(-(vectors[block] @ others.T), k - 1, axis=1)[:, :k].mean(axis=1) for block in blocks]
    return np.concatenate(means).astype(np.float32)


def row_blocks(rows: Ids, columns: int) -> Iterator[Ids]:
    """Splits rows into blocks for which a matrix with that many columns has at most MAX_BLOCK_CELLS."""
    size = max(1, MAX_BLOCK_CELLS // columns)
    return (rows[at : at + size] for at in range(0, len(rows), size))
