"""The report of tools/first_hour.py: measured against estimated, and what to try first.

Estimates are read from the file of bench/budget.py. It may lack any of them: then the report says `no estimate`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runs import ROOT, write_atomic

BUDGET = ROOT / "bench" / "results" / "budget.json"
BACKENDS = ("fa3", "fa2", "varlen", "sdpa")
# Steps of a record run on 8 GPUs before and after the loops start, by PR #2163's log.
RECORD_STEPS = dict(plain=2193, looped=2783)
CHALLENGE_TARGETS, CHALLENGE_RANKS = 47_851_520, 8  # of `record`'s vocabulary, by the same log
LOOPS_FROM = 0.35  # of the training, where a run's config does not say
REASONS = dict(
    fa3="install FlashAttention 3 (docs/gpus.md): without it a step is estimated to take 15 to 20% longer",
    fa2="install FlashAttention 2 (docs/gpus.md), unless fa3 works",
    varlen="torch's own variable-length attention needs torch 2.10 or newer and bfloat16 on CUDA",
    sdpa="torch's own attention should work everywhere: read its log",
)
# A line's key -> where bench/budget.py has its estimate, in seconds. Of several places the sum counts.
ESTIMATES: dict[str, tuple[str, ...]] = {
    "step/fa3/plain": ("peer/step before the loops",),
    "step/fa3/looped": ("peer/step after",),
    "ttt": ("peer/ttt",),
    "audit": ("stages/data, audit",),
    "warmup": ("stages/warmup, compiling", "stages/warmup, steps"),
    "compile": ("stages/ttt, compiling",),
    **{name: (f"stages/{name}",) for name in ("setup", "validate", "calibrate", "quantize", "pack", "unpack")},
    "evaluate": ("stages/evaluate",),
}
Range = tuple[float, float, float]  # lowest, middle, highest


@dataclass
class Line:
    """One measured figure beside its estimate."""

    key: str
    what: str
    unit: str
    measured: float
    times: float = 0.0  # how often it occurs in a record run; 0 where it does not, or is part of another line
    note: str = ""
    estimated: Range | None = None

    @property
    def middle(self) -> float | None:
        """The middle of the estimate."""
        return self.estimated[1] if self.estimated else None

    @property
    def ratio(self) -> float | None:
        """Measured over the middle of the estimate."""
        return self.measured / self.middle if self.middle else None

    @property
    def seconds_lost(self) -> float | None:
        """Seconds of a record run by which the measurement exceeds the estimate."""
        if self.middle is None:
            return None
        return (self.measured - self.middle) * self.times * (1e-3 if self.unit == "ms" else 1.0)


# ---------------------------------------------------------------------------------------------------------- estimates


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a JSON value; the rows of a list are named by their `stage` or `name` where they have one."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from flat(part, f"{path}/{name}" if path else str(name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            name = part.get("stage", part.get("name", number)) if isinstance(part, dict) else number
            yield from flat(part, f"{path}/{name}" if path else str(name))
    else:
        yield path, value


def read_budget(path: Path) -> dict[str, float]:
    """The numbers of a budget by their paths; none where the file is missing or unreadable."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    numbers = (item for item in flat(content) if isinstance(item[1], (int, float)) and not isinstance(item[1], bool))
    return {name: float(value) for name, value in numbers}


def estimate(budget: dict[str, float], key: str, unit: str) -> Range | None:
    """The estimate of a line in its unit: a number under the line's own name, or what bench/budget.py writes."""
    if key in budget:
        return budget[key], budget[key], budget[key]
    places = [f"{place}/estimated" for place in ESTIMATES.get(key, ())]
    if not places or any(f"{place}/mid" not in budget for place in places):
        return None
    scale = 1000.0 if unit == "ms" else 1.0
    low, middle, high = (
        scale * sum(budget.get(f"{place}/{end}", budget[f"{place}/mid"]) for place in places)
        for end in ("low", "mid", "high")
    )
    return low, middle, high


# ------------------------------------------------------------------------------------------------------------ measured


def read_figures(folder: Path, name: str) -> dict[str, Any]:
    """What a step wrote; nothing where it did not, or was killed while it wrote."""
    try:
        found = json.loads((folder / name).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def by_name(rows: Iterable[dict[str, Any]], name: str) -> dict[str, Any]:
    """The row of a name, or an empty one."""
    return next((row for row in rows if row.get("name") == name or row.get("coder") == name), {})


def step_lines(figures: dict[str, dict[str, Any]]) -> Iterator[Line]:
    """Milliseconds of whole steps. A record run would take the first backend that works, on all ranks."""
    titles = dict(plain="a step before the loops", looped="a step after the loops")
    measured = [name for name in ("ranks", *BACKENDS) if figures.get(f"step-{name}", {}).get("rows")]
    for name in measured:
        found = figures[f"step-{name}"]
        backend, ranks = found["backend"]["attention"], found.get("ranks", 1)
        for row in found["rows"]:
            if row["part"] == "whole step":
                yield Line(
                    f"step/{backend}/{row['order']}",
                    f"{titles.get(row['order'], 'a step, ' + row['order'])}, {backend}",
                    "ms",
                    row["ms_per_step"],
                    RECORD_STEPS.get(row["order"], 0.0) if name == measured[0] else 0.0,
                    f"{found['tokens_per_step'] // ranks} tokens on each of {ranks} rank{'s' if ranks > 1 else ''}",
                )


def stage_lines(figures: dict[str, dict[str, Any]]) -> Iterator[Line]:
    """Quantization, packing and evaluation as benchmarks."""
    quantize = figures.get("quantize", {}).get("rows", [])
    for name, key, what, times in (
        ("one attempt", "quantize/attempt", "one attempt at quantization", 0.0),
        ("the whole stage", "quantize", "quantization, all attempts and packing", 1.0),
        ("packing", "packing", "packing once", 0.0),
        ("unpacking", "unpack", "unpacking once", 1.0),
    ):
        if "seconds" in by_name(quantize, name):
            yield Line(key, what, "s", by_name(quantize, name)["seconds"], times, "random weights")
    coder = by_name(figures.get("pack", {}).get("rows", []), "pergroup")
    if coder:
        yield Line("packing", "packing once", "s", coder["pack_seconds"], 0.0, "bench/pack.py, synthetic integers")
        yield Line("unpack", "unpacking once", "s", coder["unpack_seconds"], 0.0, "bench/pack.py, synthetic integers")
    for row in figures.get("ttt", {}).get("rows", []):
        key = {"sliding, no overlap": "evaluate", "phased": "ttt"}.get(row["name"], f"ttt/{row['name']}")
        seconds = CHALLENGE_TARGETS / row["targets_per_second"] / CHALLENGE_RANKS
        note = f"from {row['targets']} targets on one device, for the challenge's on {CHALLENGE_RANKS}; compiled before"
        yield Line(key, f"evaluation: {row['name']}", "s", seconds, float(key in ("evaluate", "ttt")), note)


def run_lines(summary: dict[str, Any], config: dict[str, Any]) -> Iterator[Line]:
    """The stages of the short run, those that share work among ranks as if there were 8 of them."""
    if not summary:
        return
    seconds, share = summary.get("seconds", {}), summary["ranks"] / CHALLENGE_RANKS
    if summary.get("steps"):
        line = Line(
            "run/step", "a step of the run, on average", "ms", 1e3 * summary["train_seconds"] / summary["steps"]
        )
        line.measured *= share
        line.note = f"{summary['steps']} steps on {summary['ranks']} ranks, as if on {CHALLENGE_RANKS}"
        line.key += f"/{config.get('enable_looping_at', LOOPS_FROM):g}"
        yield line
    for stage, spent in seconds.items():
        if stage in ("train", "data"):  # reading the data is estimated with their audit
            continue
        scale, note = 1.0, ""
        if stage == "audit":
            spent += seconds.get("data", 0.0)
        if stage == "calibrate":
            scale, note = share, f"as if on {CHALLENGE_RANKS} ranks"
        if stage in ("evaluate", "ttt", "validate"):
            scale = share * CHALLENGE_TARGETS / summary["val_tokens"] if summary.get("val_tokens") else 1.0
            note = f"scaled from {spent:.1f} s for {summary.get('val_tokens')} targets"
        yield Line(f"run/{stage}", f"the run's stage {stage}", "s", spent * scale, 0.0, note)


def mean_step(budget: dict[str, float], looping_at: float) -> Range | None:
    """The estimated ms of an average step of a training whose loops start after this share of its time."""
    plain, looped = (estimate(budget, f"step/fa3/{order}", "ms") for order in ("plain", "looped"))
    if not plain or not looped:
        return None
    low, middle, high = (1 / (looping_at / a + (1 - looping_at) / b) for a, b in zip(plain, looped, strict=True))
    return low, middle, high


def lines_of(folder: Path, budget: dict[str, float]) -> list[Line]:
    """All figures that are in the folder, each with its estimate."""
    names = (*(f"step-{name}" for name in (*BACKENDS, "ranks")), "quantize", "pack", "ttt")
    figures = {name: read_figures(folder, f"{name}.json") for name in names}
    run = [read_figures(folder / "record", name) for name in ("summary.json", "config.json")]
    lines = [*step_lines(figures), *stage_lines(figures), *run_lines(*run)]
    for line in lines:
        if line.key.startswith("run/step/"):
            line.estimated = mean_step(budget, float(line.key.rpartition("/")[2]))
            continue
        line.estimated = estimate(budget, line.key.removeprefix("run/"), line.unit)
        if line.key.startswith("step/") and line.estimated is None:
            line.estimated = estimate(budget, f"step/fa3/{line.key.rpartition('/')[2]}", line.unit)
            line.note += "; estimated with fa3" if line.estimated else ""
    return lines


# ------------------------------------------------------------------------------------------------------------- advice


def last_words(lines: list[str]) -> str:
    """The line that says most about a command's end: its last error, else its last line."""
    kept = [line.strip() for line in lines if line.strip() and not line.startswith("{")]
    errors = [line for line in kept if line.startswith("error: ") or "Error: " in line or line.startswith("FAILED ")]
    return (errors or kept or [""])[-1][:300]


def advice(rows: list[dict[str, Any]], lines: list[Line]) -> list[str]:
    """What to try first: steps that failed, the largest gaps, then backends that do not work."""
    found = []
    for row in rows:
        if row["status"] in ("failed", "timed out", "interrupted"):
            how = f"failed with exit code {row.get('exit_code')}"
            if row["status"] == "timed out":
                how = f"was stopped at its limit of {row['limit']:g} s"
            if row["status"] == "interrupted":
                how = "was interrupted"
            found.append(f"**{row['name']}** {how}: {row.get('detail') or 'it printed nothing'} ({row['name']}.log)")
    slower = [line for line in lines if (line.seconds_lost or 0) > 0 and (line.ratio or 0) > 1.05]
    for place, line in enumerate(sorted(slower, key=lambda line: -(line.seconds_lost or 0))[:3]):
        found.append(
            f"{'The largest gap' if not place else 'Then'}: **{line.what}** takes {number(line.measured)} {line.unit} "
            f"where {number(line.middle)} {line.unit} are estimated ({line.ratio:.2f} times as long, "
            f"{line.seconds_lost:.1f} s of a record run)"
        )
    for row in rows:
        if row["status"] == "unavailable":
            backend = row["name"].removeprefix("step-")
            detail = row.get("detail", "").removeprefix("error: ")
            found.append(f"{detail.removesuffix('; auto takes what can')}: {REASONS.get(backend, '')}")
    return found


# ------------------------------------------------------------------------------------------------------------- the text


def expected(line: Line) -> str:
    """A line's estimate with its range."""
    if line.estimated is None:
        return "no estimate"
    low, middle, high = map(number, line.estimated)
    return f"{middle} {line.unit}" if low == high else f"{middle} ({low} to {high}) {line.unit}"


def number(x: float | None) -> str:
    """A figure with three digits or more."""
    if x is None:
        return "-"
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def table(heading: list[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """A Markdown table, or a line where it has no rows."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    if not cells:
        return ["Nothing yet."]
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *cells)]


def step_table(folder: Path) -> list[str]:
    """The benchmarks of the training step: speed, utilization and memory."""
    rows = []
    for name in (*BACKENDS, "ranks"):
        found = read_figures(folder, f"step-{name}.json")
        for row in found.get("rows", []):
            mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
            memory = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f}"
            rows.append(
                (
                    found["backend"]["attention"] + (f", {found['ranks']} ranks" if found.get("ranks", 1) > 1 else ""),
                    row["order"],
                    row["part"],
                    f"{row['ms_per_step']:.1f}",
                    f"{row['ms_lowest']:.1f}..{row['ms_highest']:.1f}",
                    f"{row['tokens_per_second']:.0f}",
                    mfu,
                    memory,
                )
            )
    return table(["attention", "order", "part", "ms", "range", "tokens/s", "MFU", "peak GiB"], rows)


def markdown(folder: Path, about: dict[str, Any], rows: list[dict[str, Any]], lines: list[Line]) -> str:
    """The report as Markdown."""
    found = read_figures(folder, "versions.json")
    place = ", ".join(found.get("gpus", [])) or f"{found.get('cores', '?')} CPU cores"
    text = [
        "# The first hour on a GPU",
        "",
        f"Begun {about['begun']} on {about['ranks']} rank{'s' if about['ranks'] > 1 else ''} ({place}).",
    ]
    if about["tiny"] or about["device"] == "cpu":
        text += [
            "",
            "**A rehearsal.** Its sizes or its device are not those of the estimates: no ratio means anything.",
        ]
    tries = [f"{i}. {line}" for i, line in enumerate(advice(rows, lines), 1)]
    unknown = sum(line.estimated is None for line in lines)
    steps = [
        (
            row["name"],
            row["title"],
            row["status"],
            f"{row['seconds']:.0f}" if "seconds" in row else "-",
            f"{row['limit']:g}",
            row.get("detail", ""),
        )
        for row in rows
    ]
    against = [
        (
            line.what,
            f"{number(line.measured)} {line.unit}",
            expected(line),
            "-" if line.ratio is None else f"{line.ratio:.2f}",
            "-" if not line.times or line.seconds_lost is None else f"{line.seconds_lost:+.1f}",
            line.note,
        )
        for line in lines
    ]
    text += ["", "## What to try first", "", *(tries or ["Nothing failed, and nothing is slower than estimated."])]
    text += ["", "## Steps", "", *table(["step", "what", "result", "s", "limit", "last words"], steps)]
    text += ["", "## Measured against estimated", ""]
    heading = ["what", "measured", "estimated", "ratio", "s of a record run", "how"]
    text += [*table(heading, against), "", f"{len(lines)} figures, {unknown} of them without an estimate."]
    text += ["", "## The training step", "", *step_table(folder)]
    text += ["", "## Versions", "", *table(["what", "version"], ((k, v) for k, v in found.items())), ""]
    return "\n".join(text)


def write(folder: Path, about: dict[str, Any], rows: list[dict[str, Any]], budget: Path) -> None:
    """Writes both reports, each aside and then renamed, so that a reader finds a whole one at any time."""
    lines = lines_of(folder, read_budget(budget))
    measured = [dict(asdict(line), ratio=line.ratio, seconds_lost=line.seconds_lost) for line in lines]
    content = dict(
        **about,
        versions=read_figures(folder, "versions.json"),
        try_first=advice(rows, lines),
        steps=rows,
        lines=measured,
    )
    write_atomic(folder / "report.md", markdown(folder, about, rows, lines))
    write_atomic(folder / "report.json", json.dumps(content, indent=1) + "\n")
