"""`anarchobot train`: from texts to a model in a given time, by the same tasks that the other commands run.

The plan is made once. It is kept in the output folder: config.yaml has the settings, train.json what was asked for. The
same command resumes: each stage that is already complete is skipped.

The number of steps becomes final after the first part of the run, when the real speed is known: until then the
learning rate is constant, as it is at the beginning of the wsd schedule for any number of steps.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.config.schema import DataConfig
from anarchobot.config.strict_yaml import dump, parse
from anarchobot.config.templates import DEFAULT_CONFIGS
from anarchobot.config.wording import count
from anarchobot.data.conversations.reading import RowCounts, read_conversations
from anarchobot.data.shards import read_manifest
from anarchobot.data.sources import files
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.exchange.fusing import fuse
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.reporting.html_report import render_report
from anarchobot.runs import checkpoint
from anarchobot.runs.run_log import logs_dir, read_run, read_summary
from anarchobot.storage.durable import write_atomic
from anarchobot.system.micro_batch import resolve_micro_batch
from anarchobot.tasks import supervise, training_samples
from anarchobot.tasks.finetuning import load_tuning_config
from anarchobot.tasks.pace import warn_if_late
from anarchobot.tasks.pretokenize import open_corpus, open_documents
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.run import OutputMode, describe_skipped
from anarchobot.tasks.sft import sft
from anarchobot.tasks.training_plan import (
    ADAPTER_EPOCHS,
    FIRST_PART,
    VALIDATIONS,
    Plan,
    Sections,
    measure,
    overrides,
    plan_adapters,
    plan_new_model,
)
from anarchobot.tasks.training_rule import DECAY_FRACTION, MAX_EPOCHS, bytes_per_token
from anarchobot.tokenizers.training import limit_bytes, train_tokenizer
from anarchobot.training.display import duration

Log = Callable[[str], None]

CONFIG, REQUEST, SAMPLES, REPORT, FUSED = "config.yaml", "train.json", "samples.txt", "report.html", "fused"
CHAT_SHARE = 0.2  # of the time, for conversations
CHAT_EPOCHS = 3.0
END_SHARE, END_SECONDS = 0.02, 2.0  # of the time, reserved for the last validation, samples and the report
LATE = 0.2  # of the time: a longer delay is reported
SUPERVISED = 3600.0  # seconds from which a run is resumed if it crashes
# Fine-tuning of all weights, as in configs/tuning/sft.yaml, but with the learning rate of pretraining: a model that was
# trained for minutes has to learn more than one that is to keep what it knows.
FULL_TUNING: Sections = {
    "train": {
        "micro_batch_size": 8, "grad_accum_steps": 1, "min_lr": 0.0, "schedule": "cosine",
        "warmup_steps": 20, "patience": 5, "ckpt_interval": 10**6,
    },
    "data": {"seq_len": 512, "val_fraction": 0.05},
}  # fmt: skip


class Stopped(Exception):
    """A stage was asked to stop, and has saved its state."""


@dataclass(frozen=True)
class Request:
    """What the user asks for. `texts` may be empty if there are a `model` and a `chat`."""

    texts: list[str]
    seconds: float
    chat: str | None
    model: str | None
    output: Path

    def as_json(self) -> dict[str, Any]:
        """To compare with an earlier request. Raises UserError for a file that does not exist."""
        chat = [] if self.chat is None else [self.chat]
        return {
            "texts": _fingerprint(self.texts, files.DOCUMENTS),
            "time": f"{self.seconds:g} s",
            "chat": _fingerprint(chat, files.CONVERSATIONS),
            "model": self.model,
        }


def _fingerprint(names: list[str], formats: files.Formats) -> str | None:
    """Names, number and size of the files, such as `notes (12 files, 34,567 bytes)`."""
    if not names:
        return None
    paths = files.find(names, formats=formats)
    total = sum(path.stat().st_size for path in paths)
    return f"{' '.join(names)} ({count(len(paths), 'file')}, {total:,} bytes)"


def plan(request: Request, started: float) -> Plan:
    """`started`: when the command began, by time.monotonic(). Raises UserError if text or time are too short, there is
    no conversation in `chat`, or `model` is not a model."""
    end = started + _training_seconds(request)
    chat_notes = [] if request.chat is None else _check_conversations(request.chat)
    if not request.texts:
        load_pretrained(str(request.model))
        found = Plan({}, [("model", f"{request.model}, adapters of rank 8")])
    elif request.model is not None:
        found = plan_adapters(request.model, request.texts, request.output, end, request.seconds)
    else:
        found = plan_new_model(request.texts, request.output, end, request.seconds)
    if request.chat is not None:
        epochs = _expected_chat_epochs(request, found)
        expected = f"at most {CHAT_EPOCHS:g}" if epochs is None else f"about {epochs:.1f}"
        share = "the last fifth" if request.texts else "all"
        row = f"{request.chat}: {expected} epochs, in {share} of {duration(request.seconds)}"
        if epochs is not None and epochs < 1:
            chat_notes.append(_too_few_epochs(request, epochs))
        found = replace(found, table=[*found.table, ("chat", row)], notes=[*found.notes, *chat_notes])
    return found


def _expected_chat_epochs(request: Request, plan: Plan) -> float | None:
    """From the speed of training on the texts; None without any."""
    if plan.step_seconds is None or not plan.sections:
        return None
    data, train = plan.sections["data"], plan.sections["train"]
    tokens_per_second = train["grad_accum_steps"] * data["seq_len"] / plan.step_seconds
    seconds = (CHAT_SHARE - END_SHARE) * request.seconds - END_SECONDS
    epochs: float = min(
        CHAT_EPOCHS, seconds * tokens_per_second / _chat_tokens(request, plan.sections["model"]["vocab_size"])
    )
    return epochs


def _chat_tokens(request: Request, vocab_size: int) -> float:
    size = sum(path.stat().st_size for path in files.find([str(request.chat)], formats=files.CONVERSATIONS))
    return size / bytes_per_token(vocab_size)


def _too_few_epochs(request: Request, epochs: float) -> str:
    return f"warning: {request.chat}: time for {epochs:.2g} epochs only: for better answers, give more --time"


def _check_conversations(name: str) -> list[str]:
    """What was read and skipped. Raises UserError if there is no conversation."""
    counts = RowCounts()
    for _ in read_conversations(DataConfig(dataset=name), counts):
        pass
    if not counts.kept:
        raise UserError(f"{name}: no conversation can be used: {'; '.join(counts.summary())}")
    return counts.summary()


def commands(request: Request) -> Iterator[str]:
    """The commands that do the same, one step at a time."""
    config = request.output / CONFIG
    if request.texts:
        if request.model is None:
            yield f"anarchobot tokenizer train {config}"
        yield f"anarchobot pretokenize {config}"
        yield f"anarchobot pretrain {config}"
        yield f"anarchobot report {request.output}"
    if request.texts and request.chat and request.model:
        yield f"anarchobot fuse --model {request.model} --adapter {request.output} --output {request.output / FUSED}"
    if request.chat:
        yield f"anarchobot sft {_chat_folder(request) / CONFIG}"
        if not request.texts:
            yield f"anarchobot report {request.output}"


def planned(output: Path) -> tuple[float | None, str | None]:
    """The time and the conversations that the plan in the output folder was made for; None if there is no plan."""
    if not (output / REQUEST).exists():
        return None, None
    request = _read_state(output)["request"]
    chat = None if request["chat"] is None else request["chat"].rpartition(" (")[0]
    return float(request["time"].removesuffix(" s")), chat


def is_started(request: Request, log: Log) -> bool:
    """Whether the output folder has a plan. Raises UserError if the plan was made for another request, or a file of
    the request does not exist. Other conversations may take the place of those in the plan until tuning begins; they
    are named."""
    now, file = request.as_json(), request.output / REQUEST
    if not file.exists():
        if request.output.exists() and any(request.output.iterdir()):
            raise UserError(f"{request.output}: already exists and is not empty: choose another folder with --output")
        return False
    state = _read_state(request.output)
    before = state["request"]
    if before["chat"] != now["chat"] and request.texts and not (_chat_folder(request) / CONFIG).exists():
        log(f"conversations: {now['chat']}; before: {before['chat'] or 'none'}")
        before = before | {"chat": now["chat"]}
    changed = [
        f"{key} was {before[key] or 'none'}, is now {now[key] or 'none'}" for key in now if before[key] != now[key]
    ]
    if changed:
        raise UserError(
            f"{request.output}: was started with other arguments: {'; '.join(changed)}: choose another folder with "
            f"--output, or delete {request.output} to start over{_sft_again(request, before, now)}"
        )
    return True


def _sft_again(request: Request, before: dict[str, Any], now: dict[str, Any]) -> str:
    """How to fine-tune the same model on other conversations, if only those have changed."""
    config = _chat_folder(request) / CONFIG
    if not request.chat or not config.exists() or any(before[key] != now[key] for key in now if key != "chat"):
        return ""
    folder = request.output.with_name(f"{request.output.name}-chat")
    command = f"anarchobot sft {config} --dataset {request.chat} --checkpoint-dir {folder}"
    return f"; for another chat model of the same texts: {command}"


def start(request: Request, plan: Plan) -> None:
    """Writes the plan into the output folder. The request is written last."""
    sections = plan.sections
    request.output.mkdir(parents=True, exist_ok=True)
    if request.texts:
        train = sections["train"]
        first = max(1, round(FIRST_PART * train["total_steps"]))
        train = {**train, "total_steps": first, "schedule": "constant", "supervise": request.seconds > SUPERVISED}
        write_atomic(request.output / CONFIG, dump({**sections, "train": train}))
    found = {"step_seconds": plan.step_seconds, "not_read": plan.not_read}
    _write_state(request.output, {"request": request.as_json(), "preparation_seconds": None, **found})


def train(request: Request, started: float, show: OutputMode, log: Log) -> dict[str, Any]:
    """Carries out the plan in the output folder, and returns the files written, and the best validation with that of
    the model that training began with (`..._before`; None for a new model).

    Raises Stopped after a stop request; the same call resumes.
    """
    _update_state(request.output, request=request.as_json())
    result: dict[str, Any] = dict.fromkeys(
        ("model", "best_val_bpb", "val_bpb_before", "chat", "chat_val_loss", "chat_val_loss_before")
    )
    if request.texts:
        result |= _pretrain(request, started, show, log) | {"model": _best(request, request.output)}
        if request.model is not None:
            result["val_bpb_before"] = _first_validation(request.output, "val_bpb")
    if request.chat is not None:
        summary = _chat(request, started, show, log)
        result |= {"chat": _best(request, _chat_folder(request)), "chat_val_loss": summary["best_val_loss"]}
        result["chat_val_loss_before"] = _first_validation(_chat_folder(request), "val_loss")
    if not is_finished(request):
        log("writing samples and the report")
    files = {"samples": str(_write_samples(request, result["chat"])), "report": str(_write_report(request))}
    return result | files | {"not_read": _read_state(request.output)["not_read"]}


def _first_validation(run: Path, metric: str) -> float | None:
    points = read_run(run).points("eval", metric)
    return points[0][1] if points else None


def _training_seconds(request: Request) -> float:
    """Until the end of pretraining."""
    share = 1.0 - (CHAT_SHARE if request.chat is not None else 0.0)
    return share * request.seconds - END_SHARE * request.seconds - END_SECONDS


def _seconds_left(request: Request, summary: dict[str, Any]) -> float:
    """Until the end of pretraining, after the part of it that has the `summary`."""
    used: float = _read_state(request.output)["preparation_seconds"] + summary["wall_seconds"]
    return _training_seconds(request) - used


def _pretrain(request: Request, started: float, show: OutputMode, log: Log) -> dict[str, Any]:
    path = request.output / CONFIG
    loaded = load_config(path)
    _make_shards(loaded, log)
    if _read_state(request.output)["preparation_seconds"] is None:
        _update_state(request.output, preparation_seconds=time.monotonic() - started)
    if loaded.config.train.schedule == "constant":
        first = count(loaded.config.train.total_steps, "step")
        log(f"the first {first} measure the speed, from which the length of the run follows")
    summary = _run("pretrain", path, request, show, log)
    if load_config(path).config.train.schedule == "constant":
        steps = _set_length(request, path, summary)
        left = (steps - summary["steps"]) * summary["wall_seconds"] / summary["steps"]
        log(f"the run has {count(steps, 'step')}: about {duration(left)} left")
        late = left - _seconds_left(request, summary)
        if late > LATE * request.seconds:
            log(f"warning: it ends {duration(late)} late, because steps take much longer than when they were measured")
        summary = _run("pretrain", path, request, show, log)
    if skipped := describe_skipped(summary):
        log(skipped)
    return {"best_val_bpb": summary["best_val_bpb"], "steps": summary["steps"], "parameters": summary["parameters"]}


def _make_shards(loaded: LoadedConfig, log: Log) -> None:
    config = loaded.config
    data, tokenizer = config.data, Path(str(config.train.tokenizer_path))
    if (Path(str(data.shard_dir)) / "manifest.json").exists():
        return
    if not tokenizer.exists():
        texts = (document.text for document in open_documents(config, None, DocumentCounts(), log)[1])
        train_tokenizer(
            limit_bytes(texts, config.tokenizer.max_train_mb, [0]), tokenizer.with_suffix(""), config.model.vocab_size
        )
    corpus = open_corpus(loaded, None, lambda line: None, log)
    corpus.pretokenize(restart=False, progress=lambda size, tokens: None, log=log)


def _set_length(request: Request, path: Path, summary: dict[str, Any]) -> int:
    """Writes the final number of steps, from the speed of the first part, into config.yaml, and returns it."""
    config = load_config(path).config
    resolved = resolve_micro_batch(load_config(path)).loaded.config.train
    sequences = resolved.micro_batch_size * resolved.grad_accum_steps
    first, step_seconds = summary["steps"], summary["wall_seconds"] / summary["steps"]
    tokens = read_manifest(str(config.data.shard_dir)).tokens("train")
    epochs = MAX_EPOCHS if request.model is None else ADAPTER_EPOCHS
    most = max(2 * first, int(epochs * tokens / (sequences * config.data.seq_len)))
    steps: int = min(most, max(first + first // 10 + 1, first + int(_seconds_left(request, summary) / step_seconds)))
    values = config.model_dump()
    values["train"] |= {
        "total_steps": steps,
        "schedule": "wsd",
        "decay_fraction": round(min(DECAY_FRACTION, 1 - first / steps), 4),
        "eval_interval": max(1, steps // VALIDATIONS),
        "log_interval": max(1, min(25, steps // 40)),
    }
    _update_state(request.output, step_seconds=step_seconds)
    write_atomic(path, dump(values))
    return steps


def _run(
    command: Literal["pretrain", "sft"], path: Path, request: Request, show: OutputMode, log: Log
) -> dict[str, Any]:
    """Trains or resumes the run of a config.yaml, up to its last step; returns the summary."""
    tuning = command == "sft"
    loaded = (load_tuning_config if tuning else load_config)(str(path), [("train.checkpoint_path", "auto")])
    train = loaded.config.train
    logs = logs_dir(Path(train.save_dir), None)
    summary = read_summary(logs)
    if summary.get("finished") and (tuning or summary["steps"] >= train.total_steps):
        return summary
    is_final = train.schedule != "constant" or tuning
    step_seconds = _read_state(request.output)["step_seconds"] or math.inf
    with warn_if_late(path.parent, step_seconds, LATE * request.seconds, is_final, log):
        if supervise.should_supervise(loaded.config, tuning=tuning):
            mode = "--quiet" if show == "nothing" else f"--{show}"
            words = [sys.executable, "-P", "-m", "anarchobot", command, str(path), "--resume-from", "auto", mode]
            code = supervise.supervise(words, resolve_micro_batch(loaded).loaded.config.train)
            if code not in (0, 130):
                raise UserError(f"{path}: training failed: see the message above")
            summary = read_summary(logs)
        else:
            summary = (sft if tuning else pretrain)(loaded, show=show)
    if not summary.get("finished"):
        raise Stopped
    return summary


def _chat(request: Request, started: float, show: OutputMode, log: Log) -> dict[str, Any]:
    """Fine-tunes on the conversations in what is left of the time, or CHAT_SHARE of it if that is more; returns the
    summary."""
    folder = _chat_folder(request)
    path = folder / CONFIG
    if not path.exists():
        base = _chat_base(request)
        folder.mkdir(parents=True, exist_ok=True)
        sections, step_seconds = _chat_sections(request, base, started)
        log(f"fine-tuning on {request.chat}: {sections['train']['epochs']:.2g} epochs")
        _update_state(request.output, step_seconds=step_seconds)
        write_atomic(path, dump(sections))
    return _run("sft", path, request, show, log)


def _chat_base(request: Request) -> str:
    """The model to fine-tune: adapters that were trained on the texts are merged into their base first."""
    if request.model is None:
        return _best(request, request.output)
    if not request.texts:
        return request.model
    fused = request.output / FUSED
    if not fused.exists():
        fuse(request.model, request.output, fused)
    return str(fused)


def _chat_sections(request: Request, model: str, started: float) -> tuple[Sections, float]:
    """The settings, and the expected seconds per step."""
    if request.model is None:
        sections = FULL_TUNING
    else:
        default = Path(DEFAULT_CONFIGS["sft"])
        sections = parse(default.read_bytes(), str(default)).values
    base = load_pretrained(model)
    seq_len = min(sections["data"]["seq_len"], base.model.max_seq_len)
    train = {**sections["train"], "init_from": model, "save_dir": str(_chat_folder(request)), "ckpt_minutes": 5.0}
    if request.model is None:
        train["lr"] = load_config(request.output / CONFIG).config.train.lr
    settings: Sections = {
        **sections,
        "data": {**sections["data"], "dataset": request.chat, "seq_len": seq_len},
        "train": train,
    }
    sequences = train["micro_batch_size"] * train["grad_accum_steps"]
    if request.texts:
        summary = read_summary(logs_dir(request.output, None))
        used = _read_state(request.output)["preparation_seconds"] + summary["wall_seconds"]
        tokens_per_second = summary["tokens_per_second"]
    else:
        loaded = load_tuning_config(None, overrides(settings))
        tokens_per_second = sequences * seq_len / measure(loaded, base)
        used = time.monotonic() - started
    tokens = _chat_tokens(request, base.model.vocab_size)
    share = CHAT_SHARE if request.texts else 1.0
    left = max(share * request.seconds, request.seconds - used) - END_SHARE * request.seconds - END_SECONDS
    epochs = min(CHAT_EPOCHS, max(1.0, left) * tokens_per_second / tokens)
    steps = math.ceil(epochs * tokens / (sequences * seq_len))
    train |= {
        "epochs": round(epochs, 3) or 0.001,
        "warmup_steps": min(train["warmup_steps"], steps // 10),
        "eval_interval": max(10, min(50, steps // VALIDATIONS)),
        "supervise": request.seconds > SUPERVISED,
    }
    return settings | {"train": train}, sequences * seq_len / tokens_per_second


def _best(request: Request, run: Path) -> str:
    """What to give as --checkpoint: the best step, if there was a validation. A run of adapters stands for its best
    step."""
    best = run / checkpoint.BEST
    return str(best if request.model is None and best.exists() else run)


def _chat_folder(request: Request) -> Path:
    return request.output / "chat" if request.texts else request.output


def is_finished(request: Request) -> bool:
    """Whether the samples of the last stage and the report are written, which is done last."""
    folder = _chat_folder(request) if request.chat else request.output
    return (folder / SAMPLES).exists() and (request.output / REPORT).exists()


def _write_samples(request: Request, chat: str | None) -> Path:
    """Answers of the `chat` model, if there is one; continuations by a model that was trained on texts."""
    file = request.output / SAMPLES
    if request.texts and not file.exists():
        write_atomic(file, training_samples.continuations(_best(request, request.output)))
    if chat is not None and not (file := _chat_folder(request) / SAMPLES).exists():
        write_atomic(file, training_samples.answers(chat))
    return file


def _write_report(request: Request) -> Path:
    file = request.output / REPORT
    folders = dict.fromkeys([request.output, *([_chat_folder(request)] if request.chat is not None else [])])
    write_atomic(file, render_report([read_run(folder) for folder in folders]))
    return file


def _read_state(output: Path) -> dict[str, Any]:
    """`step_seconds`: what a training step is expected to take, or None; `not_read`: messages about files."""
    state: dict[str, Any] = json.loads((output / REQUEST).read_text(encoding="utf-8"))
    return {"step_seconds": None, "not_read": []} | state


def _update_state(output: Path, **values: Any) -> None:
    _write_state(output, _read_state(output) | values)


def _write_state(output: Path, state: dict[str, Any]) -> None:
    write_atomic(output / REQUEST, json.dumps(state, indent=1, ensure_ascii=False) + "\n")
