"""What the types can't say: settings that contradict each other."""

from collections.abc import Iterator

from anarchobot.config.schema import Config

RUN_LENGTHS = ("train.total_steps", "train.epochs", "train.token_budget")


def contradictions(config: Config, given: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (the keys that don't agree, what is wrong and how to mend it).

    `given` holds the dotted keys that somebody set to something, in the order in which they were set.
    """
    model, data, train = config.model, config.data, config.train

    if model.head_dim is None and model.d_model % model.n_heads:
        yield (
            ("model.d_model", "model.n_heads"),
            f"d_model ({model.d_model}) must be divisible by n_heads ({model.n_heads}), or set head_dim",
        )
    elif model.head_size % 2:
        yield (
            ("model.head_dim",) if model.head_dim else ("model.d_model", "model.n_heads"),
            f"heads of {model.head_size} can't be rotated in pairs: the head width must be even",
        )
    if model.n_heads % model.kv_heads:
        yield (
            ("model.n_kv_heads", "model.n_heads"),
            f"n_heads ({model.n_heads}) must be divisible by n_kv_heads ({model.kv_heads}): each key head serves "
            "the same number of query heads",
        )
    if model.bos_id is not None and model.bos_id >= model.vocab_size:
        yield (
            ("model.bos_id", "model.vocab_size"),
            f"bos_id ({model.bos_id}) must be below model.vocab_size ({model.vocab_size})",
        )
    if data.seq_len > model.max_seq_len:
        yield (
            ("data.seq_len", "model.max_seq_len"),
            f"data.seq_len ({data.seq_len}) must be at most model.max_seq_len ({model.max_seq_len})",
        )
    if data.max_chars is not None and data.max_chars < data.min_chars:
        yield (
            ("data.max_chars", "data.min_chars"),
            f"max_chars ({data.max_chars}) must be at least min_chars ({data.min_chars})",
        )
    for weights, of in (("weights", "dataset"), ("shard_weights", "shard_dir")):
        given_weights, names = getattr(data, weights), getattr(data, of)
        count = len(names) if isinstance(names, list) else 1
        if given_weights is not None and len(given_weights) != count:
            yield (
                (f"data.{weights}", f"data.{of}"),
                f"{weights} has {len(given_weights)} numbers, {of} has {count}: give one each",
            )
    if (data.score_field is None) != (data.score_min is None):
        missing = "score_min" if data.score_min is None else "score_field"
        yield ("data.score_field", "data.score_min"), f"needs data.{missing} as well"

    lengths = [key for key in given if key in RUN_LENGTHS]
    if len(lengths) > 1:
        yield tuple(lengths), f"the run's length is set more than once: keep one of {', '.join(lengths)}"
    if train.min_lr > train.lr:
        yield ("train.min_lr", "train.lr"), f"min_lr ({train.min_lr:g}) must be at most lr ({train.lr:g})"
    if train.lr_decay_steps is not None and train.lr_decay_steps <= train.warmup_steps:
        yield (
            ("train.lr_decay_steps", "train.warmup_steps"),
            f"lr_decay_steps ({train.lr_decay_steps}) must be above warmup_steps ({train.warmup_steps})",
        )
