"""Modelfiles: the template gives the text of the chat template, the parameters those of `generate`."""

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from jinja2 import Environment

from anarchobot.config.schema import Config
from anarchobot.exchange.chat_format import load_chat_format
from anarchobot.exchange.exporting import export
from anarchobot.exchange.importing import import_model
from anarchobot.exchange.ollama import _go_template, find_turn_format, modelfile
from anarchobot.tokenizers.chat_template import CHATML, ChatTemplate
from anarchobot.tokenizers.conversation import Conversation
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.exchange.random_run import make_run
from tests.exchange.test_chat_format import chat_run, hf_folder
from tests.tokenizers.templates import NAMES, NO_SYSTEM, TEMPLATES, dialogue
from tests.tokenizers.tool_templates import TOOL_TEMPLATES

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
DIALOGUES = [
    dialogue("How are you?", "Fine, thanks.", "And now?"),
    dialogue("Grüße", 'x = "y" {{ .Content }}', "1 < 2", "No.", "Why?"),
    dialogue("Hi"),
    dialogue("Hi", "Ho", "He", system="Be kind."),
]


def as_ollama(template: str, conversation: Conversation) -> str:
    """Runs a template of Go, rewritten for Jinja. The rewriting was checked against Go's text/template by hand."""
    ends: list[str] = []

    def rewrite(match: re.Match[str]) -> str:
        action = match[1]
        if action == "range .Messages":
            ends.append("{% endfor %}")
            return "{% for message in messages %}"
        if action == "end":
            return ends.pop()
        if action == "else":
            return "{% else %}"
        if condition := re.fullmatch(r'(else )?if (?:\.System|eq \.Role "(\w+)")', action):
            if not condition[1]:
                ends.append("{% endif %}")
            test = f"message.role == '{condition[2]}'" if condition[2] else "system"
            return f"{{% {'elif' if condition[1] else 'if'} {test} %}}"
        if action == ".Content":
            return "{{ message.content }}"
        assert action.startswith('"'), action
        return match[0]

    jinja = re.sub(r"\{\{ (.+?) \}\}", rewrite, template)
    system = any(message.role == "system" for message in conversation)
    return Environment(keep_trailing_newline=True).from_string(jinja).render(messages=conversation, system=system)  # noqa: S701


def template_in(text: str) -> str:
    (found,) = re.findall(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    return str(found)


def modelfile_of(run: Path) -> tuple[str, list[str]]:
    tokenizer = load_tokenizer(run)
    return modelfile("model.gguf", tokenizer, load_chat_format(tokenizer), Config())


@pytest.mark.parametrize("choice", ["chatml", "plain"])
def test_our_templates(tmp_path: Path, bpe: Path, choice: str) -> None:
    ours = chat_run(tmp_path / "run", bpe, choice)
    text, warnings = modelfile_of(tmp_path / "run")
    assert text.startswith("FROM ./model.gguf\n") and warnings == []
    for conversation in DIALOGUES:
        assert as_ollama(template_in(text), conversation) == ours.template.render(conversation, True)
    stops = re.findall(r"^PARAMETER stop (.*)$", text, re.MULTILINE)
    end = {"chatml": ['"<|im_end|>"']}.get(choice, [])
    assert stops == [f'"{ours.template.tokens["eos_token"]}"', *end]


def test_chatml_by_hand(tmp_path: Path, bpe: Path) -> None:
    chat_run(tmp_path / "run", bpe, "chatml")
    assert template_in(modelfile_of(tmp_path / "run")[0]) == (
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["qwen3", "llama3", "mistral", "gemma"])
def test_public_templates(tmp_path: Path, name: str) -> None:
    """The first token is left out where the GGUF file says that llama.cpp adds it."""
    folder = hf_folder(tmp_path / "public", "bytelevel", {**NAMES, "chat_template": TEMPLATES[name]})
    import_model(folder, tmp_path / "run")
    text, warnings = modelfile_of(tmp_path / "run")
    export(tmp_path / "run", "gguf", tmp_path / "gguf")
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    adds_bos: Any = reader.get_field("tokenizer.ggml.add_bos_token")
    tokenizer = load_tokenizer(tmp_path / "run")
    chat = load_chat_format(tokenizer)
    assert chat is not None
    for conversation in DIALOGUES[: 3 if name in NO_SYSTEM else 4]:
        expected = chat.template.render(conversation, True)
        bos = chat.special_tokens["bos_token"] if adds_bos.contents() else ""
        assert expected.startswith(bos)
        assert as_ollama(template_in(text), conversation) == expected.removeprefix(bos)
    problems = {"system message": name in NO_SYSTEM, "strip the spaces": name in ("llama3", "gemma")}
    for problem, expected_here in (problems | {"remove the reasoning": name == "qwen3"}).items():
        assert any(problem in warning for warning in warnings) == expected_here, warnings
    # Version 0.30 runs Qwen3's template itself, because it has reasoning.
    assert any("before 0.30" in warning for warning in warnings) == (name == "qwen3")


@pytest.mark.parametrize("name", ["qwen2", "qwen3.5", "phi3", "llama2", "cohere"])
def test_more_public_templates(name: str) -> None:
    template, bos = ChatTemplate(TEMPLATES[name], TOKENS, name), "<s>" if name == "llama2" else ""
    turns = find_turn_format(template, bos)
    assert turns is not None
    for conversation in DIALOGUES:
        assert as_ollama(_go_template(turns), conversation) == template.render(conversation, True).removeprefix(bos)


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('%Y') }}" + CHATML,
        "{% for message in messages | reverse %}{{ message.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for message in messages %}{{ loop.index ~ message.content }}{% endfor %}",
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
    ids=["date", "order", "last only", "numbered", "upper case", "rejects all"],
)
def test_other_templates_have_no_turn_format(source: str) -> None:
    assert find_turn_format(ChatTemplate(source, TOKENS, "x")) is None


@pytest.mark.parametrize("text", ["{{ ### ", '""" ### ', "### {", '### "'], ids=["braces", "quotes", "brace", "quote"])
def test_texts_that_go_would_read_as_actions_are_quoted(text: str) -> None:
    """Go: `{{` starts an action, also if the second brace is an action's. Modelfile: three quotes end the template."""
    source = "{% for message in messages %}{{ OPEN ~ message.content ~ '\n' }}{% endfor %}{{ OPEN }}"
    template = ChatTemplate(source.replace("OPEN", f"'{text}'"), TOKENS, "quoted")
    turns = find_turn_format(template)
    assert turns is not None
    written = f'TEMPLATE """{_go_template(turns)}"""'
    assert "{{{" not in written
    assert as_ollama(template_in(written), DIALOGUES[0]) == template.render(DIALOGUES[0], True)


def test_tools_are_left_to_ollama(tmp_path: Path, bpe: Path) -> None:
    """Ollama 0.30 runs the template of the GGUF file because the Modelfile's has no tools."""
    run = make_run(tmp_path / "run", bpe, n_layers=1)
    (run / "chat_template.jinja").write_text(TOOL_TEMPLATES["llama tools"])
    text, warnings = modelfile_of(run)
    assert "TEMPLATE" in text and "Tool" not in text
    assert [warning.partition(" does not")[0] for warning in warnings] == ["Ollama before 0.30"]


def test_parameters_are_those_of_generate(tmp_path: Path, bpe: Path) -> None:
    tokenizer = load_tokenizer(make_run(tmp_path / "run", bpe, n_layers=1))
    settings = {"method": "combined", "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02}
    config = Config.model_validate({"model": {"max_seq_len": 512}, "generation": {**settings, "presence_penalty": 0.5}})

    def parameters(config: Config) -> dict[str, float]:
        text, _ = modelfile("m.gguf", tokenizer, None, config)
        assert text.splitlines()[:2] == ["FROM ./m.gguf", 'TEMPLATE """{{ .Prompt }}"""']
        return {name: float(value) for name, value in re.findall(r"^PARAMETER (\w+) (.*)$", text, re.MULTILINE)}

    assert parameters(config) == {
        "num_ctx": 512, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "repeat_last_n": 20,
        "repeat_penalty": 1, "presence_penalty": 0.5, "frequency_penalty": 0,
    }  # fmt: skip
    found = parameters(Config.model_validate({"model": {"max_seq_len": 131072}, "generation": {"method": "greedy"}}))
    assert (found["num_ctx"], found["temperature"], found["top_k"], found["top_p"]) == (8192, 0, 0, 1)


def test_folders_of_ollama_and_lm_studio(tmp_path: Path, bpe: Path) -> None:
    chat_run(tmp_path / "notes", bpe, "chatml", d_model=64)
    done = export(tmp_path / "notes", "ollama", tmp_path / "ollama", gguf_type="q8_0")
    assert set(done["files"]) == {"Modelfile", "README.md", "model.gguf"} and done["format"] == "ollama"
    assert "FROM ./model.gguf\n" in (tmp_path / "ollama" / "Modelfile").read_text()
    assert "ollama create notes -f Modelfile" in (tmp_path / "ollama" / "README.md").read_text()
    done = export(tmp_path / "notes", "lmstudio", tmp_path / "models" / "me" / "tiny notes", gguf_type="q8_0")
    assert set(done["files"]) == {"README.md", "tiny notes-q8_0.gguf"}
    reader = gguf.GGUFReader(tmp_path / "models" / "me" / "tiny notes" / "tiny notes-q8_0.gguf")
    template = reader.get_field("tokenizer.chat_template")
    assert template is not None and template.contents() == CHATML
