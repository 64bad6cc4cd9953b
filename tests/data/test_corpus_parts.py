"""A corpus pretokenized in parts gives the shards of a single process, byte for byte."""

import gzip
import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from anarchobot.cli.main import main
from anarchobot.config.schema import DataConfig
from anarchobot.data.shard_writer import ShardWriter
from anarchobot.data.shards import TokenStream, first_documents
from anarchobot.data.sources.documents import DocumentCounts, from_files, from_ranges
from anarchobot.data.sources.files import FileRange, split_files
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer

WORDS = ["the", "a", "of", "and", "bees", "dates", "apples", "wings", "water", "stone", "river", "night"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all kinds: rows with distant duplicates and near duplicates, broken rows, empty files, a long text."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(400)]
    texts[300], texts[310] = texts[3], texts[5] + " indeed"
    rows = [json.dumps({"text": text}) for text in texts]
    rows[7], rows[200] = "{broken", json.dumps({"other": 1})
    (folder / "a.jsonl").write_text("\r\n".join(rows[:250]))  # without an end of line at its end
    (folder / "b.txt").write_text(" ".join(rng.choices(WORDS, k=30_000)))  # long: its tail goes to validation
    (folder / "c.jsonl").write_text("\n\n" + "\n".join(rows[250:]) + "\n")
    (folder / "d.txt").write_text("")
    with gzip.open(folder / "e.jsonl.gz", "wt") as file:
        file.write("\n".join([*rows[:20], json.dumps({"text": "new and bees"})]))
    (folder / "f.md").write_text("Wings, at last.")
    (folder / "g.txt").write_text("")
    train_tokenizer(texts, folder.parent / "made", 300)
    return folder


def test_ranges_cover_the_files_in_order(corpus: Path) -> None:
    """For any number of parts, the documents of all ranges are those of the files."""
    paths = sorted(corpus.iterdir())
    for documents in ("file", "lines"):
        data, whole = DataConfig(documents=documents), DocumentCounts()
        wanted = list(from_files([str(corpus)], data, whole))
        for parts in (1, 2, 3, 7, 50, 1000):
            ranges, counts = split_files(paths, parts, data), DocumentCounts()
            found = [d for part in ranges for d in from_ranges(part, [str(corpus)], data, counts)]
            assert found == wanted and len(ranges) == parts
            assert counts.as_manifest() == whole.as_manifest() and counts.empty_files == whole.empty_files == 2


def test_parts_have_similar_sizes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "ten words"}\n' * 1000)
    sizes = [
        sum((file_range.end or 22_000) - file_range.start for file_range in part)
        for part in split_files([tmp_path / "rows.jsonl"], 3, DataConfig())
    ]
    assert sizes == [7333, 7333, 7334]
    assert split_files([tmp_path / "rows.jsonl"], 2, DataConfig())[1] == [FileRange(tmp_path / "rows.jsonl", 11_000)]


@pytest.mark.parametrize("settings", [[], ["data.near_dedup=0.8"], ["data.dedup=false"], ["data.documents=lines"]])
def test_joined_parts_equal_the_shards_of_one_process(corpus: Path, tmp_path: Path, settings: list[str]) -> None:
    def run(*words: str, folder: str = "parts") -> int:
        at = [
            "--input",
            str(corpus),
            "--tokenizer",
            str(corpus.parent / "made.model"),
            "--output",
            str(tmp_path / folder),
        ]
        return main(["pretokenize", *at, "--val-fraction", "0.1", "--quiet", *settings, *words])

    assert run(folder="whole") == 0
    assert run("--part", "1/3") == run("--part", "0/3") == run("--part", "2/3", "--workers", "1") == 0
    assert run("--join", "3") == 0
    whole, parts = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir() if file.name != ".lock"}
        for folder in ("whole", "parts")
    )
    assert whole == parts and {"train_00000.npy", "val_00000.npy", "manifest.json", "progress.json"} <= set(whole)
    assert json.loads(whole["manifest.json"])["counts"]["read"] > 400


def test_processes_and_errors_of_parts(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = str(corpus.parent / "made.model")
    shards = tmp_path / "shards"
    words = ["pretokenize", "--input", str(corpus), "--tokenizer", tokenizer, "--output", str(shards), "--quiet"]
    done = subprocess.run([sys.executable, "-m", "anarchobot", *words, "--processes", "2"], timeout=240)
    assert done.returncode == 0 and (shards / "manifest.json").exists() and not (shards / "parts").exists()

    def error_of(*more: str) -> str:
        assert main([*words, *more]) == 2
        return capsys.readouterr().err.strip()

    words[words.index("--output") + 1] = str(tmp_path / "others")
    assert "2 of 2 parts are missing, the first is 0/2: create it with --part 0/2" in error_of("--join", "2")
    assert main([*words, "--part", "0/2"]) == 0 and main([*words, "--part", "1/2"]) == 0
    message = error_of("--join", "2", "data.clean=true")
    assert "this part was built with different settings: data.clean changed from False to True: rebuild it" in message
    ids = tmp_path / "others" / "parts" / "00001-of-00002" / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-2] + b"\0\0")
    assert f"{ids}: damaged" in error_of("--join", "2")
    assert "expected K/N" in error_of("--part", "2/2")
    (tmp_path / "mixed.yaml").write_text("data: {dataset: [a.txt, b.txt], weights: [1, 2]}")
    mixed = ["pretokenize", str(tmp_path / "mixed.yaml"), "--tokenizer", tokenizer, "--output", str(tmp_path / "m")]
    assert main([*mixed, "--part", "0/2"]) == 2 and "only files can be read in parts" in capsys.readouterr().err


def test_existing_part_is_not_rebuilt(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretokenize", "--input", str(corpus), "--tokenizer", str(corpus.parent / "made.model")]
    words += ["--output", str(tmp_path / "s"), "--part", "0/2", "--json"]
    made = []
    for more in ([], [], ["data.clean=true"]):
        assert main([*words, *more]) == 0
        made.append(json.loads(capsys.readouterr().out)["made"])
    assert made == [True, False, True]


def test_restart_with_processes_and_after_an_interruption(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of an old corpus are never taken for those of the new one, however often --restart is interrupted."""
    shards, tokenizer = tmp_path / "shards", str(corpus.parent / "made.model")
    for name in ("old", "new", "third"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i} bees"}}\n' for i in range(80)))

    def run(name: str, *words: str) -> int:
        inputs = ["--input", str(tmp_path / f"{name}.jsonl"), "--tokenizer", tokenizer, "--output", str(shards)]
        return main(["pretokenize", *inputs, "--val-fraction", "0", "--quiet", *words])

    def first_words() -> set[str]:
        stream, tokens = TokenStream(shards, "train"), load_tokenizer(tokenizer)
        documents = list(first_documents(stream, 100, 1000))
        assert len(documents) == 80
        return {tokens.decode(ids.tolist()).split()[0] for ids in documents}

    def interrupted(name: str, *words: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "add", lambda self, batch: (_ for _ in ()).throw(KeyboardInterrupt))
            assert run(name, *words) == 130

    assert run("old") == 0 and first_words() == {"old"}
    # Interrupted in one process, then continued in several.
    interrupted("new", "--restart")
    assert first_words() == {"old"}, "the old shards stay until the new ones are complete"
    assert run("new", "--processes", "2") == 0 and first_words() == {"new"}
    # Interrupted while joining, then joined again.
    assert run("third", "--part", "0/2") == run("third", "--part", "1/2") == 0
    assert run("third", "--join", "2") == 2
    assert "holds shards built with different settings" in capsys.readouterr().err
    interrupted("third", "--join", "2", "--restart")
    assert first_words() == {"new"} and (shards / "parts").exists()
    assert run("third", "--join", "2") == 0 and first_words() == {"third"}
    # Complete: joining again, or running with --processes, changes nothing.
    before = (shards / "manifest.json").stat().st_mtime_ns
    assert run("third", "--join", "2") == run("third", "--processes", "2") == 0
    assert (shards / "manifest.json").stat().st_mtime_ns == before
    assert run("old", "--processes", "2") == 2
    assert run("old", "--processes", "2", "--restart") == 0 and first_words() == {"old"}


DATATROVE = """
from datatrove.executor import LocalPipelineExecutor
from anarchobot.tasks.pretokenize import PartOfPretokenize

if __name__ == "__main__":
    LocalPipelineExecutor(pipeline=[PartOfPretokenize("my.yaml")], tasks=5, workers=2, logging_dir="logs").run()
"""


@pytest.mark.skipif(find_spec("datatrove") is None, reason="datatrove is not installed")
def test_datatrove_executor_gives_the_same_shards(corpus: Path, tmp_path: Path) -> None:
    text = "data: {{dataset: {}, shard_dir: {}}}\ntrain: {{tokenizer_path: {}}}\n"
    for name in ("my", "one"):
        settings = text.format(corpus, tmp_path / f"{name}-shards", corpus.parent / "made.model")
        (tmp_path / f"{name}.yaml").write_text(settings)
    (tmp_path / "run.py").write_text(DATATROVE)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, env=environment, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert main(["pretokenize", str(tmp_path / "my.yaml"), "--join", "5", "--quiet"]) == 0
    assert main(["pretokenize", str(tmp_path / "one.yaml"), "--quiet"]) == 0
    mine, one = (json.loads((tmp_path / f"{n}-shards" / "manifest.json").read_text()) for n in ("my", "one"))
    assert mine == one  # including the digests of all shards
