"""Parameters, checkpoint size and peak memory of the shipped configurations. Writes the table of README.md.

Parameters and checkpoint sizes are computed. Peak memory is MLX's counter after one step of two micro-batches, float32
on a CPU; other settings are those of the configuration, except that `large` has micro-batches of one sequence. Each
configuration runs in a separate process. All of them take an hour and up to 16 GB.

    .venv/bin/python benchmarks/sizes.py
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("quickstart", "tiny", "small", "m3pro", "memory_constrained", "medium", "large")
MICRO_BATCH = {"large": 1}
COLUMNS = 4  # written here: file, parameters, checkpoint, peak


def peak_memory_gb(name: str) -> float:
    """Peak memory in 10^9 bytes. The second micro-batch of a step sets it, because gradients of the first are kept."""
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import numpy as np

    from anarchobot.config.loading import load_config
    from anarchobot.data.windows import Batch
    from anarchobot.training.mlx_engine import MLXEngine

    settings = {"train.device": "cpu", "train.precision": "float32", "train.cpu_threads": "1"}
    config = load_config(ROOT / "configs" / f"{name}.yaml", [f"{k}={v}" for k, v in settings.items()]).config
    rows = MICRO_BATCH.get(name, config.train.micro_batch_size)
    shape = (min(2, config.train.grad_accum_steps), rows, config.data.seq_len + 1)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    engine = MLXEngine(config)
    engine.train_step(Batch(ids[..., :-1].copy(), ids[..., 1:].copy()), 1, config.train.lr, config.train.momentum)
    return engine.peak_memory_gb()


def sizes(name: str) -> tuple[int, float]:
    """Returns the number of parameters and the checkpoint size in 10^9 bytes (weights and moments, float32)."""
    import math

    from anarchobot.config.loading import load_config
    from anarchobot.model.parameters import parameter_count, parameter_shapes
    from anarchobot.optim.param_groups import state_shapes

    config = load_config(ROOT / "configs" / f"{name}.yaml").config
    moments = state_shapes(parameter_shapes(config.model), config.train)
    count = parameter_count(config.model)
    return count, 4 * (count + sum(math.prod(s) for of in moments.values() for s in of.values())) / 1e9


def write_table(measured: dict[str, float], page: Path) -> None:
    """Writes the figures into the table rows of these configurations."""
    lines = page.read_text(encoding="utf-8").split("\n")
    for i, line in enumerate(lines):
        found = re.match(r"\| \[(\w+)\]\(configs/", line)
        if found and found[1] in measured:
            count, checkpoint = sizes(found[1])
            cells = line.strip("|").split("|")
            cells[1:COLUMNS] = [f" {count / 1e6:,.1f} M ", f" {gb(checkpoint)} ", f" {gb(measured[found[1]])} "]
            lines[i] = f"|{'|'.join(cells)}|"
    page.write_text("\n".join(lines), encoding="utf-8")


def gb(value: float) -> str:
    return f"{value * 1000:.0f} MB" if value < 1 else f"{value:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(NAMES), help="default: all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(peak_memory_gb(arguments.worker)))
        return
    measured = {}
    for name in arguments.names:
        completed = subprocess.run(
            [sys.executable, __file__, "--worker", name], stdout=subprocess.PIPE, text=True, check=True
        )
        measured[name] = json.loads(completed.stdout.splitlines()[-1])
        print(f"{name}: {gb(measured[name])}", flush=True)
    write_table(measured, ROOT / "README.md")


if __name__ == "__main__":
    main()
