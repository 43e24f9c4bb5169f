"""Speedup of the hand-written CPU kernels: plain and fast versions in turn, in one process.

    python bench/cpu_kernels.py [--rows 16] [--length 256] [--repeats 9]

Each figure is the median of several alternating runs of forward and backward. A ratio above 1 means that the fast
version is faster. The last line compares a whole training step of the demo preset with ATTENTION=sdpa and blocked.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import torch  # noqa: E402

import train_gpt as t  # noqa: E402


def alternate(slow: Callable, fast: Callable, repeats: int) -> tuple[float, float]:
    """Median seconds of both functions, run in turn so that changes of the machine's speed affect both."""
    times: tuple[list, list] = ([], [])
    for _ in range(repeats + 1):
        for function, seconds in zip((slow, fast), times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def both_ways(function: Callable, *inputs: torch.Tensor) -> Callable:
    """A function without arguments that runs forward and backward."""

    def call() -> None:
        out = function(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return call


def one_document(rows: int, length: int) -> t.Documents:
    """One document in each sequence."""
    starts = torch.zeros(rows, length, dtype=torch.int32)
    return t.Documents(starts, torch.from_numpy(t.cu_seqlens_of(starts.numpy())))


def kernels(rows: int, length: int, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (plain, fast), at the demo's shapes."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    targets = torch.randint(1024, (rows, length))
    documents = one_document(rows, length)
    qkv = draw(rows, length, 4, 64), draw(rows, length, 2, 64), draw(rows, length, 2, 64)
    x, hidden = draw(rows, length, 256), draw(rows, length, 768)
    logits = draw(rows, length, 1024)
    attention = {
        name: both_ways(t.attention_backend(name, length)(documents, 4, 2), *qkv) for name in ("sdpa", "blocked")
    }
    return {
        "attention": (attention["sdpa"], attention["blocked"]),
        "rms_norm": (both_ways(t.rms_norm_plain, x), both_ways(t.RMSNormCPU.apply, x)),
        "subtract_own_value": (
            both_ways(t.subtract_own_value_plain, qkv[0], qkv[2]),
            both_ways(t.SubtractOwnValueCPU.apply, qkv[0], qkv[2]),
        ),
        "leaky_relu_squared": (
            both_ways(lambda h: t.leaky_relu_squared_plain(h, 0.5), hidden),
            both_ways(lambda h: t.LeakyReLUSquaredCPU.apply(h, 0.5), hidden),
        ),
        "cross_entropy": (
            both_ways(lambda z: t.softcapped_cross_entropy_plain(z, targets, 30.0), logits),
            both_ways(lambda z: t.SoftcappedCrossEntropyCPU.apply(z, targets, 30.0), logits),
        ),
    }


def training_step(attention: str) -> Callable:
    """Forward and backward of the demo's model on random tokens."""
    c = dataclasses.replace(t.resolved(t.Config(**t.PRESETS["demo"]), False), attention=attention)
    model = t.new_model(c)
    rows = c.micro_batch_tokens // c.train_seq_len
    ids = torch.randint(4, c.vocab_size, (rows, c.train_seq_len))

    def call() -> None:
        model(ids, ids, one_document(*ids.shape), looped=False)[0].mean().backward()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(t.available_cores())
    t.keep_freed_memory(os.environ)
    print(f"torch {torch.__version__}, {t.available_cores()} cores, {options.rows} rows of {options.length}, bfloat16")
    pairs = kernels(options.rows, options.length, torch.bfloat16)
    pairs["training step"] = training_step("sdpa"), training_step("blocked")
    for name, (plain, fast) in pairs.items():
        before, after = alternate(plain, fast, options.repeats)
        print(f"{name:20s} plain {1000 * before:8.2f} ms   fast {1000 * after:8.2f} ms   ratio {before / after:.2f}")


if __name__ == "__main__":
    main()
