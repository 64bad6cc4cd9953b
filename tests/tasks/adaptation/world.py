"""A tiny model and corpus for adapt-vocab, and a command that is killed during a stage."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from anarchobot.data.sources import builtin
from anarchobot.storage.durable import read_checksummed
from anarchobot.tokenizers.training import train_tokenizer
from tests.exchange.random_run import make_run

STAGES = (
    "corpus", "tokenizer", "vectors", "alignment", "initial", "shards", "stage1", "stage2", "result", "evaluate_before",
    "evaluate_initial", "evaluate_stage1", "evaluate_stage2",
)  # fmt: skip
MAX_ATTEMPTS = 30  # to kill a stage that lasts only milliseconds


def make_world(folder: Path) -> Path:
    """An untied model with random weights, domain text, general text and three questions."""
    texts = [part for text in builtin.topics() for part in text.split("\n\n") if len(part) > 100]
    made = train_tokenizer(texts[:150], folder / "own", 400)[0]
    make_run(folder / "model", made, tie_embeddings=False, n_layers=1, d_model=32, max_seq_len=64, dropout=0.1)
    for name, part in (("domain", texts[150:290]), ("general", texts[:80])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    rows = [{"question": "Is it?", "abstract": "It is.", "answer": answer} for answer in ("yes", "no", "maybe")]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_config(world: Path, root: Path, **change: dict[str, Any]) -> Path:
    config: dict[str, dict[str, Any]] = {
        "models": {"source_model": str(world / "model")},
        "corpus": {
            "domain": str(world / "domain.jsonl"), "general": str(world / "general.jsonl"), "val_fraction": 0.1
        },
        "embedding": {"fasttext": {"epochs": 1, "thread": 1, "dim": 8}},
        "alignment": {"method": "procrustes"},
        "tokenization": {"target": "trained", "vocab_size": 420, "num_workers": 1},
        "vocab_adaptation": {
            "stage1_steps": 4, "stage2_steps": 4, "stage1_lr": 1e-3, "stage2_lr": 1e-3, "micro_batch_size": 2,
            "grad_accum_steps": 1, "seq_len": 32, "lora_r": 4, "precision": "float32", "cpu_threads": 1,
        },
        "evaluation": {"qa": str(world / "qa.jsonl"), "max_samples": 3},
        "pipeline": {"run_root": str(root), "retry_backoff": 0, "max_retries": 0},
    }  # fmt: skip
    for section, keys in change.items():
        config.setdefault(section, {}).update(keys)
    path = root.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "anarchobot", "adapt-vocab", str(config), "--quiet"]


def kill_in(stage: str, config: Path, root: Path, seconds: float, rng: random.Random) -> None:
    """Runs the command and kills it at a random time during this stage, which takes about `seconds`."""
    begun, done = (root / "records" / f"{stage}.{kind}" for kind in ("begun", "json"))
    for _ in range(MAX_ATTEMPTS):
        before = begun.stat().st_ino if begun.exists() else None
        process = subprocess.Popen(command(config), stderr=subprocess.PIPE)
        while process.poll() is None and (not begun.exists() or begun.stat().st_ino == before):
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error.decode()
        if not done.exists():
            return
        shutil.rmtree(root / stage)  # it had finished
        begun.unlink()
        done.unlink()
        seconds *= 0.8
    raise AssertionError(f"{stage} could not be killed")


def results(root: Path) -> dict[str, Any]:
    """The digests of the files and the figures of every stage, without files that contain their own path."""
    found: dict[str, Any] = {}
    for path in sorted((root / "records").glob("*.json")):
        record = read_checksummed(path)
        found |= {f"{path.stem}/{n}": sha for n, sha in record["outputs"].items() if not n.endswith("state.json")}
        found[path.stem] = record["notes"]
    return found
