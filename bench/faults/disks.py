"""Full, broken and vanishing disks, closed streams, runs at once: the model is kept, and what is where is said."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train_gpt as t
from faults.children import Child, Ended, limit_files
from faults.inputs import MODES, Reference, differences, results
from faults.trials import LOST, MISREPORTED, Skipped, Trial

CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir", "stat", "rename", "close")
CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.ESTALE, errno.ENFILE)
FILES = (
    "log.txt",
    "metrics.jsonl",
    "config.json",
    "summary.json",
    t.CONTAINER_FILE,
    "scores_",
    "step-",
    "run.json",
    "",
)


class Faults:
    """Makes calls of the system fail for files below a folder, from the `first` such call on, `count` times."""

    def __init__(self, code: int, calls: tuple[str, ...], names: tuple[str, ...], below: Path, first: int, count: int):
        self.code, self.calls = code, calls
        self.names, self.below = names, os.path.realpath(below)
        self.first, self.count = first, count
        self.seen = 0

    def install(self) -> None:
        """From now on, in this process."""
        for name in self.calls:
            setattr(os, name, self.failing(getattr(os, name)))

    def failing(self, real: Callable) -> Callable:
        def call(*arguments, **options):
            if arguments and self.hits(arguments):
                self.seen += 1
                if self.first <= self.seen < self.first + self.count:
                    raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **options)

        return call

    def hits(self, arguments: tuple[Any, ...]) -> bool:
        """Whether a call is about such a file."""
        first, *others = arguments
        target = others[0] if others and isinstance(others[0], str | Path) else first
        with contextlib.suppress(OSError, TypeError, ValueError):
            path = os.path.realpath(f"/proc/self/fd/{target}" if isinstance(target, int) else os.fspath(target))
            return path.startswith(self.below) and os.path.basename(path).startswith(self.names)
        return False


def settings(trial: Trial, reference_mode: str, folder: Path) -> dict:
    """A run with checkpoints or without."""
    every = trial.draw.choice((1e-9, 0.3, 0))
    return trial.inputs.settings("tiny", reference_mode, ARTIFACT_DIR=folder, CHECKPOINT_EVERY_SECONDS=every)


def shorten_patience() -> None:
    """A model that no disk takes is tried again for seconds, not for minutes."""
    t.RESCUE_SECONDS = 2.0


def named_places(ended: Ended, trial: Trial) -> list[Path]:
    """The files that stderr says are elsewhere."""
    words = re.findall(r"(?:written to|elsewhere are|,) (/\S+?)(?= instead|,|$)", ended.err, re.M)
    return [path for path in map(Path, words) if path.is_file()]


def judge(trial: Trial, ended: Ended, folder: Path, reference: Reference, refusable: bool = True) -> None:
    """Code 0 and everything in the folder, 3 and the model in a named place, or 2 before anything was computed."""
    if not trial.judge_end(ended, (0, 2, 3) if refusable else (0, 3)):
        return
    places = named_places(ended, trial)
    if ended.code == 2:
        begun = "step:" in ended.out and "could not be written anywhere, and is lost" not in ended.err
        trial.expect(not begun, LOST, f"the run gave up in the middle: {ended.err[:300]}")
    elif ended.code == 0:
        wrong = differences(results(folder), reference.results)
        trial.expect(not wrong, MISREPORTED, f"not as the undisturbed run: {wrong}")
        log = (folder / "log.txt").read_text().splitlines()
        complete = not ended.out or log == ended.out.splitlines()
        trial.expect(complete, LOST, f"log.txt has {len(log)} lines, stdout {len(ended.out.splitlines())}")
    else:
        judge_elsewhere(trial, ended, folder, reference, places)


def judge_elsewhere(trial: Trial, ended: Ended, folder: Path, reference: Reference, places: list[Path]) -> None:
    """What code 3 promises: stderr names what is where, and the model and its score are right."""
    trial.expect(ended.err.strip(), MISREPORTED, "code 3, and nothing on stderr")
    models = [p for p in (*places, folder / t.CONTAINER_FILE) if p.name == t.CONTAINER_FILE and p.is_file()]
    said_lost = "nor anywhere else" in ended.err
    if trial.expect(models or said_lost, LOST, f"the model is nowhere: {ended.err[:400]}") and models:
        digests = {t.sha256_of(path) for path in models}
        right = digests == {reference.results[t.CONTAINER_FILE]}
        trial.expect(right, MISREPORTED, "the model that was kept is another one")
    for path in [p for p in (*places, folder / "summary.json") if p.name == "summary.json" and p.is_file()]:
        bpb = json.loads(path.read_text())["val_bpb"]
        same = bpb == reference.results["val_bpb"]
        trial.expect(same, MISREPORTED, f"val_bpb is {bpb} instead of {reference.results['val_bpb']}")


def sweep_shared_memory(trial: Trial) -> None:
    """Removes what a trial rescued to shared memory. The run's folder has a name that is only its own."""
    for path in Path("/dev/shm").glob(f"{run_folder(trial).name}-rescued-*"):
        shutil.rmtree(path, ignore_errors=True)


def run_folder(trial: Trial) -> Path:
    """The folder of a trial's run, of a name by which what it rescues is found."""
    return trial.folder / f"run-{os.getpid()}-{trial.kind}-{trial.number}"


def calls_fail(trial: Trial) -> None:
    """Calls of the system fail: for one file or all, once, for a while or for ever, in the folder or everywhere."""
    mode = trial.draw.choice(("plain", "plain", *MODES))
    reference, folder = trial.inputs.reference("tiny", mode), run_folder(trial)
    draw = trial.draw
    code, calls = draw.choice(CODES), tuple(draw.sample(CALLS, draw.choice((1, 1, 2, len(CALLS)))))
    names = tuple(draw.sample(FILES, draw.choice((1, 1, 2))))
    first, count = draw.choice((1, 1, 2, 5, 20)), draw.choice((1, 3, 20, 10**9))
    below = draw.choice((folder, folder, folder, trial.folder))
    trial.note(
        f"{mode}: {errno.errorcode[code]} of {calls} for {names} in {below.name}, {first} to {first + count - 1}"
    )

    def before() -> None:
        shorten_patience()
        Faults(code, calls, names, below, first, count).install()

    child = trial.inputs.start(settings(trial, mode, folder), trial.folder / "attempt", before=before)
    judge(trial, child.wait(), folder, reference)
    sweep_shared_memory(trial)


def file_limit(trial: Trial) -> None:
    """A real limit of the bytes of a file, from a random moment on, for a while or for ever."""
    mode = trial.draw.choice(("plain", "plain", *MODES))
    reference, folder = trial.inputs.reference("tiny", mode), run_folder(trial)
    size = reference.folder.joinpath(t.CONTAINER_FILE).stat().st_size
    limit = int(trial.draw.choice((0, 100, 1000, 5000, size - 1, size, 2 * size)))
    begin = trial.draw.choice((0.0, trial.draw.uniform(0, 1) * reference.seconds))
    length = trial.draw.choice((0.2, 1.0, 1e9))
    trial.note(f"{mode}: files of at most {limit} bytes after {begin:.2f} s, for {length:g} s")

    def change() -> None:
        time.sleep(begin)
        limit_files(limit)
        time.sleep(min(length, 1e6))
        limit_files(-1)

    def before() -> None:
        shorten_patience()
        for number in (1, 2):  # what is captured is no file of the run
            pipe_to_parent(number, trial.folder / "attempt")
        threading.Thread(target=change, daemon=True).start()

    child = trial.inputs.start(settings(trial, mode, folder), trial.folder / "attempt", before=before)
    judge(trial, child.wait(), folder, reference)
    sweep_shared_memory(trial)


def pipe_to_parent(number: int, folder: Path) -> None:
    """Lets a small process write a stream to its file, so that no limit of this process's files ends it."""
    target = os.open(folder / {1: "stdout", 2: "stderr"}[number], os.O_WRONLY | os.O_APPEND)
    read, write = os.pipe()
    if not os.fork():
        os.setpgid(0, 0)
        os.close(write)
        for other in (1, 2):
            os.dup2(target, other)
        while data := os.read(read, 1 << 16):
            os.write(target, data)
        os._exit(0)
    os.dup2(write, number)
    for descriptor in (read, write, target):
        os.close(descriptor)


def small_disk(trial: Trial) -> None:
    """A disk of its own that is filled at a random moment, and perhaps freed later."""
    if os.geteuid() or not shutil.which("mount"):
        raise Skipped("mounting a small disk needs root")
    reference = trial.inputs.reference("tiny", "plain")
    mount = trial.folder / "disk"
    mount.mkdir()
    kilobytes = trial.draw.choice((16, 64, 256, 1024))
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k,nr_inodes={trial.draw.choice((20, 1000))}", "x", mount],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        raise Skipped("a small disk cannot be mounted here")
    folder = mount / run_folder(trial).name
    try:
        knobs = settings(trial, "plain", folder)
        child = trial.inputs.start(knobs, trial.folder / "attempt", before=shorten_patience)
        moment = trial.draw.uniform(0, 1) * reference.seconds
        trial.note(f"{kilobytes} KiB, filled after {moment:.2f} s")
        child.wait_for(lambda: False, moment)
        fill(mount / "filler")
        if trial.draw.random() < 0.3:
            child.wait_for(lambda: False, trial.draw.uniform(0, 0.5))
            (mount / "filler").unlink(missing_ok=True)
            trial.note("freed again")
        judge(trial, child.wait(), folder, reference)
    finally:
        subprocess.run(["umount", "-l", mount], capture_output=True, check=False)
        sweep_shared_memory(trial)


def fill(path: Path) -> None:
    """Writes until a disk is full."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        for _ in range(4096):
            file.write(bytes(1024))


def folder_vanishes(trial: Trial) -> None:
    """The run's folder is removed, moved, replaced by a file, a link or another run, or no longer writable."""
    reference, folder = trial.inputs.reference("tiny", "plain"), run_folder(trial)
    child = trial.inputs.start(settings(trial, "plain", folder), trial.folder / "attempt", before=shorten_patience)
    child.wait_for(folder.exists, 60)
    child.wait_for(lambda: False, trial.draw.uniform(0, 1) * reference.seconds)
    way = trial.draw.choice(("removed", "moved", "a file", "a link", "another run", "a file of it"))
    trial.note(way)
    other = {}
    if not child.poll():
        if way == "a file of it":
            with contextlib.suppress(OSError, IndexError):
                trial.draw.choice([p for p in folder.iterdir() if p.is_file()]).unlink()
        else:
            other = vanish(folder, way, reference)
    ended = child.wait()
    refused = "must be a folder that can be written to" in ended.err  # replaced before anything was computed
    if trial.judge_end(ended, (0, 2, 3) if refused else (0, 3)) and ended.code == 3:
        judge_elsewhere(trial, ended, folder, reference, named_places(ended, trial))
    changed = [p for p, data in other.items() if not p.is_file() or p.read_bytes() != data]
    trial.expect(not changed, LOST, f"another run's files were changed: {', '.join(p.name for p in changed)}")
    sweep_shared_memory(trial)


def vanish(folder: Path, way: str, reference: Reference) -> dict[Path, bytes]:
    """Takes the folder away. Returns the files of another run that are there now and must stay as they are."""
    away = folder.with_name("moved")
    with contextlib.suppress(OSError):
        folder.rename(away)
    if way == "removed":
        shutil.rmtree(away, ignore_errors=True)
    elif way == "a file":
        folder.write_text("x")
    elif way == "a link":
        folder.symlink_to("nowhere")
    elif way == "another run":
        shutil.copytree(reference.folder, folder)
        return {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    return {}


def closed_pipe(number: int) -> None:
    """Makes a stream a pipe that nobody reads."""
    read, write = os.pipe()
    os.dup2(write, number)
    os.close(read)


def close_all() -> None:
    """Closes all standard streams, as some starters of daemons do."""
    for number in range(3):
        os.close(number)
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


def to_device(path: str, flags: int) -> None:
    """Makes standard output a device."""
    os.dup2(os.open(path, flags), 1)


def full_pipe() -> None:
    """Standard output is a pipe whose reader is gone after the first bytes."""
    read, write = os.pipe()
    fcntl.fcntl(write, 1031, 4096)  # F_SETPIPE_SZ
    os.dup2(write, 1)
    os.close(write)
    if not os.fork():
        os.setpgid(0, 0)
        os.read(read, 10)
        os._exit(0)
    os.close(read)


def ascii_output() -> None:
    """A terminal without letters."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]


STREAMS: dict[str, Callable[[], None]] = {
    "a closed pipe": lambda: closed_pipe(1),
    "two closed pipes": lambda: (closed_pipe(1), closed_pipe(2))[0],
    "a full disk": lambda: to_device("/dev/full", os.O_WRONLY),
    "not for writing": lambda: to_device("/dev/null", os.O_RDONLY),
    "all closed": close_all,
    "a reader that leaves": full_pipe,
    "ascii": ascii_output,
    "closed by Python": lambda: sys.stdout.close(),
}


def streams(trial: Trial) -> None:
    """Standard output that cannot be written, closes on the way, or lacks letters; log.txt has everything."""
    mode = trial.draw.choice(list(MODES))
    way = trial.draw.choice(list(STREAMS))
    reference = trial.inputs.reference("tiny", mode)
    folder = run_folder(trial).with_name("läufer \udcff" if way == "ascii" else "run")
    trial.note(f"{mode}: {way}")
    knobs = trial.inputs.settings("tiny", mode, ARTIFACT_DIR=os.fsdecode(folder))
    ended = trial.inputs.start(knobs, trial.folder / "attempt", streams=STREAMS[way]).wait()
    if trial.judge_end(ended, (0,)):
        wrong = differences(results(folder), reference.results)
        trial.expect(not wrong, MISREPORTED, f"not as the undisturbed run: {wrong}")
        ending = (folder / "log.txt").read_text().splitlines()[-4:]  # memory, and the three files that matter next
        whole = ending[0].startswith("peak memory") and "log.txt" in ending[-1]
        trial.expect(whole, LOST, f"log.txt ends with {ending!r}")


def together(trial: Trial) -> None:
    """Two to four runs that begin in one folder at once, or a little later: exactly one goes on."""
    reference, folder = trial.inputs.reference("tiny", "plain"), trial.folder / "run"
    knobs, count = trial.inputs.settings("tiny", "plain", ARTIFACT_DIR=folder), trial.draw.randint(2, 4)
    children: list[Child] = []
    for number in range(count):
        children.append(trial.inputs.start(knobs, trial.folder / f"attempt-{number}"))
        time.sleep(trial.draw.choice((0, 0, 0.05, 0.3)))
    for child in children:  # none of them is left over by another one
        child.known.update(pid for other in children for pid in other.pids)
    ended = [child.wait() for child in children]
    trial.note(f"{count} runs")
    for each in ended:
        trial.judge_end(each, (0, 2))
    codes = [each.code for each in ended]
    trial.need(codes.count(0) == 1, LOST, f"the runs ended with codes {codes}; exactly one should end with 0")
    wrong = differences(results(folder), reference.results)
    trial.expect(not wrong, MISREPORTED, f"not as the undisturbed run: {wrong}")
    log = (folder / "log.txt").read_text()
    trial.expect(log.count("peak memory") == 1, MISREPORTED, "two runs wrote to one log")
