"""Exports a model and its tokenizer as one GGUF file, for llama.cpp and the programs built on it.

Tokenizers that llama.cpp implements: SentencePiece BPE, and byte-level BPE with a pre-tokenizer that it knows by name.

Keys and tensor names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig, RopeScaling
from anarchobot.exchange import gguf_types
from anarchobot.exchange.chat_format import ChatFormat
from anarchobot.exchange.dtypes import Float32, check_float16
from anarchobot.exchange.tokenizer_json import CONTROL
from anarchobot.model.architecture import architecture
from anarchobot.model.llama.rope import inverse_frequencies
from anarchobot.model.parameters import parameter_shapes
from anarchobot.tokenizers.sentencepiece_to_json import NORMAL, UNUSED, USER_DEFINED, NotConvertible, unknown_id
from anarchobot.tokenizers.special_tokens import AddedToken
from anarchobot.tokenizers.tokenizer import (
    SENTENCEPIECE,
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    read_sentencepiece_proto,
)

FILE_NAME = "model.gguf"
ROPE_FREQUENCIES = "rope_freqs.weight"
ADDED_SCORE = -1000.0  # of tokens that are not pieces of the SentencePiece model, as llama.cpp's own converter writes
Fields = dict[str, Any]  # by the name of a GGUFWriter.add_… method
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
_OUTSIDE_BLOCKS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# Pre-tokenizer patterns of Llama 3 and Qwen 2 in tokenizer.json, and llama.cpp's names for them.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe", rf"{_WORDS}\p{{N}}{_REST}": "qwen2"}


def gguf_package() -> Any:
    """Imports the optional gguf package. Raises UserError if it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("exports to GGUF files need the gguf package: pip install 'anarchobot[gguf]'") from None
    return gguf


def write(
    path: Path, name: str, params: dict[str, Float32], model: ModelConfig, tokenizer: Fields, file_type: str
) -> None:
    """Writes a file of one of the types of gguf_types.py.

    `tokenizer` is the result of `tokenizer_fields`. Raises UserError if a value overflows the type, and, for K-quants,
    if llama.cpp is missing or fails.
    """
    if file_type in gguf_types.K_QUANTS:
        source = path.with_suffix(".f32.gguf")
        write(source, name, params, model, tokenizer, "f32")
        gguf_types.quantize_file(source, path, file_type)
        source.unlink()
        return
    gguf = gguf_package()
    model_type = _model_type(model)
    writer = gguf.GGUFWriter(path, model_type)
    fields = {
        "name": name,
        "file_type": gguf.LlamaFileType[gguf_types.file_type(file_type)],
        "quantization_version": gguf.GGML_QUANT_VERSION,
        "vocab_size": model.vocab_size,
        "context_length": model.max_seq_len,
        "embedding_length": model.d_model,
        "block_count": model.n_layers,
        "feed_forward_length": model.mlp_size,
        "head_count": model.n_heads,
        "head_count_kv": model.kv_heads,
        "key_length": model.head_size,
        "value_length": model.head_size,
        "rope_dimension_count": model.head_size,
        "rope_freq_base": model.rope_theta,
        "layer_norm_rms_eps": model.norm_eps,
        **tokenizer,
    }
    if model.rope_scaling.type == "linear":
        fields["rope_scaling_type"] = gguf.RopeScalingType.LINEAR
        fields["rope_scaling_factor"] = model.rope_scaling.factor
    elif model.rope_scaling.type == "llama3":
        plain = model.model_copy(update={"rope_scaling": RopeScaling()})
        divisors = inverse_frequencies(plain, None, 1) / inverse_frequencies(model, None, 1)
        writer.add_tensor(ROPE_FREQUENCIES, divisors.astype(np.float32))
    for key, value in fields.items():
        getattr(writer, f"add_{key}")(value)
    for param_name, array in params.items():
        if _is_interleaved(param_name, model_type):
            array = interleave(array, model.head_size)
        kind = gguf_types.tensor_type(param_name, array.shape, params, file_type)
        if kind not in ("f32", "bf16"):
            check_float16(param_name, array)  # of weights, or of the scale of a block
        stored_type = gguf.GGMLQuantizationType[kind.upper()]
        stored = gguf.quants.quantize(np.ascontiguousarray(array), stored_type)
        writer.add_tensor(tensor_name(param_name), stored, raw_dtype=stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_parameters(path: Path, model: ModelConfig) -> dict[str, Float32]:
    """The parameters of a file that `write` wrote, dequantized."""
    gguf = gguf_package()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    params: dict[str, Float32] = {}
    for name in parameter_shapes(model):
        tensor = tensors[tensor_name(name)]
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        params[name] = deinterleave(array, model.head_size) if _is_interleaved(name, _model_type(model)) else array
    return params


def stored_types(path: Path) -> dict[str, tuple[str, int]]:
    """The type and the number of bytes of each matrix, norm and bias in a file, by tensor name."""
    tensors = gguf_package().GGUFReader(path).tensors
    return {
        tensor.name: (tensor.tensor_type.name.lower(), int(tensor.n_bytes))
        for tensor in tensors
        if tensor.name != ROPE_FREQUENCIES
    }


def _model_type(model: ModelConfig) -> str:
    model_type: str = architecture(model.architecture).to_hf(model)["model_type"]
    return "llama" if model_type == "mistral" else model_type  # to llama.cpp, a Mistral is a Llama


def _is_interleaved(name: str, model_type: str) -> bool:
    return model_type == "llama" and name.endswith((".q_proj.weight", ".k_proj.weight"))


def tensor_name(name: str) -> str:
    """`"model.layers.0.mlp.up_proj.weight"` -> `"blk.0.ffn_up.weight"`."""
    stem, _, part = name.rpartition(".")
    if stem in _OUTSIDE_BLOCKS:
        return f"{_OUTSIDE_BLOCKS[stem]}.{part}"
    number, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_IN_BLOCK[inner]}.{part}"


def interleave(projection: Float32, head_size: int) -> Float32:
    """Reorders the rows of a query or key projection [H E, D] to (0, E/2, 1, E/2 + 1, ...) within each head.

    llama.cpp's llama applies RoPE to adjacent pairs; AnarchoBot, like its qwen2 and qwen3, to the two halves of a head.
    """
    halves = projection.reshape(-1, 2, head_size // 2, projection.shape[1])  # [H, 2, E/2, D]
    return halves.swapaxes(1, 2).reshape(projection.shape)


def deinterleave(projection: Float32, head_size: int) -> Float32:
    """The inverse of `interleave`."""
    pairs = projection.reshape(-1, head_size // 2, 2, projection.shape[1])  # [H, E/2, 2, D]
    return pairs.swapaxes(1, 2).reshape(projection.shape)


def tokenizer_fields(tokenizer: Tokenizer, bos_id: int | None, chat: ChatFormat | None) -> Fields:
    """Returns the vocabulary and special tokens; `bos_id` is the token that starts a text, if any.

    llama.cpp prepends BOS to texts and to rendered conversations alike, unless a conversation already starts with it.
    So with a chat template, BOS is added only if the template starts with it. Templates that refer to bos_token and
    eos_token get these two tokens. Raises UserError for a tokenizer that llama.cpp does not implement.
    """
    assert isinstance(tokenizer, SentencePieceTokenizer | HFTokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        fields, space_prefix = _sentencepiece(tokenizer.files[0], tokenizer.added_tokens)
    elif (
        tokenizer.spec()["model"].get("byte_fallback")
        and (file := tokenizer.files[0].with_name(SENTENCEPIECE)).is_file()
    ):
        fields, space_prefix = _sentencepiece(file, tokenizer.added_tokens)
    else:
        fields, space_prefix = _byte_level(tokenizer), False
    eos_id, add_bos, end_of_turn = tokenizer.eod_id, bos_id is not None, None
    if chat is not None:
        if chat.mentions("eos_token") and "eos_token" in chat.special_tokens:
            eos_id = tokenizer.control_tokens[chat.special_tokens["eos_token"]]
        end_of_turn = next((token for token in reversed(chat.stop_ids) if token != eos_id), None)
        bos_id, add_bos = (bos_id, False) if chat.bos_id is None else (chat.bos_id, True)
    fields |= {
        "bos_token_id": tokenizer.eod_id if bos_id is None else bos_id,
        "eos_token_id": eos_id,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "add_space_prefix": space_prefix,
    }
    if end_of_turn is not None:
        fields["eot_token_id"] = end_of_turn
    if chat is not None:
        fields["chat_template"] = chat.template.source
    return fields


def _sentencepiece(path: Path, added: dict[int, AddedToken]) -> tuple[Fields, bool]:
    """Also returns whether the tokenizer adds a space before a text. `added` are its added tokens by id."""
    try:
        proto = read_sentencepiece_proto(path)
    except Exception as error:  # the library raises its own type
        raise _unsupported(path, "it is not a SentencePiece model") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback:
        raise _unsupported(path, "llama.cpp supports only SentencePiece BPE with byte fallback")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise _unsupported(path, "it has a normalizer, which llama.cpp's BPE does not support")
    try:
        unknown = unknown_id(proto)
    except NotConvertible as reason:
        raise _unsupported(path, str(reason)) from reason
    beyond = [token for i, token in added.items() if i >= len(proto.pieces)]
    fields = {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": [*(piece.piece for piece in proto.pieces), *(token["content"] for token in beyond)],
        "token_types": [
            *(piece.type for piece in proto.pieces),
            *(CONTROL if token.get("special") else USER_DEFINED for token in beyond),
        ],
        "token_scores": [*(piece.score for piece in proto.pieces), *(ADDED_SCORE for _ in beyond)],
        "unk_token_id": unknown,
    }
    return fields, normalizer.add_dummy_prefix


def _byte_level(tokenizer: HFTokenizer) -> Fields:
    path, spec = tokenizer.files[0], tokenizer.spec()
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _unsupported(path, "llama.cpp supports only byte-level BPE from a tokenizer.json")
    normalizer = spec["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unsupported(path, f"llama.cpp has no {normalizer['type']} normalizer")
    tokens = [f"[PAD{i}]" for i in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    named = [(i, token, NORMAL) for token, i in model["vocab"].items()]
    named += [
        (added["id"], added["content"], CONTROL if added["special"] else USER_DEFINED) for added in spec["added_tokens"]
    ]
    for i, token, kind in named:
        if i < tokenizer.vocab_size:  # the model has no rows for others
            tokens[i], types[i] = token, kind
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": _pre_tokenizer(path, spec["pre_tokenizer"]),
        "token_list": tokens,
        "token_types": types,
        **({"token_merges": [" ".join(pair) for pair in model["merges"]]} if model["merges"] else {}),
    }


def _pre_tokenizer(path: Path, spec: dict[str, Any] | None) -> str:
    """Returns llama.cpp's name of a pre-tokenizer.

    GPT-2's pattern is part of the ByteLevel step; the other patterns are a Split before it.
    """
    steps = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec or {"type": "none"}]
    *before, last = steps
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if not before and last["use_regex"]:
            return "gpt-2"
        if len(before) == 1 and not last["use_regex"] and before[0]["type"] == "Split":
            pattern = before[0]["pattern"].get("Regex")
            if pattern in _PRE_TOKENIZERS and before[0]["behavior"] == "Isolated":
                return _PRE_TOKENIZERS[pattern]
    raise _unsupported(path, "its pre-tokenizer is not GPT-2's, Llama 3's or Qwen 2's")


def _unsupported(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: this tokenizer can't be exported to GGUF: {reason}: export to hf or mlx")
