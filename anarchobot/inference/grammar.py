"""Answers that follow a JSON schema or call a function, by llguidance (https://github.com/guidance-ai/llguidance).

At each token, the grammar says which tokens may come next; the others are not sampled.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.inference.call_syntax import CALL_ID, CallSyntax
from anarchobot.inference.tool_calls import value_types
from anarchobot.tokenizers.canonical_tokens import canonical_tokens, token_bytes
from anarchobot.tokenizers.tokenizer import ChatTokenizer


class Grammar:
    """A compiled grammar. Raises UserError if llguidance is not installed, and ValueError for an invalid or too complex
    grammar."""

    def __init__(self, lark: str, tokenizer: ChatTokenizer) -> None:
        vocabulary = _vocabulary(tokenizer)
        from llguidance import LLMatcher

        self._matcher: Any = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(lark), log_level=0)
        if error := self._matcher.get_error():
            raise ValueError(_one_line(error))

    def start(self, stop_ids: Collection[int], vocab_size: int) -> "GrammarConstraint":
        """A constraint for one text, which may end with `stop_ids` where the grammar ends."""
        return GrammarConstraint(self._matcher.deep_copy(), stop_ids, vocab_size)


class GrammarConstraint:
    """See batching.Constraint."""

    def __init__(self, matcher: Any, stop_ids: Collection[int], vocab_size: int) -> None:
        self._matcher, self._stop_ids, self._vocab_size = matcher, list(stop_ids), vocab_size
        self.error = ""

    def allowed(self) -> npt.NDArray[np.bool_]:
        allowed = np.zeros(self._vocab_size, bool)
        if not (self.error or self._matcher.is_stopped()):
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            n = min(len(bits), self._vocab_size)
            allowed[:n] = bits[:n]
        allowed[self._stop_ids] = self._matcher.is_accepting()
        if self._matcher.is_error():
            self.error = _one_line(self._matcher.get_error())
        elif not allowed.any():
            self.error = "no token of the vocabulary continues it"
        allowed[self._stop_ids] |= bool(self.error)
        return allowed

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


def schema_grammar(schema: dict[str, Any], prefix: str = "", controls: Mapping[str, int] = MappingProxyType({})) -> str:
    """Lark source of the JSON values that follow `schema`, after `prefix`, which may have `controls`."""
    return f"start: {_literals(prefix, controls)} %json {json.dumps(schema)}"


def calls_grammar(
    syntax: CallSyntax, functions: Sequence[dict[str, Any]], parallel: bool, controls: Mapping[str, int]
) -> str:
    """Lark source of one call of one of `functions`, in OpenAI's form, or with `parallel` of one or more. `controls`:
    the ids of control tokens. Raises ValueError if the parameters cannot be enforced in this syntax."""
    one = "(" + " | ".join(f"call{i}" for i in range(len(functions))) + ")"
    more = f"({_literals(syntax.between, controls)} {one})*" if parallel and syntax.between is not None else ""
    rules = [f"start: {_literals(syntax.prefix, controls)} {one} {more} {_literals(syntax.suffix, controls)}"]
    before_id, call_id, after_id = syntax.separator.partition(CALL_ID)
    separator = (
        f"{_literals(before_id, controls)} {'/[a-zA-Z0-9]{9}/' if call_id else ''} {_literals(after_id, controls)}"
    )
    for i, function in enumerate(functions):
        name, parameters = json.dumps(function["name"]), {"type": "object"} | function["parameters"]
        if syntax.form == "parameters":
            rules += _parameter_rules(syntax, f"call{i}", f"{name} {separator}", parameters, controls)
            continue
        rules.append(f"arguments{i}: %json {json.dumps(parameters)}")
        if syntax.form == "json":
            rules.append(f"call{i}: {name} {separator} arguments{i}")
        else:
            head = f'{{"name": {name}, "{syntax.arguments_field}": '
            rules.append(f'call{i}: {json.dumps(head)} arguments{i} "}}"')
    return "\n".join(rules)


def _parameter_rules(
    syntax: CallSyntax, call: str, head: str, schema: dict[str, Any], controls: Mapping[str, int]
) -> list[str]:
    """A call with marked-up parameters, in the order of their schema. A text ends where the closing begins."""
    before, middle, after = (_literals(text, controls) for text in syntax.parameter)
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules, items = [], [head]
    for i, (name, value) in enumerate(schema.get("properties", {}).items()):
        rule, end = f"{call}_{i}", after
        if value_types(value) != {"string"}:
            rules.append(f"{rule}_value: %json {json.dumps(value | shared if isinstance(value, dict) else value)}")
        elif "enum" in value:
            rules.append(f"{rule}_value: {' | '.join(map(json.dumps, value['enum']))}")
        elif limits := sorted({"pattern", "format", "const"} & value.keys()):
            raise ValueError(f"{limits[0]} of {name!r} cannot be enforced in the calls of this model")
        else:
            length = f"{{{value.get('minLength', 0)},{value.get('maxLength', '')}}}"
            rules.append(f"{rule}_value[suffix={json.dumps(syntax.parameter[2])}]: /(?s:.{length})/")
            end = ""
        rules.append(f"{rule}: {before} {json.dumps(name)} {middle} {rule}_value {end}")
        items.append(rule if name in schema.get("required", []) else f"{rule}?")
    return [*rules, f"{call}: {' '.join(items)}"]


def _literals(text: str, controls: Mapping[str, int]) -> str:
    """Text with control tokens as Lark source."""
    parts: list[str] = []
    while text:
        found = [(at, -len(name), name) for name in controls if name and (at := text.find(name)) >= 0]
        at, _, name = min(found, default=(len(text), 0, ""))
        parts += [json.dumps(text[:at])] if text[:at] else []
        parts += [f"<[{controls[name]}]>"] if name else []
        text = text[at + len(name) :]
    return " ".join(parts)


def _one_line(error: str) -> str:
    """The message of llguidance without the place in the source and its excerpt."""
    message = re.split(r"\n\s+\d+ \|", error)[0].rpartition("failed to compile JSON schema: ")[2]
    return " ".join(message.split())[:300]


def _vocabulary(tokenizer: ChatTokenizer) -> Any:
    """The tokenizer for llguidance."""
    return _make_vocabulary(tokenizer)  # type: ignore[arg-type]  # mypy takes no protocol for Hashable


@lru_cache(maxsize=1)
def _make_vocabulary(tokenizer: ChatTokenizer) -> Any:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ModuleNotFoundError as error:
        raise UserError("it requires llguidance: pip install 'anarchobot[structured]'") from error
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))


class _Vocabulary:
    """A tokenizer in the form that llguidance expects."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = token_bytes(tokenizer)
        self.eos_token_id = tokenizer.eod_id
        self.bos_token_id = None
        kinds = enumerate(canonical_tokens(tokenizer))
        self.special_token_ids = [i for i, token in kinds if token.kind in ("special", "unused")]
        special = set(self.special_token_ids)

        self._ids = {raw: i for i, raw in enumerate(self.tokens) if i not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """The ids of `text`; llguidance panics if they stand for anything else, such as a space before it."""
        ids: list[int] = self._tokenizer.encode_batch([text])[0].tolist()
        raw = text.encode()
        return ids if b"".join(self.tokens[i] for i in ids) == raw else self._greedy(raw)

    def _greedy(self, raw: bytes) -> list[int]:
        """The longest token at each position."""
        ids, at = [], 0
        while at < len(raw):
            ends = range(min(len(raw), at + self._longest), at, -1)
            end = next((end for end in ends if raw[at:end] in self._ids), len(raw))
            ids += [self._ids[raw[at:end]]] if raw[at:end] in self._ids else []
            at = end
        return ids
