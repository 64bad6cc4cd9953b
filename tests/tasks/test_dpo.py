"""Preference tuning end to end: it learns, resumes exactly and computes reference log-probabilities once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.data.conversations.preference_pairs import PairBatch, PairDataset
from anarchobot.data.conversations.tokenized import TokenTable
from anarchobot.storage.lock import FolderLock
from anarchobot.tasks import dpo as dpo_task
from anarchobot.tasks.dpo import compute_ref_log_probs, dpo
from anarchobot.tokenizers.chat_encoder import Encoded
from anarchobot.training.preference_engine import PreferenceEngine
from tests.ranks import TIMEOUT
from tests.tasks.test_pretrain import assert_same_state
from tests.tasks.tuning import base as base
from tests.tasks.tuning import events, tuning
from tests.tasks.tuning import labeled as labeled
from tests.tasks.tuning import preferences as preferences
from tests.tiny import LEFT_OUT


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora__r": 4},
        {"preference__loss": "ipo"},
        {"preference__loss": "orpo"},
        {"preference__loss": "simpo", "preference__beta": 2.0},
    ],
    ids=str,
)
def test_model_learns_preferences(tmp_path: Path, base: Path, preferences: Path, settings: dict[str, Any]) -> None:
    summary = dpo(tuning(tmp_path, "run", base, preferences, train__total_steps=30, **settings), show="nothing")
    first, *_, last = events(tmp_path / "run", "eval")
    if "preference__loss" not in settings:
        assert first["val_loss"] == pytest.approx(np.log(2), abs=1e-6) and first["val_reward_margin"] == 0.0
    assert last["val_loss"] < first["val_loss"] and last["val_reward_accuracy"] > 0.9
    no_reference = settings.get("preference__loss") in ("simpo", "orpo")
    assert (tmp_path / "run" / "reference.json").exists() != no_reference
    gap = [e["val_chosen_log_prob"] - e["val_rejected_log_prob"] for e in (first, last)]
    assert gap[1] > gap[0]
    line = events(tmp_path / "run", "train")[-1]
    assert line["reward_margin"] > 0 and "val_bpb" not in last
    assert summary["best_val_loss"] == min(e["val_loss"] for e in events(tmp_path / "run", "eval"))


def test_model_learns_from_labeled_answers(
    tmp_path: Path, base: Path, labeled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(tuning(tmp_path, "run", base, labeled, train__total_steps=30, preference__loss="kto"))
    output = capsys.readouterr().err
    assert "60 rows read, 58 kept" in output and "labeled.jsonl:59: label is not" in output
    assert "training answers" in output and "set preference.desirable_weight between" in output
    first, *_, last = events(tmp_path / "run", "eval")
    assert first["val_loss"] == pytest.approx(0.5, abs=1e-6) and first["val_kl"] == pytest.approx(0.0, abs=1e-4)
    assert last["val_loss"] < first["val_loss"] and last["val_reward_accuracy"] > 0.9
    assert last["val_desirable_reward"] > 0 > last["val_undesirable_reward"] and last["val_reward_margin"] > 0
    steps = events(tmp_path / "run", "train")
    assert all("kl" in e for e in steps) and any("reward_margin" in e for e in steps)


def test_pairs_give_two_labeled_answers_each(
    tmp_path: Path, base: Path, preferences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"preference__loss": "kto", "data__val_fraction": 0.0, "train__total_steps": 1}
    dpo(tuning(tmp_path, "run", base, preferences, **settings))
    output = capsys.readouterr().err
    assert "60 rows read, 58 kept" in output and "116 training answers, 0 held out; 58 desirable" in output
    assert "set preference.desirable_weight" not in output


def test_labeled_answers_need_kto(tmp_path: Path, base: Path, labeled: Path) -> None:
    with pytest.raises(UserError, match=r"no row has the fields of a preference: .* preference.loss: kto"):
        dpo(tuning(tmp_path, "run", base, labeled), show="nothing")


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora__r": 4, "lora__dropout": 0.1}, {"preference__loss": "kto", "train__ema_decay": 0.9}],
    ids=["all weights", "adapters", "kto"],
)
def test_resumed_run_equals_uninterrupted_run_and_reuses_ref_log_probs(
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
    assert_same_state(tmp_path / "whole", tmp_path / "broken")


def test_lost_ref_log_probs_are_recomputed_from_the_base(tmp_path: Path, base: Path, preferences: Path) -> None:
    """Not from the weights trained so far."""
    for name in ("whole", "broken"):
        dpo(tuning(tmp_path, name, base, preferences, train__total_steps=3), show="nothing")
    (tmp_path / "broken" / "reference.json").unlink()
    for name in ("whole", "broken"):
        dpo(tuning(tmp_path, name, base, preferences, train__checkpoint_path="auto"), show="nothing")
    assert_same_state(tmp_path / "whole", tmp_path / "broken")


def test_changed_settings_are_rejected_before_anything_is_computed_or_written(
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


def test_token_budget_counts_both_answers(tmp_path: Path, base: Path, preferences: Path) -> None:
    """Four pairs per step, each with two sequences of 48: 384 tokens."""
    budget = {"train__total_steps": LEFT_OUT, "train__token_budget": 1000}
    summary = dpo(tuning(tmp_path, "run", base, preferences, **budget), show="nothing")
    assert (summary["steps"], summary["tokens"]) == (3, 3 * 384)


def test_run_continues_with_fewer_pairs_than_workers(
    tmp_path: Path, base: Path, preferences: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After running out of memory with two pairs, batches of one leave one worker idle but give the same run."""
    dpo(tuning(tmp_path, "whole", base, preferences, train__cpu_threads=1), show="nothing")
    step = PreferenceEngine.train_step

    def small(engine: PreferenceEngine, batch: Any, *args: Any) -> Any:
        assert engine.workers.count == 2
        if batch.inputs.shape[1] > 1:
            raise MemoryError
        return step(engine, batch, *args)

    monkeypatch.setattr(PreferenceEngine, "train_step", small)
    dpo(tuning(tmp_path, "halved", base, preferences, train__cpu_threads=2))
    assert "train.micro_batch_size=1" in capsys.readouterr().err
    whole, halved = ([e["loss"] for e in events(tmp_path / name, "train")] for name in ("whole", "halved"))
    assert halved == pytest.approx(whole, rel=1e-3)


def test_identical_answers_are_counted_and_unused_settings_rejected(
    tmp_path: Path, base: Path, preferences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(tuning(tmp_path, "run", base, preferences))
    output = capsys.readouterr().err
    assert "60 rows read, 58 kept" in output and "pairs.jsonl:59" in output and "skipped 2" in output
    for overrides, match in (
        ({"train__backend": "torch"}, "torch has no preference tuning"),
        ({"chat__train_on": "all"}, "chat.train_on: applies only to sft"),
        ({"chat__pack": False}, "chat.pack: applies only to sft: remove it"),
        ({"chat__format": "alpaca"}, "chat.format: applies only to sft"),
        ({"chat__rouge_samples": 2}, "chat.rouge_samples: applies only to sft"),
        ({"data__text_field": "content"}, "data.text_field: applies only to sft"),
        ({"data__fallback": "builtin"}, "data.fallback: applies to documents"),
        ({"train__trainable": "embeddings"}, "train.trainable: applies only to pretrain: remove it"),
        ({"train__first_sequence": 8}, "train.first_sequence: applies only to pretrain"),
        (
            {"preference__loss": "ipo", "preference__label_smoothing": 0.1},
            "label_smoothing: applies only to preference.loss: s",
        ),
        (
            {"preference__loss": "orpo", "preference__label_smoothing": 0.1},
            "label_smoothing: applies only to preference.loss: s",
        ),
        ({"preference__simpo_gamma": 0.1}, "preference.simpo_gamma: applies only to preference.loss: simpo: remove it"),
        ({"preference__desirable_weight": 2.0}, "preference.desirable_weight: applies only to preference.loss: kto"),
        ({"preference__cpo_alpha": 0.1}, "preference.cpo_alpha: applies only to preference.loss: cpo: remove it"),
    ):
        with pytest.raises(UserError, match=match):
            dpo(tuning(tmp_path, "other", base, preferences, **overrides), show="nothing")
    assert main(["dpo", str(tmp_path / "run.yaml"), "--dataset", str(tmp_path / "none.jsonl"), "train.save_dir=x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_two_ranks_equal_one_process(tmp_path: Path, base: Path, labeled: Path) -> None:
    """With half the accumulation, and KTO, which also exchanges the KL divergence: same reference, same log."""
    settings = {"preference__loss": "kto", "train__cpu_threads": 1, "train__total_steps": 3}
    dpo(tuning(tmp_path, "one", base, labeled, **settings), show="nothing")
    tuning(tmp_path, "two", base, labeled, **settings, train__grad_accum_steps=1)
    words = ["launch", "-n", "2", "--", "dpo", str(tmp_path / "two.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", "anarchobot", *words], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("computing reference log-probabilities") == 1
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "reference.json").read_bytes() == (two / "reference.json").read_bytes()
    ignored = {"event", "time", "tokens_per_second", "peak_memory_gb", "active_memory_gb", "cache_memory_gb", "tflops"}
    for event in ("train", "eval"):
        for a, b in zip(events(one, event), events(two, event), strict=True):
            assert {k: b[k] for k in b.keys() - ignored} == pytest.approx(
                {k: a[k] for k in a.keys() - ignored}, rel=1e-4, abs=1e-5
            )


# Reference log-probabilities


def numbered_pairs(count: int, first: int) -> PairDataset:
    """The answers of pair n are the tokens n + first, 1 and n + first, 2."""
    sides = (
        TokenTable.from_encoded(
            (Encoded(np.array([n + first, side]), np.array([False, True])) for n in range(count)), 99
        )
        for side in (1, 2)
    )
    return PairDataset(*sides, seq_len=1, pad_id=0)


class FakeEngine:
    """log_prob = -10 * input - target. Raises MemoryError above `max_pairs` pairs, KeyboardInterrupt after `calls`."""

    def __init__(self, max_pairs: int = 99, calls: int = 99) -> None:
        self.max_pairs, self.calls, self.batch_sizes = max_pairs, calls, list[int]()

    def log_probs(self, batch: PairBatch) -> Any:
        self.batch_sizes.append(batch.inputs.shape[1])
        if batch.inputs.shape[1] > self.max_pairs:
            raise MemoryError
        if len(self.batch_sizes) > self.calls:
            raise KeyboardInterrupt
        return (-10 * batch.inputs - batch.targets)[..., 0].astype(np.float32)


SPLITS = (numbered_pairs(7, 10), numbered_pairs(4, 50))
EXPECTED = [np.array([[-10 * (n + first) - 1, -10 * (n + first) - 2] for n in range(count)], np.float32)
          for count, first in ((7, 10), (4, 50))]  # fmt: skip


def check_log_probs(
    engine: FakeEngine, folder: Path, batch_size: int = 2, key: str = "m", log: list[str] | None = None
) -> None:
    lines = log if log is not None else []
    values = compute_ref_log_probs(engine, SPLITS, folder, key, batch_size, lines.append)  # type: ignore[arg-type]
    for actual, expected in zip(values, EXPECTED, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_ref_log_probs_are_computed_once_and_cached(tmp_path: Path) -> None:
    engine, log = FakeEngine(), list[str]()
    check_log_probs(engine, tmp_path, log=log)
    assert engine.batch_sizes == [2] * 6 and log == ["computing reference log-probabilities of 11 pairs"]
    check_log_probs(FakeEngine(calls=0), tmp_path, log=log)
    assert len(log) == 1
    with pytest.raises(KeyboardInterrupt):
        check_log_probs(FakeEngine(calls=0), tmp_path, key="another")
    (tmp_path / "reference.json").write_text("{}")
    check_log_probs(engine, tmp_path)


def test_ref_log_probs_are_computed_from_the_longest_to_the_shortest(tmp_path: Path) -> None:
    """The answers of pair n are n + 1 and 9 - n tokens n; the pairs keep their order in the result."""
    sides = (
        [Encoded(np.full(length + 1, n), np.arange(length + 1) > 0) for n, length in enumerate(lengths)]
        for lengths in (range(1, 9), range(9, 1, -1))
    )
    pairs = PairDataset(*(TokenTable.from_encoded(side, 99) for side in sides), seq_len=10, pad_id=0)
    batches: list[list[int]] = []

    class Engine:
        def log_probs(self, batch: PairBatch) -> Any:
            batches.append(batch.indices[0].tolist())
            return -np.count_nonzero(batch.targets >= 0, axis=-1).astype(np.float32)

    for _ in range(2):  # the second time from the cache
        (values,) = compute_ref_log_probs(Engine(), [pairs], tmp_path, "m", 3)  # type: ignore[arg-type]
        np.testing.assert_array_equal(values, [[-n - 1, n - 9] for n in range(8)])
    assert batches == [[0, 1, 7], [2, 6, 3], [5, 4, -1]]


def test_ref_log_probs_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_task, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        check_log_probs(FakeEngine(calls=5), tmp_path)
    rest, log = FakeEngine(), list[str]()
    check_log_probs(rest, tmp_path, log=log)
    assert len(rest.batch_sizes) == 1
    assert log == ["computing reference log-probabilities of 2 pairs", "11 of 11 pairs"]


def test_ref_log_probs_report_their_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_task, "SAVE_SECONDS", 0.0)
    counts: list[int] = []

    def compute(calls: int) -> None:
        compute_ref_log_probs(FakeEngine(calls=calls), SPLITS, tmp_path, "m", 2, progress=counts.append)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        compute(5)
    assert counts == [0, 2, 2, 2, 1, 2]
    counts.clear()
    compute(9)
    assert counts == [9, 2]


def test_ref_log_probs_out_of_memory_lowers_the_batch_size_then_fails_in_one_line(tmp_path: Path) -> None:
    engine, log = FakeEngine(max_pairs=2), list[str]()
    check_log_probs(engine, tmp_path, batch_size=5, log=log)
    assert engine.batch_sizes == [5, 3, 2, 2, 2, 2, 2, 2]
    assert log[1:] == [
        "out of memory: continuing with batches of 3 pairs",
        "out of memory: continuing with batches of 2 pairs",
    ]
    with pytest.raises(UserError, match=r"out of memory .* of one pair") as error:
        check_log_probs(FakeEngine(max_pairs=0), tmp_path, key="another")
    assert "\n" not in str(error.value)
