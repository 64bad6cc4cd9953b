"""Quantizes model folders as mlx_lm.convert does."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx


def quantize_folder(folder: Path, output: Path, dtype: mx.Dtype = mx.float32, **how: Any) -> Path:
    """`how` are arguments of mlx-lm's quantize_model."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(folder)
    model.set_dtype(dtype)
    model, config = quantize_model(model, config, **how)
    shutil.copytree(folder, output, ignore=shutil.ignore_patterns("model.safetensors"))
    save_model(output, model)
    save_config(config, output / "config.json")
    return output
