"""Which characters of a rendered conversation the assistant writes: each answer with its end-of-turn token.

Templates that mark answers with {% generation %} are trusted. Any other template is first rendered with
placeholders for the contents, once per sequence of roles. In that skeleton an answer starts where the generation prompt
for it would end, and ends with its turn. If filling in the contents reproduces the rendered text exactly, the spans are
known exactly. If not, because the template inspects contents (reasoning in Qwen3), each answer must follow its
generation prompt in the text; templates that rewrite earlier answers are rejected.
"""

import re
from itertools import accumulate, pairwise
from typing import NamedTuple

from anarchobot.tokenizers.chat_template import BEGIN, END, TRAINING_DAY, ChatTemplate
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message
from anarchobot.tokenizers.token_pattern import TokenPattern

Span = tuple[int, int]  # [start, end) in characters
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

    def find(self, conversation: Conversation, last_only: bool = False) -> tuple[str, list[Span]]:
        """The rendered text, and a span per answer or only of the last. Raises InvalidRow if the template rejects
        the conversation or the answers cannot be located."""
        text, spans = self._find(conversation, last_only)
        return text, spans[-1:] if last_only else spans

    def _find(self, conversation: Conversation, last_only: bool) -> tuple[str, list[Span]]:
        if self._template.marks_answers:
            return _split_marked(self._template.render(conversation, day=TRAINING_DAY, marked=True))
        text = self._render(conversation)
        roles = tuple(role for role, _ in conversation)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        skeleton = self._skeletons[roles]
        spans = None if skeleton is None else _fill(skeleton, conversation, text)
        return text, self._spans_by_prompt(conversation, text, last_only) if spans is None else spans

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
                spans.append((start, self._end(text, placeholders[: i + 1], matches[i].end(), next_content)))
        return _Skeleton(text, spans)

    def _start(self, text: str, before: Conversation, content: int) -> int:
        """The end of the generation prompt, or `content` if the template gives none. The prompt ends earlier than the
        content where the template adds text to the answer."""
        try:
            prompt = self._render(before, add_generation_prompt=True)
        except InvalidRow:
            return content
        return len(prompt) if len(prompt) <= content and text.startswith(prompt) else content

    def _end(self, text: str, turns: Conversation, content: int, next_content: int) -> int:
        """The end of the control tokens that follow the content in its turn, where generation stops; without any, the
        end of the turn. Trailing whitespace is excluded, unless there is nothing else."""
        try:
            rendered = self._render(turns)
        except InvalidRow:
            rendered = ""
        turn_ends = text.startswith(rendered) and content <= len(rendered) <= next_content
        limit = len(rendered) if turn_ends else next_content
        control = self._controls.search(text, content, limit)
        if control is None:
            suffix = text[content:limit] if turn_ends else ""
            return content + len(suffix.rstrip() or suffix)
        while turn_ends and (following := self._controls.search(text, control.end, limit)):
            if following.start > control.end:
                break
            control = following
        return control.start + len(text[control.start : control.end].rstrip())

    def _spans_by_prompt(self, conversation: Conversation, text: str, last_only: bool) -> list[Span]:
        answers = [i for i, (role, _) in enumerate(conversation) if role == "assistant"]
        return [self._span_by_prompt(conversation, i, text) for i in (answers[-1:] if last_only else answers)]

    def _span_by_prompt(self, conversation: Conversation, i: int, text: str) -> Span:
        """The span of answer i. It must follow its generation prompt, either verbatim or as the template renders it
        when it is the last turn."""
        prompt = self._render(conversation[:i], add_generation_prompt=True)
        if text.startswith(prompt):
            verbatim = re.compile(rf"\s*{re.escape(conversation[i].content.strip())}").match(text, len(prompt))
            if verbatim:
                return len(prompt), self._end(text, conversation[: i + 1], verbatim.end(), len(text))
            rendered = self._render(conversation[: i + 1])
            if text.startswith(rendered) and len(prompt) < len(rendered):
                return len(prompt), len(rendered.rstrip())
        raise InvalidRow("rewritten by the chat template", f"turn {i + 1}; {self._template.where}")


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
