"""Loading a file and KEY=VALUE overrides: precedence, sources of values, and error messages."""

import random
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig, config_from_dict, leaf_keys, load_config
from anarchobot.config.schema import Config, ModelConfig, RopeScaling
from anarchobot.config.strict_yaml import dump
from anarchobot.config.validation import SCALING_KEYS

SHIPPED = sorted((Path(__file__).parents[2] / "configs").rglob("[!a]*.yaml"))  # adapt_*.yaml: test_adapt_schema.py


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that messages name files by relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message(text: str | None, *overrides: str) -> str:
    """The error of load_config for a c.yaml with this text (None: no file)."""
    if text is not None:
        Path("c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config("c.yaml" if text is not None else None, overrides)
    return str(error.value)


# --- precedence and sources ------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(here: Path) -> None:
    (here / "c.yaml").write_text("train:\n  lr: 1e-3\n  seed: 1\n")
    loaded = load_config("c.yaml", ["train.seed=2", "data.seq_len=7", "train.seed=3"])
    train = loaded.config.train
    assert (train.lr, train.seed, train.momentum, loaded.config.data.seq_len) == (1e-3, 3, 0.95, 7)
    assert loaded.sources == {"train.lr": "c.yaml:2", "data.seq_len": "command line", "train.seed": "command line"}
    assert loaded.where("train.lr") == "c.yaml:2: train.lr"
    assert loaded.where("train.seed") == "command line: train.seed"
    assert loaded.where("train.momentum") == "train.momentum (default)"


def test_without_a_file_all_values_are_defaults() -> None:
    assert load_config(None) == LoadedConfig(Config(), {})


@pytest.mark.parametrize("text", ["", "model:\n", "model: null\ndata: {}\n"])
def test_an_empty_section_has_defaults_and_can_be_overridden(here: Path, text: str) -> None:
    (here / "c.yaml").write_text(text)
    assert load_config("c.yaml").config == Config()
    assert load_config("c.yaml", ["model.n_layers=2"]).config.model.n_layers == 2


PATH_KEYS = (
    *("data.dataset", "data.shard_dir", "data.cache_dir", "train.save_dir", "train.log_path", "train.init_from"),
    *("train.tokenizer_path", "train.checkpoint_path", "chat.template", "knowledge_base.path"),
)


@pytest.mark.parametrize("key", PATH_KEYS)
def test_the_home_folder_is_expanded_in_paths(key: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert attrgetter(key)(load_config(None, [f"{key}=~/a"]).config) == f"{here}/a"
    assert attrgetter(key)(load_config(None, [(key, "a~/b")]).config) == "a~/b"


def test_the_home_folder_is_expanded_in_lists_of_paths_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    config = load_config(None, ["data.dataset=[~/a, b]", "generation.prompt=~/a"]).config
    assert config.data.dataset == [f"{here}/a", "b"] and config.generation.prompt == "~/a"


def test_a_key_value_pair_is_not_parsed() -> None:
    """The argument of --prompt is a string even where YAML would parse a number or a list."""
    for text in ("a: [b", "3", "null", "😀\n", "\x7f\u2028", " x "):
        assert load_config(None, [("generation.prompt", text)]).config.generation.prompt == text


@pytest.mark.parametrize(
    ("word", "value"),
    [("1e5", 100000), ("3.0e3", 3000), ("1_000", 1000), ("0x10", 16), ("7.0", 7)],
)  # fmt: skip
def test_spellings_of_integers(word: str, value: int) -> None:
    value_loaded = load_config(None, [f"train.total_steps={word}"]).config.train.total_steps
    assert value_loaded == value
    assert type(value_loaded) is int


@pytest.mark.parametrize(("word", "value"), [("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1", 1.0), (".5", 0.5)])
def test_floats_without_a_dot(here: Path, word: str, value: float) -> None:
    (here / "c.yaml").write_text(f"train:\n  lr: {word}\n")
    value_loaded = load_config("c.yaml").config.train.lr
    assert value_loaded == value
    assert type(value_loaded) is float


def test_a_run_length_on_the_command_line_replaces_the_one_in_the_file(here: Path) -> None:
    (here / "c.yaml").write_text("train:\n  total_steps: 10\n  lr: 1e-3\n")
    loaded = load_config("c.yaml", ["train.epochs=2"])
    assert (loaded.config.train.epochs, loaded.config.train.total_steps) == (2, 50000)
    assert loaded.sources == {"train.lr": "c.yaml:3", "train.epochs": "command line"}
    (here / "c.yaml").write_text("train:\n  epochs: 2\n")
    loaded = load_config("c.yaml", ["train.total_steps=10"])
    assert (loaded.config.train.epochs, loaded.config.train.total_steps) == (None, 10)
    assert load_config("c.yaml", ["train.token_budget=null"]).config.train.epochs == 2  # null does not replace it


@pytest.mark.parametrize("overrides", [(), ("train.epochs=3",), ("train.token_budget=5",)])
def test_a_written_config_loads_again(here: Path, overrides: tuple[str, ...]) -> None:
    config = load_config(None, [*overrides, "data.text_field='3e-4'", "generation.prompt='a\n'"]).config
    (here / "written.yaml").write_text(dump(config.model_dump()))
    assert load_config("written.yaml").config == config
    assert config_from_dict(config.model_dump(), "state.json") == config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    assert load_config(path).sources


# --- every key of the schema -----------------------------------------------------------------------------------------


def another_value(key: str, default: Any) -> Any:
    """A valid value of the key other than its default."""
    special: dict[str, Any] = {
        "model.architecture": "llama",
        "data.fallback": "builtin", "model.ffn_activation": "gelu", "train.optimizer": "adamw", "train.device": "cpu",
        "train.schedule": "wsd", "train.precision": "float16", "train.backend": "torch", "tokenizer.format": "gpt2",
        "tokenizer.model_type": "unigram", "generation.method": "greedy", "train.compile": True, "model.head_dim": 32,
        "train.supervise": True, "model.bos_id": 5, "train.trainable": "embeddings",
        "model.n_kv_heads": 4, "model.logit_softcap": 30.0, "model.n_heads": 24, "data.score_min": 2.5,
        "train.epochs": 2.5, "train.lr_decay_steps": 3000, "train.token_budget": 10, "train.sample_interval": 5,
        "data.weights": [2.0], "data.shard_weights": [2.0], "data.documents": "lines", "data.max_chars": 9,
        "data.near_dedup": 0.8, "data.pack": "documents", "tokenizer.engine": "fast",
        "tokenizer.on_mismatch": "fallback", "model.embedding_scale": 2.5, "train.adamw_lr": 2.5,
        "train.muon_scale": "keller", "train.ema_decay": 0.5, "train.attention_block": 7, "train.cpu_threads": 3,
        "train.loss_chunk": 7, "train.technique": "fused",
        "lora.r": 12, "lora.target_modules": ["q_proj", "v_proj"], "lora.num_layers": 3, "lora.quantize": 4,
        "lora.dropout": 0.25, "lora.adapter_format": "peft", "train.patience": 3, "chat.format": "oasst",
        "chat.train_on": "all", "chat.too_long": "drop", "preference.loss": "ipo", "preference.label_smoothing": 0.25,
        "generation.stop": ["end", "###"], "generation.presence_penalty": 0.5, "generation.frequency_penalty": -0.5,
        "train.log_to": ["wandb"], "train.memory_budget_gb": 2.5, "train.share_muon": True,
        "model.rope_scaling.type": "linear", "model.rope_scaling.original_max_seq_len": 512,
        "model.rope_scaling.attention_factor": 1.25, "model.rope_scaling.short_factor": [1.5] * 32,
        "model.rope_scaling.long_factor": [2.5] * 32, "model.rope_local_theta": 100.0, "model.sliding_window": 512,
        "model.layer_types": ["full_attention", "sliding_attention"] * 6, "model.attention_scale": 0.5,
        "model.attention_softcap": 50.0, "distillation.loss": "reverse_kl",
        "grpo.rewards": ["number"], "grpo.reward_weights": [1.0, 0.5], "grpo.epsilon_high": 0.28,
        "grpo.loss_type": "grpo", "grpo.scale_rewards": "none",
    }  # fmt: skip
    if key in special:
        return special[key]
    if isinstance(default, bool):
        return not default
    if default is None or isinstance(default, str):
        return "a/b"
    return default * 2 if isinstance(default, int) and default else default / 2 if default else 3


SCALING = {
    type: [f"model.rope_scaling.{setting}" for setting in (f"type={type}", *settings)]
    for type, settings in {
        "linear": [],
        "llama3": ["original_max_seq_len=1024"],
        "yarn": ["original_max_seq_len=1024"],
        "longrope": ["original_max_seq_len=1024", f"short_factor={[1.0] * 32}", f"long_factor={[2.0] * 32}"],
    }.items()
}
# Other settings that a key requires.
PARTNERS = {
    "data.score_min": ["data.score_field=q"],
    "data.score_field": ["data.score_min=1"],
    "model.hf_config": ["model.architecture=mlx_lm"],
    **{key: ["model.sliding_window=8"] for key in ("model.rope_local_theta", "model.layer_types")},
    **{
        f"grpo.{key}": [f"grpo.rewards=[{key}]", "train.micro_batch_size=8"]
        for key in ("regex", "json_schema", "function")
    },
    "grpo.reward_weights": ["grpo.rewards=[number, regex]", "grpo.regex=a", "train.micro_batch_size=8"],
    "grpo.rewards": ["train.micro_batch_size=8"],
    **{key: ["train.teacher=a"] for key in leaf_keys() if key.startswith("distillation.")},
    **{key: ["lora.r=8"] for key in leaf_keys() if key.startswith("lora.") and key != "lora.r"},
    **{
        f"model.rope_scaling.{key}": next(SCALING[type] for type, keys in SCALING_KEYS.items() if key in keys)
        for key in RopeScaling.model_fields
        if key != "type"
    },
}


@pytest.mark.parametrize("key", leaf_keys())
def test_every_key_can_be_set_on_the_command_line(key: str) -> None:
    value = another_value(key, leaf_keys()[key].default)
    setting = f"{key}={str(value).lower() if isinstance(value, bool) else value}"
    loaded = load_config(None, [*PARTNERS.get(key, []), setting])
    assert attrgetter(key)(loaded.config) == value
    assert loaded.sources[key] == "command line"


@pytest.mark.parametrize("key", leaf_keys())
def test_an_invalid_value_is_reported_with_its_line(key: str, here: Path) -> None:
    """The file has all keys in random order, with blank lines and comments in between."""
    order = random.Random(key)
    lines, true_line = ["# settings", ""], 0
    sections = sorted({k.partition(".")[0] for k in leaf_keys()}, key=lambda _: order.random())

    def add(section: str) -> None:
        nonlocal true_line
        indent = "  " * section.count(".")
        lines.append(f"{indent}{section.rpartition('.')[2]}:")
        inside = [k.removeprefix(f"{section}.") for k in leaf_keys() if k.startswith(f"{section}.")]
        names = sorted({k.partition(".")[0] for k in inside})
        for name in order.sample(names, len(names)):
            lines.extend(order.choice([[], [""], ["  # a comment: 3", ""]]))
            if (k := f"{section}.{name}") not in leaf_keys():
                add(k)
                continue
            value = {"wrong": 1} if k == key else leaf_keys()[k].default
            lines.append(f"{indent}  " + dump({name: value}, flow=True).strip()[1:-1])
            true_line = len(lines) if k == key else true_line

    for section in sections:
        add(section)
    got = message("\n".join(lines))
    assert got.startswith(f"c.yaml:{true_line}: {key}: expected ")
    assert got.endswith(', got {"wrong": 1}')


# --- errors ----------------------------------------------------------------------------------------------------------

ERRORS = {
    # names
    "model:\n  n_layer: 3\n": "c.yaml:2: model.n_layer: unknown key; did you mean 'n_layers'?",
    "train:\n  seq_len: 3\n": "c.yaml:2: train.seq_len: unknown key; did you mean 'data.seq_len'?",
    "model:\n  seq_len: 3\n": "c.yaml:2: model.seq_len: unknown key; did you mean 'data.seq_len'?",
    "data:\n  vocab_sise: 3\n": "c.yaml:2: data.vocab_sise: unknown key; did you mean 'model.vocab_size'?",
    "tokenizer:\n  zzz: 3\n": (
        "c.yaml:2: tokenizer.zzz: unknown key; keys of tokenizer: model_type, format, engine, on_mismatch, max_train_mb"
    ),
    "modle:\n  n_layers: 3\n": "c.yaml:1: modle: unknown section; did you mean 'model'?",
    "\nlr: 3\n": "c.yaml:2: lr: unknown section; move it under 'train:'",
    "zzz: 3\n": "c.yaml:1: zzz: unknown section",
    "1: 3\n": "c.yaml:1: 1: unknown section",
    "model: 3\n": "c.yaml:1: model: expected a mapping, got 3",
    "model: [n_layers]\n": 'c.yaml:1: model: expected a mapping, got ["n_layers"]',
    # types
    "model:\n  n_layers: twelve\n": (
        'c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got "twelve"'
    ),
    "model:\n  n_layers: zwölf\n": 'c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got "zwölf"',
    "model:\n  n_layers: '12'\n": 'c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got "12"',
    "model:\n  n_layers: 1.5\n": "c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got 1.5",
    "model:\n  n_layers: true\n": "c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got true",
    "model:\n  n_layers:\n": "c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got null",
    "model:\n  n_layers: 0123\n": 'c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got "0123"',
    "model:\n  n_layers: .inf\n": "c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got Infinity",
    "model:\n  tie_embeddings: yes\n": 'c.yaml:2: model.tie_embeddings: expected true or false, got "yes"',
    "model:\n  tie_embeddings: 1\n": "c.yaml:2: model.tie_embeddings: expected true or false, got 1",
    "train:\n  lr: true\n": "c.yaml:2: train.lr: expected a number > 0, got true",
    "train:\n  lr: '3e-4'\n": 'c.yaml:2: train.lr: expected a number > 0, got "3e-4"',
    "train:\n  save_dir: 2024\n": "c.yaml:2: train.save_dir: expected a string, got 2024",
    "train:\n  compile: maybe\n": 'c.yaml:2: train.compile: expected true or false, or null, got "maybe"',
    "data:\n  dataset: [a, 1]\n": (
        'c.yaml:2: data.dataset: expected a string, or a list of strings, or null, got ["a", 1]'
    ),
    # ranges
    "model:\n  n_layers: 0\n": "c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got 0",
    "model:\n  dropout: 1\n": "c.yaml:2: model.dropout: expected a number >= 0 and < 1, got 1",
    "model:\n  dropout: .nan\n": "c.yaml:2: model.dropout: expected a number >= 0 and < 1, got NaN",
    "train:\n  lr: 0\n": "c.yaml:2: train.lr: expected a number > 0, got 0",
    "train:\n  lr: 1e999\n": "c.yaml:2: train.lr: expected a number > 0, got Infinity",
    "train:\n  momentum: .inf\n": (
        "c.yaml:2: train.momentum: expected a number >= 0 and < 1, got Infinity"
    ),
    "generation:\n  top_p: 1.5\n": (
        "c.yaml:2: generation.top_p: expected a number > 0 and <= 1, got 1.5"
    ),
    "train:\n  seed: -1\n": (
        "c.yaml:2: train.seed: expected an integer >= 0 and < 4294967296, got -1"
    ),
    "train:\n  schedule: cosin\n": (
        'c.yaml:2: train.schedule: expected "cosine" | "wsd" | "linear" | "constant", got "cosin"'
    ),
    "train:\n  precision: fp16\n": (
        'c.yaml:2: train.precision: expected "float16" | "bfloat16" | "float32", or null, got "fp16"'
    ),
    f"data:\n  seq_len: {'x' * 99}\n": (
        f'c.yaml:2: data.seq_len: expected an integer >= 1, got "{"x" * 56}...'
    ),
    # several errors, in file order, not in schema order: up to three
    "train:\n  lr: 0\nmodel:\n  n_layers: 0\n": (
        "c.yaml:2: train.lr: expected a number > 0, got 0; also c.yaml:4: model.n_layers: expected an "
        "integer >= 1 and <= 10000, got 0"
    ),
    "model:\n  n_layers: 0\n  d_model: 0\n  n_heads: 0\n  dropout: 2\n  seq_len: 3\n": (
        "c.yaml:2: model.n_layers: expected an integer >= 1 and <= 10000, got 0; also c.yaml:3: model.d_model: "
        "expected an integer >= 1, got 0; also c.yaml:4: model.n_heads: expected an integer >= 1, got 0 (and 2 more)"
    ),
    "model:\n  zzz: 1\n": (
        "c.yaml:2: model.zzz: unknown key; all keys: docs/configuration.md"
    ),
    "model:\n  rope_scaling: {type: yarm}\n": (
        'c.yaml:2: model.rope_scaling.type: expected "linear" | "llama3" | "yarn" | "longrope", or null, got "yarm"'
    ),
    "model:\n  rope_scaling: {typ: yarn}\n": (
        "c.yaml:2: model.rope_scaling.typ: unknown key; did you mean 'type'?"
    ),
    "model:\n  rope_scaling: yarn\n": 'c.yaml:2: model.rope_scaling: expected a mapping, got "yarn"',
    "model:\n  layer_types: [full]\n": (
        'c.yaml:2: model.layer_types: expected a list of "full_attention" | "sliding_attention", or null, got "full"'
    ),
    # unsupported YAML
    "model:\n  n_layers: 1\n  n_layers: 2\n": "c.yaml:3: model.n_layers: duplicate key (first on line 2)",
    "model: &m\n  n_layers: 1\ndata: *m\n": "c.yaml:3: aliases (*m) are not supported: repeat the value",
    '"a\\nb": 3\n': "c.yaml:1: a\\nb: unknown section",
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ERRORS.items(), ids=[m[:50] for m in ERRORS.values()])
def test_errors_in_a_file(text: str, expected: str, here: Path) -> None:
    assert message(text) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.lrr=3", "command line: train.lrr: unknown key; did you mean 'lr'?"),
        ("trian.lr=3", "command line: trian: unknown section; did you mean 'train'?"),
        ("train.lr=fast", 'command line: train.lr: expected a number > 0, got "fast"'),
        ("train.lr=", "command line: train.lr: expected a number > 0, got null"),
        ("model.n_layers.x=3", "command line: model.n_layers.x: unknown key; did you mean 'n_layers'?"),
        ("train.lr=[", "command line: train.lr: '[' is not a YAML value (strings may need quotes)"),
        ("train.learning_rate=3", "command line: train.learning_rate: unknown key; did you mean 'train.lr'?"),
        ("train.batch_size=3", "command line: train.batch_size: unknown key; did you mean 'train.micro_batch_size'?"),
        ("train.max_steps=3", "command line: train.max_steps: unknown key; did you mean 'train.total_steps'?"),
        ("train.num_epochs=3", "command line: train.num_epochs: unknown key; did you mean 'train.epochs'?"),
        ("model.num_layers=3", "command line: model.num_layers: unknown key; did you mean 'model.n_layers'?"),
        ("train.num_layers=3", "command line: train.num_layers: unknown key; did you mean 'lora.num_layers'?"),
        ("train.zzz=3", "command line: train.zzz: unknown key; all keys: docs/configuration.md"),
        ("learning_rate=3", "command line: 'learning_rate=3': expected SECTION.KEY=VALUE; did you mean 'train.lr=3'?"),
        ("lr=3", "command line: 'lr=3': expected SECTION.KEY=VALUE; did you mean 'train.lr=3'?"),
        ("zzz=3", "command line: 'zzz=3': expected SECTION.KEY=VALUE, such as train.lr=1e-3"),
        ("train.lr", "command line: 'train.lr': expected SECTION.KEY=VALUE, such as train.lr=1e-3"),
        ("train.=3", "command line: 'train.=3': expected SECTION.KEY=VALUE, such as train.lr=1e-3"),
        (".lr=3", "command line: '.lr=3': expected SECTION.KEY=VALUE, such as train.lr=1e-3"),
    ],
)
def test_errors_on_the_command_line(word: str, expected: str) -> None:
    assert message(None, word) == expected


@pytest.mark.parametrize("value", ["3", "0", "''", "false", "[]"])
def test_an_override_does_not_hide_an_invalid_section(here: Path, value: str) -> None:
    """`model: 0` would be lost under `model.n_layers=2` if every falsy value were an empty section."""
    shown = {"''": '""'}.get(value, value)
    assert message(f"model: {value}\n", "model.n_layers=2") == (f"c.yaml:1: model: expected a mapping, got {shown}")


def test_unreadable_files(here: Path) -> None:
    (here / "configs").mkdir()
    (here / "configs" / "quickstart.yaml").write_text("")
    (here / "big.npy").write_bytes(b"x" * 1_000_001)
    errors = {
        "configs/quikstart.yaml": "no such file; did you mean 'quickstart.yaml'?",
        "configs/quickstart": "no such file; did you mean 'quickstart.yaml'?",
        "nowhere/at_all.yaml": "no such file",
        "configs": "cannot read: Is a directory",
        "big.npy": "larger than 1 MB: not a configuration file",
        "big.npy/x.yaml": "cannot read: Not a directory",
        "a\0b": "cannot read: embedded null byte",
    }
    for name, problem in errors.items():
        with pytest.raises(UserError) as error:
            load_config(name)
        assert str(error.value) == f"{name}: {problem}".replace("\0", "\\x00")


def test_an_endless_file_is_not_read_to_the_end() -> None:
    with pytest.raises(UserError, match=r"^/dev/zero: larger than 1 MB"):
        load_config("/dev/zero")


REMOVED = ("model.value_residual", "model.zero_init_proj")


@pytest.mark.parametrize("key", REMOVED)
def test_removed_settings_are_errors_in_files_and_words_unless_off(here: Path, key: str) -> None:
    section, leaf = key.split(".")
    (here / "off.yaml").write_text(f"{section}:\n  {leaf}: false\n")
    (here / "on.yaml").write_text(f"{section}:\n  {leaf}: true\n")
    loaded = load_config("off.yaml", [f"{key}=false"])
    assert loaded.config == load_config(None).config and key not in loaded.sources
    for path, words, place in (("on.yaml", [], "on.yaml:2"), (None, [f"{key}=true"], "command line")):
        with pytest.raises(UserError, match=rf"^{place}: {key}: removed in 0\.5\.0"):
            load_config(path, words)


def test_checkpoints_of_removed_settings_load_unless_their_weights_need_them() -> None:
    values: Any = {"model": {"zero_init_proj": True, "value_residual": False}}
    assert config_from_dict(values, "state.json") == load_config(None).config
    assert values["model"]["zero_init_proj"]  # the caller's, for whom it is read again
    values["model"]["value_residual"] = True
    with pytest.raises(UserError, match=r"^state\.json: model\.value_residual: removed in 0\.5\.0"):
        config_from_dict(values, "state.json")


def test_an_incompatible_checkpoint_is_reported_by_name() -> None:
    for values, expected in [
        ({"model": {"n_layer": 3}}, "state.json: model.n_layer: unknown key; did you mean 'n_layers'?"),
        ({"train": {"lr": -1}}, "state.json: train.lr: expected a number > 0, got -1"),
        ([], "state.json: expected a mapping, got []"),
    ]:
        with pytest.raises(UserError) as error:
            config_from_dict(values, "state.json")  # type: ignore[arg-type]
        assert str(error.value) == expected


def test_a_default_that_conflicts_with_the_base_model_is_one_line(here: Path) -> None:
    """No key of the conflict was set; the one that was set is the base model."""
    (here / "c.yaml").write_text("data: {dataset: rows.jsonl}\ntrain:\n  init_from: base\n")
    model = ModelConfig(vocab_size=16, n_layers=1, d_model=8, n_heads=1, max_seq_len=64)
    with pytest.raises(
        UserError, match=r"^c.yaml:3: train.init_from: data.seq_len \(2048\) must be at most .* \(64\)$"
    ):
        load_config("c.yaml", base_model=lambda path: model)
