"""A corpus, its shards and a configuration that trains in a second."""

from pathlib import Path
from typing import Any

import yaml

from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.sources import builtin
from anarchobot.data.sources.documents import Document
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer

VOCAB = 384
LEFT_OUT = object()  # as an override: omits the key from the file


def make_shards(folder: Path, megabytes: float = 0.06, vocab_size: int = VOCAB) -> Path:
    """Shards of the first topics of the Python reference, about 30,000 tokens, with a validation split."""
    texts, size = [], 0
    for text in builtin.topics():
        if size < megabytes * 1e6:
            texts.append(text)
            size += len(text)
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer(train_tokenizer(texts, folder / "made", vocab_size)[0])
    Pretokenizer(tokenizer, folder, val_fraction=0.2).run(map(Document, texts))
    return folder


def write_config(path: Path, shards: Path, run: Path, **overrides: Any) -> Path:
    """`overrides` are KEY=VALUE pairs with `__` for the dot: `train__lr=1e-3`."""
    config: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": VOCAB, "n_layers": 1, "d_model": 32, "n_heads": 2, "dropout": 0.1, "max_seq_len": 64
        },
        "data": {"shard_dir": str(shards), "seq_len": 32},
        "train": {
            "total_steps": 6, "micro_batch_size": 2, "grad_accum_steps": 2, "lr": 0.01, "min_lr": 0.001,
            "warmup_steps": 2, "log_interval": 1, "eval_interval": 3, "eval_batches": 2, "ckpt_interval": 3,
            "device": "cpu", "save_dir": str(run),
        },
    }  # fmt: skip
    for name, value in overrides.items():
        section, key = name.split("__")
        config.setdefault(section, {})[key] = value
        if value is LEFT_OUT:
            del config[section][key]
    path.write_text(yaml.safe_dump(config))
    return path


def loaded(path: Path, shards: Path, run: Path, **overrides: Any) -> LoadedConfig:
    return load_config(write_config(path, shards, run, **overrides))
