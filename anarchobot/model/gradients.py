"""Loss and gradients of the whole model: the entry to a model's backward pass, for any architecture.

An architecture with hand-written gradients (model/llama/gradients.py) uses these; any other, and any on request,
is differentiated by MLX (model/autodiff.py). Both use the same chunked loss (model/loss.py).

Shapes: B rows, L tokens, N = B L.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model import loss
from anarchobot.model.architecture import has_hand_written_gradients
from anarchobot.model.gradient_accumulator import GradientAccumulator, Params
from anarchobot.model.linear import Matrix
from anarchobot.numerics.profiling import NO_PROFILE, Profile
from anarchobot.numerics.sequencing import Sequencing, depend

Objective = Callable[[mx.array], tuple[mx.array, mx.array]]
"""From the log-probabilities of the rows' targets [B]: a vector of the summed loss and whatever else is measured, and
the gradient [B] of the loss."""


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
    loss_chunk: int = loss.CHUNK
    autodiff: bool = False
    profile: Profile = NO_PROFILE


DEFAULT = Technique()


class LossAndGradients(Protocol):
    def __call__(
        self,
        params: Params,
        tokens: mx.array,
        targets: mx.array,
        model: ModelConfig,
        *,
        scale: mx.array,
        frozen: Params | None = None,
        sums: Params | None = None,
        dtype: mx.Dtype = mx.float32,
        segments: mx.array | None = None,
        dropout_key: mx.array | None = None,
        adapter_dropout: float = 0.0,
        technique: Technique = DEFAULT,
        objective: Objective | None = None,
    ) -> tuple[mx.array, Params]:
        """`scale` times the summed cross-entropy of int32 `tokens` and `targets` [B, L] (negative targets add nothing),
        and its gradients by parameter name, float32, added to `sums` where given.

        `params` are trained; `frozen` are the model's other weights, which get no gradient: blocks below the lowest
        trained one save nothing for the backward pass. Matrix products are in `dtype`. `segments` [B, L] number the
        documents of a row: a token sees only its own. `dropout_key` turns dropout on, including `adapter_dropout` of
        the adapters' inputs; the same key drops the same elements. With an `objective`, the loss is a function of each
        row's log-probability, and the first result is its vector of measures.
        """


def loss_and_gradients(model: ModelConfig, technique: Technique) -> LossAndGradients:
    """The function that computes them for this architecture."""
    if technique.autodiff or not has_hand_written_gradients(model):
        from anarchobot.model.autodiff import loss_and_gradients as by_autodiff

        return by_autodiff
    module = import_module(f"anarchobot.model.{model.architecture}.gradients")
    return cast(LossAndGradients, module.loss_and_gradients)


def head_loss(
    hidden: mx.array,
    head: Matrix,
    head_name: str,
    targets: mx.array,
    model: ModelConfig,
    scale: mx.array,
    grads: GradientAccumulator,
    technique: Technique,
    objective: Objective | None,
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """Loss and gradient of the output head, which is added to `grads` if the head is trained.

    From `hidden` [N, D] and `targets` [B, L]: `scale` times the summed loss (or the objective's measures), the gradient
    of `hidden`, and the arrays that later work must wait for.
    """
    wait, chunk, measures = technique.wait, technique.loss_chunk, None
    rows, length = targets.shape
    targets = targets.reshape(-1)
    if objective is not None:
        losses = loss.token_losses(hidden, head, targets, model, chunk)
        measures, slopes = objective(-losses.reshape(rows, length).sum(axis=1))
        (hidden,) = wait([hidden], [slopes])
        measures, scale = scale * measures, mx.repeat(-scale * slopes, length)  # [N]
    if grads.trains(head_name):
        assert isinstance(head, mx.array)
        total, dhidden, grads.sums[head_name] = loss.loss_and_gradients(
            hidden, head, targets, model, scale, grads.sums.pop(head_name, None), chunk, wait
        )
        done = [dhidden, grads.sums[head_name]]
    else:
        total, dhidden = loss.loss_and_hidden_gradient(hidden, head, targets, model, scale, chunk, wait)
        done = [total, dhidden]
    return total if measures is None else measures, dhidden, done


def lowest_trained_block(params: Params, model: ModelConfig) -> int:
    """The first block that the backward pass must reach; n_layers when it need not reach any."""
    blocks = [int(name.split(".")[2]) for name in params if name.startswith("model.layers.")]
    below = any(not name.startswith(("model.layers.", "model.norm.", "lm_head.")) for name in params)
    return 0 if below else min(blocks, default=model.n_layers)
