"""Expresses vectors of new tokens by a few vectors of shared tokens, of the same space. The weights then combine the
embedding rows of the shared tokens.

`sparsemax_combination`: FOCUS (Dobler and de Melo, 2023): the weights are the sparsemax of the cosines. They are
positive, and most are zero.

`matching_pursuit`: orthogonal matching pursuit (Pati et al., 1993), as mergekit's tokensurgeon uses it (Goddard and
Fernandes Neto, 2025): the least-squares combination of k shared tokens, which are chosen one by one.

Both compute in blocks, never a full matrix of cosines.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.vocab.vector_alignment import Floats, Ids, normalize_rows, row_blocks

Combination = tuple[Ids, Floats]  # rows of the shared tokens and their weights
VANISHED = 1e-6  # relative to a vector of norm 1, a residual of this size is a rounding error


def sparsemax(scores: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Returns the point of the simplex nearest to each row of `scores` [n, m] (Martins and Astudillo, 2016)."""
    falling = -np.sort(-scores.astype(np.float64), axis=1)
    sums = falling.cumsum(axis=1)
    support = np.count_nonzero(1 + np.arange(1, scores.shape[1] + 1) * falling > sums, axis=1)[:, None]
    threshold = (np.take_along_axis(sums, support - 1, axis=1) - 1) / support
    weights: npt.NDArray[np.float64] = np.maximum(scores - threshold, 0)
    return weights


def sparsemax_combination(vectors: Floats, shared: Floats) -> Iterator[Combination]:
    """Yields the weights of each of `vectors` [n, d] over the rows of `shared` [m, d]: positive, with sum 1."""
    units, shared = normalize_rows(vectors), normalize_rows(shared)
    for block in row_blocks(np.arange(len(units)), len(shared)):
        for weights in sparsemax(units[block] @ shared.T):
            ids = np.flatnonzero(weights)
            yield ids, weights[ids].astype(np.float32)


def matching_pursuit(vectors: Floats, shared: Floats, k: int) -> Iterator[Combination]:
    """Yields the weights of each of `vectors` [n, d] over at most `k` rows of `shared` [m, d], of any sign: all vectors
    are scaled to norm 1 first. A vector that fewer rows represent exactly gets fewer."""
    targets, atoms = (normalize_rows(x).astype(np.float64) for x in (vectors, shared))
    k = min(k, *atoms.shape)
    for block in row_blocks(np.arange(len(targets)), max(len(atoms), k * (k + atoms.shape[1]))):
        ids, weights = _pursue(targets[block], atoms, k)
        for row_ids, row_weights in zip(ids, weights, strict=True):
            used = np.flatnonzero(row_weights)
            yield row_ids[used], row_weights[used].astype(np.float32)


def _pursue(
    targets: npt.NDArray[np.float64], atoms: npt.NDArray[np.float64], k: int
) -> tuple[Ids, npt.NDArray[np.float64]]:
    """Returns ids and weights [n, k] of unit `targets` [n, d] over unit `atoms` [m, d].

    The chosen atoms are orthogonalized one after another, atoms = R^T Q with orthonormal rows of Q [n, k, d], so that
    the residual only loses its part along the newest row. Where it has vanished, that row and the weight are zero.
    """
    n, rows = len(targets), np.arange(len(targets))
    ids, residual = np.zeros((n, k), np.int64), targets.copy()
    q, r, parts = np.zeros((n, k, atoms.shape[1])), np.zeros((n, k, k)), np.zeros((n, k))
    for step in range(k):
        scores = np.abs(residual @ atoms.T)
        scores[rows[:, None], ids[:, :step]] = -1  # chosen already
        ids[:, step] = scores.argmax(axis=1)
        newest, basis = atoms[ids[:, step]], q[:, :step]
        for _ in range(2):  # the second time removes the rounding errors of the first
            along = np.einsum("njd,nd->nj", basis, newest)
            r[:, :step, step] += along
            newest = newest - np.einsum("nj,njd->nd", along, basis)
        norm = np.linalg.norm(newest, axis=1)
        active = (norm > VANISHED) & (np.linalg.norm(residual, axis=1) > VANISHED)
        r[:, step, step] = np.where(active, norm, 1)
        q[:, step] = np.where(active, 1 / np.where(active, norm, 1), 0)[:, None] * newest
        parts[:, step] = np.einsum("nd,nd->n", q[:, step], residual)
        residual -= parts[:, step, None] * q[:, step]
    return ids, np.asarray(np.linalg.solve(r, parts[:, :, None])[:, :, 0], np.float64)
