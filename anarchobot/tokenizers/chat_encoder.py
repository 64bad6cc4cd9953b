"""Conversations to token ids and a loss mask.

The rendered text is tokenized whole, never in pieces that the tokenizer would have joined. Control tokens come only
from the template: text in a message that looks like one is tokenized as text.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.answer_spans import AnswerSpans, Span
from anarchobot.tokenizers.chat_template import BEGIN, END, SPLIT, TRAINING_DAY, ChatTemplate
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message
from anarchobot.tokenizers.rendered_parts import RenderedParts, map_text, texts
from anarchobot.tokenizers.tokenizer import ChatTokenizer, Ids

TrainOn = Literal["assistant", "answer", "all"]

_RESERVED = re.compile(f"[{BEGIN}{END}{SPLIT}]")
_PROBE = (Message("user", "Hi"), Message("assistant", "Hi"))


class Encoded(NamedTuple):
    """`ids` and `loss_mask` of length n. `unused` names the parts of the conversation that are not used."""

    ids: npt.NDArray[np.integer]  # int32; uint16 in stored datasets if the vocabulary fits
    loss_mask: npt.NDArray[np.bool_]
    unused: tuple[str, ...] = ()


class _Segment(NamedTuple):
    """One control token, or the text between two; `loss_mask` is per character."""

    text: str
    control: int | None
    loss_mask: npt.NDArray[np.bool_]
    after_control: bool = False


class _Layout(NamedTuple):
    segments: list[_Segment]
    unused: tuple[str, ...]


class ChatEncoder:
    """A tokenizer with a chat template.

    `train_on` selects the loss tokens: every assistant turn with its end-of-turn token, only the last such turn
    ("answer"), or everything ("all"). An answer that is not `in_loss` is never among them. A document (role text)
    bypasses the template: it is put between two end-of-document tokens, and everything after the first is in the loss.
    """

    def __init__(self, tokenizer: ChatTokenizer, template: ChatTemplate, train_on: TrainOn = "assistant") -> None:
        self.tokenizer, self.template, self.train_on = tokenizer, template, train_on
        self._spans = AnswerSpans(template, tokenizer.control_pattern)
        self._parts = RenderedParts(template)

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | InvalidRow]:
        """One result per conversation; InvalidRow where the template rejects it."""
        layouts: list[_Layout | InvalidRow] = []
        for conversation in conversations:
            try:
                layouts.append(self._layout(conversation))
            except InvalidRow as error:
                layouts.append(error)
        segments = [s for layout in layouts if not isinstance(layout, InvalidRow) for s in layout.segments]
        pieces = iter(self._tokenize(segments))
        return [
            layout
            if isinstance(layout, InvalidRow)
            else _concatenate([next(pieces) for _ in layout.segments], layout.unused)
            for layout in layouts
        ]

    def encode_prompt(self, conversation: Conversation, day: datetime | None = None) -> Ids:
        """The context for the assistant's next turn. `day` is for templates that print a date (default: today). Raises
        InvalidRow if the template rejects the conversation."""
        text = self.template.render(self._escape(conversation), add_generation_prompt=True, day=day)
        segments = self._segments(text, [])
        texts = [s for s in segments if s.control is None]
        encoded = iter(self.tokenizer.encode_segments([s.text for s in texts], [s.after_control for s in texts]))
        return np.concatenate([next(encoded) if s.control is None else np.array([s.control]) for s in segments])

    def unused(self, conversation: Conversation) -> tuple[str, ...]:
        """What the template leaves out of a conversation. Raises InvalidRow if it leaves out a call or a result."""
        return self._parts.check(self._escape(conversation))[1]

    def end_of_turn_id(self) -> int | None:
        """The control token that ends an assistant turn; None if the template has none. Independent of `train_on`:
        with "all", the loss also covers what follows that token."""
        encoder = self if self.train_on != "all" else ChatEncoder(self.tokenizer, self.template)
        probe = encoder._probe()
        last = int(probe.ids[probe.loss_mask][-1])
        return last if last in self.tokenizer.control_tokens.values() else None

    def stop_ids(self) -> frozenset[int]:
        """The tokens that stop generation: the tokenizer's, and the end of turn, if any."""
        end = self.end_of_turn_id()
        return self.tokenizer.stop_ids | ({end} if end is not None else set())

    def warnings(self) -> list[str]:
        """Problems of this combination of tokenizer and template, one line each."""
        problems = []
        if self.end_of_turn_id() is None:
            problems.append(
                f"{self.template.where}: no control token ends an answer, so generation cannot detect its end"
            )
        probe = self._probe().ids
        try:
            prompt = self.encode_prompt(_PROBE[:1], TRAINING_DAY)
        except InvalidRow as error:
            raise UserError(f"{self.template.where}: unusable chat template: {error}") from error
        if not np.array_equal(probe[: len(prompt)], prompt):
            problems.append(
                f"{self.template.where}: the tokenizer merges the end of the prompt with the answer, so prompts are "
                "tokenized differently in training and in generation"
            )
        return problems

    def _probe(self) -> Encoded:
        """Raises UserError if the template rejects the simplest conversation, or its answer has no tokens."""
        (probe,) = self.encode([_PROBE])
        if isinstance(probe, InvalidRow):
            raise UserError(f"{self.template.where}: unusable chat template: {probe}")
        if not probe.loss_mask.any():
            raise UserError(f'{self.template.where}: the tokenizer has no tokens for the answer "{_PROBE[1].content}"')
        return probe

    def _layout(self, conversation: Conversation) -> _Layout:
        if conversation[0].role == "text":
            eod = self.tokenizer.eod_id
            text = conversation[0].content
            document = _Segment(text, None, np.ones(len(text), bool), True)
            return _Layout([_control(eod, False), document, _control(eod, True)], ())
        conversation, unused = self._parts.check(self._escape(conversation))
        answers = [i for i, message in enumerate(conversation) if message.role == "assistant"]
        excluded = [i for i in answers if not conversation[i].in_loss]
        if self.train_on == "all":
            text, spans = self._spans.find(conversation, excluded)
            return _Layout(self._segments(text, spans, inverted=True), unused)
        answers = answers[-1:] if self.train_on == "answer" else answers
        text, spans = self._spans.find(conversation, [i for i in answers if i not in excluded])
        return _Layout(self._segments(text, spans), unused)

    def _escape(self, conversation: Conversation) -> Conversation:
        """Inserts SPLIT after the first character of everything that looks like a control token."""
        pattern = self.tokenizer.control_pattern
        text = "\n".join(map(_all_text, conversation))
        if _RESERVED.search(text):
            raise InvalidRow("reserved character", "U+FDD0, U+FDD1 or U+FDD2")
        if not pattern.search(text):
            return conversation

        def escape(text: str) -> str:
            return SPLIT.join(pattern.split_inside(text))

        return tuple(
            message._replace(
                content=escape(message.content),
                reasoning=escape(message.reasoning),
                fields=map_text(message.fields, escape),
            )
            for message in conversation
        )

    def _segments(self, text: str, spans: list[Span], inverted: bool = False) -> list[_Segment]:
        """Splits the text at control tokens and removes SPLIT. The loss is on `spans`, or on all but these. Raises
        InvalidRow if nothing is left."""
        loss_mask = np.full(len(text), inverted)
        for start, end in spans:
            loss_mask[start:end] = not inverted
        segments: list[_Segment] = []
        position = 0
        for match in self.tokenizer.control_pattern.finditer(text):
            segments.append(_text(text[position : match.start], loss_mask[position : match.start], position > 0))
            control = self.tokenizer.control_tokens[match.content]
            segments.append(_control(control, bool(loss_mask[match.start : match.end].any())))
            position = match.end
        segments.append(_text(text[position:], loss_mask[position:], position > 0))
        if not (segments := [s for s in segments if s.text or s.control is not None]):
            raise InvalidRow("rejected by the chat template", "it writes nothing")
        return segments

    def _tokenize(self, segments: list[_Segment]) -> list[Encoded]:
        texts = [s for s in segments if s.control is None]
        encoded = iter(self.tokenizer.encode_with_offsets([s.text for s in texts], [s.after_control for s in texts]))
        return [
            Encoded(np.array([s.control], np.int32), s.loss_mask)
            if s.control is not None
            else _token_mask(s, *next(encoded))
            for s in segments
        ]


def _all_text(message: Message) -> str:
    return "\n".join((message.content, message.reasoning, *texts(message.fields)))


def _control(control: int, in_loss: bool) -> _Segment:
    return _Segment("", control, np.array([in_loss]))


def _text(text: str, loss_mask: npt.NDArray[np.bool_], after_control: bool) -> _Segment:
    if SPLIT in text:
        loss_mask = loss_mask[[character != SPLIT for character in text]]
        text = text.replace(SPLIT, "")
    return _Segment(text, None, loss_mask, after_control)


def _token_mask(segment: _Segment, ids: Ids, offsets: npt.NDArray[np.int32]) -> Encoded:
    """A token is scored if any of its characters is. A token without characters (a byte of a character,
    a space added before the text) counts as part of the character at its position."""
    starts = np.minimum(offsets[:, 0], len(segment.text) - 1)
    ends = np.maximum(offsets[:, 1], starts + 1)
    before = np.concatenate([[0], np.cumsum(segment.loss_mask)])  # loss characters before each position
    return Encoded(ids, before[ends] > before[starts])


def _concatenate(pieces: Sequence[Encoded], unused: tuple[str, ...]) -> Encoded:
    ids = np.concatenate([piece.ids for piece in pieces])
    return Encoded(ids, np.concatenate([piece.loss_mask for piece in pieces]), unused)
