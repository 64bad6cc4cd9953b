"""Scores in lm-evaluation-harness match those of its Hugging Face model with the same weights."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.evaluation.evaluate import EvalRequest, evaluate_tasks
from anarchobot.exchange.exporting import export
from anarchobot.inference.generation import TextBatch, TextChunk
from anarchobot.inference.model import Model, load_model
from tests.exchange.conftest import bpe as bpe
from tests.exchange.conftest import tokenizers_folder as tokenizers_folder
from tests.exchange.random_run import make_run
from tests.inference.conftest import family_model

pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")
lm_tasks = pytest.importorskip("lm_eval.tasks")

COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: label\n"
    "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}, {metric: word_perplexity}]\n",
    "written": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs: {until: ['e'], max_gen_toks: 12, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
}


def words(text: str, n: int) -> list[str]:
    parts = text.split()
    return [" ".join(parts[i : i + n]) for i in range(0, len(parts) - n, n)]


@pytest.fixture
def tasks(tmp_path: Path, bpe: Path) -> Path:
    """Three local tasks of 40 documents each, made from the text of this file."""
    some = words(Path(__file__).read_text(encoding="utf-8").replace("'", "") * 3, 6)
    rows = [
        {
            "question": some[i] if i % 7 else "", "choices": [f" {some[i + 1]}", f" {some[i + 2]}"], "label": i % 2,
            "text": " ".join(some[i : i + 1 + 10 * (i % 5)]), "answer": some[i + 1],
        }
        for i in range(40)
    ]  # fmt: skip
    rows[7]["question"] = ""  # an empty context
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, text in TASKS.items():
        common = COMMON.format(file=json.dumps(str(tmp_path / "rows.jsonl")))
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"task: our_{name}\n{common}{text}")
    return tmp_path / "tasks"


@pytest.mark.filterwarnings("default")  # of lm_eval
def test_local_tasks_match_the_hugging_face_model(
    tmp_path: Path, bpe: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    # Reading the thousands of tasks of the package takes 20 s.
    monkeypatch.setattr(lm_tasks, "TaskManager", partial(lm_tasks.TaskManager, include_defaults=False))
    run = make_run(tmp_path / "run", bpe, max_seq_len=160)
    export(run, "hf", tmp_path / "hf")
    model, _ = load_model(run)
    request, lines = EvalRequest(tasks=["our_choice", "our_rolling", "our_written"], include=str(tasks)), list[str]()
    found = evaluate_tasks(model, request, lines.append)
    ours = {name: result.metrics for name, result in found.items()}
    assert lines == []

    from lm_eval.models.huggingface import HFLM

    manager = lm_tasks.TaskManager(include_path=str(tasks))

    def theirs(name: str, **more: Any) -> dict[str, float]:
        hf = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4, **more)
        found = lm_eval.simple_evaluate(hf, tasks=[name], task_manager=manager, bootstrap_iters=0)
        return {key.removesuffix(",none"): value for key, value in found["results"][name].items()}

    for name in ("our_choice", "our_rolling", "our_written"):
        expected = theirs(name, add_bos_token=name != "our_rolling")  # it would score the prefix token
        for key in set(ours[f"task {name}"]) - {"samples"}:
            if "stderr" not in key:
                assert ours[f"task {name}"][key] == pytest.approx(expected[key], rel=1e-4), (name, key)
    assert 0 < ours["task our_choice"]["acc"] < 1


@pytest.mark.parametrize(
    "limits",
    [
        {}, {"max_gen_toks": 3}, {"max_new_tokens": 3}, {"max_tokens": 3}, {"max_completion_tokens": "3"},
        {"max_tokens": 9, "max_gen_toks": 3}, {"max_gen_toks": None, "max_new_tokens": 9},
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("default")  # of lm_eval
def test_all_names_of_the_token_limit(tmp_path: Path, limits: dict[str, Any]) -> None:
    """The model never ends by itself. An empty text in `until` is no end."""
    from lm_eval.models.utils import normalize_gen_kwargs

    model, _ = load_model(family_model("flags", tmp_path / "hf", "a", max_seq_len=300))
    expected = normalize_gen_kwargs(limits)["max_gen_toks"]
    for until in ([""], ["", "x"], "", None, [])[: 5 if limits else 1]:
        assert generate_until(model, until=until, **limits) == "a" * expected


@pytest.mark.parametrize(
    "settings",
    [
        {"max_gen_toks": math.inf}, {"max_gen_toks": math.nan}, {"max_gen_toks": "many"}, {"max_gen_toks": 0},
        {"max_gen_toks": [3]}, {"temperature": "hot"}, {"top_p": 2}, {"until": 5}, {"until": [5]},
        {"temperature": math.nan}, {"temperature": math.inf},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_settings_of_a_task_are_one_line_errors(settings: dict[str, Any]) -> None:
    from anarchobot.evaluation.harness import _generation_config

    with pytest.raises(UserError, match=re.escape(f"got {settings}")) as error:
        _generation_config(settings, 100)
    assert str(error.value).startswith("generation_kwargs of the task: ")
    assert "validation error" not in str(error.value)  # of pydantic, in several lines


def test_sampling_settings_of_a_task() -> None:
    from anarchobot.evaluation.harness import _generation_config

    sampled = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
    }
    found = _generation_config(sampled, 100)
    assert (found.method, found.temperature, found.filters) == ("combined", 0.7, (20, 0.8, 0.1))
    assert found.repetition_penalty == 1.1
    found = _generation_config({"temperature": 0.7, "top_k": -1}, 100)
    assert (found.method, found.filters) == ("combined", (0, 1.0, 0.0))
    assert _generation_config(sampled | {"do_sample": False}, 100).is_greedy
    assert _generation_config({"top_k": 20}, 100).is_greedy


def test_settings_of_a_task_without_effect_are_named(tmp_path: Path, bpe: Path) -> None:
    from lm_eval.api.instance import Instance

    from anarchobot.evaluation.harness import HarnessModel

    model = HarnessModel(load_model(make_run(tmp_path / "run", bpe))[0])
    settings = {"until": ["x"], "max_gen_toks": 2, "num_beams": 3, "use_cache": True, "early_stopping": None}
    model.generate_until([Instance("generate_until", {}, ("a", settings), 0)])
    assert model.unused == {"num_beams": 3}


def test_half_a_character_in_a_task_is_a_one_line_error(tmp_path: Path, bpe: Path) -> None:
    from lm_eval.api.instance import Instance

    from anarchobot.evaluation.harness import HarnessModel

    model = HarnessModel(load_model(make_run(tmp_path / "run", bpe))[0])
    with pytest.raises(UserError, match="not valid Unicode"):
        model.generate_until([Instance("generate_until", {}, ("\ud800", {}), 0)])
    for pair in (("\ud800", "x"), ("x", "\ud800")):
        with pytest.raises(UserError, match="not valid Unicode"):
            model.loglikelihood([Instance("loglikelihood", {}, pair, 0)])


@pytest.mark.parametrize(
    ("name", "says", "until"),
    [("gemma", "<end_of_turn>", ["x"]), ("llama3", "<|start_header_id|>", ["x", "<|start_header_id|>"])],
)
def test_end_tokens_and_control_tokens_in_until(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str, until: list[str]
) -> None:
    """Neither is text: only the number of tokens tells that generation has stopped."""
    model, _ = load_model(family_model(name, tmp_path / "hf", says))
    step, tokens = TextBatch.step, []

    def recorded(batch: TextBatch) -> list[TextChunk]:
        chunks = step(batch)
        tokens.extend(chunk.tokens for chunk in chunks)
        return chunks

    monkeypatch.setattr(TextBatch, "step", recorded)
    assert generate_until(model, until=until, max_gen_toks=9) == "" and tokens == [0]


def generate_until(model: Model, **settings: Any) -> str:
    from lm_eval.api.instance import Instance

    from anarchobot.evaluation.harness import HarnessModel

    (text,) = HarnessModel(model).generate_until([Instance("generate_until", {}, ("a", settings), 0)])
    return text
