"""AdamW (Loshchilov and Hutter, 2019) as a function of dicts of arrays, bias correction on."""

import mlx.core as mx

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8


def adamw(
    params: dict[str, mx.array],
    grads: dict[str, mx.array],
    first: dict[str, mx.array],
    second: dict[str, mx.array],
    lr: mx.array,
    count: mx.array,
    weight_decay: float,
) -> tuple[dict[str, mx.array], dict[str, mx.array], dict[str, mx.array]]:
    """One update; all dicts have the same names. `count` (float32 scalar) is 1 for the first update: without the
    correction by it (MLX's default) that one would be 0.45 times its size. Norms and other vectors are not decayed.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        W <- W - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay W)

    Returns the new (params, first moments, second moments).
    """
    new_params, new_first, new_second = {}, {}, {}
    correction1, correction2 = 1 - mx.power(BETA1, count), 1 - mx.power(BETA2, count)
    for name, w in params.items():
        g = grads[name]
        m = BETA1 * first[name] + (1 - BETA1) * g
        v = BETA2 * second[name] + (1 - BETA2) * g * g
        step = (m / correction1) / (mx.sqrt(v / correction2) + EPSILON)
        if w.ndim > 1:
            step = step + weight_decay * w
        new_params[name], new_first[name], new_second[name] = w - lr * step, m, v
    return new_params, new_first, new_second
