"""Completions of GRPO: sampled by seed, scored in groups, and laid out as training batches."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anarchobot.config.schema import Config, GenerationConfig
from anarchobot.data.conversations.questions import QuestionSet, TokenizedQuestion
from anarchobot.inference.generation import stream_token_ids
from anarchobot.inference.rollouts import Rollouts, ValidationRollouts, generate
from anarchobot.model.grpo import group_advantages
from anarchobot.tokenizers.conversation import Message
from anarchobot.training.grpo_engine import GRPOEngine
from anarchobot.training.rewards import Rewards
from tests.tokenizers.templates import ChatFixture, MakeChat
from tests.tokenizers.templates import make_chat as make_chat

PROMPTS = ("one", "two", "three", "four", "five")
G, LIMIT = 2, 6


@pytest.fixture
def chat(make_chat: MakeChat) -> ChatFixture:
    return make_chat("bytelevel", "qwen2")


def config(chat: ChatFixture, **grpo: Any) -> Config:
    vocab = chat.encoder("answer").tokenizer.vocab_size
    return Config.model_validate(
        {
            "model": {"vocab_size": vocab, "n_layers": 1, "d_model": 32, "n_heads": 2, "dropout": 0.0},
            "data": {"seq_len": 40},
            "train": {"device": "cpu", "micro_batch_size": 2, "grad_accum_steps": 2, "lr": 0.01, "cpu_threads": 1},
            "grpo": {
                "rewards": ["regex"], "regex": "[a-m]", "num_generations": G, "max_completion_length": LIMIT, **grpo
            },
        }
    )  # fmt: skip


def questions(chat: ChatFixture) -> QuestionSet:
    prompts = [(Message("user", text),) for text in PROMPTS]
    encoder = chat.encoder("answer")
    return QuestionSet([TokenizedQuestion(encoder.encode_prompt(p), p, p[0].content) for p in prompts])


@pytest.fixture
def rollouts(chat: ChatFixture) -> Callable[..., tuple[GRPOEngine, Rollouts]]:
    def make(**grpo: Any) -> tuple[GRPOEngine, Rollouts]:
        chosen = config(chat, **grpo)
        engine = GRPOEngine(chosen)
        return engine, Rollouts(engine, questions(chat), chat.encoder("answer"), Rewards(chosen.grpo), chosen)

    return make


def test_batches_of_groups(chat: ChatFixture, rollouts: Callable[..., tuple[GRPOEngine, Rollouts]]) -> None:
    """Each prompt with its completions, up to the token that ends them or the limit."""
    _, source = rollouts(num_iterations=2, beta=0.1)
    stop, tokenizer = chat.encoder("answer").stop_ids(), chat.encoder("answer").tokenizer
    batch = source.at(0, 2, 2)
    assert batch.inputs.shape == (2, 2, 40) and source.windows == len(PROMPTS) * G * 2
    flat, order = batch.flat(), questions(chat).shuffled(0, 2, 0)
    for i in range(4):
        prompt = order[i // G].ids
        start, length = len(prompt), int(flat.lengths[i])
        ids = [*flat.inputs[i, : start + length - 1].tolist(), flat.targets[i, start + length - 2]]
        assert ids[:start] == prompt.tolist() and 1 <= length <= LIMIT
        assert (flat.targets[i, : start - 1] < 0).all() and (flat.targets[i, start + length - 1 :] < 0).all()
        assert flat.targets[i, start - 1 : start + length - 1].tolist() == ids[start:]
        assert flat.truncated[i] == (ids[-1] not in stop) and not stop & set(ids[start:-1])
        found = any("a" <= c <= "m" for c in tokenizer.decode(ids[start:]))
        assert flat.rewards[i] == found
    np.testing.assert_allclose(
        flat.advantages.reshape(2, G), group_advantages(flat.rewards.reshape(2, G), config(chat).grpo)
    )
    assert ((flat.old_log_probs < 0) == (flat.targets >= 0)).all()
    np.testing.assert_array_equal(flat.old_log_probs, flat.ref_log_probs)
    assert len({tuple(row) for row in flat.targets.tolist()}) > 1


def test_completions_are_used_num_iterations_times(rollouts: Callable[..., tuple[GRPOEngine, Rollouts]]) -> None:
    engine, source = rollouts(num_iterations=3)
    first = source.at(0, 2, 2)
    engine.train_step(first, 1, 0.05, 0.9)
    for position in (4, 8):
        np.testing.assert_array_equal(source.at(position, 2, 2).targets, first.targets)
        np.testing.assert_array_equal(source.at(position, 4, 1).flat().old_log_probs, first.flat().old_log_probs)
    following = source.at(12, 2, 2)
    assert (following.inputs != first.inputs).any()
    assert engine.completions is not None and engine.completions[0] == 12
    again = rollouts(num_iterations=3)[1]
    np.testing.assert_array_equal(again.at(0, 2, 2).targets, first.targets)
    assert (again.at(8, 2, 2).targets == first.targets).all()
    assert (again.at(24, 2, 2).inputs != first.inputs).any()


def test_a_batch_that_does_not_fit_the_step_is_sampled_again(
    rollouts: Callable[..., tuple[GRPOEngine, Rollouts]],
) -> None:
    """After a rollback, which keeps the position, and with another batch size."""
    engine, source = rollouts(num_iterations=2)
    source.at(0, 2, 2)
    assert source.at(4, 1, 2).inputs.shape == (1, 2, 40)
    assert engine.completions is not None and engine.completions[0] == 4
    source.at(100, 2, 2)
    assert engine.completions[0] == 100
    source.at(96, 2, 2)
    assert engine.completions[0] == 96


def test_generate_ends_at_stop_tokens_and_includes_them(chat: ChatFixture) -> None:
    chosen = config(chat)
    weights = GRPOEngine(chosen).weights
    prompts = [q.ids.tolist() for q in questions(chat).questions]
    settings = [GenerationConfig(method="random", temperature=1.0, max_new_tokens=20, seed=i) for i in range(5)]
    free = [list(stream_token_ids(weights, chosen.model, p, s, ())) for p, s in zip(prompts, settings, strict=True)]
    stop = {free[0][3], free[1][7]}
    found = generate(weights, chosen.model, prompts, settings, stop)
    for ids, completion in zip(free, found, strict=True):
        end = next((i + 1 for i, token in enumerate(ids) if token in stop), None)
        assert completion.ids == ids[:end] and completion.truncated == (end is None)


def test_validation_is_greedy_and_counts_each_question_once(chat: ChatFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anarchobot.inference.rollouts.MAX_ROWS", 2)
    chosen = config(chat)
    engine = GRPOEngine(chosen)
    source = ValidationRollouts(engine, questions(chat), chat.encoder("answer"), Rewards(chosen.grpo), chosen, 3)
    assert len(source) == 2
    batches = [source[i] for i in range(2)]
    assert [b.inputs.shape for b in batches] == [(1, 2, 40), (1, 1, 40)]
    rewards = np.concatenate([b.rewards[0] for b in batches])
    assert source.metrics()["val_reward"] == pytest.approx(float(rewards.mean()))
    prompt = questions(chat).questions[0].ids.tolist()
    greedy = GenerationConfig(method="greedy", max_new_tokens=LIMIT)
    ids = list(stream_token_ids(engine.weights, chosen.model, prompt, greedy, chat.encoder("answer").stop_ids()))
    assert batches[0].targets[0, 0][batches[0].targets[0, 0] >= 0].tolist()[: len(ids)] == ids


def test_samples_show_the_best_and_the_worst_completion(
    chat: ChatFixture, rollouts: Callable[..., tuple[GRPOEngine, Rollouts]]
) -> None:
    engine, source = rollouts(num_generations=4, scale_rewards="none")
    batch = source.at(0, 2, 2).flat()
    engine.completions = 0, batch.map(lambda x: x)
    object.__setattr__(engine.completions[1], "rewards", np.array([0.0, 0.5, 1.0, 0.25], np.float32))
    prompt, best, worst = source.sample().rsplit("\nreward ", 2)
    assert questions(chat).shuffled(0, 1, 0)[0].answer in prompt
    assert best.startswith("1: ") and worst.startswith("0: ")
