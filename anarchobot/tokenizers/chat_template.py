"""Chat templates: conversations to the text that a model sees, by Jinja, as Hugging Face has it."""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import write_atomic
from anarchobot.tokenizers.conversation import Conversation, InvalidRow
from anarchobot.tokenizers.tokenizer import CHAT_TOKENS, ChatTokenizer

FILE = "chat_template.jinja"  # where Hugging Face keeps it too
CONFIG = "tokenizer_config.json"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# For tokenizers that have no <|im_start|> and <|im_end|>. There ChatML's marks would be text: six to ten tokens each,
# glued to the words beside them, and forged by whoever writes them. An answer ends with the end of a document instead:
# one token, known from pretraining, that stops generation anyway, and that no text can forge.
PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
# What begins and ends an answer in a rendering with marks: characters that Unicode keeps out of text for ever.
BEGIN, END = "\ufdd0", "\ufdd1"
TRAINING_DAY = datetime(2026, 1, 1)


class ChatTemplate:
    """A template with the special tokens it names (`bos_token` and so on).

    Rendering is a function of the conversation and of `day`, which some templates print: training takes TRAINING_DAY,
    so that a run resumed tomorrow has the same tokens. Templates come from strangers: they run in Jinja's sandbox.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        """`where` is named in messages. Raises UserError when the source is no Jinja template."""
        self.source, self.tokens, self.where = source, dict(tokens), where
        try:
            self._plain = _environment(_Generation).from_string(source)
        except TemplateError as error:
            raise UserError(f"{where}: not a chat template that can be read: {_one_line(error)}") from error

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template says itself what the assistant writes, by {% generation %}."""
        tree = _environment(_MarkedGeneration).parse(self.source)
        return any(data.data == BEGIN for data in tree.find_all(nodes.TemplateData))

    @cached_property
    def _marking(self) -> Template:
        return _environment(_MarkedGeneration).from_string(self.source)

    def render(
        self,
        conversation: Conversation,
        add_generation_prompt: bool = False,
        *,
        day: datetime | None = None,
        marked: bool = False,
    ) -> str:
        """The text, which with `add_generation_prompt` ends where the assistant begins to write. `day`: left out: now.
        `marked`: with BEGIN and END around what {% generation %} encloses. Raises InvalidRow when the template
        refuses."""
        template = self._marking if marked else self._plain
        try:
            return template.render(
                messages=[{"role": role, "content": content} for role, content in conversation],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=(day or datetime.now()).strftime,
                **self.tokens,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:  # what templates run into
            raise InvalidRow("the chat template refuses it", _one_line(error)) from error

    def save(self, folder: Path) -> None:
        """Writes it beside a tokenizer, where `load_template` and Hugging Face's libraries find it."""
        write_atomic(folder / FILE, self.source)
        config = _read_config(folder / CONFIG) | self.tokens
        write_atomic(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load_template(tokenizer: ChatTokenizer, choice: str = "auto") -> ChatTemplate:
    """The template in the tokenizer's folder, or ChatML, or PLAIN where the tokenizer lacks ChatML's tokens ("auto");
    or `choice`: "chatml", "plain" or a Jinja file.

    Raises UserError when there is no such file, or what is there can't be read.
    """
    folder = tokenizer.files[0].parent
    config = _read_config(folder / CONFIG)
    eos = next((text for text, i in tokenizer.control_tokens.items() if i == tokenizer.eod_id), "")
    tokens = {"eos_token": eos} | _special_tokens(config)
    if choice == "auto":
        source, where = _own(folder, config)
        if source is not None:
            return ChatTemplate(source, tokens, where)
        choice = "chatml" if all(mark in tokenizer.control_tokens for mark in CHAT_TOKENS) else "plain"
    if choice in ("chatml", "plain"):
        return ChatTemplate(CHATML if choice == "chatml" else PLAIN, tokens, choice)
    try:
        return ChatTemplate(Path(choice).read_text(encoding="utf-8"), tokens, choice)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{choice}: no chat template: expected auto, chatml, plain or a Jinja file") from error


def _own(folder: Path, config: dict[str, Any]) -> tuple[str | None, str]:
    """The template that comes with a tokenizer, and where it stands."""
    if (folder / FILE).is_file():
        return (folder / FILE).read_text(encoding="utf-8"), str(folder / FILE)
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {item["name"]: item["template"] for item in source}
        source = named.get("default", next(iter(named.values()), None))
    return source, f"{folder / CONFIG}: chat_template"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {_one_line(error)}") from error
    return config if isinstance(config, dict) else {}


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Texts of the tokens that a config names, which it gives as they are or as {"content": ...}."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _environment(generation: type[Extension]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012
    begin, end = "", ""

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(text)], lineno=line) for text in (self.begin, self.end))
        return [begin, *body, end]


class _MarkedGeneration(_Generation):
    begin, end = BEGIN, END
