"""Muon (Jordan et al., 2024): momentum, orthogonalised. For the blocks' matrices only.

A matrix's momentum usually has a few large directions and many small ones; Muon's update gives every direction the same
size. That suits matrices that map hidden states to hidden states. It does not suit embeddings and the head (their rows
are words, not directions), nor norms: these belong to AdamW. Handing them to Muon gives no error, only a worse model.

MLX 0.32 has a Muon; it adds weight decay to the gradient before orthogonalising, where decay should act on the weight
alone, and takes one matrix at a time. Hence this one.
"""

import math
from collections import defaultdict

import mlx.core as mx

# The five quadratics-in-the-square of Polar Express (Amsel et al., 2025), for singular values from 1e-3 up, each a
# (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(g: mx.array) -> mx.array:
    """The nearest matrix with all singular values one (U V^T of g = U S V^T), to about 15 %, of each of a stack.

    `g` [n, rows, cols] float32 -> the same shape. The Frobenius norm, taken with a margin of 2 %, brings all singular
    values below one first; the Gram matrix is taken on the smaller side.
    """
    tall = g.shape[1] > g.shape[2]
    x = g.swapaxes(1, 2) if tall else g
    x = x / (mx.sqrt(mx.sum(x * x, axis=(1, 2), keepdims=True)) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.swapaxes(1, 2)  # [n, small, small]
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(1, 2) if tall else x


def update_scale(shape: tuple[int, ...]) -> float:
    """0.2 sqrt(max(rows, cols)): an orthogonal update's elements then have the size of AdamW's, so that one learning
    rate and one weight decay serve both (Liu et al., "Muon is scalable for LLM training", 2025, equation 4)."""
    return 0.2 * math.sqrt(max(shape))


def muon(
    params: dict[str, mx.array],
    grads: dict[str, mx.array],
    buffers: dict[str, mx.array],
    lr: mx.array,
    momentum: mx.array,
    weight_decay: float,
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """One update of matrices [rows, cols]; all dicts have the same names. Returns the new (params, buffers).

    m <- mu m + (1 - mu) g;   u = orthogonalise(mu m + (1 - mu) g)         (Nesterov's look ahead)
    W <- W - lr (0.2 sqrt(max(rows, cols)) u + weight_decay W)
    """
    new_params, new_buffers, by_shape = {}, {}, defaultdict(list)
    for name in params:
        by_shape[params[name].shape].append(name)
    for shape, names in by_shape.items():  # matrices of one shape go through the iteration together
        g = mx.stack([grads[name] for name in names])
        m = momentum * mx.stack([buffers[name] for name in names]) + (1 - momentum) * g
        u = orthogonalise(momentum * m + (1 - momentum) * g) * update_scale(shape)
        for i, name in enumerate(names):
            new_buffers[name] = m[i]
            new_params[name] = params[name] - lr * (u[i] + weight_decay * params[name])
    return new_params, new_buffers
