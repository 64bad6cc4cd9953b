"""The model that is tuned: a run of ours, or a Hugging Face model's folder."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.config.schema import ModelConfig
from anarchobot.data.tokenizer import ChatTokenizer, load_chat_tokenizer
from anarchobot.exchange.importing import open_foreign
from anarchobot.model.shapes import parameter_shapes
from anarchobot.storage.durable import sha256_file
from anarchobot.training import checkpoint


@dataclass(frozen=True)
class Base:
    """Its parts; `weights` are read from its files as they are asked for. `digest` tells it from any other."""

    folder: Path
    model: ModelConfig
    tokenizer: ChatTokenizer
    weights: Mapping[str, npt.NDArray[np.float32]]
    digest: str
    warnings: list[str] = field(default_factory=list)


@lru_cache(maxsize=1)
def open_base(path: str) -> Base:
    """Raises UserError when there is no model, it is damaged, or has what a model here can't be."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        found = open_foreign(folder)
        whole = hashlib.sha256("".join(sha256_file(file) for file in found.files).encode()).hexdigest()
        tokenizer = load_chat_tokenizer(found.tokenizer.files[0])
        return Base(folder, found.model, tokenizer, found.weights, whole, found.warnings)
    run = checkpoint.find(folder, files=(checkpoint.MODEL_FILE,))
    if run.config.lora.r is not None:
        raise UserError(
            f"{run.folder}: adapters (lora.r: {run.config.lora.r}), no whole model: join them with their model first "
            "(anarchobot fuse)"
        )
    weights = _Saved(run)
    tokenizer = load_chat_tokenizer(run.folder.parent)
    return Base(run.folder, run.config.model, tokenizer, weights, run.state["sha256"][checkpoint.MODEL_FILE],
                list(run.passed_over))  # fmt: skip


def load_tuning(path: str | None, overrides: Sequence[str | tuple[str, Any]]) -> LoadedConfig:
    """A configuration whose model section is that of the model in train.init_from."""
    return load_config(path, overrides, base_model=lambda folder: open_base(folder).model)


class _Saved(Mapping[str, npt.NDArray[np.float32]]):
    """A checkpoint's parameters by name; its digest was checked, so they are there and of their shapes."""

    def __init__(self, found: checkpoint.Checkpoint) -> None:
        self._file, self._shapes = found.folder / checkpoint.MODEL_FILE, parameter_shapes(found.config.model)

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        with np.load(self._file, allow_pickle=False) as npz:
            array: npt.NDArray[np.float32] = npz[name]
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
