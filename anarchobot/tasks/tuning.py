"""What supervised and preference tuning have in common: a base, its tokenizer and template, and adapters at the end."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.config.schema import Config, DataConfig
from anarchobot.data.conversations.conversation import Conversation
from anarchobot.data.conversations.masks import ChatEncoder
from anarchobot.data.decoding import StopText
from anarchobot.data.tokenizer import copy_beside
from anarchobot.exchange.adapters import read_adapter, write_adapter
from anarchobot.exchange.bases import Base, open_base
from anarchobot.model.lora import trained_count
from anarchobot.model.shapes import parameter_count
from anarchobot.tasks.engines import OpenEngine
from anarchobot.tasks.running import Start, carry_out
from anarchobot.training import checkpoint
from anarchobot.training.loop import Run

# Of the data section, what is done to documents and shards, and not to conversations.
NOT_OF_CHATS = (
    *("weights", "score_field", "score_min", "documents", "clean", "min_chars", "max_chars", "dedup", "near_dedup"),
    *("shard_dir", "shard_weights", "pack", "document_mask", "fallback"),
)


def load_tuning(path: str | None, overrides: Sequence[str | tuple[str, Any]]) -> LoadedConfig:
    """A configuration whose model section is that of the model in train.init_from."""
    return load_config(path, overrides, base_model=lambda folder: open_base(folder).model)


def check_settings(loaded: LoadedConfig) -> None:
    """Raises UserError for a setting that tuning would pass over in silence, and when there is no dataset."""
    plain, data = DataConfig(), loaded.config.data
    for key in NOT_OF_CHATS:
        if getattr(data, key) != getattr(plain, key):
            raise UserError(f"{loaded.where(f'data.{key}')}: is about documents, not conversations: leave it out")
    if data.dataset is None:
        raise UserError(
            f"{loaded.where('data.dataset')}: expected what to learn from: JSONL or Parquet files, or a dataset's name"
        )


def identity(digests: list[str], base: Base, opened: OpenEngine) -> dict[str, Any]:
    """What a run must find again to be resumed; and what packed weights were unpacked into (exchange/adapters.py)."""
    return {"conversations": digests, "base": base.digest, "precision": opened.precision}


def tune(
    run: Run,
    start: Start,
    opened: OpenEngine,
    base: Base,
    encoder: ChatEncoder,
    *,
    told: Sequence[str],
    prepare: Callable[[Path], object] = lambda folder: None,
    quiet: bool,
) -> dict[str, Any]:
    """Trains `base`, as it is in the engine, and returns the summary that it also writes.

    `told` are lines on data and length, for a person; `prepare` is called with the run's folder while that is locked
    and nothing is trained yet. Raises UserError as `carry_out`.
    """

    def beside(folder: Path) -> None:
        copy_beside(base.tokenizer, folder)  # `generate`, `export` and other programs find it there
        encoder.template.save(folder)
        prepare(folder)

    config, trained = run.config, trained_count(run.config.model, run.config.lora)
    warnings = [f"warning: {text}" for text in (*base.warnings, *encoder.warnings())]
    opening = [*_what_is_tuned(config, base, opened, trained), *told, *warnings]
    summary = carry_out(run, start, opened, beside=beside, opening=opening, trained=trained, quiet=quiet)
    return summary | _write_adapters(run, base)


def answer(opened: OpenEngine, encoder: ChatEncoder, conversation: Conversation, config: Config) -> str:
    """What the model says next, as text."""
    end = encoder.end_of_turn()
    stop = {encoder.tokenizer.eod_id} | ({end} if end is not None else set())
    ids = opened.draw(encoder.prompt(conversation).tolist(), config.generation, stop)
    text = StopText(config.generation.stop)
    return (text.add(encoder.tokenizer.decode(ids)) + text.rest()).strip()


def _what_is_tuned(config: Config, base: Base, opened: OpenEngine, trained: int) -> list[str]:
    whole = parameter_count(config.model)
    adapters = f"adapters of rank {config.lora.r}" if config.lora.r is not None else "all weights"
    packed = f", the rest in {config.lora.quantize} bits" if config.lora.quantize else ""
    return [
        f"{base.folder}: {whole:,} parameters, {opened.place}",
        f"trained: {adapters}, {trained:,} parameters ({trained / whole:.2%} of the model's){packed}",
    ]


def _write_adapters(run: Run, base: Base) -> dict[str, str]:
    """Puts the best step's adapters (the newest's, where none was validated) into RUN/adapters, for other programs;
    returns what to add to the summary."""
    lora = run.config.lora
    if lora.r is None:
        return {}
    best = run.folder / "best.json"
    found = checkpoint.find(best if checkpoint.named_step(best) is not None else run.folder)
    folder = run.folder / "adapters"
    shutil.rmtree(folder, ignore_errors=True)
    write_adapter(folder, read_adapter(found.folder, run.config.model), run.config.model, lora.adapter_format,
                  str(base.folder))  # fmt: skip
    return {"adapters": str(folder)}
