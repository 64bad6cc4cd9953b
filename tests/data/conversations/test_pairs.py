"""Pairs to batches: both answers behind the same prompt, only answers scored, pairs found again by their numbers."""

from collections.abc import Callable

import numpy as np
import pytest
from anarchobot.data.conversations.tally import Tally

from anarchobot.config.errors import UserError
from anarchobot.data.batches import Prefetcher
from anarchobot.data.conversations.pairs import PairTrainBatches, PairValBatches
from anarchobot.data.conversations.tokenization import tokenised_pairs
from anarchobot.data.windows import IGNORE
from anarchobot.tokenizers.conversation import Pair
from tests.tokenizers.templates import Both, talk, trained_text

Make = Callable[[str, str], Both]
LENGTH = 64


def some(n: int) -> list[tuple[str, Pair]]:
    return [(f"f:{i}", Pair(talk(f"question {i}"), f"good {i}", f"bad {i}!")) for i in range(n)]


def test_a_pair_is_its_prompt_with_both_answers(both: Make) -> None:
    b = both("bytelevel", "qwen2")
    pair = Pair(talk("a", "b", "Why?", system="Be."), "Because.", "No, never.")
    train, val = tokenised_pairs([("", pair)], b.encoder("answer"), Tally(1, 1), seq_len=LENGTH)
    batch = train.batch(np.array([[0]]))
    assert batch.inputs.shape == batch.targets.shape == (1, 1, 2, LENGTH) and batch.numbers.tolist() == [[0]]
    assert train.count == 1 and val.count == 0
    prompt = b.encoder().prompt(pair.prompt).tolist()
    for side, answer in enumerate(("Because.", "No, never.")):
        targets = batch.targets[0, 0, side]
        answer_ids = [*b.ours.encode_batch([answer])[0].tolist(), b.ours.control_tokens["<|im_end|>"]]
        scored = np.flatnonzero(targets != IGNORE).tolist()
        assert targets[scored].tolist() == answer_ids
        assert scored == list(range(len(prompt) - 1, len(prompt) - 1 + len(answer_ids)))
        assert batch.inputs[0, 0, side, : scored[-1] + 1].tolist() == [*prompt, *answer_ids[:-1]]
        assert (batch.inputs[0, 0, side, scored[-1] + 1 :] == b.ours.eod_id).all()


def test_every_pair_comes_once_an_epoch_and_knows_its_number(both: Make) -> None:
    b = both("bytelevel", "qwen2")
    train, _ = tokenised_pairs(some(11), b.encoder("answer"), Tally(11, 11), seq_len=LENGTH)
    batches = PairTrainBatches(train, seed=5)
    assert batches.windows == 11
    numbers = [batches.at(i, 1, 1).numbers.item() for i in range(22)]
    assert sorted(numbers[:11]) == sorted(numbers[11:]) == list(range(11)) and numbers[:11] != numbers[11:]
    batch = batches.at(4, 2, 3)
    assert batch.inputs.shape == (2, 3, 2, LENGTH) and batch.numbers.reshape(-1).tolist() == numbers[4:10]
    one = train.batch(batch.numbers)
    assert (one.inputs == batch.inputs).all() and (one.targets == batch.targets).all()
    with Prefetcher(PairTrainBatches(train, seed=5)) as prefetched:
        assert (prefetched.at(4, 2, 3).inputs == batch.inputs).all()


def test_validation_ends_with_pairs_that_are_none(both: Make) -> None:
    b = both("bytelevel", "qwen2")
    pairs, _ = tokenised_pairs(some(5), b.encoder("answer"), Tally(5, 5), seq_len=LENGTH)
    val = PairValBatches(pairs, 2, None)
    assert [val[i].numbers.tolist() for i in range(len(val))] == [[[0, 1]], [[2, 3]], [[4, -1]]]
    assert (val[2].targets[0, 1] == IGNORE).all() and (val[2].targets[0, 0] != IGNORE).any()


def test_a_long_prompt_loses_its_oldest_turns_and_an_answer_nothing(both: Make) -> None:
    b = both("bytelevel", "qwen2")
    old = talk("old question " * 9, "old answer " * 9, "Why?", system="Be.")
    found = [
        ("f:1", Pair(old, "Because.", "No.")),
        ("f:2", Pair(talk("Why?"), "long " * 99, "No.")),
        ("f:3", Pair(talk("Why?"), "Because.", "No.")),
    ]
    tally = Tally(3, 3)
    train, _ = tokenised_pairs(found, b.encoder("answer"), tally, seq_len=LENGTH)
    assert train.count == tally.kept == 2 and tally.shortened == 1
    assert tally.left_out == {"longer than the limit": 1} and tally.first["longer than the limit"].startswith("f:2: ")
    short, _ = tokenised_pairs(
        [("", Pair(talk("Why?", system="Be."), "Because.", "No."))], b.encoder("answer"), Tally(1, 1), seq_len=LENGTH
    )
    assert (train.batch(np.array([[0]])).inputs == short.batch(np.array([[0]])).inputs).all()
    tally = Tally(3, 3)
    assert tokenised_pairs(found, b.encoder("answer"), tally, seq_len=LENGTH, too_long="drop")[0].count == 1
    assert tally.left_out == {"longer than the limit": 2}
    with pytest.raises(UserError, match="nothing to train on is left"):
        tokenised_pairs(found[1:2], b.encoder("answer"), Tally(1, 1), seq_len=LENGTH)


def test_what_a_template_does_to_earlier_answers_leaves_a_pair_in_place(both: Make) -> None:
    """Qwen3 shows the last answer's thoughts alone: that one is what is compared."""
    b = both("bytelevel", "qwen3")
    thought = "<think>\nhm\n</think>\n\nYes."
    for answer in ("No.", thought):
        encoded = b.encoded(talk("Well?", thought, "And?", answer), "answer")
        said = thought if answer == thought else "<think>\n\n</think>\n\nNo."
        assert trained_text(b, encoded) == f"{said}<|im_end|>"
    tally = Tally(1, 1)
    train, _ = tokenised_pairs([("f:1", Pair(talk("Well?", thought, "And?"), "Yes.", "No."))], b.encoder("answer"),
                               tally, seq_len=99)  # fmt: skip
    assert train.count == 1 and not tally.left_out


def test_pairs_of_one_prompt_are_on_one_side(both: Make) -> None:
    b = both("bytelevel", "qwen2")
    found = [("", pair._replace(chosen=f"{pair.chosen} {i}")) for _, pair in some(60) for i in range(3)]
    train, val = tokenised_pairs(found, b.encoder("answer"), Tally(180, 180), seq_len=LENGTH, val_fraction=0.3)
    assert train.count + val.count == 180 and train.count % 3 == val.count % 3 == 0 and 10 < val.count < 100
    assert train.digest() != val.digest()
    again, _ = tokenised_pairs(found, b.encoder("answer"), Tally(180, 180), seq_len=LENGTH, val_fraction=0.3)
    assert again.digest() == train.digest()


def test_pairs_of_one_dialogue_are_on_one_side(both: Make) -> None:
    """A later turn's pair has the first question in its prompt: on the other side it would have been learnt."""
    b = both("bytelevel", "qwen2")
    found = []
    for i in range(60):
        for prompt in (talk(f"question {i}"), talk(f"question {i}", "yes", "and then?")):
            found.append(("", Pair(prompt, f"good {i}", f"bad {i}")))
    train, val = tokenised_pairs(found, b.encoder("answer"), Tally(120, 120), seq_len=LENGTH, val_fraction=0.3)
    assert train.count + val.count == 120 and train.count % 2 == val.count % 2 == 0 and 10 < val.count < 70
