"""The settings of adapt-vocab: the promised values, and mistakes told in one line."""

from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import leaf_keys, load

CONFIGS = Path(__file__).parents[2] / "configs"

# Copied by hand from what others rely on.
STABLE: dict[str, Any] = {
    "corpus.deduplicate": True, "corpus.hash_name": "sha256", "term_mining.top_k": 2000, "term_mining.min_frequency": 3,
    "term_mining.use_tfidf": True, "embedding.backend": "fasttext", "embedding.fasttext.epochs": 30,
    "embedding.fasttext.mincount": 1, "embedding.fasttext.lr": 0.05, "embedding.fasttext.thread": None,
    "alignment.pivot_count": 2000, "alignment.similarity_threshold": 0.4, "alignment.top_k": 10,
    "vocab_adaptation.enabled": True,
    "vocab_adaptation.stage1_steps": 2500, "vocab_adaptation.lr_stage1": 2e-5, "vocab_adaptation.stage2_steps": 2500,
    "vocab_adaptation.lr_stage2": 5e-5, "vocab_adaptation.batch_size": 4, "vocab_adaptation.gradient_accumulation": 16,
    "vocab_adaptation.max_seq_length": 2048, "vocab_adaptation.stage2_use_lora": True, "vocab_adaptation.lora_r": 64,
    "vocab_adaptation.lora_alpha": 16, "vocab_adaptation.lora_dropout": 0.1,
}  # fmt: skip
PAPER = {
    "vocab_adaptation.lr_stage1": 6.4e-4, "vocab_adaptation.stage1_steps": 2500, "vocab_adaptation.lr_stage2": 5e-5,
    "vocab_adaptation.stage2_steps": 2500, "vocab_adaptation.batch_size": 2, "vocab_adaptation.stage2_use_lora": False,
}  # fmt: skip
LEAST = "models: {source_model: a}\ncorpus: {domain: b.txt}\n"


def value(config: AdaptConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def test_the_shipped_values() -> None:
    for name, promised in (("adapt_stable", STABLE), ("adapt_paper", STABLE | PAPER)):
        config = load(CONFIGS / f"{name}.yaml", [], AdaptConfig).config
        assert {key: value(config, key) for key in promised} == promised


def test_the_defaults_are_the_stable_ones(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(LEAST)
    config = load(tmp_path / "c.yaml", [], AdaptConfig).config
    assert {key: value(config, key) for key in STABLE} == STABLE
    assert config.corpus.budget == 10**9
    assert load(tmp_path / "c.yaml", ["corpus.byte_budget=5e3"], AdaptConfig).config.corpus.budget == 5000


@pytest.mark.parametrize("key", leaf_keys(AdaptConfig))
def test_every_setting_says_what_it_means(key: str) -> None:
    description = leaf_keys(AdaptConfig)[key].description
    assert description
    assert len(description) < 120


def test_a_key_of_three_parts_can_be_set_in_both_places(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{LEAST}embedding:\n  fasttext:\n    epochs: 7\n    lr: 0.1\n")
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
        ("embedding: {fasttext: 3}", "c.yaml:3: embedding.fasttext: expected a section of keys, got 3"),
        (
            "embedding:\n  fasttext:\n    epochs: 0",
            "embedding.fasttext.epochs: expected a whole number of at least 1, got 0",
        ),
        ("corpus2: {}", "unknown section; did you mean 'corpus'?"),
        ("vocab_adaptation: {lora_r: 2}", "expected a whole number of at least 4 and at most 64, got 2"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(more: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{LEAST}{more}\n")
    with pytest.raises(UserError) as error:
        load(tmp_path / "c.yaml", [], AdaptConfig)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_must_be_there() -> None:
    with pytest.raises(UserError, match="models: is missing"):
        load(None, [], AdaptConfig)
    with pytest.raises(UserError, match=r"models.source_model: is missing"):
        load(None, ["models.target_tokenizer=a", "corpus.domain=b"], AdaptConfig)
    with pytest.raises(UserError, match=r"'epochs=3': expected SECTION.KEY=VALUE; did you mean 'embedding.fasttext"):
        load(None, ["epochs=3"], AdaptConfig)
