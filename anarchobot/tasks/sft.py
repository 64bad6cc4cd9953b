"""Supervised fine-tuning: a model learns to answer, from conversations."""

from typing import Any

from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config
from anarchobot.data.batches import Prefetcher, TrainBatches, ValBatches
from anarchobot.data.conversations.reading import conversations
from anarchobot.data.conversations.sequences import ConversationWindows
from anarchobot.data.conversations.tally import Tally
from anarchobot.data.conversations.tokenization import Tokenised, tokenised
from anarchobot.evaluation.rouge import rouge
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.optim.schedule import total_steps
from anarchobot.tasks.engines import OpenEngine, open_engine, open_ranks
from anarchobot.tasks.finetuning import answer, check_settings, identity, tune
from anarchobot.tasks.run import Show, find_start, resolve_run
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import TRAINING_DAY, load_template
from anarchobot.tokenizers.conversation import Conversation, Message
from anarchobot.training.loop import Run


def sft(loaded: LoadedConfig, *, show: Show = "progress") -> dict[str, Any]:
    """Tunes the model in train.init_from as the config says (its model section is that model's: load_tuning);
    returns the summary that it also writes.

    Raises UserError when data, model, checkpoint and config do not belong together, before anything is written.
    """
    check_settings(loaded, "sft")
    loaded, fitting = resolve_run(loaded)
    config = loaded.config
    data, chat, train = config.data, config.chat, config.train
    ranks = open_ranks(config)
    base, start = load_pretrained(str(train.init_from)), find_start(loaded, ranks)
    encoder = ChatEncoder(base.tokenizer, load_template(base.tokenizer, chat.template), chat.train_on)
    made, tally = read_conversations(config, encoder)
    sets = [ConversationWindows(t, data.seq_len, chat.pack, base.tokenizer.eod_id) for t in (made.train, made.val)]
    learnt, held_out = sets
    samples, about_samples = _samples(made.samples, encoder, config)
    opened = open_engine(config, base.weights, ranks)
    run = Run(
        config=config,
        steps=total_steps(train, data.seq_len, learnt.count, ranks.size),
        identity=identity([part.digest() for part in sets], base, opened),
        train=Prefetcher(TrainBatches([learnt], train.seed), ranks.rank, ranks.size),
        val=ValBatches(held_out, train.micro_batch_size, train.eval_batches),
        bytes_per_token=made.val.bytes_per_target(base.tokenizer) if made.val.count else 1.0,
        folder=start.folder,
        sample=lambda: answer(opened, encoder, (Message("user", config.generation.prompt),), config),
        judge=lambda: _rouge(opened, encoder, samples, config),
        ranks=ranks,
    )
    rows = f"{made.train.count:,} conversations to learn from, {made.val.count:,} held out"
    told = [
        *fitting,
        *tally.lines(),
        f"{rows}; {made.train.targets:,} tokens count; sequences of {data.seq_len} are {learnt.fill:.0%} full",
        *about_samples,
    ]
    return tune(run, start, opened, base, encoder, told=told, unit="sequences", show=show)


def read_conversations(config: Config, encoder: ChatEncoder) -> tuple[Tokenised, Tally]:
    data, chat, tally = config.data, config.chat, Tally()
    found = conversations(data, tally, chat.format, chat.language)
    made = tokenised(
        found, encoder, tally, seq_len=data.seq_len, too_long=chat.too_long, val_fraction=data.val_fraction,
        samples=chat.rouge_samples,
    )  # fmt: skip
    return made, tally


def _rouge(opened: OpenEngine, encoder: ChatEncoder, samples: list[Conversation], config: Config) -> dict[str, float]:
    """ROUGE of the last answers of `samples`, each drawn anew by the likeliest tokens."""
    greedy = config.model_copy(update={"generation": config.generation.model_copy(update={"method": "greedy"})})
    if not samples:
        return {}
    return rouge((s[-1].content, answer(opened, encoder, s[:-1], greedy)) for s in samples)


def _samples(samples: list[Conversation], encoder: ChatEncoder, config: Config) -> tuple[list[Conversation], list[str]]:
    """Those whose prompts leave room for an answer; and what is to be said of the others."""
    most = config.model.max_seq_len
    fitting = [s for s in samples if len(encoder.prompt(s[:-1], TRAINING_DAY)) < most]
    if config.chat.rouge_samples and not samples:
        return [], ["no ROUGE (chat.rouge_samples): no conversation that is held out ends with an answer"]
    if len(fitting) < len(samples):
        long = len(samples) - len(fitting)
        return fitting, [f"ROUGE of {len(fitting)} answers: the prompts of {long} more fill the model's {most} tokens"]
    return fitting, []
