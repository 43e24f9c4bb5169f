"""Fuzzes every reader of files that strangers write: damaged files give findings, never a traceback or a hang.

    make fuzz ARGS="--minutes 10"
    python tools/fuzz.py --minutes 10 --seed 7
    python tools/fuzz.py --minutes 10 --engine atheris      # coverage guides what is tried (requirements-fuzz.txt)

Each try damages one file of a good folder, by a field or by bytes, and reads the folder as the tools do. A try fails if
anything but a user's error is raised. The file and the damage that failed are printed, and the damaged file is kept in
--keep. Exit code: 0 if nothing failed, 1 if something did, 2 for a user's error.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import contextlib
import importlib
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_submission
import prove
import report
import reproduce
import run_submission
import runs
import strangers
import submission
import sweep
from runs import ROOT, Parser, UserError, command_line, number_type

SLOW_SECONDS = 20.0  # a single try that takes longer counts as one that hangs

# ------------------------------------------------------------------------------------------------------ a good folder


def good_folder(folder: Path) -> Path:
    """Writes a small good folder of every kind of file: the shown submission as a folder of our own, and more."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "logs").glob("*_seed*")):
        shutil.copyfile(path, folder / path.name)
    s = json.loads((ROOT / "submission.json").read_text(encoding="utf-8"))
    rows = list(s["seed_results"].values())
    baseline = {"1": 1.3, "2": 1.31, "3": 1.32}
    per_bpb = runs.bpb_to_nats(1.0, rows[0]["target_tokens"], rows[0]["val_bytes"])
    test = submission.significance([row["val_bpb"] for row in rows], list(baseline.values()), per_bpb)
    mean = sum(baseline.values()) / 3
    rules = [dict(rule="size", holds=True, tried="bytes", found=""), dict(rule="x", holds=None, tried="y", found="z")]
    proof = dict(form="short", script_sha256="", artifact_sha256="", evaluations=3, ranks=1, compile="0")
    s |= dict(
        baseline=dict(source="b", val_bpb=baseline),
        significance=test,
        comparison_baseline_bpb=mean,
        delta_vs_leaderboard_bpb=s["val_bpb"] - mean,
        delta_vs_leaderboard_nats=-test["gain_nats"],
        proof=dict(proof, exact=True, seconds=1.0, remarks=["a remark"], rules=rules),
        compliance=submission.compliance(rows, test),
    )
    (folder / "submission.json").write_text(json.dumps(s, indent=1), encoding="utf-8")
    (folder / "proof.json").write_text(json.dumps(s["proof"]), encoding="utf-8")
    (folder / "baseline.json").write_text(json.dumps(baseline), encoding="utf-8")
    page = f"{check_submission.MARKER} -->\n\n{submission.seed_table(s)}\n\n{submission.comparison(s)}\n\n"
    (folder / "README.md").write_text(page + submission.proof_section(s) + "\n", encoding="utf-8")
    (folder / "train_gpt.py").write_text("x = 1\n", encoding="utf-8")
    (folder / "requirements.txt").write_text("torch\n", encoding="utf-8")
    data = folder / "data"
    data.mkdir(exist_ok=True)
    source = [{"builtin": {"numpy": "2"}}, {"path": "a.txt"}, "b.txt"]
    manifest = dict(source=source, splits=dict(val=dict(bytes=1, tokens=2)))
    (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    trials = [
        dict(
            trial=i, state=state, value=value, seconds=1.5, values=dict(LR=f"0.0{i + 1}", MODE="ab"[i % 2]), error=None
        )
        for i, (state, value) in enumerate((("complete", 1.5), ("complete", 1.25), ("fail", None)))
    ]
    study = dict(name="lr", objective="val_bpb", variables=["LR", "MODE"], command="x", trials=trials)
    (folder / "sweep").mkdir(exist_ok=True)
    (folder / "sweep" / "study.json").write_text(json.dumps(study), encoding="utf-8")
    run = folder / "run"
    run.mkdir(exist_ok=True)
    for name, source in (("summary.json", "summary_seed42.json"), ("metrics.jsonl", "metrics_seed42.jsonl")):
        shutil.copyfile(folder / source, run / name)
    shutil.copyfile(folder / "train_seed42.log", run / "log.txt")
    shutil.copyfile(folder / "config_seed42.json", run / "config.json")
    return folder


# ------------------------------------------------------------------------------------------------------------ readers


def check(folder: Path) -> None:
    """tools/check_submission.py on a folder; what it prints has no control codes and no lines of its own."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        check_submission.main([str(folder)])
    judge_text(printed.getvalue())


def judge_text(text: str) -> None:
    """Errors: AssertionError for a text that a terminal would not show as it is."""
    wrong = [c for c in text if not c.isprintable() and c != "\n"]
    assert not wrong, f"prints {wrong[:5]}"


def draw(folder: Path) -> None:
    """tools/report.py on a folder, with its pictures."""
    target = folder / "sweep" if (folder / "sweep").is_dir() else folder
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        report.main([str(target / "study.json"), str(folder), "--out", str(Path(out, "r"))])
        judge_text(Path(out, "r", "report.md").read_text())
    judge_text(printed.getvalue())


def table(folder: Path) -> None:
    """tools/report.py on a folder, the tables alone."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        report.main([str(folder)])
        report.main([str(folder / "sweep")])
    judge_text(printed.getvalue())


def others(folder: Path) -> None:
    """The readers of the other tools, one after another."""
    readers: list[Callable[[], Any]] = [
        lambda: submission.finished(42, folder / "run"),
        lambda: submission.baseline_figures(folder / "baseline.json"),
        lambda: submission.baseline_figures(folder),
        lambda: submission.manifest(folder / "data"),
        lambda: [submission.source_words(s) for s in submission.manifest(folder / "data").get("source", [])],
        lambda: reproduce.complete(folder / "run", 42),
        lambda: submission.proof_section(dict(proof=reproduce.read_proof(folder / "proof.json"), seeds=[42])),
        lambda: prove.claimed_ranks(prove.read_said(folder / "run" / "summary.json")),
        lambda: submission.as_environment(prove.read_settings(folder / "run" / "config.json")),
        lambda: run_submission.artifacts(check_submission.read_folder(folder, check_submission.Findings())),
        lambda: list(sweep_rows(folder / "run" / "metrics.jsonl")),
    ]
    for reader in readers:
        with contextlib.suppress(UserError, prove.Refused):
            reader()


def sweep_rows(path: Path):
    """What tools/sweep.py reads of a run's metrics to prune it."""
    for line in strangers.read_bytes(path, "metrics").splitlines():
        yield sweep.metrics_row(line, "val_bpb")


READERS: dict[str, Callable[[Path], None]] = dict(check=check, draw=draw, table=table, others=others)

# ----------------------------------------------------------------------------------------------------------- mutations

TEXTS = (
    "",
    "x",
    "\x1b]8;;http://a\x07b\x1b]8;;\x07",
    "a|b`c<b>$x_{$[y](z)\n# w",
    "\u202eabc\u2066",
    "\ud800",
    "\0",
    "x" * 20_000,
    "1e999",
    "٣",
    "²",
    "-1",
    "../../etc/passwd",
)
NUMBERS = (0, -1, 1, 0.5, -0.0, 1e-320, 1e18, 1e19, 1e308, 2**63, 10**30, float("nan"), float("inf"), float("-inf"))
VALUES = (None, True, False, [], {}, [[]], [None], [[[[1]]]], {"a": 1}, {"": []}, ["x"] * 3, *NUMBERS, *TEXTS)
RAW = (
    b"",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 200_000,
    b'{"a":' * 50_000,
    b"1" * 100_000,
    b"1" + b"0" * 400,
    b"-1e400",
    b"\x00" * 1000,
    b"\n" * 1000,
    b'{"a": 1, "a": 2}',
    b"null",
    b"[]",
    b'"x"',
    b"{}",
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all fields in a JSON value."""
    found = []
    pairs = list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in value.items() if isinstance(value, dict) else pairs:
        found += [(*path, key), *places(inner, (*path, key))]
    return found


def changed(value: Any, path: tuple, change: Callable[[Any, Any], None]) -> Any:
    """A copy of a JSON value in which `change` was called with the container of a field and its key."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return copy


def mutate_json(value: Any, random: random.Random) -> Any:
    """A JSON value with one field deleted, replaced, renamed or given a neighbour."""
    path = random.choice(places(value) or [()])
    if not path:
        return random.choice(VALUES)
    kind = random.randrange(8)

    def change(inner: Any, key: Any) -> None:
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner, dict):
            inner[random.choice(TEXTS)] = inner.pop(key)
        elif kind == 2 and isinstance(inner, dict):
            inner[f"{key}{random.choice(TEXTS)}"] = inner[key]
        elif kind == 3:
            inner[key] = [inner[key]]
        elif kind == 4:
            inner[key] = str(inner[key])
        else:
            inner[key] = random.choice(VALUES)

    return changed(value, path, change)


def mutate_bytes(content: bytes, random: random.Random) -> bytes:
    """Bytes with a piece cut, doubled, replaced, or something inserted."""
    begin = random.randrange(len(content) + 1)
    end = min(len(content), begin + random.choice((0, 1, 2, 10, 100, 10_000)))
    piece = random.choice(
        (
            b"",
            content[begin:end] * 2,
            random.choice(RAW),
            bytes(random.randrange(256) for _ in range(random.randrange(9))),
            random.choice(TEXTS).encode("utf-8", "surrogatepass"),
            str(random.choice(NUMBERS)).encode(),
        )
    )
    return content[:begin] + piece + content[end:]


def mutate_figure(content: bytes, random: random.Random) -> bytes:
    """A text in which one number is another."""
    found = list(re.finditer(rb"[0-9][0-9.]*", content))
    if not found:
        return mutate_bytes(content, random)
    match = random.choice(found)
    figure = random.choice(
        (b"1" * 400, b"1e999", b"nan", b"-1", b"", b"0", "٣".encode(), b"1,,2", b"1.2.3", b"9" * 5000)
    )
    return content[: match.start()] + figure + content[match.end() :]


def mutate(name: str, content: bytes, random: random.Random) -> bytes:
    """The content of a file of this name with one thing damaged: a field of JSON, a figure, or bytes."""
    kind = random.randrange(4)
    with contextlib.suppress(ValueError, RecursionError):  # it is damaged already
        if kind < 2 and name.endswith(".json"):
            return json.dumps(mutate_json(json.loads(content), random)).encode()
        if kind < 2 and name.endswith(".jsonl"):
            lines = content.splitlines()
            place = random.randrange(len(lines))
            lines[place] = json.dumps(mutate_json(json.loads(lines[place]), random)).encode()
            return b"\n".join(lines) + b"\n"
    return mutate_figure(content, random) if kind == 2 else mutate_bytes(content, random)


def files_of(folder: Path) -> list[Path]:
    """The files of a good folder that are damaged in turn."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("train_gpt.py", "requirements.txt"))


def attempt(folder: Path, name: str, reader: str, content: bytes) -> str:
    """Reads the folder with a file of another content, which is then put back. Returns the traceback, or nothing."""
    path = folder / name
    before, begin = path.read_bytes(), time.monotonic()
    path.write_bytes(content)
    try:
        with contextlib.suppress(UserError):
            READERS[reader](folder)
    except Exception:
        return traceback.format_exc()
    finally:
        path.write_bytes(before)
    seconds = time.monotonic() - begin
    return f"it took {seconds:.1f} s" if seconds > SLOW_SECONDS else ""


# ------------------------------------------------------------------------------------------------------- command line


def search(folder: Path, keep: Path, minutes: float, seed: int) -> int:
    """Tries random damage for so long; prints what fails. Returns the number of failures of different kinds."""
    draws, names = random.Random(seed), [str(p.relative_to(folder)) for p in files_of(folder)]
    deadline, tried = time.monotonic() + 60 * minutes, 0
    failures: dict[str, int] = {}
    while time.monotonic() < deadline:
        name = draws.choice(names)
        reader = draws.choice(("check", "check", "table", "others", "draw"))
        content = mutate(name, (folder / name).read_bytes(), draws)
        wrong = attempt(folder, name, reader, content)
        tried += 1
        if wrong:
            kind = "\n".join(line for line in wrong.splitlines() if line.strip())[-400:]
            failures[kind] = failures.get(kind, 0) + 1
            if failures[kind] == 1:
                kept = keep / f"{len(failures)}-{reader}-{Path(name).name}"
                keep.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(content)
                print(f"FAILS: {reader} of {name}, kept as {kept}:\n{wrong}", flush=True)
    print(f"{tried} tries, {sum(failures.values())} failed, of {len(failures)} kinds; seed {seed}")
    return len(failures)


def guided(folder: Path, minutes: float, seed: int) -> None:
    """The same with atheris, which keeps the damage that reaches new lines of the readers. Ends the process."""
    try:
        atheris: Any = importlib.import_module("atheris")
    except ModuleNotFoundError:
        raise UserError("--engine atheris: is not installed; run `pip install -r requirements-fuzz.txt`") from None
    names = [str(p.relative_to(folder)) for p in files_of(folder)]
    for module in (strangers, runs, check_submission, submission):
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__code__"):
                setattr(module, name, atheris.instrument_func(value))

    def one(data: bytes) -> None:
        if len(data) < 2:
            return
        name, reader = names[data[0] % len(names)], ("check", "table", "others")[data[1] % 3]
        wrong = attempt(folder, name, reader, data[2:])
        if wrong:
            raise RuntimeError(f"{reader} of {name}: {wrong}")

    def damage(data: bytes, most: int, seed: int) -> bytes:
        draws = random.Random(seed)
        if len(data) < 2 or draws.random() < 0.5:
            return atheris.Mutate(data, most)
        return (data[:2] + mutate(names[data[0] % len(names)], data[2:], draws))[:most]

    corpus = folder.parent / "corpus"
    corpus.mkdir(exist_ok=True)
    for place, name in enumerate(names):
        for reader in range(3):
            (corpus / f"{place}-{reader}").write_bytes(bytes([place, reader]) + (folder / name).read_bytes())
    options = [f"-max_total_time={int(60 * minutes)}", f"-seed={seed}", "-max_len=40000", "-timeout=60", "-keep_seed=1"]
    atheris.Setup([sys.argv[0], *options, "-len_control=0", str(corpus)], one, custom_mutator=damage)
    atheris.Fuzz()


def main(arguments: list[str]) -> int:
    """Fuzzes for some minutes. Returns the exit code."""
    parser = Parser(prog="fuzz.py", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=number_type(float, 0), default=1.0, metavar="M", help="how long (default: 1)")
    add("--seed", type=number_type(int, 0), default=1, metavar="S", help="of the damage (default: 1)")
    add("--engine", choices=("random", "atheris"), default="random", help="what chooses the damage (default: random)")
    add(
        "--keep",
        type=Path,
        default=Path("logs", "fuzz"),
        metavar="DIR",
        help="for files that fail (default: logs/fuzz)",
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz.") as place:
        folder = good_folder(Path(place, "folder"))
        if options.engine == "atheris":
            guided(folder, options.minutes, options.seed)
        return 1 if search(folder, options.keep, options.minutes, options.seed) else 0


if __name__ == "__main__":
    sys.exit(command_line(main))
