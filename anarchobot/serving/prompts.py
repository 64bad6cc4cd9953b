"""Requests to tokenized prompts, and what their answers may be."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from anarchobot.config.errors import UserError
from anarchobot.inference.call_syntax import call_syntax
from anarchobot.inference.chat import chat_encoder, chat_warnings
from anarchobot.inference.generation import prompt_ids
from anarchobot.inference.grammar import Grammar, calls_grammar, schema_grammar
from anarchobot.inference.harmony import END_OF_CALL, FINAL, MARKS, has_channels
from anarchobot.inference.model import Model
from anarchobot.serving.answers import PLAIN, AnswerForm
from anarchobot.serving.errors import ApiError
from anarchobot.serving.passages import Passages, PassageSearch
from anarchobot.serving.schema import CompletionRequest, ConversationRequest, ToolUse
from anarchobot.serving.worker import Prompt
from anarchobot.tokenizers.conversation import InvalidRow, Message, check_json
from anarchobot.tokenizers.rendered_parts import NO_TOOLS, texts
from anarchobot.tokenizers.trailing_space import split_trailing_space

NO_CALLS = (
    "tools: not supported by this model: its chat template has no tools, or calls of an unknown form; use a model with "
    "the calls of Hermes, Qwen, Llama 3, Mistral, DeepSeek or gpt-oss"
)
T = TypeVar("T")


class EncodedPrompt(NamedTuple):
    """A prompt as text, without the template, and as tokens, how its answers are written, and the passages of a
    knowledge base in it."""

    text: str
    prompt: Prompt
    form: AnswerForm = PLAIN
    passages: Passages | None = None


class PromptEncoder:
    """Encodes the prompts of requests for one model, with passages from `knowledge_base` for the questions of chats."""

    def __init__(self, model: Model, knowledge_base: PassageSearch | None = None) -> None:
        """Raises UserError if the chat template cannot be used."""
        self._model, self._encoder, self._max_seq_len = model, chat_encoder(model), model.config.max_seq_len
        self._knowledge_base = knowledge_base
        controls, stop_ids = model.tokenizer.control_tokens, self._encoder.stop_ids()
        self._has_channels = has_channels(self._encoder.template)
        if self._has_channels and END_OF_CALL in controls:
            stop_ids |= {controls[END_OF_CALL]}
        self._text_stop_ids, self._chat_stop_ids = model.tokenizer.stop_ids, stop_ids
        self._call_syntax = call_syntax(self._encoder.template, [name for name, i in controls.items() if i in stop_ids])

    def warnings(self) -> list[str]:
        return chat_warnings(self._encoder)

    def encode(self, parsed: CompletionRequest | ConversationRequest, new_tokens: int = 0) -> EncodedPrompt:
        """`new_tokens`: the most that an answer may have; passages leave room for so many, up to half of max_seq_len.

        Raises ApiError (400) if the template or the tokenizer rejects a conversation, if the answer cannot be
        restricted as requested, or if the prompt fills max_seq_len; without tokenizing it if it has too many characters
        for any text of so many tokens.
        """
        if isinstance(parsed, ConversationRequest):
            field, encoded = "messages", self._encode_conversation(parsed, new_tokens)
        else:
            field, encoded = "prompt", self._encode_text(parsed)
        if (count := len(encoded.prompt.ids)) >= self._max_seq_len:
            raise self._too_long(f"{count} tokens", field)
        return encoded

    def _encode_text(self, parsed: CompletionRequest) -> EncodedPrompt:
        self._check_characters(parsed.prompt, "prompt")
        text, after_space = split_trailing_space(parsed.prompt, self._model.tokenizer)
        ids = prompt_ids(self._model, text)
        return EncodedPrompt(parsed.prompt, Prompt(ids, self._text_stop_ids, after_space, top_logprobs=parsed.scores()))

    def _encode_conversation(self, parsed: ConversationRequest, new_tokens: int) -> EncodedPrompt:
        tools = _read(parsed.tool_use, "tools")
        conversation = tuple(_read(parsed.conversation, "messages"))
        if tools is not None:
            if self._call_syntax is None:
                raise ApiError(400, NO_CALLS, "tools", "unsupported_parameter")
            conversation = (Message("tools", "", fields={"tools": tools.tools}), *conversation)
        text = "\n".join(part for message in conversation for part in (message.content, *texts(message.fields)) if part)
        self._check_characters(text, "messages")
        try:
            if any(message.fields for message in conversation) and NO_TOOLS in self._encoder.unused(conversation):
                raise ApiError(400, NO_CALLS, "tools", "unsupported_parameter")
        except InvalidRow as error:
            raise ApiError(400, f"messages: {error.reason}", "messages") from error
        ids, passages = self._with_passages(conversation, new_tokens)
        form = AnswerForm(has_channels=self._has_channels)
        if tools is not None:
            form = AnswerForm(self._call_syntax, tools.functions, tools.parallel, self._has_channels)
        grammar, shown = self._grammar(parsed, tools), self._shown(form)
        prompt = Prompt(ids, self._chat_stop_ids, False, grammar, parsed.scores(), shown)
        return EncodedPrompt(text, prompt, form, passages)

    def _shown(self, form: AnswerForm) -> dict[int, str]:
        """The control tokens that parsers of answers need."""
        marks = "".join(MARKS) if form.has_channels else "" if form.syntax is None else form.syntax.marks
        return {i: name for name, i in self._model.tokenizer.control_tokens.items() if name and name in marks}

    def _with_passages(self, conversation: Sequence[Message], new_tokens: int) -> tuple[list[int], Passages | None]:
        def encode(messages: Sequence[Message]) -> list[int]:
            return _read(lambda: self._encoder.encode_prompt(tuple(messages)).tolist(), "messages")

        if self._knowledge_base is None:
            return encode(conversation), None
        room = min(new_tokens, self._max_seq_len // 2)  # for the answer, as in `anarchobot chat`
        return self._knowledge_base.encode(conversation, encode, self._max_seq_len - room)

    def _grammar(self, parsed: ConversationRequest, tools: ToolUse | None) -> Grammar | None:
        """What an answer must be. Raises ApiError (400) if it cannot be enforced."""
        schema, tokenizer = parsed.json_schema(), self._model.tokenizer
        field = "tool_choice" if schema is None else "response_format"
        try:
            if schema is not None:
                check_json(schema, "the schema")
                prefix = FINAL if self._has_channels else ""
                return Grammar(schema_grammar(schema, prefix, tokenizer.control_tokens), tokenizer)
            if tools is None or not tools.required or self._call_syntax is None:
                return None
            functions = [tool["function"] for tool in tools.tools if tool["function"]["name"] in tools.required]
            source = calls_grammar(self._call_syntax, functions, tools.parallel, tokenizer.control_tokens)
            return Grammar(source, tokenizer)
        except UserError as error:
            raise ApiError(400, f"{field}: {error}", field, "unsupported_parameter") from error
        except ValueError as error:
            raise ApiError(400, f"{field}: {error}", field) from error

    def _check_characters(self, text: str, field: str) -> None:
        if len(text) > self._max_seq_len * self._model.tokenizer.longest_token:
            raise self._too_long(f"{len(text)} characters", field)

    def _too_long(self, size: str, field: str) -> ApiError:
        message = f"{field}: {size} do not fit (the model's max_seq_len is {self._max_seq_len}); shorten it"
        return ApiError(400, message, field, "context_length_exceeded")


def _read(convert: Callable[[], T], field: str) -> T:
    """`convert()`. Raises ApiError (400) that names `field`."""
    try:
        return convert()
    except InvalidRow as error:
        raise ApiError(400, f"{field}: {error}", field) from error
