"""Tools, calls, results, reasoning and weights in datasets: forms, what is refused, and the tokens of real rows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.schema import DataConfig
from anarchobot.data.conversations.preference_pairs import tokenize_pairs
from anarchobot.data.conversations.reading import RowCounts, read_conversations
from anarchobot.data.conversations.tokenized import opening, tokenize_conversations
from anarchobot.data.windows import IGNORE
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import CHATML, ChatTemplate
from anarchobot.tokenizers.conversation import Message, PreferencePair, is_held_out
from anarchobot.tokenizers.rendered_parts import NO_TOOLS
from tests.data.conversations.rows import ANSWER, MESSAGES, QUESTION, TWO, jsonl, read, read_pairs
from tests.tokenizers.templates import MakeChat, dialogue, loss_text, preference, to_dicts
from tests.tokenizers.templates import make_chat as make_chat
from tests.tokenizers.tool_templates import PARIS, TOOL, TOOLS, ask, call, result, say

USER, ASSISTANT = ("user", QUESTION), ("assistant", ANSWER)
CALL = {"type": "function", "function": {"name": "weather", "arguments": PARIS}}
CALLING = Message("assistant", "", fields={"tool_calls": [CALL]})
RESULT = ("tool", "sun")
TALK = (TOOLS, USER, CALLING, RESULT, ASSISTANT)
BARE = TOOL["function"]
AS_TEXT = {"name": "weather", "arguments": json.dumps(PARIS)}


def rows(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    return [MESSAGES[0], *turns, MESSAGES[1]]


def calling(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, **fields}


TOOL_TURN = {"role": "tool", "content": "sun"}
HUMAN, GPT = ({"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER})
OBSERVATION = {"from": "observation", "value": "sun"}
FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "openai": (
        {
            "messages": rows(calling(tool_calls=[{**CALL, "id": "c1"}]), {**TOOL_TURN, "tool_call_id": "c1"}),
            "tools": [TOOL],
        },
        (
            TOOLS,
            USER,
            CALLING._replace(fields={"tool_calls": [{**CALL, "id": "c1"}]}),
            Message("tool", "sun", fields={"tool_call_id": "c1"}),
            ASSISTANT,
        ),
    ),
    "arguments as text": (
        {"messages": rows(calling(tool_calls=[{"type": "function", "function": AS_TEXT}]), TOOL_TURN), "tools": [TOOL]},
        TALK,
    ),
    "calls and tools as text": (
        {"messages": rows(calling(tool_calls=json.dumps([CALL])), TOOL_TURN), "tools": json.dumps([TOOL])},
        TALK,
    ),
    "each tool as text": (
        {"messages": rows(calling(tool_calls=[json.dumps(CALL)]), TOOL_TURN), "tools": [json.dumps(TOOL)]},
        TALK,
    ),
    "openai's functions": (
        {
            "messages": rows(
                calling(function_call=AS_TEXT), {"role": "function", "name": "weather", "content": "sun"}
            ),
            "functions": [BARE],
        },
        (TOOLS, USER, CALLING, Message("tool", "sun", fields={"name": "weather"}), ASSISTANT),
    ),
    "sharegpt": (
        {
            "conversations": [
                HUMAN, {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": PARIS})},
                OBSERVATION, GPT,
            ],
            "tools": json.dumps([BARE]),
        },
        TALK,
    ),
    "several calls": (
        {
            "conversations": [
                HUMAN, {"from": "function_call", "value": json.dumps([AS_TEXT, {"name": "other"}])},
                OBSERVATION, OBSERVATION, GPT,
            ],
        },
        (
            USER,
            Message(
                "assistant", "",
                fields={"tool_calls": [CALL, {"type": "function", "function": {"name": "other", "arguments": {}}}]},
            ),
            RESULT, RESULT, ASSISTANT,
        ),
    ),
    "text and a call": (
        {"messages": rows(calling(tool_calls=[CALL], content="Let me see."), TOOL_TURN)},
        (USER, CALLING._replace(content="Let me see."), RESULT, ASSISTANT),
    ),
    "prompt and completion": (
        {"prompt": [*rows(calling(tool_calls=[CALL]))[:2], TOOL_TURN], "completion": MESSAGES[1:], "tools": [TOOL]},
        TALK,
    ),
    "a last call": ({"messages": [MESSAGES[0], calling(tool_calls=[CALL])]}, (USER, CALLING)),
    "a last result": ({"messages": [MESSAGES[0], calling(tool_calls=[CALL]), TOOL_TURN]}, (USER, CALLING)),
    "an empty result": (
        {"messages": rows(calling(tool_calls=[CALL]), {**TOOL_TURN, "content": ""})},
        (USER, CALLING, ("tool", ""), ASSISTANT),
    ),
    "tools of a question": ({"question": QUESTION, "answer": ANSWER, "tools": [TOOL]}, (TOOLS, *TWO)),
    "tools with other fields": (
        {"messages": MESSAGES, "tools": [{**TOOL, "strict": True}, {"type": "function", **BARE}]},
        (Message("tools", "", fields={"tools": [{**TOOL, "strict": True}, TOOL]}), *TWO),
    ),
    "tools and a system": (
        {"messages": MESSAGES, "tools": [TOOL], "system": "Be."}, (TOOLS, ("system", "Be."), *TWO),
    ),
    "no tools": ({"messages": [MESSAGES[0], {**MESSAGES[1], "tool_calls": []}], "tools": "[]"}, TWO),
    **{
        name: ({"messages": [MESSAGES[0], {**MESSAGES[1], name: "Hm."}]}, (USER, Message(*ASSISTANT, "Hm.")))
        for name in ("reasoning_content", "reasoning", "thinking")
    },
    "reasoning twice": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning": "Hm.", "reasoning_content": "Hm."}]},
        (USER, Message(*ASSISTANT, "Hm.")),
    ),
    "reasoning as parts": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "thinking": [{"type": "text", "text": "Hm."}]}]},
        (USER, Message(*ASSISTANT, "Hm.")),
    ),
    "blank reasoning": ({"messages": [MESSAGES[0], {**MESSAGES[1], "thinking": " \n"}]}, TWO),
    **{
        f"{name}: {value}": (
            {"messages": [*MESSAGES, MESSAGES[0], {**MESSAGES[1], name: value}]},
            (*TWO, USER, Message(*ASSISTANT, in_loss=False)),
        )
        for name, value in (("weight", 0), ("train", False), ("loss", False), ("loss_mask", 0), ("loss_weight", 0.0))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path: Path, name: str) -> None:
    row, expected = FORMS[name]
    found, counts = read(jsonl(tmp_path / "data.jsonl", row))
    assert found == [expected] and not counts.skipped and not counts.other_fields
    assert counts.unused == ({"the tool's last message, which has no answer": 1} if name == "a last result" else {})


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"in": value}
    return value


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "arguments that are not JSON": (
        {"messages": rows(calling(tool_calls=[{**CALL, "function": {"name": "f", "arguments": "{"}}]))},
        "malformed tool call ('tool_calls' of 'messages', turn 2: not JSON: ",
    ),
    "arguments that are a list": (
        {"messages": rows(calling(tool_calls=[{"name": "f", "arguments": "[1]"}]))},
        "malformed tool call ('arguments' in 'tool_calls' of 'messages', turn 2: expected an object)",
    ),
    "a call without a name": (
        {"messages": rows(calling(tool_calls=[{"function": {"arguments": {}}}]))},
        "malformed tool call ('tool_calls' of 'messages', turn 2: expected an object with a name, got ",
    ),
    "a call that is a text": (
        {"conversations": [HUMAN, {"from": "function_call", "value": "weather"}, OBSERVATION, GPT]},
        "malformed tool call ('conversations', turn 2: not JSON: ",
    ),
    "tools without a name": (
        {"messages": MESSAGES, "tools": [{"type": "function"}]},
        "malformed tool call (tools: expected an object with a name, got ",
    ),
    "arguments nested deeply": (
        {"messages": rows(calling(tool_calls=[{"name": "f", "arguments": nested(60)}]))},
        "nested too deeply ('tool_calls' of 'messages', turn 2; at most 50 levels)",
    ),
    "no result": (
        {"messages": rows(calling(tool_calls=[CALL]))},
        "roles out of order (turn 3 has role assistant, expected tool)",
    ),
    "a result without a call": (
        {"messages": rows(TOOL_TURN)},
        "roles out of order (turn 2 has role tool, expected assistant)",
    ),
    "a question after a result": (
        {"messages": [*rows(calling(tool_calls=[CALL]), TOOL_TURN)[:3], *MESSAGES]},
        "roles out of order (turn 4 has role user, expected assistant or tool)",
    ),
    "an object as the result": (
        {"messages": rows(calling(tool_calls=[CALL]), {"role": "tool", "content": {"sun": 1}})},
        "content is not text (dict in 'messages', turn 3)",
    ),
    "half a weight": (
        {"prompt": MESSAGES[:1], "completion": [{**MESSAGES[1], "weight": 0.5}]},
        "weight is not 0 or 1 (weight: 0.5 in 'completion', turn 1)",
    ),
    "two reasonings": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning": "a", "thinking": "b"}]},
        "different reasoning in several fields ('messages', turn 2)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_refused(tmp_path: Path, name: str) -> None:
    row, expected = REFUSED[name]
    path = jsonl(tmp_path / "data.jsonl", row)
    found, counts = read(path)
    assert found == [] and counts.skipped.total() == 1
    assert next(iter(counts.first_skipped.values())).startswith(f"{path}:1: {expected}")


def test_values_that_are_not_json_are_refused(tmp_path: Path) -> None:
    """Parquet files have other types, such as dates."""
    import datetime

    import pyarrow
    from pyarrow.parquet import write_table

    tools = [{"name": "f", "parameters": {"since": datetime.date(2026, 1, 1)}}]
    write_table(pyarrow.Table.from_pylist([{"messages": MESSAGES, "tools": tools}]), tmp_path / "a.parquet")
    found, counts = read(tmp_path / "a.parquet")
    assert found == [] and counts.skipped == {"not JSON": 1}


def test_fields_of_other_roles_and_of_calls_are_named(tmp_path: Path) -> None:
    turns = rows(calling(tool_calls=[{**CALL, "index": 3}]), {**TOOL_TURN, "name": "weather", "weight": 1})
    turns[0] = {**turns[0], "thinking": "Hm.", "tool_calls": "no JSON"}
    _, counts = read(jsonl(tmp_path / "data.jsonl", {"messages": turns}))
    assert counts.other_fields == {
        "'thinking' of messages": 1, "'tool_calls' of messages": 1, "'index' of tool calls": 1,
    }  # fmt: skip


def test_pairs_of_calls(tmp_path: Path) -> None:
    bad = {"role": "assistant", "content": "I can't."}
    row = {"prompt": MESSAGES[:1], "chosen": [calling(tool_calls=[CALL])], "rejected": [bad], "tools": [TOOL]}
    whole = {**row, "prompt": None, "chosen": [MESSAGES[0], *row["chosen"]], "rejected": [MESSAGES[0], bad]}
    result_of = {
        **row,
        "prompt": [MESSAGES[0], calling(tool_calls=[CALL]), TOOL_TURN],
        "chosen": ANSWER,
        "rejected": "No.",
    }
    thought = {**row, "chosen": {**bad, "thinking": "Hm."}, "rejected": {**bad, "thinking": "Hm?"}}
    found, counts = read_pairs(jsonl(tmp_path / "pairs.jsonl", row, whole, result_of, thought))
    prompt = (TOOLS, USER)
    assert not counts.skipped and found == [
        (prompt, CALLING, "I can't."),
        (prompt, CALLING, "I can't."),
        ((TOOLS, USER, CALLING, RESULT), ANSWER, "No."),
        (prompt, Message("assistant", "I can't.", "Hm."), Message("assistant", "I can't.", "Hm?")),
    ]


def test_tokens_of_pairs_with_calls(make_chat: MakeChat) -> None:
    """The oldest exchanges are dropped with their calls and results; the tools stay."""
    chat = make_chat("bytelevel", "qwen3 tools")
    old = (TOOLS, ask("old"), call(PARIS), result("old " * 50), say("old"), ask("Rain?"))
    pair = PreferencePair(old, call(PARIS), say("No idea."))
    counts = RowCounts(3, 3)
    same = PreferencePair((ask("a"),), say("b", "x"), say("b", "x\n"))
    train, _ = tokenize_pairs(
        [("f:1", pair), ("f:2", same), ("f:3", preference(dialogue("a"), "b", "c"))],
        chat.encoder("answer"),
        counts,
        seq_len=260,
    )
    assert counts.truncated == 1 and counts.skipped == {"identical answers": 1} and train.count == 2
    batch = train.rows(np.array([0]))
    short = (TOOLS, ask("Rain?"))
    for side, answer in enumerate((call(PARIS), say("No idea."))):
        expected = chat.theirs.apply_chat_template(to_dicts((*short, answer)), tools=[TOOL])["input_ids"]
        trained = batch.targets[0, side] != IGNORE
        length = int(np.flatnonzero(trained)[-1]) + 1
        assert batch.inputs[0, side, :length].tolist() == expected[:length]
        said = chat.theirs.decode(batch.targets[0, side][trained].tolist())
        assert said.startswith("<think>\n\n</think>\n\n" + ("No idea." if side else "<tool_call>\n"))
        assert said.endswith("<|im_end|>")


def test_what_a_template_leaves_out_of_pairs_is_counted(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    counts = RowCounts(2, 2)
    pairs = [
        ("f:1", preference((TOOLS, ask("Hi")), "b", "c")),
        ("f:2", PreferencePair((ask("Hi"),), say("b"), call({}))),
    ]
    tokenize_pairs(pairs, chat.encoder("answer"), counts, seq_len=99)
    assert counts.unused == {NO_TOOLS: 1} and counts.skipped == {"tool call left out by the chat template": 1}


def test_what_a_template_leaves_out_is_counted_and_named(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen3 tools")
    encoder = ChatEncoder(chat.ours, ChatTemplate(CHATML, {}, "chatml"))
    talks = [
        ("f:1", (TOOLS, ask("Hi"), say("Ho"))),
        ("f:2", (TOOLS, ask("Hi"), call(PARIS))),
        ("f:3", dialogue("a", "b")),
    ]
    counts = RowCounts(3, 3)
    tokenized = tokenize_conversations(talks, encoder, counts, seq_len=500)
    assert tokenized.train.count == 2 and counts.unused == {NO_TOOLS: 1}
    assert counts.summary() == [
        "3 rows read, 2 kept",
        "skipped 1: f:2: tool call left out by the chat template (turn 2; chatml: set chat.template to a template with "
        "tools)",
        f"not used in 1 rows: {NO_TOOLS} (f:1)",
    ]


def test_tools_are_part_of_the_opening() -> None:
    """Rows with the same question and other tools may be in other splits; rows without are where they were before."""
    held_out = [
        is_held_out(opening((Message("tools", "", fields={"tools": [{"name": str(i)}]}), ask("Hi"), say("Ho"))), 0.5)
        for i in range(60)
    ]
    assert 10 < sum(held_out) < 50
    hashed = hashlib.sha256(b"user 2\nHi").digest()
    share = int.from_bytes(hashed[:8], "big") / 2**64
    assert [is_held_out((ask("Hi"),), share + change) for change in (-1e-6, 1e-6)] == [False, True]


def test_rows_without_any_answer_in_the_loss_are_skipped(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    counts = RowCounts(2, 2)
    excluded = (ask("a"), say("b")._replace(in_loss=False))
    tokenize_conversations([("f:1", excluded), ("f:2", dialogue("a", "b"))], chat.encoder(), counts, seq_len=99)
    assert counts.skipped == {"no loss tokens": 1}


def test_real_tool_calls_match_transformers(make_chat: MakeChat, shared_data: Path) -> None:
    marked, chat = make_chat("bytelevel", "qwen3 tools marked"), make_chat("bytelevel", "qwen3 tools")
    data = DataConfig(dataset=str(shared_data / "instruct" / "sharegpt_toolcall.json"))
    found = [conversation for _, conversation in read_conversations(data, RowCounts())]
    called = [c for c in found if any(message.tool_calls for message in c)]
    assert len(found) == 210 and len(called) == 104
    for conversation in called[::3]:
        theirs = marked.theirs.apply_chat_template(
            to_dicts(conversation), tools=conversation[0].fields["tools"], return_assistant_tokens_mask=True,
            return_dict=True,
        )  # fmt: skip
        encoded = chat.encode(conversation)
        assert encoded.ids.tolist() == theirs["input_ids"]
        assert encoded.loss_mask.tolist() == [m == 1 for m in theirs["assistant_masks"]]
        assert loss_text(chat, encoded).count("<tool_call>") == sum(len(m.tool_calls) for m in conversation)
