"""Loss and gradients of models that mlx-lm computes, by MLX's automatic differentiation.

The head and the loss are computed in chunks of tokens (model/loss.py). With gradient checkpointing, each block is
computed again in the backward pass (model/mlx_lm/checkpointing.py).
"""

from dataclasses import replace

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.gradient_accumulator import GradientAccumulator, Params
from anarchobot.model.loss import head_loss
from anarchobot.model.mlx_lm.frozen import cast_weights
from anarchobot.model.mlx_lm.module import network
from anarchobot.model.step_options import DEFAULT, MicroBatch, StepOptions
from anarchobot.numerics.eval_order import depend


def loss_and_gradients(
    params: Params,
    batch: MicroBatch,
    model: ModelConfig,
    *,
    frozen: Params | None = None,
    sums: Params | None = None,
    dtype: mx.Dtype = mx.float32,
    options: StepOptions = DEFAULT,
) -> tuple[mx.array, Params]:
    """See LossAndGradients in model/architecture.py."""
    assert batch.segments is None, "mlx-lm's modules have no mask of documents"
    grads = GradientAccumulator({} if sums is None else sums, trained=params)
    weights = {**(frozen or {}), **params}
    net = network(model, weights)
    # Evaluating inside the function that MLX differentiates would keep all of its intermediate arrays.
    options = replace(options, wait=depend)

    def surrogate(trained: Params) -> tuple[mx.array, mx.array]:
        """Returns a scalar with the gradient of the loss: the hidden states times their gradient, with stop_gradient.
        Its value is never computed. Also returns the loss."""
        with net.bound(cast_weights(trained, model, dtype)):
            hidden = net.hidden_states(batch.tokens)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        total, dhidden, _ = head_loss(mx.stop_gradient(hidden), weights, batch, model, grads, options)
        return mx.sum(hidden * mx.stop_gradient(dhidden)), total

    with net.bound(cast_weights(weights, model, dtype)), net.training(batch, params if options.recompute else None):
        (_, total), gradients = mx.value_and_grad(surrogate)(params)
    for name, gradient in gradients.items():
        grads.add(name, gradient)
    return total, {name: grads.sums[name] for name in params}
