"""Compares LoRA training steps with mlx-lm's trainer: time and peak memory. Part of `make bench`.

Both programs load the same random float32 Llama and train rank-8 adapters with AdamW on the same random tokens. All
rows have the same length, so mlx-lm needs no padding. Every measurement runs in a separate process on one core. Each
round covers all rows of the table, and ratios are taken within a round (see benchmarks/training.py).

    .venv/bin/python benchmarks/lora.py small --rounds 3
    .venv/bin/python benchmarks/lora.py wide --rounds 2
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


def ours(folder: Path, shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx

    from anarchobot.config.schema import Config
    from anarchobot.data.windows import Batch
    from anarchobot.exchange.importing import model_config_from_hf
    from anarchobot.exchange.safetensors_file import read
    from anarchobot.training.mlx_engine import MLXEngine

    model = model_config_from_hf(json.loads((folder / "config.json").read_text()), "config.json")
    lora = {
        "r": RANK, "alpha": SCALE * RANK, "target_modules": options["modules"], "dora": options.get("dora", False),
        "num_layers": shape["layers"] // 2 if options.get("half") else None, "quantize": options.get("bits"),
    }  # fmt: skip
    train = {
        "optimizer": "adamw", "micro_batch_size": shape["rows"], "cpu_threads": 1, "weight_decay": 0.01,
        "gradient_checkpointing": options.get("checkpointed", False), "device": "cpu",
    }  # fmt: skip
    values = {"model": model.model_dump(), "data": {"seq_len": shape["length"]}, "train": train, "lora": lora}
    stored = read(folder / "model.safetensors")
    engine = MLXEngine(Config.model_validate(values), {name: tensor.load() for name, tensor in stored.items()})
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
    keys = [f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for name in options["modules"]]
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


def write_model(folder: Path, shape: Shape) -> None:
    """Writes a random Llama in the Hugging Face format."""
    from anarchobot.config.schema import ModelConfig
    from anarchobot.exchange import safetensors_file
    from anarchobot.exchange.exporting import hf_config
    from anarchobot.model.parameters import init_parameters

    model = ModelConfig(
        vocab_size=shape["vocab"], n_layers=shape["layers"], d_model=shape["width"], n_heads=shape["heads"],
        mlp_multiple=shape["mlp"] / shape["width"], dropout=0.0, max_seq_len=shape["length"],
    )  # fmt: skip
    safetensors_file.write(folder / "model.safetensors", init_parameters(model, 0), "float32", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(model, 0, 0, "float32")))


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
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", help="names of table rows")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    rows = [row for row in ROWS if not arguments.only or row[0] in arguments.only]
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {name: {p: [] for p in PROGRAMS} for name, _ in rows}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        for _ in range(arguments.rounds):
            for name, options in rows:
                for program in PROGRAMS:
                    measured[name][program].append(measure(program, folder, shape, options))
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
