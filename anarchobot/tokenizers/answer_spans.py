"""Which characters of a rendered conversation the assistant writes: each answer with its end-of-turn token.

Templates that mark answers with {% generation %} are trusted. Any other template is first rendered with
placeholders for the contents, once per sequence of roles. In that skeleton an answer starts where the generation prompt
for it would end, and ends with its turn. If filling in the contents reproduces the rendered text exactly, the spans are
known exactly. If not, because the template inspects contents (reasoning in Qwen3) or messages have more than a content
(tools, calls), each answer must follow its generation prompt in the text, and its end is found by adding a mark to it
and rendering again. Templates that rewrite earlier answers are rejected.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from anarchobot.tokenizers.chat_template import BEGIN, END, TRAINING_DAY, ChatTemplate
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message, turn
from anarchobot.tokenizers.rendered_parts import mark_end
from anarchobot.tokenizers.token_pattern import TokenPattern

Span = tuple[int, int]  # [start, end) in characters
_CLOSING = 100  # characters
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


class _Skeleton(NamedTuple):
    """A rendering with placeholders for contents, and the spans of the answers in it."""

    text: str
    spans: list[Span]


class AnswerSpans:
    """Finds answers in the output of `template`; `control_pattern` matches control tokens, which may end a turn."""

    def __init__(self, template: ChatTemplate, control_pattern: TokenPattern) -> None:
        self._template, self._controls = template, control_pattern
        self._skeletons: dict[tuple[str, ...], _Skeleton | None] = {}

    def find(self, conversation: Conversation, answers: Sequence[int]) -> tuple[str, list[Span]]:
        """The rendered text, and the spans of the messages `answers`, which are in ascending order. Raises InvalidRow
        if the template rejects the conversation or the answers cannot be located."""
        every = [i for i, message in enumerate(conversation) if message.role == "assistant"]
        if self._template.marks_answers:
            text, spans = _split_marked(self._template.render(conversation, day=TRAINING_DAY, marked=True))
            if list(answers) == every:
                return text, spans
            if len(spans) != len(every):
                raise InvalidRow("other number of {% generation %} marks than answers", self._template.where)
            return text, [spans[every.index(i)] for i in answers]
        text = self._render(conversation)
        known = self._spans_by_skeleton(conversation, text)
        if known is not None:
            return text, [known[every.index(i)] for i in answers]
        return text, [self._span_by_prompt(conversation, i, text) for i in answers]

    def _spans_by_skeleton(self, conversation: Conversation, text: str) -> list[Span] | None:
        if any(message.reasoning or message.fields or message.role == "tool" for message in conversation):
            return None
        roles = tuple(message.role for message in conversation)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        skeleton = self._skeletons[roles]
        return None if skeleton is None else _fill(skeleton, conversation, text)

    def _render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        return self._template.render(conversation, add_generation_prompt, day=TRAINING_DAY)

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        """None if the template does not print each content exactly once and in order."""
        placeholders = tuple(Message(role, f"\ue000{i}\ue001") for i, role in enumerate(roles))
        text = self._render(placeholders)
        matches = {int(match[1]): match for match in _PLACEHOLDER.finditer(text)}
        if [int(slot) for slot in _PLACEHOLDER.findall(text)] != list(range(len(roles))):
            return None
        spans = []
        for i, role in enumerate(roles):
            if role == "assistant":
                next_content = matches[i + 1].start() if i + 1 in matches else len(text)
                start = self._start(text, placeholders[:i], matches[i].start())
                end = self._turn_end(text, placeholders[: i + 1], matches[i].end(), next_content)
                spans.append((start, self._end(text, matches[i].end(), next_content, end)))
        return _Skeleton(text, spans)

    def _start(self, text: str, before: Conversation, content: int) -> int:
        """The end of the generation prompt, or `content` if the template gives none. The prompt ends earlier than the
        content where the template adds text to the answer."""
        try:
            prompt = self._render(before, add_generation_prompt=True)
        except InvalidRow:
            return content
        return len(prompt) if len(prompt) <= content and text.startswith(prompt) else content

    def _turn_end(self, text: str, turns: Conversation, content: int, next_content: int) -> int | None:
        """The end of the last of `turns` in `text`; None if the template renders it in another way when it is last."""
        try:
            rendered = self._render(turns)
        except InvalidRow:
            return None
        return len(rendered) if text.startswith(rendered) and content <= len(rendered) <= next_content else None

    @cached_property
    def _answer_end(self) -> str | None:
        """The first control token after an answer without calls."""
        try:
            skeleton = self._make_skeleton(("user", "assistant"))
        except InvalidRow:
            return None
        match = skeleton and self._controls.search(skeleton.text, skeleton.text.rindex("\ue001"), skeleton.spans[0][1])
        return match.content if match else None

    def _end(self, text: str, content: int, next_content: int, turn_end: int | None, has_calls: bool = False) -> int:
        """The end of the control tokens that follow the content in its turn, where generation stops; without any, the
        end of the turn. Trailing whitespace is excluded, unless there is nothing else. Calls may be followed by control
        tokens of their own."""
        limit = next_content if turn_end is None else turn_end
        control = self._controls.search(text, content, limit)
        if has_calls and turn_end is not None:
            controls = self._controls.finditer(text, content, limit)
            control = next((match for match in controls if match.content == self._answer_end), control)
        if control is None:
            suffix = text[content:limit] if turn_end is not None else ""
            return content + len(suffix.rstrip() or suffix)
        while turn_end is not None and (following := self._controls.search(text, control.end, limit)):
            if following.start > control.end:
                break
            control = following
        return control.start + len(text[control.start : control.end].rstrip())

    def _span_by_prompt(self, conversation: Conversation, i: int, text: str) -> Span:
        """The span of message i, which the template renders as it is, or as it does when it is the last."""
        turns, has_calls = conversation[: i + 1], bool(conversation[i].tool_calls)
        rendered = self._render(turns)
        start = self._prompt_end(conversation, i, text)
        if text.startswith(rendered) and start < len(rendered):
            content = self._content_end(turns, i, rendered)
            return start, self._end(text, content, len(text), len(rendered), has_calls)
        content = self._content_end(conversation, i, text)
        if conversation[i].content.strip() not in text[start:content]:
            raise self._rewritten(conversation, i)
        rest = rendered[self._content_end(turns, i, rendered) :]
        turn_end = content + len(rest) if text.startswith(rest, content) else None
        return start, self._end(text, content, len(text), turn_end, has_calls)

    def _prompt_end(self, conversation: Conversation, i: int, text: str) -> int:
        """The end of the generation prompt for message i in `text`."""
        prompt = self._render(conversation[:i], add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # The template renders something before in another way. The prompt has to follow the previous message.
        if i and conversation[i - 1].role != "tools":
            rest = prompt[self._content_end(conversation[:i], i - 1, prompt, add_generation_prompt=True) :]
            previous = self._content_end(conversation, i - 1, text)
            if text.startswith(rest, previous):
                return previous + len(rest)
        # The prompt has text that is not before earlier answers, as in Qwen3.5.
        other = self._render((*conversation[:i], Message("assistant", BEGIN), *conversation[i + 1 :]))
        before, mark, _ = other.partition(BEGIN)
        if mark and text.startswith(before):
            return len(before)
        raise self._rewritten(conversation, i)

    def _content_end(self, conversation: Conversation, i: int, text: str, add_generation_prompt: bool = False) -> int:
        """Where the content and the calls of message i end in `text`, the rendered conversation."""
        message, _ = mark_end(conversation[i], END)
        marked = self._render((*conversation[:i], message, *conversation[i + 1 :]), add_generation_prompt)
        _, mark, rest = marked.rpartition(END)
        # A mark in the arguments of a call adds what closes an argument, such as a quote.
        for end in range(_CLOSING if mark else 0):
            if text.endswith(rest[end:]):
                return len(text) - len(rest[end:])
        raise self._rewritten(conversation, i)

    def _rewritten(self, conversation: Conversation, i: int) -> InvalidRow:
        return InvalidRow("rewritten by the chat template", f"turn {turn(conversation, i)}; {self._template.where}")


def _fill(skeleton: _Skeleton, conversation: Conversation, text: str) -> list[Span] | None:
    """The answers in `text`, or None if it is not the skeleton with the contents, possibly trimmed, filled in."""
    first, *others = _PLACEHOLDER.split(skeleton.text)  # text, slot, text, slot, ..., text
    if not text.startswith(first):
        return None
    position, shifts = len(first), [(0, 0)]  # (skeleton position, offset of the text from there on)
    for placeholder, literal in zip(_PLACEHOLDER.finditer(skeleton.text), others[1::2], strict=True):
        content = conversation[int(placeholder[1])].content
        variants = (content, content.strip(), content.lstrip(), content.rstrip())
        rendered = next((variant for variant in variants if text.startswith(variant + literal, position)), None)
        if rendered is None:
            return None
        position += len(rendered)
        shifts.append((placeholder.end(), position - placeholder.end()))
        position += len(literal)
    if position != len(text):
        return None

    def shifted(place: int) -> int:
        return place + next(offset for start, offset in reversed(shifts) if start <= place)

    return [(shifted(start), shifted(end)) for start, end in skeleton.spans]


def _split_marked(marked: str) -> tuple[str, list[Span]]:
    """The text without the marks, and the spans they enclosed."""
    pieces = re.split(f"[{BEGIN}{END}]", marked)  # outside, inside, outside, ..., outside
    bounds = accumulate(map(len, pieces))
    return "".join(pieces), list(pairwise(bounds))[::2]
