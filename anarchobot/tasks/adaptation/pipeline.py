"""A trained model moved to another vocabulary: corpus, terms, tokenizer, token vectors, alignment, new rows, training.

RUN_ROOT/corpus  terms  tokenizer  vectors  alignment  initial  shards  stage1  stage2  result  evaluate_*
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import Loaded, LoadedConfig
from anarchobot.config.schema import Config, DataConfig, LoraConfig, ModelConfig, TokenizerConfig, TrainConfig
from anarchobot.config.strict_yaml import dump
from anarchobot.data.document_batches import batch_documents
from anarchobot.data.pretokenize import PretokenizeOptions, pretokenize
from anarchobot.data.resume import source_provenance
from anarchobot.data.sources.documents import DocumentCounts, Document, from_files, open_source
from anarchobot.data.sources.files import find
from anarchobot.exchange.fusing import fuse
from anarchobot.exchange.pretrained import PretrainedModel, load_pretrained
from anarchobot.runs import checkpoint
from anarchobot.storage.durable import sha256_file, write_atomic
from anarchobot.storage.lock import FolderLock
from anarchobot.tasks.adaptation.checks import check, warnings
from anarchobot.tasks.adaptation.evaluation import figures, table
from anarchobot.tasks.adaptation.stages import Done, Stages, Stopped, Values
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tokenizers.tokenizer import Tokenizer, copy_tokenizer, digest, load_tokenizer
from anarchobot.tokenizers.training import limit_bytes, train_tokenizer
from anarchobot.vocab.canonical_tokens import forms
from anarchobot.vocab.domain_corpus import read_corpus, write_corpus
from anarchobot.vocab.domain_terms import mine_terms
from anarchobot.vocab.embedding_init import EMBEDDING, rebuilt, zero_rows
from anarchobot.vocab.target_tokenizer import extend, is_one_token
from anarchobot.vocab.token_alignment import Plan, Side, align
from anarchobot.vocab.token_vectors import Learning, learn_vectors, token_sentences
from anarchobot.vocab.vector_alignment import Floats

DOMAIN, GENERAL, HELD_OUT = "domain.jsonl", "general.jsonl", "held_out.jsonl"
WARMUP = 0.03
UNALIGNED = ("pieces", "mean", "random")  # methods that need no vectors
Made = tuple[Sequence[Path], Values]


def adapt_vocab(
    loaded: Loaded[AdaptConfig], *, quiet: bool = False, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Does what is still to be done in pipeline.run_root; returns the report that it also writes there, as report.json
    and report.md. `finished` is False when it was stopped.

    Raises UserError when model, tokenizers and settings do not belong together, before anything is written.
    """
    tell = say or (lambda text: None if quiet else print(text, file=sys.stderr, flush=True))
    settings = loaded.config
    base = load_pretrained(settings.models.source_model)
    check(loaded, base)
    for text in warnings(settings):
        tell(f"warning: {text}")
    root = Path(settings.pipeline.run_root)
    stages = Stages(root, settings.pipeline.max_retries, settings.pipeline.retry_backoff, tell)
    with FolderLock(root):
        if stages.begun_with("initial").get("model", base.digest) != base.digest:
            raise UserError(
                f"{loaded.where('pipeline.run_root')}: {root} holds the adaptation of another model than the one in "
                f"{base.folder}: name another folder, or remove it"
            )
        report = _Adaptation(settings, base, stages, quiet).execute_run()
        write_atomic(root / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        if report["evaluation"]:
            write_atomic(root / "report.md", table(report["evaluation"]) + "\n")
    return report


class _Adaptation:
    def __init__(self, settings: AdaptConfig, base: PretrainedModel, stages: Stages, quiet: bool) -> None:
        self.settings, self.base, self.stages, self.quiet = settings, base, stages, quiet
        source = settings.models.source_tokenizer
        self.source: Tokenizer = base.tokenizer if source is None else load_tokenizer(source)
        self.seed = settings.vocab_adaptation.seed

    def execute_run(self) -> dict[str, Any]:
        """All stages, each skipped while its record holds."""
        corpus, evaluation = self._corpus(), self.settings.evaluation
        if evaluation.enabled and evaluation.datasets is None and not corpus.notes["held_out"]:
            documents = corpus.notes["domain"]["kept"]
            raise UserError(
                f"corpus.val_fraction: none of {documents:,} documents is held out to evaluate on: raise it, name "
                "evaluation.datasets, or set evaluation.enabled: false"
            )
        made = self._tokenizer(corpus)
        self.target = load_tokenizer(made.folder)
        aligned = self._alignment(corpus, made)
        initial = self._initial(aligned, made)
        for text in self._report(aligned).get("advice", []):
            self.stages.say(f"warning: {text}")
        models = {"before": (self.settings.models.source_model, self.base.digest),
                  "initial": (str(initial.folder), initial.digest)}  # fmt: skip
        report = {"tokenizer": made.notes, "alignment": aligned.notes | initial.notes | self._report(aligned)}
        finished, result = True, initial.folder
        try:
            result = self._train(corpus, made, initial, models)
        except Stopped:
            finished = False
        baseline = evaluation.baseline_model
        if baseline is not None and evaluation.enabled:
            models["baseline"] = (baseline, load_pretrained(baseline).digest)
        measured = self._evaluate(corpus, models) if finished and evaluation.enabled else {}
        return {"finished": finished, "result": str(result), **report, "evaluation": measured}

    # The text.

    def _corpus(self) -> Done:
        own, cache = self.settings.corpus, self.settings.tokenization.cache_dir
        parts = {DOMAIN: own.domain} | ({GENERAL: own.general} if own.general is not None else {})
        data = {
            file: DataConfig(dataset=names, text_field=own.text_field, documents=own.documents, cache_dir=cache)
            for file, names in parts.items()
        }
        inputs: dict[str, str] = {}
        for file, reading in data.items():
            names = [reading.dataset] if isinstance(reading.dataset, str) else list(reading.dataset or [])
            inputs |= {f"{file}: {key}": str(value) for key, value in source_provenance(names, reading).items()}

        def work(folder: Path) -> Made:
            notes: Values = {}
            for file, reading in data.items():
                _, documents = open_source(reading, self.seed, DocumentCounts(), warn=self.stages.say)
                notes[file.removesuffix(".jsonl")] = write_corpus(
                    documents, folder / file, byte_budget=own.budget, deduplicate=own.dedup, seed=self.seed
                )
            held_out = [{"text": text} for text in read_corpus(folder / DOMAIN, own.val_fraction, "val")]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in held_out]
            (folder / HELD_OUT).write_text("".join(lines), encoding="utf-8")
            notes["held_out"] = len(held_out)
            return [folder / file for file in (*data, HELD_OUT)], notes

        return self.stages.run("corpus", work, settings=own.model_dump() | {"seed": self.seed}, inputs=inputs)

    def _texts(self, corpus: Done) -> Iterator[str]:
        """What is learned from: the field's training side, and the general text."""
        general = corpus.folder / GENERAL
        domain = read_corpus(corpus.folder / DOMAIN, self.settings.corpus.val_fraction, "train")
        return chain(domain, read_corpus(general, 0.0, "train") if general.is_file() else ())

    # The target tokenizer.

    def _tokenizer(self, corpus: Done) -> Done:
        given, own = self.settings.models.target_tokenizer, self.settings.tokenization
        inputs = {"corpus": corpus.digest, "source": digest(self.source)}
        vocab_size = own.vocab_size or self.base.model.vocab_size
        settings: Values = {"target": own.target, "vocab_size": vocab_size}
        words: list[str] = []
        if given is not None:
            settings, inputs = {}, {"given": digest(load_tokenizer(given)), **inputs}
        elif own.target == "extended":
            mined = self._terms(corpus)
            words = json.loads((mined.folder / "terms.json").read_text(encoding="utf-8"))["words"]
            settings, inputs = {"target": own.target}, inputs | {"terms": mined.digest}

        def work(folder: Path) -> Made:
            if given is not None:
                copy_tokenizer(load_tokenizer(given), folder)
            elif own.target == "extended":
                extend(self.source, words, folder)
            else:
                texts = read_corpus(corpus.folder / DOMAIN, self.settings.corpus.val_fraction, "train")
                sample = limit_bytes(texts, TokenizerConfig().max_train_mb, [0])  # shuffled: the start is a sample
                train_tokenizer(sample, folder / "tokenizer", vocab_size)
            target = load_tokenizer(folder)
            return list(target.files), self._tokens_per_byte(corpus, target) | {"vocab_size": target.vocab_size}

        return self.stages.run("tokenizer", work, settings=settings, inputs=inputs)

    def _tokens_per_byte(self, corpus: Done, target: Tokenizer) -> Values:
        """Of both tokenizers on the held-out text, or, where nothing is held out, on the rest."""
        file = corpus.folder / (HELD_OUT if corpus.notes["held_out"] else DOMAIN)
        size, both = 0, {"source": self.source, "target": target}
        tokens = dict.fromkeys(both, 0)
        for unit in batch_documents(from_files([str(file)], DataConfig(), DocumentCounts()), DocumentCounts(), False, 0.0):
            size += int(unit.sizes.sum())
            for name, tokenizer in both.items():
                tokens[name] += sum(map(len, tokenizer.encode_batch(unit.texts)))
        return {f"tokens_per_byte_{name}": round(n / size, 4) for name, n in tokens.items()}

    def _terms(self, corpus: Done) -> Done:
        own = self.settings.term_mining

        def work(folder: Path) -> Made:
            general = corpus.folder / GENERAL
            terms = mine_terms(
                read_corpus(corpus.folder / DOMAIN, self.settings.corpus.val_fraction, "train"),
                read_corpus(general, 0.0, "train") if general.is_file() else (),
                **own.model_dump(),
                is_known=lambda word: is_one_token(self.source, word),
            )
            values = {"words": [t.text for t in terms], "terms": [t._asdict() for t in terms]}
            write_atomic(folder / "terms.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")
            return [folder / "terms.json"], {"terms": len(terms), "best": ", ".join(t.text for t in terms[:5])}

        inputs = {"corpus": corpus.digest, "source": digest(self.source)}
        return self.stages.run("terms", work, settings=own.model_dump(), inputs=inputs)

    # Vectors, alignment, rows.

    def _vectors(self, corpus: Done, made: Done) -> Done:
        own, shortest = self.settings.embedding.fasttext, self.settings.tokenization.min_line_length
        learning = Learning(
            self.settings.embedding.backend, own.dim, own.window, own.negative, own.epochs, own.mincount, own.lr,
            own.thread,
        )  # fmt: skip

        def work(folder: Path) -> Made:
            arrays: dict[str, Any] = {}
            for name, tokenizer in (("source", self.source), ("target", self.target)):
                sentences = token_sentences(self._texts(corpus), tokenizer, shortest)
                arrays[name], arrays[f"{name}_counts"] = learn_vectors(
                    sentences, tokenizer.vocab_size, learning, self.seed, folder
                )
            np.savez(folder / "vectors.npz", allow_pickle=False, **arrays)
            tokens = {f"{name}_tokens": int(arrays[f"{name}_counts"].sum()) for name in ("source", "target")}
            return [folder / "vectors.npz"], tokens

        settings = self.settings.embedding.model_dump() | {"min_line_length": shortest, "seed": self.seed}
        inputs = {"corpus": corpus.digest, "tokenizer": made.digest, "source": digest(self.source)}
        return self.stages.run("vectors", work, settings=settings, inputs=inputs)

    def _alignment(self, corpus: Done, made: Done) -> Done:
        own = self.settings.alignment
        inputs = {"tokenizer": made.digest, "source": digest(self.source)}
        vectors = None if own.method in UNALIGNED else self._vectors(corpus, made)
        if vectors is not None:
            inputs["vectors"] = vectors.digest

        def side(name: str, tokenizer: Tokenizer) -> Side:
            if vectors is None:
                size = tokenizer.vocab_size
                return Side(tokenizer, np.zeros((size, 1), np.float32), np.zeros(size, np.int64))
            with np.load(vectors.folder / "vectors.npz", allow_pickle=False) as arrays:
                return Side(tokenizer, arrays[name], arrays[f"{name}_counts"])

        def work(folder: Path) -> Made:
            source, target = side("source", self.source), side("target", self.target)
            plan, report = align(source, target, **own.model_dump(), seed=self.seed)
            np.savez(folder / "plan.npz", allow_pickle=False, **vars(plan))
            write_atomic(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
            short = {key: value for key, value in report.items() if key not in ("examples", "routes")}
            return [folder / "plan.npz", folder / "report.json"], short

        return self.stages.run("alignment", work, settings=own.model_dump() | {"seed": self.seed}, inputs=inputs)

    def _report(self, aligned: Done) -> Values:
        return dict(json.loads((aligned.folder / "report.json").read_text(encoding="utf-8")))

    def _initial(self, aligned: Done, made: Done) -> Done:
        def work(folder: Path) -> Made:
            with np.load(aligned.folder / "plan.npz", allow_pickle=False) as arrays:
                plan = Plan(**{name: arrays[name] for name in arrays.files})
            params = rebuilt(self.base.weights, plan, self.seed)
            step = self._write_model(folder, params)
            return [step / "model.npz", step / "state.json"], {"zero_initialised": zero_rows(params[EMBEDDING])}

        inputs = {"alignment": aligned.digest, "tokenizer": made.digest, "model": self.base.digest}
        return self.stages.run("initial", work, settings={"seed": self.seed}, inputs=inputs)

    @property
    def _model(self) -> ModelConfig:
        begin = None
        if self.base.model.bos_id is not None:
            begins = (i for i, form in enumerate(forms(self.target)) if form == (b"begin", "special"))
            begin = next(begins, self.target.eod_id)
        return self.base.model.model_copy(update={"vocab_size": self.target.vocab_size, "bos_id": begin})

    def _write_model(self, folder: Path, params: Mapping[str, Floats]) -> Path:
        """A run's folder with step 0, ready to generate, export and tune."""
        name = copy_tokenizer(self.target, folder)
        data = DataConfig(seq_len=min(self.base.config.data.seq_len, self._model.max_seq_len))
        train = TrainConfig(save_dir=str(folder), tokenizer_path=str(folder / name))
        config = Config(model=self._model, data=data, train=train)
        write_atomic(folder / "config.yaml", dump(config.model_dump()))
        state = {"tokens": 0, "adapted": str(self.base.folder), "config": config.model_dump()}
        arrays = {f"{checkpoint.PARAMS}{key}": array for key, array in params.items()}
        return checkpoint.save(folder, 0, arrays, state)

    # The training.

    def _train(self, corpus: Done, made: Done, initial: Done, models: dict[str, tuple[str, str]]) -> Path:
        own = self.settings.vocab_adaptation
        if not own.enabled:
            return self._result(initial, None).folder
        shards = self._shards(corpus, made)
        seen = own.stage1_steps * own.micro_batch_size * own.grad_accum_steps
        last = initial
        if own.stage1_steps:
            last = self._stage("stage1", last, shards, steps=own.stage1_steps, lr=own.stage1_lr, first=0)
            models["stage 1"] = (str(last.folder), last.digest)
        if not own.stage2_steps:
            return self._result(last, None).folder
        first = seen if own.stage2_first_sequence is None else own.stage2_first_sequence
        tuned = self._stage("stage2", last, shards, steps=own.stage2_steps, lr=own.stage2_lr, first=first)
        result = self._result(tuned, last if own.stage2_use_lora else None)
        models["stage 2"] = (str(result.folder), result.digest)
        return result.folder

    def _shards(self, corpus: Done, made: Done) -> Done:
        fraction, own = self.settings.corpus.val_fraction, self.settings.tokenization

        def work(folder: Path) -> Made:
            texts = map(Document, read_corpus(corpus.folder / DOMAIN, 0.0, "train"))
            manifest = pretokenize(texts, self.target, folder, PretokenizeOptions(fraction, own.num_workers, dedup=False, seed=self.seed))
            written = [folder / "manifest.json", *(folder / name for shard in manifest.shards for name in shard.files)]
            return written, {"train_tokens": manifest.tokens("train"), "val_tokens": manifest.tokens("val")}

        settings = {"val_fraction": fraction, "seed": self.seed}
        return self.stages.run(
            "shards", work, settings=settings, inputs={"corpus": corpus.digest, "tokenizer": made.digest}
        )

    def _stage(self, name: str, start: Done, shards: Done, *, steps: int, lr: float, first: int) -> Done:
        own, second = self.settings.vocab_adaptation, name == "stage2"
        adapters = second and own.stage2_use_lora
        lora = LoraConfig(
            r=own.lora_r, alpha=own.lora_alpha, dropout=own.lora_dropout, target_modules=own.lora_target_modules
        )

        def config(folder: Path) -> Config:
            train = TrainConfig(
                total_steps=steps, lr=lr, min_lr=0.0, warmup_steps=math.ceil(WARMUP * steps), seed=self.seed,
                micro_batch_size=own.micro_batch_size, grad_accum_steps=own.grad_accum_steps,
                optimizer=own.optimizer if second else "adamw", trainable="all" if second else "embeddings",
                precision=own.precision, cpu_threads=own.cpu_threads, first_sequence=first,
                eval_interval=max(1, steps // 5), ckpt_interval=max(1, min(500, steps // 5)), ckpt_keep=1,
                save_dir=str(folder), init_from=str(start.folder), checkpoint_path="auto", supervise=False,
            )  # fmt: skip
            data = DataConfig(shard_dir=str(shards.folder), seq_len=own.seq_len)
            return Config(model=self._model, data=data, train=train, lora=lora if adapters else LoraConfig())

        def work(folder: Path) -> Made:
            summary = pretrain(LoadedConfig(config(folder), {}), show="nothing" if self.quiet else "progress")
            if not summary["finished"]:
                raise Stopped
            step = checkpoint.step_folder(folder, summary["steps"])
            notes = {key: summary[key] for key in ("steps", "tokens", "final_loss", "best_val_bpb")}
            return [step / "model.npz", step / "state.json"], notes

        # Without defaults, so that a key of a later version makes nothing anew.
        plain = config(Path(name)).model_dump(include={"train": True, "lora": True}, exclude_defaults=True)
        for key in ("cpu_threads", "init_from", "save_dir"):  # that change no weight
            plain["train"].pop(key, None)
        settings = plain | {"seq_len": own.seq_len}
        return self.stages.run(name, work, settings=settings, inputs={"start": start.digest, "shards": shards.digest})

    def _result(self, last: Done, base: Done | None) -> Done:
        """The model that the last stage ended with; adapters are fused into `base`."""

        def work(folder: Path) -> Made:
            newest = checkpoint.step_folder(last.folder, last.notes.get("steps", 0))
            if base is not None:
                shutil.rmtree(folder)
                fuse(checkpoint.step_folder(base.folder, base.notes.get("steps", 0)), newest, folder)
                step = checkpoint.step_folder(folder, 0)
            else:
                step = self._write_model(folder, dict(load_pretrained(str(newest)).weights))
            return [step / "model.npz", step / "state.json"], {}

        inputs = {"last": last.digest} | ({"base": base.digest} if base is not None else {})
        return self.stages.run("result", work, settings={}, inputs=inputs)

    # What it was worth.

    def _evaluate(self, corpus: Done, models: dict[str, tuple[str, str]]) -> dict[str, Any]:
        own = self.settings.evaluation
        texts = own.datasets or [str(corpus.folder / HELD_OUT)]
        files = [*find(own.datasets or []), *([Path(own.qa)] if own.qa is not None else [])]
        digests = {str(file): sha256_file(file) for file in files}
        results = {}
        for name, (path, of_model) in models.items():

            def work(folder: Path, path: str = path) -> Made:
                found = figures(path, texts, own.max_samples, own.qa)
                write_atomic(folder / "figures.json", json.dumps(found, indent=1) + "\n")
                return [folder / "figures.json"], found

            settings = {"datasets": own.datasets, "max_samples": own.max_samples, "qa": own.qa}
            stage = f"evaluate_{name.replace(' ', '')}"
            inputs = {"model": of_model, "corpus": corpus.digest, **digests}
            results[name] = self.stages.run(stage, work, settings=settings, inputs=inputs).notes
        return results
