"""The knowledge base of a server: passages for the questions of chats, and the fields of the answer that name them."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

import mlx.core as mx

from anarchobot.config.errors import UserError
from anarchobot.knowledge.knowledge_base import Hit, KnowledgeBase, prompt_with_passages
from anarchobot.serving.errors import ApiError
from anarchobot.tokenizers.conversation import Message

logger = logging.getLogger(__name__)


class Passages(NamedTuple):
    """The passages in a prompt, best first; `dropped` more were found, but did not fit."""

    hits: Sequence[Hit]
    dropped: int

    def fields(self) -> dict[str, object]:
        """The fields that they add to a response."""
        return {"sources": [hit._asdict() for hit in self.hits], "dropped_passages": self.dropped}


class PassageSearch:
    """An open knowledge base; a context manager. It is opened, searched and closed in a thread of its own, as SQLite
    and MLX require of one another's objects; or in that of the embedding model. Can be called from any thread."""

    def __init__(self, open_base: Callable[[], KnowledgeBase], thread: ThreadPoolExecutor | None = None) -> None:
        """`thread`: of the embedding model, if there is one. Raises what `open_base` raises."""
        self._thread, self._owns_thread = thread or ThreadPoolExecutor(1, "knowledge base"), thread is None
        try:
            self._base = self._thread.submit(open_base).result()
        except BaseException:
            self._shut_down()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.submit(self._base.close).result()
        self._shut_down()

    def _shut_down(self) -> None:
        if self._owns_thread:
            self._thread.submit(mx.clear_streams)  # otherwise MLX aborts the process at exit
            self._thread.shutdown()

    def encode(
        self, conversation: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], max_tokens: int
    ) -> tuple[list[int], Passages]:
        """Encodes a conversation with the passages for its last question in front of it. Of the passages, the
        lowest-ranked are dropped until the prompt has at most `max_tokens`; without any, it may have more.

        Raises ApiError (503) if the knowledge base cannot be searched.
        """
        place = max((i for i, message in enumerate(conversation) if message.role == "user"), default=None)
        if place is None:
            return encode(conversation), Passages([], 0)
        messages, question = list(conversation), conversation[place]
        hits = self._search(question.content)
        for used in range(len(hits), -1, -1):
            messages[place] = question._replace(content=prompt_with_passages(question.content, hits[:used]))
            ids = encode(messages)
            if len(ids) <= max_tokens:
                break
        return ids, Passages(hits[:used], len(hits) - used)

    def _search(self, question: str) -> list[Hit]:
        try:
            return self._thread.submit(self._base.search, question).result()
        except UserError as error:
            logger.error("%s", error)
            raise ApiError(503, "the knowledge base cannot be searched; see the server's log") from error
