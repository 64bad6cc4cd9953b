"""Conversations to tables and rows: what is too long, who is held out, that each trained token is a target once, that
order and digests are functions of what they should be."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anarchobot.data.conversations.tally import Tally
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.batches import Prefetcher, TrainBatches, ValBatches
from anarchobot.data.conversations.reading import conversations
from anarchobot.data.conversations.sequences import ConversationWindows
from anarchobot.data.conversations.table import Table, fitted, table
from anarchobot.data.conversations.tokenization import tokenised
from anarchobot.data.windows import IGNORE
from anarchobot.tokenizers.chat_encoder import Encoded
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message
from tests.tokenizers.templates import Both, talk

Make = Callable[[str, str], Both]
PAD = 0


def encoded(trained: str) -> Encoded:
    """One token a character, ids 1, 2, ...; those marked x are trained."""
    return Encoded(np.arange(1, len(trained) + 1, dtype=np.int32), np.array([c == "x" for c in trained], bool))


# Fitting


@pytest.mark.parametrize(
    ("trained", "limit", "cut", "drop"),
    [
        ("--xx", 4, "--xx", "--xx"),
        ("--xx--", 4, "--xx", "--xx"),  # what follows the last trained token does not count
        ("--xxx", 4, "--xx", None),
        ("-x---x", 4, "-x", None),  # nothing is left behind the last answer within the limit
        ("----x", 4, None, None),
        ("----", 9, None, None),
        ("x", 9, None, None),  # nothing before it to be told from
        ("", 9, None, None),
    ],
)
def test_what_is_too_long_is_cut_behind_its_last_answer_or_dropped(
    trained: str, limit: int, cut: str | None, drop: str | None
) -> None:
    for too_long, wanted in (("cut", cut), ("drop", drop)):
        if wanted is None:
            with pytest.raises(InvalidRow):
                fitted(encoded(trained), limit, too_long)  # type: ignore[arg-type]
        else:
            kept = fitted(encoded(trained), limit, too_long)  # type: ignore[arg-type]
            assert kept.ids.tolist() == list(range(1, len(wanted) + 1))
            assert "".join("-x"[int(t)] for t in kept.trained) == wanted


# Rows

MASKS = st.lists(st.text("-x", min_size=1, max_size=9).map(lambda s: "-" + s + "x"), min_size=1, max_size=25)


def make_table(masks: list[str], vocab_size: int = 70_000) -> Table:
    """Ids tell where they come from: no two are the same."""
    counted, place = [], 1
    for mask in masks:
        counted.append(Encoded(np.arange(place, place + len(mask), dtype=np.int32), encoded(mask).trained))
        place += len(mask)
    return table(counted, vocab_size)


@given(MASKS, st.booleans(), st.integers(10, 24))
def test_each_trained_token_is_a_target_once_from_the_one_before_it(masks: list[str], pack: bool, seq_len: int) -> None:
    made = make_table(masks)
    windows = ConversationWindows(made, seq_len, pack, PAD)
    rows = windows.rows(np.arange(windows.count))
    assert rows.inputs.shape == rows.targets.shape == (windows.count, seq_len)
    scored = rows.targets != IGNORE
    firsts = set((made.bounds[:-1] + 1).tolist())
    flags = made.trained.tolist()
    wanted = [i + 1 for i, trained in enumerate(flags) if trained and i + 1 not in firsts]
    assert sorted(rows.targets[scored].tolist()) == wanted and made.targets == len(wanted)
    assert (rows.inputs[scored] == rows.targets[scored] - 1).all()
    # All but each last token is an input once, its conversation in one piece and one segment.
    owners = np.searchsorted(made.bounds[1:], rows.inputs - 1, side="right")
    assert Counter(rows.inputs[rows.inputs != PAD].tolist()) == {
        i: 1 for i in range(1, len(flags) + 1) if i not in set(made.bounds[1:].tolist())
    }
    for row in range(windows.count):
        held = rows.inputs[row] != PAD
        length = int(held.sum())
        assert held[:length].all(), "padding at the end"
        assert (rows.targets[row, length:] == IGNORE).all()
        if pack:
            assert rows.segments is not None
            same = rows.segments[row][:, None] == rows.segments[row][None, :]
            wanted_same = owners[row][:, None] == owners[row][None, :]
            both_held = held[:, None] & held[None, :]
            assert (same == np.where(both_held, wanted_same, ~held[:, None] & ~held[None, :])).all()
        else:
            assert rows.segments is None and len(set(owners[row][held].tolist())) == 1
    assert windows.fill == pytest.approx((rows.inputs != PAD).mean())
    if not pack:
        assert windows.count == len(masks)


@given(MASKS, st.booleans())
def test_any_rows_in_any_order_are_the_rows_by_themselves(masks: list[str], pack: bool) -> None:
    windows = ConversationWindows(make_table(masks), 12, pack, PAD)
    numbers = np.random.default_rng(0).permutation(windows.count + 2)  # two beyond the last: all padding
    together = windows.rows(numbers)
    for i, number in enumerate(numbers.tolist()):
        alone = windows.rows(np.array([number]))
        assert (together.inputs[i] == alone.inputs[0]).all() and (together.targets[i] == alone.targets[0]).all()
        assert together.segments is None or (together.segments[i] == alone.segments[0]).all()  # type: ignore[index]
        if number >= windows.count:
            assert (alone.inputs == PAD).all() and (alone.targets == IGNORE).all()


@pytest.mark.parametrize("pack", [False, True])
def test_no_conversations_are_no_rows(pack: bool) -> None:
    windows = ConversationWindows(table([], 100), 16, pack, PAD)
    assert windows.count == len(ValBatches(windows, 4, None)) == 0 and windows.fill == 0.0


def test_packing_fills_rows(both: Make) -> None:
    lengths = np.random.default_rng(0).integers(8, 200, 2000)
    windows = ConversationWindows(make_table(["-" * (n - 1) + "x" for n in lengths.tolist()]), 512, True, PAD)
    assert windows.fill > 0.99


def test_batches_are_a_function_of_the_position_and_epochs_are_shuffled_anew() -> None:
    windows = ConversationWindows(make_table(["-x" * n for n in range(1, 8)]), 16, False, PAD)

    def epoch(batches: TrainBatches | Prefetcher, number: int, size: int) -> list[int]:
        rows = [batches.at(number * 7 + i, 1, size).inputs[0, :, 0].tolist() for i in range(0, 7, size)]
        return [first for row in rows for first in row][:7]

    batches = TrainBatches([windows], seed=3)
    epochs = [epoch(batches, e, 1) for e in range(3)]
    assert all(sorted(order) == sorted(epochs[0]) for order in epochs) and len(set(map(tuple, epochs))) == 3
    resumed = TrainBatches([windows], seed=3)
    assert epoch(resumed, 2, 1) == epochs[2] != epoch(TrainBatches([windows], seed=4), 2, 1)
    whole = batches.at(0, 3, 2)
    assert whole.inputs.shape == (3, 2, 16) and whole.segments is None
    with Prefetcher(TrainBatches([windows], seed=3)) as prefetched:
        assert epoch(prefetched, 0, 1) == epochs[0]
    val = ValBatches(windows, 4, None)
    assert len(val) == 2 and (val[1].targets[0, 3] == IGNORE).all(), "the eighth is filled up"


# Splits, counts and digests


def many(n: int) -> list[tuple[str, Conversation]]:
    return [(f"file:{i}", talk(f"question {i}", f"answer {i}")) for i in range(n)]


def run(b: Both, found: list[tuple[str, Conversation]], **settings: object) -> tuple[object, Tally]:
    tally = Tally(read=len(found), kept=len(found))
    made = tokenised(found, b.encoder(), tally, **{"seq_len": 64, **settings})  # type: ignore[arg-type]
    return made, tally


def test_adding_data_moves_nothing_to_the_other_side(both: Make) -> None:
    b = both("bytelevel", "qwen2")

    def held_out(n: int) -> set[tuple[int, ...]]:
        tally = Tally(read=n, kept=n)
        val = tokenised(many(n), b.encoder(), tally, seq_len=99, val_fraction=0.2).val
        return {tuple(val.ids[a:z].tolist()) for a, z in zip(val.bounds[:-1], val.bounds[1:], strict=True)}

    few, more = held_out(300), held_out(600)
    assert 35 < len(few) < 90 and few < more
    tally = Tally(read=300, kept=300)
    made = tokenised(many(300), b.encoder(), tally, seq_len=99, val_fraction=0.2, samples=5)
    assert made.train.count + made.val.count == 300 and made.val.count == len(few)
    assert len(made.samples) == 5 and all(sample in [c for _, c in many(300)] for sample in made.samples)
    assert tokenised(many(9), b.encoder(), Tally(9, 9), seq_len=99).val.count == 0


def test_what_is_left_out_and_cut_is_counted(both: Make) -> None:
    b = both("bytelevel", "gemma")
    found = [
        ("f:1", talk("Hi", "Ho")),
        ("f:2", talk("Hi", "Ho", system="no system for Gemma")),
        ("f:3", talk("Hi", "Ho " * 100)),
        ("f:4", talk("Hi " * 100, "Ho")),
        ("f:5", talk("Hi", "Ho", "Hi " * 100, "Ho")),
    ]
    tally = Tally(read=5, kept=5)
    made = tokenised(found, b.encoder(), tally, seq_len=40)
    assert made.train.count == tally.kept == 3 and tally.shortened == 2
    assert tally.left_out == {"the chat template refuses it": 1, "no answer within the limit": 1}
    assert tally.first["no answer within the limit"].startswith("f:4: no answer within the limit (of 41 tokens)")
    whole = sum(int(b.encoded(found[i][1]).trained.sum()) for i in (0, 2, 4))
    share = f"{1 - made.train.trained.sum() / whole:.1%}"
    assert share not in ("0.0%", "100.0%")
    assert tally.lines()[0] == (
        f"5 rows read, 3 kept, of which 2 were cut to the limit ({share} of the tokens that count)"
    )
    assert (np.diff(made.train.bounds) <= 41).all()
    tally = Tally(read=5, kept=5)
    assert tokenised(found, b.encoder(), tally, seq_len=40, too_long="drop").train.count == 1
    assert tally.left_out["longer than the limit"] == 3
    with pytest.raises(
        UserError, match=r"nothing to train on is left: 1 rows read, 0 kept; left out: 1, first f:2: the"
    ):
        tokenised(found[1:2], b.encoder(), Tally(1, 1), seq_len=40)
    with pytest.raises(UserError, match=r"1 rows read, 1 kept; 1 held out by data.val_fraction"):
        tokenised(found[:1], b.encoder(), Tally(1, 1), seq_len=40, val_fraction=1.0)


def test_the_digest_knows_every_id_mask_and_setting(both: Make) -> None:
    b = both("bytelevel", "qwen2")

    def digest(
        found: list[tuple[str, Conversation]], train_on: str = "assistant", seq_len: int = 64, pack: bool = True
    ) -> str:
        made = tokenised(found, b.encoder(train_on), Tally(9, 9), seq_len=seq_len).train  # type: ignore[arg-type]
        return ConversationWindows(made, seq_len, pack, 0).digest()

    same = digest(many(9))
    assert same == digest(many(9))
    others = [digest(many(8)), digest(many(9), "all"), digest(many(9), seq_len=65), digest(many(9), pack=False)]
    others.append(digest([*many(8), ("", talk("question 8", "answer 9"))]))
    assert len({same, *others}) == 6
    narrow, wide = make_table(["-xx"], 100), make_table(["-xx"], 100_000)
    assert (narrow.ids.dtype, wide.ids.dtype) == (np.uint16, np.int32) and narrow.digest() == wide.digest()


def test_bytes_of_text_in_a_trained_token(both: Make) -> None:
    b = both("bytelevel", "qwen2")
    made = tokenised([("", talk("Hi", "猫猫"))], b.encoder(), Tally(1, 1), seq_len=64).train
    targets = int(b.encoded(talk("Hi", "猫猫")).trained.sum())
    assert made.targets == targets and made.bytes_per_target(b.ours) == 6 / targets


def test_documents_are_packed_as_they_are(both: Make) -> None:
    b = both("bytelevel", "qwen2")
    made = tokenised([("", (Message("text", "abc"),))], b.encoder(), Tally(1, 1), seq_len=64).train
    assert made.ids.tolist() == [b.ours.eod_id, *b.ours.encode_batch(["abc"])[0].tolist(), b.ours.eod_id]
    assert made.targets == len(made.ids) - 1


def test_real_conversations_end_to_end(both: Make, shared_data: Path) -> None:
    """Against ids and masks of transformers, one conversation after the other."""
    b, marked = both("bytelevel", "qwen2"), both("bytelevel", "qwen2 marked")
    for name in (
        "chat_messages.jsonl",
        "alpaca_zh.json",
        "oasst_trees.jsonl",
        "gsm8k_train.jsonl",
        "sharegpt_identity.json",
    ):
        tally = Tally()
        found = [
            item
            for _, item in zip(
                range(25), conversations(DataConfig(dataset=str(shared_data / "instruct" / name)), tally), strict=False
            )
        ]
        made = tokenised(found, b.encoder(), Tally(25, 25), seq_len=100_000).train
        for i, (_, conversation) in enumerate(found):
            messages = [{"role": role, "content": content} for role, content in conversation]
            wanted = marked.theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
            begin, end = made.bounds[i], made.bounds[i + 1]
            length = int(end - begin)
            assert made.ids[begin:end].tolist() == wanted["input_ids"][:length]
            assert made.trained[begin:end].tolist() == [m == 1 for m in wanted["assistant_masks"][:length]]
            assert not any(wanted["assistant_masks"][length:])
