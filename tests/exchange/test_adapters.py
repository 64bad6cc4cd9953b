"""LoRA adapters: mlx-lm and PEFT read ours with equal logits, and we read theirs."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.schema import LoraConfig, ModelConfig
from anarchobot.exchange import safetensors_file
from anarchobot.exchange.adapters import (
    FILES,
    FORMATS,
    Adapter,
    AdapterFormat,
    BaseQuantization,
    make_adapter,
    read_adapter,
    write_adapter,
)
from anarchobot.exchange.exporting import export
from anarchobot.exchange.fusing import _quantize_dequantize, fuse, merge_adapter
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.inference.model import load_model
from anarchobot.model.frozen import adapter_constants, frozen_weights
from anarchobot.model.llama.forward import hidden_states
from anarchobot.model.lora import adapter_shapes
from anarchobot.model.loss import logits
from anarchobot.runs import checkpoint
from anarchobot.storage.durable import write_checksummed
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.exchange.random_run import make_run, our_logits, random_parameters, real_ids

CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "queries and values of the last block, rsLoRA": {
        "target_modules": ["q_proj", "v_proj"], "num_layers": 1, "rslora": True,
    },
    "DoRA": {"dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
}  # fmt: skip


def shape_of(run: Path) -> ModelConfig:
    return checkpoint.find(run).config.model


def adapter_for(model: ModelConfig, precision: Any = "float32", **more: Any) -> Adapter:
    """Random adapters that change the logits by about their own magnitude."""
    lora = LoraConfig(**{"r": 4, "alpha": 8.0, "dropout": 0.1, **more})
    rng = np.random.default_rng(1)
    weights = {
        name: (0.15 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        for name, shape in adapter_shapes(model, lora).items()
    }
    return make_adapter(weights, model, lora, precision)


def adapted_logits(run: Path, adapter: Adapter, ids: list[int], bits: int | None = None) -> np.ndarray:
    """Logits of our forward pass with unmerged adapters."""
    params, model = random_parameters(shape_of(run)), shape_of(run)
    frozen = frozen_weights(params, model, mx.float32, bits)
    everything = {**frozen, **adapter_constants(frozen, model, adapter.scales, adapter.dora)}
    everything |= {name: mx.array(value) for name, value in adapter.weights.items()}
    return np.array(logits(hidden_states(everything, mx.array([ids]), model), everything, model))[0]


@pytest.fixture
def run(tmp_path: Path, bpe: Path) -> Path:
    return make_run(tmp_path / "run", bpe)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_round_trip(run: Path, tmp_path: Path, form: AdapterFormat, case: str) -> None:
    written = adapter_for(shape_of(run), **CASES[case])
    write_adapter(tmp_path / "adapter", written, shape_of(run), form)
    read = read_adapter(tmp_path / "adapter", shape_of(run))
    assert read.scales == pytest.approx(written.scales) and read.dropout == 0.1 and read.quantization is None
    assert set(read.weights) == set(written.weights)
    assert all(np.array_equal(array, read.weights[name]) for name, array in written.weights.items())


@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_computes_our_logits(run: Path, tmp_path: Path, case: str) -> None:
    from mlx_lm import load

    adapter = adapter_for(shape_of(run), **CASES[case])
    export(run, "mlx", tmp_path / "model")
    write_adapter(tmp_path / "adapter", adapter, shape_of(run), "mlx", str(tmp_path / "model"))
    model, _ = load(str(tmp_path / "model"), adapter_path=str(tmp_path / "adapter"))[:2]
    model.eval()
    ids = real_ids(run, 300)
    ours = adapted_logits(run, adapter, ids)
    assert np.abs(ours - our_logits(run, ids)).max() > 0.5
    np.testing.assert_allclose(ours, np.array(model(mx.array([ids])))[0], atol=2e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_our_logits_and_its_own_file_is_equal(run: Path, tmp_path: Path, case: str) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    adapter = adapter_for(shape_of(run), **CASES[case])
    export(run, "hf", tmp_path / "model")
    write_adapter(tmp_path / "adapter", adapter, shape_of(run), "peft", str(tmp_path / "model"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = real_ids(run, 300)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(adapted_logits(run, adapter, ids), theirs, atol=2e-4)

    model.save_pretrained(tmp_path / "theirs")
    read = read_adapter(tmp_path / "theirs", shape_of(run))
    assert read.scales == pytest.approx(adapter.scales) and set(read.weights) == set(adapter.weights)
    assert all(np.array_equal(array, read.weights[name]) for name, array in adapter.weights.items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_rank_and_alpha_patterns(run: Path, tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export(run, "hf", tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 6},
        alpha_pattern={"layers.1.mlp.down_proj": 3}, use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(base, settings).eval()
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", shape_of(run))
    assert {round(scale**2 * 6 if "down" in name else scale**2 * 4, 3) for name, scale in adapter.scales.items()} == {
        64,
        9,
    }
    ids = real_ids(run, 100)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(adapted_logits(run, adapter, ids), theirs, atol=2e-4)
    with pytest.raises(UserError, match=r"different ranks or scales .*: use anarchobot fuse"):
        write_adapter(tmp_path / "again", adapter, shape_of(run), "mlx")


def test_adapters_trained_by_mlx_lm(run: Path, tmp_path: Path) -> None:
    """Made with mlx-lm's own layers and saved in float16."""
    from mlx.utils import tree_flatten
    from mlx_lm import load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    export(run, "mlx", tmp_path / "model")
    model, _ = load(str(tmp_path / "model"))[:2]
    model.freeze()
    settings = {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": ["self_attn.v_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, 1, settings)
    weights = {
        n: (p + mx.random.normal(p.shape) * 0.1).astype(mx.float16)
        for n, p in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(weights.items()), strict=False)
    (tmp_path / "theirs").mkdir()
    mx.save_safetensors(str(tmp_path / "theirs" / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path / "theirs", shape_of(run))
    assert adapter.weights["model.layers.1.mlp.up_proj.lora_a"].shape == (48, 3) and set(adapter.scales.values()) == {
        5.0
    }
    ids = real_ids(run, 100)
    model.eval()
    np.testing.assert_allclose(adapted_logits(run, adapter, ids), np.array(model(mx.array([ids])))[0], atol=5e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMATS)
def test_fused_logits_equal_unmerged_logits(run: Path, tmp_path: Path, form: AdapterFormat, case: str) -> None:
    adapter = adapter_for(shape_of(run), **CASES[case])
    write_adapter(tmp_path / "adapter", adapter, shape_of(run), form)
    done = fuse(run, tmp_path / "adapter", tmp_path / "fused")
    assert done["adapted"] == len(adapter.scales) and done["warnings"] == []
    ids = real_ids(run, 300)
    np.testing.assert_allclose(our_logits(tmp_path / "fused", ids), adapted_logits(run, adapter, ids), atol=1e-4)
    model, config = load_model(tmp_path / "fused")
    assert config.lora.r is None and config.train.save_dir == str(tmp_path / "fused")
    assert model.tokenizer.vocab_size == load_tokenizer(run).vocab_size


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_fusing_with_a_quantized_base_uses_its_dequantized_weights(
    tmp_path: Path, bpe: Path, bits: int, dora: bool
) -> None:
    run = make_run(tmp_path / "run", bpe, d_model=64)
    adapter = adapter_for(shape_of(run), quantize=bits, dora=dora)
    write_adapter(tmp_path / "adapter", adapter, shape_of(run), "mlx")
    assert read_adapter(tmp_path / "adapter", shape_of(run)).quantization == BaseQuantization(bits, "float32")
    fuse(run, tmp_path / "adapter", tmp_path / "fused")
    ids = real_ids(run, 200)
    expected = adapted_logits(run, adapter, ids, bits)
    np.testing.assert_allclose(our_logits(tmp_path / "fused", ids), expected, atol=1e-4)
    assert np.abs(adapted_logits(run, adapter, ids) - expected).max() > (0.1 if bits == 4 else 1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_dequantize_equals_mlx(bits: int) -> None:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((16, 128)).astype(np.float32)
    for weight in (normal, np.abs(normal) + 1, -np.abs(normal), np.zeros_like(normal), np.full_like(normal, -0.3)):
        packed = mx.quantize(mx.array(weight), group_size=64, bits=bits)
        theirs = mx.dequantize(*packed, group_size=64, bits=bits)
        np.testing.assert_array_equal(_quantize_dequantize(weight, BaseQuantization(bits, "float32")), theirs)
        w, *parts = packed
        narrow = (part.astype(mx.bfloat16).astype(mx.float32) for part in parts)
        theirs = mx.dequantize(w, *narrow, group_size=64, bits=bits)
        np.testing.assert_allclose(_quantize_dequantize(weight, BaseQuantization(bits, "bfloat16")), theirs, atol=1e-6)


def test_fuse_command_with_a_run_and_a_hugging_face_folder(run: Path, tmp_path: Path, capsys: Any) -> None:
    """The adapters come from a checkpoint, which can't be loaded as a model by itself."""
    config = checkpoint.find(run).config
    lora = LoraConfig(r=4, alpha=8.0, dora=True)
    adapter = adapter_for(config.model, **lora.model_dump())
    tuned = config.model_copy(update={"lora": lora})
    arrays = {f"params/{name}": array for name, array in adapter.weights.items()}
    others = {name: array * 0 for name, array in arrays.items()}
    checkpoint.save(tmp_path / "tuned", 9, others, {"tokens": 1, "config": tuned.model_dump()})
    write_checksummed(tmp_path / "tuned" / "best.json", {"step": 7})  # the newest step, 9, is not the best
    checkpoint.save(tmp_path / "tuned", 7, arrays, {"tokens": 1, "config": tuned.model_dump()})
    export(run, "hf", tmp_path / "hf")
    for base in (run, tmp_path / "hf"):
        words = [
            "--model",
            str(base),
            "--adapter",
            str(tmp_path / "tuned"),
            "--output",
            str(tmp_path / f"{base.name}2"),
        ]
        assert main(["fuse", *words]) == 0
        printed = capsys.readouterr().out
        assert f"{tmp_path / 'tuned'}: step 7\n" in printed and printed.endswith(
            "parameters, adapters merged into 14 matrices\n"
        )
        assert printed.startswith(str(run / "step_00000040" if base == run else base))
        ids = real_ids(run, 100)
        z = our_logits(tmp_path / f"{base.name}2", ids)
        np.testing.assert_allclose(z, adapted_logits(run, adapter, ids), atol=1e-4)
    assert main(["fuse", *words]) == 2
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"adapters \(lora.r: 4\), not a whole model: fuse them"):
        load_pretrained(str(tmp_path / "tuned"))
    assert main(["fuse", "--model", str(run), "--adapter", str(run), "--output", str(tmp_path / "x")]) == 2
    assert "a whole model, not adapters" in capsys.readouterr().err


def test_chat_template_of_the_adapters_takes_precedence_over_the_models(run: Path, tmp_path: Path, capsys: Any) -> None:
    write_adapter(tmp_path / "tuned" / "adapters", adapter_for(shape_of(run)), shape_of(run), "mlx")
    words = ["fuse", "--model", str(run), "--adapter", str(tmp_path / "tuned" / "adapters"), "--json", "--output"]
    found = []
    for template_folder in (None, run, tmp_path / "tuned", tmp_path / "tuned"):
        if template_folder is not None:
            (template_folder / "chat_template.jinja").write_text(template_folder.name)
        if len(found) == 3:  # make it a run; a template next to any other folder is unrelated to the adapters
            (tmp_path / "tuned" / "step_00000001").mkdir()
            (tmp_path / "tuned" / "step_00000001" / "state.json").touch()
        assert main([*words, str(tmp_path / f"out{len(found)}")]) == 0
        assert json.loads(capsys.readouterr().out)["adapted"] == 14
        file = tmp_path / f"out{len(found)}" / "chat_template.jinja"
        found.append(file.read_text() if file.exists() else None)
    assert found == [None, "run", "run", "tuned"]


def test_adapters_of_another_model_are_rejected_by_digest(run: Path, tmp_path: Path, bpe: Path) -> None:
    """Even with equal shapes, from a run and in mlx-lm's format. Adapters without a digest are accepted."""
    shape = shape_of(run)
    other = make_run(tmp_path / "other", bpe, random_parameters(shape, 1))
    lora = LoraConfig(r=4)
    adapter = make_adapter(adapter_for(shape, alpha=16.0).weights, shape, lora, "float32")
    state = {"config": checkpoint.find(run).config.model_copy(update={"lora": lora}).model_dump()}
    arrays = {f"params/{name}": array for name, array in adapter.weights.items()}
    checkpoint.save(tmp_path / "tuned", 7, arrays, {"base": load_pretrained(str(run)).digest, **state})
    read = read_adapter(tmp_path / "tuned", shape)
    assert read.step == 7 and read.base == load_pretrained(str(run)).digest
    with pytest.raises(UserError, match=r"tuned: .* has shape .*: these adapters are for another model"):
        read_adapter(tmp_path / "tuned", shape.model_copy(update={"d_model": 64}))
    write_adapter(tmp_path / "mlx", read, shape, "mlx")
    write_adapter(tmp_path / "unknown", adapter, shape, "mlx")
    for i, name in enumerate(("tuned", "mlx")):
        with pytest.raises(UserError, match=f"{name}: these adapters were not trained on the model in") as error:
            fuse(other, tmp_path / name, tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        fuse(run, tmp_path / name, tmp_path / f"out{i}")
    fuse(other, tmp_path / "unknown", tmp_path / "out")


def test_merge_equals_float64() -> None:
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(s).astype(np.float32) for s in ((6, 5), (5, 4), (4, 6)))
    (merged,) = merge_adapter(
        {"x.weight": w}, Adapter({"x.lora_a": a, "x.lora_b": b}, {"x": 0.5}), ModelConfig()
    ).values()
    np.testing.assert_allclose(merged, w + 0.5 * (a.astype(np.float64) @ b).T, atol=1e-6)


def damage(folder: Path, form: AdapterFormat, what: str) -> None:
    file, config = folder / FILES[form], folder / "adapter_config.json"
    values = json.loads(config.read_text())
    tensors = {name: tensor.load() for name, tensor in safetensors_file.read(file).items()}
    name = min(tensors)
    if what == "other model":
        tensors = {n.replace("layers.1", "layers.7"): t for n, t in tensors.items()}
    elif what == "other width":
        tensors[name] = np.zeros((tensors[name].shape[0] + 1, tensors[name].shape[1]), np.float32)
    elif what == "half":
        del tensors[name]
    elif what == "nan":
        tensors[name][0, 0] = np.nan
    elif what == "head":
        tensors["lm_head.lora_a" if form == "mlx" else "base_model.model.lm_head.lora_A.weight"] = tensors[name]
    elif what == "bias":
        tensors[("" if form == "mlx" else "base_model.model.") + "model.layers.0.mlp.up_proj.bias"] = tensors[name]
    elif what == "none":
        tensors = {}
    elif what == "no config":
        config.unlink()
        return
    elif what == "full":
        values |= {"fine_tune_type": "full", "peft_type": "PROMPT_TUNING"}
    elif what == "pissa":
        values["init_lora_weights"] = "pissa_niter_4"
    elif what == "no scale":
        values["lora_parameters"], values["lora_alpha"] = {"rank": 4}, None
    safetensors_file.write(file, tensors, "float32", {})
    config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("form", "what", "message"),
    [
        *[
            (form, "other model", "the model has no matrix .*layers.7.*: these adapters are for another model")
            for form in FORMATS
        ],
        *[(form, "other width", "these adapters are for another model") for form in FORMATS],
        *[(form, "half", "has no lora_a: the file is incomplete") for form in FORMATS],
        *[(form, "nan", "not finite") for form in FORMATS],
        *[(form, "head", "the model has no matrix lm_head") for form in FORMATS],
        *[(form, "bias", "un.*ed tensor .*up_proj.bias") for form in FORMATS],
        *[(form, "none", "no adapters in this file") for form in FORMATS],
        *[(form, "no config", "adapter_config.json: can't be read as JSON") for form in FORMATS],
        ("mlx", "full", "unsupported fine_tune_type 'full': expected lora or dora"),
        ("peft", "full", "unsupported peft_type 'PROMPT_TUNING': expected LORA"),
        ("peft", "pissa", "init_lora_weights 'pissa_niter_4' also changes the base weights"),
        ("mlx", "no scale", "scale: expected a number, got None"),
        ("peft", "no scale", "lora_alpha: expected a number, got None"),
    ],
)
def test_invalid_adapters_are_rejected(run: Path, tmp_path: Path, form: AdapterFormat, what: str, message: str) -> None:
    write_adapter(tmp_path / "adapter", adapter_for(shape_of(run)), shape_of(run), form)
    damage(tmp_path / "adapter", form, what)
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        fuse(run, tmp_path / "adapter", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_missing_adapters_and_pickles_are_rejected(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no adapters: expected adapters.safetensors or adapter_model.safetensors"):
        read_adapter(tmp_path / "empty", shape_of(run))
    (tmp_path / "empty" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="a pickle, which can run code"):
        read_adapter(tmp_path / "empty", shape_of(run))
    shutil.rmtree(tmp_path / "empty")
    with pytest.raises(UserError, match="no adapters"):
        read_adapter(tmp_path / "empty", shape_of(run))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"alpha_pattern": ["q_proj"]}', "alpha_pattern: expected a mapping from module names to numbers"),
        ('{"alpha_pattern": "q_proj"}', "alpha_pattern: expected a mapping from module names to numbers"),
        ('{"alpha_pattern": {"(": 1}}', "alpha_pattern: invalid regular expression: missing"),
        (
            '{"alpha_pattern": {"' + "(" * 5000 + ")" * 5000 + '": 1}}',
            "alpha_pattern: a key of 10,000 characters, at most 1,000",
        ),
        (
            '{"alpha_pattern": {"' + "(" * 500 + ")" * 500 + '": 1}}',
            "alpha_pattern: invalid regular expression: maximum",
        ),
        ('{"alpha_pattern": {"a{9999999999}": 1}}', "alpha_pattern: invalid regular expression: the repetition number"),
        (
            json.dumps({"alpha_pattern": {f".*{i}": 1 for i in range(101)}}),
            "alpha_pattern: 101 expressions with repetitions, at most 100",
        ),
        ('{"alpha_pattern": {"(.*)*x": 1}}', "alpha_pattern: '(.*)*x' could take too long to match"),
        ('{"alpha_pattern": {".*": "much"}}', "expected a number, got 'much'"),
        ("[" * 200_000 + "]" * 200_000, "can't be read as JSON"),
    ],
    ids=["list", "text", "regex", "long regex", "deep regex", "repetition", "many", "slow regex", "value", "deep"],
)
def test_extreme_peft_configs_are_one_line_errors(run: Path, tmp_path: Path, text: str, message: str) -> None:
    model, folder = shape_of(run), tmp_path / "extreme"
    write_adapter(folder, adapter_for(model), model, "peft")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **json.loads(text)}) if text[0] == "{" else text)
    with pytest.raises(UserError) as error:
        read_adapter(folder, model)
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_of_other_models_are_rejected_before_they_are_loaded(run: Path, tmp_path: Path) -> None:
    """By NumPy's own allocations: a matrix of 4 MB that the model does not have, and one of the wrong shape."""
    model, folder = shape_of(run), tmp_path / "adapter"
    write_adapter(folder, adapter_for(model), model, "mlx")
    file = folder / FILES["mlx"]
    tensors = {name: tensor.load() for name, tensor in safetensors_file.read(file).items()}
    for name in ("model.layers.9.mlp.up_proj.lora_a", min(tensors)):
        safetensors_file.write(file, {**tensors, name: np.zeros((1000, 1000), np.float32)}, "float32", {})
        tracemalloc.start()
        with pytest.raises(UserError, match="these adapters are for another model"):
            read_adapter(folder, model)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < file.stat().st_size / 8
