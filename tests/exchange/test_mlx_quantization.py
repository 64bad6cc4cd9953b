"""Quantized exports for mlx-lm, compared with mlx_lm.convert and mx.quantize."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import convert
from mlx_lm import load as mlx_load
from mlx_lm.utils import compute_bits_per_weight

from anarchobot.config.errors import UserError
from anarchobot.evaluation.evaluate import EvalRequest, evaluate
from anarchobot.evaluation.held_out import held_out_shards, held_out_texts
from anarchobot.exchange.exporting import export
from anarchobot.exchange.mlx_quantization import MlxQuantization
from anarchobot.inference.model import load_model
from anarchobot.model.quantization import BITS, GROUP_SIZES, Packing, quantize
from anarchobot.tasks.pretrain import pretrain
from tests.exchange.random_run import make_run, real_ids
from tests.exchange.test_quantized import compute_logits
from tests.tiny import loaded

QUIET: dict[str, Any] = {"log": lambda text: None}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_quantized_without_mlx_as_by_mlx(bits: int, group_size: int) -> None:
    normal = np.random.default_rng(bits).standard_normal((5, 256)).astype(np.float32)
    for array in (normal, np.abs(normal) + 1, -np.abs(normal), np.zeros_like(normal), np.full_like(normal, -0.3)):
        ours = quantize(array, Packing(bits, group_size))
        theirs = mx.quantize(mx.array(array), group_size=group_size, bits=bits, stream=mx.cpu)
        for our_part, their_part in zip((ours[0].reshape(5, -1), *ours[1:]), theirs, strict=True):
            np.testing.assert_array_equal(our_part, np.array(their_part))


CASES: dict[str, tuple[dict[str, Any], MlxQuantization, Any, str | None]] = {
    "4 bits, tied": ({}, MlxQuantization(4), "bfloat16", None),
    "8 bits, float16, biases": ({"attention_bias": True}, MlxQuantization(8), "float16", None),
    "mixed_2_6": ({"tie_embeddings": False}, MlxQuantization(2, 32, 6), "bfloat16", "mixed_2_6"),
    "mixed_4_6, one matrix for q, k, v": ({"rotary_fraction": 0.5}, MlxQuantization(4, 32, 6), "float32", "mixed_4_6"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_folder_is_that_of_mlx_lms_convert(tmp_path: Path, bpe: Path, case: str) -> None:
    """With 9 layers, of which the recipes give more bits to the first, the last two and some between."""
    shape, how, dtype, recipe = CASES[case]
    run = make_run(tmp_path / "run", bpe, d_model=64, n_layers=9 if recipe else 2, **shape)
    export(run, "hf", tmp_path / "hf")
    convert(
        str(tmp_path / "hf"), str(tmp_path / "theirs"), quantize=True, q_group_size=how.group_size, q_bits=how.bits,
        dtype=dtype, quant_predicate=recipe,
    )  # fmt: skip
    done = export(run, "mlx", tmp_path / "ours", dtype, quantization=how)
    ours, theirs = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)  # type: ignore[arg-type]
    for name, array in theirs.items():  # type: ignore[union-attr]
        assert mx.array_equal(ours[name], array) and ours[name].dtype == array.dtype, name  # type: ignore[call-overload,index]
    model, tokenizer = mlx_load(str(tmp_path / "ours"))[:2]
    assert done["bits_per_weight"] == pytest.approx(compute_bits_per_weight(model))
    ids = mx.array([tokenizer.encode("The text of a")])
    assert mx.array_equal(model(ids), mlx_load(str(tmp_path / "theirs"))[0](ids))
    settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    for key in ("quantization", "quantization_config"):
        own, others = ({k: v for k, v in setting[key].items() if v != {**default_of(setting), "mode": "affine"}}
                       for setting in settings)  # fmt: skip
        assert own == others  # theirs also lists matrices with the default


def default_of(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config["quantization"][key] for key in ("bits", "group_size")}


def test_matrices_that_stay_are_counted_and_named_and_we_compute_mlx_lms_logits(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "run", bpe, d_model=64)  # 160 columns of down_proj are no multiple of 64
    done = export(run, "mlx", tmp_path / "mlx", "float32", quantization=MlxQuantization(4))
    assert done["dtype"] == "4 bits in groups of 64"
    assert done["warnings"] == [
        "2 matrices are float32: their rows can't be divided into groups of 64: model.layers.*.mlp.down_proj.weight"
    ]
    card = (tmp_path / "mlx" / "README.md").read_text()
    assert f"> {done['warnings'][0]}" in card and "parameters in 4 bits in groups of 64" in card
    assert f"| bits per weight | {done['bits_per_weight']:.2f} |" in card and "transformers" not in card
    model, _ = load_model(tmp_path / "mlx")
    ids = real_ids(run, 100)
    expected = np.array(mlx_load(str(tmp_path / "mlx"))[0](mx.array([ids])))[0]
    np.testing.assert_allclose(compute_logits(model.params, model.config, ids), expected, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    pretrain(loaded(folder / "config.yaml", tiny_shards, folder / "run", train__total_steps=30), show="nothing")
    return folder / "run"


@pytest.mark.parametrize("target", ["mlx", "gguf"])
def test_bits_per_byte_before_and_after(tmp_path: Path, trained: Path, tiny_shards: Path, target: Any) -> None:
    """On the run's own validation shards, and on a text. Those after are the loss of the exported folder."""
    how: dict[str, Any] = {"quantization": MlxQuantization(2, 32)} if target == "mlx" else {"gguf_type": "q4_0"}
    (tmp_path / "text.txt").write_text("Some words to score, which are not in the corpus.\n" * 20)
    requests = {
        "shards": EvalRequest(shards=str(tiny_shards)), "text.txt": EvalRequest(texts=[str(tmp_path / "text.txt")])
    }  # fmt: skip
    held_out = {
        "shards": held_out_shards(trained, **QUIET),
        "text.txt": held_out_texts([str(tmp_path / "text.txt")], **QUIET),
    }
    for name, request in requests.items():
        done = export(trained, target, tmp_path / f"of {name}", held_out=held_out[name], **how)
        (before,) = (result.metrics["bits_per_byte"] for result in evaluate(str(trained), request).values())
        losses = done["bits_per_byte"]
        assert losses["before"] == pytest.approx(before, abs=1e-6)
        assert abs(losses["after"] - losses["before"]) > 1e-4
        if target == "mlx" and name == "text.txt":  # the shards are of another tokenizer file
            (after,) = (r.metrics["bits_per_byte"] for r in evaluate(str(tmp_path / f"of {name}"), request).values())
            assert losses["after"] == pytest.approx(after, abs=1e-6)
        card = (tmp_path / f"of {name}" / "README.md").read_text()
        assert f"| bits per byte of these files, on {losses['text']} | {losses['after']:.4f} |" in card
    assert losses["text"] == "text.txt"


def test_runs_without_validation_shards_have_none(tmp_path: Path, bpe: Path) -> None:
    assert held_out_shards(make_run(tmp_path / "run", bpe, n_layers=1), **QUIET) is None
    with pytest.raises(UserError, match=r"nothere\.txt"):
        held_out_texts([str(tmp_path / "nothere.txt")], **QUIET)
