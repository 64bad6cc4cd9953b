"""Ids to text while they come: whole characters, up to a text that ends it all."""

from collections.abc import Sequence

from anarchobot.tokenizers.tokenizer import Tokenizer

CONTEXT = 8  # whole tokens that the next one is decoded with: they decide about the space between


class StreamDecoder:
    """Ids to text one at a time. A character may be spread over several ids, so text is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        """`before`: the ids that the text goes on from; a tokenizer may take a first space for none of the text."""
        self._tokenizer = tokenizer
        self._context = list(before[-CONTEXT:])
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain now; often a word, sometimes nothing."""
        self._pending.append(token)
        text = self._text()
        # A broken character decodes to U+FFFD; after four tokens it is no character but broken bytes.
        if text.endswith("\ufffd") and len(self._pending) < 4:
            return ""
        return self._flush(text)

    def finish(self) -> str:
        """What is left at the end, whole or not."""
        return self._flush(self._text()) if self._pending else ""

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending).removeprefix(before)

    def _flush(self, text: str) -> str:
        self._context, self._pending = (self._context + self._pending)[-CONTEXT:], []
        return text


class StopStringFilter:
    """Text up to the one of `stop` that is whole first, wherever the pieces are cut. What may become one is held
    back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = stop, ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is certain now, without the stop string; nothing once one was found."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:  # of two that end together, the longer one
            self.found = True
            return self._held[: min(ends)[1]]
        held = max((n for stop in self._stop for n in range(len(stop)) if self._held.endswith(stop[:n])), default=0)
        certain = len(self._held) - held
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> str:
        """What was held back and became no stop string."""
        return "" if self.found else self._held


class TextStream:
    """Ids to the text that a person reads: whole characters, up to the first of the stop strings."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()) -> None:
        """`before`: as for StreamDecoder."""
        self._decoder, self._stop = StreamDecoder(tokenizer, before), StopStringFilter(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stop.found

    def add(self, token: int) -> str:
        """The text that is certain now."""
        return self._stop.add(self._decoder.add(token))

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return self._stop.add(self._decoder.finish()) + self._stop.finish()
