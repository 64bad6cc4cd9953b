"""Special tokens of a Hugging Face model folder, from the files beside its tokenizer, read as transformers does:

    generation_config.json, config.json   eos_token_id: an id or several, which end generation; vocab_size
    tokenizer_config.json                 bos_token, eos_token, ...; added_tokens_decoder: tokens by id

Older folders have special_tokens_map.json (bos_token, ...) and added_tokens.json (ids by text) instead of an
added_tokens_decoder.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from anarchobot.config.errors import UserError

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
MAX_TOKEN = 10_000  # characters; the library takes microseconds for each
_LISTS = ("additional_special_tokens", "extra_special_tokens")
ADDED_TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")

AddedToken = dict[str, Any]  # the arguments of the library's AddedToken: content, special, lstrip, ...


class SpecialTokens(NamedTuple):
    """`names` maps bos_token, eos_token and so on to their text; `others` are further special tokens. `added` has the
    added tokens by id, `eos_ids` the ids that end generation, both without those in the tokenizer's own file. The model
    has no rows for tokens from `vocab_size` on, such as Gemma's image token in a model for text."""

    names: dict[str, str]
    others: list[str]
    added: dict[int, AddedToken]
    eos_ids: list[int]
    vocab_size: int | None


def read_special_tokens(folder: Path) -> SpecialTokens:
    """Everything is empty without these files. Raises UserError if one is damaged."""
    config = read_config(folder / TOKENIZER_CONFIG)
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" not in config:
        config |= read_config(folder / SPECIAL_TOKENS_MAP)
    names = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    others = [_content(token) for key in _LISTS if isinstance(config.get(key), list) for token in config[key]]
    try:
        if "added_tokens_decoder" in config:
            file = folder / TOKENIZER_CONFIG
            for i, token in config["added_tokens_decoder"].items():
                added[int(i)] = {
                    "content": str(token["content"]),
                    **{flag: bool(token[flag]) for flag in ADDED_TOKEN_FLAGS if flag in token},
                }
        else:
            file = folder / ADDED_TOKENS
            for text, i in read_config(file).items():
                special = text in names.values() or text in others
                added[int(i)] = {"content": text, "special": special, "normalized": not special}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: expected added tokens with their ids and contents, as transformers saves") from error
    texts = [*names.values(), *others, *(token["content"] for token in added.values())]
    for text in filter(None, texts):
        if len(text) > MAX_TOKEN:
            raise UserError(f"{folder}: a token of {len(text):,} characters: damaged (at most {MAX_TOKEN:,} are read)")
        if not _is_unicode(text):
            raise UserError(f"{folder / TOKENIZER_CONFIG}: token {text!a} is not valid Unicode")
    generation, model = (read_config(folder / name) for name in (GENERATION_CONFIG, "config.json"))
    vocab_size = model.get("vocab_size", generation.get("vocab_size"))
    return SpecialTokens(
        {key: text for key, text in names.items() if text is not None},
        [text for text in others if text is not None],
        dict(sorted(added.items())),
        [*_eos_ids(generation), *_eos_ids(model)],
        vocab_size if type(vocab_size) is int else None,
    )


def _is_unicode(text: str) -> bool:
    """Whether it has no surrogates, which JSON can hold and tokenizers can't encode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; empty if there is none, or if it is not an object."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {' '.join(str(error).split())[:200]}") from error
    return config if isinstance(config, dict) else {}


def _content(token: Any) -> str | None:
    """A token is stored as a string or as {"content": ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _eos_ids(config: dict[str, Any]) -> list[int]:
    ids = config.get("eos_token_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
