"""What an alignment is worth: a model of general English moved to a vocabulary of biomedical text. Makes the tables of
docs/vocabulary.md.

The same steps from aligned rows, from random ones, from the mean of all, and with the model's own vocabulary; and what
the settings of the alignment are worth before any training. The source is the model that docs/tuning.md trains first
(`runs/base` there). A seed takes 20 minutes on one core; what is done is not done again.

    .venv/bin/python benchmarks/vocabulary.py --source runs/base
    .venv/bin/python benchmarks/vocabulary.py --source runs/base --read    # only the tables of what is there
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
PARAGRAPH = 200  # characters: shorter ones are headings
ABSTRACTS = 500  # of PubMedQA's rows, to learn from; the others are questions
VECTORS = {"backend": "word2vec", "fasttext": {"epochs": 20, "thread": 1}}
TRAINING = {
    "lr_stage1": 3e-3, "lr_stage2": 3e-3, "batch_size": 8, "gradient_accumulation": 1, "max_seq_length": 256,
    "stage2_use_lora": False, "optimizer": "muon_adamw", "bf16": False, "cpu_threads": 1,
}  # fmt: skip
STARTS = {"aligned": "procrustes", "random": "random", "mean": "mean", "unadapted": "pieces"}
STAGES = ("initial", "stage 1", "stage 2")
# Method, threshold, top_k of the second table.
SETTINGS = (
    ("procrustes", 0.4, 20), ("procrustes", 0.4, 10), ("procrustes", 0.4, 5), ("procrustes", 0.4, 1),
    ("procrustes", 0.6, 10), ("relative", 0.4, 10), ("relative", 0.4, 1), ("random", 0.4, 10), ("pieces", 0.4, 10),
    ("mean", 0.4, 10),
)  # fmt: skip


def write_texts(data: Path, folder: Path) -> None:
    """The field's text, three files of documents, and questions.jsonl."""

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / "biomedical" / name).read_text(encoding="utf-8").splitlines()]

    articles, pubmed = rows("craft_articles.jsonl"), rows("pubmedqa.jsonl")
    texts = {
        "craft": [part for row in articles for part in row["text"].split("\n\n") if len(part) > PARAGRAPH],
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
        "tokenization": {"target": "trained", "workers": 1},
        "embedding": VECTORS,
        "vocab_adaptation": {"stage1_steps": steps[0], "stage2_steps": steps[1], **TRAINING},
        "evaluation": {"max_samples": documents},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def adapt(config: Path, root: Path, *words: str) -> dict[str, Any]:
    """Carries out what is left to do in `root`; returns the report."""
    print(root.name, " ".join(words), file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "anarchobot", "adapt-vocab", str(config), "--json", f"pipeline.run_root={root}"]
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def train(source: Path, config: Path, folder: Path, seeds: list[int]) -> None:
    """The runs of the first table."""
    own = next(path for path in source.glob("tokenizer.*"))
    for seed in seeds:
        for start, method in STARTS.items():
            words = [f"vocab_adaptation.seed={seed}", f"alignment.method={method}"]
            words += [f"models.target_tokenizer={own}"] if start == "unadapted" else []
            words += [f"evaluation.qa={folder / 'questions.jsonl'}"] if (start, seed) == ("aligned", seeds[0]) else []
            adapt(config, folder / f"{start}_{seed}", *words)


def compare_settings(config: Path, folder: Path) -> None:
    """The second table, into settings.json: one run, whose alignment is made anew for each of SETTINGS."""
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


def gathered(folder: Path, seeds: list[int]) -> dict[str, Any]:
    """The figures of the runs that are there."""
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
    print("| start | step 0 | after stage 1 | after stage 2 |\n| --- | ---: | ---: | ---: |")
    for start, of_seeds in results["starts"].items():
        found = [report["evaluation"] for report in of_seeds.values()]
        cells = [", ".join(f"{one[stage]['bits_per_byte']:.3f}" for one in found) for stage in STAGES]
        print(f"| {start} | {' | '.join(cells)} |")
    print("\n| method | threshold | top_k | coverage | bits per byte |\n| --- | ---: | ---: | ---: | ---: |")
    for row in results["settings"]:
        named = row["method"] in ("procrustes", "relative")
        cells = [str(row["threshold"]), str(row["top_k"])] if named else ["", ""]
        coverage, bits = f"{100 * row['coverage']:.1f} %", f"{row['bits_per_byte']:.3f}"
        print(f"| `{row['method']}` | {cells[0]} | {cells[1]} | {coverage} | {bits} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("ANARCHOBOT_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--source", type=Path, required=True, help="the model that is moved: a run's folder")
    parser.add_argument("--data", type=Path, default=default, help="a folder with text/ and biomedical/")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "vocabulary", help="where the runs lie")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "vocabulary.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs=2, default=[50, 100], help="of stage 1 and stage 2")
    parser.add_argument("--documents", type=int, default=60, help="held-out documents that are measured on")
    parser.add_argument("--read", action="store_true", help="train nothing: the tables of what is there")
    args = parser.parse_args()
    if not args.read:
        args.folder.mkdir(parents=True, exist_ok=True)
        write_texts(args.data, args.folder)
        config = write_config(args.source, args.data, args.folder, tuple(args.steps), args.documents)
        train(args.source, config, args.folder, args.seeds)
        compare_settings(config, args.folder)
    results = gathered(args.folder, args.seeds)
    show(results)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
