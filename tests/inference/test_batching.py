"""Continuous batching: requests come and go, and each has the tokens that it has alone."""

import random
from typing import Any

import mlx.core as mx
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference import batching
from anarchobot.inference.batching import Batch, Drawn
from anarchobot.inference.generation import stream_token_ids
from anarchobot.inference.model import Model
from tests.inference.conftest import SHAPE, strong_parameters
from tests.tiny import VOCAB

OTHER = ModelConfig(
    vocab_size=VOCAB, n_layers=2, d_model=32, n_heads=4, max_seq_len=48, qk_norm=True, value_residual=True
)


def contexts(count: int) -> list[list[int]]:
    """Of 1 to 20 tokens, and each of another length than the next."""
    draw = random.Random(0)
    return [[draw.randrange(VOCAB) for _ in range(1 + 7 * i % 20)] for i in range(count)]


def tokens_of(drawn: list[Drawn], request: int) -> list[int]:
    return [d.token for d in drawn if d.request == request and d.token is not None]


@pytest.mark.parametrize("shape", [SHAPE, OTHER], ids=["grouped", "qk_norm"])
@pytest.mark.parametrize("chunk", [512, 5])
def test_greedy_ids_of_different_lengths_are_those_of_each_alone(
    shape: ModelConfig, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "PROMPT_TOKENS", chunk)
    params = strong_parameters(shape)
    batch = Batch(params, shape)
    settings = [GenerationConfig(method="greedy", max_new_tokens=3 + 5 * i % 13) for i in range(9)]
    asked = [(batch.insert(c, s, ()), c, s) for c, s in zip(contexts(9), settings, strict=True)]
    drawn: list[Drawn] = []
    while batch:
        drawn += batch.step()
    for request, context, chosen in asked:
        alone = list(stream_token_ids(params, shape, context, chosen, ()))
        assert tokens_of(drawn, request) == alone and len(alone) == chosen.max_new_tokens
        assert [d.end for d in drawn if d.request == request] == [None] * (len(alone) - 1) + ["length"]


@pytest.mark.parametrize("seed", range(6))
def test_requests_come_and_go(model: Model, seed: int) -> None:
    """At random: inserted, removed and stopped between steps, with all methods and penalties, in three rows."""
    choose = random.Random(seed)
    batch = Batch(model.params, SHAPE, rows=3)
    waiting = contexts(12)
    asked: dict[int, tuple[list[int], GenerationConfig, set[int]]] = {}
    removed: set[int] = set()
    drawn: list[Drawn] = []
    while waiting or batch:
        if waiting and choose.random() < 0.4:
            how: dict[str, Any] = {"method": choose.choice(["greedy", "top_k", "nucleus", "min_p", "random"])}
            chosen = GenerationConfig(
                **how, seed=choose.randrange(9), max_new_tokens=choose.randrange(1, 12),
                repetition_penalty=choose.choice([1.0, 1.5]),
            )  # fmt: skip
            context, stop = waiting.pop(), set(choose.choices(range(VOCAB), k=40))
            asked[batch.insert(context, chosen, stop)] = context, chosen, stop
        if asked and choose.random() < 0.1:
            removed.add(request := choose.choice(list(asked)))
            batch.remove(request)
            over_before = len(drawn)
            drawn += batch.step()
            assert not tokens_of(drawn[over_before:], request)
        drawn += batch.step()
    for request, (context, chosen, stop) in asked.items():
        alone = list(stream_token_ids(model.params, SHAPE, context, chosen, stop))
        got = tokens_of(drawn, request)
        assert got == alone[: len(got)]
        if request not in removed:
            assert got == alone
            (end,) = [d.end for d in drawn if d.request == request and d.end]
            assert end == ("length" if len(alone) == chosen.max_new_tokens else "stop")


def test_a_long_prompt_does_not_hold_the_others_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step reads a part of it, and brings a token of everybody else."""
    monkeypatch.setattr(batching, "PROMPT_TOKENS", 8)
    batch = Batch(model.params, SHAPE)
    greedy = GenerationConfig(method="greedy", max_new_tokens=10)
    first = batch.insert([1], greedy, ())
    assert [d.request for d in batch.step()] == [first]
    second = batch.insert(list(range(30)), greedy, ())
    steps = [{d.request for d in batch.step()} for _ in range(4)]
    assert steps == [{first}, {first}, {first}, {first, second}]


def test_max_seq_len_is_the_end_and_a_prompt_must_leave_room(model: Model) -> None:
    batch = Batch(model.params, SHAPE)
    long = GenerationConfig(method="greedy", max_new_tokens=500)
    a, b = batch.insert([1] * 40, long, ()), batch.insert([1], long, ())
    drawn: list[Drawn] = []
    while batch:
        drawn += batch.step()
    assert (len(tokens_of(drawn, a)), len(tokens_of(drawn, b))) == (8, 47)
    with pytest.raises(UserError, match="the prompt is 48 tokens long and the model's max_seq_len is 48"):
        batch.insert([1] * 48, long, ())
    assert len(batch) == 0 and batch.step() == []


def test_it_computes_in_the_parameters_dtype() -> None:
    params = {name: array.astype(mx.bfloat16) for name, array in strong_parameters(SHAPE).items()}
    batch = Batch(params, SHAPE)
    batch.insert([1, 2, 3], GenerationConfig(method="greedy"), ())
    batch.step()
    assert {cache.keys.dtype for cache in batch._caches} == {mx.bfloat16}
