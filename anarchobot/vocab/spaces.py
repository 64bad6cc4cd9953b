"""Two spaces of token vectors made one, and the nearest source tokens of each target token in it.

`procrustes`: the rotation that brings the pivots, tokens of both vocabularies, closest to themselves (Schoenemann,
1966), and similarity by CSLS, which takes off what a token is near to everybody (Conneau et al., 2018):

    csls(t, s) = 2 cos(t, s) - r(t) - r(s),  r: the mean cosine to the HUBS nearest of the other space

`relative`: TokAlign's (Li et al., 2025): a token is its cosines to the pivots, and similarity is their product.

Never a matrix of the whole target by the whole source: BLOCK rows at a time.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 256  # rows: by a source of 150,000 tokens, 150 MB of cosines
HUBS = 10

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Nearest(NamedTuple):
    """Of each target row, the best source rows [n, k], best first, and the cosines of both, in [-1, 1]."""

    ids: Ids
    cosines: Floats


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
        return Nearest(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
    if method == "procrustes":
        hubness = _mean_of_nearest(s, target[rows])  # of each candidate
        scored = (2 * (target[block] @ s.T) - hubness for block in _blocks(rows))  # r(t) orders nothing
    else:
        scored = (target[block] @ s.T for block in _blocks(rows))
    directions = unit(s)
    ids, cosines = [], []
    for block, scores in zip(_blocks(rows), scored, strict=True):
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        ids.append(candidates[best])
        cosines.append(np.einsum("nd,nkd->nk", unit(target[block]), directions[best]))
    return Nearest(np.concatenate(ids), np.concatenate(cosines).astype(np.float32))


def _mean_of_nearest(of: Floats, to: Floats) -> Floats:
    """Of each row of `of`, the mean cosine to the HUBS nearest rows of `to`; rows of both have length one."""
    hubs = min(HUBS, len(to))
    means = [-np.partition(-(of[block] @ to.T), hubs - 1, axis=1)[:, :hubs].mean(axis=1) for block in _blocks(of)]
    return np.concatenate(means).astype(np.float32)


def _blocks(rows: npt.NDArray[np.generic]) -> Iterator[npt.NDArray[np.int64]]:
    """The rows themselves, where they are ids, or the numbers of the rows of a matrix; BLOCK at a time."""
    numbers = rows.astype(np.int64) if rows.ndim == 1 else np.arange(len(rows))
    return (numbers[at : at + BLOCK] for at in range(0, len(numbers), BLOCK))
