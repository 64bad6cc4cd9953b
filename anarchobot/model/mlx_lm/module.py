"""mlx-lm's modules as functions of a flat dict of parameters.

A module is built from the text of its config.json (model.hf_config) with random values that are never computed. During
a call, its arrays are replaced with the caller's (`Network.bound`). Where these have an entry NAME.scales, the layer
NAME is quantized; where they have NAME.lora_a, it has an adapter (model/mlx_lm/adapters.py).

Every model of mlx-lm ends in a head that turns hidden states into logits, perhaps scaled or capped. To compute the
logits in chunks of tokens, a call is split at the submodule whose output is the input of the head: the blocks with
their last norm (`model`, `transformer`, `backbone`) or, where these include the head, the last norm. MLX is lazy: what
is not used is not computed. So the hidden states are the output of this submodule in a call of the whole module, and
the logits of given hidden states are a call in which they replace this output.

Shapes: B rows, L tokens, N = B L, D width of the hidden states, V vocabulary.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module as BaseModule
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.mlx_lm.adapters import AdapterDropout, make_adaptable
from anarchobot.model.mlx_lm.checkpointing import Entry, Recomputation, make_recomputable
from anarchobot.model.mlx_lm.corrections import correct
from anarchobot.model.step_options import MicroBatch

NOTES = "anarchobot"  # key in model.hf_config of what the weights told (model/mlx_lm/folder.py)
MAX_NETWORKS = 4
Module = Any  # of mlx.nn, which has no types
_UNUSABLE = object()  # any computation with it raises an exception
_thread = threading.local()  # arrays of a module belong to the thread that built it


def network(model: ModelConfig, params: Params) -> "Network":
    """The module for parameters with these quantized layers, cached. Raises UserError if mlx-lm can't build it."""
    assert model.hf_config is not None
    packed = (name.removesuffix(".scales") for name in params if name.endswith(".scales"))
    key = model.hf_config, tuple((path, *_packed_shapes(params, path)) for path in packed)
    cache: dict[Any, Network] = _thread.__dict__.setdefault("networks", {})
    if key not in cache:
        for oldest in list(cache)[: 1 - MAX_NETWORKS]:
            del cache[oldest]
        cache[key] = Network(model.hf_config, params)
    return cache[key]


def _packed_shapes(params: Params, path: str) -> tuple[Any, ...]:
    scales = params[f"{path}.scales"]
    return params[f"{path}.weight"].shape, scales.shape, str(scales.dtype), f"{path}.global_scale" in params


class Network:
    """A module of mlx-lm. Not thread-safe: a call replaces its arrays.

    `shapes` has the parameters by name; `owners` the submodules by path; `adaptable` the shapes of the weights of
    linear layers by path, without quantization; `block_paths` the path of each block, such as "model.layers.0".
    """

    def __init__(self, hf_config: str, params: Params) -> None:
        self.module = _build(hf_config)
        _quantize(self.module, params)
        correct(self.module, json.loads(hf_config))
        self.module.eval()
        self.shapes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in flatten(self.module).items()}
        self.owners: dict[str, Module] = dict(self.module.named_modules())
        self._blocks: list[Module] = list(self.module.layers)
        paths = {id(submodule): path for path, submodule in self.owners.items()}
        self.block_paths = [paths[id(block)] for block in self._blocks]
        predicate = getattr(self.module, "cast_predicate", None)
        self._may_cast: Callable[[str], bool] = predicate if predicate is not None else lambda name: True
        self.dropout, self._recomputation = AdapterDropout(), Recomputation()
        paths_in_order = dict.fromkeys(name.rpartition(".")[0] for name in self.shapes)
        self.adaptable = make_adaptable({path: self.owners[path] for path in paths_in_order}, self.dropout)
        make_recomputable(self._blocks, self._recomputation)
        for submodule in self.owners.values():  # rotary frequencies and the like: a compiled function may use them
            mx.eval([x for key, x in submodule.items() if key.startswith("_") and isinstance(x, mx.array)])
        self._find_head(hf_config)

    def keeps_dtype(self, name: str) -> bool:
        """Whether mlx-lm never casts this parameter."""
        return not self._may_cast(name)

    def block_of(self, name: str) -> int | None:
        """The number of the block that a parameter or layer is in."""
        return next((i for i, path in enumerate(self.block_paths) if name.startswith(f"{path}.")), None)

    # ---- Calls ----

    @contextmanager
    def bound(self, params: Params) -> Iterator["Network"]:
        """Puts `params` into the module; afterwards nothing in it refers to them."""
        before: list[tuple[Module, str, Any]] = []
        try:
            for name, array in params.items():
                owner, key = self._entry(name)
                before.append((owner, key, owner.get(key)))
                dict.__setitem__(owner, key, array)
            yield self
        finally:
            for owner, key, array in reversed(before):
                if array is None:
                    dict.pop(owner, key)
                else:
                    dict.__setitem__(owner, key, array)

    @contextmanager
    def training(self, batch: MicroBatch, recomputed: Iterable[str] | None) -> Iterator[None]:
        """Selects operations that have gradients, and dropout. With `recomputed`, the names of the trained parameters,
        blocks are computed again when MLX needs their gradients, which must be in this context too."""
        entries: dict[int, list[Entry]] = {id(block): [] for block in self._blocks}
        for name in recomputed or ():
            if (block := self.block_of(name)) is not None:
                entries[id(self._blocks[block])].append(self._entry(name))
        try:
            self.module.train()
            self.dropout.key, self.dropout.rate = batch.dropout_key, batch.adapter_dropout
            self._recomputation.trained = None if recomputed is None else entries
            yield
        finally:
            self.module.eval()
            self.dropout.key = self._recomputation.trained = None

    def _entry(self, name: str) -> Entry:
        path, _, key = name.rpartition(".")
        return self.owners[path], key

    def hidden_states(self, tokens: mx.array, caches: Sequence[Any] | None = None) -> mx.array:
        """The input of the head [B, L, D], with the arrays that are bound."""
        hidden: mx.array = self._call_recording(tokens, caches)[1]
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """The logits [N, V] of hidden states [N, D], with the arrays that are bound."""
        with self._replaced(lambda *args, **kwargs: hidden[None]):
            out: mx.array = self.module(mx.zeros((1, 1), mx.int32))
        return out[0]

    @cached_property
    def can_batch(self) -> bool:
        """Whether merged caches of two rows of different lengths can be used. Nothing is computed."""
        from mlx_lm.models.cache import make_prompt_cache

        rows: list[list[Any]] = [make_prompt_cache(self.module) for _ in range(2)]
        try:
            for length, caches in enumerate(rows, start=1):
                self.hidden_states(mx.zeros((1, length), mx.int32), caches)
            merged = [one.merge([one, other]) for one, other in zip(*rows, strict=True)]
            self.hidden_states(mx.zeros((2, 1), mx.int32), merged)
            for cache in merged:
                cache.extend(cache.extract(0).merge([cache.extract(0)]))
                cache.filter([0, 2])
        except Exception:  # no such method, or whatever a module raises
            return False
        return True

    # ---- The head ----

    def _find_head(self, hf_config: str) -> None:
        """Finds the submodule whose output is the input of the head, the widths, and the parameters of the head."""
        tokens = mx.zeros((1, 2), mx.int32)
        try:
            path = self.block_paths[0].rpartition(".")[0]
            while path and path not in self.owners:  # from "model.layers", a list, to "model"
                path = path.rpartition(".")[0]
            if path:
                parent, _, self._key = path.rpartition(".")
                self._parent = self.owners[parent]
                logits, hidden = self._call_recording(tokens)
            if not path or logits is hidden:
                self._parent, self._key = self.owners[path], self._last_before_head(self.owners[path], tokens)
                logits, hidden = self._call_recording(tokens)
            self.d_model, self.vocab_size = hidden.shape[-1], logits.shape[-1]
        except Exception as error:  # whatever a module raises
            raise UserError(
                f"config.json: mlx-lm's {json.loads(hf_config)['model_type']} can't be split into blocks and head: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        outside = [name for name in self.shapes if self.block_of(name) is None]
        self.head_names = [name for name in outside if self._is_used_by_head(name)]

    def _call_recording(self, tokens: mx.array, caches: Sequence[Any] | None = None) -> tuple[Any, Any]:
        """Returns the output of the module and that of the submodule before the head."""
        outputs: list[Any] = []
        target = self._parent[self._key]

        def record(*args: Any, **kwargs: Any) -> Any:
            outputs.append(target(*args, **kwargs))
            return outputs[-1]

        with self._replaced(record):
            return self.module(tokens, cache=caches), outputs[-1]

    def _last_before_head(self, owner: Module, tokens: mx.array) -> str:
        """The name of the child of `owner` that is called last, except for a head, whose output is the module's."""
        calls: list[tuple[str, Any]] = []
        children = {key: child for key, child in owner.items() if isinstance(child, BaseModule)}

        def recording(key: str) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                calls.append((key, children[key](*args, **kwargs)))
                return calls[-1][1]

            return record

        try:
            for key, child in children.items():
                dict.__setitem__(owner, key, _Stub(child, recording(key)))
            logits = self.module(tokens)
        finally:
            dict.update(owner, children)
        found: str = next(key for key, output in reversed(calls) if output is not logits)
        return found

    def _is_used_by_head(self, name: str) -> bool:
        """Whether the head fails without this parameter."""
        owner, key = self._entry(name)
        array, in_head = owner[key], False

        def enter_head(*args: Any, **kwargs: Any) -> mx.array:
            nonlocal in_head
            in_head = True
            dict.__setitem__(owner, key, _UNUSABLE)
            return mx.zeros((1, 1, self.d_model))

        try:
            with self._replaced(enter_head):
                self.module(mx.zeros((1, 1), mx.int32))
        except Exception:
            return in_head
        finally:
            dict.__setitem__(owner, key, array)
        return False

    @contextmanager
    def _replaced(self, call: Callable[..., Any]) -> Iterator[None]:
        target = self._parent[self._key]
        dict.__setitem__(self._parent, self._key, _Stub(target, call))
        try:
            yield
        finally:
            dict.__setitem__(self._parent, self._key, target)


class _Stub:
    """Stands for a submodule: has its attributes, but another call."""

    def __init__(self, target: Module, call: Callable[..., Any]) -> None:
        self._target, self._call = target, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __getitem__(self, name: str) -> Any:
        return self._target[name]

    def __contains__(self, name: str) -> bool:
        return name in self._target


def flatten(module: Module) -> dict[str, mx.array]:
    """The parameters of a module by name."""
    flat: Any = tree_flatten(module.parameters())
    return dict(flat)


def _build(hf_config: str) -> Module:
    """Builds the module of a config.json, without quantization."""
    from mlx_lm.utils import _get_classes  # a slow import

    values = json.loads(hf_config)
    try:
        model_class, args_class = _get_classes(values)
        module: Module = model_class(args_class.from_dict(values))
        absent = values.get(NOTES, {}).get("absent", ())
        if absent and hasattr(module, "sanitize"):  # which also adapts the module to what is absent: Gemma 3's head
            arrays = flatten(module)
            module.sanitize({name: array for name, array in arrays.items() if name not in absent})
    except Exception as error:  # whatever a module raises for a config that it can't use
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"config.json: mlx-lm can't build a {values.get('model_type')} from it: {problem}") from error
    return module


def _quantize(module: Module, params: Params) -> None:
    """Quantizes the layers that have scales in `params`, in the form that the shapes of their arrays tell."""
    from mlx_lm.utils import infer_quant_config

    def settings(path: str, layer: Module) -> bool | dict[str, Any]:
        if not hasattr(layer, "to_quantized") or f"{path}.scales" not in params:
            return False
        found: dict[str, Any] = infer_quant_config(path, layer, params)
        return found | ({"global_scale": True} if f"{path}.global_scale" in params else {})

    quantize(module, class_predicate=settings)
