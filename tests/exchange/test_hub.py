"""Models by their names on the Hub, with the real huggingface_hub and a server on loopback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.exchange import safetensors_file
from anarchobot.exchange.exporting import export
from anarchobot.exchange.hub import model_name, pinned_name, reason, repo_name
from anarchobot.runs import checkpoint
from tests.exchange.fake_hub import TOKEN, FakeHub, serve_hub
from tests.exchange.random_run import make_run, random_parameters

# Runs commands, each as a new process would: huggingface_hub reads HF_ENDPOINT when it is imported.
WORKER = """
import contextlib, io, json, os, sys
from huggingface_hub import constants
from anarchobot.cli.main import main
from anarchobot.exchange import hub, pretrained
constants.DOWNLOAD_CHUNK_SIZE = 4096  # not 10 MiB: what a broken transfer keeps
for line in sys.stdin:
    argv, env = json.loads(line)
    os.environ.update(env)
    hub._snapshot.cache_clear()
    pretrained.load_pretrained.cache_clear()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(argv)
    print(json.dumps([code, output.getvalue()]), flush=True)
"""
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


class Worker:
    """A process that runs commands in the folder `cwd` with the given huggingface_hub settings."""

    def __init__(self, cwd: Path, **env: str) -> None:
        self.cwd = cwd
        private = re.compile(r"HF_|HUGGING|.*_proxy$", re.IGNORECASE)  # the developer's own settings
        self.env = {name: value for name, value in os.environ.items() if not private.match(name)} | env
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd,
            env=self.env,
        )  # fmt: skip

    def run(self, *argv: str, **env: str) -> tuple[int, str]:
        """Returns the exit code and the output."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([argv, env]) + "\n")
        self.process.stdin.flush()
        code, output = json.loads(self.process.stdout.readline())
        return code, output

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serve_hub() as served:
        yield served


@pytest.fixture(scope="module")
def online(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    cwd = tmp_path_factory.mktemp("cwd")
    (cwd / "runs" / "small").mkdir(parents=True)
    with Worker(cwd, HF_ENDPOINT=hub.url, HF_HOME=str(cwd / "hf")) as worker:
        yield worker


@pytest.fixture(scope="module")
def model(tokenizers_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with weights in two files, and copies of them in other formats that are not needed."""
    folder = tmp_path_factory.mktemp("hub")
    run = make_run(folder / "run", tokenizers_folder / "bpe" / "tokenizer.model")
    export(run, "hf", folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    weights = random_parameters(checkpoint.find(run).config.model)
    names = list(weights)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        safetensors_file.write(folder / "model" / file, {name: weights[name] for name in part}, "float32", {})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model" / "model-fp16").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_tiny.py", "model-fp16/model.safetensors"):
        (folder / "model" / name).write_bytes(b"not needed")
    return folder / "model"


def parameters_of(model: Path) -> dict[str, Any]:
    return random_parameters(checkpoint.find(model.parent / "run").config.model)


def assert_imported(run: Path, model: Path) -> None:
    with np.load(checkpoint.find(run).folder / "model.npz") as arrays:
        expected = parameters_of(model)
        assert set(expected) == set(arrays)
        assert all(np.array_equal(arrays[name], array) for name, array in expected.items())


def test_only_needed_files_are_downloaded_and_only_once(hub: FakeHub, online: Worker, model: Path) -> None:
    commit = hub.add("acme/tiny", model)
    assert online.run("import", "acme/tiny", "--output", "imported")[0] == 0
    unneeded = {"pytorch_model.bin", "consolidated.safetensors", "modeling_tiny.py", "model-fp16"}
    assert hub.downloads("acme/tiny") == sorted({file.name for file in model.iterdir()} - unneeded)
    assert_imported(online.cwd / "imported", model)
    assert checkpoint.find(online.cwd / "imported").state["imported"] == f"acme/tiny@{commit}"
    # Again: the branch is looked up, and nothing is downloaded.
    hub.requests.clear()
    assert online.run("import", "acme/tiny@main", "--output", "main")[0] == 0
    assert [request for request in hub.requests if "acme" in request] == ["GET /api/models/acme/tiny/revision/main"]
    # A commit that is in the cache needs no request.
    hub.requests.clear()
    assert online.run("import", f"acme/tiny@{commit}", "--output", "again")[0] == 0
    assert not [request for request in hub.requests if "acme" in request]


def test_a_download_is_announced_in_one_line(hub: FakeHub, online: Worker, model: Path) -> None:
    """However long the name is."""
    name = f"acme/{'-'.join(['long'] * 18)}"
    commit = hub.add(name, model)
    code, output = online.run("import", name, "--output", "long", COLUMNS="80")
    assert code == 0 and re.search(rf"^downloading {name}@{commit} \([\d.]+ .?B\)$", output, re.MULTILINE), output


def test_the_cache_is_used_without_a_connection(hub: FakeHub, online: Worker, model: Path) -> None:
    hub.add("acme/cached", model)
    assert online.run("import", "acme/cached", "--output", "cached")[0] == 0
    for output, env, problem in (
        (
            "offline",
            {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"},
            "HF_HUB_OFFLINE is set: unset it to download the model, or give a local folder",
        ),
        ("refused", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hugging Face Hub can't be reached ([Errno "),
    ):
        if output == "refused":  # as if an older version had filled the cache: without a list of the files
            shutil.rmtree(online.cwd / "hf" / "hub" / "models--acme--cached" / "trees")
        with Worker(online.cwd, HF_HOME=online.env["HF_HOME"], **env) as worker:
            assert worker.run("import", "acme/cached", "--output", output)[0] == 0
            assert_imported(online.cwd / output, model)
            code, message = worker.run("import", "acme/other", "--output", "x")
            assert code == 2 and message.count("\n") == 1
            assert f"acme/other: no such folder, not fully in the Hub's cache, and {problem}" in message
            assert message.endswith(", or give a local folder\n")


def test_errors_are_one_line_that_says_what_to_do(hub: FakeHub, online: Worker, model: Path, tmp_path: Path) -> None:
    hub.add("acme/gated", model, gated=True)
    hub.add("acme/huge", model, huge=True)
    hub.add("acme/tagged", model)
    (online.cwd / "runs" / "notes" / "chat").mkdir(parents=True)
    for kind, name in (("pickles", "pytorch_model.bin"), ("gguf", "model-Q4_K_M.gguf"), ("empty", "README.md")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes(b"x")
        hub.add(f"acme/{kind}", tmp_path / kind)
    for name, problem in (
        ("acme/nothing", "no such folder, and no such model on the Hugging Face Hub: check the name; for a private"),
        ("acme/gated", "accept the terms at https://huggingface.co/acme/gated, and log in with `hf auth login`"),
        ("acme/huge", "2.0 EB to download, but only "),
        ("acme/tagged@v9", "acme/tagged@v9: the model has no such revision: expected a branch, a tag or a commit"),
        (f"acme/tagged@{40 * '0'}", "the model has no such revision"),
        ("acme/pickles", "the repository has only pytorch_model.bin: expected model*.safetensors"),
        ("acme/gguf", "the repository has only model-Q4_K_M.gguf: expected model*.safetensors"),
        ("acme/empty", "the repository has no weights at all"),
        ("acme/not--valid", "acme/not--valid: no such folder, and not a valid name on the Hugging Face Hub"),
        ("runs/smal", "runs/smal: no such folder; did you mean 'runs/small'?"),
        ("notes/chat", "notes/chat: no such folder; did you mean 'runs/notes/chat'?"),
        ("runs/qqqq", "runs/qqqq: no such folder: expected the folder of a run, model or adapter, or a name on the"),
        ("tiny", "or a name on the Hugging Face Hub (ORG/NAME)"),
        ("a/b/c", "or a name on the Hugging Face Hub (ORG/NAME)"),
    ):
        hub.requests.clear()
        code, output = online.run("import", name, "--output", "x")
        assert code == 2 and output.count("\n") == 1 and problem in output, output
        assert bool(hub.requests) == ("acme" in name and "--" not in name)
    for status, message, problem in (
        (
            401,
            "Invalid credentials in Authorization header",
            "(HTTP 401 Invalid credentials in Authorization header): check the token",
        ),
        (503, "maintenance", "not fully in the Hub's cache, and the Hugging Face Hub can't be reached (HTTP 503 maint"),
    ):
        hub.refusal = (status, message)
        code, output = online.run("import", "acme/refused", "--output", "x")
        hub.refusal = None
        assert code == 2 and output.count("\n") == 1 and problem in output, output
    assert not (online.cwd / "x").exists()


def test_the_token_opens_gated_models_and_is_written_nowhere(hub: FakeHub, online: Worker, model: Path) -> None:
    hub.add("acme/terms", model, gated=True)
    code, output = online.run("import", "acme/terms", "--output", "terms", HF_TOKEN=TOKEN)
    assert code == 0 and TOKEN not in output
    hub.repos["acme/terms"].gated = False
    assert_imported(online.cwd / "terms", model)
    assert not [file for file in online.cwd.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    online.run("import", "acme/nothing", "--output", "x", HF_TOKEN="")


def test_a_broken_transfer_continues_where_it_stopped(hub: FakeHub, online: Worker, model: Path) -> None:
    hub.add("acme/flaky", model)
    hub.broken = SHARDS[1]
    assert online.run("import", "acme/flaky", "--output", "flaky")[0] == 0
    (resumed,) = hub.ranges
    assert 0 < int(resumed.removeprefix("bytes=").rstrip("-")) <= (model / SHARDS[1]).stat().st_size // 2
    assert_imported(online.cwd / "flaky", model)


def test_ctrl_c_stops_a_download_and_the_next_run_finishes_it(hub: FakeHub, online: Worker, model: Path) -> None:
    hub.add("acme/slow", model)
    hub.broken, hub.stall = SHARDS[1], True
    command = [sys.executable, "-m", "anarchobot", "import", "acme/slow", "--output", "slow"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=online.cwd, env=online.env) as process:
        assert hub.stalled.wait(60)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]  # while the server still waits
    hub.resume.set()
    assert process.returncode == 130 and errors.endswith("anarchobot: stopped\n")
    hub.requests.clear()
    assert online.run("import", "acme/slow", "--output", "slow")[0] == 0
    assert hub.downloads("acme/slow") == [SHARDS[1]]
    assert_imported(online.cwd / "slow", model)


def test_a_run_keeps_the_commit_that_it_started_from(hub: FakeHub, online: Worker, model: Path, tmp_path: Path) -> None:
    old = hub.add("acme/base", model)
    row = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the mat"}]}
    (online.cwd / "rows.jsonl").write_text(json.dumps(row) + "\n")
    settings = ["data.seq_len=32", "data.val_fraction=0", "train.warmup_steps=0", "lora.r=4", "train.save_dir=runs/sft"]
    tune = ["--model", "acme/base", "--dataset", "rows.jsonl", *settings]
    (online.cwd / "empty.yaml").write_text("{}")
    code, output = online.run("sft", "empty.yaml", *tune, "train.total_steps=1")
    assert code == 0 and f"acme/base@{old}: " in output
    run = online.cwd / "runs" / "sft"
    assert f"init_from: acme/base@{old}\n" in (run / "config.yaml").read_text()
    assert json.loads((run / "adapters" / "adapter_config.json").read_text())["model"] == "acme/base"
    # The branch moves to other weights.
    shutil.copytree(model, tmp_path / "new")
    (tmp_path / "new" / SHARDS[1]).write_bytes((model / SHARDS[1]).read_bytes()[:-64] + bytes(64))
    new = hub.move_main("acme/base", tmp_path / "new")
    code, output = online.run("sft", "empty.yaml", *tune, "train.total_steps=2", "--resume-from", "auto")
    assert code == 2 and output.endswith(
        f"this run was started with different weights from those in acme/base@{new}: set train.init_from to the "
        f"original weights (acme/base@{old}), or start a new run\n"
    )
    config = str(run / "config.yaml")
    code, output = online.run("sft", config, "train.total_steps=2", "--resume-from", "auto")
    assert code == 0 and "step 2, " in output
    # Adapters have names too.
    names = [f"acme/base@{old}", f"acme/adapters@{hub.add('acme/adapters', run / 'adapters')}"]
    assert online.run("fuse", "--model", names[0], "--adapter", "acme/adapters", "--output", "fused")[0] == 0
    assert checkpoint.find(online.cwd / "fused").state["fused"] == names


def test_names_of_folders_in_the_cache(tmp_path: Path) -> None:
    folder = Path("/home/u/hub/models--acme--tiny-1b/snapshots/0123abc")
    assert (model_name(folder), repo_name(folder)) == ("acme/tiny-1b@0123abc", "acme/tiny-1b")
    for path in (Path("runs/x@y"), Path("x"), Path("snapshots/x"), Path("/")):
        assert model_name(path) == repo_name(path) == str(path)
    assert pinned_name(str(tmp_path)) == str(tmp_path)


def testreasons_do_not_contain_signed_urls() -> None:
    assert reason(OSError("no route to\nhttps://cdn.hf.co/a?signature=0123 now")) == "no route to URL now"
    assert reason(TimeoutError()) == "TimeoutError"
