"""Modelfiles for Ollama: the chat template in its template language (Go's), stop strings and sampling parameters.

Most chat templates put a fixed text before and after each message, which can be read off a rendered conversation.
Tools are left out: since 0.30, Ollama runs the Jinja template of the GGUF file if it has tools or reasoning, and the
Modelfile's template does not (`shouldPreferChatTemplate` in its server/images.go). That gives the exact text. Go's JSON
would not: it has no spaces, sorts the arguments' names and escapes `<`. Before 0.30, Ollama does not run Jinja.

https://docs.ollama.com/modelfile, https://docs.ollama.com/template
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import pairwise, takewhile
from typing import NamedTuple

from anarchobot.config.schema import Config
from anarchobot.exchange.chat_format import ChatFormat
from anarchobot.tokenizers.chat_template import ChatTemplate
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message
from anarchobot.tokenizers.tokenizer import ChatTokenizer

FILE = "Modelfile"
MAX_CONTEXT = 8192  # Ollama reserves the memory of the whole context; more can be set with PARAMETER num_ctx
_DAYS = (datetime(2026, 1, 1), datetime(2027, 12, 31))
_CONTENTS = ("probe one", "probe two", "probe three", "probe four", "probe five", "probe six")


class TurnFormat(NamedTuple):
    """The fixed texts of a chat template. A conversation starts with `start`, or `start_system` if it has a system
    message; `before` and `after` are around each message, by its role; `prompt` starts an answer. The roles are user,
    assistant and, if the template supports it, system."""

    start: str
    start_system: str
    before: dict[str, str]
    after: dict[str, str]
    prompt: str

    def render(self, conversation: Conversation) -> str:
        roles = [message.role for message in conversation]
        turns = (self.before[m.role] + m.content + self.after[m.role] for m in conversation)
        return "".join((self.start_system if "system" in roles else self.start, *turns, self.prompt))


def find_turn_format(template: ChatTemplate, bos: str = "") -> TurnFormat | None:
    """The fixed texts of a template, without the token `bos` that starts a conversation; None if it has none: a
    conversation is rendered in another way."""

    def render(conversation: Conversation, day: datetime = _DAYS[0]) -> str:
        return template.render(conversation, True, day=day).removeprefix(bos)

    plain = _texts_between(render, ["user", "assistant", "user", "assistant", "user"])
    if plain is None:
        return None
    first, to_answer, to_user, prompt = plain[0], plain[1], plain[2], plain[-1]
    with_system = _texts_between(render, ["system", "user", "assistant", "user"])
    after_system = [] if with_system is None else [with_system[1]]
    # A text between two messages belongs to both. What users always have before them is theirs.
    before_user = _common_suffix([first, to_user, *after_system])
    start, after_assistant = (text.removesuffix(before_user) for text in (first, to_user))
    after_user = _common_prefix([to_answer, prompt, after_assistant])
    before = {"user": before_user, "assistant": to_answer.removeprefix(after_user)}
    after = {"user": after_user, "assistant": after_assistant}
    start_system = ""
    if with_system is not None:
        start_system = start if with_system[0].startswith(start) else ""
        before["system"] = with_system[0].removeprefix(start_system)
        after["system"] = with_system[1].removesuffix(before_user)
    found = TurnFormat(start, start_system, before, after, prompt.removeprefix(after_user))
    return found if all(render(probe) == found.render(probe) for probe in _probes(found)) else None


def modelfile(gguf: str, tokenizer: ChatTokenizer, chat: ChatFormat | None, config: Config) -> tuple[str, list[str]]:
    """Returns the text of a Modelfile for the file `gguf` in its folder, and warnings about what Ollama does otherwise.

    The sampling parameters are those of the generation section of `config`.
    """
    lines, warnings, stops = [f"FROM ./{gguf}"], list[str](), list[str]()
    if chat is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        names = {i: text for text, i in tokenizer.control_tokens.items()}
        stops = [names[i] for i in chat.stop_ids if i in names]
        warnings += [f"Ollama does not stop at token {i}, which is plain text" for i in chat.stop_ids if i not in names]
        bos = "" if chat.bos_id is None else chat.special_tokens["bos_token"]  # Ollama adds it, as the GGUF file says
        if (turns := find_turn_format(chat.template, bos)) is None:
            warnings.append(
                "the chat template can't be written in Ollama's language, and is not in the Modelfile: Ollama runs the "
                "one in the GGUF file; before 0.30, it uses the one that it recognizes (`ollama show --modelfile`), or "
                "the bare prompt"
            )
        else:
            lines.append(f'TEMPLATE """{_go_template(turns)}"""')
            warnings += _differences(turns, chat.template, bos)
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    settings = config.generation
    top_k, top_p, min_p = settings.filters
    parameters = {
        "num_ctx": min(config.model.max_seq_len, MAX_CONTEXT),
        "temperature": 0.0 if settings.is_greedy else settings.temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repeat_last_n": 20,  # as in generation.repetition_penalty
        "repeat_penalty": settings.repetition_penalty,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
    }
    lines += [f"PARAMETER {name} {value:g}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n", warnings


def _texts_between(render: Callable[[Conversation, datetime], str], roles: Sequence[str]) -> list[str] | None:
    """The texts before, between and after the contents of a conversation with these roles; None if the template rejects
    it, changes their order, or prints the date."""
    messages = tuple(Message(role, text) for role, text in zip(roles, _CONTENTS, strict=False))
    try:
        text, later = (render(messages, day) for day in _DAYS)
    except InvalidRow:
        return None
    ends = [0]
    for message in messages:
        if text.count(message.content) != 1 or (start := text.index(message.content)) < ends[-1]:
            return None
        ends += [start, start + len(message.content)]
    ends.append(len(text))
    return [text[a:b] for a, b in list(pairwise(ends))[::2]] if text == later else None


def _probes(turns: TurnFormat) -> list[Conversation]:
    """Conversations of different lengths, with and without a system message."""
    texts = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(_CONTENTS)]
    dialogues = [tuple(texts[:count]) for count in (1, 3, 5)]
    return dialogues + [(Message("system", "Be kind."), *d) for d in dialogues if "system" in turns.before]


def _differences(turns: TurnFormat, template: ChatTemplate, bos: str) -> list[str]:
    """Warnings about messages that the template changes, and the Modelfile's does not."""
    ollama = "Ollama before 0.30" if _handles_more(template.source) else "Ollama"
    spaces = (Message("user", "  Hi \n"),)
    thought = (Message("user", "Hi"), Message("assistant", "<think>\nWhy?\n</think>\n\nHi"), Message("user", "So?"))
    found = []
    if "system" not in turns.before:
        found.append("the chat template has no system message: Ollama ignores SYSTEM")
    if template.render(spaces, True).removeprefix(bos) != turns.render(spaces):
        found.append(f"{ollama} does not strip the spaces around a message, which the chat template does")
    if template.render(thought, True).removeprefix(bos) != turns.render(thought):
        found.append(f"{ollama} does not remove the reasoning of earlier answers, which the chat template does")
    return found


def _handles_more(source: str) -> bool:
    """Whether Ollama 0.30 runs this template instead of the Modelfile's: by its rule, it has tools or reasoning."""
    return "tools" in source or "tool_call" in source or ("<think>" in source and "</think>" in source)


def _go_template(turns: TurnFormat) -> str:
    start = _literal(turns.start)
    if turns.start != turns.start_system and "system" in turns.before:
        start = f"{{{{ if .System }}}}{_literal(turns.start_system)}{{{{ else }}}}{start}{{{{ end }}}}"
    cases = [
        f'if eq .Role "{role}" }}}}{_literal(turns.before[role])}{{{{ .Content }}}}{_literal(turns.after[role])}'
        for role in turns.before
    ]
    messages = "{{ " + "{{ else ".join(cases) + "{{ end }}"
    return f"{start}{{{{ range .Messages }}}}{messages}{{{{ end }}}}{_literal(turns.prompt)}"


def _literal(text: str) -> str:
    """A text in a Go template inside the triple quotes of a Modelfile."""
    special = "{{" in text or '""' in text or text.endswith(("{", '"'))  # an action or a quote may follow
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if special else text


def _common_prefix(texts: Sequence[str]) -> str:
    columns = zip(*texts, strict=False)
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _common_suffix(texts: Sequence[str]) -> str:
    return _common_prefix([text[::-1] for text in texts])[::-1]
