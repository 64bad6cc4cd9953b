"""Head and cross-entropy in one, by chunks of tokens: the logits of a whole batch never exist at once.

8,192 tokens of a 32,000-word vocabulary are 1 GiB of float32 logits, and as much again for their gradient. Here each
chunk's logits give its loss and, at once, its share of both gradients, and are gone (as Cut Cross-Entropy, Wijmans et
al., 2024, without its filtering). MLX is lazy, so each chunk is made to wait for the one before it.

Shapes: N tokens, D d_model, V vocabulary, C chunk.
"""

from collections.abc import Iterator

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.numerics.elementary import exp, row_sums, tanh
from anarchobot.numerics.order import Wait, tied
from anarchobot.numerics.products import add_product

CHUNK = 256  # tokens


def loss_sum(hidden: mx.array, weight: mx.array, targets: mx.array, model: ModelConfig, chunk: int = CHUNK) -> mx.array:
    """Summed cross-entropy in nats (float32 scalar), without gradients: for evaluation.

    `hidden` [N, D], `weight` [V, D], `targets` [N] of int32; negative targets add nothing.
    """
    total = mx.array(0.0)
    for h, t in _chunks(hidden, targets, chunk):
        (h,) = mx.depends([h], [total])
        loss, _, _, _ = _chunk_loss(h, weight, t, model)
        total = total + loss
    return total


def loss_and_gradients(
    hidden: mx.array,
    weight: mx.array,
    targets: mx.array,
    model: ModelConfig,
    scale: mx.array,
    weight_gradient: mx.array | None = None,
    chunk: int = CHUNK,
    wait: Wait = tied,
) -> tuple[mx.array, mx.array, mx.array]:
    """`scale` times `loss_sum`, and its gradients for `hidden` [N, D] in hidden's dtype and `weight` [V, D] in float32,
    the latter added to `weight_gradient` where given.

    For a token with softmax p and one-hot target y, dL/dz = p - y (times 1 - (z/cap)^2 under a softcap), so
    dL/dh = dL/dz W and dL/dW = dL/dz^T h. The scale comes in at dL/dz, in float32, before anything is rounded to
    hidden's dtype: with float16 a small p would be lost otherwise.
    """
    total = mx.array(0.0)
    hidden_gradients: list[mx.array] = []
    for h, t in _chunks(hidden, targets, chunk):
        done = [total, *hidden_gradients[-1:], *([] if weight_gradient is None else [weight_gradient])]
        (h,) = wait([h], done)
        loss, z, exps, sums = _chunk_loss(h, weight, t, model)
        exps, sums = wait([exps, sums], [loss])
        weights = scale * (t >= 0).astype(mx.float32)[:, None]  # [C, 1]; a negative target's row is zero
        dz = exps * (weights / sums)
        target = mx.maximum(t, 0)[:, None]
        dz = mx.put_along_axis(dz, target, mx.take_along_axis(dz, target, axis=1) - weights, axis=1)
        if model.logit_softcap is not None:
            dz = dz * (1 - mx.square(z * (1 / model.logit_softcap)))
        (dz,) = wait([dz.astype(h.dtype)], [dz])  # [C, V]
        del z, exps
        hidden_gradients.append(dz @ weight.astype(h.dtype))
        weight_gradient = add_product(weight_gradient, dz.T, h)
        total = total + loss
    assert weight_gradient is not None  # there is at least one token
    return scale * total, mx.concatenate(hidden_gradients), weight_gradient


def _chunks(hidden: mx.array, targets: mx.array, chunk: int) -> Iterator[tuple[mx.array, mx.array]]:
    for i in range(0, hidden.shape[0], chunk):
        yield hidden[i : i + chunk], targets[i : i + chunk]


def _chunk_loss(
    h: mx.array, weight: mx.array, t: mx.array, model: ModelConfig
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The chunk's summed loss; its logits z [C, V]; e^(z - highest) [C, V] and its sums [C, 1]; all float32."""
    z = (h @ weight.astype(h.dtype).T).astype(mx.float32)
    if model.logit_softcap is not None:
        z = model.logit_softcap * tanh(z * (1 / model.logit_softcap))
    highest = mx.max(z, axis=1, keepdims=True)
    exps = exp(z - highest)
    sums = row_sums(exps)
    picked = mx.take_along_axis(z, mx.maximum(t, 0)[:, None], axis=1)
    losses = highest + mx.log(sums) - picked  # [C, 1]
    return mx.sum(losses * (t >= 0).astype(mx.float32)[:, None]), z, exps, sums
