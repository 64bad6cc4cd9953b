"""The PyTorch backend, for MPS, CUDA and CPUs.

Nothing else in the package imports torch, and nothing here imports MLX. Both backends share the training step
(training/engine.py), parameter names, shapes and initial values (model/parameters.py), and the optimizers' groups and
constants (optim/param_groups.py), so that a checkpoint of one is a checkpoint of the other.
"""

import importlib.util
import os

from anarchobot.config.errors import UserError

if importlib.util.find_spec("torch") is None:
    raise UserError("train.backend: torch: PyTorch is not installed; install it with: pip install 'anarchobot[torch]'")
# Read when PyTorch is imported: an operation that MPS lacks runs on the CPU, with a warning, instead of failing.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
