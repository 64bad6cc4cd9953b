"""Types of weights in a GGUF file: which there are, and which each matrix gets.

The gguf package quantizes to the types with blocks of 32 weights. K-quants, with blocks of 256 and more bits for the
matrices that lose most, are llama.cpp's own (package llama-cpp-python).
"""

import ctypes
from collections.abc import Collection
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.exchange.dtypes import Dtype

DTYPES: dict[Dtype, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BLOCK_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k")
TYPES = (*DTYPES.values(), *BLOCK_TYPES, *K_QUANTS)
BLOCK, K_BLOCK = 32, 256  # weights


def file_type(file_type: str) -> str:
    """The gguf package's name of a file's type."""
    return "ALL_F32" if file_type == "f32" else f"MOSTLY_{file_type.upper()}"


def tensor_type(name: str, shape: tuple[int, ...], names: Collection[str], file_type: str) -> str:
    """The type of the parameter `name` among the parameters `names` in a file of `file_type`, except K-quants.

    As in llama.cpp, norms and biases are float32; matrices whose rows can't be divided into blocks are float16; and the
    output head, or the embedding that is tied to it, has more bits than the other matrices.
    """
    if len(shape) == 1:
        return "f32"
    if file_type not in BLOCK_TYPES:
        return file_type
    if shape[1] % BLOCK:
        return "f16"
    head = "lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight"
    return "q8_0" if name == head else file_type


def block_size(file_type: str) -> int:
    """How many weights of a row share a scale."""
    return BLOCK if file_type in BLOCK_TYPES else K_BLOCK if file_type in K_QUANTS else 1


def llama_cpp() -> Any:
    """Imports the optional llama-cpp-python package. Raises UserError if it is not installed."""
    try:
        import llama_cpp as package
    except ModuleNotFoundError:
        raise UserError(
            f"K-quants need llama.cpp: pip install 'anarchobot[llama-cpp]', or choose --type {', '.join(BLOCK_TYPES)}"
        ) from None
    return package


def quantize_file(source: Path, output: Path, file_type: str) -> None:
    """Quantizes the float32 file `source` with llama.cpp. Raises UserError if it fails."""
    package = llama_cpp()
    params = package.llama_model_quantize_default_params()
    params.ftype = getattr(package, f"LLAMA_FTYPE_MOSTLY_{file_type.upper()}")
    if package.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params)) != 0:
        raise UserError(f"llama.cpp can't quantize this model to {file_type}: choose another --type")
