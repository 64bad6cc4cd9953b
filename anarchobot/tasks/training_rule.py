"""Chooses the settings of a new model from the size of a text and the compute that a time allows (docs/train.md).

Size: with N parameters, D training tokens in e epochs over U different tokens, and C = 6 N D FLOPs, the loss is assumed
to be E + A / N'^a + B / D'^a (Hoffmann et al., 2022, arXiv 2203.15556), where repeated tokens and the parameters that
they would train count less (Muennighoff et al., 2023, arXiv 2305.16264):

    D' = U + U 15.4 (1 - exp(-(e - 1) / 15.4)),    N' = n + n 5.3 (1 - exp(-(N / n - 1) / 5.3)),  n = U / RATIO

RATIO = (B / A)^(1/a) is the number of tokens per parameter at which both terms are equal. The shape of SHAPES with the
lowest loss is chosen. RATIO and the other constants were measured on small texts: docs/train.md has the figures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

EXPONENT = 0.353
RATIO = 8.0
BYTES_PER_TOKEN = 3.0  # the unit of U and D, because the bytes in a token depend on the vocabulary
EPOCHS_DECAY, PARAMETERS_DECAY = 15.4, 5.3
SHAPES = (  # layers, width
    *((3, 64), (4, 96), (4, 128), (5, 192), (6, 256), (7, 320), (8, 384), (9, 448), (10, 512), (10, 640), (12, 768)),
    *((16, 1024), (20, 1280)),
)
MEASURED_SHAPES = ((4, 64), (6, 256))  # two widths, from which a machine's speed at all widths follows
HEAD_SIZE = 32  # 64 from a width of 512
VOCAB_SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
VOCAB_SHARE = 0.25  # of the parameters of the blocks, at most, in the embedding
BYTES_PER_VOCAB = 500  # bytes of text per token of the vocabulary, at least
MAX_EPOCHS = 40.0
BATCH, GPU_BATCH = 1024, 4096  # tokens per step of a short run
SHORT_RUN = 6e5  # training tokens
LR = 8e-3  # of a short run
DECAY_FRACTION = 0.7


@dataclass(frozen=True)
class Speed:
    """Time of a training step: each FLOP takes `a + b / width` seconds, because narrow products are slower. FLOPs are
    counted as six per parameter and token, plus attention."""

    a: float
    b: float
    on_gpu: bool = False

    def flops(self, width: int) -> float:
        """FLOP/s of a model of this width."""
        return 1 / (self.a + self.b / width)

    @classmethod
    def fit(cls, measured: Mapping[int, float], *, on_gpu: bool = False) -> Self:
        """From FLOP/s measured at two widths."""
        (narrow, slow), (wide, fast) = sorted(measured.items())
        b = max(0.0, (1 / slow - 1 / fast) / (1 / narrow - 1 / wide))
        return cls(max(1 / fast - b / wide, 0.2 / fast), b, on_gpu)


@dataclass(frozen=True)
class Settings:
    """What the rule chooses. `tokens` are all training tokens of the run, `epochs` the passes over the text."""

    vocab_size: int
    layers: int
    width: int
    seq_len: int
    sequences: int  # per step
    steps: int
    lr: float
    dropout: float
    weight_decay: float
    parameters: int
    tokens: int
    epochs: float
    seconds: float  # expected; less than the time given where more epochs would not help

    @property
    def flops_per_step(self) -> float:
        return self.sequences * self.seq_len * _flops_per_token(self.vocab_size, self.layers, self.width, self.seq_len)

    def sections(self) -> dict[str, dict[str, Any]]:
        """As sections of a configuration."""
        return {
            "model": {
                "vocab_size": self.vocab_size,
                "n_layers": self.layers,
                "d_model": self.width,
                "n_heads": self.width // head_size(self.width),
                "dropout": self.dropout,
                "max_seq_len": max(512, 2 * self.seq_len),
                "tie_embeddings": False,
                "embedding_scale": round(math.sqrt(self.width), 1),
            },
            "data": {"seq_len": self.seq_len},
            "train": {
                "total_steps": self.steps,
                "micro_batch_size": "auto",
                "grad_accum_steps": self.sequences,
                "lr": self.lr,
                "min_lr": 0.0,
                "warmup_steps": max(1, min(100, self.steps // 25)),
                "momentum": 0.9,
                "schedule": "wsd",
                "decay_fraction": DECAY_FRACTION,
                "weight_decay": self.weight_decay,
            },
        }


def head_size(width: int) -> int:
    return HEAD_SIZE if width < 512 else 2 * HEAD_SIZE


def choose_settings(text_bytes: int, seconds: float, speed: Speed) -> Settings:
    """The settings for training `seconds` on this many bytes of text, on a machine of this speed."""
    options = [settings_for_shape(text_bytes, seconds, speed, layers, width) for layers, width in SHAPES]
    return min(options, key=lambda option: _loss(option, text_bytes))


def bytes_per_token(vocab_size: int) -> float:
    """A rough average of a BPE vocabulary trained on the text itself."""
    return 2.6 + 0.5 * math.log2(vocab_size / 1024)


def parameters(vocab_size: int, layers: int, width: int) -> tuple[int, int]:
    """Parameters in the blocks, and in one of embedding and output head."""
    return layers * 16 * width**2, vocab_size * width


def settings_for_shape(text_bytes: int, seconds: float, speed: Speed, layers: int, width: int) -> Settings:
    """Like `choose_settings`, for a given shape."""
    blocks, _ = parameters(0, layers, width)
    fitting = [v for v in VOCAB_SIZES if v * width <= VOCAB_SHARE * blocks and v * BYTES_PER_VOCAB <= text_bytes]
    vocab_size = max(fitting, default=VOCAB_SIZES[0])
    _, head = parameters(vocab_size, layers, width)
    unique = text_bytes / bytes_per_token(vocab_size)
    seq_len = 256 if width < 512 else 512
    flops_per_token = _flops_per_token(vocab_size, layers, width, seq_len)
    flops = speed.flops(width)
    tokens = min(seconds * flops / flops_per_token, MAX_EPOCHS * unique)
    epochs = tokens / unique
    sequences = _batch(tokens, speed.on_gpu) // seq_len
    steps = max(1, round(tokens / (sequences * seq_len)))
    return Settings(
        vocab_size=vocab_size,
        layers=layers,
        width=width,
        seq_len=seq_len,
        sequences=sequences,
        steps=steps,
        lr=_round(LR * max(1.0, tokens / SHORT_RUN) ** -0.2),
        dropout=0.0 if epochs < 3 else 0.1 if epochs < 10 else 0.2,
        weight_decay=0.02 if epochs < 3 else 0.1,
        parameters=blocks + 2 * head,
        tokens=steps * sequences * seq_len,
        epochs=epochs,
        seconds=tokens * flops_per_token / flops,
    )


def _flops_per_token(vocab_size: int, layers: int, width: int, seq_len: int) -> float:
    """Six per parameter, and attention over half the sequence on average."""
    blocks, head = parameters(vocab_size, layers, width)
    return 6.0 * (blocks + head + seq_len * layers * width)


def _batch(tokens: float, on_gpu: bool) -> int:
    """Tokens per step: a power of two that grows as the 0.4th power of the training tokens, up to 2^16."""
    start = GPU_BATCH if on_gpu else BATCH
    growth = max(1.0, tokens / SHORT_RUN) ** 0.4
    return int(min(2**16, max(start, BATCH * 2 ** math.floor(math.log2(growth)))))


def _loss(option: Settings, text_bytes: int) -> float:
    """The part of the loss that depends on size and data, up to a factor: with A = 1, B is RATIO^a."""
    blocks, head = parameters(option.vocab_size, option.layers, option.width)
    unique = text_bytes / BYTES_PER_TOKEN
    size, best = float(blocks + head), unique / RATIO
    passes = option.epochs
    if passes > 1:
        passes = 1 + EPOCHS_DECAY * (1 - math.exp(-(passes - 1) / EPOCHS_DECAY))
    data = unique * passes
    if size > best:
        size = best * (1 + PARAMETERS_DECAY * (1 - math.exp(-(size / best - 1) / PARAMETERS_DECAY)))
    return float(size**-EXPONENT + (RATIO / data) ** EXPONENT)


def _round(value: float) -> float:
    return float(f"{value:.2g}")
