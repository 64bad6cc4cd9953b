"""Loss and gradients of the whole model: the entry to a model's backward pass, for any architecture.

An architecture with hand-written gradients (model/llama/gradients.py) uses these; any other, and any on request, is
differentiated by MLX (model/autodiff.py). Both use the same chunked loss (model/loss.py).

Shapes: B rows, L tokens.
"""

from importlib import import_module
from typing import Protocol, cast

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model import autodiff
from anarchobot.model.architecture import has_hand_written_gradients
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.technique import DEFAULT, Objective, Technique


class LossAndGradients(Protocol):
    def __call__(
        self,
        params: Params,
        tokens: mx.array,
        targets: mx.array,
        model: ModelConfig,
        *,
        scale: mx.array,
        frozen: Params | None = None,
        sums: Params | None = None,
        dtype: mx.Dtype = mx.float32,
        segments: mx.array | None = None,
        dropout_key: mx.array | None = None,
        adapter_dropout: float = 0.0,
        technique: Technique = DEFAULT,
        objective: Objective | None = None,
    ) -> tuple[mx.array, Params]:
        """`scale` times the summed cross-entropy of int32 `tokens` and `targets` [B, L] (negative targets add nothing),
        and its gradients by parameter name, float32, added to `sums` where given.

        `params` are trained; `frozen` are the model's other weights, which get no gradient: blocks below the lowest
        trained one save nothing for the backward pass. Matrix products are in `dtype`. `segments` [B, L] number the
        documents of a row: a token sees only its own. `dropout_key` turns dropout on, including `adapter_dropout` of
        the adapters' inputs; the same key drops the same elements. With an `objective`, the loss is a function of each
        row's log-probability, and the first result is its vector of measures.
        """


def loss_and_gradients(model: ModelConfig, technique: Technique) -> LossAndGradients:
    """The function that computes them for this architecture."""
    if technique.autodiff or not has_hand_written_gradients(model):
        return autodiff.loss_and_gradients
    module = import_module(f"anarchobot.model.{model.architecture}.gradients")
    return cast(LossAndGradients, module.loss_and_gradients)
