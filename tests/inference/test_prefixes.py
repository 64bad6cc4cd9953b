"""Prompts that start like earlier ones are prefilled from there on, and get the same tokens."""

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference import batching
from anarchobot.inference.batching import Batch
from anarchobot.inference.generation import stream_token_ids
from anarchobot.inference.prefixes import MAX_PROMPTS, KeptPrefixes
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.mlx_lm import architecture
from anarchobot.model.mlx_lm.folder import FolderWeights
from anarchobot.model.mlx_lm.frozen import frozen_weights
from tests.inference.conftest import SHAPE, strong_parameters
from tests.inference.test_batching import OTHER, PHI
from tests.model.mlx_lm.families import CONFIGS, write_model
from tests.tiny import VOCAB

GREEDY = GenerationConfig(method="greedy", max_new_tokens=6)


def run(batch: Batch, prompt: list[int], settings: GenerationConfig = GREEDY) -> tuple[list[int], int]:
    """The tokens of one request, and how many tokens of its prompt were reused."""
    request = batch.insert(prompt, settings, ())
    outputs = []
    while batch:
        outputs += batch.step()
    assert {output.request for output in outputs} == {request} and len({o.reused for o in outputs}) == 1
    return [output.token for output in outputs if output.token is not None], outputs[0].reused


@pytest.mark.parametrize("shape", [SHAPE, OTHER, PHI], ids=["grouped", "qk_norm", "windows, longrope"])
def test_tokens_are_those_without_reuse(shape: ModelConfig) -> None:
    """Random prompts that share starts, one after the other and at once."""
    params, rng = strong_parameters(shape), random.Random(1)
    batch = Batch(params, shape, prefixes=KeptPrefixes(2**20))
    prompts = [[rng.randrange(VOCAB) for _ in range(8)]]
    for _ in range(20):
        start = rng.choice(prompts)[: rng.randrange(1, 30)]
        prompts.append([*start, *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 6)))][:40])
    alone = [list(stream_token_ids(params, shape, prompt, GREEDY, ())) for prompt in prompts]
    found = [run(batch, prompt) for prompt in prompts]
    assert [tokens for tokens, _ in found] == alone
    assert sum(reused > 0 for _, reused in found) > 10
    requests = [batch.insert(prompt, GREEDY, ()) for prompt in prompts]
    outputs = [output for _ in range(200) for output in batch.step()]
    assert [[o.token for o in outputs if o.request == request] for request in requests] == alone


def test_the_next_turn_prefills_the_new_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the tokens that the model computes for each prompt of a conversation."""
    model = SHAPE.model_copy(update={"max_seq_len": 400})
    computed: list[int] = []
    last_logits = Batch._last_logits

    def counted(self: Batch, tokens: mx.array, caches: Any, rows: Any) -> mx.array:
        computed.append(tokens.size)
        return last_logits(self, tokens, caches, rows)

    monkeypatch.setattr(Batch, "_last_logits", counted)
    batch, prompt = Batch(strong_parameters(model), model, prefixes=KeptPrefixes(2**24)), list(range(40))
    for turn in range(8):
        computed.clear()
        answer, reused = run(batch, prompt)
        new = 40 if turn == 0 else len(answer) + 5
        assert (sum(computed) - (len(answer) - 1), reused) == (new, len(prompt) - new)
        prompt = [*prompt, *answer, *range(turn, turn + 5)]


def test_without_memory_nothing_is_kept() -> None:
    batch = Batch(strong_parameters(SHAPE), SHAPE)
    assert [run(batch, [1, 2, 3, 4])[1] for _ in range(2)] == [0, 0]


def test_a_repeated_prompt_computes_its_last_token() -> None:
    batch = Batch(strong_parameters(SHAPE), SHAPE, prefixes=KeptPrefixes(2**20))
    first, again = run(batch, [1, 2, 3, 4]), run(batch, [1, 2, 3, 4])
    assert first[0] == again[0] and (first[1], again[1]) == (0, 3)


def test_long_rows_do_not_use_keys_of_short_ones() -> None:
    """longrope rotates them by other frequencies: the second request is longer than 20 tokens, the first is not."""
    params = strong_parameters(PHI)
    batch, long = Batch(params, PHI, prefixes=KeptPrefixes(2**20)), GREEDY.model_copy(update={"max_new_tokens": 20})
    prompt = [5, 6, 7, 8, 9]
    assert run(batch, prompt)[1] == 0 and run(batch, prompt)[1] == 4
    tokens, reused = run(batch, prompt, long)
    assert (tokens, reused) == (list(stream_token_ids(params, PHI, prompt, long, ())), 0)


@pytest.mark.parametrize("name", ["state space", "hybrid"])
def test_states_are_reused_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path, CONFIGS[name])
    model = ModelConfig(architecture="mlx_lm", **architecture.from_hf(CONFIGS[name], "config.json"))
    weights = FolderWeights(folder)
    params: Params = frozen_weights(weights, weights.note(model), mx.float32)
    batch = Batch(params, model, prefixes=KeptPrefixes(2**24))
    start = [5, 6, 7, 8]
    for prompt, expected in ((start, 0), ([*start, 9, 10], 4), (start, 0), ([5, 6, 1], 0), ([*start, 9, 11], 4)):
        alone = list(stream_token_ids(params, model, prompt, GREEDY, ()))
        assert run(batch, prompt) == (alone, expected), prompt


def test_the_longest_unused_leave_first(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(strong_parameters(SHAPE), SHAPE)
    caches = batch._forward.make_caches(batch._params, SHAPE)
    batch._last_logits(mx.array([[1, 2, 3]]), caches, [batch_row(batch)])
    size = sum(cache.nbytes for cache in caches)
    kept = KeptPrefixes(2 * size + 1)
    kept.keep([1, 2, 3], False, caches)
    kept.keep([4, 5, 6], False, caches)
    assert kept.find([1, 2, 9], False)[1] == 2  # used, so it stays
    kept.keep([7, 8, 9], False, caches)
    assert [kept.find([*start, 0], False)[1] for start in ([1, 2, 3], [4, 5, 6], [7, 8, 9])] == [3, 0, 3]
    kept.keep([1, 2, 3, 4], False, caches)  # in place of its start
    assert [len(entry.ids) for entry in kept._kept] == [3, 4] and kept.find([7, 8, 0], True)[1] == 0
    small = KeptPrefixes(size - 1)
    small.keep([1, 2, 3], False, caches)
    assert small._kept == []
    many = KeptPrefixes(2**40)
    for i in range(MAX_PROMPTS + 5):
        many.keep([i, i], False, caches)
    assert len(many._kept) == MAX_PROMPTS and many._kept[0].ids[0] == 5


def batch_row(batch: Batch) -> Any:
    batch.insert([1, 2, 3], GREEDY, ())
    return batch._waiting[0]


def test_a_prompt_in_chunks_reuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "PREFILL_TOKENS", 4)
    batch, prompt = Batch(strong_parameters(SHAPE), SHAPE, prefixes=KeptPrefixes(2**20)), list(range(30))
    alone = list(stream_token_ids(batch._params, SHAPE, prompt, GREEDY, ()))
    assert run(batch, prompt) == (alone, 0)
    assert run(batch, prompt) == (alone, 29)
