"""LoRA and DoRA against the float64 reference with merged weights and against PEFT; frozen weights cost no work."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from anarchobot.config.schema import LoraConfig, ModelConfig
from anarchobot.model import linear as linear_file
from anarchobot.model.frozen import adapter_constants, frozen_weights, init_adapters
from anarchobot.model.gradient_accumulator import GradientAccumulator, Params
from anarchobot.model.linear import InputDropout, linear, linear_backward, linear_gradients
from anarchobot.model.llama.forward import hidden_states
from anarchobot.model.llama.gradients import loss_and_gradients
from anarchobot.model.lora import adapted_matrices, adapter_scale, adapter_shapes, init_factors, trained_count
from anarchobot.model.loss import logits
from anarchobot.model.step_options import MicroBatch, StepOptions
from anarchobot.numerics import eval_order
from tests.model.llama import reference
from tests.model.llama.test_forward import as_mlx, parameters, random_tokens, tiny

Array = npt.NDArray[np.float32]

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all matrices": ({}, {}),
    "queries and values, grouped heads, untied": (
        {"n_kv_heads": 2, "tie_embeddings": False}, {"target_modules": ["q_proj", "v_proj"]},
    ),
    "rsLoRA, down alone, qk_norm, softcap": (
        {"qk_norm": True, "logit_softcap": 5.0}, {"target_modules": ["down_proj"], "rslora": True},
    ),
    "biases": ({"attention_bias": True}, {}),
    "DoRA, biases": ({"attention_bias": True}, {"dora": True, "target_modules": ["q_proj", "v_proj", "o_proj"]}),
    "DoRA, gelu, norms of outputs": ({"ffn_activation": "gelu", "post_norms": True}, {"dora": True}),
    "the last block": ({"embedding_scale": 3.0, "n_layers": 3}, {"num_layers": 1}),
    "DoRA of two blocks": ({"n_layers": 3}, {"num_layers": 2, "dora": True, "target_modules": ["v_proj", "up_proj"]}),
}  # fmt: skip


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "alpha": 6.0, **more})


def adapters_of(model: ModelConfig, settings: LoraConfig, seed: int = 3) -> dict[str, Array]:
    """Far from the initial values, so that every term contributes; m is near the row norms, which are about 1."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.3 * rng.standard_normal(s) + (1.2 if len(s) == 1 else 0)).astype(np.float32)
        for name, s in adapter_shapes(model, settings).items()
    }


def adapted(
    params: dict[str, Array], adapters: dict[str, Array], model: ModelConfig, settings: LoraConfig
) -> tuple[Params, Params]:
    """Returns the trained parameters and the frozen ones."""
    frozen = frozen_weights(params, model, mx.float32, settings.quantize)
    scales = dict.fromkeys(adapted_matrices(model, settings), adapter_scale(settings))
    return as_mlx(adapters), frozen | adapter_constants(frozen, model, scales, settings.dora)


def row_norms(params: dict[str, Any], adapters: dict[str, Any], settings: LoraConfig) -> dict[str, Any]:
    """The row norms of W + s (A B)^T of each matrix, in float64."""
    return {
        n: np.linalg.norm(_merged_matrix(params, adapters, n, settings), axis=1)
        for n in (name.removesuffix(".lora_a") for name in adapters if name.endswith("a"))
    }


def _merged_matrix(params: dict[str, Any], adapters: dict[str, Any], name: str, settings: LoraConfig) -> Any:
    s = settings.alpha / (math.sqrt(settings.r or 0) if settings.rslora else settings.r or 0)
    return params[f"{name}.weight"] + s * (adapters[f"{name}.lora_a"] @ adapters[f"{name}.lora_b"]).T


def merged(params: dict[str, Any], adapters: dict[str, Any], settings: LoraConfig, c: dict[str, Any]) -> dict[str, Any]:
    """Merges the adapters into the weights; DoRA divides by the row norms `c`."""
    new = dict(params)
    for n in c:
        weight = _merged_matrix(params, adapters, n, settings)
        new[f"{n}.weight"] = weight * (adapters[f"{n}.m"] / c[n])[:, None] if settings.dora else weight
    return new


def float64(arrays: dict[str, Array]) -> dict[str, npt.NDArray[np.float64]]:
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def gradients_of(
    trained: Params, frozen: Params, tokens: npt.NDArray[np.int32], model: ModelConfig, **how: Any
) -> tuple[float, Params]:
    inputs, targets = mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])
    extra = {key: how.pop(key) for key in MicroBatch._fields if key in how}
    batch = MicroBatch(inputs, targets, mx.array(1 / targets.size), **extra)
    loss, grads = loss_and_gradients(trained, batch, model, frozen=frozen, **how)
    return float(loss), grads


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_match_the_merged_reference(case: str) -> None:
    """Moves each adapter in a random direction; DoRA's row norms are held constant, as in its paper."""
    shape, settings = tiny(**CASES[case][0]), lora(**CASES[case][1])
    params, adapters, tokens = parameters(shape), adapters_of(shape, settings), random_tokens(shape)
    loss, gradients = gradients_of(*adapted(params, adapters, shape, settings), tokens, shape)
    base, exact = float64(params), float64(adapters)
    c = row_norms(base, exact, settings)

    def reference_loss(perturbed: dict[str, Any]) -> float:
        return reference.mean_loss(merged(base, perturbed, settings, c), tokens, shape)

    assert loss == pytest.approx(reference_loss(exact), rel=1e-5)
    assert set(gradients) == set(exact)
    rng, h = np.random.default_rng(2), 1e-6
    for key, value in exact.items():
        direction = rng.standard_normal(value.shape)
        slope = (
            reference_loss({**exact, key: value + h * direction})
            - reference_loss({**exact, key: value - h * direction})
        ) / (2 * h)
        gradient = np.array(gradients[key], np.float64)
        assert abs(slope - np.vdot(gradient, direction)) < 1e-4 * np.linalg.norm(gradient), key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options",
    [
        StepOptions(attention_block=5, loss_chunk=7, mlp_rows=9, wait=eval_order.eval_now),
        StepOptions(recompute=True, wait=eval_order.eval_now, mlp_rows=28),
        StepOptions(attention_block=4, wait=eval_order.unordered, recompute=True),
    ],
    ids=["chunks", "recomputed", "recomputed in free order"],
)
def test_options_do_not_change_the_gradients(options: StepOptions, case: str) -> None:
    shape, settings = tiny(**CASES[case][0]), lora(**CASES[case][1])
    adapters, tokens = adapters_of(shape, settings), random_tokens(shape, 2, 14)
    trained, frozen = adapted(parameters(shape), adapters, shape, settings)
    loss, plain = gradients_of(trained, frozen, tokens, shape)
    before = {n: mx.full(p.shape, 0.25) for n, p in trained.items()}
    other, added = gradients_of(trained, frozen, tokens, shape, options=options, sums=before)
    assert other == pytest.approx(loss, rel=1e-6)
    for n, g in plain.items():
        assert float(mx.linalg.norm(added[n] - 0.25 - g)) < 1e-5 * float(mx.linalg.norm(g)) + 1e-5, n


@pytest.mark.filterwarnings("ignore::FutureWarning")  # raised inside PEFT
@pytest.mark.parametrize("more", [{}, {"rslora": True, "r": 8}, {"dora": True}], ids=str)
def test_forward_and_gradients_match_peft(more: dict[str, Any], tmp_path: Any) -> None:
    """PEFT's adapters on transformers' Llama with the same weights, differentiated by PyTorch."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape, settings = tiny(n_kv_heads=2, d_model=32, vocab_size=64), lora(**more)
    params, adapters, tokens = parameters(shape), adapters_of(shape, settings), random_tokens(shape, 2, 13)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=shape.mlp_size, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        )
    )  # fmt: skip
    llama.load_state_dict({n: torch.tensor(p) for n, p in params.items()}, strict=False)
    named = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = peft.get_peft_model(
        llama,
        peft.LoraConfig(
            r=settings.r, lora_alpha=settings.alpha, use_rslora=settings.rslora, use_dora=settings.dora,
            target_modules=named,
        ),
    )  # fmt: skip
    parts = {"lora_A.default.weight": "lora_a", "lora_B.default.weight": "lora_b"}
    parts["lora_magnitude_vector.default.weight"] = "m"
    found = {}
    for name, p in wrapped.named_parameters():
        for end, part in parts.items():
            if name.endswith(end):
                ours = f"{name.removeprefix('base_model.model.').removesuffix(f'.{end}')}.{part}"
                p.data = torch.tensor(np.ascontiguousarray(adapters[ours].T))
                found[ours] = p
    assert set(found) == set(adapters)
    ids = torch.tensor(tokens.astype(np.int64))
    z = wrapped(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(z.reshape(-1, 64), ids[:, 1:].reshape(-1))
    loss.backward()

    trained, frozen = adapted(params, adapters, shape, settings)
    ours_loss, gradients = gradients_of(trained, frozen, tokens, shape)
    everything = {**frozen, **trained}
    ours_z = np.array(logits(hidden_states(everything, mx.array(tokens[:, :-1]), shape), everything, shape))
    np.testing.assert_allclose(ours_z, z.detach().numpy(), atol=1e-4)
    assert ours_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, p in found.items():
        expected = p.grad.numpy().T
        assert np.linalg.norm(np.array(gradients[name]) - expected) < 1e-4 * np.linalg.norm(expected), name


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradients_of_one_matrix_match_mlx_autodiff(dora: bool, rate: float) -> None:
    """DoRA's row norms, c, are constants there."""
    rng = np.random.default_rng(0)
    name = "mlp.up_proj"
    sizes = {"weight": (24, 16), "lora_a": (16, 4), "lora_b": (4, 24), **({"m": (24,)} if dora else {})}
    p = {f"{name}.{part}": mx.array(rng.standard_normal(s).astype(np.float32)) for part, s in sizes.items()}
    p |= {f"{name}.lora_scale": mx.array(0.7), f"{name}.row_norms": mx.linalg.norm(p[f"{name}.weight"], axis=1)}
    x, dy = (mx.array(rng.standard_normal(s).astype(np.float32)) for s in ((30, 16), (30, 24)))
    drop = InputDropout(rate, mx.random.key(5)) if rate else None
    sums: Params = {}
    done, dz = linear_gradients(p, name, dy, x, GradientAccumulator(sums), drop)
    dx = linear_backward(p, name, dy, dz, drop)
    assert len(done) == len(sizes)

    c = mx.linalg.norm(p[f"{name}.weight"] + 0.7 * (p[f"{name}.lora_a"] @ p[f"{name}.lora_b"]).T, axis=1)

    def forward(x: mx.array, *values: mx.array) -> mx.array:
        q = dict(zip(sizes, values, strict=True))
        inner = x if drop is None else drop(name, x)
        u = x @ q["weight"].T + 0.7 * (inner @ q["lora_a"]) @ q["lora_b"]
        return u * (q["m"] / c) if dora else u

    inputs = [x, *(p[f"{name}.{part}"] for part in sizes)]
    (y,), gradients = mx.vjp(forward, inputs, [dy])
    np.testing.assert_allclose(linear(p, name, x, drop), y, atol=2e-5)
    for got, wanted in zip([dx, *(sums[f"{name}.{part}"] for part in sizes)], gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)


def test_dropout_applies_only_to_adapter_inputs_and_depends_on_the_key() -> None:
    """With B = 0 it has no effect; otherwise equal keys give equal losses, and the kept fraction is 1 - dropout."""
    shape, settings = tiny(), lora(dropout=0.3)
    params, tokens = parameters(shape), random_tokens(shape)
    new = {name: np.array(p) for name, p in init_adapters(params, shape, settings, 0, mx.float32)[0].items()}
    drawn = adapters_of(shape, settings)

    def loss(adapters: dict[str, Array], key: int | None, recompute: bool = False) -> tuple[float, Params]:
        return gradients_of(
            *adapted(params, adapters, shape, settings), tokens, shape, adapter_dropout=0.3,
            dropout_key=None if key is None else mx.random.key(key), options=StepOptions(recompute=recompute),
        )  # fmt: skip

    assert loss(new, 1)[0] == loss(new, None)[0]
    assert len({loss(drawn, key)[0] for key in (1, 2, None)}) == 3
    (a, kept), (b, again) = loss(drawn, 1), loss(drawn, 1, recompute=True)
    assert a == b and all(mx.array_equal(kept[n], again[n]) for n in kept)
    x = mx.ones((400, 100))
    drop = InputDropout(0.3, mx.random.key(0))
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        assert float(mx.mean((drop(name, x) > 0).astype(mx.float32))) == pytest.approx(0.7, abs=0.01)
        assert float(mx.max(drop(name, x))) == pytest.approx(1 / 0.7)
    assert not mx.array_equal(drop("self_attn.q_proj", x), drop("self_attn.k_proj", x))


@pytest.mark.parametrize("unpacks", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_quantized_base_trains_like_its_dequantized_weights(
    bits: int, dora: bool, unpacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dequantizing first, as on a CPU, and with MLX's quantized matmul, as on a GPU."""
    monkeypatch.setattr(linear_file, "_should_dequantize", lambda x: unpacks)
    shape, settings = (
        tiny(d_model=64, n_heads=2, tie_embeddings=False, mlp_multiple=2.5),
        lora(dora=dora, quantize=bits),
    )
    params, adapters, tokens = parameters(shape), adapters_of(shape, settings), random_tokens(shape)
    trained, packed = adapted(params, adapters, shape, settings)
    assert packed["lm_head.weight"].dtype == packed["model.embed_tokens.weight"].dtype == mx.uint32
    assert packed["model.layers.0.mlp.down_proj.weight"].dtype == mx.float32  # 160 columns are not a multiple of 64
    unpacked = {}
    for name, p in params.items():
        unpacked[name] = p
        if packed[name].dtype == mx.uint32:
            q = [packed[f"{name.removesuffix('.weight')}.{part}"] for part in ("weight", "scales", "biases")]
            unpacked[name] = np.array(mx.dequantize(q[0].flatten(1), *q[1:], group_size=64, bits=bits))
            assert 0 < np.abs(unpacked[name] - p).max() < (0.2 if bits == 4 else 0.02)
    other, plain = adapted(unpacked, adapters, shape, lora(dora=dora))
    (a, ours), (b, expected) = (gradients_of(t, f, tokens, shape) for t, f in ((trained, packed), (other, plain)))
    assert a == pytest.approx(b, rel=1e-5)
    for n in ours:
        assert float(mx.linalg.norm(ours[n] - expected[n])) < 1e-4 * float(mx.linalg.norm(expected[n])), n
    ids = mx.array(tokens)
    z, wanted = (logits(hidden_states(p, ids, shape), p, shape) for p in ({**packed, **trained}, {**plain, **other}))
    np.testing.assert_allclose(z, wanted, atol=1e-4)


def test_new_adapters_are_a_no_op_with_bounded_independent_values() -> None:
    shape, settings = tiny(), lora(dora=True)
    params = parameters(shape)
    trained, frozen = init_adapters(params, shape, settings, 7, mx.float32)
    tokens = random_tokens(shape)
    base = reference.mean_loss(float64(params), tokens, shape)
    assert gradients_of(trained, frozen, tokens, shape)[0] == pytest.approx(base, rel=1e-5)
    for name, p in trained.items():
        if name.endswith("lora_a"):
            bound = 1 / math.sqrt(p.shape[0])
            assert float(mx.max(mx.abs(p))) <= bound and float(mx.std(p)) == pytest.approx(
                bound / math.sqrt(3), rel=0.2
            )
        if name.endswith(".m"):
            np.testing.assert_allclose(
                p, np.linalg.norm(params[f"{name.removesuffix('.m')}.weight"], axis=1), rtol=1e-6
            )
    fewer = init_factors(shape, lora(target_modules=["v_proj"], num_layers=1), 7)
    assert all(np.array_equal(value, trained[name]) for name, value in fewer.items()) and len(fewer) == 2


def test_adapted_matrices_and_parameter_count() -> None:
    shape = ModelConfig(vocab_size=100, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, mlp_multiple=2)
    assert adapted_matrices(shape, lora(target_modules=["down_proj", "q_proj"], num_layers=2)) == [
        f"model.layers.{i}.{name}" for i in (1, 2) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    # r 4: q and o 32 + 32, k and v 32 + 16, gate, up and down 32 + 64, three blocks.
    assert trained_count(shape, lora()) == 3 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert trained_count(shape, lora(dora=True)) == trained_count(shape, lora()) + 3 * (2 * 32 + 2 * 16 + 2 * 64 + 32)


def test_frozen_weights_cost_no_backward_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the backward passes: none for frozen weights, none below the lowest adapter."""
    from anarchobot.model.llama import block

    shape, tokens = tiny(n_layers=4), random_tokens(tiny())
    passed: list[str] = []
    for half in ("attention_backward", "mlp_backward"):
        whole = getattr(block, half)
        monkeypatch.setattr(block, half, lambda *a, half=half, whole=whole: passed.append(half) or whole(*a))
    settings = lora(num_layers=1, target_modules=["v_proj"])
    trained, frozen = adapted(parameters(shape), adapters_of(shape, settings), shape, settings)
    _, gradients = gradients_of(trained, frozen, tokens, shape)
    assert passed == ["mlp_backward", "attention_backward"]
    assert set(gradients) == {f"model.layers.3.self_attn.v_proj.lora_{part}" for part in "ab"}
    sums: Params = {}
    everything = {**frozen, **trained}
    inside = {n.removeprefix("model.layers.3."): p for n, p in everything.items() if ".3." in n}
    dy, x = mx.ones((4, 16)), mx.ones((4, 16))
    done, dz = linear_gradients(
        inside, "self_attn.q_proj", dy, x, GradientAccumulator(sums, "model.layers.3.", trained)
    )
    assert done == [] and dz is None and sums == {}
