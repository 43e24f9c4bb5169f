"""Sends the curves of runs to a tracker, through its own package: Weights & Biases, TensorBoard or Trackio.

None of them is needed: `pip install -r requirements-trackers.txt` installs them. A tracker that fails is named in one
line and left out from then on; it never ends a run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import strangers
from runs import UserError

PACKAGES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard", "trackio": "trackio"}


class Tracker:
    """Starts a tracked run for each run of a sweep or a reproduction. `project` is the name of the whole."""

    def __init__(self, kind: str, project: str, folder: Path):
        self.kind, self.project = kind, project
        self.folder = folder
        self.module: Any = imported(kind) if kind else None

    def start(self, name: str, config: dict[str, Any], folder: Path) -> Follower:
        """Tracks the run whose files are in a folder."""
        starts: dict[str, Callable[[str, dict[str, Any]], Any]] = {
            "wandb": self.start_wandb,
            "tensorboard": self.start_tensorboard,
            "trackio": self.start_trackio,
        }
        follower = Follower(self.kind, folder)
        if not self.kind:
            return follower
        follower.guarded(lambda: follower.take(starts[self.kind](name, config)))
        return follower

    def start_wandb(self, name: str, config: dict[str, Any]) -> Any:
        options = dict(project=self.project, name=name, config=config, dir=str(self.folder))
        return self.module.init(**options, reinit="create_new")  # runs go side by side

    def start_trackio(self, name: str, config: dict[str, Any]) -> Any:
        return self.module.init(project=self.project, name=name, config=config)

    def start_tensorboard(self, name: str, config: dict[str, Any]) -> Any:
        writer = self.module.SummaryWriter(str(self.folder / "tensorboard" / name))
        rows = [f"| {key} | {strangers.markdown(value)} |" for key, value in config.items()]
        writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
        return Scalars(writer)


NO_TRACKER = Tracker("", "", Path())  # tracks nothing


def imported(kind: str) -> Any:
    """The tracker's package. Errors: UserError if it is not installed."""
    try:
        return importlib.import_module(PACKAGES[kind])
    except ImportError:
        advice = "is not installed; run `pip install -r requirements-trackers.txt`"
        raise UserError(f"--tracker {kind}: its package {advice}") from None


class Scalars:
    """A TensorBoard writer with the methods that runs of the other trackers have."""

    def __init__(self, writer: Any):
        self.writer, self.step = writer, 0

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.step = self.step if step is None else step
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step)

    def finish(self) -> None:
        self.writer.close()


class Follower:
    """Reads a run's metrics.jsonl as it grows, and sends each row."""

    def __init__(self, kind: str, folder: Path):
        self.kind, self.folder = kind, folder
        self.run: Any = None
        self.read, self.step = 0, 0
        self.failed = False

    def take(self, run: Any) -> None:
        self.run = run

    def guarded(self, act: Callable[[], None]) -> None:
        """Acts, unless the tracker has failed before. A failure is one line on stderr."""
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # whatever a stranger's package raises
            self.failed = True
            words = strangers.visible(f"{type(error).__name__}: {error}")
            print(f"warning: --tracker {self.kind}: {words}; goes on without it", file=sys.stderr, flush=True)

    def follow(self) -> None:
        """Sends the rows that are new."""
        if self.run is not None:
            self.guarded(self.send_rows)

    def send_rows(self) -> None:
        lines, self.read = strangers.new_lines(self.folder / "metrics.jsonl", "metrics", self.read)
        for line in lines:
            try:
                row = strangers.parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                self.send(row)

    def send(self, row: dict[str, Any]) -> None:
        step = strangers.COUNT.keep(row.get("step"))
        self.step = self.step if step is None else step
        before = f"{row['stage']}/" if isinstance(row.get("stage"), str) else ""
        values = {before + name: value for name, value in row.items() if name != "step" and strangers.is_number(value)}
        if values:
            self.run.log(values, step=self.step)

    def finish(self, summary: dict[str, Any] | None = None) -> None:
        """Sends what is left and the summary's figures, and ends the tracked run."""
        if self.run is None:
            return
        figures = {f"final/{name}": value for name, value in (summary or {}).items() if strangers.is_number(value)}
        self.follow()
        if figures:
            self.guarded(lambda: self.run.log(figures, step=self.step))
        self.guarded(self.run.finish)
        self.run = None
