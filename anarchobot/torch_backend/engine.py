"""The PyTorch backend of the training step (training/engine.py), on MPS, CUDA or a CPU.

Shapes: A micro-batches, B sequences in each, L tokens in a sequence.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anarchobot.config.schema import Config
from anarchobot.data.windows import Batch
from anarchobot.model.architecture import CPU_LOSS_CHUNK
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.optim.param_groups import adamw_lr_ratio
from anarchobot.torch_backend import optim
from anarchobot.torch_backend.device import (
    choose_device,
    default_precision,
    is_out_of_memory,
    memory_used,
    peak_memory,
    release_memory,
)
from anarchobot.torch_backend.loss import add_gradients, loss_sum
from anarchobot.torch_backend.model import (
    BlockForward,
    StepOptions,
    block_forward,
    head_name,
    hidden_states,
    try_compile,
)
from anarchobot.training.engine import BaseEngine

T = TypeVar("T")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class TorchEngine(BaseEngine[Tensor]):
    """`warnings` names settings that do not work on this machine."""

    def __init__(self, config: Config, weights: Mapping[str, npt.NDArray[np.float32]] | None = None) -> None:
        """`weights`: initial weights by name (None: random init from train.seed)."""
        train = config.train
        self.warnings: list[str] = []
        self.device = choose_device(train.device)
        if self.device.type == "cpu" and train.cpu_threads is not None:
            torch.set_num_threads(train.cpu_threads)
        super().__init__(config, train.precision or default_precision(self.device))
        self.dtype = DTYPES[self.precision]
        weights = init_parameters(config.model, train.seed) if weights is None else weights
        self.frozen = {}
        shapes = parameter_shapes(config.model)
        # Cut to the shape: an embedding may have rows without a token.
        self.params = {name: self._from_numpy(weights[name][: shape[0]]) for name, shape in shapes.items()}
        self.moments = optim.init_state(self.params, train)
        self.average = {n: p.clone() for n, p in self.params.items()} if train.ema_decay else None
        self._after_load()

        # The compiler for MPS is new: there it is used only on request.
        self.compiled = self.device.type == "cuda" if train.compile is None else train.compile
        block: BlockForward = block_forward
        if self.compiled:
            block, warning = try_compile(block, self._try_block)
            self.compiled = warning is None
            self.warnings += [warning] if warning else []
        self.options = self._step_options(block)

    def _accumulate_gradients(self, batch: Batch, step: int, scale: float) -> tuple[list[float], dict[str, Tensor]]:
        return self._with_memory_errors(lambda: ([self._add_gradients(batch, step, scale)], self._take_gradients()))

    def _add_gradients(self, batch: Batch, step: int, scale: float) -> float:
        total = torch.zeros((), device=self.device)
        for i in range(len(batch.inputs)):
            inputs, targets, segments = self._micro_batch(batch, i)
            total += add_gradients(
                self.params,
                inputs,
                targets,
                self._config.model,
                scale=scale,
                dtype=self.dtype,
                segments=segments,
                dropout_key=f"{self._config.train.seed}/dropout/{step}/{i}",
                options=self.options,
            )
        return float(total)

    def _with_memory_errors(self, compute: Callable[[], T]) -> T:
        """Returns compute(). If the device is out of memory, frees what it can and raises MemoryError."""
        try:
            return compute()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0]
        # Outside the handler: the error's traceback refers to the activations.
        self._take_gradients()
        release_memory(self.device)
        raise MemoryError(message)

    def _take_gradients(self) -> dict[str, Tensor]:
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        for p in self.params.values():
            p.grad = None
        return grads

    def _global_norm(self, grads: dict[str, Tensor]) -> float:
        return float(torch.nn.utils.get_total_norm(list(grads.values())))

    def _apply_update(self, grads: dict[str, Tensor], factor: float, lr: float, momentum: float) -> None:
        for g in grads.values():
            g.mul_(factor)
        params, state, train = self.params, self.moments, self._config.train
        head_size, adamw_lr = self._config.model.head_size, lr * adamw_lr_ratio(train)
        with torch.no_grad():
            optim.muon(params, grads, state["muon.momentum"], state["muon.second"], lr, momentum, train, head_size)
            optim.adamw(params, grads, state["adamw.first"], state["adamw.second"], adamw_lr, self._updates, train)

    def _update_average(self, decay: float) -> None:
        assert self.average is not None
        for name, average in self.average.items():
            average.mul_(decay).add_(self.params[name].detach(), alpha=1 - decay)

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """Returns the summed loss in nats over the scored tokens of the batch, and their number; no dropout. Raises
        MemoryError."""
        return self._with_memory_errors(lambda: self._loss_sum(batch)), self._count(batch)

    def _loss_sum(self, batch: Batch) -> float:
        model, weights, total = self._config.model, self.weights, 0.0
        with torch.no_grad():
            for i in range(len(batch.inputs)):
                inputs, targets, segments = self._micro_batch(batch, i)
                hidden = hidden_states(
                    weights, inputs, model, dtype=self.dtype, segments=segments, options=self.options
                )
                head = weights[head_name(model)]
                loss = loss_sum(hidden.flatten(0, 1), head, targets.flatten(), model, self.options.loss_chunk)
                total += float(loss)
        return total

    def _micro_batch(self, batch: Batch, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Micro-batch `i`: inputs, targets and segments, int64 [B, L]."""
        inputs, targets = (self._from_numpy(x[i].astype(np.int64)) for x in (batch.inputs, batch.targets))
        return inputs, targets, None if batch.segments is None else self._from_numpy(batch.segments[i])

    def _to_numpy(self, array: Tensor) -> npt.NDArray[Any]:
        return np.array(array.detach().cpu())  # a copy: updates are in place

    def _from_numpy(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.tensor(array, device=self.device)

    def _after_load(self) -> None:
        for p in self.params.values():
            p.requires_grad_()

    def peak_memory_gb(self) -> float:
        """Returns the peak memory since the process started, in 10^9 bytes (torch_backend/device.py)."""
        return peak_memory(self.device) / 1e9

    def memory_gb(self) -> dict[str, float]:
        """Returns the memory of tensors and of the cache, in 10^9 bytes; empty on a CPU, where PyTorch does not
        count."""
        used = memory_used(self.device)
        return {} if used is None else {"active_memory_gb": used[0] / 1e9, "cache_memory_gb": used[1] / 1e9}

    def _step_options(self, block: BlockForward) -> StepOptions:
        train = self._config.train
        chunk = train.loss_chunk or CPU_LOSS_CHUNK
        return StepOptions(train.gradient_checkpointing, train.attention_block, chunk, block)

    def _try_block(self, block: BlockForward) -> None:
        """Runs a forward and backward pass of one layer at the run's batch size and length, so that compiled code is
        reused."""
        config = self._config
        model = config.model.model_copy(update={"n_layers": 1})
        tokens = torch.zeros(config.train.micro_batch_size, config.data.seq_len, dtype=torch.int64, device=self.device)
        try:
            hidden = hidden_states(
                {name: self.params[name] for name in parameter_shapes(model)},
                tokens,
                model,
                dtype=self.dtype,
                segments=tokens if config.data.document_mask else None,
                dropout_key="",
                options=self._step_options(block),
            )
            torch.autograd.backward([hidden], [torch.zeros_like(hidden)])
        finally:
            self._take_gradients()
