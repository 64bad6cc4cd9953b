"""Documents to pieces on their way to a shard: exact duplicates dropped, a validation split held out."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from anarchobot.data.exact_duplicates import Seen
from anarchobot.data.shards import Split
from anarchobot.data.sources.documents import Counts, Document


class Piece(NamedTuple):
    """A document, or the train or val part of one."""

    split: Split
    text: str
    size: int  # bytes of UTF-8
    key: bytes  # sha256 of the whole document
    is_tail: bool = False  # the val part of the document whose train part is the piece before


def pieces(documents: Iterable[Document], counts: Counts, dedup: bool, val_fraction: float) -> Iterator[Piece]:
    """In the order of the documents. Train or val by the document's hash, so that adding documents moves none; a long
    text file gives its tail."""
    seen = Seen()
    for document in documents:
        text = document.text
        raw = text.encode()
        key = hashlib.sha256(raw).digest()
        if dedup and not seen.add(int.from_bytes(key[8:16], "big")):
            counts.duplicates += 1
            continue
        counts.kept += 1
        if document.may_cut and val_fraction:
            cut = _cut(text, val_fraction)
            head = len(text[:cut].encode())
            yield Piece("train", text[:cut], head, key)
            yield Piece("val", text[cut:], len(raw) - head, key, is_tail=True)
        else:
            held_out = int.from_bytes(key[:8], "big") < val_fraction * 2**64
            yield Piece("val" if held_out else "train", text, len(raw), key)


def _cut(text: str, val_fraction: float) -> int:
    """Where the tail for validation begins: where a line or word starts, if one is near: at most its share before."""
    cut = max(1, min(int(len(text) * (1 - val_fraction)), len(text) - 1))
    near = max(0, 2 * cut - len(text))
    return text.rfind("\n", near, cut) + 1 or text.rfind(" ", near, cut) + 1 or cut
