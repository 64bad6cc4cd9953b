"""Tokenization of text as it is, in several languages: each library cold and warm, and file to shards.

Every measurement is a new process, on one thread. Cold is its first pass over the text, when the library's caches are
empty, and warm the second. File to shards is everything that `anarchobot pretokenize` does, from the start of the
process. Figures are MB/s of CPU time, medians over rounds; rounds alternate between all measurements.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import tokenizer_engine

from anarchobot.config.loading import load_config
from anarchobot.data.sources import builtin
from anarchobot.tasks.pretokenize import open_corpus
from anarchobot.tokenizers.sentencepiece_to_json import spm_to_json
from anarchobot.tokenizers.tokenizer import HFTokenizer
from anarchobot.tokenizers.training import train_tokenizer

HERE = Path(__file__).parent
DOCUMENT_CHARS = 5000  # where a text is one long file, it is cut into documents of about this length, at ends of lines
VOCAB_SIZE = 32000
MIXED, HALF = "all of them, shuffled", "half of that"

FILES = {
    "English books": [*corpora.BOOKS, "text/books_chapters.jsonl"],
    "English abstracts (PubMed)": ["biomedical/pubmedqa.jsonl"],
    "German novels": ["multilingual/deu_novels.txt"],
    "French novels": ["multilingual/fra_novels.txt"],
    "Ukrainian novels": ["multilingual/ukr_novels.txt"],
    "Japanese novel": ["multilingual/jpn_wagahai.txt"],
}
CODE = "Python code"
REFERENCE = {"SentencePiece": "sentencepiece", "byte-level": "tokenizers"}  # for the two kinds of BPE
PIPELINES = ("reference 1", "auto 1", "fast 1", "reference 2", "auto 2")  # tokenizer.engine, data.num_workers


# Text


def documents(data: Path | None) -> dict[str, list[str]]:
    """The documents of each text. Ends the program with one line if a text can't be downloaded."""
    texts = {name: [d for path in corpora.find(data, *files) for d in read(path)] for name, files in FILES.items()}
    texts[CODE] = list(builtin.texts())
    mixed = [document for of in texts.values() for document in of]
    random.Random(0).shuffle(mixed)
    return {**texts, MIXED: mixed, HALF: mixed[: len(mixed) // 2]}


def read(path: Path) -> Iterator[str]:
    """Of JSONL, all strings of a row that are text."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            for line in file:
                yield " ".join(value for value in json.loads(line).values() if isinstance(value, str))
            return
        document = ""
        for line in file:
            document += line
            if len(document) >= DOCUMENT_CHARS:
                yield document
                document = ""
        yield document


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


# Measurements


def child(python: str, script: str, *arguments: object) -> dict[str, Any]:
    command = [python, str(HERE / script), *map(str, arguments)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def shards(engine: str, workers: str, corpus: str, tokenizer: str, out: str) -> dict[str, Any]:
    """File to shards in this process: seconds of CPU time, with and without start, and the sha256 of all ids."""
    start, wall = time.process_time(), time.perf_counter()
    keys = {
        "tokenizer.engine": engine,
        "data.num_workers": workers,
        "data.val_fraction": 0,
        "data.shard_dir": out,
        "train.tokenizer_path": tokenizer,
    }
    loaded = load_config(None, [f"{key}={value}" for key, value in keys.items()])
    opened = open_corpus(loaded, [corpus], lambda line: None, lambda line: None)
    opened.pretokenize(restart=False, progress=lambda size, tokens: None, log=lambda line: None)
    end, wall = time.process_time(), time.perf_counter() - wall
    ids = np.concatenate([np.load(file) for file in sorted(Path(out).glob("train_*.npy"))])
    sha256 = hashlib.sha256(ids.astype(np.int32).tobytes()).hexdigest()
    return {"cpu_s": end, "without_imports_s": end - start, "wall_s": wall, "sha256": sha256}


def prepare(texts: dict[str, list[str]], folder: Path) -> dict[str, Path]:
    """Writes each text as a list for the libraries and as JSONL for `pretokenize`, and trains the two tokenizers on all
    of them. Returns a path for each text."""
    paths = {name: folder / f"text{i}.json" for i, name in enumerate(texts)}
    for name, path in paths.items():
        path.write_text(json.dumps(texts[name]), encoding="utf-8")
        rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[name])
        path.with_suffix(".jsonl").write_text("".join(rows), encoding="utf-8")
    (spm,) = (p for p in train_tokenizer(texts[MIXED], folder / "SentencePiece", VOCAB_SIZE) if p.suffix == ".model")
    spm.with_suffix(".json").write_text(spm_to_json(spm)[0], encoding="utf-8")
    vocab, merges = train_tokenizer(texts[MIXED], folder / "byte-level", VOCAB_SIZE, file_format="gpt2")
    spec = {**HFTokenizer(vocab, merges).spec(), "added_tokens": []}  # "<|endoftext|>" in a text is text
    (folder / "byte-level.json").write_text(json.dumps(spec), encoding="utf-8")
    return paths


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    texts = documents(args.data)
    paths = prepare(texts, folder)
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        results: dict[str, Any] = {}
        for text in [name for name in texts if name in args.texts]:
            for kind, reference in REFERENCE.items():
                for engine in tokenizer_engine.ENGINES:
                    if engine == "sentencepiece" != reference:
                        continue
                    python = args.python if engine in ("gigatoken", "snaptokens") else sys.executable
                    name = f"{kind}: {engine}: {text}"
                    model = folder / f"{kind}.json"
                    results[name] = child(python, "tokenizer_engine.py", engine, model, paths[text])
                    print(f"round {number + 1}: {name}: {results[name]}", file=sys.stderr)
            for pipeline in PIPELINES:
                workers = int(pipeline.split()[1])
                if workers not in args.workers or (workers > 1 and text != MIXED):
                    continue
                corpus, model = paths[text].with_suffix(".jsonl"), folder / "SentencePiece.model"
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    result = child(
                        sys.executable, "tokenization.py", "--one", *pipeline.split(), corpus, model, f"{out}/shards"
                    )
                results[f"shards: {pipeline}: {text}"] = result
                print(f"round {number + 1}: shards: {pipeline}: {text}: {result}", file=sys.stderr)
        rounds.append(results)
    sizes = {name: megabytes(text) for name, text in texts.items()}
    return {"megabytes": sizes, "rounds": rounds, "load": os.getloadavg(), "cpus": os.cpu_count()}


# Tables


def median(report: dict[str, Any], name: str, key: str) -> float:
    return statistics.median(results[name][key] for results in report["rounds"])


def tables(report: dict[str, Any]) -> str:
    first, texts = report["rounds"][0], report["megabytes"]
    lines = [f"Medians of {len(report['rounds'])} rounds; {report['cpus']} CPUs, load {report['load'][0]:.1f}."]
    for kind, reference in REFERENCE.items():
        names = [engine for engine in tokenizer_engine.ENGINES if any(f"{kind}: {engine}: " in key for key in first)]
        lines += ["", f"{kind} BPE, MB/s of CPU time, cold / warm:", ""]
        lines += [f"| | MB | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
        notes: dict[str, None] = {}
        for text, size in texts.items():
            cells = []
            for engine in names:
                result = first.get(name := f"{kind}: {engine}: {text}")
                if result is None:
                    continue
                if "error" in result:
                    cells.append("-")
                    notes[f"{engine}: {result['error']}"] = None
                    continue
                cold, warm = (size / median(report, name, key) for key in ("cold_s", "warm_s"))
                differs = result["sha256"] != first[f"{kind}: {reference}: {text}"]["sha256"]
                notes |= {f"{engine}: other ids than {reference} on {text}": None} if differs else {}
                cells.append(f"{cold:.1f} / {warm:.1f}")
            if cells and text != HALF:
                lines.append(f"| {text} | {size:.1f} | {' | '.join(cells)} |")
        lines += ["", *(notes or {"All ids are equal.": None})]
    return "\n".join([*lines, "", *shard_table(report)])


def shard_table(report: dict[str, Any]) -> list[str]:
    first = report["rounds"][0]
    lines = ["File to shards, SentencePiece BPE, MB/s of CPU time, start included:", ""]
    lines += [
        "| | MB | reference | fast | auto | auto, times the reference | ids |",
        "| --- |" + " ---: |" * 5 + " --- |",
    ]
    for text, size in report["megabytes"].items():
        if f"shards: auto 1: {text}" not in first or text == HALF:
            continue
        seconds = [median(report, f"shards: {engine} 1: {text}", "cpu_s") for engine in ("reference", "fast", "auto")]
        digests = {
            result["sha256"] for name, result in first.items() if name.startswith("shards") and name.endswith(text)
        }
        speeds = " | ".join(f"{size / s:.1f}" for s in seconds)
        ids = "equal" if len(digests) == 1 else "DIFFER"
        lines.append(f"| {text} | {size:.1f} | {speeds} | {seconds[0] / seconds[2]:.2f} | {ids} |")
    if f"shards: auto 1: {HALF}" in first and f"shards: auto 1: {MIXED}" in first:
        lines += ["", *ratios(report)]
    return lines


def ratios(report: dict[str, Any]) -> list[str]:
    engine = {text: median(report, f"SentencePiece: anarchobot: {text}", "cold_s") for text in (MIXED, HALF)}
    one = {text: median(report, f"shards: auto 1: {text}", "without_imports_s") for text in (MIXED, HALF)}
    lines = [
        f"Of the engine's own speed on {MIXED}: {engine[MIXED] / one[MIXED]:.2f}, and "
        f"{(engine[MIXED] - engine[HALF]) / (one[MIXED] - one[HALF]):.2f} on its second half, where the start and the "
        "comparison of the first million characters no longer count."
    ]
    if f"shards: auto 2: {MIXED}" in report["rounds"][0]:
        for engine_name in ("reference", "auto"):
            walls = [median(report, f"shards: {engine_name} {workers}: {MIXED}", "wall_s") for workers in (1, 2)]
            lines.append(f"Two workers, {engine_name}: {walls[0] / walls[1]:.2f} times one (wall time).")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    corpora.add_argument(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--python", default=sys.executable, help="a Python with gigatoken and snaptokens (default: this one)"
    )
    names = [*FILES, CODE, MIXED, HALF]
    parser.add_argument("--texts", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--workers", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="default: 1 2")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "tokenization.json")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(shards(*args.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = run(args, Path(folder))
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(tables(report))


if __name__ == "__main__":
    main()
