"""Every window of an epoch is seen once, each target is the token after its input, and any step can be had at once."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.config.errors import UserError
from anarchobot.data.batches import IGNORE, TrainBatches, ValBatches
from anarchobot.data.shards import TokenStream
from tests.data.conftest import write_shards


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    """1,000 tokens that count up, in three shards: a token is its own place."""
    folder = tmp_path_factory.mktemp("batches")
    parts = [list(range(0, 137)), list(range(137, 138)), list(range(138, 1000))]
    write_shards(folder, 1000, train=parts, val=[list(range(500, 500 + size)) for size in (30, 71)])
    return TokenStream(folder, "train")


def starts(batches: TrainBatches, position: int, count: int) -> list[int]:
    """The first tokens of `count` windows from number `position` of the run on."""
    return [int(batches.at(position + i, 1, 1).inputs[0, 0, 0]) for i in range(count)]


@settings(max_examples=40, deadline=None)
@given(seq_len=st.integers(1, 999), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_an_epoch_has_every_window_once(stream: TokenStream, seq_len: int, seed: int, epoch: int) -> None:
    batches = TrainBatches(stream, seq_len, seed)
    assert batches.windows == 999 // seq_len
    batch = batches.at(epoch * batches.windows, batches.windows, 1)
    assert batch.inputs.shape == batch.targets.shape == (batches.windows, 1, seq_len)
    assert batch.inputs.dtype == batch.targets.dtype == np.int32
    assert batch.inputs.flags.c_contiguous and batch.targets.flags.c_contiguous
    assert (batch.targets == batch.inputs + 1).all()
    assert sorted(batch.inputs.flatten().tolist()) == list(range(batches.windows * seq_len))


@settings(max_examples=60, deadline=None)
@given(
    position=st.integers(0, 500),
    micro_batches=st.integers(1, 6),
    micro_batch_size=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_a_batch_is_the_next_windows_of_the_run_over_epoch_ends_too(
    stream: TokenStream, position: int, micro_batches: int, micro_batch_size: int, seed: int
) -> None:
    batches = TrainBatches(stream, 13, seed)
    batch = batches.at(position, micro_batches, micro_batch_size)
    assert batch.inputs.shape == (micro_batches, micro_batch_size, 13)
    assert batch.inputs[..., 0].flatten().tolist() == starts(batches, position, micro_batches * micro_batch_size)


def test_stepping_and_jumping_give_the_same_batches(stream: TokenStream) -> None:
    batches, again = TrainBatches(stream, 7, 3), TrainBatches(stream, 7, 3)
    stepped = [batches.at(step * 12, 3, 4) for step in range(40)]
    for step in (39, 0, 17):
        assert (again.at(step * 12, 3, 4).inputs == stepped[step].inputs).all()


def test_epochs_and_seeds_reshuffle(stream: TokenStream) -> None:
    batches, other = TrainBatches(stream, 10, 0), TrainBatches(stream, 10, 1)
    orders = [starts(batches, epoch * batches.windows, batches.windows) for epoch in range(3)]
    orders += [sorted(orders[0]), starts(other, 0, other.windows)]
    assert len({tuple(order) for order in orders}) == 5


def test_a_split_shorter_than_a_sequence_is_told(stream: TokenStream) -> None:
    with pytest.raises(UserError, match=r"1000 training tokens are less than one sequence of data\.seq_len 1000: give"):
        TrainBatches(stream, 1000, 0)
    assert TrainBatches(stream, 999, 0).windows == 1


@settings(max_examples=60, deadline=None)
@given(seq_len=st.integers(1, 120), rows=st.integers(1, 9))
def test_validation_scores_each_token_but_the_first_once(stream: TokenStream, seq_len: int, rows: int) -> None:
    val = TokenStream(stream.folder, "val")
    tokens = val.read(0, 101)
    inputs, targets = [], []
    for batch in ValBatches(val, seq_len, rows, None):
        assert batch.inputs.shape == batch.targets.shape == (1, rows, seq_len)
        assert batch.inputs.dtype == batch.targets.dtype == np.int32
        scored = batch.targets != IGNORE
        assert scored.any(), "an empty batch"
        inputs.append(batch.inputs[scored])
        targets.append(batch.targets[scored])
    assert (np.concatenate(inputs) == tokens[:-1]).all()
    assert (np.concatenate(targets) == tokens[1:]).all()


def test_the_limit_takes_batches_from_the_start(stream: TokenStream) -> None:
    val = TokenStream(stream.folder, "val")
    every, few = ValBatches(val, 8, 2, None), ValBatches(val, 8, 2, 3)
    assert (len(every), len(few), len(ValBatches(val, 8, 2, 99))) == (7, 3, 7)
    assert all((a.targets == b.targets).all() for a, b in zip(few, every, strict=False))
    for index in (3, -1):
        with pytest.raises(IndexError):
            few[index]


@pytest.mark.parametrize("splits", [{"train": [[1, 2]]}, {"train": [[1, 2]], "val": [[1]]}])
def test_a_validation_split_without_a_target_has_no_batches(tmp_path: Path, splits: dict[str, list[list[int]]]) -> None:
    write_shards(tmp_path, 3, **splits)
    assert len(ValBatches(TokenStream(tmp_path, "val"), 8, 2, None)) == 0
