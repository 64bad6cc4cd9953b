"""Inputs and options of a forward and backward pass. Shapes: B rows, L tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.schema import Technique
from anarchobot.model.architecture import CPU_LOSS_CHUNK
from anarchobot.model.distillation import TeacherTargets
from anarchobot.numerics.eval_order import EvalOrder, depend
from anarchobot.numerics.profiling import NO_PROFILE, Profile

Objective = Callable[[mx.array], tuple[mx.array, mx.array]]
"""Maps the log-probabilities of the targets [B, L], 0 where there is none, to a vector of the summed loss and any extra
metrics, and the gradient [B, L] of the loss."""


class MicroBatch(NamedTuple):
    """Training rows: int32 `tokens` and `targets` [B, L]; negative targets are ignored. The loss is summed and
    multiplied by `scale`, a scalar.

    `segments` [B, L] number the documents of a row: a token sees only its own. `dropout_key` turns dropout on,
    including `adapter_dropout` of the adapters' inputs; the same key drops the same elements. With an `objective`, the
    loss is that of the objective instead of the tokens' cross-entropy; with a `teacher` of [B, L, k], it also has the
    divergence from the teacher (model/distillation.py).
    """

    tokens: mx.array
    targets: mx.array
    scale: mx.array
    segments: mx.array | None = None
    dropout_key: mx.array | None = None
    adapter_dropout: float = 0.0
    objective: Objective | None = None
    teacher: TeacherTargets | None = None


@dataclass(frozen=True)
class StepOptions:
    """Options of a forward and backward pass; they change the results only by rounding.

    `recompute`: save only each block's input and run its forward pass again (gradient checkpointing; Chen et al.,
    2016). `technique`: how attention and gradients are computed (train.technique). `wait`: evaluation order
    (numerics/eval_order.py). `attention_block`: queries per block; None: chosen by memory. `mlp_rows`: tokens per chunk
    of an MLP; None: all. `loss_chunk`: tokens per chunk of the head. `profile`: profiler hook.
    """

    recompute: bool = False
    technique: Technique = "blocked"
    wait: EvalOrder = depend
    attention_block: int | None = None
    mlp_rows: int | None = None
    loss_chunk: int = CPU_LOSS_CHUNK
    profile: Profile = NO_PROFILE


DEFAULT = StepOptions()
