"""Held-out text on which `export` measures a model before and after: text files, or a run's own validation shards."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.data.shards import TokenStream
from anarchobot.data.sources import files
from anarchobot.evaluation.evaluate import Log, evaluate_shards, evaluate_texts
from anarchobot.exchange.exporting import HeldOut
from anarchobot.exchange.pretrained import PretrainedModel
from anarchobot.inference.model import to_device
from anarchobot.runs import checkpoint

MAX_TOKENS = 262_144  # of the validation shards


def held_out_texts(names: Sequence[str], log: Log) -> HeldOut:
    """Raises UserError if a file is missing or has an unknown format."""
    files.find(list(names))

    def bits_per_byte(pretrained: PretrainedModel) -> float:
        return evaluate_texts(to_device(pretrained), names, None, log).ratios["bits_per_byte"].mean

    return HeldOut(", ".join(Path(name).name for name in names), bits_per_byte)


def held_out_shards(path: str | Path, log: Log) -> HeldOut | None:
    """The validation split of the first shards that the run at `path` was trained on; None if it has none or they are
    not there any more."""
    saved = checkpoint.find(path, files=(checkpoint.MODEL_FILE,))
    digests = saved.state.get("shards", ())
    for folder in saved.config.data.shard_dirs if digests else ():
        with suppress(UserError):  # moved or made again
            stream = TokenStream(folder, "val")
            if stream.manifest.digest() in digests and stream.tokens > saved.config.data.seq_len:
                tokens = min(MAX_TOKENS, stream.tokens)

                def bits_per_byte(pretrained: PretrainedModel, folder: str = folder) -> float:
                    result = evaluate_shards(to_device(pretrained), pretrained.config, folder, log, MAX_TOKENS)
                    return result.ratios["bits_per_byte"].mean

                return HeldOut(f"{tokens:,} validation tokens of {Path(folder).name}", bits_per_byte)
    return None
