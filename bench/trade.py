"""Finer quantization or more parameters? Models of several sizes at equal bytes and equal training FLOPs.

    python bench/trade.py [--folder runs/trade] [--widths 96,128,192] [--seeds 42] [--json FILE]

For each width there is a base model, which gets 3.55 bits for each of its parameters: what the challenge's peers have
for 36 million in 16,000,000 bytes. Every other shape of that width has more parameters, the same bytes and the same
training FLOPs, so fewer steps. FLOPs stand for seconds here: on shared cores, seconds differ by a factor of three from
run to run. Every run is train_gpt.py itself. Finished runs are not repeated, so the same command goes on.

The table says what a shape's quantized score is over the base's. These models and trainings are small. Only the trend
over widths says something about a large one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "bench")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()

import ablate  # noqa: E402
import processes  # noqa: E402
import train as bench_train  # noqa: E402
import train_gpt as t  # noqa: E402

BITS_PER_PARAMETER = 3.55
STEPS = {64: 200, 96: 300, 128: 450, 192: 700, 256: 1000}  # of the base, of 2,048 tokens each
SHAPES: dict[str, dict[str, float]] = {
    "base": {},
    "MLP 5.5": dict(MLP_MULT=5.5),
    "5 layers": dict(NUM_LAYERS=5),
    "wider": dict(MODEL_DIM=1.125),  # times the width
}


def environment(shape: str, width: int, seed: int) -> dict[str, Any]:
    """The knobs of a run, without its steps and bytes."""
    values = dict(
        ablate.SMALL, PRESET="record", MLP_MULT=4, MODEL_DIM=width, SEED=seed, TRAIN_LOG_EVERY=0, TUNE_STEPS=0
    )
    values |= dict(PARALLEL_START_LAYER=3, LOOP_START=1, LOOP_END=2, XSA_LAST_N=4, EMA_DECAY=0.99, TRELLIS_STATES=8)
    values |= dict(DATA_PATH=str(ROOT / "data" / "builtin_ablate"), ARTIFACT_LIMIT_BYTES=16_000_000)
    changes = dict(SHAPES[shape])
    if "MODEL_DIM" in changes:
        changes["MODEL_DIM"] = 8 * math.ceil(
            width * changes["MODEL_DIM"] / 8
        )  # even widths of heads, for rotary embeddings
    return {**values, **changes}


def config_of(values: dict[str, Any]) -> t.Config:
    return t.config_from_env({name: str(value) for name, value in values.items()}, False)[0]


def training_flops(config: t.Config) -> float:
    """FLOPs of a token in training, the mean of steps before and after the loops begin."""
    model = t.meta_model(config)
    variants = (t.StepVariant(loops, config.num_layers, False) for loops in (False, True))
    plain, looped = (bench_train.flops_per_token(model, v, config.train_seq_len / 2) for v in variants)
    share = config.enable_looping_at if config.loops else 1.0
    return share * plain + (1 - share) * looped


def run(shape: str, width: int, seed: int, folder: Path) -> dict[str, Any]:
    """One run's row; read from its folder where it has ended before."""
    base, own = (config_of(environment(name, width, seed)) for name in ("base", shape))
    steps = round(STEPS[width] * training_flops(base) / training_flops(own))
    target = t.shipped_code()[0] + int(BITS_PER_PARAMETER * t.parameter_count(base) / 8)
    place = folder / f"{width}-{shape.replace(' ', '_')}-{seed}"
    summary = place / "summary.json"
    if not summary.is_file():
        values = environment(shape, width, seed) | dict(ITERATIONS=steps, TARGET_BYTES=target, ARTIFACT_DIR=place)
        kept = {name: value for name, value in os.environ.items() if name not in t.Config.__dataclass_fields__}
        command = [sys.executable, str(ROOT / "train_gpt.py")]
        done = processes.run(command, env=kept | {name: str(value) for name, value in values.items()}, timeout=3600)
        if done.returncode:
            raise SystemExit(f"{place} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads(summary.read_text())
    row = dict(width=width, shape=shape, seed=seed, steps=steps, parameters=found["parameters"])
    row |= dict(model_bytes=found["model_bytes"], bits=8 * found["model_bytes"] / found["parameters"])
    return row | dict(pre_quant=found["val_bpb_pre_quant"], quantized=found["val_bpb_quantized"])


def report(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown: each shape, and what it scores over the base of its width and seed."""
    lines = ["| width | shape | parameters | bits each | steps | bpb before | bpb quantized | over the base |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    base = {(r["width"], r["seed"]): r["quantized"] for r in rows if r["shape"] == "base"}
    for width, shape in dict.fromkeys((r["width"], r["shape"]) for r in rows):
        own = [r for r in rows if (r["width"], r["shape"]) == (width, shape)]
        first = own[0]
        before, after = (statistics.mean(r[key] for r in own) for key in ("pre_quant", "quantized"))
        over = [r["quantized"] - base[width, r["seed"]] for r in own]
        spread = f" ± {statistics.stdev(over):.4f}" if len(over) > 1 else ""
        lines.append(
            f"| {width} | {shape} | {first['parameters']:,} | {first['bits']:.2f} | {first['steps']} | {before:.4f} "
            f"| {after:.4f} | {statistics.mean(over):+.4f}{spread} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "trade", help="where runs are kept")
    parser.add_argument("--widths", default="96,128,192", help=f"some of {', '.join(map(str, STEPS))}")
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for seed in map(int, options.seeds.split(",")):
        for width in map(int, options.widths.split(",")):
            for shape in SHAPES:
                rows.append(run(shape, width, seed, options.folder))
                print(" ".join(f"{key}:{value}" for key, value in rows[-1].items()), flush=True)
    print(report(rows))
    if options.json:
        t.write_atomic(options.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
