"""StableLM, an example of a second architecture: LayerNorm with biases, partial rotary embeddings.

This file implements both protocols of model/architecture.py: `Architecture`, except the counts, and `ForwardPass`.
"""

from typing import Any

import mlx.core as mx

from anarchobot.config.schema import ModelConfig
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.linear import embedding_rows, linear, matrix
from anarchobot.model.parameters import by_block
from anarchobot.model.step_options import MicroBatch

ROTARY = 0.25  # fraction of a head


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, mlp = model.d_model, model.mlp_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, d)}
    for i in range(model.n_layers):
        block = {f"self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        block |= {"mlp.gate_proj.weight": (mlp, d), "mlp.up_proj.weight": (mlp, d), "mlp.down_proj.weight": (d, mlp)}
        norms = [f"{norm}.{x}" for norm in ("input_layernorm", "post_attention_layernorm") for x in ("weight", "bias")]
        shapes |= {f"model.layers.{i}.{name}": s for name, s in {**block, **dict.fromkeys(norms, (d,))}.items()}
    return shapes | {"model.norm.weight": (d,), "model.norm.bias": (d,), "lm_head.weight": (model.vocab_size, d)}


def init(name: str, model: ModelConfig) -> tuple[float, float]:
    return (1.0, 0.0) if "norm.weight" in name else (0.0, 0.0 if name.endswith(".bias") else 0.02)


def embed(params: Params, tokens: mx.array, model: ModelConfig, dtype: mx.Dtype) -> mx.array:
    return embedding_rows(matrix(params, "model.embed_tokens"), tokens.reshape(-1)).astype(dtype)


def layer(p: Params, x: mx.array, i: int, model: ModelConfig, batch: MicroBatch) -> mx.array:
    normed = _norm(p, "input_layernorm", x, model)
    q, k, v = (linear(p, f"self_attn.{name}_proj", normed) for name in "qkv")
    q, k, v = (a.reshape(*batch.tokens.shape, model.n_heads, -1).swapaxes(1, 2) for a in (q, k, v))
    q, k = (mx.fast.rope(a, int(ROTARY * model.head_size), traditional=False, base=1e4, scale=1.0, offset=0)
            for a in (q, k))  # fmt: skip
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=model.head_size**-0.5, mask="causal")
    x = x + linear(p, "self_attn.o_proj", out.swapaxes(1, 2).reshape(x.shape))
    normed = _norm(p, "post_attention_layernorm", x, model)
    gate = linear(p, "mlp.gate_proj", normed)
    return x + linear(p, "mlp.down_proj", gate * mx.sigmoid(gate) * linear(p, "mlp.up_proj", normed))


def final_norm(params: Params, x: mx.array, model: ModelConfig) -> mx.array:
    return _norm(params, "model.norm", x, model)


def head_name(model: ModelConfig) -> str:
    return "lm_head.weight"


def hidden_states(params: Params, tokens: mx.array, model: ModelConfig, *, dtype: mx.Dtype, **how: Any) -> mx.array:
    batch = MicroBatch(tokens, tokens, mx.array(1.0))
    x = embed(params, tokens, model, dtype)
    for i, p in enumerate(by_block(params, model)):
        x = layer(p, x, i, model, batch)
    return final_norm(params, x, model).reshape(*tokens.shape, -1)


def make_caches(params: Params, model: ModelConfig, *, trimmable: bool = False) -> list[Any]:
    """None: the next token of a prompt needs no earlier keys and values."""
    return []


def can_batch(params: Params, model: ModelConfig) -> bool:
    return False


def _norm(p: Params, name: str, x: mx.array, model: ModelConfig) -> mx.array:
    weight, bias = (p[f"{name}.{part}"].astype(x.dtype) for part in ("weight", "bias"))
    return mx.fast.layer_norm(x, weight, bias, model.norm_eps)
