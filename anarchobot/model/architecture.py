"""The interface between an architecture and the rest of the package.

An architecture NAME (model.architecture in the configuration) is a folder model/NAME/ with these modules:

    architecture.py  `Architecture` below, without MLX: parameters, conversion from and to config.json, FLOP counts
    forward.py       `ForwardPass` below, in MLX: the forward pass, which MLX can differentiate
    gradients.py     optional, MLX: hand-written gradients that take less memory and time than model/autodiff.py

To add one, write its folder and add NAME, with the settings that only it has, to ModelConfig (config/schema.py).
Everything else (loss, optimizers, loop, checkpoints, planning, export) works from these.

Shapes: B batch, L sequence, N = B L tokens, D d_model, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast, get_args

import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import ModelConfig, Technique

if TYPE_CHECKING:
    import mlx.core as mx

    from anarchobot.model.gradient_accumulator import Params
    from anarchobot.model.step_options import MicroBatch, StepOptions
    from anarchobot.numerics.eval_order import EvalOrder

Shape = tuple[int, ...]
Float32 = npt.NDArray[np.float32]
ExportTarget = Literal["hf", "mlx", "gguf"]
EXPORT_LIBRARIES: dict[ExportTarget, str] = {"hf": "transformers", "mlx": "mlx-lm", "gguf": "llama.cpp"}
QueryBlocks = Sequence[tuple[int, int]]  # [start, end) of each block of queries, which sees the keys [0, end)
# Bytes of float32 attention scores in a block of queries: fits a CPU's caches; keeps a GPU busy.
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 4 << 20, 64 << 20
CPU_LOSS_CHUNK, GPU_LOSS_CHUNK = 256, 1024  # tokens per chunk of the output head


class ActivationSizes(NamedTuple):
    """Bytes of a thread's activations in one block: `x` [N, D], `q` [N, all query heads], `kv` [N, all key heads],
    `mlp` [N, MLP width]. `saved` is what a block keeps for its backward pass."""

    x: int
    q: int
    kv: int
    mlp: int
    saved: int


class TensorSource(NamedTuple):
    """Where a parameter comes from in a Hugging Face folder: the rows [start, stop) of the stored tensor `name` (None:
    all), with `offset` added to the values."""

    name: str
    rows: tuple[int, int] | None = None
    offset: float = 0.0


class AdaptableMatrix(NamedTuple):
    """A matrix that can have an adapter: the number of its block, and its shape, (out, in) or, for stacked experts,
    (experts, out, in)."""

    block: int
    shape: Shape


class Architecture(Protocol):
    """The module-level functions of an architecture that do not use MLX."""

    HF_MODEL_TYPES: Sequence[str]
    """The values of `model_type` in a Hugging Face config.json that this architecture implements."""

    def parameter_shapes(self, model: ModelConfig) -> dict[str, Shape]:
        """Hugging Face's names and shapes, matrices as (out, in), in the order of the forward pass. The parameters of
        block i are named model.layers.I.*"""

    def token_parameters(self, model: ModelConfig) -> list[str]:
        """The names of the parameters with one row for each token: the embedding, then those of the head."""

    def with_vocab_size(self, model: ModelConfig, vocab_size: int) -> ModelConfig:
        """The same model with another vocabulary. Raises UserError if that is not possible."""

    def adaptable_matrices(self, model: ModelConfig) -> dict[str, AdaptableMatrix]:
        """The matrices that can have adapters, by parameter name without ".weight"."""

    def init(self, name: str, model: ModelConfig) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's initial values."""

    def from_hf(self, values: dict[str, Any], file: str) -> dict[str, Any]:
        """ModelConfig fields from a config.json. Raises UserError, naming `file`, for what is not supported."""

    def infer_from_weights(self, names: Collection[str]) -> dict[str, Any]:
        """Infers ModelConfig fields that are not in config.json from the names of the weights."""

    def tensor_sources(self, model: ModelConfig, model_type: str) -> dict[str, TensorSource]:
        """Says where each parameter is stored in a Hugging Face folder of `model_type`."""

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        """config.json for an exportable model, without token ids and dtype."""

    def unsupported_for_export(self, model: ModelConfig, target: ExportTarget) -> Iterator[str]:
        """Yields the settings that a format cannot represent, as "model.KEY: reason: remedy"."""

    def export_warnings(self, model: ModelConfig, target: ExportTarget) -> Iterator[str]:
        """Yields what the library of `target` computes differently, though not in every use."""

    def exported_length(self, model: ModelConfig, target: ExportTarget) -> int:
        """The maximum sequence length to write for the library of `target`."""

    def export_parameters(self, params: dict[str, Float32], model: ModelConfig) -> dict[str, Float32]:
        """Converts the parameters to the form that other libraries expect."""

    def step_flops(self, model: ModelConfig, rows: int, blocks: QueryBlocks) -> Mapping[str, int]:
        """FLOPs of the matrix products of a training step on `rows` sequences, by part of the step, as `bench` prints
        them. "blocks forward again" is the recomputation by gradient checkpointing. A product of [m, k] and [k, n] is
        2 m n k."""

    def recomputed_flops(self, model: ModelConfig, rows: int, blocks: QueryBlocks, checkpointing: bool) -> int:
        """FLOPs that the backward pass spends on recomputing activations."""

    def activation_sizes(self, model: ModelConfig, tokens: int, itemsize: int) -> ActivationSizes:
        """Activation sizes of `tokens` tokens, with matrix products in a dtype of `itemsize` bytes."""


class ForwardPass(Protocol):
    """The module-level functions of an architecture in MLX; they take a flat dict of parameters."""

    def embed(self, params: "Params", tokens: "mx.array", model: ModelConfig, dtype: "mx.Dtype") -> "mx.array":
        """Hidden states [N, D] in `dtype` of tokens [B, L]."""

    def layer(self, p: "Params", x: "mx.array", i: int, model: ModelConfig, batch: "MicroBatch") -> "mx.array":
        """Block `i` on hidden states [N, D], differentiable by MLX. `p` are its parameters by their names inside the
        block; `batch` has segments and dropout keys."""

    def final_norm(self, params: "Params", x: "mx.array", model: ModelConfig) -> "mx.array":
        """The input of the output head, [N, D]."""

    def head_name(self, model: ModelConfig) -> str | None:
        """The name of the output head's weight [V, D]; None if the head is the function `head_logits`."""

    def head_logits(self, hidden: "mx.array", params: "Params", model: ModelConfig) -> "mx.array":
        """The logits [N, V] of hidden states [N, D]. Only if `head_name` is None, as is `head_parameters`."""

    def head_parameters(self, params: "Params", model: ModelConfig) -> Sequence[str]:
        """The names of the parameters that `head_logits` uses."""

    def hidden_states(
        self,
        params: "Params",
        tokens: "mx.array",
        model: ModelConfig,
        *,
        dtype: "mx.Dtype",
        segments: "mx.array | None" = None,
        caches: "Sequence[Any] | None" = None,
        lengths: "Sequence[int] | None" = None,
        wait: "EvalOrder" = ...,
    ) -> "mx.array":
        """The input of the output head, [B, L, D], without dropout: for evaluation and generation. `caches` hold each
        layer's keys and values of earlier tokens: those of `make_caches`, or several rows of them merged. `lengths` [B]
        say how long each row with caches may become, prompt and answer."""

    def make_caches(self, params: "Params", model: ModelConfig, *, trimmable: bool = False) -> list[Any]:
        """New caches of one row, for `hidden_states`. If `trimmable`, any number of their last tokens can be removed;
        raises UserError if the model has no such caches."""

    def can_batch(self, params: "Params", model: ModelConfig) -> bool:
        """Whether caches of several rows can be merged, with padding on the left."""


class LossAndGradients(Protocol):
    """The type of a backward pass: hand-written (model/llama/gradients.py) or by MLX (model/autodiff.py)."""

    def __call__(
        self,
        params: "Params",
        batch: "MicroBatch",
        model: ModelConfig,
        *,
        frozen: "Params | None" = None,
        sums: "Params | None" = None,
        dtype: "mx.Dtype" = ...,
        options: "StepOptions" = ...,
    ) -> "tuple[mx.array, Params]":
        """The scaled loss of `batch` (or the vector of its objective's metrics) and its gradients by parameter name,
        float32, accumulated into `sums` if given.

        `params` are trained; `frozen` are the model's other weights, which get no gradient: blocks below the lowest
        trained one save nothing for the backward pass. Matrix products are in `dtype`.
        """


def architecture_names() -> tuple[str, ...]:
    return get_args(ModelConfig.model_fields["architecture"].annotation)


def architecture(name: str) -> Architecture:
    return cast(Architecture, import_module(f"anarchobot.model.{name}.architecture"))


def forward_pass(model: ModelConfig) -> ForwardPass:
    """Imports model/NAME/forward.py, and MLX."""
    return cast(ForwardPass, import_module(f"anarchobot.model.{model.architecture}.forward"))


def gradients(model: ModelConfig, technique: Technique = "blocked") -> LossAndGradients:
    """Returns the architecture's hand-written gradients, or model/autodiff.py if it has none or for `autodiff`."""
    folder = f"anarchobot.model.{model.architecture}"
    hand_written = technique != "autodiff" and find_spec(f"{folder}.gradients")
    module = f"{folder}.gradients" if hand_written else "anarchobot.model.autodiff"
    return cast(LossAndGradients, import_module(module).loss_and_gradients)


def query_blocks(rows: int, heads: int, length: int, block_size: int | None, *, on_cpu: bool) -> list[tuple[int, int]]:
    """Returns the blocks of queries in which attention processes `rows` sequences of `length`. `block_size` is the
    number of queries per block; None: chosen by the memory of their scores, on a GPU evenly."""
    if block_size is None:
        bytes_per_query = 4 * rows * heads * length
        block_size = max(32, (CPU_BLOCK_BYTES if on_cpu else GPU_BLOCK_BYTES) // bytes_per_query // 32 * 32)
        if not on_cpu:
            blocks = -(-length // block_size)
            block_size = -(-length // blocks // 32) * 32
    return [(start, min(start + block_size, length)) for start in range(0, length, block_size)]
