"""Inputs that made a reader fail in `make fuzz`, cut down to what matters. Each is read, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import with_checksum
from tests.fuzz.child import write
from tests.fuzz.readers import READERS

DEEP = "[" * 100_000
RESULT = {"checkpoint": "a", "results": {"text": {"loss": 1.5}}}
EVENT: dict[str, Any] = {"step": 1, "event": "train", "time": 1.7e9, "loss": 5.5}
TOO_DEEP = "nested too deeply"


def _results(**changes: Any) -> dict[str, str]:
    return {"a.json": json.dumps({**RESULT, **changes}), "b.json": json.dumps(RESULT)}


def _log(*events: dict[str, Any], config: str = "", **files: str) -> dict[str, str]:
    lines = "".join(json.dumps(event) + "\n" for event in events)
    others = {f"run/logs/{name}.json": text for name, text in files.items()}
    return {"run/config.yaml": config, "run/logs/metrics.jsonl": lines, **others}


def _tokenizer(vocab: dict[str, int]) -> dict[str, str]:
    return {"tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []})}


def _processed(template: str) -> dict[str, str]:
    """A tokenizer with a template for texts: `A` is the text, other words are special tokens."""
    spec = json.loads(_tokenizer({"</s>": 0, "a": 1})["tokenizer.json"])
    kinds = {True: "Sequence", False: "SpecialToken"}
    single = [{kinds[word == "A"]: {"id": word, "type_id": 0}} for word in template.split()]
    specials = {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": specials}
    return {"tokenizer.json": json.dumps(spec)}


def _template(source: str, vocab: str = "aHi", **others: str) -> dict[str, str]:
    ids = {token: i for i, token in enumerate(("</s>", *vocab))}
    return {**_tokenizer(ids), "chat_template.jinja": source, **others}


def _checksummed(name: str, **values: Any) -> dict[str, str]:
    return {name: with_checksum(values)}


ACCEPTED = ""
CASES: dict[str, tuple[str, dict[str, str], str]] = {
    "a prompt nested too deeply": ("prompts", {"a.jsonl": DEEP}, TOO_DEEP),
    "a result nested too deeply": ("evaluation results", {**_results(), "a.json": DEEP}, "a.json: not a result"),
    "a result that is a text": ("evaluation results", _results(results={"text": {"loss": "low"}}), "not a result"),
    "results without datasets": ("evaluation results", _results(results={"text": 1.5}), "not a result"),
    "an environment nested too deeply": ("run log", _log(EVENT, environment=DEEP), ACCEPTED),
    "a log path that is a number": ("run log", _log(EVENT, config="train: {log_path: 5}"), ACCEPTED),
    "a time that is a text": ("run log", _log(EVENT, {**EVENT, "time": "now"}), ACCEPTED),
    "a time after the last year": ("run log", _log(EVENT, {**EVENT, "time": 1e300}), ACCEPTED),
    "losses that hardly differ": (
        "run log",
        _log(EVENT | {"loss": 0.0}, {**EVENT, "step": 2, "loss": 5e-324}),
        ACCEPTED,
    ),
    "half a character": ("run log", _log(EVENT, environment='{"python": "\\ud800"}'), ACCEPTED),
    "a step that is a text": ("run log", _log(EVENT, {**EVENT, "step": "2"}), ACCEPTED),
    "a best step that is infinite": ("checkpoint", _checksummed("best.json", step=float("inf")), "best.json: damaged"),
    "a token with a large id": ("tokenizer.json", _tokenizer({"</s>": 0, "a": 2**31}), "2 tokens, but ids up to"),
    "two tokens with one id": ("tokenizer.json", _tokenizer({"</s>": 0, "a": 1, "b": 1}), "'a' and 'b' have the id 1"),
    "a prompt with half a character": ("prompts", {"a.jsonl": '{"prompt": "\\ud800"}'}, "not valid Unicode"),
    "a post-processor that replaces the text": (
        "tokenizer.json",
        _processed("</s> A </s> A"),
        "changes the tokens of a text",
    ),
    "a post-processor with an unknown token": ("tokenizer.json", _processed("<x> A"), "not a supported tokenizer: "),
    "a template that writes nothing": ("chat template", _template("{# #}"), "unusable chat template: "),
    "a template that writes nothing for a question": (
        "chat template",
        _template("{% if messages[1] is defined %}{{ messages[0].content }}{{ messages[1].content }}{% endif %}"),
        "unusable chat template: rejected by the chat template (it writes nothing)",
    ),
    "a template that writes half a character": (
        "chat template",
        _template("{{ messages | map(attribute='content') | join }}{{ '\\ud800' }}"),
        "unusable chat template",
    ),
    "a template that fails for questions alone": (
        "chat template",
        _template("{{ messages[0].content }}{{ messages[1].content }}"),
        "unusable chat",
    ),
    "an answer without tokens": (
        "chat template",
        _template("{{ messages | map(attribute='content') | join }}", vocab="a"),
        "no tokens for the answer",
    ),
    "a token with half a character": (
        "chat template",
        _template("a", **{"tokenizer_config.json": '{"bos_token": "\\ud800"}'}),
        "token '\\ud800' is not valid Unicode",
    ),
    "JSON that only the tokenizer's library reads": (
        "exported tokenizer",
        {"tokenizer.json": _tokenizer({"</s>": 0, "a": 1})["tokenizer.json"].replace('{"model"', '{"v", "model"')},
        "can't be exported",
    ),
    "a token of a megabyte": (
        "chat template",
        _template("a", **{"tokenizer_config.json": json.dumps({"bos_token": "x" * 1_000_000})}),
        "a token of 1,000,000 characters",
    ),
    "a loss beyond any float": ("run log", _log(EVENT, {**EVENT, "step": 2, "loss": 10**400}), ACCEPTED),
}


@pytest.mark.parametrize("case", CASES)
def test_found(tmp_path: Path, case: str) -> None:
    reader, files, expected = CASES[case]
    folder = write(tmp_path / "input", {name: text.encode() for name, text in files.items()})
    if expected == ACCEPTED:
        READERS[reader].read(folder)
    else:
        with pytest.raises(UserError) as error:
            READERS[reader].read(folder)
        assert expected in str(error.value)
