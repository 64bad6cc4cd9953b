"""Chat templates render as in transformers, and are loaded from and saved to where Hugging Face keeps them."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as theirs

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import CHATML, PLAIN, ChatTemplate, load_template
from anarchobot.tokenizers.conversation import InvalidRow, Message
from anarchobot.tokenizers.tokenizer import copy_tokenizer, load_tokenizer
from tests.tokenizers.templates import (
    NO_SYSTEM,
    QWEN2,
    TEMPLATES,
    ChatFixture,
    MakeChat,
    bytelevel,
    dialogue,
    loss_text,
    to_dicts,
)
from tests.tokenizers.templates import make_chat as make_chat

TALKS = [
    dialogue("How are you?", "Fine, thanks."),
    dialogue(" two\n", "\n lines <b>&'\"\n", "吾輩は", "猫 {{ 'no' }} {% raw %}"),
    dialogue("a", "b", "c", "d", "e", "f", system="Be  brief.\n"),
    dialogue("a", "<think>\nhm\n</think>\n\nb"),
]
ODD = """{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{{ message | tojson }}{{ {'b': 'é<', 'a': [1]} | tojson(indent=2, sort_keys=true) }}
    {% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ bos_token }}{{ nothing }}
{% endfor %}{{ strftime_now('%d %b %Y') }} {{ tools is none }} {{ documents is none }}
"""


@pytest.mark.parametrize("name", [*TEMPLATES, "chatml", "plain", "odd"])
def test_rendering_matches_transformers(name: str) -> None:
    source = {**TEMPLATES, "chatml": CHATML, "plain": PLAIN, "odd": ODD}[name]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(source, names, name)
    for conversation in TALKS:
        if conversation[0].role == "system" and name in NO_SYSTEM:
            continue
        for prompt in (False, True):
            (expected,), _ = theirs.render_jinja_template(
                [to_dicts(conversation)], chat_template=source, add_generation_prompt=prompt, **names
            )
            assert template.render(conversation, prompt) == expected


def test_real_template_file_matches_transformers(shared_data: Path) -> None:
    file = shared_data / "artifacts" / "chat_template_mistral_v1.jinja"
    template = load_template(load_tokenizer(shared_data / "artifacts" / "mistral_v1_tokenizer.model"), str(file))
    for conversation in TALKS:
        (expected,), _ = theirs.render_jinja_template(
            [to_dicts(conversation)], chat_template=file.read_text(), bos_token="", eos_token="</s>"
        )
        assert template.render(conversation) == expected
    with pytest.raises(InvalidRow, match=r"rejected by .* template \((.*Only user and assistant|Unexpected role)"):
        template.render((*TALKS[0], Message("nobody", "hm")))


def test_day_is_used_in_the_rendering() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, "day")
    assert template.render(TALKS[0], day=datetime(2024, 7, 26)) == "26 Jul 2024"
    before = datetime.now()
    found = template.render(TALKS[0])
    assert found in {day.strftime("%d %b %Y") for day in (before, datetime.now())}  # midnight may have passed


def test_untrusted_templates_are_sandboxed() -> None:
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ):
        with pytest.raises(InvalidRow, match="unsafe"):
            ChatTemplate(source, {}, "bad").render(TALKS[0])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_tokenizers_trained_here_use_chatml(trained: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(trained[kind])
    template = load_template(tokenizer)
    assert template.source == CHATML
    encoder = ChatEncoder(tokenizer, template)
    assert encoder.end_of_turn_id() == tokenizer.control_tokens["<|im_end|>"]
    assert template.render(dialogue("Hi", "Ho", system="Be."), True) == (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_plain_template_ends_answers_with_end_of_document(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "artifacts" / "gpt2_vocab.json")
    template = load_template(tokenizer)
    assert template.render(dialogue("Hi", "Ho"), True) == (
        "### User:\nHi\n\n### Assistant:\nHo<|endoftext|>\n\n### Assistant:\n"
    )
    assert ChatEncoder(tokenizer, template).end_of_turn_id() == tokenizer.eod_id
    assert ChatEncoder(tokenizer, load_template(tokenizer, "chatml")).end_of_turn_id() is None


def test_save_and_load(make_chat: MakeChat, tmp_path: Path) -> None:
    chat = make_chat("bytelevel", "llama3")
    copy_tokenizer(chat.ours, tmp_path)
    chat.template.save(tmp_path)
    again = load_template(load_tokenizer(tmp_path))
    assert (again.source, again.tokens) == (chat.template.source, chat.template.tokens)
    assert again.where == str(tmp_path / "chat_template.jinja")
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(to_dicts(TALKS[0])).input_ids == chat.encode(TALKS[0]).ids.tolist()


def test_locations_and_precedence_in_hugging_face_folders(tmp_path: Path) -> None:
    chat = ChatFixture(tmp_path / "model", bytelevel(), QWEN2)
    config = chat.folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}, "add_bos_token": True}))
    assert load_template(chat.ours).render(TALKS[0]) == "<s>"
    (chat.folder / "chat_template.jinja").write_text("from the file{{ eos_token }}")
    assert load_template(chat.ours).render(TALKS[0]) == "from the file</s>"
    assert load_template(chat.ours, "chatml").source == CHATML
    assert loss_text(chat, chat.encode(TALKS[0])) == "Fine, thanks.<|im_end|>"  # a loaded template does not change


def test_a_byte_order_mark_is_not_part_of_a_template(tmp_path: Path) -> None:
    chat = ChatFixture(tmp_path / "model", bytelevel(), QWEN2)
    (chat.folder / "chat_template.jinja").write_text("\ufeffa", encoding="utf-8")
    assert load_template(chat.ours).render(TALKS[0]) == "a"
    (tmp_path / "b.jinja").write_text("\ufeffb", encoding="utf-8")
    assert load_template(chat.ours, str(tmp_path / "b.jinja")).render(TALKS[0]) == "b"


def test_invalid_templates_are_one_line_errors(make_chat: MakeChat, tmp_path: Path) -> None:
    ours = make_chat("bytelevel", "qwen2").ours
    with pytest.raises(UserError, match=r"none.jinja: cannot read .*: expected auto, chatml, plain or a Jinja file"):
        load_template(ours, str(tmp_path / "none.jinja"))
    (tmp_path / "bad.jinja").write_text("{% for message in messages %}")
    with pytest.raises(UserError, match=r"bad.jinja: invalid chat template: .*endfor"):
        load_template(ours, str(tmp_path / "bad.jinja"))
    chat = ChatFixture(tmp_path / "model", bytelevel(), QWEN2)
    (chat.folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not valid JSON"):
        load_template(chat.ours)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}",
        "{{ messages[0].content.foo.bar }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ (10 ** 400) * 1.0 }}",
        "{{ messages[0]['content'].encode('ascii') }}",
        "{{ strftime_now(1) }}",
    ],
)
def test_any_error_in_a_template_rejects_the_conversation(source: str) -> None:
    template = ChatTemplate(source, {}, "t")
    with pytest.raises(InvalidRow, match=r"rejected by the chat template \(.+\)$"):
        template.render((Message("user", "é"),))


def test_deeply_nested_template_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^t: invalid chat template: "):
        ChatTemplate("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", {}, "t")


def test_deeply_nested_tokenizer_config_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(UserError, match=r"tokenizer_config.json: not valid JSON: "):
        ChatTemplate("", {}, "t").save(tmp_path)


@pytest.mark.parametrize("source", [5, {}, ["x"], [{"a": 1}], [[]], [{"name": "default", "template": 5}]])
def test_a_chat_template_that_is_no_template_is_an_error(tmp_path: Path, source: object) -> None:
    chat = ChatFixture(tmp_path / "model", bytelevel(), QWEN2)
    file = chat.folder / "tokenizer_config.json"
    file.write_text(json.dumps({"chat_template": source}))
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template: expected a template"):
        load_template(chat.ours)
    (chat.folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja: cannot read chat template"):
        load_template(chat.ours)
