"""Publishes a submission at the root of this repository: submission.json, logs/ and the README's pictures.

    python tools/publish.py submissions/demo-1a2b3c4d [--run] [--data data/builtin_sp4096]

tools/reproduce.py makes the folder, and tools/check_submission.py must find no disagreement in it; with --run it also
runs the folder's script, to load its artifacts. The logs, metrics,
summaries and settings of its seeds replace those of the previous submission in logs/. Then `make docs` writes the
README's table from submission.json.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import sys
from pathlib import Path

import check_submission
import report
import runs
import strangers
from runs import ROOT, Parser, UserError, command_line, write_atomic

KINDS = ("train", "metrics", "summary", "config")  # of files of a seed, in the folder and in logs/


def publish(folder: Path, root: Path) -> list[Path]:
    """Copies the folder's files to the root and draws the pictures. Returns the written files."""
    files = sorted(path for kind in KINDS for path in folder.glob(f"{kind}_seed*"))
    contents = {path.name: strangers.read_bytes(path, "metrics", folder) for path in files}
    content = strangers.read_bytes(folder / "submission.json", "json", folder)
    logs = root / "logs"
    logs.mkdir(exist_ok=True)
    for kind in KINDS:
        for path in logs.glob(f"{kind}_seed*"):
            path.unlink()
    for name, text in contents.items():
        write_atomic(logs / name, text)
    write_atomic(root / "submission.json", content)
    found = runs.read_runs(folder)
    for run in found:
        run.name = f"seed {run.seed}"
    pictures = {
        "loss.png": report.loss_picture(found),
        "stages.png": report.stage_picture(found),
        "bytes.png": report.bytes_picture(found),
    }
    for name, content in pictures.items():
        if content is None:
            raise UserError(f"{folder}: its logs hold nothing to draw in {name}")
        write_atomic(root / "docs" / name, content)
    return [root / "submission.json", *(logs / path.name for path in files), *(root / "docs" / n for n in pictures)]


def main(arguments: list[str]) -> int:
    """Checks the folder and publishes it. Returns the exit code."""
    parser = Parser(prog="publish.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder written by tools/reproduce.py")
    parser.add_argument("--run", action="store_true", help="run the folder's script to load its artifacts")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of validation shards to check against")
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="DIR", help="target folder (default: this repository)"
    )
    options = parser.parse_args(arguments)
    if not (options.folder / "submission.json").is_file() or not any(options.folder.glob("train_seed*.log")):
        raise UserError(f"{options.folder}: must be a submission's folder written by tools/reproduce.py")
    more = ["--data", str(options.data)] if options.data else []
    if check_submission.main([str(options.folder), *more, *(["--run"] if options.run else [])]) == 1:
        raise UserError(f"{options.folder}: has disagreements, and is not published")
    for path in publish(options.folder, options.root):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))
