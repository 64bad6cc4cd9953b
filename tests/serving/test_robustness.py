"""Malformed, oversized, unauthorized and aborted requests get a proper HTTP error, and the server keeps running."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from anarchobot.inference.model import Model
from anarchobot.serving.app import Limits
from anarchobot.serving.chat_schema import ChatRequest
from anarchobot.serving.errors import ApiError
from anarchobot.serving.messages_schema import MessagesRequest
from anarchobot.serving.prompts import PromptEncoder
from anarchobot.serving.schema import CompletionRequest, Request, parse_request
from tests.serving.conftest import KEY, RunningServer, run_server, wait_until

PATH = "/v1/completions"
ASK = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
LONG = {"model": "tiny", "prompt": "Hi", "max_tokens": 4000, "temperature": 0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


def status_of(connection: socket.socket) -> int:
    """The status of the response."""
    answer = connection.recv(65536)
    connection.close()
    return int(answer.split()[1])


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 60000, b'{"model": "tiny"}', b'{"model": NaN}',
        b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": 1, "prompt": "x"}', b'{"model": "tiny", "prompt": null}',
        *(
            json.dumps(ASK | wrong).encode()
            for wrong in (
                {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "2"}, {"max_tokens": True},
                {"max_tokens": 10**400}, {"temperature": -1}, {"temperature": 2.1}, {"temperature": "hot"},
                {"top_p": 1.1}, {"seed": 1.5}, {"seed": True}, {"stop": ""}, {"stop": ["a"] * 5}, {"stop": [1]},
                {"stop": "x" * 201}, {"stream": "yes"}, {"prompt": [1, 2]}, {"prompt": []}, {"n": 0},
                {"n": 17}, {"n": True}, {"best_of": 3}, {"echo": True}, {"logprobs": 21}, {"logprobs": True},
                {"tools": [{}]}, {"response_format": {"type": "json_object"}}, {"tool_choice": "required"},
                {"top_logprobs": 1}, {"logit_bias": {"1": 2}}, {"frequency_penalty": 3},
                {"presence_penalty": "1"}, {"repetition_penalty": 0}, {"min_p": 2}, {"top_k": 1.5}, {"top_k": True},
                {"mirostat": 2}, {"min_tokens": 5}, {"typical_p": 0}, {"ignore_eos": 0}, {"adapters": "/etc"},
                {"temprature": 0}, {"stream_options": 1},
            )
        ),
    ],
    ids=lambda body: repr(body[:70]),
)  # fmt: skip
def test_a_bad_body_is_a_bad_request(server: RunningServer, body: bytes) -> None:
    status, answer = server.post(PATH, body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error" and "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "Hi", [1], [{}], [{"role": "user"}], [{"role": "user", "content": None}],
        [{"role": "robot", "content": "x"}], [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}], [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [1]}], [{"role": "user", "content": "\ufdd0"}],
    ],
    ids=repr,
)  # fmt: skip
def test_bad_messages_are_a_bad_request(server: RunningServer, messages: Any) -> None:
    status, answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": messages})
    assert status == 400 and answer["error"]["param"].startswith("messages")


def test_unsupported_fields_without_effect_are_accepted(server: RunningServer) -> None:
    """With the defaults of other servers' fields; null is accepted for any field that need not be there."""
    fields = {"n": 1, "logprobs": None, "echo": False, "user": "me", "frequency_penalty": 0.0, "logit_bias": {}}
    fields |= {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "stream_options": {}}
    fields |= {"mirostat": 0, "min_tokens": 0, "typical_p": 1.0, "ignore_eos": False, "nonsense": None}
    expected = server.post(PATH, ASK | {"temperature": 0})[1]["choices"]
    fields |= {"stop": None, "seed": None, "stream": False, "temperature": 0}
    status, answer = server.post(PATH, ASK | fields)
    assert status == 200 and answer["choices"] == expected, answer
    for name, accepted in CompletionRequest.UNSUPPORTED.items():
        for value in (None, *accepted):
            assert server.post(PATH, ASK | {"max_tokens": 1, name: value})[0] == 200, (name, value)
        status, answer = server.post(PATH, ASK | {name: 0.625})
        assert (status, answer["error"]["param"]) == (400, name)


def test_a_body_of_a_hundred_megabytes(server: RunningServer) -> None:
    """With a declared length, in chunks, or waiting for 100-continue."""
    connection = server.raw(HEAD + b"Content-Length: 100000000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b" " * 1_000_000)
    assert status_of(connection) == 413
    connection = server.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"F4240\r\n" + b" " * 1_000_000 + b"\r\n")
    assert status_of(connection) == 413
    waiting = server.raw(HEAD + b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n")
    assert status_of(waiting) == 413  # without a 100 before
    assert server.is_healthy()


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: -1\r\n\r\n{}",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 99999999999999999999999999\r\n\r\n{}",
        b"Content-Length: 0x10\r\n\r\n{}",
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"Content-Length: +2\r\n\r\n{}",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n{}\r\n0\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"X: " + b"x" * 200_000 + b"\r\n\r\n",
        b"no colon here\r\n\r\n",
    ],
    ids=lambda rest: repr(rest[:40]),
)
def test_malformed_http_is_rejected_immediately(server: RunningServer, rest: bytes) -> None:
    assert status_of(server.raw(HEAD + rest)) in (400, 431, 501)
    assert server.is_healthy()


def test_a_body_that_never_arrives(server: RunningServer, model: Model) -> None:
    with run_server(
        model, Limits(body_seconds=1)
    ) as strict:  # its own server: on a busy machine other bodies may take as long
        assert status_of(strict.raw(HEAD + b"Content-Length: 10\r\n\r\n{}")) == 408
    server.raw(HEAD + b"Content-Length: 10\r\n\r\n{}").close()
    assert server.is_healthy()


def test_other_paths_and_methods(server: RunningServer) -> None:
    for method, path, expected in (
        ("GET", "/v1/completions", 405), ("GET", "/etc/passwd", 404), ("GET", "/../../etc/passwd", 404),
        ("POST", "/", 405), ("DELETE", "/v1/models/tiny", 405), ("GET", "/page.html", 404), ("OPTIONS", PATH, 405),
    ):  # fmt: skip
        status, _, answer = server.request(method, path)
        assert status == expected and json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_slot(server: RunningServer, stream: bool) -> None:
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
    connections = [server.raw(head + body) for _ in range(3)]
    if stream:
        for connection in connections:
            assert b"200 OK" in connection.recv(1000)
            while b"data:" not in connection.recv(1000):
                pass
    wait_until(lambda: server.active_requests() == 3)
    connections[0].close()
    wait_until(lambda: server.active_requests() == 2)
    for connection in connections:
        connection.close()
    wait_until(lambda: server.active_requests() == 0)
    assert server.worker._jobs == {} and len(server.worker._batch) == 0
    assert server.is_healthy()


def test_requests_beyond_the_queue_are_rejected(model: Model) -> None:
    with run_server(model, Limits(tokens=4000), rows=2, queue_size=1) as server:
        body = json.dumps(LONG | {"stream": True}).encode()
        waiting = [server.raw(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) for _ in range(3)]
        wait_until(lambda: server.active_requests() == 3)
        status, headers, answer = server.request("POST", PATH, json.dumps(ASK).encode())
        assert status == 429 and headers["retry-after"] == "1"
        assert json.loads(answer)["error"]["type"] == "rate_limit_error"
        for connection in waiting:
            connection.close()
        assert server.is_healthy()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200), ("LocalHost:9", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("my-mac.local", 200),
        ("evil.example", 403), ("evil.example:80", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil", 403),
        ("127.0.0.1:80@evil", 403), ("", 403), ("0.0.0.0", 403), ("192.168.0.5", 403), ("localhost:x", 403),
    ],
)  # fmt: skip
def test_a_foreign_host_is_rejected(locked_server: RunningServer, host: str, expected: int) -> None:
    for path in ("/", "/health", "/v1/models"):
        status, _, _ = locked_server.request("GET", path, headers={"Host": host, "Authorization": f"Bearer {KEY}"})
        assert status == expected, path


def test_two_hosts_or_none_are_rejected(locked_server: RunningServer) -> None:
    assert status_of(locked_server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n")) in (400, 403)
    assert status_of(locked_server.raw(b"GET /health HTTP/1.1\r\n\r\n")) in (400, 403)
    assert status_of(locked_server.raw(b"GET /health HTTP/1.0\r\n\r\n")) in (400, 403)


def test_a_foreign_origin_is_rejected(locked_server: RunningServer) -> None:
    own = f"http://127.0.0.1:{locked_server.port}"
    for origin, expected in (
        (own, 200), ("http://localhost:3000", 200), ("http://localhost:3001", 403), ("null", 403), ("", 403),
        ("http://evil.example", 403), (own + "0", 403), (own.replace("http", "https"), 403),
    ):  # fmt: skip
        headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
        status, received, _ = locked_server.request("POST", PATH, json.dumps(ASK).encode(), headers)
        assert status == expected, origin
        allowed = received.get("access-control-allow-origin")
        assert allowed == (origin if origin == "http://localhost:3000" else None)
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert locked_server.request("OPTIONS", PATH, headers={"Origin": "http://localhost:3000", **preflight})[0] == 200
    assert locked_server.request("OPTIONS", PATH, headers={"Origin": "http://evil.example", **preflight})[0] == 403


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, f"Basic {KEY}", "Bearer \xff\xfe"],
)
def test_the_api_key_is_required(locked_server: RunningServer, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    for method, path in (("GET", "/v1/models"), ("POST", PATH), ("POST", "/v1/chat/completions"), ("GET", "/v1/x")):
        status, received, answer = locked_server.request(method, path, headers=headers)
        assert status == 401 and received["www-authenticate"] == "Bearer"
        assert json.loads(answer)["error"]["code"] == "invalid_api_key"
        assert KEY not in answer.decode()
    assert locked_server.request("GET", "/", headers=headers)[0] == 200


def test_concurrent_bad_clients_do_not_disturb_good_ones(server: RunningServer) -> None:
    """Disconnects, bad bodies and valid requests at the same time."""
    body = json.dumps(LONG | {"stream": True}).encode()
    before = server.post(PATH, ASK | {"seed": 1})[1]["choices"]

    def one(i: int) -> Any:
        if i % 3 == 0:
            server.raw(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body).close()
        elif i % 3 == 1:
            assert server.post(PATH, b"{")[0] == 400
        else:
            return server.post(PATH, ASK | {"seed": 1})[1]["choices"]
        return before

    with ThreadPoolExecutor(8) as pool:
        assert all(found == before for found in pool.map(one, range(48)))
    assert server.is_healthy()


def test_a_request_beyond_the_queue_is_not_tokenized(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = PromptEncoder.encode

    def counted(self: PromptEncoder, parsed: Any, *rest: Any) -> Any:
        encoded.append(parsed.prompt)
        return encode(self, parsed, *rest)

    monkeypatch.setattr(PromptEncoder, "encode", counted)
    with run_server(model, Limits(tokens=4000), rows=1, queue_size=0) as server:
        body = json.dumps(LONG | {"stream": True}).encode()
        running = server.raw(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in running.recv(1000)
        assert server.post(PATH, ASK | {"prompt": "a second one"})[0] == 429
        running.close()
        wait_until(lambda: server.active_requests() == 0)
        assert server.post(PATH, ASK | {"prompt": "x y " * 4000})[0] == 400  # fails after it took its place
        assert server.post(PATH, ASK)[0] == 200
    assert encoded == ["Hi", "x y " * 4000, "Hi"]


def test_tokenizing_blocks_neither_the_server_nor_runs_for_a_client_that_left(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    release = threading.Event()
    encode = PromptEncoder.encode

    def blocking(self: PromptEncoder, parsed: Any, *rest: Any) -> Any:
        encoded.append(parsed.prompt)
        assert release.wait(100)
        return encode(self, parsed, *rest)

    monkeypatch.setattr(PromptEncoder, "encode", blocking)
    with run_server(model) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, PATH, ASK)
        wait_until(lambda: encoded == ["Hi"])
        body = json.dumps(ASK | {"prompt": "second"}).encode()
        second = server.raw(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: server.active_requests() == 2)
        second.close()
        wait_until(lambda: len(server.server.server_state.connections) == 1)
        release.set()
        assert first.result()[0] == 200
        wait_until(lambda: server.active_requests() == 0)
    assert encoded == ["Hi"]


def test_a_text_that_is_longer_than_any_prompt_is_not_tokenized(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    size = model.tokenizer.longest_token * model.config.max_seq_len
    assert size < 2**20
    with run_server(model) as server, monkeypatch.context() as patch:
        patch.setattr(model.tokenizer, "encode_batch", None)
        for path, field in (
            (PATH, {"prompt": "x" * (size + 1)}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * (size + 1)}]}),
        ):
            status, answer = server.post(path, {"model": "tiny", **field})
            assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        (ChatRequest, {"messages": [{}] * 1000}),
        (ChatRequest, {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}] * 1000}]}),
        (MessagesRequest, {"max_tokens": 1, "messages": [1] * 1000}),
        (MessagesRequest, {"max_tokens": 1, "messages": [{"role": "user", "content": [{}] * 1000}]}),
        (MessagesRequest, {"max_tokens": 1, "messages": [], "system": [{}] * 1000}),
    ],
)
def test_only_the_first_of_many_invalid_items_is_looked_at(schema: type[Request], fields: dict[str, Any]) -> None:
    """Otherwise a request of 60 kB takes 38 MB, and the server's only thread 0.6 s."""
    with pytest.raises(ApiError) as error:
        parse_request(orjson.dumps({"model": "tiny", **fields}), schema)
    assert isinstance(error.value.__cause__, ValidationError)
    assert error.value.__cause__.error_count() < 10
