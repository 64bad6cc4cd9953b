"""Tokenized answers that are labeled desirable or not, for KTO (model/kto.py), and their batches.

Each gives two sequences of L = seq_len tokens: its prompt with the answer, and its prompt with an answer to another
prompt, from which KTO estimates the KL divergence. The second is the same in every epoch, so that its log-probability
under the reference model is computed once.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from anarchobot.data.conversations.preference_pairs import PairBatch, PairDataset, dialogues, fit_answers
from anarchobot.data.conversations.reading import RowCounts
from anarchobot.data.conversations.tokenized import (
    TokenTable,
    TooLong,
    batches,
    check_not_empty,
    fit_to_length,
    narrow_ids,
    opening,
)
from anarchobot.tokenizers.chat_encoder import ChatEncoder, Encoded
from anarchobot.tokenizers.conversation import InvalidRow, LabeledConversation, PreferencePair, is_held_out


@dataclass(frozen=True)
class LabeledBatch(PairBatch):
    """A PairBatch of a prompt with its answer, then with another prompt's answer."""

    labels: npt.NDArray[np.bool_] = field(kw_only=True)  # [n] or [A, B]: whether the answer is desirable


class LabeledDataset(PairDataset):
    """Labeled answers by index, as a PairDataset. `others` have the prompts of `answers`."""

    unit = "answers"

    def __init__(
        self, answers: TokenTable, others: TokenTable, labels: npt.NDArray[np.bool_], seq_len: int, pad_id: int
    ) -> None:
        super().__init__(answers, others, seq_len, pad_id)
        self.labels = labels

    def rows(self, indices: npt.NDArray[np.int64]) -> LabeledBatch:
        """An index past the end gives padding."""
        labels, valid = np.zeros(len(indices), bool), indices < self.count
        labels[valid] = self.labels[indices[valid]]
        return LabeledBatch(**vars(super().rows(indices)), labels=labels)

    def digest(self) -> str:
        return hashlib.sha256(f"{super().digest()} {self.labels.tobytes().hex()}".encode()).hexdigest()

    def describe(self) -> str:
        """The number of answers and their mean lengths in tokens."""
        lengths = np.count_nonzero(self.rows(np.arange(self.count)).targets[:, 0] >= 0, axis=1)
        parts = [(name, lengths[self.labels == label]) for name, label in (("desirable", True), ("undesirable", False))]
        return ", ".join(f"{len(found):,} {name} ({_mean(found):.0f} tokens)" for name, found in parts)


def _mean(values: npt.NDArray[np.int64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def tokenize_labeled(
    items: Iterable[tuple[str, PreferencePair | LabeledConversation]],
    encoder: ChatEncoder,
    counts: RowCounts,
    *,
    seq_len: int,
    too_long: TooLong = "cut",
    val_fraction: float = 0.0,
) -> tuple[LabeledDataset, LabeledDataset]:
    """Tokenizes the (place, item) items of `read_labeled` into both splits; `encoder` has train_on "answer". The chosen
    answer of a pair is desirable, the rejected one is not.

    Splits, length limit and errors are as for `tokenize_pairs`.
    """
    assert encoder.train_on == "answer"
    splits: tuple[list[tuple[Encoded, bool]], ...] = ([], [])
    for batch in batches(items):
        given = [dialogues(item) if isinstance(item, PreferencePair) else [item.conversation] for _, item in batch]
        encoded = iter(encoder.encode([dialogue for answers in given for dialogue in answers]))
        for (place, item), answers in zip(batch, given, strict=True):
            own = [next(encoded) for _ in answers]
            try:
                sides, truncated = fit_answers(answers, own, encoder, seq_len + 1, too_long)
            except InvalidRow as error:
                counts.skip_kept(place, error)
                continue
            parts = [part for side in own if isinstance(side, Encoded) for part in side.unused]
            counts.note_parts(place, dict.fromkeys(parts))
            counts.truncated += truncated
            labels = (True, False) if isinstance(item, PreferencePair) else (item.desirable,)
            split = splits[is_held_out(opening(answers[0]), val_fraction)]
            split += (
                (narrow_ids(side, encoder.tokenizer.vocab_size), label)
                for side, label in zip(sides, labels, strict=True)
            )
    check_not_empty(len(splits[0]), len(splits[1]), counts)
    train, val = (_labeled_dataset(split, encoder, seq_len) for split in splits)
    return train, val


def _labeled_dataset(split: list[tuple[Encoded, bool]], encoder: ChatEncoder, seq_len: int) -> LabeledDataset:
    tokenizer, own = encoder.tokenizer, [encoded for encoded, _ in split]
    answers = TokenTable.from_encoded(own, tokenizer.vocab_size)
    others = TokenTable.from_encoded(with_other_answers(own, seq_len + 1), tokenizer.vocab_size)
    return LabeledDataset(answers, others, np.array([label for _, label in split], bool), seq_len, tokenizer.eod_id)


def with_other_answers(answers: Sequence[Encoded], limit: int) -> list[Encoded]:
    """Each prompt with the answer of the next row that has another prompt, cut at `limit` tokens. With a single prompt,
    the answer of another row."""
    count, firsts = len(answers), [int(np.argmax(answer.loss_mask)) for answer in answers]
    prompts = [answer.ids[:first].tobytes() for answer, first in zip(answers, firsts, strict=True)]
    following = [(i + 1) % count for i in range(count)]
    for i in (*reversed(range(count)), *reversed(range(count))):  # twice: the last rows are followed by the first
        after = (i + 1) % count
        following[i] = after if prompts[after] != prompts[i] else following[after]
    others = []
    for i, j in enumerate(following):
        own, other = answers[i], answers[j]
        ids = np.concatenate([own.ids[: firsts[i]], other.ids[firsts[j] :]])
        mask = np.concatenate([own.loss_mask[: firsts[i]], other.loss_mask[firsts[j] :]])
        others.append(fit_to_length(Encoded(ids, mask), limit, "cut"))
    return others
