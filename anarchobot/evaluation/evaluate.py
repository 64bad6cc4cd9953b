"""What a model is worth: on held-out shards, on texts, on answers, and on the tasks of lm-evaluation-harness."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, DataConfig
from anarchobot.data.batches import ValBatches
from anarchobot.data.conversations.reading import conversations
from anarchobot.data.conversations.tally import Tally
from anarchobot.data.shards import TokenStream
from anarchobot.data.sources.documents import DocumentCounts, from_files
from anarchobot.data.windows import StreamWindows
from anarchobot.evaluation.likelihood import likelihoods, rolling
from anarchobot.evaluation.rouge import rouge
from anarchobot.inference.chat import chat_encoder
from anarchobot.inference.generation import TextBatch
from anarchobot.inference.model import Model, load_model
from anarchobot.model.llama.forward import head_matrix, hidden_states
from anarchobot.model.loss import loss_sum
from anarchobot.tokenizers.conversation import InvalidRow
from anarchobot.tokenizers.tokenizer import digest

Figures = dict[str, float]
UNIT = 256  # documents that are scored before progress is told
SHARD_TOKENS = 8192  # of a batch of windows
BATCHES, ANSWERS = 32, 16  # of windows, and answers, that are done before progress is told


@dataclass(frozen=True)
class What:
    """What to evaluate on; `limit`: at most so many documents, answers or questions of a task. `include`: a folder of
    task files of one's own."""

    shards: str | None = None
    texts: Sequence[str] = ()
    rouge: str | None = None
    tasks: Sequence[str] = ()
    few_shot: int | None = None
    include: str | None = None
    limit: int | None = None


def evaluate(path: str, what: What, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """`checkpoint`, and `results`: figures by what they were measured on. Raises UserError when the model, or what it
    is to be evaluated on, can't be read, or the two do not belong together."""
    model, config = load_model(path)
    results: dict[str, Figures] = {}
    if what.shards is not None:
        results[f"shards {what.shards}"] = of_shards(model, config, what.shards, say)
    if what.texts:
        results[f"text {' '.join(what.texts)}"] = of_texts(model, what.texts, what.limit, say)
    if what.rouge is not None:
        results[f"answers {what.rouge}"] = of_answers(model, config, what.rouge, what.limit, say)
    if what.tasks:
        results |= of_tasks(model, what)
    return {"checkpoint": path, "results": results}


def of_shards(model: Model, config: Config, folder: str, say: Callable[[str], None]) -> Figures:
    """The validation split, as training sees it: windows of data.seq_len over the documents and their ends."""
    stream = TokenStream(folder, "val")
    if stream.manifest.tokenizer["sha256"] != digest(model.tokenizer):
        raise UserError(
            f"{folder}: made with another tokenizer ({stream.manifest.tokenizer['name']}) than the model's: "
            "pretokenize again, or give the text itself (--text)"
        )
    seq_len = config.data.seq_len
    windows = StreamWindows(stream, seq_len, config.data.document_mask)
    if windows.count == 0:
        raise UserError(f"{folder}: the validation split is empty: pretokenize with data.val_fraction, or give --text")
    params, shape = model.params, model.shape
    dtype, nats, tokens = params["model.norm.weight"].dtype, 0.0, 0
    val = ValBatches(windows, max(1, SHARD_TOKENS // seq_len), None)
    for i in range(len(val)):
        batch = val[i]
        segments = None if batch.segments is None else mx.array(batch.segments[0])
        hidden = hidden_states(params, mx.array(batch.inputs[0]), shape, dtype=dtype, segments=segments)
        flat, targets = hidden.reshape(-1, shape.d_model), mx.array(batch.targets[0].reshape(-1))
        nats += float(np.array(loss_sum(flat, head_matrix(params, shape), targets, shape)))
        tokens += int(np.count_nonzero(batch.targets >= 0))
        if (i + 1) % BATCHES == 0 or i + 1 == len(val):
            say(f"{tokens:,} tokens, {(i + 1) / len(val):.0%}")
    size, listed = sum(shard.bytes for shard in stream.manifest.of("val")), stream.manifest.tokens("val")
    return _figures(nats, tokens, size * tokens / listed)  # the first token has nothing before it, and is not scored


def of_texts(model: Model, names: Sequence[str], limit: int | None, say: Callable[[str], None]) -> Figures:
    """Files of text, JSONL or Parquet, each document by itself, each of its tokens scored once."""
    counts, nats, tokens, size = DocumentCounts(), 0.0, 0, 0
    texts = [document.text for document in islice(from_files(names, DataConfig(), counts), limit)]
    for start in range(0, len(texts), UNIT):
        unit = texts[start : start + UNIT]
        ids = model.tokenizer.encode_batch(unit)
        windows = [w for one in ids for w in rolling(one.tolist(), model.begin, model.shape.max_seq_len)]
        nats -= sum(found.log_prob for found in likelihoods(model, windows))
        tokens += sum(map(len, ids))
        size += sum(len(text.encode()) for text in unit)
        say(f"{min(start + UNIT, len(texts)):,} of {len(texts):,} documents")
    if tokens == 0:
        raise UserError(f"{' '.join(names)}: no document is left to evaluate on (read {counts.read:,})")
    return _figures(nats, tokens, size) | {"documents": len(texts)}


def of_answers(model: Model, config: Config, name: str, limit: int | None, say: Callable[[str], None]) -> Figures:
    """ROUGE of the last answers of conversations, each written anew by the likeliest tokens."""
    tally, encoder = Tally(), chat_encoder(model, config.chat.template)
    asked: list[tuple[list[int], str]] = []  # prompts, and what was said
    too_long = 0
    for place, talk in conversations(DataConfig(dataset=name), tally):
        if len(asked) + too_long == limit:
            break
        if talk[-1].role != "assistant":
            continue
        try:
            prompt = encoder.prompt(talk[:-1]).tolist()
        except InvalidRow as misfit:
            tally.take_back(place, misfit)
            continue
        if len(prompt) < model.shape.max_seq_len:
            asked.append((prompt, talk[-1].content))
        else:
            too_long += 1
    for line in tally.lines():
        say(line)
    if not asked:
        raise UserError(f"{name}: no answer is left to compare with (read {tally.read:,})")
    settings = config.generation.model_copy(update={"method": "greedy"})
    batch = TextBatch(model)
    written: dict[int, list[str]] = {batch.insert(prompt, settings, encoder.stop()): [] for prompt, _ in asked}
    done = 0
    while batch:
        for piece in batch.step():
            written[piece.request].append(piece.text)
            if piece.end is not None:
                done += 1
                if done % ANSWERS == 0 or done == len(asked):
                    say(f"{done:,} of {len(asked):,} answers")
    pairs = ((said, "".join(parts).strip()) for (_, said), parts in zip(asked, written.values(), strict=True))
    return rouge(pairs) | {"answers": len(asked), "too_long": too_long}


def of_tasks(model: Model, what: What) -> dict[str, Figures]:
    """Each task's own figures, by lm-evaluation-harness."""
    try:
        harness = importlib.import_module("lm_eval")
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'anarchobot[harness]'") from error
    from anarchobot.evaluation.harness import HarnessModel

    if what.include is not None and not Path(what.include).is_dir():
        raise UserError(f"--include {what.include}: no such folder: expected one with task files (.yaml)")
    manager = tasks.TaskManager(include_path=what.include)
    if unknown := [name for name in what.tasks if not manager.match_tasks([name])]:
        raise UserError(
            f"--tasks {', '.join(unknown)}: no such task in lm-evaluation-harness, nor in --include "
            f"{what.include or '(none)'}"
        )
    found = harness.simple_evaluate(
        HarnessModel(model), tasks=list(what.tasks), num_fewshot=what.few_shot, limit=what.limit, task_manager=manager
    )
    return {f"task {name}": _of_task(figures) for name, figures in found["results"].items()}


def _of_task(figures: dict[str, Any]) -> Figures:
    """Without the filter's name where there is none: "acc,none" is acc."""
    numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


def _figures(nats: float, tokens: int, size: float) -> Figures:
    """Of summed cross-entropy over `tokens`, which stand for `size` bytes of text."""
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": round(size),
    }


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a figure, a column a model; with two models, what the second has more."""
    names = [report["checkpoint"] for report in reports]
    more = ["difference"] if len(reports) == 2 else []
    lines = [f"| | {' | '.join([*names, *more])} |", f"| --- |{' ---: |' * len([*names, *more])}"]
    for what in dict.fromkeys(key for report in reports for key in report["results"]):
        of_each = [report["results"].get(what, {}) for report in reports]
        for key in dict.fromkeys(key for figures in of_each for key in figures):
            values = [figures.get(key) for figures in of_each]
            cells = [_shown(value) for value in values]
            if more:
                a, b = values
                cells.append("" if a is None or b is None else f"{b - a:+.4g}")
            lines.append(f"| {what}: {key} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
