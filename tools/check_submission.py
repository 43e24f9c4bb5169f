"""Checks a submission as a reviewer would: our own folders and other people's.

    python tools/check_submission.py records/FOLDER [--data data/fineweb10B_sp8192] [--baseline other/submission.json]
    python tools/check_submission.py records/FOLDER --rerun 42

It checks files, seeds and configurations, and every number of README.md, submission.json and the logs against each
other. It compares sizes and times with the limits, and recomputes mean, deviation and p-value. It compiles the script
and loads the artifacts that are there, which runs the folder's script. --rerun trains a seed again with that script and
compares. Each disagreement is named. A note says what could not be checked. Exit code 0: no disagreement; 1: some
disagreements; 2: a user's error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import processes
import runs
import submission
from runs import BUDGET_SECONDS, CAP_BYTES, Parser, Run, UserError, command_line, number_type, read_json

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
# Settings in other people's logs that may differ between runs of one configuration.
LOCAL = re.compile(r"seed|run_?id|path|dir|date|time|file|port|rank|host|url|name|step|log")


@dataclass
class Findings:
    """Number of comparisons, the disagreements, and notes on what could not be checked."""

    compared: int = 0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def error(self, text: str) -> None:
        if text not in self.errors:
            self.errors.append(text)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def require(self, holds: bool, text: str) -> None:
        """Counts a check; adds the text as an error if it does not hold."""
        self.compared += 1
        if not holds:
            self.error(text)

    def same(self, what: str, one: Any, other: Any, tolerance: float | None = None) -> None:
        """Compares two figures. A missing one is not a disagreement."""
        if one is None or other is None:
            return
        self.require(
            agree(one, other) if tolerance is None else abs(one - other) <= tolerance,
            f"{what}: {plain(one)} and {plain(other)}",
        )


def plain(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def agree(one: Any, other: Any) -> bool:
    """Whether two figures are equal at the precision of the one with fewer decimals, and of at least 4."""
    if isinstance(one, str) or isinstance(other, str):
        return str(one) == str(other)
    if isinstance(one, int) and isinstance(other, int):
        return one == other
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

    @property
    def sources(self) -> Iterator[tuple[str, Run]]:
        return (
            (name, run)
            for name, run in (("log", self.log), ("metrics", self.metrics), ("summary", self.summary))
            if run
        )


@dataclass
class Folder:
    """The content of a submission's files."""

    path: Path
    content: dict[str, Any]
    page: str
    seeds: dict[int, Seed]
    logs: list[Run]

    @property
    def ours(self) -> bool:
        """Whether tools/reproduce.py wrote it. If so, every figure must be found in its files."""
        return self.page.startswith(MARKER)


# ------------------------------------------------------------------------------------------------------------- reading


def read_folder(path: Path, findings: Findings) -> Folder:
    """Reads the files of a folder. A missing or broken one is a finding."""
    if not path.is_dir():
        raise UserError(f"{path}: must be a submission's folder")
    for name in ("README.md", "submission.json", "train_gpt.py"):
        findings.require((path / name).is_file(), f"{name}: is missing")
    content: Any = {}
    if (path / "submission.json").is_file():
        try:
            content = read_json(path / "submission.json")
        except UserError as error:
            findings.error(f"submission.json: {error}")
    if not isinstance(content, dict):
        findings.error("submission.json: must be an object")
        content = {}
    page = (path / "README.md").read_text(encoding="utf-8", errors="replace") if (path / "README.md").is_file() else ""
    folder = Folder(path, content, page, {}, [])
    read_rows(folder, findings)
    read_logs(folder, findings)
    return folder


def read_rows(folder: Folder, findings: Findings) -> None:
    """Reads the rows of seed_results in submission.json, which may be a list or keyed by seed."""
    rows = folder.content.get("seed_results", {})
    if isinstance(rows, list):
        rows = {str(row.get("seed")): row for row in rows if isinstance(row, dict)}
    for name, row in rows.items() if isinstance(rows, dict) else ():
        if not str(name).isdecimal() or not isinstance(row, dict):
            findings.error(f"submission.json: seed_results {name!r} is no seed with its figures")
            continue
        folder.seeds[int(name)] = Seed(
            int(name),
            {key: value for key, value in row.items() if isinstance(value, (int, float, str)) or value is None},
        )
    if not folder.seeds:
        findings.note("submission.json: has no seed_results; the logs alone give the seeds' figures")


def read_logs(folder: Folder, findings: Findings) -> None:
    """Reads the logs and the files beside them, and assigns each to its seed."""
    contents = Counter()
    for log in runs.submission_logs(folder.path):
        run = runs.read_log(log)
        if not (run.stages or run.losses or run.scores):
            continue
        folder.logs.append(run)
        contents[hashlib.sha256(log.read_bytes()).digest()] += 1
        named = re.search(r"seed_?(\d+)", log.stem)
        if run.seed is None:
            findings.note(f"{log.name}: does not say its seed")
            continue
        if named:
            findings.same(f"{log.name}: seed in its name and in its text", int(named[1]), run.seed)
        seed = folder.seeds.setdefault(run.seed, Seed(run.seed))
        findings.require(seed.log is None, f"{log.name}: another log of seed {run.seed} is there too")
        seed.log, tail = run, log.stem.removeprefix("train_")
        beside = {
            kind: log.with_name(f"{kind}_{tail}{end}")
            for kind, end in (("metrics", ".jsonl"), ("summary", ".json"), ("config", ".json"))
        }
        if beside["metrics"].is_file():
            seed.metrics = runs.read_metrics(beside["metrics"], Run(log.stem, str(beside["metrics"])))
        if beside["summary"].is_file():
            seed.summary = runs.apply_summary(Run(log.stem, str(beside["summary"])), read_json(beside["summary"]))
        seed.config = read_json(beside["config"]) if beside["config"].is_file() else None
    findings.require(bool(folder.logs), "logs: there is no log of a run (*.log, *.txt, logs/)")
    findings.require(max(contents.values(), default=1) == 1, "logs: two of them are the same file")


# ------------------------------------------------------------------------------------------------- seeds and settings


def check_fields(folder: Folder, findings: Findings) -> None:
    wanted = OURS if folder.ours else CORE
    for name in wanted:
        findings.require(name in folder.content, f"submission.json: has no {name}")
    if folder.ours:
        findings.require((folder.path / "requirements.txt").is_file(), "requirements.txt: is missing")


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
        findings.require(bool(seed.row) or not with_rows, f"seed {number}: a log has it, and seed_results does not")
        for source, run in seed.sources:
            findings.same(f"seed {number}: the {source} says seed", run.seed, number)
        if seed.config:
            findings.same(f"seed {number}: its config says seed", seed.config.get("seed"), number)
    if len(folder.seeds) < 3:
        findings.note(f"{len(folder.seeds)} seed(s): a record needs three or more")
    scores = Counter(s.row["val_bpb"] for s in folder.seeds.values() if isinstance(s.row.get("val_bpb"), float))
    for value, times in scores.items():
        findings.require(times == 1, f"submission.json: {times} seeds have the same val_bpb {value}")


def check_configuration(folder: Folder, findings: Findings) -> None:
    """Checks that all seeds have the same settings, by their config files or by the settings in their logs."""
    seeds = list(folder.seeds.values())
    configs = [s.config for s in seeds if s.config]
    if len(configs) == len(seeds) and seeds:
        ignored = submission.PRIVATE
    else:
        logged = [(s, s.log) for s in seeds if s.log]
        seeds = [seed for seed, _ in logged]
        configs = [{k: v for k, v in log.settings.items() if not LOCAL.search(k)} for _, log in logged]
        ignored = ()
        if configs:
            common = set.intersection(*map(set, configs))
            configs = [{k: v for k, v in c.items() if k in common} for c in configs]
            if not common:
                findings.note("configuration: the logs print no settings, so that it is the same cannot be checked")
    for seed, config in zip(seeds[1:], configs[1:], strict=True):
        for name in sorted(set(config) | set(configs[0])):
            if name not in ignored:
                findings.require(
                    config.get(name) == configs[0].get(name),
                    f"configuration: {name.upper()} is "
                    f"{configs[0].get(name)} on seed {seeds[0].seed} and {config.get(name)} on "
                    f"{seed.seed}",
                )
    for what in ("hardware", "attention", "parameters", "code_bytes"):
        values = {getattr(run, what) for s in folder.seeds.values() for _, run in s.sources} - {None}
        findings.require(len(values) < 2, f"configuration: {what} differs: {', '.join(sorted(map(str, values)))}")


# ------------------------------------------------------------------------------------------------------------ figures


def figures(run: Run) -> dict[str, Any]:
    """The figures of a source, by their names in submission.json."""
    final, stages = run.final, run.stages
    return dict(
        val_loss=final.loss if final else None,
        val_bpb=final.bpb if final else None,
        pre_quant_val_bpb=stages["pre_quant"].bpb if "pre_quant" in stages else None,
        quantized_val_bpb=stages["quantized"].bpb if "quantized" in stages else None,
        artifact_bytes=run.artifact_bytes,
        code_bytes=run.code_bytes,
        model_bytes=run.model_bytes,
        steps=run.steps,
        train_wallclock_ms=1000 * run.train_seconds if run.train_seconds else None,
        step_avg_ms=run.step_avg_ms,
        target_tokens=run.targets,
        val_tokens=run.val_tokens,
        val_bytes=run.val_bytes,
        shared_documents=run.shared_documents,
        strictly_causal=run.strictly_causal,
    )


def check_sources(folder: Folder, findings: Findings) -> None:
    """Compares each seed's row, log, metrics and summary with each other."""
    for number, seed in folder.seeds.items():
        steps = [run.steps for _, run in seed.sources if run.steps]
        tolerances = dict(train_wallclock_ms=1.0, step_avg_ms=0.01 + 1 / min(steps, default=1))  # logs have whole ms
        sources = [("submission.json", seed.row), *((name, figures(run)) for name, run in seed.sources)]
        for place, (name, values) in enumerate(sources):
            for other, others in sources[place + 1 :]:
                for key in figures(Run("", "")):
                    if not any(isinstance(x.get(key), str) for x in (values, others)):
                        findings.same(
                            f"seed {number}: {key} in {name} and {other}",
                            values.get(key),
                            others.get(key),
                            tolerances.get(key),
                        )
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
    """Checks that the figures of each row are consistent."""
    for number, seed in folder.seeds.items():
        r = seed.row
        if not all(isinstance(value, (int, float)) for value in r.values()):
            continue
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
        if {"val_loss", "val_bpb", "target_tokens", "val_bytes"} <= set(r) and r["val_bytes"]:
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
    s, rows = folder.content, [seed.row for seed in folder.seeds.values() if seed.row]
    if not rows:
        rows = [
            {k: v for k, v in figures(seed.log).items() if v is not None} for seed in folder.seeds.values() if seed.log
        ]
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
                s["bytes_total"] in ([max(sizes)] if folder.ours else sizes),
                f"submission.json: bytes_total {s['bytes_total']} and artifacts of {sizes}",
            )


def check_comparison(folder: Folder, findings: Findings, baseline: dict[str, float] | None) -> None:
    """Recomputes the differences to the baseline and the test."""
    s, rows = folder.content, [seed.row for seed in folder.seeds.values() if seed.row]
    stated = s.get("baseline")
    if not isinstance(stated, dict):
        stated = {}
    theirs = baseline or stated.get("val_bpb")
    if baseline and isinstance(stated.get("val_bpb"), dict):
        findings.require(
            sorted(baseline.values()) == sorted(stated["val_bpb"].values()),
            "submission.json: baseline's figures are not those of --baseline",
        )
    if s.get("comparison_baseline_bpb") is not None:
        mean = sum(theirs.values()) / len(theirs) if theirs else None
        findings.same(
            "submission.json: comparison_baseline_bpb and the baseline's mean", s["comparison_baseline_bpb"], mean
        )
        findings.same(
            "submission.json: delta_vs_leaderboard_bpb and the difference",
            s.get("delta_vs_leaderboard_bpb"),
            s.get("val_bpb", math.nan) - s["comparison_baseline_bpb"],
        )
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
    for name in ("gain_nats", "p_value", "p_value_margin", "holds") if isinstance(s.get("significance"), dict) else ():
        one, other = s["significance"].get(name), test[name]
        close = (
            one == other if None in (one, other) or isinstance(other, bool) else math.isclose(one, other, rel_tol=1e-3)
        )
        findings.require(close, f"submission.json: significance {name} {one}, recomputed {other}")
    findings.note(
        f"significance: better by {test['gain_nats']:.5f} nats per token; p = {test['p_value']} for better at all, "
        f"p = {test['p_value_margin']} for better by {test['margin_nats']}; the rule "
        f"{'holds' if test['holds'] else 'does not hold'}"
    )


# ------------------------------------------------------------------------------------------------------- data, limits


def check_data(folder: Folder, findings: Findings, data: Path | None) -> None:
    """Checks that all seeds have one validation set, and that it is the one of --data."""
    tokens = {seed.row["val_tokens"] for seed in folder.seeds.values() if "val_tokens" in seed.row}
    tokens |= {run.val_tokens for run in folder.logs} - {None}
    findings.require(len(tokens) < 2, f"val_tokens: {sorted(tokens)} are not one validation set's")
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
    manifest = read_json(data / "manifest.json") if (data / "manifest.json").is_file() else {}
    expected = manifest.get("splits", {}).get("val", {}).get("bytes")
    for number, seed in folder.seeds.items():
        findings.same(f"seed {number}: val_bytes and the manifest's in {data}", seed.row.get("val_bytes"), expected)
    if folder.ours and "dataset" in folder.content:
        texts = folder.content["dataset"], submission.dataset(data)["text"]
        findings.same(
            "submission.json: dataset, and the one of --data",  # the names of folders may differ
            *(text.partition(": ")[2] for text in texts),
        )


def largest(rows: list[dict[str, Any]], key: str) -> float | None:
    """The largest number that a row holds under a key; None where none does."""
    return max((row[key] for row in rows if isinstance(row.get(key), (int, float))), default=None)


def check_limits(folder: Folder, findings: Findings, cap: int) -> None:
    """Checks bytes and seconds. The last step of a training may end after the time limit; what follows may not.

    Calibration and tuning read training text, so their seconds count as training's.
    """
    for number, seed in folder.seeds.items():
        known = [seed.row, *(figures(run) for _, run in seed.sources)]
        size = largest(known, "artifact_bytes")
        train, step = largest(known, "train_wallclock_ms"), largest(known, "step_avg_ms")
        evaluation = max([seed.row.get("eval_time_s") or 0, *(run.eval_seconds or 0 for _, run in seed.sources)])
        seconds = seed.summary.seconds if seed.summary else {}
        after = seconds.get("calibrate", 0.0) + seconds.get("tune", 0.0)
        if size is None:
            findings.note(f"seed {number}: no source has the bytes of its artifact")
        else:
            findings.require(size <= cap, f"seed {number}: its artifact of {size:.0f} bytes is over {cap}")
        if train is None:
            findings.note(f"seed {number}: no source has its seconds of training")
        else:
            spent = train / 1000 + after
            findings.require(
                spent - (step or 0) / 1000 <= BUDGET_SECONDS,
                f"seed {number}: {spent:.1f} s of training, calibration and tuning are over {BUDGET_SECONDS:.0f}",
            )
        findings.require(
            evaluation <= BUDGET_SECONDS,
            f"seed {number}: {evaluation:.1f} s of evaluation are over {BUDGET_SECONDS:.0f}",
        )
        if not evaluation:
            findings.note(f"seed {number}: no source has its seconds of evaluation")


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
                if key in s and value:
                    findings.require(
                        str(value) in str(s[key]),
                        f"submission.json: {key} {s[key]!r}, and the {source} of seed {number} says {value!r}",
                    )
    hardware = " ".join(str(run.hardware or "") for run in folder.logs)
    if hardware.strip() and re.search(r"10.?min", str(s.get("track", ""))):
        findings.require(
            "H100" in hardware and "8 x" in hardware,
            f"submission.json: track {s['track']!r} is for 8 H100s, and the logs say {hardware.strip()}",
        )
    rows = [seed.row for seed in folder.seeds.values()]
    if folder.ours and isinstance(s.get("compliance"), dict) and all("target_tokens" in r for r in rows):
        for name, value in submission.compliance(rows, s.get("significance")).items():
            findings.require(
                s["compliance"].get(name) == value,
                f"submission.json: compliance {name} is {s['compliance'].get(name)}, and must be {value}",
            )


def check_proof(folder: Folder, findings: Findings) -> None:
    """Checks that a proof is of this folder's script and artifact, and that the page says what it found."""
    proof = folder.content.get("proof")
    if not folder.ours or "proof" not in folder.content:
        return
    if not isinstance(proof, dict):
        findings.note("proof: none was made; tools/prove.py makes one")
        return
    seed = next(iter(folder.seeds), None)
    for name, file in (("script_sha256", "train_gpt.py"), ("artifact_sha256", f"model_seed{seed}.pgolf")):
        if (folder.path / file).is_file():
            found = hashlib.sha256((folder.path / file).read_bytes()).hexdigest()
            findings.require(proof.get(name) == found, f"proof: it is of another {file}")
    try:
        section = submission.proof_section(folder.content)
    except (KeyError, TypeError, AttributeError):
        findings.error("submission.json: its proof is not one of tools/prove.py")
        return
    findings.require(section in folder.page, "README.md: does not say what the proof in submission.json says")
    for rule in proof["rules"]:
        if rule["holds"] is False:
            findings.note(f"proof: {rule['rule']} is broken: {rule['found']}")


# ------------------------------------------------------------------------------------------------------------- README

TOKEN = re.compile(r"(?<![\w./-])[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w]|\.\d)")
COLUMNS = (
    ("ttt", "val_bpb"),
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
    """Every number in a JSON value, including those in its strings and keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers_in(key)
            yield from numbers_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers_in(inner)
    elif isinstance(value, str):
        yield from (float(x.replace(",", "")) for x in TOKEN.findall(value))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def forms(values: Iterable[float]) -> set[float]:
    """The numbers, also divided by 1000 (ms as s) and by 10^6 (bytes as MB), with either sign."""
    known = set(values)
    return known | {x / 1000 for x in known} | {x / 1e6 for x in known if x > 1e5} | {-x for x in known}


def known_as(text: str, known: Iterable[float]) -> bool:
    return any(runs.rounded(value, text) for value in known)


def column_statistics(folder: Folder) -> Iterator[float]:
    """Mean and sample deviation of each figure that all rows of seed_results have, as a table may show them."""
    rows = [seed.row for seed in folder.seeds.values() if seed.row]
    for key in set.intersection(*map(set, rows)) if rows else ():
        values = [row[key] for row in rows]
        if all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            yield from (x for x in runs.mean_and_deviation(values) if x is not None)


def check_page(folder: Folder, findings: Findings) -> None:
    """Checks README.md: rows of seeds against their seed; on our own page, other numbers against all figures."""
    page = re.sub(r"```.*?```", "", folder.page, flags=re.S)
    known = forms(
        [
            *numbers_in(folder.content),
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
    rows, claims = 0, Counter()
    for line in page.splitlines():
        row = line.strip()
        cells = [cell.strip(" *`") for cell in row.strip("|").split("|")] if row.startswith("|") else []
        if not cells:
            header = []
        elif re.fullmatch(r"[\s|:-]+", line):
            continue
        elif not header:
            header = cells
        elif (match := re.fullmatch(r"(?:seed\s*)?(\d+)", cells[0], re.I)) and "seed" in header[0].lower():
            rows += 1
            check_page_row(folder, findings, int(match[1]), header, cells)
            continue
        if folder.ours or re.match(r"^\W*(mean|average|avg|std|3-seed)", line, re.I):
            for text in TOKEN.findall(line):
                if len(re.sub(r"\D", "", text)) >= 3:
                    findings.require(known_as(text, known), f"README.md: {text} is in no other file: {row[:80]}")
        else:
            claims.update(t for t in TOKEN.findall(line) if re.fullmatch(r"[01]\.\d{4,}", t) and not known_as(t, known))
    if folder.seeds and folder.page:
        findings.require(
            rows == 0 or rows >= len(folder.seeds),
            f"README.md: {rows} of {len(folder.seeds)} seeds have a row in its table",
        )
        if not rows:
            (findings.error if folder.ours else findings.note)("README.md: has no table with a row for each seed")
    mean = folder.content.get("val_bpb")
    if isinstance(mean, float) and folder.page:
        exact = (text for text in TOKEN.findall(folder.page) if len(text.partition(".")[2]) >= 4)
        findings.require(
            any(runs.rounded(mean, text) for text in exact),
            f"README.md: does not say submission.json's val_bpb {plain(mean)}",
        )
    if claims:
        findings.note(f"README.md: in no other file, so not checked: {', '.join(sorted(claims)[:12])}")


def check_page_row(folder: Folder, findings: Findings, number: int, header: list[str], cells: list[str]) -> None:
    """Checks a seed's row of a table: each cell must be the figure that the column's title names."""
    if number not in folder.seeds:
        findings.error(f"README.md: has a row of seed {number}, which submission.json and logs have not")
        return
    seed = folder.seeds[number]
    values = [seed.row, *(figures(run) for _, run in seed.sources)]
    everything = forms(x for v in values for x in numbers_in({k: x for k, x in v.items() if x is not None}))
    for title, cell in zip(header[1:], cells[1:], strict=False):
        key = next((key for word, key in COLUMNS if word in title.lower()), None)
        own = forms(float(v[key]) for v in values if key and isinstance(v.get(key), (int, float)))
        for text in TOKEN.findall(cell):
            findings.require(
                known_as(text, own if folder.ours and own else everything),
                f"README.md: seed {number}, {title}: {text} is not in its log or row",
            )


# ---------------------------------------------------------------------------------------------------- script, artifact

LOADER = """
import importlib.util, json, sys
import torch
spec = importlib.util.spec_from_file_location("train_gpt", sys.argv[1])
sys.modules["train_gpt"] = t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
if not hasattr(t, "load_artifact"):
    sys.exit("no load_artifact")
for path in sys.argv[2:]:
    try:
        c, explicit, _ = t.config_from_env(dict(PRESET="baseline", MODE="eval", DEVICE="cpu"), False)
        model, _ = t.load_artifact(open(path, "rb").read(), c, explicit, torch.device("cpu"))
        assert all(torch.isfinite(p).all() for p in model.parameters()), "weights are not finite"
        print(json.dumps(sum(p.numel() for p in model.parameters())))
    except Exception as error:
        print(json.dumps(str(error)))
"""


def check_script(folder: Folder, findings: Findings, load: bool) -> None:
    """Checks that the script compiles, has the size in the logs, and loads the artifacts that are there."""
    script = folder.path / "train_gpt.py"
    if not script.is_file():
        return
    try:
        compile(script.read_bytes(), str(script), "exec", dont_inherit=True)
        findings.compared += 1
    except (SyntaxError, ValueError) as error:
        findings.error(f"train_gpt.py: does not compile: {error}")
        return
    counted = {x for s in folder.seeds.values() for x in (s.row.get("code_bytes"), s.log and s.log.code_bytes) if x}
    size = script.stat().st_size
    for value in sorted(counted):
        text = f"train_gpt.py: has {size} bytes, and the runs counted {value}"
        (findings.require(size == value, text) if folder.ours else size == value or findings.note(text))
    stated = folder.content.get("script_sha256")
    if stated is not None:
        same, text = (
            stated == hashlib.sha256(script.read_bytes()).hexdigest(),
            "train_gpt.py: is not the script that ran",
        )
        (findings.require(same, text) if folder.ours else same or findings.note(text))
    artifacts = {seed: path for seed in folder.seeds for path in folder.path.glob(f"*seed{seed}.pgolf")}
    for seed, path in artifacts.items():
        for source, run in folder.seeds[seed].sources:
            findings.same(
                f"{path.name}: its bytes and model_bytes in the {source}", path.stat().st_size, run.model_bytes
            )
    if not artifacts or not load:
        findings.note("artifacts: none is in the folder, so none was loaded" if load else "artifacts: not loaded")
        return
    load_artifacts(folder, findings, script, artifacts)


def load_artifacts(folder: Folder, findings: Findings, script: Path, artifacts: dict[int, Path]) -> None:
    """Has the folder's own script read its artifacts, in another process."""
    command = [sys.executable, "-c", LOADER, str(script), *map(str, artifacts.values())]
    done = processes.run(command, errors="replace")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if last == "no load_artifact":
        findings.note("artifacts: the script has no load_artifact, so none was loaded")
        return
    findings.require(done.returncode == 0, f"train_gpt.py: cannot be imported to load artifacts: {last}")
    for seed, path, line in zip(artifacts, artifacts.values(), done.stdout.splitlines(), strict=False):
        answer, log = json.loads(line), folder.seeds[seed].log
        findings.require(isinstance(answer, int), f"{path.name}: the script does not load it: {answer}")
        if isinstance(answer, int) and log:
            findings.same(f"{path.name}: its parameters, and those of the log", answer, log.parameters)


# -------------------------------------------------------------------------------------------------------------- rerun


def rerun(folder: Folder, findings: Findings, options) -> None:
    """Trains a seed again with the folder's script and settings, and compares the score."""
    number, script = options.rerun, (folder.path / "train_gpt.py").resolve()
    if number not in folder.seeds:
        raise UserError(f"--rerun {number}: must be one of the folder's seeds: {', '.join(map(str, folder.seeds))}")
    seed = folder.seeds[number]
    settings = {
        name.upper(): str(int(value) if isinstance(value, bool) else value)
        for name, value in (seed.config or {}).items()
        if name not in submission.PRIVATE and value != ""
    }
    data = options.data or settings.get("DATA_PATH") or os.environ.get("DATA_PATH")
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        if name in settings:
            settings[name] = str(Path(settings[name]).resolve())
    if data:
        settings["DATA_PATH"] = str(Path(data).resolve())
        settings.pop("TOKENIZER_PATH", None) if options.data else None
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={options.nproc}",
        str(script),
    ]
    with tempfile.TemporaryDirectory(prefix="rerun.") as place:
        values = {**os.environ, **settings, "SEED": str(number), "ARTIFACT_DIR": str(Path(place, "run"))}
        log = Path(place, f"seed{number}.txt")
        with open(log, "w", encoding="utf-8") as file:
            child = processes.start(command, env=values, stdout=file, stderr=subprocess.STDOUT, cwd=place)
            try:
                code = child.wait()
            except BaseException:
                processes.stop(child)
                raise
        written = Path(place, "run") if Path(place, "run", "summary.json").is_file() else log
        again, text = runs.read_runs(written)[0], log.read_text(errors="replace")
    if code or not again.final:
        errors = [line for line in text.splitlines() if line.startswith("error: ")] or text.strip().splitlines()[-1:]
        findings.error(f"rerun: seed {number} fails: {' '.join(errors)[-300:]}")
        return
    compare_rerun(seed, again, findings, options.tolerance)


def compare_rerun(seed: Seed, again: Run, findings: Findings, tolerance: float) -> None:
    """Score, tokens and bytes of a rerun against what the folder says."""
    number = seed.seed
    before = seed.row or (figures(seed.log) if seed.log else {})
    was, now = before.get("val_bpb"), figures(again)["val_bpb"]
    if was is None or now is None:
        findings.error(f"rerun: seed {number} has no val_bpb {'in the folder' if was is None else 'now'}")
        return
    findings.note(
        f"rerun: seed {number} val_bpb {now:.6f}, and {was:.6f} in the folder (difference {now - was:+.6f}); "
        f"{again.steps} steps, and {before.get('steps')}; artifact {again.artifact_bytes} bytes, and "
        f"{before.get('artifact_bytes')}"
    )
    findings.require(
        abs(now - was) <= tolerance,
        f"rerun: seed {number} gives val_bpb {now:.6f}, and the folder says "
        f"{was:.6f}; they are more than --tolerance {tolerance:g} apart",
    )
    for key in ("target_tokens", "val_bytes"):
        findings.same(f"rerun: seed {number} {key}, now and in the folder", figures(again)[key], before.get(key))


def main(arguments: list[str]) -> int:
    """Checks a folder and prints the findings. Returns the exit code."""
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
    add("--no-load", action="store_true", help="do not load the artifacts, which runs the folder's script")
    add("--rerun", type=number_type(int, 0), metavar="SEED", help="train this seed again and compare")
    add("--nproc", type=number_type(int, 1), default=1, metavar="N", help="ranks of the rerun (default: 1)")
    add(
        "--tolerance",
        type=number_type(float, 0),
        default=0.002,
        metavar="BPB",
        help="allowed difference of a rerun's val_bpb (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    findings = Findings()
    baseline = submission.baseline_figures(options.baseline) if options.baseline else None
    folder = read_folder(options.folder, findings)
    for check in (
        check_fields,
        check_seeds,
        check_configuration,
        check_sources,
        check_row,
        check_statistics,
        check_claims,
        check_proof,
        check_page,
    ):
        check(folder, findings)
    check_comparison(folder, findings, baseline)
    check_data(folder, findings, options.data)
    check_limits(folder, findings, options.cap)
    check_script(folder, findings, not options.no_load)
    if options.rerun is not None:
        rerun(folder, findings, options)
    for note in findings.notes:
        print(f"note: {note}")
    for error in findings.errors:
        print(f"DISAGREES: {error}")
    print(f"{findings.compared} comparisons, {len(findings.errors)} disagreements, {len(findings.notes)} notes")
    return 1 if findings.errors else 0


if __name__ == "__main__":
    sys.exit(command_line(main))
