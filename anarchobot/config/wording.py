"""Counts in messages."""


def count(number: int, noun: str) -> str:
    """`1 passage`, `2 passages`, `1,234 passages`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
