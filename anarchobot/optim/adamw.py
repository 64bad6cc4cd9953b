"""AdamW (Loshchilov and Hutter, 2019) as a function of dicts of arrays, bias correction on."""

import mlx.core as mx

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.sequencing import Wait
from anarchobot.optim.weight_decay import moved

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8

Arrays = dict[str, mx.array]


def adamw(
    params: Arrays,
    grads: Arrays,
    first: Arrays,
    second: Arrays,
    lr: mx.array,
    count: mx.array,
    train: TrainConfig,
    wait: Wait,
) -> tuple[Arrays, Arrays, Arrays]:
    """One update; all dicts have the same names, and are used up. `count` (float32 scalar) is 1 for the first update:
    without the correction by it (MLX's default) that one would be 0.45 times its size. Norms and other vectors are not
    decayed.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        W <- W - lr (u + weight_decay W)                             (optim/weight_decay.py)

    Returns the new (params, first moments, second moments).
    """
    new_params, new_first, new_second = {}, {}, {}
    correction1, correction2 = 1 - mx.power(BETA1, count), 1 - mx.power(BETA2, count)
    for name in list(params):
        # No name here holds an old array while the new one is computed: it takes the old one's memory.
        m, v = _moments(grads.pop(name), first.pop(name), second.pop(name))
        u = _direction(m, v, correction1, correction2)
        w = moved(params.pop(name), u, lr, train)
        new_params[name], new_first[name], new_second[name] = wait([w, m, v], [w, m, v])
        del u
    return new_params, new_first, new_second


# Compiled one by one, also where the whole step is not: one pass over memory each, in place.


@mx.compile
def _moments(g: mx.array, first: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    return BETA1 * first + (1 - BETA1) * g, BETA2 * second + (1 - BETA2) * g * g


@mx.compile
def _direction(m: mx.array, v: mx.array, correction1: mx.array, correction2: mx.array) -> mx.array:
    return (m / correction1) / (mx.sqrt(v / correction2) + EPSILON)
