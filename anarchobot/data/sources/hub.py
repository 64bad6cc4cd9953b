"""Hugging Face datasets by name, streamed. The `datasets` package is an extra: `pip install datasets`."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources.files import SUFFIXES


def is_hub_name(dataset: str) -> bool:
    """Whether this is a dataset's name (`allenai/c4`) and not a path: nothing lies there, and no path marks."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset)) and not (
        Path(dataset).exists() or dataset.endswith(SUFFIXES) or dataset.startswith(".")
    )


def rows(name: str, data: DataConfig, seed: int, *, suggest_fallback: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of a dataset; shuffled through a buffer of `data.shuffle_buffer` rows when it is streamed.

    `name` is a hub name, or a local folder in the hub's layout. Raises UserError when the package is missing or the
    dataset can't be loaded, before the first row is given out; and later, when the network breaks off. `suggest_fallback`:
    whether data.fallback can take its place, as it can documents'.
    """
    stream = _stream(name, data, seed, ", or set data.fallback: builtin" if suggest_fallback else "")
    first = next(stream, None)
    if first is None:
        raise UserError(f"data.dataset: '{name}' has no rows in split '{data.split}'")
    return chain([first], stream)


def _stream(name: str, data: DataConfig, seed: int, otherwise: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.dataset: '{name}' is no file here, and a Hugging Face dataset needs: pip install datasets"
        ) from error
    try:
        loaded = datasets.load_dataset(
            name, data.config, split=data.split, streaming=data.streaming, cache_dir=data.cache_dir
        )
        if data.streaming and data.shuffle_buffer:
            loaded = loaded.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
        yield from loaded
    except Exception as error:  # the package raises its own, its network library's and plain ones
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"data.dataset: '{name}' is no file here, and as a Hugging Face dataset it can't be read ({reason}): check "
            f"the name and the network{otherwise}"
        ) from error
