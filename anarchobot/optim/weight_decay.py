"""A parameter update with decoupled weight decay (Loshchilov and Hutter, 2019), cautious by default."""

import mlx.core as mx

from anarchobot.config.schema import TrainConfig


def apply_update(w: mx.array, u: mx.array, lr: mx.array, train: TrainConfig) -> mx.array:
    """W - lr (u + weight_decay W). Vectors (norms and biases) do not decay.

    With train.cautious_weight_decay, a weight decays only where u and W have the same sign, so that the decay never
    opposes the update (Chen et al., "Cautious weight decay", 2025).
    """
    if train.weight_decay == 0 or w.ndim == 1:
        return _plain(w, u, lr)
    if train.cautious_weight_decay:
        return _cautious(w, u, lr, train.weight_decay)
    return _decayed(w, u, lr, train.weight_decay)


@mx.compile
def _plain(w: mx.array, u: mx.array, lr: mx.array) -> mx.array:
    return w - lr * u


@mx.compile
def _decayed(w: mx.array, u: mx.array, lr: mx.array, decay: float) -> mx.array:
    return w - lr * (u + decay * w)


@mx.compile
def _cautious(w: mx.array, u: mx.array, lr: mx.array, decay: float) -> mx.array:
    return w - lr * (u + decay * w * (u * w > 0))
