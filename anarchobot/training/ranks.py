"""Data-parallel training in several processes: each reads its part of every batch, and all apply the same update.

Gradients are summed in a few large buffers. Everything else that is exchanged is small and sent as bytes, so that all
ranks get identical bits. A single process exchanges nothing and imports nothing for it.
"""

import json
import math
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.training.heartbeat import Heartbeat
from anarchobot.training.rendezvous import JOIN_TIMEOUT, SECRET_ENV, Addresses, gather, join, listen, shared_secret
from anarchobot.training.signals import print_status

if TYPE_CHECKING:
    import mlx.core as mx

    from anarchobot.model.gradient_accumulator import Params
    from anarchobot.runs.progress import Progress
    from anarchobot.training.engine import Engine

BUFFER_BYTES = 2**24  # gradients per all-reduce: larger buffers leave the CPU caches and take twice as long
_MAX_SCALARS = 30  # per call of all_gather_scalars


class Ranks:
    """The process group: this process is `rank` of `size`. A context manager around the training: if another rank is
    lost before the end, this process ends as well (training/heartbeat.py)."""

    def __init__(self, group: Any = None, heartbeat: Heartbeat | None = None, backend: str = "") -> None:
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.backend = backend
        self._group, self._heartbeat = group, heartbeat

    def __enter__(self) -> Self:
        return self

    def __str__(self) -> str:
        """A suffix for the device in messages, such as `, 2 ranks (ring)`; empty for a single process."""
        return "" if self.size == 1 else f", {self.size} ranks ({self.backend})"

    def __exit__(self, kind: object, *exc: object) -> None:
        if self._heartbeat is not None:
            self._heartbeat.close(success=kind is None)

    def all_reduce(self, grads: "Params") -> "Params":
        """Sums float32 arrays with the same names over all ranks. Empties `grads` to save memory."""
        if self.size == 1:
            return grads
        import mlx.core as mx

        sums: Params = {}
        for names in _buffers({name: g.nbytes for name, g in sorted(grads.items())}):
            parts = [grads.pop(name) for name in names]
            flat = mx.concatenate([g.reshape(-1) for g in parts])
            mx.eval(flat)  # before sending: a GPU command that waits for the network would time out
            flat = self._exchange(mx.distributed.all_sum(flat, group=self._group))
            ends = np.cumsum([g.size for g in parts]).tolist()
            pieces = mx.split(flat, ends[:-1])
            sums |= {name: x.reshape(g.shape) for name, x, g in zip(names, pieces, parts, strict=True)}
        mx.eval(sums)
        return sums

    def all_gather(
        self, local: "Params", names: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]]
    ) -> "Params":
        """Gathers float32 arrays of different names from all ranks: rank r contributes `names[r]`."""
        import mlx.core as mx

        sizes = [[math.prod(shapes[name]) for name in rank_names] for rank_names in names]
        longest, chunk = max(map(sum, sizes)), BUFFER_BYTES // (4 * self.size)
        parts = [local[name].reshape(-1) for name in names[self.rank]]
        flat = mx.concatenate([*parts, mx.zeros(longest - sum(sizes[self.rank]))])  # all ranks send the same length
        mx.eval(flat)
        received = [
            self._exchange(mx.distributed.all_gather(flat[i : i + chunk], group=self._group)).reshape(self.size, -1)
            for i in range(0, longest, chunk)
        ]
        rows = mx.concatenate(received, axis=1)  # [size, longest]
        gathered: Params = {}
        for row, rank_names, lengths in zip(rows, names, sizes, strict=True):
            pieces = mx.split(row, np.cumsum(lengths).tolist())[:-1]
            gathered |= {name: x.reshape(shapes[name]) for name, x in zip(rank_names, pieces, strict=True)}
        mx.eval(gathered)
        return gathered

    def all_gather_rows(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Returns the rows [n, ...] of all ranks in the order of the ranks, [size * n, ...]; all have equally many."""
        if self.size == 1:
            return rows
        import mlx.core as mx

        return np.array(self._exchange(mx.distributed.all_gather(mx.array(rows), group=self._group)))

    def all_gather_scalars(self, values: Sequence[float] | npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
        """Returns the values of all ranks, [size, n]. If a rank passes None (out of memory), all raise MemoryError."""
        if self.size == 1:
            if values is None:
                raise MemoryError
            return np.array([values], np.float64)
        import mlx.core as mx

        count = -1 if values is None else len(values)
        assert count <= _MAX_SCALARS
        padding = [0.0] * (_MAX_SCALARS - max(0, count))
        row = np.array([count, *([] if values is None else values), *padding], np.float64)
        sent = mx.array(row.view(np.uint8))[None]
        received = np.array(self._exchange(mx.distributed.all_gather(sent, group=self._group)))
        rows: npt.NDArray[np.float64] = received.view(np.float64)
        if (rows[:, 0] < 0).any():
            raise MemoryError("on another rank" if count >= 0 else "on this rank")
        return rows[:, 1 : 1 + count]

    def all_reduce_scalars(self, values: Sequence[float] | npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
        """Sums the rows of `all_gather_scalars` in the order of the ranks."""
        rows = self.all_gather_scalars(values)
        sums: npt.NDArray[np.float64] = rows[0].copy()
        for row in rows[1:]:
            sums += row
        return sums

    def any(self, flag: bool) -> bool:
        """Returns whether `flag` is true on any rank."""
        return flag if self.size == 1 else bool(self.all_gather_scalars([flag]).any())

    def broadcast_scalar(self, value: float) -> float:
        """Returns rank 0's value, for results that machines may round differently."""
        return value if self.size == 1 else float(self.all_gather_scalars([value])[0, 0])

    def broadcast(self, data: bytes) -> bytes:
        """Returns rank 0's bytes; the `data` of other ranks is ignored."""
        if self.size == 1:
            return data
        import mlx.core as mx

        length = int(self.broadcast_scalar(len(data)))
        sent = np.frombuffer(data, np.uint8) if self.rank == 0 else np.zeros(length, np.uint8)
        parts = [
            np.array(self._exchange(mx.distributed.all_sum(mx.array(sent[i : i + BUFFER_BYTES]), group=self._group)))
            for i in range(0, length, BUFFER_BYTES)
        ]
        return b"".join(part.tobytes() for part in parts)

    def broadcast_state(self, engine: "Engine", progress: "Progress") -> None:
        """Copies rank 0's weights, optimizer state and progress to all ranks; only rank 0 needs a checkpoint."""
        if self.size == 1:
            return
        vars(progress).update(json.loads(self.broadcast(json.dumps(vars(progress)).encode())))
        state = engine.state()
        for name in sorted(state):
            array = np.asarray(state[name])
            data = self.broadcast(array.tobytes() if self.rank == 0 else b"")
            if self.rank > 0:
                state[name] = np.frombuffer(data, array.dtype).reshape(array.shape)
        if self.rank > 0:
            engine.load_state(state)

    def _exchange(self, array: "mx.array") -> "mx.array":
        """Evaluates a collective operation. If it fails, raises SystemExit once the lost rank is reported, else
        RuntimeError."""
        import mlx.core as mx

        try:
            mx.eval(array)
        except RuntimeError:
            if self._heartbeat is not None:
                self._heartbeat.exit_when_reported()
            raise
        return array


SINGLE_PROCESS = Ranks()


def detect_launcher() -> tuple[str, str | None] | None:
    """Returns the MLX backend for which mlx.launch or mpirun started this process as one of several ranks, and the
    address of rank 0 if known; None for a single process."""
    env = os.environ
    if "MLX_RANK" in env:
        if env.get("MLX_HOSTFILE"):
            hosts = _ring_hosts()
            return ("ring", hosts[0][0].rpartition(":")[0]) if len(hosts) > 1 else None
        if coordinator := env.get("MLX_JACCL_COORDINATOR"):
            return "jaccl", coordinator.rpartition(":")[0]
        if int(env.get("MLX_WORLD_SIZE", "1")) > 1:
            return "nccl", env.get("NCCL_HOST_IP")
    is_mpi = int(env.get("OMPI_COMM_WORLD_SIZE") or env.get("PMI_SIZE") or 1) > 1
    return ("mpi", None) if is_mpi else None  # mpirun itself ends the other ranks and names the one that died


def _ring_hosts() -> list[Addresses]:
    """The addresses of each rank, `IP:PORT`; none for a single host."""
    text = Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8").strip()
    hosts: list[Addresses] = json.loads(text) if text else []
    return hosts


def init_distributed() -> Ranks:
    """Joins the process group; waits for all ranks. Raises UserError if that fails."""
    launcher = detect_launcher()
    if launcher is None:
        return SINGLE_PROCESS
    backend, host = launcher
    if backend == "ring":
        with _joined_ring() as heartbeat:
            return Ranks(_init_group(backend), heartbeat, backend)
    ranks = Ranks(_init_group(backend), backend=backend)
    if host is not None and ranks.size > 1:
        ranks._heartbeat = _join_by_broadcast(ranks, host)
    return ranks


def _init_group(backend: str) -> Any:
    import mlx.core as mx

    try:
        return mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise UserError(f"{backend} backend: can't join the process group: {' '.join(str(error).split())}") from error


@contextmanager
def _joined_ring() -> Iterator[Heartbeat]:
    """A context manager in which MLX's ring is formed, on ports that nobody knew before.

    MLX's ring takes the first connection to a port for its neighbor's, whoever it is from. So only rank 0 listens on
    its port in MLX_HOSTFILE, until all ranks have joined; then each listens on a new port for a few milliseconds.
    """
    rank, hosts = int(os.environ["MLX_RANK"]), _ring_hosts()
    host, _, port = hosts[0][0].rpartition(":")
    secret, own = shared_secret(), _with_free_ports(hosts[rank])
    if rank == 0:
        if not secret:
            print_status(f"{SECRET_ENV} is not set: anyone who can reach {host} can join this run (docs/scaling.md)")
        peers, hosts = gather(listen(host, int(port)), len(hosts), secret, own)
    else:
        connection, hosts = join(rank, host, int(port), secret, own)
        peers = {0: connection}
    timer = threading.Timer(JOIN_TIMEOUT, _give_up)
    timer.daemon = True
    given = os.environ["MLX_HOSTFILE"]
    with tempfile.NamedTemporaryFile("w", prefix="anarchobot-ring-", suffix=".json") as file:
        json.dump(hosts, file)
        file.flush()
        timer.start()
        os.environ["MLX_HOSTFILE"] = file.name
        try:
            yield Heartbeat(rank, peers)
        finally:
            os.environ["MLX_HOSTFILE"] = given
            timer.cancel()


def _give_up() -> None:
    print_status(f"the ring was not formed within {JOIN_TIMEOUT:.0f} s: another program may use its ports: try again")
    os._exit(1)


def _with_free_ports(addresses: Addresses) -> Addresses:
    """Replaces the ports of a machine's addresses with free ones."""
    with ExitStack() as stack:
        hosts = [address.rpartition(":")[0] for address in addresses]
        servers = [stack.enter_context(listen(host, 0)) for host in hosts]
        return [f"{host}:{server.getsockname()[1]}" for host, server in zip(hosts, servers, strict=True)]


def _join_by_broadcast(ranks: Ranks, host: str) -> Heartbeat:
    """For groups that are formed otherwise: rank 0 sends its port through the group and, if none is set, a secret."""
    if ranks.rank == 0:
        server = listen(host, 0)
        ranks.broadcast(json.dumps([server.getsockname()[1], secret := secrets.token_hex(32)]).encode())
        return Heartbeat(0, gather(server, ranks.size, shared_secret() or secret.encode(), [])[0])
    port, secret = json.loads(ranks.broadcast(b""))
    return Heartbeat(ranks.rank, {0: join(ranks.rank, host, port, shared_secret() or secret.encode(), [])[0]})


def _buffers(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Groups names so that their arrays fill at most BUFFER_BYTES; a larger array gets a group of its own."""
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
