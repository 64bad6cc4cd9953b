"""Generation: the cache, the ends, several prompts, and the text that streams out."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.inference import batching
from anarchobot.inference.generation import TextBatch, generate, generate_each, generate_ids
from anarchobot.inference.model import Model, load_model
from anarchobot.model.llama.forward import hidden_states, logits
from tests.inference.conftest import SHAPE
from tests.tiny import VOCAB

PROMPTS = ["The value", "", "if x is not", "é", "The", "a list of all the words that are in it"]


@pytest.mark.parametrize("chunk", [512, 3, 1])
def test_greedy_equals_recomputing_everything_for_each_token(
    model: Model, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache, the prompt in chunks and the single-token steps against the whole sequence forward."""
    monkeypatch.setattr(batching, "PROMPT_TOKENS", chunk)
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


def test_the_seed_decides_and_nothing_else_is_disturbed(model: Model) -> None:
    def text(seed: int) -> str:
        return generate(model, GenerationConfig(prompt="The", method="random", seed=seed, max_new_tokens=20))

    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    assert text(1) == text(1) != text(2)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_repetition_penalty_lowers_what_was_said(model: Model) -> None:
    """So strong a penalty makes greedy decoding say nothing twice within its window."""
    plain = list(generate_ids(model, GenerationConfig(method="greedy", max_new_tokens=20)))
    penalised = list(generate_ids(model, GenerationConfig(method="greedy", max_new_tokens=20, repetition_penalty=1e6)))
    assert len(set(penalised)) == len(penalised) > len(set(plain))


def test_what_streams_is_what_is_returned(model: Model) -> None:
    pieces: list[str] = []
    text = generate(model, GenerationConfig(prompt="é", method="random", temperature=5.0), on_text=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 5


def test_a_text_ends_before_the_first_stop_string(model: Model) -> None:
    """Every stretch of three characters of a text as its stop string, in turn."""
    settings = GenerationConfig(prompt="The", method="greedy", max_new_tokens=20)
    whole = generate(model, settings)
    for start in range(0, len(whole) - 2, 3):
        stop = whole[start : start + 3]
        pieces: list[str] = []
        text = generate(model, settings.model_copy(update={"stop": ["\x00", stop]}), on_text=pieces.append)
        assert text == "".join(pieces) == whole[: whole.index(stop)]


def test_a_stop_string_ends_the_request_and_its_tokens_are_counted(model: Model) -> None:
    settings = GenerationConfig(prompt="The", method="greedy", max_new_tokens=20)
    ids = list(generate_ids(model, settings))
    fifth = model.tokenizer.decode(ids[:5])
    batch = TextBatch(model)
    context = [model.begin, *model.tokenizer.encode_batch(["The"])[0].tolist()]
    batch.insert(context, settings.model_copy(update={"stop": [fifth[-2:]]}), ())
    pieces = []
    while batch:
        pieces += batch.step()
    assert pieces[-1].end == "stop" and pieces[-1].tokens <= 5
    batch.insert(context, settings, ())
    while batch:
        pieces += batch.step()
    assert (pieces[-1].end, pieces[-1].tokens) == ("length", 20)


@pytest.mark.parametrize("settings", [{"method": "greedy"}, {"method": "random"}, {"method": "min_p"}], ids=str)
@pytest.mark.parametrize("rows", [2, 16])
def test_each_prompt_of_many_has_the_text_that_it_has_alone(
    model: Model, settings: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "ROWS", rows)
    chosen = GenerationConfig(**settings, max_new_tokens=20, repetition_penalty=1.2, seed=2**32 - 3)
    texts = list(generate_each(model, PROMPTS, chosen))
    for number, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        seed = (chosen.seed + number) % 2**32
        assert text == generate(model, chosen.model_copy(update={"prompt": prompt, "seed": seed}))
    assert len(set(texts)) == len(texts)
    with pytest.raises(UserError, match=r"prompt 2: the prompt is \d+ tokens long"):
        list(generate_each(model, ["The", "word " * 60], chosen))


def test_load_model_takes_run_and_step_folders(tmp_path: Path, tiny_shards: Path) -> None:
    from anarchobot.tasks.pretrain import pretrain
    from tests.tiny import loaded

    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run"), show="nothing")
    newest, config = load_model(tmp_path / "run")
    older, _ = load_model(tmp_path / "run" / "step_00000003")
    name = "model.norm.weight"
    assert config.model == newest.shape
    assert not mx.array_equal(newest.params[name], older.params[name])
    (tmp_path / "run" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize("target", ["hf", "mlx"])
def test_load_model_takes_what_export_writes(tmp_path: Path, tiny_shards: Path, target: Any) -> None:
    from anarchobot.exchange.exporting import export
    from tests.exchange.random_run import make_run

    run = make_run(tmp_path / "run", next(tiny_shards.glob("*.model")))
    export(run, target, tmp_path / "out")
    settings = GenerationConfig(prompt="The value", method="greedy", max_new_tokens=20)
    (ours, _), (exported, config) = load_model(run), load_model(tmp_path / "out")
    assert generate(ours, settings) == generate(exported, settings) != ""
    assert config.generation == GenerationConfig()


def test_adapters_alone_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a whole model: fuse them with their model first \(anarchobot fuse\)"):
        load_model(tmp_path)


def test_prompts_from_a_file(tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command: lines and JSONL, each row as `generate` writes it alone; a row that is none is named."""
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
