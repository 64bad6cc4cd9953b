"""Tokenized preference pairs and their batches. Shapes: A micro-batches of B pairs, L = seq_len tokens per answer.

Each pair gives two sequences, chosen and rejected: the prompt followed by one answer. The targets are the answer's
tokens, including its end-of-turn token.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from anarchobot.data.conversations.reading import RowCounts
from anarchobot.data.conversations.tokenized import (
    ConversationWindows,
    TokenTable,
    TooLong,
    batches,
    check_not_empty,
    fit_to_length,
    opening,
)
from anarchobot.data.windows import Batch
from anarchobot.tokenizers.chat_encoder import ChatEncoder, Encoded
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, PreferencePair, is_held_out, preamble


@dataclass(frozen=True)
class PairBatch(Batch):
    """`inputs` and `targets` are int32 [n, 2, L] or [A, B, 2, L], chosen before rejected; there are no segments."""

    indices: npt.NDArray[np.int64] = field(kw_only=True)  # [n] or [A, B] of the pairs; -1 is padding, without targets
    ref_log_probs: npt.NDArray[np.float32] = field(kw_only=True)  # [..., 2], nats under the reference model


class PairDataset:
    """Pairs by index, 0 to `count` - 1, as Windows for TrainBatches and ValBatches. Row i of both tables has the same
    prompt.

    `ref_log_probs`, float32 [count, 2], is copied into the batches. It is zero until the caller sets it.
    """

    unit = "pairs"

    def __init__(self, chosen: TokenTable, rejected: TokenTable, seq_len: int, pad_id: int) -> None:
        assert chosen.count == rejected.count
        self.count, self.seq_len = chosen.count, seq_len
        self.ref_log_probs: npt.NDArray[np.float32] = np.zeros((self.count, 2), np.float32)
        self._lengths = np.maximum(*(np.diff(side.offsets) for side in (chosen, rejected)))
        self._sides = [ConversationWindows(side, seq_len, pack=False, pad_id=pad_id) for side in (chosen, rejected)]

    def rows(self, indices: npt.NDArray[np.int64]) -> PairBatch:
        """An index past the end gives padding."""
        chosen, rejected = (side.rows(indices) for side in self._sides)  # [n, L]
        inputs = np.stack([chosen.inputs, rejected.inputs], axis=1)
        targets = np.stack([chosen.targets, rejected.targets], axis=1)
        valid = indices < self.count
        ref_log_probs = np.zeros((len(indices), 2), np.float32)
        ref_log_probs[valid] = self.ref_log_probs[indices[valid]]
        return PairBatch(inputs, targets, indices=np.where(valid, indices, -1), ref_log_probs=ref_log_probs)

    def longest_first(self) -> npt.NDArray[np.int64]:
        """The indices in the order of the lengths: batches of them have little padding."""
        return np.argsort(-self._lengths, kind="stable")

    def describe(self) -> str:
        """The mean lengths, because a preference for long answers is learned as readily as any other."""
        rows = self.rows(np.arange(min(self.count, 1000)))
        chosen, rejected = np.count_nonzero(rows.targets >= 0, axis=2).mean(axis=0)
        return f"mean answer length: chosen {chosen:.0f} tokens, rejected {rejected:.0f}"

    def digest(self) -> str:
        """sha256 of the pairs; must match on resume and for cached log-probabilities."""
        return hashlib.sha256(" ".join(side.digest() for side in self._sides).encode()).hexdigest()


def tokenize_pairs(
    pairs: Iterable[tuple[str, PreferencePair]],
    encoder: ChatEncoder,
    counts: RowCounts,
    *,
    seq_len: int,
    too_long: TooLong = "cut",
    val_fraction: float = 0.0,
) -> tuple[PairDataset, PairDataset]:
    """Tokenizes (place, pair) items from `read_pairs` into both splits; `encoder` has train_on "answer".

    All pairs with the same opening are in the same split. "cut" drops the oldest exchanges of a long prompt but never
    shortens an answer, because the loss compares summed log-probabilities; pairs that are still too long are skipped.
    Raises UserError if no training pair is left.
    """
    assert encoder.train_on == "answer"
    splits: tuple[list[list[Encoded]], ...] = ([], [])
    for batch in batches(pairs):
        encoded = encoder.encode([dialogue for _, pair in batch for dialogue in dialogues(pair)])
        for (place, pair), chosen, rejected in zip(batch, encoded[::2], encoded[1::2], strict=True):
            try:
                sides, truncated = fit_answers(dialogues(pair), (chosen, rejected), encoder, seq_len + 1, too_long)
            except InvalidRow as error:
                counts.skip_kept(place, error)
                continue
            parts = [part for side in (chosen, rejected) if isinstance(side, Encoded) for part in side.unused]
            counts.note_parts(place, dict.fromkeys(parts))
            counts.truncated += truncated
            splits[is_held_out(opening(pair.prompt), val_fraction)].append(sides)
    check_not_empty(len(splits[0]), len(splits[1]), counts)
    train, val = (_pair_dataset(sides, encoder, seq_len) for sides in splits)
    return train, val


def fit_answers(
    answers: Sequence[Conversation],
    encoded: Sequence[Encoded | InvalidRow],
    encoder: ChatEncoder,
    limit: int,
    too_long: TooLong,
) -> tuple[list[Encoded], bool]:
    """The conversations, which differ only in the last answer, within `limit` tokens, and whether their prompt was
    truncated. Raises InvalidRow if one does not fit."""
    truncated = False
    while True:
        sides: list[Encoded] = []
        for side in encoded:
            if isinstance(side, InvalidRow):
                raise side
            sides.append(side)
        if len(sides) == 2 and np.array_equal(sides[0].ids, sides[1].ids):
            raise InvalidRow("identical answers", "in the chat template")
        try:
            return [fit_to_length(side, limit, "drop") for side in sides], truncated
        except InvalidRow:
            prompt = answers[0][:-1]
            first = preamble(prompt)
            questions = [i for i, message in enumerate(prompt) if message.role == "user"]
            if too_long == "drop" or len(questions) < 2:  # a single question is never cut
                raise
            answers = [(*prompt[:first], *prompt[questions[1] :], answer[-1]) for answer in answers]
            truncated = True
            encoded = encoder.encode(answers)


def dialogues(pair: PreferencePair) -> list[Conversation]:
    """The prompt with the chosen and with the rejected answer."""
    return [(*pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]


def _pair_dataset(sides: list[list[Encoded]], encoder: ChatEncoder, seq_len: int) -> PairDataset:
    tokenizer = encoder.tokenizer
    chosen, rejected = (TokenTable.from_encoded((side[i] for side in sides), tokenizer.vocab_size) for i in range(2))
    return PairDataset(chosen, rejected, seq_len, tokenizer.eod_id)
