"""Stages of adapt-vocab from the text to a model with the new vocabulary, before training.

corpus -> [terms] -> tokenizer -> [vectors] -> alignment -> initial
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, DataConfig, ModelConfig, TokenizerConfig
from anarchobot.data.document_batches import batch_documents
from anarchobot.data.resume import source_provenance
from anarchobot.data.sources.documents import DocumentCounts, from_files, open_source, total_bytes
from anarchobot.exchange.pretrained import PretrainedModel
from anarchobot.model.architecture import architecture
from anarchobot.runs import checkpoint
from anarchobot.runs.write_model import write_model
from anarchobot.storage.durable import write_atomic
from anarchobot.tasks.adaptation.stages import Output, StageResult, StageRunner, Values
from anarchobot.tokenizers.canonical_tokens import BEGIN, canonical_tokens
from anarchobot.tokenizers.tokenizer import Tokenizer, copy_tokenizer, digest, load_tokenizer
from anarchobot.tokenizers.training import limit_bytes, train_tokenizer
from anarchobot.vocab.domain_corpus import read_corpus, write_corpus
from anarchobot.vocab.domain_terms import mine_terms
from anarchobot.vocab.embedding_init import count_zero_rows, initialize_embeddings
from anarchobot.vocab.target_tokenizer import extend, is_one_token
from anarchobot.vocab.token_alignment import (
    BASELINES,
    WITHOUT_SOURCE_VECTORS,
    AlignmentPlan,
    Method,
    Vocabulary,
    align,
    choose_method,
)
from anarchobot.vocab.token_vectors import VectorSettings, token_sentences, train_vectors
from anarchobot.vocab.vector_alignment import Floats

MIN_HELD_OUT, MAX_HELD_OUT = 10, 0.25  # documents, and their largest fraction
DOMAIN, GENERAL, HELD_OUT = "domain.jsonl", "general.jsonl", "held_out.jsonl"


@dataclass(frozen=True)
class Adaptation:
    """What all stages share: the configuration, the model to adapt and its tokenizer."""

    settings: AdaptConfig
    base: PretrainedModel
    base_digest: str
    source: Tokenizer
    stages: StageRunner
    quiet: bool

    @property
    def seed(self) -> int:
        return self.settings.vocab_adaptation.seed

    def val_fraction(self, corpus: StageResult) -> float:
        fraction: float = corpus.notes.get("val_fraction", self.settings.corpus.val_fraction)  # not noted before 0.4.0
        return fraction

    def domain_texts(self, corpus: StageResult) -> Iterator[str]:
        return read_corpus(corpus.folder / DOMAIN, self.val_fraction(corpus), "train")

    def general_texts(self, corpus: StageResult) -> Iterator[str]:
        file = corpus.folder / GENERAL
        return read_corpus(file, 0.0, "train") if file.is_file() else iter(())


def build_corpus(run: Adaptation) -> StageResult:
    """Writes the domain text, the general text and the held-out domain documents."""
    config, cache = run.settings.corpus, run.settings.tokenization.cache_dir
    datasets = {DOMAIN: config.domain} | ({GENERAL: config.general} if config.general is not None else {})
    sources = {
        file: DataConfig(dataset=names, text_field=config.text_field, documents=config.documents, cache_dir=cache)
        for file, names in datasets.items()
    }
    inputs: dict[str, str] = {}
    for file, data in sources.items():
        inputs |= {f"{file}: {key}": str(value) for key, value in source_provenance(data.datasets, data).items()}

    def work(folder: Path) -> Output:
        notes: Values = {}
        sizes = [total_bytes(data.datasets) for data in sources.values()]
        for number, (file, data) in enumerate(sources.items()):
            counts = DocumentCounts()
            size = min(sizes[number] or config.budget, config.budget)

            def progress(written: int, number: int = number, size: int = size) -> None:
                run.stages.progress((number + written / size) / len(sources))

            _, documents = open_source(data, run.seed, counts, warn=run.stages.log)
            notes[file.removesuffix(".jsonl")] = write_corpus(
                documents,
                folder / file,
                byte_budget=config.budget,
                deduplicate=config.dedup,
                seed=run.seed,
                progress=progress,
            )
            for line in counts.details():
                run.stages.log(line)
        fraction = _enough_to_hold_out(config.val_fraction, notes[DOMAIN.removesuffix(".jsonl")]["kept"])
        if fraction != config.val_fraction:
            run.stages.log(
                f"corpus.val_fraction: {fraction:.2g} instead of {config.val_fraction:g}: there are few documents"
            )
        held_out = [{"text": text} for text in read_corpus(folder / DOMAIN, fraction, "val")]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in held_out]
        (folder / HELD_OUT).write_text("".join(lines), encoding="utf-8")
        notes |= {"held_out": len(held_out), "val_fraction": fraction}
        return [folder / file for file in (*sources, HELD_OUT)], notes

    return run.stages.run("corpus", work, settings=config.model_dump() | {"seed": run.seed}, inputs=inputs)


def _enough_to_hold_out(fraction: float, documents: int) -> float:
    """The fraction, or what holds out about MIN_HELD_OUT documents: documents are assigned by their hashes, so that a
    small fraction of few documents may be none."""
    return max(fraction, min(MAX_HELD_OUT, MIN_HELD_OUT / max(1, documents))) if fraction else 0.0


def build_tokenizer(run: Adaptation, corpus: StageResult) -> StageResult:
    """Copies, trains or extends the target tokenizer, and compares its tokens per byte with the source's."""
    given, tokenization = run.settings.models.target_tokenizer, run.settings.tokenization
    inputs = {"corpus": corpus.digest, "source": digest(run.source)}
    vocab_size = tokenization.vocab_size or run.base.model.vocab_size
    settings: Values = {"target": tokenization.target, "vocab_size": vocab_size}
    terms: list[str] = []
    if given is not None:
        settings, inputs = {}, {"given": digest(load_tokenizer(given)), **inputs}
    elif tokenization.target == "extended":
        mined = _mine_terms(run, corpus)
        terms = json.loads((mined.folder / "terms.json").read_text(encoding="utf-8"))["words"]
        settings, inputs = {"target": tokenization.target}, inputs | {"terms": mined.digest}

    def work(folder: Path) -> Output:
        if given is not None:
            copy_tokenizer(load_tokenizer(given), folder)
        elif tokenization.target == "extended":
            extend(run.source, terms, folder)
        else:  # the corpus is shuffled, so its beginning is a sample
            sample = limit_bytes(run.domain_texts(corpus), TokenizerConfig().max_train_mb, [0])
            train_tokenizer(sample, folder / "tokenizer", vocab_size)
        target = load_tokenizer(folder)
        return list(target.files), _tokens_per_byte(run, corpus, target) | {"vocab_size": target.vocab_size}

    return run.stages.run("tokenizer", work, settings=settings, inputs=inputs)


def _mine_terms(run: Adaptation, corpus: StageResult) -> StageResult:
    options = run.settings.term_mining
    done, total = 0, sum(corpus.notes[name]["bytes"] for name in ("domain", "general") if name in corpus.notes)

    def counted(texts: Iterator[str]) -> Iterator[str]:
        nonlocal done
        for text in texts:
            yield text
            done += len(text.encode())
            run.stages.progress(done / total)

    def work(folder: Path) -> Output:
        terms = mine_terms(
            counted(run.domain_texts(corpus)),
            counted(run.general_texts(corpus)),
            **options.model_dump(),
            is_known=lambda word: is_one_token(run.source, word),
        )
        values = {"words": [t.text for t in terms], "terms": [t._asdict() for t in terms]}
        _write_json(folder / "terms.json", values)
        return [folder / "terms.json"], {"terms": len(terms), "best": ", ".join(t.text for t in terms[:5])}

    inputs = {"corpus": corpus.digest, "source": digest(run.source)}
    return run.stages.run("terms", work, settings=options.model_dump(), inputs=inputs)


def _tokens_per_byte(run: Adaptation, corpus: StageResult, target: Tokenizer) -> Values:
    """Measures both tokenizers on the held-out text, or on all domain text if none is held out."""
    file = corpus.folder / (HELD_OUT if corpus.notes["held_out"] else DOMAIN)
    documents = from_files([str(file)], DataConfig(), DocumentCounts())
    tokenizers, size = {"source": run.source, "target": target}, 0
    tokens = dict.fromkeys(tokenizers, 0)
    for batch in batch_documents(documents, DocumentCounts(), False, 0.0):
        size += int(batch.sizes.sum())
        for name, tokenizer in tokenizers.items():
            tokens[name] += sum(map(len, tokenizer.encode_batch(batch.texts)))
    return {f"tokens_per_byte_{name}": round(count / size, 4) for name, count in tokens.items()}


def align_tokens(run: Adaptation, corpus: StageResult, tokenizer: StageResult, target: Tokenizer) -> StageResult:
    """Chooses the source tokens of each target token: plan.npz and report.json."""
    method = run.settings.alignment.method or choose_method(run.base.model.tie_embeddings)
    options = run.settings.alignment.model_dump() | {"method": method}
    inputs = {"tokenizer": tokenizer.digest, "source": digest(run.source)}
    vectors = None if method in BASELINES else _train_vectors(run, corpus, tokenizer, target, method)
    if vectors is not None:
        inputs["vectors"] = vectors.digest

    def vocabulary(name: str, tokenizer: Tokenizer) -> Vocabulary:
        if vectors is not None:
            with np.load(vectors.folder / "vectors.npz", allow_pickle=False) as arrays:
                if name in arrays.files:
                    return Vocabulary(tokenizer, arrays[name], arrays[f"{name}_counts"])
        size = tokenizer.vocab_size
        return Vocabulary(tokenizer, np.zeros((size, 1), np.float32), np.zeros(size, np.int64))

    def work(folder: Path) -> Output:
        plan, report = align(vocabulary("source", run.source), vocabulary("target", target), **options, seed=run.seed)
        report |= {"method": method}
        np.savez(folder / "plan.npz", allow_pickle=False, **vars(plan))
        _write_json(folder / "report.json", report)
        notes = {key: value for key, value in report.items() if key not in ("examples", "routes")}
        return [folder / "plan.npz", folder / "report.json"], notes

    return run.stages.run("alignment", work, settings=options | {"seed": run.seed}, inputs=inputs)


def _train_vectors(
    run: Adaptation, corpus: StageResult, tokenizer: StageResult, target: Tokenizer, method: Method
) -> StageResult:
    embedding, min_line_length = run.settings.embedding, run.settings.tokenization.min_line_length
    options = embedding.fasttext.model_dump()
    vector_settings = VectorSettings(embedding.backend, threads=options.pop("thread"), **options)
    tokenizers = {"source": run.source, "target": target}
    if method in WITHOUT_SOURCE_VECTORS:
        del tokenizers["source"]

    def work(folder: Path) -> Output:
        arrays: dict[str, Any] = {}
        for number, (name, vocab_tokenizer) in enumerate(tokenizers.items()):

            def progress(fraction: float, number: int = number) -> None:
                run.stages.progress((number + fraction) / len(tokenizers))

            texts = chain(run.domain_texts(corpus), run.general_texts(corpus))
            sentences = token_sentences(texts, vocab_tokenizer, min_line_length)
            arrays[name], arrays[f"{name}_counts"] = train_vectors(
                sentences, vocab_tokenizer.vocab_size, vector_settings, run.seed, folder, progress
            )
        np.savez(folder / "vectors.npz", allow_pickle=False, **arrays)
        tokens = {f"{name}_tokens": int(arrays[f"{name}_counts"].sum()) for name in tokenizers}
        return [folder / "vectors.npz"], tokens

    settings = embedding.model_dump() | {"min_line_length": min_line_length, "seed": run.seed, "of": list(tokenizers)}
    inputs = {"corpus": corpus.digest, "tokenizer": tokenizer.digest, "source": digest(run.source)}
    return run.stages.run("vectors", work, settings=settings, inputs=inputs)


def initialize_model(run: Adaptation, alignment: StageResult, tokenizer: StageResult, target: Tokenizer) -> StageResult:
    """Writes the model with new embedding and output head rows and otherwise unchanged weights."""

    def work(folder: Path) -> Output:
        with np.load(alignment.folder / "plan.npz", allow_pickle=False) as arrays:
            if "ends" not in arrays.files:
                raise UserError(f"{alignment.folder}: written by an earlier version: remove this folder")
            plan = AlignmentPlan(**{name: arrays[name] for name in arrays.files})
        by_token = architecture(run.base.model.architecture).token_parameters(run.base.model)
        params = initialize_embeddings(run.base.weights, by_token, run.source.vocab_size, plan, run.seed)
        step = write_adapted_model(folder, params, run.base, target)
        return [step / "model.npz", step / "state.json"], {"zero_initialised": count_zero_rows(params[by_token[0]])}

    inputs = {"alignment": alignment.digest, "tokenizer": tokenizer.digest, "model": run.base_digest}
    return run.stages.run("initial", work, settings={"seed": run.seed}, inputs=inputs)


def adapted_config(base: PretrainedModel, target: Tokenizer) -> ModelConfig:
    """The model's configuration with the vocabulary size and begin token of the target tokenizer. Raises UserError if
    the model's vocabulary can't be changed."""
    bos_id = base.model.bos_id
    if bos_id is not None and bos_id >= 0:
        begin_ids = (i for i, token in enumerate(canonical_tokens(target)) if token == BEGIN)
        bos_id = next(begin_ids, target.eod_id)
    resized = architecture(base.model.architecture).with_vocab_size(base.model, target.vocab_size)
    return resized.model_copy(update={"bos_id": bos_id})


def write_adapted_model(folder: Path, weights: Mapping[str, Floats], base: PretrainedModel, target: Tokenizer) -> Path:
    """Writes a run folder with a checkpoint at step 0; returns the checkpoint folder."""
    model = adapted_config(base, target)
    data = DataConfig(seq_len=min(base.config.data.seq_len, model.max_seq_len))
    write_model(folder, Config(model=model, data=data), target, weights, {"adapted": base.name})
    return checkpoint.step_folder(folder, 0)


def _write_json(file: Path, values: Values) -> None:
    write_atomic(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
