"""Answers of random models follow their schema, whatever the tokenizer; other rows of the batch are not affected."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import pytest

from anarchobot.config.schema import GenerationConfig, ModelConfig
from anarchobot.inference.batching import Batch
from anarchobot.inference.generation import TextBatch, stream_token_ids
from anarchobot.inference.model import Model
from anarchobot.model.parameters import init_parameters
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.inference.test_tool_calls import CODER, HERMES, LLAMA, MISTRAL, MISTRAL_IDS
from tests.tokenizers.families import make_family

pytest.importorskip("llguidance")

from anarchobot.inference.call_syntax import CallSyntax
from anarchobot.inference.grammar import Grammar, calls_grammar, schema_grammar
from anarchobot.inference.tool_calls import CallParser, ToolCall

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["ä", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"],
                        "additionalProperties": False}},
}  # fmt: skip
RANDOM = GenerationConfig(method="random", temperature=1.0, max_new_tokens=150)


def random_model(tokenizer: Any) -> Model:
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size, n_layers=1, d_model=16, n_heads=2, max_seq_len=512, tie_embeddings=False
    )
    return Model({n: mx.array(p) for n, p in init_parameters(shape, 0).items()}, shape, tokenizer)


@pytest.fixture(scope="module", params=["sentencepiece", "qwen", "llama2", "mistral", "phi3"])
def model(request: pytest.FixtureRequest, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    if request.param == "sentencepiece":
        return random_model(load_tokenizer(tiny_shards))
    folder = tmp_path_factory.mktemp("family") / request.param
    make_family(request.param, folder)
    return random_model(load_tokenizer(folder))


def answers(model: Model, grammar: Grammar, count: int, tokens: int = 150) -> list[tuple[str, str | None]]:
    """Texts and finish reasons of as many seeds, in one batch."""
    batch = TextBatch(model)
    stop = model.tokenizer.stop_ids
    texts: dict[int, list[str]] = {}
    reasons: dict[int, str | None] = {}
    for seed in range(count):
        settings = RANDOM.model_copy(update={"seed": seed, "max_new_tokens": tokens})
        constraint = grammar.start(stop, model.config.vocab_size)
        texts[batch.insert([model.bos_id], settings, stop, constraint=constraint)] = []
    while batch:
        for chunk in batch.step():
            texts[chunk.request].append(chunk.text)
            reasons[chunk.request] = chunk.finish_reason
    return [("".join(text), reasons[request]) for request, text in texts.items()]


def test_answers_follow_the_schema(model: Model) -> None:
    found = answers(model, Grammar(schema_grammar(PERSON), model.tokenizer), 8)
    complete = [json.loads(text) for text, reason in found if reason == "stop"]
    assert len(complete) >= 4, found
    for value in complete:
        jsonschema.validate(value, PERSON)
    assert len({json.dumps(value) for value in complete}) > 1
    assert all(reason in ("stop", "length") for _, reason in found)


@pytest.mark.parametrize(
    ("syntax", "parallel"),
    [*((syntax, parallel) for syntax in (HERMES, LLAMA, MISTRAL, MISTRAL_IDS) for parallel in (False, True)),
     (CODER, False)],
)  # fmt: skip
def test_calls_follow_their_parameters(tiny_shards: Path, syntax: CallSyntax, parallel: bool) -> None:
    model = random_model(load_tokenizer(tiny_shards))
    controls = model.tokenizer.control_tokens | {"<|system|>": model.tokenizer.control_tokens["<|im_start|>"]}
    functions = [{"name": "register", "parameters": PERSON}, {"name": "stop", "parameters": {"properties": {}}}]
    source = calls_grammar(syntax, functions, parallel, controls)
    found = answers(model, Grammar(source, model.tokenizer), 12, 400 if parallel else 150)
    counts, names = set(), set()
    for text, reason in found:
        if reason != "stop":
            continue
        parser = CallParser(syntax, {function["name"]: function["parameters"] for function in functions})
        text = text if "<|system|>" not in syntax.prefix else syntax.prefix[:-1] + text  # not shown here
        parts = [*parser.add(text), *parser.finish()]
        assert parts and all(isinstance(part, ToolCall) for part in parts), text
        calls = [part for part in parts if isinstance(part, ToolCall)]
        counts.add(len(calls))
        names |= {call.name for call in calls}
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), PERSON if call.name == "register" else {"type": "object"})
    assert names and (counts == {1} if not parallel or syntax is LLAMA else max(counts) > 1), counts


def test_rows_without_a_grammar_are_as_alone(model: Model) -> None:
    """And a row with one is, too."""
    batch = Batch(model.params, model.config)
    grammar, stop = Grammar(schema_grammar(PERSON), model.tokenizer), model.tokenizer.stop_ids
    plain = [RANDOM.model_copy(update={"seed": i, "max_new_tokens": 20}) for i in range(3)]
    requests = [batch.insert([5 + i], chosen, stop) for i, chosen in enumerate(plain)]
    size = model.config.vocab_size
    kept = batch.insert([5], plain[0], stop, constraint=grammar.start(stop, size))
    outputs = []
    while batch:
        outputs += batch.step()
    for i, request in enumerate(requests):
        alone = list(stream_token_ids(model.params, model.config, [5 + i], plain[i], stop))
        assert [o.token for o in outputs if o.request == request and o.token is not None] == alone
    single = Batch(model.params, model.config)
    single.insert([5], plain[0], stop, constraint=grammar.start(stop, size))
    alone = [o.token for _ in range(30) for o in single.step() if o.token is not None]
    assert [o.token for o in outputs if o.request == kept and o.token is not None] == alone


@pytest.mark.parametrize(
    "source",
    [
        schema_grammar({"type": "nonsense"}), schema_grammar({"$ref": "#/$defs/missing"}),
        schema_grammar({"type": "string", "pattern": "("}), "start: %json [",
    ],
)  # fmt: skip
def test_a_bad_schema_is_an_error_of_one_line(tiny_shards: Path, source: str) -> None:
    with pytest.raises(ValueError) as raised:
        Grammar(source, load_tokenizer(tiny_shards))
    assert "\n" not in str(raised.value) and str(raised.value)


def test_a_failing_grammar_ends_the_text_with_an_error(tiny_shards: Path) -> None:
    model = random_model(load_tokenizer(tiny_shards))
    stop = model.tokenizer.stop_ids
    constraint = Grammar(schema_grammar(PERSON), model.tokenizer).start(stop, model.config.vocab_size)
    constraint.accept(model.tokenizer.eod_id + 9)  # not a token that may come first
    batch = TextBatch(model)
    batch.insert([5], RANDOM, stop, constraint=constraint)
    chunks = [chunk for _ in range(3) for chunk in batch.step()]
    assert [chunk.finish_reason for chunk in chunks] == ["error"] and constraint.error
