"""The training step, written once for both backends.

    loss and gradients, summed over micro-batches (and ranks) -> unscale -> global norm -> check finite, check spike
    limit -> clip -> Muon + AdamW -> exponential moving average of the weights

`BaseEngine` implements this sequence, and the state for checkpoints. training/mlx_engine.py and torch_backend/engine.py
add the array operations: gradients, norm, update, conversion to NumPy.

Shapes: A micro-batches, B sequences in each, L tokens in a sequence.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import Config
from anarchobot.data.windows import Batch
from anarchobot.optim.param_groups import RAW_PARAMS, check_state
from anarchobot.training.ranks import SINGLE_PROCESS, Ranks


@dataclass(frozen=True)
class StepResult:
    """The mean loss in nats over the step's `tokens` scored tokens, and the gradient's global norm before clipping.

    `applied`: whether the update was applied. `overflow`: it was not, because float16's loss scale was too large; the
    scale has been halved. `extra`: more values for the log.
    """

    loss: float
    grad_norm: float
    tokens: int
    applied: bool = True
    overflow: bool = False
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm) and math.isfinite(self.loss)


class Engine(Protocol):
    """The interface that the training loop uses. An engine holds the weights and the optimizer state."""

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult: ...
    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """Returns the summed loss in nats over the scored tokens of the batch, and their number; no dropout. Raises
        MemoryError and GPUTimeoutError."""

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Returns everything that a checkpoint needs, as arrays that later steps do not change."""

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None: ...
    def peak_memory_gb(self) -> float: ...
    def memory_gb(self) -> Mapping[str, float]:
        """Memory in use now, by the names in the log."""


@dataclass
class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al., 2018): the loss is multiplied by `scale`, so that small
    gradients do not round to zero. The scale doubles after GROWTH_INTERVAL consecutive finite steps (`streak` counts
    them). Too large a scale produces inf or NaN; that step is skipped and the scale halved."""

    GROWTH_INTERVAL = 2000
    MAX = 2.0**24

    scale: float = 2.0**16
    streak: int = 0

    def update(self, finite: bool) -> None:
        self.streak = self.streak + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.streak == self.GROWTH_INTERVAL:
            self.scale, self.streak = min(self.MAX, self.scale * 2), 0


class _Array(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


A = TypeVar("A", bound=_Array)  # mx.array or torch.Tensor


class BaseEngine(ABC, Generic[A]):
    """Holds parameters and optimizer state, and takes training steps.

    `params` are trained: all weights, those that train.trainable selects or, with lora.r, adapters. `frozen` are the
    others. `moments` are the optimizer state, by kind (optim/param_groups.py) and name; `average` is the running
    average of `params` with train.ema_decay. Full runs save all weights; LoRA runs save only the adapters.
    """

    params: dict[str, A]
    frozen: dict[str, A]
    moments: dict[str, dict[str, A]]
    average: dict[str, A] | None

    def __init__(self, config: Config, precision: str, ranks: Ranks = SINGLE_PROCESS) -> None:
        self._config, self._ranks, self.precision = config, ranks, precision
        self._loss_scale = LossScale() if precision == "float16" else None
        self._updates = 0  # applied updates, for AdamW's bias correction

    def train_step(
        self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float = math.inf
    ) -> StepResult:
        """Takes one optimizer step over the A micro-batches of `batch`; dropout is a function of the seed and `step`.

        The loss is the mean over all scored tokens of the batch, regardless of their distribution over micro-batches;
        with several ranks, each has its own batch, and the mean is over all of them. A step whose loss or gradient is
        not finite, or whose norm is above `norm_limit`, changes nothing but the loss scale. Raises MemoryError if the
        gradients do not fit into memory, and GPUTimeoutError if macOS stops the GPU; then nothing has changed.
        """
        loss_scale = self._loss_scale.scale if self._loss_scale else 1.0
        denominator = self._loss_denominator(batch)  # keeps float16's sums in range, regardless of micro-batch size
        metrics, grads = self._accumulate_gradients(batch, step, loss_scale / denominator)
        scored = int(np.count_nonzero(batch.targets >= 0))
        *sums, count, tokens = self._ranks.all_reduce_scalars([*metrics, self._count(batch), scored]).tolist()
        unscale = denominator / (loss_scale * max(1, count))
        grads = self._all_reduce(grads)
        norm = self._ranks.broadcast_scalar(self._global_norm(grads) * unscale)
        loss, *others = (x / max(1, count) for x in sums)

        finite = math.isfinite(norm) and math.isfinite(loss)
        applied = finite and norm <= norm_limit
        if self._loss_scale:
            self._loss_scale.update(finite)
        if applied:
            self._updates += 1
            self._apply_update(grads, unscale * self._clip_factor(norm), lr, momentum)
            if self._config.train.ema_decay is not None:
                # A lower decay at the start, so that the average forgets the initial weights faster.
                self._update_average(min(self._config.train.ema_decay, (1 + self._updates) / (10 + self._updates)))
        overflow = not finite and loss_scale > 1
        return StepResult(loss, norm, int(tokens), applied, overflow, self._named_metrics(others))

    def _clip_factor(self, norm: float) -> float:
        limit = self._config.train.max_grad_norm
        return 1.0 if limit is None or norm <= limit else limit / norm

    # ---- Implemented by the backends ----

    @abstractmethod
    def _accumulate_gradients(self, batch: Batch, step: int, scale: float) -> tuple[list[float], dict[str, A]]:
        """Returns the summed loss (and any extra metrics) and `scale` times its gradients, over all micro-batches.
        Raises MemoryError."""

    @abstractmethod
    def _global_norm(self, grads: dict[str, A]) -> float:
        """The root of the sum of all squares, in float32."""

    @abstractmethod
    def _apply_update(self, grads: dict[str, A], factor: float, lr: float, momentum: float) -> None:
        """Updates parameters and moments with `factor` times the gradients, which are consumed."""

    @abstractmethod
    def _update_average(self, decay: float) -> None:
        """average <- decay average + (1 - decay) params."""

    @abstractmethod
    def _to_numpy(self, array: A) -> npt.NDArray[Any]:
        """A numpy array that later steps do not change."""

    @abstractmethod
    def _from_numpy(self, array: npt.NDArray[Any]) -> A: ...

    def _after_load(self) -> None:
        """Called when `load_state` has replaced the arrays."""

    def _all_reduce(self, grads: dict[str, A]) -> dict[str, A]:
        """The sums over all ranks."""
        return grads

    # ---- Hooks for objectives other than cross-entropy (training/preference_engine.py) ----

    def _loss_denominator(self, batch: Batch) -> int:
        """The divisor of a micro-batch's loss during accumulation: its number of tokens, scored or not."""
        return int(batch.inputs[0].size)

    def _count(self, batch: Batch) -> int:
        """The number of scored tokens, over which loss and gradient are the mean."""
        return int(np.count_nonzero(batch.targets >= 0))

    def _named_metrics(self, others: list[float]) -> dict[str, float]:
        """Names the extra metrics."""
        return {}

    # ---- Checkpoints ----

    @property
    def weights(self) -> dict[str, A]:
        """The weights for validation and use: frozen weights, and the trained weights or their running average."""
        return {**self.frozen, **self._ema_or_params}

    @property
    def _ema_or_params(self) -> dict[str, A]:
        return self.params if self.average is None else self.average

    @property
    def _saved(self) -> dict[str, A]:
        return self.weights if self._config.lora.r is None else self._ema_or_params

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that a checkpoint needs, as named numpy arrays: `params/...`, `optimizer/...` and scalars. With
        train.ema_decay, `params/...` is the running average and `optimizer/trained/...` the trained weights.

        There is no random state: dropout and data order are functions of the seed and the step.
        """
        arrays = {f"params/{name}": p for name, p in self._saved.items()}
        if self.average is not None:
            arrays |= {f"{RAW_PARAMS}{name}": p for name, p in self.params.items()}
        for kind, by_name in self.moments.items():
            arrays |= {f"optimizer/{kind}/{name}": moment for name, moment in by_name.items()}
        state = {name: self._to_numpy(array) for name, array in arrays.items()}
        state["updates"] = np.array(self._updates)
        if self._loss_scale:
            state["loss_scale"] = np.array(self._loss_scale.scale)
            state["loss_scale_streak"] = np.array(self._loss_scale.streak)
        return state

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned, from either backend. Raises UserError if the parameters or the optimizer
        differ."""
        check_state(state, {name: tuple(p.shape) for name, p in self._saved.items()}, self._config.train)

        def loaded(prefix: str, names: Iterable[str]) -> dict[str, A]:
            return {name: self._from_numpy(state[f"{prefix}{name}"]) for name in names}

        if self._config.lora.r is None:
            self.frozen = loaded("params/", self.frozen)
        if self.average is not None:
            self.average = loaded("params/", self.params)
        # If averaging was turned on or off since the checkpoint, training starts from the saved `params/`.
        averaged = self.average is not None and any(name.startswith(RAW_PARAMS) for name in state)
        self.params = loaded(RAW_PARAMS if averaged else "params/", self.params)
        self.moments = {kind: loaded(f"optimizer/{kind}/", by_name) for kind, by_name in self.moments.items()}
        self._updates = int(state["updates"])
        if self._loss_scale and "loss_scale" in state:
            self._loss_scale = LossScale(float(state["loss_scale"]), int(state["loss_scale_streak"]))
        self._after_load()
