"""Models of other families: where a text starts and ends, from the Hugging Face folder, its import and its export."""

import json
from pathlib import Path

import pytest
import transformers

from anarchobot.config.schema import GenerationConfig
from anarchobot.exchange.exporting import export
from anarchobot.exchange.importing import import_model
from anarchobot.inference.chat import ChatSession
from anarchobot.inference.generation import TextBatch, TextChunk, generate, generate_batch, prompt_ids
from anarchobot.inference.model import Model, load_model
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.tokenizer import digest, load_tokenizer
from tests.inference.conftest import family_model
from tests.tokenizers.families import FAMILIES
from tests.tokenizers.templates import dialogue, to_dicts

GREEDY = GenerationConfig(prompt="Hi there", method="greedy", max_new_tokens=5)
TALK = dialogue("  How are\n you?", "Fine, thanks. ", "And   now?\n")


def chunks(model: Model, **settings: object) -> list[TextChunk]:
    batch, found = TextBatch(model), []
    batch.insert(prompt_ids(model, "Hi"), GREEDY.model_copy(update=settings), model.tokenizer.stop_ids)
    while batch:
        found += batch.step()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_folder_import_and_export_agree(tmp_path: Path, name: str) -> None:
    """With each other, and with transformers on the folder and on the export."""
    last = FAMILIES[name].ends[-1]
    source = family_model(name, tmp_path / "source", last)
    assert import_model(source, tmp_path / "run")["warnings"] == []
    export(tmp_path / "run", "hf", tmp_path / "hf")
    texts = ["Hi there", "  x = 'y'\n\n", "吾輩は▁🙂"]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(source)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = theirs.apply_chat_template(to_dicts(TALK), add_generation_prompt=True)["input_ids"]
    assert exported.apply_chat_template(to_dicts(TALK), add_generation_prompt=True)["input_ids"] == prompt
    for text in texts:
        assert exported(text)["input_ids"] == theirs(text)["input_ids"]
    ends = theirs.convert_tokens_to_ids(list(FAMILIES[name].ends))
    stop = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    encoder_ends = ChatEncoder(tokenizer := load_tokenizer(source), load_template(tokenizer)).stop_ids()
    assert {*(stop if isinstance(stop, list) else [stop])} == encoder_ends >= set(ends)
    for folder in (source, tmp_path / "run", tmp_path / "hf"):
        model, _ = load_model(folder)
        assert model.tokenizer.eod_id == ends[0] and model.tokenizer.stop_ids >= set(ends), folder
        assert ChatEncoder(model.tokenizer, load_template(model.tokenizer)).encode_prompt(TALK).tolist() == prompt
        for text in texts:
            assert prompt_ids(model, text) == theirs(text)["input_ids"], folder
        assert chunks(model) == [TextChunk(1, "", 0, "stop")], folder
        assert generate(model, GREEDY) == ChatSession(model, GREEDY).answer("Hi") == ""
    assert digest(load_tokenizer(tmp_path / "run")) == digest(tokenizer)


def test_generation_ends_at_each_end_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: a control token is no text, so that the text alone does not show it."""
    model, _ = load_model(family_model("llama3", tmp_path / "hf", FAMILIES["llama3"].ends[-1]))
    steps: list[list[TextChunk]] = []
    real = TextBatch.step

    def step(batch: TextBatch) -> list[TextChunk]:
        steps.append(real(batch))
        return steps[-1]

    monkeypatch.setattr(TextBatch, "step", step)
    end = TextChunk(1, "", 0, "stop")
    generate(model, GREEDY)
    ChatSession(model, GREEDY).answer("Hi")
    assert list(generate_batch(model, ["Hi", "there"], GREEDY)) == ["", ""]
    assert steps == [[end], [end], [end, end._replace(request=2)]]


def test_stop_text_that_names_a_control_token(tmp_path: Path) -> None:
    """Such a token is no text, so a search in the text would not find it. It is no end by itself."""
    model, _ = load_model(family_model("llama3", tmp_path / "hf", "<|start_header_id|>"))
    assert chunks(model)[-1] == TextChunk(1, "", 5, "length")
    assert chunks(model, stop=["x", "<|start_header_id|>"]) == [TextChunk(1, "", 0, "stop")]


def test_tokens_without_a_row_are_not_used(tmp_path: Path) -> None:
    """As in Gemma 3 for text, whose tokenizer ends with a token for images: the model has no row for it."""
    source = family_model("gemma", tmp_path / "source", "<eos>")
    tokens = json.loads((source / "tokenizer.json").read_text())
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    tokens["added_tokens"].append({**tokens["added_tokens"][-1], "id": rows, "content": "<image>", "special": False})
    (source / "tokenizer.json").write_text(json.dumps(tokens))
    text = ["a<image>b"]
    assert transformers.PreTrainedTokenizerFast.from_pretrained(source).convert_tokens_to_ids("<image>") == rows
    assert import_model(source, tmp_path / "run")["vocab_size"] == rows
    for folder in (source, tmp_path / "run"):
        tokenizer = load_model(folder)[0].tokenizer
        (ids,) = tokenizer.encode_batch(text)
        assert tokenizer.vocab_size == rows > ids.max() and tokenizer.decode(ids.tolist()) == text[0]


def test_several_tokens_before_a_text(tmp_path: Path) -> None:
    """As in GLM: model.bos_id is a single token."""
    source = family_model("mistral", tmp_path / "source", "</s>")
    tokens = json.loads((source / "tokenizer.json").read_text())
    first, *others = tokens["post_processor"]["single"]
    tokens["post_processor"]["single"] = [first, first, *others]
    (source / "tokenizer.json").write_text(json.dumps(tokens))
    (warning,) = import_model(source, tmp_path / "run")["warnings"]
    assert warning == "a text starts with 2 tokens in transformers: here only with the last"
