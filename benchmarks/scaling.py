"""Compares two ranks on this machine, one core each, with one process: step time and exchange throughput.

Usage: .venv/bin/python benchmarks/scaling.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.tasks.launch import free_ports
from anarchobot.training import ranks

HERE = Path(__file__).parent
MODEL = {"vocab_size": 8192, "n_layers": 6, "d_model": 256, "n_heads": 8, "dropout": 0.0}  # 8.4 million parameters
LENGTH, ROWS = 256, 4
BUFFERS = (2**20, 2**22, 2**24, 2**26)
EXCHANGED = 2**27  # bytes, for measuring throughput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scaling.json")
    parser.add_argument("--micro-batches", type=int)  # per rank; given to the child processes
    parser.add_argument("--share-muon", action="store_true")
    arguments = parser.parse_args()
    if arguments.micro_batches is not None:
        return run_rank(arguments.micro_batches, arguments.steps, arguments.share_muon)
    result: dict[str, Any] = {"model": MODEL, "tokens_of_a_micro_batch": LENGTH * ROWS}
    for whole in (2, 8):  # micro-batches per step over all ranks
        one, two = start_ranks(1, whole, arguments.steps), start_ranks(2, whole // 2, arguments.steps)
        shared = start_ranks(2, whole // 2, arguments.steps, "--share-muon")
        result[f"{whole} micro-batches"] = {"one process": one, "two ranks": two, "two ranks, Muon shared": shared}
        print(f"{whole} micro-batches per step: {one['step_seconds']} s, two ranks {two['step_seconds']} s, of which "
              f"{two['exchange_seconds']} s to exchange {two['bytes']:,} bytes; with sharded Muon "
              f"{shared['step_seconds']} s: update {shared['update_seconds']} instead of {two['update_seconds']} s"
        )  # fmt: skip
    print("gradient throughput in GB/s by buffer size in MB:", two["gb_per_second"])
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def start_ranks(size: int, micro_batches: int, steps: int, *more: str) -> dict[str, Any]:
    """Starts several ranks, each on its own core; returns rank 0's measurements."""
    hostfile = Path(tempfile.mkdtemp()) / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    command = [sys.executable, __file__, "--micro-batches", str(micro_batches), "--steps", str(steps), *more]
    cores = sorted(os.sched_getaffinity(0))
    children = [
        subprocess.Popen(
            ["taskset", "-c", str(cores[i]), *command],
            env={**os.environ, "MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(i)},
            stdout=subprocess.PIPE,
        )
        for i in range(size)
    ]
    outputs = [child.communicate(timeout=1800)[0] for child in children]
    hostfile.unlink()
    found: dict[str, Any] = json.loads(outputs[0])
    return found


def run_rank(micro_batches: int, steps: int, share: bool) -> None:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx

    from anarchobot.config.schema import Config
    from anarchobot.data.windows import Batch
    from anarchobot.training.mlx_engine import MLXEngine

    own = ranks.init_distributed()
    train = {"micro_batch_size": ROWS, "cpu_threads": 1, "share_muon": share}
    config = Config.model_validate({"model": MODEL, "train": train})
    engine = MLXEngine(config, ranks=own)
    ids = np.random.default_rng(own.rank).integers(0, 8192, (micro_batches, ROWS, LENGTH)).astype(np.int32)
    times, exchanges, updates, size = [], [], [], [0]
    all_reduce, broadcast_scalar = own.all_reduce, own.broadcast_scalar

    def timed_all_reduce(grads: Any) -> Any:
        own.any(False)  # synchronizes, so that waiting for the slower rank is not counted
        start = time.perf_counter()
        size[0] = sum(g.nbytes for g in grads.values())
        whole = all_reduce(grads)
        exchanges.append(time.perf_counter() - start)
        return whole

    def start_of_update(norm: float) -> float:
        known = broadcast_scalar(norm)
        updates.append(time.perf_counter())  # start of the update, which ends with the step
        return known

    own.all_reduce, own.broadcast_scalar = timed_all_reduce, start_of_update  # type: ignore[method-assign]
    for step in range(1, steps + 2):
        start = time.perf_counter()
        engine.train_step(Batch(ids, ids), step, 1e-3, 0.9)
        ended = time.perf_counter()
        times.append(ended - start)
        updates[-1] = ended - updates[-1]
    speeds = {}
    if own.size > 1:
        for buffer in BUFFERS:
            ranks.BUFFER_BYTES, count = buffer, EXCHANGED // buffer
            tries = []
            for _ in range(4):
                grads = {str(i): mx.ones(buffer // 4) for i in range(count)}
                mx.eval(grads)
                start = time.perf_counter()
                all_reduce(grads)
                tries.append(time.perf_counter() - start)
            speeds[f"{buffer / 2**20:g}"] = round(EXCHANGED / min(tries[1:]) / 1e9, 2)
    with own:
        pass
    if own.rank == 0:
        values = {
            "step_seconds": round(min(times[1:]), 3),
            "exchange_seconds": round(min(exchanges[1:]), 4),
            "update_seconds": round(min(updates[1:]), 4),
            "bytes": size[0],
        }
        print(json.dumps(values | {"gb_per_second": speeds}))


if __name__ == "__main__":
    main()
