"""The MLX step with a teacher's distributions (model/distillation.py), and the forward pass of the teacher.

Shapes: A micro-batches, B sequences in each, L tokens in a sequence, k = distillation.top_k.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import Config, ModelConfig
from anarchobot.data.teacher_cache import TeacherBatch
from anarchobot.data.windows import Batch
from anarchobot.model.architecture import CPU_LOSS_CHUNK, GPU_LOSS_CHUNK, forward_pass
from anarchobot.model.distillation import TeacherTargets, top_log_probs
from anarchobot.model.frozen import inference_weights
from anarchobot.model.loss import logits
from anarchobot.model.step_options import MicroBatch
from anarchobot.numerics import eval_order
from anarchobot.numerics.cores import workers_for
from anarchobot.numerics.device import on_cpu
from anarchobot.training.device import DTYPES, as_device_error
from anarchobot.training.mlx_engine import MicroBatchSlice, MLXEngine, used_length
from anarchobot.training.workers import Workers


class DistillationEngine(MLXEngine):
    """Trains on TeacherBatches. Validation, on other batches, is the cross-entropy."""

    METRICS: ClassVar[tuple[str, ...]] = ("cross_entropy", "kl")

    def _named_metrics(self, others: list[float]) -> dict[str, float]:
        return dict(zip(self.METRICS, others, strict=False))

    def _slice(self, batch: Batch, i: int, worker: int) -> MicroBatchSlice:
        """As MLXEngine's; the third is the segments and the teacher's ids and log-probabilities, [B / workers, L, k]
        and [..., k + 1]."""
        inputs, targets, segments = super()._slice(batch, i, worker)
        if not isinstance(batch, TeacherBatch):
            return inputs, targets, segments
        length = targets.shape[1]
        ids, log_probs = (
            mx.array(self._part(x[i], worker)[:, :length]) for x in (batch.teacher_ids, batch.teacher_log_probs)
        )
        return inputs, targets, (segments, ids, log_probs)

    def _with_extra(self, batch: MicroBatch, extra: Any) -> MicroBatch:
        if not isinstance(extra, tuple):
            return super()._with_extra(batch, extra)
        segments, ids, log_probs = extra
        return batch._replace(segments=segments, teacher=TeacherTargets(ids, log_probs, self._config.distillation))


class Teacher:
    """A model that predicts what another one, with the configuration `config`, is trained on."""

    def __init__(
        self, weights: Mapping[str, npt.NDArray[Any]], model: ModelConfig, config: Config, precision: str
    ) -> None:
        """`precision`: dtype of the matrix products on a GPU; on a CPU, float32 is fastest. Raises MemoryError."""
        self._model, self._config, self._dtype = model, config, DTYPES["float32" if on_cpu() else precision]
        self._forward = forward_pass(model)
        try:
            self._params = inference_weights(weights, model, self._dtype)
        except RuntimeError as error:
            raise as_device_error(error) from None
        single = not on_cpu() or model.architecture == "mlx_lm"  # whose modules can't be called by two threads at once
        train = config.train
        self._workers = Workers(1 if single else workers_for(train.micro_batch_size, train.cpu_threads))

    def top_log_probs(self, batch: Batch) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float16]]:
        """The most likely tokens [m, k] and the log-probabilities [m, k + 1] at the m scored positions of `batch`
        [n, L], row by row. Raises MemoryError and GPUTimeoutError."""
        length = used_length(batch.targets)
        rows = batch.map(lambda x: x[:, :length])
        try:
            parts = self._workers.map(lambda worker: self._part(rows, worker))
        except RuntimeError as error:
            raise as_device_error(error) from None  # the traceback would keep arrays alive
        ids, log_probs = (np.concatenate([part[j] for part in parts]) for j in range(2))
        return ids, log_probs.astype(np.float16)

    def _part(self, rows: Batch, worker: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        settings, vocab_size = self._config.distillation, self._config.model.vocab_size
        rows = rows.map(lambda x: np.array_split(x, self._workers.count)[worker])
        ids, log_probs = [np.empty((0, settings.top_k), np.uint32)], [np.empty((0, settings.top_k + 1), np.float32)]
        scored = np.flatnonzero(rows.targets >= 0)
        if scored.size:
            segments = None if rows.segments is None else mx.array(rows.segments)
            wait = eval_order.eval_now if on_cpu() else eval_order.depend
            hidden = self._forward.hidden_states(
                self._params, mx.array(rows.inputs), self._model, dtype=self._dtype, segments=segments, wait=wait
            )
            hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(scored)]
            chunk = CPU_LOSS_CHUNK if on_cpu() else GPU_LOSS_CHUNK
            for i in range(0, scored.size, chunk):
                # A padded vocabulary has rows without a token.
                z = logits(hidden[i : i + chunk], self._params, self._model)[:, :vocab_size]
                top = top_log_probs(z, settings)
                mx.eval(top)
                ids.append(np.array(top[0]))
                log_probs.append(np.array(top[1]))
        return np.concatenate(ids), np.concatenate(log_probs)
