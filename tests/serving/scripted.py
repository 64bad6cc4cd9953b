"""A model that writes given texts, for tests of what becomes of them."""

from pathlib import Path

import mlx.core as mx
import pytest

from anarchobot.inference import batching
from anarchobot.inference.model import Model, load_model
from anarchobot.tokenizers.tokenizer import ChatTokenizer
from tests.exchange.random_run import make_run


def chat_model(folder: Path, tokenizer: Path, template: str) -> Model:
    """A small random model with this chat template."""
    make_run(folder, tokenizer, n_layers=1, max_seq_len=4096)
    (folder / "chat_template.jinja").write_text(template)
    return load_model(folder)[0]


def script(monkeypatch: pytest.MonkeyPatch, tokenizer: ChatTokenizer, *texts: str, end: str = "<|im_end|>") -> None:
    """Each answer is one of `texts`, by its seed, and the token `end`."""
    ids = [[*tokenizer.encode_batch([text])[0].tolist(), tokenizer.control_tokens[end]] for text in texts]

    def sample(z: mx.array, settings: list[object], positions: list[int]) -> mx.array:
        rows = [ids[chosen.seed % len(ids)] for chosen in settings]  # type: ignore[attr-defined]
        return mx.array([row[min(at, len(row) - 1)] for row, at in zip(rows, positions, strict=True)], mx.uint32)

    monkeypatch.setattr(batching, "sample", sample)
