"""A conversation: what the model is asked with, what fits, what is kept, and what the knowledge base is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig, GenerationConfig, KnowledgeBaseConfig
from anarchobot.data.conversations.reading import RowCounts, read_conversations
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.inference import chat
from anarchobot.inference.chat import ChatSession
from anarchobot.inference.generation import Piece, stream_token_ids
from anarchobot.inference.model import Model
from anarchobot.knowledge.knowledge_base import KnowledgeBase, prompt_with_passages
from anarchobot.tokenizers.chat_template import CHATML
from anarchobot.tokenizers.conversation import Message
from anarchobot.tokenizers.tokenizer import copy_tokenizer, load_chat_tokenizer
from tests.inference.conftest import SHAPE, strong_parameters

LONG = SHAPE.model_copy(update={"max_seq_len": 256})
GREEDY = GenerationConfig(method="greedy", max_new_tokens=12)


@pytest.fixture(scope="module")
def talker(tiny_shards: Path) -> Model:
    return Model(strong_parameters(LONG), LONG, load_chat_tokenizer(tiny_shards))


class Asked:
    """In place of TextBatch: says "Fine, 0.", "Fine, 1." and so on in pieces, and keeps what it was asked with."""

    contexts: list[list[int]]
    seeds: list[int]

    def __init__(self, model: Model, rows: int) -> None:
        self._left: list[str] = []

    def insert(self, context: list[int], settings: GenerationConfig, stop: set[int]) -> None:
        self._left = ["  ", " Fine", ",", f" {len(Asked.contexts)}. "]
        Asked.contexts.append(context)
        Asked.seeds.append(settings.seed)

    def __len__(self) -> int:
        return len(self._left)

    def step(self) -> list[Piece]:
        return [Piece(1, self._left.pop(0), 1, None)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> type[Asked]:
    Asked.contexts, Asked.seeds = [], []
    monkeypatch.setattr(chat, "TextBatch", Asked)
    return Asked


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KnowledgeBase]:
    """The sources have short names, wherever the folder is: they go into the prompt."""
    monkeypatch.chdir(tmp_path)
    Path("ants.txt").write_text("Ants have six legs.")
    Path("bees.txt").write_text("Bees have six legs and four wings.")
    with KnowledgeBase(tmp_path / "kb.sqlite", KnowledgeBaseConfig(), create=True) as opened:
        for name in ("ants.txt", "bees.txt"):
            opened.add(Path(name), DataConfig(), DocumentCounts())
        yield opened


def chatml(model: Model, *turns: tuple[str, str]) -> list[int]:
    """The ids of these turns and of the assistant's beginning, put together by hand."""
    tokenizer = load_chat_tokenizer(model.tokenizer.files[0])
    begin, end = (tokenizer.control_tokens[mark] for mark in ("<|im_start|>", "<|im_end|>"))

    def plain(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode_batch([text])[0].tolist()
        return ids

    said = [
        [begin, *plain(f"{role}\n{text}"), end, *plain("\n")] if text else [begin, *plain(f"{role}\n")]
        for role, text in (*turns, ("assistant", ""))
    ]
    return [i for ids in said for i in ids]


def test_the_answer_is_the_continuation_of_the_conversation(talker: Model) -> None:
    session, pieces = ChatSession(talker, GREEDY), list[str]()
    answer = session.answer("Who are you?", pieces.append)
    end = load_chat_tokenizer(talker.tokenizer.files[0]).control_tokens["<|im_end|>"]
    context = chatml(talker, ("user", "Who are you?"))
    ids = list(stream_token_ids(talker.params, LONG, context, GREEDY, {talker.tokenizer.eod_id, end}))
    assert answer == talker.tokenizer.decode(ids).strip() == "".join(pieces).strip() != ""
    assert session.turns == [Message("user", "Who are you?"), Message("assistant", answer)]


def test_history_goes_along_and_what_a_user_says_is_no_control_token(talker: Model, asked: type[Asked]) -> None:
    session = ChatSession(talker, GREEDY)
    session.set_system("Be kind.")
    assert session.answer("Who?") == "Fine, 0."
    session.answer("Why <|im_end|>?")
    first = (("system", "Be kind."), ("user", "Who?"))
    assert asked.contexts[0] == chatml(talker, *first)
    assert asked.contexts[1] == chatml(talker, *first, ("assistant", "Fine, 0."), ("user", "Why <|im_end|>?"))
    session.reset()
    session.set_system("")
    session.answer("Who?")
    assert asked.contexts[2] == chatml(talker, ("user", "Who?"))
    assert asked.seeds == [0, 1, 2]  # the same question may get another answer


def test_only_what_fits_goes_along_the_oldest_is_left_out_first(talker: Model, asked: type[Asked]) -> None:
    session = ChatSession(talker, GREEDY)
    session.set_system("Be kind.")
    for i in range(30):
        session.answer(f"question number {i}?")
        kept = [*session.turns[session.forgotten : -2], ("user", f"question number {i}?")]
        assert asked.contexts[-1] == chatml(talker, ("system", "Be kind."), *kept)
        assert len(asked.contexts[-1]) + GREEDY.max_new_tokens <= LONG.max_seq_len
    assert len(session.turns) == 60 and session.forgotten > 30
    dropped = [tuple(turn) for turn in session.turns[session.forgotten - 2 : session.forgotten]]
    longer = chatml(talker, ("system", "Be kind."), *dropped, *kept)  # no more than needed was left out
    assert len(longer) + GREEDY.max_new_tokens > LONG.max_seq_len
    before = list(session.turns)
    with pytest.raises(UserError, match=r"the question is \d+ tokens long in its template and the model's max_seq_len"):
        session.answer("word " * 300)
    assert session.turns == before


def test_a_long_question_may_take_the_answers_room(talker: Model) -> None:
    """But for one token at least."""
    session = ChatSession(talker, GREEDY.model_copy(update={"max_new_tokens": 200}))
    question = next(
        text for n in range(300) if len(chatml(talker, ("user", text := "x y " * n))) in range(248, LONG.max_seq_len)
    )
    session.answer(question)
    assert session.turns[0].content == question


def test_passages_go_before_the_question_with_their_sources_and_not_into_the_history(
    talker: Model, asked: type[Asked], base: KnowledgeBase
) -> None:
    session = ChatSession(talker, GREEDY, base)
    session.answer("How many wings have bees?")
    (context,) = asked.contexts
    shown = talker.tokenizer.decode(context)
    assert "bees.txt\nBees have six legs and four wings." in shown
    assert shown.index("four wings") < shown.index("How many wings have bees?")
    assert session.turns[0].content == "How many wings have bees?"
    session.answer("zzz")
    assert "four wings" not in talker.tokenizer.decode(asked.contexts[1]) and session.hits == []
    with pytest.raises(UserError, match="nothing was found in the knowledge base for the last question"):
        session.vote(1.0)


def test_passages_that_do_not_fit_are_left_out_from_the_last(
    talker: Model, asked: type[Asked], base: KnowledgeBase
) -> None:
    """With longer and longer questions; as many go along as fit."""
    counts, room = [], LONG.max_seq_len - GREEDY.max_new_tokens
    for n in range(0, 40, 2):
        session, question = ChatSession(talker, GREEDY, base), "How many legs?" + " well" * n
        found = base.search(question)
        session.answer(question)
        assert session.hits == found[: len(session.hits)]
        sizes = [len(chatml(talker, ("user", prompt_with_passages(question, found[:k])))) for k in range(3)]
        assert len(session.hits) == max((k for k in range(3) if sizes[k] <= room), default=0)
        counts.append(len(session.hits))
    assert set(counts) == {0, 1, 2}


def test_votes_are_on_what_was_found_for_the_last_question(
    talker: Model, asked: type[Asked], base: KnowledgeBase
) -> None:
    session = ChatSession(talker, GREEDY, base)
    session.answer("How many wings?")
    ids = [hit.passage_id for hit in session.hits]
    assert session.vote(1.0) == len(ids) == 1
    assert base.relevances("How many wings?", ids)[ids[0]] > 0
    session.vote(-1.0)
    session.vote(-1.0)
    assert base.relevances("How many wings?", ids)[ids[0]] < 0
    with pytest.raises(UserError, match=r"there is no knowledge base .*: start with --kb FILE"):
        ChatSession(talker, GREEDY).vote(1.0)


def test_an_interrupted_answer_is_what_was_said_until_then(talker: Model, asked: type[Asked]) -> None:
    session = ChatSession(talker, GREEDY)

    def stop(text: str) -> None:
        if text == ",":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.answer("Who?", stop)
    assert session.turns == [Message("user", "Who?"), Message("assistant", "Fine,")]


def test_what_is_saved_is_read_by_sft(talker: Model, asked: type[Asked], tmp_path: Path) -> None:
    session, file = ChatSession(talker, GREEDY), tmp_path / "chats.jsonl"
    with pytest.raises(UserError, match="nothing was said yet"):
        session.save(file)
    session.answer("Wer? Naïve “quotes”\u2028")
    session.save(file)
    session.set_system("Be kind.")
    session.answer("Why?")
    session.save(file)
    read = [talk for _, talk in read_conversations(DataConfig(dataset=str(file)), RowCounts())]
    assert read == [tuple(session.turns[:2]), (Message("system", "Be kind."), *session.turns)]


def test_a_system_message_that_the_template_refuses_is_not_taken(
    tiny_shards: Path, tmp_path: Path, asked: type[Asked]
) -> None:
    copy_tokenizer(load_chat_tokenizer(tiny_shards), tmp_path)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(refusal + CHATML)
    session = ChatSession(Model({}, LONG, load_chat_tokenizer(tmp_path)), GREEDY)
    with pytest.raises(UserError, match="no system here"):
        session.set_system("Be kind.")
    assert session.answer("Who?") == "Fine, 0."
    with pytest.raises(UserError, match="unpaired surrogate"):
        session.answer("\udcff")


def test_a_model_that_was_not_taught_to_answer_is_told(talker: Model) -> None:
    assert ChatSession(talker, GREEDY).warnings() == [
        "no chat template comes with this model: it was not taught to answer (chatml is used)"
    ]
