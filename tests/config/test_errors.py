"""An error is one line that is safe to print to a terminal."""

from anarchobot.config.errors import UserError, did_you_mean


def test_control_characters_are_escaped() -> None:
    message = str(UserError("a\nb\r\tc\x1b[31md\u2028e\udc80 ü 😀"))
    assert message == "a\\nb\\r\\tc\\x1b[31md\\u2028e\\udc80 ü 😀"


def test_only_close_matches_are_suggested() -> None:
    assert did_you_mean("lerning", ["learning", "turning"]) == "; did you mean 'learning'?"
    assert did_you_mean("zzz", ["learning"]) == ""
