"""The model card: numbers, digests, the training curve, and usage."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from anarchobot.exchange.exporting import export
from anarchobot.exchange.fusing import fuse
from anarchobot.exchange.importing import import_model
from anarchobot.exchange.model_card import sparkline
from anarchobot.tasks.dpo import dpo
from anarchobot.tasks.sft import sft
from anarchobot.tokenizers.tokenizer import digest, load_tokenizer
from tests.exchange.random_run import make_run
from tests.tasks.tuning import base as base
from tests.tasks.tuning import chats as chats
from tests.tasks.tuning import events, tuning
from tests.tasks.tuning import preferences as preferences


def card(run: Path, output: Path, target: str = "hf") -> str:
    export(run, target, output)  # type: ignore[arg-type]
    return (output / "README.md").read_text(encoding="utf-8")


def test_card_of_a_pretrained_model(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "my run", bpe)
    (run / "logs").mkdir()
    with (run / "logs" / "metrics.jsonl").open("w") as log:
        for step in range(1, 61):  # also after the exported step, 40
            log.write(json.dumps({"step": step, "event": "train", "loss": 6.0 - step / 10}) + "\n")
            if step % 20 == 0:
                values = {"val_loss": 7.5 - step / 10, "val_bpb": 3.0, "perplexity": 9.0}
                log.write(json.dumps({"step": step, "event": "eval", **values}) + "\n")
        log.write('{"step": 40, "eve')  # truncated
    summary = {"tokens_per_second": 4321.0, "peak_memory_gb": 1.25}
    (run / "logs" / "final_training_summary.json").write_text(json.dumps(summary))
    text = card(run, tmp_path / "out")
    front, _, body = text.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["anarchobot"]
    }  # fmt: skip
    assert body.startswith("\n# my run\n\nA language model with ")
    assert "\n\n\n" not in text and "{" not in text
    for fact in (
        *("| steps | 40 |", "| tokens | 1,234,567 |", "| training loss (nats per token) | 2.5000 |"),
        *("| best validation loss (nats per token) | 2.2500 |", "(bits per byte) | 1.1250 |"),
        *("| tokens per second | 4,321 |", "| peak memory (GB) | 1.2500 |", "| time (hours) | 1.0000 |"),
        f"| tokenizer (SHA-256) | `{digest(load_tokenizer(bpe))}` |",
        f"| data in `shards` (SHA-256 of its manifest) | `{'d' * 64}` |",
        *("Training loss, steps 1 to 40, between 2.000 and 5.900:", "| 40 | 3.5000 | 3.0000 | 9.00 |"),
        *("AutoModelForCausalLM.from_pretrained", "mlx_lm.generate --model .", "  d_model: 48"),
    ):
        assert fact in body, fact
    assert "| 60 |" not in body and "60:" not in body
    (bars,) = (line.strip() for line in body.splitlines() if line.startswith("    █"))
    assert len(bars) == 40 and bars[-1] == "▁" and list(bars) == sorted(bars, reverse=True)


def value_of(text: str, label: str) -> float:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return float(line.split("|")[2])


def test_best_loss_includes_the_last_validation(tmp_path: Path, base: Path) -> None:
    """state.json is written before that validation. Tested with and without the log."""
    last = events(base, "eval")[-1]
    best = json.loads((base / "best.json").read_text())
    state = json.loads((base / "step_00000006" / "state.json").read_text())
    assert best["best_val_loss"] == last["val_loss"] < state["best_val_loss"]
    copy = shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(copy / "logs")
    for run, to in ((base, "a"), (copy, "b")):
        text = card(run, tmp_path / to)
        assert value_of(text, "best validation loss (nats per token)") == round(last["val_loss"], 4)
        assert value_of(text, "best validation loss (bits per byte)") == round(last["val_bpb"], 4)
    earlier = card(base / "step_00000003", tmp_path / "earlier")
    assert value_of(earlier, "best validation loss (nats per token)") == round(events(base, "eval")[1]["val_loss"], 4)


def test_first_and_last_token_of_a_text(tmp_path: Path, bpe: Path) -> None:
    eod = load_tokenizer(bpe).eod_id
    plain = card(make_run(tmp_path / "plain", bpe, n_layers=1), tmp_path / "a")
    assert f"starts with the end-of-document token and ends with it (token {eod}). The tokenizer adds the" in plain
    other = card(make_run(tmp_path / "other", bpe, n_layers=1, bos_id=7), tmp_path / "b")
    assert f"starts with token 7 and ends with the end-of-document token (token {eod})." in other


def test_card_of_a_fine_tuned_model(tmp_path: Path, base: Path, chats: Path) -> None:
    sft(tuning(tmp_path, "run", base, chats, chat__rouge_samples=1), show="nothing")
    text = card(tmp_path / "run", tmp_path / "out")
    state = json.loads((tmp_path / "run" / "step_00000006" / "state.json").read_text())
    assert "tags: [anarchobot, conversational]" in text and "fine-tuned with AnarchoBot; step 6 of its training" in text
    assert "It answers in conversations that use its chat template. It has not been safety-tuned." in text
    assert "tokenizer.apply_chat_template(" in text and "an answer ends with token" in text
    digests = state["conversations"]
    for fact in (
        f"| training data | `{chats.name}` |", f"| training data (SHA-256) | `{digests[0]}` |",
        f"| validation data (SHA-256) | `{digests[1]}` |", f"| initialized from | `{base.name}` |",
        f"| initialized from (SHA-256 of the weights) | `{state['base']}` |",
    ):  # fmt: skip
        assert fact in text, fact
    heads = "| step | validation loss | bits per byte | perplexity | rouge1 | rouge2 | rougeL |"
    assert heads in text
    last = events(tmp_path / "run", "eval")[-1]
    row = f"| 6 | {last['val_loss']:.4f} | {last['val_bpb']:.4f} | {last['perplexity']:.2f} | {last['rouge1']:.4f} |"
    assert row in text


def test_card_after_preference_training(tmp_path: Path, base: Path, preferences: Path) -> None:
    """The loss is not per token, and the table has the preference metrics."""
    dpo(tuning(tmp_path, "run", base, preferences), show="nothing")
    text = card(tmp_path / "run", tmp_path / "out")
    lines = events(tmp_path / "run", "eval")
    assert value_of(text, "best validation loss") == round(min(line["val_loss"] for line in lines), 4)
    assert "nats per token" not in text and "bits per byte" not in text and "perplexity" not in text
    assert "| step | validation loss | reward margin | reward accuracy | chosen log prob | rejected log prob |" in text
    assert f"| 6 | {lines[-1]['val_loss']:.4f} | {lines[-1]['val_reward_margin']:.4f} |" in text


def test_cards_of_imported_and_fused_models(tmp_path: Path, base: Path, chats: Path) -> None:
    export(base, "hf", tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "imported")
    text = card(tmp_path / "imported", tmp_path / "a")
    assert "It continues text.\n" in text and "safe" not in text
    assert "imported into AnarchoBot" in text and "| imported from | `hf` |" in text
    assert "| steps |" not in text and "| tokens |" not in text
    sft(tuning(tmp_path, "adapters", base, chats, lora__r=4), show="nothing")
    fuse(base, tmp_path / "adapters", tmp_path / "fused")
    text = card(tmp_path / "fused", tmp_path / "b", "gguf")
    assert "fused by AnarchoBot from a base model and its adapters" in text
    assert "The tokenizer does not add the start token" in text and "llama-cli -m model.gguf --jinja" in text
    assert f"| fused from | `{base.name}` and the adapters in `adapters` |" in text


def test_card_without_logs(tmp_path: Path, bpe: Path) -> None:
    text = card(make_run(tmp_path / "run", bpe), tmp_path / "out", "gguf")
    assert "library_name: llama.cpp" in text and "FROM ./model.gguf" in text and "ollama create" in text
    assert "Training loss" not in text and "from_pretrained" not in text


def test_warnings_are_included(tmp_path: Path, tokenizers_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizers_folder / "unigram" / "tokenizer.model", n_layers=1)
    assert "> unigram tokenizer in tokenizer.json" in card(run, tmp_path / "out")


@pytest.mark.parametrize(("values", "bars"), [([1.0, 1.0], "▁▁"), ([0.0, 7.0, 3.0], "▁█▄"), ([2.0], "▁")])
def test_sparklines_by_hand(values: list[float], bars: str) -> None:
    assert sparkline(values) == (bars, min(values), max(values))


def test_a_long_curve_is_averaged() -> None:
    bars, low, high = sparkline([float(i // 10) for i in range(600)])
    assert len(bars) == 60 and (low, high) == (0.0, 59.0)
