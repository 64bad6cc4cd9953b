"""Compares the memory estimate of system/memory.py with MLX's measured peak; prints the tables of docs/planning.md.

Each configuration runs in a separate process: three training steps on random tokens, of which the first is not counted.
With several threads, more steps for 20 seconds: the peak of a run is that of a step in which all threads reach their
maxima together. If the peak is then more than 10% below the estimate, steps go on until it is not, for at most 200
seconds. Without arguments, results are written to results/memory.json.

With --random N, N random small configurations are drawn from --seed instead, and nothing is written.

With --metal, the estimate for a Mac's GPU is compared with the peak in metal_model.py, a model of MLX's Metal backend,
for shipped configurations. Nothing runs on a GPU.

    .venv/bin/python benchmarks/memory.py [NAME...]
    .venv/bin/python benchmarks/memory.py --random 100 --seed 1
    .venv/bin/python benchmarks/memory.py --metal
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anarchobot.config.schema import Config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
STEPS, SECONDS, MAX_SECONDS = 3, 20, 200
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
CHECKPOINTING = "train.gradient_checkpointing=true"
METAL_CONFIGS: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "tiny": (),
    "small": (),
    "small, float32": ("train.precision=float32",),
    "m3pro": (),
    "m3pro, checkpointed": (CHECKPOINTING,),
    "m3pro, 1 micro-batch a step": ("train.grad_accum_steps=1",),
    "m3pro, sequences of 8,192": ("data.seq_len=8192", "model.max_seq_len=8192"),
    "m3pro, vocabulary of 128,000": ("model.vocab_size=128000",),
    "m3pro, LoRA": ("lora.r=8",),
    "memory_constrained": (),
    "medium": (),
    "medium, checkpointed": (CHECKPOINTING,),
    "large": (),
    "large, checkpointed": (CHECKPOINTING,),
}


def random_config(draw: random.Random) -> Values:
    """A step of 128 to 2,048 tokens in each micro-batch."""
    heads = draw.choice([2, 4, 8])
    model = {
        "vocab_size": draw.choice([512, 2048, 4096, 8192]), "n_layers": draw.randint(1, 6),
        "d_model": draw.choice([64, 128, 192, 256, 384]), "n_heads": heads,
        "n_kv_heads": draw.choice([heads, heads // 2]), "mlp_multiple": draw.choice([2.5, 3.0, 4.0]),
        "dropout": draw.choice([0.0, 0.1]), "tie_embeddings": draw.random() < 0.6, "qk_norm": draw.random() < 0.3,
        "attention_bias": draw.random() < 0.2, "ffn_activation": draw.choice(["silu", "gelu"]),
    }  # fmt: skip
    train = {
        "device": "cpu", "precision": draw.choice(["float32"] * 4 + ["bfloat16"]), "cpu_threads": draw.choice([1, 2]),
        "micro_batch_size": draw.choice([1, 2, 4, 8]), "grad_accum_steps": draw.choice([1, 2]),
        "optimizer": draw.choice(["muon_adamw", "adamw"]), "gradient_checkpointing": draw.random() < 0.4,
    }  # fmt: skip
    values: Values = {"model": model, "data": {"seq_len": draw.choice([64, 128, 256, 512])}, "train": train}
    if draw.random() < 0.2:
        values["lora"] = {"r": 8, "quantize": draw.choice([None, None, 4])}
        train["optimizer"] = "adamw"
    tokens = train["micro_batch_size"] * values["data"]["seq_len"]
    return values if 128 <= tokens <= 2048 else random_config(draw)


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
    predicted = estimate(config)
    start = time.monotonic()

    def enough(step: int) -> bool:
        if step < STEPS or engine.workers.count == 1:
            return step >= STEPS
        seconds = time.monotonic() - start
        return seconds > (SECONDS if mx.get_peak_memory() >= predicted.peak / 1.1 else MAX_SECONDS)

    step = 1
    while not enough(step):
        step += 1
        engine.train_step(batch, step, train.lr, train.momentum)
    return {
        "estimate_mb": predicted.peak / 1e6,
        "measured_mb": mx.get_peak_memory() / 1e6,
        "ratio": predicted.peak / mx.get_peak_memory(),
        "phase": predicted.phase,
    }


def metal_config(name: str) -> "Config":
    from anarchobot.config.loading import load_config

    path = ROOT / "configs" / f"{name.partition(',')[0]}.yaml"
    return load_config(path, ["train.device=gpu", *METAL_CONFIGS[name]]).config


def metal_peak(config: "Config") -> int:
    """The peak of a micro-batch in the model of Metal, in bytes, with weights and optimizer state and under the memory
    limit of training/device.py; of a later micro-batch, if the step has several."""
    import metal
    import mlx.core as mx

    from anarchobot.model.architecture import gradients
    from anarchobot.model.lora import adapted_matrices, trained_shapes
    from anarchobot.model.parameters import parameter_shapes
    from anarchobot.model.step_options import MicroBatch, StepOptions
    from anarchobot.numerics.eval_order import depend
    from anarchobot.optim.param_groups import select_trainable
    from anarchobot.system.memory import estimate, expected_precision
    from anarchobot.system.technique import default_settings
    from anarchobot.training.device import DTYPES, MEMORY_MARGIN

    model, train, lora = config.model, config.train, config.lora
    precision = expected_precision(train, "gpu")
    settings, dtype = default_settings(config, "metal", precision), DTYPES[precision]
    options = StepOptions(
        recompute=train.gradient_checkpointing,
        technique=settings.technique,
        wait=depend,
        attention_block=train.attention_block,
        loss_chunk=settings.loss_chunk,
    )
    shapes = trained_shapes(model, lora)
    names = select_trainable(shapes, train.trainable)
    cast = [len(shapes[name]) == 2 and name.endswith(".weight") for name in names]  # as the engine does in each step
    trained = [mx.zeros(shapes[n], dtype if half else mx.float32) for n, half in zip(names, cast, strict=True)]
    frozen = {n: mx.zeros(shape) for n, shape in shapes.items() if n not in names}
    if lora.r is not None:
        frozen = {n: mx.zeros(s, dtype if len(s) == 2 else mx.float32) for n, s in parameter_shapes(model).items()}
        frozen |= {f"{name}.lora_scale": mx.array(1.0) for name in adapted_matrices(model, lora)}
    sums = [mx.zeros(shapes[name]) for name in names] if train.grad_accum_steps > 1 else []

    def micro_batch(tokens: mx.array, targets: mx.array, scale: mx.array, *arrays: mx.array) -> list[mx.array]:
        rest = iter(arrays)
        params = {name: next(rest) for name in names}
        others = {name: next(rest) for name in frozen}
        batch = MicroBatch(tokens, targets, scale)
        loss, grads = gradients(model, settings.technique)(
            params, batch, model, frozen=others, sums=dict(zip(names, rest, strict=False)), dtype=dtype, options=options
        )
        return [*grads.values(), loss]

    ids = mx.zeros((train.micro_batch_size, config.data.seq_len), mx.int32)
    subject = metal.Subject(
        micro_batch, [ids, ids, mx.array(1.0), *trained, *frozen.values(), *sums], donated=len(sums)
    )
    predicted = estimate(config, device="gpu")
    casts = sum(x.nbytes for x in trained if x.dtype == dtype) if dtype != mx.float32 else 0
    static = predicted.weights + predicted.optimizer + casts
    limit = round(MEMORY_MARGIN * predicted.peak) - static
    return int(static + subject.simulate(subject.graph(), limit=limit).peak)


def metal_rows() -> Iterator[str]:
    from anarchobot.system.memory import estimate

    yield "| configuration | phase | estimate, GB | model's peak, GB | ratio |\n| --- | --- | ---: | ---: | ---: |"
    for name in METAL_CONFIGS:
        config = metal_config(name)
        predicted, peak = estimate(config, device="gpu"), metal_peak(config)
        yield (
            f"| {name} | {predicted.phase} | {predicted.peak / 1e9:.2f} | {peak / 1e9:.2f} | "
            f"{predicted.peak / peak:.3f} |"
        )


def merged(values: Values) -> Values:
    return {key: {**BASE.get(key, {}), **values.get(key, {})} for key in {**BASE, **values}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these configurations, without writing results")
    parser.add_argument("--random", type=int, metavar="N", help="N random configurations")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: 0)")
    parser.add_argument("--metal", action="store_true", help="compare with the model of Metal")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(json.loads(arguments.worker))))
        return
    if arguments.metal:
        for row in metal_rows():
            print(row, flush=True)
        return
    configs = {name: merged(values) for name, values in CONFIGS.items()}
    if arguments.random:
        draw = random.Random(arguments.seed)
        configs = {json.dumps(values): values for values in (random_config(draw) for _ in range(arguments.random))}
    rows = {}
    print("| configuration | phase | estimate, MB | MLX peak, MB | ratio |\n| --- | --- | ---: | ---: | ---: |")
    for name in arguments.names or configs:
        command = [sys.executable, __file__, "--worker", json.dumps(configs[name])]
        completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = row = json.loads(completed.stdout.splitlines()[-1])
        print(
            f"| {name} | {row['phase']} | {row['estimate_mb']:,.1f} | {row['measured_mb']:,.1f} | {row['ratio']:.3f} |",
            flush=True,
        )
    if arguments.random:
        ratios = sorted(row["ratio"] for row in rows.values())
        close = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
        print(f"{close} of {len(ratios)} within 10%; smallest ratio {ratios[0]:.3f}, largest {ratios[-1]:.3f}")
    elif not arguments.names:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
