"""Many clients stream answers of mixed lengths while others disconnect: none is lost or mixed up."""

import json
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

from anarchobot.inference.generation import generate
from anarchobot.inference.model import Model
from tests.serving.conftest import DEFAULTS, RunningServer, wait_until
from tests.serving.test_robustness import PATH

PROMPTS = [f"{'word ' * (3 * i % 17)}def number_{i}(" for i in range(12)]
TOKENS = (6, 20, 12)


def stream(server: RunningServer, i: int) -> str | None:
    """The answer to prompt i; every third client disconnects during it."""
    ask = {"model": "tiny", "prompt": PROMPTS[i % 12], "max_tokens": TOKENS[i % 3], "seed": i % 12, "stream": True}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=100)
    try:
        connection.request("POST", PATH, json.dumps(ask).encode())
        response = connection.getresponse()
        assert response.status == 200
        pieces: list[str] = []
        while (line := response.readline().strip()) != b"data: [DONE]":
            if line:
                pieces.append(json.loads(line.removeprefix(b"data: "))["choices"][0]["text"])
            if i % 3 == 1 and len(pieces) > i % 4:
                return None
        return "".join(pieces)
    finally:
        connection.close()


def test_answers_under_disconnects(model: Model, server: RunningServer) -> None:
    expected = {
        i: generate(
            model, DEFAULTS.model_copy(update={"prompt": PROMPTS[i], "max_new_tokens": TOKENS[i % 3], "seed": i})
        )
        for i in range(12)
        if i % 3 != 1
    }
    assert len(set(expected.values())) == len(expected) and "" not in expected.values()
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda i: stream(server, i), range(96)))
    assert found == [expected.get(i % 12) for i in range(96)]
    wait_until(lambda: server.active_requests() == 0)
    assert server.worker._jobs == {} and len(server.worker._batch) == 0
