"""Supervised fine-tuning end to end: it learns, resumes exactly and rejects bad input in one line."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import build_parser, main
from anarchobot.cli.parser import parse
from anarchobot.cli.training import _load_tuning
from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.exchange.adapters import read_adapter
from anarchobot.exchange.exporting import export
from anarchobot.exchange.fusing import fuse
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.inference.model import load_model
from anarchobot.model.parameters import parameter_count
from anarchobot.runs import checkpoint
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.sft import sft
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import TRAINING_DAY
from anarchobot.training.mlx_engine import MLXEngine
from tests.tasks.test_pretrain import assert_same_state
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import events, tuning
from tests.tiny import loaded


def test_model_learns_to_answer(tmp_path: Path, base: Path, chats: Path) -> None:
    """The held-out loss falls and ROUGE of generated answers rises."""
    settings = {
        "train__total_steps": 120, "train__eval_interval": 120, "train__log_interval": 40, "train__grad_accum_steps": 1,
        "train__ckpt_interval": 120, "chat__rouge_samples": 4, "generation__max_new_tokens": 12,
    }  # fmt: skip
    summary = sft(tuning(tmp_path, "run", base, chats, **settings), show="nothing")
    before, after = events(tmp_path / "run", "eval")
    assert after["val_loss"] < 0.5 * before["val_loss"] and summary["best_val_loss"] == after["val_loss"]
    assert after["rougeL"] > before["rougeL"] + 0.1  # 0.25 to 0.5 after it, by the rounding of the BLAS
    assert {"chat_template.jinja", "tokenizer.model"} <= {p.name for p in (tmp_path / "run").iterdir()}
    model, config = load_model(tmp_path / "run")
    assert config.train.init_from == str(base) and model.config.d_model == 32


def test_calls_are_trained(tmp_path: Path, base: Path) -> None:
    """With a template that has tools the loss falls; with ChatML the rows are skipped."""
    answer = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    talk = [answer, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "Two."}]
    rows = [{"messages": [{"role": "user", "content": f"Add {i}"}, *talk]} for i in range(40)]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tools.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] + ':' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    settings = {
        "data__seq_len": 64, "train__total_steps": 20, "train__eval_interval": 20, "train__grad_accum_steps": 1,
        "chat__template": str(tmp_path / "tools.jinja"),
    }  # fmt: skip
    sft(tuning(tmp_path, "run", base, tmp_path / "calls.jsonl", **settings), show="nothing")
    before, after = events(tmp_path / "run", "eval")
    assert after["val_loss"] < 0.5 * before["val_loss"]
    with pytest.raises(UserError, match=r"40 rows read, 0 kept; skipped 40: .*tool call left out by the chat template"):
        sft(tuning(tmp_path, "none", base, tmp_path / "calls.jsonl"), show="nothing")


@pytest.mark.parametrize("settings", [{}, {"lora__r": 4, "lora__dropout": 0.1}], ids=["all weights", "adapters"])
def test_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, base: Path, chats: Path, settings: dict[str, Any]
) -> None:
    """Across an epoch boundary: about forty conversations fill a dozen sequences."""
    settings = {**settings, "train__total_steps": 9}
    sft(tuning(tmp_path, "whole", base, chats, **settings), show="nothing")
    sft(tuning(tmp_path, "broken", base, chats, **settings | {"train__total_steps": 4}), show="nothing")
    sft(tuning(tmp_path, "broken", base, chats, **settings, train__checkpoint_path="auto"), show="nothing")
    assert_same_state(tmp_path / "whole", tmp_path / "broken")


def test_packing_does_not_change_the_loss(tmp_path: Path, base: Path, chats: Path) -> None:
    losses = []
    for name, pack in (("packed", True), ("alone", False)):
        sft(tuning(tmp_path, name, base, chats, chat__pack=pack, train__total_steps=1), show="nothing")
        losses.append(events(tmp_path / name, "eval")[0]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_hugging_face_folder_as_base(tmp_path: Path, base: Path, chats: Path) -> None:
    export(base, "hf", tmp_path / "hf")
    for name, model in (("ours", base), ("theirs", tmp_path / "hf")):
        sft(tuning(tmp_path, name, model, chats), show="nothing")
    ours, theirs = ([line["val_loss"] for line in events(tmp_path / name, "eval")] for name in ("ours", "theirs"))
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_only_adapters_are_trained_and_saved(tmp_path: Path, base: Path, chats: Path) -> None:
    before = dict(load_pretrained(str(base)).weights)
    summary = sft(tuning(tmp_path, "run", base, chats, lora__r=4, train__total_steps=12), show="nothing")
    found = checkpoint.find(tmp_path / "run")
    names = set(np.load(found.folder / "model.npz").files)
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"} and len(names) == 2 * 7
    assert {p.name for p in (tmp_path / "run" / "adapters").iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
    }
    fuse(base, tmp_path / "run" / "adapters", tmp_path / "fused")
    joined = sft(tuning(tmp_path, "again", tmp_path / "fused", chats, train__total_steps=1), show="nothing")
    assert events(tmp_path / "again", "eval")[0]["val_loss"] == pytest.approx(summary["best_val_loss"], abs=1e-5)
    assert joined["finished"]
    peft = tuning(tmp_path, "peft", base, chats, lora__r=4, lora__adapter_format="peft")
    assert (Path(sft(peft, show="nothing")["adapters"]) / "adapter_model.safetensors").is_file()
    first, *_, last = (line["val_loss"] for line in events(tmp_path / "run", "eval"))
    assert last < first - 0.05 and summary["finished"]
    for name, weight in load_pretrained(str(base)).weights.items():
        np.testing.assert_array_equal(weight, before[name])


def test_patience_ends_a_run_without_improvement(tmp_path: Path, base: Path, chats: Path) -> None:
    settings = {"train__lr": 1e-12, "train__eval_interval": 1, "train__total_steps": 50, "train__patience": 3}
    again = {"train__checkpoint_path": "auto"}
    worse = {"train__lr": 3.0, "train__max_grad_norm": None, "guard__spike_sigma": None}
    summary = sft(tuning(tmp_path, "run", base, chats, **settings | worse), show="nothing")
    steps = {line["val_loss"]: line["step"] for line in events(tmp_path / "run", "eval")}
    assert summary["best_step"] == (steps[summary["best_val_loss"]] or None)
    assert summary["finished"] and summary["steps"] < 50
    losses = [line["val_loss"] for line in events(tmp_path / "run", "eval")]
    assert min(losses[-3:]) >= min(losses[:-3]) and summary["best_val_loss"] == min(losses)
    resumed = sft(tuning(tmp_path, "run", base, chats, **settings | worse | again), show="nothing")
    assert resumed["steps"] == summary["steps"]


def test_warning_if_no_step_improved_on_the_base(
    tmp_path: Path, base: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MLXEngine, "eval_step", lambda engine, batch: (5.4862, 1))
    for name, more, end in (("adapters", {"lora__r": 4}, "; adapters are from step 6\n"), ("whole", {}, "\n")):
        summary = sft(tuning(tmp_path, name, base, chats, **more))
        assert summary["best_step"] is None and summary["best_val_loss"] == pytest.approx(5.4862)
        output = capsys.readouterr().err
        assert output.endswith(f"warning: no step improved on the initial validation loss (5.4862){end}")


def test_adapters_are_from_the_best_step_also_when_fusing_a_run(
    tmp_path: Path, base: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of six steps is the best. An older step of the base is a different model of the same shape."""
    monkeypatch.setattr(MLXEngine, "eval_step", lambda engine, batch: (float(abs(engine._updates - 2)), 1))
    settings = {"lora__r": 4, "train__eval_interval": 1, "train__ckpt_interval": 1, "train__ckpt_keep": 6}
    summary = sft(tuning(tmp_path, "run", base, chats, **settings), show="nothing")
    best = summary["best_step"]
    assert best == 2 == summary["adapters_step"] and summary["steps"] == 6
    capsys.readouterr()
    for i, adapter in enumerate(("run", "run/adapters", f"run/step_{best:08d}", "run/step_00000006")):
        words = ["--model", str(base), "--adapter", str(tmp_path / adapter), "--output", str(tmp_path / f"fused{i}")]
        assert main(["fuse", *words]) == 0
        output = capsys.readouterr().out
        assert ("step" in output.partition("; ")[2]) == (adapter != "run/adapters")
        assert i or f"{base}/step_00000006; {tmp_path / 'run'}: step {best}\n" in output
    ours, theirs, named, newest = (
        checkpoint.find(tmp_path / f"fused{i}").state["sha256"]["model.npz"] for i in range(4)
    )
    assert ours == theirs == named != newest
    assert read_adapter(summary["adapters"], load_pretrained(str(base)).model).base == load_pretrained(str(base)).digest
    older = str(base / "step_00000003")
    words = ["--model", older, "--adapter", summary["adapters"], "--output", str(tmp_path / "wrong")]
    assert main(["fuse", *words]) == 2
    output = capsys.readouterr().err
    assert f"the model in {older}" in output and output.count("\n") == 1


def test_run_stopped_in_its_first_validation_has_no_adapters(
    tmp_path: Path, base: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0, 1

    with monkeypatch.context() as patch:
        patch.setattr(MLXEngine, "eval_step", stopped)
        summary = sft(tuning(tmp_path, "run", base, chats, lora__r=4), show="nothing")
    assert not summary["finished"] and summary["steps"] == 0 and "adapters" not in summary
    again = tuning(tmp_path, "run", base, chats, lora__r=4, train__checkpoint_path="auto")
    assert sft(again, show="nothing")["finished"]


def test_notes_when_rouge_is_unavailable(
    tmp_path: Path, base: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents have no answers, prompts can be too long, and the package can be missing."""
    texts, long = tmp_path / "texts.jsonl", tmp_path / "long.jsonl"
    texts.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(30)))
    sft(tuning(tmp_path, "texts", base, texts, chat__rouge_samples=2, train__total_steps=1))
    assert "no ROUGE (chat.rouge_samples): no held-out conversation ends with" in capsys.readouterr().err
    turns = [("user", "a"), ("assistant", "b"), ("user", "many words " * 50), ("assistant", "c")]
    rows = [{"messages": [{"role": r, "content": f"{c} {i}"} for r, c in turns]} for i in range(10)]
    long.write_text(chats.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    sft(tuning(tmp_path, "long", base, long, chat__rouge_samples=50, data__val_fraction=0.5, train__total_steps=1))
    note = re.search(
        r"ROUGE on (\d+) answers; (\d+) skipped: prompt longer than max_seq_len \(64\)", capsys.readouterr().err
    )
    assert note and int(note[1]) > 10 and 0 < int(note[2]) <= 10
    days = []
    prompt = ChatEncoder.encode_prompt
    monkeypatch.setattr(ChatEncoder, "encode_prompt", lambda *args: days.append(args[2:]) or prompt(*args))
    samples = {"chat__rouge_samples": 2, "train__sample_interval": 1, "generation__max_new_tokens": 2}
    sft(tuning(tmp_path, "days", base, chats, **samples, train__total_steps=1), show="nothing")
    assert len(days) >= 2 + 2 * 2 + 1 and set(days) == {(TRAINING_DAY,)}
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    capsys.readouterr()
    sft(tuning(tmp_path, "none", base, chats, chat__rouge_samples=2, train__total_steps=1))
    assert (
        "warning: no ROUGE (chat.rouge_samples): ROUGE needs a package: pip install rouge-score"
        in capsys.readouterr().err
    )


def test_quantized_share_is_shown(
    tmp_path: Path, tiny_shards: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Width 64, MLP width 96: everything except the MLP matrix with 96 columns and three norms."""
    shape = {"model__d_model": 64, "model__mlp_multiple": 1.5, "model__dropout": 0.0, "train__total_steps": 1}
    pretrain(loaded(tmp_path / "base.yaml", tiny_shards, tmp_path / "base", **shape), show="nothing")
    sft(tuning(tmp_path, "run", tmp_path / "base", chats, lora__r=4, lora__quantize=4, train__total_steps=1))
    packed, left = 384 * 64 + 4 * 64 * 64 + 2 * 96 * 64, 96 * 64 + 3 * 64
    assert f", {packed / (packed + left):.1%} of the rest in 4 bits" in capsys.readouterr().err


def test_pytorch_matches_mlx(tmp_path: Path, base: Path, chats: Path) -> None:
    pytest.importorskip("torch").set_num_threads(1)
    for backend in ("mlx", "torch"):
        sft(tuning(tmp_path, backend, base, chats, train__backend=backend), show="nothing")
    by_mlx, by_torch = ([line["loss"] for line in events(tmp_path / b, "train")] for b in ("mlx", "torch"))
    assert by_torch == pytest.approx(by_mlx, abs=1e-4)
    rejected("torch has no LoRA: remove lora.r", tuning(tmp_path, "x", base, chats, train__backend="torch", lora__r=4))


def rejected(match: str, config: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        sft(config, show="nothing")
    assert "\n" not in str(caught.value)


def test_mismatched_inputs_are_rejected(tmp_path: Path, base: Path, chats: Path) -> None:
    def make(**overrides: Any) -> Any:
        return tuning(tmp_path, "run", base, chats, **overrides)

    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "a", "completion": "b"}\n')
    rejected("data.shard_dir: applies to documents, not conversations", make(data__shard_dir="shards/x"))
    rejected("train.trainable: applies only to pretrain", make(train__trainable="embeddings"))
    rejected("train.first_sequence: applies only to pretrain", make(train__first_sequence=8))
    rejected("data.dataset: not set: expected JSONL or Parquet files", make(data__dataset=None))
    rejected("preference.beta: applies only to dpo", make(preference__beta=0.2))
    rejected("preference.loss: applies only to dpo", make(preference__loss="orpo"))
    rejected(
        r"1 rows read, 1 kept; 1 held out by data.val_fraction",
        make(data__dataset=str(one), data__val_fraction=0.999999),
    )
    rejected("no such file", make(data__dataset=str(tmp_path / "none.jsonl")))
    for overrides, match in (
        ({"train__init_from": None}, r"train.init_from \(--model\): expected"),
        ({"train__init_from": str(tmp_path / "none")}, "none: no such folder"),
        ({"model__d_model": 64}, "model.d_model: 64, .* model in .* has 32"),
        ({"data__seq_len": 65}, r"data.seq_len \(65\) must be at most model.max_seq_len \(64\)"),
    ):
        with pytest.raises(UserError, match=match):
            make(**overrides)
    assert not (tmp_path / "run").exists()

    sft(make(), show="nothing")
    again = {"train__checkpoint_path": "auto", "train__total_steps": 9}
    other = tmp_path / "other.jsonl"
    other.write_text(chats.read_text().replace("red", "pink"))
    rejected("different conversations .*other.jsonl", make(data__dataset=str(other), **again))
    rejected("lora.r was None and is now 4", make(lora__r=4, **again))
    shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "step_00000006")
    rejected("different weights .*base", make(train__init_from=str(tmp_path / "base"), **again))
    sft(tuning(tmp_path, "adapters", base, chats, lora__r=4), show="nothing")
    with pytest.raises(UserError, match=r"not a whole model: .*anarchobot fuse"):
        make(train__init_from=str(tmp_path / "adapters"))


def test_invalid_rows_are_counted_and_the_first_is_located(
    tmp_path: Path, base: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        {"messages": []}, {"messages": [{"role": "assistant", "content": "first"}, {"role": "user", "content": "x"}]},
        {"text_": "no field"}, {"messages": [{"role": "user", "content": "no answer"}]},
    ]  # fmt: skip
    path = tmp_path / "mixed.jsonl"
    path.write_text(chats.read_text() + "".join(json.dumps(row) + "\n" for row in bad) + "not json\n")
    sft(tuning(tmp_path, "run", base, path))
    output = capsys.readouterr().err
    assert "65 rows read, 60 kept" in output
    assert all(f"mixed.jsonl:{line}" in output for line in (61, 62, 64, 65))


def test_command(tmp_path: Path, base: Path, chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuning(tmp_path, "run", base, chats)
    words = ["sft", str(tmp_path / "run.yaml"), "--json", "lora.r=4"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert main(["sft", str(tmp_path / "run.yaml"), "--model", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_weights_of_a_small_model_are_trained_without_config(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*words: str) -> Config:
        return _load_tuning(parse(build_parser(), ["sft", "--model", str(base), *words]), "sft").config

    config = load()
    assert config.lora.r is None and config.train.optimizer == "muon_adamw"
    assert f"training all {parameter_count(config.model):,} parameters" in capsys.readouterr().err
    assert load("lora.r=4").lora.r == 4
    assert load("lora.alpha=4").lora.r == 8
    monkeypatch.setattr("anarchobot.cli.training.SMALL_MODEL", 1e3)
    assert load().lora.r == 8
