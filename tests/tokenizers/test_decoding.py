"""Streamed text: complete characters, and no part of a stop string."""

import random
from pathlib import Path

import pytest

from anarchobot.tokenizers.decoding import StopStringFilter, StreamDecoder, TextStream
from anarchobot.tokenizers.tokenizer import load_tokenizer


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


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_streamed_text_is_the_decoded_text_for_any_ids(trained: dict[str, Path], kind: str) -> None:
    """Random ids have many broken characters: bytes without their beginning or end, many in a row."""
    tokenizer, rng = load_tokenizer(trained[kind]), random.Random(0)
    prompt = tokenizer.encode_batch(["def foo(bar): return baz"])[0].tolist()
    for _ in range(40):
        ids = [rng.randrange(5, tokenizer.vocab_size) for _ in range(150)]
        decoder = StreamDecoder(tokenizer, prompt)
        chunks = [decoder.add(i) for i in ids]
        expected = tokenizer.decode(prompt + ids).removeprefix(tokenizer.decode(prompt))
        assert "".join(chunks) + decoder.finish() == expected
        assert decoder.finish() == ""


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_a_prompt_that_ends_inside_a_character_is_not_repeated(trained: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(trained[kind])
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
        assert stopping.found == (shown != text)


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
        if stream.stopped:
            break
    assert shown + stream.finish() == "The naïve caf"
