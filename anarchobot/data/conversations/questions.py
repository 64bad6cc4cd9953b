"""Tokenized prompts and their answers, for GRPO (model/grpo.py)."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anarchobot.data.batches import permute
from anarchobot.data.conversations.reading import RowCounts
from anarchobot.data.conversations.tokenized import batches, check_not_empty, opening
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import TRAINING_DAY
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message, Question, is_held_out

_ANY_ANSWER = Message("assistant", "Yes.")


class TokenizedQuestion(NamedTuple):
    """`ids`, int32: the prompt in the chat template, up to the start of the answer."""

    ids: npt.NDArray[np.int32]
    prompt: Conversation
    answer: Any


class QuestionSet:
    """Questions by index, 0 to `count` - 1."""

    def __init__(self, questions: list[TokenizedQuestion]) -> None:
        self.questions, self.count = questions, len(questions)

    def shuffled(self, first: int, count: int, seed: int) -> list[TokenizedQuestion]:
        """`count` questions from position `first` on, in an order that differs from epoch to epoch."""
        epochs, places = np.divmod(np.arange(first, first + count), self.count)
        return [
            self.questions[int(permute(places[i : i + 1], self.count, seed, int(epochs[i]))[0])] for i in range(count)
        ]

    def digest(self) -> str:
        """sha256 of the questions; must match on resume."""
        sha = hashlib.sha256()
        for question in self.questions:
            answer = json.dumps(question.answer, sort_keys=True, default=str)
            sha.update(f"{len(question.ids)} {len(answer)} {answer}".encode())
            sha.update(question.ids.astype("<i4").tobytes())
        return sha.hexdigest()

    def describe(self) -> str:
        lengths = [len(question.ids) for question in self.questions]
        return f"mean prompt length: {np.mean(lengths):.0f} tokens, longest {max(lengths)}"


def tokenize_questions(
    questions: Iterable[tuple[str, Question]],
    encoder: ChatEncoder,
    counts: RowCounts,
    *,
    max_prompt: int,
    val_fraction: float = 0.0,
) -> tuple[QuestionSet, QuestionSet]:
    """Tokenizes (place, question) items from `read_questions` into both splits.

    Prompts of more than `max_prompt` tokens are skipped. All questions with the same opening are in the same split.
    Raises UserError if no training question is left.
    """
    splits: tuple[list[TokenizedQuestion], ...] = ([], [])
    for batch in batches(questions):
        checked = encoder.encode([(*question.prompt, _ANY_ANSWER) for _, question in batch])
        for (place, question), encoded in zip(batch, checked, strict=True):
            try:
                if isinstance(encoded, InvalidRow):
                    raise encoded
                ids = encoder.encode_prompt(question.prompt, TRAINING_DAY)
                if len(ids) > max_prompt:
                    limit = f"{max_prompt}: data.seq_len - grpo.max_completion_length"
                    raise InvalidRow("prompt too long", f"{len(ids)} tokens; limit {limit}")
            except InvalidRow as error:
                counts.skip_kept(place, error)
                continue
            counts.note_parts(place, encoded.unused)
            split = splits[is_held_out(opening(question.prompt), val_fraction)]
            split.append(TokenizedQuestion(ids.astype(np.int32), question.prompt, question.answer))
    check_not_empty(len(splits[0]), len(splits[1]), counts)
    return QuestionSet(splits[0]), QuestionSet(splits[1])
