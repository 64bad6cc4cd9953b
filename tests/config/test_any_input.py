"""Any file and any command line gives a config that can be written and read back, or a one-line error."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.config.errors import UserError
from anarchobot.config.loading import leaf_keys, load_config
from anarchobot.config.strict_yaml import dump
from tests.config.test_loading import another_value

SNIPPETS = [
    ":", ": ", "\n", "  ", "\t", "- ", "[", "]", "{", "}", "*a", "&a ", "!t ", "!!python/name:os ", "|\n", ">\n", "'",
    '"', "#", "%", "@", "?", "<<", "\0", "\x1b", "\x85", "\u2028", "\ufeff", "\\ud800", '"\\U0011ffff"', "---\n",
    "...\n", "model:", "train.lr", "lr", "null", "true", "1e999", ".nan", "0x", "9" * 400, "-", "😀", "epochs: 1\n",
]  # fmt: skip
VALUES = ["1", "2", "64", "0", "-1", "3e-4", "1e5", "0.5", "true", "null", "yes", "0123", "a/b", "'x'", "[a,b]", ".nan"]
GOOD = {key: dump({"k": another_value(key, info.default)}, flow=True)[4:-2] for key, info in leaf_keys().items()}
SETTINGS = st.dictionaries(
    st.sampled_from(list(GOOD)), st.sampled_from(["good", "good", "good", *VALUES]), max_size=3
).map(lambda values: {key: GOOD[key] if value == "good" else value for key, value in values.items()})
KEYS = st.sampled_from([*leaf_keys(), "model", "x.y", "", "train.", "model.n_heads.x"])
OVERRIDES = st.builds("{}{}{}".format, KEYS, st.sampled_from(["=", "=", "=", ""]), st.sampled_from(SNIPPETS + VALUES))


def outcome(file: Path, words: list[str]) -> str:
    """ "config" or "error"; anything else fails the test."""
    try:
        loaded = load_config(file, words)
    except UserError as error:
        assert str(error)
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 2000
        return "error"
    assert set(loaded.sources) <= set(leaf_keys())
    file.write_text(dump(loaded.config.model_dump()), encoding="utf-8")
    assert load_config(file).config == loaded.config
    return "config"


def as_yaml(values: dict[str, str]) -> str:
    lines, sections = [], set[str]()
    for key, value in sorted(values.items()):
        *parents, name = key.split(".")
        for depth, parent in enumerate(parents):
            if (section := ".".join(parents[: depth + 1])) not in sections:
                lines.append(f"{'  ' * depth}{parent}:")
                sections.add(section)
        lines.append(f"{'  ' * len(parents)}{name}: {value}")
    return "".join(f"{line}\n" for line in lines)


def test_any_settings_and_overrides(tmp_path: Path) -> None:
    outcomes = set()

    @given(SETTINGS, st.one_of(st.just([]), st.lists(OVERRIDES, max_size=2)))
    @settings(max_examples=200, derandomize=True, deadline=None)
    def check(values: dict[str, str], words: list[str]) -> None:
        file = tmp_path / "c.yaml"
        file.write_text(as_yaml(values), encoding="utf-8")
        outcomes.add(outcome(file, words))

    check()
    assert outcomes == {"config", "error"}


def test_any_corrupted_file(tmp_path: Path) -> None:
    outcomes = set()
    good = (
        "model:\n  n_layers: 2\n  d_model: 64\n  n_heads: 4\ntrain:\n  lr: 3e-4\n  save_dir: 'x'\ndata: {seq_len: 8}\n"
    )
    edit = st.tuples(
        st.integers(0, len(good)), st.integers(0, 4), st.sampled_from([s.encode() for s in SNIPPETS] + [b"\xff"])
    )

    @given(st.lists(edit, max_size=3))
    @settings(max_examples=200, derandomize=True, deadline=None)
    def check(edits: list[tuple[int, int, bytes]]) -> None:
        raw = good.encode()
        for at, length, snippet in edits:
            raw = raw[:at] + snippet + raw[at + length :]
        file = tmp_path / "c.yaml"
        file.write_bytes(raw)
        outcomes.add(outcome(file, []))

    check()
    assert outcomes == {"config", "error"}
