"""Preference rows of every form to pairs; each that is none is counted by its reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.conversation import Message
from tests.data.conversations.rows import jsonl, read_pairs

ASKED = {"role": "user", "content": "Why?"}
GOOD, BAD = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be."}
HH = "\n\nHuman: Hi.\n\nAssistant: Hello!\nYou?\n\nHuman: Why?\n\nAssistant:"
PLAIN = ((("user", "Why?"),), "Because.", "No.")

FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "texts": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, PLAIN),
    "ultrafeedback": (
        {
            "prompt": "Why?",
            "chosen": [ASKED, GOOD],
            "rejected": [ASKED, BAD],
            "messages": [ASKED, GOOD],
            "score_chosen": 8.0,
        },
        PLAIN,
    ),
    "messages without a prompt": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, PLAIN),
    "a prompt of messages": (
        {"prompt": [SYSTEM, ASKED], "chosen": [GOOD], "rejected": [BAD]},
        ((("system", "Be."), *PLAIN[0]), *PLAIN[1:]),
    ),
    "a system's own field": (
        {"system": "Be.", "question": "Why?", "chosen": "Because.", "rejected": "No."},
        ((("system", "Be."), *PLAIN[0]), *PLAIN[1:]),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Because."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        PLAIN,
    ),
    "several turns": (
        {"chosen": [ASKED, BAD, ASKED, GOOD], "rejected": [ASKED, BAD, ASKED, BAD]},
        ((("user", "Why?"), ("assistant", "No."), ("user", "Why?")), "Because.", "No."),
    ),
    "hh": (
        {"chosen": HH + " Because.", "rejected": HH + " No.\n"},
        ((("user", "Hi."), ("assistant", "Hello!\nYou?"), ("user", "Why?")), "Because.", "No."),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form(tmp_path: Path, name: str) -> None:
    row, wanted = FORMS[name]
    found, _ = read_pairs(jsonl(tmp_path / "pairs.jsonl", row))
    assert found == [wanted] and isinstance(found[0].prompt[0], Message)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal answers"),
    "equal but for white space": ({"prompt": "a", "chosen": "b", "rejected": "b \n"}, "equal answers"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "field missing"),
    "empty": ({"prompt": "a", "chosen": " ", "rejected": "b"}, "empty content"),
    "empty prompt": ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty content"),
    "kinds": ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "answers of different kinds"),
    "numbers": ({"prompt": "a", "chosen": 1, "rejected": 2}, "answers of different kinds"),
    "lists of texts": ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "turn is no object"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "no prompt"),
    "only answers": ({"chosen": [GOOD], "rejected": [BAD]}, "roles out of order"),
    "two questions": (
        {"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "How?"}, BAD]},
        "answers to different prompts",
    ),
    "ends with the user": (
        {"chosen": [ASKED, GOOD, ASKED], "rejected": [ASKED, BAD]},
        "does not end with the assistant",
    ),
    "hh out of order": ({"chosen": HH + " a\n\nAssistant: b", "rejected": HH + " c"}, "roles out of order"),
    "hh empty": ({"chosen": HH, "rejected": HH + " c"}, "empty content"),
    "hh of different lengths": (
        {"chosen": HH + " a\n\nHuman: b\n\nAssistant: c", "rejected": HH + " d"},
        "answers to different prompts",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_pair_is_counted(tmp_path: Path, name: str) -> None:
    row, reason = FAULTS[name]
    path = jsonl(tmp_path / "pairs.jsonl", {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, row)
    found, tally = read_pairs(path)
    assert found == [PLAIN] and tally.left_out == {reason: 1}
    assert tally.first[reason].startswith(f"{path}:2: {reason}")


def test_a_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a.jsonl: no row has the fields of a preference: expected chosen and rejected"
    ):
        read_pairs(jsonl(tmp_path / "a.jsonl", {"text": "a"}))


@pytest.mark.parametrize(
    ("name", "kept", "left_out"),
    [
        # The README says that 4 of the UltraFeedback pairs are equal.
        ("ultrafeedback_1000.jsonl", 994, {"equal answers": 4, "empty content": 2}),
        ("hh_harmless_part.jsonl", 1691, {"roles out of order": 5, "empty content": 4}),
        ("dpo_sharegpt_en.json", 210, {}),
    ],
)
def test_real_files(shared_data: Path, name: str, kept: int, left_out: dict[str, int]) -> None:
    found, tally = read_pairs(shared_data / "preference" / name)
    assert (len(found), tally.left_out) == (kept, left_out)


def test_real_transcripts_are_put_together_again(shared_data: Path) -> None:
    path = shared_data / "preference" / "hh_harmless_part.jsonl"
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    found, _ = read_pairs(path)
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}

    def squeezed(text: str) -> str:
        return "".join(text.split())

    written = {squeezed(row["chosen"]) for row in rows}
    for pair in found:
        turns = [*pair.prompt, Message("assistant", pair.chosen)]
        assert squeezed("".join(names[role] + content for role, content in turns)) in written


def test_odd_pairs_are_counted_to_the_line(shared_data: Path) -> None:
    """The manifest beside the file says which lines are odd; one that is only long is no fault yet."""
    messy = shared_data / "messy"
    manifest = json.loads((messy / "made_preference.manifest.json").read_text())
    odd = {entry["line"] for entry in manifest if "too long" not in entry["fault"]}
    found, tally = read_pairs(messy / "made_preference.jsonl")
    assert tally.read == 12 and len(found) == 12 - len(odd) == 5
    assert tally.left_out == {
        "empty content": 3, "equal answers": 2, "field missing": 1, "answers of different kinds": 1,
    }  # fmt: skip
    assert {int(told.split(":")[1]) for told in tally.first.values()} <= odd
