"""Converts the model section to and from Hugging Face's config.json: Llama, Qwen2 (biases on queries, keys and values)
or Qwen3 (normalized queries and keys)."""

from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import config_from_dict
from anarchobot.config.schema import ModelConfig
from anarchobot.config.validation import conflicts
from anarchobot.exchange.dtypes import Dtype
from anarchobot.exchange.targets import architecture_name

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")


def to_hf(model: ModelConfig, bos_id: int, stop_ids: int | list[int], dtype: Dtype) -> dict[str, Any]:
    """Returns config.json for a model that `unsupported_settings` (targets.py) accepts. `bos_id` starts a text; any of
    `stop_ids` ends generation."""
    name = architecture_name(model)
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
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
        "bos_token_id": bos_id,
        "eos_token_id": stop_ids,
        "torch_dtype": dtype,
    }


def from_hf(values: dict[str, Any], name: str) -> ModelConfig:
    """Returns the model section for a config.json; attention_bias is left to the caller, because it depends on the
    weights. `name` is the file's name for error messages.

    Raises UserError for unsupported features: other architectures, sliding windows, scaled RoPE, mixtures of experts,
    other activations.
    """
    _check_supported(values, name)
    d_model, n_heads = _positive(values, "hidden_size", name), _positive(values, "num_attention_heads", name)
    head_dim = values.get("head_dim")
    model = {
        "vocab_size": _positive(values, "vocab_size", name),
        "n_layers": _positive(values, "num_hidden_layers", name),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": None if values.get("num_key_value_heads") in (None, n_heads) else values["num_key_value_heads"],
        "head_dim": None if head_dim is None or head_dim * n_heads == d_model else head_dim,
        "mlp_multiple": _positive(values, "intermediate_size", name) / d_model,
        "ffn_activation": _activation(values, name),
        "dropout": 0.0,
        "max_seq_len": _positive(values, "max_position_embeddings", name),
        "rope_theta": float(_rope(values, name).get("rope_theta", 10000.0)),
        "norm_eps": _positive(values, "rms_norm_eps", name),
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "qk_norm": values["model_type"] == "qwen3",
    }
    config = config_from_dict({"model": model, "data": {"seq_len": 1}}, name)
    for _, problem in conflicts(config, []):
        raise UserError(f"{name}: {problem}")
    return config.model


def _check_supported(values: dict[str, Any], name: str) -> None:
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        problem = f"unsupported model_type {kind!r}" if kind else "missing model_type"
        raise UserError(f"{name}: {problem}: expected one of {', '.join(ARCHITECTURES)}")
    longest = values.get("max_position_embeddings", 0)
    # 4096 is the default in transformers.
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window", kind == "mistral") else None
    if window is not None and window < longest:
        raise UserError(
            f"{name}: sliding_window: {window}: sliding windows are not supported: to use the model up to that length, "
            f"set max_position_embeddings to {window} and sliding_window to null in this file"
        )
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if values.get(key):
            raise UserError(f"{name}: {key}: {values[key]}: mixtures of experts are not supported")
    other = set(values.get("layer_types") or ()) - {"full_attention", None if window is None else "sliding_attention"}
    if other:
        raise UserError(f"{name}: layer_types: {sorted(map(str, other))[0]}: only full_attention is supported")
    if values.get("quantization_config") or values.get("quantization"):
        raise UserError(f"{name}: quantized weights are not supported: use the model in float32, float16 or bfloat16")


def _rope(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Merges rope_theta at the top level (older files) with rope_scaling and rope_parameters (transformers 5)."""
    rope = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(more := values.get(key) or {}, dict):
            raise UserError(f"{name}: {key}: expected a JSON object")
        rope |= _common_to_layers(more, key, name)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{name}: {kind} RoPE scaling is not supported")
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{name}: partial_rotary_factor: must be 1")
    return rope


def _common_to_layers(rope: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """Unwraps parameters given per layer type, such as {"full_attention": {"rope_theta": ...}, ...}."""
    kinds = {kind: more for kind, more in rope.items() if isinstance(more, dict)}
    if not kinds:
        return rope
    first = next(iter(kinds.values()))
    if len(kinds) < len(rope) or any(more != first for more in kinds.values()):
        raise UserError(f"{name}: {key} differs between layer types ({', '.join(rope)}): this is not supported")
    return first


def _activation(values: dict[str, Any], name: str) -> str:
    activation = values.get("hidden_act", "silu")
    if activation in ("silu", "swish"):
        return "silu"
    if activation in _TANH_GELU:
        return "gelu"
    raise UserError(f"{name}: unsupported hidden_act {activation!r}: expected silu or {_TANH_GELU[0]}")


def _positive(values: dict[str, Any], key: str, name: str) -> Any:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{name}: {key}: expected a number above 0, got {value!r}")
    return value
