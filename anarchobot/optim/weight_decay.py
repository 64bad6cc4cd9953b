"""A step with decoupled weight decay (Loshchilov and Hutter, 2019), by default cautious."""

import mlx.core as mx

from anarchobot.config.schema import TrainConfig


def moved(w: mx.array, u: mx.array, lr: mx.array, train: TrainConfig) -> mx.array:
    """W - lr (u + weight_decay W); vectors, norms and biases, do not decay.

    With train.cautious_weight_decay, weights decay only where u and W have the same sign, so that decay never works
    against the update (Chen et al., "Cautious weight decay", 2025).
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
