"""OASST trees to threads, against threads read off by hand; flat rows in any order give what trees give."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from anarchobot.data.conversations.tally import Tally

from anarchobot.config.schema import DataConfig
from anarchobot.data.conversations.oasst import threads
from anarchobot.data.conversations.reading import pairs
from anarchobot.tokenizers.conversation import InvalidRow
from tests.data.conversations.rows import jsonl, read


def post(name: str, *replies: dict[str, Any], rank: int | None = None, **fields: Any) -> dict[str, Any]:
    """A message whose text is its name; the first letter says whose it is."""
    role = "prompter" if name[0] == "p" else "assistant"
    known = {"deleted": False, "review_result": True, "lang": "en"}
    return {"message_id": name, "text": name, "role": role, "rank": rank, "replies": list(replies), **known, **fields}


def tree(root: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}


def flat(message: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    row = {**message, "parent_id": parent}
    return [row, *(r for reply in row.pop("replies") for r in flat(reply, message["message_id"]))]


TREES = {
    "the best-ranked answer": (post("p1", post("a1", rank=1), post("a2", rank=0), post("a3", rank=2)), "p1 a2"),
    "rank 0 before none": (post("p1", post("a1"), post("a2", rank=3)), "p1 a2"),
    "on along the best question": (
        post("p1", post("a1", post("p2", post("a2"), rank=1), post("p3", post("a3"), rank=0), rank=0)),
        "p1 a1 p3 a3",
    ),
    "a question with an answer before a better one without": (
        post("p1", post("a1", post("p2", rank=0), post("p3", post("a3"), rank=1))),
        "p1 a1 p3 a3",
    ),
    "an unanswered question at the end is dropped": (post("p1", post("a1", post("p2"))), "p1 a1"),
    "deleted and badly reviewed ones are not there": (
        post("p1", post("a1", rank=0, deleted=True), post("a2", rank=1, review_result=False), post("a3", rank=2)),
        "p1 a3",
    ),
    "no review yet is none": (post("p1", post("a1", review_result=None)), "p1 a1"),
    "another language": (post("p1", post("a1"), lang="es"), "another language"),
    "nobody answered": (post("p1"), "empty conversation"),
    "deleted at the root": (post("p1", post("a1"), deleted=True), "deleted or badly reviewed"),
    "empty": (post("p1", post("a1", text=" ")), "empty content"),
}


RANKED = {
    "each with each below it": (
        post("p1", post("a1", rank=2), post("a2", rank=0), post("a3", rank=1)),
        ["p1: a2 > a3", "p1: a2 > a1", "p1: a3 > a1"],
    ),
    "at each question, whatever led to it": (
        post("p1", post("a1", post("p2", post("a3", rank=0), post("a4", rank=1)), rank=1), post("a2", rank=0)),
        ["p1: a2 > a1", "p1 a1 p2: a3 > a4"],
    ),
    "without a rank, deleted, badly reviewed": (
        post("p1", post("a1"), post("a2", rank=0), post("a3", rank=1, deleted=True), post("a4", rank=2)),
        ["p1: a2 > a4"],
    ),
    "questions that are ranked are no answers": (
        post("p1", post("a1", post("p2", rank=0), post("p3", rank=1), rank=0)),
        ["no two ranked answers"],
    ),
    "equal answers": (post("p1", post("a1", rank=0, text="x"), post("a2", rank=1, text="x ")), ["equal answers"]),
    "another language": (post("p1", post("a1", rank=0), post("a2", rank=1), lang="es"), ["another language"]),
}


@pytest.mark.parametrize("as_rows", [False, True], ids=["trees", "rows"])
@pytest.mark.parametrize("name", RANKED)
def test_pairs_by_rank(tmp_path: Path, name: str, as_rows: bool) -> None:
    root, wanted = RANKED[name]
    path = jsonl(tmp_path / "oasst.jsonl", *(flat(root) if as_rows else [tree(root)]))
    tally = Tally()
    found = [pair for _, pair in pairs(DataConfig(dataset=str(path)), tally, "en")]
    said = [f"{' '.join(m.content for m in p.prompt)}: {p.chosen} > {p.rejected}" for p in found]
    assert [*said, *tally.left_out] == wanted
    assert tally.read == len(wanted)


def test_the_shared_trees_rank_507_pairs(shared_data: Path) -> None:
    """As many as a plain walk over the file counts: n (n - 1) / 2 for n ranked answers to one question."""
    path = shared_data / "instruct" / "oasst_trees.jsonl"
    tally = Tally()
    assert sum(1 for _ in pairs(DataConfig(dataset=str(path)), tally)) == tally.kept
    assert tally.lines() == ["507 pairs of 70 trees read, 507 kept"]

    def counted(message: dict[str, Any]) -> int:
        n = sum(reply["role"] == "assistant" and reply.get("rank") is not None for reply in message["replies"])
        return n * (n - 1) // 2 + sum(map(counted, message["replies"]))

    assert tally.kept == sum(counted(json.loads(line)["prompt"]) for line in path.read_text().splitlines()) == 507


@pytest.mark.parametrize("as_rows", [False, True], ids=["trees", "rows"])
@pytest.mark.parametrize("name", TREES)
def test_threads(tmp_path: Path, name: str, as_rows: bool) -> None:
    root, wanted = TREES[name]
    rows = flat(root) if as_rows else [tree(root)]
    random.Random(0).shuffle(rows)
    found, tally = read(jsonl(tmp_path / "oasst.jsonl", *rows), language="en")
    if " " in wanted and wanted[0] == "p":
        roles = {"p": "user", "a": "assistant"}
        assert found == [tuple((roles[text[0]], text) for text in wanted.split())]
        assert tally.read == 1
    else:
        assert found == [] and tally.left_out == {wanted: 1}


def test_rows_that_belong_to_no_tree_are_counted(tmp_path: Path) -> None:
    good = flat(post("p1", post("a1")))
    orphans = flat(post("a9", post("p9")), parent="gone")
    broken = {"message_id": "x", "parent_id": None, "role": "prompter", "text": None}
    found, tally = read(path := jsonl(tmp_path / "oasst.jsonl", *good, *orphans, broken))
    assert len(found) == 1
    assert tally.left_out == {"message without its parent": 1, "field missing": 1}
    assert (
        tally.first["message without its parent"]
        == f"{path}:3: message without its parent (no message gone in this file)"
    )


BROKEN = {
    "replies are no messages": [post("p1", replies=5), post("p1", replies="abc"), post("p1", replies=["a"])],
    "rank is no number": [
        post("p1", post("a1", rank="x"), post("a2", rank=1)),
        post("p1", post("a1", rank=True), post("a2", rank=1)),
        post("p1", post("a1", rank=[0])),
        post("p1", post("a1", rank=float("nan"))),
    ],
}


@pytest.mark.parametrize("reason", BROKEN)
def test_malformed_trees_are_counted(tmp_path: Path, reason: str) -> None:
    good = post("p1", post("a1", rank=0), post("a2", rank=1))
    rows = [tree(root) for root in BROKEN[reason] if "NaN" not in json.dumps(root)]  # JSON has none; Parquet has
    path = jsonl(tmp_path / "oasst.jsonl", tree(good), *rows)
    found, tally = read(path)
    assert len(found) == 1 and tally.left_out == {reason: len(rows)}
    assert tally.lines()[0] == f"{len(rows) + 1} trees read, 1 kept"
    tally = Tally()
    assert len(list(pairs(DataConfig(dataset=str(path)), tally))) == 1 and tally.left_out == {reason: len(rows)}
    for one in BROKEN[reason]:
        ((_, misfit),) = threads([("p", tree(one))])
        assert isinstance(misfit, InvalidRow) and misfit.reason == reason


def test_malformed_rows_of_trees_are_counted(tmp_path: Path) -> None:
    good, (answer,) = flat(post("p1")), flat(post("a1"), parent="p1")
    bad = [{**answer, "message_id": ["x"]}, {**answer, "parent_id": {"a": 1}}, {**answer, "rank": "x"}]
    found, tally = read(jsonl(tmp_path / "oasst.jsonl", *good, answer, *bad))
    assert len(found) == 1 and tally.left_out == {"id is no text": 2, "rank is no number": 1}


def test_a_long_chain_of_messages_is_walked(tmp_path: Path) -> None:
    """Longer than Python's calls may be deep."""
    rows = [
        {**flat(post(f"{'pa'[i % 2]}{i}"))[0], "parent_id": f"{'ap'[i % 2]}{i - 1}" if i else None, "rank": 0}
        for i in range(3000)
    ]
    path = jsonl(tmp_path / "oasst.jsonl", *rows)
    assert len(read(path)[0][0]) == 3000
    tally = Tally()
    assert not list(pairs(DataConfig(dataset=str(path)), tally)) and tally.left_out == {"no two ranked answers": 1}


def test_trees_and_rows_together_are_counted_apart(tmp_path: Path) -> None:
    ranked = post("p1", post("a1", rank=0), post("a2", rank=1), post("a3", rank=2))
    trees = jsonl(tmp_path / "a.jsonl", tree(ranked), tree(post("p2")))
    rows = jsonl(tmp_path / "b.jsonl", *[{"prompt": "x", "chosen": "y", "rejected": str(i)} for i in range(5)])
    tally = Tally()
    assert len(list(pairs(DataConfig(dataset=[str(trees), str(rows)]), tally))) == 8
    assert tally.lines()[0] == "5 rows and 4 pairs of 2 trees read, 8 kept"


def test_real_trees_against_a_plain_walk(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "instruct" / "oasst_trees.jsonl"
    trees = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    wanted = []
    for one in trees:
        here, thread = one["prompt"], []
        while here:
            thread.append(here)
            options = here["replies"]
            if here["role"] == "assistant":
                options = [reply for reply in options if reply["replies"]] or options
            here = min(options, key=lambda r: 99 if r.get("rank") is None else r["rank"], default=None)
        wanted.append([m["text"] for m in thread if m is not thread[-1] or m["role"] == "assistant"])
    found, _ = read(path)
    assert [[text for _, text in thread] for thread in found] == wanted
    as_rows = jsonl(tmp_path / "rows.jsonl", *(row for one in trees for row in flat(one["prompt"])))
    assert read(as_rows)[0] == found
