"""Loss and gradients of the whole model: the entry to a model's backward pass, for any architecture.

An architecture with hand-written gradients (model/llama/gradients.py) uses these; any other, and any on request, is
differentiated by MLX (model/autodiff.py). Both use the same chunked loss (model/loss.py).
"""

from importlib import import_module
from typing import Protocol, cast

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model import autodiff
from anarchobot.model.architecture import has_hand_written_gradients
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.technique import DEFAULT, MicroBatch, Technique


class LossAndGradients(Protocol):
    def __call__(
        self,
        params: Params,
        batch: MicroBatch,
        model: ModelConfig,
        *,
        frozen: Params | None = None,
        sums: Params | None = None,
        dtype: mx.Dtype = mx.float32,
        technique: Technique = DEFAULT,
    ) -> tuple[mx.array, Params]:
        """The scaled loss of `batch` (or the vector of its objective's measures) and its gradients by parameter name,
        float32, added to `sums` where given.

        `params` are trained; `frozen` are the model's other weights, which get no gradient: blocks below the lowest
        trained one save nothing for the backward pass. Matrix products are in `dtype`.
        """


def loss_and_gradients(model: ModelConfig, technique: Technique) -> LossAndGradients:
    """The function that computes them for this architecture."""
    if technique.autodiff or not has_hand_written_gradients(model):
        return autodiff.loss_and_gradients
    module = import_module(f"anarchobot.model.{model.architecture}.gradients")
    return cast(LossAndGradients, module.loss_and_gradients)
