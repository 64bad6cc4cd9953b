"""Compares students trained with and without a teacher in the same CPU time: on novels, and then on chats. Prints the
tables of docs/tuning.md.

The teacher (4 layers, width 192) is trained first, on all novels, and its predictions are computed once for all seeds;
that time is not the students'. Each student (2 layers, width 64) trains on four novels for `--seconds` of one core: the
steps of each kind of run follow from a measurement of its first steps. The students of the chats are those of novels
without a teacher. Finished runs are reused. About 25 minutes on one core.

    .venv/bin/python benchmarks/distillation.py --folder build/distillation
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import corpora

HERE = Path(__file__).parent
CHATS = "instruct/chat_messages.jsonl"
SECONDS = {"novels": 30, "chats": 15}
TEACHER_STEPS = {"novels": 300, "chats": 40}
BOOKS = (  # of the students
    *("alice_s_adventures_in_wonderland", "through_the_looking_glass", "the_wonderful_wizard_of_oz", "ozma_of_oz"),
)
MODEL = {"vocab_size": 2048, "max_seq_len": 512, "dropout": 0.0, "mlp_multiple": 3.0}
SIZES = {
    "teacher": {**MODEL, "n_layers": 4, "d_model": 192, "n_heads": 6},
    "student": {**MODEL, "n_layers": 2, "d_model": 64, "n_heads": 2},
}
TRAIN: dict[str, Any] = {
    "grad_accum_steps": 1, "min_lr": 0.0, "momentum": 0.9, "cpu_threads": 1, "device": "cpu", "schedule": "wsd",
    "decay_fraction": 0.7, "warmup_steps": 20, "eval_interval": 10**6, "ckpt_interval": 10**6,
}  # fmt: skip
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "novels": {
        "data": {"seq_len": 256},
        "train": {**TRAIN, "micro_batch_size": 16, "lr": 6e-3, "adamw_lr": 3e-3, "eval_batches": 40},
    },
    "chats": {
        "data": {"seq_len": 512, "val_fraction": 0.1},
        "train": {**TRAIN, "micro_batch_size": 8, "lr": 3e-3, "eval_batches": None},
    },
}
KINDS: dict[str, dict[str, Any] | None] = {
    "no teacher": None,
    "forward KL": {"loss": "forward_kl"},
    "reverse KL": {"loss": "reverse_kl"},
    "forward KL, weight 0.9": {"loss": "forward_kl", "weight": 0.9},
}
MEASURED = 12  # steps


def run(task: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains in this process; returns steps, CPU seconds of the steps, and the validation loss at the end."""
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    from anarchobot.config.loading import load_config
    from anarchobot.tasks import distillation
    from anarchobot.tasks.finetuning import load_tuning_config
    from anarchobot.tasks.pretrain import pretrain
    from anarchobot.tasks.sft import sft
    from anarchobot.training.mlx_engine import MLXEngine

    cpu = {"steps": 0.0, "predictions": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                cpu[name] += time.process_time() - start

        return call

    MLXEngine.train_step = timed("steps", MLXEngine.train_step)  # type: ignore[method-assign]
    distillation.fill_cache = timed("predictions", distillation.fill_cache)
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    config["train"]["save_dir"] = str(folder / "run")
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    summary = sft(load_tuning_config(str(path), [])) if task == "chats" else pretrain(load_config(str(path)))
    lines = [json.loads(line) for line in (folder / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if line["event"] == "eval"]
    return {
        "steps": summary["steps"], "cpu": cpu["steps"], "predictions_cpu": cpu["predictions"], "loss": losses[-1],
        "before": losses[0], "parameters": summary["parameters"],
    }  # fmt: skip


def anarchobot(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "anarchobot", *words], check=True)


class Benchmark:
    def __init__(self, folder: Path, data: Path | None, seconds: float | None) -> None:
        self.folder, self.data, self.seconds = folder, data, seconds

    def shards(self) -> None:
        """A tokenizer, and shards of all novels and of BOOKS; the end of each novel is held out of both."""
        self.folder.mkdir(parents=True, exist_ok=True)
        books = corpora.find(self.data, *corpora.BOOKS)
        prefix = str(self.folder / "tokenizer")
        if not Path(f"{prefix}.model").exists():
            size = ["--vocab-size", str(MODEL["vocab_size"])]
            anarchobot("tokenizer", "train", "--input", *map(str, books), *size, "--output", prefix)
        for size, chosen in (("teacher", books), ("student", [book for book in books if book.stem in BOOKS])):
            output = self.folder / f"shards of the {size}"
            if not (output / "manifest.json").exists():
                words = ["--tokenizer", f"{prefix}.model", "--output", str(output), "data.val_fraction=0.05"]
                anarchobot("pretokenize", "--input", *map(str, chosen), *words, "data.clean=true")

    def train(
        self, task: str, size: str, name: str, steps: int, seed: int, kind: dict[str, Any] | None, init: Path | None
    ) -> dict[str, Any]:
        """In a process of its own, unless the result exists."""
        folder = self.folder / task / name
        result = folder / "result.json"
        if not result.exists():
            shutil.rmtree(folder, ignore_errors=True)
            config: dict[str, Any] = json.loads(json.dumps(TASKS[task]))
            config["train"] |= {"total_steps": steps, "seed": seed, "tokenizer_path": None}
            if task == "chats":
                config["data"]["dataset"] = str(*corpora.find(self.data, CHATS))
                config["train"]["init_from"] = str(init)
            else:
                config["model"], config["data"]["shard_dir"] = SIZES[size], str(self.folder / f"shards of the {size}")
            if kind is not None:
                config["train"]["teacher"] = str(self.folder / task / "teacher" / "run")
                config["distillation"] = {**kind, "cache_dir": str(self.folder / task / "cache")}
            print(f"{task}, {name}: {steps} steps", file=sys.stderr, flush=True)
            words = ["--worker", task, json.dumps(config), "--folder", str(folder)]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
            result.write_text(done.stdout.splitlines()[-1])
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def students(self, task: str, kinds: list[str], seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
        def init(size: str, seed: int) -> Path | None:
            name = "teacher" if size == "teacher" else f"no teacher, seed {seed}"
            return self.folder / "novels" / name / "run" if task == "chats" else None

        teacher = self.train(task, "teacher", "teacher", TEACHER_STEPS[task], 0, None, init("teacher", 0))
        print(f"{task}, teacher: {teacher}", file=sys.stderr, flush=True)
        results: dict[str, list[dict[str, Any]]] = {"teacher": [teacher]}
        for kind in kinds:
            # Alone, so that the steps are those of every seed. The first also computes the predictions.
            trial = self.train(
                task, "student", f"trial, {kind}", MEASURED, seeds[0], KINDS[kind], init("student", seeds[0])
            )
            steps = round((self.seconds or SECONDS[task]) * MEASURED / trial["cpu"])
            results[kind] = [
                self.train(task, "student", f"{kind}, seed {seed}", steps, seed, KINDS[kind], init("student", seed))
                for seed in seeds
            ]
            results[kind][0]["predictions_cpu"] += trial["predictions_cpu"]
            print(f"{task}, {kind}: {results[kind]}", file=sys.stderr, flush=True)
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_argument(parser)
    parser.add_argument("--folder", type=Path, default=Path("build/distillation"), help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, help="CPU time of a student (default: 30 for novels, 15 for chats)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        task, config = arguments.worker
        print(json.dumps(run(task, json.loads(config), arguments.folder)))
        return
    benchmark = Benchmark(arguments.folder.absolute(), arguments.data, arguments.seconds)
    if "chats" in arguments.tasks:
        corpora.find(arguments.data, CHATS)  # downloads them before the runs start
    benchmark.shards()
    found = {task: benchmark.students(task, arguments.kinds, arguments.seeds) for task in arguments.tasks}
    (HERE / "results" / "distillation.json").write_text(json.dumps(found, indent=1) + "\n")
    for task, results in found.items():
        print(f"\n{task}\n\n| | steps | CPU s | predictions, CPU s | mean loss | by seed |")
        print("| --- | ---: | ---: | ---: | ---: | --- |")
        for name, runs in results.items():
            losses = [r["loss"] for r in runs]
            print(
                f"| {name} | {runs[0]['steps']} | {statistics.mean(r['cpu'] for r in runs):.0f} | "
                f"{sum(r['predictions_cpu'] for r in runs):.0f} | {statistics.mean(losses):.4f} | "
                f"{', '.join(f'{loss:.4f}' for loss in losses)} |"
            )


if __name__ == "__main__":
    main()
