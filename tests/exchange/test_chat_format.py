"""Chat templates in exports and imports: transformers and mlx-lm encode prompts to our ids and stop where we do."""

import json
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import pytest
import transformers
from mlx_lm import load as mlx_load
from mlx_lm import stream_generate

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.exchange.exporting import export
from anarchobot.exchange.importing import import_model
from anarchobot.inference.generation import stream_token_ids
from anarchobot.inference.model import load_model
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import CHATML, PLAIN, load_template
from anarchobot.tokenizers.conversation import Conversation
from anarchobot.tokenizers.tokenizer import load_tokenizer
from tests.exchange.random_run import make_run, random_parameters
from tests.tokenizers.templates import KINDS, NAMES, NO_SYSTEM, TEMPLATES, dialogue, to_dicts

CONVERSATIONS = [
    dialogue("How are you?", "Fine, thanks.", "And   now?\n"),
    dialogue("  Grüße aus Köln:\n\n吾輩は猫である", "x = 'y'\t\t", "1 < 2 </s"),
    dialogue("A\u2581b", system="Be kind.  "),
]


def encoder(folder: Path, choice: str = "auto") -> ChatEncoder:
    tokenizer = load_tokenizer(folder)
    return ChatEncoder(tokenizer, load_template(tokenizer, choice))


def chat_run(folder: Path, tokenizer: Path, choice: str, params: Any = None, **shape: Any) -> ChatEncoder:
    """A run with a chat template."""
    chat_encoder = encoder(make_run(folder, tokenizer, params, **{"n_layers": 1, **shape}), choice)
    chat_encoder.template.save(folder)
    return chat_encoder


def prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    ids = tokenizer.apply_chat_template(to_dicts(conversation), add_generation_prompt=True, return_dict=False)
    assert isinstance(ids, list)
    return ids


@pytest.mark.parametrize("choice", ["chatml", "plain"])
def test_autotokenizer_encodes_prompts_to_our_ids(tmp_path: Path, tokenizer_path: Path, choice: str) -> None:
    ours = chat_run(tmp_path / "run", tokenizer_path, choice)
    assert export(tmp_path / "run", "hf", tmp_path / "hf")["files"]["chat_template.jinja"] > 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.chat_template == (CHATML if choice == "chatml" else PLAIN)
    assert len(theirs) == ours.tokenizer.vocab_size
    for conversation in CONVERSATIONS:
        assert prompt_ids(theirs, conversation) == ours.encode_prompt(conversation).tolist(), conversation
    # Plain text still starts as in training.
    eod = ours.tokenizer.eod_id
    assert theirs("word")["input_ids"] == [eod, *ours.tokenizer.encode_batch(["word"])[0].tolist()]
    mlx_tokenizer = mlx_load(str(tmp_path / "hf"))[1]
    assert mlx_tokenizer.has_chat_template
    assert prompt_ids(mlx_tokenizer, CONVERSATIONS[0]) == ours.encode_prompt(CONVERSATIONS[0]).tolist()


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        *(("bytelevel", name) for name in ("qwen2", "qwen3", "llama3", "gemma", "phi3", "llama3 marked")),
        *((kind, name) for kind in ("first", "always") for name in ("llama3", "mistral")),
    ],
)
def test_public_templates_survive_import_and_export(tmp_path: Path, kind: str, template: str) -> None:
    source = TEMPLATES[template]
    folder = hf_folder(tmp_path / "public", kind, {**NAMES, "chat_template": source, "pad_token": "<none>"})
    assert import_model(folder, tmp_path / "run")["warnings"] == []
    ours = encoder(tmp_path / "run")
    assert ours.template.source == source
    export(tmp_path / "run", "hf", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(theirs) == ours.tokenizer.vocab_size  # <none> is not one of its tokens
    for conversation in CONVERSATIONS[: 2 if template in NO_SYSTEM else 3]:
        assert prompt_ids(theirs, conversation) == ours.encode_prompt(conversation).tolist()


def hf_folder(folder: Path, kind: str, config: dict[str, Any], **shape: Any) -> Path:
    """A Hugging Face folder with a tokenizer of this kind and this tokenizer_config.json."""
    model = KINDS[kind]()
    (source := folder.parent / "source").mkdir()
    model.save(str(source / "tokenizer.json"))
    export(make_run(source / "run", source / "tokenizer.json", n_layers=1, **shape), "hf", folder)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_all_three_programs_stop_at_the_end_of_turn(tmp_path: Path, bpe: Path) -> None:
    """Swapping two rows of the output head turns a later token of a greedy answer into the end of turn."""
    pytest.importorskip("torch")
    ours = chat_run(tmp_path / "plain", bpe, "chatml", tie_embeddings=False)
    model, _ = load_model(tmp_path / "plain")
    prompt, end = ours.encode_prompt(CONVERSATIONS[0]).tolist(), ours.end_of_turn_id()
    assert end is not None and end == ours.tokenizer.control_tokens["<|im_end|>"] != ours.tokenizer.eod_id
    greedy = GenerationConfig(method="greedy", max_new_tokens=12)
    greedy_ids = list(stream_token_ids(model.params, model.config, prompt, greedy, set()))
    last = max(i for i, token in enumerate(greedy_ids) if token not in greedy_ids[:i])
    assert last > 1 and end not in greedy_ids
    params = random_parameters(model.config)
    params["lm_head.weight"][[greedy_ids[last], end]] = params["lm_head.weight"][[end, greedy_ids[last]]]
    chat_run(tmp_path / "run", bpe, "chatml", params, tie_embeddings=False)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    ends = [ours.tokenizer.eod_id, end]
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == ends
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.generation_config.eos_token_id == ends
    inputs = tokenizer.apply_chat_template(
        to_dicts(CONVERSATIONS[0]), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out[0].tolist() == [*prompt, *greedy_ids[:last], end]
    mlx_model, mlx_tokenizer = mlx_load(str(tmp_path / "hf"))[:2]
    assert mlx_tokenizer.eos_token_ids == set(ends)
    answers = list(stream_generate(mlx_model, mlx_tokenizer, mx.array(prompt), max_tokens=12))
    assert [answer.token for answer in answers] == [*greedy_ids[:last], end] and answers[-1].finish_reason == "stop"


def gguf_keys(run: Path, output: Path) -> dict[str, Any]:
    export(run, "gguf", output)
    reader = gguf.GGUFReader(output / "model.gguf")
    names = {
        "template": gguf.Keys.Tokenizer.CHAT_TEMPLATE,
        **{key: f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "eot")},
        "add_bos": "tokenizer.ggml.add_bos_token",
    }
    found = {key: reader.get_field(name) for key, name in names.items()}
    return {key: None if value is None else value.contents() for key, value in found.items()}


def test_gguf_chat_template_and_special_tokens(tmp_path: Path, bpe: Path) -> None:
    """With our templates, nothing is prepended, as in training."""
    ours = chat_run(tmp_path / "chatml", bpe, "chatml").tokenizer
    chat_run(tmp_path / "plain", bpe, "plain")
    make_run(tmp_path / "none", bpe, n_layers=1)
    eod, end = ours.eod_id, ours.control_tokens["<|im_end|>"]
    ends = {"bos": eod, "eos": eod, "add_bos": False}
    assert gguf_keys(tmp_path / "chatml", tmp_path / "a") == {**ends, "eot": end, "template": CHATML}
    assert gguf_keys(tmp_path / "plain", tmp_path / "b") == {**ends, "eot": None, "template": PLAIN}
    none = {"bos": eod, "eos": eod, "add_bos": True, "eot": None, "template": None}
    assert gguf_keys(tmp_path / "none", tmp_path / "c") == none


@pytest.mark.parametrize(
    ("template", "named"),
    [  # bos, add_bos, eos and eot, read off the templates
        ("llama3", ("<s>", True, "<|endoftext|>", "<|eot_id|>")),
        ("mistral", ("<s>", True, "</s>", "<|endoftext|>")),
        ("qwen2", ("<|endoftext|>", False, "<|endoftext|>", "<|im_end|>")),
        ("phi3", ("<|endoftext|>", False, "</s>", "<|end|>")),
    ],
)
def test_gguf_of_public_templates(tmp_path: Path, template: str, named: tuple[str, bool, str, str]) -> None:
    folder = hf_folder(tmp_path / "public", "bytelevel", {**NAMES, "chat_template": TEMPLATES[template]})
    import_model(folder, tmp_path / "run")
    controls = load_tokenizer(tmp_path / "run").control_tokens
    found = gguf_keys(tmp_path / "run", tmp_path / "gguf")
    bos, add_bos, eos, eot = named
    expected = {"bos": controls[bos], "add_bos": add_bos, "eos": controls[eos], "eot": controls[eot]}
    assert found == {**expected, "template": TEMPLATES[template]}


def test_unusable_template_is_skipped_with_a_warning(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "public", "bytelevel", {"chat_template": "{% for"})
    (warning,) = import_model(folder, tmp_path / "run")["warnings"]
    assert warning.startswith("skipping the chat template: ") and "invalid chat template" in warning
    assert not (tmp_path / "run" / "chat_template.jinja").exists()
    assert "chat_template.jinja" not in export(tmp_path / "run", "hf", tmp_path / "hf")["files"]
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ nothing.of.it }}")
    with pytest.raises(UserError, match=r"chat_template.jinja: unusable chat template: rejected by the chat template"):
        export(tmp_path / "run", "hf", tmp_path / "no")


def test_no_template_is_added_to_a_tokenizer_without_one(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "public", "bytelevel", NAMES)
    assert import_model(folder, tmp_path / "run")["warnings"] == []
    assert not (tmp_path / "run" / "chat_template.jinja").exists()
