"""Supervised fine-tuning from a base and conversations to a run: learnt, resumed exactly, refused in one line."""

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

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.exchange.adapters import read_adapter
from anarchobot.exchange.exporting import export
from anarchobot.exchange.fusing import fuse
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.inference.model import load_model
from anarchobot.runs import checkpoint
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.sft import sft
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import TRAINING_DAY
from anarchobot.training.mlx_engine import MLXEngine
from tests.tasks.test_pretrain import equal
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import events, tuning
from tests.tiny import loaded


def test_a_model_learns_to_answer(tmp_path: Path, base: Path, chats: Path) -> None:
    """The loss on held-out answers falls, and what is generated comes to be like them."""
    settings = {
        "train__total_steps": 120, "train__eval_interval": 120, "train__log_interval": 40, "train__grad_accum_steps": 1,
        "train__ckpt_interval": 120, "chat__rouge_samples": 4, "generation__max_new_tokens": 12,
    }  # fmt: skip
    summary = sft(tuning(tmp_path, "run", base, chats, **settings), show="nothing")
    before, after = events(tmp_path / "run", "eval")
    assert after["val_loss"] < 0.5 * before["val_loss"] and summary["best_val_loss"] == after["val_loss"]
    assert after["rougeL"] > before["rougeL"] + 0.3
    assert {"chat_template.jinja", "tokenizer.model"} <= {p.name for p in (tmp_path / "run").iterdir()}
    model, config = load_model(tmp_path / "run")
    assert config.train.init_from == str(base) and model.shape.d_model == 32


@pytest.mark.parametrize("settings", [{}, {"lora__r": 4, "lora__dropout": 0.1}], ids=["all weights", "adapters"])
def test_stopped_and_resumed_is_the_unbroken_run(
    tmp_path: Path, base: Path, chats: Path, settings: dict[str, Any]
) -> None:
    """Past the end of an epoch: forty-odd conversations are a dozen sequences."""
    settings = {**settings, "train__total_steps": 9}
    sft(tuning(tmp_path, "whole", base, chats, **settings), show="nothing")
    sft(tuning(tmp_path, "broken", base, chats, **settings | {"train__total_steps": 4}), show="nothing")
    sft(tuning(tmp_path, "broken", base, chats, **settings, train__checkpoint_path="auto"), show="nothing")
    equal(tmp_path / "whole", tmp_path / "broken")


def test_packed_conversations_have_the_loss_of_each_alone(tmp_path: Path, base: Path, chats: Path) -> None:
    losses = []
    for name, pack in (("packed", True), ("alone", False)):
        sft(tuning(tmp_path, name, base, chats, chat__pack=pack, train__total_steps=1), show="nothing")
        losses.append(events(tmp_path / name, "eval")[0]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_hugging_face_folder_is_a_base_as_well(tmp_path: Path, base: Path, chats: Path) -> None:
    export(base, "hf", tmp_path / "hf")
    for name, model in (("ours", base), ("theirs", tmp_path / "hf")):
        sft(tuning(tmp_path, name, model, chats), show="nothing")
    ours, theirs = ([line["val_loss"] for line in events(tmp_path / name, "eval")] for name in ("ours", "theirs"))
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_adapters_alone_are_trained_and_saved(tmp_path: Path, base: Path, chats: Path) -> None:
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


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path, base: Path, chats: Path) -> None:
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


def test_where_no_step_was_better_than_the_base_one_is_told(
    tmp_path: Path, base: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MLXEngine, "eval_step", lambda engine, batch: (5.4862, 1))
    for name, more, end in (("adapters", {"lora__r": 4}, ": adapters are step 6's\n"), ("whole", {}, "\n")):
        summary = sft(tuning(tmp_path, name, base, chats, **more))
        assert summary["best_step"] is None and summary["best_val_loss"] == pytest.approx(5.4862)
        said = capsys.readouterr().err
        assert said.endswith(f"warning: no step was better than the model as it was (5.4862){end}")


def test_adapters_are_the_best_steps_and_fuse_takes_them_of_the_run_too(
    tmp_path: Path, base: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of six steps is the best; and an older step of the base is another model of the same shape."""
    monkeypatch.setattr(MLXEngine, "eval_step", lambda engine, batch: (float(abs(engine._updates - 2)), 1))
    settings = {"lora__r": 4, "train__eval_interval": 1, "train__ckpt_interval": 1, "train__ckpt_keep": 6}
    summary = sft(tuning(tmp_path, "run", base, chats, **settings), show="nothing")
    best = summary["best_step"]
    assert best == 2 == summary["adapters_step"] and summary["steps"] == 6
    capsys.readouterr()
    for i, adapter in enumerate(("run", "run/adapters", f"run/step_{best:08d}", "run/step_00000006")):
        words = ["--model", str(base), "--adapter", str(tmp_path / adapter), "--output", str(tmp_path / f"fused{i}")]
        assert main(["fuse", *words]) == 0
        said = capsys.readouterr().out
        assert ("step" in said.partition("; ")[2]) == (adapter != "run/adapters")
        assert i or f"{base}/step_00000006; {tmp_path / 'run'}: step {best}\n" in said
    ours, theirs, named, newest = (
        checkpoint.find(tmp_path / f"fused{i}").state["sha256"]["model.npz"] for i in range(4)
    )
    assert ours == theirs == named != newest
    assert read_adapter(summary["adapters"], load_pretrained(str(base)).model).base == load_pretrained(str(base)).digest
    older = str(base / "step_00000003")
    words = ["--model", older, "--adapter", summary["adapters"], "--output", str(tmp_path / "wrong")]
    assert main(["fuse", *words]) == 2
    said = capsys.readouterr().err
    assert f"trained on another model than the one in {older}" in said and said.count("\n") == 1


def test_a_run_stopped_in_its_first_validation_has_no_adapters_and_no_error(
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


def test_rouge_says_what_it_can_not_have(
    tmp_path: Path, base: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts have no answers; a prompt may be too long; the package may be missing, which is told before data is."""
    texts, long = tmp_path / "texts.jsonl", tmp_path / "long.jsonl"
    texts.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(30)))
    sft(tuning(tmp_path, "texts", base, texts, chat__rouge_samples=2, train__total_steps=1))
    assert "no ROUGE (chat.rouge_samples): no conversation that is held out ends with" in capsys.readouterr().err
    turns = [("user", "a"), ("assistant", "b"), ("user", "many words " * 50), ("assistant", "c")]
    rows = [{"messages": [{"role": r, "content": f"{c} {i}"} for r, c in turns]} for i in range(10)]
    long.write_text(chats.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    sft(tuning(tmp_path, "long", base, long, chat__rouge_samples=50, data__val_fraction=0.5, train__total_steps=1))
    told = re.search(
        r"ROUGE of (\d+) answers: the prompts of (\d+) more fill the model's 64 tokens", capsys.readouterr().err
    )
    assert told and int(told[1]) > 10 and 0 < int(told[2]) <= 10
    days = []
    prompt = ChatEncoder.prompt
    monkeypatch.setattr(ChatEncoder, "prompt", lambda *args: days.append(args[2:]) or prompt(*args))
    samples = {"chat__rouge_samples": 2, "train__sample_interval": 1, "generation__max_new_tokens": 2}
    sft(tuning(tmp_path, "days", base, chats, **samples, train__total_steps=1), show="nothing")
    assert len(days) >= 2 + 2 * 2 + 1 and set(days) == {(TRAINING_DAY,)}
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    refused(
        "chat.rouge_samples: ROUGE needs a package: pip install rouge-score, or leave it out",
        tuning(tmp_path, "none", base, tmp_path / "nothing.jsonl", chat__rouge_samples=2),
    )


def test_the_share_that_is_packed_is_said(
    tmp_path: Path, tiny_shards: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model 64 wide, of 96 within the MLP: all but the MLP's matrix of 96 columns, and three norms."""
    shape = {"model__d_model": 64, "model__mlp_multiple": 1.5, "model__dropout": 0.0, "train__total_steps": 1}
    pretrain(loaded(tmp_path / "base.yaml", tiny_shards, tmp_path / "base", **shape), show="nothing")
    sft(tuning(tmp_path, "run", tmp_path / "base", chats, lora__r=4, lora__quantize=4, train__total_steps=1))
    packed, left = 384 * 64 + 4 * 64 * 64 + 2 * 96 * 64, 96 * 64 + 3 * 64
    assert f", {packed / (packed + left):.1%} of the rest in 4 bits" in capsys.readouterr().err


def test_pytorch_tunes_as_mlx_does(tmp_path: Path, base: Path, chats: Path) -> None:
    pytest.importorskip("torch").set_num_threads(1)
    for backend in ("mlx", "torch"):
        sft(tuning(tmp_path, backend, base, chats, train__backend=backend), show="nothing")
    by_mlx, by_torch = ([line["loss"] for line in events(tmp_path / b, "train")] for b in ("mlx", "torch"))
    assert by_torch == pytest.approx(by_mlx, abs=1e-4)
    refused("torch trains whole weights", tuning(tmp_path, "x", base, chats, train__backend="torch", lora__r=4))


def refused(match: str, config: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        sft(config, show="nothing")
    assert "\n" not in str(caught.value)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, base: Path, chats: Path) -> None:
    def make(**overrides: Any) -> Any:
        return tuning(tmp_path, "run", base, chats, **overrides)

    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "a", "completion": "b"}\n')
    refused(r"data.shard_dir: is about documents, not conversations", make(data__shard_dir="shards/x"))
    refused(r"train.trainable: is for training on documents \(pretrain\)", make(train__trainable="embeddings"))
    refused(r"train.first_sequence: is for training on documents", make(train__first_sequence=8))
    refused(r"data.dataset: expected what to learn from", make(data__dataset=None))
    refused(r"preference.beta: is about pairs of answers \(dpo\), not conversations", make(preference__beta=0.2))
    refused(r"preference.loss: is about pairs of answers", make(preference__loss="orpo"))
    refused(
        r"1 rows read, 1 kept; 1 held out by data.val_fraction",
        make(data__dataset=str(one), data__val_fraction=0.999999),
    )
    refused("no such file", make(data__dataset=str(tmp_path / "none.jsonl")))
    for overrides, match in (
        ({"train__init_from": None}, r"train.init_from \(--model\): expected the model to tune"),
        ({"train__init_from": str(tmp_path / "none")}, "none: no checkpoint here"),
        ({"model__d_model": 64}, "model.d_model: 64, and the model in .* has 32: leave it out"),
        ({"data__seq_len": 65}, r"data.seq_len \(65\) must be at most model.max_seq_len \(64\)"),
    ):
        with pytest.raises(UserError, match=match):
            make(**overrides)
    assert not (tmp_path / "run").exists()

    sft(make(), show="nothing")
    again = {"train__checkpoint_path": "auto", "train__total_steps": 9}
    other = tmp_path / "other.jsonl"
    other.write_text(chats.read_text().replace("red", "pink"))
    refused("began with other conversations than those now in .*other.jsonl", make(data__dataset=str(other), **again))
    refused("lora.r was None and is now 4: a run can't change it", make(lora__r=4, **again))
    shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "step_00000006")
    refused("began with other weights than those now in", make(train__init_from=str(tmp_path / "base"), **again))
    sft(tuning(tmp_path, "adapters", base, chats, lora__r=4), show="nothing")
    with pytest.raises(UserError, match="not a whole model: join them with their model first"):
        make(train__init_from=str(tmp_path / "adapters"))


def test_rows_that_do_not_fit_are_counted_and_the_first_is_named(
    tmp_path: Path, base: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        {"messages": []}, {"messages": [{"role": "assistant", "content": "first"}, {"role": "user", "content": "x"}]},
        {"text_": "no field"}, {"messages": [{"role": "user", "content": "no answer"}]},
    ]  # fmt: skip
    path = tmp_path / "mixed.jsonl"
    path.write_text(chats.read_text() + "".join(json.dumps(row) + "\n" for row in bad) + "not json\n")
    sft(tuning(tmp_path, "run", base, path))
    said = capsys.readouterr().err
    assert "65 rows read, 60 kept" in said
    assert all(f"mixed.jsonl:{line}" in said for line in (61, 62, 64, 65))


def test_the_command(tmp_path: Path, base: Path, chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuning(tmp_path, "run", base, chats)
    words = ["sft", str(tmp_path / "run.yaml"), "--json", "lora.r=4"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert main(["sft", str(tmp_path / "run.yaml"), "--model", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
