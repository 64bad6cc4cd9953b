"""A chat session: the conversation so far, cut to the context window, with passages from a knowledge base."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.generation import NUM_SEEDS, TextBatch, TextChunk
from anarchobot.inference.harmony import END_OF_CALL, MARKS, HarmonyParser, Reasoning, has_channels
from anarchobot.inference.model import Model
from anarchobot.inference.prefixes import KeptPrefixes
from anarchobot.inference.speculative import Draft
from anarchobot.knowledge.knowledge_base import Hit, KnowledgeBase, prompt_with_passages
from anarchobot.tokenizers.chat_encoder import ChatEncoder, TrainOn
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.conversation import InvalidRow, Message, check_encodable


def chat_encoder(model: Model, template: str = "auto", train_on: TrainOn = "assistant") -> ChatEncoder:
    """Combines the model's tokenizer with a chat template: "auto" is the one next to the tokenizer, or else a default.

    Raises UserError for an unusable template.
    """
    return ChatEncoder(model.tokenizer, load_template(model.tokenizer, template), train_on)


def chat_warnings(encoder: ChatEncoder) -> list[str]:
    """Returns warnings about the chat template."""
    template = encoder.template.where
    if template in ("chatml", "plain"):
        untrained = f"this model has no chat template and was not trained to answer: using the {template} template"
        return [untrained, *encoder.warnings()]
    return encoder.warnings()


class ChatSession:
    """`turns` alternate between user and assistant, without passages. `hits` are the passages in the last question's
    prompt; `dropped_hits` more were found, but did not fit. The first `dropped_turns` turns no longer fit into the
    context window."""

    def __init__(
        self,
        model: Model,
        settings: GenerationConfig,
        knowledge_base: KnowledgeBase | None = None,
        draft: Draft | None = None,
    ) -> None:
        """Raises UserError for an unusable chat template."""
        self._model, self._settings, self._knowledge_base, self._draft = model, settings, knowledge_base, draft
        self._encoder = chat_encoder(model)
        self._stop, self._shown = self._encoder.stop_ids(), dict[int, str]()
        self._has_channels = has_channels(self._encoder.template)
        if self._has_channels:
            controls = model.tokenizer.control_tokens
            self._shown = {i: name for name, i in controls.items() if name in MARKS}
            self._stop |= {i for name, i in controls.items() if name == END_OF_CALL}
        self._system: list[Message] = []
        self._question, self._answers = "", 0
        self._prefixes = KeptPrefixes(sys.maxsize, max_prompts=1)
        self.turns: list[Message] = []
        self.hits: list[Hit] = []
        self.dropped_hits = self.dropped_turns = 0

    def warnings(self) -> list[str]:
        """Returns warnings about the chat template."""
        return chat_warnings(self._encoder)

    def answer(
        self,
        question: str,
        on_text: Callable[[str], None] = lambda text: None,
        on_reasoning: Callable[[str], None] = lambda text: None,
    ) -> str:
        """Returns the model's answer; `on_text` receives it in pieces, and `on_reasoning` what gpt-oss writes in its
        channel for reasoning. If interrupted, the text so far is the answer.

        Raises UserError if the question is too long or rejected by the chat template or the tokenizer.
        """
        hits = [] if self._knowledge_base is None else self._knowledge_base.search(question)
        context, self.hits = self._fit_context(question, hits)
        self.dropped_hits = len(hits) - len(self.hits)
        batch = TextBatch(self._model, max_rows=1, prefixes=self._prefixes, draft=self._draft)
        seed = (self._settings.seed + self._answers) % NUM_SEEDS  # a repeated question gets a different answer
        batch.insert(context, self._settings.model_copy(update={"seed": seed}), self._stop, shown=self._shown)
        self._question, self._answers = question, self._answers + 1
        answer, parser = "", HarmonyParser({}) if self._has_channels else None
        try:
            while batch:
                for chunk in batch.step():
                    text = chunk.text if parser is None else _text_in(parser, chunk, on_reasoning)
                    text = text if answer else text.lstrip()
                    answer += text
                    if text:
                        on_text(text)
        finally:
            if answer:
                self.turns += [Message("user", question), Message("assistant", answer.rstrip())]
        return answer.rstrip()

    def set_system(self, text: str) -> None:
        """Sets the system message; an empty text removes it. Raises UserError if the template rejects it."""
        system = [Message("system", text)] if text else []
        self._encode([*system, Message("user", "Hi")])
        self._system = system

    def reset(self) -> None:
        """Clears the conversation, except for the system message."""
        self.turns, self.hits, self.dropped_hits, self.dropped_turns = [], [], 0, 0

    def rate(self, reward: float) -> int:
        """Records in the knowledge base whether its passages helped with the last question (1.0) or not (-1.0).

        Returns the number of passages. Raises UserError if there were none.
        """
        if self._knowledge_base is None:
            raise UserError("there is no knowledge base to rate: start with --kb FILE")
        if not self.hits and self.dropped_hits:
            raise UserError("none of the passages found for the last question fit in the context window")
        if not self.hits:
            raise UserError("no passages were found for the last question")
        self._knowledge_base.feedback(self._question, [hit.passage_id for hit in self.hits], reward)
        return len(self.hits)

    def save(self, path: Path) -> None:
        """Appends the conversation to a JSONL file as a row for `sft`. Raises UserError if there is none."""
        if not self.turns:
            raise UserError("there is no conversation to save yet")
        messages = [{"role": role, "content": content} for role, content, *_ in (*self._system, *self.turns)]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")

    def _fit_context(self, question: str, hits: Sequence[Hit]) -> tuple[list[int], list[Hit]]:
        """Returns the prompt's ids and the passages in it. To leave room for an answer, the oldest turns are dropped
        first, then the lowest-ranked passages."""
        max_seq_len = self._model.config.max_seq_len
        room = min(self._settings.max_new_tokens, max_seq_len // 2)
        turns, hits = self.turns[self.dropped_turns :], list(hits)
        while True:
            user = Message("user", prompt_with_passages(question, hits))
            ids = self._encode([*self._system, *turns, user])
            if len(ids) <= max_seq_len - room or (not turns and not hits and len(ids) < max_seq_len):
                break
            if turns:
                turns = turns[2:]
            elif hits:
                hits.pop()
            else:
                raise UserError(
                    f"the question has {len(ids)} tokens in the chat template, but the model's max_seq_len is "
                    f"{max_seq_len}: shorten it"
                )
        self.dropped_turns = len(self.turns) - len(turns)
        return ids, hits

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        try:
            for message in messages:
                check_encodable(message.content, "message")
            ids: list[int] = self._encoder.encode_prompt(tuple(messages)).tolist()
        except InvalidRow as error:
            raise UserError(str(error)) from error
        return ids


def _text_in(parser: HarmonyParser, chunk: TextChunk, on_reasoning: Callable[[str], None]) -> str:
    """The next text of the answer, without the reasoning."""
    pieces = [*parser.add(chunk.text), *(parser.finish() if chunk.finish_reason else [])]
    for piece in pieces:
        if isinstance(piece, Reasoning):
            on_reasoning(piece.text)
    return "".join(piece for piece in pieces if isinstance(piece, str))
