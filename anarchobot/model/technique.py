"""What gradients are computed on, and how. Shapes: B rows, L tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from anarchobot.numerics.profiling import NO_PROFILE, Profile
from anarchobot.numerics.sequencing import Sequencing, depend

LOSS_CHUNK = 256  # tokens
Objective = Callable[[mx.array], tuple[mx.array, mx.array]]
"""From the log-probabilities of the rows' targets [B]: a vector of the summed loss and whatever else is measured, and
the gradient [B] of the loss."""


class MicroBatch(NamedTuple):
    """Training rows: int32 `tokens` and `targets` [B, L]; negative targets add nothing. Their loss is summed and
    multiplied by `scale`, a scalar.

    `segments` [B, L] number the documents of a row: a token sees only its own. `dropout_key` turns dropout on,
    including `adapter_dropout` of the adapters' inputs; the same key drops the same elements. With an `objective`, the
    loss is a function of each row's log-probability instead of the tokens' cross-entropy.
    """

    tokens: mx.array
    targets: mx.array
    scale: mx.array
    segments: mx.array | None = None
    dropout_key: mx.array | None = None
    adapter_dropout: float = 0.0
    objective: Objective | None = None


@dataclass(frozen=True)
class Technique:
    """How the gradients are computed; the results are the same but for rounding.

    `recompute`: save only each block's input and run its forward pass again (gradient checkpointing; Chen et al.,
    2016). `wait`: how each part waits for the one before it. `attention_block`: queries per block; None: chosen by
    memory. `mlp_rows`: tokens per chunk of an MLP; None: all. `loss_chunk`: tokens per chunk of the head. `autodiff`:
    differentiate by MLX, even where there are hand-written gradients. `profile`: notified of the parts.
    """

    recompute: bool = False
    wait: Sequencing = depend
    attention_block: int | None = None
    mlp_rows: int | None = None
    loss_chunk: int = LOSS_CHUNK
    autodiff: bool = False
    profile: Profile = NO_PROFILE


DEFAULT = Technique()
