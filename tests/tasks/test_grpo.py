"""GRPO end to end: it learns, resumes exactly and refuses what it can't do."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, load_config
from anarchobot.model.parameters import parameter_count
from anarchobot.preflight.check import Context
from anarchobot.preflight.settings import command_for
from anarchobot.system.memory import estimate
from anarchobot.tasks.grpo import grpo
from anarchobot.tasks.sft import sft
from anarchobot.training.grpo_engine import GRPOEngine
from tests.tasks.test_pretrain import assert_same_state
from tests.tasks.tuning import COLORS, events, tuning
from tests.tasks.tuning import base as base
from tests.tiny import LEFT_OUT


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty prompts; the answer is always red. Two have no answer."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows: list[dict[str, Any]] = [
        {"question": f"Which color {i}?", "answer": "I say it is\n#### red"} for i in range(58)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "Which?"}, {"question": "What?"}]))
    return path


@pytest.fixture(scope="module")
def guesser(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A model that answers these prompts with one of five colors."""
    folder = tmp_path_factory.mktemp("guesser")
    draw = random.Random(0)
    rows = [{"prompt": f"Which color {i}?", "completion": draw.choice(COLORS)} for i in range(200)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train__total_steps": 60, "train__micro_batch_size": 8, "train__eval_interval": 60}
    sft(tuning(folder, "run", base, folder / "chats.jsonl", **settings), show="nothing")
    return folder / "run"


def config(folder: Path, name: str, base: Path, dataset: Path, **overrides: Any) -> LoadedConfig:
    settings: dict[str, Any] = {
        "grpo__rewards": ["exact_match"], "grpo__num_generations": 4, "grpo__max_completion_length": 8,
        "train__micro_batch_size": 4, "train__grad_accum_steps": 4, "train__optimizer": "adamw",
        "guard__spike_sigma": None,
    }  # fmt: skip
    return tuning(folder, name, base, dataset, **{**settings, **overrides})


@pytest.mark.parametrize(
    ("settings", "reward"),
    [
        pytest.param({"lora__r": 4, "grpo__beta": 0.01, "train__lr": 0.01}, 0.5, marks=pytest.mark.faults),
        ({"grpo__num_iterations": 2, "grpo__loss_type": "grpo"}, 0.8),
    ],
    ids=str,
)
def test_model_learns_what_is_rewarded(
    tmp_path: Path,
    guesser: Path,
    questions: Path,
    settings: dict[str, Any],
    reward: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"train__lr": 0.002, "grpo__num_generations": 8, "train__grad_accum_steps": 8, **settings}
    more = {"train__total_steps": 30, "train__eval_interval": 15, "train__sample_interval": 15}
    summary = grpo(config(tmp_path, "run", guesser, questions, **settings, **more))
    steps = events(tmp_path / "run", "train")
    assert steps[0]["reward"] < 0.4 and sum(e["reward"] for e in steps[-4:]) / 4 > reward
    assert {"reward_std", "frac_reward_zero_std", "completion_length", "truncated", "entropy", "clip_ratio"} <= set(
        steps[0]
    )
    assert ("kl" in steps[0]) == ("grpo__beta" in settings)
    assert (max(e["clip_ratio"] for e in steps) > 0) == ("grpo__num_iterations" in settings)
    last = events(tmp_path / "run", "eval")[-1]
    assert last["val_reward"] == -last["val_loss"] > 0.8 and summary["best_val_loss"] == last["val_loss"]
    assert "reward 1: red" in events(tmp_path / "run", "sample")[-1]["text"]
    output = capsys.readouterr().err
    assert "60 rows read, 58 kept" in output and "questions.jsonl:59: no answer" in output
    assert "| reward " in output


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grpo__num_iterations": 3, "grpo__beta": 0.1, "train__ema_decay": 0.9},
        {"lora__r": 4, "grpo__num_iterations": 4},
    ],
    ids=["one step each", "three steps each", "adapters"],
)
def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, guesser: Path, questions: Path, settings: dict[str, Any]
) -> None:
    """Stopped after step 4, which with several steps for the same completions is not their last or their first."""
    grpo(config(tmp_path, "whole", guesser, questions, **settings, train__total_steps=8), show="nothing")
    grpo(config(tmp_path, "broken", guesser, questions, **settings, train__total_steps=4), show="nothing")
    again = {**settings, "train__total_steps": 8, "train__checkpoint_path": "auto"}
    grpo(config(tmp_path, "broken", guesser, questions, **again), show="nothing")
    assert_same_state(tmp_path / "whole", tmp_path / "broken")
    wanted, found = (
        [(e["reward"], e["entropy"]) for e in events(tmp_path / name, "train")] for name in ("whole", "broken")
    )
    assert wanted == found and len(set(wanted)) == 8


def test_refused_settings(tmp_path: Path, guesser: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, problem in (
        ({"grpo__rewards": LEFT_OUT}, "not set: name a reward"),
        ({"train__backend": "torch"}, "torch has no grpo"),
        ({"grpo__num_generations": 3}, r"\(16\), must be a multiple of num_generations \(3\)"),
        ({"grpo__max_completion_length": 48}, "must be below data.seq_len"),
        ({"grpo__regex": "a"}, "has no effect without regex in grpo.rewards"),
        ({"grpo__rewards": ["regex"]}, "regex requires grpo.regex"),
        ({"grpo__reward_weights": [1.0, 2.0]}, r"one weight per reward \(1\), got 2"),
        ({"lora__r": 4, "lora__dropout": 0.1}, "lora.dropout: would change the probabilities"),
        ({"preference__beta": 0.5}, "applies only to dpo"),
        ({"train__total_steps": LEFT_OUT, "train__token_budget": 1000}, "completions have no fixed length"),
    ):
        with pytest.raises(UserError, match=problem):
            grpo(config(tmp_path, "run", guesser, questions, **settings), show="nothing")
    with pytest.raises(UserError, match=r"grpo.num_generations: applies only to grpo"):
        sft(tuning(tmp_path, "run", guesser, questions, grpo__num_generations=4), show="nothing")
    monkeypatch.setattr("anarchobot.tasks.grpo.detect_launcher", lambda: "ring")
    with pytest.raises(UserError, match="single process"):
        grpo(config(tmp_path, "run", guesser, questions), show="nothing")
    assert not (tmp_path / "run").exists()


def test_changed_settings_are_rejected_on_resume(tmp_path: Path, guesser: Path, questions: Path) -> None:
    grpo(config(tmp_path, "run", guesser, questions, train__total_steps=1), show="nothing")
    again = {"train__total_steps": 2, "train__checkpoint_path": "auto", "grpo__epsilon": 0.1}
    with pytest.raises(UserError, match=r"grpo.epsilon was 0.2 and is now 0.1"):
        grpo(config(tmp_path, "run", guesser, questions, **again), show="nothing")


def test_a_function_is_announced_before_it_runs(
    tmp_path: Path, guesser: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("print('imported')\ndef short(completions, **_):\n    return [-len(c) for c in completions]\n")
    settings = {"grpo__rewards": ["function"], "grpo__function": f"{file}:short", "train__total_steps": 1}
    grpo(config(tmp_path, "run", guesser, questions, **settings), show="nothing")
    output = capsys.readouterr()
    assert output.err.startswith(f"warning: grpo.function: running the Python code of {file}:short")
    assert output.out == "imported\n" and events(tmp_path / "run", "train")[0]["reward"] < 0
    assert main(["verify", str(tmp_path / "run.yaml"), "--no-calibration", f"train.save_dir={tmp_path}/other"]) == 0
    assert "imported" not in capsys.readouterr().out


def test_memory_runs_out_while_sampling(
    tmp_path: Path, guesser: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The micro-batch is halved, and the completions stay the same."""
    settings = {"train__total_steps": 2, "grpo__beta": 0.1, "train__grad_accum_steps": 1}
    grpo(config(tmp_path, "whole", guesser, questions, **settings), show="nothing")
    with_log_probs, failed = GRPOEngine.with_log_probs, []

    def fail_once(self: GRPOEngine, batch: Any) -> Any:
        if not failed:
            failed.append(batch.inputs.shape)
            raise MemoryError
        return with_log_probs(self, batch)

    monkeypatch.setattr(GRPOEngine, "with_log_probs", fail_once)
    grpo(config(tmp_path, "halved", guesser, questions, **settings), show="nothing")
    assert failed == [(1, 4, 48)]
    wanted, found = ([e["reward"] for e in events(tmp_path / name, "train")] for name in ("whole", "halved"))
    assert wanted == found
    assert "train.micro_batch_size=2" in events(tmp_path / "halved", "warning")[-1]["text"]


def test_command(tmp_path: Path, guesser: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model", str(guesser), "--dataset", str(questions), "--steps", "2", "--checkpoint-dir", str(tmp_path / "run"),
        "--batch-size", "8", "train.grad_accum_steps=1", "grpo.rewards=[exact_match]",
    ]  # fmt: skip
    assert main(["grpo", *words]) == 0
    found = load_config(tmp_path / "run" / "config.yaml").config  # the lengths fit the model
    assert (found.data.seq_len, found.grpo.max_completion_length, found.model.max_seq_len) == (64, 32, 64)
    output = capsys.readouterr()
    assert "best validation reward" in output.out and "training adapters of rank 8" in output.err
    assert main(["plan", str(tmp_path / "run" / "config.yaml")]) == 0
    assert "8 completions" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "validation reward" in (tmp_path / "run" / "report.html").read_text()


def test_the_command_of_a_configuration(tmp_path: Path, guesser: Path, questions: Path) -> None:
    """Also of a run's config.yaml, which has all sections; those of version 0.5 have no grpo."""
    config(tmp_path, "mine", guesser, questions)
    written = yaml.safe_load((guesser / "config.yaml").read_text())
    del written["grpo"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(written))
    grpo(config(tmp_path, "run", guesser, questions, train__total_steps=1), show="nothing")
    for path, command in (
        (tmp_path / "mine.yaml", "grpo"),
        (tmp_path / "run" / "config.yaml", "grpo"),
        (guesser / "config.yaml", "sft"),
        (tmp_path / "old.yaml", "sft"),
    ):
        assert command_for(Context(str(path), [], calibrate=False)) == command


def test_memory_of_the_reference_and_of_sampling(tmp_path: Path, guesser: Path, questions: Path) -> None:
    plain, with_reference = (
        estimate(config(tmp_path, "run", guesser, questions, grpo__beta=beta).config) for beta in (0.0, 0.1)
    )
    parameters = parameter_count(load_config(guesser / "config.yaml").config.model)
    assert with_reference.weights - plain.weights == 4 * parameters
    cache = 2 * 4 * 16 * 48 * 32  # keys and values of a layer: 16 completions of 48 tokens, width 32
    assert plain.phases["sampling"] - plain.weights - plain.optimizer > 2 * cache
