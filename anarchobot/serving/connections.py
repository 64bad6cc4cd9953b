"""Time limits of connections and a limit per client, which uvicorn lacks: silent and slow clients shut out nobody.

A connection without a request in progress has `idle_seconds` to send the next request's head, however slowly its bytes
arrive. A response that the client does not read is given up after `write_seconds`. A client that opens too many
connections loses the oldest one without a complete request; if there is none, the new one is refused. The same holds
for all clients together. The application limits the time to send a body.
"""

import asyncio
import logging
import resource
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from anarchobot.serving.errors import ApiError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConnectionLimits:
    """Connections per client address and in total; seconds."""

    per_client: int = 100
    total: int = 1000
    idle_seconds: float = 30
    write_seconds: float = 30


class Connections:
    """The open connections of a server, oldest first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._open: dict[Connection, str] = {}  # with their clients

    def add(self, connection: "Connection", client: str) -> bool:
        """Makes room if necessary. False: there is no room, because all connections are in use."""
        own = [other for other, name in self._open.items() if name == client]
        if len(own) >= self.limits.per_client and not self._close_one(own):
            return False
        if len(self._open) >= self.limits.total and not self._close_one([*self._open]):
            return False
        self._open[connection] = client
        return True

    def remove(self, connection: "Connection") -> None:
        self._open.pop(connection, None)

    def _close_one(self, connections: "list[Connection]") -> bool:
        oldest = next((connection for connection in connections if connection.awaits_client), None)
        if oldest is None:
            return False
        self.remove(oldest)
        oldest.transport.abort()
        return True


class Connection(H11Protocol):
    """One connection, with the limits of `connections`."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._connections = connections
        self._deadlines: dict[str, asyncio.TimerHandle] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def awaits_client(self) -> bool:
        """Whether no request has been received completely that is still to be answered."""
        return self.is_idle or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        client = client_network(self.client[0] if self.client else "")
        self._abort_after(self._connections.limits.idle_seconds, "idle")
        if not self._connections.add(self, client):
            logger.info("%s: connection refused, all are in use", client)
            transport.write(_refusal())
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        for name in list(self._deadlines):
            self._cancel(name)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if not self.is_idle:
            self._cancel("idle")

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may start a pipelined request
        if self.is_idle:
            self._abort_after(self._connections.limits.idle_seconds, "idle")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_after(self._connections.limits.write_seconds, "write")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("write")

    def _abort_after(self, seconds: float, name: str) -> None:
        self._cancel(name)
        self._deadlines[name] = self.loop.call_later(seconds, self.transport.abort)

    def _cancel(self, name: str) -> None:
        if name in self._deadlines:
            self._deadlines.pop(name).cancel()


def client_network(host: str) -> str:
    """The address that counts as one client: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a Unix socket
        return host
    if not isinstance(address, IPv6Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"


def allow_open_files(count: int) -> None:
    """Raises this process's limit of open files to `count`, as far as the system allows: macOS starts with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        raised = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))


def _refusal() -> bytes:
    body = bytes(ApiError(429, "too many connections; try again later", code="rate_limit_exceeded").response().body)
    head = f"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"retry-after: 1\r\nconnection: close\r\n\r\n" + body
