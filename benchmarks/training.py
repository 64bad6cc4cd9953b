"""Compares training steps with the trainers of others: time, peak memory, effect of each technique. `make bench`.

Every measurement runs in a separate process (benchmarks/peers.py). Each round covers all programs, so that load on a
shared machine affects all of them alike. Figures are medians over rounds of each process's median step; ratios are
taken within a round. On a CPU, MLX uses OpenBLAS on one thread; with `--cores 1`, every program is bound to one core.

    .venv/bin/python benchmarks/training.py small --rounds 3
    .venv/bin/python benchmarks/training.py gradients
    .venv/bin/python benchmarks/training.py techniques
    .venv/bin/python benchmarks/training.py 137M            # an hour on a CPU

    .venv/bin/python benchmarks/training.py peers           # benchmarks/README.md installs unsloth-zoo and mlx-lm-lora
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SMALL = {"layers": 6, "width": 256, "heads": 8, "mlp": 688, "vocab": 8192, "rows": 8, "length": 256}
LARGE = {"layers": 12, "width": 768, "heads": 12, "mlp": 3072, "vocab": 32000, "rows": 1, "length": 2048}
TUNED = {"layers": 8, "width": 512, "heads": 8, "kv_heads": 4, "mlp": 1376, "vocab": 8192, "rows": 4, "length": 256}
CHECKPOINTED = {"gradient_checkpointing": True}  # also the name in unsloth-zoo
MLX_LM_CHECKPOINTED = {"grad_checkpoint": True}
PACKAGES = {"unsloth": "unsloth_zoo", "mlx-lm-lora": "mlx_lm_lora", "torch": "torch"}
LORA, DPO = {"work": "lora"}, {"work": "dpo"}
MUON = {"optimizer": "muon_adamw"}

# By suite: shape, steps, and rows of (name, program, changes to the shape, options). Each row is compared with the
# first that has the same text before a colon.
Row = tuple[str, str, dict[str, Any], dict[str, Any]]
SUITES: dict[str, tuple[dict[str, Any], int, list[Row]]] = {
    "small": (
        SMALL,
        5,
        [
            ("ours, AdamW", "ours", {}, {}),
            ("ours, Muon", "ours", {"time_update": True}, MUON),
            ("ours, AdamW, checkpointed", "ours", {}, CHECKPOINTED),
            ("mlx-lm's trainer", "mlx-lm", {}, {}),
            ("mlx-lm's trainer, checkpointed", "mlx-lm", {}, MLX_LM_CHECKPOINTED),
            ("PyTorch, eager", "torch", {}, {}),
            ("PyTorch, compiled", "torch", {}, {"compile": True}),
        ],
    ),
    "gradients": (
        SMALL,
        5,
        [
            ("hand-written", "ours", {}, {}),
            ("automatic differentiation", "ours", {}, {"autodiff": True}),
            ("mlx-lm's trainer", "mlx-lm", {}, {}),
            ("hand-written, checkpointed", "ours", {}, CHECKPOINTED),
            ("automatic differentiation, checkpointed", "ours", {}, {**CHECKPOINTED, "autodiff": True}),
            ("mlx-lm's trainer, checkpointed", "mlx-lm", {}, MLX_LM_CHECKPOINTED),
        ],
    ),
    "techniques": (
        SMALL,
        4,
        [
            ("all", "ours", {}, {}),
            ("without the order", "ours", {}, {"free_order": True}),
            ("attention in one block", "ours", {}, {"attention_block": 256}),
            ("head and loss in one chunk", "ours", {}, {"loss_chunk": 2048}),
            ("MLX's own exp, tanh and sums", "ours", {}, {"library_exp": True}),
            ("MLX's own cache limit, 32 MB", "ours", {}, {"small_cache": True}),
            ("compiled as a whole", "ours", {}, {"compile": True}),
            ("checkpointed", "ours", {}, CHECKPOINTED),
            ("checkpointed, without the order", "ours", {}, {**CHECKPOINTED, "free_order": True}),
            ("eight micro-batches of one row", "ours", {"rows": 1, "accumulate": 8}, {}),
            ("Muon, heads together", "ours", {"time_update": True}, {**MUON, "muon_split_heads": False}),
            ("Muon, heads apart", "ours", {"time_update": True}, {**MUON, "muon_split_heads": True}),
        ],
    ),
    "137M": (
        LARGE,
        1,
        [
            ("ours, AdamW", "ours", {}, {}),
            ("ours, AdamW, 4,096 tokens", "ours", {"length": 4096}, {}),
            ("ours, AdamW, checkpointed", "ours", {}, CHECKPOINTED),
            ("ours, Muon, checkpointed", "ours", {}, {**CHECKPOINTED, **MUON}),
            ("ours, Muon, 4 micro-batches", "ours", {"accumulate": 4, "time_update": True}, MUON),
            ("mlx-lm's trainer", "mlx-lm", {}, {}),
            ("mlx-lm's trainer, checkpointed", "mlx-lm", {}, MLX_LM_CHECKPOINTED),
            ("unsloth-zoo's trainer", "unsloth", {}, {}),
            ("unsloth-zoo's trainer, checkpointed", "unsloth", {}, CHECKPOINTED),
        ],
    ),
    "peers": (
        TUNED,
        2,
        [
            ("all weights: ours", "ours", {}, {}),
            ("all weights: mlx-lm", "mlx-lm", {}, {}),
            ("all weights: unsloth-zoo", "unsloth", {}, {}),
            ("all weights, checkpointed: ours", "ours", {}, CHECKPOINTED),
            ("all weights, checkpointed: mlx-lm", "mlx-lm", {}, MLX_LM_CHECKPOINTED),
            ("all weights, checkpointed: unsloth-zoo", "unsloth", {}, CHECKPOINTED),
            ("LoRA: ours", "ours", LORA, {}),
            ("LoRA: mlx-lm", "mlx-lm", LORA, {}),
            ("LoRA: mlx-lm-lora", "mlx-lm-lora", LORA, {}),
            ("LoRA: unsloth-zoo", "unsloth", LORA, {}),
            ("LoRA, checkpointed: ours", "ours", LORA, CHECKPOINTED),
            ("LoRA, checkpointed: mlx-lm", "mlx-lm", LORA, MLX_LM_CHECKPOINTED),
            ("LoRA, checkpointed: mlx-lm-lora", "mlx-lm-lora", LORA, MLX_LM_CHECKPOINTED),
            ("LoRA, checkpointed: unsloth-zoo", "unsloth", LORA, CHECKPOINTED),
            ("DPO with LoRA: ours", "ours", DPO, {}),
            ("DPO with LoRA: mlx-lm-lora", "mlx-lm-lora", DPO, {}),
            ("DPO with LoRA: unsloth-zoo", "unsloth", DPO, {}),
            (
                "DPO with LoRA: unsloth-zoo, reference computed before",
                "unsloth",
                DPO,
                {"precompute_ref_log_probs": True},
            ),
            ("DPO with LoRA, checkpointed: ours", "ours", DPO, CHECKPOINTED),
            ("DPO with LoRA, checkpointed: mlx-lm-lora", "mlx-lm-lora", DPO, MLX_LM_CHECKPOINTED),
            ("DPO with LoRA, checkpointed: unsloth-zoo", "unsloth", DPO, CHECKPOINTED),
        ],
    ),
}


def measure(program: str, shape: dict[str, Any], cores: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "peers.py"), program, json.dumps({**shape, "threads": cores})]
    if cores == 1 and hasattr(os, "sched_setaffinity"):
        command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
    completed = subprocess.run(command, capture_output=True, text=True)
    if completed.returncode:
        return {"failed": completed.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return result


def table_cells(rounds: list[dict[str, Any]], time: str, first: list[dict[str, Any]]) -> str:
    """Median time, time relative to the first row, peak memory, the same, and the fraction of the update."""
    ok = [r for r in rounds if time in r]
    if not ok:
        return "| failed | | | | |"
    ratios = [r[time] / f[time] for r, f in zip(rounds, first, strict=True) if time in r and time in f]
    peak = "|"
    if "peak_mb" in ok[0]:
        median = statistics.median(r["peak_mb"] for r in ok)
        peak = f"{median:,.0f} | {median / statistics.median(f.get('peak_mb', math.nan) for f in first):.2f}"
    update = statistics.median(r["update_cpu_ms"] / r["cpu_ms"] for r in ok) if "update_cpu_ms" in ok[0] else None
    return (
        f"| {statistics.median(r[time] for r in ok):,.0f} | {statistics.median(ratios):.2f} | "
        f"{peak} | {'' if update is None else f'{update:.1%}'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--cores", type=int, nargs="+", default=[1], help="default: 1")
    parser.add_argument("--only", nargs="+", help="names of table rows")
    arguments = parser.parse_args()
    shape, steps, rows = SUITES[arguments.suite]
    rows = [row for row in rows if not arguments.only or row[0] in arguments.only]
    for program, package in PACKAGES.items():
        missing = [name for name, other, *_ in rows if other == program and importlib.util.find_spec(package) is None]
        if missing:
            print(f"{package} is not installed; rows left out: {'; '.join(missing)}", file=sys.stderr)
            rows = [row for row in rows if row[0] not in missing]
    for cores in arguments.cores:
        results: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in rows}
        for _ in range(arguments.rounds):
            for name, program, changes, options in rows:
                results[name].append(measure(program, {**shape, "steps": steps, **changes, "options": options}, cores))
                print(f"{cores} core(s), {name}: {results[name][-1]}", file=sys.stderr, flush=True)
        path = HERE / "results" / f"training_{arguments.suite}_{cores}_core{'s' * (cores > 1)}.json"
        before = json.loads(path.read_text())["rows"] if path.exists() else {}
        path.write_text(json.dumps({"shape": shape, "cores": cores, "rows": {**before, **results}}, indent=1) + "\n")
        clock = "CPU" if cores == 1 else "wall"
        print(f"\n| {cores} core(s) | {clock} ms per step | relative time | peak MB | relative peak | update |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        first = {}
        for name, *_ in rows:
            base = first.setdefault(name.rpartition(":")[0], results[name])
            cells = table_cells(results[name], f"{clock.lower()}_ms", base)
            print(f"| {name.replace('ours', 'AnarchoBot')} {cells}")


if __name__ == "__main__":
    main()
