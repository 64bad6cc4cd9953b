"""Streaming detokenization: token ids to complete characters, up to a stop string."""

from collections.abc import Sequence

from anarchobot.tokenizers.tokenizer import Tokenizer

CONTEXT = 8  # preceding tokens decoded together with the next one: they decide whether a space comes between


class StreamDecoder:
    """Decodes one id at a time. A character may span several ids, so text is held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        """`prompt_ids`: the preceding ids. Without them, a tokenizer may drop the first space."""
        self._tokenizer = tokenizer
        self._context = list(prompt_ids[-CONTEXT:])
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """Returns the text that is now complete; often a word, sometimes empty."""
        self._pending.append(token)
        text = self._text()
        # An incomplete character decodes to U+FFFD; after four tokens it must be invalid bytes.
        if text.endswith("\ufffd") and len(self._pending) < 4:
            return ""
        return self._flush(text)

    def finish(self) -> str:
        """Returns the remaining text, complete or not."""
        return self._flush(self._text()) if self._pending else ""

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending).removeprefix(before)

    def _flush(self, text: str) -> str:
        self._context, self._pending = (self._context + self._pending)[-CONTEXT:], []
        return text


class StopStringFilter:
    """Ends streamed text before the first complete stop string; holds back text that may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = stop, ""
        self.found = False

    def add(self, text: str) -> str:
        """Returns the text that is certainly not part of a stop string; empty once one was found."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:  # the first to end, and the longest of those that end together
            self.found = True
            return self._held[: min(ends)[1]]
        length = max((n for stop in self._stop for n in range(len(stop)) if self._held.endswith(stop[:n])), default=0)
        released = len(self._held) - length
        text, self._held = self._held[:released], self._held[released:]
        return text

    def finish(self) -> str:
        """Returns the text that was held back and did not become a stop string."""
        return "" if self.found else self._held


class TextStream:
    """Token ids to text for display: complete characters, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop = StreamDecoder(tokenizer, prompt_ids), StopStringFilter(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found

    def add(self, token: int) -> str:
        return self._stop.add(self._decoder.add(token))

    def finish(self) -> str:
        """Returns the remaining text after the last token."""
        return self._stop.add(self._decoder.finish()) + self._stop.finish()
