"""Which YAML is accepted, how it is parsed, and the errors for the rest."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.config.errors import UserError
from anarchobot.config.strict_yaml import dump, parse, parse_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1e5", 1e5), ("-2.5E+3", -2500.0), (".5", 0.5), ("5.", 5.0), ("0.0", 0.0),
        ("12", 12), ("-3", -3), ("+3", 3), ("0", 0), ("-0", 0), ("1_000", 1000), ("0x1F", 31), ("0o17", 15),
        ("1__0", "1__0"), ("1_", "1_"), ("_1", "_1"), ("0123", "0123"), ("00.5", "00.5"), ("1_000.5", "1_000.5"),
        ("1:30", "1:30"), ("12:30:45", "12:30:45"), ("2024-01-01", "2024-01-01"), ("0b1", "0b1"), ("=", "="),
        ("true", True), ("True", True), ("false", False), ("TRUE", "TRUE"),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"),
        ("null", None), ("~", None), ("", None), ("NULL", "NULL"),
        (".inf", math.inf), ("-.Inf", -math.inf), ("inf", "inf"), ("nan", "nan"), ("1e999", math.inf),
        ("'3'", "3"), ('"true"', "true"), ("'null'", "null"), ('""', ""), ('"\\u00fc\\n"', "ü\n"),
        ("runs/x", "runs/x"), ("a b # c", "a b"), ("[a, 1, [2.0]]", ["a", 1, [2.0]]), ("{a: 1e1}", {"a": 10.0}),
        ("9" * 30, 1e30), ("9" * 5000, math.inf), ("0x" + "f" * 17, "0x" + "f" * 17),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    """PyYAML parses `yes` as true, 0123 as 83, 1:30 as 90 and 3e-4 as a string."""
    parsed = parse_scalar(text, "k")
    assert parsed == value
    assert type(parsed) is type(value)
    if "#" not in text:
        in_file = parse(f"k: {text}\n".encode(), "f").values["k"]
        assert in_file == value
        assert type(in_file) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(parse_scalar(".nan", "k"))


def test_every_key_has_its_line() -> None:
    text = "\ufeff# a comment\n\na:\n  b: 1\n\n  c: |\n    x\n    y\n  d: 2\ne: {f: 1,\n  g: 2}\n"
    tree = parse(text.encode(), "f")
    assert tree.values == {"a": {"b": 1, "c": "x\ny\n", "d": 2}, "e": {"f": 1, "g": 2}}
    assert tree.lines == {"a": 3, "a.b": 4, "a.c": 6, "a.d": 9, "e": 10, "e.f": 10, "e.g": 11}


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "null\n"])
def test_an_empty_document_is_an_empty_mapping(text: str) -> None:
    assert parse(text.encode(), "f").values == {}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_numbers_with_both_line_endings(newline: str) -> None:
    assert parse(newline.join(["a:", "  b: 1", "  c: 2"]).encode(), "f").lines == {"a": 1, "a.b": 2, "a.c": 3}


REJECTED = {
    b"a: 1\nb: 2\na: 3\n": "f:3: a: duplicate key (first on line 1)",
    b"s:\n  a: 1\n  'a': 2\n": "f:3: s.a: duplicate key (first on line 2)",
    b"a: &x 1\nb: *x\n": "f:2: aliases (*x) are not supported: repeat the value",
    b"a: &x {b: 1}\nc:\n  <<: *x\n": "f:3: aliases (*x) are not supported: repeat the value",
    b"a: &x [*x]\n": "f:1: aliases (*x) are not supported: repeat the value",
    b"a: !thing 1\n": "f:1: tags (!thing) are not supported: use a plain value",
    b"a:\n  b: !!python/object/apply:os.system [true]\n": (
        "f:2: tags (!!python/object/apply:os.system) are not supported: use a plain value"
    ),
    b"a: !!int '3'\n": "f:1: tags (!!int) are not supported: use a plain value",
    b"!!map\na: 1\n": "f:1: tags (!!map) are not supported: use a plain value",
    b"a: 1\nb:\n\tc: 1\n": (
        "f:3: invalid YAML: while scanning for the next token, found character '\\t' that cannot start any token "
        "(indent with spaces)"
    ),
    b"a: 1\nb: x\0y\n": "f:2: invalid YAML: control character U+0000",
    b"a: 1\nb: \x1b[31m\n": "f:2: invalid YAML: control character U+001B",
    b"a: 1\nb: \xff\n": "f:2: not UTF-8: expected a YAML file",
    "a: 1\n".encode("utf-16"): "f:1: not UTF-8: expected a YAML file",
    b"\x93NUMPY\x01\x00v\x00": "f:1: not UTF-8: expected a YAML file",
    b"a: 1\n\nb: " + b"[" * 16 + b"]" * 16: "f:3: nested more than 16 levels deep",
    b"[" * 500_000: "f:1: nested more than 16 levels deep",
    b"# " + b"x" * 1_000_000: "f: larger than 1 MB: not a configuration file",
    b"- a\n- b\n": "f:1: expected sections such as 'model:' at the top level, got a list",
    b"\njust words\n": "f:2: expected sections such as 'model:' at the top level, got a single value",
    b"a: 1\n---\nb: 2\n": (
        "f:2: invalid YAML: expected a single document in the stream, but found another document"
    ),
    b"a: b: c\n": "f:1: invalid YAML: mapping values are not allowed here",
    b"a: [1, 2\nb: 3\n": "f:2: invalid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'",
    b"? [a]\n: 1\n": "f:1: keys must be plain strings",
    b"\nmodel.d_model: 3\n": (
        "f:2: model.d_model: dotted keys are not supported in files: put 'd_model:' under 'model:'"
    ),
    b'a: 1\nb: "\\ud800"\n': "f:2: invalid character escape",
    b'a: "\\UFFFFFFFF"\n': "f: invalid YAML: invalid character escape",
}  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), REJECTED.items(), ids=[m[:40] for m in REJECTED.values()])
def test_errors_have_the_line_number(raw: bytes, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(raw, "f")
    assert str(error.value) == message


def test_the_limits_themselves_are_accepted() -> None:
    """16 levels and one million bytes; closed levels do not count."""
    assert len(parse(b"a: [" + b"[1], " * 99 + b"]", "f").values["a"]) == 99
    assert parse(b"a: " + b"[" * 15 + b"]" * 15, "f").lines == {"a": 1}
    assert parse(b"a: 1 #" + b"x" * (1_000_000 - 6), "f").values == {"a": 1}


def test_an_alias_bomb_is_rejected_before_it_expands() -> None:
    """Nine levels of ten aliases would expand to 10^9 items."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UserError, match=r"^f:2: aliases \(\*a0\) are not supported"):
        parse("\n".join(lines).encode(), "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [b", "command line: k.k: 'a: [b' is not a YAML value (strings may need quotes)"),
        ("*x", "command line: k.k: aliases (*x) are not supported: repeat the value"),
        ("!x y", "command line: k.k: tags (!x) are not supported: use a plain value"),
        ("\x00", "command line: k.k: '\\x00' is not a YAML value (strings may need quotes)"),
        ("{a: 1, a: 2}", "command line: k.k: a: duplicate key (first on line 1)"),
    ],
)
def test_an_invalid_override_is_reported_by_its_key(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_scalar(text, "k.k")
    assert str(error.value) == message


def test_dump_quotes_strings_that_look_like_other_values() -> None:
    values = {
        "k": [
            "3e-4",
            "1_000",
            "0o17",
            "yes",
            "null",
            "0123",
            "1:30",
            "",
            " a",
            "x: y",
            "a\nb",
            "ü😀",
            "#",
            "\x85",
            "a\u2028b",
        ]
    }
    assert parse(dump(values).encode(), "f").values == values
    assert yaml.safe_load(dump(values)) == values
    assert dump({"k": "word " * 999}, flow=True).count("\n") == 1


setting_values = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**18), 10**18), st.floats(allow_nan=False), st.lists(st.text(max_size=5)),
    st.text(max_size=20), st.from_regex(r"[-+]?[0-9_.:eExo]{1,8}", fullmatch=True),
)  # fmt: skip


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), setting_values, max_size=4), st.booleans())
@settings(max_examples=150, derandomize=True, deadline=None)
def test_parse_inverts_dump(values: dict[str, Any], flow: bool) -> None:
    """Otherwise `config show` and config.yaml would differ from the settings."""
    again = parse(dump(values, flow=flow).encode(), "f").values
    assert again == values
    assert [type(v) for v in again.values()] == [type(v) for v in values.values()]
