"""Rows of every dataset to conversations; each that does not fit is counted by its reason, with where and why."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from tests.data.conversations.rows import ANSWER, MESSAGES, QUESTION, TWO, jsonl, read

OASST = {"user_id": "u", "lang": "en", "deleted": False, "rank": None, "review_result": True, "tree_state": "ready"}
FORMS: dict[str, tuple[Any, Any]] = {
    "ultrachat": ({"prompt": QUESTION, "prompt_id": "1", "messages": MESSAGES}, TWO),
    "messages with more in them": ({"messages": [{**m, "name": "n"} for m in MESSAGES], "source": 1}, TWO),
    "messages and a system's": (
        {"messages": [{"role": "system", "content": "Be."}, *MESSAGES]},
        (("system", "Be."), *TWO),
    ),
    "messages and the row's own system": ({"system": "Be.", "messages": MESSAGES}, (("system", "Be."), *TWO)),
    "messages whose system stands in both places": (
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
    "sharegpt in the names of messages": ({"conversations": MESSAGES}, TWO),
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


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_told_by_its_fields(tmp_path: Path, name: str) -> None:
    row, wanted = FORMS[name]
    rows = row if isinstance(row, list) else [row]
    found, tally = read(jsonl(tmp_path / "data.jsonl", *rows))
    assert found == [wanted] and not tally.left_out
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert read(tmp_path / "data.json")[0] == [wanted]


BAD = {  # a good row's fields changed: the reason, and what is told of it
    "field missing": ({"messages": None, "other": 1}, "no 'messages'; it has messages, other"),
    "field is no list": ({"messages": "hi"}, "str in 'messages'"),
    "empty conversation": ({"messages": []}, ""),
    "turn is no object": ({"messages": ["hi"]}, "str in 'messages', turn 1"),
    "unknown role": ({"messages": [{"role": "bot", "content": "a"}]}, "'bot' in 'messages', turn 1; known are"),
    "content is no text": ({"messages": [{"role": "user", "content": 1}]}, "int in 'messages', turn 1"),
    "empty content": ({"messages": [MESSAGES[0], {"role": "assistant", "content": " \n"}]}, "'messages', turn 2"),
    "roles out of order": ({"messages": MESSAGES[::-1]}, "turn 1 is the assistant's and should be the user's"),
    "does not end with the assistant": ({"messages": MESSAGES[:1]}, "the last turn is the user's"),
    "not UTF-8": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', ""),
}


@pytest.mark.parametrize("reason", BAD)
def test_each_fault_has_its_reason_and_the_first_its_place(tmp_path: Path, reason: str) -> None:
    row, detail = BAD[reason]
    path = jsonl(tmp_path / "data.jsonl", {"messages": MESSAGES}, row, {"messages": MESSAGES}, row)
    found, tally = read(path)
    if reason == "not UTF-8":  # in JSONL the parser finds it; in an array too
        assert tally.left_out == {"broken row": 2} and len(found) == 2
        return
    assert len(found) == 2 and tally.left_out == {reason: 2}
    told = f"{path}:2: {reason} ({detail}" if detail else f"{path}:2: {reason}"
    assert tally.first[reason].startswith(told)
    assert tally.lines()[0] == "4 rows read, 2 kept"
    assert tally.lines()[1] == f"left out: 2, first {tally.first[reason]}"


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
def test_alpaca_rows_without_a_question_or_answer(tmp_path: Path, row: dict[str, Any]) -> None:
    good = {"instruction": "a", "input": "", "output": "b"}
    found, tally = read(jsonl(tmp_path / "data.jsonl", good, row))
    assert len(found) == 1 and tally.left_out.total() == 1, found


def test_a_file_has_one_form_whatever_comes_first(tmp_path: Path) -> None:
    """The first row with known fields tells it; broken ones and those without before it are counted."""
    path = jsonl(tmp_path / "data.jsonl", "{", {"x": 1}, {"messages": MESSAGES}, {"conversations": MESSAGES})
    found, tally = read(path)
    assert found == [TWO] and tally.left_out == {"broken row": 1, "no known fields": 1, "field missing": 1}
    assert tally.first["no known fields"] == f"{path}:2: no known fields (it has x)"
    other = jsonl(tmp_path / "other.jsonl", {"conversations": MESSAGES})
    assert len(read(path, other)[0]) == 2, "each file by itself"


def test_a_form_can_be_named(tmp_path: Path) -> None:
    both = {"messages": MESSAGES, "prompt": "Other?", "completion": "Other."}
    path = jsonl(tmp_path / "data.jsonl", both)
    assert read(path)[0] == [TWO]
    assert read(path, form="prompt_completion")[0] == [(("user", "Other?"), ("assistant", "Other."))]
    assert read(path, form="alpaca")[1].left_out == {"field missing": 1}


def test_rows_of_something_else_are_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", {"a": 1}, {"b": 2})
    told = r"data.jsonl: no row has the fields of a conversation: expected messages, .* \(left out first: .*jsonl:1: "
    with pytest.raises(UserError, match=told):
        read(path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a.txt: text without turns: expected a .jsonl, .json or .parquet"):
        read(tmp_path / "a.txt")
    (tmp_path / "bad.json").write_text("[{]")
    with pytest.raises(UserError, match=r"bad.json: not valid JSON: .*character 3"):
        read(tmp_path / "bad.json")
    for empty in ("empty.json", "empty.jsonl"):
        (tmp_path / empty).write_text("[]" if empty == "empty.json" else "")
        with pytest.raises(UserError, match="is empty"):
            read(tmp_path / empty)


def test_packed_files_parquet_and_json_in_lines(tmp_path: Path) -> None:
    import gzip

    import pyarrow
    from backports import zstd
    from pyarrow.parquet import write_table

    line = json.dumps({"messages": MESSAGES}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd.compress(line))
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + line)
    (tmp_path / "f.json.gz").write_bytes(gzip.compress(b" [\n" + line + b"]"))
    (tmp_path / "g.json.zst").write_bytes(zstd.compress(b"[" + line + b"]"))
    (tmp_path / "h.json.gz").write_bytes(gzip.compress(line))
    rows = [{"prompt": QUESTION, "messages": MESSAGES}, {"prompt": "x", "messages": MESSAGES[:1]}]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.json", "f.json.gz", "g.json.zst", "h.json.gz", "d.parquet"):
        found, tally = read(tmp_path / name)
        assert found == [TWO]
    assert tally.first["does not end with the assistant"].startswith(f"{tmp_path / 'd.parquet'}: row 1: ")
    (tmp_path / "i.json.gz").write_bytes(gzip.compress(b"[" + line * 9)[:-20])
    with pytest.raises(UserError, match=r"i.json.gz: the file breaks off after [\d,]+ bytes"):
        read(tmp_path / "i.json.gz")
    (tmp_path / "e.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(UserError, match=r"e.parquet: a damaged Parquet file"):
        read(tmp_path / "e.parquet")


def test_a_hub_dataset_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(name: str, config: str | None, **settings: Any) -> Any:
        asked.update(settings, name=name)
        return datasets.Dataset.from_list([{"messages": MESSAGES}, {"messages": []}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    found, tally = read("HuggingFaceH4/ultrachat_200k")
    assert found == [TWO] and asked["name"] == "HuggingFaceH4/ultrachat_200k" and asked["split"] == "train"
    assert tally.first["empty conversation"] == "HuggingFaceH4/ultrachat_200k: row 1: empty conversation"


def test_a_name_that_cannot_be_reached_is_not_sent_to_the_built_in_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is for documents."""
    import datasets

    def fails(*args: Any, **settings: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=r"\(no network\): check the name and the network$"):
        read("somebody/chats")


@pytest.mark.parametrize(
    ("name", "kept", "left_out"),
    [
        ("instruct/alpaca_en.json", 749, {}),
        ("instruct/alpaca_zh.json", 750, {}),
        ("instruct/chat_messages.jsonl", 1147, {}),
        ("instruct/dolly_subset.jsonl", 5120, {}),
        ("instruct/gsm8k_train.jsonl", 7473, {}),
        ("instruct/sharegpt_identity.json", 500, {}),
        ("instruct/sharegpt_toolcall.json", 106, {"unknown role": 104}),
        ("instruct/oasst_trees.jsonl", 70, {}),
        ("instruct/wikisql/train.jsonl", 1000, {}),
        ("preference/kto_messages_en.json", 210, {}),
    ],
)
def test_real_files(shared_data: Path, name: str, kept: int, left_out: dict[str, int]) -> None:
    found, tally = read(shared_data / name)
    assert (len(found), tally.left_out) == (kept, left_out)


def test_odd_chats_are_counted_to_the_line(shared_data: Path) -> None:
    """The manifest beside the file says which lines are odd."""
    path = shared_data / "messy" / "made_chat_A.jsonl"
    manifest = json.loads((shared_data / "messy" / "made_chat_A.manifest.json").read_text())
    odd = {entry["line"] for entry in manifest if "(valid)" not in entry["fault"] and "far over" not in entry["fault"]}
    found, tally = read(path)
    lines = len(path.read_bytes().split(b"\n")) - 1
    assert tally.read == lines and len(found) == lines - len(odd)
    assert tally.left_out == {
        "empty conversation": 1, "roles out of order": 2, "does not end with the assistant": 2, "empty content": 1,
        "unknown role": 1, "field missing": 1,
    }  # fmt: skip
    assert {int(told.split(":")[1]) for told in tally.first.values()} <= odd
