"""MLX and PyTorch: each resumes the other's checkpoints, and neither needs the other installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.run import OutputMode
from tests.tiny import loaded, write_config

WITHOUT = """
import importlib.util, runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {names!r} else find(name, *rest)
runpy.run_module("anarchobot", run_name="__main__")
"""


def without(names: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the program as if these packages were not installed."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names), *words], capture_output=True, text=True, check=False
    )


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "logs" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "train"}


@pytest.mark.parametrize(("first", "then"), [("mlx", "torch"), ("torch", "mlx")])
def test_resume_with_the_other_backend(
    tmp_path: Path, tiny_shards: Path, first: str, then: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps with each, against six with one: same losses, and the change is reported."""
    pytest.importorskip("torch").set_num_threads(1)
    settings: dict[str, Any] = {"model__dropout": 0.0, "train__log_interval": 1, "train__lr_decay_steps": 6}

    def run(name: str, show: OutputMode = "nothing", **more: Any) -> None:
        config = loaded(tmp_path / "config.yaml", tiny_shards, tmp_path / name, **settings, **more)
        assert pretrain(config, show=show)["finished"]

    run("straight", train__backend=first)
    run("changed", train__backend=first, train__total_steps=3)
    run("changed", show="progress", train__backend=then, train__checkpoint_path="auto")
    assert f"train.backend from {first} to {then}" in capsys.readouterr().err
    straight, changed = losses(tmp_path / "straight"), losses(tmp_path / "changed")
    assert list(straight) == list(changed) == [1, 2, 3, 4, 5, 6]
    assert changed == pytest.approx(straight, abs=1e-5)
    assert [straight[step] for step in (1, 2, 3)] == [changed[step] for step in (1, 2, 3)]


def test_pytorch_trains_and_samples_without_mlx(tmp_path: Path, tiny_shards: Path) -> None:
    pytest.importorskip("torch")
    config = write_config(
        tmp_path / "config.yaml", tiny_shards, tmp_path / "run", train__sample_interval=3, generation__max_new_tokens=4
    )
    done = without(("mlx", "mlx_lm"), "pretrain", str(config), "--backend", "torch")
    assert done.returncode == 0, done.stderr
    assert "float32 on cpu (PyTorch)" in done.stderr and "step 3: sample: " in done.stderr
    assert "best validation loss" in done.stdout


def test_missing_pytorch_error(tmp_path: Path, tiny_shards: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_shards, tmp_path / "run")
    done = without(("torch",), "pretrain", str(config), "--backend", "torch")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("anarchobot: train.backend: torch") and "pip install 'anarchobot[torch]'" in line
    assert not (tmp_path / "run").exists()
