"""Many files into a base: each is tried, and what became of each is told and counted."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources.documents import Counts
from anarchobot.data.sources.files import EmptyFile
from anarchobot.knowledge.database import BaseFault
from anarchobot.knowledge.knowledge_base import KnowledgeBase

SAID = {"added": "added", "replaced": "replaced, for it has changed", "equal": "passed over, for it has not changed"}


@dataclass
class Added:
    """What became of the files; `counts`: of their texts."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # why, one line each
    counts: Counts = field(default_factory=Counts)


def add_files(
    base: KnowledgeBase, paths: Iterable[Path], named: Iterable[str], data: DataConfig, say: Callable[[str], None]
) -> Added:
    """Adds files. One that can't be added stops no other; an empty one is passed over unless it is among `named`.

    Raises BaseFault when the base itself is the trouble; the files before it are in it.
    """
    done, must_hold = Added(), {Path(name) for name in named}
    for path in paths:
        try:
            outcome = base.add(path, data, done.counts)
        except BaseFault:
            raise
        except EmptyFile as error:
            if path in must_hold:
                done.failed.append(str(error))
            else:
                done.counts.empty_files += 1
                done.counts.first_empty = done.counts.first_empty or str(path)
        except UserError as error:
            done.failed.append(str(error))
        except OSError as error:
            done.failed.append(f"{path}: can't be read: {error.strerror}")
        else:
            getattr(done, outcome).append(str(path))
            say(f"{path}: {SAID[outcome]}")
    return done
