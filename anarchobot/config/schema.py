"""Every setting of every command except `adapt-vocab` (adapt_schema.py), with its type, default and description.

The loader's checks, command-line overrides, the JSON Schema and docs/configuration.md are derived from these classes.
No other code defines settings.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from anarchobot.config.paths import find_path


def _float_to_int(value: Any) -> Any:
    """Accepts `5e4` where an integer is expected; any other value is left to the type check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


INTEGER = BeforeValidator(_float_to_int)
# Bounds must come before the validator; after it, they would be missing from the JSON Schema.
Count = Annotated[int, Field(ge=0), INTEGER]
Seed = Annotated[int, Field(ge=0, lt=2**32), INTEGER]
Positive = Annotated[int, Field(ge=1), INTEGER]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2)]  # OpenAI's range
if TYPE_CHECKING:
    PositiveOrAuto = int  # the type after validation: TrainConfig replaces "auto" with a number
else:
    PositiveOrAuto = Positive | Literal["auto"]
Names = Annotated[list[str], Field(min_length=1)]
PathName = Annotated[str, AfterValidator(find_path)]  # ~ is the home folder
PathNames = Annotated[list[PathName], Field(min_length=1)]
Weights = Annotated[list[PositiveFloat], Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
LogTo = Annotated[list[Literal["tensorboard", "wandb", "trackio", "mlflow"]], BeforeValidator(_as_list)]
RewardName = Literal["exact_match", "number", "regex", "json_schema", "function"]
RewardNames = Annotated[list[RewardName], Field(min_length=1), BeforeValidator(_as_list)]


class Alias(NamedTuple):
    """The current key of a renamed setting. For a former boolean, `values` holds what false and true stand for."""

    key: str
    values: tuple[Any, Any] | None = None


class Removed(NamedTuple):
    """A former switch, off in all that is computed now: what to do where it is on, and whether the weights of a
    checkpoint then depend on it."""

    remedy: str
    in_weights: bool = False


class Section(BaseModel):
    """Base class of all sections: no unknown keys, no implicit conversion ('3' is not 3), immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    aliases: ClassVar[dict[str, Alias]] = {}  # former dotted names that are still accepted; same section
    removed: ClassVar[dict[str, Removed]] = {}  # dotted names; false is still accepted


class RopeScaling(Section):
    """Scaled rotary position embeddings, for contexts longer than the first training's (model/llama/rope.py)."""

    type: Literal["linear", "llama3", "yarn", "longrope"] | None = Field(
        None, description="how the rotary frequencies are scaled; default: off"
    )
    factor: PositiveFloat = Field(1.0, description="ratio of the extended to the original context length")
    original_max_seq_len: Annotated[int, Field(ge=2), INTEGER] | None = Field(
        None, description="context length before scaling; not for linear"
    )
    low_freq_factor: PositiveFloat = Field(1.0, description="llama3: longer wavelengths are divided by factor")
    high_freq_factor: PositiveFloat = Field(4.0, description="llama3: shorter wavelengths are unchanged")
    beta_fast: PositiveFloat = Field(32.0, description="yarn: frequencies with more rotations are unchanged")
    beta_slow: PositiveFloat = Field(1.0, description="yarn: frequencies with fewer rotations are divided by factor")
    truncate: bool = Field(True, description="yarn: round the bounds of the interpolated frequencies to integers")
    attention_factor: PositiveFloat | None = Field(
        None, description="yarn, longrope: multiplies rotated queries and keys; default: computed from factor"
    )
    short_factor: list[PositiveFloat] | None = Field(None, description="longrope: divisors up to the original length")
    long_factor: list[PositiveFloat] | None = Field(None, description="longrope: divisors for longer sequences")


class ModelConfig(Section):
    """The architecture and its dimensions."""

    architecture: Literal["llama", "mlx_lm"] = Field("llama", description="model architecture (model/architecture.py)")
    vocab_size: Positive = Field(32000, description="number of token ids; must match the tokenizer")
    n_layers: Annotated[int, Field(ge=1, le=10_000), INTEGER] = Field(12, description="number of transformer blocks")
    d_model: Positive = Field(768, description="width of the residual stream")
    n_heads: Positive = Field(12, description="number of query heads")
    n_kv_heads: Positive | None = Field(
        None, description="number of key and value heads (grouped-query attention); default: n_heads"
    )
    head_dim: Positive | None = Field(None, description="width of a head, even; default: d_model / n_heads")
    mlp_multiple: PositiveFloat = Field(4.0, description="hidden width of the gated MLP, as a multiple of d_model")
    ffn_activation: Literal["silu", "gelu"] = Field(
        "silu", description="activation of the MLP gate (gelu: tanh approximation)"
    )
    dropout: Fraction = Field(0.1, description="dropout probability on the output of each attention and MLP layer")
    max_seq_len: Positive = Field(4096, description="maximum sequence length in training and generation")
    rope_theta: PositiveFloat = Field(10000.0, description="base of the rotary position embedding frequencies")
    rope_scaling: RopeScaling = RopeScaling()
    rope_local_theta: PositiveFloat | None = Field(
        None, description="rope_theta of layers with a sliding window, which are then unscaled (as in Gemma 3)"
    )
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="fraction of each head's width that is rotated (as in Phi-4)"
    )
    sliding_window: Positive | None = Field(
        None, description="tokens that a token sees, itself included (as in Mistral 7B v0.1); default: all"
    )
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = Field(
        None, description="one per block; default: sliding_attention everywhere if sliding_window is set"
    )
    attention_scale: PositiveFloat | None = Field(
        None, description="multiplies the products of queries and keys; default: 1 / sqrt(head_dim)"
    )
    attention_softcap: PositiveFloat | None = Field(
        None, description="replace attention scores with cap * tanh(scores / cap) (as in Gemma 2); default: off"
    )
    norm_eps: PositiveFloat = Field(1e-5, description="epsilon of RMSNorm")
    post_norms: bool = Field(False, description="normalize the outputs of attention and MLP too (as in Gemma 2 and 3)")
    tie_embeddings: bool = Field(True, description="use the token embedding as the output head")
    qk_norm: bool = Field(False, description="apply RMSNorm to the queries and keys of each head (as in Qwen3)")
    attention_bias: bool = Field(False, description="add biases to queries, keys and values (as in Qwen2)")
    logit_softcap: PositiveFloat | None = Field(
        None, description="replace logits with cap * tanh(logits / cap); default: off; cannot be exported as Llama"
    )
    embedding_scale: PositiveFloat | None = Field(
        None, description="multiply token embeddings by this, such as sqrt(d_model); default: 1"
    )
    bos_id: Annotated[int, Field(ge=-1), INTEGER] | None = Field(
        None, description="token id that starts a text, -1: none (set by `import`); default: the end-of-document id"
    )
    hf_config: str | None = Field(
        None, description="config.json of a model that mlx-lm computes (architecture: mlx_lm); set by `import`"
    )
    quantization: str | None = Field(
        None, description="how the frozen base's matrices are quantized, as in mlx-lm; set from train.init_from"
    )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def mlp_size(self) -> int:
        return round(self.mlp_multiple * self.d_model)

    @property
    def rotary_size(self) -> int:
        """The part of a head's width that is rotated."""
        return int(self.rotary_fraction * self.head_size)

    @property
    def softmax_scale(self) -> float:
        return self.attention_scale or self.head_size**-0.5

    @property
    def windows(self) -> list[int | None]:
        """Each block's sliding window; None: it sees all earlier tokens."""
        types = self.layer_types or ["sliding_attention"] * self.n_layers
        return [self.sliding_window if kind == "sliding_attention" else None for kind in types]


class DataConfig(Section):
    """Where the text comes from and how it is split into training sequences."""

    dataset: PathName | PathNames | None = Field(
        None,
        description="text, JSONL, Parquet, PDF, DOCX, EPUB, HTML or PPTX files, folders, globs, a Hugging Face dataset "
        "name, or 'builtin'",
    )
    weights: Weights | None = Field(
        None, description="mixture weights, one per dataset; the mixture ends when the first dataset is exhausted"
    )
    config: str | None = Field(None, description="configuration of the Hugging Face dataset")
    split: str = Field("train", description="split of the Hugging Face dataset")
    text_field: str = Field("text", description="field that holds the text in JSONL and Hugging Face rows")
    score_field: str | None = Field(None, description="field that holds the quality score of a document")
    score_min: Finite | None = Field(None, description="drop documents with a lower score")
    documents: Literal["file", "paragraphs", "lines"] = Field(
        "file", description="what counts as a document in text files: the whole file, a paragraph, or a line"
    )
    clean: bool = Field(
        False, description="remove control characters, trailing whitespace and the license in Project Gutenberg's books"
    )
    min_chars: Positive = Field(1, description="drop documents with fewer characters")
    max_chars: Positive | None = Field(None, description="drop documents with more characters; default: no limit")
    dedup: bool = Field(True, description="drop exact duplicates of earlier documents")
    near_dedup: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="drop documents with this Jaccard similarity (such as 0.8) to an earlier one; default: off"
    )
    seq_len: Positive = Field(2048, description="tokens per training sequence")
    val_fraction: Fraction = Field(0.01, description="fraction of documents held out for validation")
    shuffle_buffer: Count = Field(
        1000, description="shuffle buffer size in documents for Hugging Face streams; local files keep their order"
    )
    streaming: bool = Field(True, description="stream Hugging Face datasets instead of downloading them first")
    cache_dir: PathName | None = Field(None, description="cache folder for downloaded Hugging Face datasets")
    num_workers: Positive = Field(2, description="tokenizer threads; does not affect the shards")
    shard_dir: PathName | PathNames = Field(
        "shards", description="folder of token shards, as written by pretokenize; a list: train on a mixture"
    )
    shard_weights: Weights | None = Field(
        None, description="mixture weights of the shard folders; default: proportional to size"
    )
    pack: Literal["stream", "documents"] = Field(
        "stream", description="stream: cut the concatenated text into sequences; documents: pack whole documents"
    )
    document_mask: bool = Field(False, description="mask attention across document boundaries")
    fallback: Literal["builtin"] | None = Field(
        None, description="dataset to use, with a warning, when `dataset` is unavailable"
    )

    @property
    def datasets(self) -> list[str]:
        return [self.dataset] if isinstance(self.dataset, str) else self.dataset or []

    @property
    def shard_dirs(self) -> list[str]:
        return [self.shard_dir] if isinstance(self.shard_dir, str) else self.shard_dir


Technique = Literal["blocked", "fused", "sdpa", "autodiff"]


class TrainConfig(Section):
    """The training run: length, batch size, optimizer, precision, checkpoints and logs."""

    total_steps: Positive = Field(
        50000, description="number of optimizer steps; set only one of total_steps, epochs, token_budget"
    )
    epochs: PositiveFloat | None = Field(None, description="length of the run in passes over the training data")
    token_budget: Positive | None = Field(None, description="length of the run in tokens")
    micro_batch_size: PositiveOrAuto = Field(
        1, description="sequences per micro-batch; auto: the most that fit in memory, up to grad_accum_steps"
    )
    grad_accum_steps: Positive = Field(
        4, description="micro-batches per optimizer step; with micro_batch_size auto: sequences per step"
    )
    memory_budget_gb: PositiveFloat | None = Field(
        None, description="memory limit for micro_batch_size auto, in 10^9 bytes; default: 75% of memory"
    )
    optimizer: Literal["muon_adamw", "adamw"] = Field(
        "muon_adamw", description="Muon for the matrices of the blocks and AdamW for the rest, or AdamW only"
    )
    lr: PositiveFloat = Field(3e-4, description="peak learning rate of both optimizers")
    adamw_lr: PositiveFloat | None = Field(
        None, description="peak learning rate of the AdamW parameters in muon_adamw; default: lr"
    )
    min_lr: NonNegativeFloat = Field(3e-5, description="learning rate at the end of the decay")
    warmup_steps: Count = Field(1000, description="steps of linear warmup")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="learning rate schedule; wsd: constant, then linear over the last decay_fraction"
    )
    lr_decay_steps: Positive | None = Field(
        None, description="step at which the learning rate reaches min_lr; default: the last step"
    )
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="wsd only: fraction of lr_decay_steps in which the learning rate decays"
    )
    momentum: Fraction = Field(0.95, description="momentum of Muon, warmed up from 0.85 over 300 steps")
    normuon: bool = Field(True, description="normalize the rows of Muon updates by their second moment (NorMuon)")
    muon_split_heads: bool = Field(True, description="orthogonalize each attention head separately in Muon")
    share_muon: bool | None = Field(
        None, description="distribute Muon updates over ranks; default: on if measured to be faster"
    )
    muon_scale: Literal["adamw", "keller"] = Field(
        "adamw", description="Muon update scale: AdamW's, or sqrt(max(1, rows / cols)), which needs lr near 0.02"
    )
    weight_decay: NonNegativeFloat = Field(0.02, description="decoupled weight decay; norms and biases are not decayed")
    cautious_weight_decay: bool = Field(
        True, description="decay a weight only where the update also reduces its magnitude"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="validate and save an exponential moving average of the weights (such as 0.99); default: off"
    )
    max_grad_norm: PositiveFloat | None = Field(1.0, description="clip gradients to this global norm; null: off")
    precision: Literal["float16", "bfloat16", "float32"] | None = Field(
        None,
        description="dtype of matrix products; default: bfloat16 on GPU (float16 in PyTorch on M1, M2), float32 on CPU",
    )
    gradient_checkpointing: bool = Field(False, description="recompute blocks in the backward pass to save memory")
    attention_block: Positive | None = Field(
        None, description="query block size in attention; default: chosen from the memory needed for the scores"
    )
    loss_chunk: Positive | None = Field(
        None, description="tokens per chunk in the output head and loss; default: 1024 on GPU, 256 on CPU"
    )
    technique: Literal["auto", "blocked", "fused", "sdpa", "autodiff"] = Field(
        "auto",
        description="attention and its gradient in MLX; auto: as measured by bench --device, else the device's default",
    )
    cpu_threads: Positive | None = Field(
        None, description="CPU only: threads that split the sequences of a micro-batch; default: one per core"
    )
    compile: bool | None = Field(None, description="compile the training step; default: on for GPU, off for CPU")
    device: Literal["auto", "gpu", "cpu"] = Field("auto", description="auto: Metal or CUDA if available, else CPU")
    backend: Literal["mlx", "torch"] = Field("mlx", description="training backend; torch requires PyTorch")
    supervise: bool | None = Field(
        None, description="restart the run from its last checkpoint if it crashes; default: on for runs over 1 hour"
    )
    seed: Seed = Field(0, description="random seed for weight initialization, data order and dropout")
    log_interval: Positive = Field(25, description="steps between logged metrics")
    eval_interval: Positive = Field(500, description="steps between validations")
    patience: Positive | None = Field(
        None, description="stop after this many consecutive validations without improvement; default: off"
    )
    eval_batches: Positive | None = Field(
        50, description="micro-batches per validation (steps, if micro_batch_size is auto); null: the whole split"
    )
    sample_interval: Positive | None = Field(
        None, description="steps between samples generated from generation.prompt; default: off"
    )
    ckpt_interval: Positive = Field(2000, description="steps between checkpoints")
    ckpt_minutes: PositiveFloat | None = Field(
        15.0, description="also write a checkpoint after this many minutes; null: off"
    )
    ckpt_keep: Positive = Field(3, description="number of recent checkpoints to keep, in addition to the best")
    save_dir: PathName = Field("runs/default", description="run folder: checkpoints, config.yaml, logs")
    log_path: PathName | None = Field(None, description="folder for metrics and the summary; default: save_dir/logs")
    log_to: LogTo = Field(
        ["tensorboard"],
        description="where metrics are logged in addition to metrics.jsonl; all but tensorboard need their package",
    )
    init_from: PathName | None = Field(
        None, description="run, checkpoint, Hugging Face folder or name (ORG/NAME) to initialize the weights from"
    )
    teacher: PathName | None = Field(
        None,
        description="model with the same tokenizer whose predictions are learned too (distillation): as for init_from",
    )
    trainable: Literal["all", "embeddings"] = Field(
        "all", description="parameters to train: all, or only the token embedding and output head"
    )
    first_sequence: Count = Field(
        0, description="index of the first sequence in the data order of a new run, to skip data already seen"
    )
    tokenizer_path: PathName | None = Field(
        None, description="tokenizer file (.model, tokenizer.json or vocab.json), as written by `tokenizer train`"
    )
    checkpoint_path: PathName | None = Field(
        None, description="checkpoint or run folder to resume from; auto: the newest checkpoint in save_dir, if any"
    )

    _auto_micro_batch: bool = PrivateAttr(False)

    @property
    def auto_micro_batch(self) -> bool:
        """Whether micro_batch_size is `auto`. Until system/micro_batch.py chooses a size it is 1 (same total batch)."""
        return self._auto_micro_batch

    @model_validator(mode="wrap")
    @classmethod
    def _accept_auto(cls, values: Any, validate: Callable[[Any], Self]) -> Self:
        auto = isinstance(values, dict) and values.get("micro_batch_size") == "auto"
        train = validate({**values, "micro_batch_size": 1} if auto else values)
        train._auto_micro_batch = auto or train._auto_micro_batch
        return train

    @model_serializer(mode="wrap")
    def _serialize(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omits total_steps if epochs or token_budget is set, so that a written config.yaml can be loaded again."""
        values: dict[str, Any] = serialize(self)
        if self.epochs is not None or self.token_budget is not None:
            values.pop("total_steps", None)
        return values | {"micro_batch_size": "auto"} if self._auto_micro_batch else values


class LoraConfig(Section):
    """Low-rank adapters (LoRA), trained instead of the model's weights if lora.r is set."""

    r: Annotated[int, Field(ge=4), INTEGER] | None = Field(
        None, description="rank of the adapters, such as 8; default: no adapters, all weights are trained"
    )
    alpha: PositiveFloat = Field(16.0, description="scale of the adapters is alpha / r")
    dropout: Fraction = Field(0.0, description="dropout probability on the input of the adapters")
    target_modules: Literal["auto"] | Names = Field(
        "auto", description="matrices that get adapters, such as [q_proj, v_proj]; auto: all matrices of a block"
    )
    num_layers: Positive | None = Field(
        None, description="number of blocks that get adapters, counted from the last; default: all"
    )
    dora: bool = Field(False, description="train magnitude and direction of the matrix rows separately (DoRA)")
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead of alpha / r (rsLoRA)")
    adapter_format: Literal["mlx", "peft"] = Field(
        "mlx", description="format of RUN/adapters at the end of a run: mlx-lm's or PEFT's"
    )
    quantize: Literal[4, 8] | None = Field(
        None, description="bits per weight of the quantized frozen weights (QLoRA); default: train.precision"
    )


class DistillationConfig(Section):
    """How `pretrain` and `sft` learn from the predictions of train.teacher."""

    loss: Literal["forward_kl", "reverse_kl"] = Field(
        "forward_kl", description="Kullback-Leibler divergence: KL(teacher, model), or reverse_kl: KL(model, teacher)"
    )
    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="weight of the divergence in the loss; that of the cross-entropy is 1 - weight"
    )
    temperature: PositiveFloat = Field(1.0, description="divides the logits of both models before the divergence")
    top_k: Positive = Field(
        32, description="tokens per position whose probabilities are cached; all others count as one"
    )
    cache_dir: PathName | None = Field(
        None, description="folder of cached predictions, which several runs can share; default: RUN/teacher"
    )


class ChatConfig(Section):
    """Conversations, preference pairs and prompts for `sft`, `dpo` and `grpo`."""

    format: Literal["auto", "messages", "sharegpt", "oasst", "alpaca", "prompt_completion", "text"] = Field(
        "auto", description="format of the rows; auto: detected from their fields, per file"
    )
    language: str | None = Field(
        None, description="keep only OASST trees whose first message is in this language, such as en; default: all"
    )
    template: PathName = Field(
        "auto",
        description="chat template: auto (the tokenizer's, else chatml, else plain), chatml, plain, or a file",
    )
    train_on: Literal["assistant", "all"] = Field("assistant", description="messages whose tokens count in the loss")
    pack: bool = Field(True, description="pack several conversations into a sequence, masked from each other")
    too_long: Literal["cut", "drop"] = Field("cut", description="how to handle conversations longer than data.seq_len")
    rouge_samples: Count = Field(
        0, description="number of held-out conversations to score with ROUGE at each validation"
    )


class PreferenceConfig(Section):
    """The loss of `dpo`."""

    loss: Literal["sigmoid", "sigmoid_norm", "ipo", "simpo", "cpo", "orpo", "kto"] = Field(
        "sigmoid",
        description="sigmoid: DPO; sigmoid_norm: per token; simpo, cpo, orpo: no reference; kto: labeled answers",
    )
    beta: PositiveFloat = Field(
        0.1, description="scale of the rewards (DPO: strength of the KL penalty); orpo: weight of the odds ratio"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="assumed fraction of pairs with swapped labels (sigmoid, sigmoid_norm, simpo and cpo only)"
    )
    simpo_gamma: NonNegativeFloat = Field(0.5, description="target reward margin (simpo only)")
    cpo_alpha: NonNegativeFloat = Field(1.0, description="weight of the chosen answer's loss per token (cpo only)")
    desirable_weight: PositiveFloat = Field(1.0, description="weight of the loss of good answers (kto only)")
    undesirable_weight: PositiveFloat = Field(1.0, description="weight of the loss of bad answers (kto only)")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the model with the reference model, the model before tuning."""
        return self.loss not in ("simpo", "cpo", "orpo")


class GRPOConfig(Section):
    """Rewards and loss of `grpo`. Names and defaults are those of TRL, except for max_completion_length and rewards."""

    rewards: RewardNames | None = Field(
        None, description="what completions are rewarded for, one or several; required by `grpo`"
    )
    reward_weights: list[Finite] | None = Field(None, description="weight of each reward; default: 1 each")
    regex: str | None = Field(
        None,
        description="reward regex: searched in the completion; with a group, its last match must equal the answer",
    )
    json_schema: PathName | None = Field(
        None, description="reward json_schema: file of the JSON Schema that the completion must satisfy"
    )
    function: str | None = Field(
        None, description="reward function: Python code that is run, as FILE.py:FUNCTION or MODULE:FUNCTION"
    )
    num_generations: Annotated[int, Field(ge=2), INTEGER] = Field(
        8, description="completions per prompt, whose rewards are compared"
    )
    max_completion_length: Positive = Field(256, description="maximum number of tokens of a completion")
    num_iterations: Positive = Field(1, description="optimizer steps on the same completions")
    beta: NonNegativeFloat = Field(
        0.0, description="weight of the KL divergence from the model before tuning; 0: no reference model in memory"
    )
    use_bias_correction_kl: bool = Field(
        True, description="multiply the KL term by the probability ratio, so that its gradient is unbiased"
    )
    epsilon: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="the probability ratio is clipped at 1 - epsilon"
    )
    epsilon_high: PositiveFloat | None = Field(
        None, description="the probability ratio is clipped at 1 + epsilon_high (DAPO: 0.28); default: epsilon"
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = Field(
        "dapo",
        description="mean over tokens per completion (grpo), micro-batch (bnpo), step (dapo), or scaled sum (dr_grpo)",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="divide advantages by the standard deviation of the group's or the batch's rewards"
    )
    mask_truncated_completions: bool = Field(
        False, description="leave completions without an end out of the loss (as in DAPO)"
    )


class GuardConfig(Section):
    """Handling of loss spikes and non-finite gradients. Non-finite updates are always skipped."""

    spike_sigma: PositiveFloat | None = Field(
        6.0, description="skip updates whose gradient norm exceeds the mean by this many standard deviations; null: off"
    )
    spike_window: Annotated[int, Field(ge=2), INTEGER] = Field(
        128, description="steps over which mean and deviation are computed; at least half must be filled"
    )
    rollback_after: Annotated[int, Field(ge=1, le=29), INTEGER] | None = Field(
        5, description="consecutive non-finite steps before a rollback to a checkpoint; null: never (30 abort the run)"
    )


class TokenizerConfig(Section):
    """How `tokenizer train` trains a tokenizer of model.vocab_size tokens."""

    model_type: Literal["bpe", "unigram"] = Field("bpe", description="tokenization algorithm")
    format: Literal["sentencepiece", "gpt2"] = Field(
        "sentencepiece", description="sentencepiece: one .model file; gpt2: byte-level vocab.json and merges.txt"
    )
    engine: Literal["auto", "fast", "reference"] = Field(
        "auto",
        description="tokenizer implementation; auto: the faster one for the text, of those that are installed and "
        "support the tokenizer",
    )
    on_mismatch: Literal["stop", "fallback"] = Field(
        "stop", description="what to do if token ids of the fast and the reference implementation differ"
    )
    max_train_mb: PositiveFloat = Field(200.0, description="train on at most this many MB of text")


class GenerationConfig(Section):
    """How `generate` and training samples choose tokens."""

    prompt: str = Field("", description="text to continue; --prompt -: read from standard input")
    method: Literal["greedy", "top_k", "nucleus", "min_p", "random", "combined"] = Field(
        "nucleus", description="sampling method; combined: top_k, then nucleus, then min_p"
    )
    temperature: NonNegativeFloat = Field(0.8, description="sampling temperature; 0: greedy")
    top_k: Count = Field(50, description="method top_k: sample from the k most likely tokens; 0: from all")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        0.95, description="method nucleus: sample from the most likely tokens with this total probability"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="method min_p: minimum probability, as a fraction of the most likely token's"
    )
    repetition_penalty: PositiveFloat = Field(1.0, description="values above 1 reduce the logits of the last 20 tokens")
    presence_penalty: Penalty = Field(0.0, description="subtracted from the logits of the tokens generated so far")
    frequency_penalty: Penalty = Field(
        0.0, description="subtracted from a token's logit for each time that it was generated so far"
    )
    max_new_tokens: Positive = Field(200, description="maximum number of new tokens")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="stop strings; the output ends before the first match"
    )
    seed: Seed = Field(0, description="random seed for sampling")

    @property
    def is_greedy(self) -> bool:
        return self.method == "greedy" or self.temperature == 0

    @property
    def filters(self) -> tuple[int, float, float]:
        """top_k, top_p and min_p of the method; 0, 1 and 0 filter nothing."""
        return (
            self.top_k if self.method in ("top_k", "combined") else 0,
            self.top_p if self.method in ("nucleus", "combined") else 1.0,
            self.min_p if self.method in ("min_p", "combined") else 0.0,
        )


class KnowledgeBaseConfig(Section):
    """The knowledge base of `kb`, `chat` and `serve`: passages of your files, added to the prompt."""

    path: PathName | None = Field(None, description="SQLite file of the knowledge base, created by `kb add`")
    retrieval_k: Positive = Field(3, description="number of passages to retrieve for a question")
    feedback_alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="learning rate of feedback votes; 0: votes have no effect"
    )
    embedding_model: PathName | None = Field(
        None,
        description="for search by meaning and `/v1/embeddings`: folder or Hugging Face name of a "
        "sentence-transformers model; default: none",
    )


class Config(Section):
    """The configuration of AnarchoBot. All sections and keys are optional."""

    removed: ClassVar[dict[str, Removed]] = {
        "model.value_residual": Removed(
            "removed in 0.5.0, which can't compute such a model: train one without it, or use version 0.4.0",
            in_weights=True,
        ),
        "model.zero_init_proj": Removed("removed in 0.5.0, no matrix starts at zero: remove this setting"),
    }

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    distillation: DistillationConfig = DistillationConfig()
    chat: ChatConfig = ChatConfig()
    preference: PreferenceConfig = PreferenceConfig()
    grpo: GRPOConfig = GRPOConfig()
    guard: GuardConfig = GuardConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    generation: GenerationConfig = GenerationConfig()
    knowledge_base: KnowledgeBaseConfig = KnowledgeBaseConfig()
