"""Collectives of real ranks over loopback, and the detection of lost ranks."""

import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from anarchobot.training import heartbeat
from anarchobot.training.heartbeat import Heartbeat
from anarchobot.training.ranks import BUFFER_BYTES, SINGLE_PROCESS, _buffers, detect_launcher
from anarchobot.training.rendezvous import gather, join, listen
from tests.ranks import TIMEOUT, rank_environments

EXCHANGE = """
    import mlx.core as mx
    import numpy as np
    from anarchobot.training import ranks
    ranks.BUFFER_BYTES = 4000
    with ranks.init_distributed() as own:
        def arrays(rank):
            return {f"p{i}": np.random.default_rng([rank, i]).normal(size=shape).astype(np.float32)
                    for i, shape in enumerate([(3, 5), (40, 50), (7,), (600,), (500, 2), ()])}
        sums = own.all_reduce({name: mx.array(a) for name, a in arrays(own.rank).items()})
        for name, a in arrays(0).items():
            wanted = np.sum([arrays(rank)[name].astype(np.float64) for rank in range(own.size)], axis=0)
            assert sums[name].shape == a.shape
            np.testing.assert_allclose(np.array(sums[name]), wanted, rtol=1e-6, atol=1e-6)
        names = [list(arrays(0))[rank :: own.size] for rank in range(own.size)]
        made = {name: mx.array(arrays(own.rank)[name]) for name in names[own.rank]}
        gathered = own.all_gather(made, names, {name: a.shape for name, a in arrays(0).items()})
        assert set(gathered) == set(arrays(0))
        assert all(np.array_equal(np.array(gathered[n]), arrays(rank)[n]) for rank, ns in enumerate(names) for n in ns)
        tiny = [1 / 3 + own.rank, -0.0, float("inf"), 2.0**-1060]
        rows = own.all_gather_scalars(tiny)
        assert [row.tobytes() for row in rows] == [np.array([1 / 3 + r, *tiny[1:]]).tobytes() for r in range(own.size)]
        assert own.all_reduce_scalars([0.1 * own.rank, 1]).tolist() == [sum(0.1 * r for r in range(own.size)), own.size]
        assert own.any(own.rank == 1) and not own.any(False) and own.broadcast_scalar(own.rank + 5) == 5
        assert own.broadcast(bytes(range(256)) * 99 if own.rank == 0 else b"other") == bytes(range(256)) * 99
        try:
            own.all_reduce_scalars(None if own.rank == 1 else [1.0, 2.0])
            raise AssertionError
        except MemoryError:
            pass
        assert own.all_reduce_scalars([1.0]).tolist() == [own.size]  # all ranks are still in sync
"""


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(tmp_path: Path, size: int) -> None:
    code = textwrap.dedent(EXCHANGE)
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
        for env in rank_environments(tmp_path, size)
    ]
    try:
        stderr = [child.communicate(timeout=TIMEOUT)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * size, stderr


def test_single_process_collectives_are_identities() -> None:
    grads = {"a": object()}
    assert SINGLE_PROCESS.all_reduce(grads) is grads  # type: ignore[arg-type, comparison-overlap]
    assert SINGLE_PROCESS.all_reduce_scalars([1.5, 2.5]).tolist() == [1.5, 2.5]
    assert SINGLE_PROCESS.all_gather_scalars([3.0]).tolist() == [[3.0]]
    assert SINGLE_PROCESS.any(True) and not SINGLE_PROCESS.any(False)
    assert SINGLE_PROCESS.broadcast_scalar(0.1) == 0.1 and SINGLE_PROCESS.broadcast(b"x") == b"x"
    with pytest.raises(MemoryError):
        SINGLE_PROCESS.all_reduce_scalars(None)


def test_buffers_are_bounded_and_few() -> None:
    rng = np.random.default_rng(0)
    sizes = {f"p{i}": int(n) for i, n in enumerate(rng.integers(1, BUFFER_BYTES // 3, 100))} | {"huge": 2**30}
    found = list(_buffers(sizes))
    assert [name for names in found for name in names] == list(sizes)
    filled = [sum(sizes[name] for name in names) for names in found]
    assert all(size <= BUFFER_BYTES or names == ["huge"] for size, names in zip(filled, found, strict=True))
    assert len(found) <= 2 * sum(sizes.values()) // BUFFER_BYTES


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, None),
        ({"MLX_RANK": "0", "hosts": ""}, None),  # set by mlx.launch for one host
        ({"MLX_RANK": "0", "hosts": '[["10.0.0.1:5"]]'}, None),
        ({"MLX_RANK": "1", "hosts": '[["10.0.0.1:5"], ["10.0.0.2:6"]]'}, ("ring", "10.0.0.1")),
        ({"MLX_RANK": "1", "MLX_JACCL_COORDINATOR": "10.0.0.1:5", "MLX_IBV_DEVICES": "f"}, ("jaccl", "10.0.0.1")),
        ({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.1"}, ("nccl", "10.0.0.1")),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ("mpi", None)),
        ({"PMI_SIZE": "1"}, None),
    ],
)
def test_detect_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], wanted: object) -> None:
    if "hosts" in env:
        (tmp_path / "hosts.json").write_text(env["hosts"])
        env = {"MLX_RANK": env["MLX_RANK"], "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert detect_launcher() == wanted


def connected(size: int) -> list[Heartbeat]:
    """Returns the heartbeats of several ranks, all in this process."""
    heartbeats: dict[int, Heartbeat] = {}
    server = listen("127.0.0.1", 0)
    port = server.getsockname()[1]

    def start(rank: int) -> None:
        if rank == 0:
            heartbeats[0] = Heartbeat(0, gather(server, size, b"secret", [])[0])
        else:
            heartbeats[rank] = Heartbeat(rank, {0: join(rank, "127.0.0.1", port, b"secret", [])[0]})

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    return [heartbeats[rank] for rank in range(size)]


def test_ranks_that_finish_at_different_times_are_not_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "GRACE", 0.1)
    for order in ([2, 0, 1], [0, 1, 2]):
        heartbeats = connected(3)
        for rank in order:
            heartbeats[rank].close(success=True)
            assert not heartbeats[1]._reported.wait(0.4)
    assert capfd.readouterr().err == ""


def test_lost_rank_is_reported_by_all(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(heartbeat, "GRACE", 0.1)
    monkeypatch.setattr(heartbeat, "EXIT_AFTER", 250.0)  # it would end the test suite
    heartbeats = connected(3)
    heartbeats[2].close(success=False)
    for rank in (0, 1):
        with pytest.raises(SystemExit, match="1"):
            heartbeats[rank].exit_when_reported()
        heartbeats[rank].close(success=False)  # before EXIT_AFTER, so the process continues
    lines = sorted(capfd.readouterr().err.splitlines())
    assert [line[: len(line) - len(line.partition(";")[2]) - 1] for line in lines] == [
        f"anarchobot: rank 2 ended early: stopping rank {rank}" for rank in (0, 1)
    ]


def test_silent_rank_is_lost(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As when its machine sleeps or loses the network: the connection stays open."""
    monkeypatch.setattr(heartbeat, "GRACE", 0.1)
    monkeypatch.setattr(heartbeat, "TIMEOUT", 1.0)
    monkeypatch.setattr(heartbeat, "EXIT_AFTER", 250.0)  # it would end the test suite
    here, there = socket.socketpair()
    beat = Heartbeat(0, {7: here})
    with pytest.raises(SystemExit):
        beat.exit_when_reported()
    beat.close(success=False)
    there.close()
    assert "anarchobot: rank 7 has not responded for 1 s: stopping rank 0" in capfd.readouterr().err


def test_ranks_that_were_paused_together_are_not_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As when a virtual machine sleeps and its clock goes on: hours of silence count only while this rank runs."""
    monkeypatch.setattr(heartbeat, "GRACE", 0.1)
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.1)
    slept = [0.0]
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + slept[0]))
    here, there = socket.socketpair()
    beat = Heartbeat(0, {1: here})
    for _ in range(3):
        assert there.recv(1) == bytes([heartbeat.ALIVE])
        slept[0] += 3600.0
        assert not beat._reported.wait(0.3)
    there.sendall(bytes([heartbeat.DONE]))
    beat._thread.join(TIMEOUT)
    beat.close(success=True)
    there.close()
    assert capfd.readouterr().err == ""
