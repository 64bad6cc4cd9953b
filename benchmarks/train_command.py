"""`anarchobot train` compared with settings made by hand, in the same time: bits per byte of text that neither saw.

For each corpus, the last twentieth of each file is held out. `train` gets the rest and the time. Each hand-made
configuration gets as many steps as fit: its tokenizer and shards are made and its steps timed first, within the time.
The best step by validation is judged, of both. The runs take turns. Needs a quiet machine, and about
TIME x ROUNDS x (1 + number of hand-made configurations) per corpus.

    .venv/bin/python benchmarks/train_command.py --time 5m
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import corpora

HERE = Path(__file__).parent
CORPORA = {
    "botchan, 0.3 MB": ["text/botchan_en.txt"],
    "chapters, 2.7 MB": ["text/books_chapters.jsonl"],
    "books, 5.6 MB": corpora.BOOKS,
    "all, 10 MB": [*corpora.PROSE, "text/books_chapters.jsonl"],
}
HELD_OUT = 0.05
# What an experienced user would try: `train` has to come within 2% of the best of them.
BASE: dict[str, Any] = {
    "model.dropout": 0.0, "model.max_seq_len": 512, "model.sliding_window": 128, "model.tie_embeddings": False,
    "data.seq_len": 128,
    "train.micro_batch_size": 8, "train.grad_accum_steps": 1, "train.lr": 8e-3, "train.min_lr": 0.0,
    "train.momentum": 0.9, "train.schedule": "wsd", "train.decay_fraction": 0.7, "train.warmup_steps": 30,
    "train.eval_interval": 200, "train.eval_batches": 20, "train.ckpt_interval": 200,
}  # fmt: skip
HAND_MADE: dict[str, dict[str, Any]] = {
    "4 x 64": {"model.n_layers": 4, "model.d_model": 64, "model.vocab_size": 1024},
    "4 x 128, as quickstart": {"model.n_layers": 4, "model.d_model": 128, "model.vocab_size": 1024},
    "4 x 128, vocabulary 2,048": {"model.n_layers": 4, "model.d_model": 128, "model.vocab_size": 2048},
    "4 x 128, vocabulary 4,096": {"model.n_layers": 4, "model.d_model": 128, "model.vocab_size": 4096},
    "4 x 96, vocabulary 4,096, MLP of 2 x width": {
        "model.n_layers": 4, "model.d_model": 96, "model.vocab_size": 4096, "model.mlp_multiple": 2,
    },
    "4 x 96, vocabulary 512, dropout 0.1, weight decay 1.6": {
        "model.n_layers": 4, "model.d_model": 96, "model.vocab_size": 512, "model.dropout": 0.1,
        "train.weight_decay": 1.6,
    },
}  # fmt: skip
MAX_EPOCHS = 10
RESERVED = 3.0  # seconds for the start of the program, the last validation and checkpoint


def split(paths: list[Path], folder: Path) -> tuple[Path, Path]:
    """Writes the files without their last twentieth into a folder, and the text of the rest into a file. Licenses of
    Project Gutenberg, which are at the ends of books, are removed first."""
    from anarchobot.config.schema import DataConfig
    from anarchobot.data.sources.documents import DocumentCounts, from_files

    texts = folder / "texts"
    texts.mkdir()
    rest = []
    for path in paths:
        documents = [document.text for document in from_files([str(path)], DataConfig(clean=True), DocumentCounts())]
        is_text = path.suffix == ".txt"
        parts = documents[0].splitlines(keepends=True) if is_text else documents
        cut = max(1, int(len(parts) * (1 - HELD_OUT)))
        lines = parts[:cut] if is_text else [json.dumps({"text": text}) + "\n" for text in parts[:cut]]
        (texts / path.name).write_text("".join(lines), encoding="utf-8")
        rest.append(("" if is_text else "\n").join(parts[cut:]))
    held_out = folder / "held_out.txt"
    held_out.write_text("\n".join(rest), encoding="utf-8")
    return texts, held_out


def anarchobot(*words: str) -> Any:
    command = [sys.executable, "-m", "anarchobot", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout)


def train_by_command(texts: Path, folder: Path, seconds: float) -> Path:
    return Path(anarchobot("train", str(texts), "--time", f"{seconds:g}s", "--output", str(folder))["model"])


def train_by_hand(name: str, texts: Path, folder: Path, seconds: float) -> Path:
    from anarchobot.config.loading import load_config
    from anarchobot.data.shards import read_manifest
    from anarchobot.tasks.calibration import step_seconds

    began = time.monotonic()
    folder.mkdir()
    width = HAND_MADE[name]["model.d_model"]
    settings = {
        **BASE, **HAND_MADE[name], "model.n_heads": width // 32, "model.embedding_scale": round(width**0.5, 1),
        "data.dataset": str(texts), "data.val_fraction": 0.02, "data.shard_dir": str(folder / "shards"),
        "train.tokenizer_path": str(folder / "shards" / "tokenizer.model"), "train.save_dir": str(folder / "run"),
    }  # fmt: skip
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    anarchobot("tokenizer", "train", *words)
    anarchobot("pretokenize", *words)
    config = load_config(None, list(settings.items())).config
    step, _ = step_seconds(config, None, config.train.micro_batch_size, 1e11, 4.0)
    left = seconds - RESERVED - (time.monotonic() - began)
    windows = read_manifest(folder / "shards").tokens("train") // config.data.seq_len
    steps = min(int(left / step / 1.04), MAX_EPOCHS * windows // config.train.micro_batch_size)
    file = folder / "config.yaml"
    file.write_text("")
    anarchobot("pretrain", str(file), *words, f"train.total_steps={max(10, steps)}")
    return folder / "run" / "best.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora.add_argument(parser)
    parser.add_argument("--time", default="5m", help="as of `anarchobot train` (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA), choices=list(CORPORA), help="default: all")
    parser.add_argument("--runs", nargs="*", default=list(HAND_MADE), choices=list(HAND_MADE), help="default: all")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "train_command.json")
    arguments = parser.parse_args()
    from anarchobot.cli.train import parse_seconds

    seconds = parse_seconds(arguments.time)
    rows = []
    for corpus in arguments.corpora:
        files = corpora.find(arguments.data, *CORPORA[corpus])
        for round_number in range(arguments.rounds):
            for name in ("train", *arguments.runs):
                with tempfile.TemporaryDirectory() as temporary:
                    folder = Path(temporary)
                    texts, held_out = split(files, folder)
                    began = time.monotonic()
                    if name == "train":
                        run = train_by_command(texts, folder / "run", seconds)
                    else:
                        run = train_by_hand(name, texts, folder / "run", seconds)
                    wall = time.monotonic() - began
                    found = anarchobot("evaluate", "--checkpoint", str(run), "--text", str(held_out))
                (metrics,) = found["results"].values()
                row = {
                    "corpus": corpus, "round": round_number, "name": name, "seconds": round(wall, 1),
                    "bits_per_byte": round(metrics["bits_per_byte"], 4),
                }  # fmt: skip
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print("| corpus | run | seconds | bits per byte |\n| --- | --- | ---: | ---: |")
    for row in rows:
        print(f"| {row['corpus']} | {row['name']} | {row['seconds']:.0f} | {row['bits_per_byte']:.4f} |")


if __name__ == "__main__":
    main()
