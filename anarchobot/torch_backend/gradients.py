"""Loss and gradients of the whole model: the blocks by autograd, the head by hand (torch_backend/loss.py)."""

import torch
from torch import Tensor

from anarchobot.config.schema import ModelConfig
from anarchobot.torch_backend import loss
from anarchobot.torch_backend.block import Params
from anarchobot.torch_backend.transformer import Technique, head_name, hidden_states


def add_gradients(
    params: Params,
    tokens: Tensor,
    targets: Tensor,
    model: ModelConfig,
    *,
    scale: float,
    dtype: torch.dtype = torch.float32,
    segments: Tensor | None = None,
    dropout_key: str | None = None,
    technique: Technique,
) -> Tensor:
    """The summed cross-entropy of `tokens` and `targets` [B, L] (negative targets add nothing), a float32 scalar;
    `scale` times its gradients are added to the parameters' `grad`, float32.

    Products are in `dtype`. `segments` [B, L] number the documents of a row: a token sees only its own. `dropout_key`
    turns dropout on; the same key drops the same places.
    """
    hidden = hidden_states(
        params, tokens, model, dtype=dtype, segments=segments, dropout_key=dropout_key, technique=technique
    )
    head = params[head_name(model)]
    if head.grad is None:
        head.grad = torch.zeros_like(head)
    total, dhidden = loss.loss_and_gradients(
        hidden.flatten(0, 1), head, targets.flatten(), model, scale, head.grad, technique.loss_chunk
    )
    torch.autograd.backward([hidden], [dhidden.view_as(hidden)])
    return total
