"""Damage of files: flips, cuts, swaps, special files. It is refused in a line, passed over, or harmless."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import train_gpt as t
from faults import events
from faults.children import Ended
from faults.disks import named_places
from faults.events import Watcher
from faults.inputs import MODES, Inputs, Reference, differences, results
from faults.trials import LOST, MISREPORTED, Trial

HUGE_NUMBERS = (0, -1, 1e999, float("nan"), 2**63, 10**30, 1.5, -0.0)


# ------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, draw: random.Random) -> None:
    """A few wrong bits."""
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 1, 1, 3, 30))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    """The end is missing."""
    os.truncate(path, draw.randrange(max(1, path.stat().st_size)))


def append(path: Path, draw: random.Random) -> None:
    """Something more at the end."""
    with open(path, "ab") as file:
        file.write(draw.choice((b"\0", b"\n", draw.randbytes(1 + draw.randrange(4000)), path.read_bytes())))


def blank(path: Path, draw: random.Random) -> None:
    """A block of zeros, as a file system leaves after a power failure."""
    data = bytearray(path.read_bytes())
    begin = draw.randrange(max(1, len(data)))
    end = min(len(data), begin + draw.choice((16, 512, 4096, len(data))))
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)


def empty(path: Path, draw: random.Random) -> None:
    """A file of no bytes."""
    path.write_bytes(b"")


def remove(path: Path, draw: random.Random) -> None:
    """No file."""
    path.unlink()


def noise(path: Path, draw: random.Random) -> None:
    """Random bytes, as many as before."""
    path.write_bytes(draw.randbytes(path.stat().st_size))


def deep(path: Path, draw: random.Random) -> None:
    """Brackets that no parser should follow."""
    path.write_bytes(draw.choice((b"[", b'{"a":')) * 100_000)


def replace_by_folder(path: Path, draw: random.Random) -> None:
    """A folder of this name."""
    path.unlink()
    path.mkdir()


def replace_by_fifo(path: Path, draw: random.Random) -> None:
    """A FIFO of this name, into which nobody ever writes."""
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path, draw: random.Random) -> None:
    """A link of this name: to itself, to nothing, or to a device without an end."""
    path.unlink()
    path.symlink_to(draw.choice((path.name, "nowhere", "/dev/zero", "/dev/full")))


def sparse(path: Path, draw: random.Random) -> None:
    """A file of many gigabytes that takes no space."""
    os.truncate(path, 1 << 36)


def change_field(path: Path, draw: random.Random) -> None:
    """Another value somewhere in a JSON file; noise in another one."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return flip(path, draw)
    holder, key = draw.choice(list(places(value)) or [(None, None)])
    if holder is not None:
        old = holder[key]
        wrong = [None, "", "x", [], {}, True, *HUGE_NUMBERS, "9" * 5000, "\x1b[31m", "/etc/passwd", "../../x"]
        near = [old + 1, old * 2, -old] if isinstance(old, int | float) else [[old], {"x": old}]
        holder[key] = draw.choice(draw.choice((wrong, near)))
    path.write_text(json.dumps(value))
    return None


def places(value) -> list[tuple]:
    """Every (container, key) inside a JSON value."""
    found: list[tuple] = []
    keys = range(len(value)) if isinstance(value, list) else value
    for key in list(keys) if isinstance(value, dict | list) else ():
        found += [(value, key), *places(value[key])]
    return found


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip,
    flip,
    flip,
    cut,
    cut,
    append,
    blank,
    empty,
    remove,
    noise,
    deep,
    replace_by_folder,
    replace_by_fifo,
    replace_by_link,
    sparse,
)


def strike(path: Path, trial: Trial) -> None:
    """One random damage of a file."""
    way = (
        trial.draw.choice((*DAMAGES, change_field, change_field, change_field, change_field))
        if (path.suffix == ".json")
        else trial.draw.choice(DAMAGES)
    )
    trial.note(f"{way.__name__} {path.name}")
    way(path, trial.draw)


def swap(paths: list[Path], trial: Trial) -> None:
    """Two files in each other's place."""
    one, other = trial.draw.sample(paths, 2)
    trial.note(f"swap {one.name}, {other.name}")
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


# -------------------------------------------------------------------------------------------------------------- kinds


def cut_off(inputs: Inputs, mode: str, name: str, stage: str, at: int) -> Path:
    """A folder of a run that was killed at an event, made once."""

    def build(folder: Path) -> None:
        knobs = inputs.settings("averages", mode, ARTIFACT_DIR=folder / "run")
        watcher = Watcher(None, at, events.kill_self, name, stage)
        ended = inputs.start(knobs, folder / "process", watcher).wait(120)
        if ended.code != -signal.SIGKILL:
            raise RuntimeError(f"the run to be damaged was not cut off: {ended.describe()}")

    return inputs.once(f"cut-{mode}-{name}-{stage}-{at}", build) / "run"


MOMENTS = (
    ("plain", "step", "train", 5),
    ("plain", "__enter__", "quantize", 1),
    ("plain", "__enter__", "unpack", 1),
    ("stream", "run_batch", "ttt", 5),
    ("length", "run_batch", "ttt", 3),
    ("chunk", "step", "ttt", 4),
)


def judge(trial: Trial, ended: Ended, folder: Path, expected: dict, prefix: str = "") -> None:
    """Refused in one line, or ended with what an undisturbed run ends with.

    Where a file was replaced by something that cannot be written, it is elsewhere, and the exit code says so.
    """
    if not trial.judge_end(ended, (0, 2, t.EXIT_ELSEWHERE)):
        return
    if ended.code == t.EXIT_ELSEWHERE:
        places = named_places(ended, trial)
        trial.expect(bool(places), MISREPORTED, f"exit code 3 without a file that is elsewhere: {ended.err[:300]!r}")
    elif ended.code == 0:
        wrong = differences(results(folder, prefix), expected)
        trial.expect(not wrong, MISREPORTED, f"not as the undisturbed run: {wrong}")


def checkpoint_damage(trial: Trial) -> None:
    """Files of a run that was cut off are damaged; then the same command."""
    moment = trial.draw.choice(MOMENTS)
    mode = moment[0]
    reference = trial.inputs.reference("averages", mode)
    folder = trial.folder / "run"
    shutil.copytree(cut_off(trial.inputs, *moment), folder)
    trial.note(f"{mode}, cut off in {moment[2]}")
    # Scores of targets that are final already are not computed again, and nothing says what they were.
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("scores_"))
    kept = sorted(p for p in files if p.suffix == ".safetensors")
    if len(kept) > 1 and trial.draw.random() < 0.15:
        swap(kept, trial)
    else:
        groups = (kept, [folder / "checkpoint" / t.JOURNAL_FILE], files)
        for path in trial.draw.sample(trial.draw.choice([g for g in groups if g]), 1):
            strike(path, trial)
    knobs = trial.inputs.settings("averages", mode, ARTIFACT_DIR=folder)
    ended = trial.inputs.start(knobs, trial.folder / "attempt").wait()
    judge(trial, ended, folder, reference.results)
    trial.expect(ended.peak < 3 << 30, LOST, f"it took {ended.peak >> 20} MiB of memory")


def resume_damage(trial: Trial) -> None:
    """A damaged checkpoint that RESUME=PATH names."""
    source = trial.folder / "first"
    shutil.copytree(cut_off(trial.inputs, "plain", "step", "train", 5), source)
    path = trial.draw.choice(sorted((source / "checkpoint").glob("step-*.safetensors")))
    strike(path, trial)
    target = trial.draw.choice((path, source))
    folder = trial.folder / "run"
    knobs = trial.inputs.settings("averages", "plain", ARTIFACT_DIR=folder, RESUME=target)
    ended = trial.inputs.start(knobs, trial.folder / "attempt").wait()
    judge(trial, ended, folder, trial.inputs.reference("averages", "plain").results)


def artifact_damage(trial: Trial) -> None:
    """A damaged artifact or configuration of a training, which MODE=eval is to score."""
    mode = trial.draw.choice(list(MODES))
    folder = trial.folder / "run"
    training = trial.inputs.reference("averages", "plain", MODE="train")
    expected = trial.inputs.reference("averages", mode).results
    shutil.copytree(training.folder, folder)
    names = [p for p in sorted(folder.iterdir()) if p.is_file()]
    strike(trial.draw.choice([folder / t.CONTAINER_FILE, folder / t.CONTAINER_FILE, *names]), trial)
    knobs = trial.inputs.settings("averages", mode, ARTIFACT_DIR=folder, MODE="eval")
    ended = trial.inputs.start(knobs, trial.folder / "attempt").wait()
    if trial.judge_end(ended, (0, 2)) and ended.code == 0:
        summary = json.loads((folder / "eval_summary.json").read_text())
        same = summary["val_bpb"] == expected["val_bpb"]
        trial.expect(same, MISREPORTED, f"val_bpb is {summary['val_bpb']} instead of {expected['val_bpb']}")


def data_damage(trial: Trial) -> None:
    """Damaged shards, manifest or tokenizer, before the run or while it goes on."""
    reference = trial.inputs.reference("tiny", "plain")
    data = trial.folder / "data"
    shutil.copytree(trial.inputs.data, data)
    files = sorted(p for p in data.iterdir() if p.is_file())
    folder = trial.folder / "run"
    knobs = trial.inputs.settings("tiny", "plain", ARTIFACT_DIR=folder, DATA_PATH=data)
    if trial.draw.random() < 0.5:
        shards = [p for p in files if p.suffix == ".bin"]
        swap(shards, trial) if trial.draw.random() < 0.15 else strike(trial.draw.choice(files), trial)
        ended = trial.inputs.start(knobs, trial.folder / "attempt").wait()
    else:
        child = trial.inputs.start(knobs, trial.folder / "attempt")
        child.wait_for(lambda: False, trial.draw.uniform(0.1, 1.0) * reference.seconds)
        trial.note("while it runs")
        strike(trial.draw.choice([p for p in files if p.suffix == ".bin"]), trial)
        ended = child.wait()
    judge_data(trial, ended, folder, reference, data)


def judge_data(trial: Trial, ended: Ended, folder: Path, reference: Reference, data: Path) -> None:
    """As `judge`; but what no checksum covers may change what is only shown, as the size by other compressors."""
    if trial.judge_end(ended, (0, 2)) and ended.code == 0:
        wrong = differences(results(folder), reference.results)
        unchecked = not (data / "manifest.json").is_file() or "no checksum" in ended.out or "warning" in ended.out
        trial.expect(not wrong or unchecked, MISREPORTED, f"not as the undisturbed run: {wrong}")
