"""The MLX step: loss and gradients of each micro-batch, summed; one global norm; one update of Muon and AdamW.

Shapes: A micro-batches, B sequences in each, L tokens in a sequence.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch
from anarchobot.model.frozen import init_adapters
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.llama.forward import head_matrix, hidden_states
from anarchobot.model.llama.gradients import Objective, Technique, loss_and_gradients
from anarchobot.model.loss import loss_sum
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.numerics import sequencing as order
from anarchobot.numerics.cores import CPU_MLP_ROWS, workers_for
from anarchobot.optim import muon_adamw as hybrid
from anarchobot.optim.muon import muon_directions
from anarchobot.optim.param_groups import TRAINED, check_state, trained
from anarchobot.training.device import DTYPES, as_memory_error, choose_device
from anarchobot.training.engine import StepResult
from anarchobot.training.loss_scale import LossScale
from anarchobot.training.ranks import ALONE, Ranks
from anarchobot.training.reduction import global_norm, summed
from anarchobot.training.shared_muon import SharedMuon
from anarchobot.training.workers import Workers

Measures = npt.NDArray[np.float64]  # the loss, and what else an objective measures
T = TypeVar("T")


class MLXEngine:
    """Holds parameters and optimizer state, and takes training and evaluation steps (training/loop.py's Engine).

    `params` are what is trained: all weights, those that train.trainable names or, under lora.r, adapters; `frozen` are
    the others, under lora.r in as few bytes as the config allows. Only what is trained has gradients and optimizer
    state; a model is saved whole, adapters by themselves.
    """

    def __init__(
        self, config: Config, weights: Mapping[str, npt.NDArray[np.float32]] | None = None, ranks: Ranks = ALONE
    ) -> None:
        """`weights`: the model's first ones by name, each asked for once (None: new ones, by train.seed)."""
        self._config, self._ranks = config, ranks
        train = config.train
        self.device = choose_device(train.device)
        on_gpu = self.device == mx.Device(mx.gpu)
        self.precision = train.precision or ("bfloat16" if on_gpu else "float32")
        self.dtype = DTYPES[self.precision]
        self._scale = LossScale() if self.precision == "float16" else None
        self._updates = 0  # updates applied: AdamW's bias correction counts these
        model = config.model
        weights = init_parameters(model, train.seed) if weights is None else weights
        self.frozen: Params = {}
        if config.lora.r is None:
            self.frozen = {name: mx.array(weights[name]) for name in parameter_shapes(model)}
            self.params: Params = {name: self.frozen.pop(name) for name in trained(self.frozen, train.trainable)}
        else:
            self.params, self.frozen = init_adapters(weights, model, config.lora, train.seed, self.dtype)
        del weights
        self._state = hybrid.init_state(self.params, train)
        self._average = dict(self.params) if train.ema_decay else None
        mx.eval(self.params, self.frozen, self._state)  # what is still to be computed can't go to another thread

        self.compiled = on_gpu if train.compile is None else train.compile
        wrap: Callable[[Any], Any] = mx.compile if self.compiled else lambda function: function
        self.traces = 0  # of the functions below: each means a compilation, where there is one
        self._micro_step = wrap(self._loss_and_gradients)
        self._update = wrap(self._clip_and_update)
        self._loss = wrap(self._evaluate)
        self.workers = Workers(1 if on_gpu or self.compiled else workers_for(train.micro_batch_size, train.cpu_threads))
        self._update_shares = hybrid.shares(self.params, self._state, self.workers.count)
        self._directions = wrap(self._make_directions)
        by_muon = self._state["muon.momentum"]
        self._shared = SharedMuon(ranks, self.params, by_muon, self.workers.count, train.share_muon)
        self.technique = Technique(
            recompute=train.gradient_checkpointing,
            wait=order.tied if on_gpu or self.compiled else order.evaluated,
            attention_block=train.attention_block,
            mlp_rows=None if on_gpu else CPU_MLP_ROWS,
            loss_chunk=-(-train.loss_chunk // self.workers.count),
        )

    def train_step(
        self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float = math.inf
    ) -> StepResult:
        """One optimizer step over the A micro-batches of `batch`; `step` decides what dropout drops.

        The gradient is that of the mean loss over all scored tokens of the batch, however they fall into micro-batches;
        of several ranks, each takes its own batch, and the mean is over all of them.
        A step whose gradient is not finite, or longer than `norm_limit`, changes nothing but the loss scale. Raises
        MemoryError when there is not enough for the gradients; nothing has changed then.
        """
        places = self._places(batch)
        loss_scale = self._scale.scale if self._scale else 1.0
        factor = loss_scale / places  # keeps float16's sums in range, whatever the micro-batch
        try:
            shares = self.workers.each(lambda worker: self._share(batch, step, factor, worker))
            measures: Measures = sum((measures for measures, _ in shares), np.zeros(1))  # some had no rows
            grads = summed([grads for _, grads in shares if grads])
        except RuntimeError as error:
            told = as_memory_error(error)
            if isinstance(told, MemoryError):
                with suppress(MemoryError):
                    self._ranks.all_gather_scalars(None)  # all ranks raise it
            raise told from None  # whose traceback would keep what is to be freed
        del shares
        scored = int(np.count_nonzero(batch.targets >= 0))
        *sums, count, tokens = self._ranks.all_reduce_scalars([*measures, self._count(batch), scored]).tolist()
        count = max(1, count)
        unscale = places / (loss_scale * count)
        grads = self._shared.timed("exchange", lambda: self._ranks.all_reduce(grads))
        norm = self._ranks.broadcast_scalar(float(global_norm(grads)) * unscale)
        loss, *others = (np.array(sums) / (factor * count)).tolist()
        finite = math.isfinite(norm) and math.isfinite(loss)
        applied = finite and norm <= norm_limit
        overflow = not finite and loss_scale > 1
        result = StepResult(loss, norm, int(tokens), applied, overflow, self._named(others))
        if self._scale:
            self._scale.after(finite)
        if applied:
            self._updates += 1
            scalars = (mx.array(lr), mx.array(momentum), mx.array(float(self._updates)))
            clip = mx.array(unscale * self._clip_factor(norm))
            directions = self._shared.directions(lambda part: self._directions_of(part, grads, clip, scalars[1]))
            self._shared.timed("update", lambda: self._apply(grads, directions, clip, *scalars))
            if self._average is not None:
                self._average = self._averaged(self._average)
        return result

    @property
    def weights(self) -> Params:
        """What is validated and used: the frozen weights, and the trained ones or their running average."""
        return {**self.frozen, **self._kept}

    @property
    def _kept(self) -> Params:
        return self.params if self._average is None else self._average

    @property
    def _saved(self) -> Params:
        return self.weights if self._config.lora.r is None else self._kept

    def _directions_of(
        self, parts: Sequence[Sequence[str]], grads: Params, clip: mx.array, momentum: mx.array
    ) -> Params:
        """Muon's directions of the matrices of these names, each worker its part."""

        def directions(worker: int) -> Params:
            own, buffers = ({name: a[name] for name in parts[worker]} for a in (grads, self._state["muon.momentum"]))
            made: Params = self._directions(own, buffers, clip, momentum)
            mx.eval(made)
            return made

        return {name: u for made in self.workers.each(directions) for name, u in made.items()}

    def _apply(self, grads: Params, directions: Params, *scalars: mx.array) -> None:
        """Updates parameters and optimizer state, each worker its share of them; uses `grads` and `directions` up."""
        names = list(self.params)
        parts = [
            (
                {name: self.params.pop(name) for name in share},
                {name: grads.pop(name) for name in share},
                {kind: {n: a.pop(n) for n in share if n in a} for kind, a in self._state.items()},
                {name: directions.pop(name) for name in share if name in directions},
            )
            for share in self._update_shares
        ]

        def update(worker: int) -> tuple[Params, hybrid.State]:
            # The old arrays have no other holder when the new ones are evaluated: their memory is used again.
            part, parts[worker] = parts[worker], ({}, {}, {}, {})
            new: tuple[Params, hybrid.State] = self._update(*part, *scalars)
            del part
            mx.eval(new)
            return new

        done = self.workers.each(update)
        params = {name: p for new, _ in done for name, p in new.items()}
        self.params = {name: params[name] for name in names}
        self._state = {kind: {n: a for _, state in done for n, a in state[kind].items()} for kind in self._state}

    # What another objective than the tokens' cross-entropy has otherwise (training/preference_engine.py).

    def _places(self, batch: Batch) -> int:
        """What float16's sums of a micro-batch are divided by: tokens, scored or not."""
        return int(batch.inputs[0].size)

    def _count(self, batch: Batch) -> int:
        """What the loss and the gradient of a step are the mean over."""
        return int(np.count_nonzero(batch.targets >= 0))

    def _named(self, others: list[float]) -> dict[str, float]:
        """What is measured beside the loss."""
        return {}

    def _reading(self, targets: mx.array, besides: mx.array | None) -> tuple[mx.array | None, Objective | None]:
        """From the third of `_rows`: segments, and the objective (None: cross-entropy)."""
        return besides, None

    def _share(self, batch: Batch, step: int, factor: float, worker: int) -> tuple[Measures, Params]:
        """One worker's rows of every micro-batch: the sums of their scaled losses, with what else is measured, and of
        the gradients."""
        sums: Params = {}
        total = mx.array(0.0)
        first = self._ranks.rank * len(batch.inputs)  # as if all ranks' micro-batches were one process's
        for i in range(len(batch.inputs)):
            rows = self._rows(batch, i, worker)
            if not _any(rows):  # a micro-batch that was halved may have fewer rows than there are workers
                break
            key = _dropout_key(self._config.train.seed, step, first + i, worker)
            loss, sums = self._micro_step(self.params, self.frozen, *rows, key, mx.array(factor), sums)
            total = total + loss
            mx.eval(sums, total)  # now: else MLX would keep every micro-batch's activations for one large graph
        return np.atleast_1d(np.array(total, np.float64)), sums

    def _rows(self, batch: Batch, i: int, worker: int) -> tuple[mx.array | None, ...]:
        """A worker's rows of micro-batch `i`: inputs, targets and segments, [B / workers, L]."""

        def part(x: npt.NDArray[np.int32]) -> mx.array:
            return mx.array(np.array_split(x[i], self.workers.count)[worker])

        return part(batch.inputs), part(batch.targets), None if batch.segments is None else part(batch.segments)

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """Summed loss in nats over the scored tokens of the batch, and their number; no dropout."""
        measures, count = self._evaluated(batch)
        return float(measures[0]), count

    def _evaluated(self, batch: Batch) -> tuple[Measures, int]:
        weights = self.weights

        def share(worker: int) -> Measures:
            total: Measures = np.zeros(1)
            for i in range(len(batch.inputs)):
                rows = self._rows(batch, i, worker)
                if _any(rows):  # the last batch of a validation may have fewer rows than there are workers
                    total = total + np.atleast_1d(np.array(self._loss(weights, *rows), np.float64))
            return total

        whole: Measures = sum(self._each(share), np.zeros(1))
        return whole, self._count(batch)

    def _each(self, share: Callable[[int], T]) -> list[T]:
        """What each worker's share gives. Raises MemoryError when there is not enough."""
        try:
            return self.workers.each(share)
        except RuntimeError as error:
            raise as_memory_error(error) from None  # whose traceback would keep what is to be freed

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything a checkpoint needs, as named numpy arrays: `params/...`, `optimizer/...`, and scalars; under
        train.ema_decay, `params/...` are the averages and `optimizer/trained/...` what is trained on.

        There is no random state: dropout and data order are functions of the seed and the step.
        """
        arrays = {f"params/{name}": p for name, p in self._saved.items()}
        if self._average is not None:
            arrays |= {f"{TRAINED}{name}": p for name, p in self.params.items()}
        arrays |= {
            f"optimizer/{kind}/{name}": a for kind, by_name in self._state.items() for name, a in by_name.items()
        }
        # No copies: MLX changes no array, and an update does not use the memory of one that somebody still holds.
        numpy = {name: np.asarray(a) for name, a in arrays.items()}
        numpy["updates"] = np.array(self._updates)
        if self._scale:
            numpy |= {"loss_scale": np.array(self._scale.scale), "loss_scale_streak": np.array(self._scale.streak)}
        return numpy

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Takes what `state` gave. Raises UserError when other parameters were trained, or by another optimizer."""
        check_state(state, {name: p.shape for name, p in self._saved.items()}, self._config.train)
        if self._config.lora.r is None:
            self.frozen = {name: mx.array(state[f"params/{name}"]) for name in self.frozen}
        if self._average is not None:
            self._average = {name: mx.array(state[f"params/{name}"]) for name in self.params}
        # A run that goes on without averaging, or begins it, goes on from the weights that were saved for use.
        averaged = self._average is not None and any(name.startswith(TRAINED) for name in state)
        prefix = TRAINED if averaged else "params/"
        self.params = {name: mx.array(state[f"{prefix}{name}"]) for name in self.params}
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

    def memory_gb(self) -> dict[str, float]:
        """Of MLX's arrays, and freed but kept for the next ones; in 10^9 bytes."""
        return {"active_memory_gb": mx.get_active_memory() / 1e9, "cache_memory_gb": mx.get_cache_memory() / 1e9}

    def _averaged(self, average: Params) -> Params:
        """One step of the running average, which forgets faster at the start of a run."""
        assert self._config.train.ema_decay is not None
        decay = min(self._config.train.ema_decay, (1 + self._updates) / (10 + self._updates))
        for name, p in self.params.items():
            average[name] = decay * average[name] + (1 - decay) * p
        mx.eval(average)
        return average

    def _clip_factor(self, norm: float) -> float:
        limit = self._config.train.max_grad_norm
        return 1.0 if limit is None or norm <= limit else limit / norm

    def _loss_and_gradients(
        self,
        params: Params,
        frozen: Params,
        inputs: mx.array,
        targets: mx.array,
        besides: mx.array | None,
        key: mx.array,
        scale: mx.array,
        sums: Params,
    ) -> tuple[mx.array, Params]:
        self.traces += 1
        segments, objective = self._reading(targets, besides)
        return loss_and_gradients(
            params,
            inputs,
            targets,
            self._config.model,
            scale=scale,
            frozen=frozen,
            sums=sums,
            dtype=self.dtype,
            segments=segments,
            dropout_key=key,
            adapter_dropout=self._config.lora.dropout,
            technique=self.technique,
            objective=objective,
        )

    def _evaluate(self, params: Params, inputs: mx.array, targets: mx.array, segments: mx.array | None) -> mx.array:
        self.traces += 1
        model = self._config.model
        hidden = hidden_states(params, inputs, model, dtype=self.dtype, segments=segments, wait=self.technique.wait)
        return loss_sum(hidden.reshape(-1, model.d_model), head_matrix(params, model), targets.reshape(-1), model)

    def _clip_and_update(
        self,
        params: Params,
        grads: Params,
        state: hybrid.State,
        directions: Params,
        factor: mx.array,
        lr: mx.array,
        momentum: mx.array,
        count: mx.array,
    ) -> tuple[Params, hybrid.State]:
        self.traces += 1
        grads = {name: grads.pop(name) * factor for name in list(grads)}
        head_size, train = self._config.model.head_size, self._config.train
        wait = self.technique.wait
        return hybrid.update(params, grads, state, lr, momentum, count, train, head_size, wait, directions)

    def _make_directions(self, grads: Params, buffers: Params, factor: mx.array, momentum: mx.array) -> Params:
        self.traces += 1
        grads = {name: g * factor for name, g in grads.items()}
        return muon_directions(
            grads, buffers, momentum, self._config.train, self._config.model.head_size, self.technique.wait
        )


def _any(rows: tuple[mx.array | None, ...]) -> bool:
    return rows[0] is not None and rows[0].size > 0


def _dropout_key(seed: int, step: int, micro_batch: int, worker: int) -> mx.array:
    digest = hashlib.sha256(f"{seed}/dropout/{step}/{micro_batch}/{worker}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))
