"""Log-probabilities in OpenAI's forms."""

from collections.abc import Sequence
from typing import Any

from anarchobot.inference.generation import ScoredToken
from anarchobot.tokenizers.canonical_tokens import token_bytes
from anarchobot.tokenizers.tokenizer import ChatTokenizer


def chat_logprobs(scored: Sequence[ScoredToken], tokenizer: ChatTokenizer) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""

    def described(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer)[token]
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    content = [
        described(item.token, item.logprob) | {"top_logprobs": [described(*other) for other in item.top]}
        for item in scored
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(scored: Sequence[ScoredToken], tokenizer: ChatTokenizer, start: int) -> dict[str, Any]:
    """`logprobs` of /v1/completions, with the token itself among the most likely. `start`: where the first token begins
    in the text, in characters; -1 if its space belongs to the prompt."""
    raws, offsets = token_bytes(tokenizer), []
    for item in scored:
        offsets.append(max(start, 0))
        start += text_length(raws[item.token])

    def text(token: int) -> str:
        return raws[token].decode("utf-8", "replace")

    def likely(item: ScoredToken) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in (*item.top, (item.token, item.logprob)):
            found.setdefault(text(token), logprob)
        return found

    return {
        "tokens": [text(item.token) for item in scored],
        "token_logprobs": [item.logprob for item in scored],
        "top_logprobs": [likely(item) for item in scored],
        "text_offset": offsets,
    }


def text_length(raw: bytes) -> int:
    """The characters of UTF-8 that start in `raw`."""
    return sum(byte & 0xC0 != 0x80 for byte in raw)
