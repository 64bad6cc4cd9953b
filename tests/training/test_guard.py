"""Spike detection: finds planted spikes and no others, and adapts to a lasting rise."""

import math

import numpy as np
import pytest

from anarchobot.config.schema import GuardConfig
from anarchobot.training.guard import Guard


def feed(guard: Guard, norms: list[float]) -> list[int]:
    """Returns the positions of spikes."""
    spikes = []
    for i, norm in enumerate(norms):
        if norm > guard.norm_limit:
            spikes.append(i)
        guard.observe(norm, finite=True, overflow=False)
    return spikes


@pytest.mark.parametrize("window", [128, 10])
def test_limit_is_mean_plus_six_standard_deviations(window: int) -> None:
    norms = np.random.default_rng(0).gamma(4.0, 0.25, 300).tolist()
    guard = Guard(GuardConfig(spike_window=window), [])
    for i, norm in enumerate(norms):
        last = np.array(norms[max(0, i - window) : i])
        expected = math.inf if i < window // 2 else last.mean() + 6 * last.std(ddof=1)
        assert guard.norm_limit == pytest.approx(expected, rel=1e-12)
        guard.observe(norm, finite=True, overflow=False)


def test_planted_spikes_are_detected_and_no_others() -> None:
    """20 of 20, and none in 10,000 normal steps, whose norms decrease and fluctuate like those of a run."""
    rng = np.random.default_rng(1)
    norms = (1 + 3 * np.exp(-np.arange(10_000) / 2000)) * np.exp(0.1 * rng.standard_normal(10_000))
    assert feed(Guard(GuardConfig(), []), norms.tolist()) == []
    planted = list(range(300, 10_000, 500))
    norms[planted] *= 20
    assert feed(Guard(GuardConfig(), []), norms.tolist()) == planted
    assert feed(Guard(GuardConfig(spike_sigma=None), []), norms.tolist()) == []


def test_lasting_rise_is_accepted_after_a_few_steps() -> None:
    """A fraction p of the window at the new level lifts mean + 6 deviations to it if p + 6 sqrt(p) >= 1: 4 of 128."""
    norms = [1.0 + 0.01 * (i % 7) for i in range(200)] + [50.0] * 100
    assert feed(Guard(GuardConfig(), []), norms) == [200, 201, 202, 203]


def test_rolls_back_after_consecutive_non_finite_steps_without_overflow() -> None:
    guard = Guard(GuardConfig(rollback_after=3), [])
    for finite, overflow in [(False, False), (False, False), (True, False), *[(False, True)] * 10, (False, False)]:
        guard.observe(math.nan if not finite else 1.0, finite=finite, overflow=overflow)
        assert not guard.should_roll_back
    guard.observe(math.nan, finite=False, overflow=False)
    assert not guard.should_roll_back
    guard.observe(math.nan, finite=False, overflow=False)
    assert guard.should_roll_back
    never = Guard(GuardConfig(rollback_after=None), [])
    for _ in range(50):
        never.observe(math.nan, finite=False, overflow=False)
    assert not never.should_roll_back
