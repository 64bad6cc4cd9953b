"""AdamW (Loshchilov and Hutter, 2019), bias correction on: optim/adamw.py in place."""

from torch import Tensor

from anarchobot.config.schema import TrainConfig
from anarchobot.torch_backend.weight_decay import move

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8

Tensors = dict[str, Tensor]


def adamw(
    params: Tensors, grads: Tensors, first: Tensors, second: Tensors, lr: float, count: int, train: TrainConfig
) -> None:
    """One update, in place; `first` and `second` say which of the others are AdamW's. `count` is 1 for the first.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    W <- W - lr (u + weight_decay W)
    """
    correction1, correction2 = 1 - BETA1**count, 1 - BETA2**count
    for name, m in first.items():
        g, v = grads[name], second[name]
        m.mul_(BETA1).add_(g, alpha=1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        u = (m / correction1).div_((v / correction2).sqrt_().add_(EPSILON))
        move(params[name], u, lr, train)
