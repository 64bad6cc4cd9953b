"""Which rank computes which Muon directions, and when sharing them pays off."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.training import sharded_muon
from anarchobot.training.sharded_muon import TIMED_UPDATES, ShardedMuon

PARAMS = {f"layers.{i}.w": mx.zeros((4 + i, 8)) for i in range(7)} | {"embed": mx.zeros((90, 8))}
BY_MUON = [name for name in PARAMS if name != "embed"]


class FakeRank:
    """A rank that receives what it sends, and records it."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def broadcast_scalar(self, number: float) -> float:
        return number

    def all_gather(self, own: dict[str, Any], names: Any, shapes: Any) -> dict[str, Any]:
        self.own, self.names, self.shapes = own, names, shapes
        return own


def directions(shared: ShardedMuon) -> dict[str, Any]:
    return shared.directions(lambda parts: {name: mx.ones(1) for part in parts for name in part})


def test_each_direction_is_computed_by_one_rank() -> None:
    ranks = [FakeRank(rank) for rank in range(2)]
    workers = (1, 3)  # per rank; they must not affect the assignment
    parts = [set(directions(ShardedMuon(r, PARAMS, BY_MUON, n, True))) for r, n in zip(ranks, workers, strict=True)]  # type: ignore[arg-type]
    assert parts[0] | parts[1] == set(BY_MUON) and not parts[0] & parts[1] and all(parts)
    assert ranks[0].names == ranks[1].names and [set(names) for names in ranks[0].names] == parts
    assert directions(ShardedMuon(FakeRank(0), PARAMS, BY_MUON, 2, False)) == {}  # type: ignore[arg-type]
    assert directions(ShardedMuon(FakeRank(0), PARAMS, [], 2, True)) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(("exchange", "shares"), [(1.0, True), (2.4, True), (2.7, False), (50.0, False)])
def test_sharing_is_enabled_when_it_saves_time(exchange: float, shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon has 392 of 1,112 numbers, which take 0.176 of an exchange. Half of an update of 0.9 s is 0.45 s, so an
    exchange of 2.55 s breaks even. Outliers, which waited for something, are ignored."""
    assert sum(np.prod(PARAMS[name].shape) for name in BY_MUON) == 392 and PARAMS["embed"].size == 720
    clock = [0.0]
    monkeypatch.setattr(sharded_muon, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def advance(seconds: float) -> None:
        clock[0] += seconds

    shared = ShardedMuon(FakeRank(0), PARAMS, BY_MUON, 1, None)  # type: ignore[arg-type]
    for step in range(TIMED_UPDATES):
        assert directions(shared) == {} and shared.enabled is None
        shared.timed("exchange", lambda step=step: advance(exchange + step))  # type: ignore[misc]
        shared.timed("update", lambda step=step: advance(9.0 if step == 0 else 0.9))  # type: ignore[misc]
    assert bool(directions(shared)) is shares and shared.enabled is shares
