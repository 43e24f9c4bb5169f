"""Whether steps wait for data: training at the demo's configuration, a consumer of 12 million tokens/s, and the audit.

    python bench/loader.py --data data/builtin_sp4096 [--tokens 100000000] [--seconds 3]

Three parts, each with reading ahead and without, in turns. `demo`: real training steps of PRESET=demo on --data; how
much of their time they waited for batches. `consumer`: rows of PRESET=record from a shard of random tokens in documents
as long as web pages are; one rank of 8 at a time asks for its micro-batches as a step of 12 million tokens/s would,
and sleeps in between, so that the thread has a core as beside a GPU; the rate is that without sleeping. Waiting is the
whole time inside of `TrainLoader.batch`. `audit`: what a pass over the shard costs, with its SHA-256 and without, and
with runs of 50 tokens; from it, computed and not measured, the time of 10 billion tokens on 8 ranks with a core each,
the reading from a disk left out: the shard is in memory here.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402
from bench.train import write_tokens  # noqa: E402

RATE, RANKS, DEPTHS = 12e6, 8, (0, 2)
CHALLENGE_TOKENS = 10e9


def config(preset: str, folder: Path, **knobs: str) -> t.Config:
    return t.config_from_env(dict(PRESET=preset, DATA_PATH=str(folder), DEVICE="cpu", **knobs), False)[0]


def demo(folder: Path, steps: int, turns: int) -> list[str]:
    """Training steps of the demo, in turns of `steps` with and without reading ahead."""
    c = config("demo", folder)
    run, model = t.start_run(c, {}), t.GPT(c)
    model.reset()
    trainer = t.Trainer(model, t.TrainLoader(c, run))
    loaders = {depth: t.TrainLoader(dataclasses.replace(c, read_ahead=depth), run) for depth in DEPTHS}
    trainer.warm_up()
    spent, step = dict.fromkeys(DEPTHS, 0.0), 0
    for _ in range(turns):
        for depth, trainer.loader in loaders.items():
            begin = time.perf_counter()
            for _ in range(steps):
                trainer.step(t.Progress(step, 0.0), False)
                step += 1
            spent[depth] += time.perf_counter() - begin
    lines = []
    for depth, loader in loaders.items():
        loader.ahead.close()
        lines.append(
            f"demo      read ahead {depth}   {turns * steps} steps of {c.train_batch_tokens} tokens, "
            f"{1000 * spent[depth] / (turns * steps):.1f} ms each, waited {loader.waited / spent[depth]:.3%} "
            "of the time"
        )
    return lines


def consume(loader: t.TrainLoader, seconds: float, rate: float) -> tuple[float, float]:
    """Asks for batches for some seconds, at most at this rate. Returns (tokens/s, share of the time spent waiting)."""
    tokens = loader.layout.micro_rows * loader.c.train_seq_len
    place, taken, loader.waited, begin = (0, 0), 0, 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        loader.batch(*place)
        place, taken = loader.following(place), taken + tokens
        time.sleep(max(0.0, tokens / rate - (time.perf_counter() - start)))
    spent = time.perf_counter() - begin
    return taken / spent, loader.waited / spent


def consumer(folder: Path, seconds: float) -> list[str]:
    """What one rank of 8 sustains, and how long it waits, ranks one after the other."""
    lines, c = [], config("record", folder)
    found: dict[int, list[tuple[float, float]]] = {depth: [] for depth in DEPTHS}
    for rank in range(RANKS):
        for depth in DEPTHS:
            run = t.Run(rank, RANKS, RANKS, torch.device("cpu"))
            loader = t.TrainLoader(dataclasses.replace(c, read_ahead=depth), run)
            free, _ = consume(loader, seconds / 2, np.inf)
            _, waited = consume(loader, seconds, RATE)
            found[depth].append((free, waited))
            loader.ahead.close()
    for depth, rows in found.items():
        free, waited = (statistics.median(column) for column in zip(*rows, strict=True))
        lines.append(
            f"consumer  read ahead {depth}   sustained {free / 1e6:.1f} M tokens/s a rank; at "
            f"{RATE / 1e6:.0f} M tokens/s it waited {waited:.3%} of the time (medians of {RANKS} ranks, "
            f"{loader.layout.micro_rows} x {c.train_seq_len} tokens at a time)"
        )
    return lines


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def audit(folder: Path, validation_tokens: int) -> list[str]:
    """The cost of a pass over a shard, on one thread."""
    c, lines = config("record", folder), []
    training = t.TokenStream(c, "train")
    with tempfile.TemporaryDirectory() as other:
        write_tokens(Path(other), dataclasses.replace(c, seed=1), validation_tokens, 800.0)
        validation = t.TokenStream(dataclasses.replace(c, data_path=other), "train")
        begin = time.perf_counter()
        index = t.DocumentIndex(validation)
        middle = time.perf_counter()
        windows = t.WindowIndex(validation)
        lines.append(
            f"audit     indexing {validation_tokens} validation tokens: documents {middle - begin:.2f} s, "
            f"runs of 50 tokens {time.perf_counter() - middle:.2f} s"
        )
    for words, arguments in (
        ("documents, no hash", (False, index)),
        ("documents and SHA-256", (True, index)),
        ("those and runs of 50 tokens", (True, index, windows)),
    ):
        seconds = seconds_of(functools.partial(t.scan_shard, training, 0, *arguments))
        rate = len(training) / seconds
        lines.append(
            f"audit     {words}: {rate / 1e6:.0f} M tokens/s, {2 * rate / 1e9:.2f} GB/s on one core; 10 "
            f"billion tokens on {RANKS} ranks: {CHALLENGE_TOKENS / rate / RANKS:.1f} s (computed)"
        )
    return lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/builtin_sp4096"), help="folder of the demo's shards")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens of the synthetic shard")
    parser.add_argument("--seconds", type=float, default=2.0, help="of asking, for each rank")
    parser.add_argument("--steps", type=int, default=20, help="of the demo, in each of 5 turns")
    options = parser.parse_args(arguments)
    if options.tokens < 10**6 or options.seconds <= 0 or options.steps < 1:
        parser.error("--tokens must be at least 1000000, --seconds above 0, --steps at least 1")
    try:
        lines = demo(options.data, options.steps, 5)
        print(
            f"# python bench/loader.py {' '.join(arguments)}\n{t.hardware(t.Run(0, 1, 1, torch.device('cpu')))}  "
            f"torch {torch.__version__}  numpy {np.__version__}",
            *lines,
            sep="\n",
            flush=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            write_tokens(Path(folder), config("record", Path(folder)), options.tokens, 800.0)
            print(*consumer(Path(folder), options.seconds), *audit(Path(folder), 10_000_000), sep="\n")
    except (t.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
