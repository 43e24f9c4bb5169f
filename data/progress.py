"""What data/prepare.py shows of its progress."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from tqdm import tqdm

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class Report:
    """What a user sees on stderr: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool):
        self.quiet = quiet

    def say(self, text: str) -> None:
        """One line about what begins now."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A function to call with each number of bytes done."""
        if sys.stderr.isatty() and not self.quiet:
            with tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr) as bar:
                yield bar.update
            return
        done, said = 0, time.monotonic()

        def update(count: int) -> None:
            nonlocal done, said
            done += count
            if time.monotonic() - said > 10:
                said = time.monotonic()
                self.say(f"{label}: {100 * done / total:.0f}% of {total / 1e6:.1f} MB")

        self.say(f"{label} {total / 1e6:.1f} MB")
        yield update


def bar_of(report: Report | None) -> Bar:
    """A report's progress bar, or one that shows nothing."""
    return report.bar if report else lambda label, total: contextlib.nullcontext(lambda count: None)
