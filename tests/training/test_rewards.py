"""What completions earn."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GRPOConfig
from anarchobot.tokenizers.conversation import InvalidRow, Message
from anarchobot.training.rewards import Rewards, exact_match, last_number, load_function, without_function

PROMPT = (Message("user", "How many?"),)


def rewards(*names: str, **settings: Any) -> Rewards:
    return Rewards(GRPOConfig.model_validate({"rewards": list(names), **settings}))


def earned(found: Rewards, texts: list[str], answer: Any = None) -> list[float]:
    values: list[float] = found.total(found([PROMPT] * len(texts), texts, [answer] * len(texts))).tolist()
    return values


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so she earns $1,234.50.", "1234.5"), ("5-3=2", "2"), ("it is 5-3", "3"), ("x=-7", "-7"), ("-7", "-7"),
        ("(4)-3", "3"), ("1, 2", "2"), (".5", "0.5"), ("2.", "2"), ("1e3", "1000"), ("none", None), ("", None),
        ("18 apples", "18"), ("1e999999999", "99999"), ("١٢", None),
    ],
)  # fmt: skip
def test_last_number(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (None if found is None else format(found.normalize(), "f")) == number


def test_number_compares_the_last_numbers() -> None:
    found = rewards("number")
    assert earned(found, ["72", "48 + 24 = 72.0", "72 or 73", "many"], "72") == [1, 1, 0, 0]
    assert earned(found, ["1,000"], 1000) == [1]
    for answer, reason in ((None, "no answer"), ("many", "no number in the answer"), ([1], "not text"), (" ", "empty")):
        with pytest.raises(InvalidRow, match=reason):
            found.check_answer(answer)


def test_exact_match_ignores_only_whitespace_around_it() -> None:
    assert exact_match(" Paris\n", "Paris") and not exact_match("paris", "Paris") and not exact_match("Paris.", "Paris")
    assert earned(rewards("exact_match"), ["7", "7.0"], 7) == [1, 0]


def test_regex_is_searched_or_compares_its_group_with_the_answer() -> None:
    form = rewards("regex", regex=r"<think>.*</think>")
    assert earned(form, ["<think>a\nb</think> 3", "3"]) == [1, 0] and not form.needs_answer
    form.check_answer(None)
    boxed = rewards("regex", regex=r"\\boxed\{([^}]*)\}")
    assert boxed.needs_answer
    assert earned(boxed, [r"\boxed{2} no, \boxed{ 3 }", r"\boxed{2}", "3"], "3") == [1, 0, 0]
    with pytest.raises(UserError, match=r"grpo.regex: .*unterminated"):
        rewards("regex", regex="(")


def test_json_schema(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "maxLength": 3}}}
    file.write_text(json.dumps(schema))
    found = rewards("json_schema", json_schema=str(file))
    texts = [' {"name": "Ada"}\n', '{"name": "Grace"}', '{"name": 3}', "{}", "[NaN]", '{"name": "Ada"', "[" * 5000]
    assert earned(found, texts) == [1, 0, 0, 0, 0, 0, 0] and not found.needs_answer
    for text, problem in (('{"type": 3}', "not a JSON Schema"), ("{", "not a JSON Schema")):
        file.write_text(text)
        with pytest.raises(UserError, match=problem):
            rewards("json_schema", json_schema=str(file))
    with pytest.raises(UserError, match="cannot read"):
        rewards("json_schema", json_schema=str(tmp_path / "missing.json"))


def test_function_gets_prompts_completions_and_answers(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(prompts, completions, answer, **others):\n"
        "    assert prompts[0] == [{'role': 'user', 'content': 'How many?'}]\n"
        "    return [len(c) / a['most'] for c, a in zip(completions, answer)]\n"
        "def short(**columns):\n    return [1.0]\n"
        "def failing(**columns):\n    return 1 / 0\n"
        "number = 3\n"
    )
    assert earned(rewards("function", function=f"{file}:score"), ["abc", ""], {"most": 4}) == [0.75, 0]
    for name, problem in (
        ("short", r"expected a list of 2 finite numbers, got \[1.0\]"),
        ("failing", r"ZeroDivisionError: division by zero \(.*mine.py:7\)"),
        ("number", "has no function 'number'"),
        ("missing", "has no function 'missing'"),
    ):
        with pytest.raises(UserError, match=problem):
            earned(rewards("function", function=f"{file}:{name}"), ["a", "b"])
    for name, problem in (
        ("mine", "expected FILE.py:FUNCTION"),
        (f"{tmp_path}/none.py:f", "none.py: FileNotFoundError"),
        ("no_such_module:f", "no_such_module: ModuleNotFoundError"),
    ):
        with pytest.raises(UserError, match=problem):
            load_function(name)
    file.write_text("raise SystemError('no')")
    assert without_function(GRPOConfig(rewards=["number", "function"], function=f"{file}:f")).rewards == ["number"]


def test_several_rewards_are_summed_by_weight() -> None:
    found = rewards("number", "regex", regex="#", reward_weights=[1.0, -0.25])
    assert earned(found, ["# 3", "3", "# 4"], "3") == [0.75, 1, -0.25]
    assert found([PROMPT], ["# 4"], ["3"]).tolist() == [[0, 1]]
