"""AdamW (Loshchilov and Hutter, 2019) as a function of dicts of arrays, with bias correction; the weight update."""

import mlx.core as mx

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.device import on_cpu
from anarchobot.numerics.eval_order import EvalOrder
from anarchobot.optim.param_groups import ADAMW_BETA1, ADAMW_BETA2, ADAMW_EPS, is_decayed

Arrays = dict[str, mx.array]
# The moments of a token that is no longer seen would decay to subnormal numbers and stay there: slow on many CPUs.
LEAST_MOMENT = 1e-30


def adamw(
    params: Arrays,
    grads: Arrays,
    first: Arrays,
    second: Arrays,
    lr: mx.array,
    count: mx.array,
    train: TrainConfig,
    wait: EvalOrder,
    factor: mx.array | float = 1.0,
) -> tuple[Arrays, Arrays, Arrays]:
    """One update by `factor` times the gradients. All dicts have the same names and are consumed. `count` (float32
    scalar) is 1 for the first update: without bias correction (MLX's default) that update would be 0.45 times its size.
    Norms and biases do not decay.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        W <- W - lr (u + weight_decay W)                                      (apply_update)

    Returns the new (params, first moments, second moments).
    """
    new_params, new_first, new_second = {}, {}, {}
    correction1, correction2 = 1 - mx.power(ADAMW_BETA1, count), 1 - mx.power(ADAMW_BETA2, count)
    least = LEAST_MOMENT if on_cpu() else 0.0
    done: list[mx.array] = []
    for name in list(params):
        # Nothing refers to an old array while the new one is computed, so that MLX reuses its memory. The parameters
        # take turns by their gradients: outputs that nothing else waits for are computed together, in one pass.
        (g,) = wait([grads.pop(name)], done)
        m, v = _moments(g, first.pop(name), second.pop(name), factor, least)
        del g
        w, u = params.pop(name), _direction(m, v, correction1, correction2)
        done = [apply_update(w, u, lr, train) if is_decayed(name, w.ndim) else _plain(w, u, lr)]
        del w, u
        new_params[name], new_first[name], new_second[name] = done[0], m, v
    return new_params, new_first, new_second


# Compiled separately, even if the full step is not: one pass over memory each, in place.


@mx.compile
def _moments(
    g: mx.array, first: mx.array, second: mx.array, factor: mx.array | float, least: float
) -> tuple[mx.array, mx.array]:
    """Moments below `least` become 0."""
    g = factor * g
    m, v = ADAMW_BETA1 * first + (1 - ADAMW_BETA1) * g, ADAMW_BETA2 * second + (1 - ADAMW_BETA2) * g * g
    return (mx.where(mx.abs(m) < least, 0, m), mx.where(v < least, 0, v)) if least else (m, v)


@mx.compile
def _direction(m: mx.array, v: mx.array, correction1: mx.array, correction2: mx.array) -> mx.array:
    return (m / correction1) / (mx.sqrt(v / correction2) + ADAMW_EPS)


def apply_update(w: mx.array, u: mx.array, lr: mx.array, train: TrainConfig) -> mx.array:
    """W - lr (u + weight_decay W).

    With train.cautious_weight_decay, a weight decays only where u and W have the same sign, so that the decay never
    opposes the update (Chen et al., "Cautious weight decay", 2025).
    """
    if train.weight_decay == 0:
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
