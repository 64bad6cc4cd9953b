"""The model thread, which owns the batch and all arrays. Requests arrive through a queue; generated text is sent back
to the event loop chunk by chunk."""

import asyncio
import threading
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType

import mlx.core as mx

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.batching import MAX_ROWS
from anarchobot.inference.generation import TextBatch, TextChunk
from anarchobot.inference.model import Model
from anarchobot.serving.errors import ApiError

_DONE = None  # the last event of a request

Event = TextChunk | ApiError | None


@dataclass(frozen=True)
class _Job:
    context: list[int]
    settings: GenerationConfig
    stop: Collection[int]
    send: Callable[[Event], None]  # called by the model thread


class GenerationStream:
    """The generated text of one request, for the event loop. Iterate over it; always close it."""

    def __init__(self, events: asyncio.Queue[Event], cancel: Callable[[], None]) -> None:
        self._events, self.close = events, cancel

    def __aiter__(self) -> "GenerationStream":
        return self

    async def __anext__(self) -> TextChunk:
        """Raises ApiError if generation fails."""
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        if event is _DONE:
            raise StopAsyncIteration
        return event


class Worker:
    """A context manager that runs the model thread. Call all methods from the thread of one event loop."""

    def __init__(self, model: Model, queue_size: int, rows: int = MAX_ROWS) -> None:
        """Generates for `rows` requests at once; `queue_size` more may wait."""
        self._model, self._rows = model, rows
        self.max_requests = rows + queue_size
        self.active_requests = 0  # submitted and not finished; a closed one counts until the thread has released it
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()  # run by the model thread
        self._stopped = False
        self._batch = TextBatch(model, rows)
        self._jobs: dict[int, _Job] = {}
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._tasks.put(self._stop)
        self._thread.join()

    def submit(self, context: list[int], settings: GenerationConfig, stop: Collection[int]) -> GenerationStream:
        """Arguments as for TextBatch.insert. Raises ApiError (429) if the queue is full."""
        if self.active_requests >= self.max_requests:
            raise ApiError(
                429,
                f"too many requests: {self.active_requests} active, the limit is {self.max_requests}; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.active_requests += 1
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def receive(event: Event) -> None:
            self.active_requests -= event is _DONE
            events.put_nowait(event)

        def send(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(receive, event)

        job = _Job(context, settings, stop, send)
        self._tasks.put(lambda: self._insert(job))
        return GenerationStream(events, lambda: self._tasks.put(lambda: self._cancel(job)))

    def abort_all(self) -> None:
        """Fails all active requests."""
        self._tasks.put(self._abort)

    def _run(self) -> None:
        while True:
            try:
                while (task := self._next()) is not None:
                    task()
                    if self._stopped:
                        mx.clear_streams()  # otherwise MLX aborts the process at exit
                        return
                for chunk in self._batch.step():
                    job = self._jobs[chunk.request]
                    job.send(chunk)
                    if chunk.finish_reason is not None:
                        del self._jobs[chunk.request]
                        job.send(_DONE)
            except Exception:
                traceback.print_exc()
                self._fail_all(ApiError(500, "generation failed for this request or another request in the same batch"))

    def _next(self) -> Callable[[], None] | None:
        """Returns the next task, or None; waits for one if there is nothing to generate."""
        if not self._batch:
            return self._tasks.get()
        with suppress(Empty):
            return self._tasks.get_nowait()
        return None

    def _insert(self, job: _Job) -> None:
        try:
            self._jobs[self._batch.insert(job.context, job.settings, job.stop)] = job
        except Exception:
            traceback.print_exc()
            job.send(ApiError(500, "generation failed for this request"))
            job.send(_DONE)

    def _cancel(self, job: _Job) -> None:
        for request, other in list(self._jobs.items()):
            if other is job:
                self._batch.remove(request)
                del self._jobs[request]
                job.send(_DONE)

    def _abort(self) -> None:
        self._fail_all(ApiError(503, "the server is shutting down"))

    def _stop(self) -> None:
        self._abort()
        self._stopped = True

    def _fail_all(self, error: ApiError) -> None:
        """The rows are in an unknown state after a failed step, so the batch is recreated."""
        for job in self._jobs.values():
            job.send(error)
            job.send(_DONE)
        self._jobs.clear()
        self._batch = TextBatch(self._model, self._rows)
