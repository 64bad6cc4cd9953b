"""The model thread, which owns the batch and all arrays. Requests arrive through a queue; generated text is sent back
to the event loop chunk by chunk."""

import asyncio
import threading
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.batching import MAX_ROWS
from anarchobot.inference.generation import TextBatch, TextChunk
from anarchobot.inference.grammar import Grammar
from anarchobot.inference.model import Model
from anarchobot.inference.prefixes import KeptPrefixes
from anarchobot.inference.speculative import Draft
from anarchobot.serving.errors import ApiError

_DONE = None  # the last event of a request

Event = TextChunk | ApiError | None


class Prompt(NamedTuple):
    """A tokenized prompt and the ids that end its continuation, which follows `grammar`. `after_space`, `top_logprobs`
    and `shown`: see TextBatch.insert."""

    ids: list[int]
    stop_ids: Collection[int]
    after_space: bool = False
    grammar: Grammar | None = None
    top_logprobs: int | None = None
    shown: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class _Job:
    prompt: Prompt
    settings: GenerationConfig
    send: Callable[[Event], None]  # called by the model thread


class GenerationStream:
    """A request's places, one for each of its answers, and then their generated text, for the event loop. Start it and
    iterate over it; always close it. The `request` of a chunk is the number of its answer."""

    def __init__(self, worker: "Worker", answers: int) -> None:
        self._worker, self._answers, self._running = worker, answers, answers
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._jobs: list[_Job] = []
        self._is_closed = False

    def start(self, prompt: Prompt, settings: Sequence[GenerationConfig]) -> None:
        """`settings`: of each answer."""
        self._jobs = [_Job(prompt, chosen, self._sender(i)) for i, chosen in enumerate(settings)]
        for job in self._jobs:
            self._worker.insert(job)

    def _sender(self, answer: int) -> Callable[[Event], None]:
        loop = asyncio.get_running_loop()

        def receive(event: Event) -> None:
            self._worker.active_requests -= event is _DONE
            self._events.put_nowait(event._replace(request=answer) if isinstance(event, TextChunk) else event)

        def send(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(receive, event)

        return send

    def cancel(self, answer: int) -> None:
        """Ends one of the answers."""
        self._worker.cancel(self._jobs[answer])

    def close(self) -> None:
        """Cancels the request, and frees its places at once if it was not started."""
        for job in self._jobs:
            self._worker.cancel(job)
        if not self._jobs and not self._is_closed:
            self._worker.active_requests -= self._answers
        self._is_closed = True

    def __aiter__(self) -> "GenerationStream":
        return self

    async def __anext__(self) -> TextChunk:
        """Raises ApiError if generation fails."""
        while self._running:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            if event is not _DONE:
                return event
            self._running -= 1
        raise StopAsyncIteration


class Worker:
    """A context manager that runs the model thread. Call all methods from the thread of one event loop."""

    def __init__(
        self,
        model: Model,
        queue_size: int,
        rows: int = MAX_ROWS,
        *,
        prefix_bytes: int = 0,
        draft: Draft | None = None,
    ) -> None:
        """Generates for `rows` requests at once; `queue_size` more may wait. `prefix_bytes`: see KeptPrefixes; `draft`:
        see SpeculativeBatch."""
        self._model, self._rows, self._prefix_bytes, self._draft = model, rows, prefix_bytes, draft
        self.max_requests = rows + queue_size
        self.active_requests = 0  # opened and not finished; a closed one counts until the thread has released it
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()  # run by the model thread
        self._stopped = False
        self._batch = self._new_batch()
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

    def open(self, answers: int = 1) -> GenerationStream:
        """Takes a place for each answer of a request, before its prompt is tokenized. Raises ApiError (429) if there
        are not as many, and (400) if there never are."""
        if answers > self.max_requests:
            raise ApiError(400, f"n: {answers} exceeds the server's limit of {self.max_requests}", "n")
        if self.active_requests + answers > self.max_requests:
            raise ApiError(
                429,
                f"too many requests: {self.active_requests} active, the limit is {self.max_requests}; try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.active_requests += answers
        return GenerationStream(self, answers)

    def insert(self, job: _Job) -> None:
        self._tasks.put(lambda: self._insert(job))

    def cancel(self, job: _Job) -> None:
        """Does nothing if the job is finished."""
        self._tasks.put(lambda: self._cancel(job))

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
            prompt, size = job.prompt, self._model.config.vocab_size
            request = self._batch.insert(
                prompt.ids,
                job.settings,
                prompt.stop_ids,
                after_space=prompt.after_space,
                constraint=None if prompt.grammar is None else prompt.grammar.start(prompt.stop_ids, size),
                top_logprobs=prompt.top_logprobs,
                shown=prompt.shown,
            )
            self._jobs[request] = job
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
        self._batch = self._new_batch()

    def _new_batch(self) -> TextBatch:
        return TextBatch(self._model, self._rows, prefixes=KeptPrefixes(self._prefix_bytes), draft=self._draft)
