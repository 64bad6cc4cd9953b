"""Adapters on disk, as mlx-lm has them and as PEFT has them, read and written.

    adapters.safetensors       NAME.lora_a [in, r], NAME.lora_b [r, out], NAME.m [out]        mlx-lm
    adapter_model.safetensors  base_model.model.NAME.lora_A.weight [r, in], .lora_B.weight [out, r],
                               .lora_magnitude_vector [out]                                   PEFT
    adapter_config.json        of either: rank and scale, and which matrices have adapters

mlx-lm keeps the scale s itself, PEFT alpha: s = alpha / r, or alpha / sqrt(r). `base_sha256`, the digest of the model
that they were trained on, is our own: only mlx-lm's form has it, because PEFT warns of keys that it does not know.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import LoraConfig, ModelConfig
from anarchobot.exchange import safetensors_file
from anarchobot.exchange.dtypes import Dtype, Float32
from anarchobot.storage.new_folder import NewFolder
from anarchobot.model.lora import adapted_matrices, adapter_scale
from anarchobot.model.parameters import parameter_shapes
from anarchobot.runs import checkpoint

Form = Literal["mlx", "peft"]
FORMS: tuple[Form, ...] = ("mlx", "peft")
CONFIG = "adapter_config.json"
FILES: dict[Form, str] = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}
_PEFT_PREFIX = "base_model.model."
_PEFT_PARTS = {
    ".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b", ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # PEFT's ways to begin that also change the model's own weights


class Packing(NamedTuple):
    """How the frozen weights were packed while adapters were trained on them (model/frozen.py)."""

    bits: int
    dtype: Dtype  # of scales and biases


@dataclass(frozen=True)
class Adapter:
    """`weights`: NAME.lora_a [in, r], NAME.lora_b [r, out] and, with DoRA, NAME.m [out], where NAME.weight is a matrix
    of the model's; `scales`: s of each NAME. `base`: the digest of the model that they were trained on, where that is
    known; `step`: of a run of ours, which one these are."""

    weights: dict[str, Float32]
    scales: dict[str, float]
    dropout: float = 0.0
    packing: Packing | None = None
    base: str | None = None
    step: int | None = None

    @property
    def dora(self) -> bool:
        return any(name.endswith(".m") for name in self.weights)


def of_run(weights: Mapping[str, Float32], model: ModelConfig, lora: LoraConfig, precision: Dtype) -> Adapter:
    """What a run trained by `lora`, with products in `precision`."""
    scales = dict.fromkeys(adapted_matrices(model, lora), adapter_scale(lora))
    packing = None if lora.quantize is None else Packing(lora.quantize, precision)
    return Adapter(dict(weights), scales, lora.dropout, packing)


def write_adapter(folder: str | Path, adapter: Adapter, model: ModelConfig, form: Form, base: str = "") -> None:
    """Writes the new or empty `folder`; `base` is what the file says that the adapters are for, such as a path.

    Raises UserError when `folder` holds something, or `form` can't carry these adapters.
    """
    ranks = {array.shape[1] for name, array in adapter.weights.items() if name.endswith(".lora_a")}
    if len(ranks) != 1 or len(set(adapter.scales.values())) != 1:
        raise UserError(f"{folder}: the adapters have several ranks or scales: only fuse can take them")
    (rank,), scale = ranks, next(iter(adapter.scales.values()))
    blocks: dict[int, set[str]] = {}
    for name in adapter.scales:
        _, _, block, inner = name.split(".", 3)
        blocks.setdefault(int(block), set()).add(inner)
    keys, first = blocks[max(blocks)], min(blocks)
    if blocks != dict.fromkeys(range(first, model.n_layers), keys):
        raise UserError(
            f"{folder}: adapters on other matrices in other blocks, or not on the last: only fuse can take them"
        )
    ordered = sorted(keys)
    values: dict[str, Any]
    if form == "mlx":
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
    if adapter.packing is not None:
        values["trained_on"] = adapter.packing._asdict()
    with NewFolder(Path(folder)) as beside:
        safetensors_file.write(beside / FILES[form], tensors, "float32", {"format": "mlx" if form == "mlx" else "pt"})
        (beside / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_adapter(path: str | Path, model: ModelConfig) -> Adapter:
    """The adapters at `path`: a folder of either form, or a run of ours that trains some (its best step, or the newest
    where none was validated), or a step of it.

    Raises UserError when there are none, a file is damaged or in a form that is not known, or they are not for `model`.
    """
    path = Path(path)
    form = next((form for form in FORMS if (path / FILES[form]).is_file()), None)
    if form is None:
        if (path / "adapter_model.bin").is_file():
            raise UserError(f"{path / 'adapter_model.bin'}: a pickle, which can run code: save it as safetensors")
        adapter = _of_checkpoint(path)
    else:
        values = _json(path / CONFIG)
        stored = {name: tensor.load() for name, tensor in safetensors_file.read(path / FILES[form]).items()}
        read = _from_mlx if form == "mlx" else _from_peft
        adapter = read(stored, values, path / CONFIG)
    _check(adapter, model, path)
    return adapter


def _of_checkpoint(path: Path) -> Adapter:
    try:
        best = checkpoint.best_step(path)
        found = checkpoint.find(path if best is None else path / checkpoint.BEST, files=(checkpoint.MODEL_FILE,))
    except UserError as error:
        if (path / "state.json").exists() or checkpoint.saved_steps(path):
            raise
        raise UserError(f"{path}: no adapters: expected {' or '.join(FILES.values())}, or a run with lora.r") from error
    config = found.config
    weights = checkpoint.load_adapters(found)
    precision = found.state.get("precision", config.train.precision or "float32")
    adapter = of_run(weights, config.model, config.lora, precision)
    return replace(adapter, base=found.state.get("base"), step=found.step)


def _from_mlx(stored: dict[str, Float32], values: dict[str, Any], file: Path) -> Adapter:
    kind = values.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UserError(f"{file}: fine_tune_type is {kind!r}: expected lora or dora")
    parameters = values.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise UserError(f"{file}: expected lora_parameters: rank, scale and dropout")
    scale = _number(parameters, "scale", file)
    names = dict.fromkeys(name.rpartition(".")[0] for name in stored)
    return Adapter(
        stored, dict.fromkeys(names, scale), _dropout(parameters.get("dropout")), _packing(values, file),
        base=values.get("base_sha256"),
    )  # fmt: skip


def _from_peft(stored: dict[str, Float32], values: dict[str, Any], file: Path) -> Adapter:
    if values.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {values.get('peft_type')!r}: expected LORA")
    begun = values.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(_CHANGES_BASE):
        raise UserError(
            f"{file}: init_lora_weights is {begun!r}, which changed the model as well: convert it with PEFT"
        )
    weights = {}
    for theirs, array in stored.items():
        end = next((end for end in _PEFT_PARTS if theirs.endswith(end)), None)
        if end is None or not theirs.startswith(_PEFT_PREFIX):
            raise UserError(f"{file.with_name(FILES['peft'])}: {theirs}: no adapter of a matrix: it can't be carried")
        name = theirs.removeprefix(_PEFT_PREFIX).removesuffix(end)
        part = _PEFT_PARTS[end]
        weights[f"{name}.{part}"] = array.reshape(-1) if part == "m" else np.ascontiguousarray(array.T)
    scales = {}
    for name in dict.fromkeys(name.rpartition(".")[0] for name in weights):
        own = next((key for key in values.get("alpha_pattern") or {} if re.match(rf"(.*\.)?({key})$", name)), None)
        alpha = _number(values, "lora_alpha", file) if own is None else _number(values["alpha_pattern"], own, file)
        rank = weights.get(f"{name}.lora_a", np.zeros((1, 1), np.float32)).shape[-1]
        scales[name] = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
    return Adapter(weights, scales, _dropout(values.get("lora_dropout")), _packing(values, file))


def _check(adapter: Adapter, model: ModelConfig, path: Path) -> None:
    """Raises UserError unless each adapter is of a matrix of a block of `model`, whole, and of its shape."""
    shapes = parameter_shapes(model)
    whole = {"lora_a", "lora_b", "m"} if adapter.dora else {"lora_a", "lora_b"}
    if not adapter.weights:
        raise UserError(f"{path}: holds no adapters")
    for name in adapter.scales:
        shape = shapes.get(f"{name}.weight") if name.endswith("_proj") else None
        if shape is None:
            raise UserError(f"{path}: {name}: no matrix of the model's blocks: these adapters are for another model")
        parts = {part: adapter.weights[f"{name}.{part}"].shape for part in whole if f"{name}.{part}" in adapter.weights}
        if missing := whole - set(parts):
            raise UserError(f"{path}: {name} has no {min(missing)}: the file is not whole")
        rank = parts["lora_a"][-1]
        wanted = {"lora_a": (shape[1], rank), "lora_b": (rank, shape[0]), "m": (shape[0],)}
        for part, found in parts.items():
            if found != wanted[part]:
                raise UserError(
                    f"{path}: {name}.{part} is {list(found)}, and the model asks for {list(wanted[part])}: these "
                    "adapters are for another model"
                )
    for name, array in adapter.weights.items():
        if name.rpartition(".")[2] not in whole:
            raise UserError(f"{path}: {name}: no part of an adapter")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds a value that is not finite")


def _to_peft(name: str) -> str:
    matrix, _, part = name.rpartition(".")
    return f"{_PEFT_PREFIX}{matrix}{next(end for end, own in _PEFT_PARTS.items() if own == part)}"


def _packing(values: dict[str, Any], file: Path) -> Packing | None:
    said = values.get("trained_on")
    if said is None:
        return None
    if (
        not isinstance(said, dict)
        or said.get("bits") not in (4, 8)
        or said.get("dtype") not in ("float32", "float16", "bfloat16")
    ):
        raise UserError(f"{file}: trained_on: expected bits (4 or 8) and dtype")
    return Packing(said["bits"], said["dtype"])


def _dropout(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _number(values: Mapping[str, Any], key: str, file: Path) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{file}: {key}: expected a number, got {value!r}")
    return float(value)


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values
