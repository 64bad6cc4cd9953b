"""Completions for GRPO: sampled from the current weights, scored, and laid out as training batches.

Each completion's seed is a function of the run's seed and its position in the data, so a resumed run samples the same
ones. Shapes: n completions, G of each prompt; L = seq_len tokens of a prompt with its completion.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import NamedTuple, Self

import numpy as np

from anarchobot.config.schema import Config, GenerationConfig, ModelConfig
from anarchobot.data.conversations.questions import QuestionSet, TokenizedQuestion
from anarchobot.data.windows import IGNORE
from anarchobot.inference.batching import Batch
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.grpo import group_advantages
from anarchobot.system.sampling_memory import MAX_ROWS
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.training.device import as_device_error
from anarchobot.training.grpo_engine import CompletionBatch, GRPOEngine
from anarchobot.training.rewards import Rewards


class Completion(NamedTuple):
    """`ids` include the token that ended it, unless it is `truncated`."""

    ids: list[int]
    truncated: bool


class Rollouts:
    """Training batches (data/batches.py) of an engine that train on its own completions: the same ones for
    num_iterations steps. `windows` counts the completions of an epoch, as often as they are used."""

    def __init__(
        self, engine: GRPOEngine, questions: QuestionSet, encoder: ChatEncoder, rewards: Rewards, config: Config
    ) -> None:
        self._engine, self._questions, self._config = engine, questions, config
        self._scorer = _Scorer(encoder, rewards, config)
        self.windows = questions.count * config.grpo.num_generations * config.grpo.num_iterations

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def at(self, position: int, micro_batches: int, micro_batch_size: int) -> CompletionBatch:
        """The batch of the step that starts at `position`, counted in completions over the whole run. Raises
        MemoryError and GPUTimeoutError, and UserError if a reward function fails."""
        engine, count, iterations = self._engine, micro_batches * micro_batch_size, self._config.grpo.num_iterations
        held = engine.completions
        if held is None or not held[0] <= position < held[0] + count * iterations or len(held[1].inputs) != count:
            batch = self._sample(position, count).micro_batches(micro_batches, micro_batch_size)
            held = engine.completions = position, engine.with_log_probs(batch).flat()
        return held[1].micro_batches(micro_batches, micro_batch_size)

    def _sample(self, position: int, count: int) -> CompletionBatch:
        """`count` completions, of the prompts that are next at `position`."""
        engine, settings, seed = self._engine, self._config.grpo, self._config.train.seed
        first = position // settings.num_iterations // settings.num_generations
        questions = self._questions.shuffled(first, count // settings.num_generations, seed)
        questions = [question for question in questions for _ in range(settings.num_generations)]
        seeds = [_seed(seed, position + i) for i in range(count)]
        return self._scorer.complete(engine.sampling_weights({**engine.frozen, **engine.params}), questions, seeds)

    def sample(self) -> str:
        """The first prompt of the last step, with its best and its worst completion."""
        assert self._engine.completions is not None
        return self._scorer.describe(self._engine.completions[1].first(self._config.grpo.num_generations))


class ValidationRollouts:
    """Validation batches: the first `limit` held-out questions, each with its most likely completion (greedy)."""

    def __init__(
        self,
        engine: GRPOEngine,
        questions: QuestionSet,
        encoder: ChatEncoder,
        rewards: Rewards,
        config: Config,
        limit: int | None,
    ) -> None:
        self._engine, self._names = engine, rewards.names
        self._questions = questions.questions[:limit]
        self._scorer = _Scorer(encoder, rewards, config)
        self._done: dict[int, CompletionBatch] = {}

    def __len__(self) -> int:
        return (len(self._questions) + MAX_ROWS - 1) // MAX_ROWS

    def __getitem__(self, index: int) -> CompletionBatch:
        """Batch `index`, as [1, n, ...]."""
        questions = self._questions[index * MAX_ROWS : (index + 1) * MAX_ROWS]
        batch = self._scorer.complete(self._engine.sampling_weights(self._engine.weights), questions, None)
        self._done[index] = batch
        return batch.micro_batches(1, len(questions))

    def metrics(self) -> dict[str, float]:
        """Means over the completions of the last validation."""
        batches = list(self._done.values())
        names = [field.name for field in fields(CompletionBatch) if field.name != "segments"]
        joined = CompletionBatch(**{name: np.concatenate([getattr(b, name) for b in batches]) for name in names})
        found = joined.metrics(self._names)
        return {f"val_{name}": x for name, x in found.items() if name != "frac_reward_zero_std"}


class _Scorer:
    """Completes questions and computes rewards."""

    def __init__(self, encoder: ChatEncoder, rewards: Rewards, config: Config) -> None:
        self._tokenizer, self._stop, self._rewards, self._config = (
            encoder.tokenizer,
            encoder.stop_ids(),
            rewards,
            config,
        )

    def complete(
        self, weights: Params, questions: Sequence[TokenizedQuestion], seeds: Sequence[int] | None
    ) -> CompletionBatch:
        """One completion per question, [n, ...], sampled at temperature 1 with `seeds`, or greedily without; questions
        with the same prompt are consecutive. Log-probabilities are 0. Raises MemoryError and GPUTimeoutError."""
        config, count = self._config, len(questions)
        limit = config.grpo.max_completion_length
        if seeds is None:
            settings = [GenerationConfig(method="greedy", max_new_tokens=limit)] * count
        else:
            settings = [GenerationConfig(method="random", temperature=1.0, max_new_tokens=limit, seed=s) for s in seeds]
        try:
            completions = generate(weights, config.model, [q.ids.tolist() for q in questions], settings, self._stop)
        except RuntimeError as error:
            raise as_device_error(error) from None  # the traceback would keep arrays alive
        texts = [self._tokenizer.decode(c.ids if c.truncated else c.ids[:-1]) for c in completions]
        values = self._rewards([q.prompt for q in questions], texts, [q.answer for q in questions])
        rewards = self._rewards.total(values)
        groups = rewards.reshape(-1, 1 if seeds is None else config.grpo.num_generations)
        advantages = np.zeros_like(groups) if seeds is None else group_advantages(groups, config.grpo)

        inputs = np.full((count, config.data.seq_len), self._tokenizer.eod_id, np.int32)
        targets = np.full_like(inputs, IGNORE)
        for i, (question, completion) in enumerate(zip(questions, completions, strict=True)):
            ids, start = [*question.ids.tolist(), *completion.ids], len(question.ids)
            inputs[i, : len(ids) - 1] = ids[:-1]
            targets[i, start - 1 : len(ids) - 1] = ids[start:]
        return CompletionBatch(
            inputs,
            targets,
            old_log_probs=np.zeros(inputs.shape, np.float32),
            ref_log_probs=np.zeros(inputs.shape, np.float32),
            advantages=advantages.reshape(-1).astype(np.float32),
            rewards=rewards.astype(np.float32),
            values=values.astype(np.float32),
            group_std=np.repeat(groups.std(axis=1), groups.shape[1]).astype(np.float32),
            truncated=np.array([completion.truncated for completion in completions], np.float32),
        )

    def describe(self, batch: CompletionBatch) -> str:
        """The prompt of completions [n, ...], with the best and the worst of them."""
        best, worst = int(batch.rewards.argmax()), int(batch.rewards.argmin())
        start = int(np.argmax(batch.targets[0] >= 0))
        lines = [self._tokenizer.decode(batch.inputs[0, : start + 1].tolist()).strip()]
        for i in dict.fromkeys((best, worst)):
            text = self._tokenizer.decode(batch.targets[i][batch.targets[i] >= 0].tolist()).strip()
            lines.append(f"reward {batch.rewards[i]:g}: {text}")
        return "\n".join(lines)


def generate(
    weights: Params,
    model: ModelConfig,
    prompts: Sequence[list[int]],
    settings: Sequence[GenerationConfig],
    stop: Collection[int],
) -> list[Completion]:
    """Completes each prompt up to a token in `stop`, which is part of the completion."""
    batch, ids = Batch(weights, model, MAX_ROWS), [list[int]() for _ in prompts]
    pairs = zip(prompts, settings, strict=True)
    indices = {batch.insert(prompt, one, ()): i for i, (prompt, one) in enumerate(pairs)}
    while batch:
        for output in batch.step():
            assert output.token is not None  # the batch has no stop tokens
            ids[indices[output.request]].append(output.token)
            if output.token in stop:
                batch.remove(output.request)
    return [Completion(found, found[-1] not in stop) for found in ids]


def _seed(seed: int, completion: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/completion/{completion}".encode()).digest()[:4], "big")
