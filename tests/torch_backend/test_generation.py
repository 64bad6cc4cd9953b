"""Generation: the sampled distribution, stopping, and equality with the MLX backend."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.inference import generation as mlx_generation
from anarchobot.inference.model import Model
from anarchobot.model.parameters import init_parameters
from anarchobot.tokenizers.tokenizer import ChatTokenizer, load_tokenizer
from tests.inference.conftest import SHAPE
from tests.inference.test_sampling import LOGITS, PENALTIES, SETTINGS, penalized_by_mlx_lm, probabilities

torch = pytest.importorskip("torch")

from anarchobot.torch_backend.generation import apply_penalties, generate, sample, stream_token_ids  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tiny_shards: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_shards)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)  # far from uniform, so that greedy choices are unambiguous
    return {
        n: (p + rng.standard_normal(p.shape) * 0.3).astype(np.float32) for n, p in init_parameters(SHAPE, 0).items()
    }


@pytest.fixture(scope="module")
def weights(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {n: torch.tensor(a).requires_grad_() for n, a in arrays.items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_exact_probabilities(settings: dict[str, Any]) -> None:
    chosen = GenerationConfig(**settings)
    p, n, rng = probabilities(chosen), 5000, np.random.default_rng(0)
    counts = np.bincount([sample(LOGITS, chosen, rng) for _ in range(n)], minlength=6)
    assert counts[p == 0].sum() == 0
    expected = n * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 25  # five degrees of freedom: exceeded with probability 1 in 7,000


@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.3}, {"frequency_penalty": 1.0}], ids=str)
def test_greedy_text_equals_the_mlx_backend(
    penalties: dict[str, float], arrays: dict[str, np.ndarray], weights: dict[str, Any], tokenizer: ChatTokenizer
) -> None:
    settings = GenerationConfig(prompt="The value", method="greedy", max_new_tokens=30, **penalties)
    model = Model({n: mx.array(a) for n, a in arrays.items()}, SHAPE, tokenizer)
    text = generate(weights, SHAPE, tokenizer, settings)
    assert text == mlx_generation.generate(model, settings) and len(text) > 20
    stopping = settings.model_copy(update={"stop": ["\x00", text[9:12]]})
    cut = generate(weights, SHAPE, tokenizer, stopping)
    assert cut == mlx_generation.generate(model, stopping) == text[: text.index(text[9:12])]


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_penalties_equal_mlx_lms(penalties: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    z, prompt, answer = rng.standard_normal(40), rng.integers(0, 40, 10).tolist(), rng.integers(0, 40, 25).tolist()
    for n in (0, 5, 25):
        got = apply_penalties(z, prompt + answer[:n], len(prompt), GenerationConfig(**penalties))
        np.testing.assert_allclose(got, penalized_by_mlx_lm(z, prompt, answer[:n], **penalties), rtol=1e-5, atol=1e-6)


def test_generation_ends_at_max_new_tokens_max_seq_len_or_end_of_document(weights: dict[str, Any]) -> None:
    def ids(context: list[int], max_new_tokens: int = 500, params: dict[str, Any] = weights) -> list[int]:
        settings = GenerationConfig(method="greedy", max_new_tokens=max_new_tokens)
        return list(stream_token_ids(params, SHAPE, context, settings, {0}))

    assert len(ids([0, 5, 6], 7)) == 7
    full = ids([0, 5, 6])
    assert len(full) == SHAPE.max_seq_len - 3 and full[:7] == ids([0, 5, 6], 7) != ids([7, 5, 6], 7)
    ends_at_once = {n: p.detach().clone() for n, p in weights.items()}
    ends_at_once["model.embed_tokens.weight"].zero_()
    ends_at_once["model.embed_tokens.weight"][:] = 0.001
    ends_at_once["model.norm.weight"].fill_(1.0)
    ends_at_once["model.embed_tokens.weight"][0] = 100.0 * torch.sign(_hidden_after_end_of_document(ends_at_once))
    assert ids([0], params=ends_at_once) == []
    with pytest.raises(UserError, match=r"the prompt has 61 tokens, but the model's max_seq_len is 48"):
        ids([0] + [1] * 60)


def _hidden_after_end_of_document(params: dict[str, Any]) -> Any:
    """The hidden state after an end-of-document token, whose embedding RMSNorm rescales."""
    from anarchobot.torch_backend.model import hidden_states

    for _ in range(5):
        z = hidden_states(params, torch.zeros(1, 1, dtype=torch.int64), SHAPE)[0, 0]
        params["model.embed_tokens.weight"][0] = 100.0 * torch.sign(z)
    return z


def test_seed_determines_the_text_and_training_randomness_is_unaffected(
    weights: dict[str, Any], tokenizer: ChatTokenizer
) -> None:
    def text(seed: int) -> str:
        settings = GenerationConfig(prompt="The", method="random", seed=seed, max_new_tokens=20)
        return generate(weights, SHAPE, tokenizer, settings)

    before = torch.get_rng_state()
    assert text(1) == text(1) != text(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in weights.values())


def test_the_context_starts_with_bos_or_an_end_of_document(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[list[int]] = []

    def record(weights: object, model: object, context: list[int], *args: object) -> list[int]:
        contexts.append(context)
        return []

    monkeypatch.setattr("anarchobot.torch_backend.generation.stream_token_ids", record)
    for bos_id in (7, None):
        generate({}, SHAPE.model_copy(update={"bos_id": bos_id}), tokenizer, GenerationConfig(prompt="The value"))
    prompt = tokenizer.encode_batch(["The value"])[0].tolist()
    assert contexts == [[7, *prompt], [tokenizer.eod_id, *prompt]]


def test_leading_space_is_kept_by_tokenizers_that_prepend_one(shared_data: Path) -> None:
    """Mistral's tokenizer decodes a single "▁world" as "world"."""

    class PrefixTokenizer:
        eod_id, stop_ids = 2, frozenset([2])

        def __init__(self, tokenizer: ChatTokenizer) -> None:
            self.encode_batch, self.decode = tokenizer.encode_batch, tokenizer.decode

    tokenizer = load_tokenizer(shared_data / "artifacts" / "mistral_v1_tokenizer.model")
    prompt, whole = (tokenizer.encode_batch([text])[0].tolist() for text in ("hello", "hello world again"))
    import anarchobot.torch_backend.generation as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "stream_token_ids", lambda *args: whole[len(prompt) :])
        settings = GenerationConfig(prompt="hello")
        assert generate({}, SHAPE, PrefixTokenizer(tokenizer), settings) == " world again"  # type: ignore[arg-type]
