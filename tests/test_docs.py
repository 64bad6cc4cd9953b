"""The documentation is correct: commands run, links exist, dependency list and size table match."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from math import prod
from pathlib import Path

import pytest

from anarchobot.cli.main import main
from anarchobot.model.parameters import parameter_count, parameter_shapes
from anarchobot.optim.param_groups import state_shapes
from anarchobot.tasks.pretrain import pretrain
from tests.tiny import loaded

ROOT = Path(__file__).parents[1]


SHORTER = {
    r"vocab_size: \d+": "vocab_size: 600",
    r"(total_steps|epochs): [\d.]+": "total_steps: 2",
    r"warmup_steps: \d+": "warmup_steps: 1",
    r"d_model: \d+": "d_model: 64",
    r"micro_batch_size: \d+": "micro_batch_size: 2",
}


def shorten(my_yaml: str) -> str:
    for long, short in SHORTER.items():
        my_yaml, found = re.subn(long, short, my_yaml)
        assert found == 1
    return my_yaml


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_documented_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in an empty folder with a user's text; vocabularies and training runs are shortened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    text = (ROOT / page).read_text(encoding="utf-8")
    for my_yaml in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        (tmp_path / "my.yaml").write_text(shorten(my_yaml))
    (tmp_path / "notes.txt").write_text((ROOT / "docs" / "data.md").read_text() + (ROOT / "Makefile").read_text() * 20)
    turns = [{"role": role, "content": "Notes?"} for role in ("user", "assistant")]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9)
    pair = {"prompt": "Notes?", "chosen": "Notes.", "rejected": "No."}
    (tmp_path / "preferences.jsonl").write_text((json.dumps(pair) + "\n") * 9)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("anarchobot ")]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        if words[:2] == ["pretrain", "configs/quickstart.yaml"]:
            words += ["train.total_steps=2", "train.eval_batches=1"]
        if words[0] == "verify":
            words.append("--no-calibration")
        if words[0] in ("sft", "dpo"):  # the small model has a context of 128 tokens
            words += ["train.total_steps=2", "data.val_fraction=0", "data.seq_len=128"]
        if words[0] == "tokenizer" and "--vocab-size" in words:
            words[words.index("--vocab-size") + 1] = "600"  # the text is too short for more
        if "shards/notes" in command and words[0] == "pretrain":
            words.append("model.vocab_size=600")
        monkeypatch.setattr("sys.stdin", io.StringIO("Notes?\n"))  # read by `chat`
        assert main(words) == 0, command
        if words[:2] == ["config", "init"]:
            (tmp_path / "my.yaml").write_text(shorten((tmp_path / "my.yaml").read_text()))


def test_git_ignores_the_files_of_documented_commands() -> None:
    """What a reader brings along, and what the commands write."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    pages = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", *(ROOT / "docs").glob("tutorial-*.md")]
    words = [
        word.rpartition("=")[2]
        for page in pages
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for word in shlex.split(block, comments=True)
    ]
    files = {word for word in words if re.fullmatch(r"[\w-]+\.(yaml|jsonl|html|db|txt)|(runs|shards|exports)/.*", word)}
    assert {"my.yaml", "chats.jsonl", "notes.db", "report.html", "runs/notes"} < files
    done = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True)
    assert files - set(done.stdout.split()) == set()


def test_dependencies_page_lists_exactly_the_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    core, extras = page.split("Extras,")
    named = set(re.findall(r"^\| `([\w-]+)`", core, re.MULTILINE))
    assert named == {re.split(r"[^\w-]", dependency)[0] for dependency in project["dependencies"]}
    assert set(re.findall(r"^\| `([\w-]+)`", extras, re.MULTILINE)) == set(project["optional-dependencies"])


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name)
def test_relative_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_site_has_all_pages_and_builds_without_warnings(tmp_path: Path) -> None:
    """Nothing is loaded from another host."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert pages == {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    text = (tmp_path / "site" / "index.html").read_text()
    assert not re.findall(r"(?:src|stylesheet\" href)=\"https?:", text)


def test_size_table_is_correct() -> None:
    """Every shipped configuration, as benchmarks/sizes.py writes it."""
    spec = spec_from_file_location("sizes", ROOT / "benchmarks" / "sizes.py")
    assert spec is not None and spec.loader is not None
    sizes = module_from_spec(spec)
    spec.loader.exec_module(sizes)
    rows = re.findall(
        r"^\| \[(\w+)\]\(../configs/.*?\) \| (.*?) \| (.*?) \| (.*?) \|",
        (ROOT / "docs/recipes.md").read_text(),
        re.MULTILINE,
    )
    assert [name for name, *_ in rows] == list(sizes.NAMES)
    assert set(sizes.NAMES) == {
        path.stem for path in (ROOT / "configs").glob("[!a]*.yaml")
    }  # adapt_*.yaml have no model
    for name, *cells in rows:
        assert cells == sizes.cells(name)


def test_checkpoint_has_the_size_in_the_table(tmp_path: Path, tiny_shards: Path) -> None:
    config = loaded(tmp_path / "config.yaml", tiny_shards, tmp_path / "run", model__d_model=128)
    pretrain(config, show="nothing")
    files = sum((tmp_path / "run" / "step_00000006" / name).stat().st_size for name in ("model.npz", "optimizer.npz"))
    moments = state_shapes(parameter_shapes(config.config.model), config.config.train)
    numbers = parameter_count(config.config.model) + sum(prod(s) for of in moments.values() for s in of.values())
    assert files == pytest.approx(4 * numbers, rel=0.02)
