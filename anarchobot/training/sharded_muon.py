"""Distributed Muon: each rank orthogonalizes some of the matrices and sends the results to the others.

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


class ShardedMuon:
    """Shards Muon's orthogonalization over the ranks if that is faster."""

    def __init__(
        self, ranks: Ranks, params: "Params", muon_names: Container[str], workers: int, enabled: bool | None
    ) -> None:
        """`muon_names`: the parameters that Muon updates; `enabled`: train.share_muon."""
        self._ranks = ranks
        self._shapes = {name: p.shape for name, p in params.items() if name in muon_names}
        self._sent_fraction = sum(map(math.prod, self._shapes.values())) / sum(p.size for p in params.values())
        self.enabled = enabled if ranks.size > 1 and self._shapes else False  # None: not decided yet
        self._names = balanced_shares(self._shapes, self._shapes, ranks.size)  # by rank, the same on all ranks
        local = {name: self._shapes[name] for name in self._names[ranks.rank]}
        self._local_names = balanced_shares(local, local, workers)  # by worker; their number may differ by rank
        self._seconds: dict[str, list[float]] = {"exchange": [], "update": []}

    def timed(self, part: Literal["exchange", "update"], fn: Callable[[], T]) -> T:
        """Calls `fn`; measures its time until the decision is made."""
        if self.enabled is not None:
            return fn()
        began = time.perf_counter()
        result = fn()
        self._seconds[part].append(time.perf_counter() - began)
        return result

    def directions(self, compute: "Callable[[Sequence[Sequence[str]]], Params]") -> "Params":
        """Returns the directions of all matrices, or an empty dict if sharding is disabled. `compute` returns this
        rank's directions, given the names for each worker."""
        if self.enabled is None and len(self._seconds["update"]) == TIMED_UPDATES:
            self.enabled = self._ranks.broadcast_scalar(self._is_faster()) > 0
        if not self.enabled:
            return {}
        return self._ranks.all_gather(compute(self._local_names), self._names, self._shapes)

    def _is_faster(self) -> bool:
        """Measured on rank 0."""
        saved = (1 - 1 / self._ranks.size) * min(self._seconds["update"])
        return saved > self._sent_fraction / 2 * min(self._seconds["exchange"])
