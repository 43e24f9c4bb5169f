"""Speed against another commit, as ratios: both versions run alternately in one run, on the same machine.

    python bench/against.py COMMIT [--rounds 3] [--json FILE]

A training step (bench/train.py) and evaluations (bench/ttt.py) run in this working tree and in a checkout of COMMIT, in
a temporary folder. A ratio is this tree's rate over the other's in the same round: above 1 this tree is faster.
Machines differ by a factor of three from day to day, so only ratios of one run compare. The median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "training": ["bench/train.py", "--repeats", "6", "--warmup", "2"],
    "evaluation": ["bench/ttt.py", "--documents", "60"],
}


def rates(result: dict[str, Any]) -> dict[str, float]:
    """Rates (tokens/s or targets/s) in a benchmark's JSON object, by the labels of their rows."""
    found = {}
    for row in result["rows"]:
        rate = row.get("tokens_per_second") or row.get("targets_per_second")
        if rate:
            found[" ".join(row[key] for key in ("order", "part", "name") if key in row)] = float(rate)
    return found


def measure(tree: Path, command: list[str], file: Path) -> dict[str, float]:
    """Rates of one benchmark in a tree. Errors: SystemExit with its last line."""
    done = subprocess.run(
        [sys.executable, *command, "--json", str(file)], cwd=tree, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise SystemExit(f"error: {tree}: {' '.join(command)}: {' '.join(last)}")
    return rates(json.loads(file.read_text()))


def ratios(rounds: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, list[float]]:
    """This tree's rates over the other's, round by round, for what both measured."""
    names = [name for name in rounds[0][0] if all(name in one and name in other for one, other in rounds)]
    return {name: [one[name] / other[name] for one, other in rounds] for name in names}


def compare(other: Path, count: int) -> dict[str, list[float]]:
    """Ratios of every benchmark; the trees take turns at being first."""
    found: dict[str, list[float]] = {}
    for name, command in COMMANDS.items():
        rounds = []
        for number in range(count):
            trees = [ROOT, other] if number % 2 == 0 else [other, ROOT]
            results = {tree: measure(tree, command, other.parent / "result.json") for tree in trees}
            rounds.append((results[ROOT], results[other]))
        found |= {f"{name}: {key}": values for key, values in ratios(rounds).items()}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Prints a line for each figure; 2 for a commit that git does not know."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", help="what to compare with, as git names it")
    parser.add_argument("--rounds", type=int, default=3, help="times that both run")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    git = ["git", "-C", str(ROOT)]
    known = subprocess.run(
        [*git, "rev-parse", "--verify", f"{options.commit}^{{commit}}"], capture_output=True, text=True
    )
    if known.returncode:
        parser.error(f"{options.commit}: git knows no such commit")
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "other")
        subprocess.run([*git, "worktree", "add", "-q", "--detach", str(other), known.stdout.strip()], check=True)
        try:
            found = compare(other, options.rounds)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(other)], check=False)
    for name, values in found.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:60s} {statistics.median(values):6.2f} times as fast ({spread} in {len(values)} rounds)")
    if options.json:
        content = dict(commit=known.stdout.strip(), rounds=options.rounds, ratios=found)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
