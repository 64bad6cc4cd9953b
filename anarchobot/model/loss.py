"""Head and cross-entropy in one, by chunks of tokens: the logits of a whole batch never exist at once.

8,192 tokens of a 32,000-word vocabulary are 1 GiB of float32 logits, and as much again for their gradient. Here each
chunk's logits give its loss and, at once, its share of both gradients, and are gone (as Cut Cross-Entropy, Wijmans et
al., 2024, without its filtering). MLX is lazy, so each chunk is made to wait for the one before it.

Shapes: N tokens, D d_model, V vocabulary, C chunk.
"""

from typing import Any

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.transformer import logits

CHUNK = 256  # tokens


def loss_sum(hidden: mx.array, weight: mx.array, targets: mx.array, model: ModelConfig) -> mx.array:
    """Summed cross-entropy in nats (float32 scalar), without gradients: for evaluation.

    `hidden` [N, D], `weight` [V, D], `targets` [N] of int32; negative targets add nothing.
    """
    total = mx.array(0.0)
    for h, t in _chunks(hidden, targets):
        (h,) = mx.depends([h], [total])
        total = total + _chunk_loss(h, weight, t, model)[0]
    return total


def scaled_loss(hidden: mx.array, weight: mx.array, targets: mx.array, model: ModelConfig, scale: mx.array) -> mx.array:
    """`scale` times `loss_sum`, with its own gradient for `hidden` and `weight`, computed together with the loss.

    For a token with softmax p and one-hot target y, dL/dz = p - y (times 1 - (z/cap)^2 under a softcap), so
    dL/dh = dL/dz W and dL/dW = dL/dz^T h. The scale comes in at dL/dz, in float32, before anything is rounded to
    hidden's dtype: with float16 a small p would be lost otherwise.
    """

    @mx.custom_function
    def fused(hidden: mx.array, weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        total = mx.array(0.0)
        weight_gradient = mx.zeros(weight.shape, mx.float32)
        hidden_gradients: list[mx.array] = []
        for h, t in _chunks(hidden, targets):  # targets are closed over: integers have no gradient
            (h,) = mx.depends([h], [weight_gradient, total, *hidden_gradients[-1:]])
            loss, z = _chunk_loss(h, weight, t, model)
            dz = (scale * _logits_gradient(z, t, model)).astype(h.dtype)  # [C, V]
            hidden_gradients.append(dz @ weight.astype(h.dtype))
            weight_gradient = weight_gradient + (dz.T @ h).astype(mx.float32)
            total = total + loss
        return scale * total, mx.concatenate(hidden_gradients), weight_gradient

    @fused.vjp
    def fused_vjp(
        primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        _, hidden_gradient, weight_gradient = outputs
        incoming = cotangents[0]
        return hidden_gradient * incoming.astype(hidden_gradient.dtype), weight_gradient * incoming

    outputs: Any = fused(hidden, weight)  # MLX's stubs call it an object
    loss: mx.array = outputs[0]
    return loss


def _chunks(hidden: mx.array, targets: mx.array) -> list[tuple[mx.array, mx.array]]:
    return [(hidden[i : i + CHUNK], targets[i : i + CHUNK]) for i in range(0, hidden.shape[0], CHUNK)]


def _chunk_loss(h: mx.array, weight: mx.array, t: mx.array, model: ModelConfig) -> tuple[mx.array, mx.array]:
    z = logits(h, weight, model)  # [C, V] float32
    scored = t >= 0
    picked = mx.take_along_axis(z, mx.where(scored, t, 0)[:, None], axis=1)[:, 0]
    losses = mx.logsumexp(z, axis=1) - picked  # [C]
    return mx.sum(mx.where(scored, losses, 0.0)), z


def _logits_gradient(z: mx.array, t: mx.array, model: ModelConfig) -> mx.array:
    one_hot = mx.arange(z.shape[1])[None, :] == t[:, None]  # the row of a negative target is all false
    dz = mx.where((t >= 0)[:, None], mx.softmax(z, axis=1) - one_hot, 0.0)
    return dz if model.logit_softcap is None else dz * (1 - (z / model.logit_softcap) ** 2)
