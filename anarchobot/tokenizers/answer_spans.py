"""Which characters of a rendered conversation the assistant writes: each answer with its end-of-turn mark.

A template that marks them itself ({% generation %}) is believed. Of another one a skeleton is rendered, once for each
sequence of roles, with a stand-in for every content; what the assistant writes begins where the prompt for it would
end, and ends with its turn. Where the contents fill the skeleton to the very text that the template gives for them,
the places are known exactly. Where they don't, because a template looks into them (Qwen3 and reasoning), each
answer must stand behind the prompt for it, in that text; a template that rewrites what was said is refused.
"""

import re
from itertools import accumulate, pairwise
from typing import NamedTuple

from anarchobot.tokenizers.chat_template import BEGIN, END, TRAINING_DAY, ChatTemplate
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message

Span = tuple[int, int]  # first character, and the one behind the last
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")


class _Skeleton(NamedTuple):
    """A text with stand-ins for the contents, and where in it the answers lie."""

    text: str
    spans: list[Span]


class AnswerSpans:
    """The answers in what `template` renders; `control_pattern` finds the control tokens that may end a turn."""

    def __init__(self, template: ChatTemplate, control_pattern: re.Pattern[str]) -> None:
        self._template, self._controls = template, control_pattern
        self._skeletons: dict[tuple[str, ...], _Skeleton | None] = {}

    def of(self, conversation: Conversation, last: bool = False) -> tuple[str, list[Span]]:
        """The rendered text and a span for each answer, or for the `last` alone. Raises InvalidRow when the template
        refuses the conversation, or it can't be told what of the text is an answer."""
        text, spans = self._of(conversation, last)
        return text, spans[-1:] if last else spans

    def _of(self, conversation: Conversation, last: bool) -> tuple[str, list[Span]]:
        if self._template.marks_answers:
            return _between_marks(self._template.render(conversation, day=TRAINING_DAY, marked=True))
        text = self._render(conversation)
        roles = tuple(role for role, _ in conversation)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(roles)
        skeleton = self._skeletons[roles]
        spans = None if skeleton is None else _filled(skeleton, conversation, text)
        return text, self._by_prefixes(conversation, text, last) if spans is None else spans

    def _render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        return self._template.render(conversation, add_generation_prompt, day=TRAINING_DAY)

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        """None when the contents do not come once each and in their order."""
        contents = tuple(Message(role, f"\ue000{i}\ue001") for i, role in enumerate(roles))
        text = self._render(contents)
        found = {int(match[1]): match for match in _STAND_IN.finditer(text)}
        if [int(slot) for slot in _STAND_IN.findall(text)] != list(range(len(roles))):
            return None
        spans = []
        for i, role in enumerate(roles):
            if role == "assistant":
                following = found[i + 1].start() if i + 1 in found else len(text)
                begin = self._begin(text, contents[:i], found[i].start())
                spans.append((begin, self._end(text, contents[: i + 1], found[i].end(), following)))
        return _Skeleton(text, spans)

    def _begin(self, text: str, before: Conversation, content: int) -> int:
        """Where the prompt for an answer ends: at its content, or sooner where the template adds to what is said."""
        try:
            prompt = self._render(before, add_generation_prompt=True)
        except InvalidRow:
            return content
        return len(prompt) if len(prompt) <= content and text.startswith(prompt) else content

    def _end(self, text: str, turns: Conversation, content: int, following: int) -> int:
        """Behind the control tokens that follow an answer's content in its turn: there, generation stops. Without one,
        where the turn ends. White space behind the mark is none of it, unless it is the mark."""
        try:
            behind = self._render(turns)
        except InvalidRow:
            behind = ""
        ends_there = text.startswith(behind) and content <= len(behind) <= following
        limit = len(behind) if ends_there else following
        control = self._controls.search(text, content, limit)
        if control is None:
            mark = text[content:limit] if ends_there else ""
            return content + len(mark.rstrip() or mark)
        while ends_there and (another := self._controls.match(text, control.end(), limit)):
            control = another
        return control.start() + len(control.group().rstrip())

    def _by_prefixes(self, conversation: Conversation, text: str, last: bool) -> list[Span]:
        answers = [i for i, (role, _) in enumerate(conversation) if role == "assistant"]
        return [self._by_prefix(conversation, i, text) for i in (answers[-1:] if last else answers)]

    def _by_prefix(self, conversation: Conversation, i: int, text: str) -> Span:
        """Behind the prompt for answer i stands the answer, as it was given or as the template has it with nothing to
        follow; or else it was rewritten."""
        prompt = self._render(conversation[:i], add_generation_prompt=True)
        if text.startswith(prompt):
            said = re.compile(rf"\s*{re.escape(conversation[i].content.strip())}").match(text, len(prompt))
            if said:
                return len(prompt), self._end(text, conversation[: i + 1], said.end(), len(text))
            behind = self._render(conversation[: i + 1])
            if text.startswith(behind) and len(prompt) < len(behind):
                return len(prompt), len(behind.rstrip())
        raise InvalidRow("the chat template rewrites it", f"turn {i + 1}; {self._template.where}")


def _filled(skeleton: _Skeleton, conversation: Conversation, text: str) -> list[Span] | None:
    """Where the answers lie in `text`, if it is the skeleton filled with the contents, trimmed or not."""
    first, *others = _STAND_IN.split(skeleton.text)  # text, slot, text, slot, ..., text
    if not text.startswith(first):
        return None
    place, moves = len(first), [(0, 0)]  # from where in the skeleton on, and how far it lies from there in the text
    for stand_in, literal in zip(_STAND_IN.finditer(skeleton.text), others[1::2], strict=True):
        content = conversation[int(stand_in[1])].content
        variants = (content, content.strip(), content.lstrip(), content.rstrip())
        given = next((variant for variant in variants if text.startswith(variant + literal, place)), None)
        if given is None:
            return None
        place += len(given)
        moves.append((stand_in.end(), place - stand_in.end()))
        place += len(literal)
    if place != len(text):
        return None

    def moved(position: int) -> int:
        return position + next(distance for start, distance in reversed(moves) if start <= position)

    return [(moved(begin), moved(end)) for begin, end in skeleton.spans]


def _between_marks(marked: str) -> tuple[str, list[Span]]:
    """The text without the marks, and what they enclosed."""
    pieces = re.split(f"[{BEGIN}{END}]", marked)  # outside, inside, outside, ..., outside
    bounds = accumulate(map(len, pieces))
    return "".join(pieces), list(pairwise(bounds))[::2]
