"""The memory of a training step on a model that mlx-lm computes: a rough estimate, by MLX's automatic differentiation.

    forward    the inputs and outputs of all linear layers and the attention scores are saved for the backward pass;
               with gradient checkpointing, the input of each block
    loss       these, and the logits of the chunks that MLX allocates ahead
    backward   these, and the arrays of the blocks that MLX computes ahead

The number of chunks and blocks ahead are fitted to MLX's peak on a mixture of experts. State-space models, whose
recurrences save arrays of their own, need more.
"""

import math
from collections.abc import Mapping

from anarchobot.config.schema import Config
from anarchobot.model.architecture import GPU_LOSS_CHUNK, architecture
from anarchobot.optim.param_groups import state_shapes
from anarchobot.system.memory_phases import MemoryPhases
from anarchobot.system.technique import ONE_GRAPH_LOSS_CHUNK

CHUNKS_AHEAD, BLOCKS_AHEAD = 4, 4


def module_phases(
    config: Config, trained: Mapping[str, tuple[int, ...]], rows: int, itemsize: int, *, on_cpu: bool, accumulated: bool
) -> MemoryPhases:
    """A step on micro-batches of `rows` sequences that trains the parameters `trained`, with products in a dtype of
    `itemsize` bytes. `accumulated`: it has several micro-batches, so that the gradients of earlier ones exist."""
    model, train, length = config.model, config.train, config.data.seq_len
    tokens = rows * length
    sizes = architecture(model.architecture).activation_sizes(model, tokens, itemsize)
    block = sizes.saved + 4 * rows * model.n_heads * length**2
    saved = model.n_layers * (sizes.x if train.gradient_checkpointing else block)
    chunk_tokens = min(tokens, train.loss_chunk or (ONE_GRAPH_LOSS_CHUNK if on_cpu else GPU_LOSS_CHUNK))
    logits = 4 * 4 * chunk_tokens * model.vocab_size  # float32, their gradient and what is between
    sums = [4 * math.prod(shape) for shape in trained.values()]
    gradients = sum(sums) if accumulated else 0
    casts = 0 if itemsize == 4 or config.lora.r else itemsize * sum(sums) // 4
    moments = state_shapes(trained, train)["muon.momentum"]
    return MemoryPhases(
        activations=saved + block,
        logits=logits,
        forward=gradients + casts + saved + block,
        loss=gradients + casts + saved + min(CHUNKS_AHEAD, -(-tokens // chunk_tokens)) * logits,
        backward=casts + saved + sum(sums) + (BLOCKS_AHEAD if train.gradient_checkpointing else 1) * block,
        norm=2 * sum(sums),
        update=sum(sums) + (3 if moments else 1) * max(sums),
    )
