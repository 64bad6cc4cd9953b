"""Passages put before a question, each with its source."""

from collections.abc import Sequence

from anarchobot.knowledge.knowledge_base import Hit


def with_passages(question: str, hits: Sequence[Hit]) -> str:
    """The question with what was found for it, numbered, best first; without hits, the question as it is."""
    if not hits:
        return question
    found = "\n\n".join(f"[{i}] {hit.source}\n{hit.text.strip()}" for i, hit in enumerate(hits, start=1))
    return f"Passages that may help:\n\n{found}\n\nQuestion: {question}"
