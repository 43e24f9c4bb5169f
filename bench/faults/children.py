"""Processes that a trial starts by forking: they begin at once, and whatever they leave is found and ended.

The process that forks has imported torch and everything else, but has never computed and has no threads.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import processes

END_SECONDS = 60.0  # in which a run must end after whatever it met
POLL_SECONDS = 0.005
GRACE = 3.0  # seconds in which orphans may end by themselves
CODES: dict[str, types.CodeType] = {}  # scripts, compiled once


@dataclass
class Ended:
    """How the processes of a run ended."""

    codes: list[int]  # by rank; -N for signal N
    out: str
    err: str
    seconds: float
    hung: bool = False  # it was ended by the campaign
    peak: int = 0  # bytes, the largest process
    orphans: list[str] = field(default_factory=list)  # commands of processes that were left

    @property
    def code(self) -> int:
        """The exit code of rank 0."""
        return self.codes[0]

    def describe(self) -> str:
        """The end in a few words, for a report."""
        hung = "hung, " if self.hung else ""
        last = (self.err.strip().splitlines() or self.out.strip().splitlines() or ["nothing printed"])[-1]
        return f"{hung}code {', '.join(map(str, self.codes))}: {last[:300]}"


def as_script(path: Path, arguments: Iterable[object]) -> Callable[[], int]:
    """What a child does to be `python PATH ARGUMENTS`."""
    name = str(path)
    if name not in CODES:
        CODES[name] = compile(path.read_bytes(), name, "exec")
    code = CODES[name]

    def body() -> int:
        sys.argv, sys.path[0] = [name, *map(str, arguments)], str(path.parent)
        module = types.ModuleType("__main__")
        module.__file__ = name
        sys.modules["__main__"] = module
        exec(code, module.__dict__)
        return 0

    return body


def exit_code(body: Callable[[], int]) -> int:
    """What the interpreter would end with; a traceback goes to stderr."""
    try:
        return body()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:
        with contextlib.suppress(Exception):
            traceback.print_exc()
        return 1


class Child:
    """A run on one or several ranks, forked from this process, in a process group of its own."""

    shown = False  # whether everything that is printed is shown

    def __init__(
        self,
        body: Callable[[], int],
        environment: dict[str, str],
        folder: Path,
        *,
        ranks: int = 1,
        cwd: Path | None = None,
        streams: Callable[[], None] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.begin = folder, time.monotonic()
        self.known = set(processes.descendants(os.getpid()))
        self.codes: dict[int, int] = {}
        self.peak = 0
        variables: list[dict[str, str]] = [{}]
        if ranks > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            same = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            rows = [dict(same, RANK=rank, LOCAL_RANK=rank) for rank in range(ranks)]
            variables = [{name: str(value) for name, value in row.items()} for row in rows]
        self.pids: list[int] = []
        for more in variables:
            sys.stdout.flush()
            here, pid = os.getpid(), os.fork()
            if not pid:
                self.become(body, environment | more, here, cwd or folder, streams)
            group = self.pids[0] if self.pids else pid
            with contextlib.suppress(OSError):
                os.setpgid(pid, group)
            self.pids.append(pid)

    def become(self, body: Callable, environment: dict[str, str], parent: int, cwd: Path, streams) -> None:
        """The child's side: never returns."""
        result = 1
        try:
            with contextlib.suppress(OSError):
                os.setpgid(0, self.pids[0] if self.pids else 0)
            processes.follow_parent(parent, signal.SIGKILL)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(cwd)
            tempfile.tempdir = None  # an import may have asked for it
            if streams:
                streams()
            result = exit_code(body)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
        finally:
            os._exit(result & 0xFF)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status, usage = os.wait4(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
                    self.peak = max(self.peak, usage.ru_maxrss * 1024)
        return len(self.codes) == len(self.pids)

    def send(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to a rank, or to the whole group."""
        if rank is not None:
            if self.pids[rank] not in self.codes:
                os.kill(self.pids[rank], number)
        elif not self.poll():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pids[0], number)

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Waits until a condition holds, the run ends, or time is up. Returns whether the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.poll() or time.monotonic() > deadline:
                return condition()
            time.sleep(POLL_SECONDS)
        return True

    def wait(self, seconds: float = END_SECONDS) -> Ended:
        """Waits for the end; what has not ended by then is killed. What the run left running is named and killed."""
        deadline, hung = time.monotonic() + seconds, False
        while not self.poll():
            if time.monotonic() > deadline:
                hung = True
                self.kill_all()
            time.sleep(POLL_SECONDS)
        took = time.monotonic() - self.begin
        orphans = self.collect()
        text = {name: (self.folder / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr")}
        for name in text:
            if Child.shown:
                print(f"--- {name} of {self.folder.name}\n{text[name]}", flush=True)
            (self.folder / name).unlink()
        codes = [self.codes[pid] for pid in self.pids]
        return Ended(codes, text["stdout"], text["stderr"], took, hung, self.peak, orphans)

    def started(self) -> list[int]:
        """Processes that descend from this one and were not there before the run."""
        return [pid for pid in processes.descendants(os.getpid()) if pid not in self.known]

    def kill_all(self) -> None:
        """Kills the run and all that it started."""
        processes.kill_all(pid for pid in [*self.pids, *self.started()] if pid not in self.codes)

    def collect(self) -> list[str]:
        """Names and ends the processes that the run left; this process gets them as a subreaper."""
        deadline = time.monotonic() + GRACE
        while left := self.living():
            if time.monotonic() > deadline:
                names = [command_of(pid) for pid in left]
                self.kill_all()
                time.sleep(0.05)
                self.living()
                return names
            time.sleep(0.02)
        return []

    def living(self) -> list[int]:
        """The processes that the run started and that have not ended; collects those that have."""
        found = []
        for pid in self.started():
            try:
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    found.append(pid)
            except ChildProcessError:  # the child of another one that is left
                found.append(pid)
        return [pid for pid in found if Path(f"/proc/{pid}").exists()]


def command_of(pid: int) -> str:
    """A process's command line."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    return f"process {pid}"


def limit_files(soft: int) -> None:
    """Lets this process write no file longer than so many bytes, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
