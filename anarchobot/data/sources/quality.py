"""What a text must be to be kept, and the clean-up before that is asked."""

import re

from anarchobot.config.schema import DataConfig

# Unicode's category Cc: those that end a line become line feeds, the others but tab go.
_LINE_ENDS = re.compile(r"\r\n|[\r\x0b\x0c\x85]")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]+")


def clean(text: str) -> str:
    """Line ends to LF (CRLF, CR, form feed, vertical tab, NEL), other control characters but tab taken out, white space
    at line ends stripped.

    Nothing else is touched, so no character is normalised. Cleaning twice changes nothing more.
    """
    text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    return "\n".join([line.rstrip() for line in text.split("\n")])


def why_left_out(text: str, data: DataConfig) -> str:
    """`blank`, `too short` or `too long`, in characters (code points); empty for a text that is kept."""
    if not text or text.isspace():
        return "blank"
    if len(text) < data.min_chars:
        return "too short"
    if data.max_chars is not None and len(text) > data.max_chars:
        return "too long"
    return ""
