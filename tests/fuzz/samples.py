"""Valid files of every kind that AnarchoBot reads, as small as their formats allow: what `mutation.py` damages."""

import gzip
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.sources.documents import Document, DocumentCounts
from anarchobot.exchange.adapters import FORMATS, write_adapter
from anarchobot.exchange.exporting import export
from anarchobot.knowledge.knowledge_base import KnowledgeBase
from anarchobot.runs import checkpoint
from anarchobot.tokenizers.chat_template import CHATML, PLAIN
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer
from tests.data.sources.document_formats import docx, epub, line, paragraph, pdf, pptx
from tests.exchange.conftest import random_words
from tests.exchange.quantized_folder import quantize_folder
from tests.exchange.random_run import make_run
from tests.exchange.test_adapters import adapter_for
from tests.fuzz.mutation import Files
from tests.model.mlx_lm.families import CONFIGS, write_model

CONFIGURATIONS = Path(__file__).parents[2] / "configs"
TEXT = "The first line.\nGrüße, 吾輩は猫である.\n\nA second paragraph with 12 numbers: 1,234.5\r\n\tend\n"
ROWS: list[dict[str, Any]] = [
    {"text": "A first document.", "score": 0.5}, {"text": "Größe 🙂", "score": 3, "id": None, "meta": {"a": [1, 2]}},
    {"text": "a\nb\n" * 20, "score": 1e3},
]  # fmt: skip
TURNS = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello."}]
TREE = {"text": "Why?", "role": "prompter", "lang": "en", "replies": [
    {"text": "So.", "role": "assistant", "rank": 0, "replies": []}, {"text": "No.", "role": "assistant", "rank": 1},
]}  # fmt: skip
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}, {"messages": TURNS, "tools": "[]"}],
    [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "s"}],
    [{"instruction": "Add", "input": "1 and 2", "output": "3", "history": [["a", "b"]]}],
    [{"prompt": "Hi", "completion": "Hello"}, {"question": "Hi", "answer": "Hello"}, {"text": "plain"}],
    [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TURNS[1]]}],
    [{"messages": [TURNS[0],
                   {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
                   {"role": "tool", "content": "1"}, {**TURNS[1], "thinking": "Hm.", "weight": 1}],
      "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}],
    [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f"}'},
                        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "Hello"}], "tools": "[]"}],
    [{"message_tree_id": "1", "tree_state": "ready_for_export", "prompt": TREE}],
    [{"message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter", "lang": "en"},
     {"message_id": "2", "parent_id": "1", "text": "Hello", "role": "assistant", "rank": 0, "lang": "en"}],
]  # fmt: skip
PAIRS: list[list[dict[str, Any]]] = [
    [{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}],
    [{"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "No"}]}],
    [{"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "No"}], "score": 1}],
    [{"prompt": TREE}],
    [{"input": "Hi", "output_1": "No", "output_2": "Hello", "label": 2},
     {"instruction": "Hi", "input": "", "response1": "Hello", "response2": "No", "annotator1": 1, "annotator2": 0,
      "annotator3": 1}],
]  # fmt: skip
LABELED: list[list[dict[str, Any]]] = [
    [{"prompt": "Hi", "completion": "Hello", "label": True}, {"prompt": "Hi", "completion": "No", "label": False}],
    [{"messages": TURNS, "kto_tag": True}, {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}],
]
QUESTIONS: list[list[dict[str, Any]]] = [
    [{"question": "How many?", "answer": "2 + 2 = 4\n#### 4"}, {"prompt": TURNS[:1], "ground_truth": 7}],
    [{"messages": TURNS[:1], "answer": ["1"]}, {"system": "Add.", "problem": "1 + 1", "solution": "2"}],
]
REQUESTS = [
    {"context": "The first", "continuation": " line", "generate": {"until": ["\n"], "max_gen_toks": 3}},
    {"context": "", "continuation": "x", "generate": {"until": "a", "do_sample": True, "temperature": 0.7, "top_p": 1}},
]  # fmt: skip
METRICS: list[dict[str, Any]] = [
    {"step": 1, "event": "train", "time": 1.7e9, "loss": 5.5, "lr": 0.01, "grad_norm": 1.0, "tokens": 128,
     "tokens_per_second": 1e3, "peak_memory_gb": 0.1},
    {"step": 1, "event": "eval", "time": 1.7e9, "val_loss": 5.4, "val_bpb": 2.1, "perplexity": 220.0},
    {"step": 1, "event": "sample", "time": 1.7e9, "text": "Hi"}, {"step": 1, "event": "save", "time": 1.7e9},
    {"step": 1, "event": "resume", "time": 1.7e9}, {"step": 2, "event": "skip", "time": 1.7e9, "norm": "inf"},
    {"step": 2, "event": "warning", "time": 1.7e9, "text": "slow"},
    {"step": 3, "event": "end", "time": 1.7e9, "finished": True},
]  # fmt: skip
REPORT = {"checkpoint": "runs/a", "step": 3, "results": {"val": {"loss": 2.5, "perplexity": 12.2, "tokens": 100}}}


def build(folder: Path, with_mlx_lm: bool = True) -> None:
    """Writes folder/READER/NUMBER/FILES, and folder/common with models and a tokenizer that readers need besides.
    `with_mlx_lm`: also models that only mlx-lm reads."""
    common = folder / "common"
    train_tokenizer([random_words(1500), TEXT * 20], common / "bpe" / "tokenizer", 320)
    train_tokenizer([random_words(1500), TEXT * 20], common / "unigram" / "tokenizer", 320, "unigram")
    train_tokenizer([random_words(1500)], common / "gpt2" / "tiny", 320, file_format="gpt2")
    run = make_run(common / "run", common / "bpe" / "tokenizer.model", n_layers=1, d_model=16, max_seq_len=64)
    export(run, "hf", common / "hf", "float16")
    size = load_tokenizer(common / "hf").vocab_size
    files = [{"c.yaml": path.read_bytes()} for path in sorted(CONFIGURATIONS.rglob("*.yaml"))]
    _write(folder, "config", *files)
    _write(folder, "text", *({name: TEXT.encode()} for name in ("a.txt", "a.md")))
    _write(folder, "rows", {"a.jsonl": _lines(ROWS)})
    _write(folder, "compressed", *_compressed("a.txt", TEXT.encode()), *_compressed("a.jsonl", _lines(ROWS)))
    _write(folder, "parquet", *({"a.parquet": _parquet(rows)} for rows in (ROWS, *CONVERSATIONS[:3], PAIRS[0])))
    _write(folder, "documents", *_documents(folder))
    chats = [{"a.jsonl": _lines(rows)} for rows in CONVERSATIONS]
    chats += [{"a.json": json.dumps(rows).encode()} for rows in CONVERSATIONS]
    _write(folder, "conversations", *chats)
    _write(folder, "preference pairs", *({"a.jsonl": _lines(rows)} for rows in PAIRS))
    _write(folder, "labeled answers", *({"a.jsonl": _lines(rows)} for rows in LABELED))
    _write(folder, "questions", *({"a.jsonl": _lines(rows)} for rows in QUESTIONS))
    _write(folder, "prompts", {"a.txt": TEXT.encode()}, {"a.jsonl": _lines([{"prompt": "Hi"}, {"prompt": "é\n"}])})
    _write(folder, "harness requests", *({"a.json": json.dumps(request).encode()} for request in REQUESTS))
    _write(folder, "evaluation results", {name: json.dumps(REPORT).encode() for name in ("a.json", "b.json")})

    beside = {
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True,
            "added_tokens_decoder": {str(size): {"content": "<|end|>", "special": True, "lstrip": False}},
            "chat_template": CHATML},
        "special_tokens_map.json": {"eos_token": "</s>", "additional_special_tokens": ["<|end|>"]},
        "added_tokens.json": {"<|end|>": size},
        "generation_config.json": {"eos_token_id": [2, size], "bos_token_id": 1},
        "config.json": {"eos_token_id": 2, "vocab_size": size + 1},
    }  # fmt: skip
    extra = {name: json.dumps(value).encode() for name, value in beside.items()}
    older = {name: content for name, content in extra.items() if name != "tokenizer_config.json"}
    byte_level = _read(common / "gpt2")
    from_json = {"tokenizer.json": str(load_tokenizer(common / "gpt2").backend.to_str()).encode()}  # type: ignore[attr-defined]
    llama = {"tokenizer.json": (common / "hf" / "tokenizer.json").read_bytes()}
    _write(folder, "tokenizer.json", from_json, llama, {**llama, **extra}, {**from_json, **older}, byte_level)
    models = [_read(common / kind, "tokenizer.model") for kind in ("bpe", "unigram")]
    _write(folder, "tokenizer.model", *models, *({**model, **extra} for model in models), {**models[0], **older})
    _write(folder, "tokenizer_config.json", {**llama, **extra}, {**llama, **older}, {**models[0], **extra})
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": PLAIN}]
    templates = [{"chat_template.jinja": text.encode()} for text in (CHATML, PLAIN, LLAMA3)]
    templates += [{"tokenizer_config.json": json.dumps({"chat_template": text}).encode()} for text in (CHATML, named)]
    _write(folder, "chat template", *({**llama, **template} for template in templates))

    model = _read(common / "hf")
    _write(folder, "config.json", model)
    _write(folder, "safetensors", model, _sharded(model))
    if with_mlx_lm:
        _build_mlx_lm(folder, common, size)
    saved = checkpoint.find(run)
    for form in FORMATS:
        for number, more in enumerate(({}, {"dora": True, "target_modules": ["q_proj"]}, {"rslora": True})):
            adapter = adapter_for(saved.config.model, **more)
            write_adapter(folder / "adapters" / f"{form}-{number}", adapter, saved.config.model, form, str(run))
    checkpoint.write_best(run, 40, {"best_val_loss": 2.25, "best_val_bpb": 1.125})
    state = {"data_position": 8, "norms": [1.0], "curve": [[2.0, 2.1]], "since": [1.0, 2], "tokens": 10}
    arrays = checkpoint.load_arrays(saved, saved.config.model, optimizer=True)
    trained = _read(checkpoint.save(common / "trained", 40, arrays, {**saved.state, **state}))
    checkpoint.save(run, 41, arrays, {**saved.state, **state, "step": 41})
    _write(
        folder,
        "checkpoint",
        {name: data for name, data in _read(run).items() if "40" not in name}
        | {f"step_00000040/{name}": content for name, content in trained.items()},
    )
    _write(folder, "run log", {
        "run/config.yaml": (run / "config.yaml").read_bytes(), "run/logs/metrics.jsonl": _lines(METRICS),
        "run/logs/environment.json": b'{"python": "3.12", "packages": {"mlx": "0.32"}, "device": "cpu"}',
        "run/logs/final_training_summary.json": b'{"steps": 3, "final_loss": 5.5, "wall_seconds": 2.5}',
    })  # fmt: skip
    tokenizer = load_tokenizer(common / "bpe")
    Pretokenizer(tokenizer, folder / "shards-made", val_fraction=0.3).run(Document(f"{TEXT} {i}") for i in range(20))
    shards = _read(folder / "shards-made")
    plain = json.loads(shards["manifest.json"])
    del plain["content_sha256"]
    _write(folder, "shards", shards, {**shards, "manifest.json": json.dumps(plain).encode()})
    rows = folder / "rows.jsonl"
    rows.write_bytes(_lines(ROWS))
    with KnowledgeBase(folder / "kb.sqlite", KnowledgeBaseConfig(), create=True) as base:
        base.add(rows, DataConfig(), DocumentCounts())
        base.feedback("first document", [1], 1.0)
    _write(folder, "knowledge base", {"kb.sqlite": (folder / "kb.sqlite").read_bytes()})
    _write(folder, "HTTP requests", *({"request": request} for request in http_requests()))


def _build_mlx_lm(folder: Path, common: Path, vocab_size: int) -> None:
    wide = {"n_layers": 1, "d_model": 32, "n_heads": 1, "n_kv_heads": 1}
    export(make_run(common / "wide", common / "bpe" / "tokenizer.model", **wide), "hf", common / "wide-hf", "float16")
    _write(folder, "quantized", _read(quantize_folder(common / "wide-hf", common / "q", bits=4, group_size=32)))
    for number, name in enumerate(("experts", "head inside")):
        path = folder / "safetensors for mlx-lm" / str(number)
        changes = {"vocab_size": vocab_size, "hidden_size": 16, "num_hidden_layers": 1}
        write_model(path, {**CONFIGS[name], **changes})
        shutil.copyfile(common / "hf" / "tokenizer.json", path / "tokenizer.json")
    _write(
        folder,
        "config.json for mlx-lm",
        *(_read(path) for path in sorted((folder / "safetensors for mlx-lm").iterdir())),
    )


def http_requests() -> list[bytes]:
    """Whole HTTP/1.1 requests, as bytes on the wire."""
    prompt = {
        "model": "tiny",
        "prompt": "Hi",
        "max_tokens": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["x"],
    }
    chat = {
        "model": "tiny",
        "messages": TURNS[:1],
        "max_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    posts = [
        ("/v1/completions", prompt),
        ("/v1/completions", {**prompt, "stream": True}),
        ("/v1/chat/completions", chat),
    ]
    found = [
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://localhost\r\nAccept: */*\r\n\r\n".encode()
        for method, path in [("GET", path) for path in ("/", "/health", "/v1/models/tiny")] + [("OPTIONS", "/health")]
    ]
    for path, content in posts:
        body = json.dumps(content).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        found.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        found.append(f"{head}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
    return found


LLAMA3 = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- system + strftime_now('%d %b %Y') }}"
    "{%- for message in messages %}{{- '<|start|>' + message['role'] + '\n' + message['content'] | trim + eos_token }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant\n' }}{%- endif %}"
)  # fmt: skip


def _write(folder: Path, reader: str, *samples: Files) -> None:
    for number, sample in enumerate(samples):
        for name, content in sample.items():
            path = folder / reader / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _read(folder: Path, pattern: str = "*") -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and path.name != ".lock"
    }


def read_samples(folder: Path) -> list[Files]:
    return [_read(sample) for sample in sorted(folder.iterdir())]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _compressed(name: str, content: bytes) -> list[Files]:
    from backports import zstd

    return [{f"{name}.gz": gzip.compress(content)}, {f"{name}.zst": zstd.compress(content)}]


def _documents(folder: Path) -> Iterator[dict[str, bytes]]:
    paths = [
        pdf(folder / "a.pdf", line("The first page"), line("and the second")),
        docx(
            folder / "a.docx", paragraph("Some text") * 3 + f"<w:tbl><w:tr><w:tc>{paragraph('1')}</w:tc></w:tr></w:tbl>"
        ),
        epub(folder / "a.epub", "<h1>One</h1><p>A <a href='x'>link</a></p>", "<ul><li>Two</li></ul>"),
        pptx(folder / "a.pptx", "first", "second"),
        folder / "a.html",
    ]
    paths[-1].write_text(
        "<html><body><nav>Home</nav><p>Some <b>text</b></p><table><tr><td>1</td></tr></table></body></html>"
    )
    for path in paths:
        yield {path.name: path.read_bytes()}
        path.unlink()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def _sharded(files: Files) -> Files:
    """The same weights in two files with an index."""
    content = files["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = sorted(set(header) - {"__metadata__"})
    split: Files = {name: data for name, data in files.items() if name != "model.safetensors"}
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file, entries, data = f"model-{number:05d}-of-00002.safetensors", {}, b""
        for name in part:
            start, end = header[name]["data_offsets"]
            entries[name] = {**header[name], "data_offsets": [len(data), len(data) + end - start]}
            data += content[8 + length + start : 8 + length + end]
        text = json.dumps(entries).encode()
        split[file] = len(text).to_bytes(8, "little") + text + data
        weight_map |= dict.fromkeys(part, file)
    split["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return split
