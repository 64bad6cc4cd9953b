"""Hand-written gradients of the Llama family: forward block by block, then backward from the last to the lowest
trained block.

MLX could differentiate the forward pass itself (model/autodiff.py). The hand-written gradients save less per block,
free each block as soon as its gradient is done, and are added to the sums immediately.

Shapes: B rows, L tokens, N = B L, D d_model.
"""

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.embedding_gradient import add_rows
from anarchobot.model.gradient_accumulator import GradientAccumulator, Params
from anarchobot.model.llama import block
from anarchobot.model.llama.attention import BlockedAttention, per_block
from anarchobot.model.llama.block import DropoutKeys, SavedAttention, SavedMLP, TrainingAttention
from anarchobot.model.llama.forward import dropout_keys, embed
from anarchobot.model.llama.fused_attention import FusedTrainingAttention
from anarchobot.model.loss import head_loss
from anarchobot.model.norm import rms_norm, rms_norm_backward
from anarchobot.model.parameters import by_block, lowest_trained_block
from anarchobot.model.step_options import DEFAULT, MicroBatch, StepOptions

Saved = tuple[SavedAttention, SavedMLP]


def loss_and_gradients(
    params: Params,
    batch: MicroBatch,
    model: ModelConfig,
    *,
    frozen: Params | None = None,
    sums: Params | None = None,
    dtype: mx.Dtype = mx.float32,
    options: StepOptions = DEFAULT,
) -> tuple[mx.array, Params]:
    """See LossAndGradients in model/architecture.py."""
    wait, profile = options.wait, options.profile
    rows, length = batch.tokens.shape

    def attention(window: int | None) -> TrainingAttention:
        if options.technique == "blocked" or model.attention_softcap is not None:
            return BlockedAttention(model, rows, length, batch.segments, options.attention_block, wait, window)
        by_kernel = options.technique == "sdpa"
        return FusedTrainingAttention(
            model, rows, length, dtype, batch.segments, options.attention_block, wait, by_kernel, window
        )

    attentions = per_block(model, attention)
    drops = dropout_keys(batch.dropout_key, model, batch.adapter_dropout)
    weights = params if frozen is None else {**frozen, **params}
    blocks, lowest = by_block(weights, model), lowest_trained_block(params, model)
    grads = GradientAccumulator({} if sums is None else sums, trained=params)

    x = embed(weights, batch.tokens, model, dtype)  # [N, D]
    profile.end("embedding", x)
    saved: list[Saved | mx.array] = []  # per block: what its halves save or, with recompute, only its input
    for i, (p, drop) in enumerate(zip(blocks, drops, strict=True)):
        block_input = x
        x, halves = _block_forward(p, x, attentions[i], drop, options)
        (x,) = wait([x], halves[0].attention.arrays(x))
        if i >= lowest:
            saved.append(block_input if options.recompute else halves)
        del block_input, halves

    norm = weights["model.norm.weight"]
    hidden = rms_norm(x, norm, model.norm_eps)
    total, dhidden, done = head_loss(hidden, weights, batch, model, grads, options)
    (x,) = wait([x], done)
    dx, dnorm = rms_norm_backward(x, norm, model.norm_eps, dhidden)
    (dx,) = wait([dx], grads.add("model.norm.weight", dnorm))
    profile.end("head and loss", dx)
    del x, hidden, dhidden, dnorm, done  # dnorm, if it is not trained, is not computed and refers to its inputs

    for i in reversed(range(lowest, model.n_layers)):
        p, drop, block_grads = blocks[i], drops[i], grads.scoped(f"model.layers.{i}.")
        block_saved = saved.pop()
        if isinstance(block_saved, mx.array):  # only the block's input
            (block_saved,) = wait([block_saved], [dx])
            block_saved = _block_forward(p, block_saved, attentions[i], drop, options, again=True)[1]
        # With `eval_now`, an array stays in memory as long as a name refers to it, so names are deleted.
        saved_attention, saved_mlp = block_saved
        del block_saved
        dx = block.mlp_backward(p, saved_mlp, dx, model, wait, drop.mlp, block_grads, drop.mlp_inputs)
        del saved_mlp
        if not block_grads.is_trainable("post_attention_layernorm.weight"):
            (dx,) = wait([dx], [dx])  # there was no norm gradient to wait for
        profile.end("MLP backward", dx)
        dx = block.attention_backward(
            p, saved_attention, dx, attentions[i], drop.attention, block_grads, drop.attention_inputs
        )
        del saved_attention
        if i > lowest and not block_grads.is_trainable("input_layernorm.weight"):
            (dx,) = wait([dx], [dx])
        profile.end("attention backward", dx)

    if "model.embed_tokens.weight" in params:
        _embed_backward(batch.tokens, dx, model, grads)
        profile.end("embedding", grads.sums["model.embed_tokens.weight"])
    return total, {name: grads.sums[name] for name in params}


def _block_forward(
    p: Params,
    x: mx.array,
    attention: TrainingAttention,
    drop: DropoutKeys,
    options: StepOptions,
    again: bool = False,
) -> tuple[mx.array, Saved]:
    """Returns the block's output and what its backward pass needs. `again`: recomputation for the backward pass."""
    model, profile = attention.model, options.profile
    x, attended = block.attention_forward(p, x, model, attention, drop.attention, drop.attention_inputs)
    profile.end("blocks forward again" if again else "attention forward", *attended.attention.arrays(x))
    x, mlp = block.mlp_forward(p, x, model, drop.mlp, options.mlp_rows, drop.mlp_inputs)
    if again:  # down_proj is not recomputed
        profile.end("blocks forward again", *(array for chunk in mlp.chunks for array in chunk))
    else:
        profile.end("MLP forward", x)
    return x, (attended, mlp)


def _embed_backward(tokens: mx.array, dx: mx.array, model: ModelConfig, grads: GradientAccumulator) -> None:
    """Adds the gradient of the embedding, given the gradient `dx` [N, D] of `embed`'s result."""
    name = "model.embed_tokens.weight"
    total = grads.sums.pop(name) if name in grads.sums else mx.zeros((model.vocab_size, model.d_model))
    dx = dx.astype(mx.float32)
    dx = dx if model.embedding_scale is None else dx * model.embedding_scale
    grads.sums[name] = add_rows(total, tokens.reshape(-1), dx)
