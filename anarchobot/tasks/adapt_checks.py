"""What adapt-vocab refuses before anything is written, and what it warns of."""

from pathlib import Path

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import Loaded
from anarchobot.data.sources import files
from anarchobot.data.tokenizer import load_tokenizer
from anarchobot.exchange.bases import Base
from anarchobot.tasks.adapt_evaluation import read_questions

PAPERS_LR, PAPERS_TOKENS = 6.4e-4, 2.1e6  # TokAlign's stage 1: its rate belongs to its tokens a step


def check(loaded: Loaded[AdaptConfig], base: Base) -> None:
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
    if length > base.model.max_seq_len:
        raise UserError(
            f"{loaded.where('vocab_adaptation.max_seq_length')}: {length}, and the model sees at most "
            f"{base.model.max_seq_len} tokens: set it to that, or below"
        )

    evaluation = loaded.config.evaluation
    if evaluation.enabled:
        files.find(evaluation.datasets or [])
        if evaluation.qa is not None:
            read_questions(Path(evaluation.qa))
    if evaluation.enabled and evaluation.datasets is None and loaded.config.corpus.val_fraction == 0:
        raise UserError(
            f"{loaded.where('corpus.val_fraction')}: nothing is held out to evaluate on: raise it, name "
            "evaluation.datasets, or set evaluation.enabled: false"
        )


def warnings(settings: AdaptConfig) -> list[str]:
    """What is allowed, and most likely no good."""
    training = settings.vocab_adaptation
    tokens = training.batch_size * training.gradient_accumulation * training.max_seq_length
    if training.enabled and training.lr_stage1 >= PAPERS_LR and tokens < PAPERS_TOKENS / 4:
        return [
            f"vocab_adaptation.lr_stage1: {training.lr_stage1:g} belongs to {PAPERS_TOKENS / 1e6:g} million tokens a "
            f"step, and here are {tokens:,}"
        ]
    return []
