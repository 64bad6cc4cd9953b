"""The fold over votes against its closed form, and the nearness of questions by hand."""

from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.knowledge.relevance import nearness, relevance, weight

UNIT = st.floats(0, 1)


@given(st.lists(st.tuples(st.sampled_from([1.0, -1.0]), UNIT), max_size=30), UNIT)
def test_the_fold_is_its_closed_form_and_bounded(votes: list[tuple[float, float]], alpha: float) -> None:
    """s = sum over i of alpha w_i r_i times the product over j > i of (1 - alpha w_j)."""
    rewards, w = np.array([r for r, _ in votes]), np.array([w for _, w in votes])
    later = np.array([np.prod(1 - alpha * w[i + 1 :]) for i in range(len(votes))])
    s = relevance(votes, alpha)
    assert s == pytest.approx(float(np.sum(alpha * w * rewards * later)), abs=1e-12)
    assert -1 <= s <= 1


def test_the_fold_by_hand() -> None:
    assert relevance([], 0.1) == 0
    assert relevance([(1, 1)], 0.1) == pytest.approx(0.1)
    assert relevance([(1, 1)] * 3, 0.1) == pytest.approx(1 - 0.9**3)
    assert relevance([(1, 1), (-1, 1)], 0.1) == pytest.approx(0.1 - 0.11)
    assert relevance([(1, 1), (-1, 0)], 0.1) == pytest.approx(0.1)
    assert relevance([(1, 1)] * 9, 0) == 0


def test_nearness_by_hand() -> None:
    asked = {"what": 0.5, "is": 0.5, "insulin": 3.0}
    assert nearness(asked, ["insulin", "what", "is"]) == 1
    assert nearness(asked, ["who", "came"]) == 0
    assert nearness(asked, ["what", "is", "love"]) == pytest.approx(1 / 4 * 2 / 3)
    assert nearness(asked, ["insulin"]) == pytest.approx(3 / 4)
    assert nearness({"what": 0.0, "is": 0.0}, ["what", "is"]) == 1
    assert nearness({"what": 0.0, "is": 0.0}, ["what", "was"]) == 0
    assert nearness({}, ["what"]) == nearness({}, []) == 0


@given(st.dictionaries(st.sampled_from("abcdef"), UNIT), st.lists(st.sampled_from("abcdef")))
def test_nearness_is_a_share(asked: dict[str, float], voted: list[str]) -> None:
    assert 0 <= nearness(asked, voted) <= 1 + 1e-12


def test_weights_fall_with_the_holders() -> None:
    assert weight(1, 10, 100) == pytest.approx(log(1 + 9.5 / 1.5))
    assert weight(0, 10, 100) > weight(1, 10, 100) > weight(10, 10, 100) > 0
    assert weight(101, 1000, 100) == 0
