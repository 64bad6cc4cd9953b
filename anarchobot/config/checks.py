"""What the types can't say: settings that contradict each other."""

from collections.abc import Iterator

from anarchobot.config.schema import Config

RUN_LENGTHS = ("train.total_steps", "train.epochs", "train.token_budget")


def contradictions(config: Config, given: list[str]) -> Iterator[tuple[str, str]]:
    """Yields (key to blame, what is wrong and how to mend it).

    `given` holds the dotted keys that somebody set, in the order in which they were set.
    """
    model, data, train = config.model, config.data, config.train

    if model.head_dim is None and model.d_model % model.n_heads:
        yield from _blame(
            given, "model.d_model", "model.n_heads",
            problem=f"d_model ({model.d_model}) must be divisible by n_heads ({model.n_heads}), or set head_dim",
        )  # fmt: skip
    elif model.head_size % 2:
        yield from _blame(
            given, "model.head_dim", "model.d_model",
            problem=f"heads of {model.head_size} can't be rotated in pairs: the head width must be even",
        )  # fmt: skip
    if model.n_heads % model.kv_heads:
        yield (
            "model.n_kv_heads",
            f"n_heads ({model.n_heads}) must be divisible by n_kv_heads ({model.kv_heads}): each key head serves "
            "the same number of query heads",
        )
    if data.seq_len > model.max_seq_len:
        yield from _blame(
            given, "data.seq_len", "model.max_seq_len",
            problem=f"seq_len ({data.seq_len}) is more than model.max_seq_len ({model.max_seq_len})",
        )  # fmt: skip
    if (data.score_field is None) != (data.score_min is None):
        yield from _blame(
            given, "data.score_field", "data.score_min", problem="score_field and score_min need each other"
        )

    lengths = [key for key in given if key in RUN_LENGTHS]
    if len(lengths) > 1:
        yield lengths[1], f"the run's length is set twice: keep one of {', '.join(lengths)}"
    if train.min_lr > train.lr:
        yield from _blame(
            given, "train.min_lr", "train.lr", problem=f"min_lr ({train.min_lr:g}) is above lr ({train.lr:g})"
        )
    if train.lr_decay_steps is not None and train.lr_decay_steps <= train.warmup_steps:
        yield (
            "train.lr_decay_steps",
            f"lr_decay_steps ({train.lr_decay_steps}) must be above warmup_steps ({train.warmup_steps})",
        )


def _blame(given: list[str], *keys: str, problem: str) -> Iterator[tuple[str, str]]:
    """The last of `keys` that somebody set takes the blame: it has a line to point at, and is the likeliest slip."""
    yield next((key for key in reversed(given) if key in keys), keys[0]), problem
