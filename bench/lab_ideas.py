"""What bench/lab.py tries: its sizes, the recipe that ideas are compared with, and the table of ideas.

To try an idea: give it a row in ROWS and run `make lab ARGS="--only NAME"`. When an idea pays, its knobs go into
RECIPE, and the next ideas are compared with that. A row stays here, with its results, after its knob has left
train_gpt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Knobs = dict[str, Any]


class Size(NamedTuple):
    """A model's shape, and how long it trains."""

    name: str
    layers: int
    dim: int
    heads: int  # query heads of 32 channels; half as many key/value heads
    looped: tuple[int, int]  # first and last layer of the depth recurrence
    lanes: int  # first layer with parallel residual streams
    batch_tokens: int  # a multiple of 3 sequences, so that batch ramps by thirds are exact
    steps: int
    seconds: float  # of one run on one quiet core, for estimates only

    def knobs(self) -> Knobs:
        """The settings of this shape."""
        return dict(
            NUM_LAYERS=self.layers,
            MODEL_DIM=self.dim,
            NUM_HEADS=self.heads,
            NUM_KV_HEADS=self.heads // 2,
            XSA_LAST_N=self.layers,
            LOOP_START=self.looped[0],
            LOOP_END=self.looped[1],
            PARALLEL_START_LAYER=self.lanes,
            TRAIN_BATCH_TOKENS=self.batch_tokens,
            ITERATIONS=self.steps,
        )


# As in `record`, about half of the layers' calls are repeats, and about a third of the layers have two streams. Tokens
# rise with the parameters, but slower: in proportion, the largest size would train for hours. The number of steps is
# the same at every usual size, so that settings counted in steps, such as EMA_DECAY, mean the same. "0.7M x 8" trains
# the smallest model for eight times as long: does a gain vanish when a model has seen enough? By FLOPs, smallest first.
SIZES = (
    Size("0.7M", 4, 128, 4, (1, 1), 3, 1536, 256, 26),
    Size("2M", 6, 192, 6, (2, 3), 4, 2304, 256, 92),
    Size("0.7M x 8", 4, 128, 4, (1, 1), 3, 1536, 2048, 210),
    Size("6M", 10, 256, 8, (3, 5), 7, 3072, 256, 290),
)
USUAL = ("0.7M", "2M", "6M")  # without --sizes
VOCABULARY = 1024
# Part of every run's name. To be raised when train_gpt.py computes something else with the same settings, as after a
# change of a default that BASE does not set: no earlier result is then reused. Otherwise results of earlier versions
# are, and the report names rows whose control is of another version.
VERSION = 1

# The architecture and optimizer of preset `record`, with rates and averages for small models and short trainings.
BASE: Knobs = dict(
    PRESET="record",
    VOCAB_SIZE=VOCABULARY,
    MLP_MULT=3,
    TRAIN_SEQ_LEN=256,
    MICRO_BATCH_TOKENS=4096,
    MAX_WALLCLOCK_SECONDS=0,
    GPTQ_RESERVE_SECONDS=0,
    CHECKPOINT_EVERY_SECONDS=0,
    RESUME="0",
    WARMUP_STEPS=0,
    VAL_LOSS_EVERY=0,
    TRAIN_LOG_EVERY=0,
    VAL_BATCH_SIZE=8192,
    EVAL_SEQ_LEN=256,
    EVAL_STRIDE=0,
    EVAL_BUDGET_SECONDS=0,
    GPTQ_CALIBRATION_BATCHES=1,
    TARGET_BYTES=0,
    TTT_MODE="none",
    ROPE_DIMS=16,
    MATRIX_LR=0.04,
    SCALAR_LR=0.04,
    TIED_EMBED_LR=0.03,
    WARMDOWN_FRAC=0.6,
    MUON_MOMENTUM_WARMUP_STEPS=50,
    EMA_DECAY=0.97,
    CPU_THREADS=1,
    READ_AHEAD=0,
    DEVICE="cpu",
)
# The best recipe so far: the control, on top of BASE and of each size. Grows when a row pays.
RECIPE: Knobs = {}


class Row(NamedTuple):
    """An idea: what it changes in the recipe."""

    changes: Knobs
    # Rates that are multiplied by each of FACTORS, together, at the smallest size. The best factor serves all sizes.
    bracket: tuple[str, ...] = ()
    # What depends on the size; None: the idea does not fit this size.
    by_size: Callable[[Size], Knobs | None] | None = None
    vocabulary: int = 0  # of its data; 0: VOCABULARY
    source: str = ""


FACTORS = (0.7, 1.0, 1.4)
RATES = ("MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR")
SPEEDRUN = "the nanoGPT speedrun"


def last_two(size: Size) -> Knobs:
    """Value embeddings in the last two layers, of a quarter of the width."""
    return dict(VE_LAYERS=f"{size.layers - 2},{size.layers - 1}", VE_DIM=size.dim // 4)


def bigram(size: Size) -> Knobs:
    """Bigram embeddings of about a tenth of the parameters: `record`'s 8,192 buckets would be most of a small model."""
    return dict(BIGRAM_VOCAB_SIZE={128: 2048, 192: 4096, 256: 8192}.get(size.dim, 8192), BIGRAM_DIM=size.dim // 4)


def half_the_heads(size: Size) -> Knobs:
    """Twice as wide, so that attention's FLOPs and parameters stay: kernels for GPUs are faster with wide heads."""
    return dict(NUM_HEADS=size.heads // 2, NUM_KV_HEADS=max(1, size.heads // 4))


def most_windows(size: Size) -> Knobs:
    """Windows in all layers but the last of each four."""
    return dict(WINDOW_ATTN_LAYERS=",".join(str(n) for n in range(size.layers) if n % 4 != 3))


def fast_attention(size: Size) -> Knobs:
    """Both of what makes attention faster on a GPU: wide heads, and windows in most layers."""
    return half_the_heads(size) | most_windows(size)


def middle(size: Size) -> Knobs:
    return dict(BACKOUT_LAYER=size.layers // 2)


def equal_parameters(vocabulary: int) -> Callable[[Size], Knobs | None]:
    """A larger vocabulary, paid for by a narrower MLP: the same number of parameters, so about the same bytes."""

    def knobs(size: Size) -> Knobs | None:
        extra = (vocabulary - VOCABULARY) * size.dim
        multiple = BASE["MLP_MULT"] - extra / (2 * size.dim**2 * size.layers)
        return dict(MLP_MULT=round(multiple, 4)) if multiple >= 1.5 else None

    return knobs


TOGETHER: Knobs = dict(
    KEY_OFFSET=1,
    NORMUON_BETA2=0.95,
    MATRIX_LR=0.028,  # times 0.7, the best of NorMuon's bracket
    MTP_WEIGHTS="0.5,0.25",
    PREFIX_LOSS_WEIGHT=0.25,
    BIGRAM_SIGNS=1,
)

ROWS: dict[str, Row] = {
    # The control's own rates: were they badly chosen, an idea that only changes their scale would seem to pay.
    "matrix rate x 0.7": Row(dict(MATRIX_LR=0.028)),
    "matrix rate x 1.4": Row(dict(MATRIX_LR=0.056)),
    # Order of the data
    "data: documents": Row(dict(DATA_ORDER="documents")),
    "data: stream": Row(dict(DATA_ORDER="stream"), source="how peers read"),
    "data: rows": Row(dict(DATA_ORDER="rows")),
    # Optimizer
    "NorMuon": Row(dict(NORMUON_BETA2=0.95), ("MATRIX_LR",), source="arXiv 2510.05491"),
    "cautious weight decay": Row(dict(CAUTIOUS_WD=1), ("MUON_WD",), source="arXiv 2510.12402"),
    "NorMuon, cautious decay": Row(
        dict(NORMUON_BETA2=0.95, CAUTIOUS_WD=1), ("MATRIX_LR",), source="arXiv 2510.05491, 2510.12402"
    ),
    "weight decay falls to 0": Row(dict(WD_FINAL=0), ("MUON_WD",), source=SPEEDRUN),
    "momentum cools to 0.85": Row(dict(MUON_MOMENTUM_COOLDOWN=0.85), source=SPEEDRUN),
    "batch ramp by thirds": Row(dict(BATCH_RAMP="0.333,0.667"), RATES, source=SPEEDRUN),
    # Losses for training only
    "multi-token prediction": Row(dict(MTP_WEIGHTS="0.5,0.25"), source="arXiv 2404.19737, " + SPEEDRUN),
    "prefix token loss": Row(dict(PREFIX_LOSS_WEIGHT=0.25), source=SPEEDRUN),
    "z-loss off": Row(dict(Z_LOSS_WEIGHT=0)),
    # Logits
    "softcap 23 sigmoid": Row(dict(SOFTCAP_TYPE="sigmoid", LOGIT_SOFTCAP=23), source=SPEEDRUN),
    "softcap asymmetric": Row(dict(LOGIT_SOFTCAP_NEGATIVE=15), source="PR #1923"),
    "head untied at 2/3": Row(dict(UNTIE_HEAD_AT=0.667), source=SPEEDRUN),
    # Attention
    "XSA learned": Row(dict(XSA_LEARNED=1)),
    "XSA learned from 0": Row(dict(XSA_LEARNED=1, XSA_INIT=0)),
    "key offset": Row(dict(KEY_OFFSET=1), source=SPEEDRUN),
    "QK gain 1.5": Row(dict(QK_GAIN_INIT=1.5)),
    "QK gain 3": Row(dict(QK_GAIN_INIT=3)),
    "half the heads": Row({}, by_size=half_the_heads, source=SPEEDRUN),
    # Windows of a quarter and an eighth of the context: in `frontier`'s 2,048 tokens 512 and 256.
    "windows of 1/4": Row(dict(WINDOW_ATTN_SIZE=64), source="PRs #1212 and #1219"),
    "windows of 1/8": Row(dict(WINDOW_ATTN_SIZE=32), source="PRs #1212 and #1219"),
    "windows of 1/4 in most layers": Row(dict(WINDOW_ATTN_SIZE=64), by_size=most_windows, source=SPEEDRUN),
    # Both at once, the windows in most layers.
    "half the heads, windows of 1/4": Row(dict(WINDOW_ATTN_SIZE=64), by_size=fast_attention, source=SPEEDRUN),
    # Embeddings
    "SmearGate by channel": Row(dict(SMEAR_GATE_TYPE="channel")),
    "SmearGate by window": Row(dict(SMEAR_GATE_TYPE="window")),
    "value embeddings": Row({}, by_size=last_two),
    "value embeddings gated": Row(dict(VE_GATE=1), by_size=last_two, source=SPEEDRUN),
    "bigram embedding": Row({}, by_size=bigram, source="PR #549"),
    "bigram embedding with signs": Row(dict(BIGRAM_SIGNS=1), by_size=bigram, source=SPEEDRUN),
    # Several at once: gains need not add up.
    "together": Row(TOGETHER, by_size=bigram),
    "together, SmearGate by channel": Row(dict(SMEAR_GATE_TYPE="channel", **TOGETHER), by_size=bigram),
    "together without bigrams": Row({name: value for name, value in TOGETHER.items() if name != "BIGRAM_SIGNS"}),
    "together without more losses": Row(
        {name: value for name, value in TOGETHER.items() if name not in ("MTP_WEIGHTS", "PREFIX_LOSS_WEIGHT")},
        by_size=bigram,
    ),
    # Residual stream and depth
    "dense skips": Row(dict(DENSE_SKIPS=2), source="MUDD, arXiv 2502.12170"),
    "backout": Row({}, by_size=middle, source=SPEEDRUN),
    "LN scale off": Row(dict(LN_SCALE=0)),
    "loops off": Row(dict(NUM_LOOPS=0)),
    "loops on": Row(dict(NUM_LOOPS=2)),
    "loops from the start": Row(dict(NUM_LOOPS=2, ENABLE_LOOPING_AT=0)),
    # Averages
    "EMA off": Row(dict(EMA_DECAY=0)),
    "EMA 0.9": Row(dict(EMA_DECAY=0.9)),
    "EMA 0.95": Row(dict(EMA_DECAY=0.95)),
    "EMA 0.99": Row(dict(EMA_DECAY=0.99)),
    # Vocabulary at equal parameters
    "vocabulary x 2": Row(dict(VOCAB_SIZE=2048), by_size=equal_parameters(2048), vocabulary=2048),
    "vocabulary x 4": Row(dict(VOCAB_SIZE=4096), by_size=equal_parameters(4096), vocabulary=4096),
    "vocabulary x 8": Row(dict(VOCAB_SIZE=8192), by_size=equal_parameters(8192), vocabulary=8192),
}
