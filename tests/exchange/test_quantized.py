"""Folders quantized by mlx-lm: logits, training and memory, compared with mlx-lm itself."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, LoraConfig, ModelConfig
from anarchobot.data.windows import Batch
from anarchobot.exchange.exporting import export
from anarchobot.exchange.importing import _load_own, import_model, load_hf_folder
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.inference.model import load_model
from anarchobot.model import linear as linear_file
from anarchobot.model.frozen import inference_weights
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.llama.forward import hidden_states
from anarchobot.model.loss import logits
from anarchobot.model.quantization import BITS, GROUP_SIZES, Packing, check_format, dequantize, packings
from anarchobot.optim.param_groups import ADAMW_BETA1, ADAMW_BETA2
from anarchobot.system.memory import _frozen_bytes
from anarchobot.training.mlx_engine import MLXEngine
from tests.exchange.quantized_folder import quantize_folder
from tests.exchange.random_run import make_run, our_logits, real_ids


def mixed(path: str, module: Any) -> bool | dict[str, int]:
    """Values in 3 bits, the last MLP not quantized, the rest as usual."""
    return {"bits": 3, "group_size": 64} if "v_proj" in path else "layers.1.mlp" not in path


CASES: dict[str, dict[str, Any]] = {
    "4 bits, groups of 64": {"bits": 4, "group_size": 64},  # without down_proj: 160 columns are not a multiple
    "6 bits, groups of 32": {"bits": 6, "group_size": 32},
    "8 bits, groups of 32": {"bits": 8, "group_size": 32},
    "mixed": {"bits": 4, "group_size": 32, "quant_predicate": mixed},
}


@pytest.fixture
def floats(tmp_path: Path, bpe: Path) -> Path:
    """A folder of mlx-lm with float32 weights."""
    run = make_run(tmp_path / "run", bpe, d_model=64, tie_embeddings=False)
    export(run, "mlx", tmp_path / "floats")
    return tmp_path / "floats"


def their_model(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return model


def compute_logits(params: Params, model: ModelConfig, ids: list[int]) -> np.ndarray:
    return np.array(logits(hidden_states(params, mx.array([ids]), model), params, model))[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_mlx_lm_and_nothing_is_unpacked(
    floats: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantize_folder(floats, tmp_path / "packed", **CASES[case])
    model, _ = load_model(folder)
    ids, theirs = real_ids(tmp_path / "run", 100), their_model(folder)
    expected = np.array(theirs(mx.array([ids])))[0]
    assert np.abs(expected - our_logits(tmp_path / "run", ids)).max() > 0.02
    for unpacks in (True, False):  # as on a CPU, and as on a GPU
        monkeypatch.setattr(linear_file, "_should_dequantize", lambda x, unpacks=unpacks: unpacks)
        np.testing.assert_allclose(compute_logits(model.params, model.config, ids), expected, atol=1e-4)
    size = sum(p.nbytes for p in model.params.values())
    assert size == sum(p.nbytes for _, p in tree_flatten(theirs.parameters()))
    assert size == _frozen_bytes(model.config, LoraConfig(), 4)  # the estimate
    layers = {name: layer for name, layer in theirs.named_modules() if hasattr(layer, "scales")}
    assert packings(model.config) == {
        f"{n}.weight": Packing(layer.bits, layer.group_size) for n, layer in layers.items()
    }


def test_bfloat16_scales_and_an_embedding_with_more_rows_than_tokens(floats: Path, tmp_path: Path) -> None:
    tensors = dict(mx.load(str(floats / "model.safetensors")))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = mx.concatenate([tensors[name], mx.ones((12, 64))])
    mx.save_safetensors(str(floats / "model.safetensors"), tensors, {"format": "mlx"})
    config = json.loads((floats / "config.json").read_text()) | {"vocab_size": 512}
    (floats / "config.json").write_text(json.dumps(config))
    folder = quantize_folder(floats, tmp_path / "packed", mx.bfloat16, bits=4, group_size=32)
    model, _ = load_model(folder)
    ids = real_ids(tmp_path / "run", 50)
    expected = np.array(their_model(folder)(mx.array([ids])))[0]
    np.testing.assert_allclose(compute_logits(model.params, model.config, ids), expected, atol=1e-4)
    assert model.config.vocab_size == 500 and expected.shape == (50, 512)
    import_model(folder, tmp_path / "imported")  # without the rows that have no token
    np.testing.assert_allclose(our_logits(tmp_path / "imported", ids), expected[:, :500], atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_dequantized_without_mlx_as_by_mlx(bits: int, group_size: int) -> None:
    packed, scales, biases = mx.quantize(mx.random.normal((5, 256)), group_size=group_size, bits=bits)
    ours = dequantize(np.array(packed).reshape(5, -1, bits), np.array(scales), np.array(biases))
    theirs = mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("dora", "compiled"), [(False, False), (False, True), (True, False)])
def test_ten_steps_have_the_losses_of_mlx_lms_trainer(floats: Path, tmp_path: Path, dora: bool, compiled: bool) -> None:
    """On rows of equal length, because mlx-lm also trains on a token of padding. Its AdamW has other betas by
    default."""
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    folder = quantize_folder(floats, tmp_path / "packed", **CASES["mixed"])
    base, theirs = load_pretrained(str(folder)), their_model(folder)
    settings = {
        "model": base.model.model_dump(), "data": {"seq_len": 24}, "lora": {"r": 4, "alpha": 8.0, "dora": dora},
        "train": {
            "optimizer": "adamw", "micro_batch_size": 3, "weight_decay": 0.0, "max_grad_norm": 1e9, "device": "cpu",
            "compile": compiled,
        },
    }  # fmt: skip
    engine = MLXEngine(Config.model_validate(settings), base.weights)
    frozen = {name: p for name, p in engine.frozen.items() if p.dtype == mx.uint32}
    assert {name: Packing(p.shape[2], 32 * p.shape[1] // engine.frozen[f"{name[:-7]}.scales"].shape[1])
            for name, p in frozen.items()} == packings(base.model)  # fmt: skip
    keys = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    theirs.freeze()
    linear_to_lora_layers(theirs, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}, use_dora=dora)
    theirs.load_weights(list(engine.params.items()), strict=False)
    optimizer = mlx.optimizers.AdamW(0.01, [ADAMW_BETA1, ADAMW_BETA2], weight_decay=0.0, bias_correction=True)
    step = nn.value_and_grad(theirs, default_loss)
    ids = np.random.default_rng(0).integers(0, 500, (3, 25)).astype(np.int32)
    batch = Batch(np.ascontiguousarray(ids[None, :, :-1]), np.ascontiguousarray(ids[None, :, 1:]))
    for i in range(1, 11):
        (loss, _), grads = step(theirs, mx.array(ids), mx.array([[0, 25]] * 3))
        optimizer.update(theirs, grads)
        assert engine.train_step(batch, i, 0.01, 0.9).loss == pytest.approx(loss.item(), abs=1e-4), i


def test_import_dequantizes_and_says_so(floats: Path, tmp_path: Path) -> None:
    folder = quantize_folder(floats, tmp_path / "packed", **CASES["mixed"])
    done = import_model(folder, tmp_path / "imported")
    assert any("dequantized to float32" in warning for warning in done["warnings"])
    ids = real_ids(tmp_path / "run", 100)
    expected = np.array(their_model(folder)(mx.array([ids])))[0]
    np.testing.assert_allclose(our_logits(tmp_path / "imported", ids), expected, atol=1e-4)
    assert load_pretrained(str(tmp_path / "imported")).model.quantization is None


@pytest.mark.usefixtures("without_garbage")
def test_weights_are_read_and_converted_one_at_a_time(tmp_path: Path, bpe: Path) -> None:
    """At most a float32 copy of the largest matrix exists beside the converted weights."""
    run = make_run(tmp_path / "run", bpe, d_model=256, n_layers=4)
    export(run, "mlx", tmp_path / "half", "bfloat16")
    source = load_hf_folder(tmp_path / "half")
    largest = max(array.nbytes for array in source.weights.values())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    params = inference_weights(source.weights, source.model, mx.bfloat16)
    _, numpy_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(p.nbytes for p in params.values())
    assert {p.dtype for p in params.values()} == {mx.bfloat16} and size > 5 * largest
    assert mx.get_peak_memory() - before < size + 1.5 * largest
    assert numpy_peak < 4 * largest  # the file's values and their conversion; the model has 10 times as many


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights quantized by gptq are not supported"),
        ({"quantization_config": {"bits": 4}}, "weights quantized by unknown are not supported"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mode 'mxfp4' is not supported"),
        (
            {"quantization": {"bits": 4, "group_size": 64, "lm_head": {"mode": "mxfp8"}}},
            "mode 'mxfp8' is not supported",
        ),
        ({"quantization": 4}, "quantization: expected a JSON object"),
    ],
)
def test_other_formats_are_rejected_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_format(values, "config.json")


@pytest.mark.parametrize("damage", ["no biases", "no scales", "wrong scales", "float integers"])
def test_parts_that_do_not_fit_are_rejected_by_name(floats: Path, tmp_path: Path, damage: str) -> None:
    folder = quantize_folder(floats, tmp_path / "packed", bits=4, group_size=32)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.layers.0.mlp.up_proj"
    if damage == "no biases":
        del tensors[f"{name}.biases"]
    elif damage == "no scales":
        del tensors[f"{name}.scales"], tensors[f"{name}.biases"]
    elif damage == "wrong scales":
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:, :1]
    else:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].astype(mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(UserError, match=rf"{name}.weight: (expected the weight, scales and biases|quantized, but)"):
        _load_own(folder)


def test_damaged_scales_are_rejected_without_a_warning(floats: Path, tmp_path: Path) -> None:
    folder = quantize_folder(floats, tmp_path / "packed", bits=4, group_size=32)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.scales"] = mx.full(tensors[f"{name}.scales"].shape, 3e38)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(UserError, match=rf"imported: not written: {name}.weight is not finite: "):
        import_model(folder, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_scales_that_do_not_fit_are_rejected_before_mlx_lm_reads_them(floats: Path, tmp_path: Path) -> None:
    """With a group size of zero, MLX ends the process."""
    folder = quantize_folder(floats, tmp_path / "packed", bits=4, group_size=32)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    name = "model.layers.0.mlp.up_proj.scales"
    tensors[name] = mx.zeros(tensors[name].shape[:1])
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(UserError, match=rf"{name} \[.*\] does not fit its matrix"):
        load_pretrained(str(folder))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"bits": 4}', '{"bits": 7, "group_size": 64}', '{"bits": 4, "group_size": 1}']
)
def test_an_invalid_model_quantization_is_a_one_line_error(text: str) -> None:
    with pytest.raises(UserError, match=r"model\.quantization: expected JSON with bits and group_size"):
        packings(ModelConfig(quantization=text))
