"""Conversations and pairs, as they are read, to the tables that training takes its sequences from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from anarchobot.config.errors import UserError
from anarchobot.data.conversations.pairs import Pairs
from anarchobot.data.conversations.table import Table, TooLong, fitted, narrow, table
from anarchobot.data.conversations.tally import Tally
from anarchobot.tokenizers.chat_encoder import ChatEncoder, Encoded
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message, Pair, is_held_out

UNIT = 256  # conversations that are tokenised by one call
T = TypeVar("T")


@dataclass(frozen=True)
class Tokenised:
    """The two splits, and of the held-out conversations the first few: to generate their last answers anew."""

    train: Table
    val: Table
    samples: list[Conversation]


def tokenised(
    found: Iterable[tuple[str, Conversation]],
    encoder: ChatEncoder,
    tally: Tally,
    *,
    seq_len: int,
    too_long: TooLong = "cut",
    val_fraction: float = 0.0,
    samples: int = 0,
) -> Tokenised:
    """Reads all of `found`, as `reading.conversations` gives it. What the template can't take, or `too_long` leaves
    out, `tally` counts. Raises UserError when nothing to train on is left."""
    train: list[Encoded] = []
    val: list[Encoded] = []
    kept: list[Conversation] = []
    vocab_size = encoder.tokenizer.vocab_size
    for unit in _units(found):
        for (place, conversation), encoded in zip(unit, encoder.encode([c for _, c in unit]), strict=True):
            try:
                if isinstance(encoded, InvalidRow):
                    raise encoded
                one = fitted(encoded, seq_len + 1, too_long)
            except InvalidRow as misfit:
                tally.take_back(place, misfit)
                continue
            tally.shortened += len(encoded.ids) > seq_len + 1
            answered = int(encoded.trained.sum())
            tally.answered, tally.cut = tally.answered + answered, tally.cut + answered - int(one.trained.sum())
            held_out = is_held_out(conversation, val_fraction)
            (val if held_out else train).append(narrow(one, vocab_size))
            if held_out and len(kept) < samples and conversation[-1].role == "assistant":
                kept.append(conversation)
    _check(len(train), len(val), tally)
    return Tokenised(table(train, vocab_size), table(val, vocab_size), kept)


def tokenised_pairs(
    found: Iterable[tuple[str, Pair]],
    encoder: ChatEncoder,
    tally: Tally,
    *,
    seq_len: int,
    too_long: TooLong = "cut",
    val_fraction: float = 0.0,
) -> tuple[Pairs, Pairs]:
    """The train and val pairs of what `reading.pairs` gives; all that begin with one question are on one side.
    `encoder` is one with train_on "answer".

    "cut" leaves the oldest turns of a long prompt out, a question with its answer at a time; the answers are never cut,
    for the sums of their log-probabilities are what is compared. What is still too long is left out. Raises UserError
    when no pair is left to train on.
    """
    assert encoder.train_on == "answer"
    splits: tuple[list[tuple[Encoded, Encoded]], ...] = ([], [])
    for unit in _units(found):
        dialogues = [dialogue for _, pair in unit for dialogue in _dialogues(pair)]
        encoded = encoder.encode(dialogues)
        for (place, pair), chosen, rejected in zip(unit, encoded[::2], encoded[1::2], strict=True):
            try:
                sides, shortened = _fitted_pair(pair, chosen, rejected, encoder, seq_len + 1, too_long)
            except InvalidRow as misfit:
                tally.take_back(place, misfit)
                continue
            tally.shortened += shortened
            splits[is_held_out(_first_question(pair.prompt), val_fraction)].append(sides)
    _check(len(splits[0]), len(splits[1]), tally)
    train, val = (_pairs(sides, encoder, seq_len) for sides in splits)
    return train, val


def _first_question(prompt: Conversation) -> Conversation:
    """Pairs of later turns of the same dialogue have it before them too."""
    return (next(turn for turn in prompt if turn.role == "user"),)


def _fitted_pair(
    pair: Pair,
    chosen: Encoded | InvalidRow,
    rejected: Encoded | InvalidRow,
    encoder: ChatEncoder,
    limit: int,
    too_long: TooLong,
) -> tuple[tuple[Encoded, Encoded], bool]:
    shortened = False
    while True:
        for side in (chosen, rejected):
            if isinstance(side, InvalidRow):
                raise side
        assert isinstance(chosen, Encoded) and isinstance(rejected, Encoded)
        try:
            return (fitted(chosen, limit, "drop"), fitted(rejected, limit, "drop")), shortened
        except InvalidRow:
            first = int(pair.prompt[0].role == "system")
            if too_long == "drop" or len(pair.prompt) - first < 3:  # a single question is not cut
                raise
            pair = pair._replace(prompt=pair.prompt[:first] + pair.prompt[first + 2 :])
            shortened = True
            chosen, rejected = encoder.encode(_dialogues(pair))


def _dialogues(pair: Pair) -> list[Conversation]:
    return [(*pair.prompt, Message("assistant", answer)) for answer in (pair.chosen, pair.rejected)]


def _pairs(sides: list[tuple[Encoded, Encoded]], encoder: ChatEncoder, seq_len: int) -> Pairs:
    tokenizer = encoder.tokenizer
    chosen, rejected = (table((side[i] for side in sides), tokenizer.vocab_size) for i in range(2))
    return Pairs(chosen, rejected, seq_len, tokenizer.eod_id)


def _check(count: int, held_out: int, tally: Tally) -> None:
    if not count:
        said = [*tally.lines(), *([f"{held_out:,} held out by data.val_fraction"] if held_out else [])]
        raise UserError(f"data.dataset: nothing to train on is left: {'; '.join(said)}")


def _units(found: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(found)
    while unit := list(islice(iterator, UNIT)):
        yield unit
