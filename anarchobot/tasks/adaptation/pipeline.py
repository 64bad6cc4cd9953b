"""adapt-vocab: adapts a trained model to another vocabulary.

Stages, each in a folder of that name in pipeline.run_root:

    corpus  terms  tokenizer  vectors  alignment  initial  shards  stage1  stage2  result  evaluate_*
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from anarchobot.config.adapt_schema import AdaptConfig
from anarchobot.config.errors import UserError
from anarchobot.config.loading import Loaded
from anarchobot.data.sources.files import find
from anarchobot.exchange.adapters import same_base
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.storage.durable import sha256_file, write_atomic
from anarchobot.storage.lock import FolderLock
from anarchobot.tasks.adaptation.checks import check, warnings
from anarchobot.tasks.adaptation.evaluation import evaluate_model, to_markdown
from anarchobot.tasks.adaptation.initialization import (
    HELD_OUT,
    Adaptation,
    align_tokens,
    build_corpus,
    build_tokenizer,
    initialize_model,
)
from anarchobot.tasks.adaptation.stages import Output, StageInterrupted, StageResult, StageRunner
from anarchobot.tasks.adaptation.training import train
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.training.display import activity_bar


def adapt_vocab(
    loaded: Loaded[AdaptConfig], *, quiet: bool = False, log: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Runs the stages that are not done yet. Returns the report, which is also written as report.json and report.md.

    `finished` is False if the user stopped the run. Raises UserError if model, tokenizers and settings do not match,
    before anything is written.
    """
    log = log or (lambda text: None if quiet else print(text, file=sys.stderr, flush=True))
    base = load_pretrained(loaded.config.models.source_model).dequantized()
    loaded = _with_seq_len(loaded, base.model.max_seq_len)
    settings = loaded.config
    check(loaded, base)
    for text in (*base.warnings, *warnings(settings)):
        log(f"warning: {text}")
    root = Path(settings.pipeline.run_root)
    stages = StageRunner(
        root,
        settings.pipeline.max_retries,
        settings.pipeline.retry_backoff,
        log,
        busy=lambda name: activity_bar(name, quiet or name in ("stage1", "stage2")),  # training has its own bar
    )
    path = settings.models.source_tokenizer
    source = base.tokenizer if path is None else load_tokenizer(path)
    # That of an earlier version remains, so that finished stages remain valid.
    base_digest = stages.recorded_inputs("initial").get("model", base.digest)
    run = Adaptation(settings, base, base_digest, source, stages, quiet)
    with FolderLock(root):
        if not same_base(run.base_digest, base.digest):
            raise UserError(
                f"{loaded.where('pipeline.run_root')}: {root} contains the adaptation of another model than the one in "
                f"{base.name}: choose another folder, or remove it"
            )
        report = _run_stages(run)
        write_atomic(root / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        if report["evaluation"]:
            write_atomic(root / "report.md", to_markdown(report["evaluation"]) + "\n")
    return report


def _with_seq_len(loaded: Loaded[AdaptConfig], max_seq_len: int) -> Loaded[AdaptConfig]:
    """Limits the default of vocab_adaptation.seq_len to what the model supports."""
    training = loaded.config.vocab_adaptation
    if "vocab_adaptation.seq_len" in loaded.sources or training.seq_len <= max_seq_len:
        return loaded
    training = training.model_copy(update={"seq_len": max_seq_len})
    return replace(loaded, config=loaded.config.model_copy(update={"vocab_adaptation": training}))


def _run_stages(run: Adaptation) -> dict[str, Any]:
    corpus, evaluation = build_corpus(run), run.settings.evaluation
    if evaluation.enabled and evaluation.datasets is None and not corpus.notes["held_out"]:
        documents = corpus.notes["domain"]["kept"]
        raise UserError(
            f"corpus.val_fraction: none of {documents:,} documents is held out for evaluation: raise it, set "
            "evaluation.datasets, or set evaluation.enabled: false"
        )
    tokenizer = build_tokenizer(run, corpus)
    target = load_tokenizer(tokenizer.folder)
    alignment = align_tokens(run, corpus, tokenizer, target)
    initial = initialize_model(run, alignment, tokenizer, target)
    alignment_report = json.loads((alignment.folder / "report.json").read_text(encoding="utf-8"))
    for text in alignment_report.get("advice", []):
        run.stages.log(f"warning: {text}")
    models = {
        "before": (run.settings.models.source_model, run.base_digest),
        "initial": (str(initial.folder), initial.digest),
    }
    finished, result = True, initial
    try:
        trained = train(run, corpus, tokenizer, target, initial)
        result = trained.pop("result")
        models |= {name: (str(model.folder), model.digest) for name, model in trained.items()}
    except StageInterrupted:
        finished = False
    if evaluation.enabled and (baseline := evaluation.baseline_model) is not None:
        models["baseline"] = (baseline, load_pretrained(baseline).digest)
    return {
        "finished": finished,
        "result": str(result.folder),
        "tokenizer": tokenizer.notes,
        "alignment": alignment.notes | initial.notes | alignment_report,
        "evaluation": _evaluate(run, corpus, models) if finished and evaluation.enabled else {},
    }


def _evaluate(run: Adaptation, corpus: StageResult, models: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Evaluates the models, given as path and digest by name."""
    evaluation = run.settings.evaluation
    texts = evaluation.datasets or [str(corpus.folder / HELD_OUT)]
    files = [*find(evaluation.datasets or []), *([Path(evaluation.qa)] if evaluation.qa is not None else [])]
    file_digests = {str(file): sha256_file(file) for file in files}
    settings = {"datasets": evaluation.datasets, "max_samples": evaluation.max_samples, "qa": evaluation.qa}
    results = {}
    for name, (path, model_digest) in models.items():

        def work(folder: Path, path: str = path) -> Output:
            metrics = evaluate_model(path, texts, evaluation.max_samples, evaluation.qa, run.stages.progress)
            write_atomic(folder / "figures.json", json.dumps(metrics, indent=1) + "\n")
            return [folder / "figures.json"], metrics

        inputs = {"model": model_digest, "corpus": corpus.digest, **file_digests}
        stage = f"evaluate_{name.replace(' ', '')}"
        results[name] = run.stages.run(stage, work, settings=settings, inputs=inputs).notes
    return results
