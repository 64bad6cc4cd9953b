"""What the exported form of a Llama-family model cannot express, or another library computes differently."""

import math
from collections.abc import Iterator

from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import EXPORT_LIBRARIES, ExportTarget
from anarchobot.model.llama.hf_config import CLASSES, embedding_factor, hf_type, window_pattern


def unsupported_for_export(model: ModelConfig, target: ExportTarget) -> Iterator[str]:
    kind, library = hf_type(model), EXPORT_LIBRARIES[target]
    name = CLASSES[kind]
    if target == "gguf" and kind in ("phi3", "gemma", "gemma2", "gemma3_text"):
        key = {"gemma": "embedding_scale", "phi3": "rotary_fraction"}.get(kind, "post_norms")
        yield f"model.{key}: exports to gguf do not support {name}: export to hf"
    if model.logit_softcap is not None and (not model.post_norms or (kind == "gemma3_text" and target == "mlx")):
        yield (
            f"model.logit_softcap: {model.logit_softcap:g}: {name} has no logit softcap: train the model without it"
            if not model.post_norms
            else f"model.logit_softcap: {model.logit_softcap:g}: {name} in {library} has none: export to hf"
        )
    yield from _unsupported_embedding(model, kind, target)
    yield from _unsupported_attention(model, kind, target)
    yield from _unsupported_rope(model, kind, target)
    if kind.startswith("gemma"):
        if model.ffn_activation != "gelu" and target == "mlx":
            yield f"model.ffn_activation: silu: {name} in {library} supports only gelu: export to hf"
    elif model.ffn_activation != "silu" and target != "hf":
        yield f"model.ffn_activation: gelu: {name} in {library} supports only silu: export to hf"
    if model.d_model % model.n_heads and kind not in ("qwen2", "qwen3", "gemma") and target != "gguf":
        yield (
            f"model.n_heads: {model.n_heads}: transformers requires a {name}'s d_model ({model.d_model}) to be a "
            "multiple of n_heads: export to gguf"
        )


def _unsupported_embedding(model: ModelConfig, kind: str, target: ExportTarget) -> Iterator[str]:
    name = CLASSES[kind]
    if model.tie_embeddings and embedding_factor(model) != 1:
        theirs = "always multiplies by sqrt(d_model)" if kind.startswith("gemma") else "has no such scale"
        scale = "null" if model.embedding_scale is None else f"{model.embedding_scale:g}"
        yield (
            f"model.embedding_scale: {scale}: {name} {theirs}, and with model.tie_embeddings it can't be folded into "
            "the embedding: train the model without one of them"
        )
    if kind == "gemma2" and target == "mlx" and not model.tie_embeddings:
        yield f"model.tie_embeddings: false: {name} in mlx-lm requires tied embeddings: export to hf"


def _unsupported_attention(model: ModelConfig, kind: str, target: ExportTarget) -> Iterator[str]:
    name, library = CLASSES[kind], EXPORT_LIBRARIES[target]
    if model.attention_bias and model.qk_norm:
        yield (
            "model.attention_bias: no supported architecture has both biases (Qwen2) and model.qk_norm (Qwen3): train "
            "the model without one of them"
        )
    elif model.attention_bias and model.post_norms:
        yield f"model.attention_bias: {name} (model.post_norms) has no biases: train the model without one of them"
    elif model.attention_bias and model.n_heads * model.head_size != model.d_model and target != "hf":
        yield (
            f"model.head_dim: {model.head_size}: Qwen2 (model.attention_bias) in {library} requires d_model / n_heads: "
            "export to hf"
        )
    if kind == "phi3" and model.n_heads * model.head_size != model.d_model:
        yield f"model.head_dim: {model.head_size}: {name} requires d_model / n_heads"
    if model.attention_scale is not None:
        if not model.post_norms:
            yield f"model.attention_scale: {model.attention_scale:g}: {name} has no such setting"
        elif not math.isclose(model.attention_scale, round(model.attention_scale**-2) ** -0.5, rel_tol=1e-6):
            yield (f"model.attention_scale: {model.attention_scale:g}: {name} supports 1 / sqrt(n) for integers n only")
    softcaps = {"attention_softcap": model.attention_softcap, "logit_softcap": model.logit_softcap}
    if model.attention_softcap is not None and kind != "gemma2":
        yield f"model.attention_softcap: {model.attention_softcap:g}: {name} has no softcap of attention scores"
    if kind == "gemma2" and target == "mlx":
        for key in (key for key, cap in softcaps.items() if cap is None):
            yield f"model.{key}: null: {name} in mlx-lm requires one: export to hf"
    if model.layer_types is not None and kind == "phi3":
        yield f"model.layer_types: {name} has one sliding window for all layers"
    if kind == "gemma3_text" and target == "mlx" and window_pattern(model) is None:
        yield f"model.layer_types: {name} in mlx-lm requires full_attention in every nth layer: export to hf"


def _unsupported_rope(model: ModelConfig, kind: str, target: ExportTarget) -> Iterator[str]:
    name, library, scaling = CLASSES[kind], EXPORT_LIBRARIES[target], model.rope_scaling
    windows = any(window is not None for window in model.windows)
    if model.rope_local_theta is not None and kind != "gemma3_text":
        yield f"model.rope_local_theta: {model.rope_local_theta:g}: {name} has one rope_theta for all layers"
    if scaling.type is not None and kind == "gemma3_text" and windows and model.rope_local_theta is None:
        yield f"model.rope_scaling: {name} does not scale layers with a sliding window: set model.rope_local_theta"
    if model.rotary_fraction < 1 and kind != "phi3":
        yield f"model.rotary_fraction: {model.rotary_fraction:g}: {name} rotates whole heads"
    if kind == "phi3" and scaling.type not in (None, "longrope"):
        yield f"model.rope_scaling.type: {scaling.type}: Phi3 (model.rotary_fraction) supports only longrope"
    if kind == "gemma2" and scaling.type is not None and target == "mlx":
        yield f"model.rope_scaling.type: {scaling.type}: {name} in mlx-lm has no scaled RoPE: export to hf"
    in_gguf = ("linear", "llama3") if kind in ("llama", "mistral") else ("linear",)
    if target == "gguf" and scaling.type not in (None, *in_gguf) and kind != "phi3":
        yield f"model.rope_scaling.type: {scaling.type}: exports of {name} to gguf support {' and '.join(in_gguf)}"
    if scaling.attention_factor is not None and target == "mlx":
        yield f"model.rope_scaling.attention_factor: {library} computes it from factor: export to hf"
    if not scaling.truncate and target == "mlx":
        yield f"model.rope_scaling.truncate: false: {library} always rounds: export to hf"


def exported_length(model: ModelConfig, target: ExportTarget) -> int:
    """The longest text, in tokens, that the library of `target` computes as this model does: if it ignores a sliding
    window that all blocks have, the window."""
    if model.sliding_window is None or None in model.windows or not _ignores_window(model, target):
        return model.max_seq_len
    return min(model.sliding_window, model.max_seq_len)


def _ignores_window(model: ModelConfig, target: ExportTarget) -> bool:
    kind = hf_type(model)
    layered = kind == "mistral" and model.layer_types is not None and target == "mlx"  # read as Llama with layer types
    return target != "hf" and model.sliding_window is not None and kind != "gemma3_text" and not layered


def export_warnings(model: ModelConfig, target: ExportTarget) -> Iterator[str]:
    """Differences that don't matter for every use of the exported model."""
    kind, library, scaling = hf_type(model), EXPORT_LIBRARIES[target], model.rope_scaling
    if _ignores_window(model, target):
        limited = "" if None in model.windows else ", the exported context; for more, train with a larger data.seq_len"
        yield (
            f"{library} ignores model.sliding_window: its results are this model's for texts of at most "
            f"{model.sliding_window:,} tokens{limited}"
        )
    if target == "mlx" and kind == "gemma":
        yield "mlx-lm computes this model's GELU without the tanh approximation: its results differ slightly"
    if target == "mlx" and scaling.type == "longrope":
        yield (
            f"{library} uses model.rope_scaling.long_factor at any length: up to "
            f"{scaling.original_max_seq_len:,} tokens, its results differ from this model's"
        )
