"""Shared code of the tools: reading runs from folders and logs, statistics over seeds, one-line errors.

A run is read from its folder (summary.json, metrics.jsonl, log.txt), from a metrics file, or from a log alone. The log
may be ours or in the format of the challenge's public records. A figure that is not in a source is None or absent.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CAP_BYTES, BUDGET_SECONDS = 16_000_000, 600.0  # limits: decimal bytes; seconds of training, and of evaluation
MARGIN_NATS, LEVEL = 0.005, 0.01  # a record must be better by this margin, at a p-value below this level
SEEDS = (42, 0, 314)
RUN_FILES = ("summary.json", "metrics.jsonl", "log.txt")
EVALUATION_STAGES = ("unpack", "evaluate", "ttt")


class UserError(Exception):
    """A user's error: one line that names the argument or file, its value, and what is allowed. Exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(message)


def number_type(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite number from `low` to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            wanted = "a whole number" if kind is int else "a number"
            limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be {wanted} {limits}")
        return value

    return parse


def command_line(main: Callable[[list[str]], int]) -> int:
    """Runs a tool's main. A user's error gives one line and exit code 2, an interrupt exit code 130."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        message, code = " ".join(str(error).split()), 2
    except ModuleNotFoundError as error:
        if error.name and (ROOT / "tools" / f"{error.name.split('.')[0]}.py").exists():
            raise
        message, code = f"{error.name}: is not installed; run `pip install -r requirements-tools.txt`", 2
    except OSError as error:
        message, code = f"{error.filename2 or error.filename or 'a file'}: {error.strerror or error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"error: {message}" if code == 2 else message, file=sys.stderr)
    return code


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a temporary file beside the target and renames it, so that no reader sees a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """A JSON file. Errors: UserError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not JSON ({error})") from None


# ------------------------------------------------------------------------------------------------------------ records


@dataclass
class Stage:
    """A score: nats per token, bits per byte, and seconds of the evaluation if the source has them."""

    loss: float
    bpb: float
    seconds: float | None = None


@dataclass
class Run:
    """All figures known of one run."""

    name: str
    source: str
    seed: int | None = None
    losses: list[tuple[int, float, float | None]] = field(default_factory=list)  # step, train_loss, seconds
    scores: list[tuple[int, float, float, float | None]] = field(default_factory=list)  # step, loss, bpb, seconds
    stages: dict[str, Stage] = field(default_factory=dict)  # pre_quant, quantized, sliding, ttt_baseline, ttt
    code_bytes: int | None = None
    model_bytes: int | None = None
    artifact_bytes: int | None = None
    steps: int | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    targets: int | None = None  # scored tokens
    val_tokens: int | None = None  # tokens of the validation shards
    val_bytes: int | None = None
    shared_documents: int | None = None  # validation documents that are in training too
    strictly_causal: bool | None = None  # whether scores depend on the artifact and earlier tokens alone
    parameters: int | None = None
    hardware: str | None = None
    attention: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sections: list[dict] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def final(self) -> Stage | None:
        """The score that counts: that of the run's last stage."""
        return next((self.stages[s] for s in ("ttt", "sliding", "quantized", "pre_quant") if s in self.stages), None)

    @property
    def step_avg_ms(self) -> float | None:
        return 1000 * self.train_seconds / self.steps if self.train_seconds and self.steps else None


NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
PAIR = re.compile(rf"([A-Za-z_][\w/]*):\s*({NUMBER})(ms|s|m)?(?![\w.])")
STEP = re.compile(r"^(?:step:\s*)?(\d+)/(\d+)\s+(?=(?:train|val)_loss)")
STAGE = re.compile(rf"^([A-Za-z][\w +.()-]*?):?\s+val_loss:\s*({NUMBER})\s+val_bpb:\s*({NUMBER})(.*)$")
SIZE = re.compile(r"^(Total submission size|Code size|Serialized model)\b([^:]*):\s*([\d,]+) bytes")
OURS = {
    "artifact": re.compile(r"^artifact +(\d+) bytes \(code (\d+) \+ model (\d+)\)"),
    "read back": re.compile(r"^val_bpb .*read back; (\d+) targets, (\d+) bytes"),
    "trained": re.compile(r"^trained +(\d+) steps, .* (\d+) parameters$"),
    "seconds": re.compile(r"^seconds +(.*); (?:in all|total)"),
    "folder": re.compile(r"^\S+  (.*ranks?|\d+ x .*?)  (\{.*\})$"),
    "shared": re.compile(r"^(?:warning: )?audit: (\d+) validation documents are in the training shards too"),
    "attention": re.compile(r"^device:\w+ .*\battention:(\w+)"),
    "causal": re.compile(r"^ +strictly causal: (yes|no)$"),
}
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, None: 1.0, "": 1.0}


def number(text: str) -> float:
    return float(text.replace(",", ""))


def stage_name(words: str) -> str | None:
    """The stage that a log line names, in our words or those of the public records."""
    w = words.lower()
    if "ttt" in w:
        return "ttt_baseline" if "baseline" in w or "before" in w or "no_ttt" in w else "ttt"
    if "sliding" in w or "sw_" in w:
        return "sliding"
    if re.search(r"pre[-_ ]?quant|post[-_ ]?ema|pre[-_ ]?export", w):
        return "pre_quant"
    return "quantized" if re.search(r"quant|roundtrip|int[468]", w) else None


class LogReader:
    """Reads the lines of a log into a Run."""

    def __init__(self, run: Run):
        self.run, self.exact = run, set()

    def feed(self, line: str) -> None:
        """Reads one line, without its newline."""
        if match := STEP.match(line):
            self.step(int(match[1]), {name: (value, unit) for name, value, unit in PAIR.findall(line)})
        elif match := STAGE.match(line):
            self.stage(match)
        elif match := SIZE.match(line):
            self.size(match[1], match[2], int(number(match[3])))
        else:
            self.other(line)

    def step(self, step: int, pairs: dict[str, tuple[str, str]]) -> None:
        seconds = number(pairs["train_time"][0]) * SECONDS[pairs["train_time"][1]] if "train_time" in pairs else None
        if "val_bpb" in pairs and "val_loss" in pairs:
            self.run.scores.append((step, number(pairs["val_loss"][0]), number(pairs["val_bpb"][0]), seconds))
        elif "train_loss" in pairs:
            self.run.losses.append((step, number(pairs["train_loss"][0]), seconds))
        if step and seconds is not None:
            self.run.steps, self.run.train_seconds = step, seconds

    def stage(self, match: re.Match) -> None:
        name = stage_name(match[1])
        if name is None or (name in self.exact and "exact" not in match[1]):
            return
        if "exact" in match[1]:
            self.exact.add(name)
        pairs = {n: number(v) * SECONDS[unit] for n, v, unit in PAIR.findall(match[4])}
        before = self.run.stages.get(name)
        seconds = pairs.get("eval_time", before.seconds if before else None)
        self.run.stages[name] = Stage(number(match[2]), number(match[3]), seconds)

    def size(self, what: str, form: str, count: int) -> None:
        """Keeps the last total, since records first print that of the unquantized model."""
        if what.startswith("Code"):
            if "uncompressed" not in form:
                self.run.code_bytes = count
        elif what.startswith("Total"):
            self.run.artifact_bytes = count
        else:
            self.run.model_bytes = count

    def other(self, line: str) -> None:
        run = self.run
        if match := OURS["artifact"].match(line):
            run.artifact_bytes, run.code_bytes, run.model_bytes = (int(x) for x in match.groups())
        elif match := OURS["read back"].match(line):
            run.targets, run.val_bytes = int(match[1]), int(match[2])
        elif match := OURS["trained"].match(line):
            run.steps, run.parameters = int(match[1]), int(match[2])
        elif match := OURS["seconds"].match(line):
            run.seconds = {n: float(s) for n, s in (part.rsplit(" ", 1) for part in match[1].split(", "))}
        elif match := OURS["folder"].match(line):
            run.hardware = match[1]
            run.versions = dict(re.findall(r"'(\w+)': '([^']*)'", match[2]))
        elif match := OURS["attention"].match(line):
            run.attention = match[1]
        elif match := OURS["shared"].match(line):
            run.shared_documents = int(match[1])
        elif match := OURS["causal"].match(line):
            run.strictly_causal = match[1] == "yes"
        else:
            self.records(line)

    def records(self, line: str) -> None:
        """Lines that only logs of public records have."""
        run = self.run
        if match := re.match(r"^stopping_early: .*train_time:\s*([\d.]+)ms.*step:\s*(\d+)/", line):
            run.train_seconds, run.steps = float(match[1]) / 1000, int(match[2])
        elif match := re.match(r"^val_loader:.*tokens:\s*(\d+)|^val_tokens:\s*(\d+)", line):
            run.val_tokens = int(match[1] or match[2])
        elif match := re.match(r"^total_eval_time:\s*([\d.]+)(ms|s)", line):
            run.eval_seconds = float(match[1]) * SECONDS[match[2]]
        elif match := re.match(r"^model_params:\s*(\d+)", line):
            run.parameters = int(match[1])
        elif match := re.match(r"^ {0,4}(\w+): ?([^\s:]\S*)$", line):
            run.settings.setdefault(match[1].lower(), match[2])
        if match := re.match(r"^\s*seed:\s*(\d+)\b", line):
            run.seed = int(match[1])


def read_log(path: Path, run: Run | None = None) -> Run:
    """A Run from a text log, or the given Run with the log's figures added."""
    run = run or Run(path.stem, str(path))
    reader = LogReader(run)
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            reader.feed(line.rstrip("\r\n"))
    if run.seed is None and (match := re.search(r"seed_?(\d+)", path.stem)):
        run.seed = int(match[1])
    if run.eval_seconds is None and (run.seconds.keys() & set(EVALUATION_STAGES)):
        run.eval_seconds = sum(run.seconds.get(stage, 0.0) for stage in EVALUATION_STAGES)
    if run.eval_seconds is None and (times := [s.seconds for s in run.stages.values() if s.seconds]):
        run.eval_seconds = times[-1]  # the stage that counts
    return run


def read_metrics(path: Path, run: Run | None = None) -> Run:
    """A Run from metrics.jsonl, whose numbers are exact; the log's are rounded. A partial last line is ignored."""
    run = run or Run(path.parent.name or path.stem, str(path))
    losses, scores = [], []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    for row in filter(lambda r: isinstance(r, dict), rows):
        if "train_loss" in row:
            losses.append((row["step"], row["train_loss"], row.get("train_seconds")))
        elif "stage" in row:
            run.stages[row["stage"]] = Stage(row["val_loss"], row["val_bpb"])
        elif "val_bpb" in row:
            scores.append((row["step"], row["val_loss"], row["val_bpb"], row.get("train_seconds")))
    run.losses, run.scores = losses or run.losses, scores or run.scores
    done = [(row[0], row[-1]) for row in (*run.losses, *run.scores) if row[0] and row[-1]]
    if done and not run.steps:
        run.steps, run.train_seconds = max(done)
    return run


def apply_summary(run: Run, s: dict[str, Any]) -> Run:
    """The Run with the exact figures of a summary.json."""
    names = (
        "seed",
        "code_bytes",
        "model_bytes",
        "artifact_bytes",
        "steps",
        "train_seconds",
        "val_bytes",
        "parameters",
        "hardware",
        "versions",
        "sections",
        "seconds",
        "attention",
        "strictly_causal",
    )
    for name in names:
        if s.get(name) is not None:
            setattr(run, name, s[name])
    run.targets = s.get("val_tokens", run.targets)
    leaks = s.get("audit", {}).get("leak_audit", s.get("audit"))  # older summaries have one level less
    if isinstance(leaks, dict):  # "none" where the data were never audited
        run.shared_documents = leaks.get("shared_documents", run.shared_documents)
    for stage in ("pre_quant", "quantized"):
        if f"val_bpb_{stage}" in s:
            run.stages[stage] = Stage(s[f"val_loss_{stage}"], s[f"val_bpb_{stage}"])
    if s.get("val_bpb_ttt") is not None:
        run.stages["ttt"] = Stage(s["val_loss"], s["val_bpb_ttt"])
    if run.seconds.keys() & set(EVALUATION_STAGES):
        run.eval_seconds = sum(run.seconds.get(stage, 0.0) for stage in EVALUATION_STAGES)
    return run


def run_from_files(name: str, source: str, summary: Path | None, metrics: Path | None, log: Path | None) -> Run:
    """One run from those of its files that exist. Exact figures replace rounded ones."""
    run = Run(name, source)
    if log and log.is_file():
        read_log(log, run)
    if metrics and metrics.is_file():
        read_metrics(metrics, run)
    if summary and summary.is_file():
        apply_summary(run, read_json(summary))
    return run


def read_runs(path: Path) -> list[Run]:
    """The runs at a path: a run's folder, a submission's folder, a folder of such, a log or a metrics file.

    Errors: UserError if there is none.
    """
    if path.is_file():
        if path.name.endswith("summary.json"):
            return [apply_summary(Run(path.parent.name, str(path)), read_json(path))]
        return [read_metrics(path) if path.suffix == ".jsonl" else read_log(path)]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder")
    for prefix in ("", "eval_"):
        files = [path / (prefix + name) for name in RUN_FILES]
        if any(file.is_file() for file in files):
            return [run_from_files(path.name, str(path), *files)]
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name != "logs")  # its logs are the submission's
    runs = submission_runs(path) + [run for folder in folders for run in read_runs_or_none(folder)]
    if not runs:
        raise UserError(f"{path}: holds no run: no {', '.join(RUN_FILES)} and no *.log")
    return runs


def read_runs_or_none(folder: Path) -> list[Run]:
    try:
        return read_runs(folder)
    except UserError:
        return []


def submission_logs(folder: Path) -> list[Path]:
    """The text logs of a submission's folder."""
    logs = [
        p
        for p in sorted(folder.iterdir())
        if p.suffix in (".log", ".txt") and p.is_file() and not p.name.startswith(("requirements", "LICENSE"))
    ]
    inner = folder / "logs"
    return logs + (sorted(p for p in inner.iterdir() if p.suffix in (".log", ".txt")) if inner.is_dir() else [])


def submission_runs(folder: Path) -> list[Run]:
    """The runs whose logs are in a submission's folder, with exact figures where those files exist."""
    runs = []
    for log in submission_logs(folder):
        tail = log.stem.removeprefix("train_")
        run = run_from_files(
            f"{folder.name}/{log.stem}",
            str(log),
            log.with_name(f"summary_{tail}.json"),
            log.with_name(f"metrics_{tail}.jsonl"),
            log,
        )
        if run.losses or run.scores or run.stages:
            runs.append(run)
    return runs


# --------------------------------------------------------------------------------------------------------- statistics


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample deviation (n - 1); None for the deviation of a single value."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def welch(ours: list[float], baseline: list[float], margin: float = 0.0) -> float | None:
    """One-sided p-value of Welch's test that ours is lower than the baseline by more than `margin`.

    None if a side has fewer than two figures. Without any spread, the means decide.
    """
    if min(len(ours), len(baseline)) < 2:
        return None
    shifted = [value - margin for value in baseline]
    if max(np.ptp(ours), np.ptp(shifted)) < 1e-12:
        return 0.0 if ours[0] < shifted[0] else 1.0
    from scipy import stats

    result: Any = stats.ttest_ind(ours, shifted, equal_var=False, alternative="less")  # scipy's class has no types
    return float(result.pvalue)


def bpb_to_nats(bpb: float, targets: int, val_bytes: int) -> float:
    """Bits per byte as nats per token, for a validation text with this many targets and bytes."""
    return bpb * math.log(2) * val_bytes / targets


def rounded(value: float, text: str) -> bool:
    """Whether `text` could be this number, rounded to the digits of `text`."""
    text = text.replace(",", "").lower()
    mantissa, _, exponent = text.partition("e")
    digits = len(mantissa.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - digits)
    return math.isclose(value, float(text), rel_tol=1e-12, abs_tol=unit * (0.501 if digits else 0.5))


def shard_tokens(paths: Iterable[Path]) -> int:
    """Total tokens of shards, by their headers. Errors: UserError."""
    total = 0
    for path in paths:
        header = np.fromfile(path, dtype="<i4", count=256)
        if len(header) < 256 or header[0] != 20240520 or path.stat().st_size != 1024 + 2 * int(header[2]):
            raise UserError(f"{path}: is not a complete token shard")
        total += int(header[2])
    return total


def validation_shards(data: Path) -> list[Path]:
    """The validation shards of a folder, without sidecars."""
    return sorted(data.glob("fineweb_val_[0-9]*.bin"))


# -------------------------------------------------------------------------------------------------------------- tables


def table(rows: list[list[str]], markdown: bool = False) -> str:
    """A text table with aligned columns. The first row is the head; numbers are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [all(re.fullmatch(rf"({NUMBER}%?|-|)", row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    lines = []
    for place, row in enumerate(rows):
        cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
        if markdown and not place:
            lines.append(
                "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
            )
    return "\n".join(lines)


def shown(value: float | None, form: str = "") -> str:
    """A number for a table, or `-` for None."""
    return "-" if value is None else format(value, form)
