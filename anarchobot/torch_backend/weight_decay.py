"""A step with decoupled weight decay (Loshchilov and Hutter, 2019), by default cautious."""

from torch import Tensor

from anarchobot.config.schema import TrainConfig


def move(w: Tensor, u: Tensor, lr: float, train: TrainConfig) -> None:
    """W <- W - lr (u + weight_decay W), in place; `u` is used up. Vectors, norms and biases, do not decay.

    With train.cautious_weight_decay, weights decay only where u and W have the same sign (Chen et al., 2025).
    """
    if train.weight_decay != 0 and w.ndim > 1:
        decayed = w * (u * w > 0) if train.cautious_weight_decay else w
        u.add_(decayed, alpha=train.weight_decay)
    w.sub_(u, alpha=lr)
