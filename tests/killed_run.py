"""Runs train_gpt.py, and kills it at a chosen moment. What it does is counted in events, listed in EVENTS.

KILL_AT: the event, counted from 1. KILL_EVENT counts events of one name alone, KILL_STAGE those in one stage, which
begins with such an event. KILL_SECONDS: the first such event after so many seconds of the stage. EVENTS_FILE: a file
that gets a line for each event. On several ranks, KILL_RANK is killed, rank 0 by default. KILL_SIGNAL: a signal in the
place of SIGKILL. KILL_AGAIN: seconds after which it comes again, while the process is busy. KILL_WRITTEN: the signal
waits until a file of the stage is on the disk, which takes its time on a busy machine.
"""

import functools
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # noqa: E402

# What a run does, one event for each call. The process is killed before it, or in the middle of it for a renaming:
# what was written aside is there by then, and nothing has its name yet.
EVENTS = [
    (tg.Stage, "__enter__"),
    (tg.Trainer, "step"),
    (tg.Evaluator, "score_sequences"),
    (tg.PhasedTTT, "run_batch"),
    (tg.FullModelSGD, "step"),
    (tg, "calibration_sums"),
    (tg, "write_tensors"),
    (tg, "pack"),
    (os, "replace"),
    (os, "fsync"),
]


class Killer:
    """Counts events, and kills this process at one of them."""

    def __init__(self, take):
        self.at, self.after = int(take("KILL_AT", "0")), float(take("KILL_SECONDS", "0"))
        self.stage, self.event = take("KILL_STAGE", ""), take("KILL_EVENT", "")
        self.file = take("EVENTS_FILE", "")
        self.signal, self.again = int(take("KILL_SIGNAL", signal.SIGKILL)), float(take("KILL_AGAIN", "0"))
        self.wait = bool(take("KILL_WRITTEN", ""))
        self.count, self.begun, self.running = 0, 0.0, ""
        self.written = ""  # the stage of the last file that has its name
        if (self.stage or self.after) and not self.at:
            self.at = 1

    def happens(self, name, arguments):
        """Counts an event, and is the end of it where it was chosen."""
        if name == "__enter__":
            self.running, self.begun = arguments[0].name, time.perf_counter()
        if self.file:
            with open(self.file, "a") as lines:
                lines.write(f"{name} {self.running if name == '__enter__' else ''}\n")
        chosen = self.event in ("", name) and self.stage in ("", self.running)
        self.count += chosen and time.perf_counter() - self.begun >= self.after
        if chosen and self.at and self.count == self.at:
            self.strike()

    def strike(self):
        """Sends the signal to this process, perhaps twice."""
        end = time.monotonic() + 60
        while self.wait and self.written != self.running and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), self.signal)
        if self.again:
            time.sleep(self.again)
            os.kill(os.getpid(), self.signal)
            time.sleep(3600)

    def watch(self, owner, name):
        real = getattr(owner, name)

        @functools.wraps(real)
        def event(*arguments, **more):
            if name != "replace" or "run.json" not in str(arguments[0]):  # the journal's come by the clock
                self.happens(name, arguments)
            result = real(*arguments, **more)
            if name == "replace" and str(arguments[1]).endswith(".safetensors"):
                self.written = self.running
            return result

        setattr(owner, name, event)


if __name__ == "__main__":
    environment = dict(os.environ)
    killer = Killer(environment.pop)
    if environment.get("RANK", "0") == environment.pop("KILL_RANK", "0"):
        for owner, name in EVENTS:
            killer.watch(owner, name)
    sys.exit(tg.main(sys.argv[1:], environment))
