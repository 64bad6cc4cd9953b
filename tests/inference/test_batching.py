"""Continuous batching: each request gets the same tokens as alone, whichever requests join and leave."""

import random
from typing import Any

import mlx.core as mx
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference import batching
from anarchobot.inference.batching import Batch, StepOutput
from anarchobot.inference.generation import stream_token_ids
from anarchobot.inference.model import Model
from tests.inference.conftest import SHAPE, strong_parameters
from tests.tiny import VOCAB

OTHER = ModelConfig(vocab_size=VOCAB, n_layers=2, d_model=32, n_heads=4, max_seq_len=48, qk_norm=True)

PHI = ModelConfig(
    vocab_size=VOCAB, n_layers=2, d_model=32, n_heads=4, max_seq_len=48, sliding_window=6,
    layer_types=["full_attention", "sliding_attention"], rope_scaling={
        "type": "longrope", "factor": 4.0, "original_max_seq_len": 20, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
)  # fmt: skip


METHODS: tuple[Any, ...] = ("greedy", "top_k", "nucleus", "min_p", "random", "combined")


def contexts(count: int) -> list[list[int]]:
    """Prompts of 1 to 20 tokens; neighbors differ in length."""
    rng = random.Random(0)
    return [[rng.randrange(VOCAB) for _ in range(1 + 7 * i % 20)] for i in range(count)]


def tokens_of(outputs: list[StepOutput], request: int) -> list[int]:
    return [o.token for o in outputs if o.request == request and o.token is not None]


@pytest.mark.parametrize("shape", [SHAPE, OTHER, PHI], ids=["grouped", "qk_norm", "windows, longrope"])
@pytest.mark.parametrize("chunk", [512, 5])
def test_greedy_ids_equal_those_of_each_request_alone(
    shape: ModelConfig, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "PREFILL_TOKENS", chunk)
    params = strong_parameters(shape)
    batch = Batch(params, shape)
    settings = [GenerationConfig(method="greedy", max_new_tokens=3 + 5 * i % 13) for i in range(9)]
    requests = [(batch.insert(c, s, ()), c, s) for c, s in zip(contexts(9), settings, strict=True)]
    outputs: list[StepOutput] = []
    while batch:
        outputs += batch.step()
    for request, context, chosen in requests:
        alone = list(stream_token_ids(params, shape, context, chosen, ()))
        assert tokens_of(outputs, request) == alone and len(alone) == chosen.max_new_tokens
        assert [o.finish_reason for o in outputs if o.request == request] == [None] * (len(alone) - 1) + ["length"]


@pytest.mark.parametrize("seed", range(6))
def test_requests_join_and_leave(model: Model, seed: int) -> None:
    """Random inserts, removals and stops between steps, with all methods and penalties, in a batch of three rows."""
    rng = random.Random(seed)
    batch = Batch(model.params, SHAPE, max_rows=3)
    waiting = contexts(12)
    requests: dict[int, tuple[list[int], GenerationConfig, set[int]]] = {}
    removed: set[int] = set()
    outputs: list[StepOutput] = []
    while waiting or batch:
        if waiting and rng.random() < 0.4:
            method: dict[str, Any] = {
                "method": rng.choice(["greedy", "top_k", "nucleus", "min_p", "random", "combined"])
            }
            chosen = GenerationConfig(
                **method, seed=rng.randrange(9), max_new_tokens=rng.randrange(1, 12),
                repetition_penalty=rng.choice([1.0, 1.5]), presence_penalty=rng.choice([0.0, 2.0]),
                frequency_penalty=rng.choice([0.0, 1.0]),
            )  # fmt: skip
            context, stop = waiting.pop(), set(rng.choices(range(VOCAB), k=40))
            requests[batch.insert(context, chosen, stop)] = context, chosen, stop
        if requests and rng.random() < 0.1:
            removed.add(request := rng.choice(list(requests)))
            batch.remove(request)
            before = len(outputs)
            outputs += batch.step()
            assert not tokens_of(outputs[before:], request)
        outputs += batch.step()
    for request, (context, chosen, stop) in requests.items():
        alone = list(stream_token_ids(model.params, SHAPE, context, chosen, stop))
        got = tokens_of(outputs, request)
        assert got == alone[: len(got)]
        if request not in removed:
            assert got == alone
            (reason,) = [o.finish_reason for o in outputs if o.request == request and o.finish_reason]
            assert reason == ("length" if len(alone) == chosen.max_new_tokens else "stop")


def test_a_long_prompt_does_not_stall_other_requests(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step prefills a part of it and generates a token for every other request."""
    monkeypatch.setattr(batching, "PREFILL_TOKENS", 8)
    batch = Batch(model.params, SHAPE)
    greedy = GenerationConfig(method="greedy", max_new_tokens=10)
    first = batch.insert([1], greedy, ())
    assert [o.request for o in batch.step()] == [first]
    second = batch.insert(list(range(30)), greedy, ())
    steps = [{o.request for o in batch.step()} for _ in range(4)]
    assert steps == [{first}, {first}, {first}, {first, second}]


def test_generation_ends_at_max_seq_len_and_prompts_must_leave_room(model: Model) -> None:
    batch = Batch(model.params, SHAPE)
    long = GenerationConfig(method="greedy", max_new_tokens=500)
    a, b = batch.insert([1] * 40, long, ()), batch.insert([1], long, ())
    outputs: list[StepOutput] = []
    while batch:
        outputs += batch.step()
    assert (len(tokens_of(outputs, a)), len(tokens_of(outputs, b))) == (8, 47)
    with pytest.raises(UserError, match="the prompt has 48 tokens, but the model's max_seq_len is 48"):
        batch.insert([1] * 48, long, ())
    assert len(batch) == 0 and batch.step() == []


def test_computes_in_the_dtype_of_the_parameters() -> None:
    params = {name: array.astype(mx.bfloat16) for name, array in strong_parameters(SHAPE).items()}
    batch = Batch(params, SHAPE)
    batch.insert([1, 2, 3], GenerationConfig(method="greedy"), ())
    batch.step()
    assert {cache.keys.dtype for cache in batch._caches} == {mx.bfloat16}
