"""An error is one line that is safe to print to a terminal."""

from anarchobot.config.errors import MAX_LENGTH, UserError, did_you_mean


def test_control_characters_are_escaped() -> None:
    message = str(UserError("a\nb\r\tc\x1b[31md\u2028e\udc80 ü 😀"))
    assert message == "a\\nb\\r\\tc\\x1b[31md\\u2028e\\udc80 ü 😀"


def test_a_long_message_keeps_its_start_and_end() -> None:
    message = str(UserError(f"a.json: {'x' * 100_000}: fix it"))
    assert len(message) == MAX_LENGTH
    assert (message[:9], message[-9:]) == ("a.json: x", "x: fix it")


def test_only_close_matches_are_suggested() -> None:
    assert did_you_mean("lerning", ["learning", "turning"]) == "; did you mean 'learning'?"
    assert did_you_mean("zzz", ["learning"]) == ""
