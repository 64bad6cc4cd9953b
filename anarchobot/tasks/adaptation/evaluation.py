"""What a model is worth on a field's text, whatever its vocabulary: bits and tokens per byte, questions answered."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.evaluation.evaluate import of_texts
from anarchobot.evaluation.likelihood import likelihoods
from anarchobot.inference.model import Model, load_model

ANSWERS = ("yes", "no", "maybe")
Figures = dict[str, Any]


def figures(
    path: str, texts: Sequence[str], limit: int | None, qa: str | None, say: Callable[[str], None] = lambda text: None
) -> Figures:
    """`bits_per_byte` and `tokens_per_byte` over the texts and, with `qa`, `qa_accuracy` and what the commonest answer
    alone would get. Raises UserError when a file can't be read."""
    model, _ = load_model(path)
    found = of_texts(model, texts, limit, say)
    measured = {
        "bits_per_byte": round(found["bits_per_byte"], 5),
        "tokens_per_byte": round(found["tokens"] / found["bytes"], 5),
        "bytes": found["bytes"],
    }
    return measured | (question_answering(model, qa, limit) if qa is not None else {})


def question_answering(model: Model, name: str, limit: int | None) -> Figures:
    """The share of questions whose right answer is the likeliest of ANSWERS, as text behind abstract and question."""
    rows = read_questions(Path(name))[:limit]
    begin, encode = model.begin, model.tokenizer.encode_batch
    answers = [ids.tolist() for ids in encode([f" {answer}" for answer in ANSWERS])]
    prompts = [f"{row['abstract']}\nQuestion: {row['question']}\nAnswer:" for row in rows]
    requests = [([begin, *ids.tolist()], answer) for ids in encode(prompts) for answer in answers]
    scores = [likelihood.log_prob for likelihood in likelihoods(model, requests)]
    right, of = 0, len(ANSWERS)
    for number, row in enumerate(rows):
        own = scores[number * of : (number + 1) * of]
        right += ANSWERS[own.index(max(own))] == row["answer"]
    given = [row["answer"] for row in rows]
    return {
        "qa_accuracy": round(right / len(rows), 4),
        "qa_commonest": round(max(map(given.count, ANSWERS)) / len(rows), 4),
        "questions": len(rows),
    }


def read_questions(file: Path) -> list[dict[str, str]]:
    """Raises UserError when a row lacks one of the three fields, or its answer is none of ANSWERS."""
    rows: list[dict[str, str]] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"evaluation.qa: {file}: can't be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            good = all(isinstance(row[key], str) for key in ("question", "abstract")) and row["answer"] in ANSWERS
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UserError(
                f"{file}:{number}: expected a JSON object with question, abstract and answer, one of "
                f"{', '.join(ANSWERS)}"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"evaluation.qa: {file}: holds no question")
    return rows


def table(results: dict[str, Figures]) -> str:
    """Markdown: a line a model, a column a figure."""
    names = [
        key for key in ("bits_per_byte", "tokens_per_byte", "qa_accuracy") if any(key in r for r in results.values())
    ]
    head = [f"| model | {' | '.join(name.replace('_', ' ') for name in names)} |", f"| --- |{' ---: |' * len(names)}"]
    rows = [
        f"| {model} | {' | '.join(f'{found[name]:.4f}' if name in found else '-' for name in names)} |"
        for model, found in results.items()
    ]
    return "\n".join([*head, *rows])
