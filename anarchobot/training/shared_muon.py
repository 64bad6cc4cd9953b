"""Muon's directions computed by several ranks: each orthogonalizes some of the matrices and sends them to the others.

Orthogonalization is most of an update. n ranks save (n - 1) / n of it, and send each matrix once, half as much as the
all-reduce of its gradient.
"""

import math
import time
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from anarchobot.optim.param_groups import balanced_shares
from anarchobot.training.ranks import Ranks

if TYPE_CHECKING:
    from anarchobot.model.gradient_accumulator import Params

TIMED_UPDATES = 3  # the fastest counts: the first compiles, and any may be delayed
T = TypeVar("T")


class SharedMuon:
    """Decides whether sharing is faster, and does it."""

    def __init__(
        self, ranks: Ranks, params: "Params", by_muon: Container[str], workers: int, share: bool | None
    ) -> None:
        """`by_muon`: the names of Muon's matrices; `share`: train.share_muon."""
        self._ranks = ranks
        self._shapes = {name: p.shape for name, p in params.items() if name in by_muon}
        self._sent_fraction = sum(map(math.prod, self._shapes.values())) / sum(p.size for p in params.values())
        self.on = share if ranks.size > 1 and self._shapes else False  # None: not decided yet
        self._names = balanced_shares(self._shapes, self._shapes, ranks.size)  # by rank, the same on all ranks
        own = {name: self._shapes[name] for name in self._names[ranks.rank]}
        self._own = balanced_shares(own, own, workers)  # by worker; ranks may differ in their number of workers
        self._seconds: dict[str, list[float]] = {"exchange": [], "update": []}

    def timed(self, what: Literal["exchange", "update"], do: Callable[[], T]) -> T:
        """Calls `do`, and times it until the decision is made."""
        if self.on is not None:
            return do()
        began = time.perf_counter()
        done = do()
        self._seconds[what].append(time.perf_counter() - began)
        return done

    def directions(self, make: "Callable[[Sequence[Sequence[str]]], Params]") -> "Params":
        """The directions of all matrices; `make` computes this rank's, by the names of each worker. Empty if every rank
        computes all by itself."""
        if self.on is None and len(self._seconds["update"]) == TIMED_UPDATES:
            self.on = self._ranks.broadcast_scalar(self._is_faster()) > 0
        if not self.on:
            return {}
        return self._ranks.all_gather(make(self._own), self._names, self._shapes)

    def _is_faster(self) -> bool:
        """Measured on rank 0."""
        saved = (1 - 1 / self._ranks.size) * min(self._seconds["update"])
        return saved > self._sent_fraction / 2 * min(self._seconds["exchange"])
