"""Generation: the distribution that is drawn from, the cache, the ends, and the text that streams out."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.data.tokenizer import load_tokenizer
from anarchobot.inference.generation import Model, StreamDecoder, generate, generate_ids, load_model, sampler
from anarchobot.model.shapes import init_parameters
from anarchobot.model.transformer import hidden_states, logits
from tests.tiny import VOCAB

SHAPE = ModelConfig(vocab_size=VOCAB, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=48)
LOGITS = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -4.0])


@pytest.fixture(scope="module")
def model(tiny_shards: Path) -> Model:
    rng = np.random.default_rng(0)  # far from even, so that greedy choices are clear
    params = {
        n: mx.array(p + rng.standard_normal(p.shape) * 0.3, mx.float32) for n, p in init_parameters(SHAPE, 0).items()
    }
    return Model(params, SHAPE, load_tokenizer(tiny_shards))


def probabilities(settings: GenerationConfig) -> np.ndarray:
    """Of the six tokens, by the methods' definitions, in float64."""
    z = LOGITS / settings.temperature
    p = np.exp(z) / np.exp(z).sum()
    if settings.method == "greedy":
        keep = p == p.max()
    elif settings.method == "top_k":
        keep = np.arange(6) < settings.top_k
    elif settings.method == "nucleus":  # the fewest likeliest that hold top_p
        keep = np.arange(6) < np.searchsorted(np.cumsum(p), settings.top_p) + 1
    else:
        keep = np.ones(6, bool)
    return np.where(keep, p, 0) / p[keep].sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "greedy"},
        {"method": "random", "temperature": 1.0},
        {"method": "random", "temperature": 0.5},
        {"method": "top_k", "top_k": 2, "temperature": 1.0},
        {"method": "top_k", "top_k": 50, "temperature": 2.0},  # more than there are: all
        {"method": "nucleus", "top_p": 0.8, "temperature": 1.0},
        {"method": "nucleus", "top_p": 0.8, "temperature": 2.0},  # the temperature comes first: more tokens pass
        {"method": "nucleus", "top_p": 1.0, "temperature": 1.0},
    ],
    ids=str,
)
def test_draws_follow_the_exact_probabilities(settings: dict[str, Any]) -> None:
    chosen = GenerationConfig(**settings)
    p, n = probabilities(chosen), 20000
    mx.random.seed(0)
    draws = np.array(sampler(chosen, 6)(mx.array(np.tile(LOGITS, (n, 1)), mx.float32)))
    counts = np.bincount(draws, minlength=6)
    assert counts[p == 0].sum() == 0
    expected = n * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 25  # five degrees of freedom: chance of more is 1 in 7,000


def test_greedy_equals_recomputing_everything_for_each_token(model: Model) -> None:
    """The cache and the single-token steps against the whole sequence forward."""
    got = list(generate_ids(model, GenerationConfig(prompt="The value", method="greedy", max_new_tokens=20)))
    ids = [model.tokenizer.eod_id, *model.tokenizer.encode_batch(["The value"])[0].tolist()]
    for token in got:
        hidden = hidden_states(model.params, mx.array([ids]), SHAPE)
        z = logits(hidden[:, -1], model.params, SHAPE)
        assert int(mx.argmax(z).item()) == token
        ids.append(token)
    assert len(got) == 20


def test_it_ends_at_the_limit_at_max_seq_len_and_at_end_of_document(model: Model) -> None:
    count = len(list(generate_ids(model, GenerationConfig(prompt="", method="greedy", max_new_tokens=7))))
    assert count == 7
    count = len(list(generate_ids(model, GenerationConfig(prompt="", method="greedy", max_new_tokens=500))))
    assert count == SHAPE.max_seq_len - 1
    ending = dict(model.params)
    bias = np.zeros((VOCAB, 32), np.float32)
    bias[model.tokenizer.eod_id] = 100 * np.sign(np.array(ending["model.norm.weight"]))
    ending["model.embed_tokens.weight"] = mx.array(bias) + 0.001
    ending["model.norm.weight"] = mx.ones(32)
    ended = Model(ending, SHAPE, model.tokenizer)
    assert list(generate_ids(ended, GenerationConfig(prompt="", method="greedy"))) == []
    with pytest.raises(UserError, match=r"the prompt is \d+ tokens long and the model's max_seq_len is 48"):
        list(generate_ids(model, GenerationConfig(prompt="word " * 60)))


def test_the_seed_decides(model: Model) -> None:
    def text(seed: int) -> str:
        return generate(model, GenerationConfig(prompt="The", method="random", seed=seed, max_new_tokens=20))

    assert text(1) == text(1) != text(2)


def test_repetition_penalty_lowers_what_was_said(model: Model) -> None:
    """So strong a penalty makes greedy decoding say nothing twice within its window."""
    plain = list(generate_ids(model, GenerationConfig(method="greedy", max_new_tokens=20)))
    penalised = list(generate_ids(model, GenerationConfig(method="greedy", max_new_tokens=20, repetition_penalty=1e6)))
    assert len(set(penalised)) == len(penalised) > len(set(plain))


def test_what_streams_is_what_is_returned(model: Model) -> None:
    pieces: list[str] = []
    text = generate(model, GenerationConfig(prompt="é", method="random", temperature=5.0), on_text=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 5


@pytest.mark.parametrize(
    "text", ["plain words here", "naïve café — “quoted”", "日本語と🙂 emoji 👩‍👩‍👧", "a\n\n  b\t▁c"]
)
def test_characters_of_several_tokens_come_out_whole(tiny_shards: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_shards)
    decoder = StreamDecoder(tokenizer, [])
    pieces = [decoder.add(int(i)) for i in tokenizer.encode_batch([text])[0]]
    assert "".join(pieces) + decoder.rest() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_first_space_is_kept_by_tokenizers_that_put_one_before_any_text(shared_data: Path) -> None:
    """Mistral's decodes "▁world" alone as "world": what stands before must be decoded with it."""
    tokenizer = load_tokenizer(shared_data / "artifacts" / "mistral_v1_tokenizer.model")
    prompt, whole = (tokenizer.encode_batch([text])[0].tolist() for text in ("hello", "hello world again"))
    decoder = StreamDecoder(tokenizer, prompt)
    pieces = [decoder.add(i) for i in whole[len(prompt) :]]
    assert whole[: len(prompt)] == prompt
    assert "".join(pieces) + decoder.rest() == " world again"


def test_broken_bytes_do_not_hold_the_rest_back(tiny_shards: Path) -> None:
    """A lone continuation byte never becomes a character: it is shown as U+FFFD and the text goes on."""
    tokenizer = load_tokenizer(tiny_shards)
    broken = tokenizer.encode_batch(["é"])[0].tolist()[:1]
    decoder = StreamDecoder(tokenizer, [])
    text = "".join(decoder.add(i) for i in [*broken, *tokenizer.encode_batch([" and more text"])[0].tolist()])
    assert text.endswith("and more text")


def test_load_model_takes_run_and_step_folders(tmp_path: Path, tiny_shards: Path) -> None:
    from anarchobot.tasks.pretrain import pretrain
    from tests.tiny import loaded

    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run"), quiet=True)
    newest, config = load_model(tmp_path / "run")
    older, _ = load_model(tmp_path / "run" / "step_00000003")
    name = "model.norm.weight"
    assert config.model == newest.shape
    assert not mx.array_equal(newest.params[name], older.params[name])
    (tmp_path / "run" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_model(tmp_path / "run")
