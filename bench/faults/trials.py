"""A trial: one input or disturbance, and what came of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faults.children import Ended
from faults.inputs import Inputs

# From the best to the worst: what a trial counts as is its worst finding.
SURVIVED, MISREPORTED = "survived", "misreported"
LOST, HUNG = "lost", "hung"
VERDICTS = (SURVIVED, MISREPORTED, LOST, HUNG)


class Skipped(Exception):
    """A trial that this machine cannot make, with the reason."""


class Stop(Exception):
    """A trial whose rest has no meaning after a finding."""


@dataclass
class Trial:
    """A trial in its own folder, with its own random numbers; it collects what it finds wrong."""

    kind: str
    number: int
    seed: int
    folder: Path
    inputs: Inputs
    findings: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what it did, for a reader of a finding

    def __post_init__(self):
        self.draw = random.Random(f"{self.seed} {self.kind} {self.number}")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    @property
    def name(self) -> str:
        """What `--only` takes."""
        return f"{self.kind}:{self.number}"

    @property
    def verdict(self) -> str:
        """The worst finding's."""
        return max((verdict for verdict, _ in self.findings), key=VERDICTS.index, default=SURVIVED)

    def note(self, text: str) -> None:
        """Says what the trial does."""
        self.notes.append(text)

    def find(self, verdict: str, text: str) -> None:
        """Adds a finding."""
        self.findings.append((verdict, text))

    def expect(self, holds: object, verdict: str, text: str) -> bool:
        """A finding where something does not hold. Returns whether it holds."""
        if not holds:
            self.find(verdict, text)
        return bool(holds)

    def need(self, holds: object, verdict: str, text: str) -> None:
        """The same, and the end of the trial."""
        if not self.expect(holds, verdict, text):
            raise Stop

    def judge_end(self, ended: Ended, codes: tuple[int, ...], lines: int = 1, what: str = "") -> bool:
        """Findings about how a run ended: in time, with an exit code that is allowed, without traceback or orphan.

        `lines`: how many lines stderr may have where the code is not 0.
        """
        what = what or "the run"
        before = len(self.findings)
        self.expect(not ended.hung, HUNG, f"{what} did not end within its limit ({ended.describe()})")
        self.expect(not ended.orphans, HUNG, f"{what} left processes: {'; '.join(ended.orphans)}")
        text = ended.out + ended.err
        if "Traceback (most recent call last)" in text:
            tail = text[text.index("Traceback (most recent call last)") :].strip().splitlines()
            self.find(MISREPORTED, f"{what} ended with a traceback: {tail[-1][:300]} [{place_of(tail)}]")
        elif not ended.hung:
            self.expect(ended.code in codes, MISREPORTED, f"{what} ended with {ended.describe()}; allowed: {codes}")
        said = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
        if ended.code == 2 and len(said) > lines:
            self.find(MISREPORTED, f"{what} said {len(said)} lines: {ended.err[:300]!r}")
        if ended.code == 2 and not ended.err.strip():
            self.find(MISREPORTED, f"{what} ended with code 2 and said nothing")
        return len(self.findings) == before

    def row(self) -> dict:
        """The trial as JSON."""
        return dict(kind=self.kind, number=self.number, verdict=self.verdict, findings=self.findings, notes=self.notes)


def place_of(lines: list[str]) -> str:
    """The last place of a traceback that is in the project."""
    places = [line.strip() for line in lines if line.lstrip().startswith("File ")]
    own = [place for place in places if "site-packages" not in place and "/lib/python" not in place]
    if not (own or places):
        return ""
    place = (own or places)[-1]
    return place.replace("File ", "").rpartition("/")[2].replace('"', "")


@dataclass(frozen=True)
class Kind:
    """A kind of trial: its name, what it does, its share of the trials, and the longest that one may take."""

    name: str
    run: Callable[[Trial], None]
    weight: float
    seconds: float = 240.0
    meaning: str = ""
    at_most: int = 1_000_000
