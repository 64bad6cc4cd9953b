"""Small encoders of the BERT family, as sentence-transformers saves them, with weights from NumPy's generator."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from anarchobot.exchange import safetensors_file
from anarchobot.exchange.dtypes import Dtype

WORDS = ("beaver", "dam", "river", "apple", "red", "builds", "the", "a", "query", ":", "##s")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCAB = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
CONFIG: dict[str, Any] = {
    "model_type": "bert", "hidden_act": "gelu", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4,
    "intermediate_size": 24, "vocab_size": len(VOCAB), "max_position_embeddings": 12, "type_vocab_size": 2,
    "layer_norm_eps": 1e-5, "pad_token_id": 0,
}  # fmt: skip


def write_encoder(
    folder: Path, prefix: str = "", dtype: Dtype = "float32", seed: int = 0, files: Any = None, **config: Any
) -> Path:
    """`files`: further JSON files by name, or other contents of config.json."""
    config = CONFIG | config
    folder.mkdir(parents=True, exist_ok=True)
    hidden, mlp, draw = config["hidden_size"], config["intermediate_size"], np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (0.3 * draw.standard_normal(shape)).astype(np.float32)

    rows = {"word": "vocab_size", "position": "max_position_embeddings", "token_type": "type_vocab_size"}
    tensors = {f"embeddings.{name}_embeddings.weight": normal(config[key], hidden) for name, key in rows.items()}
    tensors |= {"embeddings.LayerNorm.weight": 1 + normal(hidden), "embeddings.LayerNorm.bias": normal(hidden)}
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        sizes = {f"{at}.attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        sizes |= {f"{at}.attention.output.dense": (hidden, hidden), f"{at}.intermediate.dense": (mlp, hidden)}
        for name, (out, columns) in (sizes | {f"{at}.output.dense": (hidden, mlp)}).items():
            tensors |= {f"{name}.weight": normal(out, columns), f"{name}.bias": normal(out)}
        for name in (f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"):
            tensors |= {f"{name}.weight": 1 + normal(hidden), f"{name}.bias": normal(hidden)}
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    safetensors_file.write(folder / "model.safetensors", tensors, dtype, {"format": "pt"})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(VOCAB, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    ends = [(token, VOCAB[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_padding(length=8)  # as the files of all-MiniLM-L6-v2 do
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in ({"config.json": config} | (files or {})).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return folder


def pooling(mode: str) -> dict[str, Any]:
    """The files that state how token embeddings become one."""
    modes = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens")}
    return {"1_Pooling/config.json": {"word_embedding_dimension": 16, **modes}}
