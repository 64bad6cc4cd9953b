"""How a tuned model talks, for other programs: its chat template, and the tokens that begin and end what is said."""

from pathlib import Path
from typing import NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import FILE, ChatTemplate, load_template
from anarchobot.tokenizers.conversation import InvalidRow, Message
from anarchobot.tokenizers.tokenizer import ChatTokenizer, HFTokenizer, SentencePieceTokenizer, Tokenizer


class Chat(NamedTuple):
    """`tokens`: those that the template may name, by bos_token, eos_token and so on; `begins`: the token that it puts
    before a conversation itself, as its bos_token; `ends`: where generation stops, the end of a document, then the end
    of a turn if that is another one."""

    template: ChatTemplate
    tokens: dict[str, str]
    begins: int | None
    ends: list[int]

    def speaks_of(self, name: str) -> bool:
        """Whether the template asks for this token (`bos_token` or another)."""
        return name in self.template.source


def open_chat(tokenizer: Tokenizer) -> Chat | None:
    """The chat template beside a run's tokenizer; None where there is none: that model goes on from a text.

    Raises UserError for a template that can't be used.
    """
    if not (tokenizer.files[0].parent / FILE).is_file():
        return None
    assert isinstance(tokenizer, SentencePieceTokenizer | HFTokenizer)
    return _probed(tokenizer, load_template(tokenizer))


def save_foreign_template(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Copies the chat template that came with a foreign tokenizer, if one did, into `folder`; returns what is to be
    said of one that is left out."""
    assert isinstance(tokenizer, SentencePieceTokenizer | HFTokenizer)
    try:
        template = load_template(tokenizer)
        if template.where in ("chatml", "plain"):  # it has none of its own
            return []
        _probed(tokenizer, template)
    except UserError as problem:
        return [f"the chat template is left out: {problem}"]
    template.save(folder)
    return []


def _probed(tokenizer: ChatTokenizer, template: ChatTemplate) -> Chat:
    """Raises UserError for a template that refuses the plainest conversation."""
    encoder = ChatEncoder(tokenizer, template)
    end = encoder.end_of_turn_id()
    try:
        first = int(encoder.encode_prompt((Message("user", "Hi"),))[0])
    except InvalidRow as misfit:
        raise UserError(f"{template.where}: unusable chat template: {misfit}") from misfit
    # transformers would add a token that there is none of, with an id that the model has no row for.
    tokens = {key: text for key, text in template.tokens.items() if text in tokenizer.control_tokens}
    begins = first if tokenizer.control_tokens.get(tokens.get("bos_token", "")) == first else None
    ends = [tokenizer.eod_id]
    if end is not None and end != tokenizer.eod_id:
        ends.append(end)
    return Chat(template, tokens, begins, ends)
