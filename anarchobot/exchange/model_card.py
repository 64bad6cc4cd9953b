"""README.md of an export: what the model is, what it was trained on and how that went, and how to load it."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from anarchobot.config.schema import Config
from anarchobot.config.strict_yaml import dump
from anarchobot.exchange.chat_format import Chat
from anarchobot.exchange.targets import READERS, Target
from anarchobot.exchange.dtypes import Dtype
from anarchobot.model.parameters import parameter_count
from anarchobot.runs.checkpoint import Checkpoint, read_best
from anarchobot.runs.run_log import logs_dir, read_events, read_summary
from anarchobot.tokenizers.tokenizer import Tokenizer, digest

CURVE_WIDTH = 60  # characters
MOST_ROWS = 12  # of validations
_BARS = "▁▂▃▄▅▆▇█"


def model_card(
    name: str,
    found: Checkpoint,
    target: Target,
    dtype: Dtype,
    tokenizer: Tokenizer,
    chat: Chat | None,
    notes: list[str],
) -> str:
    """Markdown, with the front matter that model hubs read. `notes` are what its user should know before."""
    config = found.config
    run = found.folder.parent
    logs = logs_dir(run, config.train.log_path)
    if not logs.is_dir():
        logs = run / "logs"  # the run was moved
    lines = [
        "---",
        f"library_name: {'transformers' if target == 'hf' else READERS[target]}",
        "pipeline_tag: text-generation",
        f"tags: [anarchobot{'' if chat is None else ', conversational'}]",
        "---",
        "",
        f"# {name}",
        "",
        f"A language model of {parameter_count(config.model):,} parameters, {_origin(found)}, in {dtype}. "
        + _abilities(found, chat),
        "",
        *(f"> {note}\n" for note in notes),
        "## Use",
        "",
        *_use(target, chat),
        "",
        _bounds(config.model.bos_id, tokenizer, chat, target),
        "",
        "## Training",
        "",
        *_training(found, logs, digest(tokenizer)),
        "",
        "## Settings",
        "",
        "```yaml",
        dump(config.model_dump()).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _origin(found: Checkpoint) -> str:
    state = found.state
    if "imported" in state:
        return "brought into AnarchoBot from another program, and not trained there"
    if "fused" in state:
        return "joined by AnarchoBot from a model and its adapters"
    how = "tuned" if "conversations" in state else "made"
    return f"{how} with AnarchoBot; step {found.step:,} of its training"


def _abilities(found: Checkpoint, chat: Chat | None) -> str:
    ability = "goes on from a text" if chat is None else "answers in conversations, by its chat template"
    if "imported" in found.state or "fused" in found.state:
        return f"It {ability}."  # what else it was taught before is not known
    return f"It {ability}; it was not taught {'to answer or ' if chat is None else ''}to be safe."


def _bounds(bos_id: int | None, tokenizer: Tokenizer, chat: Chat | None, target: Target) -> str:
    """What stands at both ends of a text."""
    # A GGUF file has one setting for texts and conversations.
    puts = target != "gguf" or chat is None or chat.begins is not None
    who = (
        "the tokenizer puts it first" if puts else "the tokenizer does not put it first, as none begins a conversation"
    )
    if bos_id is None:
        text = f"A text begins and ends with the end-of-document token, as in training; {who}."
    else:
        text = (
            f"A text begins with token {bos_id} and ends with the end-of-document token, {tokenizer.eod_id}, as in "
            f"training; {who}."
        )
    if chat is None:
        return text
    ends = " or ".join(map(str, chat.ends))
    return f"{text} A conversation is as the chat template writes it; an answer ends with token {ends}."


def _use(target: Target, chat: Chat | None) -> list[str]:
    if target == "gguf":
        return [*_use_gguf(chat)]
    asked = [
        'prompt = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100, do_sample=True)[0]))",
    ]
    if chat is not None:
        asked = [
            'messages = [{"role": "user", "content": "How are you?"}]',
            "prompt = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
            "out = model.generate(**prompt, max_new_tokens=200, do_sample=True)",
            'print(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    return [
        "With transformers (`.` is this folder):",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".")',
        *asked,
        "```",
        "",
        "With mlx-lm:",
        "",
        "```sh",
        f'mlx_lm.generate --model . --prompt "{"Once upon a time" if chat is None else "How are you?"}"',
        "```",
        "",
        "For llama.cpp and Ollama: `anarchobot export --to gguf`.",
    ]


def _use_gguf(chat: Chat | None) -> Iterator[str]:
    yield "```sh"
    if chat is None:
        yield 'llama-completion -m model.gguf -p "Once upon a time"        # llama.cpp'
        yield "printf 'FROM ./model.gguf\\nTEMPLATE \"{{ .Prompt }}\"\\n' > Modelfile"
    else:
        yield "llama-cli -m model.gguf --jinja                             # llama.cpp"
        yield "printf 'FROM ./model.gguf\\n' > Modelfile"
    yield "ollama create my-model -f Modelfile && ollama run my-model   # Ollama"
    yield "```"
    if chat is not None:
        yield ""
        yield (
            "Ollama has templates of its own kind and knows the most common ones by their Jinja (`ollama show "
            "--modelfile my-model` says what it took); for another, write TEMPLATE in the Modelfile after "
            "`tokenizer.chat_template`."
        )


def _training(found: Checkpoint, logs: Path, tokenizer_sha256: str) -> Iterator[str]:
    state, config = found.state, found.config
    summary = read_summary(logs)
    events = [event for event in read_events(logs) if event["step"] <= found.step]
    validations = {e["step"]: e for e in events if e["event"] == "eval"}
    loss, bits = _best(found, list(validations.values()))
    # Of pairs of answers the loss is a mean over pairs, and has no perplexity.
    unit = "" if validations and all("perplexity" not in e for e in validations.values()) else " (nats per token)"
    facts: dict[str, Any] = {
        "steps": f"{found.step:,}" if found.step else None,
        "tokens": _number(state.get("tokens") or None),
        f"training loss{unit}": _number(state.get("loss")),
        f"best validation loss{unit}": _number(loss),
        "best validation loss (bits per byte)": _number(bits),
        "time (hours)": _number((state.get("wall_seconds") or 0) / 3600 or None),
        "tokens per second": _number(summary.get("tokens_per_second")),
        "peak memory (GB)": _number(summary.get("peak_memory_gb")),
        "tokenizer (sha256)": f"`{tokenizer_sha256}`",
        **_sources(state, config),
    }
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
    if validations:
        yield ""
        yield from _table(validations)


def _best(found: Checkpoint, validations: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The least validation loss up to the checkpoint's step, and its bits per byte. state.json was written before that
    step's own validation, which is in the log and, when it was the best, in best.json."""
    told = [found.state, read_best(found.folder.parent, found.step) or {}]
    pairs = [(best.get("best_val_loss"), best.get("best_val_bpb")) for best in told]
    pairs += [(e["val_loss"], e.get("val_bpb")) for e in validations]
    known = [(loss, bits) for loss, bits in pairs if loss is not None and math.isfinite(loss)]
    return min(known, key=lambda pair: pair[0]) if known else (None, None)


def _sources(state: dict[str, Any], config: Config) -> dict[str, str]:
    """What the model was made from."""
    folders = config.data.shard_dir if isinstance(config.data.shard_dir, list) else [config.data.shard_dir]
    facts = {}
    for i, sha in enumerate(state.get("shards", [])):
        facts[f"data in `{folders[i] if i < len(folders) else '?'}` (digest of its manifest)"] = f"`{sha}`"
    if "conversations" in state:
        dataset = config.data.dataset
        names = dataset if isinstance(dataset, list) else [str(dataset)]
        facts["learnt from"] = ", ".join(f"`{name}`" for name in names)
        for what, sha in zip(("learnt from", "held out"), state["conversations"], strict=False):
            facts[f"{what} (digest)"] = f"`{sha}`"
    if config.train.init_from is not None:
        facts["began as"] = f"`{config.train.init_from}`"
    if "base" in state:
        facts["began as (digest of its weights)"] = f"`{state['base']}`"
    if config.lora.r is not None:
        facts["trained"] = f"adapters of rank {config.lora.r}"
    if "imported" in state:
        facts["imported from"] = f"`{state['imported']}`"
    if "fused" in state:
        model, adapter = state["fused"]
        facts["joined from"] = f"`{model}` and the adapters in `{adapter}`"
    return facts


def _table(validations: dict[int, dict[str, Any]]) -> Iterator[str]:
    """A row a validation, with all that they measured."""
    measured = dict.fromkeys(key for e in validations.values() for key in e if key not in ("step", "event", "time"))
    names = {"val_loss": "validation loss", "val_bpb": "bits per byte"}
    heads = [names.get(key, key.removeprefix("val_").replace("_", " ")) for key in measured]
    yield f"| step | {' | '.join(heads)} |"
    yield "| ---: |" + " ---: |" * len(heads)
    for step in _spread(sorted(validations), MOST_ROWS):
        e = validations[step]
        cells = (f"{e[key]:.{2 if key == 'perplexity' else 4}f}" if key in e else "" for key in measured)
        yield f"| {step:,} | {' | '.join(cells)} |"


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


def _number(value: float | int | None) -> str | None:
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value >= 1000 else f"{value:.4f}"
