"""Whether steps wait for data: in the demo's training, at 12 million tokens/s, and what checks and audits of data cost.

    python bench/loader.py --data data/builtin_sp4096 [--tokens 100000000] [--seconds 3]

The first two parts run with reading ahead and without, in turns. `demo`: real training steps of PRESET=demo on --data;
the share of their time for which they waited for batches. `consumer`: sequences of PRESET=record from a shard of
random tokens in documents as long as web pages. One rank of 8 at a time asks for its micro-batches at the rate of a
step of 12 million tokens/s and sleeps in between, so that the thread has a core, as beside a GPU. The sustained rate is
that without sleeping. The data stall is the whole time inside of `TrainLoader.batch`. `audit`: a pass over the shard by
a run's check, with SHA-256 and without, and by data/audit.py, which looks for validation text. The time for 10 billion
tokens on 8 cores is computed from it, not measured, and leaves out the disk: the shard is in memory here.
`order`: for each DATA_ORDER, the mean context of a token, as a share of what it has in whole documents (cut at
TRAIN_SEQ_LEN alone), and what one rank sustains without reading ahead; then the order of so many documents that they
hold 10 billion tokens: seconds until its first sequence and until one of another window, and the memory of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tools")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import numpy as np  # noqa: E402
import torch  # noqa: E402

import audit as leaks  # noqa: E402
import train_gpt as t  # noqa: E402
from bench.train import write_tokens  # noqa: E402

RATE = 12e6  # tokens/s of the whole step
RANKS = 8
DEPTHS: tuple[int, ...] = (0, 2)
CHALLENGE_TOKENS = 10e9


def config(preset: str, folder: Path, **knobs: str) -> t.Config:
    return t.config_from_env(dict(PRESET=preset, DATA_PATH=str(folder), DEVICE="cpu", **knobs), False)[0]


def demo(folder: Path, steps: int, turns: int) -> list[str]:
    """Training steps of the demo, in turns of `steps` with and without reading ahead."""
    c = config("demo", folder)
    run = t.start_run(c, {})
    trainer = t.Trainer(t.new_model(c), t.TrainLoader(c, run), c, run)
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
            f"{1000 * spent[depth] / (turns * steps):.1f} ms each, data stall {loader.data_stall / spent[depth]:.3%} "
            "of step time"
        )
    return lines


def consume(loader: t.TrainLoader, seconds: float, rate: float) -> tuple[float, float]:
    """Asks for batches for some seconds, at most at this rate. Returns (tokens/s, share of the time spent waiting)."""
    tokens = loader.layout.micro_sequences * loader.config.train_seq_len
    place, taken = (0, 0, loader.config.train_seq_len), 0
    loader.data_stall = 0.0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        loader.batch(*place)
        place, taken = loader.following(place), taken + tokens
        time.sleep(max(0.0, tokens / rate - (time.perf_counter() - start)))
    spent = time.perf_counter() - begin
    return taken / spent, loader.data_stall / spent


def consumer(folder: Path, seconds: float) -> list[str]:
    """What one rank of 8 sustains, and how long it waits, ranks one after the other."""
    lines, c = [], config("record", folder)
    found: dict[int, list[tuple[float, float]]] = {depth: [] for depth in DEPTHS}
    for rank in range(RANKS):
        for depth in DEPTHS:
            run = t.Run(rank, RANKS, RANKS, torch.device("cpu"))
            loader = t.TrainLoader(dataclasses.replace(c, read_ahead=depth), run)
            free, _ = consume(loader, seconds / 2, np.inf)
            _, stall = consume(loader, seconds, RATE)
            found[depth].append((free, stall))
            loader.ahead.close()
    for depth, rows in found.items():
        free, stall = (statistics.median(column) for column in zip(*rows, strict=True))
        lines.append(
            f"consumer  read ahead {depth}   sustained {free / 1e6:.1f} M tokens/s a rank; at "
            f"{RATE / 1e6:.0f} M tokens/s a data stall of {stall:.3%} (medians of {RANKS} ranks, "
            f"{loader.layout.micro_sequences} x {c.train_seq_len} tokens at a time)"
        )
    return lines


def whole_context(lengths: np.ndarray, context: int) -> float:
    """Mean context of the tokens of documents of these lengths, which are cut at `context` tokens alone."""
    full, rest = lengths // context, lengths % context
    total = (full * context * (context + 1) + rest * (rest + 1)).sum() / 2
    return float(total / lengths.sum())


def orders(c: t.Config, seconds: float) -> list[str]:
    """The mean context in each order, and the rate at which one rank reads it."""
    lines, run = [], t.Run(0, 1, 1, torch.device("cpu"))
    for order in ("rows", "stream", "documents"):
        loader = t.TrainLoader(dataclasses.replace(c, data_order=order, read_ahead=0), run)
        lengths = np.diff(np.append(t.find_documents(loader.stream, 2), len(loader.stream)))
        rate, _ = consume(loader, seconds, np.inf)
        mean = loader.mean_context()
        lines.append(
            f"order     {order:10} mean context {mean:.1f} of {c.train_seq_len} tokens, "
            f"{mean / whole_context(lengths, c.train_seq_len):.4f} of whole documents' (mean length "
            f"{lengths.mean():.0f}); sustained {rate / 1e6:.1f} M tokens/s"
        )
    return lines


def many_documents(tokens: int) -> str:
    """The order of as many documents as hold so many tokens."""
    lengths = np.random.default_rng(0).lognormal(np.log(800) - 0.5, 1.0, round(tokens / 800)).astype(np.int64) + 2
    ends = np.cumsum(lengths)
    order = t.DocumentOrder(ends - lengths, int(ends[-1]), 2048, 0)
    tracemalloc.start()
    begin = time.perf_counter()
    order.parts(0, 0, 2048)
    first = time.perf_counter()
    order.parts(0, order.sequences // 2, 2048)
    second = time.perf_counter()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (
        f"order     {len(lengths)} documents, {ends[-1]} tokens: first sequence after {first - begin:.2f} s, one of "
        f"another window after {second - first:.3f} s; {kept / 1e6:.0f} MB kept, at most {peak / 1e6:.0f} MB, beside "
        f"{order.starts.nbytes / 1e6:.0f} MB of document starts"
    )


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def audit(folder: Path, validation_tokens: int) -> list[str]:
    """What a pass over a shard costs, on one thread."""
    c, lines = config("record", folder), []
    training, stream = t.TokenStream(c, "train"), leaks.ShardStream(t.shard_paths(c, "train"))
    with tempfile.TemporaryDirectory() as other:
        write_tokens(Path(other), dataclasses.replace(c, seed=1), validation_tokens, 800.0)
        validation = leaks.ShardStream(t.shard_paths(dataclasses.replace(c, data_path=other), "train"))
        begin = time.perf_counter()
        documents = leaks.DocumentIndex(validation)
        middle = time.perf_counter()
        windows = leaks.WindowIndex(validation)
        lines.append(
            f"audit     indexing {validation_tokens} validation tokens: documents {middle - begin:.2f} s, "
            f"windows of 50 tokens {time.perf_counter() - middle:.2f} s"
        )
    for words, work in (
        ("a run's check, no hash", lambda: t.scan_shard(training, 0, False)),
        ("a run's check with SHA-256", lambda: t.scan_shard(training, 0, True)),
        ("data/audit.py", lambda: leaks.search_shard(stream, 0, documents, windows, threading.Event())),
    ):
        rate = len(training) / seconds_of(work)
        lines.append(
            f"audit     {words}: {rate / 1e6:.0f} M tokens/s, {2 * rate / 1e9:.2f} GB/s on one core; 10 "
            f"billion tokens on {RANKS} cores: {CHALLENGE_TOKENS / rate / RANKS:.1f} s (computed)"
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
            print(*consumer(Path(folder), options.seconds), *audit(Path(folder), 10_000_000), sep="\n", flush=True)
            print(*orders(config("demo", options.data), options.seconds), sep="\n", flush=True)
            print(*orders(config("record", Path(folder)), options.seconds), sep="\n", flush=True)
        print(many_documents(round(CHALLENGE_TOKENS)))
    except (t.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
