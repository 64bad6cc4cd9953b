"""Loss and gradients by MLX's automatic differentiation, for any architecture.

The head and the loss are still computed in chunks, with hand-written gradients (model/loss.py), so that the logits
of a full batch never exist at once. The blocks are differentiated

- together, in MLX's order, which saves all activations; or
- with gradient checkpointing, sequentially from the last to the lowest trained block: each is recomputed from its input
  when its gradient is needed, its gradients are added to the sums, and both are freed before the next block.

Shapes: B rows, L tokens, N = B L, D d_model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import ForwardPass, forward_pass
from anarchobot.model.gradient_accumulator import GradientAccumulator, Params
from anarchobot.model.loss import head_loss
from anarchobot.model.parameters import by_block, lowest_trained_block
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
    forward = forward_pass(model)
    grads = GradientAccumulator({} if sums is None else sums, trained=params)

    def head(weights: Params, hidden: mx.array) -> tuple[mx.array, mx.array, list[mx.array]]:
        return head_loss(hidden, weights, batch, model, grads, options)

    if not options.recompute:
        # Evaluating inside the function that MLX differentiates would keep all of its intermediate arrays.
        options = replace(options, wait=depend)
    ctx = _Pass(forward, params, {**(frozen or {}), **params}, model, batch, grads, head)
    embed = partial(forward.embed, tokens=batch.tokens, model=model, dtype=dtype)
    total = _checkpointed(ctx, embed, options) if options.recompute else _full_backward(ctx, embed)
    return total, {name: grads.sums[name] for name in params}


@dataclass(frozen=True)
class _Pass:
    forward: ForwardPass
    params: Params  # trained
    weights: Params  # all
    model: ModelConfig
    batch: MicroBatch
    grads: GradientAccumulator
    head: Callable[[Params, mx.array], tuple[mx.array, mx.array, list[mx.array]]]  # adds its weight's gradient to grads

    def final_norm(self, trained: Params, x: mx.array) -> mx.array:
        return self.forward.final_norm({**self.weights, **trained}, x, self.model)

    def trained_params_used_by(self, function: Callable[[Params], object]) -> Params:
        """Returns the trained parameters that a function of the parameters uses, in float32: the gradient of an
        embedding is a sum over tokens, in the embedding's dtype."""
        recorder = _Recorder(self.weights)
        function(recorder)
        return {name: p.astype(mx.float32) for name, p in self.params.items() if name in recorder.used}


def _full_backward(ctx: _Pass, embed: Callable[[Params], mx.array]) -> mx.array:
    forward, model = ctx.forward, ctx.model

    def final_hidden(weights: Params) -> mx.array:
        x = embed(weights)
        for i, p in enumerate(by_block(weights, model)):
            x = forward.layer(p, x, i, model, ctx.batch)
        return forward.final_norm(weights, x, model)

    def surrogate(trained: Params) -> tuple[mx.array, mx.array]:
        """Returns a scalar with the gradient of the loss: the hidden states times their gradient, with stop_gradient.
        Its value is never computed. Also returns the loss."""
        hidden = final_hidden({**ctx.weights, **trained})
        total, dhidden, _ = ctx.head(ctx.weights, mx.stop_gradient(hidden))
        return mx.sum(hidden * mx.stop_gradient(dhidden)), total

    outside = ctx.trained_params_used_by(lambda weights: forward.final_norm(weights, embed(weights), model))
    in_blocks = {name: p for name, p in ctx.params.items() if name.startswith("model.layers.")}
    (_, total), gradients = mx.value_and_grad(surrogate)(outside | in_blocks)
    for name, gradient in gradients.items():
        ctx.grads.add(name, gradient)
    return total


def _checkpointed(ctx: _Pass, embed: Callable[[Params], mx.array], options: StepOptions) -> mx.array:
    forward, model, wait = ctx.forward, ctx.model, options.wait
    blocks, lowest = by_block(ctx.weights, model), lowest_trained_block(ctx.params, model)

    x = embed(ctx.weights)
    inputs: list[mx.array] = []
    for i, p in enumerate(blocks):
        if i >= lowest:
            inputs.append(x)
        x = forward.layer(p, x, i, model, ctx.batch)
        (x,) = wait([x], [x])

    total, dhidden, done = ctx.head(ctx.weights, ctx.final_norm({}, x))
    (x,) = wait([x], done)
    norms = ctx.trained_params_used_by(partial(forward.final_norm, x=x, model=model))
    (dx,) = _backward(ctx.final_norm, norms, [x], dhidden, ctx.grads, options)
    del dhidden, done

    for i in reversed(range(lowest, model.n_layers)):
        trained = {name: p for name, p in blocks[i].items() if f"model.layers.{i}.{name}" in ctx.params}

        def block(trained: Params, x: mx.array, i: int = i) -> mx.array:
            return forward.layer({**blocks[i], **trained}, x, i, model, ctx.batch)

        (x,) = wait([inputs.pop()], [dx])
        (dx,) = _backward(block, trained, [x], dx, ctx.grads.scoped(f"model.layers.{i}."), options)
        del x
    if lowest == 0 and (embeddings := ctx.trained_params_used_by(embed)):
        _backward(lambda p: embed({**ctx.weights, **p}), embeddings, [], dx, ctx.grads, options)
    return total


def _backward(
    function: Callable[..., mx.array],
    trained: Params,
    inputs: list[mx.array],
    cotangent: mx.array,
    grads: GradientAccumulator,
    options: StepOptions,
) -> list[mx.array]:
    """Returns the gradients of `inputs` of function(trained, *inputs), given the `cotangent` of its output. The
    gradients of the parameters are added to `grads`, and done before the result can be used."""
    names = list(trained)

    def flat(*arrays: mx.array) -> list[mx.array]:
        return [function(dict(zip(names, arrays, strict=False)), *arrays[len(names) :])]

    _, gradients = mx.vjp(flat, [*trained.values(), *inputs], [cotangent])
    done = [g for name, gradient in zip(names, gradients, strict=False) for g in grads.add(name, gradient)]
    dinputs = gradients[len(names) :]
    return options.wait(dinputs, [*done, *dinputs])


class _Recorder(dict[str, mx.array]):
    """A dict that remembers which keys were read."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> mx.array:
        self.used.add(name)
        return super().__getitem__(name)
