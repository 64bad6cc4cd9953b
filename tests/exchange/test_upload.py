"""`export --push`, with the real huggingface_hub and a server on loopback."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from anarchobot.config.errors import UserError
from anarchobot.exchange import upload
from anarchobot.exchange.base_model import BaseModel, find_base_model
from anarchobot.exchange.exporting import export
from anarchobot.exchange.importing import import_model
from anarchobot.runs import checkpoint
from anarchobot.tokenizers.chat_template import PLAIN
from tests.exchange.fake_hub import TOKEN, FakeHub, serve_hub
from tests.exchange.random_run import make_run
from tests.exchange.test_hub import Worker

CARD = "---\nlibrary_name: transformers\nlicense: other\nlicense_name: 'tiny terms'\ntags:\n- a\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serve_hub() as served:
        yield served


@pytest.fixture(scope="module")
def worker(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    cwd = tmp_path_factory.mktemp("cwd")
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cwd / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    with Worker(cwd, **env) as running:
        yield running


@pytest.fixture(scope="module")
def run(worker: Worker, tokenizers_folder: Path) -> Path:
    return make_run(worker.cwd / "notes", tokenizers_folder / "bpe" / "tokenizer.model", d_model=64, n_layers=1)


def uploaded(hub: FakeHub, name: str) -> Path:
    repo = hub.repos[name]
    return repo.commits[repo.revisions["main"]]


def test_a_private_model_with_all_files_of_the_folder(hub: FakeHub, worker: Worker, run: Path) -> None:
    command = ["export", "--checkpoint", str(run), "--to", "mlx", "--bits", "4", "--output"]
    code, output = worker.run(*command, "out", "--push", "me/notes")
    assert code == 0 and output.endswith(f"uploaded to {hub.url}/me/notes (private)\n"), output
    assert hub.repos["me/notes"].private and hub.repos["me/notes"].messages[0].startswith("Export by AnarchoBot ")
    found, folder = uploaded(hub, "me/notes"), worker.cwd / "out"
    assert {f.name: f.read_bytes() for f in found.iterdir()} == {f.name: f.read_bytes() for f in folder.iterdir()}
    assert str(worker.cwd) not in (found / "README.md").read_text() and TOKEN not in output
    # Downloaded again, it is the same model.
    assert worker.run("import", "me/notes", "--output", "again")[0] == 0
    assert checkpoint.find(worker.cwd / "again").state["imported"].startswith("me/notes@")
    # A second upload is another commit of the same model; a public model is one only if that was asked for.
    code, output = worker.run(*command, "out2", "--push", "me/notes", "--json", "--quiet")
    assert code == 0 and json.loads(output)["pushed"] == f"{hub.url}/me/notes"
    assert len(hub.repos["me/notes"].messages) == 2
    code, output = worker.run(*command, "out3", "--push", "me/open", "--public")
    assert code == 0 and not hub.repos["me/open"].private and output.endswith("/me/open (public)\n")
    code, output = worker.run(*command, "out4", "--push", "me/open")
    assert code == 2 and output.endswith(
        "me/open: not uploaded: this model is public: pass --public, or choose another name\n"
    )
    assert len(hub.repos["me/open"].messages) == 1


def test_errors_are_one_line(hub: FakeHub, worker: Worker, run: Path) -> None:
    command = ["export", "--checkpoint", str(run), "--to", "hf", "--output", "x"]
    for words, env, problem in (
        (["--push", "notes"], {}, "argument --push: expected a name on the Hugging Face Hub, ORG/NAME"),
        (["--push", "me/no--tes"], {}, "argument --push: expected a name on the Hugging Face Hub, ORG/NAME"),
        (["--public"], {}, "argument --public: only with --push"),
        (
            ["--push", "me/x"],
            {"HF_TOKEN": "hf_wrong"},
            "argument --push: can't log in to the Hugging Face Hub (HTTP 401",
        ),
        (["--push", "me/x"], {"HF_TOKEN": ""}, "argument --push: log in with `hf auth login`, or set HF_TOKEN"),
    ):
        code, output = worker.run(*command, *words, **{"HF_TOKEN": TOKEN, **env})
        assert code == 2 and output.count("\n") == 1 and problem in output, output
        assert not (worker.cwd / "x").exists()  # before anything is exported
    hub.refusal, hub.refused = (403, "no rights"), "/api/repos/create"
    code, output = worker.run(*command, "--push", "them/x", HF_TOKEN=TOKEN)
    hub.refusal, hub.refused = None, ".*"
    assert code == 2 and len(output.splitlines()) == 2 and (worker.cwd / "x").is_dir()  # the result, and the error
    assert "x: can't be uploaded to them/x on the Hugging Face Hub (HTTP 403 no rights): check the token's" in output


def test_the_card_has_no_paths_and_the_base_models_name_and_license(hub: FakeHub, worker: Worker, run: Path) -> None:
    """Of a run that was fine-tuned from an import of a model on the Hub."""
    export(run, "hf", worker.cwd / "base")
    (worker.cwd / "base" / "README.md").write_text(CARD)
    hub.add("acme/tiny", worker.cwd / "base")
    assert worker.run("import", "acme/tiny", "--output", "imported")[0] == 0
    row = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the mat"}]}
    (worker.cwd / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (worker.cwd / "empty.yaml").write_text("{}")
    settings = ["data.seq_len=32", "data.val_fraction=0", "train.warmup_steps=0", "train.total_steps=1"]
    rows, tuned = worker.cwd / "rows.jsonl", worker.cwd / "runs" / "tuned"
    words = ["--model", str(worker.cwd / "imported"), "--dataset", str(rows), *settings, f"train.save_dir={tuned}"]
    assert worker.run("sft", "empty.yaml", *words)[0] == 0
    code, output = worker.run("export", "--checkpoint", str(tuned), "--to", "hf", "--output", "t", "--push", "me/tuned")
    assert code == 0, output
    text = (uploaded(hub, "me/tuned") / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert {key: front[key] for key in ("base_model", "license", "license_name")} == {
        "base_model": "acme/tiny", "license": "other", "license_name": "tiny terms"
    }  # fmt: skip
    assert str(worker.cwd) not in text and "| initialized from | `imported` |" in text
    assert "| training data | `rows.jsonl` |" in text and "save_dir: tuned" in text


def test_a_path_of_the_machine_never_leaves(hub: FakeHub, worker: Worker, run: Path) -> None:
    shutil.copytree(run, worker.cwd / "telling")
    (worker.cwd / "telling" / "chat_template.jinja").write_text(PLAIN + "{# /home/jane/x #}")
    hub.requests.clear()
    command = ["export", "--checkpoint", "telling", "--to", "hf", "--output", "told", "--push", "me/told"]
    code, output = worker.run(*command)
    problem = "told/chat_template.jinja:1: not uploaded: it names a path of this machine, /home/jane/x: remove it, and "
    assert code == 2 and problem in output.splitlines()[-1], output
    assert hub.requests == ["GET /api/whoami-v2"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("README.md", "I trained it in /Users/jane/models/notes."),
        ("README.md", "save_dir: /home/jane/runs"),
        ("Modelfile", "ADAPTER /Volumes/disk/adapter.gguf"),
        ("config.json", '{"_name_or_path": "/root/models/x"}'),
        ("chat_template.jinja", "{# HOME/secret #}"),
    ],
)
def test_paths_of_the_machine_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, line: str) -> None:
    monkeypatch.setenv("HOME", "/work/jane")
    (tmp_path / file).write_text("first line\n" + line.replace("HOME", "/work/jane") + "\n")
    with pytest.raises(
        UserError, match=rf"{file}:2: not uploaded: it names a path of this machine, /\w+/\S+: remove it"
    ):
        upload.check_paths(tmp_path)


def test_other_slashes_are_no_paths_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "https://huggingface.co/root/x a/home/b </tmp/> runs/home/x /v1/chat ~/models\n"
    )
    (tmp_path / "tokenizer.json").write_text('{"vocab": {"/home/x": 1}}')
    upload.check_paths(tmp_path)


def test_base_models(tmp_path: Path, run: Path) -> None:
    export(run, "hf", tmp_path / "hf")
    assert find_base_model(checkpoint.find(run)) is None
    import_model(tmp_path / "hf", tmp_path / "a")
    assert find_base_model(checkpoint.find(tmp_path / "a")) == BaseModel(None, {})
    (tmp_path / "hf" / "README.md").write_text("---\r\nlicense: apache-2.0\r\nlicense_link: [a]\r\n---\r\nText")
    assert find_base_model(checkpoint.find(tmp_path / "a")) == BaseModel(None, {"license": "apache-2.0"})
    (tmp_path / "hf").rename(tmp_path / "gone")
    assert find_base_model(checkpoint.find(tmp_path / "a")) is None
    snapshot = tmp_path / "models--acme--base" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "gone").rename(snapshot)
    import_model(snapshot, tmp_path / "b")  # recorded as acme/base@0123, which is in no cache
    assert find_base_model(checkpoint.find(tmp_path / "b")) == BaseModel("acme/base", {})
    arrays = {f"params/{name}": array for name, array in np.load(run / "step_00000040" / "model.npz").items()}
    state = checkpoint.find(run).state
    for name, origin in (("c", tmp_path / "d"), ("d", tmp_path / "c")):  # a circle
        config = {**state["config"], "train": {**state["config"]["train"], "init_from": str(origin)}}
        checkpoint.save(tmp_path / name, 1, arrays, {"config": config})
    assert find_base_model(checkpoint.find(tmp_path / "c")) is None
