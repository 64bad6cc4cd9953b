"""Floating-point operations of a training step, counted from its shapes. No MLX here.

A product of [m, k] and [k, n] is 2 m n k operations. Only matrix products are counted, and only what is computed of
them; norms, activations, softmax and AdamW are not, nor the products with ones by which a CPU sums rows.

`blocks` are the blocks of queries [start, end) of a sequence (model/llama/attention.py): each sees the keys [0, end),
so a little of what lies above the diagonal is computed and counted.

Shapes: B rows of L tokens, N = B L, D d_model, H query heads, K key/value heads, E head width, F mlp width,
V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise

from anarchobot.config.schema import ModelConfig

Blocks = Sequence[tuple[int, int]]

STRIPS, STRIPS_FROM = 4, 512  # optim/polar_express.py: how a CPU multiplies symmetric matrices of this size or more


def attention_forward(model: ModelConfig, rows: int, blocks: Blocks) -> int:
    """An attention half: 2 N D E (2 H + 2 K) in the four projections, and two products of queries and keys."""
    return 2 * _tokens(rows, blocks) * _attention_weights(model) + 2 * _queries_by_keys(model, rows, blocks)


def attention_backward(model: ModelConfig, rows: int, blocks: Blocks) -> int:
    """Twice the projections' (for inputs and for weights), and five products of queries and keys: four are gradients,
    one computes the scores again."""
    return 4 * _tokens(rows, blocks) * _attention_weights(model) + 5 * _queries_by_keys(model, rows, blocks)


def mlp_forward(model: ModelConfig, tokens: int) -> int:
    """An MLP half: 6 N D F in gate, up and down."""
    return 6 * tokens * model.d_model * model.mlp_size


def mlp_backward(model: ModelConfig, tokens: int) -> int:
    """12 N D F: each product once for its input and once for its weights."""
    return 2 * mlp_forward(model, tokens)


def head(model: ModelConfig, tokens: int) -> int:
    """6 N D V: the logits, and their gradients for the hidden states and for the weights."""
    return 6 * tokens * model.d_model * model.vocab_size


def block_again(model: ModelConfig, rows: int, blocks: Blocks) -> int:
    """What gradient checkpointing computes again of a block: all of its forward pass but down_proj's 2 N D F."""
    mlp = mlp_forward(model, _tokens(rows, blocks)) // 3 * 2
    return attention_forward(model, rows, blocks) + mlp


def model_step(model: ModelConfig, rows: int, blocks: Blocks) -> int:
    """What loss and gradients need: 6 N for each weight of a matrix that multiplies (all of the blocks' and the head,
    which may be the embedding; looking an embedding up is no product), and six products of queries and keys a block."""
    tokens = _tokens(rows, blocks)
    attention = 3 * attention_forward(model, rows, blocks)
    mlp = mlp_forward(model, tokens) + mlp_backward(model, tokens)
    return model.n_layers * (attention + mlp) + head(model, tokens)


def recomputed(model: ModelConfig, rows: int, blocks: Blocks, gradient_checkpointing: bool) -> int:
    """What is computed a second time: the scores of attention, always, and under checkpointing each block."""
    again = block_again(model, rows, blocks) if gradient_checkpointing else 0
    return model.n_layers * (_queries_by_keys(model, rows, blocks) + again)


def muon(model: ModelConfig, split_heads: bool, on_cpu: bool) -> int:
    """Muon's products in one update of all blocks: for each matrix, or each head's part of the attention projections
    with `split_heads`, of small side s and large side k (optim/polar_express.py): X X^T, 17 products of [s, s], and the
    last one with X: 4 s^2 k + 34 s^3; on a CPU from s = 512 up, of the symmetric ones only what four strips compute."""
    d, e, heads, kv_heads = model.d_model, model.head_size, model.n_heads, model.kv_heads
    attention = [(e, d)] * (2 * heads + 2 * kv_heads) if split_heads else [(heads * e, d), (kv_heads * e, d)] * 2
    mlp = [(model.mlp_size, d)] * 3
    return model.n_layers * sum(_orthogonalised(rows, cols, on_cpu) for rows, cols in attention + mlp)


def _orthogonalised(rows: int, cols: int, on_cpu: bool) -> int:
    s, k = sorted((rows, cols))
    strips = STRIPS if on_cpu and s >= STRIPS_FROM else 1
    pairs = sum((end - start) * end for start, end in pairwise(s * i // strips for i in range(strips + 1)))
    return 2 * pairs * (k + 17 * s) + 2 * s * s * k


def _tokens(rows: int, blocks: Blocks) -> int:
    return rows * blocks[-1][1]


def _attention_weights(model: ModelConfig) -> int:
    return model.d_model * model.head_size * (2 * model.n_heads + 2 * model.kv_heads)


def _queries_by_keys(model: ModelConfig, rows: int, blocks: Blocks) -> int:
    """One product of all queries with the keys that their block sees: 2 B H E sum((end - start) end)."""
    return 2 * rows * model.n_heads * model.head_size * sum((end - start) * end for start, end in blocks)
