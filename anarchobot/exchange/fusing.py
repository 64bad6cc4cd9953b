"""Merges adapters into their base model and writes the result as a run folder with one float32 checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.schema import LoraConfig, ModelConfig
from anarchobot.exchange.adapters import Adapter, BaseQuantization, check_base, read_adapter
from anarchobot.exchange.atomic_folder import atomic_folder
from anarchobot.exchange.chat_format import copy_chat_template
from anarchobot.exchange.dtypes import Float32, rounded
from anarchobot.exchange.hub import model_name, pinned_name, resolve_model
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.model.lora import GROUP, is_quantized
from anarchobot.model.mlx_lm.architecture import requantized
from anarchobot.model.parameters import parameter_count
from anarchobot.model.quantization import Packing, dequantize, quantize
from anarchobot.runs import checkpoint
from anarchobot.runs.write_model import write_model
from anarchobot.tokenizers import chat_template
from anarchobot.tokenizers.special_tokens import TOKENIZER_CONFIG, read_config, read_special_tokens


def fuse(model: str | Path, adapter: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes the run folder `output` and returns a summary with warnings.

    `model` is as in `load_pretrained`, `adapter` as in `read_adapter`. The chat template next to the adapters is
    used, or else the model's. Adapters trained on a quantized base are merged into its dequantized weights. Raises
    UserError, before anything is written, if a file is missing or damaged, or the adapters are for another model.
    """
    output, adapter = Path(output), resolve_model(adapter)
    base = load_pretrained(str(model))
    adapters = read_adapter(adapter, base.model)
    check_base(adapters, adapter, base.model, lambda: base.digest, base.name)
    base = base.dequantized()
    config = base.config.model_copy(update={"lora": LoraConfig()})
    weights = merge_adapter(dict(base.weights), adapters, base.model)
    template_folders = [adapter, base.tokenizer.files[0].parent]
    if checkpoint.saved_steps(adapter.parent):  # `adapter` is RUN/adapters or a step
        template_folders.insert(1, adapter.parent)
    with atomic_folder(output) as temporary:
        origin = {"fused": [pinned_name(str(model)), model_name(adapter)]}
        config = write_model(temporary, config, base.tokenizer, weights, origin, output)
        warnings = list(base.warnings)
        if not _copy_template_file(template_folders, temporary):
            warnings += copy_chat_template(base.tokenizer, temporary)
    assert config.train.tokenizer_path is not None
    return {
        "output": str(output),
        "model": base.name,
        "step": adapters.step,
        "parameters": parameter_count(config.model),
        "adapted": len(adapters.scales),
        "tokenizer": Path(config.train.tokenizer_path).name,
        "warnings": warnings,
    }


def merge_adapter(params: dict[str, Float32], adapter: Adapter, model: ModelConfig) -> dict[str, Float32]:
    """Returns float32 parameters with W + s (A B)^T for each adapted W; DoRA also scales its rows to norm m. Of stacked
    experts, each W is W + s B A."""
    if adapter.quantization is not None and model.architecture == "mlx_lm":
        params = dict(requantized(params, model, adapter.quantization.bits, adapter.quantization.dtype))
    elif adapter.quantization is not None:
        params = {name: _quantize_dequantize(array, adapter.quantization) for name, array in params.items()}
    merged = dict(params)
    for name, scale in adapter.scales.items():
        a, b = adapter.weights[f"{name}.lora_a"], adapter.weights[f"{name}.lora_b"]
        change = (a @ b).T if a.ndim == 2 else b @ a
        weight = params[f"{name}.weight"] + np.float32(scale) * change
        if adapter.dora:
            norms = np.linalg.norm(weight, axis=1)
            weight = weight * (adapter.weights[f"{name}.m"] / np.maximum(norms, np.float32(1e-12)))[:, None]
        merged[f"{name}.weight"] = weight.astype(np.float32)
    return merged


def _copy_template_file(folders: list[Path], output: Path) -> bool:
    """Copies chat_template.jinja from the first folder that has one, with the names of its special tokens; returns
    whether there was one."""
    for folder in folders:
        if (folder / chat_template.FILE).is_file():
            shutil.copyfile(folder / chat_template.FILE, output / chat_template.FILE)
            config = read_config(output / TOKENIZER_CONFIG) | read_special_tokens(folder).names
            (output / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
            return True
    return False


def _quantize_dequantize(array: Float32, quantization: BaseQuantization) -> Float32:
    """Returns what `mx.quantize` and `mx.dequantize` make of `array`, without MLX."""
    if not is_quantized(array.shape):
        return array
    weight, scales, biases = quantize(array, Packing(quantization.bits, GROUP))
    scales, biases = (rounded("weights", part, quantization.dtype) for part in (scales, biases))
    return dequantize(weight, scales, biases)
