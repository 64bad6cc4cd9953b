"""Ids match other implementations, decoding is lossless, and no text becomes a control token."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.tokenizer import (
    CHAT_TOKENS,
    END_OF_DOCUMENT,
    Tokenizer,
    copy_tokenizer,
    digest,
    load_tokenizer,
)
from tests.storage.disk_calls import DiskCalls

NAUGHTY = [
    "",
    " ",
    "  two  spaces ",
    "\n\n \t\r\n",
    "▁",
    "▁ a▁▁b ▁",
    "\0",
    "a\0b",
    "\ufeffmark",
    "\u2585\u2047 ⁇",
    "e\u0301 \u00e9",
    "\U0010ffff\ue000\ufffd\uffff",
    "".join(map(chr, range(256))),
    *END_OF_DOCUMENT,
    *CHAT_TOKENS,
    "<s></s><unk><pad> </s> <0x41><0x0A> <|endoftext|><|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>",
]
# All of Unicode, with many characters that tokenizers treat specially.
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("▁ \n\t<>/s|im_")), max_size=60)


def control_ids(tokenizer: Tokenizer) -> set[int]:
    """As reported by the libraries, not by the code under test."""
    path = tokenizer.files[0]
    if path.suffix == ".model":
        model: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return {i for i in range(model.vocab_size()) if model.is_control(i) or model.is_unknown(i)}
    ids = json.loads(path.read_text(encoding="utf-8"))
    return {ids[name] for name in ("<|endoftext|>", *CHAT_TOKENS)}


def check_round_trip(tokenizer: Tokenizer, texts: list[str]) -> None:
    controls = control_ids(tokenizer)
    assert len(controls) >= 3 and tokenizer.eod_id in controls
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids.tolist()) == text
        assert not controls & set(ids.tolist()), f"a control token from {text!r}"
        assert ids.dtype == np.int32 and ids.ndim == 1 and ids.max(initial=0) < tokenizer.vocab_size


# Round trip


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, [text])


def test_round_trip_of_naughty_text(tokenizer: Tokenizer) -> None:
    check_round_trip(tokenizer, NAUGHTY)


def test_round_trip_of_shared_naughty_text(tokenizer: Tokenizer, shared_data: Path) -> None:
    messy = shared_data / "messy"
    check_round_trip(tokenizer, json.loads((messy / "blns.json").read_text(encoding="utf-8")))
    check_round_trip(tokenizer, [(messy / "utf8_bmp_all_one_line.txt").read_bytes().decode()])
    check_round_trip(
        tokenizer, (shared_data / "multilingual" / "jpn_wagahai.txt").read_text(encoding="utf-8").split("\n")[:99]
    )


def test_ids_do_not_depend_on_batch_or_thread(tokenizer: Tokenizer, corpus: list[str]) -> None:
    alone = [tokenizer.encode_batch([text])[0].tolist() for text in corpus]
    assert [ids.tolist() for ids in tokenizer.encode_batch(corpus)] == alone
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda text: tokenizer.encode_batch([text])[0].tolist(), corpus))
    assert again == alone
    assert tokenizer.encode_batch([]) == []


def test_decode_omits_control_tokens_and_marks_invalid_utf8(tokenizer: Tokenizer) -> None:
    one, two, far = (ids.tolist() for ids in tokenizer.encode_batch(["one", " two", "\U0010ffff"]))
    controls = sorted(control_ids(tokenizer) - {0} | {tokenizer.eod_id})  # 0 is SentencePiece's "unknown"
    assert tokenizer.decode([*controls, *one, *controls, *two, *controls]) == "one two"
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.eod_id]) == ""
    assert len(far) == 4
    assert set(tokenizer.decode([*far[:3], *one]).removesuffix("one")) == {"\ufffd"}


# Published tokenizers


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("t5_spiece.model", 32000),
        ("mistral_v1_tokenizer.model", 32000),
        ("spm_test_model.model", 1000),
        ("torchtune_m.model", 2000),
        ("stories260K/hf/tokenizer.model", 512),
        ("gpt2", 50257),
        ("tiny_bpe_tokenizer.json", 2003),
    ],
)
def test_ids_match_reference_vectors(shared_data: Path, name: str, size: int) -> None:
    folder = shared_data / "artifacts"
    tokenizer = load_tokenizer(folder / ("gpt2_vocab.json" if name == "gpt2" else name))
    assert tokenizer.vocab_size == size
    rows = json.loads((folder / "token_id_vectors.json").read_text(encoding="utf-8"))["vectors"][name]
    assert len(rows) > 100
    for row, ids in zip(rows, tokenizer.encode_batch([row["text"] for row in rows]), strict=True):
        if tokenizer.eod_id in row["ids"]:  # the vectors treat control tokens in text as such; we never do
            assert row["text"] in END_OF_DOCUMENT and tokenizer.eod_id not in ids
            assert tokenizer.decode(ids.tolist()) == row["text"]
        else:
            assert ids.tolist() == row["ids"], repr(row["text"])


class ReferenceGPT2:
    """GPT-2's byte-level BPE as in its paper and original code, merge by merge."""

    SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, vocab: Path, merges: Path) -> None:
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in plain]
        self.shown = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
        self.ids: dict[str, int] = json.loads(vocab.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        self.rank = {pair: i for i, pair in enumerate(pairs)}

    def encode(self, text: str) -> list[int]:
        return [i for word in self.SPLIT.findall(text) for i in self.merge([self.shown[b] for b in word.encode()])]

    def merge(self, parts: list[str]) -> list[int]:
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, 1 << 60))
            if best not in self.rank:
                break
            joined, i = [], 0
            while i < len(parts):
                whole = tuple(parts[i : i + 2]) == best
                joined.append("".join(best) if whole else parts[i])
                i += 2 if whole else 1
            parts = joined
        return [self.ids[part] for part in parts]


def test_trained_gpt2_matches_the_reference(trained: dict[str, Path], corpus: list[str]) -> None:
    tokenizer = load_tokenizer(trained["gpt2"])
    reference = ReferenceGPT2(*tokenizer.files)
    texts = [text for text in NAUGHTY + corpus[::8] if not set(text) & {"\0"}]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [reference.encode(text) for text in texts]


def test_original_gpt2_matches_the_reference(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "artifacts" / "gpt2_vocab.json")
    reference = ReferenceGPT2(*tokenizer.files)
    texts = json.loads((shared_data / "messy" / "blns.json").read_text(encoding="utf-8"))
    for name in ("text/tinyshakespeare.txt", "multilingual/ukr_novels.txt", "text/rust_book.jsonl"):
        texts.append((shared_data / name).read_bytes()[:60_000].decode(errors="ignore"))
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [reference.encode(text) for text in texts]


def write_json(path: Path, model: Any, *added: tokenizers.AddedToken, special: tuple[str, ...] = ()) -> Path:
    made = tokenizers.Tokenizer(model)
    made.add_tokens(list(added))
    made.add_special_tokens(list(special))
    made.save(str(path))
    return path


def test_unigram_tokenizer_json_does_not_produce_control_tokens(tmp_path: Path) -> None:
    """The library's unigram model finds "</s>" in its vocabulary even with special tokens disabled."""
    letters = [("a", -1.0), *((c, -3.0) for c in "</s>")]
    model = tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], 0)
    path = write_json(tmp_path / "tokenizer.json", model, special=("<unk>", "</s>"))
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode_batch(["a</s></s>a", "?a"])
    assert tokenizer.eod_id == 1 and [i.tolist() for i in ids] == [[2, 3, 4, 5, 6, 3, 4, 5, 6, 2], [0, 2]]


def test_end_token_not_marked_special_is_a_control_token(tmp_path: Path) -> None:
    vocab = {c: i for i, c in enumerate([*"a<|endoftx>", "<|"])}
    added = tokenizers.AddedToken("<|endoftext|>", special=False)
    tokenizer = load_tokenizer(
        write_json(tmp_path / "tokenizer.json", tokenizers.models.BPE(vocab, [("<", "|")]), added)
    )
    shown = [vocab[piece] for piece in ("a", "<|", *"endoftext", "|", ">")]
    assert tokenizer.encode_batch(["a<|endoftext|>"])[0].tolist() == shown
    assert tokenizer.eod_id == len(vocab)
    assert tokenizer.decode([0, tokenizer.eod_id]) == "a"


def test_vocab_size_covers_the_largest_id(tmp_path: Path) -> None:
    """With gaps between ids, the number of tokens would be too small."""
    model = tokenizers.models.WordLevel({"a": 0, "<eos>": 9}, unk_token="a")
    tokenizer = load_tokenizer(write_json(tmp_path / "tokenizer.json", model))
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (10, 9)


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<eos>": 1}, []))
    made.enable_truncation(2)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_batch(["aaaa", "a"])[0].tolist() == [0, 0, 0, 0]


# Files


def test_digest_covers_all_files(trained: dict[str, Path]) -> None:
    model, pair = load_tokenizer(trained["bpe"]), load_tokenizer(trained["gpt2"])
    assert digest(model) == hashlib.sha256(trained["bpe"].read_bytes()).hexdigest()
    merges = trained["gpt2"].with_name("gpt2-merges.txt")
    assert pair.files == (trained["gpt2"], merges)
    assert digest(pair) == hashlib.sha256(trained["gpt2"].read_bytes() + merges.read_bytes()).hexdigest()


def test_copy_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    name = copy_tokenizer(tokenizer, tmp_path)
    copy = load_tokenizer(tmp_path)
    assert copy.files[0] == tmp_path / name and digest(copy) == digest(tokenizer)
    assert copy_tokenizer(copy, tmp_path) == name, "onto itself"
    assert digest(load_tokenizer(tmp_path)) == digest(tokenizer)


def test_copy_is_durable_and_written_once(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume with a full disk must not damage the copy that a run already has."""
    calls = DiskCalls(monkeypatch, tmp_path)
    copy_tokenizer(tokenizer, tmp_path)
    names = [path.name for path in load_tokenizer(tmp_path).files]
    steps = [[f"fsync {name}", f"rename {name}.tmp {name}", "fsync ."] for name in names]
    assert calls.in_order() == [call for step in steps for call in step]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    copy_tokenizer(tokenizer, tmp_path)
    (tmp_path / names[0]).write_bytes(b"another tokenizer")
    with pytest.raises(OSError, match="No space left"):
        copy_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / names[0]).read_bytes() == b"another tokenizer"


def test_only_tokenizer_in_a_folder_is_found(trained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "my.model").write_bytes(trained["bpe"].read_bytes())
    assert load_tokenizer(tmp_path).files == (tmp_path / "my.model",)
    (tmp_path / "your.model").write_bytes(trained["unigram"].read_bytes())
    with pytest.raises(UserError, match=r"several tokenizers here: specify one of my\.model, your\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(trained["unigram"].read_bytes())
    assert load_tokenizer(tmp_path).files == (tmp_path / "tokenizer.model",)


def test_gpt2_files_with_a_prefix_are_found_in_a_folder(trained: dict[str, Path], tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / f"my-{name}").write_bytes(trained["gpt2"].with_name(f"gpt2-{name}").read_bytes())
    assert load_tokenizer(tmp_path).files == (tmp_path / "my-vocab.json", tmp_path / "my-merges.txt")


WITHOUT_END = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'


@pytest.mark.parametrize(
    ("files", "load", "expected"),
    [
        ({}, "my.model", "my.model: no such tokenizer file: create one with `anarchobot tokenizer train`"),
        ({"a.txt": "x"}, "", "no tokenizer in this folder"),
        ({"my.txt": "x"}, "my.txt", "expected a tokenizer: a .model, tokenizer.json or vocab.json file"),
        ({"my.model": ""}, "my.model", "my.model: the file is empty"),
        ({"my.model": "some text\n"}, "my.model", "my.model: not a SentencePiece model"),
        ({"config.json": '{"a": 1}'}, "config.json", "config.json: not a supported tokenizer"),
        ({"tokenizer.json": "[1,"}, "", "tokenizer.json: not a supported tokenizer"),
        (
            {"tokenizer.json": WITHOUT_END},
            "",
            "no end-of-document token: expected one of <|endoftext|>, <|end_of_text|>, </s>",
        ),
        ({"vocab.json": "{}"}, "", "merges.txt: no such file: vocab.json needs its merges beside it"),
        ({"vocab.json": "no", "merges.txt": ""}, "", "vocab.json: not a supported tokenizer"),
        ({"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "a b\n"}, "", "vocab.json lacks the merge 'a b'"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "", "no end-of-document token"),
    ],
)
def test_invalid_tokenizer_is_a_one_line_error(tmp_path: Path, files: dict[str, str], load: str, expected: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path / load)
    assert str(error.value).startswith(str(tmp_path)) and expected in str(error.value) and "\n" not in str(error.value)


def test_sentencepiece_model_without_end_of_sentence_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text"] * 9),
        model_prefix=str(tmp_path / "my"),
        vocab_size=20,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"my\.model: this tokenizer has no end-of-sentence token"):
        load_tokenizer(tmp_path / "my.model")
