"""What the model goes on from, as token ids: a text, or a conversation in its chat template."""

from collections.abc import Sequence
from typing import NamedTuple

from anarchobot.inference.chat import chat_encoder, chat_warnings
from anarchobot.inference.generation import prompt_ids
from anarchobot.inference.model import Model
from anarchobot.serving.refusals import ApiError
from anarchobot.tokenizers.conversation import InvalidRow, Message


class Prompt(NamedTuple):
    """`ids`, and the tokens that end the text behind them."""

    ids: list[int]
    stop: frozenset[int]


class Prompts:
    """A model's tokenizer and chat template. For any thread."""

    def __init__(self, model: Model) -> None:
        """Raises UserError when the chat template can't be used."""
        self._model, self._encoder = model, chat_encoder(model)
        self._end, self._end_of_turn = frozenset({model.tokenizer.eod_id}), self._encoder.stop()

    def warnings(self) -> list[str]:
        """What keeps this model from answering well in a chat, a line each."""
        return chat_warnings(self._encoder)

    def of_text(self, text: str) -> Prompt:
        """As `generate` has it. Raises ApiError (400) for one that leaves no room in max_seq_len."""
        return self._fitting(Prompt(prompt_ids(self._model, text), self._end), "prompt")

    def of_messages(self, messages: Sequence[Message]) -> Prompt:
        """As `chat` has it: the assistant's turn is next. Raises ApiError (400) for a conversation that the template or
        the tokenizer refuses, and for one that leaves no room in max_seq_len."""
        try:
            ids = self._encoder.prompt(tuple(messages)).tolist()
        except InvalidRow as misfit:
            raise ApiError(400, f"messages: {misfit}", "messages") from misfit
        return self._fitting(Prompt(ids, self._end_of_turn), "messages")

    def _fitting(self, prompt: Prompt, param: str) -> Prompt:
        most = self._model.shape.max_seq_len
        if len(prompt.ids) >= most:
            raise ApiError(
                400,
                f"{param}: {len(prompt.ids)} tokens long, and the model's max_seq_len is {most}: shorten it",
                param,
                "context_length_exceeded",
            )
        return prompt
