"""Tries what can be done with each of the given models, and prints a table of it. Needs torch and transformers.

    .venv/bin/python benchmarks/models.py FOLDER...

FOLDER is a Hugging Face model folder, or holds several. The models should be tiny: everything runs in float32 on a CPU,
and each is trained for a few steps. Columns:

    computed by    the own implementation (llama), or mlx-lm's module and automatic differentiation (mlx_lm)
    logits         largest difference from transformers' logits of 120 tokens
    mlx-lm         the same for mlx-lm's own logits
    sft, LoRA, QLoRA, dpo    three steps; QLoRA on a 4-bit folder written by mlx_lm.convert
    losses         largest difference of ten LoRA steps' losses from those of mlx-lm's trainer on the same rows
    generate, serve          a few tokens through the command and the server
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROWS, LENGTH, STEPS, RANK, SCALE = 2, 48, 10, 8, 2.0
GROUP = 32  # columns of a quantized group: tiny models are narrow
ADAPTED = (
    ("q_proj", "v_proj"),
    ("q_proj", "o_proj"),
    ("o_proj", "down_proj"),
    ("query_key_value", "dense_h_to_4h"),
    ("c_attn", "c_fc"),
)
PROGRAM = [sys.executable, "-m", "anarchobot"]
COLUMNS = ("computed by", "logits", "mlx-lm", "sft", "LoRA", "QLoRA", "dpo", "losses", "generate", "serve")


def our_logits(folder: Path, ids: Any) -> Any:
    import mlx.core as mx

    from anarchobot.inference.model import load_model
    from anarchobot.model.architecture import forward_pass
    from anarchobot.model.loss import logits

    model, _ = load_model(folder)
    forward = forward_pass(model.config)
    hidden = forward.hidden_states(model.params, mx.array(ids)[None], model.config, dtype=mx.float32)
    return np.array(logits(hidden, model.params, model.config))[0]


def transformers_logits(folder: Path, ids: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()


def mlx_lm_model(folder: Path) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)

    def to_float32(a: mx.array) -> mx.array:
        return a.astype(mx.float32) if a.dtype in (mx.bfloat16, mx.float16) else a

    model.update(tree_map(to_float32, model.parameters()))
    return model


def mlx_lm_logits(folder: Path, ids: Any) -> Any:
    import mlx.core as mx

    return np.array(mlx_lm_model(folder)(mx.array(ids)[None]))[0]


def adapted_modules(folder: Path) -> dict[str, str]:
    """The matrices to train adapters for: their names within a block, by the last part of the name. The first pair of
    ADAPTED that mlx-lm's module has."""
    import mlx.nn as nn

    found = {
        name.rpartition(".")[2]: name
        for name, module in mlx_lm_model(folder).layers[0].named_modules()
        if isinstance(module, nn.Linear)
    }
    pair = next(pair for pair in ADAPTED if set(pair) <= set(found))
    return {name: found[name] for name in pair}


def our_losses(folder: Path, rows: Any) -> list[float]:
    from anarchobot.config.schema import Config
    from anarchobot.data.windows import Batch
    from anarchobot.exchange.pretrained import load_pretrained
    from anarchobot.training.mlx_engine import MLXEngine

    base = load_pretrained(str(folder))
    train = {"optimizer": "adamw", "micro_batch_size": ROWS, "weight_decay": 0.01, "device": "cpu", "cpu_threads": 1}
    values = {
        "model": base.model.model_dump(), "data": {"seq_len": LENGTH}, "train": train,
        "lora": {"r": RANK, "alpha": SCALE * RANK, "target_modules": list(adapted_modules(folder))},
    }  # fmt: skip
    engine = MLXEngine(Config.model_validate(values), base.weights)
    _start_equal(engine)
    batch = Batch(rows[None, :, :-1], rows[None, :, 1:])
    return [engine.train_step(batch, step + 1, 1e-3, 0.95).loss for step in range(STEPS)]


def _start_equal(engine: Any) -> None:
    """Sets lora_a to values that depend only on the shape, as `mlx_lm_losses` does."""
    import mlx.core as mx

    for name, value in engine.params.items():
        if name.endswith(".lora_a"):
            engine.params[name] = mx.array(_factors(value.shape))


def _factors(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(0).uniform(-0.1, 0.1, shape).astype(np.float32)


def mlx_lm_losses(folder: Path, rows: Any) -> list[float]:
    import mlx.core as mx
    import mlx.optimizers
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from anarchobot.optim.param_groups import ADAMW_BETA2

    model = mlx_lm_model(folder)
    model.freeze()
    keys = list(adapted_modules(folder).values())
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys})
    trainable = tree_flatten(model.trainable_parameters())
    start = [(name, mx.array(_factors(a.shape))) for name, a in trainable if name.endswith(".lora_a")]
    model.update(tree_unflatten(start))
    losses: list[float] = []

    class Losses(TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            losses.append(info["train_loss"])

    with tempfile.TemporaryDirectory() as out:
        train(
            model,
            mlx.optimizers.AdamW(1e-3, betas=[0.9, ADAMW_BETA2], weight_decay=0.01, bias_correction=True),
            [(row, 0) for row in rows.tolist()],
            args=TrainingArgs(
                batch_size=ROWS, iters=STEPS, val_batches=0, steps_per_report=1, steps_per_save=10**9,
                max_seq_length=LENGTH + 1, adapter_file=str(Path(out) / "a.safetensors"),
            ),
            training_callback=Losses(),
        )  # fmt: skip
    return losses


def run(*words: str) -> str:
    """Runs a command of the program. Raises RuntimeError with its last line if it fails."""
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


def tune(command: str, model: Path, data: Path, work: Path, *settings: str) -> str:
    run_folder = work / f"{command}-{len(list(work.iterdir()))}"
    fixed = ("train.total_steps=3", "train.warmup_steps=1", "train.micro_batch_size=2", "train.device=cpu")
    lengths = ("data.seq_len=96", "data.val_fraction=0.2", "train.eval_batches=1", "train.log_interval=1")
    places = (f"train.init_from={model}", f"data.dataset={data}", f"train.save_dir={run_folder}")
    (work / "c.yaml").touch()
    run(command, str(work / "c.yaml"), *places, *fixed, *lengths, *settings, "--quiet")
    return "yes"


def served(folder: Path) -> str:
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--checkpoint", str(folder), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "http://" in line:
                url = "http://" + line.split("http://")[1].split("/")[0]
                break
        else:
            raise RuntimeError("no server")
        time.sleep(0.5)
        body = json.dumps({"model": "x", "prompt": "Hi", "max_tokens": 3, "temperature": 0})
        models = json.loads(urllib.request.urlopen(f"{url}/v1/models").read())
        body = json.dumps({**json.loads(body), "model": models["data"][0]["id"]})
        request = urllib.request.Request(f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"})
        json.loads(urllib.request.urlopen(request, timeout=100).read())["choices"][0]["text"]
        return "yes"
    finally:
        process.terminate()
        process.wait()


def quantized(folder: Path, work: Path) -> Path:
    from mlx_lm import convert

    convert(str(folder), str(work / "4bit"), quantize=True, q_group_size=GROUP, q_bits=4)
    return work / "4bit"


def try_model(folder: Path, work: Path) -> dict[str, str]:
    """Returns the result of each column: "yes", a number, or why not."""
    chats, pairs = work / "chats.jsonl", work / "pairs.jsonl"
    turns = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(20)
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in turns))
    answers = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in answers))
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(1)
    ids = rng.integers(0, vocab_size - 50, 120).astype(np.int32)
    rows = rng.integers(0, vocab_size - 50, (ROWS, LENGTH + 1)).astype(np.int32)
    reference = transformers_logits(folder, ids)

    def difference(logits: Callable[[Path, Any], Any]) -> str:
        z = logits(folder, ids)
        return f"{np.abs(z - reference[:, : z.shape[1]]).max():.0e}"

    def architecture() -> str:
        from anarchobot.exchange.pretrained import load_pretrained

        return load_pretrained(str(folder)).model.architecture

    lora = ("lora.r=4", "lora.alpha=8")
    return {
        "computed by": attempt(architecture),
        "logits": attempt(lambda: difference(our_logits)),
        "mlx-lm": attempt(lambda: difference(mlx_lm_logits)),
        "sft": attempt(lambda: tune("sft", folder, chats, work)),
        "LoRA": attempt(lambda: tune("sft", folder, chats, work, *lora)),
        "QLoRA": attempt(lambda: tune("sft", quantized(folder, work), chats, work, *lora)),
        "dpo": attempt(lambda: tune("dpo", folder, pairs, work, *lora)),
        "losses": attempt(
            lambda: f"{np.abs(np.subtract(our_losses(folder, rows), mlx_lm_losses(folder, rows))).max():.0e}"
        ),
        "generate": attempt(
            lambda: run("generate", "--checkpoint", str(folder), "--prompt", "Hi", "--max-new-tokens", "3") and "yes"
        ),
        "serve": attempt(lambda: served(folder)),
    }


def attempt(do: Callable[[], str]) -> str:
    try:
        return do()
    except Exception as error:
        return f"{type(error).__name__}: {error}" if not isinstance(error, RuntimeError) else str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = [
        path
        for folder in parser.parse_args().folders
        for path in ([folder] if (folder / "config.json").is_file() else sorted(folder.iterdir()))
        if (path / "config.json").is_file()
    ]
    results = {}
    for folder in folders:
        with tempfile.TemporaryDirectory() as work:
            results[folder.name] = try_model(folder, Path(work))
        print(f"{folder.name}: {results[folder.name]}", file=sys.stderr, flush=True)
    (HERE / "results" / "models.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n| model | {' | '.join(COLUMNS)} |\n| --- |{' --- |' * len(COLUMNS)}")
    for name, found in results.items():
        cells = [value if len(value) < 12 else "no" for value in found.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
