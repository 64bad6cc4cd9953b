"""Silent and slow clients: each is dropped in time, and none shuts out the others."""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from anarchobot.inference.model import Model
from anarchobot.serving.app import Limits
from anarchobot.serving.connections import Connection, ConnectionLimits, Connections, client_network
from tests.serving.conftest import RunningServer, run_server, wait_until
from tests.serving.test_robustness import HEAD, LONG

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = json.dumps(LONG | {"stream": True}).encode()
STREAM = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture(scope="module")
def impatient(model: Model) -> Iterator[RunningServer]:
    limits = ConnectionLimits(idle_seconds=0.3, write_seconds=0.3)
    with run_server(model, Limits(tokens=4000), connections=limits) as server:
        yield server


def read_to_end(connection: socket.socket, drip: bytes = b"") -> bytes:
    """What the server sends until it closes the connection, to a client that sends `drip` 20 times a second."""
    connection.settimeout(0.05 if drip else 100)
    received = b""
    for _ in range(3000):
        try:
            chunk = connection.recv(65536)
            if not chunk:
                return received
            received += chunk
        except TimeoutError:
            assert drip, "the server did not close the connection"
        except ConnectionError:
            return received
        try:
            connection.sendall(drip)
        except ConnectionError:
            return received
    pytest.fail("the server did not close the connection")


@pytest.mark.parametrize(
    ("sent", "drip", "answers"),
    [
        (b"", b"", 0),
        (b"GET /health HTTP/1.1\r\nX: ", b"x", 0),
        (GET, b"", 1),
        (GET + b"GET /hea", b"x", 1),
        (GET + GET, b"", 2),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n", b"x", 1),
        (b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 1),
    ],
    ids=["silent", "slow head", "silent after a request", "slow second head", "pipelined", "slow body", "slow chunks"],
)
def test_an_idle_connection_is_closed(impatient: RunningServer, sent: bytes, drip: bytes, answers: int) -> None:
    assert read_to_end(impatient.raw(sent), drip).count(b"HTTP/1.1 ") == answers


def test_a_client_that_does_not_read_is_dropped(impatient: RunningServer) -> None:
    """Of 14 MB of pages, more than the system buffers."""
    impatient.raw(GET.replace(b"/health", b"/") * 2000)
    wait_until(lambda: impatient.server.server_state.connections)
    wait_until(lambda: not impatient.server.server_state.connections)


def test_a_request_in_progress_outlasts_the_limits(impatient: RunningServer) -> None:
    ask = json.dumps(LONG | {"stream": True, "max_tokens": 500}).encode()
    answer = read_to_end(impatient.raw(HEAD + b"Content-Length: %d\r\n\r\n" % len(ask) + ask))
    assert answer.rstrip().endswith(b"data: [DONE]\n\n\r\n0")


def test_many_silent_connections_shut_out_nobody(model: Model) -> None:
    with run_server(model, connections=ConnectionLimits(per_client=10)) as server:
        silent = [server.raw((b"", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{")[i % 3]) for i in range(35)]
        assert server.request("GET", "/health")[0] == 200
        for connection in silent[:25]:  # the oldest
            assert read_to_end(connection) == b""
        assert server.is_healthy()


def test_connections_beyond_those_in_use_are_refused(model: Model) -> None:
    with run_server(model, Limits(tokens=4000), connections=ConnectionLimits(per_client=2)) as server:
        streams = [server.raw(STREAM) for _ in range(2)]
        for stream in streams:
            assert b"200 OK" in stream.recv(1000)
        status, headers, answer = server.request("GET", "/health")
        assert status == 429 and headers["retry-after"] == "1"
        assert json.loads(answer)["error"]["code"] == "rate_limit_exceeded"
        streams[0].close()
        wait_until(lambda: server.request("GET", "/health")[0] == 200)
        streams[1].close()
        assert server.is_healthy()


@dataclass(eq=False)
class FakeConnection:
    awaits_client: bool = True
    aborted: list[bool] = field(default_factory=list)

    @property
    def transport(self) -> Any:
        return SimpleNamespace(abort=lambda: self.aborted.append(True))


def test_the_oldest_idle_connection_of_any_client_makes_room() -> None:
    open_connections = Connections(ConnectionLimits(per_client=2, total=3))
    busy, first, second, third, fourth = (FakeConnection(idle) for idle in (False, True, True, True, True))

    def add(connection: FakeConnection, client: str) -> bool:
        return open_connections.add(cast("Connection", connection), client)

    assert add(busy, "a") and add(first, "b") and add(second, "c")
    assert add(third, "d") and first.aborted and not busy.aborted and not second.aborted
    second.awaits_client = third.awaits_client = False
    assert not add(fourth, "e")
    open_connections.remove(cast("Connection", second))
    assert add(fourth, "e")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("192.168.0.5", "192.168.0.5"), ("::ffff:10.0.0.1", "10.0.0.1"), ("::1", "::/64"), ("", ""),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("fe80::1%eth0", "fe80::/64"),
    ],
)  # fmt: skip
def test_an_ipv6_network_is_one_client(host: str, expected: str) -> None:
    assert client_network(host) == expected
