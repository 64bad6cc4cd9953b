"""Training with a teacher end to end: it helps, resumes exactly, and computes the predictions once."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.errors import UserError
from anarchobot.config.loading import load_config
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.sources.documents import Document
from anarchobot.data.teacher_cache import TeacherCache
from anarchobot.data.windows import Batch
from anarchobot.exchange.exporting import export
from anarchobot.preflight.plan import plan
from anarchobot.preflight.verify import verify
from anarchobot.storage.lock import FolderLock
from anarchobot.tasks import distillation
from anarchobot.tasks.distillation import fill_cache
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tasks.sft import sft
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.training.distillation_engine import Teacher
from tests.data.test_teacher_cache import K, Numbered, check, records
from tests.exchange.quantized_folder import quantize_folder
from tests.model.mlx_lm.families import CONFIGS, write_model
from tests.tasks.test_pretrain import assert_same_state
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import events, tuning
from tests.tiny import VOCAB, loaded, make_shards, write_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Larger than the students, and trained on the same shards."""
    folder = tmp_path_factory.mktemp("teacher")
    settings = {"model__d_model": 48, "model__n_layers": 2, "model__dropout": 0.0, "train__total_steps": 60}
    config = loaded(folder / "c.yaml", tiny_shards, folder / "run", train__eval_interval=60, **settings)
    pretrain(config, show="nothing")
    return folder / "run"


def student(folder: Path, name: str, shards: Path, teacher: Path | None, **settings: Any) -> dict[str, Any]:
    taught = {} if teacher is None else {"train__teacher": str(teacher)}
    config = loaded(folder / f"{name}.yaml", shards, folder / name, **taught, **settings)
    return pretrain(config, show="nothing")


def folders(run: Path) -> list[Path]:
    """The caches in a run."""
    return sorted((run / "teacher").iterdir())


def test_the_model_comes_close_to_its_teacher(tmp_path: Path, tiny_shards: Path, teacher: Path) -> None:
    settings = {"train__total_steps": 40, "train__eval_interval": 40, "distillation__weight": 1.0}
    student(tmp_path, "run", tiny_shards, teacher, model__dropout=0.0, **settings)
    steps, validations = events(tmp_path / "run", "train"), events(tmp_path / "run", "eval")
    assert steps[-1]["kl"] < 0.5 * steps[0]["kl"] and steps[-1]["loss"] == pytest.approx(steps[-1]["kl"])
    assert steps[-1]["cross_entropy"] > steps[-1]["kl"]
    assert validations[-1]["val_loss"] < validations[0]["val_loss"] - 0.3 and "val_kl" not in validations[-1]
    assert json.loads((folders(tmp_path / "run")[0] / "teacher.json").read_text())["top_k"] == 32


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, tiny_shards: Path, teacher: Path) -> None:
    """With dropout, through a cache that a longer run adds to."""
    settings = {"train__ema_decay": 0.9}
    student(tmp_path, "whole", tiny_shards, teacher, train__total_steps=6, **settings)
    student(tmp_path, "broken", tiny_shards, teacher, train__total_steps=3, train__lr_decay_steps=6, **settings)
    settings |= {"train__checkpoint_path": "auto", "train__lr_decay_steps": 6}
    student(tmp_path, "broken", tiny_shards, teacher, **settings)
    assert_same_state(tmp_path / "whole", tmp_path / "broken")
    (whole,), (broken,) = folders(tmp_path / "whole"), folders(tmp_path / "broken")
    assert whole.name == broken.name
    for name in ("ids.bin", "log_probs.bin", "checksums.npy", "teacher.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_predictions_are_computed_once_and_shared_by_seeds(
    tmp_path: Path, tiny_shards: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run of more than an epoch, every window once; another seed reads the same. A teacher, tokens per position or
    temperature that differ have another cache."""
    computed: list[int] = []
    top_log_probs = Teacher.top_log_probs

    def count(self: Teacher, batch: Batch) -> Any:
        computed.append(int((batch.targets >= 0).any(axis=1).sum()))
        return top_log_probs(self, batch)

    monkeypatch.setattr(Teacher, "top_log_probs", count)
    texts = [f"Document {i} of few, which are short." for i in range(60)]
    Pretokenizer(load_tokenizer(tiny_shards), tmp_path / "few", val_fraction=0.1).run(map(Document, texts))
    shared = {"distillation__cache_dir": str(tmp_path / "cache"), "train__grad_accum_steps": 12}
    shared |= {"train__eval_interval": 99, "train__ckpt_interval": 99}
    student(tmp_path, "first", tmp_path / "few", teacher, **shared)
    windows = sum(computed)
    assert 24 < windows == len(np.load(next((tmp_path / "cache").glob("*/checksums.npy")))) < 6 * 24
    computed.clear()
    student(tmp_path, "second", tmp_path / "few", teacher, train__seed=1, **shared)
    assert not computed and len(list((tmp_path / "cache").iterdir())) == 1
    other = tmp_path / "teacher"
    shutil.copytree(tmp_path / "first", other)
    for i, changed in enumerate(({"distillation__top_k": 3}, {"distillation__temperature": 2.0}, {})):
        student(tmp_path, f"run{i}", tmp_path / "few", teacher if changed else other, **(shared | changed))
        assert sum(computed) == windows * (i + 1) and len(list((tmp_path / "cache").iterdir())) == i + 2


def test_conversations_are_taught_only_where_they_count(
    tmp_path: Path, base: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed and not, with adapters; the teacher is tuned on the same conversations."""
    sft(tuning(tmp_path, "teacher", base, chats, train__total_steps=20), show="nothing")
    taught = {"train__teacher": str(tmp_path / "teacher"), "distillation__top_k": 7, "lora__r": 4}
    for pack in (True, False):
        name = f"run{pack}"
        sft(tuning(tmp_path, name, base, chats, chat__pack=pack, **taught))
        output = capsys.readouterr().err
        assert output.count("computing the predictions of") == 1 and "about 0:0" in output
        (folder,) = folders(tmp_path / name)
        loss_tokens = int(output.partition(" loss tokens;")[0].rpartition(" ")[2].replace(",", ""))
        assert (folder / "ids.bin").stat().st_size == loss_tokens * 7 * 2
        steps = events(tmp_path / name, "train")
        assert steps[-1]["kl"] < steps[0]["kl"]
        sft(tuning(tmp_path, name, base, chats, chat__pack=pack, **taught, train__checkpoint_path="auto"))
        assert "computing the predictions of" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["quantized", "experts"])
def test_a_model_has_no_divergence_from_itself(
    tmp_path: Path, base: Path, chats: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher whose weights are quantized, and one that mlx-lm computes, with which conversations are not packed."""
    export(base, "mlx", tmp_path / "floats")
    if kind == "quantized":
        folder = quantize_folder(tmp_path / "floats", tmp_path / "packed", bits=4, group_size=32)
    else:
        folder = tmp_path / "floats"
        write_model(folder, {**CONFIGS[kind], "vocab_size": VOCAB})
    settings = {"lora__r": 4, "train__total_steps": 3, "train__teacher": str(folder)}
    sft(tuning(tmp_path, "run", folder, chats, **settings))
    steps = events(tmp_path / "run", "train")
    assert 0 <= steps[0]["kl"] < 1e-5 < steps[-1]["kl"]
    assert ("chat.pack is off" in capsys.readouterr().err) == (kind == "experts")


def test_a_resumed_run_keeps_its_teacher_and_settings(
    tmp_path: Path, tiny_shards: Path, teacher: Path, base: Path
) -> None:
    student(tmp_path, "run", tiny_shards, teacher, train__total_steps=3)
    student(tmp_path, "alone", tiny_shards, None, train__total_steps=3)
    again = {"train__checkpoint_path": "auto"}
    for name, other, settings, match in (
        ("run", base, {}, r"started with different teacher from those in .*: set train.teacher to the original"),
        ("run", None, {}, "started with different teacher"),
        ("alone", teacher, {}, "started without a teacher: remove train.teacher"),
        ("run", teacher, {"distillation__weight": 0.7}, "distillation.weight was 0.5 and is now 0.7"),
        ("run", teacher, {"distillation__loss": "reverse_kl"}, "distillation.loss was forward_kl and is now"),
        ("run", teacher, {"distillation__temperature": 2.0}, "distillation.temperature was 1.0 and is now 2.0"),
        ("run", teacher, {"distillation__top_k": 3}, "distillation.top_k was 32 and is now 3"),
    ):
        with pytest.raises(UserError, match=match) as error:
            student(tmp_path, name, tiny_shards, other, **again, **settings)
        assert "\n" not in str(error.value)
    assert len(folders(tmp_path / "run")) == 1
    moved = shutil.move(teacher, tmp_path / "moved")
    try:
        student(tmp_path, "run", tiny_shards, moved, **again)
    finally:
        shutil.move(moved, teacher)


def test_torch_has_no_distillation(tmp_path: Path, tiny_shards: Path, teacher: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=r"torch has no distillation: remove train\.teacher"):
        student(tmp_path, "run", tiny_shards, teacher, train__backend="torch")


def test_unusable_teachers_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_shards: Path, teacher: Path, base: Path, chats: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = make_shards(tmp_path / "other", megabytes=0.09)
    student(tmp_path, "foreign", other, None, train__total_steps=1)
    short = {"model__max_seq_len": 32, "train__total_steps": 1}
    student(tmp_path, "short", tiny_shards, None, **short)
    for path, settings, match in (
        (tmp_path / "foreign", {}, "train.teacher: the tokenizer of .* is not that of the model .*same tokenizer"),
        (
            tmp_path / "short",
            {"data__seq_len": 64},
            r"data.seq_len: 64, but .*short.* reads at most 32 tokens: lower it",
        ),
        (tmp_path / "none", {}, "none: no such folder"),
    ):
        with pytest.raises(UserError, match=match) as error:
            student(tmp_path, "run", tiny_shards, path, **settings)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "detect_launcher", lambda: "ring")
        with pytest.raises(UserError, match="a run with a teacher is a single process: start it without launch"):
            student(tmp_path, "run", tiny_shards, teacher)
    for settings, match in (
        ({"distillation__weight": 0.7}, "distillation.weight: has no effect without train.teacher"),
        ({"distillation__top_k": VOCAB + 1, "train__teacher": str(teacher)}, r"top_k \(385\) must be at most"),
    ):
        with pytest.raises(UserError, match=match):
            loaded(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **settings)
    tuning(tmp_path, "dpo", base, chats, train__teacher=str(teacher))
    assert main(["dpo", str(tmp_path / "dpo.yaml")]) == 2
    assert "train.teacher: applies only to pretrain and sft: remove it" in capsys.readouterr().err


def test_another_process_and_a_full_disk_end_the_run_in_one_line(
    tmp_path: Path, tiny_shards: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student(tmp_path, "run", tiny_shards, teacher, train__total_steps=3)
    (folder,) = folders(tmp_path / "run")
    settings = {"distillation__cache_dir": str(tmp_path / "cache")}
    with FolderLock(tmp_path / "cache" / folder.name), pytest.raises(BlockingIOError, match="is writing here"):
        student(tmp_path, "other", tiny_shards, teacher, **settings)

    def full(folder: Path, size: int) -> None:
        raise OSError(28, f"{size} bytes needed")

    monkeypatch.setattr(distillation, "require_space", full)
    with pytest.raises(OSError, match=f"{6 * 4 * 32 * 130} bytes needed"):
        student(tmp_path, "third", tiny_shards, teacher)


def test_verify_and_plan_know_the_teacher(
    tmp_path: Path, tiny_shards: Path, teacher: Path, base: Path, chats: Path
) -> None:
    values = {"train__teacher": str(teacher), "model__sliding_window": 32}
    path = write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", **values)
    checks = {check.name: check for check in verify(str(path), calibrate=False)}
    assert checks["model and data"].status == "pass" and "130 bytes per token cached" in checks["model and data"].found
    assert plan(load_config(path))["teacher_cache_bytes"] == 6 * 4 * 32 * 130
    config = loaded(tmp_path / "long.yaml", tiny_shards, tmp_path / "run", train__total_steps=9999)
    assert plan(config)["teacher"] is plan(config)["teacher_cache_bytes"] is None
    taught = loaded(
        tmp_path / "long.yaml", tiny_shards, tmp_path / "run", train__total_steps=9999, train__teacher=str(teacher)
    )
    assert 6 * 4 * 32 < plan(taught)["teacher_cache_bytes"] / 130 < 9999 * 4 * 32  # at most the shards
    tuning(tmp_path, "sft", base, chats, train__teacher=str(teacher))
    checks = {check.name: check for check in verify(str(tmp_path / "sft.yaml"), ["chat.pack=true"], calibrate=True)}
    assert "130 bytes per token cached" in checks["configuration"].found and checks["time"].status == "pass"
    other = make_shards(tmp_path / "other", megabytes=0.09)
    student(tmp_path, "foreign", other, None, train__total_steps=1)
    path = write_config(tmp_path / "c.yaml", tiny_shards, tmp_path / "run", train__teacher=str(tmp_path / "foreign"))
    checks = {check.name: check for check in verify(str(path), calibrate=False)}
    assert checks["model and data"].status == "fail" and "the tokenizer of" in checks["model and data"].found


# Filling the cache


class FakeTeacher:
    """Predicts what `records` of Numbered gives. Raises MemoryError above `most` windows, KeyboardInterrupt after
    `calls`."""

    def __init__(self, most: int = 99, calls: int = 99) -> None:
        self.most, self.calls, self.sizes = most, calls, list[int]()

    def top_log_probs(self, batch: Batch) -> Any:
        self.sizes.append(len(batch.inputs))
        if len(batch.inputs) > self.most:
            raise MemoryError
        if len(self.sizes) > self.calls:
            raise KeyboardInterrupt
        real = (batch.targets >= 0).any(axis=1)
        return records(Numbered(999), batch.inputs[real, 0].astype(np.int64))


def fill(folder: Path, teacher: FakeTeacher, **calls: Any) -> TeacherCache:
    windows = Numbered(21)
    cache = TeacherCache(folder, windows, K, 2**16)
    fill_cache(cache, teacher, windows, cache.missing(np.arange(21)), 4, **calls)  # type: ignore[arg-type]
    batch = cache.read(np.arange(21), windows.rows(np.arange(21)))
    check(batch, windows, np.arange(21))
    return cache


def test_an_interrupted_cache_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, FakeTeacher(calls=3))
    teacher, counts, seconds = FakeTeacher(), list[int](), list[float]()
    fill(tmp_path, teacher, progress=counts.append, announce=seconds.append)
    assert teacher.sizes == [4, 4, 4] and counts == [4, 4, 1] and len(seconds) == 1
    fill(tmp_path, FakeTeacher(calls=0))


def test_out_of_memory_lowers_the_batch_size_then_fails_in_one_line(tmp_path: Path) -> None:
    teacher, log = FakeTeacher(most=2), list[str]()
    (tmp_path / "a").mkdir()
    fill(tmp_path / "a", teacher, log=log.append)
    assert set(teacher.sizes[1:]) == {2} and log == ["out of memory: continuing with batches of 2 sequences"]
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"predictions for one sequence: lower data.seq_len") as error:
        fill(tmp_path / "b", FakeTeacher(most=0))
    assert "\n" not in str(error.value)
