"""`anarchobot plan`, and runs with micro_batch_size auto."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli.main import main
from anarchobot.cli.preflight import parse_hours
from anarchobot.config.errors import UserError
from anarchobot.config.loading import load_config
from anarchobot.data.shards import read_manifest
from anarchobot.runs import checkpoint
from anarchobot.system.memory import estimate
from anarchobot.tasks.dpo import dpo
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.sft import sft
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import preferences as preferences
from tests.tasks.tuning import tuning
from tests.tiny import LEFT_OUT, loaded, write_config


def planned(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", str(path), *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_figures_counted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(write_config(tmp_path / "c.yaml", tmp_path, tmp_path / "run"), capsys, "--deadline", "2d")
    parameters = 384 * 32 + 4 * 32 * 32 + 3 * 32 * 128 + 3 * 32
    assert found["parameters"] == found["trained_parameters"] == parameters
    assert (found["steps"], found["tokens_per_step"], found["tokens"]) == (6, 4 * 32, 6 * 4 * 32)
    assert found["tokens_per_parameter"] == pytest.approx(768 / parameters)
    assert found["epochs"] is None  # no shards
    assert found["tokens_per_second"] == pytest.approx(768 / (48 * 3600))
    # 6 per matrix weight; 12 D for each of the 16.5 keys that a token attends to on average.
    assert found["flops_per_token"] == 6 * (parameters - 3 * 32) + 12 * 32 * 16.5
    assert found["flops"] == 768 * found["flops_per_token"]
    assert found["checkpoint"]["model_bytes"] == 4 * parameters
    files = found["checkpoint"]["model_bytes"] + found["checkpoint"]["optimizer_bytes"]
    assert found["checkpoint"]["disk_bytes"] == 5 * files
    assert found["memory"]["peak"] == max(found["memory"]["phases"].values())
    again = {(p["precision"], p["gradient_checkpointing"]): p["peak"] for p in found["peaks"]}
    assert again["float32", False] == found["memory"]["peak"]


def test_epochs_need_shards(tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epochs = {"train__total_steps": LEFT_OUT, "train__epochs": 2}
    found = planned(write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **epochs), capsys)
    windows = -(-(read_manifest(tiny_shards).tokens("train") - 1) // 32)
    assert found["steps"] == -(-2 * windows // 4)
    assert found["epochs"] == found["steps"] * 4 / windows
    found = planned(write_config(tmp_path / "e.yaml", tiny_shards, tmp_path / "run", train__total_steps=2000), capsys)
    assert found["epochs"] == 8000 / windows > 4
    assert main(["plan", str(tmp_path / "e.yaml")]) == 0
    assert f"{8000 / windows:,.1f} epochs: beyond 4, repeated text" in capsys.readouterr().out
    without = write_config(tmp_path / "d.yaml", tmp_path / "none", tmp_path / "run", **epochs)
    assert (unknown := planned(without, capsys))["steps"] is None
    assert "no shards" in unknown["steps_unknown"]
    assert main(["plan", str(without)]) == 0
    assert unknown["steps_unknown"] in capsys.readouterr().out


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "c.yaml", tmp_path, tmp_path / "run")
    assert main(["plan", str(path), "train.micro_batch_size=auto", "--deadline", "8"]) == 0
    said = capsys.readouterr().out
    for text in ("optimizer", "gradient_checkpointing", "2 sequences", "Chinchilla", "8 h"):
        assert text in said
    assert not (tmp_path / "run").exists()


def test_hours() -> None:
    assert [parse_hours(text) for text in ("8", "8h", "2d", "1.5d")] == [8, 8, 48, 36]
    for text in ("0", "", "8m", "-1", "two", "1e3", "nan"):
        with pytest.raises(UserError, match="argument --deadline: expected a time > 0"):
            parse_hours(text)


def test_auto_keeps_the_step_and_writes_the_chosen_numbers(tmp_path: Path, tiny_shards: Path) -> None:
    """Resuming the same file with another memory budget continues the same run."""
    auto = {"train__micro_batch_size": "auto", "train__grad_accum_steps": 4, "train__cpu_threads": 1}
    small = estimate(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path, **auto).config, micro_batch_size=1).peak / 1e9
    whole = {**auto, "train__memory_budget_gb": 1.0, "model__dropout": 0.0}
    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "whole", **whole), show="nothing")
    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **whole, train__total_steps=3), show="nothing")
    written = load_config(tmp_path / "run" / "config.yaml").config.train
    assert (written.micro_batch_size, written.grad_accum_steps, written.auto_micro_batch) == (4, 1, False)
    again = {**whole, "train__memory_budget_gb": small, "train__checkpoint_path": "auto"}
    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **again), show="nothing")
    written = load_config(tmp_path / "run" / "config.yaml").config.train
    assert (written.micro_batch_size, written.grad_accum_steps) == (1, 4)
    ends = [checkpoint.find(tmp_path / name) for name in ("whole", "run")]
    assert [end.state["tokens"] for end in ends] == [6 * 4 * 32] * 2
    assert [end.state["data_position"] for end in ends] == [24, 24]


def test_auto_counts_sequences_in_sft_and_pairs_in_dpo(
    tmp_path: Path, base: Path, chats: Path, preferences: Path
) -> None:
    auto = {"train__micro_batch_size": "auto", "train__grad_accum_steps": 6, "train__total_steps": 1}
    for task, data in ((sft, chats), (dpo, preferences)):
        run = tmp_path / task.__name__
        task(tuning(tmp_path, task.__name__, base, data, **auto), show="nothing")
        train = load_config(run / "config.yaml").config.train
        assert (train.micro_batch_size, train.grad_accum_steps) == (6, 1)
        assert checkpoint.find(run).state["data_position"] == 6


@pytest.mark.parametrize("name", ["tuning/sft", "tuning/lora_balanced", "tuning/grpo"])
def test_tuning_needs_no_shards(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also without the model and the data, which the shipped configurations leave to the command line."""
    found = planned(Path(name), capsys)
    assert found["steps"] is None and "conversations" in found["steps_unknown"]


def test_tuning_takes_the_pretrained_model_and_counts_pairs_as_two_sequences(
    tmp_path: Path, base: Path, preferences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning(tmp_path, "dpo", base, preferences, preference__beta=0.2)
    found = planned(tmp_path / "dpo.yaml", capsys, "lora.r=8")
    assert found["parameters"] > found["trained_parameters"] > 0
    assert (found["unit"], found["tokens_per_step"]) == ("pairs", 2 * 4 * 48)
