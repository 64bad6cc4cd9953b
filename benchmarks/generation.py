"""Generation speed, compared with `mlx_lm.stream_generate` on the same exported model in one process.

The model has the shape of configs/small.yaml, a vocabulary of 2,048 tokens and random weights, which cost the same as
trained ones. Both programs must generate the same greedy tokens. They alternate, and each ratio compares adjacent runs,
so that other load affects both; all figures are medians. Batched prompts are measured without a comparison.

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
PROMPT_LENGTHS, TOKENS, BATCH_SIZES = (32, 512), 64, (4, 16)


class Run(NamedTuple):
    """`first` is the time to the first token in seconds, `rate` the tokens per second after it."""

    first: float
    rate: float
    tokens: list[int]


def measure(tokens: Iterable[int]) -> Run:
    times, generated = [time.perf_counter()], []
    for token in tokens:
        times.append(time.perf_counter())
        generated.append(token)
    return Run(times[1] - times[0], (len(generated) - 1) / (times[-1] - times[1]), generated)


def export_model(folder: Path, shape_of: str = "small") -> Path:
    """Exports a random model with the shape of a configuration with `--to mlx`."""
    import numpy as np

    from anarchobot.config.loading import load_config
    from anarchobot.data.sources import builtin
    from anarchobot.exchange.exporting import export
    from anarchobot.model.parameters import init_parameters
    from anarchobot.runs.write_model import write_model
    from anarchobot.tokenizers.tokenizer import load_tokenizer
    from anarchobot.tokenizers.training import train_tokenizer

    config = load_config(HERE.parent / "configs" / f"{shape_of}.yaml").config
    texts, size = [], 0
    for text in builtin.topics():
        if size < 4e6:
            texts.append(text)
            size += len(text)
    tokenizer = load_tokenizer(train_tokenizer(texts, folder / "made" / "tokenizer", 2048)[0])
    # mlx-lm would ignore the window.
    shape = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size, "sliding_window": None})
    config = config.model_copy(update={"model": shape})
    run = folder / "run"
    run.mkdir()
    rng = np.random.default_rng(0)
    weights = {
        name: (array + 0.05 * rng.standard_normal(array.shape)).astype(np.float32)
        for name, array in init_parameters(shape, 0).items()
    }
    write_model(run, config, tokenizer, weights, {})
    export(run, "mlx", folder / "mlx")
    return folder / "mlx"


def compare(length: int, ours: list[Run], theirs: list[Run]) -> dict[str, Any]:
    """Summarizes the runs with one prompt length, without the first, which is a warm-up."""
    pairs = list(zip(ours[1:], theirs[1:], strict=True))
    figures: dict[str, Any] = {"prompt": length}
    for name, runs in (("ours", ours[1:]), ("mlx_lm", theirs[1:])):
        figures[f"{name}_tokens_per_second"] = round(statistics.median(r.rate for r in runs), 2)
        figures[f"{name}_prompt_tokens_per_second"] = round(length / statistics.median(r.first for r in runs), 1)
    figures["tokens_ratio"] = round(statistics.median(a.rate / b.rate for a, b in pairs), 3)
    figures["prompt_ratio"] = round(statistics.median(b.first / a.first for a, b in pairs), 3)
    return figures


def table(result: dict[str, Any]) -> str:
    lines = [
        "| prompt tokens | AnarchoBot, tokens/s | mlx-lm, tokens/s | ratio "
        "| AnarchoBot, prompt tokens/s | mlx-lm, prompt tokens/s | ratio |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["one_prompt"]:
        lines.append(
            f"| {row['prompt']} | {row['ours_tokens_per_second']:.1f} | {row['mlx_lm_tokens_per_second']:.1f} "
            f"| {row['tokens_ratio']:.2f} | {row['ours_prompt_tokens_per_second']:.0f} "
            f"| {row['mlx_lm_prompt_tokens_per_second']:.0f} | {row['prompt_ratio']:.2f} |"
        )
    lines += ["", "| batch size | total tokens/s |", "| ---: | ---: |"]
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
        mx.eval(their_model.parameters())  # loads the weights before the folder is removed
    their_tokenizer._eos_token_ids = set()
    greedy = GenerationConfig(method="greedy", max_new_tokens=TOKENS)

    def ours(prompt: list[int]) -> Run:
        stream = TextStream(model.tokenizer, prompt)

        def tokens() -> Iterator[int]:
            for token in stream_token_ids(model.params, model.config, prompt, greedy, ()):
                stream.add(token)  # decodes to text, as stream_generate does
                yield token

        return measure(tokens())

    def theirs(prompt: list[int]) -> Run:
        stream = mlx_lm.stream_generate(their_model, their_tokenizer, prompt, max_tokens=TOKENS)
        return measure(response.token for response in stream)

    def batch_rate(rows: int) -> float:
        """Returns the total tokens per second, without prefill."""
        batch = Batch(model.params, model.config, rows)
        for i in range(rows):
            batch.insert([(i + j) % 1000 + 100 for j in range(8 + i)], greedy, ())
        batch.step()
        start, count = time.perf_counter(), 0
        while batch:
            count += len(batch.step())
        return count / (time.perf_counter() - start)

    one_prompt = []
    for length in PROMPT_LENGTHS:
        prompt = [7 * i % 1000 + 100 for i in range(length)]
        runs: tuple[list[Run], list[Run]] = ([], [])
        for i in range(arguments.rounds + 1):
            for program in (0, 1) if i % 2 else (1, 0):
                runs[program].append((ours, theirs)[program](prompt))
            assert runs[0][-1].tokens == runs[1][-1].tokens, "the two programs generated different tokens"
        one_prompt.append(compare(length, *runs))
    batches = [
        {"rows": rows, "tokens_per_second": round(statistics.median(batch_rate(rows) for _ in range(3)), 1)}
        for rows in BATCH_SIZES
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
