"""The MLX step on pairs of answers (model/preference.py). Shapes: A micro-batches of B pairs, b pairs per
worker, L tokens."""

from collections.abc import Mapping
from typing import ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import Config
from anarchobot.data.conversations.preference_pairs import PairBatch
from anarchobot.data.windows import Batch
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.preference import Preferences, losses_and_grads, rewards
from anarchobot.model.step_options import Objective
from anarchobot.training.mlx_engine import Metrics, MicroBatchSlice, used_length
from anarchobot.training.objective_engine import ObjectiveEngine
from anarchobot.training.ranks import SINGLE_PROCESS, Ranks


class PreferenceEngine(ObjectiveEngine):
    """Trains on PairBatches. The loss is the mean over pairs; METRICS are means too: reward margin, reward accuracy,
    and both log-probabilities."""

    METRICS: ClassVar[tuple[str, ...]] = ("reward_margin", "reward_accuracy", "chosen_log_prob", "rejected_log_prob")

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, npt.NDArray[np.float32]] | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        super().__init__(config, weights, ranks)
        self._evaluated: list[tuple[int, Metrics, int]] = []  # per batch: its first pair, metrics, and number of pairs

    def log_probs(self, batch: PairBatch) -> npt.NDArray[np.float32]:
        """Log-probabilities of the answers under the current weights, without dropout: [A, B, 2]. Raises
        MemoryError."""
        return self._sequence_log_probs(self.weights, batch.inputs, batch.targets)

    def _sequence_log_probs(
        self, weights: Params, inputs: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        """Log-probabilities of the targets of S sequences per row, [A, B, S, L], without dropout: [A, B, S]."""

        def part(worker: int) -> list[npt.NDArray[np.float32]]:
            parts = []
            for i in range(len(inputs)):
                own_inputs, own_targets = self._sequences(inputs, targets, i, worker)
                if own_inputs.size:
                    log_probs = self._token_log_probs(weights, own_inputs, own_targets).sum(axis=1)
                else:
                    log_probs = mx.zeros(0)
                parts.append(np.array(log_probs, np.float32).reshape(-1, inputs.shape[2]))
            return parts

        parts = self._run_on_workers(part)
        return np.stack([np.concatenate([part[i] for part in parts]) for i in range(len(inputs))])

    def eval_metrics(self) -> dict[str, float]:
        """Returns the extra metrics of the `eval_step` calls since the last call."""
        evaluated, self._evaluated = self._evaluated, []
        sums: Metrics = sum((metrics for _, metrics, _ in evaluated), np.zeros(1 + len(self.METRICS)))
        *totals, count = self._ranks.all_reduce_scalars([*sums, sum(count for _, _, count in evaluated)]).tolist()
        means = [x / max(1, count) for x in totals]
        return {f"val_{name}": mean for name, mean in self._named_metrics(means[1:]).items()}

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """Returns the summed loss of the batch's pairs, and their number; no dropout.

        Pairs arrive in order. When a pair arrives again, in a smaller batch after running out of memory or in a new
        validation, its metrics and the metrics of all later pairs are replaced.
        """
        assert isinstance(batch, PairBatch)
        metrics, count = self._evaluate_batch(batch), self._count(batch)
        first = int(batch.indices.flat[0])
        if count:
            self._evaluated = [entry for entry in self._evaluated if entry[0] < first]
            self._evaluated.append((first, metrics, count))
        return float(metrics[0]), count

    def _count(self, batch: Batch) -> int:
        assert isinstance(batch, PairBatch)
        return int(np.count_nonzero(batch.indices >= 0))

    def _named_metrics(self, others: list[float]) -> dict[str, float]:
        return dict(zip(self.METRICS, others, strict=True))

    def _slice(self, batch: Batch, i: int, worker: int) -> MicroBatchSlice:
        """A worker's pairs of micro-batch `i`: inputs and targets [2 b, L], chosen and rejected alternating, and the
        log-probabilities of the reference model [b, 2]."""
        assert isinstance(batch, PairBatch)
        inputs, targets = self._sequences(batch.inputs, batch.targets, i, worker)
        return inputs, targets, mx.array(self._part(batch.ref_log_probs[i], worker))

    def _sequences(
        self, inputs: npt.NDArray[np.int32], targets: npt.NDArray[np.int32], i: int, worker: int
    ) -> tuple[mx.array, mx.array]:
        """A worker's part of micro-batch `i` of [A, B, S, L] as [b S, L], cut where only padding follows."""
        length, used = inputs.shape[-1], used_length(targets[i])
        own_inputs, own_targets = (
            mx.array(self._part(x[i], worker).reshape(-1, length)[:, :used]) for x in (inputs, targets)
        )
        return own_inputs, own_targets

    def _objective(self, targets: mx.array, reference: mx.array | None) -> Objective:
        settings = self._config.preference
        assert reference is not None
        lengths = mx.sum(targets >= 0, axis=1).reshape(-1, 2).astype(mx.float32)
        real = lengths[:, 0] > 0  # [b]: a batch may be padded with empty pairs

        def objective(log_probs: mx.array) -> tuple[mx.array, mx.array]:
            pairs = Preferences(log_probs.reshape(-1, 2), mx.maximum(lengths, 1), reference)
            losses, grads = losses_and_grads(pairs, settings)
            implicit_rewards = rewards(pairs, settings)
            margins = implicit_rewards[:, 0] - implicit_rewards[:, 1]
            metrics = [losses, margins, margins > 0, pairs.log_probs[:, 0], pairs.log_probs[:, 1]]
            return mx.stack([mx.sum(mx.where(real, x, 0.0)) for x in metrics]), grads.reshape(-1)

        return by_sequence(objective)


def by_sequence(objective: Objective) -> Objective:
    """The Objective of a function of whole answers: of their log-probabilities, the sums [B] over their tokens."""

    def by_token(log_probs: mx.array) -> tuple[mx.array, mx.array]:
        metrics, grads = objective(log_probs.sum(axis=1))
        return metrics, mx.broadcast_to(grads[:, None], log_probs.shape)

    return by_token
