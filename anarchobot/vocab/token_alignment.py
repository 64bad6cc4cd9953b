"""Chooses the source tokens from which the embedding row of each target token is built.

    special   a control token with the same role; if the source has none, its end-of-document token
    shared    the token with the same canonical form: its row is copied
    aligned   a combination of source tokens that occur in similar contexts, by `method`
    pieces    the mean of the source tokens that spell the token
    mean      the mean of all rows, for ids without a token or spelling
    random    a sample with the mean and standard deviation of all rows

Methods of the route `aligned`:

    procrustes  the weighted mean of the nearest source tokens, if its similarity reaches the threshold: both spaces of
    relative    token vectors are mapped into one (vector_alignment.py)
    focus       combinations of shared tokens, from vectors of the target tokenizer's tokens alone
    omp         (sparse_combination.py)

With `pieces`, `mean` and `random`, no token is aligned: tokens that are not shared take that route.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.canonical_tokens import CanonicalToken, TokenIndex, canonical_tokens
from anarchobot.tokenizers.tokenizer import Tokenizer
from anarchobot.vocab.sparse_combination import matching_pursuit, sparsemax_combination
from anarchobot.vocab.vector_alignment import Floats, Ids, Neighbors, map_to_shared_space, nearest_neighbors

ROUTES = ("special", "shared", "aligned", "pieces", "mean", "random")
SPECIAL, SHARED, ALIGNED, PIECES, MEAN, RANDOM = range(len(ROUTES))
Method = Literal["procrustes", "relative", "focus", "omp", "pieces", "mean", "random"]
BASELINES: tuple[Method, ...] = ("pieces", "mean", "random")  # methods without token vectors
WITHOUT_SOURCE_VECTORS: tuple[Method, ...] = ("focus", "omp")

MAX_HELD_OUT, HELD_OUT_FRACTION = 1000, 0.1  # shared tokens that are not pivots and measure the alignment
MIN_COVERAGE, MIN_PRECISION = 0.95, 0.6  # below these, the report has advice
MAX_EXAMPLES, MAX_EXAMPLE_SOURCES = 40, 10


@dataclass(frozen=True)
class AlignmentPlan:
    """The route of each target id, and the source tokens that its row is a combination of.

    The source ids and weights of target id i are those from `ends[i - 1]` to `ends[i]`: none for the routes mean and
    random. The weights sum to 1, except for the method `omp`.
    """

    routes: npt.NDArray[np.int8]
    ends: Ids
    ids: Ids
    weights: Floats

    def combination(self, i: int) -> tuple[Ids, Floats]:
        """The source ids and weights of a target id."""
        part = slice(self.ends[i - 1] if i else 0, self.ends[i])
        return self.ids[part], self.weights[part]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with vectors [V, d] of its tokens and their counts [V] in the text the vectors were trained on."""

    tokenizer: Tokenizer
    vectors: Floats
    counts: Ids

    @cached_property
    def tokens(self) -> list[CanonicalToken]:
        return canonical_tokens(self.tokenizer)

    @cached_property
    def has_vector(self) -> npt.NDArray[np.bool_]:
        """Which tokens are text that occurs often enough for a vector: others are zero."""
        is_text = np.array([token.kind in ("text", "byte") for token in self.tokens], np.bool_)
        return is_text & (self.counts > 0) & self.vectors.any(axis=1)


def align(
    source: Vocabulary,
    target: Vocabulary,
    *,
    method: Method,
    pivot_count: int,
    similarity_threshold: float,
    top_k: int,
    seed: int,
) -> tuple[AlignmentPlan, dict[str, Any]]:
    """Returns the plan and a report.

    The report has `coverage` (fraction of target tokens, unused ids excluded, with a match in the source), `routes`,
    `precision_at_1` on held-out shared tokens, `examples`, and `advice` if a metric is low. Raises UserError if too few
    tokens are shared to map one space to the other.
    """
    size = len(target.tokens)
    routes = np.full(size, RANDOM if method == "random" else MEAN, np.int8)
    sources: list[tuple[Sequence[int], Sequence[float]]] = [((), ())] * size
    shared = shared_ids(source.tokens, target.tokens)
    for i, token in enumerate(target.tokens):
        if token.kind == "special":
            routes[i], sources[i] = SPECIAL, ((int(shared[i]) if shared[i] >= 0 else source.tokenizer.eod_id,), (1.0,))
        elif shared[i] >= 0:
            routes[i], sources[i] = SHARED, ((int(shared[i]),), (1.0,))
    report: dict[str, Any] = {}
    unmatched = np.flatnonzero(routes == MEAN)
    if method in ("procrustes", "relative"):
        neighbors, report = _match(source, target, shared, unmatched, method, pivot_count, top_k, seed)
        for row, i in enumerate(unmatched.tolist()):
            if target.counts[i] and neighbors.similarity[row] >= similarity_threshold:
                routes[i], sources[i] = ALIGNED, (neighbors.ids[row].tolist(), neighbors.weights[row].tolist())
    elif method in ("focus", "omp"):
        rows = unmatched[target.has_vector[unmatched]]
        for i, combination in zip(rows.tolist(), _combine(target, shared, rows, method, top_k), strict=True):
            routes[i], sources[i] = ALIGNED, combination
    if method not in ("mean", "random"):
        for i in np.flatnonzero(routes == MEAN).tolist():
            if pieces := _spell(target.tokens[i], source):
                routes[i], sources[i] = PIECES, (pieces, [1 / len(pieces)] * len(pieces))
    plan = AlignmentPlan(
        routes,
        np.cumsum([len(ids) for ids, _ in sources]),
        np.array([i for ids, _ in sources for i in ids], np.int64),
        np.array([weight for _, weights in sources for weight in weights], np.float32),
    )
    report |= _summarize(plan, source.tokens, target.tokens)
    return plan, report | {"advice": list(_advice(report)) if method in ("procrustes", "relative") else []}


def choose_method(tied: bool) -> Method:
    """The best initialization for a model whose output head is, or is not, its embedding (docs/vocabulary.md)."""
    return "focus" if tied else "pieces"


def shared_ids(source: list[CanonicalToken], target: list[CanonicalToken]) -> Ids:
    """Returns, for each target token, the source token with the same canonical form; -1 if there is none."""
    index = TokenIndex(source)
    matches = (index.find(token) for token in target)
    return np.array([-1 if i is None else i for i in matches], np.int64)


def _match(
    source: Vocabulary,
    target: Vocabulary,
    shared: Ids,
    unmatched: Ids,
    method: Literal["procrustes", "relative"],
    pivot_count: int,
    top_k: int,
    seed: int,
) -> tuple[Neighbors, dict[str, Any]]:
    """Finds the nearest source tokens of `unmatched`, and measures how often this finds held-out shared tokens."""
    usable = np.flatnonzero(target.has_vector & (shared >= 0))
    usable = usable[source.has_vector[shared[usable]]]
    held_out_size = min(MAX_HELD_OUT, int(HELD_OUT_FRACTION * len(usable)))
    held_out = np.random.default_rng(seed).permutation(usable)[:held_out_size]
    rest = np.setdiff1d(usable, held_out)
    frequency = np.minimum(target.counts[rest], source.counts[shared[rest]])
    pivots = rest[np.argsort(-frequency, kind="stable")][:pivot_count]
    if len(pivots) < 2:
        raise UserError(
            f"alignment: only {len(usable)} tokens with vectors are in both vocabularies, too few to align: use more "
            "text, or set alignment.method: pieces"
        )
    t, s = map_to_shared_space(
        method, target.vectors, source.vectors, (pivots, shared[pivots]), (target.has_vector, source.has_vector)
    )
    rows, candidates = np.concatenate([unmatched, held_out]), np.flatnonzero(source.has_vector)
    neighbors = nearest_neighbors(method, t, s, rows, candidates, top_k)
    n = len(unmatched)
    hits = neighbors.ids[n:, 0] == shared[held_out]
    report = {
        "pivots": len(pivots),
        "held_out": len(held_out),
        "precision_at_1": round(float(hits.mean()), 4) if len(held_out) else None,
    }
    return Neighbors(neighbors.ids[:n], neighbors.weights[:n], neighbors.similarity[:n]), report


def _combine(
    target: Vocabulary, shared: Ids, rows: Ids, method: Literal["focus", "omp"], top_k: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Yields, for each of `rows`, the source tokens and weights of its combination of shared tokens."""
    overlap = np.flatnonzero(target.has_vector & (shared >= 0))
    if not len(overlap):
        raise UserError(
            "alignment: no token with a vector is in both vocabularies: use more text, or set alignment.method: pieces"
        )
    vectors, atoms = target.vectors[rows], target.vectors[overlap]
    found = sparsemax_combination(vectors, atoms) if method == "focus" else matching_pursuit(vectors, atoms, top_k)
    for ids, weights in found:
        yield shared[overlap[ids]].tolist(), weights.tolist()


def _spell(token: CanonicalToken, source: Vocabulary) -> list[int]:
    """Returns the source tokens for the bytes of a token, one per byte if they are not valid UTF-8."""
    if token.kind not in ("text", "byte"):
        return []
    try:
        ids: list[int] = source.tokenizer.encode_batch([token.raw.decode()])[0].tolist()
    except UnicodeDecodeError:
        index = TokenIndex(source.tokens)
        byte_ids = (index.find(CanonicalToken(bytes([b]), "byte")) for b in token.raw)
        return [i for i in byte_ids if i is not None]
    return [i for i in ids if source.tokens[i].kind in ("text", "byte")]


def _summarize(plan: AlignmentPlan, source: list[CanonicalToken], target: list[CanonicalToken]) -> dict[str, Any]:
    used = np.array([token.kind != "unused" for token in target])
    matched = np.isin(plan.routes, (SPECIAL, SHARED, ALIGNED)) & used
    counts = {name: int(np.count_nonzero(plan.routes == i)) for i, name in enumerate(ROUTES)}
    example_ids = [np.flatnonzero(plan.routes == route)[: MAX_EXAMPLES // 2] for route in (ALIGNED, PIECES)]
    return {
        "coverage": round(float(matched.sum() / used.sum()), 4),
        "routes": {name: count for name, count in counts.items() if count},
        "examples": [_example(plan, int(i), source, target) for ids in example_ids for i in ids],
    }


def _advice(report: dict[str, Any]) -> Iterator[str]:
    coverage, precision = report["coverage"], report["precision_at_1"]
    if coverage < MIN_COVERAGE:
        yield (
            f"alignment: only {coverage:.1%} of the target tokens have a match (expected {MIN_COVERAGE:.0%}): lower "
            "alignment.similarity_threshold, or use more text"
        )
    if precision is not None and precision < MIN_PRECISION:
        yield (
            f"alignment: precision at 1 on held-out tokens is {precision:.0%} (expected {MIN_PRECISION:.0%}): there is "
            "too little text for token vectors: use more, including general text (corpus.general)"
        )


def _example(plan: AlignmentPlan, i: int, source: list[CanonicalToken], target: list[CanonicalToken]) -> dict[str, Any]:
    parts = sorted(zip(*(part.tolist() for part in plan.combination(i)), strict=True), key=lambda part: -abs(part[1]))
    return {
        "token": _display(target[i]),
        "route": ROUTES[plan.routes[i]],
        "from": {_display(source[j]): round(weight, 3) for j, weight in parts[:MAX_EXAMPLE_SOURCES]},
    }


def _display(token: CanonicalToken) -> str:
    return token.raw.decode(errors="backslashreplace")
