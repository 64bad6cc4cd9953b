"""The fast engine gives the reference's ids; one that doesn't is caught at once and never believed again."""

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.fast_tokenizer import VerifiedTokenizer, adversarial_texts, select_engine
from anarchobot.tokenizers.tokenizer import Ids, Tokenizer, load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer

FAST = ("bpe", "gpt2")  # of conftest's kinds, those that have a fast engine


def fast(tokenizer: Tokenizer) -> VerifiedTokenizer:
    found = select_engine(tokenizer, "fast", "stop", lambda line: None)
    assert isinstance(found, VerifiedTokenizer)
    return found


def same(engine: Tokenizer, reference: Tokenizer, texts: list[str]) -> None:
    for text, ours, true in zip(texts, engine.encode_batch(texts), reference.encode_batch(texts), strict=True):
        assert ours.dtype == np.int32 and ours.ndim == 1
        assert np.array_equal(ours, true), repr(text[:60])


# Equal ids


@pytest.mark.parametrize("kind", FAST)
def test_ids_are_the_references(trained: dict[str, Path], corpus: list[str], kind: str) -> None:
    reference = load_tokenizer(trained[kind])
    engine = fast(reference)
    same(engine, reference, [*corpus, "".join(corpus), *adversarial_texts()])
    assert engine.encode_batch([]) == []
    assert (engine.vocab_size, engine.eod_id, engine.files) == (
        reference.vocab_size,
        reference.eod_id,
        reference.files,
    )
    assert engine.decode([*engine.encode_batch(["▁ é\n"])[0].tolist(), engine.eod_id]) == "▁ é\n"


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_with_its_usual_space_in_front(tmp_path: Path, corpus: list[str], prefix: bool) -> None:
    """Llama's and Mistral's form; and without byte fallback, so that "unknown" is an id that text has."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus for line in text.split("\n")]),
        model_prefix=str(tmp_path / "made"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=prefix,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    reference = load_tokenizer(tmp_path / "made.model")
    same(fast(reference), reference, [*corpus, "日本 日", " ", " a", "▁", "▁a ▁ b", *adversarial_texts()])


@pytest.mark.parametrize("limit", [300_000, pytest.param(None, marks=pytest.mark.faults)], ids=["beginnings", "whole"])
@pytest.mark.parametrize(
    "name", ["gpt2_vocab.json", "mistral_v1_tokenizer.model", "stories260K/hf/tokenizer.model", "trained here"]
)
def test_ids_are_the_references_on_all_shared_text(
    shared_data: Path, tmp_path: Path, name: str, limit: int | None
) -> None:
    texts = shared_texts(shared_data, limit)
    if name == "trained here":  # so large that words are whole tokens
        english = [file.read_text(encoding="utf-8") for file in sorted((shared_data / "text").glob("*.txt"))]
        path = train_tokenizer(english, tmp_path / "made", 16000)[0]
    else:
        path = shared_data / "artifacts" / name
    reference = load_tokenizer(path)
    same(fast(reference), reference, texts)


def shared_texts(shared_data: Path, limit: int | None) -> list[str]:
    """Every language, every kind of text and the naughty strings; of each file the first `limit` bytes."""
    files = sorted([*shared_data.glob("text/*.*"), *shared_data.glob("multilingual/*"), *shared_data.glob("*/*.jsonl")])
    texts = [file.read_bytes()[:limit].decode(errors="ignore") for file in files]
    texts += json.loads((shared_data / "messy" / "blns.json").read_text(encoding="utf-8"))
    bmp = (shared_data / "messy" / "utf8_bmp_all_one_line.txt").read_bytes().decode()
    assert len(texts) > 500 and sum(map(len, texts)) > 2_000_000
    return [*texts, bmp, "".join(bmp[i : i + 2] + " \n" for i in range(0, len(bmp), 2))]


@pytest.mark.parametrize("kind", FAST)
def test_a_control_token_in_a_text_stays_text(trained: dict[str, Path], kind: str) -> None:
    engine = fast(load_tokenizer(trained[kind]))
    for text in ("</s>", "<s>a</s>", "<unk>", "<|endoftext|>", "x<|im_end|>\n", "<0x0A>"):
        ids = engine.encode_batch([text])[0].tolist()
        assert len(ids) > 2 and engine.eod_id not in ids and engine.decode(ids) == text


def test_nor_where_its_characters_are_not_in_the_vocabulary(tmp_path: Path, corpus: list[str]) -> None:
    """The engine looks for pieces like "<s>" as they stand when "<" is none of its characters."""
    plain = [re.sub("[<>|/_]", "", text) for text in corpus]
    reference = load_tokenizer(train_tokenizer(plain, tmp_path / "plain", 600)[0])
    assert len(reference.encode_batch(["<"])[0]) == 1, "as a byte"
    texts = ["<s>", "a</s>", "<unk>", "<|im_start|>", "x<|im_end|>\n", "<0x0A>", " <0x41>"]
    same(fast(reference), reference, texts)


def test_the_mark_that_sentencepiece_has_for_a_space_stays_itself(trained: dict[str, Path]) -> None:
    engine = fast(load_tokenizer(trained["bpe"]))
    for text in ("▁", "▁ ▁", "a▁b c"):
        mark, space = engine.encode_batch([text, text.replace("▁", " ")])
        assert mark.tolist() != space.tolist() and engine.decode(mark.tolist()) == text


@pytest.mark.parametrize("kind", FAST)
def test_threads_and_batches_change_no_id(trained: dict[str, Path], corpus: list[str], kind: str) -> None:
    reference = load_tokenizer(trained[kind])
    engine, batches = fast(reference), [corpus[i::16] for i in range(16)] * 4
    with ThreadPoolExecutor(4) as pool:
        for batch, ids in zip(batches, pool.map(engine.encode_batch, batches), strict=True):
            assert [i.tolist() for i in ids] == [i.tolist() for i in reference.encode_batch(batch)]


# Wrong ids


class Broken:
    """The reference in the engine's form, with `wrong(document number, text, ids)` in between."""

    def __init__(self, reference: Tokenizer, wrong: Callable[[int, str, Ids], Ids]) -> None:
        self.reference, self.wrong, self.number = reference, wrong, 0

    def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
        ids = []
        for text, own in zip(texts, self.reference.encode_batch(texts), strict=True):
            self.number += 1
            ids.append(self.wrong(self.number, text, own))
        ends = np.array([0, *accumulate(map(len, ids))], np.uint64)
        return np.concatenate(ids).astype(np.uint32).tobytes(), ends.tobytes()


def one_wrong_at(number: int) -> Callable[[int, str, Ids], Ids]:
    def wrong(i: int, text: str, ids: Ids) -> Ids:
        return np.where(np.arange(len(ids)) == 1, ids + 1, ids) if i == number else ids

    return wrong


def one_left_out(i: int, text: str, ids: Ids) -> Ids:
    return ids[:-1] if "wrong" in text else ids


def documents(batches: int, long: str = "") -> list[list[str]]:
    """Of 100 documents each; with `long` text they are past the start's comparison soon."""
    return [[f"Document {100 * b + i}: right. {long}" for i in range(100)] for b in range(batches)]


@pytest.fixture
def reference(trained: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(trained["bpe"])


def test_a_wrong_id_near_the_start_stops_and_says_which(reference: Tokenizer) -> None:
    engine = VerifiedTokenizer(reference, Broken(reference, one_wrong_at(250)))
    first, second, third = documents(3)
    engine.encode_batch(first)
    engine.encode_batch(second)
    text = third[49]
    true = int(reference.encode_batch([text])[0][1])
    with pytest.raises(UserError) as stopped:
        engine.encode_batch(third)
    assert str(stopped.value) == (
        f"fastokens differs from sentencepiece on {text[:60]!r}: at token 1, {true + 1} instead of {true}: "
        "set tokenizer.engine: reference, or tokenizer.on_mismatch: fallback"
    )


@pytest.mark.parametrize("number", [1, 501])
def test_every_document_of_the_first_megabyte_is_compared(reference: Tokenizer, number: int) -> None:
    engine = VerifiedTokenizer(reference, Broken(reference, one_wrong_at(number)))
    with pytest.raises(UserError, match="differs"):
        for batch in documents(6, "x" * 2000):
            engine.encode_batch(batch)


def test_a_wrong_id_late_is_caught_by_the_sample_and_the_reference_takes_over(reference: Tokenizer) -> None:
    """From document 5,000 on every id is wrong; each document is past the start's megabyte by then."""
    late = Broken(reference, lambda i, text, ids: ids + 1 if i >= 5000 else ids)
    said: list[str] = []
    engine = VerifiedTokenizer(reference, late, on_mismatch="fallback", say=said.append)
    wrong = 0
    for batch in documents(70, "x" * 300):
        for ours, true in zip(engine.encode_batch(batch), reference.encode_batch(batch), strict=True):
            wrong += not np.array_equal(ours, true)
    assert wrong < 1000 and engine.given_up
    assert len(said) == 1 and said[0].startswith("WARNING: fastokens differs") and "going on with" in said[0]
    with pytest.raises(UserError, match="on_mismatch: fallback"):
        engine = VerifiedTokenizer(reference, Broken(reference, late.wrong))
        for batch in documents(70, "x" * 300):
            engine.encode_batch(batch)


def test_one_of_a_thousand_documents_is_compared_and_long_ones_more_often(
    reference: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VerifiedTokenizer(reference, Broken(reference, lambda i, text, ids: ids))
    engine.encode_batch(["x" * 2**20])
    compared: list[int] = []
    own = reference.encode_batch
    engine._encoder.reference = load_tokenizer(reference.files[0])
    monkeypatch.setattr(reference, "encode_batch", lambda texts: compared.extend(map(len, texts)) or own(texts))
    for batch in documents(40):
        engine.encode_batch(batch)
    assert len(compared) == 4
    del compared[:]
    engine.encode_batch(["x" * 2**20] * 33)  # 33 MB
    assert compared == [2**14] * 2


def test_the_batch_at_hand_is_never_wrong_after_a_fallback(reference: Tokenizer) -> None:
    said: list[str] = []
    engine = VerifiedTokenizer(reference, Broken(reference, one_left_out), on_mismatch="fallback", say=said.append)
    same(engine, reference, ["all is well"])
    assert not said
    same(engine, reference, ["well", "wrong", "well"])
    same(engine, reference, ["wrong"])
    assert len(said) == 1 and "no id instead of" in said[0]


def test_a_text_can_be_given_to_the_reference_alone(reference: Tokenizer) -> None:
    same(VerifiedTokenizer(reference, Broken(reference, one_left_out), avoid=("wrong",)), reference, ["a wrong one", "well", ""])


def test_a_difference_on_the_adversarial_texts_is_seen_before_any_document(
    reference: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anarchobot.tokenizers import fast_tokenizer as engine

    broken = Broken(reference, lambda i, text, ids: ids[:-1] if text == "<s>" else ids)
    monkeypatch.setattr(engine, "_fast_encoder", lambda tokenizer: (broken, ()))
    with pytest.raises(UserError, match="'<s>'"):
        select_engine(reference, "auto", "stop", print)
    said: list[str] = []
    same(select_engine(reference, "auto", "fallback", said.append), reference, ["<s>"])
    assert len(said) == 1


# No engine


def test_a_unigram_model_is_left_to_its_own_library(trained: dict[str, Path]) -> None:
    reference = load_tokenizer(trained["unigram"])
    said: list[str] = []
    assert select_engine(reference, "auto", "stop", said.append) is reference
    assert said == ["tokenising with sentencepiece (fastokens can't take this tokenizer: it is not a BPE model)"]
    with pytest.raises(UserError, match=r"unigram\.model: .*it is not a BPE model: set it to auto"):
        select_engine(reference, "fast", "stop", said.append)


def test_a_tokenizer_json_without_all_bytes_is_left_to_its_own_library(tmp_path: Path) -> None:
    """`tokenizers` drops such bytes, fastokens raises in the middle of a corpus."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<eos>": 1}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    reference = load_tokenizer(tmp_path)
    said: list[str] = []
    assert select_engine(reference, "auto", "stop", said.append) is reference
    assert "has no token" in said[0]


def test_a_missing_package(reference: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    said: list[str] = []
    assert select_engine(reference, "auto", "stop", said.append) is reference
    assert len(said) == 1 and "pip install fastokens==" in said[0]
    with pytest.raises(UserError, match=r"pip install fastokens==[\d.]+, or"):
        select_engine(reference, "fast", "stop", said.append)


def test_the_reference_when_asked_for(reference: Tokenizer) -> None:
    said: list[Any] = []
    assert select_engine(reference, "reference", "stop", said.append) is reference
    assert said == ["tokenising with sentencepiece"]


def test_it_is_said_what_tokenises(reference: Tokenizer) -> None:
    said: list[str] = []
    select_engine(reference, "auto", "stop", said.append)
    assert len(said) == 1 and re.fullmatch(r"tokenising with fastokens [\d.]+, checked against sentencepiece", said[0])
