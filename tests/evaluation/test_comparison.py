"""Intervals against the bootstrap and the paired t-test's formula; answers and preferences against transformers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.evaluation.comparison import Report, differences, from_json, html_report, json_report, text_report
from anarchobot.evaluation.metrics import Ratio, Result, mean_of
from anarchobot.exchange.exporting import export
from tests.exchange.conftest import bpe as bpe
from tests.exchange.conftest import tokenizers_folder as tokenizers_folder
from tests.exchange.random_run import make_run


def test_intervals_match_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 200, 400).astype(float)
    a = Ratio(weights * rng.normal(3.0, 0.5, 400), weights)
    b = Ratio(a.values + weights * rng.normal(-0.1, 0.05, 400), weights)
    chosen = rng.integers(0, 400, (4000, 400))
    means = [ratio.values[chosen].sum(1) / ratio.weights[chosen].sum(1) for ratio in (a, b)]
    for ratio, resampled in zip((a, b), means, strict=True):
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert ratio.half_width() == pytest.approx((high - low) / 2, rel=0.05)
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    width = b.difference_half_width(a)
    assert width == pytest.approx((high - low) / 2, rel=0.05)
    assert width is not None and width < 0.3 * math.hypot(a.half_width() or 0, b.half_width() or 0)


def test_means_have_the_standard_errors_of_the_paired_test() -> None:
    a, b = np.array([0.0, 1, 1, 0, 1, 1]), np.array([1.0, 1, 1, 0, 1, 0])
    found = mean_of(b).difference_half_width(mean_of(a))
    assert found == pytest.approx(1.959964 * (b - a).std(ddof=1) / math.sqrt(6))
    assert mean_of([3.0]).half_width() is None


def make_report(name: str, margins: list[float], units: list[str]) -> Report:
    answers = [
        {"row": unit, "question": "<b>?", "reference": "r", "answer": f"{name} {unit}", "rougeL": 0.5} for unit in units
    ]
    ratios = {"log_prob_margin": mean_of(margins), "loss": mean_of([2.0] * len(margins))}
    return Report(name, {"preferences p": Result(units, ratios, {"pairs": len(units)}, answers)})


def test_comparison_of_two_reports() -> None:
    """As objects, and from the JSON that was written for each."""
    a = make_report("a", [1.0, -1.0, 2.0, 0.0], ["1", "2", "3", "4"])
    b = make_report("b", [2.0, -2.0, 3.0, 1.0], ["1", "2", "3", "4"])
    for first, second in ((a, b), tuple(from_json(json.loads(json_report([x], units=True))) for x in (a, b))):
        found = differences(first, second)["preferences p"]
        assert found["log_prob_margin"].value == pytest.approx(0.5)
        assert found["log_prob_margin"].half_width == pytest.approx(1.959964 * 1.0 / 2)  # differences 1, -1, 1, 1
        assert found["reward_accuracy"].value == 0.75
        assert found["perplexity"] == (0.0, None)
        assert (found["pairs"].value, found["loss"].half_width) == (0, 0.0)
    text = text_report([a, b])
    assert "| preferences p: margin of log-probability | 0.5000 ± 1.2652 | 1.0000 ± 2.1170 | +0.5000 ± 0.9800 |" in text
    assert "| preferences p: reward accuracy | - | - | 0.7500 ± 0.4900 |" in text
    assert text.count("question: ") == 3 and "\na: a 1\nb: b 1" in text
    page = html_report([a, b])
    assert page.count("&lt;b&gt;?") == 4 and "<b>" not in page and "b 4" in page and "https?:" not in page
    compared = json.loads(json_report([a, b], units=False))
    assert compared["differences"]["preferences p"]["reward_accuracy"]["value"] == 0.75
    assert [model["intervals"]["preferences p"]["loss"] for model in compared["models"]] == [0, 0]
    # Other units: the difference has no interval, which is said; only common questions are shown.
    other = make_report("c", [1.0, 1.0], ["4", "5"])
    assert differences(a, other)["preferences p"]["loss"] == (0.0, None)
    text = text_report([a, other])
    assert "preferences p: differences have no interval" in text and text.count("question: ") == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"results": {"x": {"loss": "1"}}}, {"checkpoint": 5},
        {"units": {"x": {"names": ["1"], "loss": [[1.0], [0.0]]}}},
        {"units": {"x": {"names": ["1"], "loss": [[1.0, 2.0], [1.0]]}}}, {"units": {"x": {"names": [], "loss": 5}}},
        {"answers": {"x": [5]}}, {"results": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_reports_are_one_line(tmp_path: Path, damage: dict[str, Any], capsys: Any) -> None:
    report = {"checkpoint": "a", "results": {"x": {"loss": 1.0}}}
    (tmp_path / "a.json").write_text(json.dumps(report))  # without units, as written by 0.4
    (tmp_path / "b.json").write_text(json.dumps(report | damage))
    assert main(["evaluate", "--compare", *[str(tmp_path / "a.json")] * 2]) == 0
    assert "| x: loss | 1.0000 | 1.0000 | +0.0000 |" in capsys.readouterr().out
    assert main(["evaluate", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    error = capsys.readouterr().err
    assert "b.json: not a result of anarchobot evaluate --output" in error and error.count("\n") == 1


def test_answers_and_preferences_match_transformers(tmp_path: Path, bpe: Path, capsys: Any) -> None:
    """The loss of reference answers and the margins between two answers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    runs = [make_run(tmp_path / name, bpe, max_seq_len=128, n_layers=layers) for name, layers in (("a", 1), ("b", 2))]
    rows = [{"prompt": "Where is it?", "chosen": "Here.", "rejected": "I don't know, ask him."},
            {"prompt": "Who is it?", "chosen": "My old friend from school", "rejected": "Nobody"},
            {"prompt": "When?", "chosen": "Soon, I hope.", "rejected": "Never!"}]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    words = ["--preferences", str(tmp_path / "pairs.jsonl"), "--chats", str(tmp_path / "chats.jsonl")]
    words += ["generation.max_new_tokens=4", "--page", str(tmp_path / "page.html")]
    assert main(["evaluate", "--compare", *map(str, runs), *words, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)

    from anarchobot.inference.chat import chat_encoder
    from anarchobot.inference.model import load_model
    from anarchobot.tokenizers.conversation import Message

    encoder = chat_encoder(load_model(runs[0])[0])
    end = encoder.end_of_turn_id()
    log_probs = []
    for run in runs:
        export(run, "hf", run.parent / f"{run.name}-hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(run.parent / f"{run.name}-hf").eval()
        for row in rows:
            for answer in (row["chosen"], row["rejected"]):
                prompt = encoder.encode_prompt((Message("user", row["prompt"]),)).tolist()
                text = encoder.encode([(Message("user", row["prompt"]), Message("assistant", answer))])[0]
                ids = text.ids[: text.ids.tolist().index(end, len(prompt)) + 1]  # the end of turn is scored too
                with torch.no_grad():
                    z = theirs(torch.tensor(ids[None, :-1].astype(int))).logits.double()[0]
                losses = torch.nn.functional.cross_entropy(z, torch.tensor(ids[1:].astype(int)), reduction="none")
                log_probs.append([-float(losses[len(prompt) - 1 :].sum()), len(ids) - len(prompt)])
    nats, tokens = np.array(log_probs).reshape(2, 3, 2, 2).transpose(3, 0, 1, 2)  # model, row, chosen and rejected
    margins = nats[..., 0] - nats[..., 1]
    for model, answers, pairs, own, count in zip(found["models"], nats[..., 0], margins, nats, tokens, strict=True):
        preferences, chat = model["results"].values()
        if "accuracy" not in preferences:
            preferences, chat = chat, preferences
        assert preferences["log_prob_margin"] == pytest.approx(pairs.mean(), rel=1e-4)
        assert preferences["accuracy"] == pytest.approx((pairs > 0).mean())
        assert chat["loss"] == pytest.approx(-answers.sum() / count[:, 0].sum(), rel=1e-4)
        size = sum(len(row["chosen"].encode()) for row in rows)
        assert chat["bits_per_byte"] == pytest.approx(-answers.sum() / math.log(2) / size, rel=1e-4)
        assert (preferences["pairs"], chat["answers"], chat["tokens"]) == (3, 3, count[:, 0].sum())
        assert own.shape == (3, 2)
    compared = found["differences"][f"preferences {tmp_path / 'pairs.jsonl'}"]
    moved = margins[1] - margins[0]
    assert compared["log_prob_margin"]["value"] == pytest.approx(moved.mean(), rel=1e-3)
    assert compared["log_prob_margin"]["half_width"] == pytest.approx(1.96 * moved.std(ddof=1) / 3**0.5, rel=1e-3)
    assert compared["reward_accuracy"]["value"] == pytest.approx((moved > 0).mean())
    assert "My old friend from school" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "RUN", "none", "--text", "t.txt"], "none: no such folder"),
        (["--compare", "RUN", "none.json", "--text", "t.txt"], "none.json: no such file"),
        (["--checkpoint", "RUN", "--text", "t.txt", "--chats", "none.jsonl"], "none.jsonl: no such file"),
        (["--checkpoint", "RUN", "--text", "t.txt", "--preferences", "none.jsonl"], "none.jsonl: no such file"),
    ],
    ids=str,
)
def test_inputs_are_checked_before_anything_is_evaluated(
    tmp_path: Path, bpe: Path, words: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anarchobot.evaluation import evaluate

    run = make_run(tmp_path / "run", bpe)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("A text.")
    evaluated: list[str] = []
    monkeypatch.setattr(evaluate, "evaluate_texts", lambda *args: evaluated.append("text"))
    assert main(["evaluate", *[str(run) if word == "RUN" else word for word in words]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and evaluated == []
