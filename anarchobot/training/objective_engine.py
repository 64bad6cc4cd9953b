"""The MLX step with an objective of log-probabilities instead of cross-entropy. Shapes: b rows per worker, L tokens."""

from abc import abstractmethod
from typing import Any

import mlx.core as mx

from anarchobot.data.windows import Batch
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.loss import token_losses
from anarchobot.model.step_options import MicroBatch, Objective
from anarchobot.training.mlx_engine import MLXEngine


class ObjectiveEngine(MLXEngine):
    """The loss is the mean over the rows of a batch."""

    @abstractmethod
    def _objective(self, targets: mx.array, extra: mx.array | None) -> Objective:
        """The objective of a worker's rows, from the targets and the third of `_slice`."""

    def _loss_denominator(self, batch: Batch) -> int:
        return int(batch.inputs.shape[1])

    def _with_extra(self, batch: MicroBatch, extra: Any) -> MicroBatch:
        return batch._replace(objective=self._objective(batch.targets, extra))

    def _evaluate(self, params: Params, inputs: mx.array, targets: mx.array, extra: mx.array | None) -> mx.array:
        self.traces += 1
        return self._objective(targets, extra)(self._token_log_probs(params, inputs, targets))[0]

    def _token_log_probs(self, params: Params, inputs: mx.array, targets: mx.array) -> mx.array:
        """Log-probabilities of the targets [b, L], without dropout; 0 where there is none."""
        model, forward = self._config.model, self.forward
        hidden = forward.hidden_states(params, inputs, model, dtype=self.dtype, wait=self.options.wait)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        losses = token_losses(hidden, params, targets.reshape(-1), model, self.options.loss_chunk)
        return -losses.reshape(inputs.shape)
