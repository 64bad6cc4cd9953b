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
    first_v = None
    for i in range(model.n_layers):

        def p(name: str, i: int = i) -> Array:
            return params[f"model.layers.{i}.{name}.weight"]

        h = rms_norm(x, p("input_layernorm"), model.norm_eps)
        b = {x: params.get(f"model.layers.{i}.self_attn.{x}_proj.bias", 0.0) for x in "qkv"}
        q = heads(h @ p("self_attn.q_proj").T + b["q"], model.n_heads)
        k = heads(h @ p("self_attn.k_proj").T + b["k"], model.kv_heads)
        v = heads(h @ p("self_attn.v_proj").T + b["v"], model.kv_heads)
        if model.value_residual:
            first_v = v if first_v is None else first_v
            v = (v + first_v) / 2
        if model.qk_norm:
            q = rms_norm(q, p("self_attn.q_norm"), model.norm_eps)
            k = rms_norm(k, p("self_attn.k_norm"), model.norm_eps)
        q, k = rotate(q, model.rope_theta), rotate(k, model.rope_theta)
        outs = []
        for head in range(model.n_heads):
            kv = head // (model.n_heads // model.kv_heads)
            out = np.zeros_like(q[head])
            for t in range(len(row)):
                scores = k[kv, : t + 1] @ q[head, t] / np.sqrt(model.head_size)
                weights = np.exp(scores - scores.max())
                out[t] = (weights / weights.sum()) @ v[kv, : t + 1]
            outs.append(out)
        x = x + np.concatenate(outs, axis=1) @ p("self_attn.o_proj").T
        h = rms_norm(x, p("post_attention_layernorm"), model.norm_eps)
        gate = h @ p("mlp.gate_proj").T
        if model.ffn_activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + (gate * (h @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    x = rms_norm(x, params["model.norm.weight"], model.norm_eps)
    z = x @ params["model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"].T
    return z if model.logit_softcap is None else model.logit_softcap * np.tanh(z / model.logit_softcap)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def heads(x: Array, n: int) -> Array:
    """[L, n * E] -> [n, L, E]."""
    return x.reshape(len(x), n, -1).transpose(1, 0, 2)


def rotate(x: Array, theta: float) -> Array:
    """RoPE on the halves of a head: (a, b) -> (a cos - b sin, b cos + a sin), as in Hugging Face's Llama."""
    width = x.shape[-1]
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(0, width, 2) / width)
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)
