"""Loss and gradients by MLX's automatic differentiation, for any architecture.

The head and the loss are still computed in chunks, with their own gradients (model/loss.py), so that the logits of a
whole batch never exist. The blocks are differentiated

- together, in MLX's own order, which saves all activations; or
- with gradient checkpointing, one after the other from the last to the lowest trained one: each is recomputed from its
  input when its gradient is due, its gradients are added to the sums, and both are freed before the next begins.

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
from anarchobot.model.technique import DEFAULT, MicroBatch, Technique
from anarchobot.numerics.sequencing import depend


def loss_and_gradients(
    params: Params,
    batch: MicroBatch,
    model: ModelConfig,
    *,
    frozen: Params | None = None,
    sums: Params | None = None,
    dtype: mx.Dtype = mx.float32,
    technique: Technique = DEFAULT,
) -> tuple[mx.array, Params]:
    """See LossAndGradients in model/architecture.py."""
    forward = forward_pass(model)
    grads = GradientAccumulator({} if sums is None else sums, trained=params)

    def head(weights: Params, hidden: mx.array) -> tuple[mx.array, mx.array, list[mx.array]]:
        return head_loss(hidden, weights, batch, model, grads, technique)

    if not technique.recompute:
        # Evaluating inside the function that MLX differentiates would keep all of its intermediate arrays.
        technique = replace(technique, wait=depend)
    own = _Pass(forward, params, {**(frozen or {}), **params}, model, batch, grads, head)
    embed = partial(forward.embed, tokens=batch.tokens, model=model, dtype=dtype)
    total = _checkpointed(own, embed, technique) if technique.recompute else _whole(own, embed)
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

    def final_norm(self, trained: Params, x: mx.array) -> list[mx.array]:
        return [self.forward.final_norm({**self.weights, **trained}, x, self.model)]

    def trained_by(self, function: Callable[[Params], object]) -> Params:
        """The trained parameters that a function of the parameters uses."""
        recorder = _Recorder(self.weights)
        function(recorder)
        return {name: p for name, p in self.params.items() if name in recorder.used}


def _whole(own: _Pass, embed: Callable[[Params], mx.array]) -> mx.array:
    forward, model = own.forward, own.model

    def carry(weights: Params) -> mx.array:
        carry = [embed(weights)]
        for i, p in enumerate(by_block(weights, model)):
            carry = forward.layer(p, carry, i, model, own.batch)
        return forward.final_norm(weights, carry[0], model)

    def surrogate(trained: Params) -> tuple[mx.array, mx.array]:
        """A scalar with the gradient of the loss: the hidden states times their gradient, taken as a constant. Its
        value is never computed."""
        hidden = carry({**own.weights, **trained})
        total, dhidden, _ = own.head(own.weights, mx.stop_gradient(hidden))
        return mx.sum(hidden * mx.stop_gradient(dhidden)), total

    outside = own.trained_by(lambda weights: forward.final_norm(weights, embed(weights), model))
    in_blocks = {name: p for name, p in own.params.items() if name.startswith("model.layers.")}
    (_, total), gradients = mx.value_and_grad(surrogate)(outside | in_blocks)
    for name, gradient in gradients.items():
        own.grads.add(name, gradient)
    return total


def _checkpointed(own: _Pass, embed: Callable[[Params], mx.array], technique: Technique) -> mx.array:
    forward, model, wait = own.forward, own.model, technique.wait
    blocks, lowest = by_block(own.weights, model), lowest_trained_block(own.params, model)

    carry = [embed(own.weights)]
    inputs: list[list[mx.array]] = []
    for i, p in enumerate(blocks):
        if i >= lowest:
            inputs.append(carry)
        carry = forward.layer(p, carry, i, model, own.batch)
        carry = wait(carry, carry)

    total, dhidden, done = own.head(own.weights, *own.final_norm({}, carry[0]))
    (x,) = wait([carry[0]], done)
    norms = own.trained_by(partial(forward.final_norm, x=x, model=model))
    dcarry = _backward(own.final_norm, norms, [x], [dhidden], own.grads, technique)
    dcarry += [mx.zeros_like(a) for a in carry[1:]]
    carry = [x]
    del x, dhidden, done

    for i in reversed(range(lowest, model.n_layers)):
        trained = {name: p for name, p in blocks[i].items() if f"model.layers.{i}.{name}" in own.params}

        def block(trained: Params, *carry: mx.array, i: int = i) -> list[mx.array]:
            return forward.layer({**blocks[i], **trained}, list(carry), i, model, own.batch)

        carry = wait(inputs.pop(), dcarry)
        dcarry = _backward(block, trained, carry, dcarry, own.grads.at(f"model.layers.{i}."), technique)
        del carry
    if lowest == 0 and (embeddings := own.trained_by(embed)):
        _backward(lambda p: [embed({**own.weights, **p})], embeddings, [], dcarry, own.grads, technique)
    return total


def _backward(
    function: Callable[..., list[mx.array]],
    trained: Params,
    inputs: list[mx.array],
    cotangents: list[mx.array],
    grads: GradientAccumulator,
    technique: Technique,
) -> list[mx.array]:
    """The gradients of `inputs` of function(trained, *inputs), given those of its outputs; the parameters' are added to
    `grads`, and done before the result may be used."""
    names = list(trained)

    def flat(*arrays: mx.array) -> list[mx.array]:
        return function(dict(zip(names, arrays, strict=False)), *arrays[len(names) :])

    _, gradients = mx.vjp(flat, [*trained.values(), *inputs], cotangents)
    done = [g for name, gradient in zip(names, gradients, strict=False) for g in grads.add(name, gradient)]
    dinputs = gradients[len(names) :]
    return technique.wait(dinputs, [*done, *dinputs])


class _Recorder(dict[str, mx.array]):
    """A dict that remembers which keys were read."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> mx.array:
        self.used.add(name)
        return super().__getitem__(name)
