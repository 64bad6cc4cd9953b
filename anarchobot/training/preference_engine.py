"""The MLX step on pairs of answers (model/preference.py). Shapes: A micro-batches, B pairs in each, b of them a
worker's, L tokens."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch
from anarchobot.data.conversations.preference_pairs import PairBatch
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.llama.forward import head_matrix, hidden_states
from anarchobot.model.llama.gradients import Objective
from anarchobot.model.loss import token_losses
from anarchobot.model.preference import Preferences, losses_and_slopes, rewards
from anarchobot.training.mlx_engine import Measures, MLXEngine

NAMES = ("reward_margin", "reward_accuracy", "chosen_log_prob", "rejected_log_prob")


class PreferenceEngine(MLXEngine):
    """Learns from PairBatches. Its loss is the mean over pairs; beside it are measured, as means, how much more reward
    the chosen answer has than the rejected one, how often it has more, and both log-probabilities."""

    def __init__(self, config: Config, weights: Mapping[str, npt.NDArray[np.float32]] | None = None) -> None:
        super().__init__(config, weights)
        self._judged: list[tuple[int, Measures, int]] = []  # of each batch its first pair, measures, and pairs

    def log_probs(self, batch: PairBatch) -> npt.NDArray[np.float32]:
        """Of the answers, under the weights as they are and without dropout: [A, B, 2]. Raises MemoryError when the
        batch was too much."""

        def share(worker: int) -> list[npt.NDArray[np.float32]]:
            weights, parts = self.weights, []
            for i in range(len(batch.inputs)):
                inputs, targets, _ = self._rows(batch, i, worker)
                assert inputs is not None and targets is not None
                found = self._log_probs(weights, inputs, targets) if inputs.size else mx.zeros(0)
                parts.append(np.array(found, np.float32).reshape(-1, 2))
            return parts

        parts = self._each(share)
        return np.stack([np.concatenate([part[i] for part in parts]) for i in range(len(batch.inputs))])

    def judged(self) -> dict[str, float]:
        """What `eval_step` measured beside the loss since the last call."""
        judged, self._judged = self._judged, []
        sums: Measures = sum((measures for _, measures, _ in judged), np.zeros(1 + len(NAMES)))
        *sums_of_all, count = self._ranks.all_reduce_scalars([*sums, sum(count for _, _, count in judged)]).tolist()
        means = [x / max(1, count) for x in sums_of_all]
        return {f"val_{name}": mean for name, mean in zip(NAMES, means[1:], strict=True)}

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """Summed loss of the batch's pairs, and their number; no dropout.

        Pairs come in their order. One that comes again, in a smaller batch after memory ran out or in a validation
        begun anew, is judged anew, and so are those behind it.
        """
        assert isinstance(batch, PairBatch)
        measures, count = self._evaluated(batch)
        first = int(batch.indices.flat[0])
        if count:
            self._judged = [one for one in self._judged if one[0] < first]
            self._judged.append((first, measures, count))
        return float(measures[0]), count

    def _places(self, batch: Batch) -> int:
        return int(batch.inputs.shape[1])

    def _count(self, batch: Batch) -> int:
        assert isinstance(batch, PairBatch)
        return int(np.count_nonzero(batch.indices >= 0))

    def _named(self, others: list[float]) -> dict[str, float]:
        return dict(zip(NAMES, others, strict=True))

    def _rows(self, batch: Batch, i: int, worker: int) -> tuple[mx.array | None, ...]:
        """A worker's pairs of micro-batch `i`: inputs and targets [2 b, L], chosen and rejected in turn, and what the
        reference gave them [b, 2]."""
        assert isinstance(batch, PairBatch)

        def part(x: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
            return np.array_split(x[i], self.workers.count)[worker]

        length = batch.inputs.shape[-1]
        inputs, targets = (mx.array(part(x).reshape(-1, length)) for x in (batch.inputs, batch.targets))
        return inputs, targets, mx.array(part(batch.ref_log_probs))

    def _reading(self, targets: mx.array, besides: mx.array | None) -> tuple[mx.array | None, Objective | None]:
        return None, self._objective(targets, besides)

    def _evaluate(self, params: Params, inputs: mx.array, targets: mx.array, reference: mx.array | None) -> mx.array:
        self.traces += 1
        return self._objective(targets, reference)(self._log_probs(params, inputs, targets))[0]

    def _log_probs(self, params: Params, inputs: mx.array, targets: mx.array) -> mx.array:
        """Of the rows' targets: [2 b]."""
        model = self._config.model
        hidden = hidden_states(params, inputs, model, dtype=self.dtype, wait=self.technique.wait)
        losses = token_losses(
            hidden.reshape(-1, model.d_model), head_matrix(params, model), targets.reshape(-1), model,
            self.technique.loss_chunk,
        )  # fmt: skip
        return -losses.reshape(inputs.shape).sum(axis=1)

    def _objective(self, targets: mx.array, reference: mx.array | None) -> Objective:
        settings = self._config.preference
        assert reference is not None
        lengths = mx.sum(targets >= 0, axis=1).reshape(-1, 2).astype(mx.float32)
        real = lengths[:, 0] > 0  # [b]: a batch may be filled up with pairs that are none

        def objective(log_probs: mx.array) -> tuple[mx.array, mx.array]:
            pairs = Preferences(log_probs.reshape(-1, 2), mx.maximum(lengths, 1), reference)
            losses, slopes = losses_and_slopes(pairs, settings.loss, settings.beta, settings.label_smoothing)
            gains = rewards(pairs, settings.loss, settings.beta)
            margins = gains[:, 0] - gains[:, 1]
            each = [losses, margins, margins > 0, pairs.log_probs[:, 0], pairs.log_probs[:, 1]]
            return mx.stack([mx.sum(mx.where(real, x, 0.0)) for x in each]), slopes.reshape(-1)

        return objective
