"""Models that mlx-lm computes: any of its families, by automatic differentiation. Used for what the Llama family does
not implement, such as mixtures of experts, state-space models and other blocks.

model.hf_config is the text of config.json; the other settings of the model section repeat what it says. Parameters have
the names and shapes of mlx-lm's module, which functions here build when they need it (they import MLX then).

Shapes: D width of the hidden states, V vocabulary.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import (
    ActivationSizes,
    AdaptableMatrix,
    ExportTarget,
    Float32,
    QueryBlocks,
    Shape,
    TensorSource,
)

HF_MODEL_TYPES = ()  # see `supports`
DEFAULT_MAX_SEQ_LEN = 32768  # of models without a limit in config.json: state-space models have none
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
_KEYS = {  # names of a setting in the config.json of different families
    "n_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "n_kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "max_seq_len": (
        "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length",
        "model_max_length", "block_size",
    ),
    "mlp_size": ("intermediate_size", "n_inner", "ffn_hidden_size", "moe_intermediate_size"),
}  # fmt: skip


class _Facts(NamedTuple):
    """What only the module of a config.json tells. `blocks` numbers the block of each layer in `adaptable`."""

    shapes: dict[str, Shape]
    adaptable: dict[str, AdaptableMatrix]
    in_blocks: frozenset[str]
    n_layers: int
    d_model: int
    vocab_size: int


@lru_cache(maxsize=4)
def _facts(hf_config: str) -> _Facts:
    from anarchobot.model.mlx_lm.module import network

    net = network(ModelConfig(architecture="mlx_lm", hf_config=hf_config), {})
    experts = {shape[0] for shape in net.adaptable.values() if len(shape) == 3}
    adaptable = {
        path: AdaptableMatrix(block, shape)
        for path, shape in net.adaptable.items()
        if (block := net.block_of(path)) is not None and (len(shape) == 3 or shape[0] not in {1, *experts})  # routers
    }
    in_blocks = frozenset(name for name in net.shapes if net.block_of(name) is not None)
    return _Facts(net.shapes, adaptable, in_blocks, len(net.block_paths), net.d_model, net.vocab_size)


def _facts_of(model: ModelConfig) -> _Facts:
    if model.hf_config is None:
        raise UserError("model.architecture: mlx_lm needs model.hf_config, which `import` sets: import a model folder")
    return _facts(model.hf_config)


# ---- Parameters ----


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Those of mlx-lm's module, without quantization."""
    return _facts_of(model).shapes


def token_parameters(model: ModelConfig) -> list[str]:
    """Those whose shape changes with the vocabulary."""
    other = parameter_shapes(with_vocab_size(model, _facts_of(model).vocab_size + 1))
    return [name for name, shape in parameter_shapes(model).items() if shape != other[name]]


def with_vocab_size(model: ModelConfig, vocab_size: int) -> ModelConfig:
    values = json.loads(model.hf_config or "{}")
    kind = values.get("model_type")
    if any("embed_tokens_per_layer" in name for name in parameter_shapes(model)):
        raise UserError(f"{kind}: each block has embeddings of tokens too: its vocabulary can't be changed")
    if "vocab_size" in values:
        values["vocab_size"] = vocab_size
    _text_values(values)["vocab_size"] = vocab_size
    resized = model.model_copy(update={"hf_config": json.dumps(values), "vocab_size": vocab_size})
    old, new = _facts_of(model), _facts_of(resized)
    changed = [name for name, shape in old.shapes.items() if shape != new.shapes[name]]
    if any(new.shapes[name] != (vocab_size, *old.shapes[name][1:]) for name in changed) or new.vocab_size != vocab_size:
        raise UserError(f"{kind}: its vocabulary can't be changed: vocab_size in config.json does not set it")
    return resized


def adaptable_matrices(model: ModelConfig) -> dict[str, AdaptableMatrix]:
    """All linear layers of the blocks except routers. Stacked experts are [experts, out, in]."""
    return _facts_of(model).adaptable


def init(name: str, model: ModelConfig) -> tuple[float, float]:
    raise UserError("model.architecture: mlx_lm has no initial values: set train.init_from to a model")


# ---- Hugging Face's config.json ----


def supports(values: dict[str, Any]) -> bool:
    """Whether mlx-lm has a module for this config.json. Code that comes with a model is never run."""
    from mlx_lm.utils import _get_classes  # a slow import

    if values.get("model_file") is not None or not isinstance(values.get("model_type"), str):
        return False
    try:
        _get_classes(values)
    except (ValueError, AttributeError, TypeError, SystemExit):  # olmo.py exits if a package is missing
        return False
    return True


def from_hf(values: dict[str, Any], file: str, tensors: int | None = None) -> dict[str, Any]:
    """Raises UserError if mlx-lm can't build the module, or if it has more blocks than the files have `tensors`, which
    would take memory without limit."""
    layers = _first(values, _LAYER_KEYS)
    if layers is not None and tensors is not None and layers > tensors:
        raise UserError(f"{file}: {layers:,} blocks, but the safetensors files have {tensors:,} tensors")
    try:
        values = with_older_keys(values)
        text = json.dumps(values)
        facts = _facts(text)
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix('config.json: ')}") from error
    fields = {key: _first(values, names) for key, names in _KEYS.items()}
    n_heads, n_kv_heads = fields["n_heads"] or 1, fields["n_kv_heads"] or 0
    head_dim = _first(values, ("head_dim",)) or max(1, facts.d_model // n_heads)
    window = ignored_window(values)
    max_seq_len = fields["max_seq_len"] or DEFAULT_MAX_SEQ_LEN
    return {
        "vocab_size": facts.vocab_size,
        "n_layers": facts.n_layers,
        "d_model": facts.d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads if 0 < n_kv_heads < n_heads and n_heads % n_kv_heads == 0 else None,
        "head_dim": None if head_dim * n_heads == facts.d_model and head_dim % 2 == 0 else -(-head_dim // 2) * 2,
        "mlp_multiple": (fields["mlp_size"] or 4 * facts.d_model) / facts.d_model,
        "dropout": 0.0,
        "max_seq_len": max_seq_len if window is None else min(window, max_seq_len),
        "tie_embeddings": bool(_text_values(values).get("tie_word_embeddings", values.get("tie_word_embeddings"))),
        "hf_config": text,
    }


def with_older_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Adds to the contents of a config.json the keys of older versions of transformers, which mlx-lm's modules read:
    otherwise they would use defaults without a message."""
    values = dict(values)
    if isinstance(inner := values.get("text_config"), dict):
        values["text_config"] = with_older_keys(inner)
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        older = {"rope_theta": rope["rope_theta"], "rotary_emb_base": rope["rope_theta"]}
        if (fraction := rope.get("partial_rotary_factor")) is not None:
            older |= {"partial_rotary_factor": fraction, "rotary_pct": fraction}
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = {key: value for key, value in rope.items() if key not in older}
        values = {**older, **{key: value for key, value in values.items() if value is not None}}
    if values.get("model_type") == "gpt2" and "n_positions" in values:
        values = {"n_ctx": values["n_positions"], **values}
    return values


def ignored_window(values: dict[str, Any]) -> int | None:
    """The sliding window of a config.json whose module in mlx-lm has none: it computes full attention, which is the
    same up to that length."""
    from mlx_lm.utils import _get_classes

    text = _text_values(values)
    window = text.get("sliding_window")
    if not isinstance(window, int) or window < 1 or text.get("use_sliding_window") is False:
        return None
    _, args_class = _get_classes(text if text is not values and "model_type" in text and supports(text) else values)
    return None if "sliding_window" in getattr(args_class, "__dataclass_fields__", {}) else window


def describe_support(values: dict[str, Any], model: ModelConfig, reason: str) -> list[str]:
    """Warnings for the user: who computes the model, and what is not computed. `reason`: why not the own path."""
    warnings = [f"mlx-lm computes this model (model.architecture: mlx_lm): {reason.partition(': expected')[0]}"]
    window = ignored_window(values)
    if window is not None and window == model.max_seq_len:
        warnings.append(f"mlx-lm ignores sliding_window: {window}: sequences are limited to {window} tokens")
    others = [key for key in ("vision_config", "audio_config") if values.get(key)]
    if others:
        warnings.append(f"text only: {' and '.join(key.removesuffix('_config') for key in others)} is not computed")
    return warnings


def _text_values(values: dict[str, Any]) -> dict[str, Any]:
    inner = values.get("text_config")
    return inner if isinstance(inner, dict) else values


def _first(values: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of these settings that is a positive integer."""
    for name in names:
        for value in (_text_values(values).get(name), values.get(name)):
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def infer_from_weights(names: Collection[str]) -> dict[str, Any]:
    return {}


def tensor_sources(model: ModelConfig, model_type: str) -> dict[str, TensorSource]:
    """mlx-lm converts the tensors (model/mlx_lm/folder.py)."""
    return {name: TensorSource(name) for name in parameter_shapes(model)}


def requantized(weights: Mapping[str, Float32], model: ModelConfig, bits: int, dtype: str) -> Mapping[str, Float32]:
    """What lora.quantize made of these weights in training with products in `dtype`, dequantized."""
    import mlx.core as mx

    from anarchobot.model.mlx_lm import frozen

    return frozen.Dequantized(frozen.frozen_weights(weights, model, getattr(mx, dtype), bits), model)


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """The config.json that the model came from, for weights that are not quantized."""
    values: dict[str, Any] = json.loads(model.hf_config or "{}")
    for key in ("anarchobot", "quantization", "quantization_config"):
        values.pop(key, None)
    return values


def unsupported_for_export(model: ModelConfig, target: ExportTarget) -> Iterator[str]:
    values = json.loads(model.hf_config or "{}")
    kind = values.get("model_type")
    if target == "gguf":
        yield f"model.architecture: mlx_lm: {kind} is not supported: export to mlx"
    if target == "hf" and not values.get("anarchobot", {}).get("hf"):
        yield (
            f"model.architecture: mlx_lm: mlx-lm's {kind} has other tensors than the files it came from: export to mlx"
        )


def export_warnings(model: ModelConfig, target: ExportTarget) -> Iterator[str]:
    return iter(())


def exported_length(model: ModelConfig, target: ExportTarget) -> int:
    return model.max_seq_len


def export_parameters(params: dict[str, Float32], model: ModelConfig) -> dict[str, Float32]:
    return params


# ---- Counts ----
# Approximations: two FLOPs per weight and token, of experts only those that a token uses; attention scores and
# state-space recurrences are left out.


def step_flops(model: ModelConfig, rows: int, blocks: QueryBlocks) -> dict[str, int]:
    tokens = rows * blocks[-1][1]
    forward, head = 2 * tokens * _active_weights(model), 2 * tokens * model.d_model * model.vocab_size
    return {
        "embedding": 0,
        "blocks forward": forward,
        "head and loss": 3 * head,
        "blocks forward again": forward,
        "blocks backward": 2 * forward,
    }


def recomputed_flops(model: ModelConfig, rows: int, blocks: QueryBlocks, checkpointing: bool) -> int:
    return step_flops(model, rows, blocks)["blocks forward again"] if checkpointing else 0


def activation_sizes(model: ModelConfig, tokens: int, itemsize: int) -> ActivationSizes:
    """Saved are the inputs and outputs of linear layers, and about six hidden states."""
    facts, used = _facts_of(model), _experts_per_token(model)
    first = [m.shape for m in facts.adaptable.values() if m.block == facts.n_layers - 1]
    width = sum((used if len(shape) == 3 else 1) * (shape[-1] + shape[-2]) for shape in first)
    x, q = itemsize * tokens * model.d_model, itemsize * tokens * model.n_heads * model.head_size
    kv, mlp = itemsize * tokens * model.kv_heads * model.head_size, itemsize * tokens * model.mlp_size
    return ActivationSizes(x, q, kv, mlp, saved=itemsize * tokens * width + 6 * x)


def _active_weights(model: ModelConfig) -> int:
    """The weights of the blocks that a token is multiplied by."""
    facts, used = _facts_of(model), _experts_per_token(model)
    total = 0
    for name in facts.in_blocks:
        shape = facts.shapes[name]
        matrix = facts.adaptable.get(name.removesuffix(".weight"))
        is_experts = matrix is not None and len(matrix.shape) == 3
        total += math.prod(shape[1:]) * min(used, shape[0]) if is_experts else math.prod(shape)
    return total


def _experts_per_token(model: ModelConfig) -> int:
    values = json.loads(model.hf_config or "{}")
    return _first(values, ("num_experts_per_tok", "moe_top_k", "top_k", "num_experts_per_token", "moe_topk")) or 1
