"""A table and pictures of any runs: ours from their folders, other people's from their logs, side by side.

    python tools/report.py logs/RUN1 logs/RUN2 peer/train_seed42.log --out report
    python tools/report.py logs/sweeps/NAME --out report

A path is a run's folder, a metrics.jsonl, a log, a submission's folder, a sweep's folder, or a folder of such.
NAME=PATH gives a run another name. The table is printed. --out also gets report.md, the pictures as PNG, and
report.html, one page with everything. The pictures are bits per byte against the share of the training and against
tokens, bits per byte at each stage, bytes by role, and of a sweep: the best score so far, the importance of each
variable, and parallel coordinates.

The score of a run is that of the last stage in its log. A stage that this tool does not know keeps its own name. A log
with several runs counts as several.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import base64
import html
import io
import itertools
import math
import os
import statistics
import sys
import textwrap
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import runs
import strangers
from runs import CAP_BYTES, Parser, Run, UserError, command_line, write_atomic
from strangers import markdown, visible

WARNINGS = 100  # that are printed
MARKER = "<!-- made by tools/report.py -->"
# Okabe and Ito's colours, for colour-blind readers. After the last one they repeat with another line style, and after
# the last of these with another marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ((5, 2), (1, 1.2), (6, 2, 1, 2), (9, 3), (3, 1, 1, 1, 1, 1), (1, 3), (12, 2, 3, 2))
LINES = ("-", *((0, dashes) for dashes in DASHES))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p")
STAGES = {
    "pre_quant": "before\nquantization",
    "quantized": "quantized",
    "sliding": "sliding\nwindows",
    "ttt_baseline": "TTT windows\nwithout training",
    "ttt": "test-time\ntraining",
    "hint": "hints from\nrepetition",
}


# ------------------------------------------------------------------------------------------------------------- reading


def read(words: list[str], problems: list[str] | None = None) -> tuple[list[Run], list[dict[str, Any]]]:
    """(runs, sweeps) at the paths. Runs get unique names. What is passed over is among the problems.

    Errors: UserError.
    """
    problems = [] if problems is None else problems
    found: list[Run] = []
    sweeps = []
    for word in words:
        name, sign, place = word.partition("=")
        path = Path(place) if sign and not os.path.exists(word) else Path(word)
        study = path if path.name == "study.json" else path / "study.json"
        if strangers.is_there(study):
            sweeps.append(read_study(study))
            continue
        several = runs.read_runs(path, problems)
        for run in several:
            if sign and path == Path(place):
                run.name = name if len(several) == 1 else f"{name} {run.name}"
        found += several
    for run in found:
        problems += [f"{run.source}: {text}" for text in (*run.problems, *run.remarks)]
        if not (run.losses or run.scores or run.stages or run.artifact_bytes):
            raise UserError(f"{run.source}: holds no training log line and no score")
    other_training_sets(found, problems)
    rename(found)
    return found, sweeps


def other_training_sets(found: list[Run], problems: list[str]) -> None:
    """Adds a remark for each run of a folder whose number of training shards is not that of most runs beside it."""
    for folder in dict.fromkeys(Path(run.source).parent for run in found):
        beside = [run for run in found if Path(run.source).parent == folder and run.train_shards is not None]
        usual = Counter(run.train_shards for run in beside).most_common(1)
        problems += [
            f"{run.source}: trained on {run.train_shards} shards, and most runs beside it on {usual[0][0]}"
            for run in beside
            if run.train_shards != usual[0][0]
        ]


TRIAL = strangers.record(
    dict(
        trial=strangers.COUNT,
        state=strangers.TEXT,
        values=strangers.map_of(strangers.either(strangers.TEXT, strangers.NUMBER), 100),
        value=strangers.NUMBER,
        seconds=strangers.AMOUNT,
        error=strangers.TEXT,
    ),
    ("trial", "state", "values"),
)
STUDY = dict(
    name=strangers.TEXT,
    objective=strangers.TEXT,
    variables=strangers.list_of(strangers.TEXT, 50),
    trials=strangers.list_of(TRIAL),
)
STUDY_MORE = dict(  # what older sweeps lack
    direction=strangers.TEXT, importance=strangers.map_of(strangers.AMOUNT, 100), importance_by=strangers.TEXT
)


def read_study(path: Path) -> dict[str, Any]:
    """A sweep's study.json. Errors: UserError."""
    content = strangers.read_json(path, kind="study")
    if not isinstance(content, dict) or not set(STUDY) <= set(content):
        raise UserError(f"{path}: is not a sweep's study.json")
    problems: list[str] = []
    study = strangers.checked(content, STUDY | STUDY_MORE, str(path), problems)
    if problems or not set(STUDY) <= set(study) or study.get("direction") not in (None, "minimize", "maximize"):
        raise UserError(problems[0] if problems else f"{path}: is not a sweep's study.json")
    usual: dict[str, Any] = dict(direction="minimize", importance={}, importance_by="")
    study = usual | study
    for trial in study["trials"]:
        trial["values"] = {name: str(value) for name, value in trial["values"].items()}
        for name in ("value", "seconds", "error"):
            trial.setdefault(name, None)
    return study


def rename(found: list[Run]) -> None:
    """Makes names unique: first by adding the folder, then a number."""
    for add in (
        lambda run, _: f"{Path(run.source).parent.name}/{run.name}",
        lambda run, place: f"{run.name} ({place})",
    ):
        names = Counter(run.name for run in found)
        for place, run in enumerate(found):
            if names[run.name] > 1:
                run.name = add(run, place + 1)


def stage_words(stage: str | None) -> str:
    """A stage for a table; those that are not known here are marked."""
    if stage is None or stage in STAGES:
        return stage or "-"
    return f"{stage} (unknown stage)"


def rows_of(found: list[Run]) -> list[list[str]]:
    """The rows of the table, without columns that are empty for every run."""
    columns: dict[str, Callable[[Run], str]] = {
        "run": lambda r: r.name,
        "seed": lambda r: runs.shown(r.seed),
        "val_bpb": lambda r: runs.shown(r.final and r.final.bpb, ".5f"),
        "of stage": lambda r: stage_words(r.final_stage),
        "val_loss": lambda r: runs.shown(r.final and r.final.loss, ".5f"),
        **{
            label: (lambda r, stage=stage: runs.shown(r.stages[stage].bpb if stage in r.stages else None, ".5f"))
            for stage, label in (
                ("pre_quant", "pre-quant"),
                ("quantized", "quantized"),
                ("sliding", "sliding"),
                ("ttt", "ttt"),
                ("hint", "hint"),
            )
        },
        "shards": lambda r: runs.shown(r.train_shards),
        "strictly causal": lambda r: {True: "yes", False: "no", None: "-"}[r.strictly_causal],
        "steps": lambda r: runs.shown(r.steps),
        "ms/step": lambda r: runs.shown(r.step_avg_ms, ".2f"),
        "train s": lambda r: runs.shown(r.train_seconds, ".1f"),
        "eval s": lambda r: runs.shown(r.eval_seconds, ".1f"),
        "bytes": lambda r: runs.shown(r.artifact_bytes),
        "code": lambda r: runs.shown(r.code_bytes),
        "parameters": lambda r: runs.shown(r.parameters),
        "hardware": lambda r: r.hardware or "-",
    }
    cells = {title: [cell(run) for run in found] for title, cell in columns.items()}
    kept = [title for title, values in cells.items() if set(values) != {"-"}]
    return [kept, *([cells[title][place] for title in kept] for place in range(len(found)))]


def sweep_rows(study: dict[str, Any]) -> list[list[str]]:
    """The table of a sweep in the order of its file, best first."""
    head = ["trial", *study["variables"], study["objective"], "seconds", "state"]
    return [
        head,
        *(
            [
                str(t["trial"]),
                *(t["values"].get(n, "-") for n in study["variables"]),
                runs.shown(t["value"], ".6f"),
                runs.shown(t["seconds"], ".1f"),
                t["state"] + (f": {t['error']}" if t["error"] else ""),
            ]
            for t in study["trials"]
        ),
    ]


# ------------------------------------------------------------------------------------------------------------ pictures


LABEL = 48  # characters of a label
POINTS, TICKS = 4000, 30  # of a curve, texts of an axis
ROLES = 60  # of the artifacts in a picture, each with a colour
MANY = 12  # runs, from which on lines are thin and markers few
LONGER = 5  # times the shortest run: from there on, an axis of tokens is logarithmic


def picture(draw: Callable[[Any], bytes | None]) -> Callable[[Any], bytes | None]:
    """A function that draws, with every text as it is: a `$` begins no formula. Fonts may lack letters."""

    @wraps(draw)
    def quietly(what: Any) -> bytes | None:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return draw(what)

    return quietly


def label_of(text: str) -> str:
    """A text for a picture. matplotlib leaves labels out that begin with an underscore."""
    short = visible(text if len(text) <= LABEL else text[: LABEL - 1] + "\u2026")
    return f" {short}" if short.startswith("_") else short


def finite(points: list[tuple]) -> list[tuple[float, float]]:
    """The points of a curve that can be drawn: both figures finite."""
    return [(x, y) for x, y in points if strangers.is_number(x) and strangers.is_number(y)]


def thinned(points: list, most: int = POINTS) -> list:
    """At most `most` points of a curve, evenly, with its last one."""
    stride = -(-len(points) // most) or 1
    return points[(len(points) - 1) % stride :: stride]


def style(place: int) -> dict[str, Any]:
    """Colour and line of a run; with `marker_of`, no two of 504 runs look alike."""
    return dict(color=COLOURS[place % len(COLOURS)], linestyle=LINES[place // len(COLOURS) % len(LINES)])


def marker_of(place: int) -> str:
    return MARKERS[place // (len(COLOURS) * len(LINES)) % len(MARKERS)]


def figure(width: float, height: float, columns: int = 1, **options: Any):
    """A figure and its axes, without the global state of pyplot."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = fig.subplots(1, columns, squeeze=False, **options)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return fig, axes


def png(fig) -> bytes:
    content = io.BytesIO()
    fig.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def columns_wide(text: str) -> int:
    """Columns of a text in a font of even width; East Asian letters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def legend_columns(width: float, labels: list[str]) -> int:
    """Columns of a legend of this width in inches: as many as its longest label leaves room for."""
    longest = max(map(columns_wide, labels), default=1)
    return max(1, min(6, len(labels), int(width / (0.6 + 0.068 * longest))))


def legend_height(width: float, labels: list[str]) -> float:
    """Inches that a legend below the axes takes."""
    return 0.19 * math.ceil(len(labels) / legend_columns(width, labels))


def legend(fig, ax, width: float) -> None:
    """A legend below the axes, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        fig.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=legend_columns(width, labels),
            fontsize=8,
            frameon=False,
            handlelength=3.2,
            columnspacing=1.2,
        )


def smoothed(values: list[float]) -> list[float]:
    """A running mean over 1/50 of a curve, and over a few points of a short one."""
    width = max(1, len(values) // 50, min(5, len(values) // 6))
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i - width + 1)]) / min(width, i + 1) for i in range(len(values))]


class Curve(NamedTuple):
    """What is drawn of a run: points of (step, bits per byte), of the training smoothed."""

    run: Run
    training: list[tuple[float, float]]
    scores: list[tuple[float, float]]

    @property
    def last(self) -> float:
        """The last step."""
        return max(step for step, _ in (*self.training, *self.scores))

    @property
    def range(self) -> tuple[float, float]:
        """The range to show: the minimum, and the maximum after the first 10% of the training."""
        points = [*self.training, *self.scores]
        values = [value for _, value in points]
        late = [value for step, value in points if step > self.last / 10]
        return min(values), max(late or values) + 0.1 * (max(values) - min(values)) * (len(points) < 20)


def curve_of(run: Run, nats: bool = False) -> Curve | None:
    """The curve of a run in bits per byte, or in nats per token. None: it has none, or none in this unit."""
    ratio = 1.0 if nats else run.bpb_per_nat
    if not nats and ratio is None and run.targets and run.val_bytes:
        ratio = run.targets / (math.log(2) * run.val_bytes)
    scores = finite([(row[0], row[1] if nats else row[2]) for row in run.scores])
    end = run.stages.get("pre_quant")
    if end and run.steps and run.steps > max((step for step, _ in scores), default=0):
        scores += finite([(run.steps, end.loss if nats else end.bpb)])  # the score at the end of the training
    training = finite([(row[0], row[1]) for row in run.losses]) if ratio is not None else []
    values = smoothed([y for _, y in training])
    training = [(x, y * (ratio or 1.0)) for (x, _), y in zip(training, values, strict=True)]
    curve = Curve(run, training, scores)
    return curve if (training or scores) and curve.last > 0 else None


def limits(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    """(low, high) of an axis for these ranges, so that a few high ones do not flatten the rest."""
    low = min(bottom for bottom, _ in ranges)
    high = max(top for _, top in ranges)
    room = 3 * max(statistics.median(top for _, top in ranges) - low, 1e-6)
    if len(ranges) > 2 and high > low + room:
        fitting = [top for _, top in ranges if top <= low + room]
        high = max(fitting, default=low + room)
    return low, high


def beyond(names: list[str]) -> list[str]:
    """The note of a picture about what lies beyond its axis."""
    if not names:
        return []
    return [f"beyond the axis: {label_of(names[0]) if len(names) == 1 else f'{len(names)} of them'}"]


@picture
def loss_picture(found: list[Run]) -> bytes | None:
    """Bits per byte of training (lines) and validation (points), against the share of the training and tokens."""
    curves = [curve for curve in map(curve_of, found) if curve]
    nats = not curves
    if nats:
        curves = [curve for curve in (curve_of(run, nats=True) for run in found) if curve]
    if not curves:
        return None
    labels = [label_of(curve.run.name) for curve in curves]
    fig, axes = figure(11, 4.7 + legend_height(11, labels), 2, sharey=True)
    for place, curve in enumerate(curves):
        draw_curve(axes[0], curve, 1 / curve.last, place, len(curves), label_of(curve.run.name))
    low, high = limits([curve.range for curve in curves])
    axes[0].set_ylim(low - 0.04 * (high - low), high + 0.02 * (high - low))
    unit = "nats per token" if nats else "bits per byte"
    notes = []
    if len(curves) < len(found):
        notes.append(f"{len(found) - len(curves)} of {len(found)} runs have no score to draw")
    notes += beyond([curve.run.name for curve in curves if curve.range[0] > high])
    title = f"{'Loss' if nats else 'Bits per byte'} (line: training, point: validation)"
    axes[0].set_title(with_notes(title, notes), fontsize=10)
    axes[0].set(xlabel="share of the training", ylabel=unit, xlim=(0, 1.02))
    axes[0].xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    tokens_axis(axes[1], curves)
    legend(fig, axes[0], 11)
    return png(fig)


def with_notes(title: str, notes: list[str]) -> str:
    return title + ("\n" + "; ".join(notes) if notes else "")


def tokens_axis(ax, curves: list[Curve]) -> None:
    """The curves against tokens, or against steps where no run says how many tokens a step has."""
    scales = [(place, curve, curve.run.tokens_per_step) for place, curve in enumerate(curves)]
    known = [(place, curve, scale) for place, curve, scale in scales if scale]
    what = "training tokens" if known else "steps"
    drawn = known or [(place, curve, 1.0) for place, curve, _ in scales]
    notes = [f"{len(curves) - len(drawn)} of {len(curves)} runs do not say their tokens"] if known else []
    for place, curve, scale in drawn:
        draw_curve(ax, curve, scale, place, len(curves), None)
    ends = [curve.last * scale for _, curve, scale in drawn]
    right = max(ends)
    if right > LONGER * min(ends):
        ax.set_xscale("log")
        ax.set_xlim(min(ends) / 50, right * 1.1)
        what += ", logarithmic"
    else:
        ax.set_xlim(0, right * 1.02)
    ax.xaxis.set_major_formatter(amount_words)
    ax.set(xlabel=what)
    ax.set_title(
        with_notes(f"Against {what.partition(',')[0]}", notes if len(drawn) < len(curves) else []), fontsize=10
    )


def amount_words(value: float, _: Any = None) -> str:
    """A number of tokens for an axis: 250k, 7.2G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def draw_curve(ax, curve: Curve, scale: float, place: int, among: int, label: str | None) -> None:
    """A run's training as a line and its validation as points, with steps times `scale` as position."""
    many = among > MANY
    scores = thinned(curve.scores, 12 if many else POINTS)
    if curve.training:
        x, y = zip(*thinned(curve.training), strict=True)
        ax.plot([v * scale for v in x], y, linewidth=0.9 if many else 1.3, label=label, **style(place))
        label = None
    if scores:
        x, y = zip(*scores, strict=True)
        ax.plot(
            [v * scale for v in x],
            y,
            marker=marker_of(place),
            markersize=3 if many else 4,
            linewidth=0 if curve.training else 1,
            markerfacecolor="white",
            label=label,
            **style(place),
        )


def stages_of(found: list[Run]) -> dict[str, str]:
    """The stages to draw with their texts: the known ones, then those that some run ends with under another name."""
    kept = {stage: text for stage, text in STAGES.items() if any(stage in run.stages for run in found)}
    others = [run.final_stage for run in found if run.final_stage and run.final_stage not in STAGES]
    for stage in list(dict.fromkeys(others))[:OTHER_STAGES]:
        kept[stage] = "\n".join(textwrap.wrap(label_of(stage.replace("_", " ")), 16)[:3]) + "\n(unknown stage)"
    return kept


OTHER_STAGES = 8  # of other names in a picture


@picture
def stage_picture(found: list[Run]) -> bytes | None:
    """Bits per byte at each stage, with the last value of each run as text where there is room for it."""
    kept = stages_of(found)
    names = list(kept)
    curves = [(run, [(names.index(s), run.stages[s].bpb) for s in names if s in run.stages]) for run in found]
    curves = [(run, finite(points)) for run, points in curves]
    curves = [(run, points) for run, points in curves if points]
    if not curves:
        return None
    labels = [label_of(run.name) for run, _ in curves]
    width = max(6.5, 2.2 + 2.2 * len(kept))
    fig, (ax,) = figure(width, 4.4 + legend_height(width, labels))
    many = len(curves) > MANY
    ranges = [(min(y for _, y in points), max(y for _, y in points)) for _, points in curves]
    low, high = limits(ranges)
    room = max(high - low, 1e-4)
    ax.set_ylim(low - 0.06 * room, high + 0.06 * room)
    ends = []
    for place, (run, points) in enumerate(curves):
        x, y = zip(*points, strict=True)
        ax.plot(
            x,
            y,
            marker=marker_of(place),
            markersize=4 if many else 5,
            linewidth=1.0 if many else 1.4,
            label=label_of(run.name),
            **style(place),
        )
        last = run.final_stage if run.final_stage in kept else names[x[-1]]
        at = names.index(last) if names.index(last) in x else x[-1]
        ends.append((dict(points)[at], at, place))
    for value, x, place in separate([end for end in ends if end[0] <= high], 0.05 * room):
        ax.annotate(
            f"{value:.4f}",
            (x, value),
            xytext=(7, 0),
            textcoords="offset points",
            color=COLOURS[place % len(COLOURS)],
            fontsize=8,
            va="center",
            zorder=6,
            bbox=dict(boxstyle="square,pad=0.1", facecolor="white", edgecolor="none", alpha=0.6),
        )
    ax.set_xticks(range(len(kept)), list(kept.values()))
    ax.set_xlim(-0.3, len(kept) - 0.4)
    notes = beyond([run.name for (run, _), (bottom, _) in zip(curves, ranges, strict=True) if bottom > high])
    ax.set_title(with_notes("Validation score at each stage", notes), fontsize=10)
    ax.set(ylabel="bits per byte")
    legend(fig, ax, width)
    return png(fig)


def separate(ends: list[tuple[float, int, int]], least: float) -> list[tuple[float, int, int]]:
    """Those of the (value, position, run) whose texts do not cover one another: the best and the worst come first."""
    kept: list[tuple[float, int, int]] = []
    for position in sorted({x for _, x, _ in ends}):
        here = sorted(end for end in ends if end[1] == position)
        for end in (here[0], here[-1], *here[1:-1]):
            if all(abs(end[0] - other[0]) >= least for other in kept if other[1] == position):
                kept.append(end)
    return kept


HATCHES = ("", "////", "xxxx")  # where the colours of roles repeat


def bytes_by_role(run: Run) -> dict[str, int]:
    """Bytes of an artifact: by section if the summary has sections, otherwise code and model."""
    parts = {section["section"]: section["bytes"] for section in run.sections}
    if parts and run.model_bytes:
        parts["header"] = run.model_bytes - sum(parts.values())
    if run.model_bytes is not None and not parts:
        parts = {"model": run.model_bytes}
    if not parts and run.artifact_bytes is not None:
        parts = {"model": run.artifact_bytes - (run.code_bytes or 0)}
    return ({"code": run.code_bytes} if run.code_bytes else {}) | parts


@picture
def bytes_picture(found: list[Run]) -> bytes | None:
    """A stacked bar of roles for each artifact. Roles below 1/50 of their artifact are grouped as `other`."""
    drawn = [(run, bytes_by_role(run)) for run in found]
    drawn = [(run, parts) for run, parts in drawn if parts]
    if not drawn:
        return None
    largest = max(sum(parts.values()) for _, parts in drawn)
    kept = list(
        dict.fromkeys(
            role
            for _, parts in drawn
            for role, count in parts.items()
            if role == "code" or count >= sum(parts.values()) / 50
        )
    )[:ROLES]
    from matplotlib import colormaps

    colours = {role: colormaps["tab20"](place % 20) for place, role in enumerate(kept)} | {"other": "#999999"}
    hatches = {role: HATCHES[place // 20 % len(HATCHES)] for place, role in enumerate(kept)}
    unit, name = (1e6, "MB") if largest > 1e6 else (1e3, "kB")
    limit = CAP_BYTES if largest > CAP_BYTES / 2 else 0
    bar = 0.42 if len(drawn) <= MANY else 0.26  # inches
    columns = legend_columns(11, [label_of(role) for role in kept])
    fig, (ax,) = figure(11, 1.6 + bar * len(drawn) + 0.2 * math.ceil((len(kept) + 1) / columns))
    for place, (_, parts) in enumerate(drawn):
        left = 0.0
        small = sum(count for role, count in parts.items() if role not in kept)
        for role, count in [*((r, parts[r]) for r in kept if r in parts), ("other", small)]:
            ax.barh(
                place,
                count / unit,
                left=left,
                facecolor=colours[role],
                hatch=hatches.get(role),
                edgecolor="white",
                linewidth=0.5,
                height=0.7,
                label=label_of(role) if count else None,
            )
            left += count / unit
        ax.annotate(
            f" {sum(parts.values()):,}",
            (max(left, limit / unit), place),
            va="center",
            fontsize=8,
            zorder=5,
        )
    if limit:
        ax.axvline(CAP_BYTES / unit, color="black", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(drawn)), [label_of(run.name) for run, _ in drawn], fontsize=8)
    ax.set_ylim(len(drawn) - 0.4, -0.6)
    ax.set_xlim(0, 1.12 * max(largest, limit) / unit)
    ax.set(xlabel=name, title="Bytes of the artifacts by role" + (", limit dashed" if limit else ""))
    handles = dict(
        reversed([(label, handle) for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)][::-1])
    )
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return png(fig)


def axis_of(name: str, texts: list[str]) -> tuple[Callable[[str], float], list[tuple[float, str]]]:
    """A function from a value to its position in 0..1 on an axis, and the ticks. Wide ranges are logarithmic."""
    try:
        numbers = sorted({float(text) for text in texts})
    except ValueError:
        numbers = []
    if not numbers or not all(map(strangers.is_number, numbers)):
        words = sorted(set(texts))
        places = {word: i / max(1, len(words) - 1) for i, word in enumerate(words)}
        return places.__getitem__, [(places[word], label_of(word)) for word in words[:: -(-len(words) // TICKS)]]
    log = numbers[0] > 0 and numbers[-1] / numbers[0] >= 8
    scale = math.log if log else float
    low, high = scale(numbers[0]), scale(numbers[-1])

    def place(text: str) -> float:
        return (scale(float(text)) - low) / (high - low) if high > low else 0.5

    shown = numbers
    if len(numbers) > 6:
        scale = math.exp if log else float
        shown = [scale(low + (high - low) * i / 4) for i in range(5)]
    return place, [(place(str(x)), f"{x:.5g}") for x in shown]


@picture
def sweep_picture(study: dict[str, Any]) -> bytes | None:
    """Parallel coordinates: a line for each finished run, through its values to its score; dark is best."""
    done = [t for t in study["trials"] if t["state"] == "complete" and t["value"] is not None]
    if not done:
        return None
    names = [*study["variables"], study["objective"]]
    sign = 1 if study["direction"] == "minimize" else -1
    high = limits([(sign * t["value"], sign * t["value"]) for t in done])[1]  # of the objective's axis
    shown = [sign * min(sign * t["value"], high) for t in done]
    table = [
        dict.fromkeys(names, "-") | t["values"] | {study["objective"]: str(value)}
        for t, value in zip(done, shown, strict=True)
    ]
    fig, (ax,) = figure(2.2 + 2.1 * len(names), 4.6)
    places = {}
    for x, name in enumerate(names):
        places[name], ticks = axis_of(name, [row[name] for row in table])
        ax.axvline(x, color="#444444", linewidth=1)
        for y, text in ticks:
            ax.annotate(
                text,
                (x, y),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                bbox=dict(boxstyle="round,pad=0.1", facecolor="white", edgecolor="none", alpha=0.8),
                zorder=5,
            )
    from matplotlib import colormaps

    order = sorted(range(len(done)), key=lambda i: -sign * done[i]["value"])
    for rank, i in enumerate(order):
        share = rank / max(1, len(order) - 1)
        ys = [places[name](table[i][name]) for name in names]
        ax.plot(
            range(len(names)),
            ys,
            color=colormaps["viridis_r"](0.1 + 0.9 * share),
            alpha=0.9,
            linewidth=1 + 1.8 * (share == 1),
        )
    ax.set_xticks(range(len(names)), [label_of(name) for name in names])
    ax.set_xlim(-0.2, len(names) - 0.5)
    ax.set_ylim(-0.05, 1.05)
    ax.set_yticks([])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.grid(False)
    failed = len(study["trials"]) - len(done)
    title = (
        f"{label_of(study['name'])}: {len(done)} finished runs, {failed} others; dark: "
        f"{'low' if sign > 0 else 'high'} {label_of(study['objective'])}"
    )
    notes = beyond([f"trial {t['trial']}" for t in done if sign * t["value"] > high])
    ax.set_title(with_notes(title, notes), fontsize=10)
    return png(fig)


@picture
def best_picture(study: dict[str, Any]) -> bytes | None:
    """The score of each trial in the order of their numbers, and the best so far."""
    trials = sorted(study["trials"], key=lambda trial: trial["trial"])
    done = [(t["trial"], t["value"]) for t in trials if t["state"] == "complete" and t["value"] is not None]
    if not done:
        return None
    best = list(itertools.accumulate((v for _, v in done), min if study["direction"] == "minimize" else max))
    fig, (ax,) = figure(8, 3.8)
    x, y = zip(*done, strict=True)
    ax.step(x, best, where="post", color=COLOURS[0], linewidth=1.6, label="best so far")
    ax.plot(x, y, marker="o", markersize=5, linewidth=0, color=COLOURS[1], markerfacecolor="white", label="trial")
    sign = 1 if study["direction"] == "minimize" else -1
    low, high = limits([(sign * value, sign * value) for value in y])
    room = max(high - low, 1e-6)
    ends = sign * (low - 0.08 * room), sign * (high + 0.08 * room)
    ax.set_ylim(*sorted(ends))
    failed = [t["trial"] for t in trials if t["state"] in ("fail", "pruned")]
    if failed:
        ax.plot(
            failed,
            [0.02] * len(failed),
            transform=ax.get_xaxis_transform(),
            marker="x",
            linewidth=0,
            color="#777777",
            label="failed or stopped early",
        )
    ax.xaxis.get_major_locator().set_params(integer=True)
    notes = beyond([f"trial {trial}" for trial, value in done if sign * value > high])
    ax.set_title(with_notes(f"{label_of(study['name'])}: best so far {best[-1]:.6g}", notes), fontsize=10)
    ax.set(xlabel="trial", ylabel=label_of(study["objective"]))
    legend(fig, ax, 8)
    return png(fig)


@picture
def importance_picture(study: dict[str, Any]) -> bytes | None:
    """How much of the score's spread each variable explains, as bars."""
    rows = sorted(study["importance"].items(), key=lambda row: row[1])
    if not rows:
        return None
    fig, (ax,) = figure(8, 1.5 + 0.34 * len(rows))
    ax.barh(range(len(rows)), [share for _, share in rows], color=COLOURS[0], height=0.6)
    for place, (_, share) in enumerate(rows):
        ax.annotate(f" {share:.1%}", (share, place), va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [label_of(name) for name, _ in rows], fontsize=8)
    ax.set_xlim(0, 1.15 * max(1e-3, *(share for _, share in rows)))
    ax.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.set_title(
        f"{label_of(study['name'])}: importance of each variable for {label_of(study['objective'])}", fontsize=10
    )
    ax.set(xlabel=f"share{' by ' + label_of(study['importance_by']) if study['importance_by'] else ''}")
    return png(fig)


# ------------------------------------------------------------------------------------------------------------ the page

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em;color:#222}
html{background:#fff}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
td,th{padding:3px 9px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}td:first-child,th:first-child
{text-align:left}img{width:auto;max-width:max(100%,44em);height:auto;display:block;margin:1em 0}
@media(max-width:40em){body{margin:1em auto}td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:9em}}"""


def html_table(rows: list[list[str]]) -> str:
    """Rows as an HTML table; the first row is the head."""

    def line(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(visible(cell))}</{tag}>" for cell in row) + "</tr>"

    return (
        "<div class=wide><table>"
        + line(rows[0], "th")
        + "".join(line(row, "td") for row in rows[1:])
        + "</table></div>"
    )


def write_report(out: Path, sections: list[tuple[str, list[list[str]], dict[str, bytes]]]) -> None:
    """Writes report.md, its PNGs and report.html. Errors: UserError if the folder holds files of something else."""
    page = out / "report.html"
    ours = strangers.is_plain(page, out) and MARKER.encode() in strangers.read_head(page, 200)
    if out.exists() and any(out.iterdir()) and not ours:
        raise UserError(f"--out {out}: is a folder with other files, which are not overwritten; choose another name")
    text, body = [MARKER], []
    for title, rows, pictures in sections:
        text += [f"# {markdown(title)}", "", runs.table(runs.stranger_rows(rows), markdown=True), ""]
        body += [f"<h1>{html.escape(visible(title))}</h1>", html_table(rows)]
        for name, content in pictures.items():
            write_atomic(out / name, content)
            text += [f"![{name.removesuffix('.png')}]({name})", ""]
            body.append(
                f'<div class=wide><img alt="{html.escape(name.removesuffix(".png"))}" src="data:image/png;base64,'
                f'{base64.b64encode(content).decode()}"></div>'
            )
    write_atomic(out / "report.md", "\n".join(text))
    write_atomic(
        page,
        f"<!DOCTYPE html>{MARKER}<html lang=en><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width,initial-scale=1'><title>"
        f"{html.escape(visible(sections[0][0]))}</title><style>{STYLE}</style>{''.join(body)}</html>\n",
    )


def main(arguments: list[str]) -> int:
    """Prints the tables and writes the report. Returns the exit code."""
    parser = Parser(prog="report.py", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="[NAME=]PATH")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default: print the table only)")
    parser.add_argument("--title", default="Runs", help="of the report (default: Runs)")
    options = parser.parse_args(arguments)
    problems: list[str] = []
    found, sweeps = read(options.paths, problems)
    for text in problems[:WARNINGS]:
        print(f"warning: {visible(text)}", file=sys.stderr)
    if len(problems) > WARNINGS:
        print(f"warning: and {len(problems) - WARNINGS} more", file=sys.stderr)
    sections = []
    if found:
        pictures = (
            {}
            if not options.out
            else {
                "loss.png": loss_picture(found),
                "stages.png": stage_picture(found),
                "bytes.png": bytes_picture(found),
            }
        )
        sections.append((options.title, rows_of(found), pictures))
    for place, study in enumerate(sweeps):
        number = f"-{place + 1}" if len(sweeps) > 1 else ""
        draws = {"best": best_picture, "importance": importance_picture, "sweep": sweep_picture}
        pictures = {f"{name}{number}.png": draw(study) for name, draw in draws.items()} if options.out else {}
        sections.append((f"Sweep {study['name']}", sweep_rows(study), pictures))
    for title, rows, _ in sections:
        print(visible(title))
        print(runs.table(rows))
    if options.out:
        write_report(
            options.out,
            [(title, rows, {name: p for name, p in pictures.items() if p}) for title, rows, pictures in sections],
        )
        print(f"written: {visible(options.out / 'report.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))
