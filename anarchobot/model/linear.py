"""A linear layer, forward and backward: its weight plain or quantized, with or without adapters.

The flat parameter dict describes layer NAME by these entries (mlx-lm's names, also in its adapter files):

    NAME.weight [out, in]                         or, quantized by `mx.quantize`,
    NAME.weight uint32, NAME.scales, NAME.biases  (`Quantized` below)
    NAME.bias [out]                               in some models
    NAME.lora_a [in, r], NAME.lora_b [r, out]     LoRA (Hu et al., 2022), with the constant NAME.lora_scale
    NAME.m [out]                                  DoRA (Liu et al., 2024), with the constant NAME.row_norms

    u = x W^T + s (dropout(x) A) B
    y = u + bias,  or with DoRA  y = u m / c + bias,  where c, the row norms of W + s (A B)^T, has no gradient

The same functions serve training, validation and generation; without the adapter's entries, the layer is the base
model's. Products are in x's dtype; gradients are summed in float32.

Shapes: N tokens; r rank.
"""

from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.validation import PROJECTIONS
from anarchobot.model.gradient_accumulator import GradientAccumulator, Params
from anarchobot.numerics.device import on_cpu

_FEW_ROWS = 8  # with fewer rows, a CPU multiplies by quantized weights faster than it dequantizes them


class Quantized(NamedTuple):
    """A matrix [out, in] from `mx.quantize`: integers of a few bits, with a scale and a bias for every group of
    columns. 32 columns take `bits` words, so the shapes tell the width, the bits and the group size."""

    weight: mx.array  # uint32 [out, in / 32, bits]
    scales: mx.array  # [out, in / group size]
    biases: mx.array

    @property
    def bits(self) -> int:
        return self.weight.shape[2]

    @property
    def group_size(self) -> int:
        return self.weight.shape[1] * 32 // self.scales.shape[1]

    def dequantize(self) -> mx.array:
        """[out, in], in the scales' dtype."""
        weight, scales, biases = self
        return mx.dequantize(weight.flatten(1), scales, biases, group_size=self.group_size, bits=self.bits)

    def matmul(self, x: mx.array, transpose: bool) -> mx.array:
        """x W or, with `transpose`, x W^T."""
        weight, scales, biases = self
        return mx.quantized_matmul(
            x, weight.flatten(1), scales, biases, transpose, group_size=self.group_size, bits=self.bits
        )


Matrix = mx.array | Quantized


class InputDropout(NamedTuple):
    """Dropout applied only to the inputs of the adapters in half a block."""

    rate: float
    key: mx.array

    def __call__(self, name: str, x: mx.array) -> mx.array:
        """`x` [N, in] after dropout; a layer always drops the same elements."""
        key = mx.random.split(self.key, len(PROJECTIONS))[PROJECTIONS.index(name.rpartition(".")[2])]
        keep = mx.random.bernoulli(1 - self.rate, x.shape, key=key)
        return mx.where(keep, x * (1 / (1 - self.rate)), 0)


def matrix(p: Params, name: str) -> Matrix:
    weight = p[f"{name}.weight"]
    return Quantized(weight, p[f"{name}.scales"], p[f"{name}.biases"]) if f"{name}.scales" in p else weight


def matmul_t(x: mx.array, w: Matrix) -> mx.array:
    """x W^T, in x's dtype."""
    if isinstance(w, Quantized):
        if not _should_dequantize(x):
            return w.matmul(x, transpose=True)
        w = w.dequantize()
    return x @ w.astype(x.dtype).T


def matmul(dy: mx.array, w: Matrix) -> mx.array:
    """dy W, in dy's dtype: the gradient of x in y = x W^T."""
    if isinstance(w, Quantized):
        if not _should_dequantize(dy):
            return w.matmul(dy, transpose=False)
        w = w.dequantize()
    return dy @ w.astype(dy.dtype)


def embedding_rows(w: Matrix, ids: mx.array) -> mx.array:
    """The rows `ids` [N] of W: [N, in]."""
    if isinstance(w, Quantized):
        return Quantized(*(part[ids] for part in w)).dequantize()
    return w[ids]


def linear(
    p: Params, name: str, x: mx.array, drop: InputDropout | None = None, onto: mx.array | None = None
) -> mx.array:
    """y [N, out] of x [N, in], in x's dtype; added to `onto`, if given."""
    if onto is not None:
        w = matrix(p, name)
        if isinstance(w, Quantized) or any(f"{name}.{part}" in p for part in ("lora_a", "bias")):
            return onto + linear(p, name, x, drop)
        return mx.addmm(onto, x, w.astype(x.dtype).T)
    y = _unscaled(p, name, x, drop)
    if f"{name}.m" in p:
        y = y * _magnitude(p, name, x.dtype)
    return y if f"{name}.bias" not in p else y + p[f"{name}.bias"].astype(y.dtype)


def linear_gradients(
    p: Params,
    name: str,
    dy: mx.array,
    x: mx.array,
    grads: GradientAccumulator,
    drop: InputDropout | None = None,
    y: mx.array | None = None,
) -> tuple[list[mx.array], mx.array | None]:
    """Adds the gradients of the layer's trained parameters to `grads`, given its input `x` and the gradient `dy`
    [N, out] of its output; with the saved output `y`, DoRA does not recompute it.

    Returns the new sums, to wait for, and the gradient dz [N, r] of x A, which `linear_backward` also needs.

        dz = du (s B)^T;  dA = dropout(x)^T dz;  dB = s (dropout(x) A)^T du;  dW = du^T x
        du = dy,  or with DoRA  du = dy m / c;  dm = the sum over tokens of dy u / c = dy (y - bias) / m
        dbias = the sum over tokens of dy
    """
    done = []
    du = dy
    if f"{name}.bias" in p and grads.is_trainable(f"{name}.bias"):
        done += grads.add(f"{name}.bias", mx.sum(dy.astype(mx.float32), axis=0))
    if f"{name}.m" in p:
        du = dy * _magnitude(p, name, dy.dtype)
        if grads.is_trainable(f"{name}.m"):
            done += grads.add(f"{name}.m", _magnitude_gradient(p, name, dy, x, drop, y))
    done += grads.add_product(f"{name}.weight", du, x)
    if f"{name}.lora_a" not in p:
        return done, None
    a, b = _factors(p, name, x.dtype)
    dz = du @ b.T
    if grads.is_trainable(f"{name}.lora_a"):
        x = _apply_dropout(name, x, drop)
        z = (x @ a) * p[f"{name}.lora_scale"].astype(x.dtype)
        done += grads.add_product(f"{name}.lora_a", x, dz) + grads.add_product(f"{name}.lora_b", z, du)
    return done, dz


def linear_backward(
    p: Params,
    name: str,
    dy: mx.array,
    dz: mx.array | None,
    drop: InputDropout | None = None,
    onto: mx.array | None = None,
) -> mx.array:
    """Returns the gradient [N, in] of the input, given the gradient `dy` of the output and dz from
    `linear_gradients`; added to `onto`, if given."""
    du = dy if f"{name}.m" not in p else dy * _magnitude(p, name, dy.dtype)
    w = matrix(p, name)
    if onto is None:
        dx = matmul(du, w)
    else:
        dx = onto + matmul(du, w) if isinstance(w, Quantized) else mx.addmm(onto, du, w.astype(du.dtype))
    if dz is None:
        return dx
    a, _ = _factors(p, name, dy.dtype)
    return mx.addmm(dx, dz, a.T) if drop is None else dx + drop(name, dz @ a.T)


def _should_dequantize(x: mx.array) -> bool:
    """Whether to dequantize the weights for a product with x. MLX's CPU backend multiplies by quantized weights
    forty times slower than a BLAS does by float weights; a GPU does not."""
    return on_cpu() and x.shape[0] >= _FEW_ROWS


def _unscaled(p: Params, name: str, x: mx.array, drop: InputDropout | None) -> mx.array:
    """u: the output before DoRA's magnitudes."""
    y = matmul_t(x, matrix(p, name))
    if f"{name}.lora_a" not in p:
        return y
    a, b = _factors(p, name, x.dtype)
    return mx.addmm(y, _apply_dropout(name, x, drop) @ a, b)


def _factors(p: Params, name: str, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """A [in, r] and s B [r, out]."""
    return p[f"{name}.lora_a"].astype(dtype), (p[f"{name}.lora_b"] * p[f"{name}.lora_scale"]).astype(dtype)


def _apply_dropout(name: str, x: mx.array, drop: InputDropout | None) -> mx.array:
    return x if drop is None else drop(name, x)


def _magnitude_gradient(
    p: Params, name: str, dy: mx.array, x: mx.array, drop: InputDropout | None, y: mx.array | None
) -> mx.array:
    """dm [out], float32. A row with m = 0 is all zeros and stays so."""
    if y is None:
        u = _unscaled(p, name, x, drop)
        return mx.sum((dy * u).astype(mx.float32), axis=0) / _row_norms(p, name, x.dtype)
    m = p[f"{name}.m"]
    if f"{name}.bias" in p:
        y = y - p[f"{name}.bias"].astype(y.dtype)
    return mx.sum((dy * y).astype(mx.float32), axis=0) / mx.where(m == 0, 1, m)


def _magnitude(p: Params, name: str, dtype: mx.Dtype) -> mx.array:
    """m / c [out]."""
    return (p[f"{name}.m"] / _row_norms(p, name, dtype)).astype(dtype)


def _row_norms(p: Params, name: str, dtype: mx.Dtype) -> mx.array:
    """c [out], float32: the row norms of W + s (A B)^T, without forming that matrix. For row i and column b of B,

    |w_i + s A b|^2 = |w_i|^2 + 2 s (A^T w_i) b + s^2 b^T (A^T A) b
    """
    a, b = p[f"{name}.lora_a"], p[f"{name}.lora_b"] * p[f"{name}.lora_scale"]
    across = matmul_t(a.T.astype(dtype), matrix(p, name)).astype(mx.float32)  # [r, out]
    squares = mx.square(p[f"{name}.row_norms"]) + mx.sum(b * (2 * across + (a.T @ a) @ b), axis=0)
    # Constant in the backward pass, as in the paper. Not zero, even for a row of zeros.
    return mx.stop_gradient(mx.sqrt(mx.maximum(squares, 1e-24)))
