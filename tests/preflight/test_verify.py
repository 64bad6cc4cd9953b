"""Broken setups, one fault each, made from a good one: the fault is found, named, alone, and the advice helps."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from anarchobot.cli.main import main
from anarchobot.data.pretokenize import pretokenize
from anarchobot.data.sources.documents import DocumentCounts, Document
from anarchobot.preflight.check import Check, Machine
from anarchobot.preflight.verify import verify
from anarchobot.storage.lock import FolderLock
from anarchobot.system.packages import installed_version
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.tiny import VOCAB, loaded, make_shards, write_config

ROOT = Path(__file__).parents[2]
GOOD = Machine(blas=lambda: "OpenBLAS", memory=lambda: 8 * 10**9, free=lambda folder: 10**9)


class Broken:
    """A good setup in a folder of its own, to be broken: `values` are the configuration's."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards, self.config = folder, folder / "shards", folder / "c.yaml"
        shutil.copytree(shards, self.shards)
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps({"text": f"Text number {i}."}) + "\n" for i in range(9)))
        self.tokenizer = self.shards / "made.model"
        write_config(
            self.config, self.shards, folder / "run",
            data__dataset=str(self.rows), train__tokenizer_path=str(self.tokenizer),
        )  # fmt: skip
        self.values: dict[str, Any] = yaml.safe_load(self.config.read_text())
        self.text: str | None = None  # instead of the values
        self.machine = GOOD

    def verify(self, *words: str, calibrate: bool = False) -> list[Check]:
        if self.text is not None:
            self.config.write_text(self.text)
        elif self.values:
            self.config.write_text(yaml.safe_dump(self.values))
        else:
            self.config.unlink()
        return verify(str(self.config), words, calibrate=calibrate, machine=self.machine)

    def set(self, **values: Any) -> None:
        """`train__lr=1`."""
        for name, value in values.items():
            section, key = name.split("__")
            self.values.setdefault(section, {})[key] = value

    def retokenize(self, texts: list[str], val_fraction: float = 0.2) -> None:
        """Other shards by the same tokenizer."""
        tokenizer = load_tokenizer(self.tokenizer)
        self.set(data__shard_dir=str(self.folder / "few"))
        documents = map(Document, texts)
        pretokenize(
            documents, tokenizer, self.folder / "few", counts=DocumentCounts(), val_fraction=val_fraction, num_workers=1
        )

    def train(self, **values: Any) -> None:
        """A finished run in the folder."""
        pretrain(loaded(self.folder / "run.yaml", self.shards, self.folder / "run", **values), show="nothing")

    def without(self, package: str, version: str | None = None) -> None:
        self.machine = replace(GOOD, version_of=lambda name: version if name == package else installed_version(name))


@pytest.fixture
def setup(tmp_path: Path, tiny_shards: Path) -> Broken:
    return Broken(tmp_path, tiny_shards)


def _flip_a_bit(b: Broken) -> None:
    file = b.shards / "train_00000.npy"
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 1
    file.write_bytes(raw)


def _other_tokenizer(b: Broken) -> None:
    """As many tokens, learned from other text."""
    other = make_shards(b.folder / "other", megabytes=0.09)
    b.set(train__tokenizer_path=str(other / "made.model"))


def _larger_tokenizer(b: Broken) -> None:
    b.set(train__tokenizer_path=str(make_shards(b.folder / "other", vocab_size=VOCAB + 16) / "made.model"))


def _a_file_in_the_way(b: Broken) -> None:
    (b.folder / "run").write_text("")
    b.set(train__save_dir=str(b.folder / "run" / "here"))


def _of_another_model(b: Broken) -> None:
    b.train()
    b.set(train__checkpoint_path="auto", model__d_model=64)


def _of_other_shards(b: Broken) -> None:
    b.train()
    b.retokenize([f"Text number {i} of many." for i in range(999)])
    b.set(train__checkpoint_path="auto")


# What is broken: the check that finds it, as what, a word of what it says, one of its advice.
FAULTS: dict[str, tuple[Callable[[Broken], Any], str, str, str, str]] = {
    "no YAML": (lambda b: setattr(b, "text", "model: [3"), "configuration", "fail", "c.yaml:", "docs/configuration"),
    "not in the schema": (lambda b: b.set(train__learning_rate=1), "configuration", "fail",
                          "train.learning_rate: unknown key", "c.yaml"),
    "a number that is text": (lambda b: b.set(train__lr="fast"), "configuration", "fail", "train.lr: expected a number",
                              "c.yaml"),
    "no such file": (lambda b: b.values.clear(), "configuration", "fail", "no such file", "c.yaml"),
    "heads do not divide": (lambda b: b.set(model__n_heads=3), "configuration", "fail", "d_model (32) must be",
                            "c.yaml"),
    "sequences too long": (lambda b: b.set(data__seq_len=65), "configuration", "fail", "model.max_seq_len", "c.yaml"),
    "lr rises to its end": (lambda b: b.set(train__min_lr=1), "configuration", "fail", "min_lr (1) must be at most lr",
                            "c.yaml"),
    "nothing to adapt": (lambda b: b.set(lora__r=8, data__shard_dir=str(b.shards)), "required fields", "fail", "lora.r",
                         "train.init_from"),
    "nothing to learn from": (lambda b: b.set(data__shard_dir="none", data__dataset=None, train__tokenizer_path=None),
                              "required fields", "fail", "no data.dataset", "train.tokenizer_path"),
    "no such dataset": (lambda b: b.rows.unlink(), "dataset", "fail", "rows.jsonl: no such file", "data.dataset"),
    "no such field": (lambda b: b.set(data__text_field="body"), "dataset", "fail", "no field 'body' (it has text)",
                      "data.text_field"),
    "an empty dataset": (lambda b: b.rows.write_text(""), "dataset", "fail", "empty", "data.dataset"),
    "nothing is long enough": (lambda b: b.set(data__min_chars=99), "dataset", "fail", "filtered 9", "data.min_chars"),
    "a broken row": (lambda b: b.rows.write_text(b.rows.read_text() + "{\n"), "dataset", "warn", "1 of the first 10",
                     "data.dataset"),
    "no tokenizer": (lambda b: b.set(train__tokenizer_path=str(b.folder / "none.model")), "tokenizer", "fail",
                     "no such tokenizer", "anarchobot tokenizer train"),
    "another vocab_size": (_larger_tokenizer, "tokenizer", "fail", "384, but", f"set model.vocab_size: {VOCAB + 16}"),
    "another tokenizer": (_other_tokenizer, "model and data", "fail", "not the tokenizer that made the shards",
                          "anarchobot pretokenize"),
    "no shards": (lambda b: b.set(data__shard_dir=str(b.folder / "none")), "shards", "fail", "no token shards",
                  "anarchobot pretokenize"),
    "no manifest": (lambda b: (b.shards / "manifest.json").unlink(), "shards", "fail", "no manifest.json",
                    "anarchobot pretokenize"),
    "a damaged manifest": (lambda b: (b.shards / "manifest.json").write_text("{"), "shards", "fail", "damaged",
                           "anarchobot pretokenize"),
    "a damaged shard": (_flip_a_bit, "shards", "fail", "train_00000.npy: its content is not what was written",
                        "--restart"),
    "a shard is gone": (lambda b: (b.shards / "val_00000.npy").unlink(), "shards", "fail", "val_00000", "--restart"),
    "less than a sequence": (lambda b: b.retokenize(["Few words."], 0), "model and data", "fail",
                             "less than one sequence", "pretokenize"),
    "no validation": (lambda b: b.retokenize(["Many words. " * 999], 0), "model and data", "warn", "validation split",
                      "data.val_fraction"),
    "steps larger than the data": (lambda b: b.set(train__micro_batch_size=999), "model and data", "warn", "1,998 seq",
                                   "train.micro_batch_size"),
    "a file in the way": (_a_file_in_the_way, "save_dir", "fail", "is a file", "train.save_dir"),
    "a run is there": (lambda b: b.train(), "save_dir", "fail", "already holds a run, at step 6", "--resume-from auto"),
    "a run of another model": (_of_another_model, "resumed run", "fail", "model.d_model was 32 and is now 64",
                               "config.yaml"),
    "a run on other shards": (_of_other_shards, "resumed run", "fail", "other shards", "train.save_dir"),
    "warm-up without end": (lambda b: b.set(train__warmup_steps=6), "schedule", "warn", "never reaches its peak",
                            "train.warmup_steps"),
    "the decay ends early": (lambda b: b.set(train__lr_decay_steps=4), "schedule", "warn", "min_lr for the last 2",
                             "train.lr_decay_steps"),
    "the decay ends late": (lambda b: b.set(train__lr_decay_steps=9), "schedule", "warn", "does not come down",
                            "train.lr_decay_steps"),
    "float16 on a CPU": (lambda b: b.set(train__precision="float16"), "device", "warn", "float16", "train.precision"),
    "a small disk": (lambda b: setattr(b, "machine", replace(GOOD, free=lambda folder: 10**6)), "disk space", "fail",
                     "5 checkpoints", "train.ckpt_keep"),
    "little memory": (lambda b: setattr(b, "machine", replace(GOOD, memory=lambda: 10**5)), "memory", "fail",
                      "at the peak", "train.micro_batch_size"),
    "auto finds no room": (lambda b: b.set(train__micro_batch_size="auto", train__memory_budget_gb=1e-6), "memory",
                           "fail", "one sequence at a time takes", "data.seq_len"),
    "no fast BLAS": (lambda b: setattr(b, "machine", replace(GOOD, blas=lambda: None)), "BLAS", "warn", "times slower",
                     "libopenblas"),
    "an old Python": (lambda b: setattr(b, "machine", replace(GOOD, python="3.10.4")), "Python", "fail", "3.10.4",
                      ".venv"),
    "a package is missing": (lambda b: b.without("rich"), "packages", "fail", "rich>=13.9 is missing", "pip install"),
    "a package is old": (lambda b: b.without("numpy", "1.26.4"), "packages", "fail", "1.26.4 is here", "pip install"),
    "no PyTorch": (lambda b: (b.set(train__backend="torch"), b.without("torch")), "packages it asks for", "fail",
                   "torch>=", "anarchobot[torch]"),
}  # fmt: skip


def unsound(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks if check.status in ("warn", "fail")}


def test_a_good_setup_passes_with_its_time(setup: Broken) -> None:
    checks = setup.verify(calibrate=True)
    assert {check.status for check in checks} == {"pass"} and len(checks) == 17
    found = {check.name: check.found for check in checks}
    assert "'Text number 0.'; 'Text number 1.'" in found["dataset"]
    assert "for 6 steps" in found["time"] and "tokens/s" in found["time"]
    assert not (setup.folder / "run").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_named_alone_and_mended(fault: str, setup: Broken) -> None:
    break_it, name, status, said, advice = FAULTS[fault]
    break_it(setup)
    checks = setup.verify()
    (found,) = unsound(checks).values()
    assert (found.name, found.status) == (name, status)
    assert said in found.found
    assert advice in found.advice
    assert all(check.found for check in checks)
    if status == "warn":
        assert [check.name for check in checks if check.status == "skip"] == ["time"]


def test_auto_is_told_what_it_comes_to(setup: Broken) -> None:
    checks = setup.verify("train.micro_batch_size=auto", "train.grad_accum_steps=6")
    (memory,) = [check for check in checks if check.name == "memory"]
    assert memory.status == "pass" and memory.found.startswith("micro_batch_size auto: 6 x 1 sequences a step")


def test_who_writes_the_folder_is_named(setup: Broken) -> None:
    with FolderLock(setup.folder / "run"):
        (found,) = unsound(setup.verify()).values()
    assert found.name == "save_dir" and "is writing here" in found.found and "wait for its end" in found.advice


def test_a_library_that_is_gone_is_a_fault_and_no_crash(setup: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("packaging.specifiers", "packaging.requirements"):  # whichever was imported before
        monkeypatch.setitem(sys.modules, name, None)
    found = unsound(setup.verify())
    assert list(found) == ["Python", "packages"]
    for check in found.values():
        assert "packaging" in check.found and check.advice.startswith("pip install")


def test_what_depends_on_a_fault_is_skipped_and_told_why(setup: Broken) -> None:
    setup.set(data__shard_dir=str(setup.folder / "none"))
    skipped = {check.name: check.found for check in setup.verify("train.epochs=1")}
    assert skipped["model and data"] == "needs: shards"
    assert skipped["resumed run"] == "needs: model and data"
    assert "epochs" in skipped["schedule"]


def test_a_dataset_that_is_not_reached(setup: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    setup.set(data__dataset="nobody/nothing")
    (found,) = unsound(setup.verify()).values()
    assert found.name == "dataset" and found.status == "fail"
    assert "nobody/nothing" in found.found and "data.fallback: builtin" in found.advice
    (found,) = unsound(setup.verify("data.fallback=builtin")).values()
    assert found.status == "warn" and "built-in text instead" in found.found


def test_a_step_of_many_micro_batches_is_told_from_two(setup: Broken) -> None:
    """A million micro-batches are not taken: the time of one more is the difference between two and one."""
    setup.set(train__grad_accum_steps=10**6)
    found = {check.name: check for check in setup.verify("train.micro_batch_size=1", calibrate=True)}
    assert found["time"].status == "pass"
    assert " s a step" in found["time"].found


def test_the_papers_rate_needs_the_papers_batch(setup: Broken) -> None:
    setup.train()
    paper = yaml.safe_load((ROOT / "configs" / "adapt_paper.yaml").read_text().replace("6.4e-4", "0.00064"))
    paper["models"]["source_model"] = str(setup.folder / "run")
    paper["corpus"]["domain"] = str(setup.rows)
    paper["vocab_adaptation"] |= {"max_seq_length": 64}
    paper["pipeline"]["run_root"] = str(setup.folder / "adapt")
    setup.values = paper
    setup.machine = replace(GOOD, version_of=lambda name: installed_version(name) or "4.4.0")  # gensim
    (found,) = unsound(setup.verify()).values()
    assert (found.name, found.status) == ("learning rate", "warn")
    assert "2.1 million tokens a step" in found.found and found.found.endswith("here are 2,048")
    assert "vocab_adaptation.lr_stage1" in found.advice
    # 2 x 16 x 64 x 257 tokens are more than a quarter of 2.1 million.
    assert not unsound(setup.verify("vocab_adaptation.gradient_accumulation=4112"))
    (found,) = unsound(setup.verify("vocab_adaptation.lr_stage1=1e-5", "corpus.domain=nothing.txt")).values()
    assert found.name == "corpus" and "corpus.domain" in found.advice


def test_a_tuning_configuration_is_checked_as_one(setup: Broken) -> None:
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
    assert not unsound(list(checks.values()))
    assert checks["dataset"].found.startswith("3 of the first 3 rows are good; the first end with: 'What assistant")
    (found,) = unsound(setup.verify("train.init_from=nowhere")).values()
    assert found.name == "configuration" and "nowhere" in found.found


def test_the_command_prints_a_table_or_json_and_its_exit_code_says_whether_all_is_well(
    setup: Broken, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert bad["name"] == "tokenizer" and bad["advice"] == f"make it: anarchobot tokenizer train {setup.config}"
    assert main([*words, "--quiet", "train.tokenizer_path=none"]) == 1
    assert capsys.readouterr().out.splitlines()[0].startswith("fail  tokenizer")
    assert main(["verify"]) == 2


def test_the_script_is_the_command(setup: Broken) -> None:
    setup.verify()
    script = [sys.executable, str(ROOT / "scripts" / "setup_verification.py"), str(setup.config), "--no-calibration"]
    done = subprocess.run([*script, "model.d_model=33"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "fail  configuration" in done.stdout
