"""The MLX step on labeled answers (model/kto.py). Shapes: A micro-batches of B answers, b answers per worker, L
tokens."""

from contextlib import suppress
from typing import ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.data.conversations.labeled_answers import LabeledBatch
from anarchobot.data.windows import Batch
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.kto import LabeledAnswers, kto
from anarchobot.model.step_options import Objective
from anarchobot.system.gpu_watchdog import GPUTimeoutError
from anarchobot.training.mlx_engine import Metrics, MicroBatchSlice
from anarchobot.training.preference_engine import PreferenceEngine, by_sequence
from anarchobot.training.ranks import SINGLE_PROCESS, Ranks


class KTOEngine(PreferenceEngine):
    """Trains on LabeledBatches. The loss is the mean over answers.

    The KL divergence from the reference model is estimated before the gradients, from the prompts of the whole step
    with answers to other prompts; so it does not depend on the division into micro-batches, threads and ranks. In
    validation, it is estimated for each micro-batch.
    """

    METRICS: ClassVar[tuple[str, ...]] = (
        *("desirable", "desirable_reward", "undesirable_reward", "reward_accuracy"),
        *("desirable_log_prob", "undesirable_log_prob", "kl"),
    )
    _kl = 0.0

    def _accumulate_gradients(self, batch: Batch, step: int, scale: float) -> tuple[list[float], Params]:
        self._kl = self._estimate_kl(batch, {**self.frozen, **self.params}, self._ranks)
        return super()._accumulate_gradients(batch, step, scale)

    def _evaluate_batch(self, batch: Batch) -> Metrics:
        self._kl = self._estimate_kl(batch, self.weights, SINGLE_PROCESS)
        return super()._evaluate_batch(batch)

    def _estimate_kl(self, batch: Batch, weights: Params, ranks: Ranks) -> float:
        """The mean log-ratio of the answers to other prompts, over all ranks, and at least 0. Without dropout."""
        assert isinstance(batch, LabeledBatch)
        try:
            log_probs = self._sequence_log_probs(weights, batch.inputs[:, :, 1:], batch.targets[:, :, 1:])
        except (MemoryError, GPUTimeoutError):
            with suppress(MemoryError):
                ranks.all_gather_scalars(None)  # makes all ranks raise it
            raise
        log_ratios = (log_probs[..., 0] - batch.ref_log_probs[..., 1])[batch.indices >= 0]
        total, count = ranks.all_reduce_scalars([log_ratios.sum(dtype=np.float64), log_ratios.size]).tolist()
        return max(0.0, float(total / max(1, count)))

    def _slice(self, batch: Batch, i: int, worker: int) -> MicroBatchSlice:
        """A worker's answers of micro-batch `i`: inputs and targets [b, L] and, as columns of [b, 3], log-probabilities
        of the reference model, labels and the KL divergence."""
        assert isinstance(batch, LabeledBatch)
        inputs, targets = self._sequences(batch.inputs[:, :, :1], batch.targets[:, :, :1], i, worker)
        reference, labels = batch.ref_log_probs[i, :, 0], batch.labels[i]
        columns: npt.NDArray[np.float32] = np.stack([reference, labels, np.full_like(reference, self._kl)], axis=1)
        return inputs, targets, mx.array(self._part(columns, worker))

    def _objective(self, targets: mx.array, extra: mx.array | None) -> Objective:
        assert extra is not None
        real = mx.any(targets >= 0, axis=1)  # [b]: a batch may be padded with empty rows
        reference, desirable, kl = (extra[:, i] for i in range(3))

        def objective(log_probs: mx.array) -> tuple[mx.array, mx.array]:
            result = kto(LabeledAnswers(log_probs, reference, desirable, kl), self._config.preference)
            rewards = [desirable * result.rewards, (1 - desirable) * result.rewards]
            by_label = [desirable * log_probs, (1 - desirable) * log_probs]
            sums = [result.losses, desirable, *rewards, result.values > 0, *by_label, kl]
            return mx.stack([mx.sum(mx.where(real, x, 0.0)) for x in sums]), result.grads

        return by_sequence(objective)

    def _named_metrics(self, others: list[float]) -> dict[str, float]:
        """Means over the desirable and over the undesirable answers; without either, what depends on them is left
        out."""
        means = super()._named_metrics(others)
        named = {name: means[name] for name in ("reward_accuracy", "kl")}
        shares = {"desirable": means["desirable"], "undesirable": 1 - means["desirable"]}
        for label, share in shares.items():
            if share:
                named |= {f"{label}_{x}": means[f"{label}_{x}"] / share for x in ("reward", "log_prob")}
        if {"desirable_reward", "undesirable_reward"} <= named.keys():
            named["reward_margin"] = named["desirable_reward"] - named["undesirable_reward"]
        return named
