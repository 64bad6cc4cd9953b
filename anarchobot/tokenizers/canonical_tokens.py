"""Library-independent form of tokens, so that tokens of different tokenizer libraries can be matched.

The canonical form of a token is the bytes that it stands for, where a leading space marks the start of a word:
SentencePiece's `▁cell` and `<0xC3>`, and byte-level BPE's `Ġcell` and `Ã`, become b" cell" and b"\\xc3". A control
token has no text; its form is its role, or its own name if it has no common role.
"""

import json
import re
from functools import lru_cache
from typing import Literal, NamedTuple

from anarchobot.tokenizers.tokenizer import ChatTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer

_ROLES = {
    **dict.fromkeys(("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"), "begin"),
    **dict.fromkeys(("<unk>", "[UNK]", "<|unk|>"), "unknown"),
    **dict.fromkeys(("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"), "pad"),
    **dict.fromkeys(("<|im_start|>", "<start_of_turn>", "<|start_header_id|>"), "start of turn"),
    **dict.fromkeys(("<|im_end|>", "<end_of_turn>", "<|eot_id|>"), "end of turn"),
}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>$")


class CanonicalToken(NamedTuple):
    """`kind` distinguishes a byte of a partial character from a whole character; `unused` is an id without a token."""

    raw: bytes
    kind: Literal["text", "byte", "special", "unused"]


BEGIN = CanonicalToken(b"begin", "special")


def canonical_tokens(tokenizer: Tokenizer) -> list[CanonicalToken]:
    """Returns the canonical form of every id."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokens = _from_sentencepiece(tokenizer)
    else:
        assert isinstance(tokenizer, HFTokenizer)
        tokens = _from_hf(tokenizer)
    tokens[tokenizer.eod_id] = CanonicalToken(b"end of document", "special")
    return tokens


def token_bytes(tokenizer: ChatTokenizer) -> list[bytes]:
    """What each id stands for in a text; for a control token, its name."""
    return _token_bytes(tokenizer)  # type: ignore[arg-type]  # mypy takes no protocol for Hashable


@lru_cache(maxsize=1)
def _token_bytes(tokenizer: ChatTokenizer) -> list[bytes]:
    names = {i: name.encode() for name, i in tokenizer.control_tokens.items()}
    return [names.get(i, token.raw) for i, token in enumerate(canonical_tokens(tokenizer))]


class TokenIndex:
    """Finds tokens of a vocabulary by canonical form: the first match of the same kind, else the first match."""

    def __init__(self, vocabulary: list[CanonicalToken]) -> None:
        self._exact: dict[CanonicalToken, int] = {}
        self._by_bytes: dict[bytes, int] = {}
        for i, token in enumerate(vocabulary):
            if token.kind != "unused":
                self._exact.setdefault(token, i)
            if token.kind in ("text", "byte"):
                self._by_bytes.setdefault(token.raw, i)

    def find(self, token: CanonicalToken) -> int | None:
        if token in self._exact or token.kind in ("special", "unused"):
            return self._exact.get(token)
        return self._by_bytes.get(token.raw)


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> list[CanonicalToken]:
    model = tokenizer.processor
    return [
        _special(model.id_to_piece(i))
        if model.is_control(i) or model.is_unknown(i)
        else _from_piece(model.id_to_piece(i), is_byte=model.is_byte(i))
        for i in range(model.vocab_size())
    ] + [_special(token["content"]) for token in tokenizer.added_tokens.values()]


def _from_hf(tokenizer: HFTokenizer) -> list[CanonicalToken]:
    backend, spec = tokenizer.backend, tokenizer.spec()
    is_byte_level = "ByteLevel" in json.dumps([spec["pre_tokenizer"], spec["decoder"]])
    added, controls = backend.get_added_tokens_decoder(), set(tokenizer.control_tokens.values())
    tokens = [CanonicalToken(b"", "unused")] * tokenizer.vocab_size
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        if i in controls or token in _ROLES:
            tokens[i] = _special(token)
        elif i in added:
            tokens[i] = CanonicalToken(token.encode(), "text")
        elif is_byte_level:
            tokens[i] = _from_byte_level(token)
        else:
            tokens[i] = _from_piece(token, is_byte=bool(_BYTE.match(token)))
    return tokens


def _special(token: str) -> CanonicalToken:
    return CanonicalToken(_ROLES.get(token, token).encode(), "special")


def _from_piece(piece: str, *, is_byte: bool) -> CanonicalToken:
    if is_byte and (match := _BYTE.match(piece)):
        return CanonicalToken(bytes([int(match[1], 16)]), "byte")
    return CanonicalToken(piece.replace("▁", " ").encode(), "text")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable bytes are themselves, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_LEVEL = _byte_level_alphabet()


def _from_byte_level(token: str) -> CanonicalToken:
    if not all(character in BYTE_LEVEL for character in token):
        return CanonicalToken(token.encode(), "text")
    raw = bytes(BYTE_LEVEL[character] for character in token)
    return CanonicalToken(raw, "byte" if len(raw) == 1 and raw[0] >= 0x80 else "text")
