"""Rows of every format to conversations and pairs; invalid rows are counted by reason, with place and detail."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.tokenizers.conversation import Message
from tests.data.conversations.rows import ANSWER, MESSAGES, QUESTION, TWO, jsonl, read, read_pairs

OASST = {"user_id": "u", "lang": "en", "deleted": False, "rank": None, "review_result": True, "tree_state": "ready"}
FORMATS: dict[str, tuple[Any, Any]] = {
    "ultrachat": ({"prompt": QUESTION, "prompt_id": "1", "messages": MESSAGES}, TWO),
    "messages with extra fields": ({"messages": [{**m, "name": "n"} for m in MESSAGES], "source": 1}, TWO),
    "messages with a system message": (
        {"messages": [{"role": "system", "content": "Be."}, *MESSAGES]},
        (("system", "Be."), *TWO),
    ),
    "messages with a system field": ({"system": "Be.", "messages": MESSAGES}, (("system", "Be."), *TWO)),
    "messages with a system message and field": (
        {"system": "Row's.", "messages": [{"role": "system", "content": "Be."}, *MESSAGES]},
        (("system", "Be."), *TWO),
    ),
    "messages with a blank system": ({"messages": [{"role": "system", "content": " \n"}, *MESSAGES]}, TWO),
    "sharegpt with a blank system": (
        {"system": "", "conversations": [{"from": "system", "value": ""}, *MESSAGES]},
        TWO,
    ),
    "sharegpt": (
        {"id": "x", "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        TWO,
    ),
    "sharegpt with a system": (
        {
            "system": "Be.",
            "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}],
        },
        (("system", "Be."), *TWO),
    ),
    "sharegpt with role and content": ({"conversations": MESSAGES}, TWO),
    "alpaca": ({"instruction": QUESTION, "input": "", "output": ANSWER}, TWO),
    "alpaca with an input": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        (("user", "Add.\n1 2"), ("assistant", "3")),
    ),
    "alpaca with a history": (
        {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]},
        (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    ),
    "dolly": ({"instruction": "a", "context": "b", "response": "c"}, (("user", "a\nb"), ("assistant", "c"))),
    "prompt and completion": ({"prompt": QUESTION, "completion": ANSWER}, TWO),
    "prompt and completion in messages": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, TWO),
    "gsm8k": ({"question": QUESTION, "answer": ANSWER}, TWO),
    "text": ({"text": " A document.\n"}, (("text", " A document.\n"),)),
    "oasst rows": (
        [
            {**OASST, "message_id": "2", "parent_id": "1", "role": "assistant", "text": ANSWER},
            {**OASST, "message_id": "1", "parent_id": None, "role": "prompter", "text": QUESTION},
        ],
        TWO,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_detected_from_field_names(tmp_path: Path, name: str) -> None:
    row, expected = FORMATS[name]
    rows = row if isinstance(row, list) else [row]
    found, counts = read(jsonl(tmp_path / "data.jsonl", *rows))
    assert found == [expected] and not counts.skipped
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert read(tmp_path / "data.json")[0] == [expected]


INVALID = {  # reason: row and detail
    "missing field": ({"messages": None, "other": 1}, "no 'messages'; the row has messages, other"),
    "field is not a list": ({"messages": "hi"}, "str in 'messages'"),
    "empty conversation": ({"messages": []}, ""),
    "turn is not an object": ({"messages": ["hi"]}, "str in 'messages', turn 1"),
    "unknown role": ({"messages": [{"role": "bot", "content": "a"}]}, "'bot' in 'messages', turn 1; expected one of"),
    "content is not text": ({"messages": [{"role": "user", "content": 1}]}, "int in 'messages', turn 1"),
    "empty content": ({"messages": [MESSAGES[0], {"role": "assistant", "content": " \n"}]}, "'messages', turn 2"),
    "roles out of order": ({"messages": MESSAGES[::-1]}, "turn 1 has role assistant, expected user"),
    "does not end with the assistant": ({"messages": MESSAGES[:1]}, "the last turn has role user"),
    "not UTF-8": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', ""),
}


@pytest.mark.parametrize("reason", INVALID)
def test_invalid_rows_are_counted_and_the_first_is_located(tmp_path: Path, reason: str) -> None:
    row, detail = INVALID[reason]
    path = jsonl(tmp_path / "data.jsonl", {"messages": MESSAGES}, row, {"messages": MESSAGES}, row)
    found, counts = read(path)
    if reason == "not UTF-8":  # rejected by the JSON parser
        assert counts.skipped == {"malformed row": 2} and len(found) == 2
        return
    assert len(found) == 2 and counts.skipped == {reason: 2}
    expected = f"{path}:2: {reason} ({detail}" if detail else f"{path}:2: {reason}"
    assert counts.first_skipped[reason].startswith(expected)
    assert counts.summary()[0] == "4 rows read, 2 kept"
    assert counts.summary()[1] == f"skipped 2: {counts.first_skipped[reason]}"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "input": "", "output": ""},
        {"instruction": " ", "input": "", "output": "c"},
        {"instruction": "a", "input": ["b"], "output": "c"},
        {"instruction": "a", "input": "b", "output": "c", "history": ["ab"]},
        {"instruction": "a", "input": "b", "output": "c", "history": 5},
        {"instruction": "a", "input": "b", "output": "c", "history": {"ab": 1}},
        {"instruction": 3, "input": "b", "output": "c"},
        {"instruction": "a", "input": "b", "output": None},
    ],
)
def test_invalid_alpaca_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    good = {"instruction": "a", "input": "", "output": "b"}
    found, counts = read(jsonl(tmp_path / "data.jsonl", good, row))
    assert len(found) == 1 and counts.skipped.total() == 1, found


def test_format_is_detected_once_per_file(tmp_path: Path) -> None:
    """From the first row with known fields; rows before it are counted as invalid."""
    path = jsonl(tmp_path / "data.jsonl", "{", {"x": 1}, {"messages": MESSAGES}, {"conversations": MESSAGES})
    found, counts = read(path)
    assert found == [TWO] and counts.skipped == {"malformed row": 1, "unknown fields": 1, "missing field": 1}
    assert counts.first_skipped["unknown fields"] == f"{path}:2: unknown fields (the row has x)"
    other = jsonl(tmp_path / "other.jsonl", {"conversations": MESSAGES})
    assert len(read(path, other)[0]) == 2, "detected per file"


def test_format_can_be_set(tmp_path: Path) -> None:
    ambiguous = {"messages": MESSAGES, "prompt": "Other?", "completion": "Other."}
    path = jsonl(tmp_path / "data.jsonl", ambiguous)
    assert read(path)[0] == [TWO]
    assert read(path, format="prompt_completion")[0] == [(("user", "Other?"), ("assistant", "Other."))]
    assert read(path, format="alpaca")[1].skipped == {"missing field": 1}


# Preferences

QUESTION_TURN = {"role": "user", "content": "Why?"}
GOOD_TURN, BAD_TURN = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
SYSTEM_TURN = {"role": "system", "content": "Be."}
HH = "\n\nHuman: Hi.\n\nAssistant: Hello!\nYou?\n\nHuman: Why?\n\nAssistant:"
PAIR = ((("user", "Why?"),), "Because.", "No.")

PAIR_FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "texts": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, PAIR),
    "ultrafeedback": (
        {
            "prompt": "Why?",
            "chosen": [QUESTION_TURN, GOOD_TURN],
            "rejected": [QUESTION_TURN, BAD_TURN],
            "messages": [QUESTION_TURN, GOOD_TURN],
            "score_chosen": 8.0,
        },
        PAIR,
    ),
    "messages without a prompt": ({"chosen": [QUESTION_TURN, GOOD_TURN], "rejected": [QUESTION_TURN, BAD_TURN]}, PAIR),
    "prompt of messages": (
        {"prompt": [SYSTEM_TURN, QUESTION_TURN], "chosen": [GOOD_TURN], "rejected": [BAD_TURN]},
        ((("system", "Be."), *PAIR[0]), *PAIR[1:]),
    ),
    "system field": (
        {"system": "Be.", "question": "Why?", "chosen": "Because.", "rejected": "No."},
        ((("system", "Be."), *PAIR[0]), *PAIR[1:]),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Because."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        PAIR,
    ),
    "several turns": (
        {
            "chosen": [QUESTION_TURN, BAD_TURN, QUESTION_TURN, GOOD_TURN],
            "rejected": [QUESTION_TURN, BAD_TURN, QUESTION_TURN, BAD_TURN],
        },
        ((("user", "Why?"), ("assistant", "No."), ("user", "Why?")), "Because.", "No."),
    ),
    "hh": (
        {"chosen": HH + " Because.", "rejected": HH + " No.\n"},
        ((("user", "Hi."), ("assistant", "Hello!\nYou?"), ("user", "Why?")), "Because.", "No."),
    ),
}


@pytest.mark.parametrize("name", PAIR_FORMATS)
def test_preference_formats(tmp_path: Path, name: str) -> None:
    row, expected = PAIR_FORMATS[name]
    found, _ = read_pairs(jsonl(tmp_path / "pairs.jsonl", row))
    assert found == [expected] and isinstance(found[0].prompt[0], Message)


INVALID_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "identical": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical answers"),
    "identical except for whitespace": ({"prompt": "a", "chosen": "b", "rejected": "b \n"}, "identical answers"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "missing field"),
    "empty": ({"prompt": "a", "chosen": " ", "rejected": "b"}, "empty content"),
    "empty prompt": ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty content"),
    "different types": ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "answers have different types"),
    "numbers": ({"prompt": "a", "chosen": 1, "rejected": 2}, "answers have different types"),
    "lists of texts": ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "turn is not an object"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "missing prompt"),
    "only answers": ({"chosen": [GOOD_TURN], "rejected": [BAD_TURN]}, "roles out of order"),
    "two questions": (
        {"chosen": [QUESTION_TURN, GOOD_TURN], "rejected": [{**QUESTION_TURN, "content": "How?"}, BAD_TURN]},
        "answers to different prompts",
    ),
    "ends with the user": (
        {"chosen": [QUESTION_TURN, GOOD_TURN, QUESTION_TURN], "rejected": [QUESTION_TURN, BAD_TURN]},
        "does not end with the assistant",
    ),
    "hh out of order": ({"chosen": HH + " a\n\nAssistant: b", "rejected": HH + " c"}, "roles out of order"),
    "hh empty": ({"chosen": HH, "rejected": HH + " c"}, "empty content"),
    "hh of different lengths": (
        {"chosen": HH + " a\n\nHuman: b\n\nAssistant: c", "rejected": HH + " d"},
        "answers to different prompts",
    ),
}


@pytest.mark.parametrize("name", INVALID_PAIRS)
def test_invalid_pairs_are_counted(tmp_path: Path, name: str) -> None:
    row, reason = INVALID_PAIRS[name]
    path = jsonl(tmp_path / "pairs.jsonl", {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, row)
    found, counts = read_pairs(path)
    assert found == [PAIR] and counts.skipped == {reason: 1}
    assert counts.first_skipped[reason].startswith(f"{path}:2: {reason}")
