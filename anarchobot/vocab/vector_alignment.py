"""Two spaces of token vectors made one, and the nearest source tokens of each target token in it.

`procrustes`: the rotation that brings the pivots, tokens of both vocabularies, closest to themselves (Schoenemann,
1966), and similarity by CSLS, which takes off what a token is near to everybody (Conneau et al., 2018):

    csls(t, s) = 2 cos(t, s) - r(t) - r(s),  r: the mean cosine to the HUBS nearest of the other space

`relative`: TokAlign's (Li et al., 2025): a token is its cosines to the pivots, and similarity is their product.

Never a matrix of the whole target by the whole source: at most CELLS of it at a time.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

CELLS = 2**22  # cosines at a time: 16 MB, and as much again six times while the best are found
HUBS = 10
SHARPNESS = 0.1  # weights are softmax(cosine / this)

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Nearest(NamedTuple):
    """Of each target row, the best source rows [n, k], best first; their weights, softmax(cosine / SHARPNESS); and the
    cosine [n] of the target row and what it is to be made from, the weighted mean: with k = 1, of the nearest."""

    ids: Ids
    weights: Floats
    similarity: Floats


def rotation(target: Floats, source: Floats) -> Floats:
    """The orthogonal W [d, d] that makes |target W - source| least; row i of both is the same token's."""
    u, _, vt = np.linalg.svd(target.astype(np.float64).T @ source.astype(np.float64))
    turn: Floats = (u @ vt).astype(np.float32)
    return turn


def unit(vectors: Floats) -> Floats:
    """Rows of length one; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: Floats = (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    return units


def in_one_space(
    method: Literal["procrustes", "relative"],
    target: Floats,
    source: Floats,
    pivots: tuple[Ids, Ids],
    present: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
) -> tuple[Floats, Floats]:
    """Both vocabularies' rows in the space that they share. `pivots` are target and source ids of the same tokens;
    `present`: which rows are vectors at all (the others are zeros, and stay so)."""
    if method == "relative":
        return unit(target) @ unit(target)[pivots[0]].T, unit(source) @ unit(source)[pivots[1]].T
    t, s = (_centred(unit(x), rows) for x, rows in zip((target, source), present, strict=True))
    return t @ rotation(t[pivots[0]], s[pivots[1]]), s


def _centred(vectors: Floats, present: npt.NDArray[np.bool_]) -> Floats:
    middle = vectors[present].mean(axis=0)
    return unit(np.where(present[:, None], vectors - middle, 0).astype(np.float32))


def nearest(
    method: Literal["procrustes", "relative"], target: Floats, source: Floats, rows: Ids, candidates: Ids, k: int
) -> Nearest:
    """The `k` best of the source's `candidates` for each of the target's `rows`, both in one space."""
    s = source[candidates]
    k = min(k, len(candidates))
    if not len(rows):
        return Nearest(np.empty((0, k), np.int64), np.empty((0, k), np.float32), np.empty(0, np.float32))
    hubness: Floats | float = _mean_of_nearest(s, target[rows]) if method == "procrustes" else 0.0  # of each candidate
    directions = unit(s)
    found = []
    for block in _blocks(rows, len(s)):
        scores = 2 * (target[block] @ s.T) - hubness  # r(t) orders nothing
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        own, others = unit(target[block]), directions[best]
        cosines = np.einsum("nd,nkd->nk", own, others)
        weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / SHARPNESS)
        weights /= weights.sum(axis=1, keepdims=True)
        middle = unit(np.einsum("nk,nkd->nd", weights, others))
        found.append(Nearest(candidates[best], weights, np.einsum("nd,nd->n", own, middle)))
    return Nearest(*map(np.concatenate, zip(*found, strict=True)))


def _mean_of_nearest(of: Floats, to: Floats) -> Floats:
    """Of each row of `of`, the mean cosine to the HUBS nearest rows of `to`; rows of both have length one."""
    hubs = min(HUBS, len(to))
    blocks = _blocks(np.arange(len(of)), len(to))
    means = [-np.partition(-(of[block] @ to.T), hubs - 1, axis=1)[:, :hubs].mean(axis=1) for block in blocks]
    return np.concatenate(means).astype(np.float32)


def _blocks(rows: Ids, by: int) -> Iterator[Ids]:
    """So many of the rows at a time that a matrix of them by `by` columns has at most CELLS."""
    size = max(1, CELLS // by)
    return (rows[at : at + size] for at in range(0, len(rows), size))
