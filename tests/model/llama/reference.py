"""A second, simple implementation of the transformer and its loss in numpy float64: the reference for tests.

It shares only the configuration with the package. It loops over heads and positions, without kernels or chunks.
"""

import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import ModelConfig

Array = npt.NDArray[np.float64]


def mean_loss(params: dict[str, Array], tokens: npt.NDArray[np.int32], model: ModelConfig) -> float:
    """Mean cross-entropy of predicting tokens[:, 1:] from tokens[:, :-1]."""
    losses = []
    for row in tokens:
        z = logits(params, row[:-1], model)
        z = z - z.max(axis=1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        losses.append(-log_p[np.arange(len(row) - 1), row[1:]])
    return float(np.mean(losses))


def logits(params: dict[str, Array], row: npt.NDArray[np.int32], model: ModelConfig) -> Array:
    """Logits [L, V] of one sequence of ids [L]."""
    x = params["model.embed_tokens.weight"][row] * (model.embedding_scale or 1.0)
    for i in range(model.n_layers):

        def p(name: str, i: int = i) -> Array:
            return params[f"model.layers.{i}.{name}.weight"]

        h = rms_norm(x, p("input_layernorm"), model.norm_eps)
        b = {x: params.get(f"model.layers.{i}.self_attn.{x}_proj.bias", 0.0) for x in "qkv"}
        q = heads(h @ p("self_attn.q_proj").T + b["q"], model.n_heads)
        k = heads(h @ p("self_attn.k_proj").T + b["k"], model.kv_heads)
        v = heads(h @ p("self_attn.v_proj").T + b["v"], model.kv_heads)
        if model.qk_norm:
            q = rms_norm(q, p("self_attn.q_norm"), model.norm_eps)
            k = rms_norm(k, p("self_attn.k_norm"), model.norm_eps)
        sliding = model.sliding_window is not None and (model.layer_types or ["sliding_attention"] * 9)[i][0] == "s"
        q, k = rotate(q, model, sliding), rotate(k, model, sliding)
        outs = []
        for head in range(model.n_heads):
            kv = head // (model.n_heads // model.kv_heads)
            out = np.zeros_like(q[head])
            for t in range(len(row)):
                seen = slice(max(0, t + 1 - model.sliding_window) if sliding and model.sliding_window else 0, t + 1)
                scores = k[kv, seen] @ q[head, t] * (model.attention_scale or 1 / np.sqrt(model.head_size))
                if model.attention_softcap is not None:
                    scores = model.attention_softcap * np.tanh(scores / model.attention_softcap)
                weights = np.exp(scores - scores.max())
                out[t] = (weights / weights.sum()) @ v[kv, seen]
            outs.append(out)
        out = np.concatenate(outs, axis=1) @ p("self_attn.o_proj").T
        x = x + (rms_norm(out, p("attention_output_layernorm"), model.norm_eps) if model.post_norms else out)
        h = rms_norm(x, p("post_attention_layernorm"), model.norm_eps)
        gate = h @ p("mlp.gate_proj").T
        if model.ffn_activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        out = (gate * (h @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
        x = x + (rms_norm(out, p("mlp_output_layernorm"), model.norm_eps) if model.post_norms else out)
    x = rms_norm(x, params["model.norm.weight"], model.norm_eps)
    z = x @ params["model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"].T
    return z if model.logit_softcap is None else model.logit_softcap * np.tanh(z / model.logit_softcap)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def heads(x: Array, n: int) -> Array:
    """[L, n * E] -> [n, L, E]."""
    return x.reshape(len(x), n, -1).transpose(1, 0, 2)


def rotate(x: Array, model: ModelConfig, sliding: bool) -> Array:
    """RoPE on the halves of a head's rotated part: (a, b) -> (a cos - b sin, b cos + a sin), as in Hugging Face's
    Llama."""
    width, scaling, factor = int(x.shape[-1] * model.rotary_fraction), model.rope_scaling, 1.0
    frequencies = model.rope_theta ** (-np.arange(0, width, 2) / width)
    if sliding and model.rope_local_theta is not None:
        frequencies = model.rope_local_theta ** (-np.arange(0, width, 2) / width)
    elif scaling.type == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.type == "longrope":
        original = scaling.original_max_seq_len or 0
        frequencies = frequencies / np.array(scaling.long_factor if x.shape[1] > original else scaling.short_factor)
        factor = np.sqrt(1 + np.log(scaling.factor) / np.log(original))
    angles = np.arange(x.shape[1])[:, None] * frequencies
    a, b, rest = np.split(x, [width // 2, width], axis=-1)
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
