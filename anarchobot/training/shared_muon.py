"""Muon's directions made by several ranks, each those of its part of the matrices, and sent to the others.

To orthogonalize is most of an update. n ranks save (n - 1) / n of it, and send the matrices once, where gradients go to
and fro.
"""

import math
import time
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from anarchobot.optim.param_groups import update_shares
from anarchobot.training.ranks import Ranks

if TYPE_CHECKING:
    from anarchobot.model.gradient_accumulator import Params

LOOKED_AT = 3  # updates, of which the fastest is taken: the first compiles, and any may wait for the machine
T = TypeVar("T")


class SharedMuon:
    """Decides whether to, and does it."""

    def __init__(
        self, ranks: Ranks, params: "Params", by_muon: Container[str], workers: int, wanted: bool | None
    ) -> None:
        """`by_muon`: the names of Muon's matrices; `wanted`: train.share_muon."""
        self._ranks = ranks
        self._shapes = {name: p.shape for name, p in params.items() if name in by_muon}
        self._sent = sum(map(math.prod, self._shapes.values())) / sum(p.size for p in params.values())
        self.on = wanted if ranks.size > 1 and self._shapes else False  # None: not known yet
        self._names = update_shares(self._shapes, self._shapes, ranks.size)  # of each rank: known to all alike
        own = {name: self._shapes[name] for name in self._names[ranks.rank]}
        self._own = update_shares(own, own, workers)  # of each of its workers, of which every rank has its own number
        self._seconds: dict[str, list[float]] = {"exchange": [], "update": []}

    def timed(self, what: Literal["exchange", "update"], do: Callable[[], T]) -> T:
        """Does it, and keeps in mind how long it took as long as that is of use."""
        if self.on is not None:
            return do()
        began = time.perf_counter()
        done = do()
        self._seconds[what].append(time.perf_counter() - began)
        return done

    def directions(self, make: "Callable[[Sequence[Sequence[str]]], Params]") -> "Params":
        """All ranks' directions, of which `make` makes those of the names of each worker; nothing where every rank
        makes its own."""
        if self.on is None and len(self._seconds["update"]) == LOOKED_AT:
            self.on = self._ranks.broadcast_scalar(self._is_faster()) > 0
        if not self.on:
            return {}
        return self._ranks.all_gather(make(self._own), self._names, self._shapes)

    def _is_faster(self) -> bool:
        """By rank 0's clock."""
        saved = (1 - 1 / self._ranks.size) * min(self._seconds["update"])
        return saved > self._sent / 2 * min(self._seconds["exchange"])
