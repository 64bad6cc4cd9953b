"""Streaming detokenization: token ids to complete characters, up to a stop string."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from anarchobot.tokenizers.tokenizer import Tokenizer

CONTEXT = 8  # preceding tokens decoded together with the next one: they decide whether a space comes between
OPEN = 3  # bytes of an incomplete character, and so the most U+FFFD at the end that may still become a character


class StreamDecoder:
    """Decodes one id at a time. A character may span several ids, so text is held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        """`prompt_ids`: the preceding ids. Without them, a tokenizer may drop the first space."""
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT:])
        self._shown = tokenizer.decode(self._ids)  # what was returned of the text of `_ids`, or belongs to the prompt

    def add(self, token: int) -> str:
        """Returns the text that is now complete; often a word, sometimes empty."""
        self._ids.append(token)
        text = self._unshown(_complete(self._tokenizer.decode(self._ids)))
        if len(self._ids) > 3 * CONTEXT:
            self._ids = self._ids[-CONTEXT:]
            self._shown = _complete(self._tokenizer.decode(self._ids))
        return text

    def finish(self) -> str:
        """Returns the remaining text, complete or not."""
        return self._unshown(self._tokenizer.decode(self._ids))

    def _unshown(self, text: str) -> str:
        """The part of `text` that was not returned yet. Text that was returned may end otherwise in `text` only if the
        prompt ended inside a character."""
        pairs = enumerate(zip(self._shown, text, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(self._shown), len(text)))
        if shared < len(text):
            self._shown = text
        return text[shared:]


def _complete(text: str) -> str:
    """`text` without an incomplete character at its end, which is decoded as up to OPEN U+FFFD."""
    end = len(text.rstrip("\ufffd"))
    return text[: max(end, len(text) - OPEN)]


class StopStringFilter:
    """Ends streamed text before the first complete stop string; holds back text that may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = stop, ""
        self.found: str | None = None  # the stop string that ended the text

    def add(self, text: str) -> str:
        """Returns the text that is certainly not part of a stop string; empty once one was found."""
        if self.found is not None:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:  # the first to end, and the longest of those that end together
            end, at = min(ends)
            self.found = self._held[at:end]
            return self._held[:at]
        longest = len(self._held) + 1
        length = max(
            (n for stop in self._stop for n in range(min(len(stop), longest)) if self._held.endswith(stop[:n])),
            default=0,
        )
        released = len(self._held) - length
        text, self._held = self._held[:released], self._held[released:]
        return text

    def finish(self) -> str:
        """Returns the text that was held back and did not become a stop string."""
        return "" if self.found is not None else self._held


class TextStream:
    """Token ids to text for display: complete characters, up to the first stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        drop_space: bool = False,
        shown: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """`drop_space`: without the space at the start, which the prompt already has (trailing_space.py). `shown`: the
        names of the control tokens that are part of the text, by id; the others are omitted."""
        self._decoder, self._stop = StreamDecoder(tokenizer, prompt_ids), StopStringFilter(stop)
        self._drop_space, self._shown = drop_space, shown

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; None if there was none."""
        return self._stop.found

    def add(self, token: int) -> str:
        name = self._shown.get(token)
        text = self._decoder.add(token) if name is None else self._decoder.finish() + name
        return self._stop.add(self._without_space(text))

    def finish(self) -> str:
        """Returns the remaining text after the last token."""
        return self._stop.add(self._without_space(self._decoder.finish())) + self._stop.finish()

    def _without_space(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text
