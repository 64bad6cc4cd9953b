"""The output head and cross-entropy together, in chunks of tokens with their own gradients: the logits of a whole batch
never exist at once, and none are saved. The blocks are differentiated by autograd.

Shapes: N tokens, D d_model, V vocabulary, C chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from anarchobot.config.schema import ModelConfig
from anarchobot.torch_backend.model import Params, StepOptions, head_name, hidden_states


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
    options: StepOptions,
) -> Tensor:
    """The summed cross-entropy of `tokens` and `targets` [B, L] (negative targets add nothing), a float32 scalar;
    `scale` times its gradients are added to the parameters' `grad`, float32.

    Matrix products are in `dtype`. `segments` [B, L] number the documents of a row: a token sees only its own.
    `dropout_key` turns dropout on; the same key drops the same elements.
    """
    hidden = hidden_states(
        params, tokens, model, dtype=dtype, segments=segments, dropout_key=dropout_key, options=options
    )
    head = params[head_name(model)]
    if head.grad is None:
        head.grad = torch.zeros_like(head)
    total, dhidden = loss_and_gradients(
        hidden.flatten(0, 1), head, targets.flatten(), model, scale, head.grad, options.loss_chunk
    )
    torch.autograd.backward([hidden], [dhidden.view_as(hidden)])
    return total


def loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor, model: ModelConfig, chunk: int) -> Tensor:
    """Summed cross-entropy in nats (float32 scalar), without gradients: for evaluation.

    `hidden` [N, D], `weight` [V, D], `targets` [N] of int64; negative targets add nothing.
    """
    hidden, weight = hidden.detach(), weight.detach().to(hidden.dtype)
    total = torch.zeros((), device=hidden.device)
    for h, t in _chunks(hidden, targets, chunk):
        total += _chunk_loss(logits(h, weight, model), t)[0]
    return total


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    model: ModelConfig,
    scale: float,
    weight_gradient: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Returns `loss_sum` and `scale` times its gradient with respect to `hidden` [N, D], in hidden's dtype. The
    gradient with respect to `weight` [V, D] is added to `weight_gradient` (float32), in place.

    For a token with softmax p and one-hot target y, dL/dz = p - y (times 1 - (z/cap)^2 under a softcap), so
    dL/dh = dL/dz W and dL/dW = dL/dz^T h. The scale is applied to dL/dz in float32, before anything is rounded to
    hidden's dtype: otherwise a small p would be lost in float16.
    """
    hidden, weight = hidden.detach(), weight.detach().to(hidden.dtype)
    total = torch.zeros((), device=hidden.device)
    hidden_gradients: list[Tensor] = []
    for h, t in _chunks(hidden, targets, chunk):
        z = logits(h, weight, model)  # [C, V] float32
        loss, logsumexp = _chunk_loss(z, t)
        total += loss
        weights = scale * (t >= 0).float()[:, None]  # [C, 1]; a negative target's row is zero
        dz = torch.exp(z - logsumexp) * weights
        dz.scatter_add_(1, t.clamp(min=0)[:, None], -weights)
        if model.logit_softcap is not None:
            dz *= 1 - (z / model.logit_softcap) ** 2
        del z
        dz = dz.to(h.dtype)
        hidden_gradients.append(dz @ weight)
        if h.dtype == torch.float32:
            weight_gradient.addmm_(dz.T, h)
        else:
            weight_gradient += dz.T @ h
    return total, torch.cat(hidden_gradients)


def logits(hidden: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    """float32 logits [N, V] of hidden states [N, D]: the product in their dtype, the rest in float32."""
    z = (hidden @ weight.to(hidden.dtype).T).float()
    return z if model.logit_softcap is None else model.logit_softcap * torch.tanh(z / model.logit_softcap)


def _chunks(hidden: Tensor, targets: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)


def _chunk_loss(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of logits [C, V] and targets [C], and the logsumexp of each row [C, 1]."""
    logsumexp = torch.logsumexp(z, dim=1, keepdim=True)
    losses = logsumexp - z.gather(1, t.clamp(min=0)[:, None])
    return (losses * (t >= 0)[:, None]).sum(), logsumexp
