"""Tokenized conversations: truncation, splits, layout, order, counts and digests."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.batches import Prefetcher, TrainBatches, ValBatches
from anarchobot.data.conversations.reading import RowCounts, read_conversations
from anarchobot.data.conversations.tokenized import (
    ConversationWindows,
    TokenTable,
    fit_to_length,
    tokenize_conversations,
)
from anarchobot.data.windows import IGNORE
from anarchobot.tokenizers.chat_encoder import Encoded
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Message
from tests.tokenizers.templates import MakeChat, dialogue, to_dicts
from tests.tokenizers.templates import make_chat as make_chat

PAD = 0


def encoded(trained: str) -> Encoded:
    """One token per character with ids 1, 2, ...; those marked x are in the loss."""
    return Encoded(np.arange(1, len(trained) + 1, dtype=np.int32), np.array([c == "x" for c in trained], bool))


# Truncation


@pytest.mark.parametrize(
    ("trained", "limit", "cut", "drop"),
    [
        ("--xx", 4, "--xx", "--xx"),
        ("--xx--", 4, "--xx", "--xx"),  # everything after the last loss token is dropped
        ("--xxx", 4, "--xx", None),
        ("-x---x", 4, "-x", None),  # cut after the last answer within the limit
        ("----x", 4, None, None),
        ("----", 9, None, None),
        ("x", 9, None, None),  # no context
        ("", 9, None, None),
    ],
)
def test_long_conversations_are_cut_or_dropped(trained: str, limit: int, cut: str | None, drop: str | None) -> None:
    for too_long, expected in (("cut", cut), ("drop", drop)):
        if expected is None:
            with pytest.raises(InvalidRow):
                fit_to_length(encoded(trained), limit, too_long)  # type: ignore[arg-type]
        else:
            kept = fit_to_length(encoded(trained), limit, too_long)  # type: ignore[arg-type]
            assert kept.ids.tolist() == list(range(1, len(expected) + 1))
            assert "".join("-x"[int(t)] for t in kept.loss_mask) == expected


# Layout

MASKS = st.lists(st.text("-x", min_size=1, max_size=9).map(lambda s: "-" + s + "x"), min_size=1, max_size=25)


def make_table(masks: list[str], vocab_size: int = 70_000) -> TokenTable:
    """All ids are different."""
    counted, place = [], 1
    for mask in masks:
        counted.append(Encoded(np.arange(place, place + len(mask), dtype=np.int32), encoded(mask).loss_mask))
        place += len(mask)
    return TokenTable.from_encoded(counted, vocab_size)


@given(MASKS, st.booleans(), st.integers(10, 24))
def test_every_loss_token_is_a_target_exactly_once(masks: list[str], pack: bool, seq_len: int) -> None:
    tokenized = make_table(masks)
    windows = ConversationWindows(tokenized, seq_len, pack, PAD)
    rows = windows.rows(np.arange(windows.count))
    assert rows.inputs.shape == rows.targets.shape == (windows.count, seq_len)
    scored = rows.targets != IGNORE
    firsts = set((tokenized.offsets[:-1] + 1).tolist())
    flags = tokenized.loss_mask.tolist()
    expected = [i + 1 for i, trained in enumerate(flags) if trained and i + 1 not in firsts]
    assert sorted(rows.targets[scored].tolist()) == expected and tokenized.loss_tokens == len(expected)
    assert (rows.inputs[scored] == rows.targets[scored] - 1).all()
    # Every token but the last of a conversation is an input once; conversations are contiguous and have one segment.
    owners = np.searchsorted(tokenized.offsets[1:], rows.inputs - 1, side="right")
    assert Counter(rows.inputs[rows.inputs != PAD].tolist()) == {
        i: 1 for i in range(1, len(flags) + 1) if i not in set(tokenized.offsets[1:].tolist())
    }
    for row in range(windows.count):
        filled = rows.inputs[row] != PAD
        length = int(filled.sum())
        assert filled[:length].all(), "padding at the end only"
        assert (rows.targets[row, length:] == IGNORE).all()
        if pack:
            assert rows.segments is not None
            same = rows.segments[row][:, None] == rows.segments[row][None, :]
            expected_same = owners[row][:, None] == owners[row][None, :]
            both_filled = filled[:, None] & filled[None, :]
            assert (same == np.where(both_filled, expected_same, ~filled[:, None] & ~filled[None, :])).all()
        else:
            assert rows.segments is None and len(set(owners[row][filled].tolist())) == 1
    assert windows.fill == pytest.approx((rows.inputs != PAD).mean())
    if not pack:
        assert windows.count == len(masks)


@given(MASKS, st.booleans())
def test_rows_do_not_depend_on_each_other(masks: list[str], pack: bool) -> None:
    windows = ConversationWindows(make_table(masks), 12, pack, PAD)
    numbers = np.random.default_rng(0).permutation(windows.count + 2)  # two past the end: padding
    together = windows.rows(numbers)
    for i, number in enumerate(numbers.tolist()):
        alone = windows.rows(np.array([number]))
        assert (together.inputs[i] == alone.inputs[0]).all() and (together.targets[i] == alone.targets[0]).all()
        assert together.segments is None or (together.segments[i] == alone.segments[0]).all()  # type: ignore[index]
        if number >= windows.count:
            assert (alone.inputs == PAD).all() and (alone.targets == IGNORE).all()


@pytest.mark.parametrize("pack", [False, True])
def test_empty_table(pack: bool) -> None:
    windows = ConversationWindows(TokenTable.from_encoded([], 100), 16, pack, PAD)
    assert windows.count == len(ValBatches(windows, 4, None)) == 0 and windows.fill == 0.0


def test_packing_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(8, 200, 2000)
    windows = ConversationWindows(make_table(["-" * (n - 1) + "x" for n in lengths.tolist()]), 512, True, PAD)
    assert windows.fill > 0.99


def test_batches_depend_only_on_position_and_seed_and_epochs_are_reshuffled() -> None:
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
    assert len(val) == 2 and (val[1].targets[0, 3] == IGNORE).all(), "padded"


# Splits, counts and digests


def many(n: int) -> list[tuple[str, Conversation]]:
    return [(f"file:{i}", dialogue(f"question {i}", f"answer {i}")) for i in range(n)]


def test_adding_data_moves_nothing_between_splits(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")

    def held_out(n: int) -> set[tuple[int, ...]]:
        counts = RowCounts(read=n, kept=n)
        val = tokenize_conversations(many(n), chat.encoder(), counts, seq_len=99, val_fraction=0.2).val
        return {tuple(val.ids[a:z].tolist()) for a, z in zip(val.offsets[:-1], val.offsets[1:], strict=True)}

    few, more = held_out(300), held_out(600)
    assert 35 < len(few) < 90 and few < more
    counts = RowCounts(read=300, kept=300)
    tokenized = tokenize_conversations(many(300), chat.encoder(), counts, seq_len=99, val_fraction=0.2, samples=5)
    assert tokenized.train.count + tokenized.val.count == 300 and tokenized.val.count == len(few)
    assert len(tokenized.samples) == 5 and all(sample in [c for _, c in many(300)] for sample in tokenized.samples)
    assert tokenize_conversations(many(9), chat.encoder(), RowCounts(9, 9), seq_len=99).val.count == 0


def test_rows_from_the_same_dialogue_are_in_one_split(make_chat: MakeChat) -> None:
    """Other answers to its question, and the dialogue with more turns; the training split would answer the other."""
    chat = make_chat("bytelevel", "qwen2")
    rows = [
        ("", dialogue(f"question {i}", *turns, system="Be."))
        for i in range(60)
        for turns in (("yes",), ("no",), ("yes", "and then?", "no"))
    ]
    splits = tokenize_conversations(rows, chat.encoder(), RowCounts(180, 180), seq_len=99, val_fraction=0.3)

    def questions(table: TokenTable) -> set[str]:
        texts = [chat.theirs.decode(part.tolist()) for part in np.split(table.ids, table.offsets[1:-1])]
        return {text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in texts}

    assert splits.train.count + splits.val.count == 180 and 10 < splits.val.count < 100
    assert not questions(splits.train) & questions(splits.val)
    assert questions(splits.train) | questions(splits.val) == {f"question {i}" for i in range(60)}


def test_skipped_and_truncated_rows_are_counted(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "gemma")
    found = [
        ("f:1", dialogue("Hi", "Ho")),
        ("f:2", dialogue("Hi", "Ho", system="no system for Gemma")),
        ("f:3", dialogue("Hi", "Ho " * 100)),
        ("f:4", dialogue("Hi " * 100, "Ho")),
        ("f:5", dialogue("Hi", "Ho", "Hi " * 100, "Ho")),
    ]
    counts = RowCounts(read=5, kept=5)
    tokenized = tokenize_conversations(found, chat.encoder(), counts, seq_len=40)
    assert tokenized.train.count == counts.kept == 3 and counts.truncated == 2
    assert counts.skipped == {"rejected by the chat template": 1, "no answer within the length limit": 1}
    assert counts.first_skipped["no answer within the length limit"].startswith(
        "f:4: no answer within the length limit (41 tokens)"
    )
    whole = sum(int(chat.encode(found[i][1]).loss_mask.sum()) for i in (0, 2, 4))
    share = f"{1 - tokenized.train.loss_mask.sum() / whole:.1%}"
    assert share not in ("0.0%", "100.0%")
    dropped = f"{share} of loss tokens dropped: beyond data.seq_len"
    assert counts.summary()[0] == f"5 rows read, 3 kept, 2 truncated ({dropped})"
    assert (np.diff(tokenized.train.offsets) <= 41).all()
    counts = RowCounts(read=5, kept=5)
    assert tokenize_conversations(found, chat.encoder(), counts, seq_len=40, too_long="drop").train.count == 1
    assert counts.skipped["too long"] == 3
    with pytest.raises(UserError, match=r"no training data left: 1 rows read, 0 kept; skipped 1: f:2: rejected"):
        tokenize_conversations(found[1:2], chat.encoder(), RowCounts(1, 1), seq_len=40)
    with pytest.raises(UserError, match=r"1 rows read, 1 kept; 1 held out by data.val_fraction"):
        tokenize_conversations(found[:1], chat.encoder(), RowCounts(1, 1), seq_len=40, val_fraction=1.0)


def test_digest_covers_ids_masks_and_settings(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")

    def digest(
        found: list[tuple[str, Conversation]], train_on: str = "assistant", seq_len: int = 64, pack: bool = True
    ) -> str:
        tokenized = tokenize_conversations(found, chat.encoder(train_on), RowCounts(9, 9), seq_len=seq_len).train  # type: ignore[arg-type]
        return ConversationWindows(tokenized, seq_len, pack, 0).digest()

    same = digest(many(9))
    assert same == digest(many(9))
    others = [digest(many(8)), digest(many(9), "all"), digest(many(9), seq_len=65), digest(many(9), pack=False)]
    others.append(digest([*many(8), ("", dialogue("question 8", "answer 9"))]))
    assert len({same, *others}) == 6
    narrow, wide = make_table(["-xx"], 100), make_table(["-xx"], 100_000)
    assert (narrow.ids.dtype, wide.ids.dtype) == (np.uint16, np.int32) and narrow.digest() == wide.digest()


def test_bytes_per_loss_token(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    tokenized = tokenize_conversations(
        [("", dialogue("Hi", "猫猫"))], chat.encoder(), RowCounts(1, 1), seq_len=64
    ).train
    targets = int(chat.encode(dialogue("Hi", "猫猫")).loss_mask.sum())
    assert tokenized.loss_tokens == targets and tokenized.bytes_per_loss_token(chat.ours) == 6 / targets


def test_documents_have_end_of_document_tokens(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    tokenized = tokenize_conversations(
        [("", (Message("text", "abc"),))], chat.encoder(), RowCounts(1, 1), seq_len=64
    ).train
    assert tokenized.ids.tolist() == [chat.ours.eod_id, *chat.ours.encode_batch(["abc"])[0].tolist(), chat.ours.eod_id]
    assert tokenized.loss_tokens == len(tokenized.ids) - 1


def test_real_conversations_end_to_end(make_chat: MakeChat, shared_data: Path) -> None:
    """Ids and masks match transformers."""
    chat, marked = make_chat("bytelevel", "qwen2"), make_chat("bytelevel", "qwen2 marked")
    for name in (
        "chat_messages.jsonl",
        "alpaca_zh.json",
        "oasst_trees.jsonl",
        "gsm8k_train.jsonl",
        "sharegpt_identity.json",
    ):
        data = DataConfig(dataset=str(shared_data / "instruct" / name))
        found = list(islice(read_conversations(data, RowCounts()), 25))
        tokenized = tokenize_conversations(found, chat.encoder(), RowCounts(25, 25), seq_len=100_000).train
        for i, (_, conversation) in enumerate(found):
            expected = marked.theirs.apply_chat_template(
                to_dicts(conversation), return_assistant_tokens_mask=True, return_dict=True
            )
            begin, end = tokenized.offsets[i], tokenized.offsets[i + 1]
            length = int(end - begin)
            assert tokenized.ids[begin:end].tolist() == expected["input_ids"][:length]
            assert tokenized.loss_mask[begin:end].tolist() == [m == 1 for m in expected["assistant_masks"][:length]]
            assert not any(expected["assistant_masks"][length:])
