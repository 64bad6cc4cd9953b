"""The one thread that computes. It owns the batch and all arrays; requests reach it by a queue, and what it writes goes
back to the event loop, piece by piece."""

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
from anarchobot.inference.batching import ROWS
from anarchobot.inference.generation import Piece, TextBatch
from anarchobot.inference.model import Model
from anarchobot.serving.refusals import ApiError

_OVER = None  # what an Answer is told last

Told = Piece | ApiError | None


@dataclass(frozen=True)
class _Job:
    context: list[int]
    settings: GenerationConfig
    stop: Collection[int]
    tell: Callable[[Told], None]  # from this thread


@dataclass(frozen=True)
class _Cancel:
    job: _Job


@dataclass(frozen=True)
class _Abandon:
    """The end of all requests, with a refusal; `leave`: and of the thread."""

    leave: bool


class Answer:
    """The pieces of one request, in the event loop: iterate over them, and close it in any case."""

    def __init__(self, inbox: asyncio.Queue[Told], cancel: Callable[[], None]) -> None:
        self._inbox, self.close = inbox, cancel

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Piece:
        """Raises ApiError when there was a fault."""
        told = await self._inbox.get()
        if isinstance(told, ApiError):
            raise told
        if told is _OVER:
            raise StopAsyncIteration
        return told


class Worker:
    """A context manager: inside, the thread runs. All methods are for one event loop's thread."""

    def __init__(self, model: Model, waiting: int, rows: int = ROWS) -> None:
        """`rows` requests are answered at a time, `waiting` more wait for their turn."""
        self._model, self._rows = model, rows
        self.most = rows + waiting
        self.under_way = 0  # requests asked and not over; one that was closed counts until the thread let go of it
        self._inbox: SimpleQueue[_Job | _Cancel | _Abandon] = SimpleQueue()
        self._batch = TextBatch(model, rows)
        self._jobs: dict[int, _Job] = {}
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._inbox.put(_Abandon(leave=True))
        self._thread.join()

    def ask(self, context: list[int], settings: GenerationConfig, stop: Collection[int]) -> Answer:
        """As TextBatch.insert. Raises ApiError (429) when too many wait."""
        if self.under_way >= self.most:
            raise ApiError(
                429,
                f"{self.under_way} requests are being answered or wait, and the limit is {self.most}: try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.under_way += 1
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Told] = asyncio.Queue()

        def take(told: Told) -> None:
            self.under_way -= told is _OVER
            inbox.put_nowait(told)

        def tell(told: Told) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(take, told)

        job = _Job(context, settings, stop, tell)
        self._inbox.put(job)
        return Answer(inbox, lambda: self._inbox.put(_Cancel(job)))

    def abandon(self) -> None:
        """Ends what is under way, with a refusal."""
        self._inbox.put(_Abandon(leave=False))

    def _run(self) -> None:
        while True:
            try:
                while (message := self._next()) is not None:
                    if isinstance(message, _Job):
                        self._insert(message)
                    elif isinstance(message, _Cancel):
                        self._cancel(message.job)
                    else:
                        self._drop_all(ApiError(503, "the server is stopping"))
                        if message.leave:
                            mx.clear_streams()  # else MLX ends the program with an error
                            return
                for piece in self._batch.step():
                    job = self._jobs[piece.request]
                    job.tell(piece)
                    if piece.end is not None:
                        del self._jobs[piece.request]
                        job.tell(_OVER)
            except Exception:
                traceback.print_exc()
                self._drop_all(ApiError(500, "the model failed on this request, or on one that was answered beside it"))

    def _next(self) -> _Job | _Cancel | _Abandon | None:
        """The next message; waits for one while there is nothing to compute, else None when there is none."""
        if not self._batch:
            return self._inbox.get()
        with suppress(Empty):
            return self._inbox.get_nowait()
        return None

    def _insert(self, job: _Job) -> None:
        try:
            self._jobs[self._batch.insert(job.context, job.settings, job.stop)] = job
        except Exception:
            traceback.print_exc()
            job.tell(ApiError(500, "the model failed on this request"))
            job.tell(_OVER)

    def _cancel(self, job: _Job) -> None:
        for request, other in list(self._jobs.items()):
            if other is job:
                self._batch.remove(request)
                del self._jobs[request]
                job.tell(_OVER)

    def _drop_all(self, error: ApiError) -> None:
        """A step that failed leaves rows of which nobody knows how far they are: the batch begins anew."""
        for job in self._jobs.values():
            job.tell(error)
            job.tell(_OVER)
        self._jobs.clear()
        self._batch = TextBatch(self._model, self._rows)
