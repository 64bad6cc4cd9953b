"""A model's shape as Hugging Face's config.json has it, both ways: Llama, Qwen2 with biases on queries, keys and
values, or Qwen3 with normed queries and keys."""

from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import config_from_dict
from anarchobot.config.schema import ModelConfig
from anarchobot.config.validation import conflicts
from anarchobot.exchange.targets import architecture
from anarchobot.exchange.dtypes import Dtype

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")


def to_hf(model: ModelConfig, bos_id: int, ends: int | list[int], dtype: Dtype) -> dict[str, Any]:
    """config.json of a model that exchange/limits.py has nothing against; `bos_id` is what a text begins with, at any
    of `ends` generation stops."""
    kind = architecture(model)
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
        "bos_token_id": bos_id,
        "eos_token_id": ends,
        "torch_dtype": dtype,
    }


def from_hf(values: dict[str, Any], name: str) -> ModelConfig:
    """The shape that a config.json tells, but for biases, which the weights tell; `name` is the file's, for errors.

    Raises UserError for what a model of ours can't be: another architecture, a sliding window, scaled rotary positions,
    experts, another activation.
    """
    _refuse(values, name)
    d_model, n_heads = _number(values, "hidden_size", name), _number(values, "num_attention_heads", name)
    head_dim = values.get("head_dim")
    model = {
        "vocab_size": _number(values, "vocab_size", name),
        "n_layers": _number(values, "num_hidden_layers", name),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": None if values.get("num_key_value_heads") in (None, n_heads) else values["num_key_value_heads"],
        "head_dim": None if head_dim is None or head_dim * n_heads == d_model else head_dim,
        "mlp_multiple": _number(values, "intermediate_size", name) / d_model,
        "ffn_activation": _activation(values, name),
        "dropout": 0.0,
        "max_seq_len": _number(values, "max_position_embeddings", name),
        "rope_theta": float(_rope(values, name).get("rope_theta", 10000.0)),
        "norm_eps": _number(values, "rms_norm_eps", name),
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "qk_norm": values["model_type"] == "qwen3",
    }
    config = config_from_dict({"model": model, "data": {"seq_len": 1}}, name)
    for _, problem in conflicts(config, []):
        raise UserError(f"{name}: {problem}")
    return config.model


def _refuse(values: dict[str, Any], name: str) -> None:
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        said = f"model_type is {kind!r}" if kind else "there is no model_type"
        raise UserError(f"{name}: {said}: expected one of {', '.join(ARCHITECTURES)}")
    longest = values.get("max_position_embeddings", 0)
    # 4096 is what transformers takes where it is left out.
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window", kind == "mistral") else None
    if window is not None and window < longest:
        raise UserError(
            f"{name}: sliding_window is {window}: a model here sees all that came before: it can be carried up to that "
            f"length only (set max_position_embeddings to {window} in this file, and sliding_window to null)"
        )
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if values.get(key):
            raise UserError(f"{name}: {key} is {values[key]}: a mixture of experts can't be carried")
    other = set(values.get("layer_types") or ()) - {"full_attention", None if window is None else "sliding_attention"}
    if other:
        raise UserError(f"{name}: layer_types has {sorted(map(str, other))[0]}: only full_attention can be carried")
    if values.get("quantization_config") or values.get("quantization"):
        raise UserError(f"{name}: the weights are quantised: take the model in float32, float16 or bfloat16")


def _rope(values: dict[str, Any], name: str) -> dict[str, Any]:
    """rope_theta as older files have it, at the top, or as transformers 5 writes it, in rope_parameters."""
    rope = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(more := values.get(key) or {}, dict):
            raise UserError(f"{name}: {key}: expected names and values")
        rope |= _of_all_layers(more, key, name)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{name}: rotary positions are scaled ({kind}): only the plain ones can be carried")
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{name}: partial_rotary_factor: only whole heads can be rotated")
    return rope


def _of_all_layers(rope: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """Some files say it for each kind of layer: {"full_attention": {"rope_theta": ...}, ...}."""
    kinds = {kind: more for kind, more in rope.items() if isinstance(more, dict)}
    if not kinds:
        return rope
    first = next(iter(kinds.values()))
    if len(kinds) < len(rope) or any(more != first for more in kinds.values()):
        raise UserError(
            f"{name}: {key} differs by the kind of layer ({', '.join(rope)}): all layers here have the same"
        )
    return first


def _activation(values: dict[str, Any], name: str) -> str:
    activation = values.get("hidden_act", "silu")
    if activation in ("silu", "swish"):
        return "silu"
    if activation in _TANH_GELU:
        return "gelu"
    raise UserError(f"{name}: hidden_act is {activation!r}: expected silu, or gelu in its tanh form ({_TANH_GELU[0]})")


def _number(values: dict[str, Any], key: str, name: str) -> Any:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{name}: {key}: expected a number above 0, got {value!r}")
    return value
