"""`anarchobot tokenizer train`, `pretokenize` and `shards`: settings, output, interrupted runs."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.data import document_batches
from anarchobot.tasks import pretokenize
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer

Captured = pytest.CaptureFixture[str]

TEXTS = ["a short one", "another text of some words", *(f"text {i} " + "and more words " * i for i in range(30))]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return str(train_tokenizer(TEXTS, tmp_path / "made", 300)[0])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, TEXTS[0], ""]))
    return path


def words(corpus: Path, tokenizer: str, *more: str) -> list[str]:
    base = ["pretokenize", "--input", str(corpus), "--tokenizer", tokenizer, "--val-fraction", "0"]
    return [*base, "--output", str(corpus.parent / "out"), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_summary_counts_every_document(corpus: Path, tokenizer: str, capsys: Captured) -> None:
    assert main(words(corpus, tokenizer)) == 0
    captured = capsys.readouterr()
    assert "documents: read 34, kept 32, duplicates 1, filtered 1, broken 0" in captured.out
    assert "filtered: blank 1" in captured.out
    assert "\n  tokenizing with " in captured.out and captured.err == ""


@pytest.mark.parametrize(
    ("settings", "kept"),
    [([], [32]), (["data.dedup=false"], [33]), (["data.near_dedup=0.5"], range(3, 32)), (["data.min_chars=12"], [30])],
)
def test_settings_reach_the_shards(
    corpus: Path, tokenizer: str, capsys: Captured, settings: list[str], kept: Sequence[int]
) -> None:
    assert main([*words(corpus, tokenizer, "--json", "--workers", "1"), *settings]) == 0
    captured = capsys.readouterr()
    counts = json.loads(captured.out)["counts"]
    assert captured.err == "" and sum(counts.values()) == 2 * counts["read"] == 68
    assert counts["kept"] in kept


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("reference", "tokenizing with sentencepiece\n"),
        ("fast", "tokenizing with fastokens"),
        ("auto", "tokenizing with sentencepiece (faster than fastokens for less than"),
    ],
)
def test_the_tokenizer_engine_is_selectable(
    corpus: Path, tokenizer: str, capsys: Captured, engine: str, message: str
) -> None:
    assert main([*words(corpus, tokenizer), f"tokenizer.engine={engine}"]) == 0
    assert message in capsys.readouterr().out


def test_several_output_folders_are_an_error(corpus: Path, tokenizer: str, capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"data:\n  dataset: {corpus}\n  shard_dir: [a, b]\n")
    assert main(["pretokenize", str(tmp_path / "c.yaml"), "--tokenizer", tokenizer]) == 2
    where = f"{tmp_path / 'c.yaml'}:3"
    assert capsys.readouterr().err == (
        f"anarchobot: {where}: data.shard_dir: expected one folder to write to: set it with --output DIR\n"
    )


def interrupt(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """Interrupts the run when all but the last text are in shards of about 300 tokens."""
    monkeypatch.setattr(document_batches, "BATCH_CHARS", 1)
    monkeypatch.setattr(pretokenize, "Pretokenizer", partial(pretokenize.Pretokenizer, shard_tokens=300))
    real = document_batches._tokenize

    def stops(batch: document_batches.DocumentBatch, *rest: object) -> document_batches.TokenizedBatch:
        if batch.texts[0] == TEXTS[-1]:
            raise KeyboardInterrupt
        return real(batch, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(document_batches, "_tokenize", stops)
        assert main(command) == 130


def test_an_interrupted_run_is_resumed_or_rejected(
    corpus: Path, tokenizer: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = words(corpus, tokenizer)
    interrupt(monkeypatch, command)
    before = contents(tmp_path / "out")
    assert "progress.json" in before
    capsys.readouterr()
    assert main([*command, "data.min_chars=12"]) == 2
    told = "can't resume the interrupted run: data.min_chars changed from 1 to 12: revert this, or start over with"
    assert capsys.readouterr().err.endswith(f"anarchobot: {tmp_path / 'out'}: {told} --restart\n")
    with open(corpus, "a") as file:
        file.write('{"text": "one more"}\n')
    assert main(command) == 2
    err = capsys.readouterr().err
    assert f"{corpus} changed from " in err and err.endswith("--restart\n")
    assert contents(tmp_path / "out") == before

    assert main([*command, "--restart"]) == 0
    assert "kept 33" in capsys.readouterr().out
    whole = contents(tmp_path / "out")
    interrupt(monkeypatch, [*command, "--restart"])
    capsys.readouterr()
    assert main([*command, "tokenizer.engine=fast"]) == 2  # the cause of the interruption may have been the engine
    assert "tokenised with changed from sentencepiece" in capsys.readouterr().err
    assert main([*command, "--workers", "3", "data.seq_len=7"]) == 0
    assert "resuming: " in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole


def test_shards_info(corpus: Path, tokenizer: str, capsys: Captured, tmp_path: Path) -> None:
    main(words(corpus, tokenizer, "--quiet"))
    assert main(["shards", "info", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "document 1: 'a short one'\n" in out and "document 2: 'another text of some words'\n" in out
    assert "document 3: 'text 0 '\n" in out and "document 4" not in out
    assert main(["shards", "info", "--json", str(tmp_path / "out")]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["counts"]["kept"] == 32 and len(values["shards"]) == 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text()) | {"counts": {}}  # by another program
    manifest.pop("content_sha256")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["shards", "info", str(tmp_path / "out")]) == 0
    lengths = [len(ids) + 1 for ids in load_tokenizer(tokenizer).encode_batch(TEXTS)]
    assert [b["documents"] for b in values["histogram"]] == np.histogram(
        lengths, [*(b["from"] for b in values["histogram"]), 2 * values["histogram"][-1]["from"]]
    )[0].tolist()
    for bucket in values["histogram"]:
        line = next(line for line in out.splitlines() if line.split()[:1] == [f"{bucket['from']:,}"])
        assert line.split()[2:4] == [f"{bucket['to']:,}", f"{bucket['documents']:,}"]
        assert ("#" in line) == (bucket["documents"] > 0)


def test_long_documents_are_shown_by_their_first_200_characters(
    tokenizer: str, capsys: Captured, tmp_path: Path
) -> None:
    """Characters of four tokens each; the limit must not split one."""
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "🙂" * 300}) + "\n")
    main(words(tmp_path / "corpus.jsonl", tokenizer, "--quiet"))
    main(["shards", "info", str(tmp_path / "out")])
    assert f"document 1: '{'🙂' * 200}'\n" in capsys.readouterr().out


def test_shards_verify_names_the_damaged_file(corpus: Path, tokenizer: str, capsys: Captured, tmp_path: Path) -> None:
    main(words(corpus, tokenizer, "--quiet"))
    capsys.readouterr()
    assert main(["shards", "verify", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "train_00000.npy: ok\ntrain_00000.offsets: ok\n"
    path = tmp_path / "out" / "train_00000.offsets"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert main(["shards", "verify", "--json", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["checked"] == 2 and list(json.loads(captured.out)["damaged"]) == [path.name]
    assert captured.err == f"anarchobot: {tmp_path / 'out'}: 1 of 2 files corrupt; run pretokenize again\n"


def test_broken_training_text_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe\n[1\n")
    words = ["tokenizer", "train", "--vocab-size", "300", "--output", str(tmp_path / "tok"), "--input"]
    assert main([*words, str(tmp_path / "bad.jsonl")]) == 2
    err = capsys.readouterr().err
    assert "no text" in err and "read 2, " in err and "broken 2" in err and f"{tmp_path}/bad.jsonl:1: not UTF-8" in err
    (tmp_path / "good.txt").write_text("a few words of text, and again a few words of other text\n" * 20)
    assert main([*words, str(tmp_path / "bad.jsonl"), str(tmp_path / "good.txt"), "--model-type", "bpe"]) == 0
    err = capsys.readouterr().err
    assert "read 3, " in err and "broken 2" in err and f"{tmp_path}/bad.jsonl:1: " in err
