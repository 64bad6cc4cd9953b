"""The tokenizers of model families, as their files say: ids, ends and starts of texts against transformers."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers

from anarchobot.tokenizers.chat_encoder import ChatEncoder, Encoded
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.conversation import Conversation
from anarchobot.tokenizers.tokenizer import ChatTokenizer, load_tokenizer
from tests.tokenizers.families import FAMILIES, make_family
from tests.tokenizers.templates import dialogue, to_dicts

TALKS = [
    dialogue("How are you?", "Fine, thanks.", "And   now?\n"),
    dialogue("  Grüße aus Köln:\n\n吾輩は猫である 🙂", "x = 'y'\t\t", " ok ", "\n\n a\n", "1 < 2 </"),
    dialogue("A▁b", "c", "<|im_", system="Be kind.  "),
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make_family(request.param, tmp_path_factory.mktemp("family") / "model")


@cache
def theirs(folder: Path) -> Any:
    """The tokenizer.json as it is: some of transformers' own classes rebuild the steps."""
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def talks(name: str) -> list[Conversation]:
    return TALKS if FAMILIES[name].system else TALKS[:-1]


def encoder(tokenizer: ChatTokenizer) -> ChatEncoder:
    return ChatEncoder(tokenizer, load_template(tokenizer))


def test_chats_equal_transformers(family: tuple[str, Path]) -> None:
    name, folder = family
    ours = encoder(load_tokenizer(folder))
    for talk in talks(name):
        prompt = theirs(folder).apply_chat_template(to_dicts(talk), add_generation_prompt=True)["input_ids"]
        assert ours.encode_prompt(talk).tolist() == prompt, talk
        (encoded,) = ours.encode([talk[:-1]])
        assert isinstance(encoded, Encoded)
        assert encoded.ids.tolist() == theirs(folder).apply_chat_template(to_dicts(talk[:-1]))["input_ids"], talk


def test_texts_equal_transformers(family: tuple[str, Path]) -> None:
    _, folder = family
    ours = load_tokenizer(folder)
    assert ours.vocab_size == len(theirs(folder))
    texts = [message.content for talk in TALKS for message in talk]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs(folder)(text, add_special_tokens=False)["input_ids"], text
        start = ours.start_ids()
        assert start is not None and [*start, *ids.tolist()] == theirs(folder)(text)["input_ids"], text


def test_ends(family: tuple[str, Path]) -> None:
    name, folder = family
    ours = load_tokenizer(folder)
    first, *others = theirs(folder).convert_tokens_to_ids(list(FAMILIES[name].ends))
    assert (ours.eod_id, ours.stop_ids) == (first, {first, *others})
