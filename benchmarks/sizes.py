"""Parameters, checkpoint size and memory of the shipped configurations. Writes the table of docs/recipes.md.

Everything is computed from the configuration. Memory is the estimated peak of a training step on a Mac's GPU, in
bfloat16.

    .venv/bin/python benchmarks/sizes.py
"""

import math
import re
from pathlib import Path

from anarchobot.config.loading import load_config
from anarchobot.model.parameters import parameter_count, parameter_shapes
from anarchobot.optim.param_groups import state_shapes
from anarchobot.system.memory import estimate

ROOT = Path(__file__).parents[1]
NAMES = ("quickstart", "tiny", "small", "m3pro", "memory_constrained", "medium", "large")


def cells(name: str) -> list[str]:
    """Parameters, checkpoint (weights and moments, float32) and memory, as in the table."""
    config = load_config(ROOT / "configs" / f"{name}.yaml").config
    moments = state_shapes(parameter_shapes(config.model), config.train)
    count = parameter_count(config.model)
    checkpoint = 4 * (count + sum(math.prod(s) for of in moments.values() for s in of.values()))
    return [f"{count / 1e6:,.1f} M", gb(checkpoint), gb(estimate(config, device="gpu").peak)]


def gb(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def main() -> None:
    page = ROOT / "docs" / "recipes.md"
    lines = page.read_text(encoding="utf-8").split("\n")
    for i, line in enumerate(lines):
        if found := re.match(r"\| \[(\w+)\]\(../configs/", line):
            first, *_, last = line.strip("|").split("|")
            lines[i] = f"|{first}| {' | '.join(cells(found[1]))} |{last}|"
    page.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
