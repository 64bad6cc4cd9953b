"""Tokens brought to one form, so that vocabularies of different libraries overlap.

A form is the bytes that the token stands for, a space in front being the mark of a word's start: SentencePiece's
`▁cell`, `<0xC3>` and byte-level BPE's `Ġcell`, `Ã` become b" cell" and b"\\xc3". A control token stands for no text:
its form is its role, or its own text where it has no common role.
"""

import json
import re
from typing import Literal, NamedTuple

from anarchobot.tokenizers.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer

_ROLES = {
    **dict.fromkeys(("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"), "begin"),
    **dict.fromkeys(("<unk>", "[UNK]", "<|unk|>"), "unknown"),
    **dict.fromkeys(("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"), "pad"),
    **dict.fromkeys(("<|im_start|>", "<start_of_turn>", "<|start_header_id|>"), "turn begins"),
    **dict.fromkeys(("<|im_end|>", "<end_of_turn>", "<|eot_id|>"), "turn ends"),
}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>$")


class Form(NamedTuple):
    """`kind` tells a byte of a broken character from a whole one of the same bytes; a `hole` is an id of no token."""

    raw: bytes
    kind: Literal["text", "byte", "special", "hole"]


def forms(tokenizer: Tokenizer) -> list[Form]:
    """The form of every id."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        found = _of_sentencepiece(tokenizer)
    else:
        assert isinstance(tokenizer, HFTokenizer)
        found = _of_tokenizers(tokenizer)
    found[tokenizer.eod_id] = Form(b"end of document", "special")
    return found


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> list[Form]:
    model = tokenizer._model
    return [
        _special(model.id_to_piece(i))
        if model.is_control(i) or model.is_unknown(i)
        else _marked(model.id_to_piece(i), is_byte=model.is_byte(i))
        for i in range(tokenizer.vocab_size)
    ]


def _of_tokenizers(tokenizer: HFTokenizer) -> list[Form]:
    model = tokenizer._model
    whole = json.loads(model.to_str())
    is_byte_level = "ByteLevel" in json.dumps([whole["pre_tokenizer"], whole["decoder"]])
    added, controls = model.get_added_tokens_decoder(), set(tokenizer.control_tokens.values())
    found = [Form(b"", "hole")] * tokenizer.vocab_size
    for token, i in model.get_vocab(with_added_tokens=True).items():
        if i in controls or token in _ROLES:
            found[i] = _special(token)
        elif i in added:
            found[i] = Form(token.encode(), "text")
        else:
            found[i] = _of_bytes(token) if is_byte_level else _marked(token, is_byte=bool(_BYTE.match(token)))
    return found


def _special(token: str) -> Form:
    return Form(_ROLES.get(token, token).encode(), "special")


def _marked(piece: str, *, is_byte: bool) -> Form:
    if is_byte and (match := _BYTE.match(piece)):
        return Form(bytes([int(match[1], 16)]), "byte")
    return Form(piece.replace("▁", " ").encode(), "text")


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: those that can be seen are themselves, the others follow from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_characters()


def _of_bytes(token: str) -> Form:
    if not all(character in _BYTES for character in token):
        return Form(token.encode(), "text")
    raw = bytes(_BYTES[character] for character in token)
    return Form(raw, "byte" if len(raw) == 1 and raw[0] >= 0x80 else "text")


class Matching:
    """Finds tokens of a vocabulary by their form; of several, the first with the same kind, else the first."""

    def __init__(self, vocabulary: list[Form]) -> None:
        self._exact: dict[Form, int] = {}
        self._loose: dict[bytes, int] = {}
        for i, form in enumerate(vocabulary):
            if form.kind != "hole":
                self._exact.setdefault(form, i)
            if form.kind in ("text", "byte"):
                self._loose.setdefault(form.raw, i)

    def find(self, form: Form) -> int | None:
        if form in self._exact or form.kind in ("special", "hole"):
            return self._exact.get(form)
        return self._loose.get(form.raw)
