"""Measures one program in one process: `python benchmarks/peers.py PROGRAM '{"layers": 6, ...}'` prints JSON.

Every program trains the same Llama (RMSNorm, RoPE, gated SiLU, tied head) on the same random tokens, by default with
AdamW in float32, and reports the median time of a step and, if it is available, peak memory.
"""

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

# layers, width, heads, kv_heads, mlp, vocab, rows, length, accumulate; work: full, lora, dpo; steps; threads; options
Shape = dict[str, Any]
WARMUP = 2
RANK, LORA_SCALE = 8, 2.0
MATRICES = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def tokens(shape: Shape) -> Any:
    """int32 [accumulate, rows, length + 1]."""
    size = (shape.get("accumulate", 1), shape["rows"], shape["length"] + 1)
    return np.random.default_rng(0).integers(0, shape["vocab"], size).astype(np.int32)


def timed(step: Callable[[], float], steps: int, warmup: int = WARMUP) -> dict[str, Any]:
    """Runs steps; returns the median CPU and wall milliseconds per step, and the first losses."""
    cpu, wall, losses = [], [], []
    for _ in range(warmup + steps):
        cpu_began, wall_began = time.process_time(), time.perf_counter()
        losses.append(step())
        cpu.append(1e3 * (time.process_time() - cpu_began))
        wall.append(1e3 * (time.perf_counter() - wall_began))
    return {
        "cpu_ms": statistics.median(cpu[warmup:]),
        "wall_ms": statistics.median(wall[warmup:]),
        "losses": losses[:3],
    }


def ours(shape: Shape) -> dict[str, Any]:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx

    from anarchobot.config.schema import Config
    from anarchobot.data.windows import Batch
    from anarchobot.numerics import elementary, eval_order
    from anarchobot.training.mlx_engine import MLXEngine
    from anarchobot.training.preference_engine import PreferenceEngine

    options, work = dict(shape.get("options", {})), shape.get("work", "full")
    free_order, library_exp = options.pop("free_order", False), options.pop("library_exp", False)
    small_cache, autodiff = options.pop("small_cache", False), options.pop("autodiff", False)
    config = {
        "model": {
            "vocab_size": shape["vocab"], "n_layers": shape["layers"], "d_model": shape["width"],
            "n_heads": shape["heads"], "n_kv_heads": shape.get("kv_heads"),
            "mlp_multiple": shape["mlp"] / shape["width"], "dropout": 0.0, "max_seq_len": shape["length"],
        },
        "data": {"seq_len": shape["length"]},
        "train": {
            "optimizer": "adamw", "micro_batch_size": shape["rows"], "cpu_threads": shape.get("threads", 1),
            "weight_decay": 0.01, **options,
        },
        "lora": {} if work == "full" else {"r": RANK, "alpha": LORA_SCALE * RANK},
    }  # fmt: skip
    if library_exp:  # the effect of numerics/elementary.py
        elementary._vectorized = lambda x: False
    engine = (PreferenceEngine if work == "dpo" else MLXEngine)(Config.model_validate(config))
    if free_order:
        engine.options = replace(engine.options, wait=eval_order.unordered)
    if autodiff:
        engine.options = replace(engine.options, technique="autodiff")
    if small_cache:
        mx.set_cache_limit(32 << 20)
    ids = tokens(shape)
    batch = Batch(np.ascontiguousarray(ids[..., :-1]), np.ascontiguousarray(ids[..., 1:]))
    if isinstance(engine, PreferenceEngine):
        batch = pair_batch(shape)
        batch = replace(batch, ref_log_probs=engine.log_probs(batch))  # once for each answer, as `dpo` does
    count, updates = 0, []
    update = engine._update

    def timed_update(*arguments: Any) -> Any:
        began = time.process_time()
        updated = update(*arguments)
        mx.eval(updated)
        updates.append(1e3 * (time.process_time() - began))
        return updated

    if shape.get("time_update"):
        engine._update = timed_update

    def step() -> float:
        nonlocal count
        count += 1
        if count == WARMUP + 1:
            mx.reset_peak_memory()
        return engine.train_step(batch, count, 1e-3, 0.95).loss

    result = timed(step, shape["steps"])
    result |= {"peak_mb": mx.get_peak_memory() / 1e6, "traces": engine.traces, "device": str(engine.device)}
    return result | ({"update_cpu_ms": statistics.median(updates[2:])} if updates else {})


def pair_batch(shape: Shape) -> Any:
    """The same pairs as a batch of AnarchoBot."""
    from anarchobot.data.conversations.preference_pairs import PairBatch

    ids = np.array([[[pair["chosen"], pair["rejected"]] for pair in pairs(shape)]], np.int32)
    targets = ids[..., 1:].copy()
    targets[..., : shape["length"] // 2 - 1] = -1
    count = shape["rows"]
    return PairBatch(
        ids[..., :-1].copy(), targets, indices=np.arange(count)[None], ref_log_probs=np.zeros((1, count, 2), np.float32)
    )


class StepTimer:
    """The callback of the trainers of others: notes the clocks and the peak memory when a step's loss is reported."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.losses: list[float] = []
        self.peak_mb = 0.0

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.step_ended(info["train_loss"])

    def step_ended(self, loss: float) -> None:
        import mlx.core as mx

        self.marks.append((time.process_time(), time.perf_counter()))
        self.losses.append(loss)
        self.peak_mb = mx.get_peak_memory() / 1e6  # before the trainer saves the weights
        if len(self.marks) == WARMUP:
            mx.reset_peak_memory()

    def result(self) -> dict[str, Any]:
        cpu, wall = np.median(np.diff(np.array(self.marks[WARMUP - 1 :]), axis=0), axis=0) * 1e3
        return {"cpu_ms": cpu, "wall_ms": wall, "peak_mb": self.peak_mb, "losses": self.losses[:3]}


def mlx_llama(shape: Shape) -> Any:
    """mlx-lm's Llama with random weights."""
    import mlx.core as mx
    from mlx_lm.models import llama

    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=shape["width"], num_hidden_layers=shape["layers"],
            intermediate_size=shape["mlp"], num_attention_heads=shape["heads"], rms_norm_eps=1e-5,
            num_key_value_heads=shape.get("kv_heads", shape["heads"]), vocab_size=shape["vocab"],
            max_position_embeddings=shape["length"], tie_word_embeddings=True,
        )
    )  # fmt: skip
    mx.eval(model.parameters())
    return model


def trained_llama(shape: Shape) -> Any:
    """mlx-lm's Llama; with adapters in all matrices of the blocks, unless the work is to train all weights."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = mlx_llama(shape)
    if shape.get("work", "full") != "full":
        model.freeze()
        settings = {"rank": RANK, "scale": LORA_SCALE, "dropout": 0.0, "keys": MATRICES}
        linear_to_lora_layers(model, shape["layers"], settings)
        mx.eval(model.parameters())
    return model


def adamw() -> Any:
    import mlx.optimizers

    return mlx.optimizers.AdamW(1e-3, weight_decay=0.01, bias_correction=True)


def mlx_lm(shape: Shape, lora_package: bool = False) -> dict[str, Any]:
    """Runs the `train` of mlx-lm, or that of mlx-lm-lora. The time of a step is the time between two reports."""
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx
    from mlx_lm.tuner.trainer import TrainingArgs, train

    rows = [[int(i) for i in row] for row in tokens(shape).reshape(-1, shape["length"] + 1)]
    model, timer, accumulate = trained_llama(shape), StepTimer(), shape.get("accumulate", 1)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "batch_size": shape["rows"], "iters": (WARMUP + shape["steps"]) * accumulate, "val_batches": 0,
            "steps_per_report": accumulate, "steps_per_save": 10**9, "max_seq_length": shape["length"] + 1,
            "adapter_file": str(Path(folder) / "out.safetensors"), **shape.get("options", {}),
        }  # fmt: skip
        if lora_package and not mx.metal.is_available():  # the trainers ask for a limit of Apple's GPUs
            mx.device_info = lambda: {"max_recommended_working_set_size": 0}
            mx.set_wired_limit = lambda limit: limit
        if not lora_package:
            arguments = TrainingArgs(grad_accumulation_steps=accumulate, **settings)
            train(model, adamw(), [(row, 0) for row in rows], args=arguments, training_callback=timer)
        elif shape["work"] == "dpo":
            from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo

            train_dpo(
                model, mlx_llama(shape).freeze(), adamw(), pairs(shape), args=DPOTrainingArgs(**settings),
                training_callback=timer,
            )  # fmt: skip
        else:
            from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs, train_sft

            train_sft(
                model, adamw(), [(row, 0) for row in rows], args=SFTTrainingArgs(**settings), training_callback=timer
            )
    return timer.result()


def mlx_lm_lora(shape: Shape) -> dict[str, Any]:
    return mlx_lm(shape, lora_package=True)


def pairs(shape: Shape) -> list[dict[str, Any]]:
    """Pairs of answers in the form of mlx-lm-lora's DPODataset. The first half of each row is the prompt."""
    rows, prompt = tokens({**shape, "rows": 2 * shape["rows"]})[0].tolist(), shape["length"] // 2
    return [
        {
            "chosen": chosen, "rejected": chosen[:prompt] + rejected[prompt:],
            "chosen_prompt_length": prompt, "rejected_prompt_length": prompt,
        }
        for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)
    ]  # fmt: skip


class Numbers:
    """A tokenizer of texts that are token ids with spaces between them."""

    eos_token_id = bos_token = chat_template = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(i) for i in text.split()]

    def save_pretrained(self, folder: str) -> None:
        """Called when the trained model is saved."""


def unsloth(shape: Shape) -> dict[str, Any]:
    """Runs the MLX trainers of unsloth-zoo."""
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"  # or it refuses to be imported on Linux without CUDA
    from unsloth_zoo.mlx import trainer as zoo

    timer, dpo = StepTimer(), shape.get("work") == "dpo"
    rows: list[dict[str, Any]] = [{"input_ids": row} for row in tokens(shape).reshape(-1, shape["length"] + 1).tolist()]
    if dpo:
        prompt = shape["length"] // 2

        def text(ids: list[int]) -> str:
            return " ".join(map(str, ids)) + " "

        rows = [
            {"prompt": text(p["chosen"][:prompt]), **{k: text(p[k][prompt:]) for k in ("chosen", "rejected")}}
            for p in pairs(shape)
        ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (zoo.MLXDPOConfig if dpo else zoo.MLXTrainingConfig)(
            per_device_train_batch_size=shape["rows"], gradient_accumulation_steps=shape.get("accumulate", 1),
            max_steps=WARMUP + shape["steps"] + 1, max_seq_length=shape["length"] + 1, learning_rate=1e-3,
            warmup_steps=0, lr_scheduler_type="constant", weight_decay=0.01, output_dir=folder, append_eos=False,
            **{"gradient_checkpointing": False, **shape.get("options", {})},
        )  # fmt: skip
        trainer = (zoo.MLXDPOTrainer if dpo else zoo.MLXTrainer)(trained_llama(shape), Numbers(), rows, args=arguments)
        # The last step also prepares the saving of the model, for a second or two.
        trainer.add_step_callback(lambda step, steps, loss, *_: None if step == steps else timer.step_ended(loss))
        trainer.train()
    return timer.result()


def torch_model(shape: Shape) -> Any:
    import torch
    import torch.nn.functional as F
    from torch import nn

    width, heads, vocab = shape["width"], shape["heads"], shape["vocab"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.o = nn.Linear(width, width, bias=False)
            self.gate_up = nn.Linear(width, 2 * shape["mlp"], bias=False)
            self.down = nn.Linear(shape["mlp"], width, bias=False)

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            B, L, _ = x.shape
            q, k, v = self.qkv(self.attention_norm(x)).view(B, L, 3, heads, -1).permute(2, 0, 3, 1, 4)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(B, L, width))
            gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)

    def apply_rope(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocab, width)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["layers"]))
            self.norm = nn.RMSNorm(width, 1e-5)
            half = width // heads // 2
            angles = torch.outer(torch.arange(shape["length"]).float(), 1e4 ** -(torch.arange(half) / half))
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
            for name, p in self.named_parameters():
                if p.ndim == 2:
                    residual = name.endswith(("o.weight", "down.weight"))
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape["layers"]) if residual else 0.02)

        def forward(self, ids: Any, targets: Any) -> Any:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            z = F.linear(self.norm(x), self.embed.weight)
            return F.cross_entropy(z.view(-1, vocab).float(), targets.reshape(-1))

    torch.manual_seed(0)
    return Model()


def torch_step(shape: Shape) -> dict[str, Any]:
    import torch

    options = shape.get("options", {})
    torch.set_num_threads(shape.get("threads", 1))
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    model = torch_model(shape).to(device)
    forward = torch.compile(model) if options.get("compile") else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.01, fused=gpu or None)
    ids = torch.from_numpy(tokens(shape).astype(np.int64)).to(device)

    def step() -> float:
        total = 0.0
        for part in ids:
            with torch.autocast(device, torch.bfloat16, enabled=gpu):
                loss = forward(part[:, :-1], part[:, 1:]) / len(ids)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    result = timed(step, shape["steps"], warmup=3)
    return result | ({"peak_mb": torch.cuda.max_memory_allocated() / 1e6} if gpu else {})


PROGRAMS = {
    "ours": ours, "mlx-lm": mlx_lm, "mlx-lm-lora": mlx_lm_lora, "unsloth": unsloth, "torch": torch_step
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: peers.py {{{','.join(PROGRAMS)}}} SHAPE_AS_JSON")
    print(json.dumps(PROGRAMS[sys.argv[1]](json.loads(sys.argv[2]))))
