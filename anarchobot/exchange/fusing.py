"""A model and its adapters as one model: a run's folder with one checkpoint, in float32."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import LoraConfig
from anarchobot.config.strict_yaml import dump
from anarchobot.exchange.adapters import Adapter, Packing, read_adapter
from anarchobot.exchange.chat_format import save_foreign_template
from anarchobot.exchange.dtypes import Float32, narrowed, widened
from anarchobot.storage.new_folder import NewFolder
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.model.lora import GROUP, is_quantized
from anarchobot.model.parameters import parameter_count
from anarchobot.runs import checkpoint
from anarchobot.tokenizers import chat_template as template
from anarchobot.tokenizers.tokenizer import copy_tokenizer


def fuse(model: str | Path, adapter: str | Path, output: str | Path) -> dict[str, Any]:
    """Writes the run folder `output`: the model at `model` (a run of ours, or a Hugging Face folder) with the adapters
    at `adapter` (exchange/adapters.py) in its weights, and with the chat template that lies beside the adapters, or
    else beside the model; returns what it is, and warnings.

    Adapters that were trained on packed weights are joined with those, unpacked. Raises UserError, before anything is
    written, when something is missing or damaged, or the adapters are for another model.
    """
    output, adapter = Path(output), Path(adapter)
    whole = load_pretrained(str(model))
    config = whole.config
    adapters = read_adapter(adapter, config.model)
    if adapters.base is not None and adapters.base != whole.digest:
        raise UserError(
            f"{adapter}: these adapters were trained on another model than the one in {whole.folder}: name the model "
            "that they were trained on, at the step it had then"
        )
    with NewFolder(output) as beside:
        file_name = copy_tokenizer(whole.tokenizer, beside)
        warnings = list(whole.warnings)
        of_ours = [adapter.parent] if checkpoint.saved_steps(adapter.parent) else []  # it is RUN/adapters, or a step
        if not _copy_template([adapter, *of_ours, whole.tokenizer.files[0].parent], beside):
            warnings += save_foreign_template(whole.tokenizer, beside)
        places = {"save_dir": str(output), "tokenizer_path": str(output / file_name)}
        train = config.train.model_copy(update={**places, "init_from": None, "checkpoint_path": None})
        config = config.model_copy(update={"train": train, "lora": LoraConfig()})
        (beside / "config.yaml").write_text(dump(config.model_dump()), encoding="utf-8")
        arrays = {f"{checkpoint.PARAMS}{name}": a for name, a in fused(dict(whole.weights), adapters).items()}
        state = {"tokens": 0, "fused": [str(model), str(adapter)], "config": config.model_dump()}
        checkpoint.save(beside, 0, arrays, state)
    return {
        "output": str(output),
        "model": str(whole.folder),
        "step": adapters.step,
        "parameters": parameter_count(config.model),
        "adapted": len(adapters.scales),
        "tokenizer": file_name,
        "warnings": warnings,
    }


def fused(params: dict[str, Float32], adapter: Adapter) -> dict[str, Float32]:
    """The parameters with W + s (A B)^T for each W that has adapters, with DoRA its rows made m long; float32."""
    if adapter.packing is not None:
        params = {name: _repacked(array, adapter.packing) for name, array in params.items()}
    merged = dict(params)
    for name, scale in adapter.scales.items():
        a, b = adapter.weights[f"{name}.lora_a"], adapter.weights[f"{name}.lora_b"]
        weight = params[f"{name}.weight"] + np.float32(scale) * (a @ b).T
        if adapter.dora:
            lengths = np.linalg.norm(weight, axis=1)
            weight = weight * (adapter.weights[f"{name}.m"] / np.maximum(lengths, np.float32(1e-12)))[:, None]
        merged[f"{name}.weight"] = weight.astype(np.float32)
    return merged


def _copy_template(folders: list[Path], output: Path) -> bool:
    """From the first of `folders` that has one in a file of its own; whether there was one."""
    for folder in folders:
        if (folder / template.FILE).is_file():
            for name in (template.FILE, template.CONFIG):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, output / name)
            return True
    return False


def _repacked(array: Float32, packing: Packing) -> Float32:
    """What is left of `array` when `mx.quantize` has packed it: in each group of columns, whole multiples of a scale
    from one end of the values, the one farther from zero, and such that zero itself stays zero."""
    if not is_quantized(array.shape):
        return array
    groups = array.reshape(len(array), -1, GROUP)
    low, high = groups.min(axis=2), groups.max(axis=2)
    steps = np.float32(2**packing.bits - 1)
    scale = np.maximum((high - low) / steps, np.float32(1e-7))
    far_low = np.abs(low) > np.abs(high)
    scale, edge = np.where(far_low, scale, -scale), np.where(far_low, low, high)
    at_zero = np.rint(edge / scale)
    scale = np.where(at_zero != 0, edge / np.where(at_zero != 0, at_zero, 1), scale)
    bias = np.where(at_zero != 0, edge, np.float32(0))
    whole = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, steps)
    scale, bias = (_rounded(x.astype(np.float32), packing) for x in (scale, bias))
    unpacked: Float32 = (whole * scale[..., None] + bias[..., None]).reshape(array.shape)
    return unpacked


def _rounded(array: Float32, packing: Packing) -> Float32:
    """To the nearest that the frozen weights' dtype holds."""
    narrow = narrowed("weights", array, packing.dtype)
    return widened(narrow) if packing.dtype == "bfloat16" else narrow.astype(np.float32)
