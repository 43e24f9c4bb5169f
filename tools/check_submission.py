"""Checks a submission as a reviewer would: our own folders and other people's.

    python tools/check_submission.py records/FOLDER [--data data/fineweb10B_sp8192] [--baseline other/submission.json]
    python tools/check_submission.py records/FOLDER --rerun 42

It checks files, seeds and configurations, and every number of README.md, submission.json and the logs against each
other. It compares sizes and times with the limits, and recomputes mean, deviation and p-value. It compiles the script.

The folder's code is run only with --run: then the script loads the artifacts that are there, and with --rerun it trains
a seed again. It runs with an empty environment, in a scratch folder, within limits of time, memory and output, and what
it started is ended. That is no sandbox: a hostile script can still read files and use the network, and what it says of
its artifacts is what it says.

Findings come in the order of their harm, grouped by cause, one line each, with a severity. An error is a contradiction
or a broken rule. A warning is what a reviewer should look at. A note says what could not be checked.
Exit code 0: nothing but notes; 1: errors; 3: warnings, and no error; 2: a user's error. --json prints all as JSON.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import bisect
import contextlib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import page_claims
import run_submission
import runs
import stated
import strangers
import submission
from claims import LogFigures, Written, read_figures
from confined import Limits
from runs import BUDGET_SECONDS, CAP_BYTES, Parser, Run, UserError, command_line, figures, number_type
from strangers import AMOUNT, COUNT, FLAG, INTEGER, NUMBER, OBJECT, POSITIVE, TEXT, Kind, Unreadable, visible

MARKER = "<!-- Made by tools/reproduce.py"
CORE = ("author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "bytes_total")
OURS = (
    *CORE,
    "track",
    "val_loss_std",
    "val_bpb_std",
    "seeds",
    "seed_results",
    "comparison_baseline_bpb",
    "delta_vs_leaderboard_bpb",
    "delta_vs_leaderboard_nats",
    "artifact_bytes_mean",
    "artifact_bytes_max",
    "hardware",
    "pytorch_version",
    "cuda_version",
    "attention_backend",
    "dataset",
    "technique_summary",
    "compliance",
)
# The kinds of the fields that are computed with. A row may hold more figures and texts.
SIGNIFICANCE = dict(gain_nats=NUMBER, p_value=NUMBER, p_value_margin=NUMBER, holds=FLAG)
ROW = dict(
    val_loss=NUMBER,
    val_bpb=NUMBER,
    pre_quant_val_bpb=NUMBER,
    quantized_val_bpb=NUMBER,
    ttt_val_bpb=NUMBER,
    artifact_bytes=COUNT,
    code_bytes=COUNT,
    model_bytes=COUNT,
    steps=COUNT,
    train_wallclock_ms=AMOUNT,
    step_avg_ms=AMOUNT,
    calibration_time_s=AMOUNT,
    eval_time_s=AMOUNT,
    target_tokens=POSITIVE,
    val_tokens=COUNT,
    val_bytes=POSITIVE,
    shared_documents=COUNT,
    strictly_causal=FLAG,
)
CONTENT = dict(
    {name: TEXT for name in ("author", "name", "blurb", "date", "track", "hardware", "attention_backend", "dataset")},
    github_id=TEXT,
    pytorch_version=TEXT,
    cuda_version=TEXT,
    technique_summary=TEXT,
    script_sha256=TEXT,
    val_loss=Kind(NUMBER.words, NUMBER.keep, null=False),
    val_bpb=Kind(NUMBER.words, NUMBER.keep, null=False),
    val_loss_std=AMOUNT,
    val_bpb_std=AMOUNT,
    bytes_total=Kind(COUNT.words, COUNT.keep, null=False),
    artifact_bytes_mean=AMOUNT,
    artifact_bytes_max=COUNT,
    comparison_baseline_bpb=NUMBER,
    delta_vs_leaderboard_bpb=NUMBER,
    delta_vs_leaderboard_nats=NUMBER,
    seeds=strangers.list_of(strangers.either(INTEGER, TEXT), 1000),
    seed_results=strangers.either(OBJECT, strangers.list_of(OBJECT)),
    baseline=OBJECT,
    significance=OBJECT,
    compliance=OBJECT,
    proof=OBJECT,
)
SEEDS = 100  # rows of seeds that are read
STOPPING_MS = 1000.0  # by which the end of other people's training may be late
FINDINGS = 500  # of each kind that are kept
# Settings in other people's logs that may differ between runs of one configuration, as whole words of a name.
LOCAL = re.compile(
    r"(?:.*_)?(?:seed|run_?id|runid|path|paths|dir|dirs|file|files|filename|logfile|date|time|timestamp|port|host|hostname|"
    r"url|run_name|exp_name|experiment|tag|wandb\w*|local_rank|is_main_process|master_process|device|pid|job_?id)"
    r"|rank|name|id|dataset|data|pattern"
)
# What goes wrong, the worst first.
CAUSES = dict(
    limits="a limit is broken",
    score="a score is not what its run says",
    statistics="statistics over seeds",
    configuration="the runs are not of one configuration",
    script="the script",
    figures="other figures",
    page="README.md",
    files="files",
    form="form",
)
SEVERITIES = ("error", "warning", "note")


class Finding(str):
    """A text about a folder with its severity, its cause, and its subject: findings of one subject have one reason."""

    severity: str
    cause: str
    subject: str

    def __new__(cls, text: str, severity: str, cause: str, subject: str = "") -> Finding:
        self = super().__new__(cls, text)
        self.severity, self.cause = severity, cause
        self.subject = subject or text
        return self


@dataclass
class Findings:
    """Number of comparisons, the disagreements, and notes on what could not be checked; texts of strangers included."""

    compared: int = 0
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    dropped: int = 0  # after the first FINDINGS of each severity
    cause: str = "form"  # of what is found now, unless its finder says another

    def add_finding(self, severity: str, text: str, cause: str = "", subject: str = "") -> None:
        """Keeps a finding; of very many of one severity, the first ones."""
        texts = {"error": self.errors, "warning": self.warnings, "note": self.notes}[severity]
        if len(texts) >= FINDINGS:
            self.dropped += 1
        elif (line := visible(text, 1000)) not in texts:
            texts.append(Finding(line, severity, cause or self.cause, subject))

    def error(self, text: str, cause: str = "", subject: str = "") -> None:
        self.add_finding("error", text, cause, subject)

    def warning(self, text: str, cause: str = "", subject: str = "") -> None:
        self.compared += 1
        self.add_finding("warning", text, cause, subject)

    def note(self, text: str, cause: str = "", subject: str = "") -> None:
        self.add_finding("note", text, cause, subject)

    def groups(self) -> list[list[Finding]]:
        """All findings, those of one subject together, in the order of their harm."""
        found: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in (*self.errors, *self.warnings, *self.notes):
            found.setdefault((finding.severity, finding.cause, finding.subject), []).append(finding)
        causes = list(CAUSES)
        return sorted(found.values(), key=lambda g: (SEVERITIES.index(g[0].severity), causes.index(g[0].cause)))

    def require(self, holds: bool, text: str, cause: str = "", subject: str = "") -> None:
        """Counts a check; adds the text as an error if it does not hold."""
        self.compared += 1
        if not holds:
            self.error(text, cause, subject)

    def same(self, what: str, one: Any, other: Any, tolerance: float | None = None, subject: str = "") -> None:
        """Compares two figures. A missing one is not a disagreement."""
        if one is None or other is None:
            return
        self.require(
            agree(one, other) if tolerance is None else abs(one - other) <= tolerance,
            f"{what}: {plain(one)} and {plain(other)}",
            subject=subject,
        )


def plain(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else visible(value, 80)


def agree(one: Any, other: Any) -> bool:
    """Whether two figures are equal at the precision of the one with fewer decimals, and of at least 4."""
    if isinstance(one, str) or isinstance(other, str):
        return str(one) == str(other)
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    if isinstance(one, bool) or isinstance(other, bool):
        return False
    if not (math.isfinite(one) and math.isfinite(other)):
        return False
    decimals = min(len(repr(float(x)).partition(".")[2]) if "e" not in repr(float(x)) else 16 for x in (one, other))
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=0.501 * 10.0 ** -max(4, decimals))


@dataclass
class Seed:
    """One seed's figures by source (row of submission.json, log, metrics, summary), and its settings."""

    seed: int
    row: dict[str, Any] = field(default_factory=dict)
    log: Run | None = None
    metrics: Run | None = None
    summary: Run | None = None
    config: dict[str, Any] | None = None
    others: list[Run] = field(default_factory=list)  # further logs of it

    @property
    def sources(self) -> Iterator[tuple[str, Run]]:
        return (
            (name, run)
            for name, run in (("log", self.log), ("metrics", self.metrics), ("summary", self.summary))
            if run
        )


@dataclass
class Folder:
    """The content of a submission's files: the fields of submission.json of the right kind, and all of it."""

    path: Path
    content: dict[str, Any]
    everything: dict[str, Any]
    page: str
    seeds: dict[int, Seed]
    logs: list[Run]
    figures: list[tuple[int | None, LogFigures]] = field(default_factory=list)  # of each log, with its seed
    named: list[tuple[str, int | None, int]] = field(default_factory=list)  # logs, the seeds of name and of text
    scripts: dict[str, int] = field(default_factory=dict)  # bytes of the Python files
    weights: dict[str, int] = field(default_factory=dict)  # bytes of files that may be models
    evidence: stated.Evidence | None = None

    @property
    def ours(self) -> bool:
        """Whether tools/reproduce.py wrote it. If so, every figure must be found in its files."""
        return self.page.startswith(MARKER)

    @property
    def exact(self) -> bool:
        """Whether submission.json has the form that our tools write, so that its figures are compared one by one."""
        return self.ours or {*OURS, "baseline", "significance"} <= set(self.everything)


# ------------------------------------------------------------------------------------------------------------- reading


def read_folder(path: Path, findings: Findings) -> Folder:
    """Reads the files of a folder. A missing or broken one is a finding."""
    if not os.path.isdir(path):
        raise UserError(f"{path}: must be a submission's folder")
    findings.cause = "files"
    for name in ("README.md", "submission.json", "train_gpt.py"):
        findings.require(strangers.is_there(path / name), f"{name}: is missing")
    everything: dict[str, Any] = {}
    page = ""
    problems: list[str] = []
    if strangers.is_there(path / "submission.json"):
        with passing_over(findings, path):
            everything = strangers.read_object(path / "submission.json", path, problems, Written)
    for text in problems:
        findings.error(f"submission.json: {text}")
    if strangers.is_there(path / "README.md"):
        with passing_over(findings, path):
            page = strangers.read_text(path / "README.md", "page", path)
    folder = Folder(path, {}, everything, page, {}, [])
    findings.cause = "form"
    wrong: list[str] = []
    folder.content = strangers.checked(everything, CONTENT, "submission.json", wrong) if everything else {}
    for text in wrong:
        if folder.exact or re.match(r"submission.json: (val_bpb|val_loss|bytes_total) ", text):
            findings.error(text)
    (read_rows if folder.exact else read_any_rows)(folder, findings)
    findings.cause = "files"
    read_logs(folder, findings)
    check_entries(folder, findings)
    read_sizes(folder)
    return folder


@contextlib.contextmanager
def passing_over(findings: Findings, folder: Path) -> Iterator[None]:
    """Makes a file of a folder that cannot be read a finding."""
    try:
        yield
    except Unreadable as error:
        findings.error(f"{error.name_in(folder)}: {error.reason}")


def check_entries(folder: Folder, findings: Findings) -> None:
    """Names what a folder holds under the names that are read, and is no plain file; other such entries in notes."""
    wanted = re.compile(r".*\.(log|txt|jsonl?|md|py|pgolf)|logs")
    problems: list[str] = []
    places = [folder.path, folder.path / "logs"]
    for place in places:
        if not os.path.isdir(place) or (place.is_symlink() and place != folder.path):
            continue
        with passing_over(findings, folder.path):
            for path in strangers.entries(place, problems):
                try:
                    reason = strangers.wrong_kind(path, folder.path)
                except Unreadable as error:
                    reason = error.reason
                if reason and not (reason == "is a folder" and not re.fullmatch(r".+\..+", path.name)):
                    name = path.relative_to(folder.path)
                    (findings.error if wanted.fullmatch(path.name) else findings.note)(f"{name}: {reason}")
    for text in problems:
        findings.note(text)


def read_rows(folder: Folder, findings: Findings) -> None:
    """Reads the rows of seed_results in submission.json, which may be a list or keyed by seed."""
    rows = folder.content.get("seed_results", {})
    pairs = list(rows.items()) if isinstance(rows, dict) else [(row.get("seed"), row) for row in rows]
    if len(pairs) > SEEDS:
        findings.error(f"submission.json: seed_results has {len(pairs)} rows; those after {SEEDS} are passed over")
    for name, row in pairs[:SEEDS]:
        number = name if isinstance(name, int) and not isinstance(name, bool) else strangers.whole_number(str(name))
        if number is None or number < 0 or not isinstance(row, dict):
            findings.error(f"submission.json: seed_results {visible(repr(name), 40)} is no seed with its figures")
            continue
        if number in folder.seeds:
            findings.error(f"submission.json: seed_results has seed {number} twice")
            continue
        wrong: list[str] = []
        figures = strangers.checked(row, ROW, f"submission.json: seed_results {number}", wrong)
        for text in wrong:
            findings.error(text)
        others = {
            key: row[key] for key in row if key not in ROW and (strangers.is_number(row[key]) or TEXT.keep(row[key]))
        }
        folder.seeds[number] = Seed(number, others | figures)
    if not folder.seeds:
        findings.note("submission.json: has no seed_results; the logs alone give the seeds' figures")


def read_any_rows(folder: Folder, findings: Findings) -> None:
    """Reads the figures of seeds wherever somebody else's submission.json keeps them."""
    rows = stated.rows_of(folder.everything)
    if len(rows) > SEEDS:
        findings.error(f"submission.json: has figures of {len(rows)} seeds; those after {SEEDS} are passed over")
    for number in list(rows)[:SEEDS]:
        wrong: list[str] = []
        folder.seeds[number] = Seed(number, strangers.checked(rows[number], ROW, "", wrong))
    if not folder.seeds:
        findings.note("submission.json: has no figures of seeds; the logs alone give them")


def read_sizes(folder: Folder) -> None:
    """The bytes of the folder's Python files and of its models."""
    with contextlib.suppress(Unreadable):
        for path in strangers.entries(folder.path):
            kept = folder.scripts if path.suffix == ".py" else folder.weights
            if path.suffix in (".py", ".pgolf", ".ptz", ".pt", ".bin", ".br", ".xz", ".zst") and len(kept) < SEEDS:
                with contextlib.suppress(Unreadable):
                    kept[path.name] = strangers.file_size(path, folder.path)


# Folders of runs that a submission does not claim.
ASIDE = re.compile(
    r"ablat|sweep|supersed|old|baseline|archive|deprecat|invalid|fail|debug|smoke|dry|checkpoints|wd_", re.I
)


def nested_logs(folder: Path, problems: list[str], levels: int = 3) -> list[Path]:
    """The logs in folders within a submission's folder, other than `logs`; links are passed over."""
    found: list[Path] = []
    for path in strangers.entries(folder, problems):
        if path.is_symlink() or not os.path.isdir(path) or path.name.startswith("."):
            continue
        if levels and not ASIDE.search(path.name) and len(found) < SEEDS:
            inner = strangers.entries(path, problems)
            found += [p for p in inner if runs.is_log(p) and not p.is_symlink() and not os.path.isdir(p)]
            found += nested_logs(path, problems, levels - 1)
    return found


def read_logs(folder: Folder, findings: Findings) -> None:
    """Reads the logs and the files beside them, and assigns each to its seed."""
    contents: dict[str, list[str]] = {}
    logs: list[Path] = []
    problems: list[str] = []
    with passing_over(findings, folder.path):
        logs = runs.submission_logs(folder.path)
        if not folder.exact:
            logs += [path for path in nested_logs(folder.path, problems) if path not in logs]
    if len(logs) > SEEDS:
        findings.error(f"logs: there are {len(logs)}; those after {SEEDS} are passed over")
    for log in logs[:SEEDS]:
        with passing_over(findings, folder.path):
            run = runs.read_log(log, inside=folder.path)
            told = None if folder.ours else read_figures(log, folder.path)
            if not (run.stages or run.losses or run.scores or (told and told.of("bpb"))):
                continue
            if run.seed is None and told:
                run.seed = told.seed
            folder.logs.append(run)
            contents.setdefault(strangers.file_sha256(log, folder.path), []).append(log.name)
            if not folder.exact:
                name_seed(folder, log, run)
            if told:
                folder.figures.append((run.seed, told))
            read_log_of_seed(folder, findings, log, run)
    check_names(folder, findings)
    if not folder.exact:
        settle_seeds(folder, findings)
    findings.require(bool(folder.logs), "logs: there is no log of a run (*.log, *.txt, logs/)")
    for several in contents.values():
        seeds = {seed for name in several if (seed := runs.seed_in_name(Path(name).stem)) is not None}
        same = len(several) > 1 and (folder.exact or len(seeds) > 1)
        findings.require(not same, "logs: two of them are the same file", "score")


def read_log_of_seed(folder: Folder, findings: Findings, log: Path, run: Run) -> None:
    """Assigns a log to its seed, with the metrics, the summary and the settings beside it."""
    for text in run.problems:
        findings.error(f"{log.name}: {text}")
    named = runs.seed_in_name(log.stem)
    if run.seed is None and not folder.exact and len(folder.seeds) == 1 and not any(folder.logs[:-1]):
        run.seed = next(iter(folder.seeds))
    if run.seed is None:
        findings.note(f"{log.name}: does not say its seed")
        return
    folder.named.append((log.name, named, run.seed))
    seed = folder.seeds.setdefault(run.seed, Seed(run.seed))
    findings.require(seed.log is None or not folder.exact, f"{log.name}: another log of seed {run.seed} is there too")
    if seed.log is not None and not folder.exact:
        seed.others.append(run)
        return
    seed.log, tail = run, log.stem.removeprefix("train_")
    metrics, summary, config = (
        log.with_name(f"{kind}_{tail}{end}")
        for kind, end in (("metrics", ".jsonl"), ("summary", ".json"), ("config", ".json"))
    )
    if strangers.is_there(metrics):
        with passing_over(findings, folder.path):
            seed.metrics = runs.read_metrics(metrics, Run(log.stem, str(metrics)), folder.path)
    if strangers.is_there(summary):
        with passing_over(findings, folder.path):
            seed.summary = runs.read_summary(summary, Run(log.stem, str(summary)), folder.path)
    if strangers.is_there(config):
        with passing_over(findings, folder.path):
            seed.config = read_config(config, folder.path, findings)
    if seed.summary and seed.summary.resumed:
        findings.note(f"seed {run.seed}: its run was cut off and went on, {seed.summary.resumed} times")
    for _, source in seed.sources:
        for text in source.problems:
            findings.error(text if source is not run else f"{log.name}: {text}")


def name_seed(folder: Folder, log: Path, run: Run) -> None:
    """The seed of a log that does not say it: that of its name in other forms, or of the folders above it."""
    for name in (log.stem, *(part.name for part in log.parents if part.is_relative_to(folder.path))):
        if run.seed is None:
            run.seed = stated.claims.seed_of(name)


def check_names(folder: Folder, findings: Findings) -> None:
    """Checks that each log is of the seed in its name; of several, seed1, seed2, ... may count them."""
    named = [(name, said, seed) for name, said, seed in folder.named if said is not None]
    numbers = sorted({said for _, said, _ in named})
    counted = len(named) > 1 and numbers in ([*range(len(numbers))], [*range(1, len(numbers) + 1)])
    if counted and not folder.exact and not any(said == seed for _, said, seed in named):
        findings.note("logs: the numbers in their names are not their seeds")
        return
    for name, said, seed in named:
        findings.require(said == seed, f"{name}: seed in its name and in its text: {said} and {seed}", "score")


def settle_seeds(folder: Folder, findings: Findings) -> None:
    """Of several logs of a seed, the one whose score is stated counts."""
    for seed in folder.seeds.values():
        claimed = seed.row.get("val_bpb")
        for run in [seed.log, *seed.others] if isinstance(claimed, float) else ():
            if run and run.final and seed.log and abs(run.final.bpb - claimed) < 1e-4:
                seed.others = [other for other in [seed.log, *seed.others] if other is not run]
                seed.log = run
                break
        if seed.others:
            names = ", ".join(other.name for other in seed.others)
            findings.note(f"seed {seed.seed}: has further logs: {names}")


def read_config(path: Path, inside: Path, findings: Findings) -> dict[str, Any]:
    """The settings of a config.json: a number, a text or a bool each. Errors: Unreadable."""
    problems: list[str] = []
    content = strangers.read_object(path, inside, problems)
    wrong = [name for name, value in content.items() if not submission.is_setting(value)]
    problems += [f"{visible(name, 40)} must be a number, a text, true or false" for name in wrong[:5]]
    for text in problems:
        findings.error(f"{path.name}: {text}")
    return {name: value for name, value in content.items() if submission.is_setting(value)}


# ------------------------------------------------------------------------------------------------- seeds and settings


def check_fields(folder: Folder, findings: Findings) -> None:
    if not folder.exact and folder.everything:
        scores = [x for x in stated.claims.leaves(folder.everything, []) if x.meaning.kind == "bpb"]
        findings.require(any(not x.meaning.foreign for x in scores), "submission.json: has no val_bpb")
        absent = [name for name in CORE if name not in folder.everything]
        if absent:
            findings.note(f"submission.json: has no {', '.join(absent)}")
    for name in OURS if folder.exact else ():
        findings.require(name in folder.everything, f"submission.json: has no {name}")
    if folder.ours:
        findings.require(strangers.is_there(folder.path / "requirements.txt"), "requirements.txt: is missing")


def check_seeds(folder: Folder, findings: Findings) -> None:
    """Checks that seeds are distinct and as many as claimed, each with a row and a log."""
    listed = folder.content.get("seeds")
    if isinstance(listed, list):
        findings.require(len(set(map(str, listed))) == len(listed), f"submission.json: seeds {listed} are not distinct")
        rows = [seed for seed, s in folder.seeds.items() if s.row]
        if rows:
            findings.require(
                sorted(map(str, listed)) == sorted(map(str, rows)),
                f"submission.json: seeds {listed} and seed_results {rows}",
            )
    with_rows = any(s.row for s in folder.seeds.values())
    for number, seed in folder.seeds.items():
        findings.require(seed.log is not None, f"seed {number}: submission.json has it, and no log is there")
        if with_rows and not seed.row:
            text = f"seed {number}: a log has it, and seed_results does not"
            findings.add_finding("error" if folder.exact else "warning", text)
        for source, run in seed.sources:
            findings.same(f"seed {number}: the {source} says seed", run.seed, number)
        if seed.config:
            findings.same(f"seed {number}: its config says seed", seed.config.get("seed"), number)
    if len(folder.seeds) < 3:
        findings.note(f"{len(folder.seeds)} seed(s): a record needs three or more")
    for number in claimed_without(folder):
        findings.error(f"seed {number}: submission.json lists it, and neither a figure nor a log is there")
    scores = Counter(s.row["val_bpb"] for s in folder.seeds.values() if isinstance(s.row.get("val_bpb"), float))
    if not folder.exact:  # rounded scores may be the same
        scores = {value: times for value, times in scores.items() if len(f"{value:.10g}".partition(".")[2]) >= 6}
    for value, times in scores.items():
        findings.require(times == 1, f"submission.json: {times} seeds have the same val_bpb {value}")


def claimed_without(folder: Folder) -> list[int]:
    """The listed seeds that have neither figures nor a log, where other seeds have one."""
    listed = [] if folder.exact else stated.claims.stated_seeds(folder.everything)
    return [number for number in listed if number not in folder.seeds] if folder.seeds else []


def check_configuration(folder: Folder, findings: Findings) -> None:
    """Checks that all seeds have the same settings, by their config files or by the settings in their logs."""
    seeds = list(folder.seeds.values())
    if not folder.exact and not all(s.config for s in seeds):
        check_logged_settings(folder, findings)
        return
    configs = [s.config for s in seeds if s.config]
    ignored = submission.PRIVATE
    if len(configs) != len(seeds):
        logged = [(s, s.log) for s in seeds if s.log]
        seeds = [seed for seed, _ in logged]
        configs = [{k: v for k, v in log.settings.items() if not LOCAL.fullmatch(k)} for _, log in logged]
        common = set.intersection(*map(set, configs)) if configs else set()
        configs = [{k: v for k, v in c.items() if k in common} for c in configs]
    for seed, config in zip(seeds[1:], configs[1:], strict=True):
        for name in sorted(set(config) | set(configs[0])):
            if name not in ignored:
                findings.require(
                    config.get(name) == configs[0].get(name),
                    f"configuration: {name.upper()} is "
                    f"{configs[0].get(name)} on seed {seeds[0].seed} and {config.get(name)} on "
                    f"{seed.seed}",
                )
    same_of_all(folder, findings)


def same_of_all(folder: Folder, findings: Findings) -> None:
    """Checks that machine, model and script are the same for all seeds."""
    for what in ("hardware", "attention", "parameters", "code_bytes"):
        values = {getattr(run, what) for s in folder.seeds.values() for _, run in s.sources} - {None}
        findings.require(len(values) < 2, f"configuration: {what} differs: {', '.join(sorted(map(str, values)))}")


def check_logged_settings(folder: Folder, findings: Findings) -> None:
    """Compares the settings that other people's logs print; one that a single log prints is another script's."""
    main = {run.name for seed in folder.seeds.values() if (run := seed.log)}
    logs = [(seed, log) for seed, log in folder.figures if seed is not None and Path(log.name).stem in main]
    order = list(folder.seeds)
    logs = sorted(((seed, log) for seed, log in logs if log.settings), key=lambda pair: order.index(pair[0]))
    same_of_all(folder, findings)
    if not logs:
        findings.note("configuration: the logs print no settings, so that it is the same cannot be checked")
        return
    names = {name for _, log in logs for name in log.settings if not LOCAL.fullmatch(name)}
    blocks = set().union(*(log.block for _, log in logs))
    for name in sorted(names):
        values: dict[str, list[int]] = {}
        for seed, log in logs:
            if name in log.settings:
                values.setdefault(log.settings[name], []).append(seed)
        without = [seed for seed, log in logs if name not in log.settings and (log.block or not blocks)]
        if blocks and name not in blocks:
            without = []  # a line that only some logs print
        what = f"configuration: {name.upper()}"
        if len(values) > 1:
            said = ", ".join(f"{visible(v, 60)} on seed {' and '.join(map(str, s[:5]))}" for v, s in values.items())
            findings.error(f"{what} is {said}")
        findings.require(
            not without or (not blocks and len(logs) > 2 * len(without)),
            f"{what} is printed by the log of seed {', '.join(map(str, next(iter(values.values()))[:5]))} alone"
            if len(logs) - len(without) == 1
            else f"{what} is not printed by the log of seed {', '.join(map(str, without[:5]))}, and by others is",
        )


# ------------------------------------------------------------------------------------------------------------ figures


def check_sources(folder: Folder, findings: Findings) -> None:
    """Compares each seed's row, log, metrics and summary with each other."""
    for number, seed in folder.seeds.items():
        steps = [run.steps for _, run in seed.sources if run.steps]
        tolerances = dict(train_wallclock_ms=1.0, step_avg_ms=0.01 + 1 / min(steps, default=1))  # logs have whole ms
        tolerances["calibration_time_s"] = 0.11  # and tenths of a second of each stage
        sources = [("submission.json", seed.row), *((name, figures(run)) for name, run in seed.sources)]
        sources = sources if folder.exact else sources[1:]  # tools/stated.py compares what is stated
        for place, (name, values) in enumerate(sources):
            for other, others in sources[place + 1 :]:
                for key in sorted(figures(Run("", "")), key=lambda name: name != "val_bpb"):  # the worst first
                    if not any(isinstance(x.get(key), str) for x in (values, others)):
                        findings.same(
                            f"seed {number}: {key} in {name} and {other}",
                            values.get(key),
                            others.get(key),
                            tolerances.get(key),
                            subject=f"seed {number}: {name} and {other}",
                        )
        if not folder.exact:
            continue
        spent = seed.row.get("eval_time_s")
        known = [
            x for _, run in seed.sources for x in (run.eval_seconds, *(s.seconds for s in run.stages.values())) if x
        ]
        if isinstance(spent, (int, float)) and known:
            findings.require(
                any(abs(spent - x) <= 0.2 + 1e-3 * x for x in known),
                f"seed {number}: eval_time_s {spent} in submission.json and {max(known):.3f} in its logs",
            )
        check_curve(number, seed, findings)


def check_curve(number: int, seed: Seed, findings: Findings) -> None:
    """Compares the training lines of the log with those of the metrics, step by step."""
    if not (seed.log and seed.metrics):
        return
    for what in ("losses", "scores"):
        mine, theirs = ({row[0]: row[1:-1] for row in getattr(run, what)} for run in (seed.log, seed.metrics))
        findings.require(set(mine) == set(theirs), f"seed {number}: log and metrics have other steps ({what})")
        for step in sorted(set(mine) & set(theirs)):
            for one, other in zip(mine[step], theirs[step], strict=True):
                findings.same(f"seed {number}: step {step} in log and metrics", one, other)


def check_row(folder: Folder, findings: Findings) -> None:
    """Checks that the figures of each row of our own are consistent."""
    if not folder.exact:
        return
    for number, seed in folder.seeds.items():
        r = {name: value for name, value in seed.row.items() if name in ROW}
        if {"code_bytes", "model_bytes", "artifact_bytes"} <= set(r):
            findings.same(
                f"seed {number}: code_bytes + model_bytes and artifact_bytes",
                r["code_bytes"] + r["model_bytes"],
                r["artifact_bytes"],
            )
        if {"steps", "step_avg_ms", "train_wallclock_ms"} <= set(r):
            findings.same(
                f"seed {number}: steps x step_avg_ms and train_wallclock_ms",
                r["steps"] * r["step_avg_ms"],
                r["train_wallclock_ms"],
                max(1.0, 0.006 * r["steps"]),
            )
        if {"val_loss", "val_bpb", "target_tokens", "val_bytes"} <= set(r):
            findings.same(
                f"seed {number}: val_bpb, and val_loss in bits per byte",
                r["val_bpb"],
                r["val_loss"] / math.log(2) * r["target_tokens"] / r["val_bytes"],
            )
        if {"target_tokens", "val_tokens"} <= set(r):
            findings.require(
                r["target_tokens"] == r["val_tokens"] - 1,
                f"seed {number}: target_tokens {r['target_tokens']} is not one less than val_tokens {r['val_tokens']}",
            )


def check_statistics(folder: Folder, findings: Findings) -> None:
    """Recomputes means, sample deviations and sizes."""
    if not folder.exact:
        return  # tools/stated.py has them
    s, rows = folder.content, [seed.row for seed in folder.seeds.values() if seed.row]
    for key in ("val_bpb", "val_loss"):
        values = [r[key] for r in rows if isinstance(r.get(key), (int, float))]
        if not values or len(values) != len(rows):
            continue
        mean, deviation = runs.mean_and_deviation(values)
        findings.same(f"submission.json: {key} and the seeds' mean", s.get(key), mean)
        stated = s.get(f"{key}_std")
        if isinstance(stated, (int, float)) and deviation is not None and not agree(stated, deviation):
            why = " (it is the population's)" if agree(stated, float(np.std(values))) else ""
            findings.error(
                f"submission.json: {key}_std {plain(stated)} and the seeds' sample deviation {plain(deviation)}{why}"
            )
    sizes = [r["artifact_bytes"] for r in rows if isinstance(r.get("artifact_bytes"), int)]
    if len(sizes) == len(rows) and sizes:
        findings.same("submission.json: artifact_bytes_max and the largest", s.get("artifact_bytes_max"), max(sizes))
        findings.same(
            "submission.json: artifact_bytes_mean and the mean",
            s.get("artifact_bytes_mean"),
            sum(sizes) / len(sizes),
            0.51,
        )
        if isinstance(s.get("bytes_total"), int):
            findings.require(
                s["bytes_total"] in ([max(sizes)] if folder.exact else sizes),
                f"submission.json: bytes_total {s['bytes_total']} and artifacts of {sizes}",
            )


def check_comparison(folder: Folder, findings: Findings, baseline: dict[str, float] | None) -> None:
    """Recomputes the differences to the baseline and the test."""
    s, rows = folder.content, [seed.row for seed in folder.seeds.values() if seed.row]
    wrong: list[str] = []
    bpb = strangers.map_of(NUMBER, SEEDS)
    named = strangers.checked(s.get("baseline", {}), dict(val_bpb=bpb), "submission.json: baseline", wrong)
    claimed = strangers.checked(s.get("significance", {}), SIGNIFICANCE, "submission.json: significance", wrong)
    for text in wrong if folder.exact else ():
        findings.error(text)
    theirs = baseline or named.get("val_bpb")
    if baseline and "val_bpb" in named:
        findings.require(
            sorted(baseline.values()) == sorted(named["val_bpb"].values()),
            "submission.json: baseline's figures are not those of --baseline",
        )
    if folder.exact and s.get("comparison_baseline_bpb") is not None:
        check_stated_baseline(findings, s, theirs)
    ours = [r["val_bpb"] for r in rows if "val_bpb" in r]
    if not theirs or not ours or not {"val_bytes", "target_tokens"} <= set(rows[0]):
        findings.note(
            "significance: not recomputed: it needs the baseline's figures (--baseline), val_bytes and target_tokens"
        )
        return
    per_bpb = runs.bpb_to_nats(1.0, rows[0]["target_tokens"], rows[0]["val_bytes"])
    test = submission.significance(ours, list(theirs.values()), per_bpb)
    findings.same(
        "submission.json: delta_vs_leaderboard_nats and the difference",
        s.get("delta_vs_leaderboard_nats"),
        -test["gain_nats"],
    )
    for name in SIGNIFICANCE if "significance" in s and (folder.exact or claimed) else ():
        one: Any = claimed.get(name)
        other = test[name]
        close = (
            one == other if None in (one, other) or isinstance(other, bool) else math.isclose(one, other, rel_tol=1e-3)
        )
        findings.require(close, f"submission.json: significance {name} {one}, recomputed {other}")
    findings.note(
        f"significance: better by {test['gain_nats']:.5f} nats per token; p = {test['p_value']} for better at all, "
        f"p = {test['p_value_margin']} for better by {test['margin_nats']}; the rule "
        f"{'holds' if test['holds'] else 'does not hold'}"
    )


def check_stated_baseline(findings: Findings, s: dict[str, Any], theirs: dict[str, float] | None) -> None:
    """Compares the stated mean of the baseline, and the difference to it, with the figures."""
    mean = sum(theirs.values()) / len(theirs) if theirs else None
    findings.same(
        "submission.json: comparison_baseline_bpb and the baseline's mean", s["comparison_baseline_bpb"], mean
    )
    findings.same(
        "submission.json: delta_vs_leaderboard_bpb and the difference",
        s.get("delta_vs_leaderboard_bpb"),
        s.get("val_bpb", math.nan) - s["comparison_baseline_bpb"],
    )


# ------------------------------------------------------------------------------------------------------- data, limits


def check_data(folder: Folder, findings: Findings, data: Path | None) -> None:
    """Checks that all seeds have one validation set, and that it is the one of --data."""
    stated_tokens = {seed.row["val_tokens"] for seed in folder.seeds.values() if "val_tokens" in seed.row}
    tokens = {run.val_tokens for run in folder.logs} - {None}
    if folder.exact or not tokens:
        tokens |= stated_tokens
    else:  # the first token of a stream is no target
        tokens |= {count for count in stated_tokens if count + 1 not in tokens}
    findings.require(len(tokens) < 2, f"val_tokens: {sorted(filter(None, tokens))} are not one validation set's")
    shards = {int(f.value) for _, log in folder.figures for f in log.of("shards") if f.label.endswith("train_shards")}
    findings.require(
        len(shards) < 2, f"train_shards: the logs have {' and '.join(map(str, sorted(shards)))}", "configuration"
    )
    if not tokens:
        findings.note("val_tokens: neither submission.json nor the logs say how many tokens were scored")
    if data is None:
        findings.note("val_tokens: not compared with the validation set; --data FOLDER does that")
        return
    shards = runs.validation_shards(data)
    if not shards:
        raise UserError(f"--data {data}: holds no fineweb_val_*.bin")
    found = runs.shard_tokens(shards)
    for value in tokens:
        findings.require(value == found, f"val_tokens: {value}, and the validation set in {data} has {found}")
    expected = submission.manifest(data).get("val_bytes")
    for number, seed in folder.seeds.items():
        findings.same(f"seed {number}: val_bytes and the manifest's in {data}", seed.row.get("val_bytes"), expected)
    if folder.exact and "dataset" in folder.content:
        texts = folder.content["dataset"], submission.dataset(data)["text"]
        findings.same(
            "submission.json: dataset, and the one of --data",  # the names of folders may differ
            *(text.partition(": ")[2] for text in texts),
        )


def largest(rows: list[dict[str, Any]], key: str) -> float | None:
    """The largest number that a row holds under a key; None where none does."""
    return max((row[key] for row in rows if isinstance(row.get(key), (int, float))), default=None)


def artifact_size(folder: Folder, seed: Seed) -> tuple[float | None, str]:
    """The largest size of a seed's artifact that its sources tell, and how: as a total, or as model and code."""
    known = [seed.row, *(figures(run) for _, run in seed.sources)]
    size, model = largest(known, "artifact_bytes"), largest(known, "model_bytes")
    code = largest(known, "code_bytes")
    content = folder.content if folder.exact else folder.everything
    if not folder.exact:
        total = content.get("bytes_total", content.get("artifact_bytes"))
        size = size if size is not None or not strangers.is_number(total) else float(total or 0)
        stated_code = content.get("bytes_code", content.get("code_bytes"))
        code = code if code is not None or not strangers.is_number(stated_code) else float(stated_code or 0)
        code = code if code is not None else folder.scripts.get("train_gpt.py")
    if model is None or code is None or model > 2 * CAP_BYTES or (size is not None and size >= model + code):
        return size, ""
    return model + code, " with its code"


def longest_evaluation(run: Run) -> float:
    """The seconds of a run's evaluation, which are no less than those of any score of the quantized model."""
    counted = [stage.seconds or 0.0 for name, stage in run.stages.items() if name in ("quantized", "sliding", "ttt")]
    return max([run.eval_seconds or 0.0, *counted])


def check_limits(folder: Folder, findings: Findings, cap: int) -> None:
    """Checks bytes and seconds. The last step of a training may end after the time limit; what follows may not.

    Calibration and tuning read training text, so their seconds count as training's.
    """
    for number, seed in folder.seeds.items():
        known = [seed.row, *(figures(run) for _, run in seed.sources)]
        size, how = artifact_size(folder, seed)
        train, step = largest(known, "train_wallclock_ms"), largest(known, "step_avg_ms")
        evaluation = max([seed.row.get("eval_time_s") or 0, *(longest_evaluation(run) for _, run in seed.sources)])
        after = (runs.calibration_seconds(seed.summary) or 0.0) if seed.summary else 0.0
        if size is None:
            findings.note(f"seed {number}: no source has the bytes of its artifact")
        else:
            findings.require(size <= cap, f"seed {number}: its artifact of {size:.0f} bytes{how} is over {cap}")
        if train is None:
            findings.note(f"seed {number}: no source has its seconds of training")
        else:
            spent = train / 1000 + after
            last = (step or 0.0) if folder.exact else max(3 * (step or 0.0), STOPPING_MS)  # ranks agree on the stop
            findings.require(
                submission.within_limit(spent, last),
                f"seed {number}: {spent:.1f} s of training, calibration and tuning are over {BUDGET_SECONDS:.0f}",
            )
        findings.require(
            evaluation <= BUDGET_SECONDS,
            f"seed {number}: {evaluation:.1f} s of evaluation are over {BUDGET_SECONDS:.0f}",
        )
        if not evaluation:
            findings.note(f"seed {number}: no source has its seconds of evaluation")
    if not folder.exact and not folder.seeds:
        check_total(folder, findings, cap)


def check_total(folder: Folder, findings: Findings, cap: int) -> None:
    """Checks the total that a submission.json states where no seed is known."""
    for leaf in stated.claims.leaves(folder.everything, []):
        m = leaf.meaning
        if m.kind == "bytes" and m.part == "total" and not (m.foreign or m.difference or m.statistic == "std"):
            size = leaf.value * m.units[0]
            findings.require(size <= cap, f"submission.json: {leaf.name} of {size:.0f} bytes is over {cap}")


def check_claims(folder: Folder, findings: Findings) -> None:
    """Checks the claims about hardware and versions, and about the rules."""
    s = folder.content
    for number, seed in folder.seeds.items():
        for source, run in seed.sources:
            for key, value in (
                ("hardware", run.hardware),
                ("attention_backend", run.attention),
                ("pytorch_version", run.versions.get("torch")),
                ("cuda_version", run.versions.get("cuda")),
            ):
                if key in s and value and folder.exact:
                    findings.require(
                        str(value) in str(s[key]),
                        f"submission.json: {key} {s[key]!r}, and the {source} of seed {number} says {value!r}",
                    )
    hardware = " ".join(str(run.hardware or "") for run in folder.logs)
    if folder.exact and hardware.strip() and re.search(r"10.?min", str(s.get("track", ""))):
        findings.require(
            "H100" in hardware and "8 x" in hardware,
            f"submission.json: track {s['track']!r} is for 8 H100s, and the logs say {hardware.strip()}",
        )
    rows = [seed.row for seed in folder.seeds.values()]
    if folder.exact and "compliance" in s and all(set(submission.COMPLIANCE_NEEDS) <= set(r) for r in rows):
        test = strangers.checked(s.get("significance", {}), SIGNIFICANCE, "", [])  # named by check_comparison
        for name, value in submission.compliance(rows, test and dict(test, holds=test.get("holds"))).items():
            findings.require(
                s["compliance"].get(name) == value,
                f"submission.json: compliance {name} is {s['compliance'].get(name)}, and must be {value}",
            )


def check_proof(folder: Folder, findings: Findings) -> None:
    """Checks that a proof is of this folder's script and artifact, and that the page says what it found."""
    if not folder.ours or "proof" not in folder.everything:
        return
    if "proof" not in folder.content:
        if folder.everything["proof"] is None:
            findings.note("proof: none was made; tools/prove.py makes one")
        return
    wrong: list[str] = []
    proof = strangers.checked(folder.content["proof"], submission.PROOF, "submission.json: proof", wrong)
    for text in wrong:
        findings.error(text)
    seed = next(iter(folder.seeds), None)
    for name, file in (("script_sha256", "train_gpt.py"), ("artifact_sha256", f"model_seed{seed}.pgolf")):
        if strangers.is_there(folder.path / file):
            with passing_over(findings, folder.path):
                found = strangers.file_sha256(folder.path / file, folder.path)
                findings.require(proof.get(name) == found, f"proof: it is of another {file}")
    if set(proof) != set(submission.PROOF) or not folder.content.get("seeds"):
        findings.error("submission.json: its proof is not one of tools/prove.py")
        return
    section = submission.proof_section(dict(proof=proof, seeds=folder.content["seeds"]))
    findings.require(section in folder.page, "README.md: does not say what the proof in submission.json says")
    for rule in proof["rules"]:
        if rule.get("holds") is False:
            findings.note(f"proof: {rule['rule']} is broken: {rule.get('found')}")


# ------------------------------------------------------------------------------------------------------------- README

TOKEN = re.compile(r"(?<![\w./-])[-+]?[0-9][0-9,]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![\w]|\.[0-9])")
COLUMNS = (
    ("hint", "val_bpb"),
    ("ttt", "ttt_val_bpb"),
    ("pre", "pre_quant_val_bpb"),
    ("quant", "quantized_val_bpb"),
    ("bpb", "val_bpb"),
    ("loss", "val_loss"),
    ("ms", "step_avg_ms"),
    ("artifact", "artifact_bytes"),
    ("bytes", "artifact_bytes"),
    ("steps", "steps"),
    ("train", "train_wallclock_ms"),
    ("eval", "eval_time_s"),
)


def numbers_in(value: Any) -> Iterator[float]:
    """Every finite number in a JSON value, including those in its strings and keys."""
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, dict):
            left += [*inner.values(), *inner]
        elif isinstance(inner, list):
            left += inner
        elif isinstance(inner, str):
            found = (float(text.replace(",", "")) for text in TOKEN.findall(inner))
            yield from (x for x in found if math.isfinite(x))
        elif isinstance(inner, (int, float)) and not isinstance(inner, bool) and math.isfinite(inner):
            yield float(inner)


class Known:
    """Numbers, also divided by 1000 (ms as s) and by 10^6 (bytes as MB), with either sign."""

    def __init__(self, values: Iterable[float]):
        known = {float(value) for value in values}
        self.any = bool(known)
        known |= {x / 1000 for x in known} | {x / 1e6 for x in known if x > 1e5} | {-x for x in known}
        self.sorted = sorted(known)

    def has(self, text: str) -> bool:
        """Whether one of the numbers, rounded, is this text: if any, then one of its two neighbours."""
        place = bisect.bisect_left(self.sorted, runs.rounding(text)[0])
        return any(runs.rounded(value, text) for value in self.sorted[max(0, place - 1) : place + 1])


def column_statistics(folder: Folder) -> Iterator[float]:
    """Mean and sample deviation of each figure that all rows of seed_results have, as a table may show them."""
    rows = [seed.row for seed in folder.seeds.values() if seed.row]
    for key in set.intersection(*map(set, rows)) if rows else ():
        values = [row[key] for row in rows]
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            yield from (x for x in runs.mean_and_deviation(values) if x is not None)


def check_page(folder: Folder, findings: Findings) -> None:
    """Checks our README.md: rows of seeds against their seed, and all other numbers against all figures."""
    if not folder.ours:
        page_claims.check_page(folder, findings)
        return
    page = re.sub(r"```.*?```", "", folder.page, flags=re.S)
    known = Known(
        [
            *numbers_in(folder.everything),
            *numbers_in([s.config for s in folder.seeds.values()]),
            *(x for r in folder.logs for x in numbers_in({k: v for k, v in figures(r).items() if v})),
            *column_statistics(folder),
            CAP_BYTES,
            runs.MARGIN_NATS,
            runs.LEVEL,
            BUDGET_SECONDS,
        ]
    )
    header: list[str] = []
    rows = 0
    for line in page.splitlines():
        row = line.strip()
        cells = [cell.strip(" *`") for cell in row.strip("|").split("|")] if row.startswith("|") else []
        if not cells:
            header = []
        elif re.fullmatch(r"[\s|:-]+", line):
            continue
        elif not header:
            header = cells
        elif (match := re.fullmatch(r"(?:seed\s*)?([0-9]{1,18})", cells[0], re.I)) and "seed" in header[0].lower():
            rows += 1
            check_page_row(folder, findings, int(match[1]), header, cells)
            continue
        for text in TOKEN.findall(line):
            if len(re.sub(r"\D", "", text)) >= 3:
                findings.require(known.has(text), f"README.md: {text} is in no other file: {row[:80]}")
    if folder.seeds and folder.page:
        findings.require(
            rows == 0 or rows >= len(folder.seeds),
            f"README.md: {rows} of {len(folder.seeds)} seeds have a row in its table",
        )
        if not rows:
            findings.error("README.md: has no table with a row for each seed")
    mean = folder.content.get("val_bpb")
    if isinstance(mean, float) and folder.page:
        exact = (text for text in TOKEN.findall(folder.page) if len(text.partition(".")[2]) >= 4)
        findings.require(
            any(runs.rounded(mean, text) for text in exact),
            f"README.md: does not say submission.json's val_bpb {plain(mean)}",
        )


def check_page_row(folder: Folder, findings: Findings, number: int, header: list[str], cells: list[str]) -> None:
    """Checks a seed's row of a table: each cell must be the figure that the column's title names."""
    if number not in folder.seeds:
        findings.error(f"README.md: has a row of seed {number}, which submission.json and logs have not")
        return
    seed = folder.seeds[number]
    values = [seed.row, *(figures(run) for _, run in seed.sources)]
    everything = Known(x for v in values for x in numbers_in({k: x for k, x in v.items() if x is not None}))
    for title, cell in zip(header[1:], cells[1:], strict=False):
        key = next((key for word, key in COLUMNS if word in title.lower()), None)
        if key == "ttt_val_bpb" and seed.row.get(key) is None:  # no hints after it
            key = "val_bpb"
        own = Known(float(v[key]) for v in values if key and isinstance(v.get(key), (int, float)))
        for text in TOKEN.findall(cell):
            findings.require(
                (own if own.any else everything).has(text),
                f"README.md: seed {number}, {title}: {text} is not in its log or row",
            )


def parse(arguments: list[str]):
    """The command line. Errors: UserError."""
    parser = Parser(prog="check_submission.py", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder with README.md, submission.json, train_gpt.py and logs")
    add("--data", type=Path, metavar="DIR", help="folder of validation shards, to count their tokens")
    add("--baseline", type=Path, metavar="PATH", help="baseline to compare with: submission.json, folder, runs or logs")
    add(
        "--cap",
        type=number_type(int, 1),
        default=CAP_BYTES,
        metavar="BYTES",
        help="limit of the artifact (default: %(default)s)",
    )
    add("--run", action="store_true", help="run the folder's code: load the artifacts with its script (default: never)")
    add(
        "--run-seconds",
        type=number_type(float, 1),
        default=300.0,
        metavar="S",
        help="time limit of loading (default: %(default)g)",
    )
    add(
        "--run-memory",
        type=number_type(int, 64),
        default=8192,
        metavar="MIB",
        help="memory limit of loading (default: %(default)s)",
    )
    add("--rerun", type=number_type(int, 0), metavar="SEED", help="train this seed again and compare; needs --run too")
    add("--nproc", type=number_type(int, 1), default=1, metavar="N", help="ranks of the rerun (default: 1)")
    add(
        "--rerun-seconds",
        type=number_type(float, 1),
        default=14400.0,
        metavar="S",
        help="time limit of the rerun (default: %(default)g)",
    )
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="also hand the rerun this variable; it gets the seed's settings, and of this environment CUDA_*, NCCL_*, "
        "OMP_*, DEVICE, DATA_PATH, TOKENIZER_PATH, CPU_THREADS and LD_LIBRARY_PATH",
    )
    add(
        "--tolerance",
        type=number_type(float, 0),
        default=0.002,
        metavar="BPB",
        help="allowed difference of a rerun's val_bpb (default: %(default)s)",
    )
    add("--json", action="store_true", help="print all findings as one JSON object")
    options = parser.parse_args(arguments)
    if options.rerun is not None and not options.run:
        raise UserError(f"--rerun {options.rerun}: trains with the folder's code, which is run only with --run")
    return options


def main(arguments: list[str]) -> int:
    """Checks a folder and prints the findings. Returns the exit code."""
    options, findings = parse(arguments), Findings()
    baseline = submission.baseline_figures(options.baseline) if options.baseline else None
    folder = read_folder(options.folder, findings)
    for check, cause in CHECKS:
        findings.cause = cause
        check(folder, findings)
    findings.cause = "statistics"
    check_comparison(folder, findings, baseline)
    findings.cause = "configuration"
    check_data(folder, findings, options.data)
    findings.cause = "limits"
    check_limits(folder, findings, options.cap)
    findings.cause = "script"
    run_submission.check_script(folder, findings)
    if options.run:
        run_submission.load_artifacts(folder, findings, Limits(options.run_seconds, options.run_memory << 20))
    else:
        findings.note("script: not run without --run, so no artifact was loaded and no seed was trained again")
    if options.rerun is not None:
        run_submission.rerun(folder, findings, options)
    (print_json if options.json else print_findings)(options.folder, findings)
    if findings.errors:
        return 1
    return 3 if findings.warnings else 0


def print_findings(folder: Path, findings: Findings) -> None:
    """One line for each group of findings, the worst first."""
    for group in findings.groups():
        first, *more = group
        also = f" (and {len(more)} more of the same: {', '.join(topic(text) for text in more[:6])})" if more else ""
        print(f"{first.severity}: {first}{also}")
    if findings.dropped:
        print(f"and {findings.dropped} more, which are not listed")
    print(
        f"{findings.compared} comparisons, {len(findings.errors)} errors, {len(findings.warnings)} warnings, "
        f"{len(findings.notes)} notes"
    )


def topic(text: str) -> str:
    """What a finding of a group is about, in few words."""
    return visible(text.partition(": ")[2].partition(" in ")[0].partition(":")[0], 40)


def print_json(folder: Path, findings: Findings) -> None:
    """All findings as one JSON object, in the same order."""
    groups = [
        dict(
            severity=g[0].severity,
            cause=g[0].cause,
            meaning=CAUSES[g[0].cause],
            text=str(g[0]),
            more=[*map(str, g[1:])],
        )
        for g in findings.groups()
    ]
    counts = dict(errors=len(findings.errors), warnings=len(findings.warnings), notes=len(findings.notes))
    content = dict(folder=visible(folder), comparisons=findings.compared, **counts, dropped=findings.dropped)
    print(json.dumps(dict(content, findings=groups), indent=1))


CHECKS = (
    (check_fields, "form"),
    (check_seeds, "files"),
    (check_configuration, "configuration"),
    (check_sources, "score"),
    (check_row, "figures"),
    (check_statistics, "statistics"),
    (stated.check_stated, "figures"),
    (check_claims, "figures"),
    (check_proof, "script"),
    (check_page, "page"),
)


if __name__ == "__main__":
    sys.exit(command_line(main))
