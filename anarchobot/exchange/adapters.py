"""Reads and writes LoRA adapters in the formats of mlx-lm and PEFT.

    adapters.safetensors       NAME.lora_a [in, r], NAME.lora_b [r, out], NAME.m [out]        mlx-lm
    adapter_model.safetensors  base_model.model.NAME.lora_A.weight [r, in], .lora_B.weight [out, r],
                               .lora_magnitude_vector [out]                                   PEFT
    adapter_config.json        both formats: rank, scale and the adapted matrices

mlx-lm stores the scale s itself, PEFT alpha: s = alpha / r, or alpha / sqrt(r). AnarchoBot's own keys are
`base_sha256`, the digest of the base model (only in mlx-lm's format, because PEFT warns about unknown keys), and
`trained_on`, if the base was quantized: by lora.quantize (`bits`, `dtype`) or in its folder (`bits`, `group_size`, and
the matrices that differ).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import LoraConfig, ModelConfig
from anarchobot.exchange import safetensors_file
from anarchobot.exchange.atomic_folder import atomic_folder
from anarchobot.exchange.dtypes import Dtype, Float32
from anarchobot.exchange.importing import read_json
from anarchobot.exchange.peft_patterns import ModulePatterns
from anarchobot.model.architecture import architecture
from anarchobot.model.lora import adapted_matrices, adapter_scale, factor_shapes
from anarchobot.model.quantization import describe
from anarchobot.runs import checkpoint

AdapterFormat = Literal["mlx", "peft"]
FORMATS: tuple[AdapterFormat, ...] = ("mlx", "peft")
CONFIG = "adapter_config.json"
OR_HUGGING_FACE = f", or the folder of a Hugging Face model (config.json) or adapter ({CONFIG})"  # in errors
FILES: dict[AdapterFormat, str] = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}
_PEFT_PREFIX = "base_model.model."
_PEFT_PARTS = {
    ".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b", ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}  # fmt: skip
_MODIFIES_BASE = ("pissa", "olora", "corda", "loftq")  # PEFT initializations that also change the base weights


class BaseQuantization(NamedTuple):
    """How the frozen base weights were quantized during training, by lora.quantize (model/frozen.py)."""

    bits: int
    dtype: Dtype  # of scales and biases


class RecordedBase(NamedTuple):
    """The base model of adapters: its path or name, if recorded, and where. `saved` is the checkpoint, if the adapters
    are one of a run."""

    model: str | None
    where: str
    saved: checkpoint.Checkpoint | None


@dataclass(frozen=True)
class Adapter:
    """`weights` has NAME.lora_a [in, r], NAME.lora_b [r, out] and, with DoRA, NAME.m [out] for each adapted matrix
    NAME.weight; `scales` has the scale s of each NAME. `quantization` or `folder_quantization` (a model.quantization)
    says how the base was quantized in training, if it was; `base` is the digest of the base model, if known; `step` is
    the checkpoint's step, if the adapters come from an AnarchoBot run."""

    weights: dict[str, Float32]
    scales: dict[str, float]
    dropout: float = 0.0
    quantization: BaseQuantization | None = None
    folder_quantization: str | None = None
    base: str | None = None
    step: int | None = None

    @property
    def dora(self) -> bool:
        return any(name.endswith(".m") for name in self.weights)


def make_adapter(weights: Mapping[str, Float32], model: ModelConfig, lora: LoraConfig, precision: Dtype) -> Adapter:
    """Combines the weights of a run with its `lora` settings and its train.precision."""
    scales = dict.fromkeys(adapted_matrices(model, lora), adapter_scale(lora))
    quantization = None if lora.quantize is None else BaseQuantization(lora.quantize, precision)
    return Adapter(dict(weights), scales, lora.dropout, quantization, model.quantization)


def write_adapter(
    folder: str | Path, adapter: Adapter, model: ModelConfig, file_format: AdapterFormat, base: str = ""
) -> None:
    """Writes a new or empty folder; `base` is the path or name of the base model to record.

    Raises UserError if `folder` is not empty or the format can't represent these adapters.
    """
    ranks = {array.shape[1] for name, array in adapter.weights.items() if name.endswith(".lora_a")}
    if len(ranks) != 1 or len(set(adapter.scales.values())) != 1:
        raise UserError(f"{folder}: different ranks or scales can't be saved in this format: use anarchobot fuse")
    (rank,), scale = ranks, next(iter(adapter.scales.values()))
    matrices = architecture(model.architecture).adaptable_matrices(model)
    first = min(matrices[name].block for name in adapter.scales)
    inner = {name: _name_in_block(name) for name, matrix in matrices.items() if matrix.block >= first}
    keys = {inner[name] for name in adapter.scales}
    if {name for name, key in inner.items() if key in keys} != set(adapter.scales):
        raise UserError(
            f"{folder}: adapters that differ between blocks or skip the last block can't be saved in this format: "
            "use anarchobot fuse"
        )
    ordered = sorted(keys)
    values: dict[str, Any]
    if file_format == "mlx":
        values = {
            "model": base,
            "fine_tune_type": "dora" if adapter.dora else "lora",
            "num_layers": model.n_layers - first,
            "lora_parameters": {"rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": ordered},
        }
        if adapter.base is not None:
            values["base_sha256"] = adapter.base
        tensors = adapter.weights
    else:
        values = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": scale * rank,
            "lora_dropout": adapter.dropout,
            "use_rslora": False,
            "use_dora": adapter.dora,
            "target_modules": [name.rpartition(".")[2] for name in ordered],
            "layers_to_transform": None if first == 0 else list(range(first, model.n_layers)),
            "layers_pattern": None if first == 0 else "layers",
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }
        tensors = {_to_peft(name): np.ascontiguousarray(array.T) for name, array in adapter.weights.items()}
    if adapter.quantization is not None:
        values["trained_on"] = adapter.quantization._asdict()
    elif adapter.folder_quantization is not None:
        values["trained_on"] = json.loads(adapter.folder_quantization)
    metadata = {"format": "mlx" if file_format == "mlx" else "pt"}
    with atomic_folder(Path(folder)) as temporary:
        safetensors_file.write(temporary / FILES[file_format], tensors, "float32", metadata)
        (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def recorded_base(path: Path) -> RecordedBase | None:
    """The base model of the adapters at `path`, an adapter folder or a run with lora.r; None if there is a whole model.

    Raises UserError if there is neither.
    """
    if (path / CONFIG).is_file():
        values = read_json(path / CONFIG)
        name = values.get("model") or values.get("base_model_name_or_path")
        return RecordedBase(name if isinstance(name, str) else None, str(path / CONFIG), None)
    if (path / "config.json").is_file():
        return None
    saved = checkpoint.find(path, files=(checkpoint.MODEL_FILE,), also_expected=OR_HUGGING_FACE)
    if saved.config.lora.r is None:
        return None
    return RecordedBase(saved.config.train.init_from, f"{saved.folder / 'state.json'}: train.init_from", saved)


def check_base(adapter: Adapter, path: str | Path, model: ModelConfig, digest: Callable[[], str], name: str) -> None:
    """Raises UserError if the model called `name`, with this configuration and digest, is not the one that the adapters
    at `path` were trained on, as far as that is known."""
    if adapter.folder_quantization is not None and adapter.folder_quantization != model.quantization:
        found = "not quantized" if model.quantization is None else f"quantized to {describe(model.quantization)}"
        raise UserError(
            f"{path}: these adapters were trained on weights quantized to {describe(adapter.folder_quantization)} and "
            f"correct their rounding; those in {name} are {found}: pass the model that they were trained on"
        )
    if adapter.quantization is not None and model.quantization is not None:
        raise UserError(
            f"{path}: these adapters were trained on float weights quantized to {adapter.quantization.bits} bits by "
            f"lora.quantize, and {name} is quantized already: pass the model that they were trained on"
        )
    if adapter.base is not None and not same_base(adapter.base, digest()):
        raise UserError(
            f"{path}: these adapters were not trained on the model in {name}: pass the model and step that they were "
            "trained on"
        )


def same_base(recorded: str, digest: str) -> bool:
    """Whether a recorded digest of a base model is `digest`. Early versions recorded that of its weights alone."""
    return recorded in (digest, digest.partition(":")[0])


def read_adapter(path: str | Path, model: ModelConfig) -> Adapter:
    """Reads a folder in either format, a step folder, or a run: its best step, or the newest without validation.

    Raises UserError if there are no adapters, a file is damaged or not supported, or they don't fit `model`.
    """
    path = Path(path)
    file_format = next((name for name in FORMATS if (path / FILES[name]).is_file()), None)
    if file_format is None:
        if (path / "adapter_model.bin").is_file():
            raise UserError(f"{path / 'adapter_model.bin'}: a pickle, which can run code: save it as safetensors")
        adapter = _from_checkpoint(path)
        _check_shapes({name: array.shape for name, array in adapter.weights.items()}, model, path)
    else:
        values = read_json(path / CONFIG)
        stored = safetensors_file.read(path / FILES[file_format])
        parse = _parse_mlx if file_format == "mlx" else _parse_peft
        tensors = parse(stored, path / FILES[file_format])
        # The shapes are checked before anything is loaded.
        _check_shapes({name: tensor.shape for name, tensor in tensors.items()}, model, path)
        settings = _mlx_settings if file_format == "mlx" else _peft_settings
        adapter = settings(tensors, values, path / CONFIG)
        for name, tensor in tensors.items():
            adapter.weights[name] = tensor.load()
    for name, array in adapter.weights.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} contains a value that is not finite")
    return adapter


def _from_checkpoint(path: Path) -> Adapter:
    try:
        best = checkpoint.best_step(path) if path.is_dir() else None
        saved = checkpoint.find(path if best is None else path / checkpoint.BEST, files=(checkpoint.MODEL_FILE,))
    except UserError as error:
        if (path / "state.json").exists() or checkpoint.saved_steps(path):
            raise
        raise UserError(f"{path}: no adapters: expected {' or '.join(FILES.values())}, or a run with lora.r") from error
    config, state = saved.config, saved.state
    precision = state.get("precision", config.train.precision or "float32")
    adapter = make_adapter(checkpoint.load_adapters(saved), config.model, config.lora, precision)
    return replace(adapter, base=state.get("base"), step=saved.step)


class _Tensor(NamedTuple):
    """A tensor of an adapter file. In PEFT's format matrices are transposed, and vectors may have two dimensions."""

    stored: safetensors_file.StoredTensor
    shape: tuple[int, ...]
    transposed: bool = False

    def load(self) -> Float32:
        array = self.stored.load()
        return np.ascontiguousarray(array.T) if self.transposed else array.reshape(self.shape)


def _parse_mlx(stored: dict[str, safetensors_file.StoredTensor], file: Path) -> dict[str, _Tensor]:
    return {name: _Tensor(tensor, tensor.shape) for name, tensor in stored.items()}


def _parse_peft(stored: dict[str, safetensors_file.StoredTensor], file: Path) -> dict[str, _Tensor]:
    """Raises UserError for other tensors than adapters."""
    tensors = {}
    for peft_name, tensor in stored.items():
        suffix = next((suffix for suffix in _PEFT_PARTS if peft_name.endswith(suffix)), None)
        if suffix is None or not peft_name.startswith(_PEFT_PREFIX):
            raise UserError(f"{file}: unsupported tensor {peft_name}: expected only LoRA or DoRA adapters")
        name, part = peft_name.removeprefix(_PEFT_PREFIX).removesuffix(suffix), _PEFT_PARTS[suffix]
        is_vector = part == "m"
        shape = (math.prod(tensor.shape),) if is_vector else tensor.shape[::-1]
        tensors[f"{name}.{part}"] = _Tensor(tensor, shape, transposed=not is_vector)
    return tensors


def _matrix_names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _mlx_settings(tensors: dict[str, _Tensor], values: dict[str, Any], file: Path) -> Adapter:
    """An adapter without weights."""
    kind = values.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UserError(f"{file}: unsupported fine_tune_type {kind!r}: expected lora or dora")
    parameters = values.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise UserError(f"{file}: expected lora_parameters with rank, scale and dropout")
    scales = dict.fromkeys(_matrix_names(tensors), _number(parameters, "scale", file))
    dropout = _dropout(parameters.get("dropout"))
    return Adapter({}, scales, dropout, *_quantization(values, file), values.get("base_sha256"))


def _peft_settings(tensors: dict[str, _Tensor], values: dict[str, Any], file: Path) -> Adapter:
    """An adapter without weights."""
    if values.get("peft_type") != "LORA":
        raise UserError(f"{file}: unsupported peft_type {values.get('peft_type')!r}: expected LORA")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_MODIFIES_BASE):
        raise UserError(
            f"{file}: init_lora_weights {init!r} also changes the base weights: convert the adapter to LoRA with PEFT"
        )
    alphas = values.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise UserError(f"{file}: alpha_pattern: expected a mapping from module names to numbers, got {alphas!r}")
    try:
        patterns = ModulePatterns(alphas)
    except ValueError as error:
        raise UserError(f"{file}: alpha_pattern: {error}") from error
    scales = {}
    for name in _matrix_names(tensors):
        key = patterns.find(name)
        alpha = _number(values, "lora_alpha", file) if key is None else _number(alphas, key, file)
        rank = tensors[f"{name}.lora_a"].shape[1]
        scales[name] = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
    return Adapter({}, scales, _dropout(values.get("lora_dropout")), *_quantization(values, file))


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, path: Path) -> None:
    """Raises UserError unless every adapter is complete and fits a matrix in a block of `model`."""
    if not shapes:
        raise UserError(f"{path}: no adapters in this file")
    matrices = architecture(model.architecture).adaptable_matrices(model)
    parts = {"lora_a", "lora_b"} | ({"m"} if any(name.endswith(".m") for name in shapes) else set())
    for name in shapes:
        if name.rpartition(".")[2] not in parts:
            raise UserError(f"{path}: unexpected tensor {name}")
    for name in _matrix_names(shapes):
        if name not in matrices:
            raise UserError(f"{path}: the model has no matrix {name}: these adapters are for another model")
        if missing := [part for part in parts if f"{name}.{part}" not in shapes]:
            raise UserError(f"{path}: {name} has no {min(missing)}: the file is incomplete")
        shape, (_, rank, *_) = matrices[name].shape, (*shapes[f"{name}.lora_a"], 1, 1)
        a, b = factor_shapes(shape, rank)
        expected = {"lora_a": a, "lora_b": b, "m": shape[:1]}
        for part in parts:
            if (actual := shapes[f"{name}.{part}"]) != expected[part]:
                raise UserError(
                    f"{path}: {name}.{part} has shape {list(actual)}, but the model requires {list(expected[part])}: "
                    "these adapters are for another model"
                )


def _name_in_block(name: str) -> str:
    """The part after the number of the block: "mlp.up_proj" of "model.layers.3.mlp.up_proj"."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _to_peft(name: str) -> str:
    matrix, _, part = name.rpartition(".")
    return f"{_PEFT_PREFIX}{matrix}{next(suffix for suffix, name in _PEFT_PARTS.items() if name == part)}"


def _quantization(values: dict[str, Any], file: Path) -> tuple[BaseQuantization | None, str | None]:
    """How the base was quantized in training: by lora.quantize, or in its folder."""
    trained_on = values.get("trained_on")
    if trained_on is None:
        return None, None
    if isinstance(trained_on, dict) and "bits" in trained_on and "dtype" not in trained_on:
        return None, json.dumps(trained_on)
    if (
        not isinstance(trained_on, dict)
        or trained_on.get("bits") not in (4, 8)
        or trained_on.get("dtype") not in ("float32", "float16", "bfloat16")
    ):
        raise UserError(f"{file}: trained_on: expected bits (4 or 8) and dtype, or bits and group_size")
    return BaseQuantization(trained_on["bits"], trained_on["dtype"]), None


def _dropout(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _number(values: Mapping[str, Any], key: str, file: Path) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{file}: {key}: expected a number, got {value!r}")
    return float(value)
