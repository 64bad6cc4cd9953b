"""What a GPU could compute at most, so that a run can say how much of it it uses.

Apple publishes no such figures. A core does 128 float32 multiplications and additions a cycle, float16 and bfloat16 no
faster; the clocks are those that others measured (github.com/philipturner/metal-benchmarks for M1 and M2). NVIDIA's
are the data sheets' dense bfloat16 figures. A chip that is not listed has no known peak.
"""

import json
import re
import subprocess
import sys

from anarchobot.config.schema import ModelConfig
from anarchobot.model.llama.flops import model_step

APPLE_OPERATIONS = 256  # of a core in a cycle
APPLE_GHZ = {
    "M1": 1.278, "M1 Pro": 1.296, "M1 Max": 1.296, "M1 Ultra": 1.296,
    "M2": 1.398, "M2 Pro": 1.398, "M2 Max": 1.398, "M2 Ultra": 1.398,
    "M3": 1.398, "M3 Pro": 1.398, "M3 Max": 1.398, "M3 Ultra": 1.398,
}  # fmt: skip
NVIDIA_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "L4": 121.0, "L40S": 362.0}  # not in float32


def peak_tflops(device_name: str, gpu_cores: int | None, precision: str) -> float | None:
    """10^12 operations a second, or None where that is not known. `device_name` is as MLX tells it ("Apple M3 Pro")."""
    clock = APPLE_GHZ.get(device_name.removeprefix("Apple "))
    if clock is not None:
        return None if gpu_cores is None else gpu_cores * APPLE_OPERATIONS * clock / 1000
    named = [peak for name, peak in NVIDIA_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)]
    return named[0] if named and precision != "float32" else None


def gpu_cores() -> int | None:
    """Of a Mac, as macOS' own report has them; None elsewhere."""
    if sys.platform != "darwin":
        return None
    said = subprocess.run(["system_profiler", "-json", "SPDisplaysDataType"], capture_output=True, text=True).stdout
    return cores_of(said)


def cores_of(report: str) -> int | None:
    """`report` is what `system_profiler -json SPDisplaysDataType` prints."""
    try:
        return int(json.loads(report)["SPDisplaysDataType"][0]["sppci_cores"])
    except (ValueError, LookupError, TypeError):
        return None


def operations_per_token(model: ModelConfig, seq_len: int) -> float:
    """What training on a token needs: forward and backward products, a token seeing those before it and no more. What
    is computed twice (gradient checkpointing), and the optimizer, are not counted: an idle second of work is no use."""
    return model_step(model, 1, [(i, i + 1) for i in range(seq_len)]) / seq_len
