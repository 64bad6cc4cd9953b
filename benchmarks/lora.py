"""Adapters beside mlx-lm's trainer: time and memory of a step on the same work. `make bench`.

One folder with a random Llama in float32, which both programs load; the same random ids, in whole rows of one length,
so that mlx-lm has nothing to pad; LoRA of rank 8 by AdamW. Every measurement is a process of its own on one core;
rounds go through all rows in turn; ratios are taken within a round (benchmarks/training.py says why).

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
# Name, what to do; ours is measured first of each pair.
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


def ours(folder: Path, shape: Shape, what: dict[str, Any]) -> dict[str, Any]:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx

    from anarchobot.config.schema import Config
    from anarchobot.data.batches import Batch
    from anarchobot.exchange.hf_config import from_hf
    from anarchobot.exchange.safetensors_file import read
    from anarchobot.training.mlx_engine import MLXEngine

    model = from_hf(json.loads((folder / "config.json").read_text()), "config.json")
    lora = {
        "r": RANK, "alpha": SCALE * RANK, "target_modules": what["modules"], "dora": what.get("dora", False),
        "num_layers": shape["layers"] // 2 if what.get("half") else None, "quantize": what.get("bits"),
    }  # fmt: skip
    train = {
        "optimizer": "adamw", "micro_batch_size": shape["rows"], "cpu_threads": 1, "weight_decay": 0.01,
        "gradient_checkpointing": what.get("checkpointed", False), "device": "cpu",
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


def mlx_lm(folder: Path, shape: Shape, what: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's own `train` on its own LoRA layers; a step's time is that between two of its reports."""
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
    if what.get("bits"):
        model, _ = quantize_model(model, config, 64, what["bits"])
    model.freeze()
    keys = [f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for name in what["modules"]]
    blocks = shape["layers"] // 2 if what.get("half") else shape["layers"]
    settings = {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, blocks, settings, use_dora=what.get("dora", False))
    mx.eval(model.parameters())
    marks: list[tuple[float, float]] = []
    losses: list[float] = []

    class Marks(TrainingCallback):
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
                grad_checkpoint=what.get("checkpointed", False),
            ),
            training_callback=Marks(),
        )  # fmt: skip
    steps = np.diff(np.array(marks[WARMUP - 1 :]), axis=0) * 1e3
    return {
        "cpu_ms": float(np.median(steps[:, 0])), "wall_ms": float(np.median(steps[:, 1])), "losses": losses[:3],
        "peak_mb": mx.get_peak_memory() / 1e6,
        "trained": sum(p.size for _, p in tree_flatten(model.trainable_parameters())),
    }  # fmt: skip


PROGRAMS = {"ours": ours, "mlx-lm": mlx_lm}


def write_model(folder: Path, shape: Shape) -> None:
    """A random Llama, as transformers and mlx-lm have them."""
    from anarchobot.config.schema import ModelConfig
    from anarchobot.exchange import safetensors_file
    from anarchobot.exchange.hf_config import to_hf
    from anarchobot.model.parameters import init_parameters

    model = ModelConfig(
        vocab_size=shape["vocab"], n_layers=shape["layers"], d_model=shape["width"], n_heads=shape["heads"],
        mlp_multiple=shape["mlp"] / shape["width"], dropout=0.0, max_seq_len=shape["length"],
    )  # fmt: skip
    safetensors_file.write(folder / "model.safetensors", init_parameters(model, 0), "float32", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf(model, 0, 0, "float32")))


def measured(program: str, folder: str, shape: Shape, what: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", program, folder, json.dumps(shape), json.dumps(what)]
    if hasattr(os, "sched_setaffinity"):
        command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        program, folder, shape, what = sys.argv[2:6]
        print(json.dumps(PROGRAMS[program](Path(folder), json.loads(shape), json.loads(what))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of rows")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    rows = [row for row in ROWS if not arguments.only or row[0] in arguments.only]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {p: [] for p in PROGRAMS} for name, _ in rows}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        for _ in range(arguments.rounds):
            for name, what in rows:
                for program in PROGRAMS:
                    found[name][program].append(measured(program, folder, shape, what))
                    print(f"{name}, {program}: {found[name][program][-1]}", file=sys.stderr, flush=True)
    path = HERE / "results" / "lora.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[arguments.shape] = {"shape": shape, "rows": {**results.get(arguments.shape, {}).get("rows", {}), **found}}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print("\n| | CPU ms, ours | mlx-lm | tokens/s, ours to mlx-lm | peak MB, ours | mlx-lm | memory, ours to mlx-lm |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, by_program in found.items():
        pairs = [
            (a, b) for a, b in zip(by_program["ours"], by_program["mlx-lm"], strict=True) if not {"failed"} & {*a, *b}
        ]
        if not pairs:
            print(f"| {name} | failed |")
            continue

        def median(key: str, i: int, pairs: list[tuple[dict[str, Any], dict[str, Any]]] = pairs) -> float:
            return statistics.median(pair[i][key] for pair in pairs)

        faster = statistics.median(b["cpu_ms"] / a["cpu_ms"] for a, b in pairs)
        print(
            f"| {name} | {median('cpu_ms', 0):,.0f} | {median('cpu_ms', 1):,.0f} | {faster:.2f} | "
            f"{median('peak_mb', 0):,.0f} | {median('peak_mb', 1):,.0f} | "
            f"{median('peak_mb', 0) / median('peak_mb', 1):.2f} |"
        )


if __name__ == "__main__":
    main()
