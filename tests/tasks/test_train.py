"""`anarchobot train`, end to end on a tiny text: the plan, all stages, resuming, and wrong requests."""

import json
from argparse import Namespace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.cli.train import _output, _print_result, format_seconds, parse_seconds
from anarchobot.config.errors import UserError
from anarchobot.config.loading import load_config
from anarchobot.data.shards import read_manifest
from anarchobot.data.sources import builtin
from anarchobot.data.sources.documents import clean_text
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.optim.schedule import sequences_per_step
from anarchobot.runs import checkpoint
from anarchobot.runs.run_log import read_run, read_summary
from anarchobot.tasks import train, training_plan, training_samples
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.training_plan import Plan, survey_texts
from tests.tiny import loaded

STEP_SECONDS = 220.0  # what is measured instead: 50 minutes are enough for a few steps


def write_texts(folder: Path, number: int = 12) -> Path:
    folder.mkdir()
    for i, text in zip(range(number), builtin.topics(), strict=False):
        (folder / f"{i}.txt").write_text(text[:4000])
    return folder


def write_chats(file: Path, number: int = 12) -> Path:
    rows = [
        [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": f"Answer {i}"}]
        for i in range(number)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    load_pretrained.cache_clear()  # by paths, which are relative to tmp_path here
    monkeypatch.setattr(training_plan, "measure", lambda loaded, base: STEP_SECONDS)
    monkeypatch.setattr(train, "measure", lambda loaded, base: STEP_SECONDS)
    monkeypatch.setattr(training_plan, "MIN_STEPS", 10)
    monkeypatch.setattr(training_plan, "VALIDATIONS", 2)
    monkeypatch.setattr(train, "VALIDATIONS", 2)
    monkeypatch.setattr(train, "MAX_EPOCHS", 0.9)  # the length does not depend on the speed
    monkeypatch.setattr(train, "ADAPTER_EPOCHS", 0.5)
    monkeypatch.setattr(train, "CHAT_EPOCHS", 0.5)
    monkeypatch.setattr(training_samples, "MAX_TOKENS", 4)


def weights(run: Path) -> dict[str, Any]:
    found = checkpoint.find(run)
    return dict(np.load(found.folder / checkpoint.MODEL_FILE))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_texts_and_chats_become_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "notes")
    (tmp_path / "notes" / "old.txt").write_bytes("é".encode("latin1"))
    chats = write_chats(tmp_path / "chats.jsonl", 60)
    words = ["train", "notes", "--time", "50m", "--chat", str(chats), "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "runs/notes/best.json"
    assert result["chat"] in ("runs/notes/chat", "runs/notes/chat/best.json")  # did a step improve?
    run = Path("runs/notes")
    config = load_config(run / "config.yaml").config
    shards = read_manifest(run / "shards")
    step_tokens = sequences_per_step(config.train) * config.data.seq_len
    assert config.train.schedule == "wsd"
    assert config.train.total_steps == result["steps"] == int(0.9 * shards.tokens("train") / step_tokens)
    assert config.data.datasets == ["notes"]
    assert shards.tokens("val") > 0
    assert 0 < result["best_val_bpb"] < 8
    assert (run / "samples.txt").read_text().count(f"prompt: {(p := config.generation.prompt)}\n\n{p}") == 3
    assert result["samples"] == "runs/notes/chat/samples.txt"
    assert Path(result["samples"]).read_text().count("assistant: ") == 3
    report = Path(result["report"]).read_text()
    assert "<svg" in report and "notes</th>" in report and "chat</th>" in report
    (not_read,) = result["not_read"]
    assert "not UTF-8" in not_read and not_read.endswith("not read: 1 (notes/old.txt)")
    chat = load_config(run / "chat" / "config.yaml").config
    assert (chat.train.init_from, chat.lora.r, chat.data.dataset) == (result["model"], None, str(chats))
    assert chat.train.lr == config.train.lr
    assert result["chat_val_loss"] == read_summary(run / "chat" / "logs")["best_val_loss"]
    assert result["chat_val_loss_before"] == read_run(run / "chat").points("eval", "val_loss")[0][1]
    assert result["val_bpb_before"] is None  # of a new model
    assert [command.split()[1] for command in result["commands"]] == [
        "tokenizer", "pretokenize", "pretrain", "report", "sft"
    ]  # fmt: skip

    before = (run / "logs" / "metrics.jsonl").read_bytes()
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert (run / "logs" / "metrics.jsonl").read_bytes() == before

    (tmp_path / "notes" / "new.txt").write_text("More text.")
    assert main(words) == 2
    assert "texts was notes (13 files, " in capsys.readouterr().err


def test_conversations_of_a_stopped_run_are_kept_and_a_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "notes")
    chats, others = write_chats(tmp_path / "chats (old).jsonl", 20), write_chats(tmp_path / "others.jsonl", 20)
    requests: list[train.Request] = []

    def stopped(request: train.Request, *args: Any) -> None:
        requests.append(request)
        raise train.Stopped

    monkeypatch.setattr(train, "train", stopped)
    assert main(["train", "notes", "--time", "50m", "--chat", str(chats)]) == 130
    before = Path("runs/notes/train.json").read_bytes()
    capsys.readouterr()
    assert main(["train", "notes", "--dry-run", "--chat", str(others)]) == 0
    assert Path("runs/notes/train.json").read_bytes() == before
    printed = capsys.readouterr().err
    assert "runs/notes: would be resumed" in printed and "measured just now" not in printed
    assert main(["train", "notes"]) == 130
    assert main(["train", "notes", "--chat", str(others)]) == 130
    assert [request.chat for request in requests] == [str(chats), str(chats), str(others)]


def test_another_time_is_a_new_run_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "notes")
    requests: list[train.Request] = []

    def stopped(request: train.Request, *args: Any) -> None:
        requests.append(request)
        raise train.Stopped

    monkeypatch.setattr(train, "train", stopped)
    for more in (["--time", "50m"], ["--time", "1h"], [], ["--time", "60m"], ["--output", "runs/notes"]):
        assert main(["train", "notes", *more]) == 130
    first, second = (Path("runs/notes"), 3000.0), (Path("runs/notes-1h"), 3600.0)
    assert [(request.output, request.seconds) for request in requests] == [first, second, first, second, first]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("runs/notes: has a run")]
    assert len(said) == 2 and all("--time 50m" in line and line.endswith("runs/notes-1h") for line in said)
    assert load_config("runs/notes-1h/config.yaml").config.train.save_dir == "runs/notes-1h"
    # A folder that was chosen is not replaced by another one.
    assert main(["train", "notes", "--time", "1h", "--output", "runs/notes"]) == 2
    assert "resume it without --time" in (error := capsys.readouterr().err) and "--output runs/notes-1h" in error


@pytest.mark.parametrize("seconds", [0.5, 1, 90, 60, 5400, 3600, 86400])
def test_times_are_written_as_they_are_read(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == seconds


def test_a_run_that_will_be_late_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps have taken nearly all of the time, and the decay needs seven more."""
    write_texts(tmp_path / "notes")
    summaries = iter([{"steps": 3, "wall_seconds": 2900.0}])

    def run(*args: Any) -> dict[str, Any]:
        for summary in summaries:
            return summary
        raise train.Stopped

    monkeypatch.setattr(train, "_make_shards", lambda *args: None)
    monkeypatch.setattr(train, "_run", run)
    monkeypatch.setattr(train, "_set_length", lambda *args: 10)
    assert main(["train", "notes", "--time", "50m"]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert any("10 steps" in line and "1:52:47 left" in line for line in lines)
    (warning,) = [line for line in lines if line.startswith("warning: it ends ")]
    assert warning.startswith("warning: it ends 1:52:")


def test_conversations_and_model_are_checked_before_the_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "notes")
    (tmp_path / "bad.jsonl").write_text('{"foo": 1}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    (tmp_path / "folder").mkdir()
    for words in (
        ["notes", "--chat", "bad.jsonl"],
        ["notes", "--chat", "half.jsonl"],
        ["--chat", str(write_chats(tmp_path / "chats.jsonl")), "--model", "folder", "--output", "runs/notes"],
    ):
        for more in ([], ["--dry-run"]):
            assert main(["train", *words, "--time", "50m", "--quiet", *more]) == 2
            assert capsys.readouterr().err.count("\n") == 1
            assert not Path("runs").exists()
    # Conversations can be replaced until tuning begins. They get their share of the time though texts have used it up.
    original = train._run

    def slow(command: str, *args: Any) -> Any:
        if command == "sft":
            raise train.Stopped
        return original(command, *args)

    monkeypatch.setattr(train, "_run", slow)
    monkeypatch.setattr(train, "_set_length", lambda request, path, summary: summary["steps"])
    (tmp_path / "few.jsonl").write_text((tmp_path / "chats.jsonl").read_text().partition("\n")[0] + "\n")
    words = ["train", "notes", "--time", "50m", "--quiet", "--chat"]
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "_pretrain", lambda *args: (_ for _ in ()).throw(train.Stopped))
        assert main([*words, "few.jsonl"]) == 130
    summary = train.read_summary
    used_up = {"wall_seconds": 3000.0, "tokens_per_second": 1.0}
    monkeypatch.setattr(train, "read_summary", lambda logs: summary(logs) | used_up)
    capsys.readouterr()
    assert main([word for word in words if word != "--quiet"] + ["chats.jsonl"]) == 130
    error = capsys.readouterr().err
    assert "conversations: chats.jsonl (" in error and "; before: few.jsonl (" in error
    chat = load_config("runs/notes/chat/config.yaml").config
    assert chat.data.dataset == "chats.jsonl" and chat.train.epochs == train.CHAT_EPOCHS
    assert main([*words, "few.jsonl"]) == 2
    assert "chat was chats.jsonl" in capsys.readouterr().err


def test_a_run_that_is_interrupted_anywhere_resumes_and_equals_one_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "notes")
    words = ["train", "notes", "--time", "50m", "--quiet"]
    seen = []
    for name in ("train_tokenizer", "open_corpus", "pretrain", "_set_length", "_write_samples"):
        original = getattr(train, name)

        def interrupted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            seen.append(name)
            if seen.count(name) == 1:
                raise MemoryError
            if (name, seen.count(name)) == ("pretrain", 2):  # as after Ctrl-C
                return original(*args, **kwargs) | {"finished": False}
            return original(*args, **kwargs)

        monkeypatch.setattr(train, name, interrupted)
    assert [main(words) for _ in range(7)] == [1, 1, 1, 130, 1, 1, 0]
    assert "stopped; resume with the same command" in capsys.readouterr().err
    by_hand = load_config("runs/notes/config.yaml", [("train.save_dir", "runs/again")])
    assert by_hand.config.train.total_steps > 2
    pretrain(by_hand, show="nothing")
    expected, found = weights(Path("runs/again")), weights(Path("runs/notes"))
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


def test_adapters_for_a_model(tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "notes")
    chats = write_chats(tmp_path / "chats.jsonl")
    base = loaded(tmp_path / "base.yaml", tiny_shards, Path("runs/base"), train__total_steps=1, train__warmup_steps=0)
    pretrain(base, show="nothing")
    words = ["train", "notes", "--model", "runs/base", "--chat", str(chats), "--time", "50m", "--json"]
    assert main([*words, "--output", "runs/both"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert load_config("runs/both/config.yaml").config.lora.r == 8
    chat = load_config("runs/both/chat/config.yaml").config
    assert (chat.train.init_from, chat.lora.r) == ("runs/both/fused", 8)
    assert checkpoint.find(result["chat"]).config.lora.r == 8

    words = ["train", "--model", "runs/base", "--chat", str(chats), "--time", "50m", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["chat"] == "runs/chats"
    assert load_config("runs/chats/config.yaml").config.train.init_from == "runs/base"
    assert Path(result["samples"]).read_text().count("user: Question ") == 3
    assert "<svg" in Path(result["report"]).read_text()


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_dry_run_writes_nothing(tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "notes")
    before = files_below(tmp_path)
    assert main(["train", "notes", "--time", "50m", "--dry-run", *flags]) == 0
    assert files_below(tmp_path) == before
    out = capsys.readouterr().out
    if flags:
        plan = json.loads(out)
        assert plan["config"]["data"]["dataset"] == ["notes"]
        assert plan["config"]["model"]["vocab_size"] == 512
    else:
        assert [line.split()[0] for line in out.splitlines()] == [
            "text", "vocabulary", "model", "step", "run", "time", "output"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "near"),
    [("5", "5m"), ("5min", "5m"), ("1.5 hours", "1.5h"), ("90 sec", "90s"), ("2H", "2h"), ("0", ""), ("soon", "")],
)
def test_a_time_in_another_notation_is_suggested(text: str, near: str) -> None:
    with pytest.raises(UserError) as error:
        parse_seconds(text)
    assert str(error.value).partition("did you mean ")[2] == (near and f"'{near}'?")


@pytest.mark.parametrize(("seconds", "epochs"), [(100.0, 0.5), (1000.0, 3.0)])
def test_the_plan_says_how_often_the_conversations_will_be_read(
    seconds: float, epochs: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.18 x 100 - 2 = 16 s at 1,000 tokens per second, of 32,000 tokens of 2.6 bytes; at most three times."""
    write_chats(chats := tmp_path / "chats.jsonl")
    monkeypatch.setattr(train, "CHAT_EPOCHS", 3.0)
    monkeypatch.setattr(train, "_chat_tokens", lambda request, vocab_size: 32 * vocab_size)
    sections: Any = {"model": {"vocab_size": 1000}, "data": {"seq_len": 250}, "train": {"grad_accum_steps": 8}}
    monkeypatch.setattr(train, "plan_new_model", lambda *args: Plan(sections, [], step_seconds=2.0))
    found = train.plan(train.Request(["notes"], seconds, str(chats), None, tmp_path / "run"), 0.0)
    assert f"about {epochs} epochs" in dict(found.table)["chat"]
    assert any("time for 0.5 epochs only" in note for note in found.notes) == (epochs < 1)


def test_the_run_has_the_name_of_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts-of-2019").mkdir()
    (tmp_path / "notes").symlink_to("texts-of-2019")
    monkeypatch.chdir(tmp_path)
    for text, name in (("notes", "notes"), ("notes/../notes/*.txt", "notes"), (".", tmp_path.name)):
        assert _output(Namespace(output=None, texts=[text])) == Path("runs", name)


def test_times_of_several_units() -> None:
    assert [parse_seconds(text) for text in ("1h30m", "1.5h", "90m", "1m30s")] == [5400, 5400, 5400, 90]


def test_the_sample_that_is_printed_has_a_heading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "samples.txt").write_text(f"Once.{training_samples.SEPARATOR}Twice.")
    result = {
        "model": "m",
        "chat": None,
        "best_val_bpb": None,
        "val_bpb_before": None,
        "chat_val_loss": None,
        "chat_val_loss_before": None,
        "report": "r.html",
        "not_read": [],
    }
    result["samples"] = str(tmp_path / "samples.txt")
    _print_result(Namespace(json=False, quiet=False), result, opens_chat=False, was_finished=False)
    assert "\nsample:\nOnce.\n" in capsys.readouterr().err
    _print_result(Namespace(json=False, quiet=False), result, opens_chat=False, was_finished=True)
    assert capsys.readouterr().err == "next: anarchobot generate --checkpoint m\n"


def test_wrong_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "notes")
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("word " * 400)
    (tmp_path / "binary.txt").write_bytes(b"\x00\xff" * 10_000)
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n' * 1000)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for words, expected in (
        ([], "missing TEXTS"),
        (["nothing"], "nothing: no such file or folder"),
        (["empty"], "empty: no .txt, "),
        (["short.txt"], "short.txt: 2.0 kB of text is too little to train on: expected at least 10.0 kB"),
        (["binary.txt"], "binary.txt: not UTF-8 text"),
        (["notes", "--time", "30"], "argument --time: expected a time such as 90s, 30m or 2h, got '30'"),
        (["chats.jsonl"], "chats.jsonl:1: no field 'text' (it has messages): conversations are read by train --chat "),
        (["notes", "--time", "6s"], "--time 6s: too short: "),
        (["notes", "--output", "taken"], "taken: already exists and is not empty"),
        (["--model", "runs/none"], "missing TEXTS"),
        (["notes", "--chat", "none.jsonl"], "none.jsonl: no such file or folder"),
    ):
        before = files_below(tmp_path)
        assert main(["train", *words]) == 2, words
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"anarchobot: {expected}"), error
        assert files_below(tmp_path) == before


def test_validation_split_of_few_documents(tmp_path: Path) -> None:
    texts = [clean_text(text) for text in builtin.topics() if len(text) > 6000]
    (tmp_path / "long.txt").write_text("\n".join(texts)[:200_000])
    survey = survey_texts([str(tmp_path / "long.txt")])
    assert survey.documents == "file"
    assert survey.val_bytes == pytest.approx(20_000, rel=0.1)  # the end of the file

    (tmp_path / "one.md").write_text(texts[0][:3000] + "\n\n" + texts[1][:6000] + "\n\n" + texts[2][:6000])
    survey = survey_texts([str(tmp_path / "one.md")])
    assert survey.documents == "paragraphs"
    assert 0 < survey.val_bytes < survey.train_bytes / 3

    cut = [text[:n].rstrip() for text in texts[:8] for n in (5000, 5900)]
    documents = {int.from_bytes(sha256(row.encode()).digest()[:8]): len(row) for row in cut}
    late = sorted(word for word in documents if word > 0.2 * 2**64)  # none is held out by a fraction of 0.1
    rows = [row for row in cut if int.from_bytes(sha256(row.encode()).digest()[:8]) in late]
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    survey = survey_texts([str(tmp_path / "few.jsonl")])
    assert 0.2 < survey.val_fraction < 0.6
    assert survey.val_bytes < 0.25 * (survey.train_bytes + survey.val_bytes)
    assert documents[late[0]] <= survey.val_bytes  # the document of the lowest hash is among them

    (tmp_path / "single.jsonl").write_text(json.dumps({"text": texts[0] + texts[1] + texts[2]}))
    survey = survey_texts([str(tmp_path / "single.jsonl")])
    assert (survey.val_fraction, survey.val_bytes) == (0.0, 0)
    assert "no validation" in str(survey)


def test_samples_begin_with_words_of_held_out_text(tmp_path: Path) -> None:
    """Not with a title or a heading, but with a paragraph, or a sentence where there are no paragraphs."""
    body = [f"Part{i} of this tale tells what the sailor saw. " + "The sea was calm. " * 20 for i in range(400)]
    (tmp_path / "book.txt").write_text(
        "THE TALE\n\nby Nobody\n\n" + "\n\n".join(f"CHAPTER {i}\n\n{p}" for i, p in enumerate(body))
    )
    survey = survey_texts([str(tmp_path / "book.txt")])
    held_out = round(400 * survey.val_bytes / (survey.val_bytes + survey.train_bytes))
    number, *rest = survey.prompt.removeprefix("Part").split()
    assert rest == ["of", "this"] and 400 - held_out <= int(number) < 400

    (tmp_path / "one_line.txt").write_text("THE TALE by Nobody. " + " ".join(body))
    prompt = survey_texts([str(tmp_path / "one_line.txt")]).prompt
    assert prompt.startswith("Part") and prompt.endswith(" of this")

    (tmp_path / "row.jsonl").write_text(json.dumps({"text": "THE TALE\n\n" + "\n\n".join(body)}))
    prompt = survey_texts([str(tmp_path / "row.jsonl")]).prompt  # nothing is held out
    assert prompt.endswith(" of this")

    (tmp_path / "chinese.txt").write_text(
        "标题\n"
        + "".join(
            f"第{i}个人在河边走了很久很久，看见了一条很大很大的鱼和很多别的东西，然后慢慢地回到了自己的家里去了。"
            for i in range(900)
        )
    )
    prompt = survey_texts([str(tmp_path / "chinese.txt")]).prompt
    assert prompt.startswith("第") and len(prompt) <= 30


def test_files_in_another_encoding_are_named_in_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = write_texts(tmp_path / "notes")
    for name in ("a.txt", "b.md"):
        (notes / name).write_bytes("Größe und Maß. ".encode("latin1") * 1000)
    (notes / "c.txt").write_bytes("Größe und Maß. ".encode("utf-16"))
    assert main(["train", "notes", "--time", "50m", "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "UTF-8" in line]
    assert line.endswith("not read: 2 (notes/a.txt, notes/b.md)")
    assert main(["train", "notes/a.txt", "--time", "50m", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("anarchobot: notes/a.txt: not UTF-8 text (byte 3)")
