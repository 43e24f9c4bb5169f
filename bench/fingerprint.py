"""Fingerprints of tiny runs of every preset, to show that a change of the code leaves all results bit-equal.

    python bench/fingerprint.py --save before.json      before the change
    python bench/fingerprint.py --against before.json   after it; prints differences, with exit code 1

Each run is the real script in a process of its own, with one CPU thread. A fingerprint has the losses of every step,
the scores of every stage, and for each section of the artifact its length and CRC-32, as the header states them. The
header itself is left out, since it holds the names of knobs and parameters. Two machines may have different
fingerprints.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import processes  # noqa: E402

SMALL = dict(
    VOCAB_SIZE=1024, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2, TRAIN_SEQ_LEN=64, TRAIN_BATCH_TOKENS=2048,
    MICRO_BATCH_TOKENS=512, ITERATIONS=16, MAX_WALLCLOCK_SECONDS=0, GPTQ_RESERVE_SECONDS=0, WARMUP_STEPS=1,
    TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=8, VAL_BATCH_SIZE=4096, GPTQ_CALIBRATION_BATCHES=2, CPU_THREADS=1, DEVICE="cpu",
    TTT_CHUNK_TOKENS=4096, TTT_LORA_RANK=4, TTT_BATCH_SIZE=8, TTT_CHUNK_SIZE=24, PHASED_TTT_PREFIX_DOCS=12,
    PHASED_TTT_NUM_PHASES=2, GLOBAL_TTT_CHUNK_TOKENS=2048, TTT_BASELINE=1, TARGET_BYTES=0, EVAL_STRIDE=32, SEED=5,
)  # fmt: skip
RUNS = {
    "demo": dict(PRESET="demo"),
    "baseline": dict(PRESET="baseline"),
    "record": dict(PRESET="record"),
    "record, 2 ranks": dict(PRESET="record", ranks=2),
    "record, options": dict(
        PRESET="record", COMPUTE_DTYPE="float32", GATED_ATTN_ENABLED=1, SPARSE_ATTN_GATE_ENABLED=0, EVAL_SEQ_LEN=96,
        ROPE_YARN=1, QUANTIZER="uniform", AWQ_GROUPS=2, TEMPERATURE=0.95, TTT_GRAD_STEPS=2,
        TIE_EMBEDDINGS=0, FUSED_CE_ENABLED=0, TTT_SHORT_DOC_CHUNKS=1, LQER_SELECT="norm", ATTENTION="sdpa",
    ),
    "poly5": dict(PRESET="poly5", SWA_EVERY=2, WARMDOWN_ITERS=10),
    "poly5, 2 ranks": dict(PRESET="poly5", SWA_EVERY=2, WARMDOWN_ITERS=10, TTT_FREEZE_BLOCKS=2, ranks=2),
}  # fmt: skip
RESULTS = (
    "val_bpb_pre_quant", "val_bpb_quantized", "val_bpb_ttt", "val_bpb_ttt_baseline", "val_bytes", "val_tokens", "steps",
    "model_bytes", "parameters",
)  # fmt: skip


def sections(artifact: bytes) -> list[list]:
    """[section, codec, packed bytes, unpacked bytes, CRC-32] of each section, from the container's header."""
    _, length, _ = struct.unpack_from("<8sII", artifact)
    return json.loads(zlib.decompress(artifact[16 : 16 + length]))["sections"]


def fingerprint(settings: dict, data: Path) -> dict:
    """Runs the script with these settings. Returns all results that must not change."""
    settings = {**SMALL, **settings, "DATA_PATH": data}
    ranks = settings.pop("ranks", 1)
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
                                 if ranks > 1 else []), str(ROOT / "train_gpt.py")]  # fmt: skip
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        settings["ARTIFACT_DIR"] = Path(folder, "run")
        done = processes.run(command, env={**kept, **{k: str(v) for k, v in settings.items()}}, cwd=folder)
        if done.returncode:
            raise SystemExit(
                f"error: {settings}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        run = Path(folder, "run")
        summary = json.loads((run / "summary.json").read_text())
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        packed = sections((run / "model.pgolf").read_bytes())
    losses = [[m["step"], m.get("train_loss"), m.get("val_loss")] for m in metrics if "step" in m]
    return dict(losses=losses, **{name: summary.get(name) for name in RESULTS if name != "model_bytes"},
                sections=sorted([codec, length, size, crc] for _, codec, length, size, crc in packed),
                model_bytes=summary["model_bytes"])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="write the fingerprints to this file")
    parser.add_argument("--against", type=Path, help="compare the fingerprints with those of this file")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "data" / "builtin_fingerprint", help="shards; prepared if missing"
    )
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=RUNS, help="names of runs (default: all)")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        options = ("--out", str(arguments.data), "--vocab-size", "1024", "--val-fraction", "0.0008")
        processes.run([sys.executable, str(ROOT / "data" / "prepare.py"), "builtin", *options]).check_returncode()
    before = json.loads(arguments.against.read_text()) if arguments.against else {}
    same = True
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: fingerprint(RUNS[name], arguments.data.resolve()), arguments.only)
        prints = dict(zip(arguments.only, found, strict=True))
    for name in prints:
        print(f"{name}: val_bpb {prints[name]['val_bpb_quantized']}, {prints[name]['model_bytes']} bytes", flush=True)
        for key, value in prints[name].items() if arguments.against else ():
            if key != "model_bytes" and before[name][key] != value:
                same = False
                print(f"  {key} differs: {before[name][key]} -> {value}"[:400])
    if arguments.save:
        arguments.save.write_text(json.dumps(prints, indent=1) + "\n")
    if arguments.against:
        print("bit-equal" if same else "NOT equal")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
