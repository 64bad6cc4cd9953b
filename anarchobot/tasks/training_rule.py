"""Chooses the settings of a new model from the size of a text, the time and the speed of a machine (docs/train.md).

Size: with N parameters, and D training tokens in e epochs over U different tokens, the loss is assumed to be
E + A / N^a + B / D'^b with the exponents of Hoffmann et al. (2022, arXiv 2203.15556, approach 3), where repeated tokens
count less (Muennighoff et al., 2023, arXiv 2305.16264):

    D' = U + 15.4 U (1 - exp(-(e - 1) / 15.4))

B / A is fitted to short runs (docs/train.md). Of the SHAPES, the one with the lowest loss is chosen.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

SIZE_EXPONENT, DATA_EXPONENT = 0.34, 0.28
DATA_WEIGHT = 0.6  # B / A
BYTES_PER_TOKEN = 3.0  # the unit of U and D, because the bytes in a token depend on the vocabulary
EPOCHS_DECAY = 15.4
MAX_PARAMETERS = 10.0  # per different token: larger models overfit before they are trained
SHAPES = (  # layers, width
    *((2, 64), (3, 64), (4, 96), (4, 128), (5, 160), (6, 192), (6, 256), (7, 320), (8, 384), (9, 448), (10, 512)),
    *((10, 640), (12, 768), (16, 1024), (20, 1280)),
)
MEASURED_SHAPES = ((4, 64), (6, 256))  # two widths, from which a machine's speed at all widths follows
HEAD_SIZE = 32  # 64 from a width of 512
MLP_MULTIPLE = 2  # hidden width of the MLP, in widths of the model
VOCAB_SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
VOCAB_SCALE, VOCAB_EXPONENT = 7.5, 0.83  # of the parameters of the blocks: how many the embedding may have
SMALL_VOCAB = 4096  # which any model may have
BYTES_PER_VOCAB = 250  # bytes of text per token of the vocabulary, at least
MAX_EPOCHS = 20.0
SHORT_RUN = 4e5  # training tokens
BATCH, MAX_BATCH = 512, 2**16  # tokens per step, of a short and of the longest run
MIN_STEPS = 1000
MUON_BATCH, MUON_STEPS = 8, 500  # tokens per step for each unit of width, with which Muon takes a third of a step
LR, LR_WIDTH = 1e-2, 128  # of a short run of a model of this width
DECAY_FRACTION = 0.7
MIN_DECAY, MAX_DECAY = 0.02, 1.6  # of the weights
NO_REPETITION, DECAY_SLOPE = 4.0, 0.05  # weight decay grows with repetition beyond NO_REPETITION


@dataclass(frozen=True)
class Speed:
    """Time of a training step: each FLOP takes `a + b / width` seconds, because narrow products are slower. FLOPs are
    counted as six per parameter and token, plus attention. `min_batch`: tokens per step, below which part of the device
    is idle."""

    a: float
    b: float
    min_batch: int = BATCH

    def flops(self, width: int) -> float:
        """FLOP/s of a model of this width."""
        return 1 / (self.a + self.b / width)

    @classmethod
    def fit(cls, measured: Mapping[int, float], min_batch: int = BATCH) -> Self:
        """From FLOP/s measured at two widths."""
        (narrow, slow), (wide, fast) = sorted(measured.items())
        b = max(0.0, (1 / slow - 1 / fast) / (1 / narrow - 1 / wide))
        return cls(max(1 / fast - b / wide, 0.2 / fast), b, min_batch)


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
                "mlp_multiple": MLP_MULTIPLE,
                "dropout": self.dropout,
                "max_seq_len": max(512, 2 * self.seq_len),
                "sliding_window": self.seq_len,
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
    options = [settings_for_shape(text_bytes, seconds, speed, *shape) for shape in SHAPES]
    allowed = MAX_PARAMETERS * text_bytes / BYTES_PER_TOKEN
    options = [option for option in options if option.parameters <= allowed] or options[:1]
    return min(options, key=lambda option: _loss(option, text_bytes))


def bytes_per_token(vocab_size: int) -> float:
    """A rough average of a BPE vocabulary trained on the text itself."""
    return 2.6 + 0.5 * math.log2(vocab_size / 1024)


def parameters(vocab_size: int, layers: int, width: int) -> tuple[int, int]:
    """Parameters in the blocks, and in one of embedding and output head."""
    return layers * (4 + 3 * MLP_MULTIPLE) * width**2, vocab_size * width


def settings_for_shape(text_bytes: int, seconds: float, speed: Speed, layers: int, width: int) -> Settings:
    """Like `choose_settings`, for a given shape."""
    blocks, _ = parameters(0, layers, width)
    fitting = [
        v
        for v in VOCAB_SIZES
        if v * width <= max(SMALL_VOCAB * width, VOCAB_SCALE * blocks**VOCAB_EXPONENT)
        and v * BYTES_PER_VOCAB <= text_bytes
    ]
    vocab_size = max(fitting, default=VOCAB_SIZES[0])
    _, head = parameters(vocab_size, layers, width)
    unique = text_bytes / bytes_per_token(vocab_size)
    seq_len = 128 if width < 160 else 256 if width < 256 else 512  # attention: at most an eighth of the FLOPs
    flops_per_token = _flops_per_token(vocab_size, layers, width, seq_len)
    flops = speed.flops(width)
    in_time, useful = seconds * flops / flops_per_token, MAX_EPOCHS * unique
    tokens = min(in_time, useful)
    epochs = tokens / unique
    repetition = epochs * (blocks + 2 * head) / unique  # epochs times parameters per different token
    # Small batches are slower, but better where there is time for them.
    sequences = max(1, _batch(tokens, speed.min_batch, width if in_time < useful else 0) // seq_len)
    steps = max(1, round(tokens / (sequences * seq_len)))
    return Settings(
        vocab_size=vocab_size,
        layers=layers,
        width=width,
        seq_len=seq_len,
        sequences=sequences,
        steps=steps,
        lr=_round(LR * max(1.0, tokens / SHORT_RUN) ** -0.12 * (LR_WIDTH / width) ** 0.5),
        dropout=0.0 if repetition < 20 else 0.1 if repetition < 80 else 0.2,
        weight_decay=_round(min(MAX_DECAY, max(MIN_DECAY, DECAY_SLOPE * (repetition - NO_REPETITION)))),
        parameters=blocks + 2 * head,
        tokens=steps * sequences * seq_len,
        epochs=epochs,
        seconds=tokens * flops_per_token / flops,
    )


def _flops_per_token(vocab_size: int, layers: int, width: int, seq_len: int) -> float:
    """Six per parameter, and attention over half the sequence on average."""
    blocks, head = parameters(vocab_size, layers, width)
    return 6.0 * (blocks + head + seq_len * layers * width)


def _batch(tokens: float, min_batch: int, width: int) -> int:
    """Tokens per step: a power of two that grows as the 0.4th power of the training tokens; at least `min_batch` and
    MUON_BATCH * width, unless that leaves too few steps."""
    growth = math.log2(max(1.0, tokens / SHORT_RUN) ** 0.4)
    batch = BATCH * 2 ** math.floor(growth)
    for wanted, steps in ((min_batch, MIN_STEPS), (max(1, MUON_BATCH * width), MUON_STEPS)):
        enough_steps = 2 ** math.floor(math.log2(max(1.0, tokens / steps)))
        batch = max(batch, min(2 ** round(math.log2(wanted)), enough_steps))
    return int(min(batch, MAX_BATCH))


def _loss(option: Settings, text_bytes: int) -> float:
    """The part of the loss that depends on size and data, divided by A."""
    passes = option.epochs
    if passes > 1:
        passes = 1 + EPOCHS_DECAY * (1 - math.exp(-(passes - 1) / EPOCHS_DECAY))
    data = passes * text_bytes / BYTES_PER_TOKEN
    size = sum(parameters(option.vocab_size, option.layers, option.width))
    return float(size**-SIZE_EXPONENT + DATA_WEIGHT * data**-DATA_EXPONENT)


def _round(value: float) -> float:
    return float(f"{value:.2g}")
