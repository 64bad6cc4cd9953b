"""Detects a lost rank and tells all others which one it was.

If a rank dies, MLX's ring fails without saying which rank, and if a machine sleeps or loses its network, it waits
forever. So every rank keeps its connection to rank 0 (training/rendezvous.py) and sends a heartbeat every second. Each
message is one byte: ALIVE, DONE, or the number of a lost rank, which rank 0 forwards to all others.
"""

import os
import select
import socket
import threading
import time
from contextlib import suppress

from anarchobot.training.signals import print_status

INTERVAL, TIMEOUT = 1.0, 30.0  # seconds between heartbeats; of silence before a rank counts as lost
GRACE = 2.0  # for all ranks to exit together, as after a second Ctrl-C, before a rank counts as lost
EXIT_AFTER = 15.0  # after the report, before a hanging step or exchange is aborted
ALIVE, DONE = 255, 254


class Heartbeat:
    """`peers` are connections by rank: to all other ranks on rank 0, to rank 0 on the others."""

    def __init__(self, rank: int, peers: dict[int, socket.socket]) -> None:
        self._rank, self._peers = rank, peers
        self._sockets = list(peers.values())
        for connection in self._sockets:
            connection.setblocking(False)
        self._closed, self._reported = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def exit_when_reported(self) -> None:
        """After a failed exchange: waits until the lost rank has been reported, then raises SystemExit."""
        if self._reported.wait(TIMEOUT + 2 * GRACE + INTERVAL):
            raise SystemExit(1)

    def close(self, *, success: bool) -> None:
        """Closes the connections. Without `success`, closing the connection tells the others that it is lost."""
        self._closed.set()
        self._thread.join()
        if success:
            self._send(DONE)
        for connection in self._sockets:
            _receive(connection)  # closing with unread data would reset the connection
            connection.close()

    def _watch(self) -> None:
        last_sent = woken = time.monotonic()
        last_seen = dict.fromkeys(self._peers, woken)
        self._send(ALIVE)
        while self._peers and not self._closed.is_set():
            now = time.monotonic()
            if now - woken > TIMEOUT / 2:  # this process was paused, and others on its machine with it
                last_seen = dict.fromkeys(self._peers, now)
            woken = now
            if now - last_sent >= INTERVAL:
                self._send(ALIVE)
                last_sent = now
            ready, _, _ = select.select(list(self._peers.values()), [], [], INTERVAL / 4)
            for rank, connection in list(self._peers.items()):
                if connection in ready:
                    last_seen[rank] = now
                    for message in _receive(connection) or bytes([rank]):
                        if message == DONE:
                            self._peers.pop(rank, None)
                        elif message != ALIVE:
                            return self._report_lost(message, "ended early")
                elif now - last_seen[rank] > TIMEOUT:
                    return self._report_lost(rank, f"has not responded for {TIMEOUT:.0f} s")

    def _report_lost(self, rank: int, reason: str) -> None:
        self._peers.pop(rank, None)
        self._send(rank)
        if self._closed.wait(GRACE):
            return
        print_status(
            f"rank {rank} {reason}: stopping rank {self._rank}; resume from the last checkpoint with --resume-from auto"
        )
        self._reported.set()
        if not self._closed.wait(EXIT_AFTER):
            os._exit(1)  # a checkpoint only counts once it is complete, so none is damaged

    def _send(self, message: int) -> None:
        for connection in self._peers.values():
            with suppress(OSError):  # a closed connection is noticed when reading
                connection.send(bytes([message]))


def _receive(connection: socket.socket) -> bytes:
    """Returns the data received so far, or nothing if the connection was closed."""
    try:
        return connection.recv(4096)
    except OSError:
        return b""
