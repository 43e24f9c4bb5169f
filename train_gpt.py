"""Train, quantize, pack and score a language model that fits in 16,000,000 bytes, code included.

One file, from text shards to bits per byte, for the public Parameter Golf challenge.

    make demo                                              the whole pipeline in a few minutes on a laptop
    python train_gpt.py --help                             every knob: type, default, presets, meaning
    python train_gpt.py --dry-run                          what a run would do, as JSON; touches nothing
    PRESET=baseline torchrun --standalone --nproc_per_node=8 train_gpt.py

Every setting is an environment variable (section Config); importing this file reads none and starts nothing.
Sections, in the order in which data meets them; each calls only those above it:

    Config -> Run -> Checkpoint -> Data -> Score -> Kernels -> Model -> Adapters -> Optimizers -> Schedules -> Training
    -> Quantization -> Entropy coding -> Artifact -> Evaluation -> TTT -> Stages -> main

Shapes in comments: B sequences in a batch, T tokens in a sequence, d model width, H query heads, K key/value heads,
h head width, V vocabulary, L layers.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # Waiting OpenMP threads must sleep soon: spinning ones slow a run down tenfold beside another busy process. Threads
    # that sleep at once cost a third of the speed where there is none. GNU's OpenMP takes a number of spins, here some
    # 10 microseconds' worth; with PASSIVE it would not spin once there are other threads than torch's, as after the
    # first checkpoint. Both variables are read once, when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE" if sys.platform == "linux" else "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # On GPUs test-time training changes its shapes all the time: blocks of fixed sizes would rarely fit.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # The next file that is opened would get the number of a closed standard stream, and the messages with it.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(spare, True)
    os.close(spare)

    def interrupt(*_: object) -> None:
        """Ends the process while the modules below are loaded: their traceback would say nothing."""
        try:
            os.write(2, b"interrupted\n" if os.environ.get("RANK", "0") == "0" else b"")
        finally:
            os._exit(130)

    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a command in the background ignores Ctrl-C
        signal.signal(signal.SIGINT, interrupt)

import bisect
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import enum
import errno
import functools
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import math
import platform
import re
import secrets
import select
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import IO, TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TextIO, cast

try:
    import fcntl
    import resource
except ModuleNotFoundError as error:  # Windows has neither of the two
    print(f"error: {error.name}: is missing; this program needs Linux or macOS, and on Windows WSL", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel as sdpa_backends
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    try:
        import triton
        import triton.language as tl
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:  # a machine without GPUs needs none: the plain versions do everything there
        triton = tl = TensorDescriptor = None

BOS_ID = 1  # every document starts with it


# ---------------------------------------------------------------------------------------------------------------
# Config: the table of knobs, the only place that reads the environment
# ---------------------------------------------------------------------------------------------------------------


class ConfigError(Exception):
    """A value that a user can mend: names the variable or file, the value, and what is allowed. Exit code 2."""

    def __init__(self, name: str, value: object, allowed: str):
        super().__init__(f"{name}={value}: {allowed}" if value != "" else f"{name}: {allowed}")
        self.parts = name, value, allowed

    def __reduce__(self) -> tuple:
        """Pickled as it is: its message is not what `__init__` takes."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


def listed_numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers; a single NaN, which no range allows, where they are not."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        return (math.nan,)


def numbered_layers(text: str) -> tuple[int, ...]:
    """The layers in a comma-separated list, without words that name none."""
    words = [word.strip() for word in text.split(",")]
    return tuple(int(word) for word in words if word.isdecimal() and len(word) < 4)


class Observed(enum.StrEnum):
    """Where a change of a knob shows first, in the order of a run; tests/test_knobs.py holds every knob to it.

    A CPU shows nothing more of some knobs: what needs a GPU is refused, and COMPILE changes the log and the speed.
    """

    REFUSAL = "exit code"  # the run ends with an error that names the knob
    FOLDER = "folder"  # names of files and folders
    PARAMETERS = "parameters"  # names and shapes of the weights
    INIT = "initial weights"
    SCHEDULE = "schedule"  # number of steps; for each, learning rate, momentum, layers, recurrence, fake quantization
    BATCHES = "training batches"
    LOSS = "training loss"
    WEIGHTS = "trained weights"
    BYTES = "artifact"
    SCORE = "val_bpb"
    TTT = "val_bpb after TTT"
    SUMMARY = "summary.json"
    LOG = "log"


def knob(default, meaning: str, observed: Observed, *, low=None, high=None, choices=None):
    """One row of the table: default, meaning, where a change shows first, and the values that are allowed."""
    return field(
        default=default, metadata=dict(meaning=meaning, observed=observed, low=low, high=high, choices=choices)
    )


class QuantizerTraits(NamedTuple):
    """What other sections must know of a quantizer; how it works stands in section Quantization."""

    uses_hessians: bool
    clips_by_sigmas: bool  # *_CLIP_SIGMAS end a row's grid; otherwise the quantizer chooses the clip itself
    column_scales: bool  # a column may have a scale of its own, so COLUMN_STEPS, AWQ_GROUPS and TARGET_BYTES apply


QUANTIZER_TRAITS = {
    "uniform": QuantizerTraits(uses_hessians=True, clips_by_sigmas=True, column_scales=True),
    "trellis": QuantizerTraits(uses_hessians=True, clips_by_sigmas=True, column_scales=True),
    "gptq_lite": QuantizerTraits(uses_hessians=False, clips_by_sigmas=False, column_scales=False),
}
# Settings with which calibration takes no gradients, and scales follow the weights' spread alone.
WITHOUT_GRADIENTS: dict[str, Any] = dict(
    matrix_steps=0.0, row_steps=0.0, std_steps=1.0, guided_hessians=False, gptq_row_groups=0
)


@dataclass(frozen=True)
class ModelConfig:
    """What a forward pass depends on: the only settings that a model sees, and those that its artifact carries."""

    # Tokens and sequences
    tokenizer_sha256: str = knob(
        "",
        "SHA-256 that the tokenizer's file must have; training stores it in the artifact; empty: any file is accepted",
        Observed.REFUSAL,
    )
    vocab_size: int = knob(
        1024, "number of tokens in the vocabulary; must equal the tokenizer's", Observed.REFUSAL, low=4, high=65536
    )
    train_seq_len: int = knob(
        1024,
        "length of a training sequence, in tokens; longer documents are cut",
        Observed.BATCHES,
        low=1,
        high=1 << 20,
    )

    # Width and depth
    num_layers: int = knob(9, "number of transformer layers", Observed.PARAMETERS, low=1, high=256)
    model_dim: int = knob(512, "width of the residual stream, in channels", Observed.PARAMETERS, low=8, high=1 << 16)
    num_heads: int = knob(8, "number of query heads; must divide MODEL_DIM", Observed.PARAMETERS, low=1, high=1 << 16)
    num_kv_heads: int = knob(4, "number of key/value heads; must divide NUM_HEADS", Observed.PARAMETERS, low=1)
    mlp_mult: float = knob(
        2.0, "hidden width of the MLP, as a multiple of MODEL_DIM", Observed.PARAMETERS, low=0.01, high=64
    )
    leaky_relu_slope: float = knob(
        0.5,
        "negative slope of the MLP's LeakyReLU, whose output is squared; 0: ReLU^2",
        Observed.LOSS,
        low=0,
        high=1,
    )
    ln_scale: bool = knob(
        False, "multiply each layer's normalized input by 1/sqrt(layer + 1), layers counted from 0", Observed.LOSS
    )

    # Embeddings and logits
    tie_embeddings: bool = knob(True, "use the token embedding as the output head", Observed.PARAMETERS)
    bigram_vocab_size: int = knob(
        0,
        "hash buckets for pairs of consecutive tokens, each bucket with an embedding; 0: no bigram embedding",
        Observed.PARAMETERS,
        low=0,
        high=1 << 20,
    )
    bigram_dim: int = knob(
        128,
        "width of the bigram embedding table, before the projection to MODEL_DIM",
        Observed.PARAMETERS,
        low=1,
        high=1 << 16,
    )
    bigram_signs: bool = knob(
        False,
        "multiply a row of the bigram table by a vector of +1 and -1 that a second hash of the pair chooses, so that "
        "pairs in one bucket cancel each other",
        Observed.LOSS,
    )
    ve_dim: int = knob(
        0,
        "width of the table of value embeddings, token embeddings added to attention's values; 0: no value embeddings",
        Observed.PARAMETERS,
        low=0,
        high=1 << 16,
    )
    ve_layers: str = knob(
        "9,10", "layers that add value embeddings (VE_DIM), as comma-separated numbers from 0", Observed.PARAMETERS
    )
    smear_gate_enabled: bool = knob(
        False, "mix the previous token's embedding into each token's through a gate (SmearGate)", Observed.PARAMETERS
    )
    smear_gate_type: str = knob(
        "window",
        "kind of SmearGate; window: one gate per token, computed from GATE_WINDOW channels; channel: one learned gate "
        "per channel, applied after the first norm",
        Observed.PARAMETERS,
        choices=("window", "channel"),
    )
    logit_softcap: float = knob(30.0, "bound C of the softcap, C*tanh(logit/C)", Observed.LOSS, low=0.01)
    asym_logit_rescale: bool = knob(
        False,
        "learn two bounds of the softcap, one for logits above 0 and one for others, which start at LOGIT_SOFTCAP; "
        "test-time training moves them too; without the fused loss",
        Observed.PARAMETERS,
    )
    softcap_type: str = knob(
        "tanh",
        "function of the softcap; tanh: C*tanh(logit/C); poly: tanh's Taylor polynomial of degree 5, clamped",
        Observed.LOSS,
        choices=("tanh", "poly"),
    )

    # Attention
    rope_base: float = knob(10000.0, "base of the rotary embedding's wavelengths", Observed.LOSS, low=1)
    rope_dims: int = knob(0, "dimensions of each head with rotary embedding; 0: all", Observed.LOSS, low=0)
    key_offset: bool = knob(
        False,
        "take the second half of each key's dimensions without rotary embedding from the token before, in its document "
        "(partial key offset)",
        Observed.LOSS,
    )
    window_attn_size: int = knob(
        0,
        "tokens before its own to which each token's attention is limited in the layers WINDOW_ATTN_LAYERS, where a "
        "document is longer (sliding window attention); 0: no limit",
        Observed.LOSS,
        low=0,
        high=1 << 16,
    )
    window_attn_layers: str = knob(
        "",
        "layers whose attention is limited to WINDOW_ATTN_SIZE, as comma-separated numbers from 0; empty: every second "
        "layer, from 0",
        Observed.LOSS,
    )
    rope_type: str = knob(
        "rope",
        "rotary embedding; rope: wavelengths as ROPE_BASE gives them; yarn: long wavelengths are stretched where the "
        "longest evaluation context exceeds TRAIN_SEQ_LEN (YaRN)",
        Observed.LOSS,
        choices=("rope", "yarn"),
    )
    rope_yarn: bool = knob(False, "older name for ROPE_TYPE=yarn; 1: YaRN is on", Observed.LOSS)
    yarn_max_len: int = knob(
        0,
        "context length that YaRN stretches to, in tokens; 0 and whatever is shorter: the longest evaluation context",
        Observed.LOSS,
        low=0,
        high=1 << 20,
    )
    xsa_last_n: int = knob(
        0,
        "number of last layers whose attention output loses the component along the token's own value (XSA); 0: none",
        Observed.LOSS,
        low=0,
    )
    gated_xsa: bool = knob(
        False,
        "multiply what XSA subtracts by the tanh of a learned number for each head, which starts at 0 (XSA_LAST_N)",
        Observed.PARAMETERS,
    )
    value_residual: bool = knob(
        False,
        "add the first layer's values to those of every later layer, through a learned sigmoid gate for each layer",
        Observed.PARAMETERS,
    )
    sparse_attn_gate_enabled: bool = knob(
        False,
        "multiply each head's output by sigmoid(SPARSE_ATTN_GATE_SCALE * W x), x the first GATE_WINDOW channels of "
        "attention's normalized input",
        Observed.PARAMETERS,
    )
    sparse_attn_gate_scale: float = knob(
        0.5, "factor inside the sigmoid of the sparse head gate (SPARSE_ATTN_GATE_ENABLED)", Observed.LOSS, low=0
    )
    gated_attn_enabled: bool = knob(
        False,
        "multiply each head's output by sigmoid(W x), x all channels of attention's normalized input",
        Observed.PARAMETERS,
    )
    attn_out_gate_enabled: bool = knob(
        False,
        "multiply each head's output by 2*sigmoid(W x), x the first GATE_WINDOW channels of attention's normalized "
        "input",
        Observed.PARAMETERS,
    )
    gate_window: int = knob(
        12,
        "input channels read by the window SmearGate, the sparse head gate and the output head gate",
        Observed.PARAMETERS,
        low=1,
    )

    # Residual stream and recurrence
    skip_gates_enabled: bool = knob(
        False, "blend U-Net skip connections in through learned gates instead of adding them", Observed.PARAMETERS
    )
    num_loops: int = knob(
        0,
        "extra passes through layers LOOP_START..LOOP_END (depth recurrence); 0: no recurrence",
        Observed.LOSS,
        low=0,
        high=16,
    )
    loop_start: int = knob(3, "first layer of the depth recurrence, counted from 0", Observed.LOSS, low=0)
    loop_end: int = knob(5, "last layer of the depth recurrence, counted from 0", Observed.LOSS, low=0)
    virtual_depth: int = knob(
        0,
        "most layer calls of a forward pass with depth recurrence, which may cut the last pass short; 0: no bound",
        Observed.LOSS,
        low=0,
        high=4096,
    )
    parallel_start_layer: int = knob(
        -1,
        "first layer with parallel residual streams for attention and MLP, counted from 0; -1: one stream throughout",
        Observed.PARAMETERS,
        low=-1,
    )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    @property
    def rotary_dims(self) -> int:
        """Dimensions of a head with rotary embedding."""
        return self.rope_dims or self.head_dim

    @property
    def offset_dims(self) -> int:
        """Dimensions of a key that come from the token before."""
        return (self.head_dim - self.rotary_dims) // 2 if self.key_offset else 0

    @property
    def yarn(self) -> bool:
        return self.rope_yarn or self.rope_type == "yarn"

    @property
    def loops(self) -> bool:
        """Whether the model has depth recurrence."""
        return self.num_loops > 0

    @property
    def parallel_residual(self) -> bool:
        """Whether the last layers have parallel residual streams."""
        return self.parallel_start_layer >= 0

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Layers with value embeddings: the numbers in VE_LAYERS."""
        return numbered_layers(self.ve_layers) if self.ve_dim else ()

    @property
    def window_layers(self) -> tuple[int, ...]:
        """Layers whose attention has a window: the numbers in WINDOW_ATTN_LAYERS."""
        if not self.window_attn_size:
            return ()
        every_second = tuple(range(0, self.num_layers, 2))
        return numbered_layers(self.window_attn_layers) if self.window_attn_layers else every_second


@dataclass(frozen=True)
class Config(ModelConfig):
    """Every setting of a run. A field is the environment variable of the same name in capitals."""

    # What to run, and where
    preset: str = knob(
        "",
        "set of defaults: demo, baseline, record or poly5; empty: baseline where there is a CUDA device, else demo",
        Observed.PARAMETERS,
    )
    preset_file: str = knob(
        "",
        "TOML file of knobs such as matrix_lr = 0.028, which the environment overrides; empty: none",
        Observed.PARAMETERS,
    )
    original: bool = knob(
        False,
        "train and evaluate as the public script behind the preset does, where this script differs; PRESET=record and "
        "poly5 alone, and every other knob that is set still counts",
        Observed.BATCHES,
    )
    mode: str = knob(
        "all",
        "stages to run; train: up to the artifact; eval: score an artifact; all: both",
        Observed.SCORE,
        choices=("all", "train", "eval"),
    )
    run_id: str = knob("", "name of the run's folder under logs/; empty: date, time, preset and seed", Observed.FOLDER)
    artifact_dir: str = knob("", "path of the run's folder; empty: logs/$RUN_ID", Observed.FOLDER)
    save_weights: bool = knob(
        False, "keep the weights of before quantization too: weights.safetensors in the run's folder", Observed.FOLDER
    )
    checkpoint_every_seconds: float = knob(
        60.0,
        "seconds of training, or of test-time training, between checkpoints in the run's folder, which go when the run "
        "ends; 0: none",
        Observed.LOG,
        low=0,
    )
    resume: str = knob(
        "auto",
        "what to go on from; auto: a run in this run's folder that was cut off, if its settings are equal; 0: nothing; "
        "a path: a checkpoint, or the folder of a run that has some, for a training elsewhere with settings of its own",
        Observed.REFUSAL,
    )
    seed: int = knob(
        1337,
        "random seed of the initial weights, the data order, NEFTune's noise and LoRA's initial weights",
        Observed.INIT,
        low=0,
        high=2**32 - 1,
    )
    strict: bool = knob(
        False,
        "refuse a variable that other scripts have and that has no effect here, instead of a warning",
        Observed.REFUSAL,
    )
    device: str = knob(
        "auto",
        "device to compute on; auto: cuda where there is one, else cpu; mps: training on Apple's GPU, and what follows "
        "it on the CPU",
        Observed.REFUSAL,
        choices=("auto", "cpu", "cuda", "mps"),
    )
    compute_dtype: str = knob(
        "auto",
        "data type of activations and matrix products; auto: bfloat16, but float32 on CPUs without bfloat16 "
        "instructions; master weights are float32, with float64 float64",
        Observed.LOSS,
        choices=("auto", "bfloat16", "float32", "float64"),
    )
    compile: str = knob(
        "auto",
        "compile the model with torch.compile; auto: 1 on CUDA, 0 on CPUs",
        Observed.LOG,
        choices=("auto", "0", "1"),
    )
    compile_cache: bool = knob(
        False,
        "keep what torch.compile makes in the run's folder, and read it there, as MODE=eval can; the file holds code "
        "that runs: never use it in a stranger's folder",
        Observed.REFUSAL,
    )
    attention: str = knob(
        "auto",
        "attention backend; fa3, fa2: FlashAttention; varlen: PyTorch's own; sdpa: with a document mask; blocked: for "
        "CPUs; auto: blocked on CPUs, else the first of fa3, fa2, varlen and sdpa that is installed",
        Observed.LOSS,
        choices=("auto", "fa3", "fa2", "varlen", "sdpa", "blocked"),
    )
    triton_kernels: str = knob(
        "auto",
        "fuse MLP, loss and the work around attention in Triton kernels; auto: 1 on CUDA where Triton is installed",
        Observed.REFUSAL,
        choices=("auto", "0", "1"),
    )
    fused_ce_enabled: bool = knob(
        True,
        "fuse the cross-entropy and its backward pass: in Triton with TRITON_KERNELS=1, in blocks on CPUs; 0: autograd",
        Observed.LOSS,
    )
    fp8_head: bool = knob(
        False,
        "inputs of the output head's product in FP8 (e4m3) in training steps, gradients without it; simulated where "
        "the device has no FP8 products",
        Observed.LOSS,
    )
    fp8_mlp: bool = knob(
        False,
        "inputs of the MLP's products in FP8 (e4m3) in training steps, gradients without it; simulated where the "
        "device has no FP8 products",
        Observed.LOSS,
    )
    cpu_threads: int = knob(
        0,
        "threads of each rank on CPUs; 0: the cores shared out evenly among the ranks",
        Observed.LOG,
        low=0,
        high=1024,
    )

    # Data
    data_path: str = knob(
        "data/builtin_sp1024", "folder of the token shards fineweb_{train,val}_*.bin", Observed.BATCHES
    )
    tokenizer_path: str = knob(
        "", "SentencePiece model of the shards; empty: $DATA_PATH/tokenizer.model", Observed.REFUSAL
    )
    caseops_enabled: str = knob(
        "auto",
        "whether the shards' text went through CaseOps, so that byte sidecars count the original text; 1: sidecars are "
        "required; 0: sidecars are refused; auto: 1 where there is a sidecar, else 0",
        Observed.REFUSAL,
        choices=("auto", "0", "1"),
    )
    train_shard_limit: int = knob(
        0, "training shards to learn from, the first ones; all are checked; 0: all", Observed.BATCHES, low=0
    )
    val_token_limit: int = knob(
        0,
        "validation targets to score, the first ones: quick, and no score of the challenge, as the log says; 0: all",
        Observed.SCORE,
        low=0,
    )
    allow_shared_documents: int = knob(
        0,
        "validation documents that may also be in the training shards, with a warning; a run with more is refused",
        Observed.SUMMARY,
        low=0,
    )
    allow_shared_windows: float = knob(
        0.05,
        "fraction of validation's windows of 50 tokens that may also be in the training shards; a run with more is "
        "refused",
        Observed.SUMMARY,
        low=0,
        high=1,
    )
    data_order: str = knob(
        "rows",
        "order of the training text; documents: whole documents in a new random order each epoch, packed into "
        "sequences without gaps; rows: the shards cut into sequences, which come in a random order; stream: as the "
        "shards hold it",
        Observed.BATCHES,
        choices=("documents", "rows", "stream"),
    )
    read_ahead: int = knob(
        2, "training batches prepared in advance by a thread; 0: none, each when needed", Observed.LOG, low=0, high=64
    )

    # Length of the training, batches
    iterations: int = knob(
        20000, "number of training steps, at most; 0: none, the initial weights", Observed.SCHEDULE, low=0
    )
    max_wallclock_seconds: float = knob(600.0, "training time limit, in seconds; 0: no limit", Observed.SCHEDULE, low=0)
    gptq_reserve_seconds: float = knob(
        -1.0,
        "seconds of the training time limit reserved for GPTQ's calibration; -1: 1.5 times those measured in the "
        "warmup",
        Observed.SCHEDULE,
        low=-1,
    )
    warmup_steps: int = knob(
        20, "steps that compile every graph and are then undone, before the clock starts; 0: none", Observed.LOG, low=0
    )
    train_batch_tokens: int = knob(
        524288, "tokens of a training step, over all ranks and micro-steps", Observed.BATCHES, low=1
    )
    micro_batch_tokens: int = knob(65536, "tokens that one rank processes at once, at most", Observed.BATCHES, low=1)
    train_log_every: int = knob(200, "training steps between log lines of the loss; 0: none", Observed.LOG, low=0)
    val_loss_every: int = knob(1000, "training steps between validations; 0: only at the end", Observed.LOG, low=0)
    val_batch_size: int = knob(65536, "validation tokens that one rank processes at once", Observed.LOG, low=1)

    # Initial weights and the training loss
    tied_embed_init_std: float = knob(
        0.005, "standard deviation of a tied embedding's initial weights", Observed.INIT, low=0
    )
    qk_gain_init: float = knob(
        1.5, "initial value of each head's learned gain on the normalized queries", Observed.INIT, low=0
    )
    qk_gain_init_schedule: str = knob(
        "",
        "QK_GAIN_INIT of each layer, comma-separated, such as 2,3,4; empty: QK_GAIN_INIT of all layers",
        Observed.INIT,
    )
    gated_attn_init_std: float = knob(
        0.0, "standard deviation of the initial weights of head gates, which begin alike at 0", Observed.INIT, low=0
    )
    ve_init: str = knob(
        "zero",
        "initial projection of the value embeddings (VE_DIM); zero: they start without effect; orthogonal",
        Observed.INIT,
        choices=("zero", "orthogonal"),
    )
    enable_looping_at: float = knob(
        0.35, "fraction of training after which the depth recurrence is on", Observed.SCHEDULE, low=0, high=1
    )
    num_unique_layers: int = knob(
        0,
        "layers with weights of their own, which run in turn until NUM_LAYERS have run; sets NUM_LAYERS, NUM_LOOPS, "
        "LOOP_START, LOOP_END, VIRTUAL_DEPTH and ENABLE_LOOPING_AT; 0: NUM_LAYERS",
        Observed.PARAMETERS,
        low=0,
        high=256,
    )
    recur_layers: str = knob(
        "",
        "layers that repeat, as comma-separated numbers in a row, such as 4,5; sets LOOP_START and LOOP_END, and "
        "NUM_LOOPS to 1 where it is not set; empty: LOOP_START and LOOP_END say",
        Observed.PARAMETERS,
    )
    recur_start_step: int = knob(
        0, "training step from which the depth recurrence is on; 0: ENABLE_LOOPING_AT says", Observed.SCHEDULE, low=0
    )
    neftune_alpha: float = knob(
        0.0, "magnitude of NEFTune's uniform noise on training embeddings; 0: no noise", Observed.LOSS, low=0
    )
    mtp_weights: str = knob(
        "",
        "initial weights of the losses of tokens further ahead in the training loss, comma-separated: of the second "
        "token ahead, the third, ... (multi-token prediction); empty: no such losses",
        Observed.SCHEDULE,
    )
    mtp_end: float = knob(
        0.667,
        "fraction of training over which MTP_WEIGHTS fall linearly to 0",
        Observed.WEIGHTS,
        low=0.001,
        high=1,
    )
    z_loss_weight: float = knob(
        0.0, "weight of the z-loss, mean(logsumexp^2), in the training loss; 0: no z-loss", Observed.WEIGHTS, low=0
    )
    prefix_loss_weight: float = knob(
        0.0,
        "initial weight of the loss of predicting, for each target, the longest token that its text begins with; falls "
        "linearly to 0 over the training; 0: no such loss",
        Observed.WEIGHTS,
        low=0,
        high=100,
    )
    focal_enabled: bool = knob(
        False,
        "weight each token's training loss by (1 - probability of the target)^FOCAL_GAMMA, normalized to mean 1 by "
        "FOCAL_NORM (focal loss)",
        Observed.WEIGHTS,
    )
    focal_gamma: float = knob(1.0, "exponent of the focal loss (FOCAL_ENABLED)", Observed.WEIGHTS, low=0, high=100)
    focal_norm: str = knob(
        "sequence",
        "tokens over which the focal loss's weights average 1; sequence: each training sequence; batch: a rank's "
        "micro-batch, so that an update depends on the number of ranks",
        Observed.WEIGHTS,
        choices=("sequence", "batch"),
    )

    # Optimizers
    matrix_lr: float = knob(0.04, "Muon's learning rate, for attention and MLP matrices", Observed.WEIGHTS, low=0)
    scalar_lr: float = knob(
        0.04, "AdamW's learning rate for vectors, scalars, gates and small projections", Observed.WEIGHTS, low=0
    )
    tied_embed_lr: float = knob(0.05, "AdamW's learning rate for a tied embedding", Observed.WEIGHTS, low=0)
    embed_lr: float = knob(0.6, "AdamW's learning rate for an untied embedding", Observed.WEIGHTS, low=0)
    head_lr: float = knob(0.008, "AdamW's learning rate for an untied output head", Observed.WEIGHTS, low=0)
    muon_momentum: float = knob(
        0.95, "Muon's Nesterov momentum after the warmup", Observed.SCHEDULE, low=0, high=0.9999
    )
    muon_momentum_warmup_start: float = knob(
        0.85,
        "Muon's momentum at step 0; MUON_MOMENTUM where a preset's is smaller",
        Observed.SCHEDULE,
        low=0,
        high=0.9999,
    )
    muon_momentum_warmup_steps: int = knob(
        500, "training steps over which Muon's momentum rises linearly; 0: no warmup", Observed.SCHEDULE, low=0
    )
    muon_momentum_cycle: int = knob(
        0,
        "steps of each linear rise and fall of Muon's momentum between MUON_MOMENTUM_MIN and MUON_MOMENTUM_MAX, "
        "by turns, after its warmup; 0: it stays MUON_MOMENTUM",
        Observed.SCHEDULE,
        low=0,
    )
    muon_momentum_min: float = knob(
        0.85, "Muon's lowest momentum in a cycle (MUON_MOMENTUM_CYCLE)", Observed.SCHEDULE, low=0, high=0.9999
    )
    muon_momentum_max: float = knob(
        0.95, "Muon's highest momentum in a cycle (MUON_MOMENTUM_CYCLE)", Observed.SCHEDULE, low=0, high=0.9999
    )
    muon_momentum_type: str = knob(
        "ema",
        "Muon's momentum buffer; ema: the moving average of the gradients; sgd: momentum * buffer + gradient, kept in "
        "MUON_GRADIENT_DTYPE; they differ while the momentum changes, and in rounding",
        Observed.WEIGHTS,
        choices=("ema", "sgd"),
    )
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations of a Muon update", Observed.WEIGHTS, low=1, high=20)
    muon_coefficients: str = knob(
        "classic",
        "Newton-Schulz polynomials; classic: Keller Jordan's quintic at every iteration; polar_express: the optimal "
        "polynomial of each iteration",
        Observed.WEIGHTS,
        choices=("classic", "polar_express"),
    )
    muon_gradient_dtype: str = knob(
        "master",
        "type in which the gradients of the matrices are summed over the ranks; bfloat16 halves the traffic of master, "
        "the type of the weights",
        Observed.WEIGHTS,
        choices=("master", "bfloat16"),
    )
    muon_row_normalize: bool = knob(
        False, "scale each row of a Muon update to unit norm before Newton-Schulz", Observed.WEIGHTS
    )
    normuon_beta2: float = knob(
        0.0,
        "NorMuon's beta2, the decay rate of the mean square by which each neuron's Muon update is divided after "
        "Newton-Schulz; 0: plain Muon",
        Observed.WEIGHTS,
        low=0,
        high=0.99999,
    )
    muon_wd: float = knob(0.0, "Muon's decoupled weight decay", Observed.WEIGHTS, low=0)
    beta1: float = knob(
        0.9, "AdamW's beta1, the decay rate of the mean gradient", Observed.WEIGHTS, low=0, high=0.99999
    )
    beta2: float = knob(
        0.95, "AdamW's beta2, the decay rate of the mean squared gradient", Observed.WEIGHTS, low=0, high=0.99999
    )
    adam_eps: float = knob(1e-8, "AdamW's epsilon", Observed.WEIGHTS, low=1e-30)
    adam_wd: float = knob(
        0.0, "AdamW's weight decay for vectors, scalars, gates and small projections", Observed.WEIGHTS, low=0
    )
    embed_dtype: str = knob(
        "master",
        "type of the embedding, of bigram and value tables, and of their gradients and means in AdamW; master: that of "
        "other weights; bfloat16: small updates round away",
        Observed.WEIGHTS,
        choices=("master", "bfloat16"),
    )
    embed_wd: float = knob(0.0, "AdamW's weight decay for embeddings and the output head", Observed.WEIGHTS, low=0)
    grad_clip_norm: float = knob(
        0.0, "norm to which the global gradient is clipped; 0: no clipping", Observed.WEIGHTS, low=0
    )

    # Schedules
    lr_warmup_steps: int = knob(
        0, "first training steps, over which the learning rate rises linearly; 0: none", Observed.WEIGHTS, low=0
    )
    warmdown_frac: float = knob(
        0.0,
        "last fraction of training, over which the learning rate falls linearly to 0; 0: WARMDOWN_ITERS says",
        Observed.SCHEDULE,
        low=0,
        high=1,
    )
    warmdown_iters: int = knob(
        1200,
        "last training steps, over which the learning rate falls linearly to 0; used where WARMDOWN_FRAC is 0; 0: none",
        Observed.SCHEDULE,
        low=0,
    )
    warmdown_shape: str = knob(
        "linear",
        "shape of the warmdown; linear, or cosine: half a wave of a cosine",
        Observed.SCHEDULE,
        choices=("linear", "cosine"),
    )
    min_lr: float = knob(
        0.0, "lower bound of the warmdown, as a fraction of the full learning rate", Observed.SCHEDULE, low=0, high=1
    )
    train_seq_schedule: str = knob(
        "",
        "most context of a token, in tokens, each up to a fraction of the training, such as 1024@0.1,2048@0.7,3072@1; "
        "longer documents are cut; empty: TRAIN_SEQ_LEN",
        Observed.BATCHES,
    )
    seq_change_warmup_steps: int = knob(
        32,
        "training steps over which the learning rate rises from 0 again after a change of the context "
        "(TRAIN_SEQ_SCHEDULE), counted at the average speed so far; 0: none",
        Observed.WEIGHTS,
        low=0,
    )
    progressive_depth_schedule: str = knob(
        "",
        "fractions of training at which more layers start to train, from the first layer up, comma-separated; empty or "
        "0: all layers train from the start",
        Observed.SCHEDULE,
    )
    progressive_depth_by: str = knob(
        "run",
        "what the fractions of PROGRESSIVE_DEPTH_SCHEDULE are of; run: of ITERATIONS or of the time limit, whichever "
        "is further; steps: of ITERATIONS",
        Observed.SCHEDULE,
        choices=("run", "steps"),
    )
    progressive_depth_decay: bool = knob(
        False,
        "weight decay also for the matrices of layers that do not train yet (PROGRESSIVE_DEPTH_SCHEDULE)",
        Observed.WEIGHTS,
    )
    ema_decay: float = knob(
        0.0,
        "decay of the exponential moving average of the weights (EMA); 0: no EMA",
        Observed.WEIGHTS,
        low=0,
        high=0.999999,
    )
    ema_ramp: bool = knob(
        True,
        "let the EMA's decay rise to EMA_DECAY over the first 10/(1 - EMA_DECAY) steps, so that a short run forgets "
        "the initial weights; 0: EMA_DECAY at every step",
        Observed.WEIGHTS,
    )
    ema_start: float = knob(
        0.0,
        "training step before which the EMA is the weights alone, or below 1 the fraction of the training; 0: none",
        Observed.WEIGHTS,
        low=0,
    )
    swa_enabled: bool = knob(False, "average weights of the end of training with equal weights (SWA)", Observed.WEIGHTS)
    swa_every: int = knob(50, "training steps between weights that SWA averages", Observed.WEIGHTS, low=1)
    swa_start: float = knob(
        0.2, "fraction of the full learning rate below which SWA begins", Observed.WEIGHTS, low=0, high=1
    )
    weight_average: str = knob(
        "both",
        "weights to keep after training; ema: the EMA; swa: the SWA; both: the mean of those that are on, without any "
        "the last weights",
        Observed.WEIGHTS,
        choices=("both", "ema", "swa"),
    )
    late_qat_threshold: float = knob(
        0.0,
        "fraction of the full learning rate below which training fake-quantizes attention and MLP matrices (late QAT); "
        "0: never",
        Observed.SCHEDULE,
        low=0,
        high=1,
    )
    qat_start: float = knob(
        0.0,
        "training step from which training fake-quantizes attention and MLP matrices, or below 1 the fraction of the "
        "training; 0: LATE_QAT_THRESHOLD says",
        Observed.SCHEDULE,
        low=0,
    )

    # Quantization and the artifact
    quantizer: str = knob(
        "uniform",
        "quantizer of matrices; uniform: GPTQ on a uniform grid; trellis: GPTQ with trellis-coded quantization; "
        "gptq_lite: round to nearest, each row with the best of five clip quantiles",
        Observed.BYTES,
        choices=tuple(QUANTIZER_TRAITS),
    )
    matrix_bits: int = knob(6, "bits per weight of attention and MLP matrices", Observed.BYTES, low=2, high=8)
    attn_bits: int = knob(
        0, "bits per weight of attention's matrices, 2 to 8; 0: MATRIX_BITS", Observed.BYTES, low=0, high=8
    )
    mlp_bits: int = knob(
        0, "bits per weight of the MLP's matrices, 2 to 8; 0: MATRIX_BITS", Observed.BYTES, low=0, high=8
    )
    embed_bits: int = knob(
        8,
        "bits per weight of the embedding and the output head, 2 to 8; 16: fp16, not quantized",
        Observed.BYTES,
        low=2,
        high=16,
    )
    attn_clip_sigmas: float = knob(
        13.0, "clip range of attention's matrices, in standard deviations of a row", Observed.BYTES, low=0.1
    )
    mlp_clip_sigmas: float = knob(
        11.5, "clip range of the MLP's matrices, in standard deviations of a row", Observed.BYTES, low=0.1
    )
    embed_clip_sigmas: float = knob(
        14.0,
        "clip range of the embedding and the output head, in standard deviations of a row",
        Observed.BYTES,
        low=0.1,
    )
    matrix_clip_sigmas: float = knob(
        12.85,
        "clip range of large bigram and value embeddings, in standard deviations of a row",
        Observed.BYTES,
        low=0.1,
    )
    fp16_elements: int = knob(
        65_536,
        "elements up to which a table or a projection of bigram and value embeddings is stored in fp16; 0: all are "
        "quantized",
        Observed.BYTES,
        low=0,
    )
    prune_pct: float = knob(
        0.0,
        "fraction of each quantized matrix's weights, those of the smallest magnitude, set to 0 before quantization; "
        "0: none",
        Observed.BYTES,
        low=0,
        high=0.99,
    )
    scale_grid: int = knob(
        16, "quantization scales per factor of 2; 0: any fp16 number is a scale", Observed.BYTES, low=0, high=1024
    )
    column_steps: float = knob(
        0.0,
        "exponent p of column scales in proportion to U_jj^p, U the inverse Hessian's Cholesky factor; 0: equal scales",
        Observed.BYTES,
        low=0,
        high=1,
    )
    matrix_steps: float = knob(
        0.0,
        "exponent p of a matrix's scales in proportion to (s h)^(-p/2), s its outputs' mean squared gradient, h its "
        "inputs' power; 0: scales follow the weights' spread alone",
        Observed.BYTES,
        low=0,
        high=1,
    )
    row_steps: float = knob(
        0.0,
        "exponent p of row scales in proportion to (mean squared gradient at the row's output)^(-p/2), within a matrix",
        Observed.BYTES,
        low=0,
        high=1,
    )
    std_steps: float = knob(
        1.0,
        "exponent p of row scales in proportion to (the row's standard deviation)^p, within a matrix",
        Observed.BYTES,
        low=0,
        high=1,
    )
    guided_hessians: bool = knob(
        False,
        "weigh each token of GPTQ's Hessians by the squared gradient at the matrix's outputs (GuidedQuant)",
        Observed.BYTES,
    )
    gptq_row_groups: int = knob(
        0,
        "groups of output rows: GPTQ compensates the errors of one in those after it (YAQA); 0: rows are independent",
        Observed.BYTES,
        low=0,
        high=8192,
    )
    trellis_states: int = knob(8, "states of the quantizer's trellis: 4, 8, 16 or 32", Observed.BYTES, low=4, high=32)
    trellis_rate: float = knob(
        0.5, "weight of the code's bits against the error in the trellis search", Observed.BYTES, low=0, high=10
    )
    target_bytes: int = knob(
        0,
        "bytes of code and model to which quantization scales are fitted, at most; 0: scales follow the clip ranges",
        Observed.BYTES,
        low=0,
    )
    awq_groups: int = knob(
        0,
        "groups of 64 input columns kept in 8 bits, those with the largest activations times weights; 0: none",
        Observed.BYTES,
        low=0,
    )
    gated_attn_quant_gate: bool = knob(
        False, "store head gates in int8 with a scale per row instead of fp16", Observed.BYTES
    )
    lqer_enabled: bool = knob(False, "store low-rank corrections of the quantization error (LQER)", Observed.BYTES)
    lqer_rank: int = knob(4, "rank of an LQER correction", Observed.BYTES, low=1, high=256)
    lqer_top_k: int = knob(3, "number of matrices with an LQER correction, at most", Observed.BYTES, low=1)
    lqer_select: str = knob(
        "gain",
        "choice of matrices for LQER; norm: largest error; gain: largest reduction of the error, where a correction "
        "saves more than finer scales of equal bytes",
        Observed.BYTES,
        choices=("norm", "gain"),
    )
    lqer_asym_enabled: str = knob(
        "auto",
        "bits of LQER's factors; 1: 2 for the left and 4 for the right one, in asymmetric ranges; 0: LQER_FACTOR_BITS; "
        "auto: whichever reduces the error more",
        Observed.BYTES,
        choices=("auto", "0", "1"),
    )
    lqer_fit: str = knob(
        "hessian",
        "how LQER fits the error; hessian: to its effect on the outputs, factors rounded in turn; svd: truncated "
        "singular value decomposition, then rounded by the largest magnitude",
        Observed.BYTES,
        choices=("hessian", "svd"),
    )
    lqer_asym_group: int = knob(
        64, "weights per scale of LQER's asymmetric right factor, at most", Observed.BYTES, low=1
    )
    lqer_factor_bits: int = knob(
        4, "bits per weight of LQER's symmetric factors (LQER_ASYM_ENABLED=0)", Observed.BYTES, low=2, high=8
    )
    rvq_enabled: bool = knob(
        False,
        "quantize the error of matrices a second time, most error per byte first, up to ARTIFACT_LIMIT_BYTES (residual "
        "quantization, RVQ)",
        Observed.BYTES,
    )
    rvq_bits: int = knob(4, "bits per weight of RVQ's second quantization", Observed.BYTES, low=2, high=8)
    gptq_calibration_batches: int = knob(
        16, "training batches from which GPTQ's Hessians are estimated", Observed.BYTES, low=1
    )
    tune_steps: int = knob(
        0,
        "steps that tune scales, vectors and all fp16 tensors after quantization, to the float model's predictions on "
        "training batches; 0: none",
        Observed.BYTES,
        low=0,
    )
    tune_scale_lr: float = knob(
        0.002, "learning rate of the scales' logarithms, falling to 0 (TUNE_STEPS)", Observed.BYTES, low=0
    )
    tune_vector_lr: float = knob(
        0.001, "learning rate of what is stored in fp16, falling to 0 (TUNE_STEPS)", Observed.BYTES, low=0
    )
    gptq_damp: float = knob(
        0.01, "damping of GPTQ's Hessians, as a fraction of the mean diagonal", Observed.BYTES, low=0
    )
    compressor: str = knob(
        "zstd",
        "compressor of the artifact; zstd, brotli, lzma: of all sections; pergroup: a range coder for quantized "
        "matrices, adaptive in groups of rows and columns",
        Observed.BYTES,
        choices=("zstd", "brotli", "lzma", "pergroup"),
    )
    artifact_limit_bytes: int = knob(
        16_000_000, "bytes allowed for code and model together; a run over the limit fails", Observed.REFUSAL, low=0
    )

    # Evaluation
    eval_seq_len: int = knob(
        0, "context length in evaluation, in tokens; 0: TRAIN_SEQ_LEN", Observed.SCORE, low=0, high=1 << 20
    )
    eval_stride: int = knob(
        0,
        "targets that each sliding window adds; 0: EVAL_SEQ_LEN, so that windows do not overlap",
        Observed.SCORE,
        low=0,
    )
    eval_scores: bool = knob(
        False,
        "write scores_<stage>.npy, the negative log-likelihood of every validation target in nats, in stream order",
        Observed.FOLDER,
    )
    temperature: float = knob(
        1.0, "temperature of the softcapped logits in evaluation; training uses 1", Observed.SCORE, low=0.01, high=100
    )
    eval_budget_seconds: float = knob(
        600.0,
        "time budget of the evaluation, in seconds; a run projected to exceed it warns; 0: no budget",
        Observed.LOG,
        low=0,
    )

    # Hints from repetition: the token that followed the same run of tokens before
    hint_enabled: bool = knob(
        False,
        "raise or lower the logit of the token that followed the longest earlier run like the one before the target, "
        "by weights learned from earlier scores; needs stream order",
        Observed.SCORE,
    )
    hint_min_match: int = knob(8, "tokens of the shortest run that gives a hint", Observed.SCORE, low=1, high=1024)
    hint_max_match: int = knob(
        32,
        "tokens of the longest run that is looked for; lengths between the two grow by about 1.4 and have weights of "
        "their own",
        Observed.SCORE,
        low=1,
        high=4096,
    )
    hint_chunk_tokens: int = knob(
        8192,
        "targets after which weights of hints learn, and shares of TTT_PLAIN_WEIGHT's mixture, and runs of other "
        "documents become known",
        Observed.SCORE,
        low=1,
    )
    hint_lr: float = knob(1.0, "rate of the weights of hints; 1: a Newton step", Observed.SCORE, low=0, high=10)

    # Test-time training: every target is scored before anything learns from it
    ttt_mode: str = knob(
        "none",
        "test-time training; none: off; phased: LoRA for each document, and SGD of the full model between phases; "
        "chunk: SGD of the full model after each chunk of the validation stream",
        Observed.TTT,
        choices=("none", "phased", "chunk"),
    )
    ttt_baseline: bool = knob(
        False, "also score the windows of test-time training without learning, to compare", Observed.SUMMARY
    )

    # Phased test-time training: LoRA for each document
    ttt_order: str = knob(
        "stream",
        "order of documents in phased TTT; stream: as in the shards, strictly causal; length: longest first, as PR "
        "#2163 does, which is not strictly causal",
        Observed.TTT,
        choices=("stream", "length"),
    )
    ttt_batch_size: int = knob(
        64, "documents of a LoRA batch; changes scores with TTT_ORDER=length alone", Observed.TTT, low=1
    )
    ttt_streams: int = knob(
        8,
        "with TTT_ORDER=length, series of LoRA batches that hand A on, shared out among the ranks",
        Observed.TTT,
        low=1,
        high=4096,
    )
    ttt_chunk_size: int = knob(
        48, "targets of a document that are scored before each LoRA update; at most the context", Observed.TTT, low=1
    )
    ttt_short_doc_chunks: bool = knob(
        False,
        "smaller LoRA chunks early in a document: 8 targets up to place 256, 24 up to place 2000; with "
        "TTT_ORDER=length, throughout documents of that length",
        Observed.TTT,
    )
    ttt_eval_seq_len: int = knob(
        0, "context length in phased TTT, in tokens; 0: EVAL_SEQ_LEN", Observed.TTT, low=0, high=1 << 20
    )
    ttt_recompute_tokens: int = knob(
        0,
        "with TTT_ORDER=stream, context tokens that are computed again for each LoRA chunk; older ones have keys and "
        "values in a cache; 0: the whole context is computed again",
        Observed.TTT,
        low=0,
        high=1 << 20,
    )
    ttt_cuda_graphs: str = knob(
        "auto",
        "replay LoRA windows of few documents as CUDA graphs, which takes less time than launching their kernels; "
        "auto: 1 on CUDA",
        Observed.REFUSAL,
        choices=("auto", "0", "1"),
    )
    ttt_lora_rank: int = knob(128, "LoRA rank", Observed.TTT, low=1, high=4096)
    ttt_lora_alpha: float = knob(
        144.0, "LoRA alpha: the low-rank output is scaled by alpha/rank", Observed.TTT, low=1e-3
    )
    ttt_lora_lr: float = knob(1e-4, "AdamW's learning rate for LoRA", Observed.TTT, low=0)
    ttt_loraplus_lr_ratio: float = knob(
        1.0, "learning rate of LoRA's B as a multiple of A's, which is TTT_LORA_LR (LoRA+)", Observed.TTT, low=0
    )
    ttt_beta2: float = knob(0.99, "AdamW's beta2 for LoRA; beta1 is 0", Observed.TTT, low=0, high=0.99999)
    ttt_weight_decay: float = knob(0.5, "AdamW's decoupled weight decay for LoRA", Observed.TTT, low=0)
    ttt_grad_steps: int = knob(1, "LoRA updates on each chunk of a document", Observed.TTT, low=1, high=100)
    ttt_warm_start_a: bool = knob(
        True,
        "start LoRA's A in each phase from the mean of those that the previous phase left, instead of at random; B "
        "always starts at 0; with TTT_ORDER=length, from the previous batch's",
        Observed.TTT,
    )
    ttt_plain_weight: float = knob(
        0.0,
        "share of the model without test-time training in what is scored after it, at first: a mixture of both "
        "distributions, whose shares learn from scored targets; 0: none",
        Observed.TTT,
        low=0,
        high=0.99,
    )
    ttt_q_lora: bool = knob(True, "LoRA on the query projections", Observed.TTT)
    ttt_k_lora: bool = knob(True, "LoRA on the key projections", Observed.TTT)
    ttt_v_lora: bool = knob(True, "LoRA on the value projections", Observed.TTT)
    ttt_o_lora: bool = knob(True, "LoRA around attention, from its normalized input to its output", Observed.TTT)
    ttt_mlp_lora: bool = knob(True, "LoRA around the MLP, from its normalized input to its output", Observed.TTT)
    phased_ttt_prefix_docs: int = knob(
        3000,
        "with TTT_ORDER=length, or if it is set and PHASED_TTT_PREFIX_TOKENS is not: first documents from which the "
        "full model learns after their scoring; 0: none",
        Observed.TTT,
        low=0,
    )
    phased_ttt_prefix_tokens: int = knob(
        12_000_000,  # about as many as PR #2163's 3,000 longest documents hold: a quarter of the challenge's stream
        "with TTT_ORDER=stream, first tokens from which the full model learns after their scoring; 0: count documents",
        Observed.TTT,
        low=0,
    )
    phased_ttt_num_phases: int = knob(
        0,
        "number of trainings of the full model in phased TTT; with TTT_ORDER=stream, one whenever 1.5 times as much "
        "has been scored, the last at the end of its first tokens or documents; with TTT_ORDER=length, evenly spread "
        "over its first documents; 0: 21 in stream order, 4 in length order",
        Observed.TTT,
        low=0,
        high=1000,
    )
    global_ttt_chunk_tokens: int = knob(32768, "tokens of a full-model SGD step in phased TTT", Observed.TTT, low=1)
    global_ttt_lr: float = knob(
        1e-3, "learning rate of full-model SGD in phased TTT; decays to 0 as a cosine", Observed.TTT, low=0
    )
    global_ttt_momentum: float = knob(0.9, "momentum of full-model SGD in phased TTT", Observed.TTT, low=0, high=0.9999)
    global_ttt_epochs: int = knob(
        1, "epochs of full-model SGD in each phase of phased TTT", Observed.TTT, low=1, high=100
    )

    # Chunk test-time training: SGD of the full model
    ttt_chunk_tokens: int = knob(32768, "targets of a chunk of the validation stream in chunk TTT", Observed.TTT, low=1)
    ttt_epochs: int = knob(3, "SGD steps on each chunk in chunk TTT", Observed.TTT, low=1, high=100)
    ttt_lr: float = knob(
        0.002, "learning rate of SGD in chunk TTT; decays as TTT_DECAY_TOKENS says", Observed.TTT, low=0
    )
    ttt_decay_tokens: int = knob(
        0,
        "tokens over which TTT_LR decays to 0 as a cosine in chunk TTT; 0: no decay; -1: all tokens of the validation "
        "stream, as PR #549 does, which is not strictly causal",
        Observed.TTT,
        low=-1,
    )
    ttt_optimizer: str = knob(
        "sgd",
        "optimizer of the full model in chunk TTT; sgd: with TTT_MOMENTUM; adamw: without weight decay",
        Observed.TTT,
        choices=("sgd", "adamw"),
    )
    ttt_grad_clip: float = knob(
        1.0, "norm to which the gradient is clipped in chunk TTT; 0: no clipping", Observed.TTT, low=0
    )
    ttt_batch_seqs: int = knob(
        0,
        "sequences of TRAIN_SEQ_LEN tokens in a step of chunk TTT, over all ranks; 0: the whole chunk",
        Observed.TTT,
        low=0,
    )
    ttt_momentum: float = knob(0.9, "momentum of SGD in chunk TTT", Observed.TTT, low=0, high=0.9999)
    ttt_freeze_blocks: int = knob(0, "number of first layers frozen in chunk TTT; 0: none", Observed.TTT, low=0)

    @property
    def model(self) -> ModelConfig:
        """The settings that the artifact carries."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)})

    @property
    def dtype(self) -> torch.dtype:
        """Data type of activations and matrix products."""
        return getattr(torch, self.compute_dtype)

    @property
    def train_seconds(self) -> float:
        """Time limit of the training, in seconds, less what is reserved for calibration; infinite without a limit."""
        limit = self.max_wallclock_seconds
        return limit - max(0.0, self.gptq_reserve_seconds) if limit else math.inf

    @property
    def eval_context(self) -> int:
        """Context length of the evaluation, in tokens."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def ttt_context(self) -> int:
        """Context length of phased test-time training, in tokens."""
        return self.ttt_eval_seq_len or self.eval_context

    @property
    def lead_tokens(self) -> int:
        """First tokens of a cached window whose keys lack the tokens before it: by the SmearGate, the key offset."""
        return 2 if self.key_offset else 1

    @property
    def ttt_phases(self) -> int:
        """How often the full model learns in phased test-time training. In length order 4 times, as in PR #2163."""
        return self.phased_ttt_num_phases or (21 if self.ttt_order == "stream" else 4)

    @property
    def longest_context(self) -> int:
        """Tokens of the longest sequence that a model meets after training."""
        return max(self.eval_context, self.ttt_context if self.ttt_mode == "phased" else 0)

    @property
    def eval_step(self) -> int:
        """Targets that each sliding window adds."""
        return self.eval_stride or self.eval_context

    @property
    def eval_rows(self) -> int:
        """Sequences of an evaluation batch."""
        return max(1, self.val_batch_size // self.eval_context)

    @property
    def attn_grid(self) -> tuple[int, float]:
        """Bits and clip sigmas of attention's matrices; 0 sigmas: the grid covers the row's whole range."""
        sigmas = self.attn_clip_sigmas if QUANTIZER_TRAITS[self.quantizer].clips_by_sigmas else 0.0
        return self.attn_bits or self.matrix_bits, sigmas

    @property
    def mlp_grid(self) -> tuple[int, float]:
        """Bits and clip sigmas of the MLP's matrices; 0 sigmas: the grid covers the row's whole range."""
        sigmas = self.mlp_clip_sigmas if QUANTIZER_TRAITS[self.quantizer].clips_by_sigmas else 0.0
        return self.mlp_bits or self.matrix_bits, sigmas

    @property
    def takes_sensitivities(self) -> bool:
        """Calibration takes gradients."""
        return bool(self.matrix_steps or self.row_steps or self.guided_hessians or self.gptq_row_groups)

    @property
    def averages(self) -> tuple[bool, bool]:
        """Whether the EMA is kept, and whether the SWA is: those that are on and that WEIGHT_AVERAGE includes."""
        return (self.ema_decay > 0 and self.weight_average != "swa", self.swa_enabled and self.weight_average != "ema")

    @property
    def query_gains(self) -> tuple[float, ...]:
        """Initial gain of each layer's queries. Errors: ConfigError."""
        if not self.qk_gain_init_schedule:
            return (self.qk_gain_init,) * self.num_layers
        gains = listed_numbers(self.qk_gain_init_schedule)
        if len(gains) != self.num_layers or not all(0 <= gain < math.inf for gain in gains):
            allowed = f"must be a number of at least 0 for each of NUM_LAYERS={self.num_layers} layers, comma-separated"
            raise ConfigError("QK_GAIN_INIT_SCHEDULE", self.qk_gain_init_schedule, allowed)
        return gains

    @property
    def ahead_weights(self) -> tuple[float, ...]:
        """Initial weights of the losses of the second token ahead, the third, ... Errors: ConfigError."""
        weights = listed_numbers(self.mtp_weights) if self.mtp_weights else ()
        if not all(0 < weight <= 100 for weight in weights):
            allowed = "must be comma-separated numbers above 0 and at most 100, such as 0.5,0.25"
            raise ConfigError("MTP_WEIGHTS", self.mtp_weights, allowed)
        return weights

    @property
    def depth_cuts(self) -> tuple[float, ...]:
        """Fractions of training at which more layers start to train. Errors: ConfigError."""
        if self.progressive_depth_schedule in ("", "0"):
            return ()
        cuts = listed_numbers(self.progressive_depth_schedule)
        if not all(low < high for low, high in itertools.pairwise((0.0, *cuts, 1.0))):
            raise ConfigError(
                "PROGRESSIVE_DEPTH_SCHEDULE",
                self.progressive_depth_schedule,
                "must be 0, or comma-separated fractions between 0 and 1 in rising order, such as 0.08,0.25",
            )
        return cuts

    @property
    def context_schedule(self) -> tuple[tuple[int, float], ...]:
        """(context in tokens, fraction of the training at which it ends), in order. Errors: ConfigError."""
        if not self.train_seq_schedule:
            return ((self.train_seq_len, 1.0),)
        try:
            pairs = [part.split("@") for part in self.train_seq_schedule.split(",")]
            steps = tuple((int(context), float(end)) for context, end in pairs)
        except ValueError:
            steps = ()
        ends = (0.0, *(end for _, end in steps))
        sound = all(1 <= context <= self.train_seq_len for context, _ in steps)
        if not (sound and ends[-1] == 1.0 and all(low < high for low, high in itertools.pairwise(ends))):
            raise ConfigError(
                "TRAIN_SEQ_SCHEDULE",
                self.train_seq_schedule,
                f"must be tokens@fraction, comma-separated, with 1 to TRAIN_SEQ_LEN={self.train_seq_len} tokens and "
                "fractions that rise to 1, such as 1024@0.1,2048@1",
            )
        return steps

    @property
    def strictly_causal(self) -> bool:
        """Whether a score depends on the artifact and on earlier tokens alone, not even on where the stream ends."""
        if self.ttt_mode == "phased":
            return self.ttt_order == "stream"
        return self.ttt_mode == "none" or self.ttt_decay_tokens >= 0

    @property
    def resume_path(self) -> Path | None:
        """The checkpoint, or the folder with some, that RESUME names; None for auto and 0."""
        return None if self.resume in ("auto", "0") else Path(self.resume)

    @property
    def tokenizer_file(self) -> Path:
        return Path(self.tokenizer_path or Path(self.data_path) / TOKENIZER_FILE)


# The sections of --help and docs/knobs.md, each with its first knob; they are the comments within the classes above.
KNOB_SECTIONS = {
    "What to run, and where": "preset",
    "Data": "data_path",
    "Tokens and sequences": "tokenizer_sha256",
    "Width and depth": "num_layers",
    "Embeddings and logits": "tie_embeddings",
    "Attention": "rope_base",
    "Residual stream and recurrence": "skip_gates_enabled",
    "Length of the training, batches": "iterations",
    "Initial weights and the training loss": "tied_embed_init_std",
    "Optimizers": "matrix_lr",
    "Schedules": "lr_warmup_steps",
    "Quantization and the artifact": "quantizer",
    "Evaluation": "eval_seq_len",
    "Hints from repetition: the token that followed the same run of tokens before": "hint_enabled",
    "Test-time training: every target is scored before anything learns from it": "ttt_mode",
    "Phased test-time training: LoRA for each document": "ttt_order",
    "Chunk test-time training: SGD of the full model": "ttt_chunk_tokens",
}


def knob_sections() -> dict[str, list[dataclasses.Field]]:
    """The knobs by section."""
    sections: dict[str, list[dataclasses.Field]] = {title: [] for title in KNOB_SECTIONS}
    titles = {first: title for title, first in KNOB_SECTIONS.items()}
    title = ""
    for f in dataclasses.fields(Config):
        title = titles.get(f.name, title)
        sections[title].append(f)
    return sections


# Recipes are rows of this table; a row not named keeps the default above.
PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores; the sizes were chosen by measuring bits per byte after two minutes of training.
    "demo": dict(
        data_path="data/builtin_sp4096",
        vocab_size=4096,
        seed=42,
        num_layers=4,
        model_dim=256,
        num_heads=2,
        num_kv_heads=1,
        mlp_mult=3.0,
        train_seq_len=256,
        train_batch_tokens=3072,
        micro_batch_tokens=4096,
        iterations=100000,
        max_wallclock_seconds=110.0,
        warmup_steps=1,
        train_log_every=100,
        val_loss_every=0,
        val_batch_size=4096,
        warmdown_frac=0.6,
        matrix_lr=0.02,
        rope_dims=16,
        key_offset=True,
        smear_gate_enabled=True,
        smear_gate_type="channel",
        xsa_last_n=4,
        skip_gates_enabled=True,
        attn_out_gate_enabled=True,
        bigram_vocab_size=4096,
        bigram_dim=64,
        bigram_signs=True,
        prefix_loss_weight=0.25,
        normuon_beta2=0.95,
        scalar_lr=0.04,
        tied_embed_lr=0.01,
        muon_momentum=0.9,
        muon_momentum_warmup_steps=100,
        muon_wd=0.05,
        embed_wd=0.05,
        adam_wd=0.02,
        gptq_calibration_batches=2,
        fp16_elements=4096,
        quantizer="trellis",
        scale_grid=4,
        column_steps=1.0,
        matrix_steps=1.0,
        row_steps=0.8,
        std_steps=0.2,
        guided_hessians=True,
        gptq_row_groups=4,
        gptq_damp=0.003,
        compressor="pergroup",
        target_bytes=2_000_000,
        eval_stride=128,
        hint_enabled=True,
        hint_min_match=4,
        hint_chunk_tokens=2048,
    ),
    # The challenge's own baseline: 9 layers of 512, ReLU^2, no extras.
    "baseline": dict(leaky_relu_slope=0.0),
    # PR #2163 of openai/parameter-golf.
    "record": dict(
        vocab_size=8192,
        seed=42,
        num_layers=11,
        mlp_mult=4.0,
        train_seq_len=2048,
        train_batch_tokens=786432,
        micro_batch_tokens=98304,  # a rank's share on 8 GPUs, about 40 GB by an estimate
        rope_dims=16,
        qk_gain_init=5.0,
        ln_scale=True,
        xsa_last_n=11,
        skip_gates_enabled=True,
        sparse_attn_gate_enabled=True,
        smear_gate_enabled=True,
        num_loops=2,
        parallel_start_layer=8,
        neftune_alpha=5.0,
        z_loss_weight=1e-4,
        muon_momentum=0.97,
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_steps=1500,
        muon_coefficients="polar_express",
        muon_row_normalize=True,
        muon_gradient_dtype="bfloat16",
        muon_wd=0.095,
        matrix_lr=0.026,
        tied_embed_lr=0.03,
        embed_wd=0.085,
        scalar_lr=0.02,
        adam_wd=0.02,
        beta2=0.99,
        grad_clip_norm=0.3,
        warmdown_frac=0.85,
        min_lr=0.1,
        ema_decay=0.9965,
        embed_bits=7,
        gptq_calibration_batches=4,
        fp16_elements=4096,
        compressor="pergroup",
        quantizer="trellis",
        scale_grid=4,
        trellis_states=16,
        column_steps=1.0,
        matrix_steps=1.0,
        row_steps=0.9,
        std_steps=0.1,
        guided_hessians=True,
        gptq_row_groups=16,
        gptq_damp=0.003,
        target_bytes=16_000_000,
        gated_attn_quant_gate=True,
        ttt_mode="phased",
    ),
    # PR #1325 on the stack of PR #549.
    "poly5": dict(
        num_layers=11,
        mlp_mult=3.0,
        train_seq_len=2048,
        train_batch_tokens=786432,
        iterations=9000,
        xsa_last_n=4,
        rope_dims=16,
        ln_scale=True,
        smear_gate_enabled=True,
        smear_gate_type="channel",
        bigram_vocab_size=1536,
        bigram_dim=128,
        ve_dim=128,
        ve_layers="9,10",
        softcap_type="poly",
        focal_enabled=True,
        focal_gamma=1.0,
        z_loss_weight=1e-4,
        progressive_depth_schedule="0.08,0.25",
        muon_momentum=0.99,
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_steps=1500,
        muon_wd=0.04,
        matrix_lr=0.025,
        scalar_lr=0.025,
        tied_embed_lr=0.035,
        embed_wd=0.04,
        adam_wd=0.04,
        grad_clip_norm=0.3,
        warmdown_iters=3500,
        ema_decay=0.997,
        swa_enabled=True,
        swa_every=50,
        weight_average="both",
        late_qat_threshold=0.15,
        quantizer="gptq_lite",
        rvq_enabled=True,
        eval_stride=16,
        ttt_mode="chunk",
        ttt_decay_tokens=62_000_000,  # about the challenge's validation set in this vocabulary: a constant, not a look
    ),
}
# `record`, and what the laboratory and others found beyond it (docs/lab-notes.md). It changes with the evidence.
PRESETS["frontier"] = PRESETS["record"] | dict(
    normuon_beta2=0.95,
    hint_enabled=True,
    ttt_chunk_size=16,
    ttt_recompute_tokens=48,
    ttt_plain_weight=0.25,
    ttt_lora_lr=2.5e-5,  # of A: a quarter of the peer's for both; B's is 2.5 times the peer's
    ttt_loraplus_lr_ratio=10.0,
)
# ORIGINAL=1 lays these over a preset: where the public script differs, and why ours does (docs/presets.md).
ORIGINALS: dict[str, dict[str, Any]] = {
    # PR #2163 and the scripts that it grew from, PRs #1787, #1797 and #1855.
    "record": dict(
        data_order="stream",
        z_loss_weight=0.0,
        embed_dtype="bfloat16",
        muon_momentum_type="sgd",
        ema_ramp=False,
        gptq_reserve_seconds=0.5,
        gptq_calibration_batches=16,
        quantizer="uniform",
        fp16_elements=65_536,
        scale_grid=0,
        column_steps=0.0,
        matrix_steps=0.0,
        row_steps=0.0,
        std_steps=1.0,
        guided_hessians=False,
        gptq_row_groups=0,
        gptq_damp=0.01,
        target_bytes=0,
        lqer_enabled=True,
        lqer_select="norm",
        lqer_asym_enabled="1",
        lqer_fit="svd",
        ttt_order="length",
    ),
    # PR #1325 and the stack of PR #549.
    "poly5": dict(
        data_order="stream",
        rope_base=10000 * 2 ** (16 / 14),  # of a train length of 1024 that the script takes for granted
        ve_init="orthogonal",
        focal_norm="batch",
        progressive_depth_by="steps",
        progressive_depth_decay=True,
        embed_dtype="bfloat16",
        muon_momentum_type="sgd",
        muon_gradient_dtype="bfloat16",
        ema_ramp=False,
        weight_average="ema",
        late_qat_threshold=0.0,
        scale_grid=0,
        ttt_decay_tokens=-1,
    ),
}
# Those that would take days on CPUs.
GPU_PRESETS = ("record", "poly5", "frontier")
# What other scripts call the same thing, so that public commands run here as they stand: kinds of scripts, and in each
# row names and what they set. `KNOB` takes the value as it is, `KNOB*2` twice the value, `A+B` sets both, B where it is
# not set. `KNOB:off:on` is a switch: its 0 sets the value that is off, its 1 the usual one where the preset's is off,
# with `+OTHER=value` beside it; it also stands for USE_, ENABLE_, _ENABLED, and reversed for NO_, SKIP_ and DISABLE_.
# `KNOB{a=x,*=}` makes x of a and keeps any other value; `=a|b` are values that mean what happens here anyway, `=*` says
# that no value changes a score, and `@name` is a method of Command. A knob's own name on the left is for what its 0
# turns off, as BIGRAM_DIM=0 does.
ALIASES = {
    "optimizers and schedules": """
MUON_WEIGHT_DECAY WEIGHT_DECAY_MUON > MUON_WD
WEIGHT_DECAY > MUON_WD+ADAM_WD+EMBED_WD
ADAM_WEIGHT_DECAY WEIGHT_DECAY_ADAM > ADAM_WD
ADAM_BETA2 > BETA2
MUON_EQ_R MUON_ROW_NORM > MUON_ROW_NORMALIZE:0:1
POLAR_EXPRESS > MUON_COEFFICIENTS:classic:polar_express
MATRIX_OPTIMIZER > =muon
WARMDOWN_FRACTION > WARMDOWN_FRAC
WARMDOWN_STEPS > WARMDOWN_ITERS
COSINE_WARMDOWN LR_COSINE_WARMDOWN > WARMDOWN_SHAPE:linear:cosine
LR_WARMUP_ITERS WARMUP_ITERS > LR_WARMUP_STEPS
MOMENTUM_CYCLE_PERIOD > MUON_MOMENTUM_CYCLE
MOMENTUM_MIN > MUON_MOMENTUM_MIN
MOMENTUM_MAX > MUON_MOMENTUM_MAX
MOMENTUM_CYCLIC > MUON_MOMENTUM_CYCLE:0:50
MAX_STEPS > ITERATIONS
MIN_LR_RATIO > MIN_LR
SEQ_LEN > TRAIN_SEQ_LEN
GRAD_ACCUM_STEPS > @micro_steps
TRAIN_MICROBATCH_TOKENS > MICRO_BATCH_TOKENS
TRAIN_SEQ_SCHEDULE_MODE > =wallclock
ROPE_TRAIN_SEQ_LEN > =TRAIN_SEQ_LEN
SWA > SWA_ENABLED:0:1
SWA_START_FRAC > SWA_START
SWA_INTERVAL SWA_FREQ > SWA_EVERY
SWA_EVERY > SWA_ENABLED:0:1
SWA_FRAC > @swa_share
EMA > EMA_DECAY:0:0.997
EMA_START_STEP EMA_START_FRAC EMA_START_FRACTION > EMA_START
LAWA_ENABLED LAWA_EMA_DECAY > @lawa
LATE_QAT QAT > LATE_QAT_THRESHOLD:0:0.15 QAT_START:0:
QAT_START_STEP QAT_START_FRAC QAT_START_FRACTION LATE_QAT_FRAC > @qat_start
QAT_THRESHOLD > LATE_QAT_THRESHOLD
""",
    "models": """
D_FF MLP_HIDDEN > @mlp_width
LEAKY_RELU > LEAKY_RELU_SLOPE{1=0.5,*=}
LEAKY_RELU2 > LEAKY_RELU_SLOPE:0:0.5
MLP_LEAKY_SLOPE LEAKY_SLOPE NEGATIVE_SLOPE MLP_LEAKY_RELU_SLOPE > LEAKY_RELU_SLOPE
RELU2 > LEAKY_RELU_SLOPE{1=0,0=}
ACTIVATION MLP_ACT MLP_ACTIVATION > @activation
PARALLEL_RESIDUAL_START > PARALLEL_START_LAYER
PARALLEL_RESIDUAL > PARALLEL_START_LAYER:-1:7
SMEAR_GATE SMEARGATE SMEAR > SMEAR_GATE_ENABLED:0:1+SMEAR_GATE_TYPE=channel
SMEAR_GATE_WIDTH GATE_ATTN_WIDTH GATE_WIDTH > GATE_WINDOW
BIGRAM_HASH BIGRAM > BIGRAM_VOCAB_SIZE:0:2048
BIGRAM_BUCKETS BIGRAM_HASH_BUCKETS BIGRAM_TABLE_SIZE BIGRAM_VOCAB > BIGRAM_VOCAB_SIZE
BIGRAM_EMBED_DIM BIGRAM_HASH_DIM > BIGRAM_DIM
BIGRAM_DIM > BIGRAM_VOCAB_SIZE:0:0
VE VALUE_EMBED > VE_DIM:0:128
VALUE_EMBED_DIM > VE_DIM
VE_LAST_N > @value_layers
PARTIAL_ROPE_DIMS > ROPE_DIMS
ROPE_FRAC ROPE_FRACTION > @rope_share
XSA > XSA_LAST_N:0:4
XSA_LAYERS > @last_layers
WINDOW_SIZE ATTN_WINDOW ATTN_WINDOW_SIZE WINDOW_ATTENTION_SIZE > WINDOW_ATTN_SIZE{-1=0,*=}
GATED_ATTENTION GATED_ATTN > GATED_ATTN_ENABLED:0:1
GATE_ATTN_OUT > ATTN_OUT_GATE_ENABLED:0:1
VRL VALUE_RESIDUAL > VALUE_RESIDUAL:0:1
UNET_SKIPS SMEAR_GATE_BOS_FIX ORTHO_INIT USE_ORTHO_INIT ORTHOGONAL_INIT > =1
UNIQUE_LAYERS > @unique_layers
CORE_START CORE_END NUM_PASSES NUM_REPEATS NUM_UNIQUE_BLOCKS > @passes
NUM_UNIQUE_BLOCKS > =NUM_LAYERS
NUM_BLOCKS > NUM_LAYERS
NUM_EXPERTS NUM_ITERS NUM_ITERATIONS EVAL_PASSES NUM_RECURRENCES > =1
EMBED_DIM EMBEDDING_DIM > =MODEL_DIM
MODEL_TYPE MODEL_FAMILY CANDIDATE_IMPL > =gpt|transformer|dense|autoregressive_gpt
RECUR_ENABLED DEPTH_RECURRENCE DEPTH_RECUR_LAYERS RECURRENCE_LAYERS > @recurring
ENABLE_LOOPING_AT_STEP > RECUR_START_STEP
PROGRESSIVE_DEPTH > PROGRESSIVE_DEPTH_SCHEDULE::0.08,0.25
NUM_KV_HEADS > @key_heads
""",
    "quantization": """
QUANT_BITS WEIGHT_BITS WEIGHT_QUANTIZATION_BITS QAT_BITS LOWBIT_BITS GPTQ_BITS INTX_BITS > MATRIX_BITS
QUANT_MAX CLIP_RANGE QUANT_LEVELS > MATRIX_BITS{7=4,15=5,31=6,63=7,127=8}
INT6_QUANT INT6 > MATRIX_BITS:8:6
INT5_MLP > MLP_BITS:0:5
MLP_QUANT_BITS > MLP_BITS
EMBED_QUANT_BITS EMBED_QUANTIZATION_BITS > EMBED_BITS
FP16_EMBED FP16_EMBED_EXPORT FP16_EMBED_PASSTHROUGH INT8_KEEP_TOK_EMB_FP16 > EMBED_BITS{0=,1=16}
PRUNE_FRAC PRUNE_FRACTION > PRUNE_PCT
GPTQ FULL_GPTQ GPTQ_CALIBRATION_BATCHES > QUANTIZER:gptq_lite:uniform
GPTQ_LITE > QUANTIZER:uniform:gptq_lite
GPTQ_CALIB_BATCHES > GPTQ_CALIBRATION_BATCHES
GPTQ_RESERVE_MS > GPTQ_RESERVE_SECONDS*0.001
GPTQ_BLOCK_SIZE > =128
GPTQ_CALIB_SOURCE > =train
GPTQ_ALL_REDUCE > =1
AWQ > COLUMN_STEPS:0:0.5
AWQ_ALPHA > COLUMN_STEPS
AWQ_LITE > AWQ_GROUPS:0:1
AWQ_LITE_GROUP_TOP_K > AWQ_GROUPS
AWQ_LITE_GROUP_SIZE > =64
AWQ_LITE_BITS > =8
LQER_GROUP_SIZE > LQER_ASYM_GROUP
LQER_RANK LQER_TOP_K > LQER_ENABLED:0:1
TARGET_MB > @megabytes
TARGET_ARTIFACT_BYTES > TARGET_BYTES
SUBMISSION_SIZE_CAP_BYTES > ARTIFACT_LIMIT_BYTES
COMPRESS_METHOD COMPRESSION EXPORT_CODEC SERIAL_COMPRESSOR MODEL_COMPRESSOR > COMPRESSOR
RANS > COMPRESSOR{0=,1=pergroup}
ZSTD > COMPRESSOR{0=,1=zstd}
COMPRESSION_LEVEL ZSTD_LEVEL > =9|11|22
MATRIX_CLIP_SIGMAS > @both_sigmas
""",
    "evaluation and test-time training": """
SLIDING_WINDOW SLIDING_EVAL EVAL_SLIDING SLIDING_WINDOW_EVAL SLIDING > EVAL_STRIDE:0:64
SLIDING_EVAL_STRIDE SLIDING_STRIDE SLIDING_WINDOW_STRIDE VAL_STRIDE > EVAL_STRIDE
EVAL_BATCH_SEQS SLIDING_BATCH_SEQS SLIDING_BATCH_SIZE > @eval_batch
EVAL_CTX > EVAL_SEQ_LEN
EVAL_TEMPERATURE TTT_TEMPERATURE > TEMPERATURE
EVAL_ONLY TTT_EVAL_ONLY > MODE:all:eval
EVAL_INCLUDE_TAIL TTT_UPDATE_EVERY DOC_ISOLATED_EVAL EMA_EVAL_AFTER_APPLY FINAL_ROUNDTRIP_EVAL > =1
VAL_MAX_TOKENS VAL_TOKENS_LIMIT MAX_VAL_TOKENS MAX_EVAL_TOKENS EVAL_MAX_TOKENS > VAL_TOKEN_LIMIT
NGRAM_TILT > HINT_ENABLED:0:1
TOKEN_ORDER > HINT_MIN_MATCH
TTT TTT_EVAL PHASED_TTT TTT_LORA TTT_USE_LORA > @ttt_mode
TTT_EPOCHS > TTT_MODE:none:chunk
TTT_OPTIMIZER TTT_ADAMW TTT_USE_ADAMW > @ttt_optimizer_name
GLOBAL_TTT_OPTIMIZER > =sgd
TTT_COSINE_DECAY TTT_COSINE > TTT_DECAY_TOKENS{0=0,1=-1}
TTT_EPOCHS_PER_CHUNK > TTT_EPOCHS
TTT_PARAM_MODE > =full|all
TTT_MASK > TTT_Q_LORA{no_qv=0,none=,all=} TTT_V_LORA{no_qv=0,none=,all=}
TTT_NO_QV_MASK > TTT_Q_LORA{1=0} TTT_V_LORA{1=0}
TTT_LOCAL_LR_MULT > @lora_rate
TTT_SHORT_SCORE_FIRST > TTT_SHORT_DOC_CHUNKS:0:1
TTT_SHORT_SCORE_FIRST_STEPS > =256:8,2000:24
TTT_SHORT_DOC_LEN > =2000
TTT_SHORT_CHUNK_SIZE > =24
GLOBAL_TTT_EPOCHS > PHASED_TTT_PREFIX_DOCS:0:0
""",
    "runs": """
DATA_DIR DATA_PATH TOKENIZER_PATH > @data
COMPILE TORCH_COMPILE COMPILE_MODEL > COMPILE{0=0,1=,auto=}
COMPILE_MODE > =default
TRAIN_SHARDS > TRAIN_SHARD_LIMIT
CHECKPOINT_EVERY CHURN_LOG_EVERY EXPECTED_TRAIN_SHARDS LOGIT_CHUNK_TOKENS MLX_MAX_MICROBATCH_TOKENS SDP_BACKEND > =*
COMPILE_FULLGRAPH FIND_UNUSED_PARAMETERS SKIP_PRE_TTT_EVALS SKIP_PRE_QUANT_FINAL_EVAL SKIP_QUANTIZED_EVAL FUSED_MLP \
USE_FUSED_QKV FAST_COMPILE RECOMPILE_ON_LATE_QAT > =0|1
""",
}
# What public scripts have and this one has not: patterns of their variables, and the knobs that come nearest. A row
# that begins with `!` breaks a rule of the challenge: what matches all of its second pattern is refused where it is on.
# One that begins with `~` asks for another model than a GPT of dense layers: refused too, as a warning among many lines
# would cost its user a training of something else.
FOREIGN = """
!PRE_?QUANT_TTT|SDTTT @ .*TTT(_ENABLED|_EPOCHS|_LR)? > learns from validation text before it is scored
!(DEEP_)?SLOT(_|$) @ .*SLOT(_ENABLED|_STEPS|_LR)? > trains vectors on the very targets that they score
!PAID_PREFIX|TRAIN_ON_VAL|TRAIN_ORACLE|GPTQ_CALIB_SOURCE @ .* > trains on validation text
!(WITHIN|WORD|AGREE)_ @ .*BOOST > opens a gate by looking at the target
!PPM @ PPM(_MIX|_NATIVE)?(_ENABLED|_ORDER)? > mixes by the target's own probability
!NGRAM_(?!TILT|HINT)|KNN|CTW|PHRASE @ (NGRAM|KNN|CTW)(_EVAL|_MIX|_CACHE|_TWO_PASS)?(_ENABLED|_ORDER|_LAMBDA|_WEIGHT)? \
> mixes in a cache whose probabilities do not sum to 1
!.*(MIXER|HEDGE) @ (USE_)?(HEDGE_)?(MIXER|HEDGE)(_ENABLED|_ETA)? > mixes in experts whose probabilities do not \
sum to 1, such as exp(-entropy) for every token
~(USE_|ENABLE_|NUM_|N_)?(MOE|EXPERTS)(_|$) > a mixture of experts
~(USE_|ENABLE_|NUM_)?(SSM|S4|MAMBA2?|HYMBA|RWKV|GDN|DELTA_?NET|RETNET|HYENA|X?LSTM|GRU|(PARALLEL_)?TRN|.*RESONATOR)\
(_|$) > recurrent or state-space layers
~(USE_|ENABLE_|NUM_)?(CRAWLER|FLAT_LAYERS) > layers that crawl: shared ones beside others
~(NUM_|N_)?(UNIQUE_BLOCKS|SHARED_(BLOCKS|LAYERS)|PASSES|ITER(ATION)?S|RECURRENCES|REPEATS|PRELUDE|CODA|PHYSICAL_LAYERS\
)$|EVAL_PASSES$|K_ITERS$|RECURRENCE_STEPS$|LOOP_(CORE|REPEAT|INJECT)|USE_PASS_READOUT$ > one stack of layers repeated \
as a whole; here NUM_LOOPS repeats LOOP_START to LOOP_END
~(.*_)?JEPA(_|$) > a prediction of latents (JEPA)
~DIFFUSION > text diffusion
~(.*_)?H_?NET(_|$)|OUTER_LAYERS$|CHUNK_DIVISOR$ > learned chunks of bytes (H-Net)
~(USE_|ENABLE_)?(BITNET|TERNARY|BINARY)_(?!.*(PATH|FILE)) > weights of two or three values from the first step
~(USE_)?(RANDOM|LEARNED|ADALORA)_(LINEAR|ADAPTERS?|MLP|MAPS?|INIT_RANK|TARGET)|ADAPTER_RANK$|FROZEN_ > adapters on \
weights that are not trained
~(MLP|BTT|TT|MONARCH|EMBED|QKV?|OUT)_RANK$|MLP_GROUPS$ > matrices that are products of smaller ones
~(USE_)?(PATTENTION|TVERSKY|KAN|WAVELET|RLMA|D?TPA|MLA|DIFF_ATTN|ATTN_RES)(_|$) > another kind of layer
~EMBED(DING)?_DIM$ > an embedding of another width than the model's
~(MODEL_(TYPE|FAMILY)|ARCH_MODE|ARCHITECTURE|CANDIDATE_IMPL)$ > another architecture
NGRAM|TOKEN_|CUBRIC > HINT_ENABLED
VE_|.*VALUE_EMB > VE_DIM VE_LAYERS
LAWA|EMA|SWA|.*POLYAK > EMA_DECAY SWA_ENABLED WEIGHT_AVERAGE
.*(LOOP|RECUR|PASSES|REPEAT|CRAWLER|UNIQUE|NUM_ITER|SHARED_(BL|LA)|LAYER_SCHED) > NUM_LOOPS LOOP_START LOOP_END
.*TTT > TTT_MODE
.*MTP > MTP_WEIGHTS
.*(QAT|CROWN) > LATE_QAT_THRESHOLD
PRUNE|TARGET_ > TARGET_BYTES
.*(COMPRESS|CODEC|ZSTD|RANS) > COMPRESSOR
.*(QUANT|INT\\d|BITS|GPTQ|AWQ|TERNARY|BITNET|FP16|HESSIAN|OPTROT|HADAMARD) > QUANTIZER MATRIX_BITS
(FINAL_)?(VAL_|EVAL|SLIDING|DOC_ISO|STRIDE) > EVAL_SEQ_LEN EVAL_STRIDE
.*(TRIGRAM|BIGRAM|HASH) > BIGRAM_VOCAB_SIZE
.*(WINDOW|LOCAL)_?ATT|.*ATTN?(ENTION)?_WINDOW > WINDOW_ATTN_SIZE WINDOW_ATTN_LAYERS
.*(GATE|ATTN|XSA|WINDOW) > XSA_LAST_N SPARSE_ATTN_GATE_ENABLED
.*(CHECKPOINT|SAVE) > CHECKPOINT_EVERY_SECONDS
.*(CURRICULUM|SEQ_(LEN|SCHED)|BATCH_SCHED) > TRAIN_SEQ_SCHEDULE
.*(LR$|LR_|LEARNING) > MATRIX_LR SCALAR_LR TIED_EMBED_LR
MUON|MOMENTUM > MUON_MOMENTUM
"""
# Words of variables that set up a training, beside those of knobs; words and beginnings that say nothing.
TRAINING_WORDS = (
    "ABLATION ACTIVATION ADALORA ADAMW ADAPTER ADAPTIVE ARCH AUX BACKBONE BACKOUT BATCHES BITNET BLOCKS BOOST "
    "BUCKETS CAL CANON COMP COMPLEMENT CORR CRAWLER CROWN CTW CUBRIC CURRICULUM DIFFUSION DISTILL DROPOUT EMBEDDING "
    "EMBEDS ENTROPY EPOCH ETA ETLB EXPERTS FP16 FRACTION FREQ HEDGE HESSIAN HNET HYMBA INT4 INT5 INT6 INT8 ITERS "
    "JEPA KNN LAMBDA LAWA LEARNED LEARNING LOOPS MICROBATCH MIXER MIXED NGRAM NOISE NUMEL OPTIMIZER OPTROT ORTHO "
    "PAID PASSES PATTENTION PHRASE POLAR PPM PREQUANT PRUNE PRUNING QUANT QUANTIZED RAMP RANDOM RANS RATIO READOUT "
    "RECUR RECURRENCE REFINER REGIME RELU2 SCALES SCALING SDTTT SEQS SHARDS SHARD SHARED SLIDING SLOT SPINQUANT SSM "
    "SWIGLU TAU TEMP TERNARY TILT TRAINING TRIGRAM TRN TVERSKY TWEO PROFILE IMPL UNIQUE UNTIE VALUE VARIANT "
    "VRL WAVELET WITHIN LABEL RESIDUAL SHRINKAGE STORAGE WORLD"
)
PLAIN_WORDS = (
    "ALLOW AHEAD BASE BYTES CACHE COMPILE CPU DATA DEVICE DIR FIRST ID LIMIT MODE PATH READ RUN SELECT "
    "SHA256 SIZE THREADS TOKEN TOKENIZER TYPE KEY VIRTUAL"
)
ORDINARY = (
    r"_|RANK$|WORLD_SIZE$|"
    r"(TORCH|PYTORCH|CUDA|CLOUD|NCCL|OMP|MKL|NUMEXPR|OPENBLAS|TRITON|NV|PYTHON|PYTEST|HF_|HUGGING|TRANSF|"
    r"TOKENIZERS|WANDB|AWS|AZURE|GOOGLE|GCP|GIT|CI_|SLURM|PMI|OMPI|KUBE|RUNPOD|VAST|MODAL|DOCKER|SSH|XDG|LC_|LD_|"
    r"VSCODE|CONDA|MAMBA_(EXE|ROOT|NO)|JUPYTER|TF_|JAX|XLA|MASTER|LOCAL_|GROUP_|ROLE_|NODE_|OTEL|DD_|SAGEMAKER|UV_|"
    r"PIP_|NPM_|GTK|QT_)|"
    r".*_(PATH|FILE|HOME|URL|HOST|PORT|KEY|CERTS?)$"
)


def parse_value(name: str, kind: str, text: str, row: Mapping[str, Any]) -> Any:
    """The text of a variable as a value of its type. Errors: ConfigError, also for what the knob does not allow."""
    kinds = {"int": "an integer", "float": "a finite number", "bool": "0 or 1"}
    try:
        if kind == "bool":
            value = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        else:
            value = {"int": int, "float": float, "str": str}[kind](text)
        if kind == "float" and not math.isfinite(value):
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(name, text, f"must be {kinds[kind]}") from None
    check_allowed(name, value, row)
    return value


def check_allowed(name: str, value: Any, row: Mapping[str, Any]) -> None:
    """Refuses a value of the right type that the knob does not allow. Errors: ConfigError."""
    low, high = row["low"], row["high"]
    if row["choices"] and value not in row["choices"]:
        raise ConfigError(name, value, "must be one of " + ", ".join(row["choices"]))
    if low is not None and value < low:
        raise ConfigError(name, value, f"must be at least {low}" if high is None else f"must be from {low} to {high}")
    if high is not None and value > high:
        raise ConfigError(name, value, f"must be at most {high}" if low is None else f"must be from {low} to {high}")


def is_off(text: str) -> bool:
    """Whether a variable's text says that something is off, or as everywhere."""
    text = text.strip().lower()
    return text in ("off", "no", "none", "false", "standard", "default", "-1") or bool(re.fullmatch(r"-?0*\.?0+", text))


def switch_of(name: str) -> tuple[str, bool]:
    """The feature that a variable switches, and whether its 1 turns it off: SKIP_GPTQ is (GPTQ, True)."""
    match = re.fullmatch("(USE_|ENABLE_|NO_|SKIP_|DISABLE_)?(.+?)(_ENABLED)?", name)
    prefix, feature = match.group(1, 2) if match else ("", name)
    return feature, prefix in ("NO_", "SKIP_", "DISABLE_")


class Command:
    """The variables of a command: texts of knobs, once the names of other scripts are translated, and remarks."""

    def __init__(self, environment: Mapping[str, str], preset: str):
        """Errors: ConfigError for variables that contradict each other."""
        self.given = {name: text for name, text in environment.items() if text != ""}
        self.fields = {f.name.upper(): f for f in dataclasses.fields(Config)}
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Config)}
        self.base = {**defaults, **PRESETS[preset], "preset": preset}
        self.texts = {name: text for name, text in self.given.items() if name in self.fields and name != "PRESET"}
        self.sources: dict[str, str] = {}  # knob: the variable that it was translated from
        self.understood = set(self.texts) | {"PRESET"}
        self.remarks: list[str] = []
        rows = [row.split(" > ") for text in ALIASES.values() for row in text.strip().splitlines()]
        for names, meanings in sorted(rows, key=lambda row: ":" in row[1]):  # switches last: what is off is off
            known, switches = names.split(), re.search(":|{0=|ttt_mode", meanings)
            for name, text in self.given.items():
                own = name in self.fields
                feature = switch_of(name)[0] if switches and not own else name
                applies = feature in known and (not own or meanings[0] == "@" or is_off(text))
                if applies and all([self.translate(name, meaning) for meaning in meanings.split()]):
                    self.understood.add(name)

    def value(self, name: str, text: str | None = None) -> Any:
        """A knob's value by this text, else by the command, else by the preset. Errors: ConfigError."""
        knob = name.upper()
        text = self.texts.get(knob) if text is None else text
        if text is None:
            return self.base[knob.lower()]
        try:
            return parse_value(knob, str(self.fields[knob].type), text, self.fields[knob].metadata)
        except ConfigError as error:
            raise self.error(knob, text, str(error.parts[2]) + VALUE_HINTS.get(knob, "")) from None

    def error(self, knob: str, value: object, allowed: str) -> ConfigError:
        """An error about a knob that names the variable that set it."""
        source = self.sources.get(knob, knob)
        if source == knob:
            return ConfigError(knob, value, allowed)
        return ConfigError(source, self.given[source], f"sets {knob}={value}, which {allowed}")

    def put(self, knob: str, text: str, source: str, yields: bool = False) -> None:
        """Sets a knob as another variable says. Errors: ConfigError where the command says otherwise elsewhere."""
        before = self.sources.get(knob, knob)
        if knob in self.texts and before != source:
            if yields:
                return
            if self.value(knob, text) != self.value(knob):
                allowed = f"means {knob}={text}, and {before}={self.given[before]} says otherwise: set one of them"
                raise ConfigError(source, self.given[source], allowed)
        self.sources[knob], self.texts[knob] = source, text
        self.value(knob)
        self.remarks.append(f"{source}={self.given[source]} is read as {knob}={text}")

    def translate(self, name: str, meaning: str) -> bool:
        """Applies what a row of ALIASES says that a variable means; False: its value has no equal here."""
        text = self.given[name]
        knob, *more = re.split(r"([@={:*+])", meaning.rstrip("}"), maxsplit=1)
        sign, rest = more or ("", "")
        if sign == "=":
            return (
                text == str(self.value(rest)) if rest in self.fields else rest == "*" or text.lower() in rest.split("|")
            )
        if sign == "@":
            return getattr(self, rest)(name, text)
        if sign == ":":
            return self.switch(name, knob, *rest.split("+"))
        if sign == "{":
            table = dict(pair.split("=") for pair in rest.split(","))
            if text.lower() not in table and "*" not in table:
                return is_off(text)
            text = table.get(text.lower(), text)
        if sign == "*":
            text = f"{self.number(name) * float(rest):g}"
        if text:
            self.put(knob, text, name)
        for other in rest.split("+") if sign == "+" else ():
            self.put(other, text, name, yields=True)
        return True

    def switch(self, name: str, knob: str, values: str, *others: str) -> bool:
        """A switch: its off turns off what the preset or a knob has on, its on turns on what they have off."""
        off, on = values.split(":")
        if name in self.fields:
            self.texts.pop(name)  # BIGRAM_DIM=0
        active = self.value(knob) != self.value(knob, off)
        late = knob == "LATE_QAT_THRESHOLD"
        if is_off(self.given[name]) == switch_of(name)[1]:  # on
            active = active or not on or (late and self.value("qat_start") > 0)
            for other in () if active else (f"{knob}={on}", *others):
                feature, _, text = other.partition("=")
                self.put(feature, text, name, yields=other in others)
        elif active and not (late and knob in self.texts and "LATE" not in name):  # which is QAT from the start
            if knob in self.texts and self.fields[knob].type not in ("bool", "str"):
                source = self.sources.get(knob, knob)
                self.remarks.append(f"{source}={self.given[source]} has no effect with {name}={self.given[name]}")
                del self.texts[knob]
            self.put(knob, off, name)
        return True

    def number(self, name: str) -> float:
        """A variable's value as a number. Errors: ConfigError for another text, and below 0."""
        return parse_value(name, "float", self.given[name], dict(low=0, high=None, choices=None))

    def mlp_width(self, name: str, text: str) -> bool:
        """MLP_HIDDEN, the hidden width itself; 0: MLP_MULT says."""
        width, dim = int(self.number(name)), self.value("model_dim")
        ratio = width / dim
        if width:
            self.put("MLP_MULT", repr(ratio if int(ratio * dim) == width else math.nextafter(ratio, math.inf)), name)
        return True

    def key_heads(self, name: str, text: str) -> bool:
        """NUM_KV_HEADS=0: as many as there are query heads."""
        if is_off(text):
            self.texts[name] = str(self.value("num_heads"))
        return True

    def value_layers(self, name: str, text: str) -> bool:
        """VE_LAST_N, a number of last layers."""
        depth = self.value("num_layers")
        self.put("VE_LAYERS", ",".join(map(str, range(max(0, depth - int(self.number(name))), depth))), name)
        return True

    def rope_share(self, name: str, text: str) -> bool:
        """ROPE_FRAC, the share of a head's dimensions with rotary embedding."""
        dims = int(self.value("model_dim") // self.value("num_heads") * self.number(name)) // 2 * 2
        self.put("ROPE_DIMS", str(max(dims, 2)), name)
        return True

    def unique_layers(self, name: str, text: str) -> bool:
        """UNIQUE_LAYERS in turn, or where they do not divide NUM_LAYERS, the last one for all that are missing."""
        unique, depth = int(self.number(name)), self.value("num_layers")
        if unique and depth % unique == 0:
            self.put("NUM_UNIQUE_LAYERS", str(unique), name)
        elif 0 < unique < depth:
            last, loops = str(unique - 1), str(depth - unique)
            self.texts.pop("NUM_LAYERS", None)
            values = dict(NUM_LAYERS=text, NUM_LOOPS=loops, LOOP_START=last, LOOP_END=last, ENABLE_LOOPING_AT="0")
            for knob, value in values.items():
                self.put(knob, value, name)
        return unique <= depth

    def lawa(self, name: str, text: str) -> bool:
        """LAWA with a decay is an EMA."""
        if name == "LAWA_EMA_DECAY" and not is_off(self.given.get("LAWA_ENABLED", "1")):
            self.put("EMA_DECAY", text, name)
        return "LAWA_EMA_DECAY" in self.given

    def swa_share(self, name: str, text: str) -> bool:
        """SWA_FRAC, which is SWA_START and turns SWA on."""
        self.put("SWA_START", text, name)
        self.put("SWA_ENABLED", "0" if is_off(text) else "1", name, yields=True)
        return True

    def qat_start(self, name: str, text: str) -> bool:
        """The step or share of the training from which it fake-quantizes; LATE_QAT_FRAC is the share after that."""
        start = self.number(name)
        start = 1 - start if name == "LATE_QAT_FRAC" and start else start
        if name.endswith("STEP") or 0 < start < 1:
            self.put("QAT_START", f"{start:g}", name)
        elif start:
            self.put("LATE_QAT_THRESHOLD", "0", name, yields=True)
        return True

    def passes(self, name: str, text: str) -> bool:
        """NUM_PASSES or NUM_REPEATS of all layers of NUM_UNIQUE_BLOCKS, or of layers CORE_START to CORE_END - 1."""
        given = self.given
        unique = given.get("NUM_UNIQUE_BLOCKS", given.get("NUM_UNIQUE_LAYERS", ""))
        core = "CORE_START" in given and "CORE_END" in given
        count = "NUM_PASSES" if "NUM_PASSES" in given else "NUM_REPEATS"
        if count not in given or not (core or unique) or ("NUM_LAYERS" in given and not core):
            return False
        if name == count:
            first, end = ("CORE_START", "CORE_END") if core else ("", "NUM_UNIQUE_BLOCKS")
            begin = int(self.number(first)) if core else 0
            last = int(self.number(end if end in given else "NUM_UNIQUE_LAYERS")) - 1
            if not core:
                self.texts.pop("NUM_UNIQUE_LAYERS", None)
                self.put("NUM_LAYERS", str(last + 1), name)
            loops = dict(NUM_LOOPS=int(self.number(name)) - 1, LOOP_START=begin, LOOP_END=last, ENABLE_LOOPING_AT=0)
            for knob, value in loops.items():
                self.put(knob, str(value), name)
        return True

    def recurring(self, name: str, text: str) -> bool:
        """Layers that repeat, or a switch of RECUR_LAYERS."""
        if "," in text:
            self.put("RECUR_LAYERS", text.strip(","), name)
        elif is_off(text):
            self.texts.pop("RECUR_LAYERS", None)
            if self.value("num_loops"):
                self.put("NUM_LOOPS", "0", name)
        lists = {"RECUR_LAYERS", "RECURRENCE_LAYERS", "DEPTH_RECUR_LAYERS"}
        return "," in text or is_off(text) or bool(lists & set(self.given))

    def ttt_optimizer_name(self, name: str, text: str) -> bool:
        """TTT_OPTIMIZER; Adam is AdamW without weight decay, which is ours."""
        if name == "TTT_OPTIMIZER":
            self.texts[name] = {"adam": "adamw"}.get(text.lower(), text)
        elif not is_off(text):
            self.put("TTT_OPTIMIZER", "adamw", name)
        return True

    def last_layers(self, name: str, text: str) -> bool:
        """XSA_LAYERS: a number of last layers, or their list."""
        layers, depth = text.strip(",").split(","), self.value("num_layers")
        if len(layers) > 1 and layers != [str(n) for n in range(depth - len(layers), depth)]:
            return False
        self.put("XSA_LAST_N", text if len(layers) == 1 else str(len(layers)), name)
        return True

    def activation(self, name: str, text: str) -> bool:
        """ACTIVATION: ReLU^2, or LeakyReLU with its slope, squared."""
        kind = re.fullmatch("(leaky_?relu|leaky|lrelu|relu)_?(2|sq|squared)", text.lower())
        if kind and (kind[1] == "relu" or not self.value("leaky_relu_slope")):
            self.put("LEAKY_RELU_SLOPE", "0" if kind[1] == "relu" else "0.5", name)
        return bool(kind)

    def micro_steps(self, name: str, text: str) -> bool:
        """GRAD_ACCUM_STEPS: micro-steps of a rank."""
        ranks = int(self.number("WORLD_SIZE")) or 1 if "WORLD_SIZE" in self.given else 1
        share = self.value("train_batch_tokens") / (ranks * max(1, self.number(name)))
        self.put("MICRO_BATCH_TOKENS", str(max(1, int(share))), name)
        return True

    def eval_batch(self, name: str, text: str) -> bool:
        """EVAL_BATCH_SEQS: sequences that a rank scores at once."""
        context = self.value("eval_seq_len") or self.value("train_seq_len")
        self.put("VAL_BATCH_SIZE", str(int(self.number(name)) * context), name)
        return True

    def megabytes(self, name: str, text: str) -> bool:
        """TARGET_MB, in units of 2^20 bytes; more than the limit would fail in any case."""
        limit = self.value("artifact_limit_bytes")
        size = min(int(self.number(name) * 2**20), limit)
        if QUANTIZER_TRAITS[self.value("quantizer")].column_scales:
            self.put("TARGET_BYTES", str(size), name)
        elif size < limit:  # scales cannot be fitted to it
            self.put("ARTIFACT_LIMIT_BYTES", str(size), name)
        return True

    def both_sigmas(self, name: str, text: str) -> bool:
        """MATRIX_CLIP_SIGMAS without those of attention and MLP means both, as in the scripts that have it alone."""
        if not {"ATTN_CLIP_SIGMAS", "MLP_CLIP_SIGMAS"} & set(self.texts):
            self.put("ATTN_CLIP_SIGMAS", text, name)
            self.put("MLP_CLIP_SIGMAS", text, name)
        return True

    def lora_rate(self, name: str, text: str) -> bool:
        """TTT_LOCAL_LR_MULT, a factor of LoRA's learning rate."""
        rate = self.value("ttt_lora_lr") * self.number(name)
        if not {"TTT_LORA_LR", "TTT_LORAPLUS_LR_RATIO"} & set(self.texts):  # the preset's ratio stays
            self.put("TTT_LORAPLUS_LR_RATIO", f"{self.value('ttt_loraplus_lr_ratio'):g}", name)
        self.texts.pop("TTT_LORA_LR", None)
        self.put("TTT_LORA_LR", f"{rate:g}", name)
        return True

    def ttt_mode(self, name: str, text: str) -> bool:
        """A switch of test-time training, of its phases or of LoRA."""
        state = {}
        for other, value in self.given.items():
            feature, inverted = switch_of(other)
            if feature in ("TTT", "TTT_EVAL", "PHASED_TTT", "TTT_LORA", "TTT_USE_LORA"):
                state[other] = is_off(value) == inverted
        whole = [on for other, on in state.items() if switch_of(other)[0] in ("TTT", "TTT_EVAL")]
        mode = wanted = self.value("ttt_mode")
        if not all(whole):
            wanted = "none"
        elif "LORA" in name or "PHASED" in name:
            if state[name] or mode == "phased":
                wanted = "phased" if state[name] or any(whole) else "none"
            if wanted == "phased" and not state[name]:  # LoRA without trainings of the full model
                self.put("PHASED_TTT_PREFIX_DOCS", "0", name)
        elif mode == "none":
            kinds = ("TTT_LORA", "GLOBAL_TTT", "PHASED_TTT")
            lora = any(state.get(n, True) for n in self.given if n.startswith(kinds))
            wanted = "phased" if lora else "chunk"
        if wanted != mode:
            self.put("TTT_MODE", wanted, name)
        return True

    def last_run(self) -> list[str]:
        """An evaluation that names no run: of the artifact in the current folder, else of the newest run in logs/."""
        if self.value("mode") != "eval" or "RUN_ID" in self.texts or "ARTIFACT_DIR" in self.texts:
            return []
        runs = sorted(Path("logs").glob(f"*/{CONTAINER_FILE}"), key=lambda path: path.stat().st_mtime)
        folder = runs[-1].parent if runs else None
        if Path(CONTAINER_FILE).is_file():
            folder = Path()
        self.texts |= {} if folder is None else dict(ARTIFACT_DIR=str(folder))
        return [] if folder is None else [f"neither RUN_ID nor ARTIFACT_DIR is set: ARTIFACT_DIR={folder}"]

    def data(self, name: str, text: str) -> bool:
        """DATA_DIR, DATA_PATH or TOKENIZER_PATH, where they are folders of data sets and of tokenizers."""
        found = {}
        there = os.path.isdir(text)  # Path.is_dir raises where a name is too long
        if "_PATH" in name and not there or there and any(Path(text).glob("fineweb_*.bin")):
            return True
        if name == "DATA_PATH" or name == "DATA_DIR" and "DATA_PATH" not in self.given:
            usual = f"{text}/datasets/fineweb10B_sp{self.value('vocab_size')}" if name == "DATA_DIR" else ""
            found["DATA_PATH"] = self.below(name, text, "fineweb_val_*.bin") or usual
        inside = os.path.isfile(Path(found.get("DATA_PATH", ""), TOKENIZER_FILE))
        if (name == "TOKENIZER_PATH" or "TOKENIZER_PATH" not in self.given) and not inside:
            found["TOKENIZER_PATH"] = self.below(name, text, "*.model")
        for knob, path in found.items():
            if path:
                self.texts.pop(knob, None)
                self.put(knob, path, name)
        return True

    def below(self, name: str, root: str, pattern: str) -> str:
        """The folder of shards below a root, or the tokenizer, of this vocabulary. Errors: ConfigError for several."""
        paths = [path for depth in range(7) for path in Path(root).glob("*/" * depth + pattern)]
        found = list(dict.fromkeys(path if pattern == "*.model" else path.parent for path in paths))
        if len(found) > 1:
            size, cased = str(self.value("vocab_size")), self.value("caseops_enabled") == "1"
            of_size = [path for path in found if size in re.findall(r"\d+", str(path.relative_to(root)))]
            found = [path for path in of_size if ("caseops" in str(path)) == cased] or of_size
        if len(found) > 1:
            raise ConfigError(name, root, "holds several that fit: " + ", ".join(map(str, found)) + "; name one")
        return str(found[0]) if found else ""


VALUE_HINTS = {
    "MODE": "; in other scripts MODE chooses a recipe, which is PRESET here",
    "COMPUTE_DTYPE": "; bf16 is bfloat16 here, and float16 would overflow",
}


def open_regular(path: Path) -> int:
    """The descriptor of a plain file, opened for reading. Errors: OSError; ValueError for anything else."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to open a FIFO would wait for its writer
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is not a plain file")
    return handle


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a file that may be anything. Errors: OSError; ValueError for no plain file, or too many bytes."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size} bytes, and at most {limit} are read")
        return file.read()


PRESET_FILE_LIMIT = 1 << 20  # bytes


def read_preset_file(path: str) -> dict[str, str]:
    """The knobs of a TOML file as environment variables. Errors: ConfigError that names PRESET_FILE."""
    import tomllib  # few runs need it

    try:
        content = tomllib.loads(read_regular(Path(path), PRESET_FILE_LIMIT).decode())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError("PRESET_FILE", path, f"cannot be read ({reason})") from None
    except RecursionError:
        raise ConfigError("PRESET_FILE", path, "is not TOML (too deep)") from None
    except ValueError as error:  # also of a number with thousands of digits
        raise ConfigError("PRESET_FILE", path, f"is not TOML ({error})") from None
    values: dict[str, str] = {}
    for key, value in content.items():
        name = key.upper()
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) or name == "PRESET_FILE":
            raise ConfigError("PRESET_FILE", path, f"{key}: must be the name of a knob")
        if name in values:
            raise ConfigError("PRESET_FILE", path, f"{key}: is given twice")
        if not isinstance(value, (bool, int, float, str)):
            raise ConfigError("PRESET_FILE", path, f"{key}: must be a number, a text, true or false")
        values[name] = str(int(value) if isinstance(value, bool) else value)
    return values


def config_from_env(environment: dict[str, str], cuda: bool) -> tuple[Config, set[str], list[str]]:
    """Preset, then overrides by PRESET_FILE and the environment, then checks.

    Returns the config, the knobs set explicitly, and remarks for the log.
    Errors: ConfigError for a value that is not allowed, for what breaks the challenge's rules, and with STRICT for a
    variable that has no effect.
    """
    remarks = []
    if file := environment.get("PRESET_FILE"):  # not kept: the run's config.json has what it sets
        own = {name: text for name, text in environment.items() if text and name != "PRESET_FILE"}
        read = read_preset_file(file)
        environment = read | own
        used = ", ".join(f"{name}={text}" for name, text in read.items() if name not in own)
        remarks.append(f"PRESET_FILE={file} sets {used or 'nothing that the environment leaves'}")
    preset = environment.get("PRESET", "")
    if not preset:
        preset = "baseline" if cuda else "demo"
        remarks.append(f"PRESET is not set and there is {'a' if cuda else 'no'} CUDA device: PRESET={preset}")
    if preset not in PRESETS:
        raise ConfigError("PRESET", preset, "must be one of " + ", ".join(PRESETS))
    command = Command(environment, preset)
    remarks += command.remarks + command.last_run()
    foreign = foreign_variables(environment, command.understood)
    given = {knob.lower(): command.value(knob) for knob in command.texts}
    if given.get("strict") and foreign:
        name, hint = next(iter(foreign.items()))
        others = f" ({len(foreign) - 1} more variables have none)" if len(foreign) > 1 else ""
        raise ConfigError(name, environment[name], f"has no effect, and STRICT=1 is set: {hint}{others}")
    config, followed = followed_config(command, given, cuda)
    if config.mode != "eval":  # an evaluation is checked once the artifact has given the model's settings
        check_command(command, given, config, cuda)
    return config, set(given), remarks + followed + idle_knobs(config, command) + warnings_of(foreign, environment)


# A knob of a command, another that the command does not set, and the value that this one then has.
OVERRIDES = (
    ("warmdown_iters", "warmdown_frac", 0.0),  # older commands set only steps: they override the preset's fraction
    ("warmdown_frac", "warmdown_iters", 0),  # so that WARMDOWN_FRAC=0 turns the warmdown off
    ("phased_ttt_prefix_docs", "phased_ttt_prefix_tokens", 0),  # documents override the default's tokens
    ("ttt_lora_lr", "ttt_loraplus_lr_ratio", 1.0),  # one rate is meant for A and B
)


def followed_config(command: Command, given: Mapping[str, Any], cuda: bool) -> tuple[Config, list[str]]:
    """The configuration of the knobs that are given; what stands in the preset alone follows them, with remarks."""
    values = {**command.base, **given}
    if values["original"]:
        if values["preset"] not in ORIGINALS:
            raise ConfigError("ORIGINAL", 1, f"needs PRESET={' or '.join(ORIGINALS)}, which follow a public script")
        values |= {name: value for name, value in ORIGINALS[values["preset"]].items() if name not in given}
    try:
        recurrence = recurrence_values(values, set(given))
    except ConfigError as error:
        raise command.error(*error.parts) from None
    values |= recurrence
    for name, other, value in OVERRIDES:
        if name in given and other not in given:
            values[other] = value
    remarks = []

    def follow(name: str, value: Any, leader: str) -> None:
        if name not in given and name not in recurrence and values[name] != value:
            cause = f"{leader.upper()}={shown(values[leader])}"
            before = shown(values[name])
            remarks.append(f"{name.upper()}={shown(value)} follows {cause}: the preset's {before} does not fit it")
            values[name] = value

    if values["mode"] != "eval":
        follow_width(values, follow)
        follow_depth(values, follow, command.base["num_layers"])
        follow_batches(values, follow)
        follow_quantizer(values, follow)
    follow_evaluation(values, follow)
    config = resolved(Config(**values), cuda)
    if "muon_momentum_warmup_start" in given and config.muon_momentum_warmup_start > config.muon_momentum:
        raise ConfigError(
            "MUON_MOMENTUM_WARMUP_START",
            config.muon_momentum_warmup_start,
            f"must be at most MUON_MOMENTUM={config.muon_momentum:g}",
        )
    return config, remarks


def shown(value: Any) -> Any:
    """A knob's value as it is written in a command."""
    return int(value) if isinstance(value, bool) else value


Follow = Callable[[str, Any, str], None]  # a knob that is not given, its value, and the knob that it follows


def follow_width(v: dict[str, Any], follow: Follow) -> None:
    """Heads follow the width, what heads hold follows them, and layers that are named one by one the depth."""
    dim, heads = v["model_dim"], v["num_heads"]
    fits = [n for n in range(1, heads + 1) if dim % n == 0 and dim // n % 2 == 0]
    follow("num_heads", max(fits, default=heads), "model_dim")
    heads = v["num_heads"]
    follow("num_kv_heads", max(n for n in range(1, min(v["num_kv_heads"], heads) + 1) if heads % n == 0), "num_heads")
    head = dim // heads
    follow("rope_dims", min(v["rope_dims"], head // 2 * 2), "model_dim")
    follow("gate_window", min(v["gate_window"], dim), "model_dim")
    follow("key_offset", v["key_offset"] and 0 < v["rope_dims"] <= head - 2, "rope_dims")
    gates = [name for name in HEAD_GATES if v[name]]
    for name in gates[: 2 * len(gates) - 2]:
        follow(name, False, next(gate for gate in gates if gate != name))
    follow("bigram_signs", v["bigram_signs"] and v["bigram_vocab_size"] > 0, "bigram_vocab_size")
    depth, layers = v["num_layers"], v["ve_layers"].split(",")
    if v["ve_dim"] and any(n.isdecimal() and int(n[:4]) >= depth for n in layers):
        follow("ve_layers", ",".join(str(n) for n in range(max(0, depth - len(layers)), depth)), "num_layers")
    follow("xsa_last_n", min(v["xsa_last_n"], depth), "num_layers")
    cuts = v["progressive_depth_schedule"].split(",")
    follow("progressive_depth_schedule", ",".join(cuts[: max(0, depth - 1)]), "num_layers")


def follow_depth(v: dict[str, Any], follow: Follow, preset_depth: int) -> None:
    """Places of the recurrence and of parallel streams: in proportion where the preset's do not fit the depth."""
    depth = v["num_layers"]

    def broken() -> bool:
        try:
            check_recurrence(Config(**v))
            check_parallel_residual(Config(**v))
        except ConfigError:
            return True
        return False

    if broken() and depth != preset_depth:
        for name in ("loop_start", "loop_end", "parallel_start_layer"):
            if v[name] > 0:
                follow(name, int(v[name] * depth / preset_depth + 0.5), "num_layers")
    if broken() and v["num_loops"]:
        follow("loop_end", min(max(v["loop_end"], v["loop_start"]), depth - 1), "loop_start")
        follow("loop_start", min(v["loop_start"], v["loop_end"]), "loop_end")
    if broken() and v["loop_end"] < depth:
        first = first_parallel_layer(Config(**v))
        leader = "loop_end" if v["num_loops"] and first == v["loop_end"] + 1 else "num_layers"
        follow("parallel_start_layer", first if first < depth else -1, leader)


def follow_batches(v: dict[str, Any], follow: Follow) -> None:
    """Whole sequences in a batch, and the built-in text of a vocabulary."""
    contexts = [int(n) for n in re.findall(r"\b(\d{1,9})@", v["train_seq_schedule"])]
    follow("train_seq_len", max([v["train_seq_len"], *contexts]), "train_seq_schedule")
    if v["train_batch_tokens"] < v["train_seq_len"]:
        follow("train_seq_len", v["train_batch_tokens"], "train_batch_tokens")
    length = v["train_seq_len"]
    rows = max(1, v["train_batch_tokens"] // length)
    if v["train_batch_tokens"] % length:
        follow("train_batch_tokens", (rows - rows % 8 or rows) * length, "train_seq_len")  # 8 GPUs share them
    text = f"data/builtin_sp{v['vocab_size']}"
    if os.path.isdir(text) and re.fullmatch(r"data/builtin_sp\d+", v["data_path"]):
        follow("data_path", text, "vocab_size")


def follow_quantizer(v: dict[str, Any], follow: Follow) -> None:
    """What a quantizer does not have is off, and one of two options that exclude each other."""
    traits = QUANTIZER_TRAITS[v["quantizer"]]
    off = {} if traits.column_scales else dict(column_steps=0.0, awq_groups=0, target_bytes=0)
    if not traits.uses_hessians:
        off |= WITHOUT_GRADIENTS
    for name, value in off.items():
        follow(name, value, "quantizer")
    follow("rvq_enabled", v["rvq_enabled"] and not v["target_bytes"], "target_bytes")
    follow("target_bytes", 0 if v["rvq_enabled"] else v["target_bytes"], "rvq_enabled")


def follow_evaluation(v: dict[str, Any], follow: Follow) -> None:
    """Windows within the context; hints with a range of lengths, and an order to learn in."""
    if v["mode"] != "eval":
        leader = "eval_seq_len" if v["eval_seq_len"] else "train_seq_len"
        follow("eval_stride", min(v["eval_stride"], v[leader]), leader)
    follow("hint_max_match", max(v["hint_max_match"], v["hint_min_match"]), "hint_min_match")
    follow("hint_min_match", min(v["hint_max_match"], v["hint_min_match"]), "hint_max_match")
    by_length = v["ttt_mode"] == "phased" and v["ttt_order"] == "length"
    follow("hint_enabled", v["hint_enabled"] and not by_length, "ttt_order")
    if by_length:
        follow("ttt_recompute_tokens", 0, "ttt_order")
    leader = next((name for name in ("ttt_eval_seq_len", "eval_seq_len") if v[name]), "train_seq_len")
    if leader != "train_seq_len" or v["mode"] != "eval":
        room = v[leader] - v["ttt_chunk_size"]  # of a window, for tokens before a chunk
        fits = min(v["ttt_recompute_tokens"], room)
        follow("ttt_recompute_tokens", fits if fits > 1 else 0, leader)


def check_command(command: Command, given: Mapping[str, Any], config: Config, cuda: bool) -> None:
    """Checks the configuration. Errors: ConfigError that names a variable of the command, never one of the preset."""
    try:
        check_config(config)
    except ConfigError as error:
        name, allowed = str(error.parts[0]), str(error.parts[2])
        if name.lower() in given:
            raise command.error(name, error.parts[1], allowed) from None
        knob = culprit(command, given, name, allowed, cuda)
        does = f"does not fit the preset: {name}={error.parts[1]} {allowed}"
        raise command.error(knob.upper(), given[knob], does) from None


def culprit(command: Command, given: Mapping[str, Any], name: str, allowed: str, cuda: bool) -> str:
    """The knob of a command without which the preset's `name` would do: alone at best, else with those before it."""

    def refused(rest: Mapping[str, Any]) -> str:
        try:
            check_config(followed_config(command, rest, cuda)[0])
        except ConfigError as error:
            return str(error.parts[0])
        return ""

    order = sorted(given, key=lambda knob: knob.upper() not in allowed)
    without = {knob: refused({n: v for n, v in given.items() if n != knob}) for knob in order}
    sound = [knob for knob, other in without.items() if not other]
    differing = [knob for knob, other in without.items() if other != name]
    if differing:
        return (sound or differing)[0]
    return next(knob for n, knob in enumerate(order) if refused({k: given[k] for k in order[n + 1 :]}) != name)


# Knobs, and those without which they have no effect; with `=value`, what such a knob must be.
IDLE = """
loop_start loop_end enable_looping_at < num_loops
bigram_dim bigram_signs < bigram_vocab_size
ve_layers < ve_dim
window_attn_layers < window_attn_size
smear_gate_type < smear_gate_enabled
sparse_attn_gate_scale < sparse_attn_gate_enabled
gated_attn_quant_gate gated_attn_init_std < sparse_attn_gate_enabled gated_attn_enabled attn_out_gate_enabled
gate_window < smear_gate_enabled sparse_attn_gate_enabled attn_out_gate_enabled
tied_embed_lr tied_embed_init_std < tie_embeddings
embed_lr head_lr < tie_embeddings=False
muon_momentum_warmup_start < muon_momentum_warmup_steps
muon_momentum_min muon_momentum_max < muon_momentum_cycle
ema_start < ema_decay
late_qat_threshold < qat_start=0.0
virtual_depth < num_loops
warmdown_iters < warmdown_frac=0.0
focal_gamma < focal_enabled
mtp_end < mtp_weights
seq_change_warmup_steps < train_seq_schedule
swa_every swa_start < swa_enabled
attn_clip_sigmas mlp_clip_sigmas gptq_damp < quantizer=uniform quantizer=trellis
trellis_states trellis_rate < quantizer=trellis
lqer_rank lqer_top_k lqer_select lqer_asym_enabled lqer_asym_group lqer_factor_bits < lqer_enabled
rvq_bits < rvq_enabled
tune_scale_lr tune_vector_lr < tune_steps
hint_min_match hint_max_match hint_lr < hint_enabled
hint_chunk_tokens < hint_enabled ttt_plain_weight
ttt_chunk_tokens ttt_epochs ttt_lr ttt_decay_tokens ttt_momentum ttt_freeze_blocks < ttt_mode=chunk
ttt_order ttt_chunk_size ttt_eval_seq_len ttt_recompute_tokens ttt_beta2 ttt_weight_decay ttt_grad_steps \
ttt_warm_start_a ttt_short_doc_chunks ttt_lora_rank ttt_lora_alpha ttt_lora_lr ttt_loraplus_lr_ratio ttt_q_lora \
ttt_k_lora ttt_v_lora ttt_o_lora ttt_mlp_lora \
phased_ttt_prefix_docs phased_ttt_prefix_tokens phased_ttt_num_phases global_ttt_chunk_tokens global_ttt_lr \
global_ttt_momentum global_ttt_epochs < ttt_mode=phased
ttt_batch_size ttt_streams < ttt_order=length
ttt_plain_weight < ttt_mode=chunk ttt_mode=phased
"""


def idle_knobs(config: Config, command: Command) -> list[str]:
    """A remark for each knob of the command whose feature is off."""
    remarks = []
    for row in IDLE.strip().splitlines():
        names, needs = (part.split() for part in row.split(" < "))
        pairs = [need.partition("=") for need in needs]
        active = any(str(getattr(config, n)) == v if v else getattr(config, n) for n, _, v in pairs)
        for name in () if active else names:
            known = config.mode != "eval" or name.startswith(("hint", "ttt", "phased", "global"))
            if name.upper() in command.texts and known:
                source = command.sources.get(name.upper(), name.upper())
                holds = ", ".join(
                    f"{n.upper()}={shown(getattr(config, n))}" for n in dict.fromkeys(p[0] for p in pairs)
                )
                remarks.append(f"{source}={command.given[source]} has no effect with {holds}")
    return remarks


def recurrence_values(values: Mapping[str, Any], explicit: set[str]) -> dict[str, Any]:
    """What NUM_UNIQUE_LAYERS (layer i % n at depth i) and RECUR_LAYERS (PR #1204) mean in this script's knobs.

    NUM_LOOPS, if it is set and not 0, says how often RECUR_LAYERS repeat. Errors: ConfigError where there is no such
    meaning.
    """
    unique, depth = values.get("num_unique_layers", 0), values.get("num_layers", Config.num_layers)
    recurring = values.get("recur_layers", "")
    if recurring:
        layers = [int(word) if word.strip().isdecimal() else -1 for word in recurring.split(",")]
        if layers[0] < 0 or layers != list(range(layers[0], layers[0] + len(layers))):
            raise ConfigError("RECUR_LAYERS", recurring, "must be comma-separated numbers in a row, such as 3,4,5")
        repeats = values["num_loops"] if "num_loops" in explicit else 0
        return dict(num_loops=repeats or 1, loop_start=layers[0], loop_end=layers[-1])
    if not unique or unique == depth:
        return {}
    passes = -(-depth // unique)
    if unique > depth or passes > 17:
        raise ConfigError("NUM_UNIQUE_LAYERS", unique, f"must be from {-(-depth // 17)} to NUM_LAYERS={depth}")
    return dict(
        num_layers=unique,
        num_loops=passes - 1,
        loop_start=0,
        loop_end=unique - 1,
        virtual_depth=depth if depth % unique else 0,
        enable_looping_at=0.0,
    )


def resolved(config: Config, cuda: bool) -> Config:
    """Replaces `auto` by what it means on this machine. Errors: ConfigError for what this machine cannot do."""
    device = config.device
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    if device == "cuda" and not cuda:
        raise ConfigError("DEVICE", config.device, "no CUDA device is visible; use cpu or auto")
    if device == "mps":
        check_mps(config)
    flags = set(cpu_info("flags", "Features").split())
    native = device == "cuda" or (device == "cpu" and bool({"avx512_bf16", "amx_bf16", "bf16"} & flags))
    automatic: dict[str, Any] = {
        "compute_dtype": "bfloat16" if native else "float32",
        "compile": "01"[device == "cuda"],
        "triton_kernels": "01"[device == "cuda" and triton is not None],
        "ttt_cuda_graphs": "01"[device == "cuda"],
    }
    if config.compile == "1" and device == "cpu" and not cpu_compiler():
        raise ConfigError("COMPILE", 1, "needs a C++ compiler and Python's headers on CPUs, and they are not installed")
    if config.triton_kernels == "1" and (device != "cuda" or triton is None):
        raise ConfigError("TRITON_KERNELS", 1, "needs a CUDA device and Triton; use auto or 0")
    if config.ttt_cuda_graphs == "1" and device != "cuda":
        raise ConfigError("TTT_CUDA_GRAPHS", 1, "needs a CUDA device; use auto or 0")
    values = {name: value for name, value in automatic.items() if getattr(config, name) == "auto"}
    if config.yarn:  # a model keeps the wavelengths that it was trained with: they travel in its artifact
        values["yarn_max_len"] = max(config.yarn_max_len, config.longest_context)
    config = dataclasses.replace(config, device=device, **values)
    require(config.compile == "1" or not config.compile_cache, config, "compile_cache", "needs COMPILE=1")
    return config


def check_mps(config: Config) -> None:
    """Errors: ConfigError for what Apple's GPUs, or this machine, cannot do."""
    if not mps_available():
        raise ConfigError("DEVICE", "mps", "PyTorch sees no Apple GPU; use cpu or auto")
    if config.compile == "1":
        raise ConfigError("COMPILE", 1, "is for CUDA and CPUs; use auto or 0")
    if config.compute_dtype == "float64":
        raise ConfigError("COMPUTE_DTYPE", "float64", "Apple's GPUs have no float64; use float32 or DEVICE=cpu")


def mps_available() -> bool:
    """Whether PyTorch can use Apple's GPU."""
    return torch.backends.mps.is_available()


def cpu_compiler() -> bool:
    """Whether torch.compile can build its C++ code here: it needs a compiler and Python.h."""
    import sysconfig  # reads the environment when it is imported

    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return headers and any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def cpu_info(*fields: str) -> str:
    """The first of these fields in /proc/cpuinfo, or an empty text."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() in fields), "")


def foreign_variables(environment: Mapping[str, str], understood: Collection[str]) -> dict[str, str]:
    """Variables that look like settings of a training and have no effect here, each with what to set instead.

    Errors: ConfigError for what breaks a rule of the challenge or asks for another model.
    """
    names = [f.name.upper() for f in dataclasses.fields(Config)]
    words = {word for name in (*names, TRAINING_WORDS.replace(" ", "_")) for word in name.split("_")}
    words -= set(PLAIN_WORDS.split())
    rows = [row.split(" > ") for row in FOREIGN.strip().splitlines()]
    hints = {}
    for name in sorted(set(environment) - set(names) - set(understood)):
        upper, text = name.upper(), environment[name]
        pattern, meant = next((row for row in rows if re.match(row[0].strip("!~").split(" @ ")[0], upper)), ("", ""))
        kind, ordinary = pattern[:1], not text or re.match(ORDINARY, upper)
        if ordinary and kind != "!" or is_off(text) or switched_off(upper, environment):
            continue
        if kind == "!" and re.fullmatch(pattern.split(" @ ")[1], upper):
            raise ConfigError(name, text, f"breaks a rule of the challenge: it {meant}")
        if kind == "~" and "/" not in text:
            raise ConfigError(name, text, f"must be left out: it asks for another model ({meant})")
        if kind == "~" or ordinary:
            continue
        near = difflib.get_close_matches(upper, names, n=1, cutoff=0.9) if len(name) > 3 else []
        if kind == "!":
            meant = f"it belongs to what breaks a rule of the challenge, as it {meant}"
        elif near and near[0][:4] == upper[:4]:
            meant = f"did you mean {near[0]}?"
        elif meant:
            meant = "the nearest here is " + meant.replace(" ", ", ")
        if meant or "/" not in text and (words & set(upper.split("_")) or switch_of(upper)[0] != upper):
            hints[name] = meant or "no knob of this script has that name; see --help"
    return hints


def switched_off(name: str, environment: Mapping[str, str]) -> bool:
    """Whether another variable turns off what this one belongs to, as SLOT_ENABLED=0 does with SLOT_LR."""
    for switch, text in environment.items():
        family = re.sub(
            "^(USE|ENABLE)_|_(ENABLED|NUM_HEADS|NUM_FEATURES|WEIGHT|ORDER|EPOCHS|LAMBDA|STEPS|BOOST)$", "", switch
        )
        family = re.sub("(TOKENS|LEN)_START$", "SCHEDULE", family)  # BATCH_TOKENS_START, SEQ_LEN_START
        if switch != name and name.startswith(family + "_") and is_off(text):
            return True
    return False


def unknown_variables(environment: Mapping[str, str], understood: Collection[str] = ()) -> list[str]:
    """A warning for each variable that looks like a knob and has no effect. Errors: ConfigError for what is refused."""
    return warnings_of(foreign_variables(environment, understood), environment)


def warnings_of(foreign: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """A warning for each variable that has no effect, with its hint."""
    return [f"warning: {name}={environment[name]} has no effect: {hint}" for name, hint in foreign.items()]


def check_config(config: Config) -> None:
    """Checks what knobs require of each other. Errors: ConfigError."""
    check_width(config)
    check_fp8(config)
    check_attention(config)
    check_embeddings(config)
    check_recurrence(config)
    check_parallel_residual(config)
    check_batches(config)
    check_schedules(config)
    check_rates(config)
    check_quantization(config)
    check_evaluation(config)


def require(holds: bool, config: ModelConfig, name: str, allowed: str) -> None:
    """Raises a ConfigError about a knob, with what is allowed, unless the condition holds."""
    if not holds:
        raise ConfigError(name.upper(), shown(getattr(config, name)), allowed)


def check_width(config: ModelConfig) -> None:
    """Widths: of heads, of the MLP, and of what gates read."""
    require(config.model_dim % config.num_heads == 0, config, "num_heads", f"must divide MODEL_DIM={config.model_dim}")
    require(
        config.num_heads % config.num_kv_heads == 0, config, "num_kv_heads", f"must divide NUM_HEADS={config.num_heads}"
    )
    allowed = f"MLP_MULT*MODEL_DIM must be at least 1, with MODEL_DIM={config.model_dim}"
    require(config.hidden_dim >= 1, config, "mlp_mult", allowed)
    require(
        config.gate_window <= config.model_dim, config, "gate_window", f"must be at most MODEL_DIM={config.model_dim}"
    )


def check_fp8(config: Config) -> None:
    """Sizes that `torch._scaled_mm` takes. They hold on every device, so that a simulation shows what a GPU does."""
    widths = dict(model_dim=config.fp8_head or config.fp8_mlp, vocab_size=config.fp8_head)
    for name, used in widths.items():
        fits = config.mode == "eval" or not used or getattr(config, name) % 16 == 0
        require(fits, config, name, "must be a multiple of 16 with FP8_HEAD=1 or FP8_MLP=1")
    allowed = f"MLP_MULT*MODEL_DIM={config.hidden_dim} must be a multiple of 16 with FP8_MLP=1"
    require(config.mode == "eval" or not config.fp8_mlp or config.hidden_dim % 16 == 0, config, "mlp_mult", allowed)


def check_attention(config: ModelConfig) -> None:
    """Rotary embedding, XSA and head gates."""
    allowed = f"MODEL_DIM/NUM_HEADS={config.head_dim} must be even, for rotary embedding"
    require(config.head_dim % 2 == 0, config, "num_heads", allowed)
    require(
        config.rotary_dims % 2 == 0 and config.rotary_dims <= config.head_dim,
        config,
        "rope_dims",
        f"must be even and at most MODEL_DIM/NUM_HEADS={config.head_dim}",
    )
    allowed = f"needs ROPE_DIMS from 2 to {config.head_dim - 2}: other dimensions of a head come from before"
    if config.head_dim < 4:
        allowed = f"needs heads of at least 4 dimensions, and MODEL_DIM/NUM_HEADS is {config.head_dim}"
    require(config.offset_dims > 0 or not config.key_offset, config, "key_offset", allowed)
    require(
        config.xsa_last_n <= config.num_layers, config, "xsa_last_n", f"must be at most NUM_LAYERS={config.num_layers}"
    )
    if config.window_attn_size and config.window_attn_layers:
        check_layers(config, "window_attn_layers", config.window_layers)
    require(tables_fit(config), config, "train_seq_len", TABLES_ALLOWED)
    enabled = [name for name in HEAD_GATES if getattr(config, name)]
    for name in enabled[1:]:
        require(False, config, name, f"must be 0, because {enabled[0].upper()} is 1: there is one head gate")


HEAD_GATES = ("sparse_attn_gate_enabled", "gated_attn_enabled", "attn_out_gate_enabled")
SEQUENCE_LIMIT = 1 << 16  # tokens
ROTARY_LIMIT = 1 << 24  # numbers in the rotary tables of a sequence
TABLES_ALLOWED = (
    f"must be at most {SEQUENCE_LIMIT}, and times the rotary dimensions of a head at most {ROTARY_LIMIT}, so that "
    "rotary tables fit any machine"
)


def tables_fit(config: ModelConfig) -> bool:
    """Whether training sequences are short enough for any machine. An artifact is held against the same limits."""
    return config.train_seq_len <= SEQUENCE_LIMIT and config.train_seq_len * config.rotary_dims <= ROTARY_LIMIT


def check_embeddings(config: ModelConfig) -> None:
    """Bigram and value embeddings."""
    allowed = "must be 0 or at least 2: a document's first token has a bucket of its own"
    require(config.bigram_vocab_size != 1, config, "bigram_vocab_size", allowed)
    allowed = "needs a bigram embedding, BIGRAM_VOCAB_SIZE above 0"
    require(config.bigram_vocab_size > 0 or not config.bigram_signs, config, "bigram_signs", allowed)
    if config.ve_dim:
        check_layers(config, "ve_layers", config.value_layers)


def check_layers(config: ModelConfig, name: str, layers: tuple[int, ...]) -> None:
    """A knob that lists layers, each of them once."""
    found = {layer for layer in layers if layer < config.num_layers}
    allowed = f"must be different layers below NUM_LAYERS={config.num_layers}, comma-separated, such as 0,1"
    require(len(found) == getattr(config, name).count(",") + 1, config, name, allowed)


def check_recurrence(config: ModelConfig) -> None:
    """The layers of the depth recurrence."""
    if config.loops:
        allowed = f"must be below NUM_LAYERS={config.num_layers}"
        require(config.loop_end < config.num_layers, config, "loop_end", allowed)
        allowed = f"must be at most LOOP_END={config.loop_end}"
        require(config.loop_start <= config.loop_end, config, "loop_start", allowed)
        if config.virtual_depth:
            calls = len(execution_order(dataclasses.replace(config, virtual_depth=0), True))
            whole = set(execution_order(config, True)) == set(range(config.num_layers))
            allowed = f"must be 0, or at most {calls} and enough for every layer of NUM_LAYERS={config.num_layers}"
            require(whole and config.virtual_depth <= calls, config, "virtual_depth", allowed)


def check_parallel_residual(config: ModelConfig) -> None:
    """Parallel residual streams start in the second half of the layers, with and without recurrence, and after it."""
    first, last = first_parallel_layer(config), config.num_layers - 1
    layers = f"must be -1, or from {first} to {last}: in the second half, after the recurrence"
    allowed = layers if first <= last else f"must be -1: no layer of NUM_LAYERS={last + 1} follows the recurrence"
    fits = not config.parallel_residual or first <= config.parallel_start_layer <= last
    require(fits, config, "parallel_start_layer", allowed)


def first_parallel_layer(config: ModelConfig) -> int:
    """The first layer at which parallel residual streams may start."""
    orders = [execution_order(config, looped) for looped in (False, True)]
    first = max(max(order[: len(order) // 2], default=-1) for order in orders) + 1
    return max(first, config.loop_end + 1) if config.loops else first


def check_batches(config: Config) -> None:
    """A training batch is whole sequences."""
    require(
        config.mode == "eval" or config.train_batch_tokens % config.train_seq_len == 0,
        config,
        "train_batch_tokens",
        f"must be a multiple of TRAIN_SEQ_LEN={config.train_seq_len}",
    )


def check_schedules(config: Config) -> None:
    """Multi-token prediction, progressive depth and context, weight averages and the time limit."""
    _ = config.context_schedule, config.query_gains  # they say themselves what is wrong
    allowed = f"must be at most MUON_MOMENTUM_MAX={config.muon_momentum_max:g}"
    fits = not config.muon_momentum_cycle or config.muon_momentum_min <= config.muon_momentum_max
    require(fits, config, "muon_momentum_min", allowed)
    allowed = f"must be fewer numbers than TRAIN_SEQ_LEN={config.train_seq_len}"
    ahead = len(config.ahead_weights)
    require(config.mode == "eval" or ahead < config.train_seq_len, config, "mtp_weights", allowed)
    allowed = f"must be fewer numbers than NUM_LAYERS={config.num_layers}"
    require(len(config.depth_cuts) < config.num_layers, config, "progressive_depth_schedule", allowed)
    needs_ema, needs_swa = config.weight_average == "ema", config.weight_average == "swa"
    require(not needs_ema or config.ema_decay > 0, config, "weight_average", "needs EMA_DECAY above 0")
    require(not needs_swa or config.swa_enabled, config, "weight_average", "needs SWA_ENABLED=1")
    reserve = config.gptq_reserve_seconds
    require(reserve >= 0 or reserve == -1, config, "gptq_reserve_seconds", "must be at least 0, or -1 to measure it")
    require(
        config.gptq_reserve_seconds < config.max_wallclock_seconds or config.max_wallclock_seconds == 0,
        config,
        "gptq_reserve_seconds",
        f"must be below MAX_WALLCLOCK_SECONDS={config.max_wallclock_seconds:g}",
    )


RATE_LIMIT = 1e15  # the product of a rate and a weight decay must fit 32-bit numbers


def check_rates(config: Config) -> None:
    """Learning rates and weight decays of the training, which optimizers multiply with 32-bit weights."""
    for f in dataclasses.fields(config):
        if f.name.endswith(("_lr", "_wd")) and "ttt" not in f.name:
            require(getattr(config, f.name) <= RATE_LIMIT, config, f.name, f"must be at most {RATE_LIMIT:g}")


def check_quantization(config: Config) -> None:
    """Bits, and options that exclude each other."""
    allowed = "must be 0 with TARGET_BYTES: scales use all of its bytes, and leave none for a second quantization"
    require(not (config.rvq_enabled and config.target_bytes), config, "rvq_enabled", allowed)
    require(config.trellis_states in (4, 8, 16, 32), config, "trellis_states", "must be 4, 8, 16 or 32")
    for name in ("attn_bits", "mlp_bits"):
        require(getattr(config, name) != 1, config, name, "must be 0 or from 2 to 8")
    require(config.embed_bits in (*range(2, 9), 16), config, "embed_bits", "must be from 2 to 8, or 16 for fp16")
    if not QUANTIZER_TRAITS[config.quantizer].column_scales:
        for name in ("column_steps", "awq_groups", "target_bytes"):
            allowed = f"must be 0 with QUANTIZER={config.quantizer}, which has one scale per row"
            require(not getattr(config, name), config, name, allowed)
    if not QUANTIZER_TRAITS[config.quantizer].uses_hessians:
        for name, off in WITHOUT_GRADIENTS.items():
            allowed = f"must be {off:g} with QUANTIZER={config.quantizer}, which chooses scales by itself"
            require(getattr(config, name) == off, config, name, allowed)


def check_evaluation(config: Config) -> None:
    """Sliding windows leave no target out; hints have a range of lengths, and an order to learn in."""
    allowed = f"must be at most the context length, {config.eval_context}"
    require(config.eval_stride <= config.eval_context, config, "eval_stride", allowed)
    allowed = f"must be at least HINT_MIN_MATCH={config.hint_min_match}"
    require(config.hint_max_match >= config.hint_min_match, config, "hint_max_match", allowed)
    by_length = config.ttt_mode == "phased" and config.ttt_order == "length"
    allowed = "must be 0 with TTT_ORDER=length: hints learn in the order of the stream"
    require(not (config.hint_enabled and by_length), config, "hint_enabled", allowed)
    allowed = "must be 0 with TTT_ORDER=length: documents of a batch have chunks at different places"
    require(not (config.ttt_recompute_tokens and by_length), config, "ttt_recompute_tokens", allowed)
    room = config.ttt_context - config.ttt_chunk_size
    allowed = f"must be 0, or at least {config.lead_tokens} and at most TTT_EVAL_SEQ_LEN less TTT_CHUNK_SIZE, {room}"
    inside = config.lead_tokens <= config.ttt_recompute_tokens <= room
    asked = config.ttt_mode == "phased" and config.ttt_recompute_tokens
    require(not asked or inside, config, "ttt_recompute_tokens", allowed)


def execution_order(config: ModelConfig, looped: bool) -> list[int]:
    """Layers in the order in which they run: 0..L-1, with LOOP_START..LOOP_END repeated NUM_LOOPS times if looped.

    VIRTUAL_DEPTH ends it early.
    """
    if not (looped and config.loops):
        return list(range(config.num_layers))
    loop = list(range(config.loop_start, config.loop_end + 1))
    order = [*range(config.loop_start), *loop * (config.num_loops + 1), *range(config.loop_end + 1, config.num_layers)]
    return order[: config.virtual_depth or len(order)]


class BatchLayout(NamedTuple):
    """How ranks and micro-steps share a training step: sequences = world * micro_steps * micro_sequences."""

    sequences: int
    world: int
    micro_steps: int
    micro_sequences: int

    def __str__(self) -> str:
        """The log's line."""
        ranks = f"{self.world} rank{'s' if self.world > 1 else ''}"
        steps = f"{self.micro_steps} micro-step{'s' if self.micro_steps > 1 else ''}"
        return f"batch: {self.sequences} sequences = {ranks} x {steps} x {self.micro_sequences}"


def batch_layout(config: Config, world: int) -> BatchLayout:
    """The largest micro-batch that MICRO_BATCH_TOKENS allows and that divides a rank's sequences, at least one.

    Errors: ConfigError where the ranks do not divide the sequences.
    """
    sequences = config.train_batch_tokens // config.train_seq_len
    if sequences % world:
        raise ConfigError(
            "TRAIN_BATCH_TOKENS",
            config.train_batch_tokens,
            f"is {sequences} sequences of TRAIN_SEQ_LEN={config.train_seq_len}, which {world} ranks do not divide; "
            f"must be a multiple of {world * config.train_seq_len}",
        )
    local = sequences // world
    most = max(1, config.micro_batch_tokens // config.train_seq_len)
    micro_sequences = max(n for n in range(1, local + 1) if local % n == 0 and n <= most)
    return BatchLayout(sequences, world, local // micro_sequences, micro_sequences)


def parse_arguments(arguments: list[str], environment: dict[str, str]) -> tuple[set[str], dict[str, str]]:
    """(options, environment with --mode put into it). Errors: ConfigError."""
    options, environment = set(), dict(environment)
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name == "--mode":
            if not equals and waiting:
                value = waiting.pop(0)
            if not value:
                raise ConfigError("argument", word, "needs a mode: train, eval or all")
            environment["MODE"] = value
        elif word in ("--help", "-h", "--dry-run"):
            options.add("--help" if word == "-h" else word)
        else:
            allowed = (
                "must be --mode train|eval|all, --dry-run or --help; every other setting is an environment variable"
            )
            raise ConfigError("argument", word, allowed)
    return options, environment


EXIT_ELSEWHERE, RANK_LOST = 3, 4
EXIT_CODES = {
    0: "the run did what it was asked",
    1: "the artifact is over its limit; or an error in the program, with its traceback",
    2: "a setting, the data or the folder must be mended; one line names it",
    EXIT_ELSEWHERE: "the run ended, but could not write everything where it belongs; stderr names what is where",
    RANK_LOST: "another rank died, was stopped or hung, or torchrun has ended; one line names it",
    129: "ended by SIGHUP, as when the terminal is closed",
    130: "interrupted",
    143: "ended by SIGTERM",
}


def help_text() -> str:
    """The table of knobs, generated from Config and PRESETS."""
    lines = [
        "usage: [KNOB=value ...] python train_gpt.py [--mode all|train|eval] [--dry-run] [--help]",
        "       [KNOB=value ...] torchrun --standalone --nproc_per_node=N train_gpt.py",
        "",
        "Exit codes:",
        *(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items()),
        "",
        "Every knob is an environment variable: its type and default, then each preset that differs.",
    ]
    if not any(f.metadata["meaning"] for f in dataclasses.fields(Config)):  # tools/pack_code.py leaves them out
        lines.append("docs/knobs.md says what each of them means, as does --help of the readable script.")
    for title, fields in knob_sections().items():
        lines += ["", f"== {title} =="]
        for f in fields:
            default = f.default if f.default != "" else '""'
            rows = "  ".join(f"{p}={r[f.name]}" for p, r in PRESETS.items() if f.name in r)
            allowed = " | ".join(f.metadata["choices"]) + ". " if f.metadata["choices"] else ""
            lines += [
                "",
                f"{f.name.upper()}  ({f.type}, {default})" + (f"  {rows}" if rows else ""),
                f"    {allowed}{f.metadata['meaning']}".rstrip(),
                f"    observed in: {f.metadata['observed']}",
            ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Run: rank, world, device, clock, log
# ---------------------------------------------------------------------------------------------------------------

CONTAINER_FILE, SUMMARY_FILE = "model.pgolf", "summary.json"
TOKENIZER_FILE, WEIGHTS_FILE = "tokenizer.model", "weights.safetensors"
RUN_FILES = {"log.txt", "config.json", CONTAINER_FILE, SUMMARY_FILE, "checkpoint"}  # of a run that was begun
LOCK_FILE = "run.lock"  # empty but for the process number; it is there as long as the run
LINES_LIMIT = 2**22  # bytes of a log that wait in memory while it cannot be written
RESCUE_SECONDS = 600.0  # in which the model is tried again where no folder takes it; ranks wait for 20 minutes


def say(text: str, stream: TextIO | None) -> Exception | None:
    """Prints a line; what the stream's encoding lacks is escaped. Returns the error of a failure, and raises none."""
    if stream is None:  # the process was started without it
        return None
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except (OSError, ValueError) as error:  # a closed pipe, a full disk; a stream that was closed
        return error
    return None


def complain(text: str) -> None:
    """Prints a line on stderr, or on stdout where stderr cannot be written."""
    if sys.stderr is None or say(text, sys.stderr):
        say(text, sys.stdout)


def show(text: str) -> int:
    """Prints what was asked for. Returns the exit code; `| head` closes the pipe when it has read enough."""
    error = say(text, sys.stdout)
    if error is None or isinstance(error, BrokenPipeError):
        return 0
    complain(f"error: standard output cannot be written ({error})")
    return EXIT_ELSEWHERE


class LiveLine:
    """A line at the bottom of a terminal that is written over. Where the stream is no terminal, nothing is written."""

    SECONDS = 0.2  # between two writes

    def __init__(self, stream: TextIO | None, dumb: bool = False):
        """`dumb`: a terminal, such as an editor's, that shows the codes that move the cursor."""
        self.stream = stream
        self.shown = False
        self.written = -math.inf
        self.bytes_per_token = 0.0  # of the validation text; 0: not known
        try:
            self.terminal = stream is not None and stream.isatty() and not dumb
        except ValueError:  # a stream that was closed
            self.terminal = False

    @property
    def due(self) -> bool:
        """Whether there is a terminal, whose line was not replaced a moment ago."""
        return self.terminal and time.monotonic() - self.written >= self.SECONDS

    def show(self, text: str) -> None:
        """Replaces the line, if that is due."""
        if not self.due:
            return
        self.written, self.shown = time.monotonic(), True
        self.write("\r" + text[: max(1, shutil.get_terminal_size().columns - 1)] + "\x1b[K")

    def clear(self) -> None:
        """Removes the line, so that another one can be printed in its place."""
        if self.shown:
            self.shown = False
            self.write("\r\x1b[K")

    def write(self, text: str) -> None:
        """Writes without a line's end. A terminal that fails gets no more."""
        try:
            cast(TextIO, self.stream).write(text)
            cast(TextIO, self.stream).flush()
        except (OSError, ValueError):
            self.terminal = False


def clock(seconds: float) -> str:
    """Seconds as people read them: 0:09, 12:34 or 1:02:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def settle_output() -> None:
    """Drops what standard output and error cannot write, about which the interpreter would complain as it ends."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextlib.contextmanager
def written_aside(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write under a temporary name in the same folder, renamed at the end: a reader never sees half of it.

    `durable`: it outlives a power failure.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_atomic(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Writes a file aside, then renames it."""
    with written_aside(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


class FolderLock:
    """An exclusive lock on a file of a run's folder. The system releases it when the process ends, however that ends.

    Errors: BlockingIOError where another process holds it, with its number as the text; OSError.
    """

    def __init__(self, path: Path):
        self.path = path
        self.supported = True  # by the file system
        for _ in range(100):
            self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644), "rb+")
            if not stat.S_ISREG(os.fstat(self.file.fileno()).st_mode):
                raise OSError(errno.EINVAL, f"{path.name} there is not a plain file")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = self.file.read(20).strip()
                raise BlockingIOError(error.errno, holder.decode() if holder.isdigit() else "unknown") from None
            except OSError:
                self.supported = False
            # A holder removes the file as it ends. Who had opened it before then locks a file without a name, while
            # another process makes a new one of this name and locks that.
            if self.holds():
                break
            self.file.close()
        else:
            raise OSError(errno.ESTALE, f"{path.name} there is replaced all the time")
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the number
            os.ftruncate(self.file.fileno(), 0)
            os.write(self.file.fileno(), f"{os.getpid()}\n".encode())

    def holds(self) -> bool:
        """Whether the locked file is still the one in the folder."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path, follow_symlinks=False))
        except OSError:
            return False

    def release(self) -> None:
        """Removes the file while it is locked, and unlocks it."""
        with contextlib.suppress(OSError):
            if self.holds():
                os.unlink(self.path)
        self.file.close()


def cut_line(path: Path) -> bool:
    """Whether a file ends within a line, as after a kill in the middle of a write."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        return end > 0 and file.seek(end - 1) >= 0 and file.read(1) != b"\n"


class LineFile:
    """Adds lines to a file. Those that cannot be written wait in memory for the next try, up to LINES_LIMIT bytes."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting = bytearray()
        self.dropped = 0  # lines that found no room
        self.fresh = True  # nothing was written yet
        self.unsure: int | None = None  # the file's size before a write that closing did not confirm
        self.lock = threading.RLock()

    def add(self, line: str) -> None:
        """Adds a line to those that wait."""
        data = line.encode(errors="backslashreplace") + b"\n"
        with self.lock:
            if len(self.waiting) + len(data) > LINES_LIMIT:
                self.dropped += 1
            else:
                self.waiting += data

    def flush(self) -> None:
        """Writes the lines that wait. Errors: OSError; what was not written still waits."""
        # A link or a FIFO of this name in a stranger's folder must be neither followed nor waited for.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with self.lock:
            handle, written = os.open(self.path, flags, 0o644), 0
            try:
                size = os.fstat(handle).st_size
                if self.unsure is not None:  # what did arrive must not be written twice
                    del self.waiting[: max(0, size - self.unsure)]
                    self.unsure = None
                if self.fresh and cut_line(self.path):
                    self.waiting[:0] = b"\n"
                self.fresh = False
                while written < len(self.waiting):
                    written += os.write(handle, self.waiting[written:])
            except OSError:
                del self.waiting[:written]
                with contextlib.suppress(OSError):
                    os.close(handle)
                raise
            self.unsure = size
            os.close(handle)  # a network's file system may report only here that it is full
            self.unsure = None
            self.waiting.clear()


def to_json(value: Any, **options: Any) -> str:
    """A value as valid JSON. A number that is not finite becomes null: JSON has no NaN, and parsers refuse it."""

    def finite(part: Any) -> Any:
        if isinstance(part, float) and not math.isfinite(part):
            return None
        if isinstance(part, dict):
            return {key: finite(inner) for key, inner in part.items()}
        return [finite(inner) for inner in part] if isinstance(part, list | tuple) else part

    return json.dumps(finite(value), allow_nan=False, **options)


def json_object(value: Any, where: str) -> dict[str, Any]:
    """The value as a JSON object. Errors: ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object")
    return value


def json_count(row: dict[str, Any], key: str, where: str) -> int:
    """A whole number of a row. Errors: ValueError."""
    value = row.get(key)
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{where}.{key} must be a whole number from 0 to 2^63 - 1")
    return value


def available_cores() -> int:
    """CPU cores that this process may use: those of its affinity, at most a container's CPU quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


@dataclass
class Run:
    """This process among the ranks: its device and its folder. Only rank 0 writes."""

    rank: int
    world: int  # number of ranks
    local_world: int  # number of ranks on this machine
    device: torch.device
    folder: Path | None = None
    prefix: str = ""  # of the names of files: MODE=eval leaves the training's files alone
    lock: FolderLock | None = None  # of the folder, on rank 0
    lines: dict[str, LineFile] = field(default_factory=dict)  # by the file's name
    kept: dict[str, bytes] = field(default_factory=dict)  # what `finish` writes again where it has vanished
    elsewhere: dict[str, Path] = field(default_factory=dict)  # files that could not be in the folder
    rescue: Path | None = None  # the folder that has them
    lost: set[str] = field(default_factory=set)  # files that could not be written anywhere
    warned: set[str] = field(default_factory=set)  # what a warning was given of, once
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    control: Any = None  # a gloo group for values on the host: broadcasting them never waits for a GPU's queue
    step_end: torch.cuda.Event | None = None  # of the last step that was queued
    running: tuple[str, float] | None = None  # the stage that runs, and when it began
    journal: Journal | None = None  # on rank 0, with CHECKPOINT_EVERY_SECONDS
    checkpoints: Checkpoints | None = None  # on every rank, with CHECKPOINT_EVERY_SECONDS
    attempts: int = 1  # of this run, this one counted
    resumed_at: list[int] = field(default_factory=list)  # steps at which attempts went on from a checkpoint
    resumed_from: str = ""  # another run's checkpoint, by RESUME
    idle_seconds: float = 0.0  # between attempts
    results: dict[str, Any] = field(default_factory=dict)  # what this attempt and earlier ones finished
    artifact_sha256: str = ""  # of the artifact that is scored
    stage: str = "start"  # the one that was entered last
    watchdog: Watchdog | None = None  # where there are several ranks, or torchrun started this one
    hold: SignalHold | None = None  # while a training can still leave a checkpoint
    live: LiveLine = field(default_factory=lambda: LiveLine(sys.stdout))  # on rank 0, what is going on now

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes files."""
        return self.rank == 0

    def log(self, text: str) -> None:
        """Writes a line to stdout and log.txt, on rank 0."""
        if self.is_main:
            self.live.clear()
            if say(text, sys.stdout):
                self.warn("standard output cannot be written; the run goes on, and log.txt has every line")
            self.append("log.txt", text)

    def metric(self, **values: Any) -> None:
        """Writes a line to metrics.jsonl, on rank 0."""
        if self.is_main:
            self.append("metrics.jsonl", to_json(values))

    def seconds_so_far(self) -> dict[str, float]:
        """Seconds by stage, with those of the stage that runs."""
        seconds, running = dict(self.seconds), self.running
        if running:
            name, begin = running
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        return seconds

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a stage, as JSON holds it: computed, or taken from an earlier attempt that finished it."""
        if name not in self.results:
            result = compute()
            self.results = {**self.results, name: result}  # a new one: the journal's thread may be reading the old
            if self.journal:
                self.journal.write()
        return self.results[name]

    def scored(self, stage: str) -> str:
        """The name under which a score of this artifact is kept."""
        return f"{stage} of {self.artifact_sha256}"

    def resumption_rows(self) -> dict[str, Any]:
        """The summary's rows about earlier attempts: how often the run went on, from where, how long it stood still."""
        return dict(
            resumed=self.attempts - 1,
            resumed_at_steps=self.resumed_at,
            resumed_from=self.resumed_from,
            idle_seconds=self.idle_seconds,
        )

    def end_checkpoints(self) -> None:
        """Ends the threads of checkpoints. The files stay for the next attempt."""
        if self.checkpoints:
            self.checkpoints.flush()
            self.checkpoints.pool.shutdown()
        if self.journal:
            self.journal.close()

    def path(self, name: str) -> Path:
        """A file of the run: in its folder, or where it had to be written."""
        if self.folder is None:
            raise RuntimeError("the run has no folder yet")
        return self.elsewhere.get(name, self.folder / name)

    def append(self, name: str, line: str) -> None:
        """Appends a line to a file in the run's folder, if there is one yet. Where that fails, the line waits."""
        if self.folder:
            name = self.prefix + name
            file = self.lines.setdefault(name, LineFile(self.folder / name))
            file.add(line)
            self.flush(name, file)

    def flush(self, name: str, file: LineFile) -> OSError | None:
        """Writes the lines of a file that wait. Returns the error of a failure, about which the first line warns."""
        try:
            self.check_folder(name)
            file.flush()
        except OSError as error:
            if "lines" not in self.warned:
                self.warned.add("lines")
                self.warn(f"{file.path} cannot be written ({error.strerror}); the run goes on and tries again later")
            return error
        return None

    def warn(self, text: str) -> None:
        """A warning on stderr; each text once."""
        if text not in self.warned:
            self.warned.add(text)
            complain(f"warning: {text}")

    def check_folder(self, name: str) -> None:
        """Raises an OSError where the folder, to which a file belongs, is no longer the one that this run locked.

        It was removed or replaced, and may be another run's.
        """
        if name not in self.elsewhere and self.lock and not self.lock.holds():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.stat(self.lock.path)  # a folder that cannot be entered has an error of its own
            raise OSError(errno.ESTALE, "the folder was removed or replaced while the run went on")

    def save(self, name: str, content: bytes | str, patience: float = 0.0) -> Path | None:
        """Writes a file of the run whole, in its folder or, where that fails, in another one, which stderr names.

        Returns its path, or None where no folder takes it, after this many seconds of trying again.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                self.check_folder(name)
                write_atomic(self.path(name), content)
                self.lost.discard(name)
                return self.path(name)
            except OSError as error:
                path = keep_elsewhere(self, name, content, error)
            if path or time.monotonic() >= deadline:
                return path
            self.alive()
            time.sleep(min(5.0, patience / 20))

    def restore(self) -> None:
        """Writes files that this run has kept in memory again, elsewhere, where they or the folder have vanished."""
        for name, content in self.kept.items():
            try:
                self.check_folder(name)
                os.stat(self.path(name))
            except OSError as error:
                keep_elsewhere(self, name, content, error)

    def finish(self) -> bool:
        """Whether rank 0's files are all in the folder. What has vanished or waits in memory is written elsewhere."""
        if not self.folder:
            return True
        self.restore()
        for name, file in self.lines.items():
            error = self.flush(name, file) if file.waiting else None
            path = keep_elsewhere(self, name, bytes(file.waiting), error) if error else None
            if path:
                file.path = path
                file.waiting.clear()
            missing = file.dropped + file.waiting.count(b"\n")
            if missing:
                self.warn(f"{missing} lines of {file.path} are missing")
                self.lost.add(name)
        if len(self.elsewhere) > 1:
            places = ", ".join(str(path) for path in self.elsewhere.values())
            self.warn(f"{self.folder} is not complete; elsewhere are {places}")
        return not self.elsewhere and not self.lost

    def close(self) -> None:
        """Ends the writing and unlocks the folder."""
        self.live.clear()
        self.end_checkpoints()
        self.finish()
        if self.lock:
            self.lock.release()
            self.lock = None

    def broadcast(self, value: float) -> float:
        """Returns rank 0's number on every rank."""
        if self.world == 1:
            return value
        number = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(number, 0, group=self.control)
        return number.item()

    def broadcast_object(self, value: Any) -> Any:
        """Returns rank 0's object, anything that pickles, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    def on_main(self, compute: Callable[[], Any]) -> Any:
        """Rank 0's result of a computation; None on the other ranks, which do not compute.

        Errors: a ConfigError of rank 0 is raised on every rank, so that none waits for one that has ended.
        """
        result = problem = None
        if self.is_main:
            try:
                result = compute()
            except ConfigError as error:
                problem = error.parts
        problem = self.broadcast_object(problem)
        if problem:
            raise ConfigError(*problem)
        return result

    def gather(self, value: Any) -> list[Any]:
        """Returns the objects of all ranks, in their order, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def all_reduce(self, *tensors: Tensor) -> None:
        """Sums tensors over all ranks, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def all_reduce_flat(self, tensors: list[Tensor]) -> None:
        """Sums many tensors over all ranks, in place and in one operation."""
        if self.world == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def wait(self, handle: Any) -> None:
        """Waits for a collective that was started before; None is none."""
        if handle is not None:
            handle.wait()

    def enter(self, stage: str) -> None:
        """Notes the stage that begins, and lets the other ranks know."""
        self.stage = stage
        if self.watchdog:
            self.watchdog.send(kind="stage", stage=stage)

    def alive(self) -> None:
        """Says that this rank does not hang, for a loop that waits for something on purpose."""
        if self.watchdog:
            self.watchdog.effort.since = time.monotonic()

    @property
    def asked(self) -> int:
        """The signal by which a training is asked to end after its step; 0: none."""
        return self.hold.asked if self.hold else 0

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """A context in which an error of this rank ends all ranks, with one line."""
        return self.watchdog.guard() if self.watchdog else contextlib.nullcontext()

    def leave(self) -> None:
        """Ends the work of all ranks together. After an error nobody calls it."""
        self.barrier()  # a rank that leaves early would cut off what others still send
        if self.watchdog:
            self.watchdog.close()
        if self.world > 1:
            dist.destroy_process_group()

    def pace(self) -> None:
        """Waits for the GPU's work of the step before this one: the clock stays right, and the GPU stays busy."""
        if self.device.type == "cuda":
            before, self.step_end = self.step_end, torch.cuda.Event()
            self.step_end.record()
            if before is not None:
                before.synchronize()

    def synchronize(self) -> None:
        """Waits for the GPU, so that a clock read next counts its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> int:
        """Peak memory in bytes: of the GPU's allocator, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def time_second_call(self, compute: Callable[[], Any]) -> float:
        """Seconds of a computation's second call; the first one may compile."""
        for _ in range(2):
            self.synchronize()
            begin = time.perf_counter()
            compute()
            self.synchronize()
        return time.perf_counter() - begin


def keep_elsewhere(run: Run, name: str, content: bytes | str, error: OSError) -> Path | None:
    """Writes a file that cannot be in the run's folder into another one, which stderr names.

    Returns its path, which `Run.path` also gives from now on; None where no folder takes it.
    """
    problem = f"{run.path(name)} cannot be written ({error.strerror})"
    for folder in rescue_folders(run):
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        except OSError:
            for empty in (path.parent, folder):
                with contextlib.suppress(OSError):
                    empty.rmdir()  # fails where there is something in it
            continue
        if folder != run.rescue or name == CONTAINER_FILE:  # `Run.finish` names all of them
            run.warn(f"{problem}: written to {path} instead")
        run.rescue = folder
        run.elsewhere[name] = path
        run.lost.discard(name)
        return path
    run.lost.add(name)
    run.warn(f"{problem}, nor anywhere else")
    return None


def rescue_folders(run: Run) -> Iterator[Path]:
    """Folders for what the run's own one cannot take: the one that was used before, then new ones on other disks.

    Shared memory is the last: it works where every disk is full, and loses what it holds with the next start.
    """
    if run.rescue:
        yield run.rescue
    name = (run.folder.absolute().name if run.folder else "")[:100] or "run"
    for place in (Path.cwd, tempfile.gettempdir, Path.home, lambda: "/dev/shm"):
        try:
            folder = tempfile.mkdtemp(prefix=f"{name}-rescued-", dir=place())  # a new name: nobody waits there
        except (OSError, RuntimeError):  # RuntimeError: a user without a home
            continue
        yield Path(folder)


class Stage:
    """Context manager that adds the seconds of a stage to `Run.seconds`."""

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name

    def __enter__(self) -> None:
        self.run.enter(self.name)
        self.start = time.perf_counter()
        self.run.running = self.name, self.start

    def __exit__(self, *_) -> None:
        self.run.synchronize()
        self.run.running = None
        self.run.seconds[self.name] = self.run.seconds.get(self.name, 0.0) + time.perf_counter() - self.start


class Interrupted(Exception):
    """A signal has ended a training after a step. The text says how to go on; the exit code is the signal's."""

    def __init__(self, number: int, line: str):
        super().__init__(line)
        self.code = 128 + number


class SignalHold:
    """Holds SIGTERM, SIGHUP and Ctrl-C back while a training goes on, which then ends after a step, with a checkpoint.

    A second signal ends the process at once, and so does the first one where no step ends in time. A thread notices
    them, as the main thread may be in a long call: the watchdog where there is one, else one of this class.
    """

    PATIENCE = 25.0  # seconds for the step and its checkpoint: torchrun kills its ranks after 30
    AGAIN = 1.0  # seconds after which a signal is a second one: torchrun repeats a Ctrl-C that its ranks got as well
    LINES: ClassVar[dict[int, str]] = {
        signal.SIGTERM: "error: ended by SIGTERM",
        signal.SIGHUP: "error: ended by SIGHUP",  # the terminal was closed
        signal.SIGINT: "interrupted",
    }

    def __init__(self, run: Run):
        self.run = run
        self.asked, self.since = 0, 0.0  # by which signal, and when
        self.again = False
        self.handlers: dict[int, Any] = {}
        self.thread: threading.Thread | None = None

    def __enter__(self) -> None:
        # Only the main thread can take signals, and there is nothing to wait for without checkpoints.
        if not self.run.checkpoints or threading.current_thread() is not threading.main_thread():
            return
        if not self.run.watchdog:
            self.wakeup, self.bell = socket.socketpair()
            self.bell.setblocking(False)
            self.wakeup_before = signal.set_wakeup_fd(self.bell.fileno(), warn_on_full_buffer=False)
            self.thread = threading.Thread(target=self.watch, name="signals", daemon=True)
            self.thread.start()
        self.run.hold = self
        for number in self.LINES:
            if signal.getsignal(number) != signal.SIG_IGN:  # as for a command in the background
                self.handlers[number] = signal.signal(number, lambda number, frame: None)

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.thread:
            signal.set_wakeup_fd(self.wakeup_before)
            with contextlib.suppress(OSError):
                self.bell.send(b"\0")
            self.thread.join()
            self.wakeup.close()
            self.bell.close()
        if kind is not Interrupted:  # which ends the run: the watchdog need not do it
            self.run.hold = None
            if self.asked:
                os.kill(os.getpid(), self.asked)  # it came after the last step

    def take(self, number: int, now: float) -> None:
        """Notes a signal, of this process or of another rank."""
        self.again = self.again or bool(self.asked) and now - self.since >= self.AGAIN
        if not self.asked:
            self.asked, self.since = number, now

    def overdue(self, now: float) -> int:
        """The signal that ends the process at once; 0: none."""
        return self.asked if self.asked and (self.again or now - self.since > self.PATIENCE) else 0

    def watch(self) -> None:
        """What the thread does in a process without a watchdog."""
        while True:
            if select.select([self.wakeup], [], [], 0.2 if self.asked else None)[0]:
                for number in self.wakeup.recv(64):
                    if not number:
                        return
                    if number in self.LINES:
                        self.take(number, time.monotonic())
            if number := self.overdue(time.monotonic()):
                write_error(self.LINES[number] + "\n")
                os._exit(128 + number)


LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"  # torchrun sets it for its ranks


class RankError(Exception):
    """A rank that did not come to the start of the run; one of the others has printed its line. Exit code 4."""


class RankLimits(NamedTuple):
    """Seconds after which a rank counts as lost. With what follows they stay below a minute."""

    stopped: float = 20.0  # for which its process was in the state that SIGSTOP leaves
    idle: float = 40.0  # for which its main thread neither computed nor waited for other ranks
    silent: float = 45.0  # without a sign of life
    arrival: float = 50.0  # until it joins the others of its machine
    arrival_elsewhere: float = 300.0  # until it joins those of other machines, which may start later
    tick: float = 1.0  # from one report to the next


class Sight(NamedTuple):
    """What a rank knows of a rank, itself included."""

    rank: int
    stage: str
    place: str = ""  # where its main thread is
    dead: bool = False
    stopped: float = 0.0  # seconds, as in RankLimits
    idle: float = 0.0
    silent: float = 0.0


class Verdict(NamedTuple):
    """Why a run ends: the exit code, the line that says so, and the ranks that are lost."""

    code: int
    line: str
    lost: tuple[int, ...] = ()


def judge(sights: Iterable[Sight], limits: RankLimits) -> Verdict | None:
    """The end of a run in which ranks are lost, or None."""
    faults = {}
    for s in sights:
        where = f" (at {s.place})" if s.place else ""
        if s.dead:
            faults[s.rank] = f"rank {s.rank} died in stage {s.stage}"
        elif s.stopped >= limits.stopped:
            faults[s.rank] = f"rank {s.rank} has been stopped for {s.stopped:.0f} s in stage {s.stage}"
        elif s.idle >= limits.idle:
            faults[s.rank] = f"rank {s.rank} has done nothing for {s.idle:.0f} s in stage {s.stage}{where}"
        elif s.silent >= limits.silent:
            faults[s.rank] = f"rank {s.rank} has been silent for {s.silent:.0f} s in stage {s.stage}"
    return Verdict(RANK_LOST, "error: " + "; ".join(faults.values()), tuple(faults)) if faults else None


class ProcessState(NamedTuple):
    """What Linux tells of a process."""

    letter: str  # R, S, D, T (stopped), Z (ended)
    parent: int
    started: str
    cpu: float  # seconds of all its threads

    @classmethod
    def of(cls, folder: str) -> ProcessState | None:
        """The state of a process or thread by its folder in /proc; None where there is none."""
        try:
            with open(f"/proc/{folder}/stat") as file:
                words = file.read().rpartition(")")[2].split()
        except OSError:
            return None
        return cls(words[0], int(words[1]), words[19], (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK"))


def cpu_of_descendants(root: int) -> float:
    """CPU seconds of the processes that descend from one; 0 where there is no /proc."""
    states = {folder.name: ProcessState.of(folder.name) for folder in Path("/proc").glob("[0-9]*")}
    parents = {int(name): state.parent for name, state in states.items() if state}
    total = 0.0
    for name, state in states.items():
        ancestor = parents.get(int(name), 0)
        while ancestor not in (0, root):
            ancestor = parents.get(ancestor, 0)
        total += state.cpu if state and ancestor == root else 0.0
    return total


class Effort:
    """How long the main thread has neither computed nor waited for other ranks; asked on another thread.

    Computing is time on a CPU: its own, that of other threads that may work for it, or of child processes, as of a
    compiler; and bytes read or written, as of files on a slow network. A thread that waits for a GPU spins, so it
    computes. Threads of communication do not count: some spin while a collective is under way, whoever it waits for.
    """

    BACKGROUND = ("pt_nccl", "pt_gloo", "pt_tcpstore", "gloo", "nccl", "cuda")  # names of threads that work for nobody
    CLOCKWORK = ("watchdog", "journal")  # threads of this program that go on whatever the main thread does
    SHARE = 0.01  # of a core, below which is no work

    def __init__(self) -> None:
        self.main = threading.main_thread().ident or 0
        self.own, self.others = 0.0, (0.0, 0)
        self.since = self.checked = time.monotonic()

    def idle(self, now: float) -> tuple[float, str]:
        """Seconds for which it has done nothing, and where it is."""
        frame = sys._current_frames().get(self.main)
        allowed = 0.05 + self.SHARE * (now - self.since)
        own = self.main_cpu()
        if own - self.own > allowed or in_collective(frame):
            self.own, self.since = own, now
        elif now - self.checked > 2:  # dearer to read
            others, self.checked = self.other_work(), now
            if abs(others[0] - self.others[0]) > allowed or others[1] != self.others[1]:
                self.others, self.since = others, now
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {frame.f_code.co_name}" if frame else ""
        return now - self.since, place

    def main_cpu(self) -> float:
        """Seconds of the main thread on a CPU; of the process, where a system does not tell."""
        if hasattr(time, "pthread_getcpuclockid"):
            return time.clock_gettime(time.pthread_getcpuclockid(self.main))
        return time.process_time()

    def other_work(self) -> tuple[float, int]:
        """CPU seconds of threads and children that may work for the main thread, and bytes they read and wrote."""
        clockwork = {str(t.native_id) for t in threading.enumerate() if t.name in self.CLOCKWORK}
        moved = 0
        total = cpu_of_descendants(os.getpid())
        for thread in Path("/proc/self/task").glob("*"):
            with contextlib.suppress(OSError, KeyError):  # it has ended
                state, name = ProcessState.of(f"self/task/{thread.name}"), (thread / "comm").read_text().lower()
                if state and thread.name not in clockwork and not name.startswith(self.BACKGROUND):
                    total += state.cpu
                    rows = dict(line.split(": ") for line in (thread / "io").read_text().splitlines())
                    moved += int(rows["rchar"]) + int(rows["wchar"])
        return total, moved


def waits(code: CodeType) -> bool:
    """Whether a function waits for other ranks, or for the GPU, where a collective may be queued."""
    own = (Run.wait, Run.pace, Run.synchronize)
    return code in [f.__code__ for f in own] or "/torch/distributed/" in code.co_filename.replace(os.sep, "/")


def in_collective(frame: FrameType | None) -> bool:
    """Whether a thread waits for other ranks."""
    while frame is not None and not waits(frame.f_code):
        frame = frame.f_back
    return frame is not None


def from_collective(error: BaseException) -> bool:
    """Whether an exception comes from a collective."""
    trace = error.__traceback__
    while trace is not None and not waits(trace.tb_frame.f_code):
        trace = trace.tb_next
    return trace is not None


class Peer:
    """What this process knows of another rank: its address, its process where that can be seen, its last report."""

    def __init__(self, rank: int, card: dict[str, Any], home: str, master: str, now: float):
        self.rank, self.pid = rank, int(card["pid"])
        self.started = card["started"]  # "" where a system does not tell
        self.local = card["home"] == home  # started by the same process on the same machine
        # A loopback address is that of the machine which all others reach as the master.
        self.address = (master if not self.local and card["host"].startswith("127.") else card["host"], card["port"])
        self.stage, self.place = "start", ""
        self.idle = self.cpu = 0.0
        self.heard = self.running = now  # when it last gave a sign of life, and was last not stopped
        self.reachable = self.local  # whether its datagrams come through
        self.done, self.handle = False, -1
        if self.local and hasattr(os, "pidfd_open"):  # wakes the thread at once when the process ends
            with contextlib.suppress(OSError):
                self.handle = os.pidfd_open(self.pid)

    def sight(self, now: float) -> Sight:
        """What is known of it at this moment."""
        state = ProcessState.of(str(self.pid)) if self.local and self.started else None
        if not state or state.letter != "T":
            self.running = now
        if state and state.cpu - self.cpu > 0.05 + Effort.SHARE * (now - self.heard):
            self.cpu, self.heard = state.cpu, now  # a long call may keep its threads from reporting
        silent = now - self.heard if self.reachable else 0.0
        return Sight(self.rank, self.stage, self.place, self.dead(state), now - self.running, self.idle, silent)

    def dead(self, state: ProcessState | None) -> bool:
        """Whether its process has ended, as far as can be seen from here."""
        if self.local and self.started:
            return state is None or state.letter in "ZX" or state.started != self.started
        if not self.local:
            return False
        try:  # a system without /proc
            os.kill(self.pid, 0)
        except OSError as error:
            return error.errno == errno.ESRCH
        return False

    def kill(self) -> None:
        """Ends its process, if it is on this machine."""
        if self.local and not self.sight(time.monotonic()).dead:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


class Watchdog:
    """A thread that ends this rank when another one is lost, when it hangs itself, or when torchrun is gone.

    Ranks report to each other by datagrams, which never block and need nobody in between. Ranks of one machine see
    each other's processes too. Whoever finds a rank lost tells all; the lowest rank that is left writes the line. The
    main thread mostly waits inside of a collective then, so the process ends without it. A rank that ends by an error
    tells the others first. A single process has no such thread, unless torchrun started it.
    """

    LIMITS = RankLimits()
    LINGER = 5.0  # seconds to wait for another rank's line, or for the main thread after a Ctrl-C
    TERM = 2.0  # seconds in which a SIGTERM may turn out to be torchrun's answer to a lost rank

    def __init__(self, run: Run, environment: Mapping[str, str]):
        self.run, self.limits = run, self.LIMITS
        self.launched, self.parent = LAUNCHER_VARIABLE in environment, os.getppid()
        self.master = environment.get("MASTER_ADDR", "127.0.0.1")
        self.port = rank_variable(environment, "MASTER_PORT", 29500)
        self.wakeup, self.bell = socket.socketpair()
        self.peers: dict[int, Peer] = {}
        self.secret = secrets.token_hex(8)
        self.effort = Effort()
        self.signals: dict[int, float] = {}  # when each came first
        self.asked = 0  # by which signal another rank's training was asked to end
        self.verdict: Verdict | None = None  # of this thread, or of another rank
        self.failure: tuple[Verdict, int, str] | None = None  # of the main thread
        self.spoken = self.closing = False
        self.thread = threading.Thread(target=self.watch, name="watchdog", daemon=True)
        self.socket = self.open_socket()

    # --- Start and end, on the main thread ---

    def open_socket(self) -> socket.socket:
        """A socket for datagrams at the address from which the master is reached. Errors: ConfigError."""
        try:
            family, *_, master = socket.getaddrinfo(self.master, self.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(master)
                self.host = probe.getsockname()[0]
            opened = socket.socket(family, socket.SOCK_DGRAM)
            opened.bind((self.host if self.run.world == self.run.local_world else "", 0))
        except OSError as error:
            raise ConfigError("MASTER_ADDR", self.master, f"cannot be reached ({error.strerror})") from None
        for each in (opened, self.wakeup, self.bell):
            each.setblocking(False)
        return opened

    def open_store(self, environment: Mapping[str, str]) -> Any:
        """The store by which ranks find each other: torchrun's, or rank 0's. Errors: ConfigError, RankError."""
        rank, world = self.run.rank, self.run.world
        agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        hosts = rank == 0 and not agent
        deadline = time.monotonic() + min(self.limits.arrival, 15.0 if agent else math.inf)  # torchrun is there before
        address = (self.master, self.port)
        while not answers(address, listening=hosts):  # the store itself would write a page where nobody answers
            if hosts:
                raise ConfigError("MASTER_PORT", self.port, "rank 0 cannot listen there: is it in use?")
            if time.monotonic() > deadline or self.orphaned():
                line = f"{'torchrun' if agent else 'rank 0'} does not answer at {self.master}:{self.port}"
                if rank == 1 or world == 1:  # the others wait for it as long
                    write_error(f"error: {line}\n")
                raise RankError(line)
            time.sleep(0.1)
        wait = datetime.timedelta(seconds=self.limits.arrival)
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            self.master, self.port, world, hosts, wait, wait_for_workers=False
        )
        prefix = f"train_gpt {environment.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        return dist.PrefixStore(prefix, store)  # pyright: ignore[reportPrivateImportUsage]

    def meet(self, store: Any) -> None:
        """Exchanges the ranks' addresses. Errors: RankError that names those which do not come."""
        run, begin = self.run, time.monotonic()
        state = ProcessState.of(str(os.getpid()))
        card = dict(
            host=self.host,
            port=self.socket.getsockname()[1],
            pid=os.getpid(),
            started=state.started if state else "",
            home=f"{socket.gethostname()} {self.parent}",
            secret=self.secret,
        )
        store.set(f"rank {run.rank}", to_json(card))
        missing = set(range(run.world)) - {run.rank}
        while missing := {rank for rank in missing if not store.check([f"rank {rank}"])}:
            if store.check(["absent"]):
                raise RankError(store.get("absent").decode())
            if absent := self.absent(missing, time.monotonic() - begin):
                line = f"{absent}, says rank {run.rank}"
                if store.compare_set("absent", "", line).decode() == line:
                    write_error(f"error: {line}\n")
                time.sleep(1)  # the store may end with this process, and the others must read that first
                raise RankError(line)
            time.sleep(0.02)
        cards = [json.loads(store.get(f"rank {rank}")) for rank in range(run.world)]
        self.secret, now = cards[0]["secret"], time.monotonic()
        others = [rank for rank in range(run.world) if rank != run.rank]
        self.peers = {rank: Peer(rank, cards[rank], card["home"], self.master, now) for rank in others}

    def absent(self, missing: set[int], waited: float) -> str:
        """Why there is no use in waiting any longer for these ranks; empty where there is."""
        if self.orphaned():
            return "torchrun has ended"
        here = self.run.rank // self.run.local_world
        near = any(rank // self.run.local_world == here for rank in missing)
        if waited < (self.limits.arrival if near else self.limits.arrival_elsewhere):
            return ""
        names = ", ".join(map(str, sorted(missing)))
        return f"rank{'s' if len(missing) > 1 else ''} {names} did not start within {waited:.0f} s"

    def start(self) -> None:
        """Begins to watch. From here on signals reach the thread, whatever the main thread does."""
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.set_wakeup_fd(self.bell.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self.release_signals)
        self.thread.start()

    def release_signals(self) -> None:
        """Gives the signals back, once: also in a forked process, which has its own fate."""
        if not self.closing:
            self.closing = True
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def ring(self) -> None:
        """Wakes the thread."""
        with contextlib.suppress(OSError):
            self.bell.send(b"\0")

    def close(self) -> None:
        """Ends the watch, after this rank's work is done."""
        self.send(kind="done")
        self.release_signals()
        self.ring()
        self.thread.join()
        handles = [peer.handle for peer in self.peers.values() if peer.handle >= 0]
        for handle in handles:
            os.close(handle)
        for each in (self.socket, self.wakeup, self.bell):
            each.close()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Tells the other ranks of an error, and ends the process with its line or traceback."""
        try:
            yield
        except ConfigError as error:
            self.fail(Verdict(2, f"error: {error}"), 2)
            raise
        except Interrupted as error:
            self.fail(Verdict(error.code, str(error)), error.code)
            raise
        except KeyboardInterrupt:
            self.fail(Verdict(130, "interrupted"), 130)
            raise
        except Exception as error:
            if from_collective(error):  # mostly because another rank is lost, which the thread finds out
                near = all(peer.local for peer in self.peers.values())
                self.thread.join(self.LINGER if near else self.limits.silent + self.LINGER)
            rank, text = self.run.rank, " ".join(f"{type(error).__name__}: {error}".split())[:300]
            line = f"error: rank {rank} failed in stage {self.run.stage}: {text}"
            self.fail(Verdict(RANK_LOST, line, (rank,)), 1, traceback.format_exc())
            raise

    def fail(self, verdict: Verdict, code: int, details: str = "") -> None:
        """Leaves the end of this process to the thread; does nothing for a single rank, or where the thread ended."""
        if not self.peers:
            return
        self.failure = verdict, code, details
        self.ring()
        while self.thread.is_alive():
            with contextlib.suppress(KeyboardInterrupt):
                self.thread.join(1)

    # --- The thread ---

    def watch(self) -> None:
        """Looks at signals, processes and datagrams as they come, and at everything else once a tick."""
        poll = select.poll()
        for number in (self.wakeup.fileno(), self.socket.fileno(), *(p.handle for p in self.peers.values())):
            if number >= 0:
                poll.register(number, select.POLLIN)
        last = due = time.monotonic()
        while not self.closing:
            signalled = self.signals or self.run.asked
            ready = {number for number, _ in poll.poll(200 if signalled else 1000 * max(0.0, due - last))}
            now = time.monotonic()
            if now - last > self.limits.tick + 5:
                self.excuse(now - last)
            last = now
            for peer in self.peers.values():
                if peer.handle in ready:
                    poll.unregister(peer.handle)
                    due = now
            self.take_signals(now)
            if now >= due:
                due = now + self.limits.tick
                self.look(now)
            elif self.socket.fileno() in ready:
                self.receive(now)
            self.decide(now)

    def excuse(self, seconds: float) -> None:
        """Nobody is late by the time for which this process itself did not run, as when a machine was suspended."""
        self.effort.since += seconds
        for peer in self.peers.values():
            peer.heard += seconds
            peer.running += seconds

    def take_signals(self, now: float) -> None:
        """Notes signals that came."""
        with contextlib.suppress(OSError):
            for number in self.wakeup.recv(64):
                if number in SignalHold.LINES and self.run.hold:
                    self.run.hold.take(number, now)
                    self.send(kind="asked", number=number)  # all ranks end after the same step
                elif number:  # not by `ring`
                    self.signals.setdefault(number, now)

    def report(self, now: float) -> Sight:
        """Tells the others how this rank is doing, and which ones it knows to be alive."""
        idle, place = self.effort.idle(now)
        sees = [p.rank for p in self.peers.values() if p.local and now - p.heard < 3 * self.limits.tick]
        self.send(kind="report", stage=self.run.stage, idle=idle, place=place, sees=sees)
        return Sight(self.run.rank, self.run.stage, place, idle=idle)

    def look(self, now: float) -> None:
        """Judges all ranks, after what they have sent: one that has said why it ends is not dead."""
        sights = [self.report(now), *(peer.sight(now) for peer in self.peers.values())]
        self.receive(now)
        if self.orphaned():
            self.verdict = Verdict(RANK_LOST, f"error: torchrun has ended, in stage {self.run.stage}")
        elif self.peers and not self.verdict:
            ends = {peer.rank for peer in self.peers.values() if peer.done}
            stages = {peer.rank: peer.stage for peer in self.peers.values()}  # as in its last words
            seen = (s._replace(stage=stages.get(s.rank, s.stage)) for s in sights if s.rank not in ends)
            self.verdict = judge(seen, self.limits)

    def orphaned(self) -> bool:
        """Whether torchrun, which started this process, is gone."""
        return self.launched and os.getppid() != self.parent

    def hand_over(self, now: float) -> None:
        """Gives the training what asks it to end, of this process and of others, also where that came before it."""
        hold, early = self.run.hold, self.signals.get(signal.SIGTERM)
        if hold and early is not None:
            del self.signals[signal.SIGTERM]
            hold.take(signal.SIGTERM, early)
            self.send(kind="asked", number=signal.SIGTERM)
        elif hold and self.asked and not hold.asked:
            hold.take(self.asked, now)

    def decide(self, now: float) -> None:
        """Ends the process where there is a reason to."""
        self.hand_over(now)
        if self.failure:
            self.end(*self.failure)
        elif self.verdict:
            self.end(self.verdict, self.verdict.code)
        elif number := self.run.hold.overdue(now) if self.run.hold else 0:
            self.end(Verdict(128 + number, SignalHold.LINES[number]), 128 + number)
        elif now - self.signals.get(signal.SIGTERM, now) > (self.TERM if self.peers else 0.0):
            self.end(Verdict(128 + signal.SIGTERM, "error: ended by SIGTERM"), 128 + signal.SIGTERM)
        elif now - self.signals.get(signal.SIGINT, now) > self.LINGER:
            self.end(Verdict(130, "interrupted"), 130)

    def send(self, **message: Any) -> None:
        """Sends a message to all other ranks."""
        data = to_json(dict(message, secret=self.secret, rank=self.run.rank)).encode()
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                self.socket.sendto(data, peer.address)

    def receive(self, now: float) -> None:
        """Takes in all messages that have come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    message = json.loads(self.socket.recv(1 << 16))
                    if message["secret"] == self.secret:
                        self.take(message, self.peers[message["rank"]], now)
                except (ValueError, TypeError, KeyError, ConnectionError):  # not from a rank, or to one that has ended
                    continue

    def take(self, message: dict[str, Any], peer: Peer, now: float) -> None:
        """Takes in a rank's message."""
        kind = message["kind"]
        peer.heard, peer.reachable = now, True
        if kind == "report":
            peer.stage, peer.place = message["stage"], message["place"]
            peer.idle = message["idle"]
            for rank in message["sees"]:
                if rank in self.peers and not self.peers[rank].local:
                    self.peers[rank].heard = now
        elif kind == "stage":
            peer.stage = message["stage"]
        elif kind == "asked":
            self.asked = int(message["number"])
        elif kind == "spoken":
            self.spoken = True
        else:
            peer.done = True
            if kind == "verdict" and not self.verdict:
                self.verdict = Verdict(message["code"], message["line"], tuple(message["lost"]))

    def end(self, verdict: Verdict, code: int, details: str = "") -> NoReturn:
        """Ends this process, after one rank has written the line."""
        self.send(kind="verdict", **verdict._asdict())
        write_error(details)
        absent = set(verdict.lost)
        while not self.spoken:
            speaker = min(set(range(self.run.world)) - absent, default=self.run.rank)
            if speaker == self.run.rank:
                self.speak(verdict)
            else:
                self.await_line(self.peers[speaker])
                absent.add(speaker)
        for rank in set(verdict.lost) - {self.run.rank}:
            if not self.peers[rank].done:  # one that said why it ends does so itself; one that is stopped cannot
                self.peers[rank].kill()
        if self.run.lock:
            self.attempt(self.run.lock.release)
        os._exit(code)

    def attempt(self, action: Callable[..., object], *arguments: Any) -> None:
        """Does something that may hang, as where a disk or a reader does not answer; it is not waited for long."""
        thread = threading.Thread(target=action, args=arguments, daemon=True)
        thread.start()
        thread.join(self.TERM)

    def speak(self, verdict: Verdict) -> None:
        """Writes the line, and tells the others."""
        self.attempt(self.write_line, verdict)  # the main thread may hang because nothing can be written
        self.spoken = True
        self.send(kind="spoken")

    def write_line(self, verdict: Verdict) -> None:
        """Writes the line on stderr, and in the log where a rank is lost."""
        write_error(verdict.line + "\n")
        if verdict.code == RANK_LOST:
            with contextlib.suppress(OSError):
                self.run.append("log.txt", verdict.line)

    def await_line(self, speaker: Peer) -> None:
        """Waits until a rank has written the line, or cannot."""
        deadline = time.monotonic() + self.LINGER
        while not self.spoken and time.monotonic() < deadline:
            dead = speaker.sight(time.monotonic()).dead
            self.receive(time.monotonic())
            if dead:
                break
            select.select([self.socket], [], [], 0.1)


def answers(address: tuple[str, int], listening: bool) -> bool:
    """Whether somebody accepts connections there; or for one who will, whether the port is free."""
    try:
        connect = socket.create_server(("", address[1])) if listening else socket.create_connection(address, 2)
        connect.close()
    except OSError:
        return False
    return True


def write_error(text: str) -> None:
    """Writes to stderr past Python's file, whose lock the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))


def join_ranks(run: Run, environment: Mapping[str, str]) -> None:
    """Starts the watchdog, then the process groups. Errors: ConfigError, RankError."""
    # PyTorch is renaming the collectives used here; older versions do not know the new names.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(reduce_scatter|all_gather).*")
    watchdog = Watchdog(run, environment)
    if run.world == 1:
        run.watchdog = watchdog
        watchdog.start()
        return
    store = watchdog.open_store(environment)
    watchdog.meet(store)
    run.watchdog = watchdog
    watchdog.start()
    with run.guard():
        cuda, patience = run.device.type == "cuda", datetime.timedelta(minutes=20)
        store.set_timeout(patience)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=run.rank,
            world_size=run.world,
            timeout=patience,
            device_id=run.device if cuda else None,
        )
        run.control = dist.new_group(backend="gloo")


def rank_variable(environment: Mapping[str, str], name: str, default: int) -> int:
    """A number from torchrun's environment variables. Errors: ConfigError."""
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(name, text, "must be an integer, as torchrun sets it")
    return int(text)


def first_device(config: Config, local: int) -> torch.device:
    """The device of a rank on this machine when it starts. Scores need float64, so MODE=eval never has an Apple GPU."""
    if config.device == "mps":
        return torch.device("cpu" if config.mode == "eval" else "mps")
    return torch.device("cuda", local) if config.device == "cuda" else torch.device("cpu")


def keep_freed_memory(environment: Mapping[str, str]) -> None:
    """Lets GNU's allocator keep up to a GiB that was freed; it does nothing where MALLOC_ variables are set.

    By default it gives large tensors back to the system and takes them anew at each step. The system must then clear
    and map their pages: about 10,000 in a training step of preset `demo`, for 25 ms of CPU time.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in environment):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # other C libraries have none
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        library.mallopt(trim_threshold, 1 << 30)
        library.mallopt(mmap_threshold, 1 << 30)


def start_run(config: Config, environment: dict[str, str]) -> Run:
    """Sets up device, threads and process groups, by torchrun's variables where they are set. Errors: ConfigError."""
    rank = rank_variable(environment, "RANK", 0)
    world = rank_variable(environment, "WORLD_SIZE", 1)
    local = rank_variable(environment, "LOCAL_RANK", 0)
    local_world = rank_variable(environment, "LOCAL_WORLD_SIZE", 1)
    if rank >= world:
        raise ConfigError("RANK", rank, f"must be below WORLD_SIZE={world}, as torchrun sets it")
    if "LOCAL_WORLD_SIZE" in environment and local >= local_world:  # other launchers than torchrun do not set it
        raise ConfigError("LOCAL_RANK", local, f"must be below LOCAL_WORLD_SIZE={local_world}, as torchrun sets it")
    cuda = config.device == "cuda"
    if cuda and torch.cuda.device_count() < local_world:
        raise ConfigError(
            "DEVICE",
            config.device,
            f"{local_world} ranks on this machine need {local_world} CUDA devices, and {torch.cuda.device_count()} are "
            "visible",
        )
    if config.mode != "eval":
        batch_layout(config, world)  # refuses, before anything starts, a number of ranks that does not divide the batch
    if config.device == "mps" and world > 1:
        raise ConfigError("DEVICE", config.device, f"an Apple GPU takes one rank, and there are {world}")
    device = first_device(config, local)
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(config.cpu_threads or max(1, available_cores() // local_world))
        keep_freed_memory(environment)
    run = Run(rank, world, local_world, device)
    run.live = LiveLine(sys.stdout, environment.get("TERM") == "dumb")
    if world > 1 and "MASTER_ADDR" not in environment:
        raise ConfigError("WORLD_SIZE", world, "MASTER_ADDR is not set; start several ranks with torchrun")
    if world > 1 or LAUNCHER_VARIABLE in environment:
        join_ranks(run, environment)
    return run


def versions() -> dict[str, str]:
    """What a reader of a log needs to repeat it."""
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        cuda=torch.version.cuda or "none",
    )


def hardware(run: Run) -> str:
    """Chips of this machine and how many of them the run uses, all machines counted."""
    if run.device.type == "cuda":
        return f"{run.world} x {torch.cuda.get_device_name()}"
    if run.device.type == "mps":
        return f"Apple GPU of {platform.machine()}, 1 rank"
    model = cpu_info("model name") or platform.processor() or platform.machine()
    return f"{available_cores()} cores of {model}, {run.world} rank{'s' if run.world > 1 else ''}"


# ---------------------------------------------------------------------------------------------------------------
# Checkpoint: the run's folder, and what a run that was killed goes on from
# ---------------------------------------------------------------------------------------------------------------

CHECKPOINT_VERSION = 1
MANIFEST_LIMIT, TOKENIZER_LIMIT = 1 << 26, 1 << 28  # bytes that are read of files which may be anybody's
JSON_LIMIT = 1 << 24  # bytes of a checkpoint's table, and of other JSON that is read back
JOURNAL_FILE = "run.json"
TENSOR_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
# Settings that may differ when a run goes on: they change where and how fast it computes, and no result.
OPERATIONAL = ("run_id", "strict", "artifact_dir", "resume", "checkpoint_every_seconds", "cpu_threads", "read_ahead")


def host_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in host memory, not copied where it is contiguous."""
    if not tensor.numel():
        return memoryview(bytearray())  # torch cannot view nothing as bytes
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes tensors of host memory, and a JSON object, aside; then renames the file.

    The form is that of safetensors (huggingface.co/docs/safetensors), so other programs can read it: no pickle. Its
    metadata hold the JSON object, and a SHA-256 of everything else.
    """
    names = {dtype: name for name, dtype in TENSOR_TYPES.items()}
    table: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        table[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, end])
    text = to_json(dict(state))
    digest = tensor_digest(table, text, map(host_bytes, tensors.values()))
    header = json.dumps({"__metadata__": dict(state=text, sha256=digest), **table}, allow_nan=False).encode()
    header += b" " * (-len(header) % 8)
    with written_aside(path) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            file.write(host_bytes(tensor))


def tensor_digest(table: dict[str, Any], state: str, parts: Iterable[Any]) -> str:
    """SHA-256 of a checkpoint file: of its table, its state and its tensors' bytes."""
    digest = hashlib.sha256(json.dumps([table, state], allow_nan=False).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, in host memory, and the JSON object of a file by `write_tensors`. Errors: OSError, ValueError."""
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(min(length, JSON_LIMIT)))
            metadata, ends = table.pop("__metadata__"), [row["data_offsets"][1] for row in table.values()]
            if size != 8 + length + max(ends, default=0):  # before it is read: it may be of any size
                raise ValueError(f"it has {size} bytes")
            data = np.fromfile(file, np.uint8)
        if tensor_digest(table, metadata["state"], [data]) != metadata["sha256"]:
            raise ValueError("its checksum is wrong")
        tensors = {}
        for name, row in table.items():
            begin, end = row["data_offsets"]
            tensors[name] = torch.empty(row["shape"], dtype=TENSOR_TYPES[row["dtype"]])
            host_bytes(tensors[name])[:] = data[begin:end].data
        return tensors, json_object(json.loads(metadata["state"]), "its state")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"is no checkpoint, or a damaged one ({error})") from None


def nonfinite(weights: Iterable[tuple[str, Tensor]]) -> str:
    """The name of the first tensor that holds an infinity or a NaN; empty where none does."""
    return next((name for name, values in weights if not torch.isfinite(values).all()), "")


class Snapshot:
    """Copies of tensors at one moment, for another thread: taking them does not wait for the device."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.copies = {
            name: tensor.detach().clone() if tensor.is_cuda else tensor.detach().to("cpu", copy=True)
            for name, tensor in tensors.items()
        }
        self.device = next((t.device for t in self.copies.values() if t.device.type == "cuda"), None)
        self.taken = None
        if self.device is not None:
            self.taken = torch.cuda.Event()
            self.taken.record(torch.cuda.current_stream(self.device))

    def on_host(self) -> dict[str, Tensor]:
        """The copies in host memory. A GPU sends them on a stream of their own, beside the training's."""
        if self.taken is None:
            return self.copies
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            stream.wait_event(self.taken)
            return {name: copy.cpu() for name, copy in self.copies.items()}


def checkpoint_name(step: int) -> str:
    """The name of the file of a training after so many steps."""
    return f"step-{step:09d}.safetensors"


class Checkpoints:
    """Files that a run goes on from. A thread writes them; a step waits only for the copy of its tensors."""

    def __init__(self, run: Run, folder: Path, every: float):
        self.run, self.folder = run, folder
        self.every = every  # seconds
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: list[Future] = []

    @property
    def busy(self) -> bool:
        """Whether the thread still writes."""
        return any(not future.done() for future in self.pending)

    def save(self, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any], stale: Callable) -> None:
        """Copies the tensors and lets the thread write them. Then it deletes the files that `stale()` lists."""
        self.pending = [future for future in self.pending if not future.done()]
        self.pending.append(self.pool.submit(self.write, name, Snapshot(tensors), dict(state), stale))

    def write(self, name: str, snapshot: Snapshot, state: dict[str, Any], stale: Callable[[], Iterable[Path]]) -> None:
        """What the thread does. Values that are not finite are not written: the last good checkpoint stays."""
        tensors = snapshot.on_host()
        if nonfinite(tensors.items()):
            return
        try:
            self.run.check_folder(name)
            write_tensors(self.folder / name, tensors, state)
            for path in stale():
                path.unlink(missing_ok=True)
        except OSError as error:
            self.run.warn(f"checkpoints in {self.folder} cannot be written ({error.strerror}); the run goes on without")

    def flush(self) -> None:
        """Waits until all checkpoints are on the disk."""
        for future in self.pending:
            future.result()
        self.pending.clear()

    def numbered(self) -> list[Path]:
        """The checkpoints of the training, the newest first."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)


class Journal:
    """What a run has finished and spent so far, on rank 0: in run.json, which a thread writes twice a second.

    The same command, given again after a kill, finds there which results are final, how many seconds count already,
    and when the run was last alive.
    """

    def __init__(self, path: Path, run: Run):
        self.path, self.run = path, run
        self.train_seconds = 0.0
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.keep_writing, name="journal", daemon=True)

    def read(self) -> None:
        """Takes over what an earlier attempt left; its seconds count. Errors: ConfigError for a damaged file."""
        run = self.run
        try:
            left = json_object(json.loads(read_regular(self.path, JSON_LIMIT)), JOURNAL_FILE)
            if left.pop("sha256", "") != hashlib.sha256(to_json(left).encode()).hexdigest():
                raise ValueError("its checksum is wrong")
            run.attempts = left["attempts"] + 1
            run.idle_seconds = left["idle_seconds"] + max(0.0, time.time() - left["alive"])
            run.resumed_at, run.resumed_from = left["resumed_at"], left["resumed_from"]
            run.results = json_object(left["results"], "results")
            run.elsewhere = {name: Path(path) for name, path in left["elsewhere"].items() if Path(path).exists()}
            self.train_seconds = left["train_seconds"]
            for stage, seconds in left["seconds"].items():
                run.seconds[stage] = run.seconds.get(stage, 0.0) + seconds
        except FileNotFoundError:  # the run is new
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(str(self.path), "", f"cannot be gone on from ({error!r}); choose another name") from None

    def start(self) -> None:
        """Writes the file now, and from now on twice a second."""
        self.write()
        self.thread.start()

    def keep_writing(self) -> None:
        """What the thread does."""
        while not self.ended.wait(0.5):
            self.write()

    def write(self) -> None:
        """Writes the file. A disk that refuses it costs only what would have been gone on from."""
        run = self.run
        content = dict(
            attempts=run.attempts,
            idle_seconds=run.idle_seconds,
            resumed_at=run.resumed_at,
            resumed_from=run.resumed_from,
            train_seconds=self.train_seconds,
            elsewhere={name: str(path) for name, path in run.elsewhere.items()},
            seconds=run.seconds_so_far(),
            results=run.results,
            alive=time.time(),
        )
        with self.lock, contextlib.suppress(OSError):
            run.check_folder(JOURNAL_FILE)
            # A wrong digit in a result would otherwise be reported as a score.
            digest = hashlib.sha256(to_json(content).encode()).hexdigest()
            write_atomic(self.path, to_json(dict(content, sha256=digest)) + "\n", durable=False)

    def close(self) -> None:
        """Ends the thread, and writes the file once more if it is still there."""
        if self.thread.is_alive():
            self.ended.set()
            self.thread.join()
            self.write()


def open_folder(run: Run, config: Config) -> None:
    """Creates the run's folder and writes config.json. Errors: ConfigError where the folder cannot be used."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = run.broadcast_object(config.run_id or f"{stamp}-{config.preset}-seed{config.seed}")
    folder = Path(config.artifact_dir or Path("logs") / name)
    problem = run.broadcast_object(folder_problem(run, folder, config) if run.is_main else None)
    if problem:
        raise ConfigError(*problem)
    run.folder, run.prefix = folder, file_prefix(config)
    if run.lock and not run.lock.supported:
        run.warn(f"{folder} is on a file system without locks: nothing keeps a second run from writing there too")
    if config.checkpoint_every_seconds:
        start_checkpoints(run, config)


def file_prefix(config: Config) -> str:
    """What the names of a run's files begin with: an evaluation leaves the training's files alone."""
    return "eval_" if config.mode == "eval" else ""


def checkpoint_folder(folder: Path, config: Config) -> Path:
    """Where a run in this folder has its checkpoints."""
    return folder / (file_prefix(config) + "checkpoint")


def start_checkpoints(run: Run, config: Config) -> None:
    """Gives a run what it needs to be gone on from, and takes over what an earlier attempt finished."""
    folder = checkpoint_folder(run.path(""), config)

    def start_journal() -> None:
        with contextlib.suppress(OSError):  # the first checkpoint that cannot be written is warned of
            folder.mkdir(exist_ok=True)
            for left in folder.glob("*.*.*"):  # what a kill in the middle of writing left aside
                left.unlink()
        journal = Journal(folder / JOURNAL_FILE, run)
        journal.read()
        journal.start()
        run.journal = journal

    run.on_main(start_journal)
    run.attempts, run.results = run.broadcast_object((run.attempts, run.results))
    run.checkpoints = Checkpoints(run, folder, config.checkpoint_every_seconds)


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints that RESUME=PATH names, the newest first: a file, or those of a run's folder."""
    if not os.path.isdir(path):
        return [path] if os.path.isfile(path) else []
    return sorted((*path.glob("step-*.safetensors"), *path.glob("checkpoint/step-*.safetensors")), reverse=True)


def resume_problem(config: Config) -> str:
    """Why RESUME=PATH cannot be gone on from; else an empty string."""
    if config.resume_path is None:
        return ""
    if config.mode == "eval":
        return "must be auto or 0 with MODE=eval"
    problem = "holds no checkpoint, step-*.safetensors"
    for path in checkpoints_at(config.resume_path):
        try:
            read_tensors(path)
            return ""
        except (OSError, ValueError) as error:
            problem = str(error)
    return problem


def cut_off(folder: Path, config: Config) -> bool:
    """Whether the folder holds a run that did not end, and RESUME lets this one go on from it."""
    begun = (checkpoint_folder(folder, config) / JOURNAL_FILE).is_file()
    # Beside a summary too: the checkpoints go last, so the end of the log may be missing.
    return config.resume != "0" and config.checkpoint_every_seconds > 0 and begun


def remove_halves(folder: Path, prefix: str) -> None:
    """Removes what a kill in the middle of writing left aside in a run's folder, which is locked. Errors: OSError."""
    names = f"{prefix}(config\\.json|{re.escape(SUMMARY_FILE)}|scores_[a-z_]+\\.npy)"
    names += "" if prefix else "|" + "|".join(map(re.escape, (CONTAINER_FILE, TOKENIZER_FILE, WEIGHTS_FILE)))
    for path in folder.iterdir():
        if re.fullmatch(f"({names})\\.[a-z0-9_]{{8}}", path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


def recorded(folder: Path, config: Config) -> dict[str, Any]:
    """The settings as config.json holds them: paths of the input are absolute, or relative to the run's folder."""
    names = ("data_path", "tokenizer_path")
    given = {name: path for name in names if (path := getattr(config, name)) and not os.path.isabs(path)}
    here = os.path.realpath(folder)
    paths = {name: os.path.relpath(os.path.realpath(path), here) for name, path in given.items()}
    return dataclasses.asdict(config) | paths


def setting_that_differs(folder: Path, config: Config) -> str:
    """Where a run that was cut off had another setting, which one, and both values; else an empty string."""
    try:
        text = read_regular(folder / (file_prefix(config) + "config.json"), JSON_LIMIT)
        before = json_object(json.loads(text), "config.json")
    except (OSError, ValueError, RecursionError):
        return "its config.json cannot be read"
    for name, value in json.loads(to_json(recorded(folder, config))).items():
        if name not in OPERATIONAL and before.get(name) != value:
            return f"it has {name.upper()}={before.get(name)}, and this one {value}"
    return ""


def folder_problem(run: Run, folder: Path, config: Config) -> tuple[str, str, str] | None:
    """Creates the folder, locks it and writes config.json; for rank 0.

    Returns the arguments of a ConfigError where the folder cannot be used, else None.
    """
    name, prefix = "ARTIFACT_DIR" if config.artifact_dir else "RUN_ID", file_prefix(config)
    problem = resume_problem(config)
    if problem:
        return "RESUME", config.resume, problem
    if config.mode == "eval":
        if not (config.artifact_dir or config.run_id):
            return "RUN_ID", "", "MODE=eval needs RUN_ID or ARTIFACT_DIR, the run whose artifact it scores"
        if not os.path.isfile(folder / CONTAINER_FILE):
            return name, str(folder), f"MODE=eval needs {CONTAINER_FILE} there, which MODE=train writes"
    if "/" in config.run_id or config.run_id in (".", ".."):
        return "RUN_ID", config.run_id, "must be a plain name; ARTIFACT_DIR takes a path"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.lock = FolderLock(folder / (prefix + LOCK_FILE))  # first: a run that is just beginning has no files yet
        taken = config.mode != "eval" and RUN_FILES & {p.name for p in folder.iterdir()}
        goes_on = cut_off(folder, config)
        # Killed right after it had written config.json, a run had not begun anything.
        only_begun = taken and taken <= {"config.json", "checkpoint"} and not any((folder / "checkpoint").glob("*"))
        differs = setting_that_differs(folder, config) if goes_on or only_begun else ""
        if taken and not goes_on and (differs or not only_begun):
            return name, str(folder), "already holds a run, which is never overwritten; choose another name"
        if taken and differs:
            advice = "give its settings again to go on with it, or choose another name"
            return name, str(folder), f"holds a run that was cut off, and {differs}; {advice}"
        if differs or not goes_on:
            shutil.rmtree(checkpoint_folder(folder, config), ignore_errors=True)  # of another evaluation
        remove_halves(folder, prefix)
        write_atomic(folder / (prefix + "config.json"), to_json(recorded(folder, config), indent=1) + "\n")
        # A summary from an earlier evaluation here would stand beside this one's log, also where this one fails.
        (folder / (prefix + SUMMARY_FILE)).unlink(missing_ok=True)
    except BlockingIOError as error:
        return name, str(folder), f"another run writes there now, process {error.strerror}"
    except OSError as error:
        return name, str(folder), f"must be a folder that can be written to ({error.strerror})"
    return None


def remove_checkpoints(run: Run, config: Config) -> None:
    """Removes what a run that has ended does not need any more."""
    run.end_checkpoints()
    with contextlib.suppress(OSError):
        run.check_folder("checkpoint")
        folder = checkpoint_folder(run.path(""), config)
        for path in folder.iterdir():
            if path.name != JOURNAL_FILE:  # which goes last
                path.unlink()
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------
# Data: shards -> documents -> batches, a pure function of (seed, step), whatever the number of ranks
# ---------------------------------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 1024
OPEN_SHARDS = 128  # files: FineWeb's 10 billion tokens have 103, and a process may often have 1024
SCAN_BLOCK = 1 << 16  # tokens that are checked together: they stay in a core's cache
DOCUMENT_INDEX = "fineweb_train_documents.safetensors"
PACK_WINDOW = 4096  # sequences that are packed together
PACK_BLOCK = 1 << 20  # documents whose lengths are added up at once
CONTEXT_SAMPLE = 1024  # sequences from which the mean context is taken
WINDOW = 50  # tokens of a window, by which a leak audit (data/audit.py) compares validation with training


class Documents(NamedTuple):
    """Where the documents of a batch begin, in the two forms that attention backends take."""

    starts: Tensor  # [B, T] int32: for every token, the position in its sequence where its document begins
    cu_seqlens: Tensor  # [n + 1] int32: where each document begins in the flattened batch, then B*T up to the end


class EmbeddingNoise(NamedTuple):
    """Uniform noise in [-reach, reach) on a batch's embeddings. A graph makes it from keys, where it is added."""

    keys: Tensor  # [B, 2] int32, for each sequence
    reach: float


class Batch(NamedTuple):
    """Sequences of tokens, the token after each, and the documents that they belong to."""

    ids: Tensor  # [B, T] int64
    targets: Tensor  # [B, T] int64
    documents: Documents


class FileStamp(NamedTuple):
    """What changes when a file is rewritten."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path | int) -> FileStamp | None:
        """The stamp of a file, by its path or descriptor, or None where there is no such file."""
        try:
            status = os.stat(path)
        except OSError:
            return None
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def unreadable(path: Path, error: OSError) -> ConfigError:
    """The error of a file that cannot be read."""
    return ConfigError(str(path), "", f"cannot be read ({error.strerror or error})")


def is_input(path: Path) -> bool:
    """Whether there is such a file. Errors: ConfigError where that cannot be known, since what it holds would count."""
    try:
        return path.is_file()
    except OSError as error:
        raise unreadable(path, error) from None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """A context in which a file is read. Errors: ConfigError that names it, for an OSError."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from None


class InputFile:
    """A file that any thread reads at any position. It is closed with its last user.

    A memory map would be no faster, and a file that becomes shorter, or that cannot be read, would end the process
    without a word. Errors: ConfigError that names the file.
    """

    def __init__(self, path: Path, stamp: FileStamp | None = None):
        self.path, self.handle = path, -1
        try:
            with reading(path):
                self.handle = open_regular(path)
        except ValueError:
            raise ConfigError(str(path), "", "is not a regular file") from None
        if stamp not in (None, FileStamp.of(self.handle)):
            raise ConfigError(str(path), "", "was rewritten during the run: run it again on files that stay")

    def __del__(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)

    def read(self, offset: int, count: int, kind: str = "<u2") -> np.ndarray:
        """Numbers of a NumPy type from a byte offset on, [count]."""
        numbers = np.empty(count, kind)
        buffer, done = numbers.data.cast("B"), 0
        while done < len(buffer):
            try:  # not `reading`, which would take as long as the read
                got = os.preadv(self.handle, [buffer[done:]], offset + done)
            except OSError as error:
                raise unreadable(self.path, error) from None
            if not got:
                size, wanted = os.fstat(self.handle).st_size, offset + len(buffer)
                raise ConfigError(str(self.path), "", f"has {size} bytes, and {wanted} are needed: it was cut off")
            done += got
        return numbers


class ShardHeader(NamedTuple):
    """The first three of a shard's 256 little-endian int32 numbers; the others are not used."""

    magic: int
    version: int
    tokens: int

    @classmethod
    def read(cls, path: Path) -> ShardHeader:
        """The header of a file that is a whole shard. Errors: ConfigError naming the file."""
        return cls.of(InputFile(path))

    @classmethod
    def of(cls, file: InputFile) -> ShardHeader:
        """The header of an open file that is a whole shard. Errors: ConfigError naming the file."""
        with reading(file.path):
            size = os.fstat(file.handle).st_size
        whole = size >= SHARD_HEADER_BYTES
        header = cls(*file.read(0, 3, "<i4").tolist()) if whole else cls(0, 0, 0)
        header.check(file.path, size)
        return header

    def check(self, path: Path, actual: int) -> None:
        """Holds the header against the format and the file's size. Errors: ConfigError naming the file."""
        if self.magic != SHARD_MAGIC or self.version != SHARD_VERSION:
            raise ConfigError(
                str(path), "", f"is not a token shard: its header must start with {SHARD_MAGIC}, {SHARD_VERSION}"
            )
        expected = SHARD_HEADER_BYTES + 2 * self.tokens
        if self.tokens < 0 or actual != expected:
            raise ConfigError(
                str(path),
                "",
                f"is damaged: {self.tokens} tokens, as its header says, take {expected} bytes, but it has {actual}",
            )


class Shard:
    """The tokens of a shard, read when a slice of them is asked for. Errors: ConfigError naming the file."""

    def __init__(self, path: Path, opened: Callable[[Path, FileStamp | None], InputFile], stamp: FileStamp | None):
        self.path, self.stamp = path, stamp
        self.opened = opened
        self.tokens = ShardHeader.of(opened(path, stamp)).tokens

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """[n] uint16."""
        start, stop, _ = part.indices(self.tokens)
        file = self.opened(self.path, self.stamp)
        return file.read(SHARD_HEADER_BYTES + 2 * start, max(0, stop - start))


def open_shard(path: Path) -> np.ndarray:
    """All tokens of a shard, [n] uint16. Errors: ConfigError naming the file."""
    return Shard(path, InputFile, FileStamp.of(path))[:]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits. Errors: ConfigError naming the file."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sidecar_path(shard: Path) -> Path:
    """The file with a shard's byte counts: fineweb_val_bytes_000000.bin beside fineweb_val_000000.bin."""
    head, _, number = shard.name.rpartition("_")
    return shard.with_name(f"{head}_bytes_{number}")


def shard_paths(config: Config, split: str) -> list[Path]:
    """The shards of a split, in order. Errors: ConfigError where there are none."""
    pattern = f"fineweb_{split}_[0-9]*.bin"  # not the sidecars, fineweb_val_bytes_*
    folder = Path(config.data_path)
    try:
        os.listdir(folder)  # `glob` takes a folder that cannot be read as an empty one
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError("DATA_PATH", config.data_path, f"cannot be read ({error.strerror})") from None
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise ConfigError(
            "DATA_PATH",
            config.data_path,
            f"holds no {pattern}; `python data/prepare.py builtin --out "
            f"{config.data_path} --vocab-size {config.vocab_size}` makes such shards "
            "from built-in text",
        )
    return paths


class TokenStream:
    """All shards of a split as one sequence of tokens. Errors: ConfigError naming a file that cannot be read."""

    def __init__(self, config: Config, split: str):
        self.paths = shard_paths(config, split)
        self.vocab_size = config.vocab_size
        self.stamps = {path: FileStamp.of(path) for path in self.paths}  # before anything is read
        # A file that is open stays what it was when another takes its name.
        opened = functools.lru_cache(maxsize=OPEN_SHARDS)(InputFile)
        self.shards = [Shard(path, opened, stamp) for path, stamp in self.stamps.items()]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        if len(self) < 2:
            raise ConfigError(
                "DATA_PATH", config.data_path, f"its {split} shards hold {len(self)} tokens, and 2 are needed"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1, [n] uint16."""
        parts, shard = [], int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            offset = start - int(self.starts[shard])
            part = self.shards[shard][offset : offset + stop - start]
            parts.append(part)
            start, shard = start + len(part), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_known(self, start: int, stop: int) -> np.ndarray:
        """`read`, for shards that may have been rewritten since they were checked.

        Errors: ConfigError naming a file with a token that is not in the vocabulary.
        """
        tokens = self.read(start, stop)
        if tokens.max() >= self.vocab_size:
            place = start + int(tokens.argmax())
            path = self.paths[int(np.searchsorted(self.starts, place, side="right")) - 1]
            allowed = f"holds token id {tokens.max()}, and VOCAB_SIZE={self.vocab_size} needs ids below it"
            raise ConfigError(str(path), "", f"was rewritten during the run: it {allowed}")
        return tokens


def document_starts(ids: np.ndarray, cuts: np.ndarray | None = None) -> np.ndarray:
    """[B, T] tokens -> [B, T] int32: where in its sequence each token's document begins (0 for one that is cut).

    `cuts` [B, T] are further places where one begins, or what is left of one.
    """
    begins = ids == BOS_ID
    begins[:, 0] = True
    if cuts is not None:
        begins |= cuts
    places = np.flatnonzero(begins)
    starts = np.repeat((places % ids.shape[1]).astype(np.int32), np.diff(places, append=ids.size))
    return starts.reshape(ids.shape)


class Prefetcher:
    """Prepares on a thread of its own what will probably be asked for next, while the caller works.

    `make(key)` must be a pure function of the key, and `following(key)` guesses the key that is asked for next. Any
    key may be asked for: one that was not guessed is made on request. An exception on the thread is raised where its
    key is asked for. With a depth of 0 there is no thread. The thread first calls `initializer`, and ends with this
    object.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        following: Callable[[Any], Any],
        depth: int,
        initializer: Callable[[], None] | None = None,
    ):
        self.make, self.following = make, following
        self.depth = depth
        self.pool = ThreadPoolExecutor(1, "read-ahead", initializer) if depth else None
        self.pending: dict[Any, Future] = {}

    def __call__(self, key: Any) -> Any:
        if self.pool is None:
            return self.make(key)
        future = self.pending.pop(key, None)
        wanted, later = [], key
        for _ in range(self.depth):
            wanted.append(later := self.following(later))
        for stale in self.pending.keys() - set(wanted):
            self.pending.pop(stale).cancel()
        future = future or self.pool.submit(self.make, key)
        for later in wanted:
            if later not in self.pending:
                self.pending[later] = self.pool.submit(self.make, later)
        return future.result()

    def close(self) -> None:
        """Ends the thread; from then on everything is made on request."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        self.pool, self.pending = None, {}


def core_share(config: Config, run: Run) -> int:
    """A rank's share of the machine's cores: the threads that read shards and look for hints."""
    return config.cpu_threads or max(1, available_cores() // run.local_world)


def within_context(starts: np.ndarray, context: int) -> np.ndarray:
    """[B, T] document starts of documents that are cut wherever they have held `context` tokens."""
    positions = np.arange(starts.shape[1], dtype=np.int32) - starts
    return starts + positions // context * context


def find_documents(stream: TokenStream, threads: int) -> np.ndarray:
    """Where the documents of a stream begin, [n] int64; what comes before the first BOS counts as one."""

    def of_shard(number: int) -> np.ndarray:
        shard, places = stream.shards[number], []
        for offset in range(0, len(shard), SCAN_BLOCK):
            places.append(np.flatnonzero(shard[offset : offset + SCAN_BLOCK] == BOS_ID) + offset)
        return np.concatenate(places, dtype=np.int64) + stream.starts[number] if places else np.empty(0, np.int64)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        starts = np.concatenate(list(pool.map(of_shard, range(len(stream.shards)))))
    return starts if len(starts) and not starts[0] else np.insert(starts, 0, 0)


class DocumentIndex:
    """Where the training documents begin, in a file beside the shards: looking for them takes a pass over all tokens.

    The file names the SHA-256 of every shard that it was made from, and is made again where one differs.
    """

    def __init__(self, stream: TokenStream, digests: Mapping[str, str], run: Run, threads: int):
        self.stream, self.run = stream, run
        self.threads = threads
        self.path = stream.paths[0].with_name(DOCUMENT_INDEX)
        self.state = dict(version=1, shards={path.name: digests[path.name] for path in stream.paths})

    def read(self) -> np.ndarray | None:
        """The starts, or None where the file is missing, damaged, or of other shards."""
        try:
            tensors, state = read_tensors(self.path)
            return tensors["starts"].numpy() if state == self.state else None
        except (OSError, ValueError, KeyError):
            return None

    def write(self, starts: np.ndarray) -> str:
        """Writes the file. Returns why that cannot be done, or an empty string: then each rank counts for itself."""
        try:
            write_tensors(self.path, dict(starts=torch.from_numpy(starts)), self.state)
        except OSError as error:
            return error.strerror or type(error).__name__
        return ""

    def load(self) -> tuple[np.ndarray, str]:
        """(starts, the log's line). A rank of each machine makes the file if need be; every rank calls this."""
        starts, problem = self.read(), ""
        made = starts is None and self.run.rank % self.run.local_world == 0
        if made:
            starts = find_documents(self.stream, self.threads)
            problem = self.write(starts)
        problems = self.run.gather(problem)
        if starts is None:
            starts = self.read()
        if starts is None:
            starts = find_documents(self.stream, self.threads)
        how = f"{'made' if made else 'read'}: {self.path}"
        if problems[0]:
            how = f"not kept in {self.path} ({problems[0]})"
        return starts, f"document index: {len(starts)} documents, {how}"


def pack_pieces(lengths: np.ndarray, sequences: int, length: int) -> np.ndarray:
    """Packs pieces of text into sequences of `length` tokens without gaps, and cuts as few of them as it can.

    The longest piece first, into the fullest sequence that has room for it (best fit, as in arXiv 2404.10830). Where
    there is none, parts of pieces fill what is left. The pieces must fill the sequences exactly.
    Returns [parts, 4]: a part's sequence, its piece, where in the piece it begins, and its tokens.
    """
    room: list[tuple[int, int]] = []  # (tokens, sequence) of those that are begun and not full, in order
    begun, parts = 0, []
    for piece in np.argsort(-lengths, kind="stable").tolist():
        first, left = 0, int(lengths[piece])
        while left:
            place = bisect.bisect_left(room, (left, -1))
            if place == len(room) and begun < sequences:
                free, sequence = length, begun
                begun += 1
            else:
                free, sequence = room.pop(min(place, len(room) - 1))
            tokens = min(free, left)
            parts.append((sequence, piece, first, tokens))
            first, left = first + tokens, left - tokens
            if free > tokens:
                bisect.insort(room, (free - tokens, sequence))
    return np.array(parts, dtype=np.int64)


class PackedWindow(NamedTuple):
    """Sequences that were packed together: parts of documents, those of a sequence one after the other."""

    starts: np.ndarray  # int64: where in the stream each part begins
    lengths: np.ndarray  # int64, in tokens
    bounds: np.ndarray  # the parts of sequence i are those from bounds[i] to bounds[i + 1]


class DocumentOrder:
    """DATA_ORDER=documents: each epoch all documents in a new random order, packed into sequences without gaps.

    A document that exceeds the context is cut into pieces, each with a place of its own in the order: a batch should
    hold many documents. The pieces, in that order, form one long text. Every PACK_WINDOW sequences of it are packed for
    themselves and shuffled, so any sequence can be had without those before it. Where a window ends, or a sequence
    could not be filled otherwise, a piece is cut. Nothing depends on ranks or batches.
    """

    def __init__(self, starts: np.ndarray, tokens: int, length: int, seed: int):
        """`starts` of the documents in a stream of which the first `tokens` have a successor."""
        self.starts = np.append(starts[starts < tokens], tokens)
        self.length, self.seed = length, seed
        self.sequences = tokens // length
        self.pieces = functools.lru_cache(maxsize=1)(self.cut_documents)
        self.epoch = functools.lru_cache(maxsize=2)(self.draw_epoch)
        self.window = functools.lru_cache(maxsize=4)(self.pack_window)

    def cut_documents(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths) of all documents in pieces of at most one context, in the order of the stream."""
        counts = -(-np.diff(self.starts) // context)
        first = np.cumsum(counts) - counts  # each document's first piece
        begins = np.repeat(self.starts[:-1] - context * first, counts)
        begins += context * np.arange(len(begins))
        lengths = np.diff(begins, append=self.starts[-1])
        return begins, lengths.astype(np.min_scalar_type(context))  # small numbers: they are read in a random order

    def draw_epoch(self, epoch: int, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pieces in their order, and for each window its first one's place there and how much of it is over)."""
        _, lengths = self.pieces(context)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(lengths)).astype(np.uint32)
        cuts = np.arange(0, self.sequences, PACK_WINDOW) * self.length
        firsts, used = np.empty_like(cuts), np.empty_like(cuts)
        total = 0
        for block in range(0, len(order), PACK_BLOCK):  # in blocks: the memory stays small for any number of them
            ends = total + np.cumsum(lengths[order[block : block + PACK_BLOCK]], dtype=np.int64)
            here = slice(*np.searchsorted(cuts, [total, ends[-1]]))
            places = np.searchsorted(ends, cuts[here], side="right")
            firsts[here] = block + places
            used[here] = cuts[here] - np.append(total, ends)[places]
            total = int(ends[-1])
        return order, firsts, used

    def pack_window(self, epoch: int, window: int, context: int) -> PackedWindow:
        """The sequences of a window, for documents that are cut where they exceed a context."""
        order, firsts, used = self.epoch(epoch, context)
        sequences = min(PACK_WINDOW, self.sequences - window * PACK_WINDOW)
        tokens = sequences * self.length
        last = firsts[window + 1] + 1 if window + 1 < len(firsts) else len(order)
        begins, lengths = (column[order[firsts[window] : last]].astype(np.int64) for column in self.pieces(context))
        begins[0] += used[window]
        lengths[0] -= used[window]
        totals = np.cumsum(lengths)
        n = int(np.searchsorted(totals, tokens)) + 1
        begins, lengths = begins[:n], lengths[:n]
        lengths[-1] -= totals[n - 1] - tokens
        parts = pack_pieces(lengths, sequences, self.length)
        parts[:, 0] = np.random.default_rng([self.seed, epoch, window]).permutation(sequences)[parts[:, 0]]
        parts = parts[np.argsort(parts[:, 0], kind="stable")]
        bounds = np.searchsorted(parts[:, 0], np.arange(sequences + 1))
        return PackedWindow(begins[parts[:, 1]] + parts[:, 2], parts[:, 3], bounds)

    def parts(self, epoch: int, place: int, context: int) -> list[tuple[int, int]]:
        """(start in the stream, tokens) of each part of a sequence."""
        window, place = divmod(place, PACK_WINDOW)
        packed = self.window(epoch, window, context)
        own = slice(packed.bounds[place], packed.bounds[place + 1])
        return list(zip(packed.starts[own].tolist(), packed.lengths[own].tolist(), strict=True))


class TrainLoader:
    """Batches of training sequences, T tokens each, in the order that DATA_ORDER says.

    A batch depends on nothing but the seed, the step, the context and the number of sequences in a step. So warmup has
    nothing to rewind, a resumed run goes on exactly where it was, and the number of ranks changes only who reads what;
    with DATA_ORDER=stream it also changes which documents are cut, as a micro-batch is one piece of the stream.
    """

    def __init__(self, config: Config, run: Run):
        self.config, self.run = config, run
        self.stream = TokenStream(config, "train")
        self.layout = batch_layout(config, run.world)
        shards = min(config.train_shard_limit or len(self.stream.shards), len(self.stream.shards))
        self.length = int(self.stream.starts[shards])  # tokens to learn from
        self.sequences = (self.length - 1) // config.train_seq_len
        if self.sequences < 1:
            raise ConfigError(
                "TRAIN_SEQ_LEN",
                config.train_seq_len,
                f"the training shards in DATA_PATH={config.data_path} hold only {self.length} tokens",
            )
        self.order = functools.lru_cache(maxsize=2)(self.epoch_order)  # two, as a batch may span two epochs
        self.notes: list[str] = []  # for the log, once there is one
        if shards < len(self.stream.shards):
            self.notes.append(f"TRAIN_SHARD_LIMIT={shards}: {self.length} of {len(self.stream)} training tokens")
        # A thread pins memory for its own current device, which is the first one unless it is set.
        device = functools.partial(torch.cuda.set_device, run.device) if run.device.type == "cuda" else None
        self.ahead = Prefetcher(self.read, self.following, config.read_ahead, device)
        self.data_stall = 0.0  # seconds for which steps waited in `batch`

    def epoch_order(self, epoch: int) -> np.ndarray:
        """All rows of the stream in the order of an epoch."""
        return np.random.default_rng([self.config.seed, epoch]).permutation(self.sequences)

    @functools.cached_property
    def documents(self) -> DocumentOrder:
        """The order of DATA_ORDER=documents, of an index that is not kept."""
        return self.new_documents(find_documents(self.stream, core_share(self.config, self.run)))

    def new_documents(self, starts: np.ndarray) -> DocumentOrder:
        """The order of documents that start there in the stream."""
        starts = starts[starts < self.length - 1]
        return DocumentOrder(starts, self.length - 1, self.config.train_seq_len, self.config.seed)

    def use_index(self, digests: Mapping[str, str]) -> None:
        """Takes the documents from the index beside the shards, whose SHA-256 are given by name. Call on all ranks."""
        threads = core_share(self.config, self.run)
        starts, note = DocumentIndex(self.stream, digests, self.run, threads).load()
        self.documents = self.new_documents(starts)
        self.notes.append(note)

    def parts(self, position: int, context: int) -> list[tuple[int, int]]:
        """(start in the stream, tokens) of each part of the sequence at a position in the endless order of epochs."""
        epoch, place = divmod(position, self.sequences)
        if self.config.data_order == "documents":
            return self.documents.parts(epoch, place, context)
        row = place if self.config.data_order == "stream" else int(self.order(epoch)[place])
        return [(row * self.config.train_seq_len, self.config.train_seq_len)]

    def sequence_numbers(self, step: int, micro: int) -> range:
        """Positions in the order of epochs that this rank computes in a micro-step."""
        _, world, _, micro_sequences = self.layout
        first = step * self.layout.sequences + (micro * world + self.run.rank) * micro_sequences
        return range(first, first + micro_sequences)

    def following(self, place: tuple[int, int, int]) -> tuple[int, int, int]:
        """The (step, micro-step, context) after this one."""
        step, micro, context = place
        return (step, micro + 1, context) if micro + 1 < self.layout.micro_steps else (step + 1, 0, context)

    def batch(self, step: int, micro: int, context: int | None = None) -> Batch:
        """This rank's sequences of one micro-step, on its device; the next ones are read ahead.

        A token's context is at most `context` tokens (None: TRAIN_SEQ_LEN).
        """
        begin = time.perf_counter()
        batch = self.ahead((step, micro, context or self.config.train_seq_len))
        self.data_stall += time.perf_counter() - begin
        return send(batch, self.run.device)

    def read(self, place: tuple[int, ...]) -> Batch:
        """The sequences of a (step, micro-step), with a context as in `batch` or without, in host memory."""
        step, micro, *context = place
        return self.read_sequences(self.sequence_numbers(step, micro), *context)

    def read_sequences(self, positions: range, context: int | None = None) -> Batch:
        """The sequences at these positions in the order of epochs, in host memory: [B, T], or [1, B*T] of a stream."""
        length = self.config.train_seq_len
        context = context or length
        ids, targets = (np.empty((len(positions), length), np.int64) for _ in range(2))
        cuts = np.zeros(ids.shape, bool)
        end = -1  # of what was read last, in the stream
        for row, position in enumerate(positions):
            place = 0
            for start, count in self.parts(position, context):
                tokens = self.stream.read_known(start, start + count + 1)
                own = row, slice(place, place + count)
                ids[own], targets[own] = tokens[:-1], tokens[1:]
                cuts[row, place] = start != end
                place, end = place + count, start + count
        if self.config.data_order == "stream":
            ids, targets, cuts = (array.reshape(1, -1) for array in (ids, targets, cuts))
        starts = within_context(document_starts(ids, cuts), context)
        return host_batch(ids, targets, starts, self.run.device)

    def mean_context(self, context: int | None = None) -> float:
        """Mean number of tokens that a token sees, itself included, in the first sequences of the order."""
        starts = self.read_sequences(range(min(self.sequences, CONTEXT_SAMPLE)), context).documents.starts.numpy()
        return float(np.mean(np.arange(1, starts.shape[1] + 1) - starts))

    def noise_keys(self, positions: range) -> Tensor:
        """Keys [B, 2] int32 for the noise of sequences, by the seed and their positions alone.

        So noise is the same on any number of ranks.
        """
        keys = [
            np.random.SeedSequence([self.config.seed, position]).generate_state(2, np.uint32).view(np.int32)
            for position in positions
        ]
        return send_array(np.stack(keys), self.run.device)

    def noise(self, step: int, micro: int) -> EmbeddingNoise | None:
        """NEFTune's noise for the inputs of a micro-step (arXiv 2310.05914), or None if NEFTUNE_ALPHA=0."""
        config = self.config
        if not config.neftune_alpha:
            return None
        reach = config.neftune_alpha / math.sqrt(config.train_seq_len * config.model_dim)
        return EmbeddingNoise(self.noise_keys(self.sequence_numbers(step, micro)), reach)


def as_padding(batch: Batch) -> Batch:
    """A batch of the same shape with padding (token 0) for text: to measure what learning costs, without learning."""
    return Batch(torch.zeros_like(batch.ids), torch.zeros_like(batch.targets), batch.documents)


def cu_seqlens_of(starts: np.ndarray) -> np.ndarray:
    """[B, T] starts -> [n + 1] int32 cumulative sequence lengths of the n documents in the flattened batch.

    No padding: FlashAttention launches programs for each sequence that is listed, empty or not. Of a document that
    begins before its row, which starts below 0, the row holds a part.
    """
    flat = np.flatnonzero(np.maximum(starts, 0) == np.arange(starts.shape[1]))
    return np.append(flat, starts.size).astype(np.int32)


def host_batch(ids: np.ndarray, targets: np.ndarray, starts: np.ndarray, device: torch.device) -> Batch:
    """Arrays [B, T] -> a Batch in host memory, pinned where the device is a GPU."""
    arrays = (ids, targets, starts, cu_seqlens_of(starts))
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return Batch(tensors[0], tensors[1], Documents(tensors[2], tensors[3]))


def send(batch: Batch, device: torch.device) -> Batch:
    """A Batch on the device; the copy to a GPU does not block."""
    tensors = [tensor.to(device, non_blocking=device.type == "cuda") for tensor in (*batch[:2], *batch.documents)]
    if device.type == "cuda":  # one graph for any number of documents
        torch._dynamo.mark_dynamic(tensors[3], 0)
    return Batch(tensors[0], tensors[1], Documents(tensors[2], tensors[3]))


def send_array(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on the device; the copy to a GPU does not block."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_device(ids: np.ndarray, targets: np.ndarray, starts: np.ndarray, device: torch.device) -> Batch:
    """Arrays [B, T] -> a Batch on the device."""
    return send(host_batch(ids, targets, starts, device), device)


# The manifest. Its rows check themselves: each raises a ValueError that says where in the file something is wrong.


def json_digest(value: Any, where: str) -> str:
    """A SHA-256. Errors: ValueError."""
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{where} must be a SHA-256 of 64 hexadecimal digits")
    return value


def json_file_name(value: Any, where: str) -> str:
    """The name of a file beside the manifest. Errors: ValueError."""
    if not isinstance(value, str) or not value.removesuffix(".bin").isidentifier() or len(value) > 200:
        raise ValueError(f"{where} must be the name of a shard, such as fineweb_train_000000.bin")
    return value


@dataclass(frozen=True)
class ExpectedCounts:
    """What the manifest says of a split or of one of its files; None and "" stand for what it does not say."""

    tokens: int | None
    documents: int | None
    bytes: int | None
    sha256: str

    @classmethod
    def parse(cls, value: Any, where: str) -> ExpectedCounts:
        """Errors: ValueError."""
        row = json_object(value, where)
        counts = [json_count(row, key, where) if key in row else None for key in ("tokens", "documents", "bytes")]
        return cls(*counts, sha256=json_digest(row["sha256"], f"{where}.sha256") if "sha256" in row else "")


@dataclass(frozen=True)
class ManifestSplit:
    """What the manifest says of a split, and of each of its shards and sidecars by name."""

    counts: ExpectedCounts
    files: dict[str, ExpectedCounts]

    @classmethod
    def parse(cls, value: Any, where: str) -> ManifestSplit:
        """Errors: ValueError."""
        row, files = json_object(value, where), {}
        for key in ("shards", "sidecars"):
            rows = row.get(key, [])
            if not isinstance(rows, list):
                raise ValueError(f"{where}.{key} must be a list")
            for number, item in enumerate(rows):
                place = f"{where}.{key}[{number}]"
                name = json_file_name(json_object(item, place).get("file"), f"{place}.file")
                files[name] = ExpectedCounts.parse(item, place)
        return cls(ExpectedCounts.parse(row, where), files)


class SharedWindows(NamedTuple):
    """How many of the validation windows of WINDOW tokens training holds too, and in how many documents they are."""

    length: int
    of: int
    shared: int
    documents: int

    @classmethod
    def parse(cls, value: Any, where: str) -> SharedWindows:
        """Errors: ValueError."""
        row = json_object(value, where)
        windows = cls(*(json_count(row, key, where) for key in cls._fields))
        if windows.length != WINDOW:
            raise ValueError(f"{where}.length must be {WINDOW}")
        if windows.shared > windows.of:
            raise ValueError(f"{where}.shared must be at most {where}.of")
        return windows

    @property
    def share(self) -> float:
        """Shared windows as a fraction of all."""
        return self.shared / self.of if self.of else 0.0


@dataclass(frozen=True)
class LeakAudit:
    """What data/audit.py found of validation in the training shards, and the SHA-256 of every file that it read."""

    shared_documents: int
    shared_copies: int
    windows: SharedWindows
    sha256: dict[str, str]

    @classmethod
    def parse(cls, value: Any, where: str) -> LeakAudit:
        """Errors: ValueError."""
        row = json_object(value, where)
        digests = json_object(row.get("sha256"), f"{where}.sha256")
        for name, digest in digests.items():
            json_file_name(name, f"a name in {where}.sha256")
            json_digest(digest, f"{where}.sha256.{name}")
        shared_documents = json_count(row, "shared_documents", where)
        shared_copies = json_count(row, "shared_copies", where)
        windows = SharedWindows.parse(row.get("windows"), f"{where}.windows")
        return cls(shared_documents, shared_copies, windows, digests)


def parse_reference(value: Any, where: str) -> dict[str, float]:
    """Bits per byte that general compressors reach on the validation text, by their names. Errors: ValueError."""
    for name, bpb in json_object(value, where).items():
        if not name.isprintable() or len(name) > 100:
            raise ValueError(f"a name in {where} must be of at most 100 printable characters")
        if type(bpb) not in (int, float) or not 0 <= bpb < 1e6:  # a comparison that NaN fails
            raise ValueError(f"{where}.{name} must be bits per byte, a number of 0 or more")
    return value


@dataclass(frozen=True)
class Manifest:
    """What manifest.json, written by data/prepare.py or tools/audit_data.py, says of the shards beside it.

    Where there is no such file, `splits` is empty and `audit` is None.
    """

    path: Path
    splits: dict[str, ManifestSplit] = field(default_factory=dict)
    tokenizer_sha256: str = ""
    reference: dict[str, float] = field(default_factory=dict)
    audit: LeakAudit | None = None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder. Errors: ConfigError."""
        path = folder / "manifest.json"
        return cls.parse(path, cls.content(path)) if os.path.lexists(path) else cls(path)

    @staticmethod
    def content(path: Path) -> Any:
        """What the JSON file holds. Errors: ConfigError."""
        try:
            with reading(path):
                return json.loads(read_regular(path, MANIFEST_LIMIT))
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                str(path), "", f"is not a valid manifest: cannot be read as JSON: {' '.join(str(error).split())}"
            ) from None

    @classmethod
    def parse(cls, path: Path, content: Any) -> Manifest:
        """Errors: ConfigError."""
        try:
            top = json_object(content, "its content")
            splits = json_object(top.get("splits"), "splits")
            parsed = {
                split: ManifestSplit.parse(splits[split], f"splits.{split}")
                for split in ("train", "val")
                if split in splits
            }
            for key in ("tokens", "bytes"):  # a score is checked against these two
                json_count(json_object(splits.get("val"), "splits.val"), key, "splits.val")
            tokenizer = json_object(top.get("tokenizer", {}), "tokenizer")
            return cls(
                path,
                parsed,
                json_digest(tokenizer["sha256"], "tokenizer.sha256") if "sha256" in tokenizer else "",
                parse_reference(top.get("reference_compressors", {}), "reference_compressors"),
                LeakAudit.parse(top["audit"], "audit") if "audit" in top else None,
            )
        except ValueError as error:
            raise ConfigError(str(path), "", f"is not a valid manifest: {error}") from None

    def expected(self, split: str, name: str = "") -> ExpectedCounts:
        """What is said of a split, or of one of its files; nothing where the manifest does not name it."""
        unknown = ExpectedCounts(None, None, None, "")
        row = self.splits.get(split, ManifestSplit(unknown, {}))
        return row.files.get(name, unknown) if name else row.counts


class ShardScan(NamedTuple):
    """What one pass over a shard finds."""

    documents: int  # that begin in it
    highest: int  # token id, -1 where there is no token
    sha256: str  # of the file, "" where it was not asked for


def scan_shard(stream: TokenStream, number: int, hashed: bool) -> ShardScan:
    """Reads a shard once, in blocks."""
    shard = stream.shards[number]
    documents, highest = 0, -1
    header = InputFile(stream.paths[number]).read(0, SHARD_HEADER_BYTES, "u1")
    digest = hashlib.sha256(header.data)
    for offset in range(0, len(shard), SCAN_BLOCK):
        block = shard[offset : offset + SCAN_BLOCK]
        documents += int(np.count_nonzero(block == BOS_ID))
        highest = max(highest, int(block.max()))
        if hashed:
            digest.update(block.data)
    return ShardScan(documents, highest, digest.hexdigest() if hashed else "")


class DataCheck:
    """Holds shards against the vocabulary, the manifest and its leak audit, before anything learns from them.

    `findings` are what a run must not begin with; `rows` is the summary's part. Every run reads all shards again, as a
    remembered result can be outdated: that takes a second or two for each billion tokens and core.
    """

    def __init__(self, config: Config, run: Run, manifest: Manifest):
        self.config, self.run = config, run
        self.manifest = manifest
        self.findings: list[tuple[str, object, str]] = []  # a ConfigError's arguments
        self.rows: dict[str, Any] = dict(manifest=bool(manifest.splits))
        self.digests: dict[str, str] = {}  # actual SHA-256 of each file, by name
        self.stamps: dict[Path, FileStamp | None] = {}  # of each file when it was opened

    def find(self, name: Path, problem: str) -> None:
        """Adds a finding about a file."""
        self.findings.append((str(name), "", problem))

    def refuse(self) -> None:
        """Raises the first finding of any rank as a ConfigError that says how many more there are."""
        findings = list(dict.fromkeys(itertools.chain(*self.run.gather(self.findings))))
        if findings:
            name, value, problem = findings[0]
            more = f" ({len(findings) - 1} more: {self.command})" if len(findings) > 1 else ""
            raise ConfigError(name, value, problem + more)

    @property
    def command(self) -> str:
        """What audits the folder, and lists all findings."""
        return f"make audit-data DATA={self.config.data_path}"

    def validation(self, stream: TokenStream) -> None:
        """Checks the validation shards, their sidecars and the tokenizer; on every rank, as each reads them all."""
        sidecars = [path for path in map(sidecar_path, stream.paths) if is_input(path)]
        self.stamps |= stream.stamps | {path: FileStamp.of(path) for path in sidecars}
        scans = {n: scan_shard(stream, n, self.hashed("val", path)) for n, path in enumerate(stream.paths)}
        self.check_split("val", stream, scans)
        for path in sidecars:
            if self.hashed("val", path):
                self.check_digest(path, sha256_of(path), self.manifest.expected("val", path.name).sha256)
        tokenizer = self.config.tokenizer_file
        if self.manifest.tokenizer_sha256 and os.path.isfile(tokenizer):
            self.check_digest(tokenizer, sha256_of(tokenizer), self.manifest.tokenizer_sha256)

    def training(self, stream: TokenStream) -> None:
        """Checks the training shards.

        The ranks of a machine divide its shards among themselves, so that every machine's files are read; threads
        divide a rank's.
        """
        self.stamps |= stream.stamps
        run = self.run
        threads = core_share(self.config, run)
        mine = range(run.rank % run.local_world, len(stream.shards), run.local_world)
        with ThreadPoolExecutor(threads) as pool:
            indexed = self.config.data_order == "documents"  # the index names every shard's SHA-256
            results = pool.map(lambda n: scan_shard(stream, n, indexed or self.hashed("train", stream.paths[n])), mine)
            scans = dict(zip(mine, results, strict=True))
        merged: dict[int, ShardScan] = {}
        for other in run.gather(scans):
            for number, scan in other.items():
                if merged.setdefault(number, scan) != scan:
                    self.find(stream.paths[number], "is not the same on all machines")
        self.check_split("train", stream, merged)

    def leaks(self) -> None:
        """Checks that the manifest's leak audit is of these very shards, and that it found no more than is allowed.

        Call it when all shards have been checked. Without an audit there is nothing to check; `lines` warns of that.
        """
        audit = self.manifest.audit
        self.rows["leak_audit"] = "none"
        if audit is None:
            return
        problems = len(self.findings)
        changed = {name for name, _, _ in self.findings}
        for path in self.stamps:
            expected = audit.sha256.get(path.name)
            if str(path) in changed:
                continue
            if expected is None:
                self.find(path, f"was not read by the leak audit in {self.manifest.path}: {self.command}")
            elif expected != self.digests.get(path.name):
                self.find(path, f"was changed after the leak audit in {self.manifest.path}: {self.command}")
        for name in sorted(audit.sha256.keys() - {path.name for path in self.stamps}):
            self.find(self.manifest.path, f"holds a leak audit that read {name}, which is not there: {self.command}")
        if len(self.findings) > problems:
            return
        allowed = dict(
            allowed_shared_documents=self.config.allow_shared_documents,
            allowed_shared_windows=self.config.allow_shared_windows,
        )
        self.rows["leak_audit"] = dict(
            shared_documents=audit.shared_documents,
            shared_copies=audit.shared_copies,
            windows=audit.windows._asdict(),
            **allowed,
        )
        self.check_shared(audit)

    def check_shared(self, audit: LeakAudit) -> None:
        """Holds what training shares with validation against what is allowed."""
        config, windows = self.config, audit.windows
        if audit.shared_documents > config.allow_shared_documents:
            self.findings.append(
                (
                    "ALLOW_SHARED_DOCUMENTS",
                    config.allow_shared_documents,
                    f"{audit.shared_documents} of {self.rows['val']['documents']} validation documents in "
                    f"DATA_PATH={config.data_path} are in its training shards too, which must not hold them; where "
                    "that is known of a published data set, this knob allows so many",
                )
            )
        if windows.share > config.allow_shared_windows:
            self.findings.append(
                (
                    "ALLOW_SHARED_WINDOWS",
                    config.allow_shared_windows,
                    f"{windows.share:.2%} of the validation windows of {windows.length} tokens in "
                    f"DATA_PATH={config.data_path} ({windows.shared} of {windows.of}, in {windows.documents} "
                    "documents) are in its training shards too; where that is known of a published data set, this "
                    "knob allows such a share",
                )
            )

    def hashed(self, split: str, path: Path) -> bool:
        """Whether anything says which SHA-256 a file should have."""
        audited = self.manifest.audit is not None and path.name in self.manifest.audit.sha256
        return audited or bool(self.manifest.expected(split, path.name).sha256)

    def check_split(self, split: str, stream: TokenStream, scans: dict[int, ShardScan]) -> None:
        """Holds the shards of a split against the vocabulary and the manifest."""
        listed = self.manifest.splits[split].files if split in self.manifest.splits else {}
        for number, path in enumerate(stream.paths):
            scan = scans[number]
            if scan.highest >= stream.vocab_size:
                self.find(path, f"holds token id {scan.highest}, and VOCAB_SIZE={stream.vocab_size} needs ids below it")
            if listed and path.name not in listed:
                self.find(path, f"is not named in {self.manifest.path}")
            if scan.sha256:
                self.check_digest(path, scan.sha256, self.manifest.expected(split, path.name).sha256)
            self.check_counts(split, dict(tokens=len(stream.shards[number]), documents=scan.documents), path.name)
        for name in listed:
            if not is_input(self.manifest.path.parent / name):
                self.find(self.manifest.path, f"names {name}, which is not there")
        # Published shards are cut at a number of tokens, so only a stream's first one must begin a document; and where
        # training begins at a later shard, it may do so inside one.
        if stream.read(0, 1)[0] != BOS_ID and (split == "val" or stream.paths[0].stem.endswith("_000000")):
            self.find(stream.paths[0], f"does not begin with BOS, {BOS_ID}: every document must")
        self.rows[split] = dict(
            shards=len(stream.shards),
            tokens=len(stream),
            documents=sum(scan.documents for scan in scans.values()),
            hashed=sum(self.hashed(split, path) for path in stream.paths),
        )
        self.check_counts(split, self.rows[split])

    def check_digest(self, path: Path, actual: str, expected: str) -> None:
        """Remembers the SHA-256 of a file and holds it against the manifest's, if that has one."""
        self.digests[path.name] = actual
        if expected and actual != expected:
            self.find(path, f"was changed: its SHA-256 is {actual}, but {self.manifest.path} says {expected}")

    def check_counts(self, split: str, actual: dict[str, int], name: str = "") -> None:
        """Holds tokens, documents or bytes of a split, or of one of its shards, against the manifest's."""
        expected = self.manifest.expected(split, name)
        for key in ("tokens", "documents", "bytes"):
            count = getattr(expected, key)
            if key in actual and count not in (None, actual[key]):
                holder = name or f"the {split} shards"
                self.find(self.manifest.path, f"says {count} {key} in {holder}, which hold {actual[key]}")

    def count_bytes(self, split: str, count: int) -> None:
        """Takes in the bytes of text that a split's tokens stand for."""
        self.rows[split]["bytes"] = count
        self.check_counts(split, dict(bytes=count))

    def refuse_rewritten(self, work: str) -> None:
        """Raises a ConfigError that names a shard or sidecar which was rewritten since it was opened.

        Every rank calls it at the end of the work that must have read one and the same file all the time.
        """
        mine = [str(path) for path, stamp in self.stamps.items() if FileStamp.of(path) != stamp]
        rewritten = sorted(set(itertools.chain(*self.run.gather(mine))))
        if rewritten:
            more = f" (and {len(rewritten) - 1} more)" if len(rewritten) > 1 else ""
            raise ConfigError(rewritten[0], "", f"was rewritten during {work}{more}: run it again on files that stay")

    def lines(self) -> Iterator[str]:
        """The log's lines: what the shards hold, and what training shares with validation."""
        for split in ("train", "val"):
            row = self.rows.get(split)
            if row is None:
                continue
            held = f"{row['hashed']} with a known SHA-256" if self.rows["manifest"] else "no manifest"
            counted = f", {row['bytes']} bytes" if "bytes" in row else ""
            yield (
                f"audit: {split} {row['shards']} shards ({held}), {row['documents']} documents, {row['tokens']} "
                f"tokens{counted}"
            )
        yield from self.leak_lines()

    def leak_lines(self) -> Iterator[str]:
        """What training shares with validation, where `leaks` was called."""
        leaks = self.rows.get("leak_audit")
        if leaks == "none":
            yield f"warning: audit: nobody has looked for validation text in the training shards: {self.command}"
        elif leaks:
            shared, windows = leaks["shared_documents"], SharedWindows(**leaks["windows"])
            yield f"{'warning: ' if shared else ''}audit: {shared} validation documents are in the training shards too"
            yield (
                f"audit: {windows.shared} of {windows.of} validation windows of {windows.length} tokens "
                f"({windows.share:.2%}) are in the training shards too, in {windows.documents} documents"
            )


# ---------------------------------------------------------------------------------------------------------------
# Score: bytes of tokens, and the only BPB formula
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Sums over scored targets: nats of negative log-likelihood, targets, bytes of text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per byte."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def finite(self) -> bool:
        """Whether it may be logged and written as a score."""
        return all(map(math.isfinite, (self.nats, self.loss, self.bpb)))

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.4f} val_bpb:{self.bpb:.4f}"


SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character


class Vocabulary:
    """How many bytes of text each token stands for, from the SentencePiece model.

    Errors: ConfigError for a file that is no such model, is not the one that is meant, or cannot be counted by.
    """

    def __init__(self, config: Config):
        path = config.tokenizer_file
        self.model, pieces, self.content = self.read(path)
        self.digest = hashlib.sha256(self.content).hexdigest()
        if config.tokenizer_sha256 not in ("", self.digest):
            raise ConfigError(
                "TOKENIZER_SHA256", config.tokenizer_sha256, f"{path} is another tokenizer: {self.digest}"
            )
        if len(pieces) != config.vocab_size:
            raise ConfigError("VOCAB_SIZE", config.vocab_size, f"the tokenizer {path} has {len(pieces)} tokens")
        if self.model.bos_id() != BOS_ID:
            raise ConfigError("TOKENIZER_PATH", str(path), f"its BOS is {self.model.bos_id()}, and {BOS_ID} is needed")
        self.adds_space = self.check_space(path)
        model, ids = self.model, range(len(pieces))
        self.special = np.array([model.IsControl(i) or model.IsUnknown(i) or model.IsUnused(i) for i in ids])
        self.is_byte = np.array([model.IsByte(i) for i in ids])
        self.marked = np.array([piece.startswith(SPACE_MARK) for piece in pieces]) & ~self.special & ~self.is_byte
        # Any mark decodes to a space, but whether the one in front is text depends on the token before it.
        widths = np.array([len(piece.replace(SPACE_MARK, " ").encode()) for piece in pieces], np.int32) - self.marked
        widths[self.is_byte] = 1
        widths[self.special] = 0
        self.width = widths

    @staticmethod
    def read(path: Path) -> tuple[Any, list[str], bytes]:
        """The SentencePiece model of a file, its pieces, and the file's bytes."""
        import sentencepiece  # only scoring needs it

        try:
            content = read_regular(path, TOKENIZER_LIMIT)
            model = sentencepiece.SentencePieceProcessor()
            model.LoadFromSerializedProto(content)
            pieces = [model.IdToPiece(i) for i in range(model.vocab_size())]
        except FileNotFoundError:
            raise ConfigError("TOKENIZER_PATH", str(path), "there is no such file") from None
        except OSError as error:
            raise ConfigError("TOKENIZER_PATH", str(path), f"cannot be read ({error.strerror})") from None
        except (RuntimeError, ValueError):  # a piece that is not UTF-8 is a ValueError
            raise ConfigError("TOKENIZER_PATH", str(path), "is not a SentencePiece model") from None
        return model, pieces, content

    def longest_prefixes(self) -> np.ndarray:
        """For each token, the longest other token that its text begins with: [V] int64, -1 where there is none.

        Control tokens and tokens of single bytes have no text.
        """
        texts = {i: self.model.IdToPiece(i) for i in np.flatnonzero(~self.special & ~self.is_byte).tolist()}
        ids = {text: i for i, text in texts.items()}
        found = np.full(len(self.special), -1, np.int64)
        for i, text in texts.items():
            beginnings = (text[:length] for length in range(len(text) - 1, 0, -1))
            found[i] = next((ids[beginning] for beginning in beginnings if beginning in ids), -1)
        return found

    def check_space(self, path: Path) -> bool:
        """Whether the model puts a space mark in front of a text, which is no byte of it.

        Errors: ConfigError for a model that adds one behind it, or a plain space: these would be counted as text.
        """
        written = self.model.Normalize("a")
        if written.endswith(SPACE_MARK) or " " in written:
            raise ConfigError(
                "TOKENIZER_PATH",
                str(path),
                f"writes the text 'a' as {written!a}; the space that a tokenizer adds must be a mark, U+2581, in "
                "front: it needs treat_whitespace_as_suffix=false and escape_whitespaces=true",
            )
        return written.startswith(SPACE_MARK)

    def target_bytes(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Bytes of each target, given the token before it: a piece's leading mark is a space, but not after BOS."""
        return self.width[targets] + (self.marked[targets] & ~self.special[previous])

    def most_bytes(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The most bytes of text that each target can stand for, given the token before it.

        They are `target_bytes`, plus the leading mark after BOS where the model itself adds none: then the text had it.
        """
        added = self.special[previous] & self.adds_space
        return self.width[targets] + (self.marked[targets] & ~added)


def read_sidecar(config: Config, stream: TokenStream) -> np.ndarray | None:
    """Bytes of the original text that each token of the stream stands for, or None where the text was not transformed.

    Errors: ConfigError for a sidecar that is missing, of another length, or there although CASEOPS_ENABLED=0: by the
    tokenizer's table, case operators would count as text.
    """
    there = [path for path in map(sidecar_path, stream.paths) if is_input(path)]
    if config.caseops_enabled == "0" and there:
        raise ConfigError(
            "CASEOPS_ENABLED", 0, f"{there[0]} says that the text was transformed: auto and 1 count by it"
        )
    if config.caseops_enabled == "0" or (not there and config.caseops_enabled == "auto"):
        return None
    counts = []
    for shard, tokens in zip(stream.paths, stream.shards, strict=True):
        path = sidecar_path(shard)
        if not is_input(path):
            raise ConfigError(
                "CASEOPS_ENABLED",
                config.caseops_enabled,
                f"{path} is missing; `data/prepare.py --caseops` makes shards with their byte counts",
            )
        counts.append(open_shard(path))
        if len(counts[-1]) != len(tokens) or counts[-1][tokens[:] == BOS_ID].any():
            raise ConfigError(str(path), "", f"does not hold the byte counts of the {len(tokens)} tokens of {shard}")
    return np.concatenate(counts)


def check_sidecar(stream: TokenStream, sidecar: np.ndarray, vocabulary: Vocabulary) -> None:
    """Errors: ConfigError that names the first byte count above what its token can stand for.

    Such a count would spread the same loss over more bytes than the text has. CaseOps makes counts smaller, never
    larger: an operator stands for no text, and a letter has as many bytes in either case. Ids must be checked before.
    """
    tokens = stream.read(0, len(stream))
    places = byte_pieces_above(tokens, sidecar, vocabulary)[:1].tolist()
    for start in range(0, len(tokens), SCAN_BLOCK):
        targets = tokens[start : start + SCAN_BLOCK]
        previous = np.concatenate((tokens[start - 1 : start] if start else [BOS_ID], targets[:-1]))
        above = sidecar[start : start + SCAN_BLOCK] > vocabulary.most_bytes(previous, targets)
        above &= ~vocabulary.is_byte[targets]
        if above.any():
            places.append(start + int(above.argmax()))
            break
    if not places:
        return
    place = min(places)
    shard = int(np.searchsorted(stream.starts, place, side="right")) - 1
    token = int(tokens[place])
    if vocabulary.is_byte[token]:
        allowed = "a row of byte pieces must count at most 1 for each of them so far"
    else:
        most = vocabulary.most_bytes(tokens[max(place - 1, 0)], tokens[place])
        allowed = f"must be at most {most}, as long as the text of its piece"
    raise ConfigError(
        str(sidecar_path(stream.paths[shard])),
        "",
        f"counts {sidecar[place]} bytes for token {place - int(stream.starts[shard])} of {stream.paths[shard].name}, "
        f"{vocabulary.model.IdToPiece(token)!r}: {allowed}",
    )


def byte_pieces_above(tokens: np.ndarray, sidecar: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Places [n] of byte pieces up to which their row counts more bytes than it has pieces.

    SentencePiece gives the text of a character to the last of its byte pieces, and published sidecars follow it: so
    a row is held against its pieces so far, and not each piece against 1.
    """
    places = np.flatnonzero(vocabulary.is_byte[tokens])
    surplus = np.cumsum(sidecar[places].astype(np.int64) - 1)
    begins = np.diff(places, prepend=-2) != 1
    before = np.concatenate(([0], surplus))[:-1][begins]  # what earlier rows add up to
    return places[surplus > before[np.cumsum(begins) - 1]]


def count_bytes(tokens: np.ndarray, sidecar: np.ndarray | None, vocabulary: Vocabulary) -> int:
    """Bytes of text that a stream's targets stand for: by its sidecar, or where it has none, by the vocabulary."""
    counts = vocabulary.target_bytes(tokens[:-1], tokens[1:]) if sidecar is None else sidecar[1:]
    return int(counts.sum(dtype=np.int64))


# ---------------------------------------------------------------------------------------------------------------
# Kernels: plain torch references and faster versions of the same signature
# ---------------------------------------------------------------------------------------------------------------


def eager_on_cpu(x: Tensor) -> bool:
    """Whether to use the hand-differentiated CPU versions. A compiler fuses the plain ones better."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, x [..., in] and weight [out, in] -> [..., out], whose rows on CPUs do not depend on other rows.

    BLAS takes other kernels, and rounds otherwise, where rows are few, and for some of the rows where the inputs' width
    is odd or there is one output. Zeros make up for what is missing. Measured with MKL in float32, 1 to 8 threads: the
    bits of a row depended on its place for fewer than 12 rows, for widths of 4 and those that 4 does not divide, and
    for one output; nowhere else.
    """
    rows, (out, width) = math.prod(x.shape[:-1]), weight.shape
    if not eager_on_cpu(x):
        return F.linear(x, weight)
    few = max(0, 16 * torch.get_num_threads() - rows)
    narrow, single = -width % 8, 7 * (out == 1)
    if not (few or narrow or single):
        return F.linear(x, weight)
    y = F.linear(F.pad(x.flatten(0, -2), (0, narrow, 0, few)), F.pad(weight, (0, narrow, 0, single)))
    return y[:rows, :out].unflatten(0, x.shape[:-1])


class SigmoidCPU(torch.autograd.Function):
    """`torch.sigmoid` from whole vectors. It takes another exponential for what is left over at a thread's end."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide).neg().exp_().add_(1).reciprocal_().to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.ops.aten.sigmoid_backward(grad, ctx.saved_tensors[0])


def sigmoid(x: Tensor) -> Tensor:
    """`torch.sigmoid`, whose bits on CPUs do not depend on an element's place in the tensor."""
    return SigmoidCPU.apply(x) if eager_on_cpu(x) else torch.sigmoid(x)


def rms_norm_plain(x: Tensor) -> Tensor:
    """x over its root mean square along the last dimension (arXiv 1910.07467), without a gain."""
    return F.rms_norm(x, (x.size(-1),))


class RMSNormCPU(torch.autograd.Function):
    """`rms_norm_plain` in two passes over x and three over the gradient, all in the type of the input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.size(-1))
        inverse = square.add_(torch.finfo(wide).eps).rsqrt_().to(x.dtype)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(-y.size(-1))
        return torch.addcmul(grad, y, along).mul_(inverse)


def rms_norm(x: Tensor) -> Tensor:
    return RMSNormCPU.apply(x) if eager_on_cpu(x) else rms_norm_plain(x)


def rotate_plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the first 2*cos.size(-1) head dimensions; the others stay as they are.

    x [B, T, H, h], cos and sin [B, T, 1, rotary/2] of x's type. Halves (x1, x2) become (x1 cos + x2 sin,
    x2 cos - x1 sin).
    """
    half = cos.size(-1)
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    rest = x[..., 2 * half :]
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


class RotateCPU(torch.autograd.Function):
    """`rotate_plain` with the inverse rotation as its gradient, where autograd would pad and add for each slice."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_plain(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate_plain(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return RotateCPU.apply(x, cos, sin) if eager_on_cpu(x) else rotate_plain(x, cos, sin)


def offset_keys(k: Tensor, dims: int, inside: Tensor) -> Tensor:
    """k [B, T, K, h] whose last dimensions come from the token before: partial key offset, of the nanoGPT speedrun.

    A query then finds a token by what preceded it, as an induction head does, within one layer. inside [B, T]: the
    token before belongs to the document; a document's first token keeps its own dimensions.
    """
    kept, own = k.split([k.size(-1) - dims, dims], dim=-1)
    previous = F.pad(own, (0, 0, 0, 0, 1, -1))
    return torch.cat((kept, torch.where(inside[..., None, None], previous, own)), dim=-1)


def query_key_plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, T, H, h] and k [B, T, K, h] as attention takes them: normed, rotated (see `rotate`), q times a gain [H]."""
    return rotate(rms_norm(q), cos, sin) * gain.to(q.dtype)[:, None], rotate(rms_norm(k), cos, sin)


def subtract_own_value_plain(y: Tensor, v: Tensor, strength: Tensor | None = None) -> Tensor:
    """XSA: subtracts from y [B, T, H, h] its component along the value of its own position, v [B, T, K, h].

    strength [H]: factors of what is subtracted from each head (GATED_XSA); None: 1.
    """
    sequences, length, heads, width = y.shape
    direction = F.normalize(v, dim=-1).unsqueeze(3)  # [B, T, K, 1, h]
    grouped = y.view(sequences, length, v.size(2), heads // v.size(2), width)  # [B, T, K, H/K, h]
    along = (grouped * direction).sum(-1, keepdim=True)
    along = along if strength is None else along * strength.view(v.size(2), -1, 1)
    return (grouped - along * direction).view(y.shape)


class SubtractOwnValueCPU(torch.autograd.Function):
    """`subtract_own_value_plain` of strength 1: y - c u with u = v / |v| and c = y u, for each head.

    A gradient g becomes dy = g - b u with b = g u, and -(c dy + b (y - c u)) / |v| for v, summed over the heads that
    share it. As in `F.normalize`, |v| is at least 1e-12.
    """

    LEAST = 1e-12

    @staticmethod
    def forward(ctx, y: Tensor, v: Tensor) -> Tensor:
        grouped, v = y.unflatten(2, (v.size(2), -1)), v.unsqueeze(3)  # [B, T, K, H/K, h] and [B, T, K, 1, h]
        wide = torch.promote_types(y.dtype, torch.float32)
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=wide)
        short = norm < SubtractOwnValueCPU.LEAST
        norm = norm.clamp_min_(SubtractOwnValueCPU.LEAST).to(y.dtype)
        u = v / norm
        c = torch.linalg.vecdot(grouped, u).unsqueeze(-1)
        rest = torch.addcmul(grouped, c, u, value=-1)
        ctx.save_for_backward(u, norm, short, c, rest)
        return rest.view(y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        u, norm, short, c, rest = ctx.saved_tensors
        grouped = grad.view(rest.shape)
        b = torch.linalg.vecdot(grouped, u).unsqueeze(-1)
        to_y = torch.addcmul(grouped, b, u, value=-1)
        of_heads = (c * to_y).addcmul_(b, rest).unbind(3)  # their sum over a middle dimension would be slower
        to_u = functools.reduce(torch.add, of_heads)
        if short.any():  # where u is no unit vector, its derivative leaves the part along v alone
            to_u = to_u + 2 * short.squeeze(3) * (b * c).sum(3) * u.squeeze(3)
        return to_y.view(grad.shape), to_u / -norm.squeeze(3)


def subtract_own_value(y: Tensor, v: Tensor, strength: Tensor | None = None) -> Tensor:
    if strength is None and eager_on_cpu(y):
        return SubtractOwnValueCPU.apply(y, v)
    return subtract_own_value_plain(y, v, strength)


def head_output_plain(
    y: Tensor,
    v: Tensor | None,
    gate: Tensor | None,
    scale: float = 1.0,
    factor: float = 1.0,
    strength: Tensor | None = None,
) -> Tensor:
    """Heads y [B, T, H, h] side by side, [B, T, H h], after XSA, of this strength [H], and head gate.

    v [B, T, K, h]: each position's own value, for XSA, or None. gate [B, T, H]: the logits g of the head gates
    factor*sigmoid(scale*g), or None (PRs #1787 and #549 of openai/parameter-golf).
    """
    if v is not None:
        y = subtract_own_value(y, v, strength)
    if gate is not None:
        weight = sigmoid(gate if scale == 1 else scale * gate)
        y = y * (weight if factor == 1 else factor * weight)[..., None]
    return y.flatten(2)


def leaky_relu_squared_plain(x: Tensor, slope: float) -> Tensor:
    """max(x, slope*x)^2 (ReLU^2 of arXiv 2109.08668 with a leak)."""
    return F.leaky_relu(x, slope).square()


class LeakyReLUSquaredCPU(torch.autograd.Function):
    """`leaky_relu_squared_plain` that saves only the leaky ReLU, which has the sign of x."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: float) -> Tensor:
        y = F.leaky_relu(x, slope)
        ctx.save_for_backward(y)
        ctx.slope = slope
        return y * y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward((grad * y).mul_(2), y, ctx.slope, True), None


def leaky_relu_squared(x: Tensor, slope: float) -> Tensor:
    return LeakyReLUSquaredCPU.apply(x, slope) if eager_on_cpu(x) else leaky_relu_squared_plain(x, slope)


def mlp_plain(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """x [..., d], up [hidden, d], down [out, hidden] -> leaky_relu(x up^T)^2 down^T, [..., out]."""
    return F.linear(leaky_relu_squared_plain(F.linear(x, up), slope), down)


# FP8: in training steps, inputs of some products are rounded to e4m3, with a scale for each tensor. The head in FP8 is
# an idea of modded-nanogpt (YouJiacheng), with constant scales and a backward pass in FP8 too. Here it is otherwise:
# - Scales are powers of two. They scale exactly, and a finer scale would only move the ends of e4m3's range.
# - Scales of activations follow from bounds, without a pass over them and without state. No element of an RMS norm
#   exceeds sqrt(d). By the Cauchy-Schwarz inequality, its product with a row w of a matrix is at most sqrt(d)*|w|.
# - The gradient is that of the products without rounding (straight-through).
E4M3_MAX = 448.0


def e4m3_scale(bound: Tensor) -> Tensor:
    """The power of two, [] float32, that brings a bound of magnitudes [] into [128, 256), where e4m3 ends at 448.

    It is made from the bits of the bound's exponent, so that it is the same on every device, compiled or not.
    """
    exponent = (bound.float().view(torch.int32) >> 23) & 0xFF
    return ((261 - exponent).clamp(1, 253) << 23).view(torch.float32)  # neither it nor its inverse is subnormal


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale in float8_e4m3fn, rounded to nearest even. It saturates, where the cast alone would give NaN."""
    return (x * scale.to(x.dtype)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def rms_norm_scale(x: Tensor) -> Tensor:
    """`e4m3_scale` of any RMS norm as wide as x [..., d], whose elements are at most sqrt(d)."""
    return e4m3_scale(torch.full((), math.sqrt(x.size(-1)), dtype=torch.float32, device=x.device))


def weight_scale(weight: Tensor) -> Tensor:
    """`e4m3_scale` of a matrix, from its largest magnitude."""
    return e4m3_scale(weight.detach().abs().amax())


def hidden_scale(up: Tensor) -> Tensor:
    """`e4m3_scale` of leaky_relu(x up^T)^2, x an RMS norm [..., d], up [hidden, d]: at most d times a row's square."""
    return e4m3_scale(up.detach().float().square().sum(dim=-1).amax() * up.size(1))


def float8_product(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype, native: bool
) -> Tensor:
    """x [M, in] and weight [out, in] in float8_e4m3fn, with their scales -> [M, out], x weight^T without the scales.

    native: on FP8 tensor cores, sizes multiples of 16. Otherwise the same numbers are multiplied in `dtype`, which
    holds them exactly. Tensor cores sum in about 14 bits (arXiv 2412.19437). In a simulation, that made an error of
    0.04% in sums of 512 products and 0.2% in sums of 2,048. Rounding the inputs to e4m3 made one of 4%.
    """
    if native:
        multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] # its public form is too new
        inverses = dict(scale_a=x_scale.reciprocal(), scale_b=w_scale.reciprocal())
        return multiply(x, weight.mT, **inverses, out_dtype=dtype, use_fast_accum=True)
    return linear(x.to(dtype) / x_scale.to(dtype), weight.to(dtype) / w_scale.to(dtype))


class Float8Linear(torch.autograd.Function):
    """x [M, in], weight [out, in], scale of x -> [M, out]: a product of e4m3 inputs with the gradient of `linear`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, x_scale: Tensor, native: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        w_scale = weight_scale(weight)
        return float8_product(to_e4m3(x, x_scale), to_e4m3(weight, w_scale), x_scale, w_scale, x.dtype, native)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, _, _ = ctx.needs_input_grad
        return grad @ weight if for_x else None, grad.mT @ x if for_weight else None, None, None


def float8_linear(x: Tensor, weight: Tensor, x_scale: Tensor, native: bool) -> Tensor:
    """`linear` of x [..., in] and weight [out, in] in e4m3, with x's scale; its gradient is that without rounding."""
    rows = x.reshape(-1, x.size(-1))
    return Float8Linear.apply(rows, weight, x_scale, native).view(*x.shape[:-1], weight.size(0))


def mlp_float8(x: Tensor, up: Tensor, down: Tensor, slope: float, native: bool) -> Tensor:
    """`mlp_plain` with x, an RMS norm, both matrices and the hidden activations in e4m3."""
    hidden = leaky_relu_squared(float8_linear(x, up, rms_norm_scale(x), native), slope)
    return float8_linear(hidden, down, hidden_scale(up), native)


def softcap_plain(logits: Tensor, cap: float | Tensor, kind: str = "tanh") -> Tensor:
    """Logits squashed into [-cap, cap], in float32 at least: cap*tanh(logits/cap), or tanh's series, clamped (poly).

    The series ends at x^5 and reaches 1 at |x| = 1.69. Beyond that the value is clamped and the gradient is 0.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap
    if kind == "tanh":
        return cap * torch.tanh(x)
    if kind != "poly":
        raise ValueError(f"softcap kind {kind!r}: not tanh or poly")
    x = x.clamp(-2, 2)
    square = x * x
    return cap * (x * (1 - square / 3 + square * square / 15)).clamp(-1, 1)


def softcapped_cross_entropy_plain(
    logits: Tensor, targets: Tensor, cap: float | Tensor, kind: str = "tanh"
) -> tuple[Tensor, Tensor]:
    """Per-token NLL and log-sum-exp of the softcapped logits, in float32 at least.

    logits [..., V], targets [...] -> nll [...], lse [...]; both carry their true gradient.
    """
    z = softcap_plain(logits, cap, kind)
    lse = torch.logsumexp(z, dim=-1)
    return lse - z.gather(-1, targets.unsqueeze(-1)).squeeze(-1), lse


def whole_vectors(count: int) -> int:
    """At least `count`: a length at which torch gives each thread whole vectors of a one-dimensional tensor.

    Some functions of torch, `exp2` among them, round otherwise for what is left over at a thread's end. torch gives
    32,768 numbers to one thread, and divides among all threads where each gets as many.
    """
    grain, threads = 1 << 15, torch.get_num_threads()
    unit, least = (64, count) if count <= grain else (64 * threads, max(count, grain * threads))
    return -(-least // unit) * unit


class SoftcappedCrossEntropyCPU(torch.autograd.Function):
    """`softcapped_cross_entropy_plain` in blocks of rows that fit in the caches.

    With r = 1 / (1 + exp(2 x / cap)), z = cap*tanh(x / cap) is cap - 2 cap r, and its derivative is 4 r (1 - r): two
    exponentials do. It saves each probability times r (1 - r), in the type of the logits, and the backward pass only
    scales that.
    """

    BLOCK = 1 << 20  # numbers in a block; smaller ones: threads wait more for each other

    @staticmethod
    def blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of rows, and for each a buffer [block, V] in float32 at least, which is reused: as rows, and whole."""
        count, width = logits.shape
        rows = max(1, min(count, SoftcappedCrossEntropyCPU.BLOCK // width))
        whole = torch.zeros(whole_vectors(rows * width), dtype=torch.promote_types(logits.dtype, torch.float32))
        for start in range(0, count, rows):
            block = slice(start, min(start + rows, count))
            yield block, whole[: (block.stop - start) * width].view(-1, width), whole

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
        flat, wanted = logits.flatten(0, -2), targets.flatten()
        wide, scale = torch.promote_types(logits.dtype, torch.float32), 2 * math.log2(math.e)
        nll, lse, at_target = torch.empty(3, len(wanted), dtype=wide)
        saved = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        exponents = torch.empty(0, dtype=wide)  # the first block gives it its size
        for block, r, whole in SoftcappedCrossEntropyCPU.blocks(flat):
            r.copy_(flat[block]).mul_(scale / cap)
            whole.exp2_().add_(1).reciprocal_()
            torch.mul(whole, -scale * cap, out=exponents)
            of_block = exponents[: r.numel()].view_as(r)  # z - cap, to base 2
            highest = torch.zeros(1, 1, dtype=wide)
            if cap > 40:  # z - cap is at least -2 cap: where that is far from underflow, no shift is needed
                highest = of_block.amax(1, keepdim=True)
                of_block.sub_(highest)
            exponents.exp2_()
            total = of_block.sum(1, keepdim=True)
            at_target[block] = r.gather(1, wanted[block, None])[:, 0]
            lse[block] = (total.log() + 2 * highest / scale)[:, 0] + cap
            nll[block] = lse[block] - cap + 2 * cap * at_target[block]
            if saved is not None:
                saved[block] = r.addcmul_(r, r, value=-1).mul_(of_block).div_(total)
        ctx.save_for_backward(saved, at_target, wanted)
        ctx.shape = logits.shape
        return nll.view(targets.shape), lse.view(targets.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nll: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None]:
        saved, r, wanted = ctx.saved_tensors
        grad, to_nll = torch.empty_like(saved), grad_nll.flatten()
        to_all, to_target = 4 * (to_nll + grad_lse.flatten()), -4 * to_nll * r * (1 - r)
        for block, to_logits, _ in SoftcappedCrossEntropyCPU.blocks(saved):
            to_logits.copy_(saved[block]).mul_(to_all[block, None])
            grad[block] = to_logits.scatter_add_(1, wanted[block, None], to_target[block, None])
        return grad.view(ctx.shape), None, None


def softcapped_cross_entropy(
    logits: Tensor, targets: Tensor, cap: float, kind: str = "tanh", fused: bool = True, on_triton: bool = False
) -> tuple[Tensor, Tensor]:
    """`softcapped_cross_entropy_plain`, or where `fused`, the fastest version of it; `on_triton` allows Triton's."""
    if fused and on_triton and triton_supports(logits):
        return softcapped_cross_entropy_triton(logits, targets, cap, kind)
    if fused and kind == "tanh" and eager_on_cpu(logits):
        return SoftcappedCrossEntropyCPU.apply(logits, targets, cap)
    return softcapped_cross_entropy_plain(logits, targets, cap, kind)


def clip_range(weights: Tensor, sigmas: float) -> Tensor:
    """Clip range of each row [..., r]: `sigmas` standard deviations, or with 0 the largest magnitude."""
    return sigmas * weights.std(dim=-1, correction=0) if sigmas else weights.abs().amax(dim=-1)


Grids = tuple[tuple[int, float], tuple[int, float]] | None  # (bits, clip sigmas) of attention and of the MLP


def fake_quantize(weights: Tensor, bits: int, sigmas: float) -> Tensor:
    """Weights [..., r, c] rounded to each row's grid, with a straight-through gradient (arXiv 1308.3432)."""
    limit, exact = 2 ** (bits - 1) - 1, weights.detach()
    step = clip_range(exact, sigmas).clamp_min(1e-12).unsqueeze(-1) / limit
    # The difference is exactly 0, so the values lie on the grid; its gradient is the gradient of the sum.
    return (exact / step).round().clamp(-limit, limit) * step + (weights - exact)


def mix_bits(x: Tensor) -> Tensor:
    """A hash of 32 bits, int32 -> int32: Chris Wellons' lowbias32 (nullprogram.com/blog/2018/07/31, public domain)."""
    x = x ^ ((x >> 16) & 0xFFFF)  # a shift of int32 copies the sign; the mask makes zeros of it
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(keys: Tensor, length: int, width: int) -> Tensor:
    """Keys [B, 2] int32 -> [B, length, width] int32: a hash of the place and a sequence's keys.

    The same bits on every device, compiled or not.
    """
    places = torch.arange(length * width, dtype=torch.int32, device=keys.device).view(length, width)
    return mix_bits(mix_bits(places ^ keys[:, 0, None, None]) + keys[:, 1, None, None])


def uniform_noise(keys: Tensor, length: int, width: int) -> Tensor:
    """Keys [B, 2] int32 -> [B, length, width] float32, uniform in [-1, 1), by `random_bits`."""
    return (random_bits(keys, length, width) >> 8).float() * 2.0**-23


def batched_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, in], each sequence's own weight [B, out, in] -> [B, T, out].

    On CPUs a token's bits do not depend on T (see `linear`).
    """
    length = x.size(1)
    if eager_on_cpu(x) and length < 16:  # in this order: a compiled graph must not be one of short windows
        x = F.pad(x, (0, 0, 0, 16 - length))
    return (x @ weight.mT)[:, :length]


def low_rank(x: Tensor, adapter: tuple[Tensor, Tensor]) -> Tensor:
    """The low-rank map of each sequence (LoRA, arXiv 2106.09685).

    x [B, T, in], A [B, r, in], B [B, out, r] -> [B, T, out].
    """
    a, b = (matrix.to(x.dtype) for matrix in adapter)
    return batched_linear(batched_linear(x, a), b)


def document_positions(starts: Tensor) -> Tensor:
    """[B, T] document starts -> [B, T]: places of the tokens in their documents, or in what the row holds of them."""
    return torch.arange(starts.size(1), device=starts.device) - starts


def continues_document(starts: Tensor) -> Tensor:
    """[B, T] document starts -> [B, T] bool: the previous token belongs to the same document."""
    return document_positions(starts) != 0


def document_mask(starts: Tensor, window: int = 0) -> Tensor:
    """[B, T] document starts -> [B, T, T] bool: key j is at or before query i and in its document.

    With a window, it is also at most so many places before.
    """
    positions = torch.arange(starts.size(1), device=starts.device)
    first = starts.maximum(positions - window) if window else starts
    return (positions <= positions[:, None]) & (positions >= first[:, :, None])


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Causal attention inside documents. q [B, T, H, h], k and v [B, T, K, h], mask of `document_mask` -> [B, T, H, h].

    Keys and values are repeated for their query heads: with a mask, CUDA's memory-efficient kernels take no GQA.
    """
    groups = q.size(2) // k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)


# Blocks of queries end at places 16, 32, 64, 128, 256, 384 and so on of their document. Small first ones are for short
# documents; 128 queries at once are the fastest of 64 to 512 for documents of 256 to 1,024 tokens.
FIRST_BLOCK, QUERY_BLOCK = 16, 128


class HeadRows(NamedTuple):
    """Where the blocks of `DocumentBlocks` find their rows of a tensor [tokens * heads, h], and the way back."""

    rows: Tensor  # int32: the row of each place in the blocks, which are [n, heads, w] one after the other
    inverse: Tensor  # [tokens * heads] int32: the place in the blocks of each row


class DocumentBlocks(NamedTuple):
    """The documents of a batch cut into blocks of tokens, for `BlockedAttention`.

    Block i holds w_i places of the n_i documents that are long enough, the longest document first. Its first place is
    the sum of the widths before it. Places past a document's end hold its first token.
    """

    shapes: list[tuple[int, int]]  # (n_i, w_i)
    queries: HeadRows
    keys: HeadRows
    padding: Tensor  # places in the blocks of queries that are past their document's end


def block_widths(longest: int) -> list[int]:
    """Widths of the blocks of a document: each doubles the tokens before it, up to QUERY_BLOCK at once."""
    widths, end = [FIRST_BLOCK], FIRST_BLOCK
    while end < longest:
        widths.append(min(end, QUERY_BLOCK))
        end += widths[-1]
    return widths


def head_rows(tokens: list[np.ndarray], inside: list[np.ndarray], heads: int) -> tuple[HeadRows, Tensor]:
    """The rows of blocks of tokens [n, w], and the places in them that are not inside their document."""
    rows = np.concatenate([(t[:, None] * heads + np.arange(heads)[:, None]).ravel() for t in tokens])
    real = np.flatnonzero(np.concatenate([np.repeat(i[:, None], heads, axis=1).ravel() for i in inside]))
    inverse = np.empty(len(real), np.int32)
    inverse[rows[real]] = real
    padding = np.delete(np.arange(len(rows)), real)
    return HeadRows(torch.from_numpy(rows.astype(np.int32)), torch.from_numpy(inverse)), torch.from_numpy(padding)


def document_blocks(starts: Tensor, heads: int, kv_heads: int) -> DocumentBlocks:
    """The blocks of a batch with document starts [B, T], which it reads on the CPU."""
    begins = np.flatnonzero(~continues_document(starts).cpu().numpy())
    lengths = np.diff(begins, append=starts.numel())
    order = np.argsort(-lengths, kind="stable")
    begins, lengths = begins[order, None], lengths[order, None]  # [documents, 1]
    tokens, inside = [], []
    first = 0
    for width in block_widths(int(lengths[0, 0])):
        n = np.count_nonzero(lengths > first)
        places = first + np.arange(width)
        inside.append(places < lengths[:n])  # [n, width]
        tokens.append(begins[:n] + np.where(inside[-1], places, 0))
        first += width
    queries, padding = head_rows(tokens, inside, heads)
    return DocumentBlocks([t.shape for t in tokens], queries, head_rows(tokens, inside, kv_heads)[0], padding)


def as_blocks(x: Tensor, shapes: list[tuple[int, int]], heads: int) -> list[Tensor]:
    """Rows x in the order of blocks -> the blocks, [n * heads, rows of a head, h] each."""
    each = x.size(0) // sum(n * w for n, w in shapes)
    parts = x.split([each * n * w for n, w in shapes])
    return [part.view(n * heads, -1, x.size(-1)) for part, (n, _) in zip(parts, shapes, strict=True)]


def up_to(i: int, parts: list[Tensor], window: int) -> Tensor:
    """Keys or values [n*K, seen, h] that block i attends to: its own and those before, of the documents it holds.

    With a window, blocks that end before it are left out.
    """
    first, reach = i, window
    while first and (reach > 0 or not window):  # the block before still has keys within reach of block i's first query
        first -= 1
        reach -= parts[first].size(1)
    return torch.cat([part[: len(parts[i])] for part in parts[first : i + 1]], dim=1) if first < i else parts[i]


def hide_keys(scores: Tensor, w: int, window: int) -> None:
    """Sets the scores [n*K, G*w, seen] of keys that the last w places do not see to -inf: later ones, and too early."""
    scores = scores.unflatten(1, (-1, w))
    options: dict[str, Any] = dict(dtype=scores.dtype, device=scores.device)
    scores[..., -w:].add_(torch.full((w, w), -torch.inf, **options).triu_(1))
    early = scores.size(-1) - window - 1  # keys that the last place does not see
    if window and early > 0:
        scores[..., :early].add_(torch.full((w, early), -torch.inf, **options).tril_(early - w))


class BlockedAttention(torch.autograd.Function):
    """`attention_sdpa` for CPUs from matrix products, document by document: nothing is computed across documents.

    Every product's shape, and so its rounding, depends on places in documents alone: an output's bits are the same
    whatever comes after its token and wherever its document lies in the batch. Keys after a query get a probability of
    0, and a place past the document's end holds its first token, so 0 * inf cannot carry anything back.

    q [B*T*H, h], k and v [B*T*K, h] -> [B*T*H, h]. Blocks of queries are [n*K, G*w, h], where G query heads share a
    kv head. Their keys are those from the document's start to the block's end, or those blocks of them that a window
    reaches, [n*K, seen, h].
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: DocumentBlocks, kv_heads: int, window: int) -> Tensor:
        packed = [q.index_select(0, blocks.queries.rows).mul_(q.size(-1) ** -0.5)]
        packed += [x.index_select(0, blocks.keys.rows) for x in (k, v)]
        queries, keys, values = (as_blocks(x, blocks.shapes, kv_heads) for x in packed)
        y, probabilities = torch.empty_like(packed[0]), []
        outputs = as_blocks(y, blocks.shapes, kv_heads)
        for i, (_, w) in enumerate(blocks.shapes):
            scores = queries[i] @ up_to(i, keys, window).mT  # [n*K, G*w, seen]
            hide_keys(scores, w, window)
            probabilities.append(torch.softmax(scores, dim=-1))
            torch.bmm(probabilities[i], up_to(i, values, window), out=outputs[i])
        ctx.save_for_backward(y, *packed, *probabilities)
        ctx.blocks, ctx.kv_heads = blocks, kv_heads
        ctx.window = window
        return y.index_select(0, blocks.queries.inverse)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks, (y, *saved) = ctx.blocks, ctx.saved_tensors
        dy = grad.index_select(0, blocks.queries.rows).index_fill_(0, blocks.padding, 0)
        inner, dq = torch.linalg.vecdot(dy, y).unsqueeze(-1), torch.empty_like(dy)
        packed = (*saved[:3], dy, inner, dq)
        queries, keys, values, dys, inners, dqs = (as_blocks(x, blocks.shapes, ctx.kv_heads) for x in packed)
        dk, dv = [], []  # of the last w keys of each block, the last block first
        later: tuple[Tensor, Tensor] | None = None  # what later blocks add to the keys and values of this one
        for i in reversed(range(len(blocks.shapes))):
            p, (_, w) = saved[3 + i], blocks.shapes[i]
            ds = (dys[i] @ up_to(i, values, ctx.window).mT).sub_(inners[i]).mul_(p)  # [n*K, G*w, seen]
            torch.bmm(ds, up_to(i, keys, ctx.window), out=dqs[i])
            block_dk, block_dv = ds.mT @ queries[i], p.mT @ dys[i]  # [n*K, seen, h]
            if later is not None:
                at = block_dk.size(1) - later[0].size(1)  # later blocks see no key that is earlier than this one's
                block_dk[: len(later[0]), at:] += later[0]
                block_dv[: len(later[1]), at:] += later[1]
            dk.append(block_dk[:, -w:].flatten(0, 1))
            dv.append(block_dv[:, -w:].flatten(0, 1))
            later = block_dk[:, :-w], block_dv[:, :-w]
        dq = dq.mul_(dq.size(-1) ** -0.5).index_select(0, blocks.queries.inverse)
        dk, dv = (torch.cat(parts[::-1]).index_select(0, blocks.keys.inverse) for parts in (dk, dv))
        return dq, dk, dv, None, None, None


def attention_blocked(q: Tensor, k: Tensor, v: Tensor, blocks: DocumentBlocks, window: int = 0) -> Tensor:
    """`attention_sdpa` through BlockedAttention, with `document_blocks` instead of a mask."""
    rows = (x.flatten(0, 2) for x in (q, k, v))
    return BlockedAttention.apply(*rows, blocks, k.size(2), window).view(q.shape)


def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, kernel: Callable, context: int, window: int = 0
) -> Tensor:
    """`attention_sdpa` through a variable-length kernel: no mask, and no work across documents or before the window.

    No document has more than `context` tokens: the kernels launch programs for as many of each.
    """
    longest = min(q.size(1), context)
    return kernel(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, longest, window).view(q.shape)


def flash_attention(backend: str) -> Callable:
    """(q [N, H, h], k and v [N, K, h], cu_seqlens, longest, window) -> [N, H, h], causal; window 0: none.

    Errors: ImportError; TypeError at a call with a window, by a version that has none.
    """
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and newer

        known = inspect.signature(
            varlen_attn
        ).parameters  # the arguments for causal and grouped attention differ between versions
        sliding = "window_size" in known
        # Versions without the argument take fewer heads of keys and values too: the kernel below knows grouped heads.
        grouped: dict[str, Any] = dict(enable_gqa=True) if "enable_gqa" in known else {}

        def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int) -> Tensor:
            causal: dict[str, Any] = dict(window_size=(window or -1, 0)) if sliding or window else dict(is_causal=True)
            return cast(Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal, **grouped))

        return call
    if backend == "fa3":
        try:
            import flash_attn_interface as module  # pyright: ignore[reportMissingImports] # optional
        except ModuleNotFoundError as error:
            if error.name != "flash_attn_interface":
                raise
            # Builds of the repository's newer commits hold it in a package.
            from flash_attn_3 import (  # pyright: ignore[reportMissingImports]
                flash_attn_interface as module,
            )
    else:
        import flash_attn as module  # pyright: ignore[reportMissingImports] # optional

    def call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int) -> Tensor:
        options: dict[str, Any] = dict(window_size=(window, 0)) if window else {}
        y = module.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True, **options)
        return y[0] if isinstance(y, tuple) else y  # early versions of fa3 return the log-sum-exp too

    return call


def attention_backend(name: str, context: int, window: int = 0) -> Callable[[Documents, int, int], Callable]:
    """A function (documents, heads, kv heads) -> the attention (q, k, v, local) -> y of all layers for a batch.

    `context`: tokens of the longest document. local: attention is limited to the own token and `window` ones before it
    (0: it is not). Errors: ImportError.
    """
    window = window if window < context - 1 else 0  # all of a document is within reach

    def masked(documents: Documents, heads: int, kv_heads: int) -> Callable:
        everything = document_mask(documents.starts)
        nearby = document_mask(documents.starts, window) if window else everything
        return lambda q, k, v, local=False: attention_sdpa(q, k, v, nearby if local else everything)

    def blocked(documents: Documents, heads: int, kv_heads: int) -> Callable:
        if torch.compiler.is_compiling():  # blocks of other shapes in each batch would be other graphs
            return masked(documents, heads, kv_heads)
        blocks = document_blocks(documents.starts, heads, kv_heads)
        return lambda q, k, v, local=False: attention_blocked(q, k, v, blocks, window if local else 0)

    def packed(documents: Documents, heads: int, kv_heads: int) -> Callable:
        bounds = documents.cu_seqlens
        return lambda q, k, v, local=False: attention_packed(q, k, v, bounds, kernel, context, window if local else 0)

    if name in ("sdpa", "blocked"):
        return masked if name == "sdpa" else blocked
    kernel = flash_attention(name)
    return packed


@functools.cache
def attention_fault(name: str, width: int = 64, window: bool = False) -> str:
    """Why a variable-length backend cannot be used on this GPU, in one line; empty where it can.

    A forward and a backward pass of two documents, with grouped heads of this width, are compared with
    `attention_sdpa`: a build that imports may lack this GPU's kernels, this width, grouped heads, or a sliding window.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dy = (
        torch.randn(1, 256, heads, width, generator=generator, device="cuda").bfloat16().requires_grad_()
        for heads in (4, 2, 2, 4)
    )
    starts = torch.tensor([0] * 100 + [100] * 156, dtype=torch.int32, device="cuda")[None]
    documents = Documents(starts, torch.tensor([0, 100, 256], dtype=torch.int32, device="cuda"))
    results = []
    try:
        for backend in (name, "sdpa"):
            y = attention_backend(backend, 256, 40 * window)(documents, 4, 2)(q, k, v, window)
            results.append((y, *torch.autograd.grad(y, (q, k, v), dy)))
        for found, expected in zip(*results, strict=True):
            error = (found.float() - expected.float()).abs().max().item()
            if not error < 0.1:
                return f"its results are wrong by {error:.3g}"
    except Exception as error:  # whatever a stranger's extension raises
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""


def choose_attention(config: Config) -> tuple[str, str]:
    """The attention backend and why: the first of FlashAttention 3, 2, torch's varlen and SDPA that runs here.

    Errors: ConfigError where the requested one cannot run.
    """
    wanted, reasons = config.attention, []
    for name in ("fa3", "fa2", "varlen"):
        if wanted not in ("auto", name):
            continue
        if config.device != "cuda" or config.compute_dtype != "bfloat16":
            reasons.append(f"{name}: takes bfloat16 on CUDA only")
            continue
        fault = attention_fault(name, config.head_dim)
        if not fault and config.window_layers:
            fault = attention_fault(name, config.head_dim, window=True)
        if not fault:
            return name, "; ".join((*reasons, f"{name}: works"))
        reasons.append(f"{name}: {fault}")
    if wanted in ("fa3", "fa2", "varlen"):
        raise ConfigError("ATTENTION", wanted, f"cannot run here ({reasons[0]}); auto takes what can")
    if wanted != "auto":
        return wanted, "asked for"
    return ("blocked", "fastest on CPUs") if config.device == "cpu" else ("sdpa", "; ".join(reasons))


def float8_supported(config: Config) -> bool:
    """Whether FP8 products run on this device's tensor cores: from compute capability 8.9 on."""
    return (
        config.device == "cuda" and config.compute_dtype != "float64" and torch.cuda.get_device_capability() >= (8, 9)
    )


@dataclass(frozen=True)
class Runtime:
    """How a forward pass is computed on this machine: it changes speed and rounding, never the function."""

    dtype: torch.dtype  # of activations and matrix products
    attention: str  # a backend of `attention_backend`
    triton: bool  # Triton kernels, where they support the tensors
    fused_cross_entropy: bool
    float8: bool  # FP8 products run on tensor cores; otherwise they are simulated
    compile: bool
    context: int  # tokens of the longest sequence

    @property
    def master_dtype(self) -> torch.dtype:
        """Of the weights that are trained: float32, or float64 where everything is."""
        return torch.promote_types(self.dtype, torch.float32)


def runtime_of(config: Config) -> Runtime:
    """How this run computes a forward pass. Errors: ConfigError for an attention backend that cannot run here."""
    return Runtime(
        dtype=config.dtype,
        attention=choose_attention(config)[0],
        triton=config.triton_kernels != "0",
        fused_cross_entropy=config.fused_ce_enabled,
        float8=float8_supported(config),
        compile=config.compile == "1",
        context=max(config.train_seq_len, config.longest_context),
    )


# Triton. TRITON_INTERPRET=1 runs the kernels on CPU tensors. Sizes of the weights (vocabulary, widths) are compile-time
# constants. The number of tokens is not, so a new batch size compiles nothing.


def triton_jit(function: Callable) -> Any:
    """`triton.jit` where Triton is installed. Without it the kernels are defined but never called."""
    return function if triton is None else triton.jit(function)


def triton_supports(x: Tensor) -> bool:
    """Whether the Triton kernels can run on x."""
    return triton is not None and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


@triton_jit
def softcap_with_slope(x, KIND: tl.constexpr):
    """t of softcap = cap*t, and dt/dx, for x = logits/cap in float32. A NaN stays one: no minimum or maximum here."""
    square = x * x
    if KIND == "poly":
        raw = x * (1.0 + square * (-1.0 / 3.0 + square * (1.0 / 15.0)))
        raw = tl.where(x > 2.0, 2.0, tl.where(x < -2.0, -2.0, raw))
        t = tl.where(raw > 1.0, 1.0, tl.where(raw < -1.0, -1.0, raw))
        slope = tl.where(t == raw, 1.0 - square + square * square * (1.0 / 3.0), 0.0)
    else:
        # tanh|x| = (1 - e) / (1 + e) with e = exp(-2|x|), which cannot overflow. Below 0.6, 1 - e would lose digits
        # that the cap multiplies; there, x times a least-maximum fit of tanh(x)/x in x^2 (relative error 3e-9).
        tl.static_assert(KIND == "tanh")
        size = tl.abs(x)
        e = tl.exp(-2.0 * size)
        inverse = 1.0 / (1.0 + e)
        near = -0.05378383 + square * (0.020795971 + square * -0.0058951577)
        near = x + x * square * (-0.33333298 + square * (0.13331924 + square * near))
        t = tl.where(size < 0.6, near, tl.where(x < 0.0, e - 1.0, 1.0 - e) * inverse)
        slope = 4.0 * e * inverse * inverse  # 1 - tanh^2 without its cancellation
    return t, slope


@triton_jit
def cross_entropy_forward_kernel(
    logits, targets, nll, lse, row_stride, V: tl.constexpr, CAP: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of logits per program, in one pass: the sum of exponentials follows the running maximum."""
    row = tl.program_id(0).to(tl.int64)  # row * V passes 2^31 with 262,144 tokens of 8,192 logits
    logits += row * row_stride
    highest = tl.full([], -CAP, tl.float32)  # no softcapped logit is lower
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
        t, _ = softcap_with_slope(x * (1.0 / CAP), KIND)
        z = tl.where(columns < V, CAP * t, float("-inf"))
        before, highest = highest, tl.maximum(highest, tl.max(z, axis=0))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(z - highest), axis=0)
    result = highest + tl.log(total)
    target = tl.load(targets + row)
    # A target outside the vocabulary gives NaN instead of an out-of-bounds read.
    x = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    t, _ = softcap_with_slope(x * (1.0 / CAP), KIND)
    tl.store(nll + row, result - CAP * t)
    tl.store(lse + row, result)


@triton_jit
def cross_entropy_backward_kernel(
    logits,
    targets,
    lse,
    grad_nll,
    grad_lse,
    grad,
    row_stride,
    V: tl.constexpr,
    CAP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad = (grad_nll * (softmax - onehot) + grad_lse * softmax) * d softcap, one row [V] per program."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    grad += row * V
    target, row_lse = tl.load(targets + row), tl.load(lse + row)
    to_nll, to_lse = tl.load(grad_nll + row), tl.load(grad_lse + row)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
        t, slope = softcap_with_slope(x * (1.0 / CAP), KIND)
        p = tl.exp(CAP * t - row_lse)
        # Not (to_nll + to_lse) * p - to_nll: where p is near 1, a small to_lse would be lost.
        to_z = to_nll * (p - tl.where(columns == target, 1.0, 0.0)) + to_lse * p
        tl.store(grad + columns, (to_z * slope).to(grad.dtype.element_ty), mask=columns < V)


def cross_entropy_tiles(vocabulary: int) -> dict[str, int]:
    """Columns per block and warps: a row of up to 8,192 logits is one block, with 16 bytes or more for each load."""
    block = min(1 << (vocabulary - 1).bit_length(), 8192)
    return dict(BLOCK=block, num_warps=min(max(block // 512, 1), 8))


class SoftcappedCrossEntropyTriton(torch.autograd.Function):
    """`softcapped_cross_entropy_plain` that saves the logits and one number per row."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, cap: float, kind: str) -> tuple[Tensor, Tensor]:
        vocabulary = logits.size(-1)
        rows, wanted = logits.reshape(-1, vocabulary), targets.reshape(-1).contiguous()
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        nll, lse = (torch.empty(rows.size(0), dtype=torch.float32, device=logits.device) for _ in range(2))
        if rows.size(0):
            cross_entropy_forward_kernel[(rows.size(0),)](
                rows,
                wanted,
                nll,
                lse,
                rows.stride(0),
                V=vocabulary,
                CAP=cap,
                KIND=kind,
                **cross_entropy_tiles(vocabulary),
            )
        ctx.save_for_backward(rows, wanted, lse)
        ctx.cap, ctx.kind = cap, kind
        ctx.shape = logits.shape
        return nll.view(targets.shape), lse.view(targets.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_nll: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None, None]:
        rows, wanted, lse = ctx.saved_tensors
        vocabulary = rows.size(1)
        grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        if rows.size(0):
            cross_entropy_backward_kernel[(rows.size(0),)](
                rows,
                wanted,
                lse,
                grad_nll.reshape(-1).contiguous(),
                grad_lse.reshape(-1).contiguous(),
                grad,
                rows.stride(0),
                V=vocabulary,
                CAP=ctx.cap,
                KIND=ctx.kind,
                **cross_entropy_tiles(vocabulary),
            )
        return grad.view(ctx.shape), None, None, None


def softcapped_cross_entropy_triton(
    logits: Tensor, targets: Tensor, cap: float, kind: str = "tanh"
) -> tuple[Tensor, Tensor]:
    """`softcapped_cross_entropy_plain` of float32, bfloat16 or float16 logits; results are float32.

    One pass over the logits, and one over their gradient, which has the same type. Unlike in the public kernels that
    this replaces, lse is that of the softcapped logits, not shifted by the cap, and its gradient is not dropped.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}")
    return SoftcappedCrossEntropyTriton.apply(logits, targets, float(cap), kind)


# Tiles of the MLP's products: BLOCK_M x BLOCK_N of the result, BLOCK_K at a time. The wide ones fill a multiprocessor
# of an H100 or B200 (208 of its 227 KiB of shared memory). The others fit in the 99 KiB of smaller GPUs. In float32 the
# products are exact (no TF32), on the ordinary cores: for checks rather than for speed.
SIXTEEN_BIT_TILES = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3)
WIDE_TILES = dict(SIXTEEN_BIT_TILES, BLOCK_N=256)
FLOAT32_TILES = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP=8, num_warps=8, num_stages=2)
FLOAT8_TILES = dict(SIXTEEN_BIT_TILES, BLOCK_K=128, num_stages=2)
FLOAT8_WIDE_TILES = dict(WIDE_TILES, BLOCK_K=128)


@triton_jit
def tiled(x, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Descriptor of a contiguous [M, N] in tiles, from its pointer.

    Before sm_90 Triton compiles it to ordinary loads and stores, 16 bytes at a time because N is a constant.
    """
    return tl.make_tensor_descriptor(x, [M, N], [N, 1], [BLOCK_M, BLOCK_N])  # pyright: ignore[reportArgumentType]


@triton_jit
def tile_position(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile. GROUP rows of tiles go column by column, to reuse the L2 cache."""
    across = tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    inside = tile % (GROUP * across)
    row, column = (first + inside % height) * BLOCK_M, (inside // height) * BLOCK_N
    return row.to(tl.int32), column.to(tl.int32)  # as descriptors want them; M may be of 64 bits


@triton_jit
def tile_product(
    a,
    b,
    row,
    column,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile of a [M, K] @ b that begins at (row, column), as its left and right half, in float32.

    b is [K, N], or [N, K] if TRANSPOSED. Halves, because an epilogue that takes the whole tile needs more registers
    and more shared memory than there are (as in the persistent matmul of Triton's tutorials).
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        right = b.load([column, k]).T if TRANSPOSED else b.load([k, column])
        total = tl.dot(a.load([row, k]), right, total, input_precision="ieee")
    return tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton_jit
def store_activation(total, square, leaky, row, column, SLOPE: tl.constexpr):
    """The epilogue of `mlp_up_kernel` for half a tile."""
    y = tl.where(total > 0, total, total * SLOPE).to(square.dtype)
    wide = y.to(tl.float32)  # rounded first: the backward pass takes the derivative at the stored values
    square.store([row, column], (wide * wide).to(square.dtype))
    if leaky is not None:
        leaky.store([row, column], y)


@triton_jit
def mlp_up_kernel(
    x,
    up,
    square,
    leaky,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """square = leaky^2 with leaky = leaky_relu(x [M, K] @ up^T [K, N]), which is stored too unless it is None.

    All matrices are descriptors, or all are pointers. The kernel is persistent: every program walks over tiles. In the
    flattened loop, the next tile's loads begin before this one's stores.
    """
    half: tl.constexpr = BLOCK_N // 2
    if isinstance(x, tl.tensor):  # Descriptors are passed to no function that returns them: torch 2.11 loses track.
        x, up = tiled(x, M, K, BLOCK_M, BLOCK_K), tiled(up, N, K, BLOCK_N, BLOCK_K)
        square = tiled(square, M, N, BLOCK_M, half)
        if leaky is not None:
            leaky = tiled(leaky, M, N, BLOCK_M, half)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        left, right = tile_product(x, up, row, column, K, True, BLOCK_M, BLOCK_N, BLOCK_K)
        store_activation(left, square, leaky, row, column, SLOPE)
        store_activation(right, square, leaky, row, column + half, SLOPE)


@triton_jit
def store_activation_gradient(total, leaky, grad_up, row, column, SLOPE: tl.constexpr):
    """The epilogue of `mlp_up_backward_kernel` for half a tile."""
    y = leaky.load([row, column]).to(tl.float32)
    total *= y * tl.where(y > 0, 2.0, 2.0 * SLOPE)
    grad_up.store([row, column], total.to(grad_up.dtype))


@triton_jit
def mlp_up_backward_kernel(
    grad,
    down,
    leaky,
    grad_up,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """grad_up = (grad [M, K] @ down [K, N]) * d leaky^2, the gradient of x up^T."""
    half: tl.constexpr = BLOCK_N // 2
    if isinstance(grad, tl.tensor):
        grad, down = tiled(grad, M, K, BLOCK_M, BLOCK_K), tiled(down, K, N, BLOCK_K, BLOCK_N)
        leaky, grad_up = tiled(leaky, M, N, BLOCK_M, half), tiled(grad_up, M, N, BLOCK_M, half)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        left, right = tile_product(grad, down, row, column, K, False, BLOCK_M, BLOCK_N, BLOCK_K)
        store_activation_gradient(left, leaky, grad_up, row, column, SLOPE)
        store_activation_gradient(right, leaky, grad_up, row, column + half, SLOPE)


def mlp_launch(x: Tensor) -> tuple[int, bool, dict[str, int]]:
    """Launch of the MLP's kernels for x's device and type: programs, whether they get tensor descriptors, tiles.

    From sm_90 on, descriptors come from the host: those that a kernel makes need memory from Triton's allocator. On
    older GPUs the kernel makes them: in descriptors from the host the compiler would not see that rows are aligned.
    """
    tiles = {1: FLOAT8_TILES, 2: SIXTEEN_BIT_TILES}.get(x.element_size(), FLOAT32_TILES)
    if x.device.type != "cuda":  # under the interpreter, where any number of programs will do
        return 3, False, tiles
    gpu = torch.cuda.get_device_properties(x.device)
    if gpu.major in (9, 10) and tiles is not FLOAT32_TILES:
        return gpu.multi_processor_count, True, FLOAT8_WIDE_TILES if tiles is FLOAT8_TILES else WIDE_TILES
    return 2 * gpu.multi_processor_count, gpu.major >= 9, tiles


def launch_mlp(
    kernel: Any, a: Tensor, b: Tensor, b_axes: str, *results: Tensor | None, slope: float, **more: Tensor | float
) -> None:
    """Runs a kernel of the MLP: a [M, K], b with axes "NK" or "KN", and its other matrices in its order, [M, N].

    `more` are arguments that this kernel alone has.
    """
    rows, width = a.shape
    if not rows:
        return
    programs, described, tiles = mlp_launch(a)
    arguments: list[Any] = [a.contiguous(), b.contiguous(), *results]
    if described:
        blocks = [[tiles["BLOCK_M"], tiles["BLOCK_K"]], [tiles["BLOCK_" + axis] for axis in b_axes]]
        blocks += [[tiles["BLOCK_M"], tiles["BLOCK_N"] // 2]] * len(results)
        pairs = zip(arguments, blocks, strict=True)
        arguments = [x if x is None else TensorDescriptor.from_tensor(x, block) for x, block in pairs]
    hidden = b.size(b_axes.index("N"))
    kernel[(programs,)](*arguments, rows, N=hidden, K=width, SLOPE=slope, **more, **tiles)


def mlp_up_triton(x: Tensor, up: Tensor, slope: float, keep: bool) -> tuple[Tensor, Tensor | None]:
    """x [M, d], up [hidden, d] -> leaky_relu(x up^T)^2 [M, hidden] and, if `keep`, the same without the square."""
    rows, hidden = x.size(0), up.size(0)
    square = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    leaky = torch.empty(rows, hidden, dtype=x.dtype, device=x.device) if keep else None
    launch_mlp(mlp_up_kernel, x, up, "NK", square, leaky, slope=slope)
    return square, leaky


class MLPTriton(torch.autograd.Function):
    """`mlp_plain` that saves x, the leaky ReLU, which has the sign of x up^T, and where `down` trains also its square.

    The square could be computed again, but writing it once more costs the time that it takes to read it.
    x [M, d], up [hidden, d], down [out, hidden] -> [M, out]. Products without an epilogue are torch's.
    """

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
        square, leaky = mlp_up_triton(x, up, slope, keep=True)
        ctx.save_for_backward(x, up, down, leaky, square if ctx.needs_input_grad[2] else None)
        ctx.slope = slope
        return square @ down.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, leaky, square = ctx.saved_tensors
        for_x, for_up, *_ = ctx.needs_input_grad
        grad_up = torch.empty(leaky.shape, dtype=x.dtype, device=x.device)
        launch_mlp(mlp_up_backward_kernel, grad, down, "KN", leaky, grad_up, slope=ctx.slope)
        return (
            grad_up @ up if for_x else None,
            grad_up.mT @ x if for_up else None,
            None if square is None else grad.mT @ square,
            None,
        )


def mlp_triton(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """`mlp_plain` of float32, bfloat16 or float16 tensors of one type, with a slope of at least 0.

    The activation is the epilogue of its product (as in modded-nanogpt's ReLU^2 kernel), its derivative that of the
    product before it. Without gradients only the square is written. The kernels take matrices by tensor descriptors,
    which need rows of whole 16 bytes: other widths are left to `mlp_plain`.
    """
    if up.size(1) != x.size(-1) or down.size(1) != up.size(0):
        raise ValueError(f"x {tuple(x.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} do not fit")
    if slope < 0:
        raise ValueError(f"slope {slope}: the sign of the activation must be that of its input")
    if any(width * x.element_size() % 16 for width in (*up.shape, down.size(0))):
        return mlp_plain(x, up, down, slope)
    rows = x.reshape(-1, x.size(-1))
    if torch.is_grad_enabled():
        y = MLPTriton.apply(rows, up, down, float(slope))
    else:
        y = mlp_up_triton(rows, up, float(slope), keep=False)[0] @ down.mT
    return y.view(*x.shape[:-1], down.size(0))


@triton_jit
def store_float8_activation(
    total, rounded, square, leaky, up_factor, square_scale, row, column, SLOPE: tl.constexpr, END: tl.constexpr
):
    """The epilogue of `mlp_up_float8_kernel` for half a tile. A NaN stays one."""
    total *= up_factor
    y = tl.where(total > 0, total, total * SLOPE).to(leaky.dtype)
    leaky.store([row, column], y)
    wide = y.to(tl.float32)
    z = (wide * wide).to(square.dtype)  # rounded to this type before it is rounded to e4m3, as without this kernel
    square.store([row, column], z)
    scaled = z.to(tl.float32) * square_scale
    rounded.store([row, column], tl.where(scaled > END, END, scaled).to(rounded.dtype))


@triton_jit
def mlp_up_float8_kernel(
    x,
    up,
    rounded,
    square,
    leaky,
    M,
    up_factor,
    square_scale,
    N: tl.constexpr,
    K: tl.constexpr,
    SLOPE: tl.constexpr,
    END: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As `mlp_up_kernel`, with x and up in e4m3, and rounded = square * square_scale in e4m3, where END is its end.

    up_factor takes the scales of x and up from their product; it and square_scale are pointers to one float32.
    """
    half: tl.constexpr = BLOCK_N // 2
    if isinstance(x, tl.tensor):
        x, up = tiled(x, M, K, BLOCK_M, BLOCK_K), tiled(up, N, K, BLOCK_N, BLOCK_K)
        square, leaky = tiled(square, M, N, BLOCK_M, half), tiled(leaky, M, N, BLOCK_M, half)
        rounded = tiled(rounded, M, N, BLOCK_M, half)
    factor, scale = tl.load(up_factor), tl.load(square_scale)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        left, right = tile_product(x, up, row, column, K, True, BLOCK_M, BLOCK_N, BLOCK_K)
        store_float8_activation(left, rounded, square, leaky, factor, scale, row, column, SLOPE, END)
        store_float8_activation(right, rounded, square, leaky, factor, scale, row, column + half, SLOPE, END)


def mlp_up_float8_triton(
    x: Tensor, up: Tensor, up_factor: Tensor, square_scale: Tensor, slope: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, d], up [hidden, d] in e4m3 -> y = leaky_relu(x up^T * up_factor), all [M, hidden].

    Returns y^2 * square_scale in e4m3, and y^2 and y in `dtype`.
    """
    rounded = torch.empty(x.size(0), up.size(0), dtype=x.dtype, device=x.device)
    square, leaky = (torch.empty(rounded.shape, dtype=dtype, device=x.device) for _ in range(2))
    pointers = dict(up_factor=up_factor, square_scale=square_scale, END=E4M3_MAX)
    launch_mlp(mlp_up_float8_kernel, x, up, "NK", rounded, square, leaky, slope=slope, **pointers)
    return rounded, square, leaky


class MLPFloat8Triton(MLPTriton):
    """`mlp_float8` with the activation and its rounding in the first product. Backward is that of `MLPTriton`.

    x [M, d], up [hidden, d], down [out, hidden], all of one type -> [M, out].
    """

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
        x_scale, square_scale = rms_norm_scale(x), hidden_scale(up)
        up_scale, down_scale = weight_scale(up), weight_scale(down)
        x8, up8 = to_e4m3(x, x_scale), to_e4m3(up, up_scale)
        factor = (x_scale * up_scale).reciprocal()
        rounded, square, leaky = mlp_up_float8_triton(x8, up8, factor, square_scale, slope, x.dtype)
        ctx.save_for_backward(x, up, down, leaky, square if ctx.needs_input_grad[2] else None)
        ctx.slope = slope
        return float8_product(rounded, to_e4m3(down, down_scale), square_scale, down_scale, x.dtype, native=True)


def mlp_float8_triton(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """`mlp_float8` of 16-bit tensors on FP8 tensor cores, with widths that are multiples of 16.

    Without the kernel, the hidden activations would be written and read once more, and FP8 would gain nothing.
    """
    rows = x.reshape(-1, x.size(-1))
    return MLPFloat8Triton.apply(rows, up, down, float(slope)).view(*x.shape[:-1], down.size(0))


# --- A step of the adapters ---


@triton_jit
def adapter_step_kernel(
    p, square, grad, low, row_step, lr, decay, beta2, root, eps, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """AdamW with a first beta of 0, of a row of ROW elements. `low`: p's copy, or None.

    `root` points to the root of the bias correction: a CUDA graph would repeat a number. Without a first moment 20
    bytes an element are moved instead of 40, casts in the model included.
    """
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, row = columns < ROW, tl.program_id(0).to(tl.int64)
    places = row * ROW + columns
    g = tl.load(grad + row * row_step + columns, mask=mask).to(tl.float32)
    v = tl.load(square + places, mask=mask)
    v = beta2 * v + (1.0 - beta2) * g * g
    tl.store(square + places, v, mask=mask)
    x = tl.load(p + places, mask=mask) * (1.0 - lr * decay)
    x -= lr * g / (tl.sqrt(v) / tl.load(root) + eps)
    tl.store(p + places, x, mask=mask)
    if low is not None:
        tl.store(low + places, x.to(low.dtype.element_ty), mask=mask)


def adapter_step_triton(
    p: Tensor,
    square: Tensor,
    grad: Tensor,
    low: Tensor | None,
    lr: float,
    decay: float,
    beta2: float,
    root: Tensor,
    eps: float,
) -> None:
    """One step of adapters p [B, calls, m, n] float32 in place; grad may be a part of a larger tensor's rows.

    root [1] float32: the root of the bias correction.
    """
    rows, row = p.shape[0] * p.shape[1], p.shape[2] * p.shape[3]
    if grad.stride(0) != grad.size(1) * grad.stride(1) or not grad[0, 0].is_contiguous():
        grad = grad.contiguous()
    grid = (rows, -(-row // 2048))
    adapter_step_kernel[grid](
        p, square, grad, low, grad.stride(1), lr, decay, beta2, root, eps, ROW=row, BLOCK=2048, num_warps=8
    )


# What surrounds attention: bound by memory, and Inductor needs several passes over the same tensors for each part. One
# program takes a block of tokens (or of their key heads) and goes through the heads, so every number is read once. Row
# strides are compile-time constants: rows of [d + 2 K h + H] are aligned to 16 bytes, and only a constant tells so.


def attention_kernels_support(q: Tensor, width: int, rotary: int) -> bool:
    """Whether `query_key_triton` and `head_output_triton` can run on q's heads of this width and rotary dimensions."""
    return triton_supports(q) and all(n & (n - 1) == 0 for n in (width, rotary))


def head_tiles(width: int) -> dict[str, int]:
    """Rows of a head's width per block and warps: 16 bytes for each thread and load in 16 bits."""
    return dict(BLOCK=max(1024 // width, 1), num_warps=4)


def token_rows(x: Tensor) -> Tensor:
    """[B, T, n] or [B, T, n, h] -> [B T, all of a token's numbers], a view where each token's lie side by side."""
    rows = x.reshape(x.size(0) * x.size(1), math.prod(x.shape[2:]))
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton_jit
def load_heads(x, token, head, mask, ROW: tl.constexpr, WIDTH: tl.constexpr):
    """One head of each token, float32 [BLOCK, WIDTH]; tokens are ROW numbers apart, heads WIDTH."""
    places = (token.to(tl.int64) * ROW + head * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    return tl.load(x + places, mask=mask, other=0.0).to(tl.float32)


@triton_jit
def store_heads(x, value, token, head, mask, ROW: tl.constexpr, WIDTH: tl.constexpr):
    """Stores where `load_heads` loads."""
    places = (token.to(tl.int64) * ROW + head * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    tl.store(x + places, value.to(x.dtype.element_ty), mask=mask)


@triton_jit
def head_gate(gate, token, head, inside, ROW: tl.constexpr, SCALE: tl.constexpr):
    """sigmoid(SCALE * gate) of one head of each token, [BLOCK]."""
    g = tl.load(gate + token.to(tl.int64) * ROW + head, mask=inside, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-SCALE * g))


@triton_jit
def head_output_forward_kernel(
    y,
    v,
    gate,
    out,
    rows,
    V_ROW: tl.constexpr,
    GATE_ROW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`head_output_plain` for BLOCK rows, each a token's key head with its GROUP query heads."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, kv_head = row // KV_HEADS, row % KV_HEADS
    inside = row < rows
    mask = inside[:, None]
    unit = tl.zeros([BLOCK, WIDTH], tl.float32)
    if v is not None:
        unit = load_heads(v, token, kv_head, mask, V_ROW, WIDTH)
        unit *= (1.0 / tl.maximum(tl.sqrt(tl.sum(unit * unit, axis=1)), 1e-12))[:, None]
    for i in range(GROUP):
        z = load_heads(y, row, i, mask, GROUP * WIDTH, WIDTH)
        if v is not None:
            z -= tl.sum(z * unit, axis=1)[:, None] * unit
        if gate is not None:
            z *= (FACTOR * head_gate(gate, token, kv_head * GROUP + i, inside, GATE_ROW, SCALE))[:, None]
        store_heads(out, z, row, i, mask, GROUP * WIDTH, WIDTH)


@triton_jit
def head_output_backward_kernel(
    grad,
    y,
    v,
    gate,
    grad_y,
    grad_v,
    grad_gate,
    rows,
    V_ROW: tl.constexpr,
    GATE_ROW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All gradients of `head_output_plain`, for the rows of `head_output_forward_kernel`.

    With u = v/|v| and z = y - (y.u) u, a gradient g of z gives g - (g.u) u for y and n = -sum((y.u) g + (g.u) y) for u,
    summed over the query heads; v's is (n - (n.u) u) / |v|.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, kv_head = row // KV_HEADS, row % KV_HEADS
    inside = row < rows
    mask = inside[:, None]
    unit = tl.zeros([BLOCK, WIDTH], tl.float32)
    to_unit = tl.zeros([BLOCK, WIDTH], tl.float32)
    norm = tl.zeros([BLOCK], tl.float32)
    inverse = tl.zeros([BLOCK], tl.float32)
    twice = tl.zeros([BLOCK], tl.float32)  # -n.u
    if v is not None:
        unit = load_heads(v, token, kv_head, mask, V_ROW, WIDTH)
        norm = tl.sqrt(tl.sum(unit * unit, axis=1))
        inverse = 1.0 / tl.maximum(norm, 1e-12)
        unit *= inverse[:, None]
    for i in range(GROUP):
        z = load_heads(y, row, i, mask, GROUP * WIDTH, WIDTH)
        g = load_heads(grad, row, i, mask, GROUP * WIDTH, WIDTH)
        if v is not None:
            along = tl.sum(z * unit, axis=1)
            z -= along[:, None] * unit
        if gate is not None:
            place = token.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + i
            s = head_gate(gate, token, kv_head * GROUP + i, inside, GATE_ROW, SCALE)
            to_gate = tl.sum(z * g, axis=1) * (FACTOR * SCALE) * s * (1.0 - s)
            tl.store(grad_gate + place, to_gate.to(grad_gate.dtype.element_ty), mask=inside)
            g *= (FACTOR * s)[:, None]
        if v is not None:
            to_along = tl.sum(g * unit, axis=1)
            # y = z + (y.u) u, so that y itself need not be kept.
            to_unit -= along[:, None] * g + to_along[:, None] * z + (along * to_along)[:, None] * unit
            twice += 2.0 * along * to_along
            g -= to_along[:, None] * unit
        store_heads(grad_y, g, row, i, mask, GROUP * WIDTH, WIDTH)
    if v is not None:
        # A norm below F.normalize's least is a constant to it.
        to_v = (to_unit + tl.where(norm >= 1e-12, twice, 0.0)[:, None] * unit) * inverse[:, None]
        store_heads(grad_v, to_v, row, 0, mask, WIDTH, WIDTH)


class HeadOutputTriton(torch.autograd.Function):
    """`head_output_plain` that saves its inputs alone; its backward pass reads each once and gives all gradients."""

    @staticmethod
    def forward(ctx, y: Tensor, v: Tensor | None, gate: Tensor | None, scale: float, factor: float) -> Tensor:
        y = y.contiguous()
        sequences, length, heads, width = y.shape
        kv_heads = heads if v is None else v.size(2)
        constants = dict(KV_HEADS=kv_heads, GROUP=heads // kv_heads, WIDTH=width, SCALE=scale, FACTOR=factor)
        v_rows, gate_rows = (None if x is None else token_rows(x) for x in (v, gate))
        constants["V_ROW"] = 0 if v_rows is None else v_rows.stride(0)
        constants["GATE_ROW"] = 0 if gate_rows is None else gate_rows.stride(0)
        constants |= head_tiles(width)
        out = torch.empty(sequences, length, heads * width, dtype=y.dtype, device=y.device)
        rows = sequences * length * kv_heads
        if rows:
            head_output_forward_kernel[(-(-rows // constants["BLOCK"]),)](y, v_rows, gate_rows, out, rows, **constants)
        ctx.save_for_backward(y, v_rows, gate_rows)
        ctx.constants = constants
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, v, gate = ctx.saved_tensors
        constants, (sequences, length, _, width) = ctx.constants, y.shape
        kv_heads = constants["KV_HEADS"]
        grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        shape = (sequences, length, kv_heads, width)
        grad_v = None if v is None else torch.empty(shape, dtype=v.dtype, device=y.device)
        grad_gate = None if gate is None else torch.empty(y.shape[:3], dtype=gate.dtype, device=y.device)
        rows = sequences * length * kv_heads
        if rows:
            head_output_backward_kernel[(-(-rows // constants["BLOCK"]),)](
                grad.contiguous(), y, v, gate, grad_y, grad_v, grad_gate, rows, **constants
            )
        return grad_y, grad_v, grad_gate, None, None


def head_output_triton(
    y: Tensor, v: Tensor | None, gate: Tensor | None, scale: float = 1.0, factor: float = 1.0
) -> Tensor:
    """`head_output_plain` of float32, bfloat16 or float16 tensors, with a head's width a power of two."""
    shape = y.shape[:3]
    if v is not None and (v.shape != (*shape[:2], v.size(2), y.size(3)) or shape[2] % v.size(2)):
        raise ValueError(f"y {tuple(y.shape)} and v {tuple(v.shape)} do not fit")
    if gate is not None and gate.shape != shape:
        raise ValueError(f"y {tuple(y.shape)} and gate {tuple(gate.shape)} do not fit")
    if v is None and gate is None:
        return y.flatten(2)
    return HeadOutputTriton.apply(y, v, gate, float(scale), float(factor))


@triton_jit
def rotation(cos, sin, token, inside, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """c and s of each token and column, [BLOCK, WIDTH]: `rotate_plain` of x is c * x + s * swap_halves(x)."""
    column = tl.arange(0, WIDTH)
    mask = inside[:, None] & (column < 2 * HALF)[None, :]
    places = (token.to(tl.int64) * HALF)[:, None] + (column % HALF)[None, :]
    c = tl.load(cos + places, mask=mask, other=1.0).to(tl.float32)
    s = tl.load(sin + places, mask=mask, other=0.0).to(tl.float32)
    return c, tl.where((column < HALF)[None, :], s, -s)


@triton_jit
def swap_halves(x, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """x [BLOCK, WIDTH] with columns i and i + HALF exchanged in every 2 HALF, without memory: as in Triton's sort."""
    bits = tl.reshape(x.to(tl.int32, bitcast=True), (BLOCK, WIDTH // (2 * HALF), 2, HALF))
    bits ^= tl.xor_sum(bits, axis=2, keep_dims=True)
    return tl.reshape(bits, (BLOCK, WIDTH)).to(tl.float32, bitcast=True)


@triton_jit
def inverse_rms(x, WIDTH: tl.constexpr):
    """One over the root mean square of each row, [BLOCK, 1], with `F.rms_norm`'s epsilon, that of float32."""
    return tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / WIDTH) + 1.1920929e-07)[:, None]


@triton_jit
def query_key_forward_kernel(
    q,
    k,
    cos,
    sin,
    gain,
    q_out,
    k_out,
    tokens,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`query_key_plain` of BLOCK tokens."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    mask = inside[:, None]
    c, s = rotation(cos, sin, token, inside, WIDTH, HALF)
    for head in range(HEADS):
        x = load_heads(q, token, head, mask, Q_ROW, WIDTH)
        x *= inverse_rms(x, WIDTH) * tl.load(gain + head).to(tl.float32)
        x = c * x + s * swap_halves(x, WIDTH, HALF, BLOCK)
        store_heads(q_out, x, token, head, mask, HEADS * WIDTH, WIDTH)
    for head in range(KV_HEADS):
        x = load_heads(k, token, head, mask, K_ROW, WIDTH)
        x *= inverse_rms(x, WIDTH)
        x = c * x + s * swap_halves(x, WIDTH, HALF, BLOCK)
        store_heads(k_out, x, token, head, mask, KV_HEADS * WIDTH, WIDTH)


@triton_jit
def norm_gradient(g, x, c, s, WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of x from g, that of its norm after rotation, and g's product with that [BLOCK, 1]."""
    g = c * g - s * swap_halves(g, WIDTH, HALF, BLOCK)
    inverse = inverse_rms(x, WIDTH)
    x *= inverse
    along = tl.sum(g * x, axis=1)[:, None]
    return (g - x * (along * (1.0 / WIDTH))) * inverse, along


@triton_jit
def query_key_backward_kernel(
    grad_q,
    grad_k,
    grad_v,
    grad_own,
    grad_gate,
    q,
    k,
    cos,
    sin,
    gain,
    grad,
    grad_gain,
    added_q,
    added_k,
    added_v,
    tokens,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GATES: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient [tokens, ROW] of q, k, v and gate side by side, and each block's part of the gain's [HEADS].

    added_q, added_k and added_v, where they are not None: the first three once more, by themselves.
    """
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * WIDTH + GATES
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    mask = inside[:, None]
    c, s = rotation(cos, sin, token, inside, WIDTH, HALF)
    for head in range(HEADS):
        x = load_heads(q, token, head, mask, Q_ROW, WIDTH)
        g = load_heads(grad_q, token, head, mask, HEADS * WIDTH, WIDTH)
        g, along = norm_gradient(g, x, c, s, WIDTH, HALF, BLOCK)
        g *= tl.load(gain + head).to(tl.float32)
        store_heads(grad, g, token, head, mask, ROW, WIDTH)
        if added_q is not None:
            store_heads(added_q, g, token, head, mask, HEADS * WIDTH, WIDTH)
        tl.store(grad_gain + tl.program_id(0) * HEADS + head, tl.sum(along))
    for head in range(KV_HEADS):
        x = load_heads(k, token, head, mask, K_ROW, WIDTH)
        g = load_heads(grad_k, token, head, mask, KV_HEADS * WIDTH, WIDTH)
        g, _ = norm_gradient(g, x, c, s, WIDTH, HALF, BLOCK)
        store_heads(grad, g, token, HEADS + head, mask, ROW, WIDTH)
        if added_k is not None:
            store_heads(added_k, g, token, head, mask, KV_HEADS * WIDTH, WIDTH)
    for head in range(KV_HEADS):
        g = load_heads(grad_v, token, head, mask, KV_HEADS * WIDTH, WIDTH)
        if grad_own is not None:
            g += load_heads(grad_own, token, head, mask, KV_HEADS * WIDTH, WIDTH)
        store_heads(grad, g, token, HEADS + KV_HEADS + head, mask, ROW, WIDTH)
        if added_v is not None:
            store_heads(added_v, g, token, head, mask, KV_HEADS * WIDTH, WIDTH)
    if grad_gate is not None:
        for i in range(GATES):
            g = tl.load(grad_gate + token.to(tl.int64) * GATES + i, mask=inside, other=0.0)
            tl.store(grad + token.to(tl.int64) * ROW + (ROW - GATES) + i, g, mask=inside)


class QueryKeyTriton(torch.autograd.Function):
    """`query_key_plain` that saves its inputs alone.

    v and gate go through it as they are, v twice if `twice`. q, k, v and gate are parts of one product, so their
    gradients are written as parts of its gradient: the concatenation of neighbours is no work for the compiler, where
    nothing else reads them. So what is added to q, k and v has gradients of its own.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        added_q: Tensor | None,
        added_k: Tensor | None,
        added_v: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        gain: Tensor,
        twice: bool,
    ) -> tuple[Tensor | None, ...]:
        sequences, length, dim = q.shape
        tokens, heads = sequences * length, gain.size(0)
        width, half = dim // heads, cos.size(-1)
        kv_heads = k.size(2) // width
        q = token_rows(q if added_q is None else q + added_q)
        k = token_rows(k if added_k is None else k + added_k)
        v = v.view_as(v) if added_v is None else v + added_v
        tables = [x.reshape(tokens, half).contiguous() for x in (cos, sin)]
        constants = dict(Q_ROW=q.stride(0), K_ROW=k.stride(0), HEADS=heads, KV_HEADS=kv_heads)
        constants |= dict(WIDTH=width, HALF=half, **head_tiles(width))
        q_out = torch.empty(sequences, length, heads, width, dtype=q.dtype, device=q.device)
        k_out = torch.empty(sequences, length, kv_heads, width, dtype=k.dtype, device=k.device)
        if tokens:
            query_key_forward_kernel[(-(-tokens // constants["BLOCK"]),)](
                q, k, *tables, gain, q_out, k_out, tokens, **constants
            )
        ctx.save_for_backward(q, k, *tables, gain)
        ctx.constants, ctx.shape = constants, (sequences, length)
        ctx.gates = 0 if gate is None else gate.size(2)
        ctx.added = [x is not None for x in (added_q, added_k, added_v)]
        v = v.view(k_out.shape)
        return q_out, k_out, v, v.view_as(v) if twice else None, None if gate is None else gate.view_as(gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad_own: Tensor | None, grad_gate: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, cos, sin, gain = ctx.saved_tensors
        constants, (sequences, length) = ctx.constants, ctx.shape
        heads, kv_dim = constants["HEADS"], constants["KV_HEADS"] * constants["WIDTH"]
        widths = [heads * constants["WIDTH"], kv_dim, kv_dim]
        added = [
            torch.empty(sequences, length, width, dtype=q.dtype, device=q.device) if wanted else None
            for width, wanted in zip(widths, ctx.added, strict=True)
        ]
        widths += [] if grad_gate is None else [ctx.gates]
        grad = torch.empty(sequences, length, sum(widths), dtype=q.dtype, device=q.device)
        blocks = -(-sequences * length // constants["BLOCK"])
        grad_gain = torch.empty(blocks, heads, dtype=torch.float32, device=q.device)
        incoming = (x if x is None else x.contiguous() for x in (grad_q, grad_k, grad_v, grad_own, grad_gate))
        if blocks:
            query_key_backward_kernel[(blocks,)](
                *incoming,
                q,
                k,
                cos,
                sin,
                gain,
                grad,
                grad_gain,
                *added,
                sequences * length,
                GATES=ctx.gates,
                **constants,
            )
        for_q, for_k, for_v, *for_gate = grad.split(widths, dim=2)
        for_gain = grad_gain.sum(0).to(gain.dtype)
        return for_q, for_k, for_v, *(for_gate or [None]), *added, None, None, for_gain, None


def query_key_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    *,
    twice: bool,
    added: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`query_key_plain` of q [B, T, H h] and k [B, T, K h], and v [B, T, K, h], v again (None unless `twice`) and gate.

    float32, bfloat16 or float16 tensors with any strides; h and the rotary dimensions are powers of two. v [B, T, K h]
    and gate [B, T, any], or None, stay as they are: they take part for the sake of their gradients, and v twice where
    two uses of it give gradients to add. added: what to add to the tensors of the keys q, k and v first.
    """
    heads, half = gain.size(0), cos.size(-1)
    width = q.size(2) // heads
    if q.size(2) % heads or k.size(2) % width or v.shape != k.shape or 2 * half > width:
        shapes = (tuple(x.shape) for x in (q, k, v, gain, cos))
        raise ValueError("q {}, k {}, v {}, gain {} and cos {} do not fit".format(*shapes))
    return QueryKeyTriton.apply(q, k, v, gate, *(added.get(key) for key in "qkv"), cos, sin, gain, twice)


# ---------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------


class LayerCall(NamedTuple):
    """One call of a layer in the forward pass. Loops call a layer several times."""

    layer: int
    skip: int | None  # row of the skip weights with which a saved output is blended in first; None: no skip
    save: bool  # save the output for the second half
    parallel: bool  # attention and MLP have residual streams of their own


def layer_schedule(config: ModelConfig, looped: bool) -> tuple[LayerCall, ...]:
    """The U-Net over the execution order: the first half saves outputs, the second takes them, last in first out."""
    order = execution_order(config, looped)
    half = len(order) // 2
    calls = []
    for place, layer in enumerate(order):
        skip = place - half if half <= place < 2 * half else None
        parallel = config.parallel_residual and layer >= config.parallel_start_layer
        calls.append(LayerCall(layer, skip, save=place < half, parallel=parallel))
    return tuple(calls)


class Projection(nn.Module):
    """A matrix product with a matrix that lives in a bank. As a module it takes hooks, for calibration.

    x [B, T, in], weight [out, in] -> [B, T, out].
    """

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight)


class Lookup(nn.Module):
    """A lookup in an embedding table, as a module that takes hooks. indices [...], table [n, c] -> [..., c]."""

    def forward(self, indices: Tensor, table: Tensor) -> Tensor:
        return F.embedding(indices, table)


class LayerWeights(NamedTuple):
    """One layer's weights: matrices of the banks in the compute type, and the block's own vectors and gates."""

    qkv: Tensor  # [d + 2 K h + H, d]: q, k, v and, where heads have gates, the gates' weights, zeros past the window
    out: Tensor
    up: Tensor
    down: Tensor
    input_mix: Tensor  # [2, d], m0 and m1
    attention_scale: Tensor  # [d]
    mlp_scale: Tensor  # [d]
    query_gain: Tensor  # [H]
    value_scale: Tensor | None  # [1]
    stream_mix: Tensor | None  # [2, 3], r, p and q of both residual streams
    value_gate: Tensor | None  # [1]
    xsa_gate: Tensor | None  # [H]

    def detached(self) -> LayerWeights:
        """The same weights as constants."""
        return LayerWeights(*(cast(Tensor, None if w is None else w.detach()) for w in self))


# Low-rank pairs by key: q, k, v, attention and mlp of all layer calls, A [B, calls, r, in] and B [B, calls, out, r],
# and head with calls = 1. Whole, not a pair for each call: each input of a compiled graph costs checks at every call.
StackedAdapters = dict[str, tuple[Tensor, Tensor]]


class CallAdapters(NamedTuple):
    """The low-rank pairs of one layer call, in the compute type."""

    keys: tuple[str, ...] = ()  # of those that read attention's normed input: q, k, v, attention
    a: Tensor | None = None  # [B, their ranks, d], one A below the other: their input is read once
    b: tuple[Tensor, ...] = ()  # [B, out, r] of each
    mlp: tuple[Tensor, Tensor] | None = None  # A and B

    def of_attention(self, n: Tensor) -> dict[str, Tensor]:
        """What they add, [B, T, out] by key, given attention's normed input [B, T, d]."""
        if self.a is None:
            return {}
        parts = batched_linear(n, self.a).split([b.size(-1) for b in self.b], dim=-1)
        return {key: batched_linear(part, b) for key, part, b in zip(self.keys, parts, self.b, strict=True)}


def adapters_of_calls(adapters: StackedAdapters, calls: int, dtype: torch.dtype) -> list[CallAdapters]:
    """The adapters of each layer call. Stacks are cast and joined whole, before they are taken apart."""
    keys = tuple(key for key in ("q", "k", "v", "attention") if key in adapters)
    columns: dict[str, Iterable] = {}
    if keys:
        columns["a"] = torch.cat([adapters[key][0].to(dtype) for key in keys], dim=2).unbind(1)
        columns["b"] = zip(*(adapters[key][1].to(dtype).unbind(1) for key in keys), strict=True)
    if "mlp" in adapters:
        columns["mlp"] = zip(*(x.to(dtype).unbind(1) for x in adapters["mlp"]), strict=True)
    if not columns:
        return [CallAdapters()] * calls
    rows = zip(*columns.values(), strict=True)
    return [CallAdapters(keys, **dict(zip(columns, row, strict=True))) for row in rows]


class AttentionContext(NamedTuple):
    """What the attention of every layer uses in one forward pass."""

    attention: Callable  # (q [B, T, H, h], k, v [B, T, K, h], local) -> y [B, T, H, h]
    cos: Tensor  # [B, T, 1, rotary/2], of the places in the documents
    sin: Tensor
    value_embeds: Tensor | None  # [B, T, K*h], before each layer's own scale
    first_values: Tensor | None  # [B, T, K*h], the first layer's values; None before they are there or without use
    inside: Tensor | None  # [B, T] bool, the token before is of the same document; None: keys have no offset
    triton: bool  # Triton kernels around attention, where they support the tensors


# Not cuDNN, which PyTorch prefers on an H100: it makes a plan for each shape that it meets.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Past(NamedTuple):
    """What a pass of T tokens finds of C earlier ones. The last of them may be the first of the pass."""

    keys: Tensor  # [B, calls, C, K, h], as each layer call had them
    values: Tensor
    mask: Tensor  # [T, C + T] bool: a token sees a key, of the C earlier tokens and then of its own pass
    near: Tensor  # [T, C + T] bool: ... in layers whose attention has a window

    def attention(
        self, call: int, seen: list[tuple[Tensor, Tensor]] | None, q: Tensor, k: Tensor, v: Tensor, local: bool = False
    ) -> Tensor:
        """The attention of a layer call, as in AttentionContext. It adds the pass's keys and values to `seen`.

        Queries of a key's heads stand one after the other, as if they were more tokens: there are fewer queries than
        keys, which would have to be repeated.
        """
        if seen is not None:
            seen.append((k.detach(), v.detach()))
        (rows, length, heads, width), kv_heads = q.shape, k.size(2)
        k, v = torch.cat((self.keys[:, call], k), dim=1), torch.cat((self.values[:, call], v), dim=1)
        groups = heads // kv_heads
        q = q.view(rows, length, kv_heads, groups, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = (self.near if local else self.mask).repeat(groups, 1)
        with sdpa_backends(WITHOUT_PLANS):
            y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return y.view(rows, kv_heads, groups, length, width).permute(0, 3, 1, 2, 4).flatten(2, 3)


class MLPKernels(NamedTuple):
    """How one forward pass computes its MLPs."""

    fused: bool  # Triton kernels are allowed
    float8: bool  # inputs of the products in e4m3
    native: bool  # ... on FP8 tensor cores; otherwise simulated


class Block(nn.Module):
    """A layer: its vectors, gates and projections. `attend` and `mlp` serve one residual stream and two."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        d = config.model_dim
        self.input_mix = nn.Parameter(torch.stack([torch.ones(d), torch.zeros(d)]))
        self.attention_scale = nn.Parameter(torch.ones(d))
        self.mlp_scale = nn.Parameter(torch.ones(d))
        self.query_gain = nn.Parameter(torch.ones(config.num_heads))
        self.head_gate = self.value_scale = self.stream_mix = self.value_gate = self.xsa_gate = None
        if config.gated_attn_enabled:
            self.head_gate = nn.Parameter(torch.zeros(config.num_heads, d))
        elif config.sparse_attn_gate_enabled or config.attn_out_gate_enabled:
            self.head_gate = nn.Parameter(torch.zeros(config.num_heads, config.gate_window))
        if layer in config.value_layers:
            self.value_scale = nn.Parameter(torch.ones(1))
        if config.parallel_residual:  # in every layer, so that the parallel start can move without a new shape
            self.stream_mix = nn.Parameter(torch.tensor([1.1, 1.0, 1.0]).repeat(2, 1))
        self.qkv, self.out = Projection(), Projection()
        self.up, self.down = Projection(), Projection()
        # Of what the input's one product holds: queries, keys, values, gates.
        self.widths = [d, config.kv_dim, config.kv_dim, *([] if self.head_gate is None else [config.num_heads])]
        self.norm_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0
        self.subtract_own_value = layer >= config.num_layers - config.xsa_last_n
        self.local = layer in config.window_layers  # attention has a window
        if config.value_residual and layer:
            self.value_gate = nn.Parameter(torch.zeros(1))
        if config.gated_xsa and self.subtract_own_value:
            self.xsa_gate = nn.Parameter(torch.zeros(config.num_heads))
        self.gate_scales = (1.0, 2.0 if config.attn_out_gate_enabled else 1.0)  # see `head_output_plain`
        if config.sparse_attn_gate_enabled:
            self.gate_scales = (config.sparse_attn_gate_scale, 1.0)

    def attend(
        self, x: Tensor, w: LayerWeights, context: AttentionContext, adapters: CallAdapters
    ) -> tuple[Tensor, Tensor]:
        """Attention of the mixed input x [B, T, d] -> [B, T, d] before the output scale, and the values [B, T, K*h]."""
        config = self.config
        sequences, length, _ = x.shape
        n = self.norm(x)
        q, k, v, *gates = self.qkv(n, w.qkv).split(self.widths, dim=-1)
        added = adapters.of_attention(n)
        if w.value_scale is not None and context.value_embeds is not None:
            embeds = w.value_scale.to(x.dtype) * context.value_embeds
            added["v"] = added["v"] + embeds if "v" in added else embeds
        if w.value_gate is not None and context.first_values is not None:  # PR #569, arXiv 2410.17897
            first = torch.sigmoid(w.value_gate.to(x.dtype)) * context.first_values
            added["v"] = added["v"] + first if "v" in added else first
        own, gate = self.subtract_own_value, gates[0] if gates else None
        turn = (context.cos, context.sin, w.query_gain)
        if context.triton and attention_kernels_support(q, config.head_dim, config.rotary_dims):
            q, k, v, own_v, gate = query_key_triton(q, k, v, gate, *turn, twice=own, added=added)
            finish = head_output_triton
        else:
            q, k, v = (y + added[key] if key in added else y for key, y in zip("qkv", (q, k, v), strict=True))
            q = q.view(sequences, length, config.num_heads, config.head_dim)
            k, v = (y.view(sequences, length, config.num_kv_heads, config.head_dim) for y in (k, v))
            q, k = query_key_plain(q, k, *turn)
            own_v, finish = v, head_output_plain
        if context.inside is not None:
            k = offset_keys(k, config.offset_dims, context.inside)
        y = context.attention(q, k, v, self.local)
        own_v = own_v if own else None
        if w.xsa_gate is None:
            y = finish(y, own_v, gate, *self.gate_scales)
        else:
            y = head_output_plain(y, own_v, gate, *self.gate_scales, torch.tanh(w.xsa_gate.to(x.dtype)))
        y = self.out(y, w.out)
        return y + added["attention"] if "attention" in added else y, v.flatten(2)

    def norm(self, x: Tensor) -> Tensor:
        """RMS norm of x [B, T, d], scaled down with the depth where LN_SCALE is on."""
        return rms_norm(x) * self.norm_scale if self.config.ln_scale else rms_norm(x)

    def mlp(self, x: Tensor, w: LayerWeights, adapters: CallAdapters, kernels: MLPKernels) -> Tensor:
        """MLP of x [B, T, d] -> [B, T, d], before the output scale."""
        n, slope = self.norm(x), self.config.leaky_relu_slope
        fused = kernels.fused and triton_supports(n)
        if kernels.float8 and fused and kernels.native and n.element_size() == 2:
            y = mlp_float8_triton(n, w.up, w.down, slope)
        elif kernels.float8:
            y = mlp_float8(n, w.up, w.down, slope, kernels.native)
        elif fused:
            y = mlp_triton(n, w.up, w.down, slope)
        else:
            y = self.down(leaky_relu_squared(self.up(n, w.up), slope), w.down)
        return y if adapters.mlp is None else y + low_rank(n, adapters.mlp)


class SmearGate(nn.Module):
    """Mixes in the previous token, but nothing where a document begins.

    window, on the embeddings: x_t += lambda * sigmoid(w x_t[:window]) * x_{t-1}. channel, on the normed embeddings:
    x_t += g * (x_{t-1} - x_t), g = sigmoid(weight), one for each channel (PR #549 of openai/parameter-golf, which
    mixes across document borders).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.channel = config.smear_gate_type == "channel"
        self.weight = nn.Parameter(torch.zeros(config.model_dim if self.channel else config.gate_window))
        self.scale = None if self.channel else nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        inside = continues_document(documents.starts)[..., None]  # [B, T, 1]
        previous = F.pad(x, (0, 0, 1, -1))  # [B, T, d]
        if self.scale is None:
            return torch.addcmul(x, torch.sigmoid(self.weight.to(x.dtype)) * inside, previous - x)
        gate = sigmoid(linear(x[..., : self.weight.numel()], self.weight.to(x.dtype)[None]))
        return x + self.scale.to(x.dtype) * gate * previous * inside


class FactorizedEmbedding(nn.Module):
    """An embedding table [buckets, width], a projection [out, width] and a scale: indices [B, T] -> [B, T, out].

    signs [B, T, width]: factors of the table's rows, or None.
    """

    def __init__(self, buckets: int, width: int, out: int, scale: float):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(buckets, width))
        self.projection = nn.Parameter(torch.zeros(out, width))
        self.scale = nn.Parameter(torch.full((1,), scale))
        self.lookup, self.project = Lookup(), Projection()

    def forward(self, indices: Tensor, dtype: torch.dtype, signs: Tensor | None = None) -> Tensor:
        rows = self.lookup(indices, self.table).to(dtype)
        rows = rows if signs is None else rows * signs
        return self.scale.to(dtype) * self.project(rows, self.projection.to(dtype))


def bigram_buckets(ids: Tensor, starts: Tensor, buckets: int) -> Tensor:
    """The bucket [B, T] int32 of each token and the one before it. First tokens of documents share the last bucket.

    The hash is PR #549's, in int32: products of ids from 59,138 on wrap.
    """
    t = ids.int()
    hashed = torch.bitwise_xor(36313 * t, 27191 * F.pad(t, (1, -1))) % (buckets - 1)
    return torch.where(continues_document(starts), hashed, buckets - 1)


SIGN_VECTORS = 256


def pair_signs(ids: Tensor, starts: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """+1 and -1 [B, T, width] for the row of each token's bucket: one of SIGN_VECTORS vectors.

    As in a count sketch (Charikar et al., 2002), what two pairs add to the row that they share cancels on average. All
    first tokens of documents have one vector. The same bits on every device, compiled or not.
    """
    t = ids.int()
    vectors = (mix_bits(mix_bits(t) + F.pad(t, (1, -1))) >> 8) & (SIGN_VECTORS - 1)
    places = torch.arange(SIGN_VECTORS * width, dtype=torch.int32, device=ids.device).view(SIGN_VECTORS, width)
    signs = (1 - 2 * (mix_bits(places) & 1)).to(dtype)
    return F.embedding(torch.where(continues_document(starts), vectors, 0), signs)


def rotary_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, [length, rotary/2] each, float64.

    YaRN (arXiv 2309.00071) stretches long wavelengths by YARN_MAX_LEN / TRAIN_SEQ_LEN and leaves short ones alone, with
    a ramp between. It acts only where that ratio is above 1.
    """
    share = torch.arange(0, config.rotary_dims, 2, dtype=torch.float64) / config.rotary_dims
    frequencies = config.rope_base**-share
    stretch = config.yarn_max_len / config.train_seq_len
    if config.yarn and stretch > 1:
        frequencies /= 1 + ((share - 0.25) / 0.75).clamp(0, 1) * (stretch - 1)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos(), angles.sin()


class GPT(nn.Module):
    """The language model. What it computes follows from its ModelConfig, its weights and a call's arguments alone.

    Matrices live in four banks of equal shapes, for Muon. `reset` gives the initial weights.
    """

    def __init__(self, config: ModelConfig, runtime: Runtime):
        super().__init__()
        if type(config) is not ModelConfig:  # a Config would let settings in that its artifact does not carry
            raise TypeError(f"a model takes a ModelConfig, not a {type(config).__name__}")
        self.config, self.runtime = config, runtime
        self.attention = attention_backend(runtime.attention, runtime.context, config.window_attn_size)
        self.schedules = {looped: layer_schedule(config, looped) for looped in (False, True)}
        layers, d = config.num_layers, config.model_dim
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, d))
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, d))
        self.qo_bank = nn.Parameter(torch.empty(2 * layers, d, d))  # q of all layers, then out
        self.kv_bank = nn.Parameter(torch.empty(2 * layers, config.kv_dim, d))  # k of all layers, then v
        self.up_bank = nn.Parameter(torch.empty(layers, config.hidden_dim, d))
        self.down_bank = nn.Parameter(torch.empty(layers, d, config.hidden_dim))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(layers))
        self.smear = SmearGate(config) if config.smear_gate_enabled else None
        self.bigram = self.value_embeds = self.skip_gates = None
        if config.bigram_vocab_size:
            self.bigram = FactorizedEmbedding(config.bigram_vocab_size, config.bigram_dim, d, 0.05)
        if config.ve_dim:
            self.value_embeds = FactorizedEmbedding(config.vocab_size, config.ve_dim, config.kv_dim, 0.1)
        skips = max(sum(call.skip is not None for call in calls) for calls in self.schedules.values())
        self.skip_weights = nn.Parameter(torch.ones(skips, d))
        if config.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(skips, d))
        self.softcaps = nn.Parameter(torch.full((2,), config.logit_softcap)) if config.asym_logit_rescale else None
        self.lookup, self.logits = Lookup(), Projection()
        self.cos: Tensor
        self.sin: Tensor
        cos, sin = rotary_tables(config, runtime.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.to(runtime.master_dtype)

    @torch.no_grad()
    def reset(
        self, *, seed: int, embedding_std: float, query_gains: Iterable[float], gate_std: float, ve_init: str
    ) -> None:
        """Initial weights from the seed: orthogonal inputs of the layers, zero outputs, a small embedding."""
        layers, generator = self.config.num_layers, torch.Generator().manual_seed(seed)
        self.embedding.normal_(std=1.0 if self.head is not None else embedding_std, generator=generator)
        if self.head is not None:
            self.head.zero_()
        orthogonal = ((self.qo_bank, layers), (self.kv_bank, 2 * layers), (self.up_bank, layers), (self.down_bank, 0))
        for bank, zero_from in orthogonal:
            bank.zero_()
            for matrix in bank[:zero_from]:
                nn.init.orthogonal_(matrix, generator=generator)
        for block, gain in zip(self.blocks, query_gains, strict=True):
            cast(Block, block).query_gain.fill_(gain)
            gate = cast(Block, block).head_gate
            if gate_std and gate is not None:
                gate.normal_(std=gate_std, generator=generator)
        if self.bigram is not None:  # either the table or the projection must not be zero, or neither would ever train
            self.bigram.table.zero_()
            nn.init.orthogonal_(self.bigram.projection, generator=generator)
        if self.value_embeds is not None:
            self.value_embeds.table.normal_(std=0.01, generator=generator)
            self.value_embeds.projection.zero_()
            if ve_init == "orthogonal":
                nn.init.orthogonal_(self.value_embeds.projection, generator=generator)

    def layer_weights(self, dtype: torch.dtype, trainable_layers: int | None, fake_quant: Grids) -> list[LayerWeights]:
        """The weights of every layer; those from `trainable_layers` on are constants.

        Each bank is cast once, and the backward pass of its unbind is one stack instead of a scatter for each layer.
        """
        layers = self.config.num_layers
        banks = [self.qo_bank, self.kv_bank, self.up_bank, self.down_bank]
        if fake_quant is not None:
            attention, mlp = fake_quant
            grids = (attention, attention, mlp, mlp)
            banks = [fake_quantize(bank, *grid) for bank, grid in zip(banks, grids, strict=True)]
        qo, kv, up, down = (bank.to(dtype) for bank in banks)
        inputs = [qo[:layers], kv[:layers], kv[layers:]]
        trained = layers if trainable_layers is None else trainable_layers
        gates = [block.head_gate for block in self.blocks if isinstance(block.head_gate, Tensor)]
        if gates:
            gate = torch.stack([g if i < trained else g.detach() for i, g in enumerate(gates)]).to(dtype)
            inputs.append(F.pad(gate, (0, qo.size(-1) - gate.size(-1))))
        matrices = (torch.cat(inputs, dim=1).unbind(), qo[layers:].unbind(), up.unbind(), down.unbind())
        weights = []
        for i, block in enumerate(self.blocks):
            vectors = (getattr(block, name) for name in LayerWeights._fields[len(matrices) :])
            own = LayerWeights(*(matrix[i] for matrix in matrices), *vectors)
            weights.append(own if i < trained else own.detached())
        return weights

    def blend_skip(self, x: Tensor, saved: Tensor, place: int) -> Tensor:
        """A U-Net skip: added, or blended through a gate."""
        skip = self.skip_weights[place].to(x.dtype) * saved
        if self.skip_gates is None:
            return x + skip
        return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[place].to(x.dtype)))

    def embed(self, ids: Tensor, documents: Documents, noise: EmbeddingNoise | None) -> Tensor:
        """Normed embeddings of tokens and bigrams in the compute type, with noise and smear gate: x0 [B, T, d]."""
        x = self.lookup(ids, self.embedding).to(self.runtime.dtype)
        if self.bigram is not None:
            config, starts = self.config, documents.starts
            signs = pair_signs(ids, starts, config.bigram_dim, x.dtype) if config.bigram_signs else None
            x = x + self.bigram(bigram_buckets(ids, starts, config.bigram_vocab_size), x.dtype, signs)
        if noise is not None:
            length = ids.numel() // len(noise.keys)  # of a sequence: a stream's batch is one row of them
            x = x + (noise.reach * uniform_noise(noise.keys, length, x.size(-1))).to(x.dtype).view(x.shape)
        if self.smear is None:
            return rms_norm(x)
        return self.smear(rms_norm(x), documents) if self.smear.channel else rms_norm(self.smear(x, documents))

    def rotary(self, starts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, 1, rotary/2] of each token's place in its document.

        Only distances matter to exact arithmetic. To rounding it would matter where a document lies in its row.
        """
        positions = document_positions(starts)
        return self.cos.to(dtype)[positions].unsqueeze(2), self.sin.to(dtype)[positions].unsqueeze(2)

    def run_layer(
        self,
        call: LayerCall,
        x: Tensor,
        x_mlp: Tensor,
        x0: Tensor,
        w: LayerWeights,
        context: AttentionContext,
        adapters: CallAdapters,
        mlp_kernels: MLPKernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer on one residual stream, which both outputs then are, or on two parallel ones; and its values.

        Attention reads and the U-Net's skips join x; the MLP reads x_mlp.
        """
        block = cast(Block, self.blocks[call.layer])
        m0, m1 = w.input_mix.to(x.dtype).unbind()
        attention_scale, mlp_scale = w.attention_scale.to(x.dtype), w.mlp_scale.to(x.dtype)
        x_mixed = torch.addcmul(m0 * x, m1, x0)
        attention_out, values = block.attend(x_mixed, w, context, adapters)
        if not call.parallel or w.stream_mix is None:
            x = torch.addcmul(x_mixed, attention_scale, attention_out)
            x = torch.addcmul(x, mlp_scale, block.mlp(x, w, adapters, mlp_kernels))
            return x, x, values
        attention_out = attention_scale * attention_out
        mlp_out = mlp_scale * block.mlp(x_mlp, w, adapters, mlp_kernels)
        (r0, p0, q0), (r1, p1, q1) = (stream.unbind() for stream in w.stream_mix.to(x.dtype).unbind())
        x = r0 * x + p0 * attention_out + q0 * mlp_out
        return x, r1 * x_mlp + p1 * attention_out + q1 * mlp_out, values

    def trunk(
        self,
        ids: Tensor,
        documents: Documents,
        *,
        looped: bool,
        adapters: StackedAdapters | None = None,
        noise: EmbeddingNoise | None = None,
        last_tokens: int | None = None,
        trainable_layers: int | None = None,
        fake_quant: Grids = None,
        fused_mlp: bool = True,
        fp8_mlp: bool = False,
        past: Past | None = None,
        seen: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Tokens [B, T] -> normed hidden states [B, T, d], or [B, last_tokens, d] of the last ones. See `forward`.

        With a past, each layer call's keys and values are added to `seen`, if there is one.
        """
        config, calls = self.config, self.schedules[looped]
        x = x0 = x_mlp = self.embed(ids, documents, noise)
        weights = self.layer_weights(x.dtype, trainable_layers, fake_quant)
        own_adapters = adapters_of_calls(adapters or {}, len(calls), x.dtype)
        context = AttentionContext(
            self.attention(documents, config.num_heads, config.num_kv_heads) if past is None else past.attention,
            *self.rotary(documents.starts, x.dtype),
            None if self.value_embeds is None else self.value_embeds(ids, x.dtype),
            None,
            continues_document(documents.starts) if config.key_offset else None,
            self.runtime.triton,
        )
        mlp_kernels = MLPKernels(fused_mlp and self.runtime.triton, fp8_mlp, self.runtime.float8)
        saved: list[Tensor] = []
        for place, call in enumerate(calls):
            if call.skip is not None:
                x = self.blend_skip(x, saved.pop(), call.skip)
            own, w = own_adapters[place], weights[call.layer]
            if past is not None:
                attention = functools.partial(past.attention, place, seen)
                context = context._replace(attention=attention)
            x, x_mlp, values = self.run_layer(call, x, x_mlp, x0, w, context, own, mlp_kernels)
            if config.value_residual and not place:
                context = context._replace(first_values=values)
            if call.save:
                saved.append(x)
        x = (x + x_mlp) / 2 if calls[-1].parallel else x
        return rms_norm(x if last_tokens is None else x[:, x.size(1) - last_tokens :])

    def head_logits(self, hidden: Tensor, adapter: tuple[Tensor, Tensor] | None = None, fp8: bool = False) -> Tensor:
        """Hidden states [B, T, d] -> logits [B, T, V] before the softcap, with a LoRA of each sequence if given."""
        head = (self.embedding if self.head is None else self.head).to(hidden.dtype)
        if fp8:
            logits = float8_linear(hidden, head, rms_norm_scale(hidden), self.runtime.float8)
        else:
            logits = self.logits(hidden, head)
        if adapter is None:
            return logits
        wide = torch.promote_types(logits.dtype, torch.float32)  # a small addend would round away in bfloat16
        return logits.to(wide) + low_rank(hidden, adapter).to(wide)

    def cap_of(self, logits: Tensor) -> float | Tensor:
        """The softcap's bound; with ASYM_LOGIT_RESCALE that of each logit, by its sign (PR #1923)."""
        if self.softcaps is None:
            return self.config.logit_softcap
        above, below = self.softcaps.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.where(logits > 0, above, below)

    def token_losses(self, logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood and log-sum-exp of each target, [B, T] each, from logits [B, T, V]."""
        config, cap = self.config, self.cap_of(logits)
        if temperature != 1:  # C*f(z/C)/T is the softcap of z/T with a cap of C/T
            wide = torch.promote_types(logits.dtype, torch.float32)
            logits, cap = logits.to(wide) / temperature, cap / temperature
        if isinstance(cap, Tensor):
            return softcapped_cross_entropy_plain(logits, targets, cap, config.softcap_type)
        fused, triton_allowed = self.runtime.fused_cross_entropy, self.runtime.triton
        return softcapped_cross_entropy(logits, targets, cap, config.softcap_type, fused, triton_allowed)

    def extra_losses(self, hidden: Tensor, lse: Tensor, tokens: Tensor) -> Tensor:
        """Negative log-likelihood [B, L, K] of further tokens [B, L, K], from hidden states and `token_losses`' lse.

        Their logits are products with single rows of the head. A gather from all logits would need, in the backward
        pass, a second gradient as wide as the vocabulary.
        """
        head = self.embedding if self.head is None else self.head
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = F.embedding(tokens, head).to(hidden.dtype).to(wide)  # [B, L, K, d]
        z = (hidden.unsqueeze(-2).to(wide) * rows).sum(-1)
        return lse.unsqueeze(-1) - softcap_plain(z, self.cap_of(z), self.config.softcap_type)

    def log_probabilities(self, ids: Tensor, documents: Documents, *, looped: bool) -> Tensor:
        """Logarithms of the next token's probabilities, [B, T, V] in float32 at least."""
        logits = self.head_logits(self.trunk(ids, documents, looped=looped, fused_mlp=False))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return softcap_plain(wide, self.cap_of(wide), self.config.softcap_type).log_softmax(-1)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        documents: Documents,
        *,
        looped: bool,
        adapters: StackedAdapters | None = None,
        noise: EmbeddingNoise | None = None,
        trainable_layers: int | None = None,
        fake_quant: Grids = None,
        fused_mlp: bool = True,
        fp8_head: bool = False,
        fp8_mlp: bool = False,
        temperature: float = 1.0,
        hints: Tensor | None = None,
        extra_targets: Tensor | None = None,
        past: Past | None = None,
    ) -> tuple[Tensor, ...]:
        """Negative log-likelihood and log-sum-exp of targets [B, L], [B, L] each, in nats. Callers reduce.

        The targets are those of the last L <= T of each sequence's tokens. A number of places would be a constant of
        a compiled graph; a shape need not be.

        looped: repeat the looped layers. adapters: low-rank pairs of all layer calls and of the head; without any,
        none is in the graph. noise: added to the embeddings. trainable_layers: layers from this one on are
        constants; None: none. fake_quant: late QAT, the grids of the attention and MLP banks. fused_mlp: allow the
        Triton MLP, which hooks on projections do not see. fp8_head, fp8_mlp: inputs of these products in e4m3, for
        training alone; hooks do not see them either. temperature: divides the softcapped logits. hints: tokens [B, L],
        whose log-probabilities [B, L] are a third result, without a gradient. extra_targets: K further tokens
        [B, L, K] to predict from each place, for training alone, without hints, at temperature 1; their negative
        log-likelihood [B, L, K] is a third result. past: what attention finds of tokens before these, in place of
        what `documents` say; the pass's own keys and values [B, calls, T, K, h] are two more results, the last ones,
        without a gradient.
        """
        seen: list[tuple[Tensor, Tensor]] = []
        hidden = self.trunk(
            ids,
            documents,
            looped=looped,
            adapters=adapters,
            noise=noise,
            last_tokens=targets.size(1),
            trainable_layers=trainable_layers,
            fake_quant=fake_quant,
            fused_mlp=fused_mlp,
            fp8_mlp=fp8_mlp,
            past=past,
            seen=seen,
        )
        own = tuple(torch.stack(column, dim=1) for column in zip(*seen, strict=True))
        pair = adapters.get("head") if adapters else None
        logits = self.head_logits(hidden, None if pair is None else (pair[0][:, 0], pair[1][:, 0]), fp8_head)
        losses = self.token_losses(logits, targets, temperature)
        if extra_targets is not None:
            return *losses, self.extra_losses(hidden, losses[1], extra_targets)
        if hints is None:
            return *losses, *own
        at_hint = logits.detach().gather(-1, hints.unsqueeze(-1)).squeeze(-1)
        at_hint = softcap_plain(at_hint, self.cap_of(at_hint), self.config.softcap_type) / temperature
        return *losses, at_hint - losses[1].detach(), *own


def new_model(config: Config) -> GPT:
    """A model with its initial weights, on the CPU."""
    model = GPT(config.model, runtime_of(config))
    model.reset(
        seed=config.seed,
        embedding_std=config.tied_embed_init_std,
        query_gains=config.query_gains,
        gate_std=config.gated_attn_init_std,
        ve_init=config.ve_init,
    )
    return model


def meta_model(config: Config) -> GPT:
    """A model without memory: names and shapes alone."""
    with torch.device("meta"):
        return GPT(config.model, runtime_of(config))


def constant_view(model: GPT, places: int = 0) -> GPT:
    """The same weights as constants: gradients reach adapters alone. It shares the memory, so updates show in it.

    Its rotary tables have at least so many places.
    """
    with torch.device("meta"):
        view = GPT(model.config, model.runtime)
    view.load_state_dict(model.state_dict(), assign=True)
    view.cos, view.sin = model.cos, model.sin
    if places > len(model.cos):
        view.cos, view.sin = (table.to(model.cos) for table in rotary_tables(model.config, places))
    return view.requires_grad_(False)


def named_weights(model: GPT) -> dict[str, Tensor]:
    """The weights, outside of autograd, under their names in a checkpoint."""
    return {f"weights.{name}": p.detach() for name, p in model.named_parameters()}


def load_weights(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Takes over what `named_weights` gave."""
    for name, weight in named_weights(model).items():
        weight.copy_(tensors[name])


def parameter_count(config: Config) -> int:
    """Trained numbers of the model."""
    return sum(p.numel() for p in meta_model(config).parameters())


# ---------------------------------------------------------------------------------------------------------------
# Adapters: each document's own low-rank weights during test-time training
# ---------------------------------------------------------------------------------------------------------------


def copy_all(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copies the values into the tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


class Adapters:
    """LoRA (arXiv 2106.09685) of a batch of documents: pairs for every layer call, and one pair for the head.

    A [B, calls, r, in] starts uniform within 1/sqrt(in), B [B, calls, out, r] at zero. Both are plain tensors; the
    optimizer is AdamW with a first beta of 0. B is stored multiplied by the LoRA scale s = TTT_LORA_ALPHA / rank. An
    AdamW step does not depend on the size of the gradients, so a learning rate times s and an epsilon over s give the
    same product. Where the model computes in 16 bits, it takes copies in that type, which a step writes too. All of
    it stays where it is from batch to batch, so that a CUDA graph finds it.
    """

    def __init__(self, config: Config, calls: int, device: torch.device):
        d, rank = config.model_dim, config.ttt_lora_rank
        choices = dict(
            q=(config.ttt_q_lora, d),
            k=(config.ttt_k_lora, config.kv_dim),
            v=(config.ttt_v_lora, config.kv_dim),
            attention=(config.ttt_o_lora, d),
            mlp=(config.ttt_mlp_lora, d),
        )
        widths = {key: (calls, width) for key, (enabled, width) in choices.items() if enabled}
        widths["head"] = (1, config.vocab_size)
        documents = config.ttt_batch_size
        self.config, self.device = config, device
        self.fused = config.triton_kernels == "1"
        self.calls, self.scale = calls, config.ttt_lora_alpha / rank
        self.shapes = {key: (n, rank, d) for key, (n, _) in widths.items()}  # of one document's A
        self.a = {key: torch.zeros(documents, *shape, device=device) for key, shape in self.shapes.items()}
        self.b = {key: torch.zeros(documents, n, width, rank, device=device) for key, (n, width) in widths.items()}
        parameters = self.parameters()
        self.squares = [torch.zeros_like(p) for p in parameters]
        self.steps = torch.zeros(1, device=device)
        self.means = [] if self.fused else [torch.zeros_like(p) for p in parameters]
        self.state_steps = [] if self.fused else [torch.zeros((), device=device) for _ in parameters]
        self.copies = [p.bfloat16() for p in parameters] if config.dtype == torch.bfloat16 else parameters

    def draw(self, documents: int, seed: int) -> dict[str, Tensor]:
        """A new A of so many documents."""
        generator, bound = torch.Generator(self.device).manual_seed(seed), self.config.model_dim**-0.5
        return {
            key: torch.empty((documents, *shape), device=self.device).uniform_(-bound, bound, generator=generator)
            for key, shape in self.shapes.items()
        }

    def start(self, a: dict[str, Tensor]) -> None:
        """Prepares for the next batch: B is zero and A as given, of one document for all or of each."""
        for key, value in a.items():
            self.a[key].copy_(value.expand_as(self.a[key]))
        for x in (*self.b.values(), *self.squares, self.steps, *self.means, *self.state_steps):
            x.zero_()
        if self.copies[0].dtype == torch.bfloat16:
            copy_all(self.copies, self.parameters())

    def arrange(self, order: np.ndarray) -> None:
        """Puts the first documents' A in this order: which A a document gets must not depend on other lengths."""
        if (order != np.arange(len(order))).any():
            copies = self.copies[::2] if self.copies[0].dtype == torch.bfloat16 else []
            for a in (*self.a.values(), *copies):
                a[: len(order)] = a[torch.from_numpy(order).to(a.device)]

    def parameters(self, documents: int | None = None) -> list[Tensor]:
        """A and B of the first documents, in turn for each key."""
        return [p[:documents] for key in self.a for p in (self.a[key], self.b[key])]

    def leaves(self, documents: int) -> list[Tensor]:
        """What the model takes of the first documents, in the order of `parameters`, to be differentiated by."""
        return [copy[:documents].detach().requires_grad_() for copy in self.copies]

    def pairs(self, parameters: list[Tensor]) -> StackedAdapters:
        """The `adapters` argument of the model's forward, from (leaf) tensors in the order of `parameters`."""
        return dict(zip(self.a, zip(parameters[::2], parameters[1::2], strict=True), strict=True))

    def correction_root(self) -> Tensor:
        """The root of AdamW's bias correction in the next step, sqrt(1 - TTT_BETA2^steps) [1]."""
        beta2 = self.config.ttt_beta2
        self.steps += 1
        return torch.expm1(self.steps * (math.log(beta2) if beta2 else -math.inf)).neg().sqrt()

    def state(self, documents: int) -> list[Tensor]:
        """All that a step of the first documents changes, in place."""
        copies = self.copies if self.copies[0].dtype == torch.bfloat16 else []
        parts = [x[:documents] for x in (*self.parameters(), *self.squares, *self.means, *copies)]
        return [*parts, *self.state_steps, self.steps]

    @torch.no_grad()
    def step(self, documents: int, gradients: list[Tensor]) -> None:
        """AdamW of the first documents' adapters: betas (0, TTT_BETA2), eps 1e-10, decoupled weight decay."""
        config, parameters = self.config, self.parameters(documents)
        squares, copies = ([x[:documents] for x in tensors] for tensors in (self.squares, self.copies))
        root = self.correction_root() if self.fused else None
        ratio = config.ttt_loraplus_lr_ratio  # LoRA+, arXiv 2402.12354
        for side, scale, times in ((slice(0, None, 2), 1.0, 1.0), (slice(1, None, 2), self.scale, ratio)):
            lr, decay = config.ttt_lora_lr * scale * times, config.ttt_weight_decay / scale
            eps = 1e-10 / scale
            if root is not None:
                for p, square, g, low in zip(*(t[side] for t in (parameters, squares, gradients, copies)), strict=True):
                    low = None if low.dtype == p.dtype else low
                    adapter_step_triton(p, square, g, low, lr, decay, config.ttt_beta2, root, eps)
                continue
            adamw(
                parameters[side],
                [g.float().contiguous() for g in gradients[side]],  # as fused AdamW reads them
                exp_avgs=[m[:documents] for m in self.means[side]],
                exp_avg_sqs=squares[side],
                max_exp_avg_sqs=[],
                state_steps=self.state_steps[side],
                fused=True,
                amsgrad=False,
                beta1=0.0,
                beta2=config.ttt_beta2,
                lr=lr,
                weight_decay=decay,
                eps=eps,
                maximize=False,
            )
        if not self.fused and copies[0].dtype != parameters[0].dtype:
            copy_all(copies, parameters)


# ---------------------------------------------------------------------------------------------------------------
# Optimizers: Muon on the banks, AdamW on the rest; reduce -> clip -> update, the same on any number of ranks
# ---------------------------------------------------------------------------------------------------------------

BANKS = ("qo_bank", "kv_bank", "up_bank", "down_bank")
EMBEDDING_GROUPS = ("embedding", "bigram", "value_embeds")
NEWTON_SCHULZ = {
    # Keller Jordan's quintic (kellerjordan.github.io/posts/muon), the same at every iteration.
    "classic": ((3.4445, -4.775, 2.0315),),
    # Polar Express, arXiv 2505.16932: the optimal polynomial for each iteration; the last one repeats.
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233002106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}


class Group(NamedTuple):
    """Parameters that share an optimizer, a learning rate and a weight decay."""

    name: str
    parameters: list[nn.Parameter]
    muon: bool
    lr: float
    weight_decay: float


def parameter_groups(model: GPT, config: Config) -> list[Group]:
    """The table of groups. Errors: RuntimeError unless every parameter is in exactly one."""
    embedding_lr = config.tied_embed_lr if config.tie_embeddings else config.embed_lr
    groups = [
        Group("banks", [getattr(model, name) for name in BANKS], True, config.matrix_lr, config.muon_wd),
        Group("embedding", [model.embedding], False, embedding_lr, config.embed_wd),
    ]
    if model.head is not None:
        groups.append(Group("head", [model.head], False, config.head_lr, config.embed_wd))
    # Bigram and value tables are embeddings. Their small projections stay with the vectors, as in PR #549.
    for name in ("bigram", "value_embeds"):
        part = getattr(model, name)
        if part is not None:
            groups.append(Group(name, [part.table], False, embedding_lr, config.embed_wd))
    grouped = {id(p) for g in groups for p in g.parameters}
    rest = [p for p in model.parameters() if id(p) not in grouped]
    groups.append(Group("scalars", rest, False, config.scalar_lr, config.adam_wd))
    covered = [id(p) for g in groups for p in g.parameters]
    if sorted(covered) != sorted(id(p) for p in model.parameters()):
        raise RuntimeError("a parameter is in no optimizer group, or in two")
    return groups


def orthogonalize(update: Tensor, steps: int, coefficients: str, dtype: torch.dtype) -> Tensor:
    """Newton-Schulz: a batch of matrices [B, r, c] -> nearly U V^T of each one's SVD, in `dtype`.

    Works on the smaller side. The norm is taken in float32 and above: in bfloat16 its square loses small entries.
    """
    tall = update.size(-2) > update.size(-1)
    x = update.mT if tall else update
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    table = NEWTON_SCHULZ[coefficients]
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def neuron_shape(bank: Tensor) -> tuple[int, int, int]:
    """The shape of NorMuon's statistics of a bank [B, r, c]: one for each row or column, along the longer side."""
    matrices, rows, columns = bank.shape
    return (matrices, rows, 1) if rows >= columns else (matrices, 1, columns)


def equalize_neurons(update: Tensor, squares: Tensor, beta2: float) -> Tensor:
    """NorMuon (arXiv 2510.05491): every neuron of an orthogonalized update [B, r, c] moves about equally far.

    A neuron is divided by the root of its running mean square, which `squares` [`neuron_shape`] holds and this
    updates. Then the matrix gets its former Frobenius norm, so that the learning rate keeps its meaning. The running
    mean starts at zero. That needs no correction, since the norm takes out what all neurons have in common.
    """
    wide = update.to(squares.dtype)
    norm = wide.norm(dim=(-2, -1), keepdim=True)
    squares.lerp_(wide.square().mean(dim=-1 if squares.size(-1) == 1 else -2, keepdim=True), 1 - beta2)
    wide = wide * squares.clamp_min(1e-20).rsqrt()
    return (wide * (norm / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))).to(update.dtype)


def gradient_of(p: Tensor) -> Tensor:
    """The gradient of a parameter that the backward pass reached. Errors: RuntimeError for another one."""
    if p.grad is None:
        raise RuntimeError("a parameter has no gradient")
    return p.grad


class PendingUpdate(NamedTuple):
    """A bank's update that is being gathered from the ranks."""

    bank: nn.Parameter
    matrices: Tensor | None  # those that train; None: all
    update: Tensor
    handle: Any  # of the all-gather; None on one rank


class Muon:
    """Momentum and orthogonalization of the banks, each rank on its shard of a bank's first axis.

    A bank of n matrices is padded to a multiple of the ranks; gradients are reduce-scattered, updates all-gathered.
    While only some layers train, the other matrices and their momentum are left alone, and cost nothing.
    """

    def __init__(self, group: Group, config: Config, run: Run):
        self.config, self.run = config, run
        self.banks = group.parameters
        self.lr, self.weight_decay = group.lr, group.weight_decay
        self.shard_sizes = [-(-bank.size(0) // run.world) for bank in self.banks]
        self.momentum = [
            torch.zeros(size, *bank.shape[1:], dtype=bank.dtype, device=bank.device)
            for size, bank in zip(self.shard_sizes, self.banks, strict=True)
        ]
        # NorMuon's mean square of each neuron; None without it
        self.squares = [m.new_zeros(neuron_shape(m)) if config.normuon_beta2 else None for m in self.momentum]

    def start_reduce(self) -> list[tuple[Tensor, Any]]:
        """Starts to sum every bank's gradient over the ranks; returns this rank's shard and a handle for each.

        Gradients are rounded on a single rank too, so that a run on one shows what a run on many does.
        """
        pending = []
        for size, bank in zip(self.shard_sizes, self.banks, strict=True):
            grad, handle = gradient_of(bank), None
            if self.config.muon_gradient_dtype == "bfloat16":
                grad = grad.bfloat16()
            if self.run.world > 1:
                padded = F.pad(grad, (0, 0, 0, 0, 0, size * self.run.world - bank.size(0)))
                grad = torch.empty(size, *bank.shape[1:], dtype=padded.dtype, device=padded.device)
                handle = dist.reduce_scatter_tensor(grad, padded, async_op=True)
            pending.append((grad, handle))
        return pending

    def direction(self, grad: Tensor, momentum: Tensor, squares: Tensor | None, beta: float) -> Tensor:
        """Nesterov momentum, then orthogonalization, scaled by shape: [B, r, c] in the type of the master weights.

        Updates the momentum and, with NORMUON_BETA2, the neurons' mean squares.
        """
        config = self.config
        if config.muon_momentum_type == "sgd":
            momentum.mul_(beta).add_(grad)
            if config.muon_gradient_dtype == "bfloat16":
                momentum.copy_(momentum.bfloat16())
            update = grad.add(momentum, alpha=beta)
        else:
            momentum.lerp_(grad, 1 - beta)
            update = grad.lerp(momentum, beta)
        if config.muon_row_normalize:
            update = update / (update.norm(dim=-1, keepdim=True) + 1e-7)
        rows, columns = update.shape[-2:]
        update = orthogonalize(update, config.muon_backend_steps, config.muon_coefficients, config.dtype)
        if squares is not None:
            update = equalize_neurons(update, squares, config.normuon_beta2)
        return update * max(1.0, rows / columns) ** 0.5

    def trainable_matrices(self, bank: Tensor, shard_size: int, trainable_layers: int) -> tuple[Tensor, Tensor]:
        """Indices of the first layers' matrices in a bank, and of those among them in this rank's shard."""
        matrices = [i for i in range(bank.size(0)) if i % self.config.num_layers < trainable_layers]
        first = self.run.rank * shard_size
        local = [i - first for i in matrices if first <= i < first + shard_size]
        return torch.tensor(matrices, device=bank.device), torch.tensor(local, dtype=torch.long, device=bank.device)

    def partial_direction(
        self, grad: Tensor, momentum: Tensor, squares: Tensor | None, beta: float, local: Tensor
    ) -> Tensor:
        """`direction` of some matrices of a shard alone; the update of the others is zero."""
        part_momentum = momentum[local]
        part_squares = None if squares is None else squares[local]
        part = self.direction(grad[local], part_momentum, part_squares, beta)
        momentum.index_copy_(0, local, part_momentum)
        if squares is not None and part_squares is not None:
            squares.index_copy_(0, local, part_squares)
        return part.new_zeros(grad.shape).index_copy_(0, local, part)

    @torch.no_grad()
    def step(self, grads: list[Tensor], beta: float, multiplier: float, trainable_layers: int) -> None:
        """Updates the banks' matrices of the first layers.

        Gathering one bank overlaps with orthogonalizing the next.
        """
        pending = []
        shards = zip(grads, self.momentum, self.squares, self.banks, self.shard_sizes, strict=True)
        for grad, momentum, squares, bank, size in shards:
            matrices = handle = None
            if trainable_layers == self.config.num_layers:
                update = self.direction(grad, momentum, squares, beta)
            else:
                matrices, local = self.trainable_matrices(bank, size, trainable_layers)
                update = self.partial_direction(grad, momentum, squares, beta, local)
            if self.run.world > 1:
                shard, shape = update.contiguous(), (update.size(0) * self.run.world, *update.shape[1:])
                update = torch.empty(shape, dtype=shard.dtype, device=shard.device)
                handle = dist.all_gather_into_tensor(update, shard, async_op=True)
            pending.append(PendingUpdate(bank, matrices, update, handle))
        for waiting in pending:
            self.apply(waiting, self.lr * multiplier)

    def shards(self) -> dict[str, Tensor]:
        """This rank's shards of all state, by name: the momentum and, with NORMUON_BETA2, the mean squares."""
        named = {f"muon.{name}": shard for name, shard in zip(BANKS, self.momentum, strict=True)}
        squares = {f"normuon.{name}": shard for name, shard in zip(BANKS, self.squares, strict=True)}
        return named | {name: shard for name, shard in squares.items() if shard is not None}

    def state(self) -> dict[str, Tensor]:
        """The state of all ranks, in the order of the banks' matrices: the same on any number of ranks."""
        matrices, whole = {name: bank.size(0) for name, bank in zip(BANKS, self.banks, strict=True)}, self.shards()
        for name, shard in whole.items():
            if self.run.world > 1:
                shape = (shard.size(0) * self.run.world, *shard.shape[1:])
                whole[name] = torch.empty(shape, dtype=shard.dtype, device=shard.device)
                dist.all_gather_into_tensor(whole[name], shard)
        return {name: tensor[: matrices[name.partition(".")[2]]] for name, tensor in whole.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes this rank's shards of such a state. Mean squares that were not kept start anew."""
        for name, shard in self.shards().items():
            shard.zero_()
            if name in tensors or name.startswith("muon."):
                size = shard.size(0)
                own = tensors[name][self.run.rank * size : (self.run.rank + 1) * size]
                shard[: len(own)].copy_(own)

    def apply(self, pending: PendingUpdate, lr: float) -> None:
        """Weight decay and the gathered update of one bank."""
        bank, matrices, update, handle = pending
        self.run.wait(handle)
        keep = 1 - lr * self.weight_decay
        if matrices is None or self.config.progressive_depth_decay:  # updates of frozen matrices are zero
            bank.mul_(keep).sub_(update[: bank.size(0)], alpha=lr)
        else:
            bank.index_copy_(0, matrices, (bank[matrices] * keep).sub_(update[matrices], alpha=lr))


class Optimizers:
    """Both optimizers behind one `step`: reduces the gradients over the ranks, clips their norm, updates."""

    def __init__(self, model: GPT, config: Config, run: Run):
        groups = parameter_groups(model, config)
        self.config, self.run = config, run
        self.model = model
        self.muon = Muon(next(g for g in groups if g.muon), config, run)
        self.adam_groups = [g for g in groups if not g.muon]
        self.adam = self.new_adam()

    def new_adam(self) -> torch.optim.AdamW:
        """AdamW over its groups, without state."""
        config = self.config
        rows = [dict(params=g.parameters, lr=g.lr, weight_decay=g.weight_decay) for g in self.adam_groups]
        return torch.optim.AdamW(
            rows, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=self.run.device.type == "cuda"
        )

    def reset(self) -> None:
        """Clears all state, as after construction."""
        for shard in self.muon.shards().values():
            shard.zero_()
        self.adam = self.new_adam()

    def state(self) -> dict[str, Tensor]:
        """All state, by name, the same on any number of ranks."""
        tensors = self.muon.state()
        for name, p in self.model.named_parameters():
            tensors |= {f"adam.{key}.{name}": value for key, value in self.adam.state.get(p, {}).items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        self.reset()
        self.muon.load(tensors)
        for name, p in self.model.named_parameters():
            rows = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if rows["step"] is not None:
                counter = rows["step"].to(p.device if self.adam.defaults["fused"] else "cpu")
                self.adam.state[p] = {**rows, "step": counter}

    @torch.no_grad()
    def step(self, beta: float, multiplier: float, trainable_layers: int) -> None:
        """One update with the sum of all ranks' gradients.

        Layers from `trainable_layers` on keep their weights, momentum and averages, and do not decay.
        """
        pending = self.muon.start_reduce()
        frozen = {id(p) for block in self.model.blocks[trainable_layers:] for p in block.parameters()}
        trained = [p for g in self.adam_groups for p in g.parameters if id(p) not in frozen]
        for p in trained:
            if p.grad is None:  # this execution order does not reach it
                p.grad = torch.zeros_like(p)
        small = [gradient_of(p) for p in trained]
        self.run.all_reduce_flat(small)
        for _, handle in pending:
            self.run.wait(handle)
        shards = [shard.to(momentum.dtype) for (shard, _), momentum in zip(pending, self.muon.momentum, strict=True)]
        self.clip(shards, small)
        for row, group in zip(self.adam.param_groups, self.adam_groups, strict=True):
            row["lr"] = group.lr * multiplier
        self.muon.step(shards, beta, multiplier, trainable_layers)
        self.round_embeddings()
        self.adam.step()
        self.round_embeddings()
        self.model.zero_grad(set_to_none=True)

    def round_embeddings(self) -> None:
        """EMBED_DTYPE=bfloat16: rounds tables of embeddings, their gradients and AdamW's means, as if kept so."""
        if self.config.embed_dtype == "master":
            return
        for p in (p for g in self.adam_groups for p in g.parameters if g.name in EMBEDDING_GROUPS):
            state = self.adam.state.get(p, {})
            for tensor in (p, gradient_of(p), state.get("exp_avg"), state.get("exp_avg_sq")):
                if tensor is not None:
                    tensor.copy_(tensor.bfloat16())

    def clip(self, shards: list[Tensor], small: list[Tensor]) -> None:
        """Scales the gradient down to a norm of GRAD_CLIP_NORM over all parameters. No value is read by the host."""
        if not self.config.grad_clip_norm:
            return
        squares = cast(Tensor, sum(s.square().sum() for s in shards))
        self.run.all_reduce(squares)
        norm = (squares + sum(g.square().sum() for g in small)).sqrt()
        scale = (self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for tensor in (*shards, *small):
            tensor.mul_(scale.to(tensor.dtype))


# ---------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the progress of training
# ---------------------------------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """Steps taken and seconds of training so far."""

    step: int
    seconds: float


START = Progress(0, 0.0)


def fraction_done(p: Progress, config: Config) -> float:
    """Fraction of the training that is over: of the time limit or of the steps, whichever is further."""
    if not config.iterations:
        return 1.0
    return min(1.0, max(p.step / config.iterations, p.seconds / config.train_seconds))


def lr_multiplier(p: Progress, config: Config) -> float:
    """Learning-rate multiplier: 1, then falling to 0 over the warmdown, but not below MIN_LR. See `lr_warmup`."""
    warmdown = config.warmdown_frac
    if not warmdown and config.warmdown_iters:
        # Given in steps: the fraction of the run that they take at the average speed so far.
        seconds = config.warmdown_iters * p.seconds / max(p.step, 1)
        warmdown = min(1.0, max(config.warmdown_iters / max(config.iterations, 1), seconds / config.train_seconds))
    if not warmdown:
        return 1.0
    left = min(1.0, (1.0 - fraction_done(p, config)) / warmdown)
    return max(config.min_lr, (1 - math.cos(math.pi * left)) / 2 if config.warmdown_shape == "cosine" else left)


def lr_warmup(p: Progress, config: Config) -> float:
    """What a step's learning rates are multiplied by beside `lr_multiplier`: rises to 1 over LR_WARMUP_STEPS.

    It stands by itself, because late QAT and SWA begin where `lr_multiplier` has fallen.
    """
    return min(1.0, (p.step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0


def reached(p: Progress, config: Config, start: float) -> bool:
    """Whether the training is at a step, or below 1 at a fraction of the training."""
    return fraction_done(p, config) >= start if start < 1 else p.step >= start


def prefix_weight(p: Progress, config: Config) -> float:
    """Weight of the loss of the targets' prefixes: PREFIX_LOSS_WEIGHT, linear to 0 at the end."""
    return config.prefix_loss_weight * (1.0 - fraction_done(p, config))


def muon_beta(p: Progress, config: Config) -> float:
    """Muon's momentum, linear over its warmup; then with MUON_MOMENTUM_CYCLE a triangle wave."""
    warmup, cycle = config.muon_momentum_warmup_steps, config.muon_momentum_cycle
    if cycle and p.step >= warmup:
        place = p.step % (2 * cycle) / cycle
        return config.muon_momentum_min + min(place, 2 - place) * (config.muon_momentum_max - config.muon_momentum_min)
    fraction = min(1.0, p.step / warmup) if warmup else 1.0
    start = min(config.muon_momentum_warmup_start, config.muon_momentum)
    return start + fraction * (config.muon_momentum - start)


def context_at(p: Progress, config: Config) -> int:
    """Most tokens that a token of the next step sees (PR #2014)."""
    done = fraction_done(p, config)
    return next((context for context, end in config.context_schedule if done < end), config.context_schedule[-1][0])


def context_warmup(p: Progress, config: Config) -> float:
    """Learning-rate multiplier of the steps after a change of the context: rises linearly to 1 (PR #2014).

    The steps since the change are those that the time since then would take at the average speed so far.
    """
    done = fraction_done(p, config)
    begin = max((end for _, end in config.context_schedule if end <= done < 1.0), default=0.0)
    if not (begin and config.seq_change_warmup_steps):
        return 1.0
    since = p.step * (1 - begin / done)
    return min(1.0, (since + 1) / config.seq_change_warmup_steps)


def loops_enabled_at(p: Progress, config: Config) -> bool:
    """Whether the looped layers repeat by now."""
    if config.recur_start_step:
        return config.loops and p.step >= config.recur_start_step
    return config.loops and fraction_done(p, config) >= config.enable_looping_at


class StepVariant(NamedTuple):
    """What a training step computes. Each variant is a graph of its own."""

    looped: bool
    trainable_layers: int  # the first so many layers train
    fake_quant: bool  # late QAT
    predicts_ahead: bool = False  # multi-token prediction

    def title(self, config: Config) -> str:
        """Such as `looped, 4 layers`: plain or looped, and what differs from a step of all layers."""
        parts = ["looped" if self.looped else "plain"]
        parts += [f"{self.trainable_layers} layers"] * (self.trainable_layers < config.num_layers)
        return ", ".join(parts + ["rounded"] * self.fake_quant + ["ahead"] * self.predicts_ahead)


def ahead_factor(p: Progress, config: Config) -> float:
    """What MTP_WEIGHTS are multiplied by: from 1 linearly to 0 at MTP_END."""
    return max(0.0, 1.0 - fraction_done(p, config) / config.mtp_end)


def predicts_ahead_at(p: Progress, config: Config) -> bool:
    """Whether a step also predicts tokens further ahead."""
    return bool(config.ahead_weights) and fraction_done(p, config) < config.mtp_end


def trainable_layers_at(p: Progress, config: Config) -> int:
    """Progressive depth (PR #1325): n fractions make n + 1 stages of equal depth increments."""
    by_steps = p.step / max(config.iterations, 1)
    done = by_steps if config.progressive_depth_by == "steps" else fraction_done(p, config)
    stage = sum(done >= start for start in config.depth_cuts)
    return config.num_layers * (stage + 1) // (len(config.depth_cuts) + 1)


def step_variant_at(p: Progress, config: Config) -> StepVariant:
    """The variant of the next step."""
    fake_quant = lr_multiplier(p, config) < config.late_qat_threshold
    if config.qat_start:
        fake_quant = reached(p, config, config.qat_start)
    return StepVariant(
        loops_enabled_at(p, config), trainable_layers_at(p, config), fake_quant, predicts_ahead_at(p, config)
    )


def may_fake_quantize(middle: Progress, end: float, config: Config) -> tuple[bool, ...]:
    """Whether steps of a stretch of the training fake-quantize, from its middle and the fraction at which it ends."""
    if config.qat_start:
        on = reached(middle, config, config.qat_start)
        return (False, True) if on and config.qat_start >= 1 and config.max_wallclock_seconds else (on,)
    decays = bool(config.warmdown_frac or config.warmdown_iters) and config.min_lr < config.late_qat_threshold
    return (False, True) if decays and end > 1 - config.late_qat_threshold else (False,)


def all_step_variants(config: Config) -> list[StepVariant]:
    """Every variant that a training may run, in order, for the warmup to compile.

    A warmdown is at most as long as the training, so the multiplier falls below a threshold t in the last fraction t
    of it at the earliest. When exactly may depend on the speed: from there on both variants are listed. So may the
    depth that PROGRESSIVE_DEPTH_BY=steps has reached: any up to that of the fraction. RECUR_START_STEP and a QAT_START
    in steps are alike.
    """
    starts, steps = {0.0, *config.depth_cuts}, max(config.iterations, 1)
    if config.loops:
        counted = config.recur_start_step / steps
        starts.add(min(1.0, counted) if config.recur_start_step else config.enable_looping_at)
    if config.ahead_weights:
        starts.add(config.mtp_end)
    if config.qat_start:
        starts.add(config.qat_start if config.qat_start < 1 else min(1.0, config.qat_start / steps))
    starts = sorted(starts - {1.0})
    stages, timed = len(config.depth_cuts) + 1, config.max_wallclock_seconds > 0
    slower = [config.num_layers * (n + 1) // stages for n in range(stages)]
    slower = slower if timed and config.progressive_depth_by == "steps" else []
    variants = []
    for begin, end in itertools.pairwise((*starts, 1.0)):
        between = (begin + end) / 2 * steps
        middle = Progress(between, 0.0)  # pyright: ignore[reportArgumentType] # no whole step, which is right here
        for fake_quant in may_fake_quantize(middle, end, config):
            variant = step_variant_at(middle, config)._replace(fake_quant=fake_quant)
            depths = [n for n in slower if n < variant.trainable_layers] + [variant.trainable_layers]
            loops = {False, variant.looped} if timed and config.recur_start_step else {variant.looped}
            variants += [variant._replace(looped=on, trainable_layers=n) for on in sorted(loops) for n in depths]
    return list(dict.fromkeys(variants))


def ema_weight(step: int, config: Config) -> float:
    """Weight of the new values in the EMA; with EMA_RAMP larger at first: a short run forgets its initial weights.

    The ramp (1+t)/(10+t) is that of TensorFlow's ExponentialMovingAverage; it is over after some 10/(1-decay) steps.
    """
    return 1.0 - (min(config.ema_decay, (1 + step) / (10 + step)) if config.ema_ramp else config.ema_decay)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def compiled_forward(model: GPT) -> Callable:
    """The model's forward, with COMPILE=1 compiled: one graph for each variant of its arguments.

    Sizes are constants, but for those that the caller marks as dynamic.
    """
    if not model.runtime.compile:
        return model
    from torch._inductor import config as inductor  # imports much, and only compiling needs it
    from torch.fx.experimental import _config as symbolic_shapes

    torch._dynamo.config.recompile_limit = 64  # training, evaluation and TTT together exceed the default of 8
    # Sizes that are equal by chance in the first batch would be taken for one, and the next batch compiled again.
    symbolic_shapes.use_duck_shape = False
    # The rows of q, k, v and gate would be padded, and all of them copied for the Triton kernels, which must find the
    # strides that they were traced with.
    inductor.comprehensive_padding = False
    return torch.compile(model, dynamic=False, fullgraph=True)


def mark_sizes(dims: tuple[int, ...], *tensors: Tensor) -> None:
    """Marks dimensions of tensors as dynamic, but those of size 1: torch.compile makes them constants."""
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, [d for d in dims if tensor.size(d) > 1])


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def focal_weights(nll: Tensor, gamma: float, norm: str = "sequence") -> Tensor:
    """Weights [B, T] of the tokens' losses, (1 - e^-nll)^gamma (focal loss, arXiv 1708.02002), without a gradient.

    Each sequence's weights average 1. With an average over the micro-batch, as in PR #1325, an update depends on the
    number of ranks.
    """
    weights = (-torch.expm1(-nll.detach())).clamp_min(0) ** gamma
    mean = weights.mean() if norm == "batch" else weights.mean(dim=-1, keepdim=True)
    return weights / mean.clamp_min(1e-12)


def tokens_ahead(batch: Batch, distance: int) -> tuple[Tensor, Tensor]:
    """The token so many places after each one [B, T] int64, and whether it is to be predicted [B, T] bool.

    It is where the token before it is of the same document: the BOS after a document is its end, and nothing beyond
    can be known. Places whose token lies beyond the sequence hold any token. distance: 1 to T; 1 gives the targets.
    """
    cut = (distance - 1, 0)
    tokens = F.pad(batch.targets[:, cut[0] :], cut[::-1])
    starts = F.pad(batch.documents.starts[:, cut[0] :], cut[::-1], value=-1)
    return tokens, starts == batch.documents.starts


class ExtraTargets(NamedTuple):
    """Tokens that a training step predicts from each position beside its target."""

    tokens: Tensor  # [B, T, K] int64
    weights: Tensor  # [B, T, K] of their losses; 0 where a position has no such token


def lerp_all(tensors: list[Tensor], values: list[Tensor], weight: float) -> None:
    """Moves the tensors toward the values by this fraction of the distance."""
    torch._foreach_lerp_(tensors, values, weight)  # pyright: ignore[reportPrivateImportUsage] # one kernel for all


class Trainer:
    """Weights, optimizers, averages and the data: all that a training step reads and changes."""

    def __init__(self, model: GPT, loader: TrainLoader, config: Config, run: Run):
        self.model, self.loader = model, loader
        self.config, self.run = config, run
        self.layout = batch_layout(config, run.world)
        self.optimizers = Optimizers(model, config, run)
        self.forward = compiled_forward(model)
        self.prefixes: Tensor | None = None  # of every token, see `Vocabulary.longest_prefixes`
        if config.prefix_loss_weight:
            self.prefixes = send_array(Vocabulary(config).longest_prefixes(), run.device)
        keep_ema, keep_swa = config.averages
        self.ema = [p.clone() for p in self.parameters()] if keep_ema else None
        self.swa = [torch.zeros_like(p) for p in self.parameters()] if keep_swa else None
        self.swa_count = 0

    def parameters(self) -> list[Tensor]:
        """The model's weights, outside of autograd."""
        return [p.detach() for p in self.model.parameters()]

    def step(
        self,
        p: Progress,
        looped: bool,
        trainable_layers: int | None = None,
        fake_quant: bool = False,
        predicts_ahead: bool = False,
    ) -> Tensor:
        """One update of the first layers (None: all) and of every weight outside of layers, as a StepVariant says.

        Returns the sum of NLL over this rank's targets, as a tensor: reading it would wait for the device.
        """
        config = self.config
        layers = config.num_layers if trainable_layers is None else trainable_layers
        grids = (config.attn_grid, config.mlp_grid) if fake_quant else None
        rounding = dict(fake_quant=grids, fp8_head=config.fp8_head, fp8_mlp=config.fp8_mlp)
        context = context_at(p, config)
        dtype = torch.float32 if config.device == "mps" else torch.float64  # Apple's GPUs have no float64
        nats = torch.zeros((), dtype=dtype, device=self.run.device)
        for micro in range(self.layout.micro_steps):
            batch = self.loader.batch(p.step, micro, context)
            noise = self.loader.noise(p.step, micro)
            extra = self.extra_targets(p, batch, predicts_ahead)
            more = rounding if extra is None else dict(rounding, extra_targets=extra.tokens)
            nll, lse, *others = self.forward(*batch, looped=looped, noise=noise, trainable_layers=layers, **more)
            loss = self.focal_loss(nll).sum() if config.focal_enabled else nll.sum()
            if config.z_loss_weight:
                loss = loss + config.z_loss_weight * lse.square().sum()
            if extra is not None:
                loss = loss + (others[0] * extra.weights).sum()
            (loss / config.train_batch_tokens).backward()
            nats += nll.detach().sum(dtype=dtype)
        multiplier = lr_multiplier(p, config) * lr_warmup(p, config) * context_warmup(p, config)
        self.optimizers.step(muon_beta(p, config), multiplier, layers)
        self.update_averages(p)
        return nats

    def focal_loss(self, nll: Tensor) -> Tensor:
        """The tokens' losses, weighted. A stream's batch is one row, in which each sequence still counts by itself."""
        config = self.config
        rows = nll.view(-1, config.train_seq_len)
        return rows * focal_weights(rows, config.focal_gamma, config.focal_norm)

    def extra_targets(self, p: Progress, batch: Batch, predicts_ahead: bool) -> ExtraTargets | None:
        """What a step predicts beside the targets of a micro-batch, or None."""
        columns: list[tuple[Tensor, Tensor]] = []  # tokens [B, T] and the weights of their losses
        # Multi-token prediction (arXiv 2404.19737), with the output head itself as in the nanoGPT speedrun.
        for distance, weight in enumerate(self.config.ahead_weights if predicts_ahead else (), 2):
            tokens, counted = tokens_ahead(batch, distance)
            columns.append((tokens, weight * ahead_factor(p, self.config) * counted.float()))

        # A token's prefix is right in part, as the nanoGPT speedrun found.
        if self.prefixes is not None:
            prefixes = self.prefixes[batch.targets]
            columns.append((prefixes.clamp_min(0), prefix_weight(p, self.config) * (prefixes >= 0).float()))
        if not columns:
            return None
        return ExtraTargets(*(torch.stack(parts, -1) for parts in zip(*columns, strict=True)))

    def update_averages(self, p: Progress) -> None:
        """Adds the weights after a step to the averages: every step's to the EMA, late ones to the SWA."""
        config = self.config
        if self.ema is not None:
            begun = reached(p, config, config.ema_start)
            lerp_all(self.ema, self.parameters(), ema_weight(p.step, config) if begun else 1.0)
        late = lr_multiplier(p, config) < config.swa_start
        if self.swa is not None and late and (p.step + 1) % config.swa_every == 0:
            self.swa_count += 1
            lerp_all(self.swa, self.parameters(), 1 / self.swa_count)

    def warm_up(self, evaluate_once: Callable[[Callable], Any] = lambda forward: None) -> None:
        """Runs every graph that the training and its validations need, then restores all state, bit for bit."""
        initial = [p.clone() for p in self.parameters()]
        for step in range(self.config.warmup_steps):
            for variant in all_step_variants(self.config):
                start = time.perf_counter()
                self.step(Progress(step, 0.0), *variant)
                if self.config.compile == "1" and not step:  # minutes at full size, which would be silent
                    self.run.synchronize()
                    self.run.log(f"warmup: {variant.title(self.config)} compiled, {time.perf_counter() - start:.0f} s")
        if self.config.warmup_steps:
            evaluate_once(self.forward)
        for tensors in (self.parameters(), self.ema or []):
            if tensors:
                copy_all(tensors, initial)
        self.swa_count = 0
        self.optimizers.reset()

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name, the same on any number of ranks."""
        names = [name for name, _ in self.model.named_parameters()]
        tensors = self.optimizers.state() | named_weights(self.model)
        for kind, values in dict(ema=self.ema, swa=self.swa).items():
            tensors |= {f"{kind}.{name}": value for name, value in zip(names, values or [], strict=bool(values))}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], swa_count: int) -> None:
        """Takes over what `state` gave. An EMA that was not kept starts at the weights."""
        names = [name for name, _ in self.model.named_parameters()]
        load_weights(self.model, tensors)
        if self.ema is not None:
            copy_all(self.ema, [tensors.get(f"ema.{name}", tensors[f"weights.{name}"]) for name in names])
        if self.swa is not None and f"swa.{names[0]}" in tensors:
            copy_all(self.swa, [tensors[f"swa.{name}"] for name in names])
            self.swa_count = swa_count
        self.optimizers.load(tensors)

    def save(self, p: Progress, ended: bool, last: bool = False) -> None:
        """A checkpoint of the training, after a step. The last two are kept. Where it is not the last one, it is left
        out while another one is being written."""
        run, tensors = self.run, self.state()
        if not run.is_main or run.checkpoints is None or (run.checkpoints.busy and not (ended or last)):
            return
        kept = run.checkpoints
        state = dict(
            version=CHECKPOINT_VERSION,
            step=p.step,
            seconds=p.seconds,
            ended=ended,
            swa_count=self.swa_count,
            train_tokens=len(self.loader.stream),
            config=dataclasses.asdict(self.config),
        )
        kept.save(checkpoint_name(p.step), tensors, state, lambda: kept.numbered()[2:])

    def use_average(self) -> None:
        """Puts the averaged weights into the model: the EMA, the SWA, or the mean of both where both are kept."""
        averages = [] if self.ema is None else [self.ema]
        if self.swa is not None:
            self.run.log(f"swa: {self.swa_count} weights averaged")
            averages += [self.swa] if self.swa_count else []
        if averages:
            means = [cast(Tensor, sum(tensors)) / len(averages) for tensors in zip(*averages, strict=True)]
            copy_all(self.parameters(), means)


def train(trainer: Trainer, validate: Callable[[], Score], progress: Progress = START, ended: bool = False) -> Progress:
    """The training loop: until ITERATIONS or the time limit. Returns where it ended.

    `progress` is where the training was cut off, and `ended` says that only what follows it is missing.
    """
    config, run = trainer.config, trainer.run
    means = mean_contexts(trainer) if run.is_main and config.train_log_every else {}
    saved, since = progress.seconds, time.perf_counter()
    guard = LossGuard(config, run)
    variant = StepVariant(looped=False, trainable_layers=config.num_layers, fake_quant=False)
    context = 0
    while True:
        last = ended or fraction_done(progress, config) >= 1.0
        if config.val_loss_every and (last or progress.step % config.val_loss_every == 0):
            run.synchronize()
            log_validation(run, config, progress, validate())
            since = time.perf_counter()
        if last:
            if run.checkpoints and not ended:
                trainer.save(progress, ended=True)
            if run.broadcast(float(run.asked)):
                raise interrupted(trainer, progress)
            return progress
        if run.checkpoints and progress.seconds - saved >= config.checkpoint_every_seconds:
            saved = progress.seconds
            trainer.save(progress, ended=False)
        previous, variant = variant, step_variant_at(progress, config)
        log_variant_change(run, config, progress, previous, variant)
        if means and context_at(progress, config) != context:
            context = context_at(progress, config)
            log_context(run, config, progress, context, means[context])
        nats = trainer.step(progress, *variant)
        known = guard.send(nats)
        run.pace()
        problem = guard.problem(known) if run.is_main else ""
        now = time.perf_counter()
        # Rank 0's clock counts. That the loss has gone wrong travels with it, and that the run is asked to end.
        sign = -1.0 if run.asked else 1.0
        seconds = run.broadcast(math.nan if problem else math.copysign(progress.seconds + now - since, sign))
        if math.isnan(seconds):
            raise exploded(trainer, progress.step + 1, problem)
        progress, since = Progress(progress.step + 1, abs(seconds)), now
        if run.journal:
            run.journal.train_seconds = progress.seconds
        early_or_last = progress.step <= 3 or fraction_done(progress, config) >= 1.0
        if config.train_log_every and (early_or_last or progress.step % config.train_log_every == 0):
            log_step(trainer, progress, nats)
        if run.is_main and run.live.due:
            run.live.show(live_step(progress, config, guard.loss, run.live.bytes_per_token))
        if math.copysign(1.0, seconds) < 0:
            trainer.save(progress, ended=False, last=True)
            raise interrupted(trainer, progress)


def interrupted(trainer: Trainer, p: Progress) -> Interrupted:
    """The end of a training by a signal, the same on all ranks: waits for its checkpoint, and says how to go on."""
    run, config = trainer.run, trainer.config
    line = ""
    if run.is_main and run.checkpoints and run.journal:
        run.checkpoints.flush()
        run.journal.write()
        more = [] if config.run_id or config.artifact_dir else [f"RUN_ID={run.path('').name}"]
        more += ["RESUME=auto"] if config.resume == "0" else []
        command = "the same command" + (" with " if more else "") + " and ".join(more)
        line = f"{SignalHold.LINES[run.asked]} after step {p.step}; {command} goes on"
        if not os.path.isfile(run.checkpoints.folder / checkpoint_name(p.step)):
            line += " from an earlier step, as this one's checkpoint could not be written"
        run.append("log.txt", line)
    number, line = run.broadcast_object((run.asked, line))
    return Interrupted(number, line)


class Resumed(NamedTuple):
    """What a training goes on from: the checkpoint's file, its tensors on rank 0, and its state."""

    path: str
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def newest_checkpoint(trainer: Trainer) -> Resumed | None:
    """The newest good checkpoint of this run or, where it has none, of RESUME=PATH; None: the training is new.

    Errors: ConfigError where RESUME=PATH holds none that this training can go on from.
    """
    config, run = trainer.config, trainer.run
    given = checkpoints_at(config.resume_path) if config.resume_path else []
    own = run.checkpoints.numbered() if run.checkpoints and run.attempts > 1 else []
    for path in (*own, *given):
        try:
            tensors, state = read_tensors(path)
            check_resumed(trainer, tensors, state)
        except (OSError, ValueError) as error:
            run.log(f"warning: {path} {error}; an older checkpoint is used, if there is one")
            continue
        return Resumed(str(path), tensors, state)
    if config.resume_path:
        raise ConfigError("RESUME", config.resume, "holds no checkpoint that this training can go on from")
    return None


def check_resumed(trainer: Trainer, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Errors: ValueError where a checkpoint is not of such a model, or of other training text."""
    if state.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"has version {state.get('version')}, and this script reads {CHECKPOINT_VERSION}")
    if state["train_tokens"] != len(trainer.loader.stream):
        raise ValueError(
            f"is of a training on {state['train_tokens']} tokens of text, not {len(trainer.loader.stream)}"
        )
    for name, p in trainer.model.named_parameters():
        found = tensors.get(f"weights.{name}")
        if found is None or found.shape != p.shape or found.dtype != p.dtype:
            raise ValueError(f"is of another model: its weights {name!r} are not {p.dtype} {list(p.shape)}")


def find_resumed(trainer: Trainer) -> Resumed | None:
    """What the training goes on from, on every rank; rank 0 alone has the tensors. None: the training is new."""
    run = trainer.run
    found = run.on_main(lambda: newest_checkpoint(trainer))
    path, state = run.broadcast_object((found.path, found.state) if found else ("", {}))
    return (found or Resumed(path, {}, state)) if path else None


def load_resumed(trainer: Trainer, resumed: Resumed | None) -> Progress:
    """Takes over a checkpoint on every rank. Returns where the training is.

    What this run computed after the checkpoint is lost, but its seconds count.
    """
    run = trainer.run
    spent = run.broadcast(run.journal.train_seconds if run.journal else 0.0)
    if resumed is None:
        if run.attempts > 1:
            run.log(f"resumed from the beginning: step 0, {spent:.1f} s of training count")
            run.metric(resumed_at=0)
        return Progress(0, spent)
    state = resumed.state
    table = run.broadcast_object([(name, t.dtype, t.shape) for name, t in resumed.tensors.items()])
    tensors = {}
    for name, dtype, shape in table:
        tensor = resumed.tensors[name] if run.is_main else torch.empty(shape, dtype=dtype)
        tensors[name] = tensor.to(run.device)
        if run.world > 1:
            dist.broadcast(tensors[name], 0)
    trainer.load(tensors, state["swa_count"])
    seconds = max(state["seconds"], spent)
    run.log(f"resumed from {resumed.path}: step {state['step']}, {seconds:.1f} s of training count")
    run.metric(resumed_at=state["step"])
    settings = json.loads(to_json(dataclasses.asdict(trainer.config)))
    for name, before in state["config"].items():
        now = settings.get(name)
        if now != before and name not in (*OPERATIONAL, "gptq_reserve_seconds"):  # which is measured
            run.log(f"resumed with another setting: {name.upper()} {before} -> {now}")
    run.resumed_at = [*run.resumed_at, state["step"]]
    if not run.checkpoints or Path(resumed.path).parent != run.checkpoints.folder:
        run.resumed_from = resumed.path
    if run.journal:
        run.journal.write()  # a kill within its half second would leave a run that knows nothing of the other one
    return Progress(state["step"], seconds)


def log_variant_change(run: Run, config: Config, p: Progress, before: StepVariant, after: StepVariant) -> None:
    """A line for each change in what steps compute."""
    if after.looped and not before.looped:
        run.log(f"step:{p.step} loops enabled: layer order {execution_order(config, True)}")
    if before.predicts_ahead and not after.predicts_ahead:
        run.log(f"step:{p.step} multi-token prediction ends")
    if after.trainable_layers != before.trainable_layers:
        run.log(f"step:{p.step} training layers 0-{after.trainable_layers - 1} of {config.num_layers}")
    if after.fake_quant and not before.fake_quant:
        attention, mlp = config.attn_grid[0], config.mlp_grid[0]
        run.log(f"step:{p.step} late QAT enabled: attention rounded to {attention} bits, MLP to {mlp} bits")


def mean_contexts(trainer: Trainer) -> dict[int, float]:
    """What tokens have on average of each context of the schedule. Read before the clock starts, the first one last,
    so that its order is at hand."""
    return {context: trainer.loader.mean_context(context) for context, _ in reversed(trainer.config.context_schedule)}


def log_context(run: Run, config: Config, p: Progress, context: int, mean: float) -> None:
    """A line for the most context that tokens of the next steps have, and for what they have of it on average."""
    run.log(f"step:{p.step} data_order:{config.data_order} context: at most {context} tokens, {mean:.1f} on average")
    run.metric(context_at=p.step, context=context, mean_context=mean)


def way_on(run: Run | None) -> str:
    """What an error of a training says of its last checkpoint; empty where there is none."""
    good = []
    if run and run.checkpoints:
        run.checkpoints.flush()
        good = run.checkpoints.numbered()
    return f"; RESUME={good[0]} and another RUN_ID go on from the last checkpoint" if good else ""


def diverged(config: Config, what: str, run: Run | None = None) -> ConfigError:
    """The error of a training that has diverged. With `run`, it names the checkpoint to go on from."""
    advice = f"{what}; lower this rate, SCALAR_LR={config.scalar_lr:g} or the embedding's"
    return ConfigError("MATRIX_LR", config.matrix_lr, advice + way_on(run))


class LossGuard:
    """Notices, by rank 0's loss of each step, that a training has gone wrong. It never waits for a GPU.

    A loss that is not finite spreads to all weights within a step, so that rank 0 sees it one step later at most.
    """

    def __init__(self, config: Config, run: Run):
        self.tokens = config.train_batch_tokens / run.world
        self.least = math.log(config.vocab_size)
        self.limit: float | None = None
        self.waiting: Tensor | None = None  # a GPU's loss on its way to the host
        self.loss = math.nan  # of the last step that is known

    def send(self, nats: Tensor) -> Tensor | None:
        """Takes the nats of the step that was queued. Returns those of the step before it, which a GPU has finished
        after `Run.pace`; on a CPU those of this step."""
        if nats.device.type != "cuda":
            return nats
        arrived, self.waiting = self.waiting, torch.empty((), dtype=nats.dtype, pin_memory=True)
        self.waiting.copy_(nats, non_blocking=True)
        return arrived

    def problem(self, nats: Tensor | None) -> str:
        """What is wrong with a loss: it is not finite, or twice what the first step, or guessing, costs."""
        if nats is None:
            return ""
        loss = self.loss = nats.item() / self.tokens
        if self.limit is None:
            self.limit = 2 * max(loss, self.least)
        if math.isfinite(loss) and loss <= self.limit:
            return ""
        return f"the training loss is {loss:.4g}" if math.isfinite(loss) else f"the training loss is {loss}"


def exploded(trainer: Trainer, step: int, problem: str) -> ConfigError:
    """The error of a training whose loss has gone wrong: it names the first weights that are not finite, or largest."""
    weights = dict(trainer.model.named_parameters())
    broken = nonfinite(weights.items())
    if broken:
        count = sum(not torch.isfinite(p).all() for p in weights.values())
        where = f"the first of {count} tensors of weights that are not finite is {broken!r}"
    else:
        largest = max(weights, key=lambda name: weights[name].detach().abs().max().item())
        where = f"the largest weight, {weights[largest].detach().abs().max().item():.3g}, is in {largest!r}"
    return diverged(trainer.config, f"{problem} at step {step}, and {where}", trainer.run)


def log_step(trainer: Trainer, p: Progress, nats: Tensor) -> None:
    """The line of a training step, in the form that the community's scripts parse, and its metrics."""
    config, run = trainer.config, trainer.run
    run.all_reduce(nats)
    loss, fraction = nats.item() / config.train_batch_tokens, fraction_done(p, config)
    if not math.isfinite(loss):
        raise exploded(trainer, p.step, f"the training loss is {loss}")
    ms, tokens = 1000 * p.seconds, p.step * config.train_batch_tokens
    eta = p.seconds / fraction * (1 - fraction) if fraction else 0.0
    lr_scale = lr_multiplier(p, config) * lr_warmup(p, config)
    run.log(
        f"step:{p.step}/{config.iterations} train_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / p.step:.2f}ms "
        f"lr_scale:{lr_scale:.3f} tokens/s:{tokens / p.seconds:.0f} eta:{eta:.0f}s"
    )
    momentum = muon_beta(p, config)
    run.metric(
        step=p.step, train_loss=loss, train_seconds=p.seconds, lr_scale=lr_scale, momentum=momentum, tokens=tokens
    )


def live_step(p: Progress, config: Config, loss: float, bytes_per_token: float) -> str:
    """The live line of a training step. Bits per byte are those of the training text, if its tokens are as long as
    those of the validation text are on average."""
    fraction = fraction_done(p, config)
    score = Score(1000 * loss, 1000, round(1000 * bytes_per_token))
    bpb = f"  bpb ~{score.bpb:.3f}" if bytes_per_token else ""
    rate = p.step * config.train_batch_tokens / p.seconds
    eta = clock(p.seconds / fraction * (1 - fraction)) if fraction else "?"
    return f"step {p.step}  loss {loss:.4f}{bpb}  {rate:,.0f} tokens/s  {fraction:.0%}  ETA {eta}"


def log_data_stall(run: Run, p: Progress, seconds: float) -> float:
    """The fraction of the training in which steps waited for their batches, on the rank that waited longest."""
    share = max(run.gather(seconds)) / max(p.seconds, 1e-9)  # ITERATIONS=0 takes none
    run.log(f"data stall: {share:.2%} of step time")
    run.metric(data_wait_share=share)
    return share


def require_finite(score: Score, error: Callable[[str], ConfigError], loss: str = "the validation loss") -> Score:
    """The score, if it is one. Errors: what `error` makes of the problem; `loss` says what is not finite.

    The sums of a score are the same on every rank, so that all ranks end here or none.
    """
    if not score.finite:
        raise error(f"{loss} is {score.loss}")
    return score


def log_score(run: Run, stage: str, score: Score) -> None:
    """The score of a stage after the training, which must be finite."""
    run.log(f"{stage} {score}")
    run.metric(stage=stage, val_loss=score.loss, val_bpb=score.bpb)


def log_validation(run: Run, config: Config, p: Progress, score: Score) -> None:
    """The line of a validation during the training, in the form that the community's scripts parse."""
    ms = 1000 * p.seconds
    require_finite(score, lambda problem: diverged(config, f"{problem} at step {p.step}", run))
    run.log(f"step:{p.step}/{config.iterations} {score} train_time:{ms:.0f}ms step_avg:{ms / max(p.step, 1):.2f}ms")
    run.metric(step=p.step, val_loss=score.loss, val_bpb=score.bpb, train_seconds=p.seconds)


# ---------------------------------------------------------------------------------------------------------------
# Quantization: quantize(weights) -> stored tensors, and dequantize, its inverse
# ---------------------------------------------------------------------------------------------------------------


class Quantized(NamedTuple):
    """A stored tensor: integer codes with one fp16 scale per row, or plain fp16 values (scales None, bits 16).

    `extras` holds the optional arrays that are listed in `EXTRAS`.
    """

    codes: Tensor  # int8 [..., r, c], int16 where `bits` is 9 to 12, or float16
    scales: Tensor | None  # float16 [..., r]
    bits: int
    extras: dict[str, Tensor]
    states: int = 0  # of the trellis that the codes walk through; 0: each code is its level


# Optional arrays of a stored bank of B matrices [r, c]: dtype and number of dimensions.
EXTRAS = {
    "columns": (torch.int8, 2),  # [B, c] exponents e of the column scales 2^(e / 2)
    "corrected": (torch.int32, 1),  # [n] matrices to which left @ right is added (LQER)
    "left": (torch.int8, 3),  # [n, r, k]
    "left_scales": (torch.float16, 2),  # [n, r], or [n, 1]
    "right": (torch.int8, 3),  # [n, k, c]
    "right_scales": (torch.float16, 3),  # [n, k, groups]
    "refined": (torch.int32, 1),  # [n] matrices to which a quantized residual is added (RVQ)
    "residual": (torch.int8, 3),  # [n, r, c]
    "residual_scales": (torch.float16, 2),  # [n, r]
}
INT8_LIMIT = 127  # the largest magnitude of a code of up to 8 bits, so that codes are symmetric
WIDE_LIMIT = 2047  # ... of one of 9 to 12 bits


def quantization_bits(name: str, elements: int, config: Config) -> tuple[int, float]:
    """(bits, clip sigmas) of a parameter, by its role and size; 0 sigmas: the grid covers the row's whole range."""
    if name in ("qo_bank", "kv_bank"):
        return config.attn_grid
    if name in ("up_bank", "down_bank"):
        return config.mlp_grid
    if name in ("embedding", "head"):
        return config.embed_bits, config.embed_clip_sigmas
    if name.endswith((".table", ".projection")) and elements > config.fp16_elements:
        return config.matrix_bits, config.matrix_clip_sigmas
    return (8, 0.0) if name.endswith("head_gate") and config.gated_attn_quant_gate else (16, 0.0)


def as_batch(weights: Tensor) -> Tensor:
    """A bank [B, r, c] unchanged, or a single matrix as a bank of one."""
    return weights if weights.dim() == 3 else weights[None]


def weighted_error(error: Tensor, hessian: Tensor, outputs: Tensor | None = None) -> Tensor:
    """tr(G E H E^T) of each matrix's error [B, r, c], [B] float64. Without G [B, r, r] it is the squared error of the
    layer's outputs.
    """
    seen = error if outputs is None else outputs @ error
    return ((error @ hessian) * seen).sum(dim=(-1, -2), dtype=torch.float64)


def entropy(codes: Tensor) -> float:
    """Zeroth-order entropy in bits per code."""
    probabilities = torch.unique(codes, return_counts=True)[1].double() / max(1, codes.numel())
    return -(probabilities * probabilities.log2()).sum().item()


# --- Calibration ---


class Calibration(NamedTuple):
    """What training batches say of the tensors to quantize.

    With gradients, an error E of a matrix adds about half the sum over rows r of rows[r] E_r H E_r^T to a token's loss,
    in nats, if the errors of its rows are independent. Else it is tr(G E H E^T) / 2, where G is the covariance of the
    outputs' gradients, about rows[r] on its diagonal. Without gradients, H is the mean X^T X of its inputs, and E adds
    tr(E H E^T) to the squared error of its outputs.
    """

    hessians: dict[str, Tensor]  # [B, c, c] of each bank
    rows: dict[str, Tensor] = {}  # [B, r] sensitivity of each output row over its matrix's mean; none without gradients
    outputs: dict[str, Tensor] = {}  # [B, r, r] G of each bank over its mean diagonal; none without GPTQ_ROW_GROUPS


BANK_PARTS = {"qo_bank": ("q", "out"), "kv_bank": ("k", "v"), "up_bank": ("up",), "down_bank": ("down",)}
CALIBRATION_TOKENS = 16_384  # tokens of a forward and backward pass: activations are kept without recomputation


class CalibrationHooks:
    """Context manager that sums over tokens what calibration needs, in float64, while a model of constants runs.

    Sums of X^T X are by projection: "0.qkv", "0.out", ..., "logits". With gradients, `.rows` is added for the squared
    gradients of a projection's outputs. For the gradients G of looked-up vectors, `.rows` has the squares by the
    table's rows, and `.columns` G^T G. With GUIDED_HESSIANS, each token's x x^T is weighted by the mean squared
    gradient of the outputs (arXiv 2505.07004), apart for q, k and v. With GPTQ_ROW_GROUPS, `.outputs` has G^T G of a
    projection's outputs, each token weighted by the mean square of x: together they are a first step towards the
    nearest Kronecker product (YAQA, arXiv 2505.22988).
    """

    def __init__(self, model: GPT, config: Config):
        self.config = config
        self.sums: dict[str, Tensor] = {}
        self.projections: dict[str, tuple[nn.Module, dict[str, int]]] = {"logits": (model.logits, {"logits": -1})}
        for i, module in enumerate(model.blocks):
            block = cast(Block, module)
            widths = zip(("q", "k", "v"), block.widths, strict=False)
            self.projections[f"{i}.qkv"] = block.qkv, {f"{i}.{part}": width for part, width in widths}
            for name in ("out", "up", "down"):
                self.projections[f"{i}.{name}"] = getattr(block, name), {f"{i}.{name}": -1}
        self.lookups = {"embedding": model.lookup}
        for name in ("bigram", "value_embeds"):
            table = getattr(model, name)
            if table is not None and config.takes_sensitivities:
                self.lookups[f"{name}.table"] = table.lookup
                self.projections[f"{name}.projection"] = table.project, {f"{name}.projection": -1}

    def __enter__(self) -> CalibrationHooks:
        self.handles = [
            module.register_forward_hook(functools.partial(self.on_projection, name, parts))
            for name, (module, parts) in self.projections.items()
        ]
        if self.config.takes_sensitivities:
            self.handles += [
                module.register_forward_hook(functools.partial(self.on_lookup, name))
                for name, module in self.lookups.items()
            ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def add(self, name: str, value: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(value, dtype=torch.float64)
        self.sums[name] += value

    def on_projection(self, name: str, parts: dict[str, int], _module: nn.Module, inputs: tuple, y: Tensor) -> None:
        """Forward hook: adds X^T X, now or when the gradient of the outputs is known."""
        x = inputs[0].detach()
        if not self.config.guided_hessians:
            wide = x.flatten(0, -2).float()
            self.add(name, wide.mT @ wide)
        if self.config.takes_sensitivities:
            y.register_hook(functools.partial(self.on_gradient, parts, x))

    def on_gradient(self, parts: dict[str, int], x: Tensor, gradient: Tensor) -> None:
        """Gradient hook of a projection's outputs."""
        x = x.flatten(0, -2).float()
        outputs = gradient.flatten(0, -2).float()
        square, power = outputs.square(), x.square().mean(1, keepdim=True)
        start = 0
        for part, width in parts.items():
            own = square if width < 0 else square[:, start : start + width]
            self.add(f"{part}.rows", own.sum(0))
            if self.config.guided_hessians:
                self.add(part, (x * own.mean(1, keepdim=True)).mT @ x)
            if self.config.gptq_row_groups and part != "logits":  # of a vocabulary's size it would be too large
                g = outputs[:, start : start + own.size(1)]
                self.add(f"{part}.outputs", (g * power).mT @ g)
            start += width

    def on_lookup(self, name: str, _module: nn.Module, inputs: tuple, y: Tensor) -> Tensor:
        """Forward hook: the vectors become leaves, from which a backward pass through constant weights can start."""
        indices, table = inputs
        leaf = y.detach().requires_grad_()

        def on_gradient(gradient: Tensor) -> None:
            gradient = gradient.flatten(0, -2).float()
            rows = torch.zeros(len(table), dtype=torch.float64, device=gradient.device)
            square = gradient.double().square().sum(1)
            self.add(f"{name}.rows", rows.index_add_(0, indices.flatten().long(), square))
            self.add(f"{name}.columns", gradient.mT @ gradient)

        leaf.register_hook(on_gradient)
        return leaf


def calibration_chunk(trainer: Trainer) -> int:
    """Sequences of one pass. On 1, 2, 4 and 8 ranks it is the same number, so that sums are of the same terms."""
    layout = trainer.layout
    share = layout.sequences // math.gcd(layout.sequences, 8)
    most = max(1, CALIBRATION_TOKENS // trainer.config.train_seq_len)
    return max(n for n in range(1, most + 1) if share % n == 0 and layout.micro_sequences % n == 0)


def calibration_sums(trainer: Trainer, steps: range) -> dict[str, Tensor]:
    """The sums of `CalibrationHooks` over this rank's sequences of some steps."""
    config, loader = trainer.config, trainer.loader
    chunk = calibration_chunk(trainer)
    model = constant_view(trainer.model)
    with CalibrationHooks(model, config) as hooks, torch.set_grad_enabled(config.takes_sensitivities):
        for step in steps:
            for micro in range(trainer.layout.micro_steps):
                places = loader.sequence_numbers(step, micro)
                for first in range(places.start, places.stop, chunk):
                    batch = send(loader.read_sequences(range(first, first + chunk)), trainer.run.device)
                    if not config.takes_sensitivities:
                        model(*batch, looped=config.loops, fused_mlp=False)
                        continue
                    predicted = model.log_probabilities(batch.ids, batch.documents, looped=config.loops)
                    fisher_backward(predicted, loader.noise_keys(range(first, first + len(predicted))))
    return hooks.sums


def fisher_backward(log_probabilities: Tensor, keys: Tensor) -> None:
    """Backward pass from log-probabilities [B, T, V] that gives gradients with the Fisher information as covariance.

    The gradient at a token's logits is sqrt(p) z - p sum(sqrt(p) z), with random signs z by keys [B, 2]: its mean is 0,
    and its covariance diag(p) - p p^T. So half the mean of (g . E x)^2 is what an error E adds to the divergence from
    the float model, to second order. The loss's own gradient has that covariance too if the tokens are the model's,
    but it meets a rare token rarely, where this one meets each at every place.
    """
    p = log_probabilities.detach().exp()
    gradient = p.sqrt().copysign_(random_bits(keys, *p.shape[1:]))
    gradient -= p * gradient.sum(-1, keepdim=True)
    log_probabilities.backward(gradient)


def move_to_cpu(trainer: Trainer) -> None:
    """With DEVICE=mps, takes the model, and all that is computed from here on, to the CPU. Else does nothing.

    Apple's GPUs have no float64, in which Hessians are summed and factorized, and scores added up.
    """
    if trainer.config.device == "mps":
        trainer.run.synchronize()
        trainer.model.to("cpu")
        trainer.run.device = torch.device("cpu")


# Ten minutes after the warmup a shared machine may be slower: calibration took up to 1.5 times as long there. Seconds
# in reserve cost a few steps, and a run that is over its limit counts for nothing.
CALIBRATION_MARGIN = 1.5


def reserve_calibration(trainer: Trainer) -> None:
    """Reserves the seconds that calibration and tuning will take, measured on the slowest rank, unless they are given.

    The training's clock stops at the time limit less this reserve.
    """
    config, run = trainer.config, trainer.run
    if config.gptq_reserve_seconds >= 0 or not config.max_wallclock_seconds:
        return
    batches = config.gptq_calibration_batches
    few = min(2, batches)
    device = run.device
    move_to_cpu(trainer)  # where calibration will run
    trainer.config = dataclasses.replace(config, gptq_calibration_batches=few)
    seconds = batches / few * run.time_second_call(lambda: calibrate(trainer, 0))
    if config.tune_steps:
        weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
        plain = dataclasses.replace(config, quantizer="uniform", lqer_enabled=False)
        tuning = Tuning(quantize(weights, Calibration({}), plain), trainer.model, config)
        batch = tuning_batch(trainer.loader, config, 0)
        seconds += config.tune_steps * run.time_second_call(lambda: tuning.step(batch))
    run.device = device
    trainer.model.to(device)
    seconds = min(CALIBRATION_MARGIN * max(run.gather(seconds)), 0.9 * config.max_wallclock_seconds)
    trainer.config = dataclasses.replace(config, gptq_reserve_seconds=seconds)
    tuned = f" and {config.tune_steps} steps of tuning" if config.tune_steps else ""
    run.log(f"calibration: {batches} batches{tuned}, {seconds:.2f} s of the time limit are reserved")


def calibrate(trainer: Trainer, first_step: int) -> Calibration:
    """Hessians and sensitivities from GPTQ_CALIBRATION_BATCHES training batches, summed over ranks."""
    config, run = trainer.config, trainer.run
    sums = calibration_sums(trainer, range(first_step, first_step + config.gptq_calibration_batches))
    run.all_reduce(*sums.values())
    tokens = config.gptq_calibration_batches * config.train_batch_tokens
    mean = {name: total / tokens for name, total in sums.items()}
    head = "embedding" if trainer.model.head is None else "head"
    parts = {bank: [f"{i}.{p}" for p in ps for i in range(config.num_layers)] for bank, ps in BANK_PARTS.items()}
    parts[head] = ["logits"]
    parts |= {name: [name] for name in mean if name.endswith(".projection")}
    hessians, rows = {}, {}
    outputs: dict[str, Tensor] = {}
    for bank, names in parts.items():
        if f"{names[0]}.outputs" in mean:
            g = torch.stack([mean[f"{name}.outputs"] for name in names])
            outputs[bank] = (g / g.diagonal(dim1=-2, dim2=-1).mean(1)[:, None, None].clamp_min(1e-30)).float()
        if config.takes_sensitivities:
            rows[bank] = torch.stack([mean[f"{name}.rows"] for name in names])
        if config.guided_hessians:
            hessians[bank] = torch.stack([mean[name] for name in names])
            continue
        shared = [name[:-1] + "qkv" if name[-1] in "qkv" else name for name in names]
        hessians[bank] = torch.stack([mean[name] for name in shared])
        if config.takes_sensitivities:
            hessians[bank] *= rows[bank].mean(1)[:, None, None]
    rows = {bank: r / r.mean(1, keepdim=True).clamp_min(1e-30) for bank, r in rows.items()}
    if config.takes_sensitivities:
        add_lookups(hessians, rows, mean, tokens)
    return Calibration({n: h.float() for n, h in hessians.items()}, {n: r.float() for n, r in rows.items()}, outputs)


UNSEEN_LOOKUPS = 1.0  # that each row of a table is credited with, beyond those of the calibration's tokens


def add_lookups(hessians: dict[str, Tensor], rows: dict[str, Tensor], mean: dict[str, Tensor], tokens: int) -> None:
    """Adds what errors of looked-up rows cost: their gradients' covariance, by each row's share. A tied embedding costs
    both.

    `mean` holds, per token, each table's squared gradients by row [n], and the covariance [c, c] of all. A row that
    occurs in none of few tokens will in others: each is credited with UNSEEN_LOOKUPS of the usual gradient (Laplace's
    rule of succession).
    """
    tables = [name.removesuffix(".columns") for name in mean if name.endswith(".columns")]
    for name in tables:
        total = mean[f"{name}.rows"]
        credited = total * tokens + UNSEEN_LOOKUPS * total.sum()
        total = credited / (tokens + UNSEEN_LOOKUPS * len(total))
        hessian = mean[f"{name}.columns"][None] / len(total)
        if name in hessians:
            total = total + rows[name][0] * hessians[name].diagonal(dim1=-2, dim2=-1).sum()
            hessian = hessian + hessians[name]
        hessians[name], rows[name] = hessian, (total / total.mean().clamp_min(1e-30))[None]


def inverse_cholesky(hessian: Tensor, damp: float) -> Tensor:
    """Upper triangular U with U^T U = (H + damping)^-1, float32, for each of a batch [B, c, c].

    One Cholesky factorization of the reversed H and one triangular solve, in float64: the inverse is never formed. To
    save memory, matrices are factored one at a time. The damping grows tenfold until the factorization succeeds.
    Errors: FloatingPointError where H is not finite.
    """
    if len(hessian) > 1:
        return torch.stack([inverse_cholesky(h[None], damp)[0] for h in hessian])
    if not torch.isfinite(hessian).all():
        raise FloatingPointError("a Hessian is not finite: activations during calibration were not")
    h = hessian.double().flip(-1, -2)
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True).clamp_min(1e-30)
    eye = torch.eye(h.size(-1), dtype=h.dtype, device=h.device)
    for _ in range(20):
        factor, info = torch.linalg.cholesky_ex(h + torch.diag_embed(damp * mean.expand_as(diagonal)))
        if not info.any():
            return torch.linalg.solve_triangular(factor.flip(-1, -2), eye, upper=True).float()
        damp = max(10 * damp, 1e-8)
    raise FloatingPointError("a Hessian cannot be factored")


class HessianFactor(NamedTuple):
    """How the error of one column is compensated in the columns after it."""

    order: Tensor  # [B, c] the order in which columns are quantized
    inverse_cholesky: Tensor  # [B, c, c] the inverse Hessian's upper Cholesky factor U, columns in that order
    log2_steps: Tensor | None = None  # [B, r] what is added to log2 of each row's scale
    row_cholesky: Tensor | None = None  # [B, r, r] the inverse Cholesky factor of G; None: rows are independent


def factor_hessian(hessian: Tensor, damp: float, natural_order: bool = False) -> HessianFactor:
    """Factor of Hessians [B, c, c], with columns in their natural order or by falling diagonal."""
    if natural_order:
        order = torch.arange(hessian.size(-1), device=hessian.device).expand(hessian.shape[:2])
    else:
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
    h = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None, :].expand_as(hessian))
    return HessianFactor(order, inverse_cholesky(h, damp))


# --- Scales ---


def round_scales(scales: Tensor, per_octave: int) -> Tensor:
    """Scales as fp16 and, if `per_octave` is not 0, on a logarithmic grid with that many values per octave."""
    scales = scales.clamp(2.0**-24, 65504)
    if per_octave:
        scales = torch.exp2((scales.log2() * per_octave).round() / per_octave).clamp(2.0**-24, 65504)
    return scales.half()


def row_scales(
    weights: Tensor, bits: int, sigmas: float, per_octave: int = 0, multiplier: float | Tensor = 1.0
) -> Tensor:
    """fp16 scale of each row [..., r]: `sigmas` standard deviations (0: the largest magnitude) over 2^(bits-1) - 1.

    Scales on a logarithmic grid (`per_octave`) take a third of the bytes after entropy coding.
    """
    return round_scales(multiplier * clip_range(weights, sigmas) / (2 ** (bits - 1) - 1), per_octave)


def column_exponents(factor: HessianFactor, power: float) -> Tensor:
    """Exponents e, int8 [B, c], of column scales 2^(e / 2) ~ U_jj^power, columns in their natural order.

    An error e of column j adds (e / U_jj)^2 to the weighted error. At high rates, scales proportional to U_jj spread
    the error evenly, and the product of all U_jj, and so the rate, is the same in every order. Powers below 1 do better
    where columns would get less than a bit. This pays where the entropy coder models each column's spread.
    """
    logs = factor.inverse_cholesky.diagonal(dim1=-2, dim2=-1).log2()
    exponents = (2 * power * (logs - logs.mean(-1, keepdim=True))).round().clamp(-INT8_LIMIT, INT8_LIMIT)
    return torch.empty_like(exponents).scatter_(-1, factor.order, exponents).to(torch.int8)


def fit_scales(
    weights: Tensor,
    factor: HessianFactor,
    bits: int,
    sigmas: float,
    config: Config,
    multiplier: float,
    max_level: int,
    salient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(row scales float16 [B, r], column exponents [B, c]) of a bank [B, r, c].

    All scales are multiplied by `multiplier`. With `max_level`, no scale is so small that a row's largest weight would
    be beyond that level: clipping it would cost more than any scale gains. Salient columns [B, c] get 8-bit scales.
    """
    exponents = column_exponents(factor, config.column_steps)
    steps = multiplier if factor.log2_steps is None else multiplier * torch.exp2(factor.log2_steps)
    scales = row_scales(weights / torch.exp2(exponents / 2)[:, None], bits, sigmas, config.scale_grid, steps)
    if salient is not None:
        exponents = (exponents - (16 - 2 * bits) * salient).clamp(min=-INT8_LIMIT)
    if max_level:
        largest = (weights / torch.exp2(exponents / 2)[:, None]).abs().amax(-1)
        smallest = 1.1 * largest / max_level  # a tenth more, because error compensation moves the weights
        scales = torch.maximum(scales, round_scales(smallest, config.scale_grid))
    return scales, exponents


SENSITIVITY_FLOOR = 0.02  # added to each row's sensitivity over its matrix's mean: rare tokens are seldom seen
STEP_LIMIT = 6.0  # octaves by which a matrix's or a row's scales may follow its sensitivity


def with_row_steps(
    weights: dict[str, Tensor], calibration: Calibration, factors: dict[str, HessianFactor], config: Config
) -> dict[str, HessianFactor]:
    """The factors with each row's log2 step, by MATRIX_STEPS, ROW_STEPS and STD_STEPS.

    At high rates the loss is least for given bytes where rows[r] * det(H)^(1/c) * scale^2 is the same everywhere.
    Smaller exponents do better: sensitivities are estimates, and insensitive rows would get less than a bit. Between
    matrices, rows[r] is what is left of it once errors are compensated. All steps together keep their geometric mean
    over the weights. Rows and matrices of zeros take no bits, and no part in means.
    """
    if not (config.matrix_steps or config.row_steps or config.std_steps != 1):
        return factors
    steps, counts = {}, {}
    for name, factor in factors.items():
        batch = as_batch(weights[name]).float()
        exponents = column_exponents(factor, config.column_steps).float()
        bits, sigmas = quantization_bits(name, batch.numel(), config)
        plain = clip_range(batch / torch.exp2(exponents / 2)[:, None], sigmas) / (2 ** (bits - 1) - 1)
        live = (plain > 1e-12).double()  # [B, r]
        share = live / live.sum(1, keepdim=True).clamp_min(1)
        plain = torch.where(live > 0, plain, 1.0).log2()
        center = (share * plain).sum(1, keepdim=True)
        step = (config.std_steps - 1) * (plain - center).clamp(-STEP_LIMIT, STEP_LIMIT)
        if calibration.rows:
            sensitivity = (calibration.rows[name] + SENSITIVITY_FLOOR).log2()
            step -= config.row_steps / 2 * (sensitivity - (share * sensitivity).sum(1, keepdim=True))
            log_det = factor.inverse_cholesky.diagonal(dim1=-2, dim2=-1).log2().mean(1, keepdim=True)
            left = sensitivity if factor.row_cholesky is None else left_of_rows(factor.row_cholesky, config).log2()
            step += config.matrix_steps * (log_det - (share * left).sum(1, keepdim=True) / 2 - center)
        steps[name] = step
        counts[name] = live * batch.size(-1)
    every, weight = (torch.cat([x.flatten() for x in parts.values()]) for parts in (steps, counts))
    usual = every[weight > 0].median() if weight.any() else every.new_zeros(())
    steps = {name: (step - usual).clamp(-STEP_LIMIT, STEP_LIMIT) for name, step in steps.items()}
    excess = sum((steps[name] * counts[name]).sum() for name in steps) / weight.sum().clamp_min(1)
    return {name: factor._replace(log2_steps=(steps[name] - excess).float()) for name, factor in factors.items()}


def column_extras(exponents: Tensor) -> dict[str, Tensor]:
    """The column exponents as an optional array of a stored bank; none where all column scales are 1."""
    return {"columns": exponents.to(torch.int8)} if exponents.any() else {}


def apply_scales(levels: Tensor, q: Quantized) -> Tensor:
    """Integer levels [..., r, c] times a stored tensor's row and column scales, float32."""
    if q.scales is None:
        raise ValueError("integer codes without scales")
    values = levels.float() * q.scales.float()[..., None]
    if "columns" in q.extras:
        batch = as_batch(values)
        batch *= torch.exp2(q.extras["columns"].float() / 2)[:, None]
    return values


def quantized_integers(
    codes: Tensor, scales: Tensor, bits: int, extras: dict[str, Tensor], states: int = 0
) -> Quantized:
    """A stored tensor of integers: int8 codes, or int16 where one needs more than 8 bits."""
    largest = int(codes.abs().max()) if codes.numel() else 0
    wide = largest > INT8_LIMIT
    codes = codes.to(torch.int16 if wide else torch.int8)
    return Quantized(codes, scales, largest.bit_length() + 1 if wide else bits, extras, states)


def check_codes(q: Quantized) -> None:
    """Errors: ValueError for codes, bits or scales that no quantizer produces."""
    if not 2 <= q.bits <= 12:
        raise ValueError(f"it claims codes of {q.bits} bits")
    kind, limit = (torch.int8, INT8_LIMIT) if q.bits <= 8 else (torch.int16, WIDE_LIMIT)
    if q.scales is None or q.codes.dtype != kind or q.codes.dim() not in (2, 3):
        raise ValueError(f"its codes of {q.bits} bits are not matrices of {kind} with scales")
    if q.scales.dtype != torch.float16 or q.scales.shape != q.codes.shape[:-1]:
        raise ValueError("its scales are not one fp16 number for each row")
    if ((q.codes < -limit) | (q.codes > limit)).any():
        raise ValueError(f"its codes are not within -{limit}..{limit}")


# --- Compensation between rows ---


def row_groups(rows: int, groups: int, device: torch.device) -> list[Tensor]:
    """The rows of each group, every groups-th one: neighbours, of one head, are the most correlated, and a group's rows
    do not compensate each other.
    """
    return [torch.arange(first, rows, groups, device=device) for first in range(min(groups, rows))]


def encode_by_row_groups(
    weights: Tensor,
    u: Tensor | None,
    groups: int,
    encode_rows: Callable[[Tensor, Tensor], Quantized],
    decode: Callable[[Quantized], Tensor],
) -> Tensor:
    """Codes of a bank [B, r, c], one group of rows after the other, each with the errors before it compensated.

    Of the cost tr(G E H E^T), the errors E_1 of some rows leave least if the other rows are off by -G_22^-1 G_21 E_1:
    H plays no part (YAQA, arXiv 2505.22988, which goes row by row). Groups come close to that, and their rows are
    searched at once. u [B, r, r] is the Cholesky factor of G^-1, rows in the order of `row_groups`; None: rows are
    independent. `encode_rows` quantizes the rows of some indices.
    """
    rows = weights.size(1)
    if u is None:
        return encode_rows(weights, torch.arange(rows, device=weights.device)).codes
    indices = row_groups(rows, groups, weights.device)
    target = weights.float()[:, torch.cat(indices)]
    codes = torch.empty(weights.shape, dtype=torch.int16, device=weights.device)
    start = 0
    for index in indices:
        here, after = slice(start, start + len(index)), slice(start + len(index), None)
        q = encode_rows(target[:, here], index)
        codes[:, index] = q.codes.short()
        error = torch.linalg.solve_triangular(u[:, here, here].mT, target[:, here] - decode(q), upper=False)
        target[:, after] -= u[:, here, after].mT @ error
        start += len(index)
    return codes


def left_of_rows(u: Tensor, config: Config) -> Tensor:
    """What is left of each row's sensitivity [B, r] once the groups after it compensate its error: the diagonal of the
    Schur complement (U_gg^T U_gg)^-1 of its group g. u [B, r, r] is as in `encode_by_row_groups`.
    """
    left = torch.empty(u.shape[:2], device=u.device)
    start = 0
    for index in row_groups(u.size(1), config.gptq_row_groups, u.device):
        here = slice(start, start + len(index))
        eye = torch.eye(len(index), device=u.device)
        left[:, index] = torch.linalg.solve_triangular(u[:, here, here], eye, upper=True).square().sum(-1)
        start += len(index)
    return left


# --- Uniform: rounding to nearest, or GPTQ where there is a Hessian ---


def gptq(
    weights: Tensor,
    factor: HessianFactor,
    scales: Tensor,
    limit: int | Tensor,
    column_scales: Tensor | None = None,
    block: int = 128,
) -> Tensor:
    """GPTQ (arXiv 2210.17323): rounds one column after the other and compensates its error in those that follow.

    weights [B, r, c], scales [B, r], column scales [B, c] (None: all 1), limit a number or [B, c]
    -> int16 codes [B, r, c] in -limit..limit.
    """
    order = factor.order  # [B, c]
    ordered = torch.ones_like(order, dtype=torch.float) if column_scales is None else column_scales.gather(-1, order)
    limits = torch.as_tensor(limit, device=order.device).float().expand(order.shape).gather(-1, order)
    row_order = order[:, None, :].expand_as(weights)
    w = weights.float().gather(-1, row_order) / ordered[:, None]
    s = scales.float()
    u = factor.inverse_cholesky / ordered[:, None]
    codes = torch.empty_like(w)
    for start in range(0, w.size(-1), block):
        stop = min(start + block, w.size(-1))
        errors = torch.empty_like(w[..., start:stop])
        for j in range(start, stop):
            codes[..., j] = (w[..., j] / s).round().clamp(-limits[:, j, None], limits[:, j, None])
            error = (w[..., j] - codes[..., j] * s) / u[:, j, j, None]
            w[..., j:stop] -= error[..., None] * u[:, j, None, j:stop]
            errors[..., j - start] = error
        w[..., stop:] -= errors @ u[:, start:stop, stop:]
    return torch.empty_like(codes).scatter_(-1, row_order, codes).to(torch.int16)


def round_to_nearest(weights: Tensor, bits: int, sigmas: float) -> Quantized:
    """Weights [B, r, c] rounded to the nearest level of each row's uniform grid."""
    scales = row_scales(weights, bits, sigmas)
    limit = 2 ** (bits - 1) - 1
    codes = (weights / scales.float()[..., None]).round().clamp(-limit, limit)
    return Quantized(codes.to(torch.int8), scales, bits, {})


def encode_uniform(
    weights: Tensor,
    factor: HessianFactor | None,
    bits: int,
    sigmas: float,
    config: Config,
    log2_scale_offset: float = 0.0,
    salient: Tensor | None = None,
) -> Quantized:
    """GPTQ on a uniform grid, or rounding to nearest without a Hessian.

    Where scales follow from TARGET_BYTES or from sensitivities, codes may have up to 12 bits: clipping to fewer would
    cost more than any scale gains. Salient columns have 8.
    """
    if factor is None:
        return round_to_nearest(weights, bits, sigmas)
    max_level = WIDE_LIMIT if config.target_bytes or factor.log2_steps is not None else 0
    scales, exponents = fit_scales(weights, factor, bits, sigmas, config, 2.0**log2_scale_offset, max_level, salient)
    limits = torch.full(exponents.shape, max_level or 2 ** (bits - 1) - 1, device=weights.device)
    if salient is not None:
        limits = torch.where(salient, limits.clamp(min=INT8_LIMIT), limits)
    extras = column_extras(exponents)

    def encode_rows(part: Tensor, rows: Tensor) -> Quantized:
        codes = gptq(part, factor, scales[:, rows], limits, torch.exp2(exponents / 2))
        return Quantized(codes, scales[:, rows], bits, extras)

    codes = encode_by_row_groups(weights, factor.row_cholesky, config.gptq_row_groups, encode_rows, decode_uniform)
    return quantized_integers(codes, scales, bits, extras)


def decode_uniform(q: Quantized) -> Tensor:
    """Weights of codes that are the levels themselves, float32."""
    return apply_scales(q.codes, q)


def check_uniform(q: Quantized) -> None:
    """Errors: ValueError for a stored form that is not a uniform quantizer's."""
    check_codes(q)
    if q.states:
        raise ValueError("its codes walk through a trellis")


# --- Trellis: dependent quantization, searched with the Viterbi algorithm ---

# Next state by (state, parity of the code k). 4: VVC; 8: ISO/IEC 15938-17. States 0-1 of 4, and the even ones of the
# others, use the first quantizer, 2k; the others use the second, 2k - sgn k. Machines with more states are Ungerboeck's
# codes (octal h0, h1).
TRELLISES = {4: ((0, 2), (2, 0), (1, 3), (3, 1)), 8: ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))}
UNGERBOECK = {16: (0o23, 0o04), 32: (0o45, 0o10)}
TRELLIS_LIMIT = WIDE_LIMIT  # |k|
TRELLIS_DISTORTION = 0.27  # squared error, in scales^2, that prices a bit: 0.23 to 0.25 as measured, more does best
TRELLIS_SCALE = 0.52  # times a uniform quantizer's scale, for about the same number of bits
TRELLIS_ROWS = {"cpu": 1 << 12, "cuda": 1 << 16}  # rows searched at once, to bound the memory
UNREACHABLE = 1e30  # cost of a state that no path reaches
# Bits of the codes 0 and 1, by [quantizer, parity], beyond those of a Gaussian density: measured. Their cells are
# narrower.
EXTRA_BITS = ((0.5, 0.0), (1.0, 0.4))


class Trellis(NamedTuple):
    """A state machine of S states, and the two transitions (state, parity) into each state."""

    following: Tensor  # [S, 2] next state by parity
    second: Tensor  # [S] 1 where a state uses the second quantizer
    source: Tensor  # [2S] state before; first one transition into each state, then the other
    parity: Tensor  # [2S]
    extra_bits: Tensor  # [2S] bits of a transition's smallest code, beyond those of a Gaussian density


def make_trellis(states: int, device: torch.device | str = "cpu") -> Trellis:
    """The machine with 4, 8, 16 or 32 states."""
    if states in TRELLISES:
        rows = TRELLISES[states]
    else:
        h0, h1 = UNGERBOECK[states]
        rows = [[s >> 1 ^ (s & 1) * (h0 >> 1) ^ p * (h1 >> 1) for p in (0, 1)] for s in range(states)]
    following = torch.tensor(rows, device=device)
    transitions = following.flatten().argsort(stable=True).view(states, 2).T.reshape(-1)  # 2 * state + parity
    state = torch.arange(states, device=device)
    second = state // 2 if states == 4 else state % 2
    source = transitions // 2
    parity = transitions % 2
    extra_bits = torch.tensor(EXTRA_BITS, device=device)[second[source], parity]
    return Trellis(following, second, source, parity, extra_bits)


def trellis_levels(codes: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """Codes [..., c] in natural order -> (levels int16, state before each code uint8)."""
    trellis = make_trellis(states, codes.device)
    parity = (codes.reshape(-1, codes.size(-1)).T & 1).long()  # [c, rows]
    state = torch.zeros_like(parity[0])
    before = torch.empty_like(parity, dtype=torch.uint8)
    for j, p in enumerate(parity):
        before[j] = state
        state = trellis.following.view(-1)[2 * state + p]
    before = before.T.reshape(codes.shape)
    return 2 * codes.short() - trellis.second.short()[before.int()] * codes.sign(), before


class Survivors(NamedTuple):
    """The best path into each state after one column: all [B, S, r]."""

    cost: Tensor
    source: Tensor  # state before
    codes: Tensor
    errors: Tensor  # in scales


def viterbi_column(
    x: Tensor, cost: Tensor, error_cost: Tensor, level_cost: Tensor, bit_cost: float, trellis: Trellis
) -> Survivors:
    """One column of the Viterbi search: every state keeps the cheaper of the two transitions into it.

    x [B, S, r] is each survivor's weight in scales, cost [B, S, r] its path's cost. An error e costs
    error_cost [B, 1, 1] * e^2. A level l costs level_cost [B, 1, r] * l^2, which is the bits of a Gaussian code times
    `bit_cost`. So the cheapest level of each parity is the one next to the weight, shrunk.
    """
    second = trellis.second[trellis.source].to(x.dtype)[:, None]  # [2S, 1]
    parity = trellis.parity.to(x.dtype)[:, None]
    x = x.index_select(1, trellis.source)  # [B, 2S, r]
    size = x.abs()
    target = size * (error_cost / (error_cost + level_cost))
    half = ((target - (2 * parity - second)) * 0.25).round_().clamp_(0, TRELLIS_LIMIT // 2)
    half *= target >= 1.5 * second * (1 - parity)  # the second quantizer's even levels are 0, 3, 7: not -1, 3, 7
    k = half.mul_(2).add_(parity)
    level = (2 * k - second).clamp_(min=0).copysign_(x)
    error = x - level
    total = error.square().mul_(error_cost).add_(level.square_().mul_(level_cost))
    total = total.add_(cost.index_select(1, trellis.source))
    total += (k <= 1) * (bit_cost * trellis.extra_bits)[:, None]
    states = cost.size(1)
    other = total[:, states:] < total[:, :states]

    def cheaper(value: Tensor) -> Tensor:
        return torch.where(other, value[:, states:], value[:, :states])

    source = torch.where(other, trellis.source[states:, None], trellis.source[:states, None])
    return Survivors(cheaper(total), source, cheaper(k.copysign_(x)), cheaper(error))


class BlockPaths(NamedTuple):
    """The survivors' paths through a block of n columns."""

    errors: Tensor  # [B S r, n] errors over U_jj
    codes: Tensor  # int16 [B S r, n]
    cost: Tensor  # [B, S, r]
    origin: Tensor  # [B S r] flat index of the survivor before the block that each path continues


def viterbi_block(
    work: Tensor,
    cost: Tensor,
    u: Tensor,
    error_cost: Tensor,
    level_cost: Tensor,
    bit_cost: float,
    trellis: Trellis,
) -> BlockPaths:
    """Viterbi search through the n columns of a block, each survivor with its own error compensation (per-survivor
    processing, Raheli, Polydoros and Tzou 1995).

    work [B, S, r, n] holds the survivors' weights in scales, and is overwritten. u [B, n, n] is the block of U,
    error_cost [B, n, 1, 1] and level_cost [B, n, 1, r] are as in `viterbi_column`.
    """
    batch, states, rows, width = work.shape
    work = work.view(-1, width)
    codes = torch.zeros(work.shape, dtype=torch.int16, device=work.device)
    origin = torch.arange(len(work), device=work.device)
    first = torch.arange(batch, device=work.device)[:, None, None] * states * rows + torch.arange(
        rows, device=work.device
    )  # [B, 1, r]
    for j in range(width):
        x = work[:, j].view(batch, states * rows, 1)
        if j:
            x = x - work.view(batch, states * rows, width)[..., :j] @ u[:, :j, j, None]
        best = viterbi_column(x.view(cost.shape), cost, error_cost[:, j], level_cost[:, j], bit_cost, trellis)
        cost = best.cost
        parent = (first + best.source * rows).view(-1)
        # A row of `work` is the path's errors before column j and the weights after it: one copy moves both.
        work = work.index_select(0, parent)
        codes = codes.index_select(0, parent)
        origin = origin[parent]
        work[:, j] = (best.errors / u[:, j, j, None, None]).view(-1)
        codes[:, j] = best.codes.view(-1)
    return BlockPaths(work, codes, cost, origin)


def viterbi_search(
    w: Tensor,
    u: Tensor,
    level_cost: Tensor,
    bit_cost: float,
    trellis: Trellis,
    block: int = 16,
    delay: int = 64,
) -> Tensor:
    """Codes int16 [B, r, c] of weights w [B, r, c] in scales, with U [B, c, c] and level_cost [B, c, 1, r].

    A column is decided once `delay` further ones are searched: the best survivor's code is taken, and survivors with
    another past are dropped. All survivors then share what is decided, so its error compensation is one matrix product
    for each block.
    """
    batch, rows, columns = w.shape
    states = len(trellis.second)
    error_cost = u.diagonal(dim1=-2, dim2=-1) ** -2
    error_cost = (error_cost / error_cost.mean(-1, keepdim=True))[..., None, None]  # [B, c, 1, 1]
    cost = torch.full((batch, states, rows), UNREACHABLE, device=w.device)
    cost[:, 0] = 0
    errors = torch.zeros_like(w)
    codes = torch.empty(w.shape, dtype=torch.int16, device=w.device)
    past_errors = w.new_zeros(cost.numel(), 0)
    past_codes = codes.new_zeros(cost.numel(), 0)
    first = torch.arange(batch, device=w.device)[:, None] * states * rows + torch.arange(rows, device=w.device)
    done = 0  # columns decided
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        here = slice(start, stop)
        common = w[..., here] - errors[..., :done] @ u[:, :done, here]
        own = past_errors.view(batch, states * rows, start - done) @ u[:, done:start, here]
        work = common[:, None] - own.view(batch, states, rows, stop - start)
        paths = viterbi_block(work, cost, u[:, here, here], error_cost[:, here], level_cost[:, here], bit_cost, trellis)
        cost = paths.cost
        past_errors = torch.cat((past_errors[paths.origin], paths.errors), 1)
        past_codes = torch.cat((past_codes[paths.origin], paths.codes), 1)
        best = first + cost.argmin(1) * rows  # [B, r]
        count = (columns if stop == columns else max(done, stop - delay)) - done
        if count:
            decided = slice(done, done + count)
            errors[..., decided] = past_errors[best, :count]
            codes[..., decided] = past_codes[best, :count]
            same_past = past_codes[:, :count].view(batch, states, rows, count) == codes[:, None, :, decided]
            cost = torch.where(same_past.all(-1), cost, UNREACHABLE)
            past_errors = past_errors[:, count:]
            past_codes = past_codes[:, count:]
            done += count
        cost = cost - cost.amin(1, keepdim=True)
    return codes


def level_costs(weights: Tensor, scales: Tensor, column_scales: Tensor, config: Config) -> Tensor:
    """What the bits of a level l cost over l^2, in squared scales, [B, c, 1, r]: its code is Gaussian, and its variance
    that of its row times that of its column.
    """
    square = (weights.float() / (scales.float()[..., None] * column_scales[:, None])).square()
    row, column = (square.mean(d, keepdim=True) for d in (2, 1))
    product = row * column / square.mean((1, 2), keepdim=True).clamp_min(1e-30)
    return (config.trellis_rate * TRELLIS_DISTORTION / (product + 1)).mT[:, :, None]


def trellis_gptq(
    weights: Tensor,
    u: Tensor,
    scales: Tensor,
    column_scales: Tensor,
    config: Config,
    level_cost: Tensor | None = None,
) -> Tensor:
    """GPTQ with dependent quantization (VVC; ISO/IEC 15938-17) instead of rounding, columns in natural order.

    weights [B, r, c], U [B, c, c], scales [B, r] and column scales [B, c]: a weight is a level times both scales.
    Returns codes k, int16 [B, r, c]; `trellis_levels` turns them into levels. `level_cost` is that of `level_costs`, by
    all rows of a bank where these are some. TRELLIS_RATE weighs the bits: 1 is the slope of the rate-distortion
    function, 0 ignores them. Natural order takes no bytes, and did better than a falling diagonal: the search uses
    columns that matter little to correct those that matter much.
    """
    trellis = make_trellis(config.trellis_states, weights.device)
    if level_cost is None:
        level_cost = level_costs(weights, scales, column_scales, config)
    codes = torch.empty(weights.shape, dtype=torch.int16, device=weights.device)
    bit_cost = math.log(4) * config.trellis_rate * TRELLIS_DISTORTION  # -dD/dR, 6.02 dB per bit
    rows = weights.size(1)
    chunk = TRELLIS_ROWS[weights.device.type]
    matrices_per_chunk = max(1, chunk // rows)
    for b in range(0, len(weights), matrices_per_chunk):
        matrices = slice(b, b + matrices_per_chunk)
        scaled = u[matrices] / column_scales[matrices, None]
        w = weights[matrices].float() / (scales[matrices].float()[..., None] * column_scales[matrices, None])
        for r in range(0, rows, chunk):
            part = slice(r, r + chunk)
            codes[matrices, part] = viterbi_search(
                w[:, part], scaled, level_cost[matrices, ..., part].contiguous(), bit_cost, trellis
            )
    return codes


def encode_trellis(
    weights: Tensor,
    factor: HessianFactor | None,
    bits: int,
    sigmas: float,
    config: Config,
    log2_scale_offset: float = 0.0,
    salient: Tensor | None = None,
) -> Quantized:
    """GPTQ with a trellis of TRELLIS_STATES states; without a Hessian, rounding to nearest on a uniform grid."""
    if factor is None:
        return round_to_nearest(weights, bits, sigmas)
    multiplier = 2.0**log2_scale_offset * TRELLIS_SCALE
    max_level = 2 * TRELLIS_LIMIT - 2
    scales, exponents = fit_scales(weights, factor, bits, sigmas, config, multiplier, max_level, salient)
    columns, extras = torch.exp2(exponents / 2), column_extras(exponents)
    level_cost = level_costs(weights, scales, columns, config)

    def encode_rows(part: Tensor, rows: Tensor) -> Quantized:
        u = factor.inverse_cholesky
        codes = trellis_gptq(part, u, scales[:, rows], columns, config, level_cost[..., rows])
        return Quantized(codes, scales[:, rows], bits, extras, config.trellis_states)

    codes = encode_by_row_groups(weights, factor.row_cholesky, config.gptq_row_groups, encode_rows, decode_trellis)
    return quantized_integers(codes, scales, bits, extras, config.trellis_states)


def decode_trellis(q: Quantized) -> Tensor:
    """Weights of codes that walk through a trellis, float32."""
    return apply_scales(trellis_levels(q.codes, q.states)[0], q)


def check_trellis(q: Quantized) -> None:
    """Errors: ValueError for a stored form that is not a trellis quantizer's."""
    check_codes(q)
    if q.states not in (*TRELLISES, *UNGERBOECK):
        raise ValueError(f"there is no trellis with {q.states} states")


# --- GPTQ-lite: rounding to nearest, with a clip chosen for each row ---

CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # of a row's magnitudes: candidates for the end of its grid


def gptq_lite(weights: Tensor, bits: int, per_octave: int) -> tuple[Tensor, Tensor]:
    """GPTQ-lite (the stack of PR #549 of openai/parameter-golf): rounds to nearest, with each row's best clip in MSE.

    weights [..., r, c] float32 -> codes int8 [..., r, c], scales float16 [..., r]. It uses no Hessian.
    """
    limit = 2 ** (bits - 1) - 1
    ranked = weights.abs().sort(dim=-1)[0]
    last = weights.size(-1) - 1
    best = None
    for quantile in CLIP_QUANTILES:
        below = int(quantile * last)
        largest = torch.lerp(ranked[..., below], ranked[..., min(below + 1, last)], quantile * last % 1)
        scales = round_scales(largest / limit, per_octave)
        codes = (weights / scales.float()[..., None]).round().clamp(-limit, limit)
        error = (codes * scales.float()[..., None] - weights).square().sum(-1)
        if best is None:
            best = codes, scales, error
        better = error < best[2]
        best = (
            torch.where(better[..., None], codes, best[0]),
            torch.where(better, scales, best[1]),
            torch.where(better, error, best[2]),
        )
    if best is None:
        raise ValueError("no clip quantile to choose from")
    return best[0].to(torch.int8), best[1]


def encode_gptq_lite(
    weights: Tensor,
    factor: HessianFactor | None,
    bits: int,
    sigmas: float,
    config: Config,
    log2_scale_offset: float = 0.0,
    salient: Tensor | None = None,
) -> Quantized:
    """GPTQ-lite's codes are levels of a uniform grid. Factor, clip sigmas, offset and salient columns play no part."""
    return Quantized(*gptq_lite(weights, bits, config.scale_grid), bits, {})


# --- The table of quantizers ---


@dataclass(frozen=True)
class Quantizer:
    """One value of QUANTIZER: how it encodes a bank, decodes it, and checks a stored form that somebody else wrote.

    encode(weights float32 [B, r, c], HessianFactor or None, bits, clip sigmas, config, log2_scale_offset, salient
    columns bool [B, c] or None) -> Quantized. decode(Quantized) -> float32, inverse up to the error of quantization.
    check(Quantized) raises ValueError for a form that `encode` cannot produce.
    """

    traits: QuantizerTraits
    natural_order: bool  # quantizes columns in their natural order rather than by falling diagonal of the Hessian
    encode: Callable[..., Quantized]
    decode: Callable[[Quantized], Tensor]
    check: Callable[[Quantized], None]


QUANTIZERS = {
    "uniform": Quantizer(QUANTIZER_TRAITS["uniform"], False, encode_uniform, decode_uniform, check_uniform),
    "trellis": Quantizer(QUANTIZER_TRAITS["trellis"], True, encode_trellis, decode_trellis, check_trellis),
    "gptq_lite": Quantizer(QUANTIZER_TRAITS["gptq_lite"], False, encode_gptq_lite, decode_uniform, check_uniform),
}


def quantizer_of(q: Quantized) -> Quantizer:
    """The quantizer that decodes a stored tensor of integers: its codes walk through a trellis, or are levels."""
    return QUANTIZERS["trellis" if q.states else "uniform"]


# Ridge of H and of G, in mean diagonals, for each width / tokens: of few tokens, small eigenvalues are estimated too
# small, and errors would be moved there. Gradients have heavy tails, so G takes more. (Shrinkage: Ledoit, Wolf 2004.)
INPUT_RIDGE, OUTPUT_RIDGE = 1.0, 4.0


def damping(covariance: Tensor, ridge: float, config: Config) -> float:
    """The share of its mean diagonal that is added to a covariance [..., c, c] of calibration tokens."""
    if not config.takes_sensitivities:
        return config.gptq_damp
    tokens = config.gptq_calibration_batches * config.train_batch_tokens
    return config.gptq_damp + ridge * covariance.size(-1) / tokens


def plan_quantization(weights: dict[str, Tensor], calibration: Calibration, config: Config) -> dict[str, HessianFactor]:
    """Every bank's factor, in the quantizer's column order, with its row steps; none where no Hessians are used."""
    quantizer = QUANTIZERS[config.quantizer]
    if not quantizer.traits.uses_hessians:
        return {}
    factors = {
        name: factor_hessian(hessian, damping(hessian, INPUT_RIDGE, config), quantizer.natural_order)
        for name, hessian in calibration.hessians.items()
        if quantization_bits(name, weights[name].numel(), config)[0] < 16
    }
    for name in factors.keys() & calibration.outputs.keys() if config.gptq_row_groups else ():
        g = calibration.outputs[name]
        order = torch.cat(row_groups(g.size(1), config.gptq_row_groups, g.device))
        row_cholesky = inverse_cholesky(g[:, order][:, :, order], damping(g, OUTPUT_RIDGE, config))
        factors[name] = factors[name]._replace(row_cholesky=row_cholesky)
    return with_row_steps(weights, calibration, factors, config)


# --- AWQ-lite: salient columns in 8 bits ---

AWQ_COLUMNS = 64  # columns of a group, which are treated alike


def salient_columns(weights: dict[str, Tensor], hessians: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """AWQ-lite (after arXiv 2306.00978): the AWQ_GROUPS groups of columns with the largest activation x weight.

    A group's salience is the sum of rms activation x mean |w| over its AWQ_COLUMNS input columns. Returns a mask
    [B, c] of each bank that has salient columns.
    """
    salience = {}
    for name, hessian in hessians.items():
        activation = hessian.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        columns = activation * as_batch(weights[name]).float().abs().mean(1)  # [B, c]
        columns = F.pad(columns, (0, -columns.size(-1) % AWQ_COLUMNS))
        salience[name] = columns.unflatten(-1, (-1, AWQ_COLUMNS)).sum(-1)  # [B, groups]
    ranked = torch.cat([s.flatten() for s in salience.values()]).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
    chosen[ranked[: config.awq_groups]] = True
    masks = {}
    for (name, s), part in zip(salience.items(), chosen.split([s.numel() for s in salience.values()]), strict=True):
        if part.any():
            mask = part.view(s.shape).repeat_interleave(AWQ_COLUMNS, dim=1)
            masks[name] = mask[:, : weights[name].size(-1)]
    return masks


# --- LQER: low-rank corrections of the quantization error ---


class Correction(NamedTuple):
    """A low-rank addend of one matrix [r, c] in few bits, left [r, k] @ right [k, c], and the error that remains."""

    left: Tensor  # int8 [r, k]
    left_scales: Tensor  # float16 [r], or [1]
    right: Tensor  # int8 [k, c]
    right_scales: Tensor  # float16 [k, groups]
    error: float
    bytes: float


class PlacedCorrection(NamedTuple):
    """A correction of one of a bank's matrices, and the weighted error that it saves beyond what its bytes cost."""

    gain: float
    name: str
    matrix: int
    correction: Correction


def factor_values(codes: Tensor, scales: Tensor) -> Tensor:
    """Values of a factor: codes [n, m] times scales [1], [n] or, in equal groups along a row, [n, g]."""
    if scales.dim() == 1:
        return codes.float() * scales.float()[:, None]
    width = -(-codes.size(1) // scales.size(1))
    return codes.float() * scales.float().repeat_interleave(width, dim=1)[:, : codes.size(1)]


def round_groups(x: Tensor, low: int, high: int, fit: str) -> tuple[Tensor, Tensor]:
    """Codes in low..high of each group [..., g], and its fp16 scale [...] with the least squared error.

    For an uneven range such as -2..1, both signs of the scale are tried, so that the longer side serves the longer
    tail. With LQER_FIT=svd the scale follows from the largest magnitude, as in PR #1797.
    """
    signs = (1.0,) if low == -high else (1.0, -1.0)
    largest = x.abs().amax(-1).clamp_min(1e-7)
    reach = largest / max(-low, high)
    scales = torch.stack([(reach * sign * t / 16).half() for sign in signs for t in range(8, 25)])  # [candidates, ...]
    if fit == "svd":
        scales = (largest / ((high - low) / 2)).half()[None]
    codes = (x / scales.to(x.dtype)[..., None]).nan_to_num(0, 0, 0).round().clamp(low, high)
    errors = (codes * scales.to(x.dtype)[..., None] - x).square().sum(-1)
    best = errors.argmin(0, keepdim=True)
    codes = codes.gather(0, best[..., None].expand(1, *x.shape))[0]
    return codes.to(torch.int8), scales.gather(0, best)[0]


def round_left(left: Tensor, asymmetric: bool, config: Config) -> tuple[Tensor, Tensor]:
    """Codes and scales of a left factor [r, k]: 2 bits and one scale, or LQER_FACTOR_BITS and a scale for each row."""
    if asymmetric:
        codes, scale = round_groups(left.reshape(1, -1), -2, 1, config.lqer_fit)
        return codes.view(left.shape), scale
    high = 2 ** (config.lqer_factor_bits - 1) - 1
    return round_groups(left, -high, high, config.lqer_fit)


def round_right(right: Tensor, asymmetric: bool, config: Config) -> tuple[Tensor, Tensor]:
    """Codes and scales of a right factor [k, c]: 4 bits and a scale for each group, or LQER_FACTOR_BITS per row."""
    if not asymmetric:
        high = 2 ** (config.lqer_factor_bits - 1) - 1
        codes, scales = round_groups(right, -high, high, config.lqer_fit)
        return codes, scales[:, None]
    groups = -(-right.size(1) // config.lqer_asym_group)
    width = -(-right.size(1) // groups)
    padded = F.pad(right, (0, groups * width - right.size(1))).unflatten(1, (groups, width))
    codes, scales = round_groups(padded, -8, 7, config.lqer_fit)
    return codes.flatten(1)[:, : right.size(1)], scales


def fit_correction(
    error: Tensor, hessian: Tensor, asymmetric: bool, config: Config, outputs: Tensor | None = None
) -> Correction:
    """LQER (arXiv 2402.02446) of one matrix's error E [r, c], fitted to tr(G (E - LR) H (E - LR)^T), not to its norm.

    Starts from the best factors of that rank. Then it alternates: round one factor, solve the other for it. The best
    of these pairs is returned. With LQER_FIT=svd, it is the rounded SVD of the error, as in PR #1797. `outputs` is
    G [r, r], None the identity. The best left factor for a right one does not depend on it.
    """
    e = error.double()
    h = regular(hessian)
    lower = torch.linalg.cholesky(h)
    g = None if outputs is None else regular(outputs)
    upper = None if g is None else torch.linalg.cholesky(g).mT

    def felt(x: Tensor) -> Tensor:
        return x if upper is None else upper @ x

    whitened = felt(e) @ lower
    rank = min(config.lqer_rank, *e.shape)
    if config.lqer_fit == "svd":
        u, s, v = torch.linalg.svd(e, full_matrices=False)
        rounded_left = round_left(u[:, :rank] * s[:rank], asymmetric, config)
        rounded_right = round_right(v[:rank], asymmetric, config)
        product = factor_values(*rounded_left).double() @ factor_values(*rounded_right).double()
        remaining = weighted_error(e - product, h, g).item()
        return sized(Correction(*rounded_left, *rounded_right, remaining, 0.0), asymmetric, config)
    basis = torch.linalg.eigh(whitened.mT @ whitened)[1][:, -rank:]
    left = whitened @ basis
    right = torch.linalg.solve_triangular(lower, basis.mT, upper=False, left=False)
    right = right * left.square().mean(0).sqrt().clamp_min(1e-12)[:, None]  # the left factor has columns of one size
    weighted, best = e @ h, None
    for _ in range(4):
        rounded_right = round_right(right, asymmetric, config)
        r = factor_values(*rounded_right).double()
        left = weighted @ r.mT @ torch.linalg.pinv(r @ h @ r.mT, hermitian=True)
        rounded_left = round_left(left, asymmetric, config)
        left_values = factor_values(*rounded_left).double()
        remaining = weighted_error(e - left_values @ r, h, g).item()
        if best is None or remaining < best.error:
            best = Correction(*rounded_left, *rounded_right, remaining, 0.0)
        right = torch.linalg.pinv(felt(left_values)) @ felt(e)
    if best is None:
        raise FloatingPointError("a correction's error is not finite")
    return sized(best, asymmetric, config)


def regular(matrix: Tensor) -> Tensor:
    """A covariance in float64, with what it needs on its diagonal to have a Cholesky factor."""
    matrix = matrix.double()
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return matrix + eye * (1e-6 * matrix.diagonal().mean() + 1e-30)


def sized(correction: Correction, asymmetric: bool, config: Config) -> Correction:
    """A correction with its bytes, before compression."""
    left_bits, right_bits = (2, 4) if asymmetric else (config.lqer_factor_bits,) * 2
    scales = correction.left_scales.numel() + correction.right_scales.numel()
    size = (left_bits * correction.left.numel() + right_bits * correction.right.numel()) / 8 + 2 * scales
    return correction._replace(bytes=size)


def fit_corrections(
    errors: dict[str, Tensor],
    hessians: dict[str, Tensor],
    outputs: dict[str, Tensor],
    error_per_byte: float,
    asymmetric: bool,
    config: Config,
) -> list[PlacedCorrection]:
    """The corrections to store, best first.

    LQER_SELECT=norm takes the matrices with the largest error, as PRs of the challenge do; gain takes those that save
    most, if any.
    """
    by_norm = config.lqer_select == "norm"
    ranked = []
    for name, e in errors.items():
        size = e.square().sum((-1, -2)) if by_norm else weighted_error(e, hessians[name], outputs.get(name))
        ranked += [(value, name, i) for i, value in enumerate(size.tolist())]
    ranked.sort(reverse=True)
    placed = []
    for _, name, i in ranked[: config.lqer_top_k * (1 if by_norm else 4)]:
        e, h = errors[name][i], hessians[name][i]
        g = outputs[name][i] if name in outputs else None
        correction = fit_correction(e, h, asymmetric, config, g)
        before = weighted_error(e, h, g).item()
        gain = before - correction.error - error_per_byte * correction.bytes
        placed.append(PlacedCorrection(gain, name, i, correction))
    placed.sort(key=lambda p: -p.gain)
    return placed if by_norm else [p for p in placed[: config.lqer_top_k] if p.gain > 0]


def correct_errors(
    stored: dict[str, Quantized],
    weights: dict[str, Tensor],
    hessians: dict[str, Tensor],
    config: Config,
    log: Callable[[str], None],
    outputs: dict[str, Tensor] | None = None,
) -> None:
    """LQER: adds low-rank corrections to LQER_TOP_K stored matrices. `outputs` of a calibration, with row groups.

    The bytes of a correction could buy smaller scales instead. At high rates the error of N weights falls as
    2^(-2 bits/N), so a byte spent on smaller scales everywhere saves 8 ln 4 / N of the weighted error.
    """
    errors = {name: as_batch(weights[name]).float() - as_batch(restore(stored[name])) for name in hessians}
    outputs = (outputs or {}) if config.gptq_row_groups else {}
    total = sum(weighted_error(e, hessians[name], outputs.get(name)).sum().item() for name, e in errors.items())
    error_per_byte = 8 * math.log(4) * total / sum(e.numel() for e in errors.values())
    forms = {"auto": (True, False), "1": (True,), "0": (False,)}[config.lqer_asym_enabled]
    candidates = [fit_corrections(errors, hessians, outputs, error_per_byte, form, config) for form in forms]
    placed = max(candidates, key=lambda corrections: sum(p.gain for p in corrections))
    for gain, name, i, correction in placed:
        elsewhere = error_per_byte * correction.bytes
        log(
            f"lqer:{name}[{i}] rank:{correction.left.size(1)} bytes:{correction.bytes:.0f} weighted error of the model:"
            f"{-(gain + elsewhere) / total:+.3%}, the same bytes in smaller scales:{-elsewhere / total:+.3%}"
        )
    if not placed:
        log("lqer: no correction saves more than its bytes would elsewhere")
    for name in dict.fromkeys(p.name for p in placed):
        of_bank = sorted((p for p in placed if p.name == name), key=lambda p: p.matrix)
        extras = stored[name].extras
        extras["corrected"] = torch.tensor([p.matrix for p in of_bank], dtype=torch.int32)
        for part in ("left", "left_scales", "right", "right_scales"):
            extras[part] = torch.stack([getattr(p.correction, part) for p in of_bank])


# --- RVQ: a second quantization of what the first one left ---


class Residual(NamedTuple):
    """The quantized error of one matrix: what it saves of the weighted error, for about how many bytes."""

    name: str
    matrix: int
    codes: Tensor  # int8 [r, c]
    scales: Tensor  # float16 [r]
    saved: float
    bytes: float


@torch.no_grad()
def fit_residuals(
    stored: dict[str, Quantized], weights: dict[str, Tensor], hessians: dict[str, Tensor], config: Config
) -> list[Residual]:
    """RVQ: every matrix's error in RVQ_BITS over its whole range, sorted by what is saved per byte, most first."""
    residuals = []
    for name, hessian in hessians.items():
        if stored[name].scales is None:
            continue
        errors = as_batch(weights[name]).float() - as_batch(restore(stored[name]))
        limit = 2 ** (config.rvq_bits - 1) - 1
        scales = row_scales(errors, config.rvq_bits, 0.0, config.scale_grid)
        # Rounded to nearest, some matrices would only get worse.
        codes = gptq(errors, factor_hessian(hessian, config.gptq_damp), scales, limit).to(torch.int8)
        remaining = weighted_error(errors - codes.float() * scales.float()[..., None], hessian)
        for i, saved in enumerate((weighted_error(errors, hessian) - remaining).tolist()):
            size = entropy(codes[i]) * codes[i].numel() / 8 + 2 * scales[i].numel()
            residuals.append(Residual(name, i, codes[i], scales[i], saved, size))
    return sorted((r for r in residuals if r.saved > 0), key=lambda r: -r.saved / r.bytes)


def with_residuals(stored: dict[str, Quantized], chosen: list[Residual]) -> dict[str, Quantized]:
    """The stored tensors with these residuals in their extras."""
    stored = {name: q._replace(extras=dict(q.extras)) for name, q in stored.items()}
    for name in dict.fromkeys(r.name for r in chosen):
        of_bank = sorted((r for r in chosen if r.name == name), key=lambda r: r.matrix)
        stored[name].extras.update(
            refined=torch.tensor([r.matrix for r in of_bank], dtype=torch.int32),
            residual=torch.stack([r.codes for r in of_bank]),
            residual_scales=torch.stack([r.scales for r in of_bank]),
        )
    return stored


# --- All tensors ---


def encode_tensor(
    name: str,
    value: Tensor,
    factor: HessianFactor | None,
    config: Config,
    log2_scale_offset: float = 0.0,
    salient: Tensor | None = None,
    elements: int | None = None,
) -> Quantized:
    """One parameter in its stored form: fp16, or integers by QUANTIZER. Of some rows alone, `elements` counts all."""
    bits, sigmas = quantization_bits(name, elements or value.numel(), config)
    if bits == 16:
        return Quantized(value.half(), None, 16, {})
    encode = QUANTIZERS[config.quantizer].encode
    q = encode(as_batch(value).float(), factor, bits, sigmas, config, log2_scale_offset, salient)
    scales = None if q.scales is None else q.scales.view(value.shape[:-1])
    return q._replace(codes=q.codes.view(value.shape), scales=scales)


@torch.no_grad()
def quantize(
    weights: dict[str, Tensor],
    calibration: Calibration,
    config: Config,
    log: Callable[[str], None] = lambda line: None,
    log2_scale_offset: float = 0.0,
    factors: dict[str, HessianFactor] | None = None,
) -> dict[str, Quantized]:
    """Every parameter in its stored form: by QUANTIZER, with a Hessian where there is one.

    `log2_scale_offset` multiplies the scales of tensors with a Hessian by a power of two. `factors` are those of
    `plan_quantization`, if they are known already.
    """
    if factors is None:
        factors = plan_quantization(weights, calibration, config)
    hessians = {name: calibration.hessians[name] for name in factors}  # not those of what stays fp16
    salient = salient_columns(weights, hessians, config) if config.awq_groups and hessians else {}
    stored = {
        name: encode_tensor(name, value, factors.get(name), config, log2_scale_offset, salient.get(name))
        for name, value in weights.items()
    }
    if config.lqer_enabled and factors:
        correct_errors(stored, weights, hessians, config, log, calibration.outputs)
    return stored


def tuning_batch(loader: TrainLoader, config: Config, step: int) -> Batch:
    """The first sequences of a training step, up to CALIBRATION_TOKENS: the same on any number of ranks."""
    count = max(1, min(loader.layout.sequences, CALIBRATION_TOKENS // config.train_seq_len))
    first = step * loader.layout.sequences
    return send(loader.read_sequences(range(first, first + count)), loader.run.device)


LOG2_E = math.log2(math.e)


class Tuning:
    """Tunes what stays continuous once the integers are fixed: row scales, and all that is stored in fp16.

    The loss is the divergence KL(float model || quantized model) on training text. Steps by Adam are taken on masters:
    log2 of the scales, and fp16 values. The quantized model always computes with what the masters round to.
    (Fine-tuning after quantization: QuIP#, arXiv 2402.04396; AQLM, arXiv 2401.06118.)
    """

    def __init__(self, stored: dict[str, Quantized], model: GPT, config: Config):
        self.stored, self.config = stored, config
        self.teacher = constant_view(model)
        self.student = copy.deepcopy(model)
        device = next(model.parameters()).device
        self.masters: dict[str, Tensor] = {}
        self.levels: dict[str, Tensor] = {}
        self.grids: dict[str, int] = {}  # scales of what is rounded to the nearest are on none
        for name, q in stored.items():
            if q.scales is None:
                self.masters[name] = q.codes.float().to(device)
                continue
            self.masters[name] = q.scales.float().to(device).log2()
            on_grid = torch.equal(round_scales(q.scales.float(), config.scale_grid), q.scales)
            self.grids[name] = config.scale_grid if on_grid else 0
            plain = q._replace(scales=torch.ones_like(q.scales), extras={})
            self.levels[name] = quantizer_of(q).decode(plain).to(device)
        self.extras = {name: {part: array.to(device) for part, array in q.extras.items()} for name, q in stored.items()}
        self.adam = torch.optim.Adam(
            [
                dict(params=[self.masters[n] for n in self.levels], lr=config.tune_scale_lr * LOG2_E),
                dict(params=[m for n, m in self.masters.items() if n not in self.levels], lr=config.tune_vector_lr),
            ]
        )
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.adam, 1.0, 0.0, config.tune_steps)
        self.update_student()

    def scales_of(self, name: str) -> Tensor:
        """The row scales that a tensor's masters round to, float16: on the grid where the first scales are."""
        return round_scales(torch.exp2(self.masters[name]), self.grids[name])

    @torch.no_grad()
    def update_student(self) -> None:
        """Copies what the masters round to into the quantized model."""
        for name, p in self.student.named_parameters():
            if name not in self.levels:
                p.copy_(self.masters[name].half())
                continue
            q = self.stored[name]._replace(scales=self.scales_of(name), extras=self.extras[name])
            p.copy_(add_extras(apply_scales(self.levels[name], q), q))

    def divergence(self, batch: Batch) -> Tensor:
        """KL(float model || quantized model), the mean over a batch's tokens, in nats."""
        looped = self.config.loops
        with torch.no_grad():
            expected = self.teacher.log_probabilities(batch.ids, batch.documents, looped=looped)
        found = self.student.log_probabilities(batch.ids, batch.documents, looped=looped)
        return (expected.exp() * (expected - found)).sum(-1).mean()

    @torch.no_grad()
    def mean_divergence(self, batches: list[Batch]) -> float:
        """The mean of `divergence` over batches of one size."""
        return sum(self.divergence(batch).item() for batch in batches) / len(batches)

    def step(self, batch: Batch) -> float:
        """One step; returns the divergence before it."""
        loss = self.divergence(batch)
        loss.backward()
        with torch.no_grad():
            for name, p in self.student.named_parameters():
                gradient = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad.float()
                if name in self.levels:
                    q = self.stored[name]._replace(scales=torch.exp2(self.masters[name]), extras=self.extras[name])
                    gradient = (gradient * apply_scales(self.levels[name], q)).sum(-1) / LOG2_E
                self.masters[name].grad = gradient
                p.grad = None
        self.adam.step()
        self.schedule.step()
        self.update_student()
        return loss.item()

    def tuned(self) -> dict[str, Quantized]:
        """The stored tensors with what was learned."""
        return {
            name: q._replace(codes=self.masters[name].half().cpu())
            if q.scales is None
            else q._replace(scales=self.scales_of(name).cpu())
            for name, q in self.stored.items()
        }


def add_extras(values: Tensor, q: Quantized) -> Tensor:
    """Adds a stored tensor's corrections and residuals to its values, in place."""
    batch = as_batch(values)
    for n, matrix in enumerate(q.extras["corrected"].tolist() if "corrected" in q.extras else ()):
        left, right = (factor_values(q.extras[side][n], q.extras[side + "_scales"][n]) for side in ("left", "right"))
        batch[matrix] += left @ right
    for n, matrix in enumerate(q.extras["refined"].tolist() if "refined" in q.extras else ()):
        batch[matrix] += q.extras["residual"][n].float() * q.extras["residual_scales"][n].float()[:, None]
    return values


def restore(q: Quantized) -> Tensor:
    """Float32 weights of one stored tensor: what its quantizer decodes, plus corrections and residuals."""
    return q.codes.float() if q.scales is None else add_extras(quantizer_of(q).decode(q), q)


def dequantize(stored: dict[str, Quantized]) -> dict[str, Tensor]:
    """Float32 weights from their stored form."""
    return {name: restore(q) for name, q in stored.items()}


def check_stored(q: Quantized) -> None:
    """Checks a stored tensor that somebody else wrote, before anything large is formed from it.

    Errors: ValueError for a form that cannot be restored, or not to finite numbers.
    """
    for array in (q.codes, q.scales, *q.extras.values()):
        if array is not None and array.is_floating_point() and not torch.isfinite(array).all():
            raise ValueError("its 16-bit numbers are not all finite")
    if q.scales is None:
        if q.bits != 16 or q.codes.dtype != torch.float16 or q.states or q.extras:
            raise ValueError("it is neither integers with scales nor plain fp16 values")
        return
    quantizer_of(q).check(q)
    check_extras(q)


def check_extras(q: Quantized) -> None:
    """Errors: ValueError for extras that do not fit the stored tensor's shape."""
    matrices, rows, columns = as_batch(q.codes).shape
    shapes = {part: tuple(array.shape) for part, array in q.extras.items()}
    expected: dict[str, tuple[int, ...]] = {}
    if "columns" in shapes:
        expected["columns"] = (matrices, columns)
    if "corrected" in shapes:
        expected |= correction_shapes(shapes, rows, columns)
    if "refined" in shapes:
        n = shapes["refined"][0]
        expected |= dict(refined=(n,), residual=(n, rows, columns), residual_scales=(n, rows))
    if shapes != expected:
        raise ValueError("its extras do not fit its shape")
    for part in {"corrected", "refined"} & set(shapes):
        if ((q.extras[part] < 0) | (q.extras[part] >= matrices)).any():
            raise ValueError("its extras name matrices that it does not have")


def correction_shapes(shapes: dict[str, tuple[int, ...]], rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The shapes that LQER's arrays must have, given those that they claim; only n, k and the groups are free."""
    n = shapes["corrected"][0]
    rank = shapes["left"][2] if "left" in shapes else 0
    groups = shapes["right_scales"][2] if "right_scales" in shapes else 0
    one_scale = shapes.get("left_scales") == (n, 1)
    return dict(
        corrected=(n,),
        left=(n, rows, rank),
        left_scales=(n, 1 if one_scale else rows),
        right=(n, rank, columns),
        right_scales=(n, rank, max(1, min(groups, columns))),
    )


# ---------------------------------------------------------------------------------------------------------------
# Entropy coding: a range coder for the integers of quantized banks
# ---------------------------------------------------------------------------------------------------------------

# This coder is COMPRESSOR=pergroup. In it, every probability is a ratio of integers.
#
# All rows of a bank are coded together, column by column, with constriction's range coder (arXiv 2201.01741). The
# context of a weight is the sum of two coded scale classes, of its row and of its column. Weights of equal size have
# small codes where their scales are large, so the stored scales tell most of a class, and only the rest is coded. In a
# trellis, the context also holds the quantizer that the row has reached. Each context counts its symbols as they pass,
# starting from a bell-shaped prior, so no table is stored. Of int16 codes with large scale classes, only the high bits
# are symbols. A single matrix with many rows (the embedding) is coded in passes, each as large as all passes before it.
# From the rows that are known by then, a pass uses linear prediction along the columns and, where it pays, one earlier
# row that resembles the new one.
#
# Why decoding is exact on any machine: counts are integers. A table's frequencies are integers n_i that sum to 2^24
# minus their number. constriction's formula, floor(cumulative * ((2^24 - symbols) / sum)) + index, then gives exactly
# (n_i + 1) / 2^24, because the factor is 1. The remaining floating-point arithmetic is of two kinds: single IEEE
# operations on whole arrays, each with one defined rounding, and products of matrices of integers below 2^53, which
# are exact in any order of summation.
PRECISION = 1 << 24  # what the probabilities of constriction's tables sum to
CLASSES = 60  # scale classes, of standard deviations 2^-3 to 2^11.75
CLASSES_PER_OCTAVE = 4
UNSHIFTED = 7 * CLASSES_PER_OCTAVE  # the last class (a standard deviation of 2^4) whose int16 are coded whole
INCREMENT = 32  # what a symbol adds to its count
PRIOR_SYMBOLS = 48  # symbols that the prior counts for
INTEGERS_HEADER = struct.Struct("<Bbb")  # doublings of the passes (0: no prediction), smallest and largest symbol
DOUBLINGS = 5  # of the passes with prediction: the first one has 1/32 of the rows
PREDICTED_COLUMNS = 1024  # columns of a matrix up to which it may be coded with prediction
PREDICTED_ROWS = 1 << 16
MAX_CODES = 1 << 28  # codes of a bank, to bound the time that a forged shape can take
MAX_COLUMNS = 1 << 16


def power_of_two(sixteenths: int) -> int:
    """floor(2^(sixteenths / 16)) for sixteenths >= 0: four nested integer square roots."""
    return math.isqrt(math.isqrt(math.isqrt(math.isqrt(1 << sixteenths))))


def class_shifts(dtype: type) -> np.ndarray:
    """Low bits that are coded apart, as likely 0 as 1, by scale class: none of an int8."""
    octaves_above = -((UNSHIFTED - np.arange(CLASSES)) // CLASSES_PER_OCTAVE)
    return octaves_above.clip(0) * (dtype != np.int8)


def prior_counts(low: int, high: int, shifts: np.ndarray) -> np.ndarray:
    """Prior counts [CLASSES, symbols] of low..high, proportional to (1 + k^2 / 16 v)^-8.

    v is the class's variance, after the shift of what is coded apart.
    """
    logs = 32 * np.arange(CLASSES) // CLASSES_PER_OCTAVE - 32 * shifts
    v = np.array([power_of_two(320 + log) / 2**26 for log in logs.tolist()])[:, None]
    bell = 16 * v / (16 * v + np.arange(low, high + 1, dtype=np.float64) ** 2)
    for _ in range(3):
        bell = bell * bell
    counts = np.floor(bell * 2**20).astype(np.int64) + 1
    return counts * (INCREMENT * PRIOR_SYMBOLS) // counts.sum(1, keepdims=True)


class RangeCoder:
    """An encoder, or a decoder if there are data: both directions run the same lines."""

    def __init__(self, data: bytes | None = None):
        import constriction

        streams = cast(Any, constriction).stream  # a compiled module without types
        self.categorical = streams.model.Categorical
        self.encoder = streams.queue.RangeEncoder()
        self.decoder = None
        if data is not None:
            words = np.frombuffer(data + bytes(-len(data) % 4), dtype="<u4").astype(np.uint32)
            self.decoder = streams.queue.RangeDecoder(words)

    def code(self, symbols: Any, count: int, table: Any) -> np.ndarray:
        """Encodes these int32 symbols, or decodes the next `count`. Errors: ValueError for data that cannot be."""
        if self.decoder is None:
            self.encoder.encode(symbols, table)
            return symbols
        try:
            return self.decoder.decode(table, count)
        except AssertionError:
            raise ValueError("the integers do not decode") from None


class ContextModel:
    """Adaptive symbol counts int64 [contexts, symbols]. A context's table is rebuilt when they grew by a sixteenth."""

    def __init__(self, low: int, counts: np.ndarray, shifts: np.ndarray | None = None):
        self.low = low
        self.shifts = np.zeros(0, np.int64) if shifts is None else shifts  # by scale class, for `code_column`
        self.counts = counts
        self.totals = counts.sum(1).tolist()
        self.rebuild_at = [0] * len(counts)
        self.tables = [None] * len(counts)

    def table(self, coder: RangeCoder, context: int):
        """The context's table, from integer frequencies that sum to PRECISION - symbols."""
        total = self.totals[context]
        if total >= self.rebuild_at[context]:
            counts = self.counts[context]
            frequencies = counts * (PRECISION - counts.size) // total
            frequencies[counts.argmax()] += PRECISION - counts.size - frequencies.sum()
            self.tables[context] = coder.categorical(frequencies.astype(np.float64), perfect=False)
            self.rebuild_at[context] = total + total // 16
        return self.tables[context]

    def code(self, coder: RangeCoder, integers: np.ndarray | None, contexts: np.ndarray) -> np.ndarray:
        """Encodes integers [n] in their contexts uint16 [n], or decodes them where they are None; int32 [n]."""
        order = contexts.argsort(kind="stable")
        symbols = None if integers is None else np.subtract(integers[order], self.low, dtype=np.int32)
        out = np.empty(contexts.size, dtype=np.int32)
        stop = 0
        for context, count in enumerate(np.bincount(contexts).tolist()):
            start = stop
            stop = start + count
            while start < stop:  # never more at once than were seen before, so that a long run is learned as it goes
                end = min(stop, start + self.totals[context] // INCREMENT)
                part = None if symbols is None else symbols[start:end]
                out[start:end] = coder.code(part, end - start, self.table(coder, context))
                self.counts[context] += INCREMENT * np.bincount(out[start:end], minlength=self.counts.shape[1])
                self.totals[context] += INCREMENT * (end - start)
                start = end
        values = np.empty_like(out)
        values[order] = out + np.int32(self.low)
        return values


def code_bits(coder: RangeCoder, integers: np.ndarray | None, count: int, bits: int) -> np.ndarray:
    """Encodes integers [count] of up to 8 bits, all equally likely, or decodes them where they are None; int32."""
    table = coder.categorical(np.full(1 << bits, (PRECISION >> bits) - 1.0), perfect=False)
    return coder.code(None if integers is None else integers.astype(np.int32), count, table)


def code_column(
    coder: RangeCoder, model: ContextModel, integers: np.ndarray | None, classes: np.ndarray, contexts: np.ndarray
) -> np.ndarray:
    """Encodes integers [n], of scale classes [n], in contexts uint16 [n], or decodes them where they are None; int32.

    The contexts' symbols are the integers without the low bits of their class. An int16 out of their range is an
    outlier: its symbol is the smallest or largest of an int8, and all its 16 bits follow.
    """
    shifts = model.shifts[classes]
    whole = None if integers is None else integers + (1 << shifts >> 1)
    values = model.code(coder, None if whole is None else (whole >> shifts).clip(-128, 127), contexts)
    outliers = (values == -128) | (values == 127) if model.shifts.any() else np.zeros(0, bool)
    for shift in range(1, 1 + shifts.max(initial=0)):
        at = (shifts == shift).nonzero()[0]
        low = code_bits(coder, None if whole is None else whole[at] & (1 << shift) - 1, at.size, shift)
        values[at] = (values[at] << shift) + low - (1 << shift - 1)
    if outliers.any():
        at = outliers.nonzero()[0]
        parts = [None if integers is None else integers[at] >> shift & 255 for shift in (8, 0)]
        high, low = (code_bits(coder, part, at.size, 8) for part in parts)
        values[at] = (high << 8 | low).astype(np.int16)
    return values


class ClassBases:
    """What the scale classes [B, n] are expected to be: the running mean of those before, and a share of the hints.

    In sixteenths of a class. The mean is that of classes without their hints, and starts at variance 1.
    """

    def __init__(self, hints: np.ndarray, slope: int):
        self.hints = (hints - hints.sum(1, keepdims=True) // hints.shape[1]) * slope >> 3
        self.mean = np.full(len(hints), 48 * CLASSES_PER_OCTAVE)

    def base(self, n: int) -> np.ndarray:
        """The expected classes [B] of number n."""
        return self.mean + self.hints[:, n] + 8 >> 4

    def observe(self, n: int, classes: np.ndarray) -> None:
        """Takes in the classes [B] of number n."""
        self.mean = self.mean + ((16 * classes - self.hints[:, n] - self.mean) >> min(n, 3))


def choose_slope(variance: np.ndarray, hints: np.ndarray) -> int:
    """The eighths of the hints [B, n] by which the classes of these variances follow them. Encoder only."""
    classes = 8 * CLASSES_PER_OCTAVE * np.log2(variance)
    x = hints - hints.mean(1, keepdims=True)
    return int(np.rint(8 * (x * classes).sum() / max((x * x).sum(), 1)).clip(-32, 32))


def choose_class_deltas(variance: np.ndarray, samples: int, hints: np.ndarray, slope: int) -> np.ndarray:
    """Deltas [B, n] to the expected scale classes of integers, `samples` for each of the variances. Encoder only.

    Each class minimizes the bits of its integers and of its delta together; what deltas cost is estimated in three
    rounds.
    """
    deltas = np.zeros(variance.shape, dtype=np.int64)
    choices = np.arange(-64, 64)
    delta_bits = 1.0 + 2 * abs(choices)
    class_bits = samples * choices / CLASSES_PER_OCTAVE
    excess_bits = samples / math.log(4) * 4.0 ** (3 - choices / CLASSES_PER_OCTAVE)
    count = variance.shape[1]
    for stop in (min(count, 512), min(count, 512), count):
        bases = ClassBases(hints, slope)
        for n in range(stop):
            base = bases.base(n)
            excess = variance[:, n] * 4.0 ** (-base / CLASSES_PER_OCTAVE)
            bits = excess[:, None] * excess_bits + class_bits + delta_bits
            deltas[:, n] = choices[bits.argmin(1)]
            bases.observe(n, base + deltas[:, n])
        seen = np.bincount(deltas[:, :stop].ravel() + 64, minlength=128) + 0.3 / (1 + choices**2)
        delta_bits = math.log2(seen.sum()) - np.log2(seen)
    return deltas


def code_classes(
    coder: RangeCoder,
    side_model: ContextModel,
    context: int,
    variance: np.ndarray | None,
    samples: int,
    hints: np.ndarray,
) -> np.ndarray:
    """Scale classes [B, n]: chosen from variances [B, n] of `samples` codes each, or decoded (variance None).

    The side model's first context is the slope's, and `context` that of the deltas.
    """
    slope = deltas = None
    if variance is not None:
        slope = np.array([choose_slope(variance, hints)])
        deltas = choose_class_deltas(variance, samples, hints, slope.item()).ravel()
    slope = side_model.code(coder, slope, np.zeros(1, np.uint16)).item()
    deltas = side_model.code(coder, deltas, np.full(hints.size, context, np.uint16)).reshape(hints.shape)
    bases = ClassBases(hints, slope)
    classes = np.empty(hints.shape, dtype=np.int64)
    for n in range(hints.shape[1]):
        classes[:, n] = bases.base(n) + deltas[:, n]
        bases.observe(n, classes[:, n])
    return classes


def code_scales(
    coder: RangeCoder, side_model: ContextModel, codes: np.ndarray | None, hints: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Scale classes of rows [B, r], relative to variance 1, and of columns [B, c] of codes [c, B * r]."""
    B, r = hints[0].shape
    c = hints[1].shape[1]
    row_hints = hints[0] if r <= MAX_COLUMNS else np.zeros((B * r, 1), np.int32)  # one at a time would take too long
    square = row_variance = column_variance = None
    if codes is not None:
        square = codes.reshape(c, B, r).astype(np.float32) ** 2 + np.float32(1 / 12)
        row_variance = (square / square.mean(2, keepdims=True)).mean(0).reshape(row_hints.shape)
    rows = code_classes(coder, side_model, 1, row_variance, c, row_hints).reshape(B, r) - 3 * CLASSES_PER_OCTAVE
    if square is not None:
        column_variance = (square / np.float32(4) ** (rows / CLASSES_PER_OCTAVE).astype(np.float32)).mean(2).T
    return rows, code_classes(coder, side_model, 2, column_variance, r, hints[1])


class Predictor:
    """Predicts new rows from n known ones, [c, n]. All values are integers, those below in float64.

    The covariance of the known rows is L D L^T, so a row is L times its innovations e. The prediction of column j is
    the sum over i < j of L[j, i] e[i] (L in 4096ths, e in sixteenths), plus the row's `gain`, in eighths, times the
    innovation of its reference row.
    """

    def __init__(self, known: np.ndarray, rows: int):
        c, n = known.shape
        self.n = n
        self.limit = np.iinfo(known.dtype).max + 1
        self.values = np.zeros((c, n + rows))
        self.values[:, :n] = known
        rest = self.values[:, :n] @ self.values[:, :n].T
        rest.flat[:: c + 1] += 2 * c * (rest.diagonal() / n + 1)  # a ridge, because the first passes have few rows
        factor = np.eye(c)
        for j in range(c):
            factor[j + 1 :, j] = rest[j + 1 :, j] / rest[j, j]
            rest[j + 1 :, j + 1 :] -= factor[j + 1 :, j, None] * rest[j, j + 1 :]
        self.factor = np.rint(factor * 4096).clip(-(2**14), 2**14)
        self.predicted = np.zeros_like(self.values)
        self.innovations = np.zeros_like(self.values)

        self.gain: np.ndarray = np.zeros(rows, dtype=np.int64)  # of each new row, chosen or decoded later
        self.reference: np.ndarray = np.zeros(rows, dtype=np.int64)

    def predict(self, j: int) -> None:
        """Linear prediction of column j, in blocks of 32: one matrix product for all columns before the block."""
        start = j - j % 32
        if j == start:
            self.from_earlier = self.factor[j : j + 32, :j] @ self.innovations[:j]
        in_block = self.factor[j, start:j] @ self.innovations[start:j]
        self.predicted[j] = np.floor((self.from_earlier[j - start] + in_block) / 4096)
        self.observe(j, 0)  # sets the innovations of the known rows

    def observe(self, j: int, column: np.ndarray | int) -> None:
        """Takes in column j of the new rows [rows]."""
        self.values[j, self.n :] = column
        self.innovations[j] = (16 * self.values[j] - self.predicted[j]).clip(-(2**17), 2**17)

    def means(self, j: int | slice) -> tuple[np.ndarray, np.ndarray]:
        """The predicted integers of the new rows in columns j, and the side (1 or -1) of them on which to expect more.

        int64.
        """
        exact = self.predicted[j][..., self.n :] + np.floor(self.gain * self.innovations[j][..., self.reference] / 8)
        means = np.floor((exact + 8) / 16)
        sides = np.where(exact < 16 * means, -1, 1)
        return means.clip(-self.limit, self.limit - 1).astype(np.int64), sides

    def choose_references(self, columns: np.ndarray) -> None:
        """Takes in the new rows [c, rows] and finds the known row that saves most of each. Encoder only."""
        for j, column in enumerate(columns):
            self.predict(j)
            self.observe(j, column)
        spread = np.sqrt((self.innovations[:, self.n :] ** 2).mean(1, keepdims=True) + 1)
        old, new = np.split((self.innovations / spread).astype(np.float32), [self.n], axis=1)
        old_power = (old**2).sum(0) + 1e-3
        new_power = (new**2).sum(0) + 1e-3
        products = [new[:, i : i + 1024].T @ (old / np.sqrt(old_power)) for i in range(0, new.shape[1], 1024)]
        best = np.concatenate([p.max(1) for p in products]).clip(0)
        self.reference = np.concatenate([p.argmax(1) for p in products])
        saved_bits = -len(new) / 2 * np.log2((1 - best**2 / new_power).clip(1e-6))
        gain = np.rint(8 * best / np.sqrt(old_power[self.reference])).clip(0, 15)
        self.gain = np.where(saved_bits > math.log2(self.n) + 2, gain, 0).astype(np.int64)

    def code_references(self, coder: RangeCoder, side_model: ContextModel, encoding: bool, rows: int) -> None:
        """Codes or decodes each new row's gain and, where it is not 0, the two digits of its reference row."""

        def code(values: np.ndarray | None, count: int, context: int) -> np.ndarray:
            return side_model.code(coder, values if encoding else None, np.full(count, context, np.uint16))

        if not encoding:
            self.reference = np.zeros(rows, dtype=np.int64)
        self.gain = code(self.gain, rows, 3)
        used = self.gain.nonzero()[0]
        digits = divmod(self.reference[used], 256)
        high, low = [code(digit - 128, used.size, 4 + i) + 128 for i, digit in enumerate(digits)]
        self.reference[used] = (high * 256 + low) % self.n


class BankModels(NamedTuple):
    """What the passes of a bank share."""

    coder: RangeCoder
    symbols: ContextModel  # of integers, by scale class and quantizer
    side: ContextModel  # contexts: a slope, the classes of rows and of columns, a row's gain and its reference's digits
    trellis: tuple  # next state by state and parity, quantizer by state
    dtype: type  # int8 or int16


def code_pass(
    models: BankModels, codes: np.ndarray | None, hints: tuple[np.ndarray, np.ndarray], predictor: Predictor | None
) -> np.ndarray:
    """Encodes codes [c, B * r], a bank or some of its rows, or decodes them where they are None."""
    coder, dtype = models.coder, models.dtype
    n, c = hints[0].size, hints[1].shape[1]
    encoding, residual = codes is not None, codes
    out = np.empty((c, n), dtype=dtype) if codes is None else codes
    if predictor and codes is not None:
        predictor.choose_references(codes)
    if predictor:
        predictor.code_references(coder, models.side, encoding, n)
    if predictor and codes is not None:
        means, sides = predictor.means(slice(None))
        residual = (sides * (codes - means)).astype(dtype)  # wraps around, and back in the decoder
    rows, columns = code_scales(coder, models.side, residual, hints)
    following = np.array(models.trellis[0], dtype=np.uint8)
    quantizer = np.array(models.trellis[1], dtype=np.uint16)
    quantizers = np.uint16(quantizer.max() + 1)
    state = np.zeros(n, dtype=np.uint8)
    for j in range(c):
        scale = (rows + columns[:, j, None]).clip(0, CLASSES - 1).astype(np.uint16).ravel()
        integers = None if residual is None else residual[j].astype(np.int32)
        values = code_column(coder, models.symbols, integers, scale, scale * quantizers + quantizer[state])
        if not encoding and predictor:
            predictor.predict(j)
            means, sides = predictor.means(j)
            out[j] = (means + sides * values).astype(dtype)
            predictor.observe(j, out[j])
        elif not encoding:
            out[j] = values.astype(dtype)
        state = following[state, out[j] & 1]
    return out


def code_bank(
    models: BankModels, codes: np.ndarray | None, hints: tuple[np.ndarray, np.ndarray], doublings: int
) -> np.ndarray:
    """Encodes integers [B, r, c] at once or, with doublings, in that many passes and one; or decodes them."""
    B, r = hints[0].shape
    c = hints[1].shape[1]
    known = None if codes is None else np.ascontiguousarray(codes.transpose(2, 0, 1)).reshape(c, B * r)
    if not doublings:
        return code_pass(models, known, hints, None).reshape(c, B, r).transpose(1, 2, 0)
    order = (np.arange(r) * 2654435761 % 2**32).argsort(kind="stable")  # every pass gets rows of every kind
    out = np.empty((c, r), dtype=models.dtype)
    start = 0
    for stop in (r >> n for n in range(doublings, -1, -1)):
        part = np.sort(order[start:stop])  # rows of pieces that are about as frequent have similar scales
        predictor = Predictor(out[:, order[:start]], part.size) if start else None
        part_codes = None if known is None else known[:, part]
        out[:, part] = code_pass(models, part_codes, (hints[0][:, part], hints[1]), predictor)
        start = stop
    return out.reshape(c, B, r).transpose(1, 2, 0)


def bank_models(
    coder: RangeCoder, trellis: tuple | None, doublings: int, low: int, high: int, dtype: type
) -> BankModels:
    """The models before the first integer. low..high are the symbols, those of a prediction's errors excepted."""
    trellis = trellis or (((0, 0),), (0,))
    if doublings:
        low, high = -128, 127
    shifts = class_shifts(dtype)
    symbols = ContextModel(low, prior_counts(low, high, shifts).repeat(max(trellis[1]) + 1, axis=0), shifts)
    side_classes = [n * CLASSES_PER_OCTAVE for n in (6, 3, 3, 4, 10, 10)]
    side = ContextModel(-128, prior_counts(-128, 127, np.zeros(CLASSES, int))[side_classes])
    return BankModels(coder, symbols, side, trellis, dtype)


def check_bank_shape(shape: tuple[int, ...]) -> None:
    """Errors: ValueError for a bank whose coding could take too long."""
    if len(shape) != 3 or min(shape) < 0 or math.prod(shape) > MAX_CODES or shape[2] > MAX_COLUMNS:
        raise ValueError(f"a bank of shape {shape} cannot be coded")


def scale_hints(
    scales: np.ndarray | None, exponents: np.ndarray | None, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Sixteenths of scale classes that the rows [B, r] and columns [B, c] of codes lose by the scales of their weights.

    From fp16 scales of the rows, and exponents e of the columns' scales 2^(e / 2); None, or another size, gives zeros.
    A bank whose weights are equally large has small codes where its scales are large. Integers alone.
    """
    B, r, c = shape
    octave = 16 * CLASSES_PER_OCTAVE
    rows, columns = np.zeros((B, r), dtype=np.int32), np.zeros((B, c), dtype=np.int32)
    if scales is not None and scales.size == rows.size:
        bits = scales.astype(np.float16).view(np.uint16).reshape(rows.shape).astype(np.int32)
        mantissa = bits & 1023
        rows -= (bits + (11 * mantissa * (1024 - mantissa) >> 15)) * octave >> 10  # 1024 log2, but for a constant
    if exponents is not None and exponents.size == columns.size:
        columns -= exponents.reshape(columns.shape).astype(np.int32) * octave // 2
    return rows, columns


def normal_bits(codes: np.ndarray) -> float:
    """About the bits of codes [B, r, c] without prediction: normal deviates with scales of rows and columns."""
    square = codes.astype(np.float32) ** 2 + np.float32(1 / 12)
    columns = square.mean(1, keepdims=True)
    rows = (square / columns).mean(2)
    _, r, c = codes.shape
    logs = r * np.log2(columns).sum(dtype=np.float64) + c * np.log2(rows).sum(dtype=np.float64)
    return 0.5 * (codes.size * math.log2(2 * math.pi * math.e) + float(logs))


def encode_integers(
    codes: np.ndarray, trellis: tuple | None = None, hints: tuple[np.ndarray, np.ndarray] | None = None
) -> bytes:
    """Bytes of int8 or int16 codes [B, r, c], columns in processing order.

    trellis: (next state [states][k & 1], quantizer [states]) of codes of which every row starts in state 0, or None.
    hints: by `scale_hints`, the same for the decoder.
    """
    check_bank_shape(codes.shape)
    if not codes.size:
        return b""
    hints = hints or scale_hints(None, None, codes.shape)
    matrices, rows, columns = codes.shape
    low = max(int(codes.min()), -128)
    high = min(int(codes.max()), 127)
    if codes.dtype != np.int8:
        low, high = min(low, 0), max(high, 0)  # what is shifted comes nearer to 0
    low = min(low, 126)
    high = max(high, low + 1)
    predictable = matrices == 1 and 256 <= rows <= PREDICTED_ROWS and columns <= PREDICTED_COLUMNS
    candidates: list[bytes] = []
    for doublings in (DOUBLINGS, 0) if predictable else (0,):
        if candidates and 8 * len(candidates[0]) < 0.97 * normal_bits(codes):
            break  # prediction has saved so much that the plain form need not be tried
        coder = RangeCoder()
        models = bank_models(coder, trellis, doublings, low, high, codes.dtype.type)
        code_bank(models, codes, hints, doublings)
        packed = coder.encoder.get_compressed().astype("<u4").tobytes()
        candidates.append(INTEGERS_HEADER.pack(doublings, low, high) + packed)
    return min(candidates, key=len)


def decode_integers(
    data: bytes,
    shape: tuple[int, int, int],
    trellis: tuple | None = None,
    dtype: type = np.int8,
    hints: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """The int8 or int16 [B, r, c] of `encode_integers`. Errors: ValueError for bytes that no codes give."""
    check_bank_shape(shape)
    if not math.prod(shape):
        return np.zeros(shape, dtype=dtype)
    data = bytes(data)
    if len(data) < INTEGERS_HEADER.size:
        raise ValueError("the integers have no header")
    doublings, low, high = INTEGERS_HEADER.unpack_from(data)
    matrices, rows, columns = shape
    predictable = matrices == 1 and 1 << DOUBLINGS <= rows <= PREDICTED_ROWS and columns <= PREDICTED_COLUMNS
    if low >= high or doublings not in ((0, DOUBLINGS) if predictable else (0,)):
        raise ValueError("the integers' header is invalid")
    coder = RangeCoder(data[INTEGERS_HEADER.size :])
    hints = hints or scale_hints(None, None, shape)
    models = bank_models(coder, trellis, doublings, low, high, dtype)
    codes = code_bank(models, None, hints, doublings)
    if coder.decoder is None or not coder.decoder.maybe_exhausted():
        raise ValueError("the integers end before their data")
    return codes


# ---------------------------------------------------------------------------------------------------------------
# Artifact: a container with a header, lengths and checksums; nothing in it can run code
# ---------------------------------------------------------------------------------------------------------------

MAGIC = b"PGOLF\x00\x00\x03"
PREFIX = struct.Struct("<8sII")  # magic, bytes of the packed header, its CRC-32
HEADER_LIMIT = 1 << 20
CONTENT_LIMIT = 3 << 26  # bytes of all unpacked sections: twice as many fit into 512 MiB
FILE_LIMIT = CONTENT_LIMIT + (1 << 24)  # bytes of a file, whose sections may be incompressible
CONTENT_RATIO = 64  # bytes of content for each byte of a file, at most, ...
SMALL_CONTENT = 1 << 24  # ... beyond this much, which any file may unpack to: an untrained model is mostly zeros
TEXT_LIMIT = 1024  # characters of a setting


TABLE_SIZE = struct.Struct("<I")  # of a section that is a table of numbers, and indices


class ArtifactError(ConfigError):
    """The file is not a complete artifact of this program."""

    def __init__(self, why: str):
        # What a file says of itself can be long, or of several lines.
        shown = "".join(c if c.isprintable() else " " for c in why)
        super().__init__("artifact", "", shown if len(shown) <= 400 else shown[:400] + "...")


# --- Codecs ---


class IntegerBank(NamedTuple):
    """What an entropy coder of integers must know of them."""

    shape: tuple[int, int, int]  # [B, r, c]
    states: int  # of their trellis; 0: none
    dtype: type = np.int8  # or int16
    scales: np.ndarray | None = None  # fp16, of the rows
    exponents: np.ndarray | None = None  # of the columns' scales

    @property
    def hints(self) -> tuple[np.ndarray, np.ndarray]:
        """What the scales say of the codes."""
        return scale_hints(self.scales, self.exponents, self.shape)

    @property
    def trellis(self) -> tuple[list, list] | None:
        """(next state by state and parity, quantizer of each state)."""
        if not self.states:
            return None
        trellis = make_trellis(self.states)
        return trellis.following.tolist(), trellis.second.tolist()


def compress_zstd(data: bytes, _bank: IntegerBank | None) -> bytes:
    """zstd at its strongest level, without checksum and size: the section has both."""
    import zstandard

    return zstandard.ZstdCompressor(level=22, write_checksum=False, write_content_size=False).compress(data)


def decompress_zstd(data: bytes, size: int, _bank: IntegerBank | None) -> bytes:
    """Inverse of `compress_zstd`; stops at the first chunk beyond `size` bytes."""
    import zstandard

    chunks = zstandard.ZstdDecompressor(max_window_size=1 << 27).read_to_iter(data)
    out = bytearray()
    while len(out) <= size and (chunk := next(chunks, b"")):
        out += chunk
    return bytes(out)


def compress_brotli(data: bytes, _bank: IntegerBank | None) -> bytes:
    """brotli at its strongest level."""
    import brotli

    return brotli.compress(data, quality=11, lgwin=24)


def decompress_brotli(data: bytes, size: int, _bank: IntegerBank | None) -> bytes:
    """Inverse of `compress_brotli`; stops one byte beyond `size`."""
    import brotli

    return brotli.Decompressor().process(data, output_buffer_limit=size + 1)


def compress_table(data: bytes, _bank: IntegerBank | None) -> bytes:
    """16-bit numbers of few values: their table and, in brotli's form too, indices into it, low bytes first.

    Scales on a logarithmic grid take a fifth less than in brotli's form alone.
    """
    table, indices = np.unique(np.frombuffer(data, "<u2"), return_inverse=True)
    planes = indices.astype("<u2").view(np.uint8).reshape(-1, 2).T
    return compress_brotli(TABLE_SIZE.pack(table.size) + table.tobytes() + planes.tobytes(), None)


def decompress_table(data: bytes, size: int, _bank: IntegerBank | None) -> bytes:
    """Inverse of `compress_table`. Errors: IndexError or ValueError for an index without a number."""
    content = decompress_brotli(data, TABLE_SIZE.size + min(size, 1 << 17) + size, None)
    count, start = TABLE_SIZE.unpack_from(content)[0], TABLE_SIZE.size
    table = np.frombuffer(content, "<u2", count, start)
    planes = np.frombuffer(content, np.uint8, size, start + table.nbytes)
    if start + table.nbytes + size != len(content):
        raise ValueError("the table's indices end before their data")
    return table[np.ascontiguousarray(planes.reshape(2, -1).T).view("<u2").ravel()].tobytes()


def compress_lzma(data: bytes, _bank: IntegerBank | None) -> bytes:
    """LZMA at its strongest level, with the shortest of its headers."""
    import lzma

    # A dictionary no larger than the data tells the reader how much memory an honest file can need.
    dictionary = min(max(len(data), 4096), 1 << 26)
    filters = [dict(id=lzma.FILTER_LZMA1, preset=9 | lzma.PRESET_EXTREME, dict_size=dictionary)]
    return lzma.compress(data, format=lzma.FORMAT_ALONE, filters=filters)


def decompress_lzma(data: bytes, size: int, _bank: IntegerBank | None) -> bytes:
    """Inverse of `compress_lzma`; stops one byte beyond `size`, and refuses a dictionary that `size` does not need."""
    import lzma

    reader = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=2 * size + (1 << 20))
    return reader.decompress(data, max_length=size + 1)


def compress_integers(data: bytes, bank: IntegerBank | None) -> bytes:
    """Codes of a bank by section Entropy coding."""
    if bank is None:
        raise ValueError("integers that are no bank's")
    codes = np.frombuffer(data, np.dtype(bank.dtype).newbyteorder("<")).astype(bank.dtype, copy=False)
    return encode_integers(codes.reshape(bank.shape), bank.trellis, bank.hints)


def decompress_integers(data: bytes, size: int, bank: IntegerBank | None) -> bytes:
    """Inverse of `compress_integers`. Errors: ArtifactError or ValueError."""
    if bank is None or math.prod(bank.shape) * np.dtype(bank.dtype).itemsize != size:
        raise ArtifactError("codes integers that are no bank's")
    codes = decode_integers(data, bank.shape, bank.trellis, bank.dtype, bank.hints)
    return codes.astype(codes.dtype.newbyteorder("<"), copy=False).tobytes()


class Codec(NamedTuple):
    """One value of COMPRESSOR.

    compress(data, bank) -> bytes. decompress(bytes, expected size, bank) stops soon after that size, so that a small
    file cannot take much memory. The bank is None for a section that is not a bank of integers.
    """

    compress: Callable[[bytes, IntegerBank | None], bytes]
    decompress: Callable[[bytes, int, IntegerBank | None], bytes]
    integers_only: bool = False  # other sections take brotli, and scales a table


CODECS = {
    "zstd": Codec(compress_zstd, decompress_zstd),
    "brotli": Codec(compress_brotli, decompress_brotli),
    "lzma": Codec(compress_lzma, decompress_lzma),
    "table": Codec(compress_table, decompress_table),  # only of scales
    "pergroup": Codec(compress_integers, decompress_integers, integers_only=True),
}


def compress(codec: str, data: bytes, bank: IntegerBank | None = None) -> bytes:
    """The data in a codec's form; a codec of integers needs their bank."""
    return CODECS[codec].compress(data, bank)


def decompress(codec: str, data: bytes, size: int, bank: IntegerBank | None = None) -> bytes:
    """Exactly `size` bytes; memory grows with what is unpacked, not with the claim. Errors: ArtifactError."""
    if codec not in CODECS:
        raise ArtifactError(f"uses an unknown codec {codec!r}")
    try:
        out = CODECS[codec].decompress(data, size, bank)
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"a section does not unpack ({type(error).__name__})") from None
    if len(out) != size:
        raise ArtifactError(f"a section unpacks to another length than the expected {size} bytes")
    return out


# --- Header ---


def part_dtype(part: str, bits: int) -> np.dtype:
    """The type of an array's numbers in the artifact."""
    if part in EXTRAS:
        return np.dtype(str(EXTRAS[part][0]).removeprefix("torch.")).newbyteorder("<")
    if part == "scales" or bits == 16:
        return np.dtype("<f2")
    return np.dtype("i1" if bits <= 8 else "<i2")


INTEGERS = (np.dtype("i1"), np.dtype("<i2"))  # the types of codes
SCALE_SECTIONS = ("scales", "columns")
OWN_SECTION = 4096  # integers from which on an array has a section of its own


def section_of(name: str, part: str, dtype: np.dtype, size: int) -> str:
    """The section that holds an array: large arrays of codes have their own, small arrays share one for each type."""
    if part in SCALE_SECTIONS:
        return part  # of all tensors together: q, k and v have the same columns, which the codec notices
    return f"{name}.{part}" if dtype in INTEGERS and size >= OWN_SECTION else dtype.name


def check_types(row: Any, types: tuple[type, ...], what: str) -> None:
    """Errors: ArtifactError for a row of the header that is not a list of these types (a bool is not an int)."""
    if type(row) is not list or tuple(map(type, row)) != types:
        raise ArtifactError(f"its header has a {what} row that is not {', '.join(t.__name__ for t in types)}")


def parse_shape(value: Any) -> tuple[int, ...]:
    """A tensor's shape. Errors: ArtifactError."""
    if type(value) is not list or not all(type(n) is int and 0 <= n <= CONTENT_LIMIT for n in value):
        raise ArtifactError(f"its header has a shape that is not a list of sizes up to {CONTENT_LIMIT}")
    return tuple(value)


@dataclass(frozen=True)
class SectionHeader:
    """One section: what it is called, how it is packed, and its CRC-32."""

    name: str
    codec: str
    packed_size: int
    size: int
    checksum: int

    @classmethod
    def parse(cls, row: Any) -> SectionHeader:
        """From a row of the header. Errors: ArtifactError."""
        check_types(row, (str, str, int, int, int), "section")
        section = cls(*row)
        if min(section.packed_size, section.size, section.checksum) < 0:
            raise ArtifactError(f"its section {section.name!r} has a negative size or checksum")
        return section

    def row(self) -> list:
        return [self.name, self.codec, self.packed_size, self.size, self.checksum]


@dataclass(frozen=True)
class TensorHeader:
    """One tensor: its name and the arrays of its stored form."""

    name: str
    bits: int
    shape: tuple[int, ...]
    extras: dict[str, tuple[int, ...]]
    states: int

    @classmethod
    def parse(cls, row: Any) -> TensorHeader:
        """From a row of the header. Errors: ArtifactError."""
        check_types(row, (str, int, list, dict, int), "tensor")
        name, bits, shape, extras, states = row
        shapes = {}
        for part, extra_shape in extras.items():
            shapes[part] = parse_shape(extra_shape)
            if part not in EXTRAS or len(shapes[part]) != EXTRAS[part][1]:
                raise ArtifactError(f"its tensor {name!r} has an unknown array {part!r}, or one of other dimensions")
        if bits not in (*range(2, 13), 16):
            raise ArtifactError(f"its tensor {name!r} has {bits} bits")
        if states not in (0, *TRELLISES, *UNGERBOECK):
            raise ArtifactError(f"its tensor {name!r} has an unknown trellis with {states} states")
        return cls(name, bits, parse_shape(shape), shapes, states)

    @classmethod
    def of(cls, name: str, q: Quantized) -> TensorHeader:
        shapes = {part: tuple(array.shape) for part, array in sorted(q.extras.items())}
        return cls(name, q.bits, tuple(q.codes.shape), shapes, q.states)

    def row(self) -> list:
        return [
            self.name,
            self.bits,
            list(self.shape),
            {part: list(shape) for part, shape in self.extras.items()},
            self.states,
        ]

    def parts(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array, in the order in which an artifact holds them."""
        scales = {} if self.bits == 16 else {"scales": self.shape[:-1]}
        return {"codes": self.shape, **scales, **dict(sorted(self.extras.items()))}


@dataclass(frozen=True)
class Header:
    """What an artifact says of itself: the settings of its model, its sections in order, its tensors."""

    model: dict[str, Any]
    sections: tuple[SectionHeader, ...]
    tensors: tuple[TensorHeader, ...]

    @classmethod
    def parse(cls, packed: bytes) -> Header:
        """From the header's packed bytes. Errors: ArtifactError for a form that `pack` does not write."""
        try:
            fields = json.loads(zlib.decompressobj().decompress(packed, HEADER_LIMIT))
        except (zlib.error, ValueError, RecursionError):
            raise ArtifactError("its header is not packed JSON") from None
        kinds = dict(model=dict, sections=list, tensors=list)
        if type(fields) is not dict or {name: type(value) for name, value in fields.items()} != kinds:
            raise ArtifactError("its header does not have a model, sections and tensors")
        sections = tuple(map(SectionHeader.parse, fields["sections"]))
        tensors = tuple(map(TensorHeader.parse, fields["tensors"]))
        for what, names in (("section", [s.name for s in sections]), ("tensor", [t.name for t in tensors])):
            if len(set(names)) < len(names):
                raise ArtifactError(f"its header has a {what} twice")
        return cls(fields["model"], sections, tensors)

    def fields(self) -> dict[str, Any]:
        """The header as JSON holds it."""
        return dict(
            model=self.model, sections=[s.row() for s in self.sections], tensors=[t.row() for t in self.tensors]
        )

    def pack(self) -> bytes:
        return zlib.compress(json.dumps(self.fields(), separators=(",", ":"), allow_nan=False).encode(), 9)


def integer_banks(tensors: Iterable[TensorHeader]) -> dict[str, IntegerBank]:
    """The banks of integers that have a section of their own, by the section's name."""
    banks = {}
    for tensor in tensors:
        for part, shape in tensor.parts().items():
            dtype = part_dtype(part, tensor.bits)
            section = section_of(tensor.name, part, dtype, math.prod(shape))
            if section == f"{tensor.name}.{part}" and len(shape) in (2, 3):
                states = tensor.states if part == "codes" else 0
                *matrices, rows, columns = shape
                banks[section] = IntegerBank((matrices[0] if matrices else 1, rows, columns), states, dtype.type)
    return banks


def with_scales(
    banks: dict[str, IntegerBank], tensors: Iterable[TensorHeader], contents: Mapping[str, bytes | memoryview]
) -> dict[str, IntegerBank]:
    """The banks with the scales of their weights, from the contents of the sections that hold them.

    Errors: ArtifactError for a section that is too short.
    """
    places = dict.fromkeys(SCALE_SECTIONS, 0)
    hinted = dict(banks)
    for tensor in tensors:
        arrays = {}
        for part, shape in tensor.parts().items():
            if part in places:
                dtype = part_dtype(part, tensor.bits)
                stop = places[part] + math.prod(shape) * dtype.itemsize
                arrays[part] = np.frombuffer(section_content(contents, part, places[part], stop), dtype)
                places[part] = stop
        section = f"{tensor.name}.codes"
        if section in banks:
            hinted[section] = banks[section]._replace(scales=arrays.get("scales"), exponents=arrays.get("columns"))
    return hinted


def section_content(contents: Mapping[str, bytes | memoryview], section: str, start: int, stop: int):
    """A part of a section's content. Errors: ArtifactError where it is shorter."""
    content = contents.get(section, b"")
    if len(content) < stop:
        raise ArtifactError(f"its section {section!r} is too short for its tensors")
    return content[start:stop]


# --- Writing ---


def arrays_of(q: Quantized) -> Iterator[tuple[str, Tensor]]:
    """(name, array) of all that a stored tensor consists of, in the order in which an artifact holds them."""
    yield "codes", q.codes
    if q.scales is not None:
        yield "scales", q.scales
    yield from sorted(q.extras.items())


def pack(stored: dict[str, Quantized], config: Config, cache: dict[tuple[str, bytes], bytes] | None = None) -> bytes:
    """The artifact's bytes: prefix, header (model settings, sections, tensors), then the sections.

    A `cache` keeps packed sections by name and digest of what they are made of, for calls with the same cache.
    """
    contents: dict[str, list[bytes]] = {}
    for name, q in stored.items():
        for part, array in arrays_of(q):
            dtype = part_dtype(part, q.bits)
            content = array.cpu().contiguous().numpy().astype(dtype, copy=False).tobytes()
            contents.setdefault(section_of(name, part, dtype, array.numel()), []).append(content)
    tensors = tuple(TensorHeader.of(name, q) for name, q in stored.items())
    whole = {name: b"".join(parts) for name, parts in contents.items()}
    banks = with_scales(integer_banks(tensors), tensors, whole)
    sections, payload = [], []
    for name, content in whole.items():
        codec = config.compressor
        if CODECS[codec].integers_only and name not in banks:
            codec = "table" if name == "scales" else "brotli"
        key = (name, digest_of(codec, content, banks.get(name)))
        packed = cache[key] if cache is not None and key in cache else compress(codec, content, banks.get(name))
        if cache is not None:
            cache[key] = packed
        sections.append(SectionHeader(name, codec, len(packed), len(content), zlib.crc32(packed)))
        payload.append(packed)
    header = Header(dataclasses.asdict(config.model), tuple(sections), tensors).pack()
    return b"".join((PREFIX.pack(MAGIC, len(header), zlib.crc32(header)), header, *payload))


def digest_of(codec: str, content: bytes, bank: IntegerBank | None) -> bytes:
    """SHA-256 of all that a section's packed bytes depend on."""
    digest = hashlib.sha256(content)
    digest.update(codec.encode())
    if bank is not None:
        digest.update(repr((bank.shape, bank.states, bank.dtype)).encode())
        for scales in (bank.scales, bank.exponents):
            digest.update(b"" if scales is None else scales.tobytes())
    return digest.digest()


def pack_within(
    stored: dict[str, Quantized], residuals: list[Residual], limit: int, config: Config, log: Callable[[str], None]
) -> bytes:
    """The artifact with as many of the residuals, in their order, as `limit` bytes allow."""
    plain = data = pack(stored, config)
    free = limit - len(plain)
    chosen = []
    for residual in residuals:
        if residual.bytes <= free:
            chosen.append(residual)
            free -= residual.bytes
    while chosen and len(data := pack(with_residuals(stored, chosen), config)) > limit:
        chosen.pop()
    if residuals:
        names = " ".join(f"{r.name}[{r.matrix}]" for r in chosen)
        spent = len(data) - len(plain) if chosen else 0
        log(f"rvq:{len(chosen)} of {len(residuals)} matrices have a residual, {spent} bytes: {names}")
    return data if chosen else plain


LOG2_SCALE_RANGE = (-8.0, 8.0)  # how far TARGET_BYTES may move log2 of the scales
SAMPLED = 8  # one of so many rows is quantized to predict the bytes, more of them in small banks
LARGEST_SHIFT = 0.12  # octaves by which the scales of some banks may be moved alone, to meet the bytes exactly


def code_variances(weights: Tensor, name: str, factor: HessianFactor, config: Config) -> tuple[Tensor, Tensor]:
    """Variances of a bank's codes at the scales of offset 0: of rows [B, r, 1], times those of columns [B, 1, c]."""
    batch = as_batch(weights).float()
    bits, sigmas = quantization_bits(name, batch.numel(), config)
    scales, exponents = fit_scales(batch, factor, bits, sigmas, config, 1.0, 0, None)
    square = (batch / scales.float()[..., None] / torch.exp2(exponents.float() / 2)[:, None]).square()
    overall = square.mean((1, 2), keepdim=True).clamp_min(1e-30)
    return square.mean(2, keepdim=True), square.mean(1, keepdim=True) / overall


def gaussian_bits(row: Tensor, column: Tensor, offset: float) -> float:
    """An estimate of the bits of codes that are Gaussian deviates of variance v = row * column, at a log2 offset of
    their scales: log2(1 + 2 pi e v) / 2 each.
    """
    return torch.log2(1 + row * column * (2 * math.pi * math.e * 4**-offset)).sum().item() / 2


def solve_offset(bits_at: Callable[[float], float], bits: float) -> float:
    """The log2 offset of the scales at which falling `bits_at` gives `bits`, within LOG2_SCALE_RANGE; by bisection."""
    low, high = LOG2_SCALE_RANGE
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if bits_at(middle) > bits else (low, middle)
    return (low + high) / 2


def rows_of(q: Quantized, rows: slice) -> Quantized:
    """Some rows of each of a bank's matrices."""
    if q.scales is None:
        raise ValueError("no integers")
    return q._replace(codes=as_batch(q.codes)[:, rows], scales=q.scales.view(-1, q.codes.size(-2))[:, rows])


class Attempt(NamedTuple):
    """An artifact, and how it was made."""

    data: bytes
    excess: int  # bytes beyond the limit
    offset: float  # log2 of what all scales were multiplied with, before some were moved
    lines: list[str]  # of the log

    @property
    def rank(self) -> tuple[bool, int]:
        """Larger is better: one that fits, and then one nearer to the limit."""
        return self.excess <= 0, -abs(self.excess)


class ByteSearch:
    """Quantizes a model to fill a number of bytes to a thousandth, mostly in 1.2 quantizations of all weights.

    A model of the bits says where to begin, and a sample of rows, quantized and packed, corrects it. Then one bank
    after the other is quantized, and what each one really takes corrects the scales of those that follow. What is still
    missing or too much is met by the scales of some banks, where a small shift is enough.
    """

    def __init__(self, weights: dict[str, Tensor], calibration: Calibration, limit: int, config: Config):
        self.weights, self.config = weights, config
        self.limit, self.goal = limit, limit * (1 - 1 / 4000)
        self.factors = plan_quantization(weights, calibration, config)
        self.hessians = {name: calibration.hessians[name] for name in self.factors}  # not those of what stays fp16
        self.outputs = calibration.outputs
        self.salient = salient_columns(weights, self.hessians, config) if config.awq_groups else {}
        self.counts = {name: weights[name].numel() for name in self.factors}
        self.passes = 0.0  # quantizations of all weights; samples and single banks count in proportion
        self.every = {name: min(SAMPLED, max(1, n // (2 * OWN_SECTION))) for name, n in self.counts.items()}
        self.variances: dict[str, tuple[Tensor, Tensor]] = {}  # of the sampled rows
        self.shares: dict[str, float] = {}  # bits of all rows over what the model of the bits says of the sampled ones
        for name, every in self.every.items():
            row, column = code_variances(weights[name], name, self.factors[name], config)
            self.variances[name] = row[:, ::every], column
            self.shares[name] = gaussian_bits(row, column, 0.0) / max(gaussian_bits(row[:, ::every], column, 0.0), 1.0)
        self.stored = {n: encode_tensor(n, w, None, config) for n, w in weights.items() if n not in self.factors}
        self.other = 0.0  # bytes of all but the codes
        self.offset = 0.0  # log2 of what all scales are multiplied with
        self.offsets: dict[str, float] = {}  # of each bank, not far from that
        self.best: Attempt | None = None
        self.packed: dict[tuple[str, bytes], bytes] = {}

    def bits_of(self, name: str, offset: float) -> float:
        """An estimate of a bank's bits, which falls with the log2 offset of its scales."""
        return self.shares[name] * gaussian_bits(*self.variances[name], offset)

    def encode(self, name: str, offset: float, every: int = 1) -> Quantized:
        """One tensor, or some of its rows, with scales moved by `offset` octaves."""
        value, factor = self.weights[name], self.factors[name]
        if every > 1:
            value = as_batch(value)[:, ::every]
            steps = factor.log2_steps
            steps = None if steps is None else steps[:, ::every]
            factor = factor._replace(log2_steps=steps, row_cholesky=None)  # which is that of all rows
        self.passes += value.numel() / sum(self.counts.values())
        elements = self.counts[name]
        return encode_tensor(name, value, factor, self.config, offset, self.salient.get(name), elements)

    def sizes(self, stored: dict[str, Quantized]) -> dict[str, int]:
        """Packed bytes of each section."""
        return {s.name: s.packed_size for s in read_header(pack(stored, self.config, self.packed))[0].sections}

    def code_bytes(self, name: str, q: Quantized) -> int:
        """Bytes of a bank's codes, packed."""
        return self.sizes({name: q})[section_of(name, "codes", part_dtype("codes", q.bits), q.codes.numel())]

    def sample(self) -> None:
        """Corrects the model of the bits by a sample of rows at the scales that it gives.

        What a section takes however many rows it has, such as its columns' classes, is what two halves of the sample
        take beyond the whole of it. It is not multiplied.
        """
        begin = self.solve(list(self.counts), 8 * self.limit)
        sample = {name: self.encode(name, begin, every) for name, every in self.every.items()}
        halves = [{name: rows_of(q, slice(first, None, 2)) for name, q in sample.items()} for first in (0, 1)]

        def by_rows(whole: int, parts: list[int]) -> int:
            return min(max(2 * whole - sum(parts), 0), whole)

        self.other = len(pack({**self.stored, **sample}, self.config, self.packed))
        scales, *parts = (self.sizes(some).get("scales", 0) for some in (sample, *halves))
        times = sum(self.counts.values()) / sum(q.codes.numel() for q in sample.values())
        self.other += (times - 1) * by_rows(scales, parts)
        for name, q in sample.items():
            size = self.code_bytes(name, q)
            self.other -= size
            more = (self.shares[name] - 1) * by_rows(size, [self.code_bytes(name, half[name]) for half in halves])
            self.shares[name] *= 8 * max(size + more, 1) / max(self.bits_of(name, begin), 1.0)

    def encode_all(self) -> None:
        """Quantizes all banks, each with the scales by which it and those after it are expected to fill the bytes.

        The sample knows nothing of compensation between rows, which takes bits. So the banks that have it come first,
        and what it took in some of them is expected of the others. Larger banks are last, as they make up for more.
        """
        linked = {name for name in self.counts if self.factors[name].row_cholesky is not None}
        order = sorted(self.counts, key=lambda name: (name not in linked, self.counts[name]))
        room = 8 * (self.goal - self.other)
        self.offset = self.solve(order, room)
        while order:
            offset = self.solve(order, room)
            offset = min(max(offset, self.offset - LARGEST_SHIFT), self.offset + LARGEST_SHIFT)
            name = order.pop(0)
            room -= self.encode_bank(name, offset, linked.intersection(order) if name in linked else set())

    def solve(self, names: list[str], bits: float) -> float:
        """The offset at which some banks are expected to take so many bits."""
        return solve_offset(lambda offset: sum(self.bits_of(name, offset) for name in names), bits)

    def encode_bank(self, name: str, offset: float, alike: Iterable[str] = ()) -> float:
        """Quantizes a bank, and returns its bits. They correct what is expected of it, and of others that are alike."""
        self.stored[name], self.offsets[name] = self.encode(name, offset), offset
        bits = 8.0 * self.code_bytes(name, self.stored[name])
        ratio = max(bits, 1.0) / max(self.bits_of(name, offset), 1.0)
        for each in (name, *alike):
            self.shares[each] *= ratio
        return bits

    def attempt(self) -> int:
        """Packs what is stored, and returns its bytes beyond the limit."""
        lines: list[str] = []
        stored = {name: self.stored[name]._replace(extras=dict(self.stored[name].extras)) for name in self.weights}
        if self.config.lqer_enabled:
            correct_errors(stored, self.weights, self.hessians, self.config, lines.append, self.outputs)
        data = pack(stored, self.config, self.packed)
        attempt = Attempt(data, len(data) - self.limit, self.offset, lines)
        if self.best is None or attempt.rank > self.best.rank:
            self.best = attempt
        return attempt.excess

    def shift_some(self, excess: float) -> bool:
        """Moves the scales of as few weights as LARGEST_SHIFT allows, if not of all, to save so many bytes."""
        octave = {
            n: 8 * (self.bits_of(n, offset) - self.bits_of(n, offset + 1 / 8)) for n, offset in self.offsets.items()
        }
        groups = []
        for size in range(1, len(octave)):
            for group in itertools.combinations(octave, size):
                shift = 8 * excess / max(sum(octave[name] for name in group), 1.0)
                if all(abs(self.offsets[name] + shift - self.offset) <= LARGEST_SHIFT for name in group):
                    groups.append((sum(self.counts[name] for name in group), shift, group))
        if not groups:
            return False
        _, shift, group = min(groups)
        for name in group:
            self.encode_bank(name, self.offsets[name] + shift)
        return True

    def run(self, log: Callable[[str], None]) -> bytes:
        """The artifact. Where no scales meet the limit, it is larger, or smaller by more than a thousandth."""
        self.sample()
        moved, tries = False, 0
        while tries < 12:
            if not moved:
                before = dict(self.offsets)
                self.encode_all()
            excess = self.attempt()
            tries += 1
            codes = sum(self.bits_of(name, offset) for name, offset in self.offsets.items()) / 8
            self.other = excess + self.limit - codes
            if -self.limit / 1000 <= excess <= 0 or (not moved and self.offsets == before):
                break
            moved = self.shift_some(excess + self.limit - self.goal)
        if self.best is None:
            raise RuntimeError("no attempt was made")
        for line in self.best.lines:
            log(line)
        log(
            f"target:{len(self.best.data)} bytes of {self.limit} for the model, scale x{2**self.best.offset:.4f}, "
            f"{self.passes:.2f} passes, packed {tries} times"
        )
        return self.best.data


def quantize_within(
    weights: dict[str, Tensor], calibration: Calibration, limit: int, config: Config, log: Callable[[str], None]
) -> bytes:
    """The artifact by TARGET_BYTES: its scales as small as `limit` bytes allow, to a thousandth of the bytes."""
    with torch.no_grad():
        return ByteSearch(weights, calibration, limit, config).run(log)


def pruned(weights: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Weights with the smallest PRUNE_PCT of each quantized matrix at 0. GPTQ may move some away from it again."""
    result = dict(weights)
    for name, w in weights.items():
        if quantization_bits(name, w.numel(), config)[0] < 16:
            magnitudes = as_batch(w).abs()
            count = round(config.prune_pct * magnitudes[0].numel())
            if count:
                largest = magnitudes.flatten(1).kthvalue(count, dim=1).values[:, None, None]
                result[name] = (as_batch(w) * (magnitudes > largest)).view(w.shape)
    return result


def make_artifact(
    weights: dict[str, Tensor],
    calibration: Calibration,
    limit_bytes: int,
    config: Config,
    log: Callable[[str], None],
) -> bytes:
    """Quantizes and packs a model. Scales (TARGET_BYTES) or residuals (RVQ) fill the limit, which excludes the code.

    Without either, the artifact may be larger than the limit.
    """
    weights = pruned(weights, config) if config.prune_pct else weights
    if config.target_bytes:
        return quantize_within(weights, calibration, limit_bytes, config, log)
    stored = quantize(weights, calibration, config, log)
    residuals = fit_residuals(stored, weights, calibration.hessians, config) if config.rvq_enabled else []
    return pack_within(stored, residuals, limit_bytes, config, log)


def size_table(
    data: bytes, stored: dict[str, Quantized], weights: dict[str, Tensor], hessians: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """One row for each section of an artifact: elements, bits, entropy and packed bits per element, bytes, error.

    The relative error is tr(E H E^T) / tr(W H W^T) of what is stored: the share of the outputs' power that is lost.
    """
    rows = []
    for section in read_header(data)[0].sections:
        row = dict(section=section.name, bytes=section.packed_size, unpacked_bytes=section.size)
        name, _, part = section.name.partition(".")
        if part == "codes":
            q = stored[name]
            elements = q.codes.numel()
            row |= dict(elements=elements, bits=q.bits, states=q.states, entropy=entropy(q.codes))
            row |= dict(packed_bits=8 * section.packed_size / elements)
            if name in hessians:
                row |= dict(relative_error=relative_error(q, weights[name], hessians[name]))
        rows.append(row)
    return rows


def relative_error(q: Quantized, weights: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T), summed over a bank's matrices."""
    w = as_batch(weights).float()
    restored = as_batch(restore(q)).to(w.device)  # read back on the CPU; the weights may be on a GPU
    lost, power = (weighted_error(x, hessian).sum().item() for x in (w - restored, w))
    return lost / power if power else 0.0  # without power nothing is lost: a matrix that is still zero


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """`size_table` as aligned lines."""
    lines = [f"{'section':<22}{'elements':>10}{'bits':>6}{'entropy':>9}{'packed':>8}{'bytes':>10}{'error':>11}"]
    for row in rows:
        codes = " " * 33
        if "bits" in row:
            codes = f"{row['elements']:>10}{row['bits']:>6}{row['entropy']:>9.4f}{row['packed_bits']:>8.4f}"
        error = f"{row['relative_error']:>11.3e}" if "relative_error" in row else ""
        lines.append(f"{row['section']:<22}{codes}{row['bytes']:>10}{error}")
    return lines


# --- Reading ---


def read_header(data: bytes) -> tuple[Header, int]:
    """The header and the offset of the first section. Errors: ArtifactError."""
    if len(data) < PREFIX.size or data[:8] != MAGIC:
        raise ArtifactError("is not an artifact of this program (or of another version)")
    _, length, checksum = PREFIX.unpack_from(data)
    packed = data[PREFIX.size : PREFIX.size + length]
    if len(packed) != length or zlib.crc32(packed) != checksum:
        raise ArtifactError("is damaged: the header's checksum does not match")
    return Header.parse(packed), PREFIX.size + length


def read_sections(data: bytes, header: Header, offset: int) -> dict[str, memoryview]:
    """Section -> unpacked bytes. Errors: ArtifactError for lengths and checksums that do not match."""
    size = sum(section.size for section in header.sections)
    limit = min(CONTENT_LIMIT, max(SMALL_CONTENT, CONTENT_RATIO * len(data)))
    if size > limit:
        raise ArtifactError(f"claims {size} bytes of content, which is more than {limit}")
    packed: dict[str, bytes] = {}
    for section in header.sections:
        packed[section.name] = data[offset : offset + section.packed_size]
        offset += section.packed_size
        if len(packed[section.name]) != section.packed_size or zlib.crc32(packed[section.name]) != section.checksum:
            raise ArtifactError(f"is damaged: the checksum of its section {section.name!r} does not match")
    if offset != len(data):
        raise ArtifactError(f"has {len(data) - offset} bytes too many")
    banks = integer_banks(header.tensors)
    contents: dict[str, memoryview] = {}
    for coded in (False, True):  # scales first: the banks need them
        if coded:
            banks = with_scales(banks, header.tensors, contents)
        for section in header.sections:
            if (section.name in banks) == coded:
                bank = banks.get(section.name)
                content = decompress(section.codec, packed[section.name], section.size, bank)
                contents[section.name] = memoryview(content)
    return contents


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Quantized]]:
    """(model settings, stored tensors) of `pack`'s bytes. Errors: ArtifactError, for any damage."""
    header, offset = read_header(data)
    contents = read_sections(data, header, offset)
    stored = {}
    for tensor in header.tensors:
        arrays = {}
        for part, shape in tensor.parts().items():
            dtype = part_dtype(part, tensor.bits)
            section = section_of(tensor.name, part, dtype, math.prod(shape))
            size = math.prod(shape) * dtype.itemsize
            content = section_content(contents, section, 0, size)
            contents[section] = memoryview(contents.get(section, b""))[size:]
            numbers = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))
            arrays[part] = torch.from_numpy(numbers).view(shape)
        codes, scales = arrays.pop("codes"), arrays.pop("scales", None)
        stored[tensor.name] = Quantized(codes, scales, tensor.bits, arrays, tensor.states)
    unused = [section for section, content in contents.items() if len(content)]
    if unused:
        raise ArtifactError(f"its tensors do not fill its sections {unused}")
    return header.model, stored


# --- Loading ---


def parse_model_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The model settings of an artifact, each of the right type. Errors: ArtifactError."""
    kinds = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    fields = {f.name: f for f in dataclasses.fields(ModelConfig)}
    if set(values) != set(fields):
        raise ArtifactError("its model settings are not those of this program")
    settings = {}
    for name, value in values.items():
        kind = str(fields[name].type)
        if type(value) not in kinds[kind]:
            raise ArtifactError(f"its {name.upper()} is not of type {kind}")
        if kind == "str" and not (value.isascii() and value.isprintable() and len(value) <= TEXT_LIMIT):
            raise ArtifactError(f"its {name.upper()} is not a text of at most {TEXT_LIMIT} ASCII characters")
        if kind == "float":
            if not -sys.float_info.max <= value <= sys.float_info.max or (type(value) is int and abs(value) > 1 << 53):
                raise ArtifactError(f"its {name.upper()} is not a finite number")
            value = float(value)
        settings[name] = value
    return settings


def read_artifact(path: Path) -> bytes:
    """The bytes of an artifact's file. Errors: ArtifactError for one that is too large to be read, or cannot be."""
    try:
        size = path.stat().st_size
        if size > FILE_LIMIT:
            raise ArtifactError(f"has {size} bytes, and at most {FILE_LIMIT} are read")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None


def artifact_config(values: dict[str, Any], config: Config, explicit: set[str]) -> Config:
    """The config with an artifact's model settings, each of the right type and allowed.

    Errors: ArtifactError for settings that no run can have; ConfigError where a knob was set to something else.
    """
    settings = parse_model_settings(values)
    for name, value in settings.items():
        if name in explicit and getattr(config, name) != value:
            raise ConfigError(name.upper(), getattr(config, name), f"the artifact was made with {value}")
    try:
        for f in dataclasses.fields(ModelConfig):
            check_allowed(f.name.upper(), settings[f.name], f.metadata)
    except ConfigError as error:
        raise ArtifactError(f"holds a model that is not possible: {error}") from None
    config = dataclasses.replace(config, **settings)
    if not tables_fit(config):  # nothing in a file pays for its rotary tables
        raise ArtifactError(f"claims sequences of {config.train_seq_len} tokens: TRAIN_SEQ_LEN {TABLES_ALLOWED}")
    check_config(dataclasses.replace(config, mode="eval"))
    if config.yarn:  # a longer context than the training's needs longer wavelengths
        config = dataclasses.replace(config, yarn_max_len=max(config.yarn_max_len, config.longest_context))
    return config


def load_artifact(data: bytes, config: Config, explicit: set[str], device: torch.device) -> tuple[GPT, Config]:
    """The model that an artifact holds, and the config with the artifact's model settings.

    Errors: ArtifactError for a damaged file; ConfigError where a knob was set to what the artifact is not.
    """
    header, _ = read_header(data)
    config = artifact_config(header.model, config, explicit)
    model = meta_model(config)
    expected = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    if [(tensor.name, tensor.shape) for tensor in header.tensors] != expected:
        raise ArtifactError("its tensors are not those of its model")
    stored = unpack(data)[1]
    for name, q in stored.items():
        try:
            check_stored(q)
        except ValueError as error:
            raise ArtifactError(f"its tensor {name!r} is not possible: {error}") from None
    weights = dequantize(stored)
    model.to_empty(device=device)
    with torch.no_grad():
        cos, sin = rotary_tables(model.config, model.cos.size(0))
        model.cos.copy_(cos)
        model.sin.copy_(sin)
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return model, config


def load_packer(path: Path) -> Callable[[bytes], bytes]:
    """`pack` of tools/pack_code.py: the bytes of a script -> the bytes of the script that ships.

    Its errors: ImportError without the minifier; SyntaxError or ValueError for what is not Python.
    """
    spec = importlib.util.spec_from_file_location("pack_code", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pack


@functools.cache
def shipped_code() -> tuple[int, str]:
    """Bytes of this program as it ships, and the form that was counted: packed, where the packer is beside it.

    A script without the packer beside it is packed already, or ships as it is.
    """
    file = Path(__file__)
    packer = file.resolve().parent / "tools" / "pack_code.py"
    if not os.path.isfile(packer):
        return file.stat().st_size, "as it runs"
    try:
        return len(load_packer(packer)(file.read_bytes())), "packed by tools/pack_code.py"
    except Exception as error:  # a training must not end for want of a count
        return file.stat().st_size, f"not packed ({error!r})"


def sizes(model_bytes: int, config: Config, run: Run) -> dict[str, Any]:
    """The summary's rows about bytes: what counts toward the limit is the code, as it ships, and the model."""
    code, form = run.broadcast_object(shipped_code() if run.is_main else None)
    return dict(
        code_bytes=code,
        code_form=form,
        model_bytes=model_bytes,
        artifact_bytes=code + model_bytes,
        artifact_limit_bytes=config.artifact_limit_bytes,
    )


# ---------------------------------------------------------------------------------------------------------------
# Evaluation: sliding windows inside documents, every target once
# ---------------------------------------------------------------------------------------------------------------


class IllegalScore(Exception):
    """A score that would break a rule of the challenge: a target scored twice, never, or after it was trained on."""


def document_offsets(tokens: np.ndarray) -> np.ndarray:
    """Where documents begin in a stream of tokens, and the last target's position: [documents + 1] int64.

    A document's inputs run from its BOS to just before the next BOS, which is its last target.
    """
    return np.append(np.flatnonzero(tokens[:-1] == BOS_ID), len(tokens) - 1)


def evaluation_windows(offsets: np.ndarray, context: int, stride: int, chunk: int = 0) -> np.ndarray:
    """Windows [n, 3] of (first input, inputs, first scored input): each target of each document is scored once.

    A document's first window scores all its targets; each next one adds `stride` targets with `context` inputs. With
    `chunk`, no window scores on both sides of a multiple of it in the stream.
    """
    windows = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        scored = begin
        while scored < end:
            stop = max(begin + context, scored + stride)
            if chunk:
                stop = min(stop, scored - scored % chunk + chunk)
            first = max(begin, stop - context)  # before the end is looked at: a score must not know where that is
            stop = min(stop, end)
            windows.append((first, stop - first, scored - first))
            scored = stop
    return np.array(windows, dtype=np.int64)


def pack_sequences(windows: np.ndarray, context: int) -> list[list[int]]:
    """Packs windows into sequences of `context` inputs: longest first, each where least room stays (best fit)."""
    sequences: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(context + 1)]  # sequences by the room that is left in them
    rooms = 0  # bit b is set where some sequence has room for b inputs
    for index in np.argsort(-windows[:, 1], kind="stable").tolist():
        length = int(windows[index, 1])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = by_room[room].pop()
            rooms &= -1 if by_room[room] else ~(1 << room)
        else:
            room, sequence = context, len(sequences)
            sequences.append([])
        sequences[sequence].append(index)
        if room > length:
            by_room[room - length].append(sequence)
            rooms |= 1 << (room - length)
    return sequences


# --- Hints from repetition ---


class Hints(NamedTuple):
    """For each target what followed the longest earlier run of tokens like the one before it.

    Both follow from tokens before the target alone.
    """

    tokens: np.ndarray  # [targets] uint16; 0 without a hint
    kinds: np.ndarray  # [targets] uint8: 1 + place of the run's length in `hint_lengths`; 0: no hint


def hint_lengths(config: Config) -> list[int]:
    """Lengths of runs that are looked for: HINT_MIN_MATCH times 1, 1.5, 2, 3, 4, 6, ..., up to HINT_MAX_MATCH."""
    low, high = config.hint_min_match, config.hint_max_match
    powers = [low << k for k in range((high // low).bit_length())]
    return sorted({n for power in powers for n in (power, power * 3 // 2) if n <= high})


HASH_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse among 64-bit numbers


class Runs:
    """All runs of a stream of tokens, each known by its last place and its length.

    Hashes come from a sum of powers over the tokens: a run's is a difference of two sums.
    """

    def __init__(self, tokens: np.ndarray):
        self.words = tokens.astype(np.uint64) << np.uint64(48)  # each token and the three before it
        self.words[1:] |= self.words[:-1] >> np.uint64(16)
        self.words[2:] |= self.words[:-2] >> np.uint64(32)
        codes = np.random.default_rng(0).integers(1, 1 << 63, 1 << 16, dtype=np.uint64)
        self.sums = np.zeros(len(tokens) + 1, np.uint64)
        powers = np.cumprod(np.full(len(tokens), HASH_BASE, np.uint64))
        np.cumsum(np.multiply(powers, codes[tokens], out=powers), out=self.sums[1:])
        del powers
        self.inverse = np.cumprod(np.full(len(tokens), pow(HASH_BASE, -1, 1 << 64), np.uint64))

    def hashes(self, ends: np.ndarray, length: int) -> np.ndarray:
        """Hashes [n] uint64 of the runs of a length that end at these places [n]. The upper half is well mixed."""
        differences = self.sums[ends + 1] - self.sums[ends + 1 - length]
        return differences * self.inverse[ends] * np.uint64(0xD6E8FEB86659FD93)

    def equal(self, first: np.ndarray, second: np.ndarray, length: int) -> np.ndarray:
        """The numbers of those pairs of runs, which end at these places [n] each, that have the same tokens."""
        pairs = np.arange(len(first))
        for back in range(0, length, 4):
            rest = np.uint64(16 * max(0, 4 - (length - back)))
            wrong = self.words[first[pairs] - back] ^ self.words[second[pairs] - back]
            pairs = pairs[wrong >> rest == 0]
        return pairs


def earlier_runs(ends: np.ndarray, hashes: np.ndarray, begins: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs whose hash occurs more than once: where each ends, and where the latest one before it does, or -1.

    The earlier one lies in the same document, or in an earlier chunk of the stream. ends, hashes [n]; begins [targets]:
    where each place's document begins. A place and a hash have 32 bits each whatever the stream's length is: it must
    not decide which hashes collide.
    """
    half = np.uint64(32)
    keys = (hashes >> half << half) | ends.astype(np.uint64)
    keys.sort()
    alike = (keys[1:] ^ keys[:-1]) >> half == 0
    several = np.zeros(len(keys), bool)
    several[1:] |= alike
    several[:-1] |= alike
    keys = keys[several]
    places = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    alike, new_chunk = np.zeros(len(keys), bool), np.ones(len(keys), bool)
    alike[1:] = (keys[1:] ^ keys[:-1]) >> half == 0
    new_chunk[1:] = np.diff(places // chunk) != 0
    previous = np.append(-1, places[:-1]) if len(places) else places
    # The run before the first one of this chunk and this hash ends the chunks before.
    first = np.maximum.accumulate(np.where(new_chunk | ~alike, np.arange(len(keys)), 0))
    past = np.where(alike[first], previous[first], -1)
    return places, np.where(alike & (previous >= begins[places]), previous, past)


HINT_PARTS = 32  # whatever the threads are: it decides which hashes can collide


def find_hints(tokens: np.ndarray, documents: np.ndarray, config: Config, threads: int = 1) -> Hints:
    """The hint of every target, in time that is linear in the tokens but for a sort.

    A run lies within a document, and ends with the target's input. The longest one counts; of several the latest.
    Runs that are alike end alike. So places fall into parts by the hash of the shortest run there, and each part is
    searched by itself: small sorts stay in the cache, and threads share the parts.
    """
    inputs, lengths = tokens[:-1], hint_lengths(config)
    begins = np.repeat(documents[:-1], np.diff(documents))
    found = Hints(np.zeros(len(inputs), np.uint16), np.zeros(len(inputs), np.uint8))
    runs = Runs(inputs)
    places = np.flatnonzero(np.arange(len(inputs)) - begins >= lengths[0] - 1)
    part_of = (runs.hashes(places, lengths[0]) // np.uint64((1 << 64) // HINT_PARTS)).astype(np.uint8)

    def search(part: int) -> None:
        ends = places[part_of == part]
        for kind, length in enumerate(lengths, 1):
            ends = ends[ends - begins[ends] >= length - 1]
            ends, earlier = earlier_runs(ends, runs.hashes(ends, length), begins, config.hint_chunk_tokens)
            matched, source = ends[earlier >= 0], earlier[earlier >= 0]
            same = runs.equal(matched, source, length)  # equal hashes are no proof
            found.tokens[matched[same]], found.kinds[matched[same]] = tokens[source[same] + 1], kind

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(search, range(HINT_PARTS)))
    return found


# Bounds of the model's own probability of a hint. The classes between them have weights of their own.
HINT_CHANCES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.99)
HINT_PRIOR = 4.0  # curvature that a weight begins with: so many uncertain hits of a coin


class HintWeights:
    """What is added to the logit of a hint, by the run's length and the model's own probability of the hint.

    With w added to the logit of h, and q the probability of h before, the distribution is that of
    NLL + log(1 + q(e^w - 1)) - w[target = h], over the whole vocabulary. Its gradient in w is p - [target = h], where p
    is the probability of h after. Newton steps on scored targets move w, at most by 1 each.
    """

    def __init__(self, kinds: int, lr: float):
        self.classes = len(HINT_CHANCES) + 1
        self.lr, self.w = lr, np.zeros(kinds * self.classes)
        self.curvature = np.full(len(self.w), HINT_PRIOR)

    def buckets(self, kinds: np.ndarray, log_q: np.ndarray) -> np.ndarray:
        """The number of each hint's weight [n], from its kind, from 1 on, and the logarithm of q."""
        chance = np.searchsorted(np.log(HINT_CHANCES), log_q, side="right")
        return (kinds.astype(np.int64) - 1) * self.classes + chance

    def score(self, buckets: np.ndarray, q: np.ndarray, nll: np.ndarray, right: np.ndarray) -> np.ndarray:
        """NLL [n] after the hints, in float64. right: the target is its hint, whose q is e^-NLL."""
        w = self.w[buckets]
        others = nll + np.log1p(q * np.expm1(w))
        # The same for the hint itself, without a difference of large numbers.
        return np.where(right, np.log1p(np.expm1(nll) * np.exp(-w)), np.maximum(others, 0))

    def learn(self, buckets: np.ndarray, q: np.ndarray, right: np.ndarray) -> None:
        """A step on hints whose targets are scored."""
        odds = np.exp(self.w[buckets])
        p = q * odds / (1 + q * (odds - 1))
        self.curvature += np.bincount(buckets, p * (1 - p), len(self.w))
        gradient = np.bincount(buckets, p - right, len(self.w))
        self.w -= np.clip(self.lr * gradient / self.curvature, -1, 1)


def with_hints(nll: np.ndarray, log_q: np.ndarray, tokens: np.ndarray, hints: Hints, config: Config) -> np.ndarray:
    """Scores [targets] with hints, in stream order: each chunk is scored, then the weights learn from it.

    nll, log_q [targets]: scores without hints, and the log-probabilities of the hints in the same distributions.
    """
    found = np.flatnonzero(hints.kinds)
    weights = HintWeights(len(hint_lengths(config)), config.hint_lr)
    out, right = nll.astype(np.float64), hints.tokens[found] == tokens[found + 1]
    own, logs = out[found], np.minimum(log_q[found].astype(np.float64), 0)
    buckets, q = weights.buckets(hints.kinds[found], logs), np.exp(logs)
    chunks = np.flatnonzero(np.diff(found // config.hint_chunk_tokens)) + 1
    for begin, end in itertools.pairwise((0, *chunks.tolist(), len(found))):
        chunk = slice(begin, end)
        out[found[chunk]] = weights.score(buckets[chunk], q[chunk], own[chunk], right[chunk])
        weights.learn(buckets[chunk], q[chunk], right[chunk])
    return out.astype(nll.dtype)


EVALUATION_STAGES = ("unpack", "evaluate", "ttt")  # they share the challenge's ten minutes of evaluation


class ScoreLedger:
    """Every target's score, entered once and before anything trains on the target. Errors: IllegalScore otherwise.

    A target is known by its input's position in the stream. Ranks enter what they score; `share` merges it. `hinted`:
    with each score comes the log-probability of the target's hint.
    """

    def __init__(self, evaluator: Evaluator, hinted: bool = False):
        self.run, targets = evaluator.run, len(evaluator.tokens) - 1
        self.evaluator, self.hinted = evaluator, hinted
        self.write_scores = evaluator.config.eval_scores
        self.nll = np.zeros(targets, np.float64 if evaluator.config.compute_dtype == "float64" else np.float32)
        self.log_q = np.zeros(targets if hinted else 0, self.nll.dtype)  # of each target's hint
        self.own_counts = np.zeros(targets, np.uint8)  # times that this rank scored a target
        self.all_counts = np.zeros(targets, np.uint8)  # times that all ranks did, when they last shared
        # Places, positions, NLL and the hints' log-probabilities that are not here yet.
        self.waiting: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor | None]] = []

    def hints_at(self, positions: np.ndarray) -> Tensor | None:
        """The hints [...] of the targets at positions [...], on the device, or None if this ledger has none."""
        if not self.hinted:
            return None
        found, places = np.zeros(positions.shape, np.int64), positions >= 0
        if places.any():  # what is compiled before the clock starts must not look at the text
            found[places] = self.evaluator.hints.tokens[positions[places]]
        return send_array(found, self.run.device)

    def score(self, positions: np.ndarray, nll: Tensor, log_q: Tensor | None = None) -> None:
        """Enters the scores nll [...] of the targets at positions [...]; -1 marks a place that is not scored.

        log_q [...]: log-probabilities of the targets' hints, if this ledger has hints.
        """
        places = positions >= 0
        positions = positions[places]
        np.add.at(self.own_counts, positions, 1)  # a target that is listed twice here counts twice
        if (self.own_counts[positions] != 1).any():
            raise IllegalScore("a target was scored twice")
        self.waiting.append((places, positions, nll.detach(), log_q))
        if nll.device.type == "cpu" or len(self.waiting) == 512:
            self.fetch()

    def fetch(self) -> None:
        """Copies scores that wait on a GPU to the host, many at once: each copy waits for all that was queued."""
        for places, positions, nll, log_q in self.waiting:
            self.nll[positions] = nll.cpu().numpy()[places]
            if log_q is not None:
                self.log_q[positions] = log_q.cpu().numpy()[places]
        self.waiting.clear()

    def tensors(self) -> dict[str, Tensor]:
        """What this rank has scored, for a checkpoint."""
        self.fetch()
        scored = self.own_counts > 0
        hints = dict(log_q=torch.from_numpy(self.log_q[scored])) if self.hinted else {}
        return dict(scored=torch.from_numpy(np.packbits(scored)), nll=torch.from_numpy(self.nll[scored]), **hints)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Enters what was scored before the run was cut off."""
        scored = np.unpackbits(tensors["scored"].numpy(), count=len(self.nll)).astype(bool)
        self.own_counts += scored
        self.nll[scored] = tensors["nll"].numpy()
        if self.hinted:
            self.log_q[scored] = tensors["log_q"].numpy()

    def scored(self, positions: np.ndarray | int) -> np.ndarray:
        """Whether each target was scored, by this rank or, when the ranks last shared, by any."""
        return (self.own_counts[positions] | self.all_counts[positions]) > 0

    def train_on(self, positions: np.ndarray) -> None:
        """Declares that weights are about to train on these targets."""
        if not self.scored(positions).all():
            raise IllegalScore("a target would be trained on before it was scored")

    def share(self) -> None:
        """Merges over the ranks which targets have been scored."""
        self.all_counts = self.own_counts.copy()
        if self.run.world > 1:
            dist.all_reduce(torch.from_numpy(self.all_counts), group=self.run.control)

    def close(self, stage: str = "") -> float:
        """Nats of all targets, summed over ranks; exactly one rank must have scored each.

        With EVAL_SCORES, rank 0 writes the scores of a named stage.
        """
        self.fetch()
        self.share()
        wrong = int((self.all_counts != 1).sum())
        if wrong:
            raise IllegalScore(f"{wrong} targets were not scored exactly once")
        nats = torch.tensor(self.nll.sum(dtype=np.float64))
        if self.run.world > 1:
            dist.all_reduce(nats, group=self.run.control)
        if stage and self.write_scores and math.isfinite(nats):
            self.write(stage, self.of_all_ranks(self.nll))
        return nats.item()

    def replace(self, nll: np.ndarray, log_q: np.ndarray | None = None) -> None:
        """Takes other scores [targets] of all ranks in place of those that were entered."""
        own = self.own_counts > 0
        self.nll[own] = nll[own]
        if log_q is not None:
            self.log_q[own] = log_q[own]

    def of_all_ranks(self, scores: np.ndarray) -> np.ndarray:
        """Figures [targets] of all ranks, from those of this rank, which are 0 for what others scored."""
        merged = torch.from_numpy(scores.copy())
        if self.run.world > 1:
            dist.all_reduce(merged, group=self.run.control)
        return merged.numpy()

    def write(self, stage: str, scores: np.ndarray) -> None:
        """scores_<stage>.npy in the run's folder: float32 [targets], in stream order."""
        if self.run.is_main:
            file = io.BytesIO()
            np.save(file, scores.astype(np.float32))
            self.run.save(f"{self.run.prefix}scores_{stage}.npy", file.getvalue())


class StageFile(NamedTuple):
    """The name of a checkpoint of an evaluation stage: what one rank has scored, in a phase with fixed weights."""

    stage: str
    attempt: int
    phase: int
    number: int  # counts this rank's files
    rank: int
    world: int

    def __str__(self) -> str:
        return "{}-{:04d}-{:06d}-{:06d}-{}of{}.safetensors".format(*self)

    @classmethod
    def parse(cls, name: str) -> StageFile | None:
        """The parts of such a name; None for another one."""
        match = re.fullmatch(r"(\w+)-(\d+)-(\d+)-(\d+)-(\d+)of(\d+)\.safetensors", name)
        return cls(match[1], *map(int, match.groups()[1:])) if match else None


class StageState(NamedTuple):
    """Where an evaluation stage was cut off."""

    phase: int
    own: list[dict[str, Tensor]]  # what counts as scored by this rank
    seen: list[dict[str, Tensor]]  # the files of all ranks, or this rank's alone if there are as many ranks as before
    shared: dict[str, Tensor]  # what all ranks have in the phase: weights that have trained


class StageCheckpoints:
    """Checkpoints of an evaluation stage: each rank writes what it has scored, rank 0 also the weights of a phase.

    Ranks write at times of their own, but a phase begins for all at once, and each then writes a file. So a phase can
    be gone on from if it has a file of every rank, and the weights.
    """

    def __init__(self, run: Run, stage: str, ledger: ScoreLedger):
        self.run, self.stage = run, stage
        self.ledger = ledger
        self.files = run.checkpoints
        self.number, self.saved = 0, time.perf_counter()
        self.shared_phase = 0  # the last one whose weights rank 0 has written
        self.keep_from = 0  # phases before this one are not needed any more
        self.restored = 0  # targets that earlier attempts scored

    @property
    def folder(self) -> Path:
        """Where the files are, of a run that has some."""
        return cast(Checkpoints, self.files).folder

    def state(self, name: str) -> dict[str, Any]:
        """What a file has that is not of another name, another model or another validation stream."""
        artifact = self.run.artifact_sha256
        return dict(version=CHECKPOINT_VERSION, targets=len(self.ledger.nll), artifact=artifact, name=name)

    def shared_path(self, phase: int) -> Path:
        """The file of a phase's weights."""
        return self.folder / f"{self.stage}-weights-{phase:06d}.safetensors"

    def due(self) -> bool:
        """Whether it is time for this rank to write."""
        files = self.files
        return files is not None and time.perf_counter() - self.saved >= files.every and not files.busy

    def save(self, phase: int, own: Mapping[str, Tensor], shared: Mapping[str, Tensor] | None = None) -> None:
        """Writes what this rank has scored and has of its own and, on rank 0, the phase's weights if not yet done."""
        if self.files is None:
            return
        self.saved = time.perf_counter()
        if shared and self.run.is_main and phase > self.shared_phase:
            name = self.shared_path(phase).name
            self.files.save(name, shared, self.state(name), lambda: ())
            self.shared_phase = phase
        self.number += 1
        newest = StageFile(self.stage, self.run.attempts, phase, self.number, self.run.rank, self.run.world)
        tensors = {**self.ledger.tensors(), **own}
        self.files.save(str(newest), tensors, self.state(str(newest)), functools.partial(self.stale, newest))

    def begin_phase(self) -> None:
        """Ranks agree on which phases they need no more. All that any rank wrote is on the disk before."""
        if self.files is not None:
            self.files.flush()
            self.run.barrier()
            self.keep_from = int(self.run.broadcast(self.shared_phase))

    def names(self) -> Iterator[StageFile]:
        """The files of the stage."""
        for path in self.folder.glob(f"{self.stage}-*.safetensors"):
            name = StageFile.parse(path.name)
            if name and name.stage == self.stage:
                yield name

    def stale(self, newest: StageFile) -> list[Path]:
        """This rank's files that `newest` replaces: of phases that are not needed, and all but two of its own phase."""
        own = [n for n in self.names() if n.rank == newest.rank and n.attempt == newest.attempt]
        old = [n for n in own if n.phase < self.keep_from or (n.phase == newest.phase and n.number < newest.number - 1)]
        weights = [self.shared_path(phase) for phase in range(self.keep_from)] if newest.rank == 0 else []
        return [self.folder / str(name) for name in old] + weights

    def read(self, path: Path) -> dict[str, Tensor] | None:
        """The tensors of a file, or None if it is missing, damaged, renamed, or of another model or stream."""
        try:
            tensors, state = read_tensors(path)
        except (OSError, ValueError):
            return None
        return tensors if state == self.state(path.name) else None

    def newest(self, moving: bool) -> tuple[int, list[str]] | None:
        """The newest phase that can be gone on from, and the files of its ranks. `moving`: weights train."""
        by_phase: dict[tuple[int, int, int], list[StageFile]] = {}
        for name in self.names():
            by_phase.setdefault((name.attempt, name.phase, name.world), []).append(name)
        for (_, phase, world), names in sorted(by_phase.items(), reverse=True):
            if moving and phase and self.read(self.shared_path(phase)) is None:
                continue
            found = {n.rank: str(n) for n in sorted(names) if self.read(self.folder / str(n)) is not None}
            if len(found) == world:
                return phase, [found[rank] for rank in range(world)]
        return None

    def restore(self, moving: bool) -> StageState | None:
        """Where the stage was cut off, its scores entered in the ledger; None where it begins."""
        run = self.run
        if self.files is None or run.attempts == 1:
            return None
        found = run.broadcast_object(self.newest(moving) if run.is_main else None)
        if found is None:
            return None
        phase, names = found
        if len(names) == run.world:
            names = [names[run.rank]]
        seen = [self.read(self.folder / name) for name in names]
        shared = self.read(self.shared_path(phase)) if moving and phase else {}
        if None in run.gather(None if None in seen or shared is None else True):
            return None  # a rank does not see the files of the others: on several machines the folder must be shared
        seen = cast(list[dict[str, Tensor]], seen)
        own = seen if len(found[1]) == run.world or run.is_main else []
        for tensors in own:
            self.ledger.load(tensors)
        self.ledger.share()
        self.shared_phase = phase
        self.restored = int((self.ledger.all_counts > 0).sum())
        run.log(f"{self.stage}: resumed in phase {phase}, after {self.restored} of {len(self.ledger.nll)} targets")
        return StageState(phase, own, seen, cast(dict[str, Tensor], shared))


class ProgressMeter:
    """Progress of an evaluation stage: its projected seconds, before it starts and every half minute.

    One warning says that the evaluation will exceed its budget, to which all its stages count.
    """

    def __init__(self, run: Run, config: Config, stage: str, total: float):
        self.run, self.config = run, config
        self.stage = stage
        self.total, self.done = total, 0.0
        self.warned = False
        self.begin = self.last_line = time.perf_counter()
        self.first: tuple[float, float] | None = None  # work and time of the first advance, which may have compiled

    def project(self, seconds: float, work: str) -> None:
        """The line before the start. `seconds` were measured on a part that was computed and dropped."""
        self.run.log(f"{self.stage}: {work}, projected to take {seconds:.1f} s")
        self.warn_if_over_budget(seconds)

    def warn_if_over_budget(self, seconds: float) -> None:
        """The warning, once, where these seconds and those of earlier stages exceed the budget."""
        budget = self.config.eval_budget_seconds
        projected = sum(self.run.seconds.get(stage, 0.0) for stage in EVALUATION_STAGES) + seconds
        if budget and projected > budget and not self.warned:
            self.warned = True
            self.run.log(
                f"warning: EVAL_BUDGET_SECONDS={budget:g}: {self.stage} is projected to end after "
                f"{projected:.0f} s of evaluation, unpacking included"
            )

    def skip(self, work: float) -> None:
        """Takes out work that was finished before the run was cut off."""
        self.total -= work

    def advance(self, work: float) -> None:
        """Adds finished work, in the unit of `total`. Ranks advance alike, so rank 0 speaks for all."""
        self.done += work
        now = time.perf_counter()
        if self.first is None:
            self.first = self.done, now
            return
        elapsed = now - self.begin
        rate = (now - self.first[1]) / (self.done - self.first[0])
        remaining = rate * (self.total - self.done)
        if self.run.is_main:
            self.run.live.show(f"{self.stage}  {self.done / self.total:.0%}  ETA {clock(remaining)}")
        if now - self.last_line > 30:
            self.last_line = now
            self.run.log(f"{self.stage}:{self.done / self.total:.1%} elapsed:{elapsed:.0f}s eta:{remaining:.0f}s")
        if elapsed > 1:
            self.warn_if_over_budget(elapsed + remaining)


class Evaluator:
    """Validation stream, byte counts and the fixed list of batches, the same on any number of ranks."""

    def __init__(self, config: Config, run: Run):
        self.config, self.run = config, run
        self.stream, self.vocabulary = TokenStream(config, "val"), Vocabulary(config)
        self.notes: list[str] = []
        self.data_check = DataCheck(config, run, Manifest.read(Path(config.data_path)))
        self.data_check.validation(self.stream)
        self.data_check.refuse()  # ids beyond the vocabulary have no bytes
        self.tokens = self.stream.read(0, len(self.stream))
        sidecar = read_sidecar(config, self.stream)
        if sidecar is not None:
            check_sidecar(self.stream, sidecar, self.vocabulary)
            self.notes.append("bytes are those of the original text, by the shards' sidecar")
        self.bytes = count_bytes(self.tokens, sidecar, self.vocabulary)
        self.data_check.count_bytes("val", self.bytes)
        self.data_check.refuse()
        limit = config.val_token_limit
        if 0 < limit < len(self.tokens) - 1:
            self.notes.append(
                f"warning: VAL_TOKEN_LIMIT={limit} of {len(self.tokens) - 1} targets: this is no score of the challenge"
            )
            self.tokens, sidecar = self.tokens[: limit + 1], None if sidecar is None else sidecar[: limit + 1]
            self.bytes = count_bytes(self.tokens, sidecar, self.vocabulary)
        self.documents = document_offsets(self.tokens)
        self.windows = evaluation_windows(self.documents, config.eval_context, config.eval_step)
        if int((self.windows[:, 1] - self.windows[:, 2]).sum()) != len(self.tokens) - 1:
            raise IllegalScore("the windows of the evaluation do not cover every target once")
        self.sequences = pack_sequences(self.windows, config.eval_context)
        self.batch_size = min(config.eval_rows, len(self.sequences))
        self.hint_seconds = 0.0  # that finding the hints took
        if not self.data_check.rows["manifest"]:
            self.notes.append(
                f"{self.data_check.manifest.path} does not exist, so nothing says what the shards should hold"
            )

    @functools.cached_property
    def hints(self) -> Hints:
        """Each target's hint."""
        begin = time.perf_counter()
        found = find_hints(self.tokens, self.documents, self.config, core_share(self.config, self.run))
        self.hint_seconds = time.perf_counter() - begin
        return found

    def batches(self, sequences: list[list[int]]) -> list[list[list[int]]]:
        """Sequences (lists of windows) in groups of the batch size."""
        return [sequences[i : i + self.batch_size] for i in range(0, len(sequences), self.batch_size)]

    def batch(self, sequences: list[list[int]], windows: np.ndarray) -> tuple[Batch, np.ndarray]:
        """A batch of sequences, and for each place the input's position in the stream, or -1 for no score."""
        shape = (self.batch_size, self.config.eval_context)
        position = np.zeros(shape, np.int64)
        starts = np.zeros(shape, np.int32)
        scored = np.full(shape, -1, np.int64)
        for b, sequence in enumerate(sequences):
            place = 0
            for start, size, first in windows[sequence].tolist():
                position[b, place : place + size] = np.arange(start, start + size)
                starts[b, place : place + size] = place
                scored[b, place + first : place + size] = np.arange(start + first, start + size)
                place += size
            starts[b, place:] = place  # padding is a document of its own
        ids, targets = (self.tokens[p].astype(np.int64) for p in (position, position + 1))
        return to_device(ids, targets, starts, self.run.device), scored

    def first_scored(self, sequences: list[list[int]]) -> int:
        """The position of an input whose target a batch scores."""
        first, _, scored = self.windows[sequences[0][0]]
        return int(first + scored)

    def score_sequences(
        self,
        forward: Callable,
        sequences: list[list[int]],
        ledger: ScoreLedger,
        windows: np.ndarray | None = None,
    ) -> None:
        """Scores a batch of sequences of these windows (the evaluator's own), and enters the targets in the ledger."""
        batch, scored = self.batch(sequences, self.windows if windows is None else windows)
        nll, log_q = self.compute(forward, batch, ledger.hints_at(scored))
        ledger.score(scored, nll, log_q)

    def warm_up(self, forward: Callable) -> None:
        """Computes one batch of padding and drops it, so that what an evaluation needs is compiled."""
        batch = as_padding(self.batch(self.sequences[: self.batch_size], self.windows)[0])
        self.compute(forward, batch)
        if self.config.hint_enabled and (self.config.ttt_mode != "phased" or self.config.ttt_plain_weight):
            self.compute(forward, batch, batch.targets)  # phased TTT has windows of its own

    @torch.no_grad()
    def compute(self, forward: Callable, batch: Batch, hints: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """NLL [B, T] of a batch, and the log-probabilities [B, T] of hints [B, T] if there are some."""
        more = {} if hints is None else dict(hints=hints)
        nll, _, *log_q = forward(*batch, looped=self.config.loops, temperature=self.config.temperature, **more)
        return nll, log_q[0] if log_q else None

    def project(self, forward: Callable) -> None:
        """Logs the seconds that an evaluation will take, measured on one of its batches."""
        batches, config = len(self.batches(self.sequences)), self.config
        seconds = self.run.time_second_call(lambda: self.warm_up(forward)) * -(-batches // self.run.world)
        work = f"{len(self.windows)} windows of up to {config.eval_context} tokens, stride {config.eval_step}"
        ProgressMeter(self.run, config, "sliding", batches).project(seconds, f"{work}, {batches} batches")

    def __call__(
        self, forward: Callable, stage: str = "", resumable: bool = False, ledger: ScoreLedger | None = None
    ) -> Score:
        """Scores the whole validation stream, each target once. Ranks share the batches. Errors: IllegalScore.

        `stage` names the file of EVAL_SCORES. `resumable`: it goes on where an earlier attempt of this run was cut off,
        which needs the very same model. The scores are entered in `ledger`, or in a new one.
        """
        ledger, batches = ledger or ScoreLedger(self), self.batches(self.sequences)
        meter = ProgressMeter(self.run, self.config, "sliding", len(batches))
        kept = StageCheckpoints(self.run, stage, ledger) if resumable else None
        if kept:
            kept.restore(moving=False)
        for number in range(self.run.rank, len(batches), self.run.world):
            work = min(self.run.world, len(batches) - number)
            if ledger.scored(self.first_scored(batches[number])):
                meter.skip(work)
                continue
            self.score_sequences(forward, batches[number], ledger)
            meter.advance(work)
            if kept and kept.due():
                kept.save(0, {})
        return Score(ledger.close(stage), len(self.tokens) - 1, self.bytes)


# ---------------------------------------------------------------------------------------------------------------
# TTT: score, then adapt -> Score
# ---------------------------------------------------------------------------------------------------------------


class FullModelSGD:
    """SGD of all weights on scored text. Ranks share a step's sequences and sum their gradients."""

    def __init__(
        self,
        evaluator: Evaluator,
        model: GPT,
        ledger: ScoreLedger,
        momentum: float,
        frozen_blocks: int = 0,
        clip: float = 1.0,
        adamw: bool = False,
    ):
        self.config, self.run = evaluator.config, evaluator.run
        self.tokens, self.ledger = evaluator.tokens, ledger
        self.model, self.frozen_blocks = model, frozen_blocks
        self.max_norm = clip
        self.forward = compiled_forward(model)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
        if adamw:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)

    def batches(self, positions: np.ndarray) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's sequences of a step on the targets of the inputs at `positions` [n], and a mask of its places."""
        length = self.config.train_seq_len
        padded = np.full(-(-len(positions) // length) * length, -1)
        padded[: len(positions)] = positions
        own = padded.reshape(-1, length)[self.run.rank :: self.run.world]
        micro_batch = max(1, self.config.micro_batch_tokens // length)
        for places in (own[i : i + micro_batch] for i in range(0, len(own), micro_batch)):
            inside = np.maximum(places, 0)
            ids = np.where(places < 0, BOS_ID, self.tokens[inside]).astype(np.int64)  # padding: one-token documents
            targets = self.tokens[inside + 1].astype(np.int64)
            yield (
                to_device(ids, targets, document_starts(ids), self.run.device),
                send_array(places >= 0, self.run.device),
            )

    def step(self, positions: np.ndarray, lr: float) -> None:
        """One step on the mean loss of these targets, its gradient clipped."""
        self.ledger.train_on(positions)
        parameters = list(self.model.parameters())
        self.optimizer.zero_grad()
        for batch, counted in self.batches(positions):
            nll, _ = self.forward(*batch, looped=self.config.loops)
            ((nll * counted).sum() / len(positions)).backward()
        for p in parameters:
            if p.grad is None:  # no sequence of the step is this rank's, or the execution order does not reach it
                p.grad = torch.zeros_like(p)
        self.run.all_reduce_flat([gradient_of(p) for p in parameters])
        self.zero_frozen_gradients()
        if self.max_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Weights and the optimizer's state, by name."""
        tensors = named_weights(self.model)
        for name, p in self.model.named_parameters():
            kept = self.optimizer.state.get(p, {}).items()
            tensors |= {f"{key}.{name}": value for key, value in kept if isinstance(value, Tensor)}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        load_weights(self.model, tensors)
        for name, p in self.model.named_parameters():
            for key in ("momentum_buffer", "step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in tensors:
                    value = tensors[f"{key}.{name}"]
                    self.optimizer.state[p][key] = value.to("cpu" if key == "step" else p.device)

    def drop_step(self, batch: Batch) -> None:
        """Computes the gradients of a micro-batch, and drops them."""
        nll, _ = self.forward(*batch, looped=self.config.loops)
        torch.autograd.grad(nll.sum(), list(self.model.parameters()), allow_unused=True)

    def warm_up(self, tokens: int) -> None:
        """Computes the micro-batches of a step on so many tokens, as padding, so that they are compiled."""
        for batch, _ in self.batches(np.zeros(tokens, np.int64)):
            self.drop_step(as_padding(batch))

    def seconds_per_token(self, tokens: int) -> float:
        """Seconds of a forward and backward pass for each token, on padding.

        Compiled, it takes the first micro-batch of a step, whose graph is there; else one sequence, which is quicker.
        """
        least = self.run.world * self.config.train_seq_len  # so that every rank has some
        tokens = max(tokens, least) if self.model.runtime.compile else least
        batch = as_padding(next(self.batches(np.zeros(tokens, np.int64)))[0])
        return self.run.time_second_call(lambda: self.drop_step(batch)) / batch.ids.numel()

    def zero_frozen_gradients(self) -> None:
        """Zeroes the gradients of the frozen first blocks: their vectors, and their matrices in the banks."""
        if self.frozen_blocks:
            for block in self.model.blocks[: self.frozen_blocks]:
                for p in block.parameters():
                    gradient_of(p).zero_()
            for bank in (getattr(self.model, name) for name in BANKS):
                bank.grad.unflatten(0, (-1, self.config.num_layers))[:, : self.frozen_blocks].zero_()


def cosine(step: int, steps: int) -> float:
    """A cosine decay: 1 at step 0, toward 0 at `steps`."""
    return 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


def deal(costs: np.ndarray, ranks: int) -> np.ndarray:
    """The rank [n] that each item goes to: in their order, each to the rank whose costs are the least so far."""
    loads, owners = [(0, rank) for rank in range(ranks)], []
    for cost in costs.tolist():
        load, rank = loads[0]
        owners.append(rank)
        heapq.heapreplace(loads, (load + cost, rank))
    return np.array(owners, np.int64)


EnterScores = Callable[..., None]  # takes a window's NLL [B, last], and the hints' log-probabilities or None


class TTTWindow(NamedTuple):
    """A chunk of some documents with its context: all tensors that differ between windows of the same shapes."""

    batch: Batch  # ids [B, T], targets [B, last]
    counted: Tensor  # [n, last] bool: places from which the adapters of the first n documents learn
    learned: np.ndarray  # positions of the inputs of these places, for the ledger
    hints: Tensor | None  # [B, last]
    past: Past | None  # context from a cache
    slots: Tensor | None  # of the cache, that take the window's own keys and values


def tensors_in(window: TTTWindow) -> list[Tensor]:
    """The tensors of a window that it does not share with others: all but the cache's."""
    batch, past = window.batch, window.past
    masks = () if past is None else (past.mask, past.near)
    tensors = (batch.ids, batch.targets, *batch.documents, window.counted, window.hints, *masks, window.slots)
    return [x for x in tensors if x is not None]


def copy_of_window(window: TTTWindow) -> TTTWindow:
    """The same window in memory of its own, but for the cache, and without a ledger."""
    batch, past = window.batch, window.past
    documents = Documents(*(x.clone() for x in batch.documents))
    if past is not None:
        past = past._replace(mask=past.mask.clone(), near=past.near.clone())
    hints, slots = (None if x is None else x.clone() for x in (window.hints, window.slots))
    batch = Batch(batch.ids.clone(), batch.targets.clone(), documents)
    return TTTWindow(batch, window.counted.clone(), np.empty(0, np.int64), hints, past, slots)


class CUDAGraphRecorder:
    """Records what a computation launches on a GPU. Its graphs share their memory, as they never run at once."""

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """What launches it again, with the same addresses and numbers. It is not computed yet.

        Nothing that it makes may be in use when another graph runs. Errors: RuntimeError, from CUDA too.
        """
        torch.cuda.synchronize()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")  # other threads pin memory
            try:
                compute()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says only that the recording has failed
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self.stream)
        return graph.replay


GRAPH_DOCUMENTS = 32  # a window of more takes longer than its launches
GRAPH_AFTER = 8  # windows of the same shapes in a row; fewer follow one another while a document's context grows


class Replays:
    """Which windows are worth a graph, by their sizes: those that once came more than GRAPH_AFTER times in a row."""

    def __init__(self):
        self.recorded: set[tuple] = set()
        self.last, self.in_a_row = (), 0

    def __call__(self, documents: int, sizes: tuple) -> bool:
        """Whether the next window, of so many documents, is."""
        if documents > GRAPH_DOCUMENTS:
            return False
        self.in_a_row = self.in_a_row + 1 if sizes == self.last else 1
        self.last = sizes
        if self.in_a_row > GRAPH_AFTER:
            self.recorded.add(sizes)
        return sizes in self.recorded


class WindowGraph(NamedTuple):
    """The pass of windows of the same shapes as a CUDA graph."""

    inputs: list[Tensor]  # where it reads what differs between windows
    scores: list[Tensor]  # where it leaves NLL, and hints' log-probabilities if there are any
    replay: Callable[[], None]


class WindowGraphs:
    """TTT_CUDA_GRAPHS: replays windows of few documents, whose shapes come again and again, as CUDA graphs.

    Such a window is a thousand kernels that take less time than their launches, and the chunks of a long document
    can only follow one another. A graph launches all of its kernels at once. They are the same kernels on the same
    shapes, so scores do not depend on whether a window is replayed; the first graph is checked for it.
    """

    def __init__(self, ttt: PhasedTTT, enabled: bool):
        self.ttt, self.enabled = ttt, enabled
        self.graphs: dict[tuple, WindowGraph] = {}
        self.replays = Replays()
        self.recorder: CUDAGraphRecorder | None = None
        self.replayed = 0  # windows

    def compute(self, window: TTTWindow, enter: EnterScores) -> None:
        """`PhasedTTT.compute`, or its replay."""
        graph = self.graph_of(window) if self.enabled else None
        if graph is None:
            self.ttt.compute(window, enter)
        else:
            enter(*self.replay(graph, window))
            self.ttt.ledger.train_on(window.learned)

    def replay(self, graph: WindowGraph, window: TTTWindow) -> list[Tensor | None]:
        """NLL and hints' log-probabilities of a window. The adapters have learned from it."""
        copy_all(graph.inputs, tensors_in(window))
        graph.replay()
        self.replayed += 1
        nll, *log_q = (x.clone() for x in graph.scores)  # the next replay overwrites them
        return [nll, *(log_q or [None])]

    def graph_of(self, window: TTTWindow) -> WindowGraph | None:
        """The graph for a window's shapes; None where there is none yet."""
        shapes = tuple(tuple(x.shape) for x in tensors_in(window))
        if self.replays(len(window.batch.ids), shapes) and shapes not in self.graphs:
            try:
                graph = self.record(window)
                if not self.graphs:
                    self.check(graph, window)
                self.graphs[shapes] = graph
            except RuntimeError as error:  # of CUDA, or of what cannot be recorded
                self.enabled = False
                self.graphs.clear()
                self.ttt.run.log(f"ttt: no CUDA graphs from here on: {error}".partition("\n")[0])
        return self.graphs.get(shapes)

    def record(self, window: TTTWindow) -> WindowGraph:
        """A graph for a window's shapes. The window is not computed yet."""
        self.recorder = self.recorder or CUDAGraphRecorder()
        kept, runtime = copy_of_window(window), self.ttt.model.runtime
        places = [x for x in (window.batch.targets, window.hints) if x is not None]
        scores = [torch.empty(x.shape, dtype=runtime.master_dtype, device=x.device) for x in places]

        def enter(*entered: Tensor | None) -> None:
            copy_all(scores, [x.detach() for x in entered if x is not None])

        return WindowGraph(tensors_in(kept), scores, self.recorder.record(lambda: self.ttt.compute(kept, enter)))

    @torch.no_grad()
    def check(self, graph: WindowGraph, window: TTTWindow) -> None:
        """Errors: RuntimeError if a replay does not do what the plain pass does. Then nothing is computed yet."""
        state = self.ttt.adapters.state(len(window.counted)) if self.ttt.adapters else []
        before, results = [x.clone() for x in state], []
        window = window._replace(learned=np.empty(0, np.int64))  # no score is entered here
        for replays in (False, True):
            entered: list[Tensor] = []
            if replays:
                entered += [x for x in self.replay(graph, window) if x is not None]
            else:
                with torch.enable_grad():
                    self.ttt.compute(window, lambda *scores, to=entered: to.extend(x for x in scores if x is not None))
            results.append([x.detach().clone() for x in (*entered, *state)])
            copy_all(state, before)
        self.replayed -= 1
        zeros = [torch.zeros_like(x) for x in entered]
        for plain, replayed, begin in zip(*results, [*zeros, *before], strict=True):
            if not (replayed - plain).norm() <= 0.1 * (plain - begin).norm():  # 16 bits round rarely to another side
                raise RuntimeError("a replay does not give what the plain pass does")


class PhasedTTT:
    """Documents in batches, each document with its own LoRA; all weights train between phases.

    Strictly causal: phases part the stream in its order, at fixed counts of documents or tokens. In a phase every
    document starts from the same weights, the same A and a zero B, and its chunks end at fixed places. So a score
    depends on earlier phases and on the document's own earlier tokens alone, and documents may be sorted by length,
    dealt over the ranks and dropped as they end.
    """

    varying: tuple[int, ...] = (0, 1)  # dimensions of a window [B, T] that differ between calls

    def __init__(self, evaluator: Evaluator, model: GPT, adapt: bool = True):
        config = self.config = evaluator.config
        self.run, self.evaluator = evaluator.run, evaluator
        self.model = model
        self.tokens, self.offsets = evaluator.tokens, evaluator.documents
        self.lengths = np.diff(self.offsets)
        self.plan()
        self.ledger = ScoreLedger(evaluator, hinted=adapt and config.hint_enabled)
        self.forward = compiled_forward(self.view_of(model))
        self.graphs = WindowGraphs(self, config.ttt_cuda_graphs == "1")
        calls = len(model.schedules[config.loops])
        self.adapters = Adapters(config, calls, self.run.device) if adapt else None
        if self.adapters:
            self.phase_a = self.adapters.draw(1, config.seed)
            self.a_sum = {key: torch.zeros_like(a, dtype=torch.float64) for key, a in self.phase_a.items()}
        work = sum(self.cost(batch).sum() for begin, end in self.phases() for batch in self.batches(begin, end))
        self.meter = ProgressMeter(self.run, config, "ttt" if adapt else "ttt_baseline", float(work))
        self.kept = StageCheckpoints(self.run, self.meter.stage, self.ledger)

    def view_of(self, model: GPT) -> GPT:
        """The model whose forward pass gives scores, its weights as constants."""
        return constant_view(model)

    def plan(self) -> None:
        """Order of the documents, ends of the phases, ends of the chunks."""
        config, longest = self.config, int(self.lengths.max())
        self.order = np.arange(len(self.lengths))
        # Each phase ends where 1.5 times as much has been scored as at the end before. So a stream of any length meets
        # several phases, and training again on all that was scored costs at most three times the prefix.
        prefix = config.phased_ttt_prefix_tokens or config.phased_ttt_prefix_docs
        ends = np.array([prefix * 2**k // 3**k for k in reversed(range(config.ttt_phases))])
        if config.phased_ttt_prefix_tokens:  # a phase holds the documents that begin in its tokens
            ends = np.searchsorted(self.offsets[:-1], ends)
        # An end after the last document is left out: no score would come after its training.
        self.phase_ends = [end for end in dict.fromkeys(ends.tolist()) if 0 < end < len(self.order)]
        edges = [0]
        while edges[-1] < longest:
            edges.append(edges[-1] + self.chunk_size_at(edges[-1]))
        self.chunk_edges = np.array(edges)
        self.chunk_counts = np.searchsorted(self.chunk_edges, self.lengths)

    def chunk_size_at(self, place: int) -> int:
        """Targets of the chunk that begins at a place in a document: of the place alone, not of the length."""
        size = self.config.ttt_chunk_size
        if self.config.ttt_short_doc_chunks and place < 2000:
            size = 8 if place < 256 else 24
        return min(size, self.config.ttt_context)  # a window must hold its chunk

    def chunk_bounds(self, documents: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Places [n] in their documents where a chunk begins, and where it ends if its document goes on so far."""
        first, end = self.chunk_edges[chunk : chunk + 2]
        return np.full(len(documents), first), np.full(len(documents), end)

    def cost(self, documents: np.ndarray) -> np.ndarray:
        """Tokens that pass through the model for each document: its chunks' windows."""
        return np.concatenate(([0], np.cumsum(self.window_sizes())))[self.chunk_counts[documents]]

    def window_sizes(self) -> np.ndarray:
        """Tokens of each chunk's window: the chunk with its context."""
        return np.minimum(self.chunk_edges[1:], self.config.ttt_context)

    def __call__(self) -> Score:
        """Scores every document's targets, each before anything trains on it."""
        begun = self.restore()
        for phase, (begin, end) in enumerate(self.phases()):
            for batch in map(self.not_scored, self.batches(begin, end)):
                if len(batch):
                    self.run_batch(batch)
                if self.kept.due():
                    self.kept.save(phase if self.adapters else 0, self.own_state(), self.shared_state())
            if end in self.phase_ends and self.adapters and phase >= begun:
                self.finish_phase(begin, end)
                self.kept.begin_phase()
                self.kept.save(phase + 1, self.own_state())
        if self.graphs.replayed:
            self.run.log(f"ttt: {len(self.graphs.graphs)} CUDA graphs replayed {self.graphs.replayed} windows")
        return Score(self.ledger.close(self.meter.stage), len(self.tokens) - 1, self.evaluator.bytes)

    def run_batch(self, documents: np.ndarray) -> None:
        """Scores a batch, while its adapters learn."""
        if self.adapters:
            self.start_batch(self.adapters, documents)
        if not self.meter.done:
            self.project(documents)
        self.score_and_adapt(documents)
        if self.adapters:
            self.finish_batch(self.adapters, documents)
        self.meter.advance(float(self.cost(documents).sum()))

    def not_scored(self, documents: np.ndarray) -> np.ndarray:
        """Those of a batch that were not scored before the run was cut off: all, unless there were other ranks."""
        scored = self.ledger.scored(self.offsets[documents])
        self.meter.skip(float(self.cost(documents[scored]).sum()) if scored.any() else 0.0)
        return documents[~scored]

    def own_state(self) -> dict[str, Tensor]:
        """What a checkpoint of this rank holds beside its scores: its part of the sum of A."""
        return {f"a_sum.{key}": a for key, a in self.a_sum.items()} if self.adapters else {}

    def shared_state(self) -> dict[str, Tensor]:
        """What all ranks have in a phase: the weights, and A at the start of each document."""
        if not self.adapters:
            return {}
        return named_weights(self.model) | {f"a.{key}": a for key, a in self.phase_a.items()}

    @torch.no_grad()
    def restore(self) -> int:
        """Goes on where an earlier attempt of this run was cut off. Returns the phase."""
        state = self.kept.restore(moving=self.adapters is not None)
        if state is None:
            return 0
        if state.shared:
            load_weights(self.model, state.shared)
        if self.adapters:
            self.restore_adapters(state)
        self.kept.save(state.phase, self.own_state())  # the files of this number of ranks
        return state.phase

    def restore_adapters(self, state: StageState) -> None:
        """A at the start of each document, and this rank's part of the sum of A."""
        for key in self.a_sum:
            if state.shared:
                self.phase_a[key] = state.shared[f"a.{key}"].to(self.run.device)
            for tensors in state.own:
                self.a_sum[key] += tensors[f"a_sum.{key}"].to(self.run.device)

    def phases(self) -> list[tuple[int, int]]:
        """Places in the order at which each phase begins and ends."""
        return list(itertools.pairwise((0, *self.phase_ends, len(self.order))))

    def batches(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """This rank's batches of a phase, longest documents first; each goes to the rank with the least work so far."""
        documents = self.order[begin:end]
        documents = documents[np.argsort(-self.lengths[documents], kind="stable")]
        own = documents[deal(self.cost(documents), self.run.world) == self.run.rank]
        size = self.config.ttt_batch_size
        yield from (own[i : i + size] for i in range(0, len(own), size))

    def start_batch(self, adapters: Adapters, documents: np.ndarray) -> None:
        """Every document of a phase starts from the same A."""
        adapters.start(self.phase_a)

    def finish_batch(self, adapters: Adapters, documents: np.ndarray) -> None:
        """Adds up the A that each document left, for the next phase."""
        for key, a in adapters.a.items():
            self.a_sum[key] += a[: len(documents)].sum(0, keepdim=True, dtype=torch.float64)

    def finish_phase(self, begin: int, end: int) -> None:
        """Between phases all weights train on the documents scored so far, and A becomes the mean of those left."""
        if self.config.ttt_warm_start_a:
            self.run.all_reduce(*self.a_sum.values())
            self.phase_a = {key: (a / (end - begin)).float() for key, a in self.a_sum.items()}
        for a in self.a_sum.values():
            a.zero_()
        self.ledger.share()
        self.train_full_model(self.order[:end])

    def project(self, documents: np.ndarray) -> None:
        """Logs the seconds that the evaluation will take, measured on a batch's first window with a full context.

        Training all weights is counted as if a token cost as much in it as in an adapter's step.
        """
        config = self.config
        full = min(int(self.chunk_counts[documents].max()) - 1, config.ttt_context // config.ttt_chunk_size)
        batch, scored = self.window(documents[self.chunk_counts[documents] > full], full)
        compute = functools.partial(self.drop_step, as_padding(batch), scored)
        seconds_per_token = self.run.time_second_call(compute) / batch.ids.numel()
        tokens = self.meter.total
        if self.adapters:
            trained = sum(int(self.lengths[self.order[:end]].sum()) for end in self.phase_ends)
            tokens = tokens * config.ttt_grad_steps + trained * config.global_ttt_epochs / self.run.world
        chunks, phases = int(self.chunk_counts.sum()), len(self.phase_ends)
        work = f"{len(self.lengths)} documents in {chunks} chunks, {phases} phases"
        self.meter.project(seconds_per_token * tokens, work)

    def warm_up(self) -> None:
        """Computes a window and a step of all weights, as padding, so that they are compiled."""
        documents = next(self.batches(*self.phases()[0]), None)
        if documents is not None:
            if self.adapters:
                self.start_batch(self.adapters, documents)
            batch, scored = self.window(documents, 0)
            self.drop_step(as_padding(batch), np.full_like(scored, -1))
        if self.adapters and self.phase_ends:
            self.new_sgd().warm_up(self.config.global_ttt_chunk_tokens)

    def new_sgd(self) -> FullModelSGD:
        """The optimizer of all weights, with no momentum yet."""
        return FullModelSGD(self.evaluator, self.model, self.ledger, self.config.global_ttt_momentum)

    def drop_step(self, batch: Batch, scored: np.ndarray) -> None:
        """Computes a window and its adapters' gradients, and drops them."""
        nll, leaves, _ = self.score(self.sent(batch, scored))
        if leaves:
            torch.autograd.grad(nll.sum(), leaves)

    def score_and_adapt(self, documents: np.ndarray) -> None:
        """Scores a batch chunk by chunk. Documents with most chunks come first, so that the remaining are a prefix."""
        for chunk in range(int(self.chunk_counts[documents[0]])):
            batch, scored = self.window(documents[self.chunk_counts[documents] > chunk], chunk)
            adapting = int((self.chunk_counts[documents] > chunk + 1).sum()) if self.adapters else 0
            self.graphs.compute(self.sent(batch, scored, adapting), functools.partial(self.ledger.score, scored))
            self.finish_chunk()

    def compute(self, window: TTTWindow, enter: EnterScores) -> None:
        """Scores a window, enters NLL and hints' log-probabilities, then lets the adapters learn. A GPU never waits.

        It may be repeated as a CUDA graph: all that differs between windows of the same shapes must be in `window`.
        """
        nll, leaves, log_q = self.score(window)
        enter(nll, log_q)
        for step in range(self.config.ttt_grad_steps if len(window.counted) else 0):
            if step:
                nll, leaves, _ = self.score(window)
            self.adapt(nll, leaves, window)
        self.store(window)

    def store(self, window: TTTWindow) -> None:
        """Nothing: the next chunk's context is computed anew."""

    def finish_chunk(self) -> None:
        """Nothing, as `store`."""

    def adapt(self, nll: Tensor, leaves: list[Tensor], window: TTTWindow) -> None:
        """One adapter step of the first documents on their chunk's mean loss, that of the counted places."""
        adapters, counted = self.adapters, window.counted
        adapting = len(counted)
        if adapters is None:
            raise RuntimeError("there are no adapters to train")
        self.ledger.train_on(window.learned)
        loss = ((nll[:adapting] * counted).sum(1) / counted.sum(1)).sum()
        adapters.step(adapting, [g[:adapting] for g in torch.autograd.grad(loss, leaves)])

    def sent(self, batch: Batch, scored: np.ndarray, adapting: int = 0) -> TTTWindow:
        """A window with all that its pass needs on the device."""
        counted = scored[:adapting] >= 0
        hints, learned = self.ledger.hints_at(scored), scored[:adapting][counted]
        return TTTWindow(batch, send_array(counted, self.run.device), learned, hints, *self.context_of(batch))

    def score(self, window: TTTWindow) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """NLL [B, last] of a window's last places, the adapters' tensors that it depends on, hints' log-probabilities.

        It can always be differentiated: a score must not depend on whether another document goes on, and a graph
        without gradients would be one more to compile.
        """
        adapters, leaves = self.adapters, []
        batch, past = window.batch, window.past
        hints = window.hints
        if adapters:
            leaves = adapters.leaves(len(batch.ids))
        if self.model.runtime.compile:  # one graph for any number of documents, places and scored places
            mark_sizes((0,), *leaves)
            mark_sizes(self.varying, batch.ids, batch.targets, batch.documents.starts)
            mark_sizes(self.varying, *([] if hints is None else [hints]))
            if past is not None:
                mark_sizes((0, 2), past.keys, past.values)
                mark_sizes((1,), past.mask, past.near)
        nll, _, *more = self.forward(
            *batch,
            looped=self.config.loops,
            adapters=adapters.pairs(leaves) if adapters else None,
            temperature=self.config.temperature,  # adapters train on what counts
            **({} if hints is None else dict(hints=hints)),
            **({} if past is None else dict(past=past)),
        )
        log_q = None if hints is None else more.pop(0)
        self.keep(*more)
        return nll, leaves, log_q

    def context_of(self, batch: Batch) -> tuple[Past | None, Tensor | None]:
        """The context that a window does not hold, and the slots of the cache that take what it computes."""
        return None, None

    def keep(self, *seen: Tensor) -> None:
        """Takes the keys and values of a window's pass, where it has a past."""

    def window(self, documents: np.ndarray, chunk: int) -> tuple[Batch, np.ndarray]:
        """One chunk of each document with its context, right-aligned where the chunk would end; the rest is padding.

        Returns the batch, ids [B, T] and targets [B, last], and the positions [B, last] of the inputs whose targets
        are scored, -1 elsewhere. T and last follow from the chunk's place and not from where documents end: rounding
        depends on shapes.
        """
        first, end = self.chunk_bounds(documents, chunk)
        last = max(2, int((end - first).max()))
        # torch.compile makes another graph where a size is 1: here none is.
        if len(documents) == 1 < self.config.ttt_batch_size:
            documents, first, end = (np.repeat(x, 2) for x in (documents, first, end))
            first[1] = end[1]  # the second row is padding: nothing of it is scored
        begin, lengths = np.maximum(0, end - self.config.ttt_context), self.lengths[documents][:, None]
        length = min(max(int((end - begin).max()), last + 1), max(self.config.ttt_context, last))
        places = end[:, None] - length + np.arange(length)  # [B, T] in their documents
        padding = places < begin[:, None]
        positions = self.offsets[documents][:, None] + np.clip(places, 0, lengths - 1)
        ids = self.tokens[positions].astype(np.int64)
        targets = self.tokens[positions[:, length - last :] + 1].astype(np.int64)
        starts = np.where(padding, 0, padding.sum(1, keepdims=True)).astype(np.int32)
        counts = (places >= first[:, None]) & (places < lengths)
        scored = np.where(counts, positions, -1)[:, length - last :]
        return to_device(ids, targets, starts, self.run.device), scored

    def train_full_model(self, documents: np.ndarray) -> None:
        """All weights train on the documents scored so far, each once an epoch, in chunks, without the last chunk."""
        config = self.config
        bounds = [(int(self.offsets[d]), int(self.offsets[d + 1])) for d in documents]
        stream = np.concatenate([np.arange(begin, end) for begin, end in bounds])
        size = config.global_ttt_chunk_tokens
        chunks = np.split(stream, range(size, len(stream), size))[:-1]
        sgd = self.new_sgd()
        total = config.global_ttt_epochs * len(chunks)
        for step in range(total):
            sgd.step(chunks[step % len(chunks)], config.global_ttt_lr * cosine(step, total))
        self.run.log(f"ttt: {total} full-model SGD steps on {len(documents)} scored documents, {len(stream)} tokens")


NO_PLACE = np.iinfo(np.int64).min  # of an empty slot
SLOTS_BLOCK = 64  # attention reads as many of these as hold keys; CUDA's kernels want masks whose rows are aligned


class CachedTTT(PhasedTTT):
    """TTT_RECOMPUTE_TOKENS: a window holds a chunk and some tokens before it, and attention finds the rest in a cache.

    What the cache has of a token was computed when it was scored or last recomputed, with the adapters of that time.
    Gradients reach back as far as the window. So a chunk costs as much as its window, however long the context is.
    Windows are of one size, that of the largest chunk. Calls differ in the number of documents and of keys.
    """

    varying = (0,)

    def __init__(self, evaluator: Evaluator, model: GPT, adapt: bool = True):
        super().__init__(evaluator, model, adapt)
        config, calls = self.config, len(model.schedules[self.config.loops])
        self.base = 0  # the window's first place
        # A ring: what it has of a place lies at that place modulo its slots.
        shape = (max(2, config.ttt_batch_size), calls, self.slots, config.num_kv_heads, config.model.head_dim)
        self.cache = tuple(torch.zeros(shape, dtype=config.dtype, device=self.run.device) for _ in range(2))
        self.held = np.full(self.slots, NO_PLACE)  # the place of each slot's key
        self.seen: tuple[Tensor, ...] = ()  # keys and values of the window's pass, [B, calls, T, K, h]

    def view_of(self, model: GPT) -> GPT:
        """A window's places count from the document's begin, however far that is behind."""
        return constant_view(model, int(self.chunk_edges[-1]))

    def plan(self) -> None:
        """Sizes of the windows and of the cache, too, which outlasts the context by a window.

        They are those for documents of any length: rounding depends on shapes, and must not tell where one ends.
        """
        super().plan()
        self.last = max(2, *map(self.chunk_size_at, (0, 256, 2000)))  # places that may be scored
        self.length = self.config.ttt_recompute_tokens + self.last
        # A window's first tokens lack what the SmearGate and the key offset take from the token before.
        self.lead = self.config.lead_tokens
        self.slots = SLOTS_BLOCK * -(-(self.config.ttt_context + self.length) // SLOTS_BLOCK)

    def window_sizes(self) -> np.ndarray:
        """Tokens of each chunk's window: the chunk and the tokens before it that are computed again."""
        return np.full(len(self.chunk_edges) - 1, self.length)

    def score_and_adapt(self, documents: np.ndarray) -> None:
        """As without a cache, which is empty where a document begins."""
        self.held[:] = NO_PLACE
        super().score_and_adapt(documents)

    def window(self, documents: np.ndarray, chunk: int) -> tuple[Batch, np.ndarray]:
        """One chunk of each document and the tokens before it, all at the same places; places before 0 are padding."""
        first, end = (int(edge) for edge in self.chunk_edges[chunk : chunk + 2])
        if len(documents) == 1 < self.config.ttt_batch_size:  # a size of 1 would be another graph
            documents = np.repeat(documents, 2)
        self.base, lengths = end - self.length, self.lengths[documents][:, None]
        places = np.arange(self.base, end)
        positions = self.offsets[documents][:, None] + np.clip(places, 0, lengths - 1)
        ids = self.tokens[positions].astype(np.int64)
        targets = self.tokens[positions[:, -self.last :] + 1].astype(np.int64)
        starts = np.broadcast_to(np.where(places < 0, 0, -self.base), ids.shape).astype(np.int32)
        counts = (places >= first) & (places < lengths)
        if len(counts) > 1 and documents[0] == documents[1]:
            counts[1] = False
        scored = np.where(counts, positions, -1)[:, -self.last :]
        return to_device(ids, targets, starts, self.run.device), scored

    def first_own_key(self, base: int) -> int:
        """The first place whose key comes from the pass of a window from `base` on.

        All do, if the window begins with the document.
        """
        return base + self.lead if base >= 0 else 0

    def slots_in_use(self, base: int) -> int:
        """Slots of the cache that may hold keys when a window from this place on is computed, in whole blocks."""
        blocks = -(-max(1, self.first_own_key(base)) // SLOTS_BLOCK)
        return min(self.slots, SLOTS_BLOCK * blocks)

    def context_of(self, batch: Batch) -> tuple[Past | None, Tensor | None]:
        """The cache, with which of its keys and of the window's own each token sees; the slots of the latter.

        Padding sees itself, since a softmax over nothing is not a number.
        """
        config, first = self.config, self.first_own_key(self.base)
        slots = self.slots_in_use(self.base)
        held, places = self.held[:slots], np.arange(self.base, self.base + self.length)
        keys, in_use = np.append(held, places), np.append(held < first, places >= first)
        places = places[:, None]
        sees = in_use & (keys >= 0) & (keys <= places) & (keys > places - config.ttt_context)
        sees |= (places < 0) & (keys == places)
        near = sees & (keys >= places - (config.window_attn_size or config.ttt_context))
        keys_and_values = [x[: len(batch.ids), :, :slots] for x in self.cache]
        masks = [send_array(mask, self.run.device) for mask in (sees, near)]
        return Past(*keys_and_values, *masks), send_array(self.own_places() % self.slots, self.run.device)

    def own_places(self) -> np.ndarray:
        """The places whose keys come from the window's pass."""
        return np.arange(self.first_own_key(self.base), self.base + self.length)

    def keep(self, *seen: Tensor) -> None:
        """Takes the keys and values of a window's pass."""
        self.seen = seen

    def store(self, window: TTTWindow) -> None:
        """The cache takes the window's own keys and values."""
        if window.slots is None:
            raise RuntimeError("there are no slots for a window's keys")
        for cache, own in zip(self.cache, self.seen, strict=True):
            cache[: len(own)].index_copy_(2, window.slots, own[:, :, -len(window.slots) :])
        self.seen = ()

    def finish_chunk(self) -> None:
        """What the cache holds from now on."""
        places = self.own_places()
        self.held[places % self.slots] = places


class LengthOrderTTT(PhasedTTT):
    """TTT_ORDER=length, as PR #2163 does it: longest documents first. It is not strictly causal.

    The batch, the phase, the chunks and the A that a document meets depend on where it ends, and on other lengths.
    Each batch belongs to one of TTT_STREAMS streams, in which it hands A on to the next. Ranks share the streams, so
    that the number of ranks does not change what a batch starts from.
    """

    def plan(self) -> None:
        """Documents by length; ends of the phases within the stream's documents; each document's chunk size."""
        config = self.config
        self.order = np.argsort(-self.lengths, kind="stable")
        prefix, phases = min(config.phased_ttt_prefix_docs, len(self.order)), config.ttt_phases
        ends = [prefix * (phase + 1) // phases for phase in range(phases)]
        self.phase_ends = [end for end in dict.fromkeys(ends) if 0 < end < len(self.order)]
        self.chunk_sizes = np.full(len(self.lengths), config.ttt_chunk_size)
        if config.ttt_short_doc_chunks:
            self.chunk_sizes[self.lengths <= 2000] = 24
            self.chunk_sizes[self.lengths <= 256] = 8
        self.chunk_sizes = np.minimum(self.chunk_sizes, config.ttt_context)
        self.chunk_counts = -(-self.lengths // self.chunk_sizes)
        self.stream_a: dict[int, dict[str, Tensor]] = {}
        self.place = np.argsort(self.order)  # of each document in the order

    def chunk_bounds(self, documents: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Places [n] in their documents where a chunk begins, and where it ends if its document goes on so far."""
        sizes = self.chunk_sizes[documents]
        return chunk * sizes, (chunk + 1) * sizes

    def cost(self, documents: np.ndarray) -> np.ndarray:
        """Estimated tokens that pass through the model for each document: its chunks, each with its context."""
        context = np.minimum(self.lengths[documents], self.config.ttt_context)
        return self.chunk_counts[documents] * context - context**2 / (2 * self.chunk_sizes[documents])

    def batches(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """This rank's batches of a phase, in the order of the documents, sorted by chunks."""
        size = self.config.ttt_batch_size
        for first in range(begin, end, size):
            if self.stream_of(first) % self.run.world == self.run.rank:
                documents = self.order[first : min(first + size, end)]
                yield documents[np.argsort(-self.chunk_counts[documents], kind="stable")]

    def stream_of(self, first: int) -> int:
        """The stream of the batch whose first document has this place in the order."""
        begin = max((end for end in self.phase_ends if end <= first), default=0)
        return (first - begin) // self.config.ttt_batch_size % self.config.ttt_streams

    def start_batch(self, adapters: Adapters, documents: np.ndarray) -> None:
        """A as the stream's last batch left it, or with TTT_WARM_START_A=0 drawn anew; in the batch's order."""
        first, stream = self.first_and_stream(documents)
        if stream not in self.stream_a or not self.config.ttt_warm_start_a:
            self.stream_a[stream] = adapters.draw(self.config.ttt_batch_size, self.config.seed + first)
        adapters.start(self.stream_a[stream])
        adapters.arrange(self.place[documents] - first)

    def finish_batch(self, adapters: Adapters, documents: np.ndarray) -> None:
        """Hands A on, in the order of the documents."""
        first, stream = self.first_and_stream(documents)
        adapters.arrange(np.argsort(self.place[documents] - first))
        self.stream_a[stream] = {key: a.clone() for key, a in adapters.a.items()}

    def own_state(self) -> dict[str, Tensor]:
        """A of this rank's streams."""
        return {f"stream.{n}.{key}": a for n, stream in self.stream_a.items() for key, a in stream.items()}

    def restore_adapters(self, state: StageState) -> None:
        """A of all streams, whatever rank has them now."""
        for tensors in state.seen:
            for name, a in tensors.items():
                if name.startswith("stream."):
                    _, number, key = name.split(".", 2)
                    self.stream_a.setdefault(int(number), {})[key] = a.to(self.run.device)

    def first_and_stream(self, documents: np.ndarray) -> tuple[int, int]:
        """Place in the order of a batch's first document, and the batch's stream."""
        first = int(self.place[documents].min())
        return first, self.stream_of(first)

    def finish_phase(self, begin: int, end: int) -> None:
        """Between phases all weights train on the documents scored so far."""
        self.ledger.share()
        self.train_full_model(self.order[:end])


class ChunkTTT:
    """The stream in chunks: sliding windows score a chunk, then all weights train on it; never on the last."""

    def __init__(self, evaluator: Evaluator, model: GPT, adapt: bool = True):
        config = self.config = evaluator.config
        self.evaluator, self.ledger = evaluator, ScoreLedger(evaluator, hinted=adapt and config.hint_enabled)
        self.model, self.adapt = model, adapt
        self.size = config.ttt_chunk_tokens
        self.count = -(-(len(evaluator.tokens) - 1) // self.size)
        self.meter = ProgressMeter(evaluator.run, config, "ttt" if adapt else "ttt_baseline", self.count)
        self.kept = StageCheckpoints(evaluator.run, self.meter.stage, self.ledger)

    def new_sgd(self) -> FullModelSGD:
        """The optimizer of all weights, with no momentum yet."""
        config = self.config
        return FullModelSGD(
            self.evaluator,
            self.model,
            self.ledger,
            config.ttt_momentum,
            config.ttt_freeze_blocks,
            config.ttt_grad_clip,
            config.ttt_optimizer == "adamw",
        )

    def warm_up(self) -> None:
        """Computes a step of all weights, as padding, so that it is compiled. Windows have the evaluator's graph."""
        if self.adapt and self.count > 1:
            self.new_sgd().warm_up(self.size)

    def __call__(self) -> Score:
        """Scores the stream's targets, each before anything trains on it."""
        config, run = self.config, self.evaluator.run
        end = len(self.evaluator.tokens) - 1
        windows = evaluation_windows(self.evaluator.documents, config.eval_context, config.eval_step, self.size)
        edges = np.searchsorted((windows[:, 0] + windows[:, 2]) // self.size, range(self.count + 1))
        forward = compiled_forward(self.model)
        sgd = self.new_sgd()
        self.project(forward, len(windows), sgd)
        begun = self.restore(sgd)
        self.meter.skip(begun)
        for chunk in range(begun, self.count):
            own = windows[edges[chunk] : edges[chunk + 1]]
            batches = self.evaluator.batches(pack_sequences(own, config.eval_context))
            for sequences in batches[run.rank :: run.world]:
                self.evaluator.score_sequences(forward, sequences, self.ledger, own)
            positions = np.arange(chunk * self.size, min((chunk + 1) * self.size, end))
            if self.adapt and chunk < self.count - 1:
                self.ledger.share()
                size = config.ttt_batch_seqs * config.train_seq_len or self.size
                parts = np.split(positions, range(size, len(positions), size))
                for part in parts * config.ttt_epochs:
                    sgd.step(part, config.ttt_lr * self.decay(chunk))
            self.meter.advance(1)
            self.save(chunk + 1, sgd)
        return Score(self.ledger.close(self.meter.stage), end, self.evaluator.bytes)

    def save(self, chunk: int, sgd: FullModelSGD) -> None:
        """A checkpoint before a chunk, where rank 0 finds that it is time for one."""
        if self.kept.files is not None and chunk < self.count and self.evaluator.run.broadcast(self.kept.due()):
            self.kept.begin_phase()
            self.kept.save(chunk, {}, sgd.state() if self.adapt else None)

    @torch.no_grad()
    def restore(self, sgd: FullModelSGD) -> int:
        """Goes on where an earlier attempt of this run was cut off. Returns the next chunk."""
        state = self.kept.restore(moving=self.adapt)
        if state is None:
            return 0
        if self.adapt:
            sgd.load(state.shared)
        return state.phase

    def decay(self, chunk: int) -> float:
        """Multiplier of TTT_LR after a chunk, over a fixed number of tokens: it must not know where the stream ends."""
        tokens = self.config.ttt_decay_tokens
        if not tokens:
            return 1.0
        chunks = self.count - 1 if tokens < 0 else tokens // self.size
        return cosine(min(chunk, chunks), chunks)

    def project(self, forward: Callable, windows: int, sgd: FullModelSGD) -> None:
        """Logs the seconds that the evaluation will take, from one batch of windows and one training sequence."""
        config, evaluator = self.config, self.evaluator
        batches = len(evaluator.batches(evaluator.sequences))  # a chunk's border splits some batches in two
        seconds = evaluator.run.time_second_call(lambda: evaluator.warm_up(forward)) * batches
        if self.adapt:
            seconds += sgd.seconds_per_token(self.size) * config.ttt_epochs * (self.count - 1) * self.size
        work = f"{windows} windows in {self.count} chunks, {config.ttt_epochs} epochs on each"
        self.meter.project(seconds / evaluator.run.world, work)


def ttt_diverged(config: Config, problem: str) -> ConfigError:
    """The error of a test-time training that has diverged."""
    name, other = ("ttt_lr", "") if config.ttt_mode == "chunk" else ("ttt_lora_lr", " or GLOBAL_TTT_LR")
    return ConfigError(name.upper(), getattr(config, name), f"{problem}; lower this rate{other}")


def ttt_method(config: Config) -> type[PhasedTTT] | type[ChunkTTT]:
    """The class that TTT_MODE and TTT_ORDER name."""
    if config.ttt_mode == "chunk":
        return ChunkTTT
    if config.ttt_recompute_tokens:
        return CachedTTT
    return PhasedTTT if config.ttt_order == "stream" else LengthOrderTTT


def compile_evaluation(evaluator: Evaluator, model: GPT) -> None:
    """Compiles what the evaluation of an artifact needs, before its clock starts. Nothing of the text is computed."""
    config = evaluator.config
    evaluator.warm_up(compiled_forward(model))
    if config.ttt_mode != "none":
        for adapt in [False] * config.ttt_baseline + [True]:
            ttt_method(config)(evaluator, model, adapt).warm_up()
    if evaluator.run.device.type == "cuda":
        torch.cuda.empty_cache()  # what test-time training took is more than the training leaves


def score_without_training(method: PhasedTTT | ChunkTTT, run: Run) -> dict[str, Any]:
    """Scores the windows of TTT_MODE without any training. The summary's row."""
    score = method()
    require_finite(score, ArtifactError, "the validation loss of its model, by the windows of TTT_MODE,")
    log_score(run, "ttt_baseline", score)
    return dict(val_bpb_ttt_baseline=score.bpb)


def plain_ledger(evaluator: Evaluator) -> ScoreLedger:
    """A ledger for the scores before test-time training, with hints where these come on top of it, or of a mixture."""
    config = evaluator.config
    return ScoreLedger(evaluator, config.hint_enabled and (config.ttt_mode == "none" or config.ttt_plain_weight > 0))


MIX_PRIOR = 20.0  # curvature that the logit of a share begins with


def log_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """log(e^a + e^b), faster than np.logaddexp."""
    return np.maximum(a, b) + np.log1p(np.exp(-np.abs(a - b)))


def mix(
    adapted: tuple[np.ndarray, ...], plain: tuple[np.ndarray, ...], plain_weight: float, chunk: int
) -> tuple[list[np.ndarray], float]:
    """Log-probabilities [targets] under w * adapted + (1 - w) * plain, in stream order, and the last w.

    The first log-probabilities of each tuple are those of the targets, by which w learns: a chunk of targets is scored,
    then the logit of w takes a Newton step of at most 1 on them. All of these have the same w, so it is a distribution.
    """
    mixed = [np.empty_like(x) for x in adapted]
    logit, curvature = math.log(1 / plain_weight - 1), MIX_PRIOR
    for begin in range(0, len(adapted[0]), chunk):
        part = slice(begin, begin + chunk)
        log_w, log_rest = -math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit))
        of_adapted, of_plain = ([x[part].astype(np.float64) for x in both] for both in (adapted, plain))
        scores = [log_sum(log_w + a, log_rest + b) for a, b in zip(of_adapted, of_plain, strict=True)]
        for out, own in zip(mixed, scores, strict=True):
            out[part] = own
        surplus = np.exp(log_w + of_adapted[0] - scores[0]) - math.exp(log_w)  # the gradient in the logit
        curvature += float(np.square(surplus).sum())
        logit += min(max(float(surplus.sum()) / curvature, -1.0), 1.0)
    return mixed, 1 / (1 + math.exp(-logit))


def score_plain(evaluator: Evaluator, model: GPT) -> ScoreLedger:
    """The scores before test-time training, where no stage has kept them."""
    ledger = plain_ledger(evaluator)
    evaluator(compiled_forward(model), ledger=ledger)
    return ledger


def mix_with_plain(
    evaluator: Evaluator, ledger: ScoreLedger, plain: ScoreLedger, score: Score
) -> tuple[Score, dict[str, Any]]:
    """Mixes the scores of test-time training, in their closed ledger, with those without: score, the summary's rows."""
    config, run = evaluator.config, evaluator.run
    adapted, other = (
        [-each.of_all_ranks(each.nll)] + [each.of_all_ranks(each.log_q)] * config.hint_enabled
        for each in (ledger, plain)
    )
    (log_p, *log_q), weight = mix(tuple(adapted), tuple(other), config.ttt_plain_weight, config.hint_chunk_tokens)
    run.log(f"ttt: val_bpb {score.bpb:.4f} alone; mixed with the model before it, whose share ends as {1 - weight:.2f}")
    ledger.replace(-log_p, *log_q)
    mixed = dataclasses.replace(score, nats=ledger.close("ttt"))
    return mixed, dict(val_bpb_adapted=score.bpb, ttt_plain_weight_learned=1 - weight)


def score_hints(evaluator: Evaluator, ledger: ScoreLedger) -> dict[str, Any]:
    """The scores of a closed ledger with hints, the same on every rank. The summary's rows."""
    config, run = evaluator.config, evaluator.run
    begin = time.perf_counter()
    nll, log_q = ledger.of_all_ranks(ledger.nll), ledger.of_all_ranks(ledger.log_q)
    scores = with_hints(nll, log_q, evaluator.tokens, evaluator.hints, config)
    score = Score(float(scores.sum(dtype=np.float64)), len(scores), evaluator.bytes)
    if config.eval_scores and score.finite:
        ledger.write("hint", scores)
    seconds = evaluator.hint_seconds + time.perf_counter() - begin
    log_score(run, "hint", require_finite(score, ArtifactError, "the validation loss with hints"))
    share = float((evaluator.hints.kinds > 0).mean())
    run.log(f"hint: {share:.2%} of the targets have one, {seconds:.1f} s")
    return dict(val_bpb_hint=score.bpb, val_loss_hint=score.loss, hint_share=share, hint_seconds=seconds)


def test_time_training(evaluator: Evaluator, model: GPT, plain: ScoreLedger | None = None) -> dict[str, Any]:
    """Scores by TTT_MODE; with TTT_BASELINE, first the same windows without any training. The summary's rows.

    plain: the scores without it; None or empty, as where an earlier attempt of this run had them: not at hand.
    """
    config, run = evaluator.config, evaluator.run
    method = ttt_method(config)
    rows: dict[str, Any] = {}
    if config.ttt_baseline:
        rows |= run.once(
            run.scored("ttt_baseline"), lambda: score_without_training(method(evaluator, model, adapt=False), run)
        )
    if config.ttt_plain_weight and (plain is None or not plain.all_counts.any()):
        plain = score_plain(evaluator, model)
    begin, training = time.perf_counter(), method(evaluator, model)
    score = training()
    require_finite(score, functools.partial(ttt_diverged, config), "the loss of test-time training")
    if config.ttt_plain_weight and plain is not None:
        score, shares = mix_with_plain(evaluator, training.ledger, plain, score)
        rows |= shares
    log_score(run, "ttt", score)
    if config.hint_enabled:
        rows |= run.once(run.scored("hint"), lambda: score_hints(evaluator, training.ledger))
        rows |= dict(val_loss_ttt=score.loss)
    return rows | dict(
        val_bpb_ttt=score.bpb,
        val_bpb=score.bpb,
        val_loss=score.loss,
        ttt_targets_per_second=(score.tokens - training.kept.restored) / (time.perf_counter() - begin),
    )


# ---------------------------------------------------------------------------------------------------------------
# Stages: the parts of a run, each timed
# ---------------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What a training leaves for the artifact and the summary."""

    model: GPT  # with averaged weights
    calibration: Calibration
    end: Progress
    score: Score  # before quantization
    data_stall: float  # fraction of the step time
    loader: TrainLoader  # for the text of TUNE_STEPS


def train_model(config: Config, run: Run, loader: TrainLoader, evaluator: Evaluator) -> Trained:
    """Trains, averages, validates and calibrates. Errors: ConfigError for a training that diverged."""
    with Stage(run, "setup"):
        model, graphs = new_model(config), graphs_compiled()
        trainer = Trainer(model.to(run.device), loader, config, run)
        resumed = find_resumed(trainer)
    ended = resumed is not None and resumed.state["ended"] and run.attempts > 1
    with Stage(run, "warmup"):
        if not ended:
            trainer.warm_up(evaluator.warm_up)
        steps, warm = config.warmup_steps, graphs_compiled()
        unit = "step" if steps == 1 else "steps"
        run.log(f"warmup: {steps} {unit} per graph variant, {warm - graphs} graphs, state restored")
        reserve_calibration(trainer)
        evaluator.project(trainer.forward)
    if config.compile == "1" and config.mode == "all":
        with Stage(run, "compile"):
            compile_evaluation(evaluator, model)
            warm = graphs_compiled()
    with Stage(run, "train"):
        loader.data_stall = 0.0
        begin = load_resumed(trainer, resumed)
        with SignalHold(run):
            end = train(trainer, lambda: evaluator(trainer.forward), begin, ended)
        data_stall = log_data_stall(run, end, loader.data_stall)
        evaluator.data_check.refuse_rewritten("the training")
        trainer.use_average()
        broken = max(run.gather(nonfinite(model.named_parameters())))
        if broken:
            raise diverged(config, f"the weights {broken!r} are not finite after the training", run)
        move_to_cpu(trainer)
    with Stage(run, "validate"):
        score = evaluator(trainer.forward, "pre_quant")
        require_finite(score, functools.partial(diverged, config))
        log_score(run, "pre_quant", score)
        if config.compile == "1":
            run.log(f"recompiled: {graphs_compiled() - warm} graphs after the warmup")
    with Stage(run, "calibrate"):
        calibration = calibrate(trainer, end.step)
        loader.ahead.close()
        broken = max(run.gather(nonfinite((*calibration.hessians.items(), *calibration.rows.items()))))
        if broken:
            raise diverged(config, f"the inputs of {broken!r} are not finite during calibration")
    return Trained(model, calibration, end, score, data_stall, loader)


def log_overrun(config: Config, run: Run, end: Progress) -> float:
    """Seconds by which all that reads training text exceeded the time limit; a warning where it is more than two steps.

    The last step may end after the limit, and the clock is read a step late on a GPU.
    """
    if not config.max_wallclock_seconds:
        return 0.0
    spent = end.seconds + run.seconds["calibrate"] + run.seconds.get("tune", 0.0)
    over = max(0.0, spent - config.max_wallclock_seconds)
    if over > 2 * end.seconds / end.step:
        run.log(
            f"warning: training, calibration and tuning took {spent:.1f} s, {over:.1f} s over MAX_WALLCLOCK_SECONDS="
            f"{config.max_wallclock_seconds:g}: raise GPTQ_RESERVE_SECONDS"
        )
    return over


def quantize_model(trained: Trained, weights: dict[str, Tensor], config: Config, run: Run) -> bytes:
    """The artifact of a trained model. Errors: ConfigError where its activations or weights cannot be used."""
    try:
        return make_artifact(weights, trained.calibration, bytes_for_model(config), config, run.log)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise diverged(config, " ".join(str(error).split()).rstrip(".")) from None


def bytes_for_model(config: Config) -> int:
    """What the code leaves of the bytes."""
    return (config.target_bytes or config.artifact_limit_bytes) - shipped_code()[0]


def tune_artifact(data: bytes, trained: Trained, limit: int, config: Config, run: Run) -> bytes:
    """The artifact after TUNE_STEPS, or the given one where tuning did not help, or made it too large.

    It reads what training would have read after calibration's batches. Whether it helped is measured on text that it
    did not see.
    """
    first = trained.end.step + config.gptq_calibration_batches
    last = first + config.tune_steps
    tuning = Tuning(unpack(data)[1], trained.model, config)
    unseen = [tuning_batch(trained.loader, config, step) for step in range(last, last + 4)]
    before = tuning.mean_divergence(unseen)
    for step in range(first, last):
        tuning.step(tuning_batch(trained.loader, config, step))
    after = tuning.mean_divergence(unseen)
    tuned = pack(tuning.tuned(), config)
    kept = after < before and len(tuned) <= max(limit, len(data))
    run.log(
        f"tune:{config.tune_steps} steps of {unseen[0].ids.numel()} tokens, divergence {before:.6f} -> {after:.6f} nats"
        f", {len(data)} -> {len(tuned)} bytes, {'kept' if kept else 'not kept'}"
    )
    return tuned if kept else data


def write_float_weights(weights: dict[str, Tensor], config: Config, run: Run) -> None:
    """With SAVE_WEIGHTS, keeps the weights of before quantization; their metadata hold the model's settings."""
    path = run.path(WEIGHTS_FILE)
    try:
        run.check_folder(WEIGHTS_FILE)
        write_tensors(path, {name: w.cpu() for name, w in weights.items()}, dataclasses.asdict(config.model))
    except OSError as error:
        run.warn(f"{path} cannot be written ({error.strerror}); the run goes on without it")
        run.lost.add(WEIGHTS_FILE)


def save_artifact(
    data: bytes, trained: Trained, weights: dict[str, Tensor], config: Config, run: Run
) -> list[dict[str, Any]]:
    """Writes an artifact that can be scored, and logs its sections; returns their rows.

    Errors: ConfigError for weights beyond what its 16-bit numbers hold.
    """
    stored = unpack(data)[1]
    for name, q in stored.items():
        try:
            check_stored(q)
        except ValueError as error:
            raise diverged(config, f"the quantized weights {name!r} cannot be stored: {error}") from None
    if not run.save(CONTAINER_FILE, data, RESCUE_SECONDS):
        raise ConfigError(CONTAINER_FILE, "", "could not be written anywhere, and is lost")
    run.kept[CONTAINER_FILE] = data
    sections = size_table(data, stored, weights, trained.calibration.hessians)
    for line in format_table(sections):
        run.log(line)
    return sections


def write_artifact(trained: Trained, config: Config, run: Run) -> dict[str, Any]:
    """Quantizes, packs and writes the model, on rank 0. Returns the summary's rows about training and artifact."""
    weights = {name: p.detach() for name, p in trained.model.named_parameters()}
    if config.save_weights:
        run.on_main(lambda: write_float_weights(weights, config, run))
    with Stage(run, "quantize"):
        data = run.on_main(lambda: quantize_model(trained, weights, config, run)) or b""
    if config.tune_steps:
        with Stage(run, "tune"):
            data = run.on_main(lambda: tune_artifact(data, trained, bytes_for_model(config), config, run)) or b""
    with Stage(run, "pack"):
        sections = run.on_main(lambda: save_artifact(data, trained, weights, config, run)) or []
    end, tokens = trained.end, trained.end.step * config.train_batch_tokens
    return dict(
        **sizes(run.broadcast_object(len(data)), config, run),
        val_bpb_pre_quant=trained.score.bpb,
        val_loss_pre_quant=trained.score.loss,
        steps=end.step,
        train_tokens=tokens,
        train_seconds=end.seconds,
        seconds_over_limit=log_overrun(config, run, end),
        tokens_per_second=tokens / max(end.seconds, 1e-9),
        data_wait_share=trained.data_stall,
        parameters=parameter_count(config),
        sections=sections,
    )


def read_back(run: Run) -> bytes:
    """The bytes of the run's artifact from its file; one of this run's that cannot be read is written anew."""
    run.restore()
    try:
        return read_artifact(run.path(CONTAINER_FILE))
    except ArtifactError as error:
        data = run.kept.get(CONTAINER_FILE)
        if data is None or not keep_elsewhere(run, CONTAINER_FILE, data, OSError(errno.EIO, str(error))):
            raise
        return read_artifact(run.path(CONTAINER_FILE))


def evaluate_artifact(
    config: Config, explicit: set[str], run: Run, evaluator: Evaluator | None, compiled: bool
) -> dict[str, Any]:
    """Reads the artifact back from its file and scores it. Returns the summary's rows about it.

    `compiled`: this process has compiled what the evaluation needs, as a training does.
    """
    with Stage(run, "unpack"):
        data = run.broadcast_object(run.on_main(lambda: read_back(run)))
        run.artifact_sha256 = hashlib.sha256(data).hexdigest()
        model, config = load_artifact(data, config, explicit, run.device)
    if evaluator is None:
        with Stage(run, "evaluate"):
            evaluator = make_evaluator(config, run)
            log_data(run, evaluator)
    if not compiled:
        if config.compile == "1":
            with Stage(run, "compile"):
                compile_evaluation(evaluator, model)
        with Stage(run, "evaluate"):
            evaluator.project(compiled_forward(model))
    warm = graphs_compiled()
    with Stage(run, "evaluate"):
        plain = plain_ledger(evaluator)
        score = Score(**run.once(run.scored("quantized"), lambda: score_artifact(evaluator, model, plain)))
    rows = dict(
        **sizes(len(data), config, run),
        val_bpb_quantized=score.bpb,
        val_loss_quantized=score.loss,
        val_bpb_ttt=None,
        val_bpb=score.bpb,
        val_loss=score.loss,
        val_tokens=score.tokens,
        val_bytes=score.bytes,
        parameters=parameter_count(config),
        audit=evaluator.data_check.rows,
        reference_compressors=evaluator.data_check.manifest.reference,
        strictly_causal=config.strictly_causal,
    )
    if config.ttt_mode != "none":
        with Stage(run, "ttt"):
            rows |= run.once(run.scored("ttt"), lambda: test_time_training(evaluator, model, plain))
    if config.hint_enabled:  # on top of the last stage, which kept this result
        hints = run.results[run.scored("hint")]
        rows |= hints | dict(val_bpb=hints["val_bpb_hint"], val_loss=hints["val_loss_hint"])
    if config.compile == "1":
        run.log(f"recompiled: {graphs_compiled() - warm} graphs in the evaluation")
    return rows


def score_artifact(evaluator: Evaluator, model: GPT, ledger: ScoreLedger | None = None) -> dict[str, Any]:
    """The fields of an artifact's score before test-time training. Its targets' scores go into the ledger, if given."""
    run, ledger = evaluator.run, ledger or plain_ledger(evaluator)
    score = evaluator(compiled_forward(model), "quantized", resumable=True, ledger=ledger)
    require_finite(score, ArtifactError, "the validation loss of its model")
    log_score(run, "quantized", score)
    if evaluator.config.hint_enabled and evaluator.config.ttt_mode == "none":
        run.once(run.scored("hint"), lambda: score_hints(evaluator, ledger))
    return dataclasses.asdict(score)


def make_evaluator(config: Config, run: Run) -> Evaluator:
    """The evaluator of a run. Errors: ConfigError for data that cannot be scored."""
    evaluator = Evaluator(config, run)
    if not evaluator.bytes:
        raise ConfigError(
            "DATA_PATH",
            config.data_path,
            f"the {len(evaluator.tokens) - 1} targets of its validation shards stand for 0 bytes of text, and a score "
            "needs at least 1",
        )
    return evaluator


COMPILE_CACHE_FILE = "compile_cache.bin"


def load_compile_cache(config: Config, run: Run) -> None:
    """With COMPILE_CACHE, reads what an earlier run in this folder compiled. Its content is executed."""
    path = run.path(COMPILE_CACHE_FILE)
    if not config.compile_cache:
        return
    try:
        info = torch.compiler.load_cache_artifacts(path.read_bytes())
        run.log(f"compile cache: {0 if info is None else sum(map(len, info.artifacts.values()))} entries read")
    except FileNotFoundError:
        return
    except OSError as error:
        run.warn(f"{path} cannot be read ({error.strerror}); everything is compiled anew")


def save_compile_cache(config: Config, run: Run) -> None:
    """With COMPILE_CACHE, writes what this process compiled, or read from such a file."""
    saved = torch.compiler.save_cache_artifacts() if config.compile_cache and run.is_main else None
    if saved is not None:
        try:
            write_atomic(run.path(COMPILE_CACHE_FILE), saved[0])
        except OSError as error:  # the next run compiles again
            run.log(f"warning: the compile cache was not written: {error.strerror}")
            return
        run.log(f"compile cache: {sum(map(len, saved[1].artifacts.values()))} entries, {len(saved[0])} bytes written")


def log_data(run: Run, evaluator: Evaluator, loader: TrainLoader | None = None) -> None:
    """What the shards hold and which order is read, before anything is computed from them."""
    for line in (*evaluator.notes, *evaluator.data_check.lines(), *(loader.notes if loader else ())):
        run.log(line)
    run.metric(audit=evaluator.data_check.rows)


def log_setup(run: Run, config: Config, notes: list[str]) -> str:
    """The first lines of a log: notes, machine, backends. Returns the attention backend's name."""
    for note in notes:
        run.log(note)
    run.log(f"{run.folder}  {hardware(run)}  {versions()}")
    if run.attempts > 1:
        run.log(f"resumed: attempt {run.attempts} of this run, with the same settings")
    if config.checkpoint_every_seconds:
        folder = checkpoint_folder(run.path(""), config)
        run.log(f"checkpoints: CHECKPOINT_EVERY_SECONDS={config.checkpoint_every_seconds:g}, in {folder}")
    attention, why = choose_attention(config)
    run.log(
        f"device:{run.device.type} ranks:{run.world} threads:{torch.get_num_threads()} dtype:{config.compute_dtype} "
        f"attention:{attention} ({why}) compile:{config.compile} "
        f"triton:{config.triton_kernels} fused_ce:{int(config.fused_ce_enabled)} read_ahead:{config.read_ahead}"
    )
    if config.mode != "eval" and (config.fp8_head or config.fp8_mlp):
        how = "on FP8 tensor cores" if float8_supported(config) else "simulated, which takes longer than without"
        run.log(f"fp8: head:{int(config.fp8_head)} mlp:{int(config.fp8_mlp)} {how}")
    if config.mode != "eval":
        looped = f" looped:{execution_order(config, True)}" if config.loops else ""
        run.log(f"parameters:{parameter_count(config)} order:{execution_order(config, False)}{looped}")
        run.log(str(batch_layout(config, run.world)))
    return attention


def summary_lines(s: dict[str, Any]) -> Iterator[str]:
    """The last lines of a run, from its summary."""
    yield "-" * 72
    if "val_bpb_pre_quant" in s:
        yield (
            f"trained    {s['steps']} steps, {s['train_tokens']} tokens, {s['tokens_per_second']:.0f} tokens/s, "
            f"{s['parameters']} parameters"
        )
        yield f"val_bpb    {s['val_bpb_pre_quant']:.4f} before quantization"
    if "val_bpb_quantized" in s:
        yield (
            f"val_bpb    {s['val_bpb_quantized']:.4f} quantized, packed, read back; {s['val_tokens']} targets, "
            f"{s['val_bytes']} bytes, each once"
        )
        if s["val_bpb_ttt"] is not None:
            yield f"val_bpb    {s['val_bpb_ttt']:.4f} after test-time training"
        if "val_bpb_hint" in s:
            yield f"val_bpb    {s['val_bpb_hint']:.4f} with hints from repetition"
        yield f"           strictly causal: {'yes' if s['strictly_causal'] else 'no'}"
        for name, bpb in s["reference_compressors"].items():
            yield f"           {bpb:.4f} {name} on the same text, for orientation"
    if "artifact_bytes" in s:
        share = s["artifact_bytes"] / s["artifact_limit_bytes"] if s["artifact_limit_bytes"] else math.inf
        yield (
            f"artifact   {s['artifact_bytes']} bytes (code {s['code_bytes']} + model {s['model_bytes']}), "
            f"{share:.1%} of the limit of {s['artifact_limit_bytes']}"
        )
        yield f"           code {s['code_form']}"
    if s["resumed"]:
        times = "once" if s["resumed"] == 1 else f"{s['resumed']} times"
        yield f"resumed    {times}, stood still for {s['idle_seconds']:.1f} s in all; the seconds of all attempts count"
    if s["resumed_from"]:
        yield f"resumed    from {s['resumed_from']}, another run's"
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in s["seconds"].items())
    yield f"seconds    {stages}; total {sum(s['seconds'].values()):.1f}"
    yield f"peak memory {s['peak_memory_bytes'] // 2**20} MiB   {s['hardware']}   torch {s['versions']['torch']}"


def closing_lines(run: Run) -> Iterator[str]:
    """The three files of a run that matter next, if it has them, and what each is for."""
    uses = {
        CONTAINER_FILE: "the model; tools/generate.py writes text with it",
        run.prefix + SUMMARY_FILE: "every figure of the run",
        run.prefix + "log.txt": "these lines; tools/report.py draws the losses",
    }
    there = {name: run.path(name) for name in uses if os.path.exists(run.path(name))}  # no error of a bad disk
    width = max((len(str(path)) for path in there.values()), default=0)
    for number, (name, path) in enumerate(there.items()):
        yield f"{'' if number else 'next':<10} {path!s:<{width}}  {uses[name]}"


def dry_run(config: Config, world: int) -> str:
    """What a run would do, as one JSON object."""
    return to_json(
        dict(
            config=dataclasses.asdict(config),
            parameters=parameter_count(config),
            execution_order=dict(plain=execution_order(config, False), looped=execution_order(config, True)),
            batch_layout=dict(**batch_layout(config, world)._asdict(), sequence_tokens=config.train_seq_len),
            evaluation=dict(context=config.eval_context, stride=config.eval_step, batch_sequences=config.eval_rows),
        ),
        indent=1,
    )


# ---------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------


MEMORY_WORDS = re.compile(r"out of memory|allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED")
# The knob that decides how much memory a stage takes, beside the model's sizes.
MEMORY_KNOBS: dict[str, str] = {
    **dict.fromkeys(("warmup", "train", "calibrate", "tune"), "micro_batch_tokens"),
    **dict.fromkeys(("validate", "evaluate"), "val_batch_size"),
    "ttt": "ttt_batch_size",
}


@contextlib.contextmanager
def naming_memory(config: Config, run: Run) -> Iterator[None]:
    """A context whose errors of missing memory become a ConfigError that names the stage and what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's own is a RuntimeError, too
        if isinstance(error, RuntimeError) and not MEMORY_WORDS.search(str(error)):
            raise
        where = f"there was no more memory in stage {run.stage}" + (f" of rank {run.rank}" if run.world > 1 else "")
        kept = f"; {CONTAINER_FILE} is kept, and MODE=eval scores it"
        advice = kept if "artifact" in run.results else way_on(run)
        name = MEMORY_KNOBS.get(run.stage)
        if name is None:
            raise ConfigError("memory", "", where + advice) from None
        raise ConfigError(name.upper(), getattr(config, name), f"{where}; a lower value needs less{advice}") from None


def execute(config: Config, explicit: set[str], notes: list[str], run: Run) -> int:
    """All stages of the mode. Returns the exit code: 1 for an artifact over its limit, or EXIT_ELSEWHERE."""
    loader = evaluator = None
    if config.mode != "eval":
        numbers = parameter_count(config)
        allowed = f"makes a model of {numbers} parameters, and an artifact holds at most {CONTENT_LIMIT}"
        require(numbers <= CONTENT_LIMIT, config, "model_dim", allowed)
        with Stage(run, "data"):  # before the folder is made: a fault of the data leaves nothing behind
            loader, evaluator = TrainLoader(config, run), make_evaluator(config, run)
            run.live.bytes_per_token = evaluator.bytes / (len(evaluator.tokens) - 1)
        with Stage(run, "audit"):
            evaluator.data_check.training(loader.stream)
            evaluator.data_check.leaks()
            evaluator.data_check.refuse()
            if config.data_order == "documents":
                loader.use_index(evaluator.data_check.digests)
        config = dataclasses.replace(config, tokenizer_sha256=evaluator.vocabulary.digest)
    open_folder(run, config)
    if evaluator and loader:
        log_data(run, evaluator, loader)
    attention = log_setup(run, config, notes)
    load_compile_cache(config, run)
    if run.is_main:
        shipped_code()  # while the file is what runs: it may be edited or gone when the model is packed
    summary: dict[str, Any] = dict(
        preset=config.preset, seed=config.seed, mode=config.mode, attention=attention, ranks=run.world
    )
    trains = "artifact" not in run.results and config.mode != "eval"
    if loader and evaluator:
        summary |= run.once(
            "artifact", lambda: write_artifact(train_model(config, run, loader, evaluator), config, run)
        )
        summary |= dict(audit=evaluator.data_check.rows)
        if run.is_main and not os.path.lexists(run.path(TOKENIZER_FILE)):  # the folder may be the data's own
            run.kept[TOKENIZER_FILE] = evaluator.vocabulary.content
            run.save(TOKENIZER_FILE, evaluator.vocabulary.content)
    if config.mode != "train":
        summary |= evaluate_artifact(config, explicit, run, evaluator, compiled=trains)
    save_compile_cache(config, run)
    machine = dict(peak_memory_bytes=run.peak_memory(), versions=versions(), hardware=hardware(run))
    summary |= dict(seconds=run.seconds, **machine, **run.resumption_rows())
    if config.mode != "train":
        spent = sum(run.seconds.get(stage, 0.0) for stage in EVALUATION_STAGES)
        with_compilation = spent + run.seconds.get("compile", 0.0)
        summary |= dict(evaluation_seconds=spent, evaluation_seconds_with_compilation=with_compilation)
    if run.is_main:
        run.save(run.prefix + SUMMARY_FILE, to_json(summary, indent=1) + "\n")
    for line in (*summary_lines(summary), *(closing_lines(run) if run.is_main else ())):
        run.log(line)
    over = summary.get("artifact_bytes", 0) - config.artifact_limit_bytes
    if over > 0:
        run.log(f"error: the artifact is {over} bytes over ARTIFACT_LIMIT_BYTES={config.artifact_limit_bytes}")
    whole = run.broadcast(float(run.finish()))
    if run.is_main and not run.lost:
        remove_checkpoints(run, config)  # last: until here the same command, given again, goes on
    if not whole:
        return EXIT_ELSEWHERE
    return 1 if over > 0 else 0


def load_model(path: str | Path, *options: Any, **knobs: Any) -> Any:
    """(model, tokenizer) of a run's folder or artifact; golf.py, beside this file, has what they can do."""
    return importlib.import_module("golf").load_model(path, *options, **knobs)


def refuse_silent_cpu(config: Config, explicit: set[str], environment: dict[str, str]) -> None:
    """Raises a ConfigError where torchrun would train a preset for GPUs on CPUs that nobody asked for.

    A driver that is too old for this PyTorch looks like a machine without a GPU.
    """
    under_torchrun, on_cpu = bool(environment.get("WORLD_SIZE")), config.device == "cpu" and "device" not in explicit
    if config.preset in GPU_PRESETS and under_torchrun and on_cpu:
        advice = f"PRESET={config.preset} needs CUDA under torchrun, and PyTorch sees no device; DEVICE=cpu takes CPUs"
        raise ConfigError("DEVICE", "auto", advice)


def main(arguments: list[str], environment: dict[str, str]) -> int:
    """Runs the script. Returns the exit code: 2 for an error of the user, after one line that explains it."""
    try:
        options, environment = parse_arguments(arguments, environment)
        if "--help" in options:
            return show(help_text())
        config, explicit, notes = config_from_env(environment, torch.cuda.is_available())
        if "--dry-run" in options:
            plan = dry_run(config, rank_variable(environment, "WORLD_SIZE", 1))
            for note in notes:
                say(note, sys.stderr)
            return show(plan)
        refuse_silent_cpu(config, explicit, environment)
        run = start_run(config, environment)
        try:
            with run.guard(), naming_memory(config, run):
                code = execute(config, explicit, notes, run)
                run.leave()
            return code
        finally:
            run.close()
    except RankError:
        return RANK_LOST
    except ConfigError as error:
        of_ranks = error.parts[0] in ("RANK", "LOCAL_RANK")  # which only one of them may have
        if of_ranks or environment.get("RANK", "0") in ("0", ""):
            complain(f"error: {error}")
        return 2
    except Interrupted as error:
        if environment.get("RANK", "0") == "0":
            complain(str(error))
        return error.code
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


if __name__ == "__main__":
    at_start = signal.getsignal(signal.SIGINT)
    try:
        if at_start == interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main(sys.argv[1:], dict(os.environ)))
    except KeyboardInterrupt:  # another one, while the first one's line was written
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, at_start)  # the interpreter's last words about a Ctrl-C would be a traceback
        settle_output()
