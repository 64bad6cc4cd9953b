"""Checks of an adaptation before anything is written."""

from pathlib import Path

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import Loaded
from anarchobot.config.schema import Config, DataConfig, LoraConfig
from anarchobot.config.validation import conflicts
from anarchobot.data.sources.documents import DocumentCounts, from_files
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.model.architecture import architecture
from anarchobot.tasks.adaptation.evaluation import read_questions
from anarchobot.tokenizers.canonical_tokens import canonical_tokens
from anarchobot.tokenizers.tokenizer import Tokenizer, load_tokenizer

PAPER_LR, PAPER_STEP_TOKENS = 6.4e-4, 2.1e6  # TokAlign's stage 1
MIN_SAME_TOKENS = 0.95  # fraction of equal ids for a file to count as the model's tokenizer


def check(loaded: Loaded[AdaptConfig], base: PretrainedModel) -> None:
    """Raises UserError if model, tokenizers, files and settings do not match."""
    config = loaded.config
    try:
        architecture(base.model.architecture).with_vocab_size(base.model, base.tokenizer.vocab_size + 1)
    except UserError as error:
        raise UserError(f"{loaded.where('models.source_model')}: {base.name}: {error}") from error
    _check_tokenizers(loaded, base)
    seq_len_is_set = "vocab_adaptation.seq_len" in loaded.sources  # the default is limited to the model's
    if seq_len_is_set and config.vocab_adaptation.seq_len > base.model.max_seq_len:
        raise UserError(
            f"{loaded.where('vocab_adaptation.seq_len')}: {config.vocab_adaptation.seq_len} is above the model's "
            f"max_seq_len ({base.model.max_seq_len}): lower it"
        )
    if config.vocab_adaptation.enabled and config.vocab_adaptation.stage2_use_lora:
        lora = LoraConfig(r=config.vocab_adaptation.lora_r, target_modules=config.vocab_adaptation.lora_target_modules)
        for keys, problem in conflicts(Config(model=base.model, lora=lora), []):
            if keys == ("lora.target_modules",):
                raise UserError(f"{loaded.where('vocab_adaptation.lora_target_modules')}: {problem}")
    if config.evaluation.enabled:
        _check_evaluation(loaded)


def _check_tokenizers(loaded: Loaded[AdaptConfig], base: PretrainedModel) -> None:
    models = loaded.config.models
    if (path := models.source_tokenizer) is not None:
        tokenizer, where = load_tokenizer(path), loaded.where("models.source_tokenizer")
        if tokenizer.vocab_size != base.tokenizer.vocab_size:
            raise UserError(
                f"{where}: {path} has {tokenizer.vocab_size:,} tokens, but the model in {base.name} was trained with "
                f"{base.tokenizer.vocab_size:,}: remove it, or set the model's tokenizer"
            )
        if _same_tokens(tokenizer, base.tokenizer) < MIN_SAME_TOKENS:
            raise UserError(
                f"{where}: {path} has different tokens from the tokenizer of the model in {base.name}: remove it, or "
                "set the model's tokenizer"
            )
    if models.target_tokenizer is not None:
        load_tokenizer(models.target_tokenizer)


def _same_tokens(one: Tokenizer, other: Tokenizer) -> float:
    """Returns the fraction of ids with the same token. Libraries differ in which control tokens they recognize."""
    pairs = list(zip(canonical_tokens(one), canonical_tokens(other), strict=True))
    return sum(a.raw == b.raw for a, b in pairs) / len(pairs)


def _check_evaluation(loaded: Loaded[AdaptConfig]) -> None:
    evaluation = loaded.config.evaluation
    for name in evaluation.datasets or []:
        if next(from_files([name], DataConfig(), DocumentCounts()), None) is None:
            raise UserError(f"{loaded.where('evaluation.datasets')}: {name}: no documents")
    if evaluation.qa is not None:
        read_questions(Path(evaluation.qa))
    if evaluation.baseline_model is not None:
        load_pretrained(evaluation.baseline_model)
    if evaluation.datasets is None and loaded.config.corpus.val_fraction == 0:
        raise UserError(
            f"{loaded.where('corpus.val_fraction')}: no documents are held out for evaluation: raise it, set "
            "evaluation.datasets, or set evaluation.enabled: false"
        )


def warnings(settings: AdaptConfig) -> list[str]:
    """Describes settings that are valid but unlikely to work well."""
    training = settings.vocab_adaptation
    tokens = training.micro_batch_size * training.grad_accum_steps * training.seq_len
    if training.enabled and training.stage1_lr >= PAPER_LR and tokens < PAPER_STEP_TOKENS / 4:
        return [
            f"vocab_adaptation.stage1_lr: {training.stage1_lr:g} is high with {tokens:,} tokens per step; the paper "
            f"uses {PAPER_LR:g} with {PAPER_STEP_TOKENS / 1e6:g} million tokens per step"
        ]
    return []
