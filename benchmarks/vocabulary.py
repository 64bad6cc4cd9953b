"""Compares the starts of adapt-vocab: a small model of general English is adapted to biomedical text. Prints the tables
of docs/vocabulary.md.

The first table has, for a tied and an untied head and for little and much text, the bits per byte of held-out text
before training, after stage 1 and after stage 2 (means of the seeds); the second has other starts before training,
with the first seed. The source models are trained first, one for each kind of head, a minute each. A seed takes five
minutes on one core; figures that are in the output file are not computed again.

    .venv/bin/python benchmarks/vocabulary.py
    .venv/bin/python benchmarks/vocabulary.py --read    # only print the tables of the figures so far
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Collection, Mapping
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import corpora
import numpy as np

from anarchobot.cli.main import main as anarchobot
from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.loading import load
from anarchobot.optim.param_groups import EMBEDDING, HEAD
from anarchobot.runs import checkpoint
from anarchobot.tasks.adaptation import initialization
from anarchobot.tasks.adaptation.pipeline import adapt_vocab
from anarchobot.vocab.embedding_init import initialize_embeddings
from anarchobot.vocab.token_alignment import ALIGNED, PIECES, AlignmentPlan
from anarchobot.vocab.vector_alignment import Floats

HERE = Path(__file__).parent
ROOT = HERE.parent
BIOMEDICAL = ("biomedical/craft_articles.jsonl", "biomedical/medquad_qa.jsonl", "biomedical/pubmedqa.jsonl")
GENERAL = ("text/wiki_demo.txt", "text/tinystories_train_part.txt", "text/rust_book.jsonl")
MIN_PARAGRAPH_CHARS = 200  # shorter ones are headings
HELD_OUT = 24  # documents
SIZES = {"little": 300_000, "much": 2_000_000}  # bytes
MODEL = {"vocab_size": 2048, "n_layers": 2, "d_model": 64, "n_heads": 4, "dropout": 0.0, "max_seq_len": 256}
HEADS = {"tied": {"tie_embeddings": True}, "untied": {"tie_embeddings": False, "embedding_scale": 8.0}}
PRETRAINING = {
    "total_steps": 300, "micro_batch_size": 8, "grad_accum_steps": 1, "lr": 8e-3, "min_lr": 0.0, "momentum": 0.9,
    "warmup_steps": 20, "schedule": "wsd", "decay_fraction": 0.7, "eval_interval": 150, "eval_batches": 10,
    "cpu_threads": 1, "supervise": False, "checkpoint_path": "auto",
}  # fmt: skip
TRAINING = {
    "stage1_steps": 10, "stage2_steps": 15, "stage1_lr": 3e-3, "stage2_lr": 3e-3, "micro_batch_size": 4,
    "grad_accum_steps": 1, "seq_len": 128, "stage2_use_lora": False, "optimizer": "muon_adamw",
    "precision": "float32", "cpu_threads": 1,
}  # fmt: skip
# Of each start, the settings of `alignment` and whether its rows are stretched (`stretch`).
TRAINED: dict[str, tuple[dict[str, Any], bool]] = {
    "procrustes": ({"method": "procrustes"}, False),
    "pieces": ({"method": "pieces"}, False),
    "focus": ({"method": "focus"}, False),
    "omp, top_k 64": ({"method": "omp", "top_k": 64}, False),
    "procrustes, stretched": ({"method": "procrustes"}, True),
}
UNTRAINED: dict[str, tuple[dict[str, Any], bool]] = {
    "procrustes, top_k 1": ({"method": "procrustes", "top_k": 1}, False),
    "procrustes, top_k 30": ({"method": "procrustes", "top_k": 30}, False),
    "relative, top_k 1": ({"method": "relative", "top_k": 1}, False),
    "focus, stretched": ({"method": "focus"}, True),
    "omp, top_k 10": ({"method": "omp", "top_k": 10}, False),
    "omp, top_k 3": ({"method": "omp", "top_k": 3}, False),
    "pieces, stretched": ({"method": "pieces"}, True),
    "mean": ({"method": "mean"}, False),
    "random": ({"method": "random"}, False),
}
STAGES = ("initial", "stage 1", "stage 2")
SHARED_STAGES = ("corpus", "tokenizer", "vectors", "shards")  # do not depend on the head


def write_texts(data: Path, folder: Path) -> None:
    """Writes little.jsonl, much.jsonl and held_out.jsonl: paragraphs of articles, questions with answers, abstracts."""

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / "biomedical" / name).read_text(encoding="utf-8").splitlines()]

    texts = [part for row in rows("craft_articles.jsonl") for part in row["text"].split("\n\n")]
    texts = [text for text in texts if len(text) > MIN_PARAGRAPH_CHARS]
    texts += [f"{row['instruction']}\n{row['output']}" for row in rows("medquad_qa.jsonl")]
    texts += [f"{row['abstract']} {row['conclusion']}" for row in rows("pubmedqa.jsonl")]
    random.Random(0).shuffle(texts)
    texts, held_out = texts[HELD_OUT:], texts[:HELD_OUT]
    ends = np.cumsum([len(text.encode()) for text in texts])
    parts = {name: texts[: int(np.searchsorted(ends, size))] for name, size in SIZES.items()}
    for name, part in (parts | {"held_out": held_out}).items():
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def train_source(head: str, data: Path, folder: Path) -> Path:
    """Trains the source model, unless it is there; returns its run folder."""
    run, shards = folder / f"source_{head}", folder / "shards"
    if PRETRAINING["total_steps"] in checkpoint.saved_steps(run):
        return run
    config = {
        "model": MODEL | HEADS[head],
        "data": {"dataset": [str(data / name) for name in GENERAL], "seq_len": 256, "shard_dir": str(shards)},
        "train": PRETRAINING | {"tokenizer_path": str(shards / "tokenizer.model"), "save_dir": str(run)},
    }
    path = folder / f"source_{head}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    for command in (["tokenizer", "train"], ["pretokenize"], ["pretrain"]):
        if command != ["tokenizer", "train"] or not (shards / "tokenizer.model").is_file():
            assert anarchobot([*command, str(path)]) == 0
    return run


def adaptation(source: Path, text: str, seed: int, data: Path, folder: Path, root: Path) -> dict[str, Any]:
    general = {"general": str(data / GENERAL[0])} if text == "much" else {}
    return {
        "models": {"source_model": str(source)},
        "corpus": {
            "domain": str(folder / f"{text}.jsonl"), "documents": "lines", "val_fraction": 0.0,
        } | general,
        "tokenization": {"target": "trained", "num_workers": 1},
        "embedding": {"backend": "word2vec", "fasttext": {"epochs": 10 if text == "little" else 4, "thread": 1}},
        "vocab_adaptation": TRAINING | {"seed": seed},
        "evaluation": {"datasets": [str(folder / "held_out.jsonl")]},
        "pipeline": {"run_root": str(root), "max_retries": 0},
    }  # fmt: skip


def stretch(
    weights: Mapping[str, Floats], by_token: Collection[str], vocab_size: int, plan: AlignmentPlan, seed: int
) -> dict[str, Floats]:
    """The former rule: combined rows are scaled to the weighted mean of the norms of their source rows."""
    params = dict(initialize_embeddings(weights, by_token, vocab_size, plan, seed))
    for name in by_token:
        norms = np.linalg.norm(weights[name], axis=1)
        for i in range(len(plan.routes)):
            ids, shares = plan.combination(i)
            if len(ids) > 1:
                params[name][i] *= (shares @ norms[ids]) / np.linalg.norm(params[name][i])
    return params


def adapt(
    config: dict[str, Any], root: Path, alignment: dict[str, Any], stretched: bool, train: bool
) -> dict[str, Any]:
    """Runs the stages that depend on the start; returns bits per byte by stage and the norms of new rows."""
    config = config | {"alignment": alignment}
    if not train:
        config["vocab_adaptation"] = config["vocab_adaptation"] | {"enabled": False}
    path = root.with_suffix(".yaml")
    path.write_text(json.dumps(config), encoding="utf-8")
    for file in (root / "records").glob("initial.*"):  # the record does not say whether rows were stretched
        file.unlink()
    shutil.rmtree(root / "initial", ignore_errors=True)
    with patch.object(initialization, "initialize_embeddings", stretch if stretched else initialize_embeddings):
        report = adapt_vocab(load(path, [], AdaptConfig), quiet=True)
    found = {stage: metrics["bits_per_byte"] for stage, metrics in report["evaluation"].items()}
    precision = report["alignment"].get("precision_at_1")
    return found | {"norms": row_norms(root), "routes": report["alignment"]["routes"], "precision_at_1": precision,
                    "tokens_per_byte": report["evaluation"]["initial"]["tokens_per_byte"]}  # fmt: skip


def row_norms(root: Path) -> dict[str, list[float]]:
    """The mean norms of the combined rows and of the copied rows, of each matrix."""
    with np.load(root / "alignment" / "plan.npz", allow_pickle=False) as arrays:
        combined = np.isin(arrays["routes"], (ALIGNED, PIECES))
    if not combined.any():
        return {}
    saved = checkpoint.find(root / "initial", files=(checkpoint.MODEL_FILE,))
    with np.load(saved.folder / checkpoint.MODEL_FILE, allow_pickle=False) as arrays:
        norms = {name: np.linalg.norm(arrays[name], axis=1) for name in (EMBEDDING, HEAD) if name in arrays.files}
    return {name: [round(float(n[rows].mean()), 3) for rows in (combined, ~combined)] for name, n in norms.items()}


def share_stages(root: Path, other: Path) -> None:
    """Copies the stages that do not depend on the model's head from another run."""
    if root.exists() or not other.exists():
        return
    (root / "records").mkdir(parents=True)
    for stage in SHARED_STAGES:
        if (other / stage).is_dir():
            shutil.copytree(other / stage, root / stage)
        for file in (other / "records").glob(f"{stage}.*"):
            shutil.copy2(file, root / "records")


def measure(args: argparse.Namespace, results: dict[str, Any]) -> None:
    sources = {
        head: given or train_source(head, args.data, args.folder)
        for head, given in (("tied", args.tied), ("untied", args.untied))
    }
    plan = [(seed, starts) for starts, seeds in ((TRAINED, args.seeds), (UNTRAINED, args.seeds[:1])) for seed in seeds]
    for (seed, starts), text, head in product(plan, SIZES, HEADS):
        root = args.folder / f"{head}_{text}_{seed}"
        config = adaptation(sources[head], text, seed, args.data, args.folder, root)
        share_stages(root, args.folder / f"tied_{text}_{seed}")
        for start, (alignment, stretched) in starts.items():
            key = f"{head} | {text} | {start} | {seed}"
            if key in results:
                continue
            if args.figures == 0:
                return
            args.figures -= 1
            began = time.monotonic()
            results[key] = adapt(config, root, alignment, stretched, train=starts is TRAINED)
            bits = [f"{results[key][stage]:.4f}" for stage in STAGES if stage in results[key]]
            print(f"{key}: {' '.join(bits)} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")


def show(results: dict[str, Any]) -> None:
    columns = [(head, text) for head in HEADS for text in SIZES]
    heading = "".join(f" {head}, {text} text |" for head, text in columns)
    for starts, stages in ((TRAINED, STAGES), (UNTRAINED, STAGES[:1])):
        print(f"| start |{heading}\n| --- |{' ---: |' * len(columns)}")
        for start in starts:
            cells = []
            for head, text in columns:
                found = [value for key, value in results.items() if key.startswith(f"{head} | {text} | {start} | ")]
                cells.append(" → ".join(f"{mean(r[stage] for r in found):.3f}" for stage in stages) if found else "")
            print(f"| {start} | {' | '.join(cells)} |")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_argument(parser)
    for head in HEADS:
        parser.add_argument(
            f"--{head}", type=Path, metavar="RUN", help=f"source with a {head} head (default: train one)"
        )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "vocabulary", help="folder for the runs")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "vocabulary.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--figures", type=int, default=-1, help="stop after this many new figures (default: do all)")
    parser.add_argument("--read", action="store_true", help="only print the tables of existing figures")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if not args.read:
        corpora.find(args.data, *BIOMEDICAL, *GENERAL)
        args.folder.mkdir(parents=True, exist_ok=True)
        write_texts(args.data, args.folder)
        measure(args, results)
    show(results)


if __name__ == "__main__":
    main()
