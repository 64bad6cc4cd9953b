"""The memory of a training step on a GPU, estimated from its shapes: system/memory.py for a compiled step. No MLX here.

The arrays of each phase are those that exist at its peak if each kernel ends before the next one starts, in
benchmarks/metal_model.py, a model of MLX's Metal backend. In half precision they include a copy of all matrices in it.

MLX encodes kernels ahead of the GPU, in up to ten command buffers of 40 x 2^20 elements each (40 or 50, by the chip),
which hold what their kernels read and write. `RUN_AHEAD` is the part of it that would not exist otherwise.

benchmarks/memory.py --metal compares the estimate with that model. Neither has been compared with a device.
"""

import math
from collections.abc import Mapping

from anarchobot.config.schema import Config
from anarchobot.model.architecture import GPU_LOSS_CHUNK, architecture, query_blocks
from anarchobot.model.parameters import by_block, lowest_trained_block, parameter_shapes
from anarchobot.system.memory_phases import MemoryPhases

Shapes = Mapping[str, tuple[int, ...]]

# By item size of the products: bytes of these elements, in the backward pass.
RUN_AHEAD = {size: round(10 * 40 * 2**20 * size * part) for size, part in ((2, 7 / 8), (4, 3 / 4))}
MUON_ARRAYS = 8  # of a matrix's size, that exist at most while MLX encodes its update


def gpu_phases(config: Config, trained: Shapes, rows: int, itemsize: int, *, accumulated: bool) -> MemoryPhases:
    """A step on micro-batches of `rows` sequences that trains the parameters `trained`, with products in a dtype of
    `itemsize` bytes. `accumulated`: it has several micro-batches, so that the gradients of earlier ones exist."""
    model, train, length = config.model, config.train, config.data.seq_len
    n, half = rows * length, itemsize == 2
    x, q, kv, mlp, saved_block = architecture(model.architecture).activation_sizes(model, n, itemsize)
    lowest = lowest_trained_block(trained, model)
    blocks = model.n_layers - lowest  # with a backward pass
    saved = x if train.gradient_checkpointing else saved_block  # by each block
    recomputed = saved_block if train.gradient_checkpointing else 0

    gradients = [4 * _size(block) for block in by_block(trained, model)]
    head = model.vocab_size * model.d_model
    head_trained = (model.vocab_size, model.d_model) in trained.values()
    first_gradients = 4 * _size(trained) if accumulated else 4 * head * head_trained  # when the backward pass begins
    cast = 0
    if half and not config.lora.r:  # LoRA's base model is stored in the products' dtype
        cast = itemsize * _size({name: s for name, s in parameter_shapes(model).items() if len(s) == 2})

    chunk_tokens = min(n, train.loss_chunk or GPU_LOSS_CHUNK)
    chunk, chunks = itemsize * chunk_tokens * model.vocab_size, -(-n // chunk_tokens)
    logits = 2 * chunk + itemsize * head * head_trained  # with their gradient, and the head's
    # The document mask, as a sum to the scores.
    masked = config.data.document_mask or (train.init_from is not None and config.chat.pack)
    all_saved = blocks * saved + 3 * x + itemsize * rows * length**2 * masked
    run_ahead = min(RUN_AHEAD[itemsize], (8 if recomputed else 6) * blocks * saved_block + 2 * chunk)
    # In the loss, several chunks: at least three, because large kernels fill a command buffer each. While a sum of
    # gradients is in use, its memory cannot be reused for the next sum.
    one_chunk = 2 * chunk + (itemsize + 4) * head * head_trained
    chunks_ahead = min(chunks, max(3, RUN_AHEAD[itemsize] // one_chunk))
    loss_ahead = max(chunks_ahead * one_chunk - 2 * chunk, run_ahead // 2)

    forward = first_gradients * accumulated + cast + all_saved + recomputed + mlp
    loss = first_gradients + cast + all_saved + logits
    query_ranges = query_blocks(rows, model.n_heads, length, train.attention_block, on_cpu=False)
    scores = itemsize * rows * model.n_heads * max((end - start) * end for start, end in query_ranges)
    # Of keys and values there are the sums of two blocks of queries and copies of what is final.
    backward = 0
    product = itemsize * model.d_model * model.mlp_size
    for i in range(lowest, model.n_layers):
        live = first_gradients if accumulated else first_gradients + sum(gradients[i:])
        live += cast + all_saved - (model.n_layers - i) * saved + saved_block + chunk - x
        attention = 2 * scores + 2 * q + 4 * kv - 2 * mlp
        backward = max(backward, live + max(2 * mlp + product, attention))
    sums = 4 * _size(trained)
    update = min(3 * RUN_AHEAD[4] // 4, MUON_ARRAYS * sums) if train.optimizer == "muon_adamw" else 0
    return MemoryPhases(
        activations=all_saved + recomputed,
        logits=logits,
        forward=forward + run_ahead // 2,
        loss=loss + loss_ahead,
        backward=backward + run_ahead,
        norm=sums + min(RUN_AHEAD[4] // 2, sums),  # the squares
        update=sums + update,
    )


def _size(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
