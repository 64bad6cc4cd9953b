"""Every documented command means the same in bash and in zsh, the shell of macOS, typed at its prompt.

There, zsh reads no comments, does not split variables, and refuses a pattern such as .[serve] that matches no file.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
PROGRAMS = (
    "anarchobot", "cp", "curl", "make", "mlx.launch", "pip", "pipx", "python", "python3", "uv", ".venv/bin/python",
    "build/datatrove/bin/python",
)  # fmt: skip
STUB = """#!/bin/sh
printf '[%s]' "$0" "$@" >>"$LOG"
echo >>"$LOG"
"""


def commands(page: Path) -> Iterator[str]:
    """Yields fenced shell blocks, indented commands, and commands in the text."""
    text = page.read_text(encoding="utf-8")
    names = "|".join(map(re.escape, PROGRAMS))
    yield from re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from re.findall(rf"^    ((?:{names}) .*)$", text, re.MULTILINE)
    for command in re.findall(rf"`((?:{names}) [^`]*)`", text):
        if " [" not in command:  # a synopsis
            yield " ".join(command.split("\n"))


def test_zsh_reads_documented_commands_as_bash_does(tmp_path: Path) -> None:
    if shutil.which("zsh") is None or shutil.which("bash") is None:
        pytest.skip("zsh is not installed")
    for name in ("page", *PROGRAMS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    script = "".join(
        f"page {page.name}\n" + "".join(f"{command.strip()}\n" for command in commands(page)) for page in PAGES
    )
    calls = {}
    for shell in (("bash", "--norc"), ("zsh", "-f", "-i")):
        log = tmp_path / f"{shell[0]}.log"
        environment = {"PATH": f"{tmp_path}:/bin:/usr/bin", "LOG": str(log), "HOME": str(tmp_path)}
        done = subprocess.run(
            shell, input=script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        calls[shell[0]] = log.read_text().splitlines()
        assert "not found" not in done.stderr, done.stderr
    assert calls["zsh"] == calls["bash"]
    assert len(calls["bash"]) > 100
