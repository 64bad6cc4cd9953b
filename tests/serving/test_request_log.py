"""One line per request, and prompts only if asked for."""

import json
import logging
import re
from collections.abc import Iterator

import pytest

from anarchobot.inference.model import Model
from tests.serving.conftest import RunningServer, run_server, wait_until
from tests.serving.test_connections import STREAM
from tests.serving.test_robustness import ASK, PATH

PROMPT = "secret\nERROR forged \x1b[2J\x9b"


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "anarchobot.serving.request_log"):
        yield


def lines(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    wait_until(lambda: len(caplog.messages) >= count)
    assert len(caplog.messages) == count
    return [re.sub(r" \d+ ms", "", line) for line in caplog.messages]


def test_one_line_per_request(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    _, answer = server.post(PATH, ASK | {"prompt": PROMPT})
    server.post("/v1/chat/completions", {"model": "tiny", "messages": []})
    server.request("GET", "/a%0Ab?key=secret")
    used = answer["usage"]
    cached = used["prompt_tokens_details"]["cached_tokens"]
    assert lines(caplog, 3) == [
        f"127.0.0.1 POST {PATH} 200 in={used['prompt_tokens']} cached={cached} out={used['completion_tokens']}",
        "127.0.0.1 POST /v1/chat/completions 400",
        "127.0.0.1 GET /a%0Ab 404",
    ]


def test_a_disconnect_is_logged_with_the_tokens_so_far(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    connection = server.raw(STREAM)
    while b"data:" not in connection.recv(1000):
        pass
    connection.close()
    wait_until(lambda: server.worker.active_requests == 0)
    (line,) = lines(caplog, 1)
    match = re.fullmatch(rf"127.0.0.1 POST {PATH} 499 in=(\d+) cached=(?:\d+) out=(\d+)", line)
    assert match and int(match[1]) >= 1 and 1 <= int(match[2]) < 4000


def test_prompts_are_logged_on_request_in_ascii(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with run_server(model, log_prompts=True) as server:
        server.post(PATH, ASK | {"prompt": PROMPT})
        (line,) = lines(caplog, 1)
    assert line.endswith(f" prompt={json.dumps(PROMPT)}") and line.isascii() and line.isprintable()
