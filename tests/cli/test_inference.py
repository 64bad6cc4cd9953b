"""`anarchobot generate`, `chat` (on a terminal and through a pipe) and `serve` (from start to Ctrl-C)."""

import fcntl
import io
import json
import os
import pty
import select
import shlex
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from anarchobot.cli.inference import _read_prompts
from anarchobot.cli.main import build_parser, main
from anarchobot.cli.parser import parse
from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.inference.generation import generate
from anarchobot.inference.model import load_model
from anarchobot.tasks.pretrain import pretrain
from tests.exchange.random_run import make_run
from tests.tiny import loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("inference") / "chat"
    return make_run(folder, next(tiny_shards.glob("*.model")), n_layers=1, max_seq_len=100_000)


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path: Path) -> None:
    """And a line ends only at a line feed."""
    (tmp_path / "p.txt").write_bytes("\ufeffdef \r\na\u2028b\rc\n".encode())
    (tmp_path / "P.JSONL").write_bytes('\ufeff{"prompt": "def "}\n{"prompt": "a\u2028b"}\n'.encode())
    assert _read_prompts(tmp_path / "p.txt") == ["def ", "a\u2028b\rc"]
    assert _read_prompts(tmp_path / "P.JSONL") == ["def ", "a\u2028b"]


def test_a_chat_at_a_terminal_has_a_random_seed_unless_one_is_given(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seeds(*words: str) -> list[int]:
        found = []

        def session(model: object, settings: GenerationConfig, *rest: None) -> None:
            found.append(settings.seed)
            raise UserError("no chat here")

        monkeypatch.setattr("anarchobot.inference.chat.ChatSession", session)
        for _ in range(2):
            assert main(["chat", "--checkpoint", str(run), *words]) == 2
            capsys.readouterr()
        return found

    numbers = iter(range(11, 20))
    monkeypatch.setattr("secrets.randbelow", lambda limit: next(numbers))
    assert seeds() == [0, 0]  # through a pipe
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert seeds() == [11, 12]
    assert seeds("--seed", "3") == [3, 3]
    assert seeds("generation.seed=4") == [4, 4]


def test_a_prompt_that_is_too_long_is_not_echoed(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run"), show="nothing")
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "word " * 99]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "prompt" in captured.err and len(captured.err.splitlines()) == 1
    assert main(["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "a word", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("a word")


def test_a_prompt_from_standard_input_and_the_end_of_the_context(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run"), show="nothing")
    words = ["generate", "--checkpoint", str(tmp_path / "run"), "--temperature", "0", "--prompt"]
    assert main([*words, "a\nword", "--max-new-tokens", "3"]) == 0
    expected = capsys.readouterr()
    assert expected.err == "" and expected.out.startswith("a\nword")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nword\n")))
    assert main([*words, "-", "generation.max_new_tokens=3"]) == 0
    assert capsys.readouterr() == expected
    assert main(["--debug", *words, "a", "--max-new-tokens", "999"]) == 0
    assert "(stopped: the model's max_seq_len is 64 tokens)" in capsys.readouterr().err
    assert main([*words, "a", "train.lr=1"]) == 2
    assert "'train.lr=1': this command has only settings of generation" in capsys.readouterr().err


def test_temperature_0_is_greedy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for words in (
        ["--temperature", "0"],
        ["--temperature", "0", "--method", "random", "--seed", "5"],
        ["--method", "greedy"],
    ):
        assert main(["generate", "--checkpoint", str(run), "--max-new-tokens", "9", *words]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


# --- chat


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_quit_ends_the_chat(run: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(run, f"{word}\nHello\n") == 0
    assert capsys.readouterr().out == ""


def chat(run: Path, lines: str | bytes, *flags: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        pipe = io.TextIOWrapper(io.BytesIO(lines.encode() if isinstance(lines, str) else lines), encoding="ascii")
        patch.setattr(sys, "stdin", pipe)
        words = ["chat", "--checkpoint", str(run), "--method", "random", "--max-new-tokens", "6", *flags]
        return main(words)


def test_a_pipe_is_answered_line_by_line(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.jsonl"
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = f"Hello\n\n/save {file}\n/reset\nHello\n/system Be kind.\nHello\n/save ~/out.jsonl\n"
    assert chat(run, lines) == 0
    captured = capsys.readouterr()
    talks = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [m["role"] for m in talks[0]] == ["user", "assistant"]
    assert [m["role"] for m in talks[1]] == ["system", "user", "assistant", "user", "assistant"]  # /reset dropped one
    answers = [talks[0][1]["content"], talks[1][2]["content"], talks[1][4]["content"]]
    assert captured.out.split() == " ".join(answers).split()
    assert captured.err.splitlines()[1:] == [
        f"saved to {file}",
        "conversation reset",
        "system prompt set",
        "saved to ~/out.jsonl",
    ]


def test_a_pipe_is_utf8_with_or_without_a_byte_order_mark(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(run, b"\xef\xbb\xbfHi \xc3\xa9\ncaf\xe9\n/system \xff\nHi\n", "--json") == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["question"] for line in captured.out.splitlines()] == ["Hi \xe9", "Hi"]
    lines = [line for line in captured.err.splitlines() if line.startswith("anarchobot: ")]
    assert lines == [r"anarchobot: 'caf\udce9': not valid UTF-8", r"anarchobot: '/system \udcff': not valid UTF-8"]


def test_chat_with_json_and_a_knowledge_base(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bees.txt").write_text("Bees have four wings.")
    base = str(tmp_path / "kb.sqlite")
    assert main(["kb", "add", "--kb", base, str(tmp_path / "bees.txt"), "--quiet"]) == 0
    capsys.readouterr()
    assert chat(run, "How many wings?\n/good\nzzz\n/good\n", "--kb", base, "--json") == 0
    captured = capsys.readouterr()
    first, second = (json.loads(line) for line in captured.out.splitlines())
    assert first["question"] == "How many wings?" and first["answer"]
    assert first["sources"] == [str(tmp_path / "bees.txt")] and second["sources"] == []
    assert captured.err.splitlines()[1:] == [
        "rated 1 passage",
        "anarchobot: no passages were found for the last question",
    ]
    assert main(["kb", "list", "--kb", base]) == 0
    assert "1 vote" in capsys.readouterr().out
    assert chat(run, "How many wings?\n", "--kb", base) == 0
    assert capsys.readouterr().out.endswith(f"\n(sources: {tmp_path / 'bees.txt'})\n")


def test_chat_says_that_passages_did_not_fit(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = make_run(tmp_path / "small", next(tiny_shards.glob("*.model")), n_layers=1, max_seq_len=100)
    (tmp_path / "bees.txt").write_text("Bees have four wings. " * 40)
    base = str(tmp_path / "kb.sqlite")
    assert main(["kb", "add", "--kb", base, str(tmp_path / "bees.txt"), "--quiet"]) == 0
    capsys.readouterr()
    assert chat(small, "How many wings?\n/good\n", "--kb", base, "--json") == 0
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert (row["sources"], row["dropped_passages"]) == ([], 1)
    told = "anarchobot: none of the passages found for the last question fit in the context window"
    assert captured.err.splitlines()[-1] == told
    assert chat(small, "How many wings?\n", "--kb", base) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "(1 of 1 passages did not fit in the context window)"


def test_chat_continues_after_an_error(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "where.jsonl"
    assert chat(run, f"/svae x\n/save\n/save x\n/good\nHi\n/save {nowhere}\n/help\n") == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    errors = captured.err.splitlines()[1:6]
    assert errors[0] == "anarchobot: unknown command '/svae'; did you mean '/save'? (see /help)"
    assert errors[1] == "anarchobot: /save: missing FILE"
    assert "no conversation" in errors[2] and "--kb FILE" in errors[3]
    assert errors[4] == f"anarchobot: {nowhere}: No such file or directory"
    assert "/reset        forget the conversation" in captured.err


def test_a_folder_without_a_model_is_refused_with_all_that_is_expected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for more in ([], ["--model", str(tmp_path)]):
        assert main(["generate", "--checkpoint", str(tmp_path), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "a run folder or one of its step_… folders" in line and "Hugging Face model (config.json)" in line
    with pytest.raises(UserError, match=r"Hugging Face model \(config\.json\)"):  # sft --model
        load_pretrained(str(tmp_path))


def test_chat_requires_a_model_and_an_existing_knowledge_base(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert chat(tmp_path, "Hi\n") == 2
    assert chat(run, "Hi\n", "--kb", str(tmp_path / "none.sqlite")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_chat(run: Path) -> None:
    """On a terminal. Without Ctrl-C the answer would be 90,000 tokens long."""
    ours, theirs = pty.openpty()
    # With another seed, the answer may be short.
    words = ["chat", "--checkpoint", str(run), "--method", "random", "--max-new-tokens", "90000", "--seed", "0"]
    done = subprocess.Popen(
        [sys.executable, "-m", "anarchobot", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
    )
    os.close(theirs)
    output = b""

    def read_until(wanted: bytes, key: bytes = b"") -> None:
        """Presses `key`, and again if nothing happens: Python's line editor misses a Ctrl-C that arrives between its
        prompt and its wait for input. A second Ctrl-C too soon would end the chat."""
        nonlocal output
        os.write(ours, key)
        while wanted not in output:
            if select.select([ours], [], [], 3.0)[0]:
                output += os.read(ours, 4096)
            else:
                os.write(ours, key)
        output = output.partition(wanted)[2]

    try:
        read_until(b"> ")
        read_until(b"Ctrl-D ends the chat", key=b"\x03")
        read_until(b"> ")
        os.write(ours, b"Hello\n")
        read_until(b"Hello")
        while len(output) < 200:  # it is answering
            output += os.read(ours, 4096)
        read_until(b"\n> ", key=b"\x03")
        os.write(ours, b"\x04")
        assert done.wait(200) == 0
    finally:
        done.kill()
        done.wait()
        os.close(ours)


# --- serve


@contextmanager
def server(run: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], HTTPConnection]]:
    words = [sys.executable, "-m", "anarchobot", "serve", "--checkpoint", str(run), "--port", "0", "--json", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "ANARCHOBOT_API_KEY"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            started = json.loads(process.stdout.readline())
            assert started["model"] == "chat"
            address = urlsplit(started["url"])
            assert address.port is not None
            yield process, HTTPConnection(address.hostname or "", address.port, timeout=100)
        finally:
            process.kill()


def test_ctrl_c_ends_active_requests(run: Path) -> None:
    """A long answer ends with an error event; then the program exits as after Ctrl-C."""
    with server(run, "--max-tokens", "90000") as (process, connection):
        ask = {"model": "chat", "prompt": "Hello", "stream": True, "temperature": 0, "max_tokens": 90_000}
        connection.request("POST", "/v1/completions", json.dumps(ask))
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)
        *_, last = response.read().decode().strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
        assert process.wait(100) == 130
        assert process.stderr is not None
        *_, request, end = process.stderr.read().splitlines()
        assert "POST /v1/completions 200" in request and "Hello" not in request
        assert end == "anarchobot: stopped"
        connection.close()


def test_an_exported_model_a_key_from_a_file_and_settings(run: Path, tmp_path: Path) -> None:
    exported = tmp_path / "chat"
    assert main(["export", "--checkpoint", str(run), "--to", "hf", "--output", str(exported), "--quiet"]) == 0
    (tmp_path / "key").write_text("sesame\n")
    settings = ("--allow-host", "x", "generation.method=greedy", "generation.max_new_tokens=3")
    flags = ("--api-key-file", str(tmp_path / "key"), "--host", "0.0.0.0", "--log-prompts", *settings)
    with server(exported, *flags) as (process, connection):
        connection = HTTPConnection("127.0.0.1", connection.port, timeout=100)
        for headers, expected in (({}, 401), ({"Authorization": "Bearer sesame"}, 200)):
            connection.request("GET", "/v1/models", headers=headers)
            response = connection.getresponse()
            response.read()
            assert response.status == expected
        model, trained = load_model(exported)
        own = {"prompt": "Hello", "method": "greedy", "max_new_tokens": 3}
        body = json.dumps({"model": "any", "prompt": "Hello"})
        connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer sesame"})
        answer = json.loads(connection.getresponse().read())
        assert answer["choices"][0]["text"] == generate(model, trained.generation.model_copy(update=own))
        assert answer["usage"]["completion_tokens"] == 3
        connection.close()
        process.terminate()
        assert process.wait(100) == -signal.SIGTERM
        assert process.stderr is not None and 'prompt="Hello"' in process.stderr.read()


def error_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["serve", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_serve_errors_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANARCHOBOT_API_KEY", raising=False)
    here = ("--checkpoint", str(run))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in error_of(capsys, *here, "--port", port)
    assert "an API key is required" in error_of(capsys, *here, "--host", "0.0.0.0", "--port", "0")
    assert "an API key is required" in error_of(capsys, *here, "--host", "::", "--port", "0")
    assert "not an address of this machine" in error_of(capsys, *here, "--host", "no.such.name.invalid")
    assert "expected a port" in error_of(capsys, *here, "--port", "65536")
    assert "integer >= 1" in error_of(capsys, *here, "--max-tokens", "0")
    assert "integer >= 0" in error_of(capsys, *here, "--queue", "-1")
    (tmp_path / "empty").write_text("\n")
    assert "not a valid API key" in error_of(capsys, *here, "--api-key-file", str(tmp_path / "empty"))
    assert "No such file" in error_of(capsys, *here, "--api-key-file", str(tmp_path / "none"))
    assert "--allow-host" in error_of(capsys, *here, "--port", "0", "--allow-host", "http://x")
    assert "--allow-origin" in error_of(capsys, *here, "--port", "0", "--allow-origin", "*")
    assert "none" in error_of(capsys, "--checkpoint", str(tmp_path / "none"), "--port", "0")
    free = ("--checkpoint", str(tmp_path / "none"), "--port", "0")  # settings are checked before the model is loaded
    assert "generation.top_k" in error_of(capsys, *free, "generation.top_k=x")
    for word in ("generation.seed=1", "generation.prompt=x", "train.lr=1"):
        assert f"'{word}'" in error_of(capsys, *free, word)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "uvicorn", None)
        patch.delitem(sys.modules, "anarchobot.serving.server", raising=False)
        assert "pip install 'anarchobot[serve]'" in error_of(capsys, *here)
    monkeypatch.setenv("ANARCHOBOT_API_KEY", "")
    assert "ANARCHOBOT_API_KEY" in error_of(capsys, *here)


def test_the_documented_examples_run(run: Path, tmp_path: Path) -> None:
    """The shell and Python examples of docs/serving.md, with another port."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    with server(run) as (process, connection):
        address = f"127.0.0.1:{connection.port}"
        (shell,) = [b.partition("```")[0] for b in page.split("```sh\n")[1:] if "curl" in b]
        done = subprocess.run(["sh", "-ec", shell.replace("127.0.0.1:8080", address)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert '"text_completion"' in done.stdout and "data: [DONE]" in done.stdout
        examples = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
        for package, example in zip(("openai", "anthropic"), examples, strict=True):
            assert f"from {package} import " in example
            if find_spec(package):
                (tmp_path / "example.py").write_text(example.replace("127.0.0.1:8080", address))
                done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130  # without active requests, and without an abort by MLX
    lines = [line for line in page.splitlines() if line.startswith("anarchobot serve")]
    assert len(lines) == 5
    for line in lines:
        assert parse(build_parser(), shlex.split(line)[1:]).checkpoint == "runs/chat"
