"""Supervised fine-tuning from a base and conversations to a run: learnt, resumed exactly, refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.exchange.bases import open_base
from anarchobot.exchange.exporting import export
from anarchobot.exchange.fusing import fuse
from anarchobot.inference.model import load_model
from anarchobot.tasks.sft import sft
from anarchobot.training import checkpoint
from tests.tasks.test_pretrain import equal
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import events, tuning


def test_a_model_learns_to_answer(tmp_path: Path, base: Path, chats: Path) -> None:
    """The loss on held-out answers falls, and what is generated comes to be like them."""
    settings = {
        "train__total_steps": 120, "train__eval_interval": 120, "train__log_interval": 40, "train__grad_accum_steps": 1,
        "train__ckpt_interval": 120, "chat__rouge_samples": 4, "generation__max_new_tokens": 12,
    }  # fmt: skip
    summary = sft(tuning(tmp_path, "run", base, chats, **settings), quiet=True)
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
    sft(tuning(tmp_path, "whole", base, chats, **settings), quiet=True)
    sft(tuning(tmp_path, "broken", base, chats, **settings | {"train__total_steps": 4}), quiet=True)
    sft(tuning(tmp_path, "broken", base, chats, **settings, train__checkpoint_path="auto"), quiet=True)
    equal(tmp_path / "whole", tmp_path / "broken")


def test_packed_conversations_have_the_loss_of_each_alone(tmp_path: Path, base: Path, chats: Path) -> None:
    losses = []
    for name, pack in (("packed", True), ("alone", False)):
        sft(tuning(tmp_path, name, base, chats, chat__pack=pack, train__total_steps=1), quiet=True)
        losses.append(events(tmp_path / name, "eval")[0]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_hugging_face_folder_is_a_base_as_well(tmp_path: Path, base: Path, chats: Path) -> None:
    export(base, "hf", tmp_path / "hf")
    for name, model in (("ours", base), ("theirs", tmp_path / "hf")):
        sft(tuning(tmp_path, name, model, chats), quiet=True)
    ours, theirs = ([line["val_loss"] for line in events(tmp_path / name, "eval")] for name in ("ours", "theirs"))
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_adapters_alone_are_trained_and_saved(tmp_path: Path, base: Path, chats: Path) -> None:
    before = dict(open_base(str(base)).weights)
    summary = sft(tuning(tmp_path, "run", base, chats, lora__r=4, train__total_steps=12), quiet=True)
    found = checkpoint.find(tmp_path / "run")
    names = set(np.load(found.folder / "model.npz").files)
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"} and len(names) == 2 * 7
    assert {p.name for p in (tmp_path / "run" / "adapters").iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
    }
    fuse(base, tmp_path / "run" / "adapters", tmp_path / "fused")
    joined = sft(tuning(tmp_path, "again", tmp_path / "fused", chats, train__total_steps=1), quiet=True)
    assert events(tmp_path / "again", "eval")[0]["val_loss"] == pytest.approx(summary["best_val_loss"], abs=1e-5)
    assert joined["finished"]
    peft = tuning(tmp_path, "peft", base, chats, lora__r=4, lora__adapter_format="peft")
    assert (Path(sft(peft, quiet=True)["adapters"]) / "adapter_model.safetensors").is_file()
    first, *_, last = (line["val_loss"] for line in events(tmp_path / "run", "eval"))
    assert last < first - 0.05 and summary["finished"]
    for name, weight in open_base(str(base)).weights.items():
        np.testing.assert_array_equal(weight, before[name])


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path, base: Path, chats: Path) -> None:
    settings = {"train__lr": 1e-12, "train__eval_interval": 1, "train__total_steps": 50, "train__patience": 3}
    again = {"train__checkpoint_path": "auto"}
    worse = {"train__lr": 3.0, "train__max_grad_norm": None, "guard__spike_sigma": None}
    summary = sft(tuning(tmp_path, "run", base, chats, **settings | worse), quiet=True)
    assert summary["finished"] and summary["steps"] < 50
    losses = [line["val_loss"] for line in events(tmp_path / "run", "eval")]
    assert min(losses[-3:]) >= min(losses[:-3]) and summary["best_val_loss"] == min(losses)
    resumed = sft(tuning(tmp_path, "run", base, chats, **settings | worse | again), quiet=True)
    assert resumed["steps"] == summary["steps"]


def test_pytorch_tunes_as_mlx_does(tmp_path: Path, base: Path, chats: Path) -> None:
    pytest.importorskip("torch").set_num_threads(1)
    for backend in ("mlx", "torch"):
        sft(tuning(tmp_path, backend, base, chats, train__backend=backend), quiet=True)
    by_mlx, by_torch = ([line["loss"] for line in events(tmp_path / b, "train")] for b in ("mlx", "torch"))
    assert by_torch == pytest.approx(by_mlx, abs=1e-4)
    refused("torch trains whole weights", tuning(tmp_path, "x", base, chats, train__backend="torch", lora__r=4))


def refused(match: str, loaded: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        sft(loaded, quiet=True)
    assert "\n" not in str(caught.value)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, base: Path, chats: Path) -> None:
    def make(**overrides: Any) -> Any:
        return tuning(tmp_path, "run", base, chats, **overrides)

    refused(r"data.shard_dir: is about documents, not conversations", make(data__shard_dir="shards/x"))
    refused(r"data.dataset: expected what to learn from", make(data__dataset=None))
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

    sft(make(), quiet=True)
    again = {"train__checkpoint_path": "auto", "train__total_steps": 9}
    other = tmp_path / "other.jsonl"
    other.write_text(chats.read_text().replace("red", "pink"))
    refused("began with other conversations than those now in .*other.jsonl", make(data__dataset=str(other), **again))
    refused("lora.r was None and is now 4: a run can't change it", make(lora__r=4, **again))
    shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "step_00000006")
    refused("began with other weights than those now in", make(train__init_from=str(tmp_path / "base"), **again))
    sft(tuning(tmp_path, "adapters", base, chats, lora__r=4), quiet=True)
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
