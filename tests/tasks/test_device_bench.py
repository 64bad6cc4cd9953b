"""`anarchobot bench --device`: what it reports, what it stores, and what it refuses. No times are compared."""

import getpass
import json
import math
import platform
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from anarchobot.cli.main import main
from anarchobot.config.loading import load_config
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.model.architecture import architecture
from anarchobot.model.parameters import parameter_count
from anarchobot.optim import polar_express
from anarchobot.system.memory import estimate
from anarchobot.system.technique import StepSettings, cache_file, read_measured
from anarchobot.tasks import device_bench, device_checks
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.technique import resolve_technique, technique_key
from anarchobot.training.mlx_engine import MLXEngine
from tests.tasks.tuning import base as base
from tests.tasks.tuning import preferences as preferences
from tests.tasks.tuning import tuning
from tests.tiny import loaded, write_config

Result = dict[str, Any]
Accumulate = Callable[..., Any]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few turns, small matrices, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    monkeypatch.setattr(device_bench, "MOST_TURNS", 2)
    monkeypatch.setattr(device_checks, "LENGTH", 32)
    monkeypatch.setattr(device_checks, "PIECE", 16)
    monkeypatch.setattr(device_checks, "VOCAB", 64)


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the variants are measured, in three techniques and mlx-lm, not compiled."""
    monkeypatch.setattr(device_bench, "_alternatives", lambda settings, config: [])
    right = {"largest_error": 0.0, "right": True}
    monkeypatch.setattr(
        device_bench, "check_gradients", lambda config, technique, *_: [{"technique": technique, **right}]
    )
    monkeypatch.setattr(device_bench, "check_orthogonalization", lambda config: [])


def leaves(value: Any) -> Iterator[Any]:
    """All numbers, strings and keys in a JSON value."""
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_result_is_complete_anonymous_and_used_by_a_run(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a micro-batch of 320 tokens: chunks of 256 and all tokens."""
    monkeypatch.chdir(tmp_path)
    overrides: Result = {"model__dropout": 0.0, "train__micro_batch_size": 10}
    config = write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **overrides)
    assert main(["bench", str(config), "--device", "--quiet"]) == 0
    captured = capsys.readouterr()
    result: Result = json.loads((tmp_path / "anarchobot-device.json").read_text())
    for personal in (socket.gethostname(), platform.node(), getpass.getuser(), str(Path.home()), str(tmp_path)):
        words = re.compile(rf"(?<!\w){re.escape(personal)}(?!\w)")
        assert not [text for text in leaves(result) if isinstance(text, str) and words.search(text)]

    settings = load_config(config).config
    assert all(math.isfinite(number) for number in leaves(result) if isinstance(number, float))
    assert result["seconds"] < 180
    assert result["run"]["parameters"] == parameter_count(settings.model)
    assert (result["device"]["kind"], result["device"]["name"]) == ("cpu", mx.device_info()["device_name"])
    assert {"Python", "anarchobot", "mlx", "mlx-lm"} <= set(result["versions"])

    assert [found["technique"] for found in result["gradients"]] == ["blocked", "fused", "autodiff"]
    for found in result["gradients"]:
        assert found["largest_error"] == max(found["errors"].values()) == found["errors"][found["parameter"]] < 1e-4
        assert found["loss_error"] < 1e-5 and found["right"] and not found["differ_when_repeated"]
    for found in result["orthogonalization"]:
        assert 1 < found["largest"] < 1.15 and found["right"] and not found["products_rounded"]
    assert [found["MLX_ENABLE_TF32"] for found in result["orthogonalization"]] == [None, "0", "1"]

    variants = result["variants"]
    assert {row["gradient_checkpointing"] for row in variants if row["program"] == "mlx-lm"} == {False, True}
    assert {row.get("technique") for row in variants} == {"blocked", "fused", "autodiff", None}
    assert {row.get("loss_chunk") for row in variants} == {256, 320, None}
    assert {row.get("compile") for row in variants} == {False, True, None}
    for row in variants:
        assert row["error"] is None and row["runs"] >= 2 and row["ms"] > 0 and row["peak_memory"] > 0
        assert row["time_by_mlx_lm"] > 0 and row["peak_by_mlx_lm"] > 0
    chosen, step = StepSettings(**result["chosen"]), result["step"]
    assert chosen in [tuple(map(row.get, StepSettings._fields)) for row in variants]
    assert step["micro_batches"] == 2
    assert step["estimate_by_peak"] == pytest.approx(step["estimated_memory"] / step["peak_memory"])
    assert step["peak_memory"] < step["memory_budget"]

    assert captured.err == "" and "WRONG" not in captured.out
    assert captured.out.splitlines()[0].startswith(f"{result['device']['name']}, cpu, ")
    rows = [line for line in captured.out.splitlines() if "loss_chunk" in line and "fastest" not in line]
    assert len(rows) == sum(row["program"] == "anarchobot" for row in variants)
    assert f"stored in {cache_file()}" in captured.out

    assert read_measured(technique_key(settings, "pretrain")) == chosen
    run = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **overrides, train__total_steps=1)
    pretrain(run, show="nothing")
    train = load_config(tmp_path / "run" / "config.yaml").config.train
    assert (train.technique, train.loss_chunk, train.compile) == chosen


def test_gradients_in_bfloat16_have_larger_errors(tmp_path: Path, tiny_shards: Path) -> None:
    """With grouped heads, norms of queries and keys, and biases, as the configuration has them."""
    features: Result = {"model__n_heads": 4, "model__n_kv_heads": 2}
    features |= {"model__qk_norm": True, "model__attention_bias": True}
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **features).config
    exact, rounded = device_checks.check_gradients(config, "fused", ["float32", "bfloat16"], segments=True)
    assert exact["largest_error"] < 1e-4 < rounded["largest_error"] < 0.1
    assert exact["right"] and rounded["right"]
    assert {"model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.k_proj.bias"} <= set(exact["errors"])


def failing(technique: str, error: Exception, original: Accumulate) -> Accumulate:
    def accumulate(self: MLXEngine, *arguments: Any) -> Any:
        if self.options.technique == technique:
            raise error
        return original(self, *arguments)

    return accumulate


def test_the_cpus_gradients_leave_the_limit_of_the_cache(tmp_path: Path, tiny_shards: Path) -> None:
    """The variants of a GPU are measured after them."""
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run").config
    limit = mx.set_cache_limit(123 << 20)
    device_checks.check_gradients(config, "blocked", [], segments=False)
    assert mx.set_cache_limit(limit) == 123 << 20


@pytest.mark.usefixtures("no_checks")
def test_variant_that_runs_out_of_memory_is_listed_and_not_chosen(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine makes MLX's error a MemoryError."""
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")
    error = RuntimeError("[malloc] Unable to allocate 64 bytes for /Users/ada/model.")
    monkeypatch.setattr(MLXEngine, "_worker_gradients", failing("autodiff", error, MLXEngine._worker_gradients))
    result = device_bench.device_bench(config)
    (row,) = [row for row in result["variants"] if row.get("technique") == "autodiff"]
    assert row["error"] == "out of memory: [malloc] Unable to allocate 64 bytes for [path]"
    assert (row["runs"], row["ms"], row["time_by_mlx_lm"]) == (0, None, None)
    assert result["chosen"]["technique"] in ("blocked", "fused")


@pytest.mark.usefixtures("no_checks")
def test_nothing_above_the_budget_runs(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Automatic differentiation and mlx-lm need more than hand-written gradients, so they are the first to be left out;
    a whole step above the budget is not chosen either."""
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")
    budget = 2 * estimate(config.config).peak
    monkeypatch.setattr(device_bench, "memory_budget", lambda config: budget)
    result = device_bench.device_bench(config)
    errors = {row.get("technique", "mlx-lm"): row["error"] for row in result["variants"] if row["error"]}
    assert set(errors) == {"autodiff", "mlx-lm"}
    assert set(errors.values()) == {"out of memory: an estimated 0.00 GB, and the budget is 0.00 GB: not run"}

    monkeypatch.setattr(device_bench._Bench, "_build", lambda self, variant: lambda: mx.eval(mx.zeros(9)))
    monkeypatch.setattr(device_bench._Bench, "_whole_step", lambda self, config: {"peak_memory": budget + 1})
    result = device_bench.device_bench(config)
    assert result["chosen"] is None and result["step"] is None
    assert "out of memory: the whole step is above the budget" in [row["error"] for row in result["variants"]]


def test_technique_with_wrong_gradients_is_not_chosen(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gradient of `fused` and `autodiff` is a tenth too large. `blocked` alone is no choice."""
    monkeypatch.setattr(device_bench, "check_orthogonalization", lambda config: [])
    monkeypatch.setattr(device_bench, "_alternatives", lambda settings, config: [])
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")
    original = MLXEngine._accumulate_gradients

    def accumulate(self: MLXEngine, *arguments: Any) -> Any:
        metrics, grads = original(self, *arguments)
        if self.options.technique != "blocked":
            grads["model.norm.weight"] = 1.1 * grads["model.norm.weight"]
        return metrics, grads

    monkeypatch.setattr(MLXEngine, "_accumulate_gradients", accumulate)
    result = device_bench.device_bench(config)
    found = {row["technique"]: row for row in result["gradients"]}
    assert {name: row["right"] for name, row in found.items()} == {"blocked": True, "fused": False, "autodiff": False}
    assert found["fused"]["parameter"] == "model.norm.weight"
    assert found["fused"]["largest_error"] == pytest.approx(0.1, rel=1e-3)
    assert result["chosen"] is None and not cache_file().exists()
    assert all(row["ms"] for row in result["variants"])  # measured all the same


def test_gradients_that_differ_when_repeated_are_named(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run").config
    calls = iter(range(9))
    original = MLXEngine._accumulate_gradients

    def accumulate(self: MLXEngine, *arguments: Any) -> Any:
        metrics, grads = original(self, *arguments)
        grads["model.norm.weight"] = grads["model.norm.weight"] + 1e-9 * next(calls)
        return metrics, grads

    monkeypatch.setattr(MLXEngine, "_accumulate_gradients", accumulate)
    (found,) = device_checks.check_gradients(config, "blocked", ["float32"], segments=True)
    assert found["differ_when_repeated"] == ["model.norm.weight"] and found["right"]


def test_wrong_singular_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the margins of the last steps, or with products that are not exact enough, they exceed 1.15."""
    good = device_checks.largest_singular_values([(8, 32)])
    assert good["right"] and len(good["values"]) == len(device_checks.DECAYS)
    monkeypatch.setattr(device_checks, "orthogonalize", lambda g: 1.4 * polar_express.orthogonalize(g))
    bad = device_checks.largest_singular_values([(8, 32)])
    assert not bad["right"] and bad["largest"] == pytest.approx(1.4 * good["largest"], rel=1e-4)


@pytest.mark.usefixtures("no_checks")
def test_no_run_begins_after_the_time_is_up(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run")
    monkeypatch.setattr(device_bench, "FIRST_ROUND", 0.0)
    result = device_bench.device_bench(config)
    assert {row["error"] for row in result["variants"]} == {"not measured: no time left"}
    assert result["chosen"] is None and not cache_file().exists()


@pytest.mark.usefixtures("no_checks")
def test_pairs_are_measured_under_their_own_key(tmp_path: Path, base: Path, preferences: Path) -> None:
    config = tuning(tmp_path, "run", base, preferences, lora__r=4)
    result = device_bench.device_bench(config, "dpo")
    assert result["run"]["task"] == "dpo" and result["chosen"] is not None
    (error,) = {row["error"] for row in result["variants"] if row["program"] == "mlx-lm"}
    assert error == "not measured: mlx-lm is compared in training of all weights on sequences only"
    assert resolve_technique(config.config, "dpo").messages[0].count("(measured on ") == 1
    assert resolve_technique(config.config, "sft").messages == []  # the default


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mlx_lm_computes_the_gradients_that_a_run_computes(
    checkpointing: bool, tmp_path: Path, tiny_shards: Path
) -> None:
    """Of the same weights and tokens. Its checkpointing patches a class, which other models must not notice."""
    config = loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", model__dropout=0.0).config
    batch, original = device_bench._random_batch(config, "pretrain", 1), llama.TransformerBlock.__call__
    mx.random.seed(0)
    (loss, tokens), grads = device_bench._mlx_lm_step(config, batch, checkpointing)()
    assert llama.TransformerBlock.__call__ is original
    mx.random.seed(0)
    settings: Any = llama.ModelArgs
    weights: Any = llama.Model(settings.from_dict(architecture("llama").to_hf(config.model))).parameters()
    engine = MLXEngine(config, {name: np.array(value) for name, value in dict(tree_flatten(weights)).items()})
    (total,), expected = engine._accumulate_gradients(batch, 1, 1 / batch.inputs.size)
    assert int(tokens) == batch.inputs.size
    assert float(loss) == pytest.approx(total / batch.inputs.size, rel=1e-5)
    found = dict(tree_flatten(grads))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


def test_speeds_are_compared_within_a_round() -> None:
    """A machine that became slower: the winner of the first round took part in the second, with a faster variant."""
    best = device_bench.Measured({(1, 1): 1.0, (1, 2): 3.0, (2, 1): 10.0, (2, 2): 12.0, (2, 3): 11.0})
    other = device_bench.Measured({(2, 1): 10.0, (2, 2): 9.0, (2, 3): 8.0})
    loser = device_bench.Measured({(1, 1): 2.0, (1, 2): 4.5})
    peer = device_bench.Measured({(1, 1): 2.0, (1, 2): 4.0, (2, 1): 10.0, (2, 2): 10.0, (2, 3): 10.0})
    assert sorted([loser, best, other], key=lambda found: found.rank) == [other, best, loser]
    assert (best.median, other.median, loser.median) == (11.0, 9.0, 3.25)
    assert (best.relative_to(peer), other.relative_to(peer)) == (1.0, 0.9)
    assert loser.relative_to(device_bench.Measured()) is None


def test_json_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        device_bench, "device_bench", lambda loaded, task, log: {"device": {"kind": "metal"}, "task": task}
    )
    config = write_config(tmp_path / "c.yaml", tmp_path / "shards", tmp_path / "run")
    assert main(["bench", str(config), "--device", "--json", "--output", str(tmp_path / "x.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "x.json").read_text()) == {"device": {"kind": "metal"}, "task": "pretrain"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "3"], "argument --steps: not with --device"),
        (["train.backend=torch"], "train.backend: bench measures the MLX backend only: leave torch out"),
        (["--output", "nowhere/x.json"], "--output nowhere/x.json: no such folder: nowhere"),
    ],
)
def test_mistake_is_one_line(words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "c.yaml", tmp_path / "shards", tmp_path / "run")
    assert main(["bench", str(config), "--device", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and told in captured.err and captured.err.count("\n") == 1


def test_output_is_for_device_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "c.yaml", tmp_path / "shards", tmp_path / "run")
    assert main(["bench", str(config), "--output", "x.json"]) == 2
    assert capsys.readouterr().err.endswith("argument --output: only with --device\n")


def test_other_settings_must_be_faster_than_the_default_by_a_margin() -> None:
    """A difference of a percent may be noise."""
    default = StepSettings("blocked", 256, False)
    other = device_bench.Variant(default._replace(technique="fused"), False)
    config = Config.model_validate({"model": {"n_layers": 1, "d_model": 16, "n_heads": 2, "vocab_size": 32}})
    bench = device_bench._Bench(config, "pretrain", default, set(), lambda text: None)
    for seconds, fastest in ((0.99, default), (0.9, other.settings)):
        bench.measured = {
            device_bench.Variant(default, False): device_bench.Measured({(1, 1): 1.0}),
            other: device_bench.Measured({(1, 1): seconds}),
        }
        assert bench.by_speed(False)[0].settings == fastest


def test_the_small_model_has_each_kind_of_block() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    model = ModelConfig(n_layers=6, sliding_window=4096, layer_types=kinds)  # type: ignore[arg-type]
    assert device_checks._small_model(model).windows == [None, device_checks.LENGTH // 3]
    assert device_checks._small_model(ModelConfig()).windows == [None, None]


def test_peak_memory_of_a_variant_is_not_that_of_an_earlier_one() -> None:
    default = StepSettings("blocked", 256, False)
    large, small = (device_bench.Variant(default, peer) for peer in (True, False))
    config = Config.model_validate({"model": {"n_layers": 1, "d_model": 16, "n_heads": 2, "vocab_size": 32}})
    bench = device_bench._Bench(config, "pretrain", default, set(), lambda text: None)
    bench._steps = {large: lambda: mx.eval(mx.zeros(2**22)), small: lambda: mx.eval(mx.zeros(2**8))}
    found = {variant: device_bench.Measured() for variant in (large, small)}
    for variant in (large, small):
        bench._run(variant, found[variant], 1)
    assert found[small].peak < 2**20 < found[large].peak
