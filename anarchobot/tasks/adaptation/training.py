"""Training stages of adapt-vocab: token shards, stage 1 (embedding and head), stage 2 (all weights or LoRA), result."""

import math
import shutil
from pathlib import Path

from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config, DataConfig, LoraConfig, TrainConfig
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.sources.documents import Document
from anarchobot.exchange.fusing import fuse
from anarchobot.exchange.pretrained import load_pretrained
from anarchobot.runs import checkpoint
from anarchobot.tasks.adaptation.initialization import DOMAIN, Adaptation, adapted_config, write_adapted_model
from anarchobot.tasks.adaptation.stages import Output, StageInterrupted, StageResult
from anarchobot.tasks.pretrain import pretrain
from anarchobot.tokenizers.tokenizer import Tokenizer
from anarchobot.vocab.domain_corpus import read_corpus

WARMUP_FRACTION = 0.03
IRRELEVANT_SETTINGS = ("cpu_threads", "init_from", "save_dir")  # do not affect the weights


def train(
    run: Adaptation, corpus: StageResult, tokenizer: StageResult, target: Tokenizer, initial: StageResult
) -> dict[str, StageResult]:
    """Runs the enabled training stages. Returns the models after them as `stage 1` and `stage 2`, and `result`.

    Raises StageInterrupted if the user stops the training.
    """
    adaptation, models, last = run.settings.vocab_adaptation, dict[str, StageResult](), initial
    if not adaptation.enabled:
        return {"result": _write_result(run, target, last, adapters=None)}
    shards = _tokenize(run, corpus, tokenizer, target)
    if adaptation.stage1_steps:
        last = models["stage 1"] = _train_stage(run, "stage1", target, last, shards, first_sequence=0)
    if not adaptation.stage2_steps:
        return {**models, "result": _write_result(run, target, last, adapters=None)}
    first_sequence = adaptation.stage1_steps * adaptation.micro_batch_size * adaptation.grad_accum_steps
    if adaptation.stage2_first_sequence is not None:
        first_sequence = adaptation.stage2_first_sequence
    trained = _train_stage(run, "stage2", target, last, shards, first_sequence=first_sequence)
    if adaptation.stage2_use_lora:
        result = _write_result(run, target, last, adapters=trained)
    else:
        result = _write_result(run, target, trained, adapters=None)
    return {**models, "stage 2": result, "result": result}


def _tokenize(run: Adaptation, corpus: StageResult, tokenizer: StageResult, target: Tokenizer) -> StageResult:
    fraction = run.val_fraction(corpus)
    num_workers = run.settings.tokenization.num_workers

    def work(folder: Path) -> Output:
        done, total = 0, corpus.notes["domain"]["bytes"]

        def progress(size: int, tokens: int) -> None:
            nonlocal done
            done += size
            run.stages.progress(done / total)

        documents = map(Document, read_corpus(corpus.folder / DOMAIN, 0.0, "train"))
        manifest = Pretokenizer(
            target, folder, fraction, num_workers, dedup=False, seed=run.seed, progress=progress
        ).run(documents)
        files = [folder / "manifest.json", *(folder / name for shard in manifest.shards for name in shard.files)]
        return files, {"train_tokens": manifest.tokens("train"), "val_tokens": manifest.tokens("val")}

    settings = {"val_fraction": fraction, "seed": run.seed}
    inputs = {"corpus": corpus.digest, "tokenizer": tokenizer.digest}
    return run.stages.run("shards", work, settings=settings, inputs=inputs)


def _train_stage(
    run: Adaptation, name: str, target: Tokenizer, start: StageResult, shards: StageResult, *, first_sequence: int
) -> StageResult:
    adaptation = run.settings.vocab_adaptation
    is_stage1 = name == "stage1"
    steps, lr = (
        (adaptation.stage1_steps, adaptation.stage1_lr)
        if is_stage1
        else (adaptation.stage2_steps, adaptation.stage2_lr)
    )
    train = TrainConfig(
        total_steps=steps, lr=lr, min_lr=0.0, warmup_steps=math.ceil(WARMUP_FRACTION * steps), seed=run.seed,
        micro_batch_size=adaptation.micro_batch_size, grad_accum_steps=adaptation.grad_accum_steps,
        optimizer="adamw" if is_stage1 else adaptation.optimizer, trainable="embeddings" if is_stage1 else "all",
        precision=adaptation.precision, cpu_threads=adaptation.cpu_threads, first_sequence=first_sequence,
        eval_interval=max(1, steps // 5), ckpt_interval=max(1, min(500, steps // 5)), ckpt_keep=1,
        save_dir=str(run.stages.root / name), init_from=str(start.folder), checkpoint_path="auto", supervise=False,
    )  # fmt: skip
    lora = LoraConfig()
    if adaptation.stage2_use_lora and not is_stage1:
        lora = LoraConfig(
            r=adaptation.lora_r,
            alpha=adaptation.lora_alpha,
            dropout=adaptation.lora_dropout,
            target_modules=adaptation.lora_target_modules,
        )
    data = DataConfig(shard_dir=str(shards.folder), seq_len=adaptation.seq_len)
    config = Config(model=adapted_config(run.base, target), data=data, train=train, lora=lora)

    def work(folder: Path) -> Output:
        summary = pretrain(LoadedConfig(config, {}), show="nothing" if run.quiet else "progress")
        if not summary["finished"]:
            raise StageInterrupted
        step = checkpoint.step_folder(folder, summary["steps"])
        notes = {key: summary[key] for key in ("steps", "tokens", "final_loss", "best_val_bpb")}
        return [step / "model.npz", step / "state.json"], notes

    # Only non-default settings, so that a key added in a later version does not invalidate the record.
    settings = config.model_dump(include={"train": True, "lora": True}, exclude_defaults=True)
    for key in IRRELEVANT_SETTINGS:
        settings["train"].pop(key, None)
    settings["seq_len"] = adaptation.seq_len
    return run.stages.run(name, work, settings=settings, inputs={"start": start.digest, "shards": shards.digest})


def _write_result(run: Adaptation, target: Tokenizer, model: StageResult, adapters: StageResult | None) -> StageResult:
    """Writes the final run folder: the weights of `model`, with `adapters` fused in."""

    def newest(stage: StageResult) -> Path:
        return checkpoint.step_folder(stage.folder, stage.notes.get("steps", 0))

    def work(folder: Path) -> Output:
        if adapters is not None:
            shutil.rmtree(folder)  # fuse creates it atomically
            fuse(newest(model), newest(adapters), folder)
            step = checkpoint.step_folder(folder, 0)
        else:
            step = write_adapted_model(folder, dict(load_pretrained(str(newest(model))).weights), run.base, target)
        return [step / "model.npz", step / "state.json"], {}

    inputs = {"last": model.digest} if adapters is None else {"last": adapters.digest, "base": model.digest}
    return run.stages.run("result", work, settings={}, inputs=inputs)
