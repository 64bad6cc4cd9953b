"""From which source tokens each target token's row is made.

    special   a control token of the same role (one that the source lacks: its end of document)
    shared    a token of the same form: its row, as it is
    aligned   a weighted mean of the nearest source tokens, where that is at least as similar as the threshold
    pieces    the mean of the source's tokens that spell it
    mean      the mean of all rows: a token that nothing can be said of, such as an id that the tokenizer does not use

The baselines that an alignment is measured against leave `aligned` and `pieces` out: `mean` gives what is not shared
the mean of all rows, and `random` a draw of the same mean and deviation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.tokenizer import Tokenizer
from anarchobot.vocab.canonical_tokens import Form, Matching, forms
from anarchobot.vocab.vector_alignment import Floats, Ids, Nearest, in_one_space, nearest

ROUTES = ("special", "shared", "aligned", "pieces", "mean", "random")
SPECIAL, SHARED, ALIGNED, PIECES, MEAN, RANDOM = range(len(ROUTES))
Method = Literal["procrustes", "relative", "pieces", "mean", "random"]

HELD_OUT, HELD_OUT_SHARE = 1000, 0.1  # of the shared tokens, those that measure the alignment and are no pivots
COVERAGE, PRECISION = 0.95, 0.6  # what an alignment should reach
EXAMPLES = 40


@dataclass(frozen=True)
class Plan:
    """Of each target id its route, and the source ids and weights [V, k] that its row is a mean of; weights of a row
    sum to one, or to zero where the route is mean or random."""

    routes: npt.NDArray[np.int8]
    ids: Ids
    weights: Floats


@dataclass(frozen=True)
class Side:
    """A vocabulary, with vectors [V, d] and counts [V] of its tokens in the text they were learned from."""

    tokenizer: Tokenizer
    vectors: Floats
    counts: Ids


def align(
    source: Side,
    target: Side,
    *,
    method: Method,
    pivot_count: int,
    similarity_threshold: float,
    top_k: int,
    seed: int,
) -> tuple[Plan, dict[str, Any]]:
    """The plan, and a report: `coverage` (share of the target's tokens, holes apart, with a match in the source),
    `routes`, `precision_at_1` on shared tokens that were held out, `examples`, and `advice` where a figure is poor.

    Raises UserError when too few tokens are shared to turn one space into the other.
    """
    source_forms, target_forms = forms(source.tokenizer), forms(target.tokenizer)
    size = len(target_forms)
    width = top_k
    routes = np.full(size, RANDOM if method == "random" else MEAN, np.int8)
    made: list[tuple[Sequence[int], Sequence[float]]] = [((), ())] * size
    same = shared_ids(source_forms, target_forms)
    end = source.tokenizer.eod_id
    for i, form in enumerate(target_forms):
        if form.kind == "special":
            routes[i], made[i] = SPECIAL, ((int(same[i]) if same[i] >= 0 else end,), (1.0,))
        elif same[i] >= 0:
            routes[i], made[i] = SHARED, ((int(same[i]),), (1.0,))
    report: dict[str, Any] = {}
    if method in ("procrustes", "relative"):
        open_ids = np.flatnonzero(routes == MEAN)
        found, report = _matched(
            source, target, same, open_ids, (source_forms, target_forms), method, pivot_count, top_k, seed
        )
        for row, i in enumerate(open_ids.tolist()):
            if target.counts[i] and found.similarity[row] >= similarity_threshold:
                routes[i], made[i] = ALIGNED, (found.ids[row].tolist(), found.weights[row].tolist())
    if method not in ("mean", "random"):
        for i in np.flatnonzero(routes == MEAN).tolist():
            if spelled := _spelled(target_forms[i], source.tokenizer, source_forms):
                routes[i], made[i] = PIECES, (spelled, [1 / len(spelled)] * len(spelled))
                width = max(width, len(spelled))
    plan = _as_arrays(routes, made, width)
    report |= _told(plan, source_forms, target_forms)
    return plan, report | {"advice": list(_advice(report)) if method in ("procrustes", "relative") else []}


def shared_ids(source: list[Form], target: list[Form]) -> Ids:
    """Of each target token the source token of the same form; -1 where there is none."""
    matching = Matching(source)
    found = (matching.find(form) for form in target)
    return np.array([-1 if i is None else i for i in found], np.int64)


def _matched(
    source: Side,
    target: Side,
    same: Ids,
    open_ids: Ids,
    both: tuple[list[Form], list[Form]],
    method: Literal["procrustes", "relative"],
    pivot_count: int,
    top_k: int,
    seed: int,
) -> tuple[Nearest, dict[str, Any]]:
    """The nearest source tokens of `open_ids`, and how well that finds shared tokens that were no pivots."""
    source_forms, target_forms = both
    text = np.array([form.kind in ("text", "byte") for form in target_forms])
    usable = np.flatnonzero(text & (same >= 0) & (target.counts > 0))
    usable = usable[source.counts[same[usable]] > 0]
    held = np.random.default_rng(seed).permutation(usable)[: min(HELD_OUT, int(HELD_OUT_SHARE * len(usable)))]
    rest = np.setdiff1d(usable, held)
    often = np.minimum(target.counts[rest], source.counts[same[rest]])
    pivots = rest[np.argsort(-often, kind="stable")][:pivot_count]
    if len(pivots) < 2:
        raise UserError(
            f"alignment: {len(usable)} tokens with a vector are in both vocabularies, too few to align them: give more "
            "text, or set alignment.method: pieces"
        )
    source_text = np.array([form.kind in ("text", "byte") for form in source_forms])
    present = (target.counts > 0) & text, (source.counts > 0) & source_text
    t, s = in_one_space(method, target.vectors, source.vectors, (pivots, same[pivots]), present)
    candidates = np.flatnonzero(present[1])
    found = nearest(method, t, s, np.concatenate([open_ids, held]), candidates, top_k)
    hits = found.ids[len(open_ids) :, 0] == same[held]
    report = {
        "pivots": len(pivots),
        "held_out": len(held),
        "precision_at_1": round(float(hits.mean()), 4) if len(held) else None,
    }
    return Nearest(
        found.ids[: len(open_ids)], found.weights[: len(open_ids)], found.similarity[: len(open_ids)]
    ), report


def _spelled(form: Form, tokenizer: Tokenizer, source: list[Form]) -> list[int]:
    """The source's tokens for the same bytes; those of each byte where they are no whole characters."""
    if form.kind not in ("text", "byte"):
        return []
    try:
        ids: list[int] = tokenizer.encode_batch([form.raw.decode()])[0].tolist()
    except UnicodeDecodeError:
        matching = Matching(source)
        found = (matching.find(Form(bytes([b]), "byte")) for b in form.raw)
        return [i for i in found if i is not None]
    return [i for i in ids if source[i].kind in ("text", "byte")]


def _as_arrays(routes: npt.NDArray[np.int8], made: list[tuple[Sequence[int], Sequence[float]]], width: int) -> Plan:
    ids, weights = np.zeros((len(made), width), np.int64), np.zeros((len(made), width), np.float32)
    for row, (of, by) in enumerate(made):
        ids[row, : len(of)], weights[row, : len(of)] = of, by
    return Plan(routes, ids, weights)


def _told(plan: Plan, source: list[Form], target: list[Form]) -> dict[str, Any]:
    tokens = np.array([form.kind != "hole" for form in target])
    matched = np.isin(plan.routes, (SPECIAL, SHARED, ALIGNED)) & tokens
    counts = {name: int(np.count_nonzero(plan.routes == i)) for i, name in enumerate(ROUTES)}
    by_kind = [np.flatnonzero(plan.routes == route)[: EXAMPLES // 2] for route in (ALIGNED, PIECES)]
    return {
        "coverage": round(float(matched.sum() / tokens.sum()), 4),
        "routes": {name: count for name, count in counts.items() if count},
        "examples": [_example(plan, int(i), source, target) for ids in by_kind for i in ids],
    }


def _advice(report: dict[str, Any]) -> Iterator[str]:
    coverage, precision = report["coverage"], report["precision_at_1"]
    if coverage < COVERAGE:
        yield (
            f"alignment: {coverage:.1%} of the tokens have a match, fewer than {COVERAGE:.0%}: lower "
            "alignment.similarity_threshold, or give more text"
        )
    if precision is not None and precision < PRECISION:
        yield (
            f"alignment: of held-out tokens {precision:.0%} find themselves, fewer than {PRECISION:.0%}: the text is "
            "too little to learn token vectors from: give more, also general text (corpus.general)"
        )


def _example(plan: Plan, i: int, source: list[Form], target: list[Form]) -> dict[str, Any]:
    parts = zip(plan.ids[i].tolist(), plan.weights[i].tolist(), strict=True)
    return {
        "token": _shown(target[i]),
        "route": ROUTES[plan.routes[i]],
        "from": {_shown(source[of]): round(weight, 3) for of, weight in parts if weight > 0},
    }


def _shown(form: Form) -> str:
    return form.raw.decode(errors="backslashreplace")
