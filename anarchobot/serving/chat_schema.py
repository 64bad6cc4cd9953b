"""The request of /v1/chat/completions: messages, tools and response formats in OpenAI's form."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field

from anarchobot.data.conversations.tool_calls import parse_calls
from anarchobot.serving.errors import ApiError
from anarchobot.serving.schema import MAX_TOP_LOGPROBS, ConversationRequest, Items, OpenAIRequest, StrictModel, ToolUse
from anarchobot.tokenizers.conversation import InvalidRow, Message, check_json

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES = {role: "system" if role == "developer" else role for role in get_args(Role)}
MAX_TOOLS = 512


def _text(value: object) -> object:
    """Message content: a string, or a list of text parts."""
    if isinstance(value, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value):
            raise ValueError('expected parts {"type": "text", "text": ...}; only text is supported')
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError("expected a string")
    return value


def _role(value: object) -> object:
    if not isinstance(value, str) or value not in ROLES:
        raise ValueError(f"expected one of {', '.join(ROLES)}")
    return ROLES[value]


def _tool_choice(value: object) -> object:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    if value not in ("none", "auto", "required") and not named:
        raise ValueError('expected none, auto, required, or {"type": "function", "function": {"name": ...}}')
    return value


FunctionName = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    name: FunctionName
    arguments: str


class SentCall(StrictModel):
    """A call of an earlier answer, which a client sends back."""

    model_config = ConfigDict(strict=True, extra="ignore")
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(StrictModel):
    """Clients send back assistant messages with extra fields (`refusal`, `annotations`, ...), which are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Annotated[str, BeforeValidator(_role, json_schema_input_type=Role)]
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | list[TextPart])]
    tool_calls: Items[SentCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


def _with_content(value: object) -> object:
    """A message with calls may be without content."""
    if isinstance(value, dict) and value.get("content") is None and value.get("tool_calls"):
        return value | {"content": ""}
    return value


class Function(StrictModel):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    name: str


class NamedToolChoice(StrictModel):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(StrictModel):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(OpenAIRequest, ConversationRequest):
    messages: Annotated[Items[Annotated[ChatMessage, BeforeValidator(_with_content)]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field([])
    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedToolChoice, BeforeValidator(_tool_choice)] = (
        "auto"
    )
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat(type="text")

    def check(self) -> None:
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens: expected only one of them", "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: expected logprobs: true with it", "top_logprobs")
        if (self.response_format.type == "json_schema") != (self.response_format.json_schema is not None):
            raise ApiError(400, "response_format: expected json_schema with type json_schema only", "response_format")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "tools: two functions have the same name", "tools")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ApiError(400, "tool_choice: tools has no function of this name", "tool_choice")
        if self.tool_choice == "required" and not names:
            raise ApiError(400, "tool_choice: expected tools with required", "tool_choice")
        if self.response_format.type != "text" and names and self.tool_choice != "none":
            message = 'response_format: not supported together with tools; use tool_choice "none" for the last answer'
            raise ApiError(400, message, "response_format")

    def requested_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def scores(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def tool_use(self) -> ToolUse | None:
        if not self.tools or self.tool_choice == "none":
            return None
        functions = [tool.function for tool in self.tools]
        tools = [function_tool(f.name, f.description, f.parameters) for f in functions]
        required: tuple[str, ...] = ()
        if self.tool_choice == "required":
            required = tuple(function.name for function in functions)
        elif isinstance(self.tool_choice, NamedToolChoice):
            required = (self.tool_choice.function.name,)
        return ToolUse(tools, required, self.parallel_tool_calls)

    def json_schema(self) -> dict[str, Any] | None:
        chosen = self.response_format
        if chosen.type == "text":
            return None
        return {"type": "object"} if chosen.json_schema is None else chosen.json_schema.schema_

    def conversation(self) -> list[Message]:
        names: dict[str, str] = {}  # of functions, by the id of their calls
        return [self._message(message, f"turn {i + 1}", names) for i, message in enumerate(self.messages)]

    @staticmethod
    def _message(message: ChatMessage, place: str, names: dict[str, str]) -> Message:
        if message.role == "tool":
            return tool_result(message.tool_call_id or "", message.content, names, place)
        if message.role != "assistant":
            return Message(message.role, message.content)
        reasoning = message.reasoning_content or ""
        if not message.tool_calls:
            return Message("assistant", message.content, reasoning)
        calls = parse_calls([call.model_dump() for call in message.tool_calls], place)
        names |= {call["id"]: call["function"]["name"] for call in calls}
        return Message("assistant", message.content, reasoning, {"tool_calls": calls})


def function_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A function in OpenAI's form, as templates expect it. Raises InvalidRow if `parameters` are nested too deeply."""
    described = {} if description is None else {"description": description}
    schema = {"type": "object", "properties": {}} if parameters is None else dict(parameters)
    check_json(schema, f"the parameters of {name!r}")
    return {"type": "function", "function": {"name": name, **described, "parameters": schema}}


def tool_result(call: str, content: str, names: Mapping[str, str], place: str) -> Message:
    """The result of the call with this id. `names`: of the called functions, by id. Raises InvalidRow if there was no
    such call."""
    if call not in names:
        raise InvalidRow("result without a call", f"{place}: no earlier message has a call with its id")
    return Message("tool", content, fields={"name": names[call], "tool_call_id": call})
