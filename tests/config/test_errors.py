"""A mistake is one line that a terminal can show."""

from anarchobot.config.errors import UserError, did_you_mean


def test_what_people_wrote_cannot_break_the_line_or_drive_the_terminal() -> None:
    message = str(UserError("a\nb\r\tc\x1b[31md\u2028e\udc80 ü 😀"))
    assert message == "a\\nb\\r\\tc\\x1b[31md\\u2028e\\udc80 ü 😀"


def test_only_a_near_word_is_suggested() -> None:
    assert did_you_mean("lerning", ["learning", "turning"]) == "; did you mean 'learning'?"
    assert did_you_mean("zzz", ["learning"]) == ""
