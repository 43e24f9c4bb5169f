"""A forecast of FineWeb bits per byte on 8 H100s, with an interval, from committed measurements alone.

    make forecast                                  writes docs/forecast.md and bench/results/forecast.json
    make forecast ARGS="--without hints context"   leaves parts out, and writes nothing

It starts at the published score of PR #2163 and adds a change for each part. Every part has a distribution, drawn DRAWS
times with a fixed seed. The forecast is the distribution of the sum. Figures of others are in PUBLISHED, judgements
without a measurement in ASSUMED, and all else is read from bench/results. Changes are in bits per byte: below 0 is
better. Nothing here was measured on a GPU of ours, so every change is an estimate.

Gains in small are carried to full size as steps. A gain is worth the steps that would have gained the same in small.
The same share of steps then counts at the slope of full size, by which public runs improve with more steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import forecast_page  # noqa: E402
import lab_ideas as ideas  # noqa: E402
import lab_report  # noqa: E402
import ttt_variants  # noqa: E402
from intervals import STUDENT  # noqa: E402

GOAL = 1.045
DRAWS, SEED = 100_000, 0
PERCENTILES = (2.5, 50.0, 97.5)

# Figures of others, and where they are from; scores and gains are in bits per byte. PR: a pull request of
# openai/parameter-golf.
PUBLISHED: dict[str, tuple[Any, str]] = {
    "score": ((1.05980, 1.06038, 1.06087), "PR #2163, seeds 42, 0 and 314"),
    "head of the leaderboard": (1.05651, "PR #2135"),
    "loss of quantization": (0.0088, "PR #2163"),
    "before and after test-time training": ((1.0765, 1.0598), "PR #2163, seed 42"),
    "a gain of test-time training, and what windows alone gain": (
        (0.0128, 0.0061),
        "one measured case: windows that cross documents against windows that do not",
    ),
    "chunk of test-time training": (48, "PR #2163"),
    "gain of hints": ((0.0005, 0.0015), "a public fixed form: matches of 15, weight 2.625"),
    "gain of progressive context": (0.0017, "PR #2014"),
    "gain of an n-gram mixture on a weak and on a strong model": ((0.0515, 0.0002), "two public measurements"),
    "share of time that newer ideas save": (0.2, "the nanoGPT speedrun, all of them together"),
    "tokens of a step": (786_432, "PR #2163"),
    # The same architecture, trained to its end each time. The first series has scores after test-time training, means
    # of 3 seeds; the second has those of the float weights, one seed.
    "steps and scores, 1": (
        ((7_185, 1.1194), (20_000, 1.0960), (50_000, 1.0858)),
        "PRs #549, #1407 and #1424, after test-time training",
    ),
    "steps and scores, 2": (
        ((9_000, 1.135), (12_000, 1.127), (15_000, 1.122), (20_000, 1.115), (25_000, 1.109), (30_000, 1.104)),
        "PRs #628, #644 and #668, float weights",
    ),
}

# Judgements: least, most likely, most. Nobody measured them.
ASSUMED: dict[str, tuple[tuple[float, float, float], str]] = {
    "reproduction": (
        (-0.001, 0.0, 0.004),
        "bpb by which this script's own `record` differs from the peer's score. It was never trained on FineWeb, and a "
        "new implementation loses more often than it gains. Others who ran a peer's unchanged script differed by "
        "0.0003 (PR #2117).",
    ),
    "after test-time training": (
        (0.7, 0.85, 1.0),
        "share of what better quantization gains that is left after test-time training, which mends some of the loss",
    ),
    "together": (
        (0.5, 0.75, 1.0),
        "share of the sum of single gains that is left when all ideas act together",
    ),
}

# Knobs whose values peers chose by runs at full size. What another value gains in small is not carried.
CHOSEN_AT_FULL_SIZE = frozenset(
    [
        "MATRIX_LR",
        "SCALAR_LR",
        "TIED_EMBED_LR",
        "QK_GAIN_INIT",
        "EMA_DECAY",
        "LN_SCALE",
        "NUM_LOOPS",
        "ENABLE_LOOPING_AT",
        "Z_LOSS_WEIGHT",
        "SMEAR_GATE_TYPE",
        "VOCAB_SIZE",
        "MLP_MULT",
    ]
)
# Knobs that a preset sets to be faster on a GPU, where the laboratory's CPUs are not. What they cost is its own part.
SPEED_KNOBS = frozenset(["WINDOW_ATTN_SIZE", "WINDOW_ATTN_LAYERS", "NUM_HEADS", "NUM_KV_HEADS"])
DATA_ROW = "data: "
DEFAULT_ORDER = "rows"  # of train_gpt.py's DATA_ORDER

Draws = np.ndarray  # [DRAWS]


class ForecastError(Exception):
    """What a user can mend: one line, exit code 2."""


class Part(NamedTuple):
    """A part of the forecast."""

    name: str
    measured: list[str]  # what was measured: file, row, figure, interval
    rule: str  # how it is carried to full size
    change: Draws
    falsified: str  # what would show on a GPU that it is wrong

    @property
    def range(self) -> tuple[float, float, float]:
        return percentiles(self.change)


class Sample(NamedTuple):
    """The mean of a few values, and what is needed to draw it."""

    mean: float
    error: float  # standard error
    freedom: int  # degrees of freedom

    @property
    def half(self) -> float:
        """Half the 95% interval."""
        return STUDENT.get(self.freedom + 1, 1.96) * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def sample(values: Iterable[float]) -> Sample:
    """Errors: ForecastError for fewer than two values."""
    values = list(values)
    if len(values) < 2:
        raise ForecastError("a figure has one seed, and an interval needs two")
    return Sample(statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1)


def percentiles(draws: Draws) -> tuple[float, float, float]:
    """Low, middle, high: 95% of the draws lie between low and high."""
    low, middle, high = (float(x) for x in np.percentile(draws, PERCENTILES))
    return low, middle, high


def generator(name: str) -> np.random.Generator:
    """Random numbers of a name's own: a part does not change when another is added."""
    return np.random.default_rng([SEED, *name.encode()])


def triangular(name: str, low: float, middle: float, high: float) -> Draws:
    """Draws between low and high, most of them near the middle."""
    if low == high:
        return np.full(DRAWS, float(low))
    return generator(name).triangular(low, middle, high, DRAWS)


def uniform(name: str, low: float, high: float) -> Draws:
    return generator(name).uniform(low, high, DRAWS)


def student(name: str, of: Sample) -> Draws:
    """The mean as the sample knows it: its 95% interval is Student's."""
    return of.mean + of.error * generator(name).standard_t(of.freedom, DRAWS)


def assumed(name: str) -> Draws:
    return triangular(name, *ASSUMED[name][0])


# ------------------------------------------------------------------------------------------- what a step is worth


def public_slopes() -> list[float]:
    """Bits per byte by which public runs improve for each e-fold of their steps, between neighbouring lengths."""
    series = [value for name, (value, _) in PUBLISHED.items() if name.startswith("steps and scores")]
    return [
        (before[1] - after[1]) / math.log(after[0] / before[0])
        for runs in series
        for before, after in itertools.pairwise(runs)
    ]


def full_slope() -> Draws:
    """The slope at full size, from the lowest to the highest of the public runs. The same in every part."""
    slopes = public_slopes()
    return triangular("slope", min(slopes), statistics.median(slopes), max(slopes))


class SmallSlope(NamedTuple):
    """Bits per byte for each e-fold of steps in small."""

    mean: float
    error: float
    source: str


def lab_slope(results: list[dict[str, Any]], sizes: Sequence[str] = ideas.USUAL) -> SmallSlope | None:
    """From runs of one row, size and seed that differ in their steps alone; None where that says too little.

    Least squares through the origin over pairs of runs. It counts if its standard error is below a quarter of it.
    """
    runs: dict[str, dict[int, float]] = {}
    for r in results:
        if r["what"] == "run" and r["size"] in sizes and not lab_report.is_tuning(r) and r.get("bpb") is not None:
            same = json.dumps([r["row"], r["size"], r["seed"], r["factor"], r["recipe"]], sort_keys=True)
            runs.setdefault(same, {})[r["steps"]] = r["bpb"]
    pairs = [
        (math.log(steps / fewer), of_row[fewer] - of_row[steps])
        for of_row in runs.values()
        for fewer, steps in itertools.pairwise(sorted(of_row))
    ]
    if len(pairs) < 3:
        return None
    weight = sum(x * x for x, _ in pairs)
    slope = sum(x * y for x, y in pairs) / weight
    error = math.sqrt(sum((y - slope * x) ** 2 for x, y in pairs) / (len(pairs) - 1) / weight)
    if error > slope / 4:
        return None
    return SmallSlope(slope, error, f"lab.jsonl, {len(pairs)} pairs of runs that differ in their steps alone")


def demo_slope(page: Path) -> SmallSlope | None:
    """From the scores of the demo after three lengths of training, in bench/results/hint.md."""
    text = page.read_text() if page.is_file() else ""
    rows = {name: re.search(rf"^\| {name} \|(.*)\|$", text, flags=re.M) for name in ("steps", "without hints")}
    steps, scores = ([float(x) for x in re.findall(r"[\d.]+", row[1])] if row else [] for row in rows.values())
    if len(steps) != len(scores):
        return None
    runs = sorted(zip(steps, scores, strict=True))
    slopes = [(a[1] - b[1]) / math.log(b[0] / a[0]) for a, b in itertools.pairwise(runs)]
    if len(slopes) < 2 or min(slopes) <= 0:
        return None
    error = abs(slopes[-1] - slopes[-2]) / 2
    return SmallSlope(slopes[-1], error, f"hint.md, the demo after {runs[-2][0]:g} and {runs[-1][0]:g} steps")


def small_slope(results: list[dict[str, Any]], folder: Path) -> SmallSlope:
    """The slope in small. Errors: ForecastError where neither source is there."""
    found = lab_slope(results) or demo_slope(folder / "hint.md")
    if found is None:
        raise ForecastError(f"{folder}: neither lab.jsonl nor hint.md says what a step is worth in small")
    return found


def small_slope_draws(slope: SmallSlope, name: str = "slope in small") -> Draws:
    """Never below half of the mean: dividing by nearly 0 would make any gain large."""
    return np.maximum(slope.mean + slope.error * generator(name).standard_normal(DRAWS), slope.mean / 2)


# ---------------------------------------------------------------------------------------------- from small to full size


class Scale(NamedTuple):
    """What parts share that carry gains of the laboratory."""

    small: Draws  # bpb for each e-fold of steps in small
    full: Draws  # and at full size
    compute: Mapping[str, float]  # training FLOPs of each of the laboratory's sizes
    full_compute: float
    long: Draws  # bpb for each e-fold of steps after the laboratory's longest training
    eightfolds: float  # from that training's tokens for each parameter to those at full size


# What a step of the preset that is forecast costs.
TABLE, BUDGET = "frontier/h100.json", "frontier/budget.json"
# One model of the laboratory, and the same model trained for eight times as long; parameters of it and of `frontier`.
SHORT, LONG = "0.7M", "0.7M x 8"
PARAMETERS, FULL_PARAMETERS = 0.72e6, 36e6


def eightfolds_left(folder: Path) -> float:
    """By how many factors of eight full size has more tokens for each parameter than the laboratory's LONG."""
    size = next(size for size in ideas.SIZES if size.name == LONG)
    small = size.steps * size.batch_tokens / PARAMETERS
    steps = read_json(folder / BUDGET)["peer"]["training steps"]["estimated"]["mid"]
    return max(0.0, math.log(steps * PUBLISHED["tokens of a step"][0] / FULL_PARAMETERS / small, 8))


def full_flops(folder: Path) -> float:
    """Training FLOPs of a run on 8 H100s: the table's steps times the budget's number of them."""
    table, budget = read_json(folder / TABLE), read_json(folder / BUDGET)
    total = 0.0
    for use, stage, step in (
        ("training", "train, before the loops", "step before the loops"),
        ("training (looped)", "train, after", "step after"),
    ):
        flops = sum(r["matrix_flops"] + r["attention_flops"] for r in table["rows"] if r["use"] == use)
        seconds = next(s["estimated"]["mid"] for s in budget["stages"] if s["stage"] == stage)
        total += 8 * flops * seconds / budget["peer"][step]["estimated"]["mid"]
    return total


class Carried(NamedTuple):
    """An effect in small at the largest size where it was measured, and its trend."""

    size: str
    effect: Sample  # bpb there
    trend: Sample | None  # bpb per doubling of the training's FLOPs
    middle: float  # bpb, mean of the sizes


def carried(cells: Mapping[str, Mapping[int, float]], compute: Mapping[str, float]) -> Carried | None:
    """Of differences by size and seed. None without two seeds at a size, or if a training diverged."""
    sizes = [name for name in ideas.USUAL if len(cells.get(name, {})) > 1]
    if not sizes or not all(math.isfinite(x) for of_size in cells.values() for x in of_size.values()):
        return None
    known = [size for size in sizes if size in compute]
    seeds = sorted(set.intersection(*(set(cells[size]) for size in known))) if len(known) > 1 else []
    doublings = [math.log2(compute[size]) for size in known]
    slopes = [lab_report.slope_of(doublings, [cells[size][seed] for size in known]) for seed in seeds]
    middle = statistics.mean(statistics.mean(cells[size].values()) for size in sizes)
    trend = sample(slopes) if len(slopes) > 1 else None
    return Carried(sizes[-1], sample(cells[sizes[-1]].values()), trend, middle)


def lasting(name: str, cells: Mapping[str, Mapping[int, float]], scale: Scale) -> tuple[Draws, str]:
    """The share of a gain, in steps, that is left at full size's length of training; and what measured it.

    Where a model was trained for eight times as long, too, what that left of the gain is left again with each further
    factor of eight in tokens for each parameter. All of it where that was not measured.
    """
    if any(len(cells.get(size, {})) < 2 for size in (SHORT, LONG)):
        return np.ones(DRAWS), ""
    short, long = (sample(cells[size].values()) for size in (SHORT, LONG))
    steps = [
        -student(f"{name} at {size}", of) / slope
        for size, of, slope in ((SHORT, short, scale.small), (LONG, long, scale.long))
    ]
    kept = np.where(steps[0] > 0, np.clip(steps[1] / np.maximum(steps[0], 1e-9), 0, 1), 1)
    return kept ** (1 + scale.eightfolds), f"{short} bpb at {SHORT}, {long} bpb at {LONG}"


def worth(name: str, found: Carried, scale: Scale) -> Draws:
    """Logarithm of the ratio of steps that the effect is worth at full size, before any share of it is taken away.

    A gain that shrinks over the sizes goes on as a power of compute: by the same share with each doubling. None grows
    beyond what was measured.
    """
    gain = -student(f"effect of {name}", found.effect)
    if found.trend and found.size in scale.compute and found.middle < 0:
        doublings = max(math.log2(scale.full_compute / scale.compute[found.size]), 0.0)
        lost = np.maximum(student(f"trend of {name}", found.trend) / -found.middle, 0)  # share, with each doubling
        gain = np.where(gain > 0, gain * np.exp(-lost * doublings), gain)
    return gain / scale.small


# ---------------------------------------------------------------------------------------------------------------- parts


def base_part() -> Part:
    """Noise of the seeds of both means: the peer's three and three of ours."""
    of = sample(PUBLISHED["score"][0])
    both = Sample(0.0, of.error * math.sqrt(2), of.freedom)
    return Part(
        "seeds",
        [f"mean of the peer's three seeds and its 95% interval: {of.mean:.5f} ± {of.half:.5f}"],
        "two means of three seeds differ by chance; Student's t",
        student("seeds", both),
        f"three seeds of one preset whose mean has an interval wider than ± {of.half:.4f}",
    )


def reproduction_part() -> Part:
    """What is lost or gained by not being the peer's script."""
    low, _, high = ASSUMED["reproduction"][0]
    return Part(
        "reproduction",
        ["nothing: an assumption"],
        f"this script's `record` scores between {-low:.4f} below and {high:.4f} above the peer",
        assumed("reproduction"),
        f"`val_bpb` of a whole `record` run above {statistics.mean(PUBLISHED['score'][0]) + high:.4f}",
    )


def order_scores(results: list[dict[str, Any]]) -> dict[str, dict[tuple[str, str, int], float]]:
    """Scores by recipe, oldest first, then by order of the data, size and seed."""
    scores: dict[str, dict[tuple[str, str, int], float]] = {}
    for r in results:
        if r["what"] != "run" or r.get("bpb") is None or "flops" not in r["kinds"]:
            continue
        if r["row"] == lab_report.CONTROL:
            order = r["recipe"].get("DATA_ORDER", DEFAULT_ORDER)
        elif r["row"].startswith(DATA_ROW):
            order = r["row"].removeprefix(DATA_ROW)
        else:
            continue
        recipe = {name: value for name, value in r["recipe"].items() if name != "DATA_ORDER"}
        scores.setdefault(json.dumps(recipe, sort_keys=True), {})[order, r["size"], r["seed"]] = r["bpb"]
    return scores


def order_minus(order: str, other: str, results: list[dict[str, Any]]) -> tuple[dict[str, dict[int, float]], str]:
    """Differences by size and seed, with the newest recipe that was tried with both orders; and that recipe."""
    for recipe, scores in reversed(order_scores(results).items()):
        cells: dict[str, dict[int, float]] = {}
        for found, size, seed in scores:
            if found == order and (other, size, seed) in scores:
                cells.setdefault(size, {})[seed] = scores[order, size, seed] - scores[other, size, seed]
        if any(len(of_size) > 1 for of_size in cells.values()):
            return cells, recipe
    return {}, "{}"


def order_lines(order: str, other: str, results: list[dict[str, Any]], remark: str = "") -> list[str]:
    cells, recipe = order_minus(order, other, results)
    added = f", recipe {recipe}" if recipe != "{}" else ""
    return [
        f"lab.jsonl, {order} minus {other}, {size}{added}: {sample(of_size.values())} bpb{remark}"
        for size, of_size in cells.items()
        if len(of_size) > 1
    ]


def data_part(results: list[dict[str, Any]], scale: Scale, order: str) -> Part:
    """The preset's order of the data, rows or whole documents, against the stream, which peers read."""
    found = carried(order_minus(order, "stream", results)[0], scale.compute)
    base = order_lines("documents", "rows", results, " (both are our own, so it does not count)")
    falsified = (
        f"two runs on the GPU that differ in `DATA_ORDER` alone: {order} are worse than stream, or better by more than "
        "this interval"
    )
    if found is None:
        return Part(
            "data order", ["against stream: not measured yet", *base], "counts as 0", np.zeros(DRAWS), falsified
        )
    batch = next(size.batch_tokens for size in ideas.SIZES if size.name == found.size)
    tokens = PUBLISHED["tokens of a step"][0]
    ratio = batch / tokens
    share = np.exp(uniform("share of the data order", math.log(ratio), math.log(ratio) / 2))
    return Part(
        "data order",
        [*order_lines(order, "stream", results), *base],
        "as steps, times a share. In small, the stream loses since a batch of it holds few documents. That loss falls "
        f"as 1/batch, or as 1 over its root. From {batch:,} to {tokens:,} tokens a share of {ratio:.4f} to "
        f"{math.sqrt(ratio):.4f} is left",
        -worth("data order", found, scale) * share * scale.full,
        falsified,
    )


def quantization_part(folder: Path) -> Part:
    """What of the peer's loss the best committed quantization leaves at equal bytes."""
    rows = read_json(folder / "quantize.json")["rows"]
    by_method: dict[str, dict[str, list[float]]] = {}
    peer = {(r["model"], r["seed"]): r["divergence"] for r in rows if r["method"] == "peer"}
    for r in rows:
        if r["method"] != "peer" and (r["model"], r["seed"]) in peer:
            ratio = r["divergence"] / peer[r["model"], r["seed"]]
            by_method.setdefault(r["method"], {}).setdefault(r["model"], []).append(ratio)
    models = {model for model, _ in peer}
    means = {m: [statistics.mean(x) for x in of.values()] for m, of in by_method.items() if set(of) == models}
    if not means or len(models) < 2:
        raise ForecastError(f"{folder / 'quantize.json'}: needs a method with all of two models or more")
    best = min(means, key=lambda method: statistics.mean(means[method]))
    of = sample(means[best])
    # The full model is one more model: its ratio scatters around the mean as the others do.
    one_more = Sample(of.mean, of.error * math.sqrt(1 + of.freedom + 1), of.freedom)
    left = np.clip(student("quantization", one_more), 0, 1)
    loss, highest = PUBLISHED["loss of quantization"][0], percentiles(left)[2]
    return Part(
        "quantization",
        [
            f"quantize.json, {best}, {model}: divergence over the peer's at equal bytes {one.mean:.3f} ± {one.half:.3f}"
            for model, one in ((model, sample(ratios)) for model, ratios in by_method[best].items())
        ],
        f"the peer's loss of {loss} times 1 minus the ratio, for one more model like these; times the share that is "
        "left after test-time training (assumed)",
        -(1 - left) * loss * assumed("after test-time training"),
        f"`val_bpb_quantized` minus `val_bpb_pre_quant` of a whole run above {highest * loss:.4f}",
    )


def ttt_part(folder: Path) -> Part:
    """Strict stream order against the peers' order by length."""
    rows = read_json(folder / "strict.json")["rows"]
    ratios: dict[str, list[float]] = {}
    for r in rows:
        off = r["off"]["bpb"]
        ratios.setdefault(r["model"], []).append((off - r["stream"]["bpb"]) / (off - r["length"]["bpb"]))
    lines = [
        f"strict.json, gain in stream order over that in length order: {model} {one.mean:.3f} ± {one.half:.3f}"
        for model, one in ((model, sample(values)) for model, values in ratios.items())
    ]
    least, _ = ttt_gains()
    falsified = f"`val_bpb_quantized` minus `val_bpb` of a whole run without hints below {least:.4f}, "
    return part_of_ttt("test-time training", lines, ratios, falsified + "`strictly_causal` true")


def ttt_gains() -> tuple[float, float]:
    """The peer's gain, without what windows alone may have brought and with it."""
    before, after = PUBLISHED["before and after test-time training"][0]
    whole, windows = PUBLISHED["a gain of test-time training, and what windows alone gain"][0]
    return (before - after) * (1 - windows / whole), before - after


def part_of_ttt(name: str, measured: list[str], ratios: Mapping[str, list[float]], falsified: str) -> Part:
    """A part that multiplies the peer's gain by a ratio, which was measured by model."""
    of = sample(x for of_model in ratios.values() for x in of_model)
    one_more = Sample(of.mean - 1, of.error * math.sqrt(1 + of.freedom + 1), of.freedom)
    least, most = ttt_gains()
    return Part(
        name,
        measured,
        f"the ratio minus 1, times the peer's gain of {least:.4f} to {most:.4f}, the smaller without what windows "
        "alone may have brought; times a share from 0 to 1, since these are few documents of another text, and models "
        "far from trained",
        -student(f"ratio of {name}", one_more)
        * uniform("gain of test-time training", least, most)
        * uniform(f"share of {name}", 0, 1),
        falsified,
    )


class Chunks(NamedTuple):
    """How test-time training takes a document, whether scores are mixed with those without it, and LoRA+."""

    targets: int
    recomputed: int  # tokens before them, with a cache
    mixed: bool
    plus: bool  # A and B have rates of their own

    @classmethod
    def of(cls, settings: Mapping[str, Any], usual: int) -> Chunks:
        """Those of knobs in lower case."""
        plain_weight = float(settings.get("ttt_plain_weight", 0))
        recomputed = int(settings.get("ttt_recompute_tokens", 0))
        plus = float(settings.get("ttt_loraplus_lr_ratio", 1)) != 1
        return cls(int(settings.get("ttt_chunk_size", usual)), recomputed, plain_weight > 0, plus)

    def __str__(self) -> str:
        recomputed = f" and {self.recomputed} recomputed tokens" if self.recomputed else ""
        return f"chunks of {self.targets}{recomputed}{', mixed' * self.mixed}{', LoRA+' * self.plus}"


def chunk_part(folder: Path, config: Mapping[str, Any]) -> Part:
    """Other chunks of test-time training than the peer's, each at its best rate of the adapters, and the mixture."""
    usual = PUBLISHED["chunk of test-time training"][0]
    name = "chunks of test-time training"
    own, peers = Chunks.of(config, usual), Chunks(usual, 0, False, False)
    falsified = f"the same artifact scored with `TTT_CHUNK_SIZE={usual} TTT_RECOMPUTE_TOKENS=0 TTT_PLAIN_WEIGHT=0 "
    falsified += "TTT_LORA_LR=1e-4 TTT_LORAPLUS_LR_RATIO=1`: no worse"
    if own == peers:
        return Part(
            name,
            ["nothing: not asked"],
            f"counts as 0: the preset takes the peer's {usual}",
            np.zeros(DRAWS),
            falsified,
        )
    file = "ttt_cache.jsonl" if own.recomputed else "ttt_tuning.jsonl"
    rows = lab_report.read_results(folder / file)
    ratios: dict[str, list[float]] = {}
    for (model, _), gains in gains_by_chunk(rows, usual).items():
        if own in gains and peers in gains:
            ratios.setdefault(model, []).append(gains[own] / gains[peers])
    several = [model for model, values in ratios.items() if len(values) > 1]
    if not several:
        raise ForecastError(f"{file}: needs two seeds with {own} and {peers}")
    unlearned = {r["model"]: r["bpb"] for r in rows if r["variant"] == ttt_variants.OFF}  # seeds differ by less
    best = min(several, key=unlearned.__getitem__)
    lines = [
        f"{file}, gain with {own} over that with {peers}, each at its best rate of those "
        f"that were tried: {model}, seeds: {', '.join(f'{ratio:.3f}' for ratio in values)}"
        for model, values in ratios.items()
    ]
    part = part_of_ttt(name, lines, {best: ratios[best]}, falsified)
    return part._replace(rule=f"{part.rule}; only {best}, the best of these models without learning, counts")


def gains_by_chunk(rows: list[dict[str, Any]], usual: int) -> dict[tuple[str, int], dict[Chunks, float]]:
    """What learning gains by model and seed, then by chunks, at the best rate of the adapters."""
    unlearned = {(r["model"], r["seed"]): r["bpb"] for r in rows if r["variant"] == ttt_variants.OFF}
    best: dict[tuple[str, int], dict[Chunks, float]] = {model: {} for model in unlearned}
    counted = {"ttt_chunk_size", "ttt_recompute_tokens", "ttt_plain_weight", "ttt_loraplus_lr_ratio", "ttt_lora_lr"}
    for r in rows:
        model = (r["model"], r["seed"])
        settings = {knob.lower(): value for knob, value in ttt_variants.VARIANTS.get(r["variant"], {}).items()}
        changes, chunk = set(settings) - counted, Chunks.of(settings, usual)
        if model in best and r["variant"] != ttt_variants.OFF and not changes:
            best[model][chunk] = max(best[model].get(chunk, -math.inf), unlearned[model] - r["bpb"])
    return best


def if_taken(config: Mapping[str, Any], knob: str, part: Part) -> Part:
    """The part, which counts 0 where the preset's settings leave its knob alone."""
    if config[knob.lower()]:
        return part
    return part._replace(rule=f"counts as 0: the preset does not set `{knob}`", change=np.zeros(DRAWS))


def hint_part() -> Part:
    """Others' gain: our own is on documentation, where far more is repeated."""
    low, high = PUBLISHED["gain of hints"][0]
    return Part(
        "hints",
        ["hint.md has our own gain, on documentation: it does not carry over, and is not used"],
        f"others' gain, evenly between {low} and {high}",
        -uniform("hints", low, high),
        f"the same artifact scored with `HINT_ENABLED=0` and 1: a gain below {low}",
    )


def context_part() -> Part:
    """Others' gain of progressive context, at full size."""
    gain = PUBLISHED["gain of progressive context"][0]
    return Part(
        "context",
        ["nothing of ours: a figure of others at full size"],
        f"evenly between nothing and the one published gain, {gain}",
        -uniform("context", 0, gain),
        "runs of equal seconds with and without `TRAIN_SEQ_SCHEDULE`: no gain",
    )


def speed_part(folder: Path, slope: Draws) -> Part:
    """More steps in the same 600 s."""
    found = read_json(folder / BUDGET)["peer"]
    steps, peer = found["training steps"]["estimated"], found["training steps"]["peer_measured"]
    low, high = sorted((steps["low"], steps["high"]))
    number = triangular("steps", low, steps["mid"], high)
    slopes = public_slopes()
    return Part(
        "speed",
        [
            f"{BUDGET}, steps in the time limit: {steps['mid']:.0f} ({low:.0f} to {high:.0f}), estimated; the "
            f"peer's {peer}"
        ],
        f"logarithm of the ratio of steps, times the slope of public runs of several lengths: "
        f"{statistics.median(slopes):.4f} bpb for each e-fold of steps ({min(slopes):.4f} to {max(slopes):.4f})",
        -slope * np.log(number / peer),
        f"`make first-hour`: a step after the loops above {1e3 * found['step after']['peer_measured']:.0f} ms",
    )


def taken_for_speed(config: Mapping[str, Any]) -> list[str]:
    """Rows of the laboratory that say what the preset's choices for speed cost, by the settings in its table.

    A window counts as a share of the context. Errors: ForecastError where no row is of such a window or such heads.
    """
    width, window = config["model_dim"] // config["num_heads"], config.get("window_attn_size", 0)
    most = ",".join(str(n) for n in range(config["num_layers"]) if n % 4 != 3)
    windows = {
        (1 / 4, ""): "windows of 1/4",
        (1 / 8, ""): "windows of 1/8",
        (1 / 4, most): "windows of 1/4 in most layers",
    }
    kind = (window / config["train_seq_len"], config.get("window_attn_layers", ""))
    if width == 128 and kind == (1 / 4, most):
        return ["half the heads, windows of 1/4"]
    if width not in (64, 128) or (window and kind not in windows):
        raise ForecastError(f"{TABLE}: no row of bench/lab_ideas.py has its heads of {width} or its window of {window}")
    return ([windows[kind]] if window else []) + (["half the heads"] if width == 128 else [])


def price_part(results: list[dict[str, Any]], scale: Scale, config: Mapping[str, Any]) -> Part:
    """What choices for speed cost at equal FLOPs, in the laboratory's longest training. Gains count 0."""
    standings, measured = lab_report.differences(results), []
    price = np.zeros(DRAWS)
    for name in taken_for_speed(config):
        cells = standings.get(name, {}).get(LONG, {}).get("flops", {})
        if len(cells) < 2:
            raise ForecastError(f"lab.jsonl: {name!r} needs two seeds at {LONG}: the preset takes it")
        found = sample(cells.values())
        measured.append(f"lab.jsonl, {name}, {LONG}: {found} bpb")
        price = price + np.maximum(student(f"price of {name}", found), 0) / scale.long * scale.full
    return Part(
        "price of speed",
        measured or ["nothing: the preset changes nothing for the sake of speed"],
        "as steps, each at full size what it is worth there; a change that seems to gain counts as 0",
        price,
        "two runs of equal steps, one with `WINDOW_ATTN_SIZE=0`: they differ by more than this interval",
    )


# --------------------------------------------------------------------------------------------------------------- recipe


class Idea(NamedTuple):
    """A row of the laboratory in the forecast."""

    name: str
    verdict: str
    found: Carried | None
    kind: str  # equal FLOPs or equal seconds: where it gains less
    counted: str  # "gain", "width", or why it is not counted
    range: tuple[float, float, float]  # at full size, alone
    worth: Draws
    lasting: str  # what measured the share that a longer training leaves


def knobs_of(name: str) -> set[str]:
    """The knobs that a row sets at the largest size that it fits."""
    row = ideas.ROWS.get(name)
    if row is None:
        return {name}
    by_size = [row.by_size(size) for size in ideas.SIZES] if row.by_size else []
    return set(row.changes) | set().union(*(knobs for knobs in by_size if knobs))


def idea(name: str, standing: lab_report.Standing, scale: Scale, share: Draws, taken: Mapping[str, set[str]]) -> Idea:
    """A row as it counts, given the knobs of rows that count already."""
    sizes = [size.name for size in ideas.SIZES]
    word = lab_report.verdict(standing, sizes, scale.compute)[0]
    by_kind = {
        kind: carried({s: c[kind] for s, c in standing.items() if c.get(kind)}, scale.compute)
        for kind in lab_report.KINDS
    }
    there = {kind: found for kind, found in by_kind.items() if found}
    kind = max(there, key=lambda kind: there[kind].effect.mean, default="")
    found = there.get(kind)
    rival = next((other for other, knobs in taken.items() if knobs & knobs_of(name)), "")
    counted, long = "", ""
    effect = np.zeros(DRAWS)
    if knobs_of(name) <= CHOSEN_AT_FULL_SIZE:
        counted = "0: peers chose this value at full size"
    elif knobs_of(name) <= SPEED_KNOBS:
        counted = "0: for speed alone, at a price"
    elif word == "does not":
        counted = "0"
    elif found is None:
        counted = "0: fewer than two seeds"
    elif rival:
        counted = f"0: instead of it, {rival}"
    elif word == "pays":
        counted, effect = "gain", worth(name, found, scale)
    else:
        spread = math.hypot(found.effect.mean, found.effect.error)
        counted, effect = "width", generator(f"width of {name}").standard_normal(DRAWS) * spread / scale.small
    if counted in ("gain", "width"):
        share_left, long = lasting(name, {s: c.get(kind, {}) for s, c in standing.items()}, scale)
        effect = effect * share_left
    return Idea(name, word, found, kind, counted, percentiles(-effect * share * scale.full), effect, long)


def ideas_of(results: list[dict[str, Any]], scale: Scale, share: Draws) -> list[Idea]:
    """All measured rows but those of the data order: those that pay first, and the largest gain first."""
    standings = {n: s for n, s in lab_report.differences(results).items() if not n.startswith(DATA_ROW)}
    found = [idea(name, standing, scale, share, {}) for name, standing in standings.items()]
    order = ["pays", "unclear", "does not"]
    found.sort(key=lambda one: (order.index(one.verdict), one.found.effect.mean if one.found else 0.0))
    taken: dict[str, set[str]] = {}
    counted = []
    for one in found:
        again = idea(one.name, standings[one.name], scale, share, taken)
        counted.append(again)
        if again.counted in ("gain", "width"):
            taken[one.name] = knobs_of(one.name)
    return counted


def not_measured(results: list[dict[str, Any]]) -> list[str]:
    """Rows of bench/lab_ideas.py without a result that would count."""
    there = lab_report.differences(results)
    return [
        name
        for name in ideas.ROWS
        if name not in there and not name.startswith(DATA_ROW) and not knobs_of(name) <= CHOSEN_AT_FULL_SIZE
    ]


def measured_together(results: list[dict[str, Any]]) -> tuple[Sample, str] | None:
    """What the newest recipe gains over the first one, as a share of what its rows gained one by one; and where.

    By seed, at the largest size where both recipes have two seeds in common. None if fewer than two rows are in it.
    """
    controls: dict[str, dict[str, dict[int, float]]] = {}
    for r in results:
        if r["what"] == "run" and r["row"] == lab_report.CONTROL and r.get("bpb") is not None:
            recipe = json.dumps(r["recipe"], sort_keys=True)
            controls.setdefault(recipe, {}).setdefault(r["size"], {})[r["seed"]] = r["bpb"]
    if len(controls) < 2:
        return None
    first, newest = list(controls)[0], list(controls)[-1]
    old, new = controls[first], controls[newest]
    recipe = json.loads(newest)
    for size in reversed(ideas.SIZES):
        both = set(old.get(size.name, {})) & set(new.get(size.name, {}))
        single = [
            lab_report.mean_of(standing[size.name], "flops")
            for name, standing in lab_report.differences(results).items()
            if standing.get(size.name, {}).get("flops") and is_in(name, recipe, size)
        ]
        if len(both) > 1 and len(single) > 1 and sum(single) < 0:
            return sample((new[size.name][s] - old[size.name][s]) / sum(single) for s in sorted(both)), size.name
    return None


def is_in(name: str, recipe: Mapping[str, Any], size: ideas.Size) -> bool:
    """Whether a recipe has all that a row changes."""
    row = ideas.ROWS.get(name, ideas.Row({}))
    by_size = row.by_size(size) if row.by_size else {}
    changes = {**row.changes, **(by_size or {})}
    return bool(changes) and all(recipe.get(knob) == value for knob, value in changes.items())


def recipe_part(
    results: list[dict[str, Any]], found: list[Idea], missing: list[str], scale: Scale, share: Draws
) -> Part:
    """All ideas that pay, together, no more than newer ideas saved elsewhere; and the width of unclear ones."""
    gains = sum((one.worth for one in found if one.counted == "gain"), np.zeros(DRAWS))
    width = sum((one.worth for one in found if one.counted == "width"), np.zeros(DRAWS))
    saved = PUBLISHED["share of time that newer ideas save"][0]
    weak, strong = PUBLISHED["gain of an n-gram mixture on a weak and on a strong model"][0]
    left, source = assumed("together"), "assumed"
    together = measured_together(results)
    if sum(one.counted == "gain" for one in found) < 2:
        left = np.ones(DRAWS)
    elif together:
        left, source = np.clip(student("together", together[0]), 0, 1), f"measured at {together[1]}: {together[0]}"
    total = np.minimum(gains * left, -math.log1p(-saved)) + width
    measured = [
        f"lab.jsonl, {one.name}, {one.found.size}, {lab_report.KINDS[one.kind]}: {one.found.effect} bpb"
        for one in found
        if one.counted == "gain" and one.found
    ]
    measured += [f"lab.jsonl, {one.name}, by the length of the training: {one.lasting}" for one in found if one.lasting]
    counts = {word: sum(one.verdict == word for one in found) for word in ("pays", "unclear", "does not")}
    tally = ", ".join(f"{count} *{word}*" for word, count in counts.items())
    return Part(
        "recipe",
        [*measured, f"lab.jsonl, verdicts of rows: {tally}; {len(missing)} not measured yet"],
        "as steps, along the trend where the gain shrinks; times one share for all rows, evenly from what an n-gram "
        f"mixture kept ({strong / weak:.4f}) to 1; times the share that is left when they act together ({source}); at "
        f"most {saved:.0%} of the time",
        -total * share * scale.full,
        "the 3-minute run of `make first-hour`, with the recipe's knobs in the environment and without them: the "
        "recipe is not better",
    )


# ------------------------------------------------------------------------------------------------------------ the whole


class Forecast(NamedTuple):
    """The parts and their sum."""

    start: float
    parts: list[Part]
    ideas: list[Idea]
    missing: list[str]
    small: SmallSlope
    doublings: dict[str, float]  # of training FLOPs from each measured size to full size
    total: Draws

    @property
    def range(self) -> tuple[float, float, float]:
        return percentiles(self.total)

    @property
    def probability(self) -> float:
        """Of reaching the goal, by this model."""
        return float(np.mean(self.total <= GOAL))


def forecast(folder: Path, without: Sequence[str] = ()) -> Forecast:
    """From the results of a folder. Errors: ForecastError."""
    results = lab_report.read_results(folder / "lab.jsonl")
    small, slope = small_slope(results, folder), full_slope()
    long = lab_slope(results, (LONG,)) or small
    draws, long_draws = small_slope_draws(small), small_slope_draws(long, "slope after a long training")
    compute = lab_report.training_flops(results)
    scale = Scale(draws, slope, compute, full_flops(folder), long_draws, eightfolds_left(folder))
    weak, strong = PUBLISHED["gain of an n-gram mixture on a weak and on a strong model"][0]
    share = uniform("share of the recipe", strong / weak, 1)
    found, missing = ideas_of(results, scale, share), not_measured(results)
    config = read_json(folder / TABLE)["config"]  # of the preset that is forecast
    parts = [
        base_part(),
        reproduction_part(),
        data_part(results, scale, config.get("data_order", DEFAULT_ORDER)),
        recipe_part(results, found, missing, scale, share),
        quantization_part(folder),
        ttt_part(folder),
        chunk_part(folder, config),
        if_taken(config, "HINT_ENABLED", hint_part()),
        if_taken(config, "TRAIN_SEQ_SCHEDULE", context_part()),
        speed_part(folder, slope),
        price_part(results, scale, config),
    ]
    unknown = sorted(set(without) - {part.name for part in parts})
    if unknown:
        raise ForecastError(f"--without {unknown[0]}: must be of {', '.join(part.name for part in parts)}")
    parts = [part for part in parts if part.name not in without]
    start = statistics.mean(PUBLISHED["score"][0])
    doublings = {s: math.log2(scale.full_compute / flops) for s, flops in scale.compute.items()}
    total = start + sum((part.change for part in parts), np.zeros(DRAWS))
    return Forecast(start, parts, found, missing, small, doublings, total)


def read_json(path: Path) -> dict[str, Any]:
    """Errors: ForecastError where it is not there, or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ForecastError(f"{path}: cannot be read: {error}") from None


def as_json(made: Forecast) -> dict[str, Any]:
    """What bench/results/forecast.json holds."""

    def ends(of: tuple[float, float, float]) -> dict[str, float]:
        return dict(zip(("low", "mid", "high"), (round(x, 5) for x in of), strict=True))

    parts = [
        dict(part=p.name, estimated=ends(p.range), measured=p.measured, rule=p.rule, falsified_by=p.falsified)
        for p in made.parts
    ]
    rows = [
        dict(
            row=i.name,
            verdict=i.verdict,
            counted=i.counted,
            measured=f"{i.found.effect} at {i.found.size}" if i.found else "",
            estimated=ends(i.range),
        )
        for i in made.ideas
    ]
    slope, gap = statistics.median(public_slopes()), made.range[1] - GOAL
    return dict(
        remark="Every change is estimated. None was measured on a GPU.",
        start=dict(published=round(made.start, 5), source=PUBLISHED["score"][1]),
        forecast=dict(estimated=ends(made.range)),
        goal=GOAL,
        probability_of_goal=dict(estimated=round(made.probability, 3)),
        gap_to_goal=dict(estimated=round(gap, 5), steps=round(math.exp(gap / slope), 3)),
        parts=parts,
        ideas=rows,
        not_measured=made.missing,
        slope_in_small=dict(mean=round(made.small.mean, 5), error=round(made.small.error, 5), source=made.small.source),
        slope_at_full_size=ends((min(public_slopes()), statistics.median(public_slopes()), max(public_slopes()))),
        doublings_to_full_size={size: round(x, 2) for size, x in made.doublings.items()},
        published={name: dict(value=value, source=source) for name, (value, source) in PUBLISHED.items()},
        assumed={name: dict(value=value, why=why) for name, (value, why) in ASSUMED.items()},
        draws=DRAWS,
        seed=SEED,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of measurements")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "forecast.md")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "forecast.json")
    parser.add_argument("--without", nargs="+", default=[], metavar="PART", help="only prints, without these parts")
    options = parser.parse_args(arguments)
    try:
        made = forecast(options.results, options.without)
    except ForecastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    content = as_json(made)
    print("\n".join(forecast_page.summary(content)))
    if not options.without:
        options.out.write_text(json.dumps(content, indent=1) + "\n")
        options.page.write_text(forecast_page.page(content))
        print(f"written: {options.page}, {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
