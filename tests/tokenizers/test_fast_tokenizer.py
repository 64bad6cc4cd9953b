"""The fast engine gives the reference's ids; a mismatch is detected and stops the run or falls back for good."""

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
from anarchobot.tokenizers.fast_tokenizer import START_CHARS, VerifiedTokenizer, adversarial_texts, select_engine
from anarchobot.tokenizers.tokenizer import Ids, Tokenizer, load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer

FAST = ("bpe", "gpt2")  # the kinds in conftest with a fast engine


def fast(tokenizer: Tokenizer) -> VerifiedTokenizer:
    found = select_engine(tokenizer, "fast", "stop", lambda line: None)
    assert isinstance(found, VerifiedTokenizer)
    return found


def check_equal(engine: Tokenizer, reference: Tokenizer, texts: list[str]) -> None:
    for text, ours, true in zip(texts, engine.encode_batch(texts), reference.encode_batch(texts), strict=True):
        assert ours.dtype == np.int32 and ours.ndim == 1
        assert np.array_equal(ours, true), repr(text[:60])


# Equal ids


@pytest.mark.parametrize("kind", FAST)
def test_ids_equal_the_reference(trained: dict[str, Path], corpus: list[str], kind: str) -> None:
    reference = load_tokenizer(trained[kind])
    engine = fast(reference)
    check_equal(engine, reference, [*corpus, "".join(corpus), *adversarial_texts()])
    assert engine.encode_batch([]) == []
    assert (engine.vocab_size, engine.eod_id, engine.files) == (
        reference.vocab_size,
        reference.eod_id,
        reference.files,
    )
    assert engine.decode([*engine.encode_batch(["▁ é\n"])[0].tolist(), engine.eod_id]) == "▁ é\n"


def sentencepiece_bpe(folder: Path, corpus: list[str], vocab_size: int = 600, **options: bool) -> Tokenizer:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in corpus for line in text.split("\n")]),
        model_prefix=str(folder / "made"),
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return load_tokenizer(folder / "made.model")


def test_sentencepiece_with_dummy_prefix(tmp_path: Path, corpus: list[str]) -> None:
    """As in Llama and Mistral."""
    reference = sentencepiece_bpe(tmp_path, corpus, byte_fallback=True, add_dummy_prefix=True)
    check_equal(fast(reference), reference, [*corpus, "日本 日", " ", " a", "▁", "▁a ▁ b", *adversarial_texts()])


def test_characters_that_begin_like_one_in_the_vocabulary(tmp_path: Path) -> None:
    """日 is in the vocabulary; 旦 shares two of its bytes, 本 one, and 🙂 three of 🙃's."""
    reference = sentencepiece_bpe(tmp_path, ["日 🙃 the end " * 9] * 9, 280, byte_fallback=True)
    engine = fast(reference)
    texts = ["旦", "日", "本日旦", "🙂🙃", "x 🙂\n旦", "🙂", ""]
    ids = reference.encode_batch(["日旦本🙂🙃"])[0]
    assert len(ids) == 1 + 3 + 3 + 4 + 1
    check_equal(engine, reference, texts)


@pytest.mark.parametrize("limit", [150_000, pytest.param(None, marks=pytest.mark.faults)], ids=["beginnings", "whole"])
@pytest.mark.parametrize(
    "name", ["gpt2_vocab.json", "mistral_v1_tokenizer.model", "stories260K/hf/tokenizer.model", "trained here"]
)
def test_ids_equal_the_reference_on_all_shared_text(
    shared_data: Path, tmp_path: Path, name: str, limit: int | None
) -> None:
    texts = shared_texts(shared_data, limit)
    if name == "trained here":  # large enough that words are single tokens
        english = [file.read_text(encoding="utf-8") for file in sorted((shared_data / "text").glob("*.txt"))]
        path = train_tokenizer(english, tmp_path / "made", 16000)[0]
    else:
        path = shared_data / "artifacts" / name
    reference = load_tokenizer(path)
    check_equal(fast(reference), reference, texts)


def shared_texts(shared_data: Path, limit: int | None) -> list[str]:
    """The first `limit` bytes of every file in every language, and the naughty strings."""
    files = sorted([*shared_data.glob("text/*.*"), *shared_data.glob("multilingual/*"), *shared_data.glob("*/*.jsonl")])
    texts = [file.read_bytes()[:limit].decode(errors="ignore") for file in files]
    texts += json.loads((shared_data / "messy" / "blns.json").read_text(encoding="utf-8"))
    bmp = (shared_data / "messy" / "utf8_bmp_all_one_line.txt").read_bytes().decode()
    assert len(texts) > 500 and sum(map(len, texts)) > 2_000_000
    return [*texts, bmp, "".join(bmp[i : i + 2] + " \n" for i in range(0, len(bmp), 2))]


@pytest.mark.parametrize("kind", FAST)
def test_control_token_in_text_stays_text(trained: dict[str, Path], kind: str) -> None:
    engine = fast(load_tokenizer(trained[kind]))
    for text in ("</s>", "<s>a</s>", "<unk>", "<|endoftext|>", "x<|im_end|>\n", "<0x0A>"):
        ids = engine.encode_batch([text])[0].tolist()
        assert len(ids) > 2 and engine.eod_id not in ids and engine.decode(ids) == text


def test_control_token_outside_the_alphabet_stays_text(tmp_path: Path, corpus: list[str]) -> None:
    """The engine matches pieces like "<s>" as a whole when "<" is not in its vocabulary."""
    plain = [re.sub("[<>|/_]", "", text) for text in corpus]
    reference = load_tokenizer(train_tokenizer(plain, tmp_path / "plain", 600)[0])
    assert len(reference.encode_batch(["<"])[0]) == 1, "as a byte"
    texts = ["<s>", "a</s>", "<unk>", "<|im_start|>", "x<|im_end|>\n", "<0x0A>", " <0x41>"]
    check_equal(fast(reference), reference, texts)


def test_sentencepiece_space_mark_is_preserved(trained: dict[str, Path]) -> None:
    engine = fast(load_tokenizer(trained["bpe"]))
    for text in ("▁", "▁ ▁", "a▁b c"):
        mark, space = engine.encode_batch([text, text.replace("▁", " ")])
        assert mark.tolist() != space.tolist() and engine.decode(mark.tolist()) == text


@pytest.mark.parametrize("kind", FAST)
def test_ids_do_not_depend_on_threads_or_batches(trained: dict[str, Path], corpus: list[str], kind: str) -> None:
    reference = load_tokenizer(trained[kind])
    engine, batches = fast(reference), [corpus[i::16] for i in range(16)] * 4
    with ThreadPoolExecutor(4) as pool:
        for batch, ids in zip(batches, pool.map(engine.encode_batch, batches), strict=True):
            assert [i.tolist() for i in ids] == [i.tolist() for i in reference.encode_batch(batch)]


# Mismatches


class Broken:
    """The reference behind the engine's interface, with ids modified by `wrong(document number, text, ids)`."""

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


def drop_last(i: int, text: str, ids: Ids) -> Ids:
    return ids[:-1] if "wrong" in text else ids


def documents(batches: int, long: str = "") -> list[list[str]]:
    """Batches of 100 documents; with `long` text, the comparison at the start ends early."""
    return [[f"Document {100 * b + i}: right. {long}" for i in range(100)] for b in range(batches)]


@pytest.fixture
def reference(trained: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(trained["bpe"])


def test_mismatch_near_the_start_is_reported(reference: Tokenizer) -> None:
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


def test_the_start_ends_after_its_last_character(reference: Tokenizer) -> None:
    engine = VerifiedTokenizer(reference, Broken(reference, lambda i, text, ids: ids))
    engine._start_left = 1
    assert list(engine._choose_sample(["the last one", "not compared"])) == [(0, 1)]


def test_late_mismatch_is_sampled_and_falls_back(reference: Tokenizer) -> None:
    """Every id is wrong from document 5,000 on, beyond the first megabyte."""
    late = Broken(reference, lambda i, text, ids: ids + 1 if i >= 5000 else ids)
    messages: list[str] = []
    engine = VerifiedTokenizer(reference, late, on_mismatch="fallback", log=messages.append)
    wrong = 0
    for batch in documents(70, "x" * 300):
        for ours, true in zip(engine.encode_batch(batch), reference.encode_batch(batch), strict=True):
            wrong += not np.array_equal(ours, true)
    assert wrong < 1000 and engine.fell_back
    assert len(messages) == 1 and messages[0].startswith("WARNING: fastokens differs") and "from here on" in messages[0]
    with pytest.raises(UserError, match="on_mismatch: fallback"):
        engine = VerifiedTokenizer(reference, Broken(reference, late.wrong))
        for batch in documents(70, "x" * 300):
            engine.encode_batch(batch)


def test_sampling_rate(reference: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_current_batch_is_correct_after_a_fallback(reference: Tokenizer) -> None:
    messages: list[str] = []
    engine = VerifiedTokenizer(reference, Broken(reference, drop_last), on_mismatch="fallback", log=messages.append)
    check_equal(engine, reference, ["all is well"])
    assert not messages
    check_equal(engine, reference, ["well", "wrong", "well"])
    check_equal(engine, reference, ["wrong"])
    assert len(messages) == 1 and "no id instead of" in messages[0]


def test_avoided_strings_are_encoded_by_the_reference(reference: Tokenizer) -> None:
    check_equal(
        VerifiedTokenizer(reference, Broken(reference, drop_last), avoid=("wrong",)),
        reference,
        ["a wrong one", "well", ""],
    )


def test_mismatch_on_adversarial_texts_is_detected_at_once(
    reference: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anarchobot.tokenizers import fast_tokenizer as engine

    broken = Broken(reference, lambda i, text, ids: ids[:-1] if text == "<s>" else ids)
    monkeypatch.setattr(engine, "_fast_encoder", lambda tokenizer: (broken, ()))
    with pytest.raises(UserError, match="'<s>'"):
        select_engine(reference, "auto", "stop", print)
    messages: list[str] = []
    check_equal(select_engine(reference, "auto", "fallback", messages.append), reference, ["<s>"])
    assert len(messages) == 1


# The faster engine


@pytest.mark.parametrize(
    "engine, size, is_fast",
    [("auto", 2_999_999, False), ("auto", 3_000_000, True), ("auto", None, True), ("fast", 1, True)],
)
def test_small_texts_are_left_to_the_reference(
    reference: Tokenizer, engine: Any, size: int | None, is_fast: bool
) -> None:
    chosen = select_engine(reference, engine, "stop", lambda line: None, size)
    assert isinstance(chosen, VerifiedTokenizer) is is_fast and (chosen is reference) is not is_fast


class Clocks:
    """CPU time that passes only in `encode_batch` of the fast engine and of the reference: seconds per batch."""

    def __init__(self, reference: Tokenizer, monkeypatch: pytest.MonkeyPatch, fast: float, slow: float) -> None:
        from anarchobot.tokenizers import fast_tokenizer as module

        self.seconds, self.now, self.calls = {"fast": fast, "reference": slow}, 0.0, {"fast": 0, "reference": 0}
        no_ids = [np.empty(0, np.int32)]
        monkeypatch.setattr(module, "thread_time", lambda: self.now)
        monkeypatch.setattr(module, "process_time", lambda: self.now)
        monkeypatch.setattr(reference, "encode_batch", lambda texts: self.work("reference", no_ids))

    def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
        return self.work("fast", (b"", bytes(16)))

    def work(self, name: str, result: Any) -> Any:
        self.now += self.seconds[name]
        self.calls[name] += 1
        return result

    def run(self, engine: Tokenizer, batches: int) -> dict[str, int]:
        """How many of the batches each of them encoded."""
        self.calls = dict.fromkeys(self.calls, 0)
        for _ in range(batches):
            engine.encode_batch(["x" * START_CHARS])
        return self.calls


def test_the_reference_is_used_where_it_is_faster(reference: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(reference, monkeypatch, fast=3, slow=2)
    engine = VerifiedTokenizer(reference, clocks, choose=True)
    assert clocks.run(engine, 1) == {"fast": 1, "reference": 1}, "the start is compared"
    assert clocks.run(engine, 160) == {"fast": 10, "reference": 150}, "without those in samples: a 16th is tried"
    clocks.seconds["fast"] = 1  # other text follows
    clocks.run(engine, 16)
    assert clocks.run(engine, 100)["fast"] >= 100, "samples are encoded as well"


@pytest.mark.parametrize("choose, slow", [(False, 2), (True, 4)])
def test_the_fast_engine_is_used_otherwise(
    reference: Tokenizer, monkeypatch: pytest.MonkeyPatch, choose: bool, slow: float
) -> None:
    clocks = Clocks(reference, monkeypatch, fast=3, slow=slow)
    assert clocks.run(VerifiedTokenizer(reference, clocks, choose=choose), 100)["fast"] >= 100


# Without a fast engine


@pytest.mark.parametrize(
    "option, reason",
    [("byte_fallback", "no byte fallback"), ("split_by_whitespace", "spaces after their first character")],
)
def test_unsupported_sentencepiece_bpe_uses_the_reference(
    tmp_path: Path, corpus: list[str], option: str, reason: str
) -> None:
    """Without byte fallback, text can have the "unknown" id; with pieces across spaces, it can't be split at them."""
    reference = sentencepiece_bpe(tmp_path, corpus, **{"byte_fallback": True, option: False})
    messages: list[str] = []
    assert select_engine(reference, "auto", "stop", messages.append) is reference
    assert reason in messages[0]


def test_unigram_model_uses_the_reference(trained: dict[str, Path]) -> None:
    reference = load_tokenizer(trained["unigram"])
    messages: list[str] = []
    assert select_engine(reference, "auto", "stop", messages.append) is reference
    assert messages == [
        "tokenizing with sentencepiece (fastokens does not support this tokenizer: it is not a BPE model)"
    ]
    with pytest.raises(UserError, match=r"unigram\.model: .*it is not a BPE model: set it to auto"):
        select_engine(reference, "fast", "stop", messages.append)


def test_tokenizer_json_without_all_bytes_uses_the_reference(tmp_path: Path) -> None:
    """`tokenizers` drops such bytes, fastokens raises in the middle of a corpus."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<eos>": 1}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    reference = load_tokenizer(tmp_path)
    messages: list[str] = []
    assert select_engine(reference, "auto", "stop", messages.append) is reference
    assert "has no token" in messages[0]


def test_missing_package(reference: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    messages: list[str] = []
    assert select_engine(reference, "auto", "stop", messages.append) is reference
    assert len(messages) == 1 and "pip install fastokens==" in messages[0]
    with pytest.raises(UserError, match=r"pip install fastokens==[\d.]+, or"):
        select_engine(reference, "fast", "stop", messages.append)


def test_reference_engine(reference: Tokenizer) -> None:
    messages: list[Any] = []
    assert select_engine(reference, "reference", "stop", messages.append) is reference
    assert messages == ["tokenizing with sentencepiece"]


def test_engine_is_logged(reference: Tokenizer) -> None:
    messages: list[str] = []
    select_engine(reference, "auto", "stop", messages.append)
    assert len(messages) == 1 and re.fullmatch(
        r"tokenizing with fastokens [\d.]+, verified against sentencepiece", messages[0]
    )
