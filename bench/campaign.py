"""A campaign against the whole project: kills, signals, lost ranks, full disks, damage, explosions, hostile files.

    make campaign ARGS="--minutes 20 --seed 1"
    python bench/campaign.py --kinds kill,disks --minutes 5 --report bench/results/campaign.md
    python bench/campaign.py --seed 1 --only kill:17       # one trial again, with everything that it printed

Each trial draws its input from the seed, its kind and its number. It makes an input, does something to it, and judges
what came of it: survived, lost (work that was finished is gone), misreported (a wrong figure, a wrong exit code, a
traceback instead of a line), or hung. docs/robustness.md explains the table. Exit code: 0 if everything survived, 1 if
something did not, 2 for a user's error.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tools"), str(ROOT / "bench")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import torch._dynamo  # noqa: E402, F401  # what runs import late is imported once, here
import torch.distributed  # noqa: E402, F401
import torch.optim.adamw  # noqa: E402, F401

import processes  # noqa: E402
import train_gpt as t  # noqa: E402
from faults import kinds, tally  # noqa: E402
from faults.children import Child  # noqa: E402
from faults.inputs import Inputs  # noqa: E402
from faults.trials import HUNG, MISREPORTED, Kind, Skipped, Stop, Trial  # noqa: E402

SAVE_SECONDS = 60.0
LEAST = 3  # trials of each kind, before chance chooses


def make(kind: Kind, number: int, seed: int, inputs: Inputs, keep: bool = False) -> dict:
    """Makes one trial. Returns its row."""
    folder = inputs.work / "trials" / f"{kind.name}-{number}"
    begin = time.monotonic()
    trial = Trial(kind.name, number, seed, folder, inputs)
    try:
        kind.run(trial)
    except Skipped as reason:
        return dict(kind=kind.name, number=number, verdict="skipped", findings=[], notes=[str(reason)], seconds=0.0)
    except Stop:
        pass
    except Exception as error:  # what the run left cannot even be judged
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"the judge failed: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        trial.find(MISREPORTED, text)
        if keep:
            traceback.print_exc()
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    findings = [(verdict, short(text, inputs)) for verdict, text in trial.findings]
    return trial.row() | dict(findings=findings, seconds=time.monotonic() - begin)


def short(text: str, inputs: Inputs) -> str:
    """A finding without the folders of this machine."""
    for folder in (inputs.work, Path(sys.prefix), ROOT):  # the environment may lie inside the repository
        text = text.replace(f"{folder}/", "")
    return text


def work(pipe, inputs: Inputs, seed: int, chosen: dict[str, Kind], parent: int) -> None:
    """A worker: makes the trials that it is told, one after another. It never computes itself, as it forks."""
    processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
    processes.follow_parent(parent, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        name, number = pipe.recv()
        pipe.send(make(chosen[name], number, seed, inputs))


class Worker:
    """A worker process and the trial that it makes."""

    def __init__(self, inputs: Inputs, seed: int, chosen: dict[str, Kind]):
        self.pipe, other = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=work, args=(other, inputs, seed, chosen, os.getpid()))
        self.process.start()
        self.trial: tuple[str, int] | None = None
        self.deadline = 0.0

    def begin(self, kind: Kind, number: int) -> None:
        """Gives it a trial."""
        self.trial, self.deadline = (kind.name, number), time.monotonic() + kind.seconds
        self.pipe.send(self.trial)

    def result(self) -> dict | None:
        """The row of its trial, if that has ended, by itself or because its time is up."""
        name, number = self.trial or ("", 0)
        row = None
        if self.pipe.poll():
            try:
                row = self.pipe.recv()
            except EOFError:
                row = dict(verdict=HUNG, findings=[(HUNG, "the worker of the campaign died")], notes=[], seconds=0.0)
        elif time.monotonic() > self.deadline:
            self.end()
            row = dict(verdict=HUNG, findings=[(HUNG, "the trial took too long")], notes=[], seconds=0.0)
        if row is not None:
            self.trial = None
            return dict(row, kind=name, number=number)
        return None

    def end(self) -> None:
        """Ends it with all that it started."""
        if self.process.pid and self.process.is_alive():
            processes.kill_all([*processes.descendants(self.process.pid), self.process.pid])
        self.process.join()


def schedule(chosen: dict[str, Kind], seed: int):
    """Which trial is next, for ever: kinds by their weights, each with numbers from 0 on."""
    draw, counts = random.Random(seed), Counter()
    first = [kind for _ in range(LEAST) for kind in chosen.values()]  # in rounds, so that no kind is left out
    while True:
        left = [kind for kind in chosen.values() if counts[kind.name] < kind.at_most]
        if not left:
            return
        kind = first.pop(0) if first else draw.choices(left, [kind.weight for kind in left])[0]
        yield kind, counts[kind.name]
        counts[kind.name] += 1


def campaign(options: argparse.Namespace, chosen: dict[str, Kind], inputs: Inputs, save: Callable) -> list[dict]:
    """Makes trials until time is up. Returns their rows, which `save` is also given once a minute."""
    rows: list[dict] = []
    saved = time.monotonic()
    deadline, plan = time.monotonic() + 60 * options.minutes, schedule(chosen, options.seed)
    workers = [Worker(inputs, options.seed, chosen) for _ in range(options.jobs)]
    begun, following = 0, next(plan, None)
    try:
        while True:
            for place, worker in enumerate(workers):
                row = worker.result() if worker.trial else None
                if row:
                    rows.append(row)
                    show(row, options.verbose)
                over = time.monotonic() > deadline or begun >= options.trials
                if worker.trial is None and following and not over:
                    if not worker.process.is_alive():
                        workers[place] = worker = Worker(inputs, options.seed, chosen)
                    worker.begin(*following)
                    begun, following = begun + 1, next(plan, None)
            if not any(worker.trial for worker in workers):
                return rows
            if time.monotonic() > saved + SAVE_SECONDS:
                saved = time.monotonic()
                save(rows)
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("interrupted: what was tried so far counts", file=sys.stderr)
        return rows
    finally:
        for worker in workers:
            worker.end()


def show(row: dict, verbose: bool) -> None:
    """Prints what went wrong in a trial, or every trial."""
    if verbose or row["findings"]:
        findings = "; ".join(f"{verdict}: {text}" for verdict, text in row["findings"])
        notes = ", ".join(row["notes"])
        name = f"{row['kind']}:{row['number']}"
        print(f"{name} ({row['seconds']:.1f} s; {notes}) {findings or row['verdict']}", flush=True)


def write(options: argparse.Namespace, arguments: list[str], chosen: dict[str, Kind], begun: float, rows: list) -> None:
    """Writes the files that were asked for."""
    about = dict(seed=options.seed, command=shlex.join(["python", "bench/campaign.py", *arguments]), begun=begun)
    if options.report:
        t.write_atomic(options.report, tally.page(rows, chosen, about | dict(seconds=time.time() - begun)))
    if options.json:
        t.write_atomic(options.json, json.dumps(about | dict(rows=rows), indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="campaign.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--seed", type=int, default=1, help="of the trials (default: 1)")
    add("--minutes", type=float, default=20.0, help="after which no trial begins (default: 20)")
    add("--trials", type=int, default=1_000_000, help="after which no trial begins (default: no limit)")
    add("--kinds", default=",".join(kinds.KINDS), help="comma-separated (default: all): %(default)s")
    add("--only", metavar="KIND:NUMBER", help="one trial, whose files are kept")
    add("--jobs", type=int, default=t.available_cores(), help="trials at a time (default: one for each core)")
    add("--report", type=Path, metavar="PATH", help="Markdown to write")
    add("--json", type=Path, metavar="PATH", help="all rows, as JSON")
    add("--work", type=Path, metavar="DIR", help="folder for everything (default: a temporary one, removed at the end)")
    add("--verbose", action="store_true", help="a line for each trial")
    options = parser.parse_args(arguments)
    names = [options.only.partition(":")[0]] if options.only else options.kinds.split(",")
    unknown = [name for name in names if name not in kinds.KINDS]
    if unknown:
        parser.error(f"unknown kinds: {', '.join(unknown)}; there are {', '.join(kinds.KINDS)}")
    options.names = names
    return options


def main(arguments: list[str]) -> int:
    """Runs the campaign. Returns the exit code."""
    options = parse(arguments)
    begun, place = time.time(), options.work or Path(tempfile.mkdtemp(prefix="campaign-"))
    place.mkdir(parents=True, exist_ok=True)
    place.chmod(0o755)  # for trials as another user
    chosen = {name: kinds.KINDS[name] for name in options.names}
    try:
        inputs = Inputs(place.resolve())
        inputs.prepare()
        if options.only:
            processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
            Child.shown = True
            number = int(options.only.partition(":")[2] or 0)
            rows = [make(chosen[options.names[0]], number, options.seed, inputs, keep=True)]
            show(rows[0], True)
            return int(bool(rows[0]["findings"]))
        save = functools.partial(write, options, arguments, chosen, begun)
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)  # it ends what a worker that died had started, too
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was tried so far counts
        rows = campaign(options, chosen, inputs, save)
        processes.kill_all(processes.descendants(os.getpid()))
    finally:
        if not (options.work or options.only):
            shutil.rmtree(place, ignore_errors=True)
    print(tally.table(rows, chosen))
    save(rows)
    return int(any(row["findings"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
