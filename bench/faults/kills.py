"""Kills, at random moments and events of every stage; then the same command again, until the run ends."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import train_gpt as t
from faults import events
from faults.children import Ended
from faults.events import Watcher
from faults.inputs import MODELS, MODES, Reference, differences, results
from faults.trials import LOST, MISREPORTED, Trial

ROUNDING = 5e-3  # bits per byte by which another number of ranks may differ on a model of these sizes


@dataclass
class Attempts:
    """What the attempts of one run left for the judge."""

    shown: int = 0  # attempts that said that they write checkpoints: these count as attempts of the run
    made: int = 0
    kills: int = 0
    slept: float = 0.0
    events: list[list[str]] = field(default_factory=list)
    last: Ended | None = None


def newest_step(folder: Path, prefix: str = "") -> int:
    """The step of the newest good checkpoint in a run's folder; 0 where there is none."""
    for path in sorted((folder / f"{prefix}checkpoint").glob("step-*.safetensors"), reverse=True):
        try:
            return int(t.read_tensors(path)[1]["step"])
        except (OSError, ValueError, KeyError):
            continue
    return 0


def journal(folder: Path, prefix: str = "") -> dict[str, Any]:
    """What the run's journal says; empty where there is none."""
    try:
        return json.loads((folder / f"{prefix}checkpoint" / t.JOURNAL_FILE).read_text())
    except (OSError, ValueError):
        return {}


def choose_moment(trial: Trial, reference: Reference, file: Path) -> tuple[Watcher, float]:
    """A random moment of a run: (what kills it from inside, seconds after which it is killed from outside or 0)."""
    draw = trial.draw
    way = draw.choice(("time", "event", "stage", "named"))
    if way == "time":
        return Watcher(file), draw.uniform(0.02, 1.05) * reference.seconds
    if way == "event":
        at = draw.randint(1, len(reference.events))
        trial.note(f"kill at event {at}: {reference.events[at - 1]}")
        return Watcher(file, at, events.kill_group), 0.0
    name, stage = draw.choice(reference.events).split(" ")
    count = sum(line == f"{name} {stage}" for line in reference.events)
    at = 1 if way == "stage" else draw.randint(1, count)
    trial.note(f"kill at {name} {at} of stage {stage}")
    return Watcher(file, at, events.kill_group, name, stage), 0.0


def attempt(trial: Trial, knobs: dict[str, Any], reference: Reference, seen: Attempts, kill: bool, ranks: int) -> Ended:
    """One attempt, which is killed or left to end."""
    file = trial.folder / f"events-{seen.made}"
    watcher, seconds = choose_moment(trial, reference, file) if kill else (Watcher(file), 0.0)
    child = trial.inputs.start(knobs, trial.folder / f"attempt-{seen.made}", watcher, ranks=ranks)
    if seconds:
        trial.note(f"kill after {seconds:.2f} s")
        child.wait_for(lambda: False, seconds)
        child.send(signal.SIGKILL)
    ended = child.wait(120)
    seen.made += 1
    seen.shown += "\ncheckpoints: every" in ended.out
    seen.events.append(file.read_text().splitlines() if file.exists() else [])
    if kill and ended.code == -signal.SIGKILL:
        seen.kills += 1
    return ended


def check_next(trial: Trial, before: tuple[int, bool], folder: Path, ended: Ended, seen: Attempts) -> None:
    """Holds an attempt against what was on the disk before it: it goes on from the newest checkpoint."""
    step, trained = before
    begun = [line for line in seen.events[-1] if line == "step train"]
    if trained and begun:
        trial.find(LOST, f"the training was finished, and {len(begun)} steps were repeated")
    line = next((line for line in ended.out.splitlines() if line.startswith("resumed from ")), "")
    if step and line and f": step {step}," not in line:
        trial.find(LOST, f"the newest good checkpoint was of step {step}, but: {line}")


def disturb(trial: Trial, knobs: dict[str, Any], reference: Reference, folder: Path, ranks: list[int]) -> Attempts:
    """Kills a run a few times, and lets it end. `ranks`: of each attempt; the last one is repeated."""
    seen, kills = Attempts(), trial.draw.randint(1, 4)
    prefix = "eval_" if knobs.get("MODE") == "eval" else ""
    for number in range(kills + 1):
        before = newest_step(folder, prefix), "artifact" in journal(folder, prefix).get("results", {})
        ended = attempt(trial, knobs, reference, seen, number < kills, ranks[min(number, len(ranks) - 1)])
        check_next(trial, before, folder, ended, seen)
        if number < kills and ended.code == -signal.SIGKILL:
            pause = trial.draw.choice((0.0, 0.0, 0.1, 0.4))
            time.sleep(pause)
            seen.slept += pause
            continue
        seen.last = ended
        break
    return seen


def judge(trial: Trial, folder: Path, seen: Attempts, expected: dict[str, Any], exact: bool, prefix: str = "") -> None:
    """Holds a run that was killed and has ended against an undisturbed one."""
    ended = seen.last
    # A kill after a run's last step, the removal of its journal, leaves a finished run: there is nothing to go on with.
    over = ended is not None and "already holds a run" in ended.err and (folder / f"{prefix}summary.json").exists()
    good = ended is not None and trial.judge_end(ended, (0, 2) if over else (0,))
    trial.need(good, LOST, "the run did not end well after its kills")
    if over:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    found = results(folder, prefix)
    if exact:
        wrong = differences(found, expected)
        trial.expect(not wrong, MISREPORTED, f"not as the undisturbed run: {wrong}")
    else:
        for name in ("val_bpb", "val_tokens", "val_bytes", "steps"):
            near = abs(found[name] - expected[name]) <= (ROUNDING if name == "val_bpb" else 0)
            trial.expect(near, MISREPORTED, f"{name} is {found[name]} instead of {expected[name]}")
    summary = json.loads((folder / f"{prefix}summary.json").read_text())
    low, high = seen.shown - 1, seen.made - 1
    right = low <= summary["resumed"] <= high
    trial.expect(right, MISREPORTED, f"resumed {summary['resumed']} times, says the summary; it was {low} to {high}")
    idle = summary["idle_seconds"]
    trial.expect(idle >= 0, MISREPORTED, f"idle_seconds is {idle}")
    log = (folder / f"{prefix}log.txt").read_text()
    times = "once" if summary["resumed"] == 1 else f"{summary['resumed']} times"
    said = summary["resumed"] == 0 or f"resumed    {times}" in log
    trial.expect(said, MISREPORTED, "the log does not say that the run was resumed")
    judge_files(trial, folder)


def judge_files(trial: Trial, folder: Path) -> None:
    """A run that ended leaves its files and no others, and every line of metrics.jsonl is JSON."""
    allowed = {"config.json", "log.txt", "metrics.jsonl", "summary.json"}
    allowed |= {f"eval_{name}" for name in allowed} | {t.CONTAINER_FILE, t.TOKENIZER_FILE}
    others = [p.name for p in folder.iterdir() if p.name not in allowed and "scores_" not in p.name]
    trial.expect(not others, MISREPORTED, f"files are left: {', '.join(sorted(others))}")
    for path in folder.glob("*metrics.jsonl"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                json.loads(line)
            except ValueError:
                trial.find(MISREPORTED, f"{path.name}:{number} is not JSON: {line[:80]!r}")


def kill(trial: Trial) -> None:
    """A run of any mode on one rank, killed up to four times."""
    model, mode = trial.draw.choice(list(MODELS)), trial.draw.choice(list(MODES))
    trial.note(f"{model}, {mode}")
    reference = trial.inputs.reference(model, mode)
    folder = trial.folder / "run"
    knobs = trial.inputs.settings(model, mode, ARTIFACT_DIR=folder)
    seen = disturb(trial, knobs, reference, folder, [1])
    judge(trial, folder, seen, reference.results, True)


def kill_two_modes(trial: Trial) -> None:
    """MODE=train, killed, then MODE=eval in its folder, killed."""
    model, mode = trial.draw.choice(list(MODELS)), trial.draw.choice(list(MODES))
    trial.note(f"{model}, {mode}")
    whole = trial.inputs.reference(model, mode)
    training = trial.inputs.reference(model, "plain", MODE="train")
    folder = trial.folder / "run"
    knobs = trial.inputs.settings(model, "plain", ARTIFACT_DIR=folder, MODE="train")
    judge(trial, folder, disturb(trial, knobs, training, folder, [1]), training.results, True)
    trial.need(not trial.findings, LOST, "the training failed")
    knobs = trial.inputs.settings(model, mode, ARTIFACT_DIR=folder, MODE="eval")
    expected = {
        name: value
        for name, value in whole.results.items()
        if "pre_quant" not in name and name not in ("steps", "train_tokens")
    }
    expected = {(f"eval_{n}" if n.startswith("scores_") else n): value for n, value in expected.items()}
    judge(trial, folder, disturb(trial, knobs, whole, folder, [1]), expected, True, "eval_")


def kill_ranks(trial: Trial) -> None:
    """Two ranks, or one number of ranks before the kills and another one after."""
    model, mode = trial.draw.choice(list(MODELS)), trial.draw.choice(list(MODES))
    ranks = trial.draw.choice(([2], [2], [2, 1], [1, 2]))
    trial.note(f"{model}, {mode}, ranks {ranks}")
    reference = trial.inputs.reference(model, mode, ranks[-1])
    folder = trial.folder / "run"
    knobs = trial.inputs.settings(model, mode, ARTIFACT_DIR=folder)
    seen = disturb(trial, knobs, reference, folder, ranks)
    exact = ranks == [2] or seen.kills == 0
    expected = trial.inputs.reference(model, mode, ranks[0] if exact else 1).results
    judge(trial, folder, seen, expected, exact)


def resume_path(trial: Trial) -> None:
    """A run that was killed, and another one that begins from its checkpoint by RESUME=PATH."""
    model, mode = trial.draw.choice(list(MODELS)), trial.draw.choice(list(MODES))
    reference = trial.inputs.reference(model, mode)
    first, folder = trial.folder / "first", trial.folder / "run"
    knobs = trial.inputs.settings(model, mode, ARTIFACT_DIR=first)
    at = trial.draw.randint(3, 8)
    trial.note(f"{model}, {mode}: killed at step {at}")
    watcher = Watcher(None, at, events.kill_self, "step", "train")
    trial.inputs.start(knobs, trial.folder / "one", watcher).wait(120)
    step = newest_step(first)
    trial.need(step > 0, LOST, f"no checkpoint after {at - 1} steps with one at each")
    source = trial.draw.choice((first, first / "checkpoint", max((first / "checkpoint").glob("step-*.safetensors"))))
    kept = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    again = knobs | dict(ARTIFACT_DIR=folder, RESUME=source)
    seen = disturb(trial, again, reference, folder, [1])
    trial.need(seen.last is not None and trial.judge_end(seen.last, (0,)), LOST, "the second run did not end well")
    wrong = differences(results(folder), reference.results)
    trial.expect(not wrong, MISREPORTED, f"not as the undisturbed run: {wrong}")
    summary = json.loads((folder / "summary.json").read_text())
    said = summary["resumed_from"] and Path(summary["resumed_from"]).parent == first / "checkpoint"
    trial.expect(said, MISREPORTED, f"resumed_from is {summary['resumed_from']!r}")
    first_step = summary["resumed_at_steps"][:1]
    trial.expect(first_step == [step], LOST, f"began at step {first_step}, and the checkpoint was of step {step}")
    unchanged = kept == {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    trial.expect(unchanged, LOST, "the first run's folder was changed")


def clock(trial: Trial) -> None:
    """A training with a time limit, killed: the seconds of all attempts count."""
    limit = trial.draw.uniform(1.0, 2.0)
    folder = trial.folder / "run"
    knobs = trial.inputs.settings(
        "tiny",
        "plain",
        ARTIFACT_DIR=folder,
        ITERATIONS=1_000_000,
        MAX_WALLCLOCK_SECONDS=limit,
        CHECKPOINT_EVERY_SECONDS=0.2,
    )
    spent = 0.0
    for number in range(trial.draw.randint(1, 3)):
        child = trial.inputs.start(knobs, trial.folder / f"attempt-{number}")
        child.wait_for(lambda: (folder / "checkpoint" / t.JOURNAL_FILE).exists(), 60)
        child.wait_for(lambda: False, trial.draw.uniform(0.2, 1.2))
        child.send(signal.SIGKILL)
        ended = child.wait()
        if ended.code != -signal.SIGKILL:
            break
        left = journal(folder).get("train_seconds", 0.0)
        trial.expect(left >= spent, LOST, f"the journal counts {left:.2f} s of training, and before it was {spent:.2f}")
        spent = left
    else:
        ended = trial.inputs.start(knobs, trial.folder / "last").wait(120)
    trial.need(trial.judge_end(ended, (0,)), LOST, "the run did not end well")
    summary = json.loads((folder / "summary.json").read_text())
    trial.note(f"limit {limit:.2f} s, spent {spent:.2f} s before, {summary['train_seconds']:.2f} s in all")
    enough = summary["train_seconds"] >= max(limit, spent) - 1e-6
    trial.expect(enough, MISREPORTED, f"{summary['train_seconds']} s of training are less than were spent")
    over = summary["train_seconds"] - max(limit, spent)
    trial.expect(over < 3, LOST, f"the training went {over:.1f} s over its limit of {limit:.1f} s")
