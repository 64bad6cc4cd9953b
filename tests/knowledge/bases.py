"""Small knowledge bases for tests: one text per row, so the passages of short texts have ids 1, 2, 3 in order."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.knowledge.knowledge_base import KnowledgeBase, Outcome


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def open_base(path: Path, create: bool = True, **settings: Any) -> KnowledgeBase:
    return KnowledgeBase(path, KnowledgeBaseConfig(**settings), create=create)


def add(base: KnowledgeBase, path: Path) -> Outcome:
    return base.add(path, DataConfig(), DocumentCounts())


def make_base(folder: Path, texts: Sequence[str], **settings: Any) -> KnowledgeBase:
    base = open_base(folder / "kb.db", **settings)
    add(base, write_rows(folder / "texts.jsonl", texts))
    return base
