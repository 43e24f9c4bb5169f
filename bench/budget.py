"""The budget of a `record` run on 8 H100s: seconds of each stage, estimated without a GPU.

    python bench/budget.py [--table h100.json] [--set KNOB=VALUE ...] [--ceilings NAME=VALUE,...] [--out FOLDER]

Costs of a step come from the table that `make check-h100 ARGS="--full --out FOLDER"` writes; cost_model.py makes
seconds of them. The number of steps, batches and windows comes from the script's own schedules, over documents as long
as the challenge's. What no table can say (files, compiling, packing) is assumed, and marked so. Every figure is an
estimate, given as its middle and a range. docs/budget.md explains the model.

--set shows the budget of other knobs, such as TTT_ORDER=length. A knob that changes the model or its batches needs a
table of its own: make check-h100 ARGS="--full --set KNOB=VALUE --out FOLDER".
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import cost_model  # noqa: E402
import train_gpt as t  # noqa: E402
from cost_model import Calibration, Ceilings, Row, Table, TableError, WindowCosts  # noqa: E402

RANKS = 8
LIMIT = 600.0  # seconds of training, and again of evaluation (rules of the challenge)
TARGETS = {"step before the loops": 0.064, "step after": 0.095, "evaluation": 300.0}
LENGTHS = ROOT / "bench/document_lengths.csv"
RESULTS = ROOT / "bench/results"
# Published in the logs of PR #2163 of openai/parameter-golf. Its compilation of TTT ends before its clock starts.
PEER = {
    "step before the loops": cost_model.PEER_STEP,
    "step after": cost_model.PEER_LOOPED_STEP,
    "training steps": 4976,
    "calibrate": 3.7,
    "unpack": 20.5,  # 19 to 22
    "ttt, compiling": 107.5,  # 97 to 118
    "ttt, full-model steps": 918 * 0.097,
    "ttt": 500.0,  # 473 to 528
}


class BudgetError(Exception):
    """What a user can mend: one line, exit code 2."""


class Seconds(NamedTuple):
    """An estimate: its middle, and a range."""

    low: float
    mid: float
    high: float

    def __add__(self, other: Any) -> Seconds:
        return Seconds(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: Any) -> Seconds:
        return Seconds(*(float(times) * value for value in self))

    def __str__(self) -> str:
        digits = 1 if self.high < 100 else 0
        return f"{self.mid:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


NOTHING = Seconds(0.0, 0.0, 0.0)
HOSTS = Seconds(0.6, 1.0, 1.5)  # times a launch's cost on the host

# What no table says. Seconds unless another unit is named.
ASSUMED = {
    "data": Seconds(10, 30, 60),  # eight ranks read 8e9 tokens of shards
    "setup": Seconds(2, 4, 8),
    # Tracing and compiling a graph: an earlier study of this script took 69 s for 7,037 nodes on one slow core.
    "node": Seconds(0.005, 0.0065, 0.010),
    "symbolic node": Seconds(0.008, 0.010, 0.015),  # of a graph for any size: PR #2163 takes 97 to 118 s for its own
    "kernel": Seconds(0.1, 0.2, 0.4),  # Triton's compilation and autotuning
    "attempts": Seconds(1.1, 1.25, 1.5),  # quantizations until the artifact fits its limit (docs/quantization.md)
    "column": Seconds(0.0003, 0.00045, 0.0006),  # some 55 launches for a column of the trellis
    # Of a window's graph: its launches once more, on the host's clock, and CUDA's work on a thousand nodes.
    "graph": Seconds(0.02, 0.04, 0.1),
    "corrections": Seconds(3, 4.5, 6),  # LQER's decompositions, for each attempt
    "packed integer": Seconds(0.1e-6, 0.15e-6, 0.25e-6),  # bench/results/pack.txt: 0.48 s for 3.4 million
    "hinted target": Seconds(0.1e-6, 0.25e-6, 0.5e-6),  # with two threads of an EPYC 0.25 to 0.46
    "mixed target": Seconds(0.01e-6, 0.02e-6, 0.05e-6),  # with one thread of an EPYC 0.01, and hints
    "unpacked integer": Seconds(0.08e-6, 0.12e-6, 0.25e-6),  # there 0.29 s; and the trellis's levels
}


def total(estimates: Iterable[Seconds]) -> Seconds:
    """The sum."""
    return functools.reduce(lambda a, b: a + b, estimates, NOTHING)


class Stage(NamedTuple):
    """A stage, or a part of one."""

    name: str
    seconds: Seconds
    counts: str  # "training" or "evaluation": the limit that it counts to; "" for none
    basis: str  # "table" or "assumed", and how it was found


def document_lengths() -> np.ndarray:
    """Lengths of the challenge's 50,000 validation documents in tokens, longest first."""
    lines = [line for line in LENGTHS.read_text().splitlines() if line and not line.startswith("#")][1:]
    rank, tokens = np.array([line.split(",") for line in lines], float).T
    ranks = np.arange(1, rank[-1] + 1)
    return np.round(np.exp(np.interp(np.log(ranks), np.log(rank), np.log(tokens)))).astype(np.int64)


def stream_offsets(seed: int = 0) -> np.ndarray:
    """Where documents begin in the stream, and its end. Their order is unknown, so they are shuffled."""
    lengths = np.random.default_rng(seed).permutation(document_lengths())
    return np.append(0, np.cumsum(lengths))


# --- The script's schedules ---


def configuration(settings: dict[str, str], table: Table) -> t.Config:
    """The knobs of the run. Errors: BudgetError for a knob or a value that the script or the table does not serve."""
    unknown = set(settings) - {f.name.upper() for f in dataclasses.fields(t.Config)}
    if unknown:
        raise BudgetError(f"--set {sorted(unknown)[0]}: train_gpt.py has no such knob")
    given = dict(PRESET="record", DEVICE="cuda", ATTENTION=table.content.get("attention", "fa3"))
    before, config = (t.config_from_env({**given, **s}, True)[0] for s in ({}, settings))
    made_for = dataclasses.asdict(before) | table.content.get("config", {})  # older tables lack newer knobs
    cached = ["ttt_chunk_size", "ttt_short_doc_chunks"] if config.ttt_recompute_tokens else []  # a window's size
    for name in table_knobs() + cached:
        if getattr(config, name) != made_for[name]:
            command = f'make check-h100 ARGS="--full --set {name.upper()}={getattr(config, name)} --out FOLDER"'
            raise BudgetError(
                f"{name.upper()}={getattr(config, name)}: {table.name} was made with {made_for[name]}; {command} makes "
                "another"
            )
    if config.ttt_mode == "chunk":
        raise BudgetError("TTT_MODE=chunk: only phased test-time training has a budget")
    return config


def table_knobs() -> list[str]:
    """Knobs that change what a step costs in a way that only a new table shows."""
    model = [f.name for f in dataclasses.fields(t.ModelConfig)]
    batches = ["train_batch_tokens", "micro_batch_tokens", "global_ttt_chunk_tokens", "val_batch_size", "ttt_lora_rank"]
    adapters = [f"ttt_{key}_lora" for key in ("q", "k", "v", "o", "mlp")]
    others = ["neftune_alpha", "compute_dtype", "ttt_eval_seq_len", "eval_seq_len", "ttt_recompute_tokens"]
    return [*model, *batches, *adapters, *others]


def training_steps(config: t.Config, plain: float, looped: float) -> tuple[int, int]:
    """Steps before and after the loops begin, of steps that take so many seconds."""
    progress, steps = t.Progress(0, 0.0), [0, 0]
    while t.fraction_done(progress, config) < 1:
        after = t.step_variant_at(progress, config).looped
        steps[after] += 1
        progress = t.Progress(progress.step + 1, progress.seconds + (looped if after else plain))
    return steps[0], steps[1]


def schedule(config: t.Config, offsets: np.ndarray, rank: int) -> t.PhasedTTT:
    """The script's own schedule of test-time training on a rank, without a model."""
    kind = cast(type[t.PhasedTTT], t.ttt_method(config))  # `configuration` refuses TTT_MODE=chunk
    ttt = kind.__new__(kind)
    ttt.config, ttt.run = config, t.Run(rank, RANKS, RANKS, torch.device("cpu"))
    ttt.offsets, ttt.lengths = offsets, np.diff(offsets)
    ttt.plan()
    return ttt


def windows_of(ttt: t.PhasedTTT, documents: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """R, T, scored and adapting of each window of a batch, as PhasedTTT.window makes them. With a cache, T is keys."""
    counts, context = ttt.chunk_counts[documents], ttt.config.ttt_context
    if isinstance(ttt, t.CachedTTT):
        for chunk, end in enumerate(ttt.chunk_edges[1 : int(counts[0]) + 1].tolist()):
            keys = ttt.slots_in_use(end - ttt.length) + ttt.length
            yield max(2, int((counts > chunk).sum())), keys, ttt.last, int((counts > chunk + 1).sum())
        return
    for chunk in range(int(counts[0])):
        remaining = documents[counts > chunk]
        first, end = ttt.chunk_bounds(remaining, chunk)
        scored = max(2, int((end - first).max()))
        length = min(max(int(end.max()), scored + 1), max(context, scored))
        yield max(2, len(remaining)), length, scored, int((counts > chunk + 1).sum())


class Phase(NamedTuple):
    """What one phase of test-time training runs."""

    windows: list[np.ndarray]  # of each rank, [n, 5]: R, T, scored, adapting, whether it is replayed as a CUDA graph
    batches: list[int]  # of each rank
    graphs: list[int]  # that each rank records in it
    full_model_steps: int  # after it


def phases(config: t.Config, offsets: np.ndarray) -> list[Phase]:
    """All phases, by the script's schedule on 8 ranks."""
    schedules = [schedule(config, offsets, rank) for rank in range(RANKS)]
    enabled, replays = config.ttt_cuda_graphs == "1", [t.Replays() for _ in range(RANKS)]
    found = []
    for begin, end in schedules[0].phases():
        windows, batches = [], []
        graphs = []
        for ttt, replayed in zip(schedules, replays, strict=True):
            own, before = list(ttt.batches(begin, end)), len(replayed.recorded)
            rows = [(*w, enabled and replayed(w[0], w)) for documents in own for w in windows_of(ttt, documents)]
            windows.append(np.array(rows, np.int64).reshape(-1, 5))
            batches.append(len(own))
            graphs.append(len(replayed.recorded) - before)
        ttt, steps = schedules[0], 0
        if end in ttt.phase_ends:
            tokens = int(ttt.lengths[ttt.order[:end]].sum())
            steps = config.global_ttt_epochs * (-(-tokens // config.global_ttt_chunk_tokens) - 1)
        found.append(Phase(windows, batches, graphs, steps))
    return found


# --- Stages ---


@dataclasses.dataclass(eq=False)  # its methods keep what they have computed
class Budget:
    """A run, what its steps cost, and by how much the ceilings are missed."""

    config: t.Config
    table: Table
    ceilings: Ceilings
    calibration: Calibration

    def estimate(self, compute: Callable[[float, Ceilings], float], ttt: bool = False) -> Seconds:
        """Seconds for the lowest, the middle and the highest factor, with a fast, a middling and a slow host."""
        factors = self.calibration.ttt if ttt else self.calibration.training
        hosts = (dataclasses.replace(self.ceilings, host=share * self.ceilings.host) for share in HOSTS)
        return Seconds(*(float(compute(factor, c)) for factor, c in zip(factors, hosts, strict=True)))

    def step(self, use: str) -> Seconds:
        """Time of one step of a use."""
        rows = self.table.rows(use)
        return self.estimate(lambda factor, c: cost_model.step_seconds(rows, c, factor))

    @property
    def uses(self) -> tuple[str, str]:
        """The training step before and after the loops begin. One that predicts ahead stands for those after MTP_END:
        it takes the same products."""
        if self.config.ahead_weights:
            return "training (multi-token prediction)", "training (looped + multi-token prediction)"
        return "training", "training (looped)"

    @functools.cached_property
    def windows(self) -> WindowCosts:
        """Costs of TTT's windows."""
        return WindowCosts(self.table)

    @functools.cached_property
    def phases(self) -> list[Phase]:
        """The schedule of TTT, without phases where there is none."""
        return phases(self.config, stream_offsets()) if self.config.ttt_mode == "phased" else []

    def compiling(self, uses: tuple[str, ...]) -> Seconds:
        """Time to compile the graphs of some uses, each variant once."""
        seconds, seen = NOTHING, set()
        for graph in self.table.content["compiled"]:
            if graph["use"] in uses and (graph["use"], graph["part"]) not in seen:
                seen.add((graph["use"], graph["part"]))
                node = ASSUMED["symbolic node" if graph["use"] == "TTT" else "node"]
                seconds += node * graph["nodes"] + ASSUMED["kernel"] * graph["kernels"]
        return seconds

    def training(self) -> tuple[list[Stage], list[int]]:
        """Stages up to the calibration, and the steps before and after the loops begin."""
        config = self.config
        plain, looped = map(self.step, self.uses)
        calibrate = self.step("calibration") * config.gptq_calibration_batches
        steps, seconds = [], []
        for k in range(3):
            reserve = config.gptq_reserve_seconds
            reserve = (
                min(t.CALIBRATION_MARGIN * calibrate[k], 0.9 * config.max_wallclock_seconds) if reserve < 0 else reserve
            )
            timed = dataclasses.replace(config, gptq_reserve_seconds=reserve)
            steps.append(training_steps(timed, plain[k], looped[k]))
            seconds.append((steps[k][0] * plain[k], steps[k][1] * looped[k]))
        before, after = (Seconds(*column) for column in zip(*seconds, strict=True))
        warm = (plain + looped) * config.warmup_steps
        compiled = self.compiling((*self.uses, "evaluation"))
        batches = self.evaluation_batches
        counted = "table: {} steps of {:.1f} ms"
        validate = self.step("evaluation") * batches
        return [
            Stage("data, audit", ASSUMED["data"], "", "assumed"),
            Stage("setup", ASSUMED["setup"], "", "assumed"),
            Stage("warmup, compiling", compiled, "", "assumed: seconds for each node and kernel of the table's graphs"),
            Stage("warmup, steps", warm, "", f"table: {config.warmup_steps} steps of each variant"),
            Stage("train, before the loops", before, "training", counted.format(steps[1][0], 1e3 * plain.mid)),
            Stage("train, after", after, "training", counted.format(steps[1][1], 1e3 * looped.mid)),
            Stage("validate", validate, "", f"table: {batches} batches of each rank"),
            Stage("calibrate", calibrate, "training", f"table: {config.gptq_calibration_batches} eager batches"),
        ], [sum(s) for s in steps]

    @functools.cached_property
    def evaluation_batches(self) -> int:
        """Batches of the rank with most, by the script's packing."""
        config = self.config
        windows = t.evaluation_windows(stream_offsets(), config.eval_context, config.eval_step)
        sequences = len(t.pack_sequences(windows, config.eval_context))
        return math.ceil(math.ceil(sequences / config.eval_rows) / RANKS)

    def artifact(self) -> list[Stage]:
        """Stages of the artifact, on rank 0: outside of both limits but for reading it."""
        model = t.meta_model(dataclasses.replace(self.config, device="cpu", attention="sdpa"))
        banks = [p for p in model.parameters() if p.dim() > 1 and p.numel() > 65536]
        integers = sum(p.numel() for p in banks)
        groups = self.config.gptq_row_groups or 1  # one after the other, of all but tables
        columns = sum(p.size(-1) * (groups if p.dim() == 3 else 1) for p in banks)
        attempt = ASSUMED["column"] * columns + ASSUMED["packed integer"] * integers
        if self.config.lqer_enabled:
            attempt += ASSUMED["corrections"]
        attempts = ASSUMED["attempts"]
        quantize = Seconds(*(a * b for a, b in zip(attempt, attempts, strict=True)))
        unpack = ASSUMED["unpacked integer"] * integers
        return [
            Stage("quantize", quantize, "", f"assumed: {attempts.mid:g} attempts of {columns} columns"),
            Stage("pack", unpack + Seconds(1, 2, 4), "", "assumed: read once for the table of sizes"),
            Stage("unpack", unpack, "evaluation", f"assumed: {integers} integers"),
        ]

    def evaluation(self) -> list[Stage]:
        """Stages after the artifact is read. Compiling TTT's graphs counts where it is inside the clock."""
        batches = self.evaluation_batches
        seconds = self.step("evaluation") * batches
        stages = [Stage("evaluate", seconds, "evaluation", f"table: {batches} batches of each rank")]
        targets = int(document_lengths().sum())
        if self.config.hint_enabled:
            basis = f"assumed: {targets} targets, by threads of the host"
            stages.append(Stage("hints", ASSUMED["hinted target"] * targets, "evaluation", basis))
        if not self.phases:
            return stages
        compiled = self.compiling(("TTT", "full-model SGD"))
        stages.append(Stage("ttt, compiling", compiled, "", "assumed; before the clock, or else it counts"))
        windows = sum(len(w) for phase in self.phases for w in phase.windows)
        replayed = sum(int(w[:, 4].sum()) for phase in self.phases for w in phase.windows)
        most = max(map(sum, zip(*(phase.graphs for phase in self.phases), strict=True)))
        basis = (
            f"table: {len(self.phases)} phases, {windows} windows on all ranks, of which {replayed} are replayed as "
            f"CUDA graphs, at most {most} on a rank; the slowest rank of each phase"
        )
        stages.append(Stage("ttt, score and adapt", total(map(self.phase_seconds, self.phases)), "evaluation", basis))
        steps = sum(phase.full_model_steps for phase in self.phases)
        sgd = self.step("full-model SGD") * steps
        stages.append(Stage("ttt, full-model steps", sgd, "evaluation", f"table: {steps} steps"))
        shares = sum(phase.full_model_steps > 0 for phase in self.phases) + 1
        share = 2 * targets * shares / self.ceilings.gloo
        basis = f"assumed: {shares} all-reduces of {targets} bytes between hosts' processes"
        stages.append(Stage("ttt, ledger", Seconds(0.5, 1, 3) * share, "evaluation", basis))
        if self.config.ttt_plain_weight:
            arrays = 4 if self.config.hint_enabled else 2  # of adapted and plain scores, and of their hints
            share = 2 * 4 * targets * arrays / self.ceilings.gloo
            seconds = ASSUMED["mixed target"] * targets + Seconds(0.5, 1, 3) * share
            basis = f"assumed: {arrays} all-reduces of {targets} float32, and {targets} targets on the host"
            stages.append(Stage("ttt, mixing", seconds, "evaluation", basis))
        return stages

    def phase_seconds(self, phase: Phase) -> Seconds:
        """Time of the slowest rank."""

        def of_rank(rank: int, factor: float, c: Ceilings) -> float:
            windows = self.windows.seconds(phase.windows[rank], c, factor).sum()
            return self.config.ttt_grad_steps * windows + self.windows.batch_seconds(c, factor) * phase.batches[rank]

        seconds = [
            self.estimate(functools.partial(of_rank, rank), ttt=True) + ASSUMED["graph"] * phase.graphs[rank]
            for rank in range(RANKS)
        ]
        return Seconds(*(max(column) for column in zip(*seconds, strict=True)))

    def terms(self) -> dict[str, list[tuple[str, Seconds, str]]]:
        """Largest terms of each step, and of all windows of TTT: name, seconds, what bounds them."""
        found = {}
        for use in (*self.uses, "evaluation", "full-model SGD"):
            found[use] = self.largest(
                [(row, cost_model.row_seconds(row, self.ceilings)) for row in self.table.rows(use)]
            )
        if self.phases:
            windows = np.concatenate([w for phase in self.phases for w in phase.windows])
            rows, seconds = self.windows.table_of(windows, self.ceilings)
            own = list(zip(rows, self.config.ttt_grad_steps * seconds.sum(0) / RANKS, strict=True))
            found["TTT, all windows, mean of the ranks"] = self.largest(own, ttt=True)
        return found

    def largest(
        self, rows: list[tuple[Row, float]], most: int = 12, ttt: bool = False
    ) -> list[tuple[str, Seconds, str]]:
        """The largest sums of rows of one term and one kind of kernels."""
        sums: dict[str, float] = {}
        bounds: dict[str, str] = {}
        for row, seconds in rows:
            name = row.term if row.kind in ("eager", "collective") else f"{row.term}: {KINDS.get(row.kind, row.kind)}"
            sums[name] = sums.get(name, 0.0) + seconds
            arithmetic = row.flops / cost_model.rate(row, self.ceilings) > row.bytes / self.ceilings.memory
            bounds[name] = "arithmetic" if arithmetic else "bytes"
        ordered = sorted(sums, key=lambda name: -sums[name])
        factors = Seconds(*(self.calibration.ttt if ttt else self.calibration.training))
        cut = [(name, factors * sums[name], bounds[name]) for name in ordered[:most]]
        return [*cut, ("the rest", factors * sum(sums[name] for name in ordered[most:]), "")]


KINDS = {
    "matrix product": "products",
    "hand-written": "own kernels",
    "fused": "fused kernels",
    "attention": "kernel",
    "masked attention": "kernel",
}


def peer_check(budget: Budget, reference: Table) -> Seconds:
    """The peer's own test-time training by this model. Only the factor of one of its steps was fitted.

    By its log: the 16 longest documents are a batch, and each next 64. All rows of a batch run until its longest
    document ends, with logits at all places. Its ranks take the next batch as they become free. Steps of all weights
    are its own, as published.
    """
    lengths = np.sort(document_lengths())[::-1]
    counts = -(-lengths // 48)
    costs, c = WindowCosts(reference), budget.ceilings
    firsts = [0, *range(16, len(counts), 64)]

    def seconds_of(first: int, end: int, factor: float) -> float:
        length = np.minimum(48 * np.arange(1, counts[first] + 1), 2048)
        rows = np.full_like(length, end - first)
        return costs.seconds(np.stack([rows, length, length, rows], 1), c, factor).sum()

    def whole(factor: float) -> float:
        spent, free = PEER["ttt, full-model steps"], np.zeros(RANKS)
        ends = [750, 1500, 2250, 3000]
        for first, end in itertools.pairwise((*firsts, len(counts))):
            if ends and first >= ends[0]:
                del ends[0]
                spent, free = spent + free.max(), np.zeros(RANKS)
            free[free.argmin()] += seconds_of(first, end, factor)
        return float(spent + free.max())

    return Seconds(*map(whole, budget.calibration.ttt))


# --- Report ---


def report(budget: Budget, reference: Table) -> dict[str, Any]:
    """Everything, for JSON and text. Estimates are under "estimated", published figures under "peer_measured"."""
    first, steps = budget.training()
    stages = [*first, *budget.artifact(), *budget.evaluation()]
    sums = {limit: total(s.seconds for s in stages if s.counts == limit) for limit in ("training", "evaluation")}
    ttt = total(s.seconds for s in stages if s.name.startswith("ttt,") and s.counts)
    compiled = next((s.seconds for s in stages if s.name == "ttt, compiling"), NOTHING)
    named = {s.name: s.seconds for s in stages}
    figures = {
        "step before the loops": budget.step(budget.uses[0]),
        "step after": budget.step(budget.uses[1]),
        "training steps": Seconds(*map(float, steps)),
        "evaluation": sums["evaluation"],
        "ttt": ttt,
        **{
            name: named[name]
            for name in ("calibrate", "unpack", "ttt, compiling", "ttt, full-model steps")
            if name in named
        },
    }
    return dict(
        remark="Every figure is estimated. None was measured on a GPU.",
        table=dict(
            name=Path(budget.table.name).name,
            torch=budget.table.content.get("torch"),
            form=budget.table.content.get("form"),
        ),
        ceilings=dict(estimated=dataclasses.asdict(budget.ceilings)),
        calibration=dict(estimated=dataclasses.asdict(budget.calibration)),
        window_fit_residual=dict(estimated=budget.windows.residual if budget.phases else None),
        stages=[
            dict(stage=s.name, estimated=s.seconds._asdict(), counts_to=s.counts or None, basis=s.basis) for s in stages
        ],
        phases=[
            dict(
                phase=number,
                estimated=budget.phase_seconds(phase)._asdict(),
                batches=sum(phase.batches),
                windows=sum(map(len, phase.windows)),
                full_model_steps=phase.full_model_steps,
            )
            for number, phase in enumerate(budget.phases, 1)
        ],
        sums={name: dict(estimated=value._asdict(), limit=LIMIT) for name, value in sums.items()},
        evaluation_with_compiling=dict(estimated=(sums["evaluation"] + compiled)._asdict(), limit=LIMIT),
        peer={
            name: dict(
                estimated=figures[name]._asdict(), peer_measured=value, estimated_ratio=figures[name].mid / value
            )
            for name, value in PEER.items()
            if name in figures
        },
        peer_check=dict(estimated=peer_check(budget, reference)._asdict(), peer_measured=PEER["ttt"]),
        targets={
            name: dict(estimated=figures[name]._asdict(), target=most, met=bool(figures[name].mid <= most))
            for name, most in TARGETS.items()
        },
        terms={
            use: [dict(term=name, estimated=seconds._asdict(), bound=bound) for name, seconds, bound in rows]
            for use, rows in budget.terms().items()
        },
    )


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def spread(row: dict[str, Any], scale: float = 1.0) -> str:
    """An estimate as text."""
    return str(Seconds(**row["estimated"]) * scale)


def text(found: dict[str, Any], settings: dict[str, str]) -> str:
    """The report in Markdown."""
    preset = settings.get("PRESET", "record")
    lines = [f"# Budget of a `{preset}` run on 8 H100s, estimated", ""]
    knobs = " ".join(f"{name}={value}" for name, value in settings.items())
    lines += [f"{found['remark']} Middle of the estimate, and its range. {knobs}".strip(), ""]
    rows = [[s["stage"], spread(s), s["counts_to"] or "", s["basis"]] for s in found["stages"]]
    lines += markdown_table(["stage", "estimated seconds", "counts to", "basis"], rows)
    for name, row in found["sums"].items():
        lines.append(f"- {name}, estimated: {spread(row)} s of {row['limit']:.0f} allowed")
    lines.append(f"- evaluation with compiling, estimated: {spread(found['evaluation_with_compiling'])} s")
    if found["phases"]:
        rows = [
            [str(p["phase"]), spread(p), *(str(p[name]) for name in ("windows", "batches", "full_model_steps"))]
            for p in found["phases"]
        ]
        lines += ["", "## Phases of test-time training: the slowest of 8 ranks scores and adapts, estimated", ""]
        lines += markdown_table(["phase", "estimated seconds", "windows", "batches", "full-model steps after it"], rows)
    lines += ["", "## Against PR #2163", "", "Its figures are published; ours are estimated.", ""]
    rows = [
        [name, spread(row), f"{row['peer_measured']:.4g}", f"{row['estimated_ratio']:.2f}"]
        for name, row in (scaled(name, row) for name, row in found["peer"].items())
    ]
    lines += markdown_table(["", "estimated", "published", "estimated ratio"], rows)
    fits = found["calibration"]["estimated"]
    training, ttt = (Seconds(*fits[name]) for name in ("training", "ttt"))
    lines += [
        "## Calibration",
        "",
        f"Real kernels take {factor_text(training)} times as long as the ceilings allow in training, and "
        f"{factor_text(ttt)} times in test-time training (estimated): two factors, fitted to three published times.",
        "",
    ]
    rows = [
        [name, f"{1e3 * f['published']:.1f}", f"{1e3 * f['modelled']:.1f}", f"{f['residual']:+.1%}"]
        for name, f in fits["fits"].items()
    ]
    lines += markdown_table(["ms", "published", "estimated", "residual"], rows)
    check = found["peer_check"]
    lines += [
        f"A check: at the factor that its own step asks for, the peer's schedule of test-time training takes "
        f"{check['estimated']['high']:.0f} s by this model, estimated ({check['estimated']['mid']:.0f} at the middle "
        "factor); its published logs have 473 to 528 s.",
        "",
    ]
    for use, terms in found["terms"].items():
        whole = sum(row["estimated"]["mid"] for row in terms)
        scale, unit = (1.0, "s") if use.startswith("TTT") else (1e3, "ms")
        lines += [f"## Largest terms: {use}, estimated", ""]
        rows = [[r["term"], spread(r, scale), f"{r['estimated']['mid'] / whole:.0%}", r["bound"]] for r in terms]
        lines += markdown_table(["term", f"estimated {unit}", "estimated share", "bound by"], rows)
    lines += ["## Targets", ""]
    for name, row in found["targets"].items():
        scale, unit = (1.0, "s") if name == "evaluation" else (1e3, "ms")
        verdict = "met" if row["met"] else "not met"
        lines.append(f"- {name}: {spread(row, scale)} {unit} estimated, target {scale * row['target']:.0f}: {verdict}")
    return "\n".join(lines) + "\n"


def factor_text(factor: Seconds) -> str:
    """A factor and its range as text."""
    return f"{factor.mid:.2f} ({factor.low:.2f} to {factor.high:.2f})"


def scaled(name: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A figure of a step in milliseconds, others as they are."""
    if not name.startswith("step"):
        return name if name == "training steps" else f"{name}, s", row
    estimated = (Seconds(**row["estimated"]) * 1e3)._asdict()
    return f"{name}, ms", {**row, "estimated": estimated, "peer_measured": 1e3 * row["peer_measured"]}


def pairs(texts: list[str], what: str) -> dict[str, str]:
    """NAME=VALUE of the command line. Errors: BudgetError."""
    parts = [part for text in texts for part in re.split(r",(?=\w+=)", text) if part]  # values may have commas
    if any("=" not in part for part in parts):
        raise BudgetError(f"{what} {next(p for p in parts if '=' not in p)}: must be NAME=VALUE")
    return dict(part.split("=", 1) for part in parts)


def ceilings(texts: list[str]) -> Ceilings:
    """The ceilings with changes. Errors: BudgetError."""
    changes = {}
    for name, value in pairs(texts, "--ceilings").items():
        if name not in {f.name for f in dataclasses.fields(Ceilings)}:
            names = ", ".join(f.name for f in dataclasses.fields(Ceilings))
            raise BudgetError(f"--ceilings {name}: must be one of {names}")
        try:
            changes[name] = float(value)
        except ValueError:
            changes[name] = -1.0
        if not 0 < changes[name] < float("inf"):
            raise BudgetError(f"--ceilings {name}={value}: must be a number above 0")
    return dataclasses.replace(Ceilings(), **changes)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", type=Path, default=RESULTS / "h100.json", help="costs of the script as it is")
    parser.add_argument(
        "--reference", type=Path, default=RESULTS / "h100_reference.json", help="costs of what the factor is fitted to"
    )
    parser.add_argument("--set", action="append", default=[], dest="settings", help="KNOB=VALUE[,KNOB=VALUE...]")
    parser.add_argument("--ceilings", action="append", default=[], help="NAME=VALUE[,...] of cost_model.Ceilings")
    parser.add_argument("--out", type=Path, help="folder for budget.md and budget.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints the budget. Returns the exit code: 2 for an error of the user, after one line that explains it."""
    options = arguments(argv)
    try:
        settings = pairs(options.settings, "--set")
        table, reference = Table.read(options.table), Table.read(options.reference)
        limits = ceilings(options.ceilings)
        config = configuration(settings, table)
        budget = Budget(config, table, limits, cost_model.calibrate(reference, limits))
        found = report(budget, reference)
        shown = text(found, settings)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "budget.md").write_text(shown, encoding="utf-8")
            (options.out / "budget.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (BudgetError, TableError, t.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
