"""OpenAssistant's message trees: to threads to learn from, and to pairs of answers by people's ranking.

A tree is one thread, along the best-ranked replies, down to the last answer: two would share their beginning, and its
answers would be trained on twice. Of pairs it has many: at each question, each answer with each that was ranked below.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from anarchobot.data.conversations.formats import field
from anarchobot.data.sources.rows import Row
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Pair, in_order, message, parted

FIELDS = ("message_id", "parent_id", "text", "role")  # of a row that is one message


def fits(row: Row) -> bool:
    return all(name in row for name in FIELDS) or _is_tree(row)


def _is_tree(row: Row) -> bool:
    return isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]


def threads(
    rows: Iterable[tuple[str, Row]], language: str | None = None
) -> Iterator[tuple[str, Conversation | InvalidRow]]:
    """(place, thread) of each tree: a row with `prompt` and nested `replies`, or rows of a message each, in any order,
    which are held until the last is read. `language`: trees that begin in it, such as "en"; left out: any."""
    for place, root in _trees(rows, language):
        try:
            yield place, root if isinstance(root, InvalidRow) else _thread(root)
        except InvalidRow as misfit:
            yield place, misfit


def pairs(rows: Iterable[tuple[str, Row]], language: str | None = None) -> Iterator[tuple[str, Pair | InvalidRow]]:
    """(place, pair) of each two answers to one question of which people ranked one above the other. Trees as for
    `threads`; one without such answers is a InvalidRow."""
    for place, root in _trees(rows, language):
        if isinstance(root, InvalidRow):
            yield place, root
            continue
        none = True
        for turns in _questions(root):
            for chosen, rejected in combinations(_ranked(turns[-1]), 2):
                none = False
                try:
                    yield place, parted(*(_conversation([*turns, answer]) for answer in (chosen, rejected)))
                except InvalidRow as misfit:
                    yield place, misfit
        if none:
            yield place, InvalidRow("no two ranked answers")


def _trees(rows: Iterable[tuple[str, Row]], language: str | None) -> Iterator[tuple[str, Row | InvalidRow]]:
    """(place, first message, with its replies in it) of each good tree."""
    roots: list[tuple[str, Row]] = []
    replies: defaultdict[str, list[tuple[str, Row]]] = defaultdict(list)
    known: set[str] = set()
    for place, row in rows:
        try:
            if _is_tree(row):
                yield place, _good(row["prompt"], language)
                continue
            kept = _slim(row)
        except InvalidRow as misfit:
            yield place, misfit
            continue
        known.add(kept["message_id"])
        (roots if kept["parent_id"] is None else replies[kept["parent_id"]]).append((place, kept))
    for place, root in roots:
        try:
            yield place, _good(_tree(root, replies), language)
        except InvalidRow as misfit:
            yield place, misfit
    for parent, orphans in replies.items():
        if parent not in known:
            for place, _ in orphans:
                yield place, InvalidRow("message without its parent", f"no message {parent} in this file")


def _slim(row: Row) -> Row:
    """What a thread is made by. Raises InvalidRow when something is missing or wrong; a first message has no parent."""
    needed = {name: field(row, name) for name in ("message_id", "text", "role")}
    optional = {name: row.get(name) for name in ("parent_id", "rank", "deleted", "review_result", "lang")}
    for name, value in (("message_id", needed["message_id"]), ("parent_id", optional["parent_id"])):
        if not isinstance(value, str | None):
            raise InvalidRow("id is no text", f"{type(value).__name__} in '{name}'")
    _check_rank(optional)  # here: else a whole tree would be left out for it
    return needed | optional


def _tree(root: Row, replies: dict[str, list[tuple[str, Row]]]) -> Row:
    """The message with its replies in it, and theirs."""
    reached, waiting = {root["message_id"]}, [root]
    while waiting:
        here = waiting.pop()
        here["replies"] = [row for _, row in replies.get(here["message_id"], []) if row["message_id"] not in reached]
        reached.update(row["message_id"] for row in here["replies"])
        waiting += here["replies"]
    return root


def _good(root: Row, language: str | None) -> Row:
    """Raises InvalidRow for a tree that is not wanted, or has other than messages in it."""
    if language is not None and root.get("lang") != language:
        raise InvalidRow("another language", f"{root.get('lang')}, not {language}")
    if not _is_good(root):
        raise InvalidRow("deleted or badly reviewed", "the first message")
    waiting = [root]
    while waiting:
        here = waiting.pop()
        _check_rank(here)
        replies = here.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise InvalidRow("replies are no messages", "'replies' is to be a list of messages")
        waiting += replies
    return root


def _check_rank(row: Row) -> None:
    rank = row.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, int | float | None) or rank != rank:
        raise InvalidRow("rank is no number", repr(rank)[:40])


def _thread(root: Row) -> Conversation:
    turns, here = [root], _best(root)
    while here is not None:
        turns.append(here)
        here = _best(here)
    if turns[-1].get("role") == "prompter":
        turns.pop()  # a question that nobody answered
    return _conversation(turns)


def _conversation(turns: list[Row]) -> Conversation:
    return in_order(message(turn.get("role"), turn.get("text"), f"turn {i + 1}") for i, turn in enumerate(turns))


def _questions(root: Row) -> Iterator[list[Row]]:
    """Each way from the first message to a question, the first message among them."""
    waiting = [[root]]
    while waiting:
        turns = waiting.pop()
        if turns[-1].get("role") == "prompter":
            yield turns
        waiting += [[*turns, reply] for reply in reversed(_replies(turns[-1]))]


def _ranked(question: Row) -> list[Row]:
    """The answers that have a rank, the best first."""
    return sorted((r for r in _replies(question) if r.get("rank") is not None), key=lambda reply: float(reply["rank"]))


def _best(parent: Row) -> Row | None:
    """The best-ranked reply (0 is best; one without a rank comes last), but rather a question with an answer."""

    def order(reply: Row) -> tuple[bool, Any]:
        unanswered = reply.get("role") == "prompter" and not _replies(reply)
        rank = reply.get("rank")
        return unanswered, float("inf") if rank is None else rank

    return min(_replies(parent), key=order, default=None)


def _replies(parent: Row) -> list[Row]:
    """The good ones."""
    return [reply for reply in parent.get("replies") or [] if _is_good(reply)]


def _is_good(row: Row) -> bool:
    return not row.get("deleted") and row.get("review_result") is not False
