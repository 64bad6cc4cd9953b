"""One GGUF file of a model and its tokenizer, for llama.cpp and what is built on it.

Keys and tensor names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.exchange.gguf_vocabulary import SpecialTokens, Vocabulary
from anarchobot.exchange.targets import architecture
from anarchobot.exchange.dtypes import Dtype, Float32, narrowed

FILE_NAME = "model.gguf"
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_package() -> Any:
    """The package that writes the format. Raises UserError when it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("export --to gguf needs the gguf package: pip install gguf") from None
    return gguf


def write(
    path: Path,
    name: str,
    params: dict[str, Float32],
    model: ModelConfig,
    vocabulary: Vocabulary,
    tokens: SpecialTokens,
    dtype: Dtype,
) -> None:
    """Matrices as `dtype`, norms and biases as float32, which llama.cpp wants. Raises UserError when a value is out of
    range."""
    gguf = gguf_package()
    kind = architecture(model).lower()
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name(name)
    file_types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[file_types[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.mlp_size)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    _add_vocabulary(writer, vocabulary, tokens)
    for our_name, array in params.items():
        if kind == "llama" and our_name.endswith((".q_proj.weight", ".k_proj.weight")):
            array = interleaved(array, model.head_size)
        stored = narrowed(our_name, array, dtype) if array.ndim == 2 else array
        if stored.dtype == np.uint16:  # bfloat16, which the package takes as bytes
            bits = np.ascontiguousarray(stored).view(np.uint8)
            writer.add_tensor(tensor_name(our_name), bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor_name(our_name), np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_name(name: str) -> str:
    """`"model.layers.0.mlp.up_proj.weight"` -> `"blk.0.ffn_up.weight"`."""
    stem, _, part = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{part}"
    number, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_IN_BLOCK[inner]}.{part}"


def interleaved(projection: Float32, head_size: int) -> Float32:
    """The rows of a query or key projection [H E, D] in the order that llama.cpp's llama rotates: neighbours in pairs,
    (0, E/2, 1, E/2 + 1, ...) of each head, where ours pairs the halves. Its qwen2 and qwen3 pair the halves too."""
    halves = projection.reshape(-1, 2, head_size // 2, projection.shape[1])  # [H, 2, E/2, D]
    return halves.swapaxes(1, 2).reshape(projection.shape)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, tokens: SpecialTokens) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.unknown_id is not None:
        writer.add_unk_token_id(vocabulary.unknown_id)
    writer.add_bos_token_id(tokens.bos)
    writer.add_eos_token_id(tokens.eos)
    writer.add_add_bos_token(tokens.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if tokens.eot is not None:
        writer.add_eot_token_id(tokens.eot)
    if tokens.template is not None:
        writer.add_chat_template(tokens.template)
