"""A model moved to another vocabulary: the whole way, killed at each stage, and what is refused."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import load
from anarchobot.data.sources import builtin
from anarchobot.exchange.exporting import export
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.runs import checkpoint
from anarchobot.storage.durable import read_sealed
from anarchobot.tasks.adaptation import checks as adapt_checks
from anarchobot.tasks.adaptation import evaluation as adapt_evaluation
from anarchobot.tasks.adaptation import pipeline as adapt_vocab
from anarchobot.tasks.adaptation.evaluation import read_questions, table
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer
from anarchobot.training.mlx_engine import MLXEngine
from tests.exchange.random_run import make_run, our_logits, real_ids
from tests.tasks.adaptation.world import STAGES, command, kill_in, make_world, results, write_config

pytest.importorskip("gensim")

QUICK: dict[str, Any] = {
    "vocab_adaptation": {"enabled": False}, "evaluation": {"enabled": False}, "alignment": {"method": "mean"}
}  # fmt: skip
TRAINED = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def adapt(world: Path, root: Path, **change: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []
    loaded = load(write_config(world, root, **change), [], AdaptConfig)
    return adapt_vocab.adapt_vocab(loaded, quiet=True, say=told.append), told


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("done") / "root"
    return root, adapt(world, root)[0]


def weights(folder: Path) -> dict[str, Any]:
    found = checkpoint.find(folder, files=(checkpoint.MODEL_FILE,))
    with np.load(found.folder / "model.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def test_the_whole_way(done: tuple[Path, dict[str, Any]], world: Path) -> None:
    root, report = done
    assert report["finished"]
    assert Path(report["result"]) == root / "result"
    assert list(report["evaluation"]) == ["before", "initial", "stage 1", "stage 2"]
    assert all(0 < found["bits_per_byte"] < 20 for found in report["evaluation"].values())
    assert report["alignment"]["zero_initialised"] == 0
    assert sum(report["alignment"]["routes"].values()) == 420
    assert json.loads((root / "report.json").read_text()) == report
    assert (root / "report.md").read_text().count("\n") == 6
    for stage in STAGES:
        record = read_sealed(root / "records" / f"{stage}.json")
        assert set(record) == {"settings", "inputs", "outputs", "notes", "seconds"}
    source, target = (load_tokenizer(folder) for folder in (world / "model", root / "result"))
    held_out = [json.loads(line)["text"] for line in (root / "corpus" / "held_out.jsonl").read_text().splitlines()]
    for tokenizer, name in ((source, "source"), (target, "target")):
        tokens = sum(map(len, tokenizer.encode_batch(held_out))) / sum(len(text.encode()) for text in held_out)
        assert report["tokenizer"][f"tokens_per_byte_{name}"] == round(tokens, 4)


def test_the_result_is_an_ordinary_model(
    done: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = str(done[0] / "result")
    assert main(["generate", "--checkpoint", result, "--prompt", "The", "--max-new-tokens", "3"]) == 0
    assert load_pretrained(result).model.vocab_size == 420
    export(result, "hf", tmp_path / "hf")
    assert (
        main(["evaluate", "--checkpoint", str(tmp_path / "hf"), "--text", str(done[0] / "corpus/held_out.jsonl")]) == 0
    )
    capsys.readouterr()


def test_stage_1_trains_embedding_and_head_and_stage_2_the_rest(done: tuple[Path, dict[str, Any]]) -> None:
    initial, first, result = (weights(done[0] / name) for name in ("initial", "stage1", "result"))
    for name, before in initial.items():
        assert np.array_equal(before, first[name]) == (name not in TRAINED), name
        adapted = name.endswith("_proj.weight")
        assert np.array_equal(first[name], result[name]) != adapted, name


def test_stage_2_goes_on_in_the_data_where_stage_1_ended(
    done: tuple[Path, dict[str, Any]], world: Path, tmp_path: Path
) -> None:
    positions = [checkpoint.find(done[0] / name).state["data_position"] for name in ("stage1", "stage2")]
    assert positions == [8, 16]
    adapt(world, tmp_path / "r", vocab_adaptation={"stage2_first_sequence": 100, "stage1_steps": 1},
          alignment={"method": "mean"}, evaluation={"enabled": False})  # fmt: skip
    assert checkpoint.find(tmp_path / "r" / "stage2").state["data_position"] == 108


def test_done_again_it_does_nothing_and_tells_the_same(done: tuple[Path, dict[str, Any]], world: Path) -> None:
    report, told = adapt(world, done[0])
    assert report == done[1]
    warned = [line for line in told if "done before" not in line]
    assert warned == [told[0], f"warning: {report['alignment']['advice'][0]}"]
    assert "of held-out tokens 0% find themselves, fewer than 60%" in warned[1]
    assert len(told) == 15


def test_a_folder_that_holds_another_models_adaptation_is_left_alone(world: Path, tmp_path: Path) -> None:
    adapt(world, tmp_path / "r", **QUICK)
    make_run(tmp_path / "other", world / "own.model", tie_embeddings=False, n_layers=1, d_model=48, max_seq_len=64)
    with pytest.raises(
        UserError, match=r"r.yaml:\d+: pipeline.run_root: .* holds the adaptation of another model than"
    ):
        adapt(world, tmp_path / "r", models={"source_model": str(tmp_path / "other")}, **QUICK)
    assert (tmp_path / "r" / "initial" / "config.yaml").is_file()


def test_a_changed_setting_makes_its_stage_anew_and_what_follows(world: Path, tmp_path: Path) -> None:
    adapt(world, tmp_path / "r", **QUICK)
    _, told = adapt(world, tmp_path / "r", **(QUICK | {"alignment": {"method": "random"}}))
    assert [line.partition(": ")[::2] for line in told if "anew" in line] == [
        ("alignment", 'anew, for method was "mean", is now "random"'),
        ("initial", "anew, for what it is made from has changed"),
        ("result", "anew, for what it is made from has changed"),
    ]
    assert next(line for line in told if "done before" in line).startswith("corpus")


def test_a_key_that_a_later_version_brings_trains_nothing_anew(done: tuple[Path, dict[str, Any]]) -> None:
    """What a stage of training is known by are the settings that differ from their defaults."""
    settings = read_sealed(done[0] / "records" / "stage2.json")["settings"]
    assert settings["lora"] == {"r": 4, "dropout": 0.1}
    assert settings["train"]["lr"] == 1e-3
    assert not {"momentum", "save_dir", "init_from", "cpu_threads", "guard"} & settings["train"].keys()


def test_identical_tokenizers_give_identical_logits(world: Path, tmp_path: Path) -> None:
    own = next((world / "model").glob("tokenizer.model"))
    report, _ = adapt(world, tmp_path / "r", models={"target_tokenizer": str(own)},
                      vocab_adaptation={"enabled": False})  # fmt: skip
    assert report["alignment"]["coverage"] == 1.0
    assert report["result"] == str(tmp_path / "r" / "result")
    for name, array in weights(tmp_path / "r" / "initial").items():
        assert np.array_equal(array, weights(tmp_path / "r" / "result")[name])
    ids = real_ids(world / "model", 60)
    assert np.array_equal(our_logits(world / "model", ids), our_logits(tmp_path / "r" / "initial", ids))
    assert report["evaluation"]["before"] == report["evaluation"]["initial"]


def test_a_source_extended_by_terms_keeps_all_its_rows(world: Path, tmp_path: Path) -> None:
    report, _ = adapt(world, tmp_path / "r", tokenization={"target": "extended"}, term_mining={"top_k": 20},
                      vocab_adaptation={"stage2_use_lora": False, "stage1_steps": 0, "stage2_steps": 3})  # fmt: skip
    old, new = weights(world / "model"), weights(tmp_path / "r" / "initial")
    assert len(json.loads((tmp_path / "r" / "terms" / "terms.json").read_text())["words"]) == 20
    for name in TRAINED:
        assert np.array_equal(new[name][:400], old[name])
        assert len(new[name]) > 420  # terms, and what leads to them
    assert report["tokenizer"]["tokens_per_byte_target"] < report["tokenizer"]["tokens_per_byte_source"]
    final = weights(tmp_path / "r" / "result")
    assert all(not np.array_equal(final[name], array) for name, array in new.items())


class Killed(BaseException):
    """What nothing catches, as kill -9."""


def test_killed_at_each_stage_it_goes_on(
    world: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage in its turn is killed in the middle, behind those that were killed before it."""
    root = tmp_path / "r"
    places = [
        (adapt_vocab, "write_corpus"), (adapt_vocab, "train_tokenizer"), (adapt_vocab, "learn_vectors"),
        (adapt_vocab, "align"), (checkpoint, "save"), (adapt_vocab, "pretokenize"), (MLXEngine, "train_step"),
        (MLXEngine, "train_step"), (adapt_vocab, "fuse"), (adapt_vocab, "figures"),
    ]  # fmt: skip
    for number, (where, name) in enumerate(places):
        real, calls = getattr(where, name), [0]

        def killed(
            *args: Any, real: Any = real, calls: list[int] = calls, last: bool = name != "train_step", **kw: Any
        ) -> Any:
            calls[0] += 1
            found = real(*args, **kw) if not last else None
            if last or calls[0] == 3:
                raise Killed
            return found

        with monkeypatch.context() as patch:
            patch.setattr(where, name, killed)
            with pytest.raises(Killed):
                adapt(world, root)
        finished = {path.stem for path in (root / "records").glob("*.json")}
        assert finished == set(STAGES[:number])
    report, told = adapt(world, root)
    assert sum("done before" in line for line in told) == len(STAGES) - 4
    for name, array in weights(done[0] / "result").items():
        assert np.array_equal(array, weights(root / "result")[name]), name
    assert report["evaluation"] == done[1]["evaluation"]


def test_kill_9_in_the_middle_of_a_stage(world: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The program itself, killed while it learns vectors, and then while it trains; tests/faults has every stage."""
    config, chance = write_config(world, tmp_path / "r"), random.Random(0)
    for stage in ("vectors", "stage1"):
        lasts = read_sealed(done[0] / "records" / f"{stage}.json")["seconds"]
        kill_in(stage, config, tmp_path / "r", lasts, chance)
    subprocess.run(command(config), check=True)
    assert results(tmp_path / "r") == results(done[0])


def test_a_stage_that_fails_twice_and_then_works(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = adapt_vocab.align, [OSError("away"), MemoryError("full")]

    def failing(*args: Any, **kw: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args, **kw)

    monkeypatch.setattr(adapt_vocab, "align", failing)
    change = dict(QUICK)
    with pytest.raises(MemoryError):
        adapt(world, tmp_path / "r", **change)
    failures.append(OSError("away again"))
    change["pipeline"] = {"max_retries": 2}
    report, told = adapt(world, tmp_path / "r", **change)
    assert report["finished"]
    assert sum("again in 0 s" in line for line in told) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alignment": {"pivot_counts": 3}}, "alignment.pivot_counts: unknown key; did you mean 'pivot_count'?"),
        ({"models": {"source_tokenizer": 320}}, "has 320 tokens, and the model in"),
        ({"models": {"source_tokenizer": 400}}, "has other tokens than the model in"),
        ({"vocab_adaptation": {"lora_target_modules": ["k_porj"]}}, "no matrix is called k_porj; did you mean 'k_proj"),
        ({"evaluation": {"datasets": ["nowhere.txt"]}}, "nowhere.txt: no such file"),
        ({"evaluation": {"baseline_model": "nowhere"}}, "nowhere: no checkpoint here"),
        ({"corpus": {"val_fraction": 1e-6}}, "corpus.val_fraction: none of 140 documents is held out"),
        ({"models": {"target_tokenizer": "nowhere.model"}}, "no such tokenizer file"),
        ({"vocab_adaptation": {"seq_len": 65}}, "65, and the model sees at most 64 tokens"),
        ({"corpus": {"domain": "nowhere.txt"}}, "nowhere.txt"),
        ({"evaluation": {"qa": "nowhere.jsonl"}}, "evaluation.qa: nowhere.jsonl: can't be read"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    change: dict[str, Any], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if size := change.get("models", {}).get("source_tokenizer"):
        other = train_tokenizer(list(builtin.topics())[:1], tmp_path / "other", size)[0]
        change = {"models": {"source_tokenizer": str(other)}}
    path = write_config(world, tmp_path / "r", **change)
    assert main(["adapt-vocab", str(path), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_the_papers_rate_with_a_small_step_is_warned_of(world: Path, tmp_path: Path) -> None:
    change = {"vocab_adaptation": {"stage1_lr": 6.4e-4}}
    settings = load(write_config(world, tmp_path / "r", **change), [], AdaptConfig).config
    (warning,) = adapt_checks.warnings(settings)
    assert "0.00064 belongs to 2.1 million tokens a step, where here are 64" in warning
    large = settings.vocab_adaptation.model_copy(update={"grad_accum_steps": -(-525000 // 64)})
    assert adapt_checks.warnings(settings.model_copy(update={"vocab_adaptation": large})) == []


def test_questions_are_answered_by_likelihood(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always finds the same answer likeliest is right as often as that is the answer."""
    from anarchobot.evaluation.likelihood import Likelihood
    from anarchobot.inference.model import load_model

    monkeypatch.setattr(
        adapt_evaluation,
        "likelihoods",
        lambda model, requests: [Likelihood(-float(i % 3 != 1), True) for i, _ in enumerate(requests)],
    )
    found = adapt_evaluation.question_answering(load_model(world / "model")[0], str(world / "qa.jsonl"), None)
    assert found == {"qa_accuracy": 0.3333, "qa_commonest": 0.3333, "questions": 3}


def test_a_row_that_is_no_question_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text('{"question": "a", "abstract": "b", "answer": "yes"}\n{"question": "a"}\n')
    with pytest.raises(Exception, match=r"qa.jsonl:2: expected a JSON object with question, abstract and answer"):
        read_questions(tmp_path / "qa.jsonl")


def test_the_table_by_hand() -> None:
    results = {"before": {"bits_per_byte": 2.0, "qa_accuracy": 0.5}, "after": {"bits_per_byte": 1.23456}}
    assert table(results).splitlines()[2:] == ["| before | 2.0000 | 0.5000 |", "| after | 1.2346 | - |"]
