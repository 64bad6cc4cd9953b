"""Compares the memory estimate of system/memory.py with MLX's measured peak; prints the table of docs/planning.md.

Each configuration runs in a separate process: three training steps on random tokens, of which the first is not counted.
Without arguments, results are written to results/memory.json.

    .venv/bin/python benchmarks/memory.py [NAME...]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
STEPS = 3
Values = dict[str, dict[str, Any]]
# 4.2 million parameters, micro-batches of 2,048 tokens. CONFIGS lists changes to it.
BASE: Values = {
    "model": {"vocab_size": 4096, "n_layers": 4, "d_model": 256, "n_heads": 8, "dropout": 0.0},
    "data": {"seq_len": 256},
    "train": {
        "device": "cpu", "precision": "float32", "cpu_threads": 1, "micro_batch_size": 8, "grad_accum_steps": 2,
    },
}  # fmt: skip
WIDE = {"vocab_size": 16000, "n_layers": 4, "d_model": 512, "n_heads": 8}
CONFIGS: dict[str, Values] = {
    "base": {},
    "AdamW": {"train": {"optimizer": "adamw"}},
    "checkpointed": {"train": {"gradient_checkpointing": True}},
    "AdamW, checkpointed": {"train": {"optimizer": "adamw", "gradient_checkpointing": True}},
    "2 threads": {"train": {"cpu_threads": 2}},
    "2 threads, AdamW, checkpointed": {
        "train": {"cpu_threads": 2, "optimizer": "adamw", "gradient_checkpointing": True}
    },
    "bfloat16": {"train": {"precision": "bfloat16", "micro_batch_size": 4}},
    "bfloat16, AdamW, checkpointed": {
        "train": {"precision": "bfloat16", "optimizer": "adamw", "gradient_checkpointing": True, "micro_batch_size": 4}
    },
    "float16": {"train": {"precision": "float16", "micro_batch_size": 4}},
    "1 sequence of 2,048": {"data": {"seq_len": 2048}, "train": {"micro_batch_size": 1}},
    "1 sequence of 2,048, AdamW, checkpointed": {
        "data": {"seq_len": 2048},
        "train": {"micro_batch_size": 1, "optimizer": "adamw", "gradient_checkpointing": True},
    },
    "1 micro-batch a step": {"train": {"grad_accum_steps": 1}},
    "1 short sequence": {"train": {"micro_batch_size": 1}},
    "1 short sequence, AdamW": {"train": {"micro_batch_size": 1, "optimizer": "adamw"}},
    "dropout": {"model": {"dropout": 0.1}, "train": {"optimizer": "adamw"}},
    "running average": {"train": {"ema_decay": 0.99, "optimizer": "adamw"}},
    "untied head, grouped queries": {"model": {"tie_embeddings": False, "n_kv_heads": 2}},
    "qk_norm, biases, GELU": {"model": {"qk_norm": True, "attention_bias": True, "ffn_activation": "gelu"}},
    "25 M": {"model": WIDE, "data": {"seq_len": 512}, "train": {"micro_batch_size": 2}},
    "25 M, AdamW": {"model": WIDE, "data": {"seq_len": 512}, "train": {"micro_batch_size": 2, "optimizer": "adamw"}},
    "25 M, checkpointed, 2 threads": {
        "model": WIDE,
        "data": {"seq_len": 512},
        "train": {"micro_batch_size": 4, "cpu_threads": 2, "gradient_checkpointing": True},
    },
    "LoRA": {"lora": {"r": 8}},
    "LoRA, bfloat16": {"lora": {"r": 8}, "train": {"precision": "bfloat16", "micro_batch_size": 4}},
    "QLoRA, checkpointed": {"lora": {"r": 8, "quantize": 4}, "train": {"gradient_checkpointing": True}},
    "QLoRA, 2 blocks, wide": {
        "model": WIDE,
        "data": {"seq_len": 512},
        "train": {"micro_batch_size": 2},
        "lora": {"r": 8, "quantize": 4, "num_layers": 2},
    },
    "embeddings alone": {"train": {"trainable": "embeddings", "optimizer": "adamw"}},
}


def measure(values: Values) -> dict[str, Any]:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx
    import numpy as np

    from anarchobot.config.schema import Config
    from anarchobot.data.windows import Batch
    from anarchobot.system.memory import estimate
    from anarchobot.training.mlx_engine import MLXEngine

    config = Config.model_validate(values)
    train, length = config.train, config.data.seq_len
    shape = (train.grad_accum_steps, train.micro_batch_size, length + 1)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    batch = Batch(ids[..., :-1].copy(), ids[..., 1:].copy())
    engine = MLXEngine(config)
    engine.train_step(batch, 1, train.lr, train.momentum)
    mx.reset_peak_memory()
    for step in range(1, STEPS):
        engine.train_step(batch, 1 + step, train.lr, train.momentum)
    predicted = estimate(config)
    return {
        "estimate_mb": predicted.peak / 1e6,
        "measured_mb": mx.get_peak_memory() / 1e6,
        "ratio": predicted.peak / mx.get_peak_memory(),
        "phase": predicted.phase,
    }


def merged(values: Values) -> Values:
    return {key: {**BASE.get(key, {}), **values.get(key, {})} for key in {**BASE, **values}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these configurations, without writing results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(json.loads(arguments.worker))))
        return
    rows = {}
    print("| configuration | phase | estimate, MB | MLX peak, MB | ratio |\n| --- | --- | ---: | ---: | ---: |")
    for name in arguments.names or CONFIGS:
        command = [sys.executable, __file__, "--worker", json.dumps(merged(CONFIGS[name]))]
        completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = row = json.loads(completed.stdout.splitlines()[-1])
        print(
            f"| {name} | {row['phase']} | {row['estimate_mb']:,.1f} | {row['measured_mb']:,.1f} | {row['ratio']:.3f} |",
            flush=True,
        )
    if not arguments.names:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
