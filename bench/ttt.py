"""Speed and memory of evaluation: targets/s of sliding windows and of test-time training.

    python bench/ttt.py [--documents N] [--mean-length N] [--json FILE]
    python bench/ttt.py --artifact logs/run/model.pgolf --data data/fineweb_sp8192

Each row is a whole evaluation of the same validation stream, by the code that scores a run:

- sliding windows without overlap, and with a stride of 64 targets
- phased test-time training: without training, strictly causal, with a cache of keys and values, on CUDA also without
  CUDA graphs, and in length order
- chunk test-time training

Without an artifact the weights are initial ones, and the stream is random tokens in documents as long as web pages.
With CUDA the model is PRESET=record; without CUDA it is the same architecture at a small shape. Knobs come from the
environment, as for train_gpt.py. If the model is compiled, each evaluation runs twice, and the second one is timed.

With CUDA the last column is the time for the challenge's 50,000 documents on 8 such devices, without compilation and
unpacking. They are 47,851,520 targets of `record`'s vocabulary, by PR #2163's logs, and about 62 million of 1024
tokens. Those logs have 473 to 528 s for phased test-time training. Peak memory is that of the GPU's allocator, or on
CPUs that of the process so far.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt as t  # noqa: E402

# For CPUs, where `record` would be too slow: its whole architecture, but narrow.
SMALL = dict(
    PRESET="record",
    VOCAB_SIZE="1024",
    MODEL_DIM="128",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    TRAIN_SEQ_LEN="256",
    TRAIN_BATCH_TOKENS="4096",
    MICRO_BATCH_TOKENS="4096",
    VAL_BATCH_SIZE="4096",
    TTT_BATCH_SIZE="16",
    TTT_LORA_RANK="16",
    PHASED_TTT_PREFIX_DOCS="16",
    PHASED_TTT_NUM_PHASES="2",
    GLOBAL_TTT_CHUNK_TOKENS="2048",
    TTT_CHUNK_TOKENS="2048",
)
CHALLENGE_DEVICES = 8


def challenge_targets(vocabulary: int) -> int:
    """Targets of the challenge's validation documents, by the size of the vocabulary."""
    return 47_851_520 if vocabulary >= 8192 else 62_000_000


class NoText:
    """Replaces Vocabulary for random tokens: each token is one byte."""

    def __init__(self, c: t.Config):
        pass

    def target_bytes(self, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.ones(len(targets), np.int64)


def configuration(environment: dict[str, str], cuda: bool, folder: str, artifact: bool) -> tuple[t.Config, set[str]]:
    """The configuration for a folder of validation shards, and the names of knobs that the environment sets."""
    small = not artifact and (not cuda or environment.get("DEVICE") == "cpu")
    defaults = SMALL if small else dict(PRESET="record")
    if environment.get("PRESET"):
        defaults = {}
    given = {name: value for name, value in environment.items() if value}
    c, explicit, _ = t.config_from_env({**defaults, **given, "MODE": "eval", "DATA_PATH": folder}, cuda)
    return c, {name for name in explicit if name.upper() in given}


def write_stream(folder: Path, c: t.Config, documents: int, mean_length: float) -> None:
    """Writes a validation shard of random tokens. Document lengths are lognormal with sigma 1 and this mean."""
    generator = np.random.default_rng(c.seed)
    lengths = np.maximum(generator.lognormal(np.log(mean_length) - 0.5, 1.0, documents).astype(np.int64), 2)
    tokens = generator.integers(4, c.vocab_size, lengths.sum() + 1, dtype=np.uint16)
    tokens[np.cumsum([0, *lengths])] = t.BOS_ID
    header = np.zeros(256, "<i4")
    header[:3] = t.SHARD_MAGIC, t.SHARD_VERSION, len(tokens)
    (folder / "fineweb_val_000000.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


@contextlib.contextmanager
def kept_weights(model: t.GPT) -> Iterator[None]:
    """Restores the weights after test-time training."""
    kept = [p.detach().clone() for p in model.parameters()]
    try:
        yield
    finally:
        t.copy_all([p.detach() for p in model.parameters()], kept)
        for p in model.parameters():
            p.grad = None


def evaluations(c: t.Config) -> dict[str, tuple[t.Config, Callable[[t.Evaluator, t.GPT], t.Score]]]:
    """Name -> (settings, function that scores a stream)."""

    def sliding(evaluator: t.Evaluator, model: t.GPT) -> t.Score:
        return evaluator(t.compiled_forward(model))

    stride = min(64, c.eval_context)
    change = dataclasses.replace
    phased, chunk = change(c, ttt_mode="phased", ttt_order="stream"), change(c, ttt_mode="chunk", eval_stride=0)
    by_length = change(phased, ttt_order="length")
    cached = change(phased, ttt_chunk_size=16, ttt_recompute_tokens=min(48, c.ttt_context - 16))
    with_cache = {"phased, cache": cached}
    if c.device == "cuda":
        with_cache["phased, no graphs"] = change(cached, ttt_cuda_graphs="0")
    return {
        "sliding, no overlap": (change(c, eval_stride=0), sliding),
        f"sliding, stride {stride}": (change(c, eval_stride=stride), sliding),
        "phased, learning off": (phased, lambda evaluator, model: t.PhasedTTT(evaluator, model, adapt=False)()),
        "phased": (phased, lambda evaluator, model: t.PhasedTTT(evaluator, model)()),
        **{name: (k, lambda evaluator, model: t.CachedTTT(evaluator, model)()) for name, k in with_cache.items()},
        "phased, length order": (by_length, lambda evaluator, model: t.LengthOrderTTT(evaluator, model)()),
        "chunk": (chunk, lambda evaluator, model: t.ChunkTTT(evaluator, model)()),
    }


def measure(name: str, c: t.Config, model: t.GPT, run: t.Run, score: Callable) -> dict[str, Any]:
    """One evaluation: seconds, targets/s, peak memory and the score."""
    run.seconds.clear()
    evaluator = t.Evaluator(c, run)
    with kept_weights(model):
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run.synchronize()
        begin = time.perf_counter()
        result = score(evaluator, model)
        run.synchronize()
        seconds = time.perf_counter() - begin
    rate, cuda = result.tokens / seconds, run.device.type == "cuda"
    return dict(
        name=name,
        targets=result.tokens,
        seconds=seconds,
        targets_per_second=rate,
        loss=result.loss,
        bpb=result.bpb,
        peak_memory_bytes=run.peak_memory(),
        challenge_seconds=challenge_targets(c.vocab_size) / rate / CHALLENGE_DEVICES if cuda else None,
    )


HEADING = f"{'evaluation':24s}{'targets':>10s}{'seconds':>10s}{'targets/s':>12s}{'nats':>9s}{'peak MiB':>10s}"


def line(row: dict[str, Any], budget: float) -> str:
    """A row as text, below HEADING."""
    text = (
        f"{row['name']:24s}{row['targets']:10d}{row['seconds']:10.2f}{row['targets_per_second']:12.0f}"
        f"{row['loss']:9.4f}{row['peak_memory_bytes'] / 2**20:10.0f}"
    )
    if row["challenge_seconds"] is None:
        return text
    over = " over EVAL_BUDGET_SECONDS" if budget and row["challenge_seconds"] > budget else ""
    return f"{text}   challenge on {CHALLENGE_DEVICES}: {row['challenge_seconds']:.0f} s{over}"


def measured_rows(names: list[str], model: t.GPT, c: t.Config, run: t.Run) -> list[dict[str, Any]]:
    """A row for each evaluation whose name has one of these parts, or for all of them; printed as they come."""
    rows = []
    for name, (settings, score) in evaluations(c).items():
        if not names or any(part in name for part in names):
            if c.compile == "1":
                measure(name, settings, model, run, score)  # compiles
            rows.append(measure(name, settings, model, run, score))
            print(line(rows[-1], c.eval_budget_seconds), flush=True)
    return rows


def measure_all(options: argparse.Namespace, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """All rows, on a stream in the folder or on the given data."""
    cuda = torch.cuda.is_available()
    c, explicit = configuration(environment, cuda, str(options.data or folder), bool(options.artifact))
    run = t.start_run(c, environment)
    if options.artifact:
        model, c = t.load_artifact(Path(options.artifact).read_bytes(), c, explicit, run.device)
    else:
        t.check_config(c)
        model = t.new_model(c).to(run.device)
    if not options.data:
        write_stream(
            folder, c, options.documents or (512 if cuda else 48), options.mean_length or (1240 if cuda else 160)
        )
    names = options.only.split(",") if options.only else []
    print(
        f"{t.hardware(run)}, torch {torch.__version__}, {c.compute_dtype}, attention {t.choose_attention(c)[0]}, "
        f"compile {c.compile}, {t.parameter_count(c)} parameters\n{HEADING}",
        flush=True,
    )
    with contextlib.nullcontext() if options.data else mock.patch.object(t, "Vocabulary", NoText):
        rows = measured_rows(names, model, c, run)
    return dict(
        rows=rows,
        hardware=t.hardware(run),
        versions=t.versions(),
        attention=t.choose_attention(c)[0],
        parameters=t.parameter_count(c),
        config=dataclasses.asdict(c),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--artifact", help="a model.pgolf (default: random weights)")
    parser.add_argument("--data", help="folder with validation shards and tokenizer (default: random documents)")
    parser.add_argument("--documents", type=int, default=0, help="number of random documents")
    parser.add_argument("--mean-length", type=float, default=0, help="mean length of random documents, in tokens")
    parser.add_argument("--only", default="", help="rows to run: comma-separated parts of their names")
    parser.add_argument("--json", metavar="FILE", help="also write all results to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_all(options, Path(folder), dict(os.environ))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
