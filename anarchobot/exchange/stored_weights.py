"""Writes the weights of an export, and says how they are stored."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anarchobot.exchange import gguf_file, gguf_types, safetensors_file
from anarchobot.exchange.dtypes import Dtype, Float32
from anarchobot.exchange.mlx_quantization import MlxQuantization, quantize_parameters
from anarchobot.model.architecture import ExportTarget
from anarchobot.model.quantization import Array


class Weights(NamedTuple):
    """`precision` is for messages; `types` counts the types of the tensors in a GGUF file; `warnings` name the matrices
    that could not be quantized as asked; `config` belongs into config.json."""

    precision: str
    bits_per_weight: float
    types: dict[str, int]
    warnings: list[str]
    config: dict[str, Any]


def approximate_bits(gguf_type: str, quantization: MlxQuantization | None) -> int:
    """Bits per weight, to see whether an export fits on the disk."""
    if quantization is not None:
        return (quantization.mixed or quantization.bits) + 64 // quantization.group_size
    if gguf_type in gguf_types.K_QUANTS:
        return 32 + 8  # with the file that llama.cpp reads
    return {"f32": 32, "f16": 16, "bf16": 16}.get(gguf_type, 8)


def write_safetensors(
    folder: Path,
    params: Mapping[str, Float32],
    target: ExportTarget,
    dtype: Dtype,
    quantization: MlxQuantization | None,
    n_layers: int,
) -> Weights:
    """Writes model.safetensors. Raises UserError if a value overflows `dtype`."""
    arrays: Mapping[str, Array] = params
    warnings, config = list[str](), dict[str, Any]()
    if quantization is not None:
        arrays, setting = quantize_parameters(params, n_layers, quantization, dtype)
        config = {"quantization": setting, "quantization_config": setting}  # the latter for the Hub's page
        if others := [name for name, array in params.items() if array.ndim == 2 and arrays[name] is array]:
            warnings.append(_not_divisible(others, f"groups of {quantization.group_size}", dtype))
    file = folder / "model.safetensors"
    safetensors_file.write(file, arrays, dtype, {"format": "mlx" if target == "mlx" else "pt"})
    size = sum(tensor.end - tensor.offset for tensor in safetensors_file.read(file).values())
    precision = dtype if quantization is None else str(quantization)
    return Weights(precision, _bits_per_weight(size, params), {}, warnings, config)


def weights_in_gguf(file: Path, params: Mapping[str, Float32], gguf_type: str) -> Weights:
    """Reads how the weights of a file of `gguf_type` are stored."""
    stored = gguf_file.stored_types(file)
    block = gguf_types.block_size(gguf_type)
    others: dict[str, list[str]] = {}
    for name, array in params.items():
        if array.ndim == 2 and array.shape[1] % block:
            tensor = gguf_file.tensor_name(name)
            others.setdefault(stored[tensor][0], []).append(tensor)
    warnings = [_not_divisible(names, f"blocks of {block}", kind) for kind, names in others.items()]
    bits = _bits_per_weight(sum(size for _, size in stored.values()), params)
    return Weights(gguf_type, bits, dict(Counter(kind for kind, _ in stored.values())), warnings, {})


def _bits_per_weight(size: int, params: Mapping[str, Float32]) -> float:
    return 8 * size / sum(array.size for array in params.values())


def _not_divisible(names: list[str], groups: str, kind: str) -> str:
    patterns = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return f"{len(names)} matrices are {kind}: their rows can't be divided into {groups}: {', '.join(patterns)}"
