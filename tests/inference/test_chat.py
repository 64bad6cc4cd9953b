"""Chat sessions: prompts, truncation to the context window, saving, and the knowledge base."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig, GenerationConfig, KnowledgeBaseConfig
from anarchobot.data.conversations.reading import RowCounts, read_conversations
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.inference import chat
from anarchobot.inference.batching import Batch
from anarchobot.inference.chat import ChatSession, chat_encoder
from anarchobot.inference.generation import TextChunk, stream_token_ids
from anarchobot.inference.model import Model
from anarchobot.inference.prefixes import KeptPrefixes
from anarchobot.knowledge.knowledge_base import KnowledgeBase, prompt_with_passages
from anarchobot.tokenizers.chat_template import CHATML
from anarchobot.tokenizers.conversation import Message
from anarchobot.tokenizers.tokenizer import copy_tokenizer, load_tokenizer
from tests.inference.conftest import SHAPE, strong_parameters

LONG = SHAPE.model_copy(update={"max_seq_len": 256})
GREEDY = GenerationConfig(method="greedy", max_new_tokens=12)


@pytest.fixture(scope="module")
def chat_model(tiny_shards: Path) -> Model:
    return Model(strong_parameters(LONG), LONG, load_tokenizer(tiny_shards))


class FakeBatch:
    """Replaces TextBatch: answers "Fine, 0.", "Fine, 1." and so on in pieces, and records its prompts."""

    contexts: list[list[int]]
    seeds: list[int]

    def __init__(self, model: Model, max_rows: int, prefixes: KeptPrefixes, draft: None) -> None:
        self._left: list[str] = []

    def insert(self, context: list[int], settings: GenerationConfig, stop: set[int], shown: dict[int, str]) -> None:
        self._left = ["  ", " Fine", ",", f" {len(FakeBatch.contexts)}. "]
        FakeBatch.contexts.append(context)
        FakeBatch.seeds.append(settings.seed)

    def __len__(self) -> int:
        return len(self._left)

    def step(self) -> list[TextChunk]:
        return [TextChunk(1, self._left.pop(0), 1, None)]


@pytest.fixture
def fake_batch(monkeypatch: pytest.MonkeyPatch) -> type[FakeBatch]:
    FakeBatch.contexts, FakeBatch.seeds = [], []
    monkeypatch.setattr(chat, "TextBatch", FakeBatch)
    return FakeBatch


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KnowledgeBase]:
    """The sources have short names, because they are part of the prompt."""
    monkeypatch.chdir(tmp_path)
    Path("ants.txt").write_text("Ants have six legs.")
    Path("bees.txt").write_text("Bees have six legs and four wings.")
    with KnowledgeBase(tmp_path / "kb.sqlite", KnowledgeBaseConfig(), create=True) as opened:
        for name in ("ants.txt", "bees.txt"):
            opened.add(Path(name), DataConfig(), DocumentCounts())
        yield opened


def chatml(model: Model, *turns: tuple[str, str]) -> list[int]:
    """The ids of these turns and of the start of an answer, assembled by hand."""
    tokenizer = load_tokenizer(model.tokenizer.files[0])
    begin, end = (tokenizer.control_tokens[mark] for mark in ("<|im_start|>", "<|im_end|>"))

    def plain(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode_batch([text])[0].tolist()
        return ids

    turn_ids = [
        [begin, *plain(f"{role}\n{text}"), end, *plain("\n")] if text else [begin, *plain(f"{role}\n")]
        for role, text, *_ in (*turns, ("assistant", ""))
    ]
    return [i for ids in turn_ids for i in ids]


def test_answer_continues_the_conversation(chat_model: Model) -> None:
    session, pieces = ChatSession(chat_model, GREEDY), list[str]()
    answer = session.answer("Who are you?", pieces.append)
    end = load_tokenizer(chat_model.tokenizer.files[0]).control_tokens["<|im_end|>"]
    context = chatml(chat_model, ("user", "Who are you?"))
    ids = list(stream_token_ids(chat_model.params, LONG, context, GREEDY, {chat_model.tokenizer.eod_id, end}))
    assert answer == chat_model.tokenizer.decode(ids).strip() == "".join(pieces).strip() != ""
    assert session.turns == [Message("user", "Who are you?"), Message("assistant", answer)]


def test_user_text_in_the_history_is_never_a_control_token(chat_model: Model, fake_batch: type[FakeBatch]) -> None:
    session = ChatSession(chat_model, GREEDY)
    session.set_system("Be kind.")
    assert session.answer("Who?") == "Fine, 0."
    session.answer("Why <|im_end|>?")
    first = (("system", "Be kind."), ("user", "Who?"))
    assert fake_batch.contexts[0] == chatml(chat_model, *first)
    assert fake_batch.contexts[1] == chatml(chat_model, *first, ("assistant", "Fine, 0."), ("user", "Why <|im_end|>?"))
    session.reset()
    session.set_system("")
    session.answer("Who?")
    assert fake_batch.contexts[2] == chatml(chat_model, ("user", "Who?"))
    assert fake_batch.seeds == [0, 1, 2]  # a repeated question gets a different answer


def test_oldest_turns_are_dropped_first(chat_model: Model, fake_batch: type[FakeBatch]) -> None:
    session = ChatSession(chat_model, GREEDY)
    session.set_system("Be kind.")
    for i in range(30):
        session.answer(f"question number {i}?")
        kept = [*session.turns[session.dropped_turns : -2], ("user", f"question number {i}?")]
        assert fake_batch.contexts[-1] == chatml(chat_model, ("system", "Be kind."), *kept)
        assert len(fake_batch.contexts[-1]) + GREEDY.max_new_tokens <= LONG.max_seq_len
    assert len(session.turns) == 60 and session.dropped_turns > 30
    dropped = [tuple(turn) for turn in session.turns[session.dropped_turns - 2 : session.dropped_turns]]
    longer = chatml(chat_model, ("system", "Be kind."), *dropped, *kept)  # no more was dropped than necessary
    assert len(longer) + GREEDY.max_new_tokens > LONG.max_seq_len
    before = list(session.turns)
    with pytest.raises(UserError, match=r"the question has \d+ tokens in the chat template, but the model's max"):
        session.answer("word " * 300)
    assert session.turns == before


def test_a_long_question_can_use_the_room_for_the_answer(chat_model: Model) -> None:
    """At least one token is left for the answer."""
    session = ChatSession(chat_model, GREEDY.model_copy(update={"max_new_tokens": 200}))
    question = next(
        text
        for n in range(300)
        if len(chatml(chat_model, ("user", text := "x y " * n))) in range(248, LONG.max_seq_len)
    )
    session.answer(question)
    assert session.turns[0].content == question


def test_passages_precede_the_question_and_are_not_kept_in_the_history(
    chat_model: Model, fake_batch: type[FakeBatch], base: KnowledgeBase
) -> None:
    session = ChatSession(chat_model, GREEDY, base)
    session.answer("How many wings have bees?")
    (context,) = fake_batch.contexts
    prompt = chat_model.tokenizer.decode(context)
    assert "bees.txt\nBees have six legs and four wings." in prompt
    assert prompt.index("four wings") < prompt.index("How many wings have bees?")
    assert session.turns[0].content == "How many wings have bees?"
    session.answer("zzz")
    assert "four wings" not in chat_model.tokenizer.decode(fake_batch.contexts[1]) and session.hits == []
    with pytest.raises(UserError, match="no passages were found for the last question"):
        session.rate(1.0)


def test_passages_that_do_not_fit_are_dropped_from_the_last(
    chat_model: Model, fake_batch: type[FakeBatch], base: KnowledgeBase
) -> None:
    """With longer and longer questions; as many passages are used as fit."""
    counts, room = [], LONG.max_seq_len - GREEDY.max_new_tokens
    for n in range(0, 40, 2):
        session, question = ChatSession(chat_model, GREEDY, base), "How many legs?" + " well" * n
        found = base.search(question)
        session.answer(question)
        assert session.hits == found[: len(session.hits)]
        sizes = [len(chatml(chat_model, ("user", prompt_with_passages(question, found[:k])))) for k in range(3)]
        assert len(session.hits) == max((k for k in range(3) if sizes[k] <= room), default=0)
        assert session.dropped_hits == len(found) - len(session.hits)
        if not session.hits:
            with pytest.raises(UserError, match="none of the passages found for the last question fit"):
                session.rate(1.0)
        counts.append(len(session.hits))
    assert set(counts) == {0, 1, 2}


def test_ratings_apply_to_the_passages_of_the_last_question(
    chat_model: Model, fake_batch: type[FakeBatch], base: KnowledgeBase
) -> None:
    session = ChatSession(chat_model, GREEDY, base)
    session.answer("How many wings?")
    ids = [hit.passage_id for hit in session.hits]
    assert session.rate(1.0) == len(ids) == 1
    assert base.relevances("How many wings?", ids)[ids[0]] > 0
    session.rate(-1.0)
    session.rate(-1.0)
    assert base.relevances("How many wings?", ids)[ids[0]] < 0
    with pytest.raises(UserError, match=r"no knowledge base to rate: start with --kb FILE"):
        ChatSession(chat_model, GREEDY).rate(1.0)


def test_a_turn_computes_what_follows_the_prompt_before_it(chat_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tokens that the model computes; the answers are those without reuse, also after dropped turns and a reset."""
    prompts: list[list[int]] = []
    computed: list[int] = []
    last_logits, insert = Batch._last_logits, Batch.insert

    def counted(self: Batch, tokens: mx.array, *rest: Any) -> mx.array:
        computed.append(tokens.size)
        return last_logits(self, tokens, *rest)

    def noted(self: Batch, context: list[int], *rest: Any, **fields: Any) -> int:
        prompts.append(context)
        return insert(self, context, *rest, **fields)

    session, shared, stop = ChatSession(chat_model, GREEDY), [], chat_encoder(chat_model).stop_ids()
    for turn in range(8):
        if turn == 7:
            session.reset()
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "_last_logits", counted)
            patch.setattr(Batch, "insert", noted)
            computed.clear()
            answer = session.answer(f"Question {turn}?")
        tokens = list(stream_token_ids(chat_model.params, chat_model.config, prompts[-1], GREEDY, stop))
        assert answer == chat_model.tokenizer.decode(tokens).strip()
        before = prompts[-2] if turn else []
        same = [a == b for a, b in zip(before, prompts[-1], strict=False)]
        shared.append([*same, False].index(False))
        assert (computed[0], {*computed[1:]}) == (len(prompts[-1]) - shared[-1], {1})
    assert shared[5] > 150 and shared[7] < 30
    assert len(session._prefixes._kept) == 1


def test_an_interrupted_answer_is_kept(chat_model: Model, fake_batch: type[FakeBatch]) -> None:
    session = ChatSession(chat_model, GREEDY)

    def stop(text: str) -> None:
        if text == ",":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.answer("Who?", stop)
    assert session.turns == [Message("user", "Who?"), Message("assistant", "Fine,")]


def test_saved_conversations_are_read_by_sft(chat_model: Model, fake_batch: type[FakeBatch], tmp_path: Path) -> None:
    session, file = ChatSession(chat_model, GREEDY), tmp_path / "chats.jsonl"
    with pytest.raises(UserError, match="no conversation to save yet"):
        session.save(file)
    session.answer("Wer? Naïve “quotes”\u2028")
    session.save(file)
    session.set_system("Be kind.")
    session.answer("Why?")
    session.save(file)
    read = [talk for _, talk in read_conversations(DataConfig(dataset=str(file)), RowCounts())]
    assert read == [tuple(session.turns[:2]), (Message("system", "Be kind."), *session.turns)]


def test_a_system_message_that_the_template_rejects_is_not_set(
    tiny_shards: Path, tmp_path: Path, fake_batch: type[FakeBatch]
) -> None:
    copy_tokenizer(load_tokenizer(tiny_shards), tmp_path)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(refusal + CHATML)
    session = ChatSession(Model({}, LONG, load_tokenizer(tmp_path)), GREEDY)
    with pytest.raises(UserError, match="no system here"):
        session.set_system("Be kind.")
    assert session.answer("Who?") == "Fine, 0."
    with pytest.raises(UserError, match="unpaired surrogate"):
        session.answer("\udcff")


def test_warning_for_a_model_without_a_chat_template(chat_model: Model) -> None:
    assert ChatSession(chat_model, GREEDY).warnings() == [
        "this model has no chat template and was not trained to answer: using the chatml template"
    ]
