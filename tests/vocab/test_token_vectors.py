"""Token vectors trained by gensim."""

from pathlib import Path

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.vocab.token_vectors import MAX_SENTENCE_TOKENS, VectorSettings, token_sentences, train_vectors
from tests.data.bytes_tokenizer import Bytes

pytest.importorskip("gensim")

# Ids 0-4 occur with 10-14, and ids 5-9 with 20-24.
RNG = np.random.default_rng(0)
TEXT = [
    np.array([x for _ in range(10) for x in (RNG.integers(5) + 5 * half, RNG.integers(5) + 10 * (half + 1))])
    for half in RNG.integers(2, size=800)
]


@pytest.mark.parametrize("backend", ["fasttext", "word2vec"])
def test_tokens_with_the_same_contexts_are_similar(backend: str, tmp_path: Path) -> None:
    settings = VectorSettings(backend=backend, dim=16, epochs=5, threads=1)  # type: ignore[arg-type]
    vectors, counts = train_vectors(TEXT, 30, settings, 0, tmp_path)
    assert vectors.shape == (30, 16)
    unit = vectors[:10] / np.linalg.norm(vectors[:10], axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert cosines[:5, :5].min() > cosines[:5, 5:].max()
    assert counts.sum() == sum(map(len, TEXT))
    assert not vectors[25:].any()  # unused ids
    again, _ = train_vectors(TEXT, 30, settings, 0, tmp_path)
    assert np.array_equal(vectors, again)
    assert not np.array_equal(vectors, train_vectors(TEXT, 30, settings, 1, tmp_path)[0])


def test_rare_ids_get_no_vector(tmp_path: Path) -> None:
    settings = VectorSettings(dim=8, epochs=1, threads=1, mincount=2)
    vectors, counts = train_vectors([*TEXT, np.array([29])], 30, settings, 0, tmp_path)
    assert counts[29] == 1
    assert not vectors[29].any()
    with pytest.raises(UserError, match="no token occurs 1000000 times"):
        train_vectors(TEXT, 30, VectorSettings(mincount=10**6), 0, tmp_path)


def test_sentences(tmp_path: Path) -> None:
    tokenizer = Bytes(tmp_path)
    found = list(token_sentences(["abc\nlong enough\n", "x" * 2500], tokenizer, 5))
    assert tokenizer.decode(found[0].tolist()) == "long enough"
    assert [len(sentence) for sentence in found[1:]] == [MAX_SENTENCE_TOKENS, MAX_SENTENCE_TOKENS, 500]
