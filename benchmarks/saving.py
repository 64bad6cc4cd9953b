"""Measures how long saving a checkpoint stalls training: 116 million parameters with AdamW's moments (1.4 GB).

Usage: .venv/bin/python benchmarks/saving.py
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "saving.json")
    arguments = parser.parse_args()
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    from anarchobot.config.schema import Config
    from anarchobot.data.windows import Batch
    from anarchobot.runs.async_checkpointer import AsyncCheckpointer, SaveResult
    from anarchobot.training.mlx_engine import MLXEngine

    model = {"vocab_size": 16384, "n_layers": 11, "d_model": 768, "n_heads": 12, "dropout": 0.0}
    config = Config.model_validate({"model": model, "train": {"optimizer": "adamw", "micro_batch_size": 1}})
    engine = MLXEngine(config)
    batch = Batch(np.ones((1, 1, 64), np.int32), np.ones((1, 1, 64), np.int32))
    results: list[SaveResult] = []
    stalls, during, between = [], [], []

    def step() -> float:
        start = time.perf_counter()
        engine.train_step(batch, 1, 1e-4, 0.9)
        return time.perf_counter() - start

    step()
    with (
        tempfile.TemporaryDirectory(dir=HERE) as folder,
        AsyncCheckpointer(Path(folder), config.train, 0, results.append) as saver,
    ):
        for number in range(1, arguments.saves + 1):
            between += [step() for _ in range(3)]
            start = time.perf_counter()
            saver.save(number, engine.state(), {"config": config.model_dump()})
            stalls.append(time.perf_counter() - start)
            while saver._pending and not saver._pending[0].done():
                during.append(step())
            saver.wait()
    assert all(result.written for result in results)
    seconds = [result.seconds for result in results]
    figures: dict[str, Any] = {
        "parameters": sum(p.size for p in engine.params.values()),
        "save_seconds": round(statistics.median(seconds), 3),
        "stall_seconds": round(statistics.median(stalls), 6),
        "stall_share": round(statistics.median(s / w for s, w in zip(stalls, seconds, strict=True)), 6),
        "step_seconds_between_saves": round(statistics.median(between), 3),
        "step_seconds_during_saves": round(statistics.median(during), 3),
    }
    arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
