"""Streamed text: complete characters, and no part of a stop string."""

import random
from pathlib import Path
from typing import Any

import pytest

from anarchobot.tokenizers.decoding import StopStringFilter, StreamDecoder, TextStream
from anarchobot.tokenizers.tokenizer import ChatTokenizer, HFTokenizer, load_tokenizer
from tests.tokenizers.templates import metaspace


@pytest.mark.parametrize(
    "text", ["plain words here", "naïve café — “quoted”", "日本語と🙂 emoji 👩‍👩‍👧", "a\n\n  b\t▁c"]
)
def test_characters_of_several_tokens_are_complete(tiny_shards: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_shards)
    decoder = StreamDecoder(tokenizer, [])
    chunks = [decoder.add(int(i)) for i in tokenizer.encode_batch([text])[0]]
    assert "".join(chunks) + decoder.finish() == text
    assert not any("\ufffd" in chunk for chunk in chunks)


def test_first_space_is_kept_with_a_dummy_prefix(shared_data: Path) -> None:
    """Mistral's tokenizer decodes "▁world" alone as "world", so it must be decoded with the preceding tokens."""
    tokenizer = load_tokenizer(shared_data / "artifacts" / "mistral_v1_tokenizer.model")
    prompt, whole = (tokenizer.encode_batch([text])[0].tolist() for text in ("hello", "hello world again"))
    decoder = StreamDecoder(tokenizer, prompt)
    chunks = [decoder.add(i) for i in whole[len(prompt) :]]
    assert whole[: len(prompt)] == prompt
    assert "".join(chunks) + decoder.finish() == " world again"


def test_invalid_bytes_do_not_block_the_stream(tiny_shards: Path) -> None:
    """A lone lead byte never becomes a character: it is decoded as U+FFFD, and the stream continues."""
    tokenizer = load_tokenizer(tiny_shards)
    broken = tokenizer.encode_batch(["é"])[0].tolist()[:1]
    decoder = StreamDecoder(tokenizer, [])
    text = "".join(decoder.add(i) for i in [*broken, *tokenizer.encode_batch([" and more text"])[0].tolist()])
    assert text.endswith("and more text")
    decoder = StreamDecoder(tokenizer, [])
    assert "".join(decoder.add(i) for i in broken * 40) == "\ufffd" * 37 and decoder.finish() == "\ufffd" * 3


@pytest.fixture(scope="module")
def decoders(trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    """Tokenizers that decode bytes: SentencePiece, byte-level BPE, and "<0xE2>" by Hugging Face's library."""
    file = tmp_path_factory.mktemp("decoders") / "tokenizer.json"
    metaspace("first").save(str(file))
    return {
        "bpe": load_tokenizer(trained["bpe"]),
        "gpt2": load_tokenizer(trained["gpt2"]),
        "json": load_tokenizer(file),
    }


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "json"])
@pytest.mark.parametrize("text", ["日本語のテキスト、", "🙂" * 20, "é" * 30 + "ü🙂 a"])
def test_characters_outside_the_vocabulary_are_streamed(
    decoders: dict[str, ChatTokenizer], kind: str, text: str
) -> None:
    """Long runs of tokens that are parts of characters; each character comes when it is complete."""
    tokenizer = decoders[kind]
    ids = tokenizer.encode_batch(["a" + text])[0].tolist()
    decoder, shown = StreamDecoder(tokenizer, []), ""
    for n, token in enumerate(ids, 1):
        shown += decoder.add(token)
        assert shown == tokenizer.decode(ids[:n]).rstrip("\ufffd")
    assert shown.lstrip() == "a" + text and decoder.finish() == ""


def test_bytes_that_are_no_characters_do_not_change_others(decoders: dict[str, ChatTokenizer]) -> None:
    """As in SentencePiece. Hugging Face's library replaces the whole run."""
    tokenizer = decoders["json"]
    assert isinstance(tokenizer, HFTokenizer)
    tokens = [
        "a",
        "<0xC3>",
        "<0xA9>",
        "<0x80>",
        "<0xE2>",
        "<0x82>",
        "▁b",
        "<0xE2>",
        "<0x96>",
        "<0x81>",
        "</s>",
        "<0xC3>",
    ]
    ids = [tokenizer.backend.token_to_id(token) for token in tokens]
    assert tokenizer.decode(ids) == "aé\ufffd\ufffd\ufffd b▁\ufffd"


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "json"])
def test_streamed_text_is_the_decoded_text_for_any_ids(decoders: dict[str, ChatTokenizer], kind: str) -> None:
    """Random ids have many broken characters: bytes without their beginning or end, many in a row."""
    tokenizer, rng = decoders[kind], random.Random(0)
    prompt = tokenizer.encode_batch(["def foo(bar): return baz"])[0].tolist()
    for _ in range(40):
        ids = [rng.randrange(5, tokenizer.vocab_size) for _ in range(150)]
        decoder = StreamDecoder(tokenizer, prompt)
        chunks = [decoder.add(i) for i in ids]
        expected = tokenizer.decode(prompt + ids).removeprefix(tokenizer.decode(prompt))
        assert "".join(chunks) + decoder.finish() == expected
        assert decoder.finish() == ""


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "json"])
def test_a_prompt_that_ends_inside_a_character_is_not_repeated(decoders: dict[str, ChatTokenizer], kind: str) -> None:
    tokenizer = decoders[kind]
    ids = tokenizer.encode_batch(["several words before it \U0010fffd and after it"])[0].tolist()
    whole = next(n for n in range(len(ids)) if "\U0010fffd" in tokenizer.decode(ids[:n]))
    decoder = StreamDecoder(tokenizer, ids[: whole - 1])
    text = "".join([*(decoder.add(i) for i in ids[whole - 1 :]), decoder.finish()])
    assert text == "\U0010fffd and after it"
    # U+FFFD in the text of a prompt is not an incomplete character.
    decoder = StreamDecoder(tokenizer, tokenizer.encode_batch(["before \ufffd"])[0].tolist())
    assert "".join(decoder.add(i) for i in tokenizer.encode_batch(["after"])[0].tolist()).lstrip() == "after"


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (["END"], "all of it", "all of it"),
        (["END"], "some END and more END", "some "),
        (["END"], "an EN", "an EN"),  # held back until the end
        (["END"], "ENEND", "EN"),
        (["aab"], "aaaab", "aa"),  # the held-back text is part of it
        (["b", "abc"], "xabc", "xa"),  # the first to be complete
        (["bc", "abc"], "xabc", "x"),  # the longer of two that end together
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        ([], "anything", "anything"),
    ],
)
def test_text_ends_before_a_stop_string_for_any_chunks(stop: list[str], text: str, shown: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(6)))
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stopping = StopStringFilter(stop)
        out = [stopping.add(chunk) for chunk in chunks]
        assert "".join(out) + stopping.finish() == shown
        assert stopping.found in (stop if shown != text else [None])
        assert text.startswith(shown + (stopping.found or ""))


def test_work_on_a_stop_string_does_not_grow_with_its_length() -> None:
    """A request may hold a megabyte. Each prefix of it was compared with each piece of text."""

    class Counted(str):
        slices = 0

        def __getitem__(self, key: Any) -> str:
            Counted.slices += 1
            return super().__getitem__(key)

    stopping = StopStringFilter([Counted("ab" * 5000)])
    assert stopping.add("xab") + stopping.add("a") + stopping.finish() == "xaba"
    assert Counted.slices <= 10


def test_text_that_cannot_become_a_stop_string_is_released() -> None:
    stopping = StopStringFilter(["###", "\n\n"])
    assert [stopping.add(chunk) for chunk in ("word", " #", "1", "#", "#", "x\n", "y")] == [
        "word", " ", "#1", "", "", "##x", "\ny",
    ]  # fmt: skip


def test_stop_string_of_several_tokens(tiny_shards: Path) -> None:
    tokenizer = load_tokenizer(tiny_shards)
    ids = tokenizer.encode_batch(["The naïve café — closed.\n\nQuestion: more"])[0].tolist()
    stream = TextStream(tokenizer, [], ["é —", "\n\nQ"])
    shown = ""
    for i in ids:
        shown += stream.add(i)
        assert "The naïve caf".startswith(shown)
        if stream.stop_string is not None:
            break
    assert shown + stream.finish() == "The naïve caf"
