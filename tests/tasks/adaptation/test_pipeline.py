"""adapt-vocab end to end: the complete run, kills in each stage, resuming and rejected settings."""

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from anarchobot.cli.main import main
from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import load
from anarchobot.data.sources import builtin
from anarchobot.exchange.exporting import export
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.runs import checkpoint
from anarchobot.storage.durable import read_checksummed, sha256_file, write_checksummed
from anarchobot.tasks.adaptation import evaluation, initialization, pipeline, training
from anarchobot.tasks.adaptation.checks import warnings
from anarchobot.tasks.adaptation.evaluation import answer_questions, read_questions, to_markdown
from anarchobot.tasks.adaptation.initialization import Adaptation, build_corpus
from anarchobot.tasks.adaptation.pipeline import _with_seq_len, adapt_vocab
from anarchobot.tasks.adaptation.stages import StageRunner
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer
from anarchobot.training.mlx_engine import MLXEngine
from tests.exchange.quantized_folder import quantize_folder
from tests.exchange.random_run import make_run, our_logits, real_ids
from tests.tasks.adaptation.world import STAGES, command, kill_in, make_world, results, write_config

pytest.importorskip("gensim")

QUICK: dict[str, Any] = {
    "vocab_adaptation": {"enabled": False}, "evaluation": {"enabled": False}, "alignment": {"method": "mean"}
}  # fmt: skip
CONFIGS = Path(__file__).parents[3] / "configs"
TRAINED = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def adapt(world: Path, root: Path, **change: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    log: list[str] = []
    loaded = load(write_config(world, root, **change), [], AdaptConfig)
    return adapt_vocab(loaded, quiet=True, log=log.append), log


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("done") / "root"
    return root, adapt(world, root)[0]


def weights(folder: Path) -> dict[str, Any]:
    found = checkpoint.find(folder, files=(checkpoint.MODEL_FILE,))
    with np.load(found.folder / "model.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def test_a_complete_run(done: tuple[Path, dict[str, Any]], world: Path) -> None:
    root, report = done
    assert report["finished"]
    assert Path(report["result"]) == root / "result"
    assert list(report["evaluation"]) == ["before", "initial", "stage 1", "stage 2"]
    assert all(0 < metrics["bits_per_byte"] < 20 for metrics in report["evaluation"].values())
    assert report["alignment"]["zero_initialised"] == 0
    assert sum(report["alignment"]["routes"].values()) == 420
    assert json.loads((root / "report.json").read_text()) == report
    assert (root / "report.md").read_text().count("\n") == 6
    for stage in STAGES:
        record = read_checksummed(root / "records" / f"{stage}.json")
        assert set(record) == {"settings", "inputs", "outputs", "notes", "seconds"}
    source, target = (load_tokenizer(folder) for folder in (world / "model", root / "result"))
    held_out = [json.loads(line)["text"] for line in (root / "corpus" / "held_out.jsonl").read_text().splitlines()]
    for tokenizer, name in ((source, "source"), (target, "target")):
        tokens = sum(map(len, tokenizer.encode_batch(held_out))) / sum(len(text.encode()) for text in held_out)
        assert report["tokenizer"][f"tokens_per_byte_{name}"] == round(tokens, 4)


def test_the_result_is_an_ordinary_run_folder(
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


def test_a_quantized_source_model_is_dequantized_with_a_warning(world: Path, tmp_path: Path) -> None:
    export(world / "model", "mlx", tmp_path / "floats")
    packed = quantize_folder(tmp_path / "floats", tmp_path / "packed", bits=4, group_size=32)
    _, log = adapt(world, tmp_path / "root", models={"source_model": str(packed)}, **QUICK)
    assert f"warning: {packed}: weights of 4 bits are dequantized to float32" in log
    source = load_pretrained(str(packed)).dequantized().weights
    adapted = weights(tmp_path / "root" / "initial")
    assert all(np.array_equal(adapted[name], array) for name, array in source.items() if name not in TRAINED)


def test_stage_1_trains_embedding_and_head_and_stage_2_adapters(done: tuple[Path, dict[str, Any]]) -> None:
    initial, first, result = (weights(done[0] / name) for name in ("initial", "stage1", "result"))
    for name, before in initial.items():
        assert np.array_equal(before, first[name]) == (name not in TRAINED), name
        adapted = name.endswith("_proj.weight")
        assert np.array_equal(first[name], result[name]) != adapted, name


def test_stage_2_continues_in_the_data_after_stage_1(
    done: tuple[Path, dict[str, Any]], world: Path, tmp_path: Path
) -> None:
    positions = [checkpoint.find(done[0] / name).state["data_position"] for name in ("stage1", "stage2")]
    assert positions == [8, 16]
    adapt(world, tmp_path / "r", vocab_adaptation={"stage2_first_sequence": 100, "stage1_steps": 1},
          alignment={"method": "mean"}, evaluation={"enabled": False})  # fmt: skip
    assert checkpoint.find(tmp_path / "r" / "stage2").state["data_position"] == 108


def test_the_progress_of_long_stages_is_shown(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fractions rise and reach the end, or what the held-out documents leave of it."""
    fractions: dict[str, list[float]] = {}

    @contextmanager
    def bar(name: str, quiet: bool) -> Iterator[Callable[[float], None]]:
        yield fractions.setdefault(name, []).append

    monkeypatch.setattr(pipeline, "activity_bar", bar)
    general = {"general": str(world / "general.jsonl"), "val_fraction": 0.1}
    adapt(world, tmp_path / "r", corpus=general, tokenization={"target": "extended"}, term_mining={"top_k": 5},
          vocab_adaptation={"stage1_steps": 1, "stage2_steps": 0}, alignment={"method": "procrustes"})  # fmt: skip
    for stage in ("corpus", "terms", "vectors", "shards", "evaluate_before", "evaluate_stage1"):
        assert 0 < fractions[stage][0] < 1 or len(fractions[stage]) == 1, stage
        assert fractions[stage] == sorted(fractions[stage]), stage
        assert 0.8 < fractions[stage][-1] <= 1, stage
    assert len(fractions["vectors"]) >= 4


def test_a_second_run_skips_all_stages(done: tuple[Path, dict[str, Any]], world: Path) -> None:
    report, log = adapt(world, done[0])
    assert report == done[1]
    warned = [line for line in log if "already done" not in line]
    assert warned == [log[0], f"warning: {report['alignment']['advice'][0]}"]
    assert "precision at 1 on held-out tokens is 0% (expected 60%)" in warned[1]
    assert len(log) == 15


def test_the_adaptation_of_another_model_is_not_overwritten(world: Path, tmp_path: Path) -> None:
    adapt(world, tmp_path / "r", **QUICK)
    make_run(tmp_path / "other", world / "own.model", tie_embeddings=False, n_layers=1, d_model=48, max_seq_len=64)
    with pytest.raises(
        UserError, match=r"r.yaml:\d+: pipeline.run_root: .* contains the adaptation of another model than"
    ):
        adapt(world, tmp_path / "r", models={"source_model": str(tmp_path / "other")}, **QUICK)
    assert (tmp_path / "r" / "initial" / "config.yaml").is_file()


def test_a_changed_setting_rebuilds_its_stage_and_later_ones(world: Path, tmp_path: Path) -> None:
    adapt(world, tmp_path / "r", **QUICK)
    _, log = adapt(world, tmp_path / "r", **(QUICK | {"alignment": {"method": "random"}}))
    assert [line.partition(": ")[::2] for line in log if "rebuilding" in line] == [
        ("alignment", 'rebuilding: method changed from "mean" to "random"'),
        ("initial", "rebuilding: inputs changed"),
        ("result", "rebuilding: inputs changed"),
    ]
    assert next(line for line in log if "already done" in line).startswith("corpus")


def test_a_run_begun_with_former_keys_is_resumed(world: Path, tmp_path: Path) -> None:
    """Neither former keys in the configuration nor records of earlier versions cause a stage to run again."""
    config = yaml.safe_load(write_config(world, tmp_path / "r", **QUICK).read_text())
    for old, alias in AdaptConfig.aliases.items():
        (section, leaf), new = old.split("."), alias.key.partition(".")[2]
        if new in config[section]:
            value = config[section].pop(new)
            config[section][leaf] = value == "bfloat16" if alias.values else value
    assert {"batch_size", "max_seq_length", "bf16"} < config["vocab_adaptation"].keys()
    former = tmp_path / "former.yaml"
    former.write_text(yaml.safe_dump(config))
    adapt_vocab(load(former, [], AdaptConfig), quiet=True)
    for file in (tmp_path / "r" / "records").glob("corpus.*"):  # as earlier versions wrote them
        record = read_checksummed(file)
        record["settings"]["deduplicate"] = record["settings"].pop("dedup")
        write_checksummed(file, record)
    _, log = adapt(world, tmp_path / "r", **QUICK)
    assert [line for line in log if "already done" not in line and "warning" not in line] == []
    assert len(log) >= 5


@pytest.mark.parametrize(("tied", "method", "vectors"), [(False, "pieces", None), (True, "focus", ["target"])])
def test_the_default_method_is_that_of_the_head(
    tied: bool, method: str, vectors: list[str] | None, world: Path, tmp_path: Path
) -> None:
    """With the vectors of only those tokens that the method compares."""
    make_run(tmp_path / "model", world / "own.model", tie_embeddings=tied, n_layers=1, d_model=32, max_seq_len=64)
    change = QUICK | {"alignment": {"method": None}, "models": {"source_model": str(tmp_path / "model")}}
    report, _ = adapt(world, tmp_path / "r", **change)
    assert report["alignment"]["method"] == method
    found = tmp_path / "r" / "vectors" / "vectors.npz"
    assert found.exists() == (vectors is not None)
    if vectors is not None:
        with np.load(found) as arrays:
            assert arrays.files == [name for kind in vectors for name in (kind, f"{kind}_counts")]
        assert report["alignment"]["routes"]["aligned"] > 0


def test_an_alignment_of_an_earlier_version_is_named(world: Path, tmp_path: Path) -> None:
    adapt(world, tmp_path / "r", **QUICK)
    record, plan = tmp_path / "r" / "records" / "alignment.json", tmp_path / "r" / "alignment" / "plan.npz"
    np.savez(plan, routes=np.zeros(420, np.int8), ids=np.zeros((420, 1), np.int64), weights=np.ones((420, 1)))
    found = read_checksummed(record)
    found["outputs"]["plan.npz"] = sha256_file(plan)
    write_checksummed(record, found)
    with pytest.raises(UserError, match="alignment: written by an earlier version: remove this folder"):
        adapt(world, tmp_path / "r", **QUICK)


def test_records_of_training_stages_have_only_non_default_settings(done: tuple[Path, dict[str, Any]]) -> None:
    """So a key that a later version adds does not invalidate them."""
    settings = read_checksummed(done[0] / "records" / "stage2.json")["settings"]
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


def test_an_extended_tokenizer_keeps_all_source_rows(world: Path, tmp_path: Path) -> None:
    report, _ = adapt(world, tmp_path / "r", tokenization={"target": "extended"}, term_mining={"top_k": 20},
                      vocab_adaptation={"stage2_use_lora": False, "stage1_steps": 0, "stage2_steps": 3})  # fmt: skip
    old, new = weights(world / "model"), weights(tmp_path / "r" / "initial")
    assert len(json.loads((tmp_path / "r" / "terms" / "terms.json").read_text())["words"]) == 20
    for name in TRAINED:
        assert np.array_equal(new[name][:400], old[name])
        assert len(new[name]) > 420  # terms and intermediate merges
    assert report["tokenizer"]["tokens_per_byte_target"] < report["tokenizer"]["tokens_per_byte_source"]
    final = weights(tmp_path / "r" / "result")
    assert all(not np.array_equal(final[name], array) for name, array in new.items())


class Killed(BaseException):
    """Caught by nothing, like kill -9."""


def test_a_run_killed_in_each_stage_is_resumed(
    world: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills each stage in turn, after the ones before it were killed and resumed."""
    root = tmp_path / "r"
    places = [
        (initialization, "write_corpus"), (initialization, "train_tokenizer"), (initialization, "train_vectors"),
        (initialization, "align"), (checkpoint, "save"), (training.Pretokenizer, "run"), (MLXEngine, "train_step"),
        (MLXEngine, "train_step"), (training, "fuse"), (pipeline, "evaluate_model"),
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
    report, log = adapt(world, root)
    assert sum("already done" in line for line in log) == len(STAGES) - 4
    for name, array in weights(done[0] / "result").items():
        assert np.array_equal(array, weights(root / "result")[name]), name
    assert report["evaluation"] == done[1]["evaluation"]


def test_kill_9_during_a_stage(world: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Kills the process while it trains vectors and then the model. tests/faults covers every stage."""
    config, rng = write_config(world, tmp_path / "r"), random.Random(0)
    for stage in ("vectors", "stage1"):
        seconds = read_checksummed(done[0] / "records" / f"{stage}.json")["seconds"]
        kill_in(stage, config, tmp_path / "r", seconds, rng)
    subprocess.run(command(config), check=True)
    assert results(tmp_path / "r") == results(done[0])


def test_a_failing_stage_is_retried(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = initialization.align, [OSError("away"), MemoryError("full")]

    def failing(*args: Any, **kw: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args, **kw)

    monkeypatch.setattr(initialization, "align", failing)
    change = dict(QUICK)
    with pytest.raises(MemoryError):
        adapt(world, tmp_path / "r", **change)
    failures.append(OSError("away again"))
    change["pipeline"] = {"max_retries": 2}
    report, log = adapt(world, tmp_path / "r", **change)
    assert report["finished"]
    assert sum("retrying in 0 s" in line for line in log) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alignment": {"pivot_counts": 3}}, "alignment.pivot_counts: unknown key; did you mean 'pivot_count'?"),
        ({"models": {"source_tokenizer": 320}}, "has 320 tokens, but the model in"),
        ({"models": {"source_tokenizer": 400}}, "has different tokens from the tokenizer of the model in"),
        ({"vocab_adaptation": {"lora_target_modules": ["k_porj"]}}, "unknown matrix 'k_porj'; did you mean 'k_proj"),
        ({"evaluation": {"datasets": ["nowhere.txt"]}}, "nowhere.txt: no such file"),
        ({"evaluation": {"baseline_model": "nowhere"}}, "nowhere: no such folder"),
        ({"corpus": {"val_fraction": 0.0}}, "corpus.val_fraction: no documents are held out for evaluation"),
        ({"models": {"target_tokenizer": "nowhere.model"}}, "no such tokenizer file"),
        ({"vocab_adaptation": {"seq_len": 65}}, "vocab_adaptation.seq_len: 65 is above the model's max_seq_len (64)"),
        ({"corpus": {"domain": "nowhere.txt"}}, "nowhere.txt"),
        ({"evaluation": {"qa": "nowhere.jsonl"}}, "evaluation.qa: nowhere.jsonl: cannot read"),
    ],
)
def test_invalid_settings_are_one_line_errors(
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


def test_few_documents_are_held_out_in_a_larger_fraction(world: Path, tmp_path: Path) -> None:
    """A thousandth of the world's 140 documents would usually be none."""
    loaded = load(write_config(world, tmp_path / "r", corpus={"val_fraction": 1e-3}), [], AdaptConfig)
    stages = StageRunner(tmp_path / "r", 0, 0.0, lambda text: None)
    base = load_pretrained(loaded.config.models.source_model)
    run = Adaptation(loaded.config, base, base.digest, base.tokenizer, stages, quiet=True)
    corpus = build_corpus(run)
    assert run.val_fraction(corpus) == corpus.notes["val_fraction"] == 10 / 140
    held_out = (corpus.folder / "held_out.jsonl").read_text().splitlines()
    assert 3 < len(held_out) == corpus.notes["held_out"] < 25
    assert len(list(run.domain_texts(corpus))) == 140 - len(held_out)


def test_the_quick_recipe_fits_a_small_model_and_one_text_file(world: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in (world / "domain.jsonl").read_text().splitlines()]
    (tmp_path / "field.txt").write_text("\n".join(6 * texts))
    words = [f"models.source_model={world / 'model'}", f"corpus.domain={tmp_path / 'field.txt'}", "corpus.dedup=false",
             f"pipeline.run_root={tmp_path / 'r'}", "term_mining.top_k=9", "vocab_adaptation.stage1_steps=2",
             "vocab_adaptation.stage2_steps=2", "embedding.fasttext.epochs=1"]  # fmt: skip
    report = adapt_vocab(load(CONFIGS / "adapt_quick.yaml", words, AdaptConfig), quiet=True)
    assert report["finished"]
    assert list(report["evaluation"]) == ["before", "initial", "stage 1", "stage 2"]
    config = checkpoint.find(tmp_path / "r" / "stage2").config
    assert (config.data.seq_len, config.train.micro_batch_size) == (64, 2)


def test_default_sequences_fit_the_model(world: Path, tmp_path: Path) -> None:
    path = write_config(world, tmp_path / "r")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "seq_len" not in line))
    loaded = load(path, [], AdaptConfig)
    assert [_with_seq_len(loaded, n).config.vocab_adaptation.seq_len for n in (64, 4096)] == [64, 2048]


def test_warning_for_the_papers_learning_rate_with_small_steps(world: Path, tmp_path: Path) -> None:
    change = {"vocab_adaptation": {"stage1_lr": 6.4e-4}}
    settings = load(write_config(world, tmp_path / "r", **change), [], AdaptConfig).config
    (warning,) = warnings(settings)
    assert "stage1_lr: 0.00064 is high with 64 tokens per step" in warning
    assert "2.1 million" in warning
    large = settings.vocab_adaptation.model_copy(update={"grad_accum_steps": -(-525000 // 64)})
    assert warnings(settings.model_copy(update={"vocab_adaptation": large})) == []


def test_answers_are_chosen_by_likelihood(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always prefers the same answer is right as often as that answer is."""
    from anarchobot.evaluation.loglikelihood import LogLikelihood
    from anarchobot.inference.model import load_model

    monkeypatch.setattr(
        evaluation,
        "loglikelihoods",
        lambda model, requests: [LogLikelihood(-float(i % 3 != 1), True) for i, _ in enumerate(requests)],
    )
    found = answer_questions(load_model(world / "model")[0], str(world / "qa.jsonl"), None)
    assert found == {"qa_accuracy": 0.3333, "qa_commonest": 0.3333, "questions": 3}


def test_an_invalid_question_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text('{"question": "a", "abstract": "b", "answer": "yes"}\n{"question": "a"}\n')
    with pytest.raises(Exception, match=r"qa.jsonl:2: expected a JSON object with question, abstract and answer"):
        read_questions(tmp_path / "qa.jsonl")


def test_rows_of_questions_end_only_at_line_feeds(tmp_path: Path) -> None:
    row = {"question": "a?", "abstract": "x\u2028y", "answer": "yes"}
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "qa.jsonl").write_text(f"\ufeff{text}\n\n{text}\n", encoding="utf-8")
    assert read_questions(tmp_path / "qa.jsonl") == [row, row]


def test_the_markdown_table() -> None:
    results = {"before": {"bits_per_byte": 2.0, "qa_accuracy": 0.5}, "after": {"bits_per_byte": 1.23456}}
    assert to_markdown(results).splitlines()[2:] == ["| before | 2.0000 | 0.5000 |", "| after | 1.2346 | - |"]
