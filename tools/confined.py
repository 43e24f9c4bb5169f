"""Runs a stranger's script apart: an empty environment, a scratch home, limits, and an end to all that it started.

This bounds what a careless script costs. It is no sandbox against a hostile one, which may still read what its user may
read and use the network: for that, run it in a container or on a machine that holds nothing.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import processes
from strangers import MIB

FILE_BYTES = 2048 * MIB  # of each file that a script writes
SCRATCH_BYTES = 16384 * MIB  # of all the files in its folder
POLL_SECONDS = 0.2
PATIENCE = 30.0  # seconds to end what is left


@dataclass
class Limits:
    """What a script may take: seconds, bytes of memory of all its processes together, output, processes.

    `address`: whether the kernel also limits each process by itself; programs that use a GPU reserve too much for that.
    """

    seconds: float = 300.0
    memory: int = 8192 * MIB
    address: bool = True
    output: int = MIB  # bytes of standard output, and of standard error
    processes: int = 512  # at a time; the kernel's own limit does not count those of root


@dataclass
class Outcome:
    """How a script ended: its exit code, its output, and which limit ended it, in words; empty: none."""

    code: int
    out: bytes
    errors: bytes
    ended: str = ""

    @property
    def last_line(self) -> str:
        """The last line of what it wrote to standard error."""
        return (self.errors.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a script, removed at the end with whatever the script left there."""
    place = Path(tempfile.mkdtemp(prefix="confined."))
    try:
        yield place
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", str(place)], stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", "--", str(place)], stderr=subprocess.DEVNULL)  # of any depth


def environment(place: Path, more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a script in a scratch folder."""
    for name in ("home", "tmp"):
        (place / name).mkdir(exist_ok=True)
    return {
        "PATH": os.defpath,
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "LANG": "C.UTF-8",
        "PYTHONSAFEPATH": "1",  # for what the script starts; the script itself runs with -I
        "PYTHONNOUSERSITE": "1",
        **(more or {}),
    }


def limited(limits: Limits) -> list[str]:
    """The first words of a command that sets the kernel's limits on itself, then becomes the rest."""
    memory = limits.memory if limits.address else 0
    return [sys.executable, "-I", "-S", "-c", LIMITER, str(memory), str(processes_allowed(limits)), str(FILE_BYTES)]


def processes_allowed(limits: Limits) -> int:
    """The most processes that the user may have while a script runs."""
    mine, own = 0, os.getuid()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == own:
                mine += len(os.listdir(folder / "task"))
    return mine + limits.processes


def run(command: list[str], place: Path, limits: Limits, more: dict[str, str] | None = None) -> Outcome:
    """Runs a command in a scratch folder, to its end or to the first limit. All that it started is then ended."""
    (place / "work").mkdir(exist_ok=True)
    before = set(processes.children(os.getpid()))
    processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
    child = processes.start(
        [*limited(limits), *command],
        patience=1,
        env=environment(place, more),
        cwd=place / "work",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with child:
        try:
            return watch(child, before, place, limits)
        finally:
            end(child, before)
            processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 0)


def watch(child: subprocess.Popen, before: set[int], place: Path, limits: Limits) -> Outcome:
    """Reads what a command writes until it ends or meets a limit."""
    assert child.stdout and child.stderr
    texts = {child.stdout: bytearray(), child.stderr: bytearray()}
    deadline, ended = time.monotonic() + limits.seconds, ""
    with selectors.DefaultSelector() as selector:
        for stream in texts:
            selector.register(stream, selectors.EVENT_READ)
        while not ended and selector.get_map():
            for key, _ in selector.select(POLL_SECONDS):
                part = os.read(key.fd, 1 << 16)
                texts[key.fileobj] += part  # type: ignore[index]  # one of the two streams
                if not part:
                    selector.unregister(key.fileobj)
            if max(map(len, texts.values())) > limits.output:
                ended = f"it printed more than {limits.output} bytes"
            elif time.monotonic() > deadline:
                ended = f"it did not end within {limits.seconds:g} s"
            else:
                ended = over(child, place, limits)
    while not ended and child.poll() is None:  # it closed its output, and runs on
        time.sleep(POLL_SECONDS / 4)
        if time.monotonic() > deadline:
            ended = f"it did not end within {limits.seconds:g} s"
        else:
            ended = over(child, place, limits)
    if ended:
        end(child, before)
    return Outcome(child.wait(), bytes(texts[child.stdout]), bytes(texts[child.stderr]), ended)


def over(child: subprocess.Popen, place: Path, limits: Limits) -> str:
    """Which limit the processes of a command are over, in words; empty: none."""
    if sys.platform != "linux":
        return ""
    pages, found = 0, processes.descendants(child.pid)
    if len(found) > limits.processes:
        return f"it started more than {limits.processes} processes"
    for process in found:
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = Path(f"/proc/{process}/statm").read_text().split()
            pages += int(words[1]) - int(words[2])  # resident, and of these not shared
    if pages * os.sysconf("SC_PAGE_SIZE") > limits.memory:
        return f"it took more than {limits.memory // MIB} MiB of memory"
    if shutil.disk_usage(place).free < 64 * MIB or written(place) > SCRATCH_BYTES:
        return f"it wrote more than {SCRATCH_BYTES // MIB} MiB, or filled the disk"
    return ""


def written(place: Path, most: int = 10_000) -> int:
    """Bytes of the files in a folder, of the first many at least."""
    total = seen = 0
    folders = [str(place)]
    while folders and seen < most:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as found:
            for entry in found:
                seen += 1
                if seen >= most:
                    break
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def end(child: subprocess.Popen, before: set[int]) -> None:
    """Ends a command with every process that descends from it, also those in sessions of their own.

    A script may have stopped or killed its supervisor; what that leaves has become a child of this process.
    """
    if sys.platform != "linux":
        if child.poll() is None:
            processes.stop(child)
        return
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        mine = [process for process in processes.children(os.getpid()) if process not in before]
        left = processes.descendants(*mine)
        left += [process for process in mine if process != child.pid or child.poll() is None]
        kill_all(left)
        for process in mine:
            if process != child.pid:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process, os.WNOHANG)
        if not left:
            break
        time.sleep(0.01)
    child.wait()


def kill_all(found: list[int]) -> None:
    """Kills processes: by groups first, which takes a group at once and leaves none of it to start another."""
    groups = set()
    for process in found:
        with contextlib.suppress(OSError):
            groups.add(os.getpgid(process))
    for group in groups - {os.getpgrp()}:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)
    for process in found:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)


# Run as a command: sets the limits of its own process, then becomes the command that follows.
LIMITER = """
import os, resource, sys
memory, most, size = map(int, sys.argv[1:4])
limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_NPROC, most)]
if memory:  # what a process writes to is its data; its address space also holds the libraries that it maps
    limits += [(resource.RLIMIT_DATA, memory), (resource.RLIMIT_AS, 4 * memory)]
for name, value in limits:
    try:
        resource.setrlimit(name, (value, value))
    except (OSError, ValueError):  # a lower limit is set already
        pass
os.execv(sys.argv[4], sys.argv[4:])
"""
