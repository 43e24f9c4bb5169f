"""The report of bench/lab.py: differences with intervals, trends over the sizes, and verdicts, from lines of results.

Rules of the verdicts. A difference is the idea's bits per byte minus the control's with the same seed: below 0 is
better. "All sizes together" means the differences of all seeds at all sizes, taken as one sample.

- pays: run at the largest size and another one at least, with 3 seeds or more at each; the mean difference is below 0
  at every size; the interval of all sizes together is below 0; the gain does not vanish. All of it at equal FLOPs and
  at equal seconds.
- does not: a training diverged; or the row was hopeless at a size and stopped: its mean at equal seconds is above
  HOPELESS, its interval there above 0, and its mean at equal FLOPs not below 0, with 3 seeds or more; or, at the
  largest size or at all sizes together, the interval excludes a gain of WORTH at equal FLOPs, or excludes it at equal
  seconds while all sizes together show no gain at equal FLOPs either; or the gain vanishes.
- unclear: anything else. More seeds or sizes may settle it.

A trend is the slope of the difference per doubling of the training's FLOPs, by least squares for each seed. If its
interval excludes 0, an effect grows where it is larger at the largest size than at the smallest, and shrinks otherwise.
A gain vanishes if such a slope is above 0 and the interval at the largest size reaches 0.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from intervals import half_width

CONTROL = "control"
KINDS = {"flops": "equal FLOPs", "seconds": "equal seconds"}
WORTH = 0.001  # bits per byte: a smaller gain is not worth a knob
HOPELESS = 0.003  # bits per byte worse than the control: larger sizes are not tried
SEEDS_NEEDED = 3

Differences = Mapping[int, float]  # by seed
Cells = Mapping[str, Differences]  # by kind
Standing = Mapping[str, Cells]  # by size


# ---------------------------------------------------------------------------------------------------------- statistics


class Interval(NamedTuple):
    """A mean and its 95% interval, mean ± half. Of a single value, half is infinite."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + (f" ± {self.half:.4f}" if math.isfinite(self.half) else "")


def interval(values: Iterable[float]) -> Interval:
    """Student's interval of the mean of some values, at least one. A diverged training is an infinite value."""
    values = list(values)
    if not all(math.isfinite(value) for value in values):
        return Interval(math.inf, 0.0)
    return Interval(statistics.mean(values), half_width(values) if len(values) > 1 else math.inf)


def mean_of(cells: Cells, kind: str) -> float:
    """The mean difference; infinite where there is none."""
    return interval(cells[kind].values()).mean if cells.get(kind) else math.inf


def hopeless(cells: Cells) -> bool:
    """Whether a row is not tried at larger sizes."""
    if any(len(cells.get(kind, {})) < SEEDS_NEEDED for kind in KINDS):
        return any(math.isinf(x) for of_kind in cells.values() for x in of_kind.values())
    seconds = interval(cells["seconds"].values())
    return seconds.mean > HOPELESS and seconds.low > 0 and mean_of(cells, "flops") >= 0


class Trend(NamedTuple):
    """How a difference changes with the training's FLOPs."""

    slope: Interval  # per doubling
    word: str  # grows, shrinks or not resolved
    vanishes: bool


def slope_of(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least squares."""
    return statistics.linear_regression(xs, ys).slope


def trend(standing: Standing, kind: str, sizes: list[str], compute: Mapping[str, float]) -> Trend | None:
    """The trend over the sizes, smallest first; None without two seeds that two sizes share."""
    found = {size: standing[size][kind] for size in sizes if standing.get(size, {}).get(kind) and size in compute}
    seeds = sorted(set.intersection(*(set(of_size) for of_size in found.values()))) if len(found) > 1 else []
    values = [x for of_size in found.values() for x in of_size.values()]
    if len(seeds) < 2 or not all(math.isfinite(x) for x in values):
        return None
    doublings = [math.log2(compute[size]) for size in found]
    slope = interval(slope_of(doublings, [of_size[seed] for of_size in found.values()]) for seed in seeds)
    if slope.low <= 0 <= slope.high:
        return Trend(slope, "not resolved", False)
    first, last = (interval(found[size].values()) for size in (list(found)[0], list(found)[-1]))
    word = "grows" if abs(last.mean) > abs(first.mean) else "shrinks"  # an effect near 0 at first has no direction yet
    return Trend(slope, word, slope.low > 0 > first.mean and last.high >= 0)


# ------------------------------------------------------------------------------------------------------------ verdicts


def together(standing: Standing, kind: str) -> Interval:
    """The interval of the differences at all sizes."""
    return interval(x for cells in standing.values() for x in cells.get(kind, {}).values())


def refuted(standing: Standing, sizes: list[str]) -> str:
    """Why a gain worth having is excluded, at the largest size or at all sizes together; or nothing."""
    complete = {
        size: cells
        for size, cells in standing.items()
        if all(len(cells.get(kind, {})) >= SEEDS_NEEDED for kind in KINDS)
    }
    samples = {}
    if sizes[-1] in complete:
        samples[f"at {sizes[-1]}"] = {sizes[-1]: complete[sizes[-1]]}
        samples["at all sizes together"] = complete
    for where, sample in samples.items():
        for kind, words in KINDS.items():
            gains_elsewhere = kind == "seconds" and together(complete, "flops").high < 0
            if together(sample, kind).low > -WORTH and not gains_elsewhere:
                return f"{words} exclude a gain of {WORTH} {where}"
    return ""


def shortcomings(standing: Standing, sizes: list[str]) -> str:
    """What a row lacks to pay, or nothing."""
    if sizes[-1] not in standing or len(standing) < min(2, len(sizes)):
        return f"not run at {sizes[-1]} and a smaller size"
    for kind, words in KINDS.items():
        for size, cells in standing.items():
            if len(cells.get(kind, {})) < SEEDS_NEEDED:
                return f"fewer than {SEEDS_NEEDED} seeds at {size}, {words}"
        worse = [size for size, cells in standing.items() if mean_of(cells, kind) >= 0]
        if worse:
            return f"no gain at {', '.join(worse)}, {words}"
        if together(standing, kind).high >= 0:
            return f"the interval of all sizes together reaches 0, {words}"
    return ""


def verdict(standing: Standing, sizes: list[str], compute: Mapping[str, float]) -> tuple[str, str]:
    """(pays, does not or unclear; why) by the rules at the top of this file. `sizes`: all of the laboratory's."""
    for size, cells in standing.items():
        if any(math.isinf(x) for of_kind in cells.values() for x in of_kind.values()):
            return "does not", f"diverged at {size}"
        if hopeless(cells):
            more = "" if size == sizes[-1] else ", so larger sizes are skipped"
            return "does not", f"worse at {size}{more}"
    trends = {kind: trend(standing, kind, sizes, compute) for kind in KINDS}
    for kind, found in trends.items():
        if found and found.vanishes:
            return "does not", f"the gain vanishes, {KINDS[kind]}"
    against = refuted(standing, sizes)
    if against:
        return "does not", against
    missing = shortcomings(standing, sizes)
    return ("unclear", missing) if missing else ("pays", "better at every size")


# ------------------------------------------------------------------------------------------------------------- results


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, oldest first; a line that a kill cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def is_tuning(record: dict[str, Any]) -> bool:
    """Whether a result only served to choose a rate."""
    return record.get("kinds") == ["tuning"]


def runs_of_rows(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Each row's runs, without those that chose a rate, against the recipe that it was compared with last."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for record in results:
        if record["what"] == "run" and not is_tuning(record):
            rows.setdefault(record["row"], []).append(record)
    return {name: [r for r in runs if r["recipe"] == runs[-1]["recipe"]] for name, runs in rows.items()}


def controls(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every run by its key, under which the runs that are compared with it name it."""
    return {record["key"]: record for record in results if record["what"] == "run"}


def differences(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[int, float]]]]:
    """Differences to the control by row, size, kind and seed. The newest line counts. Infinite: it diverged."""
    by_key, found = controls(results), {}
    for name, runs in runs_of_rows(results).items():
        for record in runs:
            against = by_key.get(record["control"], {}).get("bpb")
            if name == CONTROL or against is None:
                continue
            difference = math.inf if record["bpb"] is None else record["bpb"] - against
            for kind in record["kinds"]:
                cells = found.setdefault(name, {}).setdefault(record["size"], {})
                cells.setdefault(kind, {})[record["seed"]] = difference
    return found


def newest_costs(results: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The newest measurement of each row's steps, by row and size."""
    return {(r["row"], r["size"]): r for r in results if r["what"] == "cost"}


def training_flops(results: list[dict[str, Any]]) -> dict[str, float]:
    """FLOPs of the control's training, by size."""
    return {r["size"]: r["control_steps"] * r["flops"][0] for r in results if r["what"] == "cost"}


# -------------------------------------------------------------------------------------------------------------- report


def bold(pair: Interval) -> str:
    """An interval, in bold where it excludes 0."""
    return f"**{pair}**" if pair.low > 0 or pair.high < 0 else str(pair)


def cell(cells: Cells, kind: str) -> str:
    return bold(interval(cells[kind].values())) if cells.get(kind) else ""


def trend_cell(found: Trend | None) -> str:
    if found is None:
        return ""
    return f"{found.slope}, {'vanishes' if found.vanishes else found.word}"


def remarks(name: str, results: list[dict[str, Any]]) -> str:
    """What a reader must know of a row: other sources, tuned rates, an older recipe, an error."""
    runs, by_key = runs_of_rows(results)[name], controls(results)
    newest, recipe = runs_of_rows(results).get(CONTROL, [{}])[-1].get("recipe"), runs[-1]["recipe"]
    words = []
    if any(r["source"] != by_key.get(r["control"], r)["source"] for r in runs):
        words.append("row and control are of different versions of train_gpt.py")
    tried = {r["factor"]: r["bpb"] for r in results if is_tuning(r) and r["row"] == name and r["recipe"] == recipe}
    if tried:
        scores = ", ".join(
            f"x {x:g}: {'diverged' if bpb is None else f'{bpb:.4f}'}" for x, bpb in sorted(tried.items())
        )
        words.append(f"rates x {runs[-1]['factor']:g} (tried {scores})")
    if recipe != newest:
        words.append("against an earlier recipe")
    words += sorted({r["error"] for r in runs if r.get("error")})
    return "; ".join(words)


def summary_table(results: list[dict[str, Any]], sizes: list[str]) -> list[str]:
    """A line for each row: verdict, all sizes together, trends."""
    lines = [
        "| idea | verdict | why | all sizes, equal FLOPs | all sizes, equal seconds | trend, equal FLOPs "
        "| trend, equal seconds | remarks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    compute = training_flops(results)
    order = ["pays", "unclear", "does not"]
    rows = {name: verdict(standing, sizes, compute) for name, standing in differences(results).items()}
    standings = differences(results)
    for name in sorted(rows, key=lambda name: order.index(rows[name][0])):
        pooled = [bold(together(standings[name], kind)) if has(standings[name], kind) else "" for kind in KINDS]
        trends = [trend_cell(trend(standings[name], kind, sizes, compute)) for kind in KINDS]
        cells = [name, f"*{rows[name][0]}*", rows[name][1], *pooled, *trends, remarks(name, results)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def has(standing: Standing, kind: str) -> bool:
    return any(cells.get(kind) for cells in standing.values())


def detail_table(results: list[dict[str, Any]], sizes: list[str]) -> list[str]:
    """A line for each row and size."""
    lines = [
        "| idea | size | seeds | equal FLOPs | equal seconds | steps | FLOPs of a step | seconds of a step | tokens/s "
        "| parameters | bytes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_key, runs = controls(results), runs_of_rows(results)
    costs = newest_costs(results)
    for name, standing in differences(results).items():
        for size in (size for size in sizes if size in standing):
            own = [r for r in runs[name] if r["size"] == size]
            cost = costs.get((name, size))
            cells = standing[size]
            seeds = len(set().union(*cells.values()))
            steps = {kind: r["steps"] for r in own for kind in r["kinds"]}
            counts = " / ".join(str(steps[kind]) for kind in KINDS if kind in steps)
            columns = [name, size, str(seeds), cell(cells, "flops"), cell(cells, "seconds"), counts]
            lines.append("| " + " | ".join([*columns, *cost_cells(cost), *size_cells(own, by_key)]) + " |")
    return lines


def cost_cells(cost: dict[str, Any] | None) -> list[str]:
    """FLOPs, seconds and tokens/s of an idea's mean step over the control's; of seconds also the rounds' range."""
    if cost is None:
        return ["", "", ""]
    ratios, flops = cost["ratios"], cost["flops"][1] / cost["flops"][0]
    rate = cost["tokens"][1] / cost["tokens"][0] / statistics.median(ratios)
    return [
        f"x {flops:.3f}",
        f"x {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        f"x {rate:.3f}",
    ]


def size_cells(own: list[dict[str, Any]], by_key: dict[str, dict[str, Any]]) -> list[str]:
    """Parameters beyond the control's, and bytes of the model where they were measured (`--bytes`)."""
    against = [by_key[r["control"]] for r in own if r["control"] in by_key]
    parameters = f"{own[-1]['parameters'] - against[-1]['parameters']:+d}" if against else ""
    pairs = [(r["bytes"], by_key.get(r["control"], {}).get("bytes")) for r in own]
    measured = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    return [parameters, f"{measured[-1]:+d}" if measured else ""]


def control_lines(results: list[dict[str, Any]], sizes: list[str]) -> list[str]:
    """A line for each size: what the control is and reaches."""
    runs, compute = runs_of_rows(results).get(CONTROL, []), training_flops(results)
    lines = [
        "| size | parameters | steps | tokens | FLOPs | bpb | deviation over seeds | tokens/s beside another run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        own = {r["seed"]: r for r in runs if r["size"] == size and r["bpb"] is not None}
        if own:
            scores = [r["bpb"] for r in own.values()]
            last = list(own.values())[-1]
            spread = f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
            flops = f"{compute[size]:.2e}" if size in compute else ""
            cells = [size, last["parameters"], last["steps"], last["tokens"], flops]
            cells += [f"{statistics.mean(scores):.4f}", spread, last.get("tokens_per_second", "")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def caveats(results: list[dict[str, Any]], about: str) -> list[str]:
    """What the figures do not say, before the figures. `about`: what the text is."""
    rows = len(differences(results))
    machines = sorted({f"{r['machine']}, torch {r['torch']}" for r in results})
    return [
        f"- The text is {about}, with a vocabulary of 1,024 pieces. Web text may rank the ideas otherwise.",
        "- The models have 0.7, 2 and 6 million parameters, and see less than one token for each of them. What helps a "
        "model that learns too little may not help one that has seen enough. So the trend matters, and an idea whose "
        "trend is not resolved is not safe to carry to a large model. At `0.7M x 8` the smallest model sees eight "
        "times as many; what gains at the other sizes alone may be no more than a faster start.",
        "- A cell is the mean difference to the control with the same seeds, and its 95% interval by Student's t. With "
        "3 seeds, t is 4.3: the half width is 2.5 standard deviations of a difference, and the deviation itself is "
        "known to a factor of 2 or so. An interval that reaches 0 does not say that an idea is without effect.",
        "- A seed decides initial weights, order of the text and noise. The validation text is the same for all, and "
        "its choice is not part of any interval.",
        "- All sizes together is a mean over sizes of an effect that may depend on the size. Its interval treats the "
        "differences as one sample.",
        f"- {rows} rows are compared. Were none of them to have an effect, about 1 in 40 intervals would still lie "
        "below 0, and 1 in 40 above.",
        "- Equal FLOPs count matrix products. Equal seconds are CPU seconds of one thread, and a GPU's are others: it "
        "may wait for memory in small operations that cost a CPU little, and the other way round.",
        "- Numbers of steps within 1% of the control's are taken for the control's, and so are times within 3% that "
        "three rounds cannot tell from the control's. One run then counts at equal FLOPs and at equal seconds.",
        "- Where rates were tuned (remarks: rates x), the best of 3 factors was chosen at the smallest size, by a seed "
        "that is not in the table. The control's own rates have rows: matrix rate x 0.7 and x 1.4.",
        "- Parameters beyond the control's cost bytes. Bytes are measured only with --bytes, for the first seed.",
        *(f"- Made on {machine}." for machine in machines),
    ]


def rules() -> list[str]:
    """The rules of the verdicts, from the top of this file."""
    text = (__doc__ or "").partition("\n\n")[2]
    return text.replace("WORTH", f"{WORTH} bpb").replace("HOPELESS", f"{HOPELESS} bpb").strip().splitlines()


BUILTIN = "the built-in corpus: Python code and its documentation"


def report(
    results: list[dict[str, Any]],
    notes: Mapping[str, str],
    sizes: list[str],
    about: str = BUILTIN,
    source: str = "lab.jsonl",
) -> str:
    """The whole page. `notes`: why rows are not run now; `source`: the file of the results."""
    lines = ["# The laboratory of training ideas", "", f"Made by `make lab` (bench/lab.py) from {source}.", ""]
    lines += ["## How to read it", "", *caveats(results, about), "", "## Rules", "", *rules(), ""]
    lines += ["## The control", "", *control_lines(results, sizes), ""]
    if differences(results):
        lines += ["## Ideas", "", *summary_table(results, sizes), ""]
        lines += ["## Each size", "", *detail_table(results, sizes), ""]
    else:
        lines += ["No idea has results yet.", ""]
    if notes:
        lines += ["## Not run now", "", *(f"- {name}: {why}." for name, why in notes.items()), ""]
    return "\n".join(lines)
