"""Hugging Face datasets, with the real package on a local folder in the Hub's layout, offline."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import hub
from anarchobot.data.sources.documents import DocumentCounts, open_source

ROWS = 60


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset with ROWS train rows and 3 test rows."""
    path = tmp_path / "set"
    path.mkdir()
    for split, size in (("train", ROWS), ("test", 3)):
        lines = (json.dumps({"content": f"{split} {i}", "score": i / ROWS}) + "\n" for i in range(size))
        (path / f"{split}.jsonl").write_text("".join(lines))
    return path


def texts(folder: Path, seed: int = 0, **settings: Any) -> list[str]:
    data = DataConfig(cache_dir=str(folder.parent / "cache"), **settings)
    return [row["content"] for row in hub.rows(str(folder), data, seed)]


def in_order(split: str = "train", size: int = ROWS) -> list[str]:
    return [f"{split} {i}" for i in range(size)]


def test_shuffle_buffer(folder: Path) -> None:
    assert texts(folder, shuffle_buffer=0) == in_order()
    shuffled = texts(folder, shuffle_buffer=10)
    assert shuffled != in_order() and sorted(shuffled) == sorted(in_order())
    assert shuffled == texts(folder, shuffle_buffer=10)
    assert shuffled != texts(folder, shuffle_buffer=10, seed=1)
    assert shuffled[0] in in_order()[:10], "a row can't come before it is in the buffer"


def test_without_streaming_the_order_is_kept_and_cache_dir_used(folder: Path) -> None:
    assert texts(folder, streaming=True) and not list((folder.parent / "cache").rglob("*.arrow"))
    assert texts(folder, streaming=False) == in_order()
    assert list((folder.parent / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("streaming", [True, False])
def test_split_and_configuration(folder: Path, streaming: bool) -> None:
    settings: dict[str, Any] = {"streaming": streaming, "shuffle_buffer": 0}
    assert texts(folder, split="test", **settings) == in_order("test", 3)
    assert texts(folder, config="default", **settings) == in_order()
    with pytest.raises(UserError, match=r"can't be read as a Hugging Face dataset \(.*valid"):
        texts(folder, split="valid", **settings)
    with pytest.raises(UserError, match=r"can't be read as a Hugging Face dataset \(.*'english' not found"):
        texts(folder, config="english", **settings)


def test_empty_split_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: datasets.Dataset.from_list([]))
    with pytest.raises(UserError, match="has no rows in split 'train'"):
        texts(folder, streaming=False)


def test_unreachable_dataset_is_a_one_line_error_or_the_fallback() -> None:
    data = DataConfig(dataset="no-such-people/no-such-set")
    with pytest.raises(UserError) as error:
        open_source(data, 0, DocumentCounts())
    assert "'no-such-people/no-such-set' is not a local file" in str(error.value) and "\n" not in str(error.value)
    name, documents = open_source(data.model_copy(update={"fallback": "builtin"}), 0, DocumentCounts())
    assert name == "builtin" and next(documents).text


def test_network_failure_during_streaming_is_a_one_line_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def breaks_off() -> Iterator[dict[str, str]]:
        yield {"content": "one"}
        raise ConnectionError("the line\nis dead")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: breaks_off())
    rows = hub.rows("some/set", DataConfig(shuffle_buffer=0), 0)
    assert next(rows) == {"content": "one"}
    with pytest.raises(UserError, match=r"can't be read as a Hugging Face dataset \(the line is dead\)"):
        next(rows)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets"):
        open_source(DataConfig(dataset="some/set"), 0, DocumentCounts())


def test_rows_become_documents_by_field_and_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    monkeypatch.setattr(hub, "rows", lambda name, data, seed: iter(rows))
    counts = DocumentCounts()
    data = DataConfig(dataset="some/set", text_field="content", score_field="score", score_min=0.5)
    name, documents = open_source(data, 0, counts)
    assert (name, [d.text for d in documents]) == ("some/set", in_order()[ROWS // 2 :])
    assert (counts.read, counts.filtered) == (ROWS, ROWS // 2)
    with pytest.raises(UserError, match=r"some/set: row 0: no field 'text' \(it has content, score\)"):
        next(open_source(DataConfig(dataset="some/set"), 0, DocumentCounts())[1])


def test_datasets_in_shipped_config_comments_are_valid() -> None:
    """A wrong key in a comment would otherwise be found only by the user who uncomments it."""
    lines = (Path(__file__).parents[3] / "configs" / "small.yaml").read_text().splitlines()
    comments = "\n".join(line.strip().removeprefix("#").strip() for line in lines if line.startswith("  #"))
    settings = [DataConfig(**yaml.safe_load(block)) for block in comments.split("\n\n")[1:] if block]
    names = {data.dataset: data.text_field for data in settings if hub.is_hub_name(str(data.dataset))}
    assert names == {
        "HuggingFaceFW/fineweb-edu": "text",
        "HuggingFaceFW/fineweb": "text",
        "allenai/c4": "text",
        "openbmb/Ultra-FineWeb": "content",
        "EleutherAI/the_pile_deduplicated": "text",
    }


def test_is_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    names = {"allenai/c4", "wikitext", "HuggingFaceFW/fineweb-edu", "openbmb/Ultra-FineWeb"}
    paths = {
        "corpus",
        "./data",
        "../data",
        "missing.txt",
        "a/b.jsonl",
        "b.jsonl.gz",
        "b.txt.zst",
        "b.parquet",
        "a/b/c",
        "/abs/path",
        "*.txt",
        "a b",
    }
    assert {name for name in names | paths if hub.is_hub_name(name)} == names
