"""The Llama family: RoPE, RMSNorm, gated MLP, grouped-query attention; optionally biases on queries, keys and values
(Qwen2), normalized queries and keys (Qwen3), sliding windows (Mistral) and norms of the outputs of attention and MLP
(Gemma). Does not import MLX: both backends, planning and file conversion use it.

Shapes: B rows of L tokens, N = B L, D d_model, H query heads, K key/value heads, E head width, F MLP width,
V vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import (
    ActivationSizes,
    AdaptableMatrix,
    Float32,
    QueryBlocks,
    Shape,
    TensorSource,
)
from anarchobot.model.llama.export_limits import export_warnings, exported_length, unsupported_for_export
from anarchobot.model.llama.hf_config import CLASSES, embedding_factor, from_hf, hf_type, to_hf

# Parts of Architecture in other files.
__all__ = ["export_warnings", "exported_length", "from_hf", "to_hf", "unsupported_for_export"]

HF_MODEL_TYPES = tuple(CLASSES)
INIT_STD = 0.02


# ---- Parameters ----


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Hugging Face Llama's names (Qwen3's for the norms of qk_norm, Qwen2's for attention_bias), and own ones for the
    norms of the outputs of attention and MLP."""
    d, head, hidden = model.d_model, model.head_size, model.mlp_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (model.vocab_size, d)}
    for i in range(model.n_layers):
        block: dict[str, Shape] = {
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
        if model.post_norms:
            block |= {"attention_output_layernorm.weight": (d,), "mlp_output_layernorm.weight": (d,)}
        if model.qk_norm:
            block |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (d,)
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, d)
    return shapes


def token_parameters(model: ModelConfig) -> list[str]:
    return ["model.embed_tokens.weight", *([] if model.tie_embeddings else ["lm_head.weight"])]


def with_vocab_size(model: ModelConfig, vocab_size: int) -> ModelConfig:
    return model.model_copy(update={"vocab_size": vocab_size})


def adaptable_matrices(model: ModelConfig) -> dict[str, AdaptableMatrix]:
    """All matrices of the blocks."""
    return {
        name.removesuffix(".weight"): AdaptableMatrix(int(name.split(".")[2]), shape)
        for name, shape in parameter_shapes(model).items()
        if name.endswith("_proj.weight")
    }


def init(name: str, model: ModelConfig) -> tuple[float, float]:
    """Norms are one, biases zero, matrices normal with standard deviation 0.02; for the two that write to the residual
    stream, 0.02 / sqrt(2 n_layers) (GPT-2, Radford et al., 2019, section 2.3)."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 0.0, INIT_STD / math.sqrt(2 * model.n_layers)
    if name.endswith("norm.weight"):
        return 1.0, 0.0
    return 0.0, 0.0 if name.endswith(".bias") else INIT_STD


# ---- Hugging Face's files ----

# Own names of norms whose Hugging Face name differs: Gemma calls the norm before the MLP pre_feedforward_layernorm, and
# post_attention_layernorm is that of the attention's output.
_GEMMA_NORMS = {
    "attention_output_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_layernorm": "post_feedforward_layernorm",
}
_FUSED = {  # parts of Phi-3's matrices, in the order of their rows
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def infer_from_weights(names: Collection[str]) -> dict[str, Any]:
    return {"attention_bias": any(name.endswith(".self_attn.q_proj.bias") for name in names)}


def tensor_sources(model: ModelConfig, model_type: str) -> dict[str, TensorSource]:
    """Phi-3 stores queries, keys and values as one matrix, and gate and up; Gemma stores norms minus one."""
    shapes = parameter_shapes(model)
    sources = {name: TensorSource(name) for name in shapes}
    if model_type == "phi3":
        for i in range(model.n_layers):
            for fused, parts in _FUSED.items():
                start = 0
                for part in (f"model.layers.{i}.{name}.weight" for name in parts):
                    stop = start + shapes[part][0]
                    sources[part] = TensorSource(f"model.layers.{i}.{fused}.weight", (start, stop))
                    start = stop
    elif model_type.startswith("gemma"):
        for name in shapes:
            if name.endswith("norm.weight"):
                block, _, norm = name.removesuffix(".weight").rpartition(".")
                norm = _GEMMA_NORMS.get(norm, norm) if model.post_norms else norm
                sources[name] = TensorSource(f"{block}.{norm}.weight", offset=1.0)
    return sources


def export_parameters(params: dict[str, Float32], model: ModelConfig) -> dict[str, Float32]:
    """The inverse of `tensor_sources`, with the embedding scale multiplied into the embedding."""
    factor = embedding_factor(model)
    if factor != 1:
        name = "model.embed_tokens.weight"
        params = {**params, name: params[name] * factor}
    parts: dict[str, list[Float32]] = {}
    for name, source in tensor_sources(model, hf_type(model)).items():
        array = params[name] - np.float32(source.offset) if source.offset else params[name]
        parts.setdefault(source.name, []).append(array)
    return {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in parts.items()}


# ---- Counts ----
# Only matrix products are counted, and only the part of them that is computed. Norms, activations, softmax and the
# products with ones by which a CPU sums rows are not. `blocks` are the query blocks of a sequence: each sees the keys
# up to its end, from the first window on, so a little of what is masked is computed and counted.


def step_flops(model: ModelConfig, rows: int, blocks: QueryBlocks) -> dict[str, int]:
    tokens, layers = rows * blocks[-1][1], model.n_layers
    projections = 2 * tokens * _attention_weights(model)
    scores = _queries_by_keys(model, rows, blocks)  # of all layers
    mlp = 6 * tokens * model.d_model * model.mlp_size  # gate, up and down
    return {
        "embedding": 0,  # a lookup
        "attention forward": layers * projections + 2 * scores,
        "MLP forward": layers * mlp,
        "head and loss": 6 * tokens * model.d_model * model.vocab_size,  # logits, and gradients of hidden and weight
        # Checkpointing recomputes a block's forward pass, except down_proj if its output is not normalized.
        "blocks forward again": layers * (projections + (mlp if model.post_norms else mlp // 3 * 2)) + 2 * scores,
        "MLP backward": layers * 2 * mlp,
        # Of the five products of queries and keys, four are gradients and one recomputes the scores.
        "attention backward": 2 * layers * projections + 5 * scores,
    }


def recomputed_flops(model: ModelConfig, rows: int, blocks: QueryBlocks, checkpointing: bool) -> int:
    """Attention scores are always recomputed; with checkpointing, so are the blocks."""
    again = step_flops(model, rows, blocks)["blocks forward again"] if checkpointing else 0
    return _queries_by_keys(model, rows, blocks) + again


def activation_sizes(model: ModelConfig, tokens: int, itemsize: int) -> ActivationSizes:
    """Saved are the inputs of both halves, q, k, v, the output of attention and its logsumexp (float32), gate and
    up; with post_norms, the outputs of both halves."""
    x, mlp = itemsize * tokens * model.d_model, itemsize * tokens * model.mlp_size
    q, kv = (itemsize * tokens * heads * model.head_size for heads in (model.n_heads, model.kv_heads))
    outputs = 2 * x if model.post_norms else 0
    return ActivationSizes(x, q, kv, mlp, saved=2 * (x + q + kv + mlp) + outputs + 4 * tokens * model.n_heads)


def _attention_weights(model: ModelConfig) -> int:
    return model.d_model * model.head_size * (2 * model.n_heads + 2 * model.kv_heads)


def _queries_by_keys(model: ModelConfig, rows: int, blocks: Sequence[tuple[int, int]]) -> int:
    """One product of all queries with the keys [first, end) that their block sees, in all layers: 2 B H E
    sum((end - start) (end - first))."""
    pairs = 0
    for window in model.windows:
        first = (0 if window is None else max(0, start - window + 1) for start, _ in blocks)
        pairs += sum((end - start) * (end - f) for f, (start, end) in zip(first, blocks, strict=True))
    return 2 * rows * model.n_heads * model.head_size * pairs
