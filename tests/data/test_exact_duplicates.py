"""The compact set says what Python's own set says."""

import random
import sys

from anarchobot.data.exact_duplicates import Seen


def test_it_knows_what_a_set_knows() -> None:
    """Keys close together, at both ends of the tables, and of other tables with the same low bits."""
    chance, seen, truth = random.Random(0), Seen(), set()
    for _ in range(60_000):
        key = chance.choice(
            [
                chance.getrandbits(64),
                chance.getrandbits(64) & ~0xFFFF,
                2 + chance.getrandbits(8),
                2**64 - 1 - chance.getrandbits(8),
                chance.getrandbits(8) << 56 | 5 << 50,
            ]
        )
        assert seen.add([key]) == [key not in truth], hex(key)
        truth.add(key)
    assert not any(seen.add(truth))


def test_zero_is_a_key_like_another() -> None:
    """It is what an empty place holds."""
    seen = Seen()
    assert seen.add([0, 0]) == [True, False]


def test_it_is_compact() -> None:
    seen, chance = Seen(), random.Random(1)
    seen.add(chance.getrandbits(64) for _ in range(300_000))
    size = sum(sys.getsizeof(table._keys) for table in seen._tables)
    assert size < 17 * 300_000
