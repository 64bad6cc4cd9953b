"""Compares Muon + AdamW in half of the steps with AdamW, on real text. Part of `make quality`.

13 novels, a vocabulary of 8,192, a model of 6 million parameters, 1,024 tokens per step. AdamW runs with several
learning rates. Its best one and Muon + AdamW, with its whole schedule in half of the steps, then run with three seeds.
This takes about an hour on two cores.

    .venv/bin/python benchmarks/steps.py --jobs 2
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import quality

HERE = Path(__file__).parent
LENGTH, ROWS, STEPS = 128, 8, 500
FRACTION = 0.5
MODEL = {
    "vocab_size": 8192, "n_layers": 5, "d_model": 256, "n_heads": 4, "mlp_multiple": 2.6875, "dropout": 0.0,
    "max_seq_len": LENGTH,
}  # fmt: skip
TRAIN = {
    "train.min_lr": 0.0, "train.micro_batch_size": ROWS, "train.cpu_threads": 1, "train.weight_decay": 0.1,
    "train.schedule": "wsd", "train.decay_fraction": 0.7, "train.warmup_steps": 20,
}  # fmt: skip
ADAMW_RATES = (5e-4, 1e-3, 2e-3, 4e-3)


def settings(kind: str) -> dict[str, Any]:
    """`kind` is `adamw RATE` or `muon RATE`."""
    optimizer, rate = kind.split()
    if optimizer == "adamw":
        return {**MODEL, **TRAIN, "train.optimizer": "adamw", "train.lr": float(rate)}
    return {**MODEL, **TRAIN, "train.lr": float(rate), "train.momentum": 0.9}


def prepare(data: Path | None, build: Path) -> None:
    """Writes train.npy and val.npy, int32 [n, LENGTH + 1]: the last tenth of each novel is held out."""
    from anarchobot.tokenizers.tokenizer import load_tokenizer
    from anarchobot.tokenizers.training import train_tokenizer

    novels = [path.read_text(encoding="utf-8") for path in corpora.find(data, *corpora.BOOKS)]
    build.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(train_tokenizer(novels, build / "novels", 8192)[0])
    for name, part in (("train", slice(0, 9)), ("val", slice(9, 10))):
        pieces = ["".join(np.array_split(np.array(list(text)), 10)[i]) for text in novels for i in range(10)[part]]
        ids = np.concatenate(tokenizer.encode_batch(pieces)).astype(np.int32)
        starts = np.arange(0, len(ids) - LENGTH - 1, LENGTH)[:, None]
        np.save(build / f"{name}.npy", ids[starts + np.arange(LENGTH + 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_argument(parser)
    parser.add_argument("--build", type=Path, default=Path("build/steps"), help="folder for the token ids")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--muon", default="muon 8e-3", help="default: %(default)s")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.worker:
        kind, seed = arguments.worker.rsplit("/", 1)
        rows = np.load(arguments.build / "train.npy"), np.load(arguments.build / "val.npy")[:400]
        print(json.dumps(quality.train_on(*rows, settings(kind), int(seed), arguments.steps, ROWS)))
        return

    if not (arguments.build / "val.npy").exists():
        prepare(arguments.data, arguments.build)
    losses_of: dict[str, list[float]] = {}

    def run(kind: str, seed: int, steps: int) -> None:
        flags = ["--worker", f"{kind}/{seed}", "--build", str(arguments.build), "--steps", str(steps)]
        result = quality.run_json([sys.executable, __file__, *flags])
        losses_of.setdefault(kind, []).append(result["final"])
        print(f"{kind}, seed {seed}, {steps} steps: {result}", file=sys.stderr, flush=True)

    def run_all(work: list[tuple[str, int, int]]) -> None:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda each: run(*each), work))

    few = round(FRACTION * arguments.steps)
    run_all([*((f"adamw {rate}", 0, arguments.steps) for rate in ADAMW_RATES), (arguments.muon, 0, few)])
    best = min((f"adamw {rate}" for rate in ADAMW_RATES), key=lambda kind: losses_of[kind][0])
    run_all(
        [(kind, seed, steps) for seed in (1, 2) for kind, steps in ((best, arguments.steps), (arguments.muon, few))]
    )
    (HERE / "results" / "steps.json").write_text(
        json.dumps({"steps": arguments.steps, "losses": losses_of}, indent=1) + "\n"
    )
    print("\n| run | steps | mean loss | by seed |\n| --- | ---: | ---: | --- |")
    for kind, losses in losses_of.items():
        steps = few if kind == arguments.muon else arguments.steps
        print(f"| {kind} | {steps} | {statistics.mean(losses):.4f} | {', '.join(map(str, losses))} |")


if __name__ == "__main__":
    main()
