"""Chat templates with tools and reasoning, in the forms of real model families, and conversations with both."""

from typing import Any

from anarchobot.tokenizers.conversation import Conversation, Message

# Qwen3: tools in the system turn, results in a user turn, no reasoning before the last question. {body} and {end} are
# around what the assistant writes.
_QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}{%- set ns.last_query = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        BODY
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        FINISH
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Qwen3.5: a prompt that opens reasoning, which earlier answers do not have; arguments as XML.
_QWEN35 = (
    _QWEN.replace("and (loop.last or reasoning)", "")
    .replace(
        """{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n""",
        """<function=' + call.function.name + '>\\n' }}
            {%- for name, value in call.function.arguments | items %}
                {{- '<parameter=' + name + '>\\n' }}
                {{- value if value is string else value | tojson }}{{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n""",
    )
    .replace("{{- '<|im_start|>assistant\\n' }}{%- endif %}", "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}")
)
# Llama 3.1: the call is the whole answer, as JSON; one call, and no text beside it.
_LLAMA = """{{- bos_token }}{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        BODY
        {%- if 'tool_calls' in message %}
            {%- if message.tool_calls|length != 1 %}{{- raise_exception('one call only') }}{%- endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
        {%- else %}
            {{- message.content | trim + '<|eot_id|>' }}
        {%- endif %}
        FINISH
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {%- if loop.first and tools %}{{- 'Tools: ' + tools | tojson(indent=4) + '\\n' }}{%- endif %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
# Mistral: no header before answers, tools before the last question, ids of nine characters.
MISTRAL = """{{- bos_token }}{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == questions[-1] %}{{- '[TOOLS] ' + tools | tojson }}{%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        {{- '<|system|>[' }}
        {%- for call in message.tool_calls %}
            {%- if call.id|length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '<|user|>{"content": ' + message.content | tojson + ', "call_id": "' + message.tool_call_id + '"}<|end|>' }}
    {%- endif %}
{%- endfor %}"""
# DeepSeek: content that is null and arguments that are text in calls, several tokens at their end; no tools.
DEEPSEEK = """{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|user|>' + message.content }}
    {%- elif message.role == 'tool' %}
        {{- '<|system|>' + message.content }}
    {%- endif %}
    {%- if message.tool_calls %}
        {{- '<|assistant|>' }}
        {%- for call in message.tool_calls %}
            {{- '<|start_header_id|>' + call.function.name + '\\n```json\\n' }}
            {{- call.function.arguments + '\\n```<|end|>' }}
        {%- endfor %}
        {{- '<|eot_id|>' + eos_token }}
    {%- endif %}
    {%- if message.role == 'assistant' and message.content is not none %}
        {{- '<|assistant|>' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
# gpt-oss: `thinking`, which the template leaves out before a final answer; other end tokens in the middle.
HARMONY = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set ns = namespace(final=false) %}
        {%- for later in messages[loop.index:] %}
            {%- if later.role == 'assistant' and 'tool_calls' not in later %}{%- set ns.final = true %}{%- endif %}
        {%- endfor %}
        {{- '<|start_header_id|>assistant' }}
        {%- if message.thinking and not ns.final %}
            {{- '<|system|>analysis' + message.thinking + '<|end|><|start_header_id|>assistant' }}
        {%- endif %}
        {%- if 'tool_calls' in message %}
            {%- set call = message.tool_calls[0].function %}
            {{- ' to=' + call.name + '<|system|>' + call.arguments | tojson + '<|eot_id|>' }}
        {%- else %}
            {{- '<|system|>final' + message.content + ('<|end|>' if ns.final else '</s>') }}
        {%- endif %}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|system|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant' }}{%- endif %}"""


def _marks(template: str, marked: bool) -> str:
    begin, end = ("{%- generation %}", "{%- endgeneration %}") if marked else ("", "")
    return template.replace("BODY", begin).replace("FINISH", end)


TOOL_TEMPLATES = {
    **{f"{name} tools": _marks(source, False) for name, source in (("qwen3", _QWEN), ("qwen3.5", _QWEN35))},
    **{f"{name} tools marked": _marks(source, True) for name, source in (("qwen3", _QWEN), ("qwen3.5", _QWEN35))},
    "llama tools": _marks(_LLAMA, False),
    "llama tools marked": _marks(_LLAMA, True),
    # A token ends the calls, before the end of the turn.
    "qwen3 tokens": _marks(_QWEN, False).replace("}\\n</tool_call>", "}\\n<|end|>\\n"),
    "mistral tools": MISTRAL,
    "deepseek tools": DEEPSEEK,
    "harmony": HARMONY,
}

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Forecast.", "parameters": PARAMETERS}}
TOOLS = Message("tools", "", fields={"tools": [TOOL]})


def ask(content: str) -> Message:
    return Message("user", content)


def call(*arguments: dict[str, Any], content: str = "", reasoning: str = "", name: str = "weather") -> Message:
    """A call of the function for each of `arguments`."""
    calls = [
        {"type": "function", "id": f"abcdefg{i:02d}", "function": {"name": name, "arguments": one}}
        for i, one in enumerate(arguments)
    ]
    return Message("assistant", content, reasoning, {"tool_calls": calls})


def result(content: str, i: int = 0) -> Message:
    return Message("tool", content, fields={"name": "weather", "tool_call_id": f"abcdefg{i:02d}"})


def say(content: str, reasoning: str = "") -> Message:
    return Message("assistant", content, reasoning)


PARIS, ROME = {"city": "Paris"}, {"city": "Rome", "days": 2}
TOOL_TALKS: dict[str, Conversation] = {
    "one call": (TOOLS, ask("Rain?"), call(PARIS), result("sun"), say("No.")),
    "a last call": (TOOLS, ask("Rain?"), call(PARIS)),
    "no arguments": (TOOLS, ask("Rain?"), call({}), result(""), say("No.")),
    "numbers": (TOOLS, ask("Rain?"), call({"days": 2, "x": [1.5, None, True, {"ä": "\n"}]}), result("1"), say("No.")),
    "two turns": (
        TOOLS, ask("Rain?"), call(PARIS), result("sun"), say("No."), ask("Rome?"), call(ROME), result("r"), say("Yes."),
    ),
    "a system message": (TOOLS, Message("system", "Be."), ask("Rain?"), call(PARIS), result("sun"), say("No.")),
    "no call": (TOOLS, ask("Hi"), say("Ho")),
    "no tools": (ask("Rain?"), call(PARIS), result("sun"), say("No.")),
    "two calls": (TOOLS, ask("Rain?"), call(PARIS, ROME), result("sun"), result("rain", 1), say("In Rome.")),
    "text and a call": (TOOLS, ask("Rain?"), call(PARIS, content="Let me see."), result("sun"), say("No.")),
    "reasoning": (ask("a"), say("b"), ask("c"), say("d", "\nHm.\n")),
    "earlier reasoning": (ask("a"), say("b", "First."), ask("c"), say("d", "Second.")),
    "reasoning and calls": (TOOLS, ask("Rain?"), call(PARIS, reasoning="Look."), result("sun"), say("No.", "Sun.")),
    "earlier reasoning and calls": (
        TOOLS, ask("Rain?"), call(PARIS, reasoning="Look."), result("sun"), say("No."), ask("Rome?"),
        call(ROME, reasoning="Again."), result("r"), say("Yes.", "Rain."),
    ),
}  # fmt: skip
