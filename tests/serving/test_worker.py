"""The thread that computes: a fault is told to whom it concerns, and it goes on."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.generation import TextBatch, generate, prompt_ids
from anarchobot.inference.model import Model
from anarchobot.serving.refusals import ApiError
from anarchobot.serving.worker import Answer, Worker

GREEDY = GenerationConfig(method="greedy", max_new_tokens=8, prompt="Hello")
LONG = GREEDY.model_copy(update={"max_new_tokens": 4000})


def inside(model: Model, body: Callable[[Worker], Awaitable[None]]) -> None:
    with Worker(model, waiting=20) as worker:
        asyncio.run(asyncio.wait_for(body(worker), 200))


def ask(worker: Worker, model: Model, settings: GenerationConfig = GREEDY) -> Answer:
    return worker.ask(prompt_ids(model, settings.prompt), settings, {model.tokenizer.eod_id})


async def text_of(answer: Answer) -> str:
    return "".join([piece.text async for piece in answer])


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def test_a_fault_at_the_start_is_that_requests_alone(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, GREEDY)
    insert = TextBatch.insert

    def broken(self: TextBatch, context: list[int], settings: GenerationConfig, stop: Any) -> int:
        if settings.seed == 13:
            raise RuntimeError("no luck")
        return insert(self, context, settings, stop)

    monkeypatch.setattr(TextBatch, "insert", broken)

    async def body(worker: Worker) -> None:
        asked = [ask(worker, model, GREEDY.model_copy(update={"seed": seed})) for seed in (12, 13, 14)]
        found = await asyncio.gather(*map(text_of, asked), return_exceptions=True)
        assert found[0] == found[2] == expected
        assert isinstance(found[1], ApiError) and found[1].status == 500
        await until(lambda: worker.under_way == 0)

    inside(model, body)
    assert "no luck" in capsys.readouterr().err


def test_a_fault_while_writing_ends_those_under_way_and_no_later_one(
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
        both = [ask(worker, model, LONG), ask(worker, model, LONG)]
        found = await asyncio.gather(*map(text_of, both), return_exceptions=True)
        assert [error.status for error in found if isinstance(error, ApiError)] == [500, 500]
        assert await text_of(ask(worker, model)) == expected
        await until(lambda: worker.under_way == 0)

    inside(model, body)
    assert "out of luck" in capsys.readouterr().err


def test_closing_lets_go_at_once_and_closing_again_does_nothing(model: Model) -> None:
    async def body(worker: Worker) -> None:
        first, second = ask(worker, model, LONG), ask(worker, model, LONG)
        await anext(aiter(first))
        first.close()
        first.close()
        await until(lambda: worker.under_way == 1)
        await anext(aiter(second))
        second.close()
        await until(lambda: worker.under_way == 0)
        done = ask(worker, model)
        assert await text_of(done) == generate(model, GREEDY)
        done.close()
        await until(lambda: worker.under_way == 0)

    inside(model, body)


def test_at_the_end_those_under_way_are_told(model: Model) -> None:
    async def body(worker: Worker) -> None:
        long = [ask(worker, model, LONG) for _ in range(17)]  # the last one waits
        await anext(aiter(long[0]))
        worker.abandon()
        found = await asyncio.gather(*map(text_of, long), return_exceptions=True)
        assert [error.status for error in found if isinstance(error, ApiError)] == [503] * 17
        await until(lambda: worker.under_way == 0)  # the refusal comes first, then the end

    inside(model, body)


def test_more_than_may_wait_are_sent_away(model: Model) -> None:
    async def body(worker: Worker) -> None:
        answers = [ask(worker, model, LONG) for _ in range(worker.most)]
        with pytest.raises(ApiError) as raised:
            ask(worker, model)
        assert raised.value.status == 429 and "36" in raised.value.message
        for answer in answers:
            answer.close()
        await until(lambda: worker.under_way == 0)
        assert await text_of(ask(worker, model)) == generate(model, GREEDY)

    inside(model, body)
