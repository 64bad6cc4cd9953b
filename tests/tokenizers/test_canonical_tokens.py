"""Tokens of different libraries in their canonical token."""

from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from anarchobot.data.sources import builtin
from anarchobot.tokenizers.canonical_tokens import CanonicalToken, TokenIndex, canonical_tokens
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer
from anarchobot.vocab.token_alignment import shared_ids


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A SentencePiece and a byte-level tokenizer trained on the same text."""
    folder = tmp_path_factory.mktemp("both")
    texts = list(builtin.topics())[:6]
    spm = train_tokenizer(texts, folder / "a", 500)[0]
    return spm, train_tokenizer(texts, folder / "b", 500, file_format="gpt2")[0]


def test_canonical_bytes_match_the_decoders(both: tuple[Path, Path]) -> None:
    """Compared with the libraries' own decoders. A letter in front keeps them from stripping the space."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(both[0]))
    letter = spm.piece_to_id("x")
    for i, token in enumerate(canonical_tokens(load_tokenizer(both[0]))):
        if token.kind == "text":
            assert spm.decode([letter, i]).encode() == b"x" + token.raw
    merges = str(both[1]).replace("vocab.json", "merges.txt")
    model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(both[1]), merges))
    model.decoder = tokenizers.decoders.ByteLevel()
    for i, token in enumerate(canonical_tokens(load_tokenizer(both[1]))):
        if token.kind == "text":
            assert model.decode([i], skip_special_tokens=False) == token.raw.decode(errors="replace")


def test_vocabularies_of_two_libraries_overlap(both: tuple[Path, Path]) -> None:
    """As raw strings, only letters would match, and no token that starts a word."""
    source, target = (canonical_tokens(load_tokenizer(path)) for path in both)
    same = shared_ids(source, target)
    word_starts = [i for i, token in enumerate(target) if token.raw[:1] == b" " and len(token.raw) > 2]
    assert sum(same[i] >= 0 for i in word_starts) > len(word_starts) / 2
    for i in word_starts:
        assert same[i] < 0 or source[same[i]].raw == target[i].raw


def test_special_tokens_match_by_role(both: tuple[Path, Path]) -> None:
    """The end of a document is </s> in SentencePiece and <|endoftext|> in GPT-2."""
    spm, hf = (load_tokenizer(path) for path in both)
    assert shared_ids(canonical_tokens(spm), canonical_tokens(hf))[hf.eod_id] == spm.eod_id


def test_a_match_of_the_same_kind_is_preferred() -> None:
    index = TokenIndex(
        [
            CanonicalToken(b"A", "byte"),
            CanonicalToken(b"A", "text"),
            CanonicalToken(b"\xc3", "byte"),
            CanonicalToken(b"", "unused"),
        ]
    )
    assert index.find(CanonicalToken(b"A", "text")) == 1
    assert index.find(CanonicalToken(b"A", "byte")) == 0
    assert index.find(CanonicalToken(b"\xc3", "text")) == 2
    assert index.find(CanonicalToken(b"", "unused")) is None
    assert index.find(CanonicalToken(b"pad", "special")) is None
