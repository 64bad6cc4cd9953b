"""Schedules against hand-computed values."""

import pytest

from anarchobot.config.schema import TrainConfig
from anarchobot.optim.schedule import describe_length, learning_rate, muon_momentum, split_micro_batch, total_steps


def config(**changes: object) -> TrainConfig:
    return TrainConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "points"),
    [
        ({"schedule": "cosine"}, {1: 0.1, 5: 0.5, 10: 1.0, 60: 0.55, 35: 0.1 + 0.9 * 0.853553, 110: 0.1}),
        ({"schedule": "linear"}, {1: 0.1, 10: 1.0, 60: 0.55, 35: 0.775, 110: 0.1}),
        ({"schedule": "constant"}, {1: 0.1, 10: 1.0, 60: 1.0, 110: 1.0}),
        ({"schedule": "wsd", "decay_fraction": 0.4}, {1: 0.1, 10: 1.0, 66: 1.0, 88: 0.55, 110: 0.1}),
        ({"schedule": "linear", "lr_decay_steps": 60}, {10: 1.0, 35: 0.55, 60: 0.1, 61: 0.1, 110: 0.1}),
        ({"schedule": "cosine", "lr_decay_steps": 200}, {105: 0.55, 110: 0.51284}),
        ({"schedule": "linear", "warmup_steps": 0}, {1: 1 - 0.9 / 110, 55: 0.55, 110: 0.1}),
        ({"schedule": "wsd", "decay_fraction": 1.0}, {10: 1.0, 60: 0.55, 110: 0.1}),
        ({"schedule": "wsd", "lr_decay_steps": 10}, {9: 0.9, 10: 0.1, 11: 0.1, 110: 0.1}),
    ],
    ids=str,
)
def test_learning_rate(changes: dict[str, object], points: dict[int, float]) -> None:
    train = config(**changes)
    assert {s: learning_rate(s, train, 110) for s in points} == pytest.approx(points, rel=1e-4)


@pytest.mark.parametrize("steps", [50, 110, 1000])
@pytest.mark.parametrize(("end", "fraction"), [(80, 0.25), (80, 1.0), (12, 0.5), (200, 0.1)])
def test_wsd_decays_over_the_last_part_of_lr_decay_steps(end: int, fraction: float, steps: int) -> None:
    """The length of the run has no influence. From the end of the warmup, 10: 1 up to `corner`, a line to 0.1 at
    `end`, then 0.1."""
    train = config(schedule="wsd", lr_decay_steps=end, decay_fraction=fraction)
    corner = max(10, end - round(fraction * end))
    expected = {
        1: 0.1, 9: 0.9, 10: 1.0, corner: 1.0, corner + 1: 1 - 0.9 / (end - corner),
        end - 1: 0.1 + 0.9 / (end - corner), end: 0.1, end + 1: 0.1, end + 500: 0.1,
    }  # fmt: skip
    assert {s: learning_rate(s, train, steps) for s in expected} == pytest.approx(expected, rel=1e-12)


def test_momentum_warmup() -> None:
    train = config(momentum=0.95)
    assert [muon_momentum(s, train) for s in (0, 150, 300, 5000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert muon_momentum(1, config(momentum=0.5)) == 0.5


def test_run_length_in_steps_epochs_or_tokens() -> None:
    """100 windows of 64 tokens, 3 x 4 sequences per step: 25 / 3 steps per epoch, 768 tokens per step."""
    batch = {"micro_batch_size": 3, "grad_accum_steps": 4}
    assert total_steps(config(total_steps=7, **batch), 64, 100) == 7
    assert total_steps(config(epochs=1.0, **batch), 64, 100) == 9
    assert total_steps(config(epochs=2.5, **batch), 64, 100) == 21
    assert total_steps(config(token_budget=768, **batch), 64, 100) == 1
    assert total_steps(config(token_budget=769, **batch), 64, 100) == 2


def test_split_micro_batch_keeps_the_batch() -> None:
    assert [split_micro_batch(rows, 2) for rows in (2, 3, 8, 9)] == [(1, 4), (1, 6), (4, 4), (3, 6)]


def test_describe_length() -> None:
    train = config(micro_batch_size=3, grad_accum_steps=4)
    assert describe_length(train, 1000, 48_000, "pairs", ranks=2) == "1,000 steps of 24 pairs = 0.50 epochs"
    assert describe_length(train, 1, 24, "pairs", ranks=2) == "1 step of 24 pairs = 1.00 epochs"
