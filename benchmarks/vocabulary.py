"""Compares initializations for adapt-vocab: a model of general English is adapted to biomedical text. Prints the tables
of docs/vocabulary.md.

The first table compares aligned, random and mean rows and the unadapted model after the same number of steps. The
second compares alignment settings before training. The source is the first model of docs/tuning.md (`runs/base`). A
seed takes 20 minutes on one core; finished stages are reused.

    .venv/bin/python benchmarks/vocabulary.py --source runs/base
    .venv/bin/python benchmarks/vocabulary.py --source runs/base --read    # only print the tables of existing runs
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
GENERAL = ("text/wiki_demo.txt", "text/tinystories_train_part.txt", "text/rust_book.jsonl")
MIN_PARAGRAPH_CHARS = 200  # shorter ones are headings
ABSTRACTS = 500  # PubMedQA rows used as text; the others are used as questions
VECTORS = {"backend": "word2vec", "fasttext": {"epochs": 20, "thread": 1}}
TRAINING = {
    "stage1_lr": 3e-3, "stage2_lr": 3e-3, "micro_batch_size": 8, "grad_accum_steps": 1, "seq_len": 256,
    "stage2_use_lora": False, "optimizer": "muon_adamw", "precision": "float32", "cpu_threads": 1,
}  # fmt: skip
STARTS = {"aligned": "procrustes", "random": "random", "mean": "mean", "unadapted": "pieces"}
STAGES = ("initial", "stage 1", "stage 2")
# (method, threshold, top_k) of the second table.
SETTINGS = (
    ("procrustes", 0.4, 20), ("procrustes", 0.4, 10), ("procrustes", 0.4, 5), ("procrustes", 0.4, 1),
    ("procrustes", 0.6, 10), ("relative", 0.4, 10), ("relative", 0.4, 1), ("random", 0.4, 10), ("pieces", 0.4, 10),
    ("mean", 0.4, 10),
)  # fmt: skip


def write_texts(data: Path, folder: Path) -> None:
    """Writes the domain text, as three files of documents, and questions.jsonl."""

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / "biomedical" / name).read_text(encoding="utf-8").splitlines()]

    articles, pubmed = rows("craft_articles.jsonl"), rows("pubmedqa.jsonl")
    texts = {
        "craft": [part for row in articles for part in row["text"].split("\n\n") if len(part) > MIN_PARAGRAPH_CHARS],
        "medquad": [f"{row['instruction']}\n{row['output']}" for row in rows("medquad_qa.jsonl")],
        "abstracts": [f"{row['abstract']} {row['conclusion']}" for row in pubmed[:ABSTRACTS]],
    }
    found = {name: [{"text": text} for text in part] for name, part in texts.items()} | {
        "questions": pubmed[ABSTRACTS:]
    }
    for name, part in found.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def write_config(source: Path, data: Path, folder: Path, steps: tuple[int, int], documents: int) -> Path:
    config: dict[str, Any] = {
        "models": {"source_model": str(source)},
        "corpus": {
            "domain": [str(folder / f"{name}.jsonl") for name in ("craft", "medquad", "abstracts")],
            "general": [str(data / name) for name in GENERAL],
            "documents": "lines",
            "val_fraction": 0.015,
        },
        "tokenization": {"target": "trained", "num_workers": 1},
        "embedding": VECTORS,
        "vocab_adaptation": {"stage1_steps": steps[0], "stage2_steps": steps[1], **TRAINING},
        "evaluation": {"max_samples": documents},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def adapt(config: Path, root: Path, *words: str) -> dict[str, Any]:
    """Runs the unfinished stages in `root`; returns the report."""
    print(root.name, " ".join(words), file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "anarchobot", "adapt-vocab", str(config), "--json", f"pipeline.run_root={root}"]
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def train(source: Path, config: Path, folder: Path, seeds: list[int]) -> None:
    """Runs the experiments of the first table."""
    own = next(path for path in source.glob("tokenizer.*"))
    for seed in seeds:
        for start, method in STARTS.items():
            words = [f"vocab_adaptation.seed={seed}", f"alignment.method={method}"]
            words += [f"models.target_tokenizer={own}"] if start == "unadapted" else []
            words += [f"evaluation.qa={folder / 'questions.jsonl'}"] if (start, seed) == ("aligned", seeds[0]) else []
            adapt(config, folder / f"{start}_{seed}", *words)


def compare_settings(config: Path, folder: Path) -> None:
    """Writes the second table to settings.json: one run whose alignment is rebuilt for each of SETTINGS."""
    rows = []
    for method, threshold, top_k in SETTINGS:
        words = [
            f"alignment.method={method}",
            f"alignment.similarity_threshold={threshold}",
            f"alignment.top_k={top_k}",
        ]
        report = adapt(config, folder / "settings", "vocab_adaptation.enabled=false", *words)
        figures = {name: report["alignment"].get(name) for name in ("coverage", "precision_at_1")}
        bits = report["evaluation"]["initial"]["bits_per_byte"]
        rows.append({"method": method, "threshold": threshold, "top_k": top_k, **figures, "bits_per_byte": bits})
    (folder / "settings.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def collect(folder: Path, seeds: list[int]) -> dict[str, Any]:
    """Collects the figures of existing runs."""
    results: dict[str, Any] = {start: {} for start in STARTS}
    for start in STARTS:
        for seed in seeds:
            file = folder / f"{start}_{seed}" / "report.json"
            if file.is_file():
                report = json.loads(file.read_text(encoding="utf-8"))
                del report["alignment"]["examples"], report["result"]
                results[start][str(seed)] = report
    settings = folder / "settings.json"
    rows = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else []
    return {"starts": results, "settings": rows}


def show(results: dict[str, Any]) -> None:
    print("| initialization | step 0 | after stage 1 | after stage 2 |\n| --- | ---: | ---: | ---: |")
    for start, reports in results["starts"].items():
        found = [report["evaluation"] for report in reports.values()]
        cells = [", ".join(f"{metrics[stage]['bits_per_byte']:.3f}" for metrics in found) for stage in STAGES]
        print(f"| {start} | {' | '.join(cells)} |")
    print("\n| method | threshold | top_k | coverage | bits per byte |\n| --- | ---: | ---: | ---: | ---: |")
    for row in results["settings"]:
        is_aligned = row["method"] in ("procrustes", "relative")
        cells = [str(row["threshold"]), str(row["top_k"])] if is_aligned else ["", ""]
        coverage, bits = f"{100 * row['coverage']:.1f} %", f"{row['bits_per_byte']:.3f}"
        print(f"| `{row['method']}` | {cells[0]} | {cells[1]} | {coverage} | {bits} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("ANARCHOBOT_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--source", type=Path, required=True, help="run folder of the model to adapt")
    parser.add_argument("--data", type=Path, default=default, help="folder with text/ and biomedical/")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "vocabulary", help="folder for the runs")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "vocabulary.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs=2, default=[50, 100], help="steps of stage 1 and stage 2")
    parser.add_argument("--documents", type=int, default=60, help="number of held-out documents to evaluate on")
    parser.add_argument("--read", action="store_true", help="only print the tables of existing runs")
    args = parser.parse_args()
    if not args.read:
        args.folder.mkdir(parents=True, exist_ok=True)
        write_texts(args.data, args.folder)
        config = write_config(args.source, args.data, args.folder, tuple(args.steps), args.documents)
        train(args.source, config, args.folder, args.seeds)
        compare_settings(config, args.folder)
    results = collect(args.folder, args.seeds)
    show(results)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
