"""What a checkpoint must share with the run that resumes it."""

from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.runs.checkpoint import Checkpoint
from anarchobot.tasks.resume import check_same_run

WEIGHTS, OTHERS = "a" * 64, "b" * 64
IDENTITY = {"conversations": ["c"], "base": f"{WEIGHTS}:{OTHERS}", "tokenizer": "t" * 64}


def check(**recorded: Any) -> None:
    state = {"step": 1, "tokens": 0, "norms": [], "config": Config().model_dump(), **recorded}
    check_same_run(Checkpoint(Path("run"), state), Config(), IDENTITY)


def test_early_checkpoints_have_the_digest_of_the_weights_alone_and_no_tokenizer() -> None:
    check(**IDENTITY)
    check(conversations=["c"], base=WEIGHTS)


@pytest.mark.parametrize(
    ("recorded", "what"),
    [
        ({"base": "0" * 64}, "weights"),
        ({"base": f"{'0' * 64}:{OTHERS}"}, "weights"),
        ({"base": f"{WEIGHTS}:{'0' * 64}"}, "model settings or tokens"),
        ({"tokenizer": "0" * 64}, "tokens"),
        ({"conversations": ["d"]}, "conversations"),
    ],
)
def test_another_base_or_tokenizer_is_refused(recorded: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=f"run: this run was started with different {what} from those in "):
        check(**(IDENTITY | recorded))
