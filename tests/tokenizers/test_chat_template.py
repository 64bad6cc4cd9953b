"""Templates render as transformers renders them, are found where Hugging Face puts them, and saved there again."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as theirs

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import CHATML, PLAIN, ChatTemplate, load_template
from anarchobot.tokenizers.conversation import InvalidRow, Message
from anarchobot.tokenizers.tokenizer import copy_tokenizer, load_chat_tokenizer
from tests.tokenizers.templates import NO_SYSTEM, QWEN2, TEMPLATES, Both, bytelevel, dicts, talk, trained_text

TALKS = [
    talk("How are you?", "Fine, thanks."),
    talk(" two\n", "\n lines <b>&'\"\n", "吾輩は", "猫 {{ 'no' }} {% raw %}"),
    talk("a", "b", "c", "d", "e", "f", system="Be  brief.\n"),
    talk("a", "<think>\nhm\n</think>\n\nb"),
]
ODD = """{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
{{ message | tojson }}{{ {'b': 'é<', 'a': [1]} | tojson(indent=2, sort_keys=true) }}
    {% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ bos_token }}{{ nothing }}
{% endfor %}{{ strftime_now('%d %b %Y') }} {{ tools is none }} {{ documents is none }}
"""


@pytest.mark.parametrize("name", [*TEMPLATES, "chatml", "plain", "odd"])
def test_the_text_is_that_of_transformers(name: str) -> None:
    source = {**TEMPLATES, "chatml": CHATML, "plain": PLAIN, "odd": ODD}[name]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(source, names, name)
    for conversation in TALKS:
        if conversation[0].role == "system" and name in NO_SYSTEM:
            continue
        for prompt in (False, True):
            (wanted,), _ = theirs.render_jinja_template(
                [dicts(conversation)], chat_template=source, add_generation_prompt=prompt, **names
            )
            assert template.render(conversation, prompt) == wanted


def test_a_real_template_file_renders_as_by_transformers(shared_data: Path) -> None:
    file = shared_data / "artifacts" / "chat_template_mistral_v1.jinja"
    template = load_template(load_chat_tokenizer(shared_data / "artifacts" / "mistral_v1_tokenizer.model"), str(file))
    for conversation in TALKS:
        (wanted,), _ = theirs.render_jinja_template(
            [dicts(conversation)], chat_template=file.read_text(), bos_token="", eos_token="</s>"
        )
        assert template.render(conversation) == wanted
    with pytest.raises(InvalidRow, match=r"refuses it \(.*Only user and assistant roles|refuses it \(Unexpected role"):
        template.render((*TALKS[0], Message("nobody", "hm")))


def test_the_day_is_the_day_asked_for() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, "day")
    assert template.render(TALKS[0], day=datetime(2024, 7, 26)) == "26 Jul 2024"
    before = datetime.now()
    found = template.render(TALKS[0])
    assert found in {day.strftime("%d %b %Y") for day in (before, datetime.now())}  # midnight may have passed


def test_a_stranger_s_template_can_do_nothing_but_write_text() -> None:
    for source in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ):
        with pytest.raises(InvalidRow, match="unsafe"):
            ChatTemplate(source, {}, "bad").render(TALKS[0])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_tokenizer_trained_here_gets_chatml(trained: dict[str, Path], kind: str) -> None:
    tokenizer = load_chat_tokenizer(trained[kind])
    template = load_template(tokenizer)
    assert template.source == CHATML
    encoder = ChatEncoder(tokenizer, template)
    assert encoder.end_of_turn() == tokenizer.control_tokens["<|im_end|>"]
    assert template.render(talk("Hi", "Ho", system="Be."), True) == (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_without_chatml_s_tokens_an_answer_ends_with_the_end_of_a_document(shared_data: Path) -> None:
    tokenizer = load_chat_tokenizer(shared_data / "artifacts" / "gpt2_vocab.json")
    template = load_template(tokenizer)
    assert template.render(talk("Hi", "Ho"), True) == (
        "### User:\nHi\n\n### Assistant:\nHo<|endoftext|>\n\n### Assistant:\n"
    )
    assert ChatEncoder(tokenizer, template).end_of_turn() == tokenizer.eod_id
    assert ChatEncoder(tokenizer, load_template(tokenizer, "chatml")).end_of_turn() is None


def test_it_is_saved_beside_the_tokenizer_and_found_there(both: Callable[[str, str], Both], tmp_path: Path) -> None:
    b = both("bytelevel", "llama3")
    copy_tokenizer(b.ours, tmp_path)
    b.template.save(tmp_path)
    again = load_template(load_chat_tokenizer(tmp_path))
    assert (again.source, again.tokens) == (b.template.source, b.template.tokens)
    assert again.where == str(tmp_path / "chat_template.jinja")
    from transformers import PreTrainedTokenizerFast

    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(dicts(TALKS[0])).input_ids == b.encoded(TALKS[0]).ids.tolist()


def test_hugging_face_s_ways_of_keeping_it(tmp_path: Path) -> None:
    b = Both(tmp_path / "model", bytelevel(), QWEN2)
    config = b.folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}, "add_bos_token": True}))
    assert load_template(b.ours).render(TALKS[0]) == "<s>"
    (b.folder / "chat_template.jinja").write_text("from the file{{ eos_token }}")
    assert load_template(b.ours).render(TALKS[0]) == "from the file<|endoftext|>"
    assert load_template(b.ours, "chatml").source == CHATML
    assert trained_text(b, b.encoded(TALKS[0])) == "Fine, thanks.<|im_end|>"  # what was loaded stays


def test_what_is_no_template_is_told_in_a_line(both: Callable[[str, str], Both], tmp_path: Path) -> None:
    ours = both("bytelevel", "qwen2").ours
    with pytest.raises(UserError, match=r"none.jinja: no chat template: expected auto, chatml, plain or a Jinja file"):
        load_template(ours, str(tmp_path / "none.jinja"))
    (tmp_path / "bad.jinja").write_text("{% for message in messages %}")
    with pytest.raises(UserError, match=r"bad.jinja: not a chat template that can be read: .*endfor"):
        load_template(ours, str(tmp_path / "bad.jinja"))
    b = Both(tmp_path / "model", bytelevel(), QWEN2)
    (b.folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not valid JSON"):
        load_template(b.ours)
