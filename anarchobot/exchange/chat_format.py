"""The chat format that is exported with a model: its template, special tokens and stop tokens."""

from pathlib import Path
from typing import NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import FILE, ChatTemplate, load_template
from anarchobot.tokenizers.conversation import InvalidRow, Message
from anarchobot.tokenizers.tokenizer import ChatTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer


class ChatFormat(NamedTuple):
    """`special_tokens` maps bos_token, eos_token and so on to their text. `bos_id` is the BOS token if the template
    itself starts a conversation with it. `stop_ids` end generation: the end of document first, and the end of
    turn last, if it is another token."""

    template: ChatTemplate
    special_tokens: dict[str, str]
    bos_id: int | None
    stop_ids: list[int]

    def mentions(self, name: str) -> bool:
        """Whether the template refers to a special token by its key, such as "bos_token"."""
        return name in self.template.source


def load_chat_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """Loads the chat template next to a run's tokenizer; None if there is none.

    Raises UserError for an unusable template.
    """
    if not (tokenizer.files[0].parent / FILE).is_file():
        return None
    assert isinstance(tokenizer, SentencePieceTokenizer | HFTokenizer)
    return _chat_format(tokenizer, load_template(tokenizer))


def copy_chat_template(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Copies the chat template of a Hugging Face tokenizer, if it has one, to `folder`.

    Returns warnings: an unusable template is not copied.
    """
    assert isinstance(tokenizer, SentencePieceTokenizer | HFTokenizer)
    try:
        template = load_template(tokenizer)
        if template.where in ("chatml", "plain"):  # a default, because the tokenizer has none
            return []
        _chat_format(tokenizer, template)
    except UserError as error:
        return [f"skipping the chat template: {error}"]
    template.save(folder)
    return []


def _chat_format(tokenizer: ChatTokenizer, template: ChatTemplate) -> ChatFormat:
    """Raises UserError if the template rejects a single user message."""
    encoder = ChatEncoder(tokenizer, template)
    end_of_turn = encoder.end_of_turn_id()
    try:
        first = int(encoder.encode_prompt((Message("user", "Hi"),))[0])
    except InvalidRow as error:
        raise UserError(f"{template.where}: unusable chat template: {error}") from error
    # transformers would add a token that the tokenizer lacks, with an id beyond the embedding.
    special_tokens = {key: text for key, text in template.tokens.items() if text in tokenizer.control_tokens}
    bos_id = first if tokenizer.control_tokens.get(special_tokens.get("bos_token", "")) == first else None
    ends = stop_ids(tokenizer)
    if end_of_turn is not None and end_of_turn != tokenizer.eod_id:
        ends = [*(i for i in ends if i != end_of_turn), end_of_turn]
    return ChatFormat(template, special_tokens, bos_id, ends)


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end generation without a chat template, the end of a document first."""
    return [tokenizer.eod_id, *sorted(tokenizer.stop_ids - {tokenizer.eod_id})]
