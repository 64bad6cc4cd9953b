"""The alignment plan of a new vocabulary, and the embedding rows built from it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.sources import builtin
from anarchobot.tokenizers.canonical_tokens import CanonicalToken, canonical_tokens
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer
from anarchobot.vocab import token_alignment
from anarchobot.vocab.embedding_init import count_zero_rows, initialize_embeddings, initialize_rows
from anarchobot.vocab.token_alignment import (
    ALIGNED,
    MEAN,
    PIECES,
    RANDOM,
    ROUTES,
    SHARED,
    SPECIAL,
    AlignmentPlan,
    Vocabulary,
    align,
)

SIZE, DIM = 2000, 32


class Named:
    """A tokenizer with tokens of the given names, with the methods that alignment uses."""

    eod_id = 0
    stop_ids = frozenset([0])
    overrides = {}  # noqa: RUF012
    files = ()

    def __init__(self, names: list[str]) -> None:
        self.names, self.vocab_size = names, len(names)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Texts are comma-separated token names."""
        return [np.array([self.names.index(name) for name in text.split(",")], np.int32) for text in texts]


@pytest.fixture(autouse=True)
def named_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(tokenizer: Any) -> list[CanonicalToken]:
        if not isinstance(tokenizer, Named):
            return canonical_tokens(tokenizer)
        kinds = ["special" if name.startswith("<") else "text" for name in tokenizer.names]
        return [CanonicalToken(name.encode(), kind) for name, kind in zip(tokenizer.names, kinds, strict=True)]  # type: ignore[arg-type]

    monkeypatch.setattr(token_alignment, "canonical_tokens", tokens)


def vocabulary(names: list[str], vectors: np.ndarray, counts: np.ndarray | None = None) -> Vocabulary:
    every = np.full(len(names), 10)
    return Vocabulary(Named(names), vectors.astype(np.float32), every if counts is None else counts)  # type: ignore[arg-type]


def settings(**change: Any) -> dict[str, Any]:
    plain = {"method": "procrustes", "pivot_count": 2000, "similarity_threshold": 0.4, "top_k": 1, "seed": 0}
    return plain | change


def first_sources(plan: AlignmentPlan) -> np.ndarray:
    """The first source id of each target id."""
    return np.array([plan.combination(i)[0][0] for i in range(len(plan.routes))])


@pytest.fixture(scope="module")
def permuted() -> tuple[Vocabulary, Vocabulary, np.ndarray]:
    """A vocabulary, and a permuted, rotated, noisy copy of it; three quarters of its tokens are renamed."""
    rng = np.random.default_rng(1)
    source = rng.standard_normal((SIZE, DIM))
    order = rng.permutation(SIZE)
    rotated = source[order] @ np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    names = [f"t{i}" for i in range(SIZE)]
    renamed = [names[i] if i % 4 == 0 else f"new{i}" for i in order]
    return vocabulary(names, source), vocabulary(renamed, rotated + 0.05 * rng.standard_normal((SIZE, DIM))), order


def test_a_known_permutation_is_recovered(permuted: tuple[Vocabulary, Vocabulary, np.ndarray]) -> None:
    source, target, order = permuted
    plan, report = align(source, target, **settings())
    renamed = order % 4 != 0
    found = first_sources(plan) == order
    assert found[renamed].mean() >= 0.99
    assert found[~renamed].all()
    assert set(plan.routes[renamed]) == {ALIGNED}
    assert set(plan.routes[~renamed]) == {SHARED}
    assert report["precision_at_1"] >= 0.99
    assert report["coverage"] == 1.0
    assert report["held_out"] == SIZE // 40
    assert report["pivots"] == SIZE // 4 - SIZE // 40
    assert report["advice"] == []


def test_held_out_precision_detects_meaningless_vectors(permuted: tuple[Vocabulary, Vocabulary, np.ndarray]) -> None:
    source, target, _ = permuted
    noise = np.random.default_rng(2).standard_normal((SIZE, DIM)).astype(np.float32)
    _, report = align(source, Vocabulary(target.tokenizer, noise, target.counts), **settings())
    assert report["precision_at_1"] < 0.1
    assert report["advice"][0].startswith("alignment: precision at 1 on held-out tokens is 0% (expected 60%)")


def test_pivots_are_the_most_frequent_shared_tokens(permuted: tuple[Vocabulary, Vocabulary, np.ndarray]) -> None:
    """Only frequent tokens have meaningful vectors here, so too many pivots spoil the alignment."""
    source, target, order = permuted
    counts = np.where(order % 40 == 0, 1000, 10)
    vectors = np.where((order % 4 == 0) & (order % 40 != 0), 1, 0)[:, None] * np.random.default_rng(3).standard_normal(
        (SIZE, DIM)
    )
    vectors = np.where(vectors.any(axis=1, keepdims=True), 3 * vectors, target.vectors).astype(np.float32)
    spoiled = Vocabulary(target.tokenizer, vectors, counts)
    source = Vocabulary(source.tokenizer, source.vectors, np.full(SIZE, 1000))
    renamed = order % 4 != 0
    few, report = align(source, spoiled, **settings(pivot_count=40))
    many, _ = align(source, spoiled, **settings(pivot_count=2000))
    assert report["pivots"] == 40
    assert (first_sources(few) == order)[renamed].mean() > 0.9
    assert (first_sources(many) == order)[renamed].mean() < 0.5


def test_tokens_below_the_threshold_are_the_mean_of_their_pieces() -> None:
    rng = np.random.default_rng(4)
    source = rng.standard_normal((100, DIM))
    names = [f"t{i}" for i in range(100)]
    far = np.vstack([source, rng.standard_normal((1, DIM))])
    for threshold, route in ((0.9, PIECES), (-1.0, ALIGNED)):
        plan, report = align(
            vocabulary(names, source),
            vocabulary([*names, "t3,t5"], far),
            **settings(similarity_threshold=threshold, top_k=3),
        )
        assert plan.routes[100] == route
        assert report["routes"] == {"shared": 100, ROUTES[route]: 1}
    plan, report = align(
        vocabulary(names, source), vocabulary([*names, "t3,t5"], far), **settings(similarity_threshold=0.9)
    )
    assert [part.tolist() for part in plan.combination(100)] == [[3, 5], [0.5, 0.5]]
    assert report["coverage"] == round(100 / 101, 4)
    assert report["advice"] == []
    others = [f"t{i},t3" for i in range(6)]
    far = np.vstack([source, rng.standard_normal((6, DIM))])
    _, poor = align(vocabulary(names, source), vocabulary([*names, *others], far), **settings(similarity_threshold=0.9))
    assert poor["advice"] == [
        "alignment: only 94.3% of the target tokens have a match (expected 95%): lower "
        "alignment.similarity_threshold, or use more text"
    ]
    assert report["examples"] == [{"token": "t3,t5", "route": "pieces", "from": {"t3": 0.5, "t5": 0.5}}]


def test_weights_of_the_top_k(permuted: tuple[Vocabulary, Vocabulary, np.ndarray]) -> None:
    source, target, order = permuted
    plan, _ = align(source, target, **settings(top_k=4))
    row = int(np.flatnonzero(order % 4 == 1)[0])
    ids, weights = plan.combination(row)
    assert ids[0] == order[row]
    assert np.isclose(weights.sum(), 1)
    assert weights[0] > 0.9  # softmax with temperature 0.1: the others are far away
    assert len(set(ids.tolist())) == 4


def test_a_missing_role_falls_back_to_end_of_document() -> None:
    vectors = np.random.default_rng(5).standard_normal((50, DIM))
    names = ["<end>", *(f"t{i}" for i in range(49))]
    plan, _ = align(vocabulary(names, vectors), vocabulary(["<pad>", *names[1:]], vectors), **settings())
    assert (plan.routes[0], *(part.tolist() for part in plan.combination(0))) == (SPECIAL, [0], [1.0])


@pytest.mark.parametrize(("method", "route"), [("mean", MEAN), ("random", RANDOM), ("pieces", PIECES)])
def test_the_baselines_copy_shared_tokens(method: str, route: int) -> None:
    names, vectors = [f"t{i}" for i in range(20)], np.zeros((20, 1))
    plan, report = align(
        vocabulary(names, vectors), vocabulary([*names[:10], "t1,t2"], vectors[:11]), **settings(method=method)
    )
    assert plan.routes.tolist() == [SHARED] * 10 + [route]
    assert "precision_at_1" not in report


@pytest.mark.parametrize("method", ["focus", "omp"])
def test_new_tokens_are_combinations_of_shared_tokens(method: str) -> None:
    """t0 to t9 are shared, in another order; n0 is between t2 and t6; the others do not occur, or too rarely for a
    vector: their pieces count."""
    rng = np.random.default_rng(7)
    names = [f"t{i}" for i in range(20)]
    target_names = [*(f"t{i}" for i in reversed(range(10))), "n0", "t11,t3", "t4,t5"]
    vectors = rng.standard_normal((13, DIM))
    vectors[12] = 0
    vectors[10] = vectors[9 - 2] / np.linalg.norm(vectors[9 - 2]) + vectors[9 - 6] / np.linalg.norm(vectors[9 - 6])
    counts = np.array([10] * 11 + [0, 1])
    source = vocabulary(names, np.zeros((20, 1)), np.zeros(20, np.int64))  # its vectors are not used
    plan, report = align(source, vocabulary(target_names, vectors, counts), **settings(method=method, top_k=2))
    assert plan.routes.tolist() == [SHARED] * 10 + [ALIGNED, PIECES, PIECES]
    ids, weights = plan.combination(10)
    best = np.argsort(-weights)[:2]
    assert set(ids[best].tolist()) == {2, 6}
    assert plan.combination(11)[0].tolist() == [11, 3]
    assert report["advice"] == []
    assert "precision_at_1" not in report
    example = report["examples"][0]
    assert set(list(example["from"])[:2]) == {"t2", "t6"}
    if method == "omp":
        assert len(ids) == 2


@pytest.mark.parametrize("method", ["focus", "omp"])
def test_without_shared_tokens_nothing_can_be_combined(method: str) -> None:
    one, other = vocabulary(["a", "b"], np.eye(2)), vocabulary(["c", "d"], np.eye(2))
    with pytest.raises(UserError, match="no token with a vector is in both vocabularies"):
        align(one, other, **settings(method=method))


def test_rows_by_hand() -> None:
    """A copy, a mean of two, a difference, and rows without source tokens."""
    old = np.array([[3, 4], [0, 2], [1, 0], [-1, 0]], np.float32)
    plan = AlignmentPlan(
        np.array([SHARED, ALIGNED, ALIGNED, MEAN, RANDOM], np.int8),
        np.array([1, 3, 5, 5, 5]),
        np.array([1, 0, 1, 0, 2]),
        np.array([1, 0.5, 0.5, 1, -2], np.float32),
    )
    new = initialize_rows(old, plan, 0)
    assert new[:4].tolist() == [[0, 2], [1.5, 3], [1, 4], [0.75, 1.5]]
    assert np.array_equal(new, initialize_rows(old, plan, 0))
    assert not np.array_equal(new[4], initialize_rows(old, plan, 1)[4])
    assert count_zero_rows(new) == 0
    padded = np.vstack([old, np.full((1, 2), 100, np.float32)])  # a row that no token uses
    params = {
        "model.embed_tokens.weight": padded,
        "lm_head.weight": -padded,
        "model.norm.weight": np.ones(2, np.float32),
    }
    made = initialize_embeddings(params, ("model.embed_tokens.weight", "lm_head.weight"), 4, plan, 0)
    assert np.array_equal(made["lm_head.weight"][:4], -new[:4])
    assert made["model.norm.weight"] is params["model.norm.weight"]


def test_random_rows_have_the_mean_and_deviation_of_the_old_rows() -> None:
    old = np.random.default_rng(8).normal([3, -1], [0.5, 2], (5000, 2)).astype(np.float32)
    plan = AlignmentPlan(
        np.full(5000, RANDOM, np.int8), np.zeros(5000, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    )
    new = initialize_rows(old, plan, 0)
    assert np.allclose(new.mean(axis=0), [3, -1], atol=0.15)
    assert np.allclose(new.std(axis=0), [0.5, 2], rtol=0.05)


def test_the_same_tokenizer_gives_the_same_rows(tmp_path: Path) -> None:
    """A real tokenizer, with byte tokens, control tokens, and letters that are both text and byte."""
    tokenizer = load_tokenizer(train_tokenizer(list(builtin.topics())[:4], tmp_path / "a", 400)[0])
    own = Vocabulary(tokenizer, np.zeros((400, 1), np.float32), np.zeros(400, np.int64))
    plan, report = align(own, own, **settings(method="pieces"))
    old = np.random.default_rng(6).standard_normal((400, 8)).astype(np.float32)
    assert np.array_equal(initialize_rows(old, plan, 0), old)
    assert report["coverage"] == 1.0
