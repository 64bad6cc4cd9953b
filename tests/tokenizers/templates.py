"""Chat templates of real models, without their tool sections, and tokenizers that have their special tokens."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from anarchobot.tokenizers.chat_encoder import ChatEncoder, Encoded, TrainOn
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.conversation import Conversation, Message, PreferencePair
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.tokenizers.tool_templates import TOOL_TEMPLATES

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""  # noqa: E501
# As in Qwen3.5: contents are trimmed, and the prompt opens a reasoning block that earlier turns do not have.
QWEN35 = QWEN3.replace("content = message.content ", "content = message.content | trim ").replace(
    "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
COHERE = (  # two tokens end a turn, as in Command A
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '\n' + message['content'] + '<|end|><|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The same templates with {% generation %} marks, from which transformers computes its own mask.
QWEN2_MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_MARKED = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_MARKED = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token}}{% endgeneration %}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "qwen2": QWEN2, "qwen3": QWEN3, "qwen3.5": QWEN35, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA,
    "phi3": PHI3, "cohere": COHERE, "llama2": LLAMA2, "qwen2 marked": QWEN2_MARKED, "llama3 marked": LLAMA3_MARKED,
    "mistral marked": MISTRAL_MARKED,
}  # fmt: skip
MARKED = {"qwen2": QWEN2_MARKED, "llama3": LLAMA3_MARKED, "mistral": MISTRAL_MARKED}
NO_SYSTEM = ("mistral", "mistral marked", "gemma")
CONTROLS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def bytelevel() -> tokenizers.Tokenizer:
    """Byte-level BPE as in GPT-2, without trimmed offsets."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return _trained(tokenizer, tokenizers.pre_tokenizers.ByteLevel.alphabet())


def metaspace(prepend_scheme: str) -> tokenizers.Tokenizer:
    """As in Llama and Mistral: a space is added before the text ("first") or before each of its parts ("always")."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prepend_scheme, True)
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    return _trained(tokenizer, [], ["<unk>", *(f"<0x{b:02X}>" for b in range(256))])


def _trained(
    model: tokenizers.Tokenizer, alphabet: list[str], special: list[str] | None = None
) -> tokenizers.Tokenizer:
    text = Path(__file__).read_text(encoding="utf-8")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=special or [], show_progress=False
    )
    model.train_from_iterator([*text.split("\n"), "\n\n a" * 99], trainer)
    whole = json.loads(model.to_str())
    whole["added_tokens"] = []  # bytes are ordinary pieces
    model = tokenizers.Tokenizer.from_str(json.dumps(whole))
    model.add_tokens(["<think>", "</think>"])  # as in Qwen3: added tokens, but not control tokens
    model.add_special_tokens(CONTROLS)
    return model


KINDS = {"bytelevel": bytelevel, "first": lambda: metaspace("first"), "always": lambda: metaspace("always")}


class ChatFixture:
    """A tokenizer folder with a chat template, loaded by anarchobot (`ours`) and by transformers (`theirs`)."""

    def __init__(self, folder: Path, model: tokenizers.Tokenizer, template: str) -> None:
        folder.mkdir()
        model.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**NAMES, "chat_template": template}))
        self.folder = folder
        self.ours = load_tokenizer(folder)
        self.template = load_template(self.ours)
        names: dict[str, Any] = NAMES
        self.theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=template, **names
        )

    def encoder(self, train_on: TrainOn = "assistant") -> ChatEncoder:
        return ChatEncoder(self.ours, self.template, train_on)

    def encode(self, conversation: Conversation, train_on: TrainOn = "assistant") -> Encoded:
        (encoded,) = self.encoder(train_on).encode([conversation])
        assert isinstance(encoded, Encoded), encoded
        return encoded


MakeChat = Callable[[str, str], ChatFixture]


@pytest.fixture(scope="session")
def make_chat(tmp_path_factory: pytest.TempPathFactory) -> MakeChat:
    """Makes a fixture from the names of a tokenizer and a template, once for each combination."""
    models = {kind: make() for kind, make in KINDS.items()}
    sources = {**TEMPLATES, **TOOL_TEMPLATES}

    @cache
    def make_cached(kind: str, template: str) -> ChatFixture:
        return ChatFixture(tmp_path_factory.mktemp("chat") / "model", models[kind], sources[template])

    return make_cached


def dialogue(*contents: str, system: str = "") -> Conversation:
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return (Message("system", system), *turns) if system else tuple(turns)


def preference(prompt: Conversation, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(prompt, Message("assistant", chosen), Message("assistant", rejected))


def to_dicts(conversation: Conversation) -> list[dict[str, Any]]:
    """The messages as transformers expects them, without the tools."""
    return [
        {"role": message.role, "content": message.content, **message.fields}
        | ({"reasoning_content": message.reasoning} if message.reasoning else {})
        for message in conversation
        if message.role != "tools"
    ]


def loss_text(chat: ChatFixture, encoded: Encoded) -> str:
    """The loss tokens, control tokens included, decoded by transformers."""
    return str(chat.theirs.decode(encoded.ids[encoded.loss_mask].tolist(), skip_special_tokens=False))
