"""What each quantization method gains on a trained model: bits per byte at equal bytes, bytes at equal error.

    python bench/quantize.py [--seconds 110] [--data data/builtin_sp4096] [--json FILE]
    python bench/quantize.py --untrained [--json FILE]

It trains the demo's model, collects its Hessians once, and quantizes the same weights with every method. The reference
is plain GPTQ at the demo's *_CLIP_SIGMAS. `pergroup` packs the integers of all methods. "error" is the sum over banks
of tr(E H E^T) / tr(W H W^T). This is one model and one seed, so small differences are noise.

With --untrained nothing is trained, and only times are measured: random weights and Hessians of PRESET=record, or as
knobs in the environment say, take the way of a run from weights to an artifact and back.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as in train_gpt.py

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as t  # noqa: E402

METHODS = {
    "GPTQ": dict(QUANTIZER="uniform", COLUMN_STEPS=0),
    "GPTQ, column scales": dict(QUANTIZER="uniform", COLUMN_STEPS=0.75),
    "trellis of 4": dict(QUANTIZER="trellis", TRELLIS_STATES=4, COLUMN_STEPS=0),
    "trellis of 8": dict(QUANTIZER="trellis", TRELLIS_STATES=8, COLUMN_STEPS=0),
    "trellis of 8, no rate term": dict(QUANTIZER="trellis", TRELLIS_STATES=8, COLUMN_STEPS=0, TRELLIS_RATE=0),
    "trellis of 8, column scales": dict(QUANTIZER="trellis", TRELLIS_STATES=8, COLUMN_STEPS=0.75),
    "trellis of 32, column scales": dict(QUANTIZER="trellis", TRELLIS_STATES=32, COLUMN_STEPS=0.75),
    "trellis 32, column scales, LQER": dict(QUANTIZER="trellis", TRELLIS_STATES=32, COLUMN_STEPS=0.75, LQER_ENABLED=1),
    "trellis of 8, AWQ-lite": dict(QUANTIZER="trellis", TRELLIS_STATES=8, COLUMN_STEPS=0, AWQ_GROUPS=8),
}


def config(options: argparse.Namespace, **knobs) -> t.Config:
    environment = dict(
        PRESET="demo",
        DATA_PATH=options.data,
        MAX_WALLCLOCK_SECONDS=options.seconds,
        DEVICE="auto",
        COMPRESSOR="pergroup",
        TRAIN_LOG_EVERY=0,
        TARGET_BYTES=1,
    )
    environment |= {name: value for name, value in os.environ.items() if name in t.Config.__dataclass_fields__}
    return t.config_from_env({n: str(v) for n, v in {**environment, **knobs}.items()}, torch.cuda.is_available())[0]


def trained(options: argparse.Namespace, folder: str):
    """Trains the demo's model -> (evaluator, model, weights, Hessians)."""
    c = config(options)
    run = t.start_run(c, dict(ARTIFACT_DIR=folder))
    loader, evaluator = t.TrainLoader(c, run), t.Evaluator(c, run)
    model = t.new_model(c)
    trainer = t.Trainer(model.to(run.device), loader, c, run)
    end = t.train(trainer, lambda: evaluator(trainer.forward))
    trainer.use_average()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return evaluator, model, weights, t.collect_hessians(trainer, end.step)


def error_of(stored: dict, weights: dict, hessians: dict) -> float:
    """Sum over banks of the relative weighted error."""
    total = 0.0
    for name, hessian in hessians.items():
        w, back = t.as_batch(weights[name]), t.as_batch(t.restore(stored[name])).to(weights[name].device)
        total += (t.weighted_error(w - back, hessian).sum() / t.weighted_error(w, hessian).sum()).item()
    return total


def bytes_at_error(c: t.Config, weights: dict, hessians: dict, error: float) -> int:
    """Bytes with the scales that give an error: each attempt corrects the last one by 6.02 dB per doubling."""
    offset = 0.0
    for _ in range(5):
        stored = t.quantize(weights, hessians, c, log2_scale_offset=offset)
        excess = 0.5 * math.log2(error_of(stored, weights, hessians) / error)
        if abs(excess) < 0.002:
            break
        offset -= excess
    return len(t.pack(stored, c))


def random_hessians(weights: dict, generator: torch.Generator) -> dict:
    """Mean X^T X of correlated random inputs for each bank, as `collect_hessians` gives: [matrices, in, in] float32."""
    hessians = {}
    for name in (*t.BANKS, "head" if "head" in weights else "embedding"):
        w = t.as_batch(weights[name])
        inputs = torch.randn(2 * w.size(-1), w.size(-1), generator=generator)
        inputs *= torch.logspace(-1, 1, w.size(-1))  # columns of very different sizes, as activations have
        inputs += 0.5 * inputs.roll(1, 1)
        one = (inputs.mT @ inputs / len(inputs)).to(w.device)
        hessians[name] = one.expand(len(w), -1, -1).clone()
    return hessians


def time_untrained(environment: dict[str, str]) -> dict:
    """Seconds of each part of quantization at PRESET's sizes, on random weights."""
    given = {name: value for name, value in environment.items() if value}
    c = t.config_from_env({"PRESET": "record", **given}, torch.cuda.is_available())[0]
    run, generator = t.start_run(c, {}), torch.Generator().manual_seed(c.seed)
    model = t.new_model(c).to(run.device)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in (*t.BANKS, "embedding"):
        w = weights[name]
        w.copy_(torch.randn(w.shape, generator=generator) * w.size(-1) ** -0.5)
    hessians, rows = random_hessians(weights, generator), []

    def timed(name: str, compute):
        run.synchronize()
        start = time.perf_counter()
        result = compute()
        run.synchronize()
        rows.append(dict(name=name, seconds=time.perf_counter() - start))
        print(f"{name:24} {rows[-1]['seconds']:9.2f} s", flush=True)
        return result

    print(f"{t.parameter_count(c)} random weights; torch {torch.__version__}, {t.hardware(run)}")
    factors = timed("factors of Hessians", lambda: t.factor_hessians(hessians, c))
    stored = timed("one attempt", lambda: t.quantize(weights, hessians, c, factors=factors))
    data = timed("packing", lambda: t.pack(stored, c))
    back = timed("unpacking", lambda: t.unpack(data)[1])
    timed("dequantization", lambda: t.dequantize(back))
    limit = (c.target_bytes or c.artifact_limit_bytes) - t.shipped_code()[0]
    data = timed("the whole stage", lambda: t.make_artifact(weights, hessians, limit, c, print))
    print(f"{len(data)} bytes of {limit}; peak memory {run.peak_memory() / 2**20:.0f} MiB")
    return dict(
        rows=rows,
        bytes=len(data),
        limit=limit,
        parameters=t.parameter_count(c),
        hardware=t.hardware(run),
        torch=torch.__version__,
        peak_memory_bytes=run.peak_memory(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--data", default=str(ROOT / "data" / "builtin_sp4096"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--untrained", action="store_true", help="times alone, at PRESET's sizes")
    options = parser.parse_args()
    if options.untrained:
        found = time_untrained(dict(os.environ))
        if options.json:
            t.write_atomic(options.json, json.dumps(found, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        evaluator, model, weights, hessians = trained(options, folder)
    exact = evaluator(model).bpb
    c_plain = config(options, **METHODS["GPTQ"])
    plain = t.quantize(weights, hessians, c_plain)
    limit, error = len(t.pack(plain, c_plain)), error_of(plain, weights, hessians)
    print(
        f"float {exact:.5f} bpb; plain GPTQ takes {limit} bytes; torch {torch.__version__}, {t.hardware(evaluator.run)}"
    )
    print(
        f"{'at equal bytes':32} {'bytes':>8} {'error':>9} {'dB':>6} {'bpb lost':>9} {'seconds':>8}  "
        "bytes at equal error"
    )
    rows = []
    for name, knobs in METHODS.items():
        c, start = config(options, **knobs), time.perf_counter()
        t.quantize(weights, hessians, c)
        seconds = time.perf_counter() - start
        data = t.quantize_within(weights, hessians, limit, c, lambda line: None)
        stored = t.unpack(data)[1]
        with torch.no_grad():
            for key, value in t.dequantize(stored).items():
                model.get_parameter(key).copy_(value)
        found, lost = error_of(stored, weights, hessians), evaluator(model).bpb - exact
        same_error = bytes_at_error(c, weights, hessians, error)
        rows.append(
            dict(
                method=name,
                bytes=len(data),
                error=found,
                bpb_lost=lost,
                seconds=seconds,
                bytes_at_equal_error=same_error,
                ratio=same_error / limit,
            )
        )
        print(
            f"{name:32} {len(data):8} {found:9.5f} {10 * math.log10(error / found):6.2f} {lost:9.5f} {seconds:8.1f}  "
            f"{same_error} ({same_error / limit:.3f})",
            flush=True,
        )
    if options.json:
        t.write_atomic(options.json, json.dumps(dict(float_bpb=exact, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
