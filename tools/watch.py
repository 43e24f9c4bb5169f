"""Draws the losses of runs again and again while they go on, into report/report.html.

    make watch                            all runs in logs/
    make watch ARGS="logs/RUN --every 5"
    python tools/watch.py logs/RUN --out report --once

Each time it calls tools/report.py, and only if a file of a run has changed. The page loads itself again. It ends with
Ctrl-C, with --once, or when nothing has changed for --patience seconds.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import runs  # noqa: E402
from runs import Parser, UserError, command_line, number_type  # noqa: E402

HEAD = "<meta charset=utf-8>"


def stamps(paths: list[Path]) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file that a report reads, in folders up to the levels that it looks into."""
    found: dict[str, tuple[int, int]] = {}
    for path in paths:
        depth = len(path.parts)
        files = [path]
        for folder, inner, names in os.walk(path):
            inner[:] = sorted(inner) if len(Path(folder).parts) - depth < runs.LEVELS else []
            files += [Path(folder, name) for name in names if name.endswith(runs.RUN_FILES) or name.endswith(".log")]
        for file in files:
            try:
                status = file.stat()
            except OSError:
                continue
            found[str(file)] = (status.st_size, status.st_mtime_ns)
    return found


def draw(paths: list[str], out: Path, title: str) -> int:
    """Calls tools/report.py. Returns its exit code."""
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *paths, "--out", str(out), "--title", title]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    return done.returncode


def refresh_page(page: Path, seconds: float) -> None:
    """Lets a browser load the page again by itself."""
    text = page.read_text()
    if HEAD in text and "http-equiv=refresh" not in text:
        runs.write_atomic(page, text.replace(HEAD, f'{HEAD}<meta http-equiv=refresh content="{seconds:g}">', 1))


def main(arguments: list[str]) -> int:
    """Draws until it is told to stop. Returns the exit code: of the last drawing."""
    parser = Parser(prog="watch.py", description=__doc__)
    add = parser.add_argument
    add("paths", nargs="*", default=["logs"], metavar="PATH", help="folders of runs, or logs (default: logs)")
    add("--out", type=Path, default=Path("report"), metavar="DIR", help="folder of the report (default: report)")
    add("--every", type=number_type(float, 0.1), default=10.0, metavar="S", help="seconds between looks (default: 10)")
    add("--patience", type=number_type(float, 0), default=0.0, metavar="S", help="end after S seconds without a change")
    add("--once", action="store_true", help="draw once and end")
    options = parser.parse_args(arguments)
    paths = [Path(name.partition("=")[2] if "=" in name else name) for name in options.paths]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]}: no such file or folder")
    before: dict[str, tuple[int, int]] = {}
    code, changed = 0, time.monotonic()
    while True:
        now = stamps(paths)
        if now != before:
            before, changed = now, time.monotonic()
            code = draw(options.paths, options.out, f"Runs at {time.strftime('%H:%M:%S')}")
            if code == 0:
                refresh_page(options.out / "report.html", options.every)
                print(f"{time.strftime('%H:%M:%S')} drawn: {options.out / 'report.html'}", flush=True)
        if options.once or (options.patience and time.monotonic() - changed >= options.patience):
            return code
        time.sleep(options.every)


if __name__ == "__main__":
    sys.exit(command_line(main))
