"""Extends a tokenizer with domain terms, each as a single token.

BPE: new merges are appended after the existing ones and join the term's current pieces from left to right:
`▁carc` + `in` → `▁carcin`, + `oma` → `▁carcinoma`. Unigram: the term gets a higher score than its pieces together.
Existing tokens keep their ids. Other text keeps its tokens, except words that start with an intermediate merge: these
need fewer tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    copy_special_tokens,
    load_tokenizer,
    read_sentencepiece_proto,
)


def is_one_token(tokenizer: Tokenizer, word: str) -> bool:
    """Returns whether a word, preceded by a space, is a single token."""
    return len(tokenizer.encode_batch([f" {word}"])[0]) == 1


def extend(tokenizer: Tokenizer, terms: Sequence[str], folder: Path) -> Tokenizer:
    """Adds `terms`, each with a leading space, to a tokenizer; writes the result to `folder` and returns it.

    Raises UserError unless it is a SentencePiece or a Hugging Face BPE tokenizer.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        if tokenizer.added_tokens:
            raise UserError(
                f"{tokenizer.files[0]}: a SentencePiece model with added tokens can't be extended: set "
                "tokenization.target: trained, or models.target_tokenizer"
            )
        file = folder / "tokenizer.model"
        file.write_bytes(_extend_sentencepiece(tokenizer, terms))
    else:
        assert isinstance(tokenizer, HFTokenizer)
        file = folder / "tokenizer.json"
        file.write_text(_extend_bpe(tokenizer, terms), encoding="utf-8")
    copy_special_tokens(tokenizer, folder)
    return load_tokenizer(file)


def _extend_sentencepiece(tokenizer: SentencePieceTokenizer, terms: Sequence[str]) -> bytes:
    spec = read_sentencepiece_proto(tokenizer.files[0])
    model = tokenizer.processor
    known = {piece.piece: piece.score for piece in spec.pieces}
    lowest = min(known.values())
    is_bpe = spec.trainer_spec.model_type == spec.trainer_spec.BPE
    for term in terms:
        pieces: list[str] = model.encode(f" {term}", out_type=str)
        if any(model.is_byte(model.piece_to_id(piece)) for piece in pieces):
            continue  # a letter outside the vocabulary
        if is_bpe:
            merged, added = pieces[0], []
            for piece in pieces[1:]:
                merged += piece
                added.append(merged)
        else:
            added = ["".join(pieces)]
        for piece in added:
            if piece not in known:
                lowest -= 1
                # A unigram piece is chosen if its score exceeds the sum of the scores of the pieces it replaces.
                score = lowest if is_bpe else sum(known[p] for p in pieces) + 0.1
                known[piece] = score
                spec.pieces.add(piece=piece, score=score)
    raw: bytes = spec.SerializeToString()
    return raw


def _extend_bpe(tokenizer: HFTokenizer, terms: Sequence[str]) -> str:
    spec = tokenizer.spec()
    model = spec["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"{tokenizer.files[0]}: {model['type']} tokenizers cannot be extended: set tokenization.target: trained "
            "or models.target_tokenizer"
        )
    vocabulary: dict[str, int] = model["vocab"]
    merges = [list(merge) if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    known = {tuple(merge) for merge in merges}
    next_id = tokenizer.vocab_size
    for term in terms:
        merged, *others = tokenizer.backend.encode(f" {term}", add_special_tokens=False).tokens
        for piece in others:
            if (merged, piece) not in known:
                known.add((merged, piece))
                merges.append([merged, piece])
            merged += piece
            if merged not in vocabulary:
                vocabulary[merged] = next_id
                next_id += 1
    model["merges"] = merges
    return json.dumps(spec, ensure_ascii=False)
