"""Validation loss after training on the same tokens: character-level tiny Shakespeare. Part of `make quality`.

The budget is that of nanoGPT's CPU example (block 64, batch 12, 4 layers, 4 heads, width 128, no dropout, 2,000 steps),
which ends at a loss of 1.8857. The split (the last tenth for validation) and the number of characters are the same. The
loss is computed on the whole validation split in windows of 64. A run takes a few minutes on one core.

    .venv/bin/python benchmarks/quality.py --runs exportable adamw --jobs 2
    .venv/bin/python benchmarks/quality.py --steps 500 --seeds 0     # every variant, one seed
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent
LENGTH, ROWS, STEPS = 64, 12, 2000
MARKS = (250, 400, 500, 1000, 1500, 2000)

# Each run's changes to BASE. Keys without a section belong to `model`.
BASE: dict[str, Any] = {
    "vocab_size": 65, "n_layers": 4, "d_model": 128, "n_heads": 4, "mlp_multiple": 2.6875, "dropout": 0.0,
    "max_seq_len": LENGTH, "qk_norm": True, "tie_embeddings": False, "embedding_scale": 11.3,
    "train.warmup_steps": 20, "train.min_lr": 0.0, "train.micro_batch_size": ROWS, "train.cpu_threads": 1,
    "train.max_grad_norm": None, "train.weight_decay": 0.1, "train.lr": 8e-3, "train.adamw_lr": 4e-3,
    "train.schedule": "wsd", "train.decay_fraction": 0.7, "train.momentum": 0.9,
}  # fmt: skip
PLAIN = {"qk_norm": False, "tie_embeddings": True, "embedding_scale": None}
ADAMW = {"train.optimizer": "adamw", "train.max_grad_norm": 1.0, "train.warmup_steps": 100, "train.adamw_lr": None}
RUNS: dict[str, dict[str, Any]] = {
    "exportable": {},  # the head is untied, so export can multiply the scale into the embedding
    "adamw": {**ADAMW, **PLAIN, "train.lr": 2e-3},
    "adamw, the same model": {**ADAMW, "train.lr": 2e-3},
    "logit softcap 15": {"logit_softcap": 15.0},
    "ema 0.99": {"train.ema_decay": 0.99},
    "tied": {"tie_embeddings": True},
    "no qk_norm": {"qk_norm": False},
    "no embedding scale": {"embedding_scale": None},
    "no normuon": {"train.normuon": False},
    "heads together": {"train.muon_split_heads": False},
    "plain weight decay": {"train.cautious_weight_decay": False},
    "no weight decay": {"train.weight_decay": 0.0},
    "momentum 0.95": {"train.momentum": 0.95},
    "cosine": {"train.schedule": "cosine"},
    "lr 1.2e-2": {"train.lr": 1.2e-2},
    "lr 5e-3": {"train.lr": 5e-3},
}


def windows(data: Path | None) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Character ids of the training and validation splits, int32 [n, 65]; consecutive rows overlap by one."""
    (file,) = corpora.find(data, "text/tinyshakespeare.txt")
    text = file.read_text(encoding="utf-8")
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([number[c] for c in text], np.int32)
    cut = int(0.9 * len(ids))

    def rows(part: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        starts = np.arange(0, len(part) - 1, LENGTH)[:, None]
        return part[np.minimum(starts + np.arange(LENGTH + 1), len(part) - 1)]

    return rows(ids[:cut])[:-1], rows(ids[cut:])[:-1]


def train_on(
    training: npt.NDArray[np.int32],
    held_out: npt.NDArray[np.int32],
    settings: dict[str, Any],
    seed: int,
    steps: int,
    rows_per_step: int,
) -> dict[str, Any]:
    """Trains on rows of ids [n, length + 1], reshuffled in each epoch; returns the losses on all of `held_out`."""
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    from anarchobot.config.schema import Config
    from anarchobot.data.windows import Batch
    from anarchobot.optim.schedule import learning_rate, muon_momentum
    from anarchobot.training.mlx_engine import MLXEngine

    config: dict[str, dict[str, Any]] = {
        "model": {}, "data": {"seq_len": training.shape[1] - 1}, "train": {"seed": seed}
    }  # fmt: skip
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        config[section or "model"][name] = value
    parsed = Config.model_validate(config)
    engine = MLXEngine(parsed)

    def batch(rows: npt.NDArray[np.int32]) -> Batch:
        return Batch(np.ascontiguousarray(rows[None, :, :-1]), np.ascontiguousarray(rows[None, :, 1:]))

    def validate() -> float:
        sums = np.array([engine.eval_step(batch(held_out[i : i + 192])) for i in range(0, len(held_out), 192)])
        return float(sums[:, 0].sum() / sums[:, 1].sum())

    rng = np.random.default_rng(seed)
    order: list[int] = []
    losses, cpu = {}, 0.0
    for step in range(1, steps + 1):
        if len(order) < rows_per_step:
            order = [*order, *rng.permutation(len(training)).tolist()]
        rows, order = training[order[:rows_per_step]], order[rows_per_step:]
        start = time.process_time()
        lr = learning_rate(step, parsed.train, steps)
        engine.train_step(batch(rows), step, lr, muon_momentum(step, parsed.train))
        cpu += time.process_time() - start
        if step in MARKS or step == steps:
            losses[step] = round(validate(), 4)
    count = sum(p.size for p in engine.params.values())
    return {"losses": losses, "final": losses[steps], "cpu_seconds": round(cpu, 1), "parameters": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_argument(parser)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), help="default: all")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="changes to all runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "quality.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, seed = arguments.worker.rsplit("/", 1)
        changes = {key: json.loads(value) for key, value in (change.split("=", 1) for change in arguments.set)}
        rows = windows(arguments.data)
        print(json.dumps(train_on(*rows, {**BASE, **RUNS[name], **changes}, int(seed), arguments.steps, ROWS)))
        return

    windows(arguments.data)  # downloads it before the runs start
    by_run: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.runs}

    def run(work: tuple[int, str]) -> None:
        seed, name = work
        flags = ["--worker", f"{name}/{seed}", *corpora.flags(arguments.data), "--steps", str(arguments.steps)]
        result = run_json([sys.executable, __file__, *flags, "--set", *arguments.set])
        by_run[name].append({"seed": seed, **result})
        print(f"{name}, seed {seed}: {result}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, [(seed, name) for seed in arguments.seeds for name in arguments.runs]))
    arguments.output.write_text(json.dumps(by_run, indent=1) + "\n")
    print("\n| run | mean loss | by seed | CPU s |\n| --- | ---: | --- | ---: |")
    for name, results in by_run.items():
        finals = [r["final"] for r in results]
        seconds = statistics.median(r["cpu_seconds"] for r in results)
        print(f"| {name} | {statistics.mean(finals):.4f} | {', '.join(map(str, finals))} | {seconds:.0f} |")


def run_json(command: list[str]) -> dict[str, Any]:
    """Runs a command and parses the last line that it prints as JSON."""
    completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
