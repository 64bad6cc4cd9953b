"""`anarchobot serve` under load, compared with mlx_lm.server on the same exported model.

Clients stream greedy completions of mixed lengths; some disconnect before or during the answer. Every complete answer
is compared with the answer to the same request sent alone: requests that fail or end early count as lost, answers that
belong to another request as mixed up. Both servers run with their default settings on a random model in the shape of
configs/quickstart.yaml. The load alternates between them, so that other programs on the machine affect both. The memory
is the resident set of each server's process: its maximum in the first round, which is the warm-up, and in the others.

    .venv/bin/python benchmarks/serving.py --rounds 10 --seconds 60
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from generation import export_model

HERE = Path(__file__).parent
WORDS = (
    "time",
    "way",
    "year",
    "day",
    "thing",
    "man",
    "world",
    "life",
    "hand",
    "part",
    "child",
    "eye",
    "woman",
    "place",
)
PROMPT_WORDS, TOKENS, REQUESTS = (4, 16, 48, 96), (6, 12, 24), 24
DISCONNECTS = 5  # one request in so many
NAMES = ("AnarchoBot", "mlx_lm.server")


@dataclass
class Server:
    """A server process, and what the clients saw of it. Times in seconds, memory in bytes per round."""

    port: int
    model: str
    process: subprocess.Popen[bytes]
    expected: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    tokens: int = 0
    disconnected: int = 0
    lost: int = 0
    mixed_up: int = 0
    different: int = 0


def make_requests() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "prompt": " ".join(rng.choices(WORDS, k=PROMPT_WORDS[i % len(PROMPT_WORDS)])),
            "max_tokens": TOKENS[i % len(TOKENS)],
            "temperature": 0,
            "stream": True,
        }
        for i in range(REQUESTS)
    ]


async def complete(server: Server, request: dict[str, Any], leave_after: int | None = None) -> tuple[str, list[float]]:
    """The text, and the times of its pieces since the start. `leave_after`: disconnects after so many pieces. Raises
    OSError if the answer is incomplete."""
    start, times, texts = time.perf_counter(), [], []
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        body = json.dumps(request | {"model": server.model}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            raise OSError(f"unexpected status: {status!r}")
        while leave_after is None or len(times) < leave_after:
            line = await reader.readline()
            if not line:
                raise OSError("the stream ended early")
            if line.strip() == b"data: [DONE]":
                break
            if line.startswith(b"data: ") and (text := json.loads(line[6:])["choices"][0]["text"]):
                times.append(time.perf_counter() - start)
                texts.append(text)
        return "".join(texts), times
    finally:
        writer.close()


async def client(server: Server, requests: list[dict[str, Any]], seed: int, end: float) -> None:
    rng = random.Random(seed)
    while time.perf_counter() < end:
        i = rng.randrange(len(requests))
        leave_after = rng.randrange(4) if rng.randrange(DISCONNECTS) == 0 else None
        try:
            text, times = await complete(server, requests[i], leave_after)
        except OSError:
            server.lost += leave_after is None
            continue
        if leave_after is not None:
            server.disconnected += 1
            continue
        if text != server.expected[i]:
            server.mixed_up += text in server.expected
            server.different += text not in server.expected
        tokens = requests[i]["max_tokens"]
        server.tokens += tokens
        server.first.append(times[0])
        server.per_token.append((times[-1] - times[0]) / (tokens - 1))


async def load(server: Server, requests: list[dict[str, Any]], clients: int, seconds: float, number: int) -> None:
    """One round."""
    process, peak = psutil.Process(server.process.pid), 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, process.memory_info().rss)
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    end = time.perf_counter() + seconds
    await asyncio.gather(*(client(server, requests, 1000 * number + i, end) for i in range(clients)))
    watching.cancel()
    server.memory.append(peak)


def start(stack: ExitStack, model: Path, log: Path) -> list[Server]:
    environment = {k: v for k, v in os.environ.items() if k != "ANARCHOBOT_API_KEY"}
    servers = []
    for name, port in zip(NAMES, (18080, 18081), strict=True):
        words = (
            ["-m", "anarchobot", "serve", "--checkpoint", str(model), "--log-level", "warning"]
            if name == "AnarchoBot"
            else ["-m", "mlx_lm", "server", "--model", str(model), "--log-level", "WARNING"]
        )
        output = stack.enter_context((log / f"{name}.log").open("wb"))
        command = [sys.executable, *words, "--port", str(port)]
        process = stack.enter_context(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        stack.callback(process.terminate)
        servers.append(Server(port, model.name if name == "AnarchoBot" else "default_model", process))
    return servers


async def answer_alone(server: Server, requests: list[dict[str, Any]]) -> None:
    """Waits until the server has started, then sends each request alone."""
    for _ in range(600):
        try:
            await complete(server, requests[0])
            break
        except OSError:
            await asyncio.sleep(0.5)
    server.expected = [(await complete(server, request))[0] for request in requests]


def quantile(values: list[float], q: int) -> float:
    return statistics.quantiles(values, n=100)[q - 1]


def figures(server: Server, rounds: int, seconds: float) -> dict[str, Any]:
    mib = [round(size / 2**20) for size in server.memory]
    return {
        "answers": len(server.first),
        "disconnected": server.disconnected,
        "lost": server.lost,
        "mixed_up": server.mixed_up,
        "different": server.different,
        "tokens_per_second": round(server.tokens / rounds / seconds, 1),
        "first_token_p50": round(quantile(server.first, 50), 3),
        "first_token_p99": round(quantile(server.first, 99), 3),
        "per_token_p50": round(quantile(server.per_token, 50), 4),
        "per_token_p99": round(quantile(server.per_token, 99), 4),
        "memory_mib": mib,
        "memory_warm_mib": mib[0],
        "memory_peak_mib": max(mib[1:], default=mib[0]),
    }


def table(servers: dict[str, dict[str, Any]]) -> str:
    lines = [f"| | {' | '.join(servers)} |", "| --- |" + " ---: |" * len(servers)]
    for key, label in (
        ("answers", "complete answers"),
        ("disconnected", "disconnected by the client"),
        ("lost", "lost"),
        ("mixed_up", "mixed up"),
        ("different", "differ from the answer without load"),
        ("tokens_per_second", "tokens/s in complete answers"),
        ("first_token_p50", "time to first token, p50, s"),
        ("first_token_p99", "time to first token, p99, s"),
        ("per_token_p50", "time per token, p50, s"),
        ("per_token_p99", "time per token, p99, s"),
        ("memory_warm_mib", "memory in the first round, MiB"),
        ("memory_peak_mib", "peak memory in the others, MiB"),
    ):
        lines.append(f"| {label} | {' | '.join(str(result[key]) for result in servers.values())} |")
    return "\n".join(lines)


async def measure(model: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    requests = make_requests()
    with ExitStack() as stack:
        servers = start(stack, model, model.parent)
        for server in servers:
            await answer_alone(server, requests)
        for number in range(arguments.rounds):
            for server in servers[::-1] if number % 2 else servers:
                await load(server, requests, arguments.clients, arguments.seconds, number)
                print(
                    f"round {number + 1}: {server.memory[-1] / 2**20:.0f} MiB, {len(server.first)} answers", flush=True
                )
    return {
        name: figures(server, arguments.rounds, arguments.seconds) for name, server in zip(NAMES, servers, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, help="concurrent clients (default: 64)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of load per server (default: 10)")
    parser.add_argument("--seconds", type=float, default=60, help="seconds per round (default: 60)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "serving.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(export_model(Path(folder), "quickstart"), arguments))
    settings = {"clients": arguments.clients, "rounds": arguments.rounds, "seconds": arguments.seconds}
    arguments.output.write_text(json.dumps({"cores": os.cpu_count(), **settings, "servers": result}, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
