"""Character offsets of tokens, against the bytes of their pieces."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.tokenizers.chat_encoder import ChatEncoder, Encoded
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.conversation import Conversation
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.tokenizers.templates import dialogue

NAUGHTY = ["a▁b ▁", "e\u0301 吾輩は🙂\n\n x", "</s><|im_end|> <s>", "\t \r\n.", "  two  spaces "]
TEXT = st.text(st.one_of(st.sampled_from("ab \n▁<|/s>é🙂"), st.characters(exclude_categories=["Cs"])), max_size=30)


def pieces_bytes(model: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    piece = model.id_to_piece(i)
    return bytes([int(piece[3:5], 16)]) if model.is_byte(i) else piece.replace("▁", " ").encode()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@settings(max_examples=150, deadline=None)
@given(text=st.one_of(TEXT, st.sampled_from(NAUGHTY)))
def test_sentencepiece_offsets_match_the_bytes_of_the_pieces(trained: dict[str, Path], kind: str, text: str) -> None:
    tokenizer = load_tokenizer(trained[kind])
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained[kind]))
    ((ids, offsets),) = tokenizer.encode_with_offsets([text], [True])
    assert ids.tolist() == tokenizer.encode_batch([text])[0].tolist()
    character = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])  # per byte
    place = 0
    for i, (begin, end) in zip(ids.tolist(), offsets.tolist(), strict=True):
        size = len(pieces_bytes(model, i))
        inside = character[place : place + size]
        # A byte in the middle of a character has an empty range at that character.
        assert (begin, max(end, begin + 1)) == (inside[0], inside[-1] + 1)
        place += size
    assert place == len(text.encode())


@pytest.mark.parametrize("kind", ["bpe", "unigram", "gpt2"])
@settings(max_examples=100, deadline=None)
@given(contents=st.lists(TEXT.filter(str.strip), min_size=2, max_size=2))
def test_masks_with_tokenizers_trained_here(trained: dict[str, Path], kind: str, contents: list[str]) -> None:
    """ChatML: the loss tokens decode to exactly the answer and its end-of-turn token."""
    if any(0xFDD0 <= ord(c) <= 0xFDD2 for c in "".join(contents)):
        return
    conversation: Conversation = dialogue(*contents)
    tokenizer = load_tokenizer(trained[kind])
    (encoded,) = ChatEncoder(tokenizer, load_template(tokenizer)).encode([conversation])
    assert isinstance(encoded, Encoded)
    trained_ids = encoded.ids[encoded.loss_mask].tolist()
    answer = tokenizer.decode(trained_ids[:-1])
    assert trained_ids[-1] == tokenizer.control_tokens["<|im_end|>"]
    # The first token may include the newline before the answer.
    assert answer.removeprefix("\n") == contents[1].removeprefix("\n") and answer.endswith(contents[1])
    assert tokenizer.decode(encoded.ids.tolist()) == f"user\n{contents[0]}\nassistant\n{contents[1]}\n"


def test_trimmed_offsets_are_extended_to_the_whitespace(shared_data: Path) -> None:
    """GPT-2's own tokenizer.json trims offsets."""
    import tokenizers

    tokenizer = load_tokenizer(shared_data / "artifacts" / "tiny_bpe_tokenizer.json")
    texts = ["Hello  big\n\n world ", " x"]
    expected = [o.tolist() for _, o in tokenizer.encode_with_offsets(texts, [False, False])]
    tokenizer.backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)  # type: ignore[attr-defined]
    assert [o.tolist() for _, o in tokenizer.encode_with_offsets(texts, [False, False])] == expected
    assert expected[0][0][0] == 0 and expected[0][-1][1] == len(texts[0])
