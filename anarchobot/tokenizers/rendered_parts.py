"""Which parts of a conversation its template renders: tools, calls, their results and reasoning.

The conversation is rendered a second time with a mark in each part. A part is rendered if its mark is in the text.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from anarchobot.tokenizers.chat_template import END, TRAINING_DAY, ChatTemplate
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message, turn

NO_TOOLS = "the tools, which the chat template leaves out"
NO_REASONING = "the reasoning, which the chat template leaves out"
ANSWERS = "the answers whose reasoning the chat template leaves out"
_MARK = re.compile(f"{END}([^{END}]*){END}")
_FORM = ("tools", "tool_calls", "tool_call_id", "id", "type", "function", "name", "arguments")
_REASONING_PROBE = (Message("user", "Hi"), Message("assistant", "Hi", END))


class RenderedParts:
    """Looks for the parts of conversations in the output of `template`."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        try:
            self._keeps_reasoning = END in template.render(_REASONING_PROBE, day=TRAINING_DAY)
        except InvalidRow:
            self._keeps_reasoning = False

    def check(self, conversation: Conversation) -> tuple[Conversation, tuple[str, ...]]:
        """The conversation with the answers that can be in the loss, and what is not used of it.

        Raises InvalidRow if a call, text beside a call or a result is left out or repeated, because the messages after
        it would teach something else. Qwen3 and others leave out the reasoning before the last question. Such answers
        are not in the loss, because they would teach to answer the same prompts without reasoning. Templates with
        {% generation %} marks decide that themselves.
        """
        if not any(message.reasoning or message.fields or message.role == "tool" for message in conversation):
            return conversation, ()
        marked = [_mark(message, f"{END}{i}{END}") for i, message in enumerate(conversation)]
        order = _MARK.findall(self._render(message for message, _ in marked))
        found = Counter(order)
        notes = [NO_TOOLS] if conversation[0].role == "tools" and not found["0"] else []
        for i, (_, expected) in enumerate(marked):
            if expected and found[str(i)] != expected:
                kind = "result of a tool" if conversation[i].role == "tool" else "tool call"
                remedy = f"{self._template.where}: set chat.template to a template with tools"
                raise InvalidRow(f"{kind} left out by the chat template", f"turn {turn(conversation, i)}; {remedy}")
        turns = [int(mark) for mark in order if mark.isdigit() and marked[int(mark)][1]]
        if turns != sorted(turns):
            raise InvalidRow("rewritten by the chat template", f"in another order; {self._template.where}")
        lost = [i for i, message in enumerate(conversation) if message.reasoning and not found[f"r{i}"]]
        if lost and self._keeps_reasoning and not self._template.marks_answers:
            kept = enumerate(conversation)
            conversation = tuple(message._replace(in_loss=False) if i in lost else message for i, message in kept)
            notes.append(ANSWERS)
        elif lost:
            notes.append(NO_REASONING)
        return conversation, tuple(notes)

    def _render(self, messages: Iterable[Message]) -> str:
        return self._template.render(tuple(messages), day=TRAINING_DAY)


def _mark(message: Message, mark: str) -> tuple[Message, int]:
    """The message with a mark in each of its parts, and how often it has to be rendered."""
    if message.role == "tools":
        functions = [tool["function"] for tool in message.fields["tools"]]
        tools = [{"type": "function", "function": one | {"name": one["name"] + mark}} for one in functions]
        return message._replace(fields={"tools": tools}), 0
    marked, expected = message, 0
    if message.tool_calls or message.role == "tool":
        marked, expected = mark_end(message, mark)
    if message.reasoning:
        marked = marked._replace(reasoning=message.reasoning + mark.replace(END, END + "r", 1))
    return marked, expected


def mark_end(message: Message, mark: str) -> tuple[Message, int]:
    """The message with `mark` at the end of its content and of the arguments of each call, and how often the mark is
    rendered."""
    calls = [
        call | {"function": call["function"] | {"arguments": call["function"]["arguments"] | {mark: mark}}}
        for call in message.tool_calls
    ]
    fields = message.fields if not calls else {**message.fields, "tool_calls": calls}
    content = message.content + mark if message.content else ""
    return message._replace(content=content, fields=fields), bool(content) + 2 * len(calls)


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """JSON with `change` applied to each text in it, also to the names of fields, except for those of OpenAI's form."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name if name in _FORM else change(name): map_text(item, change) for name, item in value.items()}
    return [map_text(item, change) for item in value] if isinstance(value, list) else value


def texts(value: Any) -> Iterator[str]:
    """Each text in JSON, also the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value:
            yield from texts(item)
        for item in value.values() if isinstance(value, Mapping) else ():
            yield from texts(item)
