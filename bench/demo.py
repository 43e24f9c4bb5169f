"""What the parts of the preset `demo` are worth: whole runs of the demo in its own time limit, in turns.

    python bench/demo.py [--rows before preset] [--seeds 42 0 314] [--seconds 110] [--report bench/results/demo.md]

Each run is train_gpt.py itself with PRESET=demo on the built-in text: it trains, quantizes, packs, reads back and
scores. The rows of a seed follow each other, so that a slow hour of the machine meets all of them. A finished run is
not repeated. `before` is the preset without the parts below; every other row is the preset without one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tools")]
import processes  # noqa: E402
import train_gpt as t  # noqa: E402
from intervals import half_width  # noqa: E402

# Parts that the laboratory and earlier runs of the demo suggested, and the value that switches each off.
PARTS: dict[str, dict[str, Any]] = {
    "key offset": dict(KEY_OFFSET=0, ROPE_DIMS=0),
    "NorMuon": dict(NORMUON_BETA2=0),
    "prefix loss": dict(PREFIX_LOSS_WEIGHT=0),
    "signs of bigrams": dict(BIGRAM_SIGNS=0),
    "hints": dict(HINT_ENABLED=0),
    "no EMA": dict(EMA_DECAY=0.99),
    "larger batch": dict(TRAIN_BATCH_TOKENS=2048),
    "less momentum": dict(MUON_MOMENTUM=0.95),
    "short calibration": dict(GPTQ_CALIBRATION_BATCHES=8),
    "wide heads": dict(NUM_HEADS=4, NUM_KV_HEADS=2),
}
ROWS: dict[str, dict[str, Any]] = {
    "preset": {},
    "before": {name: value for off in PARTS.values() for name, value in off.items()},
    **{f"{part} off": off for part, off in PARTS.items()},
}


def summary_of(label: str, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """The summary in a run's folder, after running it if need be. Errors: RuntimeError with the script's last lines."""
    if not (folder / t.SUMMARY_FILE).is_file():
        variables = {**os.environ, **environment, "ARTIFACT_DIR": str(folder)}
        done = processes.run([sys.executable, str(ROOT / "train_gpt.py")], cwd=ROOT, env=variables)
        if done.returncode:
            raise RuntimeError(f"{label}: {done.stderr[-500:]}")
    return json.loads((folder / t.SUMMARY_FILE).read_text())


def run_of(row: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The summary of one run, after running it if need be. Errors: RuntimeError."""
    folder = options.folder / f"{row.replace(' ', '-')}-{seed}-{options.seconds:g}"
    knobs = dict(PRESET="demo", DATA_PATH=options.data, SEED=seed, MAX_WALLCLOCK_SECONDS=options.seconds) | ROWS[row]
    return summary_of(f"{row}, seed {seed}", {name: str(value) for name, value in knobs.items()}, folder)


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """What is compared: bits per byte in the end and before hints, steps, and bytes of code and model."""
    plain = summary["val_bpb_quantized"]
    return dict(bpb=summary["val_bpb"], plain=plain, steps=summary["steps"], bytes=summary["artifact_bytes"])


def cell(values: list[float], digits: int = 4, sign: str = "") -> str:
    """A mean, with the half width of its 95% interval where there are several values."""
    mean = sum(values) / len(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half_width(values):.{digits}f}" if len(values) > 1 else "")


def report(found: dict[str, dict[int, dict[str, float]]], options: argparse.Namespace) -> str:
    """The page: means over seeds, and differences to the preset with the same seeds."""
    lines = [
        "# The demo, old and new",
        "",
        f"Made by `bench/demo.py`: whole runs of the demo, {options.seconds:g} s of training each, in turns, on "
        f"{t.hardware(t.Run(0, 1, 1, torch.device('cpu')))}, torch {torch.__version__}. Seeds "
        f"{', '.join(map(str, options.seeds))}; ± is the 95% interval over them. The text is the built-in corpus, "
        "which repeats itself far more than web text: key offset and hints gain from that.",
        "",
        "| row | val_bpb | before hints | steps | bytes | val_bpb less the preset's |",
        "|---|---|---|---|---|---|",
    ]
    for row, runs in found.items():
        column = {name: [runs[seed][name] for seed in options.seeds] for name in ("bpb", "plain", "steps", "bytes")}
        change = [runs[seed]["bpb"] - found["preset"][seed]["bpb"] for seed in options.seeds]
        lines.append(
            f"| {row} | {cell(column['bpb'])} | {cell(column['plain'])} | {cell(column['steps'], 0)} | "
            f"{cell(column['bytes'], 0)} | {'' if row == 'preset' else cell(change)} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=["preset", "before"], metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 0, 314])
    parser.add_argument("--seconds", type=float, default=110.0, help="of training")
    parser.add_argument("--data", type=Path, default=ROOT / "data/builtin_sp4096")
    parser.add_argument("--folder", type=Path, default=ROOT / "logs/bench-demo")
    parser.add_argument("--report", type=Path, help="the page to write")
    options = parser.parse_args(arguments)
    rows = list(dict.fromkeys(["preset", *options.rows]))
    found: dict[str, dict[int, dict[str, float]]] = {row: {} for row in rows}
    try:
        for seed in options.seeds:
            for row in rows:
                found[row][seed] = figures(run_of(row, seed, options))
                print(f"{row}, seed {seed}: {found[row][seed]}", flush=True)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = report(found, options)
    if options.report:
        t.write_atomic(options.report, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
