"""Sweeps variables of any training command with a grid, random draws or TPE, in parallel, on one machine or several.

    python tools/sweep.py MATRIX_LR=0.02,0.026 SEED=42,0 -- python train_gpt.py
    python tools/sweep.py MATRIX_LR=log:0.01..0.05 NUM_LAYERS=4..8 --trials 40 --prune val_bpb -- python train_gpt.py
    python tools/sweep.py MATRIX_LR=log:0.01..0.05:5 --storage postgresql://host/db -- torchrun ... train_gpt.py

Values of a variable:

    a,b,c             a list
    0.1..0.5          a range; of whole numbers if both ends are whole
    log:0.01..0.05    a range on a logarithmic scale
    0.1..0.5:5        a range as 5 points of a grid

If all variables are lists or points, the default sampler is a grid, otherwise TPE; --sampler selects another. Outside a
grid, SEED is not searched: runs take the seeds of its list in turn.

Before anything runs, every configuration is tried without training: a name that the script does not know, or a value
that it refuses, ends the sweep with one line. --skip-refused leaves out the combinations that are refused.

A sweep is its values, its command and its environment: the preset, the data and every knob. If it is killed, the same
command in the same environment resumes it. Finished runs stay, and interrupted ones run again. Anything else is another
sweep. PRESET_FILE=mine.toml takes knobs from a file. A run that fails is recorded with its error. The runs are in
logs/sweeps/NAME/, with their table in study.json. The study is in an Optuna database, SQLite in that folder or
--storage. Machines that share a database share the sweep.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configuration
import processes
import runs
import strangers
import trackers
from runs import Parser, UserError, available_cores, command_line, number_type, write_atomic

# Seconds that SQLite itself waits for a lock, those until the next try, and those between lines about it.
LOCK_SECONDS = 5.0
LOCK_WAIT, LOCK_NOTE = 1.0, 60.0
CORNERS = 64  # combinations of a range's ends that are checked before anything runs
LEASE_SECONDS = 120.0  # without a heartbeat for so long, a run on another machine is dead
POLL_SECONDS = 0.2


# ----------------------------------------------------------------------------------------------------------- the space


@dataclass(frozen=True)
class Values:
    """The values of a variable: a list, or a range with its number of points (0: continuous)."""

    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    whole: bool = False
    points: int = 0

    def grid(self) -> tuple[str, ...]:
        """The values of a grid as text; those of a range are evenly spaced."""
        if self.choices:
            return self.choices
        low, high = (math.log(x) if self.log else x for x in (self.low, self.high))
        values = [low + (high - low) * i / max(1, self.points - 1) for i in range(self.points)]
        values = [math.exp(x) if self.log else x for x in values]
        return tuple(dict.fromkeys(written(round(x) if self.whole else x) for x in values))

    def ends(self) -> tuple[str, str]:
        """The ends of a range as text."""
        low, high = ((int(x) if self.whole else x) for x in (self.low, self.high))
        return written(low), written(high)

    def distribution(self):
        """The values as an Optuna distribution."""
        from optuna import distributions

        if self.choices or self.points:
            return distributions.CategoricalDistribution(self.grid())
        if self.whole:
            return distributions.IntDistribution(int(self.low), int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)


def written(value: Any) -> str:
    """A value as text for the environment."""
    return format(value, ".8g") if isinstance(value, float) else str(value)


def read_values(name: str, text: str) -> Values:
    """The values of one variable. Errors: UserError."""
    number = r"([-+]?[\d.]+?(?:[eE][-+]?\d+)?)"
    match = re.fullmatch(rf"(log:)?{number}\.\.{number}(?::(\d+))?", text)
    if not match:
        words = text.split(",")
        if "" in words or len(set(words)) != len(words) or text.startswith("log:") or ".." in text:
            raise UserError(
                f"{name}={text}: must be a list a,b,c of different values, or a range like 0.1..0.5 or log:0.01..0.05:5"
            )
        return Values(choices=tuple(words))
    log, points = bool(match[1]), int(match[4] or 0)
    ends = match[2], match[3]
    try:
        low, high = (float(end) for end in ends)
    except ValueError:
        raise UserError(f"{name}={text}: the ends of its range must be numbers") from None
    if not low < high or (log and low <= 0) or points == 1:
        raise UserError(f"{name}={text}: a range must go up{', from above 0' if log else ''}, with at least 2 points")
    whole = all(re.fullmatch(r"[-+]?\d+", end) for end in ends)
    return Values((), low, high, log, whole, points)


def read_space(words: list[str]) -> dict[str, Values]:
    """All variables. Errors: UserError."""
    space: dict[str, Values] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"{word}: must be a variable as NAME=values; the command follows after --")
        if name in space or name in ("ARTIFACT_DIR", "RUN_ID"):
            raise UserError(f"{name}: is given twice" if name in space else f"{name}: is set by the sweep itself")
        space[name] = read_values(name, text)
    if not space:
        raise UserError("VARIABLE=values: at least one is needed, such as MATRIX_LR=0.02,0.026")
    return space


# ----------------------------------------------------------------------------------------------------------- the study


class Sweep:
    """A study in its database: which run is next, and the result of each."""

    def __init__(self, options):
        import optuna

        logging.getLogger("optuna").setLevel(logging.ERROR)
        self.options, self.optuna = options, optuna
        self.space, self.folder = options.space, options.folder
        self.seeds = ()
        if options.sampler != "grid" and "SEED" in self.space:
            self.seeds = self.space["SEED"].choices
        self.distributions = {n: v.distribution() for n, v in self.space.items() if not (n == "SEED" and self.seeds)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.alone():
            self.study = self.open_study()
            if options.sampler == "grid":
                for point in combinations(options):
                    if point not in options.refused:
                        self.study.enqueue_trial(point, {"point": True}, skip_if_exists=True)
            self.repair()
            if options.retry_failed:
                self.retry_failed()

    def open_study(self):
        """Creates or loads the study in its database. Errors: UserError."""
        o, optuna = self.options, self.optuna
        pruner = optuna.pruners.MedianPruner(o.prune_startup, o.prune_after) if o.prune else optuna.pruners.NopPruner()
        try:
            study = optuna.create_study(
                storage=patient_storage(o.storage),
                study_name=o.name,
                load_if_exists=True,
                pruner=pruner,
                direction=o.direction,
            )
        except Exception as error:  # database drivers raise various types
            raise UserError(f"--storage {o.storage}: cannot be opened: {str(error).splitlines()[0]}") from None
        # A resumed sweep must not draw the same values again.
        seed = None if o.sampler_seed is None else o.sampler_seed + len(study.get_trials(deepcopy=False))
        study.sampler = (optuna.samplers.TPESampler if o.sampler == "tpe" else optuna.samplers.RandomSampler)(seed=seed)
        described = {name: repr(values) for name, values in sorted(self.space.items())}
        kept = study.user_attrs
        if kept.get("space", described) != described:
            raise UserError(
                f"--name {o.name}: this study sweeps {', '.join(kept['space'])} with other values; choose another name"
            )
        for what, now in (("environment", o.environment), ("command", o.command)):
            if kept.get(what, now) != now:
                raise UserError(
                    f"--name {o.name}: this study has another {what}: {difference(kept[what], now)}; "
                    "choose another name"
                )
        if study.direction.name.lower() != o.direction:
            raise UserError(f"--name {o.name}: this study is to {study.direction.name.lower()}; choose another name")
        for what, now in (("space", described), ("environment", o.environment), ("command", o.command)):
            if kept.get(what) != now:
                study.set_user_attr(what, now)
        return study

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Locks out other sweeps if the database does not: SQLite lets two take the same trial."""
        if not self.options.storage.startswith("sqlite:///"):
            yield
            return
        import fcntl  # Sharing SQLite files is for Unix only

        with open(self.options.storage.removeprefix("sqlite:///") + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def trials(self, *states: str) -> list:
        """The trials in these states, without those that were queued again."""
        wanted = [getattr(self.optuna.trial.TrialState, state) for state in states]
        everything = self.study.get_trials(deepcopy=False)
        replaced = {t.user_attrs.get("again") for t in everything}
        return [
            t
            for t in everything
            if (not wanted or t.state in wanted) and t.number not in replaced and "interrupted" not in t.user_attrs
        ]

    def put_back(self, trial) -> None:
        """Marks a running trial as interrupted and queues it again. Of several machines, only one succeeds."""
        try:
            self.optuna.trial.Trial(self.study, trial._trial_id).set_user_attr("interrupted", True)
            self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
        except (ValueError, RuntimeError):
            return
        self.queue(trial)

    def queue(self, trial) -> None:
        """Queues the values of a trial again, in its place."""
        kept = {name: trial.user_attrs[name] for name in ("seed", "point") if name in trial.user_attrs}
        self.study.enqueue_trial(trial.params, {**kept, "again": trial.number})

    def reclaim(self) -> None:
        """Queues the trials of dead sweeps again."""
        for trial in self.trials("RUNNING"):
            if not self.alive(trial):
                print(f"trial {trial.number}: its sweep was killed; it is run again", flush=True)
                self.put_back(trial)

    def alive(self, trial) -> bool:
        owner = trial.user_attrs.get("owner")
        if owner and owner[0] == socket.gethostname():
            return process_start(owner[1]) == owner[2]
        seen = trial.user_attrs.get("seen", trial.datetime_start.timestamp() if trial.datetime_start else 0)
        return time.time() - seen < LEASE_SECONDS

    def retry_failed(self) -> None:
        for trial in self.trials("FAIL"):
            self.queue(trial)

    def repair(self) -> None:
        """Queues trials that a killed sweep had marked as interrupted but not queued yet."""
        everything = self.study.get_trials(deepcopy=False)
        replaced = {t.user_attrs.get("again") for t in everything}
        for trial in everything:
            if trial.user_attrs.get("interrupted") and trial.state.is_finished() and trial.number not in replaced:
                self.queue(trial)

    def next_trial(self):
        """The next trial to run, or None if all are done or running."""
        with self.alone():
            self.reclaim()
            return self.take_trial()

    def take_trial(self):
        if not self.trials("WAITING") and (self.options.sampler == "grid" or len(self.trials()) >= self.options.trials):
            return None
        trial = self.study.ask(self.distributions)
        if self.options.sampler == "grid" and "point" not in trial.user_attrs:  # another machine took the last point
            trial.set_user_attr("again", trial.number)  # so that it does not count
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
            return None
        trial.set_user_attr("owner", [socket.gethostname(), os.getpid(), process_start(os.getpid())])
        if self.seeds:
            trial.set_user_attr("seed", trial.user_attrs.get("seed", self.seeds[trial.number % len(self.seeds)]))
        return trial

    @property
    def total(self) -> int:
        """Trials of the whole sweep, without those that are left out."""
        if self.options.sampler != "grid":
            return self.options.trials
        return math.prod(len(values.grid()) for values in self.space.values()) - len(self.options.refused)

    def better(self, value: float) -> float:
        """A score as something to sort by, the best first."""
        return value if self.options.direction == "minimize" else -value

    def write(self) -> list[dict[str, Any]]:
        """Writes study.json: every trial that counts, best first."""
        rows = []
        for t in self.trials():
            values = {n: written(v) for n, v in t.params.items()}
            values |= {"SEED": t.user_attrs["seed"]} if "seed" in t.user_attrs else {}
            queued = {n: written(v) for n, v in t.system_attrs.get("fixed_params", {}).items()}
            rows.append(
                dict(
                    trial=t.number,
                    state=t.state.name.lower(),
                    values=values or queued,
                    value=t.value if t.state.name == "COMPLETE" else None,
                    **{n: t.user_attrs.get(n) for n in ("error", "seconds", "folder", "steps")},
                )
            )
        rows.sort(key=lambda r: (r["state"] != "complete", self.better(r["value"] or 0.0), r["trial"]))
        by, shares = self.importance(rows)
        content = dict(
            name=self.options.name,
            objective=self.options.objective,
            direction=self.options.direction,
            command=self.options.command,
            environment=self.options.environment,
            variables=list(self.space),
            importance=shares,
            importance_by=by,
            trials=rows,
        )
        write_atomic(self.folder / "study.json", json.dumps(content, indent=1) + "\n")
        return rows

    def importance(self, rows: list[dict[str, Any]]) -> tuple[str, dict[str, float]]:
        """(the measure's name, the share of the score's spread that each variable explains). Empty for too few runs."""
        done = [row for row in rows if row["state"] == "complete" and row["value"] is not None]
        if len(done) < 4 or len({row["value"] for row in done}) < 2:
            return "", {}
        if self.options.sampler == "grid":
            return "main effects", main_effects(list(self.space), done)
        try:
            with warnings.catch_warnings(action="ignore"):
                evaluator = self.optuna.importance.PedAnovaImportanceEvaluator()
                shares = self.optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # such as all values of a variable being the same
            return "", {}
        return "PED-ANOVA", {name: float(share) for name, share in shares.items() if math.isfinite(share)}


def main_effects(names: list[str], done: list[dict[str, Any]]) -> dict[str, float]:
    """The share of the variance of a grid's scores that the means over each variable's values have."""
    mean = math.fsum(row["value"] for row in done) / len(done)
    spread = math.fsum((row["value"] - mean) ** 2 for row in done)
    shares = {}
    for name in names:
        groups: dict[str, list[float]] = {}
        for row in done:
            groups.setdefault(row["values"].get(name, ""), []).append(row["value"])
        if len(groups) > 1:
            effects = [len(group) * (math.fsum(group) / len(group) - mean) ** 2 for group in groups.values()]
            shares[name] = math.fsum(effects) / spread
    return dict(sorted(shares.items(), key=lambda share: -share[1]))


def difference(before: Any, now: Any) -> str:
    """What differs between two environments, or two commands."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{strangers.visible(before, 200)} there, {strangers.visible(now, 200)} here"
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    words = [f"{n}={before[n]} there" if n in before else f"no {n} there" for n in names]
    words = [f"{w}, {now.get(n, 'none')} here" for w, n in zip(words, names, strict=True)]
    return strangers.visible("; ".join(words), 400)


def patient_storage(url: str):
    """Optuna's storage at a URL. While another process holds a SQLite file, each call waits and is tried again."""
    from optuna.storages import BaseStorage, RDBStorage, get_storage

    if not url.startswith("sqlite:"):
        return url

    def patiently(method):
        @functools.wraps(method)
        def tried(*arguments, **options):
            begin, said = time.monotonic(), 0.0
            while True:
                try:
                    return method(*arguments, **options)
                except Exception as error:  # SQLAlchemy's, or Optuna's around it
                    if not is_locked(error):
                        raise
                if time.monotonic() - begin >= said:
                    print(f"{url}: is locked by another process; waiting", file=sys.stderr, flush=True)
                    said += LOCK_NOTE
                time.sleep(LOCK_WAIT)

        return tried

    options = dict(connect_args=dict(timeout=LOCK_SECONDS))
    storage = patiently(lambda: get_storage(RDBStorage(url, engine_kwargs=options)))()
    for name in dir(BaseStorage):
        if not name.startswith("_") and callable(getattr(storage, name)):
            setattr(storage, name, patiently(getattr(storage, name)))
    return storage


def is_locked(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is SQLite's about a lock."""
    while error is not None:
        if "database is locked" in str(error) or "database table is locked" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def process_start(pid: int) -> str | None:
    """When a process started, in the system's clock, to tell apart a reused pid. None: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    done = (
        subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
        if sys.platform == "darwin"
        else None
    )
    return done.stdout.strip() or None if done else None


# ------------------------------------------------------------------------------------------------------------- the runs


def gpus() -> list[str]:
    """The visible GPUs, by their names in CUDA_VISIBLE_DEVICES."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [word for word in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if word not in ("", "-1")]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return []
    return [str(i) for i in range(len(re.findall(r"^GPU \d+", done.stdout, re.M)))] if not done.returncode else []


def slots(options) -> list[dict[str, str]]:
    """The environment of each slot for a run: its GPUs, or its share of the cores."""
    found, each = gpus(), options.gpus_per_run
    groups = [",".join(found[i : i + each]) for i in range(0, len(found) - each + 1, each)]
    if found and not groups:
        raise UserError(f"--gpus-per-run {each}: {len(found)} GPUs are visible")
    jobs = options.jobs or len(groups) or 1
    if groups:
        return [{"CUDA_VISIBLE_DEVICES": groups[i % len(groups)]} for i in range(jobs)]
    cores = available_cores()
    share = {} if "CPU_THREADS" in os.environ or jobs == 1 else {"CPU_THREADS": str(max(1, cores // jobs))}
    return [share] * jobs


def metrics_row(line: bytes, figure: str) -> dict[str, Any] | None:
    """A line of a metrics.jsonl with a step from 1 and a figure to prune by; None for any other."""
    fields = {"step": strangers.POSITIVE, figure: strangers.NUMBER}
    try:
        return strangers.record(fields, tuple(fields)).keep(strangers.parse_json(line.decode("utf-8", "replace")))
    except ValueError:
        return None


class Job:
    """One run of the command."""

    def __init__(self, sweep: Sweep, trial, place: dict[str, str]):
        self.sweep, self.options = sweep, sweep.options
        self.trial = trial
        self.folder = sweep.folder / f"trial-{trial.number:04d}"
        self.values = {name: written(value) for name, value in trial.params.items()}
        if "seed" in trial.user_attrs:
            self.values["SEED"] = trial.user_attrs["seed"]
        self.folder.mkdir(parents=True)
        self.output, self.read = self.folder / "out.txt", 0
        self.begin, self.seen = time.time(), 0.0
        environment = trial_environment(self.options, self.values, place) | {"ARTIFACT_DIR": str(self.folder)}
        settings = self.options.environment | self.values
        self.tracked = self.options.tracking.start(self.folder.name, settings, self.folder)
        with open(self.output, "wb") as file:
            self.child = processes.start(sweep.options.argv, env=environment, stdout=file, stderr=subprocess.STDOUT)
        trial.set_user_attr("folder", str(self.folder))
        self.sign_of_life()

    def sign_of_life(self) -> None:
        if time.time() - self.seen > LEASE_SECONDS / 8:
            self.seen = time.time()
            self.trial.set_user_attr("seen", self.seen)

    def hopeless(self) -> bool:
        """Reports new metrics. Returns whether the run is worse than the median of the others at a step."""
        if not self.options.prune:
            return False
        lines, self.read = strangers.new_lines(self.folder / "metrics.jsonl", "metrics", self.read)
        for line in lines:
            row = metrics_row(line, self.options.prune)
            if row:
                self.trial.report(row[self.options.prune], row["step"])
                if self.trial.should_prune():
                    self.trial.set_user_attr("steps", row["step"])
                    return True
        return False

    def poll(self) -> bool:
        """Whether the run is over. If it is, its result is in the study."""
        state = self.sweep.optuna.trial.TrialState
        code = self.child.poll()
        self.sign_of_life()
        self.tracked.follow()
        if code is None and self.hopeless():
            processes.stop(self.child)
            self.end(state.PRUNED, f"stopped early at step {self.trial.user_attrs['steps']}")
        elif code is None:
            return False
        else:
            self.hopeless()  # later runs are compared with its last figures
            value, error = self.result(code)
            self.trial.set_user_attr("error", error) if error else None
            self.end(state.FAIL if error else state.COMPLETE, error or f"{self.options.objective} {value:.6f}", value)
        return True

    def end(self, state, words: str, value: float | None = None) -> None:
        self.trial.set_user_attr("seconds", round(time.time() - self.begin, 2))
        self.tracked.finish({self.options.objective: value})
        settings = " ".join(f"{n}={v}" for n, v in self.values.items())
        try:
            self.sweep.study.tell(self.trial, value if state.name == "COMPLETE" else None, state=state)
        except (ValueError, RuntimeError):
            words = "was given to another machine, because this one seemed dead"
        print(f"trial {self.trial.number}: {settings}: {strangers.visible(words, 1000)}", flush=True)

    def result(self, code: int) -> tuple[float | None, str]:
        """(the objective, an empty text), or (None, the error)."""
        text = strangers.read_ends(self.output)
        ignored = [
            line
            for line in text.splitlines()
            if (m := re.match(r"warning: (\w+)=.* has no effect", line)) and m[1] in self.values
        ]
        if code:
            errors = [line for line in text.splitlines() if line.startswith("error: ")]
            last = (errors or text.strip().splitlines() or ["no output"])[-1]
            return None, f"exit code {code}: {last[-300:]}"
        if ignored:
            return None, ignored[0]
        try:
            value = self.score()
        except (UserError, OSError) as error:
            return None, str(error)
        return (
            (value, "")
            if value is not None and math.isfinite(value)
            else (None, f"no finite {self.options.objective} in summary.json or the output")
        )

    def score(self) -> float | None:
        """The objective from summary.json, or from the output of scripts that write none."""
        summary = self.folder / "summary.json"
        if strangers.is_there(summary):
            fields = {"steps": strangers.COUNT, self.options.objective: runs.ANY_FIGURE}
            problems: list[str] = []
            s = strangers.checked(strangers.read_object(summary), fields, str(summary), problems)
            if problems:
                raise UserError(problems[0])
            self.trial.set_user_attr("steps", s.get("steps"))
            return s.get(self.options.objective)
        final = runs.read_log(self.output).final
        return {"val_bpb": final.bpb, "val_loss": final.loss}.get(self.options.objective) if final else None

    def interrupt(self) -> None:
        """Stops the run and puts its trial back."""
        processes.stop(self.child)
        self.sweep.put_back(self.trial)
        self.tracked.finish()


def work(sweep: Sweep, places: list[dict[str, str]]) -> None:
    """Runs trials until none is left, one in each slot."""
    jobs: dict[int, Job] = {}
    try:
        while True:
            for place, values in enumerate(places):
                while place not in jobs and (trial := sweep.next_trial()):
                    if not refused(sweep, trial, values):
                        jobs[place] = Job(sweep, trial, values)
            if not jobs:
                return
            time.sleep(POLL_SECONDS)
            for place in [place for place, job in jobs.items() if job.poll()]:
                del jobs[place]
                print(progress(sweep, sweep.write(), len(places)), flush=True)
    finally:
        for job in jobs.values():
            job.interrupt()


def refused(sweep: Sweep, trial, place: dict[str, str]) -> bool:
    """Whether the script refuses a trial's configuration. Such a trial fails without a run."""
    values = {name: written(value) for name, value in trial.params.items()}
    if "seed" in trial.user_attrs:
        values["SEED"] = trial.user_attrs["seed"]
    try:
        sweep.options.checker.check(trial_environment(sweep.options, values, place))
    except UserError as error:
        words = f"refused: {error}"
        trial.set_user_attr("error", words)
        sweep.study.tell(trial, state=sweep.optuna.trial.TrialState.FAIL)
        settings = " ".join(f"{n}={v}" for n, v in values.items())
        print(f"trial {trial.number}: {settings}: {strangers.visible(words, 1000)}", flush=True)
        return True
    return False


def trial_environment(options, values: dict[str, str], place: dict[str, str]) -> dict[str, str]:
    """The whole environment of a trial, without the folder of its run. Errors: UserError for its PRESET_FILE."""
    return configuration.expanded({**os.environ, **options.checker.strict(), **place, **values})


def progress(sweep: Sweep, rows: list[dict[str, Any]], places: int) -> str:
    """The line between trials: how many are over, the best so far, the time that is left."""
    over = [row for row in rows if row["state"] in ("complete", "fail", "pruned")]
    words = [f"{len(over)} of {sweep.total}"]
    best = next((row for row in rows if row["state"] == "complete"), None)
    if best:
        settings = " ".join(f"{name}={value}" for name, value in best["values"].items())
        words.append(f"best so far: {sweep.options.objective} {best['value']:.6f} ({settings})")
    times = [row["seconds"] for row in over if row["seconds"]]
    left = max(0, sweep.total - len(over))
    if times and left:
        words.append(f"about {duration(sum(times) / len(times) * left / places)} left")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def print_table(sweep: Sweep) -> None:
    """Prints the runs, best first, and the command of the best."""
    rows, names = sweep.write(), list(sweep.space)
    head = ["trial", *names, sweep.options.objective, "seconds", "state"]
    body = [
        [
            str(r["trial"]),
            *(r["values"].get(n, "-") for n in names),
            runs.shown(r["value"], ".6f"),
            runs.shown(r["seconds"], ".1f"),
            r["state"] + (f": {r['error']}" if r["error"] else ""),
        ]
        for r in rows
    ]
    print(f"Trials of {sweep.options.name}, best {sweep.options.objective} first")
    print(runs.table([head, *body]))
    done = [r for r in rows if r["state"] == "complete"]
    print_means(sweep, done, [n for n in names if n != "SEED"])
    by, shares = sweep.importance(rows)
    if shares:
        print(f"Importance of each variable for {sweep.options.objective}, by {by}")
        print(runs.table([["variable", "share"], *([name, f"{share:.1%}"] for name, share in shares.items())]))
    failed = sum(r["state"] == "fail" for r in rows)
    if failed:
        print(f"{failed} failed; the same command with --retry-failed runs {'it' if failed == 1 else 'them'} again")
    running = sum(r["state"] == "running" for r in rows)
    if running:
        print(f"nothing is left to start here, and {running} still run{'s' if running == 1 else ''} in another sweep")
    print(f"written: {sweep.folder / 'study.json'}")


def print_means(sweep: Sweep, done: list[dict[str, Any]], names: list[str]) -> None:
    """Prints the means over seeds, and the command of the best."""
    groups: dict[tuple, list[float]] = {}
    for r in done:
        groups.setdefault(tuple(r["values"][n] for n in names), []).append(r["value"])
    means = sorted(
        ((*runs.mean_and_deviation(values), len(values), key) for key, values in groups.items()),
        key=lambda m: sweep.better(m[0]),
    )
    if names and any(count > 1 for *_, count, _ in means):
        body = [[*key, f"{mean:.6f}", runs.shown(spread, ".6f"), str(count)] for mean, spread, count, key in means]
        print(f"Means over seeds, best {sweep.options.objective} first")
        print(runs.table([[*names, f"mean {sweep.options.objective}", "deviation", "seeds"], *body]))
    if means:
        settings = " ".join(f"{n}={shlex.quote(v)}" for n, v in zip(names, means[0][-1], strict=True))
        print(f"best: {settings} {sweep.options.command}".replace("best:  ", "best: "))


# -------------------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str]):
    """The command line. Errors: UserError."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(prog="sweep.py", description=__doc__, usage="sweep.py VARIABLE=values ... [options] -- COMMAND ...")
    add = parser.add_argument
    add("variables", nargs="*", metavar="VARIABLE=values")
    add(
        "--sampler",
        choices=("grid", "random", "tpe"),
        help="how to choose values (default: grid for lists and points, otherwise tpe)",
    )
    add("--trials", type=number_type(int, 1), metavar="N", help="total number of runs; needed for random and tpe")
    add("--jobs", type=number_type(int, 1), metavar="N", help="parallel runs (default: one per GPU, or one)")
    add("--gpus-per-run", type=number_type(int, 1), default=1, metavar="N", help="GPUs of a run (default: 1)")
    add("--name", help="name of the study (default: from variables, values and command)")
    add("--folder", type=Path, metavar="DIR", help="folder of the runs (default: logs/sweeps/NAME)")
    add("--storage", metavar="URL", help="Optuna's database (default: SQLite in the folder)")
    add(
        "--objective",
        default="val_bpb",
        metavar="NAME",
        help="figure of summary.json to compare; for other "
        "scripts, val_bpb or val_loss of the output (default: val_bpb)",
    )
    add(
        "--direction",
        choices=("minimize", "maximize"),
        default="minimize",
        help="what to do with it (default: minimize)",
    )
    add(
        "--prune",
        choices=("train_loss", "val_loss", "val_bpb"),
        help="stop a run early if this figure of its metrics.jsonl is worse than the median of the others at that step",
    )
    add(
        "--prune-startup",
        type=number_type(int, 1),
        default=4,
        metavar="N",
        help="prune only after N complete runs (default: 4)",
    )
    add(
        "--prune-after",
        type=number_type(int, 0),
        default=0,
        metavar="STEP",
        help="prune only from this step on (default: 0)",
    )
    add("--sampler-seed", type=number_type(int, 0, 2**32 - 1), metavar="S", help="seed of random and tpe")
    add("--retry-failed", action="store_true", help="run failed trials again")
    add("--skip-refused", action="store_true", help="leave out combinations that the script refuses")
    add("--tracker", choices=tuple(trackers.PACKAGES), help="send the curves to this tracker too")
    options = parser.parse_intermixed_args(arguments[:place])
    options.argv = arguments[place + 1 :]
    if not options.argv:
        raise UserError("-- COMMAND: is needed after the variables, such as: -- python train_gpt.py")
    return completed(options)


def completed(options):
    """Fills in options that depend on others. Errors: UserError."""
    options.space = read_space(options.variables)
    options.refused, options.tracking = [], trackers.NO_TRACKER
    open_ = [name for name, v in options.space.items() if not v.choices and not v.points]
    options.sampler = options.sampler or ("tpe" if open_ else "grid")
    if options.sampler == "grid" and open_:
        raise UserError(f"--sampler grid: {open_[0]} needs a list, or a number of points, such as log:0.01..0.05:5")
    if options.sampler != "grid" and options.trials is None:
        raise UserError(f"--trials: is needed with --sampler {options.sampler}")
    options.command = shlex.join(options.argv)
    if options.argv[0] in ("python", "python3"):
        options.argv[0] = sys.executable  # this interpreter has the requirements
    if options.prune and options.direction == "maximize":
        raise UserError("--direction maximize: --prune stops runs with a high loss, so it needs minimize")
    options.checker = configuration.Checker(configuration.script_of(options.argv), configuration.ranks_of(options.argv))
    options.environment = identity_environment(options)
    described = json.dumps(
        [sorted(options.variables), options.command, options.sampler, options.environment, options.direction]
    )
    mark = hashlib.sha256(described.encode()).hexdigest()
    options.prefix = "-".join(options.space)[:48]
    options.named = bool(options.name)
    options.name = options.name or f"{options.prefix}-{mark[:8]}"
    if not re.fullmatch(r"[\w.-]+", options.name):
        raise UserError(f"--name {options.name}: may only have letters, digits, dots, - and _")
    options.folder = options.folder or Path("logs", "sweeps", options.name)
    options.storage = options.storage or f"sqlite:///{options.folder / 'study.db'}"
    return options


def identity_environment(options) -> dict[str, str]:
    """What of the environment makes a sweep another one: preset, data and every knob. Errors: UserError."""
    checker = options.checker
    values = checker.relevant(configuration.expanded(os.environ))
    values = {name: value for name, value in values.items() if name not in options.space}
    files = options.space[configuration.PRESET_FILE].grid() if configuration.PRESET_FILE in options.space else ()
    for path in files:
        values[path] = json.dumps(configuration.read_preset_file(Path(path)), sort_keys=True)
    return values


def combinations(options) -> Iterator[dict[str, str]]:
    """The values of a grid's trials; of a search, combinations of the ends of its ranges and the items of its lists."""
    grid = options.sampler == "grid"
    sides = [v.grid() if grid or v.choices or v.points else v.ends() for v in options.space.values()]
    points = (dict(zip(options.space, point, strict=True)) for point in itertools.product(*sides))
    return points if grid else itertools.islice(points, CORNERS)


def dry_run(options, places: list[dict[str, str]]) -> list[dict[str, str]]:
    """Tries every configuration without training. Returns those that are refused with --skip-refused.

    Errors: UserError for names that the script does not know, for values that it refuses, and where none is left.
    """
    out, count = [], 0
    for count, values in enumerate(combinations(options), 1):
        environment = trial_environment(options, values, places[0])
        if count == 1:
            options.checker.check_names(list(options.space), environment)
            files = {**os.environ, **values}.get(configuration.PRESET_FILE)
            if files:
                options.checker.check_names(list(configuration.read_preset_file(Path(files))), environment)
        try:
            options.checker.check(environment)
        except UserError as error:
            if not options.skip_refused:
                settings = " ".join(f"{name}={value}" for name, value in values.items())
                advice = "; --skip-refused leaves such trials out" if options.sampler == "grid" else ""
                raise UserError(f"trial {settings}: {error}{advice}") from None
            out.append(values)
    if count and len(out) == count:
        raise UserError("--skip-refused: the script refuses every trial")
    return out


def refuse_other_sweep(options) -> None:
    """Refuses a folder with another sweep, and says what makes this sweep another one than those beside it.

    Errors: UserError.
    """
    file = options.folder / "study.json"
    if strangers.is_there(file):
        other = strangers.read_object(file)
        if other.get("name") != options.name:
            words = what_differs(other, options)
            raise UserError(f"--folder {options.folder}: holds another sweep{words}; choose another folder")
        return
    if options.named or not options.folder.parent.is_dir():
        return
    for folder in strangers.entries(options.folder.parent):
        if folder.name.startswith(options.prefix) and strangers.is_plain(folder / "study.json"):
            try:
                other = strangers.read_object(folder / "study.json")
            except UserError:
                continue
            if other.get("variables") == list(options.space):
                print(f"another sweep than {folder}{what_differs(other, options)}", flush=True)


def what_differs(other: dict[str, Any], options) -> str:
    """What of a sweep's study.json differs from this sweep, in words after its name."""
    environment = other.get("environment")
    if isinstance(environment, dict) and environment != options.environment:
        return f": {difference(environment, options.environment)}"
    if other.get("command") != options.command:
        return f": {difference(other.get('command'), options.command)}"
    return ", with other values"


def main(arguments: list[str]) -> int:
    """Runs the rest of a sweep. Returns the exit code: 1 if a run failed."""
    options = parse(arguments)
    places = slots(options)
    options.refused = dry_run(options, places)
    refuse_other_sweep(options)
    if options.tracker:
        options.tracking = trackers.Tracker(options.tracker, options.name, options.folder)
    sweep = Sweep(options)
    print(f"sweep {options.name}: {options.sampler}, {len(places)} parallel run(s), {options.storage}", flush=True)
    try:
        work(sweep, places)
    finally:
        print_table(sweep)
    return 1 if sweep.trials("FAIL") else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(command_line(main))
