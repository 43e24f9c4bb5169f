"""Signals, and ranks that are killed, stopped or stuck: everything ends within a minute, with one line, or goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import processes
import train_gpt as t
from faults import events
from faults.children import END_SECONDS
from faults.events import Watcher
from faults.inputs import MODES, differences, results
from faults.kills import judge_files
from faults.trials import HUNG, LOST, MISREPORTED, Skipped, Trial

ENDING = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP, "SIGQUIT": signal.SIGQUIT}
SOON = dict(stopped=3.0, idle=6.0, silent=8.0, arrival=15.0, tick=0.25)  # of the watchdog, in most trials


def has_watchdog() -> bool:
    """Whether this version watches its ranks."""
    return hasattr(t, "Watchdog")


def signals(trial: Trial) -> None:
    """A signal that ends a run, to one process or to all, perhaps twice; then the same command to the end."""
    mode, ranks = trial.draw.choice(list(MODES)), trial.draw.choice((1, 1, 2))
    if ranks == 2 and not has_watchdog():
        ranks = 1
    reference, folder = trial.inputs.reference("tiny", mode, ranks), trial.folder / "run"
    knobs = trial.inputs.settings("tiny", mode, ARTIFACT_DIR=folder)
    name = trial.draw.choice(list(ENDING))
    child = trial.inputs.start(knobs, trial.folder / "first", ranks=ranks)
    moment = trial.draw.uniform(0, 1.05) * reference.seconds
    child.wait_for(lambda: False, moment)
    target = trial.draw.choice((None, *range(ranks)))
    times = trial.draw.choice((1, 1, 2, 5))
    trial.note(f"{mode}, {ranks} ranks: {times} x {name} to {'all' if target is None else target} after {moment:.2f} s")
    for _ in range(times):
        if not child.poll():
            child.send(ENDING[name], target)
            time.sleep(trial.draw.choice((0, 0.01, 0.2)))
    ended = child.wait()
    number = -int(ENDING[name])
    if trial.judge_end(ended, (0, number, 128 - number, 4), what=f"the run after {name}"):
        lines = [line for line in ended.err.splitlines() if line.strip() and not line.startswith("warning: ")]
        if target == 0 and ranks == 2:  # the other one does not know it yet, and says in vain whom it waits for
            lines = [line for line in lines if not line.startswith("error: rank 0 does not answer at")]
        trial.expect(len(set(lines)) <= 1, MISREPORTED, f"{name} makes {len(lines)} lines: {ended.err[:300]!r}")
    if ended.code:
        ended = trial.inputs.start(knobs, trial.folder / "second", ranks=ranks).wait(120)
        over = "already holds a run" in ended.err and (folder / "summary.json").exists()
        if over or not trial.judge_end(ended, (0,), what="the same command after the signal"):
            return
    wrong = differences(results(folder), reference.results)
    trial.expect(not wrong, MISREPORTED, f"not as the undisturbed run: {wrong}")
    judge_files(trial, folder)


def pauses(trial: Trial) -> None:
    """SIGSTOP and, a little later, SIGCONT: nothing changes. Then signals that mean nothing to a run."""
    mode = trial.draw.choice(list(MODES))
    reference, folder = trial.inputs.reference("tiny", mode), trial.folder / "run"
    child = trial.inputs.start(trial.inputs.settings("tiny", mode, ARTIFACT_DIR=folder), trial.folder / "attempt")
    for _ in range(trial.draw.randint(1, 4)):
        child.wait_for(lambda: False, trial.draw.uniform(0, 0.5) * reference.seconds)
        child.send(signal.SIGSTOP)
        time.sleep(trial.draw.uniform(0, 0.7))
        child.send(signal.SIGCONT)
        child.send(trial.draw.choice((signal.SIGCONT, signal.SIGWINCH, signal.SIGCHLD, signal.SIGURG)))
    if trial.judge_end(child.wait(), (0,)):
        wrong = differences(results(folder), reference.results)
        trial.expect(not wrong, MISREPORTED, f"not as the undisturbed run: {wrong}")


FAULTS: dict[str, Callable[[], None]] = {
    "killed": events.kill_self,
    "stopped": events.stop_self,
    "stuck": events.hang,
    "in error": events.raise_error,
}


def lost_rank(trial: Trial) -> None:
    """A rank that is killed, stopped, stuck or in error at an event of any stage: the others end, with one line."""
    if not has_watchdog():
        raise Skipped("this version does not watch its ranks")
    mode, ranks = trial.draw.choice(list(MODES)), trial.draw.choice((2, 2, 3))
    reference = trial.inputs.reference("tiny", mode)
    lost, fault = trial.draw.randrange(ranks), trial.draw.choice(list(FAULTS))
    stages = sorted({line.split(" ")[1] for line in reference.events} - {"start"})
    everywhere = ("data", "audit", "setup", "warmup", "train", "validate", "unpack", "evaluate", "ttt")
    stage = trial.draw.choice([s for s in stages if s in everywhere or lost == 0])
    inside = ("step", "score_sequences", "run_batch", "calibration_sums") if trial.draw.random() < 0.4 else ()
    name = next((e.split(" ")[0] for e in reference.events if e.endswith(f" {stage}") and e.startswith(inside)), "")
    name = name if inside and lost == 0 else "__enter__"  # the other ranks may not have such an event
    limits = SOON if trial.draw.random() < 0.85 else {}
    when = f"{name} of {stage}, {'soon' if limits else 'the real limits'}"
    trial.note(f"{mode}: rank {lost} of {ranks} is {fault} at {when}")
    folder = trial.folder / "run"
    batch = dict(TRAIN_BATCH_TOKENS=768) if ranks == 3 else {}
    knobs = trial.inputs.settings("tiny", mode, ARTIFACT_DIR=folder, **batch)
    watcher = Watcher(None, 1, FAULTS[fault], name or "__enter__", stage)

    def before() -> None:
        t.Watchdog.LIMITS = t.RankLimits(**limits)

    child = trial.inputs.start(knobs, trial.folder / "attempt", watcher, ranks=ranks, watched=lost, before=before)
    ended = child.wait(END_SECONDS + 15)  # and the time before the fault
    trial.expect(not ended.hung and not ended.orphans, HUNG, f"the ranks did not end: {ended.describe()}")
    others = [code for rank, code in enumerate(ended.codes) if rank != lost]
    right = (4,) if fault != "in error" else (1, 4)
    trial.expect(all(c in right for c in others), MISREPORTED, f"codes {ended.codes}, rank {lost} was {fault}")
    lines = [line for line in ended.err.splitlines() if line.startswith(("error:", "interrupted"))]
    named = len(lines) == 1 and f"rank {lost} " in lines[0] and f"stage {stage}" in lines[0]
    trial.expect(named, MISREPORTED, f"said: {ended.err[-400:]!r}; rank {lost} was {fault} in {stage}")
    traced = "Traceback" in ended.err and fault != "in error"
    trial.expect(not traced, MISREPORTED, f"a traceback: {ended.err[-300:]!r}")
    if (folder / "checkpoint" / t.JOURNAL_FILE).exists():
        again = trial.inputs.start(knobs, trial.folder / "again", ranks=ranks).wait(120)
        trial.judge_end(again, (0,), what="the same command after a rank was lost")


def launcher(trial: Trial) -> None:
    """torchrun itself: killed, ended or interrupted; a rank of it killed. No process is left."""
    if not has_watchdog():
        raise Skipped("this version does not watch its ranks")
    folder, way = trial.folder / "run", trial.draw.choice(("SIGKILL", "SIGTERM", "SIGINT", "a rank", "nothing"))
    trial.note(way)
    knobs = trial.inputs.settings("tiny", "plain", ARTIFACT_DIR=folder, ITERATIONS=8 if way == "nothing" else 100_000)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(trial.inputs.script)]
    out = trial.folder / "out"
    with open(out, "wb") as file:
        environment = trial.inputs.environment(**knobs)
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (folder / "log.txt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(trial.draw.uniform(0, 2))
    ranks = [pid for pid in processes.descendants(process.pid) if b"train_gpt" in command_line(pid)]
    if way == "a rank" and ranks:
        os.kill(trial.draw.choice(ranks), signal.SIGKILL)
    elif way != "nothing":
        os.kill(process.pid, getattr(signal, way if way.startswith("SIG") else "SIGTERM"))
    end = time.monotonic() + END_SECONDS + 10
    while (process.poll() is None or any(map(alive, ranks))) and time.monotonic() < end:
        collect()
        time.sleep(0.1)
    # By name: a process that has ended may have left its number to a stranger.
    left = [pid for pid in ranks if alive(pid) and b"train_gpt" in command_line(pid)]
    if process.poll() is None:
        left += [process.pid, *processes.descendants(process.pid)]
    processes.kill_all(left)
    process.wait()
    trial.expect(not left, HUNG, f"{len(left)} processes did not end within {END_SECONDS:.0f} s after {way}")
    text = out.read_text(errors="replace")
    if way == "nothing":
        trial.expect(process.returncode == 0, LOST, f"torchrun ended with {process.returncode}: {text[-300:]}")
    elif way in ("a rank", "SIGKILL"):
        lines = re.findall(r"^(?:\[\S+\]:)?error: .*", text, re.M)
        trial.expect(len(lines) == 1, MISREPORTED, f"{len(lines)} lines of the ranks: {text[-400:]!r}")
    else:
        lines = re.findall(r"^(?:\[\S+\]:)?(?:error: ended by SIGTERM|interrupted).*", text, re.M)
        trial.expect(len(lines) <= 1, MISREPORTED, f"{len(lines)} lines of the ranks: {text[-400:]!r}")
        for step in re.findall(r"after step (\d+); the same command goes on$", "\n".join(lines), re.M):
            kept = folder / "checkpoint" / t.checkpoint_name(int(step))
            trial.expect(kept.is_file(), LOST, f"the checkpoint of step {step} is not there")
        told = "after step" in "".join(lines) or "step:1/" not in text
        trial.expect(told, LOST, f"{way} ends a training without a checkpoint: {text[-300:]!r}")


def command_line(pid: int) -> bytes:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def collect() -> None:
    """Collects orphans that have ended, which this process gets as a subreaper."""
    for pid in processes.descendants(os.getpid()):
        if not alive(pid) and Path(f"/proc/{pid}").exists():
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                os.waitpid(pid, os.WNOHANG)
