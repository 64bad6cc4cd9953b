"""Several processes that train one model: each reads its own part of every step's sequences, all make the same update.

Gradients are summed in a few large buffers. All else that is exchanged is small and goes as bytes, so that every rank
has it bit for bit. One process alone exchanges nothing, and loads nothing for it.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.training.heartbeat import Heartbeat, connect

if TYPE_CHECKING:
    import mlx.core as mx

    from anarchobot.model.gradient_accumulator import Params
    from anarchobot.runs.progress import Progress
    from anarchobot.training.engine import Engine

BUFFER_BYTES = 2**24  # a buffer of gradients: larger ones leave a processor's caches and take twice as long
_NUMBERS = 30  # the most that `gather` takes


class Ranks:
    """This process, `rank` of `size`. A context around the training: when another rank is lost before its end, this
    process ends too (training/heartbeat.py)."""

    def __init__(self, group: Any = None, watch: Heartbeat | None = None, name: str = "") -> None:
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.name = name  # of the backend
        self._group, self._watch = group, watch

    def __enter__(self) -> Self:
        return self

    def __str__(self) -> str:
        """What is said of it behind the device."""
        return "" if self.size == 1 else f", {self.size} ranks ({self.name})"

    def __exit__(self, kind: object, *exc: object) -> None:
        if self._watch is not None:
            self._watch.close(well=kind is None)

    def all_reduce(self, grads: "Params") -> "Params":
        """The sums over all ranks of float32 arrays, which all ranks have under the same names; uses `grads` up."""
        if self.size == 1:
            return grads
        import mlx.core as mx

        whole: Params = {}
        for names in _buffers({name: g.nbytes for name, g in sorted(grads.items())}):
            parts = [grads.pop(name) for name in names]
            flat = mx.concatenate([g.reshape(-1) for g in parts])
            mx.eval(flat)  # before it is sent: a GPU that waits for the network is taken for dead
            flat = self._exchanged(mx.distributed.all_sum(flat, group=self._group))
            ends = np.cumsum([g.size for g in parts]).tolist()
            pieces = mx.split(flat, ends[:-1])
            whole |= {name: x.reshape(g.shape) for name, x, g in zip(names, pieces, parts, strict=True)}
        mx.eval(whole)
        return whole

    def all_gather(self, own: "Params", names: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> "Params":
        """Float32 arrays of which every rank has made its own: those of all. `names[r]` are rank r's, of these
        `shapes`."""
        import mlx.core as mx

        sizes = [[math.prod(shapes[name]) for name in of_rank] for of_rank in names]
        longest, most = max(map(sum, sizes)), BUFFER_BYTES // (4 * self.size)
        mine = [own[name].reshape(-1) for name in names[self.rank]]
        flat = mx.concatenate([*mine, mx.zeros(longest - sum(sizes[self.rank]))])  # all ranks send as much
        mx.eval(flat)
        received = [
            self._exchanged(mx.distributed.all_gather(flat[i : i + most], group=self._group)).reshape(self.size, -1)
            for i in range(0, longest, most)
        ]
        rows = mx.concatenate(received, axis=1)  # [size, longest]
        whole: Params = {}
        for row, of_rank, lengths in zip(rows, names, sizes, strict=True):
            pieces = mx.split(row, np.cumsum(lengths).tolist())[:-1]
            whole |= {name: x.reshape(shapes[name]) for name, x in zip(of_rank, pieces, strict=True)}
        mx.eval(whole)
        return whole

    def all_gather_scalars(self, numbers: Sequence[float] | npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
        """What each rank gives, [size, n], on all alike. A rank that ran out of memory gives None, and all of them
        raise MemoryError."""
        if self.size == 1:
            if numbers is None:
                raise MemoryError
            return np.array([numbers], np.float64)
        import mlx.core as mx

        count = -1 if numbers is None else len(numbers)
        assert count <= _NUMBERS
        row = np.array([count, *([] if numbers is None else numbers), *[0.0] * (_NUMBERS - max(0, count))], np.float64)
        sent = mx.array(row.view(np.uint8))[None]
        received = np.array(self._exchanged(mx.distributed.all_gather(sent, group=self._group)))
        rows: npt.NDArray[np.float64] = received.view(np.float64)
        if (rows[:, 0] < 0).any():
            raise MemoryError("on another rank" if count >= 0 else "on this rank")
        return rows[:, 1 : 1 + count]

    def all_reduce_scalars(self, numbers: Sequence[float] | npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
        """The sums of what `gather` gives, added in the order of the ranks."""
        rows = self.all_gather_scalars(numbers)
        whole: npt.NDArray[np.float64] = rows[0].copy()
        for row in rows[1:]:
            whole += row
        return whole

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag if self.size == 1 else bool(self.all_gather_scalars([flag]).any())

    def broadcast_scalar(self, number: float) -> float:
        """Rank 0's: for what must be the same on machines that round differently."""
        return number if self.size == 1 else float(self.all_gather_scalars([number])[0, 0])

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes; what others give is not looked at."""
        if self.size == 1:
            return data
        import mlx.core as mx

        length = int(self.broadcast_scalar(len(data)))
        own = np.frombuffer(data, np.uint8) if self.rank == 0 else np.zeros(length, np.uint8)
        parts = [
            np.array(self._exchanged(mx.distributed.all_sum(mx.array(own[i : i + BUFFER_BYTES]), group=self._group)))
            for i in range(0, length, BUFFER_BYTES)
        ]
        return b"".join(part.tobytes() for part in parts)

    def broadcast_state(self, engine: "Engine", progress: "Progress") -> None:
        """Brings every rank to where rank 0 stands: weights, optimizer, progress. Only rank 0 needs a checkpoint."""
        if self.size == 1:
            return
        vars(progress).update(json.loads(self.broadcast(json.dumps(vars(progress)).encode())))
        state = engine.state()
        for name in sorted(state):
            array = np.asarray(state[name])
            shared = self.broadcast(array.tobytes() if self.rank == 0 else b"")
            if self.rank > 0:
                state[name] = np.frombuffer(shared, array.dtype).reshape(array.shape)
        if self.rank > 0:
            engine.load_state(state)

    def _exchanged(self, array: "mx.array") -> "mx.array":
        """Raises SystemExit, once it is said which rank was lost, and RuntimeError when that can't be found out."""
        import mlx.core as mx

        try:
            mx.eval(array)
        except RuntimeError:
            if self._watch is not None:
                self._watch.explain()
            raise
        return array


ALONE = Ranks()


def detect_launcher() -> tuple[str, str | None] | None:
    """The backend by which this process was started as one of several (by mlx.launch or mpirun), and the address of
    rank 0 where that is known; None: it is alone."""
    env = os.environ
    if "MLX_RANK" in env:
        if hostfile := env.get("MLX_HOSTFILE"):
            text = Path(hostfile).read_text(encoding="utf-8").strip()  # empty for one host
            hosts = json.loads(text) if text else []
            return ("ring", hosts[0][0].rpartition(":")[0]) if len(hosts) > 1 else None
        if coordinator := env.get("MLX_JACCL_COORDINATOR"):
            return "jaccl", coordinator.rpartition(":")[0]
        if int(env.get("MLX_WORLD_SIZE", "1")) > 1:
            return "nccl", env.get("NCCL_HOST_IP")
    several = int(env.get("OMPI_COMM_WORLD_SIZE") or env.get("PMI_SIZE") or 1) > 1
    return ("mpi", None) if several else None  # mpirun itself ends the others when one dies, and says which


def join_ranks() -> Ranks:
    """Waits for all ranks and returns this one. Raises UserError when they can't be joined."""
    started = detect_launcher()
    if started is None:
        return ALONE
    import mlx.core as mx

    backend, host = started
    try:
        group = mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise UserError(f"the {backend} backend can't join the ranks: {' '.join(str(error).split())}") from error
    ranks = Ranks(group, name=backend)
    if host is not None and ranks.size > 1:
        ranks._watch = connect(ranks.rank, ranks.size, host, ranks.broadcast)
    return ranks


def _buffers(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names whose arrays go into one buffer: as many as fit into BUFFER_BYTES, or one that is larger."""
    names: list[str] = []
    room = BUFFER_BYTES
    for name, size in sizes.items():
        if names and size > room:
            yield names
            names, room = [], BUFFER_BYTES
        names.append(name)
        room -= size
    if names:
        yield names
