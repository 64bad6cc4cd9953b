"""The MLX backend of the training step (training/engine.py).

On a CPU, threads share the rows of a micro-batch and the parameters of an update (training/workers.py); on a GPU both
are compiled. Shapes: A micro-batches, B sequences in each, L tokens in a sequence.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.data.windows import Batch
from anarchobot.model.architecture import architecture, forward_pass, gradients
from anarchobot.model.frozen import init_adapters
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.loss import loss_sum
from anarchobot.model.mlx_lm.frozen import cast_weights
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.model.step_options import MicroBatch, StepOptions
from anarchobot.numerics import eval_order
from anarchobot.numerics.cores import CPU_MLP_ROWS, workers_for
from anarchobot.numerics.device import on_cpu
from anarchobot.numerics.eval_order import EvalOrder
from anarchobot.optim import muon_adamw
from anarchobot.optim.muon import muon_directions
from anarchobot.optim.param_groups import balanced_shares, select_trainable
from anarchobot.system.gpu_watchdog import GPUTimeoutError
from anarchobot.system.technique import default_settings
from anarchobot.training.device import DTYPES, as_device_error, choose_device, device_kind
from anarchobot.training.engine import BaseEngine
from anarchobot.training.ranks import SINGLE_PROCESS, Ranks
from anarchobot.training.sharded_muon import ShardedMuon
from anarchobot.training.workers import Workers

Metrics = npt.NDArray[np.float64]  # the loss, and any extra metrics of an objective
MicroBatchSlice = tuple[mx.array, mx.array, Any]  # a worker's inputs, targets and what `_with_extra` reads
T = TypeVar("T")
LENGTHS = 8  # to which rows with padding at the end are cut


class MLXEngine(BaseEngine[mx.array]):
    """With lora.r, `frozen` is stored in as few bytes as the configuration allows."""

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, npt.NDArray[Any]] | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        """`weights`: the model's initial weights by name, each read once (None: random init from train.seed)."""
        if config.model.architecture == "mlx_lm":  # its attention matrices need not be q, k, v and o
            config = config.model_copy(update={"train": config.train.model_copy(update={"muon_split_heads": False})})
        model, train = config.model, config.train
        self.device = choose_device(train.device)
        on_gpu = not on_cpu()
        super().__init__(config, train.precision or ("bfloat16" if on_gpu else "float32"), ranks)
        self.dtype = DTYPES[self.precision]
        self.forward = forward_pass(model)
        if model.architecture == "mlx_lm" and not on_gpu and self.dtype != mx.float32 and has_experts(model):
            raise UserError(
                f"train.precision: {self.precision}: on a CPU, MLX multiplies by experts only in float32: remove it"
            )
        weights = init_parameters(model, train.seed) if weights is None else weights
        if config.lora.r is None:
            # Cut to the shape: an embedding may have rows without a token, which only a frozen base keeps.
            self.frozen = {
                name: mx.array(weights[name])[tuple(map(slice, shape))].astype(mx.float32)
                for name, shape in parameter_shapes(model).items()
            }
            shapes = {name: array.shape for name, array in self.frozen.items()}
            self.params = {name: self.frozen.pop(name) for name in select_trainable(shapes, train.trainable)}
        else:
            self.params, self.frozen = init_adapters(weights, model, config.lora, train.seed, self.dtype)
        del weights
        self.moments = muon_adamw.init_state(self.params, train)
        self.average = dict(self.params) if train.ema_decay else None
        self._after_load()

        settings = default_settings(config, device_kind(), self.precision)
        self.compiled = settings.compile
        wrap: Callable[[Any], Any] = mx.compile if self.compiled else lambda function: function
        self._start_eval = mx.async_eval if on_gpu else mx.eval
        self._norm: mx.array | None = None  # of the step's gradients, if there is only one rank
        self.traces = 0  # of the functions below; each is a compilation, if they are compiled
        self._micro_step, self._update = wrap(self._loss_and_gradients), wrap(self._clip_and_update)
        self._loss, self._directions = wrap(self._evaluate), wrap(self._scaled_directions)
        # A module of mlx-lm can't be called by two threads at once.
        single = on_gpu or self.compiled or model.architecture == "mlx_lm"
        self.workers = Workers(1 if single else workers_for(train.micro_batch_size, train.cpu_threads))
        shapes, muon_names = {name: p.shape for name, p in self.params.items()}, self.moments["muon.momentum"]
        self._update_shares = balanced_shares(shapes, muon_names, self.workers.count)
        self._sharded_muon = ShardedMuon(ranks, self.params, muon_names, self.workers.count, train.share_muon)
        self.options = StepOptions(
            recompute=train.gradient_checkpointing,
            technique=settings.technique,
            wait=eval_order.depend if on_gpu or self.compiled else eval_order.eval_now,
            attention_block=train.attention_block,
            mlp_rows=None if on_gpu else CPU_MLP_ROWS,
            loss_chunk=-(-settings.loss_chunk // self.workers.count),
        )

    # ---- Gradients ----

    def _accumulate_gradients(self, batch: Batch, step: int, scale: float) -> tuple[list[float], Params]:
        self._norm = None  # that of a step that failed would keep its arrays alive
        try:
            parts = self.workers.map(lambda worker: self._worker_gradients(batch, step, scale, worker))
            grads = _sum_parts([grads for _, grads in parts if grads])
            totals = [total for total, _ in parts]
            if self._ranks.size == 1:
                self._norm = global_norm(grads, self.options.wait)
            # The only time before the update that the GPU is waited for. Ranks exchange gradients that exist.
            mx.eval(totals, grads if self._norm is None else self._norm)
        except RuntimeError as error:
            raised = as_device_error(error)
            if isinstance(raised, MemoryError | GPUTimeoutError):
                with suppress(MemoryError):
                    self._ranks.all_gather_scalars(None)  # makes all ranks raise it
            raise raised from None  # the traceback would keep arrays alive
        # Some workers had no rows.
        metrics: Metrics = sum((np.atleast_1d(np.array(total, np.float64)) for total in totals), np.zeros(1))
        return (metrics / scale).tolist(), grads

    def _worker_gradients(self, batch: Batch, step: int, scale: float, worker: int) -> tuple[mx.array, Params]:
        """The scaled metrics and gradients of a worker's rows, summed over all micro-batches. A GPU may still be
        computing them."""
        sums: Params = {}
        total = mx.array(0.0)
        first = self._ranks.rank * len(batch.inputs)  # numbers the micro-batches as in a single process
        params = self._cast_matrices(self.params)
        # Adapters' base weights are in this dtype already, or quantized.
        frozen = self._cast_matrices(self.frozen) if self._config.lora.r is None else self.frozen
        for i in range(len(batch.inputs)):
            rows = self._slice(batch, i, worker)
            if not _any(rows):  # a halved micro-batch may have fewer rows than there are workers
                break
            key = _dropout_key(self._config.train.seed, step, first + i, worker)
            loss, sums = self._micro_step(params, frozen, *rows, key, mx.array(scale), sums)
            total = total + loss
            # Otherwise MLX would hold the activations of all micro-batches in one graph. A GPU goes on while the next
            # graph is built.
            self._start_eval(sums, total)
        return total, sums

    def _cast_matrices(self, params: Params) -> Params:
        """Casts matrices to the products' dtype, once for all micro-batches of a step; for mlx-lm's modules everything,
        because the weights' dtype is that of the results."""
        if self._config.model.architecture == "mlx_lm":
            return cast_weights(params, self._config.model, self.dtype)
        return {
            name: p.astype(self.dtype) if p.ndim == 2 and name.endswith(".weight") else p for name, p in params.items()
        }

    def _loss_and_gradients(
        self,
        params: Params,
        frozen: Params,
        inputs: mx.array,
        targets: mx.array,
        extra: Any,
        key: mx.array,
        scale: mx.array,
        sums: Params,
    ) -> tuple[mx.array, Params]:
        self.traces += 1
        self.options.profile.start()
        batch = MicroBatch(inputs, targets, scale, None, key, self._config.lora.dropout)
        batch = self._with_extra(batch, extra)
        model, options = self._config.model, self.options
        loss_and_gradients = gradients(model, options.technique)
        return loss_and_gradients(params, batch, model, frozen=frozen, sums=sums, dtype=self.dtype, options=options)

    def _slice(self, batch: Batch, i: int, worker: int) -> MicroBatchSlice:
        """A worker's rows of micro-batch `i`: inputs, targets and segments, [B / workers, L]. Rows of one text each are
        cut where only padding follows."""
        length = used_length(batch.targets[i]) if batch.segments is None else None
        inputs, targets = (mx.array(self._part(x[i], worker)[:, :length]) for x in (batch.inputs, batch.targets))
        return inputs, targets, None if batch.segments is None else mx.array(self._part(batch.segments[i], worker))

    def _part(self, rows: npt.NDArray[Any], worker: int) -> npt.NDArray[Any]:
        """A worker's part of the rows of a micro-batch."""
        return np.array_split(rows, self.workers.count)[worker]

    def _with_extra(self, batch: MicroBatch, extra: Any) -> MicroBatch:
        """Adds what the third of `_slice` holds: the segments."""
        return batch._replace(segments=extra)

    def _all_reduce(self, grads: Params) -> Params:
        return self._sharded_muon.timed("exchange", lambda: self._ranks.all_reduce(grads))

    def _global_norm(self, grads: Params) -> float:
        return float(global_norm(grads, self.options.wait) if self._norm is None else self._norm)

    # ---- Update ----

    def _apply_update(self, grads: Params, factor: float, lr: float, momentum: float) -> None:
        scalars = tuple(map(mx.array, (factor, lr, momentum, float(self._updates))))
        directions = self._sharded_muon.directions(
            lambda parts: self._directions_of(parts, grads, scalars[0], scalars[2])
        )
        self._sharded_muon.timed("update", lambda: self._update_all(grads, directions, *scalars))

    def _update_all(self, grads: Params, directions: Params, *scalars: mx.array) -> None:
        """Updates parameters and moments, each worker its share; consumes `grads` and `directions`."""
        names = list(self.params)
        parts = [
            (
                {name: self.params.pop(name) for name in share},
                {name: grads.pop(name) for name in share},
                {kind: {n: a.pop(n) for n in share if n in a} for kind, a in self.moments.items()},
                {name: directions.pop(name) for name in share if name in directions},
            )
            for share in self._update_shares
        ]

        def update(worker: int) -> tuple[Params, muon_adamw.State]:
            # Nothing else refers to the old arrays when the new ones are evaluated, so that their memory is reused.
            part, parts[worker] = parts[worker], ({}, {}, {}, {})
            new: tuple[Params, muon_adamw.State] = self._update(*part, *scalars)
            del part
            mx.eval(new)
            return new

        done = self.workers.map(update)
        params = {name: p for new, _ in done for name, p in new.items()}
        self.params = {name: params[name] for name in names}
        self.moments = {kind: {n: a for _, state in done for n, a in state[kind].items()} for kind in self.moments}

    def _clip_and_update(
        self,
        params: Params,
        grads: Params,
        moments: muon_adamw.State,
        directions: Params,
        factor: mx.array,
        lr: mx.array,
        momentum: mx.array,
        count: mx.array,
    ) -> tuple[Params, muon_adamw.State]:
        self.traces += 1
        self.options.profile.start()
        head_size, train = self._config.model.head_size, self._config.train
        wait, profile = self.options.wait, self.options.profile
        return muon_adamw.update(
            params, grads, moments, lr, momentum, count, train, head_size, wait, directions, profile, factor
        )

    def _directions_of(
        self, parts: Sequence[Sequence[str]], grads: Params, factor: mx.array, momentum: mx.array
    ) -> Params:
        """Returns Muon's directions of the matrices named in `parts`, one part per worker."""

        def directions(worker: int) -> Params:
            names, momenta = parts[worker], self.moments["muon.momentum"]
            local_grads, buffers = ({name: a[name] for name in names} for a in (grads, momenta))
            result: Params = self._directions(local_grads, buffers, factor, momentum)
            mx.eval(result)
            return result

        return {name: u for part in self.workers.map(directions) for name, u in part.items()}

    def _scaled_directions(self, grads: Params, buffers: Params, factor: mx.array, momentum: mx.array) -> Params:
        self.traces += 1
        head_size, train = self._config.model.head_size, self._config.train
        return muon_directions(grads, buffers, factor, momentum, train, head_size, self.options.wait)

    def _update_average(self, decay: float) -> None:
        assert self.average is not None
        for name, p in self.params.items():
            self.average[name] = decay * self.average[name] + (1 - decay) * p
        # Waits: an error of the GPU must not be raised in the next step, which would be retried without this average.
        mx.eval(self.average)

    # ---- Evaluation ----

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """Returns the summed loss in nats over the scored tokens of the batch, and their number; no dropout. Raises
        MemoryError."""
        return float(self._evaluate_batch(batch)[0]), self._count(batch)

    def _evaluate_batch(self, batch: Batch) -> Metrics:
        """Returns the summed loss and any extra metrics of the objective."""
        weights = self.weights

        def part(worker: int) -> Metrics:
            losses: list[mx.array] = []
            for i in range(len(batch.inputs)):
                rows = self._slice(batch, i, worker)
                if _any(rows):  # the last batch of a validation may have fewer rows than there are workers
                    losses.append(self._loss(weights, *rows))
                    self._start_eval(losses[-1])
            return sum((np.atleast_1d(np.array(loss, np.float64)) for loss in losses), np.zeros(1))

        total: Metrics = sum(self._run_on_workers(part), np.zeros(1))
        return total

    def _run_on_workers(self, work: Callable[[int], T]) -> list[T]:
        """Returns each worker's result. Raises MemoryError and GPUTimeoutError."""
        try:
            return self.workers.map(work)
        except RuntimeError as error:
            raise as_device_error(error) from None  # the traceback would keep arrays alive

    def _evaluate(self, params: Params, inputs: mx.array, targets: mx.array, segments: mx.array | None) -> mx.array:
        self.traces += 1
        model, forward, wait = self._config.model, self.forward, self.options.wait
        hidden = forward.hidden_states(params, inputs, model, dtype=self.dtype, segments=segments, wait=wait)
        return loss_sum(hidden.reshape(-1, hidden.shape[-1]), params, targets.reshape(-1), model)

    # ---- Arrays and memory ----

    def _to_numpy(self, array: mx.array) -> npt.NDArray[Any]:
        # No copy: MLX arrays are immutable, and an update does not reuse the memory of an array that is still in use.
        return np.asarray(array)

    def _from_numpy(self, array: npt.NDArray[Any]) -> mx.array:
        return mx.array(array)

    def _after_load(self) -> None:
        mx.eval(self.params, self.frozen, self.moments)  # an unevaluated array cannot be passed to another thread

    def peak_memory_gb(self) -> float:
        """Returns MLX's peak memory since the process started, in 10^9 bytes, without its cache."""
        return float(mx.get_peak_memory()) / 1e9

    def memory_gb(self) -> dict[str, float]:
        """Returns the memory of MLX's arrays and of its cache, in 10^9 bytes."""
        return {"active_memory_gb": mx.get_active_memory() / 1e9, "cache_memory_gb": mx.get_cache_memory() / 1e9}


def global_norm(grads: Params, wait: EvalOrder) -> mx.array:
    """The root of the sum of all squares, a float32 scalar. One gradient after the other, so that the memory of the
    squares is reused."""
    squares: list[mx.array] = []
    for g in grads.values():
        (g,) = wait([g], squares[-1:])
        squares.append(mx.sum(mx.square(g)))
    return mx.sqrt(mx.sum(mx.stack(squares)))


def _sum_parts(parts: list[Params]) -> Params:
    """Sums the gradients of several workers, which are consumed, one parameter at a time to reuse memory."""
    first, *others = parts
    for other in others:
        for name in first:
            first[name] = first[name] + other.pop(name)
            mx.eval(first[name])
    return first


def has_experts(model: ModelConfig) -> bool:
    """Whether the model has stacked experts."""
    matrices = architecture(model.architecture).adaptable_matrices(model)
    return any(len(matrix.shape) == 3 for matrix in matrices.values())


def used_length(targets: npt.NDArray[np.int32]) -> int:
    """The columns of `targets` [..., L] up to the last one that is scored, rounded up to one of LENGTHS lengths: few
    lengths mean few compilations. Later columns have no effect: attention is causal."""
    length: int = targets.shape[-1]
    scored = np.flatnonzero((targets >= 0).reshape(-1, length).any(axis=0))
    unit = -(-length // LENGTHS)
    return min(length, unit * max(1, -(-(int(scored[-1]) + 1 if scored.size else 1) // unit)))


def _any(rows: MicroBatchSlice) -> bool:
    return bool(rows[0].size > 0)


def _dropout_key(seed: int, step: int, micro_batch: int, worker: int) -> mx.array:
    digest = hashlib.sha256(f"{seed}/dropout/{step}/{micro_batch}/{worker}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))
