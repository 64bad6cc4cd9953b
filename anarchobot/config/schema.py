"""The one list of settings.

The loader's checks, the command line's overrides, the JSON Schema and docs/configuration.md are all derived from these
classes; nothing is configured anywhere else.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from anarchobot.config.fields import (
    WHOLE,
    Count,
    Finite,
    Fraction,
    Names,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    PositiveOrAuto,
    Section,
    Seed,
    Weights,
)  # fmt: skip


class ModelConfig(Section):
    """The transformer's shape."""

    architecture: Literal["llama"] = Field("llama", description="model architecture (model/architecture.py)")
    vocab_size: Positive = Field(32000, description="number of token ids; must be the tokenizer's")
    n_layers: Positive = Field(12, description="transformer blocks")
    d_model: Positive = Field(768, description="width of the residual stream")
    n_heads: Positive = Field(12, description="query heads")
    n_kv_heads: Positive | None = Field(
        None, description="key and value heads (grouped-query attention); left out: n_heads"
    )
    head_dim: Positive | None = Field(None, description="width of a head, even; left out: d_model / n_heads")
    mlp_multiple: PositiveFloat = Field(4.0, description="the gated MLP's hidden width, in units of d_model")
    ffn_activation: Literal["silu", "gelu"] = Field("silu", description="the gate's activation (gelu: tanh form)")
    dropout: Fraction = Field(0.1, description="share of each block's outputs dropped in training")
    max_seq_len: Positive = Field(4096, description="longest sequence the model may see, in training or generation")
    rope_theta: PositiveFloat = Field(10000.0, description="base of the rotary position frequencies")
    norm_eps: PositiveFloat = Field(1e-5, description="epsilon of RMSNorm")
    tie_embeddings: bool = Field(True, description="the output head is the token embedding")
    qk_norm: bool = Field(False, description="RMSNorm on each head's queries and keys (as Qwen3)")
    attention_bias: bool = Field(False, description="biases on queries, keys and values (as Qwen2)")
    logit_softcap: PositiveFloat | None = Field(
        None, description="logits become cap * tanh(logits / cap); left out: none. Not exportable as Llama"
    )
    zero_init_proj: bool = Field(False, description="o_proj and down_proj start at zero")
    embedding_scale: PositiveFloat | None = Field(
        None, description="token embeddings are multiplied by this, such as sqrt(d_model); left out: not"
    )
    value_residual: bool = Field(
        False, description="average each block's attention values with the first block's. Not exportable as Llama"
    )

    bos_id: Count | None = Field(
        None, description="the token that a text begins with; left out: the end of a document (set by `import`)"
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


class DataConfig(Section):
    """Where the text comes from and how it is cut."""

    dataset: str | Names | None = Field(
        None, description="text, JSONL and Parquet files, folders, globs, a Hugging Face dataset's name, or 'builtin'"
    )
    weights: Weights | None = Field(
        None, description="shares of the datasets in the text, one each; the mixture ends with the first to run out"
    )
    config: str | None = Field(None, description="the Hugging Face dataset's configuration")
    split: str = Field("train", description="the Hugging Face dataset's split")
    text_field: str = Field("text", description="the field that holds the text, in JSONL and Hugging Face rows")
    score_field: str | None = Field(None, description="the field that holds a document's quality score")
    score_min: Finite | None = Field(None, description="documents scored below this are left out")
    documents: Literal["file", "paragraphs", "lines"] = Field(
        "file", description="what a document is in a text file: all of it, or what blank lines or line ends part"
    )
    clean: bool = Field(False, description="take control characters out, and white space at the ends of lines")
    min_chars: Positive = Field(1, description="shorter documents are left out")
    max_chars: Positive | None = Field(None, description="longer documents are left out")
    dedup: bool = Field(True, description="of documents that are the same, keep the first")
    near_dedup: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="leave out documents this alike (Jaccard, such as 0.8) to one before; left out: none"
    )
    seq_len: Positive = Field(2048, description="tokens in a training sequence")
    val_fraction: Fraction = Field(0.01, description="share of the documents held out for validation")
    shuffle_buffer: Count = Field(
        1000, description="documents held to shuffle a streamed Hugging Face dataset; local files keep their order"
    )
    streaming: bool = Field(True, description="read a Hugging Face dataset as a stream instead of fetching it whole")
    cache_dir: str | None = Field(None, description="where fetched Hugging Face datasets are kept")
    num_workers: Positive = Field(2, description="tokenising threads; the shards do not depend on it")
    shard_dir: str | Names = Field(
        "shards", description="folder of the token shards, written by pretokenize; several to train on a mixture"
    )
    shard_weights: Weights | None = Field(
        None, description="shares of the shard folders in training; left out: by their sizes"
    )
    pack: Literal["stream", "documents"] = Field(
        "stream", description="training sequences: the text as one stream, or documents packed whole where they fit"
    )
    document_mask: bool = Field(False, description="a token sees only its own document")
    fallback: Literal["builtin"] | None = Field(
        None, description="what to read, with a warning, when the dataset can't be reached: the built-in text"
    )


class TrainConfig(Section):
    """The run: how long, how fast, in what numbers, and what it leaves behind."""

    total_steps: Positive = Field(50000, description="optimizer steps; give this, epochs or token_budget")
    epochs: PositiveFloat | None = Field(None, description="length of the run in passes over the training shards")
    token_budget: Positive | None = Field(None, description="length of the run in tokens")
    micro_batch_size: PositiveOrAuto = Field(
        1, description="sequences in memory at a time; auto: as many of grad_accum_steps as memory has room for"
    )
    grad_accum_steps: Positive = Field(
        4, description="micro-batches in a step; with micro_batch_size auto: sequences in a step"
    )
    memory_budget_gb: PositiveFloat | None = Field(
        None, description="what micro_batch_size auto may take, 10^9 bytes; left out: three quarters of the memory"
    )
    optimizer: Literal["muon_adamw", "adamw"] = Field(
        "muon_adamw", description="Muon on the blocks' matrices and AdamW on the rest, or AdamW alone"
    )
    lr: PositiveFloat = Field(3e-4, description="peak learning rate of both optimizers")
    adamw_lr: PositiveFloat | None = Field(
        None, description="peak learning rate of what AdamW has beside Muon; left out: lr"
    )
    min_lr: NonNegativeFloat = Field(3e-5, description="learning rate at the end of the decay")
    warmup_steps: Count = Field(1000, description="steps of linear warm-up")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="shape of the decay; wsd: constant, then linear over the last decay_fraction"
    )
    lr_decay_steps: Positive | None = Field(
        None, description="step at which lr has come down to min_lr; left out: the last step"
    )
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="wsd only: share of the lr_decay_steps that decay"
    )
    momentum: Fraction = Field(0.95, description="Muon's momentum, warmed up from 0.85 over 300 steps")
    normuon: bool = Field(True, description="even out the rows of Muon's updates by their second moment (NorMuon)")
    muon_split_heads: bool = Field(True, description="Muon takes each attention head as a matrix of its own")
    share_muon: bool | None = Field(
        None, description="several ranks: each makes a part of Muon's updates; left out: when that is seen to be faster"
    )
    muon_scale: Literal["adamw", "keller"] = Field(
        "adamw", description="size of Muon's updates: AdamW's, or sqrt(max(1, rows / cols)), which wants lr about 0.02"
    )
    weight_decay: NonNegativeFloat = Field(0.02, description="decoupled; norms and biases are not decayed")
    cautious_weight_decay: bool = Field(True, description="decay a weight only where the update shrinks it as well")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="validate and save a running average of the weights with this decay (0.99); left out: none"
    )
    max_grad_norm: PositiveFloat | None = Field(1.0, description="clip gradients to this global norm; null: never")
    precision: Literal["float16", "bfloat16", "float32"] | None = Field(
        None,
        description="of the matrix products; left out: bfloat16 on a GPU (PyTorch on MPS: float16), float32 on a CPU",
    )
    gradient_checkpointing: bool = Field(False, description="recompute blocks in the backward pass to save memory")
    attention_block: Positive | None = Field(
        None, description="queries at a time in attention; left out: by the memory that their scores take"
    )
    loss_chunk: Positive = Field(256, description="tokens at a time in the output head and the loss")
    cpu_threads: Positive | None = Field(
        None, description="CPU only: threads that share a micro-batch's sequences; left out: one a core"
    )
    compile: bool | None = Field(None, description="compile the step; left out: on a GPU yes, on a CPU no")
    device: Literal["auto", "gpu", "cpu"] = Field("auto", description="auto: Metal or CUDA when there is one")
    backend: Literal["mlx", "torch"] = Field("mlx", description="the engine that trains; torch needs PyTorch installed")
    supervise: bool | None = Field(
        None, description="watch over the run and resume it when it dies; left out: when it will take over an hour"
    )
    seed: Seed = Field(0, description="of initial weights, data order and dropout")
    log_interval: Positive = Field(25, description="steps between metric lines")
    eval_interval: Positive = Field(500, description="steps between validations")
    patience: Positive | None = Field(
        None, description="end the run after this many validations in a row without a better one; left out: never"
    )
    eval_batches: Positive | None = Field(
        50,
        description="micro-batches in a validation (micro_batch_size auto: steps' worth of them); null: all there is",
    )
    sample_interval: Positive | None = Field(
        None, description="steps between samples of generation.prompt; left out: none"
    )
    ckpt_interval: Positive = Field(2000, description="steps between checkpoints")
    ckpt_minutes: PositiveFloat | None = Field(
        15.0, description="minutes after which a checkpoint is written whatever the step; null: never"
    )
    ckpt_keep: Positive = Field(3, description="newest checkpoints kept; the best one is kept besides")
    save_dir: str = Field("runs/default", description="the run's folder: checkpoints, config.yaml, logs")
    log_path: str | None = Field(None, description="folder of metrics and summary; left out: save_dir/logs")
    init_from: str | None = Field(
        None, description="a checkpoint or run folder that a new run takes its first weights from"
    )
    trainable: Literal["all", "embeddings"] = Field(
        "all", description="what is trained: all weights, or the token embedding and the output head alone"
    )
    first_sequence: Count = Field(
        0, description="a new run begins with this sequence of its data's order: what another run has seen is before it"
    )
    tokenizer_path: str | None = Field(
        None, description="the tokenizer that tokenizer train writes and pretokenize reads"
    )
    checkpoint_path: str | None = Field(
        None, description="resume from this checkpoint or run folder; auto: the newest in save_dir, if any"
    )

    _automatic: bool = PrivateAttr(False)

    @property
    def automatic(self) -> bool:
        """Whether micro_batch_size is `auto`, still to be chosen (system/fitting.py) and till then 1: the same step."""
        return self._automatic

    @model_validator(mode="wrap")
    @classmethod
    def _read_auto(cls, values: Any, read: Callable[[Any], Self]) -> Self:
        automatic = isinstance(values, dict) and values.get("micro_batch_size") == "auto"
        train = read({**values, "micro_batch_size": 1} if automatic else values)
        train._automatic = automatic or train._automatic
        return train

    @model_serializer(mode="wrap")
    def _with_one_length(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves total_steps out where another length replaces it: what is written must load again."""
        values: dict[str, Any] = write(self)
        if self.epochs is not None or self.token_budget is not None:
            values.pop("total_steps", None)
        return values | {"micro_batch_size": "auto"} if self._automatic else values


class LoraConfig(Section):
    """Adapters that are trained instead of the model's own weights (LoRA), once lora.r is set."""

    r: Annotated[int, Field(ge=4, le=64), WHOLE] | None = Field(
        None, description="rank of the adapters, such as 8; left out: all weights are trained"
    )
    alpha: PositiveFloat = Field(16.0, description="adapters are scaled by alpha / r")
    dropout: Fraction = Field(0.0, description="share of the adapters' inputs dropped in training")
    target_modules: Literal["auto"] | Names = Field(
        "auto", description="the matrices that get adapters, such as [q_proj, v_proj]; auto: all of a block"
    )
    num_layers: Positive | None = Field(
        None, description="blocks that get adapters, counted from the last; left out: all"
    )
    dora: bool = Field(False, description="train the lengths of the matrices' rows apart from their directions (DoRA)")
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead of alpha / r (rsLoRA)")
    adapter_format: Literal["mlx", "peft"] = Field(
        "mlx", description="whose files RUN/adapters holds at the end of a run: mlx-lm's or PEFT's"
    )
    quantize: Literal[4, 8] | None = Field(
        None, description="bits that a number of the frozen weights is packed into (QLoRA); left out: train.precision"
    )


class ChatConfig(Section):
    """Conversations and pairs of answers to learn from, in `sft` and `dpo`."""

    format: Literal["auto", "messages", "sharegpt", "oasst", "alpaca", "prompt_completion", "text"] = Field(
        "auto", description="the rows' form; auto: told by their fields, for each file"
    )
    language: str | None = Field(
        None, description="of OASST's trees, those that begin in this language, such as en; left out: all"
    )
    template: str = Field(
        "auto", description="chat template: auto (the tokenizer's own, else chatml, else plain), chatml, plain, a file"
    )
    train_on: Literal["assistant", "all"] = Field("assistant", description="whose tokens count in the loss")
    pack: bool = Field(True, description="several conversations in one sequence, none seeing another")
    too_long: Literal["cut", "drop"] = Field(
        "cut", description="what becomes of conversations longer than data.seq_len; both are counted"
    )
    rouge_samples: Count = Field(
        0, description="held-out conversations whose last answer is generated anew at each validation, for ROUGE"
    )


class PreferenceConfig(Section):
    """What `dpo` makes of pairs of answers."""

    loss: Literal["sigmoid", "ipo", "orpo"] = Field(
        "sigmoid", description="sigmoid: DPO; ipo: a margin, by token; orpo: without a reference model"
    )
    beta: PositiveFloat = Field(0.1, description="how strictly the reference is kept to; in orpo, the odds' weight")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="share of the pairs that may be the wrong way round (sigmoid alone)"
    )


class GuardConfig(Section):
    """What is done when the numbers go wrong. An update that is not finite is left out in any case."""

    spike_sigma: PositiveFloat | None = Field(
        6.0, description="leave out an update whose gradient norm is this many deviations above its mean; null: none"
    )
    spike_window: Annotated[int, Field(ge=2), WHOLE] = Field(
        128, description="steps that mean and deviation are taken of; half of them must be known"
    )
    rollback_after: Annotated[int, Field(ge=1, le=29), WHOLE] | None = Field(
        5,
        description="steps in a row, not finite, after which it goes back to a checkpoint; null: never, 30 end the run",
    )


class TokenizerConfig(Section):
    """How `tokenizer train` makes a tokenizer of model.vocab_size tokens."""

    model_type: Literal["bpe", "unigram"] = Field("bpe", description="algorithm")
    format: Literal["sentencepiece", "gpt2"] = Field(
        "sentencepiece", description="sentencepiece: one .model file; gpt2: byte-level vocab.json and merges.txt"
    )
    engine: Literal["auto", "fast", "reference"] = Field(
        "auto", description="what tokenises: the fast engine where it is installed and takes this tokenizer, or not"
    )
    on_mismatch: Literal["stop", "fallback"] = Field(
        "stop", description="what to do when the fast engine's ids differ from the reference's"
    )
    max_train_mb: PositiveFloat = Field(200.0, description="megabytes of text to learn from, from the start")


class GenerationConfig(Section):
    """How `generate` and training samples draw tokens."""

    prompt: str = Field("", description="text to go on from")
    method: Literal["greedy", "top_k", "nucleus", "min_p", "random"] = Field(
        "nucleus", description="how a token is drawn"
    )
    temperature: PositiveFloat = Field(0.8, description="logits are divided by this")
    top_k: Positive = Field(50, description="method top_k: draw from this many likeliest tokens")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        0.95, description="method nucleus: draw from the likeliest tokens that hold this much probability"
    )
    min_p: Annotated[float, Field(gt=0, le=1)] = Field(
        0.05, description="method min_p: draw from tokens of at least this share of the likeliest one's probability"
    )
    repetition_penalty: PositiveFloat = Field(
        1.0, description="above 1: logits of the last 20 tokens' ids are made smaller"
    )
    max_new_tokens: Positive = Field(200, description="stop after this many tokens, or at end of document")
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], description="texts that end the text before them")
    seed: Seed = Field(0, description="of the draws")


class KnowledgeBaseConfig(Section):
    """The knowledge base of `kb` and `chat`: passages of your own files, put before a question."""

    path: str | None = Field(None, description="the SQLite file that `kb add` writes; left out: none")
    retrieval_k: Positive = Field(3, description="passages that are found for a question")
    feedback_alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="how far a vote moves a passage's relevance towards 1 or -1; 0: votes change nothing"
    )


class Config(Section):
    """AnarchoBot's configuration: any section and any key may be left out."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    chat: ChatConfig = ChatConfig()
    preference: PreferenceConfig = PreferenceConfig()
    guard: GuardConfig = GuardConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    generation: GenerationConfig = GenerationConfig()
    knowledge_base: KnowledgeBaseConfig = KnowledgeBaseConfig()
