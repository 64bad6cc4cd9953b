"""`anarchobot kb`: all subcommands, and their errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli.main import main
from tests.inference.encoder_folders import write_encoder

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fruit.md").write_text("Apples are red.\n")
    Path("rows.jsonl").write_text('{"body": "Bananas are yellow."}\n{"body": "Dates are brown, as apples are not."}\n')


def result(words: list[str], capsys: Captured) -> Any:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_all_subcommands(capsys: Captured) -> None:
    base = ["--kb", "kb.db"]
    done = result(["kb", "add", "fruit.md", *base], capsys)
    assert (done["added"], done["passages"], done["texts"]["kept"]) == (["fruit.md"], 1, 1)
    done = result(["kb", "add", *base, "--text-field", "body", "fruit.md", "rows.jsonl"], capsys)
    assert done["replaced"] == ["fruit.md"]  # --text-field changed; a text file ignores it, so its id stays
    done = result(["kb", "add", "fruit.md", "rows.jsonl", *base, "--text-field", "body"], capsys)
    assert (done["equal"], done["passages"]) == (["fruit.md", "rows.jsonl"], 3)

    hits = result(["kb", "search", "Which apples are red?", *base, "-k", "2"], capsys)["hits"]
    assert [(hit["passage_id"], hit["source"]) for hit in hits] == [(1, "fruit.md"), (3, "rows.jsonl:2")]
    assert (hits[0]["text"], hits[0]["score"]) == ("Apples are red.\n", 1)

    question = ["--question", "Which apples are red?"]
    voted = result(["kb", "feedback", *question, "--passage", "1", "--bad", *base, "--feedback-alpha", "0.5"], capsys)
    assert voted == {"relevance": {"1": -0.5}}
    again = result(["kb", "search", "Which apples are red?", *base, "--feedback-alpha", "1"], capsys)["hits"]
    assert (again[-1]["passage_id"], again[-1]["score"]) == (1, 0)
    assert result(["kb", "search", "Which apples are red?", *base, "--feedback-alpha", "0"], capsys)["hits"][:2] == hits

    documents = result(["kb", "list", *base], capsys)["documents"]
    assert documents == [
        {"name": "fruit.md", "passages": 1, "votes": 1}, {"name": "rows.jsonl", "passages": 2, "votes": 0},
    ]  # fmt: skip
    assert result(["kb", "remove", "fruit.md", *base], capsys) == {"removed": {"fruit.md": 1}}
    assert [held["name"] for held in result(["kb", "list", *base], capsys)["documents"]] == ["rows.jsonl"]


def test_search_by_meaning(capsys: Captured) -> None:
    """A random encoder: what counts is which passages are embedded, and that all are found."""
    base, model = ["--kb", "kb.db"], ["--embedding-model", str(write_encoder(Path("encoder")))]
    Path("more.txt").write_text("The beaver builds a dam.")
    assert result(["kb", "add", "fruit.md", *base], capsys)["embedded"] == 0
    assert main(["kb", "search", "river", *base, *model]) == 0
    assert "warning: 1 passage found by keyword only" in capsys.readouterr().err
    done = result(["kb", "add", "fruit.md", "more.txt", *base, *model], capsys)
    assert (done["equal"], done["added"], done["embedded"]) == (["fruit.md"], ["more.txt"], 2)
    assert result(["kb", "search", "river", *base], capsys)["hits"] == []
    hits = result(["kb", "search", "river", *base, *model], capsys)["hits"]
    assert sorted(hit["source"] for hit in hits) == ["fruit.md", "more.txt"] and hits[0]["score"] == 1
    assert main(["kb", "search", "river", *base, *model]) == 0
    assert capsys.readouterr().err == ""

    other = ["--embedding-model", str(write_encoder(Path("other"), seed=1))]
    assert main(["kb", "search", "river", *base, *other]) == 2
    assert "rebuild with: anarchobot kb embed --rebuild" in capsys.readouterr().err
    assert result(["kb", "embed", *base, *other, "--rebuild"], capsys) == {"embedded": 2, "passages": 2}
    assert result(["kb", "embed", *base, *other], capsys) == {"embedded": 0, "passages": 2}
    assert main(["kb", "embed", *base]) == 2
    assert "missing --embedding-model MODEL" in capsys.readouterr().err


def test_text_output(capsys: Captured) -> None:
    Path("escape.txt").write_text("Cherries \x1b[31mare\x07 red.")
    assert main(["kb", "add", "fruit.md", "escape.txt", "--kb", "kb.db"]) == 0
    assert capsys.readouterr().out == (
        "fruit.md: added\nescape.txt: added\nfiles: 2 added, 0 replaced, 0 unchanged, 0 failed; 2 passages in total\n"
    )
    assert main(["kb", "search", "cherries", "--kb", "kb.db"]) == 0
    assert capsys.readouterr().out == ("[1] escape.txt  passage 2, score 1.000\nCherries \\x1b[31mare\\x07 red.\n\n")
    assert main(["kb", "search", "plums", "--kb", "kb.db"]) == 0
    assert capsys.readouterr().out == "no passage matches any word of the question\n"
    assert main(["kb", "feedback", "--question", "cherries", "--passage", "1", "2", "--good", "--kb", "kb.db"]) == 0
    assert capsys.readouterr().out == (
        "passage 1: relevance to this question +0.100 (from -1 to 1)\n"
        "passage 2: relevance to this question +0.100 (from -1 to 1)\n"
    )
    assert main(["kb", "list", "--kb", "kb.db"]) == 0
    assert capsys.readouterr().out == (
        "escape.txt: 1 passage, 1 vote\nfruit.md: 1 passage, 1 vote\n2 documents, 2 passages\n"
    )
    assert main(["kb", "remove", "fruit.md", "--kb", "kb.db"]) == 0
    assert capsys.readouterr().out == "fruit.md: 1 passage removed\n"


def test_bad_files_are_reported_and_do_not_stop_the_others(capsys: Captured) -> None:
    Path("bad.txt").write_bytes(b"\xff\xfe")
    Path("worse.txt").write_bytes(b"a\0b")
    Path("empty.txt").touch()
    Path("folder").mkdir()
    Path("folder/empty.md").touch()
    Path("folder2").mkdir()
    Path("folder2/._cheese.md").write_bytes(b"\0")
    Path("folder2/cheese.md").write_text("Gouda")
    words = [
        "kb",
        "add",
        "bad.txt",
        "fruit.md",
        "worse.txt",
        "empty.txt",
        "folder/../folder/*.md",
        "folder2",
        "--kb",
        "kb.db",
    ]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert "fruit.md: added\n" in captured.out
    assert "empty files skipped: 1 (first: folder/../folder/empty.md)" in captured.out
    assert "hidden or system files not read: 1 (folder2/._cheese.md)" in captured.out
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("anarchobot: bad.txt: not UTF-8 text")
    assert captured.err.endswith("(2 more files failed)\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kb list", "missing --kb FILE (see anarchobot kb list --help)"),
        ("kb list --kb nothere.db", "nothere.db: no such knowledge base; create it with: anarchobot kb add"),
        ("kb list --kb fruit.md", "fruit.md: not a knowledge base (not a SQLite file); choose another file"),
        ("kb add nothere.txt --kb kb.db", "nothere.txt: no such file or folder"),
        ("kb add rows.jsonl --kb k.db", "rows.jsonl:1: no field 'text' (it has body): set data.text_field"),
        ("kb search --kb fruit.md", "the following arguments are required: QUESTION (see anarchobot kb search --help)"),
        ("kb serch q", "unknown command 'serch'; did you mean 'search'? (see anarchobot kb --help)"),
        ("kb search q --kb k.db -k 0", "command line: knowledge_base.retrieval_k: expected an integer >= 1, got 0"),
        ("kb search q --kb k.db --feedback-alpha 2", "command line: knowledge_base.feedback_alpha: expected a number "
         ">= 0 and <= 1, got 2"),
        ("kb feedback --question q --passage x --good", "argument --passage: invalid int value: 'x' (see anarchobot kb "
         "feedback --help)"),
        ("kb feedback --question q --passage 1", "one of the arguments --good --bad is required (see anarchobot kb "
         "feedback --help)"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(words: str, message: str, capsys: Captured) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"anarchobot: {message}\n"
    assert not Path("kb.db").exists()
