"""torch.compile, where it works."""

from collections.abc import Callable
from typing import Any, cast

import torch

from anarchobot.torch_backend.block import BlockForward


def compiled(block: BlockForward, try_out: Callable[[BlockForward], object]) -> tuple[BlockForward, str | None]:
    """`block` compiled, once it has done in `try_out` what it will have to do; if it can't, `block` as it is and a line
    that says why. A compiler may be missing (Triton, a C++ compiler), or not know an operation of this device.

    One block is compiled, not the whole model: all blocks share it, and that takes seconds instead of minutes.
    """
    try:
        faster = cast(BlockForward, torch.compile(cast(Callable[..., Any], block), dynamic=False))
        try_out(faster)
    except Exception as error:  # compilers' errors have no class in common
        reason, *_ = [line for line in str(error).splitlines() if line.strip()] or [""]
        why = f"{type(error).__name__}: {reason.strip()}"
        return block, f"train.compile: PyTorch can't compile here, the step runs uncompiled ({why})"
    return faster, None
