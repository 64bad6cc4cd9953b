"""`anarchobot serve` from its first line to Ctrl-C."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from anarchobot.cli.main import build_parser, main
from anarchobot.cli.parser import parse
from tests.exchange.random_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "chat"
    return make_run(folder, next(tiny_shards.glob("*.model")), n_layers=1, max_seq_len=100_000)


@contextmanager
def serving(run: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], HTTPConnection]]:
    words = [sys.executable, "-m", "anarchobot", "serve", "--checkpoint", str(run), "--port", "0", "--json", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "ANARCHOBOT_API_KEY"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            assert told["model"] == "chat"
            address = urlsplit(told["url"])
            assert address.port is not None
            yield process, HTTPConnection(address.hostname or "", address.port, timeout=100)
        finally:
            process.kill()


def test_ctrl_c_ends_what_is_under_way(run: Path) -> None:
    """A long answer is told that it is over, a short one is finished; then the program leaves as Ctrl-C leaves it."""
    with serving(run, "--max-tokens", "90000") as (process, connection):
        ask = {"model": "chat", "prompt": "Hello", "stream": True, "temperature": 0, "max_tokens": 90_000}
        connection.request("POST", "/v1/completions", json.dumps(ask))
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)
        *_, last = response.read().decode().strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"
        assert process.wait(100) == 130
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == "anarchobot: stopped"
        connection.close()


def test_an_exported_model_and_a_key_from_a_file(run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "chat"
    assert main(["export", "--checkpoint", str(run), "--to", "hf", "--output", str(exported), "--quiet"]) == 0
    (tmp_path / "key").write_text("sesame\n")
    with serving(exported, "--api-key-file", str(tmp_path / "key"), "--host", "0.0.0.0") as (process, connection):
        connection = HTTPConnection("127.0.0.1", connection.port, timeout=100)
        for headers, expected in (({}, 401), ({"Authorization": "Bearer sesame"}, 200)):
            connection.request("GET", "/v1/models", headers=headers)
            response = connection.getresponse()
            response.read()
            assert response.status == expected
        connection.close()
        process.terminate()
        assert process.wait(100) == -signal.SIGTERM


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["serve", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_told_in_a_line(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANARCHOBOT_API_KEY", raising=False)
    here = ("--checkpoint", str(run))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1, port {port}: can't be served on: Address already in use" in refused(
            capsys, *here, "--port", port
        )
    assert "it has no key" in refused(capsys, *here, "--host", "0.0.0.0", "--port", "0")
    assert "it has no key" in refused(capsys, *here, "--host", "::", "--port", "0")
    assert "no address of this machine's" in refused(capsys, *here, "--host", "no.such.name.invalid")
    assert "expected a port" in refused(capsys, *here, "--port", "65536")
    assert "1 or more" in refused(capsys, *here, "--max-tokens", "0")
    assert "0 or more" in refused(capsys, *here, "--queue", "-1")
    (tmp_path / "empty").write_text("\n")
    assert "no API key" in refused(capsys, *here, "--api-key-file", str(tmp_path / "empty"))
    assert "No such file" in refused(capsys, *here, "--api-key-file", str(tmp_path / "none"))
    assert "--allow-host" in refused(capsys, *here, "--port", "0", "--allow-host", "http://x")
    assert "--allow-origin" in refused(capsys, *here, "--port", "0", "--allow-origin", "*")
    assert "none" in refused(capsys, "--checkpoint", str(tmp_path / "none"), "--port", "0")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "uvicorn", None)
        patch.delitem(sys.modules, "anarchobot.serving.server", raising=False)
        assert "pip install 'anarchobot[serve]'" in refused(capsys, *here)
    monkeypatch.setenv("ANARCHOBOT_API_KEY", "")
    assert "ANARCHOBOT_API_KEY" in refused(capsys, *here)


def test_the_pages_examples_run(run: Path, tmp_path: Path) -> None:
    """The shell's and Python's, as they stand in docs/serving.md but for the port."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    with serving(run) as (process, connection):
        address = f"127.0.0.1:{connection.port}"
        (shell,) = [b.partition("```")[0] for b in page.split("```sh\n")[1:] if "curl" in b]
        done = subprocess.run(["sh", "-ec", shell.replace("127.0.0.1:8080", address)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert '"text_completion"' in done.stdout and "data: [DONE]" in done.stdout
        pytest.importorskip("openai")
        (python,) = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
        (tmp_path / "example.py").write_text(python.replace("127.0.0.1:8080", address))
        done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130  # with nothing under way, and no abort of MLX's
    lines = [line for line in page.splitlines() if line.startswith("anarchobot serve")]
    assert len(lines) == 2
    for line in lines:
        assert parse(build_parser(), shlex.split(line)[1:]).checkpoint == "runs/chat"
