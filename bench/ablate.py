"""Ablations: each technique of a preset switched off in turn, and techniques that it does not use switched on.

    python bench/ablate.py [--presets record poly5] [--seeds 42 0 314] [--only NAME ...] [--steps 150] [--jobs N]

Every run is train_gpt.py itself, with a small model of the preset's architecture and a fixed number of steps on the
built-in corpus. Each run has a folder under --folder. A finished run is not repeated, so the same command resumes a
stopped ablation. --jobs runs go in parallel, each on one thread. All runs of one seed come before those of the next.
Then training steps of each row and of the whole preset are timed in turns, in one process.

The table, --out, compares each row with the whole preset at the same seeds: bits per byte before and after
quantization, bytes of the model, tokens/s, and the standard deviations of these differences. Models are small and
trainings short, so a technique without effect here may well pay at the preset's size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import processes  # noqa: E402
import train_gpt as t  # noqa: E402

# Small shapes for the presets; settings of a row override these. Small models need higher learning rates.
SMALL = dict(
    VOCAB_SIZE=1024,
    NUM_LAYERS=4,
    MODEL_DIM=128,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    MLP_MULT=3,
    TRAIN_SEQ_LEN=256,
    TRAIN_BATCH_TOKENS=2048,
    MICRO_BATCH_TOKENS=4096,
    MAX_WALLCLOCK_SECONDS=0,
    WARMUP_STEPS=0,
    VAL_LOSS_EVERY=0,
    TRAIN_LOG_EVERY=50,
    VAL_BATCH_SIZE=8192,
    EVAL_SEQ_LEN=256,
    EVAL_STRIDE=0,
    EVAL_BUDGET_SECONDS=0,
    GPTQ_CALIBRATION_BATCHES=4,
    TTT_MODE="none",
    MUON_MOMENTUM_WARMUP_STEPS=50,
    TARGET_BYTES=0,
    ROPE_DIMS=16,
    MATRIX_LR=0.04,
    SCALAR_LR=0.04,
    TIED_EMBED_LR=0.03,
    WARMDOWN_FRAC=0.6,
    EMA_DECAY=0.97,
    SWA_EVERY=5,
    RVQ_ENABLED=0,
    CPU_THREADS=1,
)
PRESETS = {
    "record": dict(XSA_LAST_N=4, LOOP_START=1, LOOP_END=2, PARALLEL_START_LAYER=3),
    "poly5": dict(XSA_LAST_N=2, VE_LAYERS="2,3"),
}
NO_DECAY = dict(MUON_WD=0, EMBED_WD=0, ADAM_WD=0)
BLIND = {name.upper(): int(value) for name, value in t.WITHOUT_GRADIENTS.items()}
ROWS = {
    "record": {
        "XSA off": dict(XSA_LAST_N=0),
        "skip gates off": dict(SKIP_GATES_ENABLED=0),
        "loops off": dict(NUM_LOOPS=0),
        "loops from the start": dict(ENABLE_LOOPING_AT=0),
        "lanes off": dict(PARALLEL_START_LAYER=-1),
        "SmearGate off": dict(SMEAR_GATE_ENABLED=0),
        "SmearGate by channel": dict(SMEAR_GATE_TYPE="channel"),
        "head gate off": dict(SPARSE_ATTN_GATE_ENABLED=0),
        "output head gate instead": dict(SPARSE_ATTN_GATE_ENABLED=0, ATTN_OUT_GATE_ENABLED=1),
        "dense head gate instead": dict(SPARSE_ATTN_GATE_ENABLED=0, GATED_ATTN_ENABLED=1),
        "LN scale off": dict(LN_SCALE=0),
        "QK gain 1.5": dict(QK_GAIN_INIT=1.5),
        "rotary on all": dict(ROPE_DIMS=0),
        "ReLU squared": dict(LEAKY_RELU_SLOPE=0),
        "NEFTune off": dict(NEFTUNE_ALPHA=0),
        "z-loss off": dict(Z_LOSS_WEIGHT=0),
        "classic Newton-Schulz": dict(MUON_COEFFICIENTS="classic"),
        "row normalization off": dict(MUON_ROW_NORMALIZE=0),
        "weight decay off": NO_DECAY,
        "clipping off": dict(GRAD_CLIP_NORM=0),
        "EMA off": dict(EMA_DECAY=0),
        "untied head": dict(TIE_EMBEDDINGS=0),
        "LQER on": dict(LQER_ENABLED=1),
        "row groups off": dict(GPTQ_ROW_GROUPS=0),
        "uniform quantizer": dict(QUANTIZER="uniform"),
        "GPTQ-lite": dict(QUANTIZER="gptq_lite", COLUMN_STEPS=0, LQER_ENABLED=0, **BLIND),
        "column scales off": dict(COLUMN_STEPS=0),
        "brotli": dict(COMPRESSOR="brotli"),
        "AWQ-lite on": dict(AWQ_GROUPS=8),
        "two softcaps": dict(ASYM_LOGIT_RESCALE=1),
        "gated XSA": dict(GATED_XSA=1),
        "value residual": dict(VALUE_RESIDUAL=1),
        "pruning of 3%": dict(PRUNE_PCT=0.03),
        "BigramHash on": dict(BIGRAM_VOCAB_SIZE=1536),
        "value embeddings on": dict(VE_DIM=128, VE_LAYERS="2,3"),
        "poly softcap": dict(SOFTCAP_TYPE="poly"),
        "focal loss on": dict(FOCAL_ENABLED=1),
        "SWA on": dict(SWA_ENABLED=1),
        "progressive depth on": dict(PROGRESSIVE_DEPTH_SCHEDULE="0.08,0.25"),
        "late QAT on": dict(LATE_QAT_THRESHOLD=0.15),
        "context 512": dict(EVAL_SEQ_LEN=512),
        "context 512, YaRN": dict(EVAL_SEQ_LEN=512, ROPE_TYPE="yarn"),
    },
    "poly5": {
        "BigramHash off": dict(BIGRAM_VOCAB_SIZE=0),
        "value embeddings off": dict(VE_DIM=0),
        "SmearGate off": dict(SMEAR_GATE_ENABLED=0),
        "XSA off": dict(XSA_LAST_N=0),
        "tanh softcap": dict(SOFTCAP_TYPE="tanh"),
        "focal loss off": dict(FOCAL_ENABLED=0),
        "z-loss off": dict(Z_LOSS_WEIGHT=0),
        "progressive depth off": dict(PROGRESSIVE_DEPTH_SCHEDULE="0"),
        "LN scale off": dict(LN_SCALE=0),
        "weight decay off": NO_DECAY,
        "EMA alone": dict(WEIGHT_AVERAGE="ema"),
        "SWA alone": dict(WEIGHT_AVERAGE="swa"),
        "late QAT off": dict(LATE_QAT_THRESHOLD=0),
        "RVQ on": dict(RVQ_ENABLED=1),
        "GPTQ": dict(QUANTIZER="uniform"),
        "trellis": dict(QUANTIZER="trellis"),
        "Polar Express": dict(MUON_COEFFICIENTS="polar_express"),
        "row normalization on": dict(MUON_ROW_NORMALIZE=1),
        "skip gates on": dict(SKIP_GATES_ENABLED=1),
        "head gate on": dict(SPARSE_ATTN_GATE_ENABLED=1),
        "NEFTune on": dict(NEFTUNE_ALPHA=5),
        "loops on": dict(NUM_LOOPS=2, LOOP_START=1, LOOP_END=2),
        "lanes on": dict(PARALLEL_START_LAYER=3),
    },
}
# Rows that only change the evaluation score the whole preset's artifacts again. For small models and few documents,
# test-time training has higher learning rates, smaller batches and shorter phases.
TTT = dict(
    TTT_BATCH_SIZE=32,
    TTT_LORA_RANK=16,
    TTT_LORA_ALPHA=18,
    TTT_LORA_LR=1e-3,
    PHASED_TTT_PREFIX_DOCS=100,
    GLOBAL_TTT_CHUNK_TOKENS=4096,
    GLOBAL_TTT_LR=0.01,
    TTT_CHUNK_TOKENS=4096,
    TTT_LR=0.01,
)
EVALUATIONS = {
    "stride 64": dict(EVAL_STRIDE=64),
    "temperature 0.95": dict(TEMPERATURE=0.95),
    "phased TTT": dict(TTT_MODE="phased", **TTT),
    "chunk TTT": dict(TTT_MODE="chunk", **TTT),
}


class Job(NamedTuple):
    """One run: a row of a preset's table with one seed. `of`: the run whose artifact it scores again, or None."""

    preset: str
    name: str
    seed: int
    folder: Path
    of: Path | None


def plan(options: argparse.Namespace) -> list[Job]:
    """All runs of the table, seed by seed: first the whole preset, last the runs that score its artifact."""

    def job(preset: str, seed: int, name: str, of: Path | None = None) -> Job:
        folder = options.folder / f"{preset}-{options.steps}" / f"{slug(name)}-{seed}"
        return Job(preset, name, seed, folder, of)

    jobs = []
    for seed in options.seeds:
        for preset in options.presets:
            whole = job(preset, seed, "whole")
            jobs += [whole, *(job(preset, seed, name) for name in wanted(ROWS[preset], options))]
            jobs += [job(preset, seed, name, whole.folder) for name in wanted(EVALUATIONS, options)]
    return sorted(jobs, key=lambda job: (options.seeds.index(job.seed), job.of is not None))


def wanted(rows: dict[str, dict], options: argparse.Namespace) -> list[str]:
    return [name for name in rows if not options.only or name in options.only]


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def run(job: Job, options: argparse.Namespace) -> dict:
    """The summary of one run, after running it if needed. Errors: RuntimeError with the script's last lines."""
    path = job.folder / ("eval_summary.json" if job.of else "summary.json")
    if not path.is_file():
        changes = {**ROWS[job.preset], **EVALUATIONS, "whole": {}}[job.name]
        values = {**settings(job.preset, changes, options), "SEED": job.seed, "ARTIFACT_DIR": job.folder}
        shutil.rmtree(job.folder, ignore_errors=True)  # left by a stopped run
        if job.of:
            job.folder.mkdir(parents=True)
            shutil.copy(job.of / "model.pgolf", job.folder)
            names = (
                "PRESET",
                "DATA_PATH",
                "ARTIFACT_DIR",
                "VAL_BATCH_SIZE",
                "CPU_THREADS",
                "EVAL_BUDGET_SECONDS",
                "EVAL_STRIDE",
                "TTT_MODE",
                *changes,
            )  # the model's own settings are the artifact's
            values = {"MODE": "eval", **{name: values[name] for name in names}}
        done = processes.run(
            [sys.executable, str(ROOT / "train_gpt.py")],
            cwd=ROOT,
            env={**os.environ, **{name: str(value) for name, value in values.items()}},
        )
        if done.returncode:
            raise RuntimeError(f"{job.folder}: exit code {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    summary = json.loads(path.read_text())
    return summary | {"val_bpb_quantized": summary.get("val_bpb_ttt") or summary["val_bpb_quantized"]}


def make_all(jobs: list[Job], options: argparse.Namespace) -> dict[Job, dict]:
    """Every run's summary, --jobs runs at a time. A failure cancels the runs that have not begun."""
    found, began = {}, time.monotonic()
    trained = [[job for job in jobs if not job.of], [job for job in jobs if job.of]]
    for group in trained:  # an artifact must exist before it is scored again
        with ThreadPoolExecutor(options.jobs) as pool:
            futures = {job: pool.submit(run, job, options) for job in group}
            for job, future in futures.items():
                try:
                    found[job] = future.result()
                except RuntimeError:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
                print(
                    f"{len(found)}/{len(jobs)} {time.monotonic() - began:.0f}s {job.preset} {job.name} seed "
                    f"{job.seed}: {found[job]['val_bpb_quantized']:.4f}",
                    flush=True,
                )
    return found


def settings(preset: str, changes: dict, options: argparse.Namespace) -> dict[str, str]:
    """The environment of a training run."""
    values = {
        **SMALL,
        **PRESETS[preset],
        "ITERATIONS": options.steps,
        **changes,
        "PRESET": preset,
        "DATA_PATH": options.data,
    }
    return {name: str(value) for name, value in values.items()}


class Timed:
    """A trainer whose steps are timed at five points of the training, because recurrence, depth and QAT change."""

    def __init__(self, preset: str, changes: dict, options: argparse.Namespace):
        self.config = t.config_from_env(settings(preset, changes, options), False)[0]
        model = t.new_model(self.config)
        run = t.start_run(self.config, {})
        self.trainer = t.Trainer(model, t.TrainLoader(self.config, run), self.config, run)

    def seconds(self) -> float:
        """Mean seconds of a step."""
        begin = time.perf_counter()
        for fraction in (0.1, 0.3, 0.5, 0.7, 0.9):
            progress = t.Progress(int(fraction * self.config.iterations), 0.0)
            self.trainer.step(progress, *t.step_variant_at(progress, self.config))
        return (time.perf_counter() - begin) / 5


def speeds(preset: str, options: argparse.Namespace, rounds: int = 4) -> dict[str, list[float]]:
    """Ratio of each row's tokens/s to the whole preset's, timed in turns without the first round.

    The result is saved beside the runs. "whole" has the preset's tokens/s.
    """
    file = options.folder / f"{preset}-{options.steps}" / "speeds.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    missing = [name for name in wanted(ROWS[preset], options) if name not in found]
    if found and not missing:
        return found
    whole = Timed(preset, {}, options)
    if not found:
        found["whole"] = [whole.config.train_batch_tokens / whole.seconds() for _ in range(rounds)][1:]
    for name in missing:
        changed = Timed(preset, ROWS[preset][name], options)
        found[name] = [whole.seconds() / changed.seconds() for _ in range(rounds)][1:]
        changed.trainer.loader.ahead.close()
        t.write_atomic(file, json.dumps(found, indent=1) + "\n")
        print(f"{preset} {name}: {statistics.mean(found[name]):.3f} of the whole preset's tokens/s", flush=True)
    return found


def change(whole: list[dict], changed: list[dict], key: str, relative: bool = False) -> str:
    """A cell: mean and deviation of the differences over the seeds."""
    if key not in changed[0]:
        return ""
    differences = [
        100 * (b[key] / a[key] - 1) if relative else b[key] - a[key] for a, b in zip(whole, changed, strict=True)
    ]
    digits, unit = (1, "%") if relative else (4, "")
    spread = f" ± {statistics.stdev(differences):.{digits}f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.{digits}f}{spread}{unit}"


def line_of(name: str, whole: list[dict], changed: list[dict], ratios: list[float] | None) -> str:
    """A row of the table."""
    cells = [change(whole, changed, "val_bpb_pre_quant"), change(whole, changed, "val_bpb_quantized")]
    cells.append(change(whole, changed, "model_bytes", True))
    percent = [100 * (ratio - 1) for ratio in ratios or ()]
    cells.append(f"{statistics.mean(percent):+.1f} ± {statistics.stdev(percent):.1f}%" if percent else "")
    return f"| {name} | " + " | ".join(cells) + " |"


def verdicts(whole: list[dict], rows: dict[str, list[dict]]) -> list[str]:
    """The rows grouped by their effect on the score after quantization, and by whether all seeds agree."""
    groups: dict[str, list[str]] = {"Better with every seed": [], "Worse with every seed": [], "Seeds disagree": []}
    for name, changed in rows.items():
        signs = {
            (b["val_bpb_quantized"] > a["val_bpb_quantized"]) - (b["val_bpb_quantized"] < a["val_bpb_quantized"])
            for a, b in zip(whole, changed, strict=True)
        }
        groups[
            {(-1,): "Better with every seed", (1,): "Worse with every seed"}.get(tuple(signs), "Seeds disagree")
        ].append(name)
    return [f"{title}: {', '.join(names)}.\n" for title, names in groups.items() if names]


def table(preset: str, found: dict[Job, dict], options: argparse.Namespace) -> list[str]:
    """The lines of one preset's table."""
    rows: dict[str, list[dict]] = {}
    for job, summary in found.items():
        if job.preset == preset:
            rows.setdefault(job.name, []).append(summary)
    whole, ratios = rows.pop("whole"), speeds(preset, options)
    keys = ("val_bpb_pre_quant", "val_bpb_quantized", "model_bytes")
    means = {key: statistics.mean(s[key] for s in whole) for key in keys}
    spread = statistics.stdev(s["val_bpb_quantized"] for s in whole) if len(whole) > 1 else 0
    return [
        f"## {preset}",
        "",
        f"The whole preset: {means['val_bpb_pre_quant']:.4f} bpb, quantized "
        f"{means['val_bpb_quantized']:.4f} (deviation {spread:.4f}), {means['model_bytes']:.0f} bytes, "
        f"{statistics.mean(ratios['whole']):.0f} tokens/s on one thread; {options.steps} steps of "
        f"{SMALL['TRAIN_BATCH_TOKENS']} tokens, {whole[0]['parameters']} parameters, seeds "
        f"{', '.join(map(str, options.seeds))}, {whole[0]['hardware']}, torch {whole[0]['versions']['torch']}.",
        "",
        "| changed | bpb | bpb quantized | bytes | tokens/s |",
        "|---|---|---|---|---|",
        *(line_of(name, whole, changed, ratios.get(name)) for name, changed in rows.items()),
        "",
        *verdicts(whole, rows),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 0, 314])
    parser.add_argument("--only", nargs="+", help="rows to run, by their names in the table")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=t.available_cores(), help="number of parallel runs")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "builtin_ablate")
    parser.add_argument("--folder", type=Path, default=ROOT / "logs" / "ablate")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "ablate" / "ablation.md")
    options = parser.parse_args()
    names = [name for preset in options.presets for name in ROWS[preset]] + list(EVALUATIONS)
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        print(f"error: --only {' '.join(unknown)}: rows are {', '.join(dict.fromkeys(names))}", file=sys.stderr)
        return 2
    try:
        found = make_all(plan(options), options)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lines = [
        "# Ablations",
        "",
        "Made by `make ablate`. Each figure is the difference to the whole preset with the same seeds: mean ± standard "
        "deviation over the seeds (of tokens/s: over three timings in turns). More bits per byte are worse. "
        "Rows without a figure before quantization only change the evaluation of the whole preset's artifacts.",
        "",
    ]
    for preset in options.presets:
        lines += table(preset, found, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    aside = options.out.with_suffix(".tmp")
    aside.write_text("\n".join(lines))
    aside.replace(options.out)
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
