"""Encodes a list of documents twice with one tokenizer library, on one thread, and prints the CPU time as JSON.

Run by tokenization.py in a new process, so that the first pass is cold. It needs only NumPy and that library, so
another Python than the project's can run it.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 200  # documents per call

Encode = Callable[[list[str]], Iterable[Any]]


def sentencepiece(model: Path) -> Encode:
    processor = import_module("sentencepiece").SentencePieceProcessor(model_file=str(model.with_suffix(".model")))
    return lambda texts: processor.encode(texts, return_type="numpy", num_threads=1)


def tokenizers(model: Path) -> Encode:
    tokenizer = import_module("tokenizers").Tokenizer.from_str(model.read_text(encoding="utf-8"))
    return lambda texts: [np.array(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def fastokens(model: Path) -> Encode:
    tokenizer = import_module("fastokens").Tokenizer.from_json_str(model.read_text(encoding="utf-8"))
    return lambda texts: _split(*tokenizer.encode_batch_flat(texts))


def snaptokens(model: Path) -> Encode:
    tokenizer = import_module("snaptokens").Tokenizer.from_json_str(model.read_text(encoding="utf-8"))
    return lambda texts: _split(*tokenizer.encode_batch_flat(texts))


def gigatoken(model: Path) -> Encode:
    tokenizer = import_module("gigatoken").Tokenizer.from_json(model.read_text(encoding="utf-8"))
    awkward = import_module("awkward")

    def encode(texts: list[str]) -> Iterable[Any]:
        ragged = awkward.to_layout(tokenizer.encode_batch(texts, parallel=False))
        return [ragged.content.data[start:end] for start, end in pairwise(ragged.offsets.data.tolist())]

    return encode


def anarchobot(model: Path) -> Encode:
    """The engine that `tokenizer.engine: fast` uses, without the comparison with the reference."""
    loading = import_module("anarchobot.tokenizers.tokenizer")
    engines = import_module("anarchobot.tokenizers.fast_tokenizer")
    files = (model.with_suffix(".model"), model.with_name(f"{model.stem}-vocab.json"))
    tokenizer = loading.load_tokenizer(next(file for file in files if file.is_file()))
    encode: Encode = engines.select_engine(tokenizer, "fast", "stop", lambda line: None)._encode
    return encode


ENGINES = {load.__name__: load for load in (sentencepiece, anarchobot, fastokens, snaptokens, gigatoken, tokenizers)}


def _split(ids: bytes, offsets: bytes) -> list[Any]:
    flat = np.frombuffer(ids, np.uint32)
    return [flat[start:end] for start, end in pairwise(np.frombuffer(offsets, np.uint64).tolist())]


def measure(engine: str, model: Path, texts: list[str]) -> dict[str, Any]:
    """Seconds of CPU time for each of two passes, and the sha256 of all ids. Loading, which includes the first call for
    one letter, is not counted."""
    encode, passes, ids = ENGINES[engine](model), [], list[Any]()
    list(encode(["a"]))
    for _ in range(2):
        ids = []
        start = time.process_time()
        for i in range(0, len(texts), BATCH):
            ids.extend(encode(texts[i : i + BATCH]))
        passes.append(time.process_time() - start)
    sha = hashlib.sha256()
    for one in ids:
        sha.update(np.asarray(one, np.int32).tobytes() + b"\xff" * 4)
    package = "fastokens" if engine == "anarchobot" else engine
    return {"cold_s": passes[0], "warm_s": passes[1], "sha256": sha.hexdigest(), "version": version(package)}


if __name__ == "__main__":
    for variable in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):
        os.environ[variable] = "1"  # read at a library's first call
    name, model_path, texts_path = sys.argv[1:]
    try:
        print(json.dumps(measure(name, Path(model_path), json.loads(Path(texts_path).read_text(encoding="utf-8")))))
    except ModuleNotFoundError as error:
        print(json.dumps({"error": f"not installed: {error.name}"}))
    except Exception as error:  # a library that can't load this tokenizer says so in an exception of its own
        print(json.dumps({"error": f"can't load this tokenizer: {' '.join(str(error).split())[:100]}"}))
