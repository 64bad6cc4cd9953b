"""Gradient checkpointing (Chen et al., 2016) of mlx-lm's blocks: a block saves its input and is computed again in the
backward pass. Unlike mlx-lm's own, it changes only these blocks, not their class."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

Module = Any  # of mlx.nn, which has no types

Entry = tuple[Module, str]  # an array of a module, by key


class Recomputation:
    """The trained arrays of each block by the block's id; off if None."""

    def __init__(self) -> None:
        self.trained: dict[int, list[Entry]] | None = None


def make_recomputable(blocks: Sequence[Module], recomputation: Recomputation) -> None:
    for block in blocks:
        _subclass(block, recomputation)


def _subclass(block: Module, recomputation: Recomputation) -> None:
    base = type(block)

    def __call__(self: Module, *args: Any, **kwargs: Any) -> Any:
        if recomputation.trained is None:
            return base.__call__(self, *args, **kwargs)
        entries = recomputation.trained[id(self)]

        def run(arrays: list[mx.array], *args: Any, **kwargs: Any) -> Any:
            before = [owner[key] for owner, key in entries]
            try:
                _set(entries, arrays)
                return base.__call__(self, *args, **kwargs)
            finally:
                _set(entries, before)

        # MLX differentiates with respect to arguments only: the trained arrays are an argument.
        return mx.checkpoint(run)([owner[key] for owner, key in entries], *args, **kwargs)

    block.__class__ = type(base.__name__, (base,), {"__call__": __call__})


def _set(entries: Sequence[Entry], arrays: Sequence[mx.array]) -> None:
    for (owner, key), array in zip(entries, arrays, strict=True):
        dict.__setitem__(owner, key, array)
