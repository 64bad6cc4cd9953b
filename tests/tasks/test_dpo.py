"""Preference tuning from a base and pairs to a run: learnt, resumed exactly, its reference computed once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.storage.lock import FolderLock
from anarchobot.tasks.dpo import dpo
from anarchobot.training.preference_engine import PreferenceEngine
from tests.tasks.test_pretrain import equal
from tests.tasks.tuning import base as base
from tests.tasks.tuning import events, tuning
from tests.tasks.tuning import preferences as preferences
from tests.tiny import LEFT_OUT


@pytest.mark.parametrize(
    "settings", [{}, {"lora__r": 4}, {"preference__loss": "ipo"}, {"preference__loss": "orpo"}], ids=str
)
def test_a_model_learns_what_is_preferred(
    tmp_path: Path, base: Path, preferences: Path, settings: dict[str, Any]
) -> None:
    summary = dpo(tuning(tmp_path, "run", base, preferences, train__total_steps=30, **settings), show="nothing")
    first, *_, last = events(tmp_path / "run", "eval")
    if "preference__loss" not in settings:
        assert first["val_loss"] == pytest.approx(np.log(2), abs=1e-6) and first["val_reward_margin"] == 0.0
    assert last["val_loss"] < first["val_loss"] and last["val_reward_accuracy"] > 0.9
    gap = [e["val_chosen_log_prob"] - e["val_rejected_log_prob"] for e in (first, last)]
    assert gap[1] > gap[0]
    line = events(tmp_path / "run", "train")[-1]
    assert line["reward_margin"] > 0 and "val_bpb" not in last
    assert summary["best_val_loss"] == min(e["val_loss"] for e in events(tmp_path / "run", "eval"))


@pytest.mark.parametrize("settings", [{}, {"lora__r": 4, "lora__dropout": 0.1}], ids=["all weights", "adapters"])
def test_stopped_and_resumed_is_the_unbroken_run_and_the_reference_is_computed_once(
    tmp_path: Path, base: Path, preferences: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dpo(tuning(tmp_path, "whole", base, preferences, **settings), show="nothing")
    dpo(tuning(tmp_path, "broken", base, preferences, **settings, train__total_steps=3), show="nothing")
    again = tuning(tmp_path, "broken", base, preferences, **settings, train__checkpoint_path="auto")

    def computed(*args: Any) -> Any:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceEngine, "log_probs", computed)
        dpo(again, show="nothing")
        (tmp_path / "whole" / "reference.json").write_text("{}")
        with pytest.raises(AssertionError, match="computed again"):
            dpo(tuning(tmp_path, "whole", base, preferences, **settings, train__checkpoint_path="auto"), show="nothing")
    equal(tmp_path / "whole", tmp_path / "broken")


def test_a_reference_lost_is_made_anew_from_the_base(tmp_path: Path, base: Path, preferences: Path) -> None:
    """Not from the weights that are trained by then."""
    for name in ("whole", "broken"):
        dpo(tuning(tmp_path, name, base, preferences, train__total_steps=3), show="nothing")
    (tmp_path / "broken" / "reference.json").unlink()
    for name in ("whole", "broken"):
        dpo(tuning(tmp_path, name, base, preferences, train__checkpoint_path="auto"), show="nothing")
    equal(tmp_path / "whole", tmp_path / "broken")


def test_another_run_is_refused_before_anything_is_computed_or_written(
    tmp_path: Path, base: Path, preferences: Path
) -> None:
    dpo(tuning(tmp_path, "run", base, preferences, train__total_steps=3), show="nothing")
    (tmp_path / "run" / "reference.json").unlink()
    again = tuning(tmp_path, "run", base, preferences, preference__loss="ipo", train__checkpoint_path="auto")
    with pytest.raises(UserError, match=r"preference.loss was sigmoid and is now ipo"):
        dpo(again, show="nothing")
    for key, old, new in (("beta", 0.1, 0.3), ("label_smoothing", 0.0, 0.2)):
        changed = {f"preference__{key}": new, "train__checkpoint_path": "auto"}
        with pytest.raises(UserError, match=f"preference.{key} was {old} and is now {new}"):
            dpo(tuning(tmp_path, "run", base, preferences, **changed), show="nothing")
    with FolderLock(tmp_path / "new"), pytest.raises(BlockingIOError, match="is writing here"):
        dpo(tuning(tmp_path, "new", base, preferences), show="nothing")
    for name in ("run", "new"):
        assert not (tmp_path / name / "reference.json").exists()


def test_a_budget_of_tokens_counts_both_answers(tmp_path: Path, base: Path, preferences: Path) -> None:
    """Four pairs a step, two sequences of 48 in each: 384 tokens."""
    budget = {"train__total_steps": LEFT_OUT, "train__token_budget": 1000}
    summary = dpo(tuning(tmp_path, "run", base, preferences, **budget), show="nothing")
    assert (summary["steps"], summary["tokens"]) == (3, 3 * 384)


def test_a_run_goes_on_with_fewer_pairs_than_workers(
    tmp_path: Path, base: Path, preferences: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory runs out for two pairs at once: one at a time, of which one worker has none, is the same run."""
    dpo(tuning(tmp_path, "whole", base, preferences, train__cpu_threads=1), show="nothing")
    step = PreferenceEngine.train_step

    def small(engine: PreferenceEngine, batch: Any, *args: Any) -> Any:
        assert engine.workers.count == 2
        if batch.inputs.shape[1] > 1:
            raise MemoryError
        return step(engine, batch, *args)

    monkeypatch.setattr(PreferenceEngine, "train_step", small)
    dpo(tuning(tmp_path, "halved", base, preferences, train__cpu_threads=2))
    assert "going on with train.micro_batch_size=1" in capsys.readouterr().err
    whole, halved = ([e["loss"] for e in events(tmp_path / name, "train")] for name in ("whole", "halved"))
    assert halved == pytest.approx(whole, rel=1e-3)


def test_equal_answers_are_counted_and_wrong_settings_refused(
    tmp_path: Path, base: Path, preferences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(tuning(tmp_path, "run", base, preferences))
    said = capsys.readouterr().err
    assert "60 rows read, 58 kept" in said and "pairs.jsonl:59" in said and "left out: 2" in said
    for overrides, match in (
        ({"train__backend": "torch"}, "torch has no preference tuning"),
        ({"chat__train_on": "all"}, "chat.train_on: is about conversations"),
        ({"chat__pack": False}, "chat.pack: is about conversations, not pairs of answers: leave it out"),
        ({"chat__format": "alpaca"}, "chat.format: is about conversations"),
        ({"chat__rouge_samples": 2}, "chat.rouge_samples: is about conversations"),
        ({"data__text_field": "content"}, "data.text_field: is about conversations"),
        ({"data__fallback": "builtin"}, "data.fallback: is about documents"),
        ({"train__trainable": "embeddings"}, r"train.trainable: is for training on documents \(pretrain\): leave it"),
        ({"train__first_sequence": 8}, "train.first_sequence: is for training on documents"),
        ({"preference__loss": "ipo", "preference__label_smoothing": 0.1}, "label_smoothing: is for preference.loss: s"),
        (
            {"preference__loss": "orpo", "preference__label_smoothing": 0.1},
            "label_smoothing: is for preference.loss: s",
        ),
    ):
        with pytest.raises(UserError, match=match):
            dpo(tuning(tmp_path, "other", base, preferences, **overrides), show="nothing")
    assert main(["dpo", str(tmp_path / "run.yaml"), "--dataset", str(tmp_path / "none.jsonl"), "train.save_dir=x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
