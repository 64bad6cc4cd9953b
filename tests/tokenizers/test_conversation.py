"""Messages that can't be used."""

import pytest

from anarchobot.tokenizers.conversation import InvalidRow, parse_message


def test_an_unpaired_surrogate_is_an_invalid_row() -> None:
    """Tokenizers can't encode it. A row of a Hugging Face dataset may have one."""
    with pytest.raises(InvalidRow) as error:
        parse_message("user", "half a pair: \ud83d", "'messages', turn 1")
    assert error.value.reason == "not UTF-8"
    assert str(error.value) == "not UTF-8 (unpaired surrogate in 'messages', turn 1)"
    assert parse_message("user", "\N{GRINNING FACE}", "'messages', turn 1").content == "\N{GRINNING FACE}"
