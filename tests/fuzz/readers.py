"""What reads each kind of file: the functions that the commands call, or a whole command without its parsing.

A reader returns normally or raises UserError. Anything else is a finding.
"""

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from anarchobot.cli.inference import _read_prompts
from anarchobot.cli.main import build_parser
from anarchobot.cli.parser import parse
from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import load, load_config
from anarchobot.config.schema import DataConfig, GRPOConfig, KnowledgeBaseConfig
from anarchobot.data.conversations.labeled_answers import tokenize_labeled
from anarchobot.data.conversations.preference_pairs import tokenize_pairs
from anarchobot.data.conversations.questions import tokenize_questions
from anarchobot.data.conversations.reading import (
    RowCounts,
    read_conversations,
    read_labeled,
    read_pairs,
    read_questions,
)
from anarchobot.data.conversations.tokenized import tokenize_conversations
from anarchobot.data.shards import SPLITS, TokenStream
from anarchobot.data.sources.documents import DocumentCounts, from_files
from anarchobot.exchange import gguf_file, safetensors_file
from anarchobot.exchange.adapters import read_adapter, recorded_base
from anarchobot.exchange.chat_format import load_chat_format
from anarchobot.exchange.importing import float_weights, load_hf_folder
from anarchobot.exchange.tokenizer_json import find_mismatch, tokenizer_files
from anarchobot.inference.generation import generate_batch
from anarchobot.inference.model import Model, load_model
from anarchobot.knowledge.knowledge_base import KnowledgeBase
from anarchobot.runs import checkpoint
from anarchobot.runs.progress import Progress
from anarchobot.tasks.resume import IDENTITY, check_same_run
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.conversation import Message
from anarchobot.tokenizers.fast_tokenizer import select_engine
from anarchobot.tokenizers.tokenizer import HFTokenizer, SentencePieceTokenizer, digest, load_tokenizer
from anarchobot.training.rewards import Rewards

Read = Callable[[Path], None]
TOKENIZER_BYTES = 400  # of memory that libraries take per byte of a text to tokenize, or of a token
PROBE = ["Hello there, 12 x", "", "  Grüße\n\n<s> 吾輩 <|end|></s> \x00"]
CONVERSATION = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello </s>."))


class Reader(NamedTuple):
    """`samples`: the folder of samples, if it is not the reader's name; `changed`: suffixes of the files to damage;
    `seconds` and `memory_factor`: bounds, the latter as a multiple of the input's size."""

    read: Read
    command: str
    samples: str = ""
    changed: tuple[str, ...] = ("",)
    seconds: int = 10
    memory_factor: int = 64


@cache
def _parser() -> Any:
    return build_parser()


def _run(*words: str | Path) -> None:
    """A command as `main` runs it, without its handling of errors."""
    args = parse(_parser(), [str(word) for word in words])
    args.argv, args.parser = [str(word) for word in words], _parser()
    args.run(args)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _config(folder: Path) -> None:
    for file in _files(folder):
        if b"corpus:" in file.read_bytes():
            load(file, [], AdaptConfig)
        else:
            load_config(file)


def _documents(folder: Path) -> None:
    for kind in ("file", "paragraphs", "lines"):
        counts = DocumentCounts()
        data = DataConfig(documents=kind, score_field="score" if kind == "lines" else None, score_min=0.0)
        for _ in from_files(map(str, _files(folder)), data, counts):
            pass
        counts.summary()


def _parquet(folder: Path) -> None:
    for read in (_documents, _conversations, _pairs):
        try:
            read(folder)
        except UserError as error:
            _check_message(error)


def _check_message(error: UserError) -> None:
    assert len(str(error).splitlines()) == 1, "a message of several lines"


class _Common:
    """Models that readers need besides the file that is damaged. Set by the process that fuzzes."""

    folder = Path()

    @classmethod
    @cache
    def tokenizer(cls) -> Any:
        return load_tokenizer(cls.folder / "hf")

    @classmethod
    @cache
    def encoder(cls, train_on: Literal["assistant", "answer"] = "assistant") -> ChatEncoder:
        return ChatEncoder(cls.tokenizer(), load_template(cls.tokenizer()), train_on)

    @classmethod
    @cache
    def model(cls) -> Model:
        return load_model(cls.folder / "run")[0]


def _conversations(folder: Path) -> None:
    for file in _files(folder):
        counts = RowCounts()
        rows = read_conversations(DataConfig(dataset=str(file)), counts)
        try:
            tokenize_conversations(rows, _Common.encoder(), counts, seq_len=64, samples=2)
        finally:
            counts.summary()


def _pairs(folder: Path) -> None:
    for file in _files(folder):
        counts = RowCounts()
        pairs = read_pairs(DataConfig(dataset=str(file)), counts)
        try:
            tokenize_pairs(pairs, _Common.encoder("answer"), counts, seq_len=64)
        finally:
            counts.summary()


def _labeled(folder: Path) -> None:
    for file in _files(folder):
        counts = RowCounts()
        answers = read_labeled(DataConfig(dataset=str(file)), counts)
        try:
            tokenize_labeled(answers, _Common.encoder("answer"), counts, seq_len=64)
        finally:
            counts.summary()


def _questions(folder: Path) -> None:
    for file in _files(folder):
        counts, rewards = RowCounts(), Rewards(GRPOConfig(rewards=["number"]))
        questions = read_questions(DataConfig(dataset=str(file)), counts, rewards.check_answer)
        try:
            tokenize_questions(questions, _Common.encoder("answer"), counts, max_prompt=64)
        finally:
            counts.summary()


def _tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for ids in tokenizer.encode_batch(PROBE):
        tokenizer.decode(ids.tolist())
    tokenizer.decode([tokenizer.eod_id, 0, tokenizer.vocab_size - 1])
    tokenizer.encode_with_offsets(PROBE, [False, True, False])
    tokenizer.start_ids()
    digest(tokenizer)


def _fast_tokenizer(folder: Path) -> None:
    select_engine(load_tokenizer(folder), "auto", "fallback", lambda line: None).encode_batch(PROBE)


def _exported_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, SentencePieceTokenizer | HFTokenizer)
    chat = load_chat_format(tokenizer)
    files = tokenizer_files(tokenizer, 64, tokenizer.eod_id, chat)
    find_mismatch(tokenizer, files["tokenizer.json"])
    gguf_file.tokenizer_fields(tokenizer, tokenizer.eod_id, chat)


def _template(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    encoder = ChatEncoder(tokenizer, load_template(tokenizer))
    encoder.encode([CONVERSATION, CONVERSATION[1:], (Message("text", "Hi"),)])
    encoder.stop_ids()
    encoder.warnings()
    load_chat_format(tokenizer)


def _model_folder(folder: Path) -> None:
    import mlx_lm.utils  # noqa: F401  here, so that the memory it takes does not count as an input's

    found = load_hf_folder(folder)
    weights = float_weights(found.weights, found.model)
    for name in weights:
        np.asarray(weights[name])


def _safetensors(folder: Path) -> None:
    for file in _files(folder):
        if file.suffix == ".safetensors":
            for tensor in safetensors_file.read(file).values():
                tensor.load()


def _adapter(folder: Path) -> None:
    recorded_base(folder)
    read_adapter(folder, _Common.model().config)


def _checkpoint(folder: Path) -> None:
    checkpoint.best_step(folder)
    checkpoint.read_best(folder, 100)
    for path in (folder, folder / "step_00000040"):
        saved = checkpoint.find(path)
        check_same_run(saved, saved.config, {name: saved.state.get(name) for name in IDENTITY if name in saved.state})
        Progress.from_state(saved.state)
        checkpoint.load_arrays(saved, saved.config.model, optimizer=True)
    load_model(folder)


def _run_log(folder: Path) -> None:
    _run("runs", folder)
    _run("runs", folder, "--json")
    _run("report", folder / "run", "--output", folder / "report.html")


def _shards(folder: Path) -> None:
    for split in SPLITS:
        stream = TokenStream(folder, split)
        stream.document_starts()
        stream.read(0, stream.tokens)
    _run("shards", "info", folder)
    _run("shards", "info", folder, "--json")
    _run("shards", "verify", folder)


def _knowledge_base(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "new.txt").write_text("A new text about documents.\n")
    with KnowledgeBase(folder / "kb.sqlite", KnowledgeBaseConfig()) as base:
        hits = base.search("a first document Größe b")
        base.documents()
        base.feedback("first document", [hit.passage_id for hit in hits] or [1], -1.0)
        base.add(folder / "new.txt", DataConfig(), DocumentCounts())
        for document in base.documents():
            base.remove(document.name)


def _prompts(folder: Path) -> None:
    settings = load_config(None, ["generation.max_new_tokens=1"]).config.generation
    for file in _files(folder):
        prompts = _read_prompts(file)[:8]
        for text in generate_batch(_Common.model(), prompts, settings):
            assert isinstance(text, str)


def _results(folder: Path) -> None:
    _run("evaluate", "--compare", folder / "a.json", folder / "b.json")


def _harness(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    from anarchobot.evaluation.harness import HarnessModel

    model = HarnessModel(_Common.model())
    try:
        request = json.loads((folder / "a.json").read_bytes())
        context, continuation, generate = (request[key] for key in ("context", "continuation", "generate"))
    except (ValueError, TypeError, KeyError, OSError, RecursionError):
        return
    if isinstance(context, str) and isinstance(continuation, str) and isinstance(generate, dict):
        model.generate_until([Instance("generate_until", {}, (context, generate), 0)])
        if continuation:
            model.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)])
            model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (continuation,), 0)])


@cache
def _server() -> tuple[Any, ExitStack]:
    from anarchobot.serving.app import Limits
    from tests.serving.conftest import run_server

    stack, limits = ExitStack(), Limits(tokens=4, body_bytes=2**16, body_seconds=1)
    return stack.enter_context(run_server(_Common.model(), limits, prefix_bytes=2**22)), stack  # keeps little


def _http(folder: Path) -> None:
    """Sends the bytes to a server and closes its own half of the connection, so that no request stays incomplete."""
    server, _ = _server()
    with socket.create_connection(("127.0.0.1", server.port), timeout=8) as connection:
        try:
            for file in _files(folder):
                connection.sendall(file.read_bytes())
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except OSError:
            return  # the server has closed the connection of a request that is not HTTP
    for line in answer.split(b"\r\n"):
        assert not line.startswith(b"HTTP/1.1 5"), line
    assert b'"server_error"' not in answer


READERS: dict[str, Reader] = {
    "config": Reader(_config, "config show FILE"),
    "text": Reader(_documents, "pretokenize --input FILE"),
    "rows": Reader(_documents, "pretokenize --input FILE"),
    "compressed": Reader(_documents, "pretokenize --input FILE", seconds=60),  # may expand to 32 MB of empty lines
    "parquet": Reader(_parquet, "pretokenize, sft, dpo"),
    "documents": Reader(_documents, "pretokenize --input FILE", seconds=60, memory_factor=2048),  # parsed XML is large
    "conversations": Reader(_conversations, "sft", memory_factor=TOKENIZER_BYTES),
    "preference pairs": Reader(_pairs, "dpo", memory_factor=TOKENIZER_BYTES),
    "labeled answers": Reader(_labeled, "dpo", seconds=30, memory_factor=TOKENIZER_BYTES),
    "questions": Reader(_questions, "grpo", memory_factor=TOKENIZER_BYTES),
    "prompts": Reader(_prompts, "generate --prompts FILE"),
    "evaluation results": Reader(_results, "evaluate --compare A B"),
    "harness requests": Reader(_harness, "evaluate --tasks"),
    "tokenizer.json": Reader(
        _tokenizer, "pretokenize --tokenizer FILE", changed=("tokenizer.json", "vocab.json", ".txt"),
    ),
    "tokenizer.model": Reader(_tokenizer, "pretokenize --tokenizer FILE", changed=(".model",)),
    "tokenizer_config.json": Reader(
        _tokenizer, "pretokenize --tokenizer FILE",
        changed=("config.json", "_map.json", "added_tokens.json"),
    ),
    "fast tokenizer": Reader(_fast_tokenizer, "pretokenize", "tokenizer.json", memory_factor=TOKENIZER_BYTES),
    "exported tokenizer": Reader(_exported_tokenizer, "export --to hf|mlx|gguf", "tokenizer.json"),
    "exported SentencePiece": Reader(_exported_tokenizer, "export --to hf|mlx|gguf", "tokenizer.model"),
    "chat template": Reader(_template, "sft, chat, serve", changed=(".jinja", "tokenizer_config.json")),
    "config.json": Reader(_model_folder, "import DIR", changed=("config.json",)),
    "safetensors": Reader(_safetensors, "import DIR", changed=(".safetensors",)),
    "safetensors of a model": Reader(_model_folder, "import DIR", "safetensors", (".safetensors", ".index.json")),
    "quantized": Reader(_model_folder, "import DIR", changed=(".safetensors", "config.json")),
    "config.json for mlx-lm": Reader(_model_folder, "import DIR", changed=("config.json",)),
    "safetensors for mlx-lm": Reader(_model_folder, "import DIR", changed=(".safetensors",)),
    "adapters": Reader(_adapter, "fuse --adapter DIR"),
    "checkpoint": Reader(_checkpoint, "pretrain --resume-from RUN"),
    "run log": Reader(_run_log, "runs DIR, report RUN"),
    "shards": Reader(_shards, "shards info|verify DIR, pretrain", changed=(".json", ".npy", ".offsets")),
    "knowledge base": Reader(_knowledge_base, "kb search|list|add|remove"),
    "HTTP requests": Reader(_http, "serve"),
}  # fmt: skip


def set_common(folder: Path) -> None:
    _Common.folder = folder
