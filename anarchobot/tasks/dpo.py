"""Preference tuning: a model learns which of two answers is better, by DPO, IPO or ORPO."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.data.batches import Prefetcher
from anarchobot.data.conversations.pairs import Pairs, PairTrainBatches, PairValBatches
from anarchobot.data.conversations.reading import pairs
from anarchobot.data.conversations.tally import Tally
from anarchobot.data.conversations.tokenization import tokenised_pairs
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.optim.schedule import total_steps
from anarchobot.system.micro_batch import resolve_micro_batch
from anarchobot.tasks.engines import open_preference_engine
from anarchobot.tasks.finetuning import answer, check_settings, identity, tune
from anarchobot.tasks.reference import reference_of
from anarchobot.tasks.run import Show, find_start
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.conversation import Message
from anarchobot.training.loop import Run
from anarchobot.training.ranks import detect_launcher


def dpo(loaded: LoadedConfig, *, show: Show = "progress") -> dict[str, Any]:
    """Tunes the model in train.init_from on pairs; the rest as for `sft`. train.micro_batch_size counts pairs.

    The reference is the model as it was: its log-probabilities of all answers are computed before anything is trained,
    once, and kept in the run's folder, so that only one model is in memory.
    """
    if detect_launcher() is not None:
        raise UserError("dpo trains in one process: start it by itself")
    check_settings(loaded, "dpo")
    loaded, fitting = resolve_micro_batch(loaded, pairs=True)
    config = loaded.config
    data, chat, train = config.data, config.chat, config.train
    base, start = load_pretrained(str(train.init_from)), find_start(loaded)
    encoder, tally = ChatEncoder(base.tokenizer, load_template(base.tokenizer, chat.template), "answer"), Tally()
    learnt, held_out = tokenised_pairs(
        pairs(data, tally, chat.language),
        encoder,
        tally,
        seq_len=data.seq_len,
        too_long=chat.too_long,
        val_fraction=data.val_fraction,
    )
    opened, engine = open_preference_engine(config, base.weights)
    both = (learnt, held_out)
    run = Run(
        config=config,
        steps=total_steps(train, 2 * data.seq_len, learnt.count),  # a pair is two sequences
        identity=identity([part.digest() for part in both], base, opened),
        train=Prefetcher(PairTrainBatches(learnt, train.seed)),
        val=PairValBatches(held_out, train.micro_batch_size, train.eval_batches),
        bytes_per_token=None,
        folder=start.folder,
        sample=lambda: answer(opened, encoder, (Message("user", config.generation.prompt),), config),
        judge=engine.judged,
    )

    def refer(folder: Path) -> None:
        if config.preference.loss == "orpo":
            return

        def say(text: str) -> None:
            if show == "progress":
                print(text, file=sys.stderr, flush=True)

        model = f"{base.digest} {opened.precision} {config.lora}"
        reference = reference_of(engine, both, folder, model, train.micro_batch_size, say)
        for part, values in zip(both, reference, strict=True):
            part.reference = values

    told = [
        *fitting,
        *tally.lines(),
        f"{learnt.count:,} pairs to learn from, {held_out.count:,} held out; {_lengths(learnt)}",
    ]
    return tune(run, start, opened, base, encoder, told=told, unit="pairs", prepare=refer, show=show)


def _lengths(learnt: Pairs) -> str:
    """Preferences for long answers are learnt as well as any other: how much longer the chosen ones are."""
    batch = learnt.batch(np.arange(min(learnt.count, 1000))[None])
    chosen, rejected = np.count_nonzero(batch.targets[0] >= 0, axis=2).mean(axis=0)
    return f"a chosen answer has {chosen:.0f} tokens, a rejected one {rejected:.0f}"
