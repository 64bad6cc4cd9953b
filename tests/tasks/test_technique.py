"""train.technique auto in runs: measured settings, defaults, explicit settings, and exact resume."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.model.architecture import CPU_LOSS_CHUNK
from anarchobot.runs import checkpoint
from anarchobot.storage.durable import read_checksummed, write_checksummed
from anarchobot.system.technique import StepSettings, Task, cache_file, write_measured
from anarchobot.tasks.dpo import dpo
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.sft import sft
from anarchobot.tasks.technique import resolve_technique, technique_key
from tests.tasks.test_pretrain import assert_same_state
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import events, tuning
from tests.tasks.tuning import preferences as preferences
from tests.tiny import loaded

MEASURED = StepSettings("autodiff", 17, False)
DEFAULT = StepSettings("blocked", CPU_LOSS_CHUNK, False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_file()


def measure(config: LoadedConfig, task: Task, settings: StepSettings = MEASURED) -> None:
    write_measured(technique_key(config.config, task), settings)


def used(run: Path) -> tuple[StepSettings, StepSettings]:
    """The settings in config.yaml and in the newest checkpoint."""
    in_file = yaml.safe_load((run / "config.yaml").read_text())["train"]
    in_state = checkpoint.find(run).state["config"]["train"]
    first, second = (StepSettings(*(train[key] for key in StepSettings._fields)) for train in (in_file, in_state))
    return first, second


def test_a_run_uses_what_was_measured_and_says_so(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")
    measure(config, "pretrain")
    pretrain(config)
    assert used(tmp_path / "run") == (MEASURED, MEASURED)
    lines = [line for line in capsys.readouterr().err.splitlines() if "technique" in line]
    assert len(lines) == 1
    assert "technique: autodiff, loss_chunk 17, not compiled (measured on " in lines[0]


def test_without_a_measurement_a_run_uses_the_default(tmp_path: Path, tiny_shards: Path) -> None:
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__total_steps=1)
    measure(loaded(tmp_path / "other.yaml", tiny_shards, tmp_path / "run", data__seq_len=16), "pretrain")
    pretrain(config, show="nothing")
    assert used(tmp_path / "run") == (DEFAULT, DEFAULT)


def test_resume_keeps_the_first_choice_bit_for_bit(tmp_path: Path, tiny_shards: Path) -> None:
    """The measurement changes between the two halves, once to a technique with other rounding errors."""

    def run(name: str, **overrides: Any) -> None:
        overrides = {"train__schedule": "constant", **overrides}
        pretrain(loaded(tmp_path / f"{name}.yaml", tiny_shards, tmp_path / name, **overrides), show="nothing")

    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")
    run("of the default")
    measure(config, "pretrain")
    run("whole")
    run("broken", train__total_steps=3)
    measure(config, "pretrain", StepSettings("blocked", 23, True))
    run("broken", train__checkpoint_path="auto")
    assert_same_state(tmp_path / "whole", tmp_path / "broken")
    assert used(tmp_path / "broken") == (MEASURED, MEASURED)
    (resumed,) = events(tmp_path / "broken", "resume")
    assert list(resumed["changed"]) == ["train.total_steps"]
    with pytest.raises(AssertionError):  # the choice does show in the weights
        assert_same_state(tmp_path / "whole", tmp_path / "of the default")


def test_a_resumed_run_can_be_given_another_technique(tmp_path: Path, tiny_shards: Path) -> None:
    first = loaded(tmp_path / "a.yaml", tiny_shards, tmp_path / "run", train__total_steps=3)
    measure(first, "pretrain")
    pretrain(first, show="nothing")
    changed: dict[str, Any] = {"train__technique": "blocked", "train__checkpoint_path": "auto"}
    pretrain(loaded(tmp_path / "b.yaml", tiny_shards, tmp_path / "run", **changed), show="nothing")
    (resumed,) = events(tmp_path / "run", "resume")
    assert resumed["changed"] == {"train.technique": ["autodiff", "blocked"], "train.total_steps": [3, 6]}
    assert used(tmp_path / "run")[0] == MEASURED._replace(technique="blocked")


def test_a_run_from_before_train_technique_keeps_its_technique(tmp_path: Path, tiny_shards: Path) -> None:
    """Its checkpoints have no such setting, and attention was that of `blocked`."""
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__total_steps=1)
    pretrain(config, show="nothing")
    measure(config, "pretrain")
    saved = checkpoint.find(tmp_path / "run")
    state = read_checksummed(saved.folder / "state.json")
    del state["config"]["train"]["technique"]
    state["config"]["train"] |= {"loss_chunk": 99, "compile": None}
    write_checksummed(saved.folder / "state.json", state)
    resolved = resolve_technique(config.config, "pretrain", checkpoint.find(tmp_path / "run"))
    settings = resolved.config.train
    assert (settings.technique, settings.loss_chunk, settings.compile) == ("blocked", 99, False)
    assert resolved.messages == ["technique: blocked, loss_chunk 99, not compiled (as in the checkpoint)"]


@pytest.mark.parametrize(
    ("given", "expected", "message"),
    [
        (["train.technique=blocked"], ("blocked", 17, False), "(technique as configured; the rest measured on "),
        (["train.loss_chunk=5", "train.compile=true"], ("autodiff", 5, True), "(loss_chunk, compile as configured; "),
        (["train.technique=fused", "train.loss_chunk=5", "train.compile=false"], ("fused", 5, False),
         "(technique, loss_chunk, compile as configured)"),
    ],
)  # fmt: skip
def test_explicit_settings_win(
    given: list[str], expected: StepSettings, message: str, tmp_path: Path, tiny_shards: Path
) -> None:
    plain = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")
    measure(plain, "pretrain")
    resolved = resolve_technique(load_config(tmp_path / "c.yaml", given).config, "pretrain")
    train = resolved.config.train
    assert (train.technique, train.loss_chunk, train.compile) == expected
    assert message in resolved.messages[0]


def test_torch_has_no_techniques(tmp_path: Path, tiny_shards: Path) -> None:
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__backend="torch").config
    assert resolve_technique(config, "pretrain") == (config, [])


def test_sft_and_dpo_use_their_own_measurements(tmp_path: Path, base: Path, chats: Path, preferences: Path) -> None:
    conversations = tuning(tmp_path, "sft", base, chats, train__total_steps=1)
    pairs = tuning(tmp_path, "dpo", base, preferences, train__total_steps=1)
    measure(conversations, "sft")
    measure(pairs, "dpo", MEASURED._replace(loss_chunk=19))
    sft(conversations, show="nothing")
    dpo(pairs, show="nothing")
    assert used(tmp_path / "sft")[0] == MEASURED
    assert used(tmp_path / "dpo")[0] == MEASURED._replace(loss_chunk=19)
