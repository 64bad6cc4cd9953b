"""What a model writes at the end of `train`: continuations of a prompt, or answers to questions."""

from collections.abc import Iterator
from itertools import islice

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.data.conversations.reading import RowCounts, read_conversations
from anarchobot.data.conversations.tokenized import opening
from anarchobot.inference.chat import ChatSession
from anarchobot.inference.generation import generate_batch
from anarchobot.inference.model import load_model
from anarchobot.tokenizers.conversation import is_held_out

COUNT, MAX_TOKENS = 3, 120
SEPARATOR = "\n\n---\n\n"
SEARCHED = 1000  # conversations, for questions that are held out


def continuations(path: str) -> str:
    """COUNT continuations of generation.prompt. `path`: as of `load_model`."""
    model, config = load_model(path)
    settings = config.generation.model_copy(update={"max_new_tokens": MAX_TOKENS})
    texts = generate_batch(model, [settings.prompt] * COUNT, settings)
    return SEPARATOR.join(f"prompt: {settings.prompt}\n\n{settings.prompt}{text}" for text in texts)


def answers(path: str) -> str:
    """Answers to the questions with which COUNT conversations of the run's dataset begin."""
    model, config = load_model(path)
    session = ChatSession(model, config.generation.model_copy(update={"max_new_tokens": MAX_TOKENS}))
    return SEPARATOR.join(_dialogue(session, question) for question in _questions(config))


def _dialogue(session: ChatSession, question: str) -> str:
    session.reset()
    try:
        answer = session.answer(question)
    except UserError as error:
        answer = f"({error})"
    return f"user: {question}\n\nassistant: {answer}"


def _questions(config: Config) -> list[str]:
    """Of conversations that are held out; if those are too few, of others as well."""
    held_out, others = list[str](), list[str]()
    for question, is_held in islice(_first_questions(config), SEARCHED):
        (held_out if is_held else others).append(question)
    return [*held_out, *others][:COUNT]


def _first_questions(config: Config) -> Iterator[tuple[str, bool]]:
    for _, conversation in read_conversations(config.data, RowCounts(), config.chat.format, config.chat.language):
        question = next((message.content for message in conversation if message.role == "user"), "")
        if question:
            yield question, is_held_out(opening(conversation), config.data.val_fraction)
