"""The model as a function of its parameters: a flat dict of tensors under Hugging Face Llama's names.

Master weights are float32; matrix products are in autocast's dtype, and so is the stream between the blocks.

Shapes: B batch, L sequence, D d_model.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anarchobot.config.schema import ModelConfig
from anarchobot.torch_backend.attention import sight
from anarchobot.torch_backend.block import BlockForward, Keep, Params, block_forward, rms_norm


@dataclass(frozen=True)
class Technique:
    """How the pass is done; the results are the same but for rounding.

    `recompute`: keep only each block's input, and run its forward again (gradient checkpointing; Chen et al., 2016).
    `attention_block`: queries at a time; None: by the device. `loss_chunk`: tokens at a time in the head. `block`: the
    block's forward pass, compiled or not.
    """

    recompute: bool = False
    attention_block: int | None = None
    loss_chunk: int = 256
    block: BlockForward = block_forward


def hidden_states(
    params: Params,
    tokens: Tensor,
    model: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    segments: Tensor | None = None,
    dropout_key: str | None = None,
    technique: Technique = Technique(),
) -> Tensor:
    """What the head reads: [B, L, D] in `dtype` after the last norm, for integer `tokens` [B, L].

    `segments` [B, L], where given, number the documents of a row: a token sees only its own. `dropout_key` turns
    dropout on; the same key drops the same places.
    """
    shared = sight(tokens, model, segments, technique.attention_block)
    first_v: Tensor | None = None

    def run(p: Params, x: Tensor, i: int, first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        # Dropout is drawn here and from a key, so that a block computed again drops the same; a generator's state,
        # which `checkpoint` could put back, can't be read on every device.
        keep = None if dropout_key is None else _dropout(x, model, f"{dropout_key}/{i}")
        return technique.block(p, x, model, shared, keep, first_v)

    with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype != torch.float32):
        x = F.embedding(tokens, params["model.embed_tokens.weight"])
        x = (x if model.embedding_scale is None else x * model.embedding_scale).to(dtype)
        for i, p in enumerate(blocks(params, model)):
            if technique.recompute and torch.is_grad_enabled():
                x, v = checkpoint(run, p, x, i, first_v, use_reentrant=False, preserve_rng_state=False)
            else:
                x, v = run(p, x, i, first_v)
            first_v = v if model.value_residual and i == 0 else first_v
        return rms_norm(x, params["model.norm.weight"], model.norm_eps)


def head_name(model: ModelConfig) -> str:
    """The name of the output head's weight [V, D]: the token embedding itself when they are tied."""
    return "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"


def blocks(params: Params, model: ModelConfig) -> list[Params]:
    """Each block's own parameters, by their names inside it: `"self_attn.q_proj.weight"`."""
    parts: list[Params] = [{} for _ in range(model.n_layers)]
    for name, p in params.items():
        if name.startswith("model.layers."):
            number, _, inner = name.removeprefix("model.layers.").partition(".")
            parts[int(number)][inner] = p
    return parts


def _dropout(x: Tensor, model: ModelConfig, key: str) -> Keep | None:
    """What is kept of a block's two outputs: a function of the key alone."""
    if model.dropout == 0:
        return None
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    generator = torch.Generator(x.device).manual_seed(seed)
    first, second = (torch.rand(x.shape, generator=generator, device=x.device) >= model.dropout for _ in range(2))
    return first, second
