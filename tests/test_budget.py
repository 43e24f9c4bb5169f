"""bench/budget.py: its calibration, what its figures follow, its labels and its errors."""

import copy
import dataclasses
import json
import sys

import numpy as np
import pytest

from helpers import ROOT, tg

sys.path.append(str(ROOT / "bench"))
import budget as bench  # noqa: E402
import cost_model  # noqa: E402
from cost_model import Ceilings, Table, TableError, WindowCosts  # noqa: E402

WINDOWS = [(64, 2048, 48), (32, 2048, 48), (32, 1024, 48), (64, 512, 48), (64, 1024, 24), (16, 512, 48), (2, 1024, 48)]
GB, TFLOP = 10**9, 10**12


def term(use, part, name, kind, launches, flops, size, window=()):
    return dict(
        use=use,
        part=part,
        window=list(window),
        term=name,
        kind=kind,
        launches=launches,
        flops=int(flops),
        bytes_read=int(size // 2),
        bytes_written=int(size - size // 2),
    )


def step_terms(use, scale, parts=("forward", "backward")):
    for part in parts:
        yield term(use, part, "norms", "fused", 100, 0, 30 * GB * scale)
        yield term(use, part, "MLP", "matrix product", 100, 8 * TFLOP * scale, 5 * GB * scale)
        yield term(use, part, "attention", "attention", 11, 2 * TFLOP * scale, GB * scale)


def window_terms():
    for window in WINDOWS:
        r, tokens, scored = window
        for part in ("forward", "backward"):
            flops, size = 130e6 * r * tokens, 350e3 * r * tokens + 20e6 * r + 2e8
            yield term("TTT", part, "LoRA", "matrix product", 300, flops, size, window)
            yield term("TTT", part, "attention", "attention", 17, 4e4 * r * tokens**2, 5e3 * r * tokens, window)
            yield term("TTT", part, "head and loss", "fused", 5, 0, 3e4 * r * scored, window)


def eager(use, part, launches, size):
    return dict(
        use=use,
        part=part,
        launches=launches,
        matrix_flops=0,
        attention_flops=0,
        bytes_read=size,
        bytes_written=0,
    )


def use(name, shapes=(), collectives=()):
    return dict(use=name, shapes=[list(s) for s in shapes], collectives=dict(collectives), micro_steps=1)


def made_table(**changes):
    """A table of made-up costs of about the record's size."""
    reduced = {"reduce_scatter_tensor": 4, "reduce_scatter_tensor bytes": 80_000_000}
    content = dict(
        torch="none",
        form="made up",
        attention="fa3",
        terms=[
            *step_terms("training", 1.0),
            *step_terms("training (looped)", 1.5),
            *step_terms("evaluation", 0.6, ("inference",)),
            *step_terms("full-model SGD", 0.1),
            *window_terms(),
        ],
        rows=[
            eager("training", "optimizers", 200, 2 * GB),
            eager("training (looped)", "optimizers", 200, 2 * GB),
            eager("calibration", "eager", 2000, 60 * GB),
            eager("TTT", "adapting", 30, 60 * GB),
            eager("TTT", "a batch's start and end", 60, 30 * GB),
        ],
        compiled=[dict(use=u, part="forward", nodes=3000, kernels=60, launches=300) for u in ("training", "TTT")],
        uses=[
            use("training", collectives=reduced),
            use("training (looped)", collectives=reduced),
            use("evaluation"),
            use("full-model SGD"),
            use("calibration"),
            use("TTT", shapes=[(64, 2048, 48, 64)]),
        ],
    )
    return {**content, **changes}
