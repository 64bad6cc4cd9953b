"""A compiled function is compiled once for each shape. Each compilation keeps arrays on the GPU, and Metal limits their
number ("Resource limit (499000) exceeded."), so a run must have few shapes, however long it is."""

from pathlib import Path
from typing import Any

import pytest

from anarchobot.data.batches import ValBatches
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.sft import sft
from anarchobot.training.mlx_engine import MLXEngine
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import tuning
from tests.tiny import loaded

TRACES = 4  # the first micro-batch of a step, later ones (added to sums), the update, validation
COMPILED: dict[str, Any] = {
    "train__compile": True, "train__micro_batch_size": 5, "train__eval_interval": 2, "train__eval_batches": None,
}  # fmt: skip


class Recorder:
    """The engines that a task opens, and the number of rows without scored tokens in its validation batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines: list[MLXEngine] = []
        self.empty_rows: set[int] = set()
        init, get = MLXEngine.__init__, ValBatches.__getitem__

        def record(engine: MLXEngine, *args: Any, **options: Any) -> None:
            init(engine, *args, **options)
            self.engines.append(engine)

        def batch(batches: ValBatches, index: int) -> Any:
            found = get(batches, index)
            self.empty_rows.add(int((found.targets < 0).all(-1).sum()))
            return found

        monkeypatch.setattr(MLXEngine, "__init__", record)
        monkeypatch.setattr(ValBatches, "__getitem__", batch)

    def check(self) -> None:
        assert len(self.empty_rows) == 2  # the last validation batch has fewer sequences; it keeps its shape
        assert [engine.traces for engine in self.engines] == [TRACES]


@pytest.mark.parametrize("steps", [2, 9])
def test_the_number_of_traces_is_that_of_two_steps(
    tmp_path: Path, tiny_shards: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__total_steps=steps, **COMPILED)
    pretrain(config, show="nothing")
    recorder.check()


def test_fine_tuning_on_conversations_of_many_lengths(
    tmp_path: Path, base: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several epochs, which end within a step."""
    recorder = Recorder(monkeypatch)
    sft(tuning(tmp_path, "run", base, chats, train__total_steps=9, **COMPILED), show="nothing")
    recorder.check()
