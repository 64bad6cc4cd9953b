"""Files beside a tokenizer: SentencePiece models with added tokens, copies, and damaged files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from anarchobot.config.errors import UserError
from anarchobot.exchange.tokenizer_json import tokenizer_files
from anarchobot.tokenizers.fast_tokenizer import select_engine
from anarchobot.tokenizers.tokenizer import copy_tokenizer, digest, load_tokenizer
from tests.tokenizers.families import FAMILIES, make_family

TEXT = "a <|end|> b <tool>  c</s>"


@pytest.fixture
def folder(tmp_path: Path, trained: dict[str, Path]) -> Path:
    """A tokenizer.model with an added end token and an added token that is ordinary text."""
    (tmp_path / "tokenizer.model").write_bytes(trained["bpe"].read_bytes())
    size = load_tokenizer(trained["bpe"]).vocab_size
    write(tmp_path / "added_tokens.json", {"<tool>": size + 1, "<|end|>": size})
    write(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|end|>"}})
    return tmp_path


def write(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values))


def test_sentencepiece_with_added_tokens(folder: Path, trained: dict[str, Path]) -> None:
    ours, plain = load_tokenizer(folder), load_tokenizer(trained["bpe"])
    size = plain.vocab_size
    assert (ours.vocab_size, ours.eod_id, ours.stop_ids) == (size + 2, size, {size})
    before, after = plain.encode_batch(["a <|end|> b ", "  c</s>"])
    expected = [*before, size + 1, *after]
    assert ours.encode_batch(["", TEXT])[1].tolist() == expected
    (encoded,) = ours.encode_with_offsets([TEXT], [False])
    assert encoded[0].tolist() == expected and encoded[1][len(before)].tolist() == [12, 18]
    assert np.array_equal(encoded[1][1:, 0], encoded[1][:-1, 1]), "no character is lost"
    assert ours.control_tokens["<|end|>"] == size and "<tool>" not in ours.control_tokens
    assert ours.decode([*expected, size]) == TEXT
    fast = select_engine(ours, "auto", "stop", lambda text: None)
    assert fast.encode_batch([TEXT])[0].tolist() == expected


def test_exported_sentencepiece_with_added_tokens_equals_transformers(folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(folder)
    (output := tmp_path / "hf").mkdir()
    for name, content in tokenizer_files(ours, 64, ours.eod_id).items():
        (output / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    ids = ours.encode_batch([TEXT])[0].tolist()
    assert theirs(TEXT)["input_ids"] == [ours.eod_id, *ids] and theirs.eos_token_id == ours.eod_id


def test_copies_keep_what_the_files_say(folder: Path, tmp_path: Path) -> None:
    """Copied twice: to shards and to a run. Only what changes ids is part of the digest."""
    sources = [folder, *(make_family(name, tmp_path / name) for name in FAMILIES)]
    for i, source in enumerate(sources):
        ours = load_tokenizer(source)
        for copy in (tmp_path / f"shards{i}", tmp_path / f"run{i}"):
            copy.mkdir()
            copy_tokenizer(load_tokenizer(source), copy)
            source = copy
        again = load_tokenizer(source)
        assert (
            digest(again) == digest(ours)
            and again.encode_batch([TEXT])[0].tolist() == ours.encode_batch([TEXT])[0].tolist()
        )
        assert (again.eod_id, again.stop_ids, again.vocab_size) == (ours.eod_id, ours.stop_ids, ours.vocab_size)
        assert again.control_tokens == ours.control_tokens and again.control_pattern == ours.control_pattern
        write(source / "generation_config.json", {"eos_token_id": [ours.eod_id, 0]})
        assert digest(load_tokenizer(source)) == digest(ours), "another end of a turn changes no shard"


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (
            "added_tokens.json",
            '{"<far>": 6000}',
            r"tokenizer.model: it has .* tokens, .* add tokens with ids 6000: expected",
        ),
        ("added_tokens.json", '{"<far>": "x"}', r"added_tokens.json: expected added tokens with their ids"),
        ("tokenizer_config.json", "{", r"tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', r"tokenizer_config.json: expected added tokens"),
        ("generation_config.json", "[", r"generation_config.json: not valid JSON"),
        ("config.json", '{"eos_token_id": "x"}', None),
        ("config.json", '{"eos_token_id": [100000, -1, true, null]}', None),
    ],
)
def test_damaged_files(tmp_path: Path, trained: dict[str, Path], file: str, text: str, expected: str | None) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained["bpe"].read_bytes())
    (tmp_path / file).write_text(text)
    if expected is None:  # ids that the tokenizer does not have can't end anything
        assert load_tokenizer(tmp_path).stop_ids == load_tokenizer(trained["bpe"]).stop_ids
        return
    with pytest.raises(UserError, match=expected) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_added_token_with_another_id_is_an_error(tmp_path: Path) -> None:
    source = make_family("llama2", tmp_path / "model")
    config = json.loads((source / "tokenizer_config.json").read_text())
    write(source / "tokenizer_config.json", config | {"added_tokens_decoder": {"7": {"content": "</s>"}}})
    with pytest.raises(
        UserError, match=r"tokenizer.json: the files beside it add '</s>' with id 7, but here it has id"
    ):
        load_tokenizer(source)


def test_ordinary_token_as_an_end_remains_text(tmp_path: Path) -> None:
    """A newline that ends generation must not become a control token."""
    source = make_family("qwen", tmp_path / "model")
    before = load_tokenizer(source)
    newline = int(before.encode_batch(["\n"])[0][0])
    write(source / "generation_config.json", {"eos_token_id": [newline, before.eod_id]})
    ours = load_tokenizer(source)
    assert newline in ours.stop_ids and ours.decode([newline]) == "\n" and digest(ours) == digest(before)
