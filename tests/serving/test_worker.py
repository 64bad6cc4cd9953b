"""The model thread: errors reach the affected requests only, and it keeps running."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.generation import TextBatch, generate, prompt_ids
from anarchobot.inference.model import Model, load_model
from anarchobot.inference.speculative import Draft
from anarchobot.serving.errors import ApiError
from anarchobot.serving.worker import GenerationStream, Prompt, Worker
from tests.inference.conftest import family_model
from tests.serving.conftest import run_server

GREEDY = GenerationConfig(method="greedy", max_new_tokens=8, prompt="Hello")
LONG = GREEDY.model_copy(update={"max_new_tokens": 4000})


def run(model: Model, body: Callable[[Worker], Awaitable[None]]) -> None:
    with Worker(model, queue_size=20) as worker:
        asyncio.run(asyncio.wait_for(body(worker), 200))


def submit(worker: Worker, model: Model, settings: GenerationConfig = GREEDY) -> GenerationStream:
    generation = worker.open()
    generation.start(Prompt(prompt_ids(model, settings.prompt), {model.tokenizer.eod_id}), [settings])
    return generation


def test_a_draft_model_proposes_while_one_answer_is_generated(model: Model) -> None:
    """Answers are those without it, alone and together."""
    draft = Draft(model)

    async def body(worker: Worker) -> None:
        for number in (1, 3, 1):
            settings = [GREEDY.model_copy(update={"prompt": f"Hello {i}", "max_new_tokens": 30}) for i in range(number)]
            found = await asyncio.gather(*(text_of(submit(worker, model, one)) for one in settings))
            assert list(found) == [generate(model, one) for one in settings]

    with Worker(model, queue_size=20, draft=draft) as worker:
        asyncio.run(asyncio.wait_for(body(worker), 200))
    assert draft.accepted == draft.proposed > 20


async def text_of(answer: GenerationStream) -> str:
    return "".join([chunk.text async for chunk in answer])


async def wait_until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def test_an_error_on_insert_fails_that_request_only(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, GREEDY)
    insert = TextBatch.insert

    def broken(self: TextBatch, context: list[int], settings: GenerationConfig, stop: Any, **options: Any) -> int:
        if settings.seed == 13:
            raise RuntimeError("no luck")
        return insert(self, context, settings, stop, **options)

    monkeypatch.setattr(TextBatch, "insert", broken)

    async def body(worker: Worker) -> None:
        streams = [submit(worker, model, GREEDY.model_copy(update={"seed": seed})) for seed in (12, 13, 14)]
        found = await asyncio.gather(*map(text_of, streams), return_exceptions=True)
        assert found[0] == found[2] == expected
        assert isinstance(found[1], ApiError) and found[1].status == 500
        await wait_until(lambda: worker.active_requests == 0)

    run(model, body)
    assert "no luck" in capsys.readouterr().err


def test_an_error_in_a_step_fails_the_batch_but_no_later_request(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, GREEDY)
    step, broken = TextBatch.step, [True]

    def failing(self: TextBatch) -> Any:
        if len(self) == 2 and broken:
            broken.clear()
            raise RuntimeError("out of luck")
        return step(self)

    monkeypatch.setattr(TextBatch, "step", failing)

    async def body(worker: Worker) -> None:
        both = [submit(worker, model, LONG), submit(worker, model, LONG)]
        found = await asyncio.gather(*map(text_of, both), return_exceptions=True)
        assert [error.status for error in found if isinstance(error, ApiError)] == [500, 500]
        assert await text_of(submit(worker, model)) == expected
        await wait_until(lambda: worker.active_requests == 0)

    run(model, body)
    assert "out of luck" in capsys.readouterr().err


def test_close_frees_the_slot_and_is_idempotent(model: Model) -> None:
    async def body(worker: Worker) -> None:
        first, second = submit(worker, model, LONG), submit(worker, model, LONG)
        await anext(aiter(first))
        first.close()
        first.close()
        await wait_until(lambda: worker.active_requests == 1)
        await anext(aiter(second))
        second.close()
        await wait_until(lambda: worker.active_requests == 0)
        done = submit(worker, model)
        assert await text_of(done) == generate(model, GREEDY)
        done.close()
        await wait_until(lambda: worker.active_requests == 0)

    run(model, body)


def test_abort_all_fails_active_requests(model: Model) -> None:
    async def body(worker: Worker) -> None:
        long = [submit(worker, model, LONG) for _ in range(17)]  # the last one is queued
        await anext(aiter(long[0]))
        worker.abort_all()
        found = await asyncio.gather(*map(text_of, long), return_exceptions=True)
        assert [error.status for error in found if isinstance(error, ApiError)] == [503] * 17
        await wait_until(lambda: worker.active_requests == 0)  # after the error event

    run(model, body)


def test_requests_beyond_the_queue_are_rejected(model: Model) -> None:
    async def body(worker: Worker) -> None:
        answers = [submit(worker, model, LONG) for _ in range(worker.max_requests)]
        with pytest.raises(ApiError) as raised:
            submit(worker, model)
        assert raised.value.status == 429 and "36" in raised.value.message
        for answer in answers:
            answer.close()
        await wait_until(lambda: worker.active_requests == 0)
        assert await text_of(submit(worker, model)) == generate(model, GREEDY)

    run(model, body)


def test_both_kinds_of_completion_stop_at_the_ends_of_a_foreign_model(tmp_path: Path) -> None:
    foreign, _ = load_model(family_model("phi3", tmp_path / "hf", "<|assistant|>"))  # its second end
    with run_server(foreign) as server:
        for path, prompt in (
            ("/v1/completions", {"prompt": "Hi"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ):
            status, answer = server.post(path, {"model": "tiny", "max_tokens": 5, **prompt})
            assert status == 200 and answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == 0
