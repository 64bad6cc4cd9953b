"""Metrics against transformers, hand counts and the run's own log; errors are one line."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from anarchobot.cli.main import main
from anarchobot.data.shards import TokenStream, first_documents, read_manifest
from anarchobot.exchange.exporting import export
from anarchobot.inference.model import load_model
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.exchange.conftest import bpe as bpe
from tests.exchange.conftest import tokenizers_folder as tokenizers_folder
from tests.exchange.random_run import ROOT, make_run
from tests.tiny import loaded


def run_evaluate(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["evaluate", *words, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_text_metrics_match_transformers(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two documents, one longer than the context; the run and its export give the same metrics."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run = make_run(tmp_path / "run", bpe, max_seq_len=128)
    export(run, "hf", tmp_path / "hf")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = [text[:2000] + " Grüße", text[3000:3100]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer, nats, tokens = load_model(run)[0].tokenizer, 0.0, 0
    for one in texts:
        ids = [tokenizer.eod_id, *tokenizer.encode_batch([one])[0].tolist()]
        for start in range(1, len(ids), 128):  # each token once; the last window is full
            stop = min(start + 128, len(ids))
            window = torch.tensor([ids[max(0, stop - 129) : stop]])
            with torch.no_grad():
                z = theirs(window[:, :-1]).logits.double()
            losses = torch.nn.functional.cross_entropy(z[0], window[0, 1:], reduction="none")
            nats += float(losses[-(stop - start) :].sum())
            tokens += stop - start
    size = sum(len(one.encode()) for one in texts)
    for path in ("run", "hf"):
        (metrics,) = run_evaluate(
            capsys, "--checkpoint", str(tmp_path / path), "--text", str(tmp_path / "texts.jsonl")
        )["results"].values()  # fmt: skip
        assert (metrics["tokens"], metrics["bytes"], metrics["documents"]) == (tokens, size, 2)
        assert metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=5e-5)
        assert metrics["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize("mask", [False, True])
def test_shard_metrics_match_the_training_log(
    tmp_path: Path, tiny_shards: Path, mask: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"data__document_mask": mask, "data__pack": "documents" if mask else "stream", "train__eval_batches": None}
    summary = pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **words), show="nothing")
    found = run_evaluate(capsys, "--checkpoint", str(tmp_path / "run"), "--shards", str(tiny_shards))
    metrics = found["results"][f"shards {tiny_shards}"]
    lines = (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if line["event"] == "eval"][-1]
    assert summary["steps"] == last["step"]
    assert metrics["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(last["val_bpb"], rel=1e-5)
    manifest = read_manifest(tiny_shards)
    assert metrics["tokens"] == manifest.tokens("val") - 1  # the first has no context
    assert metrics["bytes"] == pytest.approx(sum(shard.bytes for shard in manifest.shards_in("val")), rel=1e-3)


def test_documents_that_the_model_was_trained_on_are_counted(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run"), show="nothing")
    stream, tokenizer = TokenStream(tiny_shards, "train"), load_tokenizer(tiny_shards)
    known = [tokenizer.decode(ids.tolist()) for ids in first_documents(stream, 2, 10**6)]
    rows = [{"text": text} for text in (*known, known[0][: len(known[0]) // 3])]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--checkpoint", str(tmp_path / "run"), "--text", str(tmp_path / "t.jsonl")]
    (metrics,) = run_evaluate(capsys, *words)["results"].values()
    assert (metrics["documents"], metrics["documents_trained_on"]) == (3, 2)
    # A model that was not trained on these shards, though its configuration's data.shard_dir may name them.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").symlink_to(tiny_shards)  # the default
    other = make_run(tmp_path / "other", next(tiny_shards.glob("*.model")))
    (metrics,) = run_evaluate(capsys, "--checkpoint", str(other), *words[2:])["results"].values()
    assert "documents_trained_on" not in metrics
    assert main(["evaluate", *words]) == 0
    assert "the model was trained on 2 of these 3 documents" in "".join(capsys.readouterr())
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[2]) + "\n")
    assert main(["evaluate", *words]) == 0
    printed = "".join(capsys.readouterr())
    assert "warning" not in printed and "documents trained on" in printed


def test_a_book_that_was_cleaned_for_training_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anarchobot.data.sources import builtin

    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for i, text in zip(range(4), builtin.topics(), strict=False):
        head, tail = (f"*** {word} OF THE PROJECT GUTENBERG EBOOK X ***" for word in ("START", "END"))
        (tmp_path / "texts" / f"{i}.txt").write_text(f"A license.\n\n{head}\n\n{text[:3000]}\n\n{tail}\nMore.\n")
    words = ["model.vocab_size=400", "data.dataset=texts", "data.clean=true", "data.shard_dir=shards"]
    words += ["data.val_fraction=0", "train.tokenizer_path=shards/tokenizer.model", "train.save_dir=run"]
    assert main(["tokenizer", "train", *words, "--quiet"]) == 0
    assert main(["pretokenize", *words, "--quiet"]) == 0
    small = ["model.n_layers=1", "model.d_model=16", "model.n_heads=2", "model.max_seq_len=64", "data.seq_len=32"]
    (tmp_path / "c.yaml").write_text("")
    assert main(["pretrain", "c.yaml", *words, *small, "--steps", "1", "--quiet"]) == 0
    capsys.readouterr()
    (metrics,) = run_evaluate(capsys, "--checkpoint", "run", "--text", "texts")["results"].values()
    assert (metrics["documents"], metrics["documents_trained_on"]) == (4, 4)


def test_rouge_and_comparison_of_two_models(tmp_path: Path, bpe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model's own greedy answers as references score 1; another model scores less."""
    run = make_run(tmp_path / "run", bpe, max_seq_len=128)
    other = make_run(tmp_path / "other", bpe, max_seq_len=128, n_layers=1)
    model, config = load_model(run)
    from anarchobot.inference.generation import stream_token_ids
    from anarchobot.tokenizers.chat_encoder import ChatEncoder
    from anarchobot.tokenizers.chat_template import load_template
    from anarchobot.tokenizers.conversation import Message

    encoder = ChatEncoder(model.tokenizer, load_template(model.tokenizer, config.chat.template))
    rows = []
    for question in ("what is this", "who are you", "where is it", "when", "why not", "how so", "which one"):
        prompt = encoder.encode_prompt((Message("user", question),)).tolist()
        settings = config.generation.model_copy(update={"method": "greedy"})
        stop = encoder.stop_ids()
        answer = model.tokenizer.decode(
            list(stream_token_ids(model.params, model.config, prompt, settings, stop))
        ).strip()
        rows += [{"prompt": question, "completion": answer}] if any(map(str.isalnum, answer)) else []
    rows.append({"prompt": "x " * 300, "completion": "too long a question"})
    rows.append({"prompt": "a reserved character: \ufdd0", "completion": "skipped"})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--chats", str(tmp_path / "answers.jsonl"), "--output")
    assert main(["evaluate", "--checkpoint", str(run), *words, str(tmp_path / "a.json"), "--quiet"]) == 0
    (metrics,) = json.loads((tmp_path / "a.json").read_text())["results"].values()
    assert metrics["rougeL"] == pytest.approx(1.0) and (metrics["answers"], metrics["too_long"]) == (len(rows) - 2, 1)
    assert len(rows) > 4
    assert capsys.readouterr().err == ""
    assert main(["evaluate", "--compare", str(tmp_path / "a.json"), str(other), *words[:2]]) == 0
    table, log = capsys.readouterr()
    assert f"{len(rows) - 2} of {len(rows) - 2} answers" in log
    (line,) = [line for line in table.splitlines() if "rougeL" in line]
    first, second, difference = (float(cell.partition("±")[0]) for cell in line.split("|")[2:5])
    assert first == 1.0 and second < 1.0 and difference == pytest.approx(second - first, abs=1e-3)

    def score(*settings: str) -> float:
        assert main(["evaluate", "--checkpoint", str(run), *words[:2], *settings, "--json", "--quiet"]) == 0
        (metrics,) = json.loads(capsys.readouterr().out)["results"].values()
        return float(metrics["rougeL"])

    assert score("generation.max_new_tokens=1") < 1
    sampled = ("generation.method=random", "generation.temperature=3")
    assert score(*sampled) == score(*sampled) < 1
    assert score(*sampled, "generation.seed=5") != score(*sampled)


def test_errors_are_one_line(tmp_path: Path, bpe: Path, tiny_shards: Path, capsys: Any) -> None:
    run = str(make_run(tmp_path / "run", bpe))
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "result.json").write_text("[1]")
    for words, message in (
        ([], "one of the arguments --checkpoint --compare is required"),
        (["--checkpoint", run], "expected --shards, --text, --chats, --preferences or --tasks"),
        (["--checkpoint", str(tmp_path / "none"), "--text", "README.md"], "none: no such folder"),
        (["--checkpoint", run, "--text", "none.txt"], "none.txt: no such file"),
        (["--checkpoint", run, "--text", str(tmp_path / "empty.jsonl")], "no documents to evaluate (1 read)"),
        (["--checkpoint", run, "--shards", str(tmp_path)], "no token shards here"),
        (["--checkpoint", run, "--shards", str(tiny_shards)], "not the model's tokenizer"),
        (["--checkpoint", run, "--text", "README.md", "--limit", "0"], "argument --limit: expected an integer >= 1"),
        (
            ["--compare", str(tmp_path / "result.json"), run, "--text", "README.md"],
            "not a result of anarchobot evaluate",
        ),
        (["--checkpoint", run, "--text", "README.md", "generation.top_k=3"], "'generation.top_k=3': only --chats"),
        (["--checkpoint", "none", "--chats", "a.jsonl", "generation.top_k=x"], "generation.top_k"),
        (["--checkpoint", run, "--chats", "a.jsonl", "generation.prompt=x"], "'generation.prompt=x'"),
        (["--compare", "none.json", "none.json"], "none.json: no such file; expected a result of anarchobot evaluate"),
        (["--compare", "a.json", "b.json", "--text", "README.md"], "not allowed with two .json results"),
        (["--checkpoint", run, "--text", "README.md", "--output", str(tmp_path)], "is a folder; expected a file"),
        (["--checkpoint", run, "--text", "README.md", "--output", "none/a.json"], "none/a.json: no such folder"),
    ):
        assert main(["evaluate", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_unknown_task(tmp_path: Path, bpe: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))  # 20 s to read
    run = str(make_run(tmp_path / "run", bpe))
    assert main(["evaluate", "--checkpoint", run, "--tasks", "helloswag"]) == 2
    assert "--tasks helloswag: unknown task" in capsys.readouterr().err
