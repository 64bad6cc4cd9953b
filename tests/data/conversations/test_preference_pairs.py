"""Preference pairs to batches: same prompt, only answers in the loss, pairs by index."""

import re

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.batches import Prefetcher, TrainBatches, ValBatches
from anarchobot.data.conversations.preference_pairs import PairDataset, tokenize_pairs
from anarchobot.data.conversations.reading import RowCounts
from anarchobot.data.windows import IGNORE
from anarchobot.tokenizers.conversation import PreferencePair
from tests.tokenizers.templates import ChatFixture, MakeChat, dialogue, loss_text, preference
from tests.tokenizers.templates import make_chat as make_chat

LENGTH = 64


def some(n: int) -> list[tuple[str, PreferencePair]]:
    return [(f"f:{i}", preference(dialogue(f"question {i}"), f"good {i}", f"bad {i}!")) for i in range(n)]


def questions(chat: ChatFixture, pairs: PairDataset) -> set[str]:
    """The first questions of all pairs, decoded by transformers."""
    texts = [chat.theirs.decode(ids) for ids in pairs.rows(np.arange(pairs.count)).inputs[:, 0].tolist()]
    found = [re.search(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text) for text in texts]
    return {match[1] for match in found if match}


def test_pair_has_the_prompt_with_both_answers(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    pair = preference(dialogue("a", "b", "Why?", system="Be."), "Because.", "No, never.")
    train, val = tokenize_pairs([("", pair)], chat.encoder("answer"), RowCounts(1, 1), seq_len=LENGTH)
    batch = train.rows(np.array([0])).micro_batches(1, 1)
    assert batch.inputs.shape == batch.targets.shape == (1, 1, 2, LENGTH) and batch.indices.tolist() == [[0]]
    assert train.count == 1 and val.count == 0
    prompt = chat.encoder().encode_prompt(pair.prompt).tolist()
    for side, answer in enumerate(("Because.", "No, never.")):
        targets = batch.targets[0, 0, side]
        answer_ids = [*chat.ours.encode_batch([answer])[0].tolist(), chat.ours.control_tokens["<|im_end|>"]]
        scored = np.flatnonzero(targets != IGNORE).tolist()
        assert targets[scored].tolist() == answer_ids
        assert scored == list(range(len(prompt) - 1, len(prompt) - 1 + len(answer_ids)))
        assert batch.inputs[0, 0, side, : scored[-1] + 1].tolist() == [*prompt, *answer_ids[:-1]]
        assert (batch.inputs[0, 0, side, scored[-1] + 1 :] == chat.ours.eod_id).all()


def test_every_pair_once_per_epoch_with_its_index(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    train, _ = tokenize_pairs(some(11), chat.encoder("answer"), RowCounts(11, 11), seq_len=LENGTH)
    batches = TrainBatches([train], seed=5)
    assert batches.windows == 11
    indices = [batches.at(i, 1, 1).indices.item() for i in range(22)]
    assert sorted(indices[:11]) == sorted(indices[11:]) == list(range(11)) and indices[:11] != indices[11:]
    batch = batches.at(4, 2, 3)
    assert batch.inputs.shape == (2, 3, 2, LENGTH) and batch.indices.reshape(-1).tolist() == indices[4:10]
    one = train.rows(batch.indices.reshape(-1)).micro_batches(2, 3)
    assert (one.inputs == batch.inputs).all() and (one.targets == batch.targets).all()
    with Prefetcher(TrainBatches([train], seed=5)) as prefetched:
        assert (prefetched.at(4, 2, 3).inputs == batch.inputs).all()


def test_last_validation_batch_is_padded(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    pairs, _ = tokenize_pairs(some(5), chat.encoder("answer"), RowCounts(5, 5), seq_len=LENGTH)
    val = ValBatches(pairs, 2, None)
    assert [val[i].indices.tolist() for i in range(len(val))] == [[[0, 1]], [[2, 3]], [[4, -1]]]
    assert (val[2].targets[0, 1] == IGNORE).all() and (val[2].targets[0, 0] != IGNORE).any()


def test_truncation_drops_old_turns_but_never_answers(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    old = dialogue("old question " * 9, "old answer " * 9, "Why?", system="Be.")
    found = [
        ("f:1", preference(old, "Because.", "No.")),
        ("f:2", preference(dialogue("Why?"), "long " * 99, "No.")),
        ("f:3", preference(dialogue("Why?"), "Because.", "No.")),
    ]
    counts = RowCounts(3, 3)
    train, _ = tokenize_pairs(found, chat.encoder("answer"), counts, seq_len=LENGTH)
    assert train.count == counts.kept == 2 and counts.truncated == 1
    assert counts.skipped == {"too long": 1} and counts.first_skipped["too long"].startswith("f:2: ")
    short, _ = tokenize_pairs(
        [("", preference(dialogue("Why?", system="Be."), "Because.", "No."))],
        chat.encoder("answer"),
        RowCounts(1, 1),
        seq_len=LENGTH,
    )
    assert (
        train.rows(np.array([0])).micro_batches(1, 1).inputs == short.rows(np.array([0])).micro_batches(1, 1).inputs
    ).all()
    counts = RowCounts(3, 3)
    assert tokenize_pairs(found, chat.encoder("answer"), counts, seq_len=LENGTH, too_long="drop")[0].count == 1
    assert counts.skipped == {"too long": 2}
    with pytest.raises(UserError, match="no training data left"):
        tokenize_pairs(found[1:2], chat.encoder("answer"), RowCounts(1, 1), seq_len=LENGTH)


def test_templates_may_rewrite_earlier_answers(make_chat: MakeChat) -> None:
    """Qwen3 keeps only the last answer's reasoning, and only that answer is compared."""
    chat = make_chat("bytelevel", "qwen3")
    thought = "<think>\nhm\n</think>\n\nYes."
    for answer in ("No.", thought):
        encoded = chat.encode(dialogue("Well?", thought, "And?", answer), "answer")
        said = thought if answer == thought else "<think>\n\n</think>\n\nNo."
        assert loss_text(chat, encoded) == f"{said}<|im_end|>"
    counts = RowCounts(1, 1)
    pair = preference(dialogue("Well?", thought, "And?"), "Yes.", "No.")
    train, _ = tokenize_pairs([("f:1", pair)], chat.encoder("answer"), counts, seq_len=99)
    assert train.count == 1 and not counts.skipped


def test_pairs_with_the_same_prompt_are_in_one_split(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    found = [
        (f"f:{i}", preference(pair.prompt, f"{pair.chosen.content} {i}", "bad")) for _, pair in some(60) for i in "012"
    ]
    train, val = tokenize_pairs(found, chat.encoder("answer"), RowCounts(180, 180), seq_len=LENGTH, val_fraction=0.3)
    assert train.count + val.count == 180 and 10 < val.count < 100
    assert not questions(chat, train) & questions(chat, val)
    assert train.digest() != val.digest()
    again, _ = tokenize_pairs(found, chat.encoder("answer"), RowCounts(180, 180), seq_len=LENGTH, val_fraction=0.3)
    assert again.digest() == train.digest()


def test_pairs_from_the_same_dialogue_are_in_one_split(make_chat: MakeChat) -> None:
    """The prompts of later turns contain the first question, which would leak between splits."""
    chat = make_chat("bytelevel", "qwen2")
    found = []
    for i in range(60):
        for prompt in (dialogue(f"question {i}"), dialogue(f"question {i}", "yes", "and then?")):
            found.append(("", preference(prompt, f"good {i}", f"bad {i}")))
    train, val = tokenize_pairs(found, chat.encoder("answer"), RowCounts(120, 120), seq_len=LENGTH, val_fraction=0.3)
    assert train.count + val.count == 120 and 10 < val.count < 70
    assert not questions(chat, train) & questions(chat, val)
    assert questions(chat, train) | questions(chat, val) == {f"question {i}" for i in range(60)}
