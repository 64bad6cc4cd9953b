"""Spikes: found where they were planted, nowhere else, and never for good."""

import math

import numpy as np
import pytest

from anarchobot.config.schema import GuardConfig
from anarchobot.training.guard import Guard


def feed(guard: Guard, norms: list[float]) -> list[int]:
    """Where the norms were spikes."""
    spikes = []
    for i, norm in enumerate(norms):
        if norm > guard.limit:
            spikes.append(i)
        guard.saw(norm, finite=True, overflow=False)
    return spikes


@pytest.mark.parametrize("window", [128, 10])
def test_the_limit_is_mean_plus_six_deviations_of_the_last_steps(window: int) -> None:
    norms = np.random.default_rng(0).gamma(4.0, 0.25, 300).tolist()
    guard = Guard(GuardConfig(spike_window=window), [])
    for i, norm in enumerate(norms):
        last = np.array(norms[max(0, i - window) : i])
        expected = math.inf if i < window // 2 else last.mean() + 6 * last.std(ddof=1)
        assert guard.limit == pytest.approx(expected, rel=1e-12)
        guard.saw(norm, finite=True, overflow=False)


def test_planted_spikes_are_found_and_no_others() -> None:
    """20 of 20, and none in 10,000 ordinary steps, whose norms fall and are noisy as a run's are."""
    rng = np.random.default_rng(1)
    norms = (1 + 3 * np.exp(-np.arange(10_000) / 2000)) * np.exp(0.1 * rng.standard_normal(10_000))
    assert feed(Guard(GuardConfig(), []), norms.tolist()) == []
    planted = list(range(300, 10_000, 500))
    norms[planted] *= 20
    assert feed(Guard(GuardConfig(), []), norms.tolist()) == planted
    assert feed(Guard(GuardConfig(spike_sigma=None), []), norms.tolist()) == []


def test_norms_that_rose_for_good_are_taken_after_a_few_steps() -> None:
    """A share p of the window at the new height lifts mean + 6 deviations to it when p + 6 sqrt(p) >= 1: 4 of 128."""
    norms = [1.0 + 0.01 * (i % 7) for i in range(200)] + [50.0] * 100
    assert feed(Guard(GuardConfig(), []), norms) == [200, 201, 202, 203]


def test_only_steps_in_a_row_that_no_loss_scale_explains_make_it_give_up() -> None:
    guard = Guard(GuardConfig(rollback_after=3), [])
    for finite, overflow in [(False, False), (False, False), (True, False), *[(False, True)] * 10, (False, False)]:
        guard.saw(math.nan if not finite else 1.0, finite=finite, overflow=overflow)
        assert not guard.gives_up
    guard.saw(math.nan, finite=False, overflow=False)
    assert not guard.gives_up
    guard.saw(math.nan, finite=False, overflow=False)
    assert guard.gives_up
    never = Guard(GuardConfig(rollback_after=None), [])
    for _ in range(50):
        never.saw(math.nan, finite=False, overflow=False)
    assert not never.gives_up
