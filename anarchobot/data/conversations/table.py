"""Tokenised conversations in flat arrays: 3 to 5 bytes a token, where lists of Python numbers would take 40."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from anarchobot.tokenizers.chat_encoder import Encoded
from anarchobot.tokenizers.conversation import InvalidRow
from anarchobot.tokenizers.tokenizer import Tokenizer

TooLong = Literal["cut", "drop"]


@dataclass(frozen=True)
class Table:
    """Conversation c is places bounds[c] to bounds[c + 1] of `ids` (uint16 where the vocabulary fits, else int32) and
    of `trained` (bool)."""

    ids: npt.NDArray[np.uint16 | np.int32]
    trained: npt.NDArray[np.bool_]
    bounds: npt.NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def targets(self) -> int:
        """Tokens that are trained; the first of a conversation has none before it to be told from."""
        return int(self.trained.sum()) - int(self.trained[self.bounds[:-1]].sum())

    def digest(self) -> str:
        """sha256 of all that training depends on, whatever the width of the ids."""
        sha = hashlib.sha256()
        for array in (self.bounds, self.ids.astype("<i4"), np.packbits(self.trained)):
            sha.update(len(array).to_bytes(8, "little"))
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def bytes_per_target(self, tokenizer: Tokenizer) -> float:
        """Mean UTF-8 bytes of text in a trained token: nats per token over this and ln 2 are bits per byte. Control
        tokens, such as the end of a turn, are tokens without bytes."""
        return len(tokenizer.decode(self.ids[self.trained].tolist()).encode()) / max(1, self.targets)


def narrow(encoded: Encoded, vocab_size: int) -> Encoded:
    """With ids as a table keeps them."""
    return Encoded(encoded.ids.astype(np.uint16 if vocab_size <= 2**16 else np.int32), encoded.trained)


def table(encoded: Iterable[Encoded], vocab_size: int) -> Table:
    """The conversations in their order."""
    parts = [narrow(Encoded(np.empty(0, np.int32), np.empty(0, bool)), vocab_size)]
    parts += (narrow(one, vocab_size) for one in encoded)
    bounds = np.cumsum([len(part.ids) for part in parts])
    return Table(np.concatenate([part.ids for part in parts]), np.concatenate([part.trained for part in parts]), bounds)


def fitted(encoded: Encoded, limit: int, too_long: TooLong) -> Encoded:
    """Without what follows the last trained token, for nothing is learnt from it; and of at most `limit` tokens.

    "cut" keeps the beginning: each token that is trained has all before it, as it had uncut, and the first answers of a
    long talk stay, where "drop" would leave out the long ones and teach that answers are short. Raises InvalidRow when
    nothing to train on is left, or it is too long and to be dropped.
    """
    kept = _without_tail(encoded)
    if len(kept.ids) < 2:
        raise InvalidRow("nothing to train on")
    if len(kept.ids) <= limit:
        return kept
    if too_long == "drop":
        raise InvalidRow("longer than the limit", f"{len(kept.ids)} tokens; {limit} fit")
    kept = _without_tail(Encoded(kept.ids[:limit], kept.trained[:limit]))
    if len(kept.ids) < 2:
        raise InvalidRow("no answer within the limit", f"of {limit} tokens")
    return kept


def _without_tail(encoded: Encoded) -> Encoded:
    places = np.flatnonzero(encoded.trained)
    end = int(places[-1]) + 1 if len(places) else 0
    return Encoded(encoded.ids[:end], encoded.trained[:end])
