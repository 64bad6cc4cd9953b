"""Texts to embeddings: vectors of length 1 whose dot products are similarities, from an encoder of the BERT family.

Reads the folders of sentence-transformers (https://sbert.net): config.json, model.safetensors and tokenizer.json, and,
where they exist, the settings of pooling, text length and prompts. The encoder is that of BERT
(https://arxiv.org/abs/1810.04805) or XLM-RoBERTa (https://arxiv.org/abs/1911.02116): after each attention and MLP, a
residual and a layer norm.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.exchange import safetensors_file
from anarchobot.exchange.hub import model_name, resolve_model
from anarchobot.exchange.importing import read_json
from anarchobot.storage.durable import sha256_file

BATCH = 32  # texts; similar lengths together
MAX_TOKENS = 512  # per text, if the model does not set fewer
_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"
_POOLING = "1_Pooling/config.json"
_SUPPORTED_MODULES = ("Transformer", "Pooling", "Normalize")


class _Shape(NamedTuple):
    """config.json. `first_position`: of the first token."""

    layers: int
    hidden: int
    heads: int
    mlp: int
    vocab: int
    positions: int
    types: int
    eps: float
    first_position: int


class TextEncoder:
    """`name` is a folder, or a model on the Hugging Face Hub, which is downloaded. `digest` identifies everything that
    the embeddings depend on.

    Raises UserError if there is no such model, it is damaged, or it is not an encoder that is supported here.
    """

    def __init__(self, name: str) -> None:
        folder = resolve_model(name)
        self.name = model_name(folder)
        self._shape = _read_shape(folder)
        self._params = _load(folder, self._shape)
        self.dimensions = self._shape.hidden
        self._mean = _read_pooling(folder)
        prompts = _optional_json(folder / "config_sentence_transformers.json").get("prompts") or {}
        self._question_prompt = str(prompts.get("query", ""))
        self._passage_prompt = str(prompts.get("document", prompts.get("passage", "")))
        self.max_tokens = _max_tokens(folder, self._shape)
        self._tokenizer = _load_tokenizer(folder / _TOKENIZER, self.max_tokens)
        settings = [self._mean, self._question_prompt, self._passage_prompt, self.max_tokens]
        files = [sha256_file(folder / file) for file in ("config.json", _WEIGHTS, _TOKENIZER)]
        self.digest = hashlib.sha256(repr([*files, *settings]).encode()).hexdigest()

    def encode_passages(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """float32 [texts, dimensions]. A text is cut after `max_tokens`."""
        return self.encode_texts([self._passage_prompt + text for text in texts])[0]

    def encode_question(self, text: str) -> npt.NDArray[np.float32]:
        """float32 [dimensions]."""
        embedding: npt.NDArray[np.float32] = self.encode_texts([self._question_prompt + text])[0][0]
        return embedding

    def encode_texts(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], list[int]]:
        """float32 [texts, dimensions] without the model's prompts, and the number of tokens of each text before it is
        cut."""
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = [encoding.ids for encoding in encodings]
        counts = [
            len(encoding.ids) + sum(rest.special_tokens_mask.count(0) for rest in encoding.overflowing)
            for encoding in encodings
        ]
        if any(i >= self._shape.vocab for row in ids for i in row):
            raise UserError(f"{self.name}: its tokenizer has tokens that the model lacks: mismatched files")
        embeddings = np.zeros((len(texts), self.dimensions), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        for start in range(0, len(texts), BATCH):
            batch = order[start : start + BATCH]
            lengths = np.array([len(ids[i]) for i in batch])
            padded = np.zeros((len(batch), max(1, lengths.max())), np.int32)
            for row, i in enumerate(batch):
                padded[row, : len(ids[i])] = ids[i]
            embeddings[batch] = np.array(self._embed(mx.array(padded), mx.array(lengths)))
        return embeddings, counts

    def _embed(self, ids: mx.array, lengths: mx.array) -> mx.array:
        """float32 [batch, hidden] for token ids [batch, tokens], of which each row has `lengths` [batch]."""
        valid = mx.arange(ids.shape[1])[None] < lengths[:, None]
        states = _encode_states(self._params, self._shape, ids, valid)
        if self._mean:
            weights = valid[..., None].astype(states.dtype)
            pooled = (states * weights).sum(axis=1) / mx.maximum(weights.sum(axis=1), 1)
        else:
            pooled = states[:, 0]
        return pooled / mx.maximum(mx.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def _encode_states(params: dict[str, mx.array], shape: _Shape, ids: mx.array, valid: mx.array) -> mx.array:
    """The last hidden states, [batch, tokens, hidden]. `valid`, bool [batch, tokens]: not padding."""
    batch, tokens = ids.shape
    positions = params["embeddings.position_embeddings.weight"][shape.first_position :][:tokens]
    x = params["embeddings.word_embeddings.weight"][ids] + positions
    if shape.types:
        x = x + params["embeddings.token_type_embeddings.weight"][0]

    def linear(name: str, x: mx.array) -> mx.array:
        return mx.addmm(params[f"{name}.bias"], x, params[f"{name}.weight"].T)

    def norm(name: str, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, params[f"{name}.weight"], params[f"{name}.bias"], shape.eps)

    def heads(name: str, x: mx.array) -> mx.array:
        return linear(name, x).reshape(batch, tokens, shape.heads, -1).transpose(0, 2, 1, 3)

    x = norm("embeddings.LayerNorm", x)
    mask = valid[:, None, None]  # for all heads and queries
    scale = (shape.hidden // shape.heads) ** -0.5
    for layer in range(shape.layers):
        at = f"encoder.layer.{layer}"
        q, k, v = (heads(f"{at}.attention.self.{part}", x) for part in ("query", "key", "value"))
        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        attended = attended.transpose(0, 2, 1, 3).reshape(batch, tokens, shape.hidden)
        x = norm(f"{at}.attention.output.LayerNorm", x + linear(f"{at}.attention.output.dense", attended))
        inner = linear(f"{at}.intermediate.dense", x)
        gelu = inner * (1 + mx.erf(inner / math.sqrt(2))) / 2
        x = norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", gelu))
    return x


def _read_shape(folder: Path) -> _Shape:
    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    expected = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
    unsupported = [f"{key} {values[key]}" for key, value in expected.items() if values.get(key, value) != value]
    if kind not in ("bert", "xlm-roberta", "roberta"):
        unsupported = [f"model_type {kind}"]
    if unsupported:
        raise UserError(
            f"{folder}: {', '.join(unsupported)} is not supported: expected an encoder with model_type bert, "
            "xlm-roberta or roberta, such as sentence-transformers/all-MiniLM-L6-v2"
        )
    numbers = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    try:
        layers, hidden, heads, mlp, vocab = (int(values[key]) for key in numbers)
        positions, types = int(values["max_position_embeddings"]), int(values.get("type_vocab_size", 2))
        eps, padding = float(values.get("layer_norm_eps", 1e-12)), int(values.get("pad_token_id", 1))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / 'config.json'}: {error} is missing or not a number") from error
    first = 0 if kind == "bert" else padding + 1  # RoBERTa counts positions after the padding token's id
    if min(layers, hidden, heads, mlp, vocab) < 1 or hidden % heads or not 0 <= first < positions:
        raise UserError(f"{folder / 'config.json'}: sizes that do not fit together")
    return _Shape(layers, hidden, heads, mlp, vocab, positions, types, eps, first)


def _load(folder: Path, shape: _Shape) -> dict[str, mx.array]:
    """All parameters in float32. Their shapes are compared with config.json before they are loaded."""
    path = folder / _WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: no {_WEIGHTS}: expected the folder of a sentence-transformers model")
    stored = safetensors_file.read(path, any_dtype=True)
    tensors = {name.removeprefix("bert.").removeprefix("roberta."): stored[name] for name in stored}  # if it has a head
    for name, expected in _parameter_shapes(shape):
        if name not in tensors:
            raise UserError(f"{path}: no tensor {name}: expected an encoder of the BERT family")
        if tensors[name].shape != expected:
            found = list(tensors[name].shape)
            raise UserError(f"{path}: {name}: shape {found}, expected {list(expected)} (config.json)")
        if tensors[name].code not in ("F32", "F16", "BF16"):
            raise UserError(f"{path}: {name}: dtype {tensors[name].code}, expected F32, F16 or BF16")
    return {name: mx.array(tensors[name].load()) for name, _ in _parameter_shapes(shape)}


def _parameter_shapes(shape: _Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Lazily, because a damaged config.json may state any number of layers."""
    hidden, mlp = shape.hidden, shape.mlp
    for name, rows in (("word", shape.vocab), ("position", shape.positions), ("token_type", shape.types)):
        if rows:
            yield f"embeddings.{name}_embeddings.weight", (rows, hidden)
    yield from _norm_shapes("embeddings.LayerNorm", hidden)
    for layer in range(shape.layers):
        at = f"encoder.layer.{layer}"
        sizes = {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        sizes |= {"attention.output.dense": (hidden, hidden), "intermediate.dense": (mlp, hidden)}
        sizes |= {"output.dense": (hidden, mlp)}
        for name, size in sizes.items():
            yield f"{at}.{name}.weight", size
            yield f"{at}.{name}.bias", size[:1]
        yield from _norm_shapes(f"{at}.attention.output.LayerNorm", hidden)
        yield from _norm_shapes(f"{at}.output.LayerNorm", hidden)


def _norm_shapes(name: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (hidden,)
    yield f"{name}.bias", (hidden,)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_pooling(folder: Path) -> bool:
    """Whether the embedding is the mean over all tokens, the default; otherwise it is that of the first token."""
    modules = folder / "modules.json"
    kinds = _module_kinds(modules) if modules.is_file() else []
    if other := [kind for kind in kinds if kind not in _SUPPORTED_MODULES]:
        raise UserError(f"{modules}: the module {other[0]} is not supported: choose another embedding model")
    values = _optional_json(folder / _POOLING)
    modes = [mode for mode in values if mode.startswith("pooling_mode_") and values[mode] is True]
    if modes in ([], ["pooling_mode_mean_tokens"]) and values.get("pooling_mode", "mean") == "mean":
        return True
    if modes == ["pooling_mode_cls_token"] or (not modes and values.get("pooling_mode") == "cls"):
        return False
    raise UserError(f"{folder / _POOLING}: expected the pooling mode mean or cls")


def _module_kinds(path: Path) -> list[str]:
    """The class names of the modules, such as Pooling."""
    try:
        return [str(module["type"]).rpartition(".")[2] for module in json.loads(path.read_bytes())]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected a list of modules with their types") from error


def _max_tokens(folder: Path, shape: _Shape) -> int:
    most = min(MAX_TOKENS, shape.positions - shape.first_position)
    stated = _optional_json(folder / "sentence_bert_config.json").get("max_seq_length")
    return min(most, stated) if isinstance(stated, int) and stated > 2 else most


def _load_tokenizer(path: Path, max_tokens: int) -> Any:
    import tokenizers

    if not path.is_file():
        raise UserError(f"{path}: no such file: an embedding model needs its tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
    except BaseException as error:  # the library raises plain Exception, and Rust's panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path}: not a supported tokenizer: {' '.join(str(error).split())[:200]}") from error
    return tokenizer
