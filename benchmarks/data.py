"""Tokenization speed: the engines, and the whole pipeline from file to shards. `make bench-data`.

Every measurement runs in a fresh process (empty caches). Rounds alternate between all measurements, so that load on a
shared machine affects all of them alike. Figures are medians over rounds, ratios are taken within a round. CPU time is
that of the process with all its threads.
"""

import argparse
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import corpora
import numpy as np

from anarchobot.config.schema import DataConfig
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.sources.documents import DocumentCounts, from_files
from anarchobot.tokenizers.fast_tokenizer import select_engine
from anarchobot.tokenizers.sentencepiece_to_json import spm_to_json
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer

HERE = Path(__file__).parent
BATCH = 200  # documents per call
LONG, TIMES_LONGER = "long", 16  # measures the fast engine on more text, where startup counts less

CHAPTERS = "text/books_chapters.jsonl"
DATATROVE = """
import os, sys, time
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
corpus, model, out = sys.argv[1:]
wall, cpu = time.perf_counter(), sum(os.times()[:4])
LocalPipelineExecutor(
    [
        JsonlReader(*corpus.rsplit("/", 1)[:1], glob_pattern=corpus.rsplit("/", 1)[1]),
        DocumentTokenizer(out, model, eos_token="</s>", shuffle_documents=False),
    ],
    logging_dir=out + "/logs",
).run()
print(sum(os.times()[:4]) - cpu, time.perf_counter() - wall)
"""


# Text


def write_corpus(data: Path | None, path: Path, megabytes: float) -> str:
    """Writes JSONL with documents of about 5 kB; returns a description.

    The prose is repeated as often as needed. In every repetition, documents are cut at other positions and one word in
    25 gets a new number appended, so that a cache of words helps no more than in new text.
    """
    texts = [file.read_text(encoding="utf-8") for file in corpora.find(data, *corpora.PROSE)]
    (chapters,) = corpora.find(data, CHAPTERS)
    texts += read_corpus(chapters)
    prose = "\n\n".join(texts)
    rng, numbers, repeats = random.Random(0), iter(range(10**5, 10**9)), 0
    left = megabytes * 1e6
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            text = prose[repeats * 1237 :] + prose[: repeats * 1237]
            if repeats:
                text = re.sub(r"\w\b", lambda m: m[0] if rng.random() > 0.04 else m[0] + str(next(numbers)), text)
            repeats += 1
            for start in range(0, len(text), 5000):
                document = text[start : start + 5000]
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                left -= len(document.encode())
                if left <= 0:
                    break
    return (
        f"{megabytes:.0f} MB: {len(prose.encode()) / 1e6:.1f} MB of English prose, repeated {repeats} "
        "times with different cuts and a new number appended to one word in 25"
    )


def read_corpus(path: Path) -> list[str]:
    with path.open("rb") as file:
        return [json.loads(line)["text"] for line in file]


# One measurement, in its own process


def measure(name: str, corpus: Path, models: Path, out: Path) -> dict[str, Any]:
    """Returns `timed`'s seconds, the number of tokens, and the sha256 of all ids including ends of documents."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # one thread, as for the other libraries
    kind, _, engine = name.partition(" ")
    model = models / ("gpt2-vocab.json" if "byte-level" in name else "bpe.model")
    if name.endswith(LONG):
        corpus = corpus.with_name("long.jsonl")
    if kind == "pipeline":
        engine, workers = engine.split()[:2]
        return timed(lambda: pipeline(corpus, model, out, engine, int(workers)), shards_digest(out))
    texts = read_corpus(corpus)
    tokenizer = load_tokenizer(model)
    encode: Callable[[list[str]], Iterable[Any]] = tokenizer.encode_batch
    if kind == "fast":
        encode = select_engine(tokenizer, "fast", "stop", lambda line: None).encode_batch
    elif kind == "fastokens":  # the engine alone, without verification
        verified: Any = select_engine(tokenizer, "fast", "stop", lambda line: None)
        encode = verified._encode
    elif kind == "sentencepiece":
        import sentencepiece

        processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(model))

        def encode(texts: list[str]) -> Iterable[Any]:
            return processor.encode(texts, return_type="numpy", num_threads=1)
    elif kind == "tokenizers":
        import tokenizers

        plain: Any = tokenizers.Tokenizer.from_str(spm_to_json(model)[0])

        def encode(texts: list[str]) -> Iterable[Any]:
            return [e.ids for e in plain.encode_batch_fast(texts, add_special_tokens=False)]

    ids: list[Any] = []
    eod = np.array([tokenizer.eod_id], np.int32)

    def digest() -> tuple[str, int]:
        sha, tokens = hashlib.sha256(), 0
        for one in ids:
            sha.update(np.asarray(one, np.int32).tobytes() + eod.tobytes())
            tokens += len(one) + 1
        return sha.hexdigest(), tokens

    return timed(lambda: [ids.extend(encode(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)], digest)


def timed(work: Callable[[], Any], digest: Callable[[], tuple[str, int]]) -> dict[str, Any]:
    """Measures CPU seconds of all threads, CPU seconds of the main thread, and wall seconds."""
    clocks = {"cpu_s": time.process_time, "main_s": time.thread_time, "wall_s": time.perf_counter}
    start = {name: clock() for name, clock in clocks.items()}
    work()
    seconds = {name: clock() - start[name] for name, clock in clocks.items()}
    sha, tokens = digest()
    return {**seconds, "tokens": tokens, "sha256": sha}


def pipeline(corpus: Path, model: Path, out: Path, engine: Any, workers: int) -> None:
    """Everything `anarchobot pretokenize` does, including engine startup and verification."""
    tokenizer = select_engine(load_tokenizer(model), engine, "stop", lambda line: None)
    counts = DocumentCounts()
    documents = from_files([str(corpus)], DataConfig(), counts)
    Pretokenizer(tokenizer, out, val_fraction=0.0, num_workers=workers, counts=counts).run(documents)


def shards_digest(out: Path, glob: str = "train_" + "[0-9]" * 5 + ".npy") -> Callable[[], tuple[str, int]]:
    def digest() -> tuple[str, int]:
        sha, tokens = hashlib.sha256(), 0
        for file in sorted(out.glob(glob)):
            ids = np.load(file) if file.suffix == ".npy" else np.fromfile(file, np.uint16)
            sha.update(ids.astype(np.int32).tobytes())
            tokens += len(ids)
        return sha.hexdigest(), tokens

    return digest


def measure_datatrove(python: str, corpus: Path, models: Path, out: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(models / "bpe.model")
    model = models / "bpe.json"
    model.write_text(spm_to_json(models / "bpe.model")[0].replace(f'"piece {tokenizer.eod_id}"', '"</s>"'))
    completed = subprocess.run(
        [python, "-c", DATATROVE, str(corpus), str(model), str(out)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "RAYON_NUM_THREADS": "1"},
    )
    cpu, wall = map(float, completed.stdout.split()[-2:])
    sha, tokens = shards_digest(out, "*.ds")()
    return {"cpu_s": cpu, "wall_s": wall, "tokens": tokens, "sha256": sha}


# All measurements

# name: label in the table
MEASURED = {
    "sentencepiece": "sentencepiece alone, numpy ids",
    "reference": "AnarchoBot, reference",
    "fastokens": "fastokens alone",
    "fast": "AnarchoBot, fast: fastokens, verified",
    "tokenizers": "tokenizers, `encode_batch_fast`",
    "pipeline reference 1": "file to shards, reference, 1 worker",
    "pipeline reference 2": "file to shards, reference, 2 workers",
    "pipeline fast 1": "file to shards, fast, 1 worker",
    "pipeline fast 2": "file to shards, fast, 2 workers",
    "fastokens long": "longer text: fastokens alone",
    "pipeline fast 1 long": "longer text: file to shards, fast, 1 worker",
    "pipeline fast 2 long": "longer text: file to shards, fast, 2 workers",
    "datatrove": "datatrove, file to `.ds`, 1 task",
    "reference byte-level": "byte-level BPE: AnarchoBot, reference (tokenizers)",
    "fast byte-level": "byte-level BPE: AnarchoBot, fast",
}


RATIO_NAMES = {"fastokens", "pipeline fast 1", *(name for name in MEASURED if name.endswith(LONG))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    corpora.add_argument(parser)
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datatrove", help="a Python with datatrove and tokenizers (default: skip datatrove)")
    parser.add_argument("--only", nargs="+", choices=MEASURED, default=list(MEASURED), help="default: all")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "data.json")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, *paths = args.one
        print(json.dumps(measure(name, *map(Path, paths))))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = run(args, Path(folder))
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    (folder / "corpus").mkdir()
    corpus = folder / "corpus" / "corpus.jsonl"
    text = write_corpus(args.data, corpus, args.megabytes)
    write_corpus(args.data, corpus.with_name("long.jsonl"), TIMES_LONGER * args.megabytes)
    texts = read_corpus(corpus)[:3000]
    train_tokenizer(texts, folder / "bpe", 32000)
    train_tokenizer(texts, folder / "gpt2", 32000, file_format="gpt2")
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        rounds.append({})
        for name in args.only:
            if name == "datatrove" and not args.datatrove:
                continue
            with tempfile.TemporaryDirectory(dir=folder) as out:
                if name == "datatrove":
                    result = measure_datatrove(args.datatrove, corpus, folder, Path(out))
                else:
                    command = [sys.executable, __file__, "--one", name, str(corpus), str(folder), out]
                    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(f"round {number + 1}: {name}: {result['cpu_s']:.2f} s CPU, {result['wall_s']:.2f} s", file=sys.stderr)
            rounds[-1][name] = result
    if not args.datatrove:
        print("datatrove: not measured: set --datatrove to the Python of an environment that has it", file=sys.stderr)
    return {
        "text": text,
        "megabytes": args.megabytes,
        "load": os.getloadavg(),
        "cpus": os.cpu_count(),
        "rounds": rounds,
    }


def table(report: dict[str, Any]) -> str:
    rounds = report["rounds"]

    def median(name: str, of: Callable[[dict[str, Any], dict[str, Any]], float]) -> float:
        return statistics.median(of(r[name], r["sentencepiece"]) for r in rounds)

    lines = [
        f"{report['text']}. Medians of {len(rounds)} rounds; {report['cpus']} CPUs, load {report['load'][0]:.1f}.",
        f"Longer text: {TIMES_LONGER} times as much of it.",
        "",
        "| | MB/s of CPU time | MB/s | times sentencepiece (CPU time) | ids |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, label in MEASURED.items():
        if name not in rounds[0]:
            continue
        baseline = (
            "reference byte-level" if "byte-level" in name else "fastokens long" if LONG in name else "sentencepiece"
        )
        equal = all(r[name]["sha256"] == r[baseline]["sha256"] for r in rounds)
        cpu, wall = (median(name, lambda one, _, key=key: one[key]) for key in ("cpu_s", "wall_s"))
        times = TIMES_LONGER if LONG in name else 1
        size = times * report["megabytes"]
        ratio = times * median(name, lambda one, plain: plain["cpu_s"] / one["cpu_s"])
        ids = "equal" if equal else "DIFFER"
        lines.append(f"| {label} | {size / cpu:.1f} | {size / wall:.1f} | {ratio:.2f} | {ids} |")
    return "\n".join([*lines, "", *(ratios(rounds) if set(rounds[0]) >= RATIO_NAMES else [])])


def ratios(rounds: list[dict[str, Any]]) -> list[str]:
    """The overhead around the fast engine and the gain from a second worker, each within a round."""
    engine, one, two = (f"{name} {LONG}" for name in ("fastokens", "pipeline fast 1", "pipeline fast 2"))

    def median(of: Callable[[dict[str, Any]], float]) -> str:
        return f"{statistics.median(map(of, rounds)):.2f}"

    def increment(r: dict[str, Any], name: str) -> float:
        return float(r[name]["cpu_s"] - r[name.removesuffix(f" {LONG}")]["cpu_s"])

    return [
        f"Fraction of the engine's own speed (CPU time): {median(lambda r: r[engine]['cpu_s'] / r[one]['cpu_s'])} on "
        f"the longer text, {median(lambda r: increment(r, engine) / increment(r, one))} on its additional part.",
        f"Speedup from a second worker on the longer text (wall time): "
        f"{median(lambda r: r[one]['wall_s'] / r[two]['wall_s'])}; the main thread's share of the CPU time: "
        f"{median(lambda r: r[two]['main_s'] / r[two]['cpu_s'])}.",
    ]


if __name__ == "__main__":
    main()
