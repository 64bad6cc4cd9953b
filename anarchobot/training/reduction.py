"""What the workers' gradients come to: their sum, and its norm. One parameter after the other: its memory is used again
for the next one."""

import mlx.core as mx

from anarchobot.model.gradient_accumulator import Params


def summed(parts: list[Params]) -> Params:
    """The sums of several workers' gradients, which are used up."""
    first, *others = parts
    for other in others:
        for name in first:
            first[name] = first[name] + other.pop(name)
            mx.eval(first[name])
    return first


def global_norm(grads: Params) -> mx.array:
    """The root of the sum of all squares; a float32 scalar."""
    squares: list[mx.array] = []
    for g in grads.values():
        squares.append(mx.sum(mx.square(g)))
        mx.eval(squares[-1])
    return mx.sqrt(mx.sum(mx.stack(squares)))
