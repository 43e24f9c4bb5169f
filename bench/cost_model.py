"""Seconds of a step on one H100, estimated from the table of `make check-h100` (h100.json). Nothing here was measured.

A row of the table is one term of a graph (norms, MLP, ...) in one kind of kernels. Its time on the device is

    factor * (max(FLOPs / rate, bytes / bandwidth) + launches * ramp)

and a step takes the sum of its rows, or the host's time for its launches where that is more. The rates are the
ceilings below. The factor is what real kernels lose on them, one for training and one for TTT: the only numbers that
are fitted, to the three times that PR #2163 published.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What an H100 (SXM) and its host do at best. FLOP/s, bytes/s, seconds."""

    matmul: float = 798e12  # measured on H100s: the largest bf16 product
    memory: float = 3.0e12  # measured on H100s: copies
    attention_forward: float = 280e12  # assumed: FlashAttention 3, heads of 64, documents shorter than the context
    attention_backward: float = 220e12  # assumed likewise
    masked_forward: float = 100e12  # assumed: PyTorch's memory-efficient attention, with a mask
    masked_backward: float = 60e12  # assumed likewise
    launch: float = 2e-6  # assumed: a kernel's start and end on the device, where others cannot hide them
    host: float = 8e-6  # assumed: the host's time for each launch, from Python
    host_token: float = 12e-9  # the host's time for each token of a window of TTT; on one slow core NumPy took 11 ns
    link: float = 300e9  # assumed: bytes/s of NCCL's collectives between 8 GPUs
    collective: float = 40e-6  # assumed: what each collective takes at least
    gloo: float = 1e9  # assumed: bytes/s of an all-reduce between hosts' processes


FLOAT8_SPEEDUP = 2.0  # of FP8 products over bf16: by the data sheet, not measured
# Of FlashAttention 3 with heads of 128 over heads of 64, the same FLOPs. Forward, causal, the paper (arXiv 2407.08608)
# has 292, 423 and 521 TFLOP/s against 197, 265 and 371 at 512, 1,024 and 2,048 tokens. Backward: assumed.
WIDE_HEADS = 128
WIDE_FORWARD, WIDE_BACKWARD = 1.4, 1.25


class Row(NamedTuple):
    """Costs of one term of a use in one kind of kernels."""

    part: str  # forward, backward or inference; eager; or what runs eagerly under a name of its own
    term: str
    kind: str
    launches: float
    flops: float  # those of FP8 numbers count as the bf16 FLOPs that take as long, attention's as of heads of 64
    bytes: float


GRAPH_PARTS = ("forward", "backward", "inference")
BATCH_ENDS = "a batch's start and end"  # of TTT: not part of a window


class TableError(Exception):
    """A table that a budget cannot be made of."""


class Table:
    """A table of costs as tools/h100/check.py writes it."""

    def __init__(self, content: dict[str, Any], name: str = "the table"):
        self.content, self.name = content, name
        self.uses = {use["use"]: use for use in content.get("uses", ())}
        if not content.get("terms"):
            raise TableError(f'{name} has no costs by term: make check-h100 ARGS="--full --out FOLDER" writes them')

    @classmethod
    def read(cls, path: Path) -> Table:
        """A table from its file. Errors: TableError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TableError(f"{path} is not a table of make check-h100: {error}") from None
        return cls(content, str(path))

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        config = self.content.get("config", dict(model_dim=512, num_heads=8))  # older tables: `record`
        return config["model_dim"] // config["num_heads"]

    def use(self, name: str) -> dict[str, Any]:
        """What is known of a use besides costs. Errors: TableError where the table lacks it."""
        if name not in self.uses:
            raise TableError(f"{self.name} has no use {name!r}, only {', '.join(self.uses)}")
        return self.uses[name]

    def rows(self, use: str, window: Sequence[int] | None = None) -> list[Row]:
        """Rows of a use, collectives among them. Of TTT: those of a window [R, T, scored], None: of the first."""
        own, rows = self.use(use), []
        for t in self.content["terms"]:
            if t["use"] == use and list(window or own_window(own)) == t["window"]:
                flops = t["flops"] - t.get("float8_flops", 0) * (1 - 1 / FLOAT8_SPEEDUP)
                if t["kind"] == "attention" and self.head_width >= WIDE_HEADS:
                    flops /= WIDE_BACKWARD if t["part"] == "backward" else WIDE_FORWARD
                counted = (t["launches"], flops, t["bytes_read"] + t["bytes_written"])
                rows.append(Row(t["part"], t["term"], t["kind"], *counted))
        if not any(row.launches for row in rows) and rows:
            raise TableError(f"{self.name} counts no launches of {use}: it was made with --no-inductor")
        for r in self.content["rows"]:
            if r["use"] == use and r["part"] not in GRAPH_PARTS:
                counted = (r["launches"], r["matrix_flops"], r["bytes_read"] + r["bytes_written"])
                rows.append(Row(r["part"], r["part"], "eager", *counted))
        for name, calls in own["collectives"].items():
            if not name.endswith(" bytes"):
                rows.append(
                    Row("collectives", "collectives", "collective", calls, 0, own["collectives"][f"{name} bytes"])
                )
        return rows

    def windows(self, use: str = "TTT") -> list[list[int]]:
        """Windows [R, T, scored] that the table has costs of."""
        return [list(w) for w in sorted({tuple(t["window"]) for t in self.content["terms"] if t["use"] == use})]


def own_window(use: dict[str, Any]) -> list[int]:
    """The window of TTT that a use's plain rows are of; of other uses none."""
    return list(use["shapes"][0][:3]) if use["shapes"] else []


def rate(row: Row, c: Ceilings) -> float:
    """FLOP/s of a row's kernels at best."""
    if row.kind == "attention":
        return c.attention_backward if row.part == "backward" else c.attention_forward
    if row.kind == "masked attention":
        return c.masked_backward if row.part == "backward" else c.masked_forward
    return c.matmul


def row_seconds(row: Row, c: Ceilings) -> float:
    """Time of a row on the device at the ceilings."""
    if row.kind == "collective":
        return row.bytes * 7 / 8 / c.link + row.launches * c.collective
    return max(row.flops / rate(row, c), row.bytes / c.memory) + row.launches * c.launch


def step_seconds(rows: Iterable[Row], c: Ceilings, factor: float = 1.0) -> float:
    """Time of a step: of the device, or of the host's launches where that is more."""
    rows = list(rows)
    return max(factor * sum(row_seconds(r, c) for r in rows), sum(r.launches for r in rows) * c.host)


# Assumed: launches of a replayed window, which are its inputs on their way to the device and to the graph, the graph,
# and the scores on their way back. Kernels in a graph are taken to begin and end as they do elsewhere.
REPLAY_LAUNCHES = 64


class WindowCosts:
    """Costs of TTT's windows of any size, from those that the table has.

    Launches do not depend on the size. FLOPs and bytes of R documents, T tokens each with s of them scored, are sums
    of multiples of 1, R, R*T, R*T^2 and R*s: the multiples are fitted by least squares. With a cache, T stands for the
    keys that a document's tokens attend to, of which there are as many in each window.
    """

    def __init__(self, table: Table, use: str = "TTT"):
        base, windows = own_window(table.use(use)), table.windows(use)
        if len(windows) < 6:
            raise TableError(f"{table.name} has {len(windows)} windows of {use}, and a budget needs at least 6")
        config = table.content.get("config", {})
        recomputed = config.get("ttt_recompute_tokens", 0)
        self.tokens = recomputed and recomputed + base[2]  # of each document in a window; 0: T
        self.full_batch, self.base = base[0], base
        self.rows = [row for row in table.rows(use) if row.kind != "collective"]
        self.graph = [row for row in self.rows if row.part in GRAPH_PARTS]
        self.scale = self.basis(np.array([base]))[0]
        design = self.basis(np.array(windows)) / self.scale
        by_window = [{row[:3]: row for row in table.rows(use, window)} for window in windows]
        targets = [[(found[row[:3]].flops, found[row[:3]].bytes) for row in self.graph] for found in by_window]
        values = np.array(targets, float)  # [windows, rows, 2]
        weights = 1 / values[:, :, 1].sum(1)  # so that small windows fit as well as large ones
        weighted = (weights[:, None] * design, weights[:, None] * values.reshape(len(windows), -1))
        fitted, *_ = np.linalg.lstsq(*weighted, rcond=None)
        self.multiples = fitted.reshape(-1, len(self.graph), 2)
        totals, again = values.sum(1), np.tensordot(design, self.multiples, 1).sum(1)
        self.residual = float(np.abs(again / totals - 1).max())  # of a window's FLOPs or bytes

    @staticmethod
    def basis(windows: np.ndarray) -> np.ndarray:
        """What costs are multiples of, [n, 5], of windows [n, 3 or more]."""
        r, t, scored = windows[:, :3].astype(float).T
        return np.stack([np.ones_like(r), r, r * t, r * t**2, r * scored], 1)

    def table_of(self, windows: np.ndarray, c: Ceilings) -> tuple[list[Row], np.ndarray]:
        """Rows, and their device seconds [n, rows] at the ceilings, of windows [n, 4]: R, T, scored, adapting."""
        costs = np.tensordot(self.basis(windows) / self.scale, self.multiples, 1).clip(min=0)  # [n, graph rows, 2]
        adapting = windows[:, 3] > 0
        has_inference = any(row.part == "inference" for row in self.graph)
        rows, columns = [], []
        for i, row in enumerate(self.graph):
            seconds = np.maximum(costs[:, i, 0] / rate(row, c), costs[:, i, 1] / c.memory) + row.launches * c.launch
            runs = ~adapting if row.part == "inference" else adapting | (row.part == "forward" and not has_inference)
            rows.append(row)
            columns.append(np.where(runs, seconds, 0.0))
        for row in self.rows:
            if row.part not in (*GRAPH_PARTS, BATCH_ENDS):
                share = windows[:, 3] / self.full_batch if row.part == "adapting" else np.ones(len(windows))
                seconds = share * row.bytes / c.memory + row.launches * c.launch
                rows.append(row)
                columns.append(np.where(adapting, seconds, 0.0) if row.part == "adapting" else seconds)
        return rows, np.stack(columns, 1)

    def seconds(self, windows: np.ndarray, c: Ceilings, factor: float = 1.0) -> np.ndarray:
        """Time [n] of windows [n, 4 or 5], on the device or on the host. A fifth column tells which are CUDA graphs."""
        rows, device = self.table_of(windows, c)
        launches = sum(row.launches for row in rows if row.part != "inference")
        if windows.shape[1] > 4:
            launches = np.where(windows[:, 4], REPLAY_LAUNCHES, launches)
        host = launches * c.host + windows[:, 0] * (self.tokens or windows[:, 1]) * c.host_token
        return np.maximum(factor * device.sum(1), host)

    def batch_seconds(self, c: Ceilings, factor: float = 1.0) -> float:
        """Time of a batch's start and end, besides its windows."""
        return step_seconds([row for row in self.rows if row.part == BATCH_ENDS], c, factor)


# Published in the log of PR #2163 of openai/parameter-golf, on 8 H100s. The steps are means over its steps before and
# after the loops begin. A step of TTT there computes logits at all places.
PEER_STEP, PEER_LOOPED_STEP = 0.0956, 0.1401
PEER_WINDOW, PEER_WINDOW_SECONDS = (64, 2048, 2048, 64), 0.348


class Factor(NamedTuple):
    """By how much real kernels are slower than the ceilings: lowest, middle, highest."""

    low: float
    mid: float
    high: float


# How far a step may be from the training's factor. The two published steps agree within 1%, but they are of one script,
# and a changed script has kernels of which nothing was published.
MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The factors, and what they were fitted to."""

    training: Factor  # also of evaluation, calibration and full-model steps
    ttt: Factor
    fits: dict[str, dict[str, float]]  # name -> published and modelled seconds, the residual of the middle factor


def calibrate(reference: Table, c: Ceilings) -> Calibration:
    """Factors from PR #2163's three times.

    Training: the geometric mean of what its two steps ask for. TTT: between that, as if its kernels were as good, and
    what the published step of TTT asks for; the middle is the geometric mean of both. The reference is this script's
    table before it was made faster than the peer's: the same arithmetic, compiled by the same compiler, is taken to
    cost what the peer's did.
    """
    device_alone = dataclasses.replace(c, host=0.0, host_token=0.0)
    window = WindowCosts(reference).seconds(np.array([PEER_WINDOW]), device_alone)
    at_ceilings = {
        "step before the loops": (PEER_STEP, step_seconds(reference.rows("training"), device_alone)),
        "step after": (PEER_LOOPED_STEP, step_seconds(reference.rows("training (looped)"), device_alone)),
        "TTT step of 64x2048": (PEER_WINDOW_SECONDS, float(window[0])),
    }
    plain, looped, ttt = (published / modelled for published, modelled in at_ceilings.values())
    mid = (plain * looped) ** 0.5
    training = Factor((1 - MARGIN) * min(plain, looped), mid, (1 + MARGIN) * max(plain, looped))
    spread = Factor(min(mid, ttt), (mid * ttt) ** 0.5, max(mid, ttt))
    fits = {}
    for (name, (published, modelled)), factor in zip(at_ceilings.items(), (training, training, spread), strict=True):
        estimate = factor.mid * modelled
        fits[name] = dict(published=published, modelled=estimate, residual=estimate / published - 1)
    return Calibration(training, spread, fits)
