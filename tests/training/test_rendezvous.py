"""How ranks join: strangers, wrong secrets, impostors of rank 0, and ranks that start again."""

import hmac
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.training import rendezvous
from anarchobot.training.rendezvous import gather, join, listen
from tests.ranks import TIMEOUT

HOST, SECRET = "127.0.0.1", b"secret"


@contextmanager
def rank_zero(size: int) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Yields the port on which rank 0 waits, and a function that returns what `gather` returned or raised."""
    found: list[Any] = []
    server = listen(HOST, 0)
    port = server.getsockname()[1]

    def wait() -> None:
        try:
            found.append(gather(server, size, SECRET, ["zero:1"]))
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(TIMEOUT)
        assert found, "rank 0 still waits"
        return found[0]

    yield port, result
    for connection in result()[0].values() if isinstance(result(), tuple) else ():
        connection.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=TIMEOUT)


def hello(connection: socket.socket, rank: int, secret: bytes = SECRET, payload: bytes = b"[]") -> None:
    """Sends the message of a rank that joins; independent of the module's own code."""
    nonce = connection.recv(32, socket.MSG_WAITALL)
    head = struct.pack("!B32sI", rank, b"n" * 32, len(payload))
    connection.sendall(head + hmac.digest(secret, b"join" + nonce + head + payload, "sha256") + payload)


def join_each(port: int, ranks: list[int]) -> dict[int, Any]:
    results: dict[int, Any] = {}

    def enter(rank: int) -> None:
        results[rank] = join(rank, HOST, port, SECRET, [f"address:{rank}"])

    threads = [threading.Thread(target=enter, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    return results


@pytest.mark.parametrize("most", [64, 5])
def test_strangers_are_not_waited_for(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Also if there are more of them than are served at once."""
    monkeypatch.setattr(rendezvous, "HANDSHAKE_TIMEOUT", 1e6)
    monkeypatch.setattr(rendezvous, "MAX_PENDING", most)
    with ExitStack() as stack, rank_zero(3) as (port, result):
        silent = [stack.enter_context(connect(port)) for _ in range(50)]
        wrong = [stack.enter_context(connect(port)) for _ in range(5)]
        hello(wrong[0], 1, secret=b"other")
        hello(wrong[1], 0)
        hello(wrong[2], 3)
        hello(wrong[3], 1, payload=b"[" * 60_000)
        wrong[4].sendall(b"GET / HTTP/1.1\r\n" * 5)
        for connection in wrong:
            while connection.recv(64):  # it is closed while rank 0 still waits
                pass
        with pytest.raises(UserError, match="or ANARCHOBOT_RANKS_SECRET differs"):
            join(1, HOST, port, b"other", [])
        joined = join_each(port, [1, 2])
        peers, everyone = result()
        assert set(peers) == {1, 2} and everyone == [["zero:1"], ["address:1"], ["address:2"]]
        assert [joined[rank][1] for rank in (1, 2)] == [everyone, everyone]
        for rank, (connection, _) in joined.items():
            connection.sendall(bytes([rank]))
            assert peers[rank].recv(1) == bytes([rank])
            connection.close()
        for stranger in silent:
            while stranger.recv(64):
                pass
        with pytest.raises(ConnectionRefusedError):
            connect(port)


def test_silent_connections_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "HANDSHAKE_TIMEOUT", 0.0)
    with rank_zero(2) as (port, result):
        with connect(port) as stranger:
            while stranger.recv(64):
                pass
        monkeypatch.setattr(rendezvous, "HANDSHAKE_TIMEOUT", 10.0)
        join_each(port, [1])[1][0].close()
        assert set(result()[0]) == {1}


def test_a_rank_that_starts_again_takes_its_place() -> None:
    """Whether its first connection is closed or not."""
    with ExitStack() as stack, rank_zero(3) as (port, result):
        with connect(port) as ended:
            hello(ended, 1)
        hanging = stack.enter_context(connect(port))
        hello(hanging, 1)
        joined = stack.enter_context(ThreadPoolExecutor()).submit(join, 1, HOST, port, SECRET, ["address:1"])
        assert hanging.recv(1) == b""  # before rank 2 joins: the run starts when all ranks are there
        second, _ = join(2, HOST, port, SECRET, ["address:2"])
        first, _ = joined.result(TIMEOUT)
        stack.enter_context(first), stack.enter_context(second)
        peers = result()[0]
        assert {peers[rank].getpeername()[1] for rank in (1, 2)} == {c.getsockname()[1] for c in (first, second)}


def test_missing_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT", 2.0)
    with rank_zero(4) as (port, result), connect(port) as only:
        hello(only, 2)
        with connect(port) as ended:
            hello(ended, 1)
        assert "rank 1, 3 did not join within 2 s" in str(result())


def test_an_impostor_of_rank_0_is_refused() -> None:
    everyone = json.dumps([["evil:1"], ["evil:2"]]).encode()

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"n" * 32)
            connection.recv(4096)
            connection.sendall(struct.pack("!I", len(everyone)) + b"c" * 32 + everyone)

    with listen(HOST, 0) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        with pytest.raises(UserError, match="is not rank 0 of this run"):
            join(1, HOST, server.getsockname()[1], SECRET, [])
