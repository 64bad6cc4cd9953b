"""A whole model that is there, to be used or trained further: a run of ours, or a Hugging Face model's folder."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, DataConfig, ModelConfig
from anarchobot.exchange.importing import open_foreign
from anarchobot.model.parameters import parameter_shapes
from anarchobot.runs import checkpoint
from anarchobot.storage.durable import sha256_file
from anarchobot.tokenizers.tokenizer import ChatTokenizer, load_chat_tokenizer

ADAPTERS = "adapter_config.json"  # what a folder of adapters alone has, mlx-lm's or PEFT's


@dataclass(frozen=True)
class PretrainedModel:
    """Its parts; `weights` are read from its files as they are asked for. `config` is what it was trained with; of a
    Hugging Face model, the model section alone says something."""

    folder: Path
    config: Config
    tokenizer: ChatTokenizer
    weights: Mapping[str, npt.NDArray[np.float32]]
    find_digest: Callable[[], str]
    warnings: list[str] = field(default_factory=list)

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @cached_property
    def digest(self) -> str:
        """Tells it from any other."""
        return self.find_digest()


@lru_cache(maxsize=1)
def load_pretrained(path: str) -> PretrainedModel:
    """Raises UserError when there is no model, it is damaged, or has what a model here can't be."""
    folder = Path(path)
    if (folder / ADAPTERS).is_file():
        raise _no_whole_model(folder, ADAPTERS)
    if (folder / "config.json").is_file():
        found = open_foreign(folder)
        config = Config(model=found.model, data=DataConfig(seq_len=min(DataConfig().seq_len, found.model.max_seq_len)))
        tokenizer = load_chat_tokenizer(found.tokenizer.files[0])
        return PretrainedModel(folder, config, tokenizer, found.weights, lambda: _digest(found.files), found.warnings)
    run = checkpoint.find(folder, files=(checkpoint.MODEL_FILE,))
    if run.config.lora.r is not None:
        raise _no_whole_model(run.folder, f"lora.r: {run.config.lora.r}")
    tokenizer = load_chat_tokenizer(run.folder.parent)
    if tokenizer.vocab_size != run.config.model.vocab_size:  # more would be read from behind the last row
        raise UserError(
            f"{tokenizer.files[0]}: {tokenizer.vocab_size:,} tokens, and the model in {run.folder} has rows for "
            f"{run.config.model.vocab_size:,}: put the tokenizer that it was trained with into the run's folder"
        )
    return PretrainedModel(
        run.folder,
        run.config,
        tokenizer,
        _Saved(run),
        lambda: str(run.state["sha256"][checkpoint.MODEL_FILE]),
        list(run.skipped),
    )


def _no_whole_model(folder: Path, sign: str) -> UserError:
    return UserError(
        f"{folder}: adapters ({sign}), not a whole model: fuse them with their model first (anarchobot fuse)"
    )


def _digest(files: list[Path]) -> str:
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


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
