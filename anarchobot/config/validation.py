"""Validation across settings: combinations that the types of single settings cannot rule out."""

from collections.abc import Iterator

from anarchobot.config.errors import did_you_mean
from anarchobot.config.schema import Config, DistillationConfig, LoraConfig, ModelConfig, RopeScaling, Section

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WITH_ORIGINAL = ("factor", "original_max_seq_len")
SCALING_KEYS = {  # the keys of model.rope_scaling that each type uses
    "linear": ("factor",),
    "llama3": (*_WITH_ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": (*_WITH_ORIGINAL, "beta_fast", "beta_slow", "truncate", "attention_factor"),
    "longrope": (*_WITH_ORIGINAL, "attention_factor", "short_factor", "long_factor"),
}
REWARD_KEYS = ("regex", "json_schema", "function")  # the rewards of the same names use them
RUN_LENGTH_KEYS = ("train.total_steps", "train.epochs", "train.token_budget")


def untrained_distances(config: Config) -> str | None:
    """A warning, with `; ` before the remedy, if a model that is trained from random weights may see tokens further
    apart than any training sequence is long: what it writes from there on is bad."""
    model, seq_len = config.model, config.data.seq_len
    reach = min(model.max_seq_len, max(window or model.max_seq_len for window in model.windows))
    if config.train.init_from is not None or reach <= seq_len:
        return None
    return (
        f"data.seq_len ({seq_len}) is less than model.max_seq_len ({model.max_seq_len}): the model will write poorly "
        f"after {seq_len} tokens; set model.sliding_window: {seq_len}, or model.max_seq_len: {seq_len}"
    )


def conflicts(config: Config, given: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (conflicting keys, what is wrong and how to fix it).

    `given` holds the dotted keys that were set to a value other than null, in the order in which they were set.
    """
    model, data, train = config.model, config.data, config.train

    if model.head_dim is None and model.d_model % model.n_heads:
        yield (
            ("model.d_model", "model.n_heads"),
            f"d_model ({model.d_model}) must be divisible by n_heads ({model.n_heads}), or set head_dim",
        )
    elif model.head_size % 2:
        yield (
            ("model.head_dim",) if model.head_dim else ("model.d_model", "model.n_heads"),
            f"the head width ({model.head_size}) must be even: rotary embeddings rotate pairs",
        )
    if model.n_heads % model.kv_heads:
        yield (
            ("model.n_kv_heads", "model.n_heads"),
            f"n_heads ({model.n_heads}) must be divisible by n_kv_heads ({model.kv_heads})",
        )
    yield from _attention_conflicts(model)
    if model.hf_config is not None and model.architecture == "llama":
        yield ("model.hf_config", "model.architecture"), "has no effect with architecture: llama: remove it"
    if model.bos_id is not None and model.bos_id >= model.vocab_size:
        yield (
            ("model.bos_id", "model.vocab_size"),
            f"bos_id ({model.bos_id}) must be below model.vocab_size ({model.vocab_size})",
        )
    if data.seq_len > model.max_seq_len:
        yield (
            ("data.seq_len", "model.max_seq_len"),
            f"data.seq_len ({data.seq_len}) must be at most model.max_seq_len ({model.max_seq_len})",
        )
    if data.max_chars is not None and data.max_chars < data.min_chars:
        yield (
            ("data.max_chars", "data.min_chars"),
            f"max_chars ({data.max_chars}) must be at least min_chars ({data.min_chars})",
        )
    for weights_key, names_key in (("weights", "dataset"), ("shard_weights", "shard_dir")):
        weights, names = getattr(data, weights_key), getattr(data, names_key)
        count = len(names) if isinstance(names, list) else 1
        if weights is not None and len(weights) != count:
            yield (
                (f"data.{weights_key}", f"data.{names_key}"),
                f"expected one weight per {names_key} entry ({count}), got {len(weights)}",
            )
    if (data.score_field is None) != (data.score_min is None):
        missing = "score_min" if data.score_min is None else "score_field"
        yield ("data.score_field", "data.score_min"), f"requires data.{missing}"

    lengths = [key for key in given if key in RUN_LENGTH_KEYS]
    if len(lengths) > 1:
        yield tuple(lengths), f"the run length is set more than once: keep one of {', '.join(lengths)}"
    if train.min_lr > train.lr:
        yield ("train.min_lr", "train.lr"), f"min_lr ({train.min_lr:g}) must be at most lr ({train.lr:g})"
    if train.lr_decay_steps is not None and train.lr_decay_steps <= train.warmup_steps:
        yield (
            ("train.lr_decay_steps", "train.warmup_steps"),
            f"lr_decay_steps ({train.lr_decay_steps}) must be above warmup_steps ({train.warmup_steps})",
        )
    if train.trainable == "embeddings" and config.lora.r is not None:
        yield ("train.trainable", "lora.r"), "cannot be combined: remove lora.r or train.trainable"
    if model.architecture == "mlx_lm":
        if data.document_mask:
            yield ("data.document_mask",), "models that mlx-lm computes have no mask of documents: set it to false"
        if train.technique != "auto":
            yield ("train.technique",), "has no effect on models that mlx-lm computes: remove it"
        if config.lora.adapter_format == "peft":
            yield ("lora.adapter_format",), "peft: these adapters have mlx-lm's names: set it to mlx"
    yield from _lora_conflicts(config)
    yield from _grpo_conflicts(config)
    if train.teacher is None and (changed := _changed(config.distillation, DistillationConfig())):
        yield (
            tuple(f"distillation.{key}" for key in changed),
            "has no effect without train.teacher: set it, or remove the distillation section",
        )
    if train.teacher is not None and config.distillation.top_k > model.vocab_size:
        yield (
            ("distillation.top_k", "model.vocab_size"),
            f"top_k ({config.distillation.top_k}) must be at most model.vocab_size ({model.vocab_size})",
        )


def _attention_conflicts(model: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Like `conflicts`, of the settings of rotary embeddings and sliding windows."""
    scaling = model.rope_scaling
    used = () if scaling.type is None else SCALING_KEYS[scaling.type]
    for key, info in RopeScaling.model_fields.items():
        if key not in ("type", *used) and getattr(scaling, key) != info.default:
            without = "without type: set it" if scaling.type is None else f"with type: {scaling.type}: remove it"
            yield (f"model.rope_scaling.{key}",), f"has no effect {without}"
        if key in ("original_max_seq_len", "short_factor", "long_factor") and key in used and not getattr(scaling, key):
            yield ("model.rope_scaling.type",), f"{scaling.type} requires {key}"
    for key in ("short_factor", "long_factor"):
        factors = getattr(scaling, key)
        if factors and len(factors) != model.rotary_size // 2:
            yield (
                (f"model.rope_scaling.{key}",),
                f"{key} must have one number per rotated pair ({model.rotary_size // 2}), but has {len(factors)}",
            )
    if scaling.type == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (
            ("model.rope_scaling.high_freq_factor", "model.rope_scaling.low_freq_factor"),
            f"high_freq_factor ({scaling.high_freq_factor:g}) must be above low_freq_factor "
            f"({scaling.low_freq_factor:g})",
        )
    if scaling.type == "yarn" and model.rope_theta <= 1:
        yield (
            ("model.rope_scaling.type", "model.rope_theta"),
            f"yarn requires rope_theta ({model.rope_theta:g}) above 1",
        )
    if model.rotary_fraction < 1 and (model.rotary_size % 2 or model.rotary_size == 0):
        yield (
            ("model.rotary_fraction",),
            f"the rotated part of a head ({model.rotary_size} of {model.head_size}) must be even and above 0: rotary "
            "embeddings rotate pairs",
        )
    if model.layer_types is not None and len(model.layer_types) != model.n_layers:
        yield (
            ("model.layer_types", "model.n_layers"),
            f"layer_types must have one entry per block ({model.n_layers}), but has {len(model.layer_types)}",
        )
    if "sliding_attention" in (model.layer_types or ()) and model.sliding_window is None:
        yield ("model.layer_types",), "sliding_attention requires model.sliding_window"
    for key in ("sliding_window", "rope_local_theta"):
        if getattr(model, key) is not None and not any(model.windows):
            yield (f"model.{key}",), "has no effect: no block has a sliding window"


def _lora_conflicts(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    lora, model = config.lora, config.model
    names = [] if lora.target_modules == "auto" else lora.target_modules
    for name in names if model.architecture == "llama" else ():  # others: model/lora.py
        if name in ("fc1", "fc2"):
            yield ("lora.target_modules",), f"'{name}': the MLP is gated; use gate_proj, up_proj or down_proj"
        elif name not in PROJECTIONS:
            hint = did_you_mean(name, PROJECTIONS) or f"; expected {', '.join(PROJECTIONS)}"
            yield ("lora.target_modules",), f"unknown matrix '{name}'{hint}"
    if len(set(names)) < len(names):
        yield ("lora.target_modules",), "duplicate name"
    if lora.num_layers is not None and lora.num_layers > model.n_layers:
        yield (
            ("lora.num_layers", "model.n_layers"),
            f"num_layers ({lora.num_layers}) must be at most model.n_layers ({model.n_layers})",
        )
    if lora.quantize is not None and model.d_model % 64:
        yield (
            ("lora.quantize", "model.d_model"),
            f"quantization requires d_model ({model.d_model}) to be a multiple of 64: remove lora.quantize",
        )
    if lora.r is None and (changed := _changed(lora, LoraConfig())):
        yield (
            tuple(f"lora.{key}" for key in changed),
            "has no effect without lora.r: set it (such as lora.r=8), or remove the lora section",
        )


def _grpo_conflicts(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    grpo, data = config.grpo, config.data
    rewards = grpo.rewards or []
    if len(set(rewards)) < len(rewards):
        yield ("grpo.rewards",), "duplicate name"
    for key in REWARD_KEYS:
        if getattr(grpo, key) is None and key in rewards:
            yield ("grpo.rewards",), f"{key} requires grpo.{key}"
        if getattr(grpo, key) is not None and key not in rewards:
            yield (f"grpo.{key}",), f"has no effect without {key} in grpo.rewards"
    if grpo.reward_weights is not None and len(grpo.reward_weights) != len(rewards):
        yield (
            ("grpo.reward_weights", "grpo.rewards"),
            f"expected one weight per reward ({len(rewards)}), got {len(grpo.reward_weights)}",
        )
    if rewards and grpo.max_completion_length >= data.seq_len:
        yield (
            ("grpo.max_completion_length", "data.seq_len", "grpo.rewards"),
            f"max_completion_length ({grpo.max_completion_length}) must be below data.seq_len ({data.seq_len}), which "
            "includes the prompt",
        )
    sequences = config.train.micro_batch_size * config.train.grad_accum_steps
    if rewards and sequences % grpo.num_generations:
        yield (
            ("train.micro_batch_size", "train.grad_accum_steps", "grpo.num_generations", "grpo.rewards"),
            f"completions per step, micro_batch_size x grad_accum_steps ({sequences}), must be a multiple of "
            f"num_generations ({grpo.num_generations})",
        )


def _changed(section: Section, defaults: Section) -> list[str]:
    """The keys of `section` whose values are not the default."""
    return [key for key in type(section).model_fields if getattr(section, key) != getattr(defaults, key)]
