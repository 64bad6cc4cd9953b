"""Rows of every format to conversations and pairs; invalid rows are counted by reason, with place and detail."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.tokenizers.conversation import LabeledConversation
from tests.data.conversations.rows import ANSWER, MESSAGES, QUESTION, TWO, jsonl, read, read_labeled, read_pairs

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
    "alpaca with an input and a context": (
        {"instruction": "a", "input": "b", "context": "c", "output": "d"},
        (("user", "a\nb\nc"), ("assistant", "d")),
    ),
    "dolly": ({"instruction": "a", "context": "b", "response": "c"}, (("user", "a\nb"), ("assistant", "c"))),
    "prompt and completion": ({"prompt": QUESTION, "completion": ANSWER}, TWO),
    "prompt and completion in messages": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, TWO),
    "gsm8k": ({"question": QUESTION, "answer": ANSWER}, TWO),
    "squad": (
        {"question": QUESTION, "context": "Rain fell.", "answer": ANSWER, "title": "Rain"},
        (("user", f"{QUESTION}\nRain fell."), ("assistant", ANSWER)),
    ),
    "pubmedqa": (
        {"question": QUESTION, "context": {"contexts": ["a", "b"], "labels": ["AIM", "END"]}, "answer": ANSWER},
        (("user", f"{QUESTION}\na\nb"), ("assistant", ANSWER)),
    ),
    "abstract": (
        {"question": QUESTION, "context": [], "abstract": "a", "answer": ANSWER},
        (("user", f"{QUESTION}\na"), ("assistant", ANSWER)),
    ),
    "orca": (
        {"system_prompt": "Be.", "question": QUESTION, "response": ANSWER, "system": ""},
        (("system", "Be."), *TWO),
    ),
    "alpaca with a system message": (
        {"system_message": "Be.", "instruction": QUESTION, "answer": ANSWER},
        (("system", "Be."), *TWO),
    ),
    "query and response": ({"query": QUESTION, "response": ANSWER, "context": " "}, TWO),
    "input and output": ({"system": "Be.", "input": QUESTION, "output": ANSWER}, (("system", "Be."), *TWO)),
    "text with an input and output": ({"text": "a", "input": QUESTION, "output": ANSWER}, (("text", "a"),)),
    "content as text parts": (
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": " "}]},
                {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
            ]
        },
        TWO,
    ),
    "prompt as text parts": ({"prompt": [{"type": "text", "text": QUESTION}], "completion": ANSWER}, TWO),
    "roles in any letter case": (
        {"conversations": [{"from": "System", "value": " "}, {"from": "Human", "value": QUESTION}, MESSAGES[1]]},
        TWO,
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be."}, *MESSAGES], "system": "Be not."},
        (("system", "Be."), *TWO),
    ),
    **{
        role: ({"conversations": [{"from": "user", "value": QUESTION}, {"from": role, "value": ANSWER}]}, TWO)
        for role in ("chatgpt", "bing", "bard", "model", "Assistant", "GPT")
    },
    "answers in the loss": (
        {"messages": [{**MESSAGES[0], "weight": 0, "train": False}, {**MESSAGES[1], "weight": 1, "train": True}]},
        TWO,
    ),
    "good answer": ({"messages": MESSAGES, "label": True, "images": [], "tools": None}, TWO),
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
    "field is null": ({"messages": None, "other": 1}, "'messages'"),
    "missing field": ({"other": 1}, "no 'messages'; the row has other"),
    "field is not a list": ({"messages": "hi"}, "str in 'messages'"),
    "empty conversation": ({"messages": []}, ""),
    "turn is not an object": ({"messages": ["hi"]}, "str in 'messages', turn 1"),
    "unknown role": ({"messages": [{"role": "bot", "content": "a"}]}, "'bot' in 'messages', turn 1; expected one of"),
    "content is not text": ({"messages": [{"role": "user", "content": 1}]}, "int in 'messages', turn 1"),
    "empty content": ({"messages": [MESSAGES[0], {"role": "assistant", "content": " \n"}]}, "'messages', turn 2"),
    "field can't be used": ({"messages": MESSAGES, "audio": "a.wav"}, "'audio'"),
    "malformed tool call": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "tool_calls": [{"id": "c1"}]}]},
        "'tool_calls' of 'messages', turn 2: expected an object with a name, got",
    ),
    "weight is not 0 or 1": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0.5}]},
        "weight: 0.5 in 'messages', turn 2",
    ),
    "bad answer": ({"messages": MESSAGES, "label": False}, "label: false"),
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
    assert counts.summary()[1] == f"skipped 2: {counts.first_skipped[reason]}; also {path}:4"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": QUESTION, "completion": ANSWER, "label": False}, "bad answer (label: false)"),
        ({"messages": MESSAGES, "kto_tag": False}, "bad answer (kto_tag: false)"),
        ({"messages": MESSAGES, "images": ["a.png"]}, "field can't be used ('images')"),
        ({"instruction": "What is this?", "output": "A cat.", "image": "a.png"}, "field can't be used ('image')"),
        (
            {"messages": [{**MESSAGES[0], "images": ["a.png"]}, MESSAGES[1]]},
            "field can't be used ('images' in 'messages', turn 1)",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, MESSAGES[1]]},
            "content is not text (list with a part of type 'image_url' in 'messages', turn 1)",
        ),
        (
            {"messages": [MESSAGES[0], {"role": "assistant", "content": [{"type": "thinking", "text": "Hm."}]}]},
            "content is not text (list with a part of type 'thinking' in 'messages', turn 2)",
        ),
        ({"question": QUESTION, "context": 3, "answer": ANSWER}, "content is not text ('context' or 'abstract')"),
    ],
)
def test_rows_that_would_teach_something_else_are_skipped(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    """Bad answers, and answers about images."""
    path = jsonl(tmp_path / "data.jsonl", row)
    found, counts = read(path)
    assert found == [] and list(counts.first_skipped.values()) == [f"{path}:1: {expected}"]


UNUSED = {
    "reasoning of a row": ({"question": QUESTION, "answer": ANSWER, "reasoning": "Hm."}, "'reasoning'"),
    "last question": ({"messages": [*MESSAGES, MESSAGES[0]]}, "the user's last message, which has no answer"),
    "last questions": (
        {"prompt": MESSAGES[:1], "completion": [MESSAGES[1], MESSAGES[0], MESSAGES[0]]},
        "the user's last message, which has no answer",
    ),
    "nothing": ({"messages": MESSAGES, "tools": "[]", "reasoning_content": None, "thinking": ""}, None),
}


@pytest.mark.parametrize("name", UNUSED)
def test_unused_parts_of_kept_rows_are_counted_and_named(tmp_path: Path, name: str) -> None:
    row, part = UNUSED[name]
    path = jsonl(tmp_path / "data.jsonl", row, {"messages": []}, *[row] * 3)
    found, counts = read(path)
    assert found == [TWO] * 4
    if part is None:
        assert counts.unused == {}
        return
    assert counts.unused == {part: 4}
    assert counts.summary()[-1] == f"not used in 4 rows: {part} ({path}:1, {path}:3, {path}:4, ...)"


OTHER_FIELDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "messages": (
        {"messages": [{**MESSAGES[0], "name": "Ann"}, {**MESSAGES[1], "refusal": None, "train_detail": [{"train": 0}]}],
         "context": "Rain.", "id": 1, "score": 0, "label": True, "system": "", "tools": "[]"},
        ["'context'", "'id'", "'name' of messages", "'train_detail' of messages"],
    ),
    "sharegpt": ({"conversations": MESSAGES, "prompt": QUESTION, "label": 1}, ["'prompt'", "'label'"]),
    "alpaca": ({"instruction": "Why", "input": "?", "output": ANSWER, "rejected": "No."}, ["'rejected'"]),
    "question": ({"question": QUESTION, "options": ["a"], "cot": "Hm.", "answer": ANSWER}, ["'options'", "'cot'"]),
    "escaped": ({"query": QUESTION, "output": ANSWER, "\x1b[2J": 1}, ["'\\x1b[2J'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FIELDS)
def test_other_fields_that_are_not_used_are_counted_and_named(tmp_path: Path, name: str) -> None:
    row, fields = OTHER_FIELDS[name]
    _, counts = read(jsonl(tmp_path / "data.jsonl", row, {"messages": []}, row))
    assert counts.kept == 2 and counts.other_fields == dict.fromkeys(fields, 2) and not counts.unused
    assert counts.summary()[-1] == f"other fields not used: {', '.join(f'{field} in 2 rows' for field in fields)}"


def test_many_other_fields_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    row = {"messages": MESSAGES, **{f"f{i}": 1 for i in range(1022)}}
    _, counts = read(jsonl(tmp_path / "data.jsonl", row))
    assert counts.summary()[-1].endswith(", 'f18' in 1 rows, 'f19' in 1 rows, and 1,002 more")


def test_up_to_three_lines_of_each_kind_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", {"messages": MESSAGES}, *[{"messages": []}] * 5, "{")
    assert read(path)[1].summary() == [
        "7 rows read, 1 kept",
        f"skipped 5: {path}:2: empty conversation; also {path}:3, {path}:4",
        f"skipped 1: {path}:7: not valid JSON: unexpected end of data (character 3)",
    ]


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
    "roles in capitals and text parts": (
        {
            "chosen": [
                {**QUESTION_TURN, "role": "User"},
                {"role": "model", "content": [{"type": "text", "text": "Because."}]},
            ],
            "rejected": [QUESTION_TURN, BAD_TURN],
        },
        PAIR,
    ),
    "hh": (
        {"chosen": HH + " Because.", "rejected": HH + " No.\n"},
        ((("user", "Hi."), ("assistant", "Hello!\nYou?"), ("user", "Why?")), "Because.", "No."),
    ),
    "hh with a system prompt": (
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
            "system": "Be.",
        },
        ((("system", "Be."), *PAIR[0]), *PAIR[1:]),
    ),
}


@pytest.mark.parametrize("name", PAIR_FORMATS)
def test_preference_formats(tmp_path: Path, name: str) -> None:
    row, expected = PAIR_FORMATS[name]
    found, _ = read_pairs(jsonl(tmp_path / "pairs.jsonl", row))
    assert found == [expected]


INVALID_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "image": ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["a.png"]}, "field can't be used"),
    "tool call": (
        {"chosen": [QUESTION_TURN, {**GOOD_TURN, "tool_calls": [1]}], "rejected": [QUESTION_TURN, BAD_TURN]},
        "malformed tool call",
    ),
    "excluded": (
        {"prompt": "a", "chosen": {**GOOD_TURN, "weight": 0}, "rejected": BAD_TURN},
        "answer excluded from the loss",
    ),
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


def test_other_fields_of_pairs_are_counted(tmp_path: Path) -> None:
    row = {"question": "Why?", "chosen": "Because.", "rejected": "No.", "messages": [QUESTION_TURN], "source": "x"}
    found, counts = read_pairs(jsonl(tmp_path / "pairs.jsonl", row))
    assert found == [PAIR] and counts.other_fields == {"'messages'": 1, "'source'": 1}


# Judged pairs


LLMBAR = {"input": "Why?", "output_1": "No.", "output_2": "Because.", "label": 2}
PANDALM = {
    "instruction": "Why?", "input": "", "response1": "Because.", "response2": "No.", "annotator1": 1, "annotator2": 0,
    "annotator3": 1,
}  # fmt: skip
JUDGED: dict[str, dict[str, Any]] = {
    "llmbar": LLMBAR,
    "llmbar, the first": {**LLMBAR, "output_1": "Because.", "output_2": "No.", "label": 1},
    "pandalm": PANDALM,
    "pandalm, the second": {
        **PANDALM, "response1": "No.", "response2": "Because.", "annotator1": 2, "annotator2": 2, "annotator3": 2
    },
    "pandalm, one judge": {"instruction": "Why?", "response1": "Because.", "response2": "No.", "label": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", JUDGED)
def test_judged_pairs(tmp_path: Path, name: str) -> None:
    found, counts = read_pairs(jsonl(tmp_path / "pairs.jsonl", {**JUDGED[name], "idx": 1}))
    assert found == [PAIR] and counts.other_fields == {"'idx'": 1}


def test_input_of_pandalm_follows_the_instruction(tmp_path: Path) -> None:
    found, _ = read_pairs(jsonl(tmp_path / "pairs.jsonl", {**PANDALM, "input": "Is it so?"}))
    assert found[0][0][0][1] == "Why?\nIs it so?"


INVALID_JUDGED: dict[str, tuple[dict[str, Any], str]] = {
    "tie": ({**PANDALM, "annotator1": 0}, "tie"),
    "no majority": ({**PANDALM, "annotator3": 2}, "tie"),
    "two judges": ({**PANDALM, "annotator2": 2, "annotator3": None}, "tie"),
    "llmbar, no answer is better": ({**LLMBAR, "label": 0}, "tie"),
    "unknown preference": ({**LLMBAR, "label": "first"}, "preference is not 0, 1 or 2"),
    "no preference": ({**LLMBAR, "label": None}, "field is null"),
    "no judges": ({"instruction": "Why?", "response1": "a", "response2": "b"}, "missing field"),
    "no question": ({**PANDALM, "instruction": ["Why?"]}, "content is not text"),
    "no answer": ({**LLMBAR, "output_1": None}, "field is null"),
    "an answer that is true": ({**PANDALM, "response2": True}, "content is not text"),
    "identical": ({**LLMBAR, "output_1": "Because."}, "identical answers"),
}


@pytest.mark.parametrize("name", INVALID_JUDGED)
def test_invalid_judged_pairs_are_counted(tmp_path: Path, name: str) -> None:
    row, reason = INVALID_JUDGED[name]
    found, counts = read_pairs(jsonl(tmp_path / "pairs.jsonl", LLMBAR, row))
    assert found == [PAIR] and counts.skipped == {reason: 1}


# Labeled answers


LABELED: dict[str, dict[str, Any]] = {
    "trl": {"prompt": QUESTION, "completion": ANSWER},
    "trl, messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "question and answer": {"query": QUESTION, "response": ANSWER},
}


@pytest.mark.parametrize("field", ["label", "kto_tag"])
@pytest.mark.parametrize("name", LABELED)
def test_labeled_answers(tmp_path: Path, name: str, field: str) -> None:
    rows = [{**LABELED[name], field: label, "source": "x"} for label in (True, False, 1, 0)]
    found, counts = read_labeled(jsonl(tmp_path / "rows.jsonl", *rows))
    assert found == [LabeledConversation(TWO, label) for label in (True, False, True, False)]
    assert counts.other_fields == {"'source'": 4}


def test_labeled_answers_and_pairs_in_one_file(tmp_path: Path) -> None:
    pair = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    found, _ = read_labeled(jsonl(tmp_path / "rows.jsonl", {**LABELED["trl"], "label": True}, pair, LLMBAR))
    assert found == [LabeledConversation(TWO, True), PAIR, PAIR]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**LABELED["trl"], "label": "yes"}, "label is not true or false"),
        ({**LABELED["trl"], "label": None}, "field is null"),
        (LABELED["trl"], "missing field"),
        ({"prompt": QUESTION, "completion": " ", "label": True}, "empty content"),
        ({**LABELED["trl"], "label": True, "images": ["a.png"]}, "field can't be used"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}], "label": True}, "answer excluded from the loss"),
    ],
)
def test_invalid_labeled_answers_are_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    found, counts = read_labeled(jsonl(tmp_path / "rows.jsonl", {**LABELED["trl"], "label": True}, row))
    assert len(found) == 1 and counts.skipped == {reason: 1}
