"""Many runs in one process: memory, threads and open files stay what they were."""

from __future__ import annotations

import gc
import json
import os
import statistics
import threading
from pathlib import Path

import train_gpt as t
from faults.children import Child
from faults.trials import LOST, MISREPORTED, Skipped, Trial

RUNS = 30
GROWTH = 0.05  # of the memory, from the runs 10 to 15 to the last five: what the allocator still learns


def measure() -> tuple[int, int, int, int]:
    """(bytes in memory, threads of the system, threads of Python, open files) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads, files = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    return pages * os.sysconf("SC_PAGE_SIZE"), threads, threading.active_count(), files


def steady(trial: Trial) -> None:
    """30 runs of one mode in one process."""
    if not Path("/proc/self/statm").exists():
        raise Skipped("only Linux shows a process's memory")
    mode = trial.draw.choice(("stream", "stream", "chunk", "length"))
    figures = trial.folder / "figures"

    def body() -> int:
        t.__dict__["__file__"] = str(trial.inputs.script)
        for number in range(RUNS):
            knobs = trial.inputs.settings("tiny", mode, ARTIFACT_DIR=trial.folder / f"run-{number}")
            code = t.main([], {name: str(value) for name, value in knobs.items()})
            with open(figures, "a") as file:
                file.write(json.dumps([code, *measure()]) + "\n")
        return 0

    ended = Child(body, trial.inputs.environment(), trial.folder / "process").wait(trial_seconds())
    trial.need(trial.judge_end(ended, (0,)), LOST, "30 runs in one process did not end well")
    judge(trial, mode, [json.loads(line) for line in figures.read_text().splitlines()])


def trial_seconds() -> float:
    """How long the runs may take."""
    return 600.0


def judge(trial: Trial, mode: str, rows: list[list[int]]) -> None:
    """Compares runs 10 to 15 with the last five."""
    trial.expect(len(rows) == RUNS and not any(row[0] for row in rows), LOST, f"codes {[row[0] for row in rows]}")
    early, late = rows[9:15], rows[-5:]
    columns = list(zip(*early, strict=True)), list(zip(*late, strict=True))
    before, after = ([statistics.mean(column) for column in side] for side in columns)
    names = ("MiB", "threads", "threads of Python", "open files")
    first, second = [before[1] / 2**20, *before[2:]], [after[1] / 2**20, *after[2:]]
    text = ", ".join(f"{a:.1f} -> {b:.1f} {name}" for a, b, name in zip(first, second, names, strict=True))
    trial.note(f"measured: {mode}, runs 10-15 -> 26-30: {text}")
    trial.expect(second[0] <= first[0] * (1 + GROWTH), MISREPORTED, f"memory grows: {text}")
    for number, name in enumerate(names[1:], 1):
        trial.expect(second[number] <= first[number] + 0.5, MISREPORTED, f"{name} grow: {text}")
