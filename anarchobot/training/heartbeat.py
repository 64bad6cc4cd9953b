"""Tells each rank when another one is lost, and which.

MLX's ring fails on a connection that was closed, without a name, and waits for ever on a machine that went to sleep or
lost its network. So every rank keeps a connection of its own to rank 0, and says once a second that it is there. Each
message is one byte: the two below, or the number of a rank that is lost, which rank 0 passes on.
"""

import json
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

TICK, SILENCE = 1.0, 30.0  # seconds between signs of life; without one, that mean that a rank is lost
GRACE = 2.0  # for an end that comes to all ranks at once, such as a second Ctrl-C: then none of them is lost
LAST = 15.0  # after the loss was said, before a step or an exchange that goes on is broken off
JOIN, HELLO = 60.0, 20.0  # for all ranks to connect, and for one that did to say that it belongs to the run
THERE, DONE = 255, 254


class Heartbeat:
    """`peers`: connections by rank: on rank 0 those to all others, on another rank that to rank 0."""

    def __init__(self, rank: int, peers: dict[int, socket.socket]) -> None:
        self._rank, self._peers = rank, peers
        self._sockets = list(peers.values())
        for connection in self._sockets:
            connection.setblocking(False)
        self._closed, self._said = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)
        self._thread.start()

    def explain(self) -> None:
        """After an exchange failed: waits until it is said which rank was lost, and raises SystemExit."""
        if self._said.wait(SILENCE + 2 * GRACE + TICK):
            raise SystemExit(1)

    def close(self, *, well: bool) -> None:
        """The end of this rank's part; `well`: with that of the run. The others are told by the connection's end
        otherwise."""
        self._closed.set()
        self._thread.join()
        if well:
            self._tell(DONE)
        for connection in self._sockets:
            _received(connection)  # what is left unread would turn the end into an error
            connection.close()

    def _watch(self) -> None:
        heard = dict.fromkeys(self._peers, time.monotonic())
        told = 0.0
        while self._peers and not self._closed.is_set():
            if time.monotonic() - told >= TICK:
                self._tell(THERE)
                told = time.monotonic()
            ready, _, _ = select.select(list(self._peers.values()), [], [], TICK / 4)
            for rank, connection in list(self._peers.items()):
                if connection in ready:
                    heard[rank] = time.monotonic()
                    for message in _received(connection) or bytes([rank]):
                        if message == DONE:
                            self._peers.pop(rank, None)
                        elif message != THERE:
                            return self._lost(message, "ended before the run did")
                elif time.monotonic() - heard[rank] > SILENCE:
                    return self._lost(rank, f"has not been heard of for {SILENCE:.0f} s")

    def _lost(self, rank: int, how: str) -> None:
        self._peers.pop(rank, None)
        self._tell(rank)
        if self._closed.wait(GRACE):
            return
        line = f"rank {rank} {how}: rank {self._rank} stops; go on from the last checkpoint with --resume-from auto"
        with suppress(OSError):  # the terminal may have gone
            print(f"anarchobot: {line}\n", end="", file=sys.stderr, flush=True)  # in one piece: others speak too
        self._said.set()
        if not self._closed.wait(LAST):
            os._exit(1)  # what is written of a checkpoint counts when it is whole: nothing is harmed

    def _tell(self, message: int) -> None:
        for connection in self._peers.values():
            with suppress(OSError):  # its end is noticed in reading
                connection.send(bytes([message]))


def connect(rank: int, size: int, host: str, share: Callable[[bytes], bytes]) -> Heartbeat:
    """Connects all ranks to rank 0, which listens on `host`, its own address in the ring, until all have come.

    `share` hands rank 0's bytes to all: the port, and a word that shows who belongs to the run.
    """
    if rank > 0:
        port, word = json.loads(share(b""))
        connection = socket.create_connection((host, port), timeout=JOIN)
        connection.sendall(bytes.fromhex(word) + bytes([rank]))
        return Heartbeat(rank, {0: connection})
    word = secrets.token_bytes(16)
    peers: dict[int, socket.socket] = {}
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        server.settimeout(JOIN)
        share(json.dumps([server.getsockname()[1], word.hex()]).encode())
        while len(peers) < size - 1:
            connection, _ = server.accept()
            connection.settimeout(HELLO)
            with suppress(OSError):
                hello = connection.recv(17, socket.MSG_WAITALL)
                if hello[:-1] == word:
                    peers[hello[-1]] = connection
                    continue
            connection.close()
    return Heartbeat(0, peers)


def _received(connection: socket.socket) -> bytes:
    """What has come; nothing when the connection has ended."""
    try:
        return connection.recv(4096)
    except OSError:
        return b""
