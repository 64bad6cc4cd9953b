"""Pretraining from shards to summary: exact resume, the files of a run, and refused configurations."""

import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.loading import load_config
from anarchobot.data.shards import read_manifest
from anarchobot.model.parameters import parameter_count
from anarchobot.runs import checkpoint
from anarchobot.tasks.pretrain import pretrain
from tests.tiny import LEFT_OUT, VOCAB, loaded, make_shards, write_config


@pytest.fixture
def run_with(tmp_path: Path, tiny_shards: Path) -> Any:
    """run_with("name", train__lr=...) trains into tmp_path/name and returns (summary, metrics lines)."""

    def run(name: str, **overrides: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        config = loaded(tmp_path / "config.yaml", tiny_shards, tmp_path / name, **overrides)
        summary = pretrain(config, show="nothing")
        return summary, lines_of(tmp_path / name)

    return run


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def arrays(run: Path) -> dict[str, np.ndarray]:
    found = checkpoint.find(run)
    return checkpoint.load_arrays(found, found.config.model, optimizer=True)


def assert_same_state(a: Path, b: Path) -> None:
    first, second = arrays(a), arrays(b)
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def engine_class(backend: str) -> Any:
    if backend == "mlx":
        return importlib.import_module("anarchobot.training.mlx_engine").MLXEngine
    pytest.importorskip("torch").set_num_threads(1)
    return importlib.import_module("anarchobot.torch_backend.engine").TorchEngine


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train__optimizer": "adamw", "train__grad_accum_steps": 1, "model__tie_embeddings": False},
        {"train__precision": "float16", "train__gradient_checkpointing": True},
        {"data__seq_len": 64, "train__micro_batch_size": 60, "train__schedule": "wsd"},
    ],
    ids=["muon, dropout", "adamw, untied", "float16, recomputed", "across epochs"],
)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
    run_with: Any,
    tmp_path: Path,
    tiny_shards: Path,
    backend: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights, both optimizers, scalars and logged losses of 2 + 4 steps equal those of 6."""
    engine = engine_class(backend)
    settings = {**settings, "train__backend": backend}
    _, straight = run_with("straight", **settings)
    train_step = engine.train_step

    def interrupted(self: Any, batch: Any, step: int, *rest: float) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, batch, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", interrupted)
        summary, _ = run_with("broken", **settings)
    assert (summary["finished"], summary["steps"]) == (False, 2)
    summary, lines = run_with("broken", train__checkpoint_path="auto", **settings)
    assert (summary["finished"], summary["steps"]) == (True, 6)
    assert_same_state(tmp_path / "straight", tmp_path / "broken")

    def losses(events: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
        return [
            (e["step"], e["event"], e.get("loss", e.get("val_loss"))) for e in events if e["event"] in ("train", "eval")
        ]

    assert losses(lines) == losses(straight)
    if "data__seq_len" in settings:  # this case must cross an epoch
        assert summary["tokens"] > read_manifest(tiny_shards).tokens("train")
    assert [e["step"] for e in lines if e["event"] == "resume"] == [2]


def test_run_folder_and_summary(run_with: Any, tmp_path: Path, tiny_shards: Path) -> None:
    summary, lines = run_with("run", train__ckpt_keep=1)
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {
        "step_00000006", "best.json", "latest.json", "config.yaml", "logs", "tokenizer.model"
    }  # fmt: skip
    assert summary == json.loads((run / "logs" / "final_training_summary.json").read_text())
    config = load_config(run / "config.yaml").config
    chosen = ["train.technique=blocked", "train.loss_chunk=256", "train.compile=false"]  # the CPU's defaults
    assert config == load_config(tmp_path / "config.yaml", chosen).config
    assert summary["parameters"] == parameter_count(config.model)
    assert (summary["steps"], summary["tokens"], summary["finished"]) == (6, 6 * 4 * 32, True)
    train = [line for line in lines if line["event"] == "train"]
    evals = [line for line in lines if line["event"] == "eval"]
    assert summary["final_loss"] == train[-1]["loss"]
    assert summary["best_val_loss"] == min(line["val_loss"] for line in evals)
    assert [line["step"] for line in evals] == [0, 3, 6]
    assert evals[0]["val_loss"] == pytest.approx(math.log(VOCAB), rel=0.05)
    (shard,) = read_manifest(tiny_shards).shards_in("val")
    ratio = shard.bytes / shard.tokens
    assert evals[0]["val_bpb"] == pytest.approx(evals[0]["val_loss"] / math.log(2) / ratio)
    state = json.loads((run / "step_00000006" / "state.json").read_text())
    assert (state["step"], state["tokens"], state["data_position"]) == (6, 768, 24)
    assert state["random_state"] == {"seed": 0, "step": 6}
    assert state["tokenizer"] == hashlib.sha256((run / "tokenizer.model").read_bytes()).hexdigest()


def test_loss_decreases(run_with: Any) -> None:
    _, lines = run_with(
        "run", train__total_steps=80, train__eval_interval=80, train__log_interval=40, train__ckpt_interval=80,
        train__warmup_steps=5, train__eval_batches=None, model__dropout=0.0,
    )  # fmt: skip
    first, last = (line["val_loss"] for line in lines if line["event"] == "eval")
    assert last < first - 1.5


def test_non_finite_batch_does_not_change_the_weights(
    run_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NaN in the gradient of step 3, the weights stay those of step 2, and the batch is logged."""
    from anarchobot.training.mlx_engine import MLXEngine

    real = MLXEngine._worker_gradients

    def poisoned(self: MLXEngine, batch: Any, step: int, scale: float, worker: int) -> Any:
        total, sums = real(self, batch, step, scale, worker)
        if step == 3:
            name = "model.layers.0.mlp.up_proj.weight"
            sums[name] = sums[name] * float("nan")
            mx.eval(sums)
        return total, sums

    monkeypatch.setattr(MLXEngine, "_worker_gradients", poisoned)
    _, lines = run_with("run", train__ckpt_interval=1, train__eval_interval=10)
    (skip,) = [line for line in lines if line["event"] == "skip"]
    assert (skip["step"], skip["reason"], skip["first_window"], skip["windows"]) == (3, "not finite", 8, 4)
    states = {}
    for step in (4, 5, 6):  # the newest three are kept
        states[step] = checkpoint.find(tmp_path / "run" / f"step_{step:08d}").state
        assert states[step]["engine"]["updates"] == step - 1
        assert len(states[step]["norms"]) == step - 1
    run_with("to 3", train__ckpt_interval=1, train__eval_interval=10, train__total_steps=3, train__lr_decay_steps=6)
    before, after = (checkpoint.find(tmp_path / "to 3" / f"step_{step:08d}").state for step in (2, 3))
    assert before["sha256"] == after["sha256"]
    assert (before["data_position"], after["data_position"]) == (8, 12)


def test_resuming_a_finished_run_does_nothing(run_with: Any, tmp_path: Path) -> None:
    run_with("run")
    before = (tmp_path / "run" / "step_00000006" / "state.json").stat().st_mtime_ns
    summary, _ = run_with("run", train__checkpoint_path="auto")
    assert (summary["steps"], summary["finished"]) == (6, True)
    assert (tmp_path / "run" / "step_00000006" / "state.json").stat().st_mtime_ns == before


def test_worse_validation_after_resume_is_not_best(
    run_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is saved before its own validation, so the checkpoint does not contain its result."""
    from anarchobot.training.mlx_engine import MLXEngine

    losses = iter([5.0, 4.0, 3.0, 3.0, 3.5])  # at steps 0, 3, 6 and, resumed, at 6 again and 9
    monkeypatch.setattr(MLXEngine, "eval_step", lambda self, batch: (next(losses) * 10, 10))
    settings = {"train__eval_batches": 1, "train__lr_decay_steps": 6}
    run_with("run", **settings)
    summary, _ = run_with("run", train__total_steps=9, train__checkpoint_path="auto", **settings)
    assert (summary["steps"], summary["best_val_loss"]) == (9, 3.0)
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (best["step"], best["best_val_loss"]) == (6, 3.0)


def test_a_resumed_run_validates_on_the_sequences_that_it_started_with(
    run_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its micro-batch size: `best` and train.patience compare all. Other eval_batches start them again."""
    from anarchobot.training.mlx_engine import MLXEngine

    def extend(steps: int, **settings: Any) -> tuple[int, float]:
        settings |= {"train__micro_batch_size": 1, "train__grad_accum_steps": 4, "train__checkpoint_path": "auto"}
        settings |= {"train__total_steps": steps, "train__lr_decay_steps": 6, "model__dropout": 0.0}
        _, lines = run_with("run", **settings)
        state = json.loads((tmp_path / "run" / f"step_{steps:08d}" / "state.json").read_text())
        return state["val_sequences"], [line for line in lines if line["event"] == "eval"][-1]["val_loss"]

    _, straight = run_with("straight", train__total_steps=7, train__lr_decay_steps=6, model__dropout=0.0)
    run_with("run", train__lr_decay_steps=6, model__dropout=0.0)  # 2 batches of 2
    expected = [line for line in straight if line["event"] == "eval"][-1]["val_loss"]
    assert extend(7) == (4, pytest.approx(expected, rel=1e-5))
    assert extend(9)[0] == 4
    real = MLXEngine.eval_step  # the losses on the other sequence are higher
    monkeypatch.setattr(MLXEngine, "eval_step", lambda self, batch: real(self, batch) * np.array([3.0, 1.0]))
    sequences, loss = extend(12, train__eval_batches=1)
    assert sequences == 1 and json.loads((tmp_path / "run" / "best.json").read_text())["best_val_loss"] == loss


@pytest.mark.parametrize("where", ["before", "after"])
def test_killed_while_writing_best_json(
    run_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A logged validation is not repeated, so best.json must be written before that."""
    from anarchobot.runs.async_checkpointer import AsyncCheckpointer

    run_with("straight")
    real = AsyncCheckpointer.mark_best

    def killed(self: AsyncCheckpointer, step: int, values: dict[str, Any]) -> None:
        if where == "after":
            real(self, step, values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AsyncCheckpointer, "mark_best", killed)
        run_with("killed")
    run_with("killed", train__checkpoint_path="auto")
    for name in ("best.json", "step_00000006/state.json"):
        straight, resumed = (json.loads((tmp_path / run / name).read_text()) for run in ("straight", "killed"))
        for key in ("step", "sha256", "best_val_loss", "best_val_bpb", "norms"):
            assert straight.get(key) == resumed.get(key), (name, key)


def test_length_in_epochs_is_kept_if_the_batch_size_changes(run_with: Any, tmp_path: Path) -> None:
    """Twice the batch size for the second half: three quarters of the steps, all of the data."""
    epochs = {"train__total_steps": LEFT_OUT, "train__epochs": 0.2, "train__eval_batches": 1, "model__dropout": 0.0}
    whole, _ = run_with("whole", **epochs)
    half = whole["steps"] // 2
    run_with("run", train__total_steps=half, train__eval_batches=1, model__dropout=0.0)
    again = epochs | {"train__micro_batch_size": 4, "train__checkpoint_path": "auto"}
    summary, _ = run_with("run", **again)
    assert summary["steps"] == half + math.ceil((whole["steps"] - half) / 2)
    assert summary["tokens"] >= whole["tokens"]


def test_auto_resume_without_a_checkpoint_starts_a_new_run(run_with: Any) -> None:
    assert run_with("new", train__checkpoint_path="auto")[0]["steps"] == 6


def test_finished_run_can_be_extended(run_with: Any, tmp_path: Path) -> None:
    run_with("run")
    summary, _ = run_with("run", train__total_steps=8, train__checkpoint_path=str(tmp_path / "run" / "step_00000006"))
    assert summary["steps"] == 8


def test_brief_output_has_progress_and_warnings_only(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a new run and of one that goes on; the description is in the log."""
    config = write_config(
        tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__warmup_steps=6, model__sliding_window=32
    )
    for steps in (6, 8):
        assert main(["pretrain", str(config), "--brief", "--steps", str(steps), "--resume-from", "auto"]) == 0
        first = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
        assert set(first) <= {"step", "warning:", "next:"} and ("warning:" in first) == (steps == 6), first
    made_of = json.loads((tmp_path / "run" / "logs" / "environment.json").read_text())["made of"]
    assert any("parameters" in line for line in made_of)
    resumed = [
        line for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines() if "resume" in line
    ]
    assert json.loads(resumed[0])["changed"] == {"train.total_steps": [6, 8]}


def test_samples_do_not_affect_training(run_with: Any, tmp_path: Path) -> None:
    """Sampling draws random numbers, which must not change dropout."""
    run_with("without")
    _, lines = run_with(
        "with", train__sample_interval=2, generation__prompt="The", generation__max_new_tokens=5,
        generation__method="random",
    )  # fmt: skip
    samples = [line for line in lines if line["event"] == "sample"]
    assert [line["step"] for line in samples] == [2, 4, 6]
    assert all(line["text"] for line in samples)
    assert_same_state(tmp_path / "without", tmp_path / "with")


def test_several_shard_folders_with_and_without_weights(tmp_path: Path, tiny_shards: Path, run_with: Any) -> None:
    """The same folder twice gives twice as many windows; weights change the order, and resume stays exact."""
    both = [str(tiny_shards), str(tiny_shards)]
    tokens = read_manifest(tiny_shards).tokens("train")
    summary, _ = run_with("one", train__total_steps=LEFT_OUT, train__epochs=0.01)
    twice, _ = run_with("two", train__total_steps=LEFT_OUT, train__epochs=0.01, data__shard_dir=both)
    assert summary["steps"] == math.ceil(0.01 * math.ceil((tokens - 1) / 32) / 4)
    assert twice["steps"] == math.ceil(0.01 * 2 * math.ceil((tokens - 1) / 32) / 4)
    weighted = {"data__shard_dir": both, "data__shard_weights": [3.0, 1.0], "data__pack": "documents"}
    run_with("straight", **weighted)
    run_with("stopped", train__total_steps=3, train__lr_decay_steps=6, **weighted)
    run_with("stopped", train__lr_decay_steps=6, train__checkpoint_path="auto", **weighted)
    assert_same_state(tmp_path / "straight", tmp_path / "stopped")
    other = make_shards(tmp_path / "other", megabytes=0.05)
    refused(
        r"data.shard_dir: .*other and .*shards were made with different tokenizers",
        tmp_path / "c.yaml", tiny_shards, tmp_path / "run", data__shard_dir=[str(tiny_shards), str(other)],
    )  # fmt: skip


def refused(match: str, path: Path, *args: Any, **overrides: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        pretrain(loaded(path, *args, **overrides), show="nothing")
    assert "\n" not in str(caught.value)


def test_mismatches_are_refused_before_anything_is_written(tmp_path: Path, tiny_shards: Path, run_with: Any) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    refused(r"nowhere: no token shards here .* run `anarchobot pretokenize`", config, tmp_path / "nowhere", run)
    refused(
        r"config.yaml:\d+: model.vocab_size: 400, but the shards .* 384 tokens: set model.vocab_size: 384",
        config, tiny_shards, run, model__vocab_size=400,
    )  # fmt: skip
    refused("fewer than one sequence of data.seq_len", config, tiny_shards, run, data__seq_len=10**6,
            model__max_seq_len=10**6)  # fmt: skip
    refused("no checkpoint here", config, tiny_shards, run, train__checkpoint_path=str(tmp_path / "none"))
    other = make_shards(tmp_path / "other", megabytes=0.05)
    refused(
        r"train.tokenizer_path: .* is not the tokenizer of the shards",
        config, tiny_shards, run, train__tokenizer_path=str(other / "tokenizer.model"),
    )  # fmt: skip
    assert not run.exists()

    run_with("run")
    refused(r"run already contains a run, at step 6: resume it with --resume-from auto", config, tiny_shards, run)
    again = {"train__checkpoint_path": "auto", "train__total_steps": 9}
    refused("started with different shards", config, other, run, **again)
    refused("train.seed was 0 and is now 1", config, tiny_shards, run, train__seed=1, **again)
    refused("data.seq_len was 32 and is now 16", config, tiny_shards, run, data__seq_len=16, **again)
    refused(
        r"model.d_model was 32 and is now 64: it can't change within a run",
        config,
        tiny_shards,
        run,
        model__d_model=64,
        **again,
    )
    refused("model.n_heads was 2 and is now 4", config, tiny_shards, run, model__n_heads=4, **again)
    refused("model.rope_theta was 10000.0 and is now 50.0", config, tiny_shards, run, model__rope_theta=50.0, **again)
    older = str(run / "step_00000003")
    refused(r"later steps, up to 6: to go back to step 3, choose another", config, tiny_shards, run,
            train__checkpoint_path=older)  # fmt: skip
    run_with("second")
    refused(
        "second contains a different run than", config, tiny_shards, tmp_path / "second", train__checkpoint_path=older
    )
    assert run_with("branch", train__checkpoint_path=older)[0]["steps"] == 6
    assert_same_state(run, tmp_path / "branch")
    # Step 3 was the best when the branch started, so it is saved in the branch's folder too, for best.json.
    assert 3 in [e["step"] for e in lines_of(tmp_path / "branch") if e["event"] == "save"]
    assert checkpoint.find(tmp_path / "branch" / "best.json").step in checkpoint.saved_steps(tmp_path / "branch")
    refused(
        "train.optimizer was muon_adamw and is now adamw", config, tiny_shards, run, train__optimizer="adamw", **again
    )


def test_replaced_tokenizer_next_to_the_shards_is_refused(tmp_path: Path, tiny_shards: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    other = make_shards(tmp_path / "other", megabytes=0.05)
    shutil.copy(other / "tokenizer.model", shards / "tokenizer.model")
    refused(
        "not the tokenizer that the shards next to it were made with", tmp_path / "c.yaml", shards, tmp_path / "run"
    )


def test_ctrl_c_saves_prints_the_resume_command_and_exits_with_130(tmp_path: Path, tiny_shards: Path) -> None:
    config = write_config(
        tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__total_steps=10**6, train__eval_interval=10**6,
        train__ckpt_interval=10**6,
    )  # fmt: skip
    command = [sys.executable, "-m", "anarchobot", "pretrain", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "logs" / "metrics.jsonl"
    for _ in range(1500):
        if metrics.exists() and '"train"' in metrics.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    (step,) = checkpoint.saved_steps(tmp_path / "run")
    command_line = f"anarchobot pretrain {tmp_path}/run/config.yaml --resume-from auto"
    assert f"stopped at step {step}; resume with: {command_line}" in err
    assert "Traceback" not in err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["total_steps"] == 10**6


def test_extended_run_keeps_the_best_of_its_previous_end(tmp_path: Path, tiny_shards: Path) -> None:
    """The last step was validated because it was the last, which is not repeated. A shorter length changes nothing."""

    def run(steps: int, **more: Any) -> dict[str, Any]:
        config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__total_steps=steps,
                        train__eval_interval=1000, **more)  # fmt: skip
        return pretrain(config, show="nothing")

    first, auto = run(3), {"train__checkpoint_path": "auto"}
    again = run(5, **auto, train__lr=5.0, train__min_lr=5.0)
    assert (first["best_step"], again["best_step"], again["best_val_loss"]) == (3, 3, first["best_val_loss"])
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert run(2, **auto)["steps"] == 5
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
