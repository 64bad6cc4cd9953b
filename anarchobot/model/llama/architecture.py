"""The Llama family: RoPE, RMSNorm, gated MLP, grouped-query attention. Llama, Mistral, Qwen2 (biases on queries, keys
and values) and Qwen3 (normalized queries and keys). Does not import MLX: both backends, planning and file
conversion use it.

Shapes: B rows of L tokens, N = B L, D d_model, H query heads, K key/value heads, E head width, F MLP width,
V vocabulary.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import (
    EXPORT_LIBRARIES,
    ActivationSizes,
    ExportTarget,
    Float32,
    QueryBlocks,
    Shape,
    TensorSource,
)
from anarchobot.model.quantization import check_format

HF_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
INIT_STD = 0.02
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")


# ---- Parameters ----


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Hugging Face Llama's names (Qwen3's for the norms of qk_norm, Qwen2's for attention_bias)."""
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


def init(name: str, model: ModelConfig) -> tuple[float, float]:
    """Norms are one, biases zero, matrices normal with standard deviation 0.02; for the two that write to the residual
    stream, 0.02 / sqrt(2 n_layers) (GPT-2, Radford et al., 2019, section 2.3), or zero with zero_init_proj."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 0.0, 0.0 if model.zero_init_proj else INIT_STD / math.sqrt(2 * model.n_layers)
    if name.endswith("norm.weight"):
        return 1.0, 0.0
    return 0.0, 0.0 if name.endswith(".bias") else INIT_STD


# ---- Hugging Face's config.json ----


def to_hf(model: ModelConfig) -> dict[str, Any]:
    kind = _hf_name(model)
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu" if model.ffn_activation == "silu" else _TANH_GELU[0],
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": model.attention_bias,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def _hf_name(model: ModelConfig) -> str:
    """Returns the Hugging Face name of the model type with these settings."""
    return "Qwen3" if model.qk_norm else "Qwen2" if model.attention_bias else "Llama"


def from_hf(values: dict[str, Any], file: str) -> dict[str, Any]:
    """Raises UserError for sliding windows, scaled RoPE, mixtures of experts, other activations, and weights quantized in
    another format than mlx-lm's affine mode."""
    _check_supported(values, file)
    d_model, n_heads = _positive(values, "hidden_size", file), _positive(values, "num_attention_heads", file)
    head_dim = values.get("head_dim")
    return {
        "vocab_size": _positive(values, "vocab_size", file),
        "n_layers": _positive(values, "num_hidden_layers", file),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": None if values.get("num_key_value_heads") in (None, n_heads) else values["num_key_value_heads"],
        "head_dim": None if head_dim is None or head_dim * n_heads == d_model else head_dim,
        "mlp_multiple": _positive(values, "intermediate_size", file) / d_model,
        "ffn_activation": _activation(values, file),
        "dropout": 0.0,
        "max_seq_len": _positive(values, "max_position_embeddings", file),
        "rope_theta": float(_rope(values, file).get("rope_theta", 10000.0)),
        "norm_eps": _positive(values, "rms_norm_eps", file),
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "qk_norm": values["model_type"] == "qwen3",
    }


def infer_from_weights(names: Collection[str]) -> dict[str, Any]:
    return {"attention_bias": any(name.endswith(".self_attn.q_proj.bias") for name in names)}


def unsupported_for_export(model: ModelConfig, target: ExportTarget) -> Iterator[str]:
    name, library = _hf_name(model), EXPORT_LIBRARIES[target]
    if model.logit_softcap is not None:
        yield f"model.logit_softcap: {model.logit_softcap:g}: {name} has no logit softcap: train the model without it"
    if model.value_residual:
        yield f"model.value_residual: {name} has no value residuals: train the model without them"
    if model.embedding_scale is not None and model.tie_embeddings:
        yield (
            f"model.embedding_scale: {model.embedding_scale:g}: {name} has no such scale, and with "
            "model.tie_embeddings it can't be folded into the embedding: train the model without one of them"
        )
    if model.ffn_activation != "silu" and target != "hf":
        yield f"model.ffn_activation: gelu: {name} in {library} supports only silu: export to hf"
    if model.d_model % model.n_heads and name == "Llama" and target != "gguf":
        yield (
            f"model.n_heads: {model.n_heads}: transformers requires a Llama's d_model ({model.d_model}) to be a "
            "multiple of n_heads: export to gguf"
        )
    if model.attention_bias and model.qk_norm:
        yield (
            "model.attention_bias: no supported architecture has both biases (Qwen2) and model.qk_norm (Qwen3): train "
            "the model without one of them"
        )
    elif model.attention_bias and model.n_heads * model.head_size != model.d_model and target != "hf":
        yield (
            f"model.head_dim: {model.head_size}: Qwen2 (model.attention_bias) in {library} requires d_model / n_heads: "
            "export to hf"
        )


def export_parameters(params: dict[str, Float32], model: ModelConfig) -> dict[str, Float32]:
    """Llama has no embedding_scale: it is multiplied into the embedding."""
    if model.embedding_scale is None:
        return params
    name = "model.embed_tokens.weight"
    return {**params, name: params[name] * model.embedding_scale}


def _check_supported(values: dict[str, Any], file: str) -> None:
    kind, longest = values["model_type"], values.get("max_position_embeddings", 0)
    # 4096 is the default in transformers.
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window", kind == "mistral") else None
    if window is not None and window < longest:
        raise UserError(
            f"{file}: sliding_window: {window}: sliding windows are not supported: to use the model up to that length, "
            f"set max_position_embeddings to {window} and sliding_window to null in this file"
        )
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if values.get(key):
            raise UserError(f"{file}: {key}: {values[key]}: mixtures of experts are not supported")
    other = set(values.get("layer_types") or ()) - {"full_attention", None if window is None else "sliding_attention"}
    if other:
        raise UserError(f"{file}: layer_types: {sorted(map(str, other))[0]}: only full_attention is supported")
    check_format(values, file)


def _rope(values: dict[str, Any], file: str) -> dict[str, Any]:
    """Merges rope_theta at the top level (older files) with rope_scaling and rope_parameters (transformers 5)."""
    rope = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(more := values.get(key) or {}, dict):
            raise UserError(f"{file}: {key}: expected a JSON object")
        rope |= _common_to_layers(more, key, file)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{file}: {kind} RoPE scaling is not supported")
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{file}: partial_rotary_factor: must be 1")
    return rope


def _common_to_layers(rope: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    """Unwraps parameters given per layer type, such as {"full_attention": {"rope_theta": ...}, ...}."""
    kinds = {kind: more for kind, more in rope.items() if isinstance(more, dict)}
    if not kinds:
        return rope
    first = next(iter(kinds.values()))
    if len(kinds) < len(rope) or any(more != first for more in kinds.values()):
        raise UserError(f"{file}: {key} differs between layer types ({', '.join(rope)}): this is not supported")
    return first


def _activation(values: dict[str, Any], file: str) -> str:
    activation = values.get("hidden_act", "silu")
    if activation in ("silu", "swish"):
        return "silu"
    if activation in _TANH_GELU:
        return "gelu"
    raise UserError(f"{file}: unsupported hidden_act {activation!r}: expected silu or {_TANH_GELU[0]}")


def _positive(values: dict[str, Any], key: str, file: str) -> Any:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{file}: {key}: expected a number above 0, got {value!r}")
    return value


# ---- Counts ----
# Only matrix products are counted, and only the part of them that is computed. Norms, activations, softmax and the
# products with ones by which a CPU sums rows are not. `blocks` are the query blocks of a sequence: each sees the keys
# [0, end), so a little of what lies above the diagonal is computed and counted.


def step_flops(model: ModelConfig, rows: int, blocks: QueryBlocks) -> dict[str, int]:
    tokens, layers = rows * blocks[-1][1], model.n_layers
    projections = 2 * tokens * _attention_weights(model)
    scores = _queries_by_keys(model, rows, blocks)
    mlp = 6 * tokens * model.d_model * model.mlp_size  # gate, up and down
    return {
        "embedding": 0,  # a lookup
        "attention forward": layers * (projections + 2 * scores),
        "MLP forward": layers * mlp,
        "head and loss": 6 * tokens * model.d_model * model.vocab_size,  # logits, and gradients of hidden and weight
        # Checkpointing recomputes a block's forward pass except down_proj.
        "blocks forward again": layers * (projections + 2 * scores + mlp // 3 * 2),
        "MLP backward": layers * 2 * mlp,
        # Of the five products of queries and keys, four are gradients and one recomputes the scores.
        "attention backward": layers * (2 * projections + 5 * scores),
    }


def recomputed_flops(model: ModelConfig, rows: int, blocks: QueryBlocks, checkpointing: bool) -> int:
    """Attention scores are always recomputed; with checkpointing, so are the blocks."""
    again = step_flops(model, rows, blocks)["blocks forward again"] if checkpointing else 0
    return model.n_layers * _queries_by_keys(model, rows, blocks) + again


def activation_sizes(model: ModelConfig, tokens: int, itemsize: int) -> ActivationSizes:
    """Saved are the inputs of both halves, q, k, v, the output of attention and its logsumexp (float32), gate and
    up."""
    x, mlp = itemsize * tokens * model.d_model, itemsize * tokens * model.mlp_size
    q, kv = (itemsize * tokens * heads * model.head_size for heads in (model.n_heads, model.kv_heads))
    return ActivationSizes(x, q, kv, mlp, saved=2 * (x + q + kv + mlp) + 4 * tokens * model.n_heads)


def _attention_weights(model: ModelConfig) -> int:
    return model.d_model * model.head_size * (2 * model.n_heads + 2 * model.kv_heads)


def _queries_by_keys(model: ModelConfig, rows: int, blocks: Sequence[tuple[int, int]]) -> int:
    """One product of all queries with the keys that their block sees: 2 B H E sum((end - start) end)."""
    return 2 * rows * model.n_heads * model.head_size * sum((end - start) * end for start, end in blocks)
