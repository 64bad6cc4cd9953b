"""Generation: the KV cache, where it ends, several prompts, and streaming."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.inference import batching
from anarchobot.inference.generation import TextBatch, generate, generate_batch, prompt_ids, stream_token_ids
from anarchobot.inference.model import Model, load_model
from anarchobot.model.llama.forward import hidden_states
from anarchobot.model.loss import logits
from tests.inference.conftest import SHAPE, generate_ids
from tests.inference.test_sampling import penalized_by_mlx_lm
from tests.tiny import VOCAB

PROMPTS = ["The value", "", "if x is not", "é", "The", "a list of all the words that are in it"]


@pytest.mark.parametrize("chunk", [512, 3, 1])
def test_greedy_equals_recomputing_the_whole_sequence(
    model: Model, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked prefill and single-token steps with a cache against a forward pass over the whole sequence."""
    monkeypatch.setattr(batching, "PREFILL_TOKENS", chunk)
    got = generate_ids(model, GenerationConfig(prompt="The value", method="greedy", max_new_tokens=20))
    ids = [model.tokenizer.eod_id, *model.tokenizer.encode_batch(["The value"])[0].tolist()]
    for token in got:
        hidden = hidden_states(model.params, mx.array([ids]), SHAPE)
        z = logits(hidden[:, -1], model.params, SHAPE)
        assert int(mx.argmax(z).item()) == token
        ids.append(token)
    assert len(got) == 20


def test_ends_at_max_new_tokens_max_seq_len_and_end_of_document(model: Model) -> None:
    count = len(generate_ids(model, GenerationConfig(prompt="", method="greedy", max_new_tokens=7)))
    assert count == 7
    count = len(generate_ids(model, GenerationConfig(prompt="", method="greedy", max_new_tokens=500)))
    assert count == SHAPE.max_seq_len - 1
    ending = dict(model.params)
    bias = np.zeros((VOCAB, 32), np.float32)
    bias[model.tokenizer.eod_id] = 100 * np.sign(np.array(ending["model.norm.weight"]))
    ending["model.embed_tokens.weight"] = mx.array(bias) + 0.001
    ending["model.norm.weight"] = mx.ones(32)
    ended = Model(ending, SHAPE, model.tokenizer)
    assert generate_ids(ended, GenerationConfig(prompt="", method="greedy")) == []
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, but the model's max_seq_len is 48"):
        generate_ids(model, GenerationConfig(prompt="word " * 60))


def test_the_seed_decides_and_mlx_random_state_is_untouched(model: Model) -> None:
    def text(seed: int) -> str:
        return generate(model, GenerationConfig(prompt="The", method="random", seed=seed, max_new_tokens=20))

    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    assert text(1) == text(1) != text(2)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_repetition_penalty(model: Model) -> None:
    """With a huge penalty, greedy decoding repeats no token within the window."""
    plain = generate_ids(model, GenerationConfig(method="greedy", max_new_tokens=20))
    penalized = generate_ids(model, GenerationConfig(method="greedy", max_new_tokens=20, repetition_penalty=1e6))
    assert len(set(penalized)) == len(penalized) > len(set(plain))


def test_presence_and_frequency_penalties(model: Model) -> None:
    """Greedy decoding picks the likeliest token by the penalized logits of the whole sequence."""
    prompt, texts = [1, 2, 3], set()
    choices: list[dict[str, float]] = [{}, {"presence_penalty": 2.0}, {"frequency_penalty": 1.0}]
    for values in choices:
        settings = GenerationConfig(method="greedy", max_new_tokens=30, **values)
        got = list(stream_token_ids(model.params, SHAPE, prompt, settings, ()))
        for n, token in enumerate(got):
            hidden = hidden_states(model.params, mx.array([[*prompt, *got[:n]]]), SHAPE)
            z = np.array(logits(hidden[:, -1], model.params, SHAPE))[0]
            assert penalized_by_mlx_lm(z, prompt, got[:n], **values).argmax() == token
        texts.add(tuple(got))
    assert len(texts) == 3


def test_streamed_text_equals_the_returned_text(model: Model) -> None:
    pieces: list[str] = []
    text = generate(model, GenerationConfig(prompt="é", method="random", temperature=5.0), on_text=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 5


def test_ends_before_the_first_stop_string(model: Model) -> None:
    """Tries every third substring of three characters of a text as its stop string."""
    settings = GenerationConfig(prompt="The", method="greedy", max_new_tokens=20)
    whole = generate(model, settings)
    for start in range(0, len(whole) - 2, 3):
        stop = whole[start : start + 3]
        pieces: list[str] = []
        text = generate(model, settings.model_copy(update={"stop": ["\x00", stop]}), on_text=pieces.append)
        assert text == "".join(pieces) == whole[: whole.index(stop)]


def test_a_stop_string_finishes_the_request_and_tokens_are_counted(model: Model) -> None:
    settings = GenerationConfig(prompt="The", method="greedy", max_new_tokens=20)
    ids = generate_ids(model, settings)
    fifth = model.tokenizer.decode(ids[:5])
    batch = TextBatch(model)
    context = [model.bos_id, *model.tokenizer.encode_batch(["The"])[0].tolist()]
    batch.insert(context, settings.model_copy(update={"stop": [fifth[-2:]]}), ())
    pieces = []
    while batch:
        pieces += batch.step()
    assert pieces[-1].finish_reason == "stop" and pieces[-1].tokens <= 5
    batch.insert(context, settings, ())
    while batch:
        pieces += batch.step()
    assert (pieces[-1].finish_reason, pieces[-1].tokens) == ("length", 20)


@pytest.mark.parametrize("settings", [{"method": "greedy"}, {"method": "random"}, {"method": "min_p"}], ids=str)
@pytest.mark.parametrize("max_rows", [2, 16])
def test_batched_prompts_get_the_same_text_as_alone(
    model: Model, settings: dict[str, Any], max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MAX_ROWS", max_rows)
    chosen = GenerationConfig(**settings, max_new_tokens=20, repetition_penalty=1.2, seed=2**32 - 3)
    texts = list(generate_batch(model, PROMPTS, chosen))
    for number, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        seed = (chosen.seed + number) % 2**32
        assert text == generate(model, chosen.model_copy(update={"prompt": prompt, "seed": seed}))
    assert len(set(texts)) == len(texts)
    with pytest.raises(UserError, match=r"prompt 2: the prompt has \d+ tokens"):
        list(generate_batch(model, ["The", "word " * 60], chosen))


def test_load_model_accepts_run_and_step_folders(tmp_path: Path, tiny_shards: Path) -> None:
    from anarchobot.tasks.pretrain import pretrain
    from tests.tiny import loaded

    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run"), show="nothing")
    newest, config = load_model(tmp_path / "run")
    older, _ = load_model(tmp_path / "run" / "step_00000003")
    name = "model.norm.weight"
    assert config.model == newest.config
    assert not mx.array_equal(newest.params[name], older.params[name])
    (tmp_path / "run" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize("target", ["hf", "mlx"])
def test_load_model_accepts_exported_folders(tmp_path: Path, tiny_shards: Path, target: Any) -> None:
    from anarchobot.exchange.exporting import export
    from tests.exchange.random_run import make_run

    run = make_run(tmp_path / "run", next(tiny_shards.glob("*.model")))
    export(run, target, tmp_path / "out")
    settings = GenerationConfig(prompt="The value", method="greedy", max_new_tokens=20)
    (ours, _), (exported, config) = load_model(run), load_model(tmp_path / "out")
    assert generate(ours, settings) == generate(exported, settings) != ""
    assert config.generation == GenerationConfig()


def test_adapters_without_a_base_model_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config.json: names no base model: pass the one .* \(--model\)"):
        load_model(tmp_path)


def test_prompts_from_a_file(tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines and JSONL give the same text as single prompts; an invalid row is reported by its line number."""
    import json

    from anarchobot.cli.main import main
    from tests.exchange.random_run import make_run

    run = make_run(tmp_path / "run", next(tiny_shards.glob("*.model")))
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("The value\n\nif x\r\n")
    rows.write_text("\n".join(json.dumps({"prompt": p}) for p in ("The value", "two\nlines")))
    words = ["generate", "--checkpoint", str(run), "--max-new-tokens", "8", "--method", "greedy", "--json"]

    def written(*more: str) -> list[dict[str, str]]:
        assert main([*words, *more]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    first, second = written("--prompts", str(lines))
    assert first == written("--prompt", "The value")[0] == written("--prompts", str(rows))[0]
    assert second["prompt"] == "if x" and written("--prompts", str(rows))[1]["prompt"] == "two\nlines"
    stop = first["text"][2:5]
    (cut,) = written("--prompt", "The value", "--stop", "never there", "--stop", stop)
    assert cut["text"] == first["text"][: first["text"].index(stop)]
    rows.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    assert main([*words, "--prompts", str(rows)]) == 2
    assert capsys.readouterr().err == f'anarchobot: {rows}:2: expected {{"prompt": "..."}}\n'


@pytest.mark.parametrize("settings", [{"method": "greedy"}, {"method": "random", "temperature": 3.0}], ids=str)
def test_a_prompt_may_end_in_a_space(model: Model, settings: dict[str, Any]) -> None:
    """The tokens are those after the prompt without it, of which the first is limited to tokens that start with a
    space; the text does not repeat the space."""
    values = GenerationConfig(prompt="The ", max_new_tokens=8, **settings)
    batch, ids = batching.Batch(model.params, model.config), []
    allowed = mx.array([model.tokenizer.decode([40, i])[1:].startswith(" ") for i in range(VOCAB)])
    batch.insert(prompt_ids(model, "The"), values, model.tokenizer.stop_ids, allowed)
    while batch:
        ids += [output.token for output in batch.step() if output.token is not None]
    context = model.tokenizer.encode_batch(["The"])[0].tolist()
    whole = model.tokenizer.decode([*context, *ids])
    assert whole.startswith("The ")
    assert generate(model, values) == whole.removeprefix("The ")
    assert list(generate_batch(model, ["The "], values)) == [whole.removeprefix("The ")]
