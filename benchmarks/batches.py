"""Speed of reading training batches: million tokens per second of CPU time, one thread, warm page cache.

Usage: .venv/bin/python benchmarks/batches.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from anarchobot.data.batches import TrainBatches
from anarchobot.data.shards import Manifest, Shard, TokenStream, sha256_file, write_manifest
from anarchobot.data.windows import open_windows

SHARDS, SHARD_TOKENS = 4, 25_000_000
ROWS, STEPS, ROUNDS = 32, 200, 5


def write_shards(folder: Path) -> None:
    """Random ids in documents of 700 tokens on average."""
    rng = np.random.default_rng(0)
    shards = []
    for i in range(SHARDS):
        ids = rng.integers(3, 32000, SHARD_TOKENS).astype(np.uint16)
        ends = np.unique(np.append(rng.integers(1, SHARD_TOKENS, SHARD_TOKENS // 700), SHARD_TOKENS)).astype(np.uint64)
        ids[ends.astype(np.int64) - 1] = 2
        file, offsets = folder / f"train_{i:05d}.npy", folder / f"train_{i:05d}.offsets"
        np.save(file, ids)
        with offsets.open("wb") as out:
            np.save(out, np.concatenate([np.zeros(1, np.uint64), ends]))
        shards.append(
            Shard(
                file.name, "train", SHARD_TOKENS, len(ends), 4 * SHARD_TOKENS, sha256_file(file), sha256_file(offsets)
            )
        )
    tokenizer = {"name": "none", "file": "none", "sha256": "none"}
    write_manifest(folder, Manifest(tokenizer, 32000, "uint16", 2, 0, {}, shards))


def million_tokens_per_second(batches: TrainBatches, seq_len: int) -> float:
    best = 0.0
    for _ in range(ROUNDS):
        start = time.process_time()
        for step in range(STEPS):
            batches.at(step * ROWS, 1, ROWS)
        best = max(best, STEPS * ROWS * seq_len / (time.process_time() - start) / 1e6)
    return best


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder))
        stream = TokenStream(folder, "train")
        print("| sequences | length | million tokens/s |\n| --- | ---: | ---: |")
        for seq_len in (256, 1024, 4096):
            for pack, mask in (("stream", False), ("stream", True), ("documents", False), ("documents", True)):
                batches = TrainBatches([open_windows(stream, seq_len, pack, mask)], seed=0)  # type: ignore[arg-type]
                name = f"{pack}{', document mask' if mask else ''}"
                results[f"{name}, {seq_len}"] = speed = round(million_tokens_per_second(batches, seq_len), 1)
                print(f"| {name} | {seq_len} | {speed:,.0f} |")
    (Path(__file__).parent / "results" / "batches.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
