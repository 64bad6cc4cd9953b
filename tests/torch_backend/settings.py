"""Configurations, batches and loss curves for the PyTorch backend tests, small enough for both engines to be fast."""

import math
from typing import Any

import numpy as np

from anarchobot.config.schema import Config
from anarchobot.data.windows import Batch
from anarchobot.training.engine import Engine

VOCAB = 61
SHAPES: dict[str, dict[str, Any]] = {  # every model option at least once
    "plain": {},
    "gelu, untied": {"ffn_activation": "gelu", "tie_embeddings": False},
    "grouped heads, qk_norm": {"n_kv_heads": 2, "qk_norm": True, "head_dim": 6},
    "biases": {"attention_bias": True, "n_kv_heads": 2},
    "scaled and capped": {"embedding_scale": 5.0, "logit_softcap": 3.0, "rope_theta": 500.0, "norm_eps": 1e-2},
    "one key head, three layers": {"n_kv_heads": 1, "mlp_multiple": 2.5, "n_layers": 3},
    "windows, a full layer with scaled RoPE, norms of outputs": {
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_local_theta": 50.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "attention_scale": 0.7,
        "post_norms": True,
    },
    "longrope of half a head": {
        "rotary_fraction": 0.5,
        "rope_scaling": {
            "type": "longrope",
            "factor": 40.0,
            "original_max_seq_len": 8,
            "short_factor": [1.0, 1.5],
            "long_factor": [2.0, 9.0],
        },
    },
}


def config(model: dict[str, Any] | None = None, **train: Any) -> Config:
    shape = {"vocab_size": VOCAB, "n_layers": 2, "d_model": 32, "n_heads": 4, "dropout": 0.0, **(model or {})}
    train = {"device": "cpu", "lr": 0.01, "min_lr": 0.0, "micro_batch_size": 2, "cpu_threads": 1, **train}
    return Config.model_validate({"model": shape, "data": {"seq_len": 16}, "train": train})


def batch(micro_batches: int, rows: int, length: int = 16, seed: int = 0, documents: bool = False) -> Batch:
    """Sequences that count in steps of one to three, which can be learned. With `documents`, two masked documents per
    row and some ignored targets."""
    rng = np.random.default_rng(seed)
    start, pace = (rng.integers(low, high, (micro_batches, rows, 1)) for low, high in ((0, VOCAB), (1, 4)))
    ids = ((start + pace * np.arange(length + 1)) % VOCAB).astype(np.int32)
    inputs, targets = ids[..., :-1].copy(), ids[..., 1:].copy()
    if not documents:
        return Batch(inputs, targets)
    targets[:, 0, :3] = -1
    segments = (np.arange(length) >= 2 + rng.integers(0, length - 2, (micro_batches, rows, 1))).astype(np.int32)
    return Batch(inputs, targets, segments)


def train(engine: Engine, steps: range, lr: float = 0.01, **shape: Any) -> list[float]:
    """Returns the losses of `steps`: two micro-batches of two rows each, generated from the step number."""
    made = {"micro_batches": 2, "rows": 2, **shape}
    return [engine.train_step(batch(seed=s, **made), s, lr, 0.9, math.inf).loss for s in steps]
