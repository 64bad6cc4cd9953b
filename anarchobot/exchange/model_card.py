"""README.md of an export: what the model is, what it was trained on and how that went, and how to load it."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from anarchobot.config.yaml_tree import dump
from anarchobot.exchange.limits import READERS, Target
from anarchobot.exchange.narrowing import Dtype
from anarchobot.model.shapes import parameter_count
from anarchobot.training.checkpoint import Checkpoint

CURVE_WIDTH = 60  # characters
MOST_ROWS = 12  # of validations
_BARS = "▁▂▃▄▅▆▇█"


def model_card(
    name: str, found: Checkpoint, target: Target, dtype: Dtype, tokenizer_sha256: str, notes: list[str]
) -> str:
    """Markdown, with the front matter that model hubs read. `notes` are what its user should know before."""
    config = found.config
    run = found.folder.parent
    logs = Path(config.train.log_path or run / "logs")
    if not logs.is_dir():
        logs = run / "logs"  # the run was moved
    lines = [
        "---",
        f"library_name: {'transformers' if target == 'hf' else READERS[target]}",
        "pipeline_tag: text-generation",
        "tags: [anarchobot]",
        "---",
        "",
        f"# {name}",
        "",
        f"A language model of {parameter_count(config.model):,} parameters, made with AnarchoBot; step {found.step:,} "
        f"of its training, in {dtype}. It goes on from a text; it was not taught to answer or to be safe.",
        "",
        *(f"> {note}\n" for note in notes),
        "## Use",
        "",
        *_use(target),
        "",
        "A text begins and ends with the end-of-document token, as in training; the tokenizer puts it first.",
        "",
        "## Training",
        "",
        *_training(found, logs, tokenizer_sha256),
        "",
        "## Settings",
        "",
        "```yaml",
        dump(config.model_dump()).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _use(target: Target) -> list[str]:
    if target == "gguf":
        return [
            "```sh",
            'llama-completion -m model.gguf -p "Once upon a time"        # llama.cpp',
            "printf 'FROM ./model.gguf\\nTEMPLATE \"{{ .Prompt }}\"\\n' > Modelfile",
            "ollama create my-model -f Modelfile && ollama run my-model   # Ollama",
            "```",
        ]
    return [
        "With transformers (`.` is this folder):",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".")',
        'prompt = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100, do_sample=True)[0]))",
        "```",
        "",
        "With mlx-lm:",
        "",
        "```sh",
        'mlx_lm.generate --model . --prompt "Once upon a time"',
        "```",
        "",
        "For llama.cpp and Ollama: `anarchobot export --to gguf`.",
    ]


def _training(found: Checkpoint, logs: Path, tokenizer_sha256: str) -> Iterator[str]:
    state, config = found.state, found.config
    summary = _summary(logs / "final_training_summary.json")
    events = list(_events(logs / "metrics.jsonl", found.step))
    folders = config.data.shard_dir if isinstance(config.data.shard_dir, list) else [config.data.shard_dir]
    facts: dict[str, Any] = {
        "steps": f"{found.step:,}",
        "tokens": _number(state.get("tokens")),
        "training loss (nats per token)": _number(state.get("loss")),
        "best validation loss (nats per token)": _number(state.get("best_val_loss")),
        "best validation loss (bits per byte)": _number(state.get("best_val_bpb")),
        "time (hours)": _number((state.get("wall_seconds") or 0) / 3600 or None),
        "tokens per second": _number(summary.get("tokens_per_second")),
        "peak memory (GB)": _number(summary.get("peak_memory_gb")),
        "tokenizer (sha256)": f"`{tokenizer_sha256}`",
    }
    for i, digest in enumerate(state.get("shards", [])):
        facts[f"data in `{folders[i] if i < len(folders) else '?'}` (digest of its manifest)"] = f"`{digest}`"
    if source := state.get("imported"):
        facts["imported from"] = f"`{source}`"
    yield "| | |"
    yield "| --- | --- |"
    for what, value in facts.items():
        if value is not None:
            yield f"| {what} | {value} |"
    losses = {e["step"]: float(e["loss"]) for e in events if e["event"] == "train"}
    if len(losses) > 1:
        bars, low, high = sparkline(list(losses.values()))
        yield ""
        yield f"Training loss, steps {min(losses):,} to {max(losses):,}, between {low:.3f} and {high:.3f}:"
        yield ""
        yield f"    {bars}"
    validations = {e["step"]: e for e in events if e["event"] == "eval"}
    if validations:
        yield ""
        yield "| step | validation loss | bits per byte | perplexity |"
        yield "| ---: | ---: | ---: | ---: |"
        for step in _spread(sorted(validations), MOST_ROWS):
            e = validations[step]
            yield f"| {step:,} | {e['val_loss']:.4f} | {e['val_bpb']:.4f} | {e['perplexity']:.2f} |"


def sparkline(values: list[float]) -> tuple[str, float, float]:
    """At most CURVE_WIDTH bars, each the mean of its share of the values, and the means' least and greatest."""
    count = min(CURVE_WIDTH, len(values))
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    steps = (len(_BARS) - 1) / ((high - low) or 1.0)
    return "".join(_BARS[round((mean - low) * steps)] for mean in means), low, high


def _spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly over them, the first and the last included."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _events(file: Path, up_to: int) -> Iterator[dict[str, Any]]:
    """The log's lines up to a step, as far as there is a log; a line torn by a kill is passed over."""
    if not file.is_file():
        return
    for line in file.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("step", 0) <= up_to:
            yield event


def _summary(file: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError):  # the run is still going on, or was stopped hard
        return {}
    return summary


def _number(value: float | int | None) -> str | None:
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value >= 1000 else f"{value:.4f}"
