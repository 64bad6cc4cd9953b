"""Import rules: a room imports only from floors below its own; no import cycles; `--help` imports little."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "anarchobot"
FLOORS = {
    "config": 1, "numerics": 1, "storage": 1,
    "tokenizers": 2, "model": 2, "optim": 2,
    "data": 3, "runs": 3, "system": 3,
    "training": 4, "exchange": 4, "knowledge": 4, "reporting": 4, "vocab": 4,
    "torch_backend": 5, "inference": 5,
    "evaluation": 6, "serving": 6,
    "tasks": 7,
    "preflight": 8,
    "cli": 9,
}  # fmt: skip
NUMPY_ONLY = ("config", "tokenizers", "data", "storage", "runs", "exchange", "knowledge", "vocab", "reporting")


# Every file of a room, by its path inside the package, which is also its name in test ids: stems are not unique.
FILES = {file.relative_to(PACKAGE).as_posix(): file for file in sorted(PACKAGE.rglob("*.py")) if file.parent != PACKAGE}


def room_of(path: str) -> str:
    return path.split("/")[0]


def imports(file: Path, type_checking: bool = True) -> Iterator[str]:
    """Yields every module that a file imports, also inside functions and, by default, under TYPE_CHECKING."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if not type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"  # the rules below would not see it
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES)
def test_rooms_import_only_from_floors_below(path: str) -> None:
    room = room_of(path)
    for module in imports(FILES[path]):
        if module.startswith("anarchobot.") and (other := module.split(".")[1]) in FLOORS and other != room:
            assert FLOORS[other] < FLOORS[room], f"{path} imports {module}"
        if room in NUMPY_ONLY:
            assert module.split(".")[0] not in ("mlx", "torch"), f"{path} imports {module}"


def test_no_import_cycles_between_files() -> None:
    """Imports inside functions count: they hide a cycle but do not remove it."""
    names = {"anarchobot." + path.removesuffix(".py").replace("/", "."): file for path, file in FILES.items()}
    graph = {name: set(imports(file, type_checking=False)) & set(names) for name, file in names.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_file_names_are_specific() -> None:
    for path, file in FILES.items():
        assert file.stem not in ("utils", "util", "helpers", "common", "misc", "base"), path


@pytest.mark.parametrize("words", [["-c", "import anarchobot"], ["-m", "anarchobot", "--help"]], ids=["import", "help"])
def test_help_imports_no_heavy_packages(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True)
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert not loaded & {"mlx", "mlx_lm", "torch", "transformers", "numpy", "pydantic"}


def test_no_test_replaces_the_clock_of_the_process() -> None:
    """Event loops of servers that live in the same process would then sleep for hours: replace a module's `time`."""
    replaced = re.compile(r"setattr\(\s*((\w+\.)*time,|[\"']time\.)")
    for file in Path(__file__).parent.rglob("*.py"):
        assert not replaced.search(file.read_text(encoding="utf-8")), file


def test_durations_are_measured_with_a_clock_that_stops_while_the_machine_sleeps() -> None:
    """`time.time` goes on during sleep, and jumps when the clock is set: it only dates what is logged."""
    dated = {"knowledge/knowledge_base.py", "reporting/monitor.py", "runs/event_file.py", "runs/metrics_log.py"}
    dated |= {"runs/trackers.py", "serving/app.py", "serving/responses.py"}
    used = {path for path, file in FILES.items() if re.search(r"\btime\.time\(|\bdatetime\.now\(", file.read_text())}
    assert used - dated == {"tokenizers/chat_template.py"}  # the date in a prompt
