"""The settings of adapt-vocab: shipped values, former key names, and errors."""

from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import Loaded, leaf_keys, load

CONFIGS = Path(__file__).parents[2] / "configs"

# Copied by hand: other people rely on these values.
STABLE: dict[str, Any] = {
    "corpus.dedup": True, "corpus.hash_name": "sha256", "term_mining.top_k": 2000, "term_mining.min_frequency": 3,
    "term_mining.use_tfidf": True, "embedding.backend": "fasttext", "embedding.fasttext.epochs": 30,
    "embedding.fasttext.mincount": 1, "embedding.fasttext.lr": 0.05, "embedding.fasttext.thread": None,
    "alignment.pivot_count": 2000, "alignment.similarity_threshold": 0.4, "alignment.top_k": 10,
    "vocab_adaptation.enabled": True,
    "vocab_adaptation.stage1_steps": 2500, "vocab_adaptation.stage1_lr": 2e-5, "vocab_adaptation.stage2_steps": 2500,
    "vocab_adaptation.stage2_lr": 5e-5, "vocab_adaptation.micro_batch_size": 4, "vocab_adaptation.grad_accum_steps": 16,
    "vocab_adaptation.seq_len": 2048, "vocab_adaptation.stage2_use_lora": True, "vocab_adaptation.lora_r": 64,
    "vocab_adaptation.lora_alpha": 16, "vocab_adaptation.lora_dropout": 0.1,
}  # fmt: skip
PAPER = {
    "vocab_adaptation.stage1_lr": 6.4e-4, "vocab_adaptation.stage1_steps": 2500, "vocab_adaptation.stage2_lr": 5e-5,
    "vocab_adaptation.stage2_steps": 2500, "vocab_adaptation.micro_batch_size": 2,
    "vocab_adaptation.stage2_use_lora": False,
}  # fmt: skip
REQUIRED = "models: {source_model: a}\ncorpus: {domain: b.txt}\n"


def value(config: AdaptConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def test_shipped_values() -> None:
    for name, promised in (("adapt_stable", STABLE), ("adapt_paper", STABLE | PAPER)):
        config = load(CONFIGS / f"{name}.yaml", [], AdaptConfig).config
        assert {key: value(config, key) for key in promised} == promised


def test_defaults_are_those_of_adapt_stable(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(REQUIRED)
    config = load(tmp_path / "c.yaml", [], AdaptConfig).config
    assert {key: value(config, key) for key in STABLE} == STABLE
    assert config.corpus.budget == 10**9
    assert load(tmp_path / "c.yaml", ["corpus.byte_budget=5e3"], AdaptConfig).config.corpus.budget == 5000


@pytest.mark.parametrize("key", leaf_keys(AdaptConfig))
def test_every_setting_is_described(key: str) -> None:
    description = leaf_keys(AdaptConfig)[key].description
    assert description
    assert len(description) < 120


def test_a_nested_key_can_be_set_in_the_file_and_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{REQUIRED}embedding:\n  fasttext:\n    epochs: 7\n    lr: 0.1\n")
    loaded = load(tmp_path / "c.yaml", ["embedding.fasttext.epochs=3"], AdaptConfig)
    assert loaded.config.embedding.fasttext.epochs == 3
    assert loaded.config.embedding.fasttext.lr == 0.1
    assert loaded.where("embedding.fasttext.epochs") == "command line: embedding.fasttext.epochs"
    assert loaded.where("embedding.fasttext.lr") == f"{tmp_path}/c.yaml:6: embedding.fasttext.lr"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("alignment: {pivot_counts: 3}", "c.yaml:3: alignment.pivot_counts: unknown key; did you mean 'pivot_count'?"),
        ("alinment: {}", "c.yaml:3: alinment: unknown section; did you mean 'alignment'?"),
        (
            "embedding:\n  fasttext:\n    epoch: 3",
            "c.yaml:5: embedding.fasttext.epoch: unknown key; did you mean 'epochs'?",
        ),
        ("embedding: {epochs: 3}", "embedding.epochs: unknown key; did you mean 'embedding.fasttext.epochs'?"),
        ("embedding: {fasttext: 3}", "c.yaml:3: embedding.fasttext: expected a mapping, got 3"),
        (
            "embedding:\n  fasttext:\n    epochs: 0",
            "embedding.fasttext.epochs: expected an integer >= 1, got 0",
        ),
        ("corpus2: {}", "unknown section; did you mean 'corpus'?"),
        ("vocab_adaptation: {lora_r: 2}", "expected an integer >= 4 and <= 64, got 2"),
    ],
)  # fmt: skip
def test_errors_are_one_line(more: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{REQUIRED}{more}\n")
    with pytest.raises(UserError) as error:
        load(tmp_path / "c.yaml", [], AdaptConfig)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_required_keys(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("corpus: {domain: b}\n")
    with pytest.raises(UserError, match=r"c.yaml: models: is required$"):
        load(tmp_path / "c.yaml", [], AdaptConfig)
    (tmp_path / "c.yaml").write_text("model: {}\n")
    problems = r"c.yaml:1: model: unknown section; did you mean 'models'\?; also .*c.yaml: models: is required"
    with pytest.raises(UserError, match=problems):
        load(tmp_path / "c.yaml", [], AdaptConfig)
    with pytest.raises(UserError, match=r"^models: is required"):
        load(None, [], AdaptConfig)
    with pytest.raises(UserError, match=r"models.source_model: is required"):
        load(None, ["models.target_tokenizer=a", "corpus.domain=b"], AdaptConfig)
    with pytest.raises(UserError, match=r"'epochs=3': expected SECTION.KEY=VALUE; did you mean 'embedding.fasttext"):
        load(None, ["epochs=3"], AdaptConfig)


# --- former key names ------------------------------------------------------------------------------------------------

FORMER = """\
models: {source_model: a}
corpus: {domain: b.txt, deduplicate: false}
tokenization: {workers: 3}
vocab_adaptation:
  lr_stage1: 1e-3
  lr_stage2: 2e-3
  batch_size: 5
  gradient_accumulation: 6
  max_seq_length: 77
  train_start_idx_stage2: 8
  bf16: false
"""
CURRENT = """\
models: {source_model: a}
corpus: {domain: b.txt, dedup: false}
tokenization: {num_workers: 3}
vocab_adaptation:
  stage1_lr: 1e-3
  stage2_lr: 2e-3
  micro_batch_size: 5
  grad_accum_steps: 6
  seq_len: 77
  stage2_first_sequence: 8
  precision: float32
"""


def loaded(folder: Path, text: str, *overrides: str) -> Loaded[AdaptConfig]:
    (folder / "c.yaml").write_text(text)
    return load(folder / "c.yaml", overrides, AdaptConfig)


def error(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder, text, *overrides)
    return str(caught.value).removeprefix(f"{folder}/")


def test_former_keys_mean_the_same(tmp_path: Path) -> None:
    former, current = loaded(tmp_path, FORMER), loaded(tmp_path, CURRENT)
    assert former.config == current.config
    assert former.sources == current.sources  # the lines are the same, under the current keys
    assert {alias.key for alias in AdaptConfig.aliases.values()} == set(former.aliases) < set(current.sources)
    assert former.where("vocab_adaptation.seq_len") == f"{tmp_path}/c.yaml:9: vocab_adaptation.max_seq_length"
    assert current.where("vocab_adaptation.seq_len") == f"{tmp_path}/c.yaml:9: vocab_adaptation.seq_len"


def test_former_keys_on_the_command_line(tmp_path: Path) -> None:
    words = [f"{old}={'true' if new.values else 2}" for old, new in AdaptConfig.aliases.items() if "dedup" not in old]
    training = loaded(tmp_path, CURRENT, *words).config.vocab_adaptation
    assert (training.micro_batch_size, training.seq_len, training.precision) == (2, 2, "bfloat16")
    found = loaded(tmp_path, FORMER, "vocab_adaptation.micro_batch_size=9")
    assert found.config.vocab_adaptation.micro_batch_size == 9
    assert found.where("vocab_adaptation.micro_batch_size") == "command line: vocab_adaptation.micro_batch_size"
    assert loaded(tmp_path, REQUIRED, "vocab_adaptation.bf16=false").config.vocab_adaptation.precision == "float32"


def test_errors_name_the_key_as_written(tmp_path: Path) -> None:
    section = f"{REQUIRED}vocab_adaptation:\n"
    assert error(tmp_path, f"{section}  batch_size: 0\n") == (
        "c.yaml:4: vocab_adaptation.batch_size: expected an integer >= 1, got 0"
    )
    assert error(tmp_path, f"{section}  bf16: 1\n") == "c.yaml:4: vocab_adaptation.bf16: expected true or false, got 1"
    assert error(tmp_path, REQUIRED, "vocab_adaptation.lr_stage1=fast") == (
        'command line: vocab_adaptation.lr_stage1: expected a number > 0, got "fast"'
    )


def test_a_former_and_a_current_key_together_are_an_error(tmp_path: Path) -> None:
    both = f"{REQUIRED}vocab_adaptation:\n  batch_size: 1\n  micro_batch_size: 2\n"
    assert error(tmp_path, both).replace(f"{tmp_path}/", "") == (
        "c.yaml:4: vocab_adaptation.batch_size: deprecated name of vocab_adaptation.micro_batch_size, which is "
        "also set (c.yaml:5): keep one"
    )
    words = ["vocab_adaptation.bf16=true", "vocab_adaptation.precision=float32"]
    for order in (words, words[::-1]):
        assert error(tmp_path, REQUIRED, *order) == (
            "command line: vocab_adaptation.bf16: deprecated name of vocab_adaptation.precision, which is also set "
            "(command line): keep one"
        )
