"""Evaluates models with different vocabularies on domain text: bits and tokens per byte, question answering."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.data.sources.files import EmptyFile, FileRange
from anarchobot.data.sources.rows import parse, read_jsonl
from anarchobot.evaluation.evaluate import evaluate_texts
from anarchobot.evaluation.loglikelihood import loglikelihoods
from anarchobot.inference.model import Model, load_model

ANSWERS = ("yes", "no", "maybe")
Metrics = dict[str, Any]


def evaluate_model(
    path: str,
    texts: Sequence[str],
    limit: int | None,
    qa: str | None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Metrics:
    """Returns `bits_per_byte` and `tokens_per_byte` of text files and, with `qa`, the results of `answer_questions`.
    `progress` is called with the fraction of the texts that is done.

    Raises UserError if a file cannot be read.
    """
    model, _ = load_model(path)
    totals = evaluate_texts(model, texts, limit, lambda text: None, progress).metrics
    metrics = {
        "bits_per_byte": round(totals["bits_per_byte"], 5),
        "tokens_per_byte": round(totals["tokens"] / totals["bytes"], 5),
        "bytes": totals["bytes"],
    }
    return metrics | (answer_questions(model, qa, limit) if qa is not None else {})


def answer_questions(model: Model, name: str, limit: int | None) -> Metrics:
    """Returns `qa_accuracy`, where the model's answer is the most likely of ANSWERS after abstract and question, and
    `qa_commonest`, the accuracy of always giving the most common answer."""
    rows = read_questions(Path(name))[:limit]
    begin, encode = model.bos_id, model.tokenizer.encode_batch
    answers = [ids.tolist() for ids in encode([f" {answer}" for answer in ANSWERS])]
    prompts = [f"{row['abstract']}\nQuestion: {row['question']}\nAnswer:" for row in rows]
    requests = [([begin, *ids.tolist()], answer) for ids in encode(prompts) for answer in answers]
    scores = [result.log_prob for result in loglikelihoods(model, requests)]
    correct = 0
    for i, row in enumerate(rows):
        answer_scores = scores[i * len(ANSWERS) : (i + 1) * len(ANSWERS)]
        correct += ANSWERS[answer_scores.index(max(answer_scores))] == row["answer"]
    given = [row["answer"] for row in rows]
    return {
        "qa_accuracy": round(correct / len(rows), 4),
        "qa_commonest": round(max(map(given.count, ANSWERS)) / len(rows), 4),
        "questions": len(rows),
    }


def read_questions(file: Path) -> list[dict[str, str]]:
    """Raises UserError if the file cannot be read, has no rows, or a row has a missing field or an unknown answer."""
    rows: list[dict[str, str]] = []
    try:
        lines = list(read_jsonl(FileRange(file)))
    except OSError as error:
        raise UserError(f"evaluation.qa: {file}: cannot read: {error.strerror}") from error
    except EmptyFile as error:
        raise UserError(f"evaluation.qa: {file}: no questions") from error
    for where, line in lines:
        try:
            if isinstance(line, ValueError):
                raise line
            row = parse(line)
            valid = all(isinstance(row[key], str) for key in ("question", "abstract")) and row["answer"] in ANSWERS
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise UserError(
                f"{where}: expected a JSON object with question, abstract and answer ({', '.join(ANSWERS)})"
            )
        rows.append(row)
    return rows


def to_markdown(results: dict[str, Metrics]) -> str:
    """Returns a table with one row per model and one column per metric."""
    columns = ("bits_per_byte", "tokens_per_byte", "qa_accuracy")
    names = [name for name in columns if any(name in metrics for metrics in results.values())]
    head = [f"| model | {' | '.join(name.replace('_', ' ') for name in names)} |", f"| --- |{' ---: |' * len(names)}"]
    rows = [
        f"| {model} | {' | '.join(f'{metrics[name]:.4f}' if name in metrics else '-' for name in names)} |"
        for model, metrics in results.items()
    ]
    return "\n".join([*head, *rows])
