"""The settings of `adapt-vocab`: the one list of them, as schema.py is for the other commands."""

from typing import Annotated, Literal

from pydantic import Field

from anarchobot.config.fields import (
    Count,
    Fraction,
    Names,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
)


class ModelsConfig(Section):
    """The model that is moved, and between which tokenizers."""

    source_model: str = Field(description="a run's folder, or a Hugging Face model's")
    source_tokenizer: str | None = Field(None, description="the model's tokenizer; left out: the one beside it")
    target_tokenizer: str | None = Field(
        None, description="the tokenizer to move to; left out: made as tokenization.target says"
    )


class CorpusConfig(Section):
    """The text of the field, and general text to tell it from."""

    domain: str | Names = Field(description="text, JSONL and Parquet files, folders, globs or a dataset's name")
    general: str | Names | None = Field(
        None, description="general text: term mining's background, and more to learn token vectors from; left out: none"
    )
    text_field: str = Field("text", description="the field that holds the text, in JSONL and Hugging Face rows")
    documents: Literal["file", "paragraphs", "lines"] = Field(
        "file", description="what a document is in a text file: all of it, or what blank lines or line ends part"
    )
    size_gb: PositiveFloat = Field(1.0, description="at most so much text of each, in 10^9 bytes of UTF-8")
    byte_budget: Positive | None = Field(None, description="the same in bytes; left out: size_gb")
    deduplicate: bool = Field(True, description="of documents that are the same, keep the first")
    hash_name: Literal["sha256"] = Field("sha256", description="the digest by which documents are the same")
    val_fraction: Fraction = Field(0.01, description="share of the field's documents held out, for evaluation")

    @property
    def budget(self) -> int:
        return self.byte_budget or int(self.size_gb * 1e9)


class TermMiningConfig(Section):
    """The field's own words, which an extended tokenizer gets as tokens."""

    top_k: Count = Field(2000, description="words that are taken, best first; those that are one token already not")
    min_frequency: Positive = Field(3, description="times that a word must stand in the field's text")
    use_tfidf: bool = Field(True, description="rank by TF-IDF against the general text; false: by frequency")


class FastTextConfig(Section):
    """How token vectors are learned, in gensim's words; of both backends."""

    epochs: Positive = Field(30, description="passes over the text")
    mincount: Positive = Field(1, description="tokens that come less often get no vector")
    lr: PositiveFloat = Field(0.05, description="learning rate at the start")
    thread: Positive | None = Field(
        None, description="threads; left out: one a core. With 1 the vectors are a function of text and seed"
    )
    dim: Positive = Field(100, description="numbers in a vector")
    window: Positive = Field(5, description="tokens before and behind that predict one")
    negative: Positive = Field(10, description="random tokens that each is told from")


class EmbeddingConfig(Section):
    """A vector for each token, of both tokenizers, learned from the text as they cut it."""

    backend: Literal["fasttext", "word2vec"] = Field("fasttext", description="gensim's FastText (on ids) or Word2Vec")
    fasttext: FastTextConfig = FastTextConfig()


class AlignmentConfig(Section):
    """From which source tokens each target token's row is made."""

    method: Literal["procrustes", "relative", "pieces", "mean", "random"] = Field(
        "procrustes",
        description="procrustes with CSLS, or relative (TokAlign's); pieces, mean and random align nothing",
    )
    pivot_count: Annotated[int, Field(ge=2)] = Field(
        2000, description="tokens of both vocabularies, the most frequent, that the spaces are turned by"
    )
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.4, description="a token less similar (cosine) to the mean of its nearest becomes that of its own pieces"
    )
    top_k: Positive = Field(10, description="source tokens that a row is a weighted mean of; 1 is TokAlign's")


class TokenizationConfig(Section):
    """The target tokenizer, where it is made here, and the tokenising."""

    target: Literal["extended", "trained"] = Field(
        "extended", description="the source's with the mined terms added, or a new one trained on the field's text"
    )
    vocab_size: Positive | None = Field(None, description="tokens of a trained one; left out: as many as the source's")
    workers: Positive = Field(2, description="tokenising threads; the shards do not depend on it")
    cache_dir: str | None = Field(None, description="where fetched Hugging Face datasets are kept")
    min_line_length: Count = Field(10, description="shorter lines, in characters, teach no token vectors")


class AdaptationConfig(Section):
    """The training behind the new rows: embeddings and head alone first, then the whole model or adapters (LoRA)."""

    enabled: bool = Field(True, description="false: end with the new rows, untrained")
    stage1_steps: Count = Field(2500, description="steps of embeddings and head; 0: none")
    lr_stage1: PositiveFloat = Field(2e-5, description="peak learning rate of stage 1")
    stage2_steps: Count = Field(2500, description="steps of the whole model; 0: none")
    lr_stage2: PositiveFloat = Field(5e-5, description="peak learning rate of stage 2")
    batch_size: Positive = Field(4, description="sequences in memory at a time")
    gradient_accumulation: Positive = Field(16, description="such batches in a step")
    max_seq_length: Positive = Field(2048, description="tokens in a sequence; at most the model's max_seq_len")
    train_start_idx_stage2: Count | None = Field(
        None, description="sequence of the data's order that stage 2 begins with; left out: behind what stage 1 saw"
    )
    stage2_use_lora: bool = Field(True, description="stage 2 trains adapters, which are fused at the end")
    lora_r: Annotated[int, Field(ge=4, le=64)] = Field(64, description="rank of the adapters")
    lora_alpha: PositiveFloat = Field(16.0, description="adapters are scaled by alpha / r")
    lora_dropout: Fraction = Field(0.1, description="share of the adapters' inputs dropped in training")
    lora_target_modules: Literal["auto"] | Names = Field(
        "auto", description="the matrices that get adapters; auto: all of a block"
    )
    optimizer: Literal["muon_adamw", "adamw"] = Field("adamw", description="of stage 2; stage 1 has nothing for Muon")
    seed: Seed = Field(0, description="of the corpus' order, the vectors, the rows and the data's order")
    bf16: bool = Field(True, description="products in bfloat16; false: float32")
    cpu_threads: Positive | None = Field(None, description="CPU only: threads that share a batch; left out: one a core")


class EvaluationConfig(Section):
    """What each stage is worth."""

    enabled: bool = Field(True, description="false: no evaluation")
    datasets: Names | None = Field(None, description="files of text to measure on; left out: what the corpus holds out")
    max_samples: Positive | None = Field(500, description="documents and questions measured on; null: all")
    qa: str | None = Field(
        None, description="JSONL with question, abstract and answer (yes, no or maybe), as PubMedQA; left out: none"
    )
    baseline_model: str | None = Field(None, description="another model to compare with, by its own tokenizer")


class PipelineConfig(Section):
    """Where the stages leave their results, and how often a failing one is tried again."""

    run_root: str = Field("runs/adapt", description="folder of the stages; RUN_ROOT/result is the model")
    max_retries: Count = Field(3, description="times that a stage is tried again after an error that isn't a mistake")
    retry_backoff: NonNegativeFloat = Field(5.0, description="seconds to wait before it is tried again")


class AdaptConfig(Section):
    """The configuration of `adapt-vocab`: models and corpus must be there, the rest may be left out."""

    models: ModelsConfig
    corpus: CorpusConfig
    term_mining: TermMiningConfig = TermMiningConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    tokenization: TokenizationConfig = TokenizationConfig()
    vocab_adaptation: AdaptationConfig = AdaptationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    pipeline: PipelineConfig = PipelineConfig()
