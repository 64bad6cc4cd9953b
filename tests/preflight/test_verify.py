"""Each broken setup has one fault: the check that owns it reports it, no other check does, and its advice helps."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from anarchobot.cli.main import main
from anarchobot.config.loading import load_config
from anarchobot.config.schema import DataConfig
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.sources.documents import Document
from anarchobot.preflight import data as preflight_data
from anarchobot.preflight.check import CheckResult
from anarchobot.preflight.verify import verify
from anarchobot.storage.lock import FolderLock
from anarchobot.system.memory import estimate
from anarchobot.system.packages import installed_version
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.tiny import VOCAB, loaded, make_shards, write_config

ROOT = Path(__file__).parents[2]
# What the checks read from the machine, in anarchobot.preflight.
MACHINE: dict[str, Callable[..., Any]] = {
    "run.load_fast_blas": lambda: "OpenBLAS",
    "run.blas_warning": lambda: "",
    "run.system_memory": lambda: SimpleNamespace(total=8 * 10**9),
    "run.disk_usage": lambda folder: SimpleNamespace(free=10**9),
}


class Broken:
    """A valid setup in its own folder, to be broken by a test. `values` is the configuration."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards, self.config = folder, folder / "shards", folder / "c.yaml"
        shutil.copytree(shards, self.shards)
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({"text": f"Text number {i}."}) + "\n" for i in range(9)))
        self.tokenizer = self.shards / "made.model"
        write_config(
            self.config, self.shards, folder / "run",
            data__dataset=str(self.rows), train__tokenizer_path=str(self.tokenizer), model__max_seq_len=32,
        )  # fmt: skip
        self.values: dict[str, Any] = yaml.safe_load(self.config.read_text())
        self.text: str | None = None  # replaces the values
        self.machine = dict(MACHINE)

    def verify(self, *words: str, calibrate: bool = False) -> list[CheckResult]:
        if self.text is not None:
            self.config.write_text(self.text)
        elif self.values:
            self.config.write_text(yaml.safe_dump(self.values))
        else:
            self.config.unlink()
        with pytest.MonkeyPatch.context() as patch:
            for name, function in self.machine.items():
                patch.setattr(f"anarchobot.preflight.{name}", function)
            return verify(str(self.config), words, calibrate=calibrate)

    def set(self, **values: Any) -> None:
        """`train__lr=1`."""
        for name, value in values.items():
            section, key = name.split("__")
            self.values.setdefault(section, {})[key] = value

    def retokenize(self, texts: list[str], val_fraction: float = 0.2) -> None:
        """Replaces the shards by others, made with the same tokenizer."""
        tokenizer = load_tokenizer(self.tokenizer)
        self.set(data__shard_dir=str(self.folder / "few"))
        documents = map(Document, texts)
        Pretokenizer(tokenizer, self.folder / "few", val_fraction).run(documents)

    def train(self, **values: Any) -> None:
        """Finishes a run in the folder."""
        pretrain(loaded(self.folder / "run.yaml", self.shards, self.folder / "run", **values), show="nothing")

    def without(self, package: str, version: str | None = None) -> None:
        self.machine["installation.installed_version"] = lambda name: (
            version if name == package else installed_version(name)
        )


@pytest.fixture
def setup(tmp_path: Path, tiny_shards: Path) -> Broken:
    return Broken(tmp_path, tiny_shards)


def _flip_a_bit(b: Broken) -> None:
    file = b.shards / "train_00000.npy"
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 1
    file.write_bytes(raw)


def _other_tokenizer(b: Broken) -> None:
    """A tokenizer of the same size, trained on other text."""
    other = make_shards(b.folder / "other", megabytes=0.09)
    b.set(train__tokenizer_path=str(other / "made.model"))


def _larger_tokenizer(b: Broken) -> None:
    b.set(train__tokenizer_path=str(make_shards(b.folder / "other", vocab_size=VOCAB + 16) / "made.model"))


def _file_in_place_of_a_folder(b: Broken) -> None:
    (b.folder / "run").write_text("")
    b.set(train__save_dir=str(b.folder / "run" / "here"))


def _resumed_with_another_model(b: Broken) -> None:
    b.train()
    b.set(train__checkpoint_path="auto", model__d_model=64)


def _resumed_with_other_shards(b: Broken) -> None:
    b.train()
    b.retokenize([f"Text number {i} of many." for i in range(999)])
    b.set(train__checkpoint_path="auto")


# Fault: how to break the setup, the check that finds it, its status, a part of its finding, a part of its advice.
FAULTS: dict[str, tuple[Callable[[Broken], Any], str, str, str, str]] = {
    "no YAML": (lambda b: setattr(b, "text", "model: [3"), "configuration", "fail", "c.yaml:", "docs/configuration"),
    "unknown key": (lambda b: b.set(train__learning_rate=1), "configuration", "fail",
                          "train.learning_rate: unknown key", "c.yaml"),
    "text instead of a number": (lambda b: b.set(train__lr="fast"), "configuration", "fail",
                              "train.lr: expected a number", "c.yaml"),
    "no config file": (lambda b: b.values.clear(), "configuration", "fail", "no such file", "c.yaml"),
    "heads do not divide d_model": (lambda b: b.set(model__n_heads=3), "configuration", "fail", "d_model (32) must be",
                            "c.yaml"),
    "sequences too long": (lambda b: b.set(data__seq_len=65), "configuration", "fail", "model.max_seq_len", "c.yaml"),
    "lr rises to its end": (lambda b: b.set(train__min_lr=1), "configuration", "fail", "min_lr (1) must be at most lr",
                            "c.yaml"),
    "LoRA without a model": (lambda b: b.set(lora__r=8, data__shard_dir=str(b.shards)), "required fields", "fail",
                         "lora.r", "train.init_from"),
    "neither shards nor text": (lambda b: b.set(data__shard_dir="none", data__dataset=None, train__tokenizer_path=None),
                              "required fields", "fail", "without data.dataset", "train.tokenizer_path"),
    "no such dataset": (lambda b: b.rows.unlink(), "dataset", "fail", "rows.jsonl: no such file", "data.dataset"),
    "no such field": (lambda b: b.set(data__text_field="body"), "dataset", "fail", "no field 'body' (it has text)",
                      "data.text_field"),
    "an empty dataset": (lambda b: b.rows.write_text(""), "dataset", "fail", "empty", "data.dataset"),
    "all documents too short": (lambda b: b.set(data__min_chars=99), "dataset", "fail", "filtered 9", "data.min_chars"),
    "a broken row": (lambda b: b.rows.write_text(b.rows.read_text() + "{\n"), "dataset", "warn", "1 of the first 10",
                     "data.dataset"),
    "no tokenizer": (lambda b: b.set(train__tokenizer_path=str(b.folder / "none.model")), "tokenizer", "fail",
                     "no such tokenizer", "anarchobot tokenizer train"),
    "another vocab_size": (_larger_tokenizer, "tokenizer", "fail", "384, but", f"set model.vocab_size: {VOCAB + 16}"),
    "another tokenizer": (_other_tokenizer, "model and data", "fail", "not the tokenizer of the shards",
                          "anarchobot pretokenize"),
    "no shards": (lambda b: b.set(data__shard_dir=str(b.folder / "none")), "shards", "fail", "no token shards",
                  "anarchobot pretokenize"),
    "no manifest": (lambda b: (b.shards / "manifest.json").unlink(), "shards", "fail", "no manifest.json",
                    "anarchobot pretokenize"),
    "a damaged manifest": (lambda b: (b.shards / "manifest.json").write_text("{"), "shards", "fail", "damaged",
                           "anarchobot pretokenize"),
    "a damaged shard": (_flip_a_bit, "shards", "fail", "train_00000.npy: content differs from the manifest",
                        "--restart"),
    "a shard is gone": (lambda b: (b.shards / "val_00000.npy").unlink(), "shards", "fail", "val_00000", "--restart"),
    "fewer tokens than a sequence": (lambda b: b.retokenize(["Few words."], 0), "model and data", "fail",
                             "fewer than one sequence", "pretokenize"),
    "no validation": (lambda b: b.retokenize(["Many words. " * 999], 0), "model and data", "warn", "validation split",
                      "data.val_fraction"),
    "step larger than the data": (
        lambda b: b.set(train__micro_batch_size=999, train__total_steps=2, train__warmup_steps=1),
        "model and data", "warn", "1,998 sequences", "train.micro_batch_size",
    ),
    "many epochs": (lambda b: b.set(train__total_steps=9_999), "schedule", "warn", "epochs: beyond 4,",
                    "steps are one epoch"),
    "a file in place of a folder": (_file_in_place_of_a_folder, "save_dir", "fail", "is a file", "train.save_dir"),
    "folder holds a run": (lambda b: b.train(), "save_dir", "fail", "a run, at step 6",
                         "--resume-from auto"),
    "resumed with another model": (_resumed_with_another_model, "resumed run", "fail",
                               "model.d_model was 32 and is now 64", "config.yaml"),
    "resumed with other shards": (_resumed_with_other_shards, "resumed run", "fail", "different shards",
                                  "train.save_dir"),
    "distances that are not trained": (lambda b: b.set(model__max_seq_len=64), "model and data", "warn",
                                       "will write poorly after 32 tokens", "model.sliding_window: 32"),
    "warmup exceeds the run": (lambda b: b.set(train__warmup_steps=6), "schedule", "warn", "never reaches its peak",
                            "train.warmup_steps"),
    "the decay ends early": (lambda b: b.set(train__lr_decay_steps=4), "schedule", "warn", "min_lr for the last 2",
                             "train.lr_decay_steps"),
    "the decay ends late": (lambda b: b.set(train__lr_decay_steps=9), "schedule", "warn", "never reaches min_lr",
                            "train.lr_decay_steps"),
    "float16 on a CPU": (lambda b: b.set(train__precision="float16"), "device", "warn", "float16", "train.precision"),
    "a small disk": (lambda b: b.machine.update({"run.disk_usage": lambda folder: SimpleNamespace(free=10**6)}),
                     "disk space", "fail", "5 checkpoints", "train.ckpt_keep"),
    "little memory": (lambda b: b.machine.update({"run.system_memory": lambda: SimpleNamespace(total=10**5)}), "memory",
                      "fail", "estimated peak", "train.micro_batch_size"),
    "auto does not fit": (lambda b: b.set(train__micro_batch_size="auto", train__memory_budget_gb=1e-6), "memory",
                           "fail", "one sequence needs", "data.seq_len"),
    "no fast BLAS": (lambda b: b.machine.update({"run.blas_warning": lambda: "15 times slower: sudo apt install it"}),
                     "BLAS", "warn", "times slower", "apt install"),
    "an old Python": (lambda b: b.machine.update({"installation.python_version": lambda: "3.10.4"}), "Python", "fail",
                      "3.10.4", ".venv"),
    "a package is missing": (lambda b: b.without("rich"), "packages", "fail", "rich>=13.9 is missing", "pip install"),
    "a package is old": (lambda b: b.without("numpy", "1.26.4"), "packages", "fail", "1.26.4 is installed",
                         "pip install"),
    "no PyTorch": (lambda b: (b.set(train__backend="torch"), b.without("torch")), "optional packages", "fail",
                   "torch>=", "anarchobot[torch]"),
    "no wandb": (lambda b: (b.set(train__log_to="wandb"), b.without("wandb")), "optional packages", "fail",
                 "wandb>=", "anarchobot[wandb]"),
}  # fmt: skip


def problems(checks: list[CheckResult]) -> dict[str, CheckResult]:
    return {check.name: check for check in checks if check.status in ("warn", "fail")}


def test_valid_setup_passes_and_predicts_its_time(setup: Broken) -> None:
    checks = setup.verify(calibrate=True)
    assert {check.status for check in checks} == {"pass"} and len(checks) == 17
    found = {check.name: check.found for check in checks}
    assert "'Text number 0.'; 'Text number 1.'" in found["dataset"]
    assert "for 6 steps" in found["time"] and "tokens/s" in found["time"]
    assert not (setup.folder / "run").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_by_its_check_alone(fault: str, setup: Broken) -> None:
    break_it, name, status, said, advice = FAULTS[fault]
    break_it(setup)
    checks = setup.verify()
    (found,) = problems(checks).values()
    assert (found.name, found.status) == (name, status)
    assert said in found.found
    assert advice in found.advice
    assert all(check.found for check in checks)
    if status == "warn":
        assert [check.name for check in checks if check.status == "skip"] == ["time"]


def test_a_peak_above_the_recommended_memory_is_a_warning(setup: Broken) -> None:
    """Three quarters of a machine's memory."""
    peak = estimate(load_config(setup.config).config).peak
    for total, status in ((peak / 0.74, "pass"), (peak / 0.76, "warn"), (peak / 1.01, "fail")):
        setup.machine["run.system_memory"] = lambda total=total: SimpleNamespace(total=int(total))
        (found,) = [check for check in setup.verify() if check.name == "memory"]
        assert found.status == status


def test_auto_reports_the_chosen_micro_batch(setup: Broken) -> None:
    checks = setup.verify("train.micro_batch_size=auto", "train.grad_accum_steps=6")
    (memory,) = [check for check in checks if check.name == "memory"]
    assert memory.status == "pass" and memory.found.startswith("micro_batch_size auto: 6 x 1 sequences per step")


def test_the_process_writing_to_the_folder_is_named(setup: Broken) -> None:
    with FolderLock(setup.folder / "run"):
        (found,) = problems(setup.verify()).values()
    assert found.name == "save_dir" and "is writing here" in found.found and "wait until it ends" in found.advice


def test_missing_library_is_a_failed_check_and_not_a_crash(setup: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("packaging.specifiers", "packaging.requirements"):  # both: either may have been imported before
        monkeypatch.setitem(sys.modules, name, None)
    found = problems(setup.verify())
    assert list(found) == ["Python", "packages"]
    for check in found.values():
        assert "packaging" in check.found and check.advice.startswith("pip install")


def test_checks_that_depend_on_a_failed_one_are_skipped(setup: Broken) -> None:
    setup.set(data__shard_dir=str(setup.folder / "none"))
    skipped = {check.name: check.found for check in setup.verify("train.epochs=1")}
    assert skipped["model and data"] == "needs: shards"
    assert skipped["resumed run"] == "needs: model and data"
    assert "epochs" in skipped["schedule"]


def test_unreachable_dataset(setup: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    setup.set(data__dataset="nobody/nothing")
    (found,) = problems(setup.verify()).values()
    assert found.name == "dataset" and found.status == "fail"
    assert "nobody/nothing" in found.found and "data.fallback: builtin" in found.advice
    (found,) = problems(setup.verify("data.fallback=builtin")).values()
    assert found.status == "warn" and "built-in" in found.found


def test_time_of_many_micro_batches_is_extrapolated_from_two(setup: Broken) -> None:
    """A million micro-batches are not run: the time of one more is the difference between two and one."""
    setup.set(train__grad_accum_steps=10**6)
    found = {check.name: check for check in setup.verify("train.micro_batch_size=1", calibrate=True)}
    assert found["time"].status == "pass"
    assert " s per step" in found["time"].found


def test_tokaligns_learning_rate_needs_its_batch_size(setup: Broken) -> None:
    setup.train()
    paper = yaml.safe_load((ROOT / "configs" / "adapt_paper.yaml").read_text().replace("6.4e-4", "0.00064"))
    paper["models"]["source_model"] = str(setup.folder / "run")
    paper["corpus"]["domain"] = str(setup.rows)
    paper["vocab_adaptation"] |= {"seq_len": 64}
    paper["pipeline"]["run_root"] = str(setup.folder / "adapt")
    setup.values = paper
    setup.machine["installation.installed_version"] = lambda name: installed_version(name) or "4.4.0"  # gensim
    (found,) = problems(setup.verify()).values()
    assert (found.name, found.status) == ("learning rate", "warn")
    assert "2.1 million" in found.found and "2,048" in found.found
    assert "vocab_adaptation.stage1_lr" in found.advice
    # 2 x 16 x 64 x 257 tokens are more than a quarter of 2.1 million.
    assert not problems(setup.verify("vocab_adaptation.grad_accum_steps=4112"))
    (found,) = problems(setup.verify("vocab_adaptation.stage1_lr=1e-5", "corpus.domain=nothing.txt")).values()
    assert found.name == "corpus" and "corpus.domain" in found.advice


def test_tuning_configuration_gets_the_tuning_checks(setup: Broken) -> None:
    setup.train()
    turns = [{"role": role, "content": f"What {role} says."} for role in ("user", "assistant")]
    setup.rows.write_text((json.dumps({"messages": turns}) + "\n") * 3)
    setup.values = {
        "data": {"dataset": str(setup.rows), "seq_len": 32},
        "train": {"init_from": str(setup.folder / "run"), "save_dir": str(setup.folder / "sft"), "device": "cpu",
                  "total_steps": 2, "warmup_steps": 1},
        "chat": {"rouge_samples": 0},
    }  # fmt: skip
    checks = {check.name: check for check in setup.verify()}
    assert not problems(list(checks.values()))
    assert checks["dataset"].found.startswith("3 of the first 3 rows are usable; they end with: 'What assistant")
    (found,) = [check for check in setup.verify("train.epochs=1") if check.name == "schedule"]
    assert found.status == "skip" and "conversations are only counted when it starts" in found.found
    (found,) = problems(setup.verify("train.init_from=nowhere")).values()
    assert found.name == "configuration" and "nowhere" in found.found
    setup.rows.write_text(json.dumps({"messages": turns, "label": False}) + "\n")
    setup.values = {**setup.values, "preference": {"loss": "kto"}, "chat": {}}
    (found,) = (check for check in setup.verify() if check.name == "dataset")
    assert found.found.startswith("1 of the first 1 rows are usable; they end with: 'What assistant")


def test_conversations_of_the_hub_are_not_downloaded_to_be_verified(
    setup: Broken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever data.streaming says: a few rows are enough."""
    read: list[bool] = []

    def read_conversations(data: DataConfig, *args: Any) -> list[Any]:
        read.append(data.streaming)
        return []

    monkeypatch.setattr(preflight_data, "read_conversations", read_conversations)
    setup.train()
    setup.values = {
        "data": {"dataset": "some/dialogues", "streaming": False, "seq_len": 32},
        "train": {"init_from": str(setup.folder / "run"), "save_dir": str(setup.folder / "sft"), "device": "cpu"},
        "chat": {"rouge_samples": 0},
    }
    (found,) = [check for check in setup.verify() if check.name == "dataset"]
    assert read == [True] and found.status == "fail" and found.found.startswith("no usable row")


def test_command_prints_a_table_or_json_and_sets_the_exit_code(
    setup: Broken, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anarchobot.preflight.run.blas_warning", lambda: "")
    setup.verify()  # writes the file
    words = ["verify", str(setup.config), "--no-calibration"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pass  Python")
    assert lines[-1] == "16 passed, 0 warned, 0 failed, 1 skipped"
    assert main([*words, "train.tokenizer_path=none", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["failed"], told["skipped"]) == (1, 3)
    (bad,) = [check for check in told["checks"] if check["status"] == "fail"]
    assert bad["name"] == "tokenizer" and bad["advice"] == f"train it: anarchobot tokenizer train {setup.config}"
    assert main([*words, "--quiet", "train.tokenizer_path=none"]) == 1
    assert capsys.readouterr().out.splitlines()[0].startswith("fail  tokenizer")
    assert main(["verify"]) == 2


def test_advice_names_a_configuration_as_the_user_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "quickstart", "--no-calibration", "--json", "train.tokenizer_path=none"]
    assert main(words) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["tokenizer"]["advice"] == "train it: anarchobot tokenizer train quickstart"


def test_setup_verification_script_runs_the_command(setup: Broken) -> None:
    setup.verify()
    script = [sys.executable, str(ROOT / "scripts" / "setup_verification.py"), str(setup.config), "--no-calibration"]
    done = subprocess.run([*script, "model.d_model=33"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "fail  configuration" in done.stdout
