"""Names of files in another Unicode normalization, and several names of one folder."""

import unicodedata
from pathlib import Path

import pytest

from anarchobot.config.loading import load_config
from anarchobot.config.paths import chat_run_of, find_path, is_same_folder, model_name_of

NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("given", "stored"), [(NFC, NFD), (NFD, NFC)])
def test_a_name_in_another_normalization_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, stored: str
) -> None:
    assert unicodedata.normalize("NFC", given) == unicodedata.normalize("NFC", stored) and given != stored
    (tmp_path / stored / "b").mkdir(parents=True)
    (tmp_path / stored / "b" / f"{stored}.txt").write_text("text")
    assert find_path(f"{tmp_path}/{given}/b/{given}.txt") == f"{tmp_path}/{stored}/b/{stored}.txt"
    assert find_path(f"{tmp_path}/{given}/*.txt") == f"{tmp_path}/{stored}/*.txt"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_path(f"{given}/b") == f"{stored}/b"
    assert find_path(f"./{stored}/") == f"./{stored}/"
    assert find_path(f"~/{given}") == f"{tmp_path}/{stored}"
    config = load_config(None, [("data.dataset", f"{given}/b/{given}.txt"), f"train.init_from={given}"]).config
    assert (config.data.dataset, config.train.init_from) == (f"{stored}/b/{stored}.txt", stored)


def test_other_names_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / NFC).touch()
    (tmp_path / NFD).touch()
    for name in (NFC, NFD, "cafe", "CAF\u00c9", "org/name", f"{NFC}\0", f"missing/{NFC}", f"{NFC}/under a file/{NFC}"):
        assert find_path(f"{tmp_path}/{name}") == f"{tmp_path}/{name}"
    (tmp_path / "\u1e69").touch()  # also as s with two marks in either order: neither is the name
    (tmp_path / "s\u0323\u0307").touch()
    assert find_path(f"{tmp_path}/s\u0307\u0323") == f"{tmp_path}/s\u0307\u0323"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/notes", "notes"),
        ("runs/other/chat", "chat"),
        ("runs/notes/chat", "notes"),
        ("runs/notes/chat/best.json", "notes"),
        ("runs/notes/step_00000010", "notes"),
        ("runs/v1.2", "v1.2"),
    ],
)
def test_the_name_of_a_model_is_that_of_its_run(
    path: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/notes").mkdir(parents=True)
    Path("runs/notes/train.json").touch()
    assert model_name_of(path) == name


def test_one_folder_with_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    assert is_same_folder(run, tmp_path / "other" / ".." / "run") and not is_same_folder(run, tmp_path)
    assert not is_same_folder(run, other) and is_same_folder(other, other)
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **k: real(Path(str(self).lower()), **k))  # as on macOS
    assert is_same_folder(tmp_path / "Run", tmp_path / "run")


def test_the_chat_model_of_train_is_found_beside_its_texts(tmp_path: Path) -> None:
    for file in ("notes/train.json", "notes/chat/latest.json", "other/chat/latest.json", "begun/train.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    chat = tmp_path / "notes" / "chat"
    assert chat_run_of(tmp_path / "notes") == chat_run_of(str(tmp_path / "notes" / "best.json")) == chat
    for name in ("other", "begun", "notes/chat", "none"):
        assert chat_run_of(tmp_path / name) is None
