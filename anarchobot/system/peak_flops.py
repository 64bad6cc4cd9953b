"""Peak FLOP/s of known GPUs and the model FLOPs per training token, from which a run's utilization (MFU) follows.

Apple publishes no peak numbers. A GPU core performs 128 float32 multiply-adds per cycle, and float16 and bfloat16 are
no faster; the clock rates were measured by others (github.com/philipturner/metal-benchmarks for M1 and M2; for M4 the
highest frequency that powermetrics lists). NVIDIA's numbers are dense bfloat16 from the data sheets. Chips not listed
here have no known peak: the GPU cores of M5 have matrix units whose FLOP/s are not published.
"""

import json
import re
import subprocess
import sys

from anarchobot.config.schema import ModelConfig
from anarchobot.model.parameters import model_flops

APPLE_FLOPS_PER_CYCLE = 256  # per core
APPLE_GHZ = {
    "M1": 1.278, "M1 Pro": 1.296, "M1 Max": 1.296, "M1 Ultra": 1.296,
    "M2": 1.398, "M2 Pro": 1.398, "M2 Max": 1.398, "M2 Ultra": 1.398,
    "M3": 1.398, "M3 Pro": 1.398, "M3 Max": 1.398, "M3 Ultra": 1.398,
    "M4": 1.578, "M4 Pro": 1.578, "M4 Max": 1.578,
}  # fmt: skip
NVIDIA_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "L4": 121.0, "L40S": 362.0}  # not for float32


def peak_tflops(device_name: str, gpu_cores: int | None, precision: str) -> float | None:
    """Peak TFLOP/s, or None if unknown. `device_name` is as MLX reports it, such as "Apple M3 Pro"."""
    clock = APPLE_GHZ.get(device_name.removeprefix("Apple "))
    if clock is not None:
        return None if gpu_cores is None else gpu_cores * APPLE_FLOPS_PER_CYCLE * clock / 1000
    matches = [peak for name, peak in NVIDIA_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)]
    return matches[0] if matches and precision != "float32" else None


def apple_gpu_cores() -> int | None:
    """The number of GPU cores of this Mac, or None on other systems."""
    if sys.platform != "darwin":
        return None
    command = ["system_profiler", "-json", "SPDisplaysDataType"]
    return parse_gpu_cores(subprocess.run(command, capture_output=True, text=True).stdout)


def parse_gpu_cores(report: str) -> int | None:
    """`report` is the output of `system_profiler -json SPDisplaysDataType`."""
    try:
        return int(json.loads(report)["SPDisplaysDataType"][0]["sppci_cores"])
    except (ValueError, LookupError, TypeError):
        return None


def training_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of the forward and backward matrix products for one token, with causal attention counted exactly.

    Recomputation (gradient checkpointing) and the optimizer are not counted: MFU counts useful work only.
    """
    return model_flops(model, 1, [(i, i + 1) for i in range(seq_len)]) / seq_len
