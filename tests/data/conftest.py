"""Small trained tokenizers of each kind, and shards of given ids."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from anarchobot.data.shards import Manifest, Shard, write_manifest
from anarchobot.data.sources import builtin
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.tokenizers.tokenizer import Tokenizer, load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer

SCRIPTS = "Größe, forêt, Київ, 吾輩は猫である。名前はまだ無い。 مرحبا שלום नमस्ते 🙂👩‍👩‍👧 x² → ∑ ▁ 1234567890\r\n\tend\n"
KINDS = {
    "bpe": ("bpe", "sentencepiece"),
    "unigram": ("unigram", "sentencepiece"),
    "gpt2": ("bpe", "gpt2"),
}


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """About 150 kB of the Python language reference, and a line in many scripts."""
    return [*builtin.topics()[:40], SCRIPTS * 20]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> dict[str, Path]:
    """The tokenizer file by kind (bpe, unigram, gpt2), 600 tokens each."""
    folder = tmp_path_factory.mktemp("trained")
    return {kind: train_tokenizer(corpus, folder / kind, 600, *how)[0] for kind, how in KINDS.items()}


@pytest.fixture(scope="session", params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest, trained: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(trained[request.param])


def write_shards(folder: Path, vocab_size: int, dtype: str = "uint16", **splits: list[list[int]]) -> np.ndarray:
    """Writes shards of given ids, where 0 ends a document, and returns the first split's ids.

    Only the manifest is written by the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for split, parts in splits.items():
        for i, ids in enumerate(parts):
            starts = sorted({0, len(ids), *(place + 1 for place, token in enumerate(ids) if token == 0)})
            digests = []
            for kind, array in (("npy", np.array(ids, dtype)), ("offsets", np.array(starts, np.uint64))):
                with open(folder / f"{split}_{i:05d}.{kind}", "wb") as file:
                    np.save(file, array)
                digests.append(hashlib.sha256(Path(file.name).read_bytes()).hexdigest())
            sizes = (len(ids), len(starts) - 1, 2 * len(ids))
            shards.append(Shard(f"{split}_{i:05d}.npy", split, *sizes, *digests))  # type: ignore[arg-type]
    made = {"name": "made", "file": "made", "sha256": ""}
    write_manifest(folder, Manifest(made, vocab_size, dtype, 0, 0, DocumentCounts().as_manifest(), shards))
    return np.array([i for ids in next(iter(splits.values())) for i in ids], np.int64)
