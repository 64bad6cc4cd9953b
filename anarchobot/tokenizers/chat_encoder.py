"""Conversations to token ids, and which of them the assistant wrote.

The ids are those of the rendered text as a whole, never of pieces that a tokenizer would have joined. Control tokens
come from the template alone: what people say in their turns is text, whatever it looks like.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.answer_spans import AnswerSpans, Span
from anarchobot.tokenizers.chat_template import BEGIN, END, TRAINING_DAY, ChatTemplate
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message
from anarchobot.tokenizers.tokenizer import ChatTokenizer, Ids

TrainOn = Literal["assistant", "answer", "all"]

# Breaks up what looks like a control token in somebody's turn, until it is tokenised. Like the template's marks, a
# character that Unicode keeps out of text.
_BREAK = "\ufdd2"
_RESERVED = re.compile(f"[{BEGIN}{END}{_BREAK}]")

_PROBE = (Message("user", "Hi"), Message("assistant", "Hi"))


class Encoded(NamedTuple):
    """int32 [n] ids (where many are kept, uint16 if the vocabulary fits), and bool [n] which of them are trained."""

    ids: npt.NDArray[np.integer]
    trained: npt.NDArray[np.bool_]


class _Stretch(NamedTuple):
    """Text between control tokens, or one control token; and for each of its characters whether it is trained."""

    text: str
    control: int | None
    trained: npt.NDArray[np.bool_]
    after_control: bool = False


class ChatEncoder:
    """A tokenizer and a chat template together.

    `train_on`: the assistant's turns with their end-of-turn marks, the last of these turns alone ("answer"), or all.
    A document (role text) has no template: it stands between two ends of document, and all but the first is trained.
    """

    def __init__(self, tokenizer: ChatTokenizer, template: ChatTemplate, train_on: TrainOn = "assistant") -> None:
        self.tokenizer, self.template, self.train_on = tokenizer, template, train_on
        self._spans = AnswerSpans(template, tokenizer.control_pattern)

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | InvalidRow]:
        """One for each conversation; a InvalidRow for one that the template can't take."""
        layouts: list[list[_Stretch] | InvalidRow] = []
        for conversation in conversations:
            try:
                layouts.append(self._layout(conversation))
            except InvalidRow as misfit:
                layouts.append(misfit)
        stretches = [s for layout in layouts if not isinstance(layout, InvalidRow) for s in layout]
        pieces = iter(self._tokenised(stretches))
        return [
            layout if isinstance(layout, InvalidRow) else _joined([next(pieces) for _ in layout]) for layout in layouts
        ]

    def prompt(self, conversation: Conversation, day: datetime | None = None) -> Ids:
        """The ids that the assistant's next turn is generated from, with `day`'s date (left out: today's) where the
        template has one. Raises InvalidRow when the template refuses."""
        text = self.template.render(self._shielded(conversation), add_generation_prompt=True, day=day)
        return _joined(self._tokenised(self._stretches(text, []))).ids.astype(np.int32)

    def end_of_turn(self) -> int | None:
        """The control token that ends the assistant's turn: generation stops there. None: the template has none, and
        nothing but an end of document stops it."""
        probe = self._probe()
        last = int(probe.ids[probe.trained][-1])
        return last if last in self.tokenizer.control_tokens.values() else None

    def stop(self) -> frozenset[int]:
        """The tokens that end what the assistant says: its end of turn, where there is one, and an end of document."""
        end = self.end_of_turn()
        return frozenset({self.tokenizer.eod_id} | ({end} if end is not None else set()))

    def warnings(self) -> list[str]:
        """What is wrong with this tokenizer and template together, a line each."""
        found = []
        if self.end_of_turn() is None:
            found.append(
                f"{self.template.where}: no control token ends an answer: generation can't tell where one is over"
            )
        probe, prompt = self._probe().ids, self.prompt(_PROBE[:1], TRAINING_DAY)
        if not np.array_equal(probe[: len(prompt)], prompt):
            found.append(
                f"{self.template.where}: the tokenizer joins the end of the prompt with the answer: the model is asked "
                "in other tokens than it is trained on"
            )
        return found

    def _probe(self) -> Encoded:
        """Raises UserError when the template can't take the plainest conversation."""
        (probe,) = self.encode([_PROBE])
        if isinstance(probe, InvalidRow):
            raise UserError(f"{self.template.where}: can't be used: {probe}")
        return probe

    def _layout(self, conversation: Conversation) -> list[_Stretch]:
        if conversation[0].role == "text":
            eod = self.tokenizer.eod_id
            text = conversation[0].content
            return [_control(eod, False), _Stretch(text, None, np.ones(len(text), bool), True), _control(eod, True)]
        text, spans = self._spans.of(self._shielded(conversation), last=self.train_on == "answer")
        return self._stretches(text, [(0, len(text))] if self.train_on == "all" else spans)

    def _shielded(self, conversation: Conversation) -> Conversation:
        """Control tokens' texts broken up behind their first character."""
        if any(_RESERVED.search(content) for _, content in conversation):
            raise InvalidRow("characters that are none", "U+FDD0, U+FDD1 or U+FDD2")
        if not any(self.tokenizer.control_pattern.search(content) for _, content in conversation):
            return conversation
        inside = "|".join(f"(?<={re.escape(c[0])})(?={re.escape(c[1:])})" for c in self.tokenizer.control_tokens)
        return tuple(Message(role, re.sub(inside, _BREAK, content)) for role, content in conversation)

    def _stretches(self, text: str, spans: list[Span]) -> list[_Stretch]:
        """The text cut at its control tokens; the shield is taken off."""
        trained = np.zeros(len(text), bool)
        for begin, end in spans:
            trained[begin:end] = True
        stretches: list[_Stretch] = []
        place = 0
        for match in self.tokenizer.control_pattern.finditer(text):
            stretches.append(_unshielded(text[place : match.start()], trained[place : match.start()], place > 0))
            control = self.tokenizer.control_tokens[match.group().strip()]
            stretches.append(_control(control, bool(trained[match.start() : match.end()].any())))
            place = match.end()
        stretches.append(_unshielded(text[place:], trained[place:], place > 0))
        return [s for s in stretches if s.text or s.control is not None]

    def _tokenised(self, stretches: list[_Stretch]) -> list[Encoded]:
        texts = [s for s in stretches if s.control is None]
        found = iter(self.tokenizer.encode_with_offsets([s.text for s in texts], [s.after_control for s in texts]))
        return [
            Encoded(np.array([s.control], np.int32), s.trained) if s.control is not None else _masked(s, *next(found))
            for s in stretches
        ]


def _control(control: int, trained: bool) -> _Stretch:
    return _Stretch("", control, np.array([trained]))


def _unshielded(text: str, trained: npt.NDArray[np.bool_], after_control: bool) -> _Stretch:
    if _BREAK in text:
        trained = trained[[character != _BREAK for character in text]]
        text = text.replace(_BREAK, "")
    return _Stretch(text, None, trained, after_control)


def _masked(stretch: _Stretch, ids: Ids, offsets: npt.NDArray[np.int32]) -> Encoded:
    """A token is trained if any of its characters is. One that has none of its own (a byte of a character, a space put
    before the text) is taken for a part of the character where it stands."""
    begin = np.minimum(offsets[:, 0], len(stretch.text) - 1)
    end = np.maximum(offsets[:, 1], begin + 1)
    before = np.concatenate([[0], np.cumsum(stretch.trained)])  # trained characters before each place
    return Encoded(ids, before[end] > before[begin])


def _joined(pieces: Sequence[Encoded]) -> Encoded:
    ids = np.concatenate([piece.ids for piece in pieces])
    return Encoded(ids, np.concatenate([piece.trained for piece in pieces]))
