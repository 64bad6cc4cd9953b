"""A tokenizer that needs no training and whose ids can be computed by hand."""

from pathlib import Path

import numpy as np

from anarchobot.tokenizers.tokenizer import Ids


class Bytes:
    """One id per byte, the 256 below the last one; the last id ends documents. `thin` keeps every n-th byte."""

    def __init__(self, folder: Path, vocab_size: int = 300, thin: int = 1) -> None:
        self.vocab_size, self.eod_id, self._thin = vocab_size, vocab_size - 1, thin
        self.stop_ids, self.overrides = frozenset([self.eod_id]), {}
        self.files: tuple[Path, ...] = (folder / "bytes.model",)
        self.files[0].write_text("bytes")

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        raw = [np.frombuffer(text.encode(), np.uint8)[:: self._thin] for text in texts]
        return [codes.astype(np.int32) + self.eod_id - 256 for codes in raw]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - self.eod_id + 256 for i in ids).decode()
