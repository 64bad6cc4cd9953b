"""`anarchobot generate`, `chat` and `serve`."""

import argparse
import io
import json
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.knowledge import SEARCH_SETTINGS, open_knowledge_base, warn_of_missing_embeddings
from anarchobot.cli.parser import (
    HUB_NAME,
    Parser,
    add_command,
    add_overrides,
    add_settings,
    non_negative,
    overrides,
    positive,
)
from anarchobot.cli.results import note_chat_run
from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.paths import model_name_of
from anarchobot.config.terminal import write_text
from anarchobot.config.wording import count
from anarchobot.storage.durable import parse_json

if TYPE_CHECKING:
    from anarchobot.config.schema import Config
    from anarchobot.inference.chat import ChatSession
    from anarchobot.inference.generation import TextChunk
    from anarchobot.inference.model import Model
    from anarchobot.inference.speculative import Draft
    from anarchobot.knowledge.knowledge_base import KnowledgeBase

SETTINGS = {
    "--method": "generation.method",
    "--temperature": "generation.temperature",
    "--top-k": "generation.top_k",
    "--top-p": "generation.top_p",
    "--min-p": "generation.min_p",
    "--repetition-penalty": "generation.repetition_penalty",
    "--presence-penalty": "generation.presence_penalty",
    "--frequency-penalty": "generation.frequency_penalty",
    "--max-new-tokens": "generation.max_new_tokens",
    "--seed": "generation.seed",
}
MODEL_DEFAULT = "default: the model's setting, else "
CHAT_HELP = """\
/reset        forget the conversation
/system TEXT  set the system prompt; without TEXT, remove it
/save FILE    append the conversation to a JSONL file for `anarchobot sft`
/good, /bad   rate the knowledge base passages found for the last question
/help         show this help
/quit, /exit  end the chat
Ctrl-C stops an answer, Ctrl-D ends the chat."""


def add_commands(commands: Any) -> None:
    generate = add_command(commands, "generate", _generate, "generate text with a trained model")
    _add_model(generate)
    _add_draft(generate)
    add_overrides(generate, "generation")
    add_settings(generate, {"--prompt": "generation.prompt", **SETTINGS}, MODEL_DEFAULT)
    generate.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='file of prompts, one per line, or JSONL with rows {"prompt": ...} (default: --prompt only)',
    )

    chat = add_command(commands, "chat", _chat, "chat with a model in the terminal")
    _add_model(chat)
    _add_draft(chat)
    add_overrides(chat, "generation", "knowledge_base", unused=["generation.prompt"])
    add_settings(chat, SETTINGS | SEARCH_SETTINGS, MODEL_DEFAULT)

    serve = add_command(commands, "serve", _serve, "serve a model over an OpenAI-compatible HTTP API, with a chat page")
    _add_checkpoint(serve)
    _add_draft(serve)
    unused = ["generation.prompt", "generation.seed"]  # each request has its own
    add_overrides(serve, "generation", "knowledge_base", unused=unused)
    add_settings(serve, SEARCH_SETTINGS, MODEL_DEFAULT)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; the default serves this machine only")
    serve.add_argument("--port", type=_port, default=8080, help="port to listen on; 0: any free port")
    serve.add_argument("--max-tokens", type=positive, default=2048, metavar="N", help="maximum tokens per answer")
    serve.add_argument("--queue", type=non_negative, default=64, metavar="N", help="maximum number of waiting requests")
    serve.add_argument(
        "--prefix-cache",
        type=non_negative,
        default=1024,
        metavar="MIB",
        help="memory for the keys and values of earlier prompts, so that the next turn of a conversation is prefilled "
        "from there on; 0: none",
    )
    serve.add_argument(
        "--client-connections",
        type=positive,
        default=100,
        metavar="N",
        help="maximum connections per client address; behind a reverse proxy, of all its clients",
    )
    serve.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with the API key that clients must send (default: ANARCHOBOT_API_KEY, or no key)",
    )
    serve.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="additional host names to accept in the Host header (default: none)",
    )
    serve.add_argument(
        "--allow-origin",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="other sites whose pages may send requests (default: none)",
    )
    serve.add_argument("--model-name", metavar="NAME", help="model name in the API (default: name of its run)")
    serve.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        help="what to log on stderr; info: one line per request (default: info, or warning with --quiet)",
    )
    serve.add_argument("--log-prompts", action="store_true", help="log the prompts of requests too (default: off)")


def _add_checkpoint(parser: Parser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run folder (its newest step), best.json or a step_… folder in it, folder of a Hugging Face model or "
        f"adapter, or {HUB_NAME}",
    )
    parser.add_argument(
        "--model", metavar="PATH", help="base model, if --checkpoint is adapters (default: the one that they name)"
    )


def _add_draft(parser: Parser) -> None:
    parser.add_argument(
        "--draft-model",
        metavar="PATH",
        help="smaller model with the same tokenizer that proposes tokens, for the same text in less time; PATH as in "
        "--checkpoint (default: none)",
    )
    parser.add_argument(
        "--num-draft-tokens", type=positive, default=3, metavar="N", help="tokens that the draft model proposes at once"
    )


def _add_model(parser: Parser) -> None:
    _add_checkpoint(parser)
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="stop string; may be repeated [generation.stop; default: the model's setting, else none]",
    )


def _port(word: str) -> int:
    if (number := non_negative(word)) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got '{word}'")
    return number


def _load(args: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> "tuple[Model, Config]":
    """The model, and the sections used for inference: the model's settings, overridden by `defaults`, KEY=VALUE and
    flags."""
    from anarchobot.config.loading import load_config, override
    from anarchobot.inference.model import load_model

    stop = getattr(args, "stop", None)
    given = overrides(args, {**(defaults or {}), **({} if stop is None else {"generation.stop": stop})})
    load_config(None, given)  # before loading the model, to fail early
    model, trained = load_model(args.checkpoint, args.model)
    return model, override(trained, ("generation", "knowledge_base"), given)


def _load_draft(args: argparse.Namespace, model: "Model") -> "Draft | None":
    from anarchobot.inference.speculative import load_draft

    return None if args.draft_model is None else load_draft(args.draft_model, model, args.num_draft_tokens)


def _log_draft(draft: "Draft | None", args: argparse.Namespace) -> None:
    """How many tokens of the draft model were accepted since the last call."""
    if draft is not None and not args.quiet:
        print(f"(draft model: {draft.accepted:,} of {draft.proposed:,} tokens accepted)", file=sys.stderr)
        draft.proposed = draft.accepted = 0


# --- generate


def _generate(args: argparse.Namespace) -> None:
    prompts = None if args.prompts is None else _read_prompts(args.prompts)
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.inference.generation import generate, generate_batch

    model, config = _load(args)
    draft, settings = _load_draft(args, model), config.generation
    if settings.prompt == "-":
        settings = settings.model_copy(update={"prompt": _read_stdin()})
    if prompts is not None:
        for prompt, text in zip(prompts, generate_batch(model, prompts, settings, draft=draft), strict=True):
            write_text(_json_row(prompt, text) if args.json else f"{prompt}{text}\n\n")
        _log_draft(draft, args)
        return
    if args.json:
        write_text(_json_row(settings.prompt, generate(model, settings, draft=draft)))
        _log_draft(draft, args)
        return
    pending = [settings.prompt]  # printed with the first chunk, so that a prompt that is too long is not echoed

    def write(text: str) -> None:
        write_text("".join([*pending, text]))
        pending.clear()

    def end(chunk: "TextChunk") -> None:
        if chunk.finish_reason == "length" and chunk.tokens < settings.max_new_tokens and not args.quiet:
            print(f"\n(stopped: the model's max_seq_len is {model.config.max_seq_len} tokens)", file=sys.stderr)

    generate(model, settings, on_text=write, on_end=end, draft=draft)
    write("")
    write_text("\n")
    _log_draft(draft, args)


def _read_stdin() -> str:
    """A prompt without the newline at its end, which a shell's `echo` adds."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError("--prompt -: standard input is not UTF-8") from error


def _read_prompts(file: Path) -> list[str]:
    """The prompts in a file, without empty lines."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8; expected text, or JSONL (.jsonl)") from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{file}: no prompts; expected one per line")
    if file.suffix.lower() != ".jsonl":
        return [line for _, line in numbered]
    return [_parse_prompt(line, f"{file}:{number}") for number, line in numbered]


def _parse_prompt(line: str, where: str) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{where}: expected {{"prompt": "..."}}')
    prompt: str = row["prompt"]
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the prompt is not valid Unicode: {error}") from error
    return prompt


def _json_row(prompt: str, text: str) -> str:
    return json.dumps({"prompt": prompt, "text": text}) + "\n"


# --- chat


def _chat(args: argparse.Namespace) -> None:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.inference.chat import ChatSession

    note_chat_run(args)
    # At a terminal, a chat does not repeat the last one.
    model, config = _load(args, {"generation.seed": secrets.randbelow(2**31)} if sys.stdin.isatty() else {})
    draft, settings = _load_draft(args, model), config.knowledge_base
    with ExitStack() as stack:
        base = None if settings.path is None else stack.enter_context(open_knowledge_base(settings))
        if base is not None:
            warn_of_missing_embeddings(base)
        session = ChatSession(model, config.generation, base, draft)
        for warning in session.warnings():
            print(f"warning: {warning}", file=sys.stderr)
        _chat_loop(session, args, draft)


def _chat_loop(session: "ChatSession", args: argparse.Namespace, draft: "Draft | None") -> None:
    """Reads lines from a terminal or a pipe. An error is printed, and the conversation continues."""
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # a pipe is UTF-8, perhaps with a byte order mark, as files are
        sys.stdin.reconfigure(encoding=None if is_terminal else "utf-8-sig", errors="surrogateescape")
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
        if not args.quiet:
            print("type /help for a list of commands", file=sys.stderr)
    while (line := _read_line(is_terminal)) is not None:
        try:
            if any("\udc80" <= character <= "\udcff" for character in line):
                raise UserError(f"{line!a}: not valid UTF-8")
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                _run_chat_command(session, line, log=lambda text: None if args.quiet else print(text, file=sys.stderr))
            elif line:
                _answer(session, line, args)
                _log_draft(draft, args)
        except (UserError, OSError) as error:
            message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            print(f"anarchobot: {message}", file=sys.stderr)
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):
                print(flush=True)
    if is_terminal:
        print()


def _read_line(is_terminal: bool) -> str | None:
    """The next line, or None at end of input."""
    while True:
        try:
            return input("> " if is_terminal else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            with suppress(KeyboardInterrupt):  # ignore a second Ctrl-C here
                print("\nCtrl-D ends the chat", file=sys.stderr)


def _answer(session: "ChatSession", question: str, args: argparse.Namespace) -> None:
    dropped = session.dropped_turns

    after_reasoning = False

    def write_reasoning(text: str) -> None:
        nonlocal after_reasoning
        if not args.quiet:
            print(text, end="", file=sys.stderr, flush=True)
            after_reasoning = True

    def write_answer(text: str) -> None:
        nonlocal after_reasoning
        if after_reasoning:
            print("\n", file=sys.stderr)
            after_reasoning = False
        if not args.json:
            write_text(text)

    text = session.answer(question, write_answer, write_reasoning)
    sources = list(dict.fromkeys(hit.source for hit in session.hits))
    if args.json:
        row = {"question": question, "answer": text, "sources": sources, "dropped_passages": session.dropped_hits}
        write_text(json.dumps(row) + "\n")
        return
    write_text("\n")
    if not text and not args.quiet:
        print("(empty answer)", file=sys.stderr)
    if sources and not args.quiet:
        print(f"(sources: {', '.join(sources)})", flush=True)
    if session.dropped_hits and not args.quiet:
        total = session.dropped_hits + len(session.hits)
        print(f"({session.dropped_hits} of {total} passages did not fit in the context window)", file=sys.stderr)
    if session.dropped_turns > dropped and not args.quiet:
        print(f"(dropped {session.dropped_turns} turns that no longer fit in the context window)", file=sys.stderr)


def _run_chat_command(session: "ChatSession", line: str, log: Callable[[str], None]) -> None:
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/help":
        print(CHAT_HELP, file=sys.stderr)
    elif command == "/reset":
        session.reset()
        log("conversation reset")
    elif command == "/system":
        session.set_system(rest)
        log("system prompt set" if rest else "system prompt removed")
    elif command == "/save":
        if not rest:
            raise UserError("/save: missing FILE")
        session.save(Path(rest).expanduser())
        log(f"saved to {rest}")
    elif command in ("/good", "/bad"):
        rated = session.rate(1.0 if command == "/good" else -1.0)
        log(f"rated {count(rated, 'passage')}")
    else:
        near = did_you_mean(command, re.findall(r"/\w+", CHAT_HELP))
        raise UserError(f"unknown command '{command}'{near} (see /help)")


# --- serve


def _serve(args: argparse.Namespace) -> None:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    try:
        from anarchobot.serving.app import Limits
        from anarchobot.serving.auth import allowed_hosts, allowed_origins, read_api_key
        from anarchobot.serving.connections import ConnectionLimits
        from anarchobot.serving.embeddings import Embedder
        from anarchobot.serving.passages import PassageSearch
        from anarchobot.serving.request_log import configure_logging
        from anarchobot.serving.server import ServerOptions, bind, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError("serve requires starlette and uvicorn: pip install 'anarchobot[serve]'") from error
    from anarchobot.inference.text_encoder import TextEncoder
    from anarchobot.knowledge.knowledge_base import KnowledgeBase

    note_chat_run(args)
    options = ServerOptions(
        name=args.model_name or model_name_of(args.checkpoint),
        host=args.host,
        port=args.port,
        api_key=read_api_key(args.api_key_file),
        hosts=allowed_hosts(args.host, args.allow_host),
        origins=allowed_origins(args.allow_origin),
        queue_size=args.queue,
        prefix_bytes=args.prefix_cache * 2**20,
        limits=Limits(tokens=args.max_tokens),
        connections=ConnectionLimits(per_client=args.client_connections),
        log_prompts=args.log_prompts,
    )

    configure_logging(args.log_level or ("warning" if args.quiet else "info"))

    def on_start(url: str) -> None:
        if args.json:
            print(json.dumps({"url": url, "model": options.name}), flush=True)
        elif not args.quiet:
            print(f"serving {options.name} at {url} (Ctrl-C to stop)", flush=True)

    def open_base() -> "KnowledgeBase":
        assert settings.path is not None
        base = KnowledgeBase(settings.path, settings, encoder=None if embedder is None else embedder.encoder)
        warn_of_missing_embeddings(base)
        return base

    with ExitStack() as stack:
        bound = stack.enter_context(bind(options))  # before loading the model, to fail early
        model, config = _load(args)
        draft, settings = _load_draft(args, model), config.knowledge_base
        embedder = passages = None
        if settings.embedding_model is not None:
            load = partial(TextEncoder, settings.embedding_model)
            embedder = stack.enter_context(Embedder(load, options.queue_size))
        if settings.path is not None:
            passages = stack.enter_context(PassageSearch(open_base, None if embedder is None else embedder.thread))
        serve(model, config.generation, options, bound, on_start, passages, embedder, draft)
