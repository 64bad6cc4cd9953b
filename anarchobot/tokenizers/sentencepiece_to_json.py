"""Converts a SentencePiece BPE model to the `tokenizer.json` that Hugging Face's and other fast libraries read."""

from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from anarchobot.tokenizers.tokenizer import read_sentencepiece_proto

NORMAL, UNKNOWN, USER_DEFINED, UNUSED, BYTE = 1, 2, 4, 5, 6  # piece types in SentencePiece's files


class NotConvertible(Exception):
    """Its message completes the sentence "can't be converted: ..."."""


def unknown_id(proto: Any) -> int:
    """The id of the only unknown piece. `trainer_spec.unk_id` says what was asked for in training. Raises
    NotConvertible if there is none, which SentencePiece allows with byte fallback."""
    for i, piece in enumerate(proto.pieces):
        if piece.type == UNKNOWN:
            return i
    raise NotConvertible("it has no unknown piece")


def spm_to_json(path: Path) -> tuple[str, int]:
    """Returns the JSON text, and the number of consecutive spaces from which its ids may differ (0: never).

    Control and unknown pieces are not added tokens, so "<s>" in a text stays text, as in SentencePiece; only "<0x41>"
    would become its byte. Raises NotConvertible for anything but plain BPE.
    """
    proto, merges, tied_spaces = read_bpe(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    # fastokens matches a piece with a character outside the vocabulary, as "<s>" may have, without any merge. Pieces
    # that text can't produce are therefore renamed to contain a space, which never occurs after normalization.
    reachable = {left + right for left, right in merges}
    names = {
        piece.piece if piece.type == BYTE or len(piece.piece) == 1 or piece.piece in reachable else f"piece {i}": i
        for i, piece in enumerate(proto.pieces)
    }
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if normalizer.add_dummy_prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": "▁"})
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": f"piece {unknown_id(proto)}",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": trainer.byte_fallback,
        "ignore_merges": False,
        "vocab": names,
        "merges": [f"{left} {right}" for left, right in merges],  # parsed twice as fast as lists of two
    }
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return orjson.dumps(spec).decode(), tied_spaces


def read_bpe(path: Path) -> tuple[Any, list[tuple[str, str]], int]:
    """Returns the model, its merges (left, right) in the order in which they apply, and the number of consecutive
    spaces from which its ids may differ from theirs (0: never); see `_scores`. Raises NotConvertible for anything but
    plain BPE."""
    proto = read_sentencepiece_proto(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise NotConvertible("it is not a BPE model")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        raise NotConvertible("it has a normalizer")
    if trainer.treat_whitespace_as_suffix:
        raise NotConvertible("it treats whitespace as a suffix")
    pieces = [(piece.piece, piece.type, piece.score) for piece in proto.pieces]
    scores, tied_spaces = _scores(pieces, normalizer.add_dummy_prefix)
    merges = [
        (-score, cut, left, right)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
    ]
    merges.sort()
    return proto, [(left, right) for _, _, left, right in merges], tied_spaces


def _scores(pieces: list[tuple[str, int, float]], dummy_prefix: bool) -> tuple[dict[str, float], int]:
    """Returns the scores of the pieces that merges produce, and the length from which runs of spaces may be encoded
    differently. `pieces`: (text, type, score).

    SentencePiece applies the merge with the best score first, and the leftmost among equals; a list of merges has no
    equals. Llama 2 and Mistral give all their runs of spaces the same score: a run that is itself a piece is encoded as
    that piece either way, but a run that is not a piece may differ.
    """
    if any(kind in (USER_DEFINED, UNUSED) for _, kind, _ in pieces):
        raise NotConvertible("it has user-defined or unused pieces")
    # Spaces in a text become U+2581, so they never match a space in a piece; and merges are written with a space.
    scores = {piece: score for piece, kind, score in pieces if kind == NORMAL and " " not in piece}
    occurrences = Counter(score for piece, score in scores.items() if len(piece) > 1)
    tied = [piece for piece, score in scores.items() if len(piece) > 1 and occurrences[score] > 1]
    if any(piece.strip("▁") for piece in tied):
        raise NotConvertible("several of its pieces have the same score")
    if not tied:
        return scores, 0
    shortest = next(n for n in range(2, len(scores) + 3) if "▁" * n not in scores)
    return scores, shortest - dummy_prefix  # the prefix extends a run at the start of a text
