"""What makes one part of a computation wait for another.

MLX is lazy and starts whatever it can, breadth first: several layers' gradients and recomputed parts would be in memory
at once. Each part of the backward pass is therefore made to wait until the one before it is done.
"""

from collections.abc import Callable

import mlx.core as mx

Wait = Callable[[list[mx.array], list[mx.array]], list[mx.array]]
"""(arrays, done) -> the arrays, not to be used before `done` is computed."""


def tied(arrays: list[mx.array], done: list[mx.array]) -> list[mx.array]:
    """In the graph itself: what a compiled step needs."""
    return mx.depends(arrays, done) if done else arrays


def evaluated(arrays: list[mx.array], done: list[mx.array]) -> list[mx.array]:
    """By computing `done` now. MLX's CPU backend runs up to a hundred operations ahead of memory that is being freed;
    evaluating keeps it short, and costs nothing there."""
    mx.eval(done)
    return arrays


def free(arrays: list[mx.array], done: list[mx.array]) -> list[mx.array]:
    """Not at all: in MLX's own order."""
    return arrays
