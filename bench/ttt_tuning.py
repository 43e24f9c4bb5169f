"""What each knob of strict test-time training is worth on trained artifacts: one knob at a time, at several sizes.

    python bench/ttt_tuning.py RUN... [--data data/builtin_sp4096] [--documents N] [--only NAME ...] [--jobs N]
                               [--results FILE.jsonl] [--report FILE.md]

Each RUN is a folder with model.pgolf and config.json, as MODE=train leaves it. Every variant scores the same first
documents of the validation set, in stream order, with its settings on top of BASE. A run that is in the results is not
run again. The report has what each variant gains over BASE for each model: below 0 is better. Several seeds of a model
give a 95% interval. Models that disagree say that the knob is not worth carrying to a larger one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "bench")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()

import intervals  # noqa: E402
import lab_report  # noqa: E402
import processes  # noqa: E402
import strict  # noqa: E402
import train_gpt as t  # noqa: E402
from ttt_variants import OFF, VARIANTS  # noqa: E402

# Of a submission of November 2026: the presets' values are for 50,000 documents. Chunks do not follow the preset.
BASE = strict.SMALL | dict(
    TTT_ORDER="stream",
    PHASED_TTT_PREFIX_DOCS="200",
    TTT_CHUNK_SIZE="48",
    TTT_SHORT_DOC_CHUNKS="0",
    TTT_RECOMPUTE_TOKENS="0",
    TTT_PLAIN_WEIGHT="0",
    TTT_LORAPLUS_LR_RATIO="1",
)
Row = dict[str, Any]


def key(row: Row) -> tuple[str, int, str, int]:
    """What a result is of."""
    return row["model"], row["seed"], row["variant"], row["documents"]


def score(folder: Path, part: Path, data: Path, variant: str, documents: int) -> Row:
    """The row of a run and a variant, on the documents in `part`. One thread."""
    environment = BASE | VARIANTS.get(variant, {}) | strict.environment_of(folder, part, data)
    found = strict.score(folder, environment | dict(CPU_THREADS="1"), learn=variant != OFF)
    model, seed = model_of(folder)
    return dict(model=model, seed=seed, artifact=digest(folder), variant=variant, documents=documents, **found)


def digest(folder: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a run's artifact."""
    return hashlib.sha256((folder / "model.pgolf").read_bytes()).hexdigest()[:16]


def check_artifacts(folders: list[Path], rows: list[Row], results: Path) -> None:
    """Refuses results of another artifact: one trained by the clock is never the same twice. Errors: ValueError."""
    known = {(row["model"], row["seed"]): row.get("artifact") for row in rows}
    for folder in folders:
        (model, seed), own = model_of(folder), digest(folder)
        if known.setdefault((model, seed), own) != own:
            raise ValueError(
                f"{folder}: {results} has results of another artifact of {model}, seed {seed}; --results must be "
                "another file"
            )


def model_of(folder: Path) -> tuple[str, int]:
    """A run's preset, shape and seconds of training, and its seed."""
    shape, seed = strict.model_of(folder)
    return f"{shape}, {json.loads((folder / 'config.json').read_text())['max_wallclock_seconds']:.0f} s", seed


def seeds_mean(values: list[float], pattern: str) -> str:
    """The mean of a cell's seeds, and its interval if there are several; empty without any."""
    if not values:
        return ""
    interval = f" ± {intervals.half_width(values):.4f}" if len(values) > 1 else ""
    return format(statistics.mean(values), pattern) + interval


def report(rows: list[Row]) -> str:
    """The rows as a page."""
    found = {(row["model"], row["variant"], row["seed"]): row["bpb"] for row in rows}
    models: dict[str, list[int]] = {}
    for model, seed in dict.fromkeys((row["model"], row["seed"]) for row in rows):
        models.setdefault(model, []).append(seed)

    def scores(model: str, variant: str, over: str = "") -> list[float]:
        """Of the seeds that have the variant; its difference to another one, if given."""
        needed = (variant, over or variant)
        seeds = [seed for seed in models[model] if all((model, name, seed) in found for name in needed)]
        return [found[model, variant, seed] - (found[model, over, seed] if over else 0) for seed in seeds]

    lines = [
        "# Knobs of strict test-time training, one at a time",
        "",
        f"Made by `bench/ttt_tuning.py` from {len(rows)} runs: the first {rows[0]['documents']} documents of the "
        "built-in validation set, in stream order. Differences in bits per byte to the settings in the first row, with "
        f"95% intervals over seeds; below 0 is better. Made on {t.cpu_info('model name') or 'one CPU'}, "
        f"torch {t.torch.__version__}, one thread each.",
        "",
        "Base: " + ", ".join(f"`{name}={value}`" for name, value in BASE.items()) + ".",
        "",
        "| variant | settings | "
        + " | ".join(f"{model}, seed{'s' * (len(own) > 1)} {', '.join(map(str, own))}" for model, own in models.items())
        + " |",
        "|---|---|" + "---|" * len(models),
    ]
    bases = [scores(model, "base") for model in models]
    lines.append(f"| base | | {' | '.join(seeds_mean(own, '.4f') + ' bpb' * bool(own) for own in bases)} |")
    for variant in (OFF, *VARIANTS):
        cells = [seeds_mean(scores(model, variant, over="base"), "+.4f") for model in models]
        if any(cells):
            changes = ", ".join(f"`{name}={value}`" for name, value in VARIANTS.get(variant, {}).items())
            lines.append(f"| {variant} | {changes} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder with model.pgolf and config.json")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "builtin_sp4096", help="the validation set")
    parser.add_argument("--documents", type=int, default=200, help="number of validation documents to score")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="NAME", help="variants, beside the base")
    parser.add_argument("--jobs", type=int, default=t.available_cores(), help="runs at a time, a thread each")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "ttt_tuning.jsonl")
    parser.add_argument("--report", type=Path, default=ROOT / "bench" / "results" / "ttt_tuning.md")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs what has no result yet, and writes the report. Returns the exit code."""
    try:
        return tune(parse(arguments))
    except (t.ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def tune(options: argparse.Namespace) -> int:
    """What `main` does. Errors: ConfigError, ValueError for settings or documents that there are not."""
    rows = lab_report.read_results(options.results)
    done = {key(row) for row in rows}
    variants = ("base", OFF, *(options.only or VARIANTS))
    check_artifacts(options.runs, rows, options.results)
    models = {folder: model_of(folder) for folder in options.runs}
    with tempfile.TemporaryDirectory() as temporary:
        part = Path(temporary)
        lengths = strict.write_part(options.data, part, 0, options.documents)
        print(f"{len(lengths)} documents, {lengths.sum()} tokens", flush=True)
        context = multiprocessing.get_context("spawn")
        end_with_this = functools.partial(processes.follow_parent, os.getpid(), signal.SIGKILL)
        with concurrent.futures.ProcessPoolExecutor(options.jobs, context, end_with_this) as pool:
            jobs = [
                pool.submit(score, folder, part, options.data, variant, options.documents)
                for variant in variants
                for folder in options.runs
                if (*models[folder], variant, options.documents) not in done
            ]
            for job in concurrent.futures.as_completed(jobs):
                rows.append(job.result())
                print(f"{rows[-1]['model']}, {rows[-1]['variant']}: {rows[-1]['bpb']:.4f}", flush=True)
                t.write_atomic(options.results, "".join(json.dumps(row) + "\n" for row in rows))
    t.write_atomic(options.report, report(rows))
    print(f"written: {options.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
