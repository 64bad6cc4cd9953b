"""Whether a device computes a training step correctly: gradients against the CPU's, the same bits twice, and singular
values of Muon's updates. Small shapes, a few seconds each; part of `anarchobot bench --device`.

Importing this module imports MLX: call `load_fast_blas` first.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import Config, ModelConfig, Technique
from anarchobot.data.windows import Batch
from anarchobot.model.parameters import parameter_shapes
from anarchobot.numerics.device import reduced_float32
from anarchobot.optim.polar_express import orthogonalize
from anarchobot.training.device import CPU_CACHE_BYTES, choose_device
from anarchobot.training.mlx_engine import MLXEngine

ROWS, LENGTH, VOCAB, BLOCKS = 2, 256, 512, 2  # of the small model
PIECE = 128  # queries per block of attention and tokens per chunk of the loss: several of both
SMALLEST_NORM = 1e-3  # of the whole gradient's: errors of a gradient below it are relative to this
DECAYS = (0, 3, 5)  # singular values from 1 to 10^-n; 0: of a random matrix
MOST_WIDTH = 512
LARGEST_SINGULAR_VALUE = 1.3  # 1.15 is right
LARGEST_ERROR = {"float32": 0.01, "bfloat16": 0.1}  # of a gradient; more is not rounding, even of TF32

Arrays = dict[str, npt.NDArray[np.float64]]


def check_gradients(
    config: Config, technique: Technique, precisions: Sequence[str], segments: bool
) -> list[dict[str, Any]]:
    """For each precision: loss and gradients of a small model with the configuration's features, on its device, against
    those of `blocked` on a CPU in float32, and which gradients differ when computed again.

    An error is the norm of the difference over the norm of the CPU's gradient. Raises what MLX raises.
    """
    weights, batch = _small_weights(_small_model(config.model)), _small_batch(segments)
    cache_limit = mx.set_cache_limit(CPU_CACHE_BYTES)
    reference_loss, reference = _loss_and_gradients(_small(config, device="cpu"), weights, batch)
    mx.set_cache_limit(cache_limit)  # choose_device has set a CPU's, with which a GPU would be slower
    whole = np.sqrt(sum(float(np.sum(g**2)) for g in reference.values()))
    results = []
    for precision in precisions:
        small = _small(config, technique=technique, precision=precision)
        loss, first = _loss_and_gradients(small, weights, batch)
        _, second = _loss_and_gradients(small, weights, batch)
        errors = {
            name: float(np.linalg.norm(first[name] - g) / max(float(np.linalg.norm(g)), SMALLEST_NORM * whole))
            for name, g in reference.items()
        }
        worst = max(errors, key=lambda name: errors[name])
        results.append(
            {
                "technique": technique,
                "precision": precision,
                "loss_error": abs(loss - reference_loss) / abs(reference_loss),
                "largest_error": errors[worst],
                "parameter": worst,
                "right": errors[worst] < LARGEST_ERROR[precision],
                "errors": errors,
                "differ_when_repeated": [name for name in first if not np.array_equal(first[name], second[name])],
            }
        )
    return results


def _small_model(model: ModelConfig) -> ModelConfig:
    """The same features and head size, with one group of query heads or two heads, each kind of block, and windows that
    hide some tokens."""
    group = model.n_heads // model.kv_heads
    heads = max(2, group)
    kinds = None if model.layer_types is None else (sorted(set(model.layer_types)) * BLOCKS)[:BLOCKS]
    shape = {
        "vocab_size": VOCAB, "n_layers": BLOCKS, "n_heads": heads, "n_kv_heads": 1 if group > 1 else None,
        "head_dim": None, "d_model": heads * model.head_size, "dropout": 0.0, "max_seq_len": LENGTH,
        "layer_types": kinds, "sliding_window": model.sliding_window and min(model.sliding_window, LENGTH // 3),
    }  # fmt: skip
    return ModelConfig.model_validate({**model.model_dump(), **shape})


def _small(config: Config, **train: Any) -> Config:
    """A run of the small model on all weights, with these settings in the train section."""
    settings = {
        "micro_batch_size": ROWS, "grad_accum_steps": 1, "attention_block": PIECE, "loss_chunk": PIECE,
        "gradient_checkpointing": config.train.gradient_checkpointing, "device": config.train.device,
        "technique": "blocked", "precision": "float32",
    }  # fmt: skip
    return Config.model_validate(
        {
            "model": _small_model(config.model).model_dump(),
            "data": {"seq_len": LENGTH},
            "train": {**settings, **train},
        }
    )


def _small_weights(model: ModelConfig) -> dict[str, npt.NDArray[np.float32]]:
    """Random, and none zero: matrices keep the size of their input, norms are about 1."""
    draw = np.random.default_rng(0)
    weights = {}
    for name, shape in parameter_shapes(model).items():
        values = draw.standard_normal(shape)
        if len(shape) > 1:
            values /= np.sqrt(shape[-1])
        else:
            values = 0.1 * values + float(name.endswith("norm.weight"))
        weights[name] = values.astype(np.float32)
    return weights


def _small_batch(segments: bool) -> Batch:
    ids = np.random.default_rng(1).integers(0, VOCAB, (1, ROWS, LENGTH + 1), np.int32)
    halves = np.broadcast_to(np.arange(LENGTH, dtype=np.int32) // (LENGTH // 2 + 7), (1, ROWS, LENGTH)).copy()
    return Batch(ids[..., :-1].copy(), ids[..., 1:].copy(), halves if segments else None)


def _loss_and_gradients(
    config: Config, weights: dict[str, npt.NDArray[np.float32]], batch: Batch
) -> tuple[float, Arrays]:
    """The mean loss of the batch and its gradients."""
    engine = MLXEngine(config, weights)  # sets the device
    (total,), grads = engine._accumulate_gradients(batch, 1, 1 / batch.inputs.size)
    return total / batch.inputs.size, {name: np.array(g, np.float64) for name, g in grads.items()}


# ---- Muon ----


def check_orthogonalization(config: Config) -> list[dict[str, Any]]:
    """The largest singular values of Muon's updates on the configuration's device: as in training, and in a process
    each with MLX_ENABLE_TF32 0 and 1, which MLX reads once."""
    model = config.model
    width = min(model.d_model, MOST_WIDTH)
    sides = ((model.head_size, width), (width, width), (width, min(model.mlp_size, 4 * width)))
    shapes = [(min(pair), max(pair)) for pair in sides]
    choose_device(config.train.device)
    results = [largest_singular_values(shapes)]
    for value in ("0", "1"):
        arguments = json.dumps([config.train.device, shapes])
        code = f"from anarchobot.tasks.device_checks import print_singular_values as p; p(*{arguments})"
        code = f"from anarchobot.system.blas import load_fast_blas; load_fast_blas(); {code}"
        environment = {**os.environ, "MLX_ENABLE_TF32": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"MLX_ENABLE_TF32={value}: {done.stderr.strip().splitlines()[-1]}")
        results.append(json.loads(done.stdout))
    return results


def print_singular_values(device: str, shapes: Sequence[tuple[int, int]]) -> None:
    """Prints `largest_singular_values` on a device as JSON; for a process of its own."""
    choose_device(device)
    print(json.dumps(largest_singular_values(shapes)))


def largest_singular_values(shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Of random matrices with decaying singular values after `orthogonalize`: 1.15 is right, and above
    LARGEST_SINGULAR_VALUE, float32 products are not exact enough. On MLX's default device."""
    draw, values = np.random.default_rng(0), {}
    for rows, cols in shapes:
        for decay in DECAYS:
            g = draw.standard_normal((rows, cols))
            if decay:
                u, v = np.linalg.qr(g @ g.T)[0], np.linalg.qr(g.T)[0]  # orthogonal: [rows, rows], [cols, rows]
                g = (u * np.logspace(0, -decay, rows)) @ v.T
            y = np.array(orthogonalize(mx.array(g.astype(np.float32))[None])[0], np.float64)
            name = f"{rows} x {cols}, 1 to 1e-{decay}" if decay else f"{rows} x {cols}"
            values[name] = float(np.linalg.eigvalsh(y @ y.T)[-1] ** 0.5)
    largest = max(values.values())
    return {
        "MLX_ENABLE_TF32": os.environ.get("MLX_ENABLE_TF32"),
        "products_rounded": reduced_float32(),
        "largest": largest,
        "right": largest < LARGEST_SINGULAR_VALUE,
        "values": values,
    }
