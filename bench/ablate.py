"""Ablations: each technique of a preset switched off in turn, on a small model of the same architecture.

    python bench/ablate.py [--presets record poly5] [--seeds 42 0 314] [--only NAME ...] [--steps 150]

Every run is train_gpt.py itself, with a fixed number of steps on the built-in corpus, in a folder of its own under
--folder: a run that is there is not run again, so the command goes on where it was stopped. The table, --out, holds for
each row the change against the whole preset with the same seeds: bits per byte before and after quantization with the
standard deviation of the differences, bytes of the model, tokens/s. Small models and short trainings: a technique that
does nothing here may well pay at the preset's size.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The presets' shapes in small; what a row sets comes on top.
SMALL = dict(
    VOCAB_SIZE=4096, MODEL_DIM=192, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=3, TRAIN_SEQ_LEN=256,
    TRAIN_BATCH_TOKENS=2048, MICRO_BATCH_TOKENS=4096, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=0, VAL_LOSS_EVERY=0,
    TRAIN_LOG_EVERY=50, VAL_BATCH_SIZE=8192, EVAL_SEQ_LEN=256, EVAL_STRIDE=0, GPTQ_CALIBRATION_BATCHES=4,
    TTT_MODE="none", MUON_MOMENTUM_WARMUP_STEPS=50, TARGET_BYTES=0, ROPE_DIMS=16, TIED_EMBED_LR=0.01, WARMDOWN_FRAC=0.6,
)
PRESETS = {
    "record": dict(NUM_LAYERS=6, XSA_LAST_N=6, LOOP_START=1, LOOP_END=2, PARALLEL_START_LAYER=4, EMA_DECAY=0.95),
    "poly5": dict(NUM_LAYERS=6, XSA_LAST_N=3, VE_LAYERS="4,5", EMA_DECAY=0.95, SWA_EVERY=5, RVQ_ENABLED=0),
}
ROWS = {
    "record": {
        "XSA off": dict(XSA_LAST_N=0), "skip gates off": dict(SKIP_GATES_ENABLED=0), "loops off": dict(NUM_LOOPS=0),
        "lanes off": dict(PARALLEL_START_LAYER=-1), "SmearGate off": dict(SMEAR_GATE_ENABLED=0),
        "sparse head gate off": dict(SPARSE_ATTN_GATE_ENABLED=0),
        "output head gate instead": dict(SPARSE_ATTN_GATE_ENABLED=0, ATTN_OUT_GATE_ENABLED=1),
        "LN scale off": dict(LN_SCALE=0), "QK gain 1.5": dict(QK_GAIN_INIT=1.5), "rotary on all": dict(ROPE_DIMS=0),
        "ReLU squared": dict(LEAKY_RELU_SLOPE=0), "NEFTune off": dict(NEFTUNE_ALPHA=0),
        "z-loss off": dict(Z_LOSS_WEIGHT=0), "classic Newton-Schulz": dict(MUON_COEFFICIENTS="classic"),
        "row normalization off": dict(MUON_ROW_NORMALIZE=0), "weight decay off": dict(MUON_WD=0, EMBED_WD=0, ADAM_WD=0),
        "clipping off": dict(GRAD_CLIP_NORM=0), "EMA off": dict(EMA_DECAY=0), "untied head": dict(TIE_EMBEDDINGS=0),
        "LQER off": dict(LQER_ENABLED=0), "uniform quantizer": dict(QUANTIZER="uniform"),
        "steps by column off": dict(COLUMN_STEPS=0), "brotli": dict(COMPRESSOR="brotli"),
        "AWQ-lite on": dict(AWQ_GROUPS=8),
    },
    "poly5": {
        "BigramHash off": dict(BIGRAM_VOCAB_SIZE=0), "value embeddings off": dict(VE_DIM=0),
        "SmearGate off": dict(SMEAR_GATE_ENABLED=0), "XSA off": dict(XSA_LAST_N=0),
        "tanh softcap": dict(SOFTCAP_TYPE="tanh"), "focal loss off": dict(FOCAL_ENABLED=0),
        "z-loss off": dict(Z_LOSS_WEIGHT=0), "progressive depth off": dict(PROGRESSIVE_DEPTH_SCHEDULE="0"),
        "LN scale off": dict(LN_SCALE=0), "weight decay off": dict(MUON_WD=0, EMBED_WD=0, ADAM_WD=0),
        "EMA alone": dict(WEIGHT_AVERAGE="ema"), "SWA alone": dict(WEIGHT_AVERAGE="swa"),
        "late QAT off": dict(LATE_QAT_THRESHOLD=0), "RVQ on": dict(RVQ_ENABLED=1), "GPTQ": dict(QUANTIZER="uniform"),
        "trellis": dict(QUANTIZER="trellis"), "Polar Express": dict(MUON_COEFFICIENTS="polar_express"),
    },
}


def run(folder: Path, preset: str, changes: dict, seed: int, options: argparse.Namespace) -> dict:
    """The summary of one run, which is made if it is not there. Errors: RuntimeError with the script's last lines."""
    if not (folder / "summary.json").is_file():
        values = {**SMALL, **PRESETS[preset], "ITERATIONS": options.steps, **changes, "PRESET": preset, "SEED": seed,
                  "DATA_PATH": options.data, "ARTIFACT_DIR": folder}
        if folder.exists():  # a run that was stopped: nothing in it counts
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, **{name: str(value) for name, value in values.items()}})
        if done.returncode:
            raise RuntimeError(f"{folder}: exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    return json.loads((folder / "summary.json").read_text())


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def line_of(name: str, whole: list[dict], changed: list[dict]) -> str:
    """A row of the table: means of the differences over the seeds, and their deviations."""
    cells = []
    for key in ("val_bpb_pre_quant", "val_bpb_quantized"):
        differences = [b[key] - a[key] for a, b in zip(whole, changed)]
        spread = f" ± {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
        cells.append(f"{statistics.mean(differences):+.4f}{spread}")
    size = statistics.mean(b["model_bytes"] / a["model_bytes"] - 1 for a, b in zip(whole, changed))
    speed = statistics.mean(b["tokens_per_second"] / a["tokens_per_second"] - 1 for a, b in zip(whole, changed))
    return f"| {name} | {cells[0]} | {cells[1]} | {size:+.1%} | {speed:+.0%} |"


def table(preset: str, options: argparse.Namespace) -> list[str]:
    """The lines of one preset's table; rows that have not been run are made."""
    def runs(name: str, changes: dict) -> list[dict]:
        folder = options.folder / f"{preset}-{options.steps}"
        found = [run(folder / f"{slug(name)}-{seed}", preset, changes, seed, options) for seed in options.seeds]
        print(f"{preset}: {name}: " + " ".join(f"{s['val_bpb_quantized']:.4f}" for s in found), flush=True)
        return found

    whole = runs("whole", {})
    means = {key: statistics.mean(s[key] for s in whole) for key in ("val_bpb_pre_quant", "val_bpb_quantized",
                                                                     "model_bytes", "tokens_per_second")}
    lines = [f"## {preset}", "", f"The whole preset: {means['val_bpb_pre_quant']:.4f} bpb, quantized "
             f"{means['val_bpb_quantized']:.4f}, {means['model_bytes']:.0f} bytes, {means['tokens_per_second']:.0f} "
             f"tokens/s; {options.steps} steps of {SMALL['TRAIN_BATCH_TOKENS']} tokens, {whole[0]['parameters']} "
             f"parameters, seeds {', '.join(map(str, options.seeds))}, {whole[0]['hardware']}, torch "
             f"{whole[0]['versions']['torch']}.", "",
             "| changed | bpb | bpb quantized | bytes | tokens/s |", "|---|---|---|---|---|"]
    rows = {name: changes for name, changes in ROWS[preset].items() if not options.only or name in options.only}
    return lines + [line_of(name, whole, runs(name, changes)) for name, changes in rows.items()] + [""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 0, 314])
    parser.add_argument("--only", nargs="+", help="names of rows, as the table has them")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "builtin_sp4096")
    parser.add_argument("--folder", type=Path, default=ROOT / "logs" / "ablate")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "ablate" / "ablation.md")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {name for preset in options.presets for name in ROWS[preset]}
    if unknown:
        print(f"error: --only {' '.join(sorted(unknown))}: rows are {', '.join(ROWS['record'])}, "
              f"{', '.join(ROWS['poly5'])}", file=sys.stderr)
        return 2
    lines = ["# Ablations", "", "Made by `make ablate`. A positive number is a loss by the change.", ""]
    try:
        for preset in options.presets:
            lines += table(preset, options)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    aside = options.out.with_suffix(".tmp")
    aside.write_text("\n".join(lines))
    aside.replace(options.out)
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
