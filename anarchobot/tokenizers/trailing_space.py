"""Prompts that end in a space.

Tokenizers write a space together with the word after it (" cat"). A token for a single space is therefore rare, and a
model continues it badly. So the last space of a prompt is not encoded; instead, the first generated token must start
with a space ("token healing").
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from anarchobot.tokenizers.canonical_tokens import canonical_tokens
from anarchobot.tokenizers.tokenizer import Tokenizer


def split_trailing_space(prompt: str, tokenizer: Tokenizer) -> tuple[str, bool]:
    """Returns the prompt without its last space, and whether it had one that a generated token can supply."""
    healed = prompt.endswith(" ") and bool(starts_with_space(tokenizer).any())
    return prompt[:-1] if healed else prompt, healed


def starts_with_space(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Whether each token's text starts with a space: bool [vocab_size]."""
    return _starts_with_space(tokenizer)  # type: ignore[arg-type]  # mypy takes no protocol for Hashable


@lru_cache(maxsize=1)
def _starts_with_space(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    tokens = canonical_tokens(tokenizer)
    return np.array([token.kind in ("text", "byte") and token.raw.startswith(b" ") for token in tokens])
