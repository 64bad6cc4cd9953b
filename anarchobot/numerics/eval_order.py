"""Controls the evaluation order of a computation.

MLX is lazy and starts all operations whose inputs are ready, breadth first: the gradients and recomputed activations of
several layers would be in memory at once. So each part of the backward pass waits until the previous part is done.
"""

from collections.abc import Callable

import mlx.core as mx

EvalOrder = Callable[[list[mx.array], list[mx.array]], list[mx.array]]
"""(arrays, done) -> arrays, which cannot be used before `done` is computed."""


def depend(arrays: list[mx.array], done: list[mx.array]) -> list[mx.array]:
    """Adds graph dependencies, as a compiled step requires."""
    return mx.depends(arrays, done) if arrays and done else arrays


def eval_now(arrays: list[mx.array], done: list[mx.array]) -> list[mx.array]:
    """Evaluates `done` immediately. MLX's CPU backend allocates up to a hundred operations ahead of the memory that it
    frees; evaluating keeps that short and costs nothing there."""
    mx.eval(done)
    return arrays


def unordered(arrays: list[mx.array], done: list[mx.array]) -> list[mx.array]:
    """No ordering: MLX chooses."""
    return arrays
