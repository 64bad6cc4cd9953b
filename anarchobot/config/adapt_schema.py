"""The settings of `adapt-vocab`, under the key names of schema.py where both have the same setting."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from anarchobot.config.schema import (
    Alias,
    Count,
    Fraction,
    Names,
    NonNegativeFloat,
    PathName,
    PathNames,
    Positive,
    PositiveFloat,
    Section,
    Seed,
)


class ModelsConfig(Section):
    """The model to adapt, its tokenizer and the target tokenizer."""

    source_model: PathName = Field(description="run folder, Hugging Face model folder or name (ORG/NAME) of the model")
    source_tokenizer: PathName | None = Field(
        None, description="tokenizer of the model; default: the one in its folder"
    )
    target_tokenizer: PathName | None = Field(
        None, description="existing tokenizer to adapt to; default: create one (tokenization.target)"
    )


class CorpusConfig(Section):
    """Domain text, and general text for comparison."""

    domain: PathName | PathNames = Field(
        description="domain text: text, JSONL or Parquet files, folders, globs, or a dataset name"
    )
    general: PathName | PathNames | None = Field(
        None, description="general text: background for term mining, more text for token vectors; default: none"
    )
    text_field: str = Field("text", description="field that holds the text in JSONL and Hugging Face rows")
    documents: Literal["file", "paragraphs", "lines"] = Field(
        "file", description="what counts as a document in text files: the whole file, a paragraph, or a line"
    )
    size_gb: PositiveFloat = Field(1.0, description="maximum size of each text, in 10^9 bytes of UTF-8")
    byte_budget: Positive | None = Field(None, description="maximum size of each text in bytes; default: size_gb")
    dedup: bool = Field(True, description="drop exact duplicates of earlier documents")
    hash_name: Literal["sha256"] = Field("sha256", description="hash function used to find duplicates")
    val_fraction: Fraction = Field(0.01, description="fraction of domain documents held out for evaluation")

    @property
    def budget(self) -> int:
        return self.byte_budget or int(self.size_gb * 1e9)


class TermMiningConfig(Section):
    """Domain terms that an extended tokenizer gets as tokens."""

    top_k: Count = Field(2000, description="number of terms, best first; words that are already one token don't count")
    min_frequency: Positive = Field(3, description="minimum number of occurrences of a term in the domain text")
    use_tfidf: bool = Field(True, description="rank by TF-IDF against the general text; false: by frequency")


class FastTextConfig(Section):
    """How token vectors are trained, with either backend, under the option names of fastText."""

    epochs: Positive = Field(30, description="passes over the text")
    mincount: Positive = Field(1, description="minimum number of occurrences for a token to get a vector")
    lr: PositiveFloat = Field(0.05, description="initial learning rate")
    thread: Positive | None = Field(
        None, description="number of threads; default: one per core; results are reproducible only with 1"
    )
    dim: Positive = Field(100, description="dimension of the vectors")
    window: Positive = Field(5, description="context tokens on each side")
    negative: Positive = Field(10, description="negative samples per token")


class EmbeddingConfig(Section):
    """Token vectors of both tokenizers, trained on the same text."""

    backend: Literal["fasttext", "word2vec"] = Field("fasttext", description="gensim's FastText (on ids) or Word2Vec")
    fasttext: FastTextConfig = FastTextConfig()


class AlignmentConfig(Section):
    """How the embedding row of each target token is built from rows of source tokens."""

    method: Literal["procrustes", "relative", "focus", "omp", "pieces", "mean", "random"] | None = Field(
        None,
        description="how rows of new tokens are made; null: focus if embedding and head are tied, otherwise pieces",
    )
    pivot_count: Annotated[int, Field(ge=2)] = Field(
        2000, description="procrustes, relative: number of pivots, the most frequent tokens of both vocabularies"
    )
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.4, description="procrustes, relative: minimum cosine similarity; tokens below it are the mean of their pieces"
    )
    top_k: Positive = Field(
        10, description="procrustes, relative, omp: number of source tokens of a row; TokAlign: 1, tokensurgeon: 64"
    )


class TokenizationConfig(Section):
    """How the target tokenizer is created and the text is tokenized."""

    target: Literal["extended", "trained"] = Field(
        "extended", description="extended: the source tokenizer plus mined terms; trained: new, on the domain text"
    )
    vocab_size: Positive | None = Field(
        None, description="vocabulary size of a trained tokenizer; default: the source tokenizer's"
    )
    num_workers: Positive = Field(2, description="tokenizer threads; does not affect the shards")
    cache_dir: PathName | None = Field(None, description="cache folder for downloaded Hugging Face datasets")
    min_line_length: Count = Field(10, description="minimum length in characters of lines used for token vectors")


class AdaptationConfig(Section):
    """Training after initialization. Stage 1: embedding and output head. Stage 2: all weights, or LoRA adapters."""

    enabled: bool = Field(True, description="false: stop after the new rows are initialized")
    stage1_steps: Count = Field(2500, description="optimizer steps of stage 1; 0: skip it")
    stage1_lr: PositiveFloat = Field(2e-5, description="peak learning rate of stage 1")
    stage2_steps: Count = Field(2500, description="optimizer steps of stage 2; 0: skip it")
    stage2_lr: PositiveFloat = Field(5e-5, description="peak learning rate of stage 2")
    micro_batch_size: Positive = Field(4, description="sequences per micro-batch")
    grad_accum_steps: Positive = Field(16, description="micro-batches per optimizer step")
    seq_len: Positive = Field(
        2048, description="tokens per training sequence; default: 2048, or the model's max_seq_len if that is less"
    )
    stage2_first_sequence: Count | None = Field(
        None, description="index of the first sequence of stage 2 in the data order; default: continue after stage 1"
    )
    stage2_use_lora: bool = Field(True, description="train LoRA adapters in stage 2 and fuse them at the end")
    lora_r: Annotated[int, Field(ge=4, le=64)] = Field(64, description="rank of the adapters")
    lora_alpha: PositiveFloat = Field(16.0, description="scale of the adapters is alpha / r")
    lora_dropout: Fraction = Field(0.1, description="dropout probability on the input of the adapters")
    lora_target_modules: Literal["auto"] | Names = Field(
        "auto", description="matrices that get adapters; auto: all matrices of a block"
    )
    optimizer: Literal["muon_adamw", "adamw"] = Field(
        "adamw", description="optimizer of stage 2; stage 1 always uses AdamW"
    )
    seed: Seed = Field(0, description="random seed for corpus order, token vectors, new rows and data order")
    precision: Literal["float16", "bfloat16", "float32"] | None = Field(
        None, description="dtype of matrix products; default: bfloat16 on a GPU, float32 on a CPU"
    )
    cpu_threads: Positive | None = Field(
        None, description="CPU only: threads that split the sequences of a micro-batch; default: one per core"
    )


class EvaluationConfig(Section):
    """Evaluation of the model before, between and after the training stages."""

    enabled: bool = Field(True, description="false: no evaluation")
    datasets: PathNames | None = Field(None, description="text files to evaluate on; default: the held-out documents")
    max_samples: Positive | None = Field(500, description="maximum number of documents and of questions; null: all")
    qa: PathName | None = Field(
        None, description="JSONL with question, abstract and answer (yes, no, maybe), as PubMedQA; default: none"
    )
    baseline_model: PathName | None = Field(
        None, description="another model to evaluate, with its tokenizer: a folder or a name (ORG/NAME)"
    )


class PipelineConfig(Section):
    """Where the pipeline writes its results, and how it retries failed stages."""

    run_root: PathName = Field(
        "runs/adapt", description="folder of the pipeline stages; the model is in RUN_ROOT/result"
    )
    max_retries: Count = Field(3, description="retries of a stage after an error other than a configuration error")
    retry_backoff: NonNegativeFloat = Field(5.0, description="seconds to wait before a retry")


class AdaptConfig(Section):
    """The configuration of `adapt-vocab`. Only models and corpus are required."""

    aliases: ClassVar[dict[str, Alias]] = {
        "corpus.deduplicate": Alias("corpus.dedup"),
        "tokenization.workers": Alias("tokenization.num_workers"),
        "vocab_adaptation.lr_stage1": Alias("vocab_adaptation.stage1_lr"),
        "vocab_adaptation.lr_stage2": Alias("vocab_adaptation.stage2_lr"),
        "vocab_adaptation.batch_size": Alias("vocab_adaptation.micro_batch_size"),
        "vocab_adaptation.gradient_accumulation": Alias("vocab_adaptation.grad_accum_steps"),
        "vocab_adaptation.max_seq_length": Alias("vocab_adaptation.seq_len"),
        "vocab_adaptation.train_start_idx_stage2": Alias("vocab_adaptation.stage2_first_sequence"),
        "vocab_adaptation.bf16": Alias("vocab_adaptation.precision", values=("float32", "bfloat16")),
    }

    models: ModelsConfig
    corpus: CorpusConfig
    term_mining: TermMiningConfig = TermMiningConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    tokenization: TokenizationConfig = TokenizationConfig()
    vocab_adaptation: AdaptationConfig = AdaptationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    pipeline: PipelineConfig = PipelineConfig()
