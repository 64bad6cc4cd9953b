"""A server on a real socket in this process, with a small random model."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.model import Model, load_model
from anarchobot.serving.app import Limits
from anarchobot.serving.auth import allowed_hosts, allowed_origins
from anarchobot.serving.embeddings import Embedder
from anarchobot.serving.passages import PassageSearch
from anarchobot.serving.server import HttpServer, ServerOptions, bind, make_app
from anarchobot.serving.worker import Worker
from tests.exchange.random_run import make_run

DEFAULTS = GenerationConfig(max_new_tokens=12)
HOSTS = allowed_hosts("127.0.0.1", ["my-mac.local"])
ORIGINS = allowed_origins(["http://localhost:3000"])
KEY = "a-test-key"


@dataclass
class RunningServer:
    port: int
    worker: Worker
    server: HttpServer
    opened: list[socket.socket] = field(default_factory=list)  # by `raw`; closed at the end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers with lower-case names, body."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=100)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, content: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        status, _, answer = self.request("POST", path, body, headers)
        return status, json.loads(answer)

    def raw(self, sent: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=100)
        self.opened.append(connection)
        connection.sendall(sent)
        return connection

    def active_requests(self) -> int:
        return int(json.loads(self.request("GET", "/health")[2])["under_way"])

    def is_healthy(self) -> bool:
        """Whether it becomes idle and still serves a request."""
        wait_until(lambda: self.active_requests() == 0)
        status, answer = self.post("/v1/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 1})
        return status == 200 and answer["usage"]["completion_tokens"] <= 1


def wait_until(holds: Any, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@contextmanager
def run_server(
    model: Model,
    limits: Limits | None = None,
    rows: int = 16,
    name: str = "tiny",
    knowledge_base: PassageSearch | None = None,
    embedder: Embedder | None = None,
    **options: Any,
) -> Iterator[RunningServer]:
    chosen = ServerOptions(name=name, port=0, limits=limits or Limits(), **options)
    bound = bind(chosen)
    port = bound.getsockname()[1]
    with bound, Worker(model, chosen.queue_size, rows, prefix_bytes=chosen.prefix_bytes) as worker:
        server = HttpServer(
            make_app(model, DEFAULTS, chosen, worker, knowledge_base, embedder), worker, chosen.connections
        )
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        running = RunningServer(port, worker, server)
        try:
            yield running
        finally:
            for connection in running.opened:
                connection.close()
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Model:
    folder = tmp_path_factory.mktemp("serving") / "run"
    make_run(folder, next(tiny_shards.glob("*.model")), n_layers=1, max_seq_len=4096)
    return load_model(folder)[0]


@pytest.fixture(scope="session")
def server(model: Model) -> Iterator[RunningServer]:
    """Without an API key."""
    with run_server(model, Limits(tokens=4000, body_bytes=2**16)) as found:
        yield found


@pytest.fixture(scope="session")
def locked_server(model: Model) -> Iterator[RunningServer]:
    with run_server(model, api_key=KEY, hosts=HOSTS, origins=ORIGINS) as found:
        yield found
