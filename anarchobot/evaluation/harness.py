"""Adapter for EleutherAI's lm-evaluation-harness (`lm_eval`, the `harness` extra)."""

from typing import Any

from lm_eval.api.model import TemplateLM
from pydantic import ValidationError

from anarchobot.config.errors import UserError, first_problem
from anarchobot.config.schema import GenerationConfig
from anarchobot.evaluation.loglikelihood import loglikelihoods
from anarchobot.inference.generation import TextBatch, prompt_ids
from anarchobot.inference.model import Model

DEFAULT_MAX_TOKENS = 256  # generated when a task sets no limit
MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of the limit
SETTINGS = ("until", "temperature", "do_sample", "top_k", "top_p", "min_p", "repetition_penalty", *MAX_TOKENS)
NEUTRAL: dict[str, Any] = {"num_beams": 1, "use_cache": True, "early_stopping": False}  # they change nothing here


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval is untyped
    """Every context starts with the end-of-document token (or model.bos_id), as documents do in training, so the first
    token of a text is scored too. The harness's Hugging Face model does the same with add_bos_token=True."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model
        self.unused: dict[str, Any] = {}  # settings of the tasks that have no effect

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        return self._model.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self._model.tokenizer.encode_batch([_checked(string)])[0].tolist()
        return ids if add_special_tokens is False else prompt_ids(self._model, string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return list(loglikelihoods(self._model, [(context, ids) for _, context, ids in requests]))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return [score.log_prob for score in loglikelihoods(self._model, [([self._model.bos_id], ids) for ids in texts])]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        batch = TextBatch(self._model)
        texts: dict[int, list[str]] = {}
        limit = self._model.config.max_seq_len
        for context, task_settings in (request.args for request in requests):
            settings = _generation_config(task_settings, limit)
            self.unused |= {
                name: value
                for name, value in task_settings.items()
                if name not in SETTINGS and value is not None and value != NEUTRAL.get(name)
            }
            ids = prompt_ids(self._model, _checked(context))[-(limit - settings.max_new_tokens) :]
            texts[batch.insert(ids, settings, self._model.tokenizer.stop_ids)] = []
        while batch:
            for chunk in batch.step():
                texts[chunk.request].append(chunk.text)
        return ["".join(parts) for parts in texts.values()]


def _checked(text: str) -> str:
    """Raises UserError for surrogates, which JSON can hold and no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"a text of the task is not valid Unicode: {error}") from error
    return text


def _generation_config(task_settings: dict[str, Any], max_seq_len: int) -> GenerationConfig:
    """From a task's `generation_kwargs`, which use Hugging Face's names. Raises UserError for invalid values."""
    try:
        until = task_settings.get("until") or []
        limits = [task_settings[name] for name in MAX_TOKENS if task_settings.get(name) is not None]
        temperature = task_settings.get("temperature") or 0.0
        sampled = task_settings.get("do_sample", temperature != 0) and temperature != 0
        return GenerationConfig(
            method="combined" if sampled else "greedy",
            temperature=temperature if sampled else 1.0,
            top_k=max(0, task_settings.get("top_k") or 0),
            top_p=task_settings.get("top_p", 1.0),
            min_p=task_settings.get("min_p") or 0.0,
            repetition_penalty=task_settings.get("repetition_penalty") or 1.0,
            stop=[text for text in ([until] if isinstance(until, str) else until) if text],
            max_new_tokens=min(int(next(iter(limits), DEFAULT_MAX_TOKENS)), max_seq_len - 1),
        )
    except ValidationError as error:
        raise UserError(f"generation_kwargs of the task: {first_problem(error)}, got {task_settings}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"generation_kwargs of the task: {error}, got {task_settings}") from error
