"""The model card: figures, digests, the curve, and commands."""

import json
from pathlib import Path

import pytest
import yaml

from anarchobot.data.tokenizer import digest, load_tokenizer
from anarchobot.exchange.exporting import export
from anarchobot.exchange.model_card import sparkline
from tests.exchange.making import make_run


def card(run: Path, output: Path, target: str = "hf") -> str:
    export(run, target, output)  # type: ignore[arg-type]
    return (output / "README.md").read_text(encoding="utf-8")


def test_it_says_what_the_run_wrote_down(tmp_path: Path, bpe: Path) -> None:
    run = make_run(tmp_path / "my run", bpe)
    (run / "logs").mkdir()
    with (run / "logs" / "metrics.jsonl").open("w") as log:
        for step in range(1, 61):  # beyond the exported step, 40, as well
            log.write(json.dumps({"step": step, "event": "train", "loss": 6.0 - step / 10}) + "\n")
            if step % 20 == 0:
                values = {"val_loss": 7.5 - step / 10, "val_bpb": 3.0, "perplexity": 9.0}
                log.write(json.dumps({"step": step, "event": "eval", **values}) + "\n")
        log.write('{"step": 40, "eve')  # torn
    summary = {"tokens_per_second": 4321.0, "peak_memory_gb": 1.25}
    (run / "logs" / "final_training_summary.json").write_text(json.dumps(summary))
    text = card(run, tmp_path / "out")
    front, _, body = text.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["anarchobot"]
    }  # fmt: skip
    assert body.lstrip().startswith("# my run\n")
    for fact in (
        *("| steps | 40 |", "| tokens | 1,234,567 |", "| training loss (nats per token) | 2.5000 |"),
        *("| best validation loss (nats per token) | 2.2500 |", "(bits per byte) | 1.1250 |"),
        *("| tokens per second | 4,321 |", "| peak memory (GB) | 1.2500 |", "| time (hours) | 1.0000 |"),
        f"| tokenizer (sha256) | `{digest(load_tokenizer(bpe))}` |",
        f"| data in `shards` (digest of its manifest) | `{'d' * 64}` |",
        *("Training loss, steps 1 to 40, between 2.000 and 5.900:", "| 40 | 3.5000 | 3.0000 | 9.00 |"),
        *("AutoModelForCausalLM.from_pretrained", "mlx_lm.generate --model .", "  d_model: 48"),
    ):
        assert fact in body, fact
    assert "| 60 |" not in body and "60:" not in body
    (bars,) = (line.strip() for line in body.splitlines() if line.startswith("    █"))
    assert len(bars) == 40 and bars[-1] == "▁" and list(bars) == sorted(bars, reverse=True)


def test_without_logs_it_is_shorter(tmp_path: Path, bpe: Path) -> None:
    text = card(make_run(tmp_path / "run", bpe), tmp_path / "out", "gguf")
    assert "library_name: llama.cpp" in text and "FROM ./model.gguf" in text and "ollama create" in text
    assert "Training loss" not in text and "from_pretrained" not in text


def test_what_the_user_must_know_stands_in_it(tmp_path: Path, tokenizers_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizers_folder / "unigram" / "tokenizer.model", n_layers=1)
    assert "> a unigram tokenizer in tokenizer.json" in card(run, tmp_path / "out")


@pytest.mark.parametrize(("values", "bars"), [([1.0, 1.0], "▁▁"), ([0.0, 7.0, 3.0], "▁█▄"), ([2.0], "▁")])
def test_sparklines_by_hand(values: list[float], bars: str) -> None:
    assert sparkline(values) == (bars, min(values), max(values))


def test_a_long_curve_is_averaged() -> None:
    bars, low, high = sparkline([float(i // 10) for i in range(600)])
    assert len(bars) == 60 and (low, high) == (0.0, 59.0)
