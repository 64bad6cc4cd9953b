"""Small bases for tests: one text a row, so that the passages of short texts are numbered 1, 2, 3 in their order."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources.documents import Counts
from anarchobot.knowledge.knowledge_base import KnowledgeBase, Outcome


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def opened(path: Path, create: bool = True, **settings: Any) -> KnowledgeBase:
    return KnowledgeBase(path, KnowledgeBaseConfig(**settings), create=create)


def put(base: KnowledgeBase, path: Path) -> Outcome:
    return base.add(path, DataConfig(), Counts())


def base_of(folder: Path, texts: Sequence[str], **settings: Any) -> KnowledgeBase:
    base = opened(folder / "kb.db", **settings)
    put(base, write_rows(folder / "texts.jsonl", texts))
    return base
