"""Verifiable rewards of GRPO: what a completion earns, given the answer in the data."""

import importlib
import importlib.util
import math
import re
import traceback
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GRPOConfig
from anarchobot.system.packages import PACKAGE
from anarchobot.tokenizers.conversation import Conversation, InvalidRow

# One value per completion, from the prompts, the texts of the completions, and the answers.
Reward = Callable[[Sequence[Conversation], Sequence[str], Sequence[Any]], Sequence[float]]

# Not the minus of 5-3; thousands may be separated by commas.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")


class Rewards:
    """The rewards that `settings` name. `needs_answer`: whether one of them compares with the answer."""

    def __init__(self, settings: GRPOConfig) -> None:
        """Raises UserError for a pattern, schema or function that can't be used. Runs the function's file."""
        self.names = list(settings.rewards or ())
        self._weights = settings.reward_weights or [1.0] * len(self.names)
        pattern = _compile(settings.regex) if settings.regex is not None else None
        self.needs_answer = bool({"exact_match", "number"} & set(self.names)) or bool(pattern and pattern.groups)
        found: dict[str, Reward] = {"exact_match": _each(exact_match), "number": _each(same_number)}
        if pattern is not None:
            found["regex"] = _each(lambda text, answer: matches(pattern, text, answer))
        if settings.json_schema is not None:
            is_valid = json_schema(settings.json_schema)
            found["json_schema"] = _each(lambda text, answer: is_valid(text))
        if settings.function is not None:
            found["function"] = load_function(settings.function)
        self._rewards = [found[name] for name in self.names]

    def __call__(
        self, prompts: Sequence[Conversation], completions: Sequence[str], answers: Sequence[Any]
    ) -> npt.NDArray[np.float64]:
        """The value of each reward, [completions, rewards]."""
        return np.array([reward(prompts, completions, answers) for reward in self._rewards], np.float64).T

    def total(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The weighted sums [completions] of values [completions, rewards]."""
        total: npt.NDArray[np.float64] = values @ np.array(self._weights)
        return total

    def check_answer(self, answer: Any) -> None:
        """Raises InvalidRow for an answer that no completion could match."""
        if not self.needs_answer:
            return
        if answer is None:
            raise InvalidRow("no answer", "grpo.rewards compares completions with it")
        if not isinstance(answer, str | int | float):
            raise InvalidRow("answer is not text or a number", type(answer).__name__)
        if not str(answer).strip():
            raise InvalidRow("empty answer")
        if "number" in self.names and last_number(str(answer)) is None:
            raise InvalidRow("no number in the answer", repr(str(answer)[:60]))


def without_function(settings: GRPOConfig) -> GRPOConfig:
    """The settings without the reward that runs code."""
    names = [name for name in settings.rewards or () if name != "function"]
    return settings.model_copy(update={"rewards": names, "function": None})


def _each(reward: Callable[[str, str], bool]) -> Reward:
    return lambda prompts, completions, answers: [
        float(reward(text, str(answer))) for text, answer in zip(completions, answers, strict=True)
    ]


def exact_match(text: str, answer: str) -> bool:
    """Whether they are equal, except for whitespace around them."""
    return text.strip() == answer.strip()


def same_number(text: str, answer: str) -> bool:
    """Whether the last numbers in both are equal: 1,234.50 is 1234.5."""
    number = last_number(text)
    return number is not None and number == last_number(answer)


def last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def matches(pattern: re.Pattern[str], text: str, answer: str) -> bool:
    """Whether the pattern is found; if it has a group, whether the first group of its last match is the answer."""
    found = list(pattern.finditer(text))
    if not found or not pattern.groups:
        return bool(found)
    return exact_match(found[-1][1] or "", answer)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"grpo.regex: {error}: {pattern}") from error


def json_schema(file: str) -> Callable[[str], bool]:
    """Whether a text is JSON that satisfies the schema in `file`. Raises UserError if that can't be read, or without
    the package jsonschema."""
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise UserError(f"grpo.json_schema requires jsonschema: pip install '{PACKAGE}[jsonschema]'") from error
    try:
        schema = orjson.loads(Path(file).read_bytes())
        validator = validator_for(schema)
        validator.check_schema(schema)
    except OSError as error:
        raise UserError(f"grpo.json_schema: {file}: cannot read: {error.strerror}") from error
    except (ValueError, SchemaError) as error:
        message = getattr(error, "message", error)
        raise UserError(f"grpo.json_schema: {file}: not a JSON Schema: {message}") from error

    def is_valid(text: str) -> bool:
        try:
            return bool(validator(schema).is_valid(orjson.loads(text)))
        except ValueError:
            return False

    return is_valid


def load_function(name: str) -> Reward:
    """The function FILE.py:FUNCTION or MODULE:FUNCTION. It is called with the keywords of TRL's reward functions:
    `prompts` (lists of messages), `completions` (texts) and `answer`, all lists, and returns a list of numbers.

    Runs the file or module. Raises UserError if there is no such function, or it fails or returns anything else.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise UserError(f"grpo.function: '{name}': expected FILE.py:FUNCTION or MODULE:FUNCTION")
    try:
        module = _run_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        raise UserError(f"grpo.function: {where}: {_last_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"grpo.function: {where}: has no function '{attribute}'")

    def reward(prompts: Sequence[Conversation], completions: Sequence[str], answers: Sequence[Any]) -> list[float]:
        messages = [[{"role": m.role, "content": m.content, **m.fields} for m in prompt] for prompt in prompts]
        try:
            values = function(prompts=messages, completions=list(completions), answer=list(answers))
        except Exception as error:
            raise UserError(f"grpo.function: {name}: {_last_line(error)}") from error
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(completions) or not all(map(math.isfinite, numbers)):
            raise UserError(
                f"grpo.function: {name}: expected a list of {len(completions)} finite numbers, got {str(values)[:60]}"
            )
        return numbers

    return reward


def _run_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _last_line(error: Exception) -> str:
    """The error, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{place}"
