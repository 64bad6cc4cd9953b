"""OASST trees to conversations and pairs worked out by hand; single-message rows in any order give the same."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.schema import DataConfig
from anarchobot.data.conversations.oasst import threads
from anarchobot.data.conversations.reading import RowCounts, read_pairs
from anarchobot.tokenizers.conversation import InvalidRow
from tests.data.conversations.rows import jsonl, read


def post(name: str, *replies: dict[str, Any], rank: int | None = None, **fields: Any) -> dict[str, Any]:
    """A message whose text is its name; names start with p (prompter) or a (assistant)."""
    role = "prompter" if name[0] == "p" else "assistant"
    known = {"deleted": False, "review_result": True, "lang": "en"}
    return {"message_id": name, "text": name, "role": role, "rank": rank, "replies": list(replies), **known, **fields}


def tree(root: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def flat(message: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    row = {**message, "parent_id": parent}
    return [row, *(r for reply in row.pop("replies") for r in flat(reply, message["message_id"]))]


TREES = {
    "best-ranked answer": (post("p1", post("a1", rank=1), post("a2", rank=0), post("a3", rank=2)), "p1 a2"),
    "rank before no rank": (post("p1", post("a1"), post("a2", rank=3)), "p1 a2"),
    "follows the best question": (
        post("p1", post("a1", post("p2", post("a2"), rank=1), post("p3", post("a3"), rank=0), rank=0)),
        "p1 a1 p3 a3",
    ),
    "answered question before a better unanswered one": (
        post("p1", post("a1", post("p2", rank=0), post("p3", post("a3"), rank=1))),
        "p1 a1 p3 a3",
    ),
    "unanswered last question is dropped": (post("p1", post("a1", post("p2"))), "p1 a1"),
    "deleted and rejected replies are ignored": (
        post("p1", post("a1", rank=0, deleted=True), post("a2", rank=1, review_result=False), post("a3", rank=2)),
        "p1 a3",
    ),
    "not yet reviewed": (post("p1", post("a1", review_result=None)), "p1 a1"),
    "other language": (post("p1", post("a1"), lang="es"), "other language"),
    "no answers": (post("p1"), "empty conversation"),
    "deleted root": (post("p1", post("a1"), deleted=True), "deleted or rejected in review"),
    "empty": (post("p1", post("a1", text=" ")), "empty content"),
}


RANKED = {
    "every two ranked answers": (
        post("p1", post("a1", rank=2), post("a2", rank=0), post("a3", rank=1)),
        ["p1: a2 > a3", "p1: a2 > a1", "p1: a3 > a1"],
    ),
    "at every question, on any path": (
        post("p1", post("a1", post("p2", post("a3", rank=0), post("a4", rank=1)), rank=1), post("a2", rank=0)),
        ["p1: a2 > a1", "p1 a1 p2: a3 > a4"],
    ),
    "equal ranks": (
        post("p1", post("a1", rank=0), post("a2", rank=0), post("a3", rank=1)),
        ["p1: a1 > a3", "p1: a2 > a3", "answers of equal rank"],
    ),
    "only equal ranks": (post("p1", post("a1", rank=2), post("a2", rank=2.0)), ["answers of equal rank"]),  # type: ignore[arg-type]
    "unranked, deleted, rejected": (
        post("p1", post("a1"), post("a2", rank=0), post("a3", rank=1, deleted=True), post("a4", rank=2)),
        ["p1: a2 > a4"],
    ),
    "ranked questions are not answers": (
        post("p1", post("a1", post("p2", rank=0), post("p3", rank=1), rank=0)),
        ["fewer than two ranked answers"],
    ),
    "identical answers": (
        post("p1", post("a1", rank=0, text="x"), post("a2", rank=1, text="x ")),
        ["identical answers"],
    ),
    "other language": (post("p1", post("a1", rank=0), post("a2", rank=1), lang="es"), ["other language"]),
}


@pytest.mark.parametrize("as_rows", [False, True], ids=["trees", "rows"])
@pytest.mark.parametrize("name", RANKED)
def test_pairs_by_rank(tmp_path: Path, name: str, as_rows: bool) -> None:
    root, expected = RANKED[name]
    path = jsonl(tmp_path / "oasst.jsonl", *(flat(root) if as_rows else [tree(root)]))
    counts = RowCounts()
    found = [pair for _, pair in read_pairs(DataConfig(dataset=str(path)), counts, "en")]
    described = [f"{' '.join(m.content for m in p.prompt)}: {p.chosen.content} > {p.rejected.content}" for p in found]
    assert [*described, *counts.skipped] == expected
    assert counts.read == len(expected)


def test_number_of_pairs_in_real_trees(shared_data: Path) -> None:
    """n (n - 1) / 2 for n ranked answers to a question, counted by a plain walk."""
    path = shared_data / "instruct" / "oasst_trees.jsonl"
    counts = RowCounts()
    assert sum(1 for _ in read_pairs(DataConfig(dataset=str(path)), counts)) == counts.kept
    assert counts.summary() == ["507 pairs from 70 trees read, 507 kept"]

    def counted(message: dict[str, Any]) -> int:
        n = sum(reply["role"] == "assistant" and reply.get("rank") is not None for reply in message["replies"])
        return n * (n - 1) // 2 + sum(map(counted, message["replies"]))

    assert counts.kept == sum(counted(json.loads(line)["prompt"]) for line in path.read_text().splitlines()) == 507


@pytest.mark.parametrize("as_rows", [False, True], ids=["trees", "rows"])
@pytest.mark.parametrize("name", TREES)
def test_threads(tmp_path: Path, name: str, as_rows: bool) -> None:
    root, expected = TREES[name]
    rows = flat(root) if as_rows else [tree(root)]
    random.Random(0).shuffle(rows)
    found, counts = read(jsonl(tmp_path / "oasst.jsonl", *rows), language="en")
    if " " in expected and expected[0] == "p":
        roles = {"p": "user", "a": "assistant"}
        assert found == [tuple((roles[text[0]], text) for text in expected.split())]
        assert counts.read == 1
    else:
        assert found == [] and counts.skipped == {expected: 1}


def test_messages_outside_any_tree_are_counted(tmp_path: Path) -> None:
    good = flat(post("p1", post("a1")))
    orphans = flat(post("a9", post("p9")), parent="gone")
    broken = {"message_id": "x", "parent_id": None, "role": "prompter", "text": None}
    found, counts = read(path := jsonl(tmp_path / "oasst.jsonl", *good, *orphans, broken))
    assert len(found) == 1
    assert counts.skipped == {"missing parent message": 1, "field is null": 1}
    assert (
        counts.first_skipped["missing parent message"]
        == f"{path}:3: missing parent message (no message gone in this file)"
    )


MALFORMED = {
    "replies are not messages": [post("p1", replies=5), post("p1", replies="abc"), post("p1", replies=["a"])],
    "rank is not a number": [
        post("p1", post("a1", rank="x"), post("a2", rank=1)),
        post("p1", post("a1", rank=True), post("a2", rank=1)),
        post("p1", post("a1", rank=[0])),
        post("p1", post("a1", rank=float("nan"))),
    ],
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_trees_are_counted(tmp_path: Path, reason: str) -> None:
    good = post("p1", post("a1", rank=0), post("a2", rank=1))
    rows = [
        tree(root) for root in MALFORMED[reason] if "NaN" not in json.dumps(root)
    ]  # possible in Parquet, not in JSON
    path = jsonl(tmp_path / "oasst.jsonl", tree(good), *rows)
    found, counts = read(path)
    assert len(found) == 1 and counts.skipped == {reason: len(rows)}
    assert counts.summary()[0] == f"{len(rows) + 1} trees read, 1 kept"
    counts = RowCounts()
    assert len(list(read_pairs(DataConfig(dataset=str(path)), counts))) == 1 and counts.skipped == {reason: len(rows)}
    for one in MALFORMED[reason]:
        ((_, error),) = threads([("p", tree(one))])
        assert isinstance(error, InvalidRow) and error.reason == reason


def test_malformed_messages_are_counted(tmp_path: Path) -> None:
    good, (answer,) = flat(post("p1")), flat(post("a1"), parent="p1")
    bad = [{**answer, "message_id": ["x"]}, {**answer, "parent_id": {"a": 1}}, {**answer, "rank": "x"}]
    found, counts = read(jsonl(tmp_path / "oasst.jsonl", *good, answer, *bad))
    assert len(found) == 1 and counts.skipped == {"id is not a string": 2, "rank is not a number": 1}


def test_threads_deeper_than_the_recursion_limit(tmp_path: Path) -> None:
    rows = [
        {**flat(post(f"{'pa'[i % 2]}{i}"))[0], "parent_id": f"{'ap'[i % 2]}{i - 1}" if i else None, "rank": 0}
        for i in range(3000)
    ]
    path = jsonl(tmp_path / "oasst.jsonl", *rows)
    assert len(read(path)[0][0]) == 3000
    counts = RowCounts()
    assert not list(read_pairs(DataConfig(dataset=str(path)), counts)) and counts.skipped == {
        "fewer than two ranked answers": 1
    }


def test_trees_and_rows_are_counted_separately(tmp_path: Path) -> None:
    ranked = post("p1", post("a1", rank=0), post("a2", rank=1), post("a3", rank=2))
    trees = jsonl(tmp_path / "a.jsonl", tree(ranked), tree(post("p2")))
    rows = jsonl(tmp_path / "b.jsonl", *[{"prompt": "x", "chosen": "y", "rejected": str(i)} for i in range(5)])
    counts = RowCounts()
    assert len(list(read_pairs(DataConfig(dataset=[str(trees), str(rows)]), counts))) == 8
    assert counts.summary()[0] == "5 rows and 4 pairs from 2 trees read, 8 kept"


def test_real_trees_match_a_plain_walk(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "instruct" / "oasst_trees.jsonl"
    trees = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    expected = []
    for one in trees:
        here, thread = one["prompt"], []
        while here:
            thread.append(here)
            options = here["replies"]
            if here["role"] == "assistant":
                options = [reply for reply in options if reply["replies"]] or options
            here = min(options, key=lambda r: 99 if r.get("rank") is None else r["rank"], default=None)
        expected.append([m["text"] for m in thread if m is not thread[-1] or m["role"] == "assistant"])
    found, _ = read(path)
    assert [[text for _, text in thread] for thread in found] == expected
    as_rows = jsonl(tmp_path / "rows.jsonl", *(row for one in trees for row in flat(one["prompt"])))
    assert read(as_rows)[0] == found
