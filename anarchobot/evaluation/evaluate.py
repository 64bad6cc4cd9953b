"""Evaluates a model on held-out shards, text files, conversation answers (ROUGE) and lm-evaluation-harness tasks."""

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.loading import Override, override
from anarchobot.config.schema import Config, DataConfig
from anarchobot.data.batches import ValBatches
from anarchobot.data.conversations.reading import RowCounts, read_conversations
from anarchobot.data.shards import TokenStream, contains_documents
from anarchobot.data.sources.documents import DocumentCounts, from_files
from anarchobot.data.windows import StreamWindows
from anarchobot.evaluation.loglikelihood import loglikelihoods, rolling_windows
from anarchobot.evaluation.rouge import rouge
from anarchobot.inference.chat import chat_encoder
from anarchobot.inference.generation import NUM_SEEDS, TextBatch
from anarchobot.inference.model import Model, load_model
from anarchobot.model.architecture import forward_pass
from anarchobot.model.frozen import compute_dtype
from anarchobot.model.loss import loss_sum
from anarchobot.runs import checkpoint
from anarchobot.tokenizers.conversation import InvalidRow
from anarchobot.tokenizers.tokenizer import digest

Metrics = dict[str, float]
Log = Callable[[str], None]  # receives progress lines
DOCUMENT_BATCH = 256  # documents scored between progress lines
SHARD_TOKENS = 8192  # per batch of windows
LOG_BATCHES, LOG_ANSWERS = 32, 16  # batches of windows, and answers, between progress lines


@dataclass(frozen=True)
class EvalRequest:
    shards: str | None = None
    texts: Sequence[str] = ()
    rouge: str | None = None
    generation: Sequence[Override] = ()  # for `rouge`, whose answers are greedy by default
    tasks: Sequence[str] = ()
    few_shot: int | None = None
    include: str | None = None  # a folder of custom task files
    limit: int | None = None  # maximum documents, answers or questions per task


def evaluate(
    path: str, request: EvalRequest, log: Log = lambda text: None, base_model: str | None = None
) -> dict[str, Any]:
    """Returns `checkpoint` and `results`, which maps each data set to its metrics. `base_model` is that of the adapters
    at `path`, if not recorded with them. Raises UserError if the model or the data cannot be read or do not match."""
    model, config = load_model(path, base_model)
    results: dict[str, Metrics] = {}
    if request.shards is not None:
        results[f"shards {request.shards}"] = evaluate_shards(model, config, request.shards, log)
    if request.texts:
        trained = training_streams(path, config)
        results[f"text {' '.join(request.texts)}"] = evaluate_texts(model, request.texts, request.limit, log, trained)
    if request.rouge is not None:
        results[f"answers {request.rouge}"] = evaluate_rouge(model, config, request, log)
    if request.tasks:
        results |= evaluate_tasks(model, request, log)
    return {"checkpoint": path, "results": results}


def evaluate_shards(model: Model, config: Config, folder: str, log: Log) -> Metrics:
    """The validation split as in training: windows of data.seq_len over documents and end-of-document tokens."""
    stream = TokenStream(folder, "val")
    if stream.manifest.tokenizer["sha256"] != digest(model.tokenizer):
        raise UserError(
            f"{folder}: tokenized with {stream.manifest.tokenizer['name']}, not the model's tokenizer: "
            "pretokenize again, or evaluate the text itself (--text)"
        )
    seq_len = config.data.seq_len
    windows = StreamWindows(stream, seq_len, config.data.document_mask)
    if windows.count == 0:
        raise UserError(f"{folder}: the validation split is empty: pretokenize with data.val_fraction, or use --text")
    params, shape, forward = model.params, model.config, forward_pass(model.config)
    dtype, nats, tokens = compute_dtype(params), 0.0, 0
    val = ValBatches(windows, max(1, SHARD_TOKENS // seq_len), None)
    for i in range(len(val)):
        batch = val[i]
        segments = None if batch.segments is None else mx.array(batch.segments[0])
        hidden = forward.hidden_states(params, mx.array(batch.inputs[0]), shape, dtype=dtype, segments=segments)
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), mx.array(batch.targets[0].reshape(-1))
        nats += float(np.array(loss_sum(flat, params, targets, shape)))
        tokens += int(np.count_nonzero(batch.targets >= 0))
        if (i + 1) % LOG_BATCHES == 0 or i + 1 == len(val):
            log(f"{tokens:,} tokens, {(i + 1) / len(val):.0%}")
    total_bytes = sum(shard.bytes for shard in stream.manifest.shards_in("val"))
    # The very first token is not scored.
    return _loss_metrics(nats, tokens, total_bytes * tokens / stream.manifest.tokens("val"))


def training_streams(path: str, config: Config) -> list[TokenStream]:
    """The training splits that the run at `path` was pretrained on, as far as they are still there."""
    streams: list[TokenStream] = []
    with suppress(UserError):  # another model than a run
        digests = checkpoint.find(path, files=(checkpoint.MODEL_FILE,)).state.get("shards", ())
        for folder in config.data.shard_dirs if digests else ():
            with suppress(UserError):
                streams.append(TokenStream(folder, "train"))
        streams = [stream for stream in streams if stream.manifest.digest() in digests]
    return streams


def evaluate_texts(
    model: Model, names: Sequence[str], limit: int | None, log: Log, trained: Sequence[TokenStream] = ()
) -> Metrics:
    """Text, JSONL or Parquet files. Documents are scored separately, each token once. With `trained`, the shards that
    the model was trained on, also counts the documents among them."""
    counts, nats, tokens, size = DocumentCounts(), 0.0, 0, 0
    max_seq_len = model.config.max_seq_len
    texts = [document.text for document in islice(from_files(names, DataConfig(), counts), limit)]
    seen = 0
    for start in range(0, len(texts), DOCUMENT_BATCH):
        batch = texts[start : start + DOCUMENT_BATCH]
        ids = model.tokenizer.encode_batch(batch)
        seen += sum(map(any, zip(*(contains_documents(stream, ids) for stream in trained), strict=True)))
        windows = [window for row in ids for window in rolling_windows(row.tolist(), model.bos_id, max_seq_len)]
        nats -= sum(score.log_prob for score in loglikelihoods(model, windows))
        tokens += sum(map(len, ids))
        size += sum(len(text.encode()) for text in batch)
        log(f"{min(start + DOCUMENT_BATCH, len(texts)):,} of {len(texts):,} documents")
    if tokens == 0:
        raise UserError(f"{' '.join(names)}: no documents to evaluate ({counts.read:,} read)")
    for line in counts.details():
        log(line)
    if seen:
        log(f"warning: the model was trained on {seen:,} of these {len(texts):,} documents")
    metrics = _loss_metrics(nats, tokens, size) | {"documents": len(texts)}
    return metrics | {"documents_trained_on": seen} if trained else metrics


def evaluate_rouge(model: Model, config: Config, request: EvalRequest, log: Log) -> Metrics:
    """ROUGE between the last answers of the conversations in `request.rouge` and the model's answers."""
    counts, encoder, name, limit = RowCounts(), chat_encoder(model, config.chat.template), request.rouge, request.limit
    settings = override(config, ["generation"], [("generation.method", "greedy"), *request.generation]).generation
    questions: list[tuple[list[int], str]] = []  # prompt ids and reference answer
    too_long = 0
    for place, conversation in read_conversations(DataConfig(dataset=name), counts):
        if len(questions) + too_long == limit:
            break
        if conversation[-1].role != "assistant":
            continue
        try:
            prompt = encoder.encode_prompt(conversation[:-1]).tolist()
        except InvalidRow as error:
            counts.skip_kept(place, error)
            continue
        if len(prompt) < model.config.max_seq_len:
            questions.append((prompt, conversation[-1].content))
        else:
            too_long += 1
    for line in counts.summary():
        log(line)
    if not questions:
        raise UserError(f"{name}: no answers to compare with ({counts.read:,} rows read)")
    batch = TextBatch(model)
    generated: dict[int, list[str]] = {}
    for i, (ids, _) in enumerate(questions):
        own = settings.model_copy(update={"seed": (settings.seed + i) % NUM_SEEDS})
        generated[batch.insert(ids, own, encoder.stop_ids())] = []
    done = 0
    while batch:
        for chunk in batch.step():
            generated[chunk.request].append(chunk.text)
            if chunk.finish_reason is not None:
                done += 1
                if done % LOG_ANSWERS == 0 or done == len(questions):
                    log(f"{done:,} of {len(questions):,} answers")
    pairs = (
        (reference, "".join(parts).strip()) for (_, reference), parts in zip(questions, generated.values(), strict=True)
    )
    return rouge(pairs) | {"answers": len(questions), "too_long": too_long}


def evaluate_tasks(model: Model, request: EvalRequest, log: Log) -> dict[str, Metrics]:
    """Runs lm-evaluation-harness tasks; each reports its own metrics."""
    try:
        harness = importlib.import_module("lm_eval")
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'anarchobot[harness]'") from error
    from anarchobot.evaluation.harness import HarnessModel

    if request.include is not None and not Path(request.include).is_dir():
        raise UserError(f"--include {request.include}: no such folder: expected a folder with task files (.yaml)")
    manager = tasks.TaskManager(include_path=request.include)
    if unknown := [name for name in request.tasks if not manager.match_tasks([name])]:
        raise UserError(
            f"--tasks {', '.join(unknown)}: unknown task: not in lm-evaluation-harness or in --include "
            f"{request.include or '(not set)'}"
        )
    evaluated = HarnessModel(model)
    report = harness.simple_evaluate(
        evaluated,
        tasks=list(request.tasks),
        num_fewshot=request.few_shot,
        limit=request.limit,
        task_manager=manager,
    )
    if evaluated.unused:
        unused = ", ".join(f"{name}: {value}" for name, value in evaluated.unused.items())
        log(f"warning: settings of the tasks that have no effect here: {unused}")
    return {f"task {name}": _task_metrics(values) for name, values in report["results"].items()}


def _task_metrics(values: dict[str, Any]) -> Metrics:
    """Numeric metrics, without the name of an empty filter: "acc,none" becomes "acc"."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}


def _loss_metrics(nats: float, tokens: int, size: float) -> Metrics:
    """Metrics from the cross-entropy summed over `tokens`, covering `size` bytes of text."""
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "bytes": round(size),
    }


def metrics_table(reports: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a row per metric and a column per model; for two models, also their difference."""
    names = [report["checkpoint"] for report in reports]
    extra = ["difference"] if len(reports) == 2 else []
    lines = [f"| | {' | '.join([*names, *extra])} |", f"| --- |{' ---: |' * len([*names, *extra])}"]
    for dataset in dict.fromkeys(key for report in reports for key in report["results"]):
        results = [report["results"].get(dataset, {}) for report in reports]
        for metric in dict.fromkeys(key for metrics in results for key in metrics):
            values = [metrics.get(metric) for metrics in results]
            cells = [_format(value) for value in values]
            if extra:
                a, b = values
                cells.append("" if a is None or b is None else f"{b - a:+.4g}")
            lines.append(f"| {dataset}: {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _format(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
