"""Random request bodies never cause an internal error."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anarchobot.serving.chat_schema import ChatRequest
from anarchobot.serving.messages_schema import MessagesRequest
from anarchobot.serving.schema import CompletionRequest
from tests.serving.conftest import RunningServer

REQUESTS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest, "/v1/messages": MessagesRequest}
FIELDS = sorted(
    {"nonsense"}.union(
        *({*r.UNSUPPORTED, *r.IGNORED, *r.model_fields} for r in (CompletionRequest, ChatRequest, MessagesRequest))
    )
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
stops = st.lists(st.text(min_size=1, max_size=5), max_size=4)
plausible: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2), "top_p": st.sampled_from([0, 0.004, 0.5, 1]),
    "seed": st.integers(-(2**63), 2**63 - 1), "stream": st.booleans(), "stop": stops, "max_tokens": st.integers(1, 5),
    "top_k": st.integers(-1, 2**63 - 1), "min_p": st.floats(0, 1), "repetition_penalty": st.floats(0.01, 100),
    "presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-2, 2), "model": st.text(max_size=20),
}  # fmt: skip
texts = st.text(max_size=40)
roles = st.sampled_from(["system", "user", "assistant"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=4)
wild = st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3)
fuzzed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def check(server: RunningServer, path: str, content: Any) -> int:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    status, _, answer = server.request("POST", path, body)
    assert status in (200, 400, 429), (status, answer)
    assert b'"server_error"' not in answer  # also in a stream
    return status


@fuzzed
@given(st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(server: RunningServer, body: bytes) -> None:
    assert check(server, "/v1/completions", body) == 400


@fuzzed
@given(texts, st.fixed_dictionaries({}, optional=plausible))
def test_any_text_is_completed(server: RunningServer, prompt: str, fields: dict[str, Any]) -> None:
    assert check(server, "/v1/completions", {"model": "tiny", "max_tokens": 3, "prompt": prompt} | fields) == 200


@fuzzed
@given(messages, st.fixed_dictionaries({}, optional=plausible))
def test_any_conversation(server: RunningServer, conversation: list[dict[str, str]], fields: dict[str, Any]) -> None:
    check(server, "/v1/chat/completions", {"model": "tiny", "max_tokens": 3, "messages": conversation} | fields)


@fuzzed
@given(wild, st.sampled_from(sorted(REQUESTS)))
def test_any_value_in_any_field(server: RunningServer, fields: dict[str, Any], path: str) -> None:
    plain = {"prompt": "Hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    check(server, path, {"model": "tiny", "max_tokens": 2, **plain} | fields)


def test_the_server_is_still_healthy(server: RunningServer) -> None:
    assert server.is_healthy()
