"""Which rank makes which of Muon's directions, and when that is worth it."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.training import shared_muon
from anarchobot.training.shared_muon import TIMED_UPDATES, SharedMuon

PARAMS = {f"layers.{i}.w": mx.zeros((4 + i, 8)) for i in range(7)} | {"embed": mx.zeros((90, 8))}
BY_MUON = [name for name in PARAMS if name != "embed"]


class Pretended:
    """A rank that gets back what it sends, and keeps what it was to send for whom."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def broadcast_scalar(self, number: float) -> float:
        return number

    def all_gather(self, own: dict[str, Any], names: Any, shapes: Any) -> dict[str, Any]:
        self.own, self.names, self.shapes = own, names, shapes
        return own


def made(shared: SharedMuon) -> dict[str, Any]:
    return shared.directions(lambda parts: {name: mx.ones(1) for part in parts for name in part})


def test_each_matrix_is_made_by_one_rank() -> None:
    ranks = [Pretended(rank) for rank in range(2)]
    workers = (1, 3)  # of either rank: what a rank makes does not depend on them
    parts = [set(made(SharedMuon(r, PARAMS, BY_MUON, n, True))) for r, n in zip(ranks, workers, strict=True)]  # type: ignore[arg-type]
    assert parts[0] | parts[1] == set(BY_MUON) and not parts[0] & parts[1] and all(parts)
    assert ranks[0].names == ranks[1].names and [set(names) for names in ranks[0].names] == parts
    assert made(SharedMuon(Pretended(0), PARAMS, BY_MUON, 2, False)) == {}  # type: ignore[arg-type]
    assert made(SharedMuon(Pretended(0), PARAMS, [], 2, True)) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(("exchange", "shares"), [(1.0, True), (2.4, True), (2.7, False), (50.0, False)])
def test_it_is_done_when_it_saves_more_than_it_sends(
    exchange: float, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """392 numbers of 1,112 are Muon's: they take 0.176 of an exchange. Half of an update of 0.9 s is 0.45 s: even at
    2.55 s. Slower ones, which waited for something, are not looked at."""
    assert sum(np.prod(PARAMS[name].shape) for name in BY_MUON) == 392 and PARAMS["embed"].size == 720
    clock = [0.0]
    monkeypatch.setattr(shared_muon.time, "perf_counter", lambda: clock[0])

    def lasting(seconds: float) -> None:
        clock[0] += seconds

    shared = SharedMuon(Pretended(0), PARAMS, BY_MUON, 1, None)  # type: ignore[arg-type]
    for step in range(TIMED_UPDATES):
        assert made(shared) == {} and shared.on is None
        shared.timed("exchange", lambda step=step: lasting(exchange + step))  # type: ignore[misc]
        shared.timed("update", lambda step=step: lasting(9.0 if step == 0 else 0.9))  # type: ignore[misc]
    assert bool(made(shared)) is shares and shared.on is shares
