"""What the field's formats can't carry of a model of ours, and how the rest is brought into their form."""

from collections.abc import Iterator
from typing import Literal

from anarchobot.config.schema import ModelConfig
from anarchobot.exchange.dtypes import Float32

Target = Literal["hf", "mlx", "gguf"]
TARGETS: tuple[Target, ...] = ("hf", "mlx", "gguf")
READERS: dict[Target, str] = {"hf": "transformers", "mlx": "mlx-lm", "gguf": "llama.cpp"}


def architecture(model: ModelConfig) -> str:
    """The name that others know it by."""
    return "Qwen3" if model.qk_norm else "Qwen2" if model.attention_bias else "Llama"


def limits(model: ModelConfig, target: Target) -> Iterator[str]:
    """The settings that `target` can't carry, each as "model.KEY: why, and what can be done"."""
    kind, reader = architecture(model), READERS[target]
    if model.logit_softcap is not None:
        yield (
            f"model.logit_softcap: {model.logit_softcap:g}: {kind} has no cap on its logits: "
            "a model that is to be exported must be trained without it"
        )
    if model.value_residual:
        yield (
            f"model.value_residual: {kind}'s blocks don't see the first one's values: a model that is to be "
            "exported must be trained without it"
        )
    if model.embedding_scale is not None and model.tie_embeddings:
        yield (
            f"model.embedding_scale: {model.embedding_scale:g}: with model.tie_embeddings it can't go into the "
            "embedding, which is the output head as well: a model that is to be exported must be trained untied or "
            "without it"
        )
    if model.ffn_activation != "silu" and target != "hf":
        yield f"model.ffn_activation: gelu: {reader}'s {kind} knows only silu: export it to hf"
    if model.d_model % model.n_heads and kind == "Llama" and target != "gguf":
        yield (
            f"model.n_heads: {model.n_heads}: transformers takes no Llama whose d_model ({model.d_model}) it does not "
            "divide: export it to gguf"
        )
    if model.attention_bias and model.qk_norm:
        yield (
            "model.attention_bias: Qwen2 has biases and Qwen3 has model.qk_norm, none has both: a model that is to be "
            "exported must be trained with one of them"
        )
    elif model.attention_bias and model.n_heads * model.head_size != model.d_model and target != "hf":
        yield (
            f"model.head_dim: {model.head_size}: {reader}'s Qwen2 (model.attention_bias) has heads of d_model / n_heads"
            ": export it to hf"
        )


def carried(params: dict[str, Float32], model: ModelConfig) -> dict[str, Float32]:
    """The parameters as Llama has them: embedding_scale is multiplied into the embedding."""
    if model.embedding_scale is None:
        return params
    name = "model.embed_tokens.weight"
    return {**params, name: params[name] * model.embedding_scale}
