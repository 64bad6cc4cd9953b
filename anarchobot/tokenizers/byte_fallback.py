"""Decodes tokens that stand for bytes, such as "<0xE2>", with which Llama 2, Mistral or Gemma spell characters outside
their vocabulary.

Of a run of such tokens, Hugging Face's library decodes every byte as U+FFFD if a single one is not part of a character.
While text is generated, the end of a run is often the beginning of a character, and the complete ones before it would
be lost. SentencePiece keeps them, and so does this.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def separate_invalid_bytes(tokens: Iterable[str]) -> Iterator[str]:
    """The tokens with U+FFFD for each byte that is not part of a character: it ends a run, so the rest is valid."""
    for is_byte, run in groupby(tokens, lambda token: _BYTE.fullmatch(token) is not None):
        if not is_byte:
            yield from run
            continue
        for character in bytes.fromhex(_BYTE.sub(r"\1", "".join(run))).decode("utf-8", "surrogateescape"):
            if "\udc80" <= character <= "\udcff":
                yield "\ufffd"
            else:
                yield from (f"<0x{byte:02X}>" for byte in character.encode())
