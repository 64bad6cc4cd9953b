"""Evaluates a model on held-out shards, text files, answers to conversations, preferences and lm-evaluation-harness
tasks."""

import importlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.loading import Override, override
from anarchobot.config.schema import Config, DataConfig, GenerationConfig
from anarchobot.data.batches import ValBatches
from anarchobot.data.conversations.reading import RowCounts, read_conversations, read_pairs
from anarchobot.data.shards import TokenStream, contains_documents
from anarchobot.data.sources import files, hub
from anarchobot.data.sources.documents import DocumentCounts, from_files
from anarchobot.data.windows import StreamWindows
from anarchobot.evaluation.loglikelihood import Ids, loglikelihoods, rolling_windows
from anarchobot.evaluation.metrics import Result, loss_ratios, mean_of
from anarchobot.evaluation.rouge import rouge_scores
from anarchobot.exchange.pretrained import load_with_adapter
from anarchobot.inference.chat import chat_encoder
from anarchobot.inference.generation import NUM_SEEDS, TextBatch
from anarchobot.inference.model import Model, load_model
from anarchobot.model.architecture import forward_pass
from anarchobot.model.frozen import compute_dtype
from anarchobot.model.loss import token_losses
from anarchobot.runs import checkpoint
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.conversation import Conversation, InvalidRow
from anarchobot.tokenizers.tokenizer import digest
from anarchobot.training.display import duration

Log = Callable[[str], None]  # receives progress lines
DOCUMENT_BATCH = 256  # documents scored between progress lines
SHARD_TOKENS = 8192  # per batch of windows
LOG_BATCHES = 32  # batches of windows between progress lines
LOG_SECONDS = 10.0  # between progress lines of answers


@dataclass(frozen=True)
class EvalRequest:
    shards: str | None = None
    texts: Sequence[str] = ()
    chats: str | None = None
    generation: Sequence[Override] = ()  # for the answers to `chats`, which are greedy by default
    preferences: str | None = None
    tasks: Sequence[str] = ()
    few_shot: int | None = None
    include: str | None = None  # a folder of custom task files
    limit: int | None = None  # maximum documents, answers, pairs or questions per task


def check_inputs(paths: Sequence[str], request: EvalRequest, base_model: str | None = None) -> None:
    """Raises UserError if a model or a data set does not exist: before anything is evaluated."""
    for path in paths:
        load_with_adapter(path, base_model)
    if request.shards is not None:
        TokenStream(request.shards, "val")
    files.find(list(request.texts))
    for name in (request.chats, request.preferences):
        if name is not None and not hub.is_hub_name(name):
            files.find([name], formats=files.CONVERSATIONS)


def evaluate(
    path: str, request: EvalRequest, log: Log = lambda text: None, base_model: str | None = None
) -> dict[str, Result]:
    """Returns the result for each data set. `base_model` is that of the adapters at `path`, if not recorded with them.
    Raises UserError if the model or the data cannot be read or do not match."""
    model, config = load_model(path, base_model)
    results: dict[str, Result] = {}
    if request.shards is not None:
        results[f"shards {request.shards}"] = evaluate_shards(model, config, request.shards, log)
    if request.texts:
        result = evaluate_texts(model, request.texts, request.limit, log)
        if trained := training_streams(path, config):
            result.counts["documents_trained_on"] = _count_known(model, request, trained, config, log)
        results[f"text {' '.join(request.texts)}"] = result
    if request.chats is not None:
        results[f"answers {request.chats}"] = evaluate_answers(model, config, request, log)
    if request.preferences is not None:
        name = f"preferences {request.preferences}"
        results[name] = evaluate_preferences(model, config, request.preferences, request.limit, log)
    if request.tasks:
        results |= evaluate_tasks(model, request, log)
    return results


def evaluate_shards(model: Model, config: Config, folder: str, log: Log, max_tokens: int | None = None) -> Result:
    """The validation split, or the windows of its first `max_tokens`, as in training: windows of data.seq_len over
    documents and end-of-document tokens."""
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
    dtype, nats, tokens = compute_dtype(params), list[float](), list[int]()
    limit = None if max_tokens is None else max(1, max_tokens // seq_len)
    val = ValBatches(windows, max(1, SHARD_TOKENS // seq_len), limit)
    for i in range(len(val)):
        batch = val[i]
        segments = None if batch.segments is None else mx.array(batch.segments[0])
        hidden = forward.hidden_states(params, mx.array(batch.inputs[0]), shape, dtype=dtype, segments=segments)
        flat, targets = hidden.reshape(-1, hidden.shape[-1]), mx.array(batch.targets[0].reshape(-1))
        losses = token_losses(flat, params, targets, shape).reshape(batch.targets[0].shape).sum(axis=1)
        nats += np.array(losses, np.float64).tolist()
        tokens += np.count_nonzero(batch.targets[0] >= 0, axis=1).tolist()
        if (i + 1) % LOG_BATCHES == 0 or i + 1 == len(val):
            log(f"{sum(tokens):,} tokens, {(i + 1) / len(val):.0%}")
    scored = [i for i, count in enumerate(tokens) if count]  # the last batch is padded
    total_bytes = sum(shard.bytes for shard in stream.manifest.shards_in("val"))
    # The very first token is not scored.
    bytes_per_token = total_bytes / stream.manifest.tokens("val")
    return _loss_result(
        [f"window {i}" for i in scored], [nats[i] for i in scored], [tokens[i] for i in scored], bytes_per_token
    )


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


def _count_known(model: Model, request: EvalRequest, trained: Sequence[TokenStream], config: Config, log: Log) -> int:
    """How many of the texts are in the shards that the model was trained on, which may have been cleaned."""
    data = DataConfig(clean=config.data.clean)
    documents = [document.text for document in islice(from_files(request.texts, data, DocumentCounts()), request.limit)]
    known = 0
    for start in range(0, len(documents), DOCUMENT_BATCH):
        ids = model.tokenizer.encode_batch(documents[start : start + DOCUMENT_BATCH])
        known += sum(map(any, zip(*(contains_documents(stream, ids) for stream in trained), strict=True)))
    if known:
        log(f"warning: the model was trained on {known:,} of these {len(documents):,} documents")
    return known


def evaluate_texts(
    model: Model,
    names: Sequence[str],
    limit: int | None,
    log: Log,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Result:
    """Text, JSONL or Parquet files. Documents are scored separately, each token once. `progress` is called with the
    fraction of the work that is done."""
    counts, units = DocumentCounts(), list[str]()
    nats, tokens, size = list[float](), list[int](), list[float]()
    max_seq_len = model.config.max_seq_len
    texts = [document.text for document in islice(from_files(names, DataConfig(), counts), limit)]
    for start in range(0, len(texts), DOCUMENT_BATCH):
        batch = texts[start : start + DOCUMENT_BATCH]
        ids = model.tokenizer.encode_batch(batch)
        windows: list[tuple[Ids, Ids]] = []
        for number, (row, text) in enumerate(zip(ids, batch, strict=True), start):
            own = list(rolling_windows(row.tolist(), model.bos_id, max_seq_len))
            units += [f"document {number} window {i}" for i in range(len(own))]
            size += [len(text.encode()) * len(scored) / len(row) for _, scored in own]
            windows += own

        def report(fraction: float, start: int = start, size: int = len(batch)) -> None:
            progress((start + fraction * size) / len(texts))

        nats += [-score.log_prob for score in loglikelihoods(model, windows, report)]
        tokens += [len(scored) for _, scored in windows]
        log(f"{min(start + DOCUMENT_BATCH, len(texts)):,} of {len(texts):,} documents")
    if not tokens:
        raise UserError(f"{' '.join(names)}: no documents to evaluate ({counts.read:,} read)")
    for line in counts.details():
        log(line)
    result = _loss_result(units, nats, tokens, size)
    result.counts["documents"] = len(texts)
    return result


class _Question(NamedTuple):
    """A conversation up to its last answer, `reference`. `scored` are the token ids before and of that answer."""

    place: str
    conversation: Conversation
    prompt: list[int]
    scored: tuple[Ids, Ids]

    @property
    def reference(self) -> str:
        return self.conversation[-1].content


def evaluate_answers(model: Model, config: Config, request: EvalRequest, log: Log) -> Result:
    """The last answers of the conversations in `request.chats`: their loss, and the model's own answers, compared by
    ROUGE if `rouge-score` is installed."""
    counts, encoder = RowCounts(), chat_encoder(model, config.chat.template, "answer")
    settings = override(config, ["generation"], [("generation.method", "greedy"), *request.generation]).generation
    assert request.chats is not None
    questions, too_long = _read_questions(model, encoder, request.chats, request.limit, counts)
    for line in counts.summary():
        log(line)
    if not questions:
        raise UserError(f"{request.chats}: no answers to compare with ({counts.read:,} rows read)")
    nats = [-score.log_prob for score in loglikelihoods(model, [question.scored for question in questions])]
    tokens = [len(question.scored[1]) for question in questions]
    result = Result(
        [question.place for question in questions],
        loss_ratios(nats, tokens, [len(question.reference.encode()) for question in questions]),
    )
    texts = _generate(model, encoder, settings, questions, log)
    rows = zip(questions, texts, strict=True)
    result.answers = [
        {"row": q.place, "question": q.conversation[-2].content, "reference": q.reference, "answer": text}
        for q, text in rows
    ]
    try:
        scores = rouge_scores([(question.reference, text) for question, text in zip(questions, texts, strict=True)])
    except UserError as error:
        log(f"warning: no ROUGE: {error}")
    else:
        result.ratios |= {kind: mean_of(values) for kind, values in scores.items()}
        for answer, score in zip(result.answers, scores["rougeL"], strict=True):
            answer["rougeL"] = score
    result.counts = {"answers": len(questions), "tokens": sum(tokens), "too_long": too_long}
    return result


def _read_questions(
    model: Model, encoder: ChatEncoder, name: str, limit: int | None, counts: RowCounts
) -> tuple[list[_Question], int]:
    """Returns the questions, and how many others do not fit into the context window."""
    questions: list[_Question] = []
    too_long = 0
    for place, conversation in read_conversations(DataConfig(dataset=name), counts):
        if len(questions) + too_long == limit:
            break
        if conversation[-1].role != "assistant":
            continue
        try:
            if not conversation[-1].content:
                raise InvalidRow("the last answer has no text", "only calls")
            prompt = encoder.encode_prompt(conversation[:-1]).tolist()
            scored = _context_and_answer(encoder, conversation)
        except InvalidRow as error:
            counts.skip_kept(place, error)
            continue
        if len(prompt) < model.config.max_seq_len:
            questions.append(_Question(place, conversation, prompt, scored))
        else:
            too_long += 1
    return questions, too_long


def _context_and_answer(encoder: ChatEncoder, conversation: Conversation) -> tuple[Ids, Ids]:
    """Token ids before the last answer, and of it with its end of turn. Raises InvalidRow."""
    (encoded,) = encoder.encode([conversation])
    if isinstance(encoded, InvalidRow):
        raise encoded
    if not encoded.loss_mask.any():
        raise InvalidRow("no loss tokens")
    first, *_, last = np.flatnonzero(encoded.loss_mask).tolist()
    return encoded.ids[:first].tolist(), encoded.ids[first : last + 1].tolist()


def _generate(
    model: Model, encoder: ChatEncoder, settings: GenerationConfig, questions: Sequence[_Question], log: Log
) -> list[str]:
    """The model's answers."""
    batch = TextBatch(model)
    generated: dict[int, list[str]] = {}
    for i, question in enumerate(questions):
        own = settings.model_copy(update={"seed": (settings.seed + i) % NUM_SEEDS})
        generated[batch.insert(question.prompt, own, encoder.stop_ids())] = []
    done, began = 0, time.monotonic()
    logged = began
    while batch:
        for chunk in batch.step():
            generated[chunk.request].append(chunk.text)
            if chunk.finish_reason is not None:
                done += 1
                now = time.monotonic()
                if now - logged > LOG_SECONDS or done == len(questions):
                    left = duration((now - began) / done * (len(questions) - done))
                    log(f"{done:,} of {len(questions):,} answers, {left} left")
                    logged = now
    return ["".join(parts).strip() for parts in generated.values()]


def evaluate_preferences(model: Model, config: Config, name: str, limit: int | None, log: Log) -> Result:
    """Pairs of answers: `accuracy`, the share of pairs whose chosen answer is the more likely one, and the mean
    `log_prob_margin` in nats."""
    counts, encoder = RowCounts(), chat_encoder(model, config.chat.template, "answer")
    units: list[str] = []
    sides: list[tuple[Ids, Ids]] = []
    for place, pair in read_pairs(DataConfig(dataset=name), counts):
        if len(units) == limit:
            break
        try:
            both = [_context_and_answer(encoder, (*pair.prompt, answer)) for answer in (pair.chosen, pair.rejected)]
        except InvalidRow as error:
            counts.skip_kept(place, error)
            continue
        units.append(place)
        sides += both
    for line in counts.summary():
        log(line)
    if not units:
        raise UserError(f"{name}: no preference pairs to score ({counts.read:,} rows read)")
    log_probs = np.array([score.log_prob for score in loglikelihoods(model, sides)]).reshape(-1, 2)
    margins = log_probs[:, 0] - log_probs[:, 1]
    ratios = {"accuracy": mean_of(margins > 0), "log_prob_margin": mean_of(margins)}
    return Result(units, ratios, {"pairs": len(units)})


def evaluate_tasks(model: Model, request: EvalRequest, log: Log) -> dict[str, Result]:
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
    samples = report.get("samples", {})
    return {f"task {name}": _task_result(values, samples.get(name, ())) for name, values in report["results"].items()}


def _task_result(values: dict[str, Any], samples: Sequence[dict[str, Any]]) -> Result:
    """Numeric metrics, without the name of an empty filter: "acc,none" becomes "acc". Those that are means over
    questions have an interval."""
    result = Result()
    for key, value in values.items():
        if not isinstance(value, int | float):
            continue
        metric, _, filter_name = key.partition(",")
        name = key.removesuffix(",none")
        rows = [row for row in samples if row.get("filter", "none") == filter_name]
        scores = [row.get(metric) for row in rows]
        if scores and all(isinstance(score, int | float) for score in scores):
            ratio = mean_of(scores)
            if math.isclose(ratio.mean, value, rel_tol=1e-9, abs_tol=1e-12):
                result.ratios[name] = ratio
                result.units = [f"question {row['doc_id']}" for row in rows]
                continue
        result.counts[name] = float(value)
    return result


def _loss_result(units: list[str], nats: Any, tokens: Any, size: Any) -> Result:
    """`size` is the bytes of each unit, or the bytes per token of all."""
    counts = np.asarray(tokens, np.float64)
    sizes = np.asarray(size, np.float64) if np.ndim(size) else counts * size
    return Result(
        units,
        loss_ratios(nats, counts, sizes),
        {"tokens": int(counts.sum()), "bytes": round(float(sizes.sum()))},
    )
