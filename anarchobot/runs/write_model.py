"""Writes a model that did not come from a training run as a run folder, ready to generate, export or fine-tune."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.config.strict_yaml import dump
from anarchobot.runs import checkpoint
from anarchobot.storage.durable import write_atomic
from anarchobot.storage.free_space import require_space
from anarchobot.tokenizers.tokenizer import Tokenizer, copy_tokenizer, digest


def write_model(
    folder: Path,
    config: Config,
    tokenizer: Tokenizer,
    weights: Mapping[str, npt.NDArray[np.float32]],
    origin: Mapping[str, Any],
    save_dir: Path | None = None,
) -> Config:
    """Writes the tokenizer, config.yaml and a checkpoint of step 0 to an existing folder; returns the written config.

    `origin` is stored in state.json and says where the model comes from, for example `{"imported": "PATH"}`. `save_dir`
    is the path recorded in the config, if `folder` will be renamed later. Training starts from these weights, so the
    config's `init_from` and `checkpoint_path` are dropped. Raises OSError if the weights do not fit on the disk, and
    UserError if one is not finite.
    """
    require_space(folder, sum(array.nbytes for array in weights.values()))
    save_dir = save_dir or folder
    paths = {"save_dir": str(save_dir), "tokenizer_path": str(save_dir / copy_tokenizer(tokenizer, folder))}
    train = config.train.model_copy(update={**paths, "init_from": None, "checkpoint_path": None})
    config = config.model_copy(update={"train": train})
    write_atomic(folder / "config.yaml", dump(config.model_dump()))
    arrays = {f"{checkpoint.PARAMS}{name}": array for name, array in weights.items()}
    state = {"tokens": 0, "tokenizer": digest(tokenizer), **origin, "config": config.model_dump()}
    try:
        checkpoint.save(folder, 0, arrays, state)
    except FloatingPointError as error:
        raise UserError(f"{save_dir}: not written: {error}: its sources are damaged: copy them again") from error
    return config
