"""What five minutes make of this machine: the protocol of karpathy/autoresearch with `anarchobot train`.

Its data (ClimbMix, whose last shard is for validation) and its measure: bits per byte of the validation shard, in rows
of 2,048 tokens that whole documents fill best, each document after a start token, which is not scored. Two differences:
its five minutes exclude the tokenizer and the tokenization, ours include them; and a document that is cut counts bytes
in proportion to its tokens. Like trevin-creator/autoresearch-mlx, this evaluates on 1.5 million tokens; autoresearch on
an H100, on 21 million.

Published bests of Macs, each after many runs in search of settings: 1.280 on an M4 Max (autoresearch, #351),
1.299 on an M3 Ultra (autoresearch-mlx, #19), 1.555 on an M2, 1.856 on an M3 with 8 GB (autoresearch, #463). Evaluation
budgets differ between ports, so small differences mean nothing. Please attach the printed line to an issue, with the
report of `anarchobot bench --device`.

    .venv/bin/python benchmarks/five_minutes.py                    # downloads two shards; needs pip install pyarrow
    .venv/bin/python benchmarks/five_minutes.py novels --time 60s  # for a CPU: 13 novels, whose ends are for validation
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import train_command

HERE = Path(__file__).parent
HUB = "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main/"
TRAINING, VALIDATION = "shard_00000.parquet", "shard_06542.parquet"
LENGTH, BUFFER = 2048, 1000  # tokens of a row, documents to choose from
Document = tuple[np.ndarray[Any, np.dtype[np.int32]], float]  # ids after the start token, bytes per id


def download(name: str) -> Path:
    """A shard, downloaded once. We know no digest of it, so only its format is checked, when it is read."""
    path = HERE.parent / "build" / "texts" / "climbmix" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {HUB}{name}", file=sys.stderr, flush=True)
        try:
            partial, _ = urllib.request.urlretrieve(HUB + name, path.with_suffix(".part"))
        except OSError as error:
            sys.exit(f"{HUB}{name}: can't download it: {error}: put it at {path}, or use the novels")
        Path(partial).replace(path)
    return path


def climbmix(folder: Path, megabytes: float) -> tuple[Path, list[Path]]:
    """The first megabytes of the training shard as JSONL, and the validation shard."""
    training, validation = download(TRAINING), download(VALIDATION)
    left, texts = 1e6 * megabytes, folder / "texts.jsonl"
    with texts.open("w", encoding="utf-8") as file:
        for text in read(training):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            left -= len(text.encode())
            if left < 0:
                break
    return texts, [validation]


def read(*paths: Path) -> Iterator[str]:
    from anarchobot.config.schema import DataConfig
    from anarchobot.data.sources.documents import DocumentCounts, from_files

    return (document.text for document in from_files([str(path) for path in paths], DataConfig(), DocumentCounts()))


def packed(documents: Iterator[Document], start: int) -> Iterator[tuple[Any, Any, float]]:
    """Inputs and targets [LENGTH] of each row, -1 where the target is a start token, and the bytes that it scores: the
    longest document that fits comes next; where none fits, the shortest is cut."""
    buffer = list(islice(documents, BUFFER))
    while True:
        ids, scored, size = np.empty(LENGTH + 1, np.int32), np.zeros(LENGTH + 1, bool), 0.0
        position = 0
        while position <= LENGTH:
            buffer += islice(documents, BUFFER - len(buffer))
            if not buffer:
                return
            left = LENGTH + 1 - position
            lengths = [len(document) + 1 for document, _ in buffer]
            fitting = [i for i, length in enumerate(lengths) if length <= left]
            i = max(fitting, key=lengths.__getitem__) if fitting else min(range(len(lengths)), key=lengths.__getitem__)
            document, bytes_per_id = buffer.pop(i)
            part = document[: left - 1]
            ids[position], ids[position + 1 : position + 1 + len(part)] = start, part
            scored[position + 1 : position + 1 + len(part)] = True
            size += bytes_per_id * len(part)
            position += 1 + len(part)
        yield ids[:-1], np.where(scored, ids, -1)[1:], size


def bits_per_byte(run: str, validation: list[Path], tokens: int) -> float:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    import mlx.core as mx

    from anarchobot.inference.model import load_model
    from anarchobot.model.architecture import forward_pass
    from anarchobot.model.frozen import compute_dtype
    from anarchobot.model.loss import token_losses

    model, _ = load_model(run)
    forward, nats, size = forward_pass(model.config), 0.0, 0.0

    def documents() -> Iterator[Document]:
        for text in read(*validation):
            (ids,) = model.tokenizer.encode_batch([text])
            yield ids.astype(np.int32), len(text.encode()) / max(1, len(ids))

    for inputs, targets, row_bytes in islice(packed(documents(), model.bos_id), max(1, tokens // LENGTH)):
        hidden = forward.hidden_states(
            model.params, mx.array(inputs)[None], model.config, dtype=compute_dtype(model.params)
        )
        losses = token_losses(hidden.reshape(LENGTH, -1), model.params, mx.array(targets), model.config)
        nats, size = nats + float(losses.sum()), size + row_bytes
    return nats / np.log(2) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", choices=("climbmix", "novels"), default="climbmix")
    corpora.add_argument(parser)
    parser.add_argument("--time", default="5m", help="as of `anarchobot train` (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=100, help="of ClimbMix to train on (default: %(default)s)")
    parser.add_argument("--eval-tokens", type=int, default=3 * 524288, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "five_minutes.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.text == "climbmix":
            texts, validation = climbmix(folder, arguments.megabytes)
        else:
            texts, held_out = train_command.split(corpora.find(arguments.data, *corpora.BOOKS), folder)
            validation = [held_out]
        command = [sys.executable, "-m", "anarchobot", "train", str(texts), "--time", arguments.time, "--json"]
        done = subprocess.run([*command, "--output", str(folder / "run")], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        run = json.loads(done.stdout)["model"]
        import mlx.core as mx

        result = {
            "bits_per_byte": round(bits_per_byte(run, validation, arguments.eval_tokens), 4),
            "text": arguments.text,
            "time": arguments.time,
            "device": mx.device_info()["device_name"],
            "system": f"{platform.system()} {platform.machine()}",
        }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
