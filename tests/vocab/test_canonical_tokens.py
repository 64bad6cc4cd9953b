"""Tokens of different libraries in one form."""

from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from anarchobot.data.sources import builtin
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer
from anarchobot.vocab.canonical_tokens import Form, Matching, forms
from anarchobot.vocab.token_alignment import shared_ids


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A SentencePiece and a byte-level vocabulary of the same text."""
    folder = tmp_path_factory.mktemp("both")
    texts = list(builtin.topics())[:6]
    spm = train_tokenizer(texts, folder / "a", 500)[0]
    return spm, train_tokenizer(texts, folder / "b", 500, file_format="gpt2")[0]


def test_a_form_is_the_bytes_that_the_library_decodes(both: tuple[Path, Path]) -> None:
    """The libraries' own decoders are the independent truth: each behind a letter, so that none strips a space."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(both[0]))
    letter = spm.piece_to_id("x")
    for i, form in enumerate(forms(load_tokenizer(both[0]))):
        if form.kind == "text":
            assert spm.decode([letter, i]).encode() == b"x" + form.raw
    merges = str(both[1]).replace("vocab.json", "merges.txt")
    model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(both[1]), merges))
    model.decoder = tokenizers.decoders.ByteLevel()
    for i, form in enumerate(forms(load_tokenizer(both[1]))):
        if form.kind == "text":
            assert model.decode([i], skip_special_tokens=False) == form.raw.decode(errors="replace")


def test_vocabularies_of_two_libraries_overlap(both: tuple[Path, Path]) -> None:
    """As raw strings, only letters would be the same: no token that begins a word."""
    source, target = (forms(load_tokenizer(path)) for path in both)
    same = shared_ids(source, target)
    begin_words = [i for i, form in enumerate(target) if form.raw[:1] == b" " and len(form.raw) > 2]
    assert sum(same[i] >= 0 for i in begin_words) > len(begin_words) / 2
    for i in begin_words:
        assert same[i] < 0 or source[same[i]].raw == target[i].raw


def test_special_tokens_go_by_role(both: tuple[Path, Path]) -> None:
    """SentencePiece's end of document is </s>, the other's <|endoftext|>."""
    spm, hf = (load_tokenizer(path) for path in both)
    assert shared_ids(forms(spm), forms(hf))[hf.eod_id] == spm.eod_id


def test_a_byte_is_found_as_a_byte_first() -> None:
    matching = Matching([Form(b"A", "byte"), Form(b"A", "text"), Form(b"\xc3", "byte"), Form(b"", "hole")])
    assert matching.find(Form(b"A", "text")) == 1
    assert matching.find(Form(b"A", "byte")) == 0
    assert matching.find(Form(b"\xc3", "text")) == 2
    assert matching.find(Form(b"", "hole")) is None
    assert matching.find(Form(b"pad", "special")) is None
