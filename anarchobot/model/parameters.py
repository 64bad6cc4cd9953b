"""The parameters' names and shapes, and their first values. No MLX here: both engines, the parameter counts in the
shipped configs and the checkpoint's checks read this list."""

import hashlib
import math

import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import ModelConfig

INIT_STD = 0.02


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face Llama's names (Qwen3's for the norms of qk_norm, Qwen2's for attention_bias), matrices as (out, in),
    in the forward's order."""
    d, head, hidden = model.d_model, model.head_size, model.mlp_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, d)}
    for i in range(model.n_layers):
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (model.n_heads * head, d),
            "self_attn.k_proj.weight": (model.kv_heads * head, d),
            "self_attn.v_proj.weight": (model.kv_heads * head, d),
            "self_attn.o_proj.weight": (d, model.n_heads * head),
            "post_attention_layernorm.weight": (d,),
            "mlp.gate_proj.weight": (hidden, d),
            "mlp.up_proj.weight": (hidden, d),
            "mlp.down_proj.weight": (d, hidden),
        }
        if model.attention_bias:
            block |= {f"self_attn.{x}_proj.bias": block[f"self_attn.{x}_proj.weight"][:1] for x in "qkv"}
        if model.qk_norm:
            block |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (d,)
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, d)
    return shapes


def parameter_count(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


def init_parameters(model: ModelConfig, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """First values: norms one, biases zero, matrices normal with deviation 0.02, and 0.02 / sqrt(2 n_layers) for the
    two that write to the residual stream (GPT-2, Radford et al., 2019, section 2.3), or zero with zero_init_proj.

    Each matrix draws from a generator of its own, keyed by seed and name: the values do not depend on the engine, nor
    on which other parameters there are.
    """
    residual_std = 0.0 if model.zero_init_proj else INIT_STD / math.sqrt(2 * model.n_layers)
    values: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape in parameter_shapes(model).items():
        if len(shape) == 1:
            values[name] = np.full(shape, 0 if name.endswith(".bias") else 1, np.float32)
        else:
            key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "big")
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else INIT_STD
            values[name] = np.random.Generator(np.random.Philox(key=key)).standard_normal(
                shape, np.float32
            ) * np.float32(std)
    return values
