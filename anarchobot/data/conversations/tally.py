"""What became of the rows: everything that is left out is counted by its reason, and the first of each is shown."""

from collections import Counter
from dataclasses import dataclass, field

from anarchobot.tokenizers.conversation import InvalidRow


@dataclass
class Tally:
    """`read` is `kept` and all of `left_out`. `shortened` are among the kept; with them went `cut` of the `answered`
    tokens, those that would have counted. A row is a conversation or a pair; `of_trees` of those read are what OASST's
    `trees` give, one thread or many pairs each, and single messages that no tree can be made of."""

    read: int = 0
    kept: int = 0
    shortened: int = 0
    answered: int = 0
    cut: int = 0
    trees: int = 0
    of_trees: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # the first of each reason: where, and more about it

    def leave_out(self, place: str, error: ValueError) -> None:
        reason = error.reason if isinstance(error, InvalidRow) else "broken row"
        self.left_out[reason] += 1
        self.first.setdefault(reason, f"{place}: {error}")

    def take_back(self, place: str, error: InvalidRow) -> None:
        """Leaves out what was counted as kept."""
        self.kept -= 1
        self.leave_out(place, error)

    def lines(self) -> list[str]:
        """For people: one line in all, and one for each reason."""
        rows = self.read - self.of_trees
        found = [f"{rows:,} rows"] if rows or not self.trees else []
        if self.trees:
            pairs = f"{self.of_trees:,} pairs of " if self.of_trees != self.trees else ""
            found.append(f"{pairs}{self.trees:,} trees")
        share = f" ({self.cut / self.answered:.1%} of the tokens that count)" if self.cut else ""
        shortened = f", of which {self.shortened:,} were cut to the limit{share}" if self.shortened else ""
        reasons = [f"left out: {n:,}, first {self.first[why]}" for why, n in self.left_out.most_common()]
        return [f"{' and '.join(found)} read, {self.kept:,} kept{shortened}", *reasons]
