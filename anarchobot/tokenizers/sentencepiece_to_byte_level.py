"""Converts a SentencePiece BPE model to a byte-level BPE with the same ids, for libraries that are faster with those.

SentencePiece merges characters, a byte-level BPE bytes, so merges that build the characters of the vocabulary from
their bytes come first. SentencePiece has no pre-tokenizer, but its pieces have spaces only at their start, so text can
be split before each run of spaces.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from anarchobot.tokenizers.canonical_tokens import BYTE_LEVEL
from anarchobot.tokenizers.sentencepiece_to_json import NORMAL, NotConvertible, read_bpe

SPLIT = r" *[^ \n]+| +|\n"
_IN_ONE_PART = re.compile(r"▁*[^▁\n]*")
_ALPHABET = {byte: character for character, byte in BYTE_LEVEL.items()}


class ByteLevelModel(NamedTuple):
    """`json`: a tokenizer.json. `tied_spaces`: see `read_bpe`.

    A character that is not in the vocabulary may begin with the same bytes as one that is. These bytes are then one
    token, with an id after the model's pieces: `partial_characters[id]` are their ids among the pieces.
    """

    json: str
    tied_spaces: int
    partial_characters: dict[int, list[int]]


def spm_to_byte_level(path: Path) -> ByteLevelModel:
    """Control and unknown pieces are not tokens. U+2581 in a text is its three bytes; to SentencePiece, it is a space.

    Raises NotConvertible for anything but plain BPE with byte fallback and spaces only at the start of pieces.
    """
    proto, merges, tied_spaces = read_bpe(path)
    if not proto.trainer_spec.byte_fallback:
        raise NotConvertible("it has no byte fallback")
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    byte_ids = [ids[f"<0x{byte:02X}>"] for byte in range(256)]
    characters = {
        piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == NORMAL and len(piece.piece) == 1
    }
    reachable = dict.fromkeys(left + right for left, right in merges)
    if "▁" not in characters or not all(map(_IN_ONE_PART.fullmatch, reachable)):
        raise NotConvertible("it has pieces with spaces after their first character")

    vocab = {_ALPHABET[byte]: i for byte, i in enumerate(byte_ids)}
    vocab[_ALPHABET[ord(" ")]] = characters.pop("▁")
    partial_characters: dict[int, list[int]] = {}
    built: list[str] = []
    for character, i in characters.items():
        raw = character.encode()
        if len(raw) == 1:
            vocab[_name(raw)] = i
        for end in range(2, len(raw) + 1):
            token = _name(raw[:end])
            if end == len(raw):
                vocab[token] = i
            elif token not in vocab:
                vocab[token] = len(proto.pieces) + len(partial_characters)
                partial_characters[vocab[token]] = [byte_ids[byte] for byte in raw[:end]]
            else:
                continue
            built.append(f"{token[:-1]} {token[-1]}")
    names = {piece: _name(piece.replace("▁", " ").encode()) for piece in (*characters, "▁", *reachable)}
    vocab |= {names[piece]: ids[piece] for piece in reachable}
    unused = set(range(len(proto.pieces))).difference(vocab.values())
    vocab |= {f"piece {i}": i for i in unused}  # with a space, which is not in the byte-level alphabet

    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    alphabet = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Prepend", "prepend": " "} if proto.normalizer_spec.add_dummy_prefix else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, alphabet]},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [*built, *(f"{names[left]} {names[right]}" for left, right in merges)],
        },
    }
    return ByteLevelModel(orjson.dumps(spec).decode(), tied_spaces, partial_characters)


def _name(raw: bytes) -> str:
    return raw.decode("latin-1").translate(_ALPHABET)
