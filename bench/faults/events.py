"""What a run does, counted in events, and what happens to it at one of them."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train_gpt as t

# One event for each call. It happens before the call: in a renaming, what was written aside is there by then.
EVENTS: list[tuple[Any, str]] = [
    (t.Stage, "__enter__"),
    (t.Trainer, "step"),
    (t.Evaluator, "score_sequences"),
    (t.PhasedTTT, "run_batch"),
    (t.FullModelSGD, "step"),
    (t, "calibration_sums"),
    (t, "write_tensors"),
    (t, "pack"),
    (os, "replace"),
    (os, "fsync"),
    (os, "unlink"),
]


class Watcher:
    """Counts a process's events, writes them to a file, and acts at one: `action` when `at` of them have happened.

    `name` and `stage` restrict which events count.
    """

    def __init__(
        self, file: Path | None, at: int = 0, action: Callable[[], None] | None = None, name: str = "", stage: str = ""
    ):
        self.file, self.at = file, at
        self.action, self.name = action, name
        self.stage, self.running = stage, "start"
        self.count = 0

    def install(self) -> None:
        """Watches from now on, in this process."""
        for owner, name in EVENTS:
            if hasattr(owner, name):
                setattr(owner, name, self.watched(getattr(owner, name), name))

    def watched(self, real: Callable, name: str) -> Callable:
        @functools.wraps(real)
        def event(*arguments, **more):
            if name == "__enter__":  # a stage has begun when it is known to all
                result = real(*arguments, **more)
                self.happens(name, arguments)
                return result
            if name not in ("replace", "unlink") or "run.json" not in str(arguments[0]):  # those go by the clock
                self.happens(name, arguments)
            return real(*arguments, **more)

        return event

    def happens(self, name: str, arguments: tuple) -> None:
        """Counts an event."""
        if name == "__enter__":
            self.running = arguments[0].name
        if self.file:
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(descriptor, f"{name} {self.running}\n".encode())
            os.close(descriptor)
        if self.name in ("", name) and self.stage in ("", self.running):
            self.count += 1
            if self.at and self.count == self.at and self.action:
                self.action()


def kill_group() -> None:
    """The end of this run on all its ranks."""
    os.killpg(0, signal.SIGKILL)


def kill_self() -> None:
    """The end of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self() -> None:
    """This process stops, until somebody continues it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """This process does nothing any more."""
    time.sleep(3600)


def raise_error() -> None:
    """A bug."""
    raise LookupError("a bug that the campaign planted")


def run_script(copy: Path) -> int:
    """The end of train_gpt.py as it is run, for a process that has imported it. `copy`: the script that is counted.

    Beside the original is the packer, which takes 3 s; beside a copy there is none.
    """
    t.__dict__["__file__"] = str(copy)
    try:
        return t.main([], dict(os.environ))
    except KeyboardInterrupt:
        return 130
    finally:
        t.settle_output()
