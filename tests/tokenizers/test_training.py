"""Training uses all of the text and is deterministic; an impossible vocabulary size is an error with a possible one."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.tokenizer import CHAT_TOKENS, load_tokenizer
from anarchobot.tokenizers.training import limit_bytes, train_tokenizer
from tests.data.conftest import KINDS

every_kind = pytest.mark.parametrize("how", KINDS.values(), ids=list(KINDS))


@every_kind
def test_vocabulary_has_the_requested_size_and_chat_tokens(tmp_path: Path, corpus: list[str], how: Any) -> None:
    files = train_tokenizer(corpus, tmp_path / "new" / "my.v1", 500, *how)
    assert all(file.parent == tmp_path / "new" for file in files)
    tokenizer = load_tokenizer(files[0])
    assert tokenizer.vocab_size == 500
    if how[1] == "gpt2":
        assert [file.name for file in files] == ["my.v1-vocab.json", "my.v1-merges.txt"]
        vocab = json.loads(files[0].read_text(encoding="utf-8"))
        assert [vocab[name] for name in ("<|endoftext|>", *CHAT_TOKENS)] == [0, 1, 2]
    else:
        assert [file.name for file in files] == ["my.v1.model", "my.v1.vocab"]
        model: Any = sentencepiece.SentencePieceProcessor(model_file=str(files[0]))
        assert all(model.is_control(model.piece_to_id(name)) for name in CHAT_TOKENS)
        listed = [line.rpartition("\t")[0] for line in files[1].read_bytes().decode().split("\n")]
        assert listed[:-1] == [model.id_to_piece(i) for i in range(500)]


@every_kind
def test_training_is_deterministic_on_any_number_of_cores(
    tmp_path: Path, corpus: list[str], how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = set()
    for cores in (1, 3, 3):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        files = train_tokenizer(corpus, tmp_path / "my", 400, *how)
        made.add(b"".join(file.read_bytes() for file in files))
    assert len(made) == 1


def tokens_of_the_word(tmp_path: Path, texts: list[str], word: str, how: Any) -> int:
    tokenizer = load_tokenizer(train_tokenizer(texts, tmp_path / "my", 500, *how)[0])
    return len(tokenizer.encode_batch([word])[0])


@every_kind
def test_long_line_is_used_to_its_end(tmp_path: Path, corpus: list[str], how: Any) -> None:
    """SentencePiece skips lines over its limit; the word at the end would then be encoded as 16 bytes."""
    line = " ".join(corpus).replace("\n", " ")[:70_000] + " 𐌰𐌱𐌲𐌳" * 4000
    assert tokens_of_the_word(tmp_path, [line], " 𐌰𐌱𐌲𐌳", how) <= 2


@every_kind
def test_indentation_becomes_one_token(tmp_path: Path, corpus: list[str], how: Any) -> None:
    code = "".join(f"        {word}\n" for word in " ".join(corpus).split()[:3000])
    assert tokens_of_the_word(tmp_path, [code], "        x", how) <= 3


@every_kind
def test_line_with_sentencepieces_reserved_character_is_used(tmp_path: Path, corpus: list[str], how: Any) -> None:
    lines = [f"▅ δζθξ{word} ▅\n" for word in " ".join(corpus).split()[:3000]]
    assert tokens_of_the_word(tmp_path, ["".join(lines)], " δζθξ", how) <= 2


@every_kind
@pytest.mark.parametrize("texts", [[], [""], ["\n \n", "\t"]])
def test_no_text_is_an_error(tmp_path: Path, how: Any, texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"^no text to train a tokenizer on$"):
        train_tokenizer(texts, tmp_path / "my", 500, *how)
    assert not list(tmp_path.iterdir())


@every_kind
def test_too_little_text_is_an_error_with_the_largest_size(tmp_path: Path, corpus: list[str], how: Any) -> None:
    texts = corpus[:1]
    with pytest.raises(
        UserError, match=r"^can't train a tokenizer of 30000 tokens on this text: it supports at most"
    ) as e:
        train_tokenizer(texts, tmp_path / "my", 30_000, *how)
    most = int(re.findall(r"\d+", str(e.value))[1])
    assert load_tokenizer(train_tokenizer(texts, tmp_path / "my", most, *how)[0]).vocab_size == most
    with pytest.raises(UserError, match="it supports at most"):
        train_tokenizer(texts, tmp_path / "my", most + 1, *how)


@every_kind
def test_too_small_vocabulary_is_an_error_with_the_smallest_size(tmp_path: Path, corpus: list[str], how: Any) -> None:
    with pytest.raises(UserError, match=r"bytes, characters and control tokens alone need \d+: set a larger") as error:
        train_tokenizer(corpus, tmp_path / "my", 100, *how)
    least = int(re.findall(r"\d+", str(error.value))[1])
    assert load_tokenizer(train_tokenizer(corpus, tmp_path / "my", least, *how)[0]).vocab_size == least
    with pytest.raises(UserError, match=f"alone need {least}"):
        train_tokenizer(corpus, tmp_path / "my", least - 1, *how)


def test_gpt2_format_supports_only_bpe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.format: gpt2 supports only BPE"):
        train_tokenizer(["text"], tmp_path / "my", 300, "unigram", "gpt2")


@every_kind
@pytest.mark.parametrize("failure", [UserError("a.jsonl:1: no field 'text'"), KeyboardInterrupt()])
def test_exception_while_reading_propagates(tmp_path: Path, how: Any, failure: BaseException) -> None:
    """SentencePiece turns it into a RuntimeError, which would be reported as too little text."""

    def texts() -> Iterator[str]:
        yield "some text"
        raise failure

    with pytest.raises(type(failure)) as error:
        train_tokenizer(texts(), tmp_path / "my", 300, *how)
    assert error.value is failure
    assert not list(tmp_path.iterdir())


@every_kind
def test_exception_after_enough_text_propagates(tmp_path: Path, corpus: list[str], how: Any) -> None:
    """A tokenizer of a part of the text must not look like a finished one."""
    failure = UserError("a.jsonl:1: no field 'text'")

    def texts() -> Iterator[str]:
        yield from corpus
        raise failure

    with pytest.raises(UserError) as error:
        train_tokenizer(texts(), tmp_path / "my", 500, *how)
    assert error.value is failure
    assert not list(tmp_path.iterdir())


# max_train_mb


def test_limit_bytes_is_exact_and_reads_no_further() -> None:
    def texts() -> Iterator[str]:
        yield "x" * 600
        yield "é" * 600
        raise AssertionError("read beyond the limit")

    taken = [0]
    assert list(limit_bytes(texts(), 0.001, taken)) == ["x" * 600, "é" * 200]
    assert taken == [1000]
    assert "".join(limit_bytes(["aé"], 2e-6, [0])) == "a", "half of a character is dropped"


def test_limit_bytes_below_the_limit() -> None:
    taken = [0]
    assert list(limit_bytes(iter(["one", "zwölf"]), 200.0, taken)) == ["one", "zwölf"]
    assert taken == [9]
