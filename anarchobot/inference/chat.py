"""A conversation with a model: what was said, as much of it as fits into the context window, and what a knowledge base
has on the question."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.config.schema import GenerationConfig
from anarchobot.inference.generation import SEEDS, TextBatch
from anarchobot.inference.model import Model
from anarchobot.knowledge.knowledge_base import Hit, KnowledgeBase, prompt_with_passages
from anarchobot.tokenizers.chat_encoder import ChatEncoder
from anarchobot.tokenizers.chat_template import load_template
from anarchobot.tokenizers.conversation import InvalidRow, Message, check_encodable
from anarchobot.tokenizers.tokenizer import load_chat_tokenizer


def chat_encoder(model: Model, template: str = "auto") -> ChatEncoder:
    """The model's tokenizer with a chat template: "auto" is that beside the tokenizer, or else a plain one. Raises
    UserError when it can't be used."""
    tokenizer = load_chat_tokenizer(model.tokenizer.files[0])
    return ChatEncoder(tokenizer, load_template(tokenizer, template))


def chat_warnings(encoder: ChatEncoder) -> list[str]:
    """What keeps a model from answering well, a line each."""
    where = encoder.template.where
    untaught = f"no chat template comes with this model: it was not taught to answer ({where} is used)"
    return [untaught] * (where in ("chatml", "plain")) + encoder.warnings()


class ChatSession:
    """`turns`: the user's and the assistant's, by turns; `hits`: what was found for the last question and went before
    it; `forgotten`: how many of the turns no longer fit. Passages are not kept in the turns."""

    def __init__(self, model: Model, settings: GenerationConfig, base: KnowledgeBase | None = None) -> None:
        """The template is that beside the model's tokenizer, or else a plain one. Raises UserError when it can't be
        used."""
        self._model, self._settings, self._base = model, settings, base
        self._encoder = chat_encoder(model)
        self._stop = self._encoder.stop_ids()
        self._system: list[Message] = []
        self._question, self._answers = "", 0
        self.turns: list[Message] = []
        self.hits: list[Hit] = []
        self.forgotten = 0

    def warnings(self) -> list[str]:
        """What keeps this model from answering well, a line each."""
        return chat_warnings(self._encoder)

    def answer(self, question: str, on_text: Callable[[str], None] = lambda text: None) -> str:
        """The model's answer; `on_text` gets it piece by piece. When this is interrupted, what was said until then is
        the answer. Raises UserError for a question that is too long, or that the template or a tokenizer refuses."""
        hits = [] if self._base is None else self._base.search(question)
        context, self.hits = self._context(question, hits)
        batch = TextBatch(self._model, rows=1)
        seed = (self._settings.seed + self._answers) % SEEDS  # the same question gets another answer
        batch.insert(context, self._settings.model_copy(update={"seed": seed}), self._stop)
        self._question, self._answers = question, self._answers + 1
        said = ""
        try:
            while batch:
                for piece in batch.step():
                    text = piece.text if said else piece.text.lstrip()
                    said += text
                    if text:
                        on_text(text)
        finally:
            if said:
                self.turns += [Message("user", question), Message("assistant", said.rstrip())]
        return said.rstrip()

    def set_system(self, text: str) -> None:
        """What the model is told before everything else; "": nothing. Raises UserError when the template has no place
        for it."""
        system = [Message("system", text)] if text else []
        self._prompt([*system, Message("user", "Hi")])
        self._system = system

    def reset(self) -> None:
        """Forgets the conversation, but for what /system set."""
        self.turns, self.hits, self.forgotten = [], [], 0

    def vote(self, reward: float) -> int:
        """Tells the knowledge base that what it found for the last question helped (1.0) or not (-1.0); returns how
        many passages that were. Raises UserError when there were none."""
        if self._base is None:
            raise UserError("there is no knowledge base that could learn from it: start with --kb FILE")
        if not self.hits:
            raise UserError("nothing was found in the knowledge base for the last question")
        self._base.feedback(self._question, [hit.passage_id for hit in self.hits], reward)
        return len(self.hits)

    def save(self, path: Path) -> None:
        """Adds the conversation to a JSONL file, as a row that `sft` reads. Raises UserError when nothing was said."""
        if not self.turns:
            raise UserError("nothing was said yet")
        messages = [message._asdict() for message in (*self._system, *self.turns)]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")

    def _context(self, question: str, hits: Sequence[Hit]) -> tuple[list[int], list[Hit]]:
        """The prompt's ids, and the passages in it. To leave room for an answer, the oldest turns are left out first,
        then the passages from the last."""
        longest = self._model.shape.max_seq_len
        room = min(self._settings.max_new_tokens, longest // 2)
        turns, hits = self.turns[self.forgotten :], list(hits)
        while True:
            asked = Message("user", prompt_with_passages(question, hits))
            ids = self._prompt([*self._system, *turns, asked])
            if len(ids) <= longest - room or (not turns and not hits and len(ids) < longest):
                break
            if turns:
                turns = turns[2:]
            elif hits:
                hits.pop()
            else:
                raise UserError(
                    f"the question is {len(ids)} tokens long in its template and the model's max_seq_len is {longest}: "
                    "shorten it"
                )
        self.forgotten = len(self.turns) - len(turns)
        return ids, hits

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        try:
            for message in messages:
                check_encodable(message.content, "what was said")
            ids: list[int] = self._encoder.encode_prompt(tuple(messages)).tolist()
        except InvalidRow as misfit:
            raise UserError(str(misfit)) from misfit
        return ids
