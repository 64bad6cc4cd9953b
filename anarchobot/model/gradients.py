"""Loss and gradients of the whole model: forward block by block, then backward from the last to the first.

MLX could differentiate the forward pass itself; written out, each block keeps less, is freed as soon as its gradient is
done, and the sums of gradients are added to at once.

Shapes: B rows, L tokens, N = B L, D d_model.
"""

from dataclasses import dataclass

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model import block, loss
from anarchobot.model.attention import Attention
from anarchobot.model.block import Gradients, KeptAttention, KeptMLP, Params
from anarchobot.model.norm import rms_norm, rms_norm_backward
from anarchobot.model.transformer import blocks, embed, head_name
from anarchobot.numerics.order import Wait, tied

Keys = tuple[mx.array | None, mx.array | None]  # of dropout after attention and after the MLP
Kept = tuple[KeptAttention, KeptMLP] | mx.array  # of a block: what its halves keep, or its input alone


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
    sums: Params | None = None,
    dtype: mx.Dtype = mx.float32,
    segments: mx.array | None = None,
    dropout_key: mx.array | None = None,
    technique: Technique = Technique(),
) -> tuple[mx.array, Params]:
    """`scale` times the summed cross-entropy of int32 `tokens` and `targets` [B, L] (negative targets add nothing), and
    its gradients by parameter name, float32, added to `sums` where given.

    Products are in `dtype`. `segments` [B, L] number the documents of a row: a token sees only its own. `dropout_key`
    turns dropout on; the same key drops the same places.
    """
    wait = technique.wait
    rows, length = tokens.shape
    attention = Attention(model, rows, length, segments, technique.attention_block, wait)
    keys = _dropout_keys(dropout_key, model)
    layers = blocks(params, model)
    grads = Gradients({} if sums is None else sums)

    x = embed(params, tokens, model, dtype)  # [N, D]
    first_v = None
    kept: list[Kept] = []
    for p, key in zip(layers, keys, strict=True):
        block_input = x
        x, halves = _block_forward(p, x, attention, key, first_v, technique.mlp_rows)
        if model.value_residual and first_v is None:
            first_v = halves[0].v
        (x,) = wait([x], [x, halves[0].attended.log_sums])
        kept.append(block_input if technique.recompute else halves)
        del halves

    norm, head = params["model.norm.weight"], head_name(model)
    hidden = rms_norm(x, norm, model.norm_eps)
    total, dhidden, grads.sums[head] = loss.loss_and_gradients(
        hidden, params[head], targets.reshape(-1), model, scale, grads.sums.pop(head, None), technique.loss_chunk, wait
    )
    (x,) = wait([x], [dhidden, grads.sums[head]])
    dx, dnorm = rms_norm_backward(x, norm, model.norm_eps, dhidden)
    (dx,) = wait([dx], [grads.add("model.norm.weight", dnorm)])
    del x, hidden, dhidden

    dfirst_v = None
    for i in reversed(range(model.n_layers)):
        p, (attention_key, mlp_key), sums_of_block = layers[i], keys[i], grads.at(f"model.layers.{i}.")
        keep = kept.pop()
        if isinstance(keep, mx.array):  # the block's input alone
            (keep,) = wait([keep], [dx])
            keep = _block_forward(p, keep, attention, keys[i], first_v if i > 0 else None, technique.mlp_rows)[1]
        # With `evaluated`, what a name holds stays in memory: each is gone before the next part begins.
        kept_attention, kept_mlp = keep
        del keep
        dx = block.mlp_backward(p, kept_mlp, dx, model, wait, mlp_key, sums_of_block)
        del kept_mlp
        dx, dfirst_v = block.attention_backward(
            p, kept_attention, dx, attention, attention_key, sums_of_block, dfirst_v
        )
        del kept_attention

    embed_backward(tokens, dx, model, grads)
    return total, {name: grads.sums[name] for name in params}


def embed_backward(tokens: mx.array, dx: mx.array, model: ModelConfig, grads: Gradients) -> None:
    """From the gradient `dx` [N, D] of what `embed` gave: adds that of the embedding to `grads`."""
    name = "model.embed_tokens.weight"
    so_far = grads.sums.pop(name) if name in grads.sums else mx.zeros((model.vocab_size, model.d_model))
    dx = dx.astype(mx.float32)
    dx = dx if model.embedding_scale is None else dx * model.embedding_scale
    grads.sums[name] = so_far.at[tokens.reshape(-1)].add(dx)


def _block_forward(
    p: Params, x: mx.array, attention: Attention, keys: Keys, first_v: mx.array | None, mlp_rows: int | None
) -> tuple[mx.array, tuple[KeptAttention, KeptMLP]]:
    x, kept_attention = block.attention_forward(p, x, attention.model, attention, keys[0], first_v)
    x, kept_mlp = block.mlp_forward(p, x, attention.model, keys[1], mlp_rows)
    return x, (kept_attention, kept_mlp)


def _dropout_keys(key: mx.array | None, model: ModelConfig) -> list[Keys]:
    """Two keys for each block, where dropout is on."""
    if key is None or model.dropout == 0:
        return [(None, None)] * model.n_layers
    split = mx.random.split(key, 2 * model.n_layers)
    return [(split[2 * i], split[2 * i + 1]) for i in range(model.n_layers)]
