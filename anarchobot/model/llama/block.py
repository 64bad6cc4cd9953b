"""The two halves of a transformer block, forward and backward: attention and a gated MLP, each after a norm and added
to its input. With model.post_norms, the output of a half is normalized too before it is added.

The gradients are hand-written, so that the forward pass saves only what is expensive to recompute, the outputs of
matrix products, and the backward pass frees everything as soon as it is used (numerics/eval_order.py).

Shapes: N tokens of all rows, D d_model, F mlp width.
"""

from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.gradient_accumulator import GradientAccumulator, Params
from anarchobot.model.linear import InputDropout, linear, linear_backward, linear_gradients
from anarchobot.model.llama.attention import AttentionOutput, BlockedAttention, FusedAttention, HeadNorms
from anarchobot.model.llama.fused_attention import FusedTrainingAttention
from anarchobot.model.norm import rms_norm, rms_norm_backward
from anarchobot.numerics.device import on_cpu
from anarchobot.numerics.elementary import sigmoid, tanh
from anarchobot.numerics.eval_order import EvalOrder

TrainingAttention = BlockedAttention | FusedTrainingAttention


class SavedAttention(NamedTuple):
    """What the backward pass of an attention half needs: [N, ...]. q and k are None if the attention has saved them
    rotated. `projected` is the output of o_proj, saved only with post_norms."""

    x: mx.array
    q: mx.array | None
    k: mx.array | None
    v: mx.array
    attention: AttentionOutput
    projected: mx.array | None


class SavedMLP(NamedTuple):
    """What the backward pass of an MLP half needs: x [N, D], gate and up in chunks of rows, [rows, F] each, and with
    post_norms the output of down_proj [N, D]."""

    x: mx.array
    chunks: list[tuple[mx.array, mx.array]]
    projected: mx.array | None


class DropoutKeys(NamedTuple):
    """Random keys of a block's dropout: after attention, after the MLP, and on the inputs of their adapters."""

    attention: mx.array | None = None
    mlp: mx.array | None = None
    attention_inputs: InputDropout | None = None
    mlp_inputs: InputDropout | None = None


def attention_forward(
    p: Params,
    x: mx.array,
    model: ModelConfig,
    attention: TrainingAttention | FusedAttention,
    key: mx.array | None = None,
    drop: InputDropout | None = None,
) -> tuple[mx.array, SavedAttention]:
    """x + attention(norm(x)) for `x` [N, D]. `p` are the block's parameters by their names inside it; `key` turns
    dropout on, `drop` the dropout of the adapters' inputs."""
    normed = rms_norm(x, p["input_layernorm.weight"], model.norm_eps)
    q, k, v = (linear(p, f"self_attn.{name}_proj", normed, drop) for name in "qkv")
    attended = attention.forward(q, k, v, _head_norms(p))
    projected = None
    if model.post_norms:
        projected = linear(p, "self_attn.o_proj", attended.out, drop)
        out = x + _dropout(rms_norm(projected, p["attention_output_layernorm.weight"], model.norm_eps), model, key)
    else:
        out = _add_linear(x, p, "self_attn.o_proj", attended.out, drop, model, key)
    if attended.rotated is not None:
        return out, SavedAttention(x, None, None, v, attended, projected)
    return out, SavedAttention(x, q, k, v, attended, projected)


def attention_backward(
    p: Params,
    saved: SavedAttention,
    dy: mx.array,
    attention: TrainingAttention,
    key: mx.array | None,
    grads: GradientAccumulator,
    drop: InputDropout | None = None,
) -> mx.array:
    """Returns the gradient of the input, given the gradient `dy` [N, D] of the output; adds the parameters' gradients
    to `grads`."""
    model, wait = attention.model, attention.wait
    x, q, k, v, output, projected = saved
    d = _dropout(dy, model, key)
    if projected is not None:
        d = _output_norm_backward(p, "attention_output_layernorm.weight", projected, d, model, wait, grads)
    done, dz = linear_gradients(p, "self_attn.o_proj", d, output.out, grads, drop, projected)
    (d,) = wait([d], done)
    dout = linear_backward(p, "self_attn.o_proj", d, dz, drop)
    (v,) = wait([v], [dout])
    if q is not None and k is not None:
        q, k = wait([q, k], [dout])
    dq, dk, dv, dnorms = attention.backward(q, k, v, _head_norms(p), output, dout)
    if dnorms is not None:
        (dq,) = wait(
            [dq], grads.add("self_attn.q_norm.weight", dnorms.q) + grads.add("self_attn.k_norm.weight", dnorms.k)
        )
    (x,) = wait([x], [dq, dk, dv])
    normed = rms_norm(x, p["input_layernorm.weight"], model.norm_eps)
    done_q, z_q = linear_gradients(p, "self_attn.q_proj", dq, normed, grads, drop, q)
    done_k, z_k = linear_gradients(p, "self_attn.k_proj", dk, normed, grads, drop, k)
    done_v, z_v = linear_gradients(p, "self_attn.v_proj", dv, normed, grads, drop, v)
    dq, dk, dv = wait([dq, dk, dv], done_q + done_k + done_v)
    dnormed = linear_backward(p, "self_attn.q_proj", dq, z_q, drop)
    dnormed = linear_backward(p, "self_attn.k_proj", dk, z_k, drop, dnormed)
    dnormed = linear_backward(p, "self_attn.v_proj", dv, z_v, drop, dnormed)
    (dnormed,) = wait([dnormed], [dnormed])
    del normed, dq, dk, dv
    dx, dweight = rms_norm_backward(x, p["input_layernorm.weight"], model.norm_eps, dnormed)
    (dx,) = wait([dy + dx], grads.add("input_layernorm.weight", dweight))
    return dx


def mlp_forward(
    p: Params,
    x: mx.array,
    model: ModelConfig,
    key: mx.array | None = None,
    rows: int | None = None,
    drop: InputDropout | None = None,
) -> tuple[mx.array, SavedMLP]:
    """x + down(act(gate(norm(x))) * up(norm(x))) for `x` [N, D], in chunks of `rows` tokens (None: all)."""
    normed = _chunks(rms_norm(x, p["post_attention_layernorm.weight"], model.norm_eps), rows)
    drops = _split_dropout(drop, len(normed))
    chunks = [
        (linear(p, "mlp.gate_proj", n, chunk_drop), linear(p, "mlp.up_proj", n, chunk_drop))
        for n, chunk_drop in zip(normed, drops, strict=True)
    ]
    if len(chunks) == 1 and not model.post_norms:
        out = _add_linear(x, p, "mlp.down_proj", _gated(*chunks[0], model), drops[0], model, key)
        return out, SavedMLP(x, chunks, None)
    projected = _concatenate(
        [
            linear(p, "mlp.down_proj", _gated(gate, up, model), chunk_drop)
            for (gate, up), chunk_drop in zip(chunks, drops, strict=True)
        ]
    )
    if not model.post_norms:
        return x + _dropout(projected, model, key), SavedMLP(x, chunks, None)
    out = x + _dropout(rms_norm(projected, p["mlp_output_layernorm.weight"], model.norm_eps), model, key)
    return out, SavedMLP(x, chunks, projected)


def mlp_backward(
    p: Params,
    saved: SavedMLP,
    dy: mx.array,
    model: ModelConfig,
    wait: EvalOrder,
    key: mx.array | None,
    grads: GradientAccumulator,
    drop: InputDropout | None = None,
) -> mx.array:
    """Like `attention_backward`, in the chunks of the forward pass, which are consumed."""
    x, chunks, projected = saved
    rows = chunks[0][0].shape[0]
    d = _dropout(dy, model, key)
    ys: list[mx.array | None] = [None] * len(chunks)
    if projected is not None:
        d = _output_norm_backward(p, "mlp_output_layernorm.weight", projected, d, model, wait, grads)
        ys = [*_chunks(projected, rows)]
    dnormed: list[mx.array] = []
    ds, xs, drops = _chunks(d, rows), _chunks(x, rows), _split_dropout(drop, len(chunks))
    for d, x_chunk, y, chunk_drop in zip(ds, xs, ys, drops, strict=True):
        gate, up = chunks.pop(0)  # nothing else refers to them: they are freed as soon as they are used
        # Waiting for `d` also keeps `mx.compile` from storing act(gate) and the product in the forward pass.
        gate, up = wait([gate, up], [d])
        gate, up, d = wait([gate, up, d], dnormed[-1:])
        done, dz = linear_gradients(p, "mlp.down_proj", d, _gated(gate, up, model), grads, chunk_drop, y)
        (d,) = wait([d], done)
        dgate, dup = _gated_backward(gate, up, linear_backward(p, "mlp.down_proj", d, dz, chunk_drop), model, wait)
        (x_chunk,) = wait([x_chunk], [dgate, dup])
        normed = rms_norm(x_chunk, p["post_attention_layernorm.weight"], model.norm_eps)
        done_gate, z_gate = linear_gradients(p, "mlp.gate_proj", dgate, normed, grads, chunk_drop, gate)
        done_up, z_up = linear_gradients(p, "mlp.up_proj", dup, normed, grads, chunk_drop, up)
        dgate, dup = wait([dgate, dup], done_gate + done_up)
        dgated = linear_backward(p, "mlp.gate_proj", dgate, z_gate, chunk_drop)
        dnormed.append(linear_backward(p, "mlp.up_proj", dup, z_up, chunk_drop, dgated))
    dx, dweight = rms_norm_backward(x, p["post_attention_layernorm.weight"], model.norm_eps, _concatenate(dnormed))
    (dx,) = wait([dy + dx], grads.add("post_attention_layernorm.weight", dweight))
    return dx


def _output_norm_backward(
    p: Params,
    name: str,
    projected: mx.array,
    d: mx.array,
    model: ModelConfig,
    wait: EvalOrder,
    grads: GradientAccumulator,
) -> mx.array:
    """Returns the gradient of `projected` [N, D], given that of its norm; adds the gradient of the norm's weight."""
    d, dweight = rms_norm_backward(projected, p[name], model.norm_eps, d)
    (d,) = wait([d], grads.add(name, dweight))
    return d


def _add_linear(
    x: mx.array,
    p: Params,
    name: str,
    inputs: mx.array,
    drop: InputDropout | None,
    model: ModelConfig,
    key: mx.array | None,
) -> mx.array:
    """x + dropout(linear(inputs))."""
    if key is None or model.dropout == 0:
        return linear(p, name, inputs, drop, x)
    return x + _dropout(linear(p, name, inputs, drop), model, key)


def _split_dropout(drop: InputDropout | None, count: int) -> list[InputDropout | None]:
    """Returns one per chunk."""
    if drop is None:
        return [None] * count
    keys = mx.random.split(drop.key, count)
    return [InputDropout(drop.rate, keys[i]) for i in range(count)]


def _chunks(x: mx.array, rows: int | None) -> list[mx.array]:
    return [x] if rows is None else [x[i : i + rows] for i in range(0, x.shape[0], rows)]


def _concatenate(chunks: list[mx.array]) -> mx.array:
    return chunks[0] if len(chunks) == 1 else mx.concatenate(chunks)


def _head_norms(p: Params) -> HeadNorms | None:
    if "self_attn.q_norm.weight" not in p:
        return None
    return HeadNorms(p["self_attn.q_norm.weight"], p["self_attn.k_norm.weight"])


def _gated(gate: mx.array, up: mx.array, model: ModelConfig) -> mx.array:
    """act(gate) * up, where act is SiLU or GELU's tanh form (Hendrycks and Gimpel, 2016)."""
    if model.ffn_activation == "silu":
        return _product(gate, sigmoid(gate), up)
    return _product(gate, 0.5 * (1 + tanh(_gelu_inner(gate))), up)


def _gated_backward(
    gate: mx.array, up: mx.array, d: mx.array, model: ModelConfig, wait: EvalOrder
) -> tuple[mx.array, mx.array]:
    """Returns the gradients of gate and up, given the gradient `d` of act(gate) * up."""
    gate, up = wait([gate, up], [d])
    if model.ffn_activation == "gelu":
        return _gelu_backward(gate, tanh(_gelu_inner(gate)), up, d)
    s = sigmoid(gate)
    dup = _product(d, gate, s)
    if not on_cpu():  # each kernel computes the sigmoid again: cheaper than storing it
        (gate,) = wait([gate], [dup])
        s = sigmoid(gate)
    return _silu_backward(gate, s, up, d), dup


# Compiled separately, even if the full step is not: one pass over memory each. Python scalars keep the dtype.


@mx.compile
def _product(a: mx.array, b: mx.array, c: mx.array) -> mx.array:
    return a * b * c


@mx.compile
def _silu_backward(gate: mx.array, s: mx.array, up: mx.array, d: mx.array) -> mx.array:
    """The gradient of the gate. SiLU is g s(g), and its derivative s (1 + g (1 - s))."""
    return d * up * (s * (1 + gate * (1 - s)))


@mx.compile
def _gelu_inner(gate: mx.array) -> mx.array:
    return 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)


@mx.compile
def _gelu_backward(gate: mx.array, t: mx.array, up: mx.array, d: mx.array) -> tuple[mx.array, mx.array]:
    """GELU is g (1 + t) / 2 with t = tanh(c (g + a g^3)); the derivative of t is (1 - t^2) c (1 + 3 a g^2)."""
    slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * (0.7978845608028654 * (1 + 0.134145 * gate * gate))
    return d * up * slope, d * (0.5 * gate * (1 + t))


def _dropout(x: mx.array, model: ModelConfig, key: mx.array | None) -> mx.array:
    if key is None or model.dropout == 0:
        return x
    keep = mx.random.bernoulli(1 - model.dropout, x.shape, key=key)
    return mx.where(keep, x * (1 / (1 - model.dropout)), 0)
