"""Commands that never outlive the process that started them, however it ends: tools and tests start theirs here.

Killing torchrun does not end its ranks, because each rank leads a session of its own: they would train on, unseen, in a
folder and on a GPU that the next run uses. So a command runs under a supervisor, which is this file run as a script.
On Linux the kernel tells the supervisor when its parent dies, even by SIGKILL, and gives it every orphan of the
command. It exits as the command did, once nothing that the command started is left. On other systems it ends the
command's process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

PATIENCE = 40  # seconds from SIGTERM to SIGKILL; torchrun gives its ranks 30
GRACE = 2.0  # seconds that processes have to end after the command that started them
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


# ------------------------------------------------------------------------------------------------------- for a caller


def start(
    command: list[str], *, supervised: bool = True, patience: int | None = None, **options: Any
) -> subprocess.Popen:
    """Starts a command that ends with this process; takes the options of subprocess.Popen.

    SIGTERM to a supervised command goes to the command alone, and after `patience` seconds (default: PATIENCE) SIGKILL
    to what is left; SIGINT goes to its process group, as Ctrl-C does.
    Unsupervised, the process is the command itself, so that a test can kill it. The kernel kills it with its parent,
    but what it started may live on. The calling thread must not end before the command: Linux counts that as the
    parent's death.
    Errors: FileNotFoundError for a command that does not exist.
    """
    command = [str(word) for word in command]
    environment = options.get("env") or os.environ
    if not shutil.which(command[0], path=environment.get("PATH")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    mode = "supervise" if supervised else "follow"
    here = [sys.executable, "-I", "-S", __file__, mode, str(os.getpid()), str(patience or PATIENCE)]
    return subprocess.Popen([*here, *command], start_new_session=True, **options)


def stop(process: subprocess.Popen) -> None:
    """Ends a command of `start` with all that it started: SIGTERM, and SIGKILL where that is not enough."""
    process.terminate()
    try:
        process.wait(PATIENCE + 20)  # the supervisor kills after PATIENCE
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: list[str], *, timeout: float | None = None, **options: Any) -> subprocess.CompletedProcess:
    """Runs a command to its end, its output captured as text. An exception, as of a time-out, ends the command."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    with start(command, **options) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except BaseException:
            stop(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def follow_parent(parent: int, number: signal.Signals) -> None:
    """This process gets a signal when the thread that started it ends (Linux); at once if its parent is gone."""
    if prctl(PR_SET_PDEATHSIG, number) and os.getppid() != parent:
        os.kill(os.getpid(), number)


# --------------------------------------------------------------------------------------------------------- supervisor


def prctl(option: int, value: int) -> bool:
    """Sets an attribute of this process; False on systems other than Linux."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0


def family() -> dict[int, list[int]]:
    """The children of every process, from /proc; empty where there is none."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    return children


def children(parent: int) -> list[int]:
    """The processes that a process has started, or was given as orphans."""
    return family().get(parent, [])


def descendants(*roots: int) -> list[int]:
    """The processes that descend from these, parents before children."""
    known, found = family(), list(roots)
    for parent in found:  # which grows
        found += known.get(parent, [])
    return found[len(roots) :]


def kill_all(pids: Iterable[int]) -> None:
    """Kills processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def execute(command: list[str]) -> None:
    """This process becomes the command, with the signals that Python ignores set back to their defaults."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)


class Supervisor:
    """The parent of a command, and of every orphan that the command leaves."""

    def __init__(self, command: list[str], patience: int):
        self.patience = patience
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)  # until there is a child to forward them to
        here = os.getpid()
        self.child = os.fork()
        if not self.child:
            follow_parent(here, signal.SIGTERM)
            os.setpgid(0, 0)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
            execute(command)
        with contextlib.suppress(OSError):  # the child has set it already
            os.setpgid(self.child, self.child)
        self.running = True
        for number in forwarded:
            signal.signal(number, self.forward)
        signal.signal(signal.SIGALRM, self.kill)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Asks the command to end; what is left after `patience` seconds is killed."""
        if self.running:
            send = os.killpg if number == signal.SIGINT else os.kill
            with contextlib.suppress(ProcessLookupError):
                send(self.child, number)
            signal.alarm(self.patience)

    def kill(self, number: int, frame: FrameType | None) -> None:
        """Kills whatever descends from this process, again and again while it runs."""
        kill_all(descendants(os.getpid()))
        if self.running:
            signal.alarm(1)

    def wait(self) -> int:
        """The command's exit code (-N for signal N), when all that it started has ended."""
        while True:
            ended, status = os.waitpid(-1, 0)
            if ended == self.child:
                break
        self.running = False
        signal.alarm(0)
        deadline = time.monotonic() + GRACE
        while self.any_left():
            if time.monotonic() > deadline:
                self.kill(signal.SIGALRM, None)
            time.sleep(0.01)
        if sys.platform != "linux":  # orphans went to another parent
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(status)

    def any_left(self) -> bool:
        """Collects children that have ended; whether others have not."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        return True


def main(mode: str, parent: str, patience: str, *command: str) -> None:
    """`supervise` runs the command as a child; `follow` becomes the command, to be killed with its parent."""
    if mode == "follow":
        follow_parent(int(parent), signal.SIGKILL)
        execute(list(command))
    follow_parent(int(parent), signal.SIGTERM)
    code = Supervisor(list(command), int(patience)).wait()
    if code < 0:  # by the same signal
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
