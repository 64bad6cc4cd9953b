"""Reads the weights of a Hugging Face or MLX model folder with mlx-lm, which converts names, shapes and formats."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.model.mlx_lm.architecture import with_older_keys
from anarchobot.model.mlx_lm.module import NOTES, flatten, network

Module = Any  # of mlx.nn, which has no types

Arrays = dict[str, mx.array]


class FolderWeights(Mapping[str, mx.array]):
    """The arrays of mlx-lm's module in their stored dtype; quantized layers as in model/mlx_lm/frozen.py.

    MLX loads an array when it is computed. Each is given out once and then forgotten, so that it can be freed; another
    access reads the folder again. Raises UserError for files that mlx-lm can't load and values that are not finite.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays, self._unconverted = _load(folder)
        self._names = dict.fromkeys(self._arrays)

    def __getitem__(self, name: str) -> mx.array:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._arrays:
            self._arrays, _ = _load(self._folder)
        array = self._arrays.pop(name)
        if mx.issubdtype(array.dtype, mx.floating) and not mx.all(mx.isfinite(array)).item():
            raise UserError(f"{self._folder}: {name} contains a value that is not finite")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def note(self, model: ModelConfig) -> ModelConfig:
        """Sets model.quantization, and adds to model.hf_config what only the weights tell: the parameters of the module
        that are `absent`, such as an output head that is tied without config.json saying so, and whether the arrays are
        those of the files (`hf`). Raises UserError if the weights do not fit the module."""
        values = json.loads(model.hf_config or "{}")
        absent = [name for name in network(model, {}).shapes if name not in self._names]
        packed = any(name.endswith(".scales") for name in self._names)
        values[NOTES] = {"absent": absent, "hf": self._unconverted and not packed}
        model = model.model_copy(update={"hf_config": json.dumps(values)})
        net = network(model, self._arrays)
        packings = Counter((layer.bits, layer.group_size) for layer in net.owners.values() if hasattr(layer, "bits"))
        if packings:
            ((bits, group_size), _), *_ = packings.most_common(1)
            quantization = json.dumps({"bits": bits, "group_size": group_size})
            model = model.model_copy(update={"quantization": quantization})
        shapes = net.shapes
        for name in {**shapes, **self._names}:
            stored = self._arrays[name].shape if name in self._arrays else None
            if shapes.get(name) != stored:
                raise UserError(
                    f"{self._folder}: {name} has the shape {stored or 'none'}, but mlx-lm's module has "
                    f"{shapes.get(name) or 'none'}: this form of weights is not supported"
                )
        return model


def _load(folder: Path) -> tuple[Arrays, bool]:
    """Returns the arrays, and whether all of them are those of the files."""
    from mlx_lm.utils import load_model  # a slow import

    unconverted: list[bool] = []
    try:
        values = with_older_keys(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        module, _ = load_model(
            folder, lazy=True, model_config=values, get_model_classes=lambda config: _classes(config, unconverted)
        )
    except Exception as error:  # whatever a module raises for weights that do not fit
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: mlx-lm can't load this model: {problem}") from error
    return flatten(module), all(unconverted)


def _classes(config: dict[str, Any], unconverted: list[bool]) -> tuple[type[Module], type]:
    """mlx-lm's classes for a config.json. `sanitize`, which converts the arrays of files, also reads forms that mlx-lm
    does not, and appends whether it changed nothing."""
    from mlx_lm.utils import _get_classes

    model_class: Any
    model_class, args_class = _get_classes(config)
    rename = _OTHER_FORMS.get(config["model_type"])

    class Converting(model_class):  # type: ignore[misc]
        def sanitize(self, arrays: Arrays) -> Arrays:
            stored, converted = dict(arrays), arrays if rename is None else rename(arrays)
            if hasattr(model_class, "sanitize"):
                converted = model_class.sanitize(self, converted)
            unconverted.append(all(stored.get(name) is array for name, array in converted.items()))
            return converted

    return Converting, args_class


def _gpt2(arrays: Arrays) -> Arrays:
    """GPT2LMHeadModel's names have a prefix; its head is the embedding."""
    return {name.removeprefix("transformer."): array for name, array in arrays.items() if name != "lm_head.weight"}


def _gpt_oss(arrays: Arrays) -> Arrays:
    """Experts that are not quantized are [experts, in, out] in transformers."""
    experts = {name for name in arrays if name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))}
    return {
        **{name: array for name, array in arrays.items() if name not in experts},
        **{f"{name}.weight": arrays[name].swapaxes(1, 2) for name in experts},
    }


_OTHER_FORMS: dict[str, Callable[[Arrays], Arrays]] = {"gpt2": _gpt2, "gpt_oss": _gpt_oss}
