"""What ranks exchange: real ones over loopback, and how each learns that another one is lost."""

import json
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from anarchobot.training import heartbeat
from anarchobot.training.heartbeat import Heartbeat, connect
from anarchobot.training.ranks import ALONE, BUFFER_BYTES, _buffers, detect_launcher
from tests.ranks import TIMEOUT, environments

EXCHANGE = """
    import mlx.core as mx
    import numpy as np
    from anarchobot.training import ranks
    ranks.BUFFER_BYTES = 4000
    with ranks.join_ranks() as own:
        def of(rank):
            return {f"p{i}": np.random.default_rng([rank, i]).normal(size=shape).astype(np.float32)
                    for i, shape in enumerate([(3, 5), (40, 50), (7,), (600,), (500, 2), ()])}
        whole = own.all_reduce({name: mx.array(a) for name, a in of(own.rank).items()})
        for name, a in of(0).items():
            wanted = np.sum([of(rank)[name].astype(np.float64) for rank in range(own.size)], axis=0)
            assert whole[name].shape == a.shape
            np.testing.assert_allclose(np.array(whole[name]), wanted, rtol=1e-6, atol=1e-6)
        names = [list(of(0))[rank :: own.size] for rank in range(own.size)]
        made = {name: mx.array(of(own.rank)[name]) for name in names[own.rank]}
        each = own.all_gather(made, names, {name: a.shape for name, a in of(0).items()})
        assert set(each) == set(of(0))
        assert all(np.array_equal(np.array(each[n]), of(rank)[n]) for rank, ns in enumerate(names) for n in ns)
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
        assert own.all_reduce_scalars([1.0]).tolist() == [own.size]  # all are still in step
"""


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_exchanged_is_the_same_on_all(tmp_path: Path, size: int) -> None:
    code = textwrap.dedent(EXCHANGE)
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
        for env in environments(tmp_path, size)
    ]
    try:
        told = [child.communicate(timeout=TIMEOUT)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * size, told


def test_one_alone_gives_back_what_it_was_given() -> None:
    grads = {"a": object()}
    assert ALONE.all_reduce(grads) is grads  # type: ignore[arg-type, comparison-overlap]
    assert ALONE.all_reduce_scalars([1.5, 2.5]).tolist() == [1.5, 2.5] and ALONE.all_gather_scalars([3.0]).tolist() == [[3.0]]
    assert ALONE.any(True) and not ALONE.any(False) and ALONE.broadcast_scalar(0.1) == 0.1 and ALONE.broadcast(b"x") == b"x"
    with pytest.raises(MemoryError):
        ALONE.all_reduce_scalars(None)


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
        ({"MLX_RANK": "0", "hosts": ""}, None),  # what mlx.launch gives for one host
        ({"MLX_RANK": "0", "hosts": '[["10.0.0.1:5"]]'}, None),
        ({"MLX_RANK": "1", "hosts": '[["10.0.0.1:5"], ["10.0.0.2:6"]]'}, ("ring", "10.0.0.1")),
        ({"MLX_RANK": "1", "MLX_JACCL_COORDINATOR": "10.0.0.1:5", "MLX_IBV_DEVICES": "f"}, ("jaccl", "10.0.0.1")),
        ({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.1"}, ("nccl", "10.0.0.1")),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ("mpi", None)),
        ({"PMI_SIZE": "1"}, None),
    ],
)
def test_how_this_process_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], wanted: object
) -> None:
    if "hosts" in env:
        (tmp_path / "hosts.json").write_text(env["hosts"])
        env = {"MLX_RANK": env["MLX_RANK"], "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert detect_launcher() == wanted


def connected(size: int) -> list[Heartbeat]:
    """The watches of so many ranks, all in this process."""
    told: SimpleQueue[bytes] = SimpleQueue()

    def share(data: bytes) -> bytes:
        for _ in range(size - 1):
            told.put(data)
        return data

    watches: dict[int, Heartbeat] = {}

    def join(rank: int) -> None:
        watches[rank] = connect(rank, size, "127.0.0.1", share if rank == 0 else lambda data: told.get(timeout=TIMEOUT))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    return [watches[rank] for rank in range(size)]


def test_ranks_that_end_one_after_another_are_not_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "GRACE", 0.1)
    for order in ([2, 0, 1], [0, 1, 2]):
        watches = connected(3)
        for rank in order:
            watches[rank].close(well=True)
            assert not watches[1]._said.wait(0.4)
    assert capfd.readouterr().err == ""


def test_the_rank_that_is_lost_is_named_to_all(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "GRACE", 0.1)
    monkeypatch.setattr(heartbeat, "LAST", 250.0)  # its end would be that of the suite
    watches = connected(3)
    watches[2].close(well=False)
    for rank in (0, 1):
        with pytest.raises(SystemExit, match="1"):
            watches[rank].explain()
        watches[rank].close(well=False)  # before LAST is over: the process goes on
    lines = sorted(capfd.readouterr().err.splitlines())
    assert [line[: len(line) - len(line.partition(";")[2]) - 1] for line in lines] == [
        f"anarchobot: rank 2 ended before the run did: rank {rank} stops" for rank in (0, 1)
    ]


def test_a_rank_that_says_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As when its machine sleeps, or the network is gone: the connection stays open."""
    monkeypatch.setattr(heartbeat, "GRACE", 0.1)
    monkeypatch.setattr(heartbeat, "SILENCE", 1.0)
    monkeypatch.setattr(heartbeat, "LAST", 250.0)  # its end would be that of the suite
    here, there = socket.socketpair()
    watch = Heartbeat(0, {7: here})
    with pytest.raises(SystemExit):
        watch.explain()
    watch.close(well=False)
    there.close()
    assert "anarchobot: rank 7 has not been heard of for 1 s: rank 0 stops" in capfd.readouterr().err


def test_a_stranger_is_not_taken_for_a_rank() -> None:
    told: SimpleQueue[bytes] = SimpleQueue()
    watches: list[Heartbeat] = []
    thread = threading.Thread(target=lambda: watches.append(connect(0, 2, "127.0.0.1", lambda d: told.put(d) or d)))
    thread.start()
    data = told.get(timeout=TIMEOUT)
    with socket.create_connection(("127.0.0.1", json.loads(data)[0])) as stranger:
        stranger.sendall(b"x" * 17)
        assert stranger.recv(1) == b""  # shown the door
    other = connect(1, 2, "127.0.0.1", lambda _: data)
    thread.join(TIMEOUT)
    assert list(watches[0]._peers) == [1]
    other.close(well=True)
    watches[0].close(well=True)
