"""Pipeline stages: cached by their record, retried, resumed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.tasks.adaptation.stages import StageRunner


class Work:
    """Fails `failures` times with `error`, then writes a file. `found` lists the folder at the start of each call."""

    def __init__(self, failures: int = 0, error: type[BaseException] = OSError) -> None:
        self.failures, self.error, self.found = failures, error, list[list[str]]()

    def __call__(self, folder: Path) -> tuple[list[Path], dict[str, Any]]:
        self.found.append(sorted(path.name for path in folder.iterdir()))
        (folder / "half").write_text("half")
        if len(self.found) <= self.failures:
            raise self.error("the disk\nis gone")
        (folder / "result").write_text("result")
        return [folder / "result"], {"answer": 42}


@pytest.fixture
def log() -> list[Any]:
    return []


def run(root: Path, log: list[Any], work: Work, retries: int = 3, **key: Any) -> Any:
    runner = StageRunner(root, retries, 2.5, log.append, sleep=log.append)
    return runner.run("one", work, **({"settings": {"a": 1}, "inputs": {"x": "d"}} | key))


def test_a_failing_stage_is_retried(tmp_path: Path, log: list[Any]) -> None:
    work = Work(2)
    done = run(tmp_path, log, work)
    assert work.found == [[], ["half"], ["half"]]
    assert log[:4] == [
        "one: OSError: the disk is gone: retrying in 2.5 s (attempt 2 of 4)", 2.5,
        "one: OSError: the disk is gone: retrying in 2.5 s (attempt 3 of 4)", 2.5,
    ]  # fmt: skip
    assert done.notes == {"answer": 42}
    assert done.record["settings"] == {"a": 1}
    assert done.record["inputs"] == {"x": "d"}
    assert done.record["seconds"] >= 0


def test_a_stage_that_runs_is_shown(tmp_path: Path, log: list[Any]) -> None:
    @contextmanager
    def busy(name: str) -> Iterator[Callable[[float], None]]:
        log.append(f"{name} begins")
        yield log.append
        log.append(f"{name} ends")

    runner = StageRunner(tmp_path, 0, 0.0, log.append, busy=busy)
    for _ in range(2):
        runner.run("one", Work(), settings={}, inputs={})
    assert log[:2] == ["one begins", "one ends"]
    assert [line.split(":")[0] for line in log[2:]] == ["one", "one"] and "already done" in log[3]


def test_the_number_of_retries_is_limited(tmp_path: Path, log: list[Any]) -> None:
    work = Work(9)
    with pytest.raises(OSError, match="the disk"):
        run(tmp_path, log, work, retries=2)
    assert len(work.found) == 3


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_user_errors_and_ctrl_c_are_not_retried(error: type[BaseException], tmp_path: Path, log: list[Any]) -> None:
    work = Work(1, error)
    with pytest.raises(error):
        run(tmp_path, log, work)
    assert len(work.found) == 1


def test_a_stage_is_skipped_while_its_record_is_valid(tmp_path: Path, log: list[Any]) -> None:
    first = run(tmp_path, log, Work())
    work = Work()
    assert run(tmp_path, log, work).record == first.record
    assert work.found == []
    assert "already done" in log[-1]
    (tmp_path / "one" / "result").write_text("damaged")
    assert run(tmp_path, log, work).digest == first.digest
    record = tmp_path / "records" / "one.json"
    record.write_text(record.read_text().replace("42", "43"))
    run(tmp_path, log, work)
    assert len(work.found) == 2


def test_an_interrupted_stage_is_resumed_unless_something_changed(tmp_path: Path, log: list[Any]) -> None:
    stopped = Work(1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, log, stopped)
    again = Work()
    run(tmp_path, log, again)
    assert again.found == [["half"]]
    other = Work()
    run(tmp_path, log, other, settings={"a": 2})
    run(tmp_path, log, other, settings={"a": 2}, inputs={"x": "e"})
    assert other.found == [[], []]
    assert [line for line in log if "rebuilding" in line] == [
        "one: rebuilding: a changed from 1 to 2",
        "one: rebuilding: inputs changed",
    ]


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path, log: list[Any]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="one: already exists and is not a stage folder: set another"):
        run(tmp_path, log, Work())
    assert (tmp_path / "one" / "thesis.txt").read_text() == "mine"
    (tmp_path / "one" / "thesis.txt").unlink()
    assert run(tmp_path, log, Work()).notes == {"answer": 42}  # an empty one may be left by a kill


def test_temporary_folders_of_a_killed_run_are_removed(tmp_path: Path, log: list[Any]) -> None:
    (tmp_path / ".one.77.tmp").mkdir()
    (tmp_path / ".two.77.tmp").mkdir()
    run(tmp_path, log, Work())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".two.77.tmp", "one", "records"]
