"""A model as EleutherAI's lm-evaluation-harness wants it (`lm_eval`, an extra)."""

from collections.abc import Iterable
from typing import Any

from lm_eval.api.model import TemplateLM

from anarchobot.config.schema import GenerationConfig
from anarchobot.evaluation.likelihood import Ids, likelihoods, rolling
from anarchobot.inference.generation import TextBatch
from anarchobot.inference.model import Model

MOST_TOKENS = 256  # generated where a task says nothing


class HarnessModel(TemplateLM):  # type: ignore[misc]  # it has no types
    """Every context begins as documents did in training, with an end of document (or model.bos_id); so a text is scored
    from its first token on. It is what the harness's own Hugging Face model does with add_bos_token=True."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        return self._model.begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self._model.tokenizer.encode_batch([string])[0].tolist()
        return ids if add_special_tokens is False else [self._model.begin, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """A continuation longer than max_seq_len is taken for a text that goes on from the context's last token."""
        most = self._model.shape.max_seq_len
        return self._of_windows(
            [(context, own)] if len(own) <= most else list(rolling(own, context[-1], most))
            for _, context, own in requests
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text."""
        texts = (self.tok_encode(request.args[0], add_special_tokens=False) for request in requests)
        most = self._model.shape.max_seq_len
        return [nats for nats, _ in self._of_windows(list(rolling(ids, self._model.begin, most)) for ids in texts)]

    def _of_windows(self, requests: Iterable[list[tuple[Ids, Ids]]]) -> list[tuple[float, bool]]:
        """Of each list of windows, the sum, and whether all are greedy."""
        of_each = list(requests)
        found = iter(likelihoods(self._model, [window for windows in of_each for window in windows]))
        parts = [[next(found) for _ in windows] for windows in of_each]
        return [(sum(one.log_prob for one in part), all(one.is_greedy for one in part)) for part in parts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        batch = TextBatch(self._model)
        texts: dict[int, list[str]] = {}
        most = self._model.shape.max_seq_len
        for context, how in (request.args for request in requests):
            settings = _settings(how, most)
            ids = [self._model.begin, *self.tok_encode(context, add_special_tokens=False)]
            texts[batch.insert(ids[-(most - settings.max_new_tokens) :], settings, {self.eot_token_id})] = []
        while batch:
            for piece in batch.step():
                texts[piece.request].append(piece.text)
        return ["".join(parts) for parts in texts.values()]


def _settings(how: dict[str, Any], max_seq_len: int) -> GenerationConfig:
    """A task's `generation_kwargs`, in Hugging Face's words."""
    until = how.get("until") or []
    temperature = how.get("temperature") or 0.0
    drawn = how.get("do_sample", temperature > 0) and temperature > 0
    return GenerationConfig(
        method="nucleus" if drawn else "greedy",
        temperature=temperature if drawn else 1.0,
        top_p=how.get("top_p", 1.0),
        stop=[until] if isinstance(until, str) else until,
        max_new_tokens=min(how.get("max_gen_toks", MOST_TOKENS), max_seq_len - 1),
    )
