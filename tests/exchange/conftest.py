"""Tokenizers of every supported kind, trained once per session."""

import random
from pathlib import Path

import pytest

from anarchobot.tokenizers.training import train_tokenizer

KINDS = ("bpe", "unigram", "gpt2", "json")


@pytest.fixture(scope="session")
def tokenizers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per kind: SentencePiece BPE and unigram, GPT-2's two files, and a tokenizer.json."""
    from anarchobot.tokenizers.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [random_words(5000)]
    texts.append("Grüße aus Köln: naïve Kunst, 吾輩は猫である。 Київ, Москва.\n    x = 'y'\n" * 30)
    train_tokenizer(texts, folder / "bpe" / "tokenizer", 500)
    train_tokenizer(texts, folder / "unigram" / "tokenizer", 500, "unigram")
    train_tokenizer(texts, folder / "gpt2" / "tiny", 500, file_format="gpt2")
    gpt2 = load_tokenizer(folder / "gpt2" / "tiny-vocab.json")
    (folder / "json").mkdir()
    (folder / "json" / "tokenizer.json").write_bytes(str(gpt2.backend.to_str(pretty=True)).encode())  # type: ignore[attr-defined]
    assert gpt2.spec()["model"]["type"] == "BPE"  # type: ignore[attr-defined]
    return folder


def random_words(count: int) -> str:
    """Text that never changes, unlike our documentation, so that the outputs of random models stay the same."""
    draw = random.Random(0)
    syllables = [a + b + c for a in ("", *"bdfgklmnprstvw", "th", "st") for b in "aeiou" for c in ("", *"nrst")]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 1, 2, 2, 3)))) for _ in range(1000)]
    common = [draw.choice(words[: draw.randint(5, 1000)]) for _ in range(count)]
    return "\n".join(" ".join(common[i : i + 12]).capitalize() + "." for i in range(0, count, 12))


@pytest.fixture(params=KINDS)
def tokenizer_path(request: pytest.FixtureRequest, tokenizers_folder: Path) -> Path:
    return first_file(tokenizers_folder / request.param)


def first_file(folder: Path) -> Path:
    (found,) = [
        f for f in folder.iterdir() if f.suffix == ".model" or f.name.endswith(("vocab.json", "tokenizer.json"))
    ]
    return found


@pytest.fixture
def bpe(tokenizers_folder: Path) -> Path:
    return tokenizers_folder / "bpe" / "tokenizer.model"
