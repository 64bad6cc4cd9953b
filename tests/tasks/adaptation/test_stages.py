"""Stages: skipped while their record holds, tried again, gone on with."""

from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.tasks.adaptation.stages import Stages


class Work:
    """Fails so many times with `error`, then writes a file; says what it found in its folder each time."""

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
def told() -> list[Any]:
    return []


def stages(root: Path, told: list[Any], retries: int = 3) -> Stages:
    return Stages(root, retries, 2.5, told.append, sleep=told.append)


def run(root: Path, told: list[Any], work: Work, retries: int = 3, **key: Any) -> Any:
    return stages(root, told, retries).run("one", work, **({"settings": {"a": 1}, "inputs": {"x": "d"}} | key))


def test_a_stage_that_fails_twice_and_then_works(tmp_path: Path, told: list[Any]) -> None:
    work = Work(2)
    done = run(tmp_path, told, work)
    assert work.found == [[], ["half"], ["half"]]
    assert told[:4] == [
        "one: OSError: the disk is gone: again in 2.5 s (try 2 of 4)", 2.5,
        "one: OSError: the disk is gone: again in 2.5 s (try 3 of 4)", 2.5,
    ]  # fmt: skip
    assert done.notes == {"answer": 42}
    assert done.record["settings"] == {"a": 1}
    assert done.record["inputs"] == {"x": "d"}
    assert done.record["seconds"] >= 0


def test_it_is_not_tried_more_often_than_asked_for(tmp_path: Path, told: list[Any]) -> None:
    work = Work(9)
    with pytest.raises(OSError, match="the disk"):
        run(tmp_path, told, work, retries=2)
    assert len(work.found) == 3


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_a_mistake_and_ctrl_c_are_not_tried_again(error: type[BaseException], tmp_path: Path, told: list[Any]) -> None:
    work = Work(1, error)
    with pytest.raises(error):
        run(tmp_path, told, work)
    assert len(work.found) == 1


def test_it_is_skipped_while_its_record_holds(tmp_path: Path, told: list[Any]) -> None:
    first = run(tmp_path, told, Work())
    work = Work()
    assert run(tmp_path, told, work).record == first.record
    assert work.found == []
    assert "done before" in told[-1]
    (tmp_path / "one" / "result").write_text("damaged")
    assert run(tmp_path, told, work).digest == first.digest
    record = tmp_path / "records" / "one.json"
    record.write_text(record.read_text().replace("42", "43"))
    run(tmp_path, told, work)
    assert len(work.found) == 2


def test_what_was_stopped_is_gone_on_with_unless_something_changed(tmp_path: Path, told: list[Any]) -> None:
    stopped = Work(1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, told, stopped)
    again = Work()
    run(tmp_path, told, again)
    assert again.found == [["half"]]
    other = Work()
    run(tmp_path, told, other, settings={"a": 2})
    run(tmp_path, told, other, settings={"a": 2}, inputs={"x": "e"})
    assert other.found == [[], []]
    assert [line for line in told if "anew" in line] == [
        "one: anew, for a was 1, is now 2",
        "one: anew, for what it is made from has changed",
    ]


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path, told: list[Any]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="one: is there, and no stage has made it: choose another folder"):
        run(tmp_path, told, Work())
    assert (tmp_path / "one" / "thesis.txt").read_text() == "mine"
    (tmp_path / "one" / "thesis.txt").unlink()
    assert run(tmp_path, told, Work()).notes == {"answer": 42}  # an empty one may be what a kill has left


def test_what_a_kill_left_beside_a_folder_goes_away(tmp_path: Path, told: list[Any]) -> None:
    (tmp_path / ".one.77.tmp").mkdir()
    (tmp_path / ".two.77.tmp").mkdir()
    run(tmp_path, told, Work())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".two.77.tmp", "one", "records"]
