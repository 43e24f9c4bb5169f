"""A laboratory of training ideas: each against the best recipe so far, paired by seed, at three sizes of model.

    make lab                                     everything that is missing, and the report
    make lab ARGS="--only NorMuon --seeds 42 0"  some rows, some seeds
    make lab ARGS="--hours 4"                    no run starts after four hours; the next call goes on
    make lab ARGS="--dry"                        what would run, and for how long

On a text of your own, which data/prepare.py made with 1,024 pieces in data/mine_1024:

    make lab ARGS="--data data/mine --about 'what it is' --results mine.jsonl --report mine.md"

The ideas are the table in bench/lab_ideas.py, the rules of the verdicts and the report are in bench/lab_report.py. Runs
use train_gpt.py's own configuration, training loop and evaluation on the built-in corpus, by steps, so that they are
deterministic. Before an idea is trained, the FLOPs and the CPU seconds of its training steps are measured beside the
control's in one process: STEPS_MEASURED steps spread over the training. It then trains for as many steps as fit the
control's FLOPs, and as many as fit the control's seconds. One run serves both where both are within 1% of the control's
steps, or where the seconds cannot be told apart. FLOPs are those of matrix products, forward, backward and optimizer,
by torch's counter.

Rates that an idea may change are tried at the smallest size, with a seed of their own, and the best factor is kept for
all sizes. All rows come first at the smallest size. Of larger sizes, a row is run only if it is not hopeless yet; rows
that look best come first. Results are lines of bench/results/lab.jsonl. What a line there has is never run again: the
same settings that differ from the defaults, the same data, the same VERSION of bench/lab_ideas.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import datetime
import fcntl
import hashlib
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tools")]
import lab_ideas as ideas  # noqa: E402
import lab_report  # noqa: E402
import processes  # noqa: E402
import train_gpt as t  # noqa: E402

CONTROL = lab_report.CONTROL
SEEDS = (42, 0, 314)
TUNING_SEED = 7  # not one of the seeds above: choosing a rate by them would flatter the idea
STEPS_MEASURED, ROUNDS = 20, 3
NEAR = 0.01  # numbers of steps this close to the control's are taken for the same
UNRESOLVED = 0.03  # times this close are taken for the same if some rounds say faster and some slower
# Settings that change where a run computes, or what happens after its score: not what was trained.
OUTSIDE = (
    *t.OPERATIONAL,
    *("preset", "data_path", "mode"),
    *("gptq_calibration_batches", "fp16_elements", "scale_grid"),
    "ttt_cuda_graphs",
)

# ----------------------------------------------------------------------------------------------- in a worker process


def train_once(environment: dict[str, str], with_bytes: bool) -> dict[str, Any]:
    """One run of the script's own stages: bits per byte of the averaged weights, without quantization.

    A training that diverges has no `bpb`, and `error` says why.
    """
    config = t.config_from_env(environment, False)[0]
    run = t.start_run(config, {})
    result: dict[str, Any] = dict(bpb=None, bytes=None, parameters=t.parameter_count(config))
    loader, evaluator = t.TrainLoader(config, run), t.make_evaluator(config, run)
    try:
        trained = t.train_model(config, run, loader, evaluator)
    except t.ConfigError as error:
        return result | dict(error=str(error))
    seconds = trained.end.seconds
    result |= dict(bpb=trained.score.bpb, train_seconds=seconds, total_seconds=sum(run.seconds.values()))
    if with_bytes:
        weights = {name: p.detach() for name, p in trained.model.named_parameters()}
        result["bytes"] = len(t.make_artifact(weights, trained.calibration, 0, config, run.log))
    return result


class Steps:
    """A training of which single steps are computed, in order, at points spread over its whole length."""

    def __init__(self, config: t.Config, run: t.Run):
        self.config, self.tokens = config, 0
        self.trainer = t.Trainer(t.new_model(config), t.TrainLoader(config, run), config, run)
        forward = self.trainer.forward

        def counted(ids: Any, *rest: Any, **more: Any) -> Any:
            self.tokens += ids.numel()
            return forward(ids, *rest, **more)

        self.trainer.forward = counted
        self.step(0.0)  # allocates the optimizers' state
        self.tokens = 0

    def step(self, fraction: float) -> None:
        progress = t.Progress(int(fraction * self.config.iterations), 0.0)
        self.trainer.step(progress, *t.step_variant_at(progress, self.config))

    def seconds(self, fraction: float) -> float:
        """CPU seconds of the step: those of other processes do not count."""
        begin = time.process_time()
        self.step(fraction)
        return time.process_time() - begin


def points(count: int) -> list[float]:
    """The middles of equal parts of the training: each stands for its part, whatever schedule changes on the way."""
    return [(i + 0.5) / count for i in range(count)]


def measure(control: dict[str, str], idea: dict[str, str], count: int, rounds: int) -> dict[str, Any]:
    """FLOPs and tokens of a mean step of both, and the ratio of the idea's seconds to the control's in each round."""
    from torch.utils.flop_counter import FlopCounterMode

    configs = [t.config_from_env(environment, False)[0] for environment in (control, idea)]
    run = t.start_run(configs[0], {})
    flops, tokens = [], []
    for config in configs:
        steps = Steps(config, run)
        with FlopCounterMode(display=False) as counter:
            for fraction in points(count):
                steps.step(fraction)
        flops.append(counter.get_total_flops() / count)
        tokens.append(steps.tokens / count)
    ratios = []
    for number in range(rounds):
        pair = [Steps(config, run) for config in configs]
        spent = [0.0, 0.0]
        for fraction in points(count):
            for which in (0, 1) if number % 2 else (1, 0):
                spent[which] += pair[which].seconds(fraction)
        ratios.append(spent[1] / spent[0])
        seconds = [total / count for total in spent]
    return dict(flops=flops, tokens=tokens, ratios=ratios, seconds=seconds)


def work(job: dict[str, Any]) -> dict[str, Any]:
    """What a worker process does for a job, as JSON."""
    if job["what"] == "cost":
        return measure(job["control_environment"], job["environment"], job["points"], job["rounds"])
    return train_once(job["environment"], job["with_bytes"])


# ------------------------------------------------------------------------------------------------------- what to run


class NotPossible(Exception):
    """A row that this version of train_gpt.py, or this size, does not have. The text says why."""


class Job(NamedTuple):
    """One thing for a worker to do. `record`: what its line in the results says besides the outcome."""

    key: str
    record: dict[str, Any]
    order: dict[str, Any]  # for `work`
    seconds: float  # expected


def digest(value: Any) -> str:
    """A short name of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def data_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of the shards and the tokenizer. The manifest has more: when they were made."""
    files = sorted([*folder.glob("*.bin"), *folder.glob("tokenizer.model")])
    return digest([(path.name, t.sha256_of(path)) for path in files])


def configured(environment: dict[str, str]) -> t.Config:
    """The configuration of an environment. Errors: NotPossible for a knob or value that this version does not have."""
    known = {field.name.upper() for field in dataclasses.fields(t.Config)}
    unknown = sorted(set(environment) - known)
    if unknown:
        raise NotPossible("not in this version: " + ", ".join(unknown))
    try:
        return t.config_from_env(environment, False)[0]
    except t.ConfigError as error:
        raise NotPossible(f"not in this version: {error}") from None


def trained_settings(config: t.Config) -> dict[str, Any]:
    """All that decides a run and is not a default. So a new knob, left at its default, repeats nothing."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    return {n: v for n, v in values.items() if n not in OUTSIDE and v != defaults[n]}


def time_ratio(ratios: list[float]) -> float:
    """Seconds of an idea's step over the control's: the median of the rounds, or 1 if the rounds cannot tell which is
    faster, and the median is within 3%."""
    ratio = statistics.median(ratios)
    return 1.0 if min(ratios) <= 1 <= max(ratios) and abs(ratio - 1) <= UNRESOLVED else ratio


def equal_steps(control: int, ratio: float) -> int:
    """Steps that cost what `control` steps of the control cost, where one step costs `ratio` times as much.

    Within 1% of the control's steps, they are the control's.
    """
    steps = max(1, round(control / ratio))
    return control if abs(steps - control) <= NEAR * control else steps


class Lab:
    """The results so far, and what is missing from them."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.deadline = time.monotonic() + 3600 * options.hours
        self.results = lab_report.read_results(options.results)
        self.by_key = {record["key"]: record for record in self.results if not record.get("copied")}
        self.lock = threading.Lock()
        self.folders: dict[int, tuple[Path, str]] = {}
        self.failed: list[str] = []
        self.notes: dict[str, str] = {}  # rows that are not run at any size, or not any more, and why

    # ---- settings of a run

    def data(self, vocabulary: int) -> tuple[Path, str]:
        """The folder of the built-in corpus in this vocabulary, made if needed, and the digest of its content."""
        if vocabulary not in self.folders:
            folder = Path(f"{self.options.data}_{vocabulary}")
            if not (folder / "manifest.json").is_file():
                command = [sys.executable, str(ROOT / "data" / "prepare.py"), "builtin", "--out", str(folder)]
                done = processes.run([*command, "--vocab-size", str(vocabulary), "--val-fraction", "0.02"])
                if done.returncode:
                    raise RuntimeError(f"data/prepare.py: {(done.stdout + done.stderr)[-600:]}")
            self.folders[vocabulary] = folder, data_digest(folder)
        return self.folders[vocabulary]

    def environment(self, name: str, size: ideas.Size, seed: int, steps: int, factor: float = 1.0) -> dict[str, str]:
        """The settings of a run. Errors: NotPossible."""
        row = ideas.Row({}) if name == CONTROL else ideas.ROWS[name]
        by_size = row.by_size(size) if row.by_size else {}
        if by_size is None:
            raise NotPossible("does not fit this size")
        values = {**ideas.BASE, **size.knobs(), **ideas.RECIPE, **row.changes, **by_size}
        values |= dict(SEED=seed, ITERATIONS=steps)
        config = configured({knob: str(value) for knob, value in values.items()})
        if factor != 1:
            values |= {rate: factor * getattr(config, rate.lower()) for rate in row.bracket}
        values["DATA_PATH"] = self.data(self.vocabulary(name))[0]
        return {knob: str(value) for knob, value in values.items()}

    def vocabulary(self, name: str) -> int:
        return (0 if name == CONTROL else ideas.ROWS[name].vocabulary) or ideas.VOCABULARY

    def run_key(self, name: str, environment: dict[str, str]) -> str:
        """The name of a run: what was trained, on what data."""
        return digest(
            ["run", ideas.VERSION, trained_settings(configured(environment)), self.data(self.vocabulary(name))[1]]
        )

    # ---- jobs

    def cost_job(self, name: str, size: ideas.Size) -> Job:
        """Measures the steps of an idea beside the control's."""
        seed = self.options.seeds[0]
        control = self.environment(CONTROL, size, seed, size.steps)
        idea = self.environment(name, size, seed, size.steps)
        settings = [trained_settings(configured(e)) | dict(seed=0) for e in (control, idea)]
        shape = dict(points=self.options.points, rounds=self.options.rounds)
        key = digest(["cost", ideas.VERSION, settings, shape, self.data(self.vocabulary(name))[1]])
        order = dict(what="cost", control_environment=control, environment=idea, **shape)
        record = dict(what="cost", row=name, size=size.name, control_steps=size.steps, recipe=ideas.RECIPE)
        expected = size.seconds / size.steps * shape["points"] * (2 * shape["rounds"] + 2)
        return Job(key, record, order, expected)

    def run_job(self, name: str, size: ideas.Size, seed: int, kinds: list[str], steps: int, factor: float) -> Job:
        """Trains and scores once. `kinds`: what it counts for, equal FLOPs, equal seconds or the choice of a rate."""
        environment = self.environment(name, size, seed, steps, factor)
        control = self.environment(CONTROL, size, seed, size.steps)
        key = self.run_key(name, environment)
        cost = self.cost(name, size)
        record = dict(
            what="run",
            row=name,
            size=size.name,
            seed=seed,
            kinds=kinds,
            steps=steps,
            factor=factor,
            control=self.run_key(CONTROL, control),
            recipe=ideas.RECIPE,
            settings=trained_settings(configured(environment)),
            data=self.data(self.vocabulary(name))[1],
            tokens=round(steps * (cost["tokens"][1] if cost else size.batch_tokens)),
        )
        with_bytes = self.options.bytes and seed == self.options.seeds[0] and "flops" in kinds
        order = dict(what="run", environment=environment, with_bytes=with_bytes)
        return Job(key, record, order, self.expected_seconds(name, size, steps))

    def expected_seconds(self, name: str, size: ideas.Size, steps: int) -> float:
        """Of a run: as measured of such runs, or else of the control's, or else as bench/lab_ideas.py estimates."""
        for row in (name, CONTROL):
            of_row = [
                r for r in self.by_key.values() if r["what"] == "run" and (r["row"], r["size"]) == (row, size.name)
            ]
            rates = [r["total_seconds"] / r["steps"] for r in of_row if "total_seconds" in r]
            if rates:
                return steps * statistics.median(rates)
        return size.seconds * steps / size.steps

    def cost(self, name: str, size: ideas.Size) -> dict[str, Any] | None:
        """What was measured of an idea's steps at a size."""
        return None if name == CONTROL else self.by_key.get(self.cost_job(name, size).key)

    def tuning_jobs(self, name: str) -> list[Job]:
        """A run at the smallest size for each factor of the rates that the idea may change."""
        if not ideas.ROWS[name].bracket:
            return []
        size = ideas.SIZES[0]
        return [self.run_job(name, size, TUNING_SEED, ["tuning"], size.steps, factor) for factor in ideas.FACTORS]

    def factor(self, name: str) -> float:
        """The best factor of an idea's rates; 1 where they are not tuned."""
        if name == CONTROL:
            return 1.0
        scores = {job.record["factor"]: self.by_key.get(job.key, {}).get("bpb") for job in self.tuning_jobs(name)}
        found = {factor: bpb for factor, bpb in scores.items() if bpb is not None}
        return min(found, key=lambda factor: found[factor]) if found else 1.0

    def row_jobs(self, name: str, size: ideas.Size) -> list[Job]:
        """The runs of an idea at a size, for all seeds. None where its cost is not measured; to plan, two for each."""
        cost, factor = self.cost(name, size), self.factor(name)
        steps = dict(flops=size.steps, seconds=size.steps)
        if cost:
            steps["flops"] = equal_steps(size.steps, cost["flops"][1] / cost["flops"][0])
            steps["seconds"] = equal_steps(size.steps, time_ratio(cost["ratios"]))
        elif name != CONTROL and not self.options.dry:
            return []
        elif name != CONTROL:
            steps["seconds"] -= 1
        runs = [(["flops"], steps["flops"]), (["seconds"], steps["seconds"])]
        if steps["flops"] == steps["seconds"]:
            runs = [(["flops", "seconds"], size.steps if name == CONTROL else steps["flops"])]
        return [
            self.run_job(name, size, seed, kinds, count, factor) for seed in self.options.seeds for kinds, count in runs
        ]

    # ---- rows

    def usable(self, size: ideas.Size) -> list[str]:
        """The rows to run at a size, the most promising first, by what the next smaller size says."""
        standing = lab_report.differences(self.results)
        promise = {}
        for name in ideas.ROWS:
            if self.options.only and name not in self.options.only:
                continue
            try:
                idea = self.environment(name, size, 0, size.steps)
                control = self.environment(CONTROL, size, 0, size.steps)
            except NotPossible as problem:
                if str(problem).startswith("not in"):
                    self.notes[name] = str(problem)
                continue
            if trained_settings(configured(idea)) == trained_settings(configured(control)):
                self.notes[name] = "is what the recipe does"
                continue
            smaller = ideas.SIZES[: ideas.SIZES.index(size)]
            found = [standing[name][s.name] for s in smaller if s.name in standing.get(name, {})]
            if not any(lab_report.hopeless(cells) for cells in found):
                promise[name] = lab_report.mean_of(found[-1], "seconds") if found else 0.0
        return sorted(promise, key=lambda name: promise[name])

    def stages(self, size: ideas.Size) -> Iterator[list[Job]]:
        """Lists of jobs, each of which needs the results of those before it."""
        names = self.usable(size)
        yield [job for name in names for job in self.tuning_jobs(name)]
        yield [self.cost_job(name, size) for name in names]
        jobs = [job for name in (CONTROL, *names) for job in self.row_jobs(name, size)]
        if size == ideas.SIZES[0]:  # all rows get their first seed before any gets its second
            jobs.sort(key=lambda job: self.options.seeds.index(job.record["seed"]))
        yield jobs

    # ---- doing it

    def missing(self, jobs: list[Job]) -> dict[str, Job]:
        """Jobs that have no result yet, by key."""

        def done(job: Job) -> bool:
            found = self.by_key.get(job.key)
            return found is not None and (not job.order.get("with_bytes") or found.get("bytes") is not None)

        return {job.key: job for job in jobs if not done(job)}

    def do(self, jobs: list[Job]) -> None:
        """Runs what is missing, --jobs at a time, and writes its results. What another row has done is copied."""
        missing = self.missing(jobs)
        with ThreadPoolExecutor(self.options.jobs) as pool:
            list(pool.map(self.run_one, missing.values()))
        rows = {identity(record) for record in self.results}
        for job in jobs:
            found = self.by_key.get(job.key)
            if found and identity(job.record | dict(key=job.key)) not in rows:
                self.append(found | job.record | dict(key=job.key, copied=True))

    def run_one(self, job: Job) -> None:
        """Runs a job in a process of its own, unless the time is over."""
        if time.monotonic() > self.deadline:
            return
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, str(ROOT / "bench" / "lab.py"), "--job", json.dumps(job.order)]
        begin = time.monotonic()
        done = processes.run(command, cwd=ROOT, env=variables)
        label = " ".join(str(job.record[k]) for k in ("row", "size", "seed", "kinds") if k in job.record)
        try:
            outcome = json.loads(done.stdout.rstrip().splitlines()[-1])
        except (IndexError, ValueError):
            self.failed.append(label)
            print(f"error: {label}: exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}", file=sys.stderr)
            return
        record = job.record | dict(key=job.key, date=today(), machine=machine(), torch=t.torch.__version__) | outcome
        if record.get("train_seconds"):
            record["tokens_per_second"] = round(record["tokens"] / record["train_seconds"])
        self.append(record)
        print(f"{time.monotonic() - begin:5.0f}s {label}: {summary(record)}", flush=True)

    def append(self, record: dict[str, Any]) -> None:
        """Writes a result down, and takes note of it."""
        with self.lock:
            path = self.options.results
            torn = path.is_file() and t.cut_line(path)
            with open(path, "a") as file:
                file.write("\n" * torn + json.dumps(record) + "\n")
            self.results.append(record)
            if not record.get("copied"):
                self.by_key[record["key"]] = record


def identity(record: dict[str, Any]) -> str:
    """What a line of the results is about."""
    names = ("what", "row", "size", "seed", "kinds", "factor", "control", "recipe", "key")
    return digest({name: record.get(name) for name in names})


def summary(record: dict[str, Any]) -> str:
    """The outcome of a job, for the terminal."""
    if record["what"] == "cost":
        ratio = record["flops"][1] / record["flops"][0]
        seconds = statistics.median(record["ratios"])
        return f"a step has {ratio:.3f} of the control's FLOPs and {seconds:.3f} of its seconds"
    return record["error"] if record["bpb"] is None else f"{record['bpb']:.4f} bpb, {record['steps']} steps"


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def machine() -> str:
    return f"{t.available_cores()} cores of {t.cpu_info('model name')}"


# ------------------------------------------------------------------------------------------------------ command line


def write_report(lab: Lab) -> None:
    options, sizes = lab.options, [size.name for size in ideas.SIZES]
    text = lab_report.report(lab.results, lab.notes, sizes, options.about, options.results.name)
    t.write_atomic(options.report, text, durable=False)
    print(f"written: {options.report}")


def show_plan(lab: Lab, sizes: list[ideas.Size]) -> None:
    """What would run. Rows that have not been tried are taken to go on to every size, with two runs for each seed."""
    total = 0.0
    for size in sizes:
        for jobs in lab.stages(size):
            missing = list(lab.missing(jobs).values())
            seconds = sum(job.seconds for job in missing)
            total += seconds
            for what in sorted({(job.record["what"], job.record["row"]) for job in missing}):
                count = sum((job.record["what"], job.record["row"]) == what for job in missing)
                print(f"{size.name:5s} {what[0]:5s} {what[1]}: {count}")
    for name, why in lab.notes.items():
        print(f"{name}: {why}")
    print(f"at most {total / 3600 / lab.options.jobs:.1f} hours with {lab.options.jobs} at a time")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [size.name for size in ideas.SIZES]
    results = ROOT / "bench" / "results"
    parser.add_argument("--only", nargs="+", choices=list(ideas.ROWS), metavar="ROW", help="rows of bench/lab_ideas.py")
    parser.add_argument("--sizes", nargs="+", choices=names, default=ideas.USUAL)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--hours", type=float, default=math.inf, help="no run starts later; 0: only the report")
    parser.add_argument("--dry", action="store_true", help="only say what would run")
    parser.add_argument("--bytes", action="store_true", help="quantize and pack the first seed's models, too")
    parser.add_argument("--jobs", type=int, default=t.available_cores(), help="runs at a time, a thread each")
    parser.add_argument("--points", type=int, default=STEPS_MEASURED, help="steps that are measured in a round")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of timing, control and idea in turns")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "builtin_lab", help="folder, without _VOCABULARY")
    parser.add_argument("--about", default=lab_report.BUILTIN, help="what the text of --data is, for the report")
    parser.add_argument("--results", type=Path, default=results / "lab.jsonl")
    parser.add_argument("--report", type=Path, default=results / "lab.md")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.job:
        outcome = work(options.job) | dict(source=t.sha256_of(ROOT / "train_gpt.py"))
        print(json.dumps(outcome))
        return 0
    sizes = [size for size in ideas.SIZES if size.name in options.sizes]
    if options.dry:
        show_plan(Lab(options), sizes)
        return 0
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with open(options.results, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"error: another laboratory writes {options.results}", file=sys.stderr)
            return 2
        lab = Lab(options)
        try:
            for size in sizes:
                for jobs in lab.stages(size):
                    lab.do(jobs)
                write_report(lab)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 1 if lab.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        os._exit(130)  # the kernel ends the workers with this process
