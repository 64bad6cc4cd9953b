"""What supervised and preference tuning have in common: a base, its tokenizer and template, and adapters at the end."""

import math
import shutil
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, leaf_keys, load_config
from anarchobot.config.schema import Config, PreferenceConfig
from anarchobot.evaluation.rouge import rouge_package
from anarchobot.exchange.adapters import read_adapter, write_adapter
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.model.lora import is_packed, trained_count
from anarchobot.model.parameters import parameter_count, parameter_shapes
from anarchobot.runs import checkpoint
from anarchobot.tasks.engines import OpenEngine
from anarchobot.tasks.run import Show, Start, execute_run
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import TRAINING_DAY
from anarchobot.tokenizers.conversation import Conversation
from anarchobot.tokenizers.decoding import StopStringFilter
from anarchobot.tokenizers.tokenizer import copy_tokenizer
from anarchobot.training.loop import Run
from anarchobot.training.ranks import Ranks

_DOCUMENTS = (
    *("weights", "score_field", "score_min", "documents", "clean", "min_chars", "max_chars", "dedup", "near_dedup"),
    *("shard_dir", "shard_weights", "pack", "document_mask", "fallback"),
)
_OF_DOCUMENTS = {
    **{f"data.{key}": "is about documents, not conversations" for key in _DOCUMENTS},
    **{f"train.{key}": "is for training on documents (pretrain)" for key in ("trainable", "first_sequence")},
}
_OF_PAIRS = "is about pairs of answers (dpo), not conversations"
_OF_CONVERSATIONS = "is about conversations, not pairs of answers"
_OF_SIGMOID = "is for preference.loss: sigmoid alone"
# What each command, and each loss of preferences, would pass over in silence, and why.
UNUSED = {
    "sft": {**_OF_DOCUMENTS, **{f"preference.{key}": _OF_PAIRS for key in PreferenceConfig.model_fields}},
    "dpo": {
        **_OF_DOCUMENTS,
        **{f"chat.{key}": _OF_CONVERSATIONS for key in ("train_on", "format", "rouge_samples", "pack")},
        "data.text_field": _OF_CONVERSATIONS,
    },
    "sigmoid": {},
    "ipo": {"preference.label_smoothing": _OF_SIGMOID},
    "orpo": {"preference.label_smoothing": _OF_SIGMOID},
}


def load_tuning(path: str | None, overrides: Sequence[str | tuple[str, Any]]) -> LoadedConfig:
    """A configuration whose model section is that of the model in train.init_from."""
    return load_config(path, overrides, base_model=lambda folder: load_pretrained(folder).model)


def check_settings(loaded: LoadedConfig, command: Literal["sft", "dpo"]) -> None:
    """Raises UserError for a setting that the command would pass over in silence, when there is no dataset, and when a
    package is missing that it will need."""
    config, plain = loaded.config, leaf_keys()
    unused = UNUSED[command] | (UNUSED[config.preference.loss] if command == "dpo" else {})
    for key, why in unused.items():
        if attrgetter(key)(config) != plain[key].default:
            raise UserError(f"{loaded.where(key)}: {why}: leave it out")
    if config.chat.rouge_samples:
        try:
            rouge_package()
        except UserError as error:
            raise UserError(f"{loaded.where('chat.rouge_samples')}: {error}, or leave it out") from error
    if config.data.dataset is None:
        raise UserError(
            f"{loaded.where('data.dataset')}: expected what to learn from: JSONL or Parquet files, or a dataset's name"
        )


def identity(digests: list[str], base: PretrainedModel, opened: OpenEngine) -> dict[str, Any]:
    """What a run must find again to be resumed; and what packed weights were unpacked into (exchange/adapters.py)."""
    return {"conversations": digests, "base": base.digest, "precision": opened.precision}


def tune(
    run: Run,
    start: Start,
    opened: OpenEngine,
    base: PretrainedModel,
    encoder: ChatEncoder,
    *,
    told: Sequence[str],
    unit: str,
    prepare: Callable[[Path], object] = lambda folder: None,
    show: Show,
) -> dict[str, Any]:
    """Trains `base`, as it is in the engine, and returns the summary that it also writes.

    `told` are lines on the data, for a person; `unit` is what a batch is of: sequences or pairs. `prepare` is called
    with the run's folder while that is locked and nothing is trained yet. Raises UserError as `execute_run`.
    """

    def beside(folder: Path) -> None:
        copy_tokenizer(base.tokenizer, folder)  # `generate`, `export` and other programs find it there
        encoder.template.save(folder)
        prepare(folder)

    config, trained = run.config, trained_count(run.config.model, run.config.lora)
    warnings = [f"warning: {text}" for text in (*base.warnings, *encoder.warnings())]
    per_step = run.ranks.size * config.train.micro_batch_size * config.train.grad_accum_steps
    epochs = run.steps * per_step / run.train.windows
    length = f"{run.steps:,} steps of {per_step} {unit} = {epochs:.2f} epochs"
    opening = [*_what_is_tuned(config, base, opened, trained, run.ranks), *told, length, *warnings]
    summary = execute_run(run, start, opened, beside=beside, opening=opening, trained=trained, show=show)
    if run.ranks.rank > 0:
        return summary
    summary |= _write_adapters(run, base)
    worse, before = summary["finished"] and summary["best_step"] is None, summary["best_val_loss"]
    if worse and before is not None and show == "progress":
        newest = f": adapters are step {summary['adapters_step']}'s" if "adapters" in summary else ""
        print(f"warning: no step was better than the model as it was ({before:.4f}){newest}", file=sys.stderr)
    return summary


def answer(opened: OpenEngine, encoder: ChatEncoder, conversation: Conversation, config: Config) -> str:
    """What the model says next, as text, on the day of its training: a resumed run says the same."""
    ids = opened.draw(encoder.prompt(conversation, TRAINING_DAY).tolist(), config.generation, encoder.stop())
    text = StopStringFilter(config.generation.stop)
    return (text.add(encoder.tokenizer.decode(ids)) + text.finish()).strip()


def _what_is_tuned(config: Config, base: PretrainedModel, opened: OpenEngine, trained: int, ranks: Ranks) -> list[str]:
    whole, shapes = parameter_count(config.model), parameter_shapes(config.model).values()
    share = sum(math.prod(shape) for shape in shapes if is_packed(shape)) / whole
    adapters = f"adapters of rank {config.lora.r}" if config.lora.r is not None else "all weights"
    packed = f", {share:.1%} of the rest in {config.lora.quantize} bits" if config.lora.quantize else ""
    return [
        f"{base.folder}: {whole:,} parameters, {opened.place}{ranks}",
        f"trained: {adapters}, {trained:,} parameters ({trained / whole:.2%} of the model's){packed}",
    ]


def _write_adapters(run: Run, base: PretrainedModel) -> dict[str, Any]:
    """Puts the best step's adapters (the newest's, where none was better than before) into RUN/adapters, for other
    programs; returns what to add to the summary."""
    model, lora, folder = run.config.model, run.config.lora, run.folder / "adapters"
    if lora.r is None or not checkpoint.saved_steps(run.folder):  # stopped before the first
        return {}
    adapter = read_adapter(run.folder, model)
    shutil.rmtree(folder, ignore_errors=True)
    write_adapter(folder, adapter, model, lora.adapter_format, str(base.folder))
    return {"adapters": str(folder), "adapters_step": adapter.step}
