"""A model that writes given texts, for tests of what becomes of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from shutil import copy

import mlx.core as mx
import pytest

from anarchobot.inference import batching
from anarchobot.inference.model import Model, load_model
from anarchobot.tokenizers.tokenizer import ChatTokenizer, load_tokenizer
from tests.exchange.random_run import make_run


def chat_model(folder: Path, tokenizer: Path, template: str, controls: Sequence[str] = ()) -> Model:
    """A small random model with this chat template, and more control tokens in its SentencePiece model."""
    if controls:
        source = folder.with_name("tokenizer")
        source.mkdir()
        size = load_tokenizer(tokenizer).vocab_size
        added = {str(size + i): {"content": name, "special": True} for i, name in enumerate(controls)}
        (source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        tokenizer = copy(tokenizer, source / "tokenizer.model")
    make_run(folder, tokenizer, n_layers=1, max_seq_len=4096)
    (folder / "chat_template.jinja").write_text(template)
    return load_model(folder)[0]


def script(monkeypatch: pytest.MonkeyPatch, tokenizer: ChatTokenizer, *texts: str, end: str = "<|im_end|>") -> None:
    """Each answer is one of `texts`, which may have control tokens, by its seed, and the token `end`."""
    ids = [_encode(tokenizer, text + end) for text in texts]

    def sample(z: mx.array, settings: list[object], positions: list[int]) -> mx.array:
        rows = [ids[chosen.seed % len(ids)] for chosen in settings]  # type: ignore[attr-defined]
        return mx.array([row[min(at, len(row) - 1)] for row, at in zip(rows, positions, strict=True)], mx.uint32)

    monkeypatch.setattr(batching, "sample", sample)


def _encode(tokenizer: ChatTokenizer, text: str) -> list[int]:
    ids, start = [], 0
    for match in tokenizer.control_pattern.finditer(text):
        ids += tokenizer.encode_batch([text[start : match.start]])[0].tolist()
        ids.append(tokenizer.control_tokens[match.content])
        start = match.end
    return ids
