"""What FP8 does to the loss: bf16 training steps against e4m3 inputs of the head, of the MLP and of both.

    python bench/fp8.py [--data FOLDER] [--steps N] [--seeds N ...] [--set NAME=VALUE ...] [--out FOLDER]

A small model of the record's shape trains on text, with the same initial weights and batches for each variant of a
seed. On CPUs FP8 is simulated: inputs are rounded to e4m3 as on a GPU, and multiplied in bf16 with float32 sums. The
scores are of the trained weights in bf16, without averaging or quantization. --out gets fp8.json and fp8.md. A mean
difference to bf16 has its 95% confidence interval by Student's t, over the seeds.

bench/results/fp8.md is of --data data/builtin_sp1024, the built-in text with a vocabulary of 1024.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "bench")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import torch  # noqa: E402

import intervals  # noqa: E402
import train_gpt as t  # noqa: E402

VARIANTS = {
    "bf16": {},
    "head": dict(FP8_HEAD="1"),
    "MLP": dict(FP8_MLP="1"),
    "head and MLP": dict(FP8_HEAD="1", FP8_MLP="1"),
}
# The record's architecture and optimizers, small enough for one core.
SMALL = dict(
    PRESET="record",
    COMPUTE_DTYPE="bfloat16",
    CPU_THREADS="1",
    VOCAB_SIZE="1024",
    NUM_LAYERS="4",
    LOOP_START="1",
    LOOP_END="1",
    NUM_LOOPS="1",
    PARALLEL_START_LAYER="3",
    XSA_LAST_N="4",
    MODEL_DIM="128",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    TRAIN_SEQ_LEN="256",
    TRAIN_BATCH_TOKENS="2048",
    MICRO_BATCH_TOKENS="2048",
    MUON_MOMENTUM_WARMUP_STEPS="100",
    MAX_WALLCLOCK_SECONDS="0",
    WARMUP_STEPS="0",
    EMA_DECAY="0",
    VAL_BATCH_SIZE="8192",
    EVAL_SEQ_LEN="256",
    EVAL_STRIDE="0",
    TTT_MODE="none",
    ALLOW_SHARED_WINDOWS="1",
)
LAST = 50  # steps whose losses are averaged


def train_once(environment: dict[str, str], score: bool = True) -> dict[str, float]:
    """Trains one model: mean loss of the last steps in nats, bits per byte of validation text, seconds of a step."""
    c, _, _ = t.config_from_env(environment, torch.cuda.is_available())
    run = t.start_run(c, {})
    trainer = t.Trainer(t.new_model(c).to(run.device), t.TrainLoader(c, run), c, run)
    losses, begin = [], time.perf_counter()
    for step in range(c.iterations):
        p = t.Progress(step, 0.0)
        losses.append(trainer.step(p, *t.step_variant_at(p, c)).item() / c.train_batch_tokens)
    seconds = (time.perf_counter() - begin) / c.iterations
    trainer.loader.ahead.close()
    bpb = t.make_evaluator(c, run)(trainer.forward).bpb if score else math.nan
    return dict(loss=statistics.mean(losses[-LAST:]), bpb=bpb, seconds_per_step=seconds)


def difference(results: dict[str, dict[str, dict[str, float]]], variant: str, key: str) -> tuple[float, float]:
    """Mean difference to bf16 over the seeds, and half of its 95% interval (NaN for one seed)."""
    found = [of_seed[variant][key] - of_seed["bf16"][key] for of_seed in results.values()]
    return statistics.mean(found), intervals.half_width(found) if len(found) > 1 else math.nan


def table(content: dict[str, Any]) -> list[str]:
    """The results in Markdown."""
    results, rows = content["results"], []
    for variant in VARIANTS:
        cells = []
        for key in ("loss", "bpb"):
            cells.append(f"{statistics.mean(r[variant][key] for r in results.values()):.4f}")
            mean, half = difference(results, variant, key)
            cells.append("" if variant == "bf16" else f"{mean:+.4f} ± {half:.4f}")
        rows.append(f"| {variant} | " + " | ".join(cells) + " |")
    return [
        f"# FP8 in training, {content['how']}",
        "",
        f"Made by `python bench/fp8.py`: {content['parameters']} parameters, {content['steps']} steps of "
        f"{content['tokens']} tokens, seeds {', '.join(results)}, on {content['hardware']}, torch {content['torch']}. "
        f"Loss: mean of the last {LAST} steps, in nats. Bits per byte: of validation text, by the trained weights in "
        "bf16. Differences to bf16 are means over the seeds with a 95% interval.",
        "",
        "| e4m3 inputs of | loss | difference | bits per byte | difference |",
        "|---|---|---|---|---|",
        *rows,
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "builtin_ablate", help="folder of token shards")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 0, 314])
    parser.add_argument("--set", nargs="+", default=[], dest="settings", help="knobs, NAME=VALUE")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "fp8", help="folder of the results")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    environment = {**SMALL, "DATA_PATH": str(options.data), "ITERATIONS": str(options.steps)}
    environment |= dict(pair.split("=", 1) for pair in options.settings)
    results: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for changes in VARIANTS.values():  # before the first training: what FP8 does not take is refused
            c, _, _ = t.config_from_env({**environment, **changes}, torch.cuda.is_available())
        for seed in options.seeds:
            of_seed = results[str(seed)] = {}
            for name, changes in VARIANTS.items():
                of_seed[name] = train_once({**environment, **changes, "SEED": str(seed)})
                shown = "  ".join(f"{key} {value:.4f}" for key, value in of_seed[name].items())
                print(f"seed {seed:4d}  {name:13s} {shown}", flush=True)
    except t.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    content = dict(
        how="on FP8 tensor cores" if t.float8_supported(c) else "simulated",
        parameters=t.parameter_count(c),
        steps=c.iterations,
        tokens=c.train_batch_tokens,
        hardware=t.hardware(t.start_run(c, {})),
        torch=torch.__version__,
        settings=environment | {"DATA_PATH": options.data.name},
        results=results,
    )
    content["differences"] = {
        name: {key: difference(results, name, key) for key in ("loss", "bpb")} for name in VARIANTS if name != "bf16"
    }
    lines = table(content)
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    t.write_atomic(options.out / "fp8.json", t.to_json(content, indent=1) + "\n")
    t.write_atomic(options.out / "fp8.md", "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
