"""The tokenizer that a model is moved to: one that is there, one trained on the field's text, or the source's own with
the field's terms added as tokens of their own.

An added term is reached as every other token: by merges (BPE), or because it is the likeliest way to write itself
(unigram). Merges are added behind all that are there, from the pieces the term falls into now, one after the other:
`▁carc` + `in` → `▁carcin`, + `oma` → `▁carcinoma`. So all tokens keep their ids, and other text its tokens, unless a
word begins with what such merges pass through: it gets fewer.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer


def is_one_token(tokenizer: Tokenizer, word: str) -> bool:
    """Whether the word, behind a space, is one token already."""
    return len(tokenizer.encode_batch([f" {word}"])[0]) == 1


def extend(tokenizer: Tokenizer, terms: Sequence[str], folder: Path) -> Tokenizer:
    """Writes into `folder` and returns the tokenizer with `terms` added, each with a space in front.

    Raises UserError for a tokenizer of neither SentencePiece nor Hugging Face's BPE.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        file = folder / "tokenizer.model"
        file.write_bytes(_extended_sentencepiece(tokenizer, terms))
    else:
        assert isinstance(tokenizer, HFTokenizer)
        file = folder / "tokenizer.json"
        file.write_text(_extended_bpe(tokenizer, terms), encoding="utf-8")
    return load_tokenizer(file)


def _extended_sentencepiece(tokenizer: SentencePieceTokenizer, terms: Sequence[str]) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    spec: Any = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.files[0].read_bytes())  # type: ignore[attr-defined]
    model = tokenizer._model
    known = {piece.piece: piece.score for piece in spec.pieces}
    lowest = min(known.values())
    is_bpe = spec.trainer_spec.model_type == spec.trainer_spec.BPE
    for term in terms:
        pieces: list[str] = model.encode(f" {term}", out_type=str)
        if any(model.is_byte(model.piece_to_id(piece)) for piece in pieces):
            continue  # a letter that the vocabulary lacks
        if is_bpe:
            chain, added = pieces[0], []
            for piece in pieces[1:]:
                chain += piece
                added.append(chain)
        else:
            added = ["".join(pieces)]
        for piece in added:
            if piece not in known:
                lowest -= 1
                # A unigram piece is taken when it is likelier than the pieces that it replaces.
                score = lowest if is_bpe else sum(known[p] for p in pieces) + 0.1
                known[piece] = score
                spec.pieces.add(piece=piece, score=score)
    raw: bytes = spec.SerializeToString()
    return raw


def _extended_bpe(tokenizer: HFTokenizer, terms: Sequence[str]) -> str:
    whole = json.loads(tokenizer._model.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"{tokenizer.files[0]}: a {model['type']} model can't be extended: set tokenization.target: trained, or "
            "name a models.target_tokenizer"
        )
    vocabulary: dict[str, int] = model["vocab"]
    merges = [list(merge) if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    known = {tuple(merge) for merge in merges}
    next_id = tokenizer.vocab_size
    for term in terms:
        chain, *others = tokenizer._model.encode(f" {term}", add_special_tokens=False).tokens
        for piece in others:
            if (chain, piece) not in known:
                known.add((chain, piece))
                merges.append([chain, piece])
            chain += piece
            if chain not in vocabulary:
                vocabulary[chain] = next_id
                next_id += 1
    model["merges"] = merges
    return json.dumps(whole, ensure_ascii=False)
