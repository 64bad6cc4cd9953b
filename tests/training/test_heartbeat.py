"""The end of a heartbeat."""

import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from anarchobot.training.heartbeat import Heartbeat
from anarchobot.training.ranks import Ranks


def test_close_waits_for_the_thread_before_it_closes_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    closed, open_at_end = threading.Event(), list[bool]()

    def watch(heartbeat: Heartbeat) -> None:
        heartbeat._closed.wait()
        closed.wait(0.3)  # only a `close` that does not wait for this thread sets it
        open_at_end.append(here.fileno() >= 0)

    monkeypatch.setattr(Heartbeat, "_watch", watch)
    beat = Heartbeat(0, {1: here})
    beat.close(success=True)
    closed.set()
    beat._thread.join()
    there.close()
    assert open_at_end == [True]


def test_ranks_tell_the_others_whether_they_finished() -> None:
    ends: list[bool] = []
    heartbeat: Any = SimpleNamespace(close=lambda success: ends.append(success))
    with Ranks(heartbeat=heartbeat):
        pass
    with pytest.raises(KeyError), Ranks(heartbeat=heartbeat):
        raise KeyError
    assert ends == [True, False]
