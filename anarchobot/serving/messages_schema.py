"""The request of /v1/messages, in Anthropic's form."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from anarchobot.serving.chat_schema import MAX_TOOLS, FunctionName, function_tool, tool_result
from anarchobot.serving.errors import ApiError
from anarchobot.serving.schema import ConversationRequest, Items, StopString, StrictModel, ToolUse
from anarchobot.tokenizers.conversation import InvalidRow, Message


def _blocks(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class _Block(StrictModel):
    """Clients send extra fields (`cache_control`, `citations`, ...), which have no effect."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextBlock(_Block):
    type: Literal["text"]
    text: str


Texts = Annotated[Items[TextBlock], BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])]


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: FunctionName
    input: dict[str, Any]


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = Field([])
    is_error: bool = False


class ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class SentMessage(StrictModel):
    role: Literal["user", "assistant"]
    content: Annotated[
        Items[Block], Field(min_length=1), BeforeValidator(_blocks, json_schema_input_type=str | list[Block])
    ]


class MessagesTool(_Block):
    type: Literal["custom"] = "custom"
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]


class MessagesToolChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class CountRequest(ConversationRequest):
    """The request of /v1/messages/count_tokens."""

    UNSUPPORTED: ClassVar = {
        "thinking": ({"type": "disabled"},), "mcp_servers": ([],), "container": (), "context_management": ({},),
        "output_config": ({},), "output_format": (), "speed": ("standard",),
    }  # fmt: skip
    IGNORED: ClassVar = frozenset({"metadata", "service_tier", "cache_control", "inference_geo"})

    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    messages: Annotated[Items[SentMessage], Field(min_length=1)]
    system: Texts = Field([])
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS)] = Field([])
    tool_choice: MessagesToolChoice = MessagesToolChoice(type="auto")

    def check(self) -> None:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "tools: two tools have the same name", "tools")
        if self.tool_choice.type == "tool" and self.tool_choice.name not in names:
            raise ApiError(400, "tool_choice: tools has no tool of this name", "tool_choice")
        if self.tool_choice.type == "any" and not names:
            raise ApiError(400, "tool_choice: expected tools with any", "tool_choice")
        if self.messages[-1].role == "assistant":
            message = "messages: the last one is the assistant's; continuing an answer is not supported"
            raise ApiError(400, message, "messages")

    def tool_use(self) -> ToolUse | None:
        choice = self.tool_choice
        if not self.tools or choice.type == "none":
            return None
        tools = [function_tool(tool.name, tool.description, tool.input_schema) for tool in self.tools]
        required: tuple[str, ...] = ()
        if choice.type == "any":
            required = tuple(tool.name for tool in self.tools)
        elif choice.type == "tool" and choice.name is not None:
            required = (choice.name,)
        return ToolUse(tools, required, not choice.disable_parallel_tool_use)

    def conversation(self) -> list[Message]:
        """Consecutive texts of one role become one message, as in Anthropic's API."""
        system = "\n".join(block.text for block in self.system)
        messages = [Message("system", system)] if system else []
        names: dict[str, str] = {}
        for i, sent in enumerate(self.messages):
            for message in _messages(sent, f"turn {i + 1}", names):
                last = messages[-1] if messages else None
                if last is not None and last.role == message.role and not (last.fields or message.fields):
                    reasoning = "\n".join(filter(None, (last.reasoning, message.reasoning)))
                    messages[-1] = last._replace(content=f"{last.content}\n{message.content}", reasoning=reasoning)
                else:
                    messages.append(message)
        return messages


class MessagesRequest(CountRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: Annotated[list[StopString], Field(max_length=16)] = Field([])

    def seed_and_stops(self) -> tuple[int | None, list[str]]:
        return None, self.stop_sequences


def _messages(sent: SentMessage, place: str, names: dict[str, str]) -> list[Message]:
    """Results of tools become messages of their own, before the text. `names`: of the called tools, by id."""
    text = "\n".join(block.text for block in sent.content if isinstance(block, TextBlock))
    reasoning = "\n".join(block.thinking for block in sent.content if isinstance(block, ThinkingBlock))
    uses = [block for block in sent.content if isinstance(block, ToolUseBlock)]
    results = [block for block in sent.content if isinstance(block, ToolResultBlock)]
    if (sent.role == "user" and (uses or reasoning)) or (sent.role == "assistant" and results):
        raise InvalidRow(
            "content block in the wrong role",
            f"{place}: tool_use and thinking are the assistant's, tool_result the user's",
        )
    if uses:
        calls = [
            {"type": "function", "id": use.id, "function": {"name": use.name, "arguments": use.input}} for use in uses
        ]
        names |= {use.id: use.name for use in uses}
        return [Message("assistant", text, reasoning, {"tool_calls": calls})]
    messages = [tool_result(block.tool_use_id, _result_text(block), names, place) for block in results]
    return [*messages, Message(sent.role, text, reasoning)] if text or not results else messages


def _result_text(block: ToolResultBlock) -> str:
    text = "\n".join(part.text for part in block.content)
    return f"Error: {text}" if block.is_error else text
