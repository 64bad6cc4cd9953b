"""Threads that share the rows of a micro-batch on a CPU, each with its own MLX stream.

MLX's CPU backend runs one operation at a time on each stream. Two threads with half of the rows each keep two cores
busy; a BLAS with two threads under MLX is six times slower than one with a single thread.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

T = TypeVar("T")
_Call = tuple[Callable[[], Any], "Future[Any]"]


class Workers:
    """`count` threads; a count of 1 uses the calling thread. They end with this object or with the process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._calls: list[SimpleQueue[_Call | None]] = [SimpleQueue() for _ in range(count if count > 1 else 0)]
        threads = [threading.Thread(target=_serve, args=(calls,), daemon=True) for calls in self._calls]
        for thread in threads:
            thread.start()
        weakref.finalize(self, _end, self._calls, threads)

    def map(self, work: Callable[[int], T]) -> list[T]:
        """Returns [work(0), work(1), ...], each computed in its thread. Returned arrays must be evaluated. Raises the
        first exception once all threads are done."""
        if not self._calls:
            return [work(0)]
        results: list[Future[T]] = [Future() for _ in self._calls]
        for i, (calls, result) in enumerate(zip(self._calls, results, strict=True)):
            calls.put((partial(work, i), result))
        wait(results)
        return [result.result() for result in results]


def _serve(calls: SimpleQueue[_Call | None]) -> None:
    mx.set_default_device(mx.cpu)
    mx.set_default_stream(mx.new_stream(mx.cpu))
    while call := calls.get():
        work, result = call
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)
        del call, work, result  # they refer to arrays
    mx.clear_streams()  # otherwise MLX ends the process with an error


def _end(calls: list[SimpleQueue[_Call | None]], threads: list[threading.Thread]) -> None:
    for queue in calls:
        queue.put(None)
    for thread in threads:
        thread.join()
