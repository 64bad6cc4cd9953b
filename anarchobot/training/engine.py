"""The MLX step: loss and gradients of each micro-batch, summed; one global norm; one update of Muon and AdamW.

Shapes: A micro-batches, B sequences in each, L tokens in a sequence.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch
from anarchobot.model.loss import loss_sum, scaled_loss
from anarchobot.model.shapes import init_parameters
from anarchobot.model.transformer import Params, head_weight, hidden_states
from anarchobot.optim import hybrid
from anarchobot.training.loop import StepResult
from anarchobot.training.loss_scale import LossScale

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def choose_device(device: str) -> mx.Device:
    """Sets and returns MLX's default device: `auto` takes Metal or CUDA when there is one.

    Raises UserError when a GPU is asked for and there is none.
    """
    gpu = mx.is_available(mx.gpu)
    if device == "gpu" and not gpu:
        raise UserError("train.device: gpu, but MLX sees none here: set train.device: auto")
    chosen = mx.Device(mx.gpu if gpu and device != "cpu" else mx.cpu)
    mx.set_default_device(chosen)
    return chosen


class MLXEngine:
    """Holds parameters and optimizer state, and takes training and evaluation steps (training/loop.py's Engine)."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.device = choose_device(config.train.device)
        on_gpu = self.device == mx.Device(mx.gpu)
        self.precision = config.train.precision or ("bfloat16" if on_gpu else "float32")
        self._dtype = DTYPES[self.precision]
        self._scale = LossScale() if self.precision == "float16" else None
        self._updates = 0  # updates applied: AdamW's bias correction counts these
        self.params: Params = {n: mx.array(v) for n, v in init_parameters(config.model, config.train.seed).items()}
        self._state = hybrid.init_state(self.params, config.train)
        compiled = on_gpu if config.train.compile is None else config.train.compile
        wrap: Callable[[Any], Any] = mx.compile if compiled else lambda function: function
        self._micro_step = wrap(self._loss_and_gradients)
        self._update = wrap(self._clip_and_update)
        self._loss = wrap(self._evaluate)

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float) -> StepResult:
        """One optimizer step over the A micro-batches of `batch`; `step` decides what dropout drops.

        The gradient is that of the mean loss over all scored tokens of the batch, however they fall into micro-batches.
        A step whose gradient is not finite changes nothing but the loss scale.
        """
        places = batch.inputs.shape[1] * batch.inputs.shape[2]  # tokens of a micro-batch, scored or not
        loss_scale = self._scale.scale if self._scale else 1.0
        scale = mx.array(loss_scale / places)  # keeps float16's sums in range, whatever the micro-batch
        grads: Params = {}
        total = mx.array(0.0)
        for i, (inputs, targets, segments) in enumerate(_micro_batches(batch)):
            key = _dropout_key(self._config.train.seed, step, i)
            loss, new = self._micro_step(self.params, inputs, targets, segments, key, scale)
            grads = {name: grads[name] + g for name, g in new.items()} if grads else new
            total = total + loss
            del new
            mx.eval(grads, total)  # now: else MLX would keep every micro-batch's activations for one large graph
        tokens = int(np.count_nonzero(batch.targets >= 0))
        unscale = places / (loss_scale * max(1, tokens))
        norm = _global_norm(grads) * unscale
        result = StepResult(float(total) / (float(scale) * max(1, tokens)), float(norm), tokens)
        if self._scale:
            self._scale.after(result.finite)
        if result.finite:
            self._updates += 1
            scalars = (mx.array(lr), mx.array(momentum), mx.array(float(self._updates)))
            factor = mx.array(unscale * self._clip_factor(result.grad_norm))
            # The old arrays must have no other holder when the new ones are evaluated: their memory is used again.
            self.params, self._state = self._update(self.params, grads, self._state, factor, *scalars)
            del grads
            mx.eval(self.params, self._state)
        return result

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """Summed loss in nats over the scored tokens of the batch, and their number; no dropout."""
        total = sum(
            float(self._loss(self.params, inputs, targets, segments))
            for inputs, targets, segments in _micro_batches(batch)
        )
        return total, int(np.count_nonzero(batch.targets >= 0))

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything a checkpoint needs, as named numpy arrays: `params/...`, `optimizer/...`, and scalars.

        There is no random state: dropout and data order are functions of the seed and the step.
        """
        arrays = {f"params/{name}": p for name, p in self.params.items()}
        arrays |= {
            f"optimizer/{kind}/{name}": a for kind, by_name in self._state.items() for name, a in by_name.items()
        }
        numpy = {name: np.array(a) for name, a in arrays.items()}
        numpy["updates"] = np.array(self._updates)
        if self._scale:
            numpy |= {"loss_scale": np.array(self._scale.scale), "loss_scale_streak": np.array(self._scale.streak)}
        return numpy

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Takes what `state` gave. Raises UserError when the optimizer was another one."""
        own = {f"optimizer/{kind}/{name}" for kind, by_name in self._state.items() for name in by_name}
        if own != {name for name in state if name.startswith("optimizer/")}:
            raise UserError("train.optimizer: the checkpoint was made with another optimizer: set the same one")
        self.params = {name: mx.array(state[f"params/{name}"]) for name in self.params}
        self._state = {
            kind: {name: mx.array(state[f"optimizer/{kind}/{name}"]) for name in by_name}
            for kind, by_name in self._state.items()
        }
        mx.eval(self.params, self._state)
        self._updates = int(state["updates"])
        if self._scale and "loss_scale" in state:
            self._scale = LossScale(float(state["loss_scale"]), int(state["loss_scale_streak"]))

    def peak_memory_gb(self) -> float:
        """MLX's own peak since the process began, in 10^9 bytes; its cache is not counted."""
        return float(mx.get_peak_memory()) / 1e9

    def _clip_factor(self, norm: float) -> float:
        limit = self._config.train.max_grad_norm
        return 1.0 if limit is None or norm <= limit else limit / norm

    def _hidden(self, params: Params, inputs: mx.array, segments: mx.array | None, key: mx.array | None) -> mx.array:
        h = hidden_states(
            params,
            inputs,
            self._config.model,
            dtype=self._dtype,
            segments=segments,
            dropout_key=key,
            recompute=key is not None and self._config.train.gradient_checkpointing,
        )
        return h.reshape(-1, self._config.model.d_model)  # [B L, D]

    def _loss_and_gradients(
        self,
        params: Params,
        inputs: mx.array,
        targets: mx.array,
        segments: mx.array | None,
        key: mx.array,
        scale: mx.array,
    ) -> tuple[mx.array, Params]:
        model = self._config.model

        def loss(params: Params) -> mx.array:
            hidden = self._hidden(params, inputs, segments, key)
            return scaled_loss(hidden, head_weight(params, model), targets.reshape(-1), model, scale)

        result: tuple[mx.array, Params] = mx.value_and_grad(loss)(params)
        return result

    def _evaluate(self, params: Params, inputs: mx.array, targets: mx.array, segments: mx.array | None) -> mx.array:
        model = self._config.model
        hidden = self._hidden(params, inputs, segments, None)
        return loss_sum(hidden, head_weight(params, model), targets.reshape(-1), model)

    def _clip_and_update(
        self,
        params: Params,
        grads: Params,
        state: hybrid.State,
        factor: mx.array,
        lr: mx.array,
        momentum: mx.array,
        count: mx.array,
    ) -> tuple[Params, hybrid.State]:
        grads = {name: g * factor for name, g in grads.items()}
        return hybrid.update(params, grads, state, lr, momentum, count, self._config.train.weight_decay)


def _micro_batches(batch: Batch) -> Iterator[tuple[mx.array, mx.array, mx.array | None]]:
    """The A micro-batches as MLX arrays [B, L]: inputs, targets, segments."""
    for i in range(len(batch.inputs)):
        segments = None if batch.segments is None else mx.array(batch.segments[i])
        yield mx.array(batch.inputs[i]), mx.array(batch.targets[i]), segments


def _dropout_key(seed: int, step: int, micro_batch: int) -> mx.array:
    digest = hashlib.sha256(f"{seed}/dropout/{step}/{micro_batch}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))


def _global_norm(grads: Params) -> mx.array:
    return mx.sqrt(mx.sum(mx.stack([mx.sum(mx.square(g)) for g in grads.values()])))
