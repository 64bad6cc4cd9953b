"""Runs of several ranks over loopback: same losses as a single process, and how they stop."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.runs import checkpoint
from anarchobot.tasks import launch
from anarchobot.tasks.pretrain import pretrain
from anarchobot.training.rendezvous import join
from tests.ranks import TIMEOUT, rank_environments
from tests.tiny import loaded, write_config

# Dropout (0.1) is seeded by micro-batch and worker, so it is the same with one worker each.
SETTINGS: dict[str, Any] = {"train__cpu_threads": 1, "train__schedule": "constant"}
LONG = ("train.total_steps=1000000", "train.eval_interval=1000000", "train.ckpt_interval=5", "train.log_interval=1000")


def losses(run: Path) -> list[tuple[int, str, float, float]]:
    """Returns (step, event, loss, gradient norm or bits per byte) of steps and validations."""
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    keys = {"train": ("loss", "grad_norm"), "eval": ("val_loss", "val_bpb")}
    return [
        (e["step"], e["event"], *(e[name] for name in keys[e["event"]])) for e in lines if e["event"] in keys
    ]  # fmt: skip


def assert_same_losses(a: Path, b: Path) -> None:
    assert [e[:2] for e in losses(a)] == [e[:2] for e in losses(b)]
    np.testing.assert_allclose([e[2:] for e in losses(a)], [e[2:] for e in losses(b)], rtol=0, atol=1e-5)


def run_ranks(config: Path, *words: str, ranks: int = 2) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "anarchobot", "launch", "-n", str(ranks), "--", "pretrain", str(config), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_sharded_muon_equals_single_process(tmp_path: Path, tiny_shards: Path) -> None:
    """On three ranks; AdamW's parameters are not sharded."""
    settings = SETTINGS | {"train__total_steps": 6, "train__eval_interval": 100, "train__log_interval": 1}
    config = loaded(tmp_path / "one.yaml", tiny_shards, tmp_path / "one", **settings, train__grad_accum_steps=3)
    pretrain(config, show="nothing")
    three = write_config(tmp_path / "r.yaml", tiny_shards, tmp_path / "three", **settings, train__grad_accum_steps=1)
    done = run_ranks(three, "train.share_muon=true", ranks=3)
    assert done.returncode == 0, done.stderr
    assert_same_losses(tmp_path / "one", tmp_path / "three")
    ends = [
        checkpoint.load_arrays(f, f.config.model, optimizer=True)
        for f in map(checkpoint.find, (tmp_path / "one", tmp_path / "three"))
    ]
    for name, array in ends[0].items():
        np.testing.assert_allclose(array, ends[1][name], rtol=0, atol=1e-4, err_msg=name)


def test_two_ranks_equal_one_process_with_twice_the_accumulation(tmp_path: Path, tiny_shards: Path) -> None:
    """Also if the number of ranks changes: 2 steps with one, 2 with two, 2 with one again."""
    pretrain(loaded(tmp_path / "one.yaml", tiny_shards, tmp_path / "one", **SETTINGS), show="nothing")

    two = write_config(tmp_path / "two.yaml", tiny_shards, tmp_path / "two", **SETTINGS, train__grad_accum_steps=1)
    done = run_ranks(two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'two'}: step 6, 768 tokens") and "2 ranks (ring)" in done.stderr
    assert done.stderr.count("step 6/6") == 1  # only rank 0 prints
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    state = checkpoint.find(tmp_path / "two").state
    assert (state["ranks"], state["data_position"], state["tokens"]) == (2, 24, 768)

    mixed, auto = tmp_path / "mixed", {"train__checkpoint_path": "auto"}
    evals = {"train__eval_interval": 100}
    for steps, more in ((2, {}), (6, auto)):
        settings = {**SETTINGS, **evals, **more, "train__total_steps": steps}
        config = loaded(tmp_path / "mixed.yaml", tiny_shards, mixed, **settings)
        if steps == 6:
            done = run_ranks(tmp_path / "two.yaml", f"train.save_dir={mixed}", "train.checkpoint_path=auto",
                            "train.total_steps=4", "train.eval_interval=100")  # fmt: skip
            assert done.returncode == 0 and "ranks from 1 to 2" in done.stderr, done.stderr
        pretrain(config, show="nothing")
    steps_of = [[e[:1] + e[2:] for e in losses(run) if e[1] == "train"] for run in (tmp_path / "one", mixed)]
    np.testing.assert_allclose(*steps_of, rtol=0, atol=1e-5)
    ends = [
        checkpoint.load_arrays(f, f.config.model, optimizer=True)
        for f in map(checkpoint.find, (tmp_path / "one", mixed))
    ]
    for name, array in ends[0].items():
        np.testing.assert_allclose(array, ends[1][name], rtol=0, atol=1e-4, err_msg=name)


def started(config: Path, run: Path) -> "tuple[subprocess.Popen[str], dict[int, int]]":
    """Starts a long run of two ranks and waits for a checkpoint; returns the process and the ranks' process ids."""
    words = ["launch", "-n", "2", "--", "pretrain", str(config), *LONG, "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "anarchobot", *words], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + TIMEOUT
    while not checkpoint.saved_steps(run):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children = sorted(int(pid) for pid, parent in map(str.split, table.splitlines()) if int(parent) == process.pid)
    return process, dict(enumerate(children))  # started in order


@pytest.mark.parametrize("lost", [0, 1])
def test_killed_rank_is_reported_and_stops_the_others(tmp_path: Path, tiny_shards: Path, lost: int) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_shards, tmp_path / "run", **SETTINGS)
    process, ranks = started(config, tmp_path / "run")
    os.kill(ranks[lost], signal.SIGKILL)
    began = time.monotonic()
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1 and time.monotonic() - began < 60
    assert f"anarchobot: rank {lost} was killed by SIGKILL" in stderr
    assert f"anarchobot: rank {lost} ended early: stopping rank {1 - lost}; resume from the last" in stderr
    for pid in ranks.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    step = checkpoint.find(tmp_path / "run").step
    summary = pretrain(
        loaded(config, tiny_shards, tmp_path / "run", **SETTINGS, train__checkpoint_path="auto",
               train__total_steps=step + 1, train__grad_accum_steps=4),
        show="nothing",
    )  # fmt: skip
    assert (summary["finished"], summary["steps"]) == (True, step + 1)


def test_ctrl_c_saves_once_and_stops_all(tmp_path: Path, tiny_shards: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_shards, tmp_path / "run", **SETTINGS)
    process, _ = started(config, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert stderr.count("Ctrl-C: saving after this step; press it again") == 1 and "ended early" not in stderr
    (step,) = re.findall(r"stopped at step (\d+); resume with: anarchobot launch ... -- pretrain", stderr)
    assert max(checkpoint.saved_steps(tmp_path / "run")) == int(step)


# Rank 1 runs out of memory in its second step.
OUT_OF_MEMORY = """
    import os, sys
    from anarchobot.cli.main import main
    from anarchobot.system.blas import load_fast_blas
    load_fast_blas()
    from anarchobot.training.mlx_engine import MLXEngine
    real, tries = MLXEngine._worker_gradients, []
    def failing(self, batch, step, *rest):
        tries.append(step)
        if os.environ["MLX_RANK"] == "1" and tries == [1, 2]:
            raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
        return real(self, batch, step, *rest)
    MLXEngine._worker_gradients = failing
    sys.exit(main(sys.argv[1:]))
"""


def run_each(folder: Path, code: str, *words: list[str]) -> list[tuple[int, str]]:
    """Runs `code` on each rank with its own arguments; returns exit codes and stderr."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *own], env=env, stderr=subprocess.PIPE, text=True
        )
        for env, own in zip(rank_environments(folder, len(words)), words, strict=True)
    ]
    try:
        stderr = [child.communicate(timeout=TIMEOUT)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, text) for child, text in zip(children, stderr, strict=True)]


def test_out_of_memory_on_one_rank_shrinks_the_micro_batch_on_all(tmp_path: Path, tiny_shards: Path) -> None:
    settings = {**SETTINGS, "model__dropout": 0.0, "train__total_steps": 3}
    pretrain(loaded(tmp_path / "one.yaml", tiny_shards, tmp_path / "one", **settings), show="nothing")
    two = write_config(tmp_path / "two.yaml", tiny_shards, tmp_path / "two", **settings, train__grad_accum_steps=1)
    words = ["pretrain", str(two)]
    (code, stderr), (other, _) = run_each(tmp_path, OUT_OF_MEMORY, words, words)
    assert (code, other) == (0, 0), stderr
    assert "step 2: out of memory: continuing with train.micro_batch_size=1 train.grad_accum_steps=2" in stderr
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_strangers_during_joining_change_nothing(tmp_path: Path, tiny_shards: Path) -> None:
    """50 silent connections, and some with a wrong secret, while rank 0 waits for rank 1."""
    settings = {**SETTINGS, "train__total_steps": 2, "train__eval_interval": 2}
    pretrain(loaded(tmp_path / "one.yaml", tiny_shards, tmp_path / "one", **settings), show="nothing")
    config = write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "two", **settings, train__grad_accum_steps=1)
    command, environments = (
        [sys.executable, "-m", "anarchobot", "pretrain", str(config)],
        rank_environments(tmp_path, 2),
    )
    port = int(json.loads((tmp_path / "ring.json").read_text())[0][0].rpartition(":")[2])

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)

    with ExitStack() as stack:
        zero = stack.enter_context(subprocess.Popen(command, env=environments[0], stderr=subprocess.PIPE, text=True))
        stack.callback(zero.kill)
        while True:
            try:
                silent = [stack.enter_context(connect())]
                break
            except ConnectionRefusedError:
                assert zero.poll() is None
                time.sleep(0.05)
        silent += [stack.enter_context(connect()) for _ in range(49)]
        for _ in range(3):
            with pytest.raises(UserError, match="ANARCHOBOT_RANKS_SECRET differs"):
                join(1, "127.0.0.1", port, b"wrong", [])
        one = stack.enter_context(subprocess.Popen(command, env=environments[1], stderr=subprocess.PIPE, text=True))
        stack.callback(one.kill)
        while silent[0].recv(64):  # until all ranks have joined
            pass
        with suppress(ConnectionError):  # refused, or reset if the port is closed meanwhile
            while True:  # the port is closed just after these connections
                connect().close()
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in (zero, one)]
        assert (zero.returncode, one.returncode) == (0, 0), errors
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_the_secret_is_in_the_environment_of_ranks_only(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def popen(command: list[str], env: dict[str, str], **options: Any) -> "subprocess.Popen[bytes]":
        started.append((command, env))
        return subprocess.Popen([sys.executable, "-c", ""], **options)

    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=popen))
    for _ in range(2):
        assert launch.launch_local(["pretrain", "c.yaml"], 2) == 0
    secrets = [env["ANARCHOBOT_RANKS_SECRET"] for _, env in started]
    assert secrets[0] == secrets[1] != secrets[2] == secrets[3] and all(len(s) == 64 for s in secrets)
    assert not any(secret in word for command, _ in started for word in command for secret in secrets)


def test_different_settings_on_ranks_are_refused(tmp_path: Path, tiny_shards: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_shards, tmp_path / "run", **SETTINGS)
    words = ["pretrain", str(config)]
    code = "import sys; from anarchobot.cli.main import main; sys.exit(main(sys.argv[1:]))"
    (first, stderr), (second, reason) = run_each(tmp_path, code, words, [*words, "train.lr=0.5"])
    assert second == 2 and "rank 1: train.lr is 0.5, but rank 0 has 0.01" in reason
    assert first == 1 and "rank 1 ended early" in stderr
    assert not checkpoint.saved_steps(tmp_path / "run")


def test_an_error_of_all_ranks_is_printed_once(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the ranks on this machine, and by mlx.launch, whose output is that of all ranks."""
    config = write_config(tmp_path / "config.yaml", tmp_path / "nothing", tmp_path / "run", **SETTINGS)
    done = run_ranks(config, ranks=3)
    assert done.returncode == 2
    assert "no token shards here" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""

    lines = ["anarchobot: no shards", "Node with rank 1 exited with code 2", "anarchobot: no shards", "x", "x"]
    popen = partial(subprocess.Popen, [sys.executable, "-c", f"import sys; sys.stderr.write({chr(10).join(lines)!r})"])
    replacement = SimpleNamespace(Popen=lambda command, **options: popen(**options), PIPE=subprocess.PIPE)
    monkeypatch.setattr(launch, "subprocess", replacement)
    assert launch.launch_with_mlx(["pretrain", "c.yaml"], []) == 2
    assert capsys.readouterr().err.split("\n") == [*lines[:2], "x", "x"]


def test_single_process_tasks_are_refused(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_HOSTFILE", "MLX_RANK"):
        monkeypatch.setenv(name, rank_environments(tmp_path, 2)[1][name])
    with pytest.raises(UserError, match=r"train.backend: torch trains in a single process: set train.backend to mlx"):
        pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__backend="torch"), show="nothing")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0", "--", "pretrain", "x"], "argument -n/--ranks: expected an integer >= 1, got '0'"),
        (
            ["--backend", "tcp", "--", "pretrain", "x"],
            "argument --backend: expected one of ring, mpi, nccl, jaccl, got 'tcp'",
        ),
        (["--hosts", ",", "--", "pretrain", "x"], "--hosts: expected addresses separated by commas"),
        (["--hosts", "a", "--hostfile", "f", "--", "pretrain", "x"], "--hosts and --hostfile: expected only one"),
        (["--hostfile", "f", "-n", "2", "--", "pretrain", "x"], "--ranks: not allowed with --hostfile"),
        (["--", "generate", "x"], "launch: expected a command after --: one of pretrain, sft, dpo"),
        (["--", "pretrain", "none.yaml"], "none.yaml: no such file"),
        (["--", "pretrain", "configs/quickstart.yaml", "--lr", "fast"], "train.lr"),
        (["--", "sft", "configs/quickstart.yaml"], "expected the model to fine-tune"),
    ],
)
def test_usage_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *words]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1


def test_mpi_without_mpirun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["launch", "--backend", "mpi", "--", "pretrain", "c.yaml"]) == 2
    assert "--backend mpi: mpirun was not found" in capsys.readouterr().err


def test_other_machines_are_started_by_mlx_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(launch, "launch_with_mlx", lambda words, options: calls.append((words, options)) or 0)
    assert main(["launch", "--hosts", "10.0.0.1,10.0.0.2", "--", "pretrain", "c.yaml", "--resume-from", "auto"]) == 0
    assert main(["launch", "--hostfile", "f", "--backend", "jaccl", "--quiet", "--", "pretrain", "c.yaml"]) == 0
    assert main(["launch", "--backend", "mpi", "-n", "3", "--", "sft", "c.yaml"]) == 0
    assert calls == [
        (["pretrain", "c.yaml", "--resume-from", "auto"], ["--hosts", "10.0.0.1,10.0.0.2", "-n", "1"]),
        (["pretrain", "c.yaml", "--quiet"], ["--hostfile", "f", "--backend", "jaccl"]),
        (["sft", "c.yaml"], ["--hosts", "127.0.0.1", "-n", "3", "--backend", "mpi"]),
    ]
