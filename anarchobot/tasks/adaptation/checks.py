"""What adapt-vocab refuses before anything is written, and what it warns of."""

from pathlib import Path

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import Loaded
from anarchobot.config.schema import Config, DataConfig, LoraConfig
from anarchobot.config.validation import conflicts
from anarchobot.data.sources.documents import DocumentCounts, from_files
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.tasks.adaptation.evaluation import read_questions
from anarchobot.tokenizers.tokenizer import Tokenizer, load_tokenizer
from anarchobot.vocab.canonical_tokens import forms

PAPERS_LR, PAPERS_TOKENS = 6.4e-4, 2.1e6  # TokAlign's stage 1: its rate belongs to its tokens a step
SAME = 0.95  # of a tokenizer's ids, to be the model's own in another library's file


def check(loaded: Loaded[AdaptConfig], base: PretrainedModel) -> None:
    """Raises UserError when model, tokenizers, files and settings do not belong together."""
    models, length = loaded.config.models, loaded.config.vocab_adaptation.max_seq_length
    for key in ("source_tokenizer", "target_tokenizer"):
        path = getattr(models, key)
        tokenizer = load_tokenizer(path) if path is not None else base.tokenizer
        if key == "source_tokenizer" and tokenizer.vocab_size != base.tokenizer.vocab_size:
            raise UserError(
                f"{loaded.where('models.source_tokenizer')}: {path} has {tokenizer.vocab_size:,} tokens, and the "
                f"model in {base.folder} was trained with {base.tokenizer.vocab_size:,}: leave it out, or name its own"
            )
        if key == "source_tokenizer" and path is not None and _same_tokens(tokenizer, base.tokenizer) < SAME:
            raise UserError(
                f"{loaded.where('models.source_tokenizer')}: {path} has other tokens than the model in {base.folder} "
                "was trained with: leave it out, or name its own"
            )
    if length > base.model.max_seq_len:
        raise UserError(
            f"{loaded.where('vocab_adaptation.max_seq_length')}: {length}, and the model sees at most "
            f"{base.model.max_seq_len} tokens: set it to that, or below"
        )
    _check_adapters(loaded, base)
    evaluation = loaded.config.evaluation
    if evaluation.enabled:
        for name in evaluation.datasets or []:
            if next(from_files([name], DataConfig(), DocumentCounts()), None) is None:
                raise UserError(f"{loaded.where('evaluation.datasets')}: {name}: holds no document")
        if evaluation.qa is not None:
            read_questions(Path(evaluation.qa))
        if evaluation.baseline_model is not None:
            load_pretrained(evaluation.baseline_model)
    if evaluation.enabled and evaluation.datasets is None and loaded.config.corpus.val_fraction == 0:
        raise UserError(
            f"{loaded.where('corpus.val_fraction')}: nothing is held out to evaluate on: raise it, name "
            "evaluation.datasets, or set evaluation.enabled: false"
        )


def _same_tokens(one: Tokenizer, other: Tokenizer) -> float:
    """Share of the ids that are the same token. Not all need be: control tokens are told apart by each library."""
    pairs = list(zip(forms(one), forms(other), strict=True))
    return sum(a.raw == b.raw for a, b in pairs) / len(pairs)


def _check_adapters(loaded: Loaded[AdaptConfig], base: PretrainedModel) -> None:
    training = loaded.config.vocab_adaptation
    if training.enabled and training.stage2_use_lora:
        lora = LoraConfig(r=training.lora_r, target_modules=training.lora_target_modules)
        for keys, problem in conflicts(Config(model=base.model, lora=lora), []):
            if keys == ("lora.target_modules",):
                raise UserError(f"{loaded.where('vocab_adaptation.lora_target_modules')}: {problem}")


def warnings(settings: AdaptConfig) -> list[str]:
    """What is allowed, and most likely no good."""
    training = settings.vocab_adaptation
    tokens = training.batch_size * training.gradient_accumulation * training.max_seq_length
    if training.enabled and training.lr_stage1 >= PAPERS_LR and tokens < PAPERS_TOKENS / 4:
        return [
            f"vocab_adaptation.lr_stage1: {training.lr_stage1:g}, and the paper's {PAPERS_LR:g} belongs to "
            f"{PAPERS_TOKENS / 1e6:g} million tokens a step, where here are {tokens:,}"
        ]
    return []
