"""`anarchobot bench`: what it reports, what it leaves alone, and what it refuses. Times are only asked to be times."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli.main import main
from anarchobot.config.loading import load_config
from anarchobot.model.architecture import architecture
from anarchobot.model.parameters import model_flops, parameter_count, parameter_shapes
from anarchobot.optim.param_groups import muon_flops
from tests.tiny import write_config

PARTS = [
    "embedding", "attention forward", "MLP forward", "head and loss", "MLP backward", "attention backward",
    "update by Muon", "update by AdamW", "the rest",
]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two rows of 32 tokens, twice a step, with dropout; there are no shards."""
    return write_config(tmp_path / "c.yaml", tmp_path / "shards", tmp_path / "run")


def found(config: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["bench", str(config), "--json", "--steps", "1", *words]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], PARTS),
        (["train.cpu_threads=1", "train.optimizer=adamw", "model.dropout=0", "data.document_mask=true",
          "model.tie_embeddings=false", "train.grad_accum_steps=1"],
         [name for name in PARTS if name != "update by Muon"]),
        (["train.cpu_threads=2", "train.gradient_checkpointing=true", "model.n_layers=2", "train.attention_block=8"],
         [*PARTS[:4], "blocks forward again", *PARTS[4:]]),
        (["train.compile=true", "train.gradient_checkpointing=true", "data.document_mask=true"],
         [*PARTS[:4], "blocks forward again", *PARTS[4:]]),
        (["train.precision=bfloat16", "model.qk_norm=true", "train.ema_decay=0.9"], PARTS),
    ],
    ids=["plain", "adamw", "recomputed", "compiled", "bfloat16"],
)  # fmt: skip
def test_what_is_reported(
    words: list[str], parts: list[str], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    result = found(config, capsys, *words)
    assert sorted(tmp_path.iterdir()) == before
    settings = load_config(config, words).config
    model, train = settings.model, settings.train
    assert set(result) == {
        "device", "precision", "optimizer", "parameters", "tokens_per_step", "threads", "blas", "steps", "step",
        "peak", "parts",
    }  # fmt: skip
    assert (result["device"], result["steps"], result["optimizer"]) == ("cpu", 1, train.optimizer)
    assert result["precision"] == (train.precision or "float32")
    assert result["parameters"] == parameter_count(model)
    assert result["tokens_per_step"] == 2 * 32 * train.grad_accum_steps
    assert result["threads"] in ((1,) if train.compile else (train.cpu_threads,) if train.cpu_threads else (1, 2))

    size, rows = train.attention_block or 32, 2 * train.grad_accum_steps
    blocks = [(start, start + size) for start in range(0, 32, size)]
    step = result["step"]
    llama = architecture("llama")
    assert step["model_flops"] == model_flops(model, rows, blocks)
    assert step["recomputed_flops"] == llama.recomputed_flops(model, rows, blocks, train.gradient_checkpointing)
    assert step["model_flops_per_token"] == step["model_flops"] / result["tokens_per_step"]
    assert step["compiled"] == bool(train.compile)
    assert step["gflop_per_second"] == pytest.approx(step["model_flops"] / step["ms"] / 1e6)
    assert step["share_of_peak"] == pytest.approx(step["gflop_per_second"] / result["peak"]["gflop_per_second"])
    assert step["tokens_per_second"] == pytest.approx(1e3 * result["tokens_per_step"] / step["ms"])
    assert step["peak_memory_mb"] * 1e6 > 4 * 3 * result["parameters"]  # weights and at least two moments or gradients
    assert step["traces"] > 0

    assert [part["name"] for part in result["parts"]] == parts
    assert all(part["ms"] > 0 for part in result["parts"] if part["name"] != "the rest")
    assert sum(part["share"] for part in result["parts"]) == pytest.approx(1)
    counts = {part["name"]: part["flops"] for part in result["parts"]}
    muon = counts.pop("update by Muon", None)
    flops = muon_flops(parameter_shapes(model), train, model.head_size, on_cpu=True, reduced_float32=False)
    assert muon in (None, flops)
    assert sum(counts.values()) == step["model_flops"] + step["recomputed_flops"]
    expected = llama.step_flops(model, rows, blocks)
    assert counts == {name: count for name, count in expected.items() if name in parts} | {
        "update by AdamW": 0,
        "the rest": 0,
    }


def test_two_runs_count_the_same(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = found(config, capsys), found(config, capsys)
    for result in (first, second):
        assert result["step"].pop("ms") > 0
        assert result["peak"].pop("gflop_per_second") > 0
        for timed in ("tokens_per_second", "gflop_per_second", "share_of_peak", "peak_memory_mb"):
            del result["step"][timed]
        result["parts"] = [(part["name"], part["flops"]) for part in result["parts"]]
    assert first == second


def test_the_table_has_a_line_a_part(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(config), "--steps", "1", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    head, table = captured.out.split("\n\n")
    assert f"{parameter_count(load_config(config).config.model):,} parameters, float32 on cpu" in head
    assert "step of 128 random tokens" in head
    lines = table.splitlines()
    assert [line[:22].strip() for line in lines] == ["part", *PARTS]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.backend=torch"], "command line: train.backend: bench measures the MLX backend only: leave torch out"),
        (["--steps", "0"], "argument --steps: expected an integer >= 1, got '0'"),
        (["--steps", "few"], "argument --steps: expected an integer >= 1, got 'few'"),
        (["model.n_heads=3"], "d_model (32) must be divisible by n_heads (3)"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], told: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(config), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err
    assert captured.err.count("\n") == 1


def test_ctrl_c_ends_it_quietly(config: Path, tmp_path: Path) -> None:
    """The config comes through a pipe: when it has been taken, the command is at work, and soon in its threads."""
    os.mkfifo(tmp_path / "pipe.yaml")
    command = [sys.executable, "-m", "anarchobot", "bench", str(tmp_path / "pipe.yaml"), "--steps", str(10**6)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    (tmp_path / "pipe.yaml").write_text(config.read_text())
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.endswith("anarchobot: stopped\n")
