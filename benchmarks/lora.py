"""Compares LoRA training steps with mlx-lm's trainer: time and peak memory. Part of `make bench`.

Both programs load the same random float32 model and train rank-8 adapters with AdamW on the same random tokens. All
rows have the same length, so mlx-lm needs no padding. Every measurement runs in a separate process on one core. Each
round covers all rows of the table, and ratios are taken within a round (see benchmarks/training.py).

    .venv/bin/python benchmarks/lora.py small --rounds 3       a Llama, with different adapters
    .venv/bin/python benchmarks/lora.py wide --rounds 2
    .venv/bin/python benchmarks/lora.py families --rounds 3    the shapes of other models, scaled down
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import timed, tokens

Shape = dict[str, Any]
HERE = Path(__file__).parent
SHAPES: dict[str, Shape] = {
    "small": {"layers": 6, "width": 256, "heads": 8, "mlp": 688, "vocab": 8192, "rows": 8, "length": 256, "steps": 4},
    "wide": {
        "layers": 4,
        "width": 1024,
        "heads": 16,
        "mlp": 2816,
        "vocab": 32000,
        "rows": 2,
        "length": 512,
        "steps": 2,
    },
}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ALL, TWO = [*ATTENTION, *MLP], ["q_proj", "v_proj"]
# Name and options. Of each pair, AnarchoBot is measured first.
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("all matrices", {"modules": ALL}),
    ("all matrices, checkpointed", {"modules": ALL, "checkpointed": True}),
    ("q_proj and v_proj", {"modules": TWO}),
    ("q_proj and v_proj, checkpointed", {"modules": TWO, "checkpointed": True}),
    ("all matrices of the last half of the blocks", {"modules": ALL, "half": True}),
    ("all matrices, DoRA", {"modules": ALL, "dora": True}),
    ("all matrices, 4-bit base", {"modules": ALL, "bits": 4}),
]
RANK, SCALE, WARMUP = 8, 2.0, 2
_NARROW = {
    "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "hidden_act": "silu", "rope_theta": 1000000.0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 3.2": {**_NARROW, "model_type": "llama", "max_position_embeddings": 131072, "rope_scaling": _LLAMA3},
    "Gemma 3": {
        **_NARROW, "model_type": "gemma3_text", "num_key_value_heads": 1, "num_attention_heads": 4, "head_dim": 128,
        "query_pre_attn_scalar": 128, "sliding_window": 128, "sliding_window_pattern": 6, "rope_local_base_freq": 1e4,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "Qwen3-MoE": {
        **_NARROW, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    },
    "Qwen3, 4 bits": {**_NARROW, "model_type": "qwen3", "quantization": {"group_size": 64, "bits": 4}},
}  # fmt: skip
FAMILY_BATCH = {"rows": 4, "length": 256, "layers": 6, "vocab": 32000, "steps": 3}


def ours(folder: Path, shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx

    from anarchobot.config.schema import Config
    from anarchobot.data.windows import Batch
    from anarchobot.exchange.pretrained import load_pretrained
    from anarchobot.training.mlx_engine import MLXEngine

    base = load_pretrained(str(folder))
    lora = {
        "r": RANK, "alpha": SCALE * RANK, "target_modules": options["modules"], "dora": options.get("dora", False),
        "num_layers": shape["layers"] // 2 if options.get("half") else None, "quantize": options.get("bits"),
    }  # fmt: skip
    train = {
        "optimizer": "adamw", "micro_batch_size": shape["rows"], "cpu_threads": 1, "weight_decay": 0.01,
        "gradient_checkpointing": options.get("checkpointed", False), "device": "cpu",
    }  # fmt: skip
    values = {"model": base.model.model_dump(), "data": {"seq_len": shape["length"]}, "train": train, "lora": lora}
    engine = MLXEngine(Config.model_validate(values), base.weights)
    ids = tokens(shape)
    batch = Batch(np.ascontiguousarray(ids[..., :-1]), np.ascontiguousarray(ids[..., 1:]))
    count = 0

    def step() -> float:
        nonlocal count
        count += 1
        if count == WARMUP + 1:
            mx.reset_peak_memory()
        return engine.train_step(batch, count, 1e-3, 0.95).loss

    result = timed(step, shape["steps"], WARMUP)
    trained = sum(p.size for p in engine.params.values())
    return result | {"peak_mb": mx.get_peak_memory() / 1e6, "trained": trained}


def mlx_lm(folder: Path, shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
    """Runs mlx-lm's `train` with its LoRA layers. The time of a step is the time between two reports."""
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx
    import mlx.optimizers
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model, quantize_model

    model, config = load_model(folder)
    if options.get("bits"):
        model, _ = quantize_model(model, config, 64, options["bits"])
    model.freeze()
    mlp = "mlp.switch_mlp" if options.get("experts") else "mlp"
    keys = [f"{'self_attn' if name in ATTENTION else mlp}.{name}" for name in options["modules"]]
    blocks = shape["layers"] // 2 if options.get("half") else shape["layers"]
    settings = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, blocks, settings, use_dora=options.get("dora", False))
    mx.eval(model.parameters())
    marks: list[tuple[float, float]] = []
    losses: list[float] = []

    class StepTimer(TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            marks.append((time.process_time(), time.perf_counter()))
            losses.append(info["train_loss"])
            if len(marks) == WARMUP:
                mx.reset_peak_memory()

    rows = [[int(i) for i in row] for row in tokens(shape).reshape(-1, shape["length"] + 1)]
    with tempfile.TemporaryDirectory() as out:
        train(
            model,
            mlx.optimizers.AdamW(1e-3, weight_decay=0.01, bias_correction=True),
            [(row, 0) for row in rows],
            args=TrainingArgs(
                batch_size=shape["rows"], iters=WARMUP + shape["steps"], val_batches=0, steps_per_report=1,
                steps_per_save=10**9, max_seq_length=shape["length"] + 1, adapter_file=str(Path(out) / "a.safetensors"),
                grad_checkpoint=options.get("checkpointed", False),
            ),
            training_callback=StepTimer(),
        )  # fmt: skip
    steps = np.diff(np.array(marks[WARMUP - 1 :]), axis=0) * 1e3
    return {
        "cpu_ms": float(np.median(steps[:, 0])), "wall_ms": float(np.median(steps[:, 1])), "losses": losses[:3],
        "peak_mb": mx.get_peak_memory() / 1e6,
        "trained": sum(p.size for _, p in tree_flatten(model.trainable_parameters())),
    }  # fmt: skip


PROGRAMS = {"ours": ours, "mlx-lm": mlx_lm}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Writes a random model in mlx-lm's format, with a tokenizer of as many words as it has rows."""
    import mlx.core as mx
    import mlx.nn as nn
    import tokenizers
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    mx.random.seed(0)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    if quantization := config.get("quantization"):
        nn.quantize(model, **quantization)
    folder.mkdir()
    weights = dict(tree_flatten(model.parameters()))
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, config["vocab_size"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<|endoftext|>")).save(str(folder / "tokenizer.json"))


def llama(shape: Shape) -> dict[str, Any]:
    """The config.json of a Llama of this shape."""
    return {
        "model_type": "llama", "vocab_size": shape["vocab"], "hidden_size": shape["width"],
        "num_hidden_layers": shape["layers"], "num_attention_heads": shape["heads"], "intermediate_size": shape["mlp"],
        "num_key_value_heads": shape["heads"], "max_position_embeddings": shape["length"], "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": True,
    }  # fmt: skip


def measure(program: str, folder: str, shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", program, folder, json.dumps(shape), json.dumps(options)]
    if hasattr(os, "sched_setaffinity"):
        command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
    completed = subprocess.run(command, capture_output=True, text=True)
    if completed.returncode:
        return {"failed": completed.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        program, model_folder, *values = sys.argv[2:6]
        print(json.dumps(PROGRAMS[program](Path(model_folder), *map(json.loads, values))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*SHAPES, "families"])
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", help="names of table rows")
    arguments = parser.parse_args()
    if arguments.shape == "families":
        shape, configs = FAMILY_BATCH, FAMILIES
        rows = [(name, {"modules": ALL, "experts": "num_experts" in config}) for name, config in FAMILIES.items()]
    else:
        shape, rows = SHAPES[arguments.shape], ROWS
        configs = dict.fromkeys((name for name, _ in ROWS), llama(shape))
    rows = [row for row in rows if not arguments.only or row[0] in arguments.only]
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {name: {p: [] for p in PROGRAMS} for name, _ in rows}
    with tempfile.TemporaryDirectory() as parent:
        folders = {json.dumps(configs[name]): Path(parent) / str(i) for i, (name, _) in enumerate(rows)}
        for config, folder in folders.items():
            write_model(folder, json.loads(config))
        for _ in range(arguments.rounds):
            for name, options in rows:
                for program in PROGRAMS:
                    folder = folders[json.dumps(configs[name])]
                    measured[name][program].append(measure(program, str(folder), shape, options))
                    print(f"{name}, {program}: {measured[name][program][-1]}", file=sys.stderr, flush=True)
    path = HERE / "results" / "lora.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[arguments.shape] = {
        "shape": shape,
        "rows": {**results.get(arguments.shape, {}).get("rows", {}), **measured},
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(
        "\n| | AnarchoBot, CPU ms | mlx-lm, CPU ms | speedup | AnarchoBot, peak MB | mlx-lm, peak MB | memory ratio |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, by_program in measured.items():
        pairs = [
            (a, b) for a, b in zip(by_program["ours"], by_program["mlx-lm"], strict=True) if not {"failed"} & {*a, *b}
        ]
        if not pairs:
            print(f"| {name} | failed |")
            continue

        def median(key: str, i: int, pairs: list[tuple[dict[str, Any], dict[str, Any]]] = pairs) -> float:
            return statistics.median(pair[i][key] for pair in pairs)

        speedup = statistics.median(b["cpu_ms"] / a["cpu_ms"] for a, b in pairs)
        print(
            f"| {name} | {median('cpu_ms', 0):,.0f} | {median('cpu_ms', 1):,.0f} | {speedup:.2f} | "
            f"{median('peak_mb', 0):,.0f} | {median('peak_mb', 1):,.0f} | "
            f"{median('peak_mb', 0) / median('peak_mb', 1):.2f} |"
        )


if __name__ == "__main__":
    main()
