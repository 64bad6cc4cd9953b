"""Dataset files to conversations and pairs: file types, the Hub, real files, and counts of invalid rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.conversation import LabeledConversation
from tests.data.conversations.rows import MESSAGES, QUESTION, TWO, jsonl, read, read_labeled, read_pairs


def test_unusable_files_are_errors(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "data.jsonl", {"a": 1}, {"b": 2})
    message = r"data.jsonl: no row has the fields of a conversation: expected messages, .* \(first skipped: .*jsonl:1: "
    with pytest.raises(UserError, match=message):
        read(path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a.txt: expected a .jsonl, .json \(or these with .*\) or .parquet file"):
        read(tmp_path / "a.txt")
    (tmp_path / "bad.json").write_text("[{]")
    with pytest.raises(UserError, match=r"bad.json: not valid JSON: .*character 3"):
        read(tmp_path / "bad.json")
    for empty in ("empty.json", "empty.jsonl"):
        (tmp_path / empty).write_text("[]" if empty == "empty.json" else "")
        with pytest.raises(UserError, match="is empty"):
            read(tmp_path / empty)


def test_compressed_files_parquet_and_jsonl_named_json(tmp_path: Path) -> None:
    import gzip

    import pyarrow
    from backports import zstd
    from pyarrow.parquet import write_table

    line = json.dumps({"messages": MESSAGES}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd.compress(line))
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + line)
    (tmp_path / "f.json.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf [\n" + line + b"]"))
    (tmp_path / "g.json.zst").write_bytes(zstd.compress(b"[" + line + b"]"))
    (tmp_path / "h.json.gz").write_bytes(gzip.compress(line))
    rows = [{"prompt": QUESTION, "messages": MESSAGES}, {"prompt": "x", "messages": MESSAGES[:1]}]
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.json", "f.json.gz", "g.json.zst", "h.json.gz", "d.parquet"):
        found, counts = read(tmp_path / name)
        assert found == [TWO]
    assert counts.first_skipped["does not end with the assistant"].startswith(f"{tmp_path / 'd.parquet'}: row 1: ")
    (tmp_path / "i.json.gz").write_bytes(gzip.compress(b"[" + line * 9)[:-20])
    with pytest.raises(UserError, match=r"i.json.gz: truncated or damaged after [\d,]+ bytes"):
        read(tmp_path / "i.json.gz")
    (tmp_path / "e.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(UserError, match=r"e.parquet: damaged or not a Parquet file"):
        read(tmp_path / "e.parquet")


def test_folders_and_globs(tmp_path: Path) -> None:
    """.json files are read as if they were named; what is not read is named. Only a named file must have rows."""
    line = json.dumps({"messages": MESSAGES})
    (tmp_path / "a.json").write_text(f"[{line}, {line}]")
    (tmp_path / "B.JSON").write_text(line + "\n" + line)
    (tmp_path / "c.jsonl").write_text(line)
    (tmp_path / "one.json").write_text(json.dumps({"messages": MESSAGES}, indent=2))
    (tmp_path / "info.json").write_text(json.dumps({"features": {"x": 1}}, indent=2))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "._a.json").write_bytes(b"\0\x05\x16\x07")
    for name in (tmp_path, tmp_path / "*", tmp_path / "**"):
        found, counts = read(name)
        assert found == [TWO] * 6 and counts.skipped == {"unknown fields": 1}
        assert counts.first_skipped["unknown fields"].startswith(f"{tmp_path / 'info.json'}: row 0: ")
        named = {Path(path).name: reason for path, reason in counts.unread}
        hidden = {"._a.json": "hidden or system files"} if name == tmp_path else {}  # not matched by a glob
        assert named == {
            "README.md": "files of other formats", "empty.json": "empty files", "empty.jsonl": "empty files", **hidden,
        }  # fmt: skip
        assert f"files of other formats not read: 1 ({tmp_path / 'README.md'})" in counts.summary()
    assert read(tmp_path / "*.json")[0] == [TWO] * 3
    with pytest.raises(UserError, match=r"info.json: no row has the fields of a conversation"):
        read(tmp_path / "info.json")
    jsonl(tmp_path / "d.jsonl", {"a": 1})
    with pytest.raises(UserError, match=r"d.jsonl: no row has the fields of a conversation"):
        read(tmp_path)


def test_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(name: str, config: str | None, **settings: Any) -> Any:
        asked.update(settings, name=name)
        return datasets.Dataset.from_list([{"messages": MESSAGES}, {"messages": []}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    found, counts = read("HuggingFaceH4/ultrachat_200k")
    assert found == [TWO] and asked["name"] == "HuggingFaceH4/ultrachat_200k" and asked["split"] == "train"
    assert counts.first_skipped["empty conversation"] == "HuggingFaceH4/ultrachat_200k: row 1: empty conversation"


def test_unreachable_hub_dataset_does_not_fall_back_to_the_built_in_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fails(*args: Any, **settings: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=r"\(no network\): check the name and the network$"):
        read("somebody/chats")


@pytest.mark.parametrize(
    ("name", "kept", "skipped"),
    [
        ("instruct/alpaca_en.json", 749, {}),
        ("instruct/alpaca_zh.json", 750, {}),
        ("instruct/chat_messages.jsonl", 1147, {}),
        ("instruct/dolly_subset.jsonl", 5120, {}),
        ("instruct/gsm8k_train.jsonl", 7473, {}),
        ("instruct/sharegpt_identity.json", 500, {}),
        ("instruct/sharegpt_toolcall.json", 210, {}),
        ("instruct/oasst_trees.jsonl", 70, {}),
        ("instruct/wikisql/train.jsonl", 1000, {}),
        ("preference/kto_messages_en.json", 107, {"bad answer": 103}),  # as many labels are false
    ],
)
def test_real_conversations(shared_data: Path, name: str, kept: int, skipped: dict[str, int]) -> None:
    found, counts = read(shared_data / name)
    assert (len(found), counts.skipped) == (kept, skipped)


def test_invalid_rows_of_a_messy_file(shared_data: Path) -> None:
    """The manifest next to the file lists the invalid lines."""
    path = shared_data / "messy" / "made_chat_A.jsonl"
    manifest = json.loads((shared_data / "messy" / "made_chat_A.manifest.json").read_text())
    invalid = {
        entry["line"] for entry in manifest if "(valid)" not in entry["fault"] and "far over" not in entry["fault"]
    }
    found, counts = read(path)
    lines = len(path.read_bytes().split(b"\n")) - 1
    ends_with_user = {"the user's last message, which has no answer": 1}
    assert counts.read == lines and len(found) == lines - len(invalid) + 1 and counts.unused == ends_with_user
    assert counts.skipped == {
        "empty conversation": 1, "roles out of order": 2, "does not end with the assistant": 1, "empty content": 1,
        "unknown role": 1, "missing field": 1,
    }  # fmt: skip
    assert {int(detail.split(":")[1]) for detail in counts.first_skipped.values()} <= invalid


def test_file_without_preferences_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a.jsonl: no row has the fields of a preference: expected chosen and rejected"
    ):
        read_pairs(jsonl(tmp_path / "a.jsonl", {"text": "a"}))


@pytest.mark.parametrize(
    ("name", "kept", "skipped"),
    [
        # The README says that 4 of the UltraFeedback pairs are equal.
        ("ultrafeedback_1000.jsonl", 994, {"identical answers": 4, "empty content": 2}),
        ("hh_harmless_part.jsonl", 1691, {"roles out of order": 5, "empty content": 4}),
        ("dpo_sharegpt_en.json", 210, {}),
        ("llmbar.jsonl", 234, {}),
    ],
)
def test_real_pairs(shared_data: Path, name: str, kept: int, skipped: dict[str, int]) -> None:
    found, counts = read_pairs(shared_data / "preference" / name)
    assert (len(found), counts.skipped) == (kept, skipped)


def test_real_labeled_answers(shared_data: Path) -> None:
    found, counts = read_labeled(shared_data / "preference" / "kto_messages_en.json")
    labels = [item.desirable for item in found if isinstance(item, LabeledConversation)]
    assert (len(labels), sum(labels), counts.skipped) == (210, 107, {})


def test_real_pairs_are_read_for_kto(shared_data: Path) -> None:
    found, counts = read_labeled(shared_data / "preference" / "llmbar.jsonl")
    assert (len(found), counts.skipped) == (234, {})


def test_hh_transcripts_round_trip(shared_data: Path) -> None:
    path = shared_data / "preference" / "hh_harmless_part.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    found, _ = read_pairs(path)
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}

    def without_whitespace(text: str) -> str:
        return "".join(text.split())

    written = {without_whitespace(row["chosen"]) for row in rows}
    for pair in found:
        turns = [*pair[0], ("assistant", pair[1])]
        assert without_whitespace("".join(names[role] + content for role, content in turns)) in written


def test_invalid_pairs_of_a_messy_file(shared_data: Path) -> None:
    """The manifest next to the file lists the invalid lines; long rows are still valid when read."""
    messy = shared_data / "messy"
    manifest = json.loads((messy / "made_preference.manifest.json").read_text())
    invalid = {entry["line"] for entry in manifest if "too long" not in entry["fault"]}
    found, counts = read_pairs(messy / "made_preference.jsonl")
    assert counts.read == 12 and len(found) == 12 - len(invalid) == 5
    assert counts.skipped == {
        "empty content": 3, "identical answers": 2, "missing field": 1, "answers have different types": 1,
    }  # fmt: skip
    assert {int(detail.split(":")[1]) for detail in counts.first_skipped.values()} <= invalid
