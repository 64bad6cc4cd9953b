"""The torch step: loss and gradients of each micro-batch, summed; one global norm; one update of Muon and AdamW.

Shapes: A micro-batches, B sequences in each, L tokens in a sequence.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch
from anarchobot.model.parameters import init_parameters, parameter_shapes
from anarchobot.optim.param_groups import TRAINED, check_state
from anarchobot.torch_backend import hybrid
from anarchobot.torch_backend.block import BlockForward, Params, block_forward
from anarchobot.torch_backend.compiling import compiled
from anarchobot.torch_backend.device import choose_device, is_out_of_memory, memory_used, peak_memory, release_memory
from anarchobot.torch_backend.gradients import add_gradients
from anarchobot.torch_backend.loss import loss_sum
from anarchobot.torch_backend.transformer import Technique, head_name, hidden_states
from anarchobot.training.engine import StepResult
from anarchobot.training.loss_scale import LossScale

PRECISION = {"mps": "float16", "cuda": "bfloat16", "cpu": "float32"}  # the first Apple chips have no bfloat16
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class TorchEngine:
    """Holds parameters and optimizer state, and takes training and evaluation steps (training/loop.py's Engine).

    `notes` are lines for a person: what was asked for and can't be had here.
    """

    def __init__(self, config: Config, weights: Mapping[str, npt.NDArray[np.float32]] | None = None) -> None:
        """`weights`: the model's first ones by name (None: new ones, by train.seed)."""
        self._config = config
        train = config.train
        self.notes: list[str] = []
        self.device = choose_device(train.device)
        on_gpu = self.device.type != "cpu"
        if not on_gpu and train.cpu_threads is not None:
            torch.set_num_threads(train.cpu_threads)
        self.precision = train.precision or PRECISION[self.device.type]
        self.dtype = DTYPES[self.precision]
        self._scale = LossScale() if self.precision == "float16" else None
        self._updates = 0  # updates applied: AdamW's bias correction counts these
        weights = init_parameters(config.model, train.seed) if weights is None else weights
        names = parameter_shapes(config.model)
        self.params: Params = {name: self._tensor(weights[name]).requires_grad_() for name in names}
        self._state = hybrid.init_state(self.params, train)
        self._average = {n: p.detach().clone() for n, p in self.params.items()} if train.ema_decay else None

        # On MPS the compiler is young: there it is tried when it is asked for.
        self.compiled = self.device.type == "cuda" if train.compile is None else train.compile
        block: BlockForward = block_forward
        if self.compiled:
            block, note = compiled(block, self._try_out)
            self.compiled = note is None
            self.notes += [note] if note else []
        self.technique = self._technique(block)

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult:
        """One optimizer step over the A micro-batches of `batch`; `step` decides what dropout drops.

        The gradient is that of the mean loss over all scored tokens of the batch, however they fall into micro-batches.
        A step whose loss or gradient is not finite, or whose norm is above `norm_limit`, changes nothing but the loss
        scale. Raises MemoryError, and has changed nothing, when the gradients do not fit into memory.
        """
        places = batch.inputs.shape[1] * batch.inputs.shape[2]  # tokens of a micro-batch, scored or not
        loss_scale = self._scale.scale if self._scale else 1.0
        # The scale's denominator keeps float16's sums in range, whatever the micro-batch.
        total, norm = self._gradients(batch, step, loss_scale / places)
        tokens = int(np.count_nonzero(batch.targets >= 0))
        unscale = places / (loss_scale * max(1, tokens))
        loss, norm = total / max(1, tokens), norm * unscale
        finite = math.isfinite(loss) and math.isfinite(norm)
        applied = finite and norm <= norm_limit
        if self._scale:
            self._scale.after(finite)
        if applied:
            self._update(unscale * self._clip_factor(norm), lr, momentum)
        self._free_gradients()
        return StepResult(loss, norm, tokens, applied=applied, overflow=not finite and loss_scale > 1)

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        """Summed loss in nats over the scored tokens of the batch, and their number; no dropout. Raises MemoryError."""
        try:
            return self._loss_sum(batch), int(np.count_nonzero(batch.targets >= 0))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0]
        release_memory(self.device)
        raise MemoryError(message)

    def _loss_sum(self, batch: Batch) -> float:
        model, total = self._config.model, 0.0
        with torch.no_grad():
            for i in range(len(batch.inputs)):
                inputs, targets, segments = self._rows(batch, i)
                hidden = hidden_states(
                    self.weights, inputs, model, dtype=self.dtype, segments=segments, technique=self.technique
                )
                head = self.weights[head_name(model)]
                loss = loss_sum(hidden.flatten(0, 1), head, targets.flatten(), model, self.technique.loss_chunk)
                total += float(loss)
        return total

    @property
    def weights(self) -> Params:
        """What is validated, saved and used: the parameters, or their running average."""
        return self.params if self._average is None else self._average

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything a checkpoint needs, as named numpy arrays, under the MLX engine's names (training/mlx_engine.py):
        copies, which later steps do not change. There is no random state."""
        tensors = {f"params/{name}": p for name, p in self.weights.items()}
        if self._average is not None:
            tensors |= {f"{TRAINED}{name}": p for name, p in self.params.items()}
        tensors |= {f"optimizer/{kind}/{name}": t for kind, of in self._state.items() for name, t in of.items()}
        numpy: dict[str, npt.NDArray[Any]] = {name: np.array(t.detach().cpu()) for name, t in tensors.items()}
        numpy["updates"] = np.array(self._updates)
        if self._scale:
            numpy |= {"loss_scale": np.array(self._scale.scale), "loss_scale_streak": np.array(self._scale.streak)}
        return numpy

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Takes what `state` gave, this engine's or the MLX one's. Raises UserError when other parameters were
        trained, or by another optimizer."""
        check_state(state, {name: tuple(p.shape) for name, p in self.params.items()}, self._config.train)
        # A run that goes on without averaging, or begins it, goes on from the weights that were saved for use.
        averaged = self._average is not None and any(name.startswith(TRAINED) for name in state)
        prefix = TRAINED if averaged else "params/"
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(self._tensor(state[f"{prefix}{name}"]))
            for name, p in (self._average or {}).items():
                p.copy_(self._tensor(state[f"params/{name}"]))
            for kind, of in self._state.items():
                for name, t in of.items():
                    t.copy_(self._tensor(state[f"optimizer/{kind}/{name}"]))
        self._updates = int(state["updates"])
        if self._scale and "loss_scale" in state:
            self._scale = LossScale(float(state["loss_scale"]), int(state["loss_scale_streak"]))

    def peak_memory_gb(self) -> float:
        """The most memory used since the process began, in 10^9 bytes (torch_backend/device.py)."""
        return peak_memory(self.device) / 1e9

    def memory_gb(self) -> dict[str, float]:
        """Of tensors, and kept for the next ones, in 10^9 bytes; nothing on a CPU, where PyTorch does not count."""
        used = memory_used(self.device)
        return {} if used is None else {"active_memory_gb": used[0] / 1e9, "cache_memory_gb": used[1] / 1e9}

    def _gradients(self, batch: Batch, step: int, scale: float) -> tuple[float, float]:
        """The summed loss of the batch and the norm of `scale` times its gradients, which are left in the parameters'
        `grad`. Raises MemoryError with no gradients left."""
        seed = self._config.train.seed
        try:
            total = torch.zeros((), device=self.device)
            for i in range(len(batch.inputs)):
                inputs, targets, segments = self._rows(batch, i)
                total += add_gradients(
                    self.params,
                    inputs,
                    targets,
                    self._config.model,
                    scale=scale,
                    dtype=self.dtype,
                    segments=segments,
                    dropout_key=f"{seed}/dropout/{step}/{i}",
                    technique=self.technique,
                )
            norm = torch.nn.utils.get_total_norm([g for _, g in self._grads()])
            return float(total), float(norm)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0]
        # Out here, where the error is gone: its traceback holds the activations.
        self._free_gradients()
        release_memory(self.device)
        raise MemoryError(message)

    def _update(self, factor: float, lr: float, momentum: float) -> None:
        """Brings parameters, optimizer state and running average up to date by `factor` times the gradients."""
        train, model = self._config.train, self._config.model
        self._updates += 1
        grads = {name: g.mul_(factor) for name, g in self._grads()}
        hybrid.update(self.params, grads, self._state, lr, momentum, self._updates, train, model.head_size)
        if self._average is not None and train.ema_decay is not None:
            decay = min(train.ema_decay, (1 + self._updates) / (10 + self._updates))  # forgets faster at the start
            for name, average in self._average.items():
                average.mul_(decay).add_(self.params[name].detach(), alpha=1 - decay)

    def _clip_factor(self, norm: float) -> float:
        limit = self._config.train.max_grad_norm
        return 1.0 if limit is None or norm <= limit else limit / norm

    def _grads(self) -> list[tuple[str, Tensor]]:
        return [(name, p.grad) for name, p in self.params.items() if p.grad is not None]

    def _free_gradients(self) -> None:
        for p in self.params.values():
            p.grad = None

    def _rows(self, batch: Batch, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Micro-batch `i`: inputs, targets and segments, int64 [B, L]."""
        inputs, targets = (self._tensor(x[i].astype(np.int64)) for x in (batch.inputs, batch.targets))
        return inputs, targets, None if batch.segments is None else self._tensor(batch.segments[i])

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        """A copy on the device."""
        return torch.tensor(array, device=self.device)

    def _technique(self, block: BlockForward) -> Technique:
        train = self._config.train
        return Technique(train.gradient_checkpointing, train.attention_block, train.loss_chunk, block)

    def _try_out(self, block: BlockForward) -> None:
        """A pass forward and backward at the run's own sizes: what is compiled for it is used. One layer is enough, or
        two where the second is another (model.value_residual)."""
        config = self._config
        layers = min(config.model.n_layers, 2 if config.model.value_residual else 1)
        few_layers = config.model.model_copy(update={"n_layers": layers})
        names = list(parameter_shapes(few_layers))
        tokens = torch.zeros(config.train.micro_batch_size, config.data.seq_len, dtype=torch.int64, device=self.device)
        try:
            hidden = hidden_states(
                {n: self.params[n] for n in names},
                tokens,
                few_layers,
                dtype=self.dtype,
                segments=tokens if config.data.document_mask else None,
                dropout_key="",
                technique=self._technique(block),
            )
            torch.autograd.backward([hidden], [torch.zeros_like(hidden)])
        finally:
            self._free_gradients()
