"""Submissions of strangers: whatever a folder holds, the tools end soon, in bounded memory, with findings."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import fuzz
from faults.children import Child, Ended, as_script
from faults.damage import strike
from faults.inputs import ROOT
from faults.trials import HUNG, LOST, MISREPORTED, Skipped, Trial

SECONDS = 60.0
MEMORY = 3 << 30  # bytes; a forked child begins with some 400 MiB of libraries
CANARY = "canary"
ATTACK = f"open({{folder!r}} + '/{CANARY}', 'w').close()\n"
SCRIPTS = {  # what a hostile train_gpt.py does when it is run
    "sleeps": "import time; time.sleep(3600)",
    "prints": "while True: print('x' * 10**6)",
    "claims": "print(12345)",
    "claims JSON": "print('{\"parameters\": 1e999}'); print('[' * 10**5)",
    "eats memory": "x = []\nwhile True: x.append(bytearray(10**8))",
    "starts a child": "import os, time\nif not os.fork(): os.setsid(); time.sleep(3600)",
    "ignores SIGTERM": "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(3600)",
    "exits": "import os; os._exit(0)",
    "dies": "import os; os.kill(os.getpid(), 9)",
    "writes": "f = open('big', 'wb')\nwhile True: f.write(bytes(10**7))",
    "bad syntax": "def (",
    "deep syntax": "(" * 5000,
    "control codes": "raise SystemExit('\\x1b[31mred\\x07')",
}
LINES = (
    "9" * 5000,
    "step:1/2 val_loss:" + "9" * 400,
    "\x1b[2J\x1b[31m",
    "[" * 200_000,
    "x" * 10**6,
    "val_bpb: nan",
    "\0",
)


def good_folder(trial: Trial) -> Path:
    """A copy of a small good submission."""
    made = trial.inputs.once("submission", lambda folder: fuzz.good_folder(folder / "x") and None)
    target = trial.folder / "stranger"
    shutil.copytree(made / "x", target)
    return target


def disturb(trial: Trial, folder: Path) -> None:
    """A few damages of a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for _ in range(trial.draw.choice((1, 1, 2, 5))):
        way = trial.draw.random()
        path = trial.draw.choice(files)
        if not path.is_file() or path.is_symlink():
            continue
        if way < 0.7:
            strike(path, trial)
        elif way < 0.85:
            trial.note(f"a line in {path.name}")
            with open(path, "a", errors="replace") as file:
                file.write(f"\n{trial.draw.choice(LINES)}\n")
        else:
            special(trial, folder)


def special(trial: Trial, folder: Path) -> None:
    """Something that is no plain file, beside the others."""
    name = trial.draw.choice(
        ("logs", "extra.log", "train_seed1.log", "run2", "model.pgolf", "\x1b[31mred.log", "a" * 200)
    )
    path, way = folder / name, trial.draw.choice(("fifo", "loop", "device", "out", "deep", "socket"))
    trial.note(f"{way} {name[:20]!r}")
    if path.exists() or path.is_symlink():
        return
    if way == "fifo":
        os.mkfifo(path)
    elif way == "loop":
        path.mkdir()
        (path / "again").symlink_to("..")
    elif way == "device":
        path.symlink_to("/dev/zero")
    elif way == "out":
        path.symlink_to("/etc")
    elif way == "deep":
        path.joinpath(*"abcdefgh" * 20).mkdir(parents=True)
    else:
        import socket

        if len(os.fspath(path)) < 100:
            socket.socket(socket.AF_UNIX).bind(os.fspath(path))


def judge(trial: Trial, ended: Ended, tool: str, codes: tuple[int, ...] = (0, 1, 2, 3)) -> None:
    """A tool ended in time, with an exit code of its own, in bounded memory; it shows no control codes."""
    trial.judge_end(ended, codes, what=tool)
    trial.expect(ended.peak < MEMORY, LOST, f"{tool} took {ended.peak >> 20} MiB of memory")
    trial.expect(ended.seconds < SECONDS, HUNG, f"{tool} took {ended.seconds:.0f} s")
    raw = [c for c in ended.out + ended.err if not c.isprintable() and c not in "\n\t"]
    trial.expect(not raw, MISREPORTED, f"{tool} prints control codes: {raw[:5]}")


def tool(trial: Trial, name: str, *arguments: object, cwd: Path | None = None, seconds: float = SECONDS) -> Ended:
    """Runs a tool of the project to its end."""
    body = as_script(ROOT / "tools" / name, arguments)
    return Child(body, trial.inputs.environment(), trial.folder / "tool", cwd=cwd).wait(seconds + 5)


def folders(trial: Trial) -> None:
    """check_submission.py or report.py on a damaged folder, from inside of it; its code is never run."""
    folder = good_folder(trial)
    attack = ATTACK.format(folder=str(folder))
    for name in ("sitecustomize.py", "json.py", "numpy.py", "train_gpt.py"):
        (folder / name).write_text(attack)
    disturb(trial, folder)
    inside = trial.draw.random() < 0.5
    path = Path(".") if inside else folder
    if trial.draw.random() < 0.6:
        ended = tool(trial, "check_submission.py", path, cwd=folder if inside else None)
        judge(trial, ended, "check_submission.py")
    else:
        drawn = ("--out", trial.folder / "report") if trial.draw.random() < 0.25 else ()
        ended = tool(trial, "report.py", path, *drawn, cwd=folder if inside else None)
        judge(trial, ended, "report.py")
    trial.expect(not (folder / CANARY).exists(), LOST, "the folder's code was run without --run")


def claims(trial: Trial) -> None:
    """A figure of submission.json is made better than it is: check_submission.py must disagree."""
    folder = good_folder(trial)
    path = folder / "submission.json"
    value = json.loads(path.read_text())
    name = trial.draw.choice(("val_bpb", "val_loss", "bytes_total", "val_bpb_std", "row", "row bytes"))
    trial.note(name)
    if name.startswith("row"):
        row = trial.draw.choice(list(value["seed_results"].values()))
        field = "val_bpb" if name == "row" else "artifact_bytes"
        row[field] = type(row[field])(row[field] * 0.9)
    elif name in value:
        value[name] = type(value[name])(value[name] * 0.9)
    path.write_text(json.dumps(value, indent=1))
    ended = tool(trial, "check_submission.py", folder)
    judge(trial, ended, "check_submission.py", (1,))


def scripts(trial: Trial) -> None:
    """check_submission.py --run on a script that sleeps, prints, eats memory, or leaves a process."""
    if sys.platform != "linux":
        raise Skipped("only Linux limits what a script takes")
    folder, name = good_folder(trial), trial.draw.choice(list(SCRIPTS))
    trial.note(name)
    (folder / "train_gpt.py").write_text(SCRIPTS[name] + "\n")
    made = trial.inputs.reference("tiny", "plain")
    for number in (42, 0):
        shutil.copyfile(made.folder / "model.pgolf", folder / f"model_seed{number}.pgolf")
    shutil.copyfile(made.folder / "model.pgolf", folder / "model.pgolf")
    limits = ("--run", "--run-seconds", 5, "--run-memory", 512)
    ended = tool(trial, "check_submission.py", folder, *limits)
    judge(trial, ended, "check_submission.py --run")
    believed = "12345 parameters" in ended.out or "12,345" in ended.out
    trial.expect(not believed, MISREPORTED, "it believes what the script printed")
