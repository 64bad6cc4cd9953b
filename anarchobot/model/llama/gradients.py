"""Loss and gradients of the whole model: forward block by block, then backward from the last to the lowest that is
trained.

MLX could differentiate the forward pass itself; written out, each block keeps less, is freed as soon as its gradient is
done, and the sums of gradients are added to at once.

Shapes: B rows, L tokens, N = B L, D d_model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model import loss
from anarchobot.model.gradient_accumulator import Gradients, Params
from anarchobot.model.linear import InputDropout
from anarchobot.model.llama import block
from anarchobot.model.llama.attention import Attention
from anarchobot.model.llama.block import KeptAttention, KeptMLP
from anarchobot.model.llama.forward import blocks, embed, head_matrix, head_name
from anarchobot.model.norm import rms_norm, rms_norm_backward
from anarchobot.numerics.sequencing import Wait, tied


class Drops(NamedTuple):
    """Dropout in a block: keys of that after attention and after the MLP, and that of their adapters' inputs."""

    attention: mx.array | None = None
    mlp: mx.array | None = None
    attention_inputs: InputDropout | None = None
    mlp_inputs: InputDropout | None = None


Kept = tuple[KeptAttention, KeptMLP] | mx.array  # of a block: what its halves keep, or its input alone


# From the log-probabilities of the rows' targets [B]: the summed loss with what else is measured, a vector, and the
# gradient [B] of the loss.
Objective = Callable[[mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Technique:
    """How the pass is done; the results are the same but for rounding.

    `recompute`: keep only each block's input, and run its forward again (gradient checkpointing; Chen et al., 2016).
    `wait`: how each part waits for the one before it. `attention_block`: queries at a time; None: by their memory.
    `mlp_rows`: tokens at a time in an MLP; None: all. `loss_chunk`: tokens at a time in the head.
    """

    recompute: bool = False
    wait: Wait = tied
    attention_block: int | None = None
    mlp_rows: int | None = None
    loss_chunk: int = loss.CHUNK


def loss_and_gradients(
    params: Params,
    tokens: mx.array,
    targets: mx.array,
    model: ModelConfig,
    *,
    scale: mx.array,
    frozen: Params | None = None,
    sums: Params | None = None,
    dtype: mx.Dtype = mx.float32,
    segments: mx.array | None = None,
    dropout_key: mx.array | None = None,
    adapter_dropout: float = 0.0,
    technique: Technique = Technique(),
    objective: Objective | None = None,
) -> tuple[mx.array, Params]:
    """`scale` times the summed cross-entropy of int32 `tokens` and `targets` [B, L] (negative targets add nothing), and
    its gradients by parameter name, float32, added to `sums` where given.

    `params` are trained; `frozen` are the model's other weights, which get no gradient: blocks below the lowest that is
    trained are only passed forward, and keep nothing. Products are in `dtype`. `segments` [B, L] number the documents
    of a row: a token sees only its own. `dropout_key` turns dropout on, of `adapter_dropout` of adapters' inputs as
    well; the same key drops the same places. With an `objective`, the loss is what it makes of each row's
    log-probability, and what else it measures comes with it.
    """
    wait = technique.wait
    rows, length = tokens.shape
    attention = Attention(model, rows, length, segments, technique.attention_block, wait)
    drops = _drops(dropout_key, model, adapter_dropout)
    weights = params if frozen is None else {**frozen, **params}
    layers, lowest = blocks(weights, model), _lowest(params, model)
    grads = Gradients({} if sums is None else sums, trained=params)

    x = embed(weights, tokens, model, dtype)  # [N, D]
    first_v = None
    kept: list[Kept] = []
    for i, (p, drop) in enumerate(zip(layers, drops, strict=True)):
        block_input = x
        x, halves = _block_forward(p, x, attention, drop, first_v, technique.mlp_rows)
        if model.value_residual and first_v is None:
            first_v = halves[0].v
        (x,) = wait([x], [x, halves[0].attended.log_sums])
        if i >= lowest:
            kept.append(block_input if technique.recompute else halves)
        del halves

    norm, head = weights["model.norm.weight"], head_name(model)
    hidden, measures = rms_norm(x, norm, model.norm_eps), None
    if objective is not None:
        losses = loss.token_losses(
            hidden, head_matrix(weights, model), targets.reshape(-1), model, technique.loss_chunk
        )
        measures, slopes = objective(-losses.reshape(rows, length).sum(axis=1))
        (x, hidden) = wait([x, hidden], [slopes])
        measures, scale = scale * measures, mx.repeat(-scale * slopes, length)  # [N]
    if head in params:
        total, dhidden, grads.sums[head] = loss.loss_and_gradients(
            hidden, params[head], targets.reshape(-1), model, scale, grads.sums.pop(head, None), technique.loss_chunk,
            wait,
        )  # fmt: skip
        (x,) = wait([x], [dhidden, grads.sums[head]])
    else:
        total, dhidden = loss.loss_and_hidden_gradient(
            hidden, head_matrix(weights, model), targets.reshape(-1), model, scale, technique.loss_chunk, wait
        )
        (x,) = wait([x], [total, dhidden])
    dx, dnorm = rms_norm_backward(x, norm, model.norm_eps, dhidden)
    (dx,) = wait([dx], grads.add("model.norm.weight", dnorm))
    del x, hidden, dhidden

    dfirst_v = None
    for i in reversed(range(lowest, model.n_layers)):
        p, drop, sums_of_block = layers[i], drops[i], grads.at(f"model.layers.{i}.")
        keep = kept.pop()
        if isinstance(keep, mx.array):  # the block's input alone
            (keep,) = wait([keep], [dx])
            keep = _block_forward(p, keep, attention, drop, first_v if i > 0 else None, technique.mlp_rows)[1]
        # With `evaluated`, what a name holds stays in memory: each is gone before the next part begins.
        kept_attention, kept_mlp = keep
        del keep
        dx = block.mlp_backward(p, kept_mlp, dx, model, wait, drop.mlp, sums_of_block, drop.mlp_inputs)
        del kept_mlp
        if not sums_of_block.trains("post_attention_layernorm.weight"):
            (dx,) = wait([dx], [dx])  # there was no gradient of a norm to wait for
        dx, dfirst_v = block.attention_backward(
            p, kept_attention, dx, attention, drop.attention, sums_of_block, dfirst_v, drop.attention_inputs
        )
        del kept_attention
        if i > lowest and not sums_of_block.trains("input_layernorm.weight"):
            (dx,) = wait([dx], [dx])

    if "model.embed_tokens.weight" in params:
        embed_backward(tokens, dx, model, grads)
    return total if measures is None else measures, {name: grads.sums[name] for name in params}


def _lowest(params: Params, model: ModelConfig) -> int:
    """The first block that the backward pass must reach; n_layers when it need not reach any."""
    if "model.embed_tokens.weight" in params:
        return 0
    return min((int(name.split(".")[2]) for name in params if ".layers." in name), default=model.n_layers)


def embed_backward(tokens: mx.array, dx: mx.array, model: ModelConfig, grads: Gradients) -> None:
    """From the gradient `dx` [N, D] of what `embed` gave: adds that of the embedding to `grads`."""
    name = "model.embed_tokens.weight"
    so_far = grads.sums.pop(name) if name in grads.sums else mx.zeros((model.vocab_size, model.d_model))
    dx = dx.astype(mx.float32)
    dx = dx if model.embedding_scale is None else dx * model.embedding_scale
    grads.sums[name] = so_far.at[tokens.reshape(-1)].add(dx)


def _block_forward(
    p: Params, x: mx.array, attention: Attention, drop: Drops, first_v: mx.array | None, mlp_rows: int | None
) -> tuple[mx.array, tuple[KeptAttention, KeptMLP]]:
    model = attention.model
    x, kept_attention = block.attention_forward(p, x, model, attention, drop.attention, first_v, drop.attention_inputs)
    x, kept_mlp = block.mlp_forward(p, x, model, drop.mlp, mlp_rows, drop.mlp_inputs)
    return x, (kept_attention, kept_mlp)


def _drops(key: mx.array | None, model: ModelConfig, adapter_dropout: float) -> list[Drops]:
    """Of each block; keys where dropout is on."""
    drops = [Drops()] * model.n_layers
    if key is None:
        return drops
    if model.dropout > 0:
        keys = mx.random.split(key, 2 * model.n_layers)
        drops = [Drops(keys[2 * i], keys[2 * i + 1]) for i in range(model.n_layers)]
    if adapter_dropout == 0:
        return drops
    keys = mx.random.split(mx.random.split(key)[1], 2 * model.n_layers)
    inputs = [InputDropout(adapter_dropout, keys[i]) for i in range(2 * model.n_layers)]
    return [drop._replace(attention_inputs=inputs[2 * i], mlp_inputs=inputs[2 * i + 1]) for i, drop in enumerate(drops)]
