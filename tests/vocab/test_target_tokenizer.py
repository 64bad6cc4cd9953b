"""A tokenizer extended with terms: each is one token, everything else is unchanged."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from anarchobot.data.sources import builtin
from anarchobot.tokenizers.canonical_tokens import canonical_tokens
from anarchobot.tokenizers.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer
from anarchobot.vocab.target_tokenizer import extend, is_one_token

TERMS = ["carcinoma", "kinase", "endoplasmic", "carcinomatous"]
KINDS = [("bpe", "sentencepiece"), ("unigram", "sentencepiece"), ("bpe", "gpt2")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    algorithm: Literal["bpe", "unigram"]
    form: Literal["sentencepiece", "gpt2"]
    algorithm, form = request.param
    folder = tmp_path_factory.mktemp("source")
    return load_tokenizer(train_tokenizer(list(builtin.topics())[:8], folder / "a", 600, algorithm, form)[0])


def test_terms_become_single_tokens_and_little_else_changes(source: Tokenizer, tmp_path: Path) -> None:
    assert not any(is_one_token(source, term) for term in TERMS)
    target = extend(source, TERMS, tmp_path)
    assert all(is_one_token(target, term) for term in TERMS)
    assert canonical_tokens(target)[: source.vocab_size] == canonical_tokens(source)
    assert target.eod_id == source.eod_id
    plain = list(builtin.topics())[9]
    before, after = (tokenizer.encode_batch([plain])[0] for tokenizer in (source, target))
    assert 0 <= len(before) - len(after) < 5  # contains no terms, and few words that start like one
    assert np.count_nonzero(after >= source.vocab_size) < 5
    assert target.decode(after.tolist()) == plain
    text = f"A {TERMS[0]} of the {TERMS[1]}s.\n" + plain
    assert target.decode(target.encode_batch([text])[0].tolist()) == text
    assert len(target.encode_batch([text])[0]) < len(source.encode_batch([text])[0])


def test_without_terms_the_tokenizer_is_unchanged(source: Tokenizer, tmp_path: Path) -> None:
    target = extend(source, [], tmp_path)
    assert target.vocab_size == source.vocab_size
    assert canonical_tokens(target) == canonical_tokens(source)


def test_pieces_of_a_sentencepiece_model_are_merged_after_all_others(source: Tokenizer, tmp_path: Path) -> None:
    """In BPE, the score is the order of merges. A term with a letter outside the vocabulary can't be a piece."""
    if not isinstance(source, SentencePieceTokenizer):
        pytest.skip("not SentencePiece")
    target = extend(source, [TERMS[0], "carcinom\N{CYRILLIC SMALL LETTER ZHE}", TERMS[1]], tmp_path)
    assert isinstance(target, SentencePieceTokenizer)
    model, size = target.processor, source.vocab_size
    added = [model.id_to_piece(i) for i in range(size, target.vocab_size)]
    assert all(piece.removeprefix("▁").isascii() and "<" not in piece for piece in added)
    assert {f"▁{term}" for term in TERMS[:2]} <= set(added)
    if len(added) > 2:  # only BPE has intermediate pieces
        scores = [model.get_score(i) for i in range(target.vocab_size)]
        assert max(scores[size:]) < min(scores[:size]) and scores[size:] == sorted(scores[size:], reverse=True)
