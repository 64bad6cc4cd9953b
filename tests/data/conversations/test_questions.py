"""Prompts with answers: the forms of published data, what is refused, and their order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig, GRPOConfig
from anarchobot.data.conversations.questions import QuestionSet, TokenizedQuestion, tokenize_questions
from anarchobot.data.conversations.reading import RowCounts, read_questions
from anarchobot.tokenizers.conversation import Message
from anarchobot.training.rewards import Rewards
from tests.tokenizers.templates import MakeChat
from tests.tokenizers.templates import make_chat as make_chat

# In the form of GSM8K (Cobbe et al., 2021); written for this test.
GSM8K = {
    "question": "Mia has 12 pens. She buys 3 boxes of 10 pens. How many pens does she have?",
    "answer": "The boxes have 3*10=<<3*10=30>>30 pens.\nMia has 12+30=<<12+30=42>>42 pens.\n#### 42",
}


def read(folder: Path, rows: list[Any], *rewards: str) -> tuple[list[Any], RowCounts]:
    file, counts = folder / "questions.jsonl", RowCounts()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = Rewards(GRPOConfig(rewards=list(rewards or ("number",)))).check_answer  # type: ignore[arg-type]
    return [q for _, q in read_questions(DataConfig(dataset=str(file)), counts, check)], counts


def test_forms(tmp_path: Path) -> None:
    rows = [
        GSM8K,
        {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}], "solution": "2"},
        {"problem": "2+2", "solution": "two and two are 4", "answer": 4},
        {"messages": [{"role": "user", "content": "3+3"}, {"role": "assistant", "content": "6"}]},
        {"system": "Add.", "question": "4+4", "ground_truth": "8", "source": "me"},
    ]
    found, counts = read(tmp_path, rows)
    user = [Message("user", text) for text in (GSM8K["question"], "1+1", "2+2", "3+3", "4+4")]
    system = Message("system", "Add.")
    assert [q.prompt for q in found] == [
        (user[0],), (system, user[1]), (user[2],), (user[3],), (system, user[4])
    ]  # fmt: skip
    assert [q.answer for q in found] == ["42", "2", 4, "6", "8"]
    assert counts.kept == 5 and counts.other_fields == {"'source'": 1}


def test_refused_rows_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        GSM8K,
        {"question": "How many?", "answer": "#### none"},
        {"question": "How many?"},
        {"question": None, "answer": "1"},
        {"question": " ", "answer": "1"},
        {"answer": "1"},
        {"question": "What is it?", "image": "a.png", "answer": "1"},
        {"messages": [{"role": "assistant", "content": "3"}, {"role": "user", "content": "3+3"}], "answer": "6"},
    ]
    found, counts = read(tmp_path, rows)
    assert len(found) == 1 and counts.read == 8 and counts.kept == 1
    assert counts.skipped == {
        "no number in the answer": 1, "no answer": 1, "field is null": 1, "empty content": 1, "missing field": 1,
        "field can't be used": 1, "roles out of order": 1,
    }  # fmt: skip
    assert "questions.jsonl:2" in counts.first_skipped["no number in the answer"]
    with pytest.raises(UserError, match="no row has a prompt: expected a prompt"):
        read(tmp_path, [{"text": "a"}])


def test_prompts_are_those_of_generation_and_long_ones_are_skipped(make_chat: MakeChat, tmp_path: Path) -> None:
    chat = make_chat("bytelevel", "qwen2")
    encoder = chat.encoder("answer")
    rows = [{"question": f"Say {'no ' * i}{i}", "answer": str(i)} for i in range(30)]
    file, counts = tmp_path / "q.jsonl", RowCounts()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read_questions(DataConfig(dataset=str(file)), counts)
    train, val = tokenize_questions(questions, encoder, counts, max_prompt=60, val_fraction=0.3)
    assert train.count > 5 and val.count > 1 and train.count + val.count == counts.kept
    assert counts.skipped["prompt too long"] == 30 - counts.kept > 0
    for question in train.questions:
        assert len(question.ids) <= 60
        assert chat.theirs.decode(question.ids.tolist()).endswith("<|im_start|>assistant\n")
        assert question.prompt[-1].content.endswith(f" {question.answer}")
    other = QuestionSet([q._replace(answer="0") for q in train.questions])
    assert len({train.digest(), val.digest(), other.digest()}) == 3


def test_each_epoch_has_every_question_in_another_order() -> None:
    questions = QuestionSet([TokenizedQuestion(np.array([i], np.int32), (), i) for i in range(10)])
    epochs = [[q.answer for q in questions.shuffled(10 * epoch, 10, seed=5)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    parts = [q.answer for first in (0, 7, 14) for q in questions.shuffled(first, 7, seed=5)]
    assert parts == [*epochs[0], *epochs[1], *epochs[2]][:21]
