"""Speculative decoding: a small draft model proposes the next tokens, and the model computes them in one pass, which
takes little longer than for one token (Leviathan et al., 2023: https://arxiv.org/abs/2211.17192).

Texts are the same as without a draft model, sampled ones too. A draw is a function of the logits, the seed and the
position (sampling.py), so both models draw with the same noise, and a proposal is accepted if it is the token that the
model itself draws (Daliri et al., 2024: https://arxiv.org/abs/2408.07978). Where the two distributions have a distance
of d (total variation), at least (1 - d) / (1 + d) of the proposals are accepted; rejection sampling accepts 1 - d.

Products of several tokens may be rounded differently than those of one. Where that decides, as between tokens that are
equally likely within rounding, texts may differ.
"""

import copy
from collections import deque
from typing import Any

import mlx.core as mx
import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.inference.batching import MAX_ROWS, PREFILL_TOKENS, Batch, Row
from anarchobot.inference.model import Model, load_model
from anarchobot.inference.prefixes import KeptPrefixes, shared_start
from anarchobot.inference.sampling import sample
from anarchobot.model.architecture import forward_pass
from anarchobot.model.frozen import compute_dtype
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.loss import logits
from anarchobot.numerics.eval_order import unordered
from anarchobot.tokenizers.canonical_tokens import canonical_tokens


class Draft:
    """A draft model, and the keys and values of the text that it saw last. Counts the tokens that were `proposed` and
    those that were `accepted`. Not thread-safe."""

    def __init__(self, model: Model, num_tokens: int = 3) -> None:
        """`num_tokens`: how many to propose at once; the default is mlx-lm's. Raises UserError if tokens can't be
        removed from its caches."""
        self._params, self._model, self._num_tokens = model.params, model.config, num_tokens
        self._forward, self._dtype = forward_pass(model.config), compute_dtype(model.params)
        self._caches = self._forward.make_caches(model.params, model.config, trimmable=True)
        self._ids = np.array([], np.int32)  # tokens whose keys and values are in the caches
        self.proposed = self.accepted = 0

    def propose(self, row: Row, ids: list[int]) -> list[int]:
        """Likely next tokens after `ids`, the prompt and text of `row`, with its penalties and its noise."""
        count = min(self._num_tokens, row.limit - row.sampled - 1, self._model.max_seq_len + 1 - len(ids))
        if count < 1:
            return []
        shared = shared_start(self._ids, np.array(ids, np.int32))
        self._ids = self._ids[:shared]  # true even if this is interrupted
        for cache in self._caches:
            cache.trim(cache.offset - shared)
        for start in range(shared, len(ids), PREFILL_TOKENS):
            z = self._last_logits(mx.array([ids[start : start + PREFILL_TOKENS]]))
            mx.eval([cache.state for cache in self._caches])
        penalties, tokens = copy.copy(row.penalties), list[mx.array]()
        for i in range(count):
            tokens.append(sample(penalties.apply(z), [row.settings], [row.sampled + i]))
            penalties.add(tokens[i])
            if i + 1 < count:
                z = self._last_logits(tokens[i][None])
        proposals: list[int] = np.array(mx.concatenate(tokens)).tolist()
        self._ids = np.array([*ids, *proposals[:-1]], np.int32)
        return proposals

    def _last_logits(self, tokens: mx.array) -> mx.array:
        """Returns float32 logits [1, V] of the token after tokens [1, L]."""
        hidden = self._forward.hidden_states(
            self._params, tokens, self._model, dtype=self._dtype, caches=self._caches, wait=unordered
        )
        return logits(hidden[:, -1], self._params, self._model)[:, : self._model.vocab_size]


def load_draft(path: str, model: Model, num_tokens: int) -> Draft:
    """Loads a draft model for `model`. Raises UserError for another vocabulary, and like load_model and Draft."""
    draft, _ = load_model(path)
    same = draft.config.vocab_size == model.config.vocab_size
    if not same or canonical_tokens(draft.tokenizer) != canonical_tokens(model.tokenizer):
        raise UserError(
            f"--draft-model {path}: its vocabulary is not that of the model: choose a model with the same tokenizer, "
            "or leave it out"
        )
    return Draft(draft, num_tokens)


class SpeculativeBatch(Batch):
    """A batch with a draft model, which is used while a single request runs, unless it has a constraint."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        max_rows: int = MAX_ROWS,
        *,
        draft: Draft,
        prefixes: KeptPrefixes | None = None,
    ) -> None:
        super().__init__(params, model, max_rows, prefixes=prefixes)
        self._draft = draft
        self._ahead: deque[mx.array] = deque()  # tokens [1] of the only row, after self._next

    def _advance(self, tokens: mx.array) -> None:
        row = self._rows[0]
        if len(self._rows) > 1 or row.constraint is not None:
            super()._advance(tokens)
            return
        if not self._ahead and row.sampled < row.limit:
            self._sample_ahead(row, tokens)
        if self._ahead:
            self._next = self._ahead.popleft()

    def _sample_ahead(self, row: Row, tokens: mx.array) -> None:
        """Samples the tokens after `tokens` [1], up to the first one that was not proposed."""
        ids = [*row.prompt, *row.read, *np.array(tokens).tolist()]
        proposals = self._draft.propose(row, ids)
        z = self._last_logits(mx.array([[ids[-1], *proposals]]), self._caches, [row], len(proposals) + 1)
        for i in range(len(proposals) + 1):
            self._ahead.append(self._sample(z[i : i + 1], [row]))
            if i == len(proposals) or self._ahead[-1].item() != proposals[i]:
                break
        for cache in self._caches:
            cache.trim(len(proposals) - i)
        self._draft.proposed += len(proposals)
        self._draft.accepted += i

    def _prefill(self) -> None:
        if not self._ahead:  # otherwise the caches of the only row hold more than its text so far
            super()._prefill()

    def _new_caches(self) -> list[Any]:
        return self._forward.make_caches(self._params, self._model, trimmable=True)

    def _keep(self, indices: list[int]) -> None:
        super()._keep(indices)
        if not self._rows:
            self._ahead.clear()
