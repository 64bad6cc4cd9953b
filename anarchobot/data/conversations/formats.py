"""Rows of instruction, chat and preference datasets to conversations and preference pairs.

A row's format is detected from its field names. OpenAssistant's message trees, which span rows, are in oasst.py.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from anarchobot.data.conversations import tool_calls
from anarchobot.data.sources.rows import Row
from anarchobot.tokenizers.conversation import (
    ROLES,
    Conversation,
    InvalidRow,
    LabeledConversation,
    Message,
    PreferencePair,
    Question,
    check_encodable,
    check_turns,
    join_parts,
    make_pair,
    parse_message,
    parse_role,
    parse_text,
)

_SYSTEM = ("system", "system_prompt", "system_message")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")  # rows with content in these fields are skipped
# Of OpenAI, Axolotl and others: 0 or false excludes an answer from the loss.
_IN_LOSS = ("weight", "train", "training", "loss", "loss_weight", "loss_mask")
_LABELS = ("label", "kto_tag")  # of TRL and LLaMA-Factory: false marks a bad answer for KTO
_TOOLS = ("tools", "functions")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")
_RESULT = ("name", "tool_call_id")
_CHOICES = ("chosen", "rejected")
_TURN = ("role", "from", "content", "value")
# Fields of a question and its answer.
_QUESTIONS = ("prompt", "question", "query", "input")
_ANSWERS = ("completion", "answer", "response", "output")


class Format(NamedTuple):
    """`matches` looks only at field names; `parse` raises InvalidRow when the values are wrong. `fields` are those that
    it reads, besides the system prompt's."""

    matches: Callable[[Row], bool]
    parse: Callable[[Row], Conversation]
    fields: tuple[str, ...]


def get_field(row: Row, *names: str) -> Any:
    """The first of these fields that is present and not null. Raises InvalidRow if there is none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    if null := [name for name in names if name in row]:
        raise InvalidRow("field is null", " and ".join(map(repr, null)))
    raise InvalidRow(
        "missing field", f"no {' or '.join(map(repr, names))}; the row has {', '.join(sorted(row)) or 'no fields'}"
    )


def parse_messages(items: Any, name: str, row: Row) -> list[Message]:
    """Messages from a list of {role, content} or ShareGPT's {from, value}, in the field `name` of `row`.

    The row's tools go first, then its system prompt unless the list starts with one. Blank system prompts are ignored.
    """
    if not isinstance(items, list):
        raise InvalidRow("field is not a list", f"{type(items).__name__} in '{name}'")
    messages: list[Message] = []
    for i, item in enumerate(items):
        place = f"'{name}', turn {i + 1}"
        if not isinstance(item, dict):
            raise InvalidRow("turn is not an object", f"{type(item).__name__} in {place}")
        content = join_parts(item.get("content", item.get("value")))
        if _role(item) == "system" and isinstance(content, str) and not content.strip():
            continue
        messages.append(_parse_turn(item, content, place))
    return with_preamble(messages, row)


def with_preamble(messages: list[Message], row: Row) -> list[Message]:
    """The messages after the row's tools, and after its system prompt unless they start with one."""
    system = next((row[name] for name in _SYSTEM if row.get(name)), None)
    if isinstance(system, str) and system.strip() and not (messages and messages[0].role == "system"):
        messages = [Message("system", system), *messages]
    tools = next((tool_calls.parse_tools(row[name], name) for name in _TOOLS if _has_content(row.get(name))), None)
    return [Message("tools", "", fields={"tools": tools}), *messages] if tools else messages


def _parse_turn(item: Row, content: Any, place: str) -> Message:
    for field in _MEDIA:
        if _has_content(item.get(field)):
            raise InvalidRow("field can't be used", f"{field!r} in {place}")
    given = item.get("role", item.get("from"))
    role = parse_role(given, place)
    if role == "tool":
        fields = {name: parse_text(item[name], f"{name!r} of {place}") for name in _RESULT if item.get(name)}
        return Message("tool", parse_text(content, place), fields=fields)
    if role != "assistant":
        return parse_message(given, content, place)
    calls = [call for name in _CALLS for call in tool_calls.parse_calls(item.get(name), f"{name!r} of {place}")]
    if str(given).lower() in tool_calls.CALL_ROLES:
        calls, content = [*tool_calls.parse_calls(content, place), *calls], None
    is_blank = content is None or (isinstance(content, str) and not content.strip())
    message = Message("assistant", "") if calls and is_blank else parse_message(given, content, place)
    reasoning = {parse_text(item[name], f"{name!r} of {place}") for name in _REASONING if _has_content(item.get(name))}
    if len(reasoning) > 1:
        raise InvalidRow("different reasoning in several fields", place)
    return message._replace(
        reasoning=next((text for text in reasoning if text.strip()), ""),
        fields={"tool_calls": calls} if calls else {},
        in_loss=all(_is_in_loss(item, name, place) for name in _IN_LOSS),
    )


def _is_in_loss(item: Row, name: str, place: str) -> bool:
    """0 and false exclude an answer from the loss; there is nothing between them and 1."""
    if (value := item.get(name)) not in (None, 0, 1):
        raise InvalidRow("weight is not 0 or 1", f"{name}: {value!r} in {place}")
    return value != 0


def _role(item: Any) -> str | None:
    """The role of a message; None if there is none or it is unknown."""
    role = item.get("role", item.get("from")) if isinstance(item, dict) else None
    return ROLES.get(role.lower()) if isinstance(role, str) else None


def _has_content(value: Any) -> bool:
    return bool(value) and value != "[]"  # a list as JSON


def _from_list(row: Row, name: str) -> Conversation:
    return check_turns(_without_last_question(parse_messages(get_field(row, name), name, row)))


def _without_last_question(messages: list[Message]) -> list[Message]:
    """Without the questions and results of tools after the last answer; unchanged if there is no answer."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    is_question = answers and all(message.role in ("user", "tool") for message in messages[answers[-1] + 1 :])
    return messages[: answers[-1] + 1] if is_question else messages


def _from_alpaca(row: Row) -> Conversation:
    """Alpaca, or Dolly with its `context` and `response`. `history` holds earlier [user, assistant] turns."""
    parts = [get_field(row, "instruction"), row.get("input") or "", row.get("context") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise InvalidRow("content is not text", "'instruction', 'input' or 'context'")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in history):
        raise InvalidRow("field is not a list", "'history' must be a list of [user, assistant]")
    question = "\n".join(part for part in parts if part.strip())
    earlier = [content for exchange in history for content in exchange]
    return _alternating(row, [*earlier, question, get_field(row, *reversed(_ANSWERS))])


def _from_prompt_completion(row: Row) -> Conversation:
    """A question and its answer; `context` or `abstract` (SQuAD, PubMedQA) follows the question, as Alpaca's input."""
    prompt, completion = (join_parts(get_field(row, *names)) for names in (_QUESTIONS, _ANSWERS))
    if isinstance(prompt, list) or isinstance(completion, list):  # of messages
        messages = [*parse_messages(prompt, "prompt", row), *parse_messages(completion, "completion", {})]
        return check_turns(_without_last_question(messages))
    context = _context(row)
    if context and isinstance(prompt, str):
        prompt = f"{prompt}\n{context}"
    return _alternating(row, [prompt, completion])


def _context(row: Row) -> str:
    """The text that a question is about: one text or several, which PubMedQA has in `context["contexts"]`."""
    value = row.get("context") or row.get("abstract") or ""
    value = value.get("contexts") if isinstance(value, dict) else value
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise InvalidRow("content is not text", "'context' or 'abstract'")
    return "\n".join(part for part in parts if part.strip())


def _alternating(row: Row, contents: list[Any]) -> Conversation:
    turns = [parse_message(("user", "assistant")[i % 2], text, f"turn {i + 1}") for i, text in enumerate(contents)]
    return check_turns(with_preamble(turns, row))


def from_text(row: Row, text_field: str) -> Conversation:
    """A document: a single message with the role "text"."""
    text = get_field(row, text_field)
    if not isinstance(text, str):
        raise InvalidRow("content is not text", f"{type(text).__name__} in '{text_field}'")
    if not text.strip():
        raise InvalidRow("empty content", f"'{text_field}'")
    check_encodable(text, f"'{text_field}'")
    return (Message("text", text),)


def _check_text_only(row: Row) -> None:
    """Raises InvalidRow for a row about an image, audio or video, which its text does not explain."""
    for field in _MEDIA:
        if _has_content(row.get(field)):
            raise InvalidRow("field can't be used", f"{field!r}")


def check_row(row: Row) -> None:
    """Raises InvalidRow for a row that is not about text alone, and for an answer that KTO's label marks as bad."""
    _check_text_only(row)
    for field in _LABELS:
        if row.get(field) is False:
            raise InvalidRow("bad answer", f"{field}: false")


def unused_parts(row: Row) -> list[str]:
    """Parts of a valid row that affect what should be learned, and that are not used."""
    fields = [f"'{name}'" for name in _REASONING if _has_content(row.get(name))]
    last = next((row[name] for name in ("messages", "conversations", "completion") if row.get(name)), None)
    if not is_preference_row(row) and isinstance(last, list) and (role := _role(last[-1])) in ("user", "tool"):
        fields.append(f"the {role}'s last message, which has no answer")
    return fields


def unused_fields(row: Row, used: tuple[str, ...]) -> list[str]:
    """All other fields with content that are not among the `used` ones, of the row, its messages and their calls."""
    labels, turns = [name for name in _LABELS if isinstance(row.get(name), bool)], list(_turns(row))
    in_calls = {name for turn in turns for field in _CALLS for name in tool_calls.unused_fields(turn.get(field))}
    in_messages = dict.fromkeys(name for turn in turns for name in _other_fields([turn], _known_fields(turn)))
    return [
        *_other_fields([row], (*used, *_SYSTEM, *_TOOLS, *_REASONING, *labels)),
        *(f"{name} of messages" for name in in_messages),
        *(f"{name!r} of tool calls" for name in sorted(in_calls)),
    ]


def _known_fields(turn: Row) -> tuple[str, ...]:
    by_role = {"assistant": (*_CALLS, *_REASONING), "tool": _RESULT}
    return (*_TURN, *_IN_LOSS, *by_role.get(_role(turn) or "", ()))


def _other_fields(items: Iterable[Row], known: tuple[str, ...]) -> list[str]:
    names = {name: None for item in items for name in item if name not in known and _has_content(item[name])}
    return list(map(repr, names))


def _turns(row: Row) -> Iterator[Row]:
    for name in ("messages", "conversations", "prompt", "completion", *_CHOICES):
        value = row.get(name)
        yield from (turn for turn in (value if isinstance(value, list) else [value]) if isinstance(turn, dict))


def is_question_and_answer(row: Row) -> bool:
    return all(any(name in row for name in names) for names in (_QUESTIONS, _ANSWERS))


# Tried in this order: UltraChat's rows have a prompt as well as messages.
FORMATS = {
    "messages": Format(lambda row: "messages" in row, lambda row: _from_list(row, "messages"), ("messages",)),
    "sharegpt": Format(
        lambda row: "conversations" in row, lambda row: _from_list(row, "conversations"), ("conversations",)
    ),
    "alpaca": Format(
        lambda row: "instruction" in row and any(name in row for name in _ANSWERS),
        _from_alpaca,
        ("instruction", "input", "context", "history", *_ANSWERS),
    ),
    "prompt_completion": Format(
        lambda row: ("prompt" in row and "completion" in row) or ("question" in row and "answer" in row),
        _from_prompt_completion,
        ("context", "abstract", *_QUESTIONS, *_ANSWERS),
    ),
}
EXPECTED = (
    "messages, conversations, instruction and output, a question (prompt, question, query or input) and its answer "
    "(completion, answer, response or output), OASST message trees, or text"
)

# Preferences: UltraFeedback, HH-RLHF, ShareGPT and similar.

EXPECTED_PAIRS = (
    "chosen and rejected, with a separate prompt or the whole dialogue in each; LLMBar; PandaLM; or OpenAssistant "
    "message trees"
)
_PROMPTS = ("prompt", "question", "conversations")
PAIR_FIELDS = (*_PROMPTS, *_CHOICES)
_VOTES = ("label", "annotator1", "annotator2", "annotator3")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_preference_row(row: Row) -> bool:
    return all(name in row for name in _CHOICES)


def parse_pair(row: Row) -> PreferencePair:
    """Raises InvalidRow for a missing field, a missing prompt or answer, or identical answers.

    Each answer is a string, a message or a list of messages. The prompt is what both lists start with, preceded by the
    row's `prompt`, `question` or `conversations` unless the lists repeat it. Two strings without a prompt are
    HH-RLHF transcripts.
    """
    _check_text_only(row)
    answers = {name: get_field(row, name) for name in _CHOICES}
    types = {type(answer) for answer in answers.values()}
    if len(types) > 1 or not types <= {str, dict, list}:
        raise InvalidRow(
            "answers have different types", " and ".join(type(answer).__name__ for answer in answers.values())
        )
    prompt_fields = [name for name in _PROMPTS if row.get(name) is not None]
    if types == {str} and not prompt_fields:
        sides = [_parse_transcript(answer, name, row) for name, answer in answers.items()]
    else:
        prompt = _parse_prompt(row[prompt_fields[0]], prompt_fields[0], row) if prompt_fields else []
        sides = [_parse_dialogue(prompt, answer, name, row) for name, answer in answers.items()]
    return make_pair(*sides)


def _parse_prompt(value: Any, name: str, row: Row) -> list[Message]:
    items = value if isinstance(value, list) else [{"role": "user", "content": value}]
    return parse_messages(items, name, row)


def _parse_dialogue(prompt: list[Message], answer: Any, name: str, row: Row) -> Conversation:
    """The prompt followed by the answer."""
    if isinstance(answer, str):
        return check_turns([*prompt, parse_message("assistant", answer, f"'{name}'")])
    turns = parse_messages(answer if isinstance(answer, list) else [answer], name, {})
    is_whole = turns and turns[0].role != "assistant"
    return check_turns(with_preamble(turns, row) if is_whole else [*prompt, *turns])


def _parse_transcript(text: str, name: str, row: Row) -> Conversation:
    """Parses "\\n\\nHuman: ...\\n\\nAssistant: ..."; whitespace around turns is stripped."""
    before, *parts = _HH_TURN.split(text)
    if before.strip() or not parts:
        raise InvalidRow("missing prompt", f"'{name}' does not start with a Human turn, and the row has no 'prompt'")
    turns = [
        parse_message(_HH_ROLES[speaker], content.strip(), f"'{name}', turn {i + 1}")
        for i, (speaker, content) in enumerate(zip(parts[::2], parts[1::2], strict=True))
    ]
    return check_turns(with_preamble(turns, row))


def _from_llmbar(row: Row) -> PreferencePair:
    return _judged(row, get_field(row, "input"), ("output_1", "output_2"), [get_field(row, "label")])


def _from_pandalm(row: Row) -> PreferencePair:
    parts = [get_field(row, "instruction"), row.get("input") or ""]
    question = "\n".join(part for part in parts if part) if all(isinstance(part, str) for part in parts) else None
    votes = [row[name] for name in _VOTES if row.get(name) is not None] or [get_field(row, *_VOTES)]
    return _judged(row, question, ("response1", "response2"), votes)


def _judged(row: Row, question: Any, fields: tuple[str, str], votes: list[Any]) -> PreferencePair:
    """Two answers, and what one or more people preferred: 1, 2 or 0, for neither. Raises InvalidRow without a
    majority."""
    if unknown := [vote for vote in votes if vote not in (0, 1, 2)]:
        raise InvalidRow("preference is not 0, 1 or 2", repr(unknown[0]))
    preferred, count = Counter(votes).most_common(1)[0]
    if preferred == 0 or 2 * count <= len(votes):
        raise InvalidRow("tie", f"preferred: {', '.join(map(str, votes))}")
    prompt = _parse_prompt(question, "the question", row)
    answers = [parse_message("assistant", get_field(row, name), f"'{name}'") for name in fields]
    sides = [check_turns([*prompt, answer]) for answer in answers]
    return make_pair(*sides) if preferred == 1 else make_pair(*reversed(sides))


class PreferenceFormat(NamedTuple):
    """As Format, of a pair or of a conversation with a label."""

    matches: Callable[[Row], bool]
    parse: Callable[[Row], PreferencePair | LabeledConversation]
    fields: tuple[str, ...]


def _has_all(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


PAIR_FORMATS = (
    PreferenceFormat(is_preference_row, parse_pair, PAIR_FIELDS),
    PreferenceFormat(
        _has_all("input", "output_1", "output_2", "label"), _from_llmbar, ("input", "output_1", "output_2", "label")
    ),
    PreferenceFormat(
        _has_all("instruction", "response1", "response2"),
        _from_pandalm,
        ("instruction", "input", "response1", "response2", *_VOTES),
    ),
)

# Single answers with a label (KTO): any conversation.

EXPECTED_LABELED = (
    "a conversation, or a prompt and its completion, with a label or kto_tag of true or false; or preference pairs: "
    f"{EXPECTED_PAIRS}"
)


def _labeled(format: Format) -> PreferenceFormat:
    """The format with a label, which is true or false (1 or 0)."""

    def parse(row: Row) -> LabeledConversation:
        _check_text_only(row)
        label = get_field(row, *_LABELS)
        if label not in (True, False):
            raise InvalidRow("label is not true or false", repr(label))
        conversation = format.parse(row)
        if not conversation[-1].in_loss:
            raise InvalidRow("answer excluded from the loss", "of a conversation with a label")
        return LabeledConversation(conversation, bool(label))

    def matches(row: Row) -> bool:
        return any(name in row for name in _LABELS) and format.matches(row)

    return PreferenceFormat(matches, parse, (*format.fields, *_LABELS))


_QUESTION_AND_ANSWER = FORMATS["prompt_completion"]._replace(matches=is_question_and_answer)
LABELED_FORMATS = (*map(_labeled, (*FORMATS.values(), _QUESTION_AND_ANSWER)), *PAIR_FORMATS)

# Prompts and the answers that rewards compare with (GRPO).

EXPECTED_QUESTIONS = (
    "a prompt (prompt, question, problem, query, input or messages) and its answer (answer, ground_truth, solution, "
    "completion, response or output)"
)
_PROMPT_FIELDS = (*_QUESTIONS, "problem", "messages")
_ANSWER_FIELDS = ("answer", "ground_truth", "solution", *_ANSWERS)
QUESTION_FIELDS = (*_PROMPT_FIELDS, *_ANSWER_FIELDS)
_FINAL = "####"  # in GSM8K's answers, before the final one


def has_prompt(row: Row) -> bool:
    return any(name in row for name in _PROMPT_FIELDS)


def parse_question(row: Row) -> Question:
    """A prompt, which is a text or a list of messages, and its answer, which of a text with #### is what follows the
    last of them. Without a field for the answer, it is the assistant's message at the end of the prompt."""
    _check_text_only(row)
    get_field(row, *_PROMPT_FIELDS)
    name = next(name for name in _PROMPT_FIELDS if row.get(name) is not None)
    messages = _parse_prompt(join_parts(row[name]), name, row)
    answer = next((row[name] for name in _ANSWER_FIELDS if row.get(name) is not None), None)
    if messages and messages[-1].role == "assistant":
        last = messages.pop()
        answer = last.content if answer is None else answer
    prompt = check_turns([*messages, Message("assistant", "")])[:-1]
    if isinstance(answer, str):
        check_encodable(answer, "the answer")
        answer = answer.rpartition(_FINAL)[2].strip()
    return Question(prompt, answer)
