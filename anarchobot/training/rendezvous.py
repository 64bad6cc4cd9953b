"""The ranks of a run find each other: all connect to rank 0 and prove that they know the run's secret.

    rank 0 -> rank r    nonce
    rank r -> rank 0    r, nonce, length, HMAC-SHA256 of all so far, addresses of r as JSON
    rank 0 -> rank r    length, HMAC-SHA256 with both nonces, addresses of all ranks as JSON; once all have joined

Rank 0 serves all connections side by side, drops wrong ones at once and silent ones after a few seconds, and stops
listening when all ranks have joined. The secret itself is never sent.
"""

import hmac
import json
import os
import secrets
import select
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

from anarchobot.config.errors import UserError

SECRET_ENV = "ANARCHOBOT_RANKS_SECRET"  # noqa: S105  the name of an environment variable, the same on all ranks
JOIN_TIMEOUT = 120.0  # seconds for all ranks to join
HANDSHAKE_TIMEOUT = 10.0  # for a connection to send its message
MAX_PENDING = 64  # connections that have not sent it; the oldest is dropped for a new one
_NONCE_BYTES, _MAX_PAYLOAD = 32, 65536
_JOIN, _REPLY = struct.Struct(f"!B{_NONCE_BYTES}sI32s"), struct.Struct("!I32s")

Addresses = list[str]


def listen(host: str, port: int) -> socket.socket:
    """Raises UserError if rank 0 can't listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        raise UserError(f"rank 0 can't listen on {host}:{port}: {error.strerror or error}") from error


def gather(
    server: socket.socket, size: int, secret: bytes, own: Addresses
) -> tuple[dict[int, socket.socket], list[Addresses]]:
    """On rank 0: closes `server` once all other ranks have joined. Returns their connections by rank, and the addresses
    of all ranks; `own` are rank 0's. Raises UserError after JOIN_TIMEOUT."""
    deadline = time.monotonic() + JOIN_TIMEOUT
    with server, _Room(size, secret) as room:
        server.setblocking(False)
        while len(room.joined) < size - 1:
            if time.monotonic() > deadline:
                missing = ", ".join(str(rank) for rank in range(1, size) if rank not in room.joined)
                raise UserError(
                    f"rank {missing} did not join within {JOIN_TIMEOUT:.0f} s: check that it was started, that it can "
                    f"reach {server.getsockname()[0]}, and that {SECRET_ENV} is the same on all machines"
                )
            ready, _, _ = select.select([server, *room.sockets()], [], [], 0.5)
            for connection in ready:
                if connection is server:
                    room.accept(server)
                else:
                    room.receive(connection)
            room.drop_silent()
    everyone = [own, *(room.joined[rank].addresses for rank in range(1, size))]
    payload = json.dumps(everyone).encode()
    for guest in room.joined.values():
        code = hmac.digest(secret, b"reply" + guest.nonces + payload, "sha256")
        with suppress(OSError):  # the heartbeat reports a rank that has ended
            guest.connection.settimeout(HANDSHAKE_TIMEOUT)
            guest.connection.sendall(_REPLY.pack(len(payload), code) + payload)
    return {rank: guest.connection for rank, guest in room.joined.items()}, everyone


def join(rank: int, host: str, port: int, secret: bytes, own: Addresses) -> tuple[socket.socket, list[Addresses]]:
    """On other ranks: returns the connection to rank 0 and the addresses of all ranks; `own` are those of this rank.
    Waits for rank 0 to listen. Raises UserError after JOIN_TIMEOUT, or if the secrets differ."""
    deadline = time.monotonic() + JOIN_TIMEOUT
    connection, nonce = _first_contact(rank, host, port, deadline)
    own_nonce, payload = secrets.token_bytes(_NONCE_BYTES), json.dumps(own).encode()
    head = bytes([rank]) + own_nonce + struct.pack("!I", len(payload))
    code = hmac.digest(secret, b"join" + nonce + head + payload, "sha256")
    try:
        connection.settimeout(max(1.0, deadline - time.monotonic()))
        connection.sendall(head + code + payload)
        length, code = _REPLY.unpack(_receive(connection, _REPLY.size))
        reply = _receive(connection, min(length, _MAX_PAYLOAD * 254))
    except OSError as error:
        connection.close()
        raise UserError(
            f"rank {rank}: rank 0 at {host}:{port} closed the connection ({error}): it has ended, or {SECRET_ENV} "
            "differs"
        ) from error
    if not hmac.compare_digest(code, hmac.digest(secret, b"reply" + nonce + own_nonce + reply, "sha256")):
        connection.close()
        raise UserError(f"rank {rank}: {host}:{port} is not rank 0 of this run: {SECRET_ENV} differs")
    everyone: list[Addresses] = json.loads(reply)
    return connection, everyone


@dataclass
class _Guest:
    """A connection that joins; `nonces` are rank 0's and, once it has joined, its own."""

    connection: socket.socket
    nonces: bytes
    began: float = field(default_factory=time.monotonic)
    received: bytearray = field(default_factory=bytearray)
    addresses: Addresses = field(default_factory=list)


class _Room:
    """The connections to rank 0 before the run starts. On exit, only those of ranks that have joined stay open."""

    def __init__(self, size: int, secret: bytes) -> None:
        self._size, self._secret = size, secret
        self._pending: dict[socket.socket, _Guest] = {}  # oldest first
        self.joined: dict[int, _Guest] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        for connection in self._pending if kind is None else self.sockets():
            connection.close()

    def sockets(self) -> list[socket.socket]:
        return [*self._pending, *(guest.connection for guest in self.joined.values())]

    def accept(self, server: socket.socket) -> None:
        if len(self._pending) >= MAX_PENDING:
            self._drop(next(iter(self._pending)))
        with suppress(OSError):  # it is gone already
            connection, _ = server.accept()
            connection.setblocking(False)
            guest = _Guest(connection, secrets.token_bytes(_NONCE_BYTES))
            self._pending[connection] = guest
            connection.send(guest.nonces)

    def receive(self, connection: socket.socket) -> None:
        guest = self._pending.get(connection)
        if guest is None:  # a joined rank sends nothing before the run starts: it has ended
            for rank in [rank for rank, guest in self.joined.items() if guest.connection is connection]:
                self.joined.pop(rank).connection.close()
            return
        try:
            data = connection.recv(_JOIN.size + _MAX_PAYLOAD - len(guest.received))
        except OSError:
            data = b""
        guest.received += data
        if not data or not self._could_join(guest):
            self._drop(connection)

    def _could_join(self, guest: _Guest) -> bool:
        """Lets it join if its message is complete and right; returns False if it is wrong."""
        if len(guest.received) < _JOIN.size:
            return True
        rank, nonce, length, code = _JOIN.unpack_from(guest.received)
        payload = bytes(guest.received[_JOIN.size :])
        if not 0 < rank < self._size or not len(payload) <= length <= _MAX_PAYLOAD:
            return False
        if len(payload) < length:
            return True
        head = bytes(guest.received[: _JOIN.size - len(code)])
        if not hmac.compare_digest(code, hmac.digest(self._secret, b"join" + guest.nonces + head + payload, "sha256")):
            return False
        try:
            guest.addresses = json.loads(payload)
        except (ValueError, RecursionError):
            return False
        guest.nonces += nonce
        del self._pending[guest.connection]
        if previous := self.joined.get(rank):  # it was started again
            previous.connection.close()
        self.joined[rank] = guest
        return True

    def drop_silent(self) -> None:
        now = time.monotonic()
        for connection in [c for c, guest in self._pending.items() if now - guest.began > HANDSHAKE_TIMEOUT]:
            self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        if self._pending.pop(connection, None) is not None:
            connection.close()


def _first_contact(rank: int, host: str, port: int, deadline: float) -> tuple[socket.socket, bytes]:
    connection: socket.socket | None = None
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT)
            return connection, _receive(connection, _NONCE_BYTES)
        except OSError as error:
            if connection is not None:
                connection.close()
            if time.monotonic() > deadline:
                raise UserError(f"rank {rank}: can't reach rank 0 at {host}:{port}: {error}") from error
            time.sleep(0.1)


def _receive(connection: socket.socket, size: int) -> bytes:
    """Raises OSError if the connection ends first."""
    data = b""
    while len(data) < size:
        if not (part := connection.recv(size - len(data))):
            raise ConnectionError("end of connection")
        data += part
    return data


def shared_secret() -> bytes:
    """The secret of this run; empty if there is none."""
    return os.environ.get(SECRET_ENV, "").encode()
