"""OpenAssistant message trees to conversations, and to preference pairs from human rankings.

Each tree gives one conversation, which follows the best-ranked replies to the last answer: two threads of a tree would
share their beginning and train on its answers twice. For preferences, each question gives one pair for every pair of
ranked answers, unless their ranks are equal.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from anarchobot.data.conversations.formats import get_field
from anarchobot.data.sources.rows import Row
from anarchobot.tokenizers.conversation import (
    Conversation,
    InvalidRow,
    PreferencePair,
    check_turns,
    make_pair,
    parse_message,
)

MESSAGE_FIELDS = ("message_id", "parent_id", "text", "role")  # of a row that holds a single message


def is_oasst_row(row: Row) -> bool:
    return all(name in row for name in MESSAGE_FIELDS) or _is_tree(row)


def _is_tree(row: Row) -> bool:
    return isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]


def threads(
    rows: Iterable[tuple[str, Row]], language: str | None = None
) -> Iterator[tuple[str, Conversation | InvalidRow]]:
    """(place, conversation) of each tree.

    A row is a whole tree, with `prompt` and nested `replies`, or a single message; single messages come in any order
    and are buffered until all rows are read. `language` selects trees by the language of the first message, such as
    "en" (default: all).
    """
    for place, root in _trees(rows, language):
        try:
            yield place, root if isinstance(root, InvalidRow) else _best_thread(root)
        except InvalidRow as error:
            yield place, error


def ranked_pairs(
    rows: Iterable[tuple[str, Row]], language: str | None = None
) -> Iterator[tuple[str, PreferencePair | InvalidRow]]:
    """(place, pair) for every pair of ranked answers to the same question; arguments as for `threads`. Two answers of
    equal rank give an InvalidRow, and so does a tree without ranked answers."""
    for place, root in _trees(rows, language):
        if isinstance(root, InvalidRow):
            yield place, root
            continue
        any_pair = False
        for turns in _question_paths(root):
            for chosen, rejected in combinations(_ranked_answers(turns[-1]), 2):
                any_pair = True
                if chosen["rank"] == rejected["rank"]:
                    yield place, InvalidRow("answers of equal rank")
                    continue
                try:
                    yield place, make_pair(*(_conversation([*turns, answer]) for answer in (chosen, rejected)))
                except InvalidRow as error:
                    yield place, error
        if not any_pair:
            yield place, InvalidRow("fewer than two ranked answers")


def _trees(rows: Iterable[tuple[str, Row]], language: str | None) -> Iterator[tuple[str, Row | InvalidRow]]:
    """(place, root message with nested replies) of each valid tree."""
    roots: list[tuple[str, Row]] = []
    replies: defaultdict[str, list[tuple[str, Row]]] = defaultdict(list)
    known_ids: set[str] = set()
    for place, row in rows:
        try:
            if _is_tree(row):
                yield place, _checked_tree(row["prompt"], language)
                continue
            message = _message_fields(row)
        except InvalidRow as error:
            yield place, error
            continue
        known_ids.add(message["message_id"])
        (roots if message["parent_id"] is None else replies[message["parent_id"]]).append((place, message))
    for place, root in roots:
        try:
            yield place, _checked_tree(_with_replies(root, replies), language)
        except InvalidRow as error:
            yield place, error
    for parent, orphans in replies.items():
        if parent not in known_ids:
            for place, _ in orphans:
                yield place, InvalidRow("missing parent message", f"no message {parent} in this file")


def _message_fields(row: Row) -> Row:
    """The fields needed to build a tree. Raises InvalidRow if one is missing or has the wrong type."""
    required = {name: get_field(row, name) for name in ("message_id", "text", "role")}
    optional = {name: row.get(name) for name in ("parent_id", "rank", "deleted", "review_result", "lang")}
    for name, value in (("message_id", required["message_id"]), ("parent_id", optional["parent_id"])):
        if not isinstance(value, str | None):
            raise InvalidRow("id is not a string", f"{type(value).__name__} in '{name}'")
    _check_rank(optional)  # checked per message, so that a bad rank does not discard the whole tree
    return required | optional


def _with_replies(root: Row, replies: dict[str, list[tuple[str, Row]]]) -> Row:
    """Nests the replies into the root message. Iterative, because threads can be deeper than the recursion limit."""
    reached, pending = {root["message_id"]}, [root]
    while pending:
        message = pending.pop()
        message["replies"] = [
            row for _, row in replies.get(message["message_id"], []) if row["message_id"] not in reached
        ]
        reached.update(row["message_id"] for row in message["replies"])
        pending += message["replies"]
    return root


def _checked_tree(root: Row, language: str | None) -> Row:
    """Raises InvalidRow for a malformed or unwanted tree."""
    if language is not None and root.get("lang") != language:
        raise InvalidRow("other language", f"{root.get('lang')}, expected {language}")
    if not _is_accepted(root):
        raise InvalidRow("deleted or rejected in review", "the first message")
    pending = [root]
    while pending:
        message = pending.pop()
        _check_rank(message)
        replies = message.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise InvalidRow("replies are not messages", "'replies' must be a list of messages")
        pending += replies
    return root


def _check_rank(row: Row) -> None:
    rank = row.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, int | float | None) or rank != rank:
        raise InvalidRow("rank is not a number", repr(rank)[:40])


def _best_thread(root: Row) -> Conversation:
    turns, message = [root], _best_reply(root)
    while message is not None:
        turns.append(message)
        message = _best_reply(message)
    if turns[-1].get("role") == "prompter":
        turns.pop()  # an unanswered question
    return _conversation(turns)


def _conversation(turns: list[Row]) -> Conversation:
    return check_turns(
        parse_message(turn.get("role"), turn.get("text"), f"turn {i + 1}") for i, turn in enumerate(turns)
    )


def _question_paths(root: Row) -> Iterator[list[Row]]:
    """Every path from the root to a question, including the root itself."""
    pending = [[root]]
    while pending:
        turns = pending.pop()
        if turns[-1].get("role") == "prompter":
            yield turns
        pending += [[*turns, reply] for reply in reversed(_accepted_replies(turns[-1]))]


def _ranked_answers(question: Row) -> list[Row]:
    """Answers that have a rank, best first."""
    ranked = (reply for reply in _accepted_replies(question) if reply.get("rank") is not None)
    return sorted(ranked, key=lambda reply: float(reply["rank"]))


def _best_reply(parent: Row) -> Row | None:
    """The reply with the lowest rank (0 is best, unranked is last); questions that have an answer go first."""

    def order(reply: Row) -> tuple[bool, Any]:
        unanswered = reply.get("role") == "prompter" and not _accepted_replies(reply)
        rank = reply.get("rank")
        return unanswered, float("inf") if rank is None else rank

    return min(_accepted_replies(parent), key=order, default=None)


def _accepted_replies(parent: Row) -> list[Row]:
    return [reply for reply in parent.get("replies") or [] if _is_accepted(reply)]


def _is_accepted(row: Row) -> bool:
    return not row.get("deleted") and row.get("review_result") is not False
