"""Hugging Face datasets by name, streamed. The `datasets` package is optional: `pip install datasets`."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources.files import JSON, SUFFIXES


def is_hub_name(dataset: str) -> bool:
    """Whether this looks like a dataset's name (`allenai/c4`) and not like a path: no such file exists."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset)) and not (
        Path(dataset).exists() or dataset.lower().endswith(SUFFIXES + JSON) or dataset.startswith(".")
    )


def rows(name: str, data: DataConfig, seed: int, *, suggest_fallback: bool = True) -> Iterator[dict[str, Any]]:
    """The rows of a dataset; when streamed, shuffled through a buffer of `data.shuffle_buffer` rows.

    `name` is a Hub name, or a local folder in the Hub's layout. Raises UserError before the first row when the package
    is missing or the dataset can't be loaded, and later when the network fails. `suggest_fallback`: mention
    data.fallback in errors.
    """
    hint = ", or set data.fallback: builtin" if suggest_fallback else ""
    stream = _stream(name, data, seed, hint)
    first = next(stream, None)
    if first is None:
        raise UserError(f"data.dataset: '{name}' has no rows in split '{data.split}'")
    return chain([first], stream)


def _stream(name: str, data: DataConfig, seed: int, hint: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.dataset: '{name}' is not a local file, and Hugging Face datasets need: pip install datasets"
        ) from error
    try:
        loaded = datasets.load_dataset(
            name, data.config, split=data.split, streaming=data.streaming, cache_dir=data.cache_dir
        )
        if data.streaming and data.shuffle_buffer:
            loaded = loaded.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
        yield from loaded
    except Exception as error:  # the package raises its own, its network library's and built-in exceptions
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"data.dataset: '{name}' is not a local file and can't be read as a Hugging Face dataset ({reason}): check "
            f"the name and the network{hint}"
        ) from error
