"""Log-likelihoods against an independent float64 transformer, and windows against lm-evaluation-harness."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.evaluation import loglikelihood
from anarchobot.evaluation.loglikelihood import loglikelihoods, rolling_windows
from anarchobot.inference.model import Model
from tests.inference.conftest import SHAPE
from tests.inference.conftest import model as model
from tests.model.llama.reference import logits

LONGEST = SHAPE.max_seq_len


def test_loglikelihoods_of_mixed_lengths(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different lengths in one batch, more positions than one pass of the head, truncated contexts."""
    monkeypatch.setattr(loglikelihood, "BATCH_TOKENS", 200)
    monkeypatch.setattr(loglikelihood, "HEAD_POSITIONS", 7)
    params = {name: np.array(p, np.float64) for name, p in model.params.items()}
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return [int(i) for i in rng.integers(0, SHAPE.vocab_size, n)]

    sizes = ((1, 1), (5, 3), (30, 18), (1, LONGEST), (40, 20), (200, 2), (9, 1), (2, 30))
    requests = [(ids(a), ids(b)) for a, b in sizes]
    expected = []
    for context, continuation in requests:
        row = np.array([*context, *continuation])[-(LONGEST + 1) :]
        z = logits(params, row[:-1], SHAPE)[-len(continuation) :]
        top = z.max(axis=1, keepdims=True)
        log_p = z - top - np.log(np.exp(z - top).sum(axis=1, keepdims=True))
        expected.append(float(log_p[np.arange(len(continuation)), continuation].sum()))
    # Only the argmax of the float64 model is greedy.
    best = int(np.argmax(logits(params, np.array(requests[1][0]), SHAPE)[-1]))
    requests += [(requests[1][0], [best]), (requests[1][0], [(best + 1) % SHAPE.vocab_size])]
    found = loglikelihoods(model, requests)
    np.testing.assert_allclose([one.log_prob for one in found[:-2]], expected, rtol=1e-5)
    assert [one.is_greedy for one in found[-2:]] == [True, False]
    # A continuation longer than the context is the sum of its windows; an empty one has probability 1.
    long = ids(LONGEST + 10)
    windows = [([7], long[:LONGEST]), (long[9:LONGEST], long[LONGEST:])]
    total = sum(one.log_prob for one in loglikelihoods(model, windows))
    several = loglikelihoods(model, [([3, 7], long), ([7], [])])
    assert several[0].log_prob == pytest.approx(total, rel=1e-5) and several[1] == (0, True)
    assert loglikelihoods(model, []) == []


@given(st.integers(0, 50), st.integers(1, 12))
def test_windows_score_each_token_once_with_maximal_context(n: int, longest: int) -> None:
    whole = [0, *range(1, n + 1)]
    scored: list[int] = []
    for context, continuation in rolling_windows(whole[1:], 0, longest):
        assert [*context, *continuation] == list(range(context[0], continuation[-1] + 1))
        assert len(context) + len(continuation) == min(longest, continuation[-1]) + 1
        scored += continuation
    assert scored == whole[1:]


def test_windows_match_the_harness() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for n in (1, 9, 10, 11, 20, 29, 57):
        ids = list(range(100, 100 + n))
        theirs = utils.get_rolling_token_windows(ids, prefix_token=0, max_seq_len=10, context_len=1)
        assert [(list(a), list(b)) for a, b in rolling_windows(ids, 0, 10)] == [
            utils.make_disjoint_window(w) for w in theirs
        ]
