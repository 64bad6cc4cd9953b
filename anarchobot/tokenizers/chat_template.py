"""Jinja chat templates, compatible with Hugging Face's: conversations to the text that the model sees."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import write_atomic
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message
from anarchobot.tokenizers.special_tokens import TOKENIZER_CONFIG, read_config, read_special_tokens
from anarchobot.tokenizers.template_budget import BudgetContext, BudgetEnvironment, compile_source
from anarchobot.tokenizers.template_costs import size
from anarchobot.tokenizers.tokenizer import CHAT_TOKENS, ChatTokenizer

FILE = "chat_template.jinja"  # as in Hugging Face folders

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# For tokenizers without <|im_start|> and <|im_end|>. ChatML's markers would be plain text there: six to ten tokens
# each, merged with neighboring words, and forgeable by users. An answer ends with the end-of-document token instead,
# which is known from pretraining, stops generation anyway and cannot be forged.
PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
# Mark the start and end of an answer in a marked rendering. SPLIT is removed from a rendered text. All are Unicode
# noncharacters, which text never contains.
BEGIN, END, SPLIT = "\ufdd0", "\ufdd1", "\ufdd2"
TRAINING_DAY = datetime(2026, 1, 1)
_MESSAGE_SIZE = 200  # counted for each message in addition to its characters
MAX_INDENT = 100
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names of the same in different templates
_NOT_ASCII = re.compile(f"[^\\x00-\\x7f{BEGIN}{END}{SPLIT}]")


class CallForm(NamedTuple):
    """How a template expects calls: `blank` is the content of a message without text, which may be missing, and
    `as_text` is whether the arguments are JSON text."""

    blank: Literal["", "missing"] | None
    as_text: bool


_BLANKS: tuple[Literal["", "missing"] | None, ...] = ("", "missing", None)
_CALL_FORMS = [CallForm(blank, as_text) for as_text in (False, True) for blank in _BLANKS]


class ChatTemplate:
    """A template and the special tokens that it names, such as `bos_token`.

    Rendering depends only on the conversation and on `day`, which some templates print. Training uses TRAINING_DAY, so
    that a run resumed on another day sees the same tokens. Templates are untrusted: they run in Jinja's sandbox, and
    their time and memory are limited (template_budget.py).
    """

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        """`where` is shown in messages. Raises UserError if the source is not a valid Jinja template."""
        self.source, self.tokens, self.where = source, dict(tokens), where
        try:
            self._plain = compile_source(_environment(_Generation), source)
        except Exception as error:  # Python's compiler has limits of its own: SyntaxError, MemoryError, RecursionError
            raise UserError(f"{where}: invalid chat template: {_one_line(error)}") from error

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template marks what the assistant writes with {% generation %}."""
        tree = _environment(_MarkedGeneration).parse(self.source)
        return any(data.data == BEGIN for data in tree.find_all(nodes.TemplateData))

    @cached_property
    def _marking(self) -> Callable[[Mapping[str, Any], int], str]:
        return compile_source(_environment(_MarkedGeneration), self.source)

    def render(
        self,
        conversation: Conversation,
        add_generation_prompt: bool = False,
        *,
        day: datetime | None = None,
        marked: bool = False,
    ) -> str:
        """`add_generation_prompt` ends the text with the start of an assistant turn. `day` defaults to today. `marked`
        puts BEGIN and END around {% generation %} blocks. Raises InvalidRow if the template rejects the conversation.
        """
        form = self._call_form if any(message.tool_calls for message in conversation) else _CALL_FORMS[0]
        return self._render(conversation, form, add_generation_prompt, day, marked)

    @cached_property
    def _call_form(self) -> CallForm:
        """The form in which the template renders a call, with the least text around it; arguments are an object if it
        accepts them."""
        call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"x": END}}}
        messages = (Message("user", "Hi"), Message("assistant", "", fields={"tool_calls": [call]}))
        lengths: dict[CallForm, int] = {}
        for form in _CALL_FORMS:
            try:
                text = self._render(messages, form, False, TRAINING_DAY, False)
            except InvalidRow:
                continue
            if END in text:
                lengths[form] = len(text)
        return min(lengths, key=lambda form: (form.as_text, lengths[form]), default=_CALL_FORMS[0])

    def _render(
        self,
        conversation: Conversation,
        form: CallForm,
        add_generation_prompt: bool,
        day: datetime | None,
        marked: bool,
    ) -> str:
        tools = conversation[0].fields["tools"] if conversation and conversation[0].role == "tools" else None
        variables = {
            "messages": [_variables(message, form) for message in conversation if message.role != "tools"],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": (day or datetime.now()).strftime,
            **self.tokens,
        }
        characters = sum([_MESSAGE_SIZE + len(message.content) for message in conversation])
        try:
            characters += sum(
                [len(m.reasoning) + size(m.fields, sys.maxsize) for m in conversation if m.reasoning or m.fields]
            )
            text = (self._marking if marked else self._plain)(variables, characters)
            text.encode()  # surrogates, which JSON can hold and tokenizers can't encode
            return text
        except Exception as error:  # a template may raise anything, such as ZeroDivisionError or RecursionError
            raise InvalidRow("rejected by the chat template", _one_line(error)) from error

    def save(self, folder: Path) -> None:
        """Saves the template in a tokenizer folder, where `load_template` and Hugging Face libraries find it."""
        write_atomic(folder / FILE, self.source)
        config = read_config(folder / TOKENIZER_CONFIG) | self.tokens
        write_atomic(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _variables(message: Message, form: CallForm) -> dict[str, Any]:
    """A message as templates expect it."""
    variables = {"role": message.role, "content": message.content} | dict(message.fields)
    if message.reasoning:
        variables |= dict.fromkeys(_REASONING, message.reasoning)
    if message.tool_calls:
        if not message.content:
            variables["content"] = form.blank
            if form.blank == "missing":
                del variables["content"]
        if form.as_text:
            variables["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": json_text(call["function"]["arguments"])}}
                for call in message.tool_calls
            ]
    return variables


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def load_template(tokenizer: ChatTokenizer, choice: str = "auto") -> ChatTemplate:
    """`choice` is "chatml", "plain", a Jinja file, or "auto": the template in the tokenizer's folder, else ChatML if
    the tokenizer has its tokens, else PLAIN. Raises UserError for a missing or invalid file."""
    folder = tokenizer.files[0].parent
    config = read_config(folder / TOKENIZER_CONFIG)
    eos = next((text for text, i in tokenizer.control_tokens.items() if i == tokenizer.eod_id), "")
    tokens = {"eos_token": eos} | read_special_tokens(folder).names
    if choice == "auto":
        source, where = _template_in(folder, config)
        if source is not None:
            return ChatTemplate(source, tokens, where)
        choice = "chatml" if all(token in tokenizer.control_tokens for token in CHAT_TOKENS) else "plain"
    if choice in ("chatml", "plain"):
        return ChatTemplate(CHATML if choice == "chatml" else PLAIN, tokens, choice)
    return ChatTemplate(_read(Path(choice)), tokens, choice)


def _template_in(folder: Path, config: dict[str, Any]) -> tuple[str | None, str]:
    """The template in a tokenizer folder, and its location."""
    if (folder / FILE).is_file():
        return _read(folder / FILE), str(folder / FILE)
    where = f"{folder / TOKENIZER_CONFIG}: chat_template"
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        try:
            named = {item["name"]: item["template"] for item in source}
        except (TypeError, KeyError) as error:
            raise UserError(f"{where}: expected a template, or a list of objects with name and template") from error
        source = named.get("default", next(iter(named.values()), None))
    if not isinstance(source, str | None):
        raise UserError(f"{where}: expected a template, got {str(source)[:80]!r}")
    return source, where


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read chat template: expected auto, chatml, plain or a Jinja file") from error


def _environment(generation: type[Extension]) -> BudgetEnvironment:
    environment = BudgetEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols])
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    return environment


@pass_context
def _tojson(
    context: BudgetContext,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    encoder = json.JSONEncoder(ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None and separators is None:
        text = encoder.encode(value)
    else:
        if isinstance(indent, int) and indent > MAX_INDENT:
            raise TemplateError(f"tojson: indent {indent}, at most {MAX_INDENT}")
        chunks = []
        for chunk in encoder.iterencode(value):
            context.budget.spend(len(chunk))
            chunks.append(chunk)
        text = "".join(chunks)
    # The marks stay as they are.
    return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: text that the assistant writes."""

    tags = {"generation"}  # noqa: RUF012
    begin, end = "", ""

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(text)], lineno=line) for text in (self.begin, self.end))
        return [begin, *body, end]


class _MarkedGeneration(_Generation):
    begin, end = BEGIN, END
