"""Speculative decoding: texts are those without a draft model, however often its tokens are wrong."""

import io
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference import speculative
from anarchobot.inference.batching import Batch, StepOutput
from anarchobot.inference.chat import ChatSession
from anarchobot.inference.generation import generate, generate_batch
from anarchobot.inference.model import Model
from anarchobot.inference.prefixes import KeptPrefixes
from anarchobot.inference.speculative import Draft, SpeculativeBatch, load_draft
from anarchobot.model.mlx_lm import architecture
from anarchobot.model.mlx_lm.folder import FolderWeights
from anarchobot.model.mlx_lm.frozen import frozen_weights
from tests.exchange.random_run import make_run
from tests.inference.conftest import SHAPE, strong_parameters
from tests.inference.test_batching import METHODS, OTHER, PHI, contexts, tokens_of
from tests.model.mlx_lm.families import CONFIGS, write_model
from tests.tiny import VOCAB

SMALL = ModelConfig(vocab_size=VOCAB, n_layers=1, d_model=16, n_heads=2, max_seq_len=30, sliding_window=5)
NONE: Any = None  # the tokenizer of a model that is not given text


def similar(model: Model, noise: float = 0.015) -> Model:
    """A draft model that is sometimes right."""
    rng = np.random.default_rng(1)
    params = {n: p + mx.array(rng.standard_normal(p.shape) * noise, mx.float32) for n, p in model.params.items()}
    return Model(params, model.config, model.tokenizer)


def outputs_of(batch: Batch) -> list[StepOutput]:
    outputs = []
    while batch:
        outputs += batch.step()
    return outputs


@pytest.mark.parametrize("shape", [SHAPE, OTHER, PHI], ids=["grouped", "qk_norm", "windows, longrope"])
@pytest.mark.parametrize("kind", ["itself", "similar", "another"])
def test_tokens_and_scores_are_those_without_a_draft(shape: ModelConfig, kind: str) -> None:
    """All methods and penalties, prompts of 1 to 20 tokens, stop tokens, and texts up to the context window of 48,
    which is longer than that of the other model."""
    model = Model(strong_parameters(shape), shape, NONE)
    other = {"itself": model, "similar": similar(model), "another": Model(strong_parameters(SMALL), SMALL, NONE)}[kind]
    draft, rng = Draft(other), random.Random(0)
    plain, batch = Batch(model.params, shape), SpeculativeBatch(model.params, shape, draft=draft)
    for i, context in enumerate(contexts(12)):
        settings = GenerationConfig(
            method=METHODS[i % 6], seed=i, max_new_tokens=rng.choice([1, 2, 7, 500]), temperature=1.5,
            repetition_penalty=rng.choice([1.0, 1.5]), frequency_penalty=rng.choice([0.0, 1.0]),
        )  # fmt: skip
        stop = set(rng.choices(range(VOCAB), k=rng.choice([0, 20])))
        found = []
        for one in (plain, batch):
            one.insert(context, settings, stop, top_logprobs=2)
            found.append(outputs_of(one))
        assert [o[1:3] for o in found[0]] == [o[1:3] for o in found[1]]
        for a, b in zip(*found, strict=True):
            assert a.scores is not None and b.scores is not None
            assert a.scores.logprob.item() == pytest.approx(b.scores.logprob.item(), abs=1e-3)
            assert a.scores.top_ids.tolist() == b.scores.top_ids.tolist()
    rate = draft.accepted / draft.proposed
    assert {"itself": rate == 1, "similar": 0.25 < rate < 0.9, "another": rate < 0.1}[kind], rate
    assert draft.proposed > 50 and all(cache.offset <= other.config.max_seq_len for cache in draft._caches)


def test_one_pass_computes_all_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 tokens with the model as its own draft: the prompt, then passes of four tokens or what is left."""
    computed: list[int] = []
    last_logits = Batch._last_logits

    def counted(self: Batch, tokens: mx.array, *rest: Any) -> mx.array:
        computed.append(tokens.size)
        return last_logits(self, tokens, *rest)

    monkeypatch.setattr(Batch, "_last_logits", counted)
    model = Model(strong_parameters(SHAPE), SHAPE, NONE)
    batch = SpeculativeBatch(model.params, SHAPE, draft=Draft(model))
    batch.insert([1, 2, 3, 4, 5], GenerationConfig(method="random", max_new_tokens=20), ())
    assert len(outputs_of(batch)) == 20 and computed == [5, 4, 4, 4, 4, 3]


class EvenTokens:
    error = ""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.arange(VOCAB) % 2 == 0

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_constraints_are_followed(model: Model) -> None:
    draft, texts = Draft(similar(model)), []
    for batch in (Batch(model.params, SHAPE), SpeculativeBatch(model.params, SHAPE, draft=draft)):
        constraint = EvenTokens()
        batch.insert([1, 2, 3], GenerationConfig(method="random", max_new_tokens=12), (), constraint=constraint)
        texts.append([o.token for o in outputs_of(batch)])
        assert texts[-1][:-1] == constraint.accepted
    assert texts[0] == texts[1] and not any(token % 2 for token in texts[0] if token)


@pytest.mark.parametrize("shape", [SHAPE, PHI], ids=["grouped", "windows, longrope"])
@pytest.mark.parametrize("seed", range(3))
def test_requests_join_and_leave(shape: ModelConfig, seed: int) -> None:
    """The draft model is used whenever one request is alone."""
    model, rng = Model(strong_parameters(shape), shape, NONE), random.Random(seed)
    draft = Draft(similar(model), num_tokens=4)
    batch = SpeculativeBatch(model.params, shape, 3, draft=draft, prefixes=KeptPrefixes(2**20))
    requests: dict[int, tuple[list[int], GenerationConfig]] = {}
    removed, outputs, waiting, steps = set(), list[StepOutput](), contexts(12), 0
    while waiting or batch:
        if waiting and rng.random() < 0.1:
            settings = GenerationConfig(method=rng.choice(METHODS), seed=seed, max_new_tokens=rng.randrange(1, 20))
            context = waiting.pop()
            requests[batch.insert(context, settings, ())] = context, settings
        if requests and rng.random() < 0.02:
            removed.add(request := rng.choice(list(requests)))
            batch.remove(request)
        outputs += batch.step()
        steps += 1
        assert steps < 2000, "a request never ends"
    for request, (context, settings) in requests.items():
        plain = Batch(model.params, shape)
        plain.insert(context, settings, ())
        alone, found = [o.token for o in outputs_of(plain)], tokens_of(outputs, request)
        assert found == alone[: len(found)] and (len(found) == len(alone) or request in removed)
    assert 20 < draft.proposed < 4 * len(outputs) and draft.accepted


def test_an_interrupted_draft_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of its passes in turn, on a text that starts like the one before. Otherwise its keys would be those of
    other positions or texts from then on."""
    model, settings = Model(strong_parameters(SHAPE), SHAPE, NONE), GenerationConfig(method="greedy", max_new_tokens=12)
    draft, last_logits, left = Draft(model), Draft._last_logits, [-1]

    def generate_after(*prompt: int) -> None:
        batch = SpeculativeBatch(model.params, SHAPE, draft=draft)
        batch.insert([9, 8, *prompt], settings, ())
        outputs_of(batch)

    def interrupted(self: Draft, tokens: mx.array) -> mx.array:
        z = last_logits(self, tokens)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return z

    monkeypatch.setattr(Draft, "_last_logits", interrupted)
    for passes in range(1, 7):
        generate_after(1, 2, 3, 4)
        left[0] = passes
        with pytest.raises(KeyboardInterrupt):
            generate_after(7)
        generate_after(1, 2, 3, 4)
    assert draft.accepted == draft.proposed > 100


def test_models_that_mlx_lm_computes(tmp_path: Path) -> None:
    for name in ("experts", "state space", "hybrid"):
        folder = write_model(tmp_path / name, CONFIGS[name])
        config = ModelConfig(architecture="mlx_lm", **architecture.from_hf(CONFIGS[name], "config.json"))
        weights = FolderWeights(folder)
        config = weights.note(config)
        model = Model(frozen_weights(weights, config, mx.float32), config, NONE)
        if name != "experts":
            with pytest.raises(UserError, match=r"of type \w+ can't be used with a draft model.* mlx-lm's ArraysCache"):
                Draft(model)
            continue
        settings, draft = GenerationConfig(method="greedy", max_new_tokens=20), Draft(model)
        plain, batch = Batch(model.params, config), SpeculativeBatch(model.params, config, draft=draft)
        for one in (plain, batch):
            one.insert([5, 6, 7], settings, ())
        assert [o.token for o in outputs_of(plain)] == [o.token for o in outputs_of(batch)]
        assert draft.accepted == draft.proposed == 14


def test_chats_are_those_without_a_draft(model: Model) -> None:
    """Its keys and values of the conversation are reused too."""
    long = model.config.model_copy(update={"max_seq_len": 256})
    model = Model(model.params, long, model.tokenizer)
    settings, draft, computed = GenerationConfig(max_new_tokens=12), Draft(similar(model)), []
    last_logits = draft._last_logits
    draft._last_logits = lambda tokens: computed.append(tokens.size) or last_logits(tokens)  # type: ignore
    plain, session = ChatSession(model, settings), ChatSession(model, settings, None, draft)
    for turn in range(4):
        computed.clear()
        assert session.answer(f"Question {turn}?") == plain.answer(f"Question {turn}?") != ""
    assert max(computed) < 60 and draft.accepted


def test_several_prompts(model: Model) -> None:
    settings = GenerationConfig(method="random", max_new_tokens=12)
    draft, prompts = Draft(similar(model)), ["The value", "if x"]
    for some in (prompts, prompts[:1]):
        assert list(generate_batch(model, some, settings, draft=draft)) == list(generate_batch(model, some, settings))
        assert bool(draft.proposed) == (len(some) == 1)


def test_the_commands(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` prints the same with itself as its draft, and how many tokens were accepted, as `chat` does."""
    run = str(make_run(tmp_path / "run", next(tiny_shards.glob("*.model"))))
    words = ["generate", "--checkpoint", run, "--prompt", "The value", "--max-new-tokens", "13", "--method", "random"]
    assert main(words) == 0
    plain = capsys.readouterr()
    assert main([*words, "--draft-model", run, "--num-draft-tokens", "5"]) == 0
    found = capsys.readouterr()
    assert found.out == plain.out and "(draft model: 10 of 10 tokens accepted)" in found.err
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nWhy?\n"))
    words = ["chat", "--checkpoint", run, "--max-new-tokens", "13", "--draft-model", run, "--num-draft-tokens", "5"]
    assert main(words) == 0
    assert capsys.readouterr().err.count("(draft model: 10 of 10 tokens accepted)") == 2


def test_another_vocabulary_is_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny import make_shards

    shards = make_shards(tmp_path / "shards", 0.03)  # the same size, other tokens
    run = make_run(tmp_path / "run", next(shards.glob("*.model")))
    with pytest.raises(UserError, match=r"--draft-model .*run: its vocabulary is not that of the model"):
        load_draft(str(run), model, 3)
    wider = Model(model.params, model.config.model_copy(update={"vocab_size": VOCAB + 1}), model.tokenizer)
    monkeypatch.setattr(speculative, "load_model", lambda path: (wider, None))
    with pytest.raises(UserError, match="vocabulary"):
        load_draft("wider", model, 3)


def test_a_text_is_streamed(model: Model) -> None:
    """Token by token, and it ends before a stop string in the middle of accepted tokens."""
    settings, pieces = GenerationConfig(prompt="The", method="greedy", max_new_tokens=20), list[str]()
    whole = generate(model, settings)
    assert generate(model, settings, pieces.append, draft=Draft(model)) == whole == "".join(pieces)
    for start in range(0, len(whole) - 2, 4):
        stop = settings.model_copy(update={"stop": [whole[start : start + 3]]})
        assert generate(model, stop, draft=Draft(model)) == generate(model, stop)
