"""Text that streams: whole characters, and nothing of a stop string."""

import random
from pathlib import Path

import pytest

from anarchobot.tokenizers.decoding import StopStringFilter, StreamDecoder, TextStream
from anarchobot.tokenizers.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    "text", ["plain words here", "naïve café — “quoted”", "日本語と🙂 emoji 👩‍👩‍👧", "a\n\n  b\t▁c"]
)
def test_characters_of_several_tokens_come_out_whole(tiny_shards: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_shards)
    decoder = StreamDecoder(tokenizer, [])
    pieces = [decoder.add(int(i)) for i in tokenizer.encode_batch([text])[0]]
    assert "".join(pieces) + decoder.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_first_space_is_kept_by_tokenizers_that_put_one_before_any_text(shared_data: Path) -> None:
    """Mistral's decodes "▁world" alone as "world": what stands before must be decoded with it."""
    tokenizer = load_tokenizer(shared_data / "artifacts" / "mistral_v1_tokenizer.model")
    prompt, whole = (tokenizer.encode_batch([text])[0].tolist() for text in ("hello", "hello world again"))
    decoder = StreamDecoder(tokenizer, prompt)
    pieces = [decoder.add(i) for i in whole[len(prompt) :]]
    assert whole[: len(prompt)] == prompt
    assert "".join(pieces) + decoder.finish() == " world again"


def test_broken_bytes_do_not_hold_the_rest_back(tiny_shards: Path) -> None:
    """A lone continuation byte never becomes a character: it is shown as U+FFFD and the text goes on."""
    tokenizer = load_tokenizer(tiny_shards)
    broken = tokenizer.encode_batch(["é"])[0].tolist()[:1]
    decoder = StreamDecoder(tokenizer, [])
    text = "".join(decoder.add(i) for i in [*broken, *tokenizer.encode_batch([" and more text"])[0].tolist()])
    assert text.endswith("and more text")


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (["END"], "all of it", "all of it"),
        (["END"], "some END and more END", "some "),
        (["END"], "an EN", "an EN"),  # held back, and let go at the end
        (["END"], "ENEND", "EN"),
        (["aab"], "aaaab", "aa"),  # what was held back is a part of it
        (["b", "abc"], "xabc", "xa"),  # the one that is whole first
        (["bc", "abc"], "xabc", "x"),  # of two that are, the longer
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        ([], "anything", "anything"),
    ],
)
def test_text_ends_before_a_stop_string_wherever_it_is_cut(stop: list[str], text: str, shown: str) -> None:
    draw = random.Random(0)
    for _ in range(50):
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stopping = StopStringFilter(stop)
        out = [stopping.add(piece) for piece in pieces]
        assert "".join(out) + stopping.finish() == shown
        assert stopping.found == (shown != text)


def test_what_can_become_no_stop_string_is_not_held_back() -> None:
    stopping = StopStringFilter(["###", "\n\n"])
    assert [stopping.add(piece) for piece in ("word", " #", "1", "#", "#", "x\n", "y")] == [
        "word", " ", "#1", "", "", "##x", "\ny",
    ]  # fmt: skip


def test_a_stop_string_of_several_tokens_is_found_in_a_stream(tiny_shards: Path) -> None:
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
