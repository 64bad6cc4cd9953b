"""Tools, calls, results and reasoning: ids and masks against transformers, and what templates leave out."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.tokenizers.chat_encoder import ChatEncoder, Encoded
from anarchobot.tokenizers.chat_template import CHATML, PLAIN, ChatTemplate
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message
from anarchobot.tokenizers.rendered_parts import ANSWERS, NO_REASONING, NO_TOOLS
from tests.tokenizers.templates import CONTROLS, ChatFixture, MakeChat, loss_text, to_dicts
from tests.tokenizers.templates import make_chat as make_chat
from tests.tokenizers.tool_templates import (
    PARIS,
    ROME,
    TOOL,
    TOOL_TALKS,
    TOOL_TEMPLATES,
    TOOLS,
    ask,
    call,
    result,
    say,
)

# What a template does not accept: the reason.
REFUSED = {
    ("llama tools", "two calls"): "rejected by the chat template",
    ("llama tools", "text and a call"): "tool call left out by the chat template",
    ("llama tools marked", "two calls"): "rejected by the chat template",
    ("llama tools marked", "text and a call"): "tool call left out by the chat template",
    ("mistral tools", "text and a call"): "tool call left out by the chat template",
    ("harmony", "two calls"): "tool call left out by the chat template",
    ("harmony", "text and a call"): "tool call left out by the chat template",
}


def apply(chat: ChatFixture, conversation: Conversation, **options: Any) -> Any:
    """transformers' apply_chat_template."""
    tools = conversation[0].fields["tools"] if conversation[0].role == "tools" else None
    messages = to_dicts(conversation)
    for message in messages:
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
    return chat.theirs.apply_chat_template(messages, tools=tools, return_dict=True, **options)


@pytest.mark.parametrize("name", [name for name in TOOL_TEMPLATES if name != "deepseek tools"])
def test_ids_match_transformers(make_chat: MakeChat, name: str) -> None:
    chat = make_chat("bytelevel", name)
    for talk, conversation in TOOL_TALKS.items():
        (encoded,) = chat.encoder().encode([conversation])
        if (name, talk) in REFUSED:
            assert isinstance(encoded, InvalidRow) and encoded.reason == REFUSED[name, talk]
            continue
        assert isinstance(encoded, Encoded), (talk, encoded)
        assert encoded.ids.tolist() == apply(chat, conversation)["input_ids"]
        prompt = conversation[:-1]
        expected = apply(chat, prompt, add_generation_prompt=True)["input_ids"]
        assert chat.encoder().encode_prompt(prompt).tolist() == expected


@pytest.mark.parametrize("name", [name for name in TOOL_TEMPLATES if name.endswith("marked")])
@pytest.mark.parametrize("kind", ["bytelevel", "first"])
def test_masks_match_transformers(make_chat: MakeChat, kind: str, name: str) -> None:
    """The template without marks has the same mask, except for answers without the reasoning of the data, and for the
    start of reasoning that is part of the prompt."""
    marked, unmarked = make_chat(kind, name), make_chat(kind, name.removesuffix(" marked"))
    for talk, conversation in TOOL_TALKS.items():
        if (name, talk) in REFUSED:
            continue
        theirs = apply(marked, conversation, return_assistant_tokens_mask=True)
        encoded = marked.encode(conversation)
        assert encoded.ids.tolist() == theirs["input_ids"]
        assert encoded.loss_mask.tolist() == [m == 1 for m in theirs["assistant_masks"]]
        if "3.5" not in name and not (talk.startswith("earlier reasoning") and "qwen" in name):
            assert unmarked.encode(conversation).loss_mask.tolist() == encoded.loss_mask.tolist()


CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
AGAIN = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
LOSS = {
    ("qwen3 tools", "two turns"): (
        f"<tool_call>\n{CALL}\n</tool_call><|im_end|>No.<|im_end|>"
        f"<tool_call>\n{AGAIN}\n</tool_call><|im_end|><think>\n\n</think>\n\nYes.<|im_end|>",
        (),
    ),
    ("qwen3 tools", "earlier reasoning"): ("<think>\nSecond.\n</think>\n\nd<|im_end|>", (ANSWERS,)),
    ("qwen3 tools", "earlier reasoning and calls"): (
        f"No.<|im_end|><think>\nAgain.\n</think>\n\n<tool_call>\n{AGAIN}\n</tool_call><|im_end|>"
        "<think>\nRain.\n</think>\n\nYes.<|im_end|>",
        (ANSWERS,),
    ),
    ("qwen3 tokens", "one call"): (
        f"<tool_call>\n{CALL}\n<|end|>\n<|im_end|><think>\n\n</think>\n\nNo.<|im_end|>",
        (),
    ),
    ("qwen3.5 tools", "two turns"): (
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call><|im_end|>"
        "No.<|im_end|>\n\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call><|im_end|>\n\n</think>\n\nYes.<|im_end|>",
        (),
    ),
    ("qwen3.5 tools", "no arguments"): (
        "\n\n</think>\n\n<tool_call>\n<function=weather>\n</function>\n</tool_call><|im_end|>"
        "\n\n</think>\n\nNo.<|im_end|>",
        (),
    ),
    ("llama tools", "reasoning and calls"): (
        '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>No.<|eot_id|>',
        (NO_REASONING,),
    ),
    ("mistral tools", "two turns"): (
        f'<|system|>[{CALL[:-1]}, "id": "abcdefg00"}}]</s> No.</s>'
        f'<|system|>[{AGAIN[:-1]}, "id": "abcdefg00"}}]</s> Yes.</s>',
        (),
    ),
    ("deepseek tools", "two calls"): (
        '<|start_header_id|>weather\n```json\n{"city": "Paris"}\n```<|end|>'
        '<|start_header_id|>weather\n```json\n{"city": "Rome", "days": 2}\n```<|end|><|eot_id|></s>In Rome.</s>',
        (NO_TOOLS,),
    ),
    ("harmony", "reasoning and calls"): (
        "<|system|>analysisSun.<|end|><|start_header_id|>assistant<|system|>finalNo.</s>",
        (NO_TOOLS, ANSWERS),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "talk"), LOSS)
def test_loss_covers_calls_and_answers_but_not_results(make_chat: MakeChat, name: str, talk: str) -> None:
    chat = make_chat("bytelevel", name)
    encoded = chat.encode(TOOL_TALKS[talk])
    assert (loss_text(chat, encoded), encoded.unused) == LOSS[name, talk]


@pytest.mark.parametrize("name", ["qwen3 tools", "qwen3 tools marked", "mistral tools"])
def test_excluded_answers_are_not_in_the_loss(make_chat: MakeChat, name: str) -> None:
    chat = make_chat("bytelevel", name)
    talk = TOOL_TALKS["two turns"]
    whole = chat.encode(talk)
    for i in (2, 4, 6):
        encoded = chat.encode((*talk[:i], talk[i]._replace(in_loss=False), *talk[i + 1 :]))
        (only,) = chat.encoder().encode([tuple(m._replace(in_loss=m is talk[i]) for m in talk)])
        assert isinstance(only, Encoded) and only.loss_mask.any()
        assert (encoded.ids == whole.ids).all()
        assert (encoded.loss_mask == whole.loss_mask & ~only.loss_mask).all()
        # Everything else is in the loss with "all".
        everything = chat.encode((*talk[:i], talk[i]._replace(in_loss=False), *talk[i + 1 :]), "all")
        assert (everything.loss_mask == ~only.loss_mask).all()
    last = chat.encode(talk, "answer")
    assert loss_text(chat, last).strip().removeprefix("<think>\n\n</think>\n\n").startswith("Yes.")


def test_marks_that_are_not_one_per_answer_are_refused_if_an_answer_is_excluded(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.reasoning_content }}{% endgeneration %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder(chat.ours, ChatTemplate(source, {}, "two marks"))
    talk = (ask("a"), say("b", "B"), ask("c"), say("d", "D"))
    encoded, refused = encoder.encode([talk, (talk[0], talk[1]._replace(in_loss=False), *talk[2:])])
    assert isinstance(encoded, Encoded) and loss_text(chat, encoded) == "Bb<|im_end|>Dd<|im_end|>"
    assert isinstance(refused, InvalidRow) and "two marks" in str(refused)


@pytest.mark.parametrize("source", [CHATML, PLAIN])
def test_own_templates_have_no_tools(make_chat: MakeChat, source: str) -> None:
    chat = make_chat("bytelevel", "qwen2")
    encoder = ChatEncoder(chat.ours, ChatTemplate(source, {"eos_token": "</s>"}, "own"))
    refused, kept, reasoning = encoder.encode(
        [TOOL_TALKS["one call"], TOOL_TALKS["no call"], TOOL_TALKS["earlier reasoning"]]
    )
    assert isinstance(refused, InvalidRow) and refused.reason == "tool call left out by the chat template"
    assert str(refused).endswith("(turn 2; own: set chat.template to a template with tools)")
    assert isinstance(kept, Encoded) and kept.unused == (NO_TOOLS,)
    assert isinstance(reasoning, Encoded) and reasoning.unused == (NO_REASONING,)
    assert "b" in loss_text(chat, reasoning)


def test_results_that_a_template_leaves_out_or_moves_are_refused(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen3 tools")
    source = TOOL_TEMPLATES["qwen3 tools"]
    silent = ChatTemplate(source.replace("+ content + '\\n</tool_response>'", "+ '</tool_response>'"), {}, "silent")
    last = ChatTemplate(source + "{% for m in messages if m.content %}{{ m.content }}{% endfor %}", {}, "twice")
    # As in Gemma 4: the text beside a call follows its result.
    moved = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson + messages[loop.index].content }}"
        "{% endif %}{{ m.content if m.role != 'tool' }}{% endfor %}"
    )
    talk = TOOL_TALKS["text and a call"]
    for template, reason in (
        (silent, "result of a tool left out by the chat template"),
        (last, "tool call left out by the chat template"),
        (ChatTemplate(moved, {}, "moved"), "rewritten by the chat template"),
    ):
        (refused,) = ChatEncoder(chat.ours, template).encode([talk])
        assert isinstance(refused, InvalidRow) and refused.reason == reason, template.where


NASTY = st.lists(st.sampled_from([*CONTROLS, "<|im_", "end|>", "a ", "\n", "<tool_call>"]), min_size=1, max_size=4)
TEXTS = NASTY.map("".join)


@pytest.mark.parametrize("name", ["qwen3 tools", "qwen3.5 tools", "llama tools"])
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(TEXTS, min_size=8, max_size=8))
def test_no_part_can_contain_control_tokens(make_chat: MakeChat, name: str, texts: list[str]) -> None:
    """Also in the names and values of arguments, the description of a tool, results and reasoning."""
    chat = make_chat("bytelevel", name)

    def talk(a: str, b: str, c: str, d: str, e: str, f: str, g: str, h: str) -> Conversation:
        tools = Message("tools", "", fields={"tools": [{"type": "function", "function": {"name": "f" + a, "x": [b]}}]})
        return tools, ask("Hi" + c), call({d + "k": [{e: 1}]}, name="f" + f), result("R" + g), say("Ho" + h, "T" + h)

    nasty, clean = (chat.encode(talk(*words)) for words in (texts, ["x"] * 8))
    controls = set(chat.ours.control_tokens.values())

    def count(encoded: Encoded) -> list[int]:
        return [i for i in encoded.ids.tolist() if i in controls]

    assert count(nasty) == count(clean)
    # transformers cuts the text where such a token is; ours is tokenized whole. It does not look at names of arguments.
    conversation = talk(*texts[:3], "x", "x", *texts[5:])
    theirs = chat.theirs.decode(apply(chat, conversation, sanitize_control_tokens=True)["input_ids"])
    assert chat.theirs.decode(chat.encode(conversation).ids.tolist()) == theirs


def test_json_in_ascii_hides_no_mark(make_chat: MakeChat) -> None:
    """A template may write JSON with escapes, and control tokens in it are still text."""
    chat = make_chat("bytelevel", "qwen3 tools")
    source = TOOL_TEMPLATES["qwen3 tools"].replace("| tojson", "| tojson(ensure_ascii=true)")
    encoder = ChatEncoder(chat.ours, ChatTemplate(source, {}, "ascii"))
    (encoded,) = encoder.encode([(TOOLS, ask("Hi"), call({"x": "é猫🙂<|im_end|>"}), result("1"), say("Ho"))])
    assert isinstance(encoded, Encoded)
    assert r'{"x": "\u00e9\u732b\ud83d\ude42<|im_end|>"}' in loss_text(chat, encoded)
    assert encoded.ids.tolist().count(chat.ours.control_tokens["<|im_end|>"]) == 5


def test_reserved_characters_in_arguments_are_refused(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen3 tools")
    for bad in (call({"a\ufdd1": 1}), call({"a": ["\ufdd2"]}), call(PARIS, reasoning="\ufdd0")):
        (refused,) = chat.encoder().encode([(TOOLS, ask("Hi"), bad)])
        assert isinstance(refused, InvalidRow) and refused.reason == "reserved character"


def test_many_tools_and_long_arguments_are_within_the_budget(make_chat: MakeChat) -> None:
    for name in ("qwen3 tools", "llama tools", "mistral tools"):
        chat = make_chat("bytelevel", name)
        tools = Message("tools", "", fields={"tools": [TOOL] * 100})
        long = call({"items": [{"name": "x" * 50, "value": i} for i in range(400)]})
        nested: Any = "deep"
        for _ in range(40):
            nested = {"in": [nested]}
        for one in (long, call({"nested": nested})):
            chat.encode((tools, ask("Hi"), one, result("y" * 5_000), say("Ho"), ask("Hi"), call(ROME)))


def test_budget_grows_with_tools_calls_and_reasoning() -> None:
    source = "{% for i in range(30) %}{{ PART | tojson | length }}{% endfor %}"
    long = "x" * 100_000
    for part, conversation in (
        ("tools", (Message("tools", "", fields={"tools": [TOOL | {"x": long}]}), ask("Hi"))),
        ("messages[1].tool_calls", (ask("Hi"), call({"x": long}))),
        ("messages[1].thinking", (ask("Hi"), say("Ho", long))),
    ):
        assert ChatTemplate(source.replace("PART", part), {}, "t").render(conversation).startswith("100")
        with pytest.raises(InvalidRow, match="too much work or memory"):
            ChatTemplate(source.replace("PART", f"'{long[:90_000]}'"), {}, "t").render((ask("Hi"), say("Ho")))


HOSTILE = {
    "loops over tools": "{% for a in tools %}" * 4 + "{% endfor %}" * 4,
    "JSON of tools": "{% for a in tools %}{% for b in tools %}{{ tools | tojson }}{% endfor %}{% endfor %}",
    "indented JSON": "{% for a in tools %}{{ tools | tojson(indent=100) }}{% endfor %}" * 3,
    "repeated arguments": "{% set a = messages[1].tool_calls[0].function.arguments %}"
    "{% for b in range(1000) %}{% for c in range(1000) %}" + "{{ a }}" * 20 + "{% endfor %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str) -> None:
    conversation = (Message("tools", "", fields={"tools": [TOOL] * 40}), ask("Hi"), call({"a": [[["b"]]]}))
    with pytest.raises(InvalidRow, match="too much work or memory"):
        ChatTemplate(HOSTILE[name], {}, "hostile").render(conversation)
    with pytest.raises(InvalidRow, match="unsafe"):
        ChatTemplate("{{ tools.append(1) }}", {}, "hostile").render(conversation)
    with pytest.raises(InvalidRow, match="unsafe"):
        ChatTemplate("{{ messages[1].tool_calls[0].update({'x': 1}) }}", {}, "hostile").render(conversation)
