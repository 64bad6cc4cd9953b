"""config.json of Hugging Face models of the Llama family, read and written.

Read are Llama, Mistral, Qwen2, Qwen3, Phi-3 (and Phi-4), Gemma 1 and 2, and the language part of Gemma 3, in the form
of transformers 5 (rope_parameters) and in older ones (rope_theta, rope_scaling). What a key means, and its value where
it is missing, is what transformers' class of that model type makes of it.
"""

import math
from typing import Any, NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.config.validation import SCALING_KEYS
from anarchobot.model.quantization import check_format

# model_type, and the names of transformers' classes
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "gemma3": "Gemma3",
}
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "hidden_activation": _TANH_GELU[0], "rms_norm_eps": 1e-6}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "ministral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "phi3": {"original_max_position_embeddings": 4096},
    "gemma": {**_GEMMA, "num_key_value_heads": 16, "max_position_embeddings": 8192},
    "gemma2": {
        **_GEMMA, "num_key_value_heads": 4, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **_GEMMA, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
}  # fmt: skip
_REFUSED = {
    "num_experts": "mixtures of experts are not supported",
    "num_local_experts": "mixtures of experts are not supported",
    "n_routed_experts": "mixtures of experts are not supported",
    "use_bidirectional_attention": "only causal attention is supported",
    "mlp_bias": "biases of the MLP are not supported",
    "rope_traditional": "rotary embeddings of neighboring values are not supported",
}
_MOST_LAYERS = 10_000  # before a list of so many layer types is built
FULL, SLIDING = "full_attention", "sliding_attention"


# ---- Reading ----


def from_hf(values: dict[str, Any], file: str) -> dict[str, Any]:
    """Returns ModelConfig fields. Raises UserError for mixtures of experts, other activations and the like."""
    values = language_model(values, file)
    kind = values["model_type"]
    for key, reason in _REFUSED.items():
        if values.get(key):
            raise UserError(f"{file}: {key}: {values[key]}: {reason}")
    check_format(values, file)
    values = {**_DEFAULTS.get(kind, {}), **values}
    d_model, n_heads = _positive(values, "hidden_size", file), _positive(values, "num_attention_heads", file)
    head_dim = values.get("head_dim")
    post_norms = kind in ("gemma2", "gemma3_text")
    scale = _positive(values, "query_pre_attn_scalar", file) ** -0.5 if post_norms else None
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
        **_attention_fields(values, file),
        "attention_scale": None if scale == (head_dim or d_model // n_heads) ** -0.5 else scale,
        "attention_softcap": values.get("attn_logit_softcapping") if kind == "gemma2" else None,
        "norm_eps": _positive(values, "rms_norm_eps", file),
        "post_norms": post_norms,
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "qk_norm": kind in ("qwen3", "gemma3_text"),
        "logit_softcap": values.get("final_logit_softcapping") if post_norms else None,
        "embedding_scale": math.sqrt(d_model) if kind.startswith("gemma") else None,
    }


def language_model(values: dict[str, Any], file: str) -> dict[str, Any]:
    """The config of the language model alone: Gemma 3 from 4B has one for images beside it."""
    if values["model_type"] != "gemma3":
        return values
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{file}: text_config: expected a JSON object")
    shared = {
        key: values[key] for key in ("tie_word_embeddings", "quantization", "quantization_config") if key in values
    }
    return {**shared, **text, "model_type": "gemma3_text"}


class _Rope(NamedTuple):
    """Rotary embeddings of one type of layers."""

    theta: float
    scaling: dict[str, Any]  # fields of RopeScaling; empty: off
    fraction: float


def _attention_fields(values: dict[str, Any], file: str) -> dict[str, Any]:
    """Returns the ModelConfig fields of rotary embeddings and sliding windows."""
    window, types = _windows(values, file)
    full, local = _ropes(values, file)
    if FULL not in types:
        full = local
    elif SLIDING not in types:
        local = full
    if full != local and (local.scaling or local.fraction != full.fraction):
        raise UserError(
            f"{file}: rope_parameters: scaled rotary embeddings of layers with a sliding window that differ from the "
            "other layers' are not supported"
        )
    # A window of the whole context limits nothing.
    if SLIDING not in types or (full == local and window >= _positive(values, "max_position_embeddings", file)):
        window = None
    return {
        "rope_theta": full.theta,
        "rope_scaling": full.scaling,
        "rope_local_theta": None if full == local else local.theta,
        "rotary_fraction": full.fraction,
        "sliding_window": window,
        "layer_types": None if window is None or FULL not in types else types,
    }


def _windows(values: dict[str, Any], file: str) -> tuple[Any, list[str]]:
    """Returns the sliding window and each layer's type; [FULL] stands for layers without a window."""
    kind, window, types = values["model_type"], values.get("sliding_window"), values.get("layer_types")
    layers = _positive(values, "num_hidden_layers", file)
    if other := sorted({str(name) for name in types or ()} - {FULL, SLIDING}):
        raise UserError(f"{file}: layer_types: {other[0]}: only {FULL} and {SLIDING} are supported")
    if kind in ("qwen2", "qwen3") and not values.get("use_sliding_window"):
        window = None
    if window is None or (kind == "llama" and types is None) or kind == "gemma":
        return None, [FULL]
    if types is not None and kind != "phi3":
        return window, list(types)
    if layers > _MOST_LAYERS:
        raise UserError(f"{file}: num_hidden_layers: {layers}: at most {_MOST_LAYERS} are supported")
    if kind in ("qwen2", "qwen3"):
        return window, [SLIDING if i >= values["max_window_layers"] else FULL for i in range(layers)]
    if kind in ("gemma2", "gemma3_text"):
        pattern = 2 if kind == "gemma2" else values["sliding_window_pattern"]
        return window, [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
    return window, [SLIDING] * layers


def _ropes(values: dict[str, Any], file: str) -> tuple[_Rope, _Rope]:
    """Returns the rotary embeddings of layers without and with a sliding window."""
    kind = values["model_type"]
    ropes: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(more := values.get(key) or {}, dict):
            raise UserError(f"{file}: {key}: expected a JSON object")
        ropes |= more
    top = {"rope_theta": values.get("rope_theta"), "partial_rotary_factor": values.get("partial_rotary_factor")}
    local_top = top if kind != "gemma3_text" else {"rope_theta": values["rope_local_base_freq"]}
    nested = {name: rope for name, rope in ropes.items() if isinstance(rope, dict)}
    if nested and len(nested) < len(ropes):
        raise UserError(f"{file}: rope_parameters: expected numbers, or one object for each layer type")
    if nested:
        first = next(iter(nested.values()))
        full, local = (top | nested.get(FULL, first), local_top | nested.get(SLIDING, first))
    else:
        full, local = (top | ropes, local_top if kind == "gemma3_text" else top | ropes)
    return _rope(full, values, file), _rope(local, values, file)


def _rope(rope: dict[str, Any], values: dict[str, Any], file: str) -> _Rope:
    theta, fraction = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    if fraction not in (None, 1.0) and values["model_type"] != "phi3":
        raise UserError(f"{file}: partial_rotary_factor: must be 1")
    theta, fraction = (default if value is None else float(value) for value, default in ((theta, 1e4), (fraction, 1.0)))
    return _Rope(theta, _scaling(rope, values, file), fraction)


def _scaling(rope: dict[str, Any], values: dict[str, Any], file: str) -> dict[str, Any]:
    """Returns the fields of RopeScaling. `dynamic` scaling starts beyond max_position_embeddings, so it is none."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "su" or (values["model_type"] == "phi3" and kind == "yarn"):  # names of early Phi-3 files
        kind = "longrope"
    if kind in ("default", "dynamic"):
        return {}
    longest = _positive(values, "max_position_embeddings", file)
    original = values.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", longest))
    fields = {"type": kind, "factor": rope.get("factor"), "original_max_seq_len": original}
    if kind == "linear":
        del fields["original_max_seq_len"]
    elif kind == "llama3":
        fields |= {key: _positive(rope, key, file) for key in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        fields |= {key: rope[key] for key in ("beta_fast", "beta_slow") if rope.get(key)}
        fields |= {"truncate": rope.get("truncate", True), "attention_factor": _yarn_attention_factor(rope, file)}
    elif kind == "longrope":
        fields |= {key: rope.get(key) for key in ("short_factor", "long_factor", "attention_factor")}
        if fields["factor"] is None:
            fields["factor"] = longest / original
    else:
        raise UserError(f"{file}: {kind} RoPE scaling is not supported")
    _positive(fields, "factor", file)
    return fields


def _yarn_attention_factor(rope: dict[str, Any], file: str) -> float | None:
    """None: computed from factor (model/llama/rope.py)."""
    given, mscale, all_dim = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None or not mscale or not all_dim:
        return given
    log = math.log(max(_positive(rope, "factor", file), 1.0))
    return float((0.1 * mscale * log + 1.0) / (0.1 * all_dim * log + 1.0))


def _activation(values: dict[str, Any], file: str) -> str:
    key = "hidden_activation" if values.get("hidden_activation") else "hidden_act"
    activation = values.get(key, "silu")
    if activation in ("silu", "swish"):
        return "silu"
    if activation in _TANH_GELU or (activation == "gelu" and values["model_type"] == "gemma"):
        return "gelu"
    raise UserError(f"{file}: unsupported {key} {activation!r}: expected silu or {_TANH_GELU[0]}")


def _positive(values: dict[str, Any], key: str, file: str) -> Any:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{file}: {key}: expected a number above 0, got {value!r}")
    return value


# ---- Writing ----


def hf_type(model: ModelConfig) -> str:
    """Returns the model_type whose config.json can express most of the settings."""
    if model.post_norms:
        return "gemma3_text" if model.qk_norm else "gemma2"
    if model.qk_norm:
        return "qwen3"
    if model.attention_bias:
        return "qwen2"
    if model.rotary_fraction < 1 or model.rope_scaling.type == "longrope":
        return "phi3"
    if model.embedding_scale == math.sqrt(model.d_model) and model.tie_embeddings and model.ffn_activation == "gelu":
        return "gemma"
    return "llama" if model.sliding_window is None else "mistral"


def embedding_factor(model: ModelConfig) -> float:
    """The stored embedding is ours times this: only Gemma has an embedding scale, which is always sqrt(d_model)."""
    scale = model.embedding_scale or 1.0
    return scale / math.sqrt(model.d_model) if hf_type(model).startswith("gemma") else scale


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """See Architecture. Mistral with layer_types is read as Ministral by transformers and as Llama by mlx-lm."""
    kind = hf_type(model)
    activation = "silu" if model.ffn_activation == "silu" else _TANH_GELU[0]
    values = {
        "architectures": [f"{CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": activation,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": model.attention_bias,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }
    if kind.startswith("gemma"):
        values |= {"hidden_activation": activation}
    if model.post_norms:
        values |= {
            "query_pre_attn_scalar": round(model.softmax_scale**-2),
            "attn_logit_softcapping": model.attention_softcap,
            "final_logit_softcapping": model.logit_softcap,
        }
    if kind == "gemma3_text":
        values |= {
            "rope_local_base_freq": model.rope_local_theta or model.rope_theta,
            "sliding_window_pattern": window_pattern(model),
        }
    if kind == "phi3":
        # Otherwise it is 32000, which transformers' embedding must have.
        values |= {"partial_rotary_factor": model.rotary_fraction, "pad_token_id": None}
    return values | _hf_scaling(model, kind) | _hf_windows(model, kind)


def _hf_scaling(model: ModelConfig, kind: str) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling.type is None:
        return {"original_max_position_embeddings": model.max_seq_len} if kind == "phi3" else {}
    keys = SCALING_KEYS[scaling.type]
    fields = {key: getattr(scaling, key) for key in keys if getattr(scaling, key) is not None}
    original = {"original_max_position_embeddings": fields.pop("original_max_seq_len", None)}
    original = original if scaling.type != "linear" else {}
    # Phi-3's classes expect the original length beside rope_scaling, and "type", the key's name in older files.
    rope = {"rope_type": scaling.type, "type": scaling.type, **fields, **original}
    return {"rope_scaling": rope, **(original if kind == "phi3" else {})}


def _hf_windows(model: ModelConfig, kind: str) -> dict[str, Any]:
    if model.post_norms or (model.sliding_window is not None and (model.layer_types or kind.startswith("qwen"))):
        types = [FULL if window is None else SLIDING for window in model.windows]
        values = {"sliding_window": model.sliding_window, "layer_types": types}
        return values | {"use_sliding_window": True} if kind.startswith("qwen") else values
    return {"sliding_window": model.sliding_window} if kind in ("mistral", "phi3") else {}


def window_pattern(model: ModelConfig) -> int | None:
    """Gemma 3's pattern: every layer of this number has no window. None: the layers are in another order."""
    full = [i for i, window in enumerate(model.windows, 1) if window is None]
    if not full:
        return None
    return full[0] if full == list(range(full[0], model.n_layers + 1, full[0])) else None
