"""Labeled answers to batches: each with its label and its prompt with an answer to another prompt."""

import re

import numpy as np

from anarchobot.data.batches import TrainBatches, ValBatches
from anarchobot.data.conversations.labeled_answers import LabeledDataset, tokenize_labeled, with_other_answers
from anarchobot.data.conversations.reading import RowCounts
from anarchobot.data.windows import IGNORE
from anarchobot.tokenizers.chat_encoder import Encoded
from anarchobot.tokenizers.conversation import LabeledConversation, PreferencePair
from tests.tokenizers.templates import ChatFixture, MakeChat, dialogue, preference
from tests.tokenizers.templates import make_chat as make_chat

LENGTH = 64


def made(chat: ChatFixture, items: list[LabeledConversation | PreferencePair], length: int = LENGTH) -> LabeledDataset:
    counts = RowCounts(len(items), len(items))
    found = tokenize_labeled(
        [(f"f:{i}", item) for i, item in enumerate(items)], chat.encoder("answer"), counts, seq_len=length
    )
    return found[0]


def answer_of(chat: ChatFixture, targets: np.ndarray) -> str:
    return str(chat.theirs.decode(targets[targets != IGNORE].tolist()))


def test_rows_have_the_answer_then_that_to_another_prompt(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    pair = preference(dialogue("b"), "three", "four")
    items = [
        LabeledConversation(dialogue("a", "one"), True),
        LabeledConversation(dialogue("a", "two"), False),
        pair,
        LabeledConversation(dialogue("c", "five"), False),
    ]
    batch = made(chat, items).rows(np.arange(6))
    assert batch.labels.tolist() == [True, False, True, False, False, False] and batch.indices.tolist() == [
        0,
        1,
        2,
        3,
        4,
        -1,
    ]
    answers = [[answer_of(chat, side).removesuffix("<|im_end|>") for side in row] for row in batch.targets[:5]]
    assert answers == [["one", "three"], ["two", "three"], ["three", "five"], ["four", "five"], ["five", "one"]]
    for own, other in batch.inputs[:5]:
        prompt = int(np.flatnonzero(own != other)[0])  # both begin with the same prompt
        assert chat.theirs.decode(own[:prompt].tolist()).endswith("assistant\n")
    assert (batch.targets[5] == IGNORE).all()
    batch = TrainBatches([made(chat, items)], seed=1).at(3, 2, 2)
    assert batch.labels.shape == (2, 2) and batch.labels.tolist() == (np.isin(batch.indices, (0, 2))).tolist()
    assert ValBatches(made(chat, items), 2, None)[2].labels.tolist() == [[False, False]]


def test_other_answers() -> None:
    """The last rows are followed by the first; a single prompt has only its own answers; long answers are cut."""

    def encoded(prompt: int, *answer: int) -> Encoded:
        return Encoded(np.array([9, prompt, *answer]), np.array([False, False, *[True] * len(answer)]))

    rows = [encoded(1, 11), encoded(1, 12), encoded(2, 13, 14, 15), encoded(1, 16)]
    found = with_other_answers(rows, limit=4)
    assert [x.ids.tolist() for x in found] == [[9, 1, 13, 14], [9, 1, 13, 14], [9, 2, 16], [9, 1, 13, 14]]
    assert [x.loss_mask.tolist() for x in found][2:] == [[False, False, True], [False, False, True, True]]
    assert with_other_answers([encoded(1, 11), encoded(1, 12)], 4)[0].ids.tolist() == [9, 1, 12]
    assert with_other_answers([encoded(1, 11)], 4)[0].ids.tolist() == [9, 1, 11]
    assert with_other_answers([], 4) == []


def test_labels_are_part_of_the_digest(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    first, again, other = (
        made(chat, [LabeledConversation(dialogue("a", "one"), True), LabeledConversation(dialogue("b", "two"), label)])
        for label in (True, True, False)
    )
    assert first.digest() == again.digest() != other.digest()
    assert other.describe() == "1 desirable (3 tokens), 1 undesirable (4 tokens)"


def test_splits_and_length_limit_are_those_of_pairs(make_chat: MakeChat) -> None:
    chat = make_chat("bytelevel", "qwen2")
    items = [
        (f"f:{i}", LabeledConversation(dialogue(f"question {i // 2}", f"answer {i}"), i % 2 == 0)) for i in range(60)
    ]
    items.append(("f:60", LabeledConversation(dialogue("Why?", "long " * 99), True)))
    items.append(("f:61", LabeledConversation(dialogue("old " * 40, "old " * 20, "Why?", "So."), True)))
    counts = RowCounts(62, 62)
    train, val = tokenize_labeled(items, chat.encoder("answer"), counts, seq_len=LENGTH, val_fraction=0.3)
    assert train.count + val.count == counts.kept == 61 and counts.skipped == {"too long": 1} and counts.truncated == 1
    questions = [
        set(
            re.findall(
                r"question (\d+)",
                " ".join(map(chat.theirs.decode, split.rows(np.arange(split.count)).inputs[:, 0].tolist())),
            )
        )
        for split in (train, val)
    ]
    assert len(questions[0] | questions[1]) == 30 and questions[1] and not questions[0] & questions[1]
