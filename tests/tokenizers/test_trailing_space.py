"""Prompts that end in a space, with tokenizers of both libraries."""

import re

import pytest

from anarchobot.data.sources import builtin
from anarchobot.tokenizers.tokenizer import ChatTokenizer, load_tokenizer
from anarchobot.tokenizers.trailing_space import split_trailing_space, starts_with_space
from anarchobot.tokenizers.training import train_tokenizer


@pytest.fixture(scope="module", params=["sentencepiece", "gpt2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    prefix = tmp_path_factory.mktemp("t") / "tokenizer"
    return load_tokenizer(train_tokenizer(list(builtin.topics())[:6], prefix, 500, file_format=request.param)[0])


def test_marked_tokens_are_those_that_decode_to_a_space_and_more(tokenizer: ChatTokenizer) -> None:
    """A letter in front keeps the decoder from stripping the space."""
    (letter,) = tokenizer.encode_batch(["x"])[0].tolist()
    texts = [tokenizer.decode([letter, i]) for i in range(tokenizer.vocab_size)]
    decoded = [text.startswith("x ") and text != "x \u2047 " for text in texts]  # SentencePiece's unknown token
    assert starts_with_space(tokenizer).tolist() == decoded
    assert sum(decoded) > 50


@pytest.mark.parametrize("text", ["The list", "of two", "x = 1", "a\n b"])
def test_the_word_after_the_space_is_encoded_as_in_the_whole_text(tokenizer: ChatTokenizer, text: str) -> None:
    """The prompt's ids and an allowed token continue as the ids of the whole text, unlike those of the prompt with its
    space."""
    at = re.search(r" (?=\S)", text[2:])
    prompt, after_space = split_trailing_space(text[: 2 + at.end()] if at else text, tokenizer)
    whole, ids = (tokenizer.encode_batch([t])[0].tolist() for t in (text, prompt))
    assert after_space and whole[: len(ids)] == ids
    assert starts_with_space(tokenizer)[whole[len(ids)]]


def test_other_prompts_stay_as_they_are(tokenizer: ChatTokenizer) -> None:
    for prompt in ("", "The", "The\n", "The\t", "The\u00a0"):
        assert split_trailing_space(prompt, tokenizer) == (prompt, False)
