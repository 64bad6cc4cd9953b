"""A SentencePiece BPE model as the `tokenizer.json` that Hugging Face's and other fast libraries read."""

from collections import Counter
from pathlib import Path
from typing import Any

import orjson

NORMAL, USER_DEFINED, UNUSED, BYTE = 1, 4, 5, 6  # a piece's types, as SentencePiece's files have them


class NotConvertible(Exception):
    """Says, as the end of a sentence, why a model has no exact equal."""


def spm_to_json(path: Path) -> tuple[str, int]:
    """The JSON text, and how many spaces in a row it can't be trusted with (0: any number is right): see `_scores`.

    Control and unknown pieces aren't among the added tokens, so that "<s>" in a text stays text, as it does in
    SentencePiece; only "<0x41>" would become its byte. Raises NotConvertible for what isn't plain BPE.
    """
    from sentencepiece import sentencepiece_model_pb2

    spec: Any = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise NotConvertible("it is not a BPE model")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        raise NotConvertible("it has a normaliser")
    if trainer.treat_whitespace_as_suffix:
        raise NotConvertible("it puts spaces behind words")
    pieces = [(piece.piece, piece.type, piece.score) for piece in spec.pieces]
    scores, tied_spaces = _scores(pieces, normalizer.add_dummy_prefix)
    merges = [
        (-score, cut, left, right)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
    ]
    merges.sort()
    # fastokens finds a piece with a character that isn't in the vocabulary, as "<s>" may be, without any merge. What
    # text can't become is called by a name that text can't have, as its spaces are replaced.
    reachable = {left + right for _, _, left, right in merges}
    names = {
        piece if kind == BYTE or len(piece) == 1 or piece in reachable else f"piece {i}": i
        for i, (piece, kind, _) in enumerate(pieces)
    }
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if normalizer.add_dummy_prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": "▁"})
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": f"piece {trainer.unk_id}",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": trainer.byte_fallback,
        "ignore_merges": False,
        "vocab": names,
        "merges": [f"{left} {right}" for _, _, left, right in merges],  # read twice as soon as lists of two
    }
    whole: dict[str, Any] = {
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
    return orjson.dumps(whole).decode(), tied_spaces


def _scores(pieces: list[tuple[str, int, float]], dummy_prefix: bool) -> tuple[dict[str, float], int]:
    """Scores of the pieces that merges make, and the length from which runs of spaces go wrong. `pieces` are texts,
    types and scores.

    SentencePiece merges the best score first, and of equals the leftmost; a list of merges knows no equals. Llama 2 and
    Mistral give one score to all their runs of spaces: a run that is a piece comes out as this piece either way, one
    that is no piece may not.
    """
    if any(kind in (USER_DEFINED, UNUSED) for _, kind, _ in pieces):
        raise NotConvertible("it has pieces of the user's own, or unused ones")
    # A space of the text never meets one in a piece, being U+2581 by then; and a merge is written with a space inside.
    scores = {piece: score for piece, kind, score in pieces if kind == NORMAL and " " not in piece}
    times = Counter(score for piece, score in scores.items() if len(piece) > 1)
    tied = [piece for piece, score in scores.items() if len(piece) > 1 and times[score] > 1]
    if any(piece.strip("▁") for piece in tied):
        raise NotConvertible("several of its pieces have the same score")
    if not tied:
        return scores, 0
    shortest = next(n for n in range(2, len(scores) + 3) if "▁" * n not in scores)
    return scores, shortest - dummy_prefix  # which stands before the first of a text
