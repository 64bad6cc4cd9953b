"""Adapters used without fusing: the logits of the fused model, on the base that they name or that is given."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.schema import LoraConfig
from anarchobot.exchange.adapters import Adapter, AdapterFormat, make_adapter, write_adapter
from anarchobot.exchange.exporting import export
from anarchobot.exchange.fusing import fuse
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.inference.model import load_model
from anarchobot.model.llama.forward import hidden_states
from anarchobot.model.lora import adapter_shapes
from anarchobot.model.loss import logits
from anarchobot.runs import checkpoint
from tests.exchange.quantized_folder import quantize_folder
from tests.exchange.random_run import make_run, our_logits, real_ids

SETTINGS: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"dora": True}, "QLoRA": {"quantize": 4}}


@pytest.fixture
def run(tmp_path: Path, bpe: Path) -> Path:
    return make_run(tmp_path / "run", bpe, d_model=64)


def random_adapter(base: Path, **settings: Any) -> tuple[Adapter, LoraConfig]:
    """Adapters that change the logits by about their own magnitude."""
    model, lora = load_pretrained(str(base)).model, LoraConfig(**{"r": 4, "alpha": 8.0, **settings})
    rng = np.random.default_rng(1)
    weights = {
        name: (0.15 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in adapter_shapes(model, lora).items()
    }
    return make_adapter(weights, model, lora, "float32"), lora


def tuned_run(folder: Path, base: Path, **settings: Any) -> Path:
    """A run with lora.r whose best step is 7 and whose newest, with other adapters, is 9."""
    adapter, lora = random_adapter(base, **settings)
    pretrained = load_pretrained(str(base))
    config = pretrained.config.model_copy(update={"lora": lora})
    config = config.model_copy(update={"train": config.train.model_copy(update={"init_from": str(base)})})
    state = {"config": config.model_dump(), "base": pretrained.digest, "precision": "float32"}
    for step, factor in ((7, 1), (9, 0)):
        arrays = {f"params/{name}": array * factor for name, array in adapter.weights.items()}
        checkpoint.save(folder, step, arrays, state)
    checkpoint.write_best(folder, 7, {})
    for file in pretrained.tokenizer.files:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def logits_of(path: Path, ids: list[int], base_model: str | None = None) -> np.ndarray:
    model, _ = load_model(path, base_model)
    hidden = hidden_states(model.params, mx.array([ids]), model.config)
    return np.array(logits(hidden, model.params, model.config))[0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_are_those_of_the_fused_model(run: Path, tmp_path: Path, settings: str) -> None:
    """A run (its best step), a step, and adapter folders of mlx-lm and PEFT."""
    tuned = tuned_run(tmp_path / "tuned", run, **SETTINGS[settings])
    adapter, _ = random_adapter(run, **SETTINGS[settings])
    paths = [tuned, tuned / "best.json", tuned / "step_00000007"]
    forms: tuple[AdapterFormat, ...] = ("mlx", "peft")
    for form in forms:
        write_adapter(tmp_path / form, adapter, load_pretrained(str(run)).model, form, str(run))
        paths.append(tmp_path / form)
    fuse(run, tuned, tmp_path / "fused")
    ids = real_ids(run, 60)
    expected = our_logits(tmp_path / "fused", ids)
    assert np.abs(expected - our_logits(run, ids)).max() > 0.5
    for path in paths:
        np.testing.assert_allclose(logits_of(path, ids), expected, atol=1e-4)
    _, config = load_model(tuned)
    assert config.lora.r is None and config.train.init_from == str(run)


@pytest.mark.parametrize("dora", [False, True])
def test_on_a_base_that_is_quantized_in_its_folder(run: Path, tmp_path: Path, dora: bool) -> None:
    export(run, "mlx", tmp_path / "floats")
    packed = quantize_folder(tmp_path / "floats", tmp_path / "packed", bits=4, group_size=32)
    tuned = tuned_run(tmp_path / "tuned", packed, dora=dora)
    done = fuse(packed, tuned, tmp_path / "fused")
    assert any("weights of 4 bits are dequantized to float32" in warning for warning in done["warnings"])
    ids = real_ids(run, 60)
    np.testing.assert_allclose(logits_of(tuned, ids), our_logits(tmp_path / "fused", ids), atol=1e-4)

    adapter, _ = random_adapter(packed, dora=dora)
    forms: tuple[AdapterFormat, ...] = ("mlx", "peft")
    for form in forms:
        write_adapter(tmp_path / form, adapter, load_pretrained(str(packed)).model, form, str(packed))
        recorded = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert recorded["trained_on"] == {"bits": 4, "group_size": 32}
        np.testing.assert_allclose(logits_of(tmp_path / form, ids), our_logits(tmp_path / "fused", ids), atol=1e-4)
        message = (
            "trained on weights quantized to 4 bits and correct their rounding; those in .*floats are not quantized"
        )
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / form, str(tmp_path / "floats"))
        with pytest.raises(UserError, match=message):
            fuse(tmp_path / "floats", tmp_path / form, tmp_path / "out")
    other = quantize_folder(tmp_path / "floats", tmp_path / "other", bits=8, group_size=32)
    with pytest.raises(UserError, match=r"those in .*other are quantized to 8 bits"):
        load_model(tmp_path / "peft", str(other))
    adapter, _ = random_adapter(run, quantize=4)
    write_adapter(tmp_path / "qlora", adapter, load_pretrained(str(run)).model, "mlx", str(run))
    with pytest.raises(UserError, match=r"quantized to 4 bits by lora\.quantize, and .*packed is quantized already"):
        load_model(tmp_path / "qlora", str(packed))


def test_the_base_can_be_given_and_its_digest_must_match(run: Path, tmp_path: Path, bpe: Path) -> None:
    tuned, ids = tuned_run(tmp_path / "tuned", run), real_ids(run, 20)
    expected = logits_of(tuned, ids)
    (tmp_path / "elsewhere").mkdir()
    run = run.rename(tmp_path / "elsewhere" / "run")
    load_pretrained.cache_clear()
    with pytest.raises(UserError, match=r"the base model, according to .*init_from; pass it with --model if it moved"):
        load_model(tuned)
    np.testing.assert_array_equal(logits_of(tuned, ids, str(run)), expected)
    other = make_run(tmp_path / "other", bpe, d_model=64, n_layers=3)
    for base, message in ((str(other), "not trained on the model in"), (str(tuned), "adapters .*, not a whole model")):
        with pytest.raises(UserError, match=message):
            load_model(tuned, base)
    with pytest.raises(UserError, match="is a whole model, which needs no base model: remove --model"):
        load_model(other, str(run))
    adapter, _ = random_adapter(run)
    write_adapter(tmp_path / "nameless", adapter, load_pretrained(str(run)).model, "mlx")
    with pytest.raises(UserError, match=r"adapter_config\.json: names no base model: pass the one"):
        load_model(tmp_path / "nameless")
    np.testing.assert_array_equal(logits_of(tmp_path / "nameless", ids, str(run)), expected)


def test_commands(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """generate and evaluate print what they print for the fused model."""
    adapter, _ = random_adapter(run)
    write_adapter(tmp_path / "adapters", adapter, load_pretrained(str(run)).model, "peft", "moved")
    (tmp_path / "adapters" / "chat_template.jinja").write_text("{{ messages }}")
    fuse(run, tmp_path / "adapters", tmp_path / "fused")
    (tmp_path / "text.txt").write_text("Some words to score.\n" * 20)
    commands = {
        "generate": ["--prompt", "A", "--method", "greedy", "--max-new-tokens", "12"],
        "evaluate": ["--text", str(tmp_path / "text.txt"), "--json", "--quiet"],
    }
    for command, words in commands.items():
        assert main([command, "--checkpoint", str(tmp_path / "fused"), *words]) == 0
        fused = capsys.readouterr().out
        assert main([command, "--checkpoint", str(tmp_path / "adapters"), "--model", str(run), *words]) == 0
        printed = capsys.readouterr()
        assert "chat_template.jinja: not used" in printed.err
        if command == "generate":
            assert printed.out == fused
        else:
            ours, theirs = (next(iter(json.loads(text)["results"].values())) for text in (printed.out, fused))
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert main(["evaluate", "--compare", "a", "b", "--model", "c", "--text", "d"]) == 2
    assert "argument --model: only with --checkpoint" in capsys.readouterr().err
