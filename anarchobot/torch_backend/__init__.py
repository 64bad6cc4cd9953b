"""The second engine: the MLX wing once more in PyTorch, file for file, for MPS, CUDA and CPUs.

Nothing else in the package imports torch, and nothing here imports MLX. What both wings need to agree on they read from
the same places: names, shapes and first values (model/parameters.py), routes and moments (optim/param_groups.py), loss
scale and schedule. So a checkpoint of one is a checkpoint of the other.
"""

import importlib.util

from anarchobot.config.errors import UserError

if importlib.util.find_spec("torch") is None:
    raise UserError("train.backend: torch, but PyTorch is not installed: pip install 'anarchobot[torch]'")
