"""Tokenized conversations: truncated, split, stored in flat arrays and laid out as training sequences.

Shapes: n sequences of L = seq_len tokens. A conversation of t tokens fills t - 1 positions: token i is the input and
token i + 1 its target. Targets outside the loss mask, and padding, are IGNORE.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.conversations.reading import RowCounts
from anarchobot.data.windows import IGNORE, Batch, best_fit, expand_ranges
from anarchobot.tokenizers.chat_encoder import ChatEncoder, Encoded
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, is_held_out
from anarchobot.tokenizers.tokenizer import Tokenizer

BATCH = 256  # conversations tokenized per call
TooLong = Literal["cut", "drop"]
T = TypeVar("T")


@dataclass(frozen=True)
class TokenTable:
    """Conversation c is `ids[offsets[c]:offsets[c + 1]]`, with the same slice of `loss_mask`.

    Flat arrays take 3 to 5 bytes per token; lists of Python ints would take 40.
    """

    ids: npt.NDArray[np.uint16 | np.int32]  # uint16 if the vocabulary fits
    loss_mask: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def from_encoded(cls, encoded: Iterable[Encoded], vocab_size: int) -> "TokenTable":
        parts = [narrow_ids(Encoded(np.empty(0, np.int32), np.empty(0, bool)), vocab_size)]
        parts += (narrow_ids(one, vocab_size) for one in encoded)
        offsets = np.cumsum([len(part.ids) for part in parts])
        return cls(np.concatenate([part.ids for part in parts]), np.concatenate([p.loss_mask for p in parts]), offsets)

    @property
    def count(self) -> int:
        return len(self.offsets) - 1

    @property
    def loss_tokens(self) -> int:
        """Tokens in the loss. The first token of a conversation has no context to predict it from."""
        return int(self.loss_mask.sum()) - int(self.loss_mask[self.offsets[:-1]].sum())

    def digest(self) -> str:
        """sha256 of everything that training depends on; independent of the dtype of the ids."""
        sha = hashlib.sha256()
        for array in (self.offsets, self.ids.astype("<i4"), np.packbits(self.loss_mask)):
            sha.update(len(array).to_bytes(8, "little"))
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def bytes_per_loss_token(self, tokenizer: Tokenizer) -> float:
        """Mean UTF-8 bytes per loss token; nats per token / (this * ln 2) = bits per byte. Control tokens, such as
        end-of-turn tokens, count as tokens of zero bytes."""
        return len(tokenizer.decode(self.ids[self.loss_mask].tolist()).encode()) / max(1, self.loss_tokens)


def narrow_ids(encoded: Encoded, vocab_size: int) -> Encoded:
    """The same conversation with ids in the dtype of a TokenTable."""
    return Encoded(encoded.ids.astype(np.uint16 if vocab_size <= 2**16 else np.int32), encoded.loss_mask)


def fit_to_length(encoded: Encoded, limit: int, too_long: TooLong) -> Encoded:
    """Drops everything after the last loss token, then fits the conversation into `limit` tokens.

    "cut" keeps the beginning, so every remaining loss token keeps its full context. "drop" raises InvalidRow instead,
    which removes long conversations and biases the model toward short answers. Raises InvalidRow if no loss token is
    left.
    """
    kept = _trim_after_loss(encoded)
    if len(kept.ids) < 2:
        raise InvalidRow("no loss tokens")
    if len(kept.ids) <= limit:
        return kept
    if too_long == "drop":
        raise InvalidRow("too long", f"{len(kept.ids)} tokens; limit {limit}")
    kept = _trim_after_loss(Encoded(kept.ids[:limit], kept.loss_mask[:limit]))
    if len(kept.ids) < 2:
        raise InvalidRow("no answer within the length limit", f"{limit} tokens")
    return kept


def _trim_after_loss(encoded: Encoded) -> Encoded:
    positions = np.flatnonzero(encoded.loss_mask)
    end = int(positions[-1]) + 1 if len(positions) else 0
    return Encoded(encoded.ids[:end], encoded.loss_mask[:end])


@dataclass(frozen=True)
class TokenizedSplits:
    """Both splits, and the first few validation conversations, whose last answers are generated for ROUGE."""

    train: TokenTable
    val: TokenTable
    samples: list[Conversation]


def tokenize_conversations(
    conversations: Iterable[tuple[str, Conversation]],
    encoder: ChatEncoder,
    counts: RowCounts,
    *,
    seq_len: int,
    too_long: TooLong = "cut",
    val_fraction: float = 0.0,
    samples: int = 0,
) -> TokenizedSplits:
    """Tokenizes the (place, conversation) items of `read_conversations`. Those that the template rejects or that do not
    fit are skipped and counted in `counts`. Conversations with the same opening are in the same split. Raises UserError
    if no training conversation is left."""
    train: list[Encoded] = []
    val: list[Encoded] = []
    sampled: list[Conversation] = []
    vocab_size = encoder.tokenizer.vocab_size
    for batch in batches(conversations):
        for (place, conversation), encoded in zip(batch, encoder.encode([c for _, c in batch]), strict=True):
            try:
                if isinstance(encoded, InvalidRow):
                    raise encoded
                fitted = fit_to_length(encoded, seq_len + 1, too_long)
            except InvalidRow as error:
                counts.skip_kept(place, error)
                continue
            counts.note_parts(place, encoded.unused)
            counts.truncated += len(encoded.ids) > seq_len + 1
            loss_tokens = int(encoded.loss_mask.sum())
            counts.loss_tokens += loss_tokens
            counts.truncated_loss_tokens += loss_tokens - int(fitted.loss_mask.sum())
            held_out = is_held_out(opening(conversation), val_fraction)
            (val if held_out else train).append(narrow_ids(fitted, vocab_size))
            last = conversation[-1]
            if held_out and len(sampled) < samples and last.role == "assistant" and last.content:
                sampled.append(conversation)
    check_not_empty(len(train), len(val), counts)
    return TokenizedSplits(
        TokenTable.from_encoded(train, vocab_size), TokenTable.from_encoded(val, vocab_size), sampled
    )


def opening(conversation: Conversation) -> Conversation:
    """The messages up to the first question. Rows from the same dialogue share them: other answers to the question, and
    the dialogue with more turns."""
    end = next((i for i, turn in enumerate(conversation, start=1) if turn.role == "user"), len(conversation))
    return conversation[:end]


def check_not_empty(train: int, held_out: int, counts: RowCounts) -> None:
    if not train:
        details = [*counts.summary(), *([f"{held_out:,} held out by data.val_fraction"] if held_out else [])]
        raise UserError(f"data.dataset: no training data left: {'; '.join(details)}")


def batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


class ConversationWindows:
    """Training sequences by index, as data/batches.py reads them.

    `pack` puts several whole conversations into one sequence (best fit), separated by `segments`. Otherwise each has
    its own sequence, and causal attention makes segments unnecessary. Conversations have at most `seq_len` + 1 tokens.
    """

    def __init__(self, table: TokenTable, seq_len: int, pack: bool, pad_id: int) -> None:
        starts, ends = table.offsets[:-1], table.offsets[1:] - 1
        assert not table.count or (ends - starts).max() <= seq_len
        if pack:
            self._first, self._starts, self._ends = best_fit(starts, ends, seq_len)
        else:
            self._first, self._starts, self._ends = np.arange(table.count + 1), starts, ends
        self.count = len(self._first) - 1
        self._table, self._seq_len, self._pack, self._pad_id = table, seq_len, pack, pad_id

    def rows(self, numbers: npt.NDArray[np.int64]) -> Batch:
        """Sequences by index; an index past the end gives padding."""
        numbers = np.minimum(numbers, self.count)
        rows, pieces = expand_ranges(self._first[numbers], self._first[np.minimum(numbers + 1, self.count)])
        starts, ends = self._starts[pieces], self._ends[pieces]
        before = np.cumsum(ends - starts) - (ends - starts)  # positions used by all earlier pieces, in all rows
        first_pieces = np.searchsorted(rows, rows)  # the first piece in each piece's row
        destinations = rows * self._seq_len + before - before[first_pieces]

        owner, source = expand_ranges(starts, ends)
        positions = destinations[owner] + source - starts[owner]
        inputs = np.full((len(numbers), self._seq_len), self._pad_id, np.int32)
        targets = np.full_like(inputs, IGNORE)
        ids, loss_mask = self._table.ids, self._table.loss_mask
        inputs.reshape(-1)[positions] = ids[source]
        targets.reshape(-1)[positions] = np.where(loss_mask[source + 1], ids[source + 1].astype(np.int32), IGNORE)
        if not self._pack:
            return Batch(inputs, targets)
        # Padding is a separate segment, after the last segment of its row.
        segments = np.repeat(np.bincount(rows, minlength=len(numbers))[:, None], self._seq_len, axis=1).astype(np.int32)
        segments.reshape(-1)[positions] = (np.arange(len(pieces)) - first_pieces)[owner]
        return Batch(inputs, targets, segments)

    def digest(self) -> str:
        """sha256 of the conversations and their layout; must match on resume."""
        layout = f"{self._table.digest()} seq_len {self._seq_len} pack {self._pack}"
        return hashlib.sha256(layout.encode()).hexdigest()

    @property
    def fill(self) -> float:
        """Fraction of positions that are not padding."""
        return float((self._ends - self._starts).sum()) / max(1, self.count * self._seq_len)
