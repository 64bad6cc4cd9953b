"""Renders the README.md of an export: what the model is, how it was trained, and how to load it."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from anarchobot.config.strict_yaml import dump
from anarchobot.exchange.base_model import find_base_model
from anarchobot.exchange.chat_format import ChatFormat
from anarchobot.model.architecture import EXPORT_LIBRARIES, ExportTarget
from anarchobot.model.parameters import parameter_count
from anarchobot.runs.checkpoint import Checkpoint, read_best
from anarchobot.runs.run_log import logs_dir, read_events, read_summary
from anarchobot.tokenizers.tokenizer import Tokenizer, digest

MAX_BARS = 60  # of the training curve
MAX_ROWS = 12  # of the validation table
_BARS = "▁▂▃▄▅▆▇█"


class Curve(NamedTuple):
    """A sparkline of the training loss from step `first` to `last`; its bars range from `low` to `high`."""

    bars: str
    low: float
    high: float
    first: int
    last: int


def model_card(
    name: str,
    saved: Checkpoint,
    program: str,
    target: ExportTarget,
    precision: str,
    tokenizer: Tokenizer,
    chat: ChatFormat | None,
    warnings: list[str],
    stored: dict[str, str],
) -> str:
    """Returns Markdown with the YAML front matter that model hubs read. `program` is the one that the files are for,
    `precision` describes the weights, and `stored` has the rows of a table about the files. Of absolute paths, only the
    last part is shown: a card is made to be published."""
    config, run = saved.config, saved.folder.parent
    logs = logs_dir(run, config.train.log_path)
    if not logs.is_dir():
        logs = run / "logs"  # the run was moved
    events = [event for event in read_events(logs) if event["step"] <= saved.step]
    losses = {event["step"]: float(event["loss"]) for event in events if event["event"] == "train"}
    validations = {event["step"]: event for event in events if event["event"] == "eval"}
    measured = dict.fromkeys(key for event in validations.values() for key in event)
    labels = {"val_loss": "validation loss", "val_bpb": "bits per byte"}
    environment = Environment(  # noqa: S701  Markdown, not HTML
        loader=PackageLoader("anarchobot.exchange", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.jinja").render(
        name=name,
        library=EXPORT_LIBRARIES[target],
        target=target,
        program=program,
        precision=precision,
        stored=stored,
        base=find_base_model(saved),
        parameters=f"{parameter_count(config.model):,}",
        state=saved.state,
        step=saved.step,
        chat=chat,
        bos_id=config.model.bos_id,
        eod_id=tokenizer.eod_id,
        warnings=warnings,
        facts=_facts(saved, list(validations.values()), read_summary(logs), digest(tokenizer)),
        curve=Curve(*sparkline(list(losses.values())), min(losses), max(losses)) if len(losses) > 1 else None,
        metrics={
            key: labels.get(key, key.removeprefix("val_").replace("_", " "))
            for key in measured
            if key not in ("step", "event", "time")
        },
        validations=[validations[step] for step in _evenly_spaced(sorted(validations), MAX_ROWS)],
        settings=dump(_without_folders(config.model_dump())).rstrip(),
    )


def _facts(
    saved: Checkpoint, validations: Sequence[dict[str, Any]], summary: dict[str, Any], tokenizer_sha256: str
) -> dict[str, str | None]:
    """The rows of the training table by label; None for unknown values."""
    state, config = saved.state, saved.config
    # The loss of preference training is a mean over pairs, which has no perplexity.
    unit = "" if validations and all("perplexity" not in event for event in validations) else " (nats per token)"
    loss, bits_per_byte = _best_validation(saved, validations)
    facts = {
        "steps": f"{saved.step:,}" if saved.step else None,
        "tokens": _format(state.get("tokens") or None),
        f"training loss{unit}": _format(state.get("loss")),
        f"best validation loss{unit}": _format(loss),
        "best validation loss (bits per byte)": _format(bits_per_byte),
        "time (hours)": _format((state.get("wall_seconds") or 0) / 3600 or None),
        "tokens per second": _format(summary.get("tokens_per_second")),
        "peak memory (GB)": _format(summary.get("peak_memory_gb")),
        "tokenizer (SHA-256)": f"`{tokenizer_sha256}`",
    }
    for i, sha256 in enumerate(state.get("shards", [])):
        folder = config.data.shard_dirs[i] if i < len(config.data.shard_dirs) else "?"
        facts[f"data in `{_without_folders(folder)}` (SHA-256 of its manifest)"] = f"`{sha256}`"
    if "conversations" in state:
        facts["training data"] = ", ".join(f"`{_without_folders(name)}`" for name in config.data.datasets)
        for label, sha256 in zip(("training data", "validation data"), state["conversations"], strict=False):
            facts[f"{label} (SHA-256)"] = f"`{sha256}`"
    if config.train.init_from is not None:
        facts["initialized from"] = f"`{_without_folders(config.train.init_from)}`"
    if "base" in state:
        facts["initialized from (SHA-256 of the weights)"] = f"`{state['base']}`"
    if config.train.teacher is not None:
        facts["teacher"] = f"`{config.train.teacher}`"
    if "teacher" in state:
        facts["teacher (SHA-256 of the weights)"] = f"`{state['teacher']}`"
    if config.lora.r is not None:
        facts["trained parameters"] = f"adapters of rank {config.lora.r}"
    if "imported" in state:
        facts["imported from"] = f"`{_without_folders(state['imported'])}`"
    if "fused" in state:
        model, adapter = _without_folders(state["fused"])
        facts["fused from"] = f"`{model}` and the adapters in `{adapter}`"
    return facts


def _without_folders(value: Any) -> Any:
    """The value of a setting with the last part of each absolute path in it."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _best_validation(saved: Checkpoint, validations: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Returns the lowest validation loss up to the checkpoint's step, and its bits per byte.

    state.json is written before that step's own validation, which is in the log and, if it was the best, in best.json.
    """
    records = [saved.state, read_best(saved.folder.parent, saved.step) or {}]
    pairs = [(record.get("best_val_loss"), record.get("best_val_bpb")) for record in records]
    pairs += [(event["val_loss"], event.get("val_bpb")) for event in validations]
    known = [(loss, bits_per_byte) for loss, bits_per_byte in pairs if loss is not None and math.isfinite(loss)]
    return min(known, key=lambda pair: pair[0]) if known else (None, None)


def sparkline(values: list[float]) -> tuple[str, float, float]:
    """Returns at most MAX_BARS bars, each the mean of equally many values, and the lowest and highest mean."""
    count = min(MAX_BARS, len(values))
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    steps = (len(_BARS) - 1) / ((high - low) or 1.0)
    return "".join(_BARS[round((mean - low) * steps)] for mean in means), low, high


def _evenly_spaced(steps: list[int], count: int) -> list[int]:
    """Returns at most `count` of the steps, including the first and the last."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _format(value: float | int | None) -> str | None:
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value >= 1000 else f"{value:.4f}"
