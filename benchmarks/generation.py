"""Writing text: our generation beside `mlx_lm.stream_generate`, on the same exported model, in one process.

The model has the shape of configs/small.yaml, 2,048 tokens and random weights, which cost what trained ones cost. Both
write the same greedy text, which is checked. They take turns; a ratio is of two turns beside each other, so that what
else the machine does falls on both, and all figures are medians. Several prompts at once are ours alone.

    .venv/bin/python benchmarks/generation.py
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PROMPTS, TOKENS, ROWS = (32, 512), 64, (4, 16)


class Turn(NamedTuple):
    """`first`: seconds to the first token; `rate`: tokens a second behind it."""

    first: float
    rate: float
    tokens: list[int]


def timed(tokens: Iterable[int]) -> Turn:
    times, written = [time.perf_counter()], []
    for token in tokens:
        times.append(time.perf_counter())
        written.append(token)
    return Turn(times[1] - times[0], (len(written) - 1) / (times[-1] - times[1]), written)


def export_model(folder: Path) -> Path:
    """A random model as `export --to mlx` writes it."""
    import numpy as np

    from anarchobot.config.loading import load_config
    from anarchobot.data.sources import builtin
    from anarchobot.exchange.exporting import export
    from anarchobot.model.parameters import init_parameters
    from anarchobot.runs import checkpoint
    from anarchobot.tokenizers.tokenizer import copy_tokenizer, load_tokenizer
    from anarchobot.tokenizers.training import train_tokenizer

    config = load_config(HERE.parent / "configs" / "small.yaml").config
    texts, size = [], 0
    for text in builtin.topics():
        if size < 4e6:
            texts.append(text)
            size += len(text)
    tokenizer = load_tokenizer(train_tokenizer(texts, folder / "made" / "tokenizer", 2048)[0])
    shape = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    config = config.model_copy(update={"model": shape})
    run = folder / "run"
    run.mkdir()
    copy_tokenizer(tokenizer, run)
    rng = np.random.default_rng(0)
    arrays = {
        f"params/{name}": (array + 0.05 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in init_parameters(shape, 0).items()
    }
    checkpoint.save(run, 0, arrays, {"tokens": 0, "config": config.model_dump()})
    export(run, "mlx", folder / "mlx")
    return folder / "mlx"


def compared(length: int, ours: list[Turn], theirs: list[Turn]) -> dict[str, Any]:
    """Figures of one length of prompts; the first round warmed up."""
    pairs = list(zip(ours[1:], theirs[1:], strict=True))
    figures: dict[str, Any] = {"prompt": length}
    for name, turns in (("ours", ours[1:]), ("mlx_lm", theirs[1:])):
        figures[f"{name}_tokens_per_second"] = round(statistics.median(t.rate for t in turns), 2)
        figures[f"{name}_prompt_tokens_per_second"] = round(length / statistics.median(t.first for t in turns), 1)
    figures["tokens_ratio"] = round(statistics.median(a.rate / b.rate for a, b in pairs), 3)
    figures["prompt_ratio"] = round(statistics.median(b.first / a.first for a, b in pairs), 3)
    return figures


def table(result: dict[str, Any]) -> str:
    lines = [
        "| prompt | ours, tokens/s | mlx-lm | ratio | ours, prompt tokens/s | mlx-lm | ratio |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["one_prompt"]:
        lines.append(
            f"| {row['prompt']} | {row['ours_tokens_per_second']:.1f} | {row['mlx_lm_tokens_per_second']:.1f} "
            f"| {row['tokens_ratio']:.2f} | {row['ours_prompt_tokens_per_second']:.0f} "
            f"| {row['mlx_lm_prompt_tokens_per_second']:.0f} | {row['prompt_ratio']:.2f} |"
        )
    lines += ["", "| prompts at once | tokens/s of all |", "| ---: | ---: |"]
    lines += [f"| {row['rows']} | {row['tokens_per_second']:.1f} |" for row in result["batches"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "generation.json")
    arguments = parser.parse_args()
    from anarchobot.system.blas import load_fast_blas

    blas = load_fast_blas()
    import mlx.core as mx
    import mlx_lm

    from anarchobot.config.schema import GenerationConfig
    from anarchobot.inference.batching import Batch
    from anarchobot.inference.generation import stream_token_ids
    from anarchobot.inference.model import load_model
    from anarchobot.tokenizers.decoding import TextStream

    with tempfile.TemporaryDirectory() as folder:
        exported = export_model(Path(folder))
        model, _ = load_model(exported)
        their_model, their_tokenizer = mlx_lm.load(str(exported))[:2]
        mx.eval(their_model.parameters())  # read before the folder is gone
    their_tokenizer._eos_token_ids = set()
    greedy = GenerationConfig(method="greedy", max_new_tokens=TOKENS)

    def ours(prompt: list[int]) -> Turn:
        stream = TextStream(model.tokenizer, prompt)

        def tokens() -> Iterator[int]:
            for token in stream_token_ids(model.params, model.shape, prompt, greedy, ()):
                stream.add(token)  # to text, as stream_generate
                yield token

        return timed(tokens())

    def theirs(prompt: list[int]) -> Turn:
        stream = mlx_lm.stream_generate(their_model, their_tokenizer, prompt, max_tokens=TOKENS)
        return timed(response.token for response in stream)

    def together(rows: int) -> float:
        """Tokens a second of all, behind the prompts."""
        batch = Batch(model.params, model.shape, rows)
        for i in range(rows):
            batch.insert([(i + j) % 1000 + 100 for j in range(8 + i)], greedy, ())
        batch.step()
        began, count = time.perf_counter(), 0
        while batch:
            count += len(batch.step())
        return count / (time.perf_counter() - began)

    one_prompt = []
    for length in PROMPTS:
        prompt = [7 * i % 1000 + 100 for i in range(length)]
        turns: tuple[list[Turn], list[Turn]] = ([], [])
        for number in range(arguments.rounds + 1):
            for who in (0, 1) if number % 2 else (1, 0):
                turns[who].append((ours, theirs)[who](prompt))
            assert turns[0][-1].tokens == turns[1][-1].tokens, "the two wrote other tokens"
        one_prompt.append(compared(length, *turns))
    batches = [
        {"rows": rows, "tokens_per_second": round(statistics.median(together(rows) for _ in range(3)), 1)}
        for rows in ROWS
    ]
    result = {
        "device": str(mx.default_device()),
        "cores": os.cpu_count(),
        "blas": blas is not None,
        "mlx_lm": mlx_lm.__version__,
        "parameters": sum(p.size for p in model.params.values()),
        "tokens": TOKENS,
        "rounds": arguments.rounds,
        "one_prompt": one_prompt,
        "batches": batches,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
