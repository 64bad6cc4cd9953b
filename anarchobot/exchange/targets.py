"""Export targets, and the model settings that each of them cannot represent."""

from collections.abc import Iterator
from typing import Literal

from anarchobot.config.schema import ModelConfig
from anarchobot.exchange.dtypes import Float32

Target = Literal["hf", "mlx", "gguf"]
TARGETS: tuple[Target, ...] = ("hf", "mlx", "gguf")
LIBRARIES: dict[Target, str] = {"hf": "transformers", "mlx": "mlx-lm", "gguf": "llama.cpp"}


def architecture_name(model: ModelConfig) -> str:
    """Returns the prefix of the Hugging Face class, such as "Llama" of LlamaForCausalLM."""
    return "Qwen3" if model.qk_norm else "Qwen2" if model.attention_bias else "Llama"


def unsupported_settings(model: ModelConfig, target: Target) -> Iterator[str]:
    """Yields "model.KEY: reason: remedy" for each setting that `target` cannot represent."""
    name, library = architecture_name(model), LIBRARIES[target]
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


def fold_embedding_scale(params: dict[str, Float32], model: ModelConfig) -> dict[str, Float32]:
    """Multiplies model.embedding_scale into the embedding, because Llama has no such setting."""
    if model.embedding_scale is None:
        return params
    name = "model.embed_tokens.weight"
    return {**params, name: params[name] * model.embedding_scale}
