"""A table and pictures of any runs: ours from their folders, other people's from their logs, side by side.

    python tools/report.py logs/RUN1 logs/RUN2 peer/train_seed42.log --out report
    python tools/report.py logs/sweeps/NAME --out report

A path is a run's folder, a metrics.jsonl, a log, a submission's folder, a sweep's folder, or a folder of such.
NAME=PATH gives a run another name. The table is printed. --out also gets report.md, the pictures as PNG, and
report.html, one page with everything. The pictures are loss against step and time, bits per byte at each stage, bytes
by role, and the parallel coordinates of a sweep.
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
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import runs
import strangers
from runs import CAP_BYTES, Parser, Run, UserError, command_line, write_atomic
from strangers import markdown, visible

WARNINGS = 100  # that are printed
MARKER = "<!-- made by tools/report.py -->"
# Okabe and Ito's colours, for colour-blind readers. After the last one they repeat with another line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")
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
        problems += [f"{run.source}: {text}" for text in run.problems]
        if not (run.losses or run.scores or run.stages or run.artifact_bytes):
            raise UserError(f"{run.source}: holds no training log line and no score")
    rename(found)
    return found, sweeps


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


def read_study(path: Path) -> dict[str, Any]:
    """A sweep's study.json. Errors: UserError."""
    content = strangers.read_json(path, kind="study")
    if not isinstance(content, dict) or not set(STUDY) <= set(content):
        raise UserError(f"{path}: is not a sweep's study.json")
    problems: list[str] = []
    study = strangers.checked(content, STUDY, str(path), problems)
    if problems or set(study) != set(STUDY):
        raise UserError(problems[0] if problems else f"{path}: is not a sweep's study.json")
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


def rows_of(found: list[Run]) -> list[list[str]]:
    """The rows of the table, without columns that are empty for every run."""
    columns: dict[str, Callable[[Run], str]] = {
        "run": lambda r: r.name,
        "seed": lambda r: runs.shown(r.seed),
        "val_bpb": lambda r: runs.shown(r.final and r.final.bpb, ".5f"),
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


def points_of(rows: list[tuple], column: int) -> list[tuple[float, float]]:
    """The points of a curve that can be drawn: (position, loss), both finite."""
    return [(row[column], row[1]) for row in rows if strangers.is_number(row[column]) and strangers.is_number(row[1])]


def thinned(points: list) -> list:
    """At most POINTS of a curve, evenly, with its last one."""
    stride = -(-len(points) // POINTS) or 1
    return points[(len(points) - 1) % stride :: stride]


def style(place: int) -> dict[str, Any]:
    return dict(color=COLOURS[place % len(COLOURS)], linestyle=LINES[place // len(COLOURS) % len(LINES)])


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


def legend(fig, ax, entries: int) -> None:
    """A legend below the axes, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        fig.legend(
            handles, labels, loc="outside lower center", ncols=min(3, max(1, entries)), fontsize=8, frameon=False
        )


def smoothed(values: list[float]) -> list[float]:
    """A running mean over 1/50 of a curve; short curves stay as they are."""
    width = max(1, len(values) // 50)
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i - width + 1)]) / min(width, i + 1) for i in range(len(values))]


@picture
def loss_picture(found: list[Run]) -> bytes | None:
    """Training loss (thin) and validation loss (points), against step and against time."""
    drawn = [run for run in found if points_of([*run.losses, *run.scores], 0)]
    if not drawn:
        return None
    fig, axes = figure(11, 4.6 + 0.18 * math.ceil(len(drawn) / 3), 2, sharey=True)
    for place, run in enumerate(drawn):
        for ax, column in ((axes[0], 0), (axes[1], -1)):
            points, scores = points_of(run.losses, column), thinned(points_of(run.scores, column))
            label = label_of(run.name)
            if points:
                smooth = smoothed([y for _, y in points])
                x, y = zip(*thinned([(x, y) for (x, _), y in zip(points, smooth, strict=True)]), strict=True)
                ax.plot(x, y, linewidth=1.3, label=label, **style(place))
                label = None
            if scores:
                x, y = zip(*scores, strict=True)
                ax.plot(
                    x,
                    y,
                    marker="o",
                    markersize=4,
                    linewidth=0 if points else 1,
                    markerfacecolor="white",
                    label=label,
                    **style(place),
                )
    lows, highs = zip(*(curve_range(run) for run in drawn), strict=True)
    axes[0].set_ylim(min(lows) - 0.03 * (max(highs) - min(lows)), max(highs))
    axes[0].set(xlabel="step", ylabel="loss, nats per token", title="Loss against step (line: training, o: validation)")
    axes[1].set(xlabel="seconds of training", title="Loss against time")
    legend(fig, axes[0], len(drawn))
    return png(fig)


def curve_range(run: Run) -> tuple[float, float]:
    """The range to show of a loss curve: its minimum, and its maximum after the first 5% of training."""
    rows = points_of([*run.losses, *run.scores], 0)
    last = max(step for step, _ in rows)
    values = [value for _, value in rows]
    late = [value for step, value in rows if step > last / 20]
    return min(values), max(late or values) + 0.1 * (max(values) - min(values)) * (len(rows) < 20)


@picture
def stage_picture(found: list[Run]) -> bytes | None:
    """Bits per byte at each stage, with the last value of each run as text."""
    curves = [(run, [(s, run.stages[s].bpb) for s in STAGES if s in run.stages]) for run in found]
    curves = [(run, [(s, bpb) for s, bpb in points if strangers.is_number(bpb)]) for run, points in curves]
    curves = [(run, points) for run, points in curves if points]
    kept = [stage for stage in STAGES if any(stage in dict(points) for _, points in curves)]
    if not kept:
        return None
    fig, (ax,) = figure(2.2 + 2.2 * len(kept), 4.2 + 0.18 * math.ceil(len(curves) / 3))
    ends = []
    for place, (run, points) in enumerate(curves):
        x, y = [kept.index(s) for s, _ in points], [bpb for _, bpb in points]
        ax.plot(x, y, marker="o", markersize=5, linewidth=1.4, label=label_of(run.name), **style(place))
        ends.append((y[-1], place, x[-1]))
    low, high = ax.get_ylim()
    last = -math.inf
    for value, place, x in sorted(ends):  # move overlapping texts up
        y = max(value, last + 0.045 * (high - low))
        last = y
        ax.annotate(
            f"{value:.4f}",
            (x, value),
            xytext=(x + 0.07, y),
            color=COLOURS[place % len(COLOURS)],
            fontsize=8,
            va="center",
        )
    ax.set_ylim(low, max(high, last + 0.05 * (high - low)))
    ax.set_xticks(range(len(kept)), [STAGES[stage] for stage in kept])
    ax.set_xlim(-0.3, len(kept) - 0.4)
    ax.set(ylabel="bits per byte", title="Validation score at each stage")
    legend(fig, ax, len(curves))
    return png(fig)


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
    unit, name = (1e6, "MB") if largest > 1e6 else (1e3, "kB")
    fig, (ax,) = figure(11, 1.6 + 0.42 * len(drawn) + 0.2 * math.ceil(len(kept) / 4))
    for place, (_, parts) in enumerate(drawn):
        left = 0.0
        small = sum(count for role, count in parts.items() if role not in kept)
        for role, count in [*((r, parts[r]) for r in kept if r in parts), ("other", small)]:
            ax.barh(
                place,
                count / unit,
                left=left,
                color=colours[role],
                edgecolor="white",
                linewidth=0.5,
                height=0.7,
                label=label_of(role) if count else None,
            )
            left += count / unit
        ax.annotate(
            f" {sum(parts.values()):,}",
            (left, place),
            va="center",
            fontsize=8,
            zorder=5,
            bbox=dict(boxstyle="square,pad=0.05", facecolor="white", edgecolor="none"),
        )
    if largest > CAP_BYTES / 2:
        ax.axvline(CAP_BYTES / unit, color="black", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(drawn)), [label_of(run.name) for run, _ in drawn], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.12 * max(largest, CAP_BYTES if largest > CAP_BYTES / 2 else 0) / unit)
    ax.set(xlabel=name, title="Bytes of the artifacts by role" + (", limit dashed" if largest > CAP_BYTES / 2 else ""))
    handles = dict(
        reversed([(label, handle) for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)][::-1])
    )
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
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
    table = [dict.fromkeys(names, "-") | t["values"] | {study["objective"]: str(t["value"])} for t in done]
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

    order = sorted(range(len(done)), key=lambda i: -done[i]["value"])
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
    ax.set_title(
        f"{label_of(study['name'])}: {len(done)} finished runs, {failed} others; dark: low "
        f"{label_of(study['objective'])}",
        fontsize=10,
    )
    return png(fig)


# ------------------------------------------------------------------------------------------------------------ the page

STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
td,th{padding:3px 9px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}td:first-child,th:first-child
{text-align:left}img{max-width:100%;height:auto;display:block;margin:1em 0}"""


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
                f'<img alt="{html.escape(name.removesuffix(".png"))}" src="data:image/png;base64,'
                f'{base64.b64encode(content).decode()}">'
            )
    write_atomic(out / "report.md", "\n".join(text))
    write_atomic(
        page,
        f"<!DOCTYPE html>{MARKER}<html lang=en><meta charset=utf-8><title>{html.escape(visible(sections[0][0]))}"
        f"</title><style>{STYLE}</style>{''.join(body)}</html>\n",
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
        pictures = {f"sweep{number}.png": sweep_picture(study)} if options.out else {}
        sections.append((f"Sweep {study['name']}", sweep_rows(study), pictures))
    for _, rows, _ in sections:
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
